//! The operations as types, so that one of them serves scalars, vectors, elements and pairs.

use core::cmp::Ordering;

use super::host::{self, Host};
use super::softfloat::{self as soft, Env, Rounding};

/// One operand.
pub(super) trait Unary {
    fn apply<F: Host>(env: &mut Env, a: u64) -> u64;
}

/// Two operands, Rn's first.
pub(super) trait Binary {
    fn apply<F: Host>(env: &mut Env, a: u64, b: u64) -> u64;
}

/// The accumulator and two operands.
pub(super) trait Ternary {
    fn apply<F: Host>(env: &mut Env, acc: u64, a: u64, b: u64) -> u64;
}

macro_rules! unary {
    ($($name:ident: |$env:ident, $a:ident| $body:expr;)*) => {$(
        pub(super) struct $name;
        impl Unary for $name {
            #[inline(always)]
            fn apply<F: Host>($env: &mut Env, $a: u64) -> u64 {
                $body
            }
        }
    )*};
}

macro_rules! binary {
    ($($name:ident: |$env:ident, $a:ident, $b:ident| $body:expr;)*) => {$(
        pub(super) struct $name;
        impl Binary for $name {
            #[inline(always)]
            fn apply<F: Host>($env: &mut Env, $a: u64, $b: u64) -> u64 {
                $body
            }
        }
    )*};
}

macro_rules! ternary {
    ($($name:ident: |$env:ident, $acc:ident, $a:ident, $b:ident| $body:expr;)*) => {$(
        pub(super) struct $name;
        impl Ternary for $name {
            #[inline(always)]
            fn apply<F: Host>($env: &mut Env, $acc: u64, $a: u64, $b: u64) -> u64 {
                $body
            }
        }
    )*};
}

unary! {
    Move: |_env, a| a;
    Abs: |_env, a| a & !F::SIGN;
    Neg: |_env, a| a ^ F::SIGN;
    Sqrt: |env, a| host::sqrt::<F>(env, a);
    RintN: |env, a| soft::round_to_int::<F>(env, a, Rounding::TieEven, false);
    RintP: |env, a| soft::round_to_int::<F>(env, a, Rounding::PosInf, false);
    RintM: |env, a| soft::round_to_int::<F>(env, a, Rounding::NegInf, false);
    RintZ: |env, a| soft::round_to_int::<F>(env, a, Rounding::Zero, false);
    RintA: |env, a| soft::round_to_int::<F>(env, a, Rounding::TieAway, false);
    RintI: |env, a| { let mode = env.rounding(); soft::round_to_int::<F>(env, a, mode, false) };
    RintX: |env, a| { let mode = env.rounding(); soft::round_to_int::<F>(env, a, mode, true) };
    RecipEstimate: |env, a| soft::recip_estimate::<F>(env, a);
    RsqrtEstimate: |env, a| soft::rsqrt_estimate::<F>(env, a);
    RecipExponent: |env, a| soft::recip_exponent::<F>(env, a);
    EqualZero: |env, a| Equal::apply::<F>(env, a, 0);
    GreaterZero: |env, a| Greater::apply::<F>(env, a, 0);
    GreaterEqualZero: |env, a| GreaterEqual::apply::<F>(env, a, 0);
    LessZero: |env, a| Greater::apply::<F>(env, 0, a);
    LessEqualZero: |env, a| GreaterEqual::apply::<F>(env, 0, a);
    ToSignedN: |env, a| soft::to_fixed::<F>(env, a, F::BITS, false, 0, Rounding::TieEven);
    ToSignedP: |env, a| soft::to_fixed::<F>(env, a, F::BITS, false, 0, Rounding::PosInf);
    ToSignedM: |env, a| soft::to_fixed::<F>(env, a, F::BITS, false, 0, Rounding::NegInf);
    ToSignedZ: |env, a| host::to_int_zero::<F>(env, a, F::BITS, false);
    ToSignedA: |env, a| soft::to_fixed::<F>(env, a, F::BITS, false, 0, Rounding::TieAway);
    ToUnsignedN: |env, a| soft::to_fixed::<F>(env, a, F::BITS, true, 0, Rounding::TieEven);
    ToUnsignedP: |env, a| soft::to_fixed::<F>(env, a, F::BITS, true, 0, Rounding::PosInf);
    ToUnsignedM: |env, a| soft::to_fixed::<F>(env, a, F::BITS, true, 0, Rounding::NegInf);
    ToUnsignedZ: |env, a| host::to_int_zero::<F>(env, a, F::BITS, true);
    ToUnsignedA: |env, a| soft::to_fixed::<F>(env, a, F::BITS, true, 0, Rounding::TieAway);
    FromSigned: |env, a| host::from_int::<F>(env, sign_extend::<F>(a), false);
    FromUnsigned: |env, a| host::from_int::<F>(env, a, true);
}

binary! {
    Add: |env, a, b| host::add::<F>(env, a, b);
    Sub: |env, a, b| host::sub::<F>(env, a, b);
    Mul: |env, a, b| host::mul::<F>(env, a, b);
    NegMul: |env, a, b| host::mul::<F>(env, a, b) ^ F::SIGN;
    MulX: |env, a, b| soft::mulx::<F>(env, a, b);
    Div: |env, a, b| host::div::<F>(env, a, b);
    AbsDiff: |env, a, b| host::sub::<F>(env, a, b) & !F::SIGN;
    Max: |env, a, b| host::max::<F>(env, a, b, false);
    Min: |env, a, b| host::min::<F>(env, a, b, false);
    MaxNum: |env, a, b| host::max::<F>(env, a, b, true);
    MinNum: |env, a, b| host::min::<F>(env, a, b, true);
    RecipStep: |env, a, b| soft::recip_step::<F>(env, a, b);
    RsqrtStep: |env, a, b| soft::rsqrt_step::<F>(env, a, b);
    Equal: |env, a, b| truth::<F>(host::relation::<F>(env, a, b, false) == Some(Ordering::Equal));
    GreaterEqual: |env, a, b| {
        let relation = host::relation::<F>(env, a, b, true);
        truth::<F>(matches!(relation, Some(Ordering::Greater | Ordering::Equal)))
    };
    Greater: |env, a, b| {
        truth::<F>(host::relation::<F>(env, a, b, true) == Some(Ordering::Greater))
    };
    AbsGreaterEqual: |env, a, b| GreaterEqual::apply::<F>(env, a & !F::SIGN, b & !F::SIGN);
    AbsGreater: |env, a, b| Greater::apply::<F>(env, a & !F::SIGN, b & !F::SIGN);
}

ternary! {
    MulAdd: |env, acc, a, b| host::mul_add::<F>(env, acc, a, b);
    MulSub: |env, acc, a, b| host::mul_add::<F>(env, acc, a ^ F::SIGN, b);
    NegMulAdd: |env, acc, a, b| host::mul_add::<F>(env, acc ^ F::SIGN, a ^ F::SIGN, b);
    NegMulSub: |env, acc, a, b| host::mul_add::<F>(env, acc ^ F::SIGN, a, b);
}

/// `VFPExpandImm`.
pub(super) fn expand_imm<F: Host>(imm8: u32) -> u64 {
    let sign = u64::from(imm8 >> 7 & 1);
    let high = u64::from(imm8 >> 6 & 1);
    let exp_bits = F::BITS - 1 - F::FRAC;
    // NOT(high), then exp_bits - 3 copies of high, then two bits as they are.
    let copies = if high != 0 { (1 << (exp_bits - 3)) - 1 } else { 0 };
    let exp = (high ^ 1) << (exp_bits - 1) | copies << 2 | u64::from(imm8 >> 4 & 3);
    sign << (F::BITS - 1) | exp << F::FRAC | u64::from(imm8 & 15) << (F::FRAC - 4)
}

#[inline(always)]
pub(super) fn sign_extend<F: Host>(value: u64) -> u64 {
    let shift = 64 - F::BITS;
    ((value << shift) as i64 >> shift) as u64
}

#[inline(always)]
fn truth<F: Host>(holds: bool) -> u64 {
    if holds { F::MASK } else { 0 }
}
