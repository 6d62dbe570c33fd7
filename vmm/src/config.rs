//! What a machine is made of. Plain data: it is part of a snapshot's manifest.

use std::{fmt, path::PathBuf, str::FromStr};

use serde::{Deserialize, Serialize};
use squib_devices::map;
use squib_formats::digest::Digest;
pub use squib_formats::manifest::OnReset;

/// Longest kernel command line that arm64 Linux takes (COMMAND_LINE_SIZE), with its closing zero byte.
pub const CMDLINE_MAX: usize = 2048;
/// Most bytes of a disk's id (`VIRTIO_BLK_ID_BYTES`, virtio 1.3 section 5.2.6).
pub const DISK_ID_MAX: usize = 20;
/// Longest machine name in bytes.
pub const NAME_MAX: usize = 64;
/// Word of the kernel command line with which arm64 Linux asks for a warm reset (PSCI SYSTEM_RESET2) after
/// a panic, and for an ordinary one else.
pub const WARM_PANIC: &str = "reboot=panic_warm";
/// RAM comes in multiples of this many bytes.
pub const MEMORY_STEP: u64 = 2 << 20;
/// Most RAM, bytes: what a 40-bit physical address space holds above [`map::RAM_BASE`].
pub const MEMORY_MAX: u64 = (1 << 40) - map::RAM_BASE;

/// A machine's configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// Name, for people and for the control socket.
    pub name: String,
    /// RAM in bytes, the system area included.
    pub memory: u64,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// The kernel: an arm64 `Image`, raw or compressed. Not read by a restore.
    pub kernel: PathBuf,
    /// blake3 of the kernel file: where it is given, a boot refuses any other file. A machine that has
    /// booted knows it.
    pub kernel_digest: Option<Digest>,
    /// The initial RAM file system. Not read by a restore.
    pub initrd: Option<PathBuf>,
    /// blake3 of the initrd's file, as `kernel_digest` is of the kernel's.
    pub initrd_digest: Option<Digest>,
    /// The whole kernel command line.
    pub cmdline: String,
    /// Block devices, in the order of their virtio-mmio slots.
    pub disks: Vec<DiskConfig>,
    /// Whether there is a virtio-rng device.
    pub rng: bool,
    /// What runs the guest's instructions.
    pub backend: BackendKind,
    /// Set for a machine whose every run is the same.
    pub deterministic: Option<Deterministic>,
    /// What a reset by the guest does. The machine ends either way ([`Outcome::Reset`]
    /// (crate::machine::Outcome::Reset)); its owner boots another one, or does not.
    pub on_reset: OnReset,
}

/// A block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Name of the disk inside the machine; the guest reads it as the disk's serial number.
    pub id: String,
    /// The raw image, a file or a block device.
    pub path: PathBuf,
    /// Whether the guest may only read.
    pub read_only: bool,
}

/// What makes a machine deterministic: time is the count of retired instructions, and everything that
/// is otherwise random comes from one seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Deterministic {
    /// Seed of the device tree's seeds, of virtio-rng and of the generation id.
    pub seed: u64,
    /// What the RTC shows when the virtual counter is zero, in seconds since 1970-01-01 00:00 UTC.
    pub epoch: u64,
}

impl Default for Deterministic {
    /// Seed 0, 2026-01-01 00:00 UTC.
    fn default() -> Self {
        Self { seed: 0, epoch: 1_767_225_600 }
    }
}

/// What runs the guest's instructions. Stored by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum BackendKind {
    /// The software CPU.
    Soft,
    /// Apple's Hypervisor.framework.
    Hvf,
    /// Linux KVM on arm64.
    Kvm,
}

impl BackendKind {
    /// The name that users write and snapshots hold.
    pub fn name(self) -> &'static str {
        match self {
            Self::Soft => "soft",
            Self::Hvf => "hvf",
            Self::Kvm => "kvm",
        }
    }
}

impl fmt::Display for BackendKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl From<BackendKind> for String {
    fn from(kind: BackendKind) -> Self {
        kind.name().to_owned()
    }
}

impl FromStr for BackendKind {
    type Err = ConfigError;

    fn from_str(name: &str) -> Result<Self, ConfigError> {
        [Self::Soft, Self::Hvf, Self::Kvm]
            .into_iter()
            .find(|kind| kind.name() == name)
            .ok_or_else(|| ConfigError::UnknownBackend { name: name.to_owned() })
    }
}

impl TryFrom<String> for BackendKind {
    type Error = ConfigError;

    fn try_from(name: String) -> Result<Self, ConfigError> {
        name.parse()
    }
}

/// Why a configuration cannot become a machine.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The name is empty, too long, or holds a character that has no place in a file name.
    #[error(
        "the name `{}` is not 1 to {NAME_MAX} letters, digits, `.`, `_` or `-` that begin with a letter or digit",
        name.escape_debug()
    )]
    Name {
        /// The name.
        name: String,
    },
    /// RAM is too small, too large, or not a multiple of [`MEMORY_STEP`].
    #[error(
        "{memory} bytes of memory: it must be a multiple of {} MiB from {} MiB to {} MiB",
        MEMORY_STEP >> 20, map::RAM_MIN >> 20, MEMORY_MAX >> 20
    )]
    Memory {
        /// Bytes asked for.
        memory: u64,
    },
    /// No vCPU, or too many.
    #[error("{vcpus} vCPUs: it must be 1 to {}", map::MAX_VCPUS)]
    Vcpus {
        /// Number asked for.
        vcpus: u32,
    },
    /// The command line is longer than the kernel takes.
    #[error("the kernel command line has {length} bytes, the kernel takes at most {}", CMDLINE_MAX - 1)]
    CmdlineLength {
        /// Its length in bytes.
        length: usize,
    },
    /// The command line holds a zero byte.
    #[error("the kernel command line holds a zero byte at offset {offset}")]
    CmdlineZero {
        /// Where.
        offset: usize,
    },
    /// A disk's id is empty, too long, or holds a character that has no place in a file name.
    #[error(
        "the disk id `{}` is not 1 to {DISK_ID_MAX} letters, digits, `.`, `_` or `-` that begin with a letter or digit",
        id.escape_debug()
    )]
    DiskId {
        /// The id.
        id: String,
    },
    /// Two devices have the same id.
    #[error("two devices have the id `{id}`")]
    DuplicateId {
        /// The id.
        id: String,
    },
    /// More devices than virtio-mmio slots.
    #[error("{devices} virtio devices: there are {} slots", map::VIRTIO_SLOTS)]
    TooManyDevices {
        /// Number asked for.
        devices: usize,
    },
    /// A backend that no build knows.
    #[error("there is no backend `{name}`: they are soft, hvf and kvm")]
    UnknownBackend {
        /// The name.
        name: String,
    },
    /// A deterministic machine has one vCPU.
    #[error(
        "a deterministic machine has one vCPU, not {vcpus}: the interleaving of several is not reproducible"
    )]
    DeterministicVcpus {
        /// Number asked for.
        vcpus: u32,
    },
    /// Only the software CPU is deterministic.
    #[error("the {backend} backend cannot be deterministic: only soft counts instructions")]
    DeterministicBackend {
        /// The backend asked for.
        backend: BackendKind,
    },
}

/// Id of the virtio-rng device.
pub(crate) const RNG_ID: &str = "rng";

impl MachineConfig {
    /// A machine with 256 MiB, one vCPU, virtio-rng and nothing else, that boots `kernel` on the
    /// software CPU.
    pub fn new(name: impl Into<String>, kernel: impl Into<PathBuf>) -> Self {
        Self {
            name: name.into(),
            memory: 256 << 20,
            vcpus: 1,
            kernel: kernel.into(),
            kernel_digest: None,
            initrd: None,
            initrd_digest: None,
            cmdline: default_cmdline(false, &[]),
            disks: Vec::new(),
            rng: true,
            backend: BackendKind::Soft,
            deterministic: None,
            on_reset: OnReset::Exit,
        }
    }

    /// Whether a machine can have so many bytes of memory.
    pub fn check_memory(memory: u64) -> Result<(), ConfigError> {
        let fits = (map::RAM_MIN..=MEMORY_MAX).contains(&memory);
        match fits && memory.is_multiple_of(MEMORY_STEP) {
            true => Ok(()),
            false => Err(ConfigError::Memory { memory }),
        }
    }

    /// Whether a machine can have so many vCPUs.
    pub fn check_vcpus(vcpus: u32) -> Result<(), ConfigError> {
        match (1..=map::MAX_VCPUS).contains(&vcpus) {
            true => Ok(()),
            false => Err(ConfigError::Vcpus { vcpus }),
        }
    }

    /// Checks everything that can be checked without touching the host.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if !is_name(&self.name, NAME_MAX) {
            return Err(ConfigError::Name { name: self.name.clone() });
        }
        Self::check_memory(self.memory)?;
        Self::check_vcpus(self.vcpus)?;
        if self.cmdline.len() >= CMDLINE_MAX {
            return Err(ConfigError::CmdlineLength { length: self.cmdline.len() });
        }
        if let Some(offset) = self.cmdline.bytes().position(|byte| byte == 0) {
            return Err(ConfigError::CmdlineZero { offset });
        }
        let devices = self.disks.len() + usize::from(self.rng);
        if devices > map::VIRTIO_SLOTS as usize {
            return Err(ConfigError::TooManyDevices { devices });
        }
        for (at, disk) in self.disks.iter().enumerate() {
            if !is_name(&disk.id, DISK_ID_MAX) {
                return Err(ConfigError::DiskId { id: disk.id.clone() });
            }
            let taken = self.disks[..at].iter().any(|other| other.id == disk.id);
            if taken || (self.rng && disk.id == RNG_ID) {
                return Err(ConfigError::DuplicateId { id: disk.id.clone() });
            }
        }
        if self.deterministic.is_some() {
            if self.vcpus != 1 {
                return Err(ConfigError::DeterministicVcpus { vcpus: self.vcpus });
            }
            if self.backend != BackendKind::Soft {
                return Err(ConfigError::DeterministicBackend { backend: self.backend });
            }
        }
        Ok(())
    }
}

/// The command line for users who give none: the console on the serial port, an immediate reset on a
/// panic that can be told from others, and without an initrd the first disk as root file system.
pub fn default_cmdline(has_initrd: bool, disks: &[DiskConfig]) -> String {
    let mut line = format!("console=ttyS0 panic=-1 {WARM_PANIC}");
    if !has_initrd && let Some(root) = disks.first() {
        line.push_str(if root.read_only { " root=/dev/vda ro" } else { " root=/dev/vda rw" });
    }
    line
}

/// Ids and names become parts of file names.
fn is_name(name: &str, max: usize) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    (1..=max).contains(&name.len())
        && name.chars().all(plain)
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> MachineConfig {
        MachineConfig::new("vm", "/boot/Image")
    }

    fn disk(id: &str) -> DiskConfig {
        DiskConfig { id: id.to_owned(), path: "/disk.img".into(), read_only: false }
    }

    #[test]
    fn the_plain_configuration_is_valid() {
        config().validate().unwrap();
    }

    #[test]
    fn memory_is_bounded_and_comes_in_steps_of_2_mib() {
        for memory in [0, 32 << 20, (64 << 20) + 4096, MEMORY_MAX + MEMORY_STEP, u64::MAX] {
            let found = MachineConfig { memory, ..config() }.validate();
            assert_eq!(found, Err(ConfigError::Memory { memory }));
        }
        MachineConfig { memory: 64 << 20, ..config() }.validate().unwrap();
    }

    #[test]
    fn vcpus_are_1_to_32() {
        for vcpus in [0, 33, u32::MAX] {
            let found = MachineConfig { vcpus, ..config() }.validate();
            assert_eq!(found, Err(ConfigError::Vcpus { vcpus }));
        }
        MachineConfig { vcpus: 32, ..config() }.validate().unwrap();
    }

    #[test]
    fn a_deterministic_machine_has_one_vcpu_on_soft() {
        let deterministic = Some(Deterministic::default());
        let two = MachineConfig { vcpus: 2, deterministic, ..config() };
        assert_eq!(two.validate(), Err(ConfigError::DeterministicVcpus { vcpus: 2 }));
        let hvf = MachineConfig { backend: BackendKind::Hvf, deterministic, ..config() };
        let refused = ConfigError::DeterministicBackend { backend: BackendKind::Hvf };
        assert_eq!(hvf.validate(), Err(refused));
        MachineConfig { deterministic, ..config() }.validate().unwrap();
    }

    #[test]
    fn ids_stay_inside_a_folder_and_are_unique() {
        for id in ["", "..", "a/b", ".hidden", "ä", "abcdefghijklmnopqrstu"] {
            let found = MachineConfig { disks: vec![disk(id)], ..config() }.validate();
            assert_eq!(found, Err(ConfigError::DiskId { id: id.to_owned() }));
        }
        for disks in [vec![disk("a"), disk("a")], vec![disk("rng")]] {
            let found = MachineConfig { disks, ..config() }.validate();
            assert!(matches!(found, Err(ConfigError::DuplicateId { .. })));
        }
        for name in ["../x", "a b", ""] {
            let found = MachineConfig { name: name.to_owned(), ..config() }.validate();
            assert!(matches!(found, Err(ConfigError::Name { .. })));
        }
    }

    #[test]
    fn the_rng_takes_one_of_the_32_slots() {
        let disks: Vec<_> = (0..32).map(|n| disk(&format!("d{n}"))).collect();
        let full = MachineConfig { disks, ..config() };
        assert_eq!(full.validate(), Err(ConfigError::TooManyDevices { devices: 33 }));
        MachineConfig { rng: false, ..full }.validate().unwrap();
    }

    #[test]
    fn a_command_line_that_the_kernel_would_cut_off_is_refused() {
        let long = MachineConfig { cmdline: "x".repeat(2048), ..config() };
        assert_eq!(long.validate(), Err(ConfigError::CmdlineLength { length: 2048 }));
        let zero = MachineConfig { cmdline: "a\0b".into(), ..config() };
        assert_eq!(zero.validate(), Err(ConfigError::CmdlineZero { offset: 1 }));
    }

    #[test]
    fn only_a_machine_without_initrd_gets_a_root_device() {
        assert!(!default_cmdline(true, &[disk("a")]).contains("root="));
        assert!(!default_cmdline(false, &[]).contains("root="));
        assert!(default_cmdline(false, &[disk("a")]).ends_with("root=/dev/vda rw"));
        let read_only = DiskConfig { read_only: true, ..disk("a") };
        assert!(default_cmdline(false, &[read_only]).ends_with("root=/dev/vda ro"));
    }

    #[test]
    fn backends_go_by_name() {
        for kind in [BackendKind::Soft, BackendKind::Hvf, BackendKind::Kvm] {
            assert_eq!(kind.name().parse(), Ok(kind));
        }
        assert!("qemu".parse::<BackendKind>().is_err());
    }
}
