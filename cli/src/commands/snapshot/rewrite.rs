//! What the commands share that write a snapshot again.

use std::path::{Path, PathBuf};

use serde::Serialize;
use squib_formats::{digest::Digest, snapshot_dir::Snapshot};
use squib_snapshot::{Durability, Existing, remove};

use crate::{
    api::types,
    exit::{Code, Failure, Result, WithCode},
    home::Home,
};

/// What was written, as JSON.
#[derive(Serialize)]
pub(super) struct Written<'a> {
    pub(super) path: &'a Path,
    pub(super) id: Digest,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) parent: Option<Digest>,
    /// Snapshots of the chain that it came from, or is the last of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) links: Option<usize>,
    /// Bytes of all files but the manifest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) stored_bytes: Option<u64>,
    /// Chunks that come first in the file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) first_chunks: Option<usize>,
}

/// What is done about a snapshot that is at `output`, where one that builds on `onto` is to be written. One that
/// others need is not replaced.
pub(super) fn existing(
    force: bool,
    output: &Path,
    onto: Option<&Path>,
    parents: &[PathBuf],
) -> Result<Existing> {
    if !force {
        return Ok(Existing::Refuse);
    }
    let refuse = |why: String| {
        let why = anyhow::anyhow!("{}: {why}; it is not replaced", output.display());
        Err(Failure::new(Code::Snapshot, why))
    };
    if let (Some(onto), Ok(here)) = (onto, output.canonicalize()) {
        let onto = Snapshot::open_chain(onto, parents).code(Code::Snapshot)?;
        if onto.chain().any(|link| link.path().canonicalize().is_ok_and(|path| path == here)) {
            return refuse("the new snapshot would build on it".into());
        }
    }
    // What cannot be read as a snapshot is looked at when it is replaced.
    if let Ok(snapshot) = Snapshot::open(output) {
        let children = Home::open().code(Code::Failed)?.children().below(snapshot.id());
        let needed_by = remove::dependents(output, &children).code(Code::Snapshot)?;
        if !needed_by.is_empty() {
            return refuse(remove::needed(&needed_by));
        }
    }
    Ok(Existing::Replace)
}

/// What has to be safe before the command ends.
pub(super) fn durability(choice: types::Durability) -> Durability {
    match choice {
        types::Durability::Full => Durability::Full,
        types::Durability::None => Durability::None,
    }
}

/// The failure of a command that is given a snapshot that is not there: that is a matter of the command line,
/// not of the snapshot.
pub(super) fn must_be_there(dir: &Path) -> Result {
    match dir.symlink_metadata() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Err(Failure::new(Code::Usage, anyhow::anyhow!("{}: {error}", dir.display())))
        }
        _ => Ok(()),
    }
}
