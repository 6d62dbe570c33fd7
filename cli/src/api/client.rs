//! The client's side: one request a connection, blocking.

use std::{
    io,
    path::{Path, PathBuf},
};

use http_body_util::{BodyExt, Full};
use hyper::{Method, Request, StatusCode, body::Bytes};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};

use super::types::{
    Error, InstanceInfo, SnapshotCreateParams, SnapshotProgress, SnapshotReport, Vm, VmState,
};

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
    /// The connection broke before the answer was there.
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
}

impl Client {
    /// A client of the VM that listens on `socket`.
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }

    /// `GET /`.
    pub fn info(&self) -> Result<InstanceInfo, ClientError> {
        self.call(Method::GET, "/", None::<&()>)
    }

    /// `PATCH /vm`.
    pub fn set_state(&self, state: VmState) -> Result<(), ClientError> {
        self.send(Method::PATCH, "/vm", Some(&Vm { state })).map(drop)
    }

    /// `PUT /snapshot/create`, with a report as the answer.
    pub fn snapshot(&self, params: &SnapshotCreateParams) -> Result<SnapshotReport, ClientError> {
        self.call(Method::PUT, "/snapshot/create", Some(params))
    }

    /// `GET /snapshot/progress`.
    pub fn progress(&self) -> Result<SnapshotProgress, ClientError> {
        self.call(Method::GET, "/snapshot/progress", None::<&()>)
    }

    fn call<A: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<A, ClientError> {
        let answer = self.send(method, path, body)?;
        serde_json::from_slice(&answer).map_err(|e| self.no_answer(e))
    }

    fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<Bytes, ClientError> {
        let body = match body {
            Some(body) => serde_json::to_vec(body).map_err(|e| self.no_answer(e))?,
            None => Vec::new(),
        };
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("Host", "localhost")
            .header("Content-Type", "application/json")
            .header("Prefer", "return=representation")
            .body(Full::new(Bytes::from(body)))
            .map_err(|e| self.no_answer(e))?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| self.no_answer(e))?;
        let (status, answer) = runtime.block_on(self.exchange(request))?;
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
        let stream = tokio::net::UnixStream::connect(&self.socket)
            .await
            .map_err(|source| ClientError::Connect { socket: self.socket.clone(), source })?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| self.no_answer(e))?;
        // It ends with the connection; errors reach the request as well.
        let connection = tokio::spawn(connection);
        let response = sender.send_request(request).await.map_err(|e| self.no_answer(e))?;
        let status = response.status();
        let body = response.into_body().collect().await.map_err(|e| self.no_answer(e))?;
        drop(sender);
        connection.abort();
        Ok((status, body.to_bytes()))
    }

    fn no_answer(&self, reason: impl std::fmt::Display) -> ClientError {
        ClientError::NoAnswer { socket: self.socket.clone(), reason: reason.to_string() }
    }
}
