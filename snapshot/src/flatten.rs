//! A difference and all that it builds on into one full snapshot.

use std::path::{Path, PathBuf};

use squib_formats::{
    digest::Digest,
    error::FormatError,
    publish::{Durability, Existing},
    snapshot_dir::Snapshot,
};

use crate::{
    observe::{Phase, Run},
    rebase::rewrite,
};

/// What [`flatten`] wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flattened {
    /// Id of the new snapshot.
    pub id: Digest,
    /// Snapshots that went into it.
    pub links: usize,
    /// Bytes of all its files but the manifest.
    pub stored: u64,
}

/// Writes the state of the snapshot at `path` as a full snapshot to `output`. What it
/// builds on may be in `parents`. Every chunk is verified on its way, and every image of the new snapshot
/// has the digest of the old one, if that was not of an older format.
pub fn flatten(
    path: &Path,
    parents: &[PathBuf],
    output: &Path,
    existing: Existing,
    durability: Durability,
    run: &Run<'_>,
) -> Result<Flattened, FormatError> {
    run.observer.begin(&Phase::Open);
    let snapshot = Snapshot::open_chain(path, parents)?;
    let links = snapshot.chain().count();
    let (id, stored) = rewrite(&snapshot, None, (output, existing), durability, run)?;
    Ok(Flattened { id, links, stored })
}
