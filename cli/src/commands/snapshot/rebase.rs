//! `squib snapshot rebase`.

use squib_snapshot::{
    Durability,
    observe::Run,
    rebase::{Rebased, rebase as write_again},
};

use super::flatten::flatten;
use crate::{
    api::types,
    args::{FlattenArgs, RebaseArgs},
    events,
    exit::{Code, Result},
    home::Home,
    output::{ByteBar, bytes, line, say},
};

pub(crate) fn rebase(args: &RebaseArgs) -> Result<Code> {
    let RebaseArgs { dir, onto, output, chain, durability } = args;
    let Some(onto) = onto else {
        return flatten(&FlattenArgs {
            dir: dir.clone(),
            output: output.clone(),
            chain: chain.clone(),
            durability: *durability,
        });
    };
    let cancel = events::give_up_on_signals()?;
    let bar = ByteBar::new("rebase");
    let durability = match durability {
        types::Durability::Full => Durability::Full,
        types::Durability::None => Durability::None,
    };
    let run = Run { observer: &bar, cancel, ..Run::default() };
    let made = write_again(dir, &chain.parents, onto, output, durability, &run);
    drop(bar);
    let Rebased { id, parent, links, stored } = made.map_err(events::failure)?;
    // Without the note a removal of the parent finds the difference only where it looks itself.
    let noted = Home::open().map(|home| home.children().record(parent, output));
    if let Ok(Err(error)) = noted {
        say!("squib: {}: not noted as a child of its parent: {error}", output.display());
    }
    line!("snapshot  {}", output.display());
    line!("id        {id}");
    line!("parent    {parent} at {}", onto.display());
    line!("stored    {}, the last of a chain of {links}", bytes(stored));
    Ok(Code::Done)
}
