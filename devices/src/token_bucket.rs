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
