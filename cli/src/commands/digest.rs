//! `squib digest`.

use std::path::Path;

use serde::Serialize;
use squib_formats::{
    digest::Digest,
    image::{Control, ImageDigest, digest_file, digest_reader},
};

use crate::{
    args::DigestArgs,
    exit::{Code, Result, WithCode},
    output::{ByteBar, line, print_json},
};

#[derive(Serialize)]
struct Answer<'a> {
    file: &'a Path,
    digest: Digest,
    size: u64,
    zero: u64,
}

pub(crate) fn digest(args: &DigestArgs) -> Result<Code> {
    let file = args.file.as_path();
    let found = if file == Path::new("-") {
        digest_reader("standard input", &mut std::io::stdin().lock())
    } else {
        let bar = ByteBar::new("digest");
        digest_file(file, Control { progress: &bar, ..Control::default() })
    };
    let ImageDigest { digest, size, zero } = found.code(Code::Usage)?;
    if args.json {
        print_json(&Answer { file, digest, size, zero })?;
    } else {
        line!("{digest}  {}", file.display());
    }
    Ok(Code::Done)
}
