//! The tiny guest on a machine that runs by the host's clock.

use std::time::Duration;

use squib_tests::{
    console::Capture,
    scenario,
    tiny::{POWER_OFF, Tiny, input_hash},
};
use squib_vmm::machine::{Machine, Outcome};

/// Long enough for the slowest host.
const PATIENCE: Duration = Duration::from_secs(120);

/// The last whole line's field `name`.
fn field(text: &str, name: &str) -> Option<u64> {
    let whole = &text[..text.rfind('\n')?];
    let line = whole.lines().last()?;
    let value = line.split(' ').find_map(|field| field.strip_prefix(name)?.strip_prefix('='))?;
    u64::from_str_radix(value, 16).ok()
}

#[test]
fn the_guest_counts_ticks_and_requests_hears_its_console_and_powers_off() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = scenario::tiny(folder.path()).unwrap();
    config.deterministic = None;
    Tiny { timer_ticks: 1_000_000, print_every: 100 }.write(&config.kernel).unwrap();
    let console = Capture::default();
    let machine = Machine::boot(config, Box::new(console.clone())).unwrap();
    machine.resume().unwrap();

    let wait = |what: &str, found: &dyn Fn(&str) -> bool| {
        let seen = console.wait_for(PATIENCE, |text| found(text).then_some(()));
        assert!(seen.is_some(), "{what}: {}", console.text());
    };
    wait("timer interrupts", &|text| field(text, "t").is_some_and(|ticks| ticks > 2));
    let text = console.text();
    let (rounds, requests) = (field(&text, "n").unwrap(), field(&text, "r").unwrap());
    assert!(requests > 0 && requests <= 2 * rounds, "{text}");

    // More than the FIFO holds.
    let bytes = b"the quick brown fox jumps over the lazy dog".map(|b| b.to_ascii_uppercase());
    machine.console_input().send(&bytes).unwrap();
    wait("input", &|text| field(text, "i") == Some(u64::from(input_hash(&bytes))));

    machine.console_input().send(&[POWER_OFF]).unwrap();
    assert_eq!(machine.wait_timeout(PATIENCE), Some(Outcome::PowerOff), "{}", console.text());
}

#[test]
fn pausing_again_and_again_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = scenario::tiny(folder.path()).unwrap();
    config.deterministic = None;
    Tiny { timer_ticks: 1_000_000, print_every: 20 }.write(&config.kernel).unwrap();
    let console = Capture::default();
    let machine = Machine::boot(config, Box::new(console.clone())).unwrap();
    for pauses in 1..=20 {
        machine.resume().unwrap();
        let lines = pauses * 2;
        let seen = console.wait_for(PATIENCE, |text| (text.lines().count() > lines).then_some(()));
        assert!(seen.is_some(), "{}", console.text());
        machine.pause(PATIENCE).unwrap();
        assert_eq!(machine.save().unwrap()[0], machine.save().unwrap()[0]);
    }
    let text = console.text();
    let rounds = text.lines().filter_map(|line| u64::from_str_radix(line.get(2..10)?, 16).ok());
    for (line, round) in rounds.enumerate() {
        assert_eq!(round, 20 * (line as u64 + 1), "{text}");
    }
}
