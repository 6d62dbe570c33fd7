//! Breakpoints (Arm ARM D2.8).

use squib_soft::{Exit, SysReg};

use super::guest::*;
use crate::common::{PXN, READ_ONLY, Tables, USER, VALID_PAGE};

const ADD: u32 = 0x9100_0400; // add x0, x0, #1
const SVC: u32 = 0xd400_00a1; // svc #5

/// Of a descriptor: not executable by EL0.
const UXN: u64 = 1 << 54;

// DBGBCR<n>_EL1.
const E: u64 = 1;
const BAS: u64 = 0xf << 5;
const AT_EL1: u64 = 1 << 1;
const AT_EL0: u64 = 2 << 1;
const LINKED_ADDRESS: u64 = 1 << 20;
const CONTEXT: u64 = 2 << 20;
const LINKED_CONTEXT: u64 = 3 << 20;
const fn linked_to(n: u64) -> u64 {
    n << 16
}

fn breaking(words: &[u32], registers: &[(SysReg, u64)]) -> Guest {
    let mut guest = Guest::new(words);
    guest.set(&[(MDSCR_EL1, MDE)]);
    guest.set(registers);
    guest
}

#[test]
fn a_breakpoint_stops_before_its_instruction_each_time() {
    // 1: add; add; add; cbnz x1, 1b (x1 stays set): the breakpoint is in the middle of a block.
    let words = [ADD, ADD, ADD, 0xb5ff_ffa1];
    let mut guest = breaking(&words, &[(bvr(0), CODE + 4), (bcr(0), E | AT_EL0 | BAS)]);
    guest.cpu.set_x(1, 1);
    let mut taken = guest.enter(CODE, EL0);
    for round in 0..5 {
        assert_eq!(taken, from_el0(BREAKPOINT, CODE + 4, EL0));
        assert_eq!(guest.cpu.x(0), 1 + 3 * round);
        // As a debugger does: one step without it, then on.
        guest.set(&[(MDSCR_EL1, SS)]);
        assert_eq!(guest.go_on(SPSR_SS), from_el0(stepped(false), CODE + 8, EL0));
        guest.set(&[(MDSCR_EL1, MDE)]);
        taken = guest.go_on(EL0);
    }
}

#[test]
fn a_breakpoint_is_met_from_every_side() {
    let far = CODE + 0x3000;
    for (n, word) in [
        0x1400_0c00,              // b .+0x3000
        0xd61f_0040,              // br x2
        0xb500_0001 | 0xc00 << 5, // cbnz x1, .+0x3000
    ]
    .into_iter()
    .enumerate()
    {
        let mut guest = breaking(&[word], &[(bvr(1), far), (bcr(1), E | AT_EL0)]);
        guest.cpu.set_x(1, 1);
        guest.cpu.set_x(2, far);
        guest.machine.write(far, &[SVC]);
        assert_eq!(guest.enter(CODE, EL0), from_el0(BREAKPOINT, far, EL0), "branch {n}");
    }
    // By falling over the end of a page.
    let mut guest = breaking(&[], &[(bvr(1), far), (bcr(1), E | AT_EL0)]);
    guest.machine.write(far - 8, &[ADD, ADD, SVC]);
    assert_eq!(guest.enter(far - 8, EL0), from_el0(BREAKPOINT, far, EL0));
    assert_eq!(guest.cpu.x(0), 2);
}

#[test]
fn a_breakpoint_set_by_the_guest_works_on_code_that_has_run_before() {
    let words = [
        ADD,         // 1: the breakpoint's place
        0xf100_0463, // subs x3, x3, #1
        0x54ff_ffc1, // b.ne 1b
        0xd510_00a1, // msr dbgbcr0_el1, x1
        0xd503_3fdf, // isb
        0x17ff_fffb, // b 1b
    ];
    let registers = [(bvr(0), CODE), (MDSCR_EL1, MDE | KDE)];
    let mut guest = breaking(&words, &registers);
    guest.cpu.set_x(1, E | AT_EL1);
    guest.cpu.set_x(3, 3);
    let taken = guest.enter(CODE, EL1H);
    assert_eq!((taken.esr, taken.elr), (BREAKPOINT | SAME_EL, CODE));
    assert_eq!(guest.cpu.x(0), 3);
}

#[test]
fn a_breakpoint_that_is_not_on_does_not_stop() {
    let on = [(bvr(0), CODE), (bcr(0), E | AT_EL0)];
    let off: [&[(SysReg, u64)]; 13] = [
        &[(MDSCR_EL1, 0)],
        &[(OSLSR_EL1, 8 | 2)],
        &[(OSDLR_EL1, 1)],
        &[(bcr(0), AT_EL0)],
        &[(bcr(0), E)],
        &[(bcr(0), E | AT_EL1)],
        &[(bcr(0), E | AT_EL0 | 1 << 13)],
        &[(bcr(0), E | AT_EL0 | 1 << 14)],
        &[(bcr(0), E | AT_EL0 | 4 << 20)],
        &[(bcr(0), E | AT_EL0 | 8 << 20)],
        &[(bvr(0), CODE + 4096)],
        &[(bvr(0), CODE | 1 << 40)],
        // Not context-aware.
        &[(bcr(0), E | AT_EL0 | CONTEXT), (bvr(0), 0)],
    ];
    for registers in off {
        let mut guest = breaking(&[ADD, SVC], &on);
        guest.set(registers);
        assert_eq!(guest.enter(CODE, EL0).esr, svc(5), "{registers:?}");
    }
    let mut guest = breaking(&[ADD, SVC], &on);
    assert_eq!(guest.enter(CODE, EL0).esr, BREAKPOINT);
}

#[test]
fn el1_meets_its_breakpoints_with_kde_and_pstate_d_clear() {
    let on = [(bvr(0), CODE), (bcr(0), E | AT_EL1)];
    for (mdscr, spsr, stops) in
        [(MDE, EL1H, false), (MDE | KDE, EL1H | D, false), (MDE | KDE, EL1H, true)]
    {
        let mut guest = breaking(&[ADD, SVC], &on);
        guest.set(&[(MDSCR_EL1, mdscr)]);
        let taken = guest.enter(CODE, spsr);
        let expected = if stops { BREAKPOINT | SAME_EL } else { svc(5) };
        assert_eq!((taken.vector, taken.esr), (SYNC_EL1, expected), "{mdscr:#x} {spsr:#x}");
    }
    // Unmasked on the breakpoint's own page: msr daifclr, #8; add; svc
    let mut guest = breaking(&[0xd503_48ff, ADD, SVC], &on);
    guest.set(&[(MDSCR_EL1, MDE | KDE), (bvr(0), CODE + 4)]);
    assert_eq!(guest.enter(CODE, EL1H | D).elr, CODE + 4);
    assert_eq!(guest.cpu.x(0), 0);
}

#[test]
fn context_breakpoints_compare_contextidr() {
    let contexts = [(0x1234_5677, 0x1234_5677, true), (0x1234_5677, 0x1234_5676, false)];
    for (value, current, stops) in contexts {
        let context = [(bvr(1), value), (CONTEXTIDR_EL1, current)];
        // Unlinked: any instruction.
        let mut guest = breaking(&[ADD, SVC], &[(bcr(1), E | AT_EL0 | CONTEXT)]);
        guest.set(&context);
        let taken = guest.enter(CODE, EL0);
        assert_eq!(taken.esr, if stops { BREAKPOINT } else { svc(5) });
        // Linked: breakpoint 0's address in that context.
        let linked = [
            (bcr(0), E | AT_EL0 | LINKED_ADDRESS | linked_to(1)),
            (bvr(0), CODE + 4),
            (bcr(1), E | LINKED_CONTEXT),
        ];
        let mut guest = breaking(&[ADD, ADD, SVC], &linked);
        guest.set(&context);
        let taken = guest.enter(CODE, EL0);
        assert_eq!(taken.esr, if stops { BREAKPOINT } else { svc(5) });
        // A link to what is no linked context breakpoint disables.
        for other in [E | CONTEXT, LINKED_CONTEXT, E | LINKED_ADDRESS] {
            let mut guest = breaking(&[ADD, ADD, SVC], &linked);
            guest.set(&context);
            guest.set(&[(bcr(1), other), (bvr(1), value)]);
            assert_eq!(guest.enter(CODE, EL0).esr, svc(5), "{other:#x}");
        }
        let mut guest = breaking(&[ADD, ADD, SVC], &linked);
        guest.set(&context);
        guest.set(&[(bcr(0), E | AT_EL0 | LINKED_ADDRESS | linked_to(0))]);
        assert_eq!(guest.enter(CODE, EL0).esr, svc(5), "linked to itself");
    }
}

#[test]
fn a_breakpoint_comes_after_fetch_faults_and_before_all_else() {
    let on = |at: u64| [(bvr(0), at), (bcr(0), E | AT_EL0)];
    for (word, what) in [(0, "udf"), (0xd420_0060, "brk"), (SVC, "svc"), (0xd500_401f, "msr")] {
        let mut guest = breaking(&[word], &on(CODE));
        assert_eq!(guest.enter(CODE, EL0).esr, BREAKPOINT, "{what}");
    }
    let mut guest = breaking(&[ADD], &on(CODE));
    assert_eq!(guest.enter(CODE, EL0 | IL).esr, BREAKPOINT, "an illegal state");
    let mut guest = breaking(&[ADD], &on(CODE));
    let taken = guest.enter(CODE + 2, EL0);
    assert_eq!(taken.esr >> 26, 0x22, "an unaligned PC");
    // Not executable by EL0; and with the page mapped for it.
    for (attributes, ec) in [(READ_ONLY | UXN, 0x20), (READ_ONLY | USER | PXN, 0x30)] {
        let mut guest = breaking(&[ADD], &on(CODE));
        let tcr = {
            let mut tables = Tables::new(&guest.machine, 12);
            for page in 0..64 {
                let at = crate::common::BASE + page * 4096;
                let own = if at == CODE { attributes } else { 0 };
                tables.map(at, at, VALID_PAGE | own);
            }
            (tables.tcr() | 1 << 23, tables.root)
        };
        guest.set(&[(TCR_EL1, tcr.0), (TTBR0_EL1, tcr.1), (SCTLR_EL1, 0x30d0_0801)]);
        assert_eq!(guest.enter(CODE, EL0).esr >> 26, ec);
    }
}

#[test]
fn a_step_onto_a_breakpoint_ends_before_it() {
    let mut guest = breaking(&[ADD, ADD], &[(bvr(0), CODE + 4), (bcr(0), E | AT_EL0)]);
    guest.set(&[(MDSCR_EL1, MDE | SS)]);
    assert_eq!(guest.enter(CODE, EL0 | SPSR_SS), from_el0(stepped(false), CODE + 4, EL0));
    // And the next step does not come past it.
    let taken = guest.go_on(EL0 | SPSR_SS);
    assert_eq!(taken, from_el0(BREAKPOINT, CODE + 4, EL0 | SPSR_SS));
}

#[test]
fn breakpoints_leave_the_count_of_instructions_alone() {
    // 1: add; subs x3, x3, #1; b.ne 1b; svc
    let words = [ADD, 0xf100_0463, 0x54ff_ffc1, SVC];
    let mut counts = [0; 2];
    // One is never met, though its page is executed by instruction.
    for (count, mdscr) in counts.iter_mut().zip([0, MDE]) {
        let mut guest = breaking(&words, &[(bvr(0), CODE + 64), (bcr(0), E | AT_EL0)]);
        guest.set(&[(MDSCR_EL1, mdscr)]);
        guest.cpu.set_x(3, 1000);
        let before = guest.cpu.retired();
        assert_eq!(guest.enter(CODE, EL0).esr, svc(5));
        assert_eq!(guest.cpu.x(0), 1000);
        *count = guest.cpu.retired() - before;
    }
    assert_eq!(counts[0], counts[1]);
    let mut guest = breaking(&words, &[(bvr(0), CODE + 64), (bcr(0), E | AT_EL0)]);
    guest.cpu.set_x(3, 1000);
    guest.prepare(CODE, EL0);
    let limit = guest.cpu.retired() + 1234;
    assert_eq!(guest.cpu.run(Some(limit)), Exit::Limit);
    assert_eq!(guest.cpu.retired(), limit);
}
