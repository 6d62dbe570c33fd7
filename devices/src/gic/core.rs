//! All interrupts of the machine and how they find their vCPU: what the GIC's one lock protects.

use std::sync::Arc;

use super::{
    CpuOutputs, Group, affinity,
    bank::Bank,
    icc::Icc,
    spec::{SPECIAL_BASE, SPURIOUS, gicd, icc},
};
use crate::map::{INTIDS, SPI_BASE};

/// Banks of SPIs.
pub(super) const SPI_BANKS: usize = ((INTIDS - SPI_BASE) / 32) as usize;
/// SPIs.
pub(super) const SPIS: usize = SPI_BANKS * 32;
/// SGIs, the low half of a private bank, are always edge-triggered.
pub(super) const SGI_MASK: u32 = 0xffff;

const _: () = assert!(SPI_BASE as usize + SPIS == INTIDS as usize && INTIDS < SPECIAL_BASE);

pub(super) struct Core {
    // Runtime glue.
    pub(super) outputs: Arc<dyn CpuOutputs>,
    // What the guest sees.
    /// The writable bits of GICD_CTLR.
    pub(super) ctlr: u32,
    pub(super) spis: [Bank; SPI_BANKS],
    /// GICD_IROUTER.
    pub(super) routers: [u64; SPIS],
    pub(super) cpus: Vec<Cpu>,
    // Derived.
    /// The vCPU that each SPI goes to now; none where the router names no vCPU that takes it.
    pub(super) targets: [Option<u8>; SPIS],
}

/// One redistributor with its CPU interface.
pub(super) struct Cpu {
    // What the guest sees.
    /// GICR_WAKER.ProcessorSleep. It holds nothing back, as with KVM and QEMU: software that runs
    /// without firmware expects interrupts without a word to its redistributor.
    pub(super) processor_sleep: bool,
    /// SGIs and PPIs.
    pub(super) private: Bank,
    pub(super) icc: Icc,
    // Derived.
    /// Which SPIs have this vCPU as their target.
    pub(super) spis: [u32; SPI_BANKS],
    /// The highest priority pending interrupt (HPPI).
    pub(super) pending: Option<Pending>,
    /// Level of the IRQ and of the FIQ output.
    pub(super) lines: [bool; 2],
}

/// The highest priority pending interrupt of a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pending {
    pub(super) intid: u32,
    pub(super) priority: u8,
    pub(super) group: Group,
}

impl Cpu {
    pub(super) fn new() -> Self {
        Self {
            processor_sleep: false,
            private: Bank::new(SGI_MASK),
            icc: Icc::new(),
            spis: [0; SPI_BANKS],
            pending: None,
            lines: [false; 2],
        }
    }

    /// True if `group` is enabled at the CPU interface.
    fn takes(&self, group: Group) -> bool {
        self.icc.group_enabled[group as usize]
    }
}

impl Core {
    pub(super) fn new(vcpus: u32, outputs: Arc<dyn CpuOutputs>) -> Self {
        let mut core = Self {
            outputs,
            ctlr: 0,
            spis: std::array::from_fn(|_| Bank::new(0)),
            routers: [0; SPIS],
            cpus: (0..vcpus).map(|_| Cpu::new()).collect(),
            targets: [None; SPIS],
        };
        core.reroute();
        core
    }

    /// Drives the line of an SPI.
    pub(super) fn set_spi(&mut self, intid: u32, level: bool) {
        let Some((bank, n)) = spi(intid) else { return };
        self.spis[bank].set_line(n, level);
        self.refresh_spi(intid);
    }

    /// Drives the line of a PPI.
    pub(super) fn set_ppi(&mut self, vcpu: usize, intid: u32, level: bool) {
        let Some(cpu) = self.cpus.get_mut(vcpu) else { return };
        if (16..SPI_BASE).contains(&intid) {
            cpu.private.set_line(intid, level);
            self.refresh(vcpu);
        }
    }

    /// A read of a CPU interface register by `vcpu`; none if it is not a readable register.
    pub(super) fn icc_read(&mut self, vcpu: usize, reg: u16) -> Option<u64> {
        let value = match reg {
            icc::ICC_IAR0_EL1 => self.acknowledge(vcpu, Group::Zero),
            icc::ICC_IAR1_EL1 => self.acknowledge(vcpu, Group::One),
            icc::ICC_HPPIR0_EL1 => self.highest_of(vcpu, Group::Zero)?,
            icc::ICC_HPPIR1_EL1 => self.highest_of(vcpu, Group::One)?,
            _ => return self.cpus.get(vcpu)?.icc.read(reg),
        };
        Some(value.into())
    }

    /// A write of a CPU interface register by `vcpu`; false if it is not a writable register.
    pub(super) fn icc_write(&mut self, vcpu: usize, reg: u16, value: u64) -> bool {
        if vcpu >= self.cpus.len() {
            return false;
        }
        match reg {
            icc::ICC_EOIR0_EL1 => self.end_of_interrupt(vcpu, value, Group::Zero),
            icc::ICC_EOIR1_EL1 => self.end_of_interrupt(vcpu, value, Group::One),
            // With EOImode clear the write is unpredictable: ignored.
            icc::ICC_DIR_EL1 if !self.cpus[vcpu].icc.eoi_mode => {}
            icc::ICC_DIR_EL1 => self.deactivate(vcpu, intid_of(value)),
            icc::ICC_SGI1R_EL1 => self.send_sgi(vcpu, value, Group::One),
            // With one Security state, the SGIs of "the other" one are those of Group 0.
            icc::ICC_ASGI1R_EL1 | icc::ICC_SGI0R_EL1 => self.send_sgi(vcpu, value, Group::Zero),
            _ => {
                if !self.cpus[vcpu].icc.write(reg, value) {
                    return false;
                }
                if matches!(reg, icc::ICC_IGRPEN0_EL1 | icc::ICC_IGRPEN1_EL1) {
                    // An SPI for any participating vCPU may have gained or lost this one.
                    self.reroute();
                } else {
                    self.refresh(vcpu);
                }
            }
        }
        true
    }

    /// Finds the target of every SPI anew: after routers, groups, group enables or sleep changed.
    pub(super) fn reroute(&mut self) {
        for cpu in &mut self.cpus {
            cpu.spis = [0; SPI_BANKS];
        }
        for i in 0..SPIS {
            let target = self.route(i);
            self.targets[i] = target;
            if let Some(target) = target {
                self.cpus[usize::from(target)].spis[i / 32] |= 1 << (i % 32);
            }
        }
        self.refresh_all();
    }

    /// Brings the outputs of every vCPU up to date.
    pub(super) fn refresh_all(&mut self) {
        for vcpu in 0..self.cpus.len() {
            self.refresh(vcpu);
        }
    }

    /// Brings the outputs of `vcpu` up to date: after one of its interrupts, or its interface, changed.
    pub(super) fn refresh(&mut self, vcpu: usize) {
        let pending = self.highest_pending(vcpu);
        let cpu = &mut self.cpus[vcpu];
        cpu.pending = pending;
        let lines = cpu.levels();
        let before = std::mem::replace(&mut cpu.lines, lines);
        if lines[0] != before[0] {
            self.outputs.set_irq(vcpu as u32, lines[0]);
        }
        if lines[1] != before[1] {
            self.outputs.set_fiq(vcpu as u32, lines[1]);
        }
    }

    /// Looks for the highest priority pending interrupt of `vcpu`.
    pub(super) fn highest_pending(&self, vcpu: usize) -> Option<Pending> {
        let cpu = &self.cpus[vcpu];
        let zero = self.ctlr & gicd::CTLR_ENABLE_GRP0 != 0 && cpu.takes(Group::Zero);
        let one = self.ctlr & gicd::CTLR_ENABLE_GRP1 != 0 && cpu.takes(Group::One);
        if !zero && !one {
            return None;
        }
        let mut best: Option<Pending> = None;
        let banks = std::iter::once((&cpu.private, !0)).chain(self.spis.iter().zip(cpu.spis));
        for (base, (bank, own)) in (0..).step_by(32).zip(banks) {
            let groups = if zero { !bank.group } else { 0 } | if one { bank.group } else { 0 };
            if let Some((n, priority)) = bank.best(groups & own)
                && best.is_none_or(|than| priority < than.priority)
            {
                best = Some(Pending { intid: base + n, priority, group: bank.group_of(n) });
            }
        }
        best
    }

    fn refresh_spi(&mut self, intid: u32) {
        if let Some(target) = self.targets[(intid - SPI_BASE) as usize] {
            self.refresh(usize::from(target));
        }
    }

    /// The vCPU that the SPI at `index` goes to.
    fn route(&self, index: usize) -> Option<u8> {
        let router = self.routers[index];
        let target = if router & gicd::IROUTER_IRM != 0 {
            // 1 of N: the first vCPU that takes interrupts of this group, one that is awake if there is.
            let group = self.spis[index / 32].group_of(index as u32 % 32);
            let first = |asleep| {
                self.cpus.iter().position(|cpu| cpu.takes(group) && cpu.processor_sleep == asleep)
            };
            first(false).or_else(|| first(true))?
        } else {
            (0..self.cpus.len()).find(|n| affinity(*n as u32) == router)?
        };
        Some(target as u8)
    }

    fn acknowledge(&mut self, vcpu: usize, group: Group) -> u32 {
        let Some(cpu) = self.cpus.get_mut(vcpu) else { return SPURIOUS };
        let Some(pending) = cpu.pending.filter(|p| p.group == group && cpu.icc.can_signal(p))
        else {
            return SPURIOUS;
        };
        cpu.icc.activate(&pending);
        match spi(pending.intid) {
            None => cpu.private.acknowledge(pending.intid),
            Some((bank, n)) => self.spis[bank].acknowledge(n),
        }
        // An SPI is a candidate on its one target only, so no other vCPU is concerned.
        self.refresh(vcpu);
        pending.intid
    }

    fn highest_of(&self, vcpu: usize, group: Group) -> Option<u32> {
        let pending = self.cpus.get(vcpu)?.pending.filter(|p| p.group == group);
        Some(pending.map_or(SPURIOUS, |p| p.intid))
    }

    fn end_of_interrupt(&mut self, vcpu: usize, value: u64, group: Group) {
        let intid = intid_of(value);
        if intid >= SPECIAL_BASE {
            return;
        }
        let icc = &mut self.cpus[vcpu].icc;
        if !icc.drop_priority(group) {
            return;
        }
        if icc.eoi_mode {
            self.refresh(vcpu);
        } else {
            self.deactivate(vcpu, intid);
        }
    }

    fn deactivate(&mut self, vcpu: usize, intid: u32) {
        match spi(intid) {
            Some((bank, n)) => {
                self.spis[bank].active &= !(1 << n);
                // The interrupt may have been routed elsewhere since it was acknowledged.
                self.refresh_spi(intid);
            }
            None if intid < SPI_BASE => self.cpus[vcpu].private.active &= !(1 << intid),
            None => {}
        }
        self.refresh(vcpu);
    }

    /// ICC_SGI1R_EL1 and its likes (section 12.11): the SGI reaches those targets that have it in `group`.
    fn send_sgi(&mut self, sender: usize, value: u64, group: Group) {
        let intid = (value >> 24 & 0xf) as u32;
        let to_all_others = value >> 40 & 1 != 0;
        let cluster =
            (value >> 48 & 0xff) << 32 | (value >> 32 & 0xff) << 16 | (value >> 16 & 0xff) << 8;
        // Range selector: the target list starts at Aff0 = 16 * RS.
        let first = (value >> 44 & 0xf) << 4;
        for vcpu in 0..self.cpus.len() {
            let here = affinity(vcpu as u32);
            let listed = here & !0xff == cluster
                && (here & 0xff).checked_sub(first).is_some_and(|n| n < 16 && value >> n & 1 != 0);
            let wanted = if to_all_others { vcpu != sender } else { listed };
            let bank = &mut self.cpus[vcpu].private;
            if wanted && bank.group_of(intid) == group {
                bank.latch |= 1 << intid;
                self.refresh(vcpu);
            }
        }
    }
}

impl Cpu {
    /// What the IRQ and FIQ outputs should be.
    fn levels(&self) -> [bool; 2] {
        match self.pending.filter(|p| self.icc.can_signal(p)) {
            None => [false, false],
            Some(Pending { group: Group::One, .. }) => [true, false],
            Some(Pending { group: Group::Zero, .. }) => [false, true],
        }
    }
}

/// Bank and bit of an SPI that exists.
fn spi(intid: u32) -> Option<(usize, u32)> {
    let index = intid.checked_sub(SPI_BASE).filter(|i| (*i as usize) < SPIS)?;
    Some((index as usize / 32, index % 32))
}

/// The INTID field of EOIR and DIR.
fn intid_of(value: u64) -> u32 {
    value as u32 & 0xff_ffff
}
