#![warn(missing_docs)]
//! What the end-to-end tests and the bench-side tools share.

pub mod away;
pub mod console;
pub mod debian;
pub mod difftest;
pub mod hostile;
pub mod linux;
pub mod macho;
pub mod programs;
pub mod retime;
pub mod scenario;
pub mod tiny;
pub mod transparency;
pub mod versus;
