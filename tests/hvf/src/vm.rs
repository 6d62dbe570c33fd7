//! The virtual machine, its memory, and the host's clock.

use std::{
    collections::BTreeMap,
    ffi::c_void,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
};

use applevisor_sys as hv;
use parking_lot::Mutex;
use squib_soft::{Counter, Granules, READABLE, Ram, Shared, WRITABLE};

use crate::{
    gic::Chip,
    host::host,
    object::Object,
    rules::{Answer, BAD_ARGUMENT, begin, code, give, has_failed, violation},
    time,
    vcpu::Entry,
};

/// The framework's page.
const PAGE_SHIFT: u32 = 14;
const PAGE: u64 = 1 << PAGE_SHIFT;
/// Guest-physical addresses at which memory can be mapped here: the software CPU has one range of RAM.
const WINDOW: std::ops::Range<u64> = 0x8000_0000..0x1_8000_0000;

static VM: Mutex<Option<Vm>> = Mutex::new(None);

/// The one virtual machine of the process.
pub(crate) struct Vm {
    ipa_bits: u32,
    /// What vCPUs may do with each page of the window.
    access: Arc<[AtomicU8]>,
    /// Which call has mapped each page.
    mapped_by: Vec<u32>,
    maps: u32,
    /// Host address less guest-physical address, the same for all mappings.
    delta: Option<u64>,
    /// What the vCPUs share, and whether it knows where RAM is.
    shared: Option<(Arc<Shared>, bool)>,
    pub(crate) counter: Arc<Counter>,
    /// The offset that the counter follows.
    pub(crate) offset: Option<u64>,
    pub(crate) gic: Option<Arc<Chip>>,
    pub(crate) vcpus: BTreeMap<u64, Arc<Entry>>,
    pub(crate) next_vcpu: u64,
    /// A vCPU has run.
    pub(crate) ran: bool,
}

pub(crate) fn exists() -> bool {
    VM.lock().is_some()
}

/// Lets the process have another one after a test that left its own behind.
pub(crate) fn forget() {
    *VM.lock() = None;
}

/// Takes a vCPU out, if there is one.
pub(crate) fn remove_vcpu(vcpu: u64) {
    if let Some(vm) = &mut *VM.lock() {
        vm.vcpus.remove(&vcpu);
    }
}

/// Does `work` on the virtual machine.
pub(crate) fn with<T>(work: impl FnOnce(&mut Vm) -> Answer<T>) -> Answer<T> {
    match &mut *VM.lock() {
        Some(vm) => work(vm),
        None => {
            violation("a call without a virtual machine");
            Err(hv::hv_error_t::HV_NO_DEVICE as hv::hv_return_t)
        }
    }
}

impl Vm {
    /// What vCPUs share, as it is now.
    pub(crate) fn shared(&mut self) -> Arc<Shared> {
        let Self { access, delta, shared, counter, .. } = self;
        let make = || {
            // Without a mapping no address is allowed, so none of this one is used.
            let host =
                delta.map_or(PAGE as *mut u8, |delta| delta.wrapping_add(WINDOW.start) as *mut u8);
            // SAFETY: `access` allows what is mapped and nothing else, and whoever maps memory promises that
            // it stays until it is unmapped.
            let ram =
                unsafe { Ram::new(host, WINDOW.end - WINDOW.start, WINDOW.start, Arc::new(())) };
            let granules = Granules { access: Arc::clone(access), shift: PAGE_SHIFT };
            (Shared::new(ram.with_granules(granules), Arc::clone(counter)), delta.is_some())
        };
        Arc::clone(&shared.get_or_insert_with(make).0)
    }

    /// Whether vCPUs may read what is at `address`.
    pub(crate) fn is_readable(&self, address: u64) -> bool {
        let page = address.checked_sub(WINDOW.start).map(|at| (at >> PAGE_SHIFT) as usize);
        let page = page.and_then(|page| self.access.get(page));
        page.is_some_and(|page| page.load(Ordering::SeqCst) & READABLE != 0)
    }

    pub(crate) fn running(&self) -> usize {
        self.vcpus.values().filter(|entry| entry.running.load(Ordering::SeqCst)).count()
    }

    fn pages(&self, what: &str, ipa: u64, size: usize) -> Answer<std::ops::Range<usize>> {
        let size = size as u64;
        if !ipa.is_multiple_of(PAGE) || !size.is_multiple_of(PAGE) || size == 0 {
            return Err(violation(format!(
                "{what} of {size:#x} bytes at {ipa:#x}: not whole pages"
            )));
        }
        let end = ipa
            .checked_add(size)
            .filter(|end| end >> self.ipa_bits == 0 || *end == 1 << self.ipa_bits);
        if end.is_none_or(|end| ipa < WINDOW.start || end > WINDOW.end) {
            return Err(violation(format!("{what} of {size:#x} bytes at {ipa:#x}: outside")));
        }
        let first = ((ipa - WINDOW.start) >> PAGE_SHIFT) as usize;
        Ok(first..first + (size >> PAGE_SHIFT) as usize)
    }

    fn map(&mut self, host: *const c_void, ipa: u64, size: usize, flags: u64) -> Answer {
        let pages = self.pages("mapping", ipa, size)?;
        let rights = rights(flags)?;
        let host = host as u64;
        if !host.is_multiple_of(rustix::param::page_size() as u64) || host == 0 {
            return Err(violation(format!("mapping of {host:#x}: not a page of the host")));
        }
        if self.access[pages.clone()].iter().any(|page| page.load(Ordering::SeqCst) != 0) {
            return Err(violation(format!("mapping at {ipa:#x}: something is mapped there")));
        }
        let delta = host.wrapping_sub(ipa);
        if *self.delta.get_or_insert(delta) != delta {
            return Err(violation(format!(
                "mapping at {ipa:#x}: this stand-in has one range of RAM"
            )));
        }
        if matches!(self.shared, Some((_, false))) {
            self.shared = None;
        }
        self.maps += 1;
        self.mapped_by[pages.clone()].fill(self.maps);
        self.access[pages].iter().for_each(|page| page.store(rights, Ordering::SeqCst));
        Ok(())
    }

    fn change(&mut self, what: &str, ipa: u64, size: usize, rights: u8) -> Answer {
        let pages = self.pages(what, ipa, size)?;
        let before = |page: &AtomicU8| page.load(Ordering::SeqCst);
        let mapped_by = &self.mapped_by[pages.clone()];
        let pages = &self.access[pages];
        if pages.iter().any(|page| before(page) == 0) {
            return Err(violation(format!("{what} at {ipa:#x}: nothing is mapped there")));
        }
        if !host().spans && mapped_by.iter().any(|by| *by != mapped_by[0]) {
            return Err(BAD_ARGUMENT);
        }
        let takes_away = pages.iter().any(|page| before(page) & !rights != 0);
        // Where vCPUs cannot be called there is nothing else to make them leave.
        let last_resort = rights == 0 && has_failed("hv_vcpus_exit");
        if takes_away && self.running() > 0 && !last_resort {
            return Err(violation(format!(
                "{what} at {ipa:#x} takes rights away from a running vCPU"
            )));
        }
        pages.iter().for_each(|page| page.store(rights, Ordering::SeqCst));
        if let Some((shared, _)) = &self.shared
            && takes_away
        {
            shared.forget_translations();
        }
        Ok(())
    }
}

/// What the software CPU needs to know of the flags.
fn rights(flags: u64) -> Answer<u8> {
    const READ_EXEC: u64 = hv::HV_MEMORY_READ | hv::HV_MEMORY_EXEC;
    match flags {
        READ_EXEC => Ok(READABLE),
        _ if flags == READ_EXEC | hv::HV_MEMORY_WRITE => Ok(READABLE | WRITABLE),
        _ => Err(violation(format!(
            "memory with rights {flags:#x}: a guest reads and executes its RAM"
        ))),
    }
}

#[unsafe(no_mangle)]
extern "C" fn hv_vm_map(host: *const c_void, ipa: u64, size: usize, flags: u64) -> hv::hv_return_t {
    code(begin("hv_vm_map").and_then(|()| with(|vm| vm.map(host, ipa, size, flags))))
}

#[unsafe(no_mangle)]
extern "C" fn hv_vm_unmap(ipa: u64, size: usize) -> hv::hv_return_t {
    code(begin("hv_vm_unmap").and_then(|()| with(|vm| vm.change("unmapping", ipa, size, 0))))
}

#[unsafe(no_mangle)]
extern "C" fn hv_vm_protect(ipa: u64, size: usize, flags: u64) -> hv::hv_return_t {
    let protect = || with(|vm| vm.change("protecting", ipa, size, rights(flags)?));
    code(begin("hv_vm_protect").and_then(|()| protect()))
}

#[unsafe(no_mangle)]
extern "C" fn hv_vm_config_create() -> *mut c_void {
    Object::VmConfig { ipa_bits: host().default_ipa_bits }.give()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hv_vm_config_get_default_ipa_size(bits: *mut u32) -> hv::hv_return_t {
    // SAFETY: the caller gives a place for the answer.
    unsafe { give("hv_vm_config_get_default_ipa_size", bits, || Ok(host().default_ipa_bits)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hv_vm_config_get_max_ipa_size(bits: *mut u32) -> hv::hv_return_t {
    // SAFETY: the caller gives a place for the answer.
    unsafe { give("hv_vm_config_get_max_ipa_size", bits, || Ok(host().max_ipa_bits)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hv_vm_config_set_ipa_size(config: *mut c_void, bits: u32) -> hv::hv_return_t {
    // SAFETY: the caller owns the configuration.
    let config = unsafe { Object::of(config) };
    let mut set = || match config {
        Some(Object::VmConfig { ipa_bits }) if bits <= host().max_ipa_bits => {
            *ipa_bits = bits;
            Ok(())
        }
        _ => Err(violation(format!("{bits} bits of guest-physical address"))),
    };
    code(begin("hv_vm_config_set_ipa_size").and_then(|()| set()))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hv_vm_create(config: *mut c_void) -> hv::hv_return_t {
    // SAFETY: the caller owns the configuration, or gives none.
    let config = unsafe { Object::of(config) };
    let mut create = || {
        let ipa_bits = match config {
            Some(Object::VmConfig { ipa_bits }) => *ipa_bits,
            None => host().default_ipa_bits,
            Some(_) => return Err(violation("hv_vm_create with an object of another kind")),
        };
        let mut vm = VM.lock();
        if vm.is_some() {
            violation("a second virtual machine in one process");
            return Err(hv::hv_error_t::HV_BUSY as hv::hv_return_t);
        }
        let pages = (WINDOW.end - WINDOW.start) >> PAGE_SHIFT;
        *vm = Some(Vm {
            ipa_bits,
            access: (0..pages).map(|_| AtomicU8::new(0)).collect(),
            mapped_by: vec![0; pages as usize],
            maps: 0,
            delta: None,
            shared: None,
            counter: Arc::new(time::new_counter()),
            offset: None,
            gic: None,
            vcpus: BTreeMap::new(),
            next_vcpu: 0,
            ran: false,
        });
        Ok(())
    };
    code(begin("hv_vm_create").and_then(|()| create()))
}

#[unsafe(no_mangle)]
extern "C" fn hv_vm_destroy() -> hv::hv_return_t {
    let destroy = || {
        let mapped = with(|vm| {
            if !vm.vcpus.is_empty() {
                violation("hv_vm_destroy with vCPUs");
                return Err(hv::hv_error_t::HV_BUSY as hv::hv_return_t);
            }
            Ok(vm.access.iter().any(|page| page.load(Ordering::SeqCst) != 0))
        })?;
        if mapped && !has_failed("hv_vm_unmap") {
            violation("hv_vm_destroy with memory mapped");
        }
        *VM.lock() = None;
        Ok(())
    };
    code(begin("hv_vm_destroy").and_then(|()| destroy()))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hv_vm_get_max_vcpu_count(count: *mut u32) -> hv::hv_return_t {
    // SAFETY: the caller gives a place for the answer.
    unsafe { give("hv_vm_get_max_vcpu_count", count, || Ok(host().max_vcpus)) }
}

/// Whether something lives and may be used; kept here for all who answer for vCPUs.
pub(crate) fn bad_vcpu(vcpu: u64, exists: bool, running: &AtomicBool) -> hv::hv_return_t {
    let why = match (exists, running.load(Ordering::SeqCst)) {
        (false, _) => "after it was destroyed",
        (true, true) => "from another thread while it runs",
        (true, false) => "from another thread than its own",
    };
    violation(format!("vCPU {vcpu} is used {why}"));
    BAD_ARGUMENT
}
