#![no_main]

// The tests of `squib-tests` do the same.
#[path = "../../tests/src/hostile.rs"]
mod hostile;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    hostile::restore(bytes);
});
