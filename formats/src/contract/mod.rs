//! The tests that every [`Persist`] type must pass, as functions over the trait and as one macro,
//! [`persist_contract!`](crate::persist_contract), that turns them into named tests.
//!
//! Behind the cargo feature `contract`; other crates switch it on in their dev-dependencies:
//!
//! ```toml
//! [dev-dependencies]
//! squib-formats = { workspace = true, features = ["contract"] }
//! ```

mod fields;

use serde::Serialize;

use crate::persist::{self, Persist, PersistError, Section, Versioned};

pub use fields::{Field, Role, fields, length};

/// Positions of a payload at which single bits and bytes are damaged. A longer payload is sampled at about this
/// many positions, evenly and always the same ones, so that a test of the largest state ends in seconds.
/// Truncations and whole fields are never sampled.
pub const MOST_POSITIONS: usize = 3000;

/// Generates a module of tests that hold a [`Persist`] type to the contract.
///
/// - `device`: the type.
/// - `fresh`: a closure without captures that makes a device in its reset state, able to be saved
///   (a device that needs a pause first is returned paused).
/// - `change`: a closure without captures that uses the device, so that its state differs from the
///   reset state in as many fields as can be reached, and leaves it able to be saved.
///
/// ```
/// # use serde::{Deserialize, Serialize};
/// # use squib_formats::persist::{Persist, PersistError};
/// # pub struct Counter { value: u32 }
/// # #[derive(Serialize, Deserialize)]
/// # pub struct CounterState { value: u32 }
/// # squib_formats::first_version!(CounterState, "counter");
/// # impl Persist for Counter {
/// #     type State = CounterState;
/// #     fn save(&self) -> Result<CounterState, PersistError> {
/// #         let Self { value } = self;
/// #         Ok(CounterState { value: *value })
/// #     }
/// #     fn restore(&mut self, state: CounterState) -> Result<(), PersistError> {
/// #         let CounterState { value } = state;
/// #         self.value = value;
/// #         Ok(())
/// #     }
/// # }
/// squib_formats::persist_contract! {
///     mod counter_contract,
///     device: Counter,
///     fresh: || Counter { value: 0 },
///     change: |counter| counter.value += 1,
/// }
/// # fn main() {}
/// ```
#[macro_export]
macro_rules! persist_contract {
    (
        mod $name:ident,
        device: $device:ty,
        fresh: $fresh:expr,
        change: $change:expr $(,)?
    ) => {
        #[cfg(test)]
        mod $name {
            #[allow(
                unused_imports,
                reason = "the closures may name nothing of the parent module"
            )]
            use super::*;

            fn fresh() -> $device {
                let fresh: fn() -> $device = $fresh;
                fresh()
            }

            fn change(device: &mut $device) {
                let change: fn(&mut $device) = $change;
                change(device)
            }

            #[test]
            fn saving_twice_gives_equal_bytes() {
                $crate::contract::saving_twice_gives_equal_bytes(fresh, change);
            }

            #[test]
            fn a_restored_device_saves_equal_bytes() {
                $crate::contract::a_restored_device_saves_equal_bytes(fresh, change);
            }

            #[test]
            fn a_changed_device_saves_different_bytes() {
                $crate::contract::a_changed_device_saves_different_bytes(fresh, change);
            }

            #[test]
            fn wrong_kind_version_or_length_is_refused() {
                $crate::contract::wrong_kind_version_or_length_is_refused(fresh, change);
            }

            #[test]
            fn a_damaged_payload_restores_whole_or_changes_nothing() {
                $crate::contract::a_damaged_payload_restores_whole_or_changes_nothing(
                    fresh, change,
                );
            }

            #[test]
            fn every_field_at_its_extremes_restores_whole_or_changes_nothing() {
                $crate::contract::every_field_at_its_extremes_restores_whole_or_changes_nothing(
                    fresh, change,
                );
            }

            #[test]
            fn whatever_it_takes_over_it_saves_and_takes_over_again() {
                $crate::contract::whatever_it_takes_over_it_saves_and_takes_over_again(
                    fresh, change,
                );
            }
        }
    };
}

/// Two saves in a row give equal bytes, for a fresh and for a changed device.
pub fn saving_twice_gives_equal_bytes<P: Persist>(fresh: impl Fn() -> P, change: impl Fn(&mut P)) {
    let mut device = fresh();
    assert_eq!(save(&device), save(&device), "a fresh device");
    change(&mut device);
    assert_eq!(save(&device), save(&device), "a changed device");
}

/// A state restored into a fresh device, and the reset state restored into a changed one, save as
/// the bytes they were restored from.
pub fn a_restored_device_saves_equal_bytes<P: Persist>(
    fresh: impl Fn() -> P,
    change: impl Fn(&mut P),
) {
    let (reset, changed) = reset_and_changed(&fresh, &change);
    let mut device = fresh();
    restore(&mut device, &changed).expect("a fresh device takes over a saved state");
    assert_eq!(save(&device), changed);
    restore(&mut device, &reset).expect("a used device takes over a saved state");
    assert_eq!(save(&device), reset, "something of the earlier state was left behind");
}

/// Every fresh device saves the same bytes, and a changed device different ones.
pub fn a_changed_device_saves_different_bytes<P: Persist>(
    fresh: impl Fn() -> P,
    change: impl Fn(&mut P),
) {
    let (reset, changed) = reset_and_changed(&fresh, &change);
    assert_eq!(save(&fresh()), reset, "two fresh devices");
    assert_ne!(changed, reset, "the change is not part of the saved state");
}

/// A section of another kind or of an unknown version, one cut at any place, and one with bytes left
/// over are refused, and a refusal changes nothing.
pub fn wrong_kind_version_or_length_is_refused<P: Persist>(
    fresh: impl Fn() -> P,
    change: impl Fn(&mut P),
) {
    let (reset, changed) = reset_and_changed(&fresh, &change);
    let mut device = fresh();
    let mut refused = |what: String, section: &Section| {
        let _now = Trying(what);
        let error = restore(&mut device, section).expect_err("must be refused");
        assert_named(&error);
        assert_eq!(save(&device), reset, "a refused restore changed the device");
        error
    };

    let mut wrong = Section { kind: format!("{}-not", P::State::KIND), ..changed.clone() };
    refused("a wrong kind".to_owned(), &wrong);
    wrong.kind = changed.kind.clone();
    for version in [0, P::State::VERSION + 1, u16::MAX] {
        wrong.version = version;
        let error = refused(format!("version {version}"), &wrong);
        assert!(matches!(error, PersistError::UnknownVersion { found, .. } if found == version));
    }
    wrong.version = changed.version;
    for len in 0..changed.payload.len() {
        wrong.payload = changed.payload[..len].to_vec();
        refused(format!("the payload cut to {len} bytes"), &wrong);
    }
    wrong.payload = [&changed.payload[..], &[0]].concat();
    refused("one byte left over".to_owned(), &wrong);
}

/// Every byte, and every run of 2, 4 and 8 bytes, set to its least and greatest values (unsigned and
/// signed), and every bit flipped: the state is refused by name and nothing changes, or it is
/// taken over, and then it can be saved and restored again like any other.
pub fn a_damaged_payload_restores_whole_or_changes_nothing<P: Persist>(
    fresh: impl Fn() -> P,
    change: impl Fn(&mut P),
) {
    let (_, good) = reset_and_changed(&fresh, &change);
    let mut device = fresh();
    restore(&mut device, &good).expect("a fresh device takes over a saved state");
    for damage in damages(good.payload.len()) {
        let _now = Trying(format!("{damage:x?} in a payload of {} bytes", good.payload.len()));
        let mut section = good.clone();
        damage.apply(&mut section.payload);
        if section == good {
            continue;
        }
        attempt(&mut device, &good, &section);
    }
}

/// Every field of the reset state and of a changed one, by itself, at its least and greatest value (unsigned and
/// signed), at those beside them and at those beside its own: refused by name, or taken over and saved.
pub fn every_field_at_its_extremes_restores_whole_or_changes_nothing<P: Persist>(
    fresh: impl Fn() -> P,
    change: impl Fn(&mut P),
) where
    P::State: Serialize,
{
    let (reset, changed) = reset_and_changed(&fresh, &change);
    for good in [reset, changed] {
        let mut device = fresh();
        restore(&mut device, &good).expect("a fresh device takes over a saved state");
        let state: P::State = good.decode().expect("a saved state decodes");
        assert_eq!(length(&state), good.payload.len(), "fields are looked for in other places");
        for field in fields(&state) {
            for (value, payload) in field.extremes(&good.payload) {
                let _now = Trying(format!("{} = {value:#x}", field.path));
                attempt(&mut device, &good, &Section { payload, ..good.clone() });
            }
        }
    }
}

/// States that differ from a good one in many fields at once, at their extremes and in between: of those that
/// the device takes over, each is saved, and what is saved is taken over by a fresh device and saved as it was.
pub fn whatever_it_takes_over_it_saves_and_takes_over_again<P: Persist>(
    fresh: impl Fn() -> P,
    change: impl Fn(&mut P),
) where
    P::State: Serialize,
{
    const TRIES: u64 = 400;
    let (_, good) = reset_and_changed(&fresh, &change);
    let state: P::State = good.decode().expect("a saved state decodes");
    let numbers: Vec<Field> =
        fields(&state).into_iter().filter(|field| field.role == Role::Number).collect();
    let mut random = Random(1);
    let mut device = fresh();
    for _ in 0..TRIES {
        restore(&mut device, &good).expect("the good state restores after a strange one");
        let (mut taken, mut steps) = (good.clone(), Vec::new());
        // A state is reached by changes each of which the device takes, so that most are legal.
        for _ in 0..8 {
            let field = &numbers[random.below(numbers.len())];
            let mut next = taken.clone();
            let value = match field.extremes(&taken.payload) {
                extremes if random.below(2) == 0 && !extremes.is_empty() => {
                    let (value, payload) = &extremes[random.below(extremes.len())];
                    next.payload.clone_from(payload);
                    *value
                }
                _ => {
                    let value = u128::from(random.next()) << 64 | u128::from(random.next());
                    let bytes = &value.to_le_bytes()[..field.width];
                    next.payload[field.offset..field.offset + field.width].copy_from_slice(bytes);
                    value
                }
            };
            if restore(&mut device, &next).is_ok() {
                steps.push(format!("{} = {value:#x}", field.path));
                taken = next;
            }
        }
        let _now = Trying(steps.join(", "));
        let saved = save(&device);
        let mut second = fresh();
        restore(&mut second, &saved).expect("what was taken over and saved restores");
        assert_eq!(save(&second), saved);
    }
}

/// Tries `section` on a device in the state `good`: it is refused by name and nothing changes, or taken over,
/// and then it can be saved and restored again like any other.
fn attempt<P: Persist>(device: &mut P, good: &Section, section: &Section) {
    match restore(device, section) {
        Err(error) => {
            assert_named(&error);
            assert_eq!(save(device), *good, "a refused restore changed the device");
        }
        Ok(()) => {
            let taken = save(device);
            restore(device, &taken).expect("what was taken over and saved restores");
            assert_eq!(save(device), taken);
            restore(device, good).expect("the good state restores after a strange one");
            assert_eq!(save(device), *good, "something of the strange state was left behind");
        }
    }
}

/// Numbers that are the same in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        self.0.rotate_left(32) ^ self.0
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() >> 33) as usize % end
    }
}

/// One damage to a payload.
#[derive(Clone, Copy, Debug)]
enum Damage {
    /// The bit of the byte at the offset is flipped.
    Flip { offset: usize, bit: u8 },
    /// The bytes from the offset on are all `fill`, the last one `top`: little-endian extremes.
    Set { offset: usize, width: usize, fill: u8, top: u8 },
}

impl Damage {
    fn apply(self, payload: &mut [u8]) {
        match self {
            Self::Flip { offset, bit } => payload[offset] ^= 1 << bit,
            Self::Set { offset, width, fill, top } => {
                payload[offset..offset + width].fill(fill);
                payload[offset + width - 1] = top;
            }
        }
    }
}

fn damages(len: usize) -> impl Iterator<Item = Damage> {
    positions(len).flat_map(move |offset| {
        let flips = (0..8).map(move |bit| Damage::Flip { offset, bit });
        let widths = [1, 2, 4, 8].into_iter().filter(move |width| offset + width <= len);
        let sets = widths.flat_map(move |width| {
            [(0x00, 0x00), (0xff, 0xff), (0xff, 0x7f), (0x00, 0x80)]
                .map(|(fill, top)| Damage::Set { offset, width, fill, top })
        });
        flips.chain(sets)
    })
}

/// All positions of a payload of `len` bytes, or a sample of them. The stride is odd, so that fields
/// of every alignment are met.
fn positions(len: usize) -> impl Iterator<Item = usize> {
    (0..len).step_by(len.div_ceil(MOST_POSITIONS) | 1)
}

fn reset_and_changed<P: Persist>(
    fresh: impl Fn() -> P,
    change: impl Fn(&mut P),
) -> (Section, Section) {
    let mut device = fresh();
    let reset = save(&device);
    change(&mut device);
    (reset, save(&device))
}

fn save<P: Persist>(device: &P) -> Section {
    persist::save_section("0", device).expect("a device at rest saves")
}

fn restore<P: Persist>(device: &mut P, section: &Section) -> Result<(), PersistError> {
    persist::restore_section(device, section)
}

fn assert_named(error: &PersistError) {
    let (kind, what) = match error {
        PersistError::UnknownVersion { kind, .. } | PersistError::LeftOver { kind, .. } => {
            (kind, "the variant says it")
        }
        PersistError::Decode { kind, why, .. } | PersistError::Save { kind, why } => {
            (kind, why.as_str())
        }
        PersistError::Invalid { kind, field, why } => {
            assert!(!field.is_empty(), "{error} names no field");
            (kind, why.as_str())
        }
    };
    assert!(!kind.is_empty() && !what.is_empty(), "{error} does not say what is wrong");
}

/// Says what was being tried if a panic passes by.
struct Trying(String);

impl Drop for Trying {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("while trying: {}", self.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use serde::{Deserialize, Serialize};

    use super::*;

    /// A value and a level of at most four; `fault` makes it break the contract in one way.
    #[derive(Default)]
    struct Latch {
        value: u32,
        level: u8,
        fault: Fault,
    }

    #[derive(Default, Clone, Copy, PartialEq)]
    enum Fault {
        #[default]
        None,
        TakesAnyLevel,
        ChangesBeforeItChecks,
        KeepsOldValue,
        SavesNoValue,
        SavesMoreThanItTakes,
    }

    #[derive(Serialize, Deserialize)]
    struct LatchState {
        value: u32,
        level: u8,
    }

    crate::first_version!(LatchState, "latch");

    impl Persist for Latch {
        type State = LatchState;

        fn save(&self) -> Result<LatchState, PersistError> {
            let Self { value, level, fault } = self;
            assert!(*level <= 4, "a latch at level {level}");
            let value = if *fault == Fault::SavesNoValue { 0 } else { *value };
            let above = *fault == Fault::SavesMoreThanItTakes && *level == 1;
            Ok(LatchState { value, level: level + 4 * u8::from(above) })
        }

        fn restore(&mut self, state: LatchState) -> Result<(), PersistError> {
            let LatchState { value, level } = state;
            if self.fault == Fault::ChangesBeforeItChecks {
                self.value = value;
            }
            if level > 4 && self.fault != Fault::TakesAnyLevel {
                return Err(PersistError::invalid("latch", "level", format!("{level} is above 4")));
            }
            self.value =
                if self.fault == Fault::KeepsOldValue { self.value | value } else { value };
            self.level = level;
            Ok(())
        }
    }

    crate::persist_contract! {
        mod latch_contract,
        device: Latch,
        fresh: Latch::default,
        change: |latch| (latch.value, latch.level) = (0x1234_5678, 3),
    }

    #[test]
    fn a_device_that_breaks_the_contract_is_found_out() {
        type Test = fn(&dyn Fn() -> Latch, &dyn Fn(&mut Latch));
        let breaks = |fault, test: Test| {
            let fresh = || Latch { fault, ..Latch::default() };
            let change = |latch: &mut Latch| latch.value = 7;
            catch_unwind(AssertUnwindSafe(|| test(&fresh, &change))).is_err()
        };
        assert!(breaks(Fault::TakesAnyLevel, |fresh, change| {
            a_damaged_payload_restores_whole_or_changes_nothing(fresh, change)
        }));
        assert!(breaks(Fault::ChangesBeforeItChecks, |fresh, change| {
            // The last byte is the level, so a run of bytes that reaches it changes both fields.
            a_damaged_payload_restores_whole_or_changes_nothing(fresh, change)
        }));
        assert!(breaks(Fault::KeepsOldValue, |fresh, change| {
            a_restored_device_saves_equal_bytes(fresh, change)
        }));
        assert!(breaks(Fault::TakesAnyLevel, |fresh, change| {
            every_field_at_its_extremes_restores_whole_or_changes_nothing(fresh, change)
        }));
        assert!(breaks(Fault::KeepsOldValue, |fresh, change| {
            every_field_at_its_extremes_restores_whole_or_changes_nothing(fresh, change)
        }));
        assert!(breaks(Fault::SavesMoreThanItTakes, |fresh, change| {
            whatever_it_takes_over_it_saves_and_takes_over_again(fresh, change)
        }));
        assert!(breaks(Fault::SavesNoValue, |fresh, change| {
            a_changed_device_saves_different_bytes(fresh, change)
        }));
    }
}
