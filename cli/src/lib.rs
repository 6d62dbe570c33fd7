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
mod log;
mod output;
mod plain;
mod session;
mod timings;
mod vm;

use std::{io::Write, process::ExitCode, time::Instant};

use clap::{CommandFactory, Parser};

use crate::exit::Code;

/// The whole program.
pub fn main() -> ExitCode {
    let started = Instant::now();
    let code = match args::Cli::try_parse() {
        Ok(cli) => command(cli.command, started),
        Err(mut refused) => refuse(&mut refused),
    };
    // Whatever way a command took out.
    console::restore_terminal();
    log::finish();
    let (code, why) = output::finish(code);
    if let Some(why) = why {
        console::message(&why);
    }
    ExitCode::from(code.number())
}

/// The whole command line, for what has to know every command.
pub fn command_line() -> clap::Command {
    args::Cli::command()
}

fn command(command: args::Command, started: Instant) -> Code {
    log::start();
    if let Err(failed) = events::survive_file_size_limits() {
        console::message(&format!("squib: {failed}\n"));
        return Code::Failed;
    }
    let json = command.is_json();
    let done = match command {
        args::Command::Run(args) => commands::run::run(args, started),
        args::Command::Snapshot(command) => commands::snapshot::snapshot(command, started),
        args::Command::Digest(args) => commands::digest::digest(&args),
        args::Command::Demo(args) => commands::demo::demo(&args),
        args::Command::Kit(command) => commands::kit::kit(command),
        args::Command::Ps(args) => commands::ps::ps(&args),
        args::Command::Doctor(args) => commands::doctor::doctor(&args),
    };
    done.unwrap_or_else(|failure| {
        console::restore_terminal();
        if json {
            output::print_error(&failure);
        }
        // Its text may have several lines.
        console::message(&format!("squib: {failure}\n"));
        failure.code
    })
}

/// Prints help, the version, or what is wrong with the command line.
fn refuse(refused: &mut clap::Error) -> Code {
    args::check_suggestion(refused);
    #[expect(clippy::disallowed_methods, reason = "clap prints through the library's own buffer")]
    let printed = refused.print().and_then(|()| std::io::stdout().flush());
    if refused.use_stderr() {
        if let Some(advice) = args::advice(refused) {
            output::say!("squib: {advice}");
        }
        // A message has no other place to go.
        return Code::Usage;
    }
    output::keep_error(printed);
    Code::Done
}
