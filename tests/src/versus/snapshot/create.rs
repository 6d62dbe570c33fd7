//! Writing snapshots, and what the same memory costs others.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

use super::{BOOTED, Bench, Runs, note};
use crate::versus::{
    PATIENCE,
    child::{self, Vm},
    disk,
    qemu::{Qemu, Saved, Way},
    squib_vm::{Create, Created},
};

/// How long the guest works between two snapshots.
const WORK: Duration = Duration::from_secs(1);

/// What came of the runs.
pub(super) struct CreateRuns {
    pub(super) full: Runs<Created>,
    pub(super) diff: Runs<Created>,
    pub(super) live: Runs<Created>,
    /// A full snapshot to be restored.
    pub(super) snapshot: PathBuf,
    /// A tick that the guest had printed when it was taken.
    pub(super) reached: u64,
    /// Others on the raw memory of that snapshot.
    pub(super) raw: Option<RawRuns>,
    /// QEMU's guest to a file.
    pub(super) qemu: Vec<QemuSaves>,
}

/// Others on the raw memory, bytes and seconds.
#[derive(Default)]
pub(super) struct RawRuns {
    pub(super) bytes: u64,
    pub(super) zstd: Vec<f64>,
    pub(super) zstd_bytes: u64,
    pub(super) cat: Vec<f64>,
}

/// QEMU's guest to a file, in one way.
pub(super) struct QemuSaves {
    pub(super) way: Way,
    pub(super) seconds: Vec<f64>,
    pub(super) bytes: u64,
    pub(super) last: Saved,
    /// A tick that the guest had printed when it was stopped.
    pub(super) reached: u64,
}

/// All kinds of snapshot of one guest, and the peers.
pub(super) fn create_runs(bench: &Bench<'_>) -> Result<CreateRuns> {
    let vm = boot(bench)?;
    note(bench, "squib, zstd and cat write all of memory");
    let mut raw = None;
    let (snapshot, reached, full) = full_runs(bench, &vm, Some(&mut raw))?;
    note(bench, "squib writes differences");
    let diff = runs(bench, &vm, Create::Diff(&snapshot));
    note(bench, "squib writes live snapshots");
    let live = runs(bench, &vm, Create::Live);
    vm.end()?;
    let qemu = match bench.qemu {
        true => qemu_saves(bench)?,
        false => Vec::new(),
    };
    let full = Runs::Done(full);
    Ok(CreateRuns { full, diff, live, snapshot, reached, raw, qemu })
}

/// Live snapshots only, and one full snapshot to be restored.
pub(super) fn live_runs(bench: &Bench<'_>) -> Result<CreateRuns> {
    let vm = boot(bench)?;
    let (snapshot, reached, full) = full_runs(&bench.once_warm(), &vm, None)?;
    note(bench, "squib writes live snapshots");
    let live = runs(bench, &vm, Create::Live);
    vm.end()?;
    Ok(CreateRuns {
        full: Runs::Done(full),
        diff: Runs::Done(Vec::new()),
        live,
        snapshot,
        reached,
        raw: None,
        qemu: Vec::new(),
    })
}

fn boot(bench: &Bench<'_>) -> Result<Vm> {
    note(bench, "squib boots");
    let vm = bench.squib.boot(bench.guest)?;
    vm.wait_ticks(BOOTED, PATIENCE)?;
    Ok(vm)
}

/// Full snapshots, the last of which stays. With `raw`, after each one others write the same memory.
fn full_runs(
    bench: &Bench<'_>,
    vm: &Vm,
    mut raw: Option<&mut Option<RawRuns>>,
) -> Result<(PathBuf, u64, Vec<Created>)> {
    let mut last = None;
    let mut done = Vec::new();
    for run in 0..bench.runs {
        vm.wait_ticks(BOOTED, PATIENCE)?;
        let output = bench.dir.join(format!("full-{run}"));
        let reached = vm.log().last_tick;
        done.push(bench.squib.create(vm, Create::Full, &output)?);
        if let Some(raw) = &mut raw {
            // It would compete for the cores.
            vm.freeze(true)?;
            raw_run(bench, &output, raw)?;
            vm.freeze(false)?;
        }
        if let Some((before, _)) = last.replace((output, reached)) {
            fs::remove_dir_all(before)?;
        }
    }
    let (snapshot, reached) = last.context("there is one run at least")?;
    Ok((snapshot, reached, done))
}

fn runs(bench: &Bench<'_>, vm: &Vm, kind: Create<'_>) -> Runs<Created> {
    if !bench.squib.can_create(kind) {
        return Runs::NotInBuild;
    }
    let one = || {
        thread::sleep(WORK);
        let output = bench.dir.join("other");
        let created = bench.squib.create(vm, kind, &output)?;
        fs::remove_dir_all(output)?;
        Ok(created)
    };
    Runs::collect((0..bench.runs).map(|_| one()))
}

/// `zstd` and `cat` once, on the memory of `snapshot`.
fn raw_run(bench: &Bench<'_>, snapshot: &Path, runs: &mut Option<RawRuns>) -> Result<()> {
    let raw = bench.dir.join("raw");
    let copy = bench.dir.join("copy");
    let bytes = disk::raw_memory(snapshot, &raw)?;
    let runs = runs.get_or_insert_with(RawRuns::default);
    runs.bytes = bytes;
    runs.zstd.push(timed("zstd -q -1 -T0 -c \"$0\" > \"$1\" && sync \"$1\"", &raw, &copy)?);
    runs.zstd_bytes = disk::size(&copy)?;
    fs::remove_file(&copy)?;
    runs.cat.push(timed("cat \"$0\" > \"$1\" && sync \"$1\"", &raw, &copy)?);
    fs::remove_file(&copy)?;
    fs::remove_file(&raw)?;
    Ok(())
}

/// Seconds that the shell takes for `script` with two arguments.
fn timed(script: &str, from: &Path, to: &Path) -> Result<f64> {
    let mut command = Command::new("sh");
    command.arg("-c").arg(script).arg(from).arg(to);
    let start = Instant::now();
    child::run(&mut command)?;
    Ok(start.elapsed().as_secs_f64())
}

fn qemu_saves(bench: &Bench<'_>) -> Result<Vec<QemuSaves>> {
    let mut all = Vec::new();
    note(bench, "QEMU boots");
    let mut qemu = Qemu::boot(bench.guest, bench.dir, None)?;
    for way in [Way::Plain, Way::Zstd] {
        note(bench, &format!("{} writes the guest", way.name()));
        all.push(saves(bench, &mut qemu, way, None)?);
    }
    drop(qemu);
    note(bench, "QEMU boots with its memory in a file");
    let memory = bench.dir.join("qemu.memory");
    let mut qemu = Qemu::boot(bench.guest, bench.dir, Some(&memory))?;
    all.push(saves(&bench.once_warm(), &mut qemu, Way::Shared, Some(&memory))?);
    Ok(all)
}

fn saves(bench: &Bench<'_>, qemu: &mut Qemu, way: Way, memory: Option<&Path>) -> Result<QemuSaves> {
    let mut seconds = Vec::new();
    let mut last = None;
    for run in 0..bench.runs {
        if run > 0 || way == Way::Zstd {
            qemu.go_on()?;
        }
        qemu.vm.wait_ticks(BOOTED, PATIENCE)?;
        let reached = qemu.vm.log().last_tick;
        let saved = qemu.save(way, memory, &bench.dir.join(format!("qemu-{way:?}")))?;
        seconds.push(saved.took.as_secs_f64());
        last = Some((saved, reached));
    }
    let (last, reached) = last.context("there is one run at least")?;
    let bytes = last.files().into_iter().map(disk::size).sum::<Result<u64>>()?;
    Ok(QemuSaves { way, seconds, bytes, last, reached })
}
