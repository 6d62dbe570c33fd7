//! A VM in a child process, with its console in our hands.

use std::{
    ffi::OsString,
    io::{BufRead, BufReader, Read, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::{api::client::Client, exit::Complaint, output, timings::Timings};

/// Lines of console that an error shows.
const TAIL: usize = 12;
/// Running children, to be ended with us.
static CHILDREN: Mutex<Vec<u32>> = Mutex::new(Vec::new());

/// A running VM.
pub(super) struct Guest {
    child: Child,
    stdin: ChildStdin,
    socket: PathBuf,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    log: Mutex<Log>,
    changed: Condvar,
}

#[derive(Default)]
struct Log {
    console: Vec<u8>,
    messages: Vec<String>,
    timings: Option<Timings>,
    /// Ends of stdout and stderr that have been met.
    closed: u32,
}

impl Guest {
    /// Starts `squib` with `words`.
    pub(super) fn start(
        words: Vec<OsString>,
        home: &Path,
        socket: &Path,
        show: bool,
    ) -> anyhow::Result<Self> {
        let squib = std::env::current_exe().context("the path of this program")?;
        let mut child = Command::new(&squib)
            .args(words)
            .env("SQUIB_HOME", home)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| squib.display().to_string())?;
        children().push(child.id());
        let (Some(stdin), Some(stdout), Some(stderr)) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take())
        else {
            unreachable!("all three were asked for");
        };
        let shared = Arc::new(Shared::default());
        let console = shared.clone();
        thread::Builder::new().spawn(move || console.read_console(stdout, show))?;
        let messages = shared.clone();
        thread::Builder::new().spawn(move || messages.read_messages(stderr))?;
        Ok(Self { child, stdin, socket: socket.to_owned(), shared })
    }

    /// Types `text` on the console.
    pub(super) fn send(&mut self, text: &str) -> anyhow::Result<()> {
        let sent = self.stdin.write_all(text.as_bytes()).and_then(|()| self.stdin.flush());
        sent.map_err(|error| {
            self.shared.complain(&format!("it does not take input: {error}")).into()
        })
    }

    /// Everything that the guest has written.
    pub(super) fn text(&self) -> String {
        self.shared.lock().text()
    }

    /// Waits until `find` finds something in what the guest has written.
    pub(super) fn wait<T>(
        &mut self,
        what: &str,
        patience: Duration,
        find: impl Fn(&str) -> Option<T>,
    ) -> anyhow::Result<T> {
        let deadline = Instant::now() + patience;
        let mut log = self.shared.lock();
        loop {
            let text = log.text();
            if let Some(found) = find(&text) {
                return Ok(found);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let why = if log.closed == 2 {
                "it ended before"
            } else if left.is_zero() {
                "it took too long"
            } else {
                let waited = self.shared.changed.wait_timeout(log, left);
                log = waited.unwrap_or_else(PoisonError::into_inner).0;
                continue;
            };
            drop(log);
            bail!(self.shared.complain(&format!("waiting for {what}: {why}")));
        }
    }

    /// The VM's control socket.
    pub(super) fn client(&self) -> Client {
        Client::new(&self.socket)
    }

    /// The control socket, as soon as it answers.
    pub(super) fn wait_for_socket(&mut self, patience: Duration) -> anyhow::Result<Client> {
        let client = self.client();
        let deadline = Instant::now() + patience;
        while client.info().is_err() {
            if self.child.try_wait()?.is_some() || Instant::now() > deadline {
                bail!(self.shared.complain("waiting for its control socket"));
            }
            thread::sleep(Duration::from_millis(2));
        }
        Ok(client)
    }

    /// What the VM has said about its timings.
    pub(super) fn timings(&self) -> Option<Timings> {
        self.shared.lock().timings.clone()
    }

    /// Waits for the end of the process, which has to be a good one; everything that the guest wrote.
    pub(super) fn finish(mut self, when: &str) -> anyhow::Result<String> {
        let status = self.child.wait()?;
        let mut log = self.shared.lock();
        while log.closed < 2 {
            log = self.shared.changed.wait(log).unwrap_or_else(PoisonError::into_inner);
        }
        let text = log.text();
        drop(log);
        if !status.success() {
            bail!(self.shared.complain(&format!("{when} it ended with {status}")));
        }
        Ok(text)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // It is still there only after an error.
        let _ = self.child.kill();
        let _ = self.child.wait();
        children().retain(|pid| *pid != self.child.id());
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_console(&self, mut stdout: impl Read, show: bool) {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = stdout.read(&mut buffer) {
            if show {
                output::message(&buffer[..count]);
            }
            self.lock().console.extend_from_slice(&buffer[..count]);
            self.changed.notify_all();
        }
        self.lock().closed += 1;
        self.changed.notify_all();
    }

    fn read_messages(&self, stderr: impl Read) {
        for line in BufReader::new(stderr).lines().map_while(Result::ok) {
            let mut log = self.lock();
            match Timings::parse(&line) {
                Some(timings) => log.timings = Some(timings),
                None => log.messages.push(line),
            }
            drop(log);
            self.changed.notify_all();
        }
        self.lock().closed += 1;
        self.changed.notify_all();
    }

    /// An error: what went wrong, what the process said, and the end of the console.
    fn complain(&self, what: &str) -> Complaint {
        let log = self.lock();
        let text = log.text();
        let console: Vec<&str> = text.lines().collect();
        let tail = console[console.len().saturating_sub(TAIL)..].iter().map(ToString::to_string);
        let mut lines = log.messages.clone();
        lines.push("--- end of its console:".into());
        lines.extend(tail);
        Complaint { what: format!("the guest: {what}"), lines }
    }
}

impl Log {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.console).into_owned()
    }
}

/// The numbers of all whole lines `count N`.
pub(super) fn counts(text: &str) -> impl Iterator<Item = u64> + '_ {
    whole_lines(text).filter_map(|line| line.strip_prefix("count ")?.parse().ok())
}

/// The digests of all whole lines `sum DIGEST`.
pub(super) fn sums(text: &str) -> impl Iterator<Item = &str> {
    whole_lines(text).filter_map(|line| line.strip_prefix("sum "))
}

fn whole_lines(text: &str) -> impl Iterator<Item = &str> {
    text.split_inclusive('\n').filter(|line| line.ends_with('\n')).map(str::trim)
}

/// Ends all children.
pub(super) fn end_all() {
    for pid in children().drain(..) {
        if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
            // It may have ended by itself.
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

fn children() -> MutexGuard<'static, Vec<u32>> {
    CHILDREN.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_lines_count() {
        let text = "[ 0.1] noise\r\ncount 1\r\ncount 2\r\nsum ab\r\ncount 3";
        assert_eq!(counts(text).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(counts(&format!("{text}4\r\n")).last(), Some(34));
        assert_eq!(sums(text).collect::<Vec<_>>(), ["ab"]);
    }
}
