//! What the demo found, as a table.

use serde::Serialize;

use crate::output::{bytes, line};

/// One comparison.
#[derive(Debug, Serialize)]
pub(super) struct Check {
    what: &'static str,
    before: String,
    after: String,
    holds: bool,
}

impl Check {
    pub(super) fn new(what: &'static str, before: String, after: String) -> Self {
        let holds = !before.is_empty() && before == after;
        Self { what, before, after, holds }
    }
}

/// All of it.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) boot_ms: f64,
    pub(super) pause_ms: Option<f64>,
    pub(super) create_ms: f64,
    pub(super) stored_bytes: u64,
    pub(super) raw_bytes: u64,
    pub(super) first_instruction_ms: Option<f64>,
    pub(super) first_output_ms: Option<f64>,
    pub(super) checks: Vec<Check>,
}

impl Report {
    /// Whether every comparison holds.
    pub(super) fn holds(&self) -> bool {
        self.checks.iter().all(|check| check.holds)
    }

    pub(super) fn show(&self) {
        let line = |what: &str, value: Option<f64>, note: &str| match value {
            Some(value) => line!("{what:<34} {value:>10.1} ms  {note}"),
            None => line!("{what:<34}       none"),
        };
        let ratio = self.raw_bytes as f64 / self.stored_bytes.max(1) as f64;
        let sizes = format!(
            "{} of memory and disks in {} (1:{ratio:.1})",
            bytes(self.raw_bytes),
            bytes(self.stored_bytes)
        );
        line("boot, to the guest's first count", Some(self.boot_ms), "");
        line("pause", self.pause_ms, "");
        line("create", Some(self.create_ms), &sizes);
        line("restore, to the first instruction", self.first_instruction_ms, "new process");
        line("restore, to the first new output", self.first_output_ms, "");
        line!("");
        for Check { what, before, after, holds } in &self.checks {
            // Digests are told apart by their beginning; --json has them whole.
            let short = |text: &str| -> String {
                match text.char_indices().nth(32) {
                    Some((at, _)) => format!("{}...", &text[..at]),
                    None => text.to_owned(),
                }
            };
            if *holds {
                line!("ok    {what:<30} {}", short(after));
            } else {
                line!("FAIL  {what:<30} before {before}, after {after}");
            }
        }
        line!("");
        line!("{}", if self.holds() { "nothing was lost" } else { "SOMETHING WAS LOST" });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_comparison_that_does_not_hold_fails_the_report() {
        let check = |before: &str, after: &str| Check::new("x", before.into(), after.into());
        let report = |checks| Report {
            boot_ms: 0.0,
            pause_ms: None,
            create_ms: 0.0,
            stored_bytes: 0,
            raw_bytes: 0,
            first_instruction_ms: None,
            first_output_ms: None,
            checks,
        };
        assert!(report(vec![check("1", "1")]).holds());
        assert!(!report(vec![check("1", "1"), check("1", "2")]).holds());
        assert!(!report(vec![check("", "")]).holds(), "nothing is not equal to nothing");
    }
}
