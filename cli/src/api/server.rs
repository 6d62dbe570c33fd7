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
    extract::{DefaultBodyLimit, State, rejection::BytesRejection},
    http::{HeaderMap, Method, StatusCode, Uri},
    response::{IntoResponse, Response},
    routing::{get, patch, put},
};
use serde::de::DeserializeOwned;
use tokio::sync::oneshot;

use super::types::{
    Error, InstanceInfo, SnapshotCreateParams, SnapshotProgress, SnapshotReport, SnapshotType, Vm,
    VmState,
};

/// Largest request body, bytes; Firecracker's default.
const BODY_MAX: usize = 51_200;
/// How long answers that are under way may take when the VM ends.
const LAST_ANSWERS: Duration = Duration::from_secs(2);

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
        listener.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let listener = {
            let _context = runtime.enter();
            tokio::net::UnixListener::from_std(listener)?
        };
        let (stop, stopped) = oneshot::channel();
        let thread = thread::Builder::new().name("api".into()).spawn(move || {
            runtime.block_on(async {
                let serve = axum::serve(listener, router(controlled))
                    .with_graceful_shutdown(async { drop(stopped.await) });
                if let Err(e) = serve.await {
                    tracing::error!("the control API has ended: {e}");
                }
            });
            // A call that hangs must not keep the process.
            runtime.shutdown_background();
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

type Body = Result<Bytes, BytesRejection>;
type Shared = State<Arc<dyn Controlled>>;

fn router(controlled: Arc<dyn Controlled>) -> Router {
    Router::new()
        .route("/", get(describe))
        .route("/vm", patch(set_state))
        .route("/snapshot/create", put(create))
        .route("/snapshot/progress", get(progress))
        .method_not_allowed_fallback(unknown)
        .fallback(unknown)
        .layer(DefaultBodyLimit::max(BODY_MAX))
        .with_state(controlled)
}

async fn describe(State(vm): Shared) -> Response {
    Json(vm.info()).into_response()
}

async fn progress(State(vm): Shared) -> Response {
    Json(vm.progress()).into_response()
}

async fn set_state(State(vm): Shared, body: Body) -> Response {
    let body = match body {
        Ok(body) => body,
        Err(error) => return unread(&error),
    };
    let wanted: Vm = match parse(&body) {
        Ok(wanted) => wanted,
        Err(fault) => return fault.into_response(),
    };
    let done = blocking(move || match wanted.state {
        VmState::Paused => vm.pause(),
        VmState::Resumed => vm.resume(),
    });
    match done.await {
        Ok(()) => StatusCode::NO_CONTENT.into_response(),
        Err(fault) => fault.into_response(),
    }
}

/// Whoever asked for a snapshot; nobody wants it any more once this is dropped.
struct Asker(Arc<AtomicBool>);

impl Drop for Asker {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

async fn create(State(vm): Shared, headers: HeaderMap, body: Body) -> Response {
    let body = match body {
        Ok(body) => body,
        Err(error) => return unread(&error),
    };
    let params: SnapshotCreateParams = match parse(&body).and_then(check) {
        Ok(params) => params,
        Err(fault) => return fault.into_response(),
    };
    // A client that goes away in the middle (Ctrl-C) drops this future.
    let asker = Asker(Arc::default());
    let give_up = Arc::clone(&asker.0);
    let written = blocking(move || {
        let stop = params.stop;
        let report = vm.snapshot(params, &give_up)?;
        if stop {
            vm.stop();
        }
        Ok(report)
    });
    let report = match written.await {
        Ok(report) => report,
        Err(fault) => return fault.into_response(),
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
    let fault_message = format!("there is no {method} {}", uri.path());
    (StatusCode::NOT_FOUND, Json(Error { fault_message })).into_response()
}

/// The answer to a body that is too long, or broke off.
fn unread(error: &BytesRejection) -> Response {
    let fault_message = error.body_text();
    (error.status(), Json(Error { fault_message })).into_response()
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Fault> {
    serde_json::from_slice(body).map_err(|e| Fault(format!("the request's body: {e}")))
}

/// Runs `call` where it may block.
async fn blocking<T: Send + 'static>(
    call: impl FnOnce() -> Result<T, Fault> + Send + 'static,
) -> Result<T, Fault> {
    let joined = tokio::task::spawn_blocking(call).await;
    joined.unwrap_or_else(|_| Err(Fault("the call panicked: see the VM's own output".into())))
}

impl IntoResponse for Fault {
    fn into_response(self) -> Response {
        (StatusCode::BAD_REQUEST, Json(Error { fault_message: self.0 })).into_response()
    }
}
