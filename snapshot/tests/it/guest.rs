//! A machine that has memory, disks and sections, and runs nothing.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use parking_lot::Mutex;
use squib_devices::{
    granules::Frozen,
    memory::{GuestRam, RamStore},
};
use squib_formats::persist::{PersistError, Section};
use squib_snapshot::capture::Guest;
use squib_vmm::{
    config::{BackendKind, DiskConfig, MachineConfig},
    hypervisor::CpuIdentity,
    machine::MachineError,
};
use vm_memory::{Bytes, GuestAddress};

/// What a guest was asked to do, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    Pause,
    Save,
    Resume,
    Stop,
}

pub(crate) struct Still {
    pub(crate) config: MachineConfig,
    pub(crate) ram: GuestRam,
    pub(crate) paused: AtomicBool,
    pub(crate) asked: Mutex<Vec<Asked>>,
    pub(crate) pause_fails: bool,
    pub(crate) save_fails: bool,
}

impl Still {
    /// A running machine with 64 MiB, a writable disk `root` and a read-only disk `data` in `dir`.
    pub(crate) fn new(dir: &Path) -> Self {
        let disk = |id: &str, read_only, bytes: &[u8]| {
            let path = dir.join(id);
            fs::write(&path, bytes).unwrap();
            DiskConfig { id: id.into(), path, read_only }
        };
        let mut root = vec![0; 1 << 20];
        root[700_000..700_005].copy_from_slice(b"squib");
        let disks = vec![disk("root", false, &root), disk("data", true, &[7; 4096])];
        let config =
            MachineConfig { memory: 64 << 20, disks, ..MachineConfig::new("vm", "/boot/Image") };
        let ram = GuestRam::new(config.memory).unwrap();
        for chunk in 0..40u64 {
            let bytes: Vec<u8> = (0..60_000u64).map(|at| (at / (chunk + 1)) as u8).collect();
            ram.write_slice(&bytes, GuestAddress(ram.base() + chunk * 777_777)).unwrap();
        }
        Self {
            config,
            ram,
            paused: AtomicBool::new(false),
            asked: Mutex::default(),
            pause_fails: false,
            save_fails: false,
        }
    }

    pub(crate) fn disk_path(&self, at: usize) -> &PathBuf {
        &self.config.disks[at].path
    }

    pub(crate) fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut *self.asked.lock())
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.config.memory as usize];
        self.ram.read_slice(&mut bytes, GuestAddress(self.ram.base())).unwrap();
        bytes
    }
}

impl Guest for Still {
    fn config(&self) -> &MachineConfig {
        &self.config
    }

    fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Relaxed)
    }

    fn pause(&self, deadline: Duration) -> Result<(), MachineError> {
        self.asked.lock().push(Asked::Pause);
        if self.pause_fails {
            return Err(MachineError::VcpuDeadline { vcpus: vec![0], deadline });
        }
        self.paused.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn resume(&self) -> Result<(), MachineError> {
        self.asked.lock().push(Asked::Resume);
        self.paused.store(false, Ordering::Relaxed);
        Ok(())
    }

    fn stop(&self) {
        self.asked.lock().push(Asked::Stop);
    }

    fn save(&self) -> Result<Vec<Section>, MachineError> {
        self.asked.lock().push(Asked::Save);
        assert!(self.is_paused(), "saved while it runs");
        if self.save_fails {
            let source = PersistError::Save { kind: "serial", why: "it is a test".into() };
            return Err(MachineError::State { instance: "`serial` 0".into(), source });
        }
        let section = |kind: &str, payload: &[u8]| Section {
            kind: kind.into(),
            instance: "0".into(),
            version: 1,
            payload: payload.into(),
        };
        Ok(vec![section("serial", &[1, 2, 3]), section("vcpu", &[9; 500])])
    }

    fn freeze(&self, limit: u64) -> Result<Frozen<RamStore>, MachineError> {
        assert!(self.is_paused(), "frozen while it runs");
        self.ram.granules().freeze(limit).ok_or(MachineError::Frozen)
    }

    fn cpu_identity(&self) -> CpuIdentity {
        CpuIdentity {
            backend: BackendKind::Soft,
            counter_hz: 62_500_000,
            id_registers: vec![(0xc030, 1), (0xc000, 2)],
        }
    }

    fn wall_ns(&self) -> u64 {
        1_767_225_600_000_000_000
    }
}
