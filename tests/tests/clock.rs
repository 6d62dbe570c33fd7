//! What time it is in a guest that was away.

use std::{
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use squib_snapshot::{
    Durability,
    capture::{CaptureOptions, capture},
    restore::{RestoreError, RestoreOptions, restore},
};
use squib_tests::{
    away::{self, Moment, SECOND, wall_ns},
    console::Capture,
    linux::Shell,
    retime::retime,
    scenario,
    tiny::{POWER_OFF, Tiny},
};
use squib_vmm::machine::{self, ClockPolicy, Identity, Machine, TimeAway};

const PATIENCE: Duration = Duration::from_secs(300);
const YEAR: u64 = 365 * 24 * 3600 * SECOND;
/// Ticks between two timer interrupts of the tiny guest: four seconds at 1 GHz.
const PERIOD: u32 = 4_000_000_000;

const FREEZE: machine::RestoreOptions =
    machine::RestoreOptions { identity: Identity::Same, clock: ClockPolicy::Freeze };
const ADVANCE: machine::RestoreOptions =
    machine::RestoreOptions { clock: ClockPolicy::Advance, ..FREEZE };

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
fn an_advanced_counter_makes_up_for_some_seconds_and_leaves_more_to_the_rtc() {
    let folder = tempfile::tempdir().unwrap();
    let saved = tiny(folder.path());
    let snap = folder.path().join("snap");
    for away in [SECOND / 2, 2 * SECOND, 4 * SECOND, 3600 * SECOND, YEAR, 50 * YEAR] {
        retime(&snap, |time| time.wall_ns = wall_ns() - away).unwrap();
        let (machine, console) = back(folder.path(), ADVANCE).unwrap();
        let Some(TimeAway::Advanced { away: seen, counter }) = machine.time_away() else {
            panic!("{:?}", machine.time_away());
        };
        assert!(seen >= Duration::from_nanos(away));
        assert_eq!(machine.time().counter, saved, "{away} ns away");
        if away > 3 * SECOND {
            assert_eq!(counter, Duration::ZERO);
            continue;
        }
        assert_eq!(counter, seen);
        machine.resume().unwrap();
        assert!(away::makes_up_for(&machine, saved, away, PATIENCE), "{}", console.text());
    }
}

#[test]
fn a_clock_that_cannot_be_advanced_stays_where_it_was_and_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let saved = tiny(folder.path());
    let snap = folder.path().join("snap");
    for ahead in [SECOND * 3600, 10 * YEAR] {
        retime(&snap, |time| time.wall_ns = wall_ns() + ahead).unwrap();
        let (machine, _) = back(folder.path(), ADVANCE).unwrap();
        assert_eq!(machine.time().counter, saved);
        let Some(TimeAway::WentBack { by }) = machine.time_away() else {
            panic!("{:?}", machine.time_away());
        };
        assert!(by <= Duration::from_nanos(ahead));
    }
    let end = 1 << 62;
    retime(&snap, |time| {
        time.counter = end;
        time.wall_ns = wall_ns() - YEAR;
    })
    .unwrap();
    let (machine, _) = back(folder.path(), ADVANCE).unwrap();
    assert_eq!(machine.time_away(), Some(TimeAway::CounterAtEnd));
    assert_eq!(machine.time().counter, end);
}

#[test]
fn a_counter_at_its_end_is_taken_over_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    tiny(folder.path());
    let snap = folder.path().join("snap");
    for clock in [FREEZE, ADVANCE] {
        retime(&snap, |time| {
            time.counter = u64::MAX;
            time.wall_ns = wall_ns() - YEAR;
        })
        .unwrap();
        let (machine, _) = back(folder.path(), clock).unwrap();
        assert_eq!(machine.time().counter, u64::MAX);
    }
}

#[test]
fn a_timer_that_came_due_while_away_fires_once() {
    let folder = tempfile::tempdir().unwrap();
    tiny(folder.path());
    let snap = folder.path().join("snap");
    retime(&snap, |time| time.wall_ns = wall_ns() - SECOND * 5 / 2).unwrap();
    let (machine, console) = back(folder.path(), ADVANCE).unwrap();
    machine.resume().unwrap();
    let started = Instant::now();
    while machine.time().counter <= u64::from(PERIOD) && started.elapsed() < PATIENCE {
        thread::sleep(Duration::from_millis(10));
    }
    let lines = |text: &str| text.matches('\n').count();
    let before = lines(&console.text());
    console.wait_for(PATIENCE, |text| (lines(text) > before + 2).then_some(())).unwrap();
    let (fired, counter) = ticks(&machine, &console);
    // The guest asks for multiples of the period since its start, a moment after zero.
    assert!((1..=counter / u64::from(PERIOD)).contains(&fired), "{fired} interrupts by {counter}");
    machine.resume().unwrap();
    machine.console_input().send(&[POWER_OFF]).unwrap();
    machine.wait_timeout(PATIENCE).unwrap();
}

/// A guest at all moments, as snapshots in `folder`; none if there is no guest kit.
fn moments(folder: &Path) -> Option<Vec<(Moment, PathBuf)>> {
    let shell = Shell::start(folder, away::STRICT, 1).unwrap()?;
    let mut snaps = Vec::new();
    let mut take = |moment| {
        let snap = folder.join(format!("{moment:?}"));
        shell.snapshot(&snap).unwrap();
        shell.machine.resume().unwrap();
        snaps.push((moment, snap));
    };
    // Anywhere in the boot.
    thread::sleep(Duration::from_secs(1));
    take(Moment::Boot);
    shell.wait_for_prompt().unwrap();
    // Armed now, and due while it is away.
    shell.ask("(sleep 300; echo woken >> /tmp/woken) & :").unwrap();
    take(Moment::Idle);
    shell.ask(away::BUSY).unwrap();
    take(Moment::Busy);
    Some(snaps)
}

#[test]
fn linux_that_was_away_notices_no_hang_and_its_wall_clock_is_right() {
    let folder = tempfile::tempdir().unwrap();
    let Some(snaps) = moments(folder.path()) else {
        eprintln!(
            "SKIPPED linux_that_was_away_notices_no_hang_and_its_wall_clock_is_right: the guest kit is not in \
             the cache (`squib kit fetch` gets it)"
        );
        return;
    };
    let cases = [
        (Moment::Boot, 45, ClockPolicy::Advance),
        (Moment::Boot, YEAR / SECOND, ClockPolicy::Advance),
        (Moment::Idle, 3, ClockPolicy::Advance),
        (Moment::Idle, 3600, ClockPolicy::Advance),
        (Moment::Idle, YEAR / SECOND, ClockPolicy::Advance),
        (Moment::Idle, 3600, ClockPolicy::Freeze),
        (Moment::Busy, 45, ClockPolicy::Advance),
        (Moment::Busy, 24 * 3600, ClockPolicy::Advance),
    ];
    // One after the other, since they retime one snapshot; then all at once, since they mostly wait.
    let shells: Vec<_> = (0..)
        .zip(cases)
        .map(|(n, (moment, seconds, clock))| {
            let snap = &snaps.iter().find(|(at, _)| *at == moment).unwrap().1;
            let disks = folder.path().join(format!("disks{n}"));
            away::send_away(snap, &disks, seconds, clock).unwrap()
        })
        .collect();
    let shells = thread::scope(|scope| {
        let running = shells.into_iter().zip(cases).map(|(shell, case)| {
            scope.spawn(move || {
                let back = away::come_back(&shell, case.0, case.1)
                    .unwrap_or_else(|e| panic!("{case:?}: {e}"));
                eprintln!("{case:?}: {back:?}");
                // It lags behind while others are busy; that it does not stay.
                assert!(back.later.abs() <= 1, "{case:?}: {back:?}");
                assert!(back.uptime < PATIENCE, "{case:?}: {back:?}");
                // 250 a second, and some for timers of programs.
                let most = back.uptime.as_secs() * 250 + 5000;
                assert!(back.interrupts < most, "{case:?}: {back:?}");
                (shell, case)
            })
        });
        let running: Vec<_> = running.collect();
        running.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    for (shell, (moment, ..)) in shells {
        if moment == Moment::Idle {
            assert_eq!(shell.ask("ls /tmp/woken 2>&1 | grep -c No").unwrap(), "1", "not due yet");
            // A date that is set there stays.
            shell.ask("date -s @86400 >/dev/null; sleep 3").unwrap();
            assert_eq!(shell.ask("date +%Y").unwrap(), "1970");
        }
    }
}
