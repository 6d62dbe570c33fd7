//! The manifest, the index and the working set.

use std::{collections::BTreeSet, fs};

use squib_devices::map;
use squib_formats::{
    contract::{Field, Role, fields, length},
    digest::Digest,
    image::{HEADER_LEN, RECORD_LEN, Record, Scheme, index_header, zero_digest},
    manifest::{MEMORY_IMAGE, Manifest, SectionRecord},
    working_set::WorkingSet,
};
use squib_vmm::config::MEMORY_MAX;

use crate::{
    Extent,
    target::{Target, set_file},
};

#[test]
fn every_field_of_a_manifest_at_its_extremes_has_equal_answers() {
    let (accepted, refused) = bodies(Extent::Sample);
    assert!(accepted > 20 && refused > 200, "{accepted} accepted, {refused} refused");
}

#[test]
#[ignore = "takes minutes"]
fn every_field_of_a_manifest_at_its_extremes_has_equal_answers_without_samples() {
    bodies(Extent::All);
}

fn bodies(extent: Extent) -> (usize, usize) {
    let (mut accepted, mut refused) = (0, 0);
    for mut target in [Target::devices(), Target::smp()] {
        let minor = target.manifest.minor();
        let body = target.manifest.encode_unchecked().unwrap();
        for field in extent.of(body_fields(&target.manifest, body.len())) {
            // A digest is one value: a byte of it stands for all.
            let inside = field.path.rsplit_once("digest[").map(|(_, at)| at != "0]");
            if inside == Some(true) {
                continue;
            }
            for (value, body) in field.extremes(&body) {
                let what = format!("{} = {value:#x}", field.path);
                target.answers_to_body(&what, minor, &body, &[]);
                // The same with an index that goes with it, if one can.
                let Ok(changed) = Manifest::decode_unchecked(minor, &body) else { continue };
                if field.role == Role::Number && field.path.starts_with("images[0]") {
                    with_index(&mut target, &what, changed);
                }
            }
        }
        for end in [0, 1, body.len() / 2, body.len() - 1] {
            target.answers_to_body("a body cut short", minor, &body[..end], &[]);
        }
        accepted += target.accepted;
        refused += target.refused;
    }
    (accepted, refused)
}

/// The fields of a manifest's body of `len` bytes.
fn body_fields(manifest: &Manifest, len: usize) -> Vec<Field> {
    let Manifest { parent_hint, host_backend, operation, .. } = manifest;
    let operation = operation.as_ref().expect("a new snapshot has it");
    let body = (manifest, parent_hint, host_backend, operation);
    assert_eq!(length(&body), len, "the body has other fields than these");
    let mut fields = fields(&body);
    for field in &mut fields {
        for (number, name) in [("[0].", ""), ("[1]", "parent_hint"), ("[2]", "host_backend")] {
            if let Some(rest) = field.path.strip_prefix(number) {
                field.path = format!("{name}{rest}");
                break;
            }
        }
        if let Some(rest) = field.path.strip_prefix("[3]") {
            field.path = format!("operation{rest}");
        }
    }
    fields
}

/// Gives memory in `manifest` the size that its image says, and an index of zeros of that size, with the
/// right digests; and asks.
fn with_index(target: &mut Target, what: &str, mut manifest: Manifest) -> Option<bool> {
    let image = manifest.images.iter_mut().find(|image| image.name == MEMORY_IMAGE)?;
    if !image.chunk_size.is_power_of_two() || image.chunk_size > 4 << 20 {
        return None;
    }
    let chunks = u32::try_from(image.size.div_ceil(image.chunk_size.into())).ok()?;
    let mut index = index_header().to_vec();
    if chunks > 0 {
        index.extend(Record::Zero.encode(Scheme::Runs, chunks, zero_digest(image.chunk_size)));
    }
    image.digest = image_digest(&index, image.size, image.chunk_size);
    manifest.machine.memory_size = image.size;
    let (index_file, data_file) = (image.index_file(), image.data_file());
    set_file(&mut manifest, &index_file, &index);
    set_file(&mut manifest, &data_file, &[]);
    Some(target.answers_with(what, &manifest, &[(&index_file, &index), (&data_file, &[])]))
}

/// The good manifest with memory of another size, all zeros, in chunks of 4 MiB.
fn memory_of(target: &Target, size: u64) -> Manifest {
    let mut manifest = target.manifest.clone();
    let image = manifest.images.iter_mut().find(|image| image.name == MEMORY_IMAGE).unwrap();
    (image.size, image.chunk_size) = (size, 4 << 20);
    manifest
}

#[test]
fn memory_of_any_size_has_equal_answers_and_a_size_far_above_the_hosts_is_refused() {
    let mut target = Target::devices();
    let sizes = [0, 1, map::RAM_MIN - 1, map::RAM_MIN, map::RAM_MIN + 1, 96 << 20];
    let answers = sizes.map(|size| {
        let manifest = memory_of(&target, size);
        with_index(&mut target, &format!("{size} bytes of memory"), manifest)
    });
    // Nothing of the guest's is in it any more, but that is no affair of a restore.
    let expected = [false, false, false, true, false, true].map(Some);
    assert_eq!(answers, expected);
    // A host of a quarter of a TiB would take it.
    if squib_snapshot::host::memory().is_none_or(|host| host.total < 200 << 30) {
        for size in [MEMORY_MAX, MEMORY_MAX + 1, MEMORY_MAX + (1 << 16), 1 << 40] {
            let manifest = memory_of(&target, size);
            let answer = with_index(&mut target, "memory far above the host's", manifest);
            assert_eq!(answer, Some(false), "{size}");
        }
    }
}

#[test]
fn disks_of_any_size_have_equal_answers() {
    let mut target = Target::devices();
    for size in [0, 1, 511, 512, 513, 1 << 16, (1 << 20) - 512, (1 << 20) + 512, 1 << 44, u64::MAX]
    {
        let mut manifest = target.manifest.clone();
        let outside = manifest.machine.disks.iter_mut().find(|disk| disk.id == "data").unwrap();
        outside.size = size;
        target.answers(&format!("a disk outside of {size} bytes"), &manifest);
        let mut manifest = target.manifest.clone();
        let disk = manifest.machine.disks.iter_mut().find(|disk| disk.id == "vda").unwrap();
        disk.size = size;
        let image = manifest.images.iter_mut().find(|image| image.name == "disk-vda").unwrap();
        image.size = size;
        target.answers(&format!("a captured disk of {size} bytes"), &manifest);
    }
    let taken = (target.accepted, target.refused);
    assert_eq!(taken, (2, 19), "the good one, and the disk outside of its own size");
}

#[test]
fn sections_that_are_too_many_too_long_or_of_other_names_have_equal_answers() {
    let mut target = Target::devices();
    type Change = fn(&mut Vec<SectionRecord>);
    let changes: [(&str, Change); 8] = [
        ("none", Vec::clear),
        ("one less", |sections| drop(sections.pop())),
        ("two in the other order", |sections| sections.swap(0, 1)),
        ("one twice", |sections| sections.push(sections[0].clone())),
        ("one of no kind", |sections| sections[0].kind.clear()),
        ("one of another instance", |sections| sections[0].instance = "1".into()),
        ("one without end", |sections| sections[0].length = u64::MAX),
        ("thousands", |sections| {
            let more = (0..4000).map(|n| SectionRecord {
                instance: n.to_string(),
                offset: sections.last().map_or(0, |last| last.offset + last.length),
                length: 0,
                digest: Digest::of(b""),
                ..sections[0].clone()
            });
            let more: Vec<_> = more.collect();
            sections.extend(more);
        }),
    ];
    for (what, change) in changes {
        let mut manifest = target.manifest.clone();
        change(&mut manifest.sections);
        assert!(!target.answers(what, &manifest), "{what}");
    }
    // All of it zeros with the right digests, in a file that takes no room on the disk.
    for (what, length) in [("a long section", 16 << 20), ("one byte more than any state", 1 << 17)]
    {
        let zeros = vec![0; length];
        let (manifest, state) = target.with_payload(0, &zeros);
        assert!(!target.answers_with(what, &manifest, &[("state", &state)]), "{what}");
    }
}

#[test]
fn every_field_of_an_index_at_its_extremes_has_equal_answers() {
    let mut target = Target::devices();
    let image = target.manifest.image(MEMORY_IMAGE).unwrap().clone();
    let (index_file, digest) = (image.index_file(), image.digest);
    let index = fs::read(target.good().join(&index_file)).unwrap();
    let records = index[HEADER_LEN..].chunks(RECORD_LEN);
    let last = records.len() - 1;
    let first_data = records.clone().position(|record| record[0] == 1).unwrap();
    let first_zero = records.clone().position(|record| record[0] == 0).unwrap();
    // Magic, version and padding; then of a run of zeros, the first with bytes, and the last.
    let mut parts = vec![("magic", 0, 8), ("version", 8, 2), ("padding", 10, 2)];
    for number in BTreeSet::from([first_data, first_zero, last]) {
        let at = HEADER_LEN + number * RECORD_LEN;
        parts.extend([("kind", at, 1), ("frame length", at + 1, 2), ("count", at + 4, 4)]);
        parts.extend([("offset", at + 8, 8), ("digest", at + 16, 1)]);
    }
    let mut right = 0;
    for (name, at, width) in parts {
        let field =
            Field { path: format!("{name} at {at}"), offset: at, width, role: Role::Number };
        for (value, index) in field.extremes(&index) {
            let mut manifest = target.manifest.clone();
            let image = manifest.images.iter_mut().find(|i| i.name == MEMORY_IMAGE).unwrap();
            image.digest = image_digest(&index, image.size, image.chunk_size);
            right += usize::from(image.digest == digest);
            set_file(&mut manifest, &index_file, &index);
            let what = format!("{} = {value:#x}", field.path);
            target.answers_with(&what, &manifest, &[(&index_file, &index)]);
        }
    }
    assert!(right > 10, "the digest covers digests only");
}

/// The image digest by runs that an index makes up, whether it is one or not.
fn image_digest(index: &[u8], size: u64, chunk_size: u32) -> Digest {
    let mut hasher = blake3::Hasher::new();
    let runs = index[HEADER_LEN..].chunks_exact(RECORD_LEN).map(|record| {
        let count = u32::from_le_bytes(record[4..8].try_into().unwrap());
        (u64::from(count), &record[16..])
    });
    let mut runs = runs.peekable();
    while let Some((mut count, digest)) = runs.next() {
        while let Some((more, _)) = runs.next_if(|(_, next)| *next == digest) {
            count += more;
        }
        hasher.update(&count.to_le_bytes());
        hasher.update(digest);
    }
    hasher.update(&size.to_le_bytes());
    hasher.update(&u64::from(chunk_size).to_le_bytes());
    Digest(hasher.finalize().into())
}

/// Only the order of loading depends on it, so that any is accepted.
#[test]
fn a_working_set_says_nothing_of_whether_a_snapshot_is_accepted() {
    let mut target = Target::devices();
    let image = target.manifest.image(MEMORY_IMAGE).unwrap().clone();
    let good = WorkingSet::new(&image, vec![3, 1, 2]).unwrap().encode();
    let manifest = target.manifest.clone();
    for at in (0..64).chain([good.len() - 1]) {
        for value in [0, 0xff] {
            let mut bytes = good.clone();
            bytes[at] = value;
            let body = bytes.len() - 32;
            let digest = Digest::of(&bytes[..body]);
            bytes[body..].copy_from_slice(&digest.0);
            let files: [(&str, &[u8]); 1] = [("working-set", &bytes)];
            assert!(target.answers_with(&format!("byte {at} = {value}"), &manifest, &files));
        }
    }
}
