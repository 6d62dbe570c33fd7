//! The MMIO bus: which device answers at which guest-physical address.

use std::sync::Arc;

use crate::{device::MachineDevice, map::Range};

/// Devices by address, immutable once the machine runs, so that look-ups take no lock.
#[derive(Default)]
pub struct Bus {
    /// Sorted by base, without overlap.
    slots: Vec<(Range, Arc<dyn MachineDevice>)>,
}

/// Two devices claim the same address.
#[derive(Debug, thiserror::Error)]
#[error("the MMIO range {new:#x?} overlaps {old:#x?}")]
pub struct BusOverlap {
    new: Range,
    old: Range,
}

impl Bus {
    /// A bus without devices.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets `device` answer in `range`.
    pub fn insert(
        &mut self,
        range: Range,
        device: Arc<dyn MachineDevice>,
    ) -> Result<(), BusOverlap> {
        let at = self.slots.partition_point(|(r, _)| r.base < range.base);
        let neighbours = self.slots[at.saturating_sub(1)..].iter().take(2);
        for (old, _) in neighbours {
            if old.base < range.end() && range.base < old.end() {
                return Err(BusOverlap { new: range, old: *old });
            }
        }
        self.slots.insert(at, (range, device));
        Ok(())
    }

    /// Reads `size` bytes at `address`; `None` where no device answers.
    pub fn read(&self, address: u64, size: u8) -> Option<u64> {
        let (range, device) = self.find(address, size)?;
        Some(device.mmio_read(address - range.base, size))
    }

    /// Writes `size` bytes at `address`; false where no device answers.
    #[must_use]
    pub fn write(&self, address: u64, size: u8, value: u64) -> bool {
        let Some((range, device)) = self.find(address, size) else { return false };
        device.mmio_write(address - range.base, size, value);
        true
    }

    fn find(&self, address: u64, size: u8) -> Option<(Range, &dyn MachineDevice)> {
        let at = self.slots.partition_point(|(r, _)| r.base <= address).checked_sub(1)?;
        let (range, device) = &self.slots[at];
        let inside = address.checked_add(u64::from(size))? <= range.end();
        inside.then_some((*range, &**device))
    }
}
