//! Software step (Arm ARM D2.11).

use proptest::prelude::*;
use squib_soft::Exit;

use super::guest::*;
use crate::common::BASE;

const NOP: u32 = 0xd503_201f;
const ADD: u32 = 0x9100_0400; // add x0, x0, #1

fn stepping(words: &[u32]) -> Guest {
    let mut guest = Guest::new(words);
    guest.set(&[(MDSCR_EL1, SS)]);
    guest
}

#[test]
fn a_step_executes_one_instruction() {
    let mut guest = stepping(&[ADD, ADD, 0x1400_0003]); // add; add; b .+12
    for n in 1..=2 {
        let at = CODE + 4 * n;
        let taken = guest.enter(at - 4, EL0 | SPSR_SS);
        assert_eq!(taken, from_el0(stepped(false), at, EL0));
        assert_eq!(guest.cpu.x(0), n);
    }
    let taken = guest.enter(CODE + 8, EL0 | SPSR_SS);
    assert_eq!(taken, from_el0(stepped(false), CODE + 20, EL0), "a branch's target");
}

#[test]
fn a_return_without_spsr_ss_takes_the_exception_before_an_instruction() {
    let mut guest = stepping(&[ADD]);
    assert_eq!(guest.enter(CODE, EL0), from_el0(PENDING, CODE, EL0));
    assert_eq!(guest.cpu.x(0), 0);
}

#[test]
fn the_syndrome_tells_a_load_exclusive() {
    // ldxr x1, [x2]; ldaxp x1, x3, [x2]; stxr w4, x1, [x2]; ldr x1, [x2]
    let words = [0xc85f_7c41, 0xc87f_8c41, 0xc804_7c41, 0xf940_0041];
    let mut guest = stepping(&words);
    guest.cpu.set_x(2, DATA);
    for (n, exclusive) in (0..).zip([true, true, false, false]) {
        let taken = guest.enter(CODE + 4 * n, EL0 | SPSR_SS);
        assert_eq!(taken.esr, stepped(exclusive), "instruction {n}");
    }
}

#[test]
fn nothing_is_stepped_while_step_is_off_or_a_lock_is_locked() {
    let words = [ADD, 0xd400_00a1]; // add x0, x0, #1; svc #5
    for off in [(MDSCR_EL1, 0), (OSLSR_EL1, 8 | 2), (OSDLR_EL1, 1)] {
        let mut guest = stepping(&words);
        guest.set(&[off]);
        let taken = guest.enter(CODE, EL0 | SPSR_SS);
        assert_eq!(taken, from_el0(svc(5), CODE + 8, EL0), "{off:?}");
    }
}

#[test]
fn a_stepped_system_call_is_followed_by_the_steps_exception() {
    let mut guest = stepping(&[0xd400_00a1, ADD]); // svc #5; add
    let taken = guest.enter(CODE, EL0 | SPSR_SS);
    assert_eq!(taken, from_el0(svc(5), CODE + 4, EL0), "the call ends the step: SPSR.SS is clear");
    assert_eq!(guest.until_taken(), from_el0(PENDING, CODE + 4, EL0));
}

#[test]
fn an_instruction_that_faults_is_stepped_again_after_its_exception() {
    let data_abort = 0x24 << 26 | 1 << 25;
    let cases = [
        (0xf900_0041, data_abort | 1 << 6, "str x1, [x2] with no translation"),
        (0x0000_0000, UNKNOWN, "udf"),
        (0xd420_0060, brk(3), "brk #3"),
        (0xd518_1001, UNKNOWN, "msr sctlr_el1, x1 at EL0"),
    ];
    for (word, esr, what) in cases {
        let mut guest = stepping(&[word, ADD]);
        guest.cpu.set_x(2, 1 << 50);
        let taken = guest.enter(CODE, EL0 | SPSR_SS);
        assert_eq!(taken, from_el0(esr, CODE, EL0 | SPSR_SS), "{what}");
        // The handler puts the instruction right, and the step goes on.
        guest.machine.write(CODE, &[ADD]);
        guest.set(&[]);
        assert_eq!(guest.until_taken(), from_el0(stepped(false), CODE + 4, EL0), "{what}");
    }
}

#[test]
fn an_illegal_state_is_no_step() {
    let mut guest = stepping(&[ADD]);
    let taken = guest.enter(CODE, EL0 | SPSR_SS | IL);
    assert_eq!(taken, from_el0(0x0e << 26 | 1 << 25, CODE, EL0 | SPSR_SS | IL));
    let taken = guest.enter(CODE, EL0 | IL);
    assert_eq!(taken, from_el0(PENDING, CODE, EL0 | IL), "the step's exception comes first");
    let taken = guest.enter(CODE + 2, EL0);
    assert_eq!(taken, from_el0(PENDING, CODE + 2, EL0), "before an unaligned PC's too");
}

#[test]
fn an_interrupt_comes_before_the_instruction_and_leaves_the_step_to_be_done() {
    let mut guest = stepping(&[ADD]);
    guest.cpu.signals().set_irq(true);
    let taken = guest.enter(CODE, EL0 | SPSR_SS);
    assert_eq!((taken.vector, taken.elr, taken.spsr), (IRQ_EL0, CODE, EL0 | SPSR_SS));
    guest.cpu.signals().set_irq(false);
    assert_eq!(guest.until_taken(), from_el0(stepped(false), CODE + 4, EL0));
    assert_eq!(guest.cpu.x(0), 1);
}

#[test]
fn a_step_ends_before_an_interrupt_that_came_with_it() {
    let mut guest = stepping(&[ADD]);
    guest.prepare(CODE, EL0 | SPSR_SS);
    // The return and the stepped instruction.
    let limit = guest.cpu.retired() + 2;
    assert_eq!(guest.cpu.run(Some(limit)), Exit::Limit);
    guest.cpu.signals().set_irq(true);
    assert_eq!(guest.until_taken(), from_el0(stepped(false), CODE + 4, EL0));
}

#[test]
fn a_stepped_wfi_does_not_sleep() {
    let mut guest = stepping(&[0xd503_207f]); // wfi
    guest.set(&[(MDSCR_EL1, SS | KDE)]);
    let taken = guest.enter(CODE, EL1H | SPSR_SS);
    assert_eq!(taken.esr, stepped(false) | SAME_EL);
    assert_eq!(taken.elr, CODE + 4);
}

#[test]
fn el1_is_stepped_with_kde_and_pstate_d_clear() {
    let words = [ADD, 0xd400_00a1]; // add; svc #5
    for (mdscr, spsr) in [(SS, EL1H), (SS | KDE, EL1H | D)] {
        let mut guest = stepping(&words);
        guest.set(&[(MDSCR_EL1, mdscr)]);
        let taken = guest.enter(CODE, spsr | SPSR_SS);
        assert_eq!((taken.esr, taken.spsr), (svc(5), spsr), "{mdscr:#x} {spsr:#x}");
    }
    let mut guest = stepping(&words);
    guest.set(&[(MDSCR_EL1, SS | KDE)]);
    let taken = guest.enter(CODE, EL1H | SPSR_SS);
    let expected =
        Taken { vector: SYNC_EL1, esr: stepped(false) | SAME_EL, elr: CODE + 4, spsr: EL1H };
    assert_eq!(taken, expected);
}

#[test]
fn unmasking_debug_exceptions_at_el1_makes_the_step_pending() {
    let words = [0xd503_48ff, ADD]; // msr daifclr, #8; add
    let mut guest = stepping(&words);
    guest.set(&[(MDSCR_EL1, SS | KDE)]);
    let taken = guest.enter(CODE, EL1H | D | SPSR_SS);
    assert_eq!((taken.esr, taken.elr, taken.spsr), (PENDING | SAME_EL, CODE + 4, EL1H));
    assert_eq!(guest.cpu.x(0), 0);
}

#[test]
fn masking_debug_exceptions_ends_a_step_without_its_exception() {
    // msr daifset, #8; add; msr daifclr, #8; add
    let mut guest = stepping(&[0xd503_48df, ADD, 0xd503_48ff, ADD]);
    guest.set(&[(MDSCR_EL1, SS | KDE)]);
    let taken = guest.enter(CODE, EL1H | SPSR_SS);
    assert_eq!((taken.esr, taken.elr), (PENDING | SAME_EL, CODE + 12));
    assert_eq!(guest.cpu.x(0), 1);
}

#[test]
fn setting_mdscr_takes_effect_at_the_next_instruction() {
    let words = [0xd510_0241, ADD]; // msr mdscr_el1, x1; add
    let mut guest = Guest::new(&words);
    guest.cpu.set_x(1, SS | KDE);
    let taken = guest.enter(CODE, EL1H);
    assert_eq!((taken.esr, taken.elr), (PENDING | SAME_EL, CODE + 4));
}

#[test]
fn a_return_from_where_step_is_active_begins_no_step() {
    let mut guest = stepping(&[0xd69f_03e0, ADD]); // eret; add
    guest.set(&[(MDSCR_EL1, SS | KDE)]);
    guest.prepare(CODE, EL1H | SPSR_SS);
    // The first return leads to the second, which is stepped: its own SPSR.SS counts for nothing.
    let limit = guest.cpu.retired() + 1;
    assert_eq!(guest.cpu.run(Some(limit)), Exit::Limit);
    guest.set(&[(ELR_EL1, CODE + 4), (SPSR_EL1, EL0 | SPSR_SS)]);
    let taken = guest.until_taken();
    assert_eq!((taken.vector, taken.elr), (SYNC_EL0, CODE + 4));
    assert_eq!(guest.cpu.x(0), 0);
}

#[test]
fn a_hypercall_is_made_before_its_steps_exception() {
    let mut guest = stepping(&[0xd400_0422, ADD]); // hvc #0x21
    guest.set(&[(MDSCR_EL1, SS | KDE)]);
    guest.prepare(CODE, EL1H | SPSR_SS);
    assert_eq!(guest.cpu.run(None), Exit::Hvc { imm: 0x21 });
    let taken = guest.until_taken();
    assert_eq!((taken.esr, taken.elr), (stepped(false) | SAME_EL, CODE + 4));
}

#[test]
fn a_call_that_turns_out_not_to_exist_is_stepped_again() {
    let mut guest = stepping(&[0xd400_0003]); // smc #0
    guest.set(&[(MDSCR_EL1, SS | KDE)]);
    guest.prepare(CODE, EL1H | SPSR_SS);
    assert_eq!(guest.cpu.run(None), Exit::Smc { imm: 0 });
    guest.cpu.undefined();
    let taken = guest.until_taken();
    assert_eq!((taken.esr, taken.elr, taken.spsr), (UNKNOWN, CODE, EL1H | SPSR_SS));
}

#[test]
fn a_stepped_device_access_has_its_value_and_is_saved_with_its_step() {
    let words = [0xb940_0041, ADD]; // ldr w1, [x2]
    for save in [false, true] {
        let mut guest = stepping(&words);
        guest.cpu.set_x(2, DEVICE);
        guest.prepare(CODE, EL0 | SPSR_SS);
        assert_eq!(guest.cpu.run(None), Exit::MmioRead { address: DEVICE, size: 4 });
        guest.cpu.complete_mmio_read(0x55);
        if save {
            guest.set(&[]);
        }
        assert_eq!(guest.until_taken(), from_el0(stepped(false), CODE + 4, EL0));
        assert_eq!(guest.cpu.x(1), 0x55);
    }
}

#[test]
fn registers_of_the_debug_system_have_only_the_bits_that_exist() {
    // msr dbgbcr0_el1, x1; mrs x1, dbgbcr0_el1; msr mdscr_el1, x3; mrs x3, mdscr_el1;
    // msr oslar_el1, x4; msr mdscr_el1, x5; mrs x5, mdscr_el1; hvc #0x21
    let words = [
        0xd510_00a1,
        0xd530_00a1,
        0xd510_0243,
        0xd530_0243,
        0xd510_1084,
        0xd510_0245,
        0xd530_0245,
        0xd400_0422,
    ];
    let mut guest = Guest::new(&words);
    for n in [1, 3, 5] {
        guest.cpu.set_x(n, !SS);
    }
    guest.cpu.set_x(4, 1);
    guest.prepare(CODE, EL1H | MASKED);
    assert_eq!(guest.cpu.run(None), Exit::Hvc { imm: 0x21 });
    assert_eq!(guest.cpu.x(1), 0x00ff_e1e6, "BAS is RES1 without AArch32");
    assert_eq!(guest.cpu.x(3), MDE | KDE | 1 << 12, "the OS lock is unlocked");
    assert_eq!(guest.cpu.x(5), 0x6ce8_f040, "and now it is locked");
}

/// Words that are instructions more often than not, with x1 to x8 as operands.
fn instruction() -> impl Strategy<Value = u32> {
    let register = 1u32..8;
    let loads = vec![0xf940_0000u32, 0xf900_0000, 0x3940_0000, 0xb900_0000, 0x3dc0_0000];
    let data =
        vec![0x8b00_0000u32, 0xcb00_0000, 0xeb00_0000, 0x9b00_7c00, 0xca00_0000, 0x9ac0_2000];
    prop_oneof![
        4 => (prop::sample::select(data), register.clone(), register.clone(), register.clone())
            .prop_map(|(word, d, n, m)| word | m << 16 | n << 5 | d),
        // Addresses in x9.
        3 => (prop::sample::select(loads), register.clone(), 0u32..64)
            .prop_map(|(word, t, offset)| word | offset << 10 | 9 << 5 | t),
        // cbz, b.cond, b, a little forward.
        1 => (register, 2u32..5).prop_map(|(t, by)| 0xb400_0000 | by << 5 | t),
        1 => (0u32..15, 2u32..5).prop_map(|(cond, by)| 0x5400_0000 | by << 5 | cond),
        1 => (2u32..5).prop_map(|by| 0x1400_0000 | by),
        1 => prop::sample::select(vec![NOP, ADD, 0xd503_3f9f, 0xd503_3fdf]),
        1 => any::<u32>(),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Stepped one by one, with a snapshot at each step or not, a program does what it does at a run.
    #[test]
    fn a_program_that_is_stepped_does_what_it_does_at_a_run(
        words in prop::collection::vec(instruction(), 1..40),
        registers in prop::collection::vec(any::<u64>(), 8),
        saved in any::<bool>(),
    ) {
        let start = || {
            let mut guest = Guest::new(&words);
            guest.machine.write(CODE + 4 * words.len() as u64, &[0xd400_00a1; 8]); // svc #5
            for (n, value) in (1..).zip(&registers) {
                guest.cpu.set_x(n, *value);
            }
            guest.cpu.set_x(9, DATA);
            guest
        };
        // A step's exception clears the exclusive monitor.
        prop_assume!(!words.iter().any(|word| word & 0x3f80_0000 == 0x0800_0000));
        let mut run = start();
        run.prepare(CODE, EL0);
        let end = match run.cpu.run(Some(1 << 16)) {
            Exit::Hvc { imm } => run.taken(imm),
            // It waits, loops or leaves the CPU.
            _ => return Ok(()),
        };
        let mut guest = start();
        guest.set(&[(MDSCR_EL1, SS)]);
        let mut taken = guest.enter(CODE, EL0 | SPSR_SS);
        let mut steps = 0;
        while taken.esr | 1 << 6 == stepped(true) && steps < 1 << 12 {
            prop_assert_eq!(taken.spsr & !(0xf << 28), EL0);
            steps += 1;
            if saved {
                guest.set(&[]);
            }
            taken = guest.go_on(taken.spsr | SPSR_SS);
        }
        // The last instruction was stepped too, unless it is a call, which ends its step.
        let ss = if end.esr >> 26 == 0x15 { 0 } else { SPSR_SS };
        prop_assert_eq!(taken, Taken { spsr: end.spsr | ss, ..end });
        let (x, y) = (run.cpu.state(), guest.cpu.state());
        prop_assert_eq!((x.x, x.v, x.sp_el0), (y.x, y.v, y.sp_el0));
        prop_assert!(run.machine.bytes()[(DATA - BASE) as usize..][..0x1000]
            == guest.machine.bytes()[(DATA - BASE) as usize..][..0x1000]);
    }

    /// A run that is cut anywhere, and saved and restored there, retires and leaves the same.
    #[test]
    fn a_stepped_program_can_be_saved_at_every_instruction(cut in 1u64..60) {
        // The handler is the guest's own: it counts, lets SPSR.SS be set, and returns.
        let handler = [
            0x9100_0694, // add x20, x20, #1
            0xd538_5215, // mrs x21, esr_el1
            0x8b15_02d6, // add x22, x22, x21
            0xd538_4015, // mrs x21, spsr_el1
            0xb26b_02b5, // orr x21, x21, #0x200000
            0xd518_4015, // msr spsr_el1, x21
            0xd69f_03e0, // eret
        ];
        // add; ldxr x1, [x2]; stxr w4, x1, [x2]; str x0, [x2]; b back
        let words = [ADD, 0xc85f_7c41, 0xc804_7c41, 0xf900_0040, 0x17ff_fffc];
        let start = || {
            let mut guest = stepping(&words);
            guest.machine.write(BASE + 0x2000 + 0x400, &handler);
            guest.cpu.set_x(2, DATA);
            guest.prepare(CODE, EL0 | SPSR_SS);
            guest
        };
        let base = start().cpu.retired();
        let mut whole = start();
        prop_assert_eq!(whole.cpu.run(Some(base + 200)), Exit::Limit);
        let mut guest = start();
        prop_assert_eq!(guest.cpu.run(Some(base + cut)), Exit::Limit);
        guest.set(&[]);
        prop_assert_eq!(guest.cpu.run(Some(base + 200)), Exit::Limit);
        prop_assert_eq!(whole.cpu.state(), guest.cpu.state());
        prop_assert!(whole.cpu.x(20) >= 20, "it was stepped: {}", whole.cpu.x(20));
    }
}
