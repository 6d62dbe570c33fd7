//! What the fuzz targets do with their bytes. The tests of `squib-formats` do the same with the corpus and with
//! mutations of it, so that every `cargo test` goes over what fuzzing has found.
//!
//! A digest over hostile bytes would end each run at once; so each target puts in the digests that a malicious
//! writer would.

use std::{fs, io, ops::Range, path::Path, sync::Mutex, sync::OnceLock};

use serde::{Deserialize, Serialize};
use squib_formats::{
    codec,
    digest::Digest,
    header::{self, Header},
    image::{
        Beside, Content, Control, HEADER_LEN, ImageOptions, ImageReader, Index, MAX_SIZE,
        MIN_CHUNK_SIZE, PAGE_SIZE, RECORD_LEN, Record, Scheme, Sink, Source, index_header,
        is_chunk_size, write_image, zero_digest,
    },
    manifest::{
        CpuIdentity, FileRecord, ImageRecord, MEMORY_IMAGE, MachineInfo, Manifest, SectionRecord,
    },
    persist::{PersistError, Section},
    publish::{Durability, Existing, Staging},
    reorder::reorder_snapshot,
    sections::{Sections, write_sections},
    snapshot_dir::Snapshot,
    verify::verify,
    working_set::WorkingSet,
};
use tempfile::TempDir;

/// Bytes of a target's input that it looks at; more only takes time.
const MAX_INPUT: usize = 1 << 16;
/// Raw bytes of an image that a target loads.
const MAX_IMAGE: u64 = 4 << 20;

/// A target's name, which is that of its corpus, and what it does: it answers whether the bytes were taken.
pub type Target = (&'static str, fn(&[u8]) -> bool);

/// All targets.
pub const TARGETS: [Target; 5] = [
    ("manifest", manifest),
    ("index", index),
    ("section", section),
    ("working_set", working_set),
    ("snapshot", snapshot),
];

/// A manifest's file: the header as it is, and the body as if its digest were right.
pub fn manifest(bytes: &[u8]) -> bool {
    let Some((head, body)) = bytes.split_first_chunk::<{ header::LEN }>() else {
        return false;
    };
    if let Ok(header) = Header::decode(head) {
        let mut again = header.encode();
        again[20..24].copy_from_slice(&head[20..24]);
        assert_eq!(again, *head);
        let _ = header.check_readable().and_then(|()| header.check_body(head, body));
    }
    let minor = u16::from(head[10]) % (header::MINOR + 1);
    let Ok(manifest) = Manifest::decode(minor, body) else { return false };
    manifest.check().expect("checked by decode");
    assert_eq!(manifest.minor(), minor);
    assert!(manifest.encode().expect("it was read") == body, "one body, one manifest");
    true
}

/// An index: 6 bytes that choose the image, then the file.
pub fn index(bytes: &[u8]) -> bool {
    let Some(([size, chunk, kind, data @ ..], file)) = bytes.split_first_chunk::<6>() else {
        return false;
    };
    let file = &file[..file.len().min(MAX_INPUT)];
    let scheme = if kind & 4 != 0 { Scheme::Runs } else { Scheme::Chunks };
    let records = match scheme {
        Scheme::Chunks => file,
        Scheme::Runs => file.get(HEADER_LEN..).unwrap_or_default(),
    };
    let chunk_size = MIN_CHUNK_SIZE << (chunk % 9);
    let chunks: u64 = runs(records, scheme).map(|(count, _)| count).sum();
    let size = (chunks * u64::from(chunk_size)).saturating_sub((*size).into());
    if size > MAX_SIZE {
        return false;
    }
    let digest = image_digest(runs(records, scheme), scheme, size, chunk_size);
    let image = ImageRecord { name: MEMORY_IMAGE.into(), size, chunk_size, digest };
    let data_length = u64::from(u16::from_le_bytes([data[0], data[1]])) << (data[2] % 48);
    let (is_diff, is_raw) = (kind & 1 != 0, kind & 2 != 0);
    let beside = Beside { data_length, is_diff, is_raw, scheme };
    let Ok(index) = Index::decode(&image, beside, file) else {
        return false;
    };
    assert_eq!(index.chunks(), image.size.div_ceil(chunk_size.into()));
    assert_eq!(index.image_digest(scheme), digest);
    let zero = zero_digest(chunk_size);
    let mut again = Vec::new();
    let mut next = 0;
    for (chunks, record) in index.runs() {
        assert!(chunks.start == next && chunks.end > next);
        next = chunks.end;
        if let Some((offset, length)) = record.stored() {
            assert!(offset + u64::from(length) <= data_length);
        }
        let count = chunks.end - chunks.start;
        let whole = scheme == Scheme::Runs && !matches!(record, Record::Patch { .. });
        let (times, count) = if whole { (1, count) } else { (count, 1) };
        (0..times).for_each(|_| again.extend(record.encode(scheme, count as u32, zero)));
    }
    assert_eq!(next, index.chunks());
    assert!(again == records, "one image, one index");
    true
}

/// A section's payload: one byte for the version, then a state with every shape that states have.
pub fn section(bytes: &[u8]) -> bool {
    let Some((version, payload)) = bytes.split_first() else { return false };
    let section = Section {
        kind: "shapes".into(),
        instance: "0".into(),
        version: u16::from(*version % 3),
        payload: payload.into(),
    };
    let mut sections = Sections::new(vec![section.clone()]).expect("one section");
    match sections.take_state::<Shapes>("0") {
        Ok(state) => {
            sections.finish().expect("it has been taken");
            let again = Section::encode("0", &state).expect("it was read");
            assert!(again == section, "one payload, one state");
            true
        }
        Err(error) => {
            assert!(error.to_string().contains("shapes"));
            false
        }
    }
}

/// The file `working-set`: as it is, and without its last 32 bytes and with the digest that is right.
pub fn working_set(bytes: &[u8]) -> bool {
    let image = ImageRecord {
        name: MEMORY_IMAGE.into(),
        size: (16 << 16) - 5,
        chunk_size: 1 << 16,
        digest: Digest([0xab; 32]),
    };
    let body = &bytes[..bytes.len().saturating_sub(32)];
    let fixed = [body, &Digest::of(body).0].concat();
    let taken = |bytes: &[u8]| {
        let Ok(set) = WorkingSet::decode(&image, bytes) else { return false };
        assert!(set.encode() == bytes, "one file, one working set");
        assert!(set.chunks().iter().all(|chunk| *chunk < 16));
        true
    };
    taken(bytes) | taken(&fixed)
}

/// A whole snapshot: four lengths of two bytes, then `state`, `memory.idx`, `memory.zst`, `working-set` and the
/// manifest's body. It is opened, verified, loaded, and written again in another order.
pub fn snapshot(bytes: &[u8]) -> bool {
    let base = Base::get();
    let Some(files) = Files::split(bytes, base) else { return false };
    // What is in the directory depends on these bytes only.
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("snap");
    files.write(&path).expect("room");
    let places = [base.path()];
    let Ok(snapshot) = Snapshot::open_chain(&path, &places) else {
        verify(&path, &places, one_thread()).expect_err("it does not open");
        return false;
    };
    let manifest = snapshot.manifest();
    if manifest.images.iter().any(|image| image.size > MAX_IMAGE) {
        return false;
    }
    let _ = WorkingSet::read(&snapshot);
    let verified = verify(&path, &places, one_thread());
    let record = manifest.image(MEMORY_IMAGE).expect("checked by open");
    let target = Raw(Mutex::new(vec![0xee; record.size as usize]));
    let loaded = ImageReader::open(&snapshot, MEMORY_IMAGE)
        .and_then(|image| image.load(&target, one_thread()));
    if loaded.is_ok() {
        let mut raw = target.0.into_inner().expect("nobody panics");
        raw.resize(raw.len().next_multiple_of(record.chunk_size as usize), 0);
        let digests = raw.chunks(record.chunk_size as usize).map(|chunk| (1, Digest::of(chunk)));
        let found = image_digest(digests, manifest.scheme(), record.size, record.chunk_size);
        assert_eq!(found, record.digest);
    }
    if verified.is_ok() {
        loaded.expect("verified");
        let chunks = record.size.div_ceil(record.chunk_size.into()) as u32;
        let order: Vec<u32> = (0..chunks).rev().step_by(2).collect();
        let again = dir.path().join("again");
        let mut staging = Staging::new(&again, Existing::Refuse).expect("nothing is there");
        staging.durability(Durability::None);
        reorder_snapshot(staging, &snapshot, &order, one_thread()).expect("verified");
        let again = verify(&again, &places, one_thread()).expect("just written");
        let mut expected = record.clone();
        if manifest.scheme() != Scheme::WRITTEN {
            // An older format has other image digests.
            let image = ImageReader::open(&snapshot, MEMORY_IMAGE).expect("verified");
            expected.digest = image.index().image_digest(Scheme::WRITTEN);
        }
        let now = again.snapshot.manifest().image(MEMORY_IMAGE).expect("as before");
        assert_eq!(*now, expected);
        return true;
    }
    false
}

/// A state with every shape that states have.
#[derive(Serialize, Deserialize)]
struct Shapes {
    flag: bool,
    byte: u8,
    words: Vec<u64>,
    text: String,
    maybe: Option<Vec<u8>>,
    registers: Vec<(u16, u64)>,
    nested: Vec<Option<[u8; 5]>>,
    signed: i64,
}

/// The payload of a state.
pub fn shapes() -> Vec<u8> {
    let state = Shapes {
        flag: true,
        byte: 7,
        words: vec![1, u64::MAX],
        text: "tty\u{fc}".into(),
        maybe: Some(vec![1, 2, 3]),
        registers: vec![(0xc000, 1)],
        nested: vec![None, Some([1, 2, 3, 4, 5])],
        signed: -1,
    };
    codec::encode("shapes", &state).expect("plain values")
}

squib_formats::first_version!(Shapes, "shapes");

/// The files of a hostile snapshot, with the digests that a malicious writer would put in.
struct Files {
    state: Vec<u8>,
    index: Vec<u8>,
    data: Vec<u8>,
    working_set: Vec<u8>,
    manifest: Vec<u8>,
}

impl Files {
    fn split(bytes: &[u8], base: &Base) -> Option<Self> {
        let (lengths, mut rest) = bytes.split_first_chunk::<8>()?;
        let mut part = |at: usize| {
            let length = usize::from(u16::from_le_bytes([lengths[at], lengths[at + 1]]));
            let (part, left) = rest.split_at(length.min(rest.len()));
            rest = left;
            part.to_vec()
        };
        let (state, index, data, working_set) = (part(0), part(2), part(4), part(6));
        let mut files = Self { state, index, data, working_set, manifest: Vec::new() };
        // The newest form that the bytes have; of those that have none, the beginning may be one.
        let form = (0..=header::MINOR)
            .rev()
            .find_map(|minor| Manifest::decode_unchecked(minor, rest).ok());
        let (minor, body) = match form {
            Some(manifest) => files.fix(manifest, base)?,
            None => match codec::decode::<Manifest>("manifest", 0, rest) {
                Err(PersistError::LeftOver { left, .. }) => {
                    let body = &rest[..rest.len() - left];
                    files.fix(codec::decode("manifest", 0, body).ok()?, base)?
                }
                _ => (0, rest.to_vec()),
            },
        };
        let header = Header::new(header::ARCH_AARCH64, minor, &body).encode();
        files.manifest = [&header, &body[..]].concat();
        Some(files)
    }

    /// Puts digests and lengths in. Answers the minor format version and the body.
    fn fix(&mut self, mut manifest: Manifest, base: &Base) -> Option<(u16, Vec<u8>)> {
        if let Some(parent) = &mut manifest.parent {
            *parent = base.id;
        }
        // An index of runs makes it a snapshot of format 1.4.
        let is_runs = self.index.get(..8) == Some(&index_header()[..8]);
        manifest.operation = is_runs.then(Default::default);
        let scheme = manifest.scheme();
        if let Some(image) = manifest.images.first_mut() {
            if is_chunk_size(image.chunk_size) && image.size <= MAX_IMAGE {
                self.fix_records(image.chunk_size, scheme, manifest.parent.and(Some(base)));
            }
            let records = match scheme {
                Scheme::Chunks => &self.index[..],
                Scheme::Runs => self.index.get(HEADER_LEN..).unwrap_or_default(),
            };
            let records = runs(records, scheme);
            image.digest = image_digest(records, scheme, image.size, image.chunk_size);
        }
        for section in &mut manifest.sections {
            let SectionRecord { offset, length, digest, .. } = section;
            let range = *offset as usize..offset.saturating_add(*length) as usize;
            *digest = Digest::of(self.state.get(range).unwrap_or_default());
        }
        for FileRecord { name, length, digest } in &mut manifest.files {
            let bytes = match &**name {
                "state" => &self.state,
                "memory.idx" => &self.index,
                "memory.zst" => &self.data,
                _ => continue,
            };
            (*length, *digest) = (bytes.len() as u64, Digest::of(bytes));
        }
        Some((manifest.minor(), manifest.encode_unchecked().ok()?))
    }

    /// Gives every record the digest of what it stands for, where that can be told.
    fn fix_records(&mut self, chunk_size: u32, scheme: Scheme, base: Option<&Base>) {
        let bitmap = (chunk_size as usize / PAGE_SIZE).div_ceil(8);
        let header = if scheme == Scheme::Runs { HEADER_LEN } else { 0 };
        let mut next = 0usize;
        let records = self.index.get_mut(header..).unwrap_or_default();
        for record in records.chunks_exact_mut(RECORD_LEN) {
            let chunk = next;
            let word =
                |at: usize| u32::from_le_bytes(record[at..at + 4].try_into().expect("4 bytes"));
            let (count, length) = match scheme {
                Scheme::Chunks => (1, word(4)),
                Scheme::Runs => (word(4), word(0) >> 8),
            };
            next = next.saturating_add(count as usize);
            let length = length as usize;
            let offset = u64::from_le_bytes(record[8..16].try_into().expect("8 bytes")) as usize;
            let stored = self.data.get(offset..offset.saturating_add(length)).unwrap_or_default();
            let below = base.and_then(|base| base.memory.get(place(chunk, chunk_size)));
            let raw = match record[0] {
                0 => Some(vec![0; chunk_size as usize]),
                1 => zstd::bulk::decompress(stored, chunk_size as usize).ok(),
                2 => below.filter(|_| stored.len() > bitmap).and_then(|below| {
                    let (bits, frame) = stored.split_at(bitmap);
                    let pages = zstd::bulk::decompress(frame, chunk_size as usize).ok()?;
                    let mut raw = below.to_vec();
                    let set = (0..8 * bitmap).filter(|page| bits[page / 8] >> (page % 8) & 1 == 1);
                    for (page, bytes) in set.zip(pages.chunks_exact(PAGE_SIZE)) {
                        raw.get_mut(place(page, PAGE_SIZE as u32))?.copy_from_slice(bytes);
                    }
                    Some(raw)
                }),
                _ => below.map(<[u8]>::to_vec),
            };
            if let Some(raw) = raw {
                record[16..].copy_from_slice(&Digest::of(&raw).0);
            }
        }
    }

    fn write(&self, path: &Path) -> io::Result<()> {
        fs::create_dir(path)?;
        fs::write(path.join("manifest"), &self.manifest)?;
        fs::write(path.join("state"), &self.state)?;
        fs::write(path.join("memory.idx"), &self.index)?;
        fs::write(path.join("memory.zst"), &self.data)?;
        fs::write(path.join("working-set"), &self.working_set)
    }
}

/// A good snapshot that hostile differences can name as their parent.
struct Base {
    dir: TempDir,
    id: Digest,
    memory: Vec<u8>,
}

impl Base {
    /// Eight chunks of 16 KiB: zeros, and others.
    fn get() -> &'static Self {
        static BASE: OnceLock<Base> = OnceLock::new();
        BASE.get_or_init(|| {
            let dir = tempfile::tempdir().expect("a directory");
            let mut memory = vec![0; 8 * MIN_CHUNK_SIZE as usize];
            for (at, byte) in memory.iter_mut().enumerate().skip(3 << 14) {
                *byte = (at / 7) as u8;
            }
            let id = publish(&dir.path().join("base"), &memory).expect("room");
            Self { dir, id, memory }
        })
    }

    fn path(&self) -> std::path::PathBuf {
        self.dir.path().join("base")
    }
}

/// Publishes a full snapshot of `memory` with two sections, in chunks of 16 KiB.
pub fn publish(path: &Path, memory: &[u8]) -> Result<Digest, squib_formats::error::FormatError> {
    let mut staging = Staging::new(path, Existing::Refuse)?;
    staging.durability(Durability::None);
    let section = |kind: &str, payload: &[u8]| Section {
        kind: kind.into(),
        instance: "0".into(),
        version: 1,
        payload: payload.into(),
    };
    let sections = write_sections(&mut staging, &[section("vcpu", &[1; 30]), section("gic", b"")])?;
    let options = ImageOptions { chunk_size: MIN_CHUNK_SIZE, ..ImageOptions::default() };
    let source = Raw(Mutex::new(memory.to_vec()));
    let image = write_image(&mut staging, MEMORY_IMAGE, &source, options, one_thread())?.record;
    staging.publish(Manifest {
        writer: "squib".into(),
        host: String::new(),
        created: 1,
        parent: None,
        parent_hint: None,
        host_backend: None,
        operation: None,
        machine: MachineInfo {
            name: "vm".into(),
            memory_size: image.size,
            vcpus: 1,
            cmdline: String::new(),
            kernel: String::new(),
            kernel_digest: None,
            initrd: None,
            disks: vec![],
            rng: false,
            backend: "soft".into(),
            deterministic: None,
        },
        cpu: CpuIdentity {
            backend: "soft".into(),
            id_registers: vec![(1, 2)],
            counter_frequency: 62_500_000,
        },
        images: vec![image],
        sections,
        files: vec![],
    })
}

/// Bytes in memory, as a source and a sink.
struct Raw(Mutex<Vec<u8>>);

impl Source for Raw {
    fn size(&self) -> u64 {
        self.0.lock().expect("nobody panics").len() as u64
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<Content> {
        let bytes = self.0.lock().expect("nobody panics");
        into.copy_from_slice(&bytes[offset as usize..][..into.len()]);
        Ok(Content::Data)
    }
}

impl Sink for Raw {
    fn is_zero(&self, _: u64, _: u64) -> bool {
        false
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut target = self.0.lock().expect("nobody panics");
        target[offset as usize..][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }
}

fn place(number: usize, size: u32) -> Range<usize> {
    number * size as usize..(number + 1) * size as usize
}

/// How many chunks the records of an index are of, and their digests.
fn runs(records: &[u8], scheme: Scheme) -> impl Iterator<Item = (u64, Digest)> + '_ {
    records.chunks_exact(RECORD_LEN).map(move |record| {
        let count = u32::from_le_bytes(record[4..8].try_into().expect("4 bytes"));
        let count = if scheme == Scheme::Runs { count.into() } else { 1 };
        (count, Digest(record[RECORD_LEN - 32..].try_into().expect("32 bytes")))
    })
}

/// The image digest of chunks: how many in a row, and their digest.
fn image_digest(
    chunks: impl Iterator<Item = (u64, Digest)>,
    scheme: Scheme,
    size: u64,
    chunk_size: u32,
) -> Digest {
    let mut longest: Vec<(u64, Digest)> = Vec::new();
    for (count, digest) in chunks {
        match longest.last_mut() {
            Some(last) if scheme == Scheme::Runs && last.1 == digest => last.0 += count,
            _ => longest.push((count, digest)),
        }
    }
    let mut hasher = blake3::Hasher::new();
    for (count, digest) in longest {
        if scheme == Scheme::Runs {
            hasher.update(&count.to_le_bytes());
        }
        hasher.update(&digest.0);
    }
    hasher.update(&size.to_le_bytes());
    hasher.update(&u64::from(chunk_size).to_le_bytes());
    hasher.finalize().into()
}

fn one_thread() -> Control<'static> {
    Control { threads: std::num::NonZeroUsize::MIN, ..Control::default() }
}
