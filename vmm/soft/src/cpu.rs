//! One vCPU: its registers and the loop that runs it.

use std::{
    ptr,
    sync::{Arc, atomic::Ordering},
};

use crate::{
    Exit, Signals,
    code::{CodeCache, PageCode},
    exception::Pstate,
    exec::branch::leave_block,
    mem::Pending,
    mmu::{self, Access, FSC_EXTERNAL, Fault},
    op::Op,
    regs::{Regs, SP},
    shared::{Peer, Place, Shared},
    signals::{FIQ, IRQ, KICK, MAINTENANCE},
    sys::Sys,
    timer::TimerLines,
    tlb::{Regime, Tlb},
};

/// Instructions between two looks at the host's clock.
const SLICE: i64 = 8192;

/// One AArch64 vCPU. Used by one thread at a time.
pub struct Cpu {
    pub(crate) r: Regs,
    /// Instructions left in the slice; a block is paid for as a whole when it is entered.
    pub(crate) budget: i64,
    /// Virtual address of the block that executes.
    pub(crate) block_va: u64,
    pub(crate) regime: Regime,
    /// Bits of [`Signals`] that end a block.
    pub(crate) attention: u32,
    /// CPACR_EL1 traps FP and SIMD at the present exception level.
    pub(crate) fp_trap: bool,
    /// Set by an instruction that the run loop must return for.
    pub(crate) exit: Option<Exit>,
    /// Address of the next instruction while no block executes.
    pub(crate) pc: u64,
    pub(crate) tlb: Tlb,
    pub(crate) peer: Arc<Peer>,
    pub(crate) signals: Arc<Signals>,
    pub(crate) pstate: Pstate,
    /// The stack pointers of the modes that are not in use, and a stale copy of the one that is.
    pub(crate) sp_el: [u64; 2],
    pub(crate) sys: Sys,
    pub(crate) exclusive: Option<Exclusive>,
    /// In WFI, until an interrupt line is high.
    pub(crate) waiting: bool,
    pub(crate) lines: TimerLines,
    pub(crate) pending: Option<Pending>,
    /// The instruction that is stepped has neither taken an exception nor returned from one so far.
    pub(crate) advance: bool,
    /// The instruction that was stepped last was a load-exclusive.
    pub(crate) stepped_exclusive: bool,
    /// The exception of a step waits for an exit of its instruction.
    pub(crate) step_due: bool,
    /// A TLBI or IC was sent to peers and no DSB has waited for it yet.
    pub(crate) unsettled: bool,
    /// A TTBR was written and nothing has synchronised the context since.
    pub(crate) space_changed: bool,
    pub(crate) shared: Arc<Shared>,
    pub(crate) code: CodeCache,
    pub(crate) mpidr: u64,
    pub(crate) deterministic: bool,
    /// Instructions retired when the slice began.
    retired_base: u64,
    /// Budget when the slice began.
    slice: i64,
    /// Counter minus retired instructions, of a deterministic machine.
    pub(crate) skipped: u64,
    /// One op out of block, for stepping up to an exact count.
    step: Box<[Op; 2]>,
}

// SAFETY: the raw pointers inside lead to what the Cpu itself owns (decoded code, through its TLB)
// or to guest RAM, which `Shared` keeps alive and which any thread may access.
unsafe impl Send for Cpu {}

/// The exclusive monitor: what the last load-exclusive saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Exclusive {
    pub(crate) address: u64,
    pub(crate) size: u8,
    pub(crate) value: u128,
}

impl Cpu {
    /// A vCPU of `shared` out of reset, with `mpidr` as MPIDR_EL1. It does nothing useful before
    /// [`start`](Self::start) or [`set_state`](Self::set_state).
    pub fn new(shared: &Arc<Shared>, mpidr: u64) -> Self {
        let peer = Arc::new(Peer::default());
        shared.peers.write().unwrap_or_else(|poison| poison.into_inner()).push(Arc::clone(&peer));
        let mut cpu = Self {
            r: Regs::new(),
            budget: 0,
            block_va: 0,
            regime: Regime::El1,
            attention: 0,
            fp_trap: true,
            exit: None,
            pc: 0,
            tlb: Tlb::new(),
            signals: Arc::clone(&peer.signals),
            peer,
            pstate: Pstate::reset(),
            sp_el: [0; 2],
            sys: Sys::new(),
            exclusive: None,
            waiting: false,
            lines: TimerLines::default(),
            pending: None,
            advance: false,
            stepped_exclusive: false,
            step_due: false,
            unsettled: false,
            space_changed: false,
            shared: Arc::clone(shared),
            code: CodeCache::new(&shared.ram),
            mpidr,
            deterministic: shared.counter.is_deterministic(),
            retired_base: 0,
            slice: 0,
            skipped: 0,
            step: Box::new([Op::new(leave_block); 2]),
        };
        cpu.refresh();
        cpu.refresh_space();
        cpu
    }

    /// Resets the registers and lets the vCPU begin at `pc` in EL1h with the MMU off and interrupts
    /// masked; x0 is `x0`. Boot and PSCI CPU_ON.
    pub fn start(&mut self, pc: u64, x0: u64) {
        self.r = Regs::new();
        self.r.x[0] = x0;
        self.pc = pc;
        self.pstate = Pstate::reset();
        self.sp_el = [0; 2];
        self.sys = Sys::new();
        self.exclusive = None;
        self.waiting = false;
        self.pending = None;
        self.step_due = false;
        self.exit = None;
        self.tlb.forget_all();
        self.refresh();
        self.refresh_space();
    }

    /// The lines into this vCPU.
    pub fn signals(&self) -> Arc<Signals> {
        Arc::clone(&self.signals)
    }

    /// Xn, n below 31.
    pub fn x(&self, n: u32) -> u64 {
        self.r.x(n)
    }

    /// Sets Xn, n below 31.
    pub fn set_x(&mut self, n: u32, value: u64) {
        self.r.set_x(n, value);
    }

    /// Address of the next instruction.
    pub fn pc(&self) -> u64 {
        self.pc
    }

    /// Instructions retired since the first start, kept over a snapshot. An exception that no
    /// instruction asked for (an interrupt, an abort) counts as one.
    pub fn retired(&self) -> u64 {
        // A saved count may be any: it wraps.
        self.retired_base.wrapping_add((self.slice - self.budget) as u64)
    }

    pub(crate) fn set_retired(&mut self, retired: u64) {
        (self.retired_base, self.slice, self.budget) = (retired, 0, 0);
    }

    /// Runs until something is needed from outside. With `limit`, also until
    /// [`retired`](Self::retired) is exactly `limit` (only on a deterministic counter); an
    /// instruction that causes an exit is retired.
    pub fn run(&mut self, limit: Option<u64>) -> Exit {
        self.peer.in_guest.store(true, Ordering::SeqCst);
        self.finish_step();
        // What is due may have changed since the last run.
        self.end_slice();
        let exit = self.run_inside(limit);
        self.publish_time();
        self.peer.in_guest.store(false, Ordering::SeqCst);
        exit
    }

    /// Lets idle time pass at once: sets a deterministic counter to `ticks` if that is ahead.
    pub fn skip_to(&mut self, ticks: u64) {
        let now = self.retired().wrapping_add(self.skipped);
        if ticks > now {
            self.skipped = self.skipped.wrapping_add(ticks - now);
            self.publish_time();
        }
    }

    fn run_inside(&mut self, limit: Option<u64>) -> Exit {
        // A state from outside may have a tag there.
        self.branch_to(self.pc);
        loop {
            if let Some(exit) = self.service(limit) {
                return exit;
            }
            // An interrupt has used up the last of the slice.
            if self.budget <= 0 {
                continue;
            }
            let by_instruction = self.is_by_instruction();
            if by_instruction && self.is_stepping() && !self.pstate.ss {
                self.take_step(None);
                continue;
            }
            let Some(first) = self.find_block() else {
                match self.exit.take() {
                    Some(exit) => return exit,
                    None => continue,
                }
            };
            // SAFETY: `first` is a live block of `self.code`, which is not swept before the block is
            // left; every op leads to another live op or to null.
            unsafe {
                if by_instruction {
                    self.step(first);
                } else if i64::from((*first).rem) < self.budget {
                    let mut op = self.enter(first, self.pc);
                    while !op.is_null() {
                        op = ((*op).exec)(self, op);
                    }
                } else if self.deterministic {
                    self.step_one(first);
                } else {
                    self.end_slice();
                }
            }
            if let Some(exit) = self.exit.take() {
                return exit;
            }
        }
    }

    /// Looks after everything that is not an instruction, with no block executing.
    fn service(&mut self, limit: Option<u64>) -> Option<Exit> {
        let bits = self.signals.bits();
        if bits & (KICK | MAINTENANCE) != 0 || self.peer.is_asked() {
            self.signals.take(MAINTENANCE);
            self.maintain();
            if self.signals.take(KICK) {
                return Some(Exit::Kicked);
            }
        }
        if self.code.sweep() {
            self.tlb.forget_all();
            self.refresh_space();
        }
        if self.space_changed {
            self.refresh_space();
        }
        if self.budget <= 0 || self.waiting {
            let now = self.ticks_between_blocks();
            let lines = self.timer_lines(now);
            if lines != self.lines {
                self.lines = lines;
                self.new_slice(limit);
                return Some(Exit::TimerLines { virt: lines.virt, phys: lines.phys });
            }
            if limit.is_some_and(|limit| self.retired() >= limit) && !self.waiting {
                return Some(Exit::Limit);
            }
            self.new_slice(limit);
        }
        let lines = self.signals.bits();
        if self.waiting {
            if lines & (IRQ | FIQ) == 0 {
                return Some(Exit::Wfi);
            }
            self.waiting = false;
        }
        if lines & FIQ != 0 && !self.pstate.masks_fiq() {
            self.take_fiq();
        } else if lines & IRQ != 0 && !self.pstate.masks_irq() {
            self.take_irq();
        }
        None
    }

    /// Begins a slice that ends where something is due.
    fn new_slice(&mut self, limit: Option<u64>) {
        self.retired_base = self.retired();
        self.slice = SLICE;
        if self.deterministic {
            self.slice = i64::MAX >> 1;
            let now = self.retired_base.wrapping_add(self.skipped);
            let until_timer = self.next_line_change(now).map(|at| at - now);
            let until_limit = limit.map(|limit| limit.saturating_sub(self.retired_base));
            for ticks in [until_timer, until_limit].into_iter().flatten() {
                self.slice = self.slice.min(ticks.min(i64::MAX as u64 >> 1) as i64);
            }
        }
        self.budget = self.slice;
    }

    /// Ends the slice, so that timers are looked at before the next instruction.
    pub(crate) fn end_slice(&mut self) {
        self.retired_base = self.retired();
        (self.slice, self.budget) = (0, 0);
    }

    /// Executes exactly one instruction, of a block that is longer than what is left of the slice.
    ///
    /// # Safety
    ///
    /// `first` is the first op of a live block.
    pub(crate) unsafe fn step_one(&mut self, first: *const Op) {
        // SAFETY: promised by the caller.
        let mut op = unsafe { *first };
        op.rem = 0;
        self.step[0] = op;
        // Leads on to the instruction behind, and is not itself one.
        self.step[1] = Op::new(leave_block);
        self.step[1].idx = 1;
        let op: *const Op = self.step.as_ptr();
        self.block_va = self.pc;
        self.budget -= 1;
        // SAFETY: the two ops are a block of one instruction, and `self.step` stays where it is.
        unsafe {
            let mut next = ((*op).exec)(self, op);
            if next == op.add(1) {
                next = ((*next).exec)(self, next);
            }
            if !next.is_null() {
                // It went on into another block, which may be short enough for what is left: code that
                // has changed is decoded anew where it is entered first. Give back what that has taken.
                self.leave_entered(next);
            }
        }
    }

    /// Undoes [`enter`](Self::enter).
    ///
    /// # Safety
    ///
    /// `first` is the block that was entered last, and no instruction of it was executed.
    unsafe fn leave_entered(&mut self, first: *const Op) {
        // SAFETY: promised by the caller.
        self.budget += i64::from(unsafe { (*first).rem }) + 1;
        self.pc = self.block_va;
    }

    /// Goes into the block `first`, which lies at `va`; null if the slice is over or someone wants
    /// attention.
    ///
    /// # Safety
    ///
    /// `first` is the first op of a live block.
    #[inline(always)]
    pub(crate) unsafe fn enter(&mut self, first: *const Op, va: u64) -> *const Op {
        // SAFETY: promised by the caller.
        let left = self.budget - i64::from(unsafe { (*first).rem }) - 1;
        if left < 0 || self.signals.bits() & self.attention != 0 {
            self.pc = va;
            return ptr::null();
        }
        self.budget = left;
        self.block_va = va;
        first
    }

    /// Goes on at `va`: into its block if that is decoded, else through the run loop.
    ///
    /// # Safety
    ///
    /// Called by an op that is the last to execute in its block and has given back the budget of
    /// the ops behind it.
    #[inline(always)]
    pub(crate) unsafe fn jump(&mut self, va: u64) -> *const Op {
        let entry = self.tlb.code(self.pstate.el1(), va);
        let tag = va & !0xffc | self.tlb.generations[(va >> 63) as usize];
        if entry.tag == tag {
            // SAFETY: a matching entry points to a live record.
            let first = unsafe { (*entry.code).blocks[(va >> 2) as usize & 1023] };
            if !first.is_null() {
                // SAFETY: blocks in a record are live.
                return unsafe { self.enter(first, va) };
            }
        }
        // A tagged address matches no entry.
        self.branch_to(va);
        ptr::null()
    }

    /// Sets `pc` to the target of a branch: where TCR_EL1 says that the top byte is ignored, the PC does
    /// not get it (Arm ARM, AArch64.BranchAddr). The PC and all that is made of it, ELR and FAR, the link
    /// register, cached translations, so have no tags.
    pub(crate) fn branch_to(&mut self, va: u64) {
        self.pc = if mmu::ignores_top_byte(&self.sys, va) { mmu::untagged(va) } else { va };
    }

    /// The block at `pc`, decoded if need be; `None` if an exception was taken or an exit is set instead.
    fn find_block(&mut self) -> Option<*const Op> {
        let pc = self.pc;
        if pc & 3 != 0 {
            self.take_pc_alignment();
            return None;
        }
        let el1 = self.pstate.el1();
        let entry = self.tlb.code(el1, pc);
        let code =
            if entry.tag == self.tlb.tag(pc) { entry.code } else { self.fill_code(el1, pc)? };
        if self.is_breakpoint() {
            self.take_breakpoint();
            return None;
        }
        if self.pstate.il {
            self.take_illegal_state();
            return None;
        }
        let offset = (pc & 0xfff) as usize;
        // SAFETY: records live as long as the code cache, and nothing else refers to this one now.
        let record = unsafe { &mut *code };
        let first = record.blocks[offset / 4];
        if !first.is_null() {
            return Some(first);
        }
        // Marked before the bytes are read, so that a peer's IC that comes in between is not missed.
        self.shared.has_code[record.index].store(1, Ordering::SeqCst);
        Some(self.code.decode(record, offset))
    }

    /// Translates `pc` for execution and remembers where its page's code is kept; `None` if an
    /// exception was taken or an exit is set instead.
    fn fill_code(&mut self, el1: bool, pc: u64) -> Option<*mut PageCode> {
        let translation = match self.translate(pc, Access::Execute, self.regime) {
            Ok(translation) => translation,
            Err(Fault::Abort(fsc)) => {
                self.take_instruction_abort(pc, fsc);
                return None;
            }
            Err(Fault::Withheld(address)) => {
                self.exit = Some(Exit::Memory { address, write: false });
                return None;
            }
        };
        let page = translation.pa & !0xfff;
        let host = match self.shared.ram.place(page, 0x1000, false) {
            Place::Ram(host) => host,
            Place::Withheld => {
                self.exit = Some(Exit::Memory { address: translation.pa, write: false });
                return None;
            }
            Place::Elsewhere => {
                self.take_instruction_abort(pc, FSC_EXTERNAL);
                return None;
            }
        };
        let code = self.code.page(self.shared.ram.page_index(page), host);
        if !self.sys.breaks_on_page(pc) {
            self.tlb.fill_code(el1, pc, code, &translation);
        }
        Some(code)
    }

    /// Recomputes what follows from PSTATE and the system registers.
    pub(crate) fn refresh(&mut self) {
        self.regime = match (self.pstate.el1(), self.pstate.pan) {
            (false, _) => Regime::El0,
            (true, false) => Regime::El1,
            (true, true) => Regime::El1Pan,
        };
        self.refresh_attention();
        // CPACR_EL1.FPEN: 01 traps EL0, x0 traps both.
        self.fp_trap = match self.sys.cpacr >> 20 & 3 {
            3 => false,
            1 => !self.pstate.el1(),
            _ => true,
        };
    }

    /// Recomputes which signals end a block.
    #[inline]
    pub(crate) fn refresh_attention(&mut self) {
        self.attention = KICK | MAINTENANCE;
        if !self.pstate.masks_irq() {
            self.attention |= IRQ;
        }
        if !self.pstate.masks_fiq() {
            self.attention |= FIQ;
        }
    }

    /// Takes note that TTBR0_EL1, TTBR1_EL1 or TCR_EL1 may name another address space.
    pub(crate) fn refresh_space(&mut self) {
        self.space_changed = false;
        let asid = self.asid();
        // The ASID counts apart, and CnP says nothing here.
        let table = |ttbr: u64| ttbr & mmu::TTBR_BADDR;
        self.tlb.switch_space(table(self.sys.ttbr0), table(self.sys.ttbr1), asid);
    }

    /// The ASID in use: TCR_EL1.A1 says which TTBR holds it, TCR_EL1.AS how many bits count.
    pub(crate) fn asid(&self) -> u16 {
        let ttbr = if self.sys.tcr >> 22 & 1 != 0 { self.sys.ttbr1 } else { self.sys.ttbr0 };
        (ttbr >> 48) as u16 & self.asid_bits()
    }

    /// The bits of an ASID that count: 8, or with TCR_EL1.AS 16.
    pub(crate) fn asid_bits(&self) -> u16 {
        if self.sys.tcr >> 36 & 1 != 0 { 0xffff } else { 0xff }
    }

    /// Address of `op`.
    #[inline(always)]
    pub(crate) fn pc_of(&self, op: &Op) -> u64 {
        self.block_va + 4 * u64::from(op.idx)
    }

    /// Leaves the block behind `op`, which is retired: the run loop goes on at the next instruction.
    #[inline]
    pub(crate) fn leave_after(&mut self, op: &Op) -> *const Op {
        self.budget += i64::from(op.rem);
        self.pc = self.pc_of(op).wrapping_add(4);
        ptr::null()
    }

    /// Leaves the block at `op`, which takes an exception; `pc` is set to its address. It counts as
    /// retired all the same, so that a guest that does nothing but fault still uses up its time.
    #[inline]
    pub(crate) fn leave_at(&mut self, op: &Op) {
        self.budget += i64::from(op.rem);
        self.pc = self.pc_of(op);
    }

    /// Leaves the block behind `op` to return `exit`.
    pub(crate) fn leave_with(&mut self, op: &Op, exit: Exit) -> *const Op {
        self.exit = Some(exit);
        self.leave_after(op)
    }

    /// The stack pointer in use goes to its bank.
    pub(crate) fn bank_sp(&mut self) {
        self.sp_el[self.pstate.sp_bank()] = self.r.x[SP as usize];
    }

    /// The stack pointer of the mode that is now in use comes from its bank.
    pub(crate) fn unbank_sp(&mut self) {
        self.r.x[SP as usize] = self.sp_el[self.pstate.sp_bank()];
    }
}
