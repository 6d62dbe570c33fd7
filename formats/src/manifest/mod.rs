//! The body of the manifest: what the snapshot is of, and every file in it.
//!
//! A manifest that came from disk is hostile until [`Manifest::check`] has passed; [`Manifest::decode`]
//! runs it.

mod check;
#[cfg(test)]
pub(crate) mod tests;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use crate::{
    codec,
    digest::Digest,
    error::FormatError,
    image::{self, Index, Scheme},
    names,
};

/// Name of the manifest's file.
pub const FILE: &str = "manifest";
/// Name of the file that holds the sections' payloads.
pub const STATE_FILE: &str = "state";
/// Name of the optional file with the kernel that the guest was booted from, as it was then. From format 1.4
/// on.
pub const KERNEL_FILE: &str = "kernel";
/// Name of the optional file with the initial RAM file system that the guest was booted from.
pub const INITRD_FILE: &str = "initrd";
/// Name of the optional, advisory file with the order of first touch. It may be added to a published
/// snapshot, so that it is never in the manifest's list.
pub const WORKING_SET_FILE: &str = "working-set";
/// Name of the image of guest RAM.
pub const MEMORY_IMAGE: &str = "memory";
/// Longest hint at the parent's place, in bytes.
pub const MAX_HINT: usize = 4096;
/// Longest build of an operating system, in bytes.
pub const MAX_BUILD: usize = 64;
/// Most bytes of all sections together: thousands of times what a machine's state takes.
pub const MAX_STATE: u64 = 64 << 20;
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
    /// What the backend says of the host, where that can stand in the way of a restore: `hvf`. Not before
    /// format 1.3.
    #[serde(skip)]
    pub host_backend: Option<HostBackend>,
    /// What the operator chose. `None` before format 1.4, and only there.
    #[serde(skip)]
    pub operation: Option<Operation>,
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

/// What the operator chose for a machine, apart from what the guest sees of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Operation {
    /// What a reset by the guest does.
    pub on_reset: OnReset,
    /// blake3 of the file with the initial RAM file system, if there is one and it is known. That of the
    /// kernel is [`MachineInfo::kernel_digest`].
    pub initrd_digest: Option<Digest>,
}

/// What a reset by the guest does. On disk a `u8`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum OnReset {
    /// It ends the machine.
    #[default]
    Exit = 1,
    /// The machine boots again.
    Restart = 2,
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
pub enum DiskStorage {
    /// In the snapshot, as the image `disk-ID`: 1.
    Captured,
    /// At their path, where they must still have the recorded digest, which counts chunks so: each of them 2,
    /// which older formats have, runs 3. A snapshot that is written again keeps the digest.
    Reference(Scheme),
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

/// A backend that is a part of the host's operating system, as it was there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostBackend {
    /// Build of the operating system. Another one may refuse the state of the interrupt controller, which
    /// only that system can read.
    pub build: String,
    /// Registers that it did not let one read, and that are therefore no part of the vCPUs' state, by
    /// encoding in ascending order.
    pub unreadable: Vec<u16>,
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
    /// The minor format version that the body is written in: [`header::MINOR`], or for a manifest that
    /// came from an older one the oldest that has all that is in it.
    pub fn minor(&self) -> u16 {
        if self.operation.is_some() {
            return 4;
        }
        if self.host_backend.is_some() {
            return 3;
        }
        match self.images.iter().any(|image| self.raw_file(image).is_some()) {
            true => 2,
            false => u16::from(self.parent.is_some()),
        }
    }

    /// How the snapshot counts the chunks of its images.
    pub fn scheme(&self) -> Scheme {
        match self.minor() {
            0..=3 => Scheme::Chunks,
            _ => Scheme::Runs,
        }
    }

    /// The bytes of the body, in format 1.[`minor`](Self::minor).
    pub fn encode(&self) -> Result<Vec<u8>, FormatError> {
        self.check()?;
        self.encode_unchecked()
    }

    /// [`encode`](Self::encode) of a manifest whose parts may not fit together, as a test of readers needs it.
    pub fn encode_unchecked(&self) -> Result<Vec<u8>, FormatError> {
        let Self { parent_hint: hint, host_backend: host, operation, .. } = self;
        Ok(match (operation, host, self.minor()) {
            (Some(operation), host, _) => codec::encode(FILE, &(self, hint, host, operation))?,
            (None, Some(host), _) => codec::encode(FILE, &(self, hint, host))?,
            (None, None, 0) => codec::encode(FILE, self)?,
            (None, None, _) => codec::encode(FILE, &(self, hint))?,
        })
    }

    /// Parses a body of format 1.`minor`, and checks it.
    pub fn decode(minor: u16, body: &[u8]) -> Result<Self, FormatError> {
        let manifest = Self::decode_unchecked(minor, body)?;
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

    /// Parses a body of format 1.`minor`. Nothing in it may be used before [`check`](Self::check).
    pub fn decode_unchecked(minor: u16, body: &[u8]) -> Result<Self, FormatError> {
        Ok(match minor {
            0 => codec::decode(FILE, minor, body)?,
            1 | 2 => {
                let (manifest, parent_hint) = codec::decode(FILE, minor, body)?;
                Self { parent_hint, ..manifest }
            }
            3 => {
                let (manifest, parent_hint, host) = codec::decode(FILE, minor, body)?;
                Self { parent_hint, host_backend: Some(host), ..manifest }
            }
            4 => {
                let (manifest, parent_hint, host_backend, operation) =
                    codec::decode(FILE, minor, body)?;
                Self { parent_hint, host_backend, operation: Some(operation), ..manifest }
            }
            _ => return Err(field("minor format version", format!("{minor} is not known"))),
        })
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
}

impl Manifest {
    /// Gives `images` to the snapshot, which has others of the same bytes, and their digests to its disks.
    pub fn set_images(&mut self, images: Vec<ImageRecord>) {
        for disk in &mut self.machine.disks {
            let image = images.iter().find(|image| image.name == disk.image_name());
            disk.digest = image.map_or(disk.digest, |image| image.digest);
        }
        self.images = images;
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
            Self::Reference(Scheme::Runs) => "reference",
            Self::Reference(Scheme::Chunks) => "reference-by-chunks",
        }
    }

    fn number(self) -> u8 {
        match self {
            Self::Captured => 1,
            Self::Reference(Scheme::Chunks) => 2,
            Self::Reference(Scheme::Runs) => 3,
        }
    }
}

impl Serialize for DiskStorage {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match serializer.is_human_readable() {
            true => serializer.serialize_str(self.name()),
            false => serializer.serialize_u8(self.number()),
        }
    }
}

impl<'de> Deserialize<'de> for DiskStorage {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let all = [Self::Captured, Self::Reference(Scheme::Runs), Self::Reference(Scheme::Chunks)];
        if deserializer.is_human_readable() {
            let name = String::deserialize(deserializer)?;
            let found = all.into_iter().find(|storage| storage.name() == name);
            return found.ok_or_else(|| D::Error::custom(format!("disk storage `{name}`")));
        }
        let value = u8::deserialize(deserializer)?;
        let found = all.into_iter().find(|storage| storage.number() == value);
        found.ok_or_else(|| D::Error::custom(format!("disk storage {value} is not known")))
    }
}

impl OnReset {
    /// The name that users write.
    pub fn name(self) -> &'static str {
        match self {
            Self::Exit => "exit",
            Self::Restart => "restart",
        }
    }
}

impl Serialize for OnReset {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match serializer.is_human_readable() {
            true => serializer.serialize_str(self.name()),
            false => serializer.serialize_u8(*self as u8),
        }
    }
}

impl<'de> Deserialize<'de> for OnReset {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let all = [Self::Exit, Self::Restart];
        if deserializer.is_human_readable() {
            let name = String::deserialize(deserializer)?;
            let found = all.into_iter().find(|choice| choice.name() == name);
            return found.ok_or_else(|| D::Error::custom(format!("on reset `{name}`")));
        }
        let value = u8::deserialize(deserializer)?;
        let found = all.into_iter().find(|choice| *choice as u8 == value);
        found.ok_or_else(|| D::Error::custom(format!("on reset {value} is not known")))
    }
}

fn field(field: impl Into<String>, why: impl Into<String>) -> FormatError {
    FormatError::field(FILE, field, why)
}
