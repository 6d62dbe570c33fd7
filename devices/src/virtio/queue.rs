//! Split virtqueues (2.7): where a driver put one, the chains it offers, and their return.

use std::sync::atomic::{Ordering, fence};

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, VolatileSlice};

use crate::memory::GuestRam;

/// Most descriptors of one chain, those of an indirect table included. More than any queue size here;
/// bounds the work of one request.
pub const MAX_SEGMENTS: usize = 1024;

/// `VIRTQ_AVAIL_F_NO_INTERRUPT` (2.7.6).
const AVAIL_F_NO_INTERRUPT: u16 = 1;

/// A queue's registers as the driver wrote them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueSetup {
    /// `QueueNum`: entries, a power of two.
    pub num: u16,
    /// `QueueDesc`: address of the descriptor table.
    pub desc: u64,
    /// `QueueDriver`: address of the available ring.
    pub driver: u64,
    /// `QueueDevice`: address of the used ring.
    pub device: u64,
}

/// A queue that cannot be used as the driver set it up.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SetupError {
    /// The size is zero, not a power of two, or above the device's maximum.
    #[error("a queue size of {num} is not a power of two from 1 to {max}")]
    Size {
        /// Size asked for.
        num: u16,
        /// Largest size.
        max: u16,
    },
    /// A ring is not aligned as 2.7 demands.
    #[error("the {ring} at {address:#x} is not aligned to {align} bytes")]
    Align {
        /// Which of the three.
        ring: &'static str,
        /// Its address.
        address: u64,
        /// Alignment demanded.
        align: u64,
    },
    /// A ring does not lie in RAM.
    #[error("the {ring} at {address:#x}, {size} bytes, is not inside RAM")]
    OutsideRam {
        /// Which of the three.
        ring: &'static str,
        /// Its address.
        address: u64,
        /// Its size.
        size: u64,
    },
}

impl QueueSetup {
    /// The registers after a reset.
    pub fn reset(max: u16) -> Self {
        Self { num: max, desc: 0, driver: 0, device: 0 }
    }

    /// Checks size, alignment and place of the three rings.
    pub fn check(&self, max: u16, ram: &GuestRam) -> Result<(), SetupError> {
        let Self { num, desc, driver, device } = *self;
        if !num.is_power_of_two() || num > max {
            return Err(SetupError::Size { num, max });
        }
        let num = u64::from(num);
        // Sizes and alignments: table in 2.7; the rings with their event field.
        for (ring, address, align, size) in [
            ("descriptor table", desc, 16, 16 * num),
            ("available ring", driver, 2, 6 + 2 * num),
            ("used ring", device, 4, 6 + 8 * num),
        ] {
            if address % align != 0 {
                return Err(SetupError::Align { ring, address, align });
            }
            let inside = address >= ram.base()
                && address.checked_add(size).is_some_and(|end| end <= ram.base() + ram.size());
            if !inside {
                return Err(SetupError::OutsideRam { ring, address, size });
            }
        }
        Ok(())
    }
}

/// How far the device has come in a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Index of the next chain to take from the available ring.
    pub next_avail: u16,
    /// Index of the next entry to fill in the used ring.
    pub next_used: u16,
    /// The doorbell was rung, and not everything that was offered then has been looked at.
    pub notified: bool,
}

/// Why a queue cannot be served any further.
#[derive(Debug, thiserror::Error)]
pub enum QueueFault {
    /// The available ring claims more chains than the queue has entries, or memory is gone.
    #[error("the rings cannot be used: {0}")]
    Rings(#[from] virtio_queue::Error),
    /// A chain loops, is empty, leaves its table, or is too long.
    #[error("the descriptor chain at {head} {why}")]
    Chain {
        /// Index of its first descriptor.
        head: u16,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The device cannot read or write where it must.
    #[error("guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
}

/// A queue in use.
#[derive(Debug)]
pub struct VirtQueue {
    queue: Queue,
    /// See [`Progress::notified`].
    pub notified: bool,
}

impl VirtQueue {
    /// The queue at `setup`, which continues at `progress`; [`SetupError`] as [`QueueSetup::check`].
    pub fn new(
        setup: &QueueSetup,
        max: u16,
        event_idx: bool,
        progress: Progress,
        ram: &GuestRam,
    ) -> Result<Self, SetupError> {
        setup.check(max, ram)?;
        let size = |_| SetupError::Size { num: setup.num, max };
        let mut queue = Queue::new(max).map_err(size)?;
        queue.try_set_size(setup.num).map_err(size)?;
        queue.set_desc_table_address(Some(setup.desc as u32), Some((setup.desc >> 32) as u32));
        queue.set_avail_ring_address(Some(setup.driver as u32), Some((setup.driver >> 32) as u32));
        queue.set_used_ring_address(Some(setup.device as u32), Some((setup.device >> 32) as u32));
        queue.set_event_idx(event_idx);
        queue.set_next_avail(progress.next_avail);
        queue.set_next_used(progress.next_used);
        queue.set_ready(true);
        Ok(Self { queue, notified: progress.notified })
    }

    /// How far the device has come. Between requests this is the whole state of the queue: the
    /// library's count of used entries since the last interrupt is zero after every
    /// [`complete`](Self::complete).
    pub fn progress(&self) -> Progress {
        let Self { queue, notified } = self;
        Progress {
            next_avail: queue.next_avail(),
            next_used: queue.next_used(),
            notified: *notified,
        }
    }

    /// Entries of the queue.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Takes the next chain into `chain`; false if the driver offers none.
    pub fn pop(&mut self, ram: &GuestRam, chain: &mut Chain) -> Result<bool, QueueFault> {
        let Some(descriptors) = self.queue.iter(ram)?.next() else { return Ok(false) };
        chain.clear(descriptors.head_index());
        let head = chain.head;
        let fault = |why| Err(QueueFault::Chain { head, why });
        // The library ends a chain silently where it is broken; a whole one ends with a descriptor
        // that has no successor.
        let mut ended = false;
        for descriptor in descriptors {
            if chain.readable.0.len() + chain.writable.0.len() == MAX_SEGMENTS {
                return fault("has too many descriptors");
            }
            let segment = Segment { addr: descriptor.addr(), len: descriptor.len() };
            if descriptor.is_write_only() {
                chain.writable.0.push(segment);
            } else if chain.writable.0.is_empty() {
                chain.readable.0.push(segment);
            } else {
                return fault("has a readable descriptor behind a writable one");
            }
            ended = !descriptor.has_next();
        }
        if ended { Ok(true) } else { fault("is empty, loops, or leaves its table") }
    }

    /// Offers the chain that was popped last again.
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Returns a chain into which `written` bytes were written. True if the driver wants an interrupt.
    pub fn complete(
        &mut self,
        ram: &GuestRam,
        head: u16,
        written: u32,
    ) -> Result<bool, QueueFault> {
        self.queue.add_used(ram, head, written)?;
        if self.queue.event_idx_enabled() {
            return Ok(self.queue.needs_notification(ram)?);
        }
        // The entry must be visible before the flag is read, or a driver that polls with interrupts
        // off, turns them on and looks once more could sleep for ever.
        fence(Ordering::SeqCst);
        let flags: u16 = ram.load(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed)?;
        Ok(u16::from_le(flags) & AVAIL_F_NO_INTERRUPT == 0)
    }

    /// Asks the driver to ring for its next chain. True if it has offered one already.
    pub fn rearm(&mut self, ram: &GuestRam) -> Result<bool, QueueFault> {
        Ok(self.queue.enable_notification(ram)?)
    }
}

/// A piece of guest memory that a descriptor names.
#[derive(Clone, Copy, Debug)]
struct Segment {
    addr: GuestAddress,
    len: u32,
}

/// The buffers of one chain. Kept by the device from one request to the next, so that taking a chain
/// does not allocate.
#[derive(Debug, Default)]
pub struct Chain {
    /// Index of the first descriptor.
    pub head: u16,
    /// What the driver sent.
    pub readable: Buffers,
    /// Where the device answers.
    pub writable: Buffers,
}

impl Chain {
    fn clear(&mut self, head: u16) {
        self.head = head;
        self.readable.0.clear();
        self.writable.0.clear();
    }
}

/// Pieces of guest memory in sequence, seen as one run of bytes (2.7.4: the device makes no
/// assumption about how a message is divided).
#[derive(Debug, Default)]
pub struct Buffers(Vec<Segment>);

impl Buffers {
    /// Bytes in all; below 2^32 (2.7.5).
    pub fn len(&self) -> u64 {
        self.0.iter().map(|segment| u64::from(segment.len)).sum()
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies the bytes from `offset` on into `into`.
    pub fn read(
        &self,
        ram: &GuestRam,
        offset: u64,
        into: &mut [u8],
    ) -> Result<(), GuestMemoryError> {
        let mut done = 0;
        for segment in self.part(offset, into.len() as u64) {
            let len = segment.len as usize;
            ram.read_slice(&mut into[done..done + len], segment.addr)?;
            done += len;
        }
        complete(done, into.len())
    }

    /// Copies `from` to the bytes from `offset` on.
    pub fn write(&self, ram: &GuestRam, offset: u64, from: &[u8]) -> Result<(), GuestMemoryError> {
        let mut done = 0;
        for segment in self.part(offset, from.len() as u64) {
            let len = segment.len as usize;
            ram.write_slice(&from[done..done + len], segment.addr)?;
            done += len;
        }
        complete(done, from.len())
    }

    /// The host's view of the `len` bytes from `offset` on, handed to `each` piece by piece.
    pub fn slices<'ram, E: From<GuestMemoryError>>(
        &self,
        ram: &'ram GuestRam,
        offset: u64,
        len: u64,
        mut each: impl FnMut(VolatileSlice<'ram>) -> Result<(), E>,
    ) -> Result<(), E> {
        for segment in self.part(offset, len) {
            each(ram.get_slice(segment.addr, segment.len as usize)?)?;
        }
        Ok(())
    }

    /// The segments that cover `len` bytes from `offset` on, cut to them; without empty ones.
    fn part(&self, offset: u64, len: u64) -> impl Iterator<Item = Segment> {
        let end = offset.saturating_add(len);
        let mut at = 0u64;
        self.0.iter().filter_map(move |segment| {
            let (from, to) = (at, at + u64::from(segment.len));
            at = to;
            let (first, last) = (from.max(offset), to.min(end));
            if first >= last {
                return None;
            }
            // An address that wraps is outside RAM either way.
            let addr = GuestAddress(segment.addr.0.wrapping_add(first - from));
            Some(Segment { addr, len: (last - first) as u32 })
        })
    }
}

fn complete(done: usize, expected: usize) -> Result<(), GuestMemoryError> {
    if done == expected {
        Ok(())
    } else {
        Err(GuestMemoryError::PartialBuffer { expected, completed: done })
    }
}
