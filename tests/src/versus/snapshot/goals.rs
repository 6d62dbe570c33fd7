//! What is to hold, and whether it does.

use serde::Serialize;

use super::{
    report::GuestReport,
    restore::{Kind, RestoreRuns},
};
use crate::versus::{median, qemu::Way, squib_vm::Back};

/// One goal.
#[derive(Debug, Serialize)]
pub(super) struct Goal {
    pub(super) goal: String,
    pub(super) found: String,
    /// None if it was not measured.
    pub(super) holds: Option<bool>,
}

const CREATE_SHARE: f64 = 0.8;
const LIVE_PAUSE: f64 = 10e-3;
const TEMPLATE_INSTRUCTION: f64 = 5e-3;
const TEMPLATE_OUTPUT: f64 = 20e-3;
/// A lazy restore may take so many times what a template may.
const LAZY: f64 = 3.0;
/// What does not grow may differ by this factor, or by this time, between two runs.
const NOISE: f64 = 1.5;
const NOISE_TIME: f64 = 1e-3;

/// All goals, for what was measured.
pub(super) fn goals(guests: &[GuestReport], flat: &[GuestReport]) -> Vec<Goal> {
    let mut all = Vec::new();
    for guest in guests {
        let size = format!("{} MiB", guest.memory >> 20);
        create(guest, &size, &mut all);
        let paused = guest.create.live.median(|run| run.downtime_ms / 1e3).value();
        all.push(below(format!("{size}: live pause"), paused, LIVE_PAUSE));
        for (kind, factor) in [(Kind::Template, 1.0), (Kind::LazyRecorded, LAZY)] {
            let name = kind.name();
            let [instruction, output] = times(&guest.restore, kind);
            let most = TEMPLATE_INSTRUCTION * factor;
            all.push(below(format!("{size}: {name}, first instruction"), instruction, most));
            all.push(below(
                format!("{size}: {name}, first line"),
                output,
                TEMPLATE_OUTPUT * factor,
            ));
        }
        ahead(guest, &size, &mut all);
    }
    if let [small, large] = flat {
        let sizes = format!("{} MiB and {} MiB", small.memory >> 20, large.memory >> 20);
        let pause = |guest: &GuestReport| guest.create.live.median(|run| run.downtime_ms / 1e3);
        let live = [small, large].map(|guest| pause(guest).value());
        all.push(same(format!("live pause, {sizes}: flat"), live));
        let template = [small, large].map(|guest| times(&guest.restore, Kind::Template)[0]);
        all.push(same(format!("template, first instruction, {sizes}: flat"), template));
    }
    all
}

/// Full snapshots, against what the slower of compression and storage needs.
fn create(guest: &GuestReport, size: &str, all: &mut Vec<Goal>) {
    let Some(raw) = &guest.create.raw else { return };
    let took = guest.create.full.median(|run| run.took.as_secs_f64()).value();
    let stored = guest.create.full.median(|run| run.stored as f64).value();
    let zstd = median(&mut raw.zstd.clone());
    let cat = median(&mut raw.cat.clone());
    let limit = stored.map(|stored| zstd.max(stored * cat / raw.bytes as f64));
    let share = limit.zip(took).map(|(limit, took)| limit / took);
    all.push(Goal {
        goal: format!(
            "{size}: create at {CREATE_SHARE} of the slower of zstd -1 -T0 and the storage"
        ),
        found: share.map_or_else(String::new, |share| format!("{share:.2}")),
        holds: share.map(|share| share >= CREATE_SHARE),
    });
}

/// Every mode against QEMU, with an equally warm page cache.
fn ahead(guest: &GuestReport, size: &str, all: &mut Vec<Goal>) {
    for ours in &guest.restore.squib {
        // The first time makes the file that the goal is about; QEMU's is there already.
        if ours.kind == Kind::TemplateFirst {
            continue;
        }
        for (what, ways) in [
            ("QEMU's streams", &[Way::Plain, Way::Zstd][..]),
            ("QEMU's memory file", &[Way::Shared][..]),
        ] {
            let theirs = guest.restore.qemu.iter();
            let theirs = theirs.filter(|runs| runs.cold == ours.cold && ways.contains(&runs.way));
            let output = |run: &Back| run.first_line.as_secs_f64();
            let best = theirs.filter_map(|runs| runs.runs.median(output).value());
            let best = best.min_by(f64::total_cmp);
            if guest.restore.qemu.is_empty() {
                continue;
            }
            let both = ours.runs.median(output).value().zip(best);
            all.push(Goal {
                goal: format!(
                    "{size}: {}, {}: first line before {what}",
                    ours.kind.name(),
                    if ours.cold { "cold" } else { "warm" }
                ),
                found: both.map_or_else(String::new, |(ours, best)| {
                    format!("{:.1} ms, {:.1} ms", ours * 1e3, best * 1e3)
                }),
                holds: both.map(|(ours, best)| ours < best),
            });
        }
    }
}

/// First instruction and first line, with a warm page cache.
fn times(restore: &RestoreRuns, kind: Kind) -> [Option<f64>; 2] {
    let Some(found) = restore.squib.iter().find(|runs| runs.kind == kind && !runs.cold) else {
        return [None, None];
    };
    [
        found.runs.median(|run| run.first_instruction.as_secs_f64()).value(),
        found.runs.median(|run| run.first_line.as_secs_f64()).value(),
    ]
}

fn below(what: String, found: Option<f64>, most: f64) -> Goal {
    Goal {
        goal: format!("{what} below {:.0} ms", most * 1e3),
        found: found.map_or_else(String::new, |found| format!("{:.1} ms", found * 1e3)),
        holds: found.map(|found| found < most),
    }
}

fn same(goal: String, found: [Option<f64>; 2]) -> Goal {
    let [small, large] = found;
    let both = small.zip(large);
    Goal {
        goal,
        found: both.map_or_else(String::new, |(small, large)| {
            format!("{:.1} ms, {:.1} ms", small * 1e3, large * 1e3)
        }),
        holds: both.map(|(small, large)| large <= (small * NOISE).max(small + NOISE_TIME)),
    }
}
