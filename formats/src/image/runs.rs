//! The digests of chunks, run by run.

use std::ops::Range;

use super::Index;
use crate::digest::Digest;

/// blake3 of every chunk of an image. What it takes in memory follows the number of runs of equal chunks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DigestRuns {
    chunks: u64,
    /// The first chunk of each run. An image has at most 2^30 chunks.
    starts: Vec<u32>,
    digests: Vec<Digest>,
}

impl DigestRuns {
    /// Those of all chunks of `index`.
    pub fn of(index: &Index) -> Self {
        let mut runs = Self::default();
        index.digest_runs().for_each(|(chunks, digest)| runs.push(chunks, digest));
        runs
    }

    /// Number of runs.
    pub fn len(&self) -> usize {
        self.starts.len()
    }

    /// Whether there is no chunk.
    pub fn is_empty(&self) -> bool {
        self.starts.is_empty()
    }

    /// The digest of `chunk`, and how many chunks from there on have the same; `None` if there is no such chunk.
    pub fn get(&self, chunk: u64) -> Option<(Digest, u64)> {
        if chunk >= self.chunks {
            return None;
        }
        let run = match self.starts.len() as u64 == self.chunks {
            true => chunk as usize,
            // The first run begins at 0.
            false => self.starts.partition_point(|start| u64::from(*start) <= chunk) - 1,
        };
        let end = self.starts.get(run + 1).map_or(self.chunks, |next| u64::from(*next));
        Some((self.digests[run], end - chunk))
    }

    /// The next chunks, which all have that digest.
    pub(super) fn push(&mut self, chunks: Range<u64>, digest: Digest) {
        debug_assert_eq!(chunks.start, self.chunks, "chunks come in order");
        if chunks.is_empty() {
            return;
        }
        if self.digests.last() != Some(&digest) {
            self.starts.push(self.chunks as u32);
            self.digests.push(digest);
        }
        self.chunks = chunks.end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_chunk_has_the_digest_of_its_run() {
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        let mut runs = DigestRuns::default();
        assert_eq!(runs.get(0), None);
        for (chunks, digest) in [(0..1, a), (1..1, b), (1..5, a), (5..6, b), (6..9, a)] {
            runs.push(chunks, digest);
        }
        assert_eq!(runs.len(), 3);
        let expected = [(a, 5), (a, 4), (a, 3), (a, 2), (a, 1), (b, 1), (a, 3), (a, 2), (a, 1)];
        for (chunk, expected) in (0..).zip(expected) {
            assert_eq!(runs.get(chunk), Some(expected));
        }
        assert_eq!(runs.get(9), None);
    }
}
