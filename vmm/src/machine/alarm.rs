//! The RTC with someone who looks at the clock when its alarm is due.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};
use squib_devices::{
    clock::Clock,
    device::{MachineDevice, PauseError},
    rtc::Rtc,
};
use squib_formats::persist::{PersistError, Section};

/// Longest sleep before the wall clock, which may have been set, is looked at again.
const LONGEST: Duration = Duration::from_secs(60);

/// The RTC of a machine.
///
/// On the host's clock a thread raises the alarm when it is due. In a deterministic machine nothing may
/// happen between two instructions that depends on the host, so there an alarm is noticed at the guest's
/// next access to the RTC.
pub(super) struct AlarmClock {
    rtc: Mutex<Rtc>,
    clock: Arc<dyn Clock>,
    deterministic: bool,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    open: bool,
    held: bool,
}

impl AlarmClock {
    /// `rtc`, which shows the time of `clock`; at rest.
    pub(super) fn new(rtc: Rtc, clock: Arc<dyn Clock>, deterministic: bool) -> Arc<Self> {
        let state = Mutex::new(State { open: true, held: true });
        Arc::new(Self {
            rtc: Mutex::new(rtc),
            clock,
            deterministic,
            state,
            changed: Condvar::new(),
        })
    }

    /// Body of the thread that raises the alarm. Ends with [`close`](Self::close), and at once in a
    /// deterministic machine.
    pub(super) fn watch(&self) {
        let mut state = self.state.lock();
        while state.open && !self.deterministic {
            let due = if state.held { None } else { self.due_in() };
            match due {
                None => self.changed.wait(&mut state),
                // Under the lock, so that nothing changes once `pause` returns.
                Some(Duration::ZERO) => self.rtc.lock().update(),
                Some(left) => {
                    let until = Instant::now() + left.min(LONGEST);
                    self.changed.wait_until(&mut state, until);
                }
            }
        }
    }

    /// Makes the thread look at the wall clock at once.
    pub(super) fn look_again(&self) {
        // Taking the lock orders what has changed against a thread that is about to sleep.
        drop(self.state.lock());
        self.changed.notify_all();
    }

    /// Ends [`watch`](Self::watch).
    pub(super) fn close(&self) {
        self.state.lock().open = false;
        self.changed.notify_all();
    }

    fn due_in(&self) -> Option<Duration> {
        let at = self.rtc.lock().alarm_at()?;
        Some(Duration::from_nanos(at.saturating_sub(self.clock.wall_ns())))
    }
}

impl MachineDevice for AlarmClock {
    fn mmio_read(&self, offset: u64, size: u8) -> u64 {
        self.rtc.mmio_read(offset, size)
    }

    fn mmio_write(&self, offset: u64, size: u8, value: u64) {
        self.rtc.mmio_write(offset, size, value);
        self.look_again();
    }

    fn pause(&self, deadline: Instant) -> Result<(), PauseError> {
        self.state.lock().held = true;
        self.rtc.pause(deadline)
    }

    fn resume(&self) {
        if !self.deterministic {
            // It looks at the clock.
            self.rtc.resume();
        }
        self.state.lock().held = false;
        self.changed.notify_all();
    }

    fn kind(&self) -> &'static str {
        self.rtc.kind()
    }

    fn save(&self, instance: &str) -> Result<Section, PersistError> {
        self.rtc.save(instance)
    }

    fn restore(&self, section: &Section) -> Result<(), PersistError> {
        self.rtc.restore(section)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicU64, Ordering},
        thread,
    };

    use squib_devices::irq::{IrqChip, IrqLine};

    use super::*;

    /// Seconds.
    struct Time(AtomicU64);

    impl Clock for Time {
        fn monotonic_ns(&self) -> u64 {
            self.wall_ns()
        }

        fn wall_ns(&self) -> u64 {
            self.0.load(Ordering::Relaxed) * 1_000_000_000
        }
    }

    #[derive(Default)]
    struct Chip {
        level: Mutex<bool>,
        changed: Condvar,
    }

    impl IrqChip for Chip {
        fn set_spi(&self, _intid: u32, level: bool) {
            *self.level.lock() = level;
            self.changed.notify_all();
        }
    }

    /// An RTC with its alarm at second 1001, at second 1000.
    fn alarm_clock(deterministic: bool) -> (Arc<Time>, Arc<Chip>, Arc<AlarmClock>) {
        let (time, chip) = (Arc::new(Time(AtomicU64::new(1000))), Arc::new(Chip::default()));
        let rtc = Rtc::new(IrqLine::new(chip.clone(), 34), time.clone());
        let clock = AlarmClock::new(rtc, time.clone(), deterministic);
        // RTCMR and RTCIMSC (Arm DDI 0224, table 3-1).
        clock.mmio_write(0x04, 4, 1001);
        clock.mmio_write(0x10, 4, 1);
        (time, chip, clock)
    }

    fn with_watch(clock: &AlarmClock, body: impl FnOnce()) {
        /// Lets the thread end even if an assertion fails.
        struct Closing<'a>(&'a AlarmClock);

        impl Drop for Closing<'_> {
            fn drop(&mut self) {
                self.0.close();
            }
        }

        thread::scope(|scope| {
            scope.spawn(|| clock.watch());
            let _closing = Closing(clock);
            body();
        });
    }

    #[test]
    fn the_alarm_rings_without_an_access() {
        let (time, chip, clock) = alarm_clock(false);
        with_watch(&clock, || {
            clock.resume();
            time.0.store(1001, Ordering::Relaxed);
            let mut level = chip.level.lock();
            while !*level {
                chip.changed.wait(&mut level);
            }
        });
    }

    #[test]
    fn an_alarm_that_was_due_during_a_pause_rings_after_it() {
        let (time, chip, clock) = alarm_clock(false);
        with_watch(&clock, || {
            clock.resume();
            clock.pause(Instant::now()).unwrap();
            let before = clock.save("0").unwrap();
            time.0.store(2000, Ordering::Relaxed);
            clock.changed.notify_all();
            assert_eq!(clock.save("0").unwrap(), before);
            assert!(!*chip.level.lock());
            clock.resume();
            assert!(*chip.level.lock());
        });
    }

    #[test]
    fn a_pause_is_no_event_for_a_deterministic_machine() {
        let (time, chip, clock) = alarm_clock(true);
        clock.watch();
        time.0.store(2000, Ordering::Relaxed);
        let before = clock.save("0").unwrap();
        clock.pause(Instant::now()).unwrap();
        clock.resume();
        assert_eq!(clock.save("0").unwrap(), before);
        assert!(!*chip.level.lock());
        clock.mmio_read(0, 4);
        assert!(*chip.level.lock());
    }
}
