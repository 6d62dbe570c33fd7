//! Foreign programs in the guest: a C compiler, gdb, node and java on Debian's root file system.
//!
//! What they should print lies beside their scripts in `tests/guest/programs`: of gcc, node and java what the same
//! script prints on another CPU, of gdb what its session has to show.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use rustix::time::{ClockId, clock_gettime};
use squib::kit::{FetchOptions, Kit};
use squib_vmm::{
    config::{DiskConfig, MachineConfig},
    machine::Machine,
};

use crate::console::Capture;

/// What is on the root file system beside the kit's packages.
const PACKAGES: [&str; 5] = ["gdb", "gcc", "libc6-dev", "nodejs", "openjdk-21-jre-headless"];
/// Longer than the slowest host takes for the boot or a program.
const PATIENCE: Duration = Duration::from_secs(1800);
/// How the prompt of its shell begins.
const PROMPT: &str = "bash-";

/// A script of `tests/guest/programs`.
#[derive(Clone, Copy, Debug)]
pub struct Program {
    /// What it is called.
    pub name: &'static str,
    script: &'static str,
    expected: &'static str,
}

macro_rules! program {
    ($name:literal) => {
        Program {
            name: $name,
            script: include_str!(concat!("../guest/programs/", $name, ".sh")),
            expected: include_str!(concat!("../guest/programs/", $name, ".out")),
        }
    };
}

/// All of them.
pub const PROGRAMS: [Program; 4] =
    [program!("gcc"), program!("gdb"), program!("node"), program!("java")];

impl Program {
    /// The first line of what it `printed` that is not as expected; `None` if all are.
    pub fn difference(&self, printed: &str) -> Option<String> {
        let printed = masked(printed);
        let (mut ours, mut theirs) = (printed.lines(), self.expected.trim().lines());
        for number in 1.. {
            match (ours.next(), theirs.next()) {
                (None, None) => return None,
                (ours, theirs) if ours == theirs => {}
                (ours, theirs) => {
                    let [ours, theirs] = [ours, theirs].map(|line| line.unwrap_or("(the end)"));
                    return Some(format!("line {number} is `{ours}` instead of `{theirs}`"));
                }
            }
        }
        None
    }
}

/// What a program did in the guest.
pub struct Ran {
    /// What it printed.
    pub printed: String,
    /// CPU time of this process, which is the machine's.
    pub cpu: Duration,
    /// Time on the wall.
    pub took: Duration,
}

/// The kit, with a root file system that holds the programs.
pub fn kit() -> Result<Kit> {
    let packages = PACKAGES.map(str::to_owned).to_vec();
    let options = FetchOptions { rootfs: true, packages, ..FetchOptions::default() };
    Ok(Kit::fetch(&options, &|what| eprintln!("{what}"))?)
}

/// Boots Debian with copies of its disks in `folder`, runs `programs`, and tells `done` of each.
pub fn run(
    kit: &Kit,
    programs: &[Program],
    vcpus: u32,
    folder: &Path,
    mut done: impl FnMut(&str, Ran),
) -> Result<()> {
    let rootfs = kit.rootfs.as_ref().context("the kit has no root file system")?;
    let mut config = MachineConfig::new("programs", kit.kernel.clone());
    config.initrd = Some(kit.initrd.clone());
    config.cmdline = "console=ttyS0 quiet panic=-1 root=/dev/vda".into();
    config.memory = 1 << 30;
    config.vcpus = vcpus;
    let root = folder.join("root.ext4");
    fs::copy(rootfs, &root).with_context(|| format!("{}", rootfs.display()))?;
    config.disks.push(DiskConfig { id: "root".into(), path: root, read_only: false });
    for program in programs {
        // Filled up with empty lines to a whole number of sectors.
        let mut script = program.script.as_bytes().to_vec();
        script.resize(script.len().next_multiple_of(512), b'\n');
        let path = folder.join(program.name);
        fs::write(&path, script)?;
        config.disks.push(DiskConfig { id: program.name.into(), path, read_only: true });
    }
    let console = Capture::default();
    let machine = Machine::boot(config, Box::new(console.clone()))?;
    let result = (|| {
        let before = (Instant::now(), cpu_time());
        machine.resume()?;
        wait(&console, |text| text.contains(PROMPT).then(String::new))?;
        done("boot", since(before, String::new()));
        for (n, program) in programs.iter().enumerate() {
            let before = (Instant::now(), cpu_time());
            // The shell echoes what it reads, but not with the sums done.
            let disk = char::from(b'b' + n as u8);
            let line = format!(
                "echo @$(({n}))s@; sh /dev/vd{disk} < /dev/null 2>&1 | cat; echo @$(({n}))e@\n"
            );
            machine.console_input().send(line.as_bytes())?;
            let printed = wait(&console, |text| between(text, n))?;
            done(program.name, since(before, printed));
        }
        Ok(())
    })();
    machine.stop();
    result
}

fn wait(console: &Capture, found: impl Fn(&str) -> Option<String>) -> Result<String> {
    const PANIC: &str = "Kernel panic";
    let over = |text: &str| found(text).or_else(|| text.contains(PANIC).then(|| PANIC.into()));
    match console.wait_for(PATIENCE, over) {
        Some(text) if text != PANIC => Ok(text),
        _ => bail!("the guest does not go on: {}", console.text()),
    }
}

/// What the `n`th program printed in `text`, if it has ended.
fn between(text: &str, n: usize) -> Option<String> {
    let (_, rest) = text.split_once(&format!("@{n}s@"))?;
    let (printed, _) = rest.split_once(&format!("@{n}e@"))?;
    Some(printed.replace('\r', "").trim().to_owned())
}

/// `text` without what differs from run to run: addresses and process numbers.
fn masked(text: &str) -> String {
    let mut masked = String::new();
    let mut rest = text;
    while let Some((at, mark)) =
        ["0x", "process "].iter().filter_map(|mark| Some((rest.find(mark)?, mark))).min()
    {
        let (before, after) = rest.split_at(at + mark.len());
        let radix = if *mark == "0x" { 16 } else { 10 };
        let number = after.trim_start_matches(|c: char| c.is_digit(radix));
        masked += before;
        masked += if number.len() < after.len() { "N" } else { "" };
        rest = number;
    }
    masked + rest
}

fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn since((instant, cpu): (Instant, Duration), printed: String) -> Ran {
    Ran { printed, cpu: cpu_time().saturating_sub(cpu), took: instant.elapsed() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROGRAM: Program =
        Program { name: "x", script: "", expected: "a\nat 0xN\nprocess N) \n" };

    #[test]
    fn only_addresses_and_process_numbers_may_differ() {
        assert_eq!(PROGRAM.difference("a\nat 0x12ef\nprocess 12)"), None);
        let line = PROGRAM.difference("a\nat 0x12ef\nprocess twelve)").unwrap();
        assert_eq!(line, "line 3 is `process twelve)` instead of `process N)`");
        assert!(PROGRAM.difference("b\nat 0x12ef\nprocess 12)").unwrap().starts_with("line 1 "));
    }

    #[test]
    fn a_missing_line_and_one_too_many_are_differences() {
        let missing = PROGRAM.difference("a\nat 0x1").unwrap();
        assert_eq!(missing, "line 3 is `(the end)` instead of `process N)`");
        let more = PROGRAM.difference("a\nat 0x1\nprocess 1)\nb").unwrap();
        assert_eq!(more, "line 4 is `b` instead of `(the end)`");
    }

    #[test]
    fn what_a_program_prints_ends_at_its_mark_and_not_at_the_echo_of_the_command() {
        let echo = "# echo @$((0))s@; sh; echo @$((0))e@\r\n@0s@\r\nfour\r\n";
        assert_eq!(between(echo, 0), None);
        assert_eq!(between(&format!("{echo}@0e@\r\n"), 0).unwrap(), "four");
    }
}
