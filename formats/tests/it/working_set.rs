//! The advisory file `working-set`: what was written is read back, and nothing else is believed.

use std::{fs, os::unix::fs::symlink, path::Path};

use crate::common;
use proptest::prelude::*;
use squib_formats::{
    digest::Digest, error::FormatError, image::Control, manifest::ImageRecord,
    snapshot_dir::Snapshot, verify::verify, working_set::WorkingSet,
};

/// An image of 16 chunks.
fn image() -> ImageRecord {
    ImageRecord {
        name: "memory".into(),
        size: (16 << 16) - 5,
        chunk_size: 1 << 16,
        digest: Digest([0xab; 32]),
    }
}

fn golden() -> Vec<u8> {
    fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/working-set-1")).unwrap()
}

/// The bytes with a digest that is right for them.
fn with_digest(bytes: &[u8]) -> Vec<u8> {
    [bytes, &Digest::of(bytes).0].concat()
}

#[test]
fn the_file_of_version_1_reads_back_as_written() {
    let set = WorkingSet::decode(&image(), &golden()).unwrap();
    assert_eq!(set.chunks(), [3, 15, 0, 7]);
    assert_eq!(set.encode(), golden());
    assert_eq!(set, WorkingSet::new(&image(), vec![3, 15, 0, 7]).unwrap());
}

#[test]
fn every_flipped_bit_and_every_cut_is_found() {
    let good = golden();
    for bit in 0..good.len() * 8 {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        let error = WorkingSet::decode(&image(), &bad).unwrap_err();
        assert_eq!(error.file(), Some("working-set"), "bit {bit}: {error}");
    }
    for len in 0..good.len() {
        assert!(WorkingSet::decode(&image(), &good[..len]).is_err(), "cut to {len}");
    }
    assert!(WorkingSet::decode(&image(), &[&good[..], &[0]].concat()).is_err());
}

#[test]
fn values_that_no_writer_writes_are_refused_by_name() {
    type Change = fn(&mut Vec<u8>);
    let cases: [(&str, Change); 8] = [
        ("magic", |bytes| bytes[0] = b'x'),
        ("version: 2, this build reads 1", |bytes| bytes[8] = 2),
        ("reserved bytes", |bytes| bytes[11] = 1),
        ("reserved bytes", |bytes| bytes[55] = 1),
        ("chunk size: 131072, image memory has 65536", |bytes| bytes[14] = 2),
        ("image digest: aa", |bytes| bytes[16] = 0xaa),
        ("chunks: 16, image memory has 16", |bytes| bytes[56] = 16),
        ("chunks: 15 is there twice", |bytes| bytes[56] = 15),
    ];
    for (expected, change) in cases {
        let mut bytes = golden();
        bytes.truncate(bytes.len() - 32);
        change(&mut bytes);
        let error = WorkingSet::decode(&image(), &with_digest(&bytes)).unwrap_err().to_string();
        assert!(error.starts_with(&format!("working-set: {expected}")), "{error}");
    }
    let mut bytes = golden();
    bytes[48..52].copy_from_slice(&u32::MAX.to_le_bytes());
    let error = WorkingSet::decode(&image(), &bytes).unwrap_err().to_string();
    assert!(error.contains("number of chunks: 4294967295"), "{error}");
    WorkingSet::new(&image(), vec![1, 16]).unwrap_err();
    WorkingSet::new(&image(), vec![1, 2, 1]).unwrap_err();
}

#[test]
fn it_is_put_beside_the_manifest_and_replaced_in_one_step() {
    let (_keep, path) = common::fresh();
    let snapshot = Snapshot::open(&path).unwrap();
    assert_eq!(WorkingSet::read(&snapshot).unwrap(), None);
    let image = snapshot.manifest().image("memory").unwrap();
    // What a killed writer has left goes, what a living one has stays.
    fs::write(path.join(".working-set.partial-1-1"), "half").unwrap();
    let living = fs::File::create(path.join(".working-set.partial-1-2")).unwrap();
    living.lock().unwrap();
    for chunks in [vec![5, 2], vec![], (0..16).rev().collect()] {
        let set = WorkingSet::new(image, chunks).unwrap();
        set.write(&snapshot).unwrap();
        assert_eq!(WorkingSet::read(&snapshot).unwrap(), Some(set));
    }
    let verified = verify(&path, &[], Control::default()).unwrap();
    assert_eq!(verified.unlisted, [".working-set.partial-1-2"]);
    assert_eq!(verified.snapshot.id(), snapshot.id());
}

#[test]
fn one_of_another_snapshot_is_neither_written_nor_read() {
    let (_keep, path) = common::fresh();
    let snapshot = Snapshot::open(&path).unwrap();
    let foreign = WorkingSet::new(&image(), vec![3]).unwrap();
    let refused = |error: FormatError| {
        assert!(error.to_string().starts_with("working-set: image digest: "), "{error}");
    };
    refused(foreign.write(&snapshot).unwrap_err());
    assert!(!common::names(&path).iter().any(|name| name.contains("working-set")));
    fs::write(path.join("working-set"), foreign.encode()).unwrap();
    refused(WorkingSet::read(&snapshot).unwrap_err());
}

#[test]
fn what_is_not_a_small_regular_file_is_refused() {
    let (_keep, path) = common::fresh();
    let snapshot = Snapshot::open(&path).unwrap();
    let file = path.join("working-set");
    let refused = |expected: &str| {
        let error = WorkingSet::read(&snapshot).unwrap_err().to_string();
        assert!(error.starts_with("working-set: ") && error.contains(expected), "{error}");
    };
    symlink(Path::new("manifest"), &file).unwrap();
    refused("symbolic link");
    fs::remove_file(&file).unwrap();
    fs::create_dir(&file).unwrap();
    refused("instead of a regular file");
    fs::remove_dir(&file).unwrap();
    fs::File::create(&file).unwrap().set_len(1 << 40).unwrap();
    refused("1099511627776 bytes, at most");
    fs::write(&file, "").unwrap();
    refused("0 bytes long");
}

#[test]
fn two_runs_agree_on_what_both_touched_in_the_older_order() {
    let set = |chunks: &[u32]| WorkingSet::new(&image(), chunks.to_vec()).unwrap();
    let both = |old: &[u32], new: &[u32]| WorkingSet::intersect(&set(old), &set(new));
    assert_eq!(both(&[5, 1, 9], &[9, 2, 5]), set(&[5, 9]));
    assert_eq!(both(&[5, 1], &[2, 3]), set(&[2, 3]));
    assert_eq!(both(&[], &[2, 3]), set(&[2, 3]));
    assert_eq!(both(&[5, 1], &[]), set(&[]));
    let other = ImageRecord { digest: Digest([1; 32]), ..image() };
    let other = WorkingSet::new(&other, vec![5]).unwrap();
    assert_eq!(WorkingSet::intersect(&other, &set(&[5, 1])), set(&[5, 1]));
}

/// Writes the golden file: `cargo test -p squib-formats --test it working_set -- --ignored`.
#[test]
#[ignore = "writes a new golden file"]
fn write_the_golden_working_set() {
    let set = WorkingSet::new(&image(), vec![3, 15, 0, 7]).unwrap();
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/working-set-1");
    fs::write(path, set.encode()).unwrap();
}

proptest! {
    #[test]
    fn any_order_of_any_chunks_comes_back(
        order in Just((0..16u32).collect::<Vec<_>>()).prop_shuffle(),
        len in 0..=16usize,
    ) {
        let set = WorkingSet::new(&image(), order[..len].to_vec()).unwrap();
        prop_assert_eq!(WorkingSet::decode(&image(), &set.encode()).unwrap(), set);
    }

    #[test]
    fn any_bytes_are_refused_or_mean_what_they_say(
        damage in prop::collection::vec((0..72usize, any::<u8>()), 0..4),
    ) {
        let mut bytes = golden();
        bytes.truncate(bytes.len() - 32);
        for (at, byte) in damage {
            bytes[at] = byte;
        }
        let bytes = with_digest(&bytes);
        if let Ok(set) = WorkingSet::decode(&image(), &bytes) {
            prop_assert_eq!(set.encode(), bytes);
        }
    }
}
