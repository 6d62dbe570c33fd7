//! Which sections a machine has, known from its configuration alone.

use squib_devices::{
    gic::GicState,
    rtc::RtcState,
    serial::SerialState,
    virtio::{block::BlockState, rng::RngState},
    vmgenid::VmGenIdState,
};
use squib_formats::{
    persist::{PersistError, Section, Versioned},
    sections::Wanted,
};

use super::types::TimeState;
use crate::{
    config::{BackendKind, MachineConfig, RNG_ID},
    hypervisor::{HvfGicState, VcpuState},
    psci::PsciState,
};

/// A section that a machine saves, and needs when it is restored.
#[derive(Clone, Debug)]
pub struct Place {
    /// Kind of the state.
    pub kind: &'static str,
    /// Which of several of that kind.
    pub instance: String,
    /// The newest version of the payload that this build reads.
    pub version: u16,
    /// The longest payload, in bytes.
    pub longest: u64,
    decode: fn(&Section) -> Result<(), PersistError>,
}

impl Place {
    fn of<S: Versioned>(instance: impl Into<String>) -> Self {
        let decode = |section: &Section| section.decode::<S>().map(drop);
        Self {
            kind: S::KIND,
            instance: instance.into(),
            version: S::VERSION,
            longest: S::LONGEST,
            decode,
        }
    }

    /// What a reader of the snapshot's sections looks for.
    pub fn wanted(&self) -> Wanted<'_> {
        let Self { kind, instance, version, longest, decode: _ } = self;
        Wanted { kind, instance, newest: *version, longest: *longest }
    }

    /// Whether `section`, which comes from disk, decodes as the state that belongs here.
    pub fn decodes(&self, section: &Section) -> Result<(), PersistError> {
        (self.decode)(section)
    }
}

/// The sections of a machine of `config`, in the order in which [`Machine::save`](super::Machine::save) gives
/// them.
pub fn places(config: &MachineConfig) -> Vec<Place> {
    let mut places = vec![Place::of::<SerialState>("0"), Place::of::<RtcState>("0")];
    places.extend(config.disks.iter().map(|disk| Place::of::<BlockState>(disk.id.clone())));
    if config.rng {
        places.push(Place::of::<RngState>(RNG_ID));
    }
    places.push(Place::of::<VmGenIdState>("0"));
    places.push(irq_chip(config.backend));
    places.push(Place::of::<PsciState>("0"));
    places.extend((0..config.vcpus).map(|n| Place::of::<VcpuState>(n.to_string())));
    places.push(Place::of::<TimeState>("0"));
    places
}

/// The interrupt chip's section. Backends whose chip is architectural registers take each other's.
pub fn irq_chip(backend: BackendKind) -> Place {
    match backend {
        BackendKind::Hvf => Place::of::<HvfGicState>("0"),
        BackendKind::Soft | BackendKind::Kvm => Place::of::<GicState>("0"),
    }
}

#[cfg(test)]
mod tests {
    use squib_devices::{map, memory::GuestRam};

    use super::*;
    use crate::machine::Machine;

    #[test]
    fn the_places_are_those_of_the_sections_that_a_machine_saves() {
        let config = MachineConfig {
            memory: 64 << 20,
            vcpus: map::MAX_VCPUS,
            ..MachineConfig::new("vm", "/boot/Image")
        };
        let ram = GuestRam::new(config.memory).unwrap();
        let machine =
            Machine::assemble(config.clone(), ram.into(), Box::new(std::io::sink())).unwrap();
        let sections = machine.save().unwrap();
        let places = places(&config);
        let names: Vec<_> = places.iter().map(|p| (p.kind, &*p.instance, p.version)).collect();
        let saved: Vec<_> = sections.iter().map(|s| (&*s.kind, &*s.instance, s.version)).collect();
        assert_eq!(names, saved);
        for (place, section) in places.iter().zip(&sections) {
            place.decodes(section).unwrap();
            let len = section.payload.len() as u64;
            assert!(len <= place.longest / 2, "{} of {} bytes", place.kind, len);
        }
    }
}
