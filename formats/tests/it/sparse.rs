//! What an image costs follows what is in it, not its size; and it is right all the same.

use std::{
    collections::BTreeMap,
    fs, io,
    ops::Range,
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use squib_formats::{
    digest::Digest,
    image::{
        Content, Control, HEADER_LEN, ImageOptions, ImageReader, ImageSource, MIN_CHUNK_SIZE,
        RECORD_LEN, Record, Scheme, Sink, Source, digest_file, digest_reader, digest_source,
        write_diff, write_image,
    },
    manifest::{DiskStorage, Manifest},
    publish::{Existing, Staging},
    reorder::reorder_snapshot,
    sections::write_sections,
    snapshot_dir::Snapshot,
    verify::verify,
};

use crate::common::{self, Bytes, Target};

const TIB: u64 = 1 << 40;

/// Bytes here and there in a large image. Counts what it is asked.
#[derive(Default)]
struct Sparse {
    size: u64,
    bytes: BTreeMap<u64, u8>,
    asked: AtomicU64,
    read: AtomicU64,
}

impl Sparse {
    fn new(size: u64, places: &[u64]) -> Self {
        let bytes = places.iter().map(|place| (*place, *place as u8 | 1)).collect();
        Self { size, bytes, ..Self::default() }
    }

    /// How often it was asked for data, and how many bytes were read.
    fn cost(&self) -> (u64, u64) {
        (self.asked.swap(0, Ordering::Relaxed), self.read.swap(0, Ordering::Relaxed))
    }
}

impl Source for Sparse {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<Content> {
        self.read.fetch_add(into.len() as u64, Ordering::Relaxed);
        into.fill(0);
        for (place, byte) in self.bytes.range(offset..offset + into.len() as u64) {
            into[(place - offset) as usize] = *byte;
        }
        Ok(Content::Data)
    }

    fn data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let next = self.bytes.range(offset..).next();
        Ok(next.map(|(place, _)| *place..*place + 1))
    }
}

/// Takes the place of a tebibyte.
#[derive(Default)]
struct Places(Mutex<BTreeMap<u64, u8>>);

impl Sink for Places {
    fn is_zero(&self, _: u64, _: u64) -> bool {
        true
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let found = (offset..).zip(bytes).filter(|(_, byte)| **byte != 0);
        self.0.lock().unwrap().extend(found.map(|(place, byte)| (place, *byte)));
        Ok(())
    }
}

/// Publishes `source` as the memory of a snapshot, a difference to `parent` if there is one.
fn publish(path: &Path, source: &dyn Source, parent: Option<&Snapshot>, chunk_size: u32) {
    let mut staging = Staging::new(path, Existing::Refuse).unwrap();
    let (_keep, sample) = common::fresh();
    let mut manifest: Manifest = Snapshot::open(&sample).unwrap().manifest().clone();
    manifest.machine.disks.clear();
    manifest.sections = write_sections(&mut staging, &common::sections()).unwrap();
    let options = ImageOptions { chunk_size, ..ImageOptions::default() };
    let base = parent.map(|parent| ImageReader::open(parent, "memory").unwrap());
    let control = Control::default();
    let written = match &base {
        Some(base) => write_diff(&mut staging, "memory", source, base, options, control),
        None => write_image(&mut staging, "memory", source, options, control),
    };
    manifest.images = vec![written.unwrap().record];
    manifest.machine.memory_size = source.size();
    manifest.parent = parent.map(Snapshot::id);
    staging.publish(manifest).unwrap();
}

fn length(path: &Path, name: &str) -> u64 {
    fs::metadata(path.join(name)).unwrap().len()
}

fn open(path: &Path, parents: &[PathBuf]) -> ImageReader {
    ImageReader::open(&Snapshot::open_chain(path, parents).unwrap(), "memory").unwrap()
}

#[test]
fn a_tebibyte_with_ten_bytes_in_it_costs_what_ten_bytes_cost() {
    let dir = tempfile::tempdir().unwrap();
    let (full, diff) = (dir.path().join("full"), dir.path().join("diff"));
    let chunk = u64::from(ImageOptions::default().chunk_size);
    let source = Sparse::new(TIB, &[TIB / 3, TIB / 3 + 7, TIB - 1]);
    publish(&full, &source, None, 1 << 16);
    let (asked, read) = source.cost();
    assert!(asked <= 4 && read <= 3 * chunk, "asked {asked} times, read {read}");
    // Zeros, data, zeros, data.
    assert_eq!(length(&full, "memory.idx"), (HEADER_LEN + 4 * RECORD_LEN) as u64);
    assert!(length(&full, "memory.zst") < 1000);
    let image = open(&full, &[]);
    assert_eq!((image.index().chunks(), image.index().runs().count()), (TIB / chunk, 4));
    let digest = digest_source("memory", &source, Control::default()).unwrap();
    assert_eq!((digest.digest, digest.size), (image.record().digest, TIB));
    assert_eq!(digest.zero, TIB - 2 * chunk);
    source.cost();
    let loaded = image.load(&Places::default(), Control::default()).unwrap();
    assert_eq!((loaded.size, loaded.zero), (TIB, TIB - 2 * chunk));
    let verified = verify(&full, &[], Control::default()).unwrap();
    assert_eq!(verified.images[0].1, loaded);

    // One byte more.
    let source = Sparse::new(TIB, &[5, TIB / 3, TIB / 3 + 7, TIB - 1]);
    let parent = Snapshot::open(&full).unwrap();
    publish(&diff, &source, Some(&parent), 1 << 16);
    let (asked, read) = source.cost();
    assert!(asked <= 5 && read <= 4 * chunk, "asked {asked} times, read {read}");
    // Data, zeros, parent, zeros, parent.
    assert_eq!(length(&diff, "memory.idx"), (HEADER_LEN + 5 * RECORD_LEN) as u64);
    let target = Places::default();
    open(&diff, &[]).load(&target, Control::default()).unwrap();
    assert_eq!(target.0.into_inner().unwrap(), source.bytes);
    verify(&diff, &[], Control::default()).unwrap();
    // And as the source of another.
    let (image, flat) = (open(&diff, &[]), dir.path().join("flat"));
    publish(&flat, &ImageSource::new(&image), None, 1 << 16);
    assert_eq!(open(&flat, &[]).record(), image.record());
}

#[test]
fn the_whole_of_a_sparse_file_is_found_at_every_chunk_size() {
    use std::os::unix::fs::FileExt;
    let size = 9 * (1 << 20) + 12_345;
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(size).unwrap();
    // At the edges of chunks and of the file system's blocks, and in the last byte.
    for place in [4095u64, 16_384, 65_535, 65_536, (1 << 20) - 1, (5 << 20) + 777, size - 1] {
        file.as_file().write_all_at(&[place as u8 | 1], place).unwrap();
    }
    // Written, and zeros all the same.
    file.as_file().write_all_at(&[0; 200_000], 7 << 20).unwrap();
    let bytes = fs::read(file.path()).unwrap();
    for shift in 14..=22 {
        let chunk_size = 1u32 << shift;
        let dir = tempfile::tempdir().unwrap();
        let (holes, dense) = (dir.path().join("holes"), dir.path().join("dense"));
        let source = squib_formats::image::FileSource::new(file.reopen().unwrap()).unwrap();
        publish(&holes, &source, None, chunk_size);
        publish(&dense, &Bytes(bytes.clone()), None, chunk_size);
        for name in ["memory.idx", "memory.zst"] {
            assert!(fs::read(holes.join(name)).unwrap() == fs::read(dense.join(name)).unwrap());
        }
        let image = open(&holes, &[]);
        let target = Target::new(bytes.len(), 0);
        image.load(&target, Control::default()).unwrap();
        assert!(target.bytes.into_inner().unwrap() == bytes, "{chunk_size}");
        assert_eq!(image.record().digest, by_definition(&bytes, chunk_size, Scheme::Runs));
        assert_eq!(
            image.index().image_digest(Scheme::Chunks),
            by_definition(&bytes, chunk_size, Scheme::Chunks)
        );
    }
    let digest = by_definition(&bytes, 1 << 16, Scheme::Runs);
    assert_eq!(digest_file(file.path(), Control::default()).unwrap().digest, digest);
    assert_eq!(digest_reader("pipe", &mut &bytes[..]).unwrap().digest, digest);
}

/// The image digest as docs/format.md has it.
fn by_definition(bytes: &[u8], chunk_size: u32, scheme: Scheme) -> Digest {
    let digests = bytes.chunks(chunk_size as usize).map(|chunk| {
        let mut chunk = chunk.to_vec();
        chunk.resize(chunk_size as usize, 0);
        Digest::of(&chunk).0
    });
    let digests: Vec<_> = digests.collect();
    let mut all = Vec::new();
    match scheme {
        Scheme::Chunks => all.extend(digests.concat()),
        Scheme::Runs => {
            for equal in digests.chunk_by(|a, b| a == b) {
                all.extend((equal.len() as u64).to_le_bytes());
                all.extend(equal[0]);
            }
        }
    }
    all.extend((bytes.len() as u64).to_le_bytes());
    all.extend(u64::from(chunk_size).to_le_bytes());
    Digest::of(&all)
}

#[test]
fn equal_chunks_in_a_row_are_one_run_and_one_frame() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snap");
    let mut bytes = vec![7u8; 300 * MIN_CHUNK_SIZE as usize];
    // The last chunk is shorter, and so another one.
    bytes.truncate(bytes.len() - 100);
    publish(&path, &Bytes(bytes.clone()), None, MIN_CHUNK_SIZE);
    let image = open(&path, &[]);
    let runs: Vec<_> = image.index().runs().map(|(chunks, _)| chunks).collect();
    assert_eq!(runs, [0..299, 299..300]);
    let target = Target::new(bytes.len(), 0);
    image.load(&target, Control::default()).unwrap();
    assert!(target.bytes.into_inner().unwrap() == bytes);
    // A check of all of it decompresses each frame once.
    let verified = verify(&path, &[], Control::default()).unwrap();
    assert_eq!(verified.images[0].1.stored, length(&path, "memory.zst"));
    // Damage in a frame that many chunks share is found.
    let mut data = fs::read(path.join("memory.zst")).unwrap();
    data[10] ^= 1;
    fs::write(path.join("memory.zst"), data).unwrap();
    let damage = verify(&path, &[], Control::default()).unwrap_err().to_string();
    assert!(damage.contains("chunk 0"), "{damage}");
}

#[test]
fn a_difference_may_build_on_a_snapshot_of_an_older_format() {
    let golden = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden"));
    for parent in ["1.0", "1.1/diff", "1.2/full"] {
        let parent = golden.join(parent);
        let snapshot = Snapshot::open_chain(&parent, &[]).unwrap();
        assert_eq!(snapshot.manifest().scheme(), Scheme::Chunks);
        let base = ImageReader::open(&snapshot, "memory").unwrap();
        let target = Target::new(base.record().size as usize, 0);
        base.load(&target, Control::default()).unwrap();
        let mut bytes = target.bytes.into_inner().unwrap();
        bytes[2 << 16] ^= 1;
        bytes[9 << 16..10 << 16].fill(0);
        let dir = tempfile::tempdir().unwrap();
        let diff = dir.path().join("diff");
        publish(&diff, &Bytes(bytes.clone()), Some(&snapshot), 1 << 16);
        let image = open(&diff, std::slice::from_ref(&parent));
        assert!(matches!(image.index().record(2), Record::Patch { .. }));
        assert!(matches!(image.index().record(11), Record::Parent { .. }));
        assert_eq!(image.index().record(9), Record::Zero);
        let target = Target::new(bytes.len(), 0);
        image.load(&target, Control::default()).unwrap();
        assert!(target.bytes.into_inner().unwrap() == bytes);
        verify(&diff, &[parent], Control::default()).unwrap();
    }
}

#[test]
fn an_old_snapshot_that_is_written_again_has_the_same_bytes_and_new_digests() {
    let golden = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden"));
    for old in ["1.0", "1.2/full", "1.3"] {
        let snapshot = Snapshot::open_chain(&golden.join(old), &[]).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new");
        let staging = Staging::new(&path, Existing::Refuse).unwrap();
        reorder_snapshot(staging, &snapshot, &[11, 2], Control::default()).unwrap();
        let written = verify(&path, &[], Control::default()).unwrap().snapshot;
        assert_eq!(written.manifest().scheme(), Scheme::Runs);
        for record in &snapshot.manifest().images {
            let load = |snapshot: &Snapshot| {
                let target = Target::new(record.size as usize, 0);
                let image = ImageReader::open(snapshot, &record.name).unwrap();
                image.load(&target, Control::default()).unwrap();
                (image.index().image_digest(Scheme::Chunks), target.bytes.into_inner().unwrap())
            };
            let (before, now) = (load(&snapshot), load(&written));
            assert!(before == now, "{old}: {}", record.name);
            assert_eq!(before.0, record.digest);
            assert_ne!(written.manifest().image(&record.name).unwrap().digest, record.digest);
        }
        // Of the disk outside nobody has the bytes here.
        let disks = |snapshot: &Snapshot| snapshot.manifest().machine.disks.clone();
        let (before, now) = (&disks(&snapshot)[1], &disks(&written)[1]);
        assert_eq!(before.storage, DiskStorage::Reference(Scheme::Chunks));
        assert_eq!(before, now);
    }
}
