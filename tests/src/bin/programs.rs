//! A C compiler, gdb, node and java in a guest on the software CPU, and whether they print what they should.
//!
//! ```text
//! cargo run --release -p squib-tests --bin programs
//! ```
//!
//! The first run downloads about 150 MB of Debian packages and makes a root file system of them in the cache, beside the
//! kit's own. Probes of the kernel's tracer are a test: `tests/guest/debug.py`.

use std::process::ExitCode;

use anyhow::{Result, ensure};
use clap::Parser;
use squib_tests::programs::{self, PROGRAMS, Program};

/// Runs foreign programs in a Debian guest. Ends with 0 if all print what they should.
#[derive(Parser)]
struct Args {
    /// Which: gcc, gdb, node, java [default: all].
    programs: Vec<String>,
    /// vCPUs.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=32))]
    cpus: u32,
    /// Prints all that they print.
    #[arg(long)]
    output: bool,
}

fn main() -> Result<ExitCode> {
    let args = Args::parse();
    for name in &args.programs {
        ensure!(PROGRAMS.iter().any(|program| program.name == name), "no program `{name}`");
    }
    let wanted = |program: &Program| {
        args.programs.is_empty() || args.programs.iter().any(|name| name == program.name)
    };
    let chosen: Vec<Program> = PROGRAMS.into_iter().filter(wanted).collect();
    let kit = programs::kit()?;
    let folder = tempfile::tempdir()?;
    let mut failures = 0;
    programs::run(&kit, &chosen, args.cpus, folder.path(), |name, ran| {
        let program = chosen.iter().find(|program| program.name == name);
        let difference = program.and_then(|program| program.difference(&ran.printed));
        failures += usize::from(difference.is_some());
        let (cpu, took) = (ran.cpu.as_secs_f64(), ran.took.as_secs_f64());
        let result = difference.unwrap_or_else(|| "ok".into());
        println!("{name}: {result}; CPU time {cpu:.1} s, in all {took:.1} s");
        if args.output && program.is_some() {
            println!("{}", ran.printed);
        }
    })?;
    println!("{failures} failures");
    Ok(ExitCode::from(u8::from(failures > 0)))
}
