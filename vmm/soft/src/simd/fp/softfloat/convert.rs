//! Conversions between formats, to and from integers and fixed point, and rounding to an integral value.

use super::round::{round, rounds_up, split};
use super::{
    Env, FPCR_AHP, FPCR_DN, FPSR_IOC, FPSR_IXC, Format, Kind, Rounding, process_nan, unpack,
};

/// `FPConvert` from `S` to `D`.
#[inline(never)]
pub(crate) fn convert<S: Format, D: Format>(env: &mut Env, a: u64, rounding: Rounding) -> u64 {
    let x = unpack::<S>(env, a);
    let alternative = D::BITS == 16 && env.fpcr & FPCR_AHP != 0;
    match x.kind {
        Kind::QuietNan | Kind::SignallingNan => {
            if x.kind == Kind::SignallingNan || alternative {
                env.raise(FPSR_IOC);
            }
            if alternative {
                D::zero(x.sign)
            } else if env.fpcr & FPCR_DN != 0 {
                D::DEFAULT_NAN
            } else {
                // FPConvertNaN: the top of the fraction stays.
                let frac = S::frac(a) << (63 - S::FRAC) >> (63 - D::FRAC);
                D::infinity(x.sign) | D::QUIET | D::frac(frac)
            }
        }
        Kind::Infinity if alternative => {
            env.raise(FPSR_IOC);
            D::zero(x.sign) | (D::SIGN - 1)
        }
        Kind::Infinity => D::infinity(x.sign),
        Kind::Zero => D::zero(x.sign),
        Kind::Finite => round::<D>(env, x.sign, x.exp, x.sig, rounding),
    }
}

/// `FixedToFP` of a 64-bit integer with `fbits` fraction bits.
#[inline(never)]
pub(crate) fn from_fixed<F: Format>(
    env: &mut Env,
    value: u64,
    unsigned: bool,
    fbits: u32,
    rounding: Rounding,
) -> u64 {
    if value == 0 {
        return 0;
    }
    let sign = !unsigned && (value as i64) < 0;
    let magnitude = if sign { value.wrapping_neg() } else { value };
    let shift = magnitude.leading_zeros();
    let exp = 63 - shift as i32 - fbits as i32;
    round::<F>(env, sign, exp, magnitude << shift, rounding)
}

/// `FPToFixed`: `width` (32 or 64) bits with `fbits` fraction bits, zero-extended.
#[inline(never)]
pub(crate) fn to_fixed<F: Format>(
    env: &mut Env,
    a: u64,
    width: u32,
    unsigned: bool,
    fbits: u32,
    rounding: Rounding,
) -> u64 {
    let x = unpack::<F>(env, a);
    let mask = u64::MAX >> (64 - width);
    let greatest = match (unsigned, x.sign) {
        (true, true) => 0,
        (true, false) => mask,
        (false, true) => 1 << (width - 1),
        (false, false) => mask >> 1,
    };
    let saturated = if x.sign { 0u64.wrapping_sub(greatest) & mask } else { greatest };
    let exp = x.exp + fbits as i32;
    match x.kind {
        Kind::Zero => return 0,
        Kind::QuietNan | Kind::SignallingNan => {
            env.raise(FPSR_IOC);
            return 0;
        }
        Kind::Finite if exp < 64 => {}
        Kind::Infinity | Kind::Finite => {
            env.raise(FPSR_IOC);
            return saturated;
        }
    }
    let (int, frac) = split(x.sig, (63 - exp) as u32);
    let up = rounds_up(rounding, x.sign, int & 1 != 0, frac);
    // A carry out of 64 bits needs a fraction beside 64 integer bits, which do not both fit.
    let int = int + u64::from(up);
    if int > greatest {
        env.raise(FPSR_IOC);
        return saturated;
    }
    if frac != 0 {
        env.raise(FPSR_IXC);
    }
    if x.sign { int.wrapping_neg() & mask } else { int }
}

/// `FPRoundInt`; `exact` raises Inexact.
#[inline(never)]
pub(crate) fn round_to_int<F: Format>(
    env: &mut Env,
    a: u64,
    rounding: Rounding,
    exact: bool,
) -> u64 {
    let x = unpack::<F>(env, a);
    match x.kind {
        Kind::QuietNan | Kind::SignallingNan => return process_nan::<F>(env, x.kind, a),
        Kind::Infinity => return a,
        Kind::Zero => return F::zero(x.sign),
        Kind::Finite if x.exp >= F::FRAC as i32 => return a,
        Kind::Finite => {}
    }
    let (int, frac) = split(x.sig, (63 - x.exp) as u32);
    let int = int + u64::from(rounds_up(rounding, x.sign, int & 1 != 0, frac));
    if frac != 0 && exact {
        env.raise(FPSR_IXC);
    }
    if int == 0 {
        return F::zero(x.sign);
    }
    let shift = int.leading_zeros();
    round::<F>(env, x.sign, 63 - shift as i32, int << shift, Rounding::Zero)
}
