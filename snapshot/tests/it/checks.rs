//! The report before a restore says what the restore does.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use squib_formats::{
    digest::Digest, error::FormatError, manifest::Manifest, snapshot_dir::Snapshot,
};
use squib_snapshot::{
    ChangedDisks,
    capture::{CaptureOptions, capture},
    check::{CheckOptions, Report, Verdict, check},
    restore::RestoreOptions,
};

use crate::restores::{back, changed_copy, is_empty, machine, options, snapshot};

/// What a check is told when a restore is told `options`.
fn same(options: &RestoreOptions<'_>) -> CheckOptions<'static> {
    CheckOptions {
        backend: options.backend,
        disk_dir: options.disk_dir.clone(),
        disk_places: options.disk_places.clone(),
        allowed_disks: options.allowed_disks.clone(),
        changed_disks: options.changed_disks,
        parents: options.parents.clone(),
        memory: options.memory.clone(),
        disks: options.disks,
        overcommit: options.overcommit,
        machine: options.machine,
        ..CheckOptions::default()
    }
}

/// The report, which has to say what a restore does; the disks of one that is accepted are removed again.
pub(crate) fn agreed(path: &Path, options: &RestoreOptions<'_>) -> Report {
    let report = check(path, &same(options)).unwrap();
    let restored = back(path, options);
    assert_eq!(report.accepted, restored.is_ok(), "{report:#?} {:?}", restored.err());
    if let Ok(restored) = restored {
        restored.disks.iter().for_each(|(_, path)| fs::remove_file(path).unwrap());
    }
    report
}

/// The lines that are not ok, as "verdict what".
fn wrong(report: &Report) -> Vec<String> {
    let lines = report.lines.iter().filter(|line| line.verdict != Verdict::Ok);
    lines.map(|line| format!("{:?} {}", line.verdict, line.what)).collect()
}

#[test]
fn what_a_restore_accepts_is_ok_in_every_line_and_nothing_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = snapshot(dir.path());
    let options = options(dir.path());
    let report = check(&path, &same(&options)).unwrap();
    assert!(is_empty(options.disk_dir.as_deref().unwrap()));
    assert_eq!(wrong(&report), [""; 0]);
    for what in [
        "architecture",
        "format",
        "captured",
        "vCPUs",
        "memory",
        "machine",
        "backend",
        "CNTFRQ_EL0",
        "ID registers",
        "sections",
        "memory image",
        "disk root",
        "disk data",
        "room for disks",
        "page size",
    ] {
        assert!(report.lines.iter().any(|line| line.what == what), "{what}: {report:#?}");
    }
    assert!(agreed(&path, &options).accepted);
}

#[test]
fn what_a_restore_refuses_is_named_before_it() {
    let dir = tempfile::tempdir().unwrap();
    snapshot(dir.path());
    let options = options(dir.path());
    type Change = fn(&mut Manifest);
    let cases: [(&[&str], Change); 9] = [
        (&["Differs CNTFRQ_EL0"], |m| m.cpu.counter_frequency += 1),
        (&["Differs MIDR_EL1"], |m| m.cpu.id_registers[0].1 ^= 1),
        (&["Differs vCPUs"], |m| m.machine.vcpus = 0),
        (&["Missing backend"], |m| m.machine.backend = "x".into()),
        (&["Missing backend"], |m| {
            m.machine.backend = "kvm".into();
            m.machine.deterministic = None;
        }),
        (&["Differs machine"], |m| m.machine.name = "../x".into()),
        (&["Differs section serial 0"], |m| m.sections[0].version = 99),
        (&["Missing section serial 0", "Differs section floppy 0"], |m| {
            m.sections[0].kind = "floppy".into();
        }),
        (&["Differs section virtio-rng rng"], |m| m.machine.rng = false),
    ];
    for (expected, change) in cases {
        let path = changed_copy(dir.path(), change);
        assert_eq!(wrong(&agreed(&path, &options)), expected);
    }
    let path = changed_copy(dir.path(), |m| m.cpu.id_registers[0].1 ^= 1);
    let report = agreed(&path, &options);
    let line = report.lines.iter().find(|line| line.what == "MIDR_EL1").unwrap();
    assert!(line.found.ends_with(": Revision 0x1, here 0x0"), "{}", line.found);
    assert!(line.advice.is_some());
}

#[test]
fn disks_that_a_restore_cannot_use_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = snapshot(dir.path());
    let mut options = options(dir.path());
    let data = dir.path().join("data");
    fs::rename(&data, dir.path().join("moved")).unwrap();
    assert_eq!(wrong(&agreed(&path, &options)), ["Missing disk data"]);
    fs::write(&data, vec![9; 4 << 20]).unwrap();
    assert_eq!(wrong(&agreed(&path, &options)), ["Differs disk data"]);
    options.changed_disks = ChangedDisks::Accept;
    assert!(agreed(&path, &options).accepted);
    fs::write(&data, vec![9; 2 << 20]).unwrap();
    assert_eq!(wrong(&agreed(&path, &options)), ["Differs disk data"]);
    options.changed_disks = ChangedDisks::Refuse;
    options.disk_places = BTreeMap::from([("data".to_owned(), dir.path().join("moved"))]);
    assert!(agreed(&path, &options).accepted);

    fs::write(dir.path().join("disks/root.img"), "mine").unwrap();
    assert_eq!(wrong(&agreed(&path, &options)), ["Differs disk root"]);
    options.disk_dir = None;
    assert_eq!(wrong(&agreed(&path, &options)), ["Missing disk root"]);
    options.disk_dir = Some(dir.path().join("nowhere"));
    assert_eq!(wrong(&agreed(&path, &options)), ["Missing room for disks"]);
    options.disk_dir = Some(dir.path().join("disks"));
    options.disk_places.insert("swap".into(), PathBuf::from("/dev/null"));
    let report = agreed(&path, &options);
    assert_eq!(wrong(&report), ["Differs disk swap", "Differs disk root"]);
}

#[test]
fn a_state_that_decodes_and_that_no_device_takes_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = snapshot(dir.path());
    let options = options(dir.path());
    let good = Snapshot::open(&path).unwrap().manifest().clone();
    let whole = fs::read(path.join("state")).unwrap();
    // PSTATE of EL3, a PSCI power state that there is not, an IER of more than 4 bits.
    for (kind, at, value) in [("vcpu", 8 * 34, 0x0du8), ("psci", 8, 9), ("serial", 0, 0xff)] {
        let mut state = whole.clone();
        let section = good.sections.iter().find(|section| section.kind == kind).unwrap();
        let range = section.offset as usize..(section.offset + section.length) as usize;
        state[range.start + at] = value;
        let (bytes, digest) = (state[range].to_vec(), Digest::of(&state));
        let path = changed_copy(dir.path(), |manifest| {
            let section = manifest.sections.iter_mut().find(|section| section.kind == kind);
            section.unwrap().digest = Digest::of(&bytes);
            manifest.files.iter_mut().find(|file| file.name == "state").unwrap().digest = digest;
        });
        fs::write(path.join("state"), &state).unwrap();
        assert_eq!(wrong(&agreed(&path, &options)), [format!("Differs section {kind} 0")]);
    }
}

#[test]
fn a_parent_that_is_not_found_is_missing_and_one_that_is_found_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let machine = machine(dir.path());
    machine.run_until(10_000).unwrap();
    let parent = capture(&machine, &at("a"), &CaptureOptions::default()).unwrap().id;
    machine.run_until(20_000).unwrap();
    let diff = CaptureOptions { parent: Some(at("a")), ..CaptureOptions::default() };
    capture(&machine, &at("b"), &diff).unwrap();
    drop(machine);
    let mut options = options(dir.path());
    let report = agreed(&at("b"), &options);
    let line = report.lines.iter().find(|line| line.what == "parent").unwrap();
    assert!(report.accepted && line.found.contains(&parent.to_string()), "{report:#?}");
    fs::create_dir(at("away")).unwrap();
    fs::rename(at("a"), at("away/a")).unwrap();
    assert_eq!(wrong(&agreed(&at("b"), &options)), ["Missing parent"]);
    options.parents = vec![at("away")];
    assert!(agreed(&at("b"), &options).accepted);
}

#[test]
fn a_snapshot_of_another_format_or_architecture_is_told_from_its_header() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = snapshot(dir.path());
    let options = options(dir.path());
    let whole = fs::read(path.join("manifest")).unwrap();
    for (at, value, expected, said) in [
        (8, 2u16, "Differs format", "2.4, written by squib"),
        (10, 9, "Differs format", "1.9, written by squib"),
        (12, 62, "Differs architecture", "ELF machine 62"),
    ] {
        let mut bytes = whole.clone();
        bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
        fs::write(path.join("manifest"), &bytes).unwrap();
        let report = agreed(&path, &options);
        assert_eq!((wrong(&report), report.id), (vec![expected.to_owned()], None));
        assert!(report.lines.iter().any(|line| line.found.contains(said)), "{report:#?}");
    }
    let mut bytes = whole;
    bytes[70] ^= 1;
    fs::write(path.join("manifest"), bytes).unwrap();
    assert_eq!(wrong(&agreed(&path, &options)), ["Differs manifest"]);
    let none = check(dir.path(), &same(&options)).unwrap_err();
    assert!(matches!(none, FormatError::NotASnapshot { .. }), "{none}");
}

#[test]
fn damage_that_a_restore_meets_before_the_first_chunk_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = snapshot(dir.path());
    let options = options(dir.path());
    for (file, expected) in
        [("state", "state"), ("memory.idx", "memory image"), ("disk-root.idx", "disk root")]
    {
        let whole = fs::read(path.join(file)).unwrap();
        let mut bytes = whole.clone();
        bytes[20] ^= 1;
        fs::write(path.join(file), bytes).unwrap();
        assert_eq!(wrong(&agreed(&path, &options)), [format!("Differs {expected}")]);
        fs::remove_file(path.join(file)).unwrap();
        assert_eq!(wrong(&agreed(&path, &options)), [format!("Differs {expected}")]);
        fs::write(path.join(file), whole).unwrap();
    }
    assert!(agreed(&path, &options).accepted);
}
