//! The devices of a machine, at their places in the memory map.

use std::{collections::BTreeMap, sync::Arc};

use parking_lot::Mutex;
use squib_devices::{
    clock::Clock,
    device::MachineDevice,
    irq::{IrqChip, IrqLine},
    map::{self, Range},
    memory::GuestRam,
    rtc::Rtc,
    serial::Serial,
    virtio::{
        VirtioDevice,
        block::{
            Block, BlockConfig, Disk, DiskGranules, Execution, FileDisk, SizeOnly, TrackedDisk,
        },
        mmio::VirtioMmio,
        rng::{Entropy, Rng},
    },
    vmgenid::VmGenId,
};

use super::{
    Part,
    alarm::AlarmClock,
    console::{Feed, Output, OutputEnd},
    types::MachineError,
};
use crate::{
    config::{MachineConfig, RNG_ID},
    seed::{Lane, Seeds},
};

/// Takes bytes for the guest and says how many.
pub(super) type Offer = Box<dyn Fn(&[u8]) -> usize + Send>;

/// What devices work on.
pub(super) struct Host<'a> {
    pub(super) irq: Arc<dyn IrqChip>,
    pub(super) ram: &'a GuestRam,
    pub(super) clock: &'a Arc<dyn Clock>,
}

/// What lies behind a machine's disks.
pub(super) enum Disks {
    /// Files that are open, by id. Those that are not among them are opened at their paths.
    Open(BTreeMap<String, Arc<DiskGranules>>),
    /// Nothing but sizes in bytes, by id: for a machine that never runs.
    Sizes(BTreeMap<String, u64>),
}

/// What was built.
pub(super) struct Built {
    pub(super) parts: Vec<(Range, Part)>,
    /// The granules of the disks, in their order.
    pub(super) disks: Vec<Arc<DiskGranules>>,
    pub(super) generation: Arc<Mutex<VmGenId>>,
    pub(super) alarm: Arc<AlarmClock>,
    /// Offers bytes to the serial port, which takes as many as it has room for.
    pub(super) offer: Offer,
}

impl Host<'_> {
    fn line(&self, intid: u32) -> IrqLine {
        IrqLine::new(Arc::clone(&self.irq), intid)
    }

    /// `device` behind the transport of `slot`, which the configuration keeps below
    /// [`map::VIRTIO_SLOTS`].
    fn virtio<D: VirtioDevice + 'static>(
        &self,
        slot: u32,
        instance: &str,
        device: D,
    ) -> (Range, Part) {
        let base = map::VIRTIO.base + u64::from(slot) * map::VIRTIO_STRIDE;
        let line = self.line(map::VIRTIO_INTID + slot);
        let transport = VirtioMmio::new(device, self.ram.clone(), line);
        part(Range { base, size: map::VIRTIO_STRIDE }, instance, Arc::new(Mutex::new(transport)))
    }
}

/// Builds the devices of `config` in their reset state. Disks that are not among `given` open ones are opened.
pub(super) fn build(
    config: &MachineConfig,
    host: &Host<'_>,
    given: &Disks,
    output: &Arc<Output>,
    feed: &Arc<Feed>,
) -> Result<Built, MachineError> {
    let mut serial =
        Serial::new(host.line(map::SERIAL_INTID), Box::new(OutputEnd(Arc::clone(output))));
    let room = Arc::clone(feed);
    serial.on_room(Box::new(move || room.has_room()));
    let serial = Arc::new(Mutex::new(serial));
    let port = Arc::clone(&serial);
    let rtc = Rtc::new(host.line(map::RTC_INTID), Arc::clone(host.clock));
    let alarm = AlarmClock::new(rtc, Arc::clone(host.clock), config.deterministic.is_some());
    let generation = VmGenId::new(host.ram.clone(), host.line(map::VMGENID_INTID));

    let mut parts = vec![part(map::SERIAL, "0", serial), part(map::RTC, "0", alarm.clone())];
    let mut disks = Vec::new();
    for (slot, disk) in (0..).zip(&config.disks) {
        let settings = BlockConfig {
            id: disk.id.clone(),
            path: disk.path.clone(),
            read_only: disk.read_only,
            rate_limiter: None,
        };
        let execution = match config.deterministic {
            Some(_) => Execution::Inline,
            None => Execution::Worker,
        };
        let backing: Box<dyn Disk> = match given {
            Disks::Sizes(sizes) => {
                let size = sizes.get(&disk.id).copied().unwrap_or(0);
                Box::new(SizeOnly::new(size, &disk.path)?)
            }
            Disks::Open(open) => {
                let granules = match open.get(&disk.id) {
                    Some(granules) => Arc::clone(granules),
                    None => {
                        let file = FileDisk::open(&disk.path, disk.read_only)?;
                        Arc::new(TrackedDisk::granules_of(&disk.id, file, disk.read_only))
                    }
                };
                disks.push(Arc::clone(&granules));
                Box::new(TrackedDisk::new(granules))
            }
        };
        let block = Block::with_disk(&settings, backing, execution, Arc::clone(host.clock))?;
        parts.push(host.virtio(slot, &disk.id, block));
    }
    if config.rng {
        let entropy = match config.deterministic {
            Some(deterministic) => {
                let mut seed = [0; 32];
                Seeds::stream(deterministic.seed, Lane::VirtioRng).fill(&mut seed)?;
                Entropy::seeded(seed)
            }
            None => Entropy::Os,
        };
        parts.push(host.virtio(config.disks.len() as u32, RNG_ID, Rng::new(entropy)));
    }
    Ok(Built {
        parts,
        disks,
        generation: Arc::new(Mutex::new(generation)),
        alarm,
        offer: Box::new(move |bytes| port.lock().enqueue(bytes)),
    })
}

fn part(range: Range, instance: &str, device: Arc<dyn MachineDevice>) -> (Range, Part) {
    (range, Part { instance: instance.to_owned(), device })
}
