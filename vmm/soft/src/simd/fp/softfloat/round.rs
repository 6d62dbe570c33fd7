//! Rounding to a format.

use super::{Env, FPCR_AHP, FPSR_IOC, FPSR_IXC, FPSR_OFC, FPSR_UFC, Format, Rounding};

/// `x >> shift`, and what is cut off as a fraction of 2^64, inexactly kept below one half when it is
/// shifted beyond that.
#[inline]
pub(super) fn split(x: u64, shift: u32) -> (u64, u64) {
    match shift {
        0 => (x, 0),
        1..=63 => (x >> shift, x << (64 - shift)),
        64 => (0, x),
        _ => (0, u64::from(x != 0)),
    }
}

/// `x >> shift` with bit 0 telling that something was cut off.
#[inline]
fn shift_right_jam(x: u128, shift: u32) -> u128 {
    match shift {
        0 => x,
        1..=127 => x >> shift | u128::from(x << (128 - shift) != 0),
        _ => u128::from(x != 0),
    }
}

/// Whether a magnitude whose integer part has the low bit `odd` and whose fraction is `frac` (of 2^64)
/// is rounded away from zero.
#[inline]
pub(super) fn rounds_up(rounding: Rounding, sign: bool, odd: bool, frac: u64) -> bool {
    const HALF: u64 = 1 << 63;
    match rounding {
        Rounding::TieEven => frac > HALF || frac == HALF && odd,
        Rounding::TieAway => frac >= HALF,
        Rounding::PosInf => frac != 0 && !sign,
        Rounding::NegInf => frac != 0 && sign,
        Rounding::Zero | Rounding::Odd => false,
    }
}

/// `FPRound` of `sig * 2^(exp - 63)`, bit 63 of `sig` set, bit 0 sticky. To half precision it is
/// `FPRoundCV`.
pub(super) fn round<F: Format>(
    env: &mut Env,
    sign: bool,
    exp: i32,
    sig: u64,
    rounding: Rounding,
) -> u64 {
    let min_exp = 1 - F::BIAS;
    let denormal = exp < min_exp;
    if denormal && F::BITS != 16 && env.flush() {
        // Tininess is found before rounding, and flushing is not inexact.
        env.raise(FPSR_UFC);
        return F::zero(sign);
    }
    let (field, shift) = if denormal {
        (0, 63 - F::FRAC + (min_exp - exp) as u32)
    } else {
        ((exp - min_exp) as u64, 63 - F::FRAC)
    };
    let alternative = F::BITS == 16 && env.fpcr & FPCR_AHP != 0;
    let limit = F::EXP_MAX + u64::from(alternative);

    let (mut mant, frac) = split(sig, shift);
    if frac != 0 {
        if denormal {
            env.raise(FPSR_UFC);
        }
        if rounding == Rounding::Odd {
            mant |= 1;
        } else if rounds_up(rounding, sign, mant & 1 != 0, frac) {
            mant += 1;
        }
    }
    // The leading bit of a normal significand adds one to the exponent field, and so does a carry.
    let bits = if field < limit { (field << F::FRAC) + mant } else { limit << F::FRAC };
    if bits >> F::FRAC >= limit {
        if alternative {
            env.raise(FPSR_IOC);
            return F::zero(sign) | (F::SIGN - 1);
        }
        env.raise(FPSR_OFC | FPSR_IXC);
        return F::zero(sign) | overflow::<F>(sign, rounding);
    }
    if frac != 0 {
        env.raise(FPSR_IXC);
    }
    F::zero(sign) | bits
}

/// The magnitude that stands for a result beyond the format.
pub(super) fn overflow<F: Format>(sign: bool, rounding: Rounding) -> u64 {
    let to_infinity = match rounding {
        Rounding::TieEven | Rounding::TieAway => true,
        Rounding::PosInf => !sign,
        Rounding::NegInf => sign,
        Rounding::Zero | Rounding::Odd => false,
    };
    if to_infinity { F::INFINITY } else { F::MAX_NORMAL }
}

/// A term of a sum: `sig * 2^(exp - 126)`, bit 127 clear. A zero has any exponent.
#[derive(Clone, Copy)]
pub(super) struct Term {
    pub(super) sign: bool,
    pub(super) exp: i32,
    pub(super) sig: u128,
}

/// `FPRound((a + b) * 2^scale)`. Exact as long as both terms have their leading bit at 126 or 125 and at
/// least 20 low bits clear: what an alignment cuts off is then far below the rounding position.
pub(super) fn sum<F: Format>(env: &mut Env, a: Term, b: Term, scale: i32) -> u64 {
    let rounding = env.rounding();
    let (mut a, mut b) = if b.sig == 0 || a.sig != 0 && a.exp >= b.exp { (a, b) } else { (b, a) };
    if b.sig != 0 {
        b.sig = shift_right_jam(b.sig, a.exp.abs_diff(b.exp));
    }
    if a.sign == b.sign {
        a.sig += b.sig;
    } else if a.sig >= b.sig {
        a.sig -= b.sig;
    } else {
        a.sig = b.sig - a.sig;
        a.sign = b.sign;
    }
    if a.sig == 0 {
        return F::zero(rounding == Rounding::NegInf);
    }
    let shift = a.sig.leading_zeros();
    let sig = a.sig << shift;
    let jammed = (sig >> 64) as u64 | u64::from(sig as u64 != 0);
    round::<F>(env, a.sign, a.exp + 1 - shift as i32 + scale, jammed, rounding)
}
