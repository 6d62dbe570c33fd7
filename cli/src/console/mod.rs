//! The guest's console on the user's terminal, or on plain bytes.

mod escape;
mod output;
mod terminal;

use std::{
    io::{IsTerminal, Read},
    sync::mpsc::Sender,
    thread,
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

/// Where the console's input goes. Blocks while the guest does not take more.
pub(crate) type Input = Box<dyn FnMut(&[u8]) + Send>;

/// The console of a running VM. Dropping it gives the terminal back.
pub(crate) struct Console {
    _raw: Option<RawMode>,
}

impl Console {
    /// Connects stdin to `input`. If stdin and stdout are a terminal it is set to raw mode, and Ctrl-A
    /// begins a command; otherwise every byte is the guest's, and the end of input ends nothing.
    pub(crate) fn attach(mut input: Input, events: Sender<Event>) -> std::io::Result<Self> {
        let interactive = std::io::stdin().is_terminal() && isatty(rustix::stdio::stdout());
        let raw = if interactive {
            say!("squib: the console is yours; Ctrl-A x ends the VM, Ctrl-A h helps");
            Some(RawMode::enter()?)
        } else {
            None
        };
        thread::Builder::new().name("console-in".into()).spawn(move || {
            let mut escape = Escape::default();
            let mut buffer = [0; 4096];
            let mut stdin = std::io::stdin().lock();
            loop {
                let bytes = match stdin.read(&mut buffer) {
                    Ok(0) => return,
                    Ok(count) => &buffer[..count],
                    Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                    // As with the end of input, the guest runs on.
                    Err(_) => return,
                };
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
