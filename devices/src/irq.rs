//! Interrupt lines between devices and an interrupt chip.

use std::sync::Arc;

/// Something with shared peripheral interrupt inputs: our GICv3, or the one inside a hypervisor.
pub trait IrqChip: Send + Sync {
    /// Drives the input of SPI `intid` (32 and up) high or low. An edge-triggered interrupt becomes
    /// pending on the rising edge.
    fn set_spi(&self, intid: u32, level: bool);
}

/// One device's interrupt output.
#[derive(Clone)]
pub struct IrqLine {
    chip: Arc<dyn IrqChip>,
    intid: u32,
}

impl IrqLine {
    /// The line into `intid` of `chip`.
    pub fn new(chip: Arc<dyn IrqChip>, intid: u32) -> Self {
        Self { chip, intid }
    }

    /// Drives a level-triggered line.
    pub fn set(&self, level: bool) {
        self.chip.set_spi(self.intid, level);
    }

    /// Signals an edge-triggered interrupt: high, then low.
    pub fn pulse(&self) {
        self.chip.set_spi(self.intid, true);
        self.chip.set_spi(self.intid, false);
    }
}
