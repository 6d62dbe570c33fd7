//! Raw files, and images that are there already, as sources of images.

use std::{
    fs::File,
    io,
    ops::Range,
    os::unix::fs::FileExt,
    sync::{Mutex, PoisonError},
};

use super::{ChunkReader, Content, ImageReader, Source};
use crate::storage::next_data;

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
        self.file.read_exact_at(into, offset)?;
        Ok(Content::Data)
    }

    fn data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        Ok(next_data(&self.file, offset, self.size))
    }
}

/// An image of a snapshot, with what it builds on. Every chunk is verified when it is read.
pub struct ImageSource<'a> {
    image: &'a ImageReader,
    /// Readers that no thread is using.
    idle: Mutex<Vec<ChunkReader>>,
}

impl<'a> ImageSource<'a> {
    /// Over all of `image`.
    pub fn new(image: &'a ImageReader) -> Self {
        Self { image, idle: Mutex::default() }
    }
}

impl Source for ImageSource<'_> {
    fn size(&self) -> u64 {
        self.image.record().size
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<Content> {
        let chunk_size = u64::from(self.image.record().chunk_size);
        let idle = || self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let free = idle().pop();
        let mut reader = match free {
            Some(reader) => reader,
            None => self.image.chunks(0).map_err(io::Error::other)?,
        };
        let mut done = 0;
        while done < into.len() {
            let at = offset + done as u64;
            let start = (at % chunk_size) as usize;
            let len = (chunk_size as usize - start).min(into.len() - done);
            let place = &mut into[done..done + len];
            match reader.read(at / chunk_size).map_err(io::Error::other)? {
                Some(bytes) => place.copy_from_slice(&bytes[start..start + len]),
                None => place.fill(0),
            }
            done += len;
        }
        idle().push(reader);
        Ok(Content::Data)
    }

    fn data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let chunk_size = u64::from(self.image.record().chunk_size);
        let found = self.image.index().next_data(offset / chunk_size);
        let bytes = |chunks: Range<u64>| {
            let end = (chunks.end * chunk_size).min(self.size());
            (chunks.start * chunk_size).max(offset)..end
        };
        Ok(found.map(bytes))
    }
}
