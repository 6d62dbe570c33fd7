//! The one place that calls the serialisation library, so that it can be replaced.
//!
//! Encoding: bincode 2, little-endian, fixed-width integers, no limit on encode; a limit of
//! [`MAX_PAYLOAD`] bytes on decode bounds what a length field in a hostile payload can allocate.

use crate::persist::{PersistError, Section, Versioned};
use serde::{Serialize, de::DeserializeOwned};

/// Longest payload, and the most memory that decoding one may claim, in bytes.
pub const MAX_PAYLOAD: usize = 16 << 20;

/// Encodes `value`, naming `kind` in errors.
pub fn encode<T: Serialize>(kind: &'static str, value: &T) -> Result<Vec<u8>, PersistError> {
    bincode::serde::encode_to_vec(value, config())
        .map_err(|error| PersistError::Save { kind, why: error.to_string() })
}

/// Decodes a whole payload; bytes left over are an error.
pub fn decode<T: DeserializeOwned>(
    kind: &'static str,
    version: u16,
    payload: &[u8],
) -> Result<T, PersistError> {
    let (value, used) = bincode::serde::decode_from_slice(payload, config())
        .map_err(|error| PersistError::Decode { kind, version, why: error.to_string() })?;
    match payload.len() - used {
        0 => Ok(value),
        left => Err(PersistError::LeftOver { kind, version, left }),
    }
}

/// Decodes `section` as `S` after checking that it is of that kind.
pub(crate) fn checked_kind<S: Versioned>(section: &Section) -> Result<S, PersistError> {
    if section.kind != S::KIND {
        return Err(PersistError::invalid(
            S::KIND,
            "kind",
            format!("the section holds a `{}`", section.kind),
        ));
    }
    section.decode()
}

fn config() -> impl bincode::config::Config {
    bincode::config::standard().with_fixed_int_encoding().with_limit::<MAX_PAYLOAD>()
}
