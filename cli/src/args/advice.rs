//! What is said to a command line that is none, beyond what clap says.

use clap::error::{ContextKind, ContextValue, ErrorKind};

/// The word that was taken for a command, if that is what is wrong.
fn unknown_command(refused: &clap::Error) -> Option<&str> {
    match (refused.kind(), refused.get(ContextKind::InvalidSubcommand)) {
        (ErrorKind::InvalidSubcommand, Some(ContextValue::String(word))) => Some(word),
        _ => None,
    }
}

/// Takes back a suggestion that is no slip of the finger: `kit` for `kill`.
pub(crate) fn check_suggestion(refused: &mut clap::Error) {
    let Some(word) = unknown_command(refused).map(str::to_owned) else { return };
    let close = |name: &String| distance(&word, name) * 3 <= word.len();
    let suggested = match refused.get(ContextKind::SuggestedSubcommand) {
        Some(ContextValue::String(name)) => vec![name.clone()],
        Some(ContextValue::Strings(names)) => names.clone(),
        _ => return,
    };
    let close: Vec<String> = suggested.into_iter().filter(close).collect();
    match close.is_empty() {
        true => drop(refused.remove(ContextKind::SuggestedSubcommand)),
        false => {
            refused.insert(ContextKind::SuggestedSubcommand, ContextValue::Strings(close));
        }
    }
}

/// What to do instead of a command that others have.
pub(crate) fn advice(refused: &clap::Error) -> Option<&'static str> {
    Some(match unknown_command(refused)? {
        "kill" | "stop" => {
            "a VM ends with Ctrl-A x on its console, or by `kill PID` of its process (`squib ps`)"
        }
        "create" | "save" => {
            "`squib snapshot create VM --output DIR` writes a snapshot of a running VM"
        }
        "restore" | "load" => "`squib snapshot restore DIR` brings a snapshot back",
        "start" | "boot" => "`squib run` boots a VM",
        "list" => "`squib ps` lists the running VMs",
        _ => return None,
    })
}

/// Letters that have to be put in, taken out or replaced to make one word of the other.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (at, a) in a.chars().enumerate() {
        let mut corner = at;
        row[0] = at + 1;
        for (n, b) in b.iter().enumerate() {
            let next = (row[n] + 1).min(row[n + 1] + 1).min(corner + usize::from(a != *b));
            corner = std::mem::replace(&mut row[n + 1], next);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::Cli;

    fn refused(word: &str) -> clap::Error {
        let mut refused = Cli::try_parse_from(["squib", word]).unwrap_err();
        check_suggestion(&mut refused);
        refused
    }

    #[test]
    fn a_slip_is_corrected_and_another_word_is_not_bent_to_a_command() {
        assert_eq!((distance("kill", "kit"), distance("", "ab"), distance("ab", "ab")), (2, 2, 0));
        assert!(refused("snapshto").to_string().contains("snapshot"));
        let kill = refused("kill");
        assert!(!kill.to_string().contains("kit"), "{kill}");
        assert!(advice(&kill).unwrap().contains("squib ps"));
        assert_eq!(advice(&refused("x")), None);
    }
}
