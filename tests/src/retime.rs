//! Makes a snapshot say that it was taken at another time.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use squib_formats::{
    digest::Digest,
    header::{ARCH_AARCH64, Header},
    manifest::{FILE, STATE_FILE},
    persist::Versioned,
    snapshot_dir::Snapshot,
};
use squib_vmm::machine::TimeState;

/// Changes the time that the snapshot at `path` holds. Everything else of it stays, and it is intact.
pub fn retime(path: &Path, change: impl FnOnce(&mut TimeState)) -> Result<TimeState> {
    let mut manifest = Snapshot::open(path)?.manifest().clone();
    let mut bytes = fs::read(path.join(STATE_FILE))?;
    let section = manifest.sections.iter_mut().find(|section| section.kind == TimeState::KIND);
    let section = section.context("no time in the snapshot")?;
    let place = section.offset as usize..(section.offset + section.length) as usize;
    let mut time = TimeState::decode(section.version, &bytes[place.clone()])?;
    change(&mut time);
    let payload = time.encode()?;
    section.digest = Digest::of(&payload);
    // Numbers have a fixed size.
    bytes[place].copy_from_slice(&payload);
    fs::write(path.join(STATE_FILE), &bytes)?;
    let state = manifest.files.iter_mut().find(|file| file.name == STATE_FILE);
    state.context("no state in the snapshot")?.digest = Digest::of(&bytes);
    manifest.created = time.wall_ns;
    let body = manifest.encode()?;
    let header = Header::new(ARCH_AARCH64, manifest.minor(), &body);
    fs::write(path.join(FILE), [&header.encode()[..], &body].concat())?;
    Ok(time)
}
