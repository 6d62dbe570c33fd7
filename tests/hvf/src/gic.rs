//! The interrupt controller inside the framework.

use std::{
    ffi::c_void,
    sync::{Arc, atomic::Ordering},
};

use applevisor_sys as hv;
use parking_lot::Mutex;
use squib_devices::{
    device::MachineDevice,
    gic::{CpuOutputs, Gic, GicDistributor, GicRedistributors, GicState, IccState},
    irq::IrqChip,
    map,
};
use squib_formats::persist::{Section, Versioned};
use squib_soft::Signals;

use crate::{
    host::{Geometry, host},
    object::Object,
    rules::{Answer, BAD_ARGUMENT, begin, code, give, violation},
    system, vcpu,
    vm::{self, Vm},
};

/// What every state begins with, before the build of the host that made it.
const MAGIC: &[u8] = b"standin1";

/// The controller of the virtual machine.
pub(crate) struct Chip {
    pub(crate) gic: Arc<Gic>,
    outputs: Arc<Outputs>,
    gicd: u64,
    gicr: u64,
    msi_intids: (u32, u32),
    geometry: Geometry,
}

impl Chip {
    pub(crate) fn redistributor(&self, index: u32) -> u64 {
        let Geometry { redistributor_offset, redistributor_size, .. } = self.geometry;
        self.gicr + redistributor_offset + u64::from(index) * redistributor_size as u64
    }

    /// The registers at guest-physical `address`, with the offset there.
    pub(crate) fn frame(&self, address: u64) -> Option<(Box<dyn MachineDevice>, u64)> {
        let inside =
            |base: u64, size: usize| address.checked_sub(base).filter(|at| *at < size as u64);
        let gicd = inside(self.gicd, self.geometry.distributor_size).map(|at| {
            let frame: Box<dyn MachineDevice> = Box::new(GicDistributor(Arc::clone(&self.gic)));
            (frame, at)
        });
        gicd.or_else(|| {
            let at = inside(self.gicr, self.geometry.redistributor_region_size)?;
            Some((Box::new(GicRedistributors(Arc::clone(&self.gic))), at))
        })
    }

    /// GICR_TYPER.Last, if that is what is at `address`: the model has room for more vCPUs than there are.
    pub(crate) fn last_bit(&self, address: u64) -> Answer<u64> {
        const TYPER: u64 = 0x8;
        const LAST: u64 = 1 << 4;
        vm::with(|vm| {
            let last = vm.vcpus.values().filter_map(|vcpu| vcpu.index()).max();
            let is_it = last.is_some_and(|last| address == self.redistributor(last) + TYPER);
            Ok(if is_it { LAST } else { 0 })
        })
    }

    /// Lets the lines into vCPU `index` go to `signals`.
    pub(crate) fn connect(&self, index: u32, signals: &Arc<Signals>) {
        let mut lines = self.outputs.0[index as usize].lock();
        signals.set_irq(lines.irq);
        signals.set_fiq(lines.fiq);
        lines.signals = Some(Arc::clone(signals));
    }
}

#[derive(Default)]
struct Lines {
    irq: bool,
    fiq: bool,
    signals: Option<Arc<Signals>>,
}

struct Outputs(Vec<Mutex<Lines>>);

impl CpuOutputs for Outputs {
    fn set_irq(&self, vcpu: u32, level: bool) {
        let mut lines = self.0[vcpu as usize].lock();
        lines.irq = level;
        if let Some(signals) = &lines.signals {
            signals.set_irq(level);
        }
    }

    fn set_fiq(&self, vcpu: u32, level: bool) {
        let mut lines = self.0[vcpu as usize].lock();
        lines.fiq = level;
        if let Some(signals) = &lines.signals {
            signals.set_fiq(level);
        }
    }
}

fn new_gic() -> (Arc<Gic>, Arc<Outputs>) {
    let outputs = Arc::new(Outputs((0..map::MAX_VCPUS).map(|_| Mutex::default()).collect()));
    (Gic::new(map::MAX_VCPUS, Arc::clone(&outputs) as Arc<dyn CpuOutputs>), outputs)
}

fn create(vm: &mut Vm, config: &Object) -> Answer {
    let Object::GicConfig { gicd, gicr, msi, msi_intids } = config else {
        return Err(violation("hv_gic_create with an object of another kind"));
    };
    if vm.gic.is_some() || !vm.vcpus.is_empty() {
        return Err(violation("an interrupt controller after another one or after a vCPU"));
    }
    let (Some(gicd), Some(gicr), Some(msi), Some(msi_intids)) = (*gicd, *gicr, *msi, *msi_intids)
    else {
        return Err(violation(
            "an interrupt controller without distributor, redistributors or messages",
        ));
    };
    let geometry = host().gic;
    let mut regions = [
        (gicd, geometry.distributor_size),
        (gicr, geometry.redistributor_region_size),
        (msi, geometry.msi_size),
    ];
    regions.sort_unstable();
    let aligned = gicd.is_multiple_of(geometry.distributor_alignment as u64)
        && gicr.is_multiple_of(geometry.redistributor_alignment as u64)
        && msi.is_multiple_of(geometry.msi_alignment as u64);
    let apart = regions.windows(2).all(|pair| pair[0].0 + pair[0].1 as u64 <= pair[1].0);
    let (first, end) = (msi_intids.0, msi_intids.0.saturating_add(msi_intids.1));
    let spis = geometry.spis;
    if !aligned || !apart || first < spis.0 || end > spis.0 + spis.1 {
        return Err(violation(format!(
            "an interrupt controller with regions {regions:x?}, messages {msi_intids:?}"
        )));
    }
    let (gic, outputs) = new_gic();
    vm.gic = Some(Arc::new(Chip { gic, outputs, gicd, gicr, msi_intids, geometry }));
    Ok(())
}

/// The controller of the virtual machine, if there is one.
pub(crate) fn chip() -> Answer<Arc<Chip>> {
    vm::with(|vm| {
        let chip = vm.gic.as_ref().map(Arc::clone);
        chip.ok_or_else(|| violation("a call without an interrupt controller"))
    })
}

fn set_spi(intid: u32, level: bool) -> Answer {
    let chip = chip()?;
    let (first, count) = chip.msi_intids;
    let spis = chip.geometry.spis;
    if !(spis.0..spis.0 + spis.1).contains(&intid) || (first..first + count).contains(&intid) {
        return Err(violation(format!("interrupt {intid} has no line")));
    }
    chip.gic.set_spi(intid, level);
    Ok(())
}

/// The CPU interfaces are left out, as the framework does.
fn state() -> Answer<Vec<u8>> {
    let mut state = chip()?.gic.save();
    let reset = new_gic().0.save().cpus.swap_remove(0).icc;
    state.cpus.iter_mut().for_each(|cpu| cpu.icc = reset.clone());
    let section = Section::encode("0", &state).map_err(|_| BAD_ARGUMENT)?;
    let build = system::build();
    Ok([MAGIC, &[build.len() as u8], build.as_bytes(), &section.payload].concat())
}

fn set_state(bytes: &[u8]) -> Answer {
    let chip = vm::with(|vm| {
        if vm.ran {
            return Err(violation("hv_gic_set_state after a vCPU has run"));
        }
        if vm.vcpus.is_empty() || vm.vcpus.values().any(|vcpu| vcpu.index().is_none()) {
            return Err(violation("hv_gic_set_state before there are vCPUs with MPIDR_EL1"));
        }
        vm.gic.clone().ok_or(BAD_ARGUMENT)
    })?;
    // A state of another build is refused, which is no mistake of the caller.
    let build = system::build();
    let of_build = |bytes: &'_ [u8]| -> Option<usize> {
        let after = bytes.strip_prefix(MAGIC)?.strip_prefix(&[build.len() as u8])?;
        Some(bytes.len() - after.strip_prefix(build.as_bytes())?.len())
    };
    let payload = &bytes[of_build(bytes).ok_or(BAD_ARGUMENT)?..];
    let mut state = GicState::decode(GicState::VERSION, payload).map_err(|_| BAD_ARGUMENT)?;
    let kept: Vec<IccState> = chip.gic.save().cpus.into_iter().map(|cpu| cpu.icc).collect();
    for (cpu, icc) in state.cpus.iter_mut().zip(kept) {
        cpu.icc = icc;
    }
    chip.gic.restore(state).map_err(|_| BAD_ARGUMENT)
}

#[unsafe(no_mangle)]
extern "C" fn hv_gic_config_create() -> *mut c_void {
    Object::GicConfig { gicd: None, gicr: None, msi: None, msi_intids: None }.give()
}

/// Sets one field of a configuration.
///
/// # Safety
///
/// The caller owns `config`.
unsafe fn configure(
    call: &'static str,
    config: *mut c_void,
    set: impl FnOnce(&mut Object),
) -> hv::hv_return_t {
    // SAFETY: as the caller promises.
    let config = unsafe { Object::of(config) };
    let configure = || match config {
        Some(config @ Object::GicConfig { .. }) => {
            set(config);
            Ok(())
        }
        _ => Err(violation(format!("{call} with an object of another kind"))),
    };
    code(begin(call).and_then(|()| configure()))
}

macro_rules! base {
    ($call:ident, $field:ident) => {
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $call(config: *mut c_void, base: u64) -> hv::hv_return_t {
            let set = |config: &mut Object| {
                if let Object::GicConfig { $field, .. } = config {
                    *$field = Some(base);
                }
            };
            // SAFETY: the caller owns the configuration.
            unsafe { configure(stringify!($call), config, set) }
        }
    };
}

base!(hv_gic_config_set_distributor_base, gicd);
base!(hv_gic_config_set_redistributor_base, gicr);
base!(hv_gic_config_set_msi_region_base, msi);

#[unsafe(no_mangle)]
unsafe extern "C" fn hv_gic_config_set_msi_interrupt_range(
    config: *mut c_void,
    first: u32,
    count: u32,
) -> hv::hv_return_t {
    let set = |config: &mut Object| {
        if let Object::GicConfig { msi_intids, .. } = config {
            *msi_intids = Some((first, count));
        }
    };
    // SAFETY: the caller owns the configuration.
    unsafe { configure("hv_gic_config_set_msi_interrupt_range", config, set) }
}

macro_rules! size {
    ($($call:ident = $value:ident;)*) => {$(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $call(size: *mut usize) -> hv::hv_return_t {
            // SAFETY: the caller gives a place for the answer.
            unsafe { give(stringify!($call), size, || Ok(host().gic.$value)) }
        }
    )*};
}

size! {
    hv_gic_get_distributor_size = distributor_size;
    hv_gic_get_distributor_base_alignment = distributor_alignment;
    hv_gic_get_redistributor_region_size = redistributor_region_size;
    hv_gic_get_redistributor_size = redistributor_size;
    hv_gic_get_redistributor_base_alignment = redistributor_alignment;
    hv_gic_get_msi_region_size = msi_size;
    hv_gic_get_msi_region_base_alignment = msi_alignment;
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hv_gic_get_spi_interrupt_range(
    first: *mut u32,
    count: *mut u32,
) -> hv::hv_return_t {
    // SAFETY: the caller gives places for both answers.
    unsafe {
        give("hv_gic_get_spi_interrupt_range", first, || {
            let (start, found) = host().gic.spis;
            count.write(found);
            Ok(start)
        })
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hv_gic_get_intid(
    interrupt: hv::hv_gic_intid_t,
    intid: *mut u32,
) -> hv::hv_return_t {
    // SAFETY: the caller gives a place for the answer.
    unsafe {
        give("hv_gic_get_intid", intid, || {
            Ok(match interrupt {
                hv::hv_gic_intid_t::EL1_VIRTUAL_TIMER => host().gic.timer,
                other => other as u32,
            })
        })
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hv_gic_create(config: *mut c_void) -> hv::hv_return_t {
    // SAFETY: the caller owns the configuration.
    let config = unsafe { Object::of(config) };
    let create = || match config {
        Some(config) => vm::with(|vm| create(vm, config)),
        None => Err(violation("hv_gic_create without a configuration")),
    };
    code(begin("hv_gic_create").and_then(|()| create()))
}

#[unsafe(no_mangle)]
extern "C" fn hv_gic_set_spi(intid: u32, level: bool) -> hv::hv_return_t {
    code(begin("hv_gic_set_spi").and_then(|()| set_spi(intid, level)))
}

#[unsafe(no_mangle)]
extern "C" fn hv_gic_state_create() -> *mut c_void {
    let made = begin("hv_gic_state_create").and_then(|()| {
        if vm::with(|vm| Ok(vm.running()))? > 0 {
            return Err(violation("hv_gic_state_create while a vCPU runs"));
        }
        state()
    });
    made.map_or(std::ptr::null_mut(), |bytes| Object::GicState(bytes).give())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hv_gic_state_get_size(
    state: *mut c_void,
    size: *mut usize,
) -> hv::hv_return_t {
    // SAFETY: the caller owns the state.
    let state = unsafe { Object::of(state) };
    let answer = || match state {
        Some(Object::GicState(bytes)) => Ok(bytes.len()),
        _ => Err(violation("hv_gic_state_get_size with an object of another kind")),
    };
    // SAFETY: the caller gives a place for the answer.
    unsafe { give("hv_gic_state_get_size", size, answer) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hv_gic_state_get_data(state: *mut c_void, data: *mut u8) -> hv::hv_return_t {
    // SAFETY: the caller owns the state.
    let state = unsafe { Object::of(state) };
    let mut answer = || match state {
        Some(Object::GicState(bytes)) => {
            // SAFETY: the caller's buffer is as long as `hv_gic_state_get_size` said.
            unsafe { data.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
            Ok(())
        }
        _ => Err(violation("hv_gic_state_get_data with an object of another kind")),
    };
    code(begin("hv_gic_state_get_data").and_then(|()| answer()))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hv_gic_set_state(data: *const u8, size: usize) -> hv::hv_return_t {
    // SAFETY: the caller's buffer has that size.
    let bytes = unsafe { std::slice::from_raw_parts(data, size) };
    code(begin("hv_gic_set_state").and_then(|()| set_state(bytes)))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hv_gic_get_redistributor_base(vcpu: u64, base: *mut u64) -> hv::hv_return_t {
    let answer = || {
        let index = vcpu::index(vcpu)?;
        Ok(chip()?.redistributor(index))
    };
    // SAFETY: the caller gives a place for the answer.
    unsafe { give("hv_gic_get_redistributor_base", base, answer) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hv_gic_get_icc_reg(
    vcpu: u64,
    reg: hv::hv_gic_icc_reg_t,
    value: *mut u64,
) -> hv::hv_return_t {
    let answer = || {
        let index = vcpu::index(vcpu)?;
        if system::is_secret(reg as u16) {
            return Err(BAD_ARGUMENT);
        }
        chip()?.gic.icc_read(index, reg as u16).ok_or(BAD_ARGUMENT)
    };
    // SAFETY: the caller gives a place for the answer.
    unsafe { give("hv_gic_get_icc_reg", value, answer) }
}

#[unsafe(no_mangle)]
extern "C" fn hv_gic_set_icc_reg(
    vcpu: u64,
    reg: hv::hv_gic_icc_reg_t,
    value: u64,
) -> hv::hv_return_t {
    let set = || {
        let index = vcpu::index(vcpu)?;
        match chip()?.gic.icc_write(index, reg as u16, value) {
            true => Ok(()),
            false => Err(violation(format!("{reg:?} is read-only"))),
        }
    };
    code(begin("hv_gic_set_icc_reg").and_then(|()| set()))
}

/// Whether any vCPU is in the guest just now.
pub(crate) fn is_running(vm: &Vm) -> bool {
    vm.vcpus.values().any(|entry| entry.running.load(Ordering::SeqCst))
}
