//! `squib snapshot inspect`.

use squib_formats::{
    error::FormatError,
    manifest::{DiskRecord, DiskStorage, Operation},
    snapshot_dir::Snapshot,
};
use squib_snapshot::inspect::{
    HostBackendInspection, ImageInspection, Inspection, inspect as look,
};

use crate::{
    args::InspectArgs,
    exit::{Code, Failure, Result, WithCode},
    output::{bytes, line, print_json},
};

pub(crate) fn inspect(args: &InspectArgs) -> Result<Code> {
    let inspection = match look(&args.dir, &args.chain.parents) {
        Ok(inspection) => inspection,
        Err(error @ FormatError::Format { .. }) => {
            // What any build can tell of any snapshot.
            let header = Snapshot::peek(&args.dir).code(Code::Snapshot)?;
            line!("format    {}.{}, {}", header.major, header.minor, header.arch_text());
            line!("writer    squib {}", header.writer_text());
            return Err(Failure::new(Code::Snapshot, error));
        }
        Err(error) => return Err(Failure::new(Code::Snapshot, error)),
    };
    if args.json {
        print_json(&inspection)?;
    } else {
        show(&inspection);
    }
    Ok(Code::Done)
}

fn show(inspection: &Inspection) {
    let Inspection {
        path: _,
        id,
        format,
        arch,
        writer_version: _,
        parent_hint,
        host_backend,
        operation,
        chain,
        stored,
        images,
        manifest,
    } = inspection;
    let machine = &manifest.machine;
    line!("id        {id}");
    line!("format    {format}, {arch}, {}", bytes(*stored));
    line!("created   {} by {}", utc(manifest.created), manifest.writer);
    line!("host      {}", manifest.host);
    if let Some(HostBackendInspection { build, unreadable }) = host_backend {
        line!("build     {build}, which may be the only one that takes this state");
        if !unreadable.is_empty() {
            line!("without   {}, which that host does not tell", unreadable.join(", "));
        }
    }
    if let Some(parent) = manifest.parent {
        match (chain, parent_hint) {
            (Some(chain), _) => {
                for link in chain {
                    line!("parent    {} at {}", link.id, link.path.display());
                }
            }
            (None, Some(hint)) => line!("parent    {parent}, not found; it was at {hint}"),
            (None, None) => line!("parent    {parent}, not found"),
        }
    }
    line!(
        "machine   {}: {}, {} vCPU(s), {}{}",
        machine.name,
        bytes(machine.memory_size),
        machine.vcpus,
        machine.backend,
        if machine.deterministic.is_some() { ", deterministic" } else { "" }
    );
    line!("kernel    {}", machine.kernel);
    if let Some(initrd) = &machine.initrd {
        line!("initrd    {initrd}");
    }
    line!("cmdline   {}", machine.cmdline);
    if let Some(Operation { on_reset, initrd_digest: _ }) = operation {
        line!("on reset  {}", on_reset.name());
    }
    for DiskRecord { id, path, size, read_only, storage, digest } in &machine.disks {
        let place = match storage {
            DiskStorage::Captured => "captured from",
            DiskStorage::Reference(_) => "stays at",
        };
        let read_only = if *read_only { ", read-only" } else { "" };
        line!("disk      {id}: {}{read_only}, {place} {path}", bytes(*size));
        line!("          {digest}");
    }
    for image in images {
        let ImageInspection {
            record,
            chunks,
            zero_chunks,
            duplicate_chunks,
            parent_chunks,
            patch_chunks,
            raw_chunks,
            stored,
        } = image;
        let diff = match manifest.parent {
            Some(_) => format!(", {parent_chunks} the parent's, {patch_chunks} patched"),
            None => String::new(),
        };
        let raw = match raw_chunks {
            0 => String::new(),
            _ => format!(", {raw_chunks} in the raw file"),
        };
        line!(
            "image     {}: {} in {}; {chunks} chunks of {}, {zero_chunks} zero, \
             {duplicate_chunks} duplicate{raw}{diff}",
            record.name,
            bytes(record.size),
            bytes(*stored),
            bytes(record.chunk_size.into())
        );
        line!("          {}", record.digest);
    }
    for section in &manifest.sections {
        line!(
            "section   {} {} (version {}): {}",
            section.kind,
            section.instance,
            section.version,
            bytes(section.length)
        );
    }
}

/// "2026-01-31 12:00:00 UTC" from nanoseconds since 1970-01-01.
fn utc(ns: u64) -> String {
    let seconds = ns / 1_000_000_000;
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Days since 0000-03-01, so that the leap day is the last of its year (proleptic Gregorian).
    let from_march = days + 719_468;
    let era = from_march / 146_097;
    let day_of_era = from_march % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_become_dates() {
        for (seconds, date) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_399, "2000-02-28 23:59:59 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (1_767_225_600, "2026-01-01 00:00:00 UTC"),
            (4_107_542_400, "2100-03-01 00:00:00 UTC"),
        ] {
            assert_eq!(utc(seconds * 1_000_000_000), date);
        }
    }
}
