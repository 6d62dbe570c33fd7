//! Looks into a binary that was linked for macOS; see [`squib_tests::macho`].
//!
//! ```text
//! cargo run -p squib-tests --bin macho -- target/aarch64-apple-darwin/release/squib
//! ```

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context, Result};
use clap::Parser;
use squib_tests::macho::Binary;

/// Says which system a Mach-O binary is for, and what it takes from the system's libraries.
#[derive(Parser)]
struct Args {
    /// The binary.
    file: PathBuf,
    /// Fails if no function of Hypervisor.framework is imported.
    #[arg(long)]
    require_hv: bool,
}

fn main() -> Result<ExitCode> {
    let args = Args::parse();
    let name = || args.file.display().to_string();
    let bytes = std::fs::read(&args.file).with_context(name)?;
    let binary = Binary::read(&bytes).with_context(name)?;
    println!("{} MiB", bytes.len() >> 20);
    binary.lines().iter().for_each(|line| println!("{line}"));
    let faults = binary.faults(args.require_hv);
    for fault in &faults {
        eprintln!("{}: {fault}", args.file.display());
    }
    Ok(if faults.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
