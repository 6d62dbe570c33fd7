//! VMs from their start to their end, and their snapshots.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use rustix::process::Signal;
use squib::api::{
    client::{Client, ClientError},
    types::{InstanceState, SnapshotReport, VmState},
};
use squib_tests::tiny::POWER_OFF;

use crate::{
    BACKEND, SQUIB,
    common::{Place, Vm, assert_unbroken, create, rounds},
};

fn socket(place: &Place) -> PathBuf {
    place.path("home/run/vms/a/api.sock")
}

#[test]
fn a_guest_that_powers_off_ends_with_0_and_leaves_nothing() {
    let place = Place::new();
    let mut vm = place.run(&["--timings"]);
    vm.wait_lines(2);
    vm.send(POWER_OFF);
    let (status, console, messages) = vm.end();
    assert_eq!(status.code(), Some(0), "{messages}");
    assert_unbroken(&rounds(&console));
    for phase in ["load kernel", "first guest instruction", "first console byte"] {
        assert!(messages.contains(phase), "{messages}");
    }
    assert!(place.left().is_empty());
}

#[test]
fn the_end_of_input_does_not_end_the_vm_and_a_signal_does() {
    let place = Place::new();
    let mut vm = place.run(&["--name", "a"]);
    drop(vm.child.stdin.take());
    vm.wait_lines(3);
    vm.signal(Signal::TERM);
    let (status, _, messages) = vm.end();
    assert_eq!(status.code(), Some(143), "{messages}");
    assert!(place.left().is_empty());
}

#[test]
fn signals_that_were_ignored_at_the_start_stay_so() {
    let place = Place::new();
    // As nohup does, and a shell without job control for what it starts in the background.
    let mut command = Command::new("sh");
    command
        .args(["-c", "trap '' HUP INT QUIT; exec \"$@\"", "sh", SQUIB])
        .args(["run", "--kernel", "kernel", "--memory", "64M", "--backend", BACKEND])
        .current_dir(place.dir.path())
        .env("SQUIB_HOME", place.path("home"));
    let vm = Vm::start(command);
    vm.wait_lines(1);
    for signal in [Signal::HUP, Signal::INT, Signal::QUIT] {
        vm.signal(signal);
    }
    vm.wait_lines(3);
    vm.signal(Signal::TERM);
    assert_eq!(vm.end().0.code(), Some(143));
    assert!(place.left().is_empty());
}

#[test]
fn every_signal_that_ends_a_process_leaves_nothing() {
    for signal in [Signal::QUIT, Signal::HUP, Signal::USR1] {
        let place = Place::new();
        let vm = place.run(&[]);
        vm.wait_lines(1);
        vm.signal(signal);
        assert_eq!(vm.end().0.code(), Some(128 + signal.as_raw()));
        assert!(place.left().is_empty());
    }
}

#[test]
fn a_vm_that_is_stopped_holds_up_no_client() {
    let place = Place::new();
    let words = ["run", "--kernel", "kernel", "--memory", "64M", "--backend", BACKEND, "--name"];
    let run = |name| place.vm(&[&words[..], &[name]].concat());
    let (vm, other) = (run("a"), run("b"));
    vm.wait_lines(1);
    other.wait_lines(1);
    vm.signal(Signal::STOP);
    let (code, list, error) = place.done(&["ps"]);
    assert_eq!(code, 0, "{error}");
    let line = |name: &str| list.lines().find(|line| line.starts_with(name)).unwrap().to_owned();
    assert!(line("a ").contains("no answer"), "{list}");
    // Not its state, which may take longer than `ps` waits, on a machine under load.
    assert!(line("b ").contains("b/api.sock"), "{list}");
    let (code, _, error) = place.done(&["snapshot", "create", "a", "-o", "snap"]);
    assert_eq!((code, error.contains("kill -CONT")), (6, true), "{error}");
    let (code, _, error) = place.done(&["run", "--kernel", "kernel", "--name", "a"]);
    assert_eq!((code, error.contains("already running")), (2, true), "{error}");
    vm.signal(Signal::CONT);
    vm.wait_lines(2);
    vm.signal(Signal::TERM);
    assert_eq!(vm.end().0.code(), Some(143));
}

#[test]
fn a_snapshot_goes_on_in_a_new_process_with_the_next_round() {
    let place = Place::new();
    let vm = place.run(&["--name", "a"]);
    vm.wait_lines(2);
    let report = create(&place, &["--stop"]);
    let (status, before, messages) = vm.end();
    assert_eq!(status.code(), Some(0), "{messages}");
    assert_eq!((report.memory_bytes, report.disks[0].bytes), (64 << 20, 64 << 10));
    // The guest is gone: its disk is what the snapshot says.
    let (_, digest, _) = place.done(&["digest", "disk.img"]);
    assert!(digest.starts_with(&report.disks[0].digest), "{digest}");

    let mut vm = place.vm(&["snapshot", "restore", "snap"]);
    vm.wait_lines(3);
    vm.send(POWER_OFF);
    let (status, after, messages) = vm.end();
    assert_eq!(status.code(), Some(0), "{messages}");
    assert_unbroken(&rounds(&(before + &after)));
    assert!(messages.contains("disk vda is a private copy"), "{messages}");
    assert!(place.left().is_empty());
}

#[test]
fn a_guest_that_is_snapshotted_runs_on_and_the_restored_one_can_live_beside_it() {
    let place = Place::new();
    let mut vm = place.run(&["--name", "a"]);
    vm.wait_lines(1);
    create(&place, &["--durability", "none"]);
    vm.wait_lines(2);
    fs::create_dir(place.path("disks")).unwrap();
    let (code, _, error) = place.done(&["snapshot", "restore", "snap"]);
    assert_eq!((code, error.contains("already running")), (2, true), "{error}");
    let twin =
        place.vm(&["snapshot", "restore", "snap", "--name", "b", "--clone", "--disk-dir", "disks"]);
    twin.wait_lines(2);
    let (_, list, _) = place.done(&["ps", "--json"]);
    let list: serde_json::Value = serde_json::from_str(&list).unwrap();
    let names: Vec<&str> =
        list.as_array().unwrap().iter().map(|vm| vm["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["a", "b"]);
    twin.signal(Signal::INT);
    assert_eq!(twin.end().0.code(), Some(130));
    assert!(place.path("disks/vda.img").exists(), "a disk in --disk-dir stays");
    vm.wait_lines(1);
    vm.send(POWER_OFF);
    let (status, console, _) = vm.end();
    assert_eq!(status.code(), Some(0));
    assert_unbroken(&rounds(&console));
}

#[test]
fn a_restore_that_is_paused_runs_nothing_until_it_is_told_to() {
    let place = Place::new();
    let vm = place.run(&["--name", "a"]);
    vm.wait_lines(1);
    let first = create(&place, &["--stop"]);
    let (_, before, _) = vm.end();

    let mut vm = place.vm(&["snapshot", "restore", "snap", "--paused"]);
    let client = Client::new(&socket(&place));
    while client.info().is_err() {
        assert!(vm.child.try_wait().unwrap().is_none(), "{}", vm.messages.text());
        thread::sleep(Duration::from_millis(2));
    }
    assert_eq!(client.info().unwrap().state, InstanceState::NotStarted);
    let (code, out, error) =
        place.done(&["snapshot", "create", "a", "--output", "again", "--json"]);
    assert_eq!(code, 0, "{error}");
    let again: SnapshotReport = serde_json::from_str(&out).unwrap();
    assert_eq!(again.memory_digest, first.memory_digest);
    assert_eq!(again.disks, first.disks);
    assert_eq!(vm.console.text(), "");

    client.set_state(VmState::Resumed).unwrap();
    vm.wait_lines(2);
    client.set_state(VmState::Paused).unwrap();
    assert_eq!(client.info().unwrap().state, InstanceState::Paused);
    client.set_state(VmState::Resumed).unwrap();
    vm.wait_lines(2);
    vm.send(POWER_OFF);
    let (status, after, _) = vm.end();
    assert_eq!(status.code(), Some(0));
    assert_unbroken(&rounds(&(before + &after)));
}

#[test]
fn a_snapshot_that_is_there_is_replaced_only_by_force() {
    let place = Place::new();
    let vm = place.run(&["--name", "a"]);
    vm.wait_lines(1);
    let first = create(&place, &[]);
    let (code, _, error) = place.done(&["snapshot", "create", "a", "--output", "snap"]);
    assert_eq!((code, error.contains("--force")), (5, true), "{error}");
    vm.wait_lines(1);
    let second = create(&place, &["--force"]);
    assert_ne!(first.id, second.id);
    let (code, out, _) = place.done(&["snapshot", "verify", "snap"]);
    assert_eq!((code, out.contains(&second.id)), (0, true), "{out}");
    let (code, out, _) = place.done(&["snapshot", "inspect", "snap", "--json"]);
    let inspection: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, inspection["id"].as_str()), (0, Some(second.id.as_str())));
}

#[test]
fn a_difference_is_restored_flattened_and_compared() {
    let place = Place::new();
    let vm = place.run(&["--name", "a"]);
    vm.wait_lines(2);
    let full = create(&place, &[]);
    vm.wait_lines(2);
    let (code, out, error) = place.done(&[
        "snapshot", "create", "a", "--output", "next", "--diff", "snap", "--stop", "--json",
    ]);
    assert_eq!(code, 0, "{error}");
    let next: SnapshotReport = serde_json::from_str(&out).unwrap();
    assert!(next.stored_bytes < full.stored_bytes + 4096, "{next:?} {full:?}");
    let (status, before, messages) = vm.end();
    assert_eq!(status.code(), Some(0), "{messages}");

    let (code, out, error) = place.done(&["snapshot", "diff", "snap", "next", "--json"]);
    assert_eq!(code, 0, "{error}");
    let found: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(found["equal"], false);
    assert!(found["images"][0]["changed_chunks"].as_u64().unwrap() > 0, "{out}");
    let (code, out, _) = place.done(&["snapshot", "diff", "snap", "snap"]);
    assert_eq!((code, out.contains("the same in both")), (0, true), "{out}");

    let (code, _, error) = place.done(&["snapshot", "flatten", "next", "--output", "flat"]);
    assert_eq!(code, 0, "{error}");
    let (_, out, _) = place.done(&["snapshot", "inspect", "flat"]);
    assert!(out.contains(&next.memory_digest) && !out.contains("parent"), "{out}");

    fs::create_dir(place.path("away")).unwrap();
    fs::rename(place.path("snap"), place.path("away/snap")).unwrap();
    for command in ["verify", "restore"] {
        let (code, _, error) = place.done(&["snapshot", command, "next"]);
        assert_eq!((code, error.contains(&full.id)), (5, true), "{command}: {error}");
    }
    let (code, out, error) = place.done(&["snapshot", "verify", "next", "--parent", "away"]);
    assert_eq!((code, out.contains(&next.id)), (0, true), "{error}");
    let (_, out, _) = place.done(&["snapshot", "inspect", "next", "--parent", "away/snap"]);
    assert!(out.contains(&full.id) && out.contains("patched"), "{out}");

    let mut vm = place.vm(&["snapshot", "restore", "next", "--parent", "away"]);
    vm.wait_lines(3);
    vm.send(POWER_OFF);
    let (status, after, messages) = vm.end();
    assert_eq!(status.code(), Some(0), "{messages}");
    assert_unbroken(&rounds(&(before + &after)));
}

#[test]
fn a_damaged_snapshot_is_refused_with_the_file_and_the_chunk() {
    let place = Place::new();
    let vm = place.run(&["--name", "a"]);
    vm.wait_lines(1);
    create(&place, &["--stop"]);
    vm.end();
    let file = place.path("snap/memory.zst");
    let mut bytes = fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&file, bytes).unwrap();
    for command in ["verify", "restore"] {
        let (code, _, error) = place.done(&["snapshot", command, "snap"]);
        assert_eq!(code, 5, "{command}: {error}");
        assert!(error.contains("memory.zst: chunk "), "{command}: {error}");
    }
    assert!(place.left().is_empty());
}

#[test]
fn a_disk_of_the_users_own_has_to_be_the_snapshots() {
    let place = Place::new();
    let vm = place.run(&["--name", "a"]);
    vm.wait_lines(1);
    create(&place, &["--stop"]);
    vm.end();
    let restore = ["snapshot", "restore", "snap", "--disk", "vda=disk.img"];
    let mut vm = place.vm(&restore);
    vm.wait_lines(1);
    vm.send(POWER_OFF);
    assert_eq!(vm.end().0.code(), Some(0));
    // The guest has written to it since.
    let (code, _, error) = place.done(&restore);
    assert_eq!((code, error.contains("--allow-changed-disks")), (5, true), "{error}");
    let mut vm = place.vm(&[&restore[..], &["--allow-changed-disks"]].concat());
    vm.wait_lines(1);
    vm.send(POWER_OFF);
    assert_eq!(vm.end().0.code(), Some(0));
}

#[test]
fn a_name_is_free_again_after_its_vm_was_killed() {
    let place = Place::new();
    let vm = place.run(&["--name", "a"]);
    vm.wait_lines(1);
    let (code, _, error) = place.done(&["run", "--kernel", "kernel", "--name", "a"]);
    assert_eq!((code, error.contains("already running")), (2, true), "{error}");
    let (code, _, error) =
        place.done(&["run", "--kernel", "kernel", "--name", "b", "--disk", "disk.img"]);
    assert_eq!((code, error.contains("in use by another VM")), (2, true), "{error}");
    vm.signal(Signal::KILL);
    vm.end();
    assert!(socket(&place).exists(), "a killed VM cannot clean up");
    let (code, _, error) = place.done(&["snapshot", "create", "a", "--output", "snap"]);
    assert_eq!((code, error.contains("no VM named `a`")), (6, true), "{error}");
    let mut vm = place.run(&["--name", "a"]);
    vm.wait_lines(1);
    vm.send(POWER_OFF);
    assert_eq!(vm.end().0.code(), Some(0));
    assert!(place.left().is_empty());
}

#[test]
fn a_failed_snapshot_leaves_the_guest_running_and_nothing_behind() {
    let place = Place::new();
    let vm = place.run(&["--name", "a"]);
    vm.wait_lines(1);
    let outputs =
        |words: &[&str]| place.done(&[&["snapshot", "create", "a", "-o"], words].concat());
    let (code, _, error) = outputs(&["no/such/dir/snap", "--stop"]);
    assert_eq!(code, 5, "{error}");
    fs::create_dir(place.path("mine")).unwrap();
    fs::write(place.path("mine/file"), "precious").unwrap();
    let (code, _, error) = outputs(&["mine", "--force", "--stop"]);
    assert_eq!(code, 5, "{error}");
    assert_eq!(fs::read(place.path("mine/file")).unwrap(), b"precious");
    vm.wait_lines(2);
    let names: Vec<_> =
        fs::read_dir(place.dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names.len(), 4, "{names:?}");
}

#[test]
fn a_disk_without_room_leaves_the_guest_running_and_nothing_behind() {
    let place = Place::new();
    // A limit on the size of files, 4 KiB, stands for a full disk; the frames of memory take more.
    let mut command = Command::new("sh");
    command
        .args(["-c", "ulimit -f 8; exec \"$@\"", "sh", SQUIB])
        .args(["run", "--kernel", "kernel", "--memory", "64M", "--name", "a"])
        .args(["--backend", BACKEND])
        .current_dir(place.dir.path())
        .env("SQUIB_HOME", place.path("home"));
    let vm = Vm::start(command);
    vm.wait_lines(1);
    let (code, _, error) = place.done(&["snapshot", "create", "a", "-o", "snap", "--stop"]);
    assert_eq!((code, error.contains("no room")), (5, true), "{error}");
    let names = fs::read_dir(place.dir.path()).unwrap().map(|e| e.unwrap().file_name());
    assert!(names.into_iter().all(|name| !name.to_string_lossy().contains("snap")));
    vm.wait_lines(2);
    vm.signal(Signal::TERM);
    assert_eq!(vm.end().0.code(), Some(143));
}

#[test]
fn what_cannot_be_used_is_said_with_code_2() {
    let place = Place::new();
    fs::write(place.path("elf"), b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0").unwrap();
    let run = |words: &[&str]| {
        let (code, _, error) = place.done(&[&["run"], words].concat());
        assert_eq!(code, 2, "{words:?}: {error}");
        error
    };
    for (words, said) in [
        (&["--kernel", "nothing"][..], "No such file"),
        (&["--kernel", "elf"], "x86-64"),
        (&["--kernel", "kernel", "--disk", "nothing"], "No such file"),
        (&["--kernel", "kernel", "--disk", "."], "neither a regular file nor a block device"),
        (&["--kernel", "kernel", "--memory", "1M"], "64 MiB"),
        (&["--kernel", "kernel", "--cpus", "0"], "vCPUs"),
        (&["--kernel", "kernel", "--backend", "qemu"], "no backend `qemu`"),
        (&["--kernel", "kernel", "--name", "../x"], "name"),
        (&["--kernel", "kernel", "--deterministic", "--cpus", "2"], "one vCPU"),
        (&["--kernel", "kernel", "--api-sock", "kernel"], "not a socket"),
    ] {
        let error = run(words);
        assert!(error.contains(said), "{words:?}: {error}");
    }
    let error = run(&["--kernel", "kernel", "--api-sock", &"x".repeat(200)]);
    assert!(error.contains("--api-sock"), "{error}");
}

#[test]
fn a_client_of_a_vm_that_has_ended_is_told_so() {
    let place = Place::new();
    let missing = Path::new("/nonexistent/api.sock");
    assert!(matches!(Client::new(missing).info(), Err(ClientError::Connect { .. })));
    let (code, _, error) = place.done(&["snapshot", "create", "./none.sock", "-o", "snap"]);
    assert_eq!((code, error.contains("squib ps")), (6, true), "{error}");
}
