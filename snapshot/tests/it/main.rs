//! Captures and restores, with a machine that exists only in the test.

mod captures;
mod guest;
