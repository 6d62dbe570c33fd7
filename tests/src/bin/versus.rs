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
use squib_tests::versus::{boot::boot, python::python, snapshot};

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
    /// Runs `tests/guest/checks.py` on the Debian root file system under both and compares.
    Python {
        /// Keeps what QEMU's guest printed.
        #[arg(long)]
        record: Option<PathBuf>,
    },
    /// Writes and restores snapshots of guests with data in memory, beside zstd, the disk and QEMU.
    Snapshot(snapshot::Args),
}

fn main() -> Result<ExitCode> {
    match Args::parse() {
        Args::Boot { runs, most } => boot(runs.max(1), most),
        Args::Python { record } => python(record.as_deref()),
        Args::Snapshot(args) => snapshot::run(&args),
    }
}
