//! Programs with time, exceptions, several vCPUs, and snapshots in between.

use proptest::prelude::*;
use squib_soft::{Counter, Cpu, CpuState, Exit, StateError};

use crate::common::{BASE, Machine, SIZE};

/// Counts, mixes, stores and loads; an interrupt of the virtual timer every 777 ticks mixes in ELR
/// and the counter.
fn timer_program(machine: &Machine) {
    let body = [
        0x1000_4001, // adr x1, vectors
        0xd518_c001, // msr vbar_el1, x1
        0xd280_7d02, // mov x2, #0x3e8
        0xd51b_e342, // msr cntv_cval_el0, x2
        0xd280_0022, // mov x2, #0x1
        0xd51b_e322, // msr cntv_ctl_el0, x2
        0xd503_42ff, // msr daifclr, #0x2
        0x9100_0400, // loop: add x0, x0, #0x1
        0xca00_0c63, // eor x3, x3, x0, lsl #3
        0x3610_0040, // tbz w0, #2, skip
        0x8b03_0084, // add x4, x4, x3
        0xf900_03a0, // skip: str x0, [x29]
        0xf940_03a5, // ldr x5, [x29]
        0xb5ff_ff45, // cbnz x5, loop
        0x17ff_fff9, // b loop
    ];
    let irq = [
        0x9100_0694, // add x20, x20, #0x1
        0xd538_4035, // mrs x21, elr_el1
        0x8b15_02d6, // add x22, x22, x21
        0xd53b_e057, // mrs x23, cntvct_el0
        0x8b17_02d6, // add x22, x22, x23
        0xd53b_e342, // mrs x2, cntv_cval_el0
        0x910c_2442, // add x2, x2, #0x309
        0xd51b_e342, // msr cntv_cval_el0, x2
        0xd69f_03e0, // eret
    ];
    machine.write(BASE, &body);
    machine.write(BASE + 0x800 + 0x280, &irq);
}

fn timer_cpu(machine: &Machine) -> Cpu {
    let mut cpu = machine.cpu(0);
    cpu.set_x(29, BASE + 0x10_0000);
    cpu
}

/// Runs to exactly `limit` retired instructions, with the timer's line wired to IRQ.
fn run_to(cpu: &mut Cpu, limit: u64) {
    loop {
        match cpu.run(Some(limit)) {
            Exit::Limit => return,
            Exit::TimerLines { virt, .. } => cpu.signals().set_irq(virt),
            other => panic!("unexpected exit {other:?} at {:#x}", cpu.pc()),
        }
    }
}

#[test]
fn a_deterministic_run_stops_exactly_at_its_limit() {
    let machine = Machine::new(Counter::instructions(0));
    timer_program(&machine);
    let mut cpu = timer_cpu(&machine);
    for limit in [1, 2, 7, 8, 100, 1003, 1004, 1005, 5000] {
        run_to(&mut cpu, limit);
        assert_eq!(cpu.retired(), limit);
    }
    assert_eq!(cpu.x(20), 6, "interrupts at 1000, 1777, 2554, 3331, 4108, 4885");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_run_that_is_saved_and_restored_anywhere_equals_one_that_is_not(
        n in 1u64..20_000,
        m in 1u64..5_000,
    ) {
        let whole = Machine::new(Counter::instructions(0));
        timer_program(&whole);
        let mut cpu = timer_cpu(&whole);
        run_to(&mut cpu, n + m);

        let first = Machine::new(Counter::instructions(0));
        timer_program(&first);
        let mut before = timer_cpu(&first);
        run_to(&mut before, n);
        let state = before.state();
        let time = n;
        let irq = before.x(20);

        let second = Machine::new(Counter::instructions(time));
        for (page, bytes) in first.bytes().chunks(8).enumerate() {
            second.write64(BASE + page as u64 * 8, u64::from_le_bytes(bytes.try_into().unwrap()));
        }
        let mut after = Cpu::new(&second.shared, 0x8000_0000);
        after.set_state(&state).unwrap();
        prop_assert_eq!(&after.state(), &state);
        prop_assert_eq!(after.x(20), irq);
        run_to(&mut after, n + m);

        prop_assert_eq!(after.state(), cpu.state());
        prop_assert!(second.bytes() == whole.bytes());
    }
}

#[test]
fn a_data_abort_is_precise() {
    let machine = Machine::new(Counter::host(0));
    let body = [
        0x1000_4001, // adr x1, vectors
        0xd518_c001, // msr vbar_el1, x1
        0xd282_0003, // mov x3, #0x1000
        0xf800_8c60, // str x0, [x3, #8]!
        0x1400_0000, // b .
    ];
    let vector = [
        0xd538_520a, // mrs x10, esr_el1
        0xd538_600b, // mrs x11, far_el1
        0xd538_402c, // mrs x12, elr_el1
        0xd400_00e2, // hvc #0x7
    ];
    machine.write(BASE, &body);
    machine.write(BASE + 0xa00, &vector);
    let mut cpu = machine.cpu(0);
    assert_eq!(cpu.run(None), Exit::Hvc { imm: 7 });
    // Data abort from EL1, IL, WnR, synchronous external abort: no RAM there, and a store with
    // write-back cannot go to a device.
    assert_eq!(cpu.x(10), 0x25 << 26 | 1 << 25 | 1 << 6 | 0x10);
    assert_eq!(cpu.x(11), 0x1008);
    assert_eq!(cpu.x(12), BASE + 12);
    assert_eq!(cpu.x(3), 0x1000, "the base is not written back");
}

#[test]
fn changed_code_is_executed_after_ic_ivau() {
    let machine = Machine::new(Counter::host(0));
    let body = [
        0xd280_0005, // mov x5, #0x0
        0x9400_000c, // bl target
        0x8b00_00a5, // add x5, x5, x0
        0x1000_0141, // adr x1, target
        0xb900_0022, // str w2, [x1]
        0xd50b_7b21, // dc cvau, x1
        0xd503_3b9f, // dsb ish
        0xd50b_7521, // ic ivau, x1
        0xd503_3b9f, // dsb ish
        0xd503_3fdf, // isb
        0x9400_0003, // bl target
        0x8b00_00a5, // add x5, x5, x0
        0xd400_0022, // hvc #0x1
        0xd280_0020, // target: mov x0, #0x1
        0xd65f_03c0, // ret
    ];
    machine.write(BASE, &body);
    let mut cpu = machine.cpu(0);
    cpu.set_x(2, 0xd280_0c80); // mov x0, #100
    assert_eq!(cpu.run(None), Exit::Hvc { imm: 1 });
    assert_eq!(cpu.x(5), 101);
}

#[test]
fn a_limit_inside_of_stale_code_executes_nothing_twice() {
    let machine = Machine::new(Counter::instructions(0));
    let (driver, code) = (BASE + 0x400, BASE);
    machine.write(driver, &[0xd400_0022, 0xd61f_00e0]); // hvc #1; br x7
    let body = [
        0x9100_0400, // add x0, x0, #1
        0x9100_0421, // add x1, x1, #1
        0x9100_0442, // add x2, x2, #1
        0x9100_0442, // add x2, x2, #1
        0x9100_0442, // add x2, x2, #1
        0x1400_00fb, // b driver
    ];
    machine.write(code, &body);
    let mut cpu = machine.cpu(0);
    cpu.start(driver, 0);
    let mut go = |at: u64, steps: u64| {
        while cpu.run(Some(u64::MAX >> 1)) != (Exit::Hvc { imm: 1 }) {}
        cpu.set_x(7, at);
        for n in 0..3 {
            cpu.set_x(n, 0);
        }
        let limit = cpu.retired() + 1 + steps;
        while cpu.run(Some(limit)) != Exit::Limit {}
        (cpu.x(0), cpu.x(1), cpu.x(2))
    };
    assert_eq!(go(code, 6), (1, 1, 3));
    // Not followed by an IC: the block at `code` stays as it was, and a shorter one comes to stand behind
    // its first instruction.
    machine.write(code + 8, &[0x1400_00fe]); // b driver
    assert_eq!(go(code + 4, 2), (0, 1, 0));
    for steps in 0..=2 {
        let (x0, x1, _) = go(code, steps);
        assert_eq!((x0, x1), (steps.min(1), u64::from(steps > 1)), "{steps} instructions");
    }
    let (x0, x1, _) = go(code, 3);
    assert_eq!((x0, x1), (1, 1), "the third is the old or the new one");
}

#[test]
fn atomics_and_exclusives_of_several_vcpus_lose_no_update() {
    const ROUNDS: u64 = 20_000;
    let machine = Machine::new(Counter::host(0));
    let body = [
        0xd280_0023, // mov x3, #0x1
        0xf823_001f, // 1: stadd x3, [x0]
        0xc85f_fc24, // 2: ldaxr x4, [x1]
        0x9100_0484, // add x4, x4, #0x1
        0xc805_fc24, // stlxr w5, x4, [x1]
        0x35ff_ffa5, // cbnz w5, 2b
        0xc87f_a0c7, // 3: ldaxp x7, x8, [x6]
        0x9100_04e7, // add x7, x7, #0x1
        0x9100_0908, // add x8, x8, #0x2
        0xc825_a0c7, // stlxp w5, x7, x8, [x6]
        0x35ff_ff85, // cbnz w5, 3b
        0xaa09_03ea, // 4: mov x10, x9
        0xf940_0169, // ldr x9, [x11]
        0x9100_052c, // add x12, x9, #0x1
        0xaa09_03ed, // mov x13, x9
        0xc8ad_7d6c, // cas x13, x12, [x11]
        0xeb09_01bf, // cmp x13, x9
        0x54ff_ff41, // b.ne 4b
        0xf100_0442, // subs x2, x2, #0x1
        0x54ff_fdc1, // b.ne 1b
        0xd400_0042, // hvc #0x2
    ];
    machine.write(BASE, &body);
    let cell = |n: u64| BASE + 0x10_0000 + 64 * n;
    std::thread::scope(|scope| {
        for index in 0..3 {
            let mut cpu = machine.cpu(index);
            for (register, value) in
                [(0, cell(0)), (1, cell(1)), (6, cell(2)), (11, cell(3)), (2, ROUNDS)]
            {
                cpu.set_x(register, value);
            }
            scope.spawn(move || assert_eq!(cpu.run(None), Exit::Hvc { imm: 2 }));
        }
    });
    for n in [0, 1, 2, 3] {
        assert_eq!(machine.read64(cell(n)), 3 * ROUNDS, "cell {n}");
    }
    assert_eq!(machine.read64(cell(2) + 8), 6 * ROUNDS, "the pair's second half");
}

#[test]
fn wfi_sleeps_until_the_timer_and_survives_a_snapshot() {
    let machine = Machine::new(Counter::instructions(0));
    let body = [
        0xd280_7d02, // mov x2, #0x3e8
        0xd51b_e342, // msr cntv_cval_el0, x2
        0xd280_0022, // mov x2, #0x1
        0xd51b_e322, // msr cntv_ctl_el0, x2
        0xd503_207f, // wfi
        0xd400_0022, // hvc #0x1
    ];
    machine.write(BASE, &body);
    let mut cpu = machine.cpu(0);
    assert_eq!(cpu.run(None), Exit::Wfi);
    let state = cpu.state();
    assert!(state.waiting);
    let mut cpu = machine.cpu(0);
    cpu.set_state(&state).unwrap();
    assert_eq!(cpu.run(None), Exit::Wfi, "a restored vCPU still sleeps");
    assert_eq!(cpu.next_timer(), Some(1000));
    cpu.skip_to(1000);
    assert_eq!(cpu.run(None), Exit::TimerLines { virt: true, phys: false });
    cpu.signals().set_irq(true);
    assert_eq!(cpu.run(None), Exit::Hvc { imm: 1 }, "a masked interrupt ends WFI and is not taken");
}

#[test]
fn a_kick_ends_a_run() {
    let machine = Machine::new(Counter::host(0));
    machine.write(BASE, &[0x1400_0000]); // b .
    let mut cpu = machine.cpu(0);
    let signals = cpu.signals();
    std::thread::scope(|scope| {
        let run = scope.spawn(move || cpu.run(None));
        signals.kick();
        assert_eq!(run.join().unwrap(), Exit::Kicked);
    });
}

fn some_state() -> CpuState {
    let machine = Machine::new(Counter::instructions(0));
    timer_program(&machine);
    let mut cpu = timer_cpu(&machine);
    run_to(&mut cpu, 3000);
    cpu.state()
}

#[test]
fn a_hostile_state_is_refused_by_name_and_changes_nothing() {
    let machine = Machine::new(Counter::instructions(3000));
    let mut cpu = machine.cpu(0);
    let before = cpu.state();
    let good = some_state();

    let mut bad = good.clone();
    bad.pstate = 0x10;
    assert_eq!(cpu.set_state(&bad), Err(StateError::Pstate(0x10)));
    let mut bad = good.clone();
    bad.fpcr = u32::MAX;
    assert!(matches!(cpu.set_state(&bad), Err(StateError::Fp { register: "FPCR", .. })));
    let mut bad = good.clone();
    let (reg, _) = bad.sysregs.remove(4);
    assert_eq!(cpu.set_state(&bad), Err(StateError::Missing(reg)));
    let mut bad = good.clone();
    bad.sysregs.swap(2, 3);
    assert!(matches!(cpu.set_state(&bad), Err(StateError::Order(_))));
    let mut bad = good.clone();
    bad.exclusive = Some((0, 3, 0));
    assert_eq!(cpu.set_state(&bad), Err(StateError::Exclusive(3)));
    let mut other = Cpu::new(&machine.shared, 0x8000_0001);
    assert!(matches!(other.set_state(&good), Err(StateError::Mpidr { .. })));

    assert_eq!(cpu.state(), before);
    cpu.set_state(&good).unwrap();
    assert_eq!(cpu.state(), good);
}

proptest! {
    /// Whatever stands in memory, and whatever the registers are, a run ends and nothing panics.
    #[test]
    fn random_words_never_panic_or_hang(
        words in proptest::collection::vec(any::<u32>(), 1..200),
        registers in proptest::collection::vec(any::<u64>(), 31),
        near in any::<bool>(),
    ) {
        let machine = Machine::new(Counter::instructions(0));
        machine.write(BASE + 0x1000, &words);
        let mut cpu = machine.cpu(0);
        cpu.start(BASE + 0x1000, 0);
        for (n, value) in (0..).zip(&registers) {
            let value = if near { BASE + value % (SIZE as u64 - 4096) } else { *value };
            cpu.set_x(n, value);
        }
        for _ in 0..200 {
            match cpu.run(Some(20_000)) {
                Exit::Limit => break,
                Exit::MmioRead { .. } => cpu.complete_mmio_read(u64::MAX),
                Exit::SysRegRead { .. } => cpu.complete_sysreg_read(0),
                Exit::Smc { .. } => cpu.undefined(),
                Exit::Wfi => match cpu.next_timer() {
                    Some(at) => cpu.skip_to(at.min(1 << 40)),
                    None => break,
                },
                _ => {}
            }
        }
        let state = cpu.state();
        prop_assert!(cpu.set_state(&state).is_ok());
    }
}
