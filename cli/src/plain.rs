//! Text that others wrote, for a terminal: names, paths, command lines and messages of snapshots, guests
//! and other processes. What a terminal would obey, and what shows as nothing or in another place than it
//! stands, becomes an escape that can be read.

use std::borrow::Cow;

/// The text for a line of its own: nothing in it ends the line or moves to a column.
pub(crate) fn plain_line(text: &str) -> Cow<'_, str> {
    escape(text, is_shown, |c, to| to.extend(c.escape_default()))
}

/// The text as lines. Only for text whose lines are squib's own: what others wrote goes in through
/// [`plain_line`], or it could pretend to be a line of squib's.
pub(crate) fn plain(text: &str) -> Cow<'_, str> {
    let stays = |c| matches!(c, '\n' | '\t') || is_shown(c);
    escape(text, stays, |c, to| to.extend(c.escape_default()))
}

/// JSON, as serde writes it, that means the same and has nothing in it that a terminal would obey. Outside of
/// strings it is spaces, line feeds and visible ASCII; in a string an escape stands for its character
/// (RFC 8259, 7).
pub(crate) fn plain_json(json: &str) -> Cow<'_, str> {
    let stays = |c| c == '\n' || is_shown(c);
    escape(json, stays, |c, to| {
        for unit in c.encode_utf16(&mut [0; 2]) {
            to.push_str(&format!("\\u{unit:04x}"));
        }
    })
}

/// The text as one word of a command line that a user may copy into a shell: what others wrote must not
/// become a command of its own.
pub(crate) fn shell_word(text: &str) -> Cow<'_, str> {
    let safe = |c: char| c.is_ascii_alphanumeric() || "/._-=+,:@%".contains(c);
    match !text.is_empty() && text.chars().all(safe) {
        true => Cow::Borrowed(text),
        false => Cow::Owned(format!("'{}'", text.replace('\'', r"'\''"))),
    }
}

fn escape(
    text: &str,
    stays: impl Fn(char) -> bool,
    put: impl Fn(char, &mut String),
) -> Cow<'_, str> {
    if text.chars().all(&stays) {
        return Cow::Borrowed(text);
    }
    let mut escaped = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match stays(c) {
            true => escaped.push(c),
            false => put(c, &mut escaped),
        }
    }
    Cow::Owned(escaped)
}

/// Whether the character shows as itself, where it stands.
fn is_shown(c: char) -> bool {
    !c.is_control() && !HIDDEN.iter().any(|(first, last)| (*first..=*last).contains(&c))
}

/// Characters beyond the control characters that show as nothing or change how others show: bidirectional
/// controls (Unicode Standard Annex 9), separators of lines and paragraphs, and what has the property
/// Default_Ignorable_Code_Point, but for variation selectors, which file names with emoji have.
const HIDDEN: [(char, char); 17] = [
    ('\u{ad}', '\u{ad}'),
    ('\u{34f}', '\u{34f}'),
    ('\u{61c}', '\u{61c}'),
    ('\u{115f}', '\u{1160}'),
    ('\u{17b4}', '\u{17b5}'),
    ('\u{180e}', '\u{180e}'),
    ('\u{200b}', '\u{200f}'),
    ('\u{2028}', '\u{202e}'),
    ('\u{2060}', '\u{206f}'),
    ('\u{2800}', '\u{2800}'),
    ('\u{3164}', '\u{3164}'),
    ('\u{feff}', '\u{feff}'),
    ('\u{ffa0}', '\u{ffa0}'),
    ('\u{fff0}', '\u{fffb}'),
    ('\u{1bca0}', '\u{1bca3}'),
    ('\u{1d173}', '\u{1d17a}'),
    ('\u{e0000}', '\u{e00ff}'),
];

#[cfg(test)]
mod tests {
    use super::*;

    /// One of each kind, each between letters.
    const HOSTILE: &str = "a\u{1b}[2Jb\u{9b}c\u{7f}d\u{202e}e\u{2066}f\u{200e}g\u{61c}h\u{200b}i\
                           \u{2028}j\u{feff}k\u{e0041}l\u{ad}m\u{85}n\u{8}o\rp";

    #[test]
    fn what_a_terminal_would_obey_is_escaped() {
        assert_eq!(plain("a\tb\nc é"), "a\tb\nc é");
        assert_eq!(plain("\u{1b}[2Jx\u{9b}"), "\\u{1b}[2Jx\\u{9b}");
        for text in [plain(HOSTILE), plain_line(HOSTILE), plain_json(HOSTILE)] {
            assert!(text.is_ascii() && !text.chars().any(char::is_control), "{text}");
        }
    }

    #[test]
    fn what_others_wrote_stays_in_its_line() {
        assert_eq!(plain_line("a\nok\tb\rc"), "a\\nok\\tb\\rc");
    }

    #[test]
    fn a_word_for_a_shell_is_one_word() {
        assert_eq!(shell_word("vda=/disks/a-1.img"), "vda=/disks/a-1.img");
        assert_eq!(shell_word("/a; rm $(b) 'c"), "'/a; rm $(b) '\\''c'");
        assert_eq!(shell_word(""), "''");
    }

    #[test]
    fn letters_of_all_scripts_stay() {
        let text = "Zoë e\u{301} 東京 العربية עברית \u{1f980} \u{2764}\u{fe0f} a\u{a0}b";
        assert_eq!(plain_line(text), text);
    }

    #[test]
    fn escaped_json_means_the_same() {
        let json = serde_json::to_string_pretty(&[HOSTILE, "é\n\t"]).unwrap();
        let escaped = plain_json(&json);
        assert_eq!(serde_json::from_str::<[String; 2]>(&escaped).unwrap(), [HOSTILE, "é\n\t"]);
    }
}
