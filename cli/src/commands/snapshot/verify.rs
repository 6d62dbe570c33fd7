//! `squib snapshot verify`.

use serde::Serialize;
use squib_formats::{digest::Digest, image::Control};
use squib_snapshot::verify::{Verified, verify as check};

use crate::{
    args::VerifyArgs,
    exit::{Code, Result},
    output::{ByteBar, bytes, line, print_json, say},
};

#[derive(Serialize)]
struct Answer {
    intact: bool,
    /// `None` when the manifest cannot be trusted.
    id: Option<Digest>,
    damage: Vec<String>,
    unlisted: Vec<String>,
}

pub(crate) fn verify(args: &VerifyArgs) -> Result<Code> {
    let bar = ByteBar::new("verify");
    let checked =
        check(&args.dir, &args.chain.parents, Control { progress: &bar, ..Control::default() });
    drop(bar);
    let dir = args.dir.display();
    match checked {
        Ok(Verified { snapshot, images, unlisted }) => {
            if args.json {
                let id = Some(snapshot.id());
                print_json(&Answer { intact: true, id, damage: Vec::new(), unlisted })?;
                return Ok(Code::Done);
            }
            line!("{dir} is intact: snapshot {}", snapshot.id());
            for (name, loaded) in images {
                line!(
                    "{name}: {}, {} of it zero, {} stored",
                    bytes(loaded.size),
                    bytes(loaded.zero),
                    bytes(loaded.stored)
                );
            }
            for name in unlisted {
                line!("note: `{name}` does not belong to the snapshot");
            }
            Ok(Code::Done)
        }
        Err(damage) => {
            let damage: Vec<String> = damage.0.iter().map(ToString::to_string).collect();
            if args.json {
                print_json(&Answer { intact: false, id: None, damage, unlisted: Vec::new() })?;
            } else {
                say!("squib: {dir} is damaged or no snapshot:");
                damage.iter().for_each(|line| say!("  {line}"));
            }
            Ok(Code::Snapshot)
        }
    }
}
