//! The state of a snapshot written again, as a difference to another parent.

use std::path::{Path, PathBuf};

use squib_formats::{
    boot_files::copy_boot_files,
    chain::MAX_CHAIN,
    digest::Digest,
    error::FormatError,
    image::{ImageOptions, ImageReader, ImageSource, Scheme, write_diff, write_image},
    manifest::{MAX_HINT, MEMORY_IMAGE, Manifest},
    publish::{Durability, Existing, Staging},
    sections::{Sections, write_sections},
    snapshot_dir::Snapshot,
};

use crate::{
    observe::{Phase, Run},
    remove,
};

/// What [`rebase`] wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rebased {
    /// Id of the new snapshot.
    pub id: Digest,
    /// Id of its parent.
    pub parent: Digest,
    /// Snapshots in its chain, itself included.
    pub links: usize,
    /// Bytes of all its files but the manifest.
    pub stored: u64,
}

/// Writes the state of the snapshot at `path` as a difference to the one at `onto`, to `output`, which
/// may not be what either builds on. What either builds on may be in `parents`. The two need not be related; the less they have in
/// common, the more is stored. Every chunk is verified on its way, and every image of the new snapshot has the
/// digest of the old one, if that was not of an older format.
pub fn rebase(
    path: &Path,
    parents: &[PathBuf],
    onto: &Path,
    output: &Path,
    existing: Existing,
    durability: Durability,
    run: &Run<'_>,
) -> Result<Rebased, FormatError> {
    run.observer.begin(&Phase::Open);
    let snapshot = Snapshot::open_chain(path, parents)?;
    let onto = std::fs::canonicalize(onto)
        .map_err(|error| FormatError::io(onto.display().to_string(), "open", error))?;
    let _kept = remove::keep(&onto);
    let parent = Snapshot::open_chain(&onto, parents)?;
    let links = parent.chain().count() + 1;
    if links > MAX_CHAIN {
        return Err(FormatError::ChainTooLong { path: output.to_owned() });
    }
    let (id, stored) = rewrite(&snapshot, Some(&parent), (output, existing), durability, run)?;
    Ok(Rebased { id, parent: parent.id(), links, stored })
}

/// Writes the state of `snapshot` to `output`, as a difference to `parent` or in full. Answers the new id, and
/// the bytes of all files but the manifest.
pub(crate) fn rewrite(
    snapshot: &Snapshot,
    parent: Option<&Snapshot>,
    (output, existing): (&Path, Existing),
    durability: Durability,
    run: &Run<'_>,
) -> Result<(Digest, u64), FormatError> {
    let manifest = snapshot.manifest();
    let sections = Sections::read(snapshot)?.into_rest();
    let mut staging = Staging::new(output, existing)?;
    staging.durability(durability);
    let sections = write_sections(&mut staging, &sections)?;
    copy_boot_files(&mut staging, snapshot)?;
    let mut images = Vec::new();
    for record in &manifest.images {
        let phase = match record.name.strip_prefix("disk-") {
            Some(id) => Phase::Disk(id.to_owned()),
            None => Phase::Memory,
        };
        debug_assert!(phase != Phase::Memory || record.name == MEMORY_IMAGE);
        let image = ImageReader::open(snapshot, &record.name)?;
        let base = parent.filter(|parent| parent.manifest().image(&record.name).is_ok());
        let base = base.map(|parent| ImageReader::open(parent, &record.name)).transpose()?;
        let source = ImageSource::new(&image);
        // The image digest depends on the size of a chunk.
        let options = ImageOptions { chunk_size: record.chunk_size, ..ImageOptions::default() };
        let written = run.phase(phase, |control| match &base {
            Some(base) => write_diff(&mut staging, &record.name, &source, base, options, control),
            None => write_image(&mut staging, &record.name, &source, options, control),
        })?;
        let expected = image.index().image_digest(Scheme::WRITTEN);
        if written.record.digest != expected {
            return Err(FormatError::Digest {
                file: record.index_file(),
                what: "the image as written again".into(),
                expected,
                found: written.record.digest,
            });
        }
        images.push(written.record);
    }
    let stored = staging.stored();
    let hint = parent.and_then(|parent| parent.path().to_str());
    let mut written = Manifest {
        writer: concat!("squib ", env!("CARGO_PKG_VERSION")).to_owned(),
        parent: parent.map(Snapshot::id),
        parent_hint: hint.filter(|hint| hint.len() <= MAX_HINT).map(str::to_owned),
        sections,
        files: Vec::new(),
        ..manifest.clone()
    };
    // An older format has other image digests.
    written.set_images(images);
    let id = run.phase(Phase::Publish, |control| {
        control.check()?;
        staging.publish(written)
    })?;
    Ok((id, stored))
}
