//! A machine of RAM and vCPUs, and page tables for it.

use std::sync::Arc;

use squib_soft::{Counter, Cpu, Ram, Shared};

pub(crate) const BASE: u64 = 0x8000_0000;
pub(crate) const SIZE: usize = 4 << 20;

/// Zeroed RAM of [`SIZE`] bytes at [`BASE`], aligned to a page.
#[repr(align(4096))]
struct Page(#[expect(dead_code, reason = "only its size and alignment count")] [u8; 4096]);

pub(crate) struct Machine {
    pub(crate) shared: Arc<Shared>,
    pub(crate) host: *mut u8,
}

impl Machine {
    pub(crate) fn new(counter: Counter) -> Self {
        let mut pages: Vec<Page> = Vec::new();
        pages.resize_with(SIZE / 4096, || Page([0; 4096]));
        let host = pages.as_mut_ptr().cast::<u8>();
        // SAFETY: the vector lives in `keep` and is not touched as such any more.
        let ram = unsafe { Ram::new(host, SIZE as u64, BASE, Arc::new(Keep(pages))) };
        Self { shared: Shared::new(ram, Arc::new(counter)), host }
    }

    pub(crate) fn write(&self, at: u64, words: &[u32]) {
        for (n, word) in words.iter().enumerate() {
            // SAFETY: tests write inside of RAM, while no vCPU runs.
            unsafe { self.host.add((at - BASE) as usize + 4 * n).cast::<u32>().write(*word) };
        }
    }

    pub(crate) fn write64(&self, at: u64, value: u64) {
        self.write(at, &[value as u32, (value >> 32) as u32]);
    }

    pub(crate) fn read64(&self, at: u64) -> u64 {
        // SAFETY: tests read inside of RAM, while no vCPU runs.
        unsafe { self.host.add((at - BASE) as usize).cast::<u64>().read_volatile() }
    }

    pub(crate) fn cpu(&self, index: u64) -> Cpu {
        let mut cpu = Cpu::new(&self.shared, 0x8000_0000 | index);
        cpu.start(BASE, 0);
        cpu
    }

    /// All of RAM, for comparing two machines.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        // SAFETY: SIZE bytes of RAM, while no vCPU runs.
        unsafe { std::slice::from_raw_parts(self.host, SIZE) }.to_vec()
    }
}

struct Keep(#[expect(dead_code, reason = "held for its memory")] Vec<Page>);

/// Page tables: a 2 MiB (or with 16 KiB pages 32 MiB) identity block would hide page permissions, so
/// every test page is mapped on its own.
pub(crate) struct Tables<'a> {
    pub(crate) machine: &'a Machine,
    /// log2 of the page size: 12 or 14.
    pub(crate) granule: u32,
    next: u64,
    pub(crate) root: u64,
}

pub(crate) const VALID_PAGE: u64 = 3 | 1 << 10;
pub(crate) const USER: u64 = 1 << 6;
pub(crate) const READ_ONLY: u64 = 1 << 7;
pub(crate) const PXN: u64 = 1 << 53;
pub(crate) const NOT_GLOBAL: u64 = 1 << 11;

impl<'a> Tables<'a> {
    pub(crate) fn new(machine: &'a Machine, granule: u32) -> Self {
        Self::at(machine, granule, BASE + 0x20_0000)
    }

    /// Tables that lie at `root` and behind it.
    pub(crate) fn at(machine: &'a Machine, granule: u32, root: u64) -> Self {
        Self { machine, granule, next: root + (1 << granule), root }
    }

    pub(crate) fn map(&mut self, va: u64, pa: u64, attributes: u64) {
        let stride = self.granule - 3;
        let first = if self.granule == 12 { 0 } else { 1 };
        let mut table = self.root;
        for level in first..4 {
            let index = va >> (self.granule + stride * (3 - level)) & ((1 << stride) - 1);
            let entry = table + 8 * index;
            if level == 3 {
                self.machine.write64(entry, pa | attributes);
                return;
            }
            if self.machine.read64(entry) == 0 {
                self.machine.write64(entry, self.next | 3);
                self.next += 1 << self.granule;
            }
            table = self.machine.read64(entry) & ((1 << 48) - 1) & !((1 << self.granule) - 1);
        }
    }

    /// TCR_EL1 for these tables in both halves: 48-bit addresses (4 KiB) or 47-bit (16 KiB, so that the
    /// walk begins at level 1).
    pub(crate) fn tcr(&self) -> u64 {
        let (tsz, tg0, tg1) = if self.granule == 12 { (16, 0, 2) } else { (17, 2, 1) };
        tsz | tg0 << 14 | tsz << 16 | tg1 << 30
    }

    /// Boot code at EL1 that turns the MMU on with `tcr`, and jumps to x9.
    pub(crate) fn boot(&self, tcr: u64) -> Cpu {
        let code = [
            0xd518_2040, // msr tcr_el1, x0
            0xd518_2001, // msr ttbr0_el1, x1
            0xd518_c002, // msr vbar_el1, x2
            0xd518_a21c, // msr mair_el1, x28
            0xd518_1003, // msr sctlr_el1, x3
            0xd503_3fdf, // isb
            0xd61f_0120, // br x9
        ];
        self.machine.write(BASE, &code);
        let mut cpu = self.machine.cpu(0);
        // Attr0 is Normal memory, Attr1 and the others are Device-nGnRnE.
        let (vectors, sctlr, mair) = (BASE + 0x8000, 0x30d0_0801, 0xff);
        for (n, value) in [(0, tcr), (1, self.root), (2, vectors), (3, sctlr), (28, mair)] {
            cpu.set_x(n, value);
        }
        cpu
    }
}
