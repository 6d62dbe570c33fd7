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
        server::{Controlled, Fault, Server},
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
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("api.sock");
    let vm = Arc::new(Recorder { refuses, ..Recorder::default() });
    let server = Server::start(listen(&socket).unwrap(), vm.clone()).unwrap();
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
