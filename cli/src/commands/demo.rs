//! `squib demo`: a guest is booted, snapshotted and ended, and restored by a new process; then
//! everything that can be compared is compared.
//!
//! Every VM here is a process of its own, started as a user would start it: what is measured and
//! compared is the product.

mod guest;
mod report;

use std::{
    ffi::OsString,
    fs,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use squib_formats::{
    image::{Control, digest_file},
    snapshot_dir::Snapshot,
};

use squib_vmm::config::{Deterministic, MachineConfig};

use self::{
    guest::{Guest, counts, sums},
    report::{Check, Report},
};
use crate::{
    api::types::{DiskReport, SnapshotCreateParams, SnapshotReport},
    args::DemoArgs,
    commands::run::{self, absolute},
    events::end_on_signal,
    exit::{Code, Result, WithCode},
    kit::{self, FetchOptions, Kit},
    output::{Spinner, ms, print_json, say},
};

/// Size of the guest's disk.
const DISK_BYTES: u64 = 4 << 20;
/// Numbers that the guest counts between two steps.
const SOME_COUNTS: usize = 5;
/// How long a step may take. Generous: it only bounds how long a guest that hangs is waited for.
const PATIENCE: Duration = Duration::from_secs(300);
/// Sections that hold the host's time and so differ from capture to capture.
const HOST_TIME: &[&str] = &["time"];

pub(crate) fn demo(args: &DemoArgs) -> Result<Code> {
    // Before anything is fetched or made.
    let machine = MachineConfig {
        memory: args.memory.0,
        vcpus: args.cpus,
        backend: run::backend(&args.backend)?,
        deterministic: args.deterministic.then(Deterministic::default),
        ..MachineConfig::new("demo", "")
    };
    machine.validate().code(Code::Usage)?;
    let work = WorkDir::new(args.keep.as_deref())?;
    let at_signal = WorkDir { path: work.path.clone(), keep: work.keep };
    end_on_signal(move || {
        guest::end_all();
        kit::abandon();
        drop(at_signal);
    })?;
    let spinner = Spinner::new("demo");
    let kit = Kit::fetch(&FetchOptions::default(), &|what| spinner.say(what)).code(Code::Failed)?;
    let report = Demo { args, kit, dir: &work.path, spinner: &spinner }.run();
    drop(spinner);
    let report = report?;
    if args.json {
        print_json(&report)?;
    } else {
        report.show();
    }
    if let Some(dir) = &args.keep {
        say!("squib: the disk and the snapshot are in {}", dir.display());
    }
    Ok(if report.holds() { Code::Done } else { Code::Mismatch })
}

struct Demo<'a> {
    args: &'a DemoArgs,
    kit: Kit,
    dir: &'a Path,
    spinner: &'a Spinner,
}

impl Demo<'_> {
    fn run(&self) -> anyhow::Result<Report> {
        let disk = self.dir.join("disk.img");
        let file = fs::File::create(&disk).with_context(|| disk.display().to_string())?;
        file.set_len(DISK_BYTES)?;
        drop(file);

        self.spinner.say("booting the guest");
        let started = Instant::now();
        let mut first = self.boot(&disk)?;
        first.wait("its first count", PATIENCE, |text| counts(text).next())?;
        let boot = started.elapsed();
        self.spinner.say("the guest reads its disk");
        let sum_before = sum(&mut first)?;
        let reached = counts(&first.text()).count();
        first.wait("more counts", PATIENCE, |text| counts(text).nth(reached + SOME_COUNTS))?;
        let disk_before = digest_file(&disk, Control::default())?;

        self.spinner.say("writing the snapshot");
        let snapshot = self.dir.join("snapshot");
        let before = first.client().snapshot(&create(&snapshot, true))?;
        let before_text = first.finish("after the snapshot")?;
        let last = counts(&before_text).last().context("the guest has not counted")?;

        self.spinner.say("restoring, to look at it before its first instruction");
        let (after, sections) = self.look(&snapshot)?;

        self.spinner.say("restoring");
        let disks_dir = self.dir.join("disks");
        fs::create_dir(&disks_dir)?;
        let mut second = self.restore(&snapshot, Some(&disks_dir))?;
        let joined = |text: &str| format!("{before_text}{text}");
        let already = counts(&before_text).count();
        let next =
            second.wait("its next count", PATIENCE, |text| counts(&joined(text)).nth(already))?;
        self.spinner.say("the guest reads its disk again");
        let sum_after = sum(&mut second)?;
        let reached = counts(&second.text()).count();
        second.wait("more counts", PATIENCE, |text| counts(text).nth(reached + SOME_COUNTS))?;
        second.send("off\n")?;
        let timings = second.timings();
        let after_text = second.finish("after it was told to power off")?;
        let disk_after = digest_file(&disks_dir.join("vda.img"), Control::default())?;

        let timings = timings.context("the restored VM has not reported its timings")?;
        let gap = gap(counts(&joined(&after_text)));
        let checks = vec![
            Check::new("counter goes on", (last + 1).to_string(), next.to_string()),
            Check::new(
                "no count is lost",
                format!("1 to {}", counts(&joined(&after_text)).last().unwrap_or_default()),
                match gap {
                    None => {
                        format!("1 to {}", counts(&joined(&after_text)).last().unwrap_or_default())
                    }
                    Some((before, after)) => format!("{before}, then {after}"),
                },
            ),
            Check::new("disk, sha256sum in the guest", sum_before, sum_after),
            Check::new(
                "disk, image digest",
                disk_before.digest.to_string(),
                disk_after.digest.to_string(),
            ),
            Check::new("memory, image digest", before.memory_digest.clone(), after.memory_digest),
            Check::new("disks in both snapshots", disks(&before.disks), disks(&after.disks)),
            Check::new("vCPU and device state", sections.0, sections.1),
        ];
        Ok(Report {
            boot_ms: ms(boot),
            pause_ms: before.timings.iter().find(|p| p.name == "pause").map(|p| p.ms),
            create_ms: before.timings.iter().map(|p| p.ms).sum(),
            stored_bytes: before.stored_bytes,
            raw_bytes: before.raw_bytes,
            first_instruction_ms: timings.first_instruction_ms,
            first_output_ms: timings.first_console_byte_ms,
            checks,
        })
    }

    fn boot(&self, disk: &Path) -> anyhow::Result<Guest> {
        let kernel = match &self.args.kernel {
            Some(kernel) => absolute(kernel).map_err(|e| e.error)?,
            None => self.kit.kernel.clone(),
        };
        let mut words: Vec<OsString> = vec!["run".into(), "--kernel".into()];
        words.push(kernel.into());
        words.push("--initrd".into());
        words.push(self.kit.initrd.clone().into());
        words.push("--disk".into());
        words.push(disk.into());
        let memory = format!("{}K", self.args.memory.0 >> 10);
        let cpus = self.args.cpus.to_string();
        for (flag, value) in [
            ("--memory", memory.as_str()),
            ("--cpus", &cpus),
            ("--backend", &self.args.backend),
            ("--cmdline", "console=ttyS0 quiet panic=-1 squib.demo"),
        ] {
            words.push(flag.into());
            words.push(value.into());
        }
        if self.args.deterministic {
            words.push("--deterministic".into());
        }
        self.start(words)
    }

    /// Restores, paused if there is no place where its disks are to stay.
    fn restore(&self, snapshot: &Path, disks: Option<&Path>) -> anyhow::Result<Guest> {
        let mut words: Vec<OsString> = vec!["snapshot".into(), "restore".into()];
        words.push(snapshot.into());
        match disks {
            Some(dir) => words.extend(["--disk-dir".into(), dir.into()]),
            None => words.push("--paused".into()),
        }
        self.start(words)
    }

    fn start(&self, mut words: Vec<OsString>) -> anyhow::Result<Guest> {
        let socket = self.dir.join("s");
        words.push("--timings=json".into());
        words.push("--name".into());
        words.push("demo".into());
        words.push("--api-sock".into());
        words.push(socket.clone().into());
        Guest::start(words, &self.dir.join("home"), &socket, self.args.console)
    }

    /// Restores without running a single instruction, and writes a snapshot of that: what has come
    /// back, digested from the new process's own memory. Also the sections of both as text.
    fn look(&self, snapshot: &Path) -> anyhow::Result<(SnapshotReport, (String, String))> {
        let again = self.dir.join("again");
        let mut guest = self.restore(snapshot, None)?;
        let client = guest.wait_for_socket(PATIENCE)?;
        let report = client.snapshot(&create(&again, true))?;
        guest.finish("after it was looked at")?;
        let sections = (sections(snapshot)?, sections(&again)?);
        if self.args.keep.is_none() {
            fs::remove_dir_all(&again)?;
        }
        Ok((report, sections))
    }
}

fn create(path: &Path, stop: bool) -> SnapshotCreateParams {
    SnapshotCreateParams { snapshot_path: path.to_owned(), stop, ..SnapshotCreateParams::default() }
}

/// Asks the guest for the SHA-256 of its disk.
fn sum(guest: &mut Guest) -> anyhow::Result<String> {
    let had = sums(&guest.text()).count();
    guest.send("sum\n")?;
    guest.wait("the sum of its disk", PATIENCE, |text| sums(text).nth(had).map(str::to_owned))
}

fn disks(disks: &[DiskReport]) -> String {
    let each: Vec<String> = disks.iter().map(|d| format!("{} {}", d.id, d.digest)).collect();
    each.join(", ")
}

/// Digest over all sections of a snapshot, but for what is the host's.
fn sections(snapshot: &Path) -> anyhow::Result<String> {
    let snapshot = Snapshot::open(snapshot)?;
    let mut hasher = blake3::Hasher::new();
    let mut count = 0;
    for section in &snapshot.manifest().sections {
        if !HOST_TIME.contains(&section.kind.as_str()) {
            hasher.update(
                format!("{} {} {}\n", section.kind, section.instance, section.digest).as_bytes(),
            );
            count += 1;
        }
    }
    ensure!(count > 0, "the snapshot has no sections");
    Ok(format!("{} ({count} sections)", hasher.finalize()))
}

/// The first two neighbours that do not follow each other; counting begins with 1.
fn gap(counts: impl Iterator<Item = u64>) -> Option<(u64, u64)> {
    let mut last = 0;
    for count in counts {
        if count != last + 1 {
            return Some((last, count));
        }
        last = count;
    }
    None
}

/// Where the demo's files lie; removed in the end unless the user keeps them.
struct WorkDir {
    path: PathBuf,
    keep: bool,
}

impl WorkDir {
    fn new(keep: Option<&Path>) -> Result<Self> {
        let path = match keep {
            Some(path) => absolute(path)?,
            None => std::env::temp_dir().join(format!("squib-demo-{}", std::process::id())),
        };
        let made = fs::DirBuilder::new().mode(0o700).create(&path);
        made.with_context(|| format!("{}", path.display())).code(Code::Usage)?;
        Ok(Self { path, keep: keep.is_some() })
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        if !self.keep {
            // Nothing else depends on it: the next demo takes another name.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_or_repeated_count_is_a_gap() {
        assert_eq!(gap([1, 2, 3].into_iter()), None);
        assert_eq!(gap([1, 2, 4].into_iter()), Some((2, 4)));
        assert_eq!(gap([1, 2, 2].into_iter()), Some((2, 2)));
        assert_eq!(gap([2].into_iter()), Some((0, 2)));
    }
}
