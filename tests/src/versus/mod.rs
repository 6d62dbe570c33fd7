//! squib beside its peers, with the same guest in the same run: what the `versus` command measures.

pub mod boot;
mod child;
mod disk;
mod guest;
pub mod python;
mod qemu;
pub mod snapshot;
mod squib_vm;

use std::{
    io::Read,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use squib::kit::{FetchOptions, Kit};

const QEMU: &str = "qemu-system-aarch64";
const NO_QEMU: &str = "qemu-system-aarch64 does not start: install it (Debian: qemu-system-arm)";
/// Longer than any boot or check takes.
const PATIENCE: Duration = Duration::from_secs(1200);

/// Starts QEMU with the console on its standard output.
fn console_qemu(kit: &Kit, cmdline: &str, disks: &[&Path]) -> Result<Child> {
    let mut command = Command::new(QEMU);
    command.args(["-M", "virt", "-cpu", "cortex-a72", "-accel", "tcg", "-m", "512", "-smp", "1"]);
    command.args(["-nographic", "-net", "none", "-no-reboot"]);
    command.arg("-kernel").arg(&kit.kernel).arg("-initrd").arg(&kit.initrd);
    command.args(["-append", &format!("console=ttyAMA0 {cmdline}")]);
    for (n, disk) in disks.iter().enumerate().rev() {
        // QEMU hands its virtio-mmio transports out from the last one down.
        command
            .arg("-drive")
            .arg(format!("if=none,id=d{n},format=raw,snapshot=on,file={}", disk.display()));
        command.arg("-device").arg(format!("virtio-blk-device,drive=d{n}"));
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
    command.spawn().context(NO_QEMU)
}

fn read_until(child: &mut Child, wanted: &str) -> Result<String> {
    let Some(out) = &mut child.stdout else { bail!("QEMU has no output") };
    let (mut text, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        let count = out.read(&mut buffer)?;
        text.extend_from_slice(&buffer[..count]);
        let so_far = String::from_utf8_lossy(&text);
        if count == 0 || so_far.contains(wanted) {
            return Ok(so_far.into_owned());
        }
    }
}

fn end(child: &mut Child) {
    // It may have ended by itself; what it printed is all that counts.
    drop(child.kill());
    drop(child.wait());
}

fn fetch(rootfs: bool) -> Result<Kit> {
    let options = FetchOptions { rootfs, ..FetchOptions::default() };
    Ok(Kit::fetch(&options, &|what| eprintln!("{what}"))?)
}

/// The middle one of `values`, of which there has to be one at least.
fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
