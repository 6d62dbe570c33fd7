//! Page tables, permissions, and translations that are changed.

use squib_soft::{Counter, Exit};

use crate::common::{BASE, Machine, PXN, READ_ONLY, Tables, USER, VALID_PAGE};

/// TCR_EL1.EPD1.
const NO_UPPER_HALF: u64 = 1 << 23;

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
        let mut cpu = tables.boot(tables.tcr() | NO_UPPER_HALF);
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
    let mut cpu = tables.boot(tables.tcr() | NO_UPPER_HALF);
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
