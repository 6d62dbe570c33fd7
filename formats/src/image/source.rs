//! Raw files as sources of images.

use std::{fs::File, io, os::unix::fs::FileExt};

use rustix::{fs::SeekFrom, io::Errno};

use super::{Content, Source};

/// A raw file or block device. Holes are found and not read. The file's offset is moved, so the
/// descriptor must not be shared with a user of the offset.
#[derive(Debug)]
pub struct FileSource {
    file: File,
    size: u64,
}

impl FileSource {
    /// Over all of `file`, which must keep its size.
    pub fn new(file: File) -> io::Result<Self> {
        let kind = file.metadata()?.file_type();
        if kind.is_dir() {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        // A block device's size is where its end is; its metadata say 0.
        let size = io::Seek::seek(&mut &file, io::SeekFrom::End(0))?;
        Ok(Self { file, size })
    }
}

impl Source for FileSource {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<Content> {
        if is_hole(&self.file, offset, into.len() as u64) {
            return Ok(Content::Zero);
        }
        self.file.read_exact_at(into, offset)?;
        Ok(Content::Data)
    }
}

/// Whether the file system says that there is nothing but a hole in the range.
fn is_hole(file: &File, offset: u64, len: u64) -> bool {
    match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Ok(data) => data >= offset + len,
        Err(Errno::NXIO) => true,
        // The file system does not know; reading tells.
        Err(_) => false,
    }
}
