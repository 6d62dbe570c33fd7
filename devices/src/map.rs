//! The guest's physical memory map and interrupt numbers; one map on every backend.

/// A range of guest-physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First address.
    pub base: u64,
    /// Length in bytes.
    pub size: u64,
}

impl Range {
    /// First address behind the range.
    pub const fn end(self) -> u64 {
        self.base + self.size
    }
}

/// GICv3 distributor (GICD).
pub const GICD: Range = Range { base: 0x0800_0000, size: 0x1_0000 };
/// GICv3 redistributors (GICR), [`GICR_STRIDE`] bytes for each vCPU.
pub const GICR: Range = Range { base: 0x080A_0000, size: 0x0600_0000 };
/// Bytes of one vCPU's redistributor: RD_base and SGI_base frames of 64 KiB.
pub const GICR_STRIDE: u64 = 0x2_0000;
/// Serial port, ns16550a.
pub const SERIAL: Range = Range { base: 0x0E0A_0000, size: 0x1000 };
/// Real-time clock, PL031.
pub const RTC: Range = Range { base: 0x0E0B_0000, size: 0x1000 };
/// virtio-mmio transports, [`VIRTIO_STRIDE`] bytes for each of [`VIRTIO_SLOTS`].
pub const VIRTIO: Range = Range { base: 0x0F00_0000, size: VIRTIO_STRIDE * VIRTIO_SLOTS };
/// Bytes of one virtio-mmio transport.
pub const VIRTIO_STRIDE: u64 = 0x1000;
/// Number of virtio-mmio transports.
pub const VIRTIO_SLOTS: u64 = 32;
/// Start of RAM.
pub const RAM_BASE: u64 = 0x8000_0000;
/// Bytes at the start of RAM that are left out of the guest's memory node: the system area.
pub const SYSTEM_AREA_SIZE: u64 = 0x20_0000;
/// Smallest RAM, bytes.
pub const RAM_MIN: u64 = 64 << 20;
/// Most vCPUs, bounded by the redistributor window.
pub const MAX_VCPUS: u32 = 32;
/// The 16-byte generation id, in the system area (vmgenid).
pub const VMGENID: Range = Range { base: RAM_BASE + 0x1000, size: 16 };

/// First SPI's INTID.
pub const SPI_BASE: u32 = 32;
/// INTID of the serial port, level.
pub const SERIAL_INTID: u32 = SPI_BASE + 1;
/// INTID of the RTC, level.
pub const RTC_INTID: u32 = SPI_BASE + 2;
/// INTID of vmgenid, edge.
pub const VMGENID_INTID: u32 = SPI_BASE + 3;
/// INTID of virtio slot 0, edge; one for each slot.
pub const VIRTIO_INTID: u32 = SPI_BASE + 16;
/// INTID of the virtual timer (CNTV), PPI 11.
pub const CNTV_INTID: u32 = 27;
/// INTID of the physical timer (CNTP), PPI 14.
pub const CNTP_INTID: u32 = 30;
/// INTIDs that the distributor implements: SGIs, PPIs and 96 SPIs.
pub const INTIDS: u32 = 128;

/// Ranges in ascending order, for the proof below.
const RANGES: [Range; 6] =
    [GICD, GICR, SERIAL, RTC, VIRTIO, Range { base: RAM_BASE, size: RAM_MIN }];

const _: () = {
    let mut i = 1;
    while i < RANGES.len() {
        assert!(RANGES[i - 1].end() <= RANGES[i].base, "the memory map overlaps");
        i += 1;
    }
    assert!(GICR.size / GICR_STRIDE >= MAX_VCPUS as u64);
    assert!(VMGENID.end() <= RAM_BASE + SYSTEM_AREA_SIZE);
    assert!(VIRTIO_INTID + VIRTIO_SLOTS as u32 <= INTIDS);
};
