//! squib beside `qemu-system-aarch64` (TCG, one vCPU) with the same kernel, in the same run.
//!
//! ```text
//! cargo run --release -p squib-tests --bin versus -- boot
//! cargo run --release -p squib-tests --bin versus -- python
//! ```

use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use squib::kit::{FetchOptions, Kit};
use squib_tests::{console::Capture, debian};
use squib_vmm::{config::MachineConfig, machine::Machine};

/// Compares squib with QEMU.
#[derive(Parser)]
enum Args {
    /// Time from start to the first line of user space, and guest instructions a second.
    Boot {
        /// Boots of each.
        #[arg(long, default_value_t = 3)]
        runs: usize,
        /// Fails if squib's median is more than this many times QEMU's.
        #[arg(long, default_value_t = 5.0)]
        most: f64,
    },
    /// Runs `tests/guest/checks.py` on the Debian root file system under both and compares.
    Python {
        /// Keeps what QEMU's guest printed.
        #[arg(long)]
        record: Option<PathBuf>,
    },
}

/// What the guest kit's init prints first.
const BANNER: &str = "squib guest kit";
const BOOT: &str = "quiet panic=-1 reboot=k";
/// Longer than any boot or check takes.
const PATIENCE: Duration = Duration::from_secs(1200);

fn main() -> Result<ExitCode> {
    match Args::parse() {
        Args::Boot { runs, most } => boot(runs.max(1), most),
        Args::Python { record } => python(record.as_deref()),
    }
}

fn boot(runs: usize, most: f64) -> Result<ExitCode> {
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
    let mut qemu = qemu(kit, BOOT, &[])?;
    let seen = read_until(&mut qemu, BANNER);
    let took = start.elapsed();
    end(&mut qemu);
    ensure!(seen?.contains(BANNER), "QEMU's guest ended without `{BANNER}`");
    Ok(took)
}

fn python(record: Option<&Path>) -> Result<ExitCode> {
    let kit = fetch(true)?;
    let folder = tempfile::tempdir()?;
    let disks = debian::Disks::make(&kit, folder.path())?;
    let start = Instant::now();
    let theirs = qemu_python(&kit, &disks)?;
    let qemu_took = start.elapsed();
    if let Some(path) = record {
        fs::write(path, &theirs).with_context(|| format!("{}", path.display()))?;
    }
    let start = Instant::now();
    let ours = debian::run_checks(&kit, &disks, 1, PATIENCE)?;
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

fn qemu_python(kit: &Kit, disks: &debian::Disks) -> Result<String> {
    let mut qemu = qemu(kit, debian::CHECKS_CMDLINE, &[&disks.root, &disks.script])?;
    let text = read_until(&mut qemu, debian::CHECKS_END);
    end(&mut qemu);
    debian::checks_in(&text?)
}

/// Starts QEMU with the console on its standard output.
fn qemu(kit: &Kit, cmdline: &str, disks: &[&Path]) -> Result<Child> {
    let mut command = Command::new("qemu-system-aarch64");
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
    command
        .spawn()
        .context("qemu-system-aarch64 does not start: install it (Debian: qemu-system-arm)")
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

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
