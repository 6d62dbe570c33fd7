//! Raw mode. The terminal's own settings are kept in one place that every way out of the process can
//! reach: the guard's drop, the signal thread, and the panic hook.

use std::{
    io::{self, Write},
    sync::{Mutex, MutexGuard, PoisonError},
};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

use crate::{
    output,
    plain::{plain, plain_line},
};

/// The settings from before raw mode, while it is on.
static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

/// Raw mode, as long as it lives.
#[derive(Debug)]
pub(crate) struct RawMode(());

impl RawMode {
    /// Sets the terminal on stdin to raw mode: every key is the guest's, Ctrl-C and Ctrl-Z too.
    pub(crate) fn enter() -> io::Result<Self> {
        install_panic_hook();
        let before = tcgetattr(io::stdin())?;
        *saved() = Some(before);
        set_raw()?;
        Ok(Self(()))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Gives the terminal back as it was. Does nothing if it is not in raw mode.
pub(crate) fn restore() {
    if let Some(before) = saved().take() {
        // At once: to wait for a terminal that shows nothing any more (Ctrl-S) would be for ever, and what was
        // written before has been processed by the old settings. A terminal that is gone needs none.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &before);
    }
}

/// Writes a message of squib's own to stderr, [`plain`]. In raw mode a line does not begin at the left
/// edge by itself.
pub(crate) fn message(text: &str) {
    let text = plain(text);
    let raw = saved().is_some();
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

/// Sets raw mode again after the process was stopped and continued: the shell has changed the terminal.
pub(crate) fn reenter() {
    if saved().is_some() {
        let _ = set_raw();
    }
}

fn set_raw() -> io::Result<()> {
    let Some(mut raw) = saved().clone() else { return Ok(()) };
    raw.make_raw();
    tcsetattr(io::stdin(), OptionalActions::Now, &raw)?;
    Ok(())
}

fn saved() -> MutexGuard<'static, Option<Termios>> {
    SAVED.lock().unwrap_or_else(PoisonError::into_inner)
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
