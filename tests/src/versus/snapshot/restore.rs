//! Bringing guests back.

use std::{path::Path, time::Duration};

use anyhow::Result;

use super::{
    Bench, Runs,
    create::{CreateRuns, QemuSaves},
    note,
};
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
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

/// All modes, warm and, where there is such a thing, cold. Each round has one restore of each, so that what
/// else the machine does meets all of them.
pub(super) fn restore_runs(bench: &Bench<'_>, create: &CreateRuns) -> Result<RestoreRuns> {
    let mut all = RestoreRuns { squib: Vec::new(), qemu: Vec::new(), stayed: 0 };
    note(bench, "squib makes a template");
    rounds(&bench.once_warm(), create, &[Who::Squib(Kind::TemplateFirst)], &mut all);
    let mut who: Vec<Who<'_>> = [Kind::Eager, Kind::Lazy, Kind::Template].map(Who::Squib).into();
    who.extend(create.qemu.iter().map(Who::Qemu));
    note(bench, "squib and QEMU restore");
    rounds(bench, create, &who, &mut all);
    // Last: a working set that is there once is there for all that follow.
    let kind = Kind::LazyRecorded;
    note(bench, "squib records a working set, and restores with it");
    let recorded = match bench.squib.can_restore(Mode::Record) {
        true => bench.squib.restore(&create.snapshot, Mode::Record, create.reached, RECORDING),
        false => return Ok(all.with(kind, Runs::NotInBuild)),
    };
    match recorded {
        Ok(_) => rounds(bench, create, &[Who::Squib(kind)], &mut all),
        Err(error) => return Ok(all.with(kind, Runs::Failed(format!("{error:#}")))),
    }
    Ok(all.in_order())
}

/// Templates only.
pub(super) fn template_runs(bench: &Bench<'_>, create: &CreateRuns) -> RestoreRuns {
    let mut all = RestoreRuns { squib: Vec::new(), qemu: Vec::new(), stayed: 0 };
    note(bench, "squib restores templates");
    rounds(&bench.once_warm(), create, &[Who::Squib(Kind::TemplateFirst)], &mut all);
    let warm = Bench { in_memory: true, ..*bench };
    rounds(&warm, create, &[Who::Squib(Kind::Template)], &mut all);
    all
}

impl RestoreRuns {
    fn with(mut self, kind: Kind, runs: Runs<Back>) -> Self {
        self.squib.push(SquibRestores { kind, cold: false, runs });
        self.in_order()
    }

    fn in_order(mut self) -> Self {
        self.squib.sort_by_key(|runs| (runs.kind, runs.cold));
        self
    }
}

/// Whose restores.
#[derive(Clone, Copy)]
enum Who<'a> {
    Squib(Kind),
    Qemu(&'a QemuSaves),
}

/// One restore of everyone, warm and cold, in each round. Who fails is left out from then on.
fn rounds(bench: &Bench<'_>, create: &CreateRuns, who: &[Who<'_>], all: &mut RestoreRuns) {
    let able = |who: &&Who<'_>| match who {
        Who::Squib(kind) => bench.squib.can_restore(kind.mode()),
        Who::Qemu(_) => true,
    };
    let mut jobs: Vec<(Who<'_>, bool, Runs<Back>)> = Vec::new();
    for who in who.iter().filter(able) {
        for cold in temperatures(bench) {
            jobs.push((*who, cold, Runs::Done(Vec::new())));
        }
    }
    for _ in 0..bench.runs {
        for (who, cold, runs) in &mut jobs {
            if let Runs::Done(done) = runs {
                match one(bench, create, *who, *cold, &mut all.stayed) {
                    Ok(back) => done.push(back),
                    Err(error) => *runs = Runs::Failed(format!("{error:#}")),
                }
            }
        }
    }
    for who in who.iter().filter(|who| !able(who)) {
        jobs.push((*who, false, Runs::NotInBuild));
    }
    for (who, cold, runs) in jobs {
        match who {
            Who::Squib(kind) => all.squib.push(SquibRestores { kind, cold, runs }),
            Who::Qemu(saves) => all.qemu.push(QemuRestores { way: saves.way, cold, runs }),
        }
    }
}

fn one(
    bench: &Bench<'_>,
    create: &CreateRuns,
    who: Who<'_>,
    cold: bool,
    stayed: &mut u64,
) -> Result<Back> {
    let files = match who {
        Who::Squib(_) => vec![create.snapshot.as_path(), bench.squib.home()],
        Who::Qemu(saves) => saves.last.files(),
    };
    set_temperature(bench, &files, cold, stayed)?;
    match who {
        Who::Squib(kind) => {
            bench.squib.restore(&create.snapshot, kind.mode(), create.reached, Duration::ZERO)
        }
        Who::Qemu(saves) => {
            let (qemu, resumed) = Qemu::restore(bench.guest, &saves.last, bench.dir)?;
            let outputs = Outputs::wait(&qemu.vm)?;
            outputs.check(&qemu.vm, saves.reached)?;
            Ok(outputs.with_instruction(resumed))
        }
    }
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
