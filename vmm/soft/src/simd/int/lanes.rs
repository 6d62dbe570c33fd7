//! Vectors as arrays of lanes, and the loops that most instructions share.

use crate::regs::Regs;

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

    fn split(v: u128) -> Self::Lanes;
    fn join(lanes: Self::Lanes) -> u128;
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
    fn map1(a: u128, mut f: impl FnMut(Self) -> Self) -> u128 {
        let mut a = Self::split(a);
        for a in a.as_mut() {
            *a = f(*a);
        }
        Self::join(a)
    }

    #[inline(always)]
    fn map2(a: u128, b: u128, mut f: impl FnMut(Self, Self) -> Self) -> u128 {
        let mut a = Self::split(a);
        let b = Self::split(b);
        for (a, b) in a.as_mut().iter_mut().zip(b.as_ref()) {
            *a = f(*a, *b);
        }
        Self::join(a)
    }

    #[inline(always)]
    fn map3(a: u128, b: u128, c: u128, mut f: impl FnMut(Self, Self, Self) -> Self) -> u128 {
        let mut a = Self::split(a);
        let b = Self::split(b);
        let c = Self::split(c);
        for (a, (b, c)) in a.as_mut().iter_mut().zip(b.as_ref().iter().zip(c.as_ref())) {
            *a = f(*a, *b, *c);
        }
        Self::join(a)
    }

    /// All lanes equal.
    #[inline(always)]
    fn splat(self) -> u128 {
        Self::map1(0, |_| self)
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

    /// The lanes of the lower halves of `a` and `b`, with those of `d`, to wide lanes.
    fn widen(
        a: u128,
        b: u128,
        d: u128,
        f: impl FnMut(Self, Self, Self::Wide) -> Self::Wide,
    ) -> u128;
    /// The wide lanes of `a` and `b` to narrow ones, in the lower half.
    fn narrow(a: u128, b: u128, f: impl FnMut(Self::Wide, Self::Wide) -> Self) -> u128;
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
            fn split(v: u128) -> Self::Lanes {
                let bytes = v.to_le_bytes();
                let (lanes, _) = bytes.as_chunks();
                std::array::from_fn(|i| $u::from_le_bytes(lanes[i]))
            }

            #[inline(always)]
            fn join(lanes: Self::Lanes) -> u128 {
                let mut bytes = [0; 16];
                let (chunks, _) = bytes.as_chunks_mut();
                for (chunk, lane) in chunks.iter_mut().zip(lanes) {
                    *chunk = lane.to_le_bytes();
                }
                u128::from_le_bytes(bytes)
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
                (self.saturating_add(other), self.checked_add(other).is_none())
            }

            #[inline(always)]
            fn sqadd(self, other: Self) -> (Self, bool) {
                let (a, b) = (self as $s, other as $s);
                (a.saturating_add(b) as $u, a.checked_add(b).is_none())
            }

            #[inline(always)]
            fn uqsub(self, other: Self) -> (Self, bool) {
                (self.saturating_sub(other), self < other)
            }

            #[inline(always)]
            fn sqsub(self, other: Self) -> (Self, bool) {
                let (a, b) = (self as $s, other as $s);
                (a.saturating_sub(b) as $u, a.checked_sub(b).is_none())
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
                a: u128,
                b: u128,
                d: u128,
                mut f: impl FnMut(Self, Self, $wide) -> $wide,
            ) -> u128 {
                let (a, b) = ($narrow::split(a), $narrow::split(b));
                let mut d = $wide::split(d);
                for (i, d) in d.iter_mut().enumerate() {
                    *d = f(a[i], b[i], *d);
                }
                $wide::join(d)
            }

            #[inline(always)]
            fn narrow(a: u128, b: u128, mut f: impl FnMut($wide, $wide) -> Self) -> u128 {
                let (a, b) = ($wide::split(a), $wide::split(b));
                let mut d = $narrow::split(0);
                for (i, d) in d[..$wide::COUNT].iter_mut().enumerate() {
                    *d = f(a[i], b[i]);
                }
                $narrow::join(d)
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
///
/// Operands are masked before an operation too, so that a lane that does not take part cannot set
/// FPSR.QC: no instruction saturates on zeros.
#[inline(always)]
pub(super) fn active<T: Lane>(insn: u32) -> u128 {
    if insn & SCALAR != 0 { u128::MAX >> (128 - T::BITS) } else { width(insn) }
}

/// 64 or 128 bits, by Q.
#[inline(always)]
pub(super) fn width(insn: u32) -> u128 {
    if insn & Q != 0 { u128::MAX } else { u64::MAX.into() }
}

/// The half of `v` that a widening instruction reads: the upper one in its "2" form.
#[inline(always)]
pub(super) fn part<T: Lane>(insn: u32, v: u128) -> u128 {
    if insn & SCALAR != 0 {
        v & active::<T>(insn)
    } else if insn & Q != 0 {
        v >> 64
    } else {
        v
    }
}

/// Writes the result of a narrowing instruction: the "2" form keeps the lower half.
#[inline(always)]
pub(super) fn set_part(regs: &mut Regs, insn: u32, narrow: u128) {
    let d = &mut regs.v[rd(insn)];
    *d = if insn & (SCALAR | Q) == Q {
        *d & u128::from(u64::MAX) | narrow << 64
    } else {
        narrow & u128::from(u64::MAX)
    };
}

#[inline(always)]
pub(super) fn unary<T: Lane>(regs: &mut Regs, insn: u32, f: impl FnMut(T) -> T) {
    let mask = active::<T>(insn);
    regs.v[rd(insn)] = T::map1(regs.v[rn(insn)] & mask, f) & mask;
}

#[inline(always)]
pub(super) fn binary<T: Lane>(regs: &mut Regs, insn: u32, f: impl FnMut(T, T) -> T) {
    let mask = active::<T>(insn);
    regs.v[rd(insn)] = T::map2(regs.v[rn(insn)] & mask, regs.v[rm(insn)] & mask, f) & mask;
}

/// With the destination as the third operand.
#[inline(always)]
pub(super) fn ternary<T: Lane>(regs: &mut Regs, insn: u32, f: impl FnMut(T, T, T) -> T) {
    let mask = active::<T>(insn);
    let d = regs.v[rd(insn)] & mask;
    regs.v[rd(insn)] = T::map3(regs.v[rn(insn)] & mask, regs.v[rm(insn)] & mask, d, f) & mask;
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

/// `pair` stores a flag and hands the value on.
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
