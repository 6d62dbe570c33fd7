//! `squib snapshot rebase`.

use squib_snapshot::{
    observe::Run,
    rebase::{Rebased, rebase as write_again},
};

use super::{
    flatten::flatten,
    rewrite::{self, Written},
};
use crate::{
    args::{FlattenArgs, RebaseArgs},
    events,
    exit::{Code, Result},
    home::Home,
    output::{ByteBar, bytes, line, print_json, say},
};

pub(crate) fn rebase(args: &RebaseArgs) -> Result<Code> {
    let RebaseArgs { dir, onto, output, chain, durability, force, json } = args;
    let Some(onto) = onto else {
        return flatten(&FlattenArgs {
            dir: dir.clone(),
            output: output.clone(),
            chain: chain.clone(),
            durability: *durability,
            force: *force,
            json: *json,
        });
    };
    let cancel = events::give_up_on_signals()?;
    let bar = ByteBar::new("rebase");
    let existing = rewrite::existing(*force, output, Some(onto), &chain.parents)?;
    let durability = rewrite::durability(*durability);
    let run = Run { observer: &bar, cancel, ..Run::default() };
    let made = write_again(dir, &chain.parents, onto, output, existing, durability, &run);
    drop(bar);
    let Rebased { id, parent, links, stored } = made.map_err(events::failure)?;
    // Without the note a removal of the parent finds the difference only where it looks itself.
    let noted = Home::open().map(|home| home.children().record(parent, output));
    if let Ok(Err(error)) = noted {
        say!("squib: {}: not noted as a child of its parent: {error}", output.display());
    }
    if *json {
        print_json(&Written {
            path: output,
            id,
            parent: Some(parent),
            links: Some(links),
            stored_bytes: Some(stored),
            first_chunks: None,
        })?;
        return Ok(Code::Done);
    }
    line!("snapshot  {}", output.display());
    line!("id        {id}");
    line!("parent    {parent} at {}", onto.display());
    line!("stored    {}, the last of a chain of {links}", bytes(stored));
    Ok(Code::Done)
}
