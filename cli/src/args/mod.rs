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
    #[arg(long, default_value = "256M", value_name = "SIZE", value_parser = memory)]
    pub(crate) memory: Size,
    /// Number of vCPUs.
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = cpus)]
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
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = cpus)]
    pub(crate) cpus: u32,
    /// Guest memory.
    #[arg(long, default_value = "256M", value_name = "SIZE", value_parser = memory)]
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

    /// What a number must survive: the ends of what types hold, and what is none.
    const EXTREMES: [&str; 22] = [
        "0",
        "1",
        "-0",
        "-1",
        "+1",
        "4294967295",
        "4294967296",
        "9223372036854775807",
        "9223372036854775808",
        "-9223372036854775808",
        "18446744073709551614",
        "18446744073709551615",
        "18446744073709551616",
        "340282366920938463463374607431768211456",
        "16777216T",
        "99999999999999999999T",
        "1.5",
        "1e9",
        "NaN",
        "inf",
        "0x10",
        "",
    ];
    /// Those that are no number of anything.
    const NO_NUMBERS: [&str; 6] = ["1.5", "1e9", "NaN", "inf", "0x10", ""];

    /// The words that lead to each command, and what it takes.
    fn commands(command: &clap::Command, words: &[String]) -> Vec<(Vec<String>, clap::Command)> {
        let mut all = vec![(words.to_vec(), command.clone())];
        for sub in command.get_subcommands() {
            let words = [words, &[sub.get_name().to_owned()]].concat();
            all.extend(commands(sub, &words));
        }
        all
    }

    /// The command line with `value` for `arg`, and something for whatever else has to be there.
    fn line(
        words: &[String],
        command: &clap::Command,
        arg: &clap::Arg,
        value: &str,
    ) -> Vec<String> {
        let mut line = words.to_vec();
        let name = |arg: &clap::Arg| arg.get_long().map(|long| format!("--{long}"));
        for other in command.get_arguments().filter(|other| other.is_required_set()) {
            if other.get_id() != arg.get_id() {
                line.extend(name(other));
                line.push("x".into());
            }
        }
        // What `--seed` needs.
        line.extend((arg.get_id() == "seed").then(|| "--deterministic".to_owned()));
        line.push(match name(arg) {
            Some(name) => format!("{name}={value}"),
            None => value.to_owned(),
        });
        line
    }

    #[test]
    fn every_option_survives_every_number_and_a_numeric_one_takes_only_what_it_can_use() {
        let is_number = |arg: &clap::Arg| {
            let id = arg.get_value_parser().type_id();
            id == std::any::TypeId::of::<Size>()
                || id == std::any::TypeId::of::<u64>()
                || id == std::any::TypeId::of::<u32>()
                || id == std::any::TypeId::of::<i32>()
                || id == std::any::TypeId::of::<std::num::NonZeroUsize>()
        };
        let mut numeric = Vec::new();
        for (words, command) in commands(&Cli::command(), &["squib".into()]) {
            for arg in command.get_arguments().filter(|arg| arg.get_action().takes_values()) {
                for value in EXTREMES {
                    // No panic is the test.
                    let parsed = Cli::try_parse_from(line(&words, &command, arg, value));
                    if is_number(arg) && NO_NUMBERS.contains(&value) {
                        assert!(parsed.is_err(), "{words:?} {} {value}", arg.get_id());
                    }
                }
                // By its name for people a number, so that the walk sees every one.
                let said = arg.get_value_names().unwrap_or_default();
                let is_said = said.iter().any(|name| name == "N" || name == "SIZE");
                assert_eq!(is_said, is_number(arg), "{words:?} {}", arg.get_id());
                if is_number(arg) {
                    numeric.push(arg.get_id().to_string());
                }
            }
        }
        numeric.sort();
        let known =
            ["chunk_size", "cpus", "cpus", "keep", "level", "memory", "memory", "seed", "threads"];
        // A new one gets its bounds, and then a line in the test of bounds.
        assert_eq!(numeric, known);
    }

    #[test]
    fn the_bounds_of_numbers_are_those_of_what_they_count() {
        let run = ["squib", "run", "--kernel=K"];
        let demo = ["squib", "demo"];
        let create = ["squib", "snapshot", "create", "a", "--output=o"];
        let prune = ["squib", "snapshot", "cache", "prune"];
        let most_memory = "1046528M";
        for (words, flag, taken, refused) in [
            (&run[..], "cpus", &["1", "32"][..], &["0", "33", "4294967297", "-1"][..]),
            (&demo, "cpus", &["1", "32"], &["0", "33"]),
            (&run, "memory", &["64M", most_memory], &["0", "63M", "65M", "1023G", "16777216T"]),
            (&demo, "memory", &["64M", most_memory], &["0", "62M", "1T"]),
            (&run, "seed", &["0", "18446744073709551615"], &["-1", "18446744073709551616"]),
            (&create, "threads", &["1", "256"], &["0", "257", "9223372036854775808", "-1"]),
            (&create, "level", &["-131072", "0", "22"], &["-131073", "23", "9223372036854775808"]),
            (&create, "chunk-size", &["16K", "64K", "4M", "4"], &["0", "8K", "17K", "8M", "4096G"]),
            (&prune, "keep", &["0", "16777215T"], &["-1", "16777216T"]),
        ] {
            let parse = |value: &str| {
                let more = (flag == "seed").then_some("--deterministic".to_owned());
                let words = words.iter().map(|word| (*word).to_owned()).chain(more);
                Cli::try_parse_from(words.chain([format!("--{flag}={value}")]))
            };
            for value in taken {
                assert!(parse(value).is_ok(), "--{flag}={value}: {:?}", parse(value));
            }
            for value in refused {
                let error = parse(value).expect_err(value).to_string();
                assert!(error.contains(value), "--{flag}={value}: {error}");
            }
        }
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
