//! Connections of the control API: how many there may be, and how long each may keep others waiting.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::{UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch},
    time::{Instant, Sleep, sleep, timeout},
};

/// How long answers that are under way may take when the VM ends.
pub(super) const LAST_ANSWERS: Duration = Duration::from_secs(2);
/// How long accepting rests when it fails, which it does while the process has no descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How long a client that is refused may take to read why.
const REFUSAL: Duration = Duration::from_secs(1);

/// What clients may take of a VM.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Most connections at a time. One more gets status 503.
    pub connections: usize,
    /// Most calls at a time that a client may have to wait for, those included whose client has gone. One more
    /// gets status 503.
    pub calls: usize,
    /// How long the head of a request may take, and a connection may do nothing.
    pub head: Duration,
    /// How long the body of a request may take.
    pub body: Duration,
    /// How long a client may read nothing of its answer.
    pub answer: Duration,
}

impl Default for Limits {
    /// 64 connections, 32 calls, ten seconds each.
    fn default() -> Self {
        let patience = Duration::from_secs(10);
        Self { connections: 64, calls: 32, head: patience, body: patience, answer: patience }
    }
}

/// Serves until `stopped`, and then gives the answers that are under way a moment.
pub(super) async fn serve(
    listener: UnixListener,
    router: Router,
    limits: Limits,
    mut stopped: oneshot::Receiver<()>,
) {
    let slots = Arc::new(Semaphore::new(limits.connections));
    let refusals = Arc::new(Semaphore::new(limits.connections));
    // Its end is what connections see as the end of the VM.
    let (alive, ended) = watch::channel(());
    let mut failing = false;
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = &mut stopped => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!("the control socket takes no connection for now: {error}");
                }
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        failing = false;
        if let Ok(slot) = slots.clone().try_acquire_owned() {
            tokio::spawn(connection(stream, router.clone(), limits, ended.clone(), slot));
        } else if let Ok(slot) = refusals.clone().try_acquire_owned() {
            tokio::spawn(refuse(stream, limits.connections, slot));
        }
        // With so many who are being refused already, one more finds its connection closed.
    }
    drop(alive);
    let all = u32::try_from(limits.connections).unwrap_or(u32::MAX);
    let _ = timeout(LAST_ANSWERS, slots.acquire_many(all)).await;
}

async fn connection(
    stream: UnixStream,
    router: Router,
    limits: Limits,
    mut ended: watch::Receiver<()>,
    _slot: OwnedSemaphorePermit,
) {
    let stream = Deadline { stream, limit: limits.answer, stuck: None };
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(limits.head);
    let served = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    tokio::pin!(served);
    // How a connection ends is its client's affair.
    tokio::select! {
        _ = served.as_mut() => return,
        _ = ended.changed() => served.as_mut().graceful_shutdown(),
    }
    let _ = served.await;
}

/// Says why the connection is closed, to whatever is asked on it.
async fn refuse(mut stream: UnixStream, connections: usize, _slot: OwnedSemaphorePermit) {
    let exchange = async {
        let mut request = [0; 4096];
        if stream.read(&mut request).await? == 0 {
            return Ok(());
        }
        let why = format!("there are {connections} connections already: close one");
        let body = format!("{{\"fault_message\":\"{why}\"}}");
        let answer = format!(
            "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\n\
             content-length: {}\r\nconnection: close\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(answer.as_bytes()).await?;
        stream.shutdown().await?;
        // Closed with bytes unread, the connection would be reset before the answer is read.
        while stream.read(&mut request).await? > 0 {}
        io::Result::Ok(())
    };
    let _ = timeout(REFUSAL, exchange).await;
}

/// A connection whose client has to read what is written to it.
struct Deadline {
    stream: UnixStream,
    limit: Duration,
    /// Runs while nothing can be written.
    stuck: Option<Pin<Box<Sleep>>>,
}

impl Deadline {
    fn poll<T>(
        &mut self,
        cx: &mut Context<'_>,
        write: impl FnOnce(Pin<&mut UnixStream>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if let done @ Poll::Ready(_) = write(Pin::new(&mut self.stream), cx) {
            self.stuck = None;
            return done;
        }
        let until = Instant::now() + self.limit;
        let stuck = self.stuck.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(until)));
        ready!(stuck.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Deadline {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, into)
    }
}

impl AsyncWrite for Deadline {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll(cx, |stream, cx| stream.poll_write(cx, bytes))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll(cx, |stream, cx| stream.poll_flush(cx))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll(cx, |stream, cx| stream.poll_shutdown(cx))
    }
}
