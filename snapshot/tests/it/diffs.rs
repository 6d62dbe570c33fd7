//! Differences of whole machines: capture, restore, flatten, compare.

use std::{
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use parking_lot::Mutex;
use squib_formats::{
    image::{Control, ImageReader, digest_file},
    snapshot_dir::Snapshot,
};
use squib_snapshot::{
    Durability, Existing, FormatError,
    capture::{CaptureError, CaptureOptions, capture},
    diff::{Region, diff},
    flatten::flatten,
    inspect::inspect,
    observe::{Observer, Phase, Run},
    remove::{RemoveError, Removed, remove},
    verify::verify,
};
use vm_memory::{Bytes, GuestAddress};

use crate::guest::Still;

fn options(parent: Option<PathBuf>) -> CaptureOptions<'static> {
    CaptureOptions { parent, ..CaptureOptions::default() }
}

/// The digests of all images of the snapshot at `path`.
fn digests(path: &Path) -> Vec<String> {
    let snapshot = Snapshot::open(path).unwrap();
    snapshot.manifest().images.iter().map(|image| image.digest.to_string()).collect()
}

/// Changes two pages of memory far from each other, and a byte of the writable disk.
fn work(guest: &Still, round: u64) {
    for offset in [round * 4096 + 5, (40 << 20) + round * 70_000] {
        let address = GuestAddress(guest.ram.base() + offset);
        guest.ram.write_obj(round + 1, address).unwrap();
    }
    let disk = fs::File::options().write(true).open(guest.disk_path(0)).unwrap();
    disk.write_all_at(&[round as u8 + 1], 700_000 + round).unwrap();
}

#[test]
fn a_difference_and_a_full_snapshot_of_one_state_have_equal_digests() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let guest = Still::new(dir.path());
    capture(&guest, &at("0"), &options(None)).unwrap();
    for round in 1..5 {
        work(&guest, round);
        let parent = at(&format!("{}", round - 1));
        let captured = capture(&guest, &at(&format!("{round}")), &options(Some(parent))).unwrap();
        assert!(captured.memory.parent > 0);
        assert!(captured.memory.stored < 1000, "{} bytes", captured.memory.stored);
    }
    capture(&guest, &at("full"), &options(None)).unwrap();
    assert_eq!(digests(&at("4")), digests(&at("full")));
    verify(&at("4"), &[], Control::default()).unwrap_or_else(|damage| panic!("{damage}"));

    let made =
        flatten(&at("4"), &[], &at("flat"), Existing::Refuse, Durability::None, &Run::default())
            .unwrap();
    assert_eq!(made.links, 5);
    let flat = Snapshot::open(&at("flat")).unwrap();
    assert_eq!((flat.manifest().parent, flat.header().minor), (None, squib_formats::header::MINOR));
    assert_eq!(digests(&at("flat")), digests(&at("full")));
    assert!(diff(&at("flat"), &at("full"), &[], Control::default()).unwrap().equal);
    // The flat one stands alone.
    for round in 0..5 {
        fs::remove_dir_all(at(&format!("{round}"))).unwrap();
    }
    verify(&at("flat"), &[], Control::default()).unwrap_or_else(|damage| panic!("{damage}"));
    let disk = ImageReader::open(&flat, "disk-root").unwrap();
    let now = digest_file(guest.disk_path(0), Control::default()).unwrap();
    assert_eq!(disk.record().digest, now.digest);
}

/// Tries to remove the snapshot `.0` whenever a capture goes on.
struct Remover(PathBuf, Mutex<Vec<Result<Removed, RemoveError>>>);

impl Observer for Remover {
    fn begin(&self, phase: &Phase) {
        if *phase != Phase::Pause {
            self.1.lock().push(remove(&self.0, &[], false));
        }
    }
}

#[test]
fn a_parent_is_not_removed_while_a_difference_to_it_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let guest = Still::new(dir.path());
    capture(&guest, &at("a"), &options(None)).unwrap();
    let remover = Remover(at("a"), Mutex::default());
    let run = Run { observer: &remover, ..Run::default() };
    capture(&guest, &at("b"), &CaptureOptions { run, ..options(Some(at("a"))) }).unwrap();
    let tries = remover.1.into_inner();
    assert!(tries.len() > 3);
    for tried in tries {
        assert!(matches!(tried, Err(RemoveError::InUse { .. })), "{tried:?}");
    }
    let tried = remove(&at("a"), &[], false);
    assert!(matches!(tried, Err(RemoveError::Needed { .. })), "{tried:?}");
    remove(&at("b"), &[], false).unwrap();
    remove(&at("a"), &[], false).unwrap();
}

#[test]
fn what_changed_is_listed_by_region() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    let guest = Still::new(dir.path());
    capture(&guest, &a, &options(None)).unwrap();
    let write = |offset: u64| {
        guest.ram.write_obj(1u64, GuestAddress(guest.ram.base() + offset)).unwrap();
    };
    // The end of a chunk and the start of the next, and one apart.
    [(49 << 20) - 8, 49 << 20, 60 << 20].into_iter().for_each(write);
    capture(&guest, &b, &options(Some(a.clone()))).unwrap();
    fs::rename(&a, dir.path().join("elsewhere")).unwrap();
    let found = diff(&dir.path().join("elsewhere"), &b, &[], Control::default()).unwrap();
    assert!(!found.equal);
    assert!(found.sections.is_empty() && found.machine.is_empty());
    let [memory, root] = &found.images[..] else { panic!() };
    assert_eq!((memory.changed_chunks, memory.changed_pages), (3, Some(3)));
    assert_eq!(memory.changed_bytes, 3 * 4096);
    let areas: Vec<_> = memory
        .areas
        .iter()
        .map(|a| (a.name, a.offset, a.changed_chunks, a.changed_pages))
        .collect();
    assert_eq!(areas, [("RAM", 48 << 20, 3, Some(3))]);
    let region = |offset, length| Region { offset, length };
    assert_eq!(
        memory.regions,
        [region((49 << 20) - (1 << 16), 2 << 16), region(60 << 20, 1 << 16)]
    );
    assert_eq!((&*root.name, root.changed_chunks), ("disk-root", 0));
}

#[test]
fn a_snapshot_that_the_new_one_builds_on_is_not_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    let guest = Still::new(dir.path());
    capture(&guest, &a, &options(None)).unwrap();
    work(&guest, 1);
    capture(&guest, &b, &options(Some(a.clone()))).unwrap();
    guest.asked();
    for place in [&a, &b] {
        let options = CaptureOptions { existing: Existing::Replace, ..options(Some(b.clone())) };
        let error = capture(&guest, place, &options).unwrap_err();
        assert!(matches!(error, CaptureError::ReplacesParent { .. }), "{error}");
    }
    assert_eq!(guest.asked(), [], "refused before the guest is paused");
    verify(&b, &[], Control::default()).unwrap_or_else(|damage| panic!("{damage}"));
}

#[test]
fn a_difference_without_its_parent_says_which_one_it_needs() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    let away = tempfile::tempdir().unwrap();
    let guest = Still::new(dir.path());
    let id = capture(&guest, &a, &options(None)).unwrap().id;
    work(&guest, 1);
    capture(&guest, &b, &options(Some(a.clone()))).unwrap();
    let found = inspect(&b, &[]).unwrap();
    assert_eq!(&*found.format, "1.4");
    assert_eq!(found.chain.unwrap()[0].id, id);
    assert!(found.images[0].patch_chunks + found.images[0].parent_chunks > 0);

    let moved = away.path().join("moved");
    fs::rename(&a, &moved).unwrap();
    assert_eq!(inspect(&b, &[]).unwrap().chain, None);
    let error = verify(&b, &[], Control::default()).unwrap_err().to_string();
    assert!(error.contains(&id.to_string()), "{error}");
    let flat = dir.path().join("flat");
    let error =
        flatten(&b, &[], &flat, Existing::Refuse, Durability::None, &Run::default()).unwrap_err();
    assert!(matches!(error, FormatError::MissingParent { id: named, .. } if named == id));
    assert!(!flat.exists());
    let error = capture(&guest, &dir.path().join("c"), &options(Some(b.clone()))).unwrap_err();
    assert!(matches!(error, CaptureError::Format(FormatError::MissingParent { .. })), "{error}");

    let places = [away.path().to_owned()];
    verify(&b, &places, Control::default()).unwrap_or_else(|damage| panic!("{damage}"));
    flatten(&b, &places, &flat, Existing::Refuse, Durability::None, &Run::default()).unwrap();
    assert_eq!(digests(&flat), digests(&b));
}

#[test]
fn after_a_full_disk_the_next_difference_is_right() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let guest = Still::new(dir.path());
    capture(&guest, &at("a"), &options(None)).unwrap();
    work(&guest, 1);
    for limit in [0, 600, 3000, 6000] {
        let options = CaptureOptions { limit: Some(limit), ..options(Some(at("a"))) };
        let error = capture(&guest, &at("b"), &options).unwrap_err();
        assert!(matches!(error, CaptureError::Format(FormatError::NoRoom { .. })), "{error}");
        assert!(!at("b").exists());
        work(&guest, limit % 7);
    }
    capture(&guest, &at("b"), &options(Some(at("a")))).unwrap();
    capture(&guest, &at("full"), &options(None)).unwrap();
    assert_eq!(digests(&at("b")), digests(&at("full")));
    verify(&at("b"), &[], Control::default()).unwrap_or_else(|damage| panic!("{damage}"));
}

#[test]
fn changes_of_machine_sections_and_outside_disks_are_told_and_chunks_where_pages_cannot_be() {
    let dir = tempfile::tempdir().unwrap();
    let away = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let mut guest = Still::new(dir.path());
    capture(&guest, &at("a"), &options(None)).unwrap();
    work(&guest, 1);
    capture(&guest, &at("b"), &options(Some(at("a")))).unwrap();
    guest.config.vcpus = 2;
    fs::write(guest.disk_path(1), [8; 4096]).unwrap();
    capture(&guest, &at("c"), &options(None)).unwrap();

    let found = diff(&at("b"), &at("c"), &[], Control::default()).unwrap();
    let changes: Vec<_> = found.machine.iter().map(|change| &*change.what).collect();
    assert_eq!(changes, ["vCPUs", "disk data: bytes"]);
    assert!(!found.equal, "the guest sees another disk");
    assert!(found.images.iter().all(|image| image.changed_chunks == 0));

    let whole = diff(&at("a"), &at("b"), &[], Control::default()).unwrap();
    let memory = &whole.images[0];
    assert_eq!((memory.changed_chunks, memory.changed_pages), (2, Some(2)));
    assert_eq!(whole.images[1].changed_bytes, 4096, "{:?}", whole.images[1]);
    // `b` alone has no bytes to compare with those of `a`.
    fs::rename(at("a"), away.path().join("a")).unwrap();
    fs::create_dir(at("apart")).unwrap();
    fs::rename(at("b"), at("apart/b")).unwrap();
    let index = diff(&at("c"), &at("apart/b"), &[], Control::default()).unwrap();
    assert_eq!((index.images[0].changed_chunks, index.images[0].changed_pages), (0, None));
    let parents = [away.path().to_owned()];
    let found = diff(&at("c"), &at("apart/b"), &parents, Control::default()).unwrap();
    assert_eq!(found.images[0].changed_pages, Some(0));
}
