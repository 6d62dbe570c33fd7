//! squib's guest: the `squib` command, as a user calls it.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use super::{
    child::{self, Vm},
    guest::Guest,
    median,
};

/// The VM's name.
const NAME: &str = "versus";
/// Runs that tell how long a start of the program takes.
const STARTS: usize = 9;
/// How long a restore may take.
const PATIENCE: Duration = Duration::from_secs(300);

/// The program, and what it can do.
pub(super) struct Squib {
    program: PathBuf,
    /// Where its run-time files, disks and caches go.
    home: PathBuf,
    /// What the shortest run takes, from its start to its end.
    startup: Duration,
    create_help: String,
    restore_help: String,
}

/// The kinds of snapshot.
#[derive(Clone, Copy, Debug)]
pub(super) enum Create<'a> {
    /// All of memory; the guest stands still.
    Full,
    /// What differs from this snapshot; the guest stands still.
    Diff(&'a Path),
    /// All of memory; the guest goes on while it is written.
    Live,
}

/// How memory comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// All of it before the first instruction.
    Eager,
    /// On first touch.
    Lazy,
    /// On first touch, and what is touched is written down for the next time.
    Record,
    /// Mapped from a raw file, which the first time makes.
    Template,
}

/// One snapshot as it was written.
pub(super) struct Created {
    /// From the start of the command to its end.
    pub(super) took: Duration,
    /// How long the guest stood still, as squib says.
    pub(super) downtime_ms: f64,
    /// The longest time in which the guest printed nothing, as seen from outside.
    pub(super) silence: Duration,
    /// Bytes on disk.
    pub(super) stored: u64,
    /// What the VM's process used at most beyond what it used before.
    pub(super) growth: u64,
}

/// One restore.
pub(super) struct Back {
    /// From the start of the process to the guest's first instruction.
    pub(super) first_instruction: Duration,
    /// From the start of the process to the first byte that the guest printed.
    pub(super) first_byte: Duration,
    /// From the start of the process to the first whole line that the guest printed.
    pub(super) first_line: Duration,
    /// The most memory that the process used until then.
    pub(super) peak: u64,
}

#[derive(Deserialize)]
struct Report {
    downtime_ms: f64,
    stored_bytes: u64,
}

#[derive(Deserialize)]
struct Timings {
    first_instruction_ms: Option<f64>,
    first_console_byte_ms: Option<f64>,
}

impl Squib {
    /// Uses `program`, with `home` for its files.
    pub(super) fn new(program: &Path, home: &Path) -> Result<Self> {
        let help = |what: &str| -> Result<String> {
            let output = child::run(Command::new(program).args(["snapshot", what, "--help"]))?;
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        };
        let startup = || -> Result<f64> {
            let start = Instant::now();
            child::run(Command::new(program).arg("--version"))?;
            Ok(start.elapsed().as_secs_f64())
        };
        let mut startups = (0..STARTS).map(|_| startup()).collect::<Result<Vec<_>>>()?;
        Ok(Self {
            startup: Duration::from_secs_f64(median(&mut startups)),
            program: program.to_owned(),
            home: home.to_owned(),
            create_help: help("create")?,
            restore_help: help("restore")?,
        })
    }

    /// Whether this build writes such snapshots.
    pub(super) fn can_create(&self, kind: Create<'_>) -> bool {
        match kind {
            Create::Full | Create::Diff(_) => true,
            Create::Live => self.create_help.contains("--live"),
        }
    }

    /// Whether this build restores in this mode.
    pub(super) fn can_restore(&self, mode: Mode) -> bool {
        let has = |word| self.restore_help.contains(word);
        match mode {
            Mode::Eager => true,
            Mode::Lazy => has("--mode") && has("lazy"),
            Mode::Record => has("--mode") && has("lazy") && has("--record"),
            Mode::Template => has("--mode") && has("template"),
        }
    }

    /// Everything that the program keeps between two restores.
    pub(super) fn home(&self) -> &Path {
        &self.home
    }

    /// Boots the guest.
    pub(super) fn boot(&self, guest: &Guest) -> Result<Vm> {
        let mut command = self.command(["run", "--name", NAME]);
        command.arg("--kernel").arg(&guest.kernel).arg("--initrd").arg(&guest.initrd);
        command.args(["--memory", &format!("{}M", guest.memory >> 20)]);
        command.args(["--cmdline", &Guest::cmdline("ttyS0")]);
        Vm::start(&mut command)
    }

    /// Writes a snapshot of the running `vm` to `output`.
    pub(super) fn create(&self, vm: &Vm, kind: Create<'_>, output: &Path) -> Result<Created> {
        let mut command = self.command(["snapshot", "create", NAME, "--json"]);
        command.arg("--output").arg(output);
        match kind {
            Create::Full => &mut command,
            Create::Diff(parent) => command.arg("--diff").arg(parent),
            Create::Live => command.arg("--live"),
        };
        vm.forget_peak()?;
        let before = vm.resident()?.now;
        vm.log().silence = Duration::ZERO;
        let start = Instant::now();
        let answer = child::run(&mut command)?;
        let took = start.elapsed();
        // The guest has to print again for its silence to be over.
        vm.wait_ticks(1, PATIENCE)?;
        let report: Report = serde_json::from_slice(&answer.stdout)
            .context("`squib snapshot create --json` does not print its report")?;
        Ok(Created {
            took,
            downtime_ms: report.downtime_ms,
            silence: vm.log().silence,
            stored: report.stored_bytes,
            growth: vm.resident()?.peak.saturating_sub(before),
        })
    }

    /// Restores `snapshot` in a new process, which ends before this returns unless it is to be left to
    /// itself for `linger`. The guest has to go on with a tick after `after`, and to miss none.
    pub(super) fn restore(
        &self,
        snapshot: &Path,
        mode: Mode,
        after: u64,
        linger: Duration,
    ) -> Result<Back> {
        let mut command = self.command(["snapshot", "restore", "--timings=json", "--name", NAME]);
        command.arg(snapshot);
        if self.restore_help.contains("--mode") {
            command.arg("--mode").arg(match mode {
                Mode::Eager => "eager",
                Mode::Lazy | Mode::Record => "lazy",
                Mode::Template => "template",
            });
        }
        if mode == Mode::Record {
            command.arg("--record");
        }
        let vm = Vm::start(&mut command)?;
        let outputs = Outputs::wait(&vm)?;
        let timings = vm.wait("the timings", PATIENCE, |log| {
            log.messages.iter().find_map(|line| serde_json::from_str::<Timings>(line).ok())
        })?;
        outputs.check(&vm, after)?;
        std::thread::sleep(linger);
        vm.end()?;
        let (Some(instruction), Some(byte)) =
            (timings.first_instruction_ms, timings.first_console_byte_ms)
        else {
            bail!("the timings have no first instruction, or no first console byte");
        };
        let ms = |ms: f64| Duration::from_secs_f64(ms.max(0.0) / 1e3);
        // squib's clock starts in its `main`, ours before the process. There are two bounds for what lies
        // between: the first byte, which both saw, and a whole run of the program that does nothing.
        let by_byte = outputs.first_byte.saturating_sub(ms(byte - instruction));
        let by_start = self.startup + ms(instruction);
        Ok(outputs.with_instruction(by_byte.min(by_start)))
    }

    fn command<const N: usize>(&self, words: [&str; N]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(words.map(OsStr::new));
        command.env("SQUIB_HOME", &self.home).env("SQUIB_CACHE", self.home.join("cache"));
        command
    }
}

/// The first signs of life of a restored guest.
pub(super) struct Outputs {
    first_byte: Duration,
    first_line: Duration,
    first_tick: u64,
    peak: u64,
}

impl Outputs {
    /// Waits for them.
    pub(super) fn wait(vm: &Vm) -> Result<Self> {
        let (first_tick, line) = vm.wait("the first line", PATIENCE, |log| log.first_tick)?;
        let peak = vm.resident()?.peak;
        let byte = vm.log().first_byte.context("a line without a first byte")?;
        let since = |at: Instant| at - vm.started();
        Ok(Self { first_byte: since(byte), first_line: since(line), first_tick, peak })
    }

    /// The guest has to go on where it was: with a tick after `reached`, and with every one from there.
    pub(super) fn check(&self, vm: &Vm, reached: u64) -> Result<()> {
        let first = self.first_tick;
        ensure!(first > reached, "tick {first} came again: the guest had reached {reached}");
        vm.wait_ticks(3, PATIENCE)?;
        if let Some((before, next)) = vm.log().gap {
            bail!("tick {next} came after {before}");
        }
        Ok(())
    }

    /// With the time by which the first instruction was under way; the first byte came later in any case.
    pub(super) fn with_instruction(&self, by: Duration) -> Back {
        let Self { first_byte, first_line, peak, .. } = *self;
        Back { first_instruction: by.min(first_byte), first_byte, first_line, peak }
    }
}
