#![warn(missing_docs)]
//! What the end-to-end tests and the bench-side tools share.

pub mod difftest;
pub mod tiny;
