//! Looks for points at which a restored guest can tell that it was away; see
//! `squib_tests::transparency`.

use std::{path::PathBuf, process::ExitCode, thread, time::Instant};

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand, ValueEnum};
use squib_tests::{
    scenario,
    tiny::Tiny,
    transparency::{Runner, random_points, run_child},
};

/// Runs a guest for N + M instructions, and again for N, a snapshot, a restore in a new process and M;
/// compares memory, disks, registers, devices and console.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Mode,
}

#[derive(Subcommand)]
enum Mode {
    /// Runs random points.
    Run(Run),
    /// The new process of one point.
    #[command(hide = true)]
    Point {
        /// Folder with the snapshot and the disks.
        folder: PathBuf,
        /// Instructions retired at the end.
        end: u64,
    },
    /// Writes the tiny guest as a kernel image.
    Image {
        /// The file to write.
        path: PathBuf,
    },
}

#[derive(clap::Args)]
struct Run {
    /// The guest.
    #[arg(long, value_enum, default_value_t = Guest::Tiny)]
    guest: Guest,
    /// Number of points.
    #[arg(long, default_value_t = 200)]
    points: usize,
    /// Seed of the points; a random one if not given.
    #[arg(long)]
    seed: Option<u64>,
    /// Most instructions before the snapshot [default: 2 million for tiny, 1,200 million for linux].
    #[arg(long)]
    before: Option<u64>,
    /// Most instructions after it [default: 200,000 for tiny, 50 million for linux].
    #[arg(long)]
    after: Option<u64>,
    /// New processes at one time [default: one a core].
    #[arg(long)]
    jobs: Option<usize>,
    /// Where to work; a temporary folder if not given. With it, the snapshots of points that differ are kept.
    #[arg(long)]
    folder: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Guest {
    /// The bare-metal guest of the tests.
    Tiny,
    /// The guest kit's kernel and initramfs.
    Linux,
}

fn main() -> Result<ExitCode> {
    match Arguments::parse().command {
        Mode::Run(run) => points(&run),
        Mode::Point { folder, end } => run_child(&folder, end).map(|()| ExitCode::SUCCESS),
        Mode::Image { path } => {
            Tiny::default().write(&path).with_context(|| format!("{}", path.display()))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn points(run: &Run) -> Result<ExitCode> {
    let temporary = tempfile::tempdir()?;
    let folder = match &run.folder {
        None => temporary.path().to_owned(),
        Some(folder) => {
            std::fs::create_dir_all(folder)?;
            folder.canonicalize()?
        }
    };
    let (config, before, after) = match run.guest {
        Guest::Tiny => (scenario::tiny(&folder)?, 2_000_000, 200_000),
        Guest::Linux => match scenario::linux(&folder)? {
            Some(config) => (config, 1_200_000_000, 50_000_000),
            None => bail!("the guest kit is not in the cache: fetch it with `squib kit fetch`"),
        },
    };
    let seed = run.seed.unwrap_or_else(nanos);
    let points =
        random_points(seed, run.points, run.before.unwrap_or(before), run.after.unwrap_or(after));
    let jobs = run.jobs.unwrap_or_else(|| thread::available_parallelism().map_or(1, |n| n.get()));
    eprintln!("{} points, seed {seed}", points.len());
    let program = std::env::current_exe()?;
    let runner = Runner {
        config: &config,
        program: &program,
        folder: &folder,
        jobs,
        keep: run.folder.is_some(),
    };
    let start = Instant::now();
    let mut done = 0;
    let differences = runner.run(&points, |point, equal, line| {
        done += 1;
        let verdict = if equal { "equal" } else { "DIFFERS" };
        eprintln!("{done}/{}: {point}: {verdict} at: {line}", points.len());
    })?;
    for difference in &differences {
        println!("{}:", difference.point);
        for line in &difference.what {
            println!("    {line}");
        }
    }
    let (all, bad) = (points.len(), differences.len());
    println!("{} of {all} points equal, seed {seed}, {:.1?}", all - bad, start.elapsed());
    Ok(if bad == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A seed that is another one each time.
fn nanos() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |since| since.as_nanos() as u64)
}
