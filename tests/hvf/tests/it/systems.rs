//! Hosts whose operating system is of another build, or keeps registers to itself.

use std::fs;

use crate::{
    Session,
    common::{lines, tiny},
    snapshots::{back, begun, options},
};
use squib_formats::snapshot_dir::Snapshot;
use squib_hvf_stand_in::Host;
use squib_snapshot::{
    capture::capture,
    check::{CheckOptions, Verdict, check},
    inspect::inspect,
    restore::{MemoryLoad, RestoreError},
};
use squib_tests::console::Capture;
use squib_vmm::{
    hypervisor::{HypervisorError, hvf::HvfError},
    machine::{Machine, MachineError},
};

/// ICC_BPR0_EL1, which a host may keep to itself, and CNTP_CTL_EL0 and CNTP_CVAL_EL0, which some do.
const ICC_BPR0: u16 = 0xc643;
const UNREADABLE: [u16; 2] = [0xdf11, 0xdf12];

#[test]
fn registers_that_cannot_be_read_are_named_in_the_manifest_and_no_part_of_the_state() {
    let session = Session::begin_on(Host { physical_timer: false, ..Host::USUAL });
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (machine, _) = begun(folder.path());
    capture(&machine, &at("all"), &options()).unwrap();
    drop(machine);
    session.hide_register(ICC_BPR0);
    let (machine, _) = begun(folder.path());
    capture(&machine, &at("less"), &options()).unwrap();
    drop(machine);

    let backend = |name: &str| {
        let snapshot = Snapshot::open(&at(name)).unwrap();
        snapshot.manifest().host_backend.clone().unwrap()
    };
    assert_eq!(backend("all").unreadable, UNREADABLE);
    let less = [&[ICC_BPR0][..], &UNREADABLE].concat();
    assert_eq!((backend("less").unreadable, &*backend("less").build), (less, "24A335"));
    let names = inspect(&at("less"), &[]).unwrap().host_backend.unwrap().unreadable;
    assert_eq!(names, ["S3_0_C12_C8_3", "CNTP_CTL_EL0", "CNTP_CVAL_EL0"]);

    // SCTLR_EL1: no guest goes on without.
    session.hide_register(0xc080);
    let refused = Machine::boot(tiny(folder.path()), Box::new(std::io::sink())).map(drop);
    let refused = refused.unwrap_err().to_string();
    assert!(refused.contains("vCPU 0: reading SCTLR_EL1"), "{refused}");
    session.show_register(0xc080);

    // What the host does not tell, it does not take either; what it tells now, stays as it was after reset.
    let console = Capture::default();
    let there = back(&at("less"), &at("disks"), MemoryLoad::Lazy, &console).unwrap().machine;
    there.resume().unwrap();
    lines(&there, &console, 2).unwrap();
    drop(there);
    session.show_register(ICC_BPR0);
    let there = back(&at("less"), &at("more"), MemoryLoad::Lazy, &console).unwrap().machine;
    there.resume().unwrap();
    lines(&there, &console, 2).unwrap();
    drop(there);
    session.hide_register(ICC_BPR0);
    let refused = back(&at("all"), &at("refused"), MemoryLoad::Lazy, &console).map(drop);
    let refused = format!("{:#}", refused.unwrap_err());
    assert!(refused.contains("S3_0_C12_C8_3 is unknown on this host"), "{refused}");
}

#[test]
fn a_state_of_another_build_of_the_host_is_unsure_and_its_refusal_names_both() {
    let session = Session::begin();
    let folder = tempfile::tempdir().unwrap();
    let (machine, _) = begun(folder.path());
    let path = folder.path().join("snap");
    capture(&machine, &path, &options()).unwrap();
    drop(machine);
    let disks = folder.path().join("disks");
    fs::create_dir(&disks).unwrap();
    let verdict = |accepted| {
        let disk_dir = Some(disks.clone());
        let report = check(&path, &CheckOptions { disk_dir, ..CheckOptions::default() }).unwrap();
        assert_eq!(report.accepted, accepted, "{report:#?}");
        report.lines.into_iter().find(|line| line.what == "host build").unwrap()
    };
    assert_eq!(verdict(true).verdict, Verdict::Ok);

    session.update_host("25A354");
    // The framework itself is asked.
    let line = verdict(false);
    assert_eq!(line.verdict, Verdict::Unsure);
    assert!(line.found.contains("24A335") && line.found.contains("25A354"), "{}", line.found);
    let refused = back(&path, &disks, MemoryLoad::Lazy, &Capture::default()).map(drop);
    let Err(RestoreError::Machine(MachineError::Hypervisor(HypervisorError::Hvf(
        HvfError::ChipState { made_on, here, .. },
    )))) = refused
    else {
        panic!("{refused:?}")
    };
    assert_eq!([&*made_on, &*here], ["24A335", "25A354"]);

    // The snapshot is none the worse for it.
    session.update_host("24A335");
    let again = folder.path().join("again");
    let console = Capture::default();
    let there = back(&path, &again, MemoryLoad::Eager, &console).unwrap().machine;
    there.resume().unwrap();
    lines(&there, &console, 2).unwrap();
}
