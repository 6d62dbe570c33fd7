//! What is printed: a table for each guest, and the goals.

use std::path::PathBuf;

use serde::Serialize;
use serde_json::{Value, json};

use super::{
    Runs,
    create::CreateRuns,
    goals::{Goal, goals},
    restore::{Kind, QemuRestores, RestoreRuns},
};
use crate::versus::{disk::WriteRates, median, qemu::Way, squib_vm::Back};

/// Everything that was measured.
pub(super) struct Report {
    pub(super) squib: PathBuf,
    /// QEMU's version, if it was asked for.
    pub(super) qemu: Option<String>,
    pub(super) runs: usize,
    pub(super) storage: Storage,
    /// Bytes a second of [`first_touch_rate`](crate::versus::disk::first_touch_rate), before and after all runs.
    pub(super) first_touch: [f64; 2],
    pub(super) guests: Vec<GuestReport>,
    /// Guests that differ in the size of their memory only.
    pub(super) flat: Vec<GuestReport>,
}

/// Where the files were.
pub(super) struct Storage {
    pub(super) dir: PathBuf,
    pub(super) in_memory: bool,
    pub(super) rates: Option<WriteRates>,
}

/// One guest.
pub(super) struct GuestReport {
    pub(super) memory: u64,
    pub(super) data: u64,
    pub(super) create: CreateRuns,
    pub(super) restore: RestoreRuns,
}

/// A median, or why there is none.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub(super) enum Cell {
    Value(f64),
    /// It was not asked for.
    None,
    #[serde(serialize_with = "not_in_build")]
    NotInBuild,
    #[serde(serialize_with = "failed")]
    Failed,
}

impl Cell {
    pub(super) fn value(self) -> Option<f64> {
        match self {
            Self::Value(value) => Some(value),
            Self::None | Self::NotInBuild | Self::Failed => None,
        }
    }
}

/// Seconds become milliseconds, bytes MiB.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
enum Unit {
    Seconds,
    Bytes,
}

/// One thing that is measured of a restore.
struct Measure {
    name: &'static str,
    unit: Unit,
    of: fn(&Back) -> f64,
}

const MEASURES: [Measure; 4] = [
    Measure {
        name: "first instruction",
        unit: Unit::Seconds,
        of: |run| run.first_instruction.as_secs_f64(),
    },
    Measure { name: "first byte", unit: Unit::Seconds, of: |run| run.first_byte.as_secs_f64() },
    Measure { name: "first line", unit: Unit::Seconds, of: |run| run.first_line.as_secs_f64() },
    Measure { name: "peak memory", unit: Unit::Bytes, of: |run| run.peak as f64 },
];

/// One line of a table.
#[derive(Debug, Serialize)]
struct Row {
    measure: String,
    unit: Unit,
    squib: Cell,
    peer: String,
    peer_value: Cell,
}

impl Row {
    fn new(measure: impl Into<String>, unit: Unit, squib: Cell) -> Self {
        Self { measure: measure.into(), unit, squib, peer: String::new(), peer_value: Cell::None }
    }

    fn beside(self, peer: impl Into<String>, peer_value: Cell) -> Self {
        Self { peer: peer.into(), peer_value, ..self }
    }

    /// How many times squib's is the peer's.
    fn ratio(&self) -> Option<f64> {
        Some(self.squib.value()? / self.peer_value.value()?)
    }

    fn line(&self) -> String {
        let ratio = self.ratio().map_or_else(String::new, |ratio| format!("{ratio:.2}"));
        let line = format!(
            "{:<52} {:>15}   {:<17} {:>12} {ratio:>8}",
            self.measure,
            self.unit.show(self.squib),
            self.peer,
            self.unit.show(self.peer_value),
        );
        line.trim_end().to_owned()
    }
}

impl Unit {
    fn show(self, cell: Cell) -> String {
        match (cell, self) {
            (Cell::Value(value), Self::Seconds) => format!("{:.1} ms", value * 1e3),
            (Cell::Value(value), Self::Bytes) => {
                format!("{:.1} MiB", value / f64::from(1 << 20))
            }
            (Cell::None, _) => String::new(),
            (Cell::NotInBuild, _) => "not in this build".into(),
            (Cell::Failed, _) => "failed".into(),
        }
    }
}

impl Report {
    /// Whether every run did what it was to do.
    pub(super) fn worked(&self) -> bool {
        self.failures().is_empty()
    }

    pub(super) fn print(&self) {
        println!("squib {}", self.squib.display());
        println!("{}", self.qemu.as_deref().unwrap_or("without QEMU"));
        println!("{}", self.storage.text());
        let [before, after] = self.first_touch.map(|rate| rate / 1e6);
        println!("first touch of memory: {before:.0} MB/s before the runs, {after:.0} MB/s after");
        for guest in self.guests.iter().chain(&self.flat) {
            println!();
            println!(
                "guest of {} MiB with {} MiB of data, median of {}",
                guest.memory >> 20,
                guest.data >> 20,
                self.runs
            );
            println!(
                "{:<52} {:>15}   {:<17} {:>12} {:>8}",
                "measure", "squib", "peer", "its", "squib/its"
            );
            for row in guest.rows() {
                println!("{}", row.line());
            }
            if guest.restore.stayed > 0 {
                println!(
                    "{} MiB stayed in the page cache when it was to be cold",
                    guest.restore.stayed >> 20
                );
            }
        }
        println!("\ngoals");
        for Goal { goal, found, holds } in goals(&self.guests, &self.flat) {
            let answer = match holds {
                Some(true) => "yes",
                Some(false) => "no",
                None => "-",
            };
            println!("{answer:<4} {goal:<72} {found}");
        }
        for failure in self.failures() {
            println!("\nfailed: {failure}");
        }
    }

    pub(super) fn json(&self) -> Value {
        let guest = |guest: &GuestReport| {
            json!({
                "memory_bytes": guest.memory,
                "data_bytes": guest.data,
                "stayed_cached_bytes": guest.restore.stayed,
                "measures": guest.rows().iter().map(|row| {
                    let mut value = json!(row);
                    value["ratio"] = json!(row.ratio());
                    value
                }).collect::<Vec<_>>(),
            })
        };
        let rates = self.storage.rates.as_ref();
        json!({
            "squib": self.squib,
            "qemu": self.qemu,
            "runs": self.runs,
            "dir": self.storage.dir,
            "in_memory": self.storage.in_memory,
            "write_bytes_per_second": rates.map(|rates| {
                json!({ "never_used": rates.fresh, "allocated": rates.again })
            }),
            "first_touch_bytes_per_second": self.first_touch,
            "guests": self.guests.iter().map(guest).collect::<Vec<_>>(),
            "flat": self.flat.iter().map(guest).collect::<Vec<_>>(),
            "goals": goals(&self.guests, &self.flat),
            "failures": self.failures(),
        })
    }

    fn failures(&self) -> Vec<String> {
        let mut all = Vec::new();
        for guest in self.guests.iter().chain(&self.flat) {
            let mut note = |what: String, error: Option<&String>| {
                if let Some(error) = error {
                    all.push(format!("{} MiB: {what}: {error}", guest.memory >> 20));
                }
            };
            let CreateRuns { full, diff, live, .. } = &guest.create;
            for (name, runs) in [("full", full), ("diff", diff), ("live", live)] {
                note(format!("create {name}"), runs.error());
            }
            for runs in &guest.restore.squib {
                note(format!("restore {}", name(runs.kind, runs.cold)), runs.runs.error());
            }
            for runs in &guest.restore.qemu {
                note(format!("{} restore", runs.way.name()), runs.runs.error());
            }
        }
        all
    }
}

impl Storage {
    fn text(&self) -> String {
        let dir = self.dir.display();
        match &self.rates {
            None => format!("files in {dir}, which is memory: there is no cold page cache"),
            Some(rates) => format!(
                "files in {dir}; synced writes: {:.0} MB/s to new blocks, {:.0} MB/s to the same again",
                rates.fresh / 1e6,
                rates.again / 1e6
            ),
        }
    }
}

impl GuestReport {
    fn rows(&self) -> Vec<Row> {
        let mut rows = Vec::new();
        self.create_rows(&mut rows);
        self.restore_rows(&mut rows);
        rows
    }

    fn create_rows(&self, rows: &mut Vec<Row>) {
        let CreateRuns { full, diff, live, raw, qemu, .. } = &self.create;
        let qemu: Vec<_> = qemu.iter().filter(|saves| saves.way != Way::Shared).collect();
        let took = full.median(|run| run.took.as_secs_f64());
        let stored = full.median(|run| run.stored as f64);
        let row = || Row::new("create full", Unit::Seconds, took);
        if let Some(raw) = raw {
            rows.push(row().beside("zstd -1 -T0", of(&raw.zstd)));
            rows.push(row().beside("cat, sync", of(&raw.cat)));
        } else {
            rows.push(row());
        }
        for saves in &qemu {
            rows.push(row().beside(saves.way.name(), of(&saves.seconds)));
        }
        let pause = Row::new(
            "create full, guest stands still",
            Unit::Seconds,
            full.median(|run| run.downtime_ms / 1e3),
        );
        rows.push(match qemu.first() {
            Some(saves) => pause.beside(saves.way.name(), of(&saves.seconds)),
            None => pause,
        });
        let size = || Row::new("create full, size", Unit::Bytes, stored);
        if let Some(raw) = raw {
            rows.push(size().beside("zstd -1 -T0", Cell::Value(raw.zstd_bytes as f64)));
        }
        for saves in &qemu {
            rows.push(size().beside(saves.way.name(), Cell::Value(saves.bytes as f64)));
        }
        for (name, runs) in [("create diff", diff), ("create live", live)] {
            if matches!(runs, Runs::Done(done) if done.is_empty()) {
                continue;
            }
            rows.push(
                Row::new(name, Unit::Seconds, runs.median(|run| run.took.as_secs_f64()))
                    .beside("create full", took),
            );
            rows.push(Row::new(
                format!("{name}, guest stands still"),
                Unit::Seconds,
                runs.median(|run| run.downtime_ms / 1e3),
            ));
            rows.push(
                Row::new(
                    format!("{name}, size"),
                    Unit::Bytes,
                    runs.median(|run| run.stored as f64),
                )
                .beside("create full", stored),
            );
        }
        if let Runs::Done(done) = live
            && !done.is_empty()
        {
            rows.push(Row::new(
                "create live, longest silence of the console",
                Unit::Seconds,
                live.median(|run| run.silence.as_secs_f64()),
            ));
        }
        for (name, runs) in [("full", full), ("diff", diff), ("live", live)] {
            if let Runs::Done(done) = runs
                && !done.is_empty()
            {
                rows.push(Row::new(
                    format!("create {name}, memory on top of the VM's"),
                    Unit::Bytes,
                    runs.median(|run| run.growth as f64),
                ));
            }
        }
    }

    fn restore_rows(&self, rows: &mut Vec<Row>) {
        for runs in &self.restore.qemu {
            let temperature = if runs.cold { "cold" } else { "warm" };
            let theirs = |what: &str, unit, value: Cell| {
                Row::new(format!("restore by peer, {temperature}: {what}"), unit, Cell::None)
                    .beside(runs.way.name(), value)
            };
            for Measure { name: what, unit, of: value } in MEASURES {
                rows.push(theirs(what, unit, runs.runs.median(value)));
            }
        }
        for runs in &self.restore.squib {
            let name = format!("restore {}", name(runs.kind, runs.cold));
            if let Runs::NotInBuild = runs.runs {
                rows.push(Row::new(name, Unit::Seconds, Cell::NotInBuild));
                continue;
            }
            let peer = self.restore.peer(runs.kind, runs.cold);
            for Measure { name: what, unit, of: value } in MEASURES {
                let row = Row::new(format!("{name}: {what}"), unit, runs.runs.median(value));
                rows.push(match peer {
                    Some(peer) => row.beside(peer.way.name(), peer.runs.median(value)),
                    None => row,
                });
            }
        }
    }
}

impl RestoreRuns {
    /// What squib in this mode is compared with: a template with QEMU's memory file, all that reads a
    /// compressed snapshot with QEMU's migration stream as it is, which is the faster one for QEMU.
    fn peer(&self, kind: Kind, cold: bool) -> Option<&QemuRestores> {
        let way = if kind == Kind::Template { Way::Shared } else { Way::Plain };
        self.qemu.iter().find(|runs| runs.way == way && runs.cold == cold)
    }
}

fn name(kind: Kind, cold: bool) -> String {
    format!("{}, {}", kind.name(), if cold { "cold" } else { "warm" })
}

/// The median of seconds.
fn of(seconds: &[f64]) -> Cell {
    if seconds.is_empty() { Cell::None } else { Cell::Value(median(&mut seconds.to_vec())) }
}

fn not_in_build<S: serde::Serializer>(serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str("not in this build")
}

fn failed<S: serde::Serializer>(serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str("failed")
}
