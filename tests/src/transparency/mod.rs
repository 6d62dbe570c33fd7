//! The transparency test: a guest that was saved and restored cannot tell.
//!
//! On the deterministic software CPU a machine is run for N + M instructions. Another one is run for N,
//! a snapshot of it is restored in a new process, and that runs for M. Memory, disks, the state of
//! every device and vCPU, and the bytes on the console must be equal.
//!
//! One run gives the expectation for all points, a second one the snapshots of all points, so that
//! taking a snapshot must not disturb the machine that goes on either.

mod carrier;
mod points;
mod witness;

use std::{
    fmt, fs,
    io::{self, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use squib_vmm::{
    config::MachineConfig,
    machine::{Machine, RunUntil},
};

use crate::console::Capture;
pub use points::random_points;
pub use witness::Witness;

/// Where one snapshot is taken, and how far the restored machine goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point {
    /// Instructions retired before the snapshot.
    pub at: u64,
    /// Instructions retired after it.
    pub more: u64,
}

impl Point {
    /// Instructions retired at the comparison.
    pub fn end(self) -> u64 {
        self.at + self.more
    }
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} + {}", self.at, self.more)
    }
}

/// A point at which a restored guest was not what it should be.
#[derive(Clone, Debug)]
pub struct Difference {
    /// The point.
    pub point: Point,
    /// What differs, one line each.
    pub what: Vec<String>,
}

/// How the points are run.
pub struct Runner<'a> {
    /// A deterministic machine; its disks are copied before each run and never written.
    pub config: &'a MachineConfig,
    /// A program that gives `arguments` to [`run_child`]; the new process.
    pub program: &'a Path,
    /// An empty folder for snapshots and disks, with room for a few of both.
    pub folder: &'a Path,
    /// Processes at one time.
    pub jobs: usize,
    /// Keeps the snapshot of a point that differs.
    pub keep: bool,
}

impl Runner<'_> {
    /// Runs all points; `progress` hears of each that is done, whether all was equal, and the last line on
    /// its console. Returns those that differ.
    pub fn run(
        &self,
        points: &[Point],
        mut progress: impl FnMut(Point, bool, &str),
    ) -> Result<Vec<Difference>> {
        let mut ordered = points.to_vec();
        ordered.sort_by_key(|point| point.end());
        let mut expected = self.expect(&ordered)?;
        // In the order in which the second run meets them.
        let mut order: Vec<usize> = (0..ordered.len()).collect();
        order.sort_by_key(|n| ordered[*n].at);

        let folder = self.folder.join("saved-run");
        let (machine, console) = self.boot(&folder)?;
        let mut running: Vec<Job> = Vec::new();
        let mut differences = Vec::new();
        for n in order {
            while running.len() >= self.jobs.max(1) {
                self.finish(running.remove(0), &mut differences, &mut progress)?;
            }
            let point = ordered[n];
            let reached = machine.run_until(point.at)?;
            ensure!(reached == RunUntil::Reached, "instruction {}: {reached:?}", point.at);
            let expected = std::mem::take(&mut expected[n]);
            running.push(self.spawn(point, n, &machine, console.taken(), expected)?);
        }
        for job in running {
            self.finish(job, &mut differences, &mut progress)?;
        }
        Ok(differences)
    }

    /// The run that is never saved: what is expected at the end of each point.
    fn expect(&self, points: &[Point]) -> Result<Vec<Witness>> {
        let folder = self.folder.join("straight-run");
        let (machine, console) = self.boot(&folder)?;
        let mut expected = Vec::new();
        for point in points {
            let reached = machine.run_until(point.end())?;
            expected.push(Witness::of(&machine, &reached, console.taken())?);
        }
        Ok(expected)
    }

    /// A machine at its first instruction, with fresh copies of its disks in `folder`.
    fn boot(&self, folder: &Path) -> Result<(Machine, Capture)> {
        fs::create_dir(folder)?;
        let mut config = self.config.clone();
        ensure!(config.deterministic.is_some(), "the machine must be deterministic");
        for disk in &mut config.disks {
            disk.path = copy_disk(&disk.path, folder, &disk.id)?;
        }
        let console = Capture::default();
        Ok((Machine::boot(config, Box::new(console.clone()))?, console))
    }

    /// Saves `machine` and restores it in a new process.
    fn spawn(
        &self,
        point: Point,
        n: usize,
        machine: &Machine,
        console: Vec<u8>,
        expected: Witness,
    ) -> Result<Job> {
        let folder = self.folder.join(format!("point-{n}"));
        fs::create_dir(&folder)?;
        carrier::save(machine, &folder)?;
        let child = Command::new(self.program)
            .arg("point")
            .arg(&folder)
            .arg(point.end().to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .with_context(|| format!("{}", self.program.display()))?;
        Ok(Job { point, folder, child, console, expected })
    }

    fn finish(
        &self,
        job: Job,
        differences: &mut Vec<Difference>,
        progress: &mut impl FnMut(Point, bool, &str),
    ) -> Result<()> {
        let Job { point, folder, child, console, expected } = job;
        let output = child.wait_with_output()?;
        let what = match output.status.success() {
            true => {
                let mut found: Witness = serde_json::from_slice(&output.stdout)
                    .with_context(|| format!("point {point}: the new process's answer"))?;
                found.console.splice(0..0, console);
                expected.differences(&found)
            }
            false => vec![format!("the new process ended with {}", output.status)],
        };
        progress(point, what.is_empty(), &expected.last_line());
        let kept = !what.is_empty() && self.keep;
        if !what.is_empty() {
            differences.push(Difference { point, what });
        }
        if !kept {
            fs::remove_dir_all(folder)?;
        }
        Ok(())
    }
}

/// A point under way.
struct Job {
    point: Point,
    folder: PathBuf,
    child: Child,
    /// What the saved machine had printed.
    console: Vec<u8>,
    expected: Witness,
}

/// The new process: restores the snapshot in `folder`, runs until `end` instructions are retired, and
/// prints its [`Witness`] as JSON.
pub fn run_child(folder: &Path, end: u64) -> Result<()> {
    let console = Capture::default();
    let machine = carrier::restore(folder, Box::new(console.clone()))?;
    let reached = machine.run_until(end)?;
    let witness = Witness::of(&machine, &reached, console.taken())?;
    let mut out = io::stdout().lock();
    serde_json::to_writer(&mut out, &witness)?;
    out.flush()?;
    Ok(())
}

fn copy_disk(from: &Path, folder: &Path, id: &str) -> Result<PathBuf> {
    let to = folder.join(format!("disk-{id}"));
    fs::copy(from, &to).with_context(|| format!("{} to {}", from.display(), to.display()))?;
    Ok(to)
}
