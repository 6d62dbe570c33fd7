//! The guest's console on the user's terminal, or on plain bytes.

mod escape;
mod output;
mod terminal;

use std::{
    io::{IsTerminal, Read},
    sync::mpsc::Sender,
    thread,
    time::Duration,
};

pub(crate) use output::Output;
use rustix::termios::isatty;
use terminal::RawMode;
pub(crate) use terminal::{
    Messages, message, reenter as reenter_raw_mode, restore as restore_terminal,
};

use crate::{events::Event, output::say};
use escape::{Escape, Key};

const HELP: &str = "
squib: Ctrl-A x       end the VM
squib: Ctrl-A Ctrl-A  send Ctrl-A to the guest
squib: Ctrl-A h       this help
";

const YOURS: &str = "squib: the console is yours; Ctrl-A x ends the VM, Ctrl-A h helps";
const AWAY: &str = "squib: in the background the console only writes; `fg` brings it back";
const EIO: Option<i32> = Some(rustix::io::Errno::IO.raw_os_error());
/// How often it is looked whether the terminal has come back.
const LOOK: Duration = Duration::from_millis(200);

/// Where the console's input goes. Blocks while the guest does not take more.
pub(crate) type Input = Box<dyn FnMut(&[u8]) + Send>;

/// The console of a running VM. Dropping it gives the terminal back.
pub(crate) struct Console {
    _raw: Option<RawMode>,
}

impl Console {
    /// Connects stdin to `input`. If stdin and stdout are a terminal it is set to raw mode, and Ctrl-A
    /// begins a command; otherwise every byte is the guest's, and the end of input ends nothing.
    ///
    /// In the background of its terminal, the console only writes; it reads from when it is in the foreground.
    pub(crate) fn attach(mut input: Input, events: Sender<Event>) -> std::io::Result<Self> {
        let on_terminal = std::io::stdin().is_terminal();
        let interactive = on_terminal && isatty(rustix::stdio::stdout());
        let raw = interactive.then(RawMode::prepare);
        let away = on_terminal && !terminal::is_ours();
        if away {
            say!("{AWAY}");
        } else if interactive {
            say!("{YOURS}");
            terminal::take()?;
        }
        thread::Builder::new().name("console-in".into()).spawn(move || {
            let (mut away, mut failures) = (away, 0);
            let mut escape = Escape::default();
            let mut buffer = [0; 4096];
            let mut stdin = std::io::stdin().lock();
            loop {
                if on_terminal && !terminal::is_ours() {
                    terminal::give_up();
                    if !std::mem::replace(&mut away, true) {
                        message(&format!("{AWAY}\n"));
                    }
                    // A shell that brings a running job to the foreground does not tell it.
                    thread::sleep(LOOK);
                    continue;
                }
                if std::mem::take(&mut away) && interactive {
                    message(&format!("{YOURS}\n"));
                }
                if interactive && !terminal::is_raw() && terminal::take().is_err() {
                    // The terminal is gone.
                    return;
                }
                let bytes = match stdin.read(&mut buffer) {
                    Ok(0) => return,
                    Ok(count) => &buffer[..count],
                    Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                    // That is how a read in the background ends, which may be over by now.
                    Err(e) if on_terminal && e.raw_os_error() == EIO && failures < 3 => {
                        failures += 1;
                        thread::sleep(LOOK);
                        continue;
                    }
                    // As with the end of input, the guest runs on.
                    Err(_) => return,
                };
                failures = 0;
                if !interactive {
                    input(bytes);
                    continue;
                }
                for key in escape.feed(bytes) {
                    match key {
                        Key::Bytes(bytes) => input(&bytes),
                        Key::Help => message(HELP),
                        // Nobody to tell: the VM is already ending.
                        Key::Quit => drop(events.send(Event::UserQuit)),
                    }
                }
            }
        })?;
        Ok(Self { _raw: raw })
    }
}
