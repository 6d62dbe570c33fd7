//! What was written is read back, whatever the bytes and however many threads.

use std::{
    num::NonZeroUsize,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::common::{self, Bytes, Target};
use proptest::prelude::*;
use squib_formats::{
    digest::Digest,
    error::FormatError,
    image::{Control, ImageOptions, ImageReader, Progress, digest_source, write_image},
    manifest::Manifest,
    publish::{Existing, Staging},
    sections::{Sections, write_sections},
    snapshot_dir::Snapshot,
    verify::verify,
};

fn threads(count: usize) -> Control<'static> {
    Control { threads: NonZeroUsize::new(count).unwrap(), ..Control::default() }
}

#[test]
fn a_snapshot_reads_back_as_written() {
    let (_keep, path) = common::fresh();
    let snapshot = Snapshot::open(&path).unwrap();
    assert_eq!(snapshot.manifest().machine.name, "golden");
    assert_eq!(Snapshot::peek(&path).unwrap(), *snapshot.header());

    let mut sections = Sections::read(&snapshot).unwrap();
    for section in common::sections() {
        assert_eq!(sections.take(&section.kind, &section.instance).unwrap(), section);
    }
    sections.finish().unwrap();

    for (name, expected) in [("memory", common::memory()), ("disk-root", common::disk())] {
        for fill in [0, 0xaa] {
            let target = Target::new(expected.len(), fill);
            let image = ImageReader::open(&snapshot, name).unwrap();
            let loaded = image.load(&target, Control::default()).unwrap();
            assert!(target.bytes.into_inner().unwrap() == expected, "{name} over {fill:#x}");
            assert_eq!(loaded.size, expected.len() as u64);
        }
    }
    let verified = verify(&path, &[], Control::default()).unwrap();
    assert_eq!(verified.snapshot.id(), snapshot.id());
    assert_eq!(verified.unlisted, [""; 0]);
}

#[test]
fn single_chunks_are_read_in_any_order() {
    let (_keep, path) = common::fresh();
    let snapshot = Snapshot::open(&path).unwrap();
    let image = ImageReader::open(&snapshot, "memory").unwrap();
    let memory = common::memory();
    for ahead in [0, 3, u64::MAX] {
        let mut chunks = image.chunks(ahead).unwrap();
        for chunk in [11, 2, 0, 9, 5, 2, 15] {
            let expected = &memory[chunk << 16..][..1 << 16];
            match chunks.read(chunk as u64).unwrap() {
                Some(bytes) => assert!(bytes == expected, "chunk {chunk}"),
                None => assert!(expected.iter().all(|byte| *byte == 0), "chunk {chunk}"),
            }
        }
    }
}

#[test]
fn equal_chunks_are_stored_once_and_zero_chunks_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let mut staging = Staging::new(&dir.path().join("snap"), Existing::Refuse).unwrap();
    let written = write_image(
        &mut staging,
        "memory",
        &Bytes(common::memory()),
        ImageOptions::default(),
        Control::default(),
    )
    .unwrap();
    assert_eq!(written.zero, 12 << 16);
    assert_eq!(written.duplicate, 1 << 16);
    let noise = 1 << 16;
    assert!((noise..noise + 2000).contains(&written.stored), "{} bytes", written.stored);
}

#[test]
fn the_bytes_on_disk_do_not_depend_on_the_number_of_threads() {
    let dir = tempfile::tempdir().unwrap();
    let mut digests = Vec::new();
    // Many equal chunks in a row, so that workers race for who stores them.
    let bytes: Vec<u8> = (0..400u32).flat_map(|chunk| [(chunk % 7) as u8; 1 << 16]).collect();
    for (at, count) in [1, 2, 3, 8, 8, 8].into_iter().enumerate() {
        let mut staging =
            Staging::new(&dir.path().join(format!("{at}")), Existing::Refuse).unwrap();
        let control = threads(count);
        let mut manifest = common::stage(&mut staging, control).unwrap();
        let source = Bytes(bytes.clone());
        let record =
            write_image(&mut staging, "disk-data", &source, ImageOptions::default(), control)
                .unwrap()
                .record;
        let data = &mut manifest.machine.disks[1];
        data.storage = squib_formats::manifest::DiskStorage::Captured;
        (data.size, data.digest) = (record.size, record.digest);
        manifest.images.push(record);
        digests.push(staging.publish(manifest).unwrap());
    }
    assert!(digests.iter().all(|digest| *digest == digests[0]), "{digests:?}");
}

#[test]
fn an_image_has_the_digest_of_its_raw_bytes() {
    let (_keep, path) = common::fresh();
    let snapshot = Snapshot::open(&path).unwrap();
    let raw = digest_source("memory", &Bytes(common::memory()), Control::default()).unwrap();
    assert_eq!(snapshot.manifest().image("memory").unwrap().digest, raw.digest);
    assert_eq!(raw.zero, 12 << 16);
}

#[test]
fn progress_reaches_the_end_and_never_goes_back() {
    struct Seen(Mutex<Vec<(u64, u64, u64)>>);
    impl Progress for Seen {
        fn advanced(&self, done: u64, total: u64, stored: u64) {
            self.0.lock().unwrap().push((done, total, stored));
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let seen = Seen(Mutex::default());
    let mut staging = Staging::new(&dir.path().join("snap"), Existing::Refuse).unwrap();
    let control = Control { progress: &seen, ..threads(4) };
    let source = Bytes(vec![1; (50 << 16) + 5]);
    let written =
        write_image(&mut staging, "memory", &source, ImageOptions::default(), control).unwrap();
    let seen = seen.0.into_inner().unwrap();
    assert!(seen.is_sorted(), "{seen:?}");
    assert_eq!(*seen.last().unwrap(), ((50 << 16) + 5, (50 << 16) + 5, written.stored));
}

#[test]
fn a_cancelled_write_ends_with_an_error_and_leaves_nothing() {
    struct CancelAt<'a>(&'a AtomicBool);
    impl Progress for CancelAt<'_> {
        fn advanced(&self, _: u64, _: u64, _: u64) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let cancel = AtomicBool::new(false);
    let control = Control { progress: &CancelAt(&cancel), cancel: &cancel, ..threads(3) };
    let mut staging = Staging::new(&dir.path().join("snap"), Existing::Refuse).unwrap();
    let result = write_image(
        &mut staging,
        "memory",
        &Bytes(vec![1; 99 << 16]),
        ImageOptions::default(),
        control,
    );
    assert!(matches!(result, Err(FormatError::Cancelled)));
    drop(staging);
    assert_eq!(common::names(dir.path()), [""; 0]);
}

/// Publishes `bytes` as the memory of a machine without anything else, and reads them back.
fn through_a_snapshot(bytes: &[u8], count: usize) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snap");
    let mut staging = Staging::new(&path, Existing::Refuse).unwrap();
    let sections = write_sections(&mut staging, &[]).unwrap();
    let source = Bytes(bytes.to_vec());
    let image =
        write_image(&mut staging, "memory", &source, ImageOptions::default(), threads(count))
            .unwrap()
            .record;
    let mut manifest: Manifest = {
        let (_keep, sample) = common::fresh();
        Snapshot::open(&sample).unwrap().manifest().clone()
    };
    manifest.machine.disks.clear();
    manifest.machine.memory_size = image.size;
    (manifest.images, manifest.sections) = (vec![image], sections);
    staging.publish(manifest).unwrap();
    let snapshot = Snapshot::open(&path).unwrap();
    let target = Target::new(bytes.len(), 0xee);
    let image = ImageReader::open(&snapshot, "memory").unwrap();
    image.load(&target, threads(count)).unwrap();
    assert_eq!(
        image.record().digest,
        digest_source("memory", &Bytes(bytes.to_vec()), threads(count)).unwrap().digest
    );
    target.bytes.into_inner().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_bytes_of_any_length_come_back(
        pieces in prop::collection::vec((0..5u8, 0..90_000usize), 0..24),
        count in 1..5usize,
    ) {
        let bytes: Vec<u8> = pieces
            .iter()
            .flat_map(|(kind, len)| (0..*len).map(move |at| match kind {
                0 | 1 => 0,
                2 => 0x11,
                3 => (at / 100) as u8,
                _ => Digest::of(&at.to_le_bytes()).0[0],
            }))
            .collect();
        prop_assert!(through_a_snapshot(&bytes, count) == bytes);
    }
}
