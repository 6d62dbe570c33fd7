//! The client's side: one request a connection, blocking. A VM whose process is stopped takes connections and says
//! nothing: every wait for what comes at once has a deadline.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, StatusCode, body::Bytes};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};

use super::types::{
    Error, InstanceInfo, SnapshotCreateParams, SnapshotProgress, SnapshotReport, Vm, VmState,
};

/// How long an answer may take that needs nothing of the guest, unless [`Client::within`] says otherwise. A machine
/// under load takes a second now and then.
const ANSWER: Duration = Duration::from_secs(5);
/// How much longer a pause or a resume may take.
const REST: Duration = Duration::from_secs(10);
/// How long to wait where a VM takes no more connections, before the next try.
const CONNECT_PAUSE: Duration = Duration::from_millis(20);
/// Largest answer, bytes: a report on a snapshot of 32 disks has a few KiB.
const ANSWER_MAX: usize = 1 << 20;

/// Why a VM did not answer, or did not do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens on the socket.
    #[error("cannot reach the VM at {}: is it running? (`squib ps` lists those that are)", socket.display())]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// This process cannot ask.
    #[error("no connection to the VM at {} can be made here", socket.display())]
    Host {
        /// The socket.
        socket: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Nothing came in time, or the connection broke before the answer was there.
    #[error("the VM at {} did not answer: {reason}", socket.display())]
    NoAnswer {
        /// The socket.
        socket: PathBuf,
        /// Why.
        reason: String,
    },
    /// The VM refused, or failed.
    #[error("{message}")]
    Fault {
        /// HTTP status of the answer.
        status: u16,
        /// The VM's own words.
        message: String,
    },
}

/// A VM's control socket.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
    patience: Duration,
}

impl Client {
    /// A client of the VM that listens on `socket`.
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned(), patience: ANSWER }
    }

    /// A client that waits so long for an answer that needs nothing of the guest.
    #[must_use]
    pub fn within(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    /// `GET /` of many at a time, so that those that do not answer cost one wait together.
    pub fn info_of_all(
        clients: &[Self],
    ) -> Result<Vec<Result<InstanceInfo, ClientError>>, ClientError> {
        let Some(first) = clients.first() else { return Ok(Vec::new()) };
        let ask = |client: &Self| {
            let client = client.clone();
            tokio::spawn(async move {
                let request = client.request(Method::GET, "/", None::<&()>)?;
                client.parse(&client.answer(request, Some(client.patience)).await?)
            })
        };
        Ok(first.runtime()?.block_on(async {
            let asked: Vec<_> = clients.iter().map(ask).collect();
            let mut answers = Vec::new();
            for (client, asked) in clients.iter().zip(asked) {
                answers.push(asked.await.unwrap_or_else(|e| Err(client.no_answer(e))));
            }
            answers
        }))
    }

    /// `GET /`.
    pub fn info(&self) -> Result<InstanceInfo, ClientError> {
        self.call(Method::GET, "/", None::<&()>, Some(self.patience))
    }

    /// `PATCH /vm`.
    pub fn set_state(&self, state: VmState) -> Result<(), ClientError> {
        let deadline = self.patience + REST;
        self.send(Method::PATCH, "/vm", Some(&Vm { state }), Some(deadline)).map(drop)
    }

    /// `PUT /snapshot/create`, with a report as the answer. It comes when it is done, however long that takes:
    /// [`progress`](Self::progress) tells whether the VM is still there.
    pub fn snapshot(&self, params: &SnapshotCreateParams) -> Result<SnapshotReport, ClientError> {
        self.call(Method::PUT, "/snapshot/create", Some(params), None)
    }

    /// `GET /snapshot/progress`.
    pub fn progress(&self) -> Result<SnapshotProgress, ClientError> {
        self.call(Method::GET, "/snapshot/progress", None::<&()>, Some(self.patience))
    }

    fn call<A: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
        deadline: Option<Duration>,
    ) -> Result<A, ClientError> {
        let answer = self.send(method, path, body, deadline)?;
        self.parse(&answer)
    }

    fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
        deadline: Option<Duration>,
    ) -> Result<Bytes, ClientError> {
        let request = self.request(method, path, body)?;
        self.runtime()?.block_on(self.answer(request, deadline))
    }

    fn runtime(&self) -> Result<tokio::runtime::Runtime, ClientError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.map_err(|e| self.host(e))
    }

    fn request(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<Request<Full<Bytes>>, ClientError> {
        let body = match body {
            Some(body) => serde_json::to_vec(body).map_err(|e| self.no_answer(e))?,
            None => Vec::new(),
        };
        Request::builder()
            .method(method)
            .uri(path)
            .header("Host", "localhost")
            .header("Content-Type", "application/json")
            .header("Prefer", "return=representation")
            .body(Full::new(Bytes::from(body)))
            .map_err(|e| self.no_answer(e))
    }

    async fn answer(
        &self,
        request: Request<Full<Bytes>>,
        deadline: Option<Duration>,
    ) -> Result<Bytes, ClientError> {
        let exchange = self.exchange(request);
        let (status, answer) = match deadline {
            None => exchange.await?,
            Some(deadline) => tokio::time::timeout(deadline, exchange).await.map_err(|_| {
                let advice = "its process may be stopped: `squib ps` tells its number, \
                              `kill -CONT` lets it go on";
                self.no_answer(format!("nothing came within {deadline:?}; {advice}"))
            })??,
        };
        if status.is_success() {
            return Ok(answer);
        }
        let message = match serde_json::from_slice::<Error>(&answer) {
            Ok(error) => error.fault_message,
            Err(_) => String::from_utf8_lossy(&answer).into_owned(),
        };
        Err(ClientError::Fault { status: status.as_u16(), message })
    }

    async fn exchange(
        &self,
        request: Request<Full<Bytes>>,
    ) -> Result<(StatusCode, Bytes), ClientError> {
        let stream = self.connect().await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| self.no_answer(e))?;
        // It ends with the connection; errors reach the request as well.
        let connection = tokio::spawn(connection);
        let response = sender.send_request(request).await.map_err(|e| self.no_answer(e))?;
        let status = response.status();
        let body = response.into_body();
        let body = Limited::new(body, ANSWER_MAX).collect().await.map_err(|e| self.no_answer(e))?;
        drop(sender);
        connection.abort();
        Ok((status, body.to_bytes()))
    }

    async fn connect(&self) -> Result<tokio::net::UnixStream, ClientError> {
        loop {
            let error = match tokio::net::UnixStream::connect(&self.socket).await {
                Ok(stream) => return Ok(stream),
                Err(error) => error,
            };
            match error.kind() {
                // Its line of connections is full. The deadline ends this.
                io::ErrorKind::WouldBlock => tokio::time::sleep(CONNECT_PAUSE).await,
                io::ErrorKind::NotFound
                | io::ErrorKind::ConnectionRefused
                | io::ErrorKind::PermissionDenied => {
                    return Err(ClientError::Connect {
                        socket: self.socket.clone(),
                        source: error,
                    });
                }
                _ => return Err(self.host(error)),
            }
        }
    }

    fn parse<A: DeserializeOwned>(&self, answer: &[u8]) -> Result<A, ClientError> {
        serde_json::from_slice(answer).map_err(|e| self.no_answer(e))
    }

    fn no_answer(&self, reason: impl std::fmt::Display) -> ClientError {
        ClientError::NoAnswer { socket: self.socket.clone(), reason: reason.to_string() }
    }

    fn host(&self, source: io::Error) -> ClientError {
        ClientError::Host { socket: self.socket.clone(), source }
    }
}
