//! What the block device's tests share: disks and a driver for requests.

mod life;
mod requests;
mod tracked;

use std::{
    fs::File,
    io::Write,
    os::unix::fs::FileExt,
    sync::{
        Condvar, Mutex as StdMutex,
        atomic::{AtomicU64, AtomicUsize},
    },
    time::Duration,
};

use proptest::prelude::*;
use squib_formats::persist::{Persist, restore_section, save_section};
use vm_memory::VolatileSlice;

use super::*;
use crate::{
    device::{MmioDevice, Pause},
    memory::GuestRam,
    token_bucket::BucketConfig,
    virtio::{
        mmio::VirtioMmio,
        test_driver::{BUFFERS, Desc, Driver, ManualClock, RAM_SIZE, WRITE, line},
    },
};

/// All features.
const ALL: u64 = u64::MAX;
const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 0x100;
const DATA: u64 = BUFFERS + 0x1000;
const DISK_SIZE: usize = 256 << 10;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 7 + at / 512) as u8).collect()
}

/// A disk image in the folder, filled with a pattern.
fn image(dir: &tempfile::TempDir) -> PathBuf {
    let path = dir.path().join("disk.img");
    File::create(&path).unwrap().write_all(&pattern(DISK_SIZE)).unwrap();
    path
}

fn config(path: PathBuf) -> BlockConfig {
    BlockConfig { id: "root".into(), path, read_only: false, rate_limiter: None }
}

fn open(config: &BlockConfig, execution: Execution) -> Block {
    Block::open(config, execution, ManualClock::new(0, 0)).unwrap()
}

/// A disk in memory, whose clones share it.
#[derive(Clone)]
struct MemDisk {
    bytes: Arc<StdMutex<Vec<u8>>>,
    flushes: Arc<AtomicUsize>,
    /// Reads wait while this is closed.
    gate: Arc<Gate>,
    /// Reads and writes end with this error.
    error: Option<i32>,
    panics: bool,
}

#[derive(Default)]
struct Gate {
    closed: StdMutex<bool>,
    changed: Condvar,
    waiting: AtomicU64,
}

impl Gate {
    fn set(&self, closed: bool) {
        *self.closed.lock().unwrap() = closed;
        self.changed.notify_all();
    }

    fn pass(&self) {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let open = self.changed.wait_while(self.closed.lock().unwrap(), |closed| *closed);
        drop(open.unwrap());
        self.waiting.fetch_sub(1, Ordering::SeqCst);
    }

    fn wait_for_a_visitor(&self) {
        while self.waiting.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
    }
}

impl MemDisk {
    fn new() -> Self {
        Self {
            bytes: Arc::new(StdMutex::new(pattern(DISK_SIZE))),
            flushes: Arc::default(),
            gate: Arc::default(),
            error: None,
            panics: false,
        }
    }

    fn copy(&self) -> Self {
        let bytes = Arc::new(StdMutex::new(self.bytes.lock().unwrap().clone()));
        Self { bytes, ..Self::new() }
    }

    fn device(&self, execution: Execution) -> Block {
        self.limited(execution, None, ManualClock::new(0, 1 << 60))
    }

    fn limited(
        &self,
        execution: Execution,
        rate_limiter: Option<RateLimiterConfig>,
        clock: Arc<ManualClock>,
    ) -> Block {
        let config = BlockConfig { rate_limiter, ..config(PathBuf::new()) };
        Block::with_disk(&config, Box::new(self.clone()), execution, clock).unwrap()
    }

    fn ready(&self) -> io::Result<()> {
        self.gate.pass();
        assert!(!self.panics, "this disk panics");
        self.error.map_or(Ok(()), |error| Err(io::Error::from_raw_os_error(error)))
    }
}

impl Disk for MemDisk {
    fn size(&self) -> u64 {
        DISK_SIZE as u64
    }

    fn read_at(&self, offset: u64, into: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.ready()?;
        let mut at = offset as usize;
        for slice in into {
            slice.copy_from(&self.bytes.lock().unwrap()[at..at + slice.len()]);
            at += slice.len();
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, from: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.ready()?;
        let mut at = offset as usize;
        for slice in from {
            slice.copy_to(&mut self.bytes.lock().unwrap()[at..at + slice.len()]);
            at += slice.len();
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.write_zeroes(offset, len, true)
    }

    fn write_zeroes(&self, offset: u64, len: u64, _may_unmap: bool) -> io::Result<()> {
        self.bytes.lock().unwrap()[offset as usize..][..len as usize].fill(0);
        Ok(())
    }
}

type BlockDriver = Driver<Block>;

impl BlockDriver {
    fn header(&self, kind: u32, sector: u64) {
        self.put(HEADER, &kind.to_le_bytes());
        self.put(HEADER + 4, &[0; 4]);
        self.put(HEADER + 8, &sector.to_le_bytes());
        self.put(STATUS, &[0xaa]);
    }

    /// The chain of a request with `len` bytes at `DATA`.
    fn prepare(&mut self, kind: u32, sector: u64, len: u32) -> u16 {
        self.header(kind, sector);
        let flags = if matches!(kind, IN | GET_ID) { WRITE } else { 0 };
        let mut descs = vec![(HEADER, 16, 0), (DATA, len, flags), (STATUS, 1, WRITE)];
        if len == 0 {
            descs.remove(1);
        }
        self.chain(&descs)
    }

    fn status(&self) -> u8 {
        self.get::<1>(STATUS)[0]
    }

    /// One request with `len` bytes at `DATA`; gives status and bytes written.
    fn request(&mut self, kind: u32, sector: u64, len: u32) -> (u8, u32) {
        let head = self.prepare(kind, sector, len);
        let written = self.submit(head);
        (self.status(), written)
    }

    /// A discard or write-zeroes of `(sector, sectors, flags)`; gives the status.
    fn ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        for (at, (sector, sectors, flags)) in ranges.iter().enumerate() {
            let at = DATA + 16 * at as u64;
            self.put(at, &sector.to_le_bytes());
            self.put(at + 8, &sectors.to_le_bytes());
            self.put(at + 12, &flags.to_le_bytes());
        }
        self.request(kind, 0, 16 * ranges.len() as u32).0
    }
}
