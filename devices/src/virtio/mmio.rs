//! The virtio-mmio transport, version 2 (virtio 1.2, section 4.2).

use std::{sync::Arc, time::Instant};

use squib_formats::persist::{Persist, PersistError, Versioned};

use super::{
    DriverLink, Signals, TRANSPORT_FEATURES, VIRTIO_F_EVENT_IDX, VIRTIO_F_VERSION_1, VirtioDevice,
    queue::{Progress, QueueSetup, VirtQueue},
    state::{QueueState, TransportState},
};
use crate::{
    device::{MmioDevice, Pause, PauseError},
    irq::IrqLine,
    memory::GuestRam,
};

/// `Status` (2.1): the driver has found the device.
pub const ACKNOWLEDGE: u32 = 1;
/// `Status` (2.1): the driver knows how to drive it.
pub const DRIVER: u32 = 2;
/// `Status` (2.1): the driver is ready.
pub const DRIVER_OK: u32 = 4;
/// `Status` (2.1): the features are settled.
pub const FEATURES_OK: u32 = 8;
/// `Status` (2.1): only a reset helps.
pub const DEVICE_NEEDS_RESET: u32 = 0x40;
/// `Status` (2.1): the driver has given up.
pub const FAILED: u32 = 0x80;

/// Register offsets (4.2.2, table 4.1).
mod reg {
    pub(super) const MAGIC_VALUE: u64 = 0x000;
    pub(super) const VERSION: u64 = 0x004;
    pub(super) const DEVICE_ID: u64 = 0x008;
    pub(super) const VENDOR_ID: u64 = 0x00c;
    pub(super) const DEVICE_FEATURES: u64 = 0x010;
    pub(super) const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub(super) const DRIVER_FEATURES: u64 = 0x020;
    pub(super) const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub(super) const QUEUE_SEL: u64 = 0x030;
    pub(super) const QUEUE_NUM_MAX: u64 = 0x034;
    pub(super) const QUEUE_NUM: u64 = 0x038;
    pub(super) const QUEUE_READY: u64 = 0x044;
    pub(super) const QUEUE_NOTIFY: u64 = 0x050;
    pub(super) const INTERRUPT_STATUS: u64 = 0x060;
    pub(super) const INTERRUPT_ACK: u64 = 0x064;
    pub(super) const STATUS: u64 = 0x070;
    pub(super) const QUEUE_DESC_LOW: u64 = 0x080;
    pub(super) const QUEUE_DESC_HIGH: u64 = 0x084;
    pub(super) const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub(super) const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub(super) const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub(super) const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    pub(super) const SHM_LEN_LOW: u64 = 0x0b0;
    pub(super) const SHM_LEN_HIGH: u64 = 0x0b4;
    pub(super) const SHM_BASE_LOW: u64 = 0x0b8;
    pub(super) const SHM_BASE_HIGH: u64 = 0x0bc;
    pub(super) const CONFIG_GENERATION: u64 = 0x0fc;
    pub(super) const CONFIG: u64 = 0x100;
}

/// "virt" (4.2.2).
const MAGIC: u32 = 0x7472_6976;
/// "sqib", the vendor id.
const VENDOR: u32 = u32::from_le_bytes(*b"sqib");
/// What the length and base of a shared memory region read as where there is none (4.2.2).
const NO_REGION: u32 = u32::MAX;

/// A virtio device with its registers: what a machine holds.
pub struct VirtioMmio<D: VirtioDevice> {
    device: D,
    ram: GuestRam,
    signals: Arc<Signals>,
    registers: Registers,
}

/// What the driver wrote. InterruptStatus and DEVICE_NEEDS_RESET are in [`Signals`], the queues'
/// progress in the device.
struct Registers {
    offered: u64,
    accepted: u64,
    device_features_sel: u32,
    driver_features_sel: u32,
    queue_sel: u32,
    status: u32,
    config_generation: u32,
    queues: Vec<(QueueSetup, bool)>,
}

impl Registers {
    fn reset<D: VirtioDevice>(device: &D) -> Self {
        Self {
            offered: TRANSPORT_FEATURES | device.offered_features(),
            accepted: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            queue_sel: 0,
            status: 0,
            config_generation: 0,
            queues: D::QUEUE_MAX_SIZES.iter().map(|&max| (QueueSetup::reset(max), false)).collect(),
        }
    }
}

impl<D: VirtioDevice> VirtioMmio<D> {
    /// Puts the registers in front of `device`, whose interrupt is `line` (edge-triggered).
    pub fn new(device: D, ram: GuestRam, line: IrqLine) -> Self {
        let registers = Registers::reset(&device);
        Self { device, ram, signals: Arc::new(Signals::new(line)), registers }
    }

    /// The device behind the registers.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// The device behind the registers.
    pub fn device_mut(&mut self) -> &mut D {
        &mut self.device
    }

    #[cfg(test)]
    pub(super) fn ram(&self) -> &GuestRam {
        &self.ram
    }

    fn status(&self) -> u32 {
        let needs_reset = if self.signals.failed() { DEVICE_NEEDS_RESET } else { 0 };
        self.registers.status | needs_reset
    }

    fn selected(&self) -> usize {
        self.registers.queue_sel as usize
    }

    fn read_register(&self, offset: u64) -> u32 {
        let Registers { offered, device_features_sel, config_generation, .. } = self.registers;
        match offset {
            reg::MAGIC_VALUE => MAGIC,
            reg::VERSION => 2,
            reg::DEVICE_ID => D::DEVICE_TYPE,
            reg::VENDOR_ID => VENDOR,
            reg::DEVICE_FEATURES => match device_features_sel {
                0 => offered as u32,
                1 => (offered >> 32) as u32,
                _ => 0,
            },
            // Zero: there is no such queue.
            reg::QUEUE_NUM_MAX => {
                D::QUEUE_MAX_SIZES.get(self.selected()).copied().unwrap_or(0).into()
            }
            reg::QUEUE_READY => {
                self.registers.queues.get(self.selected()).is_some_and(|(_, ready)| *ready).into()
            }
            reg::INTERRUPT_STATUS => self.signals.interrupt_status(),
            reg::STATUS => self.status(),
            reg::SHM_LEN_LOW | reg::SHM_LEN_HIGH | reg::SHM_BASE_LOW | reg::SHM_BASE_HIGH => {
                NO_REGION
            }
            reg::CONFIG_GENERATION => config_generation,
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            reg::DEVICE_FEATURES_SEL => self.registers.device_features_sel = value,
            reg::DRIVER_FEATURES_SEL => self.registers.driver_features_sel = value,
            reg::DRIVER_FEATURES => self.write_driver_features(value),
            reg::QUEUE_SEL => self.registers.queue_sel = value,
            reg::QUEUE_READY => self.write_queue_ready(value),
            reg::QUEUE_NOTIFY => {
                // Without VIRTIO_F_NOTIFICATION_DATA the value is the queue's index.
                let index = value as usize;
                let live = self.registers.status & DRIVER_OK != 0 && !self.signals.failed();
                if live && self.registers.queues.get(index).is_some_and(|(_, ready)| *ready) {
                    self.device.notify(index);
                }
            }
            reg::INTERRUPT_ACK => self.signals.acknowledge(value),
            reg::STATUS => self.write_status(value),
            reg::QUEUE_NUM
            | reg::QUEUE_DESC_LOW
            | reg::QUEUE_DESC_HIGH
            | reg::QUEUE_DRIVER_LOW
            | reg::QUEUE_DRIVER_HIGH
            | reg::QUEUE_DEVICE_LOW
            | reg::QUEUE_DEVICE_HIGH => self.write_queue_setup(offset, value),
            _ => {}
        }
    }

    fn write_driver_features(&mut self, value: u32) {
        let Registers { accepted, driver_features_sel, status, .. } = &mut self.registers;
        // 3.1.1: the driver writes features between DRIVER and FEATURES_OK, never after.
        if *status & (DRIVER | FEATURES_OK) != DRIVER {
            return;
        }
        match driver_features_sel {
            0 => *accepted = *accepted & !0xffff_ffff | u64::from(value),
            1 => *accepted = *accepted & 0xffff_ffff | u64::from(value) << 32,
            _ => {}
        }
    }

    fn write_queue_setup(&mut self, offset: u64, value: u32) {
        let index = self.selected();
        let negotiated = self.registers.status & FEATURES_OK != 0;
        // 4.2.2.2: the driver does not change a queue that is ready.
        let Some((setup, false)) = self.registers.queues.get_mut(index) else { return };
        if !negotiated {
            return;
        }
        let set = |address: &mut u64, high: bool| {
            let value = u64::from(value);
            *address = if high {
                *address & 0xffff_ffff | value << 32
            } else {
                *address & !0xffff_ffff | value
            };
        };
        match offset {
            reg::QUEUE_NUM => match u16::try_from(value) {
                Ok(num) if num.is_power_of_two() && num <= D::QUEUE_MAX_SIZES[index] => {
                    setup.num = num;
                }
                _ => tracing::debug!(value, "the driver wrote a queue size that is not allowed"),
            },
            reg::QUEUE_DESC_LOW => set(&mut setup.desc, false),
            reg::QUEUE_DESC_HIGH => set(&mut setup.desc, true),
            reg::QUEUE_DRIVER_LOW => set(&mut setup.driver, false),
            reg::QUEUE_DRIVER_HIGH => set(&mut setup.driver, true),
            reg::QUEUE_DEVICE_LOW => set(&mut setup.device, false),
            reg::QUEUE_DEVICE_HIGH => set(&mut setup.device, true),
            _ => {}
        }
    }

    fn write_queue_ready(&mut self, value: u32) {
        let index = self.selected();
        let Some(&(setup, ready)) = self.registers.queues.get(index) else { return };
        let enable = value & 1 != 0;
        if self.registers.status & FEATURES_OK == 0 || enable == ready {
            return;
        }
        let queue = if enable {
            match self.queue(index, &setup, Progress::default()) {
                Some(queue) => Some(queue),
                None => return self.signals.fail(self.registers.status & DRIVER_OK != 0),
            }
        } else {
            None
        };
        self.device.set_queue(index, queue);
        self.registers.queues[index].1 = enable;
    }

    /// The queue at `setup`, or a word in the log.
    fn queue(&self, index: usize, setup: &QueueSetup, progress: Progress) -> Option<VirtQueue> {
        let event_idx = self.registers.accepted & VIRTIO_F_EVENT_IDX != 0;
        let max = D::QUEUE_MAX_SIZES[index];
        VirtQueue::new(setup, max, event_idx, progress, &self.ram)
            .inspect_err(|error| {
                tracing::warn!(device = self.device.id(), queue = index, "{error}");
            })
            .ok()
    }

    fn write_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let Registers { offered, accepted, status, .. } = self.registers;
        // 2.1.1: the driver sets bits and clears none; DEVICE_NEEDS_RESET is the device's.
        if status & !value != 0 {
            return;
        }
        let mut new = value & (ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED);
        let settled = status & FEATURES_OK != 0;
        // 2.2.2, 6.1: not set, and read back as such, if the driver accepted what was not offered.
        if !settled && (accepted & !offered != 0 || accepted & VIRTIO_F_VERSION_1 == 0) {
            new &= !FEATURES_OK;
        }
        // A bit whose predecessor is missing is not taken.
        while missing_status(new) != 0 {
            new &= !missing_status(new);
        }
        self.registers.status = new;
        if new & !status & DRIVER_OK != 0 {
            self.device.activate(self.link());
        }
    }

    fn link(&self) -> DriverLink {
        DriverLink {
            features: self.registers.accepted,
            ram: self.ram.clone(),
            signals: self.signals.clone(),
        }
    }

    fn reset(&mut self) {
        // The device first: its worker may still raise an interrupt for its last request.
        self.device.reset();
        self.signals.set(0, false);
        // A restored device goes on offering what it offered.
        let Registers { offered, config_generation, .. } = self.registers;
        self.registers = Registers { offered, config_generation, ..Registers::reset(&self.device) };
    }
}

/// The bits of `status` whose predecessors are missing (3.1.1).
pub(super) fn missing_status(status: u32) -> u32 {
    [(DRIVER, ACKNOWLEDGE), (FEATURES_OK, DRIVER), (DRIVER_OK, FEATURES_OK)]
        .into_iter()
        .filter(|(bit, before)| status & bit != 0 && status & before == 0)
        .fold(0, |missing, (bit, _)| missing | bit)
}

impl<D: VirtioDevice> MmioDevice for VirtioMmio<D> {
    fn read(&mut self, offset: u64, size: u8) -> u64 {
        if offset >= reg::CONFIG {
            let mut data = [0; 8];
            let len = usize::from(size).min(8);
            self.device.read_config(offset - reg::CONFIG, &mut data[..len]);
            return u64::from_le_bytes(data);
        }
        // 4.2.2.2: registers are accessed with 32 bits.
        if size == 4 { self.read_register(offset).into() } else { 0 }
    }

    fn write(&mut self, offset: u64, size: u8, value: u64) {
        if offset >= reg::CONFIG {
            let len = usize::from(size).min(8);
            self.device.write_config(offset - reg::CONFIG, &value.to_le_bytes()[..len]);
        } else if size == 4 {
            self.write_register(offset, value as u32);
        }
    }
}

impl<D: VirtioDevice> Pause for VirtioMmio<D> {
    fn pause(&mut self, deadline: Instant) -> Result<(), PauseError> {
        self.device.pause(deadline)
    }

    fn resume(&mut self) {
        self.device.resume();
    }
}

impl<D: VirtioDevice> Persist for VirtioMmio<D> {
    type State = D::State;

    fn save(&self) -> Result<D::State, PersistError> {
        let Self { device, ram: _, signals, registers } = self;
        let Registers {
            offered,
            accepted,
            device_features_sel,
            driver_features_sel,
            queue_sel,
            status: _,
            config_generation,
            queues,
        } = registers;
        let queues = queues.iter().enumerate().map(|(index, (setup, ready))| {
            let progress = device.inspect_queue(index, VirtQueue::progress).unwrap_or_default();
            let QueueSetup { num, desc, driver, device } = *setup;
            let Progress { next_avail, next_used, notified } = progress;
            let ready = *ready;
            QueueState { num, ready, desc, driver, device, next_avail, next_used, notified }
        });
        let queues = queues.collect();
        device.save(TransportState {
            device_features: *offered,
            driver_features: *accepted,
            device_features_sel: *device_features_sel,
            driver_features_sel: *driver_features_sel,
            queue_sel: *queue_sel,
            status: self.status(),
            interrupt_status: signals.interrupt_status(),
            config_generation: *config_generation,
            queues,
        })
    }

    fn restore(&mut self, state: D::State) -> Result<(), PersistError> {
        let (transport, checked) = self.device.check(state)?;
        let supported = TRANSPORT_FEATURES | self.device.offered_features();
        transport.check(D::State::KIND, supported, D::QUEUE_MAX_SIZES, &self.ram)?;

        let TransportState {
            device_features,
            driver_features,
            device_features_sel,
            driver_features_sel,
            queue_sel,
            status,
            interrupt_status,
            config_generation,
            queues,
        } = transport;
        self.device.reset();
        self.device.apply(checked);
        self.signals.set(interrupt_status, status & DEVICE_NEEDS_RESET != 0);
        self.registers = Registers {
            offered: device_features,
            accepted: driver_features,
            device_features_sel,
            driver_features_sel,
            queue_sel,
            status: status & !DEVICE_NEEDS_RESET,
            config_generation,
            queues: queues.iter().map(|queue| (queue.setup(), queue.ready)).collect(),
        };
        for (index, queue) in queues.iter().enumerate().filter(|(_, queue)| queue.ready) {
            let queue = self.queue(index, &queue.setup(), queue.progress());
            self.device.set_queue(index, queue);
        }
        if status & DRIVER_OK != 0 {
            self.device.activate(self.link());
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "mmio_tests.rs"]
mod tests;
