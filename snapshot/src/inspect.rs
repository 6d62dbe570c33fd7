//! What a snapshot is of, without reading its memory.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
};

use serde::Serialize;
use squib_formats::{
    digest::Digest,
    error::FormatError,
    image::{ImageReader, Record},
    manifest::{ImageRecord, Manifest},
    snapshot_dir::Snapshot,
};

/// What [`inspect`] finds. As JSON, digests are hexadecimal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Inspection {
    /// Where the snapshot lies.
    pub path: PathBuf,
    /// Its id.
    pub id: Digest,
    /// Format version, "1.0".
    pub format: String,
    /// Architecture of the guest, "aarch64".
    pub arch: String,
    /// Version of the squib that wrote it, "0.3.0".
    pub writer_version: String,
    /// Bytes of all files, the manifest included.
    pub stored: u64,
    /// What each image is made of.
    pub images: Vec<ImageInspection>,
    /// Everything that the manifest says.
    pub manifest: Manifest,
}

/// What an image is made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ImageInspection {
    /// Its record in the manifest.
    #[serde(flatten)]
    pub record: ImageRecord,
    /// Number of chunks.
    pub chunks: u64,
    /// Chunks that are all zeros.
    pub zero_chunks: u64,
    /// Chunks that are equal to an earlier one and not zero.
    pub duplicate_chunks: u64,
    /// Bytes of the frames.
    pub stored: u64,
}

/// Reads header, manifest and indexes of the snapshot at `path`, and checks these.
pub fn inspect(path: &Path) -> Result<Inspection, FormatError> {
    let snapshot = Snapshot::open(path)?;
    let manifest = snapshot.manifest();
    let mut images = Vec::new();
    for record in &manifest.images {
        let image = ImageReader::open(&snapshot, &record.name)?;
        let mut frames = HashSet::new();
        let (mut zero_chunks, mut duplicate_chunks) = (0, 0);
        for chunk in image.index().records() {
            match chunk {
                Record::Zero => zero_chunks += 1,
                Record::Data { offset, .. } if !frames.insert(*offset) => duplicate_chunks += 1,
                Record::Data { .. } => {}
            }
        }
        images.push(ImageInspection {
            record: record.clone(),
            chunks: image.index().records().len() as u64,
            zero_chunks,
            duplicate_chunks,
            stored: manifest.file(&record.data_file())?.length,
        });
    }
    let header = snapshot.header();
    let own = squib_formats::header::LEN as u64 + header.body_length;
    // A hostile manifest's lengths may be of any size.
    let stored = manifest.files.iter().fold(own, |sum, file| sum.saturating_add(file.length));
    Ok(Inspection {
        path: path.to_owned(),
        id: snapshot.id(),
        format: format!("{}.{}", header.major, header.minor),
        arch: header.arch_text(),
        writer_version: header.writer_text(),
        stored,
        images,
        manifest: manifest.clone(),
    })
}
