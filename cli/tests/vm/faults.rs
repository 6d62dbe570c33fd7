//! What happens to snapshots when something comes in between: signals, replaced and damaged directories.

#![allow(clippy::disallowed_macros, reason = "a test may print")]

use std::{
    ffi::OsStr,
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use squib_tests::{
    console::Capture,
    tiny::{POWER_OFF, Tiny},
};

use crate::{BACKEND, SQUIB};

/// Bounds how long something that hangs is waited for.
const PATIENCE: Duration = Duration::from_secs(120);
/// How often a signal is sent until one has come half-way.
const TRIES: u32 = 20;
/// Large enough for a command to be met at work on it.
const DISK: usize = 96 << 20;

/// A folder with a guest whose disk does not compress, and a run-time folder of its own.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let tiny = Tiny { timer_ticks: 200_000, print_every: 64 };
        tiny.write(&dir.path().join("kernel")).unwrap();
        let mut state = 0x5155_4942u64;
        let mut disk = Vec::with_capacity(DISK);
        while disk.len() < DISK {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            disk.extend_from_slice(&state.to_le_bytes());
        }
        fs::write(dir.path().join("disk.img"), disk).unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn squib<S: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(SQUIB);
        command.args(words).current_dir(self.dir.path()).env("SQUIB_HOME", self.path("home"));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs a command to its end: exit code, stdout, stderr.
    fn done(&self, words: &[&str]) -> (i32, String, String) {
        ended(self.squib(words).output().unwrap())
    }

    /// A VM whose guest has printed a line.
    fn vm(&self, words: &[&str]) -> Vm {
        let vm = Vm::start(self.squib(words));
        vm.wait_line();
        vm
    }

    fn run(&self) -> Vm {
        self.vm(&[
            "run",
            "--kernel",
            "kernel",
            "--memory",
            "64M",
            "--disk",
            "disk.img",
            "--name",
            "a",
            "--backend",
            BACKEND,
        ])
    }

    /// A snapshot `snap`, and `next` that builds on it, of a guest that has ended.
    fn family(&self) {
        let vm = self.run();
        self.create("snap", &[]);
        vm.wait_line();
        self.create("next", &["--diff", "snap", "--stop"]);
        vm.end();
    }

    fn create(&self, output: &str, more: &[&str]) {
        let words = ["snapshot", "create", "a", "--durability", "none", "-o", output];
        let (code, _, error) = self.done(&[&words[..], more].concat());
        assert_eq!(code, 0, "{error}");
    }

    /// What lies in `folder`, hidden names too.
    fn names(&self, folder: &str) -> Vec<String> {
        let entries = fs::read_dir(self.path(folder)).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn intact(&self, snapshot: &str) {
        let (code, _, error) = self.done(&["snapshot", "verify", snapshot]);
        assert_eq!(code, 0, "{error}");
    }

    /// Runs `words` and sends SIGINT once `begun` holds, again and again until it has come half-way: then
    /// the command ends with 130 and says that it has given up.
    fn interrupted(&self, words: &[&str], begun: impl Fn() -> bool, undo: impl Fn()) {
        for _ in 0..TRIES {
            let mut child = self.squib(words).spawn().unwrap();
            let deadline = Instant::now() + PATIENCE;
            while !begun() && child.try_wait().unwrap().is_none() && Instant::now() < deadline {
                thread::sleep(Duration::from_millis(1));
            }
            signal(&child, Signal::INT);
            let (code, _, error) = ended(child.wait_with_output().unwrap());
            match code {
                130 if error.contains("given up") => return,
                0 | 130 => undo(),
                _ => panic!("{words:?} ended with {code}: {error}"),
            }
        }
        panic!("{words:?} was never met at work");
    }

    fn is_writing(&self) -> bool {
        self.names(".").iter().any(|name| name.contains(".partial-"))
    }
}

fn ended(output: Output) -> (i32, String, String) {
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
}

fn signal(child: &Child, signal: Signal) {
    // It may have ended, but nobody has waited for it.
    kill_process(Pid::from_child(child), signal).unwrap();
}

struct Vm {
    child: Child,
    console: Capture,
}

impl Vm {
    fn start(mut command: Command) -> Self {
        command.stdin(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let console = Capture::default();
        let (mut out, mut into) = (child.stdout.take().unwrap(), console.clone());
        thread::spawn(move || drop(std::io::copy(&mut out, &mut into)));
        Self { child, console }
    }

    fn wait_line(&self) {
        let lines = |text: &str| text.matches('\n').count();
        let had = lines(&self.console.text());
        let seen = self.console.wait_for(PATIENCE, |text| (lines(text) > had).then_some(()));
        assert!(seen.is_some(), "{}", self.console.text());
    }

    fn power_off(mut self) {
        use std::io::Write;
        self.child.stdin.as_mut().unwrap().write_all(&[POWER_OFF]).unwrap();
        assert_eq!(self.child.wait().unwrap().code(), Some(0));
    }

    fn end(mut self) {
        assert_eq!(self.child.wait().unwrap().code(), Some(0));
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn an_interrupted_flatten_or_rebase_leaves_nothing_and_ends_with_130() {
    let place = Place::new();
    place.family();
    let before = place.names(".");
    for words in [
        ["snapshot", "flatten", "next", "-o", "out", "--durability", "none"].as_slice(),
        &["snapshot", "rebase", "next", "--onto", "next", "-o", "out", "--durability", "none"],
    ] {
        let undo = || drop(fs::remove_dir_all(place.path("out")));
        place.interrupted(words, || place.is_writing(), undo);
        assert_eq!(place.names("."), before, "{words:?}");
    }
    place.intact("next");
}

#[test]
fn an_interrupted_create_leaves_nothing_and_the_guest_goes_on() {
    let place = Place::new();
    let vm = place.run();
    let before = place.names(".");
    for _ in 0..TRIES {
        let mut child = place.squib(["snapshot", "create", "a", "-o", "out"]).spawn().unwrap();
        while !place.is_writing() && child.try_wait().unwrap().is_none() {
            thread::sleep(Duration::from_millis(1));
        }
        signal(&child, Signal::INT);
        let (code, _, error) = ended(child.wait_with_output().unwrap());
        assert!([0, 130].contains(&code), "{code}: {error}");
        // The VM hears of it a moment later.
        let deadline = Instant::now() + PATIENCE;
        while place.is_writing() {
            assert!(Instant::now() < deadline, "{:?}", place.names("."));
            thread::sleep(Duration::from_millis(1));
        }
        vm.wait_line();
        if code == 130 && !place.path("out").exists() {
            assert_eq!(place.names("."), before);
            place.create("out", &[]);
            place.intact("out");
            return vm.power_off();
        }
        fs::remove_dir_all(place.path("out")).unwrap();
    }
    panic!("create was never met at work");
}

#[test]
fn an_interrupted_restore_leaves_no_disk_and_ends_with_130() {
    let place = Place::new();
    place.family();
    fs::create_dir(place.path("disks")).unwrap();
    let words = ["snapshot", "restore", "next", "--disk-dir", "disks"];
    let disk = place.path("disks/vda.img");
    let undo = || drop(fs::remove_file(&disk));
    place.interrupted(&words, || disk.exists(), undo);
    for folder in ["disks", "home/run/vms", "home/disks"] {
        assert_eq!(place.names(folder), [""; 0], "{folder}");
    }
    place.vm(&["snapshot", "restore", "next"]).power_off();
}

#[test]
fn the_snapshot_that_a_guest_runs_from_can_be_replaced() {
    let place = Place::new();
    let vm = place.run();
    place.create("snap", &["--stop"]);
    vm.end();
    for _ in 0..3 {
        let vm = place.vm(&["snapshot", "restore", "snap"]);
        place.create("snap", &["--force"]);
        vm.wait_line();
        place.create("snap", &["--force", "--stop"]);
        vm.end();
        place.intact("snap");
    }
    place.vm(&["snapshot", "restore", "snap"]).power_off();
    assert!(!place.is_writing());
}

#[test]
fn a_restore_from_a_directory_that_is_being_replaced_is_whole_or_refused() {
    let place = Place::new();
    let vm = place.run();
    place.create("snap", &[]);
    let stop = std::sync::atomic::AtomicBool::new(false);
    let restored = thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                place.create("snap", &["--force"]);
            }
        });
        let mut restored = 0;
        for _ in 0..4 {
            let mut twin = place.squib(["snapshot", "restore", "snap", "--name", "b", "--clone"]);
            let mut twin = Vm { child: twin.spawn().unwrap(), console: Capture::default() };
            let (mut out, mut into) = (twin.child.stdout.take().unwrap(), twin.console.clone());
            thread::spawn(move || drop(std::io::copy(&mut out, &mut into)));
            let deadline = Instant::now() + PATIENCE;
            let code = loop {
                if let Some(status) = twin.child.try_wait().unwrap() {
                    break status.code();
                }
                if twin.console.text().contains('\n') {
                    restored += 1;
                    signal(&twin.child, Signal::TERM);
                    break twin.child.wait().unwrap().code();
                }
                assert!(Instant::now() < deadline);
                thread::sleep(Duration::from_millis(2));
            };
            // 5: a file of the old snapshot was gone.
            assert!([Some(143), Some(5)].contains(&code), "{code:?}");
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        restored
    });
    eprintln!("{restored} of 4 were restored");
    place.intact("snap");
    assert_eq!(place.names("home/disks"), [""; 0]);
    vm.power_off();
}

/// `check` says what `restore` does, and both name the file.
fn refused(place: &Place, expected: &[&str]) {
    let (code, out, error) = place.done(&["snapshot", "check", "snap"]);
    assert_eq!(code, 5, "{out}{error}");
    let (code, _, error) = place.done(&["snapshot", "restore", "snap"]);
    assert_eq!(code, 5, "{error}");
    for word in expected {
        assert!(error.contains(word), "expected `{word}` in: {error}");
    }
    assert_eq!(place.names("home/disks"), [""; 0]);
}

#[test]
fn files_of_the_wrong_size_or_kind_are_refused_by_name() {
    let place = Place::new();
    let vm = place.run();
    place.create("snap", &["--stop"]);
    vm.end();
    for name in ["manifest", "state", "memory.idx", "memory.zst", "disk-vda.idx", "disk-vda.zst"] {
        let (file, kept) = (place.path(&format!("snap/{name}")), place.path("kept"));
        fs::rename(&file, &kept).unwrap();
        let whole = fs::read(&kept).unwrap();
        for bytes in [&whole[..whole.len() - 1], &[&whole[..], b"x"].concat()] {
            fs::write(&file, bytes).unwrap();
            refused(&place, &[name, "bytes long"]);
            fs::remove_file(&file).unwrap();
        }
        symlink(&kept, &file).unwrap();
        let (code, _, error) = place.done(&["snapshot", "restore", "snap"]);
        assert_eq!((code, error.contains("symbolic link")), (5, true), "{name}: {error}");
        assert!(error.contains(name), "{error}");
        fs::remove_file(&file).unwrap();
        fs::create_dir(&file).unwrap();
        let (code, _, error) = place.done(&["snapshot", "restore", "snap"]);
        assert_eq!((code, error.contains(name)), (5, true), "{error}");
        fs::remove_dir(&file).unwrap();
        fs::rename(&kept, &file).unwrap();
    }
    place.intact("snap");
    let (code, out, _) = place.done(&["snapshot", "check", "snap"]);
    assert_eq!((code, out.contains("a restore would be accepted")), (0, true), "{out}");
}

#[test]
fn a_file_that_may_not_be_read_is_named() {
    if rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED a_file_that_may_not_be_read_is_named: root may read everything");
        return;
    }
    let place = Place::new();
    let vm = place.run();
    place.create("snap", &["--stop"]);
    vm.end();
    for name in ["manifest", "state", "memory.idx", "memory.zst"] {
        let file = place.path(&format!("snap/{name}"));
        fs::set_permissions(&file, fs::Permissions::from_mode(0o000)).unwrap();
        let (code, _, error) = place.done(&["snapshot", "restore", "snap"]);
        assert_eq!(code, 5, "{error}");
        assert!(error.contains(name) && error.contains("Permission denied"), "{error}");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    }
    place.intact("snap");
}

#[test]
fn a_parent_is_not_removed_or_replaced_while_a_difference_elsewhere_needs_it() {
    let place = Place::new();
    let vm = place.run();
    place.create("snap", &[]);
    for folder in ["far", "farther"] {
        fs::create_dir(place.path(folder)).unwrap();
    }
    place.create("far/next", &["--diff", "snap"]);
    let rebase = ["snapshot", "rebase", "snap", "--onto", "far/next", "-o", "farther/last"];
    let (code, out, error) = place.done(&rebase);
    assert_eq!((code, out.contains("a chain of 3")), (0, true), "{error}");
    for words in [
        ["snapshot", "rm", "snap"].as_slice(),
        &["snapshot", "create", "a", "-o", "snap", "--force"],
    ] {
        let (code, _, error) = place.done(words);
        assert_eq!(code, 5, "{error}");
        for child in ["far/next", "farther/last"] {
            assert!(error.contains(child), "{words:?}: {error}");
        }
    }
    place.intact("farther/last");
    // A child that is gone does not count.
    let (code, _, error) = place.done(&["snapshot", "rm", "farther/last"]);
    assert_eq!(code, 0, "{error}");
    fs::remove_dir_all(place.path("far/next")).unwrap();
    place.create("snap", &["--force"]);
    let (code, out, error) = place.done(&["snapshot", "rm", "snap", "--json"]);
    assert_eq!(code, 0, "{error}");
    let removed: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(removed["dependents"].as_array().unwrap().len(), 0);
    assert!(!place.path("snap").exists());
    vm.power_off();
}
