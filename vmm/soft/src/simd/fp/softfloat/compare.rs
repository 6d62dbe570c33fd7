//! Comparison, maximum and minimum.

use core::cmp::Ordering;

use super::{Env, FPSR_IOC, Format, Kind, Unpacked, process_nans, unpack};

/// How `a` relates to `b`, `None` when one is a NaN: the part that `FPCompare`, `FPCompareEQ`,
/// `FPCompareGE` and `FPCompareGT` share. Any NaN is invalid when `signal` says so, a signalling one
/// always.
#[inline(never)]
pub(crate) fn relation<F: Format>(env: &mut Env, a: u64, b: u64, signal: bool) -> Option<Ordering> {
    let x = unpack::<F>(env, a);
    let y = unpack::<F>(env, b);
    if x.is_nan() || y.is_nan() {
        if signal || x.kind == Kind::SignallingNan || y.kind == Kind::SignallingNan {
            env.raise(FPSR_IOC);
        }
        return None;
    }
    Some(key::<F>(&x, a).cmp(&key::<F>(&y, b)))
}

/// `FPMax`.
pub(crate) fn max<F: Format>(env: &mut Env, a: u64, b: u64) -> u64 {
    extreme::<F>(env, a, b, Ordering::Greater)
}

/// `FPMin`.
pub(crate) fn min<F: Format>(env: &mut Env, a: u64, b: u64) -> u64 {
    extreme::<F>(env, a, b, Ordering::Less)
}

/// `FPMaxNum`: a single quiet NaN loses against a number.
pub(crate) fn max_num<F: Format>(env: &mut Env, a: u64, b: u64) -> u64 {
    let (a, b) = replace_nan::<F>(a, b, F::infinity(true));
    max::<F>(env, a, b)
}

/// `FPMinNum`.
pub(crate) fn min_num<F: Format>(env: &mut Env, a: u64, b: u64) -> u64 {
    let (a, b) = replace_nan::<F>(a, b, F::infinity(false));
    min::<F>(env, a, b)
}

/// Orders all values that are not NaNs. A flushed denormal is a zero.
fn key<F: Format>(x: &Unpacked, bits: u64) -> i64 {
    if x.is_zero() {
        return 0;
    }
    let magnitude = (bits & (F::SIGN - 1)) as i64;
    if x.sign { -magnitude } else { magnitude }
}

#[inline(never)]
fn extreme<F: Format>(env: &mut Env, a: u64, b: u64, wanted: Ordering) -> u64 {
    let x = unpack::<F>(env, a);
    let y = unpack::<F>(env, b);
    if let Some(nan) = process_nans::<F, 2>(env, [(&x, a), (&y, b)]) {
        return nan;
    }
    let first = key::<F>(&x, a).cmp(&key::<F>(&y, b)) == wanted;
    let (chosen, bits) = if first { (&x, a) } else { (&y, b) };
    if chosen.is_zero() {
        // Of two zeros the maximum is the positive one, the minimum the negative one.
        let sign = if wanted == Ordering::Greater { x.sign && y.sign } else { x.sign || y.sign };
        return F::zero(sign);
    }
    bits
}

fn replace_nan<F: Format>(a: u64, b: u64, with: u64) -> (u64, u64) {
    let quiet = |bits| F::is_nan(bits) && bits & F::QUIET != 0;
    match (quiet(a), quiet(b)) {
        (true, false) => (with, b),
        (false, true) => (a, with),
        _ => (a, b),
    }
}
