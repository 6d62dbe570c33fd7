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
    manifest::{ImageRecord, Manifest, Operation},
    snapshot_dir::Snapshot,
};

use crate::compat;

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
    /// Where the parent was when the snapshot was written.
    pub parent_hint: Option<String>,
    /// What the backend said of the host, if it was a part of its system.
    pub host_backend: Option<HostBackendInspection>,
    /// What the operator chose; `None` if the format of the snapshot did not hold it.
    pub operation: Option<Operation>,
    /// The snapshots that it builds on, its parent first; `None` if they were not all found, or it is no
    /// difference.
    pub chain: Option<Vec<Link>>,
    /// Bytes of all files, the manifest included.
    pub stored: u64,
    /// What each image is made of.
    pub images: Vec<ImageInspection>,
    /// Everything that the manifest says.
    pub manifest: Manifest,
}

/// A backend that is a part of the host's operating system, as it was there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HostBackendInspection {
    /// Build of the operating system.
    pub build: String,
    /// Names of the registers that it did not let one read: they are no part of the vCPUs' state.
    pub unreadable: Vec<String>,
}

/// A snapshot that another builds on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Link {
    /// Its id.
    pub id: Digest,
    /// Where it lies.
    pub path: PathBuf,
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
    /// Chunks that are the parent's.
    pub parent_chunks: u64,
    /// Chunks of which only the pages that differ from the parent's are stored.
    pub patch_chunks: u64,
    /// Chunks that lie in the raw file.
    pub raw_chunks: u64,
    /// Bytes of the frames, and of the raw file.
    pub stored: u64,
}

/// Reads header, manifest and indexes of the snapshot at `path`, and checks these. The snapshots that a
/// difference builds on, which may be in `parents`, are looked for but not needed.
pub fn inspect(path: &Path, parents: &[PathBuf]) -> Result<Inspection, FormatError> {
    let snapshot = Snapshot::open(path)?;
    let chain = snapshot.manifest().parent.and_then(|_| {
        let whole = Snapshot::open_chain(path, parents).ok()?;
        let link = |link: &Snapshot| Link { id: link.id(), path: link.path().to_owned() };
        Some(whole.chain().skip(1).map(link).collect())
    });
    let manifest = snapshot.manifest();
    let mut images = Vec::new();
    for record in &manifest.images {
        let index = ImageReader::open_index(&snapshot, &record.name)?;
        let mut frames = HashSet::new();
        let (mut zero_chunks, mut duplicate_chunks) = (0, 0);
        let (mut parent_chunks, mut patch_chunks, mut raw_chunks) = (0, 0, 0);
        for (chunks, record) in index.runs() {
            let count = chunks.end - chunks.start;
            match record {
                Record::Zero => zero_chunks += count,
                // The first of those that share a frame has it.
                Record::Data { offset, .. } => {
                    duplicate_chunks += count - u64::from(frames.insert(*offset));
                }
                Record::Patch { .. } => patch_chunks += count,
                Record::Parent { .. } => parent_chunks += count,
                Record::Raw { .. } => raw_chunks += count,
            }
        }
        images.push(ImageInspection {
            record: record.clone(),
            chunks: index.chunks(),
            zero_chunks,
            duplicate_chunks,
            parent_chunks,
            patch_chunks,
            raw_chunks,
            stored: manifest.file(&record.data_file())?.length
                + manifest.raw_file(record).map_or(0, |raw| raw.length),
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
        parent_hint: manifest.parent_hint.clone(),
        host_backend: manifest.host_backend.as_ref().map(|host| HostBackendInspection {
            build: host.build.clone(),
            unreadable: host.unreadable.iter().map(|register| compat::name(*register)).collect(),
        }),
        operation: manifest.operation.clone(),
        chain,
        stored,
        images,
        manifest: manifest.clone(),
    })
}
