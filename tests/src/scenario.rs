//! Guests for end-to-end tests.

use std::{
    fs::{self, File},
    path::Path,
};

use anyhow::{Context, Result};
use squib::kit::Kit;
use squib_vmm::config::{Deterministic, DiskConfig, MachineConfig, default_cmdline};

use crate::tiny::Tiny;

/// A deterministic machine with the tiny guest and a disk of 64 KiB; both files are made in `folder`.
pub fn tiny(folder: &Path) -> Result<MachineConfig> {
    let kernel = folder.join("tiny.img");
    Tiny::default().write(&kernel).with_context(|| format!("{}", kernel.display()))?;
    let disk = folder.join("disk.img");
    let bytes: Vec<u8> =
        (0..64 << 10).map(|n: u32| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    fs::write(&disk, bytes)?;
    let mut config = MachineConfig::new("tiny", kernel);
    config.memory = 64 << 20;
    config.disks = vec![DiskConfig { id: "disk".into(), path: disk, read_only: false }];
    config.deterministic = Some(Deterministic::default());
    Ok(config)
}

/// A deterministic machine with the guest kit's Linux and an empty disk of 16 MiB made in `folder`; none
/// if the kit is not in the cache.
pub fn linux(folder: &Path) -> Result<Option<MachineConfig>> {
    let Some(kit) = Kit::cached()? else { return Ok(None) };
    let disk = folder.join("disk.img");
    File::create(&disk)?.set_len(16 << 20)?;
    let disks = vec![DiskConfig { id: "disk".into(), path: disk, read_only: false }];
    let mut config = MachineConfig::new("linux", kit.kernel);
    config.memory = 128 << 20;
    config.cmdline = default_cmdline(true, &disks);
    config.initrd = Some(kit.initrd);
    config.disks = disks;
    config.deterministic = Some(Deterministic::default());
    Ok(Some(config))
}
