//! `squib run`.

mod inputs;

use std::{path::Path, time::Instant};

use squib_snapshot::host;
use squib_vmm::{
    config::{BackendKind, Deterministic, DiskConfig, MachineConfig},
    hypervisor::HypervisorError,
    machine::{Machine, MachineError},
};

use self::inputs::Boot;
use crate::{
    args::{DiskArg, RunArgs},
    exit::{Code, Failure, Result, WithCode},
    output::{bytes, say},
    session::Session,
};

pub(crate) fn run(args: RunArgs, started: Instant) -> Result<Code> {
    let config = config(&args)?;
    let name = config.name.clone();
    // The user named the files: what is there now boots, as after a reset of a real machine.
    let reboot = |config: &mut MachineConfig| {
        (config.kernel_digest, config.initrd_digest) = (None, None);
        Ok(())
    };
    let session =
        Session { name: &name, args: &args.common, started, reboot: &reboot, paused: false };
    session.run(&mut |console, _dir, phases| {
        let machine = Machine::boot(config.clone(), console).map_err(failure)?;
        phases.end("load kernel and initrd");
        Ok(machine)
    })
}

/// The failure of a machine that cannot be made.
pub(crate) fn failure(error: MachineError) -> Failure {
    Failure::new(code(&error), error)
}

/// The exit code of a machine that cannot be made.
pub(crate) fn code(error: &MachineError) -> Code {
    match error {
        MachineError::Config(_)
        | MachineError::Boot(_)
        | MachineError::Granule { .. }
        | MachineError::Disk(_) => Code::Usage,
        MachineError::State { .. }
        | MachineError::UnknownSection { .. }
        | MachineError::MissingSection { .. }
        | MachineError::DuplicateSection { .. }
        // What a vCPU or the interrupt controller does not take, or a chunk that cannot be had.
        | MachineError::Hypervisor(HypervisorError::State(_) | HypervisorError::Memory(_)) => {
            Code::Snapshot
        }
        _ => Code::Failed,
    }
}

fn config(args: &RunArgs) -> Result<MachineConfig> {
    let disks = args
        .disks
        .iter()
        .enumerate()
        .map(|(at, disk)| disk_config(at, disk))
        .collect::<Result<Vec<_>>>()?;
    inputs::check_twice(&disks)?;
    for (arg, disk) in args.disks.iter().zip(&disks) {
        if !arg.raw {
            inputs::check_raw(&disk.path)?;
        }
    }
    let Boot { kernel, initrd, cmdline } = Boot::choose(args, &disks)?;
    let config = MachineConfig {
        memory: args.memory.0,
        vcpus: args.cpus,
        initrd,
        cmdline,
        disks,
        backend: backend(&args.backend)?,
        deterministic: args
            .deterministic
            .then(|| Deterministic { seed: args.seed, ..Deterministic::default() }),
        on_reset: args.on_reset.into(),
        ..MachineConfig::new(
            args.name.clone().unwrap_or_else(|| format!("vm-{}", std::process::id())),
            kernel,
        )
    };
    config.validate().code(Code::Usage)?;
    warn_of_memory(config.memory);
    Ok(config)
}

/// Says that the host has less memory than the guest may use. Guests seldom use all of it.
fn warn_of_memory(memory: u64) {
    if let Some(host) = host::memory()
        && memory > host.total
    {
        say!(
            "squib: the guest has {} of memory, this host {}: a guest that uses it all brings the host down",
            bytes(memory),
            bytes(host.total)
        );
    }
}

fn disk_config(at: usize, disk: &DiskArg) -> Result<DiskConfig> {
    // The name that Linux gives it, as long as letters last.
    let id = disk.id.clone().unwrap_or_else(|| match u8::try_from(at) {
        Ok(at @ 0..26) => format!("vd{}", char::from(b'a' + at)),
        _ => format!("disk{at}"),
    });
    Ok(DiskConfig { id, path: absolute(&disk.path)?, read_only: disk.read_only })
}

/// A backend by its name.
pub(crate) fn backend(name: &str) -> Result<BackendKind> {
    name.parse().code(Code::Usage)
}

/// Paths go into snapshots, where the working directory of today means nothing.
pub(crate) fn absolute(path: &Path) -> Result<std::path::PathBuf> {
    std::path::absolute(path).code(Code::Usage)
}
