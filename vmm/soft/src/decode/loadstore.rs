//! Loads and stores (Arm ARM C4.1.94).

use super::{bit, destination, field, or_sp, signed, source};
use crate::{
    exec::{
        atomic,
        loadstore::{
            BY_SP, INDEX, INDEX_SXTW, INDEX_UXTW, OFFSET, POST, PRE, Sb32, Sb64, Sh32, Sh64, Sw64,
            UNPRIVILEGED, ldp, ldp_v, ldr, ldr_literal, ldr_v, ldr_v_literal, stp, stp_v, str,
            str_v,
        },
        system::nop,
        vector_mem,
    },
    op::{Exec, Op},
    regs::SP,
};

pub(super) fn decode(insn: u32) -> Option<Op> {
    match (field(insn, 28, 2), bit(insn, 26)) {
        (0b00, true) => vector_structures(insn),
        (0b00, false) => exclusive(insn),
        (0b01, _) => literal(insn),
        (0b10, _) => pair(insn),
        (_, _) => single(insn),
    }
}

/// Picks a function by addressing mode.
macro_rules! by_mode {
    ($mode:expr, $f:ident::<$($t:ty),*>) => {
        match $mode {
            OFFSET => $f::<$($t,)* OFFSET> as Exec,
            PRE => $f::<$($t,)* PRE>,
            POST => $f::<$($t,)* POST>,
            INDEX => $f::<$($t,)* INDEX>,
            INDEX_UXTW => $f::<$($t,)* INDEX_UXTW>,
            INDEX_SXTW => $f::<$($t,)* INDEX_SXTW>,
            UNPRIVILEGED => $f::<$($t,)* UNPRIVILEGED>,
            OFFSET_BY_SP => $f::<$($t,)* OFFSET_BY_SP>,
            PRE_BY_SP => $f::<$($t,)* PRE_BY_SP>,
            POST_BY_SP => $f::<$($t,)* POST_BY_SP>,
            INDEX_BY_SP => $f::<$($t,)* INDEX_BY_SP>,
            INDEX_UXTW_BY_SP => $f::<$($t,)* INDEX_UXTW_BY_SP>,
            INDEX_SXTW_BY_SP => $f::<$($t,)* INDEX_SXTW_BY_SP>,
            _ => $f::<$($t,)* UNPRIVILEGED_BY_SP>,
        }
    };
}

const OFFSET_BY_SP: u8 = OFFSET | BY_SP;
const PRE_BY_SP: u8 = PRE | BY_SP;
const POST_BY_SP: u8 = POST | BY_SP;
const INDEX_BY_SP: u8 = INDEX | BY_SP;
const INDEX_UXTW_BY_SP: u8 = INDEX_UXTW | BY_SP;
const INDEX_SXTW_BY_SP: u8 = INDEX_SXTW | BY_SP;
const UNPRIVILEGED_BY_SP: u8 = UNPRIVILEGED | BY_SP;

/// `mode` for the base in slot `base`.
fn by_base(mode: u8, base: u8) -> u8 {
    if base == SP { mode | BY_SP } else { mode }
}

/// Load/store register in all forms but literal.
fn single(insn: u32) -> Option<Op> {
    let (size, vector, opc) = (field(insn, 30, 2), bit(insn, 26), field(insn, 22, 2));
    let scale = if vector { (opc & 2) << 1 | size } else { size };
    let op = Op::new(nop);
    let (mode, op) = if bit(insn, 24) {
        (OFFSET, op.imm(u64::from(field(insn, 10, 12)) << scale))
    } else if !bit(insn, 21) {
        let imm = signed(insn, 12, 9) as u64;
        let mode = match field(insn, 10, 2) {
            0 => OFFSET,
            1 => POST,
            2 if vector => return None,
            2 => UNPRIVILEGED,
            _ => PRE,
        };
        (mode, op.imm(imm))
    } else {
        match field(insn, 10, 2) {
            0b10 => {
                let mode = match field(insn, 13, 3) {
                    2 => INDEX_UXTW,
                    3 | 7 => INDEX,
                    6 => INDEX_SXTW,
                    _ => return None,
                };
                let shift = if bit(insn, 12) { scale } else { 0 };
                let mut op = op.d(shift as u8);
                op.c = source(insn, 16);
                (mode, op)
            }
            0b00 if !vector => return lse(insn),
            _ => return None,
        }
    };
    let mut op = op;
    op.b = or_sp(insn, 5);
    let by = by_base(mode, op.b);
    if vector {
        op.a = field(insn, 0, 5) as u8;
        if scale > 4 {
            return None;
        }
        op.exec = match (scale, opc & 1) {
            (0, 0) => by_mode!(by, str_v::<u8>),
            (1, 0) => by_mode!(by, str_v::<u16>),
            (2, 0) => by_mode!(by, str_v::<u32>),
            (3, 0) => by_mode!(by, str_v::<u64>),
            (_, 0) => by_mode!(by, str_v::<u128>),
            (0, _) => by_mode!(by, ldr_v::<u8>),
            (1, _) => by_mode!(by, ldr_v::<u16>),
            (2, _) => by_mode!(by, ldr_v::<u32>),
            (3, _) => by_mode!(by, ldr_v::<u64>),
            (_, _) => by_mode!(by, ldr_v::<u128>),
        };
        return Some(op);
    }
    op.a = if opc == 0 { source(insn, 0) } else { destination(insn, 0) };
    op.exec = match (size, opc) {
        (0, 0) => by_mode!(by, str::<u8>),
        (1, 0) => by_mode!(by, str::<u16>),
        (2, 0) => by_mode!(by, str::<u32>),
        (3, 0) => by_mode!(by, str::<u64>),
        (0, 1) => by_mode!(by, ldr::<u8>),
        (1, 1) => by_mode!(by, ldr::<u16>),
        (2, 1) => by_mode!(by, ldr::<u32>),
        (3, 1) => by_mode!(by, ldr::<u64>),
        (0, 2) => by_mode!(by, ldr::<Sb64>),
        (1, 2) => by_mode!(by, ldr::<Sh64>),
        (2, 2) => by_mode!(by, ldr::<Sw64>),
        (0, 3) => by_mode!(by, ldr::<Sb32>),
        (1, 3) => by_mode!(by, ldr::<Sh32>),
        // PRFM has no write-back and no unprivileged form.
        (3, 2) if !matches!(mode, PRE | POST | UNPRIVILEGED) => nop,
        _ => return None,
    };
    Some(op)
}

fn literal(insn: u32) -> Option<Op> {
    if bit(insn, 24) {
        return None;
    }
    let imm = (signed(insn, 5, 19) * 4) as u64;
    let opc = field(insn, 30, 2);
    let (exec, a): (Exec, u8) = if bit(insn, 26) {
        let exec: Exec = match opc {
            0 => ldr_v_literal::<u32>,
            1 => ldr_v_literal::<u64>,
            2 => ldr_v_literal::<u128>,
            _ => return None,
        };
        (exec, field(insn, 0, 5) as u8)
    } else {
        let exec: Exec = match opc {
            0 => ldr_literal::<u32>,
            1 => ldr_literal::<u64>,
            2 => ldr_literal::<Sw64>,
            _ => nop,
        };
        (exec, destination(insn, 0))
    };
    Some(Op::new(exec).imm(imm).regs(a, 0, 0))
}

fn pair(insn: u32) -> Option<Op> {
    let (opc, load) = (field(insn, 30, 2), bit(insn, 22));
    // 00 is the non-temporal form of a plain offset.
    let mode = match field(insn, 23, 2) {
        0b00 | 0b10 => OFFSET,
        0b01 => POST,
        _ => PRE,
    };
    let no_allocate = field(insn, 23, 2) == 0;
    let imm = signed(insn, 15, 7);
    let base = or_sp(insn, 5);
    macro_rules! of_mode {
        ($f:ident::<$($t:tt),*>) => {
            match by_base(mode, base) {
                OFFSET => $f::<$($t,)* OFFSET> as Exec,
                PRE => $f::<$($t,)* PRE>,
                POST => $f::<$($t,)* POST>,
                OFFSET_BY_SP => $f::<$($t,)* OFFSET_BY_SP>,
                PRE_BY_SP => $f::<$($t,)* PRE_BY_SP>,
                _ => $f::<$($t,)* POST_BY_SP>,
            }
        };
    }
    if bit(insn, 26) {
        let exec = match (opc, load) {
            (0, false) => of_mode!(stp_v::<u32>),
            (1, false) => of_mode!(stp_v::<u64>),
            (2, false) => of_mode!(stp_v::<u128>),
            (0, true) => of_mode!(ldp_v::<u32>),
            (1, true) => of_mode!(ldp_v::<u64>),
            (2, true) => of_mode!(ldp_v::<u128>),
            _ => return None,
        };
        let (first, second) = (field(insn, 0, 5) as u8, field(insn, 10, 5) as u8);
        let op = Op::new(exec).imm((imm << (2 + opc)) as u64);
        return Some(op.regs(first, base, second));
    }
    let exec = match (opc, load) {
        (0, false) => of_mode!(stp::<false>),
        (2, false) => of_mode!(stp::<true>),
        (0, true) => of_mode!(ldp::<false, false>),
        (1, true) if !no_allocate => of_mode!(ldp::<false, true>),
        (2, true) => of_mode!(ldp::<true, false>),
        _ => return None,
    };
    let scale = if opc == 2 { 3 } else { 2 };
    let (first, second) = if load {
        (destination(insn, 0), destination(insn, 10))
    } else {
        (source(insn, 0), source(insn, 10))
    };
    Some(Op::new(exec).imm((imm << scale) as u64).regs(first, base, second))
}

/// Picks a function by the size of what it works on.
macro_rules! by_size {
    ($size:expr, $($f:ident)::+ $(, $c:literal)?) => {
        match $size {
            0 => $($f)::+::<u8 $(, $c)?> as Exec,
            1 => $($f)::+::<u16 $(, $c)?>,
            2 => $($f)::+::<u32 $(, $c)?>,
            _ => $($f)::+::<u64 $(, $c)?>,
        }
    };
}

/// Exclusives, ordered accesses, compare and swap.
fn exclusive(insn: u32) -> Option<Op> {
    if bit(insn, 24) {
        // LDAPUR and kin (FEAT_LRCPC2) and memory tags are not implemented.
        return None;
    }
    let size = field(insn, 30, 2);
    let (o2, load, o1) = (bit(insn, 23), bit(insn, 22), bit(insn, 21));
    let base = or_sp(insn, 5);
    let bytes = 1u8 << size;
    if !o2 {
        if o1 && size < 2 {
            // CASP of W (size 0) or X (size 1) registers, which come in even pairs.
            let (rs, rt) = (field(insn, 16, 5) as u8, field(insn, 0, 5) as u8);
            if field(insn, 10, 5) != 31 || (rs | rt) & 1 != 0 {
                return None;
            }
            let exec: Exec = if size == 1 { atomic::casp::<true> } else { atomic::casp::<false> };
            return Some(Op::new(exec).regs(rs, base, 0).d(rt));
        }
        if load {
            let exec: Exec = if o1 { atomic::ldxr::<true> } else { atomic::ldxr::<false> };
            let op = Op::new(exec).regs(destination(insn, 0), base, destination(insn, 10));
            return Some(op.d(bytes));
        }
        let exec: Exec = if o1 { atomic::stxr::<true> } else { atomic::stxr::<false> };
        let op = Op::new(exec).regs(source(insn, 0), base, destination(insn, 16));
        let mut op = op.d(bytes);
        op.aux = u16::from(source(insn, 10));
        return Some(op);
    }
    if o1 {
        if field(insn, 10, 5) != 31 {
            return None;
        }
        let exec = by_size!(size, atomic::cas);
        // The comparand is read from Rs, which then gets the old value.
        let op = Op::new(exec).regs(destination(insn, 16), base, source(insn, 16));
        return Some(op.d(source(insn, 0)));
    }
    if !bit(insn, 15) {
        // LDLAR and STLLR (FEAT_LOR) are not implemented.
        return None;
    }
    if load {
        let exec = by_size!(size, atomic::ldar);
        Some(Op::new(exec).regs(destination(insn, 0), base, 0))
    } else {
        let exec = by_size!(size, atomic::stlr);
        Some(Op::new(exec).regs(source(insn, 0), base, 0))
    }
}

/// Atomic memory operations (FEAT_LSE).
fn lse(insn: u32) -> Option<Op> {
    let size = field(insn, 30, 2);
    let (rs, opc) = (source(insn, 16), field(insn, 12, 3));
    let exec = if bit(insn, 15) {
        // Only SWP; LDAPR and the 64-byte forms are not implemented.
        if opc != 0 {
            return None;
        }
        by_size!(size, atomic::swp)
    } else {
        match opc {
            0 => by_size!(size, atomic::lse, 0),
            1 => by_size!(size, atomic::lse, 1),
            2 => by_size!(size, atomic::lse, 2),
            3 => by_size!(size, atomic::lse, 3),
            4 => by_size!(size, atomic::lse, 4),
            5 => by_size!(size, atomic::lse, 5),
            6 => by_size!(size, atomic::lse, 6),
            _ => by_size!(size, atomic::lse, 7),
        }
    };
    Some(Op::new(exec).regs(destination(insn, 0), or_sp(insn, 5), rs))
}

fn vector_structures(insn: u32) -> Option<Op> {
    if bit(insn, 31) {
        return None;
    }
    let post = bit(insn, 23);
    if !post && field(insn, 16, 5) != 0 {
        return None;
    }
    let exec: Exec = if bit(insn, 24) {
        let (opcode, size, s) = (field(insn, 13, 3), field(insn, 10, 2), bit(insn, 12));
        let valid = match opcode >> 1 {
            0 => true,
            1 => size & 1 == 0,
            2 => size == 0 || (size == 1 && !s),
            _ => bit(insn, 22) && !s,
        };
        if !valid {
            return None;
        }
        vector_mem::single
    } else {
        if bit(insn, 21) {
            return None;
        }
        let opcode = field(insn, 12, 4);
        if !matches!(opcode, 0 | 2 | 4 | 6 | 7 | 8 | 10) {
            return None;
        }
        // One-lane structures of 64-bit elements exist for LD1 and ST1 only.
        let one_register = matches!(opcode, 2 | 6 | 7 | 10);
        if field(insn, 10, 2) == 3 && !bit(insn, 30) && !one_register {
            return None;
        }
        vector_mem::multiple
    };
    Some(Op::new(exec).word(insn).imm(u64::from(post)))
}
