//! What commands answer to people and machines: JSON errors, one exit code for what is not there, `--force`.

use serde_json::Value;
use squib_tests::tiny::POWER_OFF;

use crate::common::{Place, create};

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[test]
fn what_is_not_there_is_a_matter_of_the_command_line() {
    let place = Place::new();
    for words in [
        &["digest", "none"][..],
        &["run", "--kernel", "none"],
        &["run", "--kernel", "kernel", "--initrd", "none"],
        &["run", "--kernel", "kernel", "--disk", "none"],
        &["snapshot", "restore", "none"],
        &["snapshot", "inspect", "none"],
        &["snapshot", "verify", "none"],
        &["snapshot", "check", "none"],
        &["snapshot", "diff", "none", "none"],
        &["snapshot", "flatten", "none", "--output", "out"],
        &["snapshot", "rebase", "none", "--output", "out"],
        &["snapshot", "optimize", "none"],
        &["snapshot", "rm", "none"],
    ] {
        let (code, out, err) = place.done(words);
        assert_eq!((code, &*out), (2, ""), "{words:?}: {err}");
        assert!(err.contains("none"), "{words:?}: {err}");
    }
}

#[test]
fn a_failure_of_a_command_with_json_is_a_json_object() {
    let place = Place::new();
    std::fs::create_dir(place.path("empty")).unwrap();
    for (words, expected) in [
        (&["digest", "none", "--json"][..], 2),
        (&["snapshot", "inspect", "none", "--json"], 2),
        (&["snapshot", "inspect", "empty", "--json"], 5),
        (&["snapshot", "flatten", "empty", "--output", "out", "--json"], 5),
        (&["snapshot", "create", "nobody", "--output", "out", "--json"], 6),
    ] {
        let (code, out, err) = place.done(words);
        assert_eq!(code, expected, "{words:?}: {err}");
        let error = &json(&out)["error"];
        assert_eq!(error["exit_code"], expected, "{words:?}: {out}");
        let message = error["message"].as_str().unwrap();
        assert!(err.contains(message.lines().next().unwrap()), "{words:?}: {message}\n{err}");
    }
}

#[test]
fn timings_as_json_are_lines_of_json() {
    let place = Place::new();
    let mut vm = place.run(&["--timings=json"]);
    vm.wait_lines(1);
    let line = vm.messages.wait_for(crate::common::PATIENCE, |text| {
        text.lines().find(|line| line.starts_with('{')).map(json)
    });
    assert!(line.unwrap()["phases"].as_array().is_some_and(|phases| phases.len() > 2));
    vm.send(POWER_OFF);
    assert_eq!(vm.end().0.code(), Some(0));
}

#[test]
fn a_snapshot_that_is_written_again_replaces_another_only_when_told_and_when_it_is_not_needed() {
    let place = Place::new();
    let vm = place.run(&["--name", "a"]);
    vm.wait_lines(2);
    create(&place, &[]);
    let (code, _, err) =
        place.done(&["snapshot", "create", "a", "--output", "diff", "--diff", "snap", "--stop"]);
    assert_eq!(code, 0, "{err}");
    vm.end();
    let flatten = ["snapshot", "flatten", "diff", "--output", "flat", "--json"];
    let (code, out, err) = place.done(&flatten);
    assert_eq!(code, 0, "{err}");
    let id = json(&out)["id"].clone();
    let (code, _, _) = place.done(&flatten);
    assert_eq!(code, 5);
    let (code, out, err) = place.done(&[&flatten[..], &["--force"]].concat());
    assert_eq!((code, &json(&out)["id"]), (0, &id), "{err}");
    // The difference needs it.
    let (code, _, err) =
        place.done(&["snapshot", "flatten", "diff", "--output", "snap", "--force"]);
    assert_eq!(code, 5);
    assert!(err.contains("it is not replaced"), "{err}");
    let (code, _, err) = place
        .done(&["snapshot", "rebase", "diff", "--onto", "flat", "--output", "flat", "--force"]);
    assert_eq!(code, 5);
    assert!(err.contains("the new snapshot would build on it"), "{err}");
    assert_eq!(place.done(&["snapshot", "verify", "diff"]).0, 0);
    assert_eq!(place.done(&["snapshot", "verify", "flat"]).0, 0);
}

#[test]
fn commands_that_others_have_are_not_taken_for_ours() {
    let place = Place::new();
    let (code, _, err) = place.done(&["kill", "x"]);
    assert_eq!(code, 2);
    assert!(!err.contains("kit") && err.contains("squib ps"), "{err}");
}
