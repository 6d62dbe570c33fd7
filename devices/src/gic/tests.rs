use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use proptest::prelude::*;

use super::{reg::*, *};
use crate::{
    irq::IrqLine,
    map::{CNTV_INTID, GICR_STRIDE},
};

/// Remembers the levels, and counts calls that change nothing.
#[derive(Default)]
struct Lines {
    irq: AtomicU64,
    fiq: AtomicU64,
    idle_calls: AtomicU64,
}

impl Lines {
    fn drive(&self, line: &AtomicU64, vcpu: u32, level: bool) {
        let bit = 1 << vcpu;
        let before = match level {
            true => line.fetch_or(bit, Ordering::Relaxed),
            false => line.fetch_and(!bit, Ordering::Relaxed),
        };
        if (before & bit != 0) == level {
            self.idle_calls.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl CpuOutputs for Lines {
    fn set_irq(&self, vcpu: u32, level: bool) {
        self.drive(&self.irq, vcpu, level);
    }

    fn set_fiq(&self, vcpu: u32, level: bool) {
        self.drive(&self.fiq, vcpu, level);
    }
}

struct Machine {
    gic: Arc<Gic>,
    gicd: GicDistributor,
    gicr: GicRedistributors,
    lines: Arc<Lines>,
}

const SPI: u32 = 40;
const GICD_CTLR: u64 = 0;
const GICD_IROUTER: u64 = 0x6000;

impl Machine {
    /// A machine fresh from reset.
    fn cold(vcpus: u32) -> Self {
        let lines = Arc::new(Lines::default());
        let gic = Gic::new(vcpus, lines.clone());
        let (gicd, gicr) = (GicDistributor(gic.clone()), GicRedistributors(gic.clone()));
        Self { gic, gicd, gicr, lines }
    }

    /// All interrupts enabled, in Group 1 at priority 0xa0, and all interfaces open.
    fn new(vcpus: u32) -> Self {
        let m = Self::cold(vcpus);
        m.gicd.mmio_write(GICD_CTLR, 4, 3);
        for bank in 1..4 {
            m.gicd.mmio_write(0x80 + 4 * bank, 4, 0xffff_ffff);
            m.gicd.mmio_write(0x100 + 4 * bank, 4, 0xffff_ffff);
        }
        for intid in 32..128 {
            m.set_priority(0, intid, 0xa0);
        }
        for vcpu in 0..vcpus {
            m.gicr_write(vcpu, 0x1_0080, 0xffff_ffff);
            m.gicr_write(vcpu, 0x1_0100, 0xffff_ffff);
            for intid in 0..32 {
                m.set_priority(vcpu, intid, 0xa0);
            }
            m.write(vcpu, ICC_PMR_EL1, 0xf0);
            m.write(vcpu, ICC_IGRPEN0_EL1, 1);
            m.write(vcpu, ICC_IGRPEN1_EL1, 1);
        }
        m
    }

    fn gicr_write(&self, vcpu: u32, offset: u64, value: u64) {
        self.gicr.mmio_write(u64::from(vcpu) * GICR_STRIDE + offset, 4, value);
    }

    fn gicr_read(&self, vcpu: u32, offset: u64) -> u64 {
        self.gicr.mmio_read(u64::from(vcpu) * GICR_STRIDE + offset, 4)
    }

    fn set_priority(&self, vcpu: u32, intid: u32, priority: u8) {
        let offset = 0x400 + u64::from(intid);
        match intid {
            0..32 => {
                let frame = u64::from(vcpu) * GICR_STRIDE + 0x1_0000;
                self.gicr.mmio_write(frame + offset, 1, priority.into());
            }
            _ => self.gicd.mmio_write(offset, 1, priority.into()),
        }
    }

    fn set_edge(&self, intid: u32) {
        let register = 0xc00 + 4 * u64::from(intid / 16);
        let old = self.gicd.mmio_read(register, 4);
        self.gicd.mmio_write(register, 4, old | 2 << (2 * (intid % 16)));
    }

    fn set_group_0(&self, intid: u32) {
        let register = 0x80 + 4 * u64::from(intid / 32);
        let old = self.gicd.mmio_read(register, 4);
        self.gicd.mmio_write(register, 4, old & !(1 << (intid % 32)));
    }

    fn route(&self, intid: u32, router: u64) {
        self.gicd.mmio_write(GICD_IROUTER + 8 * u64::from(intid), 8, router);
    }

    fn pending(&self, intid: u32) -> bool {
        let word = self.gicd.mmio_read(0x200 + 4 * u64::from(intid / 32), 4);
        word >> (intid % 32) & 1 == 1
    }

    fn active(&self, intid: u32) -> bool {
        let word = self.gicd.mmio_read(0x300 + 4 * u64::from(intid / 32), 4);
        word >> (intid % 32) & 1 == 1
    }

    fn read(&self, vcpu: u32, reg: u16) -> u64 {
        self.gic.icc_read(vcpu, reg).unwrap()
    }

    fn write(&self, vcpu: u32, reg: u16, value: u64) {
        assert!(self.gic.icc_write(vcpu, reg, value));
    }

    fn ack(&self, vcpu: u32) -> u32 {
        self.read(vcpu, ICC_IAR1_EL1) as u32
    }

    fn eoi(&self, vcpu: u32, intid: u32) {
        self.write(vcpu, ICC_EOIR1_EL1, intid.into());
    }

    /// Which vCPUs have IRQ high, a bit each.
    fn irq(&self) -> u64 {
        self.lines.irq.load(Ordering::Relaxed)
    }

    fn fiq(&self) -> u64 {
        self.lines.fiq.load(Ordering::Relaxed)
    }
}

#[test]
fn nothing_is_signalled_after_reset() {
    let m = Machine::cold(1);
    m.gic.set_spi(SPI, true);
    assert_eq!(m.irq() | m.fiq(), 0);
    assert_eq!(m.ack(0), 1023);
    assert_eq!(m.read(0, ICC_HPPIR1_EL1), 1023);
    assert_eq!(m.read(0, ICC_RPR_EL1), 0xff);
    assert_eq!(m.gicr_read(0, 0x14), 0, "the redistributor starts awake");
    assert_eq!(m.gicd.mmio_read(GICD_CTLR, 4), 0x50, "ARE and DS are always set");
}

#[test]
fn a_level_interrupt_is_pending_exactly_while_its_line_is_high() {
    let m = Machine::new(1);
    m.gic.set_spi(SPI, true);
    assert_eq!(m.irq(), 1);
    m.gic.set_spi(SPI, false);
    assert_eq!(m.irq(), 0);
    assert_eq!(m.ack(0), 1023);
}

#[test]
fn a_level_that_stays_high_comes_again_after_the_end_of_interrupt() {
    let m = Machine::new(1);
    m.gic.set_spi(SPI, true);
    assert_eq!(m.ack(0), SPI);
    assert_eq!(m.irq(), 0);
    assert!(m.active(SPI) && m.pending(SPI), "active and pending");
    m.eoi(0, SPI);
    assert_eq!(m.irq(), 1);
    assert_eq!(m.ack(0), SPI);
    m.gic.set_spi(SPI, false);
    m.eoi(0, SPI);
    assert_eq!(m.irq(), 0);
}

#[test]
fn an_edge_is_latched_and_taken_once() {
    let m = Machine::new(1);
    m.set_edge(SPI);
    IrqLine::new(m.gic.clone(), SPI).pulse();
    assert_eq!(m.irq(), 1);
    assert_eq!(m.ack(0), SPI);
    assert!(!m.pending(SPI));
    m.eoi(0, SPI);
    assert_eq!(m.irq(), 0);
}

#[test]
fn an_edge_line_held_high_is_one_edge() {
    let m = Machine::new(1);
    m.set_edge(SPI);
    m.gic.set_spi(SPI, true);
    m.gic.set_spi(SPI, true);
    assert_eq!(m.ack(0), SPI);
    m.gic.set_spi(SPI, true);
    m.eoi(0, SPI);
    assert_eq!(m.ack(0), 1023);
}

#[test]
fn an_edge_while_active_makes_the_interrupt_active_and_pending() {
    let m = Machine::new(1);
    m.set_edge(SPI);
    let line = IrqLine::new(m.gic.clone(), SPI);
    line.pulse();
    assert_eq!(m.ack(0), SPI);
    line.pulse();
    assert_eq!(m.irq(), 0, "not signalled while active");
    m.eoi(0, SPI);
    assert_eq!(m.ack(0), SPI);
}

#[test]
fn software_can_pend_and_unpend_but_not_silence_a_high_level() {
    let m = Machine::new(1);
    let (set, clear) = (0x200 + 4, 0x280 + 4);
    m.gicd.mmio_write(set, 4, 1 << (SPI - 32));
    assert_eq!(m.irq(), 1);
    m.gicd.mmio_write(clear, 4, 1 << (SPI - 32));
    assert_eq!(m.irq(), 0);
    m.gic.set_spi(SPI, true);
    m.gicd.mmio_write(clear, 4, 1 << (SPI - 32));
    assert_eq!(m.irq(), 1);
}

#[test]
fn the_priority_mask_hides_equal_and_lower_priorities() {
    let m = Machine::new(1);
    m.write(0, ICC_PMR_EL1, 0xa0);
    m.gic.set_spi(SPI, true);
    assert_eq!(m.irq(), 0);
    assert_eq!(m.ack(0), 1023);
    assert_eq!(m.read(0, ICC_HPPIR1_EL1), u64::from(SPI), "HPPIR does not look at the mask");
    m.write(0, ICC_PMR_EL1, 0xa8);
    assert_eq!(m.irq(), 1);
    assert_eq!(m.ack(0), SPI);
}

#[test]
fn five_bits_of_priority_are_implemented() {
    let m = Machine::new(1);
    m.write(0, ICC_PMR_EL1, 0xff);
    assert_eq!(m.read(0, ICC_PMR_EL1), 0xf8);
    m.gicd.mmio_write(0x400 + 40, 4, 0xffff_ffff);
    assert_eq!(m.gicd.mmio_read(0x400 + 40, 4), 0xf8f8_f8f8);
    assert_eq!(m.gicd.mmio_read(0x400 + 43, 1), 0xf8);
    assert_eq!(m.read(0, ICC_CTLR_EL1) >> 8 & 7, 4);
    m.write(0, ICC_BPR0_EL1, 0);
    m.write(0, ICC_BPR1_EL1, 0);
    assert_eq!((m.read(0, ICC_BPR0_EL1), m.read(0, ICC_BPR1_EL1)), (2, 3));
}

#[test]
fn the_highest_priority_wins_then_the_lowest_number() {
    let m = Machine::new(1);
    for intid in [50, 60, 70] {
        m.gic.set_spi(intid, true);
    }
    m.set_priority(0, 60, 0x20);
    assert_eq!((m.ack(0), m.read(0, ICC_HPPIR1_EL1)), (60, 50));
}

#[test]
fn a_higher_priority_preempts_and_the_drop_restores_the_one_below() {
    let m = Machine::new(1);
    m.set_priority(0, 50, 0x80);
    m.set_priority(0, 60, 0x40);
    m.gic.set_spi(50, true);
    assert_eq!(m.ack(0), 50);
    assert_eq!(m.read(0, ICC_RPR_EL1), 0x80);
    m.gic.set_spi(61, true);
    assert_eq!(m.irq(), 0, "0xa0 does not preempt 0x80");
    m.gic.set_spi(60, true);
    assert_eq!(m.irq(), 1);
    assert_eq!(m.ack(0), 60);
    assert_eq!(m.read(0, ICC_AP1R0_EL1), 1 << 16 | 1 << 8);
    assert_eq!(m.read(0, ICC_RPR_EL1), 0x40);
    m.gic.set_spi(60, false);
    m.eoi(0, 60);
    assert_eq!(m.read(0, ICC_RPR_EL1), 0x80);
    m.gic.set_spi(50, false);
    m.eoi(0, 50);
    assert_eq!(m.read(0, ICC_RPR_EL1), 0xff);
    assert_eq!(m.ack(0), 61);
}

#[test]
fn the_binary_point_keeps_subpriorities_from_preempting() {
    let m = Machine::new(1);
    // Group priority is bits 7 to 6.
    m.write(0, ICC_BPR1_EL1, 6);
    m.set_priority(0, 50, 0x78);
    m.set_priority(0, 60, 0x40);
    m.gic.set_spi(50, true);
    assert_eq!(m.ack(0), 50);
    assert_eq!(m.read(0, ICC_RPR_EL1), 0x40);
    m.gic.set_spi(60, true);
    assert_eq!(m.ack(0), 1023);
    m.set_priority(0, 60, 0x38);
    assert_eq!(m.ack(0), 60);
}

#[test]
fn with_a_common_binary_point_group_1_uses_that_of_group_0() {
    let m = Machine::new(1);
    m.write(0, ICC_BPR0_EL1, 7);
    m.write(0, ICC_CTLR_EL1, 1);
    assert_eq!(m.read(0, ICC_BPR1_EL1), 7, "BPR0 + 1, saturated");
    m.write(0, ICC_BPR1_EL1, 3);
    m.set_priority(0, 60, 0);
    m.gic.set_spi(50, true);
    assert_eq!(m.ack(0), 50);
    m.gic.set_spi(60, true);
    assert_eq!(m.irq(), 0, "nothing preempts");
    m.write(0, ICC_CTLR_EL1, 0);
    assert_eq!(m.read(0, ICC_BPR1_EL1), 3);
}

#[test]
fn group_0_is_fiq_and_each_acknowledge_register_sees_its_own_group() {
    let m = Machine::new(1);
    m.set_group_0(SPI);
    m.gic.set_spi(SPI, true);
    assert_eq!((m.irq(), m.fiq()), (0, 1));
    assert_eq!(m.ack(0), 1023);
    assert_eq!(m.read(0, ICC_HPPIR0_EL1), u64::from(SPI));
    assert_eq!(m.read(0, ICC_IAR0_EL1), u64::from(SPI));
    assert_eq!(m.fiq(), 0);
    m.gic.set_spi(SPI, false);
    m.eoi(0, SPI);
    assert!(m.active(SPI), "the end of interrupt of the other group does nothing");
    m.write(0, ICC_EOIR0_EL1, SPI.into());
    assert!(!m.active(SPI));
}

#[test]
fn group_enables_of_distributor_and_interface_both_gate() {
    let m = Machine::new(1);
    m.gic.set_spi(SPI, true);
    m.gicd.mmio_write(GICD_CTLR, 4, 1);
    assert_eq!(m.irq(), 0);
    m.gicd.mmio_write(GICD_CTLR, 4, 2);
    assert_eq!(m.irq(), 1);
    m.write(0, ICC_IGRPEN1_EL1, 0);
    assert_eq!(m.irq(), 0);
    m.write(0, ICC_IGRPEN1_EL1, 1);
    assert_eq!(m.irq(), 1);
}

#[test]
fn processor_sleep_reads_back_and_holds_no_interrupt_back() {
    let m = Machine::new(2);
    m.gicr_write(0, 0x14, u64::MAX);
    assert_eq!(m.gicr_read(0, 0x14), 6, "ChildrenAsleep follows ProcessorSleep");
    assert_eq!(m.gicr_read(1, 0x14), 0, "each redistributor has its own");
    m.gic.set_spi(SPI, true);
    assert_eq!((m.irq(), m.ack(0)), (1, SPI));
    m.gicr_write(0, 0x14, 0);
    assert_eq!(m.gicr_read(0, 0x14), 0);
}

#[test]
fn with_eoi_mode_1_the_interrupt_stays_active_until_dir() {
    let m = Machine::new(1);
    m.write(0, ICC_CTLR_EL1, 2);
    m.gic.set_spi(SPI, true);
    assert_eq!(m.ack(0), SPI);
    m.eoi(0, SPI);
    assert_eq!(m.read(0, ICC_RPR_EL1), 0xff, "priority dropped");
    assert!(m.active(SPI));
    assert_eq!(m.irq(), 0, "the active interrupt is not signalled again");
    m.gic.set_spi(50, true);
    assert_eq!(m.ack(0), 50, "others of the same priority are");
    m.write(0, ICC_DIR_EL1, SPI.into());
    assert!(!m.active(SPI));
    m.eoi(0, 50);
    assert_eq!(m.irq(), 1);
}

#[test]
fn the_end_of_a_special_intid_is_ignored() {
    let m = Machine::new(1);
    m.gic.set_spi(SPI, true);
    assert_eq!(m.ack(0), SPI);
    m.eoi(0, 1023);
    m.eoi(0, 0xff_fffe);
    assert_eq!(m.read(0, ICC_RPR_EL1), 0xa0);
    assert!(m.active(SPI));
}

#[test]
fn disabling_an_interrupt_withdraws_it() {
    let m = Machine::new(1);
    m.gic.set_spi(SPI, true);
    m.gicd.mmio_write(0x180 + 4, 4, 1 << (SPI - 32));
    assert_eq!(m.irq(), 0);
    assert_eq!(m.gicd.mmio_read(0x100 + 4, 4) >> (SPI - 32) & 1, 0);
    m.gicd.mmio_write(0x100 + 4, 4, 1 << (SPI - 32));
    assert_eq!(m.irq(), 1);
}

#[test]
fn an_spi_goes_to_the_vcpu_in_its_router_and_to_no_other() {
    let m = Machine::new(20);
    m.route(SPI, affinity(17));
    m.gic.set_spi(SPI, true);
    assert_eq!(m.irq(), 1 << 17);
    assert_eq!(m.ack(0), 1023);
    m.route(SPI, affinity(3));
    assert_eq!(m.irq(), 1 << 3);
    m.route(SPI, 0x100_0000_0000 | affinity(3));
    assert_eq!(m.irq(), 1 << 3, "bits above Aff3 are reserved");
    m.route(SPI, affinity(20));
    assert_eq!(m.irq(), 0, "no such vCPU");
    assert!(m.pending(SPI));
    m.gicd.mmio_write(GICD_IROUTER + 8 * u64::from(SPI), 4, affinity(1));
    assert_eq!(m.irq(), 2, "the halves of a router can be written");
}

#[test]
fn an_spi_for_any_vcpu_goes_to_the_first_that_participates() {
    let m = Machine::new(3);
    m.route(SPI, 1 << 31);
    m.gic.set_spi(SPI, true);
    assert_eq!(m.irq(), 1);
    m.write(0, ICC_IGRPEN1_EL1, 0);
    assert_eq!(m.irq(), 2);
    m.gicr_write(1, 0x14, 2);
    assert_eq!(m.irq(), 4);
    m.write(0, ICC_IGRPEN1_EL1, 1);
    assert_eq!(m.irq(), 1);
    m.gicr_write(0, 0x14, 2);
    m.gicr_write(2, 0x14, 2);
    assert_eq!(m.irq(), 1, "all of them sleep, and it goes to the first all the same");
}

#[test]
fn an_spi_rerouted_while_active_comes_to_its_new_vcpu_after_the_end() {
    let m = Machine::new(2);
    m.gic.set_spi(SPI, true);
    assert_eq!(m.ack(0), SPI);
    m.route(SPI, affinity(1));
    assert_eq!(m.irq(), 0);
    m.eoi(0, SPI);
    assert_eq!(m.irq(), 2);
}

#[test]
fn ppis_are_private() {
    let m = Machine::new(2);
    m.gic.set_ppi(1, CNTV_INTID, true);
    assert_eq!(m.irq(), 2);
    assert_eq!(m.ack(0), 1023);
    assert_eq!(m.ack(1), CNTV_INTID);
    m.gic.set_ppi(1, CNTV_INTID, false);
    m.eoi(1, CNTV_INTID);
    assert_eq!(m.irq(), 0);
}

#[test]
fn an_sgi_reaches_the_listed_vcpus_of_one_cluster() {
    let m = Machine::new(32);
    // INTID 5 to Aff1 = 1, Aff0 = 0 and 15.
    m.write(0, ICC_SGI1R_EL1, 5 << 24 | 1 << 16 | 0x8001);
    assert_eq!(m.irq(), 1 << 16 | 1 << 31);
    assert_eq!(m.ack(31), 5);
    m.eoi(31, 5);
    assert_eq!(m.irq(), 1 << 16);
    m.write(0, ICC_SGI1R_EL1, 1 << 48 | 5 << 24 | 1);
    m.write(0, ICC_SGI1R_EL1, 1 << 44 | 5 << 24 | 1);
    assert_eq!(m.irq(), 1 << 16, "no vCPU has Aff3 = 1 or Aff0 = 16");
}

#[test]
fn an_sgi_to_all_others_leaves_out_its_sender() {
    let m = Machine::new(18);
    m.write(17, ICC_SGI1R_EL1, 1 << 40 | 3 << 24);
    assert_eq!(m.irq(), 0x1ffff);
}

#[test]
fn an_sgi_reaches_only_targets_that_have_it_in_its_group() {
    let m = Machine::new(2);
    m.gicr_write(1, 0x1_0080, 0xffff_fffe);
    m.write(0, ICC_SGI0R_EL1, 0b11);
    assert_eq!((m.irq(), m.fiq()), (0, 2));
    m.write(0, ICC_SGI1R_EL1, 0b11);
    assert_eq!((m.irq(), m.fiq()), (1, 2));
}

#[test]
fn sgis_stay_edge_triggered_and_ppis_can_be_either() {
    let m = Machine::new(1);
    m.gicr_write(0, 0x1_0c00, 0);
    assert_eq!(m.gicr_read(0, 0x1_0c00), 0xaaaa_aaaa);
    assert_eq!(m.gicr_read(0, 0x1_0c04), 0);
    m.gicr_write(0, 0x1_0c04, 0xffff_ffff);
    assert_eq!(m.gicr_read(0, 0x1_0c04), 0xaaaa_aaaa);
}

#[test]
fn the_identification_registers_say_gicv3_with_128_intids() {
    let m = Machine::cold(18);
    assert_eq!(m.gicd.mmio_read(0xffe8, 4) >> 4, 3);
    assert_eq!(m.gicr_read(17, 0xffe8) >> 4, 3);
    assert_eq!(m.gicd.mmio_read(4, 4) & 0x1f, 3);
    let typer = |n: u64| m.gicr.mmio_read(n * GICR_STRIDE + 8, 8);
    assert_eq!(typer(0), 0);
    assert_eq!(typer(17), 0x101 << 32 | 17 << 8 | 1 << 4);
    assert_eq!(m.gicr_read(17, 0xc), 0x101, "the halves can be read");
    assert_eq!(typer(18), 0, "no redistributor");
}

#[test]
fn bank_0_of_the_distributor_does_not_exist() {
    let m = Machine::new(1);
    for register in [0x80, 0x100, 0x400, 0xc00] {
        m.gicd.mmio_write(register, 4, 0xffff_ffff);
        assert_eq!(m.gicd.mmio_read(register, 4), 0);
    }
}

#[test]
fn registers_in_the_wrong_direction_or_missing_are_undefined() {
    let m = Machine::new(1);
    for reg in [ICC_EOIR1_EL1, ICC_DIR_EL1, ICC_SGI1R_EL1, ICC_AP1R0_EL1 + 1, 0xc000] {
        assert_eq!(m.gic.icc_read(0, reg), None);
    }
    for reg in [ICC_IAR1_EL1, ICC_RPR_EL1, ICC_HPPIR1_EL1, ICC_AP0R0_EL1 + 1, 0xc000] {
        assert!(!m.gic.icc_write(0, reg, 0));
    }
    assert_eq!(m.gic.icc_read(1, ICC_PMR_EL1), None, "no such vCPU");
}

#[test]
fn a_restored_gic_goes_on_in_the_middle_of_an_active_interrupt() {
    let m = Machine::new(2);
    m.set_priority(0, 50, 0x40);
    m.gic.set_spi(SPI, true);
    assert_eq!(m.ack(0), SPI);
    m.gic.set_spi(50, true);
    assert_eq!(m.ack(0), 50);
    m.gic.set_ppi(1, CNTV_INTID, true);
    let section = m.gic.save_section("0").unwrap();

    let n = Machine::cold(2);
    n.gic.restore_section(&section).unwrap();
    assert_eq!(n.irq(), 2, "outputs follow from the state");
    assert_eq!(n.gic.save_section("0").unwrap(), section);
    n.gic.set_spi(50, false);
    n.eoi(0, 50);
    assert_eq!(n.read(0, ICC_RPR_EL1), 0xa0);
    n.eoi(0, SPI);
    assert_eq!(n.irq(), 3, "the level is still high");
    assert_eq!(n.ack(0), SPI);
    assert_eq!(n.ack(1), CNTV_INTID);
}

#[test]
fn restore_lowers_outputs_that_the_state_has_low() {
    let state = Machine::new(1).gic.save();
    let m = Machine::new(1);
    m.gic.set_spi(SPI, true);
    m.gic.restore(state).unwrap();
    assert_eq!(m.irq(), 0);
}

#[test]
fn a_state_that_cannot_be_is_refused_by_field_and_changes_nothing() {
    let m = Machine::new(2);
    m.gic.set_spi(SPI, true);
    let good = m.gic.save();
    type Damage = fn(&mut GicState);
    let cases: [(&str, Damage); 11] = [
        ("ctlr", |s| s.ctlr = 4),
        ("spis", |s| s.spis.truncate(1)),
        ("routers", |s| s.routers.truncate(1)),
        ("routers", |s| s.routers[95] = 1 << 30),
        ("cpus", |s| s.cpus.truncate(1)),
        ("priority", |s| s.spis[2].priority[31] = 1),
        ("cpus.private.edge", |s| s.cpus[1].private.edge = 0),
        ("cpus.private.line", |s| s.cpus[1].private.line = 1),
        ("cpus.icc.pmr", |s| s.cpus[0].icc.pmr = 0xff),
        ("cpus.icc.bpr0", |s| s.cpus[0].icc.bpr0 = 8),
        ("cpus.icc.bpr1", |s| s.cpus[0].icc.bpr1 = 2),
    ];
    for (expected, damage) in cases {
        let mut bad = good.clone();
        damage(&mut bad);
        match m.gic.restore(bad) {
            Err(PersistError::Invalid { kind: "gicv3", field, .. }) => assert_eq!(field, expected),
            other => panic!("{expected}: {other:?}"),
        }
        assert_eq!(m.gic.save(), good);
    }
}

#[derive(Clone, Debug)]
enum Op {
    Spi(u32, bool),
    Ppi(u32, u32, bool),
    Gicd(u64, u8, u64),
    Gicr(u64, u8, u64),
    IccRead(u32, u16),
    IccWrite(u32, u16, u64),
}

fn op() -> impl Strategy<Value = Op> {
    let icc = prop::sample::select(vec![
        ICC_PMR_EL1,
        ICC_IAR0_EL1,
        ICC_EOIR0_EL1,
        ICC_BPR0_EL1,
        ICC_AP0R0_EL1,
        ICC_AP1R0_EL1,
        ICC_DIR_EL1,
        ICC_SGI1R_EL1,
        ICC_SGI0R_EL1,
        ICC_IAR1_EL1,
        ICC_EOIR1_EL1,
        ICC_BPR1_EL1,
        ICC_CTLR_EL1,
        ICC_IGRPEN0_EL1,
        ICC_IGRPEN1_EL1,
        ICC_RPR_EL1,
        ICC_HPPIR0_EL1,
    ]);
    let offset = || {
        prop_oneof![
            0u64..0x1000,
            (0u64..0x400).prop_map(|n| n * 4),
            (0x6100u64 / 8..0x6400 / 8).prop_map(|n| n * 8),
            0x1_0000u64..0x1_1000,
            (0u64..0x10000).prop_map(|n| n * 4),
            Just(0x14u64),
            any::<u64>(),
        ]
    };
    let size = || prop::sample::select(vec![1u8, 2, 4, 4, 4, 8]);
    let value = || prop_oneof![any::<u64>(), 0u64..128, Just(u64::MAX), Just(0xf8)];
    prop_oneof![
        (any::<u32>().prop_map(|n| n % 140), any::<bool>()).prop_map(|(n, l)| Op::Spi(n, l)),
        (0u32..4, 0u32..40, any::<bool>()).prop_map(|(c, n, l)| Op::Ppi(c, n, l)),
        (offset(), size(), value()).prop_map(|(o, s, v)| Op::Gicd(o, s, v)),
        (offset(), size(), value()).prop_map(|(o, s, v)| Op::Gicr(o, s, v)),
        (0u32..4, icc.clone()).prop_map(|(c, r)| Op::IccRead(c, r)),
        (0u32..4, icc, value()).prop_map(|(c, r, v)| Op::IccWrite(c, r, v)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// What is cached equals what a look at everything finds; save and restore are transparent.
    #[test]
    fn any_traffic_keeps_caches_right_and_state_restorable(ops in prop::collection::vec(op(), 1..200)) {
        let m = Machine::new(3);
        for op in ops {
            match op {
                Op::Spi(intid, level) => m.gic.set_spi(intid, level),
                Op::Ppi(vcpu, intid, level) => m.gic.set_ppi(vcpu, intid, level),
                Op::Gicd(offset, size, value) => {
                    m.gicd.mmio_write(offset, size, value);
                    m.gicd.mmio_read(offset, size);
                }
                Op::Gicr(offset, size, value) => {
                    m.gicr.mmio_write(offset, size, value);
                    m.gicr.mmio_read(offset, size);
                }
                Op::IccRead(vcpu, reg) => {
                    m.gic.icc_read(vcpu, reg);
                }
                Op::IccWrite(vcpu, reg, value) => {
                    let _ = m.gic.icc_write(vcpu, reg, value);
                }
            }
            let core = m.gic.core.lock();
            for vcpu in 0..3 {
                prop_assert_eq!(core.cpus[vcpu].pending, core.highest_pending(vcpu));
                prop_assert_eq!(core.cpus[vcpu].lines[0], m.irq() >> vcpu & 1 == 1);
                prop_assert_eq!(core.cpus[vcpu].lines[1], m.fiq() >> vcpu & 1 == 1);
            }
        }
        prop_assert_eq!(m.lines.idle_calls.load(Ordering::Relaxed), 0);
        let section = m.gic.save_section("0").unwrap();
        let n = Machine::cold(3);
        n.gic.restore_section(&section).unwrap();
        prop_assert_eq!(n.gic.save_section("0").unwrap(), section);
        prop_assert_eq!((n.irq(), n.fiq()), (m.irq(), m.fiq()));
    }
}

squib_formats::persist_contract! {
    mod contract,
    device: Gic,
    fresh: || Arc::into_inner(Gic::new(2, Arc::new(Lines::default()))).unwrap(),
    change: |gic| {
        let state = {
            let m = Machine::new(2);
            m.set_edge(SPI);
            m.set_group_0(50);
            m.set_priority(0, 60, 0x40);
            m.route(60, affinity(1));
            m.write(0, ICC_BPR0_EL1, 4);
            m.write(0, ICC_BPR1_EL1, 5);
            m.write(1, ICC_CTLR_EL1, 3);
            IrqLine::new(m.gic.clone(), SPI).pulse();
            m.gic.set_spi(50, true);
            m.gic.set_ppi(1, CNTV_INTID, true);
            assert_eq!(m.ack(1), CNTV_INTID);
            m.write(1, ICC_SGI1R_EL1, 1 << 40 | 2 << 24);
            m.gic.save()
        };
        gic.restore(state).unwrap();
    },
}
