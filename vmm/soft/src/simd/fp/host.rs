//! The same operations by way of the host's floating point, which is IEEE 754 round-to-nearest with
//! denormals. A case is answered here only where result and flags are certain to be the architecture's:
//! FPCR.RMode is nearest, the operands are zero or normal, and the result is finite and above the least
//! normal number (or an exact zero). Then the only flag in question is Inexact. Everything else goes to
//! [`softfloat`](super::softfloat).

use core::cmp::Ordering;
use core::ops::{Add, Div, Mul, Sub};

use super::softfloat::{
    self as soft, Double, Env, FPCR_FZ, FPCR_RMODE, FPSR_IXC, Format, Rounding, Single,
};

/// A format that the host computes in.
pub(super) trait Host: Format {
    type Value: Copy
        + PartialOrd
        + Default
        + Add<Output = Self::Value>
        + Sub<Output = Self::Value>
        + Mul<Output = Self::Value>
        + Div<Output = Self::Value>;

    fn value(bits: u64) -> Self::Value;
    fn bits(value: Self::Value) -> u64;
    fn sqrt(value: Self::Value) -> Self::Value;
    /// `a * b + c`, rounded once.
    fn fma(a: Self::Value, b: Self::Value, c: Self::Value) -> Self::Value;
    fn from_i64(value: i64) -> Self::Value;
    fn to_i64(value: Self::Value) -> i64;
}

macro_rules! host {
    ($format:ty, $value:ty, $word:ty) => {
        impl Host for $format {
            type Value = $value;

            #[inline(always)]
            fn value(bits: u64) -> $value {
                <$value>::from_bits(bits as $word)
            }

            #[inline(always)]
            fn bits(value: $value) -> u64 {
                u64::from(value.to_bits())
            }

            #[inline(always)]
            fn sqrt(value: $value) -> $value {
                value.sqrt()
            }

            #[inline(always)]
            fn fma(a: $value, b: $value, c: $value) -> $value {
                a.mul_add(b, c)
            }

            #[inline(always)]
            fn from_i64(value: i64) -> $value {
                value as $value
            }

            #[inline(always)]
            fn to_i64(value: $value) -> i64 {
                value as i64
            }
        }
    };
}

host!(Single, f32, u32);
host!(Double, f64, u64);

/// `FPAdd`.
#[inline(always)]
pub(super) fn add<F: Host>(env: &mut Env, a: u64, b: u64) -> u64 {
    if nearest(env) && simple::<F>(a) && simple::<F>(b) {
        let (x, y) = (F::value(a), F::value(b));
        let sum = x + y;
        let bits = F::bits(sum);
        if settled_sum::<F>(bits) {
            note_sum_error::<F>(env, x, y, sum);
            return bits;
        }
    }
    soft::add::<F>(env, a, b, false)
}

/// `FPSub`.
#[inline(always)]
pub(super) fn sub<F: Host>(env: &mut Env, a: u64, b: u64) -> u64 {
    if nearest(env) && simple::<F>(a) && simple::<F>(b) {
        let (x, y) = (F::value(a), F::value(b ^ F::SIGN));
        let sum = x + y;
        let bits = F::bits(sum);
        if settled_sum::<F>(bits) {
            note_sum_error::<F>(env, x, y, sum);
            return bits;
        }
    }
    soft::add::<F>(env, a, b, true)
}

/// `FPMul`.
#[inline(always)]
pub(super) fn mul<F: Host>(env: &mut Env, a: u64, b: u64) -> u64 {
    if nearest(env) && simple::<F>(a) && simple::<F>(b) {
        let bits = F::bits(F::value(a) * F::value(b));
        if F::is_zero(a) || F::is_zero(b) {
            return bits;
        }
        if settled::<F>(bits) && note_product_error::<F>(env, a, b) {
            return bits;
        }
    }
    soft::mul::<F>(env, a, b)
}

/// `FPDiv`.
#[inline(always)]
pub(super) fn div<F: Host>(env: &mut Env, a: u64, b: u64) -> u64 {
    if nearest(env) && simple::<F>(a) && simple::<F>(b) && !F::is_zero(b) {
        let quotient = F::value(a) / F::value(b);
        let bits = F::bits(quotient);
        if F::is_zero(a) {
            return bits;
        }
        if settled::<F>(bits) {
            if inexact(env) {
                return bits;
            }
            // The quotient is exact when multiplying back is: that needs a product that fits.
            match product_fits::<F>(bits, b) {
                Some(fits) => {
                    if !fits || quotient * F::value(b) != F::value(a) {
                        env.raise(FPSR_IXC);
                    }
                    return bits;
                }
                None => return soft::div::<F>(env, a, b),
            }
        }
    }
    soft::div::<F>(env, a, b)
}

/// `FPSqrt`.
#[inline(always)]
pub(super) fn sqrt<F: Host>(env: &mut Env, a: u64) -> u64 {
    if nearest(env) && simple::<F>(a) && a & F::SIGN == 0 {
        let root = F::sqrt(F::value(a));
        let bits = F::bits(root);
        if inexact(env) || F::is_zero(a) {
            return bits;
        }
        if let Some(fits) = product_fits::<F>(bits, bits) {
            if !fits || root * root != F::value(a) {
                env.raise(FPSR_IXC);
            }
            return bits;
        }
    }
    soft::sqrt::<F>(env, a)
}

/// `FPMulAdd`.
#[inline(always)]
pub(super) fn mul_add<F: Host>(env: &mut Env, addend: u64, a: u64, b: u64) -> u64 {
    if nearest(env) && inexact(env) && simple::<F>(a) && simple::<F>(b) && simple::<F>(addend) {
        let bits = F::bits(F::fma(F::value(a), F::value(b), F::value(addend)));
        if settled::<F>(bits) {
            return bits;
        }
    }
    soft::mul_add::<F>(env, addend, a, b)
}

/// How `a` relates to `b`, `None` when one is a NaN.
#[inline(always)]
pub(super) fn relation<F: Host>(env: &mut Env, a: u64, b: u64, signal: bool) -> Option<Ordering> {
    if env.fpcr & FPCR_FZ == 0 || simple::<F>(a) && simple::<F>(b) {
        let relation = F::value(a).partial_cmp(&F::value(b));
        if relation.is_some() {
            return relation;
        }
    }
    soft::relation::<F>(env, a, b, signal)
}

/// `FPMax` and `FPMaxNum`, which differ in what they make of NaNs.
#[inline(always)]
pub(super) fn max<F: Host>(env: &mut Env, a: u64, b: u64, number: bool) -> u64 {
    if simple::<F>(a) && simple::<F>(b) && F::value(a) != F::value(b) {
        return if F::value(a) > F::value(b) { a } else { b };
    }
    if number { soft::max_num::<F>(env, a, b) } else { soft::max::<F>(env, a, b) }
}

/// `FPMin` and `FPMinNum`.
#[inline(always)]
pub(super) fn min<F: Host>(env: &mut Env, a: u64, b: u64, number: bool) -> u64 {
    if simple::<F>(a) && simple::<F>(b) && F::value(a) != F::value(b) {
        return if F::value(a) < F::value(b) { a } else { b };
    }
    if number { soft::min_num::<F>(env, a, b) } else { soft::min::<F>(env, a, b) }
}

/// `FPToFixed` without fraction bits, towards zero: `width` is 32 or 64.
#[inline(always)]
pub(super) fn to_int_zero<F: Host>(env: &mut Env, a: u64, width: u32, unsigned: bool) -> u64 {
    // A magnitude below 2^(width - 1) fits, unless it is negative and wanted unsigned.
    let in_range = F::exp(a) < (F::BIAS as u64) + u64::from(width) - 1;
    if simple::<F>(a) && in_range && !(unsigned && a & F::SIGN != 0) {
        let value = F::value(a);
        let int = F::to_i64(value);
        if !inexact(env) && F::from_i64(int) != value {
            env.raise(FPSR_IXC);
        }
        return int as u64 & u64::MAX >> (64 - width);
    }
    soft::to_fixed::<F>(env, a, width, unsigned, 0, Rounding::Zero)
}

/// `FixedToFP` of a 64-bit integer without fraction bits.
#[inline(always)]
pub(super) fn from_int<F: Host>(env: &mut Env, value: u64, unsigned: bool) -> u64 {
    let signed = value as i64;
    if signed.unsigned_abs() >> (F::FRAC + 1) == 0 && !(unsigned && signed < 0) {
        return F::bits(F::from_i64(signed));
    }
    let rounding = env.rounding();
    soft::from_fixed::<F>(env, value, unsigned, 0, rounding)
}

/// `FPConvert` from single to double precision.
#[inline(always)]
pub(super) fn widen(env: &mut Env, a: u64) -> u64 {
    if simple::<Single>(a) {
        return Double::bits(f64::from(Single::value(a)));
    }
    let rounding = env.rounding();
    soft::convert::<Single, Double>(env, a, rounding)
}

/// `FPConvert` from double to single precision.
#[inline(always)]
pub(super) fn narrow(env: &mut Env, a: u64) -> u64 {
    if nearest(env) && simple::<Double>(a) {
        let value = Double::value(a);
        let result = value as f32;
        let bits = Single::bits(result);
        if settled::<Single>(bits) || Double::is_zero(a) {
            if f64::from(result) != value {
                env.raise(FPSR_IXC);
            }
            return bits;
        }
    }
    let rounding = env.rounding();
    soft::convert::<Double, Single>(env, a, rounding)
}

#[inline(always)]
fn nearest(env: &Env) -> bool {
    env.fpcr & FPCR_RMODE == 0
}

/// Whether Inexact is set already, so that nobody can tell whether it is raised again.
#[inline(always)]
fn inexact(env: &Env) -> bool {
    env.fpsr & FPSR_IXC != 0
}

/// Zero or normal.
#[inline(always)]
fn simple<F: Format>(bits: u64) -> bool {
    F::exp(bits).wrapping_sub(1) < F::EXP_MAX - 1 || F::is_zero(bits)
}

/// Finite and above the least normal number, so neither overflow nor underflow was near.
#[inline(always)]
fn settled<F: Format>(bits: u64) -> bool {
    (bits & (F::SIGN - 1)).wrapping_sub((1 << F::FRAC) + 1) < F::INFINITY - (1 << F::FRAC) - 1
}

/// A sum of normal numbers is exact where it is tiny. The greatest binade is left out, where the
/// intermediate values of [`note_sum_error`] could overflow.
#[inline(always)]
fn settled_sum<F: Format>(bits: u64) -> bool {
    F::exp(bits).wrapping_sub(1) < F::EXP_MAX - 2 || F::is_zero(bits)
}

/// Raises Inexact if `sum` is not exactly `x + y` (Knuth's two-sum gives the exact error).
#[inline(always)]
fn note_sum_error<F: Host>(env: &mut Env, x: F::Value, y: F::Value, sum: F::Value) {
    if !inexact(env) {
        let y_part = sum - x;
        let error = (x - (sum - y_part)) + (y - y_part);
        if error != F::Value::default() {
            env.raise(FPSR_IXC);
        }
    }
}

/// Raises Inexact if a product of normal numbers is not exact; `false` if that is not seen cheaply.
#[inline(always)]
fn note_product_error<F: Format>(env: &mut Env, a: u64, b: u64) -> bool {
    if inexact(env) {
        return true;
    }
    match product_fits::<F>(a, b) {
        Some(true) => true,
        Some(false) => {
            env.raise(FPSR_IXC);
            true
        }
        None => false,
    }
}

/// Whether the product of two normal significands fits one, told from their trailing zeros: those of
/// the product are their sum, and it is `2 * FRAC + 1` or `2 * FRAC + 2` bits long.
#[inline(always)]
fn product_fits<F: Format>(a: u64, b: u64) -> Option<bool> {
    let zeros = |bits: u64| (bits | 1 << F::FRAC).trailing_zeros();
    match (zeros(a) + zeros(b)).cmp(&F::FRAC) {
        Ordering::Greater => Some(true),
        Ordering::Less => Some(false),
        Ordering::Equal => None,
    }
}
