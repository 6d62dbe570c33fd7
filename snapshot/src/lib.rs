//! Capture and restore of whole machines.
//!
//! [`capture`](capture::capture) brings a machine to rest, writes its state, its memory and its disks into
//! a snapshot, and lets it go on. [`restore`](restore::restore) makes a machine from a snapshot, after
//! everything that is cheap to check has been checked. [`verify`](verify::verify) checks every byte of one
//! and [`inspect`](inspect::inspect) says what it is of. [`flatten`](flatten::flatten) makes a full snapshot of
//! a difference, and [`diff`](diff::diff) compares two.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod boot_files;
pub mod capture;
pub mod check;
pub mod compat;
mod config;
pub mod diff;
mod disks;
pub mod flatten;
pub mod host;
pub mod inspect;
mod memory;
pub mod observe;
pub mod rebase;
pub mod remove;
pub mod restore;
pub mod verify;
pub mod working_set;

pub use disks::ChangedDisks;
pub use memory::{CacheError, MOST_OVERCOMMIT, MemoryError, Template, TemplateCache, TemplateInfo};
pub use squib_formats::{
    error::FormatError,
    publish::{Durability, Existing},
};
