//! Snapshots of the machine at a point.

use std::{fs, io::Write, path::Path};

use anyhow::Result;
use squib_snapshot::{
    Durability,
    capture::{CaptureOptions, capture},
    restore::{RestoreOptions, restore as restore_snapshot},
};
use squib_vmm::machine::Machine;

/// Saves the paused `machine`, with its disks, in `folder`.
pub(super) fn save(machine: &Machine, folder: &Path) -> Result<()> {
    // The files need not survive the host.
    let options = CaptureOptions { durability: Durability::None, ..CaptureOptions::default() };
    capture(machine, &folder.join("snapshot"), &options)?;
    Ok(())
}

/// Restores the machine that was saved in `folder`, as the one and only copy.
pub(super) fn restore(folder: &Path, console: Box<dyn Write + Send>) -> Result<Machine> {
    let disks = folder.join("disks");
    fs::create_dir(&disks)?;
    let options = RestoreOptions { disk_dir: Some(disks), ..RestoreOptions::default() };
    Ok(restore_snapshot(&folder.join("snapshot"), &options, console)?.machine)
}
