//! The control API: HTTP over a unix socket.

pub mod client;
pub mod server;
pub mod types;
