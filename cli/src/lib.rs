//! What the `squib` binary is made of. The library part exists so that tests can share it.
#![forbid(unsafe_code)]

pub mod kit;
