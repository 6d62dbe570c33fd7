//! Saved states that somebody has changed, restored into a machine whose guest then drives every device.
//!
//! The digests of a snapshot keep accidents out, not a writer who means harm and puts the right digests in. So
//! whatever a section says, the restore refuses it by name or the machine runs: no panic, no hang, no memory
//! that grows without bound. The fuzz target and the tests share this.

use std::{
    fs::File,
    path::Path,
    sync::OnceLock,
    time::{Duration, Instant},
};

use squib_devices::{
    map::{self, Range},
    memory::GuestRam,
};
use squib_formats::persist::Section;
use squib_vmm::{
    config::{Deterministic, DiskConfig, MachineConfig},
    machine::{Identity, Machine, Outcome, RestoreOptions, RunUntil},
};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

/// Bytes of one change: number of the section, offset in its payload (2), new value.
pub const CHANGE: usize = 4;
/// Most changes of one state.
const MOST_CHANGES: usize = 64;
/// When the state is saved, and how far the restored guest runs: several rounds over all registers.
const SAVED: u64 = 2_000;
const UNTIL: u64 = 12_000;
/// Far more than a run takes; longer is a hang.
const HANG: Duration = Duration::from_secs(60);

/// Where the queues of slot n lie: 64 KiB each.
const RINGS: u64 = 0x8300_0000;
const RING: u64 = 0x1_0000;
const QUEUE_SIZE: u32 = 16;

/// A machine's configuration, its state and its memory.
struct Good {
    _dir: TempDir,
    config: MachineConfig,
    sections: Vec<Section>,
    memory: Vec<(u64, Vec<u8>)>,
}

/// What became of a changed state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Became {
    /// The restore refused it, with this error.
    Refused(String),
    /// The machine ran to the end or said why it could not.
    Ran,
}

/// Restores a good state with the changes in `bytes` and lets the guest drive its devices. Panics if anything
/// in the machine did, or if it hangs.
pub fn restore(bytes: &[u8]) -> Became {
    static GOOD: OnceLock<Good> = OnceLock::new();
    let good = GOOD.get_or_init(good);
    let mut sections = good.sections.clone();
    let (changes, _) = bytes.as_chunks::<CHANGE>();
    for [section, low, high, value] in changes.iter().take(MOST_CHANGES) {
        let count = sections.len();
        let payload = &mut sections[usize::from(*section) % count].payload;
        if !payload.is_empty() {
            let at = usize::from(u16::from_le_bytes([*low, *high])) % payload.len();
            payload[at] = *value;
        }
    }
    let ram = GuestRam::new(good.config.memory).expect("64 MiB of memory");
    for (at, bytes) in &good.memory {
        ram.write_slice(bytes, GuestAddress(*at)).expect("it was read there");
    }
    let identity = if bytes.len().is_multiple_of(2) { Identity::Same } else { Identity::Clone };
    let options = RestoreOptions { identity, ..RestoreOptions::default() };
    let sink = Box::new(std::io::sink());
    let machine = match Machine::restore(good.config.clone(), sections, options, ram, sink) {
        Ok(machine) => machine,
        Err(error) => return Became::Refused(error.to_string()),
    };
    let begun = Instant::now();
    let ended = machine.run_until(UNTIL);
    assert!(begun.elapsed() < HANG, "it hung: {ended:?}");
    if let Ok(RunUntil::Ended(Outcome::Crashed(crash))) = ended {
        panic!("{crash}");
    }
    // A machine that has ended saves nothing; any other does, and takes itself back.
    if let Ok(sections) = machine.save() {
        let ram = machine.ram().clone();
        drop(machine);
        let sink = Box::new(std::io::sink());
        let options = RestoreOptions::default();
        let again = Machine::restore(good.config.clone(), sections, options, ram, sink);
        again.expect("what a machine saves it takes back");
    }
    Became::Ran
}

/// Sections of the good state, for a first corpus.
pub fn sections() -> Vec<(String, usize)> {
    let Good { sections, .. } = good();
    sections.into_iter().map(|section| (section.kind, section.payload.len())).collect()
}

/// A deterministic machine with a disk and a source of entropy, both with queues that the guest has set up.
fn good() -> Good {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let disk = disk(dir.path(), "vda", true, 1 << 20);
    let machine = machine(dir.path(), vec![disk]);
    let config = machine.config().clone();
    let sections = machine.save().expect("it saves");
    let read = |at: u64, len: usize| {
        let mut bytes = vec![0; len];
        machine.ram().read_slice(&mut bytes, GuestAddress(at)).expect("inside of RAM");
        (at, bytes)
    };
    let memory = vec![read(map::RAM_BASE + 0x20_0000, 0x4000), read(RINGS, 2 * RING as usize)];
    Good { _dir: dir, config, sections, memory }
}

/// A disk of `size` bytes, all of it a hole, in `dir`.
pub fn disk(dir: &Path, id: &str, read_only: bool, size: u64) -> DiskConfig {
    let path = dir.join(id);
    File::create(&path).and_then(|file| file.set_len(size)).expect("room for a hole");
    DiskConfig { id: id.into(), path, read_only }
}

/// A paused deterministic machine with `disks` and a source of entropy. Its guest, whose kernel lies in `dir`,
/// has set up the queues of the first two slots and goes round all registers of its devices for ever.
pub fn machine(dir: &Path, disks: Vec<DiskConfig>) -> Machine {
    let kernel = dir.join("Image");
    std::fs::write(&kernel, image()).expect("room for a page");
    let config = MachineConfig {
        memory: map::RAM_MIN,
        disks,
        deterministic: Some(Deterministic::default()),
        ..MachineConfig::new("hostile", kernel)
    };
    let machine = Machine::boot(config, Box::new(std::io::sink())).expect("it boots");
    requests(machine.ram());
    assert_eq!(machine.run_until(SAVED).expect("it runs"), RunUntil::Reached);
    machine
}

/// One request in each queue: a read of a sector, and 64 random bytes.
fn requests(ram: &GuestRam) {
    let put = |at: u64, bytes: &[u8]| {
        ram.write_slice(bytes, GuestAddress(at)).expect("the rings are in RAM");
    };
    let descriptor = |slot: u64, n: u64, address: u64, len: u32, flags: u16, next: u16| {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        put(RINGS + slot * RING + 16 * n, &bytes);
    };
    let (next, write) = (1, 2);
    let data = |slot: u64| RINGS + slot * RING + 0x8000;
    descriptor(0, 0, data(0), 16, next, 1);
    descriptor(0, 1, data(0) + 0x1000, 512, next | write, 2);
    descriptor(0, 2, data(0) + 0x2000, 1, write, 0);
    descriptor(1, 0, data(1), 64, write, 0);
    for slot in 0..2 {
        // flags, idx, and the first entry, descriptor 0.
        put(RINGS + slot * RING + 0x1000, &[0, 0, 1, 0, 0, 0]);
    }
}

/// Registers that the guest writes once, to set up the queue of a virtio slot (virtio 1.2, 3.1 and 4.2.2).
fn set_up(slot: u64) -> Vec<(u64, u32)> {
    let base = map::VIRTIO.base + slot * map::VIRTIO_STRIDE;
    let ring = RINGS + slot * RING;
    let low = |address: u64| address as u32;
    let high = |address: u64| (address >> 32) as u32;
    let (acknowledge, driver, features_ok, driver_ok) = (1, 2, 8, 4);
    [
        (0x070, 0),
        (0x070, acknowledge),
        (0x070, acknowledge | driver),
        (0x024, 1), // DriverFeaturesSel: VIRTIO_F_VERSION_1 is bit 32.
        (0x020, 1),
        (0x070, acknowledge | driver | features_ok),
        (0x030, 0), // QueueSel
        (0x038, QUEUE_SIZE),
        (0x080, low(ring)),
        (0x084, high(ring)),
        (0x090, low(ring + 0x1000)),
        (0x094, high(ring + 0x1000)),
        (0x0a0, low(ring + 0x2000)),
        (0x0a4, high(ring + 0x2000)),
        (0x044, 1), // QueueReady
        (0x070, acknowledge | driver | features_ok | driver_ok),
        (0x050, 0), // QueueNotify
    ]
    .map(|(offset, value)| (base + offset, value))
    .to_vec()
}

/// Registers that the guest reads and writes back for ever: all of the virtio slots, the serial port and the
/// clock, and some of the interrupt controller.
fn traffic() -> Vec<u64> {
    let all = |range: Range, len: u64| (range.base..range.base + len).step_by(4);
    let slot = |n: u64| Range { base: map::VIRTIO.base + n * map::VIRTIO_STRIDE, size: 0x200 };
    let mut addresses: Vec<u64> = all(slot(0), 0x140).chain(all(slot(1), 0x110)).collect();
    addresses.extend(all(map::SERIAL, 0x20));
    addresses.extend(all(map::RTC, 0x20));
    for offset in [0x0, 0x4, 0x80, 0x100, 0x104, 0x200, 0x300, 0x400, 0x420, 0xc00, 0x6100] {
        addresses.push(map::GICD.base + offset);
    }
    for offset in [0x0, 0x8, 0x14, 0x1_0080, 0x1_0100, 0x1_0200, 0x1_0400, 0x1_0c04] {
        addresses.push(map::GICR.base + offset);
    }
    addresses
}

/// An arm64 Image that writes the values of a first table, and then goes through a second one for ever.
fn image() -> Vec<u8> {
    const TABLES: usize = 1024;
    let mut image = vec![0; 0x4000];
    let mut word = |at: usize, word: u32| image[at..at + 4].copy_from_slice(&word.to_le_bytes());
    word(0, 0x1400_0010); // b #64
    word(16, 0x4000); // image_size
    word(24, 2); // flags: 4 KiB pages
    word(56, 0x644d_5241); // "ARM\x64"
    let code = [
        0x1000_1e0a, // adr x10, tables
        0xf840_8541, // set_up: ldr x1, [x10], #8
        0xb400_0081, // cbz x1, traffic
        0xf840_8542, // ldr x2, [x10], #8
        0xb900_0022, // str w2, [x1]
        0x17ff_fffc, // b set_up
        0xaa0a_03eb, // traffic: mov x11, x10
        0xf840_8541, // loop: ldr x1, [x10], #8
        0xb500_0061, // cbnz x1, touch
        0xaa0b_03ea, // mov x10, x11
        0x17ff_fffd, // b loop
        0xb940_0022, // touch: ldr w2, [x1]
        0xb900_0022, // str w2, [x1]
        0x17ff_fffa, // b loop
    ];
    for (n, instruction) in code.into_iter().enumerate() {
        word(64 + 4 * n, instruction);
    }
    let mut at = TABLES;
    let mut long = |value: u64| {
        word(at, value as u32);
        word(at + 4, (value >> 32) as u32);
        at += 8;
    };
    for (address, value) in set_up(0).into_iter().chain(set_up(1)) {
        long(address);
        long(value.into());
    }
    long(0);
    traffic().into_iter().for_each(&mut long);
    long(0);
    image
}
