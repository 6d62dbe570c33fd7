//! The phases of a run or a restore, in milliseconds since the process began.

use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use squib_vmm::machine::{Machine, RunState};

use crate::{api::types::Phase, args::TimingsFormat, console::message, output::ms};

/// How often it is looked whether something has happened; what is reported is when it happened.
const LOOK: Duration = Duration::from_millis(2);

/// What is printed: the phases on this process's way, then two points in time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Timings {
    /// Each phase, in order.
    pub(crate) phases: Vec<Phase>,
    /// From the start of the process to the first guest instruction.
    pub(crate) first_instruction_ms: Option<f64>,
    /// From the start of the process to the first byte on the guest's console.
    pub(crate) first_console_byte_ms: Option<f64>,
}

/// A clock that each phase stops.
#[derive(Debug, Clone)]
pub(crate) struct Phases {
    started: Instant,
    last: Instant,
    list: Vec<Phase>,
}

impl Phases {
    /// The process began at `started`, and so does the first phase.
    pub(crate) fn new(started: Instant) -> Self {
        Self { started, last: started, list: Vec::new() }
    }

    /// Ends the phase that is under way, and names it.
    pub(crate) fn end(&mut self, name: &str) {
        let now = Instant::now();
        self.add(name, now - self.last);
        self.last = now;
    }

    /// Ends the phase that is under way; its parts have been measured already.
    pub(crate) fn end_with(&mut self, parts: &[(&str, Duration)]) {
        for (name, took) in parts {
            self.add(name, *took);
        }
        self.last = Instant::now();
    }

    fn add(&mut self, name: &str, took: Duration) {
        self.list.push(Phase { name: name.to_owned(), ms: ms(took) });
    }

    /// Prints everything on stderr once the guest has written its first byte, or has ended.
    pub(crate) fn report(
        self,
        machine: Arc<Machine>,
        format: TimingsFormat,
    ) -> std::io::Result<()> {
        thread::Builder::new().name("timings".into()).spawn(move || {
            let marks = machine.timings();
            while marks.first_console_byte().is_none()
                && !matches!(machine.state(), RunState::Ended(_))
            {
                thread::sleep(LOOK);
            }
            let since = |at: Option<Instant>| at.map(|at| ms(at - self.started));
            let timings = Timings {
                first_instruction_ms: since(marks.first_instruction()),
                first_console_byte_ms: since(marks.first_console_byte()),
                phases: self.list,
            };
            message(&format!("{}\n", timings.show(format)));
        })?;
        Ok(())
    }
}

impl Timings {
    fn show(&self, format: TimingsFormat) -> String {
        if format == TimingsFormat::Json {
            let json = serde_json::to_string(self).expect("numbers and strings have a JSON form");
            return json;
        }
        let mut lines = phase_lines(&self.phases);
        for (name, at) in [
            ("= first guest instruction", self.first_instruction_ms),
            ("= first console byte", self.first_console_byte_ms),
        ] {
            lines.push(match at {
                Some(at) => format!("{name:<28} {at:>10.3} ms"),
                None => format!("{name:<28}       none"),
            });
        }
        lines.join("\n")
    }

    /// The timings in a line of stderr, if it is one of [`TimingsFormat::Json`]: a message is no JSON object.
    pub(crate) fn parse(line: &str) -> Option<Self> {
        serde_json::from_str(line).ok()
    }
}

/// A line for each phase.
pub(crate) fn phase_lines(phases: &[Phase]) -> Vec<String> {
    phases.iter().map(|Phase { name, ms }| format!("{name:<28} {ms:>10.3} ms")).collect()
}
