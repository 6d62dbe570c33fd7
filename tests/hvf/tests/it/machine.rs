//! Whole machines on the hvf backend.

use std::time::Instant;

use crate::{
    Session,
    common::{PATIENCE, PRINT_EVERY, bare, field, lines, power_off, rounds, tiny, wait},
};
use squib_tests::{console::Capture, scenario, tiny::input_hash};
use squib_vmm::{
    config::BackendKind,
    machine::{Machine, Outcome},
};

#[test]
fn the_tiny_guest_counts_hears_its_console_and_powers_off() {
    let _session = Session::begin();
    let folder = tempfile::tempdir().unwrap();
    let console = Capture::default();
    let machine = Machine::boot(tiny(folder.path()), Box::new(console.clone())).unwrap();
    machine.resume().unwrap();
    wait(&machine, &console, |text| field(text, "t").is_some_and(|ticks| ticks > 2)).unwrap();
    let text = console.text();
    let (rounds, requests) = (field(&text, "n").unwrap(), field(&text, "r").unwrap());
    assert!(requests > 0 && requests <= 2 * rounds, "{text}");
    let bytes = b"THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG";
    machine.console_input().send(bytes).unwrap();
    let heard = u64::from(input_hash(bytes));
    wait(&machine, &console, |text| field(text, "i") == Some(heard)).unwrap();
    power_off(&machine).unwrap();
}

#[test]
fn pauses_and_runs_cancelled_for_no_reason_lose_nothing() {
    let session = Session::begin();
    session.cancel_every(3);
    let folder = tempfile::tempdir().unwrap();
    let console = Capture::default();
    let machine = Machine::boot(tiny(folder.path()), Box::new(console.clone())).unwrap();
    let mut counter = 0;
    for _ in 0..10 {
        machine.resume().unwrap();
        lines(&machine, &console, 2).unwrap();
        machine.pause(PATIENCE).unwrap();
        let (once, twice) = (machine.save().unwrap(), machine.save().unwrap());
        // The last one has the wall clock.
        assert_eq!(once[..once.len() - 1], twice[..twice.len() - 1]);
        let now = machine.time().counter;
        assert!(now > counter, "the counter stepped back from {counter} to {now}");
        counter = now;
    }
    for (line, round) in rounds(&console.text()).into_iter().enumerate() {
        assert_eq!(round, u64::from(PRINT_EVERY) * (line as u64 + 1), "{}", console.text());
    }
}

#[test]
fn another_machine_can_follow_in_the_same_process() {
    let _session = Session::begin();
    for _ in 0..3 {
        let folder = tempfile::tempdir().unwrap();
        let console = Capture::default();
        let machine = Machine::boot(tiny(folder.path()), Box::new(console.clone())).unwrap();
        machine.resume().unwrap();
        lines(&machine, &console, 1).unwrap();
    }
}

#[test]
fn debian_boots_on_two_vcpus() {
    let _session = Session::begin();
    let folder = tempfile::tempdir().unwrap();
    let Some(mut config) = scenario::linux(folder.path()).unwrap() else {
        eprintln!("debian_boots_on_two_vcpus: skipped, the guest kit is not in the cache");
        return;
    };
    config.deterministic = None;
    config.backend = BackendKind::Hvf;
    config.vcpus = 2;
    let console = Capture::default();
    let started = Instant::now();
    let machine = Machine::boot(config, Box::new(console.clone())).unwrap();
    machine.resume().unwrap();
    wait(&machine, &console, |text| text.contains("/ # ")).unwrap();
    println!("Debian: boot to the prompt {:?}", started.elapsed());
    machine.console_input().send(b"echo cpus=$(nproc)=\n").unwrap();
    wait(&machine, &console, |text| text.contains("cpus=2=")).unwrap();
}

#[test]
fn a_secure_call_is_not_supported() {
    let _session = Session::begin();
    let folder = tempfile::tempdir().unwrap();
    let code = [
        0xd400_0003, // smc #0
        0xb100_041f, // cmn x0, #1
        0x5400_0081, // b.ne fail
        0x5280_0100, // mov w0, #8
        0x72b0_8000, // movk w0, #0x8400, lsl #16
        0xd400_0002, // hvc #0: SYSTEM_OFF
        0x1400_0000, // fail: b .
    ];
    let machine = bare(folder.path(), &code);
    assert_eq!(machine.wait_timeout(PATIENCE), Some(Outcome::PowerOff));
}

#[test]
fn a_vcpu_that_suspends_itself_with_nothing_to_wait_for_comes_back() {
    let _session = Session::begin();
    let folder = tempfile::tempdir().unwrap();
    let code = [
        0x5280_0020, // mov w0, #1
        0x72b0_8000, // movk w0, #0x8400, lsl #16
        0xd280_0001, // mov x1, #0: standby
        0xd400_0002, // hvc #0: CPU_SUSPEND
        0x5280_0100, // mov w0, #8
        0x72b0_8000, // movk w0, #0x8400, lsl #16
        0xd400_0002, // hvc #0: SYSTEM_OFF
    ];
    let machine = bare(folder.path(), &code);
    assert_eq!(machine.wait_timeout(PATIENCE), Some(Outcome::PowerOff));
}
