//! `squib snapshot optimize`.

use squib_formats::snapshot_dir::Snapshot;
use squib_snapshot::{
    observe::Run,
    working_set::{OptimizeError, Optimized, optimize as write_again},
};

use super::rewrite::{self, Written};
use crate::{
    args::OptimizeArgs,
    events,
    exit::{Code, Failure, Result, WithCode},
    home::Home,
    output::{ByteBar, line, print_json},
};

pub(crate) fn optimize(args: &OptimizeArgs) -> Result<Code> {
    let OptimizeArgs { dir, output, chain, durability, force, json } = args;
    let durability = rewrite::durability(*durability);
    let written = match output {
        Some(output) => Some((&**output, rewrite::existing(*force, output, None, &chain.parents)?)),
        None => None,
    };
    let mut children = Vec::new();
    if output.is_none()
        && let Ok(snapshot) = Snapshot::open(dir)
    {
        children = Home::open().code(Code::Failed)?.children().below(snapshot.id());
    }
    let cancel = events::give_up_on_signals()?;
    let bar = ByteBar::new("optimize");
    let run = Run { observer: &bar, cancel, ..Run::default() };
    let made = write_again(dir, &chain.parents, written, &children, durability, &run);
    drop(bar);
    let Optimized { id, first } = made.map_err(failure)?;
    let path = output.as_ref().unwrap_or(dir);
    if *json {
        let (parent, links, stored_bytes) = (None, None, None);
        print_json(&Written { path, id, parent, links, stored_bytes, first_chunks: Some(first) })?;
        return Ok(Code::Done);
    }
    line!("snapshot  {}", path.display());
    line!("id        {id}");
    line!("first     {first} chunks, in the order of their first use");
    Ok(Code::Done)
}

fn failure(error: OptimizeError) -> Failure {
    let advice = match error {
        OptimizeError::Format(error) => return events::failure(error),
        OptimizeError::NoWorkingSet { .. } => {
            "`squib snapshot restore --record` makes one when its VM ends"
        }
        OptimizeError::Needed { .. } => "write it elsewhere with --output",
    };
    Failure::new(Code::Snapshot, anyhow::anyhow!("{error}: {advice}"))
}
