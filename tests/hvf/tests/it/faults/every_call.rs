//! Every call of a boot, a capture, a restore and a running machine fails with every code, when it is first
//! made and somewhere later.

use std::{path::PathBuf, time::Instant};

use squib_hvf_stand_in::Session;
use squib_snapshot::{
    capture::{CaptureError, CaptureOptions, capture},
    restore::{MemoryLoad, RestoreError},
};
use squib_tests::console::Capture;
use squib_vmm::machine::{Machine, RunState};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

use super::{CODES, assert_crashed, assert_framework, calls, files, somewhere};
use crate::{
    common::{PATIENCE, kernel, lines, power_off, tiny},
    snapshots::{back, begun, options},
};

/// A snapshot of a machine that has printed some lines, and a place for its disks.
struct Saved {
    snapshot: PathBuf,
    disks: PathBuf,
    _folder: TempDir,
}

fn saved() -> Saved {
    let folder = tempfile::tempdir().unwrap();
    let (snapshot, disks) = (folder.path().join("snapshot"), folder.path().join("disks"));
    let (machine, _) = begun(folder.path());
    capture(&machine, &snapshot, &options()).unwrap();
    Saved { snapshot, disks, _folder: folder }
}

#[test]
fn a_boot_that_fails_says_at_what_and_leaves_no_virtual_machine() {
    let session = Session::begin();
    let folder = tempfile::tempdir().unwrap();
    let boot = || Machine::boot(tiny(folder.path()), Box::new(std::io::sink()));
    let (found, machine) = calls(&session, boot);
    drop(machine.unwrap());
    assert!(found.len() > 20, "{found:?}");
    for (call, times) in found {
        for code in CODES {
            for after in [0, somewhere(times, (call, code))] {
                session.inject(call, after, code);
                let error = boot().map(drop).expect_err(call);
                assert_framework(&error, call, code);
                session.heal();
                assert!(!session.has_machine(), "{call} after {after}: {code:?}");
            }
        }
    }
    assert_eq!(session.violations(), Vec::<String>::new());
    drop(boot().unwrap());
}

#[test]
fn a_register_that_cannot_be_read_once_is_not_lost() {
    let session = Session::begin();
    let folder = tempfile::tempdir().unwrap();
    let boot = || Machine::boot(tiny(folder.path()), Box::new(std::io::sink()));
    let state = |machine: &Machine| {
        let sections = machine.save().unwrap();
        sections.into_iter().find(|section| section.kind == "vcpu").unwrap()
    };
    let (found, machine) = calls(&session, boot);
    let expected = state(&machine.unwrap());
    for after in 0..found["hv_vcpu_get_sys_reg"] {
        let code = CODES[after as usize % CODES.len()];
        session.inject_once("hv_vcpu_get_sys_reg", after, code);
        match boot() {
            Ok(machine) => assert_eq!(state(&machine), expected, "after {after}"),
            Err(error) => assert_framework(&error, "hv_vcpu_get_sys_reg", code),
        }
        session.heal();
    }
}

#[test]
fn a_capture_that_fails_says_at_what_and_leaves_guest_and_folder_as_they_were() {
    let session = Session::begin();
    let folder = tempfile::tempdir().unwrap();
    let (machine, console) = begun(folder.path());
    let snapshots = folder.path().join("snapshots");
    std::fs::create_dir(&snapshots).unwrap();
    let first = snapshots.join("first");
    let (found, captured) = calls(&session, || capture(&machine, &first, &options()));
    captured.unwrap();
    assert!(found.len() >= 8, "{found:?}");
    let before = files(&snapshots);
    let fail = |call, after, code, options: &CaptureOptions<'_>| {
        session.inject(call, after, code);
        let result = capture(&machine, &snapshots.join("second"), options);
        session.heal();
        let error = result.expect_err(call);
        let CaptureError::Machine(error) = &error else { panic!("{call}: {error:?}") };
        assert_framework(error, call, code);
        assert!(files(&snapshots) == before, "{call} after {after}: {code:?}");
    };
    for (call, times) in &found {
        for code in CODES {
            fail(call, 0, code, &options());
            fail(call, somewhere(*times, (call, code)), code, &options());
            assert_eq!(machine.state(), RunState::Paused);
        }
        machine.resume().unwrap();
        lines(&machine, &console, 1).unwrap();
        machine.pause(PATIENCE).unwrap();
    }

    // While it runs, only calls that a vCPU does not need for that.
    machine.resume().unwrap();
    let only_saving = |call: &&str| call.starts_with("hv_gic_state") || call.ends_with("fp_reg");
    for call in found.into_keys().filter(only_saving).chain(["hv_gic_get_icc_reg"]) {
        for (live, code) in CODES.into_iter().enumerate() {
            fail(call, 0, code, &CaptureOptions { live: live % 2 == 0, ..options() });
            assert_eq!(machine.state(), RunState::Running);
        }
        lines(&machine, &console, 1).unwrap();
    }
    assert_eq!(session.violations(), Vec::<String>::new());

    let second = snapshots.join("second");
    capture(&machine, &second, &options()).unwrap();
    power_off(&machine).unwrap();
    drop(machine);
    let (disks, console) = (folder.path().join("disks"), Capture::default());
    let there = back(&second, &disks, MemoryLoad::Lazy, &console).unwrap().machine;
    there.resume().unwrap();
    lines(&there, &console, 2).unwrap();
}

#[test]
fn a_restore_that_fails_says_at_what_and_leaves_the_snapshot_and_no_disk() {
    let session = Session::begin();
    let Saved { snapshot, disks, _folder } = saved();
    let before = files(&snapshot);
    let restore = |memory| back(&snapshot, &disks, memory, &Capture::default());
    let remove = || std::fs::remove_dir_all(&disks).unwrap();
    let (found, restored) = calls(&session, || restore(MemoryLoad::Eager));
    drop(restored.unwrap());
    remove();
    assert!(found.len() > 25, "{found:?}");
    for (call, times) in found {
        for (n, code) in CODES.into_iter().enumerate() {
            for after in [0, somewhere(times, (call, code))] {
                let load = if n % 2 == 0 { MemoryLoad::Eager } else { MemoryLoad::Lazy };
                session.inject(call, after, code);
                let RestoreError::Machine(error) = restore(load).map(drop).expect_err(call) else {
                    panic!("{call}")
                };
                assert_framework(&error, call, code);
                assert!(files(&disks).is_empty(), "{call} after {after}: {code:?}");
                session.heal();
                assert!(!session.has_machine(), "{call} after {after}: {code:?}");
            }
        }
        assert!(files(&snapshot) == before, "{call}");
    }
    assert_eq!(session.violations(), Vec::<String>::new());
    let console = Capture::default();
    let there = back(&snapshot, &disks, MemoryLoad::Lazy, &console).unwrap().machine;
    there.resume().unwrap();
    lines(&there, &console, 2).unwrap();
}

#[test]
fn a_machine_whose_call_fails_while_it_runs_ends_and_says_at_what() {
    let session = Session::begin();
    let Saved { snapshot, disks, _folder } = saved();

    let console = Capture::default();
    // Memory comes by faults, and each first write is met.
    let there = || {
        let restored = back(&snapshot, &disks, MemoryLoad::Record, &console).unwrap();
        std::fs::remove_dir_all(&disks).unwrap();
        restored.machine
    };
    let machine = there();
    let (found, _frozen) = calls(&session, || {
        machine.resume().unwrap();
        lines(&machine, &console, 1).unwrap();
        machine.pause(PATIENCE).unwrap();
        let frozen = machine.freeze(1 << 30).unwrap();
        machine.resume().unwrap();
        lines(&machine, &console, 1).unwrap();
        frozen
    });
    power_off(&machine).unwrap();
    drop(machine);
    assert!(found.len() >= 7, "{found:?}");
    // It is only made where a timer was due in the moment of the pause.
    let found = found.into_iter().filter(|(call, _)| *call != "hv_vcpu_set_sys_reg");
    for (call, times) in found {
        // Those are made when a vCPU is called out.
        let when_called = ["hv_vcpu_set_vtimer_mask", "hv_vcpu_get_sys_reg"].contains(&call);
        for code in CODES {
            // What recurs for ever also fails later.
            let later = if times > 20 && !when_called { somewhere(times, (call, code)) } else { 0 };
            for after in if later > 0 { vec![0, later] } else { vec![0] } {
                let machine = there();
                if call == "hv_vm_protect" {
                    // Only what is mapped before the freeze is protected.
                    machine.resume().unwrap();
                    lines(&machine, &console, 1).unwrap();
                    machine.pause(PATIENCE).unwrap();
                }
                let frozen = machine.freeze(1 << 30).unwrap();
                session.inject(call, after, code);
                machine.resume().unwrap();
                // A vCPU that is outside just then comes without being called.
                while when_called && machine.pause(PATIENCE).is_ok() && machine.resume().is_ok() {}
                assert_crashed(machine.wait_timeout(PATIENCE), call, code);
                session.heal();
                drop((frozen, machine));
                assert!(!session.has_machine(), "{call} after {after}: {code:?}");
            }
        }
    }
    assert_eq!(session.violations(), Vec::<String>::new());
}

#[test]
fn memory_that_could_be_mapped_only_in_part_is_taken_back() {
    let session = Session::begin();
    let Saved { snapshot, disks, _folder } = saved();
    for code in CODES {
        let there = back(&snapshot, &disks, MemoryLoad::Record, &Capture::default()).unwrap();
        std::fs::remove_dir_all(&disks).unwrap();
        // Two ranges are there before the first run.
        for at in [0x8000_0000, 0x8200_0000] {
            there.machine.ram().read_obj::<u64>(GuestAddress(at)).unwrap();
        }
        session.inject("hv_vm_map", 1, code);
        there.machine.resume().unwrap();
        assert_crashed(there.machine.wait_timeout(PATIENCE), "hv_vm_map", code);
        session.heal();
        drop(there);
        assert_eq!(session.violations(), Vec::<String>::new());
    }
}

#[test]
fn memory_that_could_be_protected_only_in_part_is_still_written_to() {
    const PLACES: [u64; 2] = [0x8100_0000, 0x8200_0000];
    let session = Session::begin();
    let folder = tempfile::tempdir().unwrap();
    let mut config = tiny(folder.path());
    config.disks.clear();
    let code = [
        0xd2b0_2001, // mov x1, #0x81000000
        0xd2b0_4002, // mov x2, #0x82000000
        0x9100_0463, // again: add x3, x3, #1
        0xf900_0023, // str x3, [x1]
        0xf900_0043, // str x3, [x2]
        0x17ff_fffd, // b again
    ];
    std::fs::write(&config.kernel, kernel(&code)).unwrap();
    let machine = Machine::boot(config, Box::new(std::io::sink())).unwrap();
    let count = |at| machine.ram().read_obj::<u64>(GuestAddress(at)).unwrap();
    let run = || {
        let before = PLACES.map(count);
        machine.resume().unwrap();
        let start = Instant::now();
        while PLACES.into_iter().zip(before).any(|(at, before)| count(at) <= before) {
            assert!(start.elapsed() < PATIENCE && machine.state() == RunState::Running);
            std::thread::yield_now();
        }
        machine.pause(PATIENCE).unwrap();
    };
    run();
    drop(machine.freeze(1 << 30).unwrap());
    for code in CODES {
        // Each of the two is a range of its own now.
        run();
        session.inject("hv_vm_protect", 1, code);
        let error = machine.freeze(1 << 30).map(drop).expect_err("a second range");
        session.heal();
        assert_framework(&error, "hv_vm_protect", code);
        run();
    }
}
