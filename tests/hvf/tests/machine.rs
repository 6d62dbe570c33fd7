//! Whole machines on the hvf backend.
#![cfg(not(target_os = "macos"))]

use std::{path::Path, time::Duration};

use squib_hvf_stand_in::Session;
use squib_tests::{
    console::Capture,
    scenario,
    tiny::{POWER_OFF, Tiny, input_hash},
};
use squib_vmm::{
    config::{BackendKind, MachineConfig},
    machine::{Machine, Outcome},
};

/// Long enough for the slowest host.
const PATIENCE: Duration = Duration::from_secs(120);

fn tiny(folder: &Path) -> MachineConfig {
    let mut config = scenario::tiny(folder).unwrap();
    config.deterministic = None;
    config.backend = BackendKind::Hvf;
    Tiny { timer_ticks: 1_000_000, print_every: 20 }.write(&config.kernel).unwrap();
    config
}

/// The last whole line's field `name`.
fn field(text: &str, name: &str) -> Option<u64> {
    let whole = &text[..text.rfind('\n')?];
    let line = whole.lines().last()?;
    let value = line.split(' ').find_map(|field| field.strip_prefix(name)?.strip_prefix('='))?;
    u64::from_str_radix(value, 16).ok()
}

fn wait(console: &Capture, what: &str, found: &dyn Fn(&str) -> bool) {
    let seen = console.wait_for(PATIENCE, |text| found(text).then_some(()));
    assert!(seen.is_some(), "{what}: {}", console.text());
}

fn power_off(machine: &Machine, console: &Capture) {
    machine.console_input().send(&[POWER_OFF]).unwrap();
    assert_eq!(machine.wait_timeout(PATIENCE), Some(Outcome::PowerOff), "{}", console.text());
}

#[test]
fn the_tiny_guest_counts_hears_its_console_and_powers_off() {
    let _session = Session::begin();
    let folder = tempfile::tempdir().unwrap();
    let console = Capture::default();
    let machine = Machine::boot(tiny(folder.path()), Box::new(console.clone())).unwrap();
    machine.resume().unwrap();
    wait(&console, "timer interrupts", &|text| field(text, "t").is_some_and(|ticks| ticks > 2));
    let text = console.text();
    let (rounds, requests) = (field(&text, "n").unwrap(), field(&text, "r").unwrap());
    assert!(requests > 0 && requests <= 2 * rounds, "{text}");
    let bytes = b"THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG";
    machine.console_input().send(bytes).unwrap();
    wait(&console, "input", &|text| field(text, "i") == Some(u64::from(input_hash(bytes))));
    power_off(&machine, &console);
}
