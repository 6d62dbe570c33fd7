//! Puts kernel, initrd and device tree into guest RAM.

use std::{
    io::{self, Read},
    path::{Path, PathBuf},
};

use squib_devices::{map, memory::GuestRam};
use squib_formats::{
    digest::Digest,
    open::{self, Access, Kind},
};
use vm_memory::{Bytes, GuestAddress};

use super::{
    fdt::{FdtError, Guest, device_tree},
    image::{self, Image, ImageError, PageSize, is_kernel, unpack},
};
use crate::{
    config::MachineConfig,
    seed::{Lane, Seeds},
};

/// Bytes at the end of RAM that hold the device tree.
pub const FDT_AREA: u64 = 64 << 10;
/// First address that belongs to the guest: 2 MiB aligned, behind the system area.
const GUEST_BASE: u64 = map::RAM_BASE + map::SYSTEM_AREA_SIZE;
/// Alignment of the initrd: the largest page size.
const INITRD_ALIGN: u64 = 64 << 10;

/// Where the boot vCPU starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// First instruction.
    pub pc: u64,
    /// x0: the device tree's address.
    pub fdt: u64,
    /// Granule of the kernel, which the CPU must have.
    pub page_size: PageSize,
    /// blake3 of the kernel's file.
    pub kernel_digest: Digest,
    /// blake3 of the initrd's file, if there is one.
    pub initrd_digest: Option<Digest>,
}

/// Why a machine cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel or initrd cannot be read.
    #[error("{what} {}: {source}", path.display())]
    Read {
        /// "kernel" or "initrd".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is not the one that the guest booted from before.
    #[error("{what} {}: blake3 is {found}, the machine booted from a file with {expected}", path.display())]
    Changed {
        /// "kernel" or "initrd".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The digest that the configuration asks for.
        expected: Digest,
        /// The file's.
        found: Digest,
    },
    /// The kernel file is not a kernel for this machine.
    #[error("kernel {}: {source}", path.display())]
    Kernel {
        /// The file.
        path: PathBuf,
        /// What it is instead.
        source: ImageError,
    },
    /// The initrd is nothing that a kernel unpacks.
    #[error("initrd {}: it is {found}; a cpio archive is needed, plain or compressed", path.display())]
    Initrd {
        /// The file.
        path: PathBuf,
        /// What it is instead.
        found: String,
    },
    /// The kernel does not fit into RAM.
    #[error(
        "kernel {} needs {needed} bytes at offset {text_offset:#x}, but {memory} bytes of memory leave {available} for it",
        path.display()
    )]
    KernelDoesNotFit {
        /// The file.
        path: PathBuf,
        /// Bytes that it needs.
        needed: u64,
        /// Its text offset.
        text_offset: u64,
        /// Bytes between its place and the device tree.
        available: u64,
        /// RAM in bytes.
        memory: u64,
    },
    /// The initrd does not fit into what the kernel leaves.
    #[error(
        "initrd {} has {needed} bytes, but {memory} bytes of memory leave {available} above the kernel",
        path.display()
    )]
    InitrdDoesNotFit {
        /// The file.
        path: PathBuf,
        /// Its length.
        needed: u64,
        /// Bytes between kernel and device tree.
        available: u64,
        /// RAM in bytes.
        memory: u64,
    },
    /// The device tree cannot be written.
    #[error("the device tree: {0}")]
    Fdt(#[from] FdtError),
    /// There is no entropy for the guest's seeds.
    #[error("the host gives no random numbers: {0}")]
    Entropy(#[from] getrandom::Error),
    /// RAM could not be written.
    #[error("guest memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Fills `ram` for the first instruction of a guest of `config`.
pub fn load(config: &MachineConfig, ram: &GuestRam) -> Result<Entry, BootError> {
    let seeds = match config.deterministic {
        Some(deterministic) => Seeds::stream(deterministic.seed, Lane::DeviceTree),
        None => Seeds::Host,
    };
    load_with(config, ram, seeds)
}

fn load_with(config: &MachineConfig, ram: &GuestRam, mut seeds: Seeds) -> Result<Entry, BootError> {
    let memory = ram.size();
    let fdt = map::RAM_BASE + memory - FDT_AREA;
    let (bytes, kernel_digest) = read_file("kernel", &config.kernel, config.kernel_digest, memory)?;
    let image = unpack(bytes, memory)
        .map_err(|source| BootError::Kernel { path: config.kernel.clone(), source })?;
    let pc = place_kernel(&config.kernel, &image, fdt, memory)?;
    ram.write_slice(&image.bytes, GuestAddress(pc))?;

    let kernel_end = pc + image.size;
    let (initrd, initrd_digest) = match &config.initrd {
        Some(path) => {
            let (bytes, digest) = read_file("initrd", path, config.initrd_digest, memory)?;
            check_initrd(&bytes)
                .map_err(|found| BootError::Initrd { path: path.clone(), found })?;
            (Some(place_initrd(path, &bytes, ram, kernel_end, fdt)?), Some(digest))
        }
        None => (None, None),
    };
    let mut rng_seed = [0; 64];
    seeds.fill(&mut rng_seed)?;
    let kaslr_seed = seeds.u64()?;
    let tree = device_tree(&Guest {
        memory,
        vcpus: config.vcpus,
        cmdline: &config.cmdline,
        initrd,
        virtio_slots: config.disks.len() as u32 + u32::from(config.rng),
        rng_seed: &rng_seed,
        kaslr_seed,
    })?;
    if tree.len() as u64 > FDT_AREA {
        return Err(FdtError::TooLarge { length: tree.len() }.into());
    }
    ram.write_slice(&tree, GuestAddress(fdt))?;
    Ok(Entry { pc, fdt, page_size: image.page_size, kernel_digest, initrd_digest })
}

/// The kernel's address: a 2 MiB boundary plus its text offset.
fn place_kernel(path: &Path, image: &Image, limit: u64, memory: u64) -> Result<u64, BootError> {
    let start = GUEST_BASE.saturating_add(image.text_offset);
    let available = limit.saturating_sub(start);
    if image.size > available {
        return Err(BootError::KernelDoesNotFit {
            path: path.to_owned(),
            needed: image.size,
            text_offset: image.text_offset,
            available,
            memory,
        });
    }
    Ok(start)
}

/// How an initial RAM file system begins, as Linux's lib/decompress.c and init/initramfs.c know it.
const INITRD_MAGICS: &[&[u8]] = &[
    b"070701",
    b"070702",
    &[0x1f, 0x8b],
    &[0x1f, 0x9e],
    b"BZh",
    &[0x5d, 0x00],
    b"\xfd7zXZ\0",
    &[0x89, b'L', b'Z', b'O'],
    &[0x02, 0x21, 0x4c, 0x18],
    &[0x28, 0xb5, 0x2f, 0xfd],
];

/// Says what `bytes` are if no kernel can unpack them. Linux skips zeros in front of an archive.
fn check_initrd(bytes: &[u8]) -> Result<(), String> {
    let start = bytes.iter().position(|byte| *byte != 0);
    let Some(content) = start.map(|start| &bytes[start..]) else {
        let empty = bytes.is_empty();
        return Err(if empty { "empty" } else { "nothing but zeros" }.to_owned());
    };
    if INITRD_MAGICS.iter().any(|magic| content.starts_with(magic)) {
        return Ok(());
    }
    Err(match is_kernel(bytes) {
        true => "a kernel".to_owned(),
        false => format!("no archive: it begins with {}", image::start_of(bytes)),
    })
}

/// Puts the initrd just below `limit`; returns its range.
fn place_initrd(
    path: &Path,
    bytes: &[u8],
    ram: &GuestRam,
    floor: u64,
    limit: u64,
) -> Result<(u64, u64), BootError> {
    let needed = bytes.len() as u64;
    let start = limit.checked_sub(needed).map(|start| start & !(INITRD_ALIGN - 1));
    match start.filter(|start| *start >= floor) {
        Some(start) => {
            ram.write_slice(bytes, GuestAddress(start))?;
            Ok((start, start + needed))
        }
        None => Err(BootError::InitrdDoesNotFit {
            path: path.to_owned(),
            needed,
            available: limit.saturating_sub(floor),
            memory: ram.size(),
        }),
    }
}

/// Reads a whole regular file and digests it; if `expected` is given, it must have that digest. What is
/// longer than RAM can never be loaded and is not read.
fn read_file(
    what: &'static str,
    path: &Path,
    expected: Option<Digest>,
    memory: u64,
) -> Result<(Vec<u8>, Digest), BootError> {
    let read = || {
        let file = open::open(path, Kind::File, Access::Read)?;
        let meta = file.metadata()?;
        if meta.len() > memory {
            let why = format!("{} bytes, more than the {memory} bytes of memory", meta.len());
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, why));
        }
        let mut bytes = Vec::with_capacity(meta.len() as usize);
        // A growing file has no honest length.
        file.take(memory + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > memory {
            let why = format!("more than the {memory} bytes of memory");
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, why));
        }
        Ok(bytes)
    };
    let bytes = read().map_err(|source| BootError::Read { what, path: path.to_owned(), source })?;
    let found = Digest::of(&bytes);
    match expected {
        Some(expected) if expected != found => {
            Err(BootError::Changed { what, path: path.to_owned(), expected, found })
        }
        _ => Ok((bytes, found)),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::image::tests::kernel, *};

    struct Files {
        dir: tempfile::TempDir,
        config: MachineConfig,
        ram: GuestRam,
    }

    fn files(kernel: &[u8], initrd: Option<usize>) -> Files {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("Image");
        std::fs::write(&path, kernel).unwrap();
        let mut config = MachineConfig::new("vm", path);
        config.memory = map::RAM_MIN;
        config.initrd = initrd.map(|length| {
            let path = dir.path().join("initrd");
            let mut archive = vec![0xa5; length];
            archive[..6].copy_from_slice(b"070701");
            std::fs::write(&path, archive).unwrap();
            path
        });
        Files { dir, config, ram: GuestRam::new(map::RAM_MIN).unwrap() }
    }

    #[test]
    fn kernel_initrd_and_tree_lie_where_the_guest_looks_for_them() {
        let image = kernel(0, 0x20_0000, 0, 0x1000);
        let files = files(&image, Some(0x1_2345));
        let entry = load(&files.config, &files.ram).unwrap();
        assert_eq!(entry.pc, 0x8020_0000);
        let end = map::RAM_BASE + map::RAM_MIN;
        assert_eq!(entry.fdt, end - 0x1_0000);
        let mut found = vec![0; image.len()];
        files.ram.read_slice(&mut found, GuestAddress(entry.pc)).unwrap();
        assert_eq!(found, image);
        let tree: u32 = files.ram.read_obj(GuestAddress(entry.fdt)).unwrap();
        assert_eq!(u32::from_be(tree), 0xd00d_feed);
        let mut found = vec![0; 0x1_2345];
        files.ram.read_slice(&mut found, GuestAddress(end - 0x3_0000)).unwrap();
        assert!(found[6..].iter().all(|byte| *byte == 0xa5));
    }

    #[test]
    fn what_does_not_fit_is_reported_with_both_sizes() {
        let image = kernel(0, map::RAM_MIN, 0, 0x1000);
        let Files { config, ram, dir: _dir } = files(&image, None);
        let error = load(&config, &ram).unwrap_err();
        let available = map::RAM_MIN - map::SYSTEM_AREA_SIZE - FDT_AREA;
        assert!(error.to_string().contains(&map::RAM_MIN.to_string()), "{error}");
        assert!(error.to_string().contains(&available.to_string()), "{error}");

        let image = kernel(0, map::RAM_MIN - (8 << 20), 0, 0x1000);
        let Files { config, ram, dir: _dir } = files(&image, Some(7 << 20));
        let error = load(&config, &ram).unwrap_err();
        let BootError::InitrdDoesNotFit { needed, available, .. } = error else {
            panic!("{error}")
        };
        assert_eq!(needed, 7 << 20);
        assert_eq!(available, (6 << 20) - FDT_AREA);
    }

    #[test]
    fn a_hostile_text_offset_does_not_overflow() {
        let Files { config, ram, dir: _dir } = files(&kernel(u64::MAX - 5, 1, 0, 0x1000), None);
        let found = load(&config, &ram);
        assert!(matches!(found, Err(BootError::KernelDoesNotFit { available: 0, .. })));
        let Files { config, ram, dir: _dir } = files(&kernel(0, u64::MAX, 0, 0x1000), None);
        let found = load(&config, &ram);
        assert!(matches!(found, Err(BootError::KernelDoesNotFit { needed: u64::MAX, .. })));
    }

    #[test]
    fn missing_files_and_folders_are_named() {
        let mut files = files(&kernel(0, 64, 0, 64), None);
        files.config.initrd = Some(files.dir.path().join("none"));
        let error = load(&files.config, &files.ram).unwrap_err().to_string();
        assert!(error.starts_with("initrd ") && error.contains("none"), "{error}");
        files.config.kernel = files.dir.path().to_owned();
        let error = load(&files.config, &files.ram).unwrap_err().to_string();
        assert!(error.starts_with("kernel ") && error.contains("directory"), "{error}");
    }

    #[test]
    #[cfg(unix)]
    fn a_file_that_is_not_a_regular_one_is_refused_and_not_waited_for() {
        let mut files = files(&kernel(0, 64, 0, 64), None);
        let path = files.dir.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        for path in [path.as_path(), Path::new("/dev/zero")] {
            files.config.initrd = Some(path.to_owned());
            let error = load(&files.config, &files.ram).unwrap_err().to_string();
            assert!(error.ends_with("not a regular file"), "{error}");
        }
    }

    #[test]
    fn what_is_no_archive_is_no_initrd() {
        let image = kernel(0, 64, 0, 64);
        for (bytes, said) in [
            (&b""[..], "it is empty"),
            (&[0; 512], "nothing but zeros"),
            (&image, "it is a kernel"),
            (b"\x7fELF\x02\x01\x01", "it begins with 7f 45 4c 46"),
            (&[0xa5; 4096], "it begins with a5 a5"),
        ] {
            let mut files = files(&image, None);
            let path = files.dir.path().join("initrd");
            std::fs::write(&path, bytes).unwrap();
            files.config.initrd = Some(path);
            let error = load(&files.config, &files.ram).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
        check_initrd(&[&[0; 4][..], b"070701"].concat()).unwrap();
    }

    #[test]
    fn a_file_with_another_digest_than_the_configured_is_refused() {
        let mut files = files(&kernel(0, 64, 0, 64), Some(100));
        let entry = load(&files.config, &files.ram).unwrap();
        files.config.kernel_digest = Some(entry.kernel_digest);
        files.config.initrd_digest = entry.initrd_digest;
        assert_eq!(load(&files.config, &files.ram).unwrap().initrd_digest, entry.initrd_digest);
        for what in ["initrd", "Image"] {
            let path = files.dir.path().join(what);
            let good = std::fs::read(&path).unwrap();
            std::fs::write(&path, [&good[..], b"x"].concat()).unwrap();
            let error = load(&files.config, &files.ram).unwrap_err();
            assert!(matches!(error, BootError::Changed { .. }), "{error}");
            std::fs::write(&path, good).unwrap();
        }
    }

    #[test]
    fn a_seed_makes_equal_memory() {
        let mut files = files(&kernel(0, 64, 0, 64), None);
        let tree = |config: &MachineConfig| {
            let ram = GuestRam::new(map::RAM_MIN).unwrap();
            let entry = load(config, &ram).unwrap();
            let mut tree = vec![0; FDT_AREA as usize];
            ram.read_slice(&mut tree, GuestAddress(entry.fdt)).unwrap();
            tree
        };
        assert_ne!(tree(&files.config), tree(&files.config));
        files.config.deterministic = Some(crate::config::Deterministic { seed: 7, epoch: 0 });
        assert_eq!(tree(&files.config), tree(&files.config));
    }
}
