//! Disks as images of the snapshot, back into files, or checked where they are.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use squib_formats::{
    digest::Digest,
    error::FormatError,
    image::{Control, FileSource, ImageReader, Loaded, Sink, Source, digest_source},
    manifest::DiskRecord,
};

/// What a restore does with a disk that lies outside the snapshot and has changed since.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum ChangedDisks {
    /// It refuses: the guest's file system would be damaged.
    #[default]
    Refuse,
    /// It goes on.
    Accept,
}

/// Why a disk outside the snapshot cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// It cannot be opened or read.
    #[error("disk `{id}`: {}: cannot {action}: {source}", path.display())]
    Io {
        /// The disk's id.
        id: String,
        /// Where it should be.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the operating system said.
        source: io::Error,
    },
    /// It has another size than it had.
    #[error("disk `{id}`: {} has {found} bytes, it had {expected} in the snapshot", path.display())]
    Size {
        /// The disk's id.
        id: String,
        /// Where it is.
        path: PathBuf,
        /// Its size in the snapshot, in bytes.
        expected: u64,
        /// Its size now, in bytes.
        found: u64,
    },
    /// Its bytes are not what they were.
    #[error(
        "disk `{id}`: {} has changed since the snapshot: digest {found}, expected {expected}",
        path.display()
    )]
    Changed {
        /// The disk's id.
        id: String,
        /// Where it is.
        path: PathBuf,
        /// Image digest in the snapshot.
        expected: Digest,
        /// Image digest now.
        found: Digest,
    },
    /// Its path cannot be written into the manifest.
    #[error("disk `{id}`: the path {} is not UTF-8 and cannot be recorded", path.display())]
    Path {
        /// The disk's id.
        id: String,
        /// Where it is.
        path: PathBuf,
    },
}

/// Opens a disk that lies at `path` as a source.
pub(crate) fn open_source(id: &str, path: &Path) -> Result<FileSource, DiskError> {
    let failed = |action| {
        let (id, path) = (id.to_owned(), path.to_owned());
        move |source| DiskError::Io { id, path, action, source }
    };
    // A FIFO would keep the open waiting for its other end.
    let kind = fs::metadata(path).map_err(failed("open"))?.file_type();
    if std::os::unix::fs::FileTypeExt::is_fifo(&kind) {
        return Err(failed("open")(io::Error::other("it is a FIFO")));
    }
    let file = File::open(path).map_err(failed("open"))?;
    FileSource::new(file).map_err(failed("read"))
}

/// The disk that a machine holds open as `file`, as a source; `path` stands in errors.
pub(crate) fn source_of(
    id: &str,
    path: &Path,
    file: Option<&File>,
) -> Result<FileSource, DiskError> {
    let file = file.map_or(Err(io::ErrorKind::NotFound.into()), File::try_clone);
    file.and_then(FileSource::new).map_err(|source| DiskError::Io {
        id: id.to_owned(),
        path: path.to_owned(),
        action: "read",
        source,
    })
}

/// Checks that the disk at `path` is still what `record` says.
pub(crate) fn check(
    record: &DiskRecord,
    path: &Path,
    changed: ChangedDisks,
    control: Control<'_>,
) -> Result<(), CheckError> {
    let source = open_source(&record.id, path)?;
    let (id, path) = (record.id.clone(), path.to_owned());
    if source.size() != record.size {
        let (expected, found) = (record.size, source.size());
        return Err(DiskError::Size { id, path, expected, found }.into());
    }
    let found = digest_source(&path.display().to_string(), &source, control)?.digest;
    if found == record.digest {
        return Ok(());
    }
    let error = DiskError::Changed { id, path, expected: record.digest, found };
    match changed {
        ChangedDisks::Refuse => Err(error.into()),
        ChangedDisks::Accept => {
            tracing::warn!("{error}; going on, as asked for");
            Ok(())
        }
    }
}

/// Why [`check`] fails.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CheckError {
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Format(#[from] FormatError),
}

/// Disks made from the snapshot; removed again unless they are kept.
#[derive(Debug, Default)]
pub(crate) struct Made {
    paths: Vec<PathBuf>,
}

impl Made {
    /// Writes `image` into a new private file at `path`. Zero chunks become holes.
    pub(crate) fn make(
        &mut self,
        id: &str,
        image: &ImageReader,
        path: &Path,
        control: Control<'_>,
    ) -> Result<Loaded, CheckError> {
        let failed = |action| {
            let (id, path) = (id.to_owned(), path.to_owned());
            move |source| DiskError::Io { id, path, action, source }
        };
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
        let file = file.map_err(failed("create"))?;
        self.paths.push(path.to_owned());
        file.set_len(image.record().size).map_err(failed("set the size"))?;
        Ok(image.load(&FileSink { file, path }, control)?)
    }

    /// Leaves the disks where they are.
    pub(crate) fn keep(mut self) {
        self.paths.clear();
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        for path in &self.paths {
            if let Err(error) = fs::remove_file(path) {
                tracing::warn!("{}: cannot remove: {error}", path.display());
            }
        }
    }
}

/// A new file, nothing but one hole.
struct FileSink<'a> {
    file: File,
    path: &'a Path,
}

impl Sink for FileSink<'_> {
    fn is_zero(&self, _: u64, _: usize) -> bool {
        true
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let written = self.file.write_all_at(bytes, offset);
        let named = |error: io::Error| {
            io::Error::new(error.kind(), format!("{}: {error}", self.path.display()))
        };
        written.map_err(named)
    }
}
