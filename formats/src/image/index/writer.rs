//! Runs into an index file.

use super::{
    super::{Layout, Scheme, digest::ImageHasher, zero_digest},
    Record, header,
};
use crate::{
    digest::Digest,
    error::FormatError,
    publish::{StagedFile, Staging},
};

/// Writes the index of an image, and puts the image digest together.
pub(crate) struct IndexWriter {
    file: StagedFile,
    layout: Layout,
    scheme: Scheme,
    zero: Digest,
    hasher: ImageHasher,
    /// The run that may go on.
    run: Option<(Record, u64)>,
}

impl IndexWriter {
    /// Begins the index called `name`.
    pub(crate) fn new(
        staging: &mut Staging,
        name: &str,
        layout: Layout,
    ) -> Result<Self, FormatError> {
        let (mut file, scheme) = (staging.create(name)?, Scheme::WRITTEN);
        if scheme == Scheme::Runs {
            file.write(&header())?;
        }
        let (zero, hasher) = (zero_digest(layout.chunk_size), ImageHasher::new(scheme));
        Ok(Self { file, layout, scheme, zero, hasher, run: None })
    }

    /// The digest of a chunk of zeros.
    pub(crate) fn zero(&self) -> Digest {
        self.zero
    }

    /// The next `count` chunks, which have equal records.
    pub(crate) fn push(&mut self, record: Record, count: u64) -> Result<(), FormatError> {
        if count == 0 {
            return Ok(());
        }
        let digest = match record {
            Record::Zero => self.zero,
            Record::Data { digest, .. }
            | Record::Patch { digest, .. }
            | Record::Parent { digest }
            | Record::Raw { digest } => digest,
        };
        self.hasher.add(digest, count);
        match &mut self.run {
            Some((last, chunks)) if *last == record => *chunks += count,
            run => {
                let done = run.replace((record, count));
                self.write(done)?;
            }
        }
        Ok(())
    }

    /// Ends the index. Returns the image digest.
    pub(crate) fn finish(mut self, staging: &mut Staging) -> Result<Digest, FormatError> {
        let last = self.run.take();
        self.write(last)?;
        staging.finish(self.file)?;
        Ok(self.hasher.finish(self.layout))
    }

    fn write(&mut self, run: Option<(Record, u64)>) -> Result<(), FormatError> {
        let Some((record, count)) = run else { return Ok(()) };
        let (times, count) = match self.scheme {
            Scheme::Chunks => (count, 1),
            // A run of it is one chunk.
            Scheme::Runs if matches!(record, Record::Patch { .. }) => (count, 1),
            // An image has at most 2^30 chunks.
            Scheme::Runs => (1, count as u32),
        };
        let bytes = record.encode(self.scheme, count, self.zero);
        (0..times).try_for_each(|_| self.file.write(&bytes))
    }
}
