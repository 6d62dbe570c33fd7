//! Which backend goes on with whose snapshot, and what is said of it.

use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;
use squib_tests::tiny::POWER_OFF;

use crate::{
    SQUIB,
    common::{Place, Vm, assert_unbroken, create, rounds},
};

/// A snapshot of a guest on `backend`; what it had printed.
fn snapshot(place: &Place, backend: &str) -> String {
    let words = ["run", "--kernel", "kernel", "--memory", "64M", "--disk", "disk.img"];
    let vm = place.vm(&[&words[..], &["--name", "a", "--backend", backend]].concat());
    vm.wait_lines(2);
    create(place, &["--stop"]);
    let (status, before, messages) = vm.end();
    assert_eq!(status.code(), Some(0), "{messages}");
    before
}

/// What a check finds: exit code, and its lines by what they are about: verdict and what was found.
fn check(place: &Place, more: &[&str]) -> (i32, Vec<(String, String, String)>) {
    let mut words = vec!["snapshot", "check", "snap", "--json"];
    words.extend(more);
    let (code, out, error) = place.done(&words);
    let report: Value =
        serde_json::from_str(&out).unwrap_or_else(|why| panic!("{why}: {out}{error}"));
    let text = |line: &Value, field: &str| line[field].as_str().unwrap().to_owned();
    let lines = report["lines"].as_array().unwrap().iter();
    let lines = lines
        .map(|line| (text(line, "what"), text(line, "verdict"), text(line, "found")))
        .collect();
    (code, lines)
}

#[test]
fn the_backend_of_the_snapshot_is_accepted_by_name() {
    for backend in ["hvf", "soft"] {
        let place = Place::new();
        let before = snapshot(&place, backend);
        for choice in [&[][..], &["--backend", backend]] {
            let (code, lines) = check(&place, choice);
            assert_eq!(code, 0, "{choice:?}: {lines:#?}");
            assert!(lines.iter().all(|(_, verdict, _)| verdict == "ok"), "{lines:#?}");
            let mut vm = place.vm(&[&["snapshot", "restore", "snap"][..], choice].concat());
            vm.wait_lines(2);
            vm.send(POWER_OFF);
            let (status, after, messages) = vm.end();
            assert_eq!(status.code(), Some(0), "{messages}");
            assert_unbroken(&rounds(&(before.clone() + &after)));
        }
    }
}

#[test]
fn another_backend_is_refused_by_check_and_restore_with_the_same_lines() {
    for (taken, wanted) in [("soft", "hvf"), ("hvf", "soft")] {
        let place = Place::new();
        snapshot(&place, taken);
        let (code, lines) = check(&place, &["--backend", wanted]);
        assert_eq!(code, 5, "{lines:#?}");
        let wrong: Vec<_> = lines.iter().filter(|(_, verdict, _)| verdict != "ok").collect();
        let (code, _, error) = place.done(&["snapshot", "restore", "snap", "--backend", wanted]);
        assert_eq!(code, 5, "{error}");
        for what in ["backend", "ID_", "interrupt controller"] {
            assert!(wrong.iter().any(|(name, ..)| name.starts_with(what)), "{what}: {lines:#?}");
        }
        let said: Vec<_> =
            error.lines().filter_map(|line| Some(line.strip_prefix("  ")?.to_owned())).collect();
        let found: Vec<_> =
            wrong.iter().map(|(what, _, found)| format!("{what}: {found}")).collect();
        assert_eq!(said, found);
        assert!(place.left().is_empty());
    }
}

#[test]
fn a_backend_that_is_not_there_is_refused_by_check_and_restore() {
    let place = Place::new();
    snapshot(&place, "hvf");
    let (code, lines) = check(&place, &["--backend", "kvm"]);
    let wrong: Vec<_> = lines.iter().filter(|(_, verdict, _)| verdict != "ok").collect();
    assert_eq!((code, wrong.len()), (5, 1), "{lines:#?}");
    let (code, _, error) = place.done(&["snapshot", "restore", "snap", "--backend", "kvm"]);
    assert!(code == 5 && error.contains(&wrong[0].2), "{code} {error} {wrong:?}");
    for command in ["check", "restore"] {
        let (code, _, error) = place.done(&["snapshot", command, "snap", "--backend", "qemu"]);
        assert!(code == 2 && error.contains("no backend `qemu`"), "{command}: {code} {error}");
    }
}

#[test]
fn the_program_says_what_it_is_and_has_the_backend() {
    let place = Place::new();
    let (code, out, error) = place.done(&["doctor", "--json"]);
    assert_eq!(code, 0, "{error}");
    assert!(error.starts_with("squib-hvf-linux: for tests only"), "{error}");
    let report: Value = serde_json::from_str(&out).unwrap();
    let properties = report["properties"].as_array().unwrap();
    let hvf = properties.iter().find(|property| property["name"] == "backend hvf").unwrap();
    assert_eq!(hvf["status"], "ok", "{hvf}");
    assert!(hvf["found"].as_str().unwrap().starts_with("at most 32 vCPUs and 1022"), "{hvf}");
    assert!(SQUIB.ends_with("squib-hvf-linux"));
}

/// Runs a guest with a call that is always denied, and powers it off if it gets so far; exit code and messages.
fn denied(place: &Place, call: &str) -> (Option<i32>, String) {
    let words = ["run", "--kernel", "kernel", "--memory", "64M", "--backend", "hvf"];
    let mut command = place.squib(words);
    command.env("SQUIB_HVF_DENY", call);
    let mut vm = Vm::start(command);
    while vm.child.try_wait().unwrap().is_none() && rounds(&vm.console.text()).is_empty() {
        std::thread::sleep(Duration::from_millis(1));
    }
    if vm.child.try_wait().unwrap().is_none() {
        vm.send(POWER_OFF);
    }
    let (status, _, messages) = vm.end();
    (status.code(), messages)
}

#[test]
fn a_program_without_the_entitlement_is_told_how_to_sign() {
    let place = Place::new();
    let (code, messages) = denied(&place, "hv_vm_create");
    assert_eq!(code, Some(1), "{messages}");
    let command = "codesign --force --sign - --entitlements cli/squib.entitlements";
    assert!(messages.contains(command), "{messages}");
    assert!(place.left().is_empty());
    let doctor = place.squib(["doctor"]).env("SQUIB_HVF_DENY", "hv_vm_create").output().unwrap();
    let said = String::from_utf8_lossy(&doctor.stdout);
    let hvf = said.lines().find(|line| line.contains("backend hvf")).unwrap();
    assert!(hvf.starts_with("missing") && hvf.contains(command), "{hvf}");
}

#[test]
fn what_the_framework_forbids_ends_the_program_with_an_error() {
    let place = Place::new();
    let mut command = place.squib(["ps"]);
    let output = command.env("SQUIB_HVF_BREAK_A_RULE", "1").output().unwrap();
    let messages = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(70), "{messages}");
    let said = "against the framework's rules:\n  a call without a virtual machine";
    assert!(messages.contains(said), "{messages}");
}

#[test]
fn ctrl_c_ends_a_guest_at_any_time_and_leaves_nothing() {
    let place = Place::new();
    snapshot(&place, "hvf");
    for lines in 0..3 {
        let vm = place.vm(&["snapshot", "restore", "snap", "--mode", "lazy"]);
        // With the name taken and before the first line it is somewhere in the restore.
        while !place.path("home/run/vms/a").exists() {
            std::thread::sleep(Duration::from_millis(1));
        }
        vm.wait_lines(lines);
        vm.signal(Signal::INT);
        let (status, _, messages) = vm.end();
        assert_eq!(status.code(), Some(130), "{lines}: {messages}");
        assert!(place.left().is_empty());
    }
}
