//! The virtual machine and its vCPUs, from their creation until the framework has taken them back.
//!
//! `applevisor` destroys both when its objects are dropped; but it panics where a vCPU cannot be destroyed,
//! and says nothing where the virtual machine cannot. A panic would end the vCPU's thread in place of the
//! error, and catching it would still print it. So those objects are never dropped here, and destroying is
//! done by hand. What leaks are the counters behind their guards: some bytes a vCPU.

use std::{mem::ManuallyDrop, ops::Deref, sync::Arc};

use applevisor::prelude::{
    GicConfig, GicEnabled, HypervisorError as Code, Vcpu as Cpu, VcpuHandle, VirtualMachine,
    VirtualMachineConfig, VirtualMachineInstance,
};
use parking_lot::Mutex;
use squib_devices::memory::GuestRam;

use super::{
    error::{CREATING_VM, Doing, HvfError},
    sys,
};

/// RAM of a virtual machine that could not be destroyed, which the framework may still have mapped.
static LEFT: Mutex<Option<GuestRam>> = Mutex::new(None);

/// The one virtual machine of the process.
pub(super) struct OwnedVm {
    vm: ManuallyDrop<VirtualMachineInstance<GicEnabled>>,
    ram: GuestRam,
}

impl OwnedVm {
    /// Takes back first what an earlier machine of this process could not.
    pub(super) fn create(
        config: VirtualMachineConfig,
        chip: GicConfig,
        ram: &GuestRam,
    ) -> Result<Self, HvfError> {
        let mut left = LEFT.lock();
        if left.is_some()
            && let Err(code) = sys::destroy_vm()
            && code != Code::NoDevice
        {
            return Err(HvfError::Left { code });
        }
        let vm = VirtualMachine::with_gic(config, chip).doing(|| CREATING_VM.to_owned())?;
        // There can only be one.
        *left = None;
        Ok(Self { vm: ManuallyDrop::new(vm), ram: ram.clone() })
    }

    /// Makes vCPU `index`, which belongs to this thread.
    pub(super) fn create_vcpu(&self, index: u32) -> Result<OwnedCpu, HvfError> {
        let cpu = self.vcpu_create().doing(|| format!("creating vCPU {index}"))?;
        let door = Arc::new(Door { index, handle: Mutex::new(Some(cpu.get_handle())) });
        Ok(OwnedCpu { door, cpu: ManuallyDrop::new(cpu) })
    }
}

impl Deref for OwnedVm {
    type Target = VirtualMachineInstance<GicEnabled>;

    fn deref(&self) -> &Self::Target {
        &self.vm
    }
}

impl Drop for OwnedVm {
    /// All vCPUs are gone.
    fn drop(&mut self) {
        if let Err(code) = sys::destroy_vm() {
            tracing::error!(
                "the virtual machine cannot be destroyed, and keeps its memory: {code}"
            );
            *LEFT.lock() = Some(self.ram.clone());
        }
    }
}

/// A vCPU, on the thread that made it.
pub(super) struct OwnedCpu {
    door: Arc<Door>,
    cpu: ManuallyDrop<Cpu>,
}

impl OwnedCpu {
    /// The way to call it out of the guest.
    pub(super) fn door(&self) -> Arc<Door> {
        Arc::clone(&self.door)
    }
}

impl Deref for OwnedCpu {
    type Target = Cpu;

    fn deref(&self) -> &Cpu {
        &self.cpu
    }
}

impl Drop for OwnedCpu {
    fn drop(&mut self) {
        // Before it is destroyed: the framework may give its number to another one.
        *self.door.handle.lock() = None;
        if let Err(code) = sys::destroy_vcpu(&self.cpu) {
            tracing::error!("vCPU {} cannot be destroyed: {code}", self.door.index);
        }
    }
}

/// A vCPU as other threads see it, while it exists.
pub(super) struct Door {
    /// The vCPU's number.
    pub(super) index: u32,
    handle: Mutex<Option<VcpuHandle>>,
}

impl Door {
    /// Makes the vCPU leave the guest, now or when it next enters.
    pub(super) fn call_out(&self, vm: &OwnedVm) -> Result<(), Code> {
        match &*self.handle.lock() {
            Some(handle) => vm.vcpus_exit(std::slice::from_ref(handle)),
            None => Ok(()),
        }
    }
}
