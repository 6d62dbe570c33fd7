//! Raw mode. The terminal's own settings are kept in one place that every way out of the process can
//! reach: the guard's drop, the signal thread, and the panic hook.

use std::{
    io::{self, Write},
    sync::{Mutex, MutexGuard, PoisonError},
};

use rustix::{
    process::getpgrp,
    termios::{OptionalActions, Termios, tcgetattr, tcgetpgrp, tcsetattr},
};

use crate::{
    output,
    plain::{plain, plain_line},
};

/// What is known of the terminal once it has been in raw mode.
static SEAT: Mutex<Option<Seat>> = Mutex::new(None);

struct Seat {
    /// The settings from before. Those from before a later time may be raw: a shell keeps them for a stopped job.
    before: Termios,
    /// Raw mode is on; the terminal is this process's.
    raw: bool,
}

impl Seat {
    /// Leaves raw mode. A terminal in whose background the process is has been set by others to their liking, unless
    /// it still is as this process has set it: not every shell looks after it.
    fn leave(&mut self) {
        if std::mem::take(&mut self.raw) && (is_ours() || self.is_untouched()) {
            // At once: to wait for a terminal that shows nothing any more (Ctrl-S) would be for ever, and what
            // was written before has been processed by the old settings. A terminal that is gone needs none.
            let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.before);
        }
    }

    fn is_untouched(&self) -> bool {
        let raw = raw(&self.before);
        tcgetattr(io::stdin()).is_ok_and(|now| {
            now.input_modes == raw.input_modes
                && now.output_modes == raw.output_modes
                && now.control_modes == raw.control_modes
                && now.local_modes == raw.local_modes
        })
    }
}

/// The terminal's raw mode, wherever it is on when this is dropped.
#[derive(Debug)]
pub(crate) struct RawMode(());

impl RawMode {
    /// For a console on the terminal, which may come to the foreground only later: see [`take`].
    pub(crate) fn prepare() -> Self {
        install_panic_hook();
        Self(())
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Whether the terminal on stdin is this process's to read and to change: it is in the foreground, or there is no
/// job control since the terminal does not control its session.
pub(super) fn is_ours() -> bool {
    match tcgetpgrp(io::stdin()) {
        Ok(foreground) => foreground == getpgrp(),
        Err(_) => true,
    }
}

/// Whether raw mode is on.
pub(super) fn is_raw() -> bool {
    seat().as_ref().is_some_and(|seat| seat.raw)
}

/// Sets the terminal on stdin, which [`is_ours`], to raw mode: every key is the guest's, Ctrl-C and Ctrl-Z too.
pub(super) fn take() -> io::Result<()> {
    let mut seat = seat();
    let before = match seat.take() {
        Some(seat) => seat.before,
        None => tcgetattr(io::stdin())?,
    };
    set_raw(&before)?;
    *seat = Some(Seat { before, raw: true });
    Ok(())
}

/// Takes note that the terminal is no longer this process's.
pub(super) fn give_up() {
    if let Some(seat) = &mut *seat() {
        seat.leave();
    }
}

/// Gives the terminal back as it was. Does nothing if it is not in raw mode.
pub(crate) fn restore() {
    if let Some(mut seat) = seat().take() {
        seat.leave();
    }
}

/// Sets raw mode again after the process was stopped and continued: the shell has changed the terminal. It may have
/// kept it, too.
pub(crate) fn reenter() {
    if let Some(seat) = &mut *seat()
        && seat.raw
    {
        if is_ours() {
            let _ = set_raw(&seat.before);
        } else {
            seat.leave();
        }
    }
}

/// Writes a message of squib's own to stderr, [`plain`]. In raw mode a line does not begin at the left
/// edge by itself.
pub(crate) fn message(text: &str) {
    let text = plain(text);
    let raw = is_raw();
    output::message(if raw { text.replace('\n', "\r\n") } else { text.into_owned() }.as_bytes());
}

/// Writes each event of the log as a line, [`plain_line`].
pub(crate) struct Messages;

impl Write for Messages {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // One event, which ends with the line's end: the library writes each in one piece.
        let text = String::from_utf8_lossy(bytes);
        message(&format!("{}\n", plain_line(text.strip_suffix('\n').unwrap_or(&text))));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn set_raw(before: &Termios) -> io::Result<()> {
    tcsetattr(io::stdin(), OptionalActions::Now, &raw(before))?;
    Ok(())
}

fn raw(before: &Termios) -> Termios {
    let mut raw = before.clone();
    raw.make_raw();
    raw
}

fn seat() -> MutexGuard<'static, Option<Seat>> {
    SEAT.lock().unwrap_or_else(PoisonError::into_inner)
}

fn install_panic_hook() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            restore();
            before(info);
        }));
    });
}
