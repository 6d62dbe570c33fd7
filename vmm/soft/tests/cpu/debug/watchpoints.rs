//! Watchpoints (Arm ARM D2.9).

use proptest::prelude::*;
use squib_soft::{Exit, SysReg};

use super::guest::*;
use crate::common::{BASE, READ_ONLY, Tables, USER, VALID_PAGE};

const SVC: u32 = 0xd400_00a1; // svc #5

// DBGWCR<n>_EL1.
const E: u64 = 1;
const AT_EL1: u64 = 1 << 1;
const AT_EL0: u64 = 2 << 1;
const LOADS: u64 = 1 << 3;
const STORES: u64 = 2 << 3;
const fn bas(bytes: u64) -> u64 {
    bytes << 5
}
const fn mask(bits: u64) -> u64 {
    bits << 24 | bas(0xff)
}
const LINKED: u64 = 1 << 20;

/// The word, then `svc #5`.
fn watching(word: u32, registers: &[(SysReg, u64)]) -> Guest {
    let mut guest = Guest::new(&[word, SVC]);
    guest.set(&[(MDSCR_EL1, MDE)]);
    guest.set(registers);
    guest.cpu.set_x(2, DATA);
    guest
}

/// The watched address of the exception that `word` at EL0 takes, with x2 as `at`; `None` if it takes none.
fn met(word: u32, at: u64, value: u64, control: u64) -> Option<(u64, bool)> {
    let mut guest = watching(word, &[(wvr(0), value), (wcr(0), control)]);
    guest.use_normal_memory();
    guest.cpu.set_x(2, at);
    let taken = guest.enter(CODE, EL0);
    if taken.esr == svc(5) {
        return None;
    }
    assert_eq!(taken.esr & !(1 << 6), watchpoint(false), "{:#x}", taken.esr);
    assert_eq!((taken.elr, taken.spsr), (CODE, EL0));
    Some((guest.get(FAR_EL1), taken.esr >> 6 & 1 != 0))
}

const LOAD: u32 = 1;
const STORE: u32 = 2;
const BOTH: u32 = 3;

/// Every kind of access at [x2]: its word, what it does, and its bytes.
const ACCESSES: [(u32, u32, u64, &str); 39] = [
    (0xf940_0041, LOAD, 8, "ldr x1, [x2]"),
    (0xb940_0041, LOAD, 4, "ldr w1, [x2]"),
    (0x3940_0041, LOAD, 1, "ldrb w1, [x2]"),
    (0x7940_0041, LOAD, 2, "ldrh w1, [x2]"),
    (0xb980_0041, LOAD, 4, "ldrsw x1, [x2]"),
    (0xf840_0841, LOAD, 8, "ldtr x1, [x2]"),
    (0xf800_0841, STORE, 8, "sttr x1, [x2]"),
    (0xf900_0041, STORE, 8, "str x1, [x2]"),
    (0xb900_0041, STORE, 4, "str w1, [x2]"),
    (0x3900_0041, STORE, 1, "strb w1, [x2]"),
    (0xf800_8441, STORE, 8, "str x1, [x2], #8"),
    (0xa940_0c41, LOAD, 16, "ldp x1, x3, [x2]"),
    (0xa900_0c41, STORE, 16, "stp x1, x3, [x2]"),
    (0x2940_0c41, LOAD, 8, "ldp w1, w3, [x2]"),
    (0xad40_0c41, LOAD, 32, "ldp q1, q3, [x2]"),
    (0xad00_0c41, STORE, 32, "stp q1, q3, [x2]"),
    (0x3dc0_0041, LOAD, 16, "ldr q1, [x2]"),
    (0x3d80_0041, STORE, 16, "str q1, [x2]"),
    (0x3d40_0041, LOAD, 1, "ldr b1, [x2]"),
    (0x4c40_2041, LOAD, 64, "ld1 {v1.16b-v4.16b}, [x2]"),
    (0x4c00_2041, STORE, 64, "st1 {v1.16b-v4.16b}, [x2]"),
    (0x4c40_0841, LOAD, 64, "ld4 {v1.4s-v4.4s}, [x2]"),
    (0x4d20_8441, STORE, 16, "st2 {v1.d, v2.d}[1], [x2]"),
    (0x4d40_c441, LOAD, 2, "ld1r {v1.8h}, [x2]"),
    (0xf8e1_0043, BOTH, 8, "ldaddal x1, x3, [x2]"),
    (0xf821_005f, BOTH, 8, "stadd x1, [x2]"),
    (0xb821_8043, BOTH, 4, "swp w1, w3, [x2]"),
    (0xc8a1_7c43, BOTH, 8, "cas x1, x3, [x2]"),
    (0x4824_7c46, BOTH, 16, "casp x4, x5, x6, x7, [x2]"),
    (0xc85f_7c41, LOAD, 8, "ldxr x1, [x2]"),
    (0xc87f_8c41, LOAD, 16, "ldaxp x1, x3, [x2]"),
    (0xc804_7c41, STORE, 8, "stxr w4, x1, [x2]"),
    (0xc824_8c41, STORE, 16, "stlxp w4, x1, x3, [x2]"),
    (0xc8df_fc41, LOAD, 8, "ldar x1, [x2]"),
    (0xc89f_fc41, STORE, 8, "stlr x1, [x2]"),
    (0xd50b_7422, STORE, 64, "dc zva, x2"),
    (0xd50b_7a22, 0, 64, "dc cvac, x2"),
    (0xd50b_7e22, 0, 64, "dc civac, x2"),
    (0xf980_0040, 0, 64, "prfm pldl1keep, [x2]"),
];

#[test]
fn every_access_meets_the_watchpoints_of_its_kind_on_each_of_its_bytes() {
    // DC ZVA and the cache maintenance at EL0.
    let opened = (SCTLR_EL1, 0x30d0_0800 | 1 << 14 | 1 << 26);
    for (word, does, size, what) in ACCESSES {
        for (lsc, kind) in [(LOADS, LOAD), (STORES, STORE), (LOADS | STORES, BOTH)] {
            for offset in [-1i64, 0, 1, size as i64 / 2, size as i64 - 1, size as i64] {
                let byte = (DATA as i64 + offset) as u64;
                let control = E | AT_EL0 | lsc | bas(1 << (byte & 7));
                let registers = [(wvr(1), byte & !7), (wcr(1), control), opened];
                let mut guest = watching(word, &registers);
                guest.use_normal_memory();
                let taken = guest.enter(CODE, EL0);
                let hits = does & kind != 0 && (0..size as i64).contains(&offset);
                // An atomic access is a load if loads are watched.
                let write = does & kind & LOAD == 0;
                let esr = if hits { watchpoint(write) } else { svc(5) };
                assert_eq!(taken.esr, esr, "{what}: watched for {kind} at {offset}");
                if hits {
                    assert_eq!(guest.get(FAR_EL1), byte, "{what}");
                    assert_eq!((taken.elr, taken.spsr), (CODE, EL0));
                    assert_eq!(guest.cpu.x(2), DATA, "{what}: no write-back");
                }
            }
        }
    }
}

#[test]
fn invalidating_a_cache_line_counts_as_a_store_to_it() {
    // dc ivac, x2, at EL1 and in the middle of the line.
    for (at, hits) in [(DATA, true), (DATA + 63, true), (DATA + 64, false), (DATA - 8, false)] {
        let control = E | AT_EL1 | STORES | bas(0xff);
        let mut guest = watching(0xd508_7622, &[(wvr(0), at & !7), (wcr(0), control)]);
        guest.set(&[(MDSCR_EL1, MDE | KDE)]);
        guest.cpu.set_x(2, DATA + 17);
        let taken = guest.enter(CODE, EL1H);
        let esr = watchpoint(true) | SAME_EL | 1 << 8;
        assert_eq!(taken.esr, if hits { esr } else { svc(5) }, "{at:#x}");
    }
}

#[test]
fn a_store_that_meets_a_watchpoint_leaves_no_trace() {
    let mut guest =
        watching(0xf900_0041, &[(wvr(0), DATA), (wcr(0), E | AT_EL0 | STORES | bas(1))]);
    guest.cpu.set_x(1, 0x1234);
    assert_eq!(guest.enter(CODE, EL0).esr, watchpoint(true));
    assert_eq!(guest.machine.read64(DATA), 0);
    // Stepped over without it, as debuggers do, it is done.
    guest.set(&[(MDSCR_EL1, SS)]);
    assert_eq!(guest.go_on(EL0 | SPSR_SS).elr, CODE + 4);
    assert_eq!(guest.machine.read64(DATA), 0x1234);
}

#[test]
fn a_store_across_pages_meets_a_watchpoint_on_either() {
    let edge = DATA + 0x1000;
    for byte in [edge - 1, edge] {
        let control = E | AT_EL0 | STORES | bas(1 << (byte & 7));
        assert_eq!(met(0xf900_0041, edge - 4, byte & !7, control), Some((byte, true)));
    }
}

#[test]
fn an_access_that_is_stepped_meets_its_watchpoint() {
    let mut guest =
        watching(0xf900_0041, &[(wvr(0), DATA), (wcr(0), E | AT_EL0 | STORES | bas(1))]);
    guest.set(&[(MDSCR_EL1, SS | MDE)]);
    let taken = guest.enter(CODE, EL0 | SPSR_SS);
    assert_eq!(taken, from_el0(watchpoint(true), CODE, EL0 | SPSR_SS));
}

#[test]
fn a_device_can_be_watched() {
    let mut guest =
        watching(0xb900_0041, &[(wvr(0), DEVICE), (wcr(0), E | AT_EL0 | STORES | bas(0xf))]);
    guest.cpu.set_x(2, DEVICE);
    assert_eq!(guest.enter(CODE, EL0).esr, watchpoint(true));
    guest.set(&[(MDSCR_EL1, 0)]);
    assert!(matches!(guest.cpu.run(None), Exit::MmioWrite { address: DEVICE, size: 4, .. }));
}

#[test]
fn a_fault_of_the_translation_comes_before_a_watchpoint() {
    for (attributes, esr) in
        [(READ_ONLY, 0x24 << 26 | 1 << 25 | 1 << 6 | 0b1111), (0, watchpoint(true))]
    {
        let control = E | AT_EL0 | STORES | bas(1);
        let mut guest = watching(0xf900_0041, &[(wvr(0), DATA), (wcr(0), control)]);
        let (tcr, root) = {
            let mut tables = Tables::new(&guest.machine, 12);
            for page in 0..64 {
                let at = BASE + page * 4096;
                let user = if at == CODE { USER | READ_ONLY } else { 0 };
                tables.map(at, at, VALID_PAGE | user);
            }
            tables.map(DATA, DATA, VALID_PAGE | USER | attributes);
            (tables.tcr() | 1 << 23, tables.root)
        };
        guest.set(&[(TCR_EL1, tcr), (TTBR0_EL1, root), (SCTLR_EL1, 0x30d0_0801)]);
        assert_eq!(guest.enter(CODE, EL0).esr, esr);
    }
}

#[test]
fn a_watchpoint_that_is_not_on_watches_nothing() {
    let on = [(wvr(0), DATA), (wcr(0), E | AT_EL0 | STORES | bas(0xff))];
    let off: [&[(SysReg, u64)]; 13] = [
        &[(MDSCR_EL1, 0)],
        &[(OSLSR_EL1, 8 | 2)],
        &[(OSDLR_EL1, 1)],
        &[(wcr(0), AT_EL0 | STORES | bas(0xff))],
        &[(wcr(0), E | STORES | bas(0xff))],
        &[(wcr(0), E | AT_EL1 | STORES | bas(0xff))],
        &[(wcr(0), E | AT_EL0 | bas(0xff))],
        &[(wcr(0), E | AT_EL0 | STORES)],
        &[(wcr(0), E | AT_EL0 | STORES | mask(1))],
        &[(wcr(0), E | AT_EL0 | STORES | mask(2))],
        &[(wcr(0), E | AT_EL0 | STORES | bas(0xff) | 1 << 13)],
        &[(wcr(0), E | AT_EL0 | STORES | bas(0xff) | 3 << 14)],
        &[(wcr(0), E | AT_EL0 | STORES | bas(0xff) | LINKED)],
    ];
    for registers in off {
        let mut guest = watching(0xf900_0041, &on);
        guest.set(registers);
        assert_eq!(guest.enter(CODE, EL0).esr, svc(5), "{registers:?}");
    }
    let mut guest = watching(0xf900_0041, &on);
    assert_eq!(guest.enter(CODE, EL0).esr, watchpoint(true));
}

#[test]
fn el1_meets_its_watchpoints_with_kde_and_pstate_d_clear() {
    // An unprivileged access is compared as EL0's.
    let cases = [
        (0xf900_0041, AT_EL1, MDE, EL1H, false),
        (0xf900_0041, AT_EL1, MDE | KDE, EL1H | D, false),
        (0xf900_0041, AT_EL1, MDE | KDE, EL1H, true),
        (0xf900_0041, AT_EL0, MDE | KDE, EL1H, false),
        (0xf800_0841, AT_EL0, MDE | KDE, EL1H, true),
        (0xf800_0841, AT_EL1, MDE | KDE, EL1H, false),
        (0xf800_0841, AT_EL0, MDE, EL1H, false),
    ];
    for (n, (word, el, mdscr, spsr, hits)) in cases.into_iter().enumerate() {
        let mut guest = watching(word, &[(wvr(0), DATA), (wcr(0), E | el | STORES | bas(0xff))]);
        guest.set(&[(MDSCR_EL1, mdscr)]);
        let expected = if hits { watchpoint(true) | SAME_EL } else { svc(5) };
        assert_eq!(guest.enter(CODE, spsr).esr, expected, "case {n}");
    }
}

#[test]
fn a_linked_watchpoint_watches_in_its_context_only() {
    let control = E | AT_EL0 | STORES | bas(0xff) | LINKED | 1 << 16;
    for (context, hits) in [(7, true), (8, false)] {
        let registers = [
            (wvr(0), DATA),
            (wcr(0), control),
            (bvr(1), 7),
            (bcr(1), E | 3 << 20),
            (CONTEXTIDR_EL1, context),
        ];
        let mut guest = watching(0xf900_0041, &registers);
        assert_eq!(guest.enter(CODE, EL0).esr, if hits { watchpoint(true) } else { svc(5) });
    }
}

#[test]
fn a_watchpoint_set_by_the_guest_works_on_data_that_was_used_before() {
    // str x1, [x2]; msr dbgwcr0_el1, x3; str x1, [x2]; msr dbgwcr0_el1, xzr; str x1, [x2]; svc
    let words = [0xf900_0041, 0xd510_00e3, 0xf900_0041, 0xd510_00ff, 0xf900_0041, SVC];
    let mut guest = Guest::new(&words);
    guest.set(&[(MDSCR_EL1, MDE | KDE), (wvr(0), DATA)]);
    guest.cpu.set_x(2, DATA);
    guest.cpu.set_x(3, E | AT_EL1 | STORES | bas(0xff));
    let taken = guest.enter(CODE, EL1H);
    assert_eq!((taken.esr, taken.elr), (watchpoint(true) | SAME_EL, CODE + 8));
    guest.set(&[(ELR_EL1, CODE + 12)]);
    assert_eq!(guest.until_taken().esr, svc(5), "and off again");
}

#[test]
fn tags_are_compared_unless_they_are_ignored() {
    let tagged = DATA | 0x5a << 56;
    let control = E | AT_EL0 | STORES | bas(0xff);
    let mut guest = watching(0xf900_0041, &[(wvr(0), DATA), (wcr(0), control)]);
    let (tcr, root) = {
        let mut tables = Tables::new(&guest.machine, 12);
        for page in 0..64 {
            let at = BASE + page * 4096;
            let user = if at == CODE { USER | READ_ONLY } else { 0 };
            tables.map(at, at, VALID_PAGE | user);
        }
        tables.map(DATA, DATA, VALID_PAGE | USER);
        (tables.tcr() | 1 << 23 | 1 << 37, tables.root)
    };
    guest.set(&[(TCR_EL1, tcr), (TTBR0_EL1, root), (SCTLR_EL1, 0x30d0_0801)]);
    guest.cpu.set_x(2, tagged);
    assert_eq!(guest.enter(CODE, EL0).esr, watchpoint(true));
    assert_eq!(guest.get(FAR_EL1), tagged, "FAR keeps the tag");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Against the bytes that DBGWVR, BAS and MASK name by the words of D2.9.4.
    #[test]
    fn the_watched_bytes_are_those_that_the_registers_name(
        near in -20i64..80,
        access in 0usize..36,
        word_aligned in any::<bool>(),
        (first, count) in (0u64..8).prop_flat_map(|first| (Just(first), 1..=8 - first)),
        bits in prop::option::of(3u64..14),
    ) {
        let (word, does, size, what) = ACCESSES[access];
        // Exclusives and atomics must be aligned.
        let at = (DATA as i64 + near) as u64 & !15;
        let value = DATA + if word_aligned { 4 } else { 0 };
        let selected = ((1 << count) - 1) << first;
        let (control, watched) = match bits {
            Some(bits) => (mask(bits), value >> bits << bits..(value >> bits << bits) + (1 << bits)),
            None if word_aligned => {
                let end = (first + count).min(4);
                (bas(selected), value + first.min(4)..value + end.max(first.min(4)))
            }
            None => (bas(selected), value + first..value + first + count),
        };
        // DC ZVA is not open to EL0 here.
        prop_assume!(word != 0xd50b_7422);
        let found = met(word, at, value, E | AT_EL0 | LOADS | STORES | control);
        let expected = (at..at + size).find(|byte| watched.contains(byte));
        prop_assert_eq!(found.map(|(byte, _)| byte), expected, "{} at {:#x}", what, at);
        if let Some((_, write)) = found {
            prop_assert_eq!(write, does == STORE);
        }
    }
}
