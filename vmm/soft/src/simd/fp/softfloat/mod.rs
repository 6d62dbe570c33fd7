//! Floating point in software, after the shared functions of the Arm ARM (J1.3, "functions/float"):
//! every rounding mode, flush-to-zero, default NaN and the cumulative exception flags.
//!
//! Values are passed as their encodings, zero-extended to 64 bits; the format is a type parameter.
//! Half precision appears in conversions only.

mod arith;
mod compare;
mod convert;
mod estimate;
mod round;

pub(crate) use arith::{add, div, mul, mul_add, mulx, recip_step, rsqrt_step, sqrt};
pub(crate) use compare::{max, max_num, min, min_num, relation};
pub(crate) use convert::{convert, from_fixed, round_to_int, to_fixed};
pub(crate) use estimate::{
    recip_estimate, recip_exponent, rsqrt_estimate, unsigned_recip_estimate,
    unsigned_rsqrt_estimate,
};

use crate::regs::Regs;

/// FPCR.AHP: the alternative half-precision format.
pub(crate) const FPCR_AHP: u32 = 1 << 26;
/// FPCR.DN: every NaN result is the default NaN.
pub(crate) const FPCR_DN: u32 = 1 << 25;
/// FPCR.FZ: denormal inputs and results are zero.
pub(crate) const FPCR_FZ: u32 = 1 << 24;
/// FPCR.RMode.
pub(crate) const FPCR_RMODE: u32 = 3 << 22;

/// FPSR.IDC: a denormal input was taken for zero.
pub(crate) const FPSR_IDC: u32 = 1 << 7;
/// FPSR.IXC: inexact.
pub(crate) const FPSR_IXC: u32 = 1 << 4;
/// FPSR.UFC: underflow.
pub(crate) const FPSR_UFC: u32 = 1 << 3;
/// FPSR.OFC: overflow.
pub(crate) const FPSR_OFC: u32 = 1 << 2;
/// FPSR.DZC: division by zero.
pub(crate) const FPSR_DZC: u32 = 1 << 1;
/// FPSR.IOC: invalid operation.
pub(crate) const FPSR_IOC: u32 = 1 << 0;

/// How a result that is not exact is rounded (Arm ARM, `FPRounding`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rounding {
    TieEven,
    PosInf,
    NegInf,
    Zero,
    TieAway,
    Odd,
}

/// The control word and the flags gathered so far.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Env {
    pub(crate) fpcr: u32,
    pub(crate) fpsr: u32,
}

impl Env {
    #[inline(always)]
    pub(crate) fn load(regs: &Regs) -> Self {
        Self { fpcr: regs.fpcr, fpsr: regs.fpsr }
    }

    #[inline(always)]
    pub(crate) fn store(self, regs: &mut Regs) {
        regs.fpsr = self.fpsr;
    }

    /// `FPRoundingMode()`.
    #[inline]
    pub(crate) fn rounding(&self) -> Rounding {
        match self.fpcr & FPCR_RMODE {
            0x0_0000 => Rounding::TieEven,
            0x40_0000 => Rounding::PosInf,
            0x80_0000 => Rounding::NegInf,
            _ => Rounding::Zero,
        }
    }

    #[inline(always)]
    pub(crate) fn flush(&self) -> bool {
        self.fpcr & FPCR_FZ != 0
    }

    #[inline(always)]
    pub(crate) fn raise(&mut self, flags: u32) {
        self.fpsr |= flags;
    }
}

/// An interchange format of IEEE 754.
pub(crate) trait Format: Copy + 'static {
    /// Width of the encoding.
    const BITS: u32;
    /// Width of the fraction field.
    const FRAC: u32;

    const MASK: u64 = u64::MAX >> (64 - Self::BITS);
    const SIGN: u64 = 1 << (Self::BITS - 1);
    const FRAC_MASK: u64 = (1 << Self::FRAC) - 1;
    /// The quiet bit of a NaN.
    const QUIET: u64 = 1 << (Self::FRAC - 1);
    /// Greatest exponent field.
    const EXP_MAX: u64 = (1 << (Self::BITS - 1 - Self::FRAC)) - 1;
    const BIAS: i32 = (Self::EXP_MAX >> 1) as i32;
    const INFINITY: u64 = Self::EXP_MAX << Self::FRAC;
    const DEFAULT_NAN: u64 = Self::INFINITY | Self::QUIET;
    const MAX_NORMAL: u64 = Self::INFINITY - 1;
    const ONE: u64 = (Self::BIAS as u64) << Self::FRAC;

    #[inline(always)]
    fn exp(bits: u64) -> u64 {
        bits >> Self::FRAC & Self::EXP_MAX
    }

    #[inline(always)]
    fn frac(bits: u64) -> u64 {
        bits & Self::FRAC_MASK
    }

    #[inline(always)]
    fn is_nan(bits: u64) -> bool {
        bits & (Self::SIGN - 1) > Self::INFINITY
    }

    #[inline(always)]
    fn is_zero(bits: u64) -> bool {
        bits & (Self::SIGN - 1) == 0
    }

    #[inline(always)]
    fn zero(sign: bool) -> u64 {
        if sign { Self::SIGN } else { 0 }
    }

    #[inline(always)]
    fn infinity(sign: bool) -> u64 {
        Self::zero(sign) | Self::INFINITY
    }
}

/// binary16.
#[derive(Clone, Copy)]
pub(crate) struct Half;
/// binary32.
#[derive(Clone, Copy)]
pub(crate) struct Single;
/// binary64.
#[derive(Clone, Copy)]
pub(crate) struct Double;

impl Format for Half {
    const BITS: u32 = 16;
    const FRAC: u32 = 10;
}

impl Format for Single {
    const BITS: u32 = 32;
    const FRAC: u32 = 23;
}

impl Format for Double {
    const BITS: u32 = 64;
    const FRAC: u32 = 52;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Zero,
    Finite,
    Infinity,
    QuietNan,
    SignallingNan,
}

/// A value taken apart. For `Kind::Finite` it is `sig * 2^(exp - 63)`, bit 63 of `sig` set; otherwise
/// `sig` is zero.
#[derive(Clone, Copy, Debug)]
struct Unpacked {
    kind: Kind,
    sign: bool,
    exp: i32,
    sig: u64,
}

impl Unpacked {
    fn is_nan(&self) -> bool {
        matches!(self.kind, Kind::QuietNan | Kind::SignallingNan)
    }

    fn is_infinity(&self) -> bool {
        self.kind == Kind::Infinity
    }

    fn is_zero(&self) -> bool {
        self.kind == Kind::Zero
    }
}

/// `FPUnpack`; for half precision `FPUnpackCV`, which knows no flush-to-zero.
#[inline]
fn unpack<F: Format>(env: &mut Env, bits: u64) -> Unpacked {
    let sign = bits & F::SIGN != 0;
    let field = F::exp(bits);
    let frac = F::frac(bits);
    let special = |kind| Unpacked { kind, sign, exp: 0, sig: 0 };
    if field == 0 {
        if frac == 0 {
            return special(Kind::Zero);
        }
        if F::BITS != 16 && env.flush() {
            env.raise(FPSR_IDC);
            return special(Kind::Zero);
        }
        let shift = frac.leading_zeros();
        let exp = 64 - F::BIAS - F::FRAC as i32 - shift as i32;
        return Unpacked { kind: Kind::Finite, sign, exp, sig: frac << shift };
    }
    if field == F::EXP_MAX && !(F::BITS == 16 && env.fpcr & FPCR_AHP != 0) {
        return special(if frac == 0 {
            Kind::Infinity
        } else if frac & F::QUIET != 0 {
            Kind::QuietNan
        } else {
            Kind::SignallingNan
        });
    }
    let sig = (frac | 1 << F::FRAC) << (63 - F::FRAC);
    Unpacked { kind: Kind::Finite, sign, exp: field as i32 - F::BIAS, sig }
}

/// `FPProcessNaN`.
fn process_nan<F: Format>(env: &mut Env, kind: Kind, bits: u64) -> u64 {
    if kind == Kind::SignallingNan {
        env.raise(FPSR_IOC);
    }
    if env.fpcr & FPCR_DN != 0 { F::DEFAULT_NAN } else { bits | F::QUIET }
}

/// `FPProcessNaNs` and `FPProcessNaNs3`: the first signalling NaN, else the first quiet one.
fn process_nans<F: Format, const N: usize>(
    env: &mut Env,
    ops: [(&Unpacked, u64); N],
) -> Option<u64> {
    for wanted in [Kind::SignallingNan, Kind::QuietNan] {
        for (op, bits) in ops {
            if op.kind == wanted {
                return Some(process_nan::<F>(env, wanted, bits));
            }
        }
    }
    None
}

/// The default NaN of an invalid operation.
fn invalid<F: Format>(env: &mut Env) -> u64 {
    env.raise(FPSR_IOC);
    F::DEFAULT_NAN
}
