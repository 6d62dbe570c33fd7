//! The part of a block device that carries out requests, wherever it runs.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use squib_formats::persist::{PersistError, Versioned};

use super::{
    BlockState, CheckedBlock, SERIAL_SIZE,
    disk::Disk,
    feature,
    request::{Request, Target},
    worker::{Engine, Rest},
};
use crate::{
    token_bucket::{RateLimiter, RateLimiterState},
    virtio::{
        DriverLink,
        queue::{Chain, QueueFault, VirtQueue},
    },
};

/// Times that the queue is looked at again within one run because the driver went on meanwhile. Only a
/// driver on another vCPU can; it rings for what it offers after that.
const MAX_ROUNDS: u32 = 64;

pub(super) struct BlockEngine {
    id: String,
    disk: Box<dyn Disk>,
    read_only: bool,
    serial: [u8; SERIAL_SIZE],
    limiter: Option<RateLimiter>,
    writeback: Arc<AtomicBool>,
    /// Set by DRIVER_OK.
    link: Option<DriverLink>,
    /// Set by QueueReady.
    queue: Option<VirtQueue>,
    /// Kept between requests for its memory only.
    chain: Chain,
}

impl BlockEngine {
    pub(super) fn new(
        id: String,
        disk: Box<dyn Disk>,
        read_only: bool,
        limiter: Option<RateLimiter>,
        writeback: Arc<AtomicBool>,
    ) -> Self {
        let mut serial = [0; SERIAL_SIZE];
        for (to, from) in serial.iter_mut().zip(id.bytes()) {
            *to = from;
        }
        let (link, queue, chain) = (None, None, Chain::default());
        Self { id, disk, read_only, serial, limiter, writeback, link, queue, chain }
    }

    pub(super) fn link(&mut self, link: Option<DriverLink>) {
        self.link = link;
    }

    pub(super) fn set_queue(&mut self, queue: Option<VirtQueue>) {
        self.queue = queue;
    }

    pub(super) fn queue(&self) -> Option<&VirtQueue> {
        self.queue.as_ref()
    }

    pub(super) fn reset(&mut self) {
        self.link = None;
        self.queue = None;
    }

    pub(super) fn save(&self) -> CheckedBlock {
        // Disk and mode are the machine's, link and queue the transport's part.
        let Self {
            id: _,
            disk: _,
            read_only: _,
            serial,
            limiter,
            writeback,
            link: _,
            queue: _,
            chain: _,
        } = self;
        CheckedBlock {
            serial: *serial,
            writeback: writeback.load(Ordering::Acquire),
            rate_limiter: limiter.as_ref().map(RateLimiter::save),
        }
    }

    pub(super) fn check_limiter(&self, state: &RateLimiterState) -> Result<(), PersistError> {
        self.limiter.as_ref().map_or(Ok(()), |limiter| limiter.check(BlockState::KIND, state))
    }

    pub(super) fn apply(&mut self, checked: CheckedBlock) {
        let CheckedBlock { serial, writeback, rate_limiter } = checked;
        self.serial = serial;
        self.writeback.store(writeback, Ordering::Release);
        if let (Some(limiter), Some(state)) = (&mut self.limiter, rate_limiter) {
            limiter.apply(state);
        }
    }

    fn drain(&mut self, halt: &AtomicBool) -> Result<Rest, QueueFault> {
        let Self { id, disk, read_only, serial, limiter, writeback, link, queue, chain } = self;
        let (Some(link), Some(queue)) = (link, queue) else { return Ok(Rest::Idle) };
        let DriverLink { features, ram, signals } = link;
        if signals.failed() {
            return Ok(Rest::Idle);
        }
        for _ in 0..MAX_ROUNDS {
            for _ in 0..queue.size() {
                if halt.load(Ordering::Relaxed) {
                    return Ok(Rest::Halted);
                }
                if !queue.pop(ram, chain)? {
                    break;
                }
                let request = Request::parse(chain, ram)?;
                if let Some(limiter) = limiter
                    && let Err(wait) = limiter.take(request.cost())
                {
                    queue.undo_pop();
                    return Ok(Rest::Throttled(wait));
                }
                let target = Target {
                    id,
                    disk: &**disk,
                    ram,
                    serial,
                    read_only: *read_only,
                    write_through: !write_back(*features, writeback),
                };
                let written = request.execute(chain, &target)?;
                if queue.complete(ram, chain.head, written)? {
                    signals.used();
                }
            }
            if !queue.rearm(ram)? {
                queue.notified = false;
                return Ok(Rest::Idle);
            }
        }
        Ok(Rest::Halted)
    }
}

impl Engine for BlockEngine {
    fn ring(&mut self) {
        if let (Some(queue), Some(_)) = (&mut self.queue, &self.link) {
            queue.notified = true;
        }
    }

    fn has_work(&self) -> bool {
        self.link.is_some() && self.queue.as_ref().is_some_and(|queue| queue.notified)
    }

    fn run(&mut self, halt: &AtomicBool) -> Rest {
        let fault = match self.drain(halt) {
            Ok(Rest::Idle) => None,
            Ok(rest) => return rest,
            Err(fault) => Some(fault),
        };
        if let (Some(fault), Some(link)) = (fault, &self.link) {
            tracing::warn!(device = self.id, "the driver broke the queue: {fault}");
            link.signals.fail(true);
        }
        // A device that waits for its reset has nothing more to do either.
        if let Some(queue) = &mut self.queue {
            queue.notified = false;
        }
        Rest::Idle
    }

    fn resumed(&mut self) {
        if let Some(limiter) = &mut self.limiter {
            limiter.resume();
        }
    }
}

/// 5.2.6.2: `writeback` rules if the driver accepted CONFIG_WCE; else the cache is write-back for a
/// driver that flushes, write-through for one that does not know how.
fn write_back(features: u64, writeback: &AtomicBool) -> bool {
    if features & feature::CONFIG_WCE != 0 {
        writeback.load(Ordering::Acquire)
    } else {
        features & feature::FLUSH != 0
    }
}
