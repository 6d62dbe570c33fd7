//! What a guest needs first after a restore: recorded, and put first in the file.

use std::path::{Path, PathBuf};

use squib_devices::memory::GuestRam;
use squib_formats::{
    digest::Digest,
    error::FormatError,
    manifest::MEMORY_IMAGE,
    publish::{Durability, Existing, Staging},
    reorder::reorder_snapshot,
    snapshot_dir::Snapshot,
    working_set::WorkingSet,
};

use crate::{
    observe::{Phase, Run},
    remove::{Dependent, dependents, needed},
};

/// What [`record`] wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recorded {
    /// Chunks that this run touched.
    pub touched: usize,
    /// Chunks that every run so far has touched: those that were written.
    pub common: usize,
    /// Raw bytes of these.
    pub bytes: u64,
}

/// Writes beside the snapshot at `path`, from which `ram` was restored with
/// [`MemoryLoad::Record`](crate::restore::MemoryLoad::Record), which chunks the guest has needed and in which
/// order. What earlier runs recorded is narrowed down to what this one touched too. `None` if the guest has
/// touched nothing that is stored.
pub fn record(path: &Path, ram: &GuestRam) -> Result<Option<Recorded>, FormatError> {
    let snapshot = Snapshot::open(path)?;
    let image = snapshot.manifest().image(MEMORY_IMAGE)?;
    // An image has far fewer chunks than 2^32.
    let touched: Vec<u32> = ram.granules().recorded().into_iter().map(|n| n as u32).collect();
    if touched.is_empty() {
        return Ok(None);
    }
    let new = WorkingSet::new(image, touched)?;
    let old = WorkingSet::read(&snapshot).unwrap_or_else(|error| {
        tracing::warn!("the working set that was there is replaced: {error}");
        None
    });
    let common = old.map_or(new.clone(), |old| WorkingSet::intersect(&old, &new));
    common.write(&snapshot)?;
    let (touched, common) = (new.chunks().len(), common.chunks().len());
    let bytes = common as u64 * u64::from(image.chunk_size);
    Ok(Some(Recorded { touched, common, bytes }))
}

/// What [`optimize`] wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Optimized {
    /// Id of the new snapshot.
    pub id: Digest,
    /// Chunks of the working set, which now come first.
    pub first: usize,
}

/// Why a snapshot cannot be optimized. It is as it was.
#[derive(Debug, thiserror::Error)]
pub enum OptimizeError {
    /// Nothing was recorded.
    #[error("{}: it has no working set", .path.display())]
    NoWorkingSet {
        /// The snapshot.
        path: PathBuf,
    },
    /// It would be replaced, and others build on it.
    #[error("{}: {}, and would lose it with its id", .path.display(), needed(.dependents))]
    Needed {
        /// The snapshot.
        path: PathBuf,
        /// What builds on it.
        dependents: Vec<Dependent>,
    },
    /// It cannot be read or written.
    #[error(transparent)]
    Format(#[from] FormatError),
}

/// Writes the snapshot at `path` again to `output`, or in its own place, the frames of its working set first
/// and in order, so that a restore from a cold disk reads them in one sweep. Sections and images stay what
/// they are; the id, which commits to the files, is new, so one that others build on keeps its place: they are
/// looked for beside it and in `children`. The working set goes along. What a difference builds on may be in
/// `parents`.
pub fn optimize(
    path: &Path,
    parents: &[PathBuf],
    output: Option<(&Path, Existing)>,
    children: &[PathBuf],
    durability: Durability,
    run: &Run<'_>,
) -> Result<Optimized, OptimizeError> {
    run.observer.begin(&Phase::Open);
    let snapshot = Snapshot::open_chain(path, parents)?;
    let Some(working_set) = WorkingSet::read(&snapshot)? else {
        return Err(OptimizeError::NoWorkingSet { path: path.to_owned() });
    };
    let mut staging = match output {
        Some((output, existing)) => Staging::new(output, existing)?,
        None => {
            let dependents = dependents(path, children)?;
            if !dependents.is_empty() {
                return Err(OptimizeError::Needed { path: path.to_owned(), dependents });
            }
            Staging::new(path, Existing::Replace)?
        }
    };
    staging.durability(durability);
    let id = run.phase(Phase::Memory, |control| {
        reorder_snapshot(staging, &snapshot, working_set.chunks(), control)
    })?;
    // The snapshot is there; without its advice it is only slower.
    let written = Snapshot::open(output.map_or(path, |(output, _)| output))?;
    // An older format has other image digests.
    let image = written.manifest().image(MEMORY_IMAGE)?;
    WorkingSet::new(image, working_set.chunks().to_vec())?.write(&written)?;
    Ok(Optimized { id, first: working_set.chunks().len() })
}
