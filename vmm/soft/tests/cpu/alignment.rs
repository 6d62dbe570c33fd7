//! Alignment of the stack pointer, of data and of the PC.

use squib_soft::Exit;

use crate::bench::{
    Bench, CODE, DATA, DEVICE, DEVICE_READ_ONLY, EL0, EL1, MMIO, Outcome, SCTLR_A, SCTLR_EL1,
    SCTLR_M, SCTLR_SA, SCTLR_SA0, get, set,
};

const EC_SP: u64 = 0x26;
const EC_PC: u64 = 0x22;
const FSC_ALIGNMENT: u64 = 0b10_0001;
const WNR: u64 = 1 << 6;

fn data_abort(pstate: u64) -> u64 {
    if pstate == EL0 { 0x24 } else { 0x25 }
}

#[test]
fn a_load_or_store_by_a_misaligned_stack_pointer_faults_where_that_is_checked() {
    let mut bench = Bench::new();
    let words = [
        (0xf940_03e0u32, "ldr x0, [sp]"),
        (0xf900_07e0, "str x0, [sp, #8]"),
        (0xf841_07e0, "ldr x0, [sp], #16"),
        (0xf861_6be0, "ldr x0, [sp, x1]"),
        (0xf840_0be0, "ldtr x0, [sp]"),
        (0xa900_07e0, "stp x0, x1, [sp]"),
        (0xa940_07e0, "ldp x0, x1, [sp]"),
        (0x3dc0_03e0, "ldr q0, [sp]"),
        (0xad00_07e0, "stp q0, q1, [sp]"),
        (0xc85f_7fe0, "ldxr x0, [sp]"),
        (0xc802_7fe0, "stxr w2, x0, [sp]"),
        (0xc8df_ffe0, "ldar x0, [sp]"),
        (0xc89f_ffe0, "stlr x0, [sp]"),
        (0xf821_03e2, "ldadd x1, x2, [sp]"),
        (0xf821_83e2, "swp x1, x2, [sp]"),
        (0xc8a1_7fe2, "cas x1, x2, [sp]"),
        (0x4820_7fe2, "casp x0, x1, x2, x3, [sp]"),
        (0x4c40_73e0, "ld1 {v0.16b}, [sp]"),
        (0x0d00_03e0, "st1 {v0.b}[0], [sp]"),
    ];
    for (word, what) in words {
        for (pstate, enabled) in [(EL1, SCTLR_SA), (EL0, SCTLR_SA0)] {
            for (sp, checked) in [(8, true), (0, true), (8, false)] {
                let mut state = bench.state(pstate);
                (state.sp_el0, state.sp_el1) = (DATA + 0x100 + sp, DATA + 0x100 + sp);
                state.x[1] = 0x40;
                let others = (SCTLR_SA | SCTLR_SA0) & !enabled;
                let sctlr = get(&state, SCTLR_EL1) | if checked { enabled } else { others };
                set(&mut state, SCTLR_EL1, sctlr);
                let before = state.clone();
                let outcome = bench.run(&[word], &mut state);
                if sp == 8 && checked {
                    assert_eq!(outcome, Outcome::Exception(EC_SP, 0, 0), "{what} at {pstate:#x}");
                    assert_eq!((state.x, state.v), (before.x, before.v), "{what} changes nothing");
                } else if !what.starts_with("casp") {
                    // CASP has a rule of its own for 8 bytes.
                    assert_eq!(
                        outcome,
                        Outcome::Done,
                        "{what} at {pstate:#x} with {sp}, {checked}"
                    );
                }
            }
        }
    }
    for (word, what) in [(0xf980_03e0, "prfm pldl1keep, [sp]"), (0x9100_13e0, "add x0, sp, #4")] {
        let outcome = bench.one(word, EL1, |state| {
            state.sp_el1 += 8;
            let sctlr = get(state, SCTLR_EL1) | SCTLR_SA;
            set(state, SCTLR_EL1, sctlr);
        });
        assert_eq!(outcome, Outcome::Done, "{what}");
    }
}

/// Instructions on x3 with what they access, in bytes for the alignment.
const ACCESSES: [(u32, u64, bool, &str); 9] = [
    (0xf940_0060, 8, false, "ldr x0, [x3]"),
    (0xb900_0060, 4, true, "str w0, [x3]"),
    (0x7940_0060, 2, false, "ldrh w0, [x3]"),
    (0xa940_0460, 8, false, "ldp x0, x1, [x3]"),
    (0x2940_0460, 4, false, "ldp w0, w1, [x3]"),
    (0x2900_0460, 4, true, "stp w0, w1, [x3]"),
    (0x3dc0_0060, 16, false, "ldr q0, [x3]"),
    (0xad40_0460, 16, false, "ldp q0, q1, [x3]"),
    (0x4c40_7860, 4, false, "ld1 {v0.4s}, [x3]"),
];

/// Runs every access at every offset of `page` that can make a difference.
fn check(page: u64, sctlr: u64, mmu: bool, faults: bool) {
    let mut bench = Bench::new();
    for (word, align, write, what) in ACCESSES {
        for pstate in [EL0, EL1] {
            for offset in [0, 1, 2, 4, 8, 12, 0x1000 - align / 2] {
                let va = page + offset;
                let mut state = bench.state(pstate);
                state.x[3] = va;
                let base = get(&state, SCTLR_EL1) | sctlr;
                set(&mut state, SCTLR_EL1, if mmu { base } else { base & !SCTLR_M });
                let outcome = bench.run(&[word], &mut state);
                let expected = if faults && !va.is_multiple_of(align) {
                    let iss = FSC_ALIGNMENT | if write { WNR } else { 0 };
                    Outcome::Exception(data_abort(pstate), iss, va)
                } else {
                    Outcome::Done
                };
                assert_eq!(outcome, expected, "{what} at {va:#x}, {pstate:#x}");
            }
        }
    }
}

#[test]
fn data_in_normal_memory_need_no_alignment() {
    check(DATA, 0, true, false);
}

#[test]
fn data_in_device_memory_must_be_aligned() {
    check(DEVICE, 0, true, true);
}

#[test]
fn with_the_mmu_off_data_must_be_aligned() {
    check(DATA, 0, false, true);
}

#[test]
fn with_sctlr_a_data_must_be_aligned_everywhere() {
    check(DATA, SCTLR_A, true, true);
}

#[test]
fn alignment_by_memory_type_comes_before_permission_and_by_sctlr_a_before_translation() {
    let mut bench = Bench::new();
    let store = 0xf900_0060; // str x0, [x3]
    let at = |bench: &mut Bench, va: u64, sctlr: u64| {
        bench.one(store, EL1, |state| {
            state.x[3] = va;
            let sctlr = get(state, SCTLR_EL1) | sctlr;
            set(state, SCTLR_EL1, sctlr);
        })
    };
    let alignment = WNR | FSC_ALIGNMENT;
    let va = DEVICE_READ_ONLY + 4;
    assert_eq!(at(&mut bench, va, 0), Outcome::Exception(0x25, alignment, va));
    let permission = WNR | 0b1111;
    let va = DEVICE_READ_ONLY + 8;
    assert_eq!(at(&mut bench, va, 0), Outcome::Exception(0x25, permission, va));
    let unmapped = DATA + 0x8001;
    let translation = WNR | 0b0111;
    assert_eq!(at(&mut bench, unmapped, 0), Outcome::Exception(0x25, translation, unmapped));
    assert_eq!(at(&mut bench, unmapped, SCTLR_A), Outcome::Exception(0x25, alignment, unmapped));
}

#[test]
fn an_access_to_a_device_must_be_aligned_and_tells_where_it_goes() {
    let mut bench = Bench::new();
    let load = |bench: &mut Bench, va: u64| bench.one(0xb940_0060, EL1, |state| state.x[3] = va);
    let exit = Exit::MmioRead { address: MMIO + 4, size: 4 };
    assert_eq!(load(&mut bench, MMIO + 4), Outcome::Exit(exit));
    let va = MMIO + 6;
    assert_eq!(load(&mut bench, va), Outcome::Exception(0x25, FSC_ALIGNMENT, va));
}

#[test]
fn dc_zva_zeroes_a_block_of_normal_memory_and_faults_in_device_memory() {
    let mut bench = Bench::new();
    for n in 0..4096 / 8 {
        bench.machine.write64(DATA + 8 * n, u64::MAX);
    }
    let zva = 0xd50b_7423; // dc zva, x3
    assert_eq!(bench.one(zva, EL1, |state| state.x[3] = DATA + 0x123), Outcome::Done);
    for n in 0..4096 / 8 {
        let zeroed = (0x100..0x140).contains(&(8 * n));
        assert_eq!(bench.machine.read64(DATA + 8 * n), if zeroed { 0 } else { u64::MAX });
    }
    let va = DEVICE + 0x40;
    let outcome = bench.one(zva, EL1, |state| state.x[3] = va);
    assert_eq!(outcome, Outcome::Exception(0x25, WNR | FSC_ALIGNMENT, va));
}

#[test]
fn a_branch_to_a_misaligned_address_faults_there() {
    let mut bench = Bench::new();
    let target = CODE + 0x42;
    let mut state = bench.state(EL0);
    state.x[3] = target;
    // br x3, and the instruction that is not fetched.
    let outcome = bench.run(&[0xd61f_0060, 0], &mut state);
    assert_eq!(outcome, Outcome::Exception(EC_PC, 0, target));
}
