//! Runs cases on both sides and groups what differs.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::process::Command;

use squib_soft::testing::{self, State};

use super::machine::{self, Stepping};
use super::{BATCH, Case, End, Outcome, Qemu};

/// What is compared with the reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The instruction functions of FP and SIMD alone.
    Data,
    /// A whole CPU.
    Cpu(Stepping),
}

impl Side {
    /// One outcome a case, in order.
    ///
    /// # Errors
    /// Those of [`machine::run`].
    pub fn run(self, cases: &[Case]) -> anyhow::Result<Vec<Outcome>> {
        match self {
            Side::Data => Ok(cases.iter().map(execute_data).collect()),
            Side::Cpu(stepping) => machine::run(cases, stepping),
        }
    }
}

/// How the two sides differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Difference {
    /// UNDEFINED in the reference, carried out here.
    Accepted,
    /// Carried out by the reference, UNDEFINED here.
    Refused,
    /// Both carried it out, with different results.
    Result,
}

/// A case with two outcomes.
#[derive(Clone, Debug)]
pub struct Mismatch {
    /// How they differ.
    pub difference: Difference,
    /// The case.
    pub case: Case,
    /// The reference.
    pub expected: Outcome,
    /// The software CPU.
    pub actual: Outcome,
}

/// The result of a run.
#[derive(Debug, Default)]
pub struct Report {
    /// Cases that were run.
    pub cases: usize,
    /// Cases that the reference carried out.
    pub defined: usize,
    /// What differed, grouped by the key bits of the instruction.
    pub groups: BTreeMap<(Difference, u32), Vec<Mismatch>>,
}

/// Runs `count` cases on both sides; `next` makes them from their number in the batch.
///
/// # Errors
/// Those of [`Qemu::run`] and [`Side::run`].
pub fn run(
    qemu: &Qemu,
    side: Side,
    key: u32,
    count: usize,
    mut next: impl FnMut(usize) -> Case,
) -> anyhow::Result<Report> {
    let mut report = Report::default();
    while report.cases < count {
        let cases: Vec<_> = (0..BATCH.min(count - report.cases)).map(&mut next).collect();
        let outcomes = qemu.run(&cases)?.into_iter().zip(side.run(&cases)?);
        report.cases += cases.len();
        for (case, (expected, actual)) in cases.into_iter().zip(outcomes) {
            report.defined += usize::from(expected.end != End::UNDEFINED);
            let Some(difference) = difference(&expected, &actual) else {
                continue;
            };
            let group = report.groups.entry((difference, case.insn() & key)).or_default();
            group.push(Mismatch { difference, case, expected, actual });
        }
    }
    Ok(report)
}

/// The case by the instruction functions of FP and SIMD.
pub fn execute_data(case: &Case) -> Outcome {
    let mut state = case.state.clone();
    let done = case.code.iter().all(|insn| testing::execute_data(*insn, &mut state));
    let end = if done { End::Next } else { End::UNDEFINED };
    Outcome { end, state, memory: case.memory.clone(), fault: None }
}

/// How the outcomes of one case differ, if they do.
pub fn difference(expected: &Outcome, actual: &Outcome) -> Option<Difference> {
    match (expected.end, actual.end) {
        (End::UNDEFINED, End::UNDEFINED) => None,
        (End::UNDEFINED, _) => Some(Difference::Accepted),
        (_, End::UNDEFINED) => Some(Difference::Refused),
        // A load that faults leaves the vectors that it loads UNKNOWN.
        (End::Signal(7 | 11), End::Signal(7 | 11)) => {
            let mut actual = actual.clone();
            actual.state.v = expected.state.v;
            (*expected != actual).then_some(Difference::Result)
        }
        _ => (expected != actual).then_some(Difference::Result),
    }
}

/// The disassembly by binutils, or nothing where they are not installed.
pub fn disassemble(insn: u32) -> Option<String> {
    let mut file = tempfile::NamedTempFile::new().ok()?;
    std::io::Write::write_all(&mut file, &insn.to_le_bytes()).ok()?;
    let output = Command::new("aarch64-linux-gnu-objdump")
        .args(["-D", "-b", "binary", "-m", "aarch64"])
        .arg(file.path())
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = text.lines().find(|line| line.trim_start().starts_with("0:"))?;
    Some(line.split('\t').skip(2).collect::<Vec<_>>().join(" "))
}

/// One mismatch in full: the word, the operands by the usual fields, and what differs.
pub fn describe(mismatch: &Mismatch) -> String {
    let Mismatch { difference, case, expected, actual } = mismatch;
    let insn = case.insn();
    let mut out = String::new();
    for insn in &case.code {
        let text = disassemble(*insn).unwrap_or_default();
        let _ = write!(out, "  {insn:#010x}  {text}");
    }
    let _ = writeln!(out, "  ({difference:?}: {:?} {:?})", expected.end, actual.end);
    if *difference != Difference::Result || expected.end != actual.end {
        return out;
    }
    let before = &case.state;
    let _ = writeln!(
        out,
        "    nzcv {:#010x} fpcr {:#010x} fpsr {:#010x}",
        before.nzcv, before.fpcr, before.fpsr
    );
    for (name, at) in [("d", 0), ("n", 5), ("a", 10), ("m", 16)] {
        let n = (insn >> at & 31) as usize;
        let x = before.x.get(n).copied().unwrap_or(before.sp);
        let _ = writeln!(out, "    {name}: x{n} {x:#018x}  v{n} {:#034x}", before.v[n]);
    }
    let _ = write!(out, "{}", state_difference(&expected.state, &actual.state));
    if expected.fault != actual.fault {
        let (expected, actual) = (expected.fault.unwrap_or(0), actual.fault.unwrap_or(0));
        let _ = writeln!(out, "    fault expected {expected:#x} actual {actual:#x}");
    }
    for (at, (e, a)) in expected.memory.iter().zip(&actual.memory).enumerate() {
        if e != a {
            let _ = writeln!(out, "    memory[{at:#x}] expected {e:#04x} actual {a:#04x}");
        }
    }
    out
}

fn state_difference(expected: &State, actual: &State) -> String {
    let mut out = String::new();
    let mut line = |name: String, expected: u128, actual: u128| {
        if expected != actual {
            let _ = writeln!(out, "    {name:4} expected {expected:#034x} actual {actual:#034x}");
        }
    };
    for n in 0..31 {
        line(format!("x{n}"), expected.x[n].into(), actual.x[n].into());
    }
    line("sp".into(), expected.sp.into(), actual.sp.into());
    line("nzcv".into(), expected.nzcv.into(), actual.nzcv.into());
    line("fpcr".into(), expected.fpcr.into(), actual.fpcr.into());
    line("fpsr".into(), expected.fpsr.into(), actual.fpsr.into());
    for n in 0..32 {
        line(format!("v{n}"), expected.v[n], actual.v[n]);
    }
    out
}
