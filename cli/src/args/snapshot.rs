//! `squib snapshot`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::{DiskModeArg, DiskPlace, OnReset, Size, VmArgs, chunk_size, threads};
use crate::api::types::Durability;

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

impl SnapshotCommand {
    /// Whether the command was asked to print JSON.
    pub(super) fn is_json(&self) -> bool {
        match self {
            Self::Restore(_) => false,
            Self::Create(args) => args.json,
            Self::Inspect(args) => args.json,
            Self::Verify(args) => args.json,
            Self::Flatten(args) => args.json,
            Self::Diff(args) => args.json,
            Self::Check(args) => args.json,
            Self::Rebase(args) => args.json,
            Self::Rm(args) => args.json,
            Self::Optimize(args) => args.json,
            Self::Cache(CacheCommand::Ls(args)) => args.json,
            Self::Cache(CacheCommand::Prune(args)) => args.json,
        }
    }
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
    /// Put the kernel and the initrd into the snapshot too, so that a restored guest can boot again wherever it
    /// is.
    #[arg(long)]
    pub(crate) with_kernel: bool,
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
    #[arg(
        long,
        value_name = "N",
        allow_hyphen_values = true,
        value_parser = clap::value_parser!(i32).range(zstd_levels())
    )]
    pub(crate) level: Option<i32>,
    /// Size of the chunks that are hashed, compressed and restored each on its own: a power of two from 16K
    /// to 4M [default: 64K].
    #[arg(long, value_name = "SIZE", value_parser = chunk_size)]
    pub(crate) chunk_size: Option<u32>,
    /// Threads that hash and compress [default: all cores].
    #[arg(long, value_name = "N", value_parser = threads)]
    pub(crate) threads: Option<std::num::NonZeroUsize>,
    /// Replace a snapshot that is there, unless others build on it.
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
    #[command(flatten)]
    pub(crate) chain: ChainArgs,
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
    /// Let the snapshot use a disk outside of it where it says that the disk lies, if that is at or below this
    /// path; may be given several times. Such a disk is a file of this host that the guest may read and write.
    #[arg(long = "allow-disk", value_name = "PATH-PREFIX")]
    pub(crate) allowed_disks: Vec<PathBuf>,
    /// Existing directory in which the captured disks become files, ID.img each, that stay; they are whole
    /// before the guest runs [default: a private place, filled while it runs and removed when the VM ends].
    #[arg(long, value_name = "DIR")]
    pub(crate) disk_dir: Option<PathBuf>,
    /// Restore although a disk has changed since the snapshot: the guest's file system may be damaged.
    #[arg(long)]
    pub(crate) allow_changed_disks: bool,
    /// Restore although the machine's memory is far above this host's, or what would be loaded is more than is
    /// available: the system may have to end programs.
    #[arg(long)]
    pub(crate) overcommit: bool,
    /// It is one of several copies: it gets a new identity.
    #[arg(long, conflicts_with = "same")]
    pub(crate) clone: bool,
    /// It is the one and only copy and keeps its identity [default].
    #[arg(long)]
    pub(crate) same: bool,
    /// What the guest's clock does with the time that passed since the snapshot.
    #[arg(long, value_enum, default_value_t = ClockArg::Freeze)]
    pub(crate) clock: ClockArg,
    /// What a reset by the guest does [default: what the snapshot says].
    #[arg(long, value_enum)]
    pub(crate) on_reset: Option<OnReset>,
    /// The kernel that a reset boots again; it must be the one that the guest was booted from [default: the
    /// one in the snapshot, or where it was].
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,
    /// The initial RAM file system that a reset boots again, as for --kernel.
    #[arg(long, value_name = "FILE")]
    pub(crate) initrd: Option<PathBuf>,
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
    /// The wall clock is right: up to 3 seconds by moving the counter, more through the RTC, which the guest must follow
    /// (docs/time.md).
    Advance,
}

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// The snapshot.
    pub(crate) dir: PathBuf,
    #[command(flatten)]
    pub(crate) chain: ChainArgs,
    /// Print everything as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    /// The snapshot.
    pub(crate) dir: PathBuf,
    #[command(flatten)]
    pub(crate) chain: ChainArgs,
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
    #[command(flatten)]
    pub(crate) chain: ChainArgs,
    /// What is synced to the storage before the snapshot is called safe.
    #[arg(long, value_enum, default_value_t = Durability::Full)]
    pub(crate) durability: Durability,
    /// Replace a snapshot that is at the output, unless others build on it.
    #[arg(long)]
    pub(crate) force: bool,
    /// Print the report as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DiffArgs {
    /// The first snapshot.
    pub(crate) a: PathBuf,
    /// The second snapshot.
    pub(crate) b: PathBuf,
    #[command(flatten)]
    pub(crate) chain: ChainArgs,
    /// Print everything as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// The snapshot.
    pub(crate) dir: PathBuf,
    #[command(flatten)]
    pub(crate) chain: ChainArgs,
    /// What would run the guest's instructions: soft, hvf or kvm [default: what the snapshot was taken with].
    #[arg(long, value_name = "NAME")]
    pub(crate) backend: Option<String>,
    /// The file that a restore would use as the disk of that id.
    #[arg(long = "disk", value_name = "ID=PATH")]
    pub(crate) disks: Vec<DiskPlace>,
    /// Where a restore would let the snapshot use disks outside of it; may be given several times.
    #[arg(long = "allow-disk", value_name = "PATH-PREFIX")]
    pub(crate) allowed_disks: Vec<PathBuf>,
    /// Existing directory in which a restore would make the captured disks [default: the private place].
    #[arg(long, value_name = "DIR")]
    pub(crate) disk_dir: Option<PathBuf>,
    /// A restore would accept disks that have changed since the snapshot.
    #[arg(long)]
    pub(crate) allow_changed_disks: bool,
    /// How memory would come back.
    #[arg(long, value_enum, default_value_t = ModeArg::Lazy)]
    pub(crate) mode: ModeArg,
    /// A restore would be told to go on with less memory than it takes.
    #[arg(long)]
    pub(crate) overcommit: bool,
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
    #[command(flatten)]
    pub(crate) chain: ChainArgs,
    /// What is synced to the storage before the snapshot is called safe.
    #[arg(long, value_enum, default_value_t = Durability::Full)]
    pub(crate) durability: Durability,
    /// Replace a snapshot that is at the output, unless others build on it.
    #[arg(long)]
    pub(crate) force: bool,
    /// Print the report as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct OptimizeArgs {
    /// The snapshot.
    pub(crate) dir: PathBuf,
    /// The directory to write [default: the snapshot is replaced in one step, unless others build on it].
    #[arg(long, short, value_name = "DIR")]
    pub(crate) output: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) chain: ChainArgs,
    /// What is synced to the storage before the snapshot is called safe.
    #[arg(long, value_enum, default_value_t = Durability::Full)]
    pub(crate) durability: Durability,
    /// Replace a snapshot that is at the output, unless others build on it.
    #[arg(long, requires = "output")]
    pub(crate) force: bool,
    /// Print the report as JSON.
    #[arg(long)]
    pub(crate) json: bool,
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

fn zstd_levels() -> std::ops::RangeInclusive<i64> {
    let levels = squib_formats::image::levels();
    i64::from(*levels.start())..=i64::from(*levels.end())
}

/// Where a difference's parents are.
#[derive(Debug, Clone, Args)]
pub(crate) struct ChainArgs {
    /// Where else to look for the snapshots that a difference builds on: a snapshot, or a directory of
    /// snapshots; may be given several times.
    #[arg(long = "parent", value_name = "DIR")]
    pub(crate) parents: Vec<PathBuf>,
}
