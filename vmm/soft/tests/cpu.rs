//! Whole programs on one or more vCPUs, from their words to what is left in registers and memory.

use std::sync::Arc;

use proptest::prelude::*;
use squib_soft::{Counter, Cpu, CpuState, Exit, Ram, Shared, StateError};

const BASE: u64 = 0x8000_0000;
const SIZE: usize = 4 << 20;

/// Zeroed RAM of [`SIZE`] bytes at [`BASE`], aligned to a page.
#[repr(align(4096))]
struct Page(#[expect(dead_code, reason = "only its size and alignment count")] [u8; 4096]);

struct Machine {
    shared: Arc<Shared>,
    host: *mut u8,
}

impl Machine {
    fn new(counter: Counter) -> Self {
        let mut pages: Vec<Page> = Vec::new();
        pages.resize_with(SIZE / 4096, || Page([0; 4096]));
        let host = pages.as_mut_ptr().cast::<u8>();
        // SAFETY: the vector lives in `keep` and is not touched as such any more.
        let ram = unsafe { Ram::new(host, SIZE as u64, BASE, Arc::new(Keep(pages))) };
        Self { shared: Shared::new(ram, Arc::new(counter)), host }
    }

    fn write(&self, at: u64, words: &[u32]) {
        for (n, word) in words.iter().enumerate() {
            // SAFETY: tests write inside of RAM, while no vCPU runs.
            unsafe { self.host.add((at - BASE) as usize + 4 * n).cast::<u32>().write(*word) };
        }
    }

    fn write64(&self, at: u64, value: u64) {
        self.write(at, &[value as u32, (value >> 32) as u32]);
    }

    fn read64(&self, at: u64) -> u64 {
        // SAFETY: tests read inside of RAM, while no vCPU runs.
        unsafe { self.host.add((at - BASE) as usize).cast::<u64>().read_volatile() }
    }

    fn cpu(&self, index: u64) -> Cpu {
        let mut cpu = Cpu::new(&self.shared, 0x8000_0000 | index);
        cpu.start(BASE, 0);
        cpu
    }

    /// All of RAM, for comparing two machines.
    fn bytes(&self) -> Vec<u8> {
        // SAFETY: SIZE bytes of RAM, while no vCPU runs.
        unsafe { std::slice::from_raw_parts(self.host, SIZE) }.to_vec()
    }
}

struct Keep(#[expect(dead_code, reason = "held for its memory")] Vec<Page>);

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

/// Page tables: a 2 MiB (or with 16 KiB pages 32 MiB) identity block would hide page permissions, so
/// every test page is mapped on its own.
struct Tables<'a> {
    machine: &'a Machine,
    /// log2 of the page size: 12 or 14.
    granule: u32,
    next: u64,
    root: u64,
}

const VALID_PAGE: u64 = 3 | 1 << 10;
const USER: u64 = 1 << 6;
const READ_ONLY: u64 = 1 << 7;
const PXN: u64 = 1 << 53;

impl<'a> Tables<'a> {
    fn new(machine: &'a Machine, granule: u32) -> Self {
        let root = BASE + 0x20_0000;
        Self { machine, granule, next: root + (1 << granule), root }
    }

    fn map(&mut self, va: u64, pa: u64, attributes: u64) {
        let stride = self.granule - 3;
        let first = if self.granule == 12 { 0 } else { 1 };
        let mut table = self.root;
        for level in first..4 {
            let index = va >> (self.granule + stride * (3 - level)) & ((1 << stride) - 1);
            let entry = table + 8 * index;
            if level == 3 {
                self.machine.write64(entry, pa | attributes);
                return;
            }
            if self.machine.read64(entry) == 0 {
                self.machine.write64(entry, self.next | 3);
                self.next += 1 << self.granule;
            }
            table = self.machine.read64(entry) & ((1 << 48) - 1) & !((1 << self.granule) - 1);
        }
    }

    /// Boot code at EL1 that turns the MMU on and jumps to x9.
    fn boot(&self) -> Cpu {
        // 48-bit addresses (4 KiB) or 47-bit (16 KiB, so that the walk begins at level 1).
        let (tsz, tg) = if self.granule == 12 { (16, 0) } else { (17, 2) };
        let tcr: u64 = tsz | tg << 14 | 1 << 23;
        let code = [
            0xd518_2040, // msr tcr_el1, x0
            0xd518_2001, // msr ttbr0_el1, x1
            0xd518_c002, // msr vbar_el1, x2
            0xd518_1003, // msr sctlr_el1, x3
            0xd503_3fdf, // isb
            0xd61f_0120, // br x9
        ];
        self.machine.write(BASE, &code);
        let mut cpu = self.machine.cpu(0);
        for (n, value) in [(0, tcr), (1, self.root), (2, BASE + 0x8000), (3, 0x30d0_0801)] {
            cpu.set_x(n, value);
        }
        cpu
    }
}

/// A handler at the current-EL synchronous vector that shows ESR, FAR and ELR.
fn install_handler(machine: &Machine) {
    let code = [
        0xd538_520a, // mrs x10, esr_el1
        0xd538_600b, // mrs x11, far_el1
        0xd538_402c, // mrs x12, elr_el1
        0xd400_00e2, // hvc #0x7
    ];
    machine.write(BASE + 0x8200, &code);
}

fn translation_works(granule: u32) {
    let machine = Machine::new(Counter::host(0));
    let page = 1u64 << granule;
    let mut tables = Tables::new(&machine, granule);
    // The boot code and the vectors, by identity.
    for n in 0..(0x10_000 / page) {
        tables.map(BASE + n * page, BASE + n * page, VALID_PAGE);
    }
    let (code, data, read_only, user, no_exec, no_flag) =
        (0x40_0000u64, 0x50_0000, 0x60_0000, 0x70_0000, 0x72_0000, 0x74_0000);
    let at = |n: u64| BASE + 0x4_0000 + n * 0x4000;
    tables.map(code, at(0), VALID_PAGE);
    tables.map(data, at(1), VALID_PAGE);
    tables.map(data + page, at(2), VALID_PAGE);
    tables.map(read_only, at(3), VALID_PAGE | READ_ONLY);
    tables.map(user, at(4), VALID_PAGE | USER);
    tables.map(no_exec, at(5), VALID_PAGE | PXN);
    tables.map(no_flag, at(6), 3);
    install_handler(&machine);
    let run = |words: &[u32], registers: &[(u32, u64)], jump: u64| {
        machine.write(at(0), words);
        let mut cpu = tables.boot();
        cpu.set_x(9, jump);
        for (n, value) in registers {
            cpu.set_x(*n, *value);
        }
        let exit = cpu.run(None);
        (exit, cpu)
    };
    let store = [0xf900_0085, 0xf940_0086, 0xd400_0022]; // str x5, [x4]; ldr x6, [x4]; hvc #1

    // Across two virtual pages that are not neighbours in RAM by accident of order.
    let edge = data + page - 3;
    let (exit, cpu) = run(&store, &[(4, edge), (5, 0x1122_3344_5566_7788)], code);
    assert_eq!(exit, Exit::Hvc { imm: 1 });
    assert_eq!(cpu.x(6), 0x1122_3344_5566_7788);
    assert_eq!(machine.read64(at(1) + page - 8) >> 40, 0x66_7788);
    assert_eq!(machine.read64(at(2)) & 0xff_ffff_ffff, 0x11_2233_4455);

    let level = 3;
    let abort = |iss: u64| 0x25u64 << 26 | 1 << 25 | iss;
    let cases = [
        (read_only + 8, abort(1 << 6 | 0b1100 | level), "a write to a read-only page"),
        (no_flag, abort(1 << 6 | 0b1000 | level), "a page without access flag"),
        (data + 2 * page, abort(1 << 6 | 0b0100 | level), "a page that is not mapped"),
    ];
    for (address, esr, what) in cases {
        let (exit, cpu) = run(&store, &[(4, address), (5, 1)], code);
        assert_eq!(exit, Exit::Hvc { imm: 7 }, "{what}");
        assert_eq!((cpu.x(10), cpu.x(11), cpu.x(12)), (esr, address, code), "{what}");
    }
    // PAN is set by the exception level's own choice: msr pan, #1 before the store.
    let with_pan = [0xd500_419f, 0xf900_0085, 0xd400_0022];
    let (exit, cpu) = run(&with_pan, &[(4, user), (5, 1)], code);
    assert_eq!(exit, Exit::Hvc { imm: 7 });
    assert_eq!(cpu.x(10), abort(1 << 6 | 0b1100 | level), "PAN refuses a user page");
    // sttr works on the user page with PAN set.
    let unprivileged = [0xd500_419f, 0xf800_0885, 0xd400_0022];
    let (exit, _) = run(&unprivileged, &[(4, user), (5, 77)], code);
    assert_eq!(exit, Exit::Hvc { imm: 1 });
    assert_eq!(machine.read64(at(4)), 77);
    // Execution.
    let (exit, cpu) = run(&store, &[], no_exec);
    assert_eq!(exit, Exit::Hvc { imm: 7 });
    assert_eq!(cpu.x(10), 0x21 << 26 | 1 << 25 | 0b1100 | level);
    assert_eq!((cpu.x(11), cpu.x(12)), (no_exec, no_exec));
    let (exit, cpu) = run(&store, &[], code + 2);
    assert_eq!(exit, Exit::Hvc { imm: 7 });
    assert_eq!(cpu.x(10), 0x22 << 26 | 1 << 25, "an unaligned PC");
}

#[test]
fn pages_of_4_kib_are_translated_and_protected() {
    translation_works(12);
}

#[test]
fn pages_of_16_kib_are_translated_and_protected() {
    translation_works(14);
}

#[test]
fn tlbi_makes_a_changed_mapping_visible() {
    let machine = Machine::new(Counter::host(0));
    let mut tables = Tables::new(&machine, 12);
    for n in 0..16 {
        tables.map(BASE + n * 4096, BASE + n * 4096, VALID_PAGE);
    }
    let (code, data) = (0x40_0000, 0x50_0000);
    tables.map(code, BASE + 0x4_0000, VALID_PAGE);
    tables.map(data, BASE + 0x4_4000, VALID_PAGE);
    // A page for the level 3 table that maps `data`, so that the guest can change it.
    let entry = machine.read64(tables.root) & !0xfff & ((1 << 48) - 1);
    let entry = machine.read64(entry) & !0xfff & ((1 << 48) - 1);
    let entry = machine.read64(entry + 8 * (data >> 21)) & !0xfff & ((1 << 48) - 1);
    let slot = entry + 8 * (data >> 12 & 511);
    let window = 0x60_0000;
    tables.map(window, slot & !0xfff, VALID_PAGE);
    machine.write64(BASE + 0x4_4000, 1);
    machine.write64(BASE + 0x4_5000, 2);
    install_handler(&machine);
    let words = [
        0xf940_0086, // ldr x6, [x4]
        0xf900_0107, // str x7, [x8]
        0xd503_3b9f, // dsb ish
        0xd508_832e, // tlbi vae1is, x14
        0xd503_3b9f, // dsb ish
        0xd503_3fdf, // isb
        0xf940_008f, // ldr x15, [x4]
        0xd400_0022, // hvc #1
    ];
    machine.write(BASE + 0x4_0000, &words);
    let mut cpu = tables.boot();
    for (n, value) in [
        (9, code),
        (4, data),
        (7, (BASE + 0x4_5000) | VALID_PAGE),
        (8, window + (slot & 0xfff)),
        (14, data >> 12),
    ] {
        cpu.set_x(n, value);
    }
    assert_eq!(cpu.run(None), Exit::Hvc { imm: 1 });
    assert_eq!((cpu.x(6), cpu.x(15)), (1, 2));
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
