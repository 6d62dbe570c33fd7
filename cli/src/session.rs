//! A VM in this process from its start to its end: name, socket, console, events.

use std::{
    io::Write,
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use squib_vmm::{
    config::{MachineConfig, OnReset},
    machine::{Machine, MachineError, Outcome},
};

use crate::{
    api::server::Server,
    args::VmArgs,
    commands::run,
    console::{Console, Output},
    events::{self, Event},
    exit::{Code, Failure, Result, WithCode},
    home::{self, Home, VmDir},
    output::{self, say},
    timings::Phases,
    vm::Vm,
};

/// How long the end waits for a reader of the console that takes nothing.
const STALL: Duration = Duration::from_secs(5);
/// How long the end waits for a reader of the console that is slow. At most 70 KiB are on their way.
const LONGEST: Duration = Duration::from_secs(30);
/// How often it is looked whether something else ends the VM.
const LOOK: Duration = Duration::from_millis(50);

/// What is special about a run or a restore.
pub(crate) struct Session<'a> {
    /// The VM's name.
    pub(crate) name: &'a str,
    /// The flags that both have.
    pub(crate) args: &'a VmArgs,
    /// When the process began.
    pub(crate) started: Instant,
    /// Readies the configuration of a machine that is to boot again, or says why it cannot.
    pub(crate) reboot: &'a dyn Fn(&mut MachineConfig) -> Result,
    /// Leave the guest paused at first.
    pub(crate) paused: bool,
}

/// Makes the machine, given where its console goes.
pub(crate) type Make<'a> =
    &'a mut dyn FnMut(Box<dyn Write + Send>, &VmDir, &mut Phases) -> Result<Machine>;

impl Session<'_> {
    /// Runs the machine that `make` makes until it ends.
    pub(crate) fn run(self, make: Make<'_>) -> Result<Code> {
        let mut phases = Phases::new(self.started);
        output::bound_messages();
        // Dropped in reverse order: the name is free once everything else is gone.
        let home = Home::open().code(Code::Failed)?;
        let (events, happened) = mpsc::channel();
        events::run_in_background()?;
        // Before there is anything that a signal could leave behind.
        events::watch_signals(events.clone())?;
        let dir = home.claim(self.name).code(Code::Usage)?;
        let socket = self.args.api_sock.clone().unwrap_or_else(|| dir.socket());
        let listener = home::listen(&socket).code(Code::Usage)?;
        let _unlink = Unlink(&socket);
        phases.end("prepare");

        let output: Output = Output::default();
        let machine = Arc::new(make(Box::new(output.clone()), &dir, &mut phases)?);
        let restart = machine.config().on_reset == OnReset::Restart;
        let vm = Arc::new(Vm::new(self.name, machine.clone(), events.clone()));
        let server = Server::start(listener, vm.clone())?;
        dir.publish(&socket).code(Code::Failed)?;
        let to_guest = vm.clone();
        let input = Box::new(move |bytes: &[u8]| {
            // A guest that has ended reads no more; a restarted one starts with an empty console.
            if let Some(machine) = to_guest.machine() {
                let input = machine.console_input();
                // Sending may wait for the guest, and must not keep the machine for so long.
                drop(machine);
                let _ = input.send(bytes);
            }
        });
        let console = Console::attach(input, events.clone())?;
        phases.end("control socket and console");
        if !self.paused {
            match machine.resume() {
                // A damaged snapshot may have ended it already.
                Ok(()) | Err(MachineError::Ended(_)) => {}
                Err(error) => return Err(run::failure(error)),
            }
        }
        watch(machine.clone(), events.clone())?;
        if let Some(format) = self.args.timings {
            phases.report(machine.clone(), format)?;
        }
        drop(machine);

        let end = loop {
            // The sender is also held here, so that there is always an event to come.
            let event = happened.recv().map_err(anyhow::Error::from)?;
            match event {
                Event::Guest(outcome @ (Outcome::Reset | Outcome::Panic)) if restart => {
                    // What this boot wrote comes before what the next one writes.
                    if let Some(event) = written_or_ended(&vm, &happened) {
                        break End::from(event);
                    }
                    // Between two machines there is none to be restarted.
                    let Some(mut next) = vm.machine().map(|machine| machine.reboot()) else {
                        break End::Guest(outcome);
                    };
                    if outcome == Outcome::Panic {
                        // As often as the guest likes: within the budget of the log.
                        tracing::warn!("{outcome}; it boots again");
                    }
                    (self.reboot)(&mut next.config)?;
                    vm.retire();
                    let machine = next.boot(Box::new(output.clone())).map_err(run::failure)?;
                    let machine = Arc::new(machine);
                    vm.replace(machine.clone());
                    machine.resume().code(Code::Failed)?;
                    watch(machine, events.clone())?;
                }
                event => break End::from(event),
            }
        };
        vm.cancel();
        let unwritten = vm.machine().map_or(0, |machine| {
            machine.stop();
            machine.finish_console(STALL, LONGEST)
        });
        drop(server);
        drop(console);
        if unwritten > 0 {
            say!("squib: {unwritten} bytes of console output are lost: their reader stands still");
        }
        if output.lost() > 0 {
            say!("squib: {} bytes of console output could not be written", output.lost());
        }
        match end.code()? {
            // What was asked for was done, and its output is not whole.
            Code::Done if unwritten > 0 || output.lost() > 0 => Ok(Code::Failed),
            code => Ok(code),
        }
    }
}

/// Waits until what the guest wrote has reached its reader, as the guest would have waited. Returns what ended
/// the VM meanwhile.
fn written_or_ended(vm: &Vm, happened: &mpsc::Receiver<Event>) -> Option<Event> {
    let machine = vm.machine()?;
    while !machine.drain_console(LOOK) {
        if let Ok(event) = happened.try_recv() {
            return Some(event);
        }
    }
    None
}

/// Why the session ends.
enum End {
    Guest(Outcome),
    Asked,
    Signal(i32),
}

impl From<Event> for End {
    fn from(event: Event) -> Self {
        match event {
            Event::Guest(outcome) => Self::Guest(outcome),
            Event::UserQuit | Event::Stop => Self::Asked,
            Event::Signal(signal) => Self::Signal(signal),
        }
    }
}

impl End {
    fn code(self) -> Result<Code> {
        match self {
            Self::Guest(Outcome::PowerOff | Outcome::Stopped) | Self::Asked => Ok(Code::Done),
            Self::Guest(outcome @ Outcome::Reset) => {
                say!("squib: {outcome}; `--on-reset restart` boots again");
                Ok(Code::GuestReset)
            }
            Self::Guest(outcome @ Outcome::Panic) => {
                Err(Failure::new(Code::GuestCrash, anyhow::anyhow!("{outcome}")))
            }
            Self::Guest(Outcome::Crashed(crash)) => Err(Failure::new(Code::GuestCrash, crash)),
            Self::Guest(Outcome::Damaged(why)) => {
                let advice = "`squib snapshot verify` lists all damage";
                Err(Failure::new(Code::Snapshot, anyhow::anyhow!("{why}: {advice}")))
            }
            Self::Signal(signal) => Ok(Code::Signal(signal)),
        }
    }
}

/// A thread that tells how the machine ends.
fn watch(machine: Arc<Machine>, events: mpsc::Sender<Event>) -> Result {
    thread::Builder::new().name("outcome".into()).spawn(move || {
        // Nobody to tell: the session has ended for another reason.
        let _ = events.send(Event::Guest(machine.wait()));
    })?;
    Ok(())
}

/// Removes a socket that lies elsewhere than in the VM's directory.
struct Unlink<'a>(&'a std::path::Path);

impl Drop for Unlink<'_> {
    fn drop(&mut self) {
        // It may be gone, with the VM's directory or by the user's hand.
        let _ = std::fs::remove_file(self.0);
    }
}
