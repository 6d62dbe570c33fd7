//! Vectors for unit tests: one case of every instruction of a class, as a line of text.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use squib_soft::testing::State;

use super::classes::Class;
use super::compare::execute_data;
use super::{BATCH, Case, End};

/// Prints `INSN vN=VALUE... -> vN=VALUE... fpsr=VALUE`, in hexadecimal, for the first case of every
/// key of the class that both sides carry out alike. Registers that are not named are zero before.
/// With `float` it is the first case of every key and set of FPSR flags that the instruction raises,
/// and the flags, FPCR and the general source register are part of the case.
///
/// # Errors
/// Those of [`Qemu::run`](super::Qemu::run).
pub fn record(
    class: &Class,
    count: usize,
    float: bool,
    mut next: impl FnMut() -> Case,
) -> anyhow::Result<()> {
    let mut seen = BTreeSet::new();
    let mut left = count;
    while left > 0 {
        let cases: Vec<_> = (0..left.min(BATCH)).map(|_| reduced(next(), float)).collect();
        left -= cases.len();
        for (case, outcome) in cases.iter().zip(class.qemu().run(&cases)?) {
            let same = outcome.end == End::Next && execute_data(case) == outcome;
            let raised = outcome.state.fpsr & !case.state.fpsr;
            let kind = if float { raised } else { 0 };
            if same && seen.insert((case.insn() & class.key, kind)) {
                println!("{}", line(case, &outcome.state));
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

fn line(case: &Case, after: &State) -> String {
    let mut out = format!("{:08x}", case.insn());
    assignments(&mut out, &State::default(), &case.state);
    out += " ->";
    assignments(&mut out, &case.state, after);
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
    let words =
        [("nzcv", from.nzcv, to.nzcv), ("fpcr", from.fpcr, to.fpcr), ("fpsr", from.fpsr, to.fpsr)];
    for (name, from, to) in words {
        if from != to {
            let _ = write!(out, " {name}={to:x}");
        }
    }
}
