//! Images whose raw bytes lie in a file that is a clone.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::BorrowedFd,
        unix::fs::{FileExt, PermissionsExt, symlink},
    },
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::{
    common::{self, Bytes, Copies, Target},
    damage::{restore, rewrite, with_damage},
};
use proptest::prelude::*;
use rustix::io::Errno;
use squib_formats::{
    digest::Digest,
    error::FormatError,
    image::{
        Control, HEADER_LEN, ImageOptions, ImageReader, ImageSource, Record, digest_reader,
        is_zero, write_diff, write_image, write_raw_image,
    },
    layer::{Layer, Real},
    publish::{Existing, Staging},
    reorder::reorder_snapshot,
    sections::write_sections,
    snapshot_dir::Snapshot,
    verify::verify,
};

const CHUNK: usize = 64 << 10;
const RAW: &str = "disk-root.raw";

fn load(snapshot: &Snapshot) -> Vec<u8> {
    let image = ImageReader::open(snapshot, "disk-root").unwrap();
    let target = Target::new(image.record().size as usize, 0xee);
    image.load(&target, Control::default()).unwrap();
    target.bytes.into_inner().unwrap()
}

fn damage(path: &Path) -> String {
    verify(path, &[], Control::default()).expect_err("damaged").to_string()
}

#[test]
fn a_raw_image_reads_back_as_written() {
    let (_keep, path) = common::fresh_raw();
    let verified = verify(&path, &[], Control::default()).unwrap();
    assert_eq!(verified.unlisted, [""; 0]);
    let snapshot = verified.snapshot;
    assert_eq!(snapshot.header().minor, squib_formats::header::MINOR);
    let raw = common::raw_disk();
    assert!(load(&snapshot) == raw);
    assert!(fs::read(path.join(RAW)).unwrap() == raw);
    let metadata = fs::metadata(path.join(RAW)).unwrap();
    assert_eq!(metadata.permissions().mode() & 0o7777, 0o600);
    assert_eq!(fs::metadata(path.join("disk-root.zst")).unwrap().len(), 0);
    let record = snapshot.manifest().image("disk-root").unwrap();
    assert_eq!(record.digest, digest_reader("raw", &mut &raw[..]).unwrap().digest);
    assert_eq!(snapshot.manifest().file(RAW).unwrap().digest, record.digest);
    let image = ImageReader::open(&snapshot, "disk-root").unwrap();
    let mut reader = image.chunks(4).unwrap();
    for chunk in [5, 0, 6, 6, 1, 3, 2, 4] {
        let bytes = &raw[chunk * CHUNK..raw.len().min((chunk + 1) * CHUNK)];
        let expected = (!is_zero(bytes)).then_some(bytes);
        assert!(reader.read(chunk as u64).unwrap() == expected, "chunk {chunk}");
        let is_raw = matches!(image.index().record(chunk as u64), Record::Raw { .. });
        assert_eq!(is_raw, expected.is_some(), "chunk {chunk}");
    }
}

#[test]
fn what_is_known_of_a_clone_is_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snap");
    let raw = common::raw_disk();
    let mut staging = Staging::with_layer(&path, Existing::Refuse, Arc::new(Copies)).unwrap();
    let mut manifest = {
        let (_keep, sample) = common::fresh_raw();
        Snapshot::open(&sample).unwrap().manifest().clone()
    };
    manifest.sections = write_sections(&mut staging, &common::sections()).unwrap();
    let (source, options) = (Bytes(common::memory()), ImageOptions::default());
    write_image(&mut staging, "memory", &source, options, Control::default()).unwrap();
    let file = common::file_of(&raw);
    let clone = staging.clone_file(RAW, &file, raw.len() as u64).unwrap().unwrap();
    // What is written from now on is not in the clone.
    file.write_all_at(&[0xaa; 4096], 3 * CHUNK as u64).unwrap();
    let asked = AtomicU64::new(0);
    let known = |offset: u64, len: usize| {
        assert_eq!((offset % CHUNK as u64, len), (0, CHUNK), "a whole chunk");
        asked.fetch_add(1, Ordering::Relaxed);
        // Chunk 0 has other bytes: so it can be seen that nobody reads them.
        let bytes = [&[9; CHUNK], &raw[CHUNK..]].concat();
        (offset < 3 * CHUNK as u64).then(|| Digest::of(&bytes[offset as usize..][..len]))
    };
    let control = Control::default();
    let written =
        write_raw_image(&mut staging, "disk-root", clone, &known, options, control).unwrap();
    // Of the chunks that the file system has no hole in.
    let data = raw.chunks_exact(CHUNK).filter(|chunk| !is_zero(chunk)).count();
    assert_eq!(asked.into_inner(), data as u64);
    let zero = raw.chunks(CHUNK).filter(|chunk| is_zero(chunk)).map(<[u8]>::len).sum::<usize>();
    assert_eq!(written.zero, zero as u64);
    assert_eq!((written.raw, written.stored), ((raw.len() - zero) as u64, 0));
    manifest.machine.disks[0].digest = written.record.digest;
    manifest.images[1] = written.record;
    staging.publish(manifest).unwrap();
    // The wrong answer shows, by chunk and with both digests.
    let error = restore(&path).unwrap_err();
    let FormatError::Digest { file, what, expected, found } = error else { panic!("{error}") };
    assert_eq!((&*file, &*what), (RAW, "chunk 0"));
    assert_eq!((expected, found), (Digest::of(&[9; CHUNK]), Digest::of(&raw[..CHUNK])));
    assert!(damage(&path).contains("disk-root.raw: chunk 0 is damaged"));
}

#[test]
fn a_damaged_raw_file_is_named_by_chunk_and_digests() {
    let (_keep, path) = common::fresh_raw();
    let raw = common::raw_disk();
    for at in (0..raw.len()).step_by(raw.len() / 97) {
        let flip = |bytes: &mut Vec<u8>| bytes[at] ^= 1 << (at % 8);
        with_damage(&path, RAW, flip, || {
            let (first, chunk) = (at / CHUNK * CHUNK, at / CHUNK);
            let mut bytes = raw[first..raw.len().min(first + CHUNK)].to_vec();
            let was_zero = is_zero(&bytes);
            let mut digest = || {
                bytes.resize(CHUNK, 0);
                Digest::of(&bytes)
            };
            let expected = digest();
            bytes[at - first] ^= 1 << (at % 8);
            let found = Digest::of(&bytes);
            let text = format!(
                "disk-root.raw: chunk {chunk} is damaged: digest {found}, expected {expected}"
            );
            assert_eq!(damage(&path), text, "byte {at}");
            // Nobody looks into the file for a chunk of zeros.
            match restore(&path) {
                Ok(()) => assert!(was_zero, "byte {at}"),
                Err(error) => assert_eq!(error.to_string(), text, "byte {at}"),
            }
        });
    }
    verify(&path, &[], Control::default()).unwrap();
}

#[test]
fn a_raw_file_is_checked_also_where_its_index_is_damaged() {
    let (_keep, path) = common::fresh_raw();
    with_damage(
        &path,
        "disk-root.idx",
        |bytes| bytes[20] ^= 1,
        || {
            let text = damage(&path);
            assert!(text.contains("disk-root.idx") && !text.contains(RAW), "{text}");
            with_damage(
                &path,
                RAW,
                |bytes| bytes[5] ^= 1,
                || {
                    let text = damage(&path);
                    assert!(text.contains("disk-root.idx"), "{text}");
                    assert!(text.contains("disk-root.raw: the file is damaged"), "{text}");
                },
            );
        },
    );
}

#[test]
fn a_raw_file_that_is_cut_longer_missing_or_a_link_is_named() {
    let (_keep, path) = common::fresh_raw();
    let refused = |expected: &str| {
        for text in [restore(&path).unwrap_err().to_string(), damage(&path)] {
            assert!(text.contains(RAW) && text.contains(expected), "{text}");
        }
    };
    let length = common::raw_disk().len();
    for keep in [0, 1, CHUNK, length - 1] {
        let cut = |bytes: &mut Vec<u8>| bytes.truncate(keep);
        with_damage(&path, RAW, cut, || refused(&format!("the file is {keep} bytes long")));
    }
    with_damage(&path, RAW, |bytes| bytes.push(0), || refused("bytes long"));
    let aside = path.with_extension("aside");
    fs::rename(path.join(RAW), &aside).unwrap();
    refused("cannot open");
    symlink(&aside, path.join(RAW)).unwrap();
    refused("symbolic link");
    fs::remove_file(path.join(RAW)).unwrap();
    fs::rename(&aside, path.join(RAW)).unwrap();
    verify(&path, &[], Control::default()).unwrap();
}

#[test]
fn swapped_raw_files_are_found() {
    let (_keep, path) = common::fresh_raw();
    let dir = tempfile::tempdir().unwrap();
    let other = dir.path().join("other");
    let mut staging = Staging::with_layer(&other, Existing::Refuse, Arc::new(Copies)).unwrap();
    let mut manifest = common::stage(&mut staging, Control::default()).unwrap();
    let mut disk = common::raw_disk();
    disk[4 * CHUNK + 7] ^= 1;
    let image = common::write_raw(&mut staging, "disk-two", &disk, Control::default()).unwrap();
    let mut record = manifest.machine.disks[0].clone();
    (record.id, record.size, record.digest) = ("two".into(), image.size, image.digest);
    manifest.machine.disks.push(record);
    manifest.images.push(image);
    staging.publish(manifest).unwrap();
    verify(&other, &[], Control::default()).unwrap();
    fs::copy(path.join(RAW), other.join("disk-two.raw")).unwrap();
    let text = restore(&other).unwrap_err().to_string();
    assert!(text.starts_with("disk-two.raw: chunk 4 is damaged"), "{text}");
    assert_eq!(damage(&other), text);
}

#[test]
fn records_and_files_that_do_not_fit_are_refused_by_name() {
    // Raw records, and the manifest of a snapshot without the file.
    let (_keep, path) = common::fresh_raw();
    rewrite(&path, |manifest| manifest.files.retain(|file| file.name != RAW));
    let text = restore(&path).unwrap_err().to_string();
    assert!(text.contains("a raw record, but there is no disk-root.raw"), "{text}");

    // A raw file, and an image that has frames.
    let (_keep, path) = common::fresh_raw();
    let mut index = fs::read(path.join("disk-root.idx")).unwrap();
    index[HEADER_LEN] = 1;
    index[HEADER_LEN + 1] = 1;
    fs::write(path.join("disk-root.idx"), &index).unwrap();
    rewrite(&path, |_| ());
    let text = restore(&path).unwrap_err().to_string();
    assert!(text.contains("a data record, but the image has a raw file"), "{text}");

    // A raw record with a digest that another chunk has.
    let (_keep, path) = common::fresh_raw();
    let mut index = fs::read(path.join("disk-root.idx")).unwrap();
    let (first, other) = (common::record_of(&index, 0), common::record_of(&index, 5));
    index.copy_within(other.start + 16..other.end, first.start + 16);
    fs::write(path.join("disk-root.idx"), &index).unwrap();
    rewrite(&path, |_| ());
    let text = restore(&path).unwrap_err().to_string();
    assert!(text.contains("the image digest"), "{text}");
}

/// Publishes `disk` as the difference to the snapshot at `parent`, which has a raw disk.
fn difference(path: &Path, parent: &Path, disk: &[u8]) {
    let parent = Snapshot::open(parent).unwrap();
    let mut staging = Staging::new(path, Existing::Refuse).unwrap();
    let mut manifest = parent.manifest().clone();
    manifest.sections = write_sections(&mut staging, &common::sections()).unwrap();
    manifest.images.clear();
    for (name, bytes) in [("memory", common::memory()), ("disk-root", disk.to_vec())] {
        let base = ImageReader::open(&parent, name).unwrap();
        let (source, options) = (Bytes(bytes), ImageOptions::default());
        let control = Control::default();
        let written = write_diff(&mut staging, name, &source, &base, options, control).unwrap();
        manifest.images.push(written.record);
    }
    manifest.machine.disks[0].digest = manifest.images[1].digest;
    manifest.parent = Some(parent.id());
    staging.publish(manifest).unwrap();
}

#[test]
fn a_difference_builds_on_a_raw_image() {
    let (keep, path) = common::fresh_raw();
    let mut disk = common::raw_disk();
    disk[10] ^= 1;
    disk[3 * CHUNK..4 * CHUNK].fill(0);
    let diff = keep.path().join("diff");
    difference(&diff, &path, &disk);
    let verified = verify(&diff, &[], Control::default()).unwrap();
    let image = ImageReader::open(&verified.snapshot, "disk-root").unwrap();
    let records: Vec<_> = image.index().records().collect();
    assert!(matches!(records[0], Record::Patch { .. }), "{:?}", records[0]);
    assert_eq!(records[3], Record::Zero);
    assert!(matches!(records[4], Record::Parent { .. }), "{:?}", records[4]);
    assert!(load(&verified.snapshot) == disk);
    // Damage below is named with the file's whole path.
    with_damage(
        &path,
        RAW,
        |bytes| bytes[4 * CHUNK] ^= 1,
        || {
            let text = damage(&diff);
            let file = fs::canonicalize(&path).unwrap().join(RAW);
            assert!(text.contains(&format!("{}: chunk 4 is damaged", file.display())), "{text}");
        },
    );
    // Written out, nothing of it is raw.
    let flat = keep.path().join("flat");
    let mut staging = Staging::new(&flat, Existing::Refuse).unwrap();
    let mut manifest = verified.snapshot.manifest().clone();
    manifest.sections = write_sections(&mut staging, &common::sections()).unwrap();
    manifest.images.clear();
    for name in ["memory", "disk-root"] {
        let image = ImageReader::open(&verified.snapshot, name).unwrap();
        let (source, options) = (ImageSource::new(&image), ImageOptions::default());
        let written = write_image(&mut staging, name, &source, options, Control::default());
        manifest.images.push(written.unwrap().record);
    }
    manifest.parent = None;
    staging.publish(manifest).unwrap();
    let flat = verify(&flat, &[], Control::default()).unwrap().snapshot;
    assert!(load(&flat) == disk);
}

/// A file system that cannot clone, and says so in one of the ways in which they do.
#[derive(Debug)]
struct Unable(Errno);

impl Layer for Unable {
    fn clone_file(&self, _: BorrowedFd<'_>, _: &str, _: &File) -> io::Result<File> {
        Err(self.0.into())
    }
}

#[test]
fn a_raw_image_is_written_again_with_or_without_a_clone() {
    let (keep, path) = common::fresh_raw();
    let snapshot = Snapshot::open(&path).unwrap();
    let layers: [(&str, Arc<dyn Layer>); 2] =
        [("cloned", Arc::new(Copies)), ("copied", Arc::new(Unable(Errno::OPNOTSUPP)))];
    for (name, layer) in layers {
        let again = keep.path().join(name);
        let staging = Staging::with_layer(&again, Existing::Refuse, layer.clone()).unwrap();
        reorder_snapshot(staging, &snapshot, &[11, 2], Control::default()).unwrap();
        let verified = verify(&again, &[], Control::default()).unwrap();
        assert_eq!(again.join(RAW).exists(), name == "cloned");
        assert_eq!(verified.snapshot.manifest().images, snapshot.manifest().images);
        assert!(load(&verified.snapshot) == common::raw_disk());

        // Nothing is written again that is not right.
        let flip = |bytes: &mut Vec<u8>| bytes[3 * CHUNK + 5] ^= 1;
        with_damage(&path, RAW, flip, || {
            let bad = keep.path().join("bad");
            let staging = Staging::with_layer(&bad, Existing::Refuse, layer.clone()).unwrap();
            let refused = reorder_snapshot(staging, &snapshot, &[11, 2], Control::default());
            let text = refused.unwrap_err().to_string();
            assert!(text.contains("disk-root.raw: chunk 3 is damaged"), "{text}");
            assert!(!bad.exists());
        });
    }
}

#[test]
fn a_file_system_that_cannot_clone_is_told_from_one_that_fails() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snap");
    let file = common::file_of(b"squib");
    for errno in [Errno::OPNOTSUPP, Errno::NOTTY, Errno::XDEV, Errno::INVAL, Errno::NOSYS] {
        let layer = Arc::new(Unable(errno));
        let staging = Staging::with_layer(&path, Existing::Refuse, layer).unwrap();
        assert!(staging.clone_file(RAW, &file, 5).unwrap().is_none(), "{errno}");
    }
    for (errno, expected) in [
        (Errno::IO, "disk-root.raw: cannot clone: "),
        (Errno::PERM, "disk-root.raw: cannot clone: "),
        (Errno::NOSPC, "disk-root.raw: no room left"),
    ] {
        let layer = Arc::new(Unable(errno));
        let staging = Staging::with_layer(&path, Existing::Refuse, layer).unwrap();
        let text = staging.clone_file(RAW, &file, 5).unwrap_err().to_string();
        assert!(text.starts_with(expected), "{text}");
    }
    let staging = Staging::with_layer(&path, Existing::Refuse, Arc::new(Copies)).unwrap();
    assert!(staging.clone_file("../raw", &file, 5).is_err());
    // A file of another size is not what the caller takes it for, and leaves nothing behind.
    assert!(staging.clone_file(RAW, &file, 6).unwrap().is_none());
    staging.discard(staging.clone_file(RAW, &file, 5).unwrap().unwrap()).unwrap();
    drop(staging);
    assert_eq!(common::names(dir.path()), [""; 0]);
}

#[test]
fn the_file_system_clones_if_it_can() {
    let dir = tempfile::tempdir().unwrap();
    let raw = common::raw_disk();
    fs::write(dir.path().join("disk"), &raw).unwrap();
    let file = File::options().read(true).write(true).open(dir.path().join("disk")).unwrap();
    let path = dir.path().join("snap");
    let mut staging = Staging::with_layer(&path, Existing::Refuse, Arc::new(Real)).unwrap();
    let Some(clone) = staging.clone_file("disk-two.raw", &file, raw.len() as u64).unwrap() else {
        eprintln!("skipped: {} is on a file system that cannot clone", dir.path().display());
        drop(staging);
        assert_eq!(common::names(dir.path()), ["disk"]);
        return;
    };
    // What is written from now on does not show in it.
    file.write_all_at(&[0xaa; 4096], 0).unwrap();
    let (control, options) = (Control::default(), ImageOptions::default());
    let mut manifest = common::stage(&mut staging, control).unwrap();
    let mut record = manifest.machine.disks[0].clone();
    let written =
        write_raw_image(&mut staging, "disk-two", clone, &|_, _| None, options, control).unwrap();
    record.id = "two".into();
    (record.size, record.digest) = (written.record.size, written.record.digest);
    manifest.machine.disks.push(record);
    manifest.images.push(written.record);
    staging.publish(manifest).unwrap();
    let snapshot = verify(&path, &[], control).unwrap().snapshot;
    assert!(fs::read(path.join("disk-two.raw")).unwrap() == raw);
    let mode = fs::metadata(path.join("disk-two.raw")).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
    assert_eq!(snapshot.header().minor, squib_formats::header::MINOR);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn any_bytes_of_any_length_come_back_from_a_raw_file(
        parts in prop::collection::vec((any::<u8>(), 1..100_000usize), 0..8),
        damage in prop::option::of((any::<prop::sample::Index>(), 1..=255u8)),
    ) {
        let bytes: Vec<u8> = parts.iter()
            .flat_map(|(fill, len)| (0..*len).map(move |at| if fill % 3 == 0 { 0 } else { fill ^ (at / 999) as u8 }))
            .collect();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("snap");
        let mut staging = Staging::with_layer(&path, Existing::Refuse, Arc::new(Copies)).unwrap();
        let mut manifest = common::stage(&mut staging, Control::default()).unwrap();
        let image = common::write_raw(&mut staging, "disk-two", &bytes, Control::default()).unwrap();
        let mut record = manifest.machine.disks[0].clone();
        (record.id, record.size, record.digest) = ("two".into(), image.size, image.digest);
        manifest.machine.disks.push(record);
        manifest.images.push(image);
        staging.publish(manifest).unwrap();
        let snapshot = verify(&path, &[], Control::default()).unwrap().snapshot;
        let target = Target::new(bytes.len(), 0xee);
        let image = ImageReader::open(&snapshot, "disk-two").unwrap();
        image.load(&target, Control::default()).unwrap();
        prop_assert!(target.bytes.into_inner().unwrap() == bytes);
        if let Some((at, flip)) = damage.filter(|_| !bytes.is_empty()) {
            let mut bad = bytes;
            let at = at.index(bad.len());
            bad[at] ^= flip;
            fs::write(path.join("disk-two.raw"), bad).unwrap();
            let text = verify(&path, &[], Control::default()).expect_err("damaged").to_string();
            let expected = format!("disk-two.raw: chunk {} is damaged", at / CHUNK);
            prop_assert!(text.starts_with(&expected), "{}", text);
        }
    }
}
