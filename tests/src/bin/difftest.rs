//! Differential tests of the software CPU against `qemu-aarch64`; see [`squib_tests::difftest`].

use std::collections::BTreeMap;
use std::process::ExitCode;

use anyhow::ensure;
use clap::Parser;
use squib_soft::testing::{self, State};
use squib_tests::difftest::classes::{self, CLASSES, Class};
use squib_tests::difftest::compare::{self, Report, Side};
use squib_tests::difftest::machine::Stepping;
use squib_tests::difftest::record;
use squib_tests::difftest::streams::{self, Streams};
use squib_tests::difftest::translation::{Mismatch, Tables};
use squib_tests::difftest::values::{self, Rng};
use squib_tests::difftest::{Case, Qemu};

/// Compares the software CPU with qemu-aarch64, instruction by instruction.
#[derive(Parser)]
struct Args {
    /// Classes, or the beginnings of their names.
    classes: Vec<String>,
    /// List the classes.
    #[arg(long)]
    list: bool,
    /// Cases a class.
    #[arg(long, default_value_t = 20_000)]
    count: usize,
    /// Seed of the cases.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Run this instruction word only, with random operands.
    #[arg(long, value_parser = parse_word)]
    word: Option<u32>,
    /// Run FP and SIMD on a whole CPU too, not only the instruction functions.
    #[arg(long)]
    cpu: bool,
    /// Run the CPU on the deterministic clock, at most this many instructions a call.
    #[arg(long)]
    step: Option<u64>,
    /// Print one vector of every instruction that both sides agree on, for a unit test.
    #[arg(long)]
    record: bool,
    /// Draw words until the software CPU takes one for allocated.
    #[arg(long)]
    allocated: bool,
    /// Only vectors of floating-point numbers.
    #[arg(long)]
    float: bool,
    /// Mismatches to print of each group.
    #[arg(long, default_value_t = 1)]
    show: usize,
    /// Groups to print of each class.
    #[arg(long, default_value_t = 40)]
    groups: usize,
}

fn parse_word(text: &str) -> Result<u32, std::num::ParseIntError> {
    u32::from_str_radix(text.trim_start_matches("0x"), 16)
}

fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    if args.list {
        for class in CLASSES {
            println!("{:32} mask {:#010x} bits {:#010x}", class.name, class.mask, class.bits);
        }
        return Ok(ExitCode::SUCCESS);
    }
    let mut selected: Vec<Class> = Vec::new();
    let mut failed = 0;
    for name in &args.classes {
        if name == "streams" {
            failed += run_streams(&args)?;
            continue;
        }
        if name == "translation" {
            failed += run_translation(&args)?;
            continue;
        }
        let classes = classes::named(name);
        ensure!(!classes.is_empty(), "there is no class {name}");
        selected.extend(classes);
    }
    if let Some(word) = args.word {
        let like = CLASSES.iter().find(|class| word & class.mask == class.bits);
        let like = like.unwrap_or(&CLASSES[0]);
        selected = vec![Class { name: "word", mask: u32::MAX, bits: word, key: u32::MAX, ..*like }];
    }
    ensure!(
        !selected.is_empty() || !args.classes.is_empty(),
        "name a class (--list lists them), `streams`, `translation` or a --word"
    );
    for class in &selected {
        let mut rng = Rng::new(args.seed);
        if args.record {
            record::record(class, args.count, args.float, |i| draw(class, &args, &mut rng, i))?;
            continue;
        }
        let side = if class.is_simd() && !args.cpu && args.step.is_none() {
            Side::Data
        } else {
            cpu(&args)
        };
        let report = compare::run(&class.qemu(), side, class.key, args.count, |i| {
            draw(class, &args, &mut rng, i)
        })?;
        failed += print(class, &report, &args);
    }
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn cpu(args: &Args) -> Side {
    Side::Cpu(args.step.map_or(Stepping::Blocks, Stepping::Instructions))
}

fn run_streams(args: &Args) -> anyhow::Result<usize> {
    let mut rng = Rng::new(args.seed);
    let qemu = Qemu::new("max");
    let side = cpu(args);
    let streams = Streams::new(&mut rng)?;
    let report = compare::run(&qemu, side, 0, args.count, |i| streams.case(&mut rng, i))?;
    let found: Vec<_> = report.groups.values().flatten().collect();
    println!("streams: {} cases, {} differ", report.cases, found.len());
    for mismatch in found.iter().take(args.groups) {
        let case = streams::minimise(&mismatch.case, |cases| {
            let outcomes = qemu.run(cases)?.into_iter().zip(side.run(cases)?);
            Ok(outcomes.map(|(e, a)| compare::difference(&e, &a).is_some()).collect())
        })?;
        let mut case = case;
        streams::relocate(&mut case, 0);
        let cases = [case];
        let (expected, actual) = (qemu.run(&cases)?.remove(0), side.run(&cases)?.remove(0));
        let [case] = cases;
        let difference = mismatch.difference;
        print!("{}", compare::describe(&compare::Mismatch { difference, case, expected, actual }));
    }
    Ok(found.len())
}

fn run_translation(args: &Args) -> anyhow::Result<usize> {
    /// Addresses for one set of tables.
    const ADDRESSES: usize = 500;
    let mut rng = Rng::new(args.seed);
    let (mut cases, mut found, mut seen) = (0, Vec::new(), BTreeMap::new());
    while cases < args.count {
        let (faults, differ) = Tables::new(&mut rng, ADDRESSES).compare()?;
        faults.iter().for_each(|(fault, n)| *seen.entry(*fault).or_insert(0) += n);
        found.extend(differ);
        cases += ADDRESSES;
    }
    println!("translation: {cases} addresses in four ways, {} differ", found.len());
    for (fault, n) in seen {
        match fault {
            0 => println!("  {n} translated"),
            fault => println!("  {n} with fault status {:#04x}", fault >> 1),
        }
    }
    for Mismatch { address, kind, tcr, expected, actual } in found.iter().take(args.groups) {
        println!(
            "  {kind} {address:#018x} TCR_EL1 {tcr:#x}: expected PAR_EL1 {expected:#x} actual {actual:#x}"
        );
    }
    Ok(found.len())
}

fn draw(class: &Class, args: &Args, rng: &mut Rng, index: usize) -> Case {
    let mut word = class.word(rng);
    if args.allocated {
        /// A class without a single allocated word must end as well.
        const TRIES: usize = 10_000;
        let allocated = |word| testing::execute_data(word, &mut State::default());
        for _ in 0..TRIES {
            if allocated(word) {
                break;
            }
            word = class.word(rng);
        }
    }
    let mut case = class.operands.case(word, rng, index);
    if args.float {
        values::floats(rng, word, &mut case.state);
    }
    case
}

fn print(class: &Class, report: &Report, args: &Args) -> usize {
    let failed: usize = report.groups.values().map(Vec::len).sum();
    println!(
        "{:32} {:7} cases, {:7} defined, {:6} differ in {} groups",
        class.name,
        report.cases,
        report.defined,
        failed,
        report.groups.len()
    );
    for mismatches in report.groups.values().take(args.groups) {
        println!(" {} like this:", mismatches.len());
        for mismatch in mismatches.iter().take(args.show) {
            print!("{}", compare::describe(mismatch));
        }
    }
    failed
}
