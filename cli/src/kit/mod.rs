//! The guest kit: a stock Debian arm64 kernel, a busybox initramfs, and on demand a Debian root file
//! system with python3, fetched without root through the machine's own `apt-get`.
//!
//! It lies under the user's cache folder ([`cache_dir`]), a directory a version:
//!
//! ```text
//! kit/current                       name of the newest version
//! kit/6.12.9-1_1.37.0-6/Image       the kernel, raw
//! kit/6.12.9-1_1.37.0-6/initrd-RECIPE.cpio
//! kit/6.12.9-1_1.37.0-6/rootfs-RECIPE.ext4
//! ```
//!
//! Everything is staged and renamed: what lies under its final name is whole.

mod apt;
mod cpio;
mod initramfs;
mod rootfs;

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use apt::Apt;
use rustix::fs::{FlockOperation, flock};
use squib_formats::storage;

use crate::home::folder::{self, FolderError, Others};

/// What a guest runs to keep its wall clock with its RTC.
const CLOCK: &str = include_str!("clock.sh");
/// The package whose dependency names the newest kernel.
const KERNEL_PACKAGE: &str = "linux-image-cloud-arm64";

/// The files of a guest, ready to be used.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Kit {
    /// The kernel: an uncompressed arm64 `Image`.
    pub kernel: PathBuf,
    /// The initramfs, an uncompressed cpio archive.
    pub initrd: PathBuf,
    /// The Debian root file system (ext4), where it has been made.
    pub rootfs: Option<PathBuf>,
    /// The kernel's release, as `uname -r` prints it.
    pub release: String,
}

/// What to fetch, and from where.
#[derive(Debug, Clone, Default)]
pub struct FetchOptions {
    /// A Debian archive instead of the machine's configured one.
    pub mirror: Option<String>,
    /// Also make the root file system.
    pub rootfs: bool,
    /// Debian packages that the root file system holds beside the usual ones. It is an image of its own: the usual
    /// one stays as it is. What the packages' scripts would set up is not.
    pub packages: Vec<String>,
    /// Look for newer packages even if there is a kit.
    pub refresh: bool,
}

impl Kit {
    /// The newest kit in the cache, without any access to a network; `None` if there is none.
    pub fn cached() -> Result<Option<Self>, KitError> {
        match Store::find()?.current() {
            Some(version) => version.kit().map(Some),
            None => Ok(None),
        }
    }

    /// Where the kernel of the newest kit in the cache lies. Nothing is read of the kit, nor made.
    pub(crate) fn cached_kernel() -> Option<PathBuf> {
        Some(Store::find().ok()?.current()?.dir.join("Image"))
    }

    /// The kit, fetched if it is not in the cache. `progress` is told what is being done.
    pub fn fetch(options: &FetchOptions, progress: &dyn Fn(&str)) -> Result<Self, KitError> {
        let store = Store::open()?;
        let packages = &options.packages;
        let current = if options.refresh { None } else { store.current() };
        let complete = |kit: &Self| !options.rootfs || kit.rootfs.is_some();
        if let Some(version) = &current {
            let kit = version.kit_with(packages)?;
            if complete(&kit) {
                return Ok(kit);
            }
        }
        // Another process may have fetched it while this one waited for the lock.
        let _lock = store.lock(progress)?;
        let current = if options.refresh { None } else { store.current() };
        let kit = current.as_ref().map(|version| version.kit_with(packages)).transpose()?;
        if let Some(kit) = kit.filter(complete) {
            return Ok(kit);
        }
        let stage = store.stage()?;
        progress("loading the package lists");
        let apt = Apt::open(&stage.path.join("apt"), options.mirror.as_deref())?;
        let version = match current {
            Some(version) => version,
            None => store.fetch_version(&apt, &stage, progress)?,
        };
        if options.rootfs && version.kit_with(packages)?.rootfs.is_none() {
            let target = version.rootfs(packages);
            rootfs::make(&apt, packages, &stage.path, &target, &version.dir, progress)?;
        }
        version.kit_with(packages)
    }
}

/// Removes what a fetch that is under way has staged: the process is about to end.
pub fn abandon() {
    if let Some(path) = staged().take() {
        let _ = fs::remove_dir_all(path);
    }
}

/// Whether the programs that a fetch runs are installed.
pub fn check_tools() -> Result<(), KitError> {
    Apt::check_tools()?;
    rootfs::tools().map(drop)
}

/// Below the home folder. On macOS what lies there is not backed up, nor indexed.
const CACHE: &str = if cfg!(target_os = "macos") { "Library/Caches/squib" } else { ".cache/squib" };

/// The user's cache folder for squib: `SQUIB_CACHE`, else `squib` below `XDG_CACHE_HOME`, else below `~/.cache`,
/// or on macOS `~/Library/Caches`.
pub fn cache_dir() -> Result<PathBuf, KitError> {
    let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    var("SQUIB_CACHE")
        .or_else(|| var("XDG_CACHE_HOME").map(|dir| dir.join("squib")))
        .or_else(|| var("HOME").map(|dir| dir.join(CACHE)))
        .ok_or(KitError::NoCacheDir)
}

/// Why there is no guest kit.
#[derive(Debug, thiserror::Error)]
pub enum KitError {
    /// No variable names a cache folder.
    #[error("no cache folder: set SQUIB_CACHE, or HOME")]
    NoCacheDir,
    /// The cache folder cannot be made, or is not the user's own.
    #[error("{0}; or name another one with SQUIB_CACHE")]
    Folder(#[from] FolderError),
    /// A program that the kit needs is missing.
    #[error(
        "the guest kit needs `{tool}` ({comes_with}), and it is not installed. \
         On such a machine pass your own guest instead: --kernel an arm64 Image, \
         --initrd an initramfs (cpio), --disk a root file system image"
    )]
    NoTool {
        /// The program.
        tool: &'static str,
        /// The package it is in.
        comes_with: &'static str,
    },
    /// The archive does not have a package, or could not be reached.
    #[error(
        "no package `{package}` for arm64 from: {source_line}. Check that the machine reaches the \
         archive, or name another with --mirror"
    )]
    NoPackage {
        /// The package.
        package: String,
        /// The apt source line.
        source_line: String,
    },
    /// The archive cannot be reached.
    #[error(
        "the Debian archive cannot be reached ({source_line}): {complaint}\n\
         Check the network and the proxy (http_proxy), or name another archive with --mirror URL"
    )]
    Unreachable {
        /// The apt source line.
        source_line: String,
        /// What apt said.
        complaint: String,
    },
    /// Debian's archive keys could not be had.
    #[error("no Debian archive keys: install the package debian-archive-keyring")]
    NoKeyring {
        /// Why the package could not be downloaded.
        #[source]
        source: Box<KitError>,
    },
    /// A program could not be started.
    #[error("cannot run {program}")]
    Spawn {
        /// The program.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// A program ended with a failure.
    #[error("{program} failed ({status}): {complaint}")]
    Tool {
        /// The program.
        program: String,
        /// How it ended.
        status: String,
        /// The last lines that it wrote to stderr.
        complaint: String,
    },
    /// A package does not hold what it should.
    #[error("{package} holds no {what}")]
    Content {
        /// The package.
        package: String,
        /// What is missing.
        what: &'static str,
    },
    /// A file of the cache could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl KitError {
    fn io(path: &Path, source: io::Error) -> Self {
        Self::Io { path: path.to_owned(), source }
    }
}

/// The folder that holds all versions.
struct Store {
    dir: PathBuf,
}

impl Store {
    fn open() -> Result<Self, KitError> {
        let (cache, store) = (cache_dir()?, Self::find()?);
        folder::make(&cache, Others::MayRead)?;
        folder::make(&store.dir, Others::MayRead)?;
        Ok(store)
    }

    /// As [`open`](Self::open), but nothing is made.
    fn find() -> Result<Self, KitError> {
        let cache = cache_dir()?;
        let dir = cache.join("kit");
        folder::check(&cache, Others::MayRead)?;
        folder::check(&dir, Others::MayRead)?;
        Ok(Self { dir })
    }

    fn current(&self) -> Option<Version> {
        let name = fs::read_to_string(self.dir.join("current")).ok()?;
        let dir = self.dir.join(name.trim());
        let release = fs::read_to_string(dir.join("release")).ok()?;
        Some(Version { dir, release })
    }

    /// Excludes other processes; what they left when they were killed is removed.
    fn lock(&self, progress: &dyn Fn(&str)) -> Result<fs::File, KitError> {
        let path = self.dir.join(".lock");
        let file = fs::File::create(&path).map_err(|e| KitError::io(&path, e))?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            progress("waiting for another squib that fetches the kit");
            flock(&file, FlockOperation::LockExclusive)
                .map_err(|e| KitError::io(&path, e.into()))?;
        }
        for entry in fs::read_dir(&self.dir).map_err(|e| KitError::io(&self.dir, e))?.flatten() {
            if entry.file_name().to_string_lossy().starts_with(".staging") {
                // The staged files are of no use; if they cannot be removed they do no harm.
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        Ok(file)
    }

    fn stage(&self) -> Result<Stage, KitError> {
        let path = self.dir.join(format!(".staging-{}", std::process::id()));
        fs::create_dir(&path).map_err(|e| KitError::io(&path, e))?;
        *staged() = Some(path.clone());
        Ok(Stage { path })
    }

    fn fetch_version(
        &self,
        apt: &Apt,
        stage: &Stage,
        progress: &dyn Fn(&str),
    ) -> Result<Version, KitError> {
        // "linux-image-6.12.9+deb13-cloud-arm64 (= 6.12.9-1)"
        let depends = apt.field(KERNEL_PACKAGE, "Depends")?;
        let kernel = depends.split([' ', ',']).next().unwrap_or_default().to_owned();
        let busybox = "busybox-static".to_owned();
        let name: String =
            format!("{}_{}", apt.field(&kernel, "Version")?, apt.field(&busybox, "Version")?)
                .chars()
                .map(|c| if c.is_ascii_alphanumeric() || "._-+".contains(c) { c } else { '-' })
                .collect();
        let dir = self.dir.join(&name);
        if !dir.join("release").is_file() {
            progress(&format!("downloading {kernel} and busybox-static"));
            let debs = stage.sub("debs")?;
            apt.download(&[kernel.clone(), busybox], &debs)?;
            progress("unpacking the kernel and its modules");
            let unpacked = stage.sub("unpacked")?;
            for deb in apt::debs(&debs)? {
                apt::extract(&deb, &unpacked)?;
            }
            let release = kernel.strip_prefix("linux-image-").unwrap_or(kernel.as_str()).to_owned();
            let whole = stage.sub("version")?;
            let vmlinuz = unpacked.join(format!("boot/vmlinuz-{release}"));
            let image = raw_image(&vmlinuz)?.ok_or_else(|| KitError::Content {
                package: kernel.clone(),
                what: "arm64 kernel image that can be read",
            })?;
            write(&whole.join("Image"), &image)?;
            let busybox = ["usr/bin/busybox", "bin/busybox"]
                .map(|path| unpacked.join(path))
                .into_iter()
                .find(|path| path.is_file())
                .ok_or_else(|| KitError::Content {
                    package: "busybox-static".into(),
                    what: "busybox",
                })?;
            let target = whole.join("busybox");
            fs::copy(&busybox, &target).map_err(|e| KitError::io(&target, e))?;
            initramfs::collect_modules(&unpacked, &whole.join("modules"))?;
            write(&whole.join("release"), release.as_bytes())?;
            // Without `release` it is not a version: what stands there was half removed.
            let _ = fs::remove_dir_all(&dir);
            fs::rename(&whole, &dir).map_err(|e| KitError::io(&dir, e))?;
        }
        publish(&self.dir.join("current"), name.as_bytes())?;
        self.current().ok_or(KitError::Content { package: name, what: "release" })
    }
}

/// One version of the kit.
struct Version {
    dir: PathBuf,
    release: String,
}

impl Version {
    fn kit(&self) -> Result<Kit, KitError> {
        self.kit_with(&[])
    }

    /// The kit, with a root file system that holds `packages` too; the initramfs is built when this build of squib has
    /// a newer recipe for it.
    fn kit_with(&self, packages: &[String]) -> Result<Kit, KitError> {
        let initrd = self.dir.join(format!("initrd-{}.cpio", initramfs::recipe()));
        if !initrd.is_file() {
            publish(&initrd, &initramfs::build(&self.dir, &self.release)?)?;
        }
        let rootfs = self.rootfs(packages);
        Ok(Kit {
            kernel: self.dir.join("Image"),
            initrd,
            rootfs: rootfs.is_file().then_some(rootfs),
            release: self.release.clone(),
        })
    }

    fn rootfs(&self, packages: &[String]) -> PathBuf {
        self.dir.join(format!("rootfs-{}.ext4", rootfs::recipe(packages)))
    }
}

/// A directory for half-made files, removed with all in it.
struct Stage {
    path: PathBuf,
}

impl Stage {
    fn sub(&self, name: &str) -> Result<PathBuf, KitError> {
        let path = self.path.join(name);
        fs::create_dir(&path).map_err(|e| KitError::io(&path, e))?;
        Ok(path)
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        *staged() = None;
        // The next one that takes the lock removes what could not be removed now.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// The stage of the fetch that is under way in this process; the lock lets there be one only.
fn staged() -> MutexGuard<'static, Option<PathBuf>> {
    static STAGED: Mutex<Option<PathBuf>> = Mutex::new(None);
    STAGED.lock().unwrap_or_else(PoisonError::into_inner)
}

fn write(path: &Path, data: &[u8]) -> Result<(), KitError> {
    let write = || {
        let mut file = fs::File::create(path)?;
        file.write_all(data)?;
        storage::sync(&file)
    };
    write().map_err(|e| KitError::io(path, e))
}

/// Writes `data` beside `path` and renames it there.
fn publish(path: &Path, data: &[u8]) -> Result<(), KitError> {
    // Threads of one process may publish the same file at the same time.
    static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let unique = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let staged = path.with_extension(format!("staging-{}-{unique}", std::process::id()));
    let result = write(&staged, data)
        .and_then(|()| fs::rename(&staged, path).map_err(|e| KitError::io(path, e)));
    if result.is_err() {
        let _ = fs::remove_file(&staged);
    }
    result
}

/// The uncompressed Image in a packaged kernel: as it is, compressed whole, or as the payload of an
/// EFI zboot file (drivers/firmware/efi/libstub/zboot-header.S). `None` if it is nothing of these.
fn raw_image(path: &Path) -> Result<Option<Vec<u8>>, KitError> {
    let mut data = fs::read(path).map_err(|e| KitError::io(path, e))?;
    let word = |data: &[u8], at: usize| {
        data.get(at..at + 4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) as usize)
    };
    if data.get(4..8) == Some(b"zimg") {
        let payload = word(&data, 8).zip(word(&data, 12)).and_then(|(offset, size)| {
            data.get(offset..offset.checked_add(size)?).map(<[u8]>::to_vec)
        });
        match payload {
            Some(payload) => data = payload,
            None => return Ok(None),
        }
    }
    let image = decompress(path, data)?;
    // The arm64 boot header's magic (Documentation/arch/arm64/booting.rst).
    Ok((image.get(0x38..0x3c) == Some(b"ARM\x64")).then_some(image))
}

fn decompress(path: &Path, raw: Vec<u8>) -> Result<Vec<u8>, KitError> {
    initramfs::inflate(raw).map_err(|e| KitError::io(path, e))
}
