//! Rate limits: a token bucket with a one-time burst, and the pair of buckets of a device.

use std::{sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};
use squib_formats::persist::PersistError;

use crate::clock::Clock;

/// A bucket's size and speed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BucketConfig {
    /// Tokens that the bucket holds; full at the start. At least 1.
    pub size: u64,
    /// Extra tokens at the start, spent first and never refilled.
    pub one_time_burst: u64,
    /// Milliseconds in which an empty bucket fills. At least 1.
    pub refill_time_ms: u64,
}

/// A bucket that cannot work.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BucketError {
    /// A bucket of size zero would let nothing pass.
    #[error("the size of a token bucket is zero")]
    Size,
    /// The refill time is zero, or above [`MAX_REFILL_MS`].
    #[error("a refill time of {0} ms is not between 1 and {MAX_REFILL_MS}")]
    RefillTime(u64),
}

/// Longest refill time: a year.
pub const MAX_REFILL_MS: u64 = 365 * 24 * 3600 * 1000;

/// Tokens that refill at a steady pace.
///
/// A demand that is larger than the whole bucket passes when the bucket is full, and leaves a debt that
/// the refill pays off before anything else passes. So every demand passes some day, and the pace is kept.
pub struct TokenBucket {
    config: BucketConfig,
    clock: Arc<dyn Clock>,
    budget: u64,
    burst: u64,
    debt: u64,
    /// What is left of the time credited so far, in tokens * ns: below one token's worth, which is
    /// the refill time in ns.
    fraction: u64,
    /// When the bucket was refilled last, on both clocks: one measures, the other is saved.
    refilled_ns: u64,
    refilled_wall_ns: u64,
}

impl TokenBucket {
    /// A full bucket.
    pub fn new(config: BucketConfig, clock: Arc<dyn Clock>) -> Result<Self, BucketError> {
        let BucketConfig { size, one_time_burst: burst, refill_time_ms } = config;
        if size == 0 {
            return Err(BucketError::Size);
        }
        if !(1..=MAX_REFILL_MS).contains(&refill_time_ms) {
            return Err(BucketError::RefillTime(refill_time_ms));
        }
        let (refilled_ns, refilled_wall_ns) = (clock.monotonic_ns(), clock.wall_ns());
        let (budget, debt, fraction) = (size, 0, 0);
        Ok(Self { config, clock, budget, burst, debt, fraction, refilled_ns, refilled_wall_ns })
    }

    /// Tokens that could be taken now, the burst included.
    pub fn available(&mut self) -> u64 {
        self.refill();
        if self.debt > 0 { 0 } else { self.budget.saturating_add(self.burst) }
    }

    /// Takes `tokens`, or says how long to wait before asking again. Nothing is taken then.
    pub fn take(&mut self, tokens: u64) -> Result<(), Duration> {
        self.ready(tokens)?;
        let from_burst = tokens.min(self.burst);
        let from_budget = (tokens - from_burst).min(self.budget);
        self.burst -= from_burst;
        self.budget -= from_budget;
        self.debt = tokens - from_burst - from_budget;
        Ok(())
    }

    /// Whether [`take`](Self::take) would pass now.
    pub fn ready(&mut self, tokens: u64) -> Result<(), Duration> {
        self.refill();
        let needed = tokens.saturating_sub(self.burst).min(self.config.size);
        // There is no debt beside a budget.
        match needed.saturating_sub(self.budget) {
            0 if self.debt == 0 => Ok(()),
            missing => Err(self.time_for(u128::from(self.debt) + u128::from(missing))),
        }
    }

    /// Credits the time since the last refill.
    pub fn refill(&mut self) {
        let now = self.clock.monotonic_ns();
        let elapsed = now.saturating_sub(self.refilled_ns);
        self.refilled_ns = self.refilled_ns.max(now);
        self.refilled_wall_ns = self.clock.wall_ns();
        self.credit(elapsed);
    }

    fn credit(&mut self, elapsed_ns: u64) {
        let refill_ns = u128::from(self.refill_ns());
        let earned =
            u128::from(elapsed_ns) * u128::from(self.config.size) + u128::from(self.fraction);
        let tokens = u64::try_from(earned / refill_ns).unwrap_or(u64::MAX);
        let to_debt = tokens.min(self.debt);
        self.debt -= to_debt;
        let room = self.config.size - self.budget;
        let to_budget = (tokens - to_debt).min(room);
        self.budget += to_budget;
        // A full bucket earns nothing.
        let full = self.budget == self.config.size;
        self.fraction = if full { 0 } else { (earned % refill_ns) as u64 };
    }

    /// At most a year in ns, below 2^55.
    fn refill_ns(&self) -> u64 {
        self.config.refill_time_ms * 1_000_000
    }

    /// Until `tokens` more are earned, rounded up.
    fn time_for(&self, tokens: u128) -> Duration {
        // At most 2^65 * 2^55 in the product.
        let owed = tokens * u128::from(self.refill_ns()) - u128::from(self.fraction);
        let ns = owed.div_ceil(u128::from(self.config.size));
        Duration::from_nanos(u64::try_from(ns).unwrap_or(u64::MAX))
    }

    /// The bucket as of its last refill. Two calls without a refill between them give equal states.
    pub fn save(&self) -> BucketState {
        let Self {
            config,
            clock: _,
            budget,
            burst,
            debt,
            fraction,
            refilled_ns: _,
            refilled_wall_ns,
        } = self;
        BucketState {
            config: *config,
            budget: *budget,
            burst: *burst,
            debt: *debt,
            fraction: *fraction,
            refilled_wall_ns: *refilled_wall_ns,
        }
    }

    /// Checks `state` for this bucket; `kind` and `field` name it in the error.
    pub fn check(
        &self,
        kind: &'static str,
        field: &'static str,
        state: &BucketState,
    ) -> Result<(), PersistError> {
        let BucketState { config, budget, burst, debt, fraction, refilled_wall_ns: _ } = state;
        let why = if *config != self.config {
            format!("the saved bucket is {config:?}, the machine's {:?}", self.config)
        } else if *budget > config.size {
            format!("a budget of {budget} in a bucket of {}", config.size)
        } else if *burst > config.one_time_burst {
            format!("{burst} left of a burst of {}", config.one_time_burst)
        } else if *debt > 0 && *budget > 0 {
            format!("a debt of {debt} beside a budget of {budget}")
        } else if *fraction >= self.refill_ns() || (*fraction > 0 && *budget == config.size) {
            format!("a fraction of {fraction} at a budget of {budget}")
        } else {
            return Ok(());
        };
        Err(PersistError::invalid(kind, field, why))
    }

    /// Takes over a checked state, as of its last refill. The time that the machine was away is
    /// credited by [`credit_away`](Self::credit_away).
    pub fn apply(&mut self, state: BucketState) {
        let BucketState { config, budget, burst, debt, fraction, refilled_wall_ns } = state;
        self.config = config;
        (self.budget, self.burst, self.debt, self.fraction) = (budget, burst, debt, fraction);
        self.refilled_ns = self.clock.monotonic_ns();
        self.refilled_wall_ns = refilled_wall_ns;
    }

    /// Credits the wall time since the last refill: nothing if the clock went back, one full bucket at
    /// most, and never the one-time burst.
    pub fn credit_away(&mut self) {
        let wall = self.clock.wall_ns();
        let away = wall.saturating_sub(self.refilled_wall_ns);
        self.refilled_wall_ns = wall;
        self.refilled_ns = self.clock.monotonic_ns();
        self.credit(away);
    }
}

/// A bucket's saved form, a part of a device's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BucketState {
    /// Size and speed.
    pub config: BucketConfig,
    /// Tokens in the bucket.
    pub budget: u64,
    /// What is left of the one-time burst.
    pub burst: u64,
    /// Tokens that were taken beyond an empty bucket.
    pub debt: u64,
    /// Part of the next token, in tokens * ns.
    pub fraction: u64,
    /// Wall time of the last refill, ns since 1970.
    pub refilled_wall_ns: u64,
}

/// Limits of a device; a missing one is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RateLimiterConfig {
    /// Bytes.
    pub bandwidth: Option<BucketConfig>,
    /// Requests.
    pub ops: Option<BucketConfig>,
}

/// The two buckets of a device.
pub struct RateLimiter {
    bandwidth: Option<TokenBucket>,
    ops: Option<TokenBucket>,
    /// A state was taken over, and the time away from then is not credited yet.
    restored: bool,
}

impl RateLimiter {
    /// Full buckets.
    pub fn new(config: &RateLimiterConfig, clock: &Arc<dyn Clock>) -> Result<Self, BucketError> {
        let bucket = |config: Option<BucketConfig>| {
            config.map(|config| TokenBucket::new(config, clock.clone())).transpose()
        };
        let RateLimiterConfig { bandwidth, ops } = *config;
        Ok(Self { bandwidth: bucket(bandwidth)?, ops: bucket(ops)?, restored: false })
    }

    /// Lets one request of `bytes` pass, or says how long to wait before asking again.
    pub fn take(&mut self, bytes: u64) -> Result<(), Duration> {
        for (bucket, tokens) in [(&mut self.bandwidth, bytes), (&mut self.ops, 1)] {
            if let Some(bucket) = bucket {
                bucket.ready(tokens)?;
            }
        }
        for (bucket, tokens) in [(&mut self.bandwidth, bytes), (&mut self.ops, 1)] {
            if let Some(bucket) = bucket {
                bucket.take(tokens)?;
            }
        }
        Ok(())
    }

    /// Credits the time that the machine was away, once after a restore.
    pub fn resume(&mut self) {
        if std::mem::take(&mut self.restored) {
            self.buckets().for_each(TokenBucket::credit_away);
        }
    }

    fn buckets(&mut self) -> impl Iterator<Item = &mut TokenBucket> {
        self.bandwidth.iter_mut().chain(&mut self.ops)
    }

    /// The saved form.
    pub fn save(&self) -> RateLimiterState {
        let Self { bandwidth, ops, restored: _ } = self;
        let state = |bucket: &Option<TokenBucket>| bucket.as_ref().map(TokenBucket::save);
        RateLimiterState { bandwidth: state(bandwidth), ops: state(ops) }
    }

    /// Checks `state` for this limiter; `kind` names the device in the error.
    pub fn check(&self, kind: &'static str, state: &RateLimiterState) -> Result<(), PersistError> {
        let RateLimiterState { bandwidth, ops } = state;
        for (field, bucket, state) in [
            ("rate_limiter.bandwidth", &self.bandwidth, bandwidth),
            ("rate_limiter.ops", &self.ops, ops),
        ] {
            match (bucket, state) {
                (Some(bucket), Some(state)) => bucket.check(kind, field, state)?,
                (None, None) => {}
                (Some(_), None) => {
                    let why = "the machine has this limit, the snapshot does not";
                    return Err(PersistError::invalid(kind, field, why));
                }
                (None, Some(_)) => {
                    let why = "the snapshot has this limit, the machine does not";
                    return Err(PersistError::invalid(kind, field, why));
                }
            }
        }
        Ok(())
    }

    /// Takes over a checked state.
    pub fn apply(&mut self, state: RateLimiterState) {
        let RateLimiterState { bandwidth, ops } = state;
        for (bucket, state) in [(&mut self.bandwidth, bandwidth), (&mut self.ops, ops)] {
            if let (Some(bucket), Some(state)) = (bucket, state) {
                bucket.apply(state);
            }
        }
        self.restored = true;
    }
}

/// A limiter's saved form, a part of a device's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateLimiterState {
    /// Bytes.
    pub bandwidth: Option<BucketState>,
    /// Requests.
    pub ops: Option<BucketState>,
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use proptest::prelude::*;

    use super::*;
    use crate::virtio::test_driver::ManualClock;

    const SECOND: u64 = 1_000_000_000;

    fn config(size: u64, one_time_burst: u64, refill_time_ms: u64) -> BucketConfig {
        BucketConfig { size, one_time_burst, refill_time_ms }
    }

    fn bucket(config: BucketConfig, clock: &Arc<ManualClock>) -> TokenBucket {
        TokenBucket::new(config, clock.clone()).unwrap()
    }

    /// A bucket on another machine that takes over `state` when its clocks show these times.
    fn restored(state: BucketState, monotonic: u64, wall: u64) -> (TokenBucket, Arc<ManualClock>) {
        let clock = ManualClock::new(monotonic, wall);
        let mut bucket = bucket(state.config, &clock);
        bucket.check("test", "bucket", &state).unwrap();
        bucket.apply(state);
        assert_eq!(bucket.save(), state);
        bucket.credit_away();
        (bucket, clock)
    }

    #[test]
    fn a_bucket_that_cannot_work_is_refused() {
        let new = |config| TokenBucket::new(config, ManualClock::new(0, 0)).err();
        assert_eq!(new(config(0, 5, 5)), Some(BucketError::Size));
        assert_eq!(new(config(5, 5, 0)), Some(BucketError::RefillTime(0)));
        let long = MAX_REFILL_MS + 1;
        assert_eq!(new(config(5, 5, long)), Some(BucketError::RefillTime(long)));
        assert_eq!(new(config(u64::MAX, u64::MAX, MAX_REFILL_MS)), None);
    }

    #[test]
    fn the_burst_is_spent_first_and_never_comes_back() {
        let clock = ManualClock::new(0, 0);
        let mut bucket = bucket(config(10, 5, 1000), &clock);
        assert_eq!(bucket.available(), 15);
        bucket.take(7).unwrap();
        assert_eq!((bucket.burst, bucket.budget), (0, 8));
        clock.advance(Duration::from_secs(100));
        assert_eq!(bucket.available(), 10);
    }

    #[test]
    fn an_empty_bucket_says_exactly_how_long_to_wait() {
        let clock = ManualClock::new(0, 0);
        let mut bucket = bucket(config(3, 0, 1000), &clock);
        bucket.take(3).unwrap();
        let wait = bucket.take(1).unwrap_err();
        assert_eq!(wait, Duration::from_nanos(333_333_334));
        clock.advance(wait - Duration::from_nanos(1));
        assert_eq!(bucket.take(1), Err(Duration::from_nanos(1)));
        clock.advance(Duration::from_nanos(1));
        bucket.take(1).unwrap();
        assert!(bucket.take(1).is_err());
    }

    #[test]
    fn a_demand_above_the_size_passes_a_full_bucket_and_is_paid_off() {
        let clock = ManualClock::new(0, 0);
        let mut bucket = bucket(config(10, 0, 1000), &clock);
        bucket.take(35).unwrap();
        assert_eq!(bucket.take(1), Err(Duration::from_millis(2600)));
        clock.advance(Duration::from_millis(2500));
        assert_eq!(bucket.available(), 0);
        clock.advance(Duration::from_millis(100));
        bucket.take(1).unwrap();
    }

    #[test]
    fn time_away_is_credited_up_to_a_full_bucket_without_the_burst() {
        let clock = ManualClock::new(5 * SECOND, 1000 * SECOND);
        let mut bucket = bucket(config(10, 4, 1000), &clock);
        bucket.take(14).unwrap();
        let state = bucket.save();
        let (mut half, _) = restored(state, 7, 1000 * SECOND + SECOND / 2);
        assert_eq!(half.available(), 5);
        let (mut long, clock) = restored(state, 7, 5000 * SECOND);
        assert_eq!(long.available(), 10);
        clock.advance(Duration::from_secs(9));
        assert_eq!(long.available(), 10);
    }

    #[test]
    fn a_wall_clock_that_went_back_credits_nothing_and_the_refill_goes_on() {
        let clock = ManualClock::new(5 * SECOND, 1000 * SECOND);
        let mut bucket = bucket(config(10, 4, 1000), &clock);
        bucket.take(14).unwrap();
        let (mut back, clock) = restored(bucket.save(), u64::MAX / 2, 3);
        assert_eq!(back.available(), 0);
        clock.advance(Duration::from_millis(300));
        assert_eq!(back.available(), 3);
    }

    #[test]
    fn a_state_of_another_bucket_or_out_of_range_is_refused() {
        let clock = ManualClock::new(0, 0);
        let bucket = bucket(config(10, 4, 1000), &clock);
        let good = bucket.save();
        for bad in [
            BucketState { config: config(11, 4, 1000), ..good },
            BucketState { budget: 11, ..good },
            BucketState { burst: 5, ..good },
            BucketState { debt: 1, ..good },
            BucketState { fraction: 1, ..good },
            BucketState { budget: 0, fraction: SECOND, ..good },
        ] {
            assert!(bucket.check("test", "bucket", &bad).is_err(), "{bad:?}");
        }
        bucket.check("test", "bucket", &BucketState { budget: 0, debt: u64::MAX, ..good }).unwrap();
    }

    #[test]
    fn a_request_that_one_limit_holds_back_costs_the_other_nothing() {
        let clock = ManualClock::new(0, 0);
        let limits = RateLimiterConfig {
            bandwidth: Some(config(1000, 0, 1000)),
            ops: Some(config(5, 2, 1_000_000)),
        };
        let mut limiter = RateLimiter::new(&limits, &(clock.clone() as Arc<dyn Clock>)).unwrap();
        limiter.take(1000).unwrap();
        let before = limiter.save().ops;
        for _ in 0..10 {
            limiter.take(1).unwrap_err();
        }
        assert_eq!(limiter.save().ops, before);
    }

    #[test]
    fn a_limit_on_one_side_only_is_refused() {
        let clock: Arc<dyn Clock> = ManualClock::new(0, 0);
        let ops = Some(config(5, 2, 1000));
        let with = RateLimiter::new(&RateLimiterConfig { bandwidth: None, ops }, &clock).unwrap();
        let without = RateLimiter::new(&RateLimiterConfig::default(), &clock).unwrap();
        assert!(without.check("test", &with.save()).is_err());
        assert!(with.check("test", &without.save()).is_err());
        with.check("test", &with.save()).unwrap();
    }

    /// What happens to a bucket: time passes, or somebody asks.
    #[derive(Clone, Debug)]
    enum Step {
        Pass(u64),
        Take(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..3 * SECOND).prop_map(Step::Pass),
            any::<u64>().prop_map(Step::Pass),
            (0u64..200).prop_map(Step::Take),
            any::<u64>().prop_map(Step::Take),
        ]
    }

    proptest! {
        #[test]
        fn no_more_passes_than_bucket_burst_and_time_allow(
            size in 1u64..100,
            burst in 0u64..50,
            refill_ms in 1u64..5000,
            steps in prop::collection::vec((0..SECOND, 0u64..150), 1..80),
        ) {
            let clock = ManualClock::new(0, 0);
            let mut bucket = bucket(config(size, burst, refill_ms), &clock);
            let mut passed = 0u128;
            for (pause, tokens) in steps {
                clock.advance(Duration::from_nanos(pause));
                if bucket.take(tokens).is_ok() {
                    passed += u128::from(tokens);
                }
                let now = u128::from(clock.monotonic_ns());
                let earned = now * u128::from(size) / (u128::from(refill_ms) * 1_000_000);
                // A debt is what was taken ahead of its time.
                let allowed = u128::from(size + burst) + earned + u128::from(bucket.debt);
                prop_assert!(passed <= allowed, "{passed} of {allowed}");
            }
        }

        #[test]
        fn after_the_wait_that_was_asked_for_a_demand_passes(
            size in 1u64.., burst in any::<u64>(), refill_ms in 1..=MAX_REFILL_MS,
            first in any::<u64>(), second in any::<u64>(),
        ) {
            let clock = ManualClock::new(0, 0);
            let mut bucket = bucket(config(size, burst, refill_ms), &clock);
            bucket.take(first).unwrap();
            if let Err(wait) = bucket.take(second)
                && wait < Duration::from_nanos(u64::MAX)
            {
                clock.monotonic.store(wait.as_nanos() as u64, Ordering::SeqCst);
                prop_assert_eq!(bucket.take(second), Ok(()));
            }
        }

        #[test]
        fn a_restored_bucket_answers_as_the_one_that_stayed(
            size in 1u64.., burst in any::<u64>(), refill_ms in 1..=MAX_REFILL_MS,
            before in prop::collection::vec(step(), 0..20),
            away in 0..10 * SECOND,
            after in prop::collection::vec(step(), 0..20),
        ) {
            let clock = ManualClock::new(77, 1 << 60);
            let mut stayed = bucket(config(size, burst, refill_ms), &clock);
            let run = |bucket: &mut TokenBucket, clock: &ManualClock, steps: &[Step]| {
                let mut answers = Vec::new();
                for step in steps {
                    match *step {
                        Step::Pass(ns) => clock.advance(Duration::from_nanos(ns >> 20)),
                        Step::Take(tokens) => answers.push(bucket.take(tokens)),
                    }
                }
                answers
            };
            run(&mut stayed, &clock, &before);
            stayed.refill();
            let state = stayed.save();
            clock.advance(Duration::from_nanos(away));
            let wall = clock.wall_ns();
            let (mut restored, other) = restored(state, 3, wall);
            prop_assert_eq!(
                run(&mut restored, &other, &after),
                run(&mut stayed, &clock, &after)
            );
            stayed.refill();
            restored.refill();
            prop_assert_eq!(stayed.save(), restored.save());
        }

        #[test]
        fn any_state_that_is_taken_over_works_on(
            size in 1u64.., burst in any::<u64>(), refill_ms in 1..=MAX_REFILL_MS,
            fields in any::<[u64; 5]>(),
            steps in prop::collection::vec(step(), 0..20),
        ) {
            let config = config(size, burst, refill_ms);
            let [budget, left, debt, fraction, refilled_wall_ns] = fields;
            let state =
                BucketState { config, budget, burst: left, debt, fraction, refilled_wall_ns };
            let clock = ManualClock::new(0, 1 << 60);
            let mut bucket = bucket(config, &clock);
            if bucket.check("test", "bucket", &state).is_ok() {
                bucket.apply(state);
                bucket.credit_away();
            }
            for step in steps {
                match step {
                    Step::Pass(ns) => {
                        clock.monotonic.fetch_add(ns, Ordering::SeqCst);
                    }
                    Step::Take(tokens) => drop(bucket.take(tokens)),
                }
                prop_assert!(bucket.budget <= size && bucket.burst <= burst);
                bucket.check("test", "bucket", &bucket.save()).unwrap();
            }
        }
    }
}
