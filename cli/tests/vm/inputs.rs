//! What `run` and `demo` say of files and numbers that cannot be used, before anything is started.

use std::fs;

use squib_tests::tiny::POWER_OFF;

use crate::{BACKEND, common::Place};

/// Runs a VM that is refused, and returns what is said.
fn refused(place: &Place, words: &[&str]) -> String {
    let words = [&["run", "--kernel", "kernel", "--memory", "64M"], words].concat();
    let (code, out, err) = place.done(&words);
    assert_eq!((code, &*out), (2, ""), "{words:?}: {err}");
    err
}

#[test]
fn what_is_no_initrd_and_what_is_no_raw_disk_is_refused_by_name() {
    let place = Place::new();
    fs::write(place.path("empty"), "").unwrap();
    fs::write(place.path("noise"), [0xa5; 4096]).unwrap();
    fs::write(place.path("q.img"), [&b"QFI\xfb"[..], &[0; 1020]].concat()).unwrap();
    for (file, said) in
        [("empty", "it is empty"), ("noise", "begins with a5"), ("kernel", "is a kernel")]
    {
        let found = refused(&place, &["--initrd", file]);
        assert!(found.contains(&format!("{file}: it is")) && found.contains(said), "{found}");
    }
    let found = refused(&place, &["--disk", "q.img"]);
    assert!(found.contains("qemu-img convert -f qcow2 -O raw"), "{found}");
    assert!(refused(&place, &["--disk", "q.img,format=qcow2"]).contains("only raw disks"));
    let found = refused(&place, &["--disk", "disk.img", "--disk", "disk.img"]);
    assert!(found.contains("is the same file as its disk vda"), "{found}");
    let mut vm = place.run(&["--disk", "q.img,format=raw"]);
    vm.wait_lines(1);
    vm.send(POWER_OFF);
    assert_eq!(vm.end().0.code(), Some(0));
}

#[test]
fn a_machine_that_cannot_be_is_refused_before_anything_is_fetched() {
    let place = Place::new();
    for words in [
        &["demo", "--cpus", "0"][..],
        &["demo", "--deterministic", "--cpus", "2"],
        &["demo", "--memory", "1M"],
        &["run", "--kernel", "kernel", "--deterministic", "--cpus", "2"],
    ] {
        let (code, out, err) = place.done(words);
        assert_eq!((code, &*out), (2, ""), "{words:?}: {err}");
    }
    assert!(!place.path("cache").exists());
    let (code, _, err) = place.done(&["run"]);
    assert_eq!(code, 2, "{err}");
    assert!(err.contains("`squib kit fetch`"), "{err}");
}

#[test]
fn more_memory_than_the_host_has_is_said() {
    // Others have a smaller address space.
    if BACKEND != "soft" {
        return;
    }
    let total = squib_snapshot::host::memory().unwrap().total;
    let place = Place::new();
    let memory = format!("{}M", 2 * (total >> 20).next_multiple_of(2));
    let mut vm = place.vm(&["run", "--kernel", "kernel", "--memory", &memory]);
    vm.wait_lines(1);
    vm.send(POWER_OFF);
    let (status, _, messages) = vm.end();
    assert_eq!(status.code(), Some(0), "{messages}");
    assert!(messages.contains(" of memory, this host "), "{messages}");
}
