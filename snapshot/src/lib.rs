#![warn(missing_docs)]
//! Placeholder.
