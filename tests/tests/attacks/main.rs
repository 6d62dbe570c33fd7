//! Snapshots of a hostile writer, who puts the right digests in: whatever a field says, `check` answers as
//! `restore` does, nothing panics or hangs, and what is restored can be saved and restored again.
//!
//! The tests take the fields of which there are many of a kind (registers, interrupts) in samples; all of them:
//! `cargo test -p squib-tests --test attacks -- --ignored`.

mod manifests;
mod parts;
mod saved;
mod target;

use squib_formats::contract::Field;

/// How many fields of one kind are attacked.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Extent {
    /// The first two and the last.
    Sample,
    All,
}

impl Extent {
    /// The fields to attack.
    fn of(self, fields: Vec<Field>) -> Vec<Field> {
        if self == Self::All {
            return fields;
        }
        let kind = |field: &Field| field.path.replace(|c: char| c.is_ascii_digit(), "");
        let kinds: Vec<String> = fields.iter().map(kind).collect();
        let keep = |at: usize| {
            let before = kinds[..at].iter().filter(|other| **other == kinds[at]).count();
            before < 2 || !kinds[at + 1..].contains(&kinds[at])
        };
        let kept: Vec<bool> = (0..fields.len()).map(keep).collect();
        fields.into_iter().zip(kept).filter_map(|(field, keep)| keep.then_some(field)).collect()
    }
}
