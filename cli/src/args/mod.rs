//! The command line.

mod advice;
mod snapshot;
mod values;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

pub(crate) use self::{
    advice::{advice, check_suggestion},
    snapshot::*,
    values::*,
};
use crate::exit;

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

impl Command {
    /// Whether the command was asked to print JSON.
    pub(crate) fn is_json(&self) -> bool {
        match self {
            Self::Run(_) | Self::Kit(KitCommand::Path { .. }) => false,
            Self::Snapshot(command) => command.is_json(),
            Self::Digest(args) => args.json,
            Self::Demo(args) => args.json,
            Self::Kit(KitCommand::Fetch(args)) => args.json,
            Self::Ps(args) => args.json,
            Self::Doctor(args) => args.json,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// The kernel: an arm64 Image, raw, gzip, zstd or EFI zboot [default: the guest kit's].
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,
    /// The initial RAM file system [default: the guest kit's with the guest kit's kernel, none with another].
    #[arg(long, value_name = "FILE")]
    pub(crate) initrd: Option<PathBuf>,
    /// A raw disk image; may be given several times, the first one is /dev/vda. `format=raw` takes as raw bytes
    /// what looks like an image in a format of its own.
    #[arg(long = "disk", value_name = "PATH[,ro][,id=ID][,format=raw]")]
    pub(crate) disks: Vec<DiskArg>,
    /// Guest memory, in MiB or with a suffix K, M or G.
    #[arg(long, default_value = "256M", value_name = "SIZE")]
    pub(crate) memory: Size,
    /// Number of vCPUs.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub(crate) cpus: u32,
    /// The whole kernel command line [default: console=ttyS0 panic=-1 reboot=panic_warm, and without an
    /// initrd root=/dev/vda]. `reboot=panic_warm` makes Linux tell a panic from another reset.
    #[arg(long, value_name = "WORDS", allow_hyphen_values = true)]
    pub(crate) cmdline: Option<String>,
    /// Name of the VM [default: vm-PID].
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// What runs the guest's instructions: soft, hvf or kvm.
    #[arg(long, default_value = "soft")]
    pub(crate) backend: String,
    /// Make every run the same: time is the count of retired instructions, randomness comes from --seed. One
    /// vCPU, on soft.
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

impl From<OnReset> for squib_vmm::config::OnReset {
    fn from(choice: OnReset) -> Self {
        match choice {
            OnReset::Exit => Self::Exit,
            OnReset::Restart => Self::Restart,
        }
    }
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
    /// Use a deterministic machine, which has one vCPU.
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
    /// Print the path of a file of the kit in the cache.
    Path {
        /// Which file.
        #[arg(value_enum)]
        file: KitFile,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum KitFile {
    /// The kernel.
    Kernel,
    /// The initial RAM file system.
    Initrd,
    /// The Debian root file system.
    Rootfs,
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

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn run_takes_all_its_flags() {
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
