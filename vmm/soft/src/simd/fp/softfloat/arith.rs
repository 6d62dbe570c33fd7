//! Addition, multiplication, division, square root and the fused operations.

use super::round::{Term, round, sum};
use super::{Env, FPSR_DZC, Format, Kind, Unpacked, invalid, process_nan, process_nans, unpack};

/// `FPAdd`. Subtraction is [`sub`], not an addition of the negated operand: that would change the sign
/// of a NaN.
#[inline(never)]
pub(crate) fn add<F: Format>(env: &mut Env, a: u64, b: u64, subtract: bool) -> u64 {
    let x = unpack::<F>(env, a);
    let mut y = unpack::<F>(env, b);
    if let Some(nan) = process_nans::<F, 2>(env, [(&x, a), (&y, b)]) {
        return nan;
    }
    y.sign ^= subtract;
    match (x.is_infinity(), y.is_infinity()) {
        (true, true) if x.sign != y.sign => return invalid::<F>(env),
        (true, _) => return F::infinity(x.sign),
        (_, true) => return F::infinity(y.sign),
        _ => {}
    }
    if x.is_zero() && y.is_zero() && x.sign == y.sign {
        return F::zero(x.sign);
    }
    sum::<F>(env, term(&x), term(&y), 0)
}

/// `FPMul`.
#[inline(never)]
pub(crate) fn mul<F: Format>(env: &mut Env, a: u64, b: u64) -> u64 {
    let x = unpack::<F>(env, a);
    let y = unpack::<F>(env, b);
    multiply::<F>(env, (x, a), (y, b), None)
}

/// `FPMulX`: infinity times zero is two.
#[inline(never)]
pub(crate) fn mulx<F: Format>(env: &mut Env, a: u64, b: u64) -> u64 {
    let x = unpack::<F>(env, a);
    let y = unpack::<F>(env, b);
    multiply::<F>(env, (x, a), (y, b), Some(two::<F>(x.sign != y.sign)))
}

/// `FPDiv`.
#[inline(never)]
pub(crate) fn div<F: Format>(env: &mut Env, a: u64, b: u64) -> u64 {
    let x = unpack::<F>(env, a);
    let y = unpack::<F>(env, b);
    if let Some(nan) = process_nans::<F, 2>(env, [(&x, a), (&y, b)]) {
        return nan;
    }
    let sign = x.sign != y.sign;
    if x.is_infinity() && y.is_infinity() || x.is_zero() && y.is_zero() {
        return invalid::<F>(env);
    }
    if x.is_infinity() || y.is_zero() {
        if !x.is_infinity() {
            env.raise(FPSR_DZC);
        }
        return F::infinity(sign);
    }
    if x.is_zero() || y.is_infinity() {
        return F::zero(sign);
    }
    // Both significands are in [2^63, 2^64), so the quotient is in (2^62, 2^64).
    let dividend = u128::from(x.sig) << 63;
    let divisor = u128::from(y.sig);
    let quotient = (dividend / divisor) as u64;
    let sticky = u64::from(u128::from(quotient) * divisor != dividend);
    let shift = quotient.leading_zeros();
    let sig = quotient << shift | sticky;
    let rounding = env.rounding();
    round::<F>(env, sign, x.exp - y.exp - shift as i32, sig, rounding)
}

/// `FPSqrt`.
#[inline(never)]
pub(crate) fn sqrt<F: Format>(env: &mut Env, a: u64) -> u64 {
    let x = unpack::<F>(env, a);
    match x.kind {
        Kind::QuietNan | Kind::SignallingNan => return process_nan::<F>(env, x.kind, a),
        Kind::Zero => return F::zero(x.sign),
        _ if x.sign => return invalid::<F>(env),
        Kind::Infinity => return F::infinity(false),
        Kind::Finite => {}
    }
    let radicand = u128::from(x.sig) << (63 + (x.exp & 1));
    let root = radicand.isqrt();
    // At least 63 bits of the root are there, so bit 0 is free to be sticky.
    let sig = root as u64 | u64::from(root * root != radicand);
    let rounding = env.rounding();
    round::<F>(env, false, x.exp >> 1, sig, rounding)
}

/// `FPMulAdd`: `addend + a * b`, rounded once.
#[inline(never)]
pub(crate) fn mul_add<F: Format>(env: &mut Env, addend: u64, a: u64, b: u64) -> u64 {
    let z = unpack::<F>(env, addend);
    let x = unpack::<F>(env, a);
    let y = unpack::<F>(env, b);
    let undefined = x.is_infinity() && y.is_zero() || x.is_zero() && y.is_infinity();
    if let Some(nan) = process_nans::<F, 3>(env, [(&z, addend), (&x, a), (&y, b)]) {
        if z.kind == Kind::QuietNan && undefined {
            return invalid::<F>(env);
        }
        return nan;
    }
    let sign = x.sign != y.sign;
    let infinite = x.is_infinity() || y.is_infinity();
    if undefined || z.is_infinity() && infinite && z.sign != sign {
        return invalid::<F>(env);
    }
    if z.is_infinity() {
        return F::infinity(z.sign);
    }
    if infinite {
        return F::infinity(sign);
    }
    if z.is_zero() && (x.is_zero() || y.is_zero()) && z.sign == sign {
        return F::zero(sign);
    }
    sum::<F>(env, term(&z), product(&x, &y), 0)
}

/// `FPRecipStepFused`: `2 - a * b`.
#[inline(never)]
pub(crate) fn recip_step<F: Format>(env: &mut Env, a: u64, b: u64) -> u64 {
    let addend = Term { sign: false, exp: 1, sig: 1 << 126 };
    step::<F>(env, a, b, two::<F>(false), addend, 0)
}

/// `FPRSqrtStepFused`: `(3 - a * b) / 2`.
#[inline(never)]
pub(crate) fn rsqrt_step<F: Format>(env: &mut Env, a: u64, b: u64) -> u64 {
    let addend = Term { sign: false, exp: 1, sig: 3 << 125 };
    step::<F>(env, a, b, F::ONE | F::QUIET, addend, -1)
}

fn two<F: Format>(sign: bool) -> u64 {
    F::zero(sign) | (F::ONE + (1 << F::FRAC))
}

fn term(x: &Unpacked) -> Term {
    Term { sign: x.sign, exp: x.exp, sig: u128::from(x.sig) << 63 }
}

/// The exact product of two finite values: at most 106 bits, so a right shift by one loses nothing.
fn product(x: &Unpacked, y: &Unpacked) -> Term {
    let sig = u128::from(x.sig) * u128::from(y.sig);
    let carry = (sig >> 127) as i32;
    Term { sign: x.sign != y.sign, exp: x.exp + y.exp + carry, sig: sig >> carry }
}

fn multiply<F: Format>(
    env: &mut Env,
    (x, a): (Unpacked, u64),
    (y, b): (Unpacked, u64),
    infinity_by_zero: Option<u64>,
) -> u64 {
    if let Some(nan) = process_nans::<F, 2>(env, [(&x, a), (&y, b)]) {
        return nan;
    }
    let sign = x.sign != y.sign;
    let zero = x.is_zero() || y.is_zero();
    if x.is_infinity() || y.is_infinity() {
        return match (zero, infinity_by_zero) {
            (false, _) => F::infinity(sign),
            (true, Some(value)) => value,
            (true, None) => invalid::<F>(env),
        };
    }
    if zero {
        return F::zero(sign);
    }
    let sig = u128::from(x.sig) * u128::from(y.sig);
    let shift = sig.leading_zeros();
    let sig = sig << shift;
    let jammed = (sig >> 64) as u64 | u64::from(sig as u64 != 0);
    let rounding = env.rounding();
    round::<F>(env, sign, x.exp + y.exp + 1 - shift as i32, jammed, rounding)
}

fn step<F: Format>(
    env: &mut Env,
    a: u64,
    b: u64,
    infinity_by_zero: u64,
    addend: Term,
    scale: i32,
) -> u64 {
    let a = a ^ F::SIGN;
    let x = unpack::<F>(env, a);
    let y = unpack::<F>(env, b);
    if let Some(nan) = process_nans::<F, 2>(env, [(&x, a), (&y, b)]) {
        return nan;
    }
    if x.is_infinity() || y.is_infinity() {
        if x.is_zero() || y.is_zero() {
            return infinity_by_zero;
        }
        return F::infinity(x.sign != y.sign);
    }
    sum::<F>(env, addend, product(&x, &y), scale)
}
