//! The guest kit's Linux with a shell on its console.

use std::{
    io::Write,
    path::Path,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context, Result};
use squib_snapshot::{
    Durability,
    capture::{CaptureOptions, capture},
    restore::{RestoreOptions, restore},
};
use squib_vmm::machine::{self, Machine};

use crate::{console::Capture, scenario};

/// Longer than the slowest host takes for a boot or a command.
const PATIENCE: Duration = Duration::from_secs(240);

/// A machine that runs by the host's clock, its shell waiting for commands.
pub struct Shell {
    /// The machine.
    pub machine: Machine,
    console: Capture,
    asked: AtomicU32,
}

impl Shell {
    /// Boots one with its disk in `folder`; none if the kit is not in the cache.
    pub fn boot(folder: &Path) -> Result<Option<Self>> {
        let Some(shell) = Self::start(folder, "", 1)? else { return Ok(None) };
        shell.wait_for_prompt()?;
        Ok(Some(shell))
    }

    /// As [`boot`](Self::boot) with more words on the kernel's command line and `cpus` vCPUs, and does not wait for the
    /// prompt.
    pub fn start(folder: &Path, words: &str, cpus: u32) -> Result<Option<Self>> {
        let Some(mut config) = scenario::linux(folder)? else { return Ok(None) };
        config.deterministic = None;
        config.vcpus = cpus;
        config.cmdline = format!("{} {words}", config.cmdline);
        let shell = Self::of(|console| Ok(Machine::boot(config, console)?))?;
        shell.machine.resume()?;
        Ok(Some(shell))
    }

    /// Waits until the shell of a guest that boots can be asked.
    pub fn wait_for_prompt(&self) -> Result<()> {
        self.wait_for("/ # ")
    }

    /// Waits until the console shows `text`.
    pub fn wait_for(&self, text: &str) -> Result<()> {
        let seen = self.console.wait_for(PATIENCE, |all| all.contains(text).then_some(()));
        seen.with_context(|| format!("no `{text}`: {}", self.console.text()))
    }

    /// Writes a snapshot to `path` and ends the machine.
    pub fn save(self, path: &Path) -> Result<()> {
        self.snapshot(path)
    }

    /// Writes a snapshot to `path` and leaves the machine paused.
    pub fn snapshot(&self, path: &Path) -> Result<()> {
        self.machine.pause(PATIENCE)?;
        let options = CaptureOptions { durability: Durability::None, ..CaptureOptions::default() };
        capture(&self.machine, path, &options)?;
        Ok(())
    }

    /// A paused machine from the snapshot at `path`, with its disk in the new directory `disks`.
    pub fn restore(path: &Path, disks: &Path, options: machine::RestoreOptions) -> Result<Self> {
        std::fs::create_dir(disks)?;
        let options = RestoreOptions {
            disk_dir: Some(disks.to_owned()),
            machine: options,
            ..RestoreOptions::default()
        };
        Self::of(|console| Ok(restore(path, &options, console)?.machine))
    }

    fn of(make: impl FnOnce(Box<dyn Write + Send>) -> Result<Machine>) -> Result<Self> {
        let console = Capture::default();
        let machine = make(Box::new(console.clone()))?;
        Ok(Self { machine, console, asked: AtomicU32::new(0) })
    }

    /// What the running guest prints for `command`.
    pub fn ask(&self, command: &str) -> Result<String> {
        let n = self.asked.fetch_add(1, Ordering::Relaxed);
        ask(&self.console, n, command, |line| Ok(self.machine.console_input().send(line)?))
    }

    /// Everything on its console.
    pub fn text(&self) -> String {
        self.console.text()
    }
}

/// What a guest prints for its `n`th `command`, whose line `send` types.
pub(crate) fn ask(
    console: &Capture,
    n: u32,
    command: &str,
    send: impl FnOnce(&[u8]) -> Result<()>,
) -> Result<String> {
    // The shell echoes what it reads, but not with the sums done.
    let line = format!("echo @$(({n}))s@; {command}; echo @$(({n}))e@\n");
    send(line.as_bytes())?;
    let (start, end) = (format!("@{n}s@"), format!("@{n}e@"));
    let answer = console.wait_for(PATIENCE, |text| {
        let (_, rest) = text.split_once(&start)?;
        let (answer, _) = rest.split_once(&end)?;
        Some(answer.replace('\r', "").trim().to_owned())
    });
    answer.with_context(|| format!("no answer to `{command}`: {}", console.text()))
}
