//! What the framework of one host has, where hosts differ.

use parking_lot::Mutex;

static HOST: Mutex<Host> = Mutex::new(Host::USUAL);

/// A host. [`Session::begin_on`](crate::Session::begin_on) takes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Host {
    /// vCPUs of a virtual machine.
    pub max_vcpus: u32,
    /// Width of a guest-physical address if nobody asks for another.
    pub default_ipa_bits: u32,
    /// Greatest width of a guest-physical address.
    pub max_ipa_bits: u32,
    /// ID_AA64PFR1_EL1 tells of SME.
    pub sme: bool,
    /// The virtual timer leaves the guest when it fires, and is masked then, as without the framework's
    /// interrupt controller.
    pub timer_exits: bool,
    /// A WFI leaves the guest. With an interrupt controller of its own the framework sleeps itself, at least on the
    /// systems where that was seen.
    pub shows_wfi: bool,
    /// The guest's physical timer can be read and set; its value is by the host's counter.
    pub physical_timer: bool,
    /// One call changes or unmaps memory that several have mapped.
    pub spans: bool,
    /// Nanoseconds of one tick as numerator and denominator; none if the host does not say.
    pub timebase: Option<(u32, u32)>,
    /// The interrupt controller.
    pub gic: Geometry,
}

/// An interrupt controller's sizes in bytes, and numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Size of the distributor.
    pub distributor_size: usize,
    /// What the distributor's address must be a multiple of.
    pub distributor_alignment: usize,
    /// Size of one redistributor.
    pub redistributor_size: usize,
    /// Size of all redistributors.
    pub redistributor_region_size: usize,
    /// What the redistributors' address must be a multiple of.
    pub redistributor_alignment: usize,
    /// Where the first redistributor lies in its region.
    pub redistributor_offset: u64,
    /// Size of the region for messages.
    pub msi_size: usize,
    /// What that region's address must be a multiple of.
    pub msi_alignment: usize,
    /// First shared interrupt, and how many there are.
    pub spis: (u32, u32),
    /// The virtual timer's interrupt.
    pub timer: u32,
}

impl Host {
    /// One on which every machine fits.
    pub const USUAL: Self = Self {
        max_vcpus: 32,
        default_ipa_bits: 36,
        max_ipa_bits: 40,
        sme: false,
        timer_exits: false,
        shows_wfi: false,
        physical_timer: true,
        spans: true,
        timebase: Some((1, 1)),
        gic: Geometry {
            distributor_size: 0x1_0000,
            distributor_alignment: 0x1_0000,
            redistributor_size: 0x2_0000,
            redistributor_region_size: 32 * 0x2_0000,
            redistributor_alignment: 0x1_0000,
            redistributor_offset: 0,
            msi_size: 0x1_0000,
            msi_alignment: 0x1_0000,
            spis: (32, 988),
            timer: 27,
        },
    };
}

pub(crate) fn host() -> Host {
    *HOST.lock()
}

pub(crate) fn set(host: Host) {
    *HOST.lock() = host;
}
