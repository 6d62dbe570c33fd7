//! Exits that a guest on the usual host does not cause.

use std::{io::Write, sync::mpsc, time::Duration};

use squib_hvf_stand_in::{Exit, Report, Session, Walk, hv_exit_reason_t};
use squib_tests::{
    console::Capture,
    tiny::{Burst, Ending},
};
use squib_vmm::machine::{Crash, Machine, Outcome};

use crate::{
    common::{PATIENCE, kernel, lines, power_off, tiny},
    snapshots::begun,
};

/// A guest that runs and has printed something.
fn going(folder: &std::path::Path) -> (Machine, Capture) {
    let (machine, console) = begun(folder);
    machine.resume().unwrap();
    lines(&machine, &console, 1).unwrap();
    (machine, console)
}

fn crash(machine: &Machine) -> Crash {
    match machine.wait_timeout(PATIENCE) {
        Some(Outcome::Crashed(crash)) => crash,
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_access_that_the_cpu_does_not_describe_ends_the_machine_with_its_place() {
    let session = Session::begin();
    let folder = tempfile::tempdir().unwrap();
    let (machine, _) = going(folder.path());
    session.report_next(Report::Hidden);
    let Crash { pc, why, .. } = crash(&machine);
    assert!(why.contains("cannot be emulated"), "{why}");
    assert!(why.contains(&format!("the instruction at {:#x}", pc.unwrap())), "{why}");
}

#[test]
fn an_exit_that_nobody_expects_ends_the_machine_with_its_class_and_place() {
    let session = Session::begin();
    let exception =
        |syndrome, address| Exit { reason: hv_exit_reason_t::EXCEPTION, syndrome, address };
    let unknown = Exit { reason: hv_exit_reason_t::UNKNOWN, syndrome: 0, address: 0 };
    let brk = 0x3c << 26 | 1 << 25 | 0x1234;
    // Where no RAM is: a fetch, the table walk of a fetch, and that of a load.
    let nowhere = 0x1000;
    let (fetch, load, walk) = (0x20 << 26 | 0b000111, 0x24 << 26 | 0b000111, 1 << 7);
    let cases = [
        (exception(brk, 0), "exit EXCEPTION"),
        (exception(brk, 0), "exception class 0x3c, syndrome 0xf2001234"),
        (exception(0x19 << 26, 0), "exception class 0x19"),
        (unknown, "exit UNKNOWN"),
        (exception(fetch, nowhere), "guest-physical 0x1000, where no RAM is"),
        (exception(fetch | walk, nowhere), "accesses 0x1000, where no RAM is"),
        (exception(load | walk, nowhere), "accesses 0x1000, where no RAM is"),
    ];
    for (exit, says) in cases {
        let folder = tempfile::tempdir().unwrap();
        let (machine, _) = going(folder.path());
        session.exit_next(1, exit);
        let Crash { vcpu, pc, why } = crash(&machine);
        assert!(why.contains(says), "{why}");
        assert_eq!(vcpu, 0);
        assert!(why.contains(&format!("at {:#x}", pc.unwrap())), "{why}");
    }
}

#[test]
fn a_table_walk_that_may_not_write_gets_the_right_to() {
    let session = Session::begin();
    let folder = tempfile::tempdir().unwrap();
    let (machine, console) = going(folder.path());
    for walk in [Walk::Load, Walk::Fetch] {
        machine.pause(PATIENCE).unwrap();
        let frozen = machine.freeze(1 << 30).unwrap();
        let before = session.walks();
        session.report_walks(Some(walk));
        machine.resume().unwrap();
        lines(&machine, &console, 2).unwrap();
        assert!(session.walks() > before, "no write was met");
        session.report_walks(None);
        drop(frozen);
    }
    power_off(&machine).unwrap();
}

#[test]
fn cache_maintenance_where_no_ram_is_does_nothing() {
    let session = Session::begin();
    let folder = tempfile::tempdir().unwrap();
    let mut config = tiny(folder.path());
    config.disks.clear();
    let code = [
        0xd2a1_c141, // mov x1, #0x0e0a0000, the serial port
        0x5280_0822, // mov w2, #'A'
        0x3900_0022, // strb w2, [x1]
        0x5280_0842, // mov w2, #'B'
        0x3900_0022, // strb w2, [x1]
        0x5280_0100, // mov w0, #8
        0x72b0_8000, // movk w0, #0x8400, lsl #16
        0xd400_0002, // hvc #0: SYSTEM_OFF
    ];
    std::fs::write(&config.kernel, kernel(&code)).unwrap();
    let console = Capture::default();
    let machine = Machine::boot(config, Box::new(console.clone())).unwrap();
    session.report_next(Report::CacheMaintenance);
    machine.resume().unwrap();
    assert_eq!(machine.wait_timeout(PATIENCE), Some(Outcome::PowerOff));
    assert!(machine.drain_console(PATIENCE));
    assert_eq!(console.text(), "B");
}

#[test]
fn an_access_that_faults_for_ever_ends_the_machine_with_its_place() {
    let session = Session::begin();
    let folder = tempfile::tempdir().unwrap();
    let (machine, console) = going(folder.path());
    // An external abort, in a granule that the guest may write to.
    let abort = Exit {
        reason: hv_exit_reason_t::EXCEPTION,
        syndrome: 0x24 << 26 | 1 << 6 | 0b010000,
        address: 0x8020_0000,
    };
    session.exit_next(3, abort);
    lines(&machine, &console, 2).unwrap();
    session.exit_next(u32::MAX, abort);
    let Crash { pc, why, .. } = crash(&machine);
    assert!(why.contains("faults for ever at guest-physical 0x80200000"), "{why}");
    assert!(why.contains(&format!("the instruction at {:#x}", pc.unwrap())), "{why}");
}

#[test]
fn all_that_a_guest_writes_before_it_ends_reaches_a_slow_host() {
    let _session = Session::begin();
    let folder = tempfile::tempdir().unwrap();
    for ending in [Ending::PowerOff, Ending::Reset] {
        let mut config = tiny(folder.path());
        config.disks.clear();
        let burst = Burst { bytes: 10_000, ending };
        std::fs::write(&config.kernel, burst.image()).unwrap();
        let (allow, allowed) = mpsc::channel();
        let console = Capture::default();
        let slow = Slow { allowed, to: console.clone() };
        let machine = Machine::boot(config, Box::new(slow)).unwrap();
        machine.resume().unwrap();
        // It ends before the host has taken a byte.
        assert!(machine.wait_timeout(PATIENCE).is_some());
        assert!(console.taken().is_empty());
        assert!(!machine.drain_console(Duration::ZERO));
        drop(allow);
        assert_eq!(machine.finish_console(PATIENCE, PATIENCE), 0);
        assert_eq!(console.taken(), burst.output());
    }
}

/// Takes nothing until the other end of `allowed` is gone, and then few bytes at once.
struct Slow {
    allowed: mpsc::Receiver<()>,
    to: Capture,
}

impl Write for Slow {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let _ = self.allowed.recv();
        self.to.write(&bytes[..bytes.len().min(7)])
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
