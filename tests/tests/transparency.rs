//! DESIGN, the first promise: a restored guest cannot tell that it was away.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use squib_tests::{
    scenario,
    transparency::{Point, Runner, random_points},
};
use squib_vmm::config::MachineConfig;

/// Seed of the points; `transparency run --seed` takes others.
const SEED: u64 = 0x5155_4942;

fn assert_transparent(config: &MachineConfig, folder: &Path, points: (usize, u64, u64)) {
    let (count, before, after) = points;
    let points = random_points(SEED, count, before, after);
    let program = Path::new(env!("CARGO_BIN_EXE_transparency"));
    let runner = Runner { config, program, folder, jobs: 2, keep: false };
    let mut done = 0;
    let differences = runner.run(&points, |_, _, _| done += 1).unwrap();
    assert_eq!(done, count);
    assert!(differences.is_empty(), "{differences:#?}");
}

#[test]
fn the_tiny_guest_cannot_tell_at_200_random_points() {
    let folder = tempfile::tempdir().unwrap();
    let config = scenario::tiny(folder.path()).unwrap();
    assert_transparent(&config, folder.path(), (200, 2_000_000, 200_000));
}

#[test]
fn a_machine_that_is_one_instruction_ahead_is_found_out() {
    let folder = tempfile::tempdir().unwrap();
    let config = scenario::tiny(folder.path()).unwrap();
    let program = folder.path().join("ahead");
    let real = env!("CARGO_BIN_EXE_transparency");
    fs::write(&program, format!("#!/bin/sh\nexec '{real}' \"$1\" \"$2\" $(($3 + 1))\n")).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o700)).unwrap();
    let runner =
        Runner { config: &config, program: &program, folder: folder.path(), jobs: 1, keep: false };
    let differences = runner.run(&[Point { at: 50_000, more: 1_000 }], |_, _, _| ()).unwrap();
    let what = differences[0].what.join("\n");
    for expected in ["51001", "state vcpu 0", "state time 0"] {
        assert!(what.contains(expected), "{what}");
    }
}

#[test]
fn linux_cannot_tell_at_3_random_points() {
    let folder = tempfile::tempdir().unwrap();
    match scenario::linux(folder.path()).unwrap() {
        Some(config) => assert_transparent(&config, folder.path(), (3, 800_000_000, 30_000_000)),
        None => eprintln!(
            "SKIPPED linux_cannot_tell_at_3_random_points: the guest kit is not in the cache \
             (`squib kit fetch` gets it)"
        ),
    }
}
