//! A snapshot written again with the frames of its memory in another order.

use crate::{
    boot_files::copy_boot_files,
    digest::Digest,
    error::FormatError,
    image::{Control, ImageReader, reorder_image},
    manifest::{MEMORY_IMAGE, Manifest},
    publish::Staging,
    sections::{Sections, write_sections},
    snapshot_dir::Snapshot,
};

/// Publishes `snapshot` again as `staging`: in the image `memory` the frames of the chunks `first` lie one
/// behind the other at the beginning, then all others in the order of their chunks; sections, disks and what
/// the manifest tells are the same. A snapshot that is a difference must be from
/// [`Snapshot::open_chain`], and is one to the same parent afterwards.
///
/// Everything is verified on its way, and nothing is compressed again. Every image keeps its image digest, unless the
/// snapshot was of an older format, so a working set stays right; the snapshot's id, which is answered, is a new one, so differences to the old one
/// need the old one.
pub fn reorder_snapshot(
    mut staging: Staging,
    snapshot: &Snapshot,
    first: &[u32],
    control: Control<'_>,
) -> Result<Digest, FormatError> {
    let manifest = snapshot.manifest();
    let mut sections = Sections::read(snapshot)?;
    let records = manifest.sections.iter();
    let ordered = records.map(|record| sections.take(&record.kind, &record.instance));
    let ordered = ordered.collect::<Result<Vec<_>, _>>()?;
    let sections = write_sections(&mut staging, &ordered)?;
    let mut images = Vec::with_capacity(manifest.images.len());
    for record in &manifest.images {
        let image = ImageReader::open(snapshot, &record.name)?;
        let first = if record.name == MEMORY_IMAGE { first } else { &[] };
        images.push(reorder_image(&mut staging, &image, first, control)?.record);
    }
    copy_boot_files(&mut staging, snapshot)?;
    let mut written = Manifest { sections, files: Vec::new(), ..manifest.clone() };
    // An older format has other image digests.
    written.set_images(images);
    staging.publish(written)
}
