//! Names of files inside a snapshot's directory.

use crate::error::FormatError;

/// Longest name in bytes.
pub const MAX_LEN: usize = 128;

/// Whether `name` is 1 to [`MAX_LEN`] of `a-z A-Z 0-9 . _ -`, not beginning with a dot: such a name can
/// neither leave the directory nor hide in it.
pub fn check(name: &str) -> Result<(), FormatError> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    match name.len() {
        1..=MAX_LEN if !name.starts_with('.') && name.bytes().all(plain) => Ok(()),
        _ => Err(FormatError::Name { name: name.to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_leave_the_directory_or_hide_are_refused() {
        for name in
            ["", ".", "..", "../x", "/x", "a/b", ".hidden", "a\0b", "a b", "ü", &"a".repeat(129)]
        {
            assert!(check(name).is_err(), "{name:?}");
        }
        for name in ["memory.idx", "disk-a_B.0.zst", "state", &"a".repeat(128)] {
            check(name).unwrap();
        }
    }
}
