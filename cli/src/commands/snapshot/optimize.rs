//! `squib snapshot optimize`.

use squib_formats::snapshot_dir::Snapshot;
use squib_snapshot::{
    Durability,
    observe::Run,
    working_set::{OptimizeError, Optimized, optimize as write_again},
};

use crate::{
    api::types,
    args::OptimizeArgs,
    events,
    exit::{Code, Failure, Result, WithCode},
    home::Home,
    output::{ByteBar, line},
};

pub(crate) fn optimize(args: &OptimizeArgs) -> Result<Code> {
    let OptimizeArgs { dir, output, chain, durability } = args;
    let durability = match durability {
        types::Durability::Full => Durability::Full,
        types::Durability::None => Durability::None,
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
    let made = write_again(dir, &chain.parents, output.as_deref(), &children, durability, &run);
    drop(bar);
    let Optimized { id, first } = made.map_err(failure)?;
    line!("snapshot  {}", output.as_ref().unwrap_or(dir).display());
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
