//! The tiny guest's program.

use squib_devices::{
    gic::reg::{ICC_EOIR1_EL1, ICC_IAR1_EL1, ICC_IGRPEN1_EL1, ICC_PMR_EL1, ICC_SRE_EL1},
    map::{CNTV_INTID, GICD, GICR, RAM_BASE, SERIAL, SERIAL_INTID, VIRTIO, VIRTIO_INTID},
};

use super::{
    IMAGE_SIZE, POWER_OFF, RESET, Tiny, WARM_RESET,
    asm::{Asm, EQ, LR, Label, NE, R, SP, ZR},
};

const fn sysreg(op1: u16, crn: u16, crm: u16, op2: u16) -> u16 {
    3 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2
}

const SCTLR_EL1: u16 = sysreg(0, 1, 0, 0);
const CPACR_EL1: u16 = sysreg(0, 1, 0, 2);
const TTBR0_EL1: u16 = sysreg(0, 2, 0, 0);
const TCR_EL1: u16 = sysreg(0, 2, 0, 2);
const ESR_EL1: u16 = sysreg(0, 5, 2, 0);
const MAIR_EL1: u16 = sysreg(0, 10, 2, 0);
const VBAR_EL1: u16 = sysreg(0, 12, 0, 0);
const CNTV_CTL_EL0: u16 = sysreg(3, 14, 3, 1);
const CNTV_CVAL_EL0: u16 = sysreg(3, 14, 3, 2);
const CNTVCT_EL0: u16 = sysreg(3, 14, 0, 2);

/// Odd factor of the hashes.
pub(super) const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;

/// PSCI SYSTEM_OFF, SYSTEM_RESET, and SYSTEM_RESET2 with its only argument that has a name: zero, a warm
/// reset.
const SYSTEM_OFF: u64 = 0x8400_0008;
const SYSTEM_RESET: u64 = 0x8400_0009;
const SYSTEM_RESET2: u64 = 0xc400_0012;

// Registers that keep their meaning. The interrupt handler saves what it uses of the others.
const DATA: R = 19;
const BLK: R = 20;
const UART: R = 21;
const HASH: R = 22;
const ROUND: R = 23;
const SECTORS: R = 24;
const NEXT: R = 25;
const FACTOR: R = 26;
const SCRATCH: R = 27;

// The data area, by offset from DATA.
const TICKS: u32 = 0x00;
const REQUESTS: u32 = 0x08;
const INPUT: u32 = 0x10;
const DESCRIPTORS: u32 = 0x100;
const AVAIL: u32 = 0x200;
const USED: u32 = 0x300;
const HEADER: u32 = 0x400;
const STATUS: u32 = 0x410;
const OUT: u32 = 0x800;
const IN: u32 = 0xa00;
const TABLE: u32 = 0x1000;
const STACK_TOP: u32 = 0x4000;
/// 64 KiB that the rounds dirty, from here on.
const SCRATCH_AREA: u32 = 0x4000;
/// Where the data area starts in the image.
const DATA_OFFSET: u64 = 0x4000;

const _: () = assert!(DATA_OFFSET + SCRATCH_AREA as u64 + 0x1_0000 <= IMAGE_SIZE);

const SECTOR: u32 = 512;
const QUEUE_SIZE: u64 = 8;

// virtio-mmio registers (virtio 1.3, section 4.2.2).
const DEVICE_ID: u32 = 0x08;
const DRIVER_FEATURES: u32 = 0x20;
const DRIVER_FEATURES_SEL: u32 = 0x24;
const QUEUE_NUM: u32 = 0x38;
const QUEUE_READY: u32 = 0x44;
const QUEUE_NOTIFY: u32 = 0x50;
const INTERRUPT_STATUS: u32 = 0x60;
const INTERRUPT_ACK: u32 = 0x64;
const DEVICE_STATUS: u32 = 0x70;
const QUEUE_DESC: u32 = 0x80;
const QUEUE_DRIVER: u32 = 0x90;
const QUEUE_DEVICE: u32 = 0xa0;
const CAPACITY: u32 = 0x100;

const DESC_NEXT: u64 = 1;
const DESC_WRITE: u64 = 2;
const REQUEST_IN: u64 = 0;
const REQUEST_OUT: u64 = 1;

// 16550A registers.
const UART_DATA: u32 = 0;
const UART_IER: u32 = 1;
const UART_FCR: u32 = 2;
const UART_LSR: u32 = 5;

struct Routines {
    data: Label,
    vectors: Label,
    putc: Label,
    hex: Label,
    transfer: Label,
    absorb: Label,
    off: Label,
    irq: Label,
    bad: Label,
}

pub(super) fn assemble(tiny: &Tiny) -> Vec<u8> {
    let mut a = Asm::default();
    let start = a.label();
    let r = Routines {
        data: a.label(),
        vectors: a.label(),
        putc: a.label(),
        hex: a.label(),
        transfer: a.label(),
        absorb: a.label(),
        off: a.label(),
        irq: a.label(),
        bad: a.label(),
    };
    header(&mut a, start);
    a.place(start);
    mmu(&mut a, &r);
    gic(&mut a);
    serial(&mut a);
    disk(&mut a);
    timer(&mut a, tiny);
    rounds(&mut a, &r, tiny);
    transfer(&mut a, &r);
    absorb(&mut a, &r);
    print(&mut a, &r);
    interrupts(&mut a, &r, tiny);
    exceptions(&mut a, &r);
    vectors(&mut a, &r);
    a.align(DATA_OFFSET as usize);
    a.place(r.data);
    a.quad(0);
    let image = a.finish();
    assert!(image.len() as u64 == DATA_OFFSET + 8, "the code leaves no room for the data area");
    image
}

/// The header of an arm64 `Image` (Linux, Documentation/arch/arm64/booting.rst, section 4).
pub(super) fn header(a: &mut Asm, start: Label) {
    a.b(start);
    a.word(0);
    // text_offset, image_size, flags: little-endian, 4 KiB pages, anywhere.
    a.quad(0);
    a.quad(IMAGE_SIZE);
    a.quad(0b1010);
    a.quad(0);
    a.quad(0);
    a.quad(0);
    a.word(u32::from_le_bytes(*b"ARM\x64"));
    a.word(0);
}

/// Stack, vectors, FP, and an identity map: the first GiB as device memory, RAM as normal memory.
fn mmu(a: &mut Asm, r: &Routines) {
    a.adr(DATA, r.data);
    a.add_imm(0, DATA, 0);
    a.mov(1, STACK_TOP.into());
    a.add(0, 0, 1);
    a.add_imm(SP, 0, 0);
    a.adr(0, r.vectors);
    a.msr(VBAR_EL1, 0);
    // FPEN: no traps.
    a.mov(0, 3 << 20);
    a.msr(CPACR_EL1, 0);

    // Level 1 blocks of 1 GiB: AF, device (attribute 0, never executed) or normal (attribute 1, inner shareable).
    a.mov(1, TABLE.into());
    a.add(1, DATA, 1);
    a.mov(0, 3 << 53 | 1 << 10 | 1);
    a.str(8, 0, 1, 0);
    a.mov(0, RAM_BASE | 1 << 10 | 3 << 8 | 1 << 2 | 1);
    a.str(8, 0, 1, 8 * (RAM_BASE >> 30) as u32);
    a.msr(TTBR0_EL1, 1);
    a.mov(0, 0xff00);
    a.msr(MAIR_EL1, 0);
    // T0SZ 25, write-back inner shareable walks, EPD1, 40-bit IPS.
    a.mov(0, 25 | 1 << 8 | 1 << 10 | 3 << 12 | 1 << 23 | 2 << 32);
    a.msr(TCR_EL1, 0);
    a.tlbi_all();
    a.dsb();
    a.isb();
    // M, C and I.
    a.mrs(0, SCTLR_EL1);
    a.mov(1, 1 << 12 | 1 << 2 | 1);
    a.orr(0, 0, 1);
    a.msr(SCTLR_EL1, 0);
    a.isb();
}

/// Distributor and redistributor on; the timer, the serial port (level) and slot 0 (edge) in Group 1.
fn gic(a: &mut Asm) {
    let spis = 1u64 << (SERIAL_INTID - 32) | 1 << (VIRTIO_INTID - 32);
    a.mov(1, GICD.base);
    a.mov(0, 0b10);
    a.str(4, 0, 1, 0);
    a.mov(0, spis);
    a.str(4, 0, 1, 0x84);
    a.str(4, 0, 1, 0x104);
    a.mov(0, 0xa0);
    for intid in [SERIAL_INTID, VIRTIO_INTID] {
        a.str(1, 0, 1, 0x400 + intid);
    }
    a.mov(0, 2 << (2 * (VIRTIO_INTID % 16)));
    a.str(4, 0, 1, 0xc00 + 4 * (VIRTIO_INTID / 16));

    a.mov(1, GICR.base);
    a.str(4, ZR, 1, 0x14);
    let asleep = a.here();
    a.ldr(4, 0, 1, 0x14);
    a.tbnz(0, 2, asleep);
    a.mov(1, GICR.base + 0x1_0000);
    a.mov(0, 0xffff_ffff);
    a.str(4, 0, 1, 0x80);
    a.mov(0, 0x80);
    a.str(1, 0, 1, 0x400 + CNTV_INTID);
    a.mov(0, 1 << CNTV_INTID);
    a.str(4, 0, 1, 0x100);

    a.mov(0, 7);
    a.msr(ICC_SRE_EL1, 0);
    a.isb();
    a.mov(0, 0xf0);
    a.msr(ICC_PMR_EL1, 0);
    a.mov(0, 1);
    a.msr(ICC_IGRPEN1_EL1, 0);
    a.isb();
}

/// FIFOs on, interrupt on received data.
fn serial(a: &mut Asm) {
    a.mov(UART, SERIAL.base);
    a.mov(0, 1);
    a.str(1, 0, UART, UART_FCR);
    a.str(1, 0, UART, UART_IER);
}

/// Sets up queue 0 of the block device in slot 0; SECTORS stays zero if there is none.
fn disk(a: &mut Asm) {
    let none = a.label();
    a.mov(BLK, VIRTIO.base);
    a.mov(SECTORS, 0);
    a.mov(NEXT, 0);
    a.ldr(4, 0, BLK, DEVICE_ID);
    a.cmp_imm(0, 2);
    a.b_if(NE, none);
    let status = |a: &mut Asm, value| {
        a.mov(0, value);
        a.str(4, 0, BLK, DEVICE_STATUS);
    };
    status(a, 0);
    // ACKNOWLEDGE, DRIVER.
    status(a, 0b0011);
    // Features: VIRTIO_F_VERSION_1 (32) and no other.
    a.mov(0, 1);
    a.str(4, 0, BLK, DRIVER_FEATURES_SEL);
    a.str(4, 0, BLK, DRIVER_FEATURES);
    a.str(4, ZR, BLK, DRIVER_FEATURES_SEL);
    a.str(4, ZR, BLK, DRIVER_FEATURES);
    // FEATURES_OK.
    status(a, 0b1011);
    a.mov(0, QUEUE_SIZE);
    a.str(4, 0, BLK, QUEUE_NUM);
    for (register, offset) in
        [(QUEUE_DESC, DESCRIPTORS), (QUEUE_DRIVER, AVAIL), (QUEUE_DEVICE, USED)]
    {
        a.add_imm(0, DATA, offset);
        a.str(4, 0, BLK, register);
        a.ubfx(0, 0, 32, 32);
        a.str(4, 0, BLK, register + 4);
    }
    a.mov(0, 1);
    a.str(4, 0, BLK, QUEUE_READY);
    // DRIVER_OK.
    status(a, 0b1111);
    a.ldr(4, 0, BLK, CAPACITY);
    a.ldr(4, 1, BLK, CAPACITY + 4);
    a.lsl(1, 1, 32);
    a.orr(SECTORS, 0, 1);
    a.place(none);
}

/// The first timer interrupt, and interrupts on.
fn timer(a: &mut Asm, tiny: &Tiny) {
    a.mrs(0, CNTVCT_EL0);
    a.mov(1, tiny.timer_ticks.into());
    a.add(0, 0, 1);
    a.msr(CNTV_CVAL_EL0, 0);
    a.mov(0, 1);
    a.msr(CNTV_CTL_EL0, 0);
    a.isb();
    a.irq_on();
}

/// The main loop.
fn rounds(a: &mut Asm, r: &Routines, tiny: &Tiny) {
    a.mov(FACTOR, MULTIPLIER);
    a.mov(HASH, 0x0123_4567_89ab_cdef);
    a.mov(ROUND, 0);
    a.mov(0, SCRATCH_AREA.into());
    a.add(SCRATCH, DATA, 0);
    let round = a.here();
    // Mix OUT into the hash and the hash into OUT.
    a.add_imm(0, DATA, OUT);
    a.mov(3, 1);
    a.bl(r.absorb);
    // Dirty 8 bytes somewhere in 64 KiB, and keep something in the vector registers.
    a.ubfx(0, HASH, 40, 13);
    a.lsl(0, 0, 3);
    a.str_index(HASH, SCRATCH, 0);
    a.fmov_to(0, HASH);
    a.add_2d(1, 1, 0);
    a.ubfx(0, HASH, 11, 53);
    a.ucvtf(2, 0);
    a.fsqrt(3, 2);
    a.fmov_from(0, 3);
    a.eor(HASH, HASH, 0);
    // Write OUT to sector ROUND, read a sector that the hash chooses into IN, and mix that.
    let no_disk = a.label();
    a.cbz(SECTORS, no_disk);
    a.mov(0, REQUEST_OUT);
    a.mov_reg(1, ROUND);
    a.add_imm(2, DATA, OUT);
    a.mov(3, DESC_NEXT);
    a.bl(r.transfer);
    a.mov(0, REQUEST_IN);
    a.ubfx(1, HASH, 33, 31);
    a.add_imm(2, DATA, IN);
    a.mov(3, DESC_NEXT | DESC_WRITE);
    a.bl(r.transfer);
    a.add_imm(0, DATA, IN);
    a.mov(3, 0);
    a.bl(r.absorb);
    a.place(no_disk);
    a.add_imm(ROUND, ROUND, 1);
    a.mov(0, tiny.print_every.max(1).into());
    a.udiv(1, ROUND, 0);
    a.msub(1, 1, 0, ROUND);
    a.cbnz(1, round);
    line(a, r);
    a.b(round);
}

/// Prints the line.
fn line(a: &mut Asm, r: &Routines) {
    let field = |a: &mut Asm, name: u8, digits: u64| {
        for byte in [name, b'='] {
            a.mov(0, byte.into());
            a.bl(r.putc);
        }
        a.mov(1, digits);
        a.mov_reg(0, 14);
        a.bl(r.hex);
        a.mov(0, if name == b'h' { b'\n' } else { b' ' }.into());
        a.bl(r.putc);
    };
    a.mov_reg(14, ROUND);
    field(a, b'n', 8);
    for (name, counter) in [(b't', TICKS), (b'r', REQUESTS), (b'i', INPUT)] {
        a.ldr(8, 14, DATA, counter);
        field(a, name, 8);
    }
    a.mov_reg(14, HASH);
    field(a, b'h', 16);
}

/// transfer(x0 type, x1 sector, x2 buffer, x3 descriptor flags): one request, waiting for its end.
fn transfer(a: &mut Asm, r: &Routines) {
    a.place(r.transfer);
    // The sector modulo the capacity.
    a.udiv(4, 1, SECTORS);
    a.msub(1, 4, SECTORS, 1);
    a.str(4, 0, DATA, HEADER);
    a.str(4, ZR, DATA, HEADER + 4);
    a.str(8, 1, DATA, HEADER + 8);
    // A status that no device writes.
    a.mov(0, 0xff);
    a.str(1, 0, DATA, STATUS);
    // Descriptors: address, then length, flags and next in one word.
    let describe = |a: &mut Asm, n: u32, length: u32, next: u64| {
        a.str(8, 2, DATA, DESCRIPTORS + 16 * n);
        a.lsl(3, 3, 32);
        a.mov(4, u64::from(length) | next << 48);
        a.orr(4, 4, 3);
        a.str(8, 4, DATA, DESCRIPTORS + 16 * n + 8);
    };
    describe(a, 1, SECTOR, 2);
    a.add_imm(2, DATA, HEADER);
    a.mov(3, DESC_NEXT);
    describe(a, 0, 16, 1);
    a.add_imm(2, DATA, STATUS);
    a.mov(3, DESC_WRITE);
    describe(a, 2, 1, 0);
    // avail.ring[NEXT % size] = 0, then avail.idx.
    a.ubfx(0, NEXT, 0, QUEUE_SIZE.trailing_zeros());
    a.lsl(0, 0, 1);
    a.add_imm(1, DATA, AVAIL + 4);
    a.strh_index(ZR, 1, 0);
    a.dsb();
    a.add_imm(NEXT, NEXT, 1);
    a.ubfx(NEXT, NEXT, 0, 16);
    a.str(2, NEXT, DATA, AVAIL + 2);
    a.dsb();
    a.str(4, ZR, BLK, QUEUE_NOTIFY);

    let (wait, done) = (a.label(), a.label());
    a.place(wait);
    a.irq_off();
    a.ldr(2, 0, DATA, USED + 2);
    a.cmp(0, NEXT);
    a.b_if(EQ, done);
    // A pending interrupt ends the wait although it is masked.
    a.wfi();
    a.irq_on();
    a.b(wait);
    a.place(done);
    a.irq_on();
    a.dsb();
    a.ldr(1, 0, DATA, STATUS);
    let failed = a.label();
    a.cbnz(0, failed);
    a.ret();
    a.place(failed);
    a.mov(0, b'E'.into());
    a.bl(r.putc);
    a.b(r.off);
}

/// absorb(x0 buffer, x3): mixes a sector into the hash, and if x3 is set the hash into the sector.
fn absorb(a: &mut Asm, r: &Routines) {
    a.place(r.absorb);
    a.mov(1, 0);
    let (next, keep) = (a.label(), a.label());
    a.place(next);
    a.ldr_index(2, 0, 1);
    a.eor(HASH, HASH, 2);
    a.ror(HASH, HASH, 23);
    a.madd(HASH, HASH, FACTOR, ROUND);
    a.cbz(3, keep);
    a.str_index(HASH, 0, 1);
    a.place(keep);
    a.add_imm(1, 1, 8);
    a.cmp_imm(1, SECTOR);
    a.b_if(NE, next);
    a.ret();
}

/// putc(x0 byte) uses x9; hex(x0 value, x1 digits) uses x9 to x13.
fn print(a: &mut Asm, r: &Routines) {
    a.place(r.putc);
    let full = a.here();
    a.ldr(1, 9, UART, UART_LSR);
    a.tbz(9, 5, full);
    a.str(1, 0, UART, UART_DATA);
    a.ret();

    a.place(r.hex);
    a.mov_reg(13, LR);
    a.mov_reg(10, 1);
    // The digits to the top.
    a.mov_reg(11, 0);
    let (shifted, shift) = (a.label(), a.label());
    a.cmp_imm(10, 16);
    a.b_if(EQ, shifted);
    a.mov(12, 16);
    a.place(shift);
    a.lsl(11, 11, 4);
    a.sub_imm(12, 12, 1);
    a.cmp(12, 10);
    a.b_if(NE, shift);
    a.place(shifted);
    let (digit, letter, put) = (a.label(), a.label(), a.label());
    a.place(digit);
    a.ubfx(0, 11, 60, 4);
    a.lsl(11, 11, 4);
    // Bits 3 and 1, or 3 and 2: ten and more.
    a.tbz(0, 3, put);
    a.tbnz(0, 2, letter);
    a.tbz(0, 1, put);
    a.place(letter);
    a.add_imm(0, 0, u32::from(b'a' - b'0') - 10);
    a.place(put);
    a.add_imm(0, 0, b'0'.into());
    a.bl(r.putc);
    a.sub_imm(10, 10, 1);
    a.cbnz(10, digit);
    a.ret_to(13);
}

/// The interrupt handler.
fn interrupts(a: &mut Asm, r: &Routines, tiny: &Tiny) {
    let (timer, blk, uart, end, out) = (a.label(), a.label(), a.label(), a.label(), a.label());
    a.place(r.irq);
    a.push(0, 1);
    a.push(2, 3);
    a.mrs(0, ICC_IAR1_EL1);
    for (intid, handler) in [(CNTV_INTID, timer), (VIRTIO_INTID, blk), (SERIAL_INTID, uart)] {
        a.cmp_imm(0, intid);
        a.b_if(EQ, handler);
    }
    a.cmp_imm(0, 1023);
    a.b_if(EQ, out);
    a.place(end);
    a.msr(ICC_EOIR1_EL1, 0);
    a.place(out);
    a.pop(2, 3);
    a.pop(0, 1);
    a.eret();

    a.place(timer);
    a.mrs(1, CNTV_CVAL_EL0);
    a.mov(2, tiny.timer_ticks.into());
    a.add(1, 1, 2);
    a.msr(CNTV_CVAL_EL0, 1);
    a.isb();
    // Exclusives, so that their monitor is used.
    a.add_imm(3, DATA, TICKS);
    let retry = a.here();
    a.ldxr(1, 3);
    a.add_imm(1, 1, 1);
    a.stxr(2, 1, 3);
    a.cbnz(2, retry);
    a.b(end);

    a.place(blk);
    a.ldr(4, 1, BLK, INTERRUPT_STATUS);
    a.str(4, 1, BLK, INTERRUPT_ACK);
    a.ldr(8, 1, DATA, REQUESTS);
    a.add_imm(1, 1, 1);
    a.str(8, 1, DATA, REQUESTS);
    a.b(end);

    a.place(uart);
    a.ldr(1, 1, UART, UART_LSR);
    a.tbz(1, 0, end);
    a.ldr(1, 1, UART, UART_DATA);
    a.cmp_imm(1, POWER_OFF.into());
    a.b_if(EQ, r.off);
    let (reset, other) = (a.label(), a.label());
    a.cmp_imm(1, RESET.into());
    a.b_if(EQ, reset);
    a.cmp_imm(1, WARM_RESET.into());
    a.b_if(NE, other);
    a.mov(0, SYSTEM_RESET2);
    a.mov(1, 0);
    a.hvc();
    a.place(reset);
    a.mov(0, SYSTEM_RESET);
    a.hvc();
    a.place(other);
    a.ldr(8, 2, DATA, INPUT);
    a.madd(2, 2, FACTOR, 1);
    a.str(8, 2, DATA, INPUT);
    a.b(uart);
}

/// Anything unexpected prints `X`, ESR_EL1 and ends the machine.
fn exceptions(a: &mut Asm, r: &Routines) {
    a.place(r.bad);
    a.mov(0, b'X'.into());
    a.bl(r.putc);
    a.mrs(0, ESR_EL1);
    a.mov(1, 8);
    a.bl(r.hex);
    a.place(r.off);
    a.mov(0, SYSTEM_OFF);
    a.hvc();
    // Nothing comes back from there.
    let stuck = a.here();
    a.b(stuck);
}

/// 16 vectors of 128 bytes; IRQ from the current level with SP_EL1 is the one that is expected.
fn vectors(a: &mut Asm, r: &Routines) {
    a.align(0x800);
    a.place(r.vectors);
    for vector in 0..16 {
        a.b(if vector == 5 { r.irq } else { r.bad });
        a.align(0x80);
    }
}
