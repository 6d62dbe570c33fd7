//! The guest's console: what was written reaches its reader, however the VM ends.

use std::{
    fs::{self, File},
    io::Read,
    process::{Child, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};
// What only the tests on Linux use.
#[cfg(target_os = "linux")]
use std::{
    os::unix::{ffi::OsStrExt, fs::OpenOptionsExt},
    time::Instant,
};

#[cfg(target_os = "linux")]
use rustix::fs::OFlags;
use rustix::process::{Pid, Signal, kill_process};
use squib_tests::tiny::{Burst, Ending, noise};

#[cfg(target_os = "linux")]
use crate::common::PATIENCE;
use crate::common::Place;

/// More than a small pipe holds, less than the guest is held up for.
const SOME: u32 = 40_000;

/// A VM with a guest that writes and ends, and a small pipe as its standard output.
fn start(place: &Place, burst: Burst, more: &[&str]) -> (Child, File) {
    fs::write(place.path("burst"), burst.image()).unwrap();
    let words = ["run", "--kernel", "burst", "--memory", "64M", "--name", "a"];
    spawn(place, &[&words, more].concat())
}

fn spawn(place: &Place, words: &[&str]) -> (Child, File) {
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    #[cfg(target_os = "linux")]
    rustix::pipe::fcntl_setpipe_size(&writer, 4096).unwrap();
    let mut command = place.squib(words);
    let child = command.stdout(Stdio::from(writer)).stderr(Stdio::piped()).spawn().unwrap();
    (child, File::from(reader))
}

/// All that comes, read by few bytes.
fn read_slowly(reader: File) -> Vec<u8> {
    read_while(reader, thread::yield_now)
}

/// All that comes, with `rest` after every few bytes.
fn read_while(mut reader: File, rest: impl Fn()) -> Vec<u8> {
    let (mut all, mut few) = (Vec::new(), [0; 61]);
    loop {
        match reader.read(&mut few).unwrap() {
            0 => return all,
            count => all.extend_from_slice(&few[..count]),
        }
        rest();
    }
}

/// Exit code and messages.
fn end(child: Child) -> (Option<i32>, String) {
    let output = child.wait_with_output().unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

/// What the guest was not let write yet, or what is lost, is missing at the end only.
fn assert_begins(burst: Burst, output: &[u8]) {
    assert!(burst.output().starts_with(output), "{} bytes, not as written", output.len());
}

#[test]
fn the_end_of_the_console_is_not_lost_when_the_guest_ends_at_once() {
    let place = Place::new();
    for round in 0..24 {
        // From one byte to what needs a slow reader for a while.
        let bytes = [1, 100, 5_000, SOME][round % 4];
        let (ending, code) = match round % 3 {
            0 => (Ending::Reset, 3),
            _ => (Ending::PowerOff, 0),
        };
        let burst = Burst { bytes, ending };
        let (child, reader) = start(&place, burst, &[]);
        let output = read_slowly(reader);
        let (status, messages) = end(child);
        assert_eq!(status, Some(code), "{messages}");
        assert_eq!(output.len(), bytes as usize, "{messages}");
        assert_begins(burst, &output);
    }
}

#[test]
fn what_was_written_before_a_restart_comes_before_what_the_next_boot_writes() {
    let place = Place::new();
    let burst = Burst { bytes: SOME, ending: Ending::Reset };
    let (child, mut reader) = start(&place, burst, &["--on-reset", "restart"]);
    let mut output = vec![0; 3 * SOME as usize];
    reader.read_exact(&mut output).unwrap();
    for boot in output.chunks(SOME as usize) {
        assert_begins(burst, boot);
    }
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    read_slowly(reader);
    assert_eq!(end(child).0, Some(143));
}

#[test]
fn a_signal_loses_nothing_of_what_was_written() {
    let place = Place::new();
    let burst = Burst { bytes: 10 * SOME, ending: Ending::Sleep };
    let (child, mut reader) = start(&place, burst, &[]);
    let mut output = vec![0; 100];
    reader.read_exact(&mut output).unwrap();
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    output.extend(read_slowly(reader));
    let (status, messages) = end(child);
    assert_eq!(status, Some(143), "{messages}");
    assert!(!messages.contains("lost"), "{messages}");
    assert_begins(burst, &output);
}

#[test]
fn a_snapshot_that_ends_the_vm_goes_on_with_the_next_byte() {
    let place = Place::new();
    let burst = Burst { bytes: 30 * SOME, ending: Ending::PowerOff };
    let (child, mut reader) = start(&place, burst, &[]);
    let mut output = vec![0; 100];
    reader.read_exact(&mut output).unwrap();
    // The guest waits for its reader until the snapshot is there.
    let done = Arc::new(AtomicBool::new(false));
    let hurry = done.clone();
    let rest = move || match hurry.load(Ordering::Relaxed) {
        true => {}
        false => thread::sleep(Duration::from_millis(1)),
    };
    let reads = thread::spawn(move || read_while(reader, rest));
    let create = ["snapshot", "create", "a", "--output", "snap", "--stop", "--durability", "none"];
    let (code, _, error) = place.done(&create);
    done.store(true, Ordering::Relaxed);
    assert_eq!(code, 0, "{error}");
    output.extend(reads.join().unwrap());
    let (status, messages) = end(child);
    assert_eq!(status, Some(0), "{messages}");
    let (child, reader) = spawn(&place, &["snapshot", "restore", "snap"]);
    output.extend(read_slowly(reader));
    let (status, messages) = end(child);
    assert_eq!((status, output.len()), (Some(0), burst.bytes as usize), "{messages}");
    assert_begins(burst, &output);
}

#[test]
#[cfg(target_os = "linux")]
fn a_reader_that_stands_still_does_not_hold_up_the_end_and_what_it_missed_is_counted() {
    let place = Place::new();
    let burst = Burst { bytes: SOME, ending: Ending::PowerOff };
    let (child, reader) = start(&place, burst, &[]);
    let (status, messages) = end(child);
    let output = read_slowly(reader);
    assert_begins(burst, &output);
    let lost = burst.bytes as usize - output.len();
    assert!(lost > 0);
    let said = format!("squib: {lost} bytes of console output are lost");
    assert!(messages.contains(&said), "{messages}, not {said}");
    assert_eq!(status, Some(1));
}

#[test]
#[cfg(target_os = "linux")]
fn a_terminal_that_stands_still_does_not_hold_up_the_end() {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let place = Place::new();
    let burst = Burst { bytes: SOME, ending: Ending::PowerOff };
    fs::write(place.path("burst"), burst.image()).unwrap();
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let name = ptsname(&master, Vec::new()).unwrap();
    let name = std::ffi::OsStr::from_bytes(name.as_bytes());
    let no_control = OFlags::NOCTTY.bits() as i32;
    let mut open = File::options();
    let terminal = open.read(true).write(true).custom_flags(no_control).open(name).unwrap();
    let mut command = place.squib(["run", "--kernel", "burst", "--memory", "64M"]);
    let stream = || Stdio::from(terminal.try_clone().unwrap());
    let mut child = command.stdin(stream()).stdout(stream()).stderr(stream()).spawn().unwrap();
    let deadline = Instant::now() + PATIENCE;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("it waits for its terminal");
        }
        thread::sleep(Duration::from_millis(20));
    };
    assert_eq!(status.code(), Some(1), "output is lost");
}

#[test]
#[cfg(target_os = "linux")]
fn a_console_that_cannot_be_written_is_said_and_does_not_end_the_guest() {
    let place = Place::new();
    fs::write(place.path("burst"), Burst { bytes: 9, ending: Ending::PowerOff }.image()).unwrap();
    let mut command = place.squib(["run", "--kernel", "burst", "--memory", "64M"]);
    command.stdout(File::options().write(true).open("/dev/full").unwrap());
    let (status, messages) = end(command.stderr(Stdio::piped()).spawn().unwrap());
    assert!(messages.contains("9 bytes of console output could not be written"), "{messages}");
    assert_eq!(status, Some(1));
}

#[test]
fn a_guest_that_causes_a_flood_of_warnings_fills_no_log_and_what_was_dropped_is_counted() {
    let place = Place::new();
    fs::write(place.path("noise"), noise(12_000)).unwrap();
    let words = ["run", "--kernel", "noise", "--memory", "64M", "--disk", "disk.img"];
    let (code, _, messages) = place.done(&words);
    assert_eq!(code, 0, "{messages}");
    let warnings = messages.lines().filter(|line| line.contains("WARN squib_devices")).count();
    assert!((1..50).contains(&warnings), "{messages}");
    let dropped = format!("squib: {} more messages", 12_000 - warnings);
    assert!(messages.contains(&dropped), "{messages}");
}
