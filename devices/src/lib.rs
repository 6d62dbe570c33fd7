//! What the guest sees: MMIO bus, GICv3, serial, RTC and virtio devices.
//!
//! Knows no hypervisor and no snapshot policy. A device is a plain struct that implements
//! [`MmioDevice`](device::MmioDevice), [`Pause`](device::Pause) and
//! [`Persist`](squib_formats::persist::Persist); together these make it a
//! [`MachineDevice`](device::MachineDevice), the only thing that a machine accepts.

pub mod bus;
pub mod clock;
pub mod device;
pub mod gic;
pub mod granules;
pub mod irq;
pub mod map;
pub mod memory;
pub mod rtc;
pub mod serial;
pub mod token_bucket;
pub mod virtio;
pub mod vmgenid;
