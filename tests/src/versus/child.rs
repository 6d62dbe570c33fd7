//! A VM in a child process: its console, its messages, its memory.

use std::{
    io::{BufRead, BufReader, Read},
    os::unix::process::CommandExt,
    process::{Child, Command, Stdio},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

/// Lines of console and messages that an error shows.
const TAIL: usize = 8;
/// How long a process that was asked to end may take.
const LAST_WORDS: Duration = Duration::from_secs(10);
static CHILDREN: Mutex<Children> = Mutex::new(Children { running: Vec::new(), ending: false });

/// The children, to be ended with us.
struct Children {
    /// Each is the leader of its process group.
    running: Vec<u32>,
    /// No more may be started.
    ending: bool,
}

/// A running VM.
pub(super) struct Vm {
    child: Child,
    started: Instant,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    log: Mutex<Log>,
    changed: Condvar,
}

/// What a VM has printed.
#[derive(Default)]
pub(super) struct Log {
    /// When the first byte of the console came.
    pub(super) first_byte: Option<Instant>,
    /// The number of the first whole `tick` line, and when it was there.
    pub(super) first_tick: Option<(u64, Instant)>,
    /// The number of the last whole `tick` line.
    pub(super) last_tick: u64,
    /// The first two ticks that did not follow on one another.
    pub(super) gap: Option<(u64, u64)>,
    /// The longest time without output since this was last set to zero.
    pub(super) silence: Duration,
    last_byte: Option<Instant>,
    line: Vec<u8>,
    /// The last lines that are no ticks.
    other: Vec<String>,
    /// The last messages on stderr.
    pub(super) messages: Vec<String>,
    /// Ends of stdout and stderr that have been met.
    closed: u32,
}

/// A process's memory, bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Resident {
    /// In use now.
    pub(super) now: u64,
    /// The most that was in use at a time.
    pub(super) peak: u64,
}

impl Vm {
    /// Starts `command`, in a process group of its own.
    pub(super) fn start(command: &mut Command) -> Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let (mut child, started) = spawn(command)?;
        let shared = Arc::new(Shared::default());
        if let (Some(stdout), Some(stderr)) = (child.stdout.take(), child.stderr.take()) {
            let console = shared.clone();
            thread::spawn(move || console.read_console(stdout));
            let messages = shared.clone();
            thread::spawn(move || messages.read_messages(stderr));
        }
        Ok(Self { child, started, shared })
    }

    /// When the process was started.
    pub(super) fn started(&self) -> Instant {
        self.started
    }

    /// Whether it has closed its output, as it does at its end.
    pub(super) fn ended(&self) -> bool {
        self.log().closed == 2
    }

    /// What it has printed.
    pub(super) fn log(&self) -> MutexGuard<'_, Log> {
        self.shared.lock()
    }

    /// Waits until `find` finds something in what it has printed.
    pub(super) fn wait<T>(
        &self,
        what: &str,
        patience: Duration,
        find: impl Fn(&Log) -> Option<T>,
    ) -> Result<T> {
        let deadline = Instant::now() + patience;
        let mut log = self.log();
        loop {
            if let Some(found) = find(&log) {
                return Ok(found);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let why = match (log.closed, left.is_zero()) {
                (2, _) => "it ended before",
                (_, true) => "it took too long",
                _ => {
                    let waited = self.shared.changed.wait_timeout(log, left);
                    log = waited.unwrap_or_else(PoisonError::into_inner).0;
                    continue;
                }
            };
            bail!("waiting for {what}: {why}\n{}", log.tail());
        }
    }

    /// Waits for `count` more ticks.
    pub(super) fn wait_ticks(&self, count: u64, patience: Duration) -> Result<u64> {
        let goal = self.log().last_tick + count;
        self.wait(&format!("tick {goal}"), patience, |log| {
            (log.last_tick >= goal).then_some(log.last_tick)
        })
    }

    /// How much memory the process uses.
    pub(super) fn resident(&self) -> Result<Resident> {
        let path = format!("/proc/{}/status", self.child.id());
        let status = std::fs::read_to_string(&path).with_context(|| path.clone())?;
        let bytes = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key))?;
            Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? << 10)
        };
        let (Some(now), Some(peak)) = (bytes("VmRSS:"), bytes("VmHWM:")) else {
            bail!("{path} has no VmRSS or no VmHWM");
        };
        Ok(Resident { now, peak })
    }

    /// From now on the peak is that of the time to come.
    pub(super) fn forget_peak(&self) -> Result<()> {
        let path = format!("/proc/{}/clear_refs", self.child.id());
        std::fs::write(&path, "5").with_context(|| path)
    }

    /// Stops the process, which leaves the machine to others, or lets it go on.
    pub(super) fn freeze(&self, freeze: bool) -> Result<()> {
        let signal = if freeze { Signal::STOP } else { Signal::CONT };
        if let Some(pid) = pid(self.child.id()) {
            kill_process_group(pid, signal)?;
        }
        Ok(())
    }

    /// Asks the process to end and waits for it.
    pub(super) fn end(mut self) -> Result<()> {
        if let Some(pid) = pid(self.child.id()) {
            kill_process(pid, Signal::TERM)?;
        }
        let deadline = Instant::now() + LAST_WORDS;
        while self.child.try_wait()?.is_none() {
            if Instant::now() > deadline {
                bail!("it does not end when it is asked to\n{}", self.log().tail());
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            kill_group(self.child.id());
        }
        // Nothing can be done about a failure, and nothing is left if it has ended by itself.
        drop(self.child.wait());
        forget(self.child.id());
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_console(&self, mut stdout: impl Read) {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(count @ 1..) = stdout.read(&mut buffer) {
            let now = Instant::now();
            self.lock().take(&buffer[..count], now);
            self.changed.notify_all();
        }
        self.lock().closed += 1;
        self.changed.notify_all();
    }

    fn read_messages(&self, stderr: impl Read) {
        for line in BufReader::new(stderr).lines().map_while(Result::ok) {
            keep(&mut self.lock().messages, line);
            self.changed.notify_all();
        }
        self.lock().closed += 1;
        self.changed.notify_all();
    }
}

impl Log {
    fn take(&mut self, bytes: &[u8], now: Instant) {
        self.first_byte.get_or_insert(now);
        if let Some(before) = self.last_byte.replace(now) {
            self.silence = self.silence.max(now - before);
        }
        for byte in bytes {
            if *byte != b'\n' {
                self.line.push(*byte);
                continue;
            }
            let line = String::from_utf8_lossy(&self.line).trim().to_owned();
            self.line.clear();
            let tick = line.strip_prefix("tick ").and_then(|number| number.parse().ok());
            match tick {
                Some(tick) => {
                    if self.first_tick.is_some() && tick != self.last_tick + 1 {
                        self.gap.get_or_insert((self.last_tick, tick));
                    }
                    self.first_tick.get_or_insert((tick, now));
                    self.last_tick = tick;
                }
                None => keep(&mut self.other, line),
            }
        }
    }

    fn tail(&self) -> String {
        format!(
            "its messages: {}\nits console, up to tick {}: {}",
            self.messages.join("\n"),
            self.last_tick,
            self.other.join("\n")
        )
    }
}

/// Ends all children; later ones are not started.
pub(super) fn end_all() {
    let mut children = children();
    children.ending = true;
    for pid in children.running.drain(..) {
        kill_group(pid);
    }
}

/// Starts `command`, so that [`end_all`] ends it, and waits for it.
pub(super) fn run(command: &mut Command) -> Result<std::process::Output> {
    let name = command.get_program().display().to_string();
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let (child, _) = spawn(command)?;
    let id = child.id();
    let output = child.wait_with_output();
    forget(id);
    let output = output.with_context(|| name.clone())?;
    if !output.status.success() {
        bail!("{name}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(output)
}

/// Starts `command` as the leader of a process group; also when that was.
fn spawn(command: &mut Command) -> Result<(Child, Instant)> {
    let name = command.get_program().display().to_string();
    command.process_group(0);
    let mut children = children();
    ensure!(!children.ending, "ended by a signal");
    let started = Instant::now();
    let child = command.spawn().with_context(|| format!("cannot run {name}"))?;
    children.running.push(child.id());
    Ok((child, started))
}

fn forget(id: u32) {
    children().running.retain(|running| *running != id);
}

fn keep(lines: &mut Vec<String>, line: String) {
    if lines.len() == TAIL {
        lines.remove(0);
    }
    lines.push(line);
}

fn kill_group(id: u32) {
    if let Some(pid) = pid(id) {
        // It may have ended by itself.
        let _ = kill_process_group(pid, Signal::KILL);
    }
}

fn pid(id: u32) -> Option<Pid> {
    Pid::from_raw(i32::try_from(id).ok()?)
}

fn children() -> MutexGuard<'static, Children> {
    CHILDREN.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_lines_are_ticks_and_a_missing_one_is_noticed() {
        let mut log = Log::default();
        let start = Instant::now();
        // The rest of a line that was begun before the snapshot.
        log.take(b"k 12\r\ntick 1", start);
        assert_eq!((log.first_byte, log.first_tick), (Some(start), None));
        let later = start + Duration::from_millis(5);
        log.take(b"3\r\ntick 14\n", later);
        assert_eq!((log.first_tick, log.last_tick, log.gap), (Some((13, later)), 14, None));
        assert_eq!(log.silence, Duration::from_millis(5));
        log.take(b"tick 16\ntick 17\n", later);
        assert_eq!((log.last_tick, log.gap), (17, Some((14, 16))));
    }

    #[test]
    fn a_command_that_fails_says_why() {
        let error = run(Command::new("sh").args(["-c", "echo no room >&2; exit 3"])).unwrap_err();
        assert!(error.to_string().contains("no room"), "{error}");
    }
}
