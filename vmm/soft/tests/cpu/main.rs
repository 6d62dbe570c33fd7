//! Whole programs on one or more vCPUs, from their words to what is left in registers and memory.

mod common;
mod debug;
mod programs;
mod tags;
mod translation;
