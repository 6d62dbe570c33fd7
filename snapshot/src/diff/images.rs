//! Two images of the same name, chunk by chunk and page by page.

use std::ops::Range;

use serde::Serialize;
use squib_devices::map::SYSTEM_AREA_SIZE;
use squib_formats::{
    error::FormatError,
    image::{ChunkReader, Control, Index, PAGE_SIZE, zero_digest},
    manifest::MEMORY_IMAGE,
};
use squib_vmm::boot::FDT_AREA;

use super::Image;

/// Bytes of an area that has no name of its own.
const AREA: u64 = 16 << 20;

/// How an image differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ImageDifference {
    /// "memory" or "disk-ID".
    pub name: String,
    /// Size of the raw image in bytes in the first snapshot; `None` if it is not there.
    pub a_size: Option<u64>,
    /// Size of the raw image in bytes in the second snapshot; `None` if it is not there.
    pub b_size: Option<u64>,
    /// Bytes of a chunk; `None` if the two do not have the same, and then all of the image differs.
    pub chunk_size: Option<u32>,
    /// Chunks of the larger one.
    pub chunks: u64,
    /// Chunks that differ; all if the chunk sizes are not the same.
    pub changed_chunks: u64,
    /// Chunks that differ and are zero in the second.
    pub zeroed_chunks: u64,
    /// Pages of 4096 bytes that differ; `None` where only chunks can be compared, since the bytes of one of
    /// the two are not at hand.
    pub changed_pages: Option<u64>,
    /// Raw bytes in the pages that differ, or in the chunks that do.
    pub changed_bytes: u64,
    /// The same by area, the largest change first. Areas without a change are left out.
    pub areas: Vec<Area>,
    /// Where the chunks that differ are, in ascending order.
    pub regions: Vec<Region>,
}

/// A part of an image, and what changed in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Area {
    /// What lies there: in memory "system area", "RAM" or "device tree at boot"; in a disk "disk".
    pub name: &'static str,
    /// Offset in the raw image, in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
    /// Chunks that differ.
    pub changed_chunks: u64,
    /// Pages that differ, where they can be told.
    pub changed_pages: Option<u64>,
    /// Bytes in the pages that differ, or in the chunks.
    pub changed_bytes: u64,
}

/// Chunks in a row that differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Region {
    /// Offset in the raw image, in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
}

/// Compares `a` and `b`, of which at least one is there.
pub(super) fn compare(
    name: String,
    a: &Image,
    b: &Image,
    control: Control<'_>,
) -> Result<ImageDifference, FormatError> {
    let (before, now) = (a.index(), b.index());
    let chunk_size = match (before, now) {
        (Some(a), Some(b)) => (a.chunk_size() == b.chunk_size()).then_some(a.chunk_size()),
        (one, other) => one.or(other).map(Index::chunk_size),
    };
    let size = |index: Option<&Index>| index.map(Index::size);
    let count = |index: Option<&Index>| index.map_or(0, Index::chunks);
    let longest = size(before).max(size(now)).unwrap_or(0);
    let mut found = ImageDifference {
        name,
        a_size: size(before),
        b_size: size(now),
        chunk_size,
        chunks: count(before).max(count(now)),
        changed_chunks: 0,
        zeroed_chunks: 0,
        changed_pages: None,
        changed_bytes: 0,
        areas: Vec::new(),
        regions: Vec::new(),
    };
    let Some(chunk_size) = chunk_size else {
        found.changed_chunks = found.chunks;
        found.changed_bytes = longest;
        found.regions.push(Region { offset: 0, length: longest });
        return Ok(found);
    };
    let mut pages = Pages::open(a, b)?;
    found.changed_pages = pages.as_ref().map(|_| 0);
    let zero = zero_digest(chunk_size);
    // The digest of a chunk, and up to where it stays the same: for ever behind the last.
    let digest = |index: Option<&Index>, chunk: u64| match index.and_then(|i| i.digest_run(chunk)) {
        Some((digest, count)) => (Some(digest), chunk + count),
        None => (None, u64::MAX),
    };
    let (mut done, mut next) = (0, 0);
    while next < found.chunks {
        let ((was, until), (is, other)) = (digest(before, next), digest(now, next));
        let run = next..until.min(other).min(found.chunks);
        next = run.end;
        if was == is {
            continue;
        }
        // Chunks in a row that are equal in each image differ in the same way, but for the last of all, which
        // may be shorter. Each area has its own.
        let mut at = run.start;
        while at < run.end {
            control.check()?;
            let offset = at * u64::from(chunk_size);
            let place = area(&found.name, offset, longest);
            let behind = (place.offset + place.length).div_ceil(chunk_size.into());
            let mut end = behind.clamp(at + 1, run.end);
            if end == found.chunks && end - at > 1 {
                end -= 1;
            }
            let count = end - at;
            let length = (u64::from(chunk_size) * count).min(longest - offset);
            // A chunk that only one of the two images reaches differs whole.
            let changed = match (&mut pages, was.is_some() && is.is_some()) {
                (Some(pages), true) => {
                    let (pages, bytes) = pages.differ(at)?;
                    Some((pages * count, bytes * count))
                }
                (Some(_), false) => Some((length.div_ceil(PAGE_SIZE as u64), length)),
                (None, _) => None,
            };
            found.zeroed_chunks += count * u64::from(is == Some(zero));
            found.note(place, offset..offset + length, count, changed);
            at = end;
            done += length;
            control.progress.advanced(done, longest, 0);
        }
    }
    found.areas.sort_by(|a, b| b.changed_bytes.cmp(&a.changed_bytes).then(a.offset.cmp(&b.offset)));
    Ok(found)
}

impl ImageDifference {
    /// Takes note of `chunks` chunks in `place` that differ, which lie at `bytes`: all of it, or so many pages and
    /// their bytes.
    fn note(&mut self, place: Area, bytes: Range<u64>, chunks: u64, changed: Option<(u64, u64)>) {
        let (offset, length) = (bytes.start, bytes.end - bytes.start);
        let bytes = changed.map_or(length, |(_, bytes)| bytes);
        let add =
            |sum: &mut Option<u64>| *sum = sum.zip(changed).map(|(sum, (pages, _))| sum + pages);
        self.changed_chunks += chunks;
        self.changed_bytes += bytes;
        add(&mut self.changed_pages);
        match self.regions.last_mut() {
            Some(last) if last.offset + last.length == offset => last.length += length,
            _ => self.regions.push(Region { offset, length }),
        }
        if self.areas.last().is_none_or(|last| last.offset != place.offset) {
            self.areas.push(Area { changed_pages: self.changed_pages.map(|_| 0), ..place });
        }
        if let Some(last) = self.areas.last_mut() {
            last.changed_chunks += chunks;
            last.changed_bytes += bytes;
            add(&mut last.changed_pages);
        }
    }
}

/// The area of an image of `size` bytes that `offset` lies in, without a change.
fn area(image: &str, offset: u64, size: u64) -> Area {
    let (name, start, end) = match image == MEMORY_IMAGE {
        true if offset < SYSTEM_AREA_SIZE => ("system area", 0, SYSTEM_AREA_SIZE),
        true if offset >= size.saturating_sub(FDT_AREA) => {
            ("device tree at boot", size.saturating_sub(FDT_AREA), size)
        }
        true => {
            let start = (offset / AREA * AREA).max(SYSTEM_AREA_SIZE);
            let end = (offset / AREA + 1) * AREA;
            ("RAM", start, end.min(size.saturating_sub(FDT_AREA)))
        }
        false => ("disk", offset / AREA * AREA, ((offset / AREA + 1) * AREA).min(size)),
    };
    Area {
        name,
        offset: start,
        length: end.saturating_sub(start),
        changed_chunks: 0,
        changed_pages: None,
        changed_bytes: 0,
    }
}

/// Reads chunks of both images and compares their pages.
struct Pages {
    a: ChunkReader,
    b: ChunkReader,
}

impl Pages {
    /// `None` unless the chunks of both can be read.
    fn open(a: &Image, b: &Image) -> Result<Option<Self>, FormatError> {
        match (a, b) {
            (Image::Whole(a), Image::Whole(b)) => {
                Ok(Some(Self { a: a.chunks(0)?, b: b.chunks(0)? }))
            }
            _ => Ok(None),
        }
    }

    /// How many pages of the chunk differ, and the bytes of these pages.
    fn differ(&mut self, chunk: u64) -> Result<(u64, u64), FormatError> {
        let (a, b) = (self.a.read(chunk)?.unwrap_or(&[]), self.b.read(chunk)?.unwrap_or(&[]));
        let (mut pages, mut bytes) = (0, 0);
        for start in (0..a.len().max(b.len())).step_by(PAGE_SIZE) {
            let page = |chunk: &'_ [u8]| {
                let end = (start + PAGE_SIZE).min(chunk.len());
                chunk.get(start..end).unwrap_or(&[]).to_vec()
            };
            let (mut a, mut b) = (page(a), page(b));
            let length = a.len().max(b.len());
            // What is not stored is zero.
            a.resize(length, 0);
            b.resize(length, 0);
            if a != b {
                pages += 1;
                bytes += length as u64;
            }
        }
        Ok((pages, bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn areas_cover_an_image_without_gap_or_overlap() {
        for (image, size) in [("memory", 64 << 20), ("memory", 1 << 30), ("disk-a", (40 << 20) + 5)]
        {
            let mut at = 0;
            while at < size {
                let found = area(image, at, size);
                assert_eq!((found.offset, found.length > 0), (at, true), "{image} {at:#x}");
                assert_eq!(area(image, at + found.length - 1, size).offset, at);
                at += found.length;
            }
            assert_eq!(at, size);
        }
        assert_eq!(area("memory", 0x1000, 64 << 20).name, "system area");
        assert_eq!(area("memory", (64 << 20) - 1, 64 << 20).name, "device tree at boot");
    }
}
