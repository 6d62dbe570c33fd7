//! The body of the manifest: what the snapshot is of, and every file in it.
//!
//! A manifest that came from disk is hostile until [`Manifest::check`] has passed; [`Manifest::decode`]
//! runs it.

use std::collections::HashSet;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use crate::{
    codec,
    digest::Digest,
    error::FormatError,
    image::{self, RECORD_LEN},
    names,
};

/// Name of the manifest's file.
pub const FILE: &str = "manifest";
/// Name of the file that holds the sections' payloads.
pub const STATE_FILE: &str = "state";
/// Name of the optional, advisory file with the order of first touch. It may be added to a published
/// snapshot, so that it is never in the manifest's list.
pub const WORKING_SET_FILE: &str = "working-set";
/// Name of the image of guest RAM.
pub const MEMORY_IMAGE: &str = "memory";
/// Longest hint at the parent's place, in bytes.
pub const MAX_HINT: usize = 4096;
/// Most sections, files, images and disks, each.
pub const MAX_RECORDS: usize = 4096;

/// Everything about a snapshot except the bytes of its state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Program, version and revision that wrote the snapshot.
    pub writer: String,
    /// Operating system, its build and its architecture where the snapshot was written.
    pub host: String,
    /// Wall time of the capture, in nanoseconds since 1970-01-01 00:00 UTC.
    pub created: u64,
    /// Id of the snapshot that this one is a difference to; `None` for a full snapshot.
    pub parent: Option<Digest>,
    /// Where the parent was when this was written: a place to look at first, where only a snapshot of the
    /// id `parent` counts. Not in format 1.0, which knows no parents.
    #[serde(skip)]
    pub parent_hint: Option<String>,
    /// The machine's configuration.
    pub machine: MachineInfo,
    /// What the guest was told about its CPU.
    pub cpu: CpuIdentity,
    /// The chunked images: guest RAM and captured disks.
    pub images: Vec<ImageRecord>,
    /// The sections in `state`, in the order of their offsets, which leave no gap.
    pub sections: Vec<SectionRecord>,
    /// Every file of the snapshot but the manifest itself.
    pub files: Vec<FileRecord>,
}

/// A machine's configuration, as far as a restore needs it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineInfo {
    /// Name of the machine.
    pub name: String,
    /// Size of RAM in bytes, the system area included.
    pub memory_size: u64,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// The kernel command line.
    pub cmdline: String,
    /// Where the kernel was loaded from. Not needed for a restore.
    pub kernel: String,
    /// blake3 of the kernel file, where it is known.
    pub kernel_digest: Option<Digest>,
    /// Where the initial RAM file system was loaded from. Not needed for a restore.
    pub initrd: Option<String>,
    /// Block devices, in the order of their virtio-mmio slots.
    pub disks: Vec<DiskRecord>,
    /// Whether there is a virtio-rng device.
    pub rng: bool,
    /// What ran the guest's instructions: "soft", "hvf", "kvm".
    pub backend: String,
    /// Set for a deterministic machine.
    pub deterministic: Option<DeterministicInfo>,
}

/// What a deterministic machine's time and randomness start from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeterministicInfo {
    /// Seed of everything random.
    pub seed: u64,
    /// Wall time at virtual time zero, in seconds since 1970-01-01 00:00 UTC.
    pub epoch: u64,
}

/// A disk of the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRecord {
    /// The disk's id inside the machine.
    pub id: String,
    /// Where the disk was when the snapshot was taken.
    pub path: String,
    /// Size in bytes.
    pub size: u64,
    /// Whether the guest could only read.
    pub read_only: bool,
    /// Where the disk's bytes are.
    pub storage: DiskStorage,
    /// Image digest of the disk's bytes (see [`image`]).
    pub digest: Digest,
}

/// Where a disk's bytes are. On disk a `u8`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum DiskStorage {
    /// In the snapshot, as the image `disk-ID`.
    Captured = 1,
    /// At their path, where they must still have the recorded digest.
    Reference = 2,
}

/// What the guest was told about its CPU, and what another host must match.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuIdentity {
    /// The backend's name: "soft", "hvf", "kvm".
    pub backend: String,
    /// Identification registers that the guest can read: the 16-bit encoding
    /// (op0, op1, CRn, CRm, op2) and the value, in ascending order of the encoding.
    pub id_registers: Vec<(u16, u64)>,
    /// Frequency of the virtual counter (`CNTFRQ_EL0`) in Hz.
    pub counter_frequency: u64,
}

/// A chunked image: its name stands for the files `NAME.idx` and `NAME.zst`, and for `NAME.raw` if that is in
/// the list of files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// "memory" or "disk-ID".
    pub name: String,
    /// Size of the raw image in bytes.
    pub size: u64,
    /// Size of a chunk in bytes.
    pub chunk_size: u32,
    /// The image digest: equal for equal raw bytes, however they are stored.
    pub digest: Digest,
}

/// A section's place in `state`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SectionRecord {
    /// Kind of the state.
    pub kind: String,
    /// Which of several of that kind.
    pub instance: String,
    /// Version of the payload.
    pub version: u16,
    /// Offset of the payload in `state`, in bytes.
    pub offset: u64,
    /// Length of the payload in bytes.
    pub length: u64,
    /// blake3 of the payload.
    pub digest: Digest,
}

/// A file of the snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Name in the snapshot's directory.
    pub name: String,
    /// Length in bytes.
    pub length: u64,
    /// blake3 of the whole file; for the raw bytes of an image, its image digest.
    pub digest: Digest,
}

impl Manifest {
    /// The minor format version that the body is written in: the oldest that has all that is in it.
    pub fn minor(&self) -> u16 {
        match self.images.iter().any(|image| self.raw_file(image).is_some()) {
            true => 2,
            false => u16::from(self.parent.is_some()),
        }
    }

    /// The bytes of the body, in format 1.[`minor`](Self::minor).
    pub fn encode(&self) -> Result<Vec<u8>, FormatError> {
        self.check()?;
        Ok(match self.minor() {
            0 => codec::encode(FILE, self)?,
            _ => codec::encode(FILE, &(self, &self.parent_hint))?,
        })
    }

    /// Parses a body of format 1.`minor`, and checks it.
    pub fn decode(minor: u16, body: &[u8]) -> Result<Self, FormatError> {
        let manifest: Self = match minor {
            0 => codec::decode(FILE, minor, body)?,
            1 | 2 => {
                let (manifest, parent_hint) = codec::decode(FILE, minor, body)?;
                Self { parent_hint, ..manifest }
            }
            _ => return Err(field("minor format version", format!("{minor} is not known"))),
        };
        if manifest.minor() != minor {
            let (what, has) = match (minor, manifest.minor()) {
                (2, _) => ("raw files", "one"),
                (_, 2) => ("raw files", "none"),
                (0, _) => ("parent", "none"),
                _ => ("parent", "one"),
            };
            return Err(field(what, format!("a snapshot of format 1.{minor} has {has}")));
        }
        manifest.check()?;
        Ok(manifest)
    }

    /// Whether the parts fit together: names stay in the directory, nothing is listed twice, sections
    /// fill `state` without a gap, every image has its files and every file belongs to something.
    pub fn check(&self) -> Result<(), FormatError> {
        let lists = [
            ("images", self.images.len()),
            ("sections", self.sections.len()),
            ("files", self.files.len()),
            ("disks", self.machine.disks.len()),
        ];
        for (name, len) in lists {
            if len > MAX_RECORDS {
                return Err(field(
                    name,
                    format!("{len} records, at most {MAX_RECORDS} are allowed"),
                ));
            }
        }
        match &self.parent_hint {
            Some(_) if self.parent.is_none() => {
                return Err(field("parent hint", "there is no parent"));
            }
            Some(hint) if hint.len() > MAX_HINT => {
                return Err(field(
                    "parent hint",
                    format!("{} bytes, at most {MAX_HINT}", hint.len()),
                ));
            }
            _ => {}
        }
        self.check_files()?;
        self.check_sections()?;
        self.check_images()?;
        self.check_disks()?;
        self.check_cpu()
    }

    /// The file called `name`.
    pub fn file(&self, name: &str) -> Result<&FileRecord, FormatError> {
        let found = self.files.iter().find(|file| file.name == name);
        found.ok_or_else(|| FormatError::Unlisted { what: format!("file `{name}`") })
    }

    /// The image called `name`.
    pub fn image(&self, name: &str) -> Result<&ImageRecord, FormatError> {
        let found = self.images.iter().find(|image| image.name == name);
        found.ok_or_else(|| FormatError::Unlisted { what: format!("image `{name}`") })
    }

    /// The file with the raw bytes of `image`, if it is stored so. Its digest is the image's.
    pub fn raw_file(&self, image: &ImageRecord) -> Option<&FileRecord> {
        let name = image.raw_file();
        self.files.iter().find(|file| file.name == name)
    }

    fn check_files(&self) -> Result<(), FormatError> {
        let mut owned: HashSet<String> = HashSet::from([STATE_FILE.to_owned()]);
        for image in &self.images {
            names::check(&image.name)?;
            for name in [image.index_file(), image.data_file(), image.raw_file()] {
                if !owned.insert(name.clone()) {
                    return Err(field("images", format!("two claim the file `{name}`")));
                }
            }
        }
        let mut seen = HashSet::new();
        for file in &self.files {
            names::check(&file.name)?;
            if !seen.insert(&file.name) {
                return Err(field("files", format!("`{}` is listed twice", file.name)));
            }
            if !owned.contains(&file.name) {
                return Err(field("files", format!("`{}` belongs to nothing", file.name)));
            }
        }
        Ok(())
    }

    fn check_sections(&self) -> Result<(), FormatError> {
        let mut seen = HashSet::new();
        let mut end = 0u64;
        for (at, section) in self.sections.iter().enumerate() {
            let SectionRecord { kind, instance, version: _, offset, length, digest: _ } = section;
            let wrong = |what: &str, why: String| Err(field(format!("section {at}: {what}"), why));
            if !seen.insert((kind, instance)) {
                return wrong("kind", format!("`{kind}` of instance `{instance}` is listed twice"));
            }
            if *offset != end {
                return wrong("offset", format!("{offset}, the section before ends at {end}"));
            }
            if *length > codec::MAX_PAYLOAD as u64 {
                return wrong("length", format!("{length}, at most {}", codec::MAX_PAYLOAD));
            }
            // At most MAX_RECORDS lengths of at most MAX_PAYLOAD bytes: no overflow.
            end += length;
        }
        let found = self.file(STATE_FILE)?.length;
        match found == end {
            true => Ok(()),
            false => Err(FormatError::Length {
                file: STATE_FILE.into(),
                what: "the file".into(),
                expected: end,
                found,
            }),
        }
    }

    fn check_images(&self) -> Result<(), FormatError> {
        for record in &self.images {
            let ImageRecord { name, size, chunk_size, digest } = record;
            let wrong = |what: &str, why: String| Err(field(format!("image {name}: {what}"), why));
            if !image::is_chunk_size(*chunk_size) {
                return wrong("chunk size", format!("{chunk_size} is not allowed"));
            }
            if *size > image::MAX_SIZE {
                return wrong("size", format!("{size} bytes, at most {}", image::MAX_SIZE));
            }
            let expected = size.div_ceil(u64::from(*chunk_size)) * RECORD_LEN as u64;
            let found = self.file(&record.index_file())?.length;
            if found != expected {
                return Err(FormatError::Length {
                    file: record.index_file(),
                    what: "the file".into(),
                    expected,
                    found,
                });
            }
            let data = self.file(&record.data_file())?;
            let Some(raw) = self.raw_file(record) else { continue };
            for (file, expected) in [(raw, *size), (data, 0)] {
                if file.length != expected {
                    return Err(FormatError::Length {
                        file: file.name.clone(),
                        what: "the file".into(),
                        expected,
                        found: file.length,
                    });
                }
            }
            if raw.digest != *digest {
                return wrong("digest", format!("{digest}, {} has {}", raw.name, raw.digest));
            }
        }
        let (memory, ram) = (self.image(MEMORY_IMAGE)?.size, self.machine.memory_size);
        match memory == ram {
            true => Ok(()),
            false => Err(field("image memory: size", format!("{memory}, the machine has {ram}"))),
        }
    }

    fn check_disks(&self) -> Result<(), FormatError> {
        let mut images: HashSet<&str> = self.images.iter().map(|image| &*image.name).collect();
        images.remove(MEMORY_IMAGE);
        let mut seen = HashSet::new();
        for disk in &self.machine.disks {
            let wrong = |why: &str| Err(field(format!("disk `{}`", disk.id.escape_debug()), why));
            let name = disk.image_name();
            names::check(&name)?;
            if !seen.insert(&disk.id) {
                return wrong("is listed twice");
            }
            match disk.storage {
                DiskStorage::Captured => {
                    let image = self.image(&name)?;
                    images.remove(&*name);
                    if (image.size, image.digest) != (disk.size, disk.digest) {
                        return wrong("its size or digest is not that of its image");
                    }
                }
                DiskStorage::Reference if images.contains(&*name) => {
                    return wrong("is a reference, but there is an image of it");
                }
                DiskStorage::Reference => {}
            }
        }
        match images.iter().min() {
            None => Ok(()),
            Some(name) => Err(field("images", format!("`{name}` belongs to no disk"))),
        }
    }

    fn check_cpu(&self) -> Result<(), FormatError> {
        let registers = &self.cpu.id_registers;
        match registers.windows(2).all(|pair| pair[0].0 < pair[1].0) {
            true => Ok(()),
            false => Err(field("ID registers", "not in ascending order, or one is there twice")),
        }
    }
}

impl DiskRecord {
    /// Name of the disk's image if it is captured.
    pub fn image_name(&self) -> String {
        format!("disk-{}", self.id)
    }
}

impl ImageRecord {
    /// Name of the index file.
    pub fn index_file(&self) -> String {
        format!("{}.idx", self.name)
    }

    /// Name of the file with the frames.
    pub fn data_file(&self) -> String {
        format!("{}.zst", self.name)
    }

    /// Name of the file with the raw bytes, if there is one.
    pub fn raw_file(&self) -> String {
        format!("{}.raw", self.name)
    }
}

impl DiskStorage {
    fn name(self) -> &'static str {
        match self {
            Self::Captured => "captured",
            Self::Reference => "reference",
        }
    }
}

impl Serialize for DiskStorage {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match serializer.is_human_readable() {
            true => serializer.serialize_str(self.name()),
            false => serializer.serialize_u8(*self as u8),
        }
    }
}

impl<'de> Deserialize<'de> for DiskStorage {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let all = [Self::Captured, Self::Reference];
        if deserializer.is_human_readable() {
            let name = String::deserialize(deserializer)?;
            let found = all.into_iter().find(|storage| storage.name() == name);
            return found.ok_or_else(|| D::Error::custom(format!("disk storage `{name}`")));
        }
        let value = u8::deserialize(deserializer)?;
        let found = all.into_iter().find(|storage| *storage as u8 == value);
        found.ok_or_else(|| D::Error::custom(format!("disk storage {value} is not known")))
    }
}

fn field(field: impl Into<String>, why: impl Into<String>) -> FormatError {
    FormatError::field(FILE, field, why)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A manifest whose parts fit together; nothing in it has bytes.
    pub(crate) fn sample() -> Manifest {
        let digest = Digest::of(b"");
        let file = |name: &str, length| FileRecord { name: name.into(), length, digest };
        Manifest {
            writer: "squib 0.3.0".into(),
            host: "linux x86_64".into(),
            created: 1,
            parent: None,
            parent_hint: None,
            machine: MachineInfo {
                name: "vm".into(),
                memory_size: 1 << 20,
                vcpus: 1,
                cmdline: "console=ttyS0".into(),
                kernel: "/boot/Image".into(),
                kernel_digest: Some(digest),
                initrd: None,
                disks: vec![
                    DiskRecord {
                        id: "root".into(),
                        path: "/disk".into(),
                        size: 100_000,
                        read_only: false,
                        storage: DiskStorage::Captured,
                        digest,
                    },
                    DiskRecord {
                        id: "data".into(),
                        path: "/data".into(),
                        size: 4096,
                        read_only: true,
                        storage: DiskStorage::Reference,
                        digest,
                    },
                ],
                rng: true,
                backend: "soft".into(),
                deterministic: Some(DeterministicInfo { seed: 1, epoch: 2 }),
            },
            cpu: CpuIdentity {
                backend: "soft".into(),
                id_registers: vec![(0xc000, 1), (0xc020, 2)],
                counter_frequency: 62_500_000,
            },
            images: vec![
                ImageRecord { name: "memory".into(), size: 1 << 20, chunk_size: 1 << 16, digest },
                ImageRecord {
                    name: "disk-root".into(),
                    size: 100_000,
                    chunk_size: 1 << 16,
                    digest,
                },
            ],
            sections: vec![
                SectionRecord {
                    kind: "serial".into(),
                    instance: "0".into(),
                    version: 1,
                    offset: 0,
                    length: 10,
                    digest,
                },
                SectionRecord {
                    kind: "vcpu".into(),
                    instance: "0".into(),
                    version: 1,
                    offset: 10,
                    length: 20,
                    digest,
                },
            ],
            files: vec![
                file("state", 30),
                file("memory.idx", 16 * 48),
                file("memory.zst", 7),
                file("disk-root.idx", 2 * 48),
                file("disk-root.zst", 7),
            ],
        }
    }

    #[test]
    fn a_manifest_reads_back_as_written_in_the_codec_and_in_json() {
        let manifest = sample();
        assert_eq!(Manifest::decode(0, &manifest.encode().unwrap()).unwrap(), manifest);
        let json = serde_json::to_string(&manifest).unwrap();
        assert!(json.contains(r#""storage":"captured""#), "{json}");
        assert_eq!(serde_json::from_str::<Manifest>(&json).unwrap(), manifest);
    }

    #[test]
    fn a_difference_is_of_format_1_1_and_keeps_the_place_of_its_parent() {
        let mut manifest = sample();
        manifest.parent = Some(Digest([1; 32]));
        manifest.parent_hint = Some("/a/b".into());
        assert_eq!(manifest.minor(), 1);
        let body = manifest.encode().unwrap();
        assert_eq!(Manifest::decode(1, &body).unwrap(), manifest);
        assert!(Manifest::decode(0, &body).is_err());
        let full = sample().encode().unwrap();
        let text = Manifest::decode(1, &[&full[..], &[0]].concat()).unwrap_err().to_string();
        assert!(text.contains("parent"), "{text}");
        let old = codec::encode(FILE, &Manifest { parent_hint: None, ..manifest.clone() }).unwrap();
        let text = Manifest::decode(0, &old).unwrap_err().to_string();
        assert!(text.contains("parent"), "{text}");
        manifest.parent_hint = Some("x".repeat(MAX_HINT + 1));
        assert!(manifest.encode().unwrap_err().to_string().contains("parent hint"));
    }

    /// The sample with the raw bytes of its disk.
    fn raw_sample() -> Manifest {
        let mut manifest = sample();
        let (length, digest) = (manifest.images[1].size, manifest.images[1].digest);
        manifest.files[4].length = 0;
        manifest.files.push(FileRecord { name: "disk-root.raw".into(), length, digest });
        manifest
    }

    #[test]
    fn raw_files_are_of_format_1_2_whether_it_is_a_difference_or_not() {
        let full = raw_sample();
        let diff = Manifest {
            parent: Some(Digest([1; 32])),
            parent_hint: Some("/a/b".into()),
            ..raw_sample()
        };
        for manifest in [full, diff] {
            assert_eq!(manifest.minor(), 2);
            let body = manifest.encode().unwrap();
            assert_eq!(Manifest::decode(2, &body).unwrap(), manifest);
            let text = Manifest::decode(1, &body).unwrap_err().to_string();
            assert!(text.contains("raw files: a snapshot of format 1.1 has none"), "{text}");
            assert!(Manifest::decode(0, &body).is_err());
            assert!(Manifest::decode(3, &body).is_err());
            let without = codec::encode(FILE, &(&sample(), None::<String>)).unwrap();
            let text = Manifest::decode(2, &without).unwrap_err().to_string();
            assert!(text.contains("raw files: a snapshot of format 1.2 has one"), "{text}");
        }
    }

    #[test]
    fn raw_files_that_do_not_fit_their_image_are_refused_by_name() {
        type Change = fn(&mut Manifest);
        let cases: &[(&str, Change)] = &[
            ("disk-root.raw: the file is 99999 bytes long, expected 100000", |m| {
                m.files[5].length -= 1
            }),
            ("disk-root.zst: the file is 7 bytes long, expected 0", |m| m.files[4].length = 7),
            ("image disk-root: digest", |m| m.files[5].digest = Digest([1; 32])),
            ("`disk-data.raw` belongs to nothing", |m| m.files[5].name = "disk-data.raw".into()),
            ("`disk-root.raw` is listed twice", |m| m.files.push(m.files[5].clone())),
            ("no file `disk-root.zst`", |m| drop(m.files.remove(4))),
        ];
        for (expected, change) in cases {
            let mut manifest = raw_sample();
            change(&mut manifest);
            let text = manifest.encode().expect_err(expected).to_string();
            assert!(text.contains(expected), "expected `{expected}` in `{text}`");
        }
    }

    #[test]
    fn a_truncated_or_damaged_body_is_refused_or_fits_together() {
        for manifest in [sample(), raw_sample()] {
            any_damage_is_refused_or_fits_together(&manifest);
        }
    }

    fn any_damage_is_refused_or_fits_together(manifest: &Manifest) {
        let minor = manifest.minor();
        let body = manifest.encode().unwrap();
        for len in 0..body.len() {
            assert!(Manifest::decode(minor, &body[..len]).is_err(), "cut to {len}");
        }
        for bit in 0..body.len() * 8 {
            let mut damaged = body.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            if let Ok(manifest) = Manifest::decode(minor, &damaged) {
                manifest.check().unwrap();
            }
        }
    }

    #[test]
    fn parts_that_do_not_fit_together_are_refused_by_name() {
        type Change = fn(&mut Manifest);
        let cases: &[(&str, Change)] = &[
            ("../state", |m| m.files[0].name = "../state".into()),
            ("`state` is listed twice", |m| m.files.push(m.files[0].clone())),
            ("`extra` belongs to nothing", |m| {
                m.files.push(FileRecord { name: "extra".into(), ..m.files[0].clone() })
            }),
            ("no file `memory.zst`", |m| drop(m.files.remove(2))),
            ("image memory: size", |m| m.machine.memory_size += 1),
            ("memory.idx: the file is 768 bytes long, expected 816", |m| {
                m.images[0].size += 1;
                m.machine.memory_size += 1;
            }),
            ("image memory: chunk size", |m| m.images[0].chunk_size = 4096),
            ("image memory: size", |m| m.images[0].size = u64::MAX),
            ("section 1: offset", |m| m.sections[1].offset = 9),
            ("section 1: length", |m| m.sections[1].length = u64::MAX),
            ("`serial` of instance `0` is listed twice", |m| m.sections[1].kind = "serial".into()),
            ("state: the file is 30 bytes long, expected 10", |m| drop(m.sections.pop())),
            ("disk `root`", |m| m.machine.disks[0].size += 1),
            ("disk `root`: is listed twice", |m| m.machine.disks[1].id = "root".into()),
            ("no image `disk-data`", |m| m.machine.disks[1].storage = DiskStorage::Captured),
            ("disk `root`: is a reference", |m| {
                m.machine.disks[0].storage = DiskStorage::Reference
            }),
            ("`disk-root` belongs to no disk", |m| drop(m.machine.disks.remove(0))),
            ("ID registers", |m| m.cpu.id_registers[1].0 = 0xc000),
            ("at most 4096", |m| m.machine.disks = vec![m.machine.disks[0].clone(); 5000]),
        ];
        for (expected, change) in cases {
            let mut manifest = sample();
            change(&mut manifest);
            let text = manifest.encode().expect_err(expected).to_string();
            assert!(text.contains(expected), "expected `{expected}` in `{text}`");
        }
    }
}
