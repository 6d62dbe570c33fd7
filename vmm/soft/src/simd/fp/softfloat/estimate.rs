//! The table-driven estimates of the reciprocal and the reciprocal square root.

use super::round::overflow;
use super::{
    Env, FPSR_DZC, FPSR_IXC, FPSR_OFC, FPSR_UFC, Format, Kind, invalid, process_nan, unpack,
};

/// `FPRecipEstimate`.
pub(crate) fn recip_estimate<F: Format>(env: &mut Env, a: u64) -> u64 {
    let x = unpack::<F>(env, a);
    match x.kind {
        Kind::QuietNan | Kind::SignallingNan => return process_nan::<F>(env, x.kind, a),
        Kind::Infinity => return F::zero(x.sign),
        Kind::Zero => {
            env.raise(FPSR_DZC);
            return F::infinity(x.sign);
        }
        Kind::Finite => {}
    }
    // Below 2^-(BIAS + 1) the reciprocal is beyond the format.
    if x.exp < -F::BIAS - 1 {
        env.raise(FPSR_OFC | FPSR_IXC);
        return F::zero(x.sign) | overflow::<F>(x.sign, env.rounding());
    }
    if env.flush() && x.exp >= F::BIAS - 1 {
        env.raise(FPSR_UFC);
        return F::zero(x.sign);
    }
    // The significand's top nine bits, the leading one included.
    let estimate = estimate_recip((x.sig >> 55) as u32);
    let frac = u64::from(estimate & 0xff) << (F::FRAC - 8);
    let field = F::BIAS - 1 - x.exp;
    F::zero(x.sign)
        | match field {
            -1 => F::QUIET >> 1 | frac >> 2,
            0 => F::QUIET | frac >> 1,
            _ => (field as u64) << F::FRAC | frac,
        }
}

/// `FPRSqrtEstimate`.
pub(crate) fn rsqrt_estimate<F: Format>(env: &mut Env, a: u64) -> u64 {
    let x = unpack::<F>(env, a);
    match x.kind {
        Kind::QuietNan | Kind::SignallingNan => return process_nan::<F>(env, x.kind, a),
        Kind::Zero => {
            env.raise(FPSR_DZC);
            return F::infinity(x.sign);
        }
        _ if x.sign => return invalid::<F>(env),
        Kind::Infinity => return 0,
        Kind::Finite => {}
    }
    // An odd exponent leaves a factor of two, so the operand is in [0.25, 1) with an even exponent.
    let odd = x.exp & 1 != 0;
    let scaled = if odd { x.sig >> 55 } else { x.sig >> 56 };
    let estimate = estimate_rsqrt(scaled as u32);
    // (3 * BIAS - 1 - biased exponent) / 2, the biased exponent going on below zero for denormals.
    let field = (2 * F::BIAS - 1 - x.exp) >> 1;
    (field as u64) << F::FRAC | u64::from(estimate & 0xff) << (F::FRAC - 8)
}

/// `FPRecpX`.
pub(crate) fn recip_exponent<F: Format>(env: &mut Env, a: u64) -> u64 {
    let x = unpack::<F>(env, a);
    if x.is_nan() {
        return process_nan::<F>(env, x.kind, a);
    }
    let field = match F::exp(a) {
        0 => F::EXP_MAX - 1,
        exp => !exp & F::EXP_MAX,
    };
    a & F::SIGN | field << F::FRAC
}

/// `UnsignedRecipEstimate`.
pub(crate) fn unsigned_recip_estimate(a: u32) -> u32 {
    if a >> 31 == 0 { u32::MAX } else { estimate_recip(a >> 23) << 23 }
}

/// `UnsignedRSqrtEstimate`.
pub(crate) fn unsigned_rsqrt_estimate(a: u32) -> u32 {
    if a >> 30 == 0 { u32::MAX } else { estimate_rsqrt(a >> 23) << 23 }
}

/// `RecipEstimate`: 256..=511 to 256..=511.
fn estimate_recip(a: u32) -> u32 {
    let b = (1 << 19) / (a * 2 + 1);
    b.div_ceil(2)
}

/// `RecipSqrtEstimate`: 128..=511 to 256..=511.
fn estimate_rsqrt(a: u32) -> u32 {
    // Below one half a unit of the operand is 1/512, above it 1/256 after dropping the low bit.
    let a = if a < 256 { a * 2 + 1 } else { ((a & !1) + 1) * 2 };
    // The greatest b with a * b^2 < 2^28.
    let bound = (1u32 << 28).div_ceil(a) - 1;
    bound.isqrt().div_ceil(2)
}
