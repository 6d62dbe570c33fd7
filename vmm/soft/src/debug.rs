//! Self-hosted debug: software step, breakpoints and watchpoints (Arm ARM D2).
//!
//! Costs nothing while it is off. A page that an enabled breakpoint or watchpoint may concern is kept out
//! of the TLB, so that every use of it comes through the slow paths, which look here; the run loop executes
//! such code, and code that is stepped, one instruction at a time.
//!
//! A step's exception is taken together with the stepped instruction, before any interrupt and before a
//! state is saved (Arm ARM D2.11.6 leaves the order open). So its syndrome needs no state of its own.

use std::mem;

use crate::{
    cpu::Cpu,
    mem::Stopped,
    mmu,
    op::Op,
    sys::{DEBUG_PAIRS, OSLSR_OSLK, Sys},
    tlb::Regime,
};

// MDSCR_EL1 fields, Arm ARM D24.3.20.
/// Software step is enabled.
pub(crate) const MDSCR_SS: u64 = 1 << 0;
const MDSCR_TDCC: u64 = 1 << 12;
/// Debug exceptions from EL1 to EL1 are enabled while PSTATE.D is clear.
const MDSCR_KDE: u64 = 1 << 13;
/// Breakpoints and watchpoints are enabled.
pub(crate) const MDSCR_MDE: u64 = 1 << 15;
/// What may always be written.
const MDSCR_WRITABLE: u64 = MDSCR_SS | MDSCR_TDCC | MDSCR_KDE | MDSCR_MDE;
/// What may be written while the OS lock is locked, for saving and restoring an external debugger's state:
/// RXfull, TXfull, RXO, TXU, INTdis, TDA, SC2, HDE, ERR.
const MDSCR_LOCKED: u64 =
    1 << 30 | 1 << 29 | 1 << 27 | 1 << 26 | 3 << 22 | 1 << 21 | 1 << 19 | 1 << 14 | 1 << 6;

/// OSDLR_EL1.DLK: the OS double lock is locked (DBGPRCR_EL1.CORENPDRQ reads as zero).
const OSDLR_DLK: u64 = 1 << 0;

// DBGBCR<n>_EL1 and DBGWCR<n>_EL1 fields, Arm ARM D24.3.2 and D24.3.12.
/// DBGBCR's E, PMC, HMC, SSC, LBN and BT.
const BCR_WRITABLE: u64 = 0x00ff_e007;
/// DBGBCR.BAS, RES1 without AArch32.
const BCR_BAS: u64 = 0xf << 5;
/// DBGWCR's E, PAC, LSC, BAS, HMC, SSC, LBN, WT and MASK.
const WCR_WRITABLE: u64 = 0x1f1f_ffff;
const CONTROL_E: u64 = 1 << 0;
/// HMC and SSC. Without EL2 and EL3 every combination with one of them set is reserved, which behaves as
/// disabled here.
const CONTROL_HMC_SSC: u64 = 7 << 13;
const WCR_LSC_LOAD: u64 = 1 << 3;
const WCR_LSC_STORE: u64 = 1 << 4;
const WCR_WT: u64 = 1 << 20;

// DBGBCR<n>_EL1.BT.
const BT_ADDRESS: u64 = 0b0000;
const BT_LINKED_ADDRESS: u64 = 0b0001;
const BT_CONTEXT: u64 = 0b0010;
const BT_LINKED_CONTEXT: u64 = 0b0011;
/// The context-aware breakpoint, the last one (ID_AA64DFR0_EL1.CTX_CMPs = 0 stands for one).
const CONTEXT_AWARE: usize = DEBUG_PAIRS - 1;

/// What an access does at the watched address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Watched {
    Load,
    Store,
    /// One atomic access that loads and stores.
    Update,
    /// Cache maintenance that counts as a store.
    Invalidate,
}

impl Sys {
    /// Whether debug exceptions, but for BRK's, can be taken from EL0, or from EL1 with PSTATE.D as
    /// `masked` (AArch64.GenerateDebugExceptionsFrom).
    fn debug_exceptions(&self, el1: bool, masked: bool) -> bool {
        let locked = self.oslsr & OSLSR_OSLK != 0 || self.osdlr & OSDLR_DLK != 0;
        !locked && (!el1 || self.mdscr & MDSCR_KDE != 0 && !masked)
    }

    /// MDSCR_EL1 after a write of `value`.
    pub(crate) fn written_mdscr(&self, value: u64) -> u64 {
        let locked = if self.oslsr & OSLSR_OSLK != 0 { MDSCR_LOCKED } else { 0 };
        let writable = MDSCR_WRITABLE | locked;
        self.mdscr & !writable | value & writable
    }

    /// Bits of `va` that address comparisons look at: TCR_EL1.TBI takes out the top byte.
    fn compared(&self, va: u64) -> u64 {
        if mmu::ignores_top_byte(self, va) { mmu::untagged(va) } else { va }
    }

    /// Whether a breakpoint or watchpoint with `control` is enabled for EL1 or EL0 (AArch64.StateMatch). The
    /// fields are at the same place in both registers.
    fn state_matches(&self, control: u64, linked: bool, privileged: bool) -> bool {
        control & CONTROL_E != 0
            && control & CONTROL_HMC_SSC == 0
            && control >> if privileged { 1 } else { 2 } & 1 != 0
            && (!linked || self.linked_context_matches(control >> 16 & 15))
    }

    /// Whether breakpoint `lbn` is a linked context breakpoint that matches now.
    fn linked_context_matches(&self, lbn: u64) -> bool {
        let control = self.dbgbcr[CONTEXT_AWARE];
        lbn == CONTEXT_AWARE as u64
            && control & CONTROL_E != 0
            && breakpoint_type(control) == BT_LINKED_CONTEXT
            && self.context_matches()
    }

    fn context_matches(&self) -> bool {
        self.contextidr as u32 == self.dbgbvr[CONTEXT_AWARE] as u32
    }

    /// Whether a breakpoint matches the instruction at `pc` (AArch64.BreakpointMatch).
    fn breakpoint_matches(&self, pc: u64, el1: bool) -> bool {
        self.dbgbcr.iter().zip(self.dbgbvr).enumerate().any(|(n, (&control, value))| {
            let kind = breakpoint_type(control);
            self.state_matches(control, kind == BT_LINKED_ADDRESS, el1)
                && match kind {
                    BT_ADDRESS | BT_LINKED_ADDRESS => {
                        self.compared(pc) >> 2 == self.compared(value) >> 2
                    }
                    BT_CONTEXT => n == CONTEXT_AWARE && self.context_matches(),
                    _ => false,
                }
        })
    }

    /// Whether the code on the page of `va` is executed one instruction at a time while debug exceptions
    /// are enabled, since a breakpoint may match there.
    pub(crate) fn breaks_on_page(&self, va: u64) -> bool {
        self.mdscr & MDSCR_MDE != 0
            && self.dbgbcr.iter().zip(self.dbgbvr).enumerate().any(|(n, (&control, value))| {
                control & CONTROL_E != 0
                    && match breakpoint_type(control) {
                        BT_ADDRESS | BT_LINKED_ADDRESS => same_block(va, value, 12),
                        BT_CONTEXT => n == CONTEXT_AWARE,
                        _ => false,
                    }
            })
    }

    /// Whether accesses to the page of `va` must be compared with the watchpoints.
    pub(crate) fn watches_page(&self, va: u64) -> bool {
        self.mdscr & MDSCR_MDE != 0
            && self.dbgwcr.iter().zip(self.dbgwvr).any(|(&control, value)| {
                control & CONTROL_E != 0 && same_block(va, value, watch_mask(control).max(12))
            })
    }

    /// The first of the `size` bytes at `va` that a watchpoint watches for such an access, and whether the
    /// syndrome calls it a write.
    fn watchpoint(
        &self,
        va: u64,
        size: u64,
        kind: Watched,
        privileged: bool,
    ) -> Option<(u64, bool)> {
        let kinds = match kind {
            Watched::Load => WCR_LSC_LOAD,
            Watched::Store | Watched::Invalidate => WCR_LSC_STORE,
            Watched::Update => WCR_LSC_LOAD | WCR_LSC_STORE,
        };
        let hits = self.dbgwcr.iter().zip(self.dbgwvr).filter_map(|(&control, value)| {
            let matches = control & kinds != 0
                && self.state_matches(control, control & WCR_WT != 0, privileged);
            let mut bytes = (0..if matches { size } else { 0 }).map(|n| va.wrapping_add(n));
            let at = bytes.find(|at| self.watches_byte(control, value, *at))?;
            // Of an atomic access the load is named if that alone would have matched.
            Some((at, control & kinds & WCR_LSC_LOAD == 0))
        });
        hits.min_by_key(|(at, write)| (at.wrapping_sub(va), *write))
    }

    /// AArch64.WatchpointByteMatch. Where that leaves a choice: reserved masks disable a watchpoint, a mask
    /// makes BAS and the masked bits of the address irrelevant, and gaps in BAS are not watched.
    fn watches_byte(&self, control: u64, value: u64, at: u64) -> bool {
        let bas = control >> 5 & 0xff;
        let (from, selected) = match watch_mask(control) {
            0 if value & 4 != 0 => (2, bas & 0xf & 1 << (at & 3) != 0),
            0 => (3, bas & 1 << (at & 7) != 0),
            1 | 2 => return false,
            mask => (mask, true),
        };
        selected && self.compared(at) >> from == self.compared(value) >> from
    }
}

/// What the TLB's contents depend on.
#[derive(PartialEq, Eq)]
struct Marks([[u64; DEBUG_PAIRS]; 4]);

impl Marks {
    /// `None` while breakpoints and watchpoints are off.
    fn of(sys: &Sys) -> Option<Self> {
        let registers = [sys.dbgbvr, sys.dbgbcr, sys.dbgwvr, sys.dbgwcr];
        (sys.mdscr & MDSCR_MDE != 0).then_some(Self(registers))
    }
}

impl Cpu {
    /// Whether debug exceptions, but for BRK's, can be taken now (AArch64.GenerateDebugExceptions).
    pub(crate) fn debug_exceptions(&self) -> bool {
        self.sys.debug_exceptions(self.pstate.el1(), self.pstate.masks_debug())
    }

    /// Software step is not in its inactive state: with PSTATE.SS it is active-not-pending, and the next
    /// instruction is stepped; without, it is active-pending.
    #[inline]
    pub(crate) fn is_stepping(&self) -> bool {
        self.sys.mdscr & MDSCR_SS != 0 && self.debug_exceptions()
    }

    /// Whether step, breakpoint or watchpoint exceptions may be due.
    #[inline]
    pub(crate) fn is_debugged(&self) -> bool {
        self.sys.mdscr & (MDSCR_SS | MDSCR_MDE) != 0 && self.debug_exceptions()
    }

    /// Whether the next instruction must be executed by itself, through [`step`](Self::step).
    #[inline]
    pub(crate) fn is_by_instruction(&self) -> bool {
        self.is_debugged() && (self.sys.mdscr & MDSCR_SS != 0 || self.sys.breaks_on_page(self.pc))
    }

    /// Whether a breakpoint matches the instruction at `pc`.
    #[inline]
    pub(crate) fn is_breakpoint(&self) -> bool {
        self.sys.mdscr & MDSCR_MDE != 0
            && self.debug_exceptions()
            && self.sys.breakpoint_matches(self.pc, self.pstate.el1())
    }

    /// Executes the first instruction of the block `first`; if it is stepped, to the end of its step.
    ///
    /// # Safety
    ///
    /// `first` is the first op of a live block.
    pub(crate) unsafe fn step(&mut self, first: *const Op) {
        let stepped = self.is_stepping() && self.pstate.ss;
        self.advance = stepped;
        self.stepped_exclusive = false;
        // SAFETY: promised by the caller.
        unsafe { self.step_one(first) };
        if mem::take(&mut self.advance) {
            self.pstate.ss = false;
        }
        if stepped && self.is_stepping() && !self.pstate.ss {
            self.step_due = true;
            // What the instruction asks for from outside comes before its step's exception.
            if self.exit.is_none() {
                self.finish_step();
            }
        }
    }

    /// Takes the exception of a step whose instruction was executed. Called before the next instruction,
    /// interrupt or saving.
    pub(crate) fn finish_step(&mut self) {
        if mem::take(&mut self.step_due) {
            self.take_step(Some(self.stepped_exclusive));
        }
    }

    /// Takes a step's due exception back: its instruction turned out not to exist.
    pub(crate) fn undo_step(&mut self) {
        if mem::take(&mut self.step_due) {
            self.pstate.ss = true;
        }
    }

    /// Takes a watchpoint exception at `op` if its access to the `size` bytes at `va` is watched. Called
    /// once the translation of `va` is known to be allowed, which has precedence.
    #[inline]
    pub(crate) fn watch(
        &mut self,
        regime: Regime,
        op: &Op,
        va: u64,
        size: u64,
        kind: Watched,
    ) -> Result<(), Stopped> {
        if self.sys.mdscr & MDSCR_MDE == 0 || !self.debug_exceptions() {
            return Ok(());
        }
        match self.sys.watchpoint(va, size, kind, regime != Regime::El0) {
            None => Ok(()),
            Some((at, write)) => {
                self.leave_at(op);
                self.take_watchpoint(at, write, kind == Watched::Invalidate);
                Err(Stopped)
            }
        }
    }

    /// MSR to one of the debug registers, by `op`. `None` if there is no such register.
    pub(crate) fn write_debug(
        &mut self,
        op: &Op,
        reg: crate::SysReg,
        value: u64,
    ) -> Option<*const Op> {
        let before = Marks::of(&self.sys);
        if !self.sys.write_plain(reg, value) {
            return None;
        }
        if before != Marks::of(&self.sys) {
            self.tlb.forget_all();
            self.refresh_space();
        }
        // The next instruction may have to be stepped.
        Some(self.leave_after(op))
    }
}

/// DBGBCR<n>_EL1 as written.
pub(crate) fn written_bcr(value: u64) -> u64 {
    value & BCR_WRITABLE | BCR_BAS
}

/// DBGWCR<n>_EL1 as written.
pub(crate) fn written_wcr(value: u64) -> u64 {
    value & WCR_WRITABLE
}

fn breakpoint_type(control: u64) -> u64 {
    control >> 20 & 15
}

/// DBGWCR<n>_EL1.MASK: bits of the address that are not compared.
fn watch_mask(control: u64) -> u32 {
    (control >> 24 & 31) as u32
}

/// Whether the addresses agree above their low `bits` bits, whatever their tags.
fn same_block(a: u64, b: u64, bits: u32) -> bool {
    (a ^ b) << 8 >> 8 >> bits == 0
}
