//! A machine's configuration to and from the manifest.

use std::path::Path;

use squib_formats::manifest::{
    self, DeterministicInfo, DiskRecord, MachineInfo, Manifest, Operation,
};
use squib_vmm::{
    config::{ConfigError, Deterministic, DiskConfig, MachineConfig},
    hypervisor,
};

/// The manifest's form of `config`; `disks` are the records of its disks in their order.
pub(crate) fn to_manifest(
    config: &MachineConfig,
    disks: Vec<DiskRecord>,
) -> (MachineInfo, Operation) {
    let MachineConfig {
        name,
        memory,
        vcpus,
        kernel,
        kernel_digest,
        initrd,
        initrd_digest,
        cmdline,
        disks: _,
        rng,
        backend,
        deterministic,
        on_reset,
    } = config;
    // Where the kernel came from is for people: a path that is not text may lose its odd characters.
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let machine = MachineInfo {
        name: name.clone(),
        memory_size: *memory,
        vcpus: *vcpus,
        cmdline: cmdline.clone(),
        kernel: text(kernel),
        kernel_digest: *kernel_digest,
        initrd: initrd.as_deref().map(text),
        disks,
        rng: *rng,
        backend: backend.name().to_owned(),
        deterministic: deterministic
            .map(|Deterministic { seed, epoch }| DeterministicInfo { seed, epoch }),
    };
    (machine, Operation { on_reset: *on_reset, initrd_digest: *initrd_digest })
}

/// The configuration in a manifest, checked as a user's would be. Its disks have the paths of the
/// manifest. A manifest from before format 1.4 does not say what the operator chose: that is the default.
pub(crate) fn from_manifest(manifest: &Manifest) -> Result<MachineConfig, ConfigError> {
    let operation = manifest.operation.clone().unwrap_or_default();
    from_parts(&manifest.machine, operation)
}

fn from_parts(machine: &MachineInfo, operation: Operation) -> Result<MachineConfig, ConfigError> {
    let Operation { on_reset, initrd_digest } = operation;
    let MachineInfo {
        name,
        memory_size,
        vcpus,
        cmdline,
        kernel,
        kernel_digest,
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
        kernel_digest: *kernel_digest,
        initrd: initrd.as_ref().map(Into::into),
        initrd_digest,
        cmdline: cmdline.clone(),
        disks: disks.collect(),
        rng: *rng,
        backend: backend.parse()?,
        deterministic: deterministic
            .map(|DeterministicInfo { seed, epoch }| Deterministic { seed, epoch }),
        on_reset,
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
    use squib_formats::{digest::Digest, manifest::OnReset};

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
            kernel_digest: Some(Digest([1; 32])),
            initrd: Some("/boot/initrd".into()),
            initrd_digest: Some(Digest([2; 32])),
            on_reset: OnReset::Restart,
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
            digest: Digest([0; 32]),
        });
        let (machine, operation) = to_manifest(&config, records.collect());
        assert_eq!(from_parts(&machine, operation).unwrap(), config);
    }

    #[test]
    fn a_configuration_that_no_user_could_give_is_refused() {
        let (good, operation) = to_manifest(&MachineConfig::new("vm", "/boot/Image"), vec![]);
        for bad in [
            MachineInfo { name: "../vm".into(), ..good.clone() },
            MachineInfo { vcpus: 0, ..good.clone() },
            MachineInfo { memory_size: 1 << 60, ..good.clone() },
            MachineInfo { backend: "qemu".into(), ..good.clone() },
        ] {
            from_parts(&bad, operation.clone()).unwrap_err();
        }
    }
}
