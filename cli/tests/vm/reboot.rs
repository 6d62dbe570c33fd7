//! A guest that asks for a reset, before and after a restore.

use std::fs;

use squib_tests::tiny::{POWER_OFF, RESET, WARM_RESET};

use crate::common::{Place, Vm, create, rounds};

const RESTART: [&str; 4] = ["--name", "a", "--on-reset", "restart"];

/// Snapshots a VM `a` of `place` and restores it with `more`.
fn restored(place: &Place, run: &[&str], create_more: &[&str], more: &[&str]) -> Vm {
    let vm = place.run(run);
    vm.wait_lines(2);
    create(place, &[&["--stop"], create_more].concat());
    vm.end();
    let vm = place.vm(&[&["snapshot", "restore", "snap"], more].concat());
    vm.wait_lines(1);
    vm
}

/// Waits until the guest counts from its beginning again.
fn wait_reboot(vm: &Vm) {
    let again = vm.console.wait_for(crate::common::PATIENCE, |text| {
        rounds(text).windows(2).any(|pair| pair[1] < pair[0]).then_some(())
    });
    assert!(again.is_some(), "{}\n{}", vm.console.text(), vm.messages.text());
}

#[test]
fn a_restored_guest_boots_again_as_its_operator_chose() {
    let place = Place::new();
    let mut vm = restored(&place, &RESTART, &[], &[]);
    vm.send(RESET);
    wait_reboot(&vm);
    // The machine that booted again is one that can be captured and restored too.
    fs::remove_dir_all(place.path("snap")).unwrap();
    create(&place, &[]);
    vm.send(POWER_OFF);
    let (status, _, messages) = vm.end();
    assert_eq!(status.code(), Some(0), "{messages}");
    let mut vm = place.vm(&["snapshot", "restore", "snap"]);
    vm.wait_lines(1);
    vm.send(RESET);
    wait_reboot(&vm);
    vm.send(POWER_OFF);
    assert_eq!(vm.end().0.code(), Some(0));
    assert!(place.left().is_empty());
}

#[test]
fn a_restore_can_choose_otherwise_and_advises_what_it_has() {
    let place = Place::new();
    let mut vm = restored(&place, &RESTART, &[], &["--on-reset", "exit"]);
    vm.send(RESET);
    let (status, _, messages) = vm.end();
    assert_eq!(status.code(), Some(3), "{messages}");
    assert!(messages.contains("`--on-reset restart` boots again"), "{messages}");
    let mut vm = place.vm(&["snapshot", "restore", "snap", "--on-reset", "restart"]);
    vm.wait_lines(1);
    vm.send(RESET);
    wait_reboot(&vm);
    vm.send(POWER_OFF);
    assert_eq!(vm.end().0.code(), Some(0));
}

#[test]
fn a_kernel_that_is_another_by_now_is_not_booted() {
    let place = Place::new();
    let mut vm = restored(&place, &RESTART, &[], &[]);
    let kernel = fs::read(place.path("kernel")).unwrap();
    fs::write(place.path("kernel"), [&kernel[..], b"x"].concat()).unwrap();
    vm.send(RESET);
    let (status, _, messages) = vm.end();
    assert_eq!(status.code(), Some(2), "{messages}");
    assert!(messages.contains("the machine booted from a file with"), "{messages}");
    assert!(place.left().is_empty());
    // Where it is not there at all, that is said before the guest needs it.
    fs::rename(place.path("kernel"), place.path("elsewhere")).unwrap();
    let mut vm = place.vm(&["snapshot", "restore", "snap"]);
    vm.wait_lines(1);
    assert!(vm.messages.text().contains("--kernel FILE names it"), "{}", vm.messages.text());
    vm.send(RESET);
    let (status, _, messages) = vm.end();
    assert_eq!(status.code(), Some(2), "{messages}");
    fs::write(place.path("elsewhere"), kernel).unwrap();
    let mut vm = place.vm(&["snapshot", "restore", "snap", "--kernel", "elsewhere"]);
    vm.wait_lines(1);
    vm.send(RESET);
    wait_reboot(&vm);
    vm.send(POWER_OFF);
    assert_eq!(vm.end().0.code(), Some(0));
}

#[test]
fn a_snapshot_with_its_kernel_boots_again_anywhere() {
    let place = Place::new();
    let mut vm = restored(&place, &RESTART, &["--with-kernel"], &[]);
    fs::remove_file(place.path("kernel")).unwrap();
    vm.send(RESET);
    wait_reboot(&vm);
    vm.send(POWER_OFF);
    let (status, _, messages) = vm.end();
    assert_eq!(status.code(), Some(0), "{messages}");
    let (code, _, err) = place.done(&["snapshot", "verify", "snap"]);
    assert_eq!(code, 0, "{err}");
    // What is written again has it too.
    let (code, _, err) = place.done(&["snapshot", "flatten", "snap", "--output", "flat"]);
    assert_eq!(code, 0, "{err}");
    assert_eq!(
        fs::read(place.path("flat/kernel")).unwrap(),
        fs::read(place.path("snap/kernel")).unwrap()
    );
}

#[test]
fn a_panic_is_told_from_a_reset() {
    let place = Place::new();
    let mut vm = restored(&place, &["--name", "a"], &[], &[]);
    vm.send(WARM_RESET);
    let (status, _, messages) = vm.end();
    assert_eq!(status.code(), Some(4), "{messages}");
    assert!(messages.contains("kernel panicked"), "{messages}");
    // A guest that was not told to tell the one from the other only asks for a reset.
    let mut vm = place.run(&["--cmdline", "console=ttyS0 panic=-1"]);
    vm.wait_lines(1);
    vm.send(WARM_RESET);
    let (status, _, messages) = vm.end();
    assert_eq!(status.code(), Some(3), "{messages}");
}

#[test]
fn a_file_that_a_reset_could_not_boot_is_refused_at_once() {
    let place = Place::new();
    let mut vm = restored(&place, &RESTART, &[], &["--kernel", "kernel"]);
    vm.send(POWER_OFF);
    assert_eq!(vm.end().0.code(), Some(0));
    fs::write(place.path("other"), b"no kernel of this guest").unwrap();
    for (words, said) in [
        (["--kernel", "other"], "the guest was booted from a file with"),
        (["--kernel", "none"], "No such file"),
        (["--initrd", "other"], "the guest was booted without one"),
    ] {
        let words = [&["snapshot", "restore", "snap"][..], &words].concat();
        let (code, _, err) = place.done(&words);
        assert!(code == 2 && err.contains(said), "{words:?}: {code} {err}");
        assert!(place.left().is_empty(), "{:?}", place.left());
    }
}
