//! The transport's saved state, a part of every virtio device's section.

use serde::{Deserialize, Serialize};
use squib_formats::persist::PersistError;

use super::{
    INTERRUPT_CONFIG, INTERRUPT_USED, VIRTIO_F_VERSION_1,
    mmio::{
        ACKNOWLEDGE, DEVICE_NEEDS_RESET, DRIVER, DRIVER_OK, FAILED, FEATURES_OK, missing_status,
    },
    queue::{Progress, QueueSetup},
};
use crate::memory::GuestRam;

/// The virtio-mmio registers of one device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    /// Features that were offered to the driver.
    pub device_features: u64,
    /// Features that the driver wrote.
    pub driver_features: u64,
    /// `DeviceFeaturesSel`.
    pub device_features_sel: u32,
    /// `DriverFeaturesSel`.
    pub driver_features_sel: u32,
    /// `QueueSel`.
    pub queue_sel: u32,
    /// `Status`, with DEVICE_NEEDS_RESET.
    pub status: u32,
    /// `InterruptStatus`.
    pub interrupt_status: u32,
    /// `ConfigGeneration`.
    pub config_generation: u32,
    /// The queues, all that the device has.
    pub queues: Vec<QueueState>,
}

/// One queue's registers and progress.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// `QueueNum`.
    pub num: u16,
    /// `QueueReady`.
    pub ready: bool,
    /// `QueueDesc`.
    pub desc: u64,
    /// `QueueDriver`.
    pub driver: u64,
    /// `QueueDevice`.
    pub device: u64,
    /// Index of the next chain to take from the available ring.
    pub next_avail: u16,
    /// Index of the next entry to fill in the used ring.
    pub next_used: u16,
    /// The doorbell was rung, and not everything that was offered then has been looked at.
    pub notified: bool,
}

impl QueueState {
    pub(super) fn setup(&self) -> QueueSetup {
        let Self { num, desc, driver, device, .. } = *self;
        QueueSetup { num, desc, driver, device }
    }

    pub(super) fn progress(&self) -> Progress {
        let Self { next_avail, next_used, notified, .. } = *self;
        Progress { next_avail, next_used, notified }
    }
}

impl TransportState {
    /// Checks every field for a device of `kind` that can offer `supported` and has queues of at most
    /// `max_sizes` entries.
    pub(super) fn check(
        &self,
        kind: &'static str,
        supported: u64,
        max_sizes: &[u16],
        ram: &GuestRam,
    ) -> Result<(), PersistError> {
        let invalid = |field, why: String| Err(PersistError::invalid(kind, field, why));
        let Self {
            device_features: offered,
            driver_features: accepted,
            device_features_sel: _,
            driver_features_sel: _,
            queue_sel: _,
            status,
            interrupt_status,
            config_generation: _,
            ref queues,
        } = *self;

        if offered & !supported != 0 || offered & VIRTIO_F_VERSION_1 == 0 {
            let why = format!("{offered:#x} was offered, this device can offer {supported:#x}");
            return invalid("transport.device_features", why);
        }
        const KNOWN: u32 =
            ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | DEVICE_NEEDS_RESET | FAILED;
        if status & !KNOWN != 0 || missing_status(status) != 0 {
            return invalid("transport.status", format!("{status:#x} cannot be reached"));
        }
        let negotiated = status & FEATURES_OK != 0;
        if negotiated && (accepted & !offered != 0 || accepted & VIRTIO_F_VERSION_1 == 0) {
            let why = format!("{accepted:#x} was accepted of {offered:#x}");
            return invalid("transport.driver_features", why);
        }
        if interrupt_status & !(INTERRUPT_USED | INTERRUPT_CONFIG) != 0 {
            let why = format!("{interrupt_status:#x} has unknown bits");
            return invalid("transport.interrupt_status", why);
        }
        if queues.len() != max_sizes.len() {
            let why = format!("{} queues, the device has {}", queues.len(), max_sizes.len());
            return invalid("transport.queues", why);
        }
        for (queue, &max) in queues.iter().zip(max_sizes) {
            if !queue.num.is_power_of_two() || queue.num > max {
                let why = format!("{} is not a power of two from 1 to {max}", queue.num);
                return invalid("transport.queues.num", why);
            }
            if queue.ready {
                if !negotiated {
                    return invalid("transport.queues.ready", "set before FEATURES_OK".to_owned());
                }
                if let Err(error) = queue.setup().check(max, ram) {
                    return invalid("transport.queues", error.to_string());
                }
            }
            // Every chain is returned before a device comes to rest; the one that made it ask for a
            // reset is not.
            let Progress { next_avail, next_used, notified } = queue.progress();
            let live = queue.ready && status & DRIVER_OK != 0;
            let open = next_avail.wrapping_sub(next_used);
            let most = u16::from(status & DEVICE_NEEDS_RESET != 0);
            if open > most || (!live && queue.progress() != Progress::default()) {
                let why = format!(
                    "next_avail {next_avail}, next_used {next_used}, notified {notified} with \
                     ready {}, status {status:#x}",
                    queue.ready
                );
                return invalid("transport.queues.next_avail", why);
            }
        }
        Ok(())
    }
}
