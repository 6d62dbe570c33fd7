//! A small snapshot, made with the public interface only.

use std::{
    fs::{self, File},
    io::{self, ErrorKind, Write},
    ops::Range,
    os::{fd::BorrowedFd, unix::fs::FileExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use rustix::fs::{Mode, OFlags};

use squib_formats::{
    digest::Digest,
    error::FormatError,
    image::{
        Content, Control, HEADER_LEN, ImageOptions, RECORD_LEN, Scheme, Sink, Source, is_zero,
        write_image, write_raw_image,
    },
    layer::Layer,
    manifest::{
        CpuIdentity, DiskRecord, DiskStorage, HostBackend, ImageRecord, MachineInfo, Manifest,
    },
    persist::Section,
    publish::{Existing, Staging},
    sections::write_sections,
};

/// A source over bytes in memory.
pub(crate) struct Bytes(pub(crate) Vec<u8>);

impl Source for Bytes {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<Content> {
        into.copy_from_slice(&self.0[offset as usize..][..into.len()]);
        Ok(Content::Data)
    }
}

/// A sink into bytes in memory.
pub(crate) struct Target {
    pub(crate) bytes: Mutex<Vec<u8>>,
    pub(crate) zeroed: bool,
}

impl Target {
    pub(crate) fn new(size: usize, fill: u8) -> Self {
        Self { bytes: Mutex::new(vec![fill; size]), zeroed: fill == 0 }
    }
}

impl Sink for Target {
    fn is_zero(&self, _: u64, _: u64) -> bool {
        self.zeroed
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut target = self.bytes.lock().unwrap();
        let place = target.get_mut(offset as usize..offset as usize + bytes.len());
        place.ok_or(ErrorKind::UnexpectedEof)?.copy_from_slice(bytes);
        Ok(())
    }
}

/// RAM with zero chunks, equal chunks, chunks that compress well and one that does not.
pub(crate) fn memory() -> Vec<u8> {
    let mut bytes = vec![0u8; 16 << 16];
    let mut noise = 0x9e37_79b9_7f4a_7c15u64;
    for byte in &mut bytes[2 << 16..3 << 16] {
        noise = noise.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        *byte = (noise >> 56) as u8;
    }
    bytes[5 << 16..6 << 16].fill(0x55);
    bytes[9 << 16..10 << 16].fill(0x55);
    for (at, byte) in bytes[11 << 16..12 << 16].iter_mut().enumerate() {
        *byte = (at / 64) as u8;
    }
    bytes
}

/// A disk whose size is not a multiple of the chunk size.
pub(crate) fn disk() -> Vec<u8> {
    let mut bytes = vec![0; 100_352];
    bytes[70_000..70_005].copy_from_slice(b"squib");
    bytes
}

/// A disk with noise, zeros, equal chunks and a short last one.
pub(crate) fn raw_disk() -> Vec<u8> {
    let mut bytes = memory()[2 << 16..6 << 16].to_vec();
    bytes.extend_from_within(3 << 16..);
    bytes.extend(disk());
    bytes
}

/// A file system that can clone, for tests on one that cannot: it copies, and keeps holes.
#[derive(Debug)]
pub(crate) struct Copies;

impl Layer for Copies {
    fn clone_file(&self, dir: BorrowedFd<'_>, name: &str, file: &File) -> io::Result<File> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL;
        let copy = File::from(rustix::fs::openat(dir, name, flags, Mode::RUSR | Mode::WUSR)?);
        let size = file.metadata()?.len();
        copy.set_len(size)?;
        for at in (0..size).step_by(4096) {
            let mut page = vec![0; (size - at).min(4096) as usize];
            file.read_exact_at(&mut page, at)?;
            if !is_zero(&page) {
                copy.write_all_at(&page, at)?;
            }
        }
        Ok(copy)
    }
}

/// A file with those bytes that nobody else has.
pub(crate) fn file_of(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// Makes `bytes`, which lie in a file, the raw image `name`, through a layer that can clone.
pub(crate) fn write_raw(
    staging: &mut Staging,
    name: &str,
    bytes: &[u8],
    control: Control<'_>,
) -> Result<ImageRecord, FormatError> {
    let (raw, size) = (format!("{name}.raw"), bytes.len() as u64);
    let clone = staging.clone_file(&raw, &file_of(bytes), size)?.expect("the layer can clone");
    let options = ImageOptions::default();
    Ok(write_raw_image(staging, name, clone, &|_, _| None, options, control)?.record)
}

pub(crate) fn sections() -> Vec<Section> {
    let section = |kind: &str, instance: &str, payload: &[u8]| Section {
        kind: kind.into(),
        instance: instance.into(),
        version: 1,
        payload: payload.into(),
    };
    vec![
        section("serial", "0", &[1; 40]),
        section("gic", "0", &[2; 300]),
        section("vcpu", "0", &[3; 99]),
        section("time", "0", &[]),
    ]
}

/// Writes everything but the manifest.
pub(crate) fn stage(staging: &mut Staging, control: Control<'_>) -> Result<Manifest, FormatError> {
    stage_with(staging, control, |staging| {
        let (source, options) = (Bytes(disk()), ImageOptions::default());
        Ok(write_image(staging, "disk-root", &source, options, control)?.record)
    })
}

/// Writes everything but the manifest; the disk is a raw image.
pub(crate) fn stage_raw(
    staging: &mut Staging,
    control: Control<'_>,
) -> Result<Manifest, FormatError> {
    stage_with(staging, control, |staging| write_raw(staging, "disk-root", &raw_disk(), control))
}

/// Writes everything but the manifest; the disk is what `write_disk` writes.
fn stage_with(
    staging: &mut Staging,
    control: Control<'_>,
    write_disk: impl FnOnce(&mut Staging) -> Result<ImageRecord, FormatError>,
) -> Result<Manifest, FormatError> {
    let sections = write_sections(staging, &sections())?;
    let memory =
        write_image(staging, "memory", &Bytes(memory()), ImageOptions::default(), control)?.record;
    let disk = write_disk(staging)?;
    Ok(Manifest {
        writer: "squib 0.3.0".into(),
        host: "linux x86_64".into(),
        created: 1_767_225_600_000_000_000,
        parent: None,
        parent_hint: None,
        host_backend: None,
        operation: None,
        machine: MachineInfo {
            name: "golden".into(),
            memory_size: memory.size,
            vcpus: 1,
            cmdline: "console=ttyS0".into(),
            kernel: "Image".into(),
            kernel_digest: None,
            initrd: None,
            disks: vec![
                DiskRecord {
                    id: "root".into(),
                    path: "root.img".into(),
                    size: disk.size,
                    read_only: false,
                    storage: DiskStorage::Captured,
                    digest: disk.digest,
                },
                DiskRecord {
                    id: "data".into(),
                    path: "data.img".into(),
                    size: 4096,
                    read_only: true,
                    storage: DiskStorage::Reference(Scheme::WRITTEN),
                    digest: Digest([7; 32]),
                },
            ],
            rng: true,
            backend: "soft".into(),
            deterministic: None,
        },
        cpu: CpuIdentity {
            backend: "soft".into(),
            id_registers: vec![(0xc000, 0x410f_d083), (0xc020, 0x11)],
            counter_frequency: 62_500_000,
        },
        images: vec![memory, disk],
        sections,
        files: vec![],
    })
}

/// Publishes the sample snapshot at `path`.
pub(crate) fn publish(path: &Path) -> Digest {
    let mut staging = Staging::new(path, Existing::Refuse).unwrap();
    let manifest = stage(&mut staging, Control::default()).unwrap();
    staging.publish(manifest).unwrap()
}

/// Publishes the sample snapshot with a raw disk at `path`.
pub(crate) fn publish_raw(path: &Path) -> Digest {
    let mut staging = Staging::with_layer(path, Existing::Refuse, Arc::new(Copies)).unwrap();
    let manifest = stage_raw(&mut staging, Control::default()).unwrap();
    staging.publish(manifest).unwrap()
}

/// Publishes the sample snapshot at `path`, as one of a backend that is a part of the host's system.
pub(crate) fn publish_of_host(path: &Path) -> Digest {
    let mut staging = Staging::new(path, Existing::Refuse).unwrap();
    let mut manifest = stage(&mut staging, Control::default()).unwrap();
    manifest.machine.backend = "hvf".into();
    manifest.cpu.backend = "hvf".into();
    manifest.host_backend = Some(host_backend());
    staging.publish(manifest).unwrap()
}

pub(crate) fn host_backend() -> HostBackend {
    HostBackend { build: "24A335".into(), unreadable: vec![0xdf11, 0xdf12] }
}

/// A fresh sample snapshot with a raw disk, and the folder that keeps it.
pub(crate) fn fresh_raw() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snap");
    publish_raw(&path);
    (dir, path)
}

/// A fresh sample snapshot, and the folder that keeps it.
pub(crate) fn fresh() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snap");
    publish(&path);
    (dir, path)
}

/// Names in a directory, sorted.
pub(crate) fn names(path: &Path) -> Vec<String> {
    let entries = fs::read_dir(path).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Where in an index of runs the record is that `chunk` belongs to.
pub(crate) fn record_of(index: &[u8], chunk: u64) -> Range<usize> {
    let mut behind = 0;
    for (at, record) in index[HEADER_LEN..].chunks_exact(RECORD_LEN).enumerate() {
        behind += u64::from(u32::from_le_bytes(record[4..8].try_into().unwrap()));
        if chunk < behind {
            let start = HEADER_LEN + at * RECORD_LEN;
            return start..start + RECORD_LEN;
        }
    }
    panic!("chunk {chunk} of {behind}");
}

/// The image digest that an index of runs makes up.
pub(crate) fn index_digest(index: &[u8], size: u64, chunk_size: u64) -> Digest {
    let mut runs: Vec<(u64, &[u8])> = Vec::new();
    for record in index[HEADER_LEN..].chunks_exact(RECORD_LEN) {
        let count = u64::from(u32::from_le_bytes(record[4..8].try_into().unwrap()));
        match runs.last_mut() {
            Some((chunks, digest)) if *digest == &record[16..] => *chunks += count,
            _ => runs.push((count, &record[16..])),
        }
    }
    let runs = runs.iter().flat_map(|(count, digest)| [&count.to_le_bytes()[..], digest].concat());
    let sizes = [size.to_le_bytes(), chunk_size.to_le_bytes()].concat();
    Digest::of(&runs.chain(sizes).collect::<Vec<u8>>())
}
