//! What the identification registers announce is there, and nothing else is.

use squib_soft::{SysReg, id_registers};

use crate::bench::{
    Bench, CODE, DATA, EL0, EL1, ELR_EL1, Outcome, SCTLR_EL1, SPSR_EL1, TCR_EL1, get, set,
};

const PFR0: SysReg = SysReg::new(3, 0, 0, 4, 0);
const PFR1: SysReg = SysReg::new(3, 0, 0, 4, 1);
const ZFR0: SysReg = SysReg::new(3, 0, 0, 4, 4);
const SMFR0: SysReg = SysReg::new(3, 0, 0, 4, 5);
const DFR0: SysReg = SysReg::new(3, 0, 0, 5, 0);
const ISAR0: SysReg = SysReg::new(3, 0, 0, 6, 0);
const ISAR1: SysReg = SysReg::new(3, 0, 0, 6, 1);
const ISAR2: SysReg = SysReg::new(3, 0, 0, 6, 2);
const MMFR0: SysReg = SysReg::new(3, 0, 0, 7, 0);
const MMFR1: SysReg = SysReg::new(3, 0, 0, 7, 1);
const MMFR2: SysReg = SysReg::new(3, 0, 0, 7, 2);
const MIDR: SysReg = SysReg::new(3, 0, 0, 0, 0);
const CLIDR: SysReg = SysReg::new(3, 1, 0, 0, 1);
const CTR: SysReg = SysReg::new(3, 3, 0, 0, 1);
const DCZID: SysReg = SysReg::new(3, 3, 0, 0, 7);

/// An instruction that exists exactly if the field at this bit is at least the value; x3 is an address.
type Probe = (SysReg, u32, u64, u32, &'static str);

const PROBES: [Probe; 77] = [
    (PFR0, 8, 1, 0xd53c_4020, "mrs x0, elr_el2"),
    (PFR0, 12, 1, 0xd53e_1100, "mrs x0, scr_el3"),
    (PFR0, 16, 0, 0x1e22_2820, "fadd s0, s1, s2"),
    (PFR0, 16, 1, 0x1ee2_2820, "fadd h0, h1, h2"),
    (PFR0, 20, 0, 0x4e22_d420, "fadd v0.4s, v1.4s, v2.4s"),
    (PFR0, 20, 1, 0x0e42_1420, "fadd v0.4h, v1.4h, v2.4h"),
    (PFR0, 24, 1, 0xd538_cca0, "mrs x0, icc_sre_el1"),
    (PFR0, 28, 1, 0xd538_5300, "mrs x0, erridr_el1"),
    (PFR0, 32, 1, 0x2518_e3e0, "ptrue p0.b"),
    (PFR0, 40, 1, 0xd538_a500, "mrs x0, mpam1_el1"),
    (PFR0, 44, 1, 0xd53b_d200, "mrs x0, amcr_el0"),
    (PFR0, 48, 1, 0xd503_415f, "msr dit, #1"),
    (PFR0, 56, 2, 0xd538_d0e0, "mrs x0, scxtnum_el1"),
    (PFR1, 4, 2, 0xd503_413f, "msr ssbs, #1"),
    (PFR1, 8, 1, 0x9adf_1020, "irg x0, x1"),
    (PFR1, 8, 2, 0xd50b_7463, "dc gva, x3"),
    (PFR1, 24, 1, 0xd503_477f, "smstart"),
    (PFR1, 36, 1, 0xd538_4300, "mrs x0, allint"),
    (DFR0, 0, 6, 0xd530_0240, "mrs x0, mdscr_el1"),
    (DFR0, 4, 1, 0xd531_08e0, "mrs x0, trcidr0"),
    (DFR0, 8, 1, 0xd53b_9c00, "mrs x0, pmcr_el0"),
    (DFR0, 12, 1, 0xd530_0180, "mrs x0, dbgbvr1_el1"),
    (DFR0, 12, 2, 0xd530_0280, "mrs x0, dbgbvr2_el1"),
    (DFR0, 20, 1, 0xd530_01e0, "mrs x0, dbgwcr1_el1"),
    (DFR0, 20, 2, 0xd530_02e0, "mrs x0, dbgwcr2_el1"),
    (DFR0, 32, 1, 0xd538_99e0, "mrs x0, pmsidr_el1"),
    (DFR0, 36, 0, 0xd530_1380, "mrs x0, osdlr_el1"),
    (DFR0, 40, 1, 0xd538_1220, "mrs x0, trfcr_el1"),
    (DFR0, 44, 1, 0xd538_9b00, "mrs x0, trblimitr_el1"),
    (ISAR0, 4, 1, 0x4e28_4820, "aese v0.16b, v1.16b"),
    (ISAR0, 4, 2, 0x0ee2_e020, "pmull v0.1q, v1.1d, v2.1d"),
    (ISAR0, 8, 1, 0x5e02_0020, "sha1c q0, s1, v2.4s"),
    (ISAR0, 12, 1, 0x5e02_4020, "sha256h q0, q1, v2.4s"),
    (ISAR0, 12, 2, 0xce62_8020, "sha512h q0, q1, v2.2d"),
    (ISAR0, 16, 1, 0x1ac2_4020, "crc32b w0, w1, w2"),
    (ISAR0, 20, 2, 0xf821_0062, "ldadd x1, x2, [x3]"),
    (ISAR0, 24, 1, 0xd523_3060, "tstart x0"),
    (ISAR0, 28, 1, 0x2e42_8420, "sqrdmlah v0.4h, v1.4h, v2.4h"),
    (ISAR0, 32, 1, 0xce02_0c20, "eor3 v0.16b, v1.16b, v2.16b, v3.16b"),
    (ISAR0, 36, 1, 0xce42_0c20, "sm3ss1 v0.4s, v1.4s, v2.4s, v3.4s"),
    (ISAR0, 40, 1, 0xcec0_8420, "sm4e v0.4s, v1.4s"),
    (ISAR0, 44, 1, 0x0e82_9420, "sdot v0.2s, v1.8b, v2.8b"),
    (ISAR0, 48, 1, 0x0e22_ec20, "fmlal v0.2s, v1.2h, v2.2h"),
    (ISAR0, 52, 1, 0xd500_401f, "cfinv"),
    (ISAR0, 52, 2, 0xd500_405f, "axflag"),
    (ISAR0, 56, 1, 0xd508_811f, "tlbi vmalle1os"),
    (ISAR0, 56, 2, 0xd508_8623, "tlbi rvae1, x3"),
    (ISAR0, 60, 1, 0xd53b_2400, "mrs x0, rndr"),
    (ISAR1, 0, 1, 0xd50b_7c23, "dc cvap, x3"),
    (ISAR1, 0, 2, 0xd50b_7d23, "dc cvadp, x3"),
    (ISAR1, 4, 1, 0xdac1_0020, "pacia x0, x1"),
    (ISAR1, 12, 1, 0x1e7e_0000, "fjcvtzs w0, d0"),
    (ISAR1, 16, 1, 0x6e82_c420, "fcmla v0.4s, v1.4s, v2.4s, #0"),
    (ISAR1, 20, 1, 0xf8bf_c060, "ldapr x0, [x3]"),
    (ISAR1, 20, 2, 0xd940_0060, "ldapur x0, [x3]"),
    (ISAR1, 32, 1, 0x1e68_4000, "frint32z d0, d0"),
    (ISAR1, 36, 1, 0xd503_30ff, "sb"),
    (ISAR1, 40, 1, 0xd50b_7383, "cfp rctx, x3"),
    (ISAR1, 44, 1, 0x2e42_fc20, "bfdot v0.2s, v1.4h, v2.4h"),
    (ISAR1, 52, 1, 0x4e82_a420, "smmla v0.4s, v1.16b, v2.16b"),
    (ISAR1, 56, 1, 0xd503_3e3f, "dsb synxs"),
    (ISAR1, 60, 1, 0xf83f_d068, "ld64b x8, [x3]"),
    (ISAR2, 0, 2, 0xd503_1000, "wfet x0"),
    (ISAR2, 16, 1, 0x1901_0440, "cpyfp [x0]!, [x1]!, x2!"),
    (MMFR0, 60, 2, 0xd53b_e0a0, "mrs x0, cntpctss_el0"),
    (MMFR1, 16, 1, 0xd538_a400, "mrs x0, lorsa_el1"),
    (MMFR1, 16, 1, 0xc8df_7c60, "ldlar x0, [x3]"),
    (MMFR1, 20, 1, 0xd500_409f, "msr pan, #0"),
    (MMFR1, 20, 2, 0xd508_7903, "at s1e1rp, x3"),
    (MMFR2, 4, 1, 0xd500_407f, "msr uao, #0"),
    (MMFR2, 20, 1, 0xd539_0040, "mrs x0, ccsidr2_el1"),
    // Whatever else there is reads as zero.
    (ZFR0, 0, 0, 0xd538_0480, "mrs x0, id_aa64zfr0_el1"),
    (SMFR0, 0, 0, 0xd538_04a0, "mrs x0, id_aa64smfr0_el1"),
    // What no field speaks of.
    (DFR0, 0, 6, 0xd530_1180, "mrs x0, oslsr_el1"),
    (DFR0, 0, 6, 0xd533_0100, "mrs x0, mdccsr_el0"),
    (DFR0, 0, 6, 0xd533_0400, "mrs x0, dbgdtr_el0"),
    (DFR0, 0, 6, 0xd513_0500, "msr dbgdtrtx_el0, x0"),
];

/// Fields that are not zero and of which no single instruction tells, with the test that does.
const STATED: [(SysReg, u32, u64, &str); 8] = [
    (PFR0, 0, 1, "EL0 in AArch64 only: aarch32_is_an_illegal_return"),
    (PFR0, 4, 1, "EL1 in AArch64 only: the same"),
    (PFR0, 56, 1, "CSV2: nothing is executed speculatively"),
    (PFR0, 60, 1, "CSV3: the same"),
    (MMFR0, 0, 2, "40-bit physical addresses: output_addresses_have_40_bits"),
    (MMFR0, 4, 2, "16-bit ASIDs: tags, where two differ in their upper byte"),
    (MMFR0, 20, 1, "16 KiB pages: translation::pages_of_16_kib_are_translated_and_protected"),
    (MMFR0, 24, 15, "no 64 KiB pages"),
];

fn id(reg: SysReg) -> u64 {
    id_registers().into_iter().find(|(found, _)| *found == reg).map_or(0, |(_, value)| value)
}

#[test]
fn each_announced_feature_works_and_what_is_not_announced_is_undefined() {
    let mut bench = Bench::new();
    for (reg, shift, least, word, what) in PROBES {
        let field = id(reg) >> shift & 15;
        // 15 says of FP, AdvSIMD and OS double lock that there is none.
        let announced = field >= least && field != 15;
        let outcome = bench.one(word, EL1, |_| {});
        let exists = outcome != Outcome::Exception(0, 0, 0);
        assert_eq!(exists, announced, "{what}: {outcome:?}, field at {shift} of {reg} is {field}");
        assert!(
            !exists || matches!(outcome, Outcome::Done | Outcome::Exit(_)),
            "{what}: {outcome:?}"
        );
    }
    // No field is left out.
    for (reg, value) in id_registers() {
        if ![PFR0, DFR0, ISAR0, MMFR0, MMFR1].contains(&reg) {
            assert!([MIDR, CLIDR, CTR, DCZID].contains(&reg) || value == 0, "{reg} = {value:#x}");
            continue;
        }
        for shift in (0..64).step_by(4) {
            let field = value >> shift & 15;
            let probed = PROBES.iter().any(|probe| (probe.0, probe.1) == (reg, shift));
            let stated = STATED.iter().any(|it| (it.0, it.1, it.2) == (reg, shift, field));
            assert!(field == 0 || probed || stated, "field at {shift} of {reg} is {field}");
        }
    }
}

/// Reads `reg` as the guest does.
fn mrs(bench: &mut Bench, pstate: u64, reg: SysReg) -> Option<u64> {
    let mut state = bench.state(pstate);
    let word = 0xd520_0000 | u32::from(reg.0) << 5;
    (bench.run(&[word], &mut state) == Outcome::Done).then_some(state.x[0])
}

#[test]
fn identification_registers_read_as_listed_at_el1_and_not_at_all_at_el0() {
    let mut bench = Bench::new();
    for (reg, value) in id_registers() {
        assert_eq!(mrs(&mut bench, EL1, reg), Some(value), "{reg}");
        let for_el0 = reg == DCZID;
        assert_eq!(mrs(&mut bench, EL0, reg).is_some(), for_el0, "{reg} at EL0");
        // MSR to it.
        let word = 0xd500_0000 | u32::from(reg.0) << 5;
        assert_eq!(bench.one(word, EL1, |_| {}), Outcome::Exception(0, 0, 0), "{reg} is read-only");
    }
    // The rest of the space reads as zero (Arm ARM D17.1.1).
    for (crm, op2) in (1..8).flat_map(|crm| (0..8).map(move |op2| (crm, op2))) {
        let reg = SysReg::new(3, 0, 0, crm, op2);
        assert_eq!(mrs(&mut bench, EL1, reg), Some(id(reg)), "{reg}");
    }
}

#[test]
fn caches_are_described_the_same_everywhere() {
    let mut bench = Bench::new();
    let ctr = id(CTR);
    let line = 4u64 << (ctr >> 16 & 15);
    assert_eq!((line, 4 << (ctr & 15)), (64, 64));
    assert_eq!((ctr >> 28 & 1, ctr >> 29 & 1), (1, 0), "IDC, no DIC: see programs, IC IVAU");
    let clidr = id(CLIDR);
    assert_eq!((clidr & 7, clidr >> 3 & 7), (3, 0), "separate caches at level 1, none at level 2");
    assert_eq!((clidr >> 21 & 7, clidr >> 27 & 7), (0, 0), "IDC: nothing to clean for unification");
    let ccsidr = mrs(&mut bench, EL1, SysReg::new(3, 1, 0, 0, 0)).expect("CCSIDR_EL1");
    assert_eq!(16 << (ccsidr & 7), line);
}

#[test]
fn dczid_tells_el0_whether_dc_zva_is_allowed() {
    const DZE: u64 = 1 << 14;
    let mut bench = Bench::new();
    assert_eq!(4 << (id(DCZID) & 15), 64, "the block that alignment::dc_zva zeroes");
    for dze in [0, DZE] {
        let mut state = bench.state(EL0);
        let sctlr = get(&state, SCTLR_EL1) & !DZE | dze;
        set(&mut state, SCTLR_EL1, sctlr);
        let mut zva = state.clone();
        assert_eq!(bench.run(&[0xd53b_00e0], &mut state), Outcome::Done); // mrs x0, dczid_el0
        let prohibited = state.x[0] >> 4 & 1 != 0;
        let refused = bench.run(&[0xd50b_7423], &mut zva) != Outcome::Done; // dc zva, x3
        assert_eq!((prohibited, refused), (dze == 0, dze == 0));
    }
}

#[test]
fn aarch32_is_an_illegal_return() {
    let mut bench = Bench::new();
    for spsr in [0x1d0, 0x1d3, 0x3c1, 0x3c8, 0x3c9] {
        let mut state = bench.state(EL1);
        set(&mut state, SPSR_EL1, spsr);
        set(&mut state, ELR_EL1, CODE + 0x40);
        // eret, and what is not executed.
        let outcome = bench.run(&[0xd69f_03e0, 0], &mut state);
        assert_eq!(outcome, Outcome::Exception(0x0e, 0, 0), "SPSR {spsr:#x}: illegal state");
    }
}

#[test]
fn the_debug_channel_is_there_and_empty_and_closed_to_el0_by_tdcc() {
    const MDSCR: SysReg = SysReg::new(2, 0, 0, 2, 2);
    let mut bench = Bench::new();
    for (word, what) in
        [(0xd533_0100u32, "mrs x0, mdccsr_el0"), (0xd533_0400, "mrs x0, dbgdtr_el0")]
    {
        for (tdcc, open) in [(0, true), (1 << 12, false)] {
            let mut state = bench.state(EL0);
            set(&mut state, MDSCR, tdcc);
            let outcome = bench.run(&[word], &mut state);
            match outcome {
                Outcome::Done => assert_eq!(state.x[0], 0),
                Outcome::Exception(ec, _, _) => assert_eq!(ec, 0x18),
                Outcome::Exit(exit) => panic!("{exit:?}"),
            }
            assert_eq!(outcome == Outcome::Done, open, "{what}");
        }
    }
}

#[test]
fn output_addresses_have_40_bits_or_those_of_tcr_ips() {
    let mut bench = Bench::new();
    assert_eq!(id(MMFR0) & 15, 2);
    // The level 3 table of DATA, found as the walk does.
    let mut table = get(&bench.state(EL1), crate::bench::TTBR0_EL1);
    for shift in [39, 30, 21] {
        let entry = bench.machine.read64(table + 8 * (DATA >> shift & 511));
        table = entry & 0xffff_ffff_f000;
    }
    let slot = table + 8 * (DATA >> 12 & 511);
    let attributes = bench.machine.read64(slot) & 0xfff;
    for (ips, bits) in [(0u64, 32), (1, 36), (2, 40), (5, 40)] {
        for (bit, fits) in [(bits - 1, true), (bits, false), (47, false)] {
            bench.machine.write64(slot, 1u64 << bit | attributes);
            let outcome = bench.one(0xf940_0060, EL1, |state| {
                state.x[3] = DATA;
                let tcr = get(state, TCR_EL1) & !(7 << 32) | ips << 32;
                set(state, TCR_EL1, tcr);
            });
            // An address of a device, or an address size fault at level 3.
            let refused = outcome == Outcome::Exception(0x25, 0b00_0011, DATA);
            assert_eq!(!refused, fits, "IPS {ips}, bit {bit}: {outcome:?}");
        }
    }
}

#[test]
fn hardware_does_not_set_the_access_flag() {
    const HA_HD: u64 = 3 << 39;
    let mut bench = Bench::new();
    assert_eq!(id(MMFR1) & 15, 0);
    let mut table = get(&bench.state(EL1), crate::bench::TTBR0_EL1);
    for shift in [39, 30, 21] {
        table = bench.machine.read64(table + 8 * (DATA >> shift & 511)) & 0xffff_ffff_f000;
    }
    let slot = table + 8 * (DATA >> 12 & 511);
    let page = bench.machine.read64(slot) & !(1 << 10);
    bench.machine.write64(slot, page);
    let outcome = bench.one(0xf940_0060, EL1, |state| {
        state.x[3] = DATA;
        let tcr = get(state, TCR_EL1) | HA_HD;
        set(state, TCR_EL1, tcr);
    });
    assert_eq!(outcome, Outcome::Exception(0x25, 0b00_1011, DATA));
    assert_eq!(bench.machine.read64(slot), page);
}
