//! What can end a VM, in one channel that the command's own thread waits on.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicI32, Ordering},
    mpsc::{Sender, channel},
};

use signal_hook::consts::{
    SIGALRM, SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTTIN, SIGTTOU, SIGUSR1, SIGUSR2, SIGXFSZ,
};
use signal_hook::iterator::Signals;
use squib_formats::error::FormatError;
use squib_vmm::{machine::Outcome, signals};

use crate::{
    console,
    exit::{Code, Failure},
};

/// What ends a process by default and is sent to it from outside.
const ENDING: [i32; 7] = [SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2, SIGALRM];

/// The signal that asked the process to end; 0 as long as none has.
static SIGNAL: AtomicI32 = AtomicI32::new(0);
/// Whether one has.
static ASKED: AtomicBool = AtomicBool::new(false);

/// Something that happened to the VM or its process.
#[derive(Debug)]
pub(crate) enum Event {
    /// The guest ended, one way or the other.
    Guest(Outcome),
    /// Ctrl-A x.
    UserQuit,
    /// One of [`ENDING`].
    Signal(i32),
    /// The control API was told to end the VM.
    Stop,
}

/// Those of [`ENDING`] that the process was not started with as ignored (`nohup` does that, a shell without job
/// control for what it starts in the background).
fn heeded() -> Vec<i32> {
    ENDING.into_iter().filter(|signal| !signals::is_ignored(*signal)).collect()
}

/// A process in the background of its terminal is not stopped for reading or writing there: to read is an error, and
/// to write works. For a VM, which must not stand still because of a message.
pub(crate) fn run_in_background() -> std::io::Result<()> {
    signals::block(&[SIGTTIN, SIGTTOU])
}

/// Ends the process when one of [`ENDING`] comes, after `clean` has put things in order.
pub(crate) fn end_on_signal(clean: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    let mut signals = Signals::new(heeded())?;
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        // None is left when the process ends in another way.
        let Some(signal) = signals.forever().next() else { return };
        clean();
        std::process::exit(128 + signal);
    })?;
    Ok(())
}

/// Lets a write beyond a file size limit fail as on a full disk; by default its signal ends the process.
pub(crate) fn survive_file_size_limits() -> std::io::Result<()> {
    signal_hook::flag::register(SIGXFSZ, Arc::new(AtomicBool::new(false)))?;
    Ok(())
}

/// True once a signal that [`watch_signals`] waits for has come: what may take long gives up.
pub(crate) fn asked() -> &'static AtomicBool {
    &ASKED
}

/// For a command that ends by itself: a signal makes it give up in order, a second one ends it at once. Gives
/// what becomes true with the first.
pub(crate) fn give_up_on_signals() -> std::io::Result<&'static AtomicBool> {
    watch_signals(channel().0)?;
    Ok(asked())
}

/// The failure of a command that reads or writes a snapshot. One that was told to give up ends as by that
/// signal.
pub(crate) fn failure(error: FormatError) -> Failure {
    match (&error, SIGNAL.load(Ordering::Relaxed)) {
        (FormatError::Cancelled, signal) if signal != 0 => {
            let why = anyhow::anyhow!("given up on signal {signal}; nothing is left behind");
            Failure::new(Code::Signal(signal), why)
        }
        _ => Failure::new(Code::Snapshot, error),
    }
}

/// Starts the thread that turns signals into events. A second one of them ends the process at once.
pub(crate) fn watch_signals(events: Sender<Event>) -> std::io::Result<()> {
    let mut signals = Signals::new(heeded().into_iter().chain([SIGCONT]))?;
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        let mut asked = false;
        for signal in signals.forever() {
            if signal == SIGCONT {
                console::reenter_raw_mode();
                continue;
            }
            if asked {
                console::restore_terminal();
                std::process::exit(128 + signal);
            }
            asked = true;
            SIGNAL.store(signal, Ordering::Relaxed);
            ASKED.store(true, Ordering::Release);
            // Nobody to tell: the VM is already ending.
            let _ = events.send(Event::Signal(signal));
        }
    })?;
    Ok(())
}
