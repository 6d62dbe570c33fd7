//! Snapshots written again with their frames in another order.

use std::{fs, path::Path};

use crate::common::{self, Bytes, Target};
use proptest::prelude::*;
use squib_formats::{
    digest::Digest,
    error::FormatError,
    image::{Control, ImageOptions, ImageReader, Index, Record, write_diff, write_image},
    manifest::Manifest,
    publish::{Existing, Staging},
    reorder::reorder_snapshot,
    sections::write_sections,
    snapshot_dir::Snapshot,
    verify::verify,
    working_set::WorkingSet,
};

const CHUNK: usize = 64 << 10;

/// Publishes `memory` as the only image, as a difference to the snapshot at `parent` or full.
fn put(path: &Path, memory: &[u8], parent: Option<&Path>) {
    let parent = parent.map(|parent| Snapshot::open_chain(parent, &[]).unwrap());
    let mut staging = Staging::new(path, Existing::Refuse).unwrap();
    let mut manifest: Manifest = {
        let (_keep, sample) = common::fresh();
        Snapshot::open(&sample).unwrap().manifest().clone()
    };
    manifest.machine.disks.clear();
    manifest.sections = write_sections(&mut staging, &common::sections()).unwrap();
    let (source, options) = (Bytes(memory.to_vec()), ImageOptions::default());
    let written = match &parent {
        Some(parent) => {
            let base = ImageReader::open(parent, "memory").unwrap();
            write_diff(&mut staging, "memory", &source, &base, options, Control::default())
        }
        None => write_image(&mut staging, "memory", &source, options, Control::default()),
    };
    manifest.images = vec![written.unwrap().record];
    manifest.machine.memory_size = memory.len() as u64;
    manifest.parent = parent.as_ref().map(Snapshot::id);
    staging.publish(manifest).unwrap();
}

fn reorder(from: &Path, to: &Path, first: &[u32]) -> Result<Digest, FormatError> {
    let snapshot = Snapshot::open_chain(from, &[])?;
    let staging = Staging::new(to, Existing::Refuse)?;
    reorder_snapshot(staging, &snapshot, first, Control::default())
}

fn index(path: &Path) -> Index {
    ImageReader::open_index(&Snapshot::open(path).unwrap(), "memory").unwrap()
}

fn load(path: &Path) -> Vec<u8> {
    let snapshot = Snapshot::open_chain(path, &[]).unwrap();
    let image = ImageReader::open(&snapshot, "memory").unwrap();
    let target = Target::new(image.record().size as usize, 0xee);
    image.load(&target, Control::default()).unwrap();
    target.bytes.into_inner().unwrap()
}

/// 24 chunks: every third is zeros, two are equal, the others compress to about their half.
fn memory(seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut bytes = vec![0; 24 * CHUNK - 100];
    for (chunk, place) in bytes.chunks_mut(CHUNK).enumerate().filter(|(chunk, _)| chunk % 3 != 0) {
        for (at, byte) in place.iter_mut().enumerate() {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            *byte = if at % 2 == 0 { (state >> 56) as u8 } else { chunk as u8 };
        }
    }
    bytes.copy_within(4 * CHUNK..5 * CHUNK, 14 * CHUNK);
    bytes
}

/// Whether the frames of `first` lie one behind the other from the start of the data file; each but once.
fn assert_leads(index: &Index, first: &[u32]) {
    let mut end = 0;
    let mut seen = Vec::new();
    for chunk in first {
        let Some(place) = index.record((*chunk).into()).stored() else { continue };
        if !seen.contains(&place) {
            assert_eq!(place.0, end, "chunk {chunk}");
            end += u64::from(place.1);
            seen.push(place);
        }
    }
}

#[test]
fn the_working_set_lies_at_the_start_and_the_state_is_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let (old, new) = (dir.path().join("old"), dir.path().join("new"));
    put(&old, &memory(1), None);
    let snapshot = Snapshot::open(&old).unwrap();
    let order = [20, 3, 14, 1, 23, 4, 10];
    let set = WorkingSet::new(snapshot.manifest().image("memory").unwrap(), order.to_vec());
    let id = reorder(&old, &new, &order).unwrap();
    let verified = verify(&new, &[], Control::default()).unwrap().snapshot;
    assert_eq!(verified.id(), id);
    assert_ne!(id, snapshot.id());
    let (before, now) = (snapshot.manifest(), verified.manifest());
    assert_eq!(Manifest { files: before.files.clone(), ..now.clone() }, *before);
    assert_eq!(now.images[0].digest, before.images[0].digest);
    assert_eq!(now.file("state").unwrap(), before.file("state").unwrap());
    assert!(load(&new) == memory(1));
    let index = index(&new);
    assert_leads(&index, &order);
    // The others follow in the order of their chunks, without gaps; chunk 4 has the frame of chunk 14.
    let rest: Vec<u32> = (0..24).filter(|chunk| !order.contains(chunk)).collect();
    assert_leads(&index, &[&order[..], &rest].concat());
    assert_eq!(index.record(4), index.record(14));
    let length = |path: &Path| fs::metadata(path.join("memory.zst")).unwrap().len();
    assert_eq!(length(&new), length(&old));
    // The working set belongs to the image, in whatever order it is stored.
    set.unwrap().write(&verified).unwrap();
    assert_eq!(WorkingSet::read(&verified).unwrap().unwrap().chunks(), order);
}

#[test]
fn frames_are_copied_as_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let (old, new) = (dir.path().join("old"), dir.path().join("new"));
    put(&old, &memory(2), None);
    reorder(&old, &new, &[7, 2]).unwrap();
    let frames = |path: &Path| {
        let bytes = fs::read(path.join("memory.zst")).unwrap();
        let frame = |record: Record| {
            let (offset, length) = record.stored()?;
            Some(bytes[offset as usize..][..length as usize].to_vec())
        };
        index(path).records().map(frame).collect::<Vec<_>>()
    };
    assert!(frames(&old) == frames(&new));
}

#[test]
fn a_difference_stays_one_to_the_same_parent() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    put(&at("full"), &memory(3), None);
    let mut changed = memory(3);
    changed[2 * CHUNK + 5000] ^= 1;
    changed[7 * CHUNK..8 * CHUNK].copy_from_slice(&memory(4)[7 * CHUNK..8 * CHUNK]);
    changed[8 * CHUNK..9 * CHUNK].fill(0);
    changed[19 * CHUNK] ^= 1;
    put(&at("diff"), &changed, Some(&at("full")));
    reorder(&at("diff"), &at("new"), &[19, 1, 7]).unwrap();
    let (old, new) = (index(&at("diff")), index(&at("new")));
    let kind = |record: Record| std::mem::discriminant(&record);
    let kinds = |index: &Index| index.records().map(kind).collect::<Vec<_>>();
    assert_eq!(kinds(&old), kinds(&new));
    assert!(matches!(new.record(19), Record::Patch { offset: 0, .. }));
    assert_leads(&new, &[19, 1, 7, 2]);
    assert!(load(&at("new")) == changed);
    verify(&at("new"), &[], Control::default()).unwrap();
    let parent = |name: &str| Snapshot::open(&at(name)).unwrap().manifest().parent;
    assert_eq!(parent("new"), parent("diff"));
}

#[test]
fn a_damaged_chunk_is_named_and_nothing_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let (old, new) = (dir.path().join("old"), dir.path().join("new"));
    put(&old, &memory(5), None);
    let Record::Data { offset, .. } = index(&old).record(10) else { panic!() };
    let mut bytes = fs::read(old.join("memory.zst")).unwrap();
    bytes[offset as usize + 900] ^= 1;
    fs::write(old.join("memory.zst"), bytes).unwrap();
    let error = reorder(&old, &new, &[2]).unwrap_err().to_string();
    assert!(error.starts_with("memory.zst: chunk 10"), "{error}");
    let error = reorder(&old, &new, &[2, 24]).unwrap_err().to_string();
    assert_eq!(error, "memory: order of chunks: chunk 24, the image has 24");
    assert_eq!(common::names(dir.path()), ["old"]);
}

#[test]
fn a_sweep_in_file_order_reads_what_single_reads_do() {
    let dir = tempfile::tempdir().unwrap();
    let (old, new) = (dir.path().join("old"), dir.path().join("new"));
    put(&old, &memory(6), None);
    let mut changed = memory(6);
    changed[5 * CHUNK] ^= 1;
    let diff = dir.path().join("diff");
    put(&diff, &changed, Some(&old));
    let order = [20u64, 5, 14, 1, 0, 23, 4, 1 << 40, 10, 8];
    let numbers: Vec<u32> = order.iter().filter(|chunk| **chunk < 24).map(|c| *c as u32).collect();
    reorder(&old, &new, &numbers).unwrap();
    for (path, memory) in [(&old, memory(6)), (&new, memory(6)), (&diff, changed)] {
        let snapshot = Snapshot::open_chain(path, &[]).unwrap();
        let image = ImageReader::open(&snapshot, "memory").unwrap();
        let mut reader = image.chunks(0).unwrap();
        for at in 0..order.len() {
            reader.read_ahead(&order[at..]).unwrap();
            if order[at] == 1 << 40 {
                continue;
            }
            let start = order[at] as usize * CHUNK;
            let expected = &memory[start..memory.len().min(start + CHUNK)];
            match reader.read(order[at]).unwrap() {
                Some(bytes) => assert!(bytes == expected, "chunk {}", order[at]),
                None => assert!(expected.iter().all(|byte| *byte == 0), "chunk {}", order[at]),
            }
        }
    }
}

#[test]
fn threads_read_chunks_of_one_image_at_once() {
    let (_keep, path) = common::fresh();
    let image = ImageReader::open(&Snapshot::open(&path).unwrap(), "memory").unwrap();
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let image = image.clone();
            std::thread::spawn(move || {
                let mut reader = image.chunks(3).unwrap();
                (0..16).filter(|chunk| reader.read(*chunk).unwrap().is_some()).count()
            })
        })
        .collect();
    drop(image);
    for thread in threads {
        assert_eq!(thread.join().unwrap(), 4);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn any_order_keeps_the_state(first in prop::collection::vec(0..24u32, 0..30)) {
        let dir = tempfile::tempdir().unwrap();
        let (old, new) = (dir.path().join("old"), dir.path().join("new"));
        put(&old, &memory(7), None);
        reorder(&old, &new, &first).unwrap();
        assert_leads(&index(&new), &first);
        prop_assert!(load(&new) == memory(7));
    }
}
