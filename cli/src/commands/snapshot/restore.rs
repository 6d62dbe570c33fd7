//! `squib snapshot restore`.

use std::time::Instant;

use crate::{
    args::RestoreArgs,
    exit::{Code, Failure, Result},
};

pub(crate) fn restore(_args: &RestoreArgs, _started: Instant) -> Result<Code> {
    Err(Failure::new(Code::Snapshot, anyhow::anyhow!("restoring snapshots is not built yet")))
}
