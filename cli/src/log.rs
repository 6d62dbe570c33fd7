//! The messages of the machine and of snapshots, on the standard error: warnings and errors, or what SQUIB_LOG
//! asks for.
//!
//! A guest or a snapshot can cause a message as often as it likes. Each place in the program that has something
//! to say has a budget of lines; what is above it is dropped and counted, and the next line of that
//! place, or the end of the process, says how many. A process has one VM, so a place is a source of one VM. The
//! budget is looked at only for a message that would be written: what is not asked for costs nothing.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use tracing::{Event, Level, Metadata, Subscriber, callsite::Identifier};
use tracing_subscriber::{
    EnvFilter, Layer,
    layer::{Context, SubscriberExt},
    util::SubscriberInitExt,
};

use crate::{console, output::say};

/// What one place may say.
#[derive(Clone, Copy, Debug)]
struct Budget {
    /// Lines at once.
    burst: u32,
    /// After that, one line in this time.
    every: Duration,
}

/// For what is said unasked.
const TOLD: Budget = Budget { burst: 10, every: Duration::from_secs(60) };
/// For the levels that a user asks for with SQUIB_LOG.
const ASKED_FOR: Budget = Budget { burst: 1000, every: Duration::from_millis(20) };

/// Sends messages to the standard error from now on.
pub(crate) fn start() {
    let filter = EnvFilter::try_from_env("SQUIB_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    let lines = tracing_subscriber::fmt::layer().with_writer(|| console::Messages);
    tracing_subscriber::registry().with(filter).with(lines).with(limit()).init();
}

/// Says how many messages were dropped since the last one of their place.
pub(crate) fn finish() {
    for (metadata, dropped) in limit().dropped() {
        (limit().tell)(metadata, dropped);
    }
}

/// The limit of this process.
fn limit() -> &'static Limit {
    static LIMIT: OnceLock<Limit> = OnceLock::new();
    LIMIT.get_or_init(|| {
        let started = Instant::now();
        Limit::new(move || started.elapsed(), tell)
    })
}

fn tell(metadata: &Metadata<'_>, dropped: u64) {
    let (level, target) = (metadata.level(), metadata.target());
    say!("squib: {dropped} more messages of {target} ({level}) were dropped: there were too many");
}

/// Tells how many messages of a place were dropped.
type Tell = Box<dyn Fn(&Metadata<'_>, u64) + Send + Sync>;

/// Counts the lines of each place.
struct Limit {
    /// Time since any moment.
    clock: Box<dyn Fn() -> Duration + Send + Sync>,
    tell: Tell,
    /// Grows with the program's places, not with what a guest does.
    places: Mutex<HashMap<Identifier, Place>>,
}

struct Place {
    metadata: &'static Metadata<'static>,
    budget: Budget,
    left: u32,
    /// The moment up to which lines have been put back into the budget.
    filled: Duration,
    dropped: u64,
}

impl Limit {
    fn new(
        clock: impl Fn() -> Duration + Send + Sync + 'static,
        tell: impl Fn(&Metadata<'_>, u64) + Send + Sync + 'static,
    ) -> Self {
        Self { clock: Box::new(clock), tell: Box::new(tell), places: Mutex::default() }
    }

    /// Whether a message of this place may be written.
    fn admit(&self, metadata: &'static Metadata<'static>) -> bool {
        let now = (self.clock)();
        let mut places = self.places();
        let place = places.entry(metadata.callsite()).or_insert_with(|| Place::new(metadata, now));
        let Some(dropped) = place.admit(now) else { return false };
        drop(places);
        if dropped > 0 {
            (self.tell)(metadata, dropped);
        }
        true
    }

    /// The places that have messages dropped and not told of, each with their number; they are told of now.
    fn dropped(&self) -> Vec<(&'static Metadata<'static>, u64)> {
        let mut places = self.places();
        let each = places.values_mut().map(|p| (p.metadata, std::mem::take(&mut p.dropped)));
        each.filter(|(_, dropped)| *dropped > 0).collect()
    }

    fn places(&self) -> MutexGuard<'_, HashMap<Identifier, Place>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    fn new(metadata: &'static Metadata<'static>, now: Duration) -> Self {
        let budget = if *metadata.level() <= Level::INFO { TOLD } else { ASKED_FOR };
        Self { metadata, budget, left: budget.burst, filled: now, dropped: 0 }
    }

    /// How many were dropped before this one, if it may be written.
    fn admit(&mut self, now: Duration) -> Option<u64> {
        let Budget { burst, every } = self.budget;
        let lines = now.saturating_sub(self.filled).as_nanos() / every.as_nanos();
        let lines = u32::try_from(lines).unwrap_or(u32::MAX);
        self.left = self.left.saturating_add(lines).min(burst);
        // A full budget is not filled further.
        self.filled = if self.left == burst { now } else { self.filled + every * lines };
        match self.left.checked_sub(1) {
            Some(left) => {
                self.left = left;
                Some(std::mem::take(&mut self.dropped))
            }
            None => {
                self.dropped += 1;
                None
            }
        }
    }
}

impl<S: Subscriber> Layer<S> for &'static Limit {
    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        self.admit(event.metadata())
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io,
        sync::{
            Arc,
            atomic::{AtomicU64, Ordering},
        },
    };

    use super::*;

    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<String>>);

    impl Log {
        fn add(&self, text: &str) {
            self.0.lock().unwrap().push_str(text);
        }

        /// What was written since the last call, line by line.
        fn take(&self) -> Vec<String> {
            std::mem::take(&mut *self.0.lock().unwrap()).lines().map(str::to_owned).collect()
        }
    }

    impl io::Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.add(std::str::from_utf8(bytes).unwrap());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Runs `body` with a log, and with a clock in seconds that only it moves.
    fn logged(body: impl FnOnce(&Log, &AtomicU64, &'static Limit)) {
        let (log, seconds) = (Log::default(), Arc::new(AtomicU64::new(0)));
        let (clock, notes, lines) = (seconds.clone(), log.clone(), log.clone());
        let limit: &'static Limit = Box::leak(Box::new(Limit::new(
            move || Duration::from_secs(clock.load(Ordering::Relaxed)),
            move |_, dropped| notes.add(&format!("dropped {dropped}\n")),
        )));
        let lines = tracing_subscriber::fmt::layer().with_writer(move || lines.clone());
        let subscriber = tracing_subscriber::registry().with(lines).with(limit);
        tracing::subscriber::with_default(subscriber, || body(&log, &seconds, limit));
    }

    #[test]
    fn a_flood_from_one_place_is_cut_and_counted_and_other_places_are_heard() {
        let flood = || (0..12_000).for_each(|n| tracing::warn!("the driver broke the queue: {n}"));
        logged(|log, seconds, limit| {
            flood();
            assert_eq!(log.take().len(), TOLD.burst as usize);
            tracing::warn!("something else");
            assert_eq!(log.take().len(), 1);
            seconds.fetch_add(2 * TOLD.every.as_secs(), Ordering::Relaxed);
            flood();
            let lines = log.take();
            assert_eq!((lines.len(), lines[0].as_str()), (3, "dropped 11990"));
            let [(_, dropped)] = limit.dropped()[..] else { panic!("one place") };
            assert_eq!(dropped, 11_998);
            assert!(limit.dropped().is_empty());
        });
    }

    #[test]
    fn a_budget_is_full_again_after_a_long_silence_and_never_more_than_full() {
        logged(|log, seconds, _| {
            for _ in 0..3 {
                for _ in 0..50 {
                    tracing::error!("again");
                }
                let lines = log.take().into_iter().filter(|line| line.contains("again")).count();
                assert_eq!(lines, TOLD.burst as usize);
                seconds.fetch_add(1_000_000_000, Ordering::Relaxed);
            }
        });
    }

    #[test]
    fn what_somebody_looks_for_has_a_larger_budget() {
        logged(|log, _, _| {
            (0..5000).for_each(|_| tracing::debug!("detail"));
            assert_eq!(log.take().len(), ASKED_FOR.burst as usize);
        });
    }
}
