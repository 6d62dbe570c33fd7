//! A vCPU: whose it is, where its program counter stands, and which registers it has.

use applevisor_sys::*;
use squib_hvf_stand_in::{Host, Session};

use super::{BASE, Raw, create_gic, noticed, vcpu, vm};

/// Where a run ends with a WFI.
const SHOWS_WFI: Host = Host { shows_wfi: true, ..Host::USUAL };

#[test]
fn a_vcpu_belongs_to_its_thread_and_its_life() {
    let session = Session::begin();
    vm(true);
    let vcpu = vcpu();
    let mut value = 0;
    // SAFETY: pointers are to live values.
    unsafe {
        assert_ne!(hv_vcpu_run(vcpu), 0);
        noticed(&session, "without MPIDR_EL1");
        assert_ne!(hv_gic_set_state([0u8].as_ptr().cast(), 1), 0);
        noticed(&session, "before there are vCPUs");
        assert_eq!(hv_vcpu_set_sys_reg(vcpu, hv_sys_reg_t::MPIDR_EL1, 0x8000_0000), 0);
        assert_ne!(hv_vcpu_set_sys_reg(vcpu, hv_sys_reg_t::ID_AA64PFR0_EL1, 0), 0);
        noticed(&session, "identification register");
        assert_ne!(hv_gic_set_icc_reg(vcpu, hv_gic_icc_reg_t::RPR_EL1, 0), 0);
        noticed(&session, "read-only");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut value = 0;
                assert_ne!(hv_vcpu_get_reg(vcpu, hv_reg_t::PC, &mut value), 0);
            });
        });
        noticed(&session, "from another thread");
        assert_ne!(create_gic(), 0);
        noticed(&session, "after another one or after a vCPU");
        assert_ne!(hv_gic_set_spi(910, true), 0);
        noticed(&session, "has no line");
        assert_ne!(hv_vm_destroy(), 0);
        noticed(&session, "with vCPUs");
        assert_eq!(hv_vcpu_destroy(vcpu), 0);
        assert_ne!(hv_vcpu_get_reg(vcpu, hv_reg_t::PC, &mut value), 0);
        noticed(&session, "after it was destroyed");
        assert_eq!(hv_vm_destroy(), 0);
    }
}

#[test]
fn the_program_counter_stands_where_the_exit_leaves_it() {
    let session = Session::begin();
    vm(true);
    let vcpu = vcpu();
    let mut value = 0;
    // SAFETY: pointers are to live values; nothing is mapped.
    unsafe {
        assert_eq!(hv_vcpu_set_sys_reg(vcpu, hv_sys_reg_t::MPIDR_EL1, 0x8000_0000), 0);
        assert_eq!(hv_vcpu_set_reg(vcpu, hv_reg_t::CPSR, 0x3c5), 0);
        assert_eq!(hv_vcpu_set_reg(vcpu, hv_reg_t::PC, BASE), 0);
        // Nothing is there: an instruction abort, after which the instruction is tried again.
        assert_eq!(hv_vcpu_run(vcpu), 0);
        assert_eq!(hv_vcpu_get_reg(vcpu, hv_reg_t::PC, &mut value), 0);
        assert_eq!(value, BASE);
        assert_eq!(hv_vcpu_set_reg(vcpu, hv_reg_t::PC, BASE + 4), 0);
        assert_ne!(hv_vcpu_run(vcpu), 0);
        noticed(&session, "must go on at");
        assert_ne!(hv_gic_set_state([0u8].as_ptr().cast(), 1), 0);
        noticed(&session, "after a vCPU has run");
        assert_eq!(hv_vcpu_destroy(vcpu), 0);
        assert_eq!(hv_vm_destroy(), 0);
    }
}

#[test]
fn an_instruction_that_the_caller_carries_out_is_behind_pc_and_another_one_is_not() {
    let session = Session::begin_on(SHOWS_WFI);
    // Class, code of which the last instruction leaves the guest, and whether PC must be advanced.
    let cases: [(u64, &[u32], bool); 7] = [
        (0x01, &[0xd503_207f], true),              // wfi
        (0x16, &[0xd400_0002], false),             // hvc #0
        (0x17, &[0xd400_0003], true),              // smc #0
        (0x18, &[0xd538_cba1], true),              // mrs x1, ICC_SGI1R_EL1
        (0x18, &[0xd518_cb61], true),              // msr ICC_RPR_EL1, x1
        (0x24, &[0xd2a1_2001, 0xf940_0022], true), // ldr x2, [0x09000000]
        (0x24, &[0xd2a1_2001, 0xf900_0022], true), // str x2, [0x09000000]
    ];
    for (class, code, advanced) in cases {
        // What comes behind it leaves the guest too.
        let raw = Raw::new(&[code, &[0xd400_0002]].concat());
        let last = BASE + 4 * (code.len() as u64 - 1);
        for right in [true, false] {
            raw.again();
            assert_eq!((raw.run(), raw.class()), (0, class));
            assert_eq!(raw.pc(), if advanced { last } else { last + 4 }, "{class:#x}");
            if right == advanced {
                raw.set_pc(raw.pc() + 4);
            }
            let ran = raw.run();
            if right {
                assert_eq!((ran, raw.class()), (0, 0x16), "{class:#x}");
                assert_eq!(session.violations(), Vec::<String>::new(), "{class:#x}");
            } else {
                assert_ne!(ran, 0, "{class:#x}");
                noticed(&session, if advanced { "was carried out" } else { "must go on at" });
            }
        }
        raw.end();
    }
}

#[test]
fn a_memory_fault_is_tried_again() {
    let session = Session::begin();
    // mov x1, #0x80000000; ldr x2, [x1, #0x8000]
    let raw = Raw::new(&[0xd2b0_0001, 0xf960_0022]);
    raw.again();
    // Nothing is mapped at 0x80004000.
    assert_eq!((raw.run(), raw.class()), (0, 0x24));
    assert_eq!(raw.pc(), BASE + 4);
    raw.set_pc(BASE + 8);
    assert_ne!(raw.run(), 0);
    noticed(&session, "must go on at");
    raw.end();
}

#[test]
fn a_vcpu_is_run_and_destroyed_by_its_own_thread_and_no_later() {
    let session = Session::begin();
    let raw = Raw::new(&[0x1400_0000]); // b .
    let vcpu = raw.vcpu;
    let elsewhere = |work: fn(hv_vcpu_t) -> hv_return_t| {
        std::thread::scope(|scope| scope.spawn(move || work(vcpu)).join().unwrap())
    };
    // SAFETY: the calls take no pointers.
    let calls: [fn(hv_vcpu_t) -> hv_return_t; 5] = unsafe {
        [
            |vcpu| hv_vcpu_run(vcpu),
            |vcpu| hv_vcpu_destroy(vcpu),
            |vcpu| hv_vcpu_set_reg(vcpu, hv_reg_t::X0, 0),
            |vcpu| hv_vcpu_set_vtimer_offset(vcpu, 0),
            |vcpu| hv_gic_set_icc_reg(vcpu, hv_gic_icc_reg_t::PMR_EL1, 0),
        ]
    };
    for call in calls {
        assert_ne!(elsewhere(call), 0);
        noticed(&session, "from another thread than its own");
    }
    // While it runs, there is one thing that others may do.
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while session.calls().get("hv_vcpu_run").is_none_or(|runs| *runs < 2) {
                std::thread::yield_now();
            }
            // SAFETY: the pointer is to one identifier.
            assert_eq!(unsafe { hv_vcpus_exit(&vcpu, 1) }, 0);
        });
        assert_eq!(raw.run(), 0);
    });
    raw.end();
    for call in calls {
        assert_ne!(call(vcpu), 0);
        assert!(!session.violations().is_empty());
    }
    // SAFETY: the pointer is to one identifier.
    assert_ne!(unsafe { hv_vcpus_exit(&vcpu, 1) }, 0);
    assert!(!session.violations().is_empty());
}

#[test]
fn a_thread_destroys_its_vcpus_before_it_ends() {
    let session = Session::begin();
    vm(true);
    std::thread::scope(|scope| scope.spawn(vcpu).join().map(|_| ()).unwrap());
    noticed(&session, "ends before it is destroyed");
    // SAFETY: the call takes no pointers.
    assert_eq!(unsafe { hv_vm_destroy() }, 0);
}

#[test]
fn registers_that_the_framework_does_not_have_are_refused() {
    // By number, which need not be one that has a name.
    unsafe extern "C" {
        fn hv_vcpu_get_sys_reg(vcpu: hv_vcpu_t, reg: u32, value: *mut u64) -> hv_return_t;
        fn hv_vcpu_set_sys_reg(vcpu: hv_vcpu_t, reg: u32, value: u64) -> hv_return_t;
    }
    let session = Session::begin_on(Host { physical_timer: false, ..SHOWS_WFI });
    let raw = Raw::new(&[0xd503_207f]);
    let refused = [
        ("PMCR_EL0", 0xdce0),
        ("PMCNTENSET_EL0", 0xdce1),
        ("PMCCNTR_EL0", 0xdce8),
        ("PMUSERENR_EL0", 0xdcf0),
        ("PMINTENSET_EL1", 0xc4f1),
        ("PMEVCNTR0_EL0", 0xdf40),
        ("PMCCFILTR_EL0", 0xdf7f),
        ("OSLAR_EL1", 0x8084),
        ("OSDLR_EL1", 0x809c),
        ("CNTFRQ_EL0", 0xdf00),
        ("CNTP_CTL_EL0", 0xdf11),
        ("CNTP_CVAL_EL0", 0xdf12),
        ("HCR_EL2", 0xe088),
        ("CNTVOFF_EL2", 0xe703),
        ("CNTHCTL_EL2", 0xe708),
    ];
    let mut value = 0;
    // SAFETY: pointers are to live values.
    unsafe {
        for (name, reg) in refused {
            assert_ne!(hv_vcpu_get_sys_reg(raw.vcpu, reg, &mut value), 0, "{name}");
            assert_ne!(hv_vcpu_set_sys_reg(raw.vcpu, reg, 0), 0, "{name}");
        }
        for reg in [hv_sys_reg_t::SP_EL1, hv_sys_reg_t::SCTLR_EL1, hv_sys_reg_t::CNTV_CTL_EL0] {
            assert_eq!(hv_vcpu_get_sys_reg(raw.vcpu, reg as u32, &mut value), 0);
        }
    }
    // To try is no mistake.
    assert_eq!(session.violations(), Vec::<String>::new());
    raw.end();
}

#[test]
fn an_identification_register_changes_only_to_hide_sme_before_the_first_run() {
    const PFR1: hv_sys_reg_t = hv_sys_reg_t::ID_AA64PFR1_EL1;
    let session = Session::begin_on(Host { sme: true, ..SHOWS_WFI });
    let raw = Raw::new(&[0xd503_207f]); // wfi
    let mut value = 0;
    // SAFETY: pointers are to live values.
    unsafe {
        assert_ne!(raw.run(), 0);
        noticed(&session, "sees SME");
        assert_eq!(hv_vcpu_get_sys_reg(raw.vcpu, PFR1, &mut value), 0);
        assert_eq!(value >> 24 & 0xf, 1);
        assert_ne!(hv_vcpu_set_sys_reg(raw.vcpu, PFR1, value | 1), 0);
        noticed(&session, "identification register");
        assert_eq!(hv_vcpu_set_sys_reg(raw.vcpu, PFR1, value & !(0xf << 24)), 0);
        assert_eq!((raw.run(), raw.class()), (0, 0x01));
        assert_ne!(hv_vcpu_set_sys_reg(raw.vcpu, PFR1, 0), 0);
        noticed(&session, "identification register");
    }
    raw.end();
}

#[test]
fn a_timer_that_has_left_the_guest_is_unmasked_before_the_next_run() {
    let session = Session::begin_on(Host { timer_exits: true, ..Host::USUAL });
    let raw = Raw::new(&[
        0xd280_0021, // mov x1, #1
        0xd51b_e341, // msr CNTV_CVAL_EL0, x1
        0xd51b_e321, // msr CNTV_CTL_EL0, x1
        0x1400_0000, // b .
    ]);
    assert_eq!(raw.run(), 0);
    // SAFETY: it lives as long as the vCPU, which does not run.
    assert_eq!(unsafe { *raw.exit }.reason, hv_exit_reason_t::VTIMER_ACTIVATED);
    assert_ne!(raw.run(), 0);
    noticed(&session, "the timer masked");
    // SAFETY: the call takes no pointers.
    assert_eq!(unsafe { hv_vcpu_set_vtimer_mask(raw.vcpu, false) }, 0);
    session.cancel_every(1);
    assert_eq!(raw.run(), 0);
    raw.end();
}

#[test]
fn mpidr_is_one_of_the_machine_and_set_once_before_the_first_run() {
    let session = Session::begin_on(SHOWS_WFI);
    let raw = Raw::new(&[0xd503_207f]); // wfi
    let set = |mpidr| {
        // SAFETY: the call takes no pointers.
        unsafe { hv_vcpu_set_sys_reg(raw.vcpu, hv_sys_reg_t::MPIDR_EL1, mpidr) }
    };
    for wrong in [0, 0x8000_0010, 0x8000_0200] {
        assert_ne!(set(wrong), 0);
        noticed(&session, "MPIDR_EL1 0x");
    }
    set(0x8000_0001);
    noticed(&session, "MPIDR_EL1 is set twice");
    assert_eq!((raw.run(), raw.class()), (0, 0x01));
    assert_ne!(set(0x8000_0000), 0);
    noticed(&session, "MPIDR_EL1 is set after a run");
    raw.end();
}

#[test]
fn the_counters_offset_is_one_for_all_that_run_and_no_state_is_taken_meanwhile() {
    let session = Session::begin();
    let raw = Raw::new(&[0x1400_0000]); // b .
    let first = raw.vcpu;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let vcpu = vcpu();
            while session.calls().get("hv_vcpu_run").is_none_or(|runs| *runs < 1) {
                std::thread::yield_now();
            }
            // SAFETY: pointers are to live values.
            unsafe {
                assert_eq!(hv_vcpu_set_sys_reg(vcpu, hv_sys_reg_t::MPIDR_EL1, 0x8000_0001), 0);
                // Until the other one is in the guest, its state may be taken.
                loop {
                    let state = hv_gic_state_create();
                    if state.is_null() {
                        break;
                    }
                    os_release(state.cast());
                }
                noticed(&session, "hv_gic_state_create while a vCPU runs");
                assert_eq!(hv_vcpu_set_vtimer_offset(vcpu, 1), 0);
                assert_ne!(hv_vcpu_run(vcpu), 0);
                noticed(&session, "different offsets of the counter");
                assert_eq!(hv_vcpus_exit(&first, 1), 0);
                assert_eq!(hv_vcpu_destroy(vcpu), 0);
            }
        });
        assert_eq!(raw.run(), 0);
    });
    raw.end();
}
