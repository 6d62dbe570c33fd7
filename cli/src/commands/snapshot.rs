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
mod rm;
mod verify;

use std::time::Instant;

pub(crate) use restore::template_cache;

use crate::{
    args::SnapshotCommand,
    exit::{Code, Result},
};

pub(crate) fn snapshot(command: SnapshotCommand, started: Instant) -> Result<Code> {
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
