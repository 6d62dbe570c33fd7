//! Recorded cases of single instructions: `INSN name=value... -> name=value...`, in hexadecimal.
//! Registers that are not named are zero before, and unchanged after.

use crate::testing::{State, execute_data};

/// Carries out every case and compares all registers; the number of cases.
pub(super) fn check(text: &str) -> usize {
    let mut count = 0;
    for line in text.lines().filter(|line| !line.starts_with('#')) {
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
    count
}

fn set(state: &mut State, assignment: &str) {
    let (name, value) = assignment.split_once('=').expect(assignment);
    let value = u128::from_str_radix(value, 16).expect(assignment);
    match (name, name.split_at(1)) {
        ("nzcv", _) => state.nzcv = value as u32,
        ("fpcr", _) => state.fpcr = value as u32,
        ("fpsr", _) => state.fpsr = value as u32,
        (_, ("v", n)) => state.v[n.parse::<usize>().expect(assignment)] = value,
        (_, ("x", n)) => state.x[n.parse::<usize>().expect(assignment)] = value as u64,
        _ => panic!("{assignment}"),
    }
}
