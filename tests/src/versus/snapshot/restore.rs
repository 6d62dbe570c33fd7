//! Bringing guests back.

use std::{path::Path, time::Duration};

use anyhow::Result;

use super::{Bench, Runs, create::CreateRuns, note};
use crate::versus::{
    disk,
    qemu::{Qemu, Way},
    squib_vm::{Back, Mode, Outputs},
};

/// How long a guest runs whose working set is written down.
const RECORDING: Duration = Duration::from_secs(1);

/// What came of the runs.
pub(super) struct RestoreRuns {
    pub(super) squib: Vec<SquibRestores>,
    pub(super) qemu: Vec<QemuRestores>,
    /// The most bytes that stayed in the page cache when it was to be cold.
    pub(super) stayed: u64,
}

/// squib in one mode.
pub(super) struct SquibRestores {
    pub(super) kind: Kind,
    pub(super) cold: bool,
    pub(super) runs: Runs<Back>,
}

/// QEMU in one way.
pub(super) struct QemuRestores {
    pub(super) way: Way,
    pub(super) cold: bool,
    pub(super) runs: Runs<Back>,
}

/// squib's modes as they are measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Eager,
    /// Without a working set.
    Lazy,
    /// With one.
    LazyRecorded,
    /// The first time, which makes the raw file.
    TemplateFirst,
    /// Any later time.
    Template,
}

impl Kind {
    /// What a table calls it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Eager => "eager",
            Self::Lazy => "lazy",
            Self::LazyRecorded => "lazy, working set",
            Self::TemplateFirst => "template, first time",
            Self::Template => "template",
        }
    }

    fn mode(self) -> Mode {
        match self {
            Self::Eager => Mode::Eager,
            Self::Lazy | Self::LazyRecorded => Mode::Lazy,
            Self::TemplateFirst | Self::Template => Mode::Template,
        }
    }
}

/// All modes, warm and, where there is such a thing, cold.
pub(super) fn restore_runs(bench: &Bench<'_>, create: &CreateRuns) -> Result<RestoreRuns> {
    let mut all = RestoreRuns { squib: Vec::new(), qemu: Vec::new(), stayed: 0 };
    // Lazy before a working set is recorded, which then is there for all that follow.
    for kind in [Kind::Eager, Kind::Lazy, Kind::LazyRecorded, Kind::TemplateFirst, Kind::Template] {
        note(bench, &format!("squib restores: {}", kind.name()));
        if kind == Kind::LazyRecorded && bench.squib.can_restore(Mode::Record) {
            let recorded =
                bench.squib.restore(&create.snapshot, Mode::Record, create.reached, RECORDING);
            if let Err(error) = recorded {
                let runs = Runs::Failed(format!("{error:#}"));
                all.squib.push(SquibRestores { kind, cold: false, runs });
                continue;
            }
        }
        squib_restores(bench, create, kind, &mut all)?;
    }
    for saves in &create.qemu {
        note(bench, &format!("{} restores", saves.way.name()));
        for cold in temperatures(bench) {
            let mut one = || -> Result<Back> {
                set_temperature(bench, &saves.last.files(), cold, &mut all.stayed)?;
                let (qemu, first_instruction) = Qemu::restore(bench.guest, &saves.last, bench.dir)?;
                let outputs = Outputs::wait(&qemu.vm)?;
                outputs.check(&qemu.vm, saves.reached)?;
                Ok(outputs.with_instruction(first_instruction))
            };
            let runs = Runs::collect((0..bench.runs).map(|_| one()));
            all.qemu.push(QemuRestores { way: saves.way, cold, runs });
        }
    }
    Ok(all)
}

/// Templates only.
pub(super) fn template_runs(bench: &Bench<'_>, create: &CreateRuns) -> Result<RestoreRuns> {
    let mut all = RestoreRuns { squib: Vec::new(), qemu: Vec::new(), stayed: 0 };
    note(bench, "squib restores: template");
    for kind in [Kind::TemplateFirst, Kind::Template] {
        squib_restores(&Bench { in_memory: true, ..*bench }, create, kind, &mut all)?;
    }
    Ok(all)
}

fn squib_restores(
    bench: &Bench<'_>,
    create: &CreateRuns,
    kind: Kind,
    all: &mut RestoreRuns,
) -> Result<()> {
    let squib = bench.squib;
    let possible = match kind {
        Kind::LazyRecorded => squib.can_restore(Mode::Record),
        _ => squib.can_restore(kind.mode()),
    };
    if !possible {
        all.squib.push(SquibRestores { kind, cold: false, runs: Runs::NotInBuild });
        return Ok(());
    }
    let files = [create.snapshot.as_path(), squib.home()];
    for cold in temperatures(bench) {
        let once = kind == Kind::TemplateFirst;
        if once && cold {
            continue;
        }
        let mut one = || {
            set_temperature(bench, &files, cold, &mut all.stayed)?;
            squib.restore(&create.snapshot, kind.mode(), create.reached, Duration::ZERO)
        };
        let count = if once { 1 } else { bench.runs };
        let runs = Runs::collect((0..count).map(|_| one()));
        all.squib.push(SquibRestores { kind, cold, runs });
    }
    Ok(())
}

/// Warm, and cold where files are not in memory anyway.
fn temperatures(bench: &Bench<'_>) -> impl Iterator<Item = bool> + use<> {
    [false, true].into_iter().take(if bench.in_memory { 1 } else { 2 })
}

fn set_temperature(bench: &Bench<'_>, files: &[&Path], cold: bool, stayed: &mut u64) -> Result<()> {
    if cold {
        *stayed = (*stayed).max(disk::drop_cache(files)?);
    } else if !bench.in_memory {
        disk::warm_cache(files)?;
    }
    Ok(())
}
