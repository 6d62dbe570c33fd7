//! `squib snapshot rm`.

use squib_formats::snapshot_dir::Snapshot;
use squib_snapshot::remove::{RemoveError, Removed, remove};

use crate::{
    args::RmArgs,
    exit::{Code, Failure, Result, WithCode},
    home::Home,
    output::{bytes, line, print_json},
};

pub(crate) fn rm(args: &RmArgs) -> Result<Code> {
    let mut places = args.also.clone();
    // What cannot be read has no id, and its children are not known.
    if let Ok(snapshot) = Snapshot::open(&args.dir) {
        let home = Home::open().code(Code::Failed)?;
        places.extend(home.children().below(snapshot.id()));
    }
    let removed = remove(&args.dir, &places, args.force).map_err(failure)?;
    if args.json {
        print_json(&removed)?;
        return Ok(Code::Done);
    }
    let Removed { id, bytes: size, unlisted, dependents } = removed;
    line!("removed   {}, {}", args.dir.display(), bytes(size));
    if let Some(id) = id {
        line!("id        {id}");
    }
    for name in unlisted {
        line!("with it   {name}, which did not belong to it");
    }
    for dependent in dependents {
        line!("orphaned  {}: it needs this snapshot", dependent.path.display());
    }
    Ok(Code::Done)
}

fn failure(error: RemoveError) -> Failure {
    let advice = match &error {
        RemoveError::Needed { .. } => {
            ": remove them first, make them stand alone (`squib snapshot flatten`) or on another \
             parent (`squib snapshot rebase`), or use --force"
        }
        RemoveError::Unlisted { .. } | RemoveError::Unreadable { .. } => {
            ": --force removes all that is in the directory"
        }
        _ => "",
    };
    Failure::new(Code::Snapshot, anyhow::anyhow!("{error}{advice}"))
}
