//! A guest's disk over a round trip: the bytes that were there when the guest stood still come back, whatever
//! the way.

use std::fs;

use squib::api::types::SnapshotReport;
use squib_tests::tiny::POWER_OFF;

use crate::{
    BACKEND, SQUIB,
    common::{Place, Vm, assert_unbroken, create, rounds},
};

/// The image digest of a file.
fn digest(place: &Place, file: &str) -> String {
    let (code, out, error) = place.done(&["digest", file, "--json"]);
    assert_eq!(code, 0, "{error}");
    let answer: serde_json::Value = serde_json::from_str(&out).unwrap();
    answer["digest"].as_str().unwrap().to_owned()
}

/// Restores `snap` with its disk in the new folder `disks`, and waits until the VM is there. It is paused.
fn paused(place: &Place, snap: &str, disks: &str, more: &[&str]) -> Vm {
    fs::create_dir(place.path(disks)).unwrap();
    let words = ["snapshot", "restore", snap, "--paused", "--disk-dir", disks, "--name", "b"];
    let mut vm = place.vm(&[&words[..], more].concat());
    loop {
        assert!(vm.child.try_wait().unwrap().is_none(), "{}", vm.messages.text());
        if client(place).info().is_ok() {
            return vm;
        }
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

fn client(place: &Place) -> squib::api::client::Client {
    squib::api::client::Client::new(&place.path("home/run/vms/b/api.sock"))
}

/// Lets it run to the end that it is told to go to; what it has printed.
fn run_out(place: &Place, mut vm: Vm) -> String {
    client(place).set_state(squib::api::types::VmState::Resumed).unwrap();
    vm.wait_lines(2);
    vm.send(POWER_OFF);
    let (status, console, messages) = vm.end();
    assert_eq!(status.code(), Some(0), "{messages}");
    console
}

#[test]
fn the_disk_is_the_same_after_every_way_back() {
    let place = Place::new();
    let vm = place.run(&["--name", "a"]);
    vm.wait_lines(2);
    let report = create(&place, &["--stop"]);
    let (_, before, _) = vm.end();
    let expected = digest(&place, "disk.img");
    assert_eq!(report.disks[0].digest, expected);
    for mode in ["eager", "lazy", "template"] {
        let vm = paused(&place, "snap", mode, &["--mode", mode]);
        assert_eq!(digest(&place, &format!("{mode}/vda.img")), expected, "{mode}");
        let after = run_out(&place, vm);
        assert_unbroken(&rounds(&(before.clone() + &after)));
        assert_ne!(digest(&place, &format!("{mode}/vda.img")), expected, "the guest writes to it");
    }
    assert_eq!(digest(&place, "disk.img"), expected, "the guests wrote to copies");
}

#[test]
fn the_disk_of_a_live_snapshot_and_of_a_difference_is_that_of_its_moment() {
    let place = Place::new();
    let mut vm = place.run(&["--name", "a"]);
    vm.wait_lines(2);
    let live = create(&place, &["--live"]);
    vm.wait_lines(2);
    let words = ["snapshot", "create", "a", "--output", "next", "--diff", "snap", "--json"];
    let (code, out, error) = place.done(&words);
    assert_eq!(code, 0, "{error}");
    let next: SnapshotReport = serde_json::from_str(&out).unwrap();
    vm.wait_lines(2);
    vm.send(POWER_OFF);
    let (status, console, messages) = vm.end();
    assert_eq!(status.code(), Some(0), "{messages}");
    let last = digest(&place, "disk.img");
    let digests = [&live.disks[0].digest, &next.disks[0].digest, &last];
    assert!(digests[0] != digests[1] && digests[1] != digests[2], "{digests:?}");

    for (snap, report) in [("snap", &live), ("next", &next)] {
        let (code, _, error) = place.done(&["snapshot", "verify", snap]);
        assert_eq!(code, 0, "{error}");
        let disks = format!("{snap}-disks");
        let vm = paused(&place, snap, &disks, &[]);
        assert_eq!(digest(&place, &format!("{disks}/vda.img")), report.disks[0].digest, "{snap}");
        let after = rounds(&run_out(&place, vm));
        assert_unbroken(&after);
        assert!(rounds(&console).contains(&after[0]), "{snap}: it goes on where it was");
    }
}

#[test]
fn debian_has_its_counter_and_the_hash_of_its_disk_after_a_restore() {
    let cached = squib::kit::Kit::cached().unwrap();
    if cached.is_none() {
        eprintln!("debian_has_its_counter_and_...: skipped, the guest kit is not in the cache");
        return;
    }
    let place = Place::new();
    let mut command = std::process::Command::new(SQUIB);
    command.args(["demo", "--backend", BACKEND, "--cpus", "2", "--memory", "128M", "--json"]);
    let out = command.env("SQUIB_HOME", place.path("home")).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(out.status.success(), "{}\n{}", text(&out.stdout), text(&out.stderr));
    let report: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let checks = report["checks"].as_array().unwrap();
    let names: Vec<_> = checks.iter().map(|check| check["what"].as_str().unwrap()).collect();
    assert!(names.contains(&"disk, sha256sum in the guest"), "{names:?}");
}
