//! Cases by hand, and one vector of every instruction and arrangement, recorded from QEMU.

use crate::testing::{State, execute_data};

#[test]
fn every_instruction_gives_what_qemu_gives() {
    assert!(crate::simd::vectors::check(include_str!("vectors.txt")) > 500);
}

#[test]
fn what_is_not_advertised_is_unallocated() {
    let words = [
        (0x7e80_8400, "sqrdmlah s0, s0, s0"),
        (0x2e80_8400, "sqrdmlah v0.2s, v0.2s, v0.2s"),
        (0x2f40_d000, "sqrdmlah v0.4h, v0.4h, v0.h[0]"),
        (0x4e80_9400, "sdot v0.4s, v0.16b, v0.16b"),
        (0x6f80_e000, "udot v0.4s, v0.16b, v0.4b[0]"),
        (0x4e40_1400, "fadd v0.8h, v0.8h, v0.8h"),
        (0x0f00_fc00, "fmov v0.4h, #2.0"),
        (0xce60_8000, "sha512h q0, q0, v0.2d"),
        (0xce00_0000, "eor3 v0.16b, v0.16b, v0.16b, v0.16b"),
        (0x0ee1_8400, "add with size 3 and Q 0"),
        (0x4ef2_9c00, "mul with size 3"),
        (0x6f00_fc00, "cmode 1111, op 1, o2 1"),
        (0x2f00_f400, "fmov double with Q 0"),
        (0x2e00_4000, "ext of 64 bits from byte 8"),
        (0x4e68_4800, "aese with size 1"),
        (0x5e40_0000, "sha1c with size 1"),
    ];
    for (word, what) in words {
        assert!(super::decode(word).is_none(), "{word:#010x} {what}");
    }
}

/// FIPS 197, appendix B: the first round.
#[test]
fn aese_and_aesmc_make_an_aes_round() {
    let bytes = |text: &str| u128::from_str_radix(text, 16).expect("hexadecimal").swap_bytes();
    let mut state = State::default();
    state.v[0] = bytes("3243f6a8885a308d313198a2e0370734");
    state.v[1] = bytes("2b7e151628aed2a6abf7158809cf4f3c");
    assert!(execute_data(0x4e28_4820, &mut state));
    assert_eq!(state.v[0], bytes("d4bf5d30e0b452aeb84111f11e2798e5"));
    assert!(execute_data(0x4e28_6800, &mut state));
    assert_eq!(state.v[0], bytes("046681e5e0cb199a48f8d37a2806264c"));
    assert!(execute_data(0x4e28_7800, &mut state));
    assert_eq!(state.v[0], bytes("d4bf5d30e0b452aeb84111f11e2798e5"));
}
