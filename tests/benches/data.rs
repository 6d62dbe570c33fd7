//! Nanoseconds for one floating-point or Advanced SIMD instruction, decoded once and called through its
//! function pointer as the interpreter does:
//!
//! ```text
//! cargo bench -p squib-tests --bench data
//! ```

use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use squib_soft::testing::{Repeated, State};

/// FPSR.IXC: the usual state of a program after its first inexact operation.
const INEXACT: u32 = 1 << 4;

/// Instructions with d1, d2, d3 (or v1, v2, v3) as sources and register 0 as the destination.
const INSTRUCTIONS: [(&str, u32); 20] = [
    ("fadd d", 0x1e62_2820),
    ("fmul d", 0x1e62_0820),
    ("fdiv d", 0x1e62_1820),
    ("fsqrt d", 0x1e61_c020),
    ("fmadd d", 0x1f42_0c20),
    ("fadd s", 0x1e22_2820),
    ("fcmp d", 0x1e62_2020),
    ("fmov d", 0x1e60_4020),
    ("fmov x, d", 0x9e66_0020),
    ("fmax d", 0x1e62_4820),
    ("fcvtzs x, d", 0x9e78_0020),
    ("scvtf d, x", 0x9e62_0020),
    ("fcvt s, d", 0x1e62_4020),
    ("frintm d", 0x1e65_4020),
    ("fadd 2d", 0x4e62_d420),
    ("fadd 4s", 0x4e22_d420),
    ("fmla 2d", 0x4e62_cc20),
    ("fcmgt 4s", 0x6ea2_e420),
    ("add 4s", 0x4ea2_8420),
    ("eor 16b", 0x6e22_1c20),
];

fn instructions(criterion: &mut Criterion) {
    const COUNT: u32 = 1000;
    let mut state = State::default();
    state.x[1] = 12_345;
    let double = |a: f64, b: f64| u128::from(a.to_bits()) << 64 | u128::from(b.to_bits());
    state.v[1] = double(3.1, 2.7);
    state.v[2] = double(1.3, 0.9);
    state.v[3] = double(-7.7, 5.5);
    for (flags, fpsr) in [("inexact", INEXACT), ("no flags", 0)] {
        let mut group = criterion.benchmark_group(flags);
        group.warm_up_time(Duration::from_millis(100)).measurement_time(Duration::from_millis(300));
        group.throughput(criterion::Throughput::Elements(COUNT.into()));
        for (name, insn) in INSTRUCTIONS {
            let state = State { fpsr, ..state.clone() };
            let mut repeated = Repeated::new(insn, &state).expect(name);
            group.bench_function(name, |bencher| bencher.iter(|| repeated.run(COUNT)));
        }
        group.finish();
    }
}

criterion_group!(benches, instructions);
criterion_main!(benches);
