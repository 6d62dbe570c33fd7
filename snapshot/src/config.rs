//! A machine's configuration to and from the manifest.

use std::path::Path;

use squib_formats::manifest::{self, DeterministicInfo, DiskRecord, MachineInfo};
use squib_vmm::{
    config::{ConfigError, Deterministic, DiskConfig, MachineConfig},
    hypervisor,
};

/// The manifest's form of `config`; `disks` are the records of its disks in their order.
pub(crate) fn to_manifest(config: &MachineConfig, disks: Vec<DiskRecord>) -> MachineInfo {
    let MachineConfig {
        name,
        memory,
        vcpus,
        kernel,
        initrd,
        cmdline,
        disks: _,
        rng,
        backend,
        deterministic,
    } = config;
    // Where the kernel came from is for people: a path that is not text may lose its odd characters.
    let text = |path: &Path| path.to_string_lossy().into_owned();
    MachineInfo {
        name: name.clone(),
        memory_size: *memory,
        vcpus: *vcpus,
        cmdline: cmdline.clone(),
        kernel: text(kernel),
        kernel_digest: None,
        initrd: initrd.as_deref().map(text),
        disks,
        rng: *rng,
        backend: backend.name().to_owned(),
        deterministic: deterministic
            .map(|Deterministic { seed, epoch }| DeterministicInfo { seed, epoch }),
    }
}

/// The configuration in a manifest, checked as a user's would be. Its disks have the paths of the
/// manifest.
pub(crate) fn from_manifest(machine: &MachineInfo) -> Result<MachineConfig, ConfigError> {
    let MachineInfo {
        name,
        memory_size,
        vcpus,
        cmdline,
        kernel,
        kernel_digest: _,
        initrd,
        disks,
        rng,
        backend,
        deterministic,
    } = machine;
    let disks = disks.iter().map(|disk| DiskConfig {
        id: disk.id.clone(),
        path: disk.path.clone().into(),
        read_only: disk.read_only,
    });
    let config = MachineConfig {
        name: name.clone(),
        memory: *memory_size,
        vcpus: *vcpus,
        kernel: kernel.into(),
        initrd: initrd.as_ref().map(Into::into),
        cmdline: cmdline.clone(),
        disks: disks.collect(),
        rng: *rng,
        backend: backend.parse()?,
        deterministic: deterministic
            .map(|DeterministicInfo { seed, epoch }| Deterministic { seed, epoch }),
    };
    config.validate()?;
    Ok(config)
}

/// The manifest's form of a CPU's identity.
pub(crate) fn identity(identity: hypervisor::CpuIdentity) -> manifest::CpuIdentity {
    let hypervisor::CpuIdentity { backend, counter_hz, mut id_registers } = identity;
    id_registers.sort_unstable();
    let backend = backend.name().to_owned();
    manifest::CpuIdentity { backend, id_registers, counter_frequency: counter_hz }
}

/// The manifest's form of what is known of the host's system.
pub(crate) fn host_backend(host: hypervisor::HostSystem) -> manifest::HostBackend {
    let hypervisor::HostSystem { build, unreadable } = host;
    manifest::HostBackend { build, unreadable }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_comes_back_from_the_manifest_whole() {
        let disk = |id: &str, read_only| DiskConfig {
            id: id.into(),
            path: format!("/disks/{id}").into(),
            read_only,
        };
        let config = MachineConfig {
            memory: 128 << 20,
            initrd: Some("/boot/initrd".into()),
            disks: vec![disk("root", false), disk("data", true)],
            deterministic: Some(Deterministic { seed: 7, epoch: 8 }),
            ..MachineConfig::new("vm", "/boot/Image")
        };
        let records = config.disks.iter().map(|disk| DiskRecord {
            id: disk.id.clone(),
            path: disk.path.display().to_string(),
            size: 512,
            read_only: disk.read_only,
            storage: manifest::DiskStorage::Captured,
            digest: squib_formats::digest::Digest([0; 32]),
        });
        let manifest = to_manifest(&config, records.collect());
        assert_eq!(from_manifest(&manifest).unwrap(), config);
    }

    #[test]
    fn a_configuration_that_no_user_could_give_is_refused() {
        let good = to_manifest(&MachineConfig::new("vm", "/boot/Image"), vec![]);
        for bad in [
            MachineInfo { name: "../vm".into(), ..good.clone() },
            MachineInfo { vcpus: 0, ..good.clone() },
            MachineInfo { memory_size: 1 << 60, ..good.clone() },
            MachineInfo { backend: "qemu".into(), ..good.clone() },
        ] {
            from_manifest(&bad).unwrap_err();
        }
    }
}
