//! How the process ends: the exit codes, and the error that carries one.

use std::fmt;

use crate::plain::plain_line;

/// The exit codes of `squib`. They are part of the command line's contract, listed in `squib help`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// The guest powered off, or the command did what it was asked to.
    Done,
    /// Something on the host failed.
    Failed,
    /// The command line, or a file that it names, cannot be used.
    Usage,
    /// The guest asked for a reset.
    GuestReset,
    /// The guest cannot go on: its kernel panicked, or a vCPU met something that it cannot execute or
    /// survive.
    GuestCrash,
    /// A snapshot could not be written, is damaged, or does not fit here.
    Snapshot,
    /// There is no such running VM, or it did not do what it was told.
    Control,
    /// A comparison did not hold: the demo's, or a digest's.
    Mismatch,
    /// Ended by this signal, or as by SIGPIPE, since the reader of the output has gone.
    Signal(i32),
}

impl Code {
    /// The number that the process ends with.
    pub fn number(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Failed => 1,
            Self::Usage => 2,
            Self::GuestReset => 3,
            Self::GuestCrash => 4,
            Self::Snapshot => 5,
            Self::Control => 6,
            Self::Mismatch => 7,
            Self::Signal(signal) => 128u8.saturating_add(u8::try_from(signal).unwrap_or(127)),
        }
    }
}

/// What `squib help` says about exit codes.
pub(crate) const HELP: &str = "\
Exit codes:
  0    the guest powered off, or the command did what it was asked to
  1    something on the host failed
  2    the command line, or a file that it names, cannot be used
  3    the guest asked for a reset
  4    the guest crashed: its kernel panicked, or a vCPU cannot go on
  5    a snapshot could not be written, is damaged, or does not fit here
  6    no such running VM, or it did not do what it was told
  7    a comparison did not hold
  128+n  ended by signal n; 141 also when the reader of the output has gone";

/// An error with the exit code that it ends the process with.
#[derive(Debug)]
pub struct Failure {
    /// The exit code.
    pub code: Code,
    /// What went wrong, and what to do next.
    pub error: anyhow::Error,
}

/// An error of several lines: what went wrong, and lines below it.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub(crate) struct Complaint {
    pub(crate) what: String,
    pub(crate) lines: Vec<String>,
}

/// What every command gives back.
pub type Result<T = (), E = Failure> = std::result::Result<T, E>;

impl Failure {
    /// A failure from an error of the given code.
    pub fn new(code: Code, error: impl Into<anyhow::Error>) -> Self {
        Self { code, error: error.into() }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Many errors repeat their cause in their own words: each is said once.
        let mut said = String::new();
        for cause in self.error.chain().map(ToString::to_string) {
            if !said.contains(&cause) {
                if !said.is_empty() {
                    said.push_str(": ");
                }
                said.push_str(&cause);
            }
        }
        // Texts of others are in it, which must not look like lines of squib's own.
        f.write_str(&plain_line(&said))?;
        let complaints = self.error.chain().filter_map(|cause| cause.downcast_ref::<Complaint>());
        let mut lines = complaints.flat_map(|complaint| &complaint.lines);
        lines.try_for_each(|line| write!(f, "\n  {}", plain_line(line)))
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::new(Code::Failed, error)
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::new(Code::Failed, error)
    }
}

/// Gives an error its exit code.
pub(crate) trait WithCode<T> {
    fn code(self, code: Code) -> Result<T>;
}

impl<T, E: Into<anyhow::Error>> WithCode<T> for std::result::Result<T, E> {
    fn code(self, code: Code) -> Result<T> {
        self.map_err(|error| Failure::new(code, error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_that_its_error_repeats_is_said_once() {
        let error = anyhow::anyhow!("no room").context("a.img: no room").context("cannot start");
        assert_eq!(Failure::from(error).to_string(), "cannot start: a.img: no room");
    }

    #[test]
    fn only_what_is_a_line_of_its_own_begins_one() {
        let lines = ["x\ny", "z"].map(String::from).into();
        let error = Complaint { what: "bad `a\nsquib: good`".into(), lines };
        let failure = Failure::from(anyhow::Error::from(error).context("so"));
        assert_eq!(failure.to_string(), "so: bad `a\\nsquib: good`\n  x\\ny\n  z");
    }

    #[test]
    fn a_signal_ends_with_its_conventional_code() {
        assert_eq!(Code::Signal(15).number(), 143);
        assert_eq!(Code::Done.number(), 0);
    }
}
