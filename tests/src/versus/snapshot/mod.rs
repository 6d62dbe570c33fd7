//! Writing and restoring snapshots of guests with data in memory.
//!
//! Medians of several runs, and ratios to what the same run found for `zstd` on the same memory, the storage, and
//! QEMU's migration of the same guest. Nothing here fails because something is slow.

mod create;
mod goals;
mod report;
mod restore;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    str::FromStr,
    thread,
};

use anyhow::{Context, Result, ensure};
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    iterator::Signals,
};
use squib::kit::Kit;
use tempfile::TempDir;

use self::{
    create::{create_runs, live_runs},
    report::{Cell, GuestReport, Report, Storage},
    restore::{restore_runs, template_runs},
};
use super::{child, disk, fetch, guest::Guest, median, qemu, squib_vm::Squib};

/// Memory sizes that differ, with the same data, to see what grows with them.
const FLAT: [u64; 2] = [256 << 20, 4 << 30];
/// Ticks after which a guest is taken for booted.
const BOOTED: u64 = 100;

/// What to measure.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Runs of each measure; the median counts.
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Memory of the guests; a quarter of it, at most 512 MiB, is in use.
    #[arg(long, default_value = "512M,2G", value_delimiter = ',', value_name = "SIZE,...")]
    memory: Vec<Size>,
    /// Where everything is written: about five times the largest memory [default: /dev/shm if it has that much
    /// room, else the temporary folder].
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Also compares 256 MiB with 4 GiB for what must not grow with memory.
    #[arg(long)]
    flat: bool,
    /// Leaves QEMU out.
    #[arg(long)]
    no_qemu: bool,
    /// The `squib` program [default: the one of this build, which is built if need be].
    #[arg(long, value_name = "FILE")]
    squib: Option<PathBuf>,
    /// Prints everything as JSON.
    #[arg(long)]
    json: bool,
}

/// A number of bytes with a suffix M or G.
#[derive(Debug, Clone, Copy)]
struct Size(u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not a memory size: 512M and 2G are");
        let (digits, shift) = match text.strip_suffix('G') {
            Some(digits) => (digits, 30),
            None => (text.strip_suffix('M').ok_or_else(wrong)?, 20),
        };
        let number: u64 = digits.parse().map_err(|_| wrong())?;
        let bytes = number.checked_mul(1 << shift).filter(|bytes| *bytes <= 64 << 30);
        // The guest's initramfs and what it becomes have to fit.
        bytes.filter(|bytes| *bytes >= 128 << 20).map(Self).ok_or_else(wrong)
    }
}

/// What one guest's runs share.
struct Bench<'a> {
    squib: &'a Squib,
    guest: &'a Guest,
    /// For this guest's files.
    dir: &'a Path,
    runs: usize,
    qemu: bool,
    /// The files are in memory anyway, so that there is no cold page cache.
    in_memory: bool,
}

/// Measures, prints, and succeeds if everything worked, whatever came out.
pub fn run(args: &Args) -> Result<ExitCode> {
    ensure!(
        cfg!(target_os = "linux"),
        "only Linux tells the peak of another process's memory and drops files from the page cache"
    );
    let kit = fetch(false)?;
    let program = match &args.squib {
        Some(program) => program.clone(),
        None => build_squib()?,
    };
    let largest = args.memory.iter().map(|size| size.0).max().context("no memory size")?;
    let largest = if args.flat { largest.max(FLAT[1]) } else { largest };
    let work = WorkDir::make(args.dir.as_deref(), largest)?;
    let squib = Squib::new(&program, &work.home())?;
    let in_memory = disk::in_memory(work.path())?;
    let qemu = match args.no_qemu {
        true => None,
        false => qemu::version().map_err(|error| eprintln!("without QEMU: {error:#}")).ok(),
    };
    let touch_before = disk::first_touch_rate();
    let storage = Storage {
        dir: work.path().to_owned(),
        in_memory,
        rates: match in_memory {
            true => None,
            false => Some(disk::write_rates(work.path())?),
        },
    };
    let runs = args.runs.max(1);
    let mut guests = Vec::new();
    for Size(memory) in &args.memory {
        guests.push(work.with_guest(*memory, *memory, &kit, |guest, dir| {
            let qemu = qemu.is_some();
            Bench { squib: &squib, guest, dir, runs, qemu, in_memory }.all()
        })?);
    }
    let mut flat = Vec::new();
    if args.flat {
        for memory in FLAT {
            flat.push(work.with_guest(memory, FLAT[0], &kit, |guest, dir| {
                Bench { squib: &squib, guest, dir, runs, qemu: false, in_memory }.flat()
            })?);
        }
    }
    let first_touch = [touch_before, disk::first_touch_rate()];
    let report = Report { squib: program, qemu, runs, storage, first_touch, guests, flat };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report.json())?);
    } else {
        report.print();
    }
    Ok(if report.worked() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Bench<'_> {
    fn all(&self) -> Result<GuestReport> {
        let create = create_runs(self)?;
        let restore = restore_runs(self, &create)?;
        Ok(GuestReport { memory: self.guest.memory, data: self.guest.data, create, restore })
    }

    /// Only what must not grow with memory.
    fn flat(&self) -> Result<GuestReport> {
        let create = live_runs(self)?;
        let restore = template_runs(self, &create);
        Ok(GuestReport { memory: self.guest.memory, data: self.guest.data, create, restore })
    }

    /// The same, but once, and with a warm page cache.
    fn once_warm(&self) -> Self {
        Self { runs: 1, in_memory: true, ..*self }
    }
}

/// What came of the runs of one measure.
enum Runs<T> {
    /// All of them; none if they were not asked for.
    Done(Vec<T>),
    /// This build of squib cannot do it.
    NotInBuild,
    /// One failed, and why.
    Failed(String),
}

impl<T> Runs<T> {
    /// All runs up to the first one that fails.
    fn collect(runs: impl Iterator<Item = Result<T>>) -> Self {
        match runs.collect() {
            Ok(done) => Self::Done(done),
            Err(error) => Self::Failed(format!("{error:#}")),
        }
    }

    /// Why a run failed.
    fn error(&self) -> Option<&String> {
        match self {
            Self::Failed(error) => Some(error),
            Self::Done(_) | Self::NotInBuild => None,
        }
    }

    /// The median of what `value` says about each run.
    fn median(&self, value: impl Fn(&T) -> f64) -> Cell {
        match self {
            Self::Done(runs) if runs.is_empty() => Cell::None,
            Self::Done(runs) => {
                Cell::Value(median(&mut runs.iter().map(value).collect::<Vec<_>>()))
            }
            Self::NotInBuild => Cell::NotInBuild,
            Self::Failed(_) => Cell::Failed,
        }
    }
}

/// Says on stderr what is done.
fn note(bench: &Bench<'_>, what: &str) {
    eprintln!("{} MiB: {what}", bench.guest.memory >> 20);
}

/// The program of this build; cargo makes sure that it is there and no older than this one.
fn build_squib() -> Result<PathBuf> {
    let own = std::env::current_exe().context("the path of this program")?;
    let program = own.with_file_name("squib");
    if let Some(cargo) = std::env::var_os("CARGO") {
        let mut command = Command::new(cargo);
        command.args(["build", "--quiet", "-p", "squib", "--bin", "squib"]);
        if !cfg!(debug_assertions) {
            command.arg("--release");
        }
        let status = command.status().context("cargo")?;
        ensure!(status.success(), "cargo build -p squib: {status}");
    }
    ensure!(
        program.is_file(),
        "{} is not there: build it (cargo build --release -p squib), or name it with --squib",
        program.display()
    );
    Ok(program)
}

/// Where everything is written, removed on every way out.
struct WorkDir {
    dir: TempDir,
}

impl WorkDir {
    fn make(parent: Option<&Path>, largest: u64) -> Result<Self> {
        let need = largest.saturating_mul(5).saturating_add(1 << 30);
        let parent = match parent {
            Some(parent) => parent.to_owned(),
            None => {
                let memory = Path::new("/dev/shm");
                match disk::room(memory) {
                    Ok(room) if room >= need => memory.to_owned(),
                    _ => std::env::temp_dir(),
                }
            }
        };
        let room = disk::room(&parent)?;
        ensure!(
            room >= need,
            "{} has {} MiB of room, and {} MiB may be needed: name another place with --dir",
            parent.display(),
            room >> 20,
            need >> 20
        );
        // The VM's socket has to have a short path, and squib's process another working directory.
        let parent = parent.canonicalize()?;
        let dir = tempfile::Builder::new().prefix("versus-").tempdir_in(&parent)?;
        let path = dir.path().to_owned();
        let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
        thread::Builder::new().name("signals".into()).spawn(move || {
            let Some(signal) = signals.forever().next() else { return };
            child::end_all();
            // The main thread may be writing a file of its own; what cannot be removed is left.
            for _ in 0..10 {
                if fs::remove_dir_all(&path).is_ok() {
                    break;
                }
            }
            std::process::exit(128 + signal);
        })?;
        Ok(Self { dir })
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn home(&self) -> PathBuf {
        self.path().join("home")
    }

    /// Calls `act` with a guest of `memory` bytes that holds as much data as one of `like` bytes, and
    /// removes everything that was written.
    fn with_guest<T>(
        &self,
        memory: u64,
        like: u64,
        kit: &Kit,
        act: impl FnOnce(&Guest, &Path) -> Result<T>,
    ) -> Result<T> {
        let dir = self.path().join("guest");
        fs::create_dir(&dir)?;
        fs::create_dir(self.home())?;
        let guest = Guest::make(kit, memory, like, &dir)?;
        let done = act(&guest, &dir);
        fs::remove_dir_all(&dir)?;
        fs::remove_dir_all(self.home())?;
        done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_sizes_have_a_unit_and_limits() {
        let size = |text: &str| text.parse::<Size>().map(|size| size.0);
        assert_eq!((size("512M"), size("2G")), (Ok(512 << 20), Ok(2 << 30)));
        for text in ["", "512", "64M", "1.5G", "99999999999G", "-1M"] {
            assert!(size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn runs_end_with_the_first_failure() {
        let done = Runs::collect([3.0, 1.0, 2.0].into_iter().map(Ok));
        assert_eq!(done.median(|value| *value), Cell::Value(2.0));
        let mut asked = 0;
        let failed = Runs::<f64>::collect((0..3).map(|_| {
            asked += 1;
            Err(anyhow::anyhow!("no room"))
        }));
        assert_eq!((failed.error().map(String::as_str), asked), (Some("no room"), 1));
    }
}
