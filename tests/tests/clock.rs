//! What time it is in a guest that was away.

use std::{
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use squib_snapshot::{
    Durability,
    capture::{CaptureOptions, capture},
    restore::{RestoreError, RestoreOptions, restore},
};
use squib_tests::{
    console::Capture,
    linux::Shell,
    retime::retime,
    scenario,
    tiny::{POWER_OFF, Tiny},
};
use squib_vmm::machine::{self, ClockPolicy, Identity, Machine, MachineError};

const PATIENCE: Duration = Duration::from_secs(300);
const SECOND: u64 = 1_000_000_000;
const YEAR: u64 = 365 * 24 * 3600 * SECOND;
/// Ticks between two timer interrupts of the tiny guest: four seconds at 1 GHz.
const PERIOD: u32 = 4_000_000_000;

const FREEZE: machine::RestoreOptions =
    machine::RestoreOptions { identity: Identity::Same, clock: ClockPolicy::Freeze };
const ADVANCE: machine::RestoreOptions =
    machine::RestoreOptions { clock: ClockPolicy::Advance, ..FREEZE };

fn wall_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64
}

/// A snapshot of the tiny guest before its first timer interrupt, and the counter in it.
fn tiny(folder: &Path) -> u64 {
    let mut config = scenario::tiny(folder).unwrap();
    config.deterministic = None;
    Tiny { timer_ticks: PERIOD, print_every: 20 }.write(&config.kernel).unwrap();
    let console = Capture::default();
    let machine = Machine::boot(config, Box::new(console.clone())).unwrap();
    machine.resume().unwrap();
    console.wait_for(PATIENCE, |text| text.contains('\n').then_some(())).unwrap();
    machine.pause(PATIENCE).unwrap();
    let options = CaptureOptions { durability: Durability::None, ..CaptureOptions::default() };
    capture(&machine, &folder.join("snap"), &options).unwrap();
    machine.time().counter
}

/// The tiny guest back, paused.
fn back(
    folder: &Path,
    machine: machine::RestoreOptions,
) -> Result<(Machine, Capture), RestoreError> {
    let disk_dir = tempfile::tempdir_in(folder).unwrap().keep();
    let options = RestoreOptions { disk_dir: Some(disk_dir), machine, ..RestoreOptions::default() };
    let console = Capture::default();
    let restored = restore(&folder.join("snap"), &options, Box::new(console.clone()))?;
    Ok((restored.machine, console))
}

/// The timer interrupts that the guest has counted, and the counter then.
fn ticks(machine: &Machine, console: &Capture) -> (u64, u64) {
    machine.resume().unwrap();
    // The first line may have been begun before the interrupt.
    let lines = |text: &str| text.matches('\n').count();
    console.wait_for(PATIENCE, |text| (lines(text) >= 3).then_some(())).unwrap();
    machine.pause(PATIENCE).unwrap();
    let text = console.text();
    let line = text[..text.rfind('\n').unwrap()].lines().last().unwrap().to_owned();
    let field = line.split(' ').find_map(|field| field.strip_prefix("t=")).unwrap();
    (u64::from_str_radix(field, 16).unwrap(), machine.time().counter)
}

#[test]
fn a_frozen_counter_goes_on_from_the_saved_value_whatever_the_wall_clock_says() {
    let folder = tempfile::tempdir().unwrap();
    let saved = tiny(folder.path());
    for wall in [0, wall_ns() - 10 * YEAR, wall_ns() + 10 * YEAR, u64::MAX] {
        retime(&folder.path().join("snap"), |time| time.wall_ns = wall).unwrap();
        let (machine, console) = back(folder.path(), FREEZE).unwrap();
        assert_eq!(machine.time().counter, saved);
        let (fired, counter) = ticks(&machine, &console);
        assert!(counter > saved, "it runs again");
        assert!(fired <= counter / u64::from(PERIOD), "{fired} interrupts by {counter}");
    }
}

#[test]
fn an_advanced_counter_has_the_time_away_added_and_never_steps_back() {
    let folder = tempfile::tempdir().unwrap();
    let saved = tiny(folder.path());
    let snap = folder.path().join("snap");
    for away in [10 * SECOND, YEAR, 10 * YEAR, 50 * YEAR] {
        let before = wall_ns();
        let time = retime(&snap, |time| time.wall_ns = before - away).unwrap();
        let (machine, _) = back(folder.path(), ADVANCE).unwrap();
        let most = wall_ns() - time.wall_ns;
        let ticks = |ns: u64| {
            saved
                + u64::try_from(u128::from(ns) * u128::from(time.frequency) / 1_000_000_000)
                    .unwrap()
        };
        let now = machine.time().counter;
        assert!((ticks(away)..=ticks(most)).contains(&now), "{away} ns away: {saved} then {now}");
    }
    for ahead in [SECOND * 3600, 10 * YEAR] {
        retime(&snap, |time| time.wall_ns = wall_ns() + ahead).unwrap();
        let (machine, _) = back(folder.path(), ADVANCE).unwrap();
        assert_eq!(machine.time().counter, saved, "the wall clock went back");
    }
}

#[test]
fn a_counter_that_would_run_over_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    tiny(folder.path());
    let snap = folder.path().join("snap");
    for (counter, clock) in [(u64::MAX, FREEZE), (1 << 62, ADVANCE)] {
        retime(&snap, |time| {
            time.counter = counter;
            time.wall_ns = wall_ns() - YEAR;
        })
        .unwrap();
        let Err(error) = back(folder.path(), clock) else { panic!("restored") };
        assert!(matches!(error, RestoreError::Machine(MachineError::State { .. })), "{error}");
        assert!(error.to_string().contains("`time` 0: time: field `counter`"), "{error}");
    }
}

#[test]
fn a_timer_that_came_due_while_away_fires_once() {
    let folder = tempfile::tempdir().unwrap();
    tiny(folder.path());
    // Between the first and the second time at which the guest wants to be woken.
    let snap = folder.path().join("snap");
    retime(&snap, |time| time.wall_ns = wall_ns() - SECOND * 9 / 2).unwrap();
    let (machine, console) = back(folder.path(), ADVANCE).unwrap();
    assert!(machine.time().counter > u64::from(PERIOD), "it is due");
    let (fired, counter) = ticks(&machine, &console);
    // The guest asks for multiples of the period since its start, a moment after zero.
    assert!((1..=counter / u64::from(PERIOD)).contains(&fired), "{fired} interrupts by {counter}");
    machine.resume().unwrap();
    machine.console_input().send(&[POWER_OFF]).unwrap();
    machine.wait_timeout(PATIENCE).unwrap();
}

/// Timer interrupts of all vCPUs since the boot.
fn timer_interrupts(shell: &Shell) -> u64 {
    let line = shell.ask("grep arch_timer /proc/interrupts").unwrap();
    let counts = line.split_whitespace().skip(1).map_while(|word| word.parse::<u64>().ok());
    counts.sum()
}

fn number(shell: &Shell, command: &str) -> u64 {
    let text = shell.ask(command).unwrap();
    text.parse().unwrap_or_else(|_| panic!("{command}: {text}"))
}

/// How long Linux is away. Its timekeeping catches up second by second, with interrupts masked (second_overflow
/// in kernel/time/ntp.c): a year takes a software CPU the better part of a minute.
const AWAY: u64 = 100 * 24 * 3600 * SECOND;

const UPTIME: &str = "cut -d. -f1 /proc/uptime";

#[test]
fn linux_lives_through_months_away_without_a_storm_of_timer_interrupts() {
    let folder = tempfile::tempdir().unwrap();
    let Some(shell) = Shell::boot(folder.path()).unwrap() else {
        eprintln!(
            "SKIPPED linux_lives_through_months_away_without_a_storm_of_timer_interrupts: the guest kit \
             is not in the cache (`squib kit fetch` gets it)"
        );
        return;
    };
    let uptime = number(&shell, UPTIME);
    // Armed while the machine is away, and due in the middle of it.
    shell.ask("(sleep 300; echo woken >> /tmp/woken) & :").unwrap();
    let before = timer_interrupts(&shell);
    let snap = folder.path().join("snap");
    shell.save(&snap).unwrap();

    retime(&snap, |time| time.wall_ns = wall_ns() - AWAY).unwrap();
    let shell = Shell::restore(&snap, &folder.path().join("advance"), ADVANCE).unwrap();
    shell.machine.resume().unwrap();
    let interrupts = timer_interrupts(&shell) - before;
    // All ticks of the time away, at 250 Hz, would be two thousand million.
    assert!(interrupts < 100_000, "{interrupts} interrupts\n{}", shell.text());
    shell.ask("until [ -e /tmp/woken ]; do sleep 0.1; done").unwrap();
    assert_eq!(shell.ask("cat /tmp/woken").unwrap(), "woken", "once");
    let passed = number(&shell, UPTIME) - uptime;
    assert!(passed >= AWAY / SECOND, "{passed} s");
    let shows_host_time = |shell: &Shell| {
        let before = wall_ns() / SECOND;
        let rtc = number(shell, "cat /sys/class/rtc/rtc0/since_epoch");
        assert!((before..=wall_ns() / SECOND).contains(&rtc), "{before} then {rtc}");
    };
    shows_host_time(&shell);
    drop(shell);

    for (wall, name) in [(wall_ns() - 10 * YEAR, "past"), (wall_ns() + 10 * YEAR, "future")] {
        retime(&snap, |time| time.wall_ns = wall).unwrap();
        let shell = Shell::restore(&snap, &folder.path().join(name), FREEZE).unwrap();
        shell.machine.resume().unwrap();
        let now = number(&shell, UPTIME);
        assert!((uptime..uptime + 10 * YEAR / SECOND).contains(&now), "{uptime} s then {now} s");
        assert_eq!(shell.ask("ls /tmp/woken 2>&1 | grep -c No").unwrap(), "1", "not due yet");
        shows_host_time(&shell);
    }
}
