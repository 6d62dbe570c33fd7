//! What the `squib` binary is made of. The library part exists so that tests can share it.
#![forbid(unsafe_code)]

pub mod api;
mod args;
mod capture;
pub mod children;
mod commands;
mod console;
mod events;
pub mod exit;
pub mod home;
pub mod kit;
mod output;
mod plain;
mod session;
mod timings;
mod vm;

use std::{process::ExitCode, time::Instant};

use clap::Parser;

/// The whole program.
pub fn main() -> ExitCode {
    let started = Instant::now();
    let cli = args::Cli::parse();
    log_to_stderr();
    let done = match cli.command {
        args::Command::Run(args) => commands::run::run(args, started),
        args::Command::Snapshot(command) => commands::snapshot::snapshot(command, started),
        args::Command::Digest(args) => commands::digest::digest(&args),
        args::Command::Demo(args) => commands::demo::demo(&args),
        args::Command::Kit(command) => commands::kit::kit(command),
        args::Command::Ps(args) => commands::ps::ps(&args),
        args::Command::Doctor(args) => commands::doctor::doctor(&args),
    };
    // Whatever way a command took out.
    console::restore_terminal();
    let code = done.unwrap_or_else(|failure| {
        eprintln!("squib: {failure}");
        failure.code
    });
    ExitCode::from(code.number())
}

/// Messages of the machine: warnings and errors, or what SQUIB_LOG asks for.
fn log_to_stderr() {
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_from_env("SQUIB_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(|| console::Messages).init();
}
