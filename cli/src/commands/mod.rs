//! One module a command.

pub(crate) mod demo;
pub(crate) mod digest;
pub(crate) mod doctor;
pub(crate) mod kit;
pub(crate) mod ps;
pub(crate) mod run;
pub(crate) mod snapshot;
