//! The escape sequence of the interactive console, as in QEMU: Ctrl-A, then a letter.

const CTRL_A: u8 = 0x01;

/// What the user typed.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Key {
    /// Bytes for the guest.
    Bytes(Vec<u8>),
    /// Ctrl-A x.
    Quit,
    /// Ctrl-A h.
    Help,
}

/// Tells the escape sequence from what is the guest's; a sequence may be cut anywhere.
#[derive(Debug, Default)]
pub(super) struct Escape {
    armed: bool,
}

impl Escape {
    pub(super) fn feed(&mut self, bytes: &[u8]) -> Vec<Key> {
        let mut keys = Vec::new();
        let mut plain = Vec::new();
        for &byte in bytes {
            if !std::mem::take(&mut self.armed) {
                if byte == CTRL_A {
                    self.armed = true;
                } else {
                    plain.push(byte);
                }
                continue;
            }
            let command = match byte {
                CTRL_A => {
                    plain.push(CTRL_A);
                    continue;
                }
                b'x' | b'X' => Key::Quit,
                b'h' | b'H' | b'?' => Key::Help,
                // Not a command, and not meant for the guest either.
                _ => continue,
            };
            if !plain.is_empty() {
                keys.push(Key::Bytes(std::mem::take(&mut plain)));
            }
            keys.push(command);
        }
        if !plain.is_empty() {
            keys.push(Key::Bytes(plain));
        }
        keys
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ctrl_a_x_quits_even_when_it_arrives_in_two_pieces() {
        let mut escape = Escape::default();
        assert_eq!(escape.feed(b"ls\x01"), [Key::Bytes(b"ls".into())]);
        assert_eq!(escape.feed(b"x"), [Key::Quit]);
        assert_eq!(escape.feed(b"x"), [Key::Bytes(b"x".into())]);
    }

    #[test]
    fn ctrl_a_twice_is_one_ctrl_a_for_the_guest() {
        assert_eq!(Escape::default().feed(b"a\x01\x01b"), [Key::Bytes(b"a\x01b".into())]);
    }

    #[test]
    fn an_unknown_command_reaches_nobody() {
        let keys = Escape::default().feed(b"a\x01qb\x01h");
        assert_eq!(keys, [Key::Bytes(b"ab".into()), Key::Help]);
    }
}
