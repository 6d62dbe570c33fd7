//! Which chunks a worker takes at once, and which nobody needs to look at.

use std::ops::Range;

use super::{ImageReader, Index, Layout, Source};
use crate::error::FormatError;

/// Most pieces of a batch that do not lie behind each other.
const MAX_PIECES: usize = 64;

/// What a worker takes at once: all chunks of `span`, of which those that are not in `data` are zero.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Batch {
    pub(super) span: Range<u64>,
    /// In ascending order, none empty, and none begins where the one before ends.
    data: Vec<Range<u64>>,
}

/// A part of a batch.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Piece {
    /// Chunks that are zero.
    Zeros(Range<u64>),
    /// A chunk to look at.
    Chunk(u64),
}

impl Batch {
    /// The chunks to look at, in ascending order.
    pub(super) fn chunks(&self) -> impl Iterator<Item = u64> + '_ {
        self.data.iter().flat_map(Range::clone)
    }

    /// All of the span in order.
    pub(super) fn pieces(&self) -> impl Iterator<Item = Piece> + '_ {
        let ends = std::iter::once(self.span.start).chain(self.data.iter().map(|data| data.end));
        let starts = self.data.iter().map(|data| data.start).chain([self.span.end]);
        let chunks = self.data.iter().cloned().chain(std::iter::once(0..0));
        ends.zip(starts).zip(chunks).flat_map(|((end, start), chunks)| {
            let zeros = (end < start).then_some(Piece::Zeros(end..start));
            zeros.into_iter().chain(chunks.map(Piece::Chunk))
        })
    }
}

/// Finds the first chunks at or behind one that may not be zero; `None` if there are none.
type Find<'a> = Box<dyn FnMut(u64) -> Result<Option<Range<u64>>, FormatError> + Send + 'a>;

/// The batches of an image in order. There are as many as there is data.
pub(super) struct Plan<'a> {
    layout: Layout,
    next: u64,
    /// The chunks found last.
    found: Range<u64>,
    find: Find<'a>,
}

impl<'a> Plan<'a> {
    fn new(
        layout: Layout,
        find: impl FnMut(u64) -> Result<Option<Range<u64>>, FormatError> + Send + 'a,
    ) -> Self {
        Self { layout, next: 0, found: 0..0, find: Box::new(find) }
    }

    /// Every chunk is to be looked at.
    pub(super) fn all(layout: Layout) -> Self {
        Self::new(layout, move |chunk| Ok(Some(chunk..layout.chunks())))
    }

    /// What `source` does not know to be zero. `name` stands in errors.
    pub(super) fn of_source(layout: Layout, source: &'a dyn Source, name: &'a str) -> Self {
        let chunk_size = u64::from(layout.chunk_size);
        Self::new(layout, move |chunk| {
            let data = source.data(layout.offset(chunk));
            let data = data.map_err(|error| FormatError::io(name, "look for holes in", error))?;
            Ok(data.map(|data| data.start / chunk_size..data.end.div_ceil(chunk_size)))
        })
    }

    /// What `index` does not say to be zero.
    pub(super) fn of_index(index: &'a Index) -> Self {
        Self::new(index.layout(), |chunk| Ok(index.next_data(chunk)))
    }

    /// What has to be looked at so that all of `image` is known to be right: of chunks in a row that share
    /// their bytes the first, and the last of all, which may be shorter.
    pub(super) fn to_verify(image: &'a ImageReader) -> Self {
        let (layout, mut known) = (image.index().layout(), 0);
        let last = layout.chunks().saturating_sub(1);
        Self::new(layout, move |chunk| {
            let Some(data) = image.index().next_data(chunk.max(known.min(last))) else {
                return Ok(None);
            };
            known = image.same_until(data.start);
            Ok(Some(data.start..data.start + 1))
        })
    }

    /// The next batch; `None` behind the last.
    pub(super) fn next(&mut self) -> Result<Option<Batch>, FormatError> {
        let (start, chunks) = (self.next, self.layout.chunks());
        let (mut data, mut left) = (Vec::<Range<u64>>::new(), self.layout.batch_len());
        while self.next < chunks && left > 0 {
            if self.found.end <= self.next {
                let Some(found) = (self.find)(self.next)? else {
                    self.next = chunks;
                    break;
                };
                // What a source says that does not know its own end leaves no chunk out.
                let from = found.start.clamp(self.next, chunks - 1);
                self.found = from..found.end.clamp(from + 1, chunks);
            }
            let from = self.found.start.max(self.next);
            let piece = from..self.found.end.min(from + left);
            let full = data.len() == MAX_PIECES;
            match data.last_mut() {
                Some(last) if last.end == piece.start => last.end = piece.end,
                _ if full => break,
                _ => data.push(piece.clone()),
            }
            left -= piece.end - piece.start;
            self.next = piece.end;
        }
        Ok((start < self.next).then_some(Batch { span: start..self.next, data }))
    }
}

#[cfg(test)]
mod tests {
    use std::{io, sync::Mutex};

    use super::{
        super::{Content, MIN_CHUNK_SIZE},
        *,
    };

    /// Has something at these ranges of bytes, and counts how often it is asked.
    struct Ranges(u64, Vec<Range<u64>>, Mutex<u64>);

    impl Source for Ranges {
        fn size(&self) -> u64 {
            self.0
        }

        fn read(&self, _: u64, _: &mut [u8]) -> io::Result<Content> {
            unreachable!("a plan does not read")
        }

        fn data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
            *self.2.lock().unwrap() += 1;
            let found = self.1.iter().find(|range| range.end > offset);
            Ok(found.map(|range| range.start.max(offset)..range.end))
        }
    }

    const CHUNK: u64 = MIN_CHUNK_SIZE as u64;

    fn one(range: Range<u64>) -> Vec<Range<u64>> {
        std::iter::once(range).collect()
    }

    fn plan(size: u64, ranges: &[Range<u64>]) -> (Vec<Batch>, u64) {
        let source = Ranges(size, ranges.to_vec(), Mutex::new(0));
        let layout = Layout { size, chunk_size: MIN_CHUNK_SIZE };
        let mut plan = Plan::of_source(layout, &source, "disk");
        let batches: Vec<_> = std::iter::from_fn(|| plan.next().unwrap()).collect();
        drop(plan);
        let asked = *source.2.lock().unwrap();
        (batches, asked)
    }

    #[test]
    fn a_hole_of_a_tebibyte_is_one_piece() {
        let size = 1 << 40;
        let (batches, asked) = plan(size, &one(size / 2 + 5..size / 2 + 6));
        assert_eq!((batches.len(), asked), (1, 2));
        let chunks = size / CHUNK;
        let pieces: Vec<_> = batches[0].pieces().collect();
        let half = chunks / 2;
        assert_eq!(
            pieces,
            [Piece::Zeros(0..half), Piece::Chunk(half), Piece::Zeros(half + 1..chunks)]
        );
    }

    #[test]
    fn every_chunk_with_a_byte_of_data_is_looked_at_and_no_chunk_is_left_out() {
        let all = |size: u64| one(0..size);
        let odd =
            |step: u64| (0..5 << 20).step_by(step as usize).map(|at| at + 3..at + 4).collect();
        for (size, ranges) in [
            (0, vec![]),
            (1, vec![]),
            (1, all(1)),
            (3 << 20, all(3 << 20)),
            ((3 << 20) + 7, all((3 << 20) + 7)),
            (5 << 20, odd(CHUNK)),
            (5 << 20, odd(2 * CHUNK)),
            (5 << 20, odd(100_001)),
            ((5 << 20) + 1, one(5 << 20..(5 << 20) + 1)),
            (5 * CHUNK, vec![CHUNK - 1..CHUNK + 1, 4 * CHUNK..4 * CHUNK + 1]),
        ] {
            let (batches, _) = plan(size, &ranges);
            let chunks = size.div_ceil(CHUNK);
            let mut next = 0;
            for batch in &batches {
                assert_eq!(batch.span.start, next, "{size} {ranges:?}");
                for piece in batch.pieces() {
                    let (range, is_data) = match piece {
                        Piece::Zeros(range) => (range, false),
                        Piece::Chunk(chunk) => (chunk..chunk + 1, true),
                    };
                    assert_eq!(range.start, next);
                    next = range.end;
                    let bytes = range.start * CHUNK..range.end * CHUNK;
                    let has = ranges.iter().any(|r| r.start < bytes.end && bytes.start < r.end);
                    assert_eq!(has, is_data, "{size} {range:?}");
                }
                assert_eq!(batch.span.end, next);
                assert!(batch.chunks().count() as u64 <= (1 << 20) / CHUNK);
            }
            assert_eq!(next, chunks, "{size} {ranges:?}");
        }
    }
}
