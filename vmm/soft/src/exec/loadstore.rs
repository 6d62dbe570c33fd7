//! Loads and stores of general registers and of one or two FP and SIMD registers.

use std::ptr;

use crate::{
    cpu::Cpu,
    mem::{Extend, Scalar, Stopped},
    mmu::Access,
    op::Op,
    regs::Regs,
    tlb::Regime,
};

/// Address: slot `b` plus `imm`.
pub(crate) const OFFSET: u8 = 0;
/// Address: slot `b` plus `imm`, which is written back.
pub(crate) const PRE: u8 = 1;
/// Address: slot `b`; `imm` is added to it afterwards.
pub(crate) const POST: u8 = 2;
/// Address: slot `b` plus slot `c` shifted left by `d`.
pub(crate) const INDEX: u8 = 3;
/// Address: slot `b` plus slot `c`, 32 bits zero-extended, shifted left by `d`.
pub(crate) const INDEX_UXTW: u8 = 4;
/// Address: slot `b` plus slot `c`, 32 bits sign-extended, shifted left by `d`.
pub(crate) const INDEX_SXTW: u8 = 5;
/// Address: slot `b` plus `imm`, with the permissions of EL0.
pub(crate) const UNPRIVILEGED: u8 = 6;

/// In a mode: slot `b` is the stack pointer, whose alignment is checked (Arm ARM, CheckSPAlignment).
pub(crate) const BY_SP: u8 = 8;

/// Address of the access and, for PRE and POST, what slot `b` becomes.
#[inline(always)]
fn address<const MODE: u8>(r: &Regs, o: &Op) -> (u64, u64) {
    let base = r.x[o.b as usize];
    let index = r.x[o.c as usize];
    let moved = match MODE & !BY_SP {
        INDEX => base.wrapping_add(index << (o.d & 7)),
        INDEX_UXTW => base.wrapping_add(u64::from(index as u32) << (o.d & 7)),
        INDEX_SXTW => base.wrapping_add((index as i32 as u64) << (o.d & 7)),
        _ => base.wrapping_add(o.imm),
    };
    (if MODE & !BY_SP == POST { base } else { moved }, moved)
}

#[inline(always)]
const fn writes_back(mode: u8) -> bool {
    matches!(mode & !BY_SP, PRE | POST)
}

#[inline(always)]
fn regime<const MODE: u8>(cpu: &Cpu) -> Regime {
    if MODE & !BY_SP == UNPRIVILEGED { Regime::El0 } else { cpu.regime }
}

/// A type as it is loaded: with or without sign, into 32 or 64 bits.
pub(crate) trait Loaded: Scalar {
    const EXTEND: Extend = Extend::Zero;
    fn widen(self) -> u64;
}

macro_rules! loaded {
    ($($t:ty)*) => {$(
        impl Loaded for $t {
            #[inline(always)]
            fn widen(self) -> u64 {
                self as u64
            }
        }
    )*};
}
loaded!(u8 u16 u32 u64);

/// Loads `T` and sign-extends it to 64 bits, or to 32 with W.
macro_rules! sign_loaded {
    ($($name:ident: $u:ty as $s:ty, $to:ty, $extend:expr;)*) => {$(
        #[derive(Clone, Copy)]
        pub(crate) struct $name($u);
        impl Scalar for $name {
            const SIZE: u64 = <$u as Scalar>::SIZE;
            #[inline(always)]
            fn from_u128(value: u128) -> Self {
                Self(value as $u)
            }
            #[inline(always)]
            fn to_u128(self) -> u128 {
                u128::from(self.0)
            }
        }
        impl Loaded for $name {
            const EXTEND: Extend = $extend;
            #[inline(always)]
            fn widen(self) -> u64 {
                u64::from(self.0 as $s as $to)
            }
        }
    )*};
}
sign_loaded! {
    Sb64: u8 as i8, u64, Extend::Sign64;
    Sh64: u16 as i16, u64, Extend::Sign64;
    Sw64: u32 as i32, u64, Extend::Sign64;
    Sb32: u8 as i8, u32, Extend::Sign32;
    Sh32: u16 as i16, u32, Extend::Sign32;
}

/// LDR, LDRB, LDRSB... of one general register.
pub(crate) unsafe fn ldr<T: Loaded, const MODE: u8>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    // SAFETY: `Exec`'s contract.
    let o = unsafe { &*op };
    if MODE & BY_SP != 0 && cpu.refuse_sp(o) {
        return ptr::null();
    }
    let (at, moved) = address::<MODE>(&cpu.r, o);
    let regime = regime::<MODE>(cpu);
    // With write-back the syndrome of a device access would not describe it (ISV clear).
    let loaded = if writes_back(MODE) {
        cpu.load_in::<T>(regime, o, at)
    } else {
        cpu.load_or_mmio::<T>(regime, o, at, o.a, T::EXTEND)
    };
    let Ok(value) = loaded else { return ptr::null() };
    if writes_back(MODE) {
        cpu.r.x[o.b as usize] = moved;
    }
    cpu.r.x[o.a as usize] = value.widen();
    // SAFETY: another op follows.
    unsafe { op.add(1) }
}

/// STR, STRB, STRH of one general register.
pub(crate) unsafe fn str<T: Loaded, const MODE: u8>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    // SAFETY: `Exec`'s contract.
    let o = unsafe { &*op };
    if MODE & BY_SP != 0 && cpu.refuse_sp(o) {
        return ptr::null();
    }
    let (at, moved) = address::<MODE>(&cpu.r, o);
    let value = T::from_u128(u128::from(cpu.r.x[o.a as usize]));
    let regime = regime::<MODE>(cpu);
    if cpu.store_in(regime, o, at, value, !writes_back(MODE)).is_err() {
        return ptr::null();
    }
    if writes_back(MODE) {
        cpu.r.x[o.b as usize] = moved;
    }
    // SAFETY: another op follows.
    unsafe { op.add(1) }
}

/// LDR (literal): `imm` is relative to the instruction.
pub(crate) unsafe fn ldr_literal<T: Loaded>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    // SAFETY: `Exec`'s contract.
    let o = unsafe { &*op };
    let at = cpu.pc_of(o).wrapping_add(o.imm);
    let Ok(value) = cpu.load::<T>(o, at) else { return ptr::null() };
    cpu.r.x[o.a as usize] = value.widen();
    // SAFETY: another op follows.
    unsafe { op.add(1) }
}

/// LDP (LDPSW with SIGNED) of slots `a` and `c`: 8 bytes each with WIDE, else 4.
pub(crate) unsafe fn ldp<const WIDE: bool, const SIGNED: bool, const MODE: u8>(
    cpu: &mut Cpu,
    op: *const Op,
) -> *const Op {
    // SAFETY: `Exec`'s contract.
    let o = unsafe { &*op };
    if MODE & BY_SP != 0 && cpu.refuse_sp(o) {
        return ptr::null();
    }
    let (at, moved) = address::<MODE>(&cpu.r, o);
    let pair = if WIDE {
        cpu.load_pair::<u128>(o, at).map(|both| (both as u64, (both >> 64) as u64))
    } else {
        cpu.load_pair::<u64>(o, at).map(|both| {
            let (low, high) = (both as u32, (both >> 32) as u32);
            if SIGNED {
                (low as i32 as u64, high as i32 as u64)
            } else {
                (u64::from(low), u64::from(high))
            }
        })
    };
    let Ok((first, second)) = pair else { return ptr::null() };
    if writes_back(MODE) {
        cpu.r.x[o.b as usize] = moved;
    }
    cpu.r.x[o.a as usize] = first;
    cpu.r.x[o.c as usize] = second;
    // SAFETY: another op follows.
    unsafe { op.add(1) }
}

/// STP of slots `a` and `c`.
pub(crate) unsafe fn stp<const WIDE: bool, const MODE: u8>(
    cpu: &mut Cpu,
    op: *const Op,
) -> *const Op {
    // SAFETY: `Exec`'s contract.
    let o = unsafe { &*op };
    if MODE & BY_SP != 0 && cpu.refuse_sp(o) {
        return ptr::null();
    }
    let (at, moved) = address::<MODE>(&cpu.r, o);
    let (first, second) = (cpu.r.x[o.a as usize], cpu.r.x[o.c as usize]);
    let stored = if WIDE {
        cpu.store_pair(o, at, u128::from(second) << 64 | u128::from(first))
    } else {
        cpu.store_pair(o, at, second << 32 | first & 0xffff_ffff)
    };
    if stored.is_err() {
        return ptr::null();
    }
    if writes_back(MODE) {
        cpu.r.x[o.b as usize] = moved;
    }
    // SAFETY: another op follows.
    unsafe { op.add(1) }
}

/// LDR of V register `a`.
pub(crate) unsafe fn ldr_v<T: Scalar, const MODE: u8>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    // SAFETY: `Exec`'s contract.
    let o = unsafe { &*op };
    if cpu.fp_trap {
        return cpu.op_fp_trap(o);
    }
    if MODE & BY_SP != 0 && cpu.refuse_sp(o) {
        return ptr::null();
    }
    let (at, moved) = address::<MODE>(&cpu.r, o);
    let Ok(value) = cpu.load::<T>(o, at) else { return ptr::null() };
    if writes_back(MODE) {
        cpu.r.x[o.b as usize] = moved;
    }
    cpu.r.v[(o.a & 31) as usize] = value.to_u128();
    // SAFETY: another op follows.
    unsafe { op.add(1) }
}

/// STR of V register `a`.
pub(crate) unsafe fn str_v<T: Scalar, const MODE: u8>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    // SAFETY: `Exec`'s contract.
    let o = unsafe { &*op };
    if cpu.fp_trap {
        return cpu.op_fp_trap(o);
    }
    if MODE & BY_SP != 0 && cpu.refuse_sp(o) {
        return ptr::null();
    }
    let (at, moved) = address::<MODE>(&cpu.r, o);
    let value = T::from_u128(cpu.r.v[(o.a & 31) as usize]);
    if cpu.store(o, at, value).is_err() {
        return ptr::null();
    }
    if writes_back(MODE) {
        cpu.r.x[o.b as usize] = moved;
    }
    // SAFETY: another op follows.
    unsafe { op.add(1) }
}

/// LDR (literal) of V register `a`.
pub(crate) unsafe fn ldr_v_literal<T: Scalar>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    // SAFETY: `Exec`'s contract.
    let o = unsafe { &*op };
    if cpu.fp_trap {
        return cpu.op_fp_trap(o);
    }
    let at = cpu.pc_of(o).wrapping_add(o.imm);
    let Ok(value) = cpu.load::<T>(o, at) else { return ptr::null() };
    cpu.r.v[(o.a & 31) as usize] = value.to_u128();
    // SAFETY: another op follows.
    unsafe { op.add(1) }
}

/// LDP of V registers `a` and `c`.
pub(crate) unsafe fn ldp_v<T: Scalar, const MODE: u8>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    // SAFETY: `Exec`'s contract.
    let o = unsafe { &*op };
    if cpu.fp_trap {
        return cpu.op_fp_trap(o);
    }
    if MODE & BY_SP != 0 && cpu.refuse_sp(o) {
        return ptr::null();
    }
    let (at, moved) = address::<MODE>(&cpu.r, o);
    let Ok(first) = cpu.load::<T>(o, at) else { return ptr::null() };
    let Ok(second) = cpu.load::<T>(o, at.wrapping_add(T::SIZE)) else { return ptr::null() };
    if writes_back(MODE) {
        cpu.r.x[o.b as usize] = moved;
    }
    cpu.r.v[(o.a & 31) as usize] = first.to_u128();
    cpu.r.v[(o.c & 31) as usize] = second.to_u128();
    // SAFETY: another op follows.
    unsafe { op.add(1) }
}

/// STP of V registers `a` and `c`.
pub(crate) unsafe fn stp_v<T: Scalar, const MODE: u8>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    // SAFETY: `Exec`'s contract.
    let o = unsafe { &*op };
    if cpu.fp_trap {
        return cpu.op_fp_trap(o);
    }
    if MODE & BY_SP != 0 && cpu.refuse_sp(o) {
        return ptr::null();
    }
    let (at, moved) = address::<MODE>(&cpu.r, o);
    let first = T::from_u128(cpu.r.v[(o.a & 31) as usize]);
    let second = T::from_u128(cpu.r.v[(o.c & 31) as usize]);
    let stored =
        cpu.store(o, at, first).and_then(|()| cpu.store(o, at.wrapping_add(T::SIZE), second));
    if let Err(Stopped) = stored {
        return ptr::null();
    }
    if writes_back(MODE) {
        cpu.r.x[o.b as usize] = moved;
    }
    // SAFETY: another op follows.
    unsafe { op.add(1) }
}

/// Bytes that DC ZVA writes (DCZID_EL0.BS).
const ZVA_BLOCK: u64 = 64;

/// DC ZVA: zeroes the 64-byte block that holds the address in slot `b`.
pub(crate) unsafe fn dc_zva(cpu: &mut Cpu, op: *const Op) -> *const Op {
    // SAFETY: `Exec`'s contract.
    let o = unsafe { &*op };
    let va = cpu.r.x[o.b as usize];
    let at = va & !(ZVA_BLOCK - 1);
    // In Device memory it is an access that is not aligned.
    if cpu.fast_write(cpu.regime, at, ZVA_BLOCK).is_none()
        && cpu.page(cpu.regime, o, va, Access::Write, false).is_err()
    {
        return ptr::null();
    }
    for n in 0..4 {
        if cpu.store(o, at.wrapping_add(16 * n), 0u128).is_err() {
            return ptr::null();
        }
    }
    // SAFETY: another op follows.
    unsafe { op.add(1) }
}
