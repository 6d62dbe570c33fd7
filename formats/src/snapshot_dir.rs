//! A snapshot's directory, opened for reading.

use std::{
    fs::File,
    io::Read,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{CWD, FileType, Mode, OFlags},
    io::Errno,
};

use crate::{
    digest::Digest,
    error::FormatError,
    header::{self, Header},
    manifest::{self, FileRecord, Manifest},
    names,
};

/// A snapshot whose header and manifest have been checked. Its other files are checked when they are
/// opened or read.
#[derive(Debug)]
pub struct Snapshot {
    path: PathBuf,
    dir: OwnedFd,
    header: Header,
    manifest: Manifest,
    id: Digest,
    pub(crate) parent: Option<Box<Snapshot>>,
}

impl Snapshot {
    /// Opens the directory at `path` and reads its manifest. The images of a difference cannot be opened in
    /// it: see [`open_chain`](Self::open_chain).
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let (dir, mut file) = open_manifest(path)?;
        let (header, bytes) = read_header(path, &mut file)?;
        header.check_readable()?;
        let io = |error| FormatError::io(manifest::FILE, "read", error);
        let length = file.metadata().map_err(io)?.len();
        if length != header::LEN as u64 + header.body_length {
            return Err(FormatError::Length {
                file: manifest::FILE.into(),
                what: "the file".into(),
                expected: header::LEN as u64 + header.body_length,
                found: length,
            });
        }
        let mut body = Vec::new();
        file.take(header.body_length).read_to_end(&mut body).map_err(io)?;
        header.check_body(&bytes, &body)?;
        if header.arch != header::ARCH_AARCH64 {
            let why = format!("{}, this build knows aarch64 only", header.arch_text());
            return Err(FormatError::field(manifest::FILE, "architecture", why));
        }
        let manifest = Manifest::decode(header.minor, &body)?;
        let id = header::snapshot_id(&bytes, &body);
        Ok(Self { path: path.to_owned(), dir, header, manifest, id, parent: None })
    }

    /// Reads only the header of the snapshot at `path`, whatever its version.
    pub fn peek(path: &Path) -> Result<Header, FormatError> {
        let (_, mut file) = open_manifest(path)?;
        Ok(read_header(path, &mut file)?.0)
    }

    /// Where the snapshot lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The plain header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The checked manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The snapshot's id: blake3 of the whole manifest, which commits to every other byte.
    pub fn id(&self) -> Digest {
        self.id
    }

    /// The snapshot that this one is a difference to, if it was looked for.
    pub fn parent(&self) -> Option<&Snapshot> {
        self.parent.as_deref()
    }

    /// Opens a file that the manifest lists, and checks its length. Symbolic links are not followed.
    pub fn open_file(&self, name: &str) -> Result<(File, &FileRecord), FormatError> {
        let record = self.manifest.file(name)?;
        let file = open_at(&self.dir, name)?;
        let found = file.metadata().map_err(|e| FormatError::io(name, "read", e))?.len();
        match found == record.length {
            true => Ok((file, record)),
            false => Err(FormatError::Length {
                file: name.to_owned(),
                what: "the file".into(),
                expected: record.length,
                found,
            }),
        }
    }

    /// Opens a regular file that the manifest does not list. Symbolic links are not followed.
    pub(crate) fn open_unlisted(&self, name: &str) -> Result<File, FormatError> {
        open_at(&self.dir, name)
    }

    pub(crate) fn dir(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    /// Names in the directory of what is not the snapshot's, sorted: of what the manifest does not list, and of
    /// what is no regular file although its name is listed.
    pub fn unlisted(&self) -> Result<Vec<String>, FormatError> {
        let io = |error| FormatError::io(self.path.display().to_string(), "list", error);
        let mut names = Vec::new();
        let own: Vec<&str> = self.own_names().collect();
        for entry in std::fs::read_dir(&self.path).map_err(io)? {
            let entry = entry.map_err(io)?;
            let name = entry.file_name();
            let listed = name.to_str().is_some_and(|name| own.contains(&name));
            if !listed || !entry.file_type().is_ok_and(|kind| kind.is_file()) {
                names.push(name.to_string_lossy().into_owned());
            }
        }
        names.sort();
        Ok(names)
    }

    /// The names that the snapshot's files have, whether they are there or not.
    pub fn own_names(&self) -> impl Iterator<Item = &str> {
        let fixed = [manifest::FILE, manifest::WORKING_SET_FILE].into_iter();
        fixed.chain(self.manifest.files.iter().map(|file| &*file.name))
    }
}

impl FileRecord {
    /// Whether `found`, the digest of the whole file, is the one on record.
    pub fn check(&self, found: Digest) -> Result<(), FormatError> {
        match found == self.digest {
            true => Ok(()),
            false => Err(FormatError::Digest {
                file: self.name.clone(),
                what: "the file".into(),
                expected: self.digest,
                found,
            }),
        }
    }
}

fn open_manifest(path: &Path) -> Result<(OwnedFd, File), FormatError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = match rustix::fs::openat(CWD, path, flags, Mode::empty()) {
        Err(Errno::NOTDIR) => {
            let why = "it is not a directory".to_owned();
            return Err(FormatError::NotASnapshot { path: path.to_owned(), why });
        }
        dir => dir.map_err(|e| FormatError::io(path.display().to_string(), "open", e))?,
    };
    match open_at(&dir, manifest::FILE) {
        Err(FormatError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            let why = "it has no manifest".to_owned();
            Err(FormatError::NotASnapshot { path: path.to_owned(), why })
        }
        file => Ok((dir, file?)),
    }
}

fn read_header(path: &Path, file: &mut File) -> Result<(Header, [u8; header::LEN]), FormatError> {
    let mut bytes = [0; header::LEN];
    match file.read_exact(&mut bytes) {
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            let why = "its manifest is shorter than a header".to_owned();
            return Err(FormatError::NotASnapshot { path: path.to_owned(), why });
        }
        read => read.map_err(|error| FormatError::io(manifest::FILE, "read", error))?,
    }
    Ok((Header::decode(&bytes)?, bytes))
}

/// Opens a regular file of the directory for reading.
fn open_at(dir: &OwnedFd, name: &str) -> Result<File, FormatError> {
    names::check(name)?;
    // Without NONBLOCK a FIFO in the place of a file would make the open wait for a writer.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let not_regular = |what: &str| Err(FormatError::field(name, "file type", what));
    let file = match rustix::fs::openat(dir, name, flags, Mode::empty()) {
        Err(Errno::LOOP) => return not_regular("a symbolic link, which is not followed"),
        file => file.map_err(|error| FormatError::io(name, "open", error))?,
    };
    let stat = rustix::fs::fstat(&file).map_err(|error| FormatError::io(name, "read", error))?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Ok(File::from(file)),
        other => not_regular(&format!("{other:?} instead of a regular file")),
    }
}
