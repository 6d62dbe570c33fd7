//! A machine that has ended with a reset boots again.

use std::{collections::BTreeMap, io::Write, sync::Arc};

use squib_devices::virtio::block::DiskGranules;

use super::{Machine, MachineError};
use crate::config::MachineConfig;

/// What a machine leaves to the one that boots after it: its configuration and its disks, open and locked.
/// Disks that a restore was still filling stay connected to their snapshot.
pub struct Reboot {
    /// The next machine's configuration. Kernel and initrd must still have the digests that it names.
    pub config: MachineConfig,
    disks: BTreeMap<String, Arc<DiskGranules>>,
}

impl Reboot {
    pub(super) fn of(machine: &Machine) -> Self {
        let ids = machine.config.disks.iter().map(|disk| disk.id.clone());
        let disks = ids.zip(machine.disks.iter().map(Arc::clone)).collect();
        Self { config: machine.config.clone(), disks }
    }

    /// Boots the next machine, as [`Machine::boot`] does. The machine before must be gone: a backend may
    /// have only one a process.
    pub fn boot(self, console: Box<dyn Write + Send>) -> Result<Machine, MachineError> {
        let Self { config, disks } = self;
        Machine::boot_with(config, disks, console)
    }
}
