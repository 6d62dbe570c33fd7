//! Differences: what they hold, how chains are found, and what is wrong with damaged ones.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::common::{self, Bytes, Target};
use proptest::prelude::*;
use squib_formats::{
    chain::MAX_CHAIN,
    digest::Digest,
    error::FormatError,
    image::{
        Control, ImageOptions, ImageReader, ImageSource, PAGE_SIZE, Record, digest_reader,
        write_diff, write_image,
    },
    manifest::{DiskStorage, Manifest},
    publish::{Existing, Staging},
    sections::write_sections,
    snapshot_dir::Snapshot,
    verify::verify,
};

const CHUNK: usize = 64 << 10;

/// Publishes `memory` and a disk with the bytes `disk`, as a difference to the snapshot at `parent` or full.
fn put(
    path: &Path,
    memory: &[u8],
    disk: &[u8],
    parent: Option<&Path>,
    limit: Option<u64>,
) -> Result<Digest, FormatError> {
    let parent = match parent {
        Some(parent) => Some(Snapshot::open_chain(parent, &[])?),
        None => None,
    };
    let mut staging = Staging::new(path, Existing::Refuse)?;
    if let Some(limit) = limit {
        staging.limit(limit);
    }
    let mut manifest: Manifest = {
        let (_keep, sample) = common::fresh();
        Snapshot::open(&sample)?.manifest().clone()
    };
    manifest.sections = write_sections(&mut staging, &common::sections())?;
    manifest.images.clear();
    for (name, bytes) in [("memory", memory), ("disk-root", disk)] {
        let source = Bytes(bytes.to_vec());
        let written = match &parent {
            Some(parent) => {
                let base = ImageReader::open(parent, name)?;
                write_diff(
                    &mut staging,
                    name,
                    &source,
                    &base,
                    ImageOptions::default(),
                    Control::default(),
                )?
            }
            None => write_image(
                &mut staging,
                name,
                &source,
                ImageOptions::default(),
                Control::default(),
            )?,
        };
        manifest.images.push(written.record);
    }
    manifest.machine.memory_size = memory.len() as u64;
    let root = &mut manifest.machine.disks[0];
    assert_eq!(root.storage, DiskStorage::Captured);
    (root.size, root.digest) = (disk.len() as u64, manifest.images[1].digest);
    manifest.parent = parent.as_ref().map(Snapshot::id);
    staging.publish(manifest)
}

/// The bytes of an image, with what it builds on.
fn get(path: &Path, name: &str, places: &[PathBuf]) -> Result<Vec<u8>, FormatError> {
    let snapshot = Snapshot::open_chain(path, places)?;
    let image = ImageReader::open(&snapshot, name)?;
    let target = Target::new(image.record().size as usize, 0xee);
    image.load(&target, Control::default())?;
    Ok(target.bytes.into_inner().unwrap())
}

fn digest(path: &Path, name: &str) -> Digest {
    Snapshot::open(path).unwrap().manifest().image(name).unwrap().digest
}

/// Bytes that do not compress.
fn noise(len: usize, mut seed: u64) -> Vec<u8> {
    let mut next = || {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed >> 56) as u8
    };
    (0..len).map(|_| next()).collect()
}

/// A full snapshot `a` of 16 chunks of noise, and `b` with three pages changed, a chunk gone to zeros and
/// one new one.
fn pair() -> (tempfile::TempDir, PathBuf, PathBuf, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    let mut memory = noise(16 * CHUNK, 1);
    memory[15 * CHUNK..].fill(0);
    put(&a, &memory, &common::disk(), None, None).unwrap();
    for at in [3 * CHUNK + 5, 3 * CHUNK + 9 * PAGE_SIZE, 8 * CHUNK - 1] {
        memory[at] ^= 1;
    }
    memory[10 * CHUNK..11 * CHUNK].fill(0);
    memory[15 * CHUNK..].copy_from_slice(&noise(CHUNK, 7));
    put(&b, &memory, &common::disk(), Some(&a), None).unwrap();
    (dir, a, b, memory)
}

#[test]
fn a_difference_holds_only_the_pages_that_changed() {
    let (_keep, a, b, memory) = pair();
    let snapshot = Snapshot::open(&b).unwrap();
    assert_eq!(
        (snapshot.header().major, snapshot.header().minor),
        (1, squib_formats::header::MINOR)
    );
    assert_eq!(snapshot.manifest().parent, Some(Snapshot::open(&a).unwrap().id()));
    let index = ImageReader::open_index(&snapshot, "memory").unwrap();
    for (chunk, record) in index.records().enumerate() {
        match chunk {
            3 => assert!(
                matches!(record, Record::Patch { length, .. }
                    if (2 * PAGE_SIZE..2 * PAGE_SIZE + 100).contains(&(length as usize))),
                "{record:?}"
            ),
            7 => assert!(matches!(record, Record::Patch { .. }), "{record:?}"),
            10 => assert_eq!(record, Record::Zero),
            15 => assert!(matches!(record, Record::Data { .. }), "{record:?}"),
            _ => assert!(matches!(record, Record::Parent { .. }), "{chunk}: {record:?}"),
        }
    }
    let disk = ImageReader::open_index(&snapshot, "disk-root").unwrap();
    assert!(!disk.records().any(|record| record.stored().is_some()));
    assert!(get(&b, "memory", &[]).unwrap() == memory);
    assert!(get(&b, "disk-root", &[]).unwrap() == common::disk());
    verify(&b, &[], Control::default()).unwrap();
}

#[test]
fn a_chain_of_five_loads_and_flattens_to_equal_digests() {
    let dir = tempfile::tempdir().unwrap();
    let at = |n: usize| dir.path().join(format!("{n}"));
    let (mut memory, mut disk) = (noise(16 * CHUNK, 3), noise(CHUNK + 700, 4));
    put(&at(0), &memory, &disk, None, None).unwrap();
    for n in 1..5 {
        memory[n * CHUNK + n * 5000] ^= 0x80;
        memory[12 * CHUNK + n * PAGE_SIZE] ^= 1;
        disk[CHUNK + 100 * n] ^= 4;
        put(&at(n), &memory, &disk, Some(&at(n - 1)), None).unwrap();
    }
    let snapshot = Snapshot::open_chain(&at(4), &[]).unwrap();
    assert_eq!(snapshot.chain().count(), 5);
    verify(&at(4), &[], Control::default()).unwrap();
    for (name, bytes) in [("memory", &memory), ("disk-root", &disk)] {
        assert!(get(&at(4), name, &[]).unwrap() == *bytes, "{name}");
        let image = ImageReader::open(&snapshot, name).unwrap();
        let mut staging = Staging::new(&dir.path().join("flat"), Existing::Refuse).unwrap();
        let source = ImageSource::new(&image);
        let flat =
            write_image(&mut staging, name, &source, ImageOptions::default(), Control::default())
                .unwrap();
        assert_eq!(flat.record, *image.record());
        assert_eq!(flat.record.digest, digest_reader(name, &mut &bytes[..]).unwrap().digest);
    }
}

#[test]
fn a_flipped_bit_in_a_patch_is_named() {
    let (_keep, _, b, _) = pair();
    let index = ImageReader::open_index(&Snapshot::open(&b).unwrap(), "memory").unwrap();
    let Record::Patch { offset, length, .. } = index.record(3) else { panic!() };
    let file = b.join("memory.zst");
    let good = fs::read(&file).unwrap();
    // All of the bitmap, the frame's header and a sample of its body.
    let places = (0..40).chain((40..length as usize).step_by(97));
    for at in places {
        let mut bad = good.clone();
        bad[offset as usize + at] ^= 1 << (at % 8);
        fs::write(&file, &bad).unwrap();
        let damage = verify(&b, &[], Control::default()).expect_err("damaged").to_string();
        assert!(damage.contains("memory.zst"), "byte {at}: {damage}");
        // The flag in a frame's header that nobody reads may be the only one without effect.
        if at != 6 {
            let error = get(&b, "memory", &[]).map(|_| ());
            let text = error.expect_err(&format!("byte {at}")).to_string();
            assert!(text.starts_with("memory.zst: chunk 3"), "byte {at}: {text}");
        }
    }
}

#[test]
fn a_missing_or_swapped_parent_is_named_by_its_id() {
    let (keep, a, b, memory) = pair();
    let id = Snapshot::open(&a).unwrap().id();
    let missing = |places: &[PathBuf]| match get(&b, "memory", places) {
        Err(error @ FormatError::MissingParent { .. }) => error.to_string(),
        other => panic!("{:?}", other.map(|_| ())),
    };
    let away = tempfile::tempdir().unwrap();
    let moved = away.path().join("moved");
    fs::rename(&a, &moved).unwrap();
    assert!(missing(&[]).contains(&id.to_string()));
    // Another snapshot in its place.
    let other = put(&a, &noise(16 * CHUNK, 99), &common::disk(), None, None).unwrap();
    assert!(missing(&[]).contains(&id.to_string()));
    let text = missing(std::slice::from_ref(&a));
    assert!(text.contains(&id.to_string()) && text.contains(&other.to_string()), "{text}");
    assert!(verify(&b, &[], Control::default()).is_err());
    // The parent itself, and the directory that it is in.
    for place in [&moved, away.path()] {
        assert!(get(&b, "memory", &[place.to_owned()]).unwrap() == memory);
    }
    // Without what it builds on a difference is not read, but it says what it is.
    let alone = Snapshot::open(&b).unwrap();
    let error = ImageReader::open(&alone, "memory").unwrap_err();
    assert!(matches!(error, FormatError::MissingParent { .. }), "{error}");
    ImageReader::open_index(&alone, "memory").unwrap();
    drop(keep);
}

#[test]
fn a_hint_is_followed_and_believed_only_if_the_id_is_right() {
    let (keep, a, b, memory) = pair();
    let away = tempfile::tempdir().unwrap();
    let moved = away.path().join("moved");
    fs::rename(&a, &moved).unwrap();
    let with_hint = |hint: &Path| {
        let mut manifest = Snapshot::open(&b).unwrap().manifest().clone();
        manifest.parent_hint = Some(hint.to_str().unwrap().to_owned());
        let body = manifest.encode().unwrap();
        let header = squib_formats::header::Header::new(183, manifest.minor(), &body).encode();
        fs::write(b.join("manifest"), [&header[..], &body].concat()).unwrap();
    };
    with_hint(&moved);
    assert!(get(&b, "memory", &[]).unwrap() == memory);
    with_hint(&b);
    let error = get(&b, "memory", &[]).unwrap_err();
    assert!(matches!(error, FormatError::MissingParent { .. }), "{error}");
    drop(keep);
}

#[test]
fn damage_in_a_parent_is_named_with_its_path() {
    let (_keep, a, b, _) = pair();
    let real = fs::canonicalize(&a).unwrap();
    for name in ["memory.zst", "memory.idx"] {
        let file = a.join(name);
        let good = fs::read(&file).unwrap();
        let mut bad = good.clone();
        bad[100] ^= 1;
        fs::write(&file, &bad).unwrap();
        for text in [
            get(&b, "memory", &[]).unwrap_err().to_string(),
            verify(&b, &[], Control::default()).unwrap_err().to_string(),
        ] {
            let expected = real.join(name).display().to_string();
            assert!(text.contains(&expected), "expected `{expected}` in `{text}`");
        }
        fs::remove_file(&file).unwrap();
        let text = get(&b, "memory", &[]).unwrap_err().to_string();
        assert!(text.contains(&real.join(name).display().to_string()), "{text}");
        fs::write(&file, &good).unwrap();
    }
    verify(&b, &[], Control::default()).unwrap();
}

#[test]
fn after_a_full_disk_the_next_difference_is_right() {
    let (keep, _, b, mut memory) = pair();
    memory[5 * CHUNK] ^= 1;
    memory[6 * CHUNK..7 * CHUNK].copy_from_slice(&noise(CHUNK, 1234));
    let c = keep.path().join("c");
    for limit in [0, 400, 5_000, 60_000, 70_000] {
        let error = put(&c, &memory, &common::disk(), Some(&b), Some(limit)).unwrap_err();
        assert!(matches!(error, FormatError::NoRoom { .. }), "{limit}: {error}");
        assert_eq!(common::names(keep.path()), ["a", "b"]);
    }
    put(&c, &memory, &common::disk(), Some(&b), None).unwrap();
    assert!(get(&c, "memory", &[]).unwrap() == memory);
}

#[test]
fn a_chain_has_a_longest_length() {
    let dir = tempfile::tempdir().unwrap();
    let at = |n: usize| dir.path().join(format!("{n}"));
    let mut memory = vec![1; CHUNK];
    put(&at(0), &memory, &[], None, None).unwrap();
    for n in 1..MAX_CHAIN {
        memory[n] = 2;
        put(&at(n), &memory, &[], Some(&at(n - 1)), None).unwrap();
    }
    assert!(get(&at(MAX_CHAIN - 1), "memory", &[]).unwrap() == memory);
    put(&at(MAX_CHAIN), &memory, &[], Some(&at(MAX_CHAIN - 1)), None).unwrap();
    let error = get(&at(MAX_CHAIN), "memory", &[]).unwrap_err();
    assert!(matches!(error, FormatError::ChainTooLong { .. }), "{error}");
}

#[test]
fn a_parent_record_with_another_digest_than_the_parents_is_refused() {
    let (_keep, a, b, memory) = pair();
    // A snapshot whose records claim to be those of `a`, with the id of `a` as its parent, but `a` has
    // other bytes there.
    let other = a.with_file_name("other");
    put(&other, &noise(16 * CHUNK, 5), &common::disk(), None, None).unwrap();
    let mut manifest = Snapshot::open(&b).unwrap().manifest().clone();
    manifest.parent = Some(Snapshot::open(&other).unwrap().id());
    let body = manifest.encode().unwrap();
    let header = squib_formats::header::Header::new(183, manifest.minor(), &body).encode();
    fs::write(b.join("manifest"), [&header[..], &body].concat()).unwrap();
    let text = get(&b, "memory", &[]).unwrap_err().to_string();
    assert!(text.starts_with("memory.idx: chunk 0: digest"), "{text}");
    assert_ne!(digest(&other, "memory"), digest_reader("b", &mut &memory[..]).unwrap().digest);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn a_difference_of_any_two_states_is_the_second_state(
        size in 1..400_000usize,
        fills in prop::collection::vec((0..4u8, 0..400_000usize, 1..90_000usize, any::<u64>()), 0..8),
        changes in prop::collection::vec((0..4u8, 0..400_000usize, 1..40_000usize, any::<u64>()), 0..8),
    ) {
        let paint = |bytes: &mut [u8], strokes: &[(u8, usize, usize, u64)]| {
            for (kind, at, len, seed) in strokes {
                let start = at % bytes.len();
                let len = if *kind == 3 { 1 } else { *len };
                let end = (start + len).min(bytes.len());
                match kind {
                    0 => bytes[start..end].fill(0),
                    1 => bytes[start..end].fill(*seed as u8),
                    _ => bytes[start..end].copy_from_slice(&noise(end - start, *seed)),
                }
            }
        };
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let mut memory = vec![0; size];
        paint(&mut memory, &fills);
        put(&at("a"), &memory, &memory[size / 2..], None, None).unwrap();
        paint(&mut memory, &changes);
        let disk = &memory[size / 2..];
        put(&at("diff"), &memory, disk, Some(&at("a")), None).unwrap();
        put(&at("full"), &memory, disk, None, None).unwrap();
        for (name, bytes) in [("memory", &memory[..]), ("disk-root", disk)] {
            prop_assert_eq!(digest(&at("diff"), name), digest(&at("full"), name));
            prop_assert!(get(&at("diff"), name, &[]).unwrap() == bytes);
            prop_assert!(get(&at("full"), name, &[]).unwrap() == bytes);
        }
    }
}
