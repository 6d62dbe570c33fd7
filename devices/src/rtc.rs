//! Real-time clock: a PL031 (Arm DDI 0224) that shows the wall clock of an injected [`Clock`].
//!
//! The counter is the wall clock's seconds plus an offset that guest writes to RTCLR move, so a
//! restored RTC shows the host's time again and keeps what the guest set. It always runs: RTCCR reads
//! as one.
//!
//! The alarm needs someone to look at the clock: the machine calls [`Rtc::update`] at
//! [`Rtc::alarm_at`], and every register access looks too. An alarm whose time passed while the
//! machine was paused or saved is raised when it is back. A look before that changes nothing that is
//! saved.

use std::sync::Arc;

use squib_formats::{
    first_version,
    persist::{Persist, PersistError},
};

use crate::{
    clock::Clock,
    device::{MmioDevice, Pause},
    irq::IrqLine,
};
pub use state::RtcState;

/// Register offsets (Arm DDI 0224, table 3-1).
mod reg {
    pub(super) const DR: u64 = 0x00;
    pub(super) const MR: u64 = 0x04;
    pub(super) const LR: u64 = 0x08;
    pub(super) const CR: u64 = 0x0c;
    pub(super) const IMSC: u64 = 0x10;
    pub(super) const RIS: u64 = 0x14;
    pub(super) const MIS: u64 = 0x18;
    pub(super) const ICR: u64 = 0x1c;
    /// RTCPeriphID0, the first of eight identification registers.
    pub(super) const ID: u64 = 0xfe0;
}

/// RTCPeriphID0 to 3, RTCPCellID0 to 3: part 0x031 of Arm, revision 1.
const ID_VALUES: [u8; 8] = [0x31, 0x10, 0x14, 0x00, 0x0d, 0xf0, 0x05, 0xb1];

const NS_PER_S: u64 = 1_000_000_000;

/// Seconds in which the counter comes round.
const COUNTER_PERIOD: u64 = 1 << 32;

/// The real-time clock.
pub struct Rtc {
    // Runtime glue.
    clock: Arc<dyn Clock>,
    irq: IrqLine,
    // What the guest sees.
    /// The counter less the wall clock's seconds, modulo 2^32.
    offset: u32,
    /// RTCLR as last written.
    load: u32,
    /// RTCMR.
    alarm: u32,
    /// RTCIMSC.
    enabled: bool,
    /// RTCRIS.
    raised: bool,
    /// The wall clock's second in which the counter next reaches RTCMR.
    due: u64,
}

impl Rtc {
    /// An RTC in its reset state, showing the time of `clock`.
    pub fn new(irq: IrqLine, clock: Arc<dyn Clock>) -> Self {
        let mut rtc = Self {
            clock,
            irq,
            offset: 0,
            load: 0,
            alarm: 0,
            enabled: false,
            raised: false,
            due: 0,
        };
        rtc.due = rtc.next_match();
        rtc
    }

    /// The wall-clock time, in nanoseconds since 1970, at which the alarm interrupt will be raised if
    /// nothing changes; `None` if it is disabled or already raised.
    pub fn alarm_at(&self) -> Option<u64> {
        if !self.enabled || self.raised {
            return None;
        }
        self.due.checked_mul(NS_PER_S)
    }

    /// Raises the alarm if its time has come. Before that, it changes nothing.
    pub fn update(&mut self) {
        if let Some(late) = self.now().checked_sub(self.due) {
            self.raised = true;
            self.due = self.now() + (COUNTER_PERIOD - late % COUNTER_PERIOD);
        }
        self.drive();
    }

    /// Seconds of the wall clock.
    fn now(&self) -> u64 {
        self.clock.wall_ns() / NS_PER_S
    }

    fn counter(&self) -> u32 {
        (self.now() as u32).wrapping_add(self.offset)
    }

    /// The second in which the counter will reach the alarm, if it is not there now.
    fn next_match(&self) -> u64 {
        match self.alarm.wrapping_sub(self.counter()) {
            0 => self.now() + COUNTER_PERIOD,
            left => self.now() + u64::from(left),
        }
    }

    /// After the counter or the alarm was set: they match if they are equal now.
    fn compare_anew(&mut self) {
        self.raised |= self.alarm == self.counter();
        self.due = self.next_match();
    }

    fn drive(&self) {
        self.irq.set(self.raised && self.enabled);
    }
}

impl MmioDevice for Rtc {
    fn read(&mut self, offset: u64, size: u8) -> u64 {
        self.update();
        if size != 4 {
            return 0;
        }
        match offset {
            reg::DR => self.counter().into(),
            reg::MR => self.alarm.into(),
            reg::LR => self.load.into(),
            reg::CR => 1,
            reg::IMSC => self.enabled.into(),
            reg::RIS => self.raised.into(),
            reg::MIS => (self.raised && self.enabled).into(),
            _ => {
                let index = offset.checked_sub(reg::ID).filter(|past| past % 4 == 0);
                let value = index.and_then(|past| ID_VALUES.get(past as usize / 4));
                value.copied().unwrap_or(0).into()
            }
        }
    }

    fn write(&mut self, offset: u64, size: u8, value: u64) {
        self.update();
        if size != 4 {
            return;
        }
        let value = value as u32;
        match offset {
            reg::MR => {
                self.alarm = value;
                self.compare_anew();
            }
            reg::LR => {
                self.load = value;
                self.offset = value.wrapping_sub(self.counter().wrapping_sub(self.offset));
                self.compare_anew();
            }
            reg::IMSC => self.enabled = value & 1 != 0,
            reg::ICR if value & 1 != 0 => self.raised = false,
            // RTCCR: once started, writes have no effect. The others are read-only.
            _ => {}
        }
        self.drive();
    }
}

/// All work is done inside register accesses. A deterministic machine does not let a pause look at the
/// clock: it leaves `resume` out.
impl Pause for Rtc {
    fn resume(&mut self) {
        self.update();
    }
}

first_version!(RtcState, "rtc");

impl Persist for Rtc {
    type State = RtcState;

    fn save(&self) -> Result<RtcState, PersistError> {
        let Self { clock: _, irq: _, offset, load, alarm, enabled, raised, due } = self;
        Ok(RtcState {
            offset: *offset,
            load: *load,
            alarm: *alarm,
            enabled: *enabled,
            raised: *raised,
            due: *due,
        })
    }

    fn restore(&mut self, state: RtcState) -> Result<(), PersistError> {
        let RtcState { offset, load, alarm, enabled, raised, due } = state;
        let there = (due as u32).wrapping_add(offset);
        if there != alarm {
            let why = format!("in second {due} the counter shows {there}, the alarm is at {alarm}");
            return Err(PersistError::invalid("rtc", "due", why));
        }
        (self.offset, self.load, self.alarm) = (offset, load, alarm);
        (self.enabled, self.raised, self.due) = (enabled, raised, due);
        self.drive();
        Ok(())
    }
}

mod state {
    use serde::{Deserialize, Serialize};

    /// The RTC's registers.
    #[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
    pub struct RtcState {
        /// The counter less the seconds of the wall clock, modulo 2^32.
        pub offset: u32,
        /// RTCLR.
        pub load: u32,
        /// RTCMR.
        pub alarm: u32,
        /// RTCIMSC.
        pub enabled: bool,
        /// RTCRIS.
        pub raised: bool,
        /// The second of the wall clock, since 1970-01-01 00:00 UTC, in which the counter next reaches
        /// RTCMR.
        pub due: u64,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    use squib_formats::persist::{restore_section, save_section};

    use super::*;
    use crate::{irq::IrqChip, map::RTC_INTID};

    #[derive(Default)]
    struct Host {
        seconds: AtomicU64,
        line: AtomicBool,
    }

    impl Host {
        fn set(&self, seconds: u64) {
            self.seconds.store(seconds, Ordering::Relaxed);
        }

        fn irq(&self) -> bool {
            self.line.load(Ordering::Relaxed)
        }
    }

    impl Clock for Host {
        fn monotonic_ns(&self) -> u64 {
            0
        }

        fn wall_ns(&self) -> u64 {
            self.seconds.load(Ordering::Relaxed) * NS_PER_S + 999_999_999
        }
    }

    impl IrqChip for Host {
        fn set_spi(&self, intid: u32, level: bool) {
            assert_eq!(intid, RTC_INTID);
            self.line.store(level, Ordering::Relaxed);
        }
    }

    fn at(seconds: u64) -> (Arc<Host>, Rtc) {
        let host = Arc::new(Host::default());
        host.set(seconds);
        let rtc = Rtc::new(IrqLine::new(host.clone(), RTC_INTID), host.clone());
        (host, rtc)
    }

    #[test]
    fn the_counter_is_the_wall_clock_until_the_guest_sets_it() {
        let (host, mut rtc) = at(1_000);
        assert_eq!(rtc.read(reg::DR, 4), 1_000);
        host.set(1_005);
        assert_eq!(rtc.read(reg::DR, 4), 1_005);
        rtc.write(reg::LR, 4, 50);
        assert_eq!((rtc.read(reg::DR, 4), rtc.read(reg::LR, 4)), (50, 50));
        host.set(1_007);
        assert_eq!((rtc.read(reg::DR, 4), rtc.read(reg::LR, 4)), (52, 50));
        assert_eq!(rtc.read(reg::CR, 4), 1);
    }

    #[test]
    fn the_alarm_is_a_level_until_it_is_cleared() {
        let (host, mut rtc) = at(100);
        rtc.write(reg::MR, 4, 110);
        assert_eq!(rtc.alarm_at(), None, "disabled");
        rtc.write(reg::IMSC, 4, 1);
        assert_eq!(rtc.alarm_at(), Some(110 * NS_PER_S));
        host.set(109);
        rtc.update();
        assert!(!host.irq());
        host.set(112);
        rtc.update();
        assert!(host.irq());
        assert_eq!((rtc.read(reg::RIS, 4), rtc.read(reg::MIS, 4)), (1, 1));
        rtc.write(reg::IMSC, 4, 0);
        assert!(!host.irq());
        assert_eq!((rtc.read(reg::RIS, 4), rtc.read(reg::MIS, 4)), (1, 0));
        rtc.write(reg::IMSC, 4, 1);
        rtc.write(reg::ICR, 4, 1);
        assert!(!host.irq());
        host.set(200);
        rtc.update();
        assert!(!host.irq(), "passed once");
    }

    #[test]
    fn setting_the_alarm_or_the_counter_to_the_other_raises_it() {
        let (_, mut rtc) = at(100);
        rtc.write(reg::MR, 4, 100);
        assert_eq!(rtc.read(reg::RIS, 4), 1);
        rtc.write(reg::ICR, 4, 1);
        rtc.write(reg::MR, 4, 7);
        assert_eq!(rtc.read(reg::RIS, 4), 0);
        rtc.write(reg::LR, 4, 7);
        assert_eq!(rtc.read(reg::RIS, 4), 1);
    }

    #[test]
    fn a_wall_clock_that_steps_back_only_delays_the_alarm() {
        let (host, mut rtc) = at(100);
        rtc.write(reg::MR, 4, 110);
        rtc.write(reg::IMSC, 4, 1);
        for (seconds, raised) in [(80, false), (109, false), (110, true)] {
            host.set(seconds);
            rtc.update();
            assert_eq!(host.irq(), raised);
        }
    }

    #[test]
    fn a_restored_rtc_shows_the_hosts_time_with_the_guests_offset_and_the_alarm_it_missed() {
        let (_, mut rtc) = at(1_000);
        rtc.write(reg::LR, 4, 1_100);
        rtc.write(reg::MR, 4, 1_150);
        rtc.write(reg::IMSC, 4, 1);
        let section = save_section("0", &rtc).unwrap();
        let (host, mut rtc) = at(5_000);
        restore_section(&mut rtc, &section).unwrap();
        assert!(!host.irq());
        rtc.resume();
        assert!(host.irq());
        assert_eq!(rtc.read(reg::DR, 4), 5_100);
    }

    #[test]
    fn neither_time_nor_a_look_at_the_clock_changes_what_is_saved_before_the_alarm() {
        let (host, mut rtc) = at(100);
        rtc.write(reg::MR, 4, 110);
        let before = rtc.save().unwrap();
        host.set(109);
        rtc.update();
        assert_eq!(rtc.save().unwrap(), before);
        host.set(200);
        assert_eq!(rtc.save().unwrap(), before, "a paused machine saves the same again");
        rtc.update();
        assert!(rtc.save().unwrap().raised);
    }

    #[test]
    fn a_state_whose_alarm_is_due_at_another_time_is_refused() {
        let (_, mut rtc) = at(100);
        let state = RtcState { due: 7, ..rtc.save().unwrap() };
        let error = rtc.restore(state).unwrap_err();
        assert!(matches!(error, PersistError::Invalid { field: "due", .. }));
    }

    #[test]
    fn the_identification_registers_name_a_pl031() {
        let (_, mut rtc) = at(0);
        let mut id = |base: u64| (0..4).fold(0, |id, n| id | rtc.read(base + 4 * n, 4) << (8 * n));
        assert_eq!(id(0xfe0), 0x0014_1031);
        assert_eq!(id(0xff0), 0xb105_f00d);
        assert_eq!(rtc.read(0xfe1, 4), 0);
    }

    squib_formats::persist_contract! {
        mod contract,
        device: Rtc,
        fresh: || at(1_000).1,
        change: |rtc| {
            for (offset, value) in [(reg::LR, 7), (reg::MR, 9), (reg::IMSC, 1), (reg::MR, 7)] {
                rtc.write(offset, 4, value);
            }
        },
    }
}
