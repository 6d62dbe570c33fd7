//! The one way to the standard output and the standard error of the process.
//!
//! - A result that cannot be written does not end a command half-way: the first error is kept, and
//!   [`finish`] turns it into the exit code, as `close_stdout` of the GNU tools does.
//! - A reader that has gone (EPIPE) is no error to talk about: the process ends without a word, with the
//!   code of the signal that ends other programs then, 128 + SIGPIPE.
//! - A message has no other place to go: its errors are dropped. In a VM's process a message waits for
//!   its reader at most [`STALL`], so that a reader that stands still holds up neither the guest nor the end.
//! - An output that is closed at the start is `/dev/null`: the standard library opens it there before
//!   `main`, so that no file gets one of the descriptors 0 to 2.

use std::{
    io::{self, ErrorKind, Write},
    os::fd::BorrowedFd,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    stdio,
};
use signal_hook::consts::SIGPIPE;

use crate::exit::Code;

/// How long a message of a VM's process waits for its reader.
const STALL: Duration = Duration::from_secs(1);
/// Bytes that a pipe takes without a wait once it is writable: the least PIPE_BUF (POSIX, `limits.h`).
const PIPE_BUF: usize = 512;

/// The first error on the standard output.
static FAILED: Mutex<Option<io::Error>> = Mutex::new(None);
/// Messages wait for their reader no longer than [`STALL`].
static BOUNDED: AtomicBool = AtomicBool::new(false);
/// Held while a message is written: messages that were dropped since the last one.
static DROPPED: Mutex<u64> = Mutex::new(0);

/// Writes a part of a command's result to the standard output. An error is kept for [`finish`]; after it,
/// nothing more is written.
pub(crate) fn result(text: &str) {
    let mut failed = lock(&FAILED);
    if failed.is_none() {
        *failed = Stdout.write_all(text.as_bytes()).err();
    }
}

/// Keeps the error of a result that was written by other means.
pub(crate) fn keep_error(written: io::Result<()>) {
    let mut failed = lock(&FAILED);
    if failed.is_none() {
        *failed = written.err();
    }
}

/// The exit code of a command that ends with `code`, now that all that it shows has been written or not.
/// The second is the message that goes with it.
pub(crate) fn finish(code: Code) -> (Code, Option<String>) {
    finish_with(code, lock(&FAILED).take())
}

/// From now on a message waits for its reader at most a second, and is dropped then: the process is a VM's.
pub(crate) fn bound_messages() {
    BOUNDED.store(true, Ordering::Relaxed);
}

/// Writes a message to the standard error.
pub(crate) fn message(bytes: &[u8]) {
    let mut dropped = lock(&DROPPED);
    if !BOUNDED.load(Ordering::Relaxed) {
        // There is no other place to say it.
        let _ = write_all(stdio::stderr(), bytes, None);
        return;
    }
    // A reader that stood still a moment ago is waited for no more.
    let patience = if *dropped == 0 { STALL } else { Duration::ZERO };
    let note = match *dropped {
        0 => String::new(),
        count => format!("squib: {count} messages before this one found no reader\n"),
    };
    let whole = [note.as_bytes(), bytes].concat();
    *dropped = match write_all(stdio::stderr(), &whole, Some(patience)) {
        Err(e) if e.kind() == ErrorKind::TimedOut => dropped.saturating_add(1),
        _ => 0,
    };
}

/// The standard output, without a buffer. It waits for a descriptor that is set to not block.
#[derive(Clone, Copy, Default)]
pub(crate) struct Stdout;

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        write(stdio::stdout(), bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn finish_with(code: Code, failed: Option<io::Error>) -> (Code, Option<String>) {
    match failed {
        None => (code, None),
        Some(e) if e.kind() == ErrorKind::BrokenPipe => match code {
            Code::Done => (Code::Signal(SIGPIPE), None),
            other => (other, None),
        },
        Some(e) => {
            let why = format!("squib: the standard output cannot be written: {e}\n");
            (if code == Code::Done { Code::Failed } else { code }, Some(why))
        }
    }
}

/// Writes all of `bytes`, waiting for the reader at most `patience` each time.
fn write_all(fd: BorrowedFd<'_>, mut bytes: &[u8], patience: Option<Duration>) -> io::Result<()> {
    while !bytes.is_empty() {
        let count = match patience {
            // What is writable takes this much at once, and a longer write might wait for the rest.
            Some(_) if !wait_writable(fd, patience)? => return Err(ErrorKind::TimedOut.into()),
            Some(_) => write(fd, &bytes[..bytes.len().min(PIPE_BUF)])?,
            None => write(fd, bytes)?,
        };
        bytes = &bytes[count..];
    }
    Ok(())
}

fn write(fd: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
    loop {
        match rustix::io::write(fd, bytes) {
            Ok(0) if !bytes.is_empty() => return Err(ErrorKind::WriteZero.into()),
            Ok(count) => return Ok(count),
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => drop(wait_writable(fd, None)?),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Whether a write would not wait; false after `patience`. What cannot be polled counts as writable.
fn wait_writable(fd: BorrowedFd<'_>, patience: Option<Duration>) -> io::Result<bool> {
    let timeout = patience.and_then(|patience| Timespec::try_from(patience).ok());
    loop {
        match poll(&mut [PollFd::new(&fd, PollFlags::OUT)], timeout.as_ref()) {
            Ok(ready) => return Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_reader_that_has_gone_ends_a_command_without_a_word() {
        let gone = || Some(ErrorKind::BrokenPipe.into());
        assert_eq!(finish_with(Code::Done, gone()), (Code::Signal(SIGPIPE), None));
        assert_eq!(finish_with(Code::Snapshot, gone()), (Code::Snapshot, None));
        assert_eq!(finish_with(Code::Done, None), (Code::Done, None));
    }

    #[test]
    fn a_full_device_is_an_error_that_is_said() {
        let (code, why) = finish_with(Code::Done, Some(ErrorKind::StorageFull.into()));
        assert_eq!(code, Code::Failed);
        assert!(why.unwrap().contains("cannot be written"));
        assert_eq!(finish_with(Code::Usage, Some(ErrorKind::StorageFull.into())).0, Code::Usage);
    }

    #[test]
    fn a_reader_that_stands_still_is_given_up_and_one_that_does_not_block_is_waited_for() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let much = vec![b'x'; 4 << 20];
        let stalled = write_all(writer.as_fd(), &much, Some(Duration::ZERO)).unwrap_err();
        assert_eq!(stalled.kind(), ErrorKind::TimedOut);

        rustix::io::ioctl_fionbio(&writer, true).unwrap();
        let read =
            std::thread::spawn(move || io::copy(&mut std::fs::File::from(reader), &mut io::sink()));
        write_all(writer.as_fd(), &much, None).unwrap();
        drop(writer);
        assert!(read.join().unwrap().unwrap() > much.len() as u64);
    }
}
