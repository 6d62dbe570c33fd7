//! `tests/guest/*.py` on the Debian root file system.

use std::{fs, path::Path, process::ExitCode, time::Instant};

use anyhow::{Context, Result};
use squib::kit::Kit;

use super::{PATIENCE, console_qemu, end, fetch, read_until};
use crate::debian::{self, Program};

/// Runs `program` under both and compares every line; `record` keeps what QEMU's guest printed.
pub fn python(program: &Program, record: Option<&Path>) -> Result<ExitCode> {
    let kit = fetch(true)?;
    let folder = tempfile::tempdir()?;
    let disks = debian::Disks::make(&kit, program, folder.path())?;
    let start = Instant::now();
    let theirs = qemu_python(&kit, program, &disks)?;
    let qemu_took = start.elapsed();
    if let Some(path) = record {
        fs::write(path, &theirs).with_context(|| format!("{}", path.display()))?;
    }
    let start = Instant::now();
    let ours = debian::run(&kit, program, &disks, 1, PATIENCE)?;
    let squib_took = start.elapsed();
    println!(
        "qemu {:.1} s, squib {:.1} s, ratio {:.2}",
        qemu_took.as_secs_f64(),
        squib_took.as_secs_f64(),
        squib_took.as_secs_f64() / qemu_took.as_secs_f64()
    );
    let different = ours.lines().zip(theirs.lines()).filter(|(ours, theirs)| ours != theirs);
    for (ours, theirs) in different {
        println!("squib: {ours}\nqemu:  {theirs}");
    }
    let same = ours == theirs;
    println!("{} lines, {}", theirs.lines().count(), if same { "all equal" } else { "DIFFERENT" });
    Ok(if same { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn qemu_python(kit: &Kit, program: &Program, disks: &debian::Disks) -> Result<String> {
    let mut qemu = console_qemu(kit, debian::CMDLINE, &[&disks.root, &disks.script])?;
    let text = read_until(&mut qemu, program.ends);
    end(&mut qemu);
    program.lines_in(&text?)
}
