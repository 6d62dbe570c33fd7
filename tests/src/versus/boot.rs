//! Time from start to the first line of user space.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use squib::kit::Kit;
use squib_vmm::{config::MachineConfig, machine::Machine};

use super::{PATIENCE, console_qemu, end, fetch, median, read_until};
use crate::console::Capture;

/// What the guest kit's init prints first.
const BANNER: &str = "squib guest kit";
const BOOT: &str = "quiet panic=-1 reboot=k";

/// Boots both `runs` times; fails if squib's median is more than `most` times QEMU's.
pub fn boot(runs: usize, most: f64) -> Result<ExitCode> {
    let kit = fetch(false)?;
    let (mut ours, mut theirs, mut speeds) = (Vec::new(), Vec::new(), Vec::new());
    for run in 1..=runs {
        let qemu = qemu_boot(&kit)?;
        let (squib, retired) = squib_boot(&kit)?;
        let speed = retired as f64 / squib.as_secs_f64() / 1e6;
        println!(
            "run {run}: qemu {:.2} s, squib {:.2} s, ratio {:.2}, {:.0} M instructions, {speed:.0} MIPS",
            qemu.as_secs_f64(),
            squib.as_secs_f64(),
            squib.as_secs_f64() / qemu.as_secs_f64(),
            retired as f64 / 1e6,
        );
        theirs.push(qemu.as_secs_f64());
        ours.push(squib.as_secs_f64());
        speeds.push(speed);
    }
    let (ours, theirs) = (median(&mut ours), median(&mut theirs));
    let ratio = ours / theirs;
    println!(
        "median: qemu {theirs:.2} s, squib {ours:.2} s, {:.0} MIPS; squib takes {ratio:.2} times as long (at most {most})",
        median(&mut speeds)
    );
    Ok(if ratio <= most { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn squib_boot(kit: &Kit) -> Result<(Duration, u64)> {
    let mut config = MachineConfig::new("versus", kit.kernel.clone());
    config.initrd = Some(kit.initrd.clone());
    config.cmdline = format!("console=ttyS0 {BOOT}");
    config.memory = 512 << 20;
    let console = Capture::default();
    let start = Instant::now();
    let machine = Machine::boot(config, Box::new(console.clone()))?;
    machine.resume()?;
    let up = console.wait_for(PATIENCE, |text| text.contains(BANNER).then(Instant::now));
    let up = up.with_context(|| format!("no `{BANNER}` in: {}", console.text()))?;
    machine.pause(Duration::from_secs(5))?;
    let retired = machine.retired()?.into_iter().flatten().sum();
    machine.stop();
    Ok((up - start, retired))
}

fn qemu_boot(kit: &Kit) -> Result<Duration> {
    let start = Instant::now();
    let mut qemu = console_qemu(kit, BOOT, &[])?;
    let seen = read_until(&mut qemu, BANNER);
    let took = start.elapsed();
    end(&mut qemu);
    ensure!(seen?.contains(BANNER), "QEMU's guest ended without `{BANNER}`");
    Ok(took)
}
