//! `squib snapshot`.

mod cache;
mod check;
mod create;
mod diff;
mod flatten;
mod inspect;
mod optimize;
mod rebase;
mod restore;
mod rewrite;
mod rm;
mod verify;

use std::{path::Path, time::Instant};

pub(crate) use restore::template_cache;

use crate::{
    args::SnapshotCommand,
    exit::{Code, Result},
};

/// The snapshots that the command line names, and that the command needs.
fn given(command: &SnapshotCommand) -> Vec<&Path> {
    match command {
        SnapshotCommand::Create(args) => args.diff.iter().map(|dir| &**dir).collect(),
        SnapshotCommand::Restore(args) => vec![&args.dir],
        SnapshotCommand::Inspect(args) => vec![&args.dir],
        SnapshotCommand::Verify(args) => vec![&args.dir],
        SnapshotCommand::Flatten(args) => vec![&args.dir],
        SnapshotCommand::Diff(args) => vec![&args.a, &args.b],
        SnapshotCommand::Check(args) => vec![&args.dir],
        SnapshotCommand::Rebase(args) => {
            args.onto.iter().chain([&args.dir]).map(|dir| &**dir).collect()
        }
        SnapshotCommand::Rm(args) => vec![&args.dir],
        SnapshotCommand::Optimize(args) => vec![&args.dir],
        SnapshotCommand::Cache(_) => Vec::new(),
    }
}

pub(crate) fn snapshot(command: SnapshotCommand, started: Instant) -> Result<Code> {
    for dir in given(&command) {
        rewrite::must_be_there(dir)?;
    }
    match command {
        SnapshotCommand::Create(args) => create::create(&args),
        SnapshotCommand::Restore(args) => restore::restore(&args, started),
        SnapshotCommand::Inspect(args) => inspect::inspect(&args),
        SnapshotCommand::Verify(args) => verify::verify(&args),
        SnapshotCommand::Flatten(args) => flatten::flatten(&args),
        SnapshotCommand::Diff(args) => diff::diff(&args),
        SnapshotCommand::Check(args) => check::check(&args),
        SnapshotCommand::Rebase(args) => rebase::rebase(&args),
        SnapshotCommand::Rm(args) => rm::rm(&args),
        SnapshotCommand::Optimize(args) => optimize::optimize(&args),
        SnapshotCommand::Cache(command) => cache::cache(&command),
    }
}
