//! `squib snapshot diff`.

use squib_snapshot::diff::{Difference, ImageDifference, Region, diff as compare};

use crate::{
    args::DiffArgs,
    exit::{Code, Result, WithCode},
    output::{bytes, print_json},
};

/// Most regions of an image that people are shown; `--json` has all.
const REGIONS: usize = 16;

pub(crate) fn diff(args: &DiffArgs) -> Result<Code> {
    let found = compare(&args.a, &args.b).code(Code::Snapshot)?;
    if args.json {
        print_json(&found)?;
    } else {
        show(&found);
    }
    Ok(Code::Done)
}

fn show(found: &Difference) {
    let Difference { a, b, equal, images, sections } = found;
    println!("a         {a}");
    println!("b         {b}");
    for image in images {
        let ImageDifference {
            name,
            a_size,
            b_size,
            chunk_size,
            chunks,
            changed_chunks,
            zeroed_chunks,
            changed_bytes,
            regions,
        } = image;
        let unit = chunk_size.map_or("different sizes".to_owned(), |size| bytes(size.into()));
        println!(
            "{name:<9} {changed_chunks} of {chunks} chunks of {unit} differ ({}), {zeroed_chunks} of \
             them now zero, in {} regions",
            bytes(*changed_bytes),
            regions.len()
        );
        if a_size != b_size {
            let size = |size: &Option<u64>| size.map_or("not there".to_owned(), bytes);
            println!("          size: {}, then {}", size(a_size), size(b_size));
        }
        for Region { offset, length } in regions.iter().take(REGIONS) {
            println!("          {offset:#012x} {}", bytes(*length));
        }
        if regions.len() > REGIONS {
            println!("          and {} more: --json lists all", regions.len() - REGIONS);
        }
    }
    for section in sections {
        println!("section   {section} differs");
    }
    if *equal {
        println!("the guest's state is the same in both");
    }
}
