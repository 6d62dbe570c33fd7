//! Programs for Debian's Python on the kit's root file system: `tests/guest/*.py` in the guest.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};
use squib::kit::Kit;
use squib_vmm::{
    config::{DiskConfig, MachineConfig},
    machine::Machine,
};

use crate::console::Capture;

/// A program that the guest runs, as its first process.
#[derive(Clone, Copy, Debug)]
pub struct Program {
    source: &'static str,
    /// How the first of its lines begins.
    begins: &'static str,
    /// What it prints last.
    pub ends: &'static str,
    /// What the same kernel and root file system printed under QEMU
    /// (`versus python --program NAME --record tests/guest/NAME.out`).
    pub under_qemu: &'static str,
}

/// Arithmetic, text, hashes, threads.
pub const CHECKS: Program = Program {
    source: include_str!("../guest/checks.py"),
    begins: "float repr:",
    ends: "checks done",
    under_qemu: include_str!("../guest/checks.out"),
};

/// What debuggers do: steps, breakpoints, watchpoints, probes.
pub const DEBUG: Program = Program {
    source: include_str!("../guest/debug.py"),
    begins: "step a loop:",
    ends: "debug done",
    under_qemu: include_str!("../guest/debug.out"),
};

/// The kernel command line that runs a program from the second disk, but for the console.
pub const CMDLINE: &str = "quiet panic=-1 reboot=k root=/dev/vda init=/usr/bin/python3 -- /dev/vdb";

impl Program {
    /// Its lines of a console's text, up to the last one.
    pub fn lines_in(&self, text: &str) -> Result<String> {
        let start =
            text.find(self.begins).with_context(|| format!("no {:?} in: {text}", self.begins))?;
        let end = text[start..]
            .find(self.ends)
            .with_context(|| format!("no {:?} in: {}", self.ends, &text[start..]))?;
        Ok(text[start..start + end].replace('\r', ""))
    }
}

/// The disks of one machine.
pub struct Disks {
    /// A private copy of the root file system.
    pub root: PathBuf,
    /// The program, filled up with empty lines to a whole number of sectors.
    pub script: PathBuf,
}

impl Disks {
    /// Makes both in `folder`.
    pub fn make(kit: &Kit, program: &Program, folder: &Path) -> Result<Self> {
        let rootfs = kit.rootfs.as_ref().context("the kit has no root file system")?;
        let disks = Self { root: folder.join("root.ext4"), script: folder.join("program.img") };
        fs::copy(rootfs, &disks.root).with_context(|| format!("{}", rootfs.display()))?;
        let mut script = program.source.as_bytes().to_vec();
        script.resize(script.len().next_multiple_of(512), b'\n');
        fs::write(&disks.script, script)?;
        Ok(disks)
    }
}

/// Runs `program` on `vcpus` vCPUs of squib and returns what it printed.
pub fn run(
    kit: &Kit,
    program: &Program,
    disks: &Disks,
    vcpus: u32,
    patience: Duration,
) -> Result<String> {
    let mut config = MachineConfig::new("program", kit.kernel.clone());
    config.initrd = Some(kit.initrd.clone());
    config.cmdline = format!("console=ttyS0 {CMDLINE}");
    config.memory = 512 << 20;
    config.vcpus = vcpus;
    for (id, path) in [("root", &disks.root), ("script", &disks.script)] {
        config.disks.push(DiskConfig { id: id.into(), path: path.clone(), read_only: false });
    }
    let console = Capture::default();
    let machine = Machine::boot(config, Box::new(console.clone()))?;
    machine.resume()?;
    // A kernel that panics says no more.
    let over = |text: &str| text.contains(program.ends) || text.contains("Kernel panic");
    console.wait_for(patience, |text| over(text).then_some(()));
    machine.stop();
    program.lines_in(&console.text())
}
