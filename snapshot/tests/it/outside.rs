//! What a snapshot that comes from others may have opened on this host: nothing, unless the user said so.

use std::{fs, os::unix::fs::symlink, path::Path};

use squib_formats::{digest::Digest, error::FormatError, manifest::Manifest};
use squib_snapshot::{
    ChangedDisks, Existing,
    flatten::flatten,
    observe::Run,
    restore::{DiskError, RestoreError},
    verify::verify,
};

use crate::{
    checks::agreed,
    restores::{back, changed_copy, options, snapshot},
};

fn fifo(path: &Path) {
    assert!(std::process::Command::new("mkfifo").arg(path).status().unwrap().success());
}

fn with_disk_at(dir: &Path, path: &str) -> std::path::PathBuf {
    changed_copy(dir, |manifest| manifest.machine.disks[1].path = path.to_owned())
}

fn not_allowed(error: &RestoreError, expected: &str) -> bool {
    matches!(
        error,
        RestoreError::Disk(DiskError::NotAllowed { id, path })
            if id == "data" && path == Path::new(expected)
    )
}

#[test]
fn no_path_of_a_disk_in_a_snapshot_is_opened_that_the_user_has_not_allowed() {
    let dir = tempfile::tempdir().unwrap();
    snapshot(dir.path());
    let root = fs::canonicalize(dir.path()).unwrap();
    let at = |name: &str| root.join(name).display().to_string();
    // As the disk is, and right in all else; in the end that does not count.
    for place in ["home", "allowed", "allowed-not"] {
        fs::create_dir(root.join(place)).unwrap();
        fs::copy(root.join("data"), root.join(place).join("data")).unwrap();
    }
    symlink(root.join("home/data"), root.join("allowed/link")).unwrap();
    symlink("../home", root.join("allowed/dir")).unwrap();
    fifo(&root.join("home/fifo"));
    let mut options = options(dir.path());
    // A disk that has changed is of no use to who wants to see another.
    options.changed_disks = ChangedDisks::Accept;
    for allowed in [vec![], vec![root.join("allowed")]] {
        options.allowed_disks = allowed;
        for path in [
            &*at("home/data"),
            &at("home/fifo"),
            &at("home/missing"),
            &at("allowed-not/data"),
            &at("allowed/link"),
            &at("allowed/dir/data"),
            &at("allowed/../home/data"),
            "data",
            "./home/data",
            "../../../../etc/passwd",
            "/etc/passwd",
            "/proc/self/mem",
            "/proc/self/fd/0",
            "/dev/null",
            "/dev/stdin",
            "",
            "\u{1b}]0;x\u{7}/etc/passwd",
        ] {
            let path = path.to_owned();
            let snapshot = with_disk_at(dir.path(), &path);
            assert!(!agreed(&snapshot, &options).accepted);
            let Err(error) = back(&snapshot, &options) else { panic!("{path} was opened") };
            assert!(not_allowed(&error, &path), "{path}: {error}");
        }
    }
    // And the same without the user's word for any place, as the bytes are.
    options.changed_disks = ChangedDisks::Refuse;
    options.allowed_disks.clear();
    let error = back(&dir.path().join("snap"), &options).err().unwrap();
    assert!(not_allowed(&error, &dir.path().join("data").display().to_string()), "{error}");
}

#[test]
fn what_the_user_names_or_allows_is_opened_and_the_machine_has_its_real_path() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = snapshot(dir.path());
    let root = fs::canonicalize(dir.path()).unwrap();
    fs::create_dir(root.join("disks.d")).unwrap();
    fs::rename(root.join("data"), root.join("disks.d/data")).unwrap();
    symlink("disks.d/data", root.join("data")).unwrap();
    let mut options = options(dir.path());
    for allowed in ["disks.d", "disks.d/data", "."] {
        options.allowed_disks = vec![root.join(allowed)];
        assert!(agreed(&path, &options).accepted, "{allowed}");
    }
    let restored = back(&path, &options).unwrap();
    assert_eq!(restored.machine.config().disks[1].path, root.join("disks.d/data"));
    drop(restored);
    fs::remove_file(options.disk_dir.clone().unwrap().join("root.img")).unwrap();
    options.allowed_disks.clear();
    options.disk_places.insert("data".into(), root.join("data"));
    assert!(agreed(&path, &options).accepted);
}

#[test]
fn kernel_and_initrd_of_a_snapshot_are_not_opened() {
    let dir = tempfile::tempdir().unwrap();
    snapshot(dir.path());
    let pipe = dir.path().join("pipe");
    fifo(&pipe);
    let options = options(dir.path());
    for path in [&*pipe.display().to_string(), "/dev/tty", "../../etc/shadow", ""] {
        let snapshot = changed_copy(dir.path(), |manifest| {
            manifest.machine.kernel = path.to_owned();
            manifest.machine.initrd = Some(path.to_owned());
        });
        assert!(agreed(&snapshot, &options).accepted, "{path}");
    }
}

#[test]
fn a_hint_at_a_parent_leads_to_nothing_but_the_snapshot_of_that_id() {
    let dir = tempfile::tempdir().unwrap();
    snapshot(dir.path());
    let trap = dir.path().join("trap");
    fs::create_dir(&trap).unwrap();
    fifo(&trap.join("manifest"));
    fifo(&dir.path().join("pipe"));
    let at = |name: &str| dir.path().join(name).display().to_string();
    let options = options(dir.path());
    // The snapshot beside it is there and whole, and has another id.
    for hint in [&*at("snap"), &at("trap"), &at("pipe"), "../snap", "/dev/null", "/proc/self", ""] {
        let change = |manifest: &mut Manifest| {
            manifest.parent = Some(Digest([7; 32]));
            manifest.parent_hint = Some(hint.to_owned());
        };
        let snapshot = changed_copy(dir.path(), change);
        assert!(!agreed(&snapshot, &options).accepted);
        let missing = |error: &FormatError| matches!(error, FormatError::MissingParent { .. });
        match back(&snapshot, &options).err().unwrap() {
            RestoreError::Format(error) => assert!(missing(&error), "{hint}: {error}"),
            error => panic!("{hint}: {error}"),
        }
        let damage = verify(&snapshot, &[], Default::default()).err().unwrap();
        assert!(damage.0.iter().any(missing), "{hint}: {damage}");
        let (output, how) = (dir.path().join("full"), Default::default());
        let error =
            flatten(&snapshot, &[], &output, Existing::Refuse, how, &Run::default()).err().unwrap();
        assert!(missing(&error), "{hint}: {error}");
        assert!(!output.exists());
    }
}

#[test]
fn a_disk_that_is_allowed_must_still_be_what_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = snapshot(dir.path());
    let options = options(dir.path());
    fs::write(dir.path().join("data"), vec![9; 4 << 20]).unwrap();
    assert!(!agreed(&path, &options).accepted);
    let error = back(&path, &options).err().unwrap();
    assert!(matches!(error, RestoreError::Disk(DiskError::Changed { .. })), "{error}");
}
