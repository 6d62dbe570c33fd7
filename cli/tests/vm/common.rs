//! A folder with the tiny guest, and VMs in it.

use std::{
    ffi::OsStr,
    fs,
    path::PathBuf,
    process::{Child, Command, ExitStatus, Output, Stdio},
    thread,
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use squib::api::types::SnapshotReport;
use squib_tests::{console::Capture, tiny::Tiny};

use crate::{BACKEND, SQUIB};

/// Bounds how long a guest that hangs is waited for.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);
pub(crate) const PRINT_EVERY: u32 = 64;

/// A folder with a guest, and a run-time folder of its own.
pub(crate) struct Place {
    pub(crate) dir: tempfile::TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        // Ticks that are rare enough for a guest that runs by the host's clock.
        let tiny = Tiny { timer_ticks: 200_000, print_every: PRINT_EVERY };
        tiny.write(&dir.path().join("kernel")).unwrap();
        fs::write(dir.path().join("disk.img"), vec![0x5a; 64 << 10]).unwrap();
        Self { dir }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn squib<S: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(SQUIB);
        command.args(words).current_dir(self.dir.path()).env("SQUIB_HOME", self.path("home"));
        command.env("SQUIB_CACHE", self.path("cache"));
        command.stdin(Stdio::null());
        command
    }

    /// Runs a command to its end: exit code, stdout, stderr.
    pub(crate) fn done(&self, words: &[&str]) -> (i32, String, String) {
        let Output { status, stdout, stderr } = self.squib(words).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (status.code().unwrap_or(-1), text(stdout), text(stderr))
    }

    pub(crate) fn vm(&self, words: &[&str]) -> Vm {
        Vm::start(self.squib(words))
    }

    /// A VM with the tiny guest.
    pub(crate) fn run(&self, more: &[&str]) -> Vm {
        let mut words = vec!["run", "--kernel", "kernel", "--memory", "64M", "--disk", "disk.img"];
        words.extend(["--backend", BACKEND]);
        words.extend(more);
        self.vm(&words)
    }

    /// What lies in the run-time folder of VMs.
    pub(crate) fn left(&self) -> Vec<String> {
        let mut names = Vec::new();
        for dir in ["home/run/vms", "home/disks"] {
            for entry in fs::read_dir(self.path(dir)).unwrap() {
                names.push(entry.unwrap().file_name().into_string().unwrap());
            }
        }
        names
    }
}

pub(crate) struct Vm {
    pub(crate) child: Child,
    pub(crate) console: Capture,
    pub(crate) messages: Capture,
    readers: Vec<thread::JoinHandle<()>>,
}

impl Vm {
    pub(crate) fn start(mut command: Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (console, messages) = (Capture::default(), Capture::default());
        let (mut out, mut err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let (mut console_end, mut message_end) = (console.clone(), messages.clone());
        let readers = vec![
            thread::spawn(move || drop(std::io::copy(&mut out, &mut console_end))),
            thread::spawn(move || drop(std::io::copy(&mut err, &mut message_end))),
        ];
        Self { child, console, messages, readers }
    }

    /// Waits until the guest has printed `count` lines more.
    pub(crate) fn wait_lines(&self, count: usize) {
        let had = rounds(&self.console.text()).len();
        let seen = self
            .console
            .wait_for(PATIENCE, |text| (rounds(text).len() >= had + count).then_some(()));
        assert!(seen.is_some(), "{}\n{}", self.console.text(), self.messages.text());
    }

    pub(crate) fn send(&mut self, byte: u8) {
        use std::io::Write;
        self.child.stdin.as_mut().unwrap().write_all(&[byte]).unwrap();
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).unwrap();
    }

    /// Waits for the end; exit status, console and messages.
    pub(crate) fn end(mut self) -> (ExitStatus, String, String) {
        let status = self.child.wait().unwrap();
        for reader in self.readers.drain(..) {
            reader.join().unwrap();
        }
        (status, self.console.text(), self.messages.text())
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The rounds in the guest's whole lines.
pub(crate) fn rounds(text: &str) -> Vec<u32> {
    text.split_inclusive('\n')
        .filter(|line| line.ends_with('\n'))
        .filter_map(|line| line.trim().strip_prefix("n=")?.split(' ').next())
        .map(|n| u32::from_str_radix(n, 16).unwrap())
        .collect()
}

/// Nothing is missing and nothing comes twice.
pub(crate) fn assert_unbroken(rounds: &[u32]) {
    for pair in rounds.windows(2) {
        assert_eq!(pair[1], pair[0] + PRINT_EVERY, "{rounds:x?}");
    }
}

pub(crate) fn create(place: &Place, more: &[&str]) -> SnapshotReport {
    let mut words = vec!["snapshot", "create", "a", "--output", "snap", "--json"];
    words.extend(more);
    let (code, out, err) = place.done(&words);
    assert_eq!(code, 0, "{err}");
    serde_json::from_str(&out).unwrap()
}
