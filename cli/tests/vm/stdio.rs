//! No command panics, hangs or writes where it should not when its standard input, output and error are closed,
//! full or broken, or when there are few descriptors.

use std::{
    fs,
    io::Read,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use squib_tests::tiny::{Burst, Ending};

use crate::{
    SQUIB,
    common::{PATIENCE, Place},
};

/// What a shell does with the command: words before it, and after it.
struct Form(&'static str, &'static str);

/// Forms in which there is a standard output that takes everything, or none.
const QUIET: &[Form] = &[
    Form("", "<&-"),
    Form("", ">&-"),
    Form("", "2>&-"),
    Form("", "<&- >&- 2>&-"),
    Form("", "2>/dev/full"),
    Form("", "2>&3"),
];
const FULL: &[Form] = &[Form("", ">/dev/full"), Form("", ">/dev/full 2>/dev/full")];
const BROKEN: &[Form] = &[Form("", ">&3"), Form("", ">&3 2>&3")];
/// The program's own loader needs one descriptor above the standard ones.
const LIMITED: &[Form] = &[
    Form("ulimit -n 4;", ""),
    Form("ulimit -n 6;", ""),
    Form("ulimit -n 8;", ""),
    Form("ulimit -n 10;", ""),
    Form("ulimit -n 12;", ""),
    Form("ulimit -n 16;", ""),
    Form("ulimit -n 24;", ""),
];

/// One command: how it is called in the place that [`prepare`] makes, and its exit code there.
struct Case {
    words: &'static [&'static str],
    code: i32,
    /// What it writes, removed before each call.
    makes: Option<&'static str>,
    /// It is a VM: its guest goes on when nobody reads its console.
    vm: bool,
}

/// The cases of a command. A new command has to be added here.
fn cases(command: &str) -> Vec<Case> {
    let case = |code, words| Case { words, code, makes: None, vm: false };
    let makes = |makes, words| Case { words, code: 0, makes: Some(makes), vm: false };
    let vm = |words| Case { words, code: 0, makes: None, vm: true };
    match command {
        "run" => vec![
            vm(&["run", "--kernel", "burst", "--memory", "64M", "--disk", "own.img", "--timings"]),
            case(2, &["run", "--kernel", "nowhere"]),
        ],
        "digest" => vec![
            case(0, &["digest", "disk.img"]),
            case(0, &["digest", "disk.img", "--json"]),
            case(2, &["digest", "nowhere"]),
        ],
        // What it does beyond that is `run` and `restore` in processes of its own.
        "demo" => vec![case(2, &["demo", "--keep", "."])],
        // There is no apt-get: see `call`.
        "kit fetch" => vec![case(1, &["kit", "fetch"])],
        "kit path" => vec![case(1, &["kit", "path", "kernel"])],
        "ps" => vec![case(0, &["ps"]), case(0, &["ps", "--json"])],
        "doctor" => vec![case(0, &["doctor"]), case(0, &["doctor", "--json"])],
        "snapshot create" => vec![
            makes("made", &["snapshot", "create", "a", "-o", "made", "--durability", "none"]),
            case(6, &["snapshot", "create", "nobody", "-o", "nothing"]),
        ],
        "snapshot restore" => vec![vm(&["snapshot", "restore", "snap", "--name", "b"])],
        "snapshot inspect" => {
            vec![case(0, &["snapshot", "inspect", "snap"]), case(5, &["snapshot", "inspect", "."])]
        }
        "snapshot verify" => {
            vec![case(0, &["snapshot", "verify", "snap"]), case(5, &["snapshot", "verify", "."])]
        }
        "snapshot check" => vec![case(0, &["snapshot", "check", "snap"])],
        "snapshot diff" => vec![case(0, &["snapshot", "diff", "snap", "snap"])],
        "snapshot flatten" => {
            let words = &["snapshot", "flatten", "snap", "-o", "flat", "--durability", "none"];
            vec![makes("flat", words)]
        }
        "snapshot rebase" => {
            let words = &["snapshot", "rebase", "snap", "--onto", "snap", "-o", "based"];
            vec![makes("based", words)]
        }
        "snapshot rm" => vec![case(2, &["snapshot", "rm", "nowhere"])],
        "snapshot optimize" => vec![case(5, &["snapshot", "optimize", "snap", "-o", "best"])],
        "snapshot cache ls" => vec![case(0, &["snapshot", "cache", "ls"])],
        "snapshot cache prune" => vec![case(0, &["snapshot", "cache", "prune"])],
        other => panic!("`squib {other}` is new: say here how to call it"),
    }
}

/// Every command that does something, from the command line's own definition.
fn commands(of: &clap::Command, path: &str, into: &mut Vec<String>) {
    for command in of.get_subcommands().filter(|command| command.get_name() != "help") {
        let path = format!("{path} {}", command.get_name()).trim().to_owned();
        match command.has_subcommands() {
            true => commands(command, &path, into),
            false => into.push(path),
        }
    }
}

/// A guest that writes and ends, a VM `a` that sleeps, and a snapshot `snap` of a guest that is about to end.
fn prepare(place: &Place) -> crate::common::Vm {
    let guest = |name, bytes, ending| {
        fs::write(place.path(name), Burst { bytes, ending }.image()).unwrap();
    };
    guest("burst", 50, Ending::PowerOff);
    guest("sleeper", 1, Ending::Sleep);
    guest("long", 200_000, Ending::PowerOff);
    fs::write(place.path("own.img"), [0x77; 4096]).unwrap();
    let words = |kernel, name| ["run", "--kernel", kernel, "--memory", "64M", "--name", name];
    // It waits for a reader, and so it is there to be captured.
    let mut long = place.squib(words("long", "c"));
    let mut long = long.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    long.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    let create = ["snapshot", "create", "c", "-o", "snap", "--durability", "none"];
    let (code, _, error) = place.done(&create);
    assert_eq!(code, 0, "{error}");
    long.kill().unwrap();
    long.wait().unwrap();
    let sleeper = place.vm(&words("sleeper", "a"));
    sleeper.console.wait_for(PATIENCE, |text| (!text.is_empty()).then_some(())).unwrap();
    sleeper
}

/// Runs the case in a form; exit code, and what was written to a standard error that takes it.
fn call(place: &Place, words: &[&str], Form(before, after): &Form) -> (Option<i32>, String) {
    let plain = place.squib::<&str>([]);
    let mut command = Command::new("/bin/sh");
    // Descriptor 3 is a pipe that nobody reads, where a form uses it.
    let script = format!("{before} exec \"$@\" {after} 3>&-");
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    drop(reader);
    match after.contains("&3") {
        // The shell's standard input has it, and the program has none.
        true => command
            .stdin(Stdio::from(writer))
            .arg("-c")
            .arg(format!("exec 3>&0 </dev/null; {script}")),
        false => command.stdin(Stdio::null()).arg("-c").arg(script),
    };
    command.arg("sh").arg(SQUIB).args(words).current_dir(place.dir.path());
    // No command starts another program, and `kit fetch` says at once that it cannot.
    command.env("PATH", "/nowhere");
    for (name, value) in plain.get_envs() {
        command.env(name, value.unwrap());
    }
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut errors = child.stderr.take().unwrap();
    let errors = thread::spawn(move || {
        let mut text = String::new();
        errors.read_to_string(&mut text).map(|_| text)
    });
    let deadline = Instant::now() + PATIENCE;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("{words:?} {before}{after} hangs");
        }
        thread::sleep(Duration::from_millis(5));
    };
    (status.code(), errors.join().unwrap().unwrap())
}

fn try_all(place: &Place, case: &Case) {
    let Case { words, code, makes, vm } = case;
    let clean = || {
        if let Some(makes) = makes {
            drop(fs::remove_dir_all(place.path(makes)));
        }
    };
    let try_one = |form: &Form, expected: Option<i32>| {
        clean();
        let (ended, errors) = call(place, words, form);
        let what = format!("{words:?} {}{}: {ended:?}: {errors}", form.0, form.1);
        assert!(!errors.contains("panicked"), "{what}");
        match expected {
            Some(expected) => assert_eq!(ended, Some(expected), "{what}"),
            None => assert!(ended.is_some_and(|code| code < 100 && code != 70), "{what}"),
        }
        if let (Some(makes), Some(0)) = (makes, ended) {
            assert_eq!(place.done(&["snapshot", "verify", makes]).0, 0, "{what}");
        }
    };
    try_one(&Form("", ""), Some(*code));
    QUIET.iter().for_each(|form| try_one(form, Some(*code)));
    if Path::new("/dev/full").exists() {
        FULL.iter().for_each(|form| try_one(form, Some(if *code == 0 { 1 } else { *code })));
    }
    let broken = if *code == 0 && !vm { 128 + 13 } else { *code };
    BROKEN.iter().for_each(|form| try_one(form, Some(broken)));
    LIMITED.iter().for_each(|form| try_one(form, None));
    clean();
}

#[test]
fn no_command_panics_with_closed_full_or_broken_streams_or_few_descriptors() {
    let place = Place::new();
    let sleeper = prepare(&place);
    let mut all = Vec::new();
    commands(&squib::command_line(), "", &mut all);
    assert!(all.len() > 15, "{all:?}");
    let place = &place;
    thread::scope(|scope| {
        for command in &all {
            scope.spawn(move || cases(command).iter().for_each(|case| try_all(place, case)));
        }
    });
    drop(sleeper);
    // Nothing that was written went into a file.
    assert_eq!(fs::read(place.path("own.img")).unwrap(), [0x77; 4096]);
    assert_eq!(place.done(&["snapshot", "verify", "snap"]).0, 0);
}

#[test]
fn help_and_the_version_need_an_output_that_takes_them() {
    let place = Place::new();
    let mut all = Vec::new();
    commands(&squib::command_line(), "", &mut all);
    let helps = all.iter().map(|path| format!("{path} --help"));
    for line in helps.chain(["--help", "--version", "help run"].map(str::to_owned)) {
        let words: Vec<&str> = line.split(' ').collect();
        let code = |form: &Form| call(&place, &words, form).0;
        assert_eq!(code(&QUIET[1]), Some(0), "{line}");
        if Path::new("/dev/full").exists() {
            assert_eq!(code(&FULL[0]), Some(1), "{line}");
        }
        assert_eq!(code(&BROKEN[0]), Some(141), "{line}");
    }
    assert_eq!(call(&place, &["bogus"], &QUIET[2]).0, Some(2));
    assert_eq!(call(&place, &["bogus"], &QUIET[5]).0, Some(2));
}
