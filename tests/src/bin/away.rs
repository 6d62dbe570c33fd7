//! Sends Linux away at many moments, over many distances, and asks it on its return; see
//! `squib_tests::away`.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::ExitCode,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand, ValueEnum};
use squib_tests::{
    away::{self, Moment, Return},
    linux::Shell,
};
use squib_vmm::machine::ClockPolicy;

/// Boots the guest kit's Linux with watchdogs that end it, takes snapshots of it at many moments,
/// and restores each as if it had been away. Ends with 0 if no guest noticed a hang, all answered,
/// and all clocks were right.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Mode,
}

#[derive(Subcommand)]
enum Mode {
    /// Snapshots and restores.
    Restore(Restore),
    /// Stops the process of a running VM and lets it go on.
    Stop(Stop),
}

#[derive(clap::Args)]
struct Restore {
    /// Moments of the boot.
    #[arg(long, default_value_t = 8)]
    boot: usize,
    /// Moments of an idle guest.
    #[arg(long, default_value_t = 2)]
    idle: usize,
    /// Moments of a busy guest.
    #[arg(long, default_value_t = 4)]
    busy: usize,
    /// Times away, in seconds.
    #[arg(long, value_delimiter = ',', default_values_t = away::DISTANCES)]
    seconds: Vec<u64>,
    /// What is made of them.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Policy::Advance])]
    clock: Vec<Policy>,
    /// vCPUs.
    #[arg(long, default_value_t = 1)]
    cpus: u32,
    /// Host time between two moments of a boot, in milliseconds.
    #[arg(long, default_value_t = 700)]
    between: u64,
}

#[derive(clap::Args)]
struct Stop {
    /// The program [default: the `squib` beside this one].
    #[arg(long)]
    squib: Option<PathBuf>,
    /// How long it is stopped, in seconds.
    #[arg(long, value_delimiter = ',', default_values_t = [5, 70])]
    seconds: Vec<u64>,
    /// Whether the guest is busy.
    #[arg(long)]
    busy: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Policy {
    /// The counter makes up for nothing.
    Freeze,
    /// The wall clock is to be right.
    Advance,
}

fn main() -> Result<ExitCode> {
    match Arguments::parse().command {
        Mode::Restore(arguments) => restores(&arguments),
        Mode::Stop(arguments) => stops(&arguments),
    }
}

fn restores(arguments: &Restore) -> Result<ExitCode> {
    let folder = tempfile::tempdir()?;
    let moments = capture(arguments, folder.path())?;
    eprintln!("{} moments", moments.len());
    let mut results = Vec::new();
    let mut failures = 0;
    for (n, (moment, at, snap)) in moments.iter().enumerate() {
        for &seconds in &arguments.seconds {
            for &policy in &arguments.clock {
                let clock = match policy {
                    Policy::Freeze => ClockPolicy::Freeze,
                    Policy::Advance => ClockPolicy::Advance,
                };
                let disks = folder.path().join("disks");
                let back = away::send_away(snap, &disks, seconds, clock)
                    .and_then(|shell| away::come_back(&shell, *moment, seconds));
                std::fs::remove_dir_all(&disks)?;
                let name = format!("{n:3} {moment:?} at {at:.1} s, {policy:?}, {seconds} s away");
                match back {
                    Ok(back) => {
                        println!("{name}: {}", describe(&back));
                        results.push((*moment, back));
                    }
                    Err(error) => {
                        failures += 1;
                        println!("{name}: FAILED {error:#}");
                    }
                }
            }
        }
    }
    Ok(sum_up(&results, failures))
}

/// Snapshots in `folder`, with what the guest's counter showed, in seconds.
fn capture(arguments: &Restore, folder: &Path) -> Result<Vec<(Moment, f64, PathBuf)>> {
    let Some(shell) = Shell::start(folder, away::STRICT, arguments.cpus)? else {
        bail!("the guest kit is not in the cache: fetch it with `squib kit fetch`");
    };
    let mut moments = Vec::new();
    let mut take = |moment| -> Result<()> {
        let snap = folder.join(moments.len().to_string());
        shell.snapshot(&snap)?;
        let time = shell.machine.time();
        shell.machine.resume()?;
        moments.push((moment, time.counter as f64 / time.frequency as f64, snap));
        Ok(())
    };
    let between = Duration::from_millis(arguments.between);
    for _ in 0..arguments.boot {
        thread::sleep(between);
        if shell.text().contains("/ # ") {
            break;
        }
        take(Moment::Boot)?;
    }
    shell.wait_for_prompt()?;
    for _ in 0..arguments.idle {
        take(Moment::Idle)?;
        thread::sleep(between);
    }
    if arguments.busy > 0 {
        shell.ask(away::BUSY)?;
    }
    for n in 0..arguments.busy {
        // At all phases of what it does.
        thread::sleep(between + Duration::from_millis(137 * n as u64));
        take(Moment::Busy)?;
    }
    Ok(moments)
}

fn stops(arguments: &Stop) -> Result<ExitCode> {
    let program = match &arguments.squib {
        Some(program) => program.clone(),
        None => std::env::current_exe()?.with_file_name("squib"),
    };
    let mut results = Vec::new();
    let mut failures = 0;
    let moment = if arguments.busy { Moment::Busy } else { Moment::Idle };
    for &seconds in &arguments.seconds {
        let back = away::stopped(&program, seconds, arguments.busy)
            .with_context(|| program.display().to_string());
        match back {
            Ok(back) => {
                println!("{moment:?}, stopped for {seconds} s: {}", describe(&back));
                results.push((moment, back));
            }
            Err(error) => {
                failures += 1;
                println!("{moment:?}, stopped for {seconds} s: FAILED {error:#}");
            }
        }
    }
    Ok(sum_up(&results, failures))
}

fn describe(back: &Return) -> String {
    let Return { answer, first, later, uptime, interrupts } = back;
    format!(
        "answer in {} ms, wall clock {first:+} s then {later:+} s, up {uptime:?}, {interrupts} timer interrupts",
        answer.as_millis()
    )
}

fn sum_up(results: &[(Moment, Return)], mut failures: usize) -> ExitCode {
    let mut kinds: BTreeMap<String, Vec<&Return>> = BTreeMap::new();
    for (moment, back) in results {
        kinds.entry(format!("{moment:?}")).or_default().push(back);
        failures += usize::from(back.later.abs() > 1);
    }
    for (kind, backs) in kinds {
        let slowest = backs.iter().map(|back| back.answer).max().unwrap_or_default();
        let late = backs.iter().filter(|back| back.answer > Duration::from_secs(3)).count();
        let at_once = backs.iter().filter(|back| back.first.abs() <= 1).count();
        let right = backs.iter().filter(|back| back.later.abs() <= 1).count();
        println!(
            "{kind}: {} returns; slowest answer {slowest:.1?}, {late} above 3 s; wall clock right {at_once} times at the \
             first answer, {right} times later",
            backs.len()
        );
    }
    println!("{failures} failures");
    ExitCode::from(u8::from(failures > 0))
}
