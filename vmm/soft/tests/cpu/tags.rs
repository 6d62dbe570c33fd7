//! Code and data at addresses with a tag in their top byte, before and after their mapping changes.

use proptest::prelude::*;
use squib_soft::{Counter, Cpu, Exit};

use crate::common::{BASE, Machine, NOT_GLOBAL, READ_ONLY, Tables, USER, VALID_PAGE};

/// TCR_EL1.AS, TBI0 and TBI1: 16-bit ASIDs, and the top byte is ignored in both halves.
const TCR: u64 = 1 << 36 | 1 << 37 | 1 << 38;
const DRIVER: u64 = BASE + 0x400;
const STUBS: u64 = BASE + 0x1000;
const VECTORS: u64 = BASE + 0x8000;
/// What the address under test is mapped to, one after the other.
const PAGES: [u64; 2] = [BASE + 0x4_0000, BASE + 0x5_0000];
const LOWER: u64 = 0x40_0000;
const UPPER: u64 = 0xffff_8000_0040_0000;

/// How the second visit comes to see the second page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    /// The mapping is changed, and this instruction (on x14) makes it visible.
    Tlbi(u32),
    /// Other tables and another ASID.
    OtherProcess,
    /// The mapping is changed, and an ASID is used that nothing is cached for.
    FreshAsid,
}

const NOP: u32 = 0xd503_201f;
const TLBI_ASIDE1: u32 = 0xd508_874e;
const TLBI_ASIDE1IS: u32 = 0xd508_834e;
const CHANGES: [Change; 14] = [
    Change::Tlbi(0xd508_871f), // tlbi vmalle1
    Change::Tlbi(0xd508_831f), // tlbi vmalle1is
    Change::Tlbi(0xd508_872e), // tlbi vae1, x14
    Change::Tlbi(0xd508_832e), // tlbi vae1is, x14
    Change::Tlbi(TLBI_ASIDE1),
    Change::Tlbi(TLBI_ASIDE1IS),
    Change::Tlbi(0xd508_876e), // tlbi vaae1, x14
    Change::Tlbi(0xd508_836e), // tlbi vaae1is, x14
    Change::Tlbi(0xd508_87ae), // tlbi vale1, x14
    Change::Tlbi(0xd508_83ae), // tlbi vale1is, x14
    Change::Tlbi(0xd508_87ee), // tlbi vaale1, x14
    Change::Tlbi(0xd508_83ee), // tlbi vaale1is, x14
    Change::OtherProcess,
    Change::FreshAsid,
];

/// How the guest gets to the address under test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    EretToEl0,
    EretToEl1,
    Branch,
}

/// One go to the address under test.
#[derive(Clone, Copy, Debug)]
struct Visit {
    va: u64,
    tag: u8,
    asid: u64,
    lower: u64,
    upper: u64,
    /// Executed before it.
    tlbi: u32,
    /// x14.
    argument: u64,
}

fn tagged(va: u64, tag: u8) -> u64 {
    va & !(0xff << 56) | u64::from(tag) << 56
}

/// Code that says which page it is on and where it is, and reads the page's number as data.
fn write_pages(machine: &Machine) {
    for (n, page) in (1..).zip(PAGES) {
        let code = [
            0x1000_0001,          // adr x1, .
            0xf940_00a4,          // ldr x4, [x5]
            0xd280_0000 | n << 5, // mov x0, #n
            0xd400_0001,          // svc #0
        ];
        machine.write(page, &code);
        machine.write64(page + 0x800, u64::from(n));
    }
}

fn write_driver(machine: &Machine) {
    machine.write(DRIVER, &[0xd400_0022, 0xd61f_00e0]); // hvc #1; br x7
    let vector = [
        0xd538_4023, // mrs x3, elr_el1
        0xd538_5206, // mrs x6, esr_el1
        0xd400_0122, // hvc #9
        0xd61f_0220, // br x17
    ];
    machine.write(VECTORS + 0x200, &vector);
    machine.write(VECTORS + 0x400, &vector);
}

/// The code of one visit, which lies apart from that of the others.
fn write_stub(machine: &Machine, at: u64, tlbi: u32, way: Way) {
    let go = match way {
        Way::Branch => [NOP, NOP, 0xd61f_0120], // br x9
        // msr elr_el1, x9; msr spsr_el1, x8; eret
        Way::EretToEl0 | Way::EretToEl1 => [0xd518_4029, 0xd518_4008, 0xd69f_03e0],
    };
    let before = [
        0xd518_200c, // msr ttbr0_el1, x12
        0xd518_202d, // msr ttbr1_el1, x13
        0xd503_3fdf, // isb
        tlbi,
        0xd503_3b9f, // dsb ish
        0xd503_3fdf, // isb
    ];
    machine.write(at, &before);
    machine.write(at + 4 * before.len() as u64, &go);
}

/// Carries out a visit; the numbers of the pages whose code ran and whose data was read.
fn go(machine: &Machine, cpu: &mut Cpu, at: u64, way: Way, visit: Visit) -> (u64, u64) {
    assert_eq!(cpu.run(None), Exit::Hvc { imm: 1 }, "the driver asks what to do");
    let Visit { va, tag, asid, lower, upper, tlbi, argument } = visit;
    write_stub(machine, at, tlbi, way);
    let spsr = if way == Way::EretToEl0 { 0x3c0 } else { 0x3c5 };
    for (n, value) in [
        (5, tagged(va, tag) + 0x800),
        (7, at),
        (8, spsr),
        (9, tagged(va, tag)),
        (12, lower | asid << 48),
        (13, upper),
        (14, argument),
        (17, DRIVER),
    ] {
        cpu.set_x(n, value);
    }
    assert_eq!(cpu.run(None), Exit::Hvc { imm: 9 });
    assert_eq!(cpu.x(6), 0x15 << 26 | 1 << 25, "it ended with its SVC, not by a fault");
    assert_eq!((cpu.x(1), cpu.x(3)), (va, va + 16), "neither PC nor ELR has the tag");
    (cpu.x(0), cpu.x(4))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn code_and_data_at_tagged_addresses_are_what_the_tables_say(
        granule in prop_oneof![Just(12u32), Just(14)],
        va in prop_oneof![Just(LOWER), Just(UPPER)],
        way in prop_oneof![Just(Way::EretToEl0), Just(Way::EretToEl1), Just(Way::Branch)],
        change in proptest::sample::select(&CHANGES[..]),
        tags in any::<[u8; 3]>(),
    ) {
        let machine = Machine::new(Counter::host(0));
        write_pages(&machine);
        write_driver(&machine);
        let page = VALID_PAGE | USER | READ_ONLY | NOT_GLOBAL;
        let mut tables: Vec<_> = [BASE + 0x20_0000, BASE + 0x30_0000]
            .map(|root| Tables::at(&machine, granule, root))
            .into();
        for (tables, to) in tables.iter_mut().zip(PAGES) {
            for n in 0..(0x10_000u64 >> granule) {
                let at = BASE + (n << granule);
                tables.map(at, at, VALID_PAGE);
            }
            tables.map(va, to, page);
        }
        let mut cpu = tables[0].boot(tables[0].tcr() | TCR);
        cpu.set_x(9, DRIVER);

        let root = tables[0].root;
        let first = Visit {
            va, tag: tags[0], asid: 1, lower: root, upper: root, tlbi: NOP, argument: 0,
        };
        prop_assert_eq!(go(&machine, &mut cpu, STUBS, way, first), (1, 1));
        let second = match change {
            Change::OtherProcess => {
                let root = tables[1].root;
                Visit { tag: tags[1], asid: 0x101, lower: root, upper: root, ..first }
            }
            Change::FreshAsid => {
                tables[0].map(va, PAGES[1], page);
                Visit { tag: tags[1], asid: 0x101, ..first }
            }
            Change::Tlbi(tlbi) => {
                tables[0].map(va, PAGES[1], page);
                let by_address = va << 8 >> 20 | 1 << 48;
                let argument =
                    if matches!(tlbi, TLBI_ASIDE1 | TLBI_ASIDE1IS) { 1 << 48 } else { by_address };
                Visit { tag: tags[1], tlbi, argument, ..first }
            }
        };
        prop_assert_eq!(go(&machine, &mut cpu, STUBS + 64, way, second), (2, 2));
        // Back to where it began, by way of an invalidation where what is cached for it is out of date.
        let (tlbi, expected) = match change {
            Change::OtherProcess => (NOP, 1),
            Change::FreshAsid => (TLBI_ASIDE1, 2),
            Change::Tlbi(_) => (NOP, 2),
        };
        let third = Visit { tag: tags[2], tlbi, argument: 1 << 48, ..first };
        prop_assert_eq!(go(&machine, &mut cpu, STUBS + 128, way, third), (expected, expected));
    }
}

#[test]
fn without_tbi_a_tagged_branch_faults_at_its_whole_address() {
    let machine = Machine::new(Counter::host(0));
    write_pages(&machine);
    let mut tables = Tables::new(&machine, 12);
    for n in 0..16 {
        tables.map(BASE + n * 4096, BASE + n * 4096, VALID_PAGE);
    }
    tables.map(LOWER, PAGES[0], VALID_PAGE);
    write_driver(&machine);
    let mut cpu = tables.boot(tables.tcr());
    let at = tagged(LOWER, 0x5a);
    cpu.set_x(9, at);
    assert_eq!(cpu.run(None), Exit::Hvc { imm: 9 });
    // Instruction abort from EL1, a translation fault at level 0.
    assert_eq!((cpu.x(6), cpu.x(3)), (0x21 << 26 | 1 << 25 | 0b00_0100, at));
}

#[test]
fn with_the_mmu_off_tbi_counts_too() {
    let machine = Machine::new(Counter::host(0));
    write_pages(&machine);
    write_driver(&machine);
    let code = [
        0xd518_2040, // msr tcr_el1, x0
        0xd518_c002, // msr vbar_el1, x2
        0xd503_3fdf, // isb
        0xd61f_0120, // br x9
    ];
    machine.write(BASE, &code);
    for (tcr, tag, runs) in [(TCR, 0x77, true), (TCR, 0, true), (0, 0, true), (0, 0x77, false)] {
        let mut cpu = machine.cpu(0);
        let at = tagged(PAGES[1], tag);
        for (n, value) in [(0, tcr), (2, VECTORS), (5, at + 0x800), (9, at)] {
            cpu.set_x(n, value);
        }
        assert_eq!(cpu.run(None), Exit::Hvc { imm: 9 });
        if runs {
            let pc = PAGES[1];
            assert_eq!((cpu.x(0), cpu.x(4), cpu.x(1), cpu.x(3)), (2, 2, pc, pc + 16));
        } else {
            assert_eq!((cpu.x(6), cpu.x(3)), (0x21 << 26 | 1 << 25, at), "address size, level 0");
        }
    }
}

#[test]
fn a_saved_pc_with_a_tag_is_restored_as_it_is_and_runs_without_it() {
    let machine = Machine::new(Counter::host(0));
    write_pages(&machine);
    write_driver(&machine);
    let mut tables = Tables::new(&machine, 12);
    for n in 0..16 {
        tables.map(BASE + n * 4096, BASE + n * 4096, VALID_PAGE);
    }
    tables.map(LOWER, PAGES[0], VALID_PAGE | USER | READ_ONLY);
    let mut cpu = tables.boot(tables.tcr() | TCR);
    cpu.set_x(9, DRIVER);
    assert_eq!(cpu.run(None), Exit::Hvc { imm: 1 });
    let mut state = cpu.state();
    (state.pc, state.pstate, state.x[5]) = (tagged(LOWER, 0x9b), 0x3c0, LOWER + 0x800);
    cpu.set_state(&state).unwrap();
    assert_eq!(cpu.state(), state);
    assert_eq!(cpu.run(None), Exit::Hvc { imm: 9 });
    assert_eq!((cpu.x(0), cpu.x(1), cpu.x(3)), (1, LOWER, LOWER + 16));
}
