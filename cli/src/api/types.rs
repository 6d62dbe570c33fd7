//! The bodies of the control API, in Firecracker's shapes; squib's own fields are optional additions.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// `GET /`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceInfo {
    /// "squib".
    pub app_name: String,
    /// The VM's name.
    pub id: String,
    /// What the VM does.
    pub state: InstanceState,
    /// Version of this build.
    pub vmm_version: String,
}

/// The states of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum InstanceState {
    /// Between creation and the first instruction.
    #[serde(rename = "Not started")]
    NotStarted,
    /// The guest runs.
    Running,
    /// The guest's time stands still.
    Paused,
}

/// `PATCH /vm`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vm {
    /// The state asked for.
    pub state: VmState,
}

/// The states that `PATCH /vm` takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmState {
    /// Bring the guest to rest.
    Paused,
    /// Let it run.
    Resumed,
}

/// `PUT /snapshot/create`.
///
/// A snapshot of squib's is one directory. `snapshot_path` names it; `mem_file_path`, which
/// Firecracker demands, may be left out, or has to be `memory.zst` in that directory, where the memory
/// goes anyway.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotCreateParams {
    /// The directory to write. Relative paths are relative to the VM's process.
    pub snapshot_path: PathBuf,
    /// See above.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem_file_path: Option<PathBuf>,
    /// `Full` (default), or `Diff`, which needs `parent_path`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot_type: Option<SnapshotType>,
    /// squib: the snapshot that a `Diff` builds on; it has to stay. Relative paths are relative to the VM's
    /// process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent_path: Option<PathBuf>,
    /// squib: replace a snapshot that is there.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub force: bool,
    /// squib: end the VM once the snapshot is safe.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stop: bool,
    /// squib: let the guest go on as soon as its state is saved, while memory and disks are written as they
    /// were then. Not together with `stop`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub live: bool,
    /// squib: put the kernel and the initrd into the snapshot too.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub with_kernel: bool,
    /// squib: zstd level of the frames.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub level: Option<i32>,
    /// squib: size of a chunk in bytes, a power of two from 16 KiB to 4 MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chunk_size: Option<u32>,
    /// squib: threads that hash and compress.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threads: Option<std::num::NonZeroUsize>,
    /// squib: where the bytes of disks go. A mode for one disk goes before one for all. Without any, a disk is
    /// captured if the guest can write to it, else referenced.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disk_mode: Vec<DiskModeParam>,
    /// squib: copy and compress captured disks also where the file system could clone them.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub no_reflink: bool,
    /// squib: what is synced to the storage before the snapshot is called safe.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub durability: Option<Durability>,
}

/// Where the bytes of a disk, or of all, go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskModeParam {
    /// Where they go.
    pub mode: DiskMode,
    /// The disk's id; without it, all disks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_id: Option<String>,
}

/// Where the bytes of a disk go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskMode {
    /// Into the snapshot.
    Capture,
    /// They stay where they are; a restore checks that they are unchanged.
    Reference,
}

/// Firecracker's kinds of snapshots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SnapshotType {
    /// All of memory.
    Full,
    /// What differs from `parent_path`.
    Diff,
}

/// How safe a snapshot is when it is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// Every file and directory is synced: it survives a power failure.
    Full,
    /// Nothing is synced: it survives the end of the process only. For snapshots that live briefly.
    None,
}

/// squib's answer to `PUT /snapshot/create` when the request says `Prefer: return=representation`
/// (RFC 7240); without it the answer is 204, as Firecracker's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SnapshotReport {
    /// The directory.
    pub path: PathBuf,
    /// The snapshot's id.
    pub id: String,
    /// Image digest of the guest's memory.
    pub memory_digest: String,
    /// Each captured disk.
    pub disks: Vec<DiskReport>,
    /// Size of guest memory, bytes.
    pub memory_bytes: u64,
    /// Size of guest memory and of the disks that the snapshot holds, bytes.
    pub raw_bytes: u64,
    /// Bytes of all the snapshot's files but its manifest.
    pub stored_bytes: u64,
    /// How long the guest stood still for it; 0 if it was paused before.
    pub downtime_ms: f64,
    /// Each phase and the milliseconds that it took, in order.
    pub timings: Vec<Phase>,
}

/// One disk of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskReport {
    /// The disk's id.
    pub id: String,
    /// Its image digest.
    pub digest: String,
    /// Its size, bytes.
    pub bytes: u64,
}

/// A phase of a run, a capture or a restore.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Phase {
    /// What was done.
    pub name: String,
    /// How long it took.
    pub ms: f64,
}

/// `GET /snapshot/progress` (squib's own): how far a running create is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotProgress {
    /// What is being done ("memory", "disk vda"); empty while no snapshot is being written.
    pub phase: String,
    /// Bytes of that which are done.
    pub done: u64,
    /// All bytes of that; 0 where bytes are not the measure.
    pub total: u64,
    /// Bytes that lie on the disk for those which are done.
    pub stored: u64,
}

/// The body of every error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Error {
    /// What went wrong.
    pub fault_message: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn firecrackers_own_request_is_understood() {
        let body =
            r#"{"snapshot_type": "Full", "snapshot_path": "/s", "mem_file_path": "/s/memory.zst"}"#;
        let params: SnapshotCreateParams = serde_json::from_str(body).unwrap();
        assert_eq!(params.snapshot_path, PathBuf::from("/s"));
        assert_eq!(params.snapshot_type, Some(SnapshotType::Full));
        assert!(!params.stop && !params.force);
    }

    #[test]
    fn disks_have_modes_each_or_all_together() {
        let body = r#"{"snapshot_path": "/s",
            "disk_mode": [{"mode": "reference"}, {"mode": "capture", "disk_id": "root"}]}"#;
        let params: SnapshotCreateParams = serde_json::from_str(body).unwrap();
        let mode = |mode, id: Option<&str>| DiskModeParam { mode, disk_id: id.map(Into::into) };
        let expected = [mode(DiskMode::Reference, None), mode(DiskMode::Capture, Some("root"))];
        assert_eq!(params.disk_mode, expected);
    }

    #[test]
    fn a_field_that_nobody_knows_is_refused() {
        let body = r#"{"snapshot_path": "/s", "snapshot_pth": "/t"}"#;
        let error = serde_json::from_str::<SnapshotCreateParams>(body).unwrap_err();
        assert!(error.to_string().contains("snapshot_pth"), "{error}");
    }

    #[test]
    fn states_have_firecrackers_names() {
        let text = serde_json::to_string(&InstanceState::NotStarted).unwrap();
        assert_eq!(text, "\"Not started\"");
    }
}
