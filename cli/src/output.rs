//! What commands show: progress on a terminal only, numbers for people, JSON for machines.

mod writer;

use std::{io, time::Duration};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use squib_formats::image::Progress;
use squib_snapshot::observe::{Observer, Phase};

pub(crate) use self::writer::{Stdout, bound_messages, finish, keep_error, message, result};
use crate::{
    capture::step_name,
    exit::Failure,
    plain::{plain_json, plain_line},
};

/// Something is being done, nobody knows for how long. On a terminal a spinner that goes away;
/// elsewhere one plain line on stderr for each thing said.
pub(crate) struct Spinner {
    bar: ProgressBar,
    what: String,
}

impl Spinner {
    pub(crate) fn new(what: &str) -> Self {
        let bar = ProgressBar::new_spinner().with_prefix(what.to_owned());
        bar.set_draw_target(ProgressDrawTarget::stderr());
        let style = ProgressStyle::with_template("{spinner} {prefix}: {msg} ({elapsed})");
        bar.set_style(style.expect("a fixed template"));
        bar.enable_steady_tick(Duration::from_millis(100));
        Self { bar, what: what.to_owned() }
    }

    pub(crate) fn say(&self, message: &str) {
        if self.bar.is_hidden() {
            say!("squib: {}: {message}", self.what);
        } else {
            self.bar.set_message(plain_line(message).into_owned());
        }
    }
}

impl Drop for Spinner {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// A bar for a known number of bytes, on a terminal only.
pub(crate) struct ByteBar(ProgressBar);

impl ByteBar {
    pub(crate) fn new(what: &str) -> Self {
        let bar = ProgressBar::new(0).with_prefix(what.to_owned());
        bar.set_draw_target(ProgressDrawTarget::stderr());
        let style = ProgressStyle::with_template(
            "{prefix} {wide_bar} {bytes}/{total_bytes} {binary_bytes_per_sec} {msg} {eta} left ",
        );
        bar.set_style(style.expect("a fixed template"));
        Self(bar)
    }

    /// Whether anybody sees it.
    pub(crate) fn is_shown(&self) -> bool {
        !self.0.is_hidden()
    }

    /// Says what is being done now.
    pub(crate) fn name(&self, what: &str) {
        self.0.set_prefix(plain_line(what).into_owned());
    }

    /// `done` of `total` bytes are through, for which `stored` bytes lie on disk.
    pub(crate) fn set(&self, done: u64, total: u64, stored: u64) {
        self.0.set_length(total);
        self.0.set_position(done);
        let ratio = match stored {
            0 => String::new(),
            _ => format!("1:{:.1}", done as f64 / stored as f64),
        };
        self.0.set_message(ratio);
    }
}

impl Progress for ByteBar {
    fn advanced(&self, done: u64, total: u64, stored: u64) {
        self.set(done, total, stored);
    }
}

impl Observer for ByteBar {
    fn begin(&self, phase: &Phase) {
        self.name(&step_name(phase));
        self.set(0, 0, 0);
    }

    fn advanced(&self, _phase: &Phase, done: u64, total: u64, stored: u64) {
        self.set(done, total, stored);
    }
}

impl Drop for ByteBar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// A line of a command's result on the standard output, [`plain_line`]. See [`finish`] for its errors.
macro_rules! line {
    ($($what:tt)*) => {
        $crate::output::result(&format!("{}\n", $crate::plain::plain_line(&format!($($what)*))))
    };
}
pub(crate) use line;

/// A line for the user on the standard error, [`plain_line`].
macro_rules! say {
    ($($what:tt)*) => {
        $crate::console::message(&format!("{}\n", $crate::plain::plain_line(&format!($($what)*))))
    };
}
pub(crate) use say;

/// Writes `value` as indented JSON, in one line a field. See [`finish`] for errors of the output.
///
/// # Errors
/// `value` has no JSON form.
pub(crate) fn print_json(value: &impl Serialize) -> io::Result<()> {
    let mut json = serde_json::to_string_pretty(value)?;
    json.push('\n');
    result(&plain_json(&json));
    Ok(())
}

/// Writes the failure of a command that prints JSON as a JSON object.
pub(crate) fn print_error(failure: &Failure) {
    #[derive(Serialize)]
    struct Error {
        error: Inner,
    }
    #[derive(Serialize)]
    struct Inner {
        exit_code: u8,
        message: String,
    }
    let inner = Inner { exit_code: failure.code.number(), message: failure.to_string() };
    // A number and a string have a JSON form; errors of the output are kept for the end.
    let _ = print_json(&Error { error: inner });
}

/// Bytes for people: "1.5 MiB".
pub(crate) fn bytes(count: u64) -> String {
    match count {
        0..1024 => format!("{count} B"),
        _ => {
            let mut value = count as f64 / 1024.0;
            let mut units = ["KiB", "MiB", "GiB", "TiB"].into_iter();
            let mut unit = units.next().unwrap_or_default();
            for next in units {
                if value < 1024.0 {
                    break;
                }
                value /= 1024.0;
                unit = next;
            }
            format!("{value:.1} {unit}")
        }
    }
}

/// A duration in milliseconds.
pub(crate) fn ms(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_shown_in_the_unit_that_fits() {
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(256 << 20), "256.0 MiB");
        assert_eq!(bytes(5 << 40), "5.0 TiB");
    }
}
