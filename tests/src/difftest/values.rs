//! Random operand values with a bias to those where instructions go wrong.

use squib_soft::testing::State;

/// A small generator (SplitMix64): the same seed gives the same cases on every machine.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// A generator for `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    }

    /// 32 random bits.
    pub fn next_u32(&mut self) -> u32 {
        (self.next_u64() >> 32) as u32
    }

    /// A number below `n`.
    pub fn below(&mut self, n: u32) -> u32 {
        ((u64::from(self.next_u32()) * u64::from(n)) >> 32) as u32
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: u32) -> bool {
        self.below(n) == 0
    }
}

/// FPCR: AHP, DN, FZ, RMode.
const FPCR_BITS: u32 = 0x07C0_0000;
/// FPSR: QC, IDC, IXC, UFC, OFC, DZC, IOC.
const FPSR_BITS: u32 = 0x0800_009F;

/// A random state. Half of the states have FPCR 0, and half have FPSR 0.
pub fn state(rng: &mut Rng) -> State {
    let mut state = State::default();
    for x in &mut state.x {
        *x = integer(rng, 64);
        if rng.one_in(4) {
            *x = integer(rng, 32) | rng.next_u64() << 32;
        }
    }
    state.sp = integer(rng, 64) & !15;
    state.nzcv = rng.next_u32() & 0xF000_0000;
    if rng.one_in(2) {
        state.fpcr = rng.next_u32() & FPCR_BITS;
    }
    if rng.one_in(2) {
        state.fpsr = rng.next_u32() & FPSR_BITS;
    }
    // All registers have the same lanes, or FP cases would seldom meet two interesting operands.
    let lanes = 3 + rng.below(4);
    let float = rng.one_in(2);
    for v in &mut state.v {
        *v = vector(rng, 1 << lanes, float);
    }
    state
}

/// A vector of lanes of `width` bits (8, 16, 32, 64).
pub fn vector(rng: &mut Rng, width: u32, float: bool) -> u128 {
    let mut v = 0;
    for lane in 0..128 / width {
        let value = if float { self::float(rng, width) } else { integer(rng, width) };
        v |= u128::from(value) << (lane * width);
    }
    v
}

/// Replaces the vectors by floating-point numbers of one width. In a quarter of the states the operands
/// of `insn` are related, so that sums cancel and quotients and roots are exact or nearly so.
pub fn floats(rng: &mut Rng, insn: u32, state: &mut State) {
    let width = [16, 32, 32, 64, 64][rng.below(5) as usize];
    for v in &mut state.v {
        *v = vector(rng, width, true);
    }
    if width == 16 || !rng.one_in(4) {
        return;
    }
    let [d, n, a, m] = [0, 5, 10, 16].map(|at| (insn >> at & 31) as usize);
    let kind = rng.below(4);
    let mut related = |x: u128, y: u128| {
        let mut out = 0;
        for shift in (0..128).step_by(width as usize) {
            let lane = |v: u128| (v >> shift) as u64 & u64::MAX >> (64 - width);
            let product = |x: u64, y: u64| match width {
                32 => (f32::from_bits(x as u32) * f32::from_bits(y as u32)).to_bits().into(),
                _ => (f64::from_bits(x) * f64::from_bits(y)).to_bits(),
            };
            let sign = 1 << (width - 1);
            let value = match kind {
                0 => product(lane(x), lane(y)) ^ sign,
                1 => lane(y) ^ u64::from(rng.next_u32() & 1) << (width - 1),
                2 => product(lane(y), float(rng, width)),
                _ => product(lane(y), lane(y)),
            };
            let near = value.wrapping_add(u64::from(rng.below(3))).wrapping_sub(1);
            out |= u128::from(near & u64::MAX >> (64 - width)) << shift;
        }
        out
    };
    if kind == 0 {
        let value = related(state.v[n], state.v[m]);
        state.v[d] = value;
        state.v[a] = value;
    } else {
        state.v[n] = related(state.v[n], state.v[m]);
    }
}

/// An integer of `width` bits (8, 16, 32, 64), zero-extended.
pub fn integer(rng: &mut Rng, width: u32) -> u64 {
    let mask = u64::MAX >> (64 - width);
    let value = match rng.below(16) {
        0 => 0,
        1 => u64::MAX,
        2 => 1,
        3 => mask >> 1,
        4 => (mask >> 1).wrapping_add(1),
        5 => 1 << rng.below(width),
        6 => (1 << rng.below(width)) - 1,
        7 => u64::from(rng.below(256)).wrapping_sub(128),
        8 => !(1 << rng.below(width)),
        9 => mask << (width / 2 - 1),
        _ => rng.next_u64(),
    };
    value & mask
}

/// A floating-point number of `width` bits (16, 32, 64); with 8 any byte.
pub fn float(rng: &mut Rng, width: u32) -> u64 {
    let fraction_bits = match width {
        16 => 10,
        32 => 23,
        64 => 52,
        _ => return integer(rng, width),
    };
    let exponent_bits = width - 1 - fraction_bits;
    let max_exponent = (1u64 << exponent_bits) - 1;
    let bias = max_exponent >> 1;
    let fraction_mask = (1u64 << fraction_bits) - 1;
    let random = rng.next_u64();
    let fraction = match rng.below(6) {
        0 => 0,
        1 => fraction_mask,
        2 => 1 << rng.below(fraction_bits),
        3 => !(1 << rng.below(fraction_bits)) & fraction_mask,
        _ => random & fraction_mask,
    };
    let sign = random >> 63 << (width - 1);
    let exponent = match rng.below(20) {
        0 => return sign,
        1 => return sign | max_exponent << fraction_bits,
        // NaNs, or infinity when the fraction is zero.
        2 | 3 => max_exponent,
        // Denormals and the least normal numbers.
        4 => 0,
        5 => 1,
        6 => u64::from(rng.below(fraction_bits + 3)),
        7 => max_exponent - 1 - u64::from(rng.below(4)),
        // Around one, and around the limits of the integer types.
        8..=11 => bias - 2 + u64::from(rng.below(4)),
        12 | 13 => bias + u64::from(rng.below(fraction_bits + 14)),
        14 | 15 => bias.saturating_sub(u64::from(rng.below(fraction_bits + 8))),
        _ => random >> 8,
    };
    sign | (exponent & max_exponent) << fraction_bits | fraction
}
