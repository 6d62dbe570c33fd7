//! `squib snapshot flatten`.

use squib_snapshot::{
    Durability,
    flatten::{Flattened, flatten as make_full},
    observe::Run,
};

use crate::{
    api::types,
    args::FlattenArgs,
    events,
    exit::{Code, Result},
    output::{ByteBar, bytes, line},
};

pub(crate) fn flatten(args: &FlattenArgs) -> Result<Code> {
    let cancel = events::give_up_on_signals()?;
    let bar = ByteBar::new("flatten");
    let durability = match args.durability {
        types::Durability::Full => Durability::Full,
        types::Durability::None => Durability::None,
    };
    let run = Run { observer: &bar, cancel, ..Run::default() };
    let made = make_full(&args.dir, &args.chain.parents, &args.output, durability, &run);
    drop(bar);
    let Flattened { id, links, stored } = made.map_err(events::failure)?;
    line!("snapshot  {}", args.output.display());
    line!("id        {id}");
    line!("stored    {}, from a chain of {links}", bytes(stored));
    Ok(Code::Done)
}
