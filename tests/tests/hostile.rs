//! Sections with right digests and wrong values, in a machine whose guest then drives every device.

use proptest::prelude::*;
use squib_tests::hostile::{Became, restore, sections};

#[test]
fn a_state_that_nobody_changed_runs() {
    assert_eq!(restore(&[]), Became::Ran);
}

#[test]
fn every_byte_of_every_section_at_its_least_and_greatest_is_refused_by_name_or_runs() {
    let (mut refused, mut ran) = (0, 0);
    let sections = sections();
    for (number, (kind, len)) in sections.iter().enumerate() {
        // All of a small section, and a stride through a large one.
        for at in (0..*len).step_by(len.div_ceil(48)) {
            for value in [0, 0xff] {
                let [low, high] = (at as u16).to_le_bytes();
                match restore(&[number as u8, low, high, value]) {
                    Became::Ran => ran += 1,
                    Became::Refused(error) => {
                        // Its own, or one that it no longer fits to.
                        let named = sections.iter().any(|(kind, _)| error.contains(&**kind));
                        assert!(named, "{kind} at {at}: {error}");
                        refused += 1;
                    }
                }
            }
        }
    }
    assert!(refused > 50 && ran > 50, "{refused} refused, {ran} ran");
}

#[test]
fn what_fuzzing_has_found_is_refused_or_runs() {
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus/restore");
    let mut entries = 0;
    for entry in std::fs::read_dir(corpus).unwrap() {
        restore(&std::fs::read(entry.unwrap().path()).unwrap());
        entries += 1;
    }
    assert!(entries > 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_changes_are_refused_or_run(
        changes in prop::collection::vec(
            (any::<u8>(), any::<u16>(), prop_oneof![Just(0u8), Just(1), Just(0xff), any::<u8>()]),
            1..12,
        ),
        clone in any::<bool>(),
    ) {
        let mut bytes: Vec<u8> = changes
            .into_iter()
            .flat_map(|(section, at, value)| {
                let [low, high] = at.to_le_bytes();
                [section, low, high, value]
            })
            .collect();
        if clone {
            bytes.push(0);
        }
        restore(&bytes);
    }
}
