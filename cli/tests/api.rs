//! The control API, spoken over its socket.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::sleep,
    time::{Duration, Instant},
};

use squib::{
    api::{
        client::{Client, ClientError},
        server::{Controlled, Fault, Limits, Server},
        types::{
            DiskReport, InstanceInfo, InstanceState, SnapshotCreateParams, SnapshotProgress,
            SnapshotReport, VmState,
        },
    },
    home::listen,
};

/// A VM that writes down what it is told.
#[derive(Default)]
struct Recorder {
    calls: Mutex<Vec<String>>,
    refuses: bool,
}

impl Recorder {
    fn record(&self, call: String) -> Result<(), Fault> {
        self.calls.lock().unwrap().push(call);
        if self.refuses { Err(Fault("the guest does not stop".into())) } else { Ok(()) }
    }
}

impl Recorder {
    /// Waits until `holds` of the calls so far, or for long enough.
    fn wait_for(&self, holds: impl Fn(&[String]) -> bool) -> bool {
        let end = Instant::now() + Duration::from_secs(60);
        while Instant::now() < end {
            if holds(&self.calls.lock().unwrap()) {
                return true;
            }
            sleep(Duration::from_millis(5));
        }
        false
    }
}

impl Controlled for Recorder {
    fn info(&self) -> InstanceInfo {
        InstanceInfo {
            app_name: "squib".into(),
            id: "vm".into(),
            state: InstanceState::Running,
            vmm_version: "0".into(),
        }
    }

    fn pause(&self) -> Result<(), Fault> {
        self.record("pause".into())
    }

    fn resume(&self) -> Result<(), Fault> {
        self.record("resume".into())
    }

    fn snapshot(
        &self,
        params: SnapshotCreateParams,
        give_up: &Arc<AtomicBool>,
    ) -> Result<SnapshotReport, Fault> {
        assert!(!params.snapshot_path.ends_with("panic"), "as the test wants it");
        if params.snapshot_path.ends_with("slow") {
            self.record("slow".into())?;
            self.wait_for(|_| give_up.load(Ordering::Relaxed));
            return Err(Fault(format!("given up: {}", give_up.load(Ordering::Relaxed))))
                .inspect_err(|Fault(why)| drop(self.record(why.clone())));
        }
        self.record(format!("snapshot {}", params.snapshot_path.display()))?;
        Ok(SnapshotReport {
            path: params.snapshot_path,
            id: "ab".into(),
            memory_digest: "cd".into(),
            disks: vec![DiskReport { id: "vda".into(), digest: "ef".into(), bytes: 512 }],
            memory_bytes: 1024,
            raw_bytes: 1536,
            stored_bytes: 10,
            downtime_ms: 0.5,
            timings: Vec::new(),
        })
    }

    fn progress(&self) -> SnapshotProgress {
        SnapshotProgress { phase: "memory".into(), done: 1, total: 2, stored: 1 }
    }

    fn stop(&self) {
        self.calls.lock().unwrap().push("stop".into());
    }
}

struct Served {
    vm: Arc<Recorder>,
    socket: PathBuf,
    _server: Server,
    _dir: tempfile::TempDir,
}

fn serve(refuses: bool) -> Served {
    serve_within(refuses, Limits::default())
}

fn serve_within(refuses: bool, limits: Limits) -> Served {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("api.sock");
    let vm = Arc::new(Recorder { refuses, ..Recorder::default() });
    let server = Server::with_limits(listen(&socket).unwrap(), vm.clone(), limits).unwrap();
    Served { vm, socket, _server: server, _dir: dir }
}

/// Status and body of the answer to a request as any HTTP client sends it.
fn raw(socket: &Path, request: &str, body: &str) -> (u16, String) {
    let mut stream = UnixStream::connect(socket).unwrap();
    let length = body.len();
    write!(
        stream,
        "{request} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\
         Connection: close\r\n\r\n{body}"
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body).to_owned();
    (status, body)
}

#[test]
fn the_instance_is_described_as_firecracker_does() {
    let served = serve(false);
    let (status, body) = raw(&served.socket, "GET /", "");
    assert_eq!(status, 200);
    let info: serde_json::Value = serde_json::from_str(&body).unwrap();
    for field in ["app_name", "id", "state", "vmm_version"] {
        assert!(info[field].is_string(), "{field} in {body}");
    }
    assert_eq!(info["state"], "Running");
}

#[test]
fn pause_and_resume_answer_without_a_body() {
    let served = serve(false);
    let patch =
        |state: &str| raw(&served.socket, "PATCH /vm", &format!("{{\"state\":\"{state}\"}}"));
    assert_eq!(patch("Paused"), (204, String::new()));
    assert_eq!(patch("Resumed"), (204, String::new()));
    assert_eq!(*served.vm.calls.lock().unwrap(), ["pause", "resume"]);
}

#[test]
fn a_body_that_is_not_understood_is_a_fault_and_calls_nothing() {
    let served = serve(false);
    for (request, body) in [
        ("PATCH /vm", "{\"state\":\"Halted\"}"),
        ("PATCH /vm", "{\"state\":\"Paused\",\"more\":1}"),
        ("PATCH /vm", "not json"),
        ("PATCH /vm", ""),
        ("PUT /snapshot/create", "{}"),
        ("PUT /snapshot/create", "{\"snapshot_path\":\"/s\",\"snapshot_type\":\"Diff\"}"),
        ("PUT /snapshot/create", "{\"snapshot_path\":\"/s\",\"parent_path\":\"/p\"}"),
        ("PUT /snapshot/create", "{\"snapshot_path\":\"/s\",\"mem_file_path\":\"/elsewhere\"}"),
    ] {
        let (status, answer) = raw(&served.socket, request, body);
        assert_eq!(status, 400, "{request} {body}");
        let answer: serde_json::Value = serde_json::from_str(&answer).unwrap();
        assert!(!answer["fault_message"].as_str().unwrap().is_empty());
    }
    assert!(served.vm.calls.lock().unwrap().is_empty());
}

#[test]
fn an_unknown_route_or_method_is_not_found() {
    let served = serve(false);
    for request in ["GET /nothing", "PUT /actions", "DELETE /vm", "GET /snapshot/create"] {
        let (status, body) = raw(&served.socket, request, "");
        assert_eq!(status, 404, "{request}");
        assert!(body.contains("fault_message"), "{body}");
    }
}

#[test]
fn a_body_beyond_the_limit_is_refused() {
    let served = serve(false);
    let (status, body) = raw(&served.socket, "PATCH /vm", &" ".repeat(60_000));
    assert_eq!(status, 413);
    assert!(body.contains("fault_message"), "{body}");
}

#[test]
fn firecrackers_create_request_is_answered_without_a_body() {
    let served = serve(false);
    let body = r#"{"snapshot_type":"Full","snapshot_path":"/s","mem_file_path":"/s/memory.zst"}"#;
    assert_eq!(raw(&served.socket, "PUT /snapshot/create", body), (204, String::new()));
    assert_eq!(*served.vm.calls.lock().unwrap(), ["snapshot /s"]);
}

#[test]
fn the_client_gets_a_report_and_stop_follows_the_snapshot() {
    let served = serve(false);
    let client = Client::new(&served.socket);
    assert_eq!(client.info().unwrap().id, "vm");
    client.set_state(VmState::Paused).unwrap();
    assert_eq!(
        client.progress().unwrap(),
        SnapshotProgress { phase: "memory".into(), done: 1, total: 2, stored: 1 }
    );
    let params = SnapshotCreateParams {
        snapshot_path: "/s".into(),
        stop: true,
        ..SnapshotCreateParams::default()
    };
    let report = client.snapshot(&params).unwrap();
    assert_eq!(report.disks[0].bytes, 512);
    assert_eq!(*served.vm.calls.lock().unwrap(), ["pause", "snapshot /s", "stop"]);
}

#[test]
fn a_vm_that_fails_does_not_stop_and_says_why() {
    let served = serve(true);
    let params = r#"{"snapshot_path":"/s","stop":true}"#;
    let (status, body) = raw(&served.socket, "PUT /snapshot/create", params);
    assert_eq!((status, body.contains("does not stop")), (400, true));
    assert_eq!(*served.vm.calls.lock().unwrap(), ["snapshot /s"]);
    match Client::new(&served.socket).set_state(VmState::Resumed) {
        Err(ClientError::Fault { status: 400, message }) => {
            assert_eq!(message, "the guest does not stop");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_socket_without_a_vm_says_how_to_find_one() {
    let dir = tempfile::tempdir().unwrap();
    let error = Client::new(&dir.path().join("none")).info().unwrap_err();
    assert!(matches!(error, ClientError::Connect { .. }));
    assert!(error.to_string().contains("squib ps"), "{error}");
}

#[test]
fn a_snapshot_whose_asker_goes_away_is_given_up() {
    let served = serve(false);
    let body = "{\"snapshot_path\":\"/slow\"}";
    let mut stream = UnixStream::connect(&served.socket).unwrap();
    write!(
        stream,
        "PUT /snapshot/create HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    assert!(served.vm.wait_for(|calls| calls == ["slow"]), "the snapshot has begun");
    drop(stream);
    assert!(served.vm.wait_for(|calls| calls.len() > 1));
    assert_eq!(*served.vm.calls.lock().unwrap(), ["slow", "given up: true"]);
}

/// Bounds how long a test that hangs is waited for.
const PATIENCE: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(200);

/// A connection on which `text` has been sent.
fn sent(socket: &Path, text: &str) -> UnixStream {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(text.as_bytes()).unwrap();
    stream
}

/// What comes until the server closes the connection.
fn rest(mut stream: UnixStream) -> String {
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Ok(_) => {}
        Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => {}
        Err(e) => panic!("the connection stays open: {e}"),
    }
    String::from_utf8(answer).unwrap()
}

#[test]
fn a_request_that_does_not_come_to_its_end_is_not_waited_for() {
    let served = serve_within(false, Limits { head: SHORT, body: SHORT, ..Limits::default() });
    // Nothing, half a head, an idle connection after an answer.
    assert_eq!(rest(sent(&served.socket, "")), "");
    let half = rest(sent(&served.socket, "GET / HTTP/1.1\r\nHost: loc"));
    assert!(half.is_empty() || half.starts_with("HTTP/1.1 408"), "{half}");
    let idle = rest(sent(&served.socket, "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"));
    assert!(idle.starts_with("HTTP/1.1 200"), "{idle}");
    // Half a body.
    let head = "PATCH /vm HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{";
    let body = rest(sent(&served.socket, head));
    assert!(body.starts_with("HTTP/1.1 408") && body.contains("fault_message"), "{body}");
    assert!(served.vm.calls.lock().unwrap().is_empty());
}

#[test]
fn an_answer_that_its_client_does_not_read_ends_the_connection() {
    let served = serve_within(false, Limits { answer: SHORT, ..Limits::default() });
    let mut stream = sent(&served.socket, "");
    let request = "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".repeat(100);
    // In the end both sides' buffers are full of requests and answers.
    let error = loop {
        if let Err(error) = stream.write_all(request.as_bytes()) {
            break error;
        }
    };
    let closed = [std::io::ErrorKind::BrokenPipe, std::io::ErrorKind::ConnectionReset];
    assert!(closed.contains(&error.kind()), "{error}");
    assert_eq!(raw(&served.socket, "GET /", "").0, 200);
}

#[test]
fn more_connections_than_the_limit_are_told_so_and_the_vm_can_be_reached_afterwards() {
    let served = serve_within(false, Limits { connections: 4, ..Limits::default() });
    let mut taken: Vec<_> = (0..4).map(|_| sent(&served.socket, "GET /")).collect();
    for _ in 0..20 {
        let (status, body) = raw(&served.socket, "GET /", "");
        assert_eq!((status, body.contains("4 connections")), (503, true), "{body}");
    }
    match Client::new(&served.socket).info() {
        Err(ClientError::Fault { status: 503, .. }) => {}
        other => panic!("{other:?}"),
    }
    taken.pop();
    let end = Instant::now() + PATIENCE;
    while raw(&served.socket, "GET /", "").0 != 200 {
        assert!(Instant::now() < end);
    }
}

#[test]
fn calls_that_do_not_end_leave_room_for_what_needs_no_guest() {
    let served = serve_within(false, Limits { calls: 1, ..Limits::default() });
    let body = "{\"snapshot_path\":\"/slow\"}";
    let length = body.len();
    let head = format!(
        "PUT /snapshot/create HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n"
    );
    let slow = sent(&served.socket, &format!("{head}{body}"));
    assert!(served.vm.wait_for(|calls| calls == ["slow"]));
    assert_eq!(raw(&served.socket, "PATCH /vm", "{\"state\":\"Paused\"}").0, 503);
    assert_eq!(raw(&served.socket, "GET /", "").0, 200);
    assert_eq!(raw(&served.socket, "GET /snapshot/progress", "").0, 200);
    drop(slow);
    assert!(served.vm.wait_for(|calls| calls.len() == 2));
}

#[test]
fn a_call_that_panics_is_a_fault_and_the_next_one_works() {
    let served = serve_within(false, Limits { calls: 1, ..Limits::default() });
    for _ in 0..3 {
        let (status, body) =
            raw(&served.socket, "PUT /snapshot/create", "{\"snapshot_path\":\"/panic\"}");
        assert_eq!((status, body.contains("panicked")), (400, true), "{body}");
    }
    assert_eq!(raw(&served.socket, "PUT /snapshot/create", "{\"snapshot_path\":\"/s\"}").0, 204);
}

#[test]
fn a_client_does_not_wait_for_a_vm_that_says_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    // As of a process that is stopped: connections are taken, and never looked at.
    let _listener = listen(&socket).unwrap();
    let silent = Client::new(&socket).within(SHORT);
    assert!(matches!(silent.info(), Err(ClientError::NoAnswer { .. })));
    assert!(matches!(silent.progress(), Err(ClientError::NoAnswer { .. })));
    let served = serve(false);
    let all = [silent.clone(), Client::new(&served.socket), silent.clone()];
    let answers = Client::info_of_all(&all).unwrap();
    let there: Vec<bool> = answers.iter().map(Result::is_ok).collect();
    assert_eq!(there, [false, true, false]);
    // When its line of connections is full, a connection is not even taken.
    let many = vec![silent; 1000];
    let answers = Client::info_of_all(&many).unwrap();
    for answer in answers {
        assert!(matches!(answer, Err(ClientError::NoAnswer { .. })), "{answer:?}");
    }
}

#[test]
fn every_number_of_every_field_is_bounded() {
    let served = serve(false);
    // Exhaustive, so that a new field is met here.
    let params = SnapshotCreateParams {
        snapshot_path: "/s".into(),
        mem_file_path: None,
        snapshot_type: None,
        parent_path: None,
        force: false,
        stop: false,
        live: false,
        level: Some(1),
        chunk_size: Some(65536),
        threads: std::num::NonZeroUsize::new(1),
        disk_mode: Vec::new(),
        with_kernel: false,
        no_reflink: false,
        durability: None,
    };
    let bounds =
        [("level", -131_072..=22), ("chunk_size", 16384..=4_194_304), ("threads", 1..=256)];
    let serde_json::Value::Object(params) = serde_json::to_value(params).unwrap() else {
        panic!("an object");
    };
    let numbers: Vec<_> = params.iter().filter(|(_, value)| value.is_number()).collect();
    assert_eq!(numbers.len(), bounds.len());
    for (field, (least, most)) in bounds.map(|(field, range)| (field, range.into_inner())) {
        for text in [
            "0",
            "-1",
            "-0",
            "1.5",
            "1e9",
            "1e400",
            "-1e-400",
            "NaN",
            "Infinity",
            "\"1\"",
            "[]",
            "{}",
            "true",
            "4294967295",
            "4294967296",
            "9223372036854775807",
            "9223372036854775808",
            "-9223372036854775808",
            "18446744073709551615",
            "18446744073709551616",
            &"9".repeat(400),
        ]
        .map(str::to_owned)
        .into_iter()
        .chain([least - 1, least, most, most + 1].map(|number| number.to_string()))
        {
            let body = format!("{{\"snapshot_path\":\"/s\",\"{field}\":{text}}}");
            let (status, answer) = raw(&served.socket, "PUT /snapshot/create", &body);
            let can = text.parse::<i64>().is_ok_and(|number| {
                let chunk = field != "chunk_size" || number.count_ones() == 1;
                (least..=most).contains(&number) && chunk && text != "-0"
            });
            match (can, status) {
                (true, 204) => {}
                (false, 400) => assert!(answer.contains("fault_message"), "{answer}"),
                // As a float it is none; as an integer it is 0.
                (_, 204 | 400) if text == "-0" => {}
                _ => panic!("{body}: {status} {answer}"),
            }
        }
    }
}
