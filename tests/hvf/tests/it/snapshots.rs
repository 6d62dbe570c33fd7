//! Snapshots of machines on the hvf backend.

use std::{fs, path::Path};

use crate::{
    Session,
    common::{PATIENCE, PRINT_EVERY, lines, memory, power_off, rounds, tiny, wait},
};
use squib_formats::image::Content;
use squib_snapshot::{
    Durability, TemplateCache,
    capture::{CaptureOptions, capture},
    check::{CheckOptions, check},
    restore::{MemoryLoad, RestoreError, RestoreOptions, Restored, restore},
};
use squib_tests::{
    away::{SECOND, makes_up_for, wall_ns},
    console::Capture,
    retime::retime,
    scenario,
};
use squib_vmm::{
    config::BackendKind,
    machine::{self, ClockPolicy, Identity, Machine},
};

pub(crate) fn options() -> CaptureOptions<'static> {
    CaptureOptions {
        durability: Durability::None,
        pause_deadline: PATIENCE,
        ..CaptureOptions::default()
    }
}

/// The snapshot at `path` as a paused machine, its disk in the new directory `disks`.
pub(crate) fn back(
    path: &Path,
    disks: &Path,
    memory: MemoryLoad,
    console: &Capture,
) -> Result<Restored, RestoreError> {
    fs::create_dir_all(disks).unwrap();
    let options = RestoreOptions {
        disk_dir: Some(disks.to_owned()),
        memory,
        machine: machine::RestoreOptions { identity: Identity::Same, clock: ClockPolicy::Freeze },
        ..RestoreOptions::default()
    };
    restore(path, &options, Box::new(console.clone()))
}

/// A machine that has printed some lines, paused.
pub(crate) fn begun(folder: &Path) -> (Machine, Capture) {
    let console = Capture::default();
    let machine = Machine::boot(tiny(folder), Box::new(console.clone())).unwrap();
    machine.resume().unwrap();
    lines(&machine, &console, 3).unwrap();
    machine.pause(PATIENCE).unwrap();
    assert!(machine.drain_console(PATIENCE));
    (machine, console)
}

#[test]
fn every_way_back_gives_equal_memory_and_state_and_goes_on() {
    let _session = Session::begin();
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (machine, console) = begun(folder.path());
    capture(&machine, &at("snap"), &options()).unwrap();
    let (bytes, state, counter) =
        (memory(&machine), machine.save().unwrap(), machine.time().counter);
    assert!(state.iter().any(|section| section.kind == "hvf-gic"));
    let last = *rounds(&console.text()).last().unwrap();
    drop(machine);

    let templates = || MemoryLoad::Template(TemplateCache::new(at("templates"), u64::MAX));
    let ways = [
        ("eager", MemoryLoad::Eager),
        ("lazy", MemoryLoad::Lazy),
        ("record", MemoryLoad::Record),
        ("template", templates()),
        ("template again", templates()),
    ];
    for (way, load) in ways {
        let console = Capture::default();
        let there = back(&at("snap"), &at(way), load.clone(), &console).unwrap().machine;
        assert_eq!(there.time().counter, counter, "{way}");
        let again = there.save().unwrap();
        // The last one has the wall clock.
        assert_eq!(again[..again.len() - 1], state[..state.len() - 1], "{way}");
        assert!(memory(&there) == bytes, "{way}: memory differs");
        drop(there);

        let there = back(&at("snap"), &at(&format!("{way}2")), load, &console).unwrap().machine;
        there.resume().unwrap();
        lines(&there, &console, 3).unwrap();
        let seen = rounds(&console.text());
        assert!(seen[0] <= last + u64::from(PRINT_EVERY), "{way}: {seen:?} after {last}");
        let step = seen.windows(2).all(|pair| pair[1] == pair[0] + u64::from(PRINT_EVERY));
        assert!(step, "{way}: {seen:?}");
        if way == "record" {
            let found = there.ram().granules().recorded();
            assert!(found.len() > 1, "memory came by faults: {found:?}");
        }
        power_off(&there).unwrap();
    }
}

#[test]
fn a_short_time_away_is_made_up_for_in_steps_by_all_vcpus_and_a_long_one_is_not() {
    let _session = Session::begin();
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (machine, _) = begun(folder.path());
    capture(&machine, &at("snap"), &options()).unwrap();
    let saved = machine.time().counter;
    drop(machine);
    for (seconds, made_up) in [(2, true), (3600, false)] {
        let away = seconds * SECOND;
        retime(&at("snap"), |time| time.wall_ns = wall_ns() - away).unwrap();
        let disks = at(&format!("disks{seconds}"));
        fs::create_dir(&disks).unwrap();
        let options = RestoreOptions {
            disk_dir: Some(disks),
            machine: machine::RestoreOptions {
                identity: Identity::Same,
                clock: ClockPolicy::Advance,
            },
            ..RestoreOptions::default()
        };
        let console = Capture::default();
        let there = restore(&at("snap"), &options, Box::new(console.clone())).unwrap().machine;
        there.resume().unwrap();
        match made_up {
            true => assert!(makes_up_for(&there, saved, away, PATIENCE), "{}", console.text()),
            false => lines(&there, &console, 3).unwrap(),
        }
        let moved = (there.time().counter - saved) / there.time().frequency;
        assert!(moved < 3000, "{moved} s");
        power_off(&there).unwrap();
    }
}

#[test]
fn memory_that_is_read_while_the_guest_goes_on_is_that_of_one_moment() {
    let _session = Session::begin();
    let folder = tempfile::tempdir().unwrap();
    let (machine, console) = begun(folder.path());
    let before = memory(&machine);
    let frozen = machine.freeze(1 << 30).unwrap();
    machine.resume().unwrap();
    lines(&machine, &console, 3).unwrap();
    for (at, expected) in before.chunks(1 << 16).enumerate() {
        let mut found = vec![0; expected.len()];
        if frozen.read((at << 16) as u64, &mut found).unwrap() == Content::Zero {
            found.fill(0);
        }
        assert!(found == expected, "the granule at {:#x} is of another moment", at << 16);
    }
    drop(frozen);
    machine.pause(PATIENCE).unwrap();
    assert!(memory(&machine) != before, "the guest has written");
}

#[test]
fn a_live_snapshot_of_a_running_guest_goes_on() {
    let _session = Session::begin();
    let folder = tempfile::tempdir().unwrap();
    let (machine, console) = begun(folder.path());
    machine.resume().unwrap();
    let path = folder.path().join("live");
    capture(&machine, &path, &CaptureOptions { live: true, ..options() }).unwrap();
    lines(&machine, &console, 2).unwrap();
    power_off(&machine).unwrap();
    drop(machine);
    let console = Capture::default();
    let disks = folder.path().join("disks");
    let there = back(&path, &disks, MemoryLoad::Lazy, &console).unwrap().machine;
    there.resume().unwrap();
    lines(&there, &console, 3).unwrap();
    power_off(&there).unwrap();
}

#[test]
fn a_difference_has_everything_that_changed() {
    let _session = Session::begin();
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (machine, _) = begun(folder.path());
    capture(&machine, &at("base"), &options()).unwrap();
    drop(machine);

    for (way, load) in [
        ("lazy", MemoryLoad::Record),
        ("template", MemoryLoad::Template(TemplateCache::new(at("templates"), u64::MAX))),
    ] {
        let console = Capture::default();
        let there = back(&at("base"), &at(way), load, &console).unwrap().machine;
        there.resume().unwrap();
        lines(&there, &console, 3).unwrap();
        there.pause(PATIENCE).unwrap();
        let diff = at(&format!("{way}-diff"));
        capture(&there, &diff, &CaptureOptions { parent: Some(at("base")), ..options() }).unwrap();
        let (bytes, state) = (memory(&there), there.save().unwrap());
        drop(there);
        let disks = at(&format!("{way}-disks"));
        let there = back(&diff, &disks, MemoryLoad::Eager, &console).unwrap().machine;
        assert!(memory(&there) == bytes, "{way}: memory differs");
        let again = there.save().unwrap();
        assert_eq!(again[..again.len() - 1], state[..state.len() - 1], "{way}");
    }
}

#[test]
fn a_snapshot_of_soft_stays_on_soft() {
    let _session = Session::begin();
    let folder = tempfile::tempdir().unwrap();
    let mut config = tiny(folder.path());
    config.backend = BackendKind::Soft;
    let machine = Machine::boot(config, Box::new(std::io::sink())).unwrap();
    let path = folder.path().join("soft");
    capture(&machine, &path, &options()).unwrap();
    drop(machine);
    // It is restored on the backend that its manifest names, whatever others there are.
    let disks = folder.path().join("disks");
    fs::create_dir(&disks).unwrap();
    let disk_dir = Some(disks.clone());
    let report = check(&path, &CheckOptions { disk_dir, ..CheckOptions::default() }).unwrap();
    let restored = back(&path, &disks, MemoryLoad::Eager, &Capture::default());
    assert_eq!(report.accepted, restored.is_ok());
    assert_eq!(restored.unwrap().machine.config().backend, BackendKind::Soft);
}

#[test]
fn debian_goes_on_after_a_restore() {
    let _session = Session::begin();
    let folder = tempfile::tempdir().unwrap();
    let Some(mut config) = scenario::linux(folder.path()).unwrap() else {
        eprintln!("debian_goes_on_after_a_restore: skipped, the guest kit is not in the cache");
        return;
    };
    config.deterministic = None;
    config.backend = BackendKind::Hvf;
    config.vcpus = 2;
    let console = Capture::default();
    let machine = Machine::boot(config, Box::new(console.clone())).unwrap();
    machine.resume().unwrap();
    wait(&machine, &console, |text| text.contains("/ # ")).unwrap();
    machine.console_input().send(b"word=kept; while :; do :; done & sleep 0.1\n").unwrap();
    wait(&machine, &console, |text| text.matches("/ # ").count() > 1).unwrap();
    let path = folder.path().join("snap");
    machine.pause(PATIENCE).unwrap();
    capture(&machine, &path, &options()).unwrap();
    drop(machine);

    let console = Capture::default();
    let disks = folder.path().join("disks");
    let there = back(&path, &disks, MemoryLoad::Lazy, &console).unwrap().machine;
    there.resume().unwrap();
    there.console_input().send(b"kill $!; sleep 0.3; echo =$word$(nproc)=\n").unwrap();
    wait(&there, &console, |text| text.contains("=kept2=")).unwrap();
}
