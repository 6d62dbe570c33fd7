//! Files: raw images of memory, the page cache, and how fast storage and memory are.

use std::{
    fs::{self, File},
    hint::black_box,
    io::{self, IoSliceMut, Seek, Write},
    os::unix::fs::FileExt,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use rustix::{
    fs::{Advice, fadvise, statfs, statvfs},
    io::{Errno, ReadWriteFlags, preadv2},
};
use squib_formats::{
    image::{Control, ImageReader, Sink},
    manifest::MEMORY_IMAGE,
    snapshot_dir::Snapshot,
};

const TMPFS_MAGIC: u32 = 0x0102_1994;
/// How much of a file is asked about at a time whether it is cached.
const LOOK: u64 = 1 << 20;
/// Bytes that [`write_rates`] writes.
const TRIAL: u64 = 256 << 20;
/// Bytes that [`first_touch_rate`] takes.
const FIRST_TOUCH: usize = 512 << 20;

/// Writes the memory of a snapshot into a raw file.
pub(super) fn raw_memory(snapshot: &Path, file: &Path) -> Result<u64> {
    struct Raw(File);
    impl Sink for Raw {
        fn is_zero(&self, _: u64, _: usize) -> bool {
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
    Ok(statfs(dir).with_context(|| dir.display().to_string())?.f_type as u32 == TMPFS_MAGIC)
}

/// Free bytes of the file system of `dir`.
pub(super) fn room(dir: &Path) -> Result<u64> {
    let stat = statvfs(dir).with_context(|| dir.display().to_string())?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Drops all regular files in `dirs` from the page cache; the bytes that stayed there all the same.
pub(super) fn drop_cache(dirs: &[&Path]) -> Result<u64> {
    let mut left = 0;
    for dir in dirs {
        each_file(dir, &mut |path| {
            let file = File::open(path)?;
            file.sync_data()?;
            fadvise(&file, 0, None, Advice::DontNeed)?;
            left += cached(&file)?;
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

/// About how many bytes of `file` a read would find in the page cache: one byte of each [`LOOK`] is tried.
fn cached(file: &File) -> io::Result<u64> {
    let length = file.metadata()?.len();
    let mut found = 0;
    for at in (0..length).step_by(LOOK as usize) {
        let mut byte = [0];
        let read = preadv2(file, &mut [IoSliceMut::new(&mut byte)], at, ReadWriteFlags::NOWAIT);
        match read {
            Ok(_) => found += LOOK.min(length - at),
            Err(Errno::AGAIN) => {}
            // The file system cannot tell.
            Err(Errno::OPNOTSUPP) => return Ok(length),
            Err(e) => return Err(e.into()),
        }
    }
    Ok(found)
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
/// memory back to its host it may be far below what memory does, and changes with what ran before.
pub(super) fn first_touch_rate() -> f64 {
    let start = Instant::now();
    let mut memory = vec![0_u8; FIRST_TOUCH];
    for page in memory.chunks_mut(4096) {
        page[0] = 1;
    }
    black_box(&memory);
    rate(FIRST_TOUCH as u64, start.elapsed())
}

/// Bytes a second.
fn rate(bytes: u64, took: Duration) -> f64 {
    bytes as f64 / took.as_secs_f64().max(1e-9)
}
