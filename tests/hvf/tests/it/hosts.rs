//! Hosts on which a machine does not fit, or fits in another way.

use squib_hvf_stand_in::{Geometry, Host, Session};
use squib_snapshot::{
    capture::{CaptureOptions, capture},
    restore::{MemoryLoad, RestoreError},
};
use squib_tests::console::Capture;
use squib_vmm::{
    hypervisor::{HypervisorError, hvf::HvfError},
    machine::{Machine, MachineError},
};

use crate::{
    common::{field, lines, power_off, tiny, wait},
    snapshots::{back, begun, options},
};

fn on(change: impl FnOnce(&mut Host)) -> Host {
    let mut host = Host::USUAL;
    change(&mut host);
    host
}

fn with_gic(change: impl FnOnce(&mut Geometry)) -> Host {
    on(|host| change(&mut host.gic))
}

/// What the backend says to a machine of `vcpus` vCPUs there.
fn refused(host: Host, vcpus: u32) -> HvfError {
    let session = Session::begin_on(host);
    let folder = tempfile::tempdir().unwrap();
    let mut config = tiny(folder.path());
    config.vcpus = vcpus;
    let refused = Machine::boot(config, Box::new(std::io::sink())).map(drop);
    assert!(!session.has_machine());
    framework(refused.unwrap_err())
}

fn framework(error: MachineError) -> HvfError {
    match error {
        MachineError::Hypervisor(HypervisorError::Hvf(error)) => error,
        other => panic!("{other:?}"),
    }
}

/// Boots a guest there, takes it through a snapshot, and lets it go on.
fn lives_on(session: &Session) {
    let folder = tempfile::tempdir().unwrap();
    let (machine, _) = begun(folder.path());
    let snapshot = folder.path().join("snapshot");
    capture(&machine, &snapshot, &options()).unwrap();
    drop(machine);
    let (disks, console) = (folder.path().join("disks"), Capture::default());
    let there = back(&snapshot, &disks, MemoryLoad::Record, &console).unwrap().machine;
    there.resume().unwrap();
    wait(&there, &console, |text| field(text, "t").is_some_and(|ticks| ticks > 2)).unwrap();
    power_off(&there).unwrap();
    drop(there);
    assert_eq!(session.violations(), Vec::<String>::new());
}

#[test]
fn an_interrupt_controller_that_does_not_fit_is_refused_with_what_and_by_how_much() {
    let cases: [(Host, &str, u64, u64); 11] = [
        (
            with_gic(|gic| gic.distributor_size = 0x2_0000),
            "the distributor's size",
            0x2_0000,
            0x1_0000,
        ),
        (
            with_gic(|gic| gic.distributor_alignment = 0x1000_0000),
            "the distributor's alignment",
            0x1000_0000,
            0x0800_0000,
        ),
        (
            with_gic(|gic| gic.distributor_alignment = 0),
            "the distributor's alignment",
            0,
            0x0800_0000,
        ),
        (
            with_gic(|gic| gic.redistributor_region_size = 0x800_0000),
            "the redistributors' size",
            0x800_0000,
            0x600_0000,
        ),
        (
            with_gic(|gic| gic.redistributor_alignment = 0x10_0000),
            "the redistributors' alignment",
            0x10_0000,
            0x2_0000,
        ),
        (
            with_gic(|gic| gic.msi_size = 0x10_0000),
            "the message region's size",
            0x10_0000,
            0x8_0000,
        ),
        (
            with_gic(|gic| gic.msi_alignment = 0x4_0000),
            "the message region's alignment",
            0x4_0000,
            0x2_0000,
        ),
        (
            with_gic(|gic| gic.redistributor_size = 0x4_0000),
            "the size of a redistributor",
            0x4_0000,
            0x2_0000,
        ),
        (with_gic(|gic| gic.timer = 28), "the virtual timer's interrupt", 28, 27),
        (with_gic(|gic| gic.spis = (32, 64)), "the end of the shared interrupts", 96, 0),
        (with_gic(|gic| gic.spis = (64, 956)), "the end of the shared interrupts", 1020, 0),
    ];
    for (host, expected, has, room) in cases {
        let error = refused(host, 1);
        let HvfError::Chip { what, found, needed } = error else { panic!("{expected}: {error}") };
        assert_eq!(what, expected);
        assert_eq!(found, has, "{expected}");
        assert!(room == 0 || needed == room, "{expected}: {needed:#x}");
    }
}

#[test]
fn a_redistributor_elsewhere_is_refused() {
    let error = refused(with_gic(|gic| gic.redistributor_offset = 0x2_0000), 1);
    let HvfError::Chip { what, found, needed } = error else { panic!("{error}") };
    assert_eq!((what, found, needed), ("a redistributor's address", 0x080c_0000, 0x080a_0000));
}

#[test]
fn more_vcpus_than_the_host_has_are_refused_with_both_numbers() {
    let error = refused(on(|host| host.max_vcpus = 2), 3);
    let HvfError::Limit { what, wanted, most } = error else { panic!("{error}") };
    assert_eq!((what, wanted, most), ("vCPUs", 3, 2));
}

#[test]
fn a_snapshot_with_more_vcpus_than_the_host_has_is_refused_and_stays() {
    let session = Session::begin();
    let folder = tempfile::tempdir().unwrap();
    let mut config = tiny(folder.path());
    config.vcpus = 3;
    let machine = Machine::boot(config, Box::new(std::io::sink())).unwrap();
    let (snapshot, disks) = (folder.path().join("snapshot"), folder.path().join("disks"));
    capture(&machine, &snapshot, &options()).unwrap();
    drop(machine);
    let restore = || back(&snapshot, &disks, MemoryLoad::Lazy, &Capture::default());
    session.move_to(on(|host| host.max_vcpus = 2));
    let Err(RestoreError::Machine(error)) = restore() else { panic!("3 vCPUs of 2") };
    assert!(matches!(framework(error), HvfError::Limit { wanted: 3, most: 2, .. }));
    assert_eq!(std::fs::read_dir(&disks).unwrap().count(), 0);
    session.move_to(Host::USUAL);
    drop(restore().unwrap());
}

#[test]
fn guest_physical_addresses_are_made_wide_enough_for_ram_or_refused() {
    let session = Session::begin_on(on(|host| host.default_ipa_bits = 31));
    lives_on(&session);
    assert_eq!(session.calls()["hv_vm_config_set_ipa_size"], 2);
    drop(session);

    let narrow = on(|host| (host.default_ipa_bits, host.max_ipa_bits) = (30, 31));
    let error = refused(narrow, 1);
    let HvfError::Limit { what, wanted, most } = error else { panic!("{error}") };
    assert_eq!((what, wanted, most), ("bits of guest-physical address", 32, 31));

    let session = Session::begin();
    lives_on(&session);
    assert!(!session.calls().contains_key("hv_vm_config_set_ipa_size"));
}

#[test]
fn a_host_that_does_not_tell_how_fast_its_counter_is_has_no_machines() {
    for timebase in [None, Some((0, 1)), Some((1, 0))] {
        let error = refused(on(|host| host.timebase = timebase), 1);
        assert!(matches!(error, HvfError::NoFrequency), "{error}");
    }
}

#[test]
fn sme_is_hidden_from_a_guest_and_its_snapshot_fits_a_host_without() {
    const PFR1: u16 = 0xc021;
    // A run with SME in sight is a violation.
    let session = Session::begin_on(on(|host| host.sme = true));
    let folder = tempfile::tempdir().unwrap();
    let (machine, _) = begun(folder.path());
    let identity = machine.cpu_identity();
    let (_, shown) = identity.id_registers.iter().find(|(reg, _)| *reg == PFR1).unwrap();
    assert_eq!(shown >> 24 & 0xf, 0);
    let (snapshot, disks) = (folder.path().join("snapshot"), folder.path().join("disks"));
    capture(&machine, &snapshot, &options()).unwrap();
    drop(machine);
    session.move_to(Host::USUAL);
    let console = Capture::default();
    let there = back(&snapshot, &disks, MemoryLoad::Eager, &console).unwrap().machine;
    assert_eq!(there.cpu_identity(), identity);
    there.resume().unwrap();
    lines(&there, &console, 2).unwrap();
}

#[test]
fn a_timer_that_leaves_the_guest_and_is_masked_then_goes_on_ticking() {
    let session = Session::begin_on(on(|host| host.timer_exits = true));
    lives_on(&session);
    assert!(session.calls()["hv_vcpu_set_vtimer_mask"] > 2);
}

#[test]
fn where_no_call_changes_what_several_have_mapped_captures_and_restores_do_all_the_same() {
    let session = Session::begin_on(on(|host| host.spans = false));
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (machine, _) = begun(folder.path());
    capture(&machine, &at("base"), &options()).unwrap();
    drop(machine);
    let console = Capture::default();
    // Each granule comes by a call of its own.
    let there = back(&at("base"), &at("disks"), MemoryLoad::Record, &console).unwrap().machine;
    there.resume().unwrap();
    lines(&there, &console, 2).unwrap();
    capture(&there, &at("live"), &CaptureOptions { live: true, ..options() }).unwrap();
    lines(&there, &console, 2).unwrap();
    drop(there);
    assert_eq!(session.violations(), Vec::<String>::new());
    let there = back(&at("live"), &at("again"), MemoryLoad::Lazy, &console).unwrap().machine;
    there.resume().unwrap();
    lines(&there, &console, 2).unwrap();
}
