//! VM generation id (device-tree binding `microsoft,vmgenid`): 16 bytes of guest RAM that are new
//! whenever the guest may run twice from one state, and an edge interrupt that says so.
//!
//! There are no registers: the device is two methods and its state.

use squib_formats::{
    first_version,
    persist::{Persist, PersistError},
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::{irq::IrqLine, map::VMGENID, memory::GuestRam};
pub use state::VmGenIdState;

/// The generation id of a machine.
pub struct VmGenId {
    // Runtime glue.
    ram: GuestRam,
    irq: IrqLine,
    // What the guest sees.
    id: [u8; 16],
}

impl VmGenId {
    /// A device that has not written an id yet: RAM is not touched, since it may come from a snapshot.
    pub fn new(ram: GuestRam, irq: IrqLine) -> Self {
        Self { ram, irq, id: [0; 16] }
    }

    /// The id as the host gave it last.
    pub fn id(&self) -> [u8; 16] {
        self.id
    }

    /// Gives a machine that boots its first id, without an interrupt.
    pub fn set_first(&mut self, id: [u8; 16]) -> Result<(), GuestMemoryError> {
        self.ram.write_slice(&id, GuestAddress(VMGENID.base))?;
        self.id = id;
        Ok(())
    }

    /// Gives a clone its own id and raises the interrupt; called before its first instruction.
    pub fn new_generation(&mut self, id: [u8; 16]) -> Result<(), GuestMemoryError> {
        self.set_first(id)?;
        self.irq.pulse();
        Ok(())
    }
}

first_version!(VmGenIdState, "vmgenid");

impl Persist for VmGenId {
    type State = VmGenIdState;

    fn save(&self) -> Result<VmGenIdState, PersistError> {
        let Self { ram: _, irq: _, id } = self;
        Ok(VmGenIdState { id: *id })
    }

    /// RAM is left alone: what it holds is part of the memory image, even where the guest wrote over it.
    fn restore(&mut self, state: VmGenIdState) -> Result<(), PersistError> {
        let VmGenIdState { id } = state;
        self.id = id;
        Ok(())
    }
}

mod state {
    use serde::{Deserialize, Serialize};

    /// The generation id.
    #[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
    pub struct VmGenIdState {
        /// The id as the host gave it last.
        pub id: [u8; 16],
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parking_lot::Mutex;
    use squib_formats::persist::{restore_section, save_section};

    use super::*;
    use crate::{irq::IrqChip, map::VMGENID_INTID};

    #[derive(Default)]
    struct Line(Mutex<Vec<bool>>);

    impl IrqChip for Line {
        fn set_spi(&self, intid: u32, level: bool) {
            assert_eq!(intid, VMGENID_INTID);
            self.0.lock().push(level);
        }
    }

    fn device() -> (Arc<Line>, GuestRam, VmGenId) {
        let (line, ram) = (Arc::new(Line::default()), GuestRam::new(0x20_0000).unwrap());
        let device = VmGenId::new(ram.clone(), IrqLine::new(line.clone(), VMGENID_INTID));
        (line, ram, device)
    }

    fn in_ram(ram: &GuestRam) -> [u8; 16] {
        ram.read_obj(GuestAddress(VMGENID.base)).unwrap()
    }

    #[test]
    fn a_new_generation_is_in_ram_before_its_edge() {
        let (line, ram, mut device) = device();
        device.set_first([1; 16]).unwrap();
        assert_eq!((in_ram(&ram), line.0.lock().len()), ([1; 16], 0));
        device.new_generation([7; 16]).unwrap();
        assert_eq!(in_ram(&ram), [7; 16]);
        assert_eq!(*line.0.lock(), [true, false]);
    }

    #[test]
    fn restore_takes_the_id_and_leaves_ram_to_the_memory_image() {
        let (_, _, mut saved) = device();
        saved.set_first([9; 16]).unwrap();
        let section = save_section("0", &saved).unwrap();
        let (line, ram, mut device) = device();
        restore_section(&mut device, &section).unwrap();
        assert_eq!((device.id(), in_ram(&ram)), ([9; 16], [0; 16]));
        assert!(line.0.lock().is_empty());
        assert_eq!(save_section("0", &device).unwrap(), section);
    }

    squib_formats::persist_contract! {
        mod contract,
        device: VmGenId,
        fresh: || device().2,
        change: |device| device.new_generation(*b"0123456789abcdef").unwrap(),
    }
}
