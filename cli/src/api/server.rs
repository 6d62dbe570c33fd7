//! The server's side: routes, and a thread of its own that serves them.

use std::{
    os::unix::net::UnixListener,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use axum::{
    Json, Router,
    body::Bytes,
    extract::{DefaultBodyLimit, FromRequest, Request, State},
    http::{HeaderMap, Method, StatusCode, Uri},
    response::{IntoResponse, Response},
    routing::{get, patch, put},
};
use serde::de::DeserializeOwned;
use squib_formats::image::{MAX_THREADS, is_chunk_size, levels};
use tokio::sync::{Semaphore, oneshot};

pub use super::connections::Limits;
use super::connections::{self, LAST_ANSWERS};
use super::types::{
    Error, InstanceInfo, SnapshotCreateParams, SnapshotProgress, SnapshotReport, SnapshotType, Vm,
    VmState,
};

/// Largest request body, bytes; Firecracker's default.
const BODY_MAX: usize = 51_200;

/// What the API controls. Calls block; each comes on a thread of its own.
pub trait Controlled: Send + Sync + 'static {
    /// What the VM is and does.
    fn info(&self) -> InstanceInfo;
    /// Brings the guest to rest. Idempotent.
    fn pause(&self) -> Result<(), Fault>;
    /// Lets it run. Idempotent.
    fn resume(&self) -> Result<(), Fault>;
    /// Writes a snapshot. The guest is paused for it, and afterwards does what it did before. Once
    /// `give_up` is set the snapshot is given up if it is not there yet, and leaves nothing behind.
    fn snapshot(
        &self,
        params: SnapshotCreateParams,
        give_up: &Arc<AtomicBool>,
    ) -> Result<SnapshotReport, Fault>;
    /// How far [`snapshot`](Self::snapshot) is.
    fn progress(&self) -> SnapshotProgress;
    /// Ends the VM, soon.
    fn stop(&self);
}

/// Why the VM did not do what it was told: the `fault_message` of an answer with status 400.
#[derive(Debug)]
pub struct Fault(pub String);

/// A running server. Dropping it gives answers that are under way a moment, and ends it.
pub struct Server {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves `controlled` on `listener`.
    pub fn start(listener: UnixListener, controlled: Arc<dyn Controlled>) -> std::io::Result<Self> {
        Self::with_limits(listener, controlled, Limits::default())
    }

    /// As [`start`](Self::start), with limits of its own.
    pub fn with_limits(
        listener: UnixListener,
        vm: Arc<dyn Controlled>,
        limits: Limits,
    ) -> std::io::Result<Self> {
        listener.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let listener = {
            let _context = runtime.enter();
            tokio::net::UnixListener::from_std(listener)?
        };
        let (stop, stopped) = oneshot::channel();
        let thread = thread::Builder::new().name("api".into()).spawn(move || {
            let calls = Arc::new(Semaphore::new(limits.calls));
            let api = Api { vm, calls, body: limits.body };
            runtime.block_on(connections::serve(listener, router(api), limits, stopped));
        })?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        let Some(thread) = self.thread.take() else { return };
        // A client may keep its connection open for ever.
        let deadline = std::time::Instant::now() + LAST_ANSWERS;
        while !thread.is_finished() && std::time::Instant::now() < deadline {
            thread::sleep(Duration::from_millis(2));
        }
    }
}

/// What the routes share.
#[derive(Clone)]
struct Api {
    vm: Arc<dyn Controlled>,
    calls: Arc<Semaphore>,
    /// How long a body may take.
    body: Duration,
}

impl Api {
    /// Runs `call` where it may block: on a thread of its own, which goes on without its client.
    async fn call<T: Send + 'static>(
        &self,
        call: impl FnOnce(&dyn Controlled) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, Response> {
        let Ok(slot) = self.calls.clone().try_acquire_owned() else {
            return Err(unavailable("too many calls are under way: wait for one to end"));
        };
        let vm = self.vm.clone();
        let (done, result) = oneshot::channel();
        let started = thread::Builder::new().name("api-call".into()).spawn(move || {
            // Also when the call panics, the slot is free before the client is told.
            let done = done;
            let slot = slot;
            let result = call(&*vm);
            drop(slot);
            // The client may be gone.
            let _ = done.send(result);
        });
        if let Err(error) = started {
            return Err(unavailable(&format!("no thread for the call: {error}")));
        }
        match result.await {
            Ok(result) => result.map_err(IntoResponse::into_response),
            Err(_) => {
                let why = "the call panicked: see the VM's own output";
                Err(Fault(why.into()).into_response())
            }
        }
    }
}

/// The body of a request, all of it.
struct Body(Bytes);

impl FromRequest<Api> for Body {
    type Rejection = Response;

    async fn from_request(request: Request, api: &Api) -> Result<Self, Response> {
        match tokio::time::timeout(api.body, Bytes::from_request(request, api)).await {
            Ok(Ok(body)) => Ok(Self(body)),
            // It is too long, or broke off.
            Ok(Err(error)) => Err(fault(error.status(), error.body_text())),
            Err(_) => {
                let why = format!("the request's body did not come within {:?}", api.body);
                Err(fault(StatusCode::REQUEST_TIMEOUT, why))
            }
        }
    }
}

fn router(api: Api) -> Router {
    Router::new()
        .route("/", get(describe))
        .route("/vm", patch(set_state))
        .route("/snapshot/create", put(create))
        .route("/snapshot/progress", get(progress))
        .method_not_allowed_fallback(unknown)
        .fallback(unknown)
        .layer(DefaultBodyLimit::max(BODY_MAX))
        .with_state(api)
}

async fn describe(State(api): State<Api>) -> Response {
    Json(api.vm.info()).into_response()
}

async fn progress(State(api): State<Api>) -> Response {
    Json(api.vm.progress()).into_response()
}

async fn set_state(State(api): State<Api>, Body(body): Body) -> Response {
    let wanted: Vm = match parse(&body) {
        Ok(wanted) => wanted,
        Err(fault) => return fault.into_response(),
    };
    let done = api.call(move |vm| match wanted.state {
        VmState::Paused => vm.pause(),
        VmState::Resumed => vm.resume(),
    });
    match done.await {
        Ok(()) => StatusCode::NO_CONTENT.into_response(),
        Err(answer) => answer,
    }
}

/// Whoever asked for a snapshot; nobody wants it any more once this is dropped.
struct Asker(Arc<AtomicBool>);

impl Drop for Asker {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

async fn create(State(api): State<Api>, headers: HeaderMap, Body(body): Body) -> Response {
    let params: SnapshotCreateParams = match parse(&body).and_then(check) {
        Ok(params) => params,
        Err(fault) => return fault.into_response(),
    };
    // A client that goes away in the middle (Ctrl-C) drops this future.
    let asker = Asker(Arc::default());
    let give_up = Arc::clone(&asker.0);
    let written = api.call(move |vm| {
        let stop = params.stop;
        let report = vm.snapshot(params, &give_up)?;
        if stop {
            vm.stop();
        }
        Ok(report)
    });
    let report = match written.await {
        Ok(report) => report,
        Err(answer) => return answer,
    };
    let wants_report = headers
        .get_all("prefer")
        .iter()
        .any(|value| value.to_str().is_ok_and(|v| v.contains("return=representation")));
    if wants_report { Json(report).into_response() } else { StatusCode::NO_CONTENT.into_response() }
}

fn check(params: SnapshotCreateParams) -> Result<SnapshotCreateParams, Fault> {
    match (params.snapshot_type, &params.parent_path) {
        (Some(SnapshotType::Diff), None) => {
            let why = "parent_path: a Diff needs the snapshot that it is a difference to";
            return Err(Fault(why.into()));
        }
        (None | Some(SnapshotType::Full), Some(_)) => {
            let why = "parent_path: only a snapshot_type of Diff has a parent";
            return Err(Fault(why.into()));
        }
        _ => {}
    }
    if let Some(threads) = params.threads.filter(|threads| threads.get() > MAX_THREADS) {
        return Err(Fault(format!("threads: {threads}, it must be 1 to {MAX_THREADS}")));
    }
    if let Some(level) = params.level.filter(|level| !levels().contains(level)) {
        let (least, most) = levels().into_inner();
        return Err(Fault(format!("level: {level}, zstd has {least} to {most}")));
    }
    if let Some(size) = params.chunk_size.filter(|size| !is_chunk_size(*size)) {
        let why = format!("chunk_size: {size}, it must be a power of two from 16384 to 4194304");
        return Err(Fault(why));
    }
    if params.live && params.stop {
        return Err(Fault("live: a VM that is stopped has nothing to go on for".into()));
    }
    let own = params.snapshot_path.join("memory.zst");
    if let Some(path) = params.mem_file_path.as_ref().filter(|path| **path != own) {
        return Err(Fault(format!(
            "mem_file_path: memory is written to {}, not to {}: leave the field out",
            own.display(),
            path.display()
        )));
    }
    Ok(params)
}

async fn unknown(method: Method, uri: Uri) -> Response {
    fault(StatusCode::NOT_FOUND, format!("there is no {method} {}", uri.path()))
}

fn unavailable(why: &str) -> Response {
    fault(StatusCode::SERVICE_UNAVAILABLE, why.to_owned())
}

fn fault(status: StatusCode, fault_message: String) -> Response {
    (status, Json(Error { fault_message })).into_response()
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Fault> {
    serde_json::from_slice(body).map_err(|e| Fault(format!("the request's body: {e}")))
}

impl IntoResponse for Fault {
    fn into_response(self) -> Response {
        fault(StatusCode::BAD_REQUEST, self.0)
    }
}
