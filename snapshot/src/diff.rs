//! What differs between two snapshots, by region.

mod images;
mod machine;

use std::path::{Path, PathBuf};

use serde::Serialize;
use squib_formats::{
    digest::Digest,
    error::FormatError,
    image::{Control, ImageReader, Index},
    manifest::{Manifest, SectionRecord},
    persist::Section,
    sections::Sections,
    snapshot_dir::Snapshot,
};

pub use self::{
    images::{Area, ImageDifference, Region},
    machine::Change,
};

/// What [`diff`] finds. As JSON, digests are hexadecimal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// Id of the first snapshot.
    pub a: Digest,
    /// Id of the second snapshot.
    pub b: Digest,
    /// Wall time of the second capture less that of the first, in nanoseconds.
    pub apart_ns: i128,
    /// Whether the guest's state is the same: no image, no section and no disk outside differs.
    pub equal: bool,
    /// What is not the same of the machine's configuration and CPU.
    pub machine: Vec<Change>,
    /// Memory and captured disks of either.
    pub images: Vec<ImageDifference>,
    /// Sections that are not the same in both.
    pub sections: Vec<SectionDifference>,
}

/// A section that one of the two lacks or has otherwise.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SectionDifference {
    /// Kind of the state.
    pub kind: String,
    /// Which of several of that kind.
    pub instance: String,
    /// The payload in the first snapshot; `None` if it is not there.
    pub a: Option<Payload>,
    /// The payload in the second snapshot; `None` if it is not there.
    pub b: Option<Payload>,
    /// Bytes of the second payload that differ. What two payloads of different lengths have in common at
    /// their starts and at their ends is the same; all between is not.
    pub changed_bytes: u64,
}

/// Version and length of a section's payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Payload {
    /// Version of the payload.
    pub version: u16,
    /// Its length in bytes.
    pub length: u64,
}

/// Compares the snapshots at `a` and `b`, by their indexes. The chunks that differ are then read and compared
/// by page, unless one of the two builds on a snapshot that is not found; what they build on may be in
/// `parents`.
pub fn diff(
    a: &Path,
    b: &Path,
    parents: &[PathBuf],
    control: Control<'_>,
) -> Result<Difference, FormatError> {
    let (a, b) = (Side::open(a, parents)?, Side::open(b, parents)?);
    let (before, now) = (a.snapshot.manifest(), b.snapshot.manifest());
    let names = |manifest: &Manifest| {
        manifest.images.iter().map(|image| image.name.clone()).collect::<Vec<_>>()
    };
    let mut all = names(before);
    all.extend(names(now).into_iter().filter(|name| before.image(name).is_err()));
    let mut images = Vec::new();
    for name in all {
        let (a, b) = (a.image(&name)?, b.image(&name)?);
        images.push(images::compare(name, &a, &b, control)?);
    }
    let sections = sections(&a.snapshot, &b.snapshot)?;
    let (machine, same_disks) = machine::compare(before, now);
    let same = |image: &ImageDifference| image.changed_chunks == 0 && image.a_size == image.b_size;
    let equal = sections.is_empty() && same_disks && images.iter().all(same);
    Ok(Difference {
        a: a.snapshot.id(),
        b: b.snapshot.id(),
        apart_ns: i128::from(now.created) - i128::from(before.created),
        equal,
        machine,
        images,
        sections,
    })
}

/// One of the two snapshots.
struct Side {
    snapshot: Snapshot,
    /// Everything that it builds on is there.
    whole: bool,
}

/// What is known of an image of one side.
enum Image {
    /// Its chunks can be read.
    Whole(ImageReader),
    /// Something that it builds on is missing.
    Index(Index),
    /// The snapshot has no such image.
    None,
}

impl Side {
    fn open(path: &Path, parents: &[PathBuf]) -> Result<Self, FormatError> {
        match Snapshot::open_chain(path, parents) {
            Ok(snapshot) => Ok(Self { snapshot, whole: true }),
            Err(FormatError::MissingParent { .. }) => {
                Ok(Self { snapshot: Snapshot::open(path)?, whole: false })
            }
            Err(error) => Err(error),
        }
    }

    fn image(&self, name: &str) -> Result<Image, FormatError> {
        if self.snapshot.manifest().image(name).is_err() {
            return Ok(Image::None);
        }
        match self.whole {
            true => ImageReader::open(&self.snapshot, name).map(Image::Whole),
            false => ImageReader::open_index(&self.snapshot, name).map(Image::Index),
        }
    }
}

impl Image {
    fn index(&self) -> Option<&Index> {
        match self {
            Self::Whole(image) => Some(image.index()),
            Self::Index(index) => Some(index),
            Self::None => None,
        }
    }
}

fn sections(a: &Snapshot, b: &Snapshot) -> Result<Vec<SectionDifference>, FormatError> {
    let (before, now) = (&a.manifest().sections, &b.manifest().sections);
    let content = |section: &SectionRecord| (section.version, section.length, section.digest);
    let (mut theirs, mut ours) = (Sections::read(a)?, Sections::read(b)?);
    let mut all: Vec<&SectionRecord> = before.iter().collect();
    let name = |section: &SectionRecord| (section.kind.clone(), section.instance.clone());
    let find = |list: &'_ [SectionRecord], wanted: &SectionRecord| {
        list.iter().find(|section| name(section) == name(wanted)).cloned()
    };
    all.extend(now.iter().filter(|section| find(before, section).is_none()));
    let mut found = Vec::new();
    for section in all {
        let (a, b) = (find(before, section), find(now, section));
        if a.as_ref().map(content) == b.as_ref().map(content) {
            continue;
        }
        let (kind, instance) = name(section);
        let old = theirs.take(&kind, &instance).ok();
        let new = ours.take(&kind, &instance).ok();
        let payload =
            |section: &SectionRecord| Payload { version: section.version, length: section.length };
        found.push(SectionDifference {
            kind,
            instance,
            a: a.as_ref().map(payload),
            b: b.as_ref().map(payload),
            changed_bytes: changed_bytes(old.as_ref(), new.as_ref()),
        });
    }
    Ok(found)
}

fn changed_bytes(a: Option<&Section>, b: Option<&Section>) -> u64 {
    let bytes = |section: Option<&Section>| section.map_or(vec![], |s| s.payload.clone());
    let (a, b) = (bytes(a), bytes(b));
    if a.len() == b.len() {
        return a.iter().zip(&b).filter(|(a, b)| a != b).count() as u64;
    }
    let shorter = a.len().min(b.len());
    let start = a.iter().zip(&b).take_while(|(a, b)| a == b).count();
    let end = a.iter().rev().zip(b.iter().rev()).take_while(|(a, b)| a == b).count();
    (b.len() - start - end.min(shorter - start)) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changed_bytes_are_those_between_what_is_the_same() {
        let section = |payload: &[u8]| Section {
            kind: "x".into(),
            instance: "0".into(),
            version: 1,
            payload: payload.into(),
        };
        for (a, b, changed) in [
            (&b"abc"[..], &b"abc"[..], 0),
            (b"abc", b"axc", 1),
            (b"abc", b"axyc", 2),
            (b"aaaa", b"aaa", 0),
            (b"aaa", b"aaaa", 1),
            (b"", b"abc", 3),
        ] {
            assert_eq!(changed_bytes(Some(&section(a)), Some(&section(b))), changed, "{a:?} {b:?}");
        }
        assert_eq!(changed_bytes(None, Some(&section(b"abc"))), 3);
    }
}
