//! What differs between two snapshots, by their indexes alone.

use std::{collections::BTreeSet, path::Path};

use serde::Serialize;
use squib_formats::{
    digest::Digest,
    error::FormatError,
    image::{ImageReader, Index},
    manifest::{Manifest, SectionRecord},
    snapshot_dir::Snapshot,
};

/// What [`diff`] finds. As JSON, digests are hexadecimal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// Id of the first snapshot.
    pub a: Digest,
    /// Id of the second snapshot.
    pub b: Digest,
    /// Whether the guest's state is the same: no image and no section differs.
    pub equal: bool,
    /// Memory and captured disks of either.
    pub images: Vec<ImageDifference>,
    /// Sections that are not the same in both, as "`kind` instance".
    pub sections: Vec<String>,
}

/// How an image differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ImageDifference {
    /// "memory" or "disk-ID".
    pub name: String,
    /// Size of the raw image in bytes in the first snapshot; `None` if it is not there.
    pub a_size: Option<u64>,
    /// Size of the raw image in bytes in the second snapshot; `None` if it is not there.
    pub b_size: Option<u64>,
    /// Bytes of a chunk, the granularity of what follows; `None` if the two do not have the same.
    pub chunk_size: Option<u32>,
    /// Chunks of the larger one.
    pub chunks: u64,
    /// Chunks that differ; all if the chunk sizes are not the same.
    pub changed_chunks: u64,
    /// Chunks that differ and are zero in the second.
    pub zeroed_chunks: u64,
    /// Raw bytes in the chunks that differ.
    pub changed_bytes: u64,
    /// Where they are, in ascending order.
    pub regions: Vec<Region>,
}

/// Chunks in a row that differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Region {
    /// Offset in the raw image, in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
}

/// Compares the snapshots at `a` and `b`. Only manifests and indexes are read, so what a difference builds
/// on is not needed.
pub fn diff(a: &Path, b: &Path) -> Result<Difference, FormatError> {
    let (a, b) = (Snapshot::open(a)?, Snapshot::open(b)?);
    let names = |manifest: &Manifest| {
        manifest.images.iter().map(|image| image.name.clone()).collect::<Vec<_>>()
    };
    let mut all = names(a.manifest());
    all.extend(names(b.manifest()).into_iter().filter(|name| a.manifest().image(name).is_err()));
    let mut images = Vec::new();
    for name in all {
        let index = |snapshot: &Snapshot| match snapshot.manifest().image(&name) {
            Ok(_) => ImageReader::open_index(snapshot, &name).map(Some),
            Err(_) => Ok(None),
        };
        let (a, b) = (index(&a)?, index(&b)?);
        images.push(compare(name, a.as_ref(), b.as_ref()));
    }
    let sections = sections(a.manifest(), b.manifest());
    let same = |image: &ImageDifference| image.changed_chunks == 0 && image.a_size == image.b_size;
    let equal = sections.is_empty() && images.iter().all(same);
    Ok(Difference { a: a.id(), b: b.id(), equal, images, sections })
}

fn compare(name: String, a: Option<&Index>, b: Option<&Index>) -> ImageDifference {
    let chunk_size = match (a, b) {
        (Some(a), Some(b)) => (a.chunk_size() == b.chunk_size()).then_some(a.chunk_size()),
        (one, other) => one.or(other).map(Index::chunk_size),
    };
    let size = |index: Option<&Index>| index.map(Index::size);
    let count = |index: Option<&Index>| index.map_or(0, |index| index.records().len() as u64);
    let longest = size(a).max(size(b)).unwrap_or(0);
    let mut found = ImageDifference {
        name,
        a_size: size(a),
        b_size: size(b),
        chunk_size,
        chunks: count(a).max(count(b)),
        changed_chunks: 0,
        zeroed_chunks: 0,
        changed_bytes: 0,
        regions: Vec::new(),
    };
    let Some(chunk_size) = chunk_size else {
        found.changed_chunks = found.chunks;
        found.changed_bytes = longest;
        found.regions.push(Region { offset: 0, length: longest });
        return found;
    };
    let zero = squib_formats::image::zero_digest(chunk_size);
    let digest = |index: Option<&Index>, chunk: u64| {
        index.filter(|_| chunk < count(index)).map(|index| index.digest(chunk))
    };
    for chunk in 0..found.chunks {
        let (before, now) = (digest(a, chunk), digest(b, chunk));
        if before == now {
            continue;
        }
        let offset = chunk * u64::from(chunk_size);
        let length = u64::from(chunk_size).min(longest - offset);
        found.changed_chunks += 1;
        found.zeroed_chunks += u64::from(now == Some(zero));
        found.changed_bytes += length;
        match found.regions.last_mut() {
            Some(last) if last.offset + last.length == offset => last.length += length,
            _ => found.regions.push(Region { offset, length }),
        }
    }
    found
}

/// Sections that one of the two lacks or has otherwise.
fn sections(a: &Manifest, b: &Manifest) -> Vec<String> {
    let all = |manifest: &Manifest| -> BTreeSet<(String, String, u16, Digest)> {
        let about = |section: &SectionRecord| {
            let SectionRecord { kind, instance, version, offset: _, length: _, digest } = section;
            (kind.clone(), instance.clone(), *version, *digest)
        };
        manifest.sections.iter().map(about).collect()
    };
    let names =
        all(a).symmetric_difference(&all(b)).map(|s| format!("`{}` {}", s.0, s.1)).collect();
    let names: BTreeSet<String> = names;
    names.into_iter().collect()
}
