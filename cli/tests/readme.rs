//! Every console block of the README, run as it stands there; what is printed must have the shape that is
//! shown: equal words where there are no numbers, digests, paths or versions.
#![expect(clippy::disallowed_macros, reason = "a test says what it skips")]

use std::{
    collections::BTreeMap,
    fs::File,
    io::Write,
    os::unix::{ffi::OsStrExt, fs::OpenOptionsExt, fs::symlink},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use rustix::{
    fs::OFlags,
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
};
use squib_tests::console::Capture;

const README: &str = include_str!("../../README.md");
/// Longer than the slowest host takes for a step.
const PATIENCE: Duration = Duration::from_secs(300);
/// What the guest's shell prints before it reads a command.
const PROMPT: &str = "bash-5.2# ";

/// Commands that would build or test this very tree again, and who runs them instead.
const RUN_ELSEWHERE: &[&str] = &[
    // This test is part of it.
    "cargo test --workspace",
    "cargo install --path cli",
    // Their own tests run them in a short form.
    "cargo run --release -p squib-tests --bin transparency -- --help",
    "cargo run --release -p squib-tests --bin versus -- --help",
];

/// A command of a block and the lines that it prints.
#[derive(Debug)]
struct Step {
    command: String,
    output: Vec<String>,
}

fn blocks(text: &str) -> Vec<Vec<Step>> {
    let mut blocks = Vec::new();
    let mut lines = text.lines();
    while lines.any(|line| line == "```console") {
        let mut steps: Vec<Step> = Vec::new();
        for line in lines.by_ref().take_while(|line| *line != "```") {
            match (line.strip_prefix("$ "), steps.last_mut()) {
                (Some(command), _) => {
                    steps.push(Step { command: command.to_owned(), output: Vec::new() });
                }
                (None, Some(step)) => step.output.push(line.to_owned()),
                (None, None) => panic!("a block begins with output: {line}"),
            }
        }
        blocks.push(steps);
    }
    blocks
}

/// The line with every word that holds a digit or a slash as `#`: numbers, digests, versions, paths.
fn shape(line: &str) -> String {
    let word = |word: &str| {
        let varies = word.contains(|c: char| c.is_ascii_digit() || c == '/');
        // A unit depends on its number.
        let unit = matches!(word, "B" | "KiB" | "MiB" | "GiB");
        if varies || unit { "#".to_owned() } else { word.to_owned() }
    };
    line.split_whitespace().map(word).collect::<Vec<_>>().join(" ")
}

/// The text without what moves a terminal's cursor or changes its modes (ECMA-48, 5.4: CSI, parameters, a final
/// byte from `@` to `~`).
fn without_controls(text: &str) -> String {
    let mut parts = text.split("\u{1b}[");
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let end = part.find(|c| ('@'..='~').contains(&c)).map_or(part.len(), |at| at + 1);
        plain.push_str(&part[end..]);
    }
    plain
}

/// A folder of a user's own, with `squib` on the path.
struct Desk {
    dir: tempfile::TempDir,
    env: BTreeMap<&'static str, std::ffi::OsString>,
}

impl Desk {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let bin = dir.path().join("bin");
        std::fs::create_dir(&bin).unwrap();
        symlink(env!("CARGO_BIN_EXE_squib"), bin.join("squib")).unwrap();
        let mut path = bin.into_os_string();
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap_or_default());
        let env = BTreeMap::from([
            ("PATH", path),
            ("SQUIB_HOME", dir.path().join("home").into_os_string()),
            // The kit in the cache is the one of all tests.
            ("SQUIB_CACHE", squib::kit::cache_dir().unwrap().into_os_string()),
        ]);
        Self { dir, env }
    }

    fn shell(&self, command: &str) -> Command {
        let mut shell = Command::new("bash");
        shell.arg("-c").arg(command).current_dir(self.dir.path()).envs(&self.env);
        shell
    }

    /// Runs a command to its end and compares what it prints. Progress on stderr is a line that goes away where
    /// people see it.
    fn run(&self, step: &Step) {
        let done = self.shell(&step.command).stdin(Stdio::null()).output().unwrap();
        let text = String::from_utf8_lossy(&done.stdout);
        let messages = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "{}: {text}{messages}", step.command);
        let (shown, printed): (Vec<_>, Vec<_>) =
            (step.output.iter().map(|l| shape(l)).collect(), text.lines().map(shape).collect());
        assert_eq!(shown, printed, "{}\n{text}", step.command);
    }

    /// Starts a command on a terminal, types what stands behind the guest's prompts, and waits for each line
    /// that is shown.
    fn start(&self, step: &Step) -> Seat {
        let mut seat = Seat::new(self.shell(&format!("exec {}", step.command)));
        for line in &step.output {
            match line.strip_prefix(PROMPT) {
                Some(typed) => {
                    // Where the guest goes on in the middle of a line, its prompt is not printed again.
                    if !step.command.contains("restore") {
                        seat.wait_for_prompt();
                    }
                    seat.type_line(typed);
                }
                None => seat.wait_for_line(line),
            }
        }
        seat
    }
}

/// A terminal with a command on it.
struct Seat {
    keyboard: File,
    screen: Capture,
    /// Bytes of the screen that have been looked at.
    seen: usize,
    child: Child,
}

impl Seat {
    fn new(mut command: Command) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let terminal = File::options()
            .read(true)
            .write(true)
            .custom_flags(OFlags::NOCTTY.bits() as i32)
            .open(Path::new(std::ffi::OsStr::from_bytes(name.as_bytes())))
            .unwrap();
        command.stdin(terminal.try_clone().unwrap()).stdout(terminal.try_clone().unwrap());
        let child = command.stderr(terminal).spawn().unwrap();
        let keyboard = File::from(master);
        let screen = Capture::default();
        let (mut from, mut to) = (keyboard.try_clone().unwrap(), screen.clone());
        thread::spawn(move || drop(std::io::copy(&mut from, &mut to)));
        Self { keyboard, screen, seen: 0, child }
    }

    fn wait(&mut self, what: &str, end: impl Fn(&str) -> Option<usize>) {
        let seen = self.seen;
        let found = self.screen.wait_for(PATIENCE, |text| end(text.get(seen..)?));
        match found {
            Some(end) => self.seen += end,
            None => panic!("no `{what}` behind byte {seen} of\n{}", self.screen.text()),
        }
    }

    fn wait_for_prompt(&mut self) {
        self.wait(PROMPT, |text| text.find(PROMPT).map(|at| at + PROMPT.len()));
    }

    fn wait_for_line(&mut self, line: &str) {
        let wanted = shape(line);
        self.wait(line, |text| {
            let mut end = 0;
            text.split_inclusive('\n').find_map(|line| {
                end += line.len();
                // What a progress bar drew before it went away stands before the last return.
                let last = line.trim_end().rsplit('\r').next().unwrap_or_default();
                (shape(&without_controls(last)) == wanted).then_some(end)
            })
        });
    }

    fn type_line(&mut self, line: &str) {
        self.keyboard.write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    /// Waits for the end of the command.
    fn end(mut self) {
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}\n{}", self.screen.text());
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn the_tour_prints_what_the_readme_shows() {
    let kit = squib::kit::Kit::cached().expect("the kit's folder can be read");
    if kit.is_none_or(|kit| kit.rootfs.is_none()) {
        println!("skipped: no root file system; `squib kit fetch --rootfs` makes it");
        return;
    }
    let desk = Desk::new();
    let mut on_terminals = Vec::new();
    for step in blocks(README).iter().flatten() {
        let command = step.command.strip_prefix("cargo run --release -- ");
        let command = command.map_or(step.command.clone(), |words| format!("squib {words}"));
        if RUN_ELSEWHERE.contains(&&*command) {
            assert!(step.output.is_empty(), "{command}: what it prints is held by no test");
            continue;
        }
        assert!(
            ["squib ", "cp "].iter().any(|program| command.starts_with(program)),
            "no test runs `{command}`"
        );
        let step = Step { command, output: step.output.clone() };
        match step.output.iter().any(|line| line.starts_with(PROMPT)) {
            true => on_terminals.push(desk.start(&step)),
            false => desk.run(&step),
        }
    }
    assert_eq!(on_terminals.len(), 2, "a run and a restore");
    on_terminals.into_iter().for_each(Seat::end);
}

#[test]
fn what_varies_in_a_line_is_not_compared_and_all_else_is() {
    assert_eq!(shape("disk vda  de4b 360.0 MiB"), shape("disk vda  1a2b 1.0 GiB"));
    assert_ne!(shape("restore, to the first output 1 ms"), shape("restore 1 ms"));
    let steps = blocks("x\n```console\n$ a\nb\nc\n$ d\n```\n```console\n$ e\n```\n");
    assert_eq!((steps.len(), steps[0].len(), steps[0][0].output.len()), (2, 2, 2));
    assert_eq!(PathBuf::from(&steps[1][0].command), Path::new("e"));
}
