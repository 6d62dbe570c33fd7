//! A difference and all that it builds on into one full snapshot.

use std::path::{Path, PathBuf};

use squib_formats::{
    digest::Digest,
    error::FormatError,
    image::{CHUNK_SIZE, ImageOptions, ImageReader, ImageSource, write_image},
    manifest::{MEMORY_IMAGE, Manifest},
    publish::{Durability, Existing, Staging},
    sections::{Sections, write_sections},
    snapshot_dir::Snapshot,
};

use crate::observe::{Phase, Run};

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

/// Writes the state of the snapshot at `path` as a full snapshot to `output`, where nothing may be. What it
/// builds on may be in `parents`. Every chunk is verified on its way, and every image of the new snapshot
/// has the digest of the old one.
pub fn flatten(
    path: &Path,
    parents: &[PathBuf],
    output: &Path,
    durability: Durability,
    run: &Run<'_>,
) -> Result<Flattened, FormatError> {
    run.observer.begin(&Phase::Open);
    let snapshot = Snapshot::open_chain(path, parents)?;
    let manifest = snapshot.manifest();
    let sections = Sections::read(&snapshot)?.into_rest();
    let mut staging = Staging::new(output, Existing::Refuse)?;
    staging.durability(durability);
    let sections = write_sections(&mut staging, &sections)?;
    let mut images = Vec::new();
    for record in &manifest.images {
        if record.chunk_size != CHUNK_SIZE {
            return Err(FormatError::Field {
                file: squib_formats::manifest::FILE.into(),
                field: format!("image {}: chunk size", record.name),
                why: format!("{}, this build writes {CHUNK_SIZE} only", record.chunk_size),
            });
        }
        let phase = match record.name.strip_prefix("disk-") {
            Some(id) => Phase::Disk(id.to_owned()),
            None => Phase::Memory,
        };
        debug_assert!(phase != Phase::Memory || record.name == MEMORY_IMAGE);
        let image = ImageReader::open(&snapshot, &record.name)?;
        let written = run.phase(phase, |control| {
            write_image(
                &mut staging,
                &record.name,
                &ImageSource::new(&image),
                ImageOptions::default(),
                control,
            )
        })?;
        if written.record.digest != record.digest {
            return Err(FormatError::Digest {
                file: record.index_file(),
                what: "the flattened image".into(),
                expected: record.digest,
                found: written.record.digest,
            });
        }
        images.push(written.record);
    }
    let stored = staging.stored();
    let flat = Manifest {
        writer: concat!("squib ", env!("CARGO_PKG_VERSION")).to_owned(),
        parent: None,
        parent_hint: None,
        images,
        sections,
        files: Vec::new(),
        ..manifest.clone()
    };
    let id = run.phase(Phase::Publish, |_| staging.publish(flat))?;
    Ok(Flattened { id, links: snapshot.chain().count(), stored })
}
