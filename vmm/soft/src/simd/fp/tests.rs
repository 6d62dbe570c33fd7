//! Recorded cases, cases by hand where the Arm ARM is subtle, and the host's arithmetic against the
//! software's.

use proptest::prelude::*;

use super::host::{self, Host};
use super::softfloat::{
    self as soft, Double, Env, FPCR_AHP, FPCR_DN, FPCR_FZ, FPSR_DZC, FPSR_IDC, FPSR_IOC, FPSR_IXC,
    FPSR_OFC, FPSR_UFC, Format, Half, Rounding, Single,
};
use crate::testing::{State, execute_data};

const POS_INF: u32 = 1 << 22;
const NEG_INF: u32 = 2 << 22;
const TO_ZERO: u32 = 3 << 22;

const INF: u64 = Double::INFINITY;
const QUIET: u64 = 0x7ff8_0000_0000_1234;
const SIGNALLING: u64 = 0xfff0_0000_0000_5678;
const QUIETED: u64 = 0xfff8_0000_0000_5678;

fn env(fpcr: u32) -> Env {
    Env { fpcr, fpsr: 0 }
}

/// The result and the flags of an operation that starts without flags.
fn run(fpcr: u32, op: impl Fn(&mut Env) -> u64) -> (u64, u32) {
    let mut env = env(fpcr);
    let value = op(&mut env);
    (value, env.fpsr)
}

#[test]
fn every_instruction_gives_what_qemu_gives() {
    assert!(crate::simd::vectors::check(include_str!("vectors.txt")) > 1500);
}

#[test]
fn what_is_not_advertised_is_unallocated() {
    let words = [
        (0x1ee2_2820, "fadd h0, h1, h2"),
        (0x1ee0_0020, "fcvtns w0, h1"),
        (0x1ee7_0020, "fmov h0, w1"),
        (0x1ee0_4020, "fmov h0, h1"),
        (0x1fc2_0c20, "fmadd h0, h1, h2, h3"),
        (0x1e7e_0020, "fjcvtzs w0, d1"),
        (0x1e63_4020, "bfcvt"),
        (0x1e28_4020, "frint32z s0, s1"),
        (0x1e69_c020, "frint64x d0, d1"),
        (0x1e22_4020, "fcvt s0, s1"),
        (0x1e62_c020, "fcvt d0, d1"),
        (0x1e66_0020, "fmov w0, d1"),
        (0x9e26_0020, "fmov x0, s1"),
        (0x1eae_0020, "fmov w0, v1.d[1]"),
        (0x1e02_7c20, "scvtf s0, w1, #33"),
        (0x3e22_2820, "fadd with S 1"),
        (0x9e22_2820, "fadd with M 1"),
        (0x1ea2_2820, "fadd with ptype 2"),
        (0x1e22_9820, "opcode 9 of two sources"),
        (0x1e22_2021, "fcmp with opcode2 1"),
        (0x1e20_1020 | 1 << 5, "fmov immediate with imm5 1"),
        (0x0e42_1420, "fadd v0.4h, v1.4h, v2.4h"),
        (0x0e62_d420, "fadd with one double"),
        (0x0e22_ec20, "fmlal v0.2s, v1.2h, v2.2h"),
        (0x2e42_e420, "fcadd v0.4h"),
        (0x6e82_c420, "fcmla v0.4s"),
        (0x0f02_9020, "fmul v0.4h, v1.4h, v2.h[0]"),
        (0x4fe2_9020, "fmul by element of doubles with L 1"),
        (0x0fc2_9020, "fmul by element with one double"),
        (0x4f42_9020, "fmul by element with size 1"),
        (0x0e30_c820, "fmaxnmv of half precision"),
        (0x2e30_c820, "fmaxnmv of two singles"),
        (0x6e70_c820, "fmaxnmv of doubles"),
        (0x5e30_c820, "fmaxnmp h0, v1.2h"),
        (0x2e21_6820, "fcvtxn to half"),
        (0x0ea1_6820, "bfcvtn"),
        (0x0e21_e820, "frint32z v0.2s"),
        (0x4ee1_c820, "urecpe of doubles"),
        (0x0f10_e420, "scvtf v0.4h, #16"),
        (0x0f40_e420, "scvtf with one double"),
    ];
    for (word, what) in words {
        assert!(crate::simd::decode(word).is_none(), "{word:#010x} {what}");
    }
}

#[test]
fn a_scalar_result_zeroes_the_rest_of_the_register() {
    let mut state = State { v: [u128::MAX; 32], ..State::default() };
    state.v[1] = u128::from(1.5f32.to_bits()) | 7 << 64;
    state.v[2] = u128::from(2.25f32.to_bits()) | 9 << 32;
    assert!(execute_data(0x1e22_2820, &mut state)); // fadd s0, s1, s2
    assert_eq!(state.v[0], u128::from(3.75f32.to_bits()));
    assert_eq!(state.fpsr, 0);
}

#[test]
fn the_first_signalling_nan_wins_then_the_first_quiet_one() {
    let add = |a, b| run(0, |env| soft::add::<Double>(env, a, b, false));
    assert_eq!(add(QUIET, SIGNALLING), (QUIETED, FPSR_IOC));
    assert_eq!(add(SIGNALLING, QUIET), (QUIETED, FPSR_IOC));
    assert_eq!(add(QUIET, QUIET | 1), (QUIET, 0));
    assert_eq!(add(INF, QUIET), (QUIET, 0));
    let sub = |a, b| run(0, |env| soft::add::<Double>(env, a, b, true));
    assert_eq!(sub(0, QUIET), (QUIET, 0), "the subtrahend's NaN keeps its sign");
    let default = |a, b| run(FPCR_DN, |env| soft::add::<Double>(env, a, b, false));
    assert_eq!(default(QUIET, SIGNALLING), (Double::DEFAULT_NAN, FPSR_IOC));
    assert_eq!(default(QUIET, 0), (Double::DEFAULT_NAN, 0));
}

#[test]
fn a_fused_addend_comes_first_and_a_quiet_one_does_not_hide_infinity_by_zero() {
    let fused = |z, x, y| run(0, |env| soft::mul_add::<Double>(env, z, x, y));
    assert_eq!(fused(QUIET, QUIET | 1, QUIET | 2), (QUIET, 0));
    assert_eq!(fused(QUIET, SIGNALLING, 0), (QUIETED, FPSR_IOC));
    assert_eq!(fused(QUIET, INF, 0), (Double::DEFAULT_NAN, FPSR_IOC));
    assert_eq!(fused(SIGNALLING, INF, 0), (QUIETED, FPSR_IOC));
    assert_eq!(fused(Double::infinity(true), INF, Double::ONE), (Double::DEFAULT_NAN, FPSR_IOC));
}

#[test]
fn an_exact_zero_is_negative_only_when_rounding_down() {
    let one = 1f64.to_bits();
    for (fpcr, zero) in [(0, 0), (POS_INF, 0), (TO_ZERO, 0), (NEG_INF, Double::SIGN)] {
        assert_eq!(run(fpcr, |env| soft::add::<Double>(env, one, one, true)), (zero, 0));
        let fused = run(fpcr, |env| soft::mul_add::<Double>(env, one | Double::SIGN, one, one));
        assert_eq!(fused, (zero, 0));
        assert_eq!(run(fpcr, |env| soft::add::<Double>(env, 0, Double::SIGN, false)), (zero, 0));
    }
}

#[test]
fn tininess_is_found_before_rounding() {
    // (1 - 2^-53) * 2^-1022 is below the least normal number and rounds up to it.
    let value = 0x3fef_ffff_ffff_ffff;
    let least = 1 << 52;
    let product = run(0, |env| soft::mul::<Double>(env, value, least));
    assert_eq!(product, (least, FPSR_UFC | FPSR_IXC));
    let product = run(FPCR_FZ, |env| soft::mul::<Double>(env, value, least));
    assert_eq!(product, (0, FPSR_UFC), "flushing is not inexact");
    let exact = run(0, |env| soft::mul::<Double>(env, 0.5f64.to_bits(), least));
    assert_eq!(exact, (least >> 1, 0), "an exact denormal raises nothing");
}

#[test]
fn flush_to_zero_takes_denormal_operands_for_zeros() {
    let denormal = Single::SIGN | 5;
    let sum = run(FPCR_FZ, |env| soft::add::<Single>(env, denormal, Single::SIGN, false));
    assert_eq!(sum, (Single::SIGN, FPSR_IDC));
    let quotient = run(FPCR_FZ, |env| soft::div::<Single>(env, Single::ONE, denormal));
    assert_eq!(quotient, (Single::infinity(true), FPSR_IDC | FPSR_DZC));
    assert_eq!(run(FPCR_FZ, |env| host::max::<Single>(env, denormal, 3, false)).1, FPSR_IDC);
    let mut state = State { fpcr: FPCR_FZ, ..State::default() };
    state.v[1] = denormal.into();
    assert!(execute_data(0x1e20_2028, &mut state)); // fcmp s1, #0.0
    assert_eq!((state.nzcv, state.fpsr), (0x6000_0000, FPSR_IDC));
}

#[test]
fn overflow_goes_to_infinity_or_the_greatest_number_by_the_rounding_mode() {
    let max = Single::MAX_NORMAL;
    let flags = FPSR_OFC | FPSR_IXC;
    for (fpcr, plus, minus) in [
        (0, Single::INFINITY, Single::INFINITY),
        (POS_INF, Single::INFINITY, max),
        (NEG_INF, max, Single::INFINITY),
        (TO_ZERO, max, max),
    ] {
        let sum = |a| run(fpcr, |env| soft::add::<Single>(env, a, a, false));
        assert_eq!(sum(max), (plus, flags));
        assert_eq!(sum(max | Single::SIGN), (minus | Single::SIGN, flags));
    }
    let odd = run(0, |env| soft::convert::<Double, Single>(env, f64::MAX.to_bits(), Rounding::Odd));
    assert_eq!(odd, (max, flags));
}

#[test]
fn the_alternative_half_format_has_neither_infinity_nor_nan() {
    let to_half = |a: f32| {
        run(FPCR_AHP, |env| {
            soft::convert::<Single, Half>(env, a.to_bits().into(), Rounding::TieEven)
        })
    };
    assert_eq!(to_half(f32::NEG_INFINITY), (0xffff, FPSR_IOC));
    assert_eq!(to_half(f32::NAN), (0, FPSR_IOC));
    assert_eq!(to_half(131_008.0), (0x7fff, 0));
    assert_eq!(to_half(131_072.0), (0x7fff, FPSR_IOC));
    let wide = run(FPCR_AHP, |env| soft::convert::<Half, Single>(env, 0x7c00, Rounding::TieEven));
    assert_eq!(wide, (65_536f32.to_bits().into(), 0));
}

#[test]
fn conversions_to_integers_saturate_and_tell_invalid_from_inexact() {
    let to = |a: f64, width, unsigned, mode| {
        run(0, |env| soft::to_fixed::<Double>(env, a.to_bits(), width, unsigned, 0, mode))
    };
    assert_eq!(to(f64::NAN, 64, false, Rounding::Zero), (0, FPSR_IOC));
    assert_eq!(to(3e9, 32, false, Rounding::Zero), (0x7fff_ffff, FPSR_IOC));
    assert_eq!(to(-2_147_483_648.5, 32, false, Rounding::Zero), (0x8000_0000, FPSR_IXC));
    assert_eq!(to(-2_147_483_648.5, 32, false, Rounding::NegInf), (0x8000_0000, FPSR_IOC));
    assert_eq!(to(-0.5, 64, true, Rounding::Zero), (0, FPSR_IXC));
    assert_eq!(to(-0.5, 64, true, Rounding::NegInf), (0, FPSR_IOC));
    assert_eq!(to(2.5, 64, false, Rounding::TieEven), (2, FPSR_IXC));
    assert_eq!(to(-2.5, 64, false, Rounding::TieAway), (3u64.wrapping_neg(), FPSR_IXC));
    assert_eq!(to(18_446_744_073_709_549_568.0, 64, true, Rounding::Zero), (u64::MAX - 2047, 0));
    assert_eq!(to(f64::NEG_INFINITY, 64, false, Rounding::Zero), (1 << 63, FPSR_IOC));
}

#[test]
fn steps_of_reciprocals_know_infinity_by_zero() {
    let recip = |a, b| run(0, |env| soft::recip_step::<Double>(env, a, b));
    let rsqrt = |a, b| run(0, |env| soft::rsqrt_step::<Double>(env, a, b));
    assert_eq!(recip(INF, 0), (2f64.to_bits(), 0));
    assert_eq!(rsqrt(0, INF), (1.5f64.to_bits(), 0));
    assert_eq!(recip(QUIET, 0), (QUIET ^ Double::SIGN, 0), "the first operand is negated first");
    assert_eq!(rsqrt(2f64.to_bits(), 1f64.to_bits()), (0.5f64.to_bits(), 0));
    assert_eq!(run(0, |env| soft::mulx::<Double>(env, INF, Double::SIGN)), ((-2f64).to_bits(), 0));
}

/// The bits of a number, a quarter of them special: zeros, the ends of the ranges, NaNs, and fractions
/// with few bits.
fn number<F: Format>() -> impl Strategy<Value = u64> {
    let bias = F::BIAS as u64;
    let exp = prop_oneof![
        4 => 0..=F::EXP_MAX,
        4 => bias - 3..=bias + 3,
        2 => bias..=bias + 66,
        1 => Just(0u64),
        1 => 1..=u64::from(F::FRAC) + 2,
        1 => F::EXP_MAX - 3..=F::EXP_MAX,
    ];
    let frac = prop_oneof![
        4 => 0..=F::FRAC_MASK,
        1 => Just(0u64),
        1 => Just(F::FRAC_MASK),
        2 => (0..F::FRAC).prop_map(|bit| 1u64 << bit),
        2 => (0..F::FRAC, 0..=F::FRAC_MASK).prop_map(|(low, frac)| frac >> low << low),
    ];
    (any::<bool>(), exp, frac).prop_map(|(sign, exp, frac)| F::zero(sign) | exp << F::FRAC | frac)
}

fn control() -> impl Strategy<Value = Env> {
    let fpcr = prop_oneof![4 => Just(0), 2 => Just(FPCR_FZ), 1 => (0u32..32).prop_map(|f| f << 22)];
    let fpsr = prop_oneof![Just(0), Just(FPSR_IXC), Just(FPSR_UFC | FPSR_IOC)];
    (fpcr, fpsr).prop_map(|(fpcr, fpsr)| Env { fpcr, fpsr })
}

/// Two ways to the same result and flags.
fn same(env: Env, fast: impl Fn(&mut Env) -> u64, slow: impl Fn(&mut Env) -> u64) {
    let (mut by_fast, mut by_slow) = (env, env);
    let (x, y) = (fast(&mut by_fast), slow(&mut by_slow));
    assert_eq!((x, by_fast.fpsr), (y, by_slow.fpsr), "{env:x?}");
}

fn host_equals_soft<F: Host>(env: Env, a: u64, b: u64, c: u64, related: u32) {
    // A sum that nearly cancels, a quotient and a root that are nearly exact.
    let (x, y) = (F::value(a), F::value(b));
    let product = F::bits(x * y).wrapping_add(u64::from(related)).wrapping_sub(1) & F::MASK;
    let square = F::bits(x * x).wrapping_add(u64::from(related)).wrapping_sub(1) & F::MASK;
    for (a, b) in [(a, b), (product, b), (a, a), (a, a ^ F::SIGN)] {
        same(env, |e| host::add::<F>(e, a, b), |e| soft::add::<F>(e, a, b, false));
        same(env, |e| host::sub::<F>(e, a, b), |e| soft::add::<F>(e, a, b, true));
        same(env, |e| host::mul::<F>(e, a, b), |e| soft::mul::<F>(e, a, b));
        same(env, |e| host::div::<F>(e, a, b), |e| soft::div::<F>(e, a, b));
        for signal in [false, true] {
            let code = |relation: Option<core::cmp::Ordering>| relation.map_or(9, |r| r as u64);
            same(
                env,
                |e| code(host::relation::<F>(e, a, b, signal)),
                |e| code(soft::relation::<F>(e, a, b, signal)),
            );
        }
        same(env, |e| host::max::<F>(e, a, b, false), |e| soft::max::<F>(e, a, b));
        same(env, |e| host::min::<F>(e, a, b, false), |e| soft::min::<F>(e, a, b));
        same(env, |e| host::max::<F>(e, a, b, true), |e| soft::max_num::<F>(e, a, b));
        same(env, |e| host::min::<F>(e, a, b, true), |e| soft::min_num::<F>(e, a, b));
    }
    for c in [c, product, product ^ F::SIGN] {
        same(env, |e| host::mul_add::<F>(e, c, a, b), |e| soft::mul_add::<F>(e, c, a, b));
    }
    for a in [a, square] {
        same(env, |e| host::sqrt::<F>(e, a), |e| soft::sqrt::<F>(e, a));
    }
    for (width, unsigned) in [(32, false), (32, true), (64, false), (64, true)] {
        same(
            env,
            |e| host::to_int_zero::<F>(e, a, width, unsigned),
            |e| soft::to_fixed::<F>(e, a, width, unsigned, 0, Rounding::Zero),
        );
    }
    for (value, unsigned) in [(b, false), (b, true), (c >> (related * 16), true)] {
        same(
            env,
            |e| host::from_int::<F>(e, value, unsigned),
            |e| {
                let rounding = e.rounding();
                soft::from_fixed::<F>(e, value, unsigned, 0, rounding)
            },
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32_768))]

    #[test]
    fn doubles_by_the_host_equal_those_by_software(
        env in control(),
        a in number::<Double>(),
        b in number::<Double>(),
        c in number::<Double>(),
        related in 0u32..3,
    ) {
        host_equals_soft::<Double>(env, a, b, c, related);
        same(env, |e| host::narrow(e, a), |e| {
            let rounding = e.rounding();
            soft::convert::<Double, Single>(e, a, rounding)
        });
    }

    #[test]
    fn singles_by_the_host_equal_those_by_software(
        env in control(),
        a in number::<Single>(),
        b in number::<Single>(),
        c in number::<Single>(),
        related in 0u32..3,
    ) {
        host_equals_soft::<Single>(env, a, b, c, related);
        same(env, |e| host::widen(e, a), |e| {
            let rounding = e.rounding();
            soft::convert::<Single, Double>(e, a, rounding)
        });
    }
}
