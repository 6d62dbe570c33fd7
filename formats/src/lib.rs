//! What lies on disk: snapshot header, manifest, sections, images, digests, and the
//! [`Persist`](persist::Persist) trait. Knows no virtual machine.
#![forbid(unsafe_code)]

pub mod codec;
#[cfg(any(test, feature = "contract"))]
pub mod contract;
pub mod persist;
