//! Decoded instructions, the form that is executed.

use crate::cpu::Cpu;

/// Carries out one decoded instruction and says which comes next: usually the following one, the
/// first of another block after a branch, or null when the run loop must take over (`Cpu::pc` is
/// then the address to go on from).
///
/// # Safety
///
/// The pointer is to a live [`Op`] inside a block; ops other than a block's last are followed by
/// another one.
pub(crate) type Exec = unsafe fn(&mut Cpu, *const Op) -> *const Op;

/// One decoded instruction. A block is a run of these that ends with one that always leaves it.
///
/// Position-independent: nothing in it depends on the virtual address at which its page is mapped.
/// Executed through raw pointers only, since a branch rewrites itself when it is linked.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Op {
    pub(crate) exec: Exec,
    /// An immediate, a displacement in bytes, a function, or the first op of a linked block.
    pub(crate) imm: u64,
    /// Destination slot, as a rule.
    pub(crate) a: u8,
    /// First source slot.
    pub(crate) b: u8,
    /// Second source slot.
    pub(crate) c: u8,
    /// Third source slot, or a small number.
    pub(crate) d: u8,
    /// Instructions of the block before this one.
    pub(crate) idx: u8,
    /// Instructions of the block behind this one.
    pub(crate) rem: u8,
    /// Offset in the page of a branch's target, bytes.
    pub(crate) aux: u16,
}

/// Most instructions in one block. Bounded so that `idx` and `rem` fit in a byte and that one block
/// is a small part of a time slice.
pub(crate) const MAX_BLOCK: usize = 64;

impl Op {
    pub(crate) fn new(exec: Exec) -> Self {
        Self { exec, imm: 0, a: 0, b: 0, c: 0, d: 0, idx: 0, rem: 0, aux: 0 }
    }

    pub(crate) fn imm(mut self, imm: u64) -> Self {
        self.imm = imm;
        self
    }

    pub(crate) fn regs(mut self, a: u8, b: u8, c: u8) -> Self {
        (self.a, self.b, self.c) = (a, b, c);
        self
    }

    pub(crate) fn d(mut self, d: u8) -> Self {
        self.d = d;
        self
    }

    /// Keeps the instruction word in the four register bytes, for functions that take it apart
    /// themselves.
    pub(crate) fn word(mut self, insn: u32) -> Self {
        [self.a, self.b, self.c, self.d] = insn.to_le_bytes();
        self
    }

    #[inline(always)]
    pub(crate) fn insn(&self) -> u32 {
        u32::from_le_bytes([self.a, self.b, self.c, self.d])
    }
}
