//! Whole programs on one or more vCPUs, from their words to what is left in registers and memory.

mod alignment;
mod bench;
mod common;
mod debug;
mod features;
mod programs;
mod tags;
mod translation;
