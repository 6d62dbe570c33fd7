//! Guest memory that comes back at once, on first touch or as a template, and is captured while it changes.

mod live;
mod templates;
mod working_sets;

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use squib_devices::{granules::Frozen, memory::RamStore};
use squib_formats::{
    error::FormatError,
    image::{Control, ImageReader, Record},
    manifest::MEMORY_IMAGE,
    persist::Section,
    sections::Sections,
    snapshot_dir::Snapshot,
    working_set::WorkingSet,
};
use squib_snapshot::{
    CacheError, Durability, TemplateCache,
    capture::{CaptureOptions, Captured, Guest, capture},
    observe::{Observer, Phase, Run},
    restore::{MemoryLoad, RestoreError, RestoreOptions, Restored, restore},
    verify::verify,
    working_set::{optimize, record},
};
use squib_vmm::{
    config::{Deterministic, MachineConfig},
    hypervisor::CpuIdentity,
    machine::{Machine, MachineError, Outcome, RunUntil},
};
use vm_memory::{Bytes, GuestAddress};

const MEMORY: u64 = 64 << 20;
/// The pages that the program writes to, one after the other: 16 MiB.
const FIELD: u64 = 0x8200_0000;
const START: u64 = 40_000;
const AMPLE: Duration = Duration::from_secs(60);

/// and x2, x0, #0xfff: all of the field.
const WIDE: u32 = 0x9240_2c02;
/// and x2, x0, #0xff: its first 256 pages, so few that the CPU remembers the translations of all.
const NARROW: u32 = 0x9240_1c02;

/// An arm64 Image that writes a count to one page of [`FIELD`] after the other for ever; `mask` says which.
fn kernel(mask: u32) -> Vec<u8> {
    let mut image = vec![0; 4096];
    let mut word = |at: usize, word: u32| image[at..at + 4].copy_from_slice(&word.to_le_bytes());
    word(0, 0x1400_0010); // b #64
    word(16, 4096); // image_size
    word(24, 2); // flags: 4 KiB pages
    word(56, 0x644d_5241); // "ARM\x64"
    word(64, 0xd2a0_0001 | 0x8200 << 5); // movz x1, #0x8200, lsl #16
    word(68, 0xd280_0000); // movz x0, #0
    word(72, 0x9100_0400); // add x0, x0, #1
    word(76, mask);
    word(80, 0x8b02_3023); // add x3, x1, x2, lsl #12
    word(84, 0xf940_0064); // ldr x4, [x3]
    word(88, 0x8b00_0084); // add x4, x4, x0
    word(92, 0xf900_0064); // str x4, [x3]
    word(96, 0x17ff_fffa); // b #-24
    image
}

/// A deterministic machine that has begun to write, with noise in its memory that it does not write to and
/// some that it does.
fn machine(dir: &Path) -> Machine {
    machine_of(dir, WIDE)
}

fn machine_of(dir: &Path, mask: u32) -> Machine {
    fs::write(dir.join("Image"), kernel(mask)).unwrap();
    let config = MachineConfig {
        memory: MEMORY,
        deterministic: Some(Deterministic::default()),
        ..MachineConfig::new("writer", dir.join("Image"))
    };
    let machine = Machine::boot(config, Box::new(std::io::sink())).unwrap();
    let mut seed = 1u64;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 56) as u8
    })
    .take(3 << 20)
    .collect();
    for at in [FIELD + (1 << 20), FIELD + (20 << 20)] {
        machine.ram().write_slice(&noise, GuestAddress(at)).unwrap();
    }
    assert_eq!(machine.run_until(START).unwrap(), RunUntil::Reached);
    machine
}

fn memory(machine: &Machine) -> Vec<u8> {
    let mut bytes = vec![0; machine.ram().size() as usize];
    machine.ram().read_slice(&mut bytes, GuestAddress(machine.ram().base())).unwrap();
    bytes
}

/// A snapshot of [`machine`] at [`START`].
fn snapshot(dir: &Path) -> PathBuf {
    let path = dir.join("snap");
    capture(&machine(dir), &path, &CaptureOptions::default()).unwrap();
    path
}

/// Memory and sections of a machine that ran through to `retired`.
fn straight(dir: &Path, retired: u64) -> (Vec<u8>, Vec<Section>) {
    let machine = machine(dir);
    machine.run_until(retired).unwrap();
    (memory(&machine), machine.save().unwrap())
}

fn with(memory: MemoryLoad) -> RestoreOptions<'static> {
    RestoreOptions { memory, ..RestoreOptions::default() }
}

fn back(path: &Path, memory: MemoryLoad) -> Result<Restored, RestoreError> {
    restore(path, &with(memory), Box::new(std::io::sink()))
}

fn cache(dir: &Path) -> TemplateCache {
    TemplateCache::new(dir.join("templates"), u64::MAX)
}

fn modes(dir: &Path) -> Vec<(&'static str, MemoryLoad)> {
    vec![
        ("eager", MemoryLoad::Eager),
        ("lazy", MemoryLoad::Lazy),
        ("record", MemoryLoad::Record),
        ("template, new", MemoryLoad::Template(cache(dir))),
        ("template", MemoryLoad::Template(cache(dir))),
    ]
}

fn image_digest(path: &Path) -> String {
    let snapshot = Snapshot::open(path).unwrap();
    snapshot.manifest().image(MEMORY_IMAGE).unwrap().digest.to_string()
}

fn sections(path: &Path) -> Vec<Section> {
    Sections::read(&Snapshot::open(path).unwrap()).unwrap().into_rest()
}

/// Absent granules of a machine's memory.
fn absent(machine: &Machine) -> u64 {
    let granules = machine.ram().granules();
    (0..granules.count()).filter(|granule| granules.is_absent(*granule)).count() as u64
}

#[test]
fn in_every_mode_the_machine_goes_on_as_if_it_had_not_been_away() {
    let dir = tempfile::tempdir().unwrap();
    let path = snapshot(dir.path());
    let expected = straight(dir.path(), START + 30_000);
    for (name, mode) in modes(dir.path()) {
        let restored = back(&path, mode).unwrap();
        assert_eq!(restored.machine.run_until(START + 30_000).unwrap(), RunUntil::Reached);
        assert_eq!(restored.machine.save().unwrap(), expected.1, "{name}");
        assert!(memory(&restored.machine) == expected.0, "{name}");
    }
}

#[test]
fn in_every_mode_a_capture_at_once_is_the_same_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let path = snapshot(dir.path());
    for (at, (name, mode)) in modes(dir.path()).into_iter().enumerate() {
        let restored = back(&path, mode).unwrap();
        let again = dir.path().join(format!("again-{at}"));
        capture(&restored.machine, &again, &CaptureOptions::default()).unwrap();
        assert_eq!(image_digest(&again), image_digest(&path), "{name}");
        assert_eq!(sections(&again), sections(&path), "{name}");
        verify(&again, &[], Control::default()).unwrap();
    }
}

#[test]
fn a_difference_of_a_restored_machine_stores_what_it_wrote_and_loads_no_more_than_it_touched() {
    let dir = tempfile::tempdir().unwrap();
    let path = snapshot(dir.path());
    for (at, (name, mode)) in modes(dir.path()).into_iter().enumerate() {
        let records = matches!(mode, MemoryLoad::Record);
        let restored = back(&path, mode).unwrap();
        restored.machine.run_until(START + 700).unwrap();
        let untouched = absent(&restored.machine);
        let diff = dir.path().join(format!("diff-{at}"));
        let options = CaptureOptions { parent: Some(path.clone()), ..CaptureOptions::default() };
        let captured = capture(&restored.machine, &diff, &options).unwrap();
        // 100 pages in 7 or 8 granules of 64 KiB.
        let changed = captured.memory.record.size - captured.memory.parent - captured.memory.zero;
        assert!(changed <= 8 << 16, "{name}: {changed}");
        if records {
            // What is all zeros is there from the start.
            assert!(untouched > 200, "{untouched}");
            assert_eq!(absent(&restored.machine), untouched, "nothing was loaded for it");
        }
        let expected = memory(&restored.machine);
        drop(restored);
        let again = back(&diff, MemoryLoad::Lazy).unwrap();
        assert!(memory(&again.machine) == expected, "{name}");
    }
}

#[test]
fn the_second_difference_holds_what_changed_since_the_first_only() {
    let dir = tempfile::tempdir().unwrap();
    let path = snapshot(dir.path());
    let machine = back(&path, MemoryLoad::Record).unwrap().machine;
    let at = |name: &str| dir.path().join(name);
    let mut parent = path;
    for (round, name) in (1..).zip(["one", "two", "three"]) {
        machine.run_until(START + round * 700).unwrap();
        let frozen_changes = {
            let granules = machine.ram().granules();
            (0..granules.count()).filter(|granule| granules.is_changed(*granule)).count()
        };
        assert!((7..=9).contains(&frozen_changes), "round {round}: {frozen_changes}");
        let options = CaptureOptions { parent: Some(parent), ..CaptureOptions::default() };
        capture(&machine, &at(name), &options).unwrap();
        parent = at(name);
    }
    let expected = straight(dir.path(), START + 3 * 700);
    let restored = back(&parent, MemoryLoad::Eager).unwrap();
    assert!(memory(&restored.machine) == expected.0);
}

#[test]
fn what_a_snapshot_that_is_gone_held_is_still_known() {
    let dir = tempfile::tempdir().unwrap();
    let machine = machine(dir.path());
    let at = |name: &str| dir.path().join(name);
    capture(&machine, &at("base"), &CaptureOptions::default()).unwrap();
    machine.run_until(START + 700).unwrap();
    let parent = CaptureOptions { parent: Some(at("base")), ..CaptureOptions::default() };
    capture(&machine, &at("gone"), &parent).unwrap();
    fs::remove_dir_all(at("gone")).unwrap();
    let frozen = machine.freeze(u64::MAX).unwrap();
    let known = (0..machine.ram().granules().count())
        .filter(|granule| frozen.known_digest(granule << 16, 1 << 16).is_some());
    assert_eq!(known.count() as u64, machine.ram().granules().count());
}

#[test]
fn a_difference_after_one_that_failed_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = snapshot(dir.path());
    let machine = back(&path, MemoryLoad::Lazy).unwrap().machine;
    machine.run_until(START + 7_000).unwrap();
    let options = CaptureOptions { parent: Some(path), ..CaptureOptions::default() };
    let full = CaptureOptions { limit: Some(1000), ..options.clone() };
    let error = capture(&machine, &dir.path().join("failed"), &full).unwrap_err().to_string();
    assert!(error.contains("limit"), "{error}");
    machine.run_until(START + 14_000).unwrap();
    let diff = dir.path().join("diff");
    capture(&machine, &diff, &options).unwrap();
    let expected = straight(dir.path(), START + 14_000);
    assert!(memory(&back(&diff, MemoryLoad::Eager).unwrap().machine) == expected.0);
}

/// The number and the frame's place of the last chunk that has a frame.
fn last_frame(path: &Path) -> (u64, u64) {
    let index = ImageReader::open_index(&Snapshot::open(path).unwrap(), MEMORY_IMAGE).unwrap();
    let frames = (0..).zip(index.records()).filter_map(|(chunk, record)| match record {
        Record::Data { offset, .. } => Some((chunk, offset)),
        _ => None,
    });
    frames.max_by_key(|(_, offset)| *offset).unwrap()
}

fn damage(path: &Path, offset: u64) {
    let file = path.join("memory.zst");
    let mut bytes = fs::read(&file).unwrap();
    bytes[offset as usize + 20] ^= 1;
    fs::write(&file, bytes).unwrap();
}

#[test]
fn a_damaged_chunk_ends_the_machine_that_touches_it_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = snapshot(dir.path());
    let index = ImageReader::open_index(&Snapshot::open(&path).unwrap(), MEMORY_IMAGE).unwrap();
    // A chunk of the field, which the guest comes to only after some thousand instructions.
    let chunk = (FIELD - 0x8000_0000 + (12 << 20)) >> 16;
    let Record::Data { offset, .. } = index.record(chunk) else { panic!("no data") };
    damage(&path, offset);
    let machine = back(&path, MemoryLoad::Record).unwrap().machine;
    let ended = machine.run_until(START + 40_000).unwrap();
    let RunUntil::Ended(Outcome::Damaged(lost)) = ended else { panic!("{ended:?}") };
    let named = format!("memory.zst: chunk {chunk}");
    assert!(lost.why.contains(&named), "{lost}");
    // A reader that is no vCPU gets an error, not other bytes.
    let at = GuestAddress(0x8000_0000 + (chunk << 16));
    let error = machine.ram().read_obj::<u64>(at).unwrap_err().to_string();
    assert!(error.contains(&named), "{error}");
    // And so does a capture of a machine that has not come there yet.
    let machine = back(&path, MemoryLoad::Record).unwrap().machine;
    let error = capture(&machine, &dir.path().join("again"), &CaptureOptions::default());
    assert!(error.unwrap_err().to_string().contains(&named));
    assert!(!dir.path().join("again").exists());
}

#[test]
fn a_chunk_that_only_the_loader_meets_ends_the_machine_too() {
    let dir = tempfile::tempdir().unwrap();
    let path = snapshot(dir.path());
    let (chunk, offset) = last_frame(&path);
    damage(&path, offset);
    let machine = back(&path, MemoryLoad::Lazy).unwrap().machine;
    let outcome = machine.wait_timeout(AMPLE);
    let Some(Outcome::Damaged(lost)) = outcome else { panic!("{outcome:?}") };
    assert!(lost.why.contains(&format!("memory.zst: chunk {chunk}")), "{lost}");
}

#[test]
fn a_snapshot_that_is_cut_off_under_a_lazy_restore_ends_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = snapshot(dir.path());
    let machine = back(&path, MemoryLoad::Record).unwrap().machine;
    let file = fs::OpenOptions::new().write(true).open(path.join("memory.zst")).unwrap();
    file.set_len(0).unwrap();
    let ended = machine.run_until(START + 1000).unwrap();
    let RunUntil::Ended(Outcome::Damaged(lost)) = ended else { panic!("{ended:?}") };
    assert!(lost.why.contains("memory.zst: cannot read"), "{lost}");
}
