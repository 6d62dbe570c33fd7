//! `squib snapshot restore`.

use std::{
    cell::RefCell,
    path::Path,
    time::{Duration, Instant},
};

use squib_devices::{memory::GuestRam, virtio::block::BlockError};
use squib_formats::snapshot_dir::Snapshot;
use squib_snapshot::{
    ChangedDisks, FormatError, MemoryError, TemplateCache,
    boot_files::{BootFileError, BootFiles},
    observe::Run,
    restore::{
        DiskError, DiskLoad, MemoryLoad, RestoreError, RestoreOptions, RestoreTimings, Restored,
        restore as bring_back,
    },
    working_set::{Recorded, record},
};
use squib_vmm::{
    config::{DiskConfig, MachineConfig, OnReset},
    hypervisor::HypervisorError,
    machine::{self, ClockPolicy, Identity, MachineError, TimeAway},
};

use crate::{
    args::{ClockArg, ModeArg, RestoreArgs, Size},
    commands::run,
    events,
    exit::{Code, Complaint, Failure, Result, WithCode},
    home::{
        VmDir,
        folder::{self, Others},
    },
    kit::{KitError, cache_dir},
    output::{ByteBar, bytes, say},
    plain::shell_word,
    session::Session,
    timings::Phases,
};

/// Most bytes that templates take unless `SQUIB_TEMPLATES` says otherwise.
const TEMPLATES: Size = Size(16 << 30);

pub(crate) fn restore(args: &RestoreArgs, started: Instant) -> Result<Code> {
    // The name has to be known first: with it the VM gets its place.
    let name = match &args.name {
        Some(name) => name.clone(),
        None => {
            let snapshot = Snapshot::open(&args.dir).code(Code::Snapshot)?;
            let name = snapshot.manifest().machine.name.clone();
            // As one that the user gives it would be a mistake of the command line.
            MachineConfig::new(&*name, "").validate().code(Code::Snapshot)?;
            name
        }
    };
    // Why a reset cannot boot the guest again, once that is known.
    let hindered = RefCell::new(None);
    let reboot = |_: &mut MachineConfig| match hindered.take() {
        Some(error) => Err(cannot_reboot(&error)),
        None => Ok(()),
    };
    let session =
        Session { name: &name, args: &args.common, started, reboot: &reboot, paused: args.paused };
    let mut memory = None;
    let code = session.run(&mut |console, dir, phases| {
        let bar = ByteBar::new("restore");
        let options = options(args, &name, dir, &bar)?;
        let restored = bring_back(&args.dir, &options, console).map_err(failure)?;
        drop(bar);
        tell_files(args, &restored);
        say_time(restored.machine.time_away());
        if let Err(error) = restored.reboot {
            if restored.machine.config().on_reset == OnReset::Restart {
                say!("squib: a reset will end this VM: {}", cannot_reboot(&error));
            }
            hindered.replace(Some(error));
        }
        note(phases, &restored.timings);
        memory = Some(restored.machine.ram().clone());
        Ok(restored.machine)
    });
    // However the guest ended, what it needed until then is known.
    if args.record
        && let Some(memory) = memory
    {
        note_working_set(args, &memory);
    }
    code
}

/// What became of the time since the snapshot, unless it stands still as by default.
fn say_time(away: Option<TimeAway>) {
    match away {
        None | Some(TimeAway::Frozen) => {}
        Some(TimeAway::Deterministic) => {
            say!("squib: the clock is not advanced: a deterministic guest has a time of its own");
        }
        Some(TimeAway::WentBack { by }) => say!(
            "squib: the clock is not advanced: this host's is {} behind the one that the snapshot was taken by",
            time(by)
        ),
        Some(TimeAway::CounterAtEnd) => {
            say!("squib: the clock is not advanced: the guest's counter is too near its end");
        }
        Some(TimeAway::Advanced { away, counter }) if away == counter => {
            say!("squib: the guest was away for {}; its counter makes up for it", time(away));
        }
        Some(TimeAway::Advanced { away, counter: _ }) => say!(
            "squib: the guest was away for {}; its RTC shows it, for the guest to set its clock by (docs/time.md)",
            time(away)
        ),
    }
}

/// A length of time in its two largest units.
fn time(time: Duration) -> String {
    let all = time.as_secs();
    let (days, hours) = (all / 86_400, all / 3600 % 24);
    let (minutes, seconds) = (all / 60 % 60, all % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{:.1} s", time.as_secs_f64()),
        (0, 0, _) => format!("{minutes} min {seconds} s"),
        (0, _, _) => format!("{hours} h {minutes} min"),
        _ => format!("{days} d {hours} h"),
    }
}

fn cannot_reboot(error: &BootFileError) -> Failure {
    let advice = match error {
        BootFileError::Open { what, .. } | BootFileError::Unknown { what } => {
            format!("; --{what} FILE names it")
        }
        _ => String::new(),
    };
    Failure::new(Code::Usage, anyhow::anyhow!("the guest cannot boot again: {error}{advice}"))
}

/// Says which files of the host the guest can now read and write.
fn tell_files(args: &RestoreArgs, restored: &Restored) {
    for DiskConfig { id, path, read_only } in &restored.machine.config().disks {
        let path = path.display();
        let made = restored.disks.iter().any(|(made, _)| made == id);
        let can = if *read_only { "read" } else { "write to" };
        let line = match (made, &args.disk_dir) {
            (true, None) => format!(
                "disk {id} is a private copy, removed when the VM ends: {path} \
                 (--disk-dir keeps it, --disk {id}=PATH uses another)"
            ),
            (true, Some(_)) => format!("the guest can {can} {path}: disk {id}, made now"),
            (false, _) => format!("the guest can {can} {path}: disk {id}, outside the snapshot"),
        };
        say!("squib: {line}");
    }
}

/// Writes down what the guest has needed. That cannot fail the restore, which is over.
fn note_working_set(args: &RestoreArgs, memory: &GuestRam) {
    match record(&args.dir, memory) {
        Ok(Some(Recorded { touched, common, bytes: size })) => say!(
            "squib: {}: {touched} chunks of memory were needed; recorded {common} ({}) that every run needs",
            args.dir.display(),
            bytes(size)
        ),
        Ok(None) => say!("squib: nothing is recorded: the guest has needed no memory"),
        Err(error) => say!("squib: nothing is recorded: {error}"),
    }
}

fn options<'a>(
    args: &RestoreArgs,
    name: &str,
    dir: &VmDir,
    bar: &'a ByteBar,
) -> Result<RestoreOptions<'a>> {
    let disk_dir = match &args.disk_dir {
        Some(dir) => run::absolute(dir)?,
        None => dir.make_disks().code(Code::Failed)?.to_owned(),
    };
    let mut disk_places = std::collections::BTreeMap::new();
    for place in &args.disks {
        if disk_places.insert(place.id.clone(), run::absolute(&place.path)?).is_some() {
            let twice = anyhow::anyhow!("--disk names the disk `{}` twice", place.id);
            return Err(Failure::new(Code::Usage, twice));
        }
    }
    Ok(RestoreOptions {
        name: Some(name.to_owned()),
        backend: args.backend.as_deref().map(run::backend).transpose()?,
        disk_dir: Some(disk_dir),
        disk_places,
        allowed_disks: args.allowed_disks.clone(),
        changed_disks: match args.allow_changed_disks {
            true => ChangedDisks::Accept,
            false => ChangedDisks::Refuse,
        },
        parents: args.chain.parents.clone(),
        disks: disk_load(args.mode, args.disk_dir.is_some()),
        overcommit: args.overcommit,
        memory: match args.mode {
            ModeArg::Lazy if args.record => MemoryLoad::Record,
            ModeArg::Eager | ModeArg::Template if args.record => {
                let why = "--record needs --mode lazy, which brings memory as the guest touches it";
                return Err(Failure::new(Code::Usage, anyhow::anyhow!(why)));
            }
            mode => memory_load(mode)?,
        },
        machine: machine::RestoreOptions {
            identity: if args.clone { Identity::Clone } else { Identity::Same },
            clock: match args.clock {
                ClockArg::Freeze => ClockPolicy::Freeze,
                ClockArg::Advance => ClockPolicy::Advance,
            },
        },
        on_reset: args.on_reset.map(Into::into),
        boot_files: BootFiles {
            kernel: args.kernel.as_deref().map(run::absolute).transpose()?,
            initrd: args.initrd.as_deref().map(run::absolute).transpose()?,
        },
        run: Run { observer: bar, cancel: events::asked(), ..Run::default() },
    })
}

/// How memory comes back.
pub(crate) fn memory_load(mode: ModeArg) -> Result<MemoryLoad> {
    Ok(match mode {
        ModeArg::Eager => MemoryLoad::Eager,
        ModeArg::Lazy => MemoryLoad::Lazy,
        ModeArg::Template => MemoryLoad::Template(template_cache()?),
    })
}

/// How captured disks come back. What is to stay, in a folder of the user's, is whole before the guest runs,
/// whatever becomes of this process.
pub(crate) fn disk_load(mode: ModeArg, stay: bool) -> DiskLoad {
    match (mode, stay) {
        (ModeArg::Eager, _) | (_, true) => DiskLoad::Eager,
        (ModeArg::Lazy | ModeArg::Template, false) => DiskLoad::Lazy,
    }
}

/// The user's templates.
pub(crate) fn template_cache() -> Result<TemplateCache> {
    let cache = cache_dir().code(Code::Failed)?;
    folder::check(&cache, Others::MayRead).map_err(KitError::from).code(Code::Failed)?;
    let dir = cache.join("templates");
    let limit = match std::env::var("SQUIB_TEMPLATES") {
        Ok(limit) => limit
            .parse::<Size>()
            .map_err(|why| Failure::new(Code::Usage, anyhow::anyhow!("SQUIB_TEMPLATES: {why}")))?,
        Err(_) => TEMPLATES,
    };
    Ok(TemplateCache::new(dir, limit.0))
}

/// The parts of a restore as phases.
fn note(phases: &mut Phases, timings: &RestoreTimings) {
    let RestoreTimings { open, disks, memory, machine, total: _ } = *timings;
    phases.end_with(&[
        ("check the snapshot", open),
        ("disks", disks),
        ("memory", memory),
        ("make the machine", machine),
    ]);
}

/// How the user lets the guest have a disk outside the snapshot, which the snapshot says is at `path`.
fn allow(id: &str, path: &Path) -> String {
    if !path.is_absolute() {
        return format!(": it is a relative path, so name the disk with --disk {id}=PATH");
    }
    let this = shell_word(&format!("{id}={}", path.display())).into_owned();
    let place = path.parent().unwrap_or(path).display().to_string();
    format!(
        ": --disk {this} lets the guest have it, --disk {id}=PATH another; --allow-disk {} allows all \
         that the snapshot names there",
        shell_word(&place)
    )
}

fn failure(error: RestoreError) -> Failure {
    let advice = match &error {
        RestoreError::Format(FormatError::Cancelled) => {
            return events::failure(FormatError::Cancelled);
        }
        RestoreError::Machine(MachineError::Hypervisor(HypervisorError::Unavailable {
            ..
        })) => ": restore it with a squib, and on a host, that has this backend",
        // The machine is the manifest's.
        RestoreError::Machine(
            MachineError::Config(_)
            | MachineError::MemorySize { .. }
            | MachineError::Disk(BlockError::Size { .. }),
        ) => "",
        RestoreError::Machine(error) if run::code(error) != Code::Snapshot => {
            let code = run::code(error);
            return Failure::new(code, anyhow::anyhow!("{error}"));
        }
        // The snapshot is right, the command line is not.
        RestoreError::BootFile(error) => {
            return Failure::new(Code::Usage, anyhow::anyhow!("{error}"));
        }
        RestoreError::Format(FormatError::Digest { .. } | FormatError::Chunk { .. }) => {
            ": `squib snapshot verify` lists all damage"
        }
        RestoreError::Format(FormatError::MissingParent { .. }) => {
            ": if it is elsewhere, say where with --parent DIR"
        }
        RestoreError::Disk(DiskError::Changed { .. }) => {
            ": bring back the disk as it was, or go on at the guest's risk with --allow-changed-disks"
        }
        RestoreError::Disk(DiskError::NotAllowed { id, path }) => {
            return Failure::new(Code::Snapshot, anyhow::anyhow!("{error}{}", allow(id, path)));
        }
        RestoreError::Incompatible(mismatches) => {
            let what = "this host cannot go on with the snapshot:".into();
            let lines = mismatches.iter().map(ToString::to_string).collect();
            return Failure::new(Code::Snapshot, Complaint { what, lines });
        }
        RestoreError::Room(MemoryError::Data { .. }) => {
            ": use --mode template, which takes room on the disk instead, or --overcommit at the host's risk"
        }
        RestoreError::Room(_) => ": use a host with more memory, or --overcommit at its risk",
        RestoreError::NoSuchDisk { .. } => ": `squib snapshot inspect` lists its disks",
        _ => "",
    };
    Failure::new(Code::Snapshot, anyhow::anyhow!("{error}{advice}"))
}
