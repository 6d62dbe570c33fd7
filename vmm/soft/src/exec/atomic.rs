//! Exclusives, ordered accesses and the LSE atomics.
//!
//! A store-exclusive succeeds when memory still holds what the load-exclusive saw. That is weaker
//! than a monitor (a value that went away and came back is not noticed), which no correct use of
//! exclusives can tell from an unlucky schedule.

use std::{
    ptr,
    sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, fence},
};

use portable_atomic::AtomicU128;

use crate::{
    cpu::{Cpu, Exclusive},
    debug::Watched,
    exec::loadstore::Loaded,
    mem::Width,
    op::Op,
    regs::SP,
};

/// An integer with an atomic of its size.
pub(crate) trait Atomic: Loaded {
    /// Atomically replaces the value at `host` by `f` of it; returns the old value.
    ///
    /// # Safety
    ///
    /// `host` is aligned guest RAM.
    unsafe fn update(host: *mut u8, f: impl Fn(Self) -> Self) -> Self;
    /// Atomically replaces `old` by `new`; returns what was there.
    ///
    /// # Safety
    ///
    /// `host` is aligned guest RAM.
    unsafe fn exchange_if(host: *mut u8, old: Self, new: Self) -> Self;
    /// True if `self` is less than `other` as signed numbers.
    fn less(self, other: Self) -> bool;
    /// True if `self` is less than `other` as unsigned numbers.
    fn below(self, other: Self) -> bool;
}

macro_rules! atomic {
    ($($t:ty, $s:ty, $a:ty;)*) => {$(
        impl Atomic for $t {
            #[inline(always)]
            unsafe fn update(host: *mut u8, f: impl Fn(Self) -> Self) -> Self {
                // SAFETY: promised by the caller.
                let cell = unsafe { <$a>::from_ptr(host.cast()) };
                let mut old = cell.load(Ordering::Relaxed);
                loop {
                    match cell.compare_exchange_weak(old, f(old), Ordering::SeqCst, Ordering::Relaxed) {
                        Ok(old) => return old,
                        Err(now) => old = now,
                    }
                }
            }
            #[inline(always)]
            unsafe fn exchange_if(host: *mut u8, old: Self, new: Self) -> Self {
                // SAFETY: promised by the caller.
                let cell = unsafe { <$a>::from_ptr(host.cast()) };
                match cell.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst) {
                    Ok(was) | Err(was) => was,
                }
            }
            #[inline(always)]
            fn less(self, other: Self) -> bool {
                (self as $s) < (other as $s)
            }
            #[inline(always)]
            fn below(self, other: Self) -> bool {
                self < other
            }
        }
    )*};
}
atomic! {
    u8, i8, AtomicU8;
    u16, i16, AtomicU16;
    u32, i32, AtomicU32;
    u64, i64, AtomicU64;
}

// Operations of the LSE atomics: o3 and opc of the encoding (Arm ARM C4.1.94).
const LDADD: u8 = 0;
const LDCLR: u8 = 1;
const LDEOR: u8 = 2;
const LDSET: u8 = 3;
const LDSMAX: u8 = 4;
const LDSMIN: u8 = 5;
const LDUMAX: u8 = 6;
const LDUMIN: u8 = 7;

/// LDADD and its kind: slot `c` works on memory at slot `b`, the old value goes to slot `a`.
pub(crate) unsafe fn lse<T: Atomic, const OP: u8>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    // SAFETY: `Exec`'s contract.
    let o = unsafe { &*op };
    if o.b == SP && cpu.refuse_sp(o) {
        return ptr::null();
    }
    let Ok(host) = cpu.atomic(o, cpu.r.x[o.b as usize], T::SIZE) else { return ptr::null() };
    let operand = T::from_u128(u128::from(cpu.r.x[o.c as usize]));
    let wide = operand.widen();
    let narrow = |value: u64| T::from_u128(u128::from(value));
    // SAFETY: `atomic` gives aligned RAM.
    let old = unsafe {
        T::update(host, |old| match OP {
            LDADD => narrow(old.widen().wrapping_add(wide)),
            LDCLR => narrow(old.widen() & !wide),
            LDEOR => narrow(old.widen() ^ wide),
            LDSET => narrow(old.widen() | wide),
            LDSMAX => {
                if old.less(operand) {
                    operand
                } else {
                    old
                }
            }
            LDSMIN => {
                if operand.less(old) {
                    operand
                } else {
                    old
                }
            }
            LDUMAX => {
                if old.below(operand) {
                    operand
                } else {
                    old
                }
            }
            LDUMIN => {
                if operand.below(old) {
                    operand
                } else {
                    old
                }
            }
            _ => old,
        })
    };
    cpu.r.x[o.a as usize] = old.widen();
    // SAFETY: another op follows.
    unsafe { op.add(1) }
}

/// SWP: slot `c` goes to memory at slot `b`, the old value to slot `a`.
pub(crate) unsafe fn swp<T: Atomic>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    // SAFETY: `Exec`'s contract.
    let o = unsafe { &*op };
    if o.b == SP && cpu.refuse_sp(o) {
        return ptr::null();
    }
    let Ok(host) = cpu.atomic(o, cpu.r.x[o.b as usize], T::SIZE) else { return ptr::null() };
    let new = T::from_u128(u128::from(cpu.r.x[o.c as usize]));
    // SAFETY: `atomic` gives aligned RAM.
    cpu.r.x[o.a as usize] = unsafe { T::update(host, |_| new) }.widen();
    // SAFETY: another op follows.
    unsafe { op.add(1) }
}

/// CAS: if memory at slot `b` is slot `c`, slot `d` goes there; the old value goes to slot `a`.
pub(crate) unsafe fn cas<T: Atomic>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    // SAFETY: `Exec`'s contract.
    let o = unsafe { &*op };
    if o.b == SP && cpu.refuse_sp(o) {
        return ptr::null();
    }
    let Ok(host) = cpu.atomic(o, cpu.r.x[o.b as usize], T::SIZE) else { return ptr::null() };
    let old = T::from_u128(u128::from(cpu.r.x[o.c as usize]));
    let new = T::from_u128(u128::from(cpu.r.x[o.d as usize]));
    // SAFETY: `atomic` gives aligned RAM.
    cpu.r.x[o.a as usize] = unsafe { T::exchange_if(host, old, new) }.widen();
    // SAFETY: another op follows.
    unsafe { op.add(1) }
}

/// CASP: as CAS with the pairs (`a`, `a` + 1) and (`d`, `d` + 1).
pub(crate) unsafe fn casp<const WIDE: bool>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    // SAFETY: `Exec`'s contract.
    let o = unsafe { &*op };
    if o.b == SP && cpu.refuse_sp(o) {
        return ptr::null();
    }
    let size = if WIDE { 16 } else { 8 };
    let Ok(host) = cpu.atomic(o, cpu.r.x[o.b as usize], size) else { return ptr::null() };
    let pair = |r: &crate::regs::Regs, n: u8| {
        let (low, high) = (r.x(u32::from(n)), r.x(u32::from(n) + 1));
        if WIDE {
            u128::from(high) << 64 | u128::from(low)
        } else {
            u128::from(high << 32 | low & 0xffff_ffff)
        }
    };
    let (old, new) = (pair(&cpu.r, o.a), pair(&cpu.r, o.d));
    // SAFETY: `atomic` gives aligned RAM.
    let was = unsafe { exchange_if(host, size as u8, old, new) };
    let (low, high) = if WIDE {
        (was as u64, (was >> 64) as u64)
    } else {
        (u64::from(was as u32), (was >> 32) as u64)
    };
    cpu.r.set_x(u32::from(o.a), low);
    cpu.r.set_x(u32::from(o.a) + 1, high);
    // SAFETY: another op follows.
    unsafe { op.add(1) }
}

/// LDAR, LDARB, LDARH (and LDLAR): slot `a` from memory at slot `b`, with acquire semantics.
pub(crate) unsafe fn ldar<T: Atomic>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    // SAFETY: `Exec`'s contract.
    let o = unsafe { &*op };
    if o.b == SP && cpu.refuse_sp(o) {
        return ptr::null();
    }
    let at = cpu.r.x[o.b as usize];
    if at & (T::SIZE - 1) != 0 {
        cpu.data_fault(o, at, crate::mmu::FSC_ALIGNMENT, false);
        return ptr::null();
    }
    let regime = cpu.regime;
    let Ok(value) = cpu.load_or_mmio::<T>(regime, o, at, o.a, T::EXTEND) else {
        return ptr::null();
    };
    fence(Ordering::SeqCst);
    cpu.r.x[o.a as usize] = value.widen();
    // SAFETY: another op follows.
    unsafe { op.add(1) }
}

/// STLR, STLRB, STLRH (and STLLR): slot `a` to memory at slot `b`, with release semantics.
pub(crate) unsafe fn stlr<T: Atomic>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    // SAFETY: `Exec`'s contract.
    let o = unsafe { &*op };
    if o.b == SP && cpu.refuse_sp(o) {
        return ptr::null();
    }
    let at = cpu.r.x[o.b as usize];
    if at & (T::SIZE - 1) != 0 {
        cpu.data_fault(o, at, crate::mmu::FSC_ALIGNMENT, true);
        return ptr::null();
    }
    fence(Ordering::SeqCst);
    let value = T::from_u128(u128::from(cpu.r.x[o.a as usize]));
    let regime = cpu.regime;
    if cpu.store_in(regime, o, at, value, true).is_err() {
        return ptr::null();
    }
    fence(Ordering::SeqCst);
    // SAFETY: another op follows.
    unsafe { op.add(1) }
}

/// LDXR, LDAXR and with PAIR LDXP, LDAXP: `d` is the size of one register in bytes.
pub(crate) unsafe fn ldxr<const PAIR: bool>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    // SAFETY: `Exec`'s contract.
    let o = unsafe { &*op };
    if o.b == SP && cpu.refuse_sp(o) {
        return ptr::null();
    }
    let at = cpu.r.x[o.b as usize];
    let size = if PAIR { o.d * 2 } else { o.d };
    if at & u64::from(size - 1) != 0 {
        cpu.data_fault(o, at, crate::mmu::FSC_ALIGNMENT, false);
        return ptr::null();
    }
    let loaded = match size {
        1 => cpu.load::<u8>(o, at).map(u128::from),
        2 => cpu.load::<u16>(o, at).map(u128::from),
        4 => cpu.load::<u32>(o, at).map(u128::from),
        8 => cpu.load::<u64>(o, at).map(u128::from),
        // Both halves must be seen at once.
        _ => cpu.load::<u128>(o, at).map(|value| {
            match cpu.known_read(cpu.regime, at, Width { size: 16, align: 16 }) {
                // SAFETY: aligned RAM, as the check above and a matching entry say.
                Some(host) => unsafe { AtomicU128::from_ptr(host.cast()) }.load(Ordering::SeqCst),
                None => value,
            }
        }),
    };
    let Ok(value) = loaded else { return ptr::null() };
    fence(Ordering::SeqCst);
    cpu.exclusive = Some(Exclusive { address: at, size, value });
    cpu.stepped_exclusive = true;
    if PAIR {
        let bits = u32::from(o.d) * 8;
        cpu.r.x[o.a as usize] = value as u64 & u64::MAX >> (64 - bits);
        cpu.r.x[o.c as usize] = (value >> bits) as u64;
    } else {
        cpu.r.x[o.a as usize] = value as u64;
    }
    // SAFETY: another op follows.
    unsafe { op.add(1) }
}

/// STXR, STLXR and with PAIR STXP, STLXP: slot `a` (and slot number `aux`) to memory at slot `b`;
/// slot `c` gets 0 for success and 1 for failure; `d` is the size of one register in bytes.
pub(crate) unsafe fn stxr<const PAIR: bool>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    // SAFETY: `Exec`'s contract.
    let o = unsafe { &*op };
    if o.b == SP && cpu.refuse_sp(o) {
        return ptr::null();
    }
    let at = cpu.r.x[o.b as usize];
    let size = if PAIR { o.d * 2 } else { o.d };
    let Ok(host) = cpu.atomic_in(o, at, u64::from(size), Watched::Store) else {
        return ptr::null();
    };
    let first = u128::from(cpu.r.x[o.a as usize]);
    let new = if PAIR {
        let bits = u32::from(o.d) * 8;
        let second = u128::from(cpu.r.x[usize::from(o.aux as u8)]);
        if bits == 64 {
            second << 64 | first
        } else {
            (second << 32 | first & 0xffff_ffff) as u64 as u128
        }
    } else {
        first
    };
    let done = match cpu.exclusive.take() {
        Some(seen) if seen.address == at && seen.size == size => {
            // SAFETY: `atomic` gives aligned RAM.
            unsafe { exchange_if(host, size, seen.value, new) == seen.value }
        }
        _ => false,
    };
    cpu.r.x[o.c as usize] = u64::from(!done);
    // SAFETY: another op follows.
    unsafe { op.add(1) }
}

/// Atomically replaces `old` by `new`, `size` bytes; returns what was there.
///
/// # Safety
///
/// `host` is aligned guest RAM of `size` bytes.
unsafe fn exchange_if(host: *mut u8, size: u8, old: u128, new: u128) -> u128 {
    // SAFETY: promised by the caller.
    unsafe {
        match size {
            1 => u128::from(u8::exchange_if(host, old as u8, new as u8)),
            2 => u128::from(u16::exchange_if(host, old as u16, new as u16)),
            4 => u128::from(u32::exchange_if(host, old as u32, new as u32)),
            8 => u128::from(u64::exchange_if(host, old as u64, new as u64)),
            _ => {
                let cell = AtomicU128::from_ptr(host.cast());
                match cell.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst) {
                    Ok(was) | Err(was) => was,
                }
            }
        }
    }
}
