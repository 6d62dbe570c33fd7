//! Checking every byte of a snapshot without restoring it.

use std::path::{Path, PathBuf};

use squib_formats::{error::FormatError, image::Control};

pub use squib_formats::verify::{Damage, Verified};

use crate::config;

/// Checks the snapshot at `path` whole: header, manifest and the machine in it, every file, section,
/// index record and chunk; and all that it needs of the snapshots that it builds on, which may be in
/// `parents`.
pub fn verify(path: &Path, parents: &[PathBuf], control: Control<'_>) -> Result<Verified, Damage> {
    let verified = squib_formats::verify::verify(path, parents, control)?;
    match config::from_manifest(verified.snapshot.manifest()) {
        Ok(_) => Ok(verified),
        Err(error) => Err(Damage(vec![FormatError::Field {
            file: squib_formats::manifest::FILE.to_owned(),
            field: "machine".to_owned(),
            why: error.to_string(),
        }])),
    }
}
