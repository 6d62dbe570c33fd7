//! Debian's Python on the kit's root file system: `tests/guest/checks.py` in the guest.

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

/// The program that the guest runs.
pub const CHECKS: &str = include_str!("../guest/checks.py");
/// What it prints last.
pub const CHECKS_END: &str = "checks done";
/// The kernel command line that runs it from the second disk, but for the console.
pub const CHECKS_CMDLINE: &str =
    "quiet panic=-1 reboot=k root=/dev/vda init=/usr/bin/python3 -- /dev/vdb";

/// The disks of one machine.
pub struct Disks {
    /// A private copy of the root file system.
    pub root: PathBuf,
    /// The program, filled up with empty lines to a whole number of sectors.
    pub script: PathBuf,
}

impl Disks {
    /// Makes both in `folder`.
    pub fn make(kit: &Kit, folder: &Path) -> Result<Self> {
        let rootfs = kit.rootfs.as_ref().context("the kit has no root file system")?;
        let disks = Self { root: folder.join("root.ext4"), script: folder.join("checks.img") };
        fs::copy(rootfs, &disks.root).with_context(|| format!("{}", rootfs.display()))?;
        let mut script = CHECKS.as_bytes().to_vec();
        script.resize(script.len().next_multiple_of(512), b'\n');
        fs::write(&disks.script, script)?;
        Ok(disks)
    }
}

/// Runs the program on `vcpus` vCPUs of squib and returns what it printed.
pub fn run_checks(kit: &Kit, disks: &Disks, vcpus: u32, patience: Duration) -> Result<String> {
    let mut config = MachineConfig::new("checks", kit.kernel.clone());
    config.initrd = Some(kit.initrd.clone());
    config.cmdline = format!("console=ttyS0 {CHECKS_CMDLINE}");
    config.memory = 512 << 20;
    config.vcpus = vcpus;
    for (id, path) in [("root", &disks.root), ("script", &disks.script)] {
        config.disks.push(DiskConfig { id: id.into(), path: path.clone(), read_only: false });
    }
    let console = Capture::default();
    let machine = Machine::boot(config, Box::new(console.clone()))?;
    machine.resume()?;
    console.wait_for(patience, |text| text.contains(CHECKS_END).then_some(()));
    machine.stop();
    checks_in(&console.text())
}

/// The program's lines of a console's text, up to the last one.
pub fn checks_in(text: &str) -> Result<String> {
    let start = text.find("float repr:").with_context(|| format!("no checks in: {text}"))?;
    let end = text[start..]
        .find(CHECKS_END)
        .with_context(|| format!("the checks did not end: {}", &text[start..]))?;
    Ok(text[start..start + end].replace('\r', ""))
}
