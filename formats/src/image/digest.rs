//! The image digest of raw bytes that are not in a snapshot.

use std::{fs::File, io::Read, ops::Range, os::unix::fs::FileTypeExt, path::Path};

use super::{
    CHUNK_SIZE, Content, Control, DigestRuns, FileSource, Layout, Scheme, Source, is_zero,
    pipeline::run_in_order,
    plan::{Batch, Piece, Plan},
    zero_digest,
};
use crate::{digest::Digest, error::FormatError};

/// The digest of a raw image, with what it was made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageDigest {
    /// The image digest.
    pub digest: Digest,
    /// Size of the raw image in bytes.
    pub size: u64,
    /// Bytes in chunks that are all zeros.
    pub zero: u64,
}

/// The image digest of the raw file or block device at `path`, on all cores; holes are not read. What
/// has no size, such as a pipe, is read to its end on one.
pub fn digest_file(path: &Path, control: Control<'_>) -> Result<ImageDigest, FormatError> {
    let name = path.display().to_string();
    let mut file = File::open(path).map_err(|error| FormatError::io(&name, "open", error))?;
    let kind = file.metadata().map_err(|error| FormatError::io(&name, "read", error))?.file_type();
    if kind.is_fifo() || kind.is_char_device() || kind.is_socket() {
        return digest_reader(&name, &mut file);
    }
    let source = FileSource::new(file).map_err(|error| FormatError::io(&name, "read", error))?;
    digest_source(&name, &source, control)
}

/// The image digest of what `source` holds, on all cores. Chunks whose digest the source knows are not
/// read. `name` stands in errors.
pub fn digest_source(
    name: &str,
    source: &dyn Source,
    control: Control<'_>,
) -> Result<ImageDigest, FormatError> {
    digest_chunks(name, source, CHUNK_SIZE, Scheme::WRITTEN, control)
}

/// [`digest_source`] in chunks of `chunk_size` bytes, which is a [chunk size](super::is_chunk_size), as snapshots
/// of that scheme have it.
pub fn digest_chunks(
    name: &str,
    source: &dyn Source,
    chunk_size: u32,
    scheme: Scheme,
    control: Control<'_>,
) -> Result<ImageDigest, FormatError> {
    digest_with(name, source, chunk_size, scheme, control, |_, _| ())
}

/// [`digest_chunks`], and the digests of the chunks if there are at most `limit` runs of them.
pub fn digest_and_keep(
    name: &str,
    source: &dyn Source,
    chunk_size: u32,
    scheme: Scheme,
    limit: usize,
    control: Control<'_>,
) -> Result<(ImageDigest, Option<DigestRuns>), FormatError> {
    let mut kept = Some(DigestRuns::default());
    let image = digest_with(name, source, chunk_size, scheme, control, |chunks, digest| {
        if let Some(runs) = &mut kept {
            runs.push(chunks, digest);
        }
        kept.take_if(|runs| runs.len() > limit);
    })?;
    Ok((image, kept))
}

fn digest_with(
    name: &str,
    source: &dyn Source,
    chunk_size: u32,
    scheme: Scheme,
    control: Control<'_>,
    mut found: impl FnMut(Range<u64>, Digest),
) -> Result<ImageDigest, FormatError> {
    let layout = Layout { size: source.size(), chunk_size };
    layout.check(name)?;
    let mut hasher = ImageHasher::new(scheme);
    let mut zero = 0;
    digest_in_order(name, source, layout, control, |chunks, digest, is_zero| {
        if is_zero {
            zero += layout.bytes(&chunks);
        }
        hasher.add(digest, chunks.end - chunks.start);
        found(chunks, digest);
        Ok(())
    })?;
    Ok(ImageDigest { digest: hasher.finish(layout), size: layout.size, zero })
}

/// Hands all chunks of `source` to `take` in order: those in a row that have equal digests, the digest, and
/// whether they are zeros.
pub(super) fn digest_in_order(
    name: &str,
    source: &dyn Source,
    layout: Layout,
    control: Control<'_>,
    mut take: impl FnMut(Range<u64>, Digest, bool) -> Result<(), FormatError>,
) -> Result<(), FormatError> {
    let zero = zero_digest(layout.chunk_size);
    let new_worker = || Ok(vec![0; layout.chunk_size as usize]);
    let digest = |buffer: &mut Vec<u8>, chunk| {
        if let Some(known) = layout.known_digest(source, chunk) {
            return Ok(known);
        }
        Ok(match read_chunk(name, source, layout, chunk, buffer)? {
            Content::Zero => zero,
            Content::Data => Digest::of(buffer),
        })
    };
    let work = |buffer: &mut Vec<u8>, batch: &Batch| {
        batch.chunks().map(|chunk| digest(buffer, chunk)).collect()
    };
    let plan = Plan::of_source(layout, source, name);
    run_in_order(layout, plan, control, new_worker, work, |batch, digests: Vec<Digest>| {
        let mut digests = digests.into_iter();
        for piece in batch.pieces() {
            match piece {
                Piece::Zeros(chunks) => take(chunks, zero, true)?,
                Piece::Chunk(chunk) => {
                    // There are as many as chunks.
                    let digest = digests.next().unwrap_or(zero);
                    take(chunk..chunk + 1, digest, digest == zero)?;
                }
            }
        }
        Ok(0)
    })
}

/// The image digest of everything that `reader` yields, in one pass. `name` stands in errors.
pub fn digest_reader(name: &str, reader: &mut impl Read) -> Result<ImageDigest, FormatError> {
    let mut hasher = ImageHasher::new(Scheme::WRITTEN);
    let mut buffer = Vec::with_capacity(CHUNK_SIZE as usize);
    let (mut size, mut zero) = (0, 0);
    loop {
        buffer.clear();
        let mut part = (&mut *reader).take(CHUNK_SIZE.into());
        let len = part.read_to_end(&mut buffer).map_err(|e| FormatError::io(name, "read", e))?;
        if len == 0 {
            break;
        }
        size += len as u64;
        if is_zero(&buffer) {
            zero += len as u64;
        }
        buffer.resize(CHUNK_SIZE as usize, 0);
        hasher.add(Digest::of(&buffer), 1);
    }
    Ok(ImageDigest { digest: hasher.finish(Layout { size, chunk_size: CHUNK_SIZE }), size, zero })
}

/// Reads the whole of `chunk` into `buffer`, continued with zeros behind the end of the image, and
/// finds out whether it is zero. `buffer` holds the bytes only if it is not.
pub(super) fn read_chunk(
    name: &str,
    source: &dyn Source,
    layout: Layout,
    chunk: u64,
    buffer: &mut [u8],
) -> Result<Content, FormatError> {
    let (bytes, behind) = buffer.split_at_mut(layout.len(chunk));
    behind.fill(0);
    let read = source.read(layout.offset(chunk), bytes);
    match read.map_err(|error| FormatError::io(name, "read", error))? {
        Content::Data if is_zero(bytes) => Ok(Content::Zero),
        content => Ok(content),
    }
}

/// Puts an image digest together from the digests of its chunks.
pub(super) struct ImageHasher {
    scheme: Scheme,
    hasher: blake3::Hasher,
    /// Chunks in a row with one digest, which may go on.
    run: Option<(Digest, u64)>,
}

/// How many digests are hashed at once where many chunks have the same.
const REPEAT: usize = 2048;

impl ImageHasher {
    pub(super) fn new(scheme: Scheme) -> Self {
        Self { scheme, hasher: blake3::Hasher::new(), run: None }
    }

    /// The next `count` chunks, all of that digest.
    pub(super) fn add(&mut self, digest: Digest, count: u64) {
        match &mut self.run {
            _ if count == 0 => {}
            Some((last, chunks)) if *last == digest => *chunks += count,
            _ => {
                self.flush();
                self.run = Some((digest, count));
            }
        }
    }

    /// The image digest. Sizes stand behind the chunks, so that a pipe can be digested in one pass.
    pub(super) fn finish(&mut self, layout: Layout) -> Digest {
        self.flush();
        self.hasher.update(&layout.size.to_le_bytes());
        self.hasher.update(&u64::from(layout.chunk_size).to_le_bytes());
        self.hasher.finalize().into()
    }

    fn flush(&mut self) {
        let Some((digest, count)) = self.run.take() else { return };
        if self.scheme == Scheme::Runs {
            self.hasher.update(&count.to_le_bytes()).update(&digest.0);
            return;
        }
        let mut left = count;
        if left >= REPEAT as u64 {
            let block = digest.0.repeat(REPEAT);
            while left >= REPEAT as u64 {
                self.hasher.update(&block);
                left -= REPEAT as u64;
            }
        }
        for _ in 0..left {
            self.hasher.update(&digest.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, SeekFrom, Write};

    use super::*;
    use crate::image::tests::Bytes;

    #[test]
    fn file_reader_and_memory_have_one_digest() {
        for size in [0, 1, 65535, 65536, 65537, 3 << 20] {
            let mut bytes = vec![0; size];
            for (at, byte) in bytes.iter_mut().enumerate().skip(200_000) {
                *byte = (at * 7 + at / 251) as u8;
            }
            if size == 1 {
                bytes[0] = 1;
            }
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(&bytes).unwrap();
            let of_file = digest_file(file.path(), Control::default()).unwrap();
            let of_reader = digest_reader("pipe", &mut &bytes[..]).unwrap();
            let of_memory = digest_source("memory", &Bytes(bytes), Control::default()).unwrap();
            assert_eq!(of_file, of_reader);
            assert_eq!(of_file, of_memory);
            assert_eq!(of_file.size, size as u64);
        }
    }

    #[test]
    fn holes_count_as_zeros() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(10 << 20).unwrap();
        file.seek(SeekFrom::Start(5 << 20)).unwrap();
        file.write_all(b"squib").unwrap();
        let found = digest_file(file.path(), Control::default()).unwrap();
        assert_eq!(found.zero, (10 << 20) - (64 << 10));
        let bytes = std::fs::read(file.path()).unwrap();
        assert_eq!(found, digest_reader("pipe", &mut &bytes[..]).unwrap());
    }

    #[test]
    fn size_and_every_byte_are_part_of_the_digest() {
        let digest = |bytes: &[u8]| digest_reader("pipe", &mut { bytes }).unwrap().digest;
        assert_ne!(digest(b""), digest(b"\0"));
        assert_ne!(digest(&[0; 70_000]), digest(&[0; 70_001]));
        assert_ne!(digest(&[1; 70_000]), digest(&[[1; 69_999].as_slice(), &[2]].concat()));
    }

    #[test]
    fn a_pipe_is_read_to_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pipe");
        let made = std::process::Command::new("mkfifo").arg(&path).status().unwrap();
        assert!(made.success());
        let writer = {
            let path = path.clone();
            std::thread::spawn(move || std::fs::write(path, [7; 100_000]).unwrap())
        };
        let found = digest_file(&path, Control::default()).unwrap();
        writer.join().unwrap();
        assert_eq!(found, digest_reader("bytes", &mut &[7; 100_000][..]).unwrap());
    }

    #[test]
    fn a_directory_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let error = digest_file(dir.path(), Control::default()).unwrap_err().to_string();
        assert!(error.contains("cannot read"), "{error}");
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let error = digest_file(Path::new("/no/such/disk"), Control::default()).unwrap_err();
        assert!(error.to_string().starts_with("/no/such/disk: cannot open"), "{error}");
    }
}
