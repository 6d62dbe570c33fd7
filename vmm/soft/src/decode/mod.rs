//! From instruction words to ops (Arm ARM C4.1, A64 instruction set encoding).

mod branch;
mod data;
mod loadstore;

use crate::{
    exec::{branch::leave_block, system::undefined},
    op::{MAX_BLOCK, Op},
    regs::{SINK, SP, ZERO},
};

/// Decodes the block that begins with `words`, of which there are at most [`MAX_BLOCK`]: up to the
/// first instruction that always leaves it, then one op more that leads to what follows.
/// `offset` is where the first word lies in its page.
pub(crate) fn block(words: &[u32], offset: u16) -> Vec<Op> {
    debug_assert!(!words.is_empty() && words.len() <= MAX_BLOCK);
    let mut ops = Vec::with_capacity(16);
    for &word in words {
        let (op, ends) = match instruction(word) {
            Some(Decoded { op, ends }) => (op, ends),
            None => (Op::new(undefined).word(word), true),
        };
        ops.push(op);
        if ends {
            break;
        }
    }
    let count = ops.len() as u8;
    for (n, op) in (0u8..).zip(&mut ops) {
        op.idx = n;
        op.rem = count - 1 - n;
    }
    let mut last = Op::new(leave_block);
    last.idx = count;
    last.aux = offset;
    ops.push(last);
    ops
}

/// One instruction, and whether it always leaves its block.
struct Decoded {
    op: Op,
    ends: bool,
}

impl From<Op> for Decoded {
    fn from(op: Op) -> Self {
        Self { op, ends: false }
    }
}

fn ends(op: Op) -> Decoded {
    Decoded { op, ends: true }
}

/// Decodes one word; `None` if it is unallocated or belongs to a feature that is not advertised.
fn instruction(insn: u32) -> Option<Decoded> {
    match insn >> 25 & 15 {
        0b1000 | 0b1001 => data::immediate(insn).map(Decoded::from),
        0b1010 | 0b1011 => branch::decode(insn),
        0b0101 | 0b1101 => data::register(insn).map(Decoded::from),
        0b0111 | 0b1111 => {
            let f = crate::simd::decode(insn)?;
            Some(Op::new(crate::exec::system::simd).imm(f as usize as u64).word(insn).into())
        }
        group if group & 0b0101 == 0b0100 => loadstore::decode(insn).map(Decoded::from),
        _ => None,
    }
}

/// Bits `low` to `low + width - 1`.
fn field(insn: u32, low: u32, width: u32) -> u32 {
    insn >> low & ((1 << width) - 1)
}

/// One bit.
fn bit(insn: u32, n: u32) -> bool {
    insn >> n & 1 != 0
}

/// A field as a signed number.
fn signed(insn: u32, low: u32, width: u32) -> i64 {
    i64::from((insn << (32 - low - width)) as i32 >> (32 - width))
}

/// Slot of a source register where 31 is the zero register.
fn source(insn: u32, low: u32) -> u8 {
    const { assert!(ZERO == 31) };
    field(insn, low, 5) as u8
}

/// Slot of a destination register where 31 is the zero register.
fn destination(insn: u32, low: u32) -> u8 {
    match field(insn, low, 5) as u8 {
        31 => SINK,
        n => n,
    }
}

/// Slot of a register where 31 is the stack pointer.
fn or_sp(insn: u32, low: u32) -> u8 {
    match field(insn, low, 5) as u8 {
        31 => SP,
        n => n,
    }
}
