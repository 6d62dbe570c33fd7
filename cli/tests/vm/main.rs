//! The commands as a user runs them, with the tiny guest in them.

mod common;
mod life;
mod modes;
