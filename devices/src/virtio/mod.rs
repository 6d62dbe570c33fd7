//! virtio devices behind the virtio-mmio transport (virtio 1.2).
//!
//! A device implements [`VirtioDevice`]; [`VirtioMmio`](mmio::VirtioMmio) puts the registers in front
//! of it, and the pair is what a machine holds, saved as one section:
//!
//! ```no_run
//! # use std::sync::Arc;
//! # use parking_lot::Mutex;
//! # use squib_devices::{clock::HostClock, device::MachineDevice, irq::IrqLine, memory::GuestRam};
//! use squib_devices::virtio::{block::{Block, BlockConfig, Execution}, mmio::VirtioMmio};
//! # fn build(ram: GuestRam, line: IrqLine) -> Result<(), Box<dyn std::error::Error>> {
//! let config =
//!     BlockConfig { id: "root".into(), path: "disk.img".into(), read_only: false, rate_limiter: None };
//! let block = Block::open(&config, Execution::Worker, Arc::new(HostClock::new()))?;
//! let device: Arc<dyn MachineDevice> = Arc::new(Mutex::new(VirtioMmio::new(block, ram, line)));
//! # Ok(()) }
//! ```

pub mod block;
pub mod mmio;
pub mod queue;
pub mod rng;
pub mod state;

#[cfg(test)]
pub(crate) mod test_driver;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Instant,
};

use squib_formats::persist::{PersistError, Versioned};
use virtio_bindings::{virtio_config, virtio_ring};

use crate::{device::PauseError, irq::IrqLine, memory::GuestRam};
use queue::VirtQueue;
use state::TransportState;

/// `VIRTIO_F_VERSION_1` (6): the device follows virtio 1.0 or later.
pub const VIRTIO_F_VERSION_1: u64 = 1 << virtio_config::VIRTIO_F_VERSION_1;
/// `VIRTIO_F_INDIRECT_DESC` (6): chains may lie in tables of their own.
pub const VIRTIO_F_INDIRECT_DESC: u64 = 1 << virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
/// `VIRTIO_F_EVENT_IDX` (6): both sides say from which index on they want to be told.
pub const VIRTIO_F_EVENT_IDX: u64 = 1 << virtio_ring::VIRTIO_RING_F_EVENT_IDX;
/// Features that the transport and the queues add to those of every device.
pub const TRANSPORT_FEATURES: u64 =
    VIRTIO_F_VERSION_1 | VIRTIO_F_INDIRECT_DESC | VIRTIO_F_EVENT_IDX;

/// `InterruptStatus` (4.2.2): buffers were used.
pub const INTERRUPT_USED: u32 = 1;
/// `InterruptStatus` (4.2.2): the configuration changed, or the device needs a reset.
pub const INTERRUPT_CONFIG: u32 = 2;

/// A virtio device without its transport.
///
/// The transport calls every method with its own lock held. A device that works on a thread of its
/// own therefore keeps what that thread needs apart, and takes no lock of the transport.
pub trait VirtioDevice: Send {
    /// Device type (5).
    const DEVICE_TYPE: u32;
    /// Largest size of each of its queues; powers of two.
    const QUEUE_MAX_SIZES: &'static [u16];
    /// The saved form: the transport's state and the device's own in one.
    type State: Versioned;
    /// The device's own part of a state that was checked.
    type Checked;

    /// The device's id, for messages.
    fn id(&self) -> &str;

    /// Features of the device type that it offers, without [`TRANSPORT_FEATURES`].
    fn offered_features(&self) -> u64;

    /// Reads the configuration space; bytes behind its end stay zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the configuration space; what the driver may not write is left alone.
    fn write_config(&mut self, offset: u64, data: &[u8]);

    /// The driver is ready (DRIVER_OK). Queues may come before and after.
    fn activate(&mut self, link: DriverLink);

    /// The driver enabled queue `index`, or stopped it. Once this returns with `None`, the device
    /// does not touch the queue's memory any more.
    fn set_queue(&mut self, index: usize, queue: Option<VirtQueue>);

    /// Calls `look` with queue `index`, at a moment when no request is half done; `None` where the
    /// queue is not enabled.
    fn inspect_queue<R>(&self, index: usize, look: impl FnOnce(&VirtQueue) -> R) -> Option<R>;

    /// The driver rang the doorbell of queue `index`. Does nothing before [`activate`](Self::activate).
    fn notify(&mut self, index: usize);

    /// Forgets driver and queues, and returns to the reset state. Afterwards the device does not touch guest memory.
    fn reset(&mut self);

    /// See [`Pause::pause`](crate::device::Pause::pause).
    fn pause(&mut self, deadline: Instant) -> Result<(), PauseError>;

    /// See [`Pause::resume`](crate::device::Pause::resume).
    fn resume(&mut self);

    /// The saved form, around the `transport`'s state.
    fn save(&self, transport: TransportState) -> Result<Self::State, PersistError>;

    /// Checks the device's own fields of `state` without changing anything.
    fn check(&self, state: Self::State) -> Result<(TransportState, Self::Checked), PersistError>;

    /// Takes over what was checked; called on a device that was just reset, before queues and driver.
    /// From here on the device is paused: it leaves guest memory alone until [`resume`](Self::resume).
    fn apply(&mut self, checked: Self::Checked);
}

/// What a device needs to serve its driver.
#[derive(Clone)]
pub struct DriverLink {
    /// Features that the driver accepted.
    pub features: u64,
    /// The guest's memory.
    pub ram: GuestRam,
    /// How the device reaches the driver.
    pub signals: Arc<Signals>,
}

/// What a device tells its driver: interrupts and `DEVICE_NEEDS_RESET`. Shared by the transport and the
/// device's worker.
pub struct Signals {
    interrupt_status: AtomicU32,
    needs_reset: AtomicBool,
    line: IrqLine,
}

impl Signals {
    fn new(line: IrqLine) -> Self {
        Self { interrupt_status: AtomicU32::new(0), needs_reset: AtomicBool::new(false), line }
    }

    /// Tells the driver that buffers were used.
    pub fn used(&self) {
        self.raise(INTERRUPT_USED);
    }

    /// The driver broke the rules in a way that cannot be answered inside a request: sets
    /// `DEVICE_NEEDS_RESET` (2.1.2). The device does nothing more until it is reset. `live` says that
    /// the driver has set DRIVER_OK; before that it gets no interrupt.
    pub fn fail(&self, live: bool) {
        self.needs_reset.store(true, Ordering::Release);
        if live {
            self.raise(INTERRUPT_CONFIG);
        }
    }

    /// Whether the device waits for a reset.
    pub fn failed(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    /// `InterruptStatus`.
    pub fn interrupt_status(&self) -> u32 {
        self.interrupt_status.load(Ordering::Acquire)
    }

    /// Every event pulses the line, also while an earlier one is not acknowledged: the driver may
    /// have read `InterruptStatus` before this event, and an edge that is not sent is lost.
    fn raise(&self, event: u32) {
        self.interrupt_status.fetch_or(event, Ordering::AcqRel);
        self.line.pulse();
    }

    fn acknowledge(&self, events: u32) {
        self.interrupt_status.fetch_and(!events, Ordering::AcqRel);
    }

    fn set(&self, interrupt_status: u32, needs_reset: bool) {
        self.interrupt_status.store(interrupt_status, Ordering::Release);
        self.needs_reset.store(needs_reset, Ordering::Release);
    }
}
