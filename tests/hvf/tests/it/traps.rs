//! What leaves the guest. Which registers the framework does not trap but leaves undefined, and whether it shows
//! a WFI, is its own affair.

use std::time::{Duration, Instant};

use crate::{
    Session,
    common::{PATIENCE, bare, field, power_off, tiny, wait},
};
use squib_hvf_stand_in::{Host, hv_error_t};
use squib_tests::console::Capture;
use squib_vmm::machine::{Machine, Outcome};

#[test]
fn a_trapped_register_reads_as_zero_and_ignores_what_is_written() {
    let _session = Session::begin();
    let folder = tempfile::tempdir().unwrap();
    let code = [
        0xd280_00e1, // mov x1, #7
        0xd538_cba1, // mrs x1, ICC_SGI1R_EL1, which is write-only
        0xb500_00a1, // cbnz x1, fail
        0xd518_cb61, // msr ICC_RPR_EL1, x1, which is read-only
        0x5280_0100, // mov w0, #8
        0x72b0_8000, // movk w0, #0x8400, lsl #16
        0xd400_0002, // hvc #0: SYSTEM_OFF
        0x1400_0000, // fail: b .
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
    for shows_wfi in [false, true] {
        let session = Session::begin_on(Host { shows_wfi, ..Host::USUAL });
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
    let _session = Session::begin_on(Host { shows_wfi: true, ..Host::USUAL });
    let folder = tempfile::tempdir().unwrap();
    let console = Capture::default();
    let machine = Machine::boot(tiny(folder.path()), Box::new(console.clone())).unwrap();
    machine.resume().unwrap();
    wait(&machine, &console, |text| field(text, "t").is_some_and(|ticks| ticks > 2)).unwrap();
    power_off(&machine).unwrap();
}

#[test]
fn a_guest_that_sleeps_is_paused_although_it_is_not_called_out_at_once() {
    let session = Session::begin();
    let folder = tempfile::tempdir().unwrap();
    let machine = bare(folder.path(), &SLEEPER);
    for round in 0..5 {
        session.lose_exits(2);
        let start = Instant::now();
        // The first pause may come before it sleeps.
        while session.exits_to_lose() > 0 {
            machine.pause(Duration::from_secs(30)).unwrap();
            machine.resume().unwrap();
            assert!(start.elapsed() < PATIENCE, "round {round}");
        }
    }
}
