//! The fuzz targets over their corpus and over mutations of it.

use std::{collections::BTreeMap, fs, path::PathBuf};

use squib_formats::{
    header::{self, Header},
    image::{ImageReader, MIN_CHUNK_SIZE},
    snapshot_dir::Snapshot,
    working_set::WorkingSet,
};

#[path = "../../../fuzz/src/lib.rs"]
#[expect(unreachable_pub, reason = "the targets are a library for the fuzzer")]
mod targets;

/// Mutations of a target's entries.
const MUTATIONS: u64 = 500;

fn corpus(target: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus")).join(target)
}

/// The entries of a corpus in the order of their names.
fn entries(target: &str) -> Vec<Vec<u8>> {
    let mut paths: Vec<_> =
        fs::read_dir(corpus(target)).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

/// Numbers that are the same in every run.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((self.0 >> 33) as usize) % end.max(1)
    }
}

/// Changes a few bytes as a fuzzer does: flips, extremes, cuts, copies, and pieces of another entry.
fn mutate(bytes: &mut Vec<u8>, other: &[u8], numbers: &mut Numbers) {
    for _ in 0..1 + numbers.below(4) {
        if bytes.is_empty() {
            bytes.push(0);
        }
        let at = numbers.below(bytes.len());
        match numbers.below(7) {
            0 | 1 => bytes[at] ^= 1 << numbers.below(8),
            2 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][numbers.below(5)],
            3 => {
                let end = (at + 1 + numbers.below(8)).min(bytes.len());
                bytes[at..end].fill([0, 0xff][numbers.below(2)]);
            }
            4 => drop(bytes.drain(at..(at + 1 + numbers.below(16)).min(bytes.len()))),
            5 => {
                let end = (at + 1 + numbers.below(64)).min(bytes.len());
                let to = numbers.below(bytes.len() - (end - at) + 1);
                bytes.copy_within(at..end, to);
            }
            _ => {
                let from = numbers.below(other.len());
                let piece = &other[from..(from + numbers.below(64)).min(other.len())];
                bytes.splice(at..at, piece.iter().copied());
            }
        }
    }
}

/// The manifests of the golden snapshots, all of them, and of one that this build writes, by minor format version.
fn all_manifests() -> BTreeMap<u16, Vec<Vec<u8>>> {
    let mut found = BTreeMap::<u16, Vec<Vec<u8>>>::new();
    let new = tempfile::tempdir().unwrap();
    targets::publish(&new.path().join("snap"), &[7; 1 << 14]).unwrap();
    let mut dirs = vec![
        new.path().to_owned(),
        PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden")),
    ];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
            } else if path.file_name().unwrap() == "manifest" {
                let bytes = fs::read(path).unwrap();
                let head = bytes.first_chunk().unwrap();
                found.entry(Header::decode(head).unwrap().minor).or_default().push(bytes);
            }
        }
    }
    found
}

fn run(name: &str) {
    let (_, target) = targets::TARGETS.into_iter().find(|target| target.0 == name).unwrap();
    let entries = entries(name);
    // Otherwise the digests that a target puts in are not the right ones any more, and it tests nothing.
    assert!(entries.iter().any(|entry| target(entry)), "no entry is taken");
    for entry in &entries {
        target(entry);
    }
    let mut numbers = Numbers(0);
    for _ in 0..MUTATIONS {
        let mut bytes = entries[numbers.below(entries.len())].clone();
        let other = &entries[numbers.below(entries.len())];
        mutate(&mut bytes, other, &mut numbers);
        target(&bytes);
    }
}

#[test]
fn manifests() {
    run("manifest");
}

/// A format that is added later is written by then, and is fuzzed from then on.
#[test]
fn manifests_of_every_format_that_this_build_reads_are_fuzzed() {
    let manifests = all_manifests();
    let minors: Vec<u16> = manifests.keys().copied().collect();
    assert_eq!(minors, (0..=header::MINOR).collect::<Vec<_>>());
    let mut numbers = Numbers(1);
    for (minor, manifests) in manifests {
        let mut taken = 0;
        for manifest in manifests {
            assert!(targets::manifest(&manifest), "1.{minor} is not taken");
            for _ in 0..MUTATIONS / 5 {
                let mut bytes = manifest.clone();
                let (head, body) = bytes.split_at_mut(header::LEN);
                assert_eq!(head[10], minor as u8);
                let at = numbers.below(body.len());
                body[at] ^= 1 << numbers.below(8);
                taken += u32::from(targets::manifest(&bytes));
            }
        }
        assert!(taken > 0, "no change of a body of 1.{minor} is taken: it is decoded as another");
    }
}

#[test]
fn indexes() {
    run("index");
}

#[test]
fn sections() {
    run("section");
}

#[test]
fn working_sets() {
    run("working_set");
}

#[test]
fn whole_snapshots() {
    run("snapshot");
}

#[test]
fn entries_of_the_newest_format_are_taken() {
    for (name, entry) in [("index", "runs"), ("snapshot", "runs"), ("snapshot", "runs-diff")] {
        let (_, target) = targets::TARGETS.into_iter().find(|target| target.0 == name).unwrap();
        assert!(target(&fs::read(corpus(name).join(entry)).unwrap()), "{name}: {entry}");
    }
}

#[test]
fn every_target_has_a_corpus() {
    // There are others, of targets that go further than this crate.
    let names = crate::common::names(&corpus(""));
    for (target, _) in targets::TARGETS {
        assert!(names.iter().any(|name| name == target), "{target} has no corpus");
    }
}

/// Puts a first entry or two into each corpus: `cargo test -p squib-formats --test it fuzz -- --ignored`.
#[test]
#[ignore = "writes into the corpus"]
fn write_the_first_entries() {
    let put = |target: &str, name: &str, bytes: &[u8]| {
        fs::create_dir_all(corpus(target)).unwrap();
        fs::write(corpus(target).join(name), bytes).unwrap();
    };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snap");
    let mut memory = vec![0; 8 * MIN_CHUNK_SIZE as usize - 100];
    memory[20_000..30_000].fill(7);
    for (at, byte) in memory.iter_mut().enumerate().skip(100_000) {
        *byte = (at / 5) as u8;
    }
    targets::publish(&path, &memory).unwrap();
    let file = |name: &str| fs::read(path.join(name)).unwrap();
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");
    let manifests = [
        ("full", "1.0/manifest"),
        ("diff", "1.1/diff/manifest"),
        ("raw", "1.2/diff/manifest"),
        ("host", "1.3/manifest"),
    ];
    for (name, path) in manifests {
        put("manifest", name, &fs::read(format!("{golden}/{path}")).unwrap());
    }
    // The third bit of the third byte says that it is one of runs.
    put("index", "runs", &[&[100, 0, 4, 0xff, 0xff, 0], &file("memory.idx")[..]].concat());
    let full = fs::read(format!("{golden}/1.0/memory.idx")).unwrap();
    put("index", "full", &[&[0, 2, 0, 0xff, 0xff, 8], &full[..]].concat());
    let diff = fs::read(format!("{golden}/1.1/diff/memory.idx")).unwrap();
    put("index", "diff", &[&[0, 2, 1, 0xff, 0xff, 8], &diff[..]].concat());
    let raw = fs::read(format!("{golden}/1.2/full/disk-root.idx")).unwrap();
    put("index", "raw", &[&[100, 2, 2, 0, 0, 0], &raw[..]].concat());
    put("section", "shapes", &[&[1], &targets::shapes()[..]].concat());
    put("working_set", "four", &fs::read(format!("{golden}/working-set-1")).unwrap());

    let snapshot = Snapshot::open(&path).unwrap();
    let record = snapshot.manifest().image("memory").unwrap();
    let set = WorkingSet::new(record, vec![7, 1, 6]).unwrap().encode();
    let body = &file("manifest")[header::LEN..];
    let whole = |index: &[u8], data: &[u8], body: &[u8]| {
        let parts = [&file("state")[..], index, data, &set];
        let lengths = parts.map(|part| (part.len() as u16).to_le_bytes()).concat();
        [&lengths, &parts.concat(), body].concat()
    };
    let (index, data) = (file("memory.idx"), file("memory.zst"));
    put("snapshot", "runs", &whole(&index, &data, body));

    // A difference: a parent record, and a patch of two pages in the place of a frame.
    let mut manifest = snapshot.manifest().clone();
    manifest.parent = Some(snapshot.id());
    // As large as the snapshot that the target builds on.
    manifest.images[0].size = 8 * u64::from(MIN_CHUNK_SIZE);
    manifest.machine.memory_size = manifest.images[0].size;
    let body = squib_formats::codec::encode("manifest", &manifest).unwrap();
    let mut patch = vec![0b0101];
    patch.extend(zstd::bulk::compress(&[9; 8192], 1).unwrap());
    let mut index = index;
    let place = crate::common::record_of(&index, 1);
    index[place.start..place.start + 4].copy_from_slice(&[3, 0, 0, 0]);
    index[place.start + 8..place.end].fill(0);
    let place = crate::common::record_of(&index, 6);
    index[place.start] = 2;
    index[place.start + 1..place.start + 4]
        .copy_from_slice(&(patch.len() as u32).to_le_bytes()[..3]);
    index[place.start + 8..place.start + 16].copy_from_slice(&(data.len() as u64).to_le_bytes());
    let data = [data, patch].concat();
    put("snapshot", "runs-diff", &whole(&index, &data, &body));
    let image = ImageReader::open(&snapshot, "memory").unwrap();
    assert_eq!(image.index().chunks(), 8);
}
