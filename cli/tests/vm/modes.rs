//! The ways in which a guest's memory is captured and comes back, as a user has them.

use std::fs;

use squib::api::types::SnapshotReport;
use squib_tests::tiny::POWER_OFF;

use crate::common::{Place, assert_unbroken, create, rounds};

/// A snapshot of a guest that has printed some lines; what it had printed.
fn snapshot(place: &Place) -> String {
    let vm = place.run(&["--name", "a"]);
    vm.wait_lines(2);
    create(place, &["--stop"]);
    vm.end().1
}

/// Restores, lets the guest print, ends it, and checks that nothing is missing; its messages.
fn goes_on(place: &Place, before: &str, more: &[&str]) -> String {
    let mut words = vec!["snapshot", "restore", "snap"];
    words.extend(more);
    let mut vm = place.vm(&words);
    vm.wait_lines(3);
    vm.send(POWER_OFF);
    let (status, after, messages) = vm.end();
    assert_eq!(status.code(), Some(0), "{more:?}: {messages}");
    assert_unbroken(&rounds(&(before.to_owned() + &after)));
    messages
}

#[test]
fn in_every_mode_the_guest_goes_on_with_the_next_round() {
    let place = Place::new();
    let before = snapshot(&place);
    for mode in ["eager", "lazy", "template", "template"] {
        goes_on(&place, &before, &["--mode", mode]);
    }
    let (code, list, error) = place.done(&["snapshot", "cache", "ls", "--json"]);
    assert_eq!(code, 0, "{error}");
    let list: serde_json::Value = serde_json::from_str(&list).unwrap();
    assert_eq!(list.as_array().unwrap().len(), 1);
    assert_eq!(list[0]["size_bytes"], 64 << 20);
    let (code, text, _) = place.done(&["snapshot", "cache", "prune"]);
    assert!(code == 0 && text.contains("freed"), "{text}");
    let (_, text, _) = place.done(&["snapshot", "cache", "ls"]);
    assert_eq!(text.trim(), "there are no templates");
    goes_on(&place, &before, &["--mode", "template"]);
}

#[test]
fn a_live_snapshot_goes_on_in_a_new_process_and_the_guest_beside_it() {
    let place = Place::new();
    let mut vm = place.run(&["--name", "a"]);
    vm.wait_lines(2);
    let report: SnapshotReport = create(&place, &["--live"]);
    vm.wait_lines(3);
    vm.send(POWER_OFF);
    let (status, console, messages) = vm.end();
    assert_eq!(status.code(), Some(0), "{messages}");
    assert_unbroken(&rounds(&console));
    assert!(report.downtime_ms > 0.0);
    let mut twin = place.vm(&["snapshot", "restore", "snap"]);
    twin.wait_lines(3);
    twin.send(POWER_OFF);
    let (status, after, messages) = twin.end();
    assert_eq!(status.code(), Some(0), "{messages}");
    assert_unbroken(&rounds(&after));
    // It goes on somewhere in what the first one went through.
    assert!(rounds(&console).contains(&rounds(&after)[0]));
    let (code, _, error) = place.done(&["snapshot", "verify", "snap"]);
    assert_eq!(code, 0, "{error}");
}

#[test]
fn what_is_recorded_comes_first_after_optimize() {
    let place = Place::new();
    let before = snapshot(&place);
    let (code, _, error) = place.done(&["snapshot", "optimize", "snap"]);
    assert!(code == 5 && error.contains("--record"), "{error}");
    for _ in 0..2 {
        let messages = goes_on(&place, &before, &["--record"]);
        assert!(messages.contains("that every run needs"), "{messages}");
    }
    let (code, text, error) = place.done(&["snapshot", "optimize", "snap"]);
    assert_eq!(code, 0, "{error}");
    assert!(text.contains("in the order of their first use"), "{text}");
    let (code, _, error) = place.done(&["snapshot", "verify", "snap"]);
    assert_eq!(code, 0, "{error}");
    goes_on(&place, &before, &[]);
}

#[test]
fn choices_that_exclude_each_other_or_are_out_of_range_are_refused() {
    let place = Place::new();
    let before = snapshot(&place);
    for mode in ["eager", "template"] {
        let (code, _, error) =
            place.done(&["snapshot", "restore", "snap", "--record", "--mode", mode]);
        assert!(code == 2 && error.contains("--mode lazy"), "{error}");
    }
    let vm = place.run(&["--name", "b"]);
    vm.wait_lines(1);
    for (words, expected) in [
        (&["--live", "--stop"][..], "cannot be used with"),
        (&["--chunk-size", "5K"], "a power of two from 16K to 4M"),
        (&["--threads", "0"], "--threads"),
        (&["--level", "99"], "level"),
    ] {
        let mut all = vec!["snapshot", "create", "b", "--output", "other"];
        all.extend(words);
        let (code, _, error) = place.done(&all);
        assert!(code != 0 && error.contains(expected), "{words:?}: {code} {error}");
        assert!(!place.path("other").exists());
    }
    let more = ["--level", "9", "--chunk-size", "16K", "--threads", "1"];
    let mut all = vec!["snapshot", "create", "b", "--output", "other"];
    all.extend(more);
    assert_eq!(place.done(&all).0, 0);
    let (_, text, _) = place.done(&["snapshot", "inspect", "other", "--json"]);
    assert!(text.contains("16384"), "{text}");
    drop(vm);
    goes_on(&place, &before, &["--name", "c"]);
}

#[test]
fn a_damaged_chunk_ends_a_lazy_guest_with_the_file_and_the_chunk() {
    let place = Place::new();
    snapshot(&place);
    let file = place.path("snap/memory.zst");
    let mut bytes = fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&file, bytes).unwrap();
    for more in [&["--mode", "lazy"][..], &["--mode", "eager"], &["--mode", "template"]] {
        let mut words = vec!["snapshot", "restore", "snap"];
        words.extend(more);
        let (code, _, error) = place.done(&words);
        assert_eq!(code, 5, "{more:?}: {error}");
        assert!(error.contains("memory.zst: chunk "), "{more:?}: {error}");
        assert!(error.contains("squib snapshot verify"), "{more:?}: {error}");
    }
    assert!(place.left().is_empty());
}
