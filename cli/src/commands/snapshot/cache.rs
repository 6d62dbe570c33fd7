//! `squib snapshot cache`.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use squib_snapshot::TemplateInfo;

use super::restore::template_cache;
use crate::{
    args::CacheCommand,
    exit::{Code, Result, WithCode},
    output::{bytes, line, print_json},
};

pub(crate) fn cache(command: &CacheCommand) -> Result<Code> {
    let cache = template_cache()?;
    let (templates, json, removed) = match command {
        CacheCommand::Ls(args) => (cache.list().code(Code::Failed)?, args.json, false),
        CacheCommand::Prune(args) => {
            (cache.prune(args.keep.0).code(Code::Failed)?, args.json, true)
        }
    };
    if json {
        print_json(&templates.iter().map(Line::new).collect::<Vec<_>>())?;
        return Ok(Code::Done);
    }
    let stored: u64 = templates.iter().map(|template| template.stored).sum();
    match (removed, templates.is_empty()) {
        (false, false) => {
            line!("{:<64} {:>10} {:>10}  USED", "MEMORY DIGEST", "SIZE", "ON DISK")
        }
        (false, true) => line!("there are no templates"),
        (true, _) => {}
    }
    for template in &templates {
        let TemplateInfo { digest, size, stored, used, .. } = template;
        if removed {
            line!("removed   {digest}  {}", bytes(*stored));
        } else {
            let ago = SystemTime::now().duration_since(*used).unwrap_or_default();
            line!(
                "{digest} {:>10} {:>10}  {} ago",
                bytes(*size),
                bytes(*stored),
                span(ago.as_secs())
            );
        }
    }
    match removed {
        true => line!("freed     {}", bytes(stored)),
        false if templates.len() > 1 => line!("{} on disk in all", bytes(stored)),
        false => {}
    }
    Ok(Code::Done)
}

/// A template for machines.
#[derive(Serialize)]
struct Line<'a> {
    /// Image digest of the memory.
    memory_digest: &'a str,
    path: &'a std::path::Path,
    size_bytes: u64,
    stored_bytes: u64,
    /// Seconds since 1970-01-01 00:00 UTC.
    last_used: u64,
}

impl<'a> Line<'a> {
    fn new(template: &'a TemplateInfo) -> Self {
        let TemplateInfo { digest, path, size, stored, used } = template;
        let last_used = used.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Self { memory_digest: digest, path, size_bytes: *size, stored_bytes: *stored, last_used }
    }
}

/// A time span in the unit that fits.
fn span(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}
