//! Makes a snapshot say that it was taken at another time.

use std::{any::Any, fs, path::Path};

use anyhow::{Context, Result};
use squib_formats::{
    digest::Digest,
    header::{ARCH_AARCH64, Header},
    manifest::{FILE, STATE_FILE},
    persist::Versioned,
    snapshot_dir::Snapshot,
};
use squib_vmm::machine::TimeState;

/// Changes the time that the snapshot at `path` holds. Everything else of it stays, and it is
/// intact.
pub fn retime(path: &Path, change: impl FnOnce(&mut TimeState)) -> Result<TimeState> {
    edit(path, change)
}

/// Changes the first state of kind `S` that the snapshot at `path` holds, to one as long.
/// Everything else of it stays, but for the time of its creation, and it is intact.
pub fn edit<S: Versioned + 'static>(path: &Path, change: impl FnOnce(&mut S)) -> Result<S> {
    let mut manifest = Snapshot::open(path)?.manifest().clone();
    let mut bytes = fs::read(path.join(STATE_FILE))?;
    let section = manifest.sections.iter_mut().find(|section| section.kind == S::KIND);
    let section = section.with_context(|| format!("no `{}` in the snapshot", S::KIND))?;
    let place = section.offset as usize..(section.offset + section.length) as usize;
    let mut state = S::decode(section.version, &bytes[place.clone()])?;
    change(&mut state);
    let payload = state.encode()?;
    section.digest = Digest::of(&payload);
    // Numbers have a fixed size.
    bytes[place].copy_from_slice(&payload);
    fs::write(path.join(STATE_FILE), &bytes)?;
    let file = manifest.files.iter_mut().find(|file| file.name == STATE_FILE);
    file.context("no state in the snapshot")?.digest = Digest::of(&bytes);
    if let Some(time) = (&state as &dyn Any).downcast_ref::<TimeState>() {
        manifest.created = time.wall_ns;
    }
    let body = manifest.encode()?;
    let header = Header::new(ARCH_AARCH64, manifest.minor(), &body);
    fs::write(path.join(FILE), [&header.encode()[..], &body].concat())?;
    Ok(state)
}
