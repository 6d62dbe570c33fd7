//! Calls that fail where nobody is left to tell, or where there is another way.

use std::{
    path::Path,
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use squib_hvf_stand_in::{Host, Session, hv_error_t};
use squib_snapshot::{
    capture::{CaptureError, CaptureOptions, capture},
    restore::MemoryLoad,
};
use squib_tests::console::Capture;
use squib_vmm::{
    hypervisor::{HypervisorError, hvf::HvfError},
    machine::{Machine, MachineError},
};
use vm_memory::{Bytes, GuestAddress};

use super::{CODES, assert_framework, files, words};
use crate::{
    common::{PATIENCE, kernel, lines, power_off, tiny},
    log::log,
    snapshots::{back, begun, options},
};

/// Panics of vCPUs' threads, which would be printed to whoever runs the machine.
static PANICS: AtomicU32 = AtomicU32::new(0);

fn count_panics() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if std::thread::current().name().is_some_and(|name| name.starts_with("vcpu")) {
            PANICS.fetch_add(1, Ordering::SeqCst);
        }
        usual(panic);
    }));
}

#[test]
fn a_vcpu_that_cannot_be_destroyed_is_logged_and_no_panic() {
    let session = Session::begin();
    let log = log();
    count_panics();
    for code in CODES {
        let folder = tempfile::tempdir().unwrap();
        let (machine, _) = begun(folder.path());
        session.inject("hv_vcpu_destroy", 0, code);
        drop(machine);
        session.heal();
        let said = log.take();
        let found = |line: &&String| line.contains("vCPU 0 cannot be destroyed");
        let line = said.iter().find(found).unwrap_or_else(|| panic!("{code:?}: {said:?}"));
        assert!(line.contains(&words("hv_vcpu_destroy", code)), "{line}");
        assert!(!session.has_machine());
    }
    // One that was never handed out.
    let folder = tempfile::tempdir().unwrap();
    session.inject("hv_vcpu_destroy", 0, CODES[0]);
    session.inject("hv_gic_get_redistributor_base", 0, CODES[1]);
    let error =
        Machine::boot(tiny(folder.path()), Box::new(std::io::sink())).map(drop).unwrap_err();
    session.heal();
    assert_framework(&error, "hv_gic_get_redistributor_base", CODES[1]);
    assert_eq!(PANICS.load(Ordering::SeqCst), 0);
    drop(begun(folder.path()));
}

#[test]
fn after_a_virtual_machine_that_cannot_be_destroyed_there_is_an_error_that_helps_until_it_can() {
    let session = Session::begin();
    let log = log();
    let folder = tempfile::tempdir().unwrap();
    let boot = || Machine::boot(tiny(folder.path()), Box::new(std::io::sink()));
    for code in CODES {
        let machine = boot().unwrap();
        session.inject("hv_vm_destroy", 0, code);
        drop(machine);
        assert!(session.has_machine());
        let said = log.take();
        assert!(said.iter().any(|line| line.contains("virtual machine cannot be destroyed")));
        let error = boot().map(drop).unwrap_err();
        let HypervisorError::Hvf(error) = hypervisor(error) else { panic!("{code:?}") };
        if code == hv_error_t::HV_NO_DEVICE {
            // It says that there is none, and then that there is one.
            assert!(
                matches!(error, HvfError::Call { code, .. } if code == (hv_error_t::HV_BUSY as i32).into()),
                "{error}"
            );
            assert_eq!(session.violations(), ["a second virtual machine in one process"]);
        } else {
            let now = (code as i32).into();
            assert!(matches!(error, HvfError::Left { code } if code == now), "{error}");
        }
        assert!(error.to_string().contains("run another squib"), "{error}");
        session.heal();
        drop(boot().unwrap());
        assert!(!session.has_machine());
    }
    assert_eq!(session.violations(), Vec::<String>::new());
}

#[test]
fn memory_that_cannot_be_unmapped_is_logged_and_goes_with_its_virtual_machine() {
    let session = Session::begin();
    let log = log();
    for code in CODES {
        let folder = tempfile::tempdir().unwrap();
        let (machine, _) = begun(folder.path());
        session.inject("hv_vm_unmap", 0, code);
        drop(machine);
        session.heal();
        let said = log.take();
        let text = words("hv_vm_unmap", code);
        let found = |line: &String| line.contains("RAM at 0x80000000: ") && line.contains(&text);
        assert!(said.iter().any(found), "{code:?}: {said:?}");
        assert!(!session.has_machine());
    }
}

fn hypervisor(error: MachineError) -> HypervisorError {
    match error {
        MachineError::Hypervisor(error) => error,
        other => panic!("{other:?}"),
    }
}

const ON: [u32; 4] = [
    0x5280_0060, // mov w0, #3
    0x72b8_8000, // movk w0, #0xc400, lsl #16
    0xd280_0021, // mov x1, #1
    0xd280_0103, // mov x3, #8
];

/// Two vCPUs that never leave the guest of their own accord.
const SPIN: [u32; 5] = [
    0x1000_0042, // adr x2, spin
    0xd400_0002, // hvc #0: CPU_ON
    0xd2b0_2001, // spin: mov x1, #0x81000000
    0xf820_6821, // str x1, [x1, x0]
    0x1400_0000, // b .
];

/// A vCPU that sleeps, and one that never leaves the guest of its own accord.
const SLEEP: [u32; 7] = [
    0x1000_0082, // adr x2, spin
    0xd400_0002, // hvc #0: CPU_ON
    0xd503_207f, // sleep: wfi
    0x17ff_ffff, // b sleep
    0xd2b0_2001, // spin: mov x1, #0x81000000
    0xf820_6821, // str x1, [x1, x0]
    0x1400_0000, // b .
];

/// Two vCPUs in `code`, of which those of `spinning` do so.
fn two(folder: &Path, code: &[u32], spinning: &[u64]) -> Machine {
    let mut config = tiny(folder);
    std::fs::write(&config.kernel, kernel(&[&ON, code].concat())).unwrap();
    config.disks.clear();
    config.vcpus = 2;
    let machine = Machine::boot(config, Box::new(std::io::sink())).unwrap();
    machine.resume().unwrap();
    let there = |vcpu: &u64| GuestAddress(0x8100_0000 + 8 * vcpu);
    let spins = |vcpu| machine.ram().read_obj::<u64>(there(vcpu)).unwrap() != 0;
    wait_for(|| spinning.iter().all(spins));
    machine
}

fn times(session: &Session, call: &str) -> u32 {
    session.calls().get(call).copied().unwrap_or(0)
}

fn wait_for(what: impl Fn() -> bool) {
    let start = Instant::now();
    while !what() {
        assert!(start.elapsed() < PATIENCE);
        std::thread::yield_now();
    }
}

#[test]
fn a_guest_that_spins_and_cannot_be_called_leaves_all_the_same_and_loses_nothing() {
    let session = Session::begin();
    let log = log();
    let folder = tempfile::tempdir().unwrap();
    let machine = two(folder.path(), &SPIN, &[0, 1]);
    for code in CODES {
        session.inject("hv_vcpus_exit", 0, code);
        machine.pause(PATIENCE).unwrap();
        session.heal();
        let said = log.take();
        let text = words("hv_vcpus_exit", code);
        let found = |line: &String| line.contains("vCPU 0 does not leave") && line.contains(&text);
        assert!(said.iter().any(found), "{code:?}: {said:?}");
        machine.resume().unwrap();
        machine.pause(PATIENCE).unwrap();
        machine.resume().unwrap();
    }
    // The end of the machine needs it too.
    session.inject("hv_vcpus_exit", 0, CODES[0]);
    drop(machine);
    session.heal();
    assert_eq!(session.violations(), Vec::<String>::new());

    let (machine, console) = begun(folder.path());
    machine.resume().unwrap();
    for code in CODES {
        session.inject("hv_vcpus_exit", 0, code);
        lines(&machine, &console, 1).unwrap();
        machine.pause(PATIENCE).unwrap();
        machine.resume().unwrap();
    }
    let snapshot = folder.path().join("snapshot");
    capture(&machine, &snapshot, &options()).unwrap();
    lines(&machine, &console, 2).unwrap();
    power_off(&machine).unwrap();
    drop(machine);
    let (disks, console) = (folder.path().join("disks"), Capture::default());
    let there = back(&snapshot, &disks, MemoryLoad::Lazy, &console).unwrap().machine;
    there.resume().unwrap();
    lines(&there, &console, 2).unwrap();
}

#[test]
fn a_pause_that_cannot_be_had_misses_its_deadline_and_the_machine_runs_on() {
    let session = Session::begin();
    let folder = tempfile::tempdir().unwrap();
    let machine = two(folder.path(), &SPIN, &[0, 1]);
    session.inject("hv_vcpus_exit", 0, CODES[0]);
    session.inject("hv_vm_unmap", 0, CODES[1]);
    let error = machine.pause(Duration::from_millis(50)).unwrap_err();
    let snapshots = folder.path().join("snapshots");
    std::fs::create_dir(&snapshots).unwrap();
    let soon = CaptureOptions { pause_deadline: Duration::from_millis(50), ..options() };
    let refused = capture(&machine, &snapshots.join("one"), &soon).unwrap_err();
    session.heal();
    assert!(matches!(&refused, CaptureError::Machine(MachineError::VcpuDeadline { .. })));
    assert!(files(&snapshots).is_empty());
    assert!(
        matches!(&error, MachineError::VcpuDeadline { vcpus, .. } if *vcpus == [0, 1]),
        "{error}"
    );
    machine.pause(PATIENCE).unwrap();
}

#[test]
fn a_machine_ends_once_its_last_vcpu_can_be_called_and_nobody_calls_those_that_are_gone() {
    // The one that sleeps does so outside, and needs no call.
    let session = Session::begin_on(Host { shows_wfi: true, ..Host::USUAL });
    let folder = tempfile::tempdir().unwrap();
    let machine = two(folder.path(), &SLEEP, &[1]);
    session.inject("hv_vcpus_exit", 0, CODES[0]);
    session.inject("hv_vm_unmap", 0, CODES[1]);
    std::thread::scope(|scope| {
        scope.spawn(move || drop(machine));
        wait_for(|| times(&session, "hv_vcpu_destroy") == 1);
        session.heal();
    });
    assert!(!session.has_machine());
    assert_eq!(session.violations(), Vec::<String>::new());
}
