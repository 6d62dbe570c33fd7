//! Removing, replacing and rebasing snapshots that others build on.

use std::{
    fs,
    os::unix::fs::{FileExt, symlink},
    path::{Path, PathBuf},
};

use squib_formats::{
    image::Control, manifest::SectionRecord, publish::Staging, snapshot_dir::Snapshot,
};
use squib_snapshot::{
    Durability, Existing, FormatError,
    capture::{CaptureError, CaptureOptions, capture},
    diff::diff,
    observe::Run,
    rebase::rebase,
    remove::{RemoveError, dependents, remove},
    verify::verify,
};
use vm_memory::{Bytes, GuestAddress};

use crate::guest::Still;

/// Full snapshots `a` and `x`, `b` on `a`, `c` on `b`, in one directory; each of another state.
fn family(dir: &Path) -> Still {
    let guest = Still::new(dir);
    for (round, (name, parent)) in
        (1u64..).zip([("a", None), ("b", Some("a")), ("c", Some("b")), ("x", None)])
    {
        guest.ram.write_obj(round, GuestAddress(guest.ram.base() + (50 << 20))).unwrap();
        let disk = fs::File::options().write(true).open(guest.disk_path(0)).unwrap();
        disk.write_all_at(&[round as u8], 300_000).unwrap();
        let parent = parent.map(|parent| dir.join(parent));
        capture(&guest, &dir.join(name), &CaptureOptions { parent, ..Default::default() }).unwrap();
    }
    guest
}

fn intact(path: &Path) {
    verify(path, &[], Control::default()).unwrap_or_else(|damage| panic!("{damage}"));
}

#[test]
fn a_snapshot_that_others_build_on_is_not_removed() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| fs::canonicalize(dir.path()).unwrap().join(name);
    family(dir.path());
    let RemoveError::Needed { dependents, .. } = remove(&at("a"), &[], false).unwrap_err() else {
        panic!()
    };
    let found: Vec<_> = dependents.iter().map(|d| (d.path.clone(), d.distance)).collect();
    assert_eq!(found, [(at("b"), 1), (at("c"), 2)]);
    intact(&at("c"));
    for name in ["c", "b", "a"] {
        let id = Snapshot::open(&at(name)).unwrap().id();
        let removed = remove(&at(name), &[], false).unwrap();
        assert_eq!((removed.id, removed.dependents.len()), (Some(id), 0));
        assert!(removed.bytes > 0 && !at(name).exists());
    }
    intact(&at("x"));
    let hidden = fs::read_dir(dir.path())
        .unwrap()
        .filter(|entry| entry.as_ref().unwrap().file_name().as_encoded_bytes().starts_with(b"."));
    assert_eq!(hidden.count(), 0, "nothing is left behind");
}

#[test]
fn one_that_lies_elsewhere_counts_if_the_place_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let away = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    family(dir.path());
    fs::rename(at("b"), away.path().join("b")).unwrap();
    fs::remove_dir_all(at("c")).unwrap();
    assert_eq!(dependents(&at("a"), &[]).unwrap(), []);
    for place in [away.path().to_owned(), away.path().join("b")] {
        assert_eq!(dependents(&at("a"), std::slice::from_ref(&place)).unwrap().len(), 1);
        let error = remove(&at("a"), &[place], false).unwrap_err();
        assert!(matches!(error, RemoveError::Needed { .. }), "{error}");
    }
    let removed = remove(&at("a"), &[away.path().to_owned()], true).unwrap();
    assert_eq!(removed.dependents.len(), 1);
    assert!(!at("a").exists());
}

#[test]
fn only_a_snapshot_and_only_its_own_files_are_removed_unless_forced() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    family(dir.path());
    fs::create_dir(at("mine")).unwrap();
    fs::write(at("mine/file"), "precious").unwrap();
    symlink(at("x"), at("link")).unwrap();
    for (name, forced) in [("mine", true), ("none", true), ("root", true), ("link", true)] {
        let error = remove(&at(name), &[], forced).unwrap_err();
        assert!(matches!(error, RemoveError::Format(_)), "{name}: {error}");
    }
    assert!(at("mine/file").exists() && at("link").exists());
    intact(&at("x"));

    fs::write(at("x/notes"), "precious").unwrap();
    let error = remove(&at("x"), &[], false).unwrap_err();
    assert!(
        matches!(&error, RemoveError::Unlisted { names, .. } if names == &["notes"]),
        "{error}"
    );
    assert!(at("x/notes").exists());
    assert_eq!(remove(&at("x"), &[], true).unwrap().unlisted, ["notes"]);

    let mut bytes = fs::read(at("c/manifest")).unwrap();
    bytes[100] ^= 1;
    fs::write(at("c/manifest"), bytes).unwrap();
    let error = remove(&at("c"), &[], false).unwrap_err();
    assert!(matches!(error, RemoveError::Unreadable { .. }), "{error}");
    assert_eq!(remove(&at("c"), &[], true).unwrap().id, None);
    assert!(!at("c").exists());
}

#[test]
fn what_a_killed_removal_left_is_swept_by_the_next_writer() {
    let dir = tempfile::tempdir().unwrap();
    family(dir.path());
    let left = dir.path().join(".x.partial-1-removed-0");
    fs::rename(dir.path().join("x"), &left).unwrap();
    drop(Staging::new(&dir.path().join("x"), Existing::Refuse).unwrap());
    assert!(!left.exists());
}

#[test]
fn a_snapshot_that_others_build_on_is_not_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let away = tempfile::tempdir().unwrap();
    let guest = family(dir.path());
    guest.asked();
    let options = CaptureOptions { existing: Existing::Replace, ..CaptureOptions::default() };
    let error = capture(&guest, &dir.path().join("a"), &options).unwrap_err();
    let CaptureError::ReplacesNeeded { dependents, .. } = &error else { panic!("{error}") };
    assert_eq!(dependents.len(), 2);
    assert!(error.to_string().contains("/b, "), "{error}");
    fs::rename(dir.path().join("c"), away.path().join("c")).unwrap();
    let elsewhere =
        CaptureOptions { dependents_in: vec![away.path().to_owned()], ..options.clone() };
    let error = capture(&guest, &dir.path().join("b"), &elsewhere).unwrap_err();
    assert!(matches!(error, CaptureError::ReplacesNeeded { .. }), "{error}");
    assert_eq!(guest.asked(), [], "refused before the guest is paused");
    intact(&dir.path().join("b"));
    capture(&guest, &dir.path().join("x"), &options).unwrap();
}

fn sections(path: &Path) -> Vec<SectionRecord> {
    Snapshot::open(path).unwrap().manifest().sections.clone()
}

#[test]
fn a_rebased_snapshot_is_the_same_state_on_another_parent() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    family(dir.path());
    // A difference onto a stranger, a full one onto a chain, and one onto its own parent.
    for (round, (from, onto, links)) in
        [("c", "x", 2), ("x", "c", 4), ("c", "b", 3), ("a", "a", 2)].into_iter().enumerate()
    {
        let output = at(&format!("out{round}"));
        let made = rebase(
            &at(from),
            &[],
            &at(onto),
            &output,
            Existing::Refuse,
            Durability::None,
            &Run::default(),
        )
        .unwrap();
        assert_eq!(made.links, links, "{from} onto {onto}");
        let (old, new) = (Snapshot::open(&at(from)).unwrap(), Snapshot::open(&output).unwrap());
        assert_eq!(new.manifest().parent, Some(Snapshot::open(&at(onto)).unwrap().id()));
        assert_eq!((new.id(), new.manifest().parent), (made.id, Some(made.parent)));
        assert_eq!(new.manifest().images, old.manifest().images);
        assert_eq!(sections(&output), sections(&at(from)));
        assert_eq!(new.manifest().machine, old.manifest().machine);
        assert_eq!(new.manifest().created, old.manifest().created);
        let data = fs::metadata(output.join("memory.zst")).unwrap().len();
        assert!(data < 1000, "{data} bytes are stored");
        intact(&output);
        assert!(diff(&at(from), &output, &[], Control::default()).unwrap().equal);
    }
    // Only the new parent is needed.
    for name in ["a", "b", "c"] {
        fs::remove_dir_all(at(name)).unwrap();
    }
    intact(&at("out0"));
}

#[test]
fn a_rebase_that_fails_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    family(dir.path());
    let names = || {
        let mut names: Vec<PathBuf> =
            fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
        names.sort();
        names
    };
    let before = names();
    let run = Run::default();
    let onto = |from: &str, onto: &str, to: &str, run: &Run<'_>| {
        rebase(&at(from), &[], &at(onto), &at(to), Existing::Refuse, Durability::None, run)
            .unwrap_err()
    };
    assert!(matches!(onto("c", "x", "a", &run), FormatError::Exists { .. }));
    assert!(matches!(onto("c", "root", "out", &run), FormatError::NotASnapshot { .. }));
    let cancel = std::sync::atomic::AtomicBool::new(true);
    let cancelled = Run { cancel: &cancel, ..Run::default() };
    assert!(matches!(onto("c", "x", "out", &cancelled), FormatError::Cancelled));
    let data = at("a/memory.zst");
    let mut bytes = fs::read(&data).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&data, bytes).unwrap();
    let damaged = onto("c", "x", "out", &run).to_string();
    assert!(damaged.contains("chunk"), "{damaged}");
    fs::rename(at("a"), at("z")).unwrap();
    fs::remove_dir_all(at("z")).unwrap();
    assert!(matches!(onto("c", "x", "out", &run), FormatError::MissingParent { .. }));
    assert_eq!(names(), before.into_iter().filter(|p| *p != at("a")).collect::<Vec<_>>());
}
