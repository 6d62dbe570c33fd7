//! Cases by hand, and one vector of every instruction and arrangement, recorded from QEMU.

use crate::testing::{State, execute_data};

/// Sets `name=value` in hexadecimal: `v3`, `x3`, `fpsr`.
fn set(state: &mut State, assignment: &str) {
    let (name, value) = assignment.split_once('=').expect(assignment);
    let value = u128::from_str_radix(value, 16).expect(assignment);
    match (name, name.split_at(1)) {
        ("fpsr", _) => state.fpsr = value as u32,
        (_, ("v", n)) => state.v[n.parse::<usize>().expect(assignment)] = value,
        (_, ("x", n)) => state.x[n.parse::<usize>().expect(assignment)] = value as u64,
        _ => panic!("{assignment}"),
    }
}

#[test]
fn every_instruction_gives_what_qemu_gives() {
    let vectors = include_str!("vectors.txt");
    let mut count = 0;
    for line in vectors.lines().filter(|line| !line.starts_with('#')) {
        let (before, after) = line.split_once(" -> ").expect(line);
        let mut words = before.split(' ');
        let insn = u32::from_str_radix(words.next().expect(line), 16).expect(line);
        let mut state = State::default();
        words.for_each(|word| set(&mut state, word));
        let mut expected = state.clone();
        after.split(' ').filter(|word| !word.is_empty()).for_each(|word| set(&mut expected, word));
        assert!(execute_data(insn, &mut state), "unallocated: {line}");
        assert_eq!(state, expected, "{line}");
        count += 1;
    }
    assert!(count > 500, "{count} vectors");
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
