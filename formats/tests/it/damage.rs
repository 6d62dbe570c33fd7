//! Damaged, swapped and malicious snapshots are refused by name, and nothing panics.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use crate::common::{self, Target};
use proptest::prelude::*;
use squib_formats::{
    digest::Digest,
    error::FormatError,
    header::{self, Header},
    image::{Control, HEADER_LEN, ImageReader, RECORD_LEN, digest_reader},
    manifest::Manifest,
    sections::Sections,
    snapshot_dir::Snapshot,
    verify::verify,
};

const FILES: [&str; 6] =
    ["disk-root.idx", "disk-root.zst", "manifest", "memory.idx", "memory.zst", "state"];

/// What a restore does with a snapshot.
pub(crate) fn restore(path: &Path) -> Result<(), FormatError> {
    let snapshot = Snapshot::open(path)?;
    drop(Sections::read(&snapshot)?);
    for record in &snapshot.manifest().images {
        let target = Target::new(record.size as usize, 0);
        ImageReader::open(&snapshot, &record.name)?.load(&target, Control::default())?;
    }
    Ok(())
}

/// Runs `damage` on the bytes of a file, checks, and puts the file back.
pub(crate) fn with_damage(
    path: &Path,
    name: &str,
    damage: impl Fn(&mut Vec<u8>),
    check: impl Fn(),
) {
    let file = path.join(name);
    let good = fs::read(&file).unwrap();
    let mut bad = good.clone();
    damage(&mut bad);
    fs::write(&file, &bad).unwrap();
    check();
    fs::write(&file, &good).unwrap();
}

/// Rewrites the manifest as a malicious writer would: every digest in it is right.
pub(crate) fn rewrite(path: &Path, change: impl Fn(&mut Manifest)) {
    let mut manifest = Snapshot::open(path).unwrap().manifest().clone();
    change(&mut manifest);
    for file in &mut manifest.files {
        let bytes = fs::read(path.join(&file.name)).unwrap();
        file.length = bytes.len() as u64;
        if !file.name.ends_with(".raw") {
            file.digest = Digest::of(&bytes);
        }
    }
    let body = manifest.encode_unchecked().unwrap();
    let header = Header::new(header::ARCH_AARCH64, manifest.minor(), &body).encode();
    fs::write(path.join("manifest"), [&header[..], &body].concat()).unwrap();
}

/// Puts `frame` in the place of a chunk's frame, at the end of the data file, as a malicious writer would.
fn replace_frame(path: &Path, chunk: usize, frame: &[u8]) {
    let mut data = fs::read(path.join("memory.zst")).unwrap();
    let offset = data.len() as u64;
    data.extend(frame);
    fs::write(path.join("memory.zst"), data).unwrap();
    let mut index = fs::read(path.join("memory.idx")).unwrap();
    let place = common::record_of(&index, chunk as u64);
    let record = &mut index[place];
    record[1..4].copy_from_slice(&(frame.len() as u32).to_le_bytes()[..3]);
    record[8..16].copy_from_slice(&offset.to_le_bytes());
    fs::write(path.join("memory.idx"), index).unwrap();
    rewrite(path, |_| ());
}

#[test]
fn every_file_of_the_sample_is_damaged_below() {
    let (_keep, path) = common::fresh();
    assert_eq!(common::names(&path), FILES);
}

#[test]
fn a_flipped_bit_in_any_file_is_named_with_both_digests() {
    let (_keep, path) = common::fresh();
    for name in FILES {
        let len = fs::metadata(path.join(name)).unwrap().len() as usize;
        // All of the small files, a sample of the rest.
        for at in (0..len).step_by(len.div_ceil(400) | 1) {
            let flip = |bytes: &mut Vec<u8>| bytes[at] ^= 1 << (at % 8);
            with_damage(&path, name, flip, || {
                let damage = verify(&path, &[], Control::default()).expect_err("damaged");
                let text = damage.to_string();
                assert!(text.contains(name), "byte {at} of {name}: {text}");
                let digests = damage.0.iter().any(|e| matches!(e, FormatError::Digest { .. }));
                let header = name == "manifest" && at < header::LEN;
                assert!(digests || header, "byte {at} of {name}: {text}");
                // A few bits of a frame mean nothing; a restore need not notice those.
                if !name.ends_with(".zst") {
                    restore(&path).expect_err("damaged");
                }
            });
        }
    }
    verify(&path, &[], Control::default()).unwrap();
}

#[test]
fn a_file_cut_anywhere_is_named() {
    let (_keep, path) = common::fresh();
    for name in FILES {
        let len = fs::metadata(path.join(name)).unwrap().len() as usize;
        for keep in (0..len).step_by(len.div_ceil(200)) {
            with_damage(
                &path,
                name,
                |bytes| bytes.truncate(keep),
                || {
                    let text = restore(&path).expect_err("cut").to_string();
                    assert!(text.contains(name), "{name} cut to {keep}: {text}");
                    verify(&path, &[], Control::default()).expect_err("cut");
                },
            );
        }
    }
}

#[test]
fn bytes_behind_the_end_of_a_file_are_found() {
    let (_keep, path) = common::fresh();
    for name in FILES {
        with_damage(
            &path,
            name,
            |bytes| bytes.push(0),
            || assert!(restore(&path).unwrap_err().to_string().contains(name)),
        );
    }
}

#[test]
fn a_missing_file_is_named() {
    let (_keep, path) = common::fresh();
    for name in FILES {
        let aside = path.with_extension(name);
        fs::rename(path.join(name), &aside).unwrap();
        let text = restore(&path).unwrap_err().to_string();
        assert!(text.contains(name), "{name}: {text}");
        fs::rename(&aside, path.join(name)).unwrap();
    }
}

#[test]
fn swapped_files_are_found() {
    let (_keep, path) = common::fresh();
    for (a, b) in [("memory.zst", "disk-root.zst"), ("memory.idx", "disk-root.idx")] {
        let aside = path.with_extension("aside");
        let swap = || {
            fs::rename(path.join(a), &aside).unwrap();
            fs::rename(path.join(b), path.join(a)).unwrap();
            fs::rename(&aside, path.join(b)).unwrap();
        };
        swap();
        restore(&path).expect_err("swapped");
        let named = verify(&path, &[], Control::default()).expect_err("swapped").to_string();
        assert!(named.contains(a) && named.contains(b), "{named}");
        swap();
    }
}

#[test]
fn a_damaged_chunk_is_named_by_number_the_lowest_first() {
    let (_keep, path) = common::fresh();
    let snapshot = Snapshot::open(&path).unwrap();
    let len = fs::metadata(path.join("memory.zst")).unwrap().len() as usize;
    // The noise of chunk 2 fills nearly all of the file and is stored as it is.
    with_damage(
        &path,
        "memory.zst",
        |bytes| {
            bytes[1000] ^= 1;
            bytes[len - 20..].fill(0);
        },
        || {
            let image = ImageReader::open(&snapshot, "memory").unwrap();
            let target = Target::new(16 << 16, 0);
            for _ in 0..20 {
                let error = image.load(&target, Control::default()).unwrap_err();
                let FormatError::Digest { file, what, expected, found } = error else {
                    panic!("{error}");
                };
                assert_eq!((&*file, &*what), ("memory.zst", "chunk 2"));
                assert_eq!(expected, Digest::of(&common::memory()[2 << 16..3 << 16]));
                assert_ne!(found, expected);
            }
        },
    );
}

#[test]
fn a_frame_that_decompresses_to_more_or_less_than_a_chunk_is_refused() {
    let chunk = vec![0x55; 1 << 16];
    let compress = |bytes: &[u8]| zstd::bulk::compress(bytes, 1).unwrap();
    let bomb = compress(&vec![0; 1 << 30]);
    let two = [compress(&chunk), compress(&chunk)].concat();
    let skippable = [&compress(&chunk)[..], &[0x50, 0x2a, 0x4d, 0x18, 1, 0, 0, 0, 9]].concat();
    let streamed = zstd::encode_all(&vec![0x55; 1 << 20][..], 1).unwrap();
    let cases: [(&str, &[u8]); 7] = [
        ("does not decompress to 65536 bytes", &bomb),
        ("does not decompress to 65536 bytes", &streamed),
        ("65535 bytes decompressed", &compress(&chunk[1..])),
        ("0 bytes decompressed", &compress(&[])),
        ("the frame ends after", &two),
        ("the frame ends after", &skippable),
        ("does not decompress", b"not a frame"),
    ];
    for (expected, frame) in cases {
        let (_keep, path) = common::fresh();
        replace_frame(&path, 5, frame);
        let text = restore(&path).unwrap_err().to_string();
        assert!(text.starts_with("memory.zst: chunk 5: "), "{text}");
        assert!(text.contains(expected), "expected `{expected}` in `{text}`");
    }
}

#[test]
fn bytes_behind_the_end_of_an_image_are_refused() {
    let (_keep, path) = common::fresh();
    let mut chunk = common::disk()[1 << 16..].to_vec();
    chunk.resize(1 << 16, 0xff);
    let frame = zstd::bulk::compress(&chunk, 1).unwrap();
    fs::write(path.join("disk-root.zst"), &frame).unwrap();
    let mut index = fs::read(path.join("disk-root.idx")).unwrap();
    let place = common::record_of(&index, 1);
    let record = &mut index[place];
    record[1..4].copy_from_slice(&(frame.len() as u32).to_le_bytes()[..3]);
    record[16..48].copy_from_slice(&Digest::of(&chunk).0);
    let digest = common::index_digest(&index, 100_352, 65_536);
    fs::write(path.join("disk-root.idx"), index).unwrap();
    rewrite(&path, |manifest| {
        manifest.images[1].digest = digest;
        manifest.machine.disks[0].digest = digest;
    });
    let text = restore(&path).unwrap_err().to_string();
    assert_eq!(text, "disk-root.zst: chunk 1: bytes behind the end of the image are not zero");
}

#[test]
fn differential_records_in_a_full_snapshot_are_refused_by_name() {
    for (kind, name) in [(2, "patch"), (3, "parent")] {
        let (_keep, path) = common::fresh();
        let mut index = fs::read(path.join("memory.idx")).unwrap();
        let place = common::record_of(&index, 5);
        index[place.start] = kind;
        fs::write(path.join("memory.idx"), index).unwrap();
        rewrite(&path, |_| ());
        let text = restore(&path).unwrap_err().to_string();
        assert!(
            text.contains(&format!("memory.idx: record 3, chunk 5: kind: a {name} record in a")),
            "{text}"
        );
    }
}

#[test]
fn a_manifest_with_right_digests_and_wrong_values_is_refused() {
    type Change = fn(&mut Manifest);
    let cases: [(&str, Change); 4] = [
        ("memory.idx: number of chunks: its records are of 16 chunks", |m| {
            m.images[0].size = 1 << 25;
            m.machine.memory_size = 1 << 25;
        }),
        ("image memory: chunk size", |m| m.images[0].chunk_size = 1 << 30),
        ("section 0: length", |m| m.sections[0].length = 1 << 40),
        ("image digest", |m| m.images[0].digest = Digest([1; 32])),
    ];
    for (expected, change) in cases {
        let (_keep, path) = common::fresh();
        rewrite(&path, change);
        let text = restore(&path).unwrap_err().to_string();
        assert!(text.contains(expected), "expected `{expected}` in `{text}`");
    }
}

/// Runs of the sample's memory.
const RECORDS: usize = 9;

/// Puts the image digest that its index makes up, and the right file digests, into the manifest.
fn with_right_digests(path: &Path) {
    let index = fs::read(path.join("memory.idx")).unwrap();
    let digest = common::index_digest(&index, 16 << 16, 1 << 16);
    rewrite(path, |manifest| manifest.images[0].digest = digest);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_index_with_right_digests_loads_what_it_says_or_is_refused(
        damage in prop::collection::vec((0..RECORDS * RECORD_LEN, any::<u8>()), 1..4),
        copy in prop::option::of((0..RECORDS, 0..RECORDS)),
    ) {
        let (_keep, path) = common::fresh();
        let mut index = fs::read(path.join("memory.idx")).unwrap();
        if let Some((from, to)) = copy {
            let place = |record: usize| HEADER_LEN + record * RECORD_LEN;
            index.copy_within(place(from)..place(from + 1), place(to));
        }
        for (at, byte) in damage {
            // The leading bytes of records, where the meaning is, are met as often as digests.
            let at = if byte % 2 == 0 { at / RECORD_LEN * RECORD_LEN + at % 16 } else { at };
            index[HEADER_LEN + at] = byte;
        }
        fs::write(path.join("memory.idx"), index).unwrap();
        with_right_digests(&path);
        let snapshot = Snapshot::open(&path).unwrap();
        let target = Target::new(16 << 16, 0);
        let loaded = ImageReader::open(&snapshot, "memory")
            .and_then(|image| image.load(&target, Control::default()));
        if loaded.is_ok() {
            let bytes = target.bytes.into_inner().unwrap();
            let found = digest_reader("memory", &mut &bytes[..]).unwrap().digest;
            prop_assert_eq!(found, snapshot.manifest().images[0].digest);
        }
    }

    #[test]
    fn any_bytes_in_the_place_of_a_body_are_refused_or_fit_together(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..5),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let (_keep, path) = common::fresh();
        let mut body = fs::read(path.join("manifest")).unwrap().split_off(header::LEN);
        for (at, byte) in damage {
            let at = at.index(body.len());
            body[at] = byte;
        }
        if let Some(cut) = cut {
            body.truncate(cut.index(body.len()));
        }
        let header = Header::new(header::ARCH_AARCH64, 0, &body).encode();
        fs::write(path.join("manifest"), [&header[..], &body].concat()).unwrap();
        if let Ok(snapshot) = Snapshot::open(&path) {
            snapshot.manifest().check().unwrap();
            let small = snapshot.manifest().images.iter().all(|image| image.size < 1 << 30);
            if small {
                let _ = restore(&path);
            }
        }
    }
}

#[test]
fn links_and_special_files_in_the_place_of_a_file_are_refused() {
    for name in FILES {
        let (_keep, path) = common::fresh();
        let aside = path.with_extension("aside");
        fs::rename(path.join(name), &aside).unwrap();
        symlink(&aside, path.join(name)).unwrap();
        let text = restore(&path).unwrap_err().to_string();
        assert!(text.contains("symbolic link"), "{name}: {text}");

        fs::remove_file(path.join(name)).unwrap();
        fs::create_dir(path.join(name)).unwrap();
        let text = restore(&path).unwrap_err().to_string();
        assert!(text.contains("instead of a regular file"), "{name}: {text}");

        fs::remove_dir(path.join(name)).unwrap();
        assert!(Command::new("mkfifo").arg(path.join(name)).status().unwrap().success());
        let text = restore(&path).unwrap_err().to_string();
        assert!(text.contains("instead of a regular file"), "{name}: {text}");
    }
}

#[test]
fn what_is_not_a_snapshot_is_said_to_be_none() {
    let dir = tempfile::tempdir().unwrap();
    type Make = fn(&PathBuf);
    let cases: [(&str, Make); 4] = [
        ("cannot open", |_| ()),
        ("not a directory", |path| fs::write(path, "x").unwrap()),
        ("has no manifest", |path| fs::create_dir(path).unwrap()),
        ("shorter than a header", |path| {
            fs::create_dir(path).unwrap();
            fs::write(path.join("manifest"), "x").unwrap();
        }),
    ];
    for (at, (expected, make)) in cases.into_iter().enumerate() {
        let path = dir.path().join(at.to_string());
        make(&path);
        let text = Snapshot::open(&path).unwrap_err().to_string();
        assert!(text.contains(expected) && text.contains(path.to_str().unwrap()), "{text}");
    }
}

#[test]
fn files_that_do_not_belong_are_told_but_do_no_harm() {
    let (_keep, path) = common::fresh();
    fs::write(path.join("notes"), "x").unwrap();
    fs::write(path.join("working-set"), "x").unwrap();
    assert_eq!(verify(&path, &[], Control::default()).unwrap().unlisted, ["notes"]);
}
