//! Vectors as arrays of lanes, and the loops that most instructions share.
//!
//! Lanes are read and written where the registers lie in memory: put together from the halves of a
//! `u128` they would pass through general registers one by one, and no loop would become vector code.

use std::ptr;

use crate::regs::Regs;

// Lane 0 is the low end of a register.
const _: () = assert!(cfg!(target_endian = "little"));

/// FPSR.QC: an operation has saturated.
pub(super) const FPSR_QC: u32 = 1 << 27;

/// The scalar forms have bit 28 set.
const SCALAR: u32 = 1 << 28;
/// The vector forms: 128 bits wide, or "second part" of a widening or narrowing operation.
pub(super) const Q: u32 = 1 << 30;

/// An element of a vector, as an unsigned number.
pub(super) trait Lane: Copy + Ord + Default {
    type Signed: Copy + Ord + Default;
    type Lanes: Copy + AsRef<[Self]> + AsMut<[Self]>;

    const BITS: u32;
    const COUNT: usize = 128 / Self::BITS as usize;
    const ONES: Self;
    const MIN_SIGNED: Self;
    const MAX_SIGNED: Self;

    fn split(v: &u128) -> Self::Lanes;
    fn join(lanes: Self::Lanes) -> u128;
    fn store(v: &mut u128, lanes: Self::Lanes);
    /// The low bits.
    fn from_u64(value: u64) -> Self;
    fn u64(self) -> u64;
    /// Sign-extended.
    fn i64(self) -> i64;
    fn signed(self) -> Self::Signed;
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    fn shl(self, n: u32) -> Self;
    fn ushr(self, n: u32) -> Self;
    fn sshr(self, n: u32) -> Self;
    fn leading_zeros(self) -> u32;
    /// The unsigned sum or the greatest value, and whether it saturated; likewise the next three.
    fn uqadd(self, other: Self) -> (Self, bool);
    fn sqadd(self, other: Self) -> (Self, bool);
    fn uqsub(self, other: Self) -> (Self, bool);
    fn sqsub(self, other: Self) -> (Self, bool);

    #[inline(always)]
    fn map1(a: &u128, mut f: impl FnMut(Self) -> Self) -> Self::Lanes {
        let mut a = Self::split(a);
        for a in a.as_mut() {
            *a = f(*a);
        }
        a
    }

    #[inline(always)]
    fn map2(a: &u128, b: &u128, mut f: impl FnMut(Self, Self) -> Self) -> Self::Lanes {
        let mut a = Self::split(a);
        let b = Self::split(b);
        for (a, b) in a.as_mut().iter_mut().zip(b.as_ref()) {
            *a = f(*a, *b);
        }
        a
    }

    #[inline(always)]
    fn map3(
        a: &u128,
        b: &u128,
        c: &u128,
        mut f: impl FnMut(Self, Self, Self) -> Self,
    ) -> Self::Lanes {
        let mut a = Self::split(a);
        let b = Self::split(b);
        let c = Self::split(c);
        for (a, (b, c)) in a.as_mut().iter_mut().zip(b.as_ref().iter().zip(c.as_ref())) {
            *a = f(*a, *b, *c);
        }
        a
    }

    /// All lanes equal.
    #[inline(always)]
    fn splat(self) -> u128 {
        Self::join(Self::map1(&0, |_| self))
    }

    /// Lane `index` of `v`, taken modulo the number of lanes.
    #[inline(always)]
    fn get(v: u128, index: u32) -> Self {
        Self::from_u64((v >> (index as usize % Self::COUNT * Self::BITS as usize)) as u64)
    }

    #[inline(always)]
    fn all_or_none(condition: bool) -> Self {
        if condition { Self::ONES } else { Self::default() }
    }
}

/// A lane that has lanes of twice its size.
pub(super) trait Narrow: Lane {
    type Wide: Lane;

    /// The lanes of the lower or upper halves of `a` and `b`, with those of `d`, to wide lanes.
    fn widen(
        a: &u128,
        b: &u128,
        d: &u128,
        upper: bool,
        f: impl FnMut(Self, Self, Self::Wide) -> Self::Wide,
    ) -> <Self::Wide as Lane>::Lanes;
    /// The wide lanes of `a` and `b` to narrow ones, in the lower half.
    fn narrow(a: &u128, b: &u128, f: impl FnMut(Self::Wide, Self::Wide) -> Self) -> u64;
}

macro_rules! lane {
    ($u:ident, $s:ident, $count:literal) => {
        impl Lane for $u {
            type Signed = $s;
            type Lanes = [$u; $count];

            const BITS: u32 = $u::BITS;
            const ONES: Self = $u::MAX;
            const MIN_SIGNED: Self = $s::MIN as $u;
            const MAX_SIGNED: Self = $s::MAX as $u;

            #[inline(always)]
            fn split(v: &u128) -> Self::Lanes {
                // SAFETY: 16 bytes, all values of which are lanes; u128 has the greater alignment.
                unsafe { ptr::from_ref(v).cast::<Self::Lanes>().read() }
            }

            #[inline(always)]
            fn join(lanes: Self::Lanes) -> u128 {
                let mut v = 0;
                Self::store(&mut v, lanes);
                v
            }

            #[inline(always)]
            fn store(v: &mut u128, lanes: Self::Lanes) {
                // SAFETY: as in `split`.
                unsafe { ptr::from_mut(v).cast::<Self::Lanes>().write(lanes) };
            }

            #[inline(always)]
            fn from_u64(value: u64) -> Self {
                value as $u
            }

            #[inline(always)]
            fn u64(self) -> u64 {
                self.into()
            }

            #[inline(always)]
            fn i64(self) -> i64 {
                (self as $s).into()
            }

            #[inline(always)]
            fn signed(self) -> $s {
                self as $s
            }

            #[inline(always)]
            fn add(self, other: Self) -> Self {
                self.wrapping_add(other)
            }

            #[inline(always)]
            fn sub(self, other: Self) -> Self {
                self.wrapping_sub(other)
            }

            #[inline(always)]
            fn mul(self, other: Self) -> Self {
                self.wrapping_mul(other)
            }

            #[inline(always)]
            fn shl(self, n: u32) -> Self {
                self.wrapping_shl(n)
            }

            #[inline(always)]
            fn ushr(self, n: u32) -> Self {
                self.wrapping_shr(n)
            }

            #[inline(always)]
            fn sshr(self, n: u32) -> Self {
                (self as $s).wrapping_shr(n) as $u
            }

            #[inline(always)]
            fn leading_zeros(self) -> u32 {
                <$u>::leading_zeros(self)
            }

            #[inline(always)]
            fn uqadd(self, other: Self) -> (Self, bool) {
                {
                    let sum = self.saturating_add(other);
                    (sum, sum != self.wrapping_add(other))
                }
            }

            #[inline(always)]
            fn sqadd(self, other: Self) -> (Self, bool) {
                let (a, b) = (self as $s, other as $s);
                (a.saturating_add(b) as $u, a.saturating_add(b) != a.wrapping_add(b))
            }

            #[inline(always)]
            fn uqsub(self, other: Self) -> (Self, bool) {
                {
                    let difference = self.saturating_sub(other);
                    (difference, difference != self.wrapping_sub(other))
                }
            }

            #[inline(always)]
            fn sqsub(self, other: Self) -> (Self, bool) {
                let (a, b) = (self as $s, other as $s);
                (a.saturating_sub(b) as $u, a.saturating_sub(b) != a.wrapping_sub(b))
            }
        }
    };
}

lane!(u8, i8, 16);
lane!(u16, i16, 8);
lane!(u32, i32, 4);
lane!(u64, i64, 2);

macro_rules! narrow {
    ($narrow:ident, $wide:ident) => {
        impl Narrow for $narrow {
            type Wide = $wide;

            #[inline(always)]
            fn widen(
                a: &u128,
                b: &u128,
                d: &u128,
                upper: bool,
                mut f: impl FnMut(Self, Self, $wide) -> $wide,
            ) -> <$wide as Lane>::Lanes {
                let (a, b) = ($narrow::split(a), $narrow::split(b));
                let mut d = $wide::split(d);
                // The position is known in each branch, so that both loops become vector code.
                if upper {
                    for (i, d) in d.iter_mut().enumerate() {
                        *d = f(a[i + $wide::COUNT], b[i + $wide::COUNT], *d);
                    }
                } else {
                    for (i, d) in d.iter_mut().enumerate() {
                        *d = f(a[i], b[i], *d);
                    }
                }
                d
            }

            #[inline(always)]
            fn narrow(a: &u128, b: &u128, mut f: impl FnMut($wide, $wide) -> Self) -> u64 {
                let (a, b) = ($wide::split(a), $wide::split(b));
                let mut d = $narrow::split(&0);
                for (i, d) in d[..$wide::COUNT].iter_mut().enumerate() {
                    *d = f(a[i], b[i]);
                }
                $narrow::join(d) as u64
            }
        }
    };
}

narrow!(u8, u16);
narrow!(u16, u32);
narrow!(u32, u64);

/// The functions of an instruction for lanes of 8 to 64 bits; `None` for sizes that it lacks.
macro_rules! sizes {
    (bhsd, $size:expr, $f:ident) => {
        [Some($f::<u8> as crate::simd::DataFn), Some($f::<u16>), Some($f::<u32>), Some($f::<u64>)]
            [$size as usize & 3]
    };
    (bhs, $size:expr, $f:ident) => {
        [Some($f::<u8> as crate::simd::DataFn), Some($f::<u16>), Some($f::<u32>), None]
            [$size as usize & 3]
    };
    (hs, $size:expr, $f:ident) => {
        [None, Some($f::<u16> as crate::simd::DataFn), Some($f::<u32>), None][$size as usize & 3]
    };
    (b, $size:expr, $f:ident) => {
        [Some($f as crate::simd::DataFn), None, None, None][$size as usize & 3]
    };
    (d, $size:expr, $f:ident) => {
        [None, None, None, Some($f::<u64> as crate::simd::DataFn)][$size as usize & 3]
    };
}
pub(super) use sizes;

#[inline(always)]
pub(super) fn rd(insn: u32) -> usize {
    (insn & 31) as usize
}

#[inline(always)]
pub(super) fn rn(insn: u32) -> usize {
    (insn >> 5 & 31) as usize
}

#[inline(always)]
pub(super) fn rm(insn: u32) -> usize {
    (insn >> 16 & 31) as usize
}

/// The bits of the register that take part: one lane, 64 bits or 128 bits.
#[inline(always)]
pub(super) fn active<T: Lane>(insn: u32) -> u128 {
    if insn & SCALAR != 0 { u128::MAX >> (128 - T::BITS) } else { width(insn) }
}

/// 64 or 128 bits, by Q.
#[inline(always)]
pub(super) fn width(insn: u32) -> u128 {
    if insn & Q != 0 { u128::MAX } else { u64::MAX.into() }
}

/// The scalar form.
#[inline(always)]
pub(super) fn is_scalar(insn: u32) -> bool {
    insn & SCALAR != 0
}

/// The "2" form: a widening instruction reads upper halves, a narrowing one writes the upper half.
#[inline(always)]
pub(super) fn is_upper(insn: u32) -> bool {
    insn & (SCALAR | Q) == Q
}

/// Writes the result of a narrowing instruction: the "2" form keeps the lower half.
#[inline(always)]
pub(super) fn set_part(regs: &mut Regs, insn: u32, narrow: u64) {
    let d = &mut regs.v[rd(insn)];
    *d = if is_upper(insn) {
        *d & u128::from(u64::MAX) | u128::from(narrow) << 64
    } else {
        narrow.into()
    };
}

/// Writes the lanes that take part, and zeros above them.
#[inline(always)]
pub(super) fn put<T: Lane>(regs: &mut Regs, insn: u32, lanes: T::Lanes) {
    let d = &mut regs.v[rd(insn)];
    T::store(d, lanes);
    if insn & (SCALAR | Q) != Q {
        *d &= active::<T>(insn);
    }
}

/// Rd = f(Rn).
#[inline(always)]
pub(super) fn unary<T: Lane>(regs: &mut Regs, insn: u32, f: impl FnMut(T) -> T) {
    let lanes = T::map1(&regs.v[rn(insn)], f);
    put::<T>(regs, insn, lanes);
}

/// Rd = f(Rn, Rm).
#[inline(always)]
pub(super) fn binary<T: Lane>(regs: &mut Regs, insn: u32, f: impl FnMut(T, T) -> T) {
    let lanes = T::map2(&regs.v[rn(insn)], &regs.v[rm(insn)], f);
    put::<T>(regs, insn, lanes);
}

/// Rd = f(Rn, Rd).
#[inline(always)]
pub(super) fn accumulate<T: Lane>(regs: &mut Regs, insn: u32, f: impl FnMut(T, T) -> T) {
    let lanes = T::map2(&regs.v[rn(insn)], &regs.v[rd(insn)], f);
    put::<T>(regs, insn, lanes);
}

/// Rd = f(Rn, Rm, Rd).
#[inline(always)]
pub(super) fn ternary<T: Lane>(regs: &mut Regs, insn: u32, f: impl FnMut(T, T, T) -> T) {
    let lanes = T::map3(&regs.v[rn(insn)], &regs.v[rm(insn)], &regs.v[rd(insn)], f);
    put::<T>(regs, insn, lanes);
}

/// Carries out `f(regs, second, flag)` for Rd = f(Rn, second): a lane that does not take part is zero
/// in both operands, so that it cannot set the flag. No instruction saturates on zeros.
#[inline(always)]
fn saturating_with<T: Lane>(
    regs: &mut Regs,
    insn: u32,
    second: usize,
    mut f: impl FnMut(T, T, &mut bool) -> T,
) {
    let mut saturated = false;
    let lanes = if insn & (SCALAR | Q) == Q {
        T::map2(&regs.v[rn(insn)], &regs.v[second], |a, b| f(a, b, &mut saturated))
    } else {
        let mask = active::<T>(insn);
        let (a, b) = (regs.v[rn(insn)] & mask, regs.v[second] & mask);
        T::map2(&a, &b, |a, b| f(a, b, &mut saturated))
    };
    put::<T>(regs, insn, lanes);
    if saturated {
        regs.fpsr |= FPSR_QC;
    }
}

/// [`unary`] with a flag that saturation sets.
#[inline(always)]
pub(super) fn saturating_unary<T: Lane>(
    regs: &mut Regs,
    insn: u32,
    mut f: impl FnMut(T, &mut bool) -> T,
) {
    saturating_with(regs, insn, rn(insn), |a, _, qc| f(a, qc));
}

/// [`binary`] with a flag that saturation sets.
#[inline(always)]
pub(super) fn saturating_binary<T: Lane>(
    regs: &mut Regs,
    insn: u32,
    f: impl FnMut(T, T, &mut bool) -> T,
) {
    saturating_with(regs, insn, rm(insn), f);
}

/// [`accumulate`] with a flag that saturation sets.
#[inline(always)]
pub(super) fn saturating_accumulate<T: Lane>(
    regs: &mut Regs,
    insn: u32,
    f: impl FnMut(T, T, &mut bool) -> T,
) {
    saturating_with(regs, insn, rd(insn), f);
}

/// Carries `f` out with a flag that it sets when it saturates.
#[inline(always)]
pub(super) fn saturating(regs: &mut Regs, f: impl FnOnce(&mut Regs, &mut bool)) {
    let mut saturated = false;
    f(regs, &mut saturated);
    if saturated {
        regs.fpsr |= FPSR_QC;
    }
}

/// The nearest signed lane.
#[inline(always)]
pub(super) fn saturate_signed<T: Lane>(value: i128, saturated: &mut bool) -> T {
    let (min, max) = (i128::from(T::MIN_SIGNED.i64()), i128::from(T::MAX_SIGNED.i64()));
    *saturated |= value < min || value > max;
    T::from_u64(value.clamp(min, max) as u64)
}

/// The nearest unsigned lane.
#[inline(always)]
pub(super) fn saturate_unsigned<T: Lane>(value: i128, saturated: &mut bool) -> T {
    let max = i128::from(T::ONES.u64());
    *saturated |= value < 0 || value > max;
    T::from_u64(value.clamp(0, max) as u64)
}

/// Adds the flag to `saturated` and hands the value on.
#[inline(always)]
pub(super) fn note<T>((value, flag): (T, bool), saturated: &mut bool) -> T {
    *saturated |= flag;
    value
}

/// The absolute difference of two signed lanes, exact as an unsigned one.
#[inline(always)]
pub(super) fn sabd<T: Lane>(a: T, b: T) -> T {
    if a.signed() > b.signed() { a.sub(b) } else { b.sub(a) }
}

/// The absolute difference of two unsigned lanes.
#[inline(always)]
pub(super) fn uabd<T: Lane>(a: T, b: T) -> T {
    if a > b { a.sub(b) } else { b.sub(a) }
}

/// The high half of twice the product (SQDMULH, SQRDMULH).
#[inline(always)]
pub(super) fn sqdmulh<T: Lane>(a: T, b: T, round: bool, saturated: &mut bool) -> T {
    // 16 and 32 bits only: the product and the rounding constant fit.
    let product = a.i64() * b.i64() + if round { 1 << (T::BITS - 2) } else { 0 };
    saturate_signed((product >> (T::BITS - 1)).into(), saturated)
}

/// Twice the product (SQDMULL).
#[inline(always)]
pub(super) fn sqdmull<T: Narrow>(a: T, b: T, saturated: &mut bool) -> T::Wide {
    saturate_signed(i128::from(a.i64() * b.i64()) * 2, saturated)
}
