//! The devices of a machine, at their places in the memory map.

use std::sync::Arc;

use parking_lot::Mutex;
use squib_devices::{
    clock::Clock,
    device::MachineDevice,
    irq::{IrqChip, IrqLine},
    map::{self, Range},
    memory::GuestRam,
    rtc::Rtc,
    serial::Serial,
    vmgenid::VmGenId,
};

use super::{
    Part,
    console::{Feed, Output, OutputEnd},
    types::MachineError,
};
use crate::config::MachineConfig;

/// Takes bytes for the guest and says how many.
pub(super) type Offer = Box<dyn Fn(&[u8]) -> usize + Send>;

/// What devices work on.
pub(super) struct Host<'a> {
    pub(super) irq: Arc<dyn IrqChip>,
    pub(super) ram: &'a GuestRam,
    pub(super) clock: &'a Arc<dyn Clock>,
}

/// What was built.
pub(super) struct Built {
    pub(super) parts: Vec<(Range, Part)>,
    pub(super) generation: Arc<Mutex<VmGenId>>,
    /// Offers bytes to the serial port, which takes as many as it has room for.
    pub(super) offer: Offer,
}

impl Host<'_> {
    fn line(&self, intid: u32) -> IrqLine {
        IrqLine::new(Arc::clone(&self.irq), intid)
    }
}

/// Builds the devices of `config` in their reset state.
pub(super) fn build(
    config: &MachineConfig,
    host: &Host<'_>,
    output: &Arc<Output>,
    feed: &Arc<Feed>,
) -> Result<Built, MachineError> {
    let mut serial =
        Serial::new(host.line(map::SERIAL_INTID), Box::new(OutputEnd(Arc::clone(output))));
    let room = Arc::clone(feed);
    serial.on_room(Box::new(move || room.has_room()));
    let serial = Arc::new(Mutex::new(serial));
    let port = Arc::clone(&serial);
    let rtc = Mutex::new(Rtc::new(host.line(map::RTC_INTID), Arc::clone(host.clock)));
    let generation = VmGenId::new(host.ram.clone(), host.line(map::VMGENID_INTID));

    let parts = vec![part(map::SERIAL, "0", serial), part(map::RTC, "0", Arc::new(rtc))];
    let _ = config;
    Ok(Built {
        parts,
        generation: Arc::new(Mutex::new(generation)),
        offer: Box::new(move |bytes| port.lock().enqueue(bytes)),
    })
}

fn part(range: Range, instance: &str, device: Arc<dyn MachineDevice>) -> (Range, Part) {
    (range, Part { instance: instance.to_owned(), device })
}
