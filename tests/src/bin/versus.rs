//! squib beside `qemu-system-aarch64` (TCG, one vCPU) with the same kernel, in the same run.
//!
//! ```text
//! cargo run --release -p squib-tests --bin versus -- boot
//! cargo run --release -p squib-tests --bin versus -- python
//! cargo run --release -p squib-tests --bin versus -- snapshot
//! ```

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::Parser;
use squib_tests::{
    debian::{self, Program},
    versus::{boot::boot, python::python, snapshot},
};

/// Compares squib with QEMU.
#[derive(Parser)]
enum Args {
    /// Time from start to the first line of user space, and guest instructions a second.
    Boot {
        /// Boots of each.
        #[arg(long, default_value_t = 3)]
        runs: usize,
        /// Fails if squib's median is more than this many times QEMU's.
        #[arg(long, default_value_t = 5.0)]
        most: f64,
    },
    /// Runs a program of `tests/guest` on the Debian root file system under both and compares.
    Python {
        /// Which program.
        #[arg(long, value_enum, default_value_t = Guest::Checks)]
        program: Guest,
        /// Keeps what QEMU's guest printed.
        #[arg(long)]
        record: Option<PathBuf>,
    },
    /// Writes and restores snapshots of guests with data in memory, beside zstd, the disk and QEMU.
    Snapshot(snapshot::Args),
}

/// A program of `tests/guest`.
#[derive(Clone, Copy, clap::ValueEnum)]
enum Guest {
    /// What Python computes.
    Checks,
    /// What debuggers see.
    Debug,
}

impl Guest {
    fn program(self) -> &'static Program {
        match self {
            Self::Checks => &debian::CHECKS,
            Self::Debug => &debian::DEBUG,
        }
    }
}

fn main() -> Result<ExitCode> {
    match Args::parse() {
        Args::Boot { runs, most } => boot(runs.max(1), most),
        Args::Python { program, record } => python(program.program(), record.as_deref()),
        Args::Snapshot(args) => snapshot::run(&args),
    }
}
