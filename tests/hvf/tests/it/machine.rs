//! Whole machines on the hvf backend.

use std::{path::Path, time::Instant};

use crate::common::{PATIENCE, PRINT_EVERY, field, lines, power_off, rounds, tiny, wait};
use squib_hvf_stand_in::{Session, hv_error_t};
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
    let machine = Machine::boot(config, Box::new(console.clone())).unwrap();
    machine.resume().unwrap();
    wait(&machine, &console, |text| text.contains("/ # ")).unwrap();
    machine.console_input().send(b"echo cpus=$(nproc)=\n").unwrap();
    wait(&machine, &console, |text| text.contains("cpus=2=")).unwrap();
}

/// A kernel of `words`, which begin with a branch over the header.
fn kernel(words: &[u32]) -> Vec<u8> {
    let mut image = vec![0u8; 0x1000];
    image[0..4].copy_from_slice(&0x1400_0010u32.to_le_bytes()); // b #64
    image[16..24].copy_from_slice(&0x1000u64.to_le_bytes());
    image[24..32].copy_from_slice(&0b1010u64.to_le_bytes());
    image[56..60].copy_from_slice(b"ARM\x64");
    for (at, word) in words.iter().enumerate() {
        image[64 + 4 * at..][..4].copy_from_slice(&word.to_le_bytes());
    }
    image
}

/// What `code` does on a machine without disks, before anything is sent to its console.
fn bare(folder: &Path, code: &[u32]) -> Machine {
    let mut config = tiny(folder);
    config.disks.clear();
    std::fs::write(&config.kernel, kernel(code)).unwrap();
    let machine = Machine::boot(config, Box::new(std::io::sink())).unwrap();
    machine.resume().unwrap();
    machine
}

#[test]
fn a_trapped_register_reads_as_zero_and_a_secure_call_is_not_supported() {
    let _session = Session::begin();
    let folder = tempfile::tempdir().unwrap();
    let code = [
        0xd280_00e1, // mov x1, #7
        0xd538_cba1, // mrs x1, ICC_SGI1R_EL1, which is write-only
        0xb500_0101, // cbnz x1, fail
        0xd518_cb61, // msr ICC_RPR_EL1, x1, which is read-only
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

/// Enables the interrupt of received bytes at the serial port, and sleeps for ever.
const SLEEPER: [u32; 6] = [
    0xd2a1_c141, // mov x1, #0x0e0a_0000: the serial port
    0x5280_0022, // mov w2, #1
    0x3900_0422, // strb w2, [x1, #1]: IER
    0xd503_207f, // wfi
    0x17ff_ffff, // b to the wfi
    0x1400_0000, // b .
];

#[test]
fn an_interrupt_that_is_lost_ends_a_machine_that_sleeps() {
    let session = Session::begin();
    for shown in [false, true] {
        if shown {
            session.show_wfi();
        }
        let folder = tempfile::tempdir().unwrap();
        let machine = bare(folder.path(), &SLEEPER);
        let start = Instant::now();
        while !session.calls().contains_key("hv_gic_set_spi") && start.elapsed() < PATIENCE {
            std::thread::yield_now();
        }
        // Asleep, and nothing but a pause or the byte wakes it.
        machine.pause(PATIENCE).unwrap();
        machine.resume().unwrap();
        session.inject("hv_gic_set_spi", 0, hv_error_t::HV_ERROR);
        machine.console_input().send(b"x").unwrap();
        let ended = machine.wait_timeout(PATIENCE);
        session.heal();
        let Some(Outcome::Crashed(crash)) = ended else { panic!("{ended:?}") };
        assert!(crash.why.contains("driving interrupt 33"), "{}", crash.why);
    }
}

#[test]
fn a_wfi_that_leaves_the_guest_waits_outside() {
    let session = Session::begin();
    session.show_wfi();
    let folder = tempfile::tempdir().unwrap();
    let console = Capture::default();
    let machine = Machine::boot(tiny(folder.path()), Box::new(console.clone())).unwrap();
    machine.resume().unwrap();
    wait(&machine, &console, |text| field(text, "t").is_some_and(|ticks| ticks > 2)).unwrap();
    power_off(&machine).unwrap();
}
