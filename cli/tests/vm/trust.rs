//! Snapshots from others: what they name on this host, and what they would write to the terminal.

use std::{fs, os::unix::ffi::OsStrExt, path::Path};

use squib_formats::{
    digest::Digest,
    header::{ARCH_AARCH64, Header},
    manifest::Manifest,
    snapshot_dir::Snapshot,
};

use crate::common::{PATIENCE, Place, create};

/// The program's exit code for a snapshot that it does not take.
const SNAPSHOT: i32 = 5;

/// The snapshot `snap` of a VM that has ended, whose disk stays outside.
fn with_outside_disk() -> Place {
    let place = Place::new();
    let mut vm = place.run(&["--name", "a"]);
    vm.wait_lines(1);
    create(&place, &["--disk-mode", "reference", "--stop"]);
    assert!(vm.child.wait().unwrap().success());
    place
}

/// A copy of `snap` with another manifest, called `name`.
fn changed(place: &Place, name: &str, change: impl Fn(&mut Manifest)) {
    let path = place.path(name);
    fs::create_dir(&path).unwrap();
    for entry in fs::read_dir(place.path("snap")).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), path.join(entry.file_name())).unwrap();
    }
    let mut manifest = Snapshot::open(&path).unwrap().manifest().clone();
    change(&mut manifest);
    let mut body = manifest.encode().unwrap();
    // A value that no manifest is written with.
    let stand_in = "Z".repeat(HOSTILE.len());
    while let Some(at) = body.windows(stand_in.len()).position(|part| part == stand_in.as_bytes()) {
        body[at..at + HOSTILE.len()].copy_from_slice(HOSTILE.as_bytes());
    }
    let header = Header::new(ARCH_AARCH64, manifest.minor(), &body).encode();
    fs::write(path.join("manifest"), [&header[..], &body].concat()).unwrap();
}

#[test]
fn a_disk_outside_the_snapshot_is_opened_only_where_the_user_says() {
    let place = with_outside_disk();
    let disk = fs::canonicalize(place.path("disk.img")).unwrap();
    let (disk, dir) = (disk.display(), place.dir.path().display());
    for command in ["restore", "check"] {
        let (code, out, err) = place.done(&["snapshot", command, "snap"]);
        assert_eq!(code, SNAPSHOT);
        let said = out + &err;
        for text in [&*disk.to_string(), "--disk ", "--allow-disk "] {
            assert!(said.contains(text), "{text} in {said}");
        }
    }
    assert!(place.left().is_empty());
    fs::copy(place.path("disk.img"), place.path("kept")).unwrap();
    let places = [format!("--allow-disk={dir}"), "--disk=vda=disk.img".into()];
    for allowed in &places {
        let (code, out, err) = place.done(&["snapshot", "check", "snap", allowed]);
        assert_eq!(code, 0, "{out}{err}");
        let vm = place.vm(&["snapshot", "restore", "snap", allowed]);
        vm.wait_lines(1);
        let told = |text: &str| text.contains("the guest can write to").then(|| text.to_owned());
        let told = vm.messages.wait_for(PATIENCE, told).unwrap();
        assert!(told.contains("disk.img: disk vda, outside the snapshot"), "{told}");
        drop(vm);
        // The guest has written to it.
        fs::copy(place.path("kept"), place.path("disk.img")).unwrap();
    }
    changed(&place, "relative", |manifest| manifest.machine.disks[0].path = "disk.img".into());
    let (code, _, err) = place.done(&["snapshot", "restore", "relative", &places[0]]);
    assert!(code == SNAPSHOT && err.contains("--disk vda=PATH"), "{code} {err}");
}

#[test]
fn whatever_in_a_snapshot_is_refused_is_the_snapshots_fault() {
    let place = with_outside_disk();
    fs::copy(place.path("disk.img"), place.path("kept")).unwrap();
    let mut refused = Vec::new();
    let sections = Snapshot::open(&place.path("snap")).unwrap().manifest().sections.clone();
    for (at, section) in sections.iter().enumerate() {
        let mut state = fs::read(place.path("snap/state")).unwrap();
        let range = section.offset as usize..(section.offset + section.length) as usize;
        state[range.clone()].fill(0xff);
        let digest = Digest::of(&state[range]);
        changed(&place, "changed", |manifest| {
            manifest.sections[at].digest = digest;
            let file = manifest.files.iter_mut().find(|file| file.name == "state").unwrap();
            file.digest = Digest::of(&state);
        });
        fs::write(place.path("changed/state"), &state).unwrap();
        let words = |command| ["snapshot", command, "changed", "--disk", "vda=disk.img"];
        // What is accepted would run.
        if place.done(&words("check")).0 == SNAPSHOT {
            let (code, _, err) = place.done(&words("restore"));
            assert_eq!(code, SNAPSHOT, "{} {}: {err}", section.kind, section.instance);
            refused.push(&*section.kind);
        }
        fs::remove_dir_all(place.path("changed")).unwrap();
    }
    assert!(refused.len() + 2 >= sections.len() && refused.contains(&"vcpu"), "{refused:?}");
    for (what, change) in [
        ("name", (|m| m.machine.name = "../x".into()) as fn(&mut Manifest)),
        ("vCPUs", |m| m.machine.vcpus = 0),
        ("backend", |m| m.machine.backend = "x".into()),
    ] {
        changed(&place, "changed", change);
        let (code, _, err) = place.done(&["snapshot", "restore", "changed"]);
        assert_eq!(code, SNAPSHOT, "{what}: {err}");
        fs::remove_dir_all(place.path("changed")).unwrap();
    }
    assert!(place.left().is_empty());
}

#[test]
fn what_is_the_users_own_is_not_replaced() {
    let place = with_outside_disk();
    fs::write(place.path("snap/notes"), "x").unwrap();
    let mut vm = place.run(&["--name", "a"]);
    vm.wait_lines(1);
    let words = ["snapshot", "create", "a", "--output", "snap", "--force"];
    let (code, _, err) = place.done(&words);
    assert!(code == SNAPSHOT && err.contains("notes"), "{code} {err}");
    assert_eq!(fs::read(place.path("snap/notes")).unwrap(), b"x");
    // A manifest that nobody writes to is not waited for, and the VM can be told other things.
    fs::create_dir(place.path("trap")).unwrap();
    assert!(
        std::process::Command::new("mkfifo")
            .arg(place.path("trap/manifest"))
            .status()
            .unwrap()
            .success()
    );
    for words in [
        &["snapshot", "create", "a", "--output", "trap", "--force"][..],
        &["snapshot", "create", "a", "--output", "diff", "--diff", "trap"],
    ] {
        let (code, _, err) = place.done(words);
        assert_eq!(code, SNAPSHOT, "{err}");
    }
    fs::remove_file(place.path("snap/notes")).unwrap();
    let (code, _, err) = place.done(&words);
    assert_eq!(code, 0, "{err}");
    vm.wait_lines(1);
    assert!(vm.child.try_wait().unwrap().is_none());
}

/// What no terminal may get, in a text that pretends to be a line of squib's own.
const HOSTILE: &str = "x\u{1b}[2J\u{1b}]0;t\u{7}\u{9b}31m\u{7f}\u{8}\r\u{202e}\u{2066}\u{200e}\u{61c}\
                       \u{200b}\u{2028}\u{2029}\u{feff}\u{ad}\u{e0041}\t\nFORGED line";

/// Whether a terminal shows the text as it stands.
fn assert_plain(what: &str, text: &[u8]) {
    let text = str::from_utf8(text).unwrap_or_else(|_| panic!("{what}: not UTF-8: {text:?}"));
    let bad = |c: char| {
        c != '\n' && c.is_control()
            || matches!(u32::from(c),
                0xad | 0x61c | 0x200b..=0x200f | 0x2028..=0x202e | 0x2060..=0x206f | 0xfeff
                    | 0xe0000..=0xe007f)
    };
    assert!(!text.contains(bad), "{what}: {text:?}");
    let forged = text.lines().any(|line| line.trim_start().starts_with("FORGED"));
    assert!(!forged, "{what}: {text}");
}

/// What a command shows on stdout and stderr, which has to be plain.
fn shown(place: &Place, words: &[&str]) -> (Vec<u8>, Vec<u8>) {
    let output = place.squib(words).output().unwrap();
    assert_ne!(output.status.code(), Some(101), "{words:?}");
    let what = format!("{words:?}");
    assert_plain(&what, &output.stdout);
    assert_plain(&what, &output.stderr);
    (output.stdout, output.stderr)
}

#[test]
fn no_command_writes_what_a_snapshot_holds_so_that_a_terminal_obeys_it() {
    let place = with_outside_disk();
    type Change = fn(&mut Manifest);
    let fields: [(&str, Change); 14] = [
        ("name", |m| m.machine.name = HOSTILE.into()),
        ("cmdline", |m| m.machine.cmdline = HOSTILE.into()),
        ("kernel-path", |m| m.machine.kernel = HOSTILE.into()),
        ("initrd", |m| m.machine.initrd = Some(HOSTILE.into())),
        ("disk-path", |m| m.machine.disks[0].path = format!("/{HOSTILE}")),
        ("disk-relative", |m| m.machine.disks[0].path = HOSTILE.into()),
        ("disk-id", |m| m.machine.disks[0].id = "Z".repeat(HOSTILE.len())),
        ("backend", |m| m.machine.backend = HOSTILE.into()),
        ("cpu-backend", |m| m.cpu.backend = HOSTILE.into()),
        ("writer", |m| m.writer = HOSTILE.into()),
        ("host", |m| m.host = HOSTILE.into()),
        ("section-kind", |m| m.sections[0].kind = HOSTILE.into()),
        ("section-instance", |m| m.sections[0].instance = HOSTILE.into()),
        ("hint", |m| {
            m.parent = Some(Digest([7; 32]));
            m.parent_hint = Some(HOSTILE.into());
        }),
    ];
    let (mut told, mut refused) = (0, 0);
    for (field, change) in fields {
        // What this build does not write it may still be given.
        changed(&place, field, change);
        let commands: [&[&str]; 13] = [
            &["inspect", field],
            &["inspect", "--json", field],
            &["verify", field],
            &["verify", "--json", field],
            &["check", field],
            &["check", "--json", field],
            &["diff", "snap", field],
            &["diff", "--json", field, "snap"],
            &["flatten", field, "--output", "made"],
            &["rebase", field, "--onto", "snap", "--output", "made2"],
            &["optimize", field],
            // Its disk, or what comes before, is refused: no guest runs.
            &["restore", field],
            &["rm", field],
        ];
        for command in commands {
            let words = [&["snapshot"], command].concat();
            let (out, err) = shown(&place, &words);
            told += usize::from(out.windows(6).any(|part| part == b"FORGED"));
            refused += usize::from(err.windows(6).any(|part| part == b"FORGED"));
        }
        for made in ["made", "made2", field] {
            let _ = fs::remove_dir_all(place.path(made));
        }
    }
    assert!(
        told > 30 && refused > 5,
        "the fields are shown: {told} on stdout, {refused} on stderr"
    );
    hostile_names(&place);
}

/// Names of files and directories.
fn hostile_names(place: &Place) {
    changed(place, HOSTILE, |_| ());
    let extra = Path::new(HOSTILE).join("extra\u{1b}[2J\nFORGED");
    fs::write(place.path("").join(&extra), "").unwrap();
    fs::write(place.path("").join(HOSTILE).join(std::ffi::OsStr::from_bytes(b"\xff\x9b")), "")
        .unwrap();
    let extra = extra.to_str().unwrap();
    for words in [
        &["snapshot", "inspect", HOSTILE][..],
        &["snapshot", "verify", HOSTILE],
        &["snapshot", "verify", "--json", HOSTILE],
        &["snapshot", "check", HOSTILE],
        &["snapshot", "diff", HOSTILE, "snap"],
        &["snapshot", "restore", HOSTILE],
        &["snapshot", "inspect", "snap/none\u{1b}[2J"],
        &["snapshot", "flatten", HOSTILE, "--output", "out\u{1b}[2J"],
        &["snapshot", "rebase", HOSTILE, "--onto", "out\u{1b}[2J", "--output", "out\u{9b}"],
        &["snapshot", "rm", HOSTILE],
        &["snapshot", "rm", "--force", "--json", "out\u{1b}[2J"],
        &["digest", extra],
        &["digest", "--json", extra],
        &["snapshot", "create", HOSTILE, "--output", "none"],
        &["run", "--kernel", extra, "--disk", extra],
        &["snapshot", "cache", "ls"],
        &["ps"],
        &["doctor"],
        &["doctor", "--json"],
        &["snapshot", "rm", "--force", HOSTILE],
    ] {
        shown(place, words);
    }
    assert!(!place.path("").join(HOSTILE).exists());
}
