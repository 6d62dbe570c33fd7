//! The block device (5.2): a raw file or host block device behind one queue.

mod disk;
mod engine;
mod request;
#[cfg(test)]
mod tests;
mod tracked;
mod worker;

use std::{
    io,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use parking_lot::Mutex;
use squib_formats::persist::{PersistError, Versioned};

pub use disk::{Disk, FileDisk, SizeOnly};
use engine::BlockEngine;
pub use state::BlockState;
pub use tracked::{DiskGranules, GRANULE_SHIFT, TrackedDisk};
use worker::{NotHome, Runner, Worker};

use super::{DriverLink, VirtioDevice, queue::VirtQueue, state::TransportState};
use crate::{
    clock::Clock,
    device::PauseError,
    token_bucket::{BucketError, RateLimiter, RateLimiterConfig, RateLimiterState},
};

/// Bytes of a sector, whatever the disk's own block size is (5.2.4).
pub const SECTOR_SIZE: u64 = 512;
/// Bytes of the answer to a get-id request (5.2.6).
pub const SERIAL_SIZE: usize = 20;
/// Entries of the queue.
pub const QUEUE_SIZE: u16 = 256;
/// Most data descriptors of a request: the queue's entries without header and status.
pub const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Most sectors of one discarded range: 2 GiB.
pub const MAX_DISCARD_SECTORS: u32 = 1 << 22;
/// Most ranges of a discard request.
pub const MAX_DISCARD_SEGMENTS: u32 = 16;
/// Most sectors of one zeroed range, 64 MiB, since zeros may have to be written out.
pub const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 17;
/// Most ranges of a write-zeroes request.
pub const MAX_WRITE_ZEROES_SEGMENTS: u32 = 1;

const _: () = assert!(MAX_WRITE_ZEROES_SEGMENTS <= MAX_DISCARD_SEGMENTS);

/// Feature bits (5.2.3).
pub mod feature {
    use virtio_bindings::virtio_blk as spec;

    /// `seg_max` is valid.
    pub const SEG_MAX: u64 = 1 << spec::VIRTIO_BLK_F_SEG_MAX;
    /// The disk is read-only.
    pub const RO: u64 = 1 << spec::VIRTIO_BLK_F_RO;
    /// `blk_size` is valid.
    pub const BLK_SIZE: u64 = 1 << spec::VIRTIO_BLK_F_BLK_SIZE;
    /// Flush requests.
    pub const FLUSH: u64 = 1 << spec::VIRTIO_BLK_F_FLUSH;
    /// `topology` is valid.
    pub const TOPOLOGY: u64 = 1 << spec::VIRTIO_BLK_F_TOPOLOGY;
    /// `writeback` is valid and can be written.
    pub const CONFIG_WCE: u64 = 1 << spec::VIRTIO_BLK_F_CONFIG_WCE;
    /// Discard requests.
    pub const DISCARD: u64 = 1 << spec::VIRTIO_BLK_F_DISCARD;
    /// Write-zeroes requests.
    pub const WRITE_ZEROES: u64 = 1 << spec::VIRTIO_BLK_F_WRITE_ZEROES;
}

/// Where `writeback` lies in the configuration space (5.2.4).
const CONFIG_WRITEBACK: usize = 32;
/// Bytes of the configuration space up to `unused1` (5.2.4).
const CONFIG_SIZE: usize = 60;

/// A block device as the machine's configuration describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockConfig {
    /// The device's id; its first 20 bytes are the serial number that the guest sees.
    pub id: String,
    /// Raw image file or host block device.
    pub path: PathBuf,
    /// The guest cannot write.
    pub read_only: bool,
    /// Limits of bytes and requests.
    pub rate_limiter: Option<RateLimiterConfig>,
}

/// Where requests are carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Execution {
    /// On a thread of the device's own.
    Worker,
    /// Inside the guest's doorbell write, complete when that returns: for a deterministic machine.
    Inline,
}

/// Why a block device cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The file is missing, or may not be opened that way.
    #[error("disk {}: {source}", path.display())]
    Open {
        /// The disk.
        path: PathBuf,
        /// What the host says.
        source: io::Error,
    },
    /// A directory, socket or the like.
    #[error("disk {}: neither a regular file nor a block device", path.display())]
    NotADisk {
        /// The disk.
        path: PathBuf,
    },
    /// Somebody else holds the lock.
    #[error("disk {}: in use by another VM", path.display())]
    InUse {
        /// The disk.
        path: PathBuf,
    },
    /// The file system cannot lock.
    #[error("disk {}: cannot be locked: {source}", path.display())]
    Lock {
        /// The disk.
        path: PathBuf,
        /// What the host says.
        source: io::Error,
    },
    /// Not a whole number of sectors, or none.
    #[error("disk {}: its size of {size} bytes is not a positive multiple of 512", path.display())]
    Size {
        /// The disk.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// A rate limit that cannot work.
    #[error("disk {id}: {source}")]
    RateLimit {
        /// The device's id.
        id: String,
        /// What is wrong with it.
        source: BucketError,
    },
    /// Rate limits follow the host's time, which a deterministic machine does not see.
    #[error("disk {id}: rate limits are not supported on a deterministic machine")]
    RateLimitInline {
        /// The device's id.
        id: String,
    },
    /// The worker thread cannot be started.
    #[error("disk {id}: cannot start a worker thread: {source}")]
    Worker {
        /// The device's id.
        id: String,
        /// What the host says.
        source: io::Error,
    },
}

/// A block device.
pub struct Block {
    id: String,
    read_only: bool,
    sectors: u64,
    limited: bool,
    /// `writeback`, shared with the engine so that the guest can read it while a request is carried out.
    writeback: Arc<AtomicBool>,
    runner: Runner<BlockEngine>,
}

impl Block {
    /// Opens and locks the disk of `config`. `clock` drives the rate limits.
    pub fn open(
        config: &BlockConfig,
        execution: Execution,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, BlockError> {
        let disk = FileDisk::open(&config.path, config.read_only)?;
        Self::with_disk(config, Box::new(disk), execution, clock)
    }

    /// A device on a `disk` that is open already; the path in `config` is not used.
    pub fn with_disk(
        config: &BlockConfig,
        disk: Box<dyn Disk>,
        execution: Execution,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, BlockError> {
        let BlockConfig { id, path: _, read_only, rate_limiter } = config;
        if rate_limiter.is_some() && execution == Execution::Inline {
            return Err(BlockError::RateLimitInline { id: id.clone() });
        }
        let limiter = rate_limiter
            .map(|limits| RateLimiter::new(&limits, &clock))
            .transpose()
            .map_err(|source| BlockError::RateLimit { id: id.clone(), source })?;
        let limited = limiter.is_some();
        let sectors = disk.size() / SECTOR_SIZE;
        let writeback = Arc::new(AtomicBool::new(true));
        let engine = BlockEngine::new(id.clone(), disk, *read_only, limiter, writeback.clone());
        let runner = match execution {
            Execution::Inline => Runner::Inline(Mutex::new(engine)),
            Execution::Worker => {
                // A thread's name holds no zero bytes, and the host shows 15 of them.
                let name = id.chars().filter(char::is_ascii_graphic).take(11).collect::<String>();
                let worker = Worker::spawn(format!("blk-{name}"), engine);
                let id = || id.clone();
                Runner::Worker(worker.map_err(|source| BlockError::Worker { id: id(), source })?)
            }
        };
        Ok(Self { id: id.clone(), read_only: *read_only, sectors, limited, writeback, runner })
    }

    /// Size of the disk in sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    fn config_space(&self) -> [u8; CONFIG_SIZE] {
        let mut space = [0; CONFIG_SIZE];
        let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.sectors.to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &(SECTOR_SIZE as u32).to_le_bytes());
        // Topology: physical blocks of 2^3 sectors, aligned; I/O of one sector at least.
        put(24, &[3, 0]);
        put(26, &1u16.to_le_bytes());
        put(CONFIG_WRITEBACK, &[self.writeback.load(Ordering::Acquire).into()]);
        if !self.read_only {
            put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
            put(40, &MAX_DISCARD_SEGMENTS.to_le_bytes());
            // discard_sector_alignment: a block of most file systems.
            put(44, &8u32.to_le_bytes());
            put(48, &MAX_WRITE_ZEROES_SECTORS.to_le_bytes());
            put(52, &MAX_WRITE_ZEROES_SEGMENTS.to_le_bytes());
            // write_zeroes_may_unmap
            put(56, &[1]);
        }
        space
    }

    fn save_error(&self) -> PersistError {
        PersistError::Save {
            kind: BlockState::KIND,
            why: format!("{}: its worker has ended", self.id),
        }
    }
}

impl VirtioDevice for Block {
    const DEVICE_TYPE: u32 = 2;
    const QUEUE_MAX_SIZES: &'static [u16] = &[QUEUE_SIZE];
    type State = BlockState;
    type Checked = CheckedBlock;

    fn id(&self) -> &str {
        &self.id
    }

    fn offered_features(&self) -> u64 {
        use feature::{BLK_SIZE, CONFIG_WCE, DISCARD, FLUSH, RO, SEG_MAX, TOPOLOGY, WRITE_ZEROES};
        let mode = if self.read_only { RO } else { CONFIG_WCE | DISCARD | WRITE_ZEROES };
        SEG_MAX | BLK_SIZE | FLUSH | TOPOLOGY | mode
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let space = self.config_space();
        let tail = usize::try_from(offset).ok().and_then(|offset| space.get(offset..));
        for (to, from) in data.iter_mut().zip(tail.unwrap_or_default()) {
            *to = *from;
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if offset == CONFIG_WRITEBACK as u64
            && !self.read_only
            && let [value @ (0 | 1)] = data
        {
            self.writeback.store(*value == 1, Ordering::Release);
        }
    }

    fn activate(&mut self, link: DriverLink) {
        // A worker that has ended serves nobody; pause and save say so.
        let _ = self.runner.with(|engine| engine.link(Some(link)));
    }

    fn set_queue(&mut self, _index: usize, queue: Option<VirtQueue>) {
        let _ = self.runner.with(|engine| engine.set_queue(queue));
    }

    fn inspect_queue<R>(&self, _index: usize, look: impl FnOnce(&VirtQueue) -> R) -> Option<R> {
        self.runner.with(|engine| engine.queue().map(look)).ok().flatten()
    }

    fn notify(&mut self, _index: usize) {
        self.runner.ring();
    }

    fn reset(&mut self) {
        let _ = self.runner.with(BlockEngine::reset);
        self.writeback.store(true, Ordering::Release);
    }

    fn pause(&mut self, deadline: Instant) -> Result<(), PauseError> {
        self.runner.pause(Some(deadline)).map_err(|why| match why {
            // The worker carries out one request at a time.
            NotHome::Deadline => PauseError::Deadline { device: self.id.clone(), in_flight: 1 },
            NotHome::WorkerGone => PauseError::WorkerGone { device: self.id.clone() },
        })
    }

    fn resume(&mut self) {
        self.runner.resume();
    }

    fn save(&self, transport: TransportState) -> Result<BlockState, PersistError> {
        // The cache mode is shared with the engine, which saves it.
        let Self { id: _, read_only, sectors, limited: _, writeback: _, runner } = self;
        let (sectors, read_only) = (*sectors, *read_only);
        let part = runner.with(|engine| engine.save()).map_err(|_| self.save_error())?;
        let CheckedBlock { serial, writeback, rate_limiter } = part;
        Ok(BlockState { transport, sectors, read_only, serial, writeback, rate_limiter })
    }

    fn check(&self, state: BlockState) -> Result<(TransportState, CheckedBlock), PersistError> {
        let invalid = |field, why| Err(PersistError::invalid(BlockState::KIND, field, why));
        let BlockState { transport, sectors, read_only, serial, writeback, rate_limiter } = state;
        if sectors != self.sectors {
            let why =
                format!("the snapshot's disk has {sectors} sectors, this one {}", self.sectors);
            return invalid("sectors", why);
        }
        let offered_read_only = transport.device_features & feature::RO != 0;
        if read_only != self.read_only || offered_read_only != read_only {
            let why = format!(
                "{read_only} in the snapshot ({offered_read_only} in the features), {} here",
                self.read_only
            );
            return invalid("read_only", why);
        }
        if read_only && !writeback {
            return invalid("writeback", "a read-only disk has no other cache mode".to_owned());
        }
        match (&rate_limiter, self.limited) {
            (Some(state), true) => self
                .runner
                .with(|engine| engine.check_limiter(state))
                .map_err(|_| self.save_error())??,
            (None, false) => {}
            (saved, _) => {
                let here = self.limited;
                let why = format!("{} in the snapshot, {here} here", saved.is_some());
                return invalid("rate_limiter", why);
            }
        }
        Ok((transport, CheckedBlock { serial, writeback, rate_limiter }))
    }

    fn apply(&mut self, checked: CheckedBlock) {
        // What was notified before the snapshot waits for `resume`: the guest's memory may come later.
        let _ = self.runner.pause(None);
        let _ = self.runner.with(|engine| engine.apply(checked));
    }
}

/// The device's own part of a checked state.
pub struct CheckedBlock {
    serial: [u8; SERIAL_SIZE],
    writeback: bool,
    rate_limiter: Option<RateLimiterState>,
}

mod state {
    use serde::{Deserialize, Serialize};
    use squib_formats::first_version;

    use super::SERIAL_SIZE;
    use crate::{token_bucket::RateLimiterState, virtio::state::TransportState};

    /// A block device and its transport.
    #[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
    pub struct BlockState {
        /// The registers.
        pub transport: TransportState,
        /// `capacity`, in sectors of 512 bytes.
        pub sectors: u64,
        /// `VIRTIO_BLK_F_RO` is offered.
        pub read_only: bool,
        /// The answer to get-id.
        pub serial: [u8; SERIAL_SIZE],
        /// `writeback`.
        pub writeback: bool,
        /// The rate limiter, if there is one.
        pub rate_limiter: Option<RateLimiterState>,
    }

    first_version!(BlockState, "virtio-blk");
}
