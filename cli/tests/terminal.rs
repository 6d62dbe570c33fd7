//! The console on a terminal: raw while the VM lives, and given back on every way out.

use std::{
    fs::File,
    os::unix::{ffi::OsStrExt, fs::OpenOptionsExt},
    process::{Child, Command},
    thread,
    time::Duration,
};

use rustix::{
    fs::OFlags,
    process::{Pid, Signal, kill_process},
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{LocalModes, tcgetattr},
};
use squib_tests::{
    console::Capture,
    tiny::{POWER_OFF, Tiny, input_hash},
};

const PATIENCE: Duration = Duration::from_secs(120);

/// A terminal with a VM on it.
struct Seat {
    master: File,
    terminal: File,
    screen: Capture,
    child: Child,
    _dir: tempfile::TempDir,
}

/// The settings of a terminal, in a form that can be compared.
fn settings(terminal: &File) -> String {
    let modes = tcgetattr(terminal).unwrap();
    format!(
        "{:?} {:?} {:?} {:?}",
        modes.input_modes, modes.output_modes, modes.control_modes, modes.local_modes
    )
}

impl Seat {
    /// Sits down, and waits until the guest has begun to print.
    fn new() -> (Self, String) {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let terminal = File::options()
            .read(true)
            .write(true)
            .custom_flags(OFlags::NOCTTY.bits() as i32)
            .open(std::ffi::OsStr::from_bytes(name.as_bytes()))
            .unwrap();
        let before = settings(&terminal);

        let dir = tempfile::tempdir().unwrap();
        let tiny = Tiny { timer_ticks: 200_000, print_every: 64 };
        tiny.write(&dir.path().join("kernel")).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_squib"))
            .args(["run", "--kernel", "kernel", "--memory", "64M"])
            .current_dir(dir.path())
            .env("SQUIB_HOME", dir.path().join("home"))
            .stdin(terminal.try_clone().unwrap())
            .stdout(terminal.try_clone().unwrap())
            .stderr(terminal.try_clone().unwrap())
            .spawn()
            .unwrap();
        let master = File::from(master);
        let screen = Capture::default();
        let (mut from, mut to) = (master.try_clone().unwrap(), screen.clone());
        // It ends with the test's process: the terminal stays open as long as it is looked at.
        thread::spawn(move || drop(std::io::copy(&mut from, &mut to)));
        let seat = Self { master, terminal, screen, child, _dir: dir };
        seat.wait("n=");
        let raw = tcgetattr(&seat.terminal).unwrap().local_modes;
        assert!(!raw.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG));
        (seat, before)
    }

    fn wait(&self, what: &str) {
        let seen = self.screen.wait_for(PATIENCE, |text| text.contains(what).then_some(()));
        assert!(seen.is_some(), "no `{what}` in {}", self.screen.text());
    }

    fn press(&mut self, keys: &[u8]) {
        use std::io::Write;
        self.master.write_all(keys).unwrap();
    }

    /// Waits for the end: exit code, and the settings of the terminal.
    fn end(mut self) -> (Option<i32>, String) {
        let status = self.child.wait().unwrap();
        (status.code(), settings(&self.terminal))
    }
}

#[test]
fn the_escape_sequence_ends_the_vm_and_gives_the_terminal_back() {
    let (mut seat, before) = Seat::new();
    seat.wait("Ctrl-A x");
    seat.press(b"\x01x");
    assert_eq!(seat.end(), (Some(0), before));
}

#[test]
fn every_other_key_is_the_guests() {
    let (mut seat, before) = Seat::new();
    // Ctrl-A itself, Ctrl-C and Ctrl-Z.
    seat.press(b"\x01\x01\x03\x1a");
    seat.wait(&format!("i={:08x}", input_hash(b"\x01\x03\x1a")));
    seat.press(&[POWER_OFF]);
    assert_eq!(seat.end(), (Some(0), before));
}

#[test]
fn a_signal_gives_the_terminal_back() {
    let (seat, before) = Seat::new();
    kill_process(Pid::from_child(&seat.child), Signal::TERM).unwrap();
    assert_eq!(seat.end(), (Some(143), before));
}
