//! Guests for end-to-end tests.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use squib_vmm::config::{Deterministic, DiskConfig, MachineConfig};

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
