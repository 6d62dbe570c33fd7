//! `squib snapshot flatten`.

use squib_snapshot::{
    flatten::{Flattened, flatten as make_full},
    observe::Run,
};

use super::rewrite::{self, Written};
use crate::{
    args::FlattenArgs,
    events,
    exit::{Code, Result},
    output::{ByteBar, bytes, line, print_json},
};

pub(crate) fn flatten(args: &FlattenArgs) -> Result<Code> {
    let cancel = events::give_up_on_signals()?;
    let bar = ByteBar::new("flatten");
    let FlattenArgs { dir, output, chain, durability, force, json } = args;
    let existing = rewrite::existing(*force, output, None, &chain.parents)?;
    let durability = rewrite::durability(*durability);
    let run = Run { observer: &bar, cancel, ..Run::default() };
    let made = make_full(dir, &chain.parents, output, existing, durability, &run);
    drop(bar);
    let Flattened { id, links, stored } = made.map_err(events::failure)?;
    if *json {
        print_json(&Written {
            path: output,
            id,
            parent: None,
            links: Some(links),
            stored_bytes: Some(stored),
            first_chunks: None,
        })?;
        return Ok(Code::Done);
    }
    line!("snapshot  {}", output.display());
    line!("id        {id}");
    line!("stored    {}, from a chain of {links}", bytes(stored));
    Ok(Code::Done)
}
