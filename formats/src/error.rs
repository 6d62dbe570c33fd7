//! What can be wrong with a snapshot on disk, or with writing one.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

use crate::{digest::Digest, persist::PersistError};

/// Why a snapshot cannot be written, read or trusted. `file` is the name inside the snapshot's
/// directory, or the whole path where the file lies elsewhere.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// The operating system refused.
    #[error("{file}: cannot {action}: {source}")]
    Io {
        /// The file.
        file: String,
        /// What was tried ("open", "read").
        action: &'static str,
        /// What the operating system said.
        source: io::Error,
    },
    /// No room: the disk is full, or a quota or file size limit is met.
    #[error("{file}: no room left while writing: {source}")]
    NoRoom {
        /// The file that was being written.
        file: String,
        /// What the operating system said.
        source: io::Error,
    },
    /// There is something at the place of the new snapshot.
    #[error("{}: exists already", .path.display())]
    Exists {
        /// The place.
        path: PathBuf,
    },
    /// The directory is not a squib snapshot.
    #[error("{}: not a squib snapshot: {why}", .path.display())]
    NotASnapshot {
        /// The directory.
        path: PathBuf,
        /// What it lacks.
        why: String,
    },
    /// The directory is a snapshot, and holds what is not the snapshot's: it is not replaced.
    #[error(
        "{}: it holds what does not belong to the snapshot, and is not replaced: {}; move that away first",
        .path.display(), .names.join(", ")
    )]
    Foreign {
        /// The directory.
        path: PathBuf,
        /// Names in it.
        names: Vec<String>,
    },
    /// A file name that could leave the directory or hide in it.
    #[error("`{}` cannot be the name of a file in a snapshot", .name.escape_debug())]
    Name {
        /// The name.
        name: String,
    },
    /// The snapshot's format is not one that this build reads.
    #[error(
        "manifest: format {major}.{minor}, written by squib {writer}; this build reads format \
         {}.0 to {}.{}",
        crate::header::MAJOR,
        crate::header::MAJOR,
        crate::header::MINOR
    )]
    Format {
        /// Major format version found.
        major: u16,
        /// Minor format version found.
        minor: u16,
        /// Version of the squib that wrote the snapshot.
        writer: String,
    },
    /// A file is not of the length that the manifest or its neighbour gives it.
    #[error("{file}: {what} is {found} bytes long, expected {expected}")]
    Length {
        /// The file.
        file: String,
        /// The part of the file ("the file", "the body").
        what: String,
        /// Bytes expected.
        expected: u64,
        /// Bytes found.
        found: u64,
    },
    /// Bytes are not what their digest says.
    #[error("{file}: {what} is damaged: digest {found}, expected {expected}")]
    Digest {
        /// The file.
        file: String,
        /// The part of the file ("the file", "chunk 17", "section `vcpu` 0").
        what: String,
        /// The digest on record.
        expected: Digest,
        /// The digest of the bytes met.
        found: Digest,
    },
    /// A field holds a value that no writer writes.
    #[error("{file}: {field}: {why}")]
    Field {
        /// The file.
        file: String,
        /// The field, with the number of the record if there are several.
        field: String,
        /// The value met and what is allowed.
        why: String,
    },
    /// A chunk's frame does not decompress to the chunk.
    #[error("{file}: chunk {chunk}: {why}")]
    Chunk {
        /// The file.
        file: String,
        /// Number of the chunk.
        chunk: u64,
        /// What is wrong.
        why: String,
    },
    /// The snapshot that a difference needs is at none of the places where it could be.
    #[error(
        "{}: needs its parent, the snapshot {id}, which is not there{}",
        .path.display(),
        Looked(.looked)
    )]
    MissingParent {
        /// The snapshot that needs it.
        path: PathBuf,
        /// Id of the parent.
        id: Digest,
        /// The places that were looked at by name, and what is there instead.
        looked: Vec<String>,
    },
    /// A chain of differences is longer than [`crate::chain::MAX_CHAIN`].
    #[error(
        "{}: more than {} snapshots in a chain; flatten one of them",
        .path.display(),
        crate::chain::MAX_CHAIN
    )]
    ChainTooLong {
        /// The snapshot that is one too many.
        path: PathBuf,
    },
    /// The machine needs a section that the snapshot does not have.
    #[error("state: section `{kind}` of instance `{instance}` is missing")]
    MissingSection {
        /// Kind of the section.
        kind: String,
        /// Instance of the section.
        instance: String,
    },
    /// The snapshot has sections that nothing in the machine takes.
    #[error("state: nothing takes {}", .sections.join(", "))]
    UnknownSections {
        /// Kind and instance of each.
        sections: Vec<String>,
    },
    /// A file that the manifest must list is not in its list, or an image is missing.
    #[error("manifest: there is no {what}")]
    Unlisted {
        /// What was looked for ("file `state`", "image `memory`").
        what: String,
    },
    /// The caller asked to stop.
    #[error("cancelled")]
    Cancelled,
    /// A section does not decode.
    #[error(transparent)]
    Persist(#[from] PersistError),
}

impl FormatError {
    /// An error of the operating system while doing `action` on `file`.
    pub fn io(file: impl Into<String>, action: &'static str, source: impl Into<io::Error>) -> Self {
        let (file, source) = (file.into(), source.into());
        match source.kind() {
            io::ErrorKind::StorageFull
            | io::ErrorKind::QuotaExceeded
            | io::ErrorKind::FileTooLarge => Self::NoRoom { file, source },
            _ => Self::Io { file, action, source },
        }
    }

    /// The file that the error is about, where there is one.
    pub fn file(&self) -> Option<&str> {
        match self {
            Self::Io { file, .. }
            | Self::NoRoom { file, .. }
            | Self::Length { file, .. }
            | Self::Digest { file, .. }
            | Self::Field { file, .. }
            | Self::Chunk { file, .. } => Some(file),
            Self::Name { name } => Some(name),
            Self::MissingSection { .. } | Self::UnknownSections { .. } => Some("state"),
            Self::Format { .. } | Self::Unlisted { .. } => Some("manifest"),
            Self::Exists { .. }
            | Self::NotASnapshot { .. }
            | Self::Foreign { .. }
            | Self::MissingParent { .. }
            | Self::ChainTooLong { .. }
            | Self::Cancelled
            | Self::Persist(_) => None,
        }
    }

    /// The error with the whole path of its file, which lies in the snapshot at `dir`, an absolute path.
    pub(crate) fn within(mut self, dir: &Path) -> Self {
        if let Self::Io { file, .. }
        | Self::NoRoom { file, .. }
        | Self::Length { file, .. }
        | Self::Digest { file, .. }
        | Self::Field { file, .. }
        | Self::Chunk { file, .. } = &mut self
        {
            // A path that is absolute already stays as it is.
            *file = dir.join(&*file).display().to_string();
        }
        self
    }

    pub(crate) fn field(
        file: impl Into<String>,
        field: impl Into<String>,
        why: impl Into<String>,
    ) -> Self {
        Self::Field { file: file.into(), field: field.into(), why: why.into() }
    }
}

struct Looked<'a>(&'a [String]);

impl fmt::Display for Looked<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|place| write!(f, "; {place}"))
    }
}
