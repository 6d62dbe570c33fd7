//! `squib snapshot diff`.

use squib_formats::image::Control;
use squib_snapshot::diff::{
    Area, Change, Difference, ImageDifference, Payload, SectionDifference, diff as compare,
};

use crate::{
    args::DiffArgs,
    events,
    exit::{Code, Result},
    output::{ByteBar, bytes, line, print_json},
};

/// Most areas of an image that people are shown; `--json` has all.
const AREAS: usize = 12;

pub(crate) fn diff(args: &DiffArgs) -> Result<Code> {
    let cancel = events::give_up_on_signals()?;
    let bar = ByteBar::new("diff");
    let control = Control { progress: &bar, cancel, ..Control::default() };
    let found = compare(&args.a, &args.b, &args.chain.parents, control);
    drop(bar);
    let found = found.map_err(events::failure)?;
    if args.json {
        print_json(&found)?;
    } else {
        show(&found);
    }
    Ok(Code::Done)
}

fn show(found: &Difference) {
    let Difference { a, b, apart_ns, equal, machine, images, sections } = found;
    line!("a         {a}");
    line!("b         {b}");
    let seconds = apart_ns.unsigned_abs() as f64 / 1e9;
    line!("captured  {seconds:.3} s {}", if *apart_ns < 0 { "earlier" } else { "later" });
    for Change { what, a, b } in machine {
        line!("machine   {what}: {a}, then {b}");
    }
    images.iter().for_each(show_image);
    for section in sections {
        line!("section   {}", about(section));
    }
    let images = images.iter().map(|image| image.changed_bytes);
    let images = images.fold(0, u64::saturating_add);
    let state: u64 = sections.iter().map(|section| section.changed_bytes).sum();
    match equal {
        true => line!("the guest's state is the same in both"),
        false => line!(
            "total     {} of memory and disks, {} of state in {} sections",
            bytes(images),
            bytes(state),
            sections.len()
        ),
    }
}

fn show_image(image: &ImageDifference) {
    let ImageDifference {
        name,
        a_size,
        b_size,
        chunk_size,
        chunks,
        changed_chunks,
        zeroed_chunks,
        changed_pages,
        changed_bytes,
        areas,
        regions: _,
    } = image;
    if a_size != b_size {
        let size = |size: &Option<u64>| size.map_or("not there".to_owned(), bytes);
        line!("{name:<9} {}, then {}", size(a_size), size(b_size));
    }
    if *changed_chunks == 0 {
        line!("{name:<9} the same");
        return;
    }
    let Some(chunk_size) = chunk_size else {
        line!("{name:<9} cut into chunks of different sizes, not compared");
        return;
    };
    let pages = changed_pages.map_or(String::new(), |pages| format!("{pages} pages in "));
    line!(
        "{name:<9} {} in {pages}{changed_chunks} of {chunks} chunks of {}, {zeroed_chunks} of them now \
         zero",
        bytes(*changed_bytes),
        bytes((*chunk_size).into())
    );
    for Area { name, offset, length, changed_chunks, changed_pages, changed_bytes } in
        areas.iter().take(AREAS)
    {
        let unit = match changed_pages {
            Some(pages) => format!("{pages} pages"),
            None => format!("{changed_chunks} chunks"),
        };
        let end = offset + length;
        line!(
            "          {offset:#012x} to {end:#012x}  {:>10}  {unit:>12}  {name}",
            bytes(*changed_bytes)
        );
    }
    if areas.len() > AREAS {
        let rest = areas[AREAS..].iter().map(|area| area.changed_bytes).sum();
        let more = areas.len() - AREAS;
        line!("          and {} in {more} more areas: --json lists all", bytes(rest));
    }
}

fn about(section: &SectionDifference) -> String {
    let SectionDifference { kind, instance, a, b, changed_bytes } = section;
    let name = format!("{kind} {instance}");
    match (a, b) {
        (Some(a), Some(b)) => {
            let Payload { version, length } = b;
            let version = match a.version == *version {
                true => String::new(),
                false => format!(", version {}, then {version}", a.version),
            };
            let length = match a.length == *length {
                true => format!("{length}"),
                false => format!("{length} (before: {})", a.length),
            };
            format!("{name}: {changed_bytes} of {length} bytes{version}")
        }
        (Some(_), None) => format!("{name}: only in a"),
        (None, _) => format!("{name}: only in b"),
    }
}
