//! The saved form of the GIC: architectural registers and the levels of its inputs, from which any
//! GICv3 with the same interrupts and vCPUs can go on.

use serde::{Deserialize, Serialize};
use squib_formats::{
    first_version,
    persist::{Persist, PersistError, Section, Versioned},
};

use super::{
    Gic,
    bank::Bank,
    core::{Core, Cpu, SGI_MASK, SPI_BANKS, SPIS},
    icc::{Icc, MAX_BPR, MIN_BPR0, MIN_BPR1},
    spec::{PRIORITY_MASK, gicd},
};

const KIND: &str = "gicv3";

/// The whole GIC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GicState {
    /// GICD_CTLR: EnableGrp0 and EnableGrp1.
    pub ctlr: u32,
    /// SPIs, 32 a bank, from INTID 32 on.
    pub spis: Vec<BankState>,
    /// GICD_IROUTER of every SPI, from INTID 32 on.
    pub routers: Vec<u64>,
    /// Redistributors and CPU interfaces by vCPU.
    pub cpus: Vec<CpuState>,
}

/// 32 interrupts, bit n or element n for each.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BankState {
    /// IGROUPR.
    pub group: u32,
    /// ISENABLER.
    pub enabled: u32,
    /// Pending by an edge, by software, or as an SGI; without what a high level makes pending.
    pub pending_latch: u32,
    /// ISACTIVER.
    pub active: u32,
    /// Levels of the input lines.
    pub line: u32,
    /// ICFGR: set for edge-triggered.
    pub edge: u32,
    /// IPRIORITYR.
    pub priority: [u8; 32],
}

/// One redistributor and its CPU interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuState {
    /// GICR_WAKER.ProcessorSleep, which holds nothing back.
    pub processor_sleep: bool,
    /// SGIs and PPIs.
    pub private: BankState,
    /// The CPU interface.
    pub icc: IccState,
}

/// The system registers of a CPU interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IccState {
    /// ICC_PMR_EL1.
    pub pmr: u8,
    /// ICC_BPR0_EL1.
    pub bpr0: u8,
    /// ICC_BPR1_EL1, as it is while CBPR is clear.
    pub bpr1: u8,
    /// ICC_CTLR_EL1.CBPR.
    pub cbpr: bool,
    /// ICC_CTLR_EL1.EOImode.
    pub eoi_mode: bool,
    /// ICC_IGRPEN0_EL1.
    pub igrpen0: bool,
    /// ICC_IGRPEN1_EL1.
    pub igrpen1: bool,
    /// ICC_AP0R0_EL1.
    pub ap0r0: u32,
    /// ICC_AP1R0_EL1.
    pub ap1r0: u32,
}

first_version!(GicState, "gicv3");

impl Persist for Gic {
    type State = GicState;

    fn save(&self) -> Result<GicState, PersistError> {
        Ok(Gic::save(self))
    }

    fn restore(&mut self, state: GicState) -> Result<(), PersistError> {
        Gic::restore(self, state)
    }
}

/// Decodes a GIC's section.
pub(super) fn decode(section: &Section) -> Result<GicState, PersistError> {
    if section.kind != GicState::KIND {
        return Err(invalid("kind", format!("the section holds a `{}`", section.kind)));
    }
    section.decode()
}

impl Core {
    pub(super) fn save(&self) -> GicState {
        // `targets` follows from routers, groups and interfaces; the outputs are glue.
        let Self { outputs: _, ctlr, spis, routers, cpus, targets: _ } = self;
        GicState {
            ctlr: *ctlr,
            spis: spis.iter().map(Bank::save).collect(),
            routers: routers.to_vec(),
            cpus: cpus.iter().map(Cpu::save).collect(),
        }
    }

    pub(super) fn restore(&mut self, state: GicState) -> Result<(), PersistError> {
        let GicState { ctlr, spis, routers, cpus } = state;
        if ctlr & !gicd::CTLR_WRITABLE != 0 {
            return Err(invalid("ctlr", format!("{ctlr:#x} sets more than EnableGrp0 and 1")));
        }
        if spis.len() != SPI_BANKS {
            let why = format!("{} banks of SPIs, there are {SPI_BANKS}", spis.len());
            return Err(invalid("spis", why));
        }
        let routers: [u64; SPIS] = routers.try_into().map_err(|found: Vec<u64>| {
            invalid("routers", format!("{} routers, there are {SPIS} SPIs", found.len()))
        })?;
        if let Some(router) = routers.iter().find(|router| **router & !gicd::IROUTER_MASK != 0) {
            return Err(invalid("routers", format!("{router:#x} sets reserved bits")));
        }
        if cpus.len() != self.cpus.len() {
            let why = format!("{} vCPUs, this machine has {}", cpus.len(), self.cpus.len());
            return Err(invalid("cpus", why));
        }
        let spis = spis.into_iter().map(Bank::load).collect::<Result<Vec<_>, _>>()?;
        let cpus = cpus.into_iter().map(Cpu::load).collect::<Result<Vec<_>, _>>()?;

        self.ctlr = ctlr;
        for (bank, restored) in self.spis.iter_mut().zip(spis) {
            *bank = restored;
        }
        self.routers = routers;
        self.cpus = cpus;
        self.reroute();
        // The receivers may hold levels of their own: `reroute` drove only those that differ from low.
        for (vcpu, cpu) in (0..).zip(&self.cpus) {
            self.outputs.set_irq(vcpu, cpu.lines[0]);
            self.outputs.set_fiq(vcpu, cpu.lines[1]);
        }
        Ok(())
    }
}

impl Cpu {
    fn save(&self) -> CpuState {
        let Self { processor_sleep, private, icc, spis: _, pending: _, lines: _ } = self;
        CpuState { processor_sleep: *processor_sleep, private: private.save(), icc: icc.save() }
    }

    fn load(state: CpuState) -> Result<Self, PersistError> {
        let CpuState { processor_sleep, private, icc } = state;
        if private.edge & SGI_MASK != SGI_MASK {
            let why = format!("{:#x}: SGIs are edge-triggered", private.edge);
            return Err(invalid("cpus.private.edge", why));
        }
        if private.line & SGI_MASK != 0 {
            let why = format!("{:#x}: SGIs have no input lines", private.line);
            return Err(invalid("cpus.private.line", why));
        }
        let (private, icc) = (Bank::load(private)?, Icc::load(icc)?);
        Ok(Self { processor_sleep, private, icc, ..Self::new() })
    }
}

impl Bank {
    fn save(&self) -> BankState {
        let Self { group, enabled, latch, active, line, edge, priority } = self;
        BankState {
            group: *group,
            enabled: *enabled,
            pending_latch: *latch,
            active: *active,
            line: *line,
            edge: *edge,
            priority: *priority,
        }
    }

    fn load(state: BankState) -> Result<Self, PersistError> {
        let BankState { group, enabled, pending_latch: latch, active, line, edge, priority } =
            state;
        if let Some(found) = priority.iter().find(|priority| **priority & !PRIORITY_MASK != 0) {
            let why = format!("{found:#x} has bits outside the implemented {PRIORITY_MASK:#x}");
            return Err(invalid("priority", why));
        }
        Ok(Self { group, enabled, latch, active, line, edge, priority })
    }
}

impl Icc {
    fn save(&self) -> IccState {
        let Self { pmr, bpr0, bpr1, common_bpr, eoi_mode, group_enabled, active_priorities } = self;
        IccState {
            pmr: *pmr,
            bpr0: *bpr0,
            bpr1: *bpr1,
            cbpr: *common_bpr,
            eoi_mode: *eoi_mode,
            igrpen0: group_enabled[0],
            igrpen1: group_enabled[1],
            ap0r0: active_priorities[0],
            ap1r0: active_priorities[1],
        }
    }

    fn load(state: IccState) -> Result<Self, PersistError> {
        let IccState { pmr, bpr0, bpr1, cbpr, eoi_mode, igrpen0, igrpen1, ap0r0, ap1r0 } = state;
        if pmr & !PRIORITY_MASK != 0 {
            let why = format!("{pmr:#x} has bits outside the implemented {PRIORITY_MASK:#x}");
            return Err(invalid("cpus.icc.pmr", why));
        }
        if !(MIN_BPR0..=MAX_BPR).contains(&bpr0) {
            let why = format!("{bpr0} is not in {MIN_BPR0} to {MAX_BPR}");
            return Err(invalid("cpus.icc.bpr0", why));
        }
        if !(MIN_BPR1..=MAX_BPR).contains(&bpr1) {
            let why = format!("{bpr1} is not in {MIN_BPR1} to {MAX_BPR}");
            return Err(invalid("cpus.icc.bpr1", why));
        }
        Ok(Self {
            pmr,
            bpr0,
            bpr1,
            common_bpr: cbpr,
            eoi_mode,
            group_enabled: [igrpen0, igrpen1],
            active_priorities: [ap0r0, ap1r0],
        })
    }
}

fn invalid(field: &'static str, why: String) -> PersistError {
    PersistError::invalid(KIND, field, why)
}
