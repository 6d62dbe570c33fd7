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

const RUN: [&str; 5] = ["run", "--kernel", "kernel", "--memory", "64M"];

/// A terminal with a VM on it.
struct Seat {
    master: File,
    terminal: File,
    screen: Capture,
    child: Child,
    dir: tempfile::TempDir,
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
        let (seat, before) = Self::with(|| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_squib"));
            command.args(RUN);
            command
        });
        seat.wait("n=");
        let raw = tcgetattr(&seat.terminal).unwrap().local_modes;
        assert!(!raw.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG));
        (seat, before)
    }

    /// A shell with job control, on a terminal that controls its session.
    #[cfg(target_os = "linux")]
    fn with_shell() -> (Self, String) {
        Self::with(|| {
            let mut command = Command::new("setsid");
            command.args(["--ctty", "--wait", "sh", "-i"]).env("PS1", "ready> ");
            command.env("SQUIB", env!("CARGO_BIN_EXE_squib")).env_remove("ENV");
            command
        })
    }

    fn with(command: impl FnOnce() -> Command) -> (Self, String) {
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
        let child = command()
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
        let seat = Self { master, terminal, screen, child, dir };
        (seat, before)
    }

    fn wait(&self, what: &str) {
        let seen = self.screen.wait_for(PATIENCE, |text| text.contains(what).then_some(()));
        assert!(seen.is_some(), "no `{what}` in {}", self.screen.text());
    }

    /// Waits for what comes after what is there now.
    #[cfg(target_os = "linux")]
    fn wait_more(&self, had: usize, what: &str) {
        let more = |text: &str| text.get(had..).is_some_and(|text| text.contains(what));
        let seen = self.screen.wait_for(PATIENCE, |text| more(text).then_some(()));
        assert!(seen.is_some(), "no `{what}` behind {had} of {}", self.screen.text());
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

#[test]
fn sigquit_gives_the_terminal_back_and_leaves_nothing() {
    let (seat, before) = Seat::new();
    kill_process(Pid::from_child(&seat.child), Signal::QUIT).unwrap();
    let vms = seat.dir.path().join("home/run/vms");
    let mut seat = seat;
    let status = seat.child.wait().unwrap();
    assert_eq!((status.code(), settings(&seat.terminal)), (Some(131), before));
    assert_eq!(std::fs::read_dir(vms).unwrap().count(), 0);
}

#[test]
#[cfg(target_os = "linux")]
fn a_vm_in_the_background_runs_and_the_foreground_gives_it_the_console() {
    let (mut seat, _) = Seat::with_shell();
    seat.wait("ready> ");
    // It does not even stop where a write in the background would stop others.
    seat.press(b"stty tostop; $SQUIB run --kernel kernel --memory 64M --name a &\n");
    seat.wait("in the background the console only writes");
    seat.wait("n=");
    let shell = tcgetattr(&seat.terminal).unwrap().local_modes;
    assert!(shell.intersects(LocalModes::ISIG), "{shell:?}");
    let had = seat.screen.text().len();
    seat.wait_more(had, "n=");
    seat.press(b"jobs; fg\n");
    seat.wait("the console is yours");
    let jobs = seat.screen.text();
    assert!(jobs.contains("Running") && !jobs.contains("Stopped"), "{jobs}");
    seat.press(b"\x03");
    seat.wait(&format!("i={:08x}", input_hash(b"\x03")));
    // Stopped from outside, it goes on in the background, and once more in the foreground.
    let pid = std::fs::read_to_string(seat.dir.path().join("home/run/vms/a/lock")).unwrap();
    let pid = Pid::from_raw(pid.parse().unwrap()).unwrap();
    let had = seat.screen.text().len();
    kill_process(pid, Signal::STOP).unwrap();
    seat.wait_more(had, "ready> ");
    let had = seat.screen.text().len();
    seat.press(b"bg\n");
    seat.wait_more(had, "in the background the console only writes");
    seat.wait_more(had, "n=");
    let had = seat.screen.text().len();
    seat.press(b"fg\n");
    seat.wait_more(had, "the console is yours");
    seat.press(b"x");
    seat.wait(&format!("i={:08x}", input_hash(b"\x03x")));
    let had = seat.screen.text().len();
    seat.press(b"\x01x");
    seat.wait_more(had, "ready> ");
    let shell = tcgetattr(&seat.terminal).unwrap().local_modes;
    assert!(shell.contains(LocalModes::ISIG | LocalModes::ICANON), "{shell:?}");
    seat.press(b"exit\n");
    assert_eq!(seat.end().0, Some(0));
}

#[test]
#[cfg(target_os = "linux")]
fn a_vm_that_ends_in_the_background_leaves_the_terminal_alone() {
    let (mut seat, _) = Seat::with_shell();
    seat.wait("ready> ");
    seat.press(b"$SQUIB run --kernel kernel --memory 64M --name a\n");
    seat.wait("n=");
    let pid = std::fs::read_to_string(seat.dir.path().join("home/run/vms/a/lock")).unwrap();
    let pid = Pid::from_raw(pid.parse().unwrap()).unwrap();
    let had = seat.screen.text().len();
    kill_process(pid, Signal::STOP).unwrap();
    seat.wait_more(had, "ready> ");
    seat.press(b"bg\n");
    seat.wait("in the background the console only writes");
    // The shell's own settings from now on: what the VM found is not what it leaves.
    seat.press(b"stty -echo; echo s''et\n");
    seat.wait("set\r\n");
    let before = settings(&seat.terminal);
    kill_process(pid, Signal::TERM).unwrap();
    seat.press(b"wait; echo over\n");
    seat.wait("over\r\n");
    assert_eq!(settings(&seat.terminal), before);
    seat.press(b"exit\n");
    assert!(seat.end().0.is_some());
}
