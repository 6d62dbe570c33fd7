//! What lies on disk: snapshot header, manifest, sections, images, digests, and the
//! [`Persist`](persist::Persist) trait. Knows no virtual machine.
#![forbid(unsafe_code)]

pub mod boot_files;
pub mod chain;
pub mod codec;
#[cfg(any(test, feature = "contract"))]
pub mod contract;
pub mod digest;
pub mod error;
pub mod header;
pub mod image;
pub mod layer;
pub mod manifest;
pub mod names;
pub mod open;
pub mod persist;
pub mod publish;
pub mod reorder;
pub mod sections;
pub mod snapshot_dir;
pub mod storage;
pub mod verify;
pub mod working_set;
