//! What a device is to the machine that holds it.

use std::time::Instant;

use parking_lot::Mutex;
use squib_formats::persist::{self, Persist, PersistError, Section, Versioned};

/// The registers of a device.
pub trait MmioDevice {
    /// Reads `size` bytes (1, 2, 4 or 8) at `offset` from the device's base; unused high bits are zero.
    /// What is not implemented reads as zero.
    fn read(&mut self, offset: u64, size: u8) -> u64;

    /// Writes the low `size` bytes (1, 2, 4 or 8) of `value` at `offset` from the device's base.
    fn write(&mut self, offset: u64, size: u8, value: u64);
}

/// How a device comes to rest before its state is saved.
pub trait Pause {
    /// Stops taking work and settles what is in flight. Idempotent. On an error the device works on.
    /// A device whose work is done inside its register accesses has nothing to do.
    fn pause(&mut self, deadline: Instant) -> Result<(), PauseError> {
        let _ = deadline;
        Ok(())
    }

    /// Takes work again, and looks for what arrived in the meantime (doorbells that were rung while
    /// the device was paused, or before a snapshot was taken). Idempotent.
    fn resume(&mut self) {}
}

/// Why a device did not come to rest.
#[derive(Debug, thiserror::Error)]
pub enum PauseError {
    /// Requests were still in flight at the deadline.
    #[error("{device}: {in_flight} requests were still in flight at the deadline")]
    Deadline {
        /// The device's id.
        device: String,
        /// Requests that had not completed.
        in_flight: usize,
    },
    /// The device's worker is gone.
    #[error("{device}: its worker has ended")]
    WorkerGone {
        /// The device's id.
        device: String,
    },
}

/// A device as a machine holds it. Implemented for every `Mutex` of a device that can be reached by
/// MMIO, comes to rest, and persists; there is no other way into a machine.
pub trait MachineDevice: Send + Sync {
    /// See [`MmioDevice::read`].
    fn mmio_read(&self, offset: u64, size: u8) -> u64;
    /// See [`MmioDevice::write`].
    fn mmio_write(&self, offset: u64, size: u8, value: u64);
    /// See [`Pause::pause`].
    fn pause(&self, deadline: Instant) -> Result<(), PauseError>;
    /// See [`Pause::resume`].
    fn resume(&self);
    /// Kind of the device's section.
    fn kind(&self) -> &'static str;
    /// The device's state as the section of `instance`.
    fn save(&self, instance: &str) -> Result<Section, PersistError>;
    /// Takes over the state in `section`.
    fn restore(&self, section: &Section) -> Result<(), PersistError>;
}

impl<D: MmioDevice + Pause + Persist + Send> MachineDevice for Mutex<D> {
    fn mmio_read(&self, offset: u64, size: u8) -> u64 {
        self.lock().read(offset, size)
    }

    fn mmio_write(&self, offset: u64, size: u8, value: u64) {
        self.lock().write(offset, size, value);
    }

    fn pause(&self, deadline: Instant) -> Result<(), PauseError> {
        self.lock().pause(deadline)
    }

    fn resume(&self) {
        self.lock().resume();
    }

    fn kind(&self) -> &'static str {
        D::State::KIND
    }

    fn save(&self, instance: &str) -> Result<Section, PersistError> {
        persist::save_section(instance, &*self.lock())
    }

    fn restore(&self, section: &Section) -> Result<(), PersistError> {
        persist::restore_section(&mut *self.lock(), section)
    }
}
