//! Files: raw images of memory, the page cache, and how fast storage and memory are.

use std::{
    fs::{self, File},
    hint::black_box,
    io::{self, Seek, Write},
    os::unix::fs::FileExt,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use rustix::fs::statvfs;
use squib_formats::{
    image::{Control, ImageReader, Sink},
    manifest::MEMORY_IMAGE,
    snapshot_dir::Snapshot,
};

const TMPFS_MAGIC: u32 = 0x0102_1994;
/// Of util-linux: tells what of a file is in the page cache.
const FINCORE: &str = "fincore";
/// How often it is tried to drop a file from the page cache.
const DROPS: usize = 3;
/// Bytes that [`write_rates`] writes.
const TRIAL: u64 = 256 << 20;
/// Bytes that [`first_touch_rate`] takes.
const FIRST_TOUCH: u64 = 512 << 20;

/// Writes the memory of a snapshot into a raw file.
pub(super) fn raw_memory(snapshot: &Path, file: &Path) -> Result<u64> {
    struct Raw(File);
    impl Sink for Raw {
        fn is_zero(&self, _: u64, _: u64) -> bool {
            // A new file's holes are.
            true
        }

        fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
            self.0.write_all_at(bytes, offset)
        }
    }
    let image = ImageReader::open(&Snapshot::open(snapshot)?, MEMORY_IMAGE)?;
    let raw = Raw(File::create(file).with_context(|| file.display().to_string())?);
    raw.0.set_len(image.record().size)?;
    image.load(&raw, Control::default())?;
    raw.0.sync_all()?;
    Ok(image.record().size)
}

/// Whether the files of `dir` are in memory anyway.
pub(super) fn in_memory(dir: &Path) -> Result<bool> {
    let kind = statfs_kind(dir).with_context(|| dir.display().to_string())?;
    Ok(kind == Some(TMPFS_MAGIC))
}

/// Free bytes of the file system of `dir`.
pub(super) fn room(dir: &Path) -> Result<u64> {
    let stat = statvfs(dir).with_context(|| dir.display().to_string())?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Drops all regular files in `dirs` from the page cache; the bytes that stayed there all the same, as far as
/// [can be told](can_look).
pub(super) fn drop_cache(dirs: &[&Path]) -> Result<u64> {
    let mut left = 0;
    let look = can_look();
    for dir in dirs {
        each_file(dir, &mut |path| {
            let file = File::open(path)?;
            file.sync_data()?;
            let mut kept = 0;
            // Pages that the kernel is busy with stay the first time.
            for _ in 0..DROPS {
                forget_pages(&file)?;
                kept = if look { cached(path)? } else { 0 };
                if kept == 0 {
                    break;
                }
            }
            left += kept;
            Ok(())
        })?;
    }
    Ok(left)
}

/// Reads all regular files in `dirs`, so that they are in the page cache.
pub(super) fn warm_cache(dirs: &[&Path]) -> Result<()> {
    for dir in dirs {
        each_file(dir, &mut |path| io::copy(&mut File::open(path)?, &mut io::sink()).map(drop))?;
    }
    Ok(())
}

/// The size of all regular files in `dir`, or of the file `dir`.
pub(super) fn size(dir: &Path) -> Result<u64> {
    let mut sum = 0;
    each_file(dir, &mut |path| {
        sum += path.metadata()?.len();
        Ok(())
    })?;
    Ok(sum)
}

/// Lets go of the pages of a file that are written.
#[cfg(target_os = "linux")]
fn forget_pages(file: &File) -> io::Result<()> {
    Ok(rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed)?)
}

#[cfg(not(target_os = "linux"))]
fn forget_pages(_: &File) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// The number of the kind of file system, where kinds have numbers that mean something.
#[cfg(target_os = "linux")]
fn statfs_kind(dir: &Path) -> io::Result<Option<u32>> {
    Ok(Some(rustix::fs::statfs(dir)?.f_type as u32))
}

#[cfg(not(target_os = "linux"))]
fn statfs_kind(_: &Path) -> io::Result<Option<u32>> {
    Ok(None)
}

fn each_file(path: &Path, act: &mut dyn FnMut(&Path) -> io::Result<()>) -> Result<()> {
    let kind = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata.file_type(),
        // A VM's run-time files come and go.
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e).with_context(|| path.display().to_string()),
    };
    if kind.is_file() {
        return act(path).with_context(|| path.display().to_string());
    }
    if kind.is_dir() {
        for entry in fs::read_dir(path).with_context(|| path.display().to_string())? {
            each_file(&entry?.path(), act)?;
        }
    }
    Ok(())
}

/// Bytes of a file that are in the page cache. A read that must not wait would tell as well, but starts to read
/// ahead, and so warms what is to be cold.
fn cached(path: &Path) -> io::Result<u64> {
    let output = Command::new(FINCORE).args(["-b", "-n", "-o", "RES"]).arg(path).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.trim().parse().map_err(|_| io::Error::other(format!("{FINCORE} says `{text}`")))
}

/// Whether it can be told what is in the page cache.
pub(super) fn can_look() -> bool {
    Command::new(FINCORE).arg("--version").output().is_ok_and(|output| output.status.success())
}

/// Bytes a second with a sync at the end.
pub(super) struct WriteRates {
    /// To blocks that the file did not have.
    pub(super) fresh: f64,
    /// To the same blocks again.
    pub(super) again: f64,
}

/// Writes a file in `dir` twice, and removes it.
pub(super) fn write_rates(dir: &Path) -> Result<WriteRates> {
    let mut file = tempfile::tempfile_in(dir).with_context(|| dir.display().to_string())?;
    let mut block = vec![0; 1 << 20];
    let mut state = 1_u64;
    for word in block.chunks_exact_mut(8) {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        word.copy_from_slice(&(state ^ state >> 31).to_le_bytes());
    }
    let mut write = || -> io::Result<f64> {
        file.rewind()?;
        let start = Instant::now();
        for _ in 0..TRIAL >> 20 {
            file.write_all(&block)?;
        }
        file.sync_all()?;
        Ok(rate(TRIAL, start.elapsed()))
    };
    Ok(WriteRates { fresh: write()?, again: write()? })
}

/// Bytes a second at which memory can be had that this process did not have. On a virtual machine that gives
/// memory back to its host it may be far below what memory does.
pub(super) fn first_touch_rate() -> f64 {
    let start = Instant::now();
    have_memory(FIRST_TOUCH);
    rate(FIRST_TOUCH, start.elapsed())
}

/// Takes `bytes` of memory and gives them back: whoever comes next finds them at hand. Otherwise on such a virtual
/// machine the first one to need memory pays for it, and the next one does not.
pub(super) fn have_memory(bytes: u64) {
    let mut left = bytes;
    let mut blocks = Vec::new();
    while left > 0 {
        let mut block = vec![0_u8; left.min(1 << 30) as usize];
        for page in block.chunks_mut(4096) {
            page[0] = 1;
        }
        left -= block.len() as u64;
        blocks.push(black_box(block));
    }
}

/// Bytes a second.
fn rate(bytes: u64, took: Duration) -> f64 {
    bytes as f64 / took.as_secs_f64().max(1e-9)
}
