//! Vectors for unit tests: one case of every instruction of a class, as a line of text.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use squib_soft::testing::State;

use super::classes::Class;
use super::compare::Side;
use super::machine::Stepping;
use super::{BATCH, Case, EDGE, End, Outcome, SCRATCH, scratch_address};

/// Prints `INSN vN=VALUE... -> vN=VALUE... fpsr=VALUE`, in hexadecimal, for the first case of every
/// key of the class that both sides carry out alike. Registers that are not named are zero before.
/// With `float` it is the first case of every key and set of FPSR flags that the instruction raises,
/// and the flags, FPCR and the general source register are part of the case.
///
/// Classes of a whole CPU have general registers, SP and flags too. Their memory is [`pattern`]
/// before, and what has changed stands behind the arrow as `mADDRESS=VALUE`, eight bytes each.
///
/// # Errors
/// Those of [`Qemu::run`](super::Qemu::run).
pub fn record(
    class: &Class,
    count: usize,
    float: bool,
    mut next: impl FnMut(usize) -> Case,
) -> anyhow::Result<()> {
    let mut seen = BTreeSet::new();
    let mut left = count;
    while left > 0 {
        let reduce = |case| if class.is_simd() { reduced(case, float) } else { reduced_cpu(case) };
        let cases: Vec<_> = (0..left.min(BATCH)).map(|index| reduce(next(index))).collect();
        left -= cases.len();
        let side = if class.is_simd() { Side::Data } else { Side::Cpu(Stepping::Blocks) };
        let outcomes = class.qemu().run(&cases)?.into_iter().zip(side.run(&cases)?);
        for (index, (case, (outcome, actual))) in cases.iter().zip(outcomes).enumerate() {
            // An offset leads from farther away into the page that only this program has.
            let far = EDGE - 0x2_0000..EDGE + 0x2_0000;
            let mut bases = case.state.x.iter().chain([&case.state.sp]);
            let in_scratch = !bases.any(|base| far.contains(base));
            let same = outcome.end == End::Next && actual == outcome && in_scratch;
            let raised = outcome.state.fpsr & !case.state.fpsr;
            let kind = if float { raised } else { 0 };
            if same && seen.insert((case.insn() & class.key, kind)) {
                println!("{}", line(index, case, &outcome));
            }
        }
    }
    Ok(())
}

/// Only the registers that the instruction's fields name (four from Rn on, for TBL) are not zero.
fn reduced(mut case: Case, float: bool) -> Case {
    let n = case.insn() >> 5 & 31;
    let table = case.insn() & 0xBF20_8C00 == 0x0E00_0000;
    let last = if table { 3 } else { 0 };
    let mut named: BTreeSet<_> = (0..=last).map(|i| (n + i) & 31).collect();
    named.extend([case.insn() & 31, case.insn() >> 16 & 31]);
    let full = case.state;
    case.state = State { fpsr: full.fpsr & 1 << 27, ..State::default() };
    if float {
        case.state.fpcr = full.fpcr;
        case.state.fpsr = full.fpsr & 1 << 27;
        let scalar = case.insn() & 0x5F00_0000 == 0x1E00_0000;
        if scalar && case.insn() >> 10 & 1 != 0 {
            case.state.nzcv = full.nzcv; // conditional compare and select
        }
        let conversion = case.insn() >> 21 & 1 == 0 || case.insn() >> 10 & 0x3f == 0;
        if let Some(x) = case.state.x.get_mut(n as usize).filter(|_| scalar && conversion) {
            *x = full.x[n as usize];
        }
        if case.insn() & 0x5F00_0000 == 0x1F00_0000 {
            named.insert(case.insn() >> 10 & 31);
        }
    }
    for n in named {
        case.state.v[n as usize] = full.v[n as usize];
    }
    let copy_from_general =
        case.insn() & 0x9FE0_9400 == 0x0E00_0400 && case.insn() >> 11 & 15 & 13 == 1;
    if let Some(x) = case.state.x.get_mut(n as usize).filter(|_| copy_from_general) {
        *x = full.x[n as usize];
    }
    case
}

/// Only the registers that fields of the instruction may name are not zero.
fn reduced_cpu(mut case: Case) -> Case {
    let insn = case.insn();
    let vector = insn >> 25 & 0b101 == 0b100 && insn >> 26 & 1 != 0;
    let full = case.state;
    case.state = State { nzcv: full.nzcv, ..State::default() };
    for n in [0, 5, 10, 16].map(|at| (insn >> at & 31) as usize) {
        match case.state.x.get_mut(n) {
            Some(x) => *x = full.x[n],
            None => case.state.sp = full.sp,
        }
    }
    if vector {
        // What is stored, or what a load leaves in part.
        for n in [insn & 31, insn >> 10 & 31].map(|n| n as usize) {
            case.state.v[n] = full.v[n];
        }
    }
    if !case.memory.is_empty() {
        case.memory = (0..SCRATCH as u32).map(pattern).collect();
    }
    case
}

/// The byte at `offset` of the memory of a case.
fn pattern(offset: u32) -> u8 {
    (offset.wrapping_mul(0x9E37_79B9) >> 24) as u8
}

fn line(index: usize, case: &Case, outcome: &Outcome) -> String {
    let after = &outcome.state;
    let mut out = format!("{:08x}", case.insn());
    assignments(&mut out, &State::default(), &case.state);
    out += " ->";
    assignments(&mut out, &case.state, after);
    let (before, _) = case.memory.as_chunks();
    let (after, _) = outcome.memory.as_chunks();
    for (n, (before, after)) in (0..).zip(before.iter().zip(after)) {
        if before != after {
            let address = scratch_address(index) + 8 * n;
            let _ = write!(out, " m{address:x}={:x}", u64::from_le_bytes(*after));
        }
    }
    if out.ends_with("->") {
        out.push(' ');
    }
    out
}

/// What `to` has different from `from`.
fn assignments(out: &mut String, from: &State, to: &State) {
    for n in (0..31).filter(|n| from.x[*n] != to.x[*n]) {
        let _ = write!(out, " x{n}={:x}", to.x[n]);
    }
    for n in (0..32).filter(|n| from.v[*n] != to.v[*n]) {
        let _ = write!(out, " v{n}={:x}", to.v[n]);
    }
    if from.sp != to.sp {
        let _ = write!(out, " sp={:x}", to.sp);
    }
    let words =
        [("nzcv", from.nzcv, to.nzcv), ("fpcr", from.fpcr, to.fpcr), ("fpsr", from.fpsr, to.fpsr)];
    for (name, from, to) in words {
        if from != to {
            let _ = write!(out, " {name}={to:x}");
        }
    }
}
