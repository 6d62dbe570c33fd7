//! A mini assembler: the few A64 instructions that the tiny guest needs (encodings of the Arm ARM, C6).

/// A general register by number; 31 is the zero register or SP, as the instruction says.
pub(super) type R = u32;
/// The zero register.
pub(super) const ZR: R = 31;
/// The stack pointer, where the instruction takes it.
pub(super) const SP: R = 31;
/// The link register.
pub(super) const LR: R = 30;

/// Condition codes of B.cond.
pub(super) const EQ: u32 = 0;
/// Not equal.
pub(super) const NE: u32 = 1;

/// A place in the program.
#[derive(Clone, Copy)]
pub(super) struct Label(usize);

enum Fixup {
    /// imm26 of B and BL.
    Imm26,
    /// imm19 of B.cond and CBZ.
    Imm19,
    /// imm14 of TBZ.
    Imm14,
    /// immhi:immlo of ADR.
    Adr,
}

/// A program that grows word by word.
#[derive(Default)]
pub(super) struct Asm {
    words: Vec<u32>,
    labels: Vec<Option<usize>>,
    fixups: Vec<(usize, Label, Fixup)>,
}

impl Asm {
    /// A label to be placed later.
    pub(super) fn label(&mut self) -> Label {
        self.labels.push(None);
        Label(self.labels.len() - 1)
    }

    /// Places a label here.
    pub(super) fn place(&mut self, label: Label) {
        assert!(self.labels[label.0].is_none(), "a label is placed once");
        self.labels[label.0] = Some(self.words.len());
    }

    /// Makes a label and places it here.
    pub(super) fn here(&mut self) -> Label {
        let label = self.label();
        self.place(label);
        label
    }

    /// Fills with zero words up to a multiple of `bytes`.
    pub(super) fn align(&mut self, bytes: usize) {
        while !(self.words.len() * 4).is_multiple_of(bytes) {
            self.word(0);
        }
    }

    /// One word, an instruction or data.
    pub(super) fn word(&mut self, word: u32) {
        self.words.push(word);
    }

    /// Two words, little-endian.
    pub(super) fn quad(&mut self, value: u64) {
        self.word(value as u32);
        self.word((value >> 32) as u32);
    }

    /// The program's bytes, with every branch resolved.
    pub(super) fn finish(mut self) -> Vec<u8> {
        for (at, label, fixup) in &self.fixups {
            let target = self.labels[label.0].expect("every label is placed");
            let words = target as i64 - *at as i64;
            let (bits, shift, value) = match fixup {
                Fixup::Imm26 => (26, 0, words),
                Fixup::Imm19 => (19, 5, words),
                Fixup::Imm14 => (14, 5, words),
                // Labels are word-aligned, so immlo is zero.
                Fixup::Adr => (19, 5, words),
            };
            assert!(value >= -(1 << (bits - 1)) && value < 1 << (bits - 1), "a branch too far");
            self.words[*at] |= (value as u32 & ((1 << bits) - 1)) << shift;
        }
        self.words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    fn fixed(&mut self, word: u32, label: Label, fixup: Fixup) {
        self.fixups.push((self.words.len(), label, fixup));
        self.word(word);
    }

    /// MOVZ and MOVK: any 64-bit constant.
    pub(super) fn mov(&mut self, d: R, value: u64) {
        self.word(0xd280_0000 | (value as u32 & 0xffff) << 5 | d);
        for half in 1..4 {
            let part = (value >> (16 * half)) as u32 & 0xffff;
            if part != 0 {
                self.word(0xf280_0000 | half << 21 | part << 5 | d);
            }
        }
    }

    /// MOV between registers.
    pub(super) fn mov_reg(&mut self, d: R, n: R) {
        self.orr(d, ZR, n);
    }

    /// ADD immediate, 0 to 4095; takes SP.
    pub(super) fn add_imm(&mut self, d: R, n: R, imm: u32) {
        self.word(0x9100_0000 | imm12(imm) | n << 5 | d);
    }

    /// SUB immediate, 0 to 4095; takes SP.
    pub(super) fn sub_imm(&mut self, d: R, n: R, imm: u32) {
        self.word(0xd100_0000 | imm12(imm) | n << 5 | d);
    }

    /// CMP with an immediate, 0 to 4095.
    pub(super) fn cmp_imm(&mut self, n: R, imm: u32) {
        self.word(0xf100_0000 | imm12(imm) | n << 5 | ZR);
    }

    /// CMP of registers.
    pub(super) fn cmp(&mut self, n: R, m: R) {
        self.word(0xeb00_0000 | m << 16 | n << 5 | ZR);
    }

    /// ADD of registers.
    pub(super) fn add(&mut self, d: R, n: R, m: R) {
        self.word(0x8b00_0000 | m << 16 | n << 5 | d);
    }

    /// ORR of registers.
    pub(super) fn orr(&mut self, d: R, n: R, m: R) {
        self.word(0xaa00_0000 | m << 16 | n << 5 | d);
    }

    /// EOR of registers.
    pub(super) fn eor(&mut self, d: R, n: R, m: R) {
        self.word(0xca00_0000 | m << 16 | n << 5 | d);
    }

    /// MADD: d = a + n * m.
    pub(super) fn madd(&mut self, d: R, n: R, m: R, a: R) {
        self.word(0x9b00_0000 | m << 16 | a << 10 | n << 5 | d);
    }

    /// MSUB: d = a - n * m.
    pub(super) fn msub(&mut self, d: R, n: R, m: R, a: R) {
        self.word(0x9b00_8000 | m << 16 | a << 10 | n << 5 | d);
    }

    /// UDIV.
    pub(super) fn udiv(&mut self, d: R, n: R, m: R) {
        self.word(0x9ac0_0800 | m << 16 | n << 5 | d);
    }

    /// UBFX: `width` bits of n from `lsb` on.
    pub(super) fn ubfx(&mut self, d: R, n: R, lsb: u32, width: u32) {
        self.word(0xd340_0000 | lsb << 16 | (lsb + width - 1) << 10 | n << 5 | d);
    }

    /// LSL by a constant, 1 to 63.
    pub(super) fn lsl(&mut self, d: R, n: R, by: u32) {
        self.word(0xd340_0000 | (64 - by) << 16 | (63 - by) << 10 | n << 5 | d);
    }

    /// ROR by a constant, 0 to 63.
    pub(super) fn ror(&mut self, d: R, n: R, by: u32) {
        self.word(0x93c0_0000 | n << 16 | by << 10 | n << 5 | d);
    }

    /// LDR of 1, 2, 4 or 8 bytes at n + offset, which is a multiple of the size.
    pub(super) fn ldr(&mut self, size: u32, t: R, n: R, offset: u32) {
        self.word(size_bits(size) | 0x3940_0000 | imm12(offset / size) | n << 5 | t);
    }

    /// STR of 1, 2, 4 or 8 bytes at n + offset, which is a multiple of the size.
    pub(super) fn str(&mut self, size: u32, t: R, n: R, offset: u32) {
        self.word(size_bits(size) | 0x3900_0000 | imm12(offset / size) | n << 5 | t);
    }

    /// LDR of 8 bytes at n + m.
    pub(super) fn ldr_index(&mut self, t: R, n: R, m: R) {
        self.word(0xf860_6800 | m << 16 | n << 5 | t);
    }

    /// STR of 8 bytes at n + m.
    pub(super) fn str_index(&mut self, t: R, n: R, m: R) {
        self.word(0xf820_6800 | m << 16 | n << 5 | t);
    }

    /// STR of 2 bytes at n + m.
    pub(super) fn strh_index(&mut self, t: R, n: R, m: R) {
        self.word(0x7820_6800 | m << 16 | n << 5 | t);
    }

    /// STP of two registers, 16 bytes below SP, which moves there.
    pub(super) fn push(&mut self, t: R, t2: R) {
        self.word(0xa9bf_0000 | t2 << 10 | SP << 5 | t);
    }

    /// LDP of two registers at SP, which moves up.
    pub(super) fn pop(&mut self, t: R, t2: R) {
        self.word(0xa8c1_0000 | t2 << 10 | SP << 5 | t);
    }

    /// LDXR of 8 bytes.
    pub(super) fn ldxr(&mut self, t: R, n: R) {
        self.word(0xc85f_7c00 | n << 5 | t);
    }

    /// STXR of 8 bytes; s becomes 0 if it was stored.
    pub(super) fn stxr(&mut self, s: R, t: R, n: R) {
        self.word(0xc800_7c00 | s << 16 | n << 5 | t);
    }

    /// ADR.
    pub(super) fn adr(&mut self, d: R, label: Label) {
        self.fixed(0x1000_0000 | d, label, Fixup::Adr);
    }

    /// B.
    pub(super) fn b(&mut self, label: Label) {
        self.fixed(0x1400_0000, label, Fixup::Imm26);
    }

    /// BL.
    pub(super) fn bl(&mut self, label: Label) {
        self.fixed(0x9400_0000, label, Fixup::Imm26);
    }

    /// RET.
    pub(super) fn ret(&mut self) {
        self.word(0xd65f_03c0);
    }

    /// RET to another register.
    pub(super) fn ret_to(&mut self, n: R) {
        self.word(0xd65f_0000 | n << 5);
    }

    /// B.cond.
    pub(super) fn b_if(&mut self, condition: u32, label: Label) {
        self.fixed(0x5400_0000 | condition, label, Fixup::Imm19);
    }

    /// CBZ.
    pub(super) fn cbz(&mut self, t: R, label: Label) {
        self.fixed(0xb400_0000 | t, label, Fixup::Imm19);
    }

    /// CBNZ.
    pub(super) fn cbnz(&mut self, t: R, label: Label) {
        self.fixed(0xb500_0000 | t, label, Fixup::Imm19);
    }

    /// TBZ of a bit below 32.
    pub(super) fn tbz(&mut self, t: R, bit: u32, label: Label) {
        self.fixed(0x3600_0000 | bit << 19 | t, label, Fixup::Imm14);
    }

    /// TBNZ of a bit below 32.
    pub(super) fn tbnz(&mut self, t: R, bit: u32, label: Label) {
        self.fixed(0x3700_0000 | bit << 19 | t, label, Fixup::Imm14);
    }

    /// MSR of a system register, packed as op0:op1:CRn:CRm:op2.
    pub(super) fn msr(&mut self, reg: u16, t: R) {
        self.word(0xd500_0000 | u32::from(reg) << 5 | t);
    }

    /// MRS.
    pub(super) fn mrs(&mut self, t: R, reg: u16) {
        self.word(0xd520_0000 | u32::from(reg) << 5 | t);
    }

    /// MSR DAIFSet, I: interrupts off.
    pub(super) fn irq_off(&mut self) {
        self.word(0xd503_42df);
    }

    /// MSR DAIFClr, I: interrupts on.
    pub(super) fn irq_on(&mut self) {
        self.word(0xd503_42ff);
    }

    /// ISB.
    pub(super) fn isb(&mut self) {
        self.word(0xd503_3fdf);
    }

    /// DSB SY.
    pub(super) fn dsb(&mut self) {
        self.word(0xd503_3f9f);
    }

    /// TLBI VMALLE1.
    pub(super) fn tlbi_all(&mut self) {
        self.word(0xd508_871f);
    }

    /// WFI.
    pub(super) fn wfi(&mut self) {
        self.word(0xd503_207f);
    }

    /// ERET.
    pub(super) fn eret(&mut self) {
        self.word(0xd69f_03e0);
    }

    /// HVC #0.
    pub(super) fn hvc(&mut self) {
        self.word(0xd400_0002);
    }

    /// FMOV of a general register to D.
    pub(super) fn fmov_to(&mut self, d: u32, n: R) {
        self.word(0x9e67_0000 | n << 5 | d);
    }

    /// FMOV of D to a general register.
    pub(super) fn fmov_from(&mut self, d: R, n: u32) {
        self.word(0x9e66_0000 | n << 5 | d);
    }

    /// UCVTF of a general register to D.
    pub(super) fn ucvtf(&mut self, d: u32, n: R) {
        self.word(0x9e63_0000 | n << 5 | d);
    }

    /// FSQRT of D.
    pub(super) fn fsqrt(&mut self, d: u32, n: u32) {
        self.word(0x1e61_c000 | n << 5 | d);
    }

    /// ADD of 2D vectors.
    pub(super) fn add_2d(&mut self, d: u32, n: u32, m: u32) {
        self.word(0x4ee0_8400 | m << 16 | n << 5 | d);
    }
}

fn imm12(imm: u32) -> u32 {
    assert!(imm < 1 << 12, "an immediate of more than 12 bits");
    imm << 10
}

/// Bits 31 and 30 of a load or store.
fn size_bits(size: u32) -> u32 {
    size.trailing_zeros() << 30
}
