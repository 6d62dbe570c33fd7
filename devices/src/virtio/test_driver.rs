//! A small virtio driver: sets a device up through its registers and builds rings in guest memory.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use vm_memory::{Bytes, GuestAddress};

use super::{VIRTIO_F_VERSION_1, VirtioDevice, mmio::VirtioMmio};
use crate::{
    clock::Clock,
    device::MmioDevice,
    irq::{IrqChip, IrqLine},
    map::RAM_BASE,
    memory::GuestRam,
};

/// Descriptor flags (2.7.5).
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

pub(crate) const RAM_SIZE: u64 = 1 << 20;
pub(crate) const DESC: u64 = RAM_BASE;
pub(crate) const AVAIL: u64 = RAM_BASE + 0x4000;
pub(crate) const USED: u64 = RAM_BASE + 0x5000;
pub(crate) const TABLE: u64 = RAM_BASE + 0x7000;
/// From here on memory is free for buffers.
pub(crate) const BUFFERS: u64 = RAM_BASE + 0x1_0000;

/// Counts rising edges.
#[derive(Default)]
pub(crate) struct Edges(AtomicU64);

impl IrqChip for Edges {
    fn set_spi(&self, intid: u32, level: bool) {
        assert_eq!(intid, 48);
        self.0.fetch_add(level.into(), Ordering::SeqCst);
    }
}

/// An interrupt line that nobody listens to.
pub(crate) fn line() -> IrqLine {
    IrqLine::new(Arc::new(Edges::default()), 48)
}

/// Time that stands still until it is told.
pub(crate) struct ManualClock {
    pub(crate) monotonic: AtomicU64,
    pub(crate) wall: AtomicU64,
}

impl ManualClock {
    pub(crate) fn new(monotonic: u64, wall: u64) -> Arc<Self> {
        Arc::new(Self { monotonic: monotonic.into(), wall: wall.into() })
    }

    pub(crate) fn advance(&self, by: Duration) {
        let ns = by.as_nanos() as u64;
        self.monotonic.fetch_add(ns, Ordering::SeqCst);
        self.wall.fetch_add(ns, Ordering::SeqCst);
    }
}

impl Clock for ManualClock {
    fn monotonic_ns(&self) -> u64 {
        self.monotonic.load(Ordering::SeqCst)
    }

    fn wall_ns(&self) -> u64 {
        self.wall.load(Ordering::SeqCst)
    }
}

/// A device, its memory, its interrupt, and what the driver remembers.
pub(crate) struct Driver<D: VirtioDevice> {
    pub(crate) dev: VirtioMmio<D>,
    pub(crate) ram: GuestRam,
    pub(crate) edges: Arc<Edges>,
    pub(crate) size: u16,
    avail_idx: u16,
    used_idx: u16,
    next_desc: u16,
}

/// A descriptor: address, length, flags without NEXT.
pub(crate) type Desc = (u64, u32, u16);

impl<D: VirtioDevice> Driver<D> {
    /// A driver that has not touched `device` yet.
    pub(crate) fn new(device: D) -> Self {
        Self::with_ram(device, GuestRam::new(RAM_SIZE).unwrap())
    }

    pub(crate) fn with_ram(device: D, ram: GuestRam) -> Self {
        let edges = Arc::new(Edges::default());
        let dev = VirtioMmio::new(device, ram.clone(), IrqLine::new(edges.clone(), 48));
        Self { dev, ram, edges, size: 16, avail_idx: 0, used_idx: 0, next_desc: 0 }
    }

    /// A driver for a device whose registers exist already; interrupts are not counted.
    pub(crate) fn adopt(dev: VirtioMmio<D>) -> Self {
        let (ram, edges) = (dev.ram().clone(), Arc::new(Edges::default()));
        Self { dev, ram, edges, size: 16, avail_idx: 0, used_idx: 0, next_desc: 0 }
    }

    /// A driver that has brought `device` to DRIVER_OK, with all of `features` that are offered.
    pub(crate) fn started(device: D, features: u64) -> Self {
        let mut driver = Self::new(device);
        driver.start(features);
        driver
    }

    pub(crate) fn start(&mut self, features: u64) {
        self.negotiate(features);
        self.set_up_queue();
        self.w(0x70, 0xf);
        assert_eq!(self.r(0x70), 0xf);
    }

    pub(crate) fn negotiate(&mut self, features: u64) {
        assert_eq!(self.r(0x00), 0x7472_6976);
        assert_eq!(self.r(0x04), 2);
        self.w(0x70, 0);
        self.w(0x70, 1);
        self.w(0x70, 3);
        let accepted = self.offered() & (features | VIRTIO_F_VERSION_1);
        self.accept(accepted);
        self.w(0x70, 0xb);
        assert_eq!(self.r(0x70), 0xb);
    }

    pub(crate) fn offered(&mut self) -> u64 {
        self.w(0x14, 0);
        let low = self.r(0x10);
        self.w(0x14, 1);
        u64::from(self.r(0x10)) << 32 | u64::from(low)
    }

    pub(crate) fn accept(&mut self, features: u64) {
        self.w(0x24, 0);
        self.w(0x20, features as u32);
        self.w(0x24, 1);
        self.w(0x20, (features >> 32) as u32);
    }

    pub(crate) fn set_up_queue(&mut self) {
        self.w(0x30, 0);
        assert!(self.r(0x34) >= u32::from(self.size));
        self.w(0x38, self.size.into());
        for (register, address) in [(0x80, DESC), (0x90, AVAIL), (0xa0, USED)] {
            self.w(register, address as u32);
            self.w(register + 4, (address >> 32) as u32);
        }
        self.w(0x44, 1);
    }

    pub(crate) fn r(&mut self, offset: u64) -> u32 {
        self.dev.read(offset, 4) as u32
    }

    pub(crate) fn w(&mut self, offset: u64, value: u32) {
        self.dev.write(offset, 4, value.into());
    }

    /// Writes a descriptor into the table at `table`.
    pub(crate) fn put_desc(&self, table: u64, index: u16, desc: Desc, next: u16) {
        let (addr, len, flags) = desc;
        let at = table + 16 * u64::from(index);
        self.put(at, &addr.to_le_bytes());
        self.put(at + 8, &len.to_le_bytes());
        self.put(at + 12, &flags.to_le_bytes());
        self.put(at + 14, &next.to_le_bytes());
    }

    /// Writes a descriptor into the queue's table, with its flags and successor as they are.
    pub(crate) fn raw_desc(&self, index: u16, desc: Desc, next: u16) {
        self.put_desc(DESC, index, desc, next);
    }

    /// Lays `descs` out as a chain from the next free descriptor on; gives the first.
    pub(crate) fn chain(&mut self, descs: &[Desc]) -> u16 {
        let head = self.next_desc;
        for (at, &(addr, len, flags)) in descs.iter().enumerate() {
            let next = (self.next_desc + 1) % self.size;
            let more = if at + 1 < descs.len() { NEXT } else { 0 };
            self.put_desc(DESC, self.next_desc, (addr, len, flags | more), next);
            self.next_desc = next;
        }
        head
    }

    /// Lays `descs` out in an indirect table.
    pub(crate) fn indirect(&mut self, descs: &[Desc]) -> u16 {
        for (at, &(addr, len, flags)) in descs.iter().enumerate() {
            let more = if at + 1 < descs.len() { NEXT } else { 0 };
            self.put_desc(TABLE, at as u16, (addr, len, flags | more), at as u16 + 1);
        }
        self.chain(&[(TABLE, 16 * descs.len() as u32, INDIRECT)])
    }

    /// Offers the chain at `head` without ringing.
    pub(crate) fn offer(&mut self, head: u16) {
        self.put(AVAIL + 4 + 2 * u64::from(self.avail_idx % self.size), &head.to_le_bytes());
        self.avail_idx = self.avail_idx.wrapping_add(1);
        self.set_avail_idx(self.avail_idx);
    }

    pub(crate) fn set_avail_idx(&self, idx: u16) {
        self.ram.store(idx.to_le(), GuestAddress(AVAIL + 2), Ordering::Release).unwrap();
    }

    pub(crate) fn set_avail_flags(&self, flags: u16) {
        self.put(AVAIL, &flags.to_le_bytes());
    }

    /// Goes on from index `idx`, as after that many requests.
    pub(crate) fn set_indexes(&mut self, idx: u16) {
        (self.avail_idx, self.used_idx) = (idx, idx);
        self.set_avail_idx(idx);
        self.ram.store(idx.to_le(), GuestAddress(USED + 2), Ordering::Release).unwrap();
    }

    pub(crate) fn set_used_event(&self, event: u16) {
        self.put(AVAIL + 4 + 2 * u64::from(self.size), &event.to_le_bytes());
    }

    pub(crate) fn avail_event(&self) -> u16 {
        u16::from_le_bytes(self.get(USED + 4 + 8 * u64::from(self.size)))
    }

    pub(crate) fn used_idx(&self) -> u16 {
        let idx: u16 = self.ram.load(GuestAddress(USED + 2), Ordering::Acquire).unwrap();
        u16::from_le(idx)
    }

    pub(crate) fn ring(&mut self) {
        self.w(0x50, 0);
    }

    /// Offers the chain at `head`, rings, and waits for it to come back; gives the bytes written.
    pub(crate) fn submit(&mut self, head: u16) -> u32 {
        self.offer(head);
        self.ring();
        let (id, len) = self.wait();
        assert_eq!(id, u32::from(head));
        len
    }

    /// The next used entry; waits for a worker.
    pub(crate) fn wait(&mut self) -> (u32, u32) {
        let late = Instant::now() + Duration::from_secs(30);
        while self.used_idx() == self.used_idx {
            assert!(Instant::now() < late, "the device does not answer");
            std::thread::yield_now();
        }
        let at = USED + 4 + 8 * u64::from(self.used_idx % self.size);
        self.used_idx = self.used_idx.wrapping_add(1);
        (u32::from_le_bytes(self.get(at)), u32::from_le_bytes(self.get(at + 4)))
    }

    pub(crate) fn interrupts(&self) -> u64 {
        self.edges.0.load(Ordering::SeqCst)
    }

    pub(crate) fn put(&self, addr: u64, bytes: &[u8]) {
        self.ram.write_slice(bytes, GuestAddress(addr)).unwrap();
    }

    pub(crate) fn get<const N: usize>(&self, addr: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.ram.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
        bytes
    }

    pub(crate) fn get_vec(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
        bytes
    }

    /// The same driver in front of another device, as after a restore: memory is copied.
    pub(crate) fn moved_to(&self, device: D) -> Self {
        let ram = GuestRam::new(RAM_SIZE).unwrap();
        let all = self.get_vec(RAM_BASE, RAM_SIZE as usize);
        ram.write_slice(&all, GuestAddress(RAM_BASE)).unwrap();
        let Self { avail_idx, used_idx, next_desc, size, .. } = *self;
        Self { avail_idx, used_idx, next_desc, size, ..Self::with_ram(device, ram) }
    }
}
