//! Numbers and limits at their ends: an error or a result, and never a VM that stands still.

use std::{fs, path::Path, process::Command};

use rustix::process::Signal;
use squib::api::{client::Client, types::InstanceState};
use squib_tests::tiny::POWER_OFF;

use crate::{
    SQUIB,
    common::{PATIENCE, Place, create},
};

/// A request as any HTTP client sends it: status and body of the answer.
fn put(socket: &Path, path: &str, body: &str) -> (u16, String) {
    use std::io::{Read, Write};
    let mut stream = std::os::unix::net::UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let length = body.len();
    write!(
        stream,
        "PUT {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\
         Connection: close\r\n\r\n{body}"
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    (answer.split(' ').nth(1).unwrap().parse().unwrap(), answer)
}

#[test]
fn no_number_leaves_a_vm_paused_or_deaf() {
    let place = Place::new();
    let vm = place.run(&["--name", "a"]);
    vm.wait_lines(1);
    let socket = place.path("home/run/vms/a/api.sock");
    let extremes = ["0", "1", "-1", "9223372036854775808", "18446744073709551615", "1.5", "1e99"];
    for (field, flag) in
        [("threads", "--threads"), ("level", "--level"), ("chunk_size", "--chunk-size")]
    {
        for number in extremes {
            let case = format!("{field} {number}");
            let body = format!(
                "{{\"snapshot_path\":\"{}\",\"force\":true,\"durability\":\"none\",\"{field}\":{number}}}",
                place.path("snap").display()
            );
            let (status, answer) = put(&socket, "/snapshot/create", &body);
            assert!([204, 400].contains(&status), "{case}: {answer}");
            let words = ["snapshot", "create", "a", "-o", "snap", "--force", "--durability=none"];
            let flag = format!("{flag}={number}");
            let (code, _, error) = place.done(&[&words[..], &[&flag]].concat());
            assert!([0, 2].contains(&code), "{case}: {code} {error}");
            let state = Client::new(&socket).info().unwrap().state;
            assert_eq!(state, InstanceState::Running, "{case}");
        }
    }
    vm.wait_lines(2);
    vm.signal(Signal::TERM);
    assert_eq!(vm.end().0.code(), Some(143));
}

#[test]
fn too_few_descriptors_are_an_error_of_every_command() {
    let place = Place::new();
    let vm = place.run(&["--name", "a"]);
    vm.wait_lines(1);
    create(&place, &["--stop"]);
    drop(vm.end());
    // The guest that gets this powers off: a command for which there is enough ends as well.
    fs::write(place.path("input"), [POWER_OFF]).unwrap();
    let commands = [
        "run --kernel kernel --memory 64M --disk disk.img",
        "snapshot restore snap --name b",
        "snapshot restore snap --name b --mode eager",
        "snapshot verify snap",
        "snapshot check snap",
        "snapshot inspect snap",
        "snapshot diff snap snap",
        "snapshot flatten snap -o flat",
        "snapshot create a -o snap2",
        "digest disk.img",
        "doctor",
        "ps",
    ];
    for words in commands {
        for limit in [3, 4, 5, 6, 7, 8, 10, 12, 14, 17, 20, 24] {
            let mut command = Command::new("sh");
            command
                .args(["-c", &format!("ulimit -n {limit} || exit 99; exec {SQUIB} {words} <input")])
                .current_dir(place.dir.path())
                .env("SQUIB_HOME", place.path("home"))
                .env("SQUIB_CACHE", place.path("cache"));
            let done = command.output().unwrap();
            let error = String::from_utf8_lossy(&done.stderr);
            let code = done.status.code();
            assert!(
                matches!(code, Some(0..=6)) && !error.contains("panicked"),
                "{words} with {limit}: {:?} {error}",
                done.status
            );
            assert!(code == Some(0) || words == "doctor" || !error.is_empty(), "{words} {limit}");
            let _ = fs::remove_dir_all(place.path("flat"));
            assert!(place.left().is_empty(), "{words} with {limit}");
        }
    }
}
