//! The command line.

use std::{path::PathBuf, str::FromStr};

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::{
    api::types::{DiskMode, DiskModeParam, Durability},
    exit,
};

/// Boot, snapshot and restore aarch64 Linux microVMs.
#[derive(Debug, Parser)]
#[command(name = "squib", version, after_help = exit::HELP, propagate_version = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Boot a kernel, with the guest's console on the terminal.
    Run(RunArgs),
    /// Create, restore and look into snapshots.
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
    /// Print the image digest of a raw file: equal to a snapshot's digest of a disk with the same bytes.
    Digest(DigestArgs),
    /// Boot a guest, snapshot it, restore it in a new process, and check that nothing was lost.
    Demo(DemoArgs),
    /// Fetch the guest kit: a Debian kernel, an initramfs, a root file system.
    #[command(subcommand)]
    Kit(KitCommand),
    /// List the running VMs.
    #[command(visible_alias = "ls")]
    Ps(PsArgs),
    /// Say what of this machine squib can use, what is missing, and what to do about it.
    Doctor(DoctorArgs),
}

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// The kernel: an arm64 Image, raw, gzip, zstd or EFI zboot.
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: PathBuf,
    /// The initial RAM file system.
    #[arg(long, value_name = "FILE")]
    pub(crate) initrd: Option<PathBuf>,
    /// A raw disk image; may be given several times, the first one is /dev/vda.
    #[arg(long = "disk", value_name = "PATH[,ro][,id=ID]")]
    pub(crate) disks: Vec<DiskArg>,
    /// Guest memory, in MiB or with a suffix K, M or G.
    #[arg(long, default_value = "256M", value_name = "SIZE")]
    pub(crate) memory: Size,
    /// Number of vCPUs.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub(crate) cpus: u32,
    /// The whole kernel command line [default: console=ttyS0 panic=-1, and without an initrd
    /// root=/dev/vda].
    #[arg(long, value_name = "WORDS", allow_hyphen_values = true)]
    pub(crate) cmdline: Option<String>,
    /// Name of the VM [default: vm-PID].
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// What runs the guest's instructions: soft, hvf or kvm.
    #[arg(long, default_value = "soft")]
    pub(crate) backend: String,
    /// Make every run the same: time is the count of retired instructions, randomness comes from --seed.
    #[arg(long)]
    pub(crate) deterministic: bool,
    /// Seed of a deterministic machine.
    #[arg(long, requires = "deterministic", default_value_t = 0, value_name = "N")]
    pub(crate) seed: u64,
    /// What a reset by the guest does.
    #[arg(long, value_enum, default_value_t = OnReset::Exit)]
    pub(crate) on_reset: OnReset,
    #[command(flatten)]
    pub(crate) common: VmArgs,
}

/// What `run` and `snapshot restore` share.
#[derive(Debug, Args)]
pub(crate) struct VmArgs {
    /// Print the milliseconds of each phase, up to the first console byte, to stderr.
    #[arg(
        long,
        value_enum,
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "text",
        value_name = "FORMAT"
    )]
    pub(crate) timings: Option<TimingsFormat>,
    /// Control socket [default: in the run-time folder].
    #[arg(long, value_name = "PATH")]
    pub(crate) api_sock: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum TimingsFormat {
    Text,
    Json,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OnReset {
    /// End with exit code 3.
    Exit,
    /// Boot the kernel again.
    Restart,
}

#[derive(Debug, Subcommand)]
pub(crate) enum SnapshotCommand {
    /// Write a snapshot of a running VM.
    Create(CreateArgs),
    /// Bring a snapshot back, with the guest's console on the terminal.
    Restore(RestoreArgs),
    /// Show what a snapshot is of.
    Inspect(InspectArgs),
    /// Check every byte of a snapshot.
    Verify(VerifyArgs),
    /// Make a full snapshot of a difference and all that it builds on.
    Flatten(FlattenArgs),
    /// List what differs between two snapshots, by region.
    Diff(DiffArgs),
    /// Say whether this host can restore a snapshot, before anything is made.
    Check(CheckArgs),
    /// Write a snapshot again as a difference to another parent, or without one.
    Rebase(RebaseArgs),
    /// Remove a snapshot, unless others build on it.
    Rm(RmArgs),
    /// Write a snapshot again with what `restore --record` found first in the file.
    Optimize(OptimizeArgs),
    /// The templates of `restore --mode template`.
    #[command(subcommand)]
    Cache(CacheCommand),
}

#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// The VM's name, or the path of its control socket (with a `/` in it).
    pub(crate) vm: String,
    /// The directory to write.
    #[arg(long, short, value_name = "DIR")]
    pub(crate) output: PathBuf,
    /// Store only what differs from this snapshot, which has to stay: the new one builds on it.
    #[arg(long, value_name = "PARENT_DIR")]
    pub(crate) diff: Option<PathBuf>,
    /// End the VM once the snapshot is safe.
    #[arg(long)]
    pub(crate) stop: bool,
    /// Let the guest go on as soon as its state is saved; memory and disks are written as they were at that
    /// moment.
    #[arg(long, conflicts_with = "stop")]
    pub(crate) live: bool,
    /// Where the bytes of the disks go: `capture` puts them into the snapshot; `reference` leaves them where
    /// they are, and a restore checks that they have not changed since. For all disks, or those of these ids;
    /// may be given several times [default: capture what the guest can write to].
    #[arg(long = "disk-mode", value_name = "capture|reference[=ID,...]")]
    pub(crate) disk_modes: Vec<DiskModeArg>,
    /// Copy and compress captured disks also where the file system could clone them into the snapshot, which
    /// takes no time and no room until the disk changes.
    #[arg(long)]
    pub(crate) no_reflink: bool,
    /// zstd level of the snapshot's frames [default: 1].
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub(crate) level: Option<i32>,
    /// Size of the chunks that are hashed, compressed and restored each on its own: a power of two from 16K
    /// to 4M [default: 64K].
    #[arg(long, value_name = "SIZE")]
    pub(crate) chunk_size: Option<Size>,
    /// Threads that hash and compress [default: all cores].
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<std::num::NonZeroUsize>,
    /// Replace a snapshot that is there.
    #[arg(long)]
    pub(crate) force: bool,
    /// What is synced to the storage before the snapshot is called safe.
    #[arg(long, value_enum, default_value_t = Durability::Full)]
    pub(crate) durability: Durability,
    /// Print the milliseconds of each phase.
    #[arg(long)]
    pub(crate) timings: bool,
    /// Print the report as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct RestoreArgs {
    /// The snapshot.
    pub(crate) dir: PathBuf,
    /// Where else to look for the snapshots that a difference builds on: a snapshot, or a directory of
    /// snapshots; may be given several times.
    #[arg(long = "parent", value_name = "DIR")]
    pub(crate) parents: Vec<PathBuf>,
    /// What runs the guest's instructions: soft, hvf or kvm [default: what the snapshot was taken with; another
    /// one is refused with everything that differs].
    #[arg(long, value_name = "NAME")]
    pub(crate) backend: Option<String>,
    /// Name of the VM [default: the one in the snapshot].
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// How memory comes back.
    #[arg(long, value_enum, default_value_t = ModeArg::Lazy)]
    pub(crate) mode: ModeArg,
    /// Bring memory only when the guest needs it, and when the VM ends write down beside the snapshot what
    /// that was and in which order: later restores bring it first.
    #[arg(long)]
    pub(crate) record: bool,
    /// Use this file as the snapshot's disk of that id; its bytes have to be those of the snapshot.
    #[arg(long = "disk", value_name = "ID=PATH")]
    pub(crate) disks: Vec<DiskPlace>,
    /// Existing directory in which the captured disks become files, ID.img each, that stay; they are whole
    /// before the guest runs [default: a private place, filled while it runs and removed when the VM ends].
    #[arg(long, value_name = "DIR")]
    pub(crate) disk_dir: Option<PathBuf>,
    /// Restore although a disk has changed since the snapshot: the guest's file system may be damaged.
    #[arg(long)]
    pub(crate) allow_changed_disks: bool,
    /// It is one of several copies: it gets a new identity.
    #[arg(long, conflicts_with = "same")]
    pub(crate) clone: bool,
    /// It is the one and only copy and keeps its identity [default].
    #[arg(long)]
    pub(crate) same: bool,
    /// What the guest's clock does with the time that passed since the snapshot.
    #[arg(long, value_enum, default_value_t = ClockArg::Freeze)]
    pub(crate) clock: ClockArg,
    /// Leave the guest paused; `PATCH /vm` on the control socket lets it run.
    #[arg(long)]
    pub(crate) paused: bool,
    #[command(flatten)]
    pub(crate) common: VmArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ModeArg {
    /// All of it before the guest runs.
    Eager,
    /// The guest runs at once; a chunk comes when it is first touched, and the others meanwhile.
    Lazy,
    /// A copy-on-write view of a raw file in the cache folder, which the first such restore makes.
    Template,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ClockArg {
    /// The virtual counter goes on from the saved value.
    Freeze,
    /// It is advanced by the wall time that passed.
    Advance,
}

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// The snapshot.
    pub(crate) dir: PathBuf,
    /// Where else to look for the snapshots that a difference builds on: a snapshot, or a directory of
    /// snapshots; may be given several times.
    #[arg(long = "parent", value_name = "DIR")]
    pub(crate) parents: Vec<PathBuf>,
    /// Print everything as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    /// The snapshot.
    pub(crate) dir: PathBuf,
    /// Where else to look for the snapshots that a difference builds on: a snapshot, or a directory of
    /// snapshots; may be given several times.
    #[arg(long = "parent", value_name = "DIR")]
    pub(crate) parents: Vec<PathBuf>,
    /// Print the result as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct FlattenArgs {
    /// The snapshot.
    pub(crate) dir: PathBuf,
    /// The directory to write.
    #[arg(long, short, value_name = "DIR")]
    pub(crate) output: PathBuf,
    /// Where else to look for the snapshots that a difference builds on: a snapshot, or a directory of
    /// snapshots; may be given several times.
    #[arg(long = "parent", value_name = "DIR")]
    pub(crate) parents: Vec<PathBuf>,
    /// What is synced to the storage before the snapshot is called safe.
    #[arg(long, value_enum, default_value_t = Durability::Full)]
    pub(crate) durability: Durability,
}

#[derive(Debug, Args)]
pub(crate) struct DiffArgs {
    /// The first snapshot.
    pub(crate) a: PathBuf,
    /// The second snapshot.
    pub(crate) b: PathBuf,
    /// Where else to look for the snapshots that a difference builds on: a snapshot, or a directory of
    /// snapshots; may be given several times.
    #[arg(long = "parent", value_name = "DIR")]
    pub(crate) parents: Vec<PathBuf>,
    /// Print everything as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// The snapshot.
    pub(crate) dir: PathBuf,
    /// Where else to look for the snapshots that a difference builds on: a snapshot, or a directory of
    /// snapshots; may be given several times.
    #[arg(long = "parent", value_name = "DIR")]
    pub(crate) parents: Vec<PathBuf>,
    /// What would run the guest's instructions: soft, hvf or kvm [default: what the snapshot was taken with].
    #[arg(long, value_name = "NAME")]
    pub(crate) backend: Option<String>,
    /// The file that a restore would use as the disk of that id.
    #[arg(long = "disk", value_name = "ID=PATH")]
    pub(crate) disks: Vec<DiskPlace>,
    /// Existing directory in which a restore would make the captured disks [default: the private place].
    #[arg(long, value_name = "DIR")]
    pub(crate) disk_dir: Option<PathBuf>,
    /// A restore would accept disks that have changed since the snapshot.
    #[arg(long)]
    pub(crate) allow_changed_disks: bool,
    /// Print the report as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct RebaseArgs {
    /// The snapshot.
    pub(crate) dir: PathBuf,
    /// The new parent, which has to stay; without it the snapshot is written in full, as by `flatten`.
    #[arg(long, value_name = "PARENT_DIR")]
    pub(crate) onto: Option<PathBuf>,
    /// The directory to write.
    #[arg(long, short, value_name = "DIR")]
    pub(crate) output: PathBuf,
    /// Where else to look for the snapshots that a difference builds on: a snapshot, or a directory of
    /// snapshots; may be given several times.
    #[arg(long = "parent", value_name = "DIR")]
    pub(crate) parents: Vec<PathBuf>,
    /// What is synced to the storage before the snapshot is called safe.
    #[arg(long, value_enum, default_value_t = Durability::Full)]
    pub(crate) durability: Durability,
}

#[derive(Debug, Args)]
pub(crate) struct OptimizeArgs {
    /// The snapshot.
    pub(crate) dir: PathBuf,
    /// The directory to write [default: the snapshot is replaced in one step, unless others build on it].
    #[arg(long, short, value_name = "DIR")]
    pub(crate) output: Option<PathBuf>,
    /// Where else to look for the snapshots that a difference builds on: a snapshot, or a directory of
    /// snapshots; may be given several times.
    #[arg(long = "parent", value_name = "DIR")]
    pub(crate) parents: Vec<PathBuf>,
    /// What is synced to the storage before the snapshot is called safe.
    #[arg(long, value_enum, default_value_t = Durability::Full)]
    pub(crate) durability: Durability,
}

#[derive(Debug, Subcommand)]
pub(crate) enum CacheCommand {
    /// List the templates, the least recently used first.
    Ls(CacheLsArgs),
    /// Remove the least recently used templates. VMs that use one are not disturbed.
    Prune(CachePruneArgs),
}

#[derive(Debug, Args)]
pub(crate) struct CacheLsArgs {
    /// Print the list as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CachePruneArgs {
    /// Let the others take at most this many bytes on the disk.
    #[arg(long, default_value = "0", value_name = "SIZE")]
    pub(crate) keep: Size,
    /// Print what was removed as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct RmArgs {
    /// The snapshot.
    pub(crate) dir: PathBuf,
    /// Remove it although others build on it, although the directory has other files in it, or although its
    /// manifest cannot be read.
    #[arg(long)]
    pub(crate) force: bool,
    /// Where else to look for snapshots that build on it: a snapshot, or a directory of snapshots; may be
    /// given several times.
    #[arg(long, value_name = "DIR")]
    pub(crate) also: Vec<PathBuf>,
    /// Print what was removed as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DigestArgs {
    /// The file; `-` is standard input.
    pub(crate) file: PathBuf,
    /// Print the result as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Number of vCPUs.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub(crate) cpus: u32,
    /// Guest memory.
    #[arg(long, default_value = "256M", value_name = "SIZE")]
    pub(crate) memory: Size,
    /// What runs the guest's instructions.
    #[arg(long, default_value = "soft")]
    pub(crate) backend: String,
    /// Use a deterministic machine.
    #[arg(long)]
    pub(crate) deterministic: bool,
    /// Another kernel than the guest kit's.
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,
    /// Keep the disk and the snapshot in this directory, which must not exist.
    #[arg(long, value_name = "DIR")]
    pub(crate) keep: Option<PathBuf>,
    /// Show the guest's console while it runs.
    #[arg(long)]
    pub(crate) console: bool,
    /// Print the result as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum KitCommand {
    /// Download and build what is not in the cache yet, and print the paths.
    Fetch(FetchArgs),
}

#[derive(Debug, Args)]
pub(crate) struct FetchArgs {
    /// Also make the Debian root file system with python3.
    #[arg(long)]
    pub(crate) rootfs: bool,
    /// A Debian archive instead of the machine's configured one.
    #[arg(long, value_name = "URL", env = "SQUIB_MIRROR")]
    pub(crate) mirror: Option<String>,
    /// Look for newer packages even if there is a kit.
    #[arg(long)]
    pub(crate) refresh: bool,
    /// Print the paths as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// Print the answers as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct PsArgs {
    /// Print the list as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// `PATH[,ro][,id=ID]`. A comma in the path is written twice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DiskArg {
    pub(crate) path: PathBuf,
    pub(crate) read_only: bool,
    pub(crate) id: Option<String>,
}

impl FromStr for DiskArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // A doubled comma stands for one inside the path; no argument holds a zero byte.
        let masked = text.replace(",,", "\0");
        let mut words = masked.split(',').map(|word| word.replace('\0', ","));
        let path = words.next().unwrap_or_default();
        if path.is_empty() {
            return Err("a path is expected: PATH[,ro][,id=ID]".into());
        }
        let mut disk = Self { path: path.into(), read_only: false, id: None };
        for word in words {
            match word.split_once('=') {
                None if word == "ro" && !disk.read_only => disk.read_only = true,
                Some(("id", id)) if disk.id.is_none() => disk.id = Some(id.to_owned()),
                _ => {
                    return Err(format!(
                        "`{word}` is not an option of a disk, or is given twice: \
                         PATH[,ro][,id=ID], a comma in the path written twice"
                    ));
                }
            }
        }
        Ok(disk)
    }
}

/// `ID=PATH`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DiskPlace {
    pub(crate) id: String,
    pub(crate) path: PathBuf,
}

impl FromStr for DiskPlace {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((id, path)) if !id.is_empty() && !path.is_empty() => {
                Ok(Self { id: id.to_owned(), path: path.into() })
            }
            _ => {
                Err("ID=PATH is expected, with the disk's id from `squib snapshot inspect`".into())
            }
        }
    }
}

/// capture|reference[=ID,...]: where the bytes of some disks, or without ids of all, go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DiskModeArg {
    pub(crate) mode: DiskMode,
    pub(crate) ids: Vec<String>,
}

impl FromStr for DiskModeArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not capture or reference, with =ID,... for some disks");
        let (mode, ids) = match text.split_once('=') {
            Some((mode, ids)) => (mode, ids.split(',').map(str::to_owned).collect()),
            None => (text, Vec::new()),
        };
        let mode = match mode {
            "capture" => DiskMode::Capture,
            "reference" => DiskMode::Reference,
            _ => return Err(wrong()),
        };
        if ids.iter().any(String::is_empty) {
            return Err(wrong());
        }
        Ok(Self { mode, ids })
    }
}

impl DiskModeArg {
    /// As the control API has it.
    pub(crate) fn params(&self) -> Vec<DiskModeParam> {
        let param = |disk_id| DiskModeParam { mode: self.mode, disk_id };
        match self.ids.is_empty() {
            true => vec![param(None)],
            false => self.ids.iter().cloned().map(Some).map(param).collect(),
        }
    }
}

/// A number of bytes: plain numbers are MiB, as is the suffix M; K, G and T likewise with powers of 1024.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size(pub(crate) u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not a size: 256, 256M and 1G are");
        let short = text.strip_suffix("iB").or_else(|| text.strip_suffix('B')).unwrap_or(text);
        let (digits, shift) = match short.chars().last().map(|c| c.to_ascii_uppercase()) {
            Some('K') => (&short[..short.len() - 1], 10),
            Some('M') => (&short[..short.len() - 1], 20),
            Some('G') => (&short[..short.len() - 1], 30),
            Some('T') => (&short[..short.len() - 1], 40),
            _ if short.len() == text.len() => (short, 20),
            _ => return Err(wrong()),
        };
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Err(wrong());
        }
        let number: u64 = digits.parse().map_err(|_| wrong())?;
        number.checked_mul(1 << shift).map(Self).ok_or_else(wrong)
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_are_mib_unless_they_say_otherwise() {
        for (text, bytes) in
            [("256", 256 << 20), ("256M", 256 << 20), ("1g", 1 << 30), ("65536KiB", 64 << 20)]
        {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for text in ["", "M", "-1", "1.5G", "12B", "99999999999T", "+1M", "ä"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_disk_mode_is_for_all_disks_or_for_some() {
        let param = |mode, id: Option<&str>| DiskModeParam { mode, disk_id: id.map(Into::into) };
        let params = |text: &str| text.parse::<DiskModeArg>().map(|mode| mode.params());
        assert_eq!(params("reference"), Ok(vec![param(DiskMode::Reference, None)]));
        let both = vec![param(DiskMode::Capture, Some("a")), param(DiskMode::Capture, Some("b"))];
        assert_eq!(params("capture=a,b"), Ok(both));
        for text in ["", "copy", "capture=", "reference=a,", "=a"] {
            assert!(params(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_disk_is_a_path_with_options() {
        let disk = |text: &str| text.parse::<DiskArg>();
        let plain = DiskArg { path: "a.img".into(), read_only: false, id: None };
        assert_eq!(disk("a.img"), Ok(plain.clone()));
        let full = DiskArg { read_only: true, id: Some("data".into()), ..plain };
        assert_eq!(disk("a.img,ro,id=data"), Ok(full.clone()));
        assert_eq!(disk("a,,b.img,ro").unwrap().path, PathBuf::from("a,b.img"));
        for text in ["", ",ro", "a,rw", "a,ro,ro", "a,id=x,id=y", "a,"] {
            assert!(disk(text).is_err(), "{text}");
        }
    }

    #[test]
    fn run_takes_what_the_issue_asks_for() {
        let cli = Cli::try_parse_from([
            "squib",
            "run",
            "--kernel",
            "K",
            "--initrd",
            "I",
            "--disk",
            "D,ro",
            "--disk",
            "E,id=e",
            "--memory",
            "256M",
            "--cpus",
            "2",
            "--cmdline",
            "console=ttyS0",
            "--name",
            "n",
            "--backend",
            "soft",
            "--on-reset",
            "restart",
            "--timings",
        ]);
        let Command::Run(run) = cli.unwrap().command else { panic!("not run") };
        assert_eq!(run.disks.len(), 2);
        assert_eq!(run.memory, Size(256 << 20));
        assert_eq!(run.common.timings, Some(TimingsFormat::Text));
    }
}
