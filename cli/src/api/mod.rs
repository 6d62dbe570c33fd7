//! The control API: HTTP over a unix socket.

pub mod client;
mod connections;
pub mod server;
pub mod types;
