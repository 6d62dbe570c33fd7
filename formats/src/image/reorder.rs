//! An image written again with its frames in another order.

use std::{
    collections::{HashMap, hash_map::Entry},
    fs::File,
    sync::Mutex,
};

use super::{
    ChunkReader, Control, ImageOptions, ImageReader, ImageSource, Layout, Record, Scheme,
    WrittenImage,
    index::IndexWriter,
    pipeline::{lock, run_in_order},
    plan::{Batch, Plan},
    write_image, write_raw_image,
};
use crate::{error::FormatError, publish::Staging};

/// Writes `image` again into `staging`, its frames in the order of the chunks `first` and then of all others.
/// Every chunk is read and verified before its bytes are copied as they are; what is shared stays shared, and
/// zero, parent and patch records stay what they are. So image digest and size are those of `image`.
///
/// A number in `first` that is not one of a chunk is an error, one that is there twice is not.
///
/// An image with a raw file has no frames: the file is cloned if that can be done, else its bytes are stored as
/// frames in the order of the chunks.
pub fn reorder_image(
    staging: &mut Staging,
    image: &ImageReader,
    first: &[u32],
    control: Control<'_>,
) -> Result<WrittenImage, FormatError> {
    let record = image.record().clone();
    if let Some(file) = image.raw() {
        return write_raw_again(staging, image, file, control);
    }
    let plan = Order::new(image, first)?;
    let mut reader = image.chunks(0)?;
    plan.verify.iter().try_for_each(|chunk| reader.read(*chunk).map(|_| ()))?;
    let mut index = IndexWriter::new(staging, &record.index_file(), image.index().layout())?;
    let mut data = staging.create(&record.data_file())?;
    let mut offsets = HashMap::with_capacity(plan.order.len());
    let spare: Mutex<Vec<Copied>> = Mutex::default();
    let work = |reader: &mut ChunkReader, places: &Batch| {
        let places = &places.span;
        let mut copied = lock(&spare).pop().unwrap_or_default();
        copied.clear();
        let chunks = &plan.order[places.start as usize..places.end as usize];
        for (at, chunk) in chunks.iter().enumerate() {
            reader.read_ahead(&chunks[at..])?;
            reader.read(*chunk)?;
            copied.extend_from_slice(reader.stored(*chunk));
        }
        Ok(copied)
    };
    // The chunks to copy, seen as an image of their own.
    let chunk_size = record.chunk_size;
    let layout = Layout { size: plan.order.len() as u64 * u64::from(chunk_size), chunk_size };
    run_in_order(
        layout,
        Plan::all(layout),
        control,
        || image.chunks(0),
        work,
        |places, copied: Copied| {
            let (mut offset, places) = (data.length(), &places.span);
            for chunk in &plan.order[places.start as usize..places.end as usize] {
                if let Some(place) = image.index().record(*chunk).stored() {
                    offsets.entry(place).or_insert(offset);
                    offset += u64::from(place.1);
                }
            }
            data.write(&copied)?;
            lock(&spare).push(copied);
            Ok(data.length())
        },
    )?;
    let mut written = WrittenImage {
        record,
        zero: 0,
        duplicate: plan.duplicate,
        parent: 0,
        patched: 0,
        raw: 0,
        stored: data.length(),
    };
    for (chunks, old) in image.index().runs() {
        let raw = image.index().bytes(&chunks);
        // Every place that a record names has been copied.
        let moved = |offset: &u64, length: &u32| offsets.get(&(*offset, *length)).copied();
        let record = match old {
            Record::Zero => {
                written.zero += raw;
                *old
            }
            Record::Parent { .. } => {
                written.parent += raw;
                *old
            }
            // An image with such records has a raw file.
            Record::Raw { .. } => unreachable!("a raw image is written another way"),
            Record::Data { offset, length, digest } => Record::Data {
                offset: moved(offset, length).unwrap_or_default(),
                length: *length,
                digest: *digest,
            },
            Record::Patch { offset, length, digest } => {
                written.patched += raw;
                let offset = moved(offset, length).unwrap_or_default();
                Record::Patch { offset, length: *length, digest: *digest }
            }
        };
        index.push(record, chunks.end - chunks.start)?;
    }
    written.record.digest = index.finish(staging)?;
    debug_assert_eq!(image.index().image_digest(Scheme::WRITTEN), written.record.digest);
    staging.finish(data)?;
    Ok(written)
}

/// Writes an image that has the raw `file` again, every chunk verified.
fn write_raw_again(
    staging: &mut Staging,
    image: &ImageReader,
    file: &File,
    control: Control<'_>,
) -> Result<WrittenImage, FormatError> {
    let record = image.record();
    let options = ImageOptions { chunk_size: record.chunk_size, ..ImageOptions::default() };
    let Some(clone) = staging.clone_file(&record.raw_file(), file, record.size)? else {
        let source = ImageSource::new(image);
        return write_image(staging, &record.name, &source, options, control);
    };
    let written = write_raw_image(staging, &record.name, clone, &|_, _| None, options, control)?;
    let expected = image.index().image_digest(Scheme::WRITTEN);
    if written.record.digest != expected {
        // The index names the chunk.
        image.verify(control)?;
        return Err(FormatError::Digest {
            file: record.raw_file(),
            what: "the image as cloned".into(),
            expected,
            found: written.record.digest,
        });
    }
    Ok(written)
}

/// Frames and patches one behind the other.
type Copied = Vec<u8>;

/// Which chunks are read, in which order.
struct Order {
    /// Chunks whose bytes are copied.
    order: Vec<u64>,
    /// Chunks that share those bytes and must be verified all the same.
    verify: Vec<u64>,
    /// Raw bytes of all chunks that share the bytes of another.
    duplicate: u64,
}

impl Order {
    fn new(image: &ImageReader, first: &[u32]) -> Result<Self, FormatError> {
        let (index, layout) = (image.index(), image.index().layout());
        let mut plan = Self { order: Vec::new(), verify: Vec::new(), duplicate: 0 };
        // What is copied, for which record and chunk.
        let mut copied = HashMap::new();
        for chunk in first.iter().copied().map(u64::from) {
            if chunk >= layout.chunks() {
                let why = format!("chunk {chunk}, the image has {}", layout.chunks());
                return Err(FormatError::field(&image.record().name, "order of chunks", why));
            }
            let record = index.record(chunk);
            if let Some(place) = record.stored()
                && let Entry::Vacant(none) = copied.entry(place)
            {
                none.insert((record, chunk));
                plan.order.push(chunk);
            }
        }
        let (mut stored, last) = (0, layout.chunks().saturating_sub(1));
        for (chunks, record) in index.runs() {
            let Some(place) = record.stored() else { continue };
            stored += layout.bytes(&chunks);
            let (same, chunk) = *copied.entry(place).or_insert_with(|| {
                plan.order.push(chunks.start);
                (*record, chunks.start)
            });
            // Equal records of whole chunks are right together; a patch depends on the chunk below.
            let is_patch = matches!(record, Record::Patch { .. });
            if same != *record || is_patch && chunk != chunks.start {
                plan.verify.push(chunks.start);
            }
            if chunks.contains(&last) && chunk != last && plan.verify.last() != Some(&last) {
                plan.verify.push(last);
            }
        }
        let copied = plan.order.iter().map(|chunk| layout.len(*chunk) as u64).sum::<u64>();
        plan.duplicate = stored - copied;
        Ok(plan)
    }
}
