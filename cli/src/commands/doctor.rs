//! `squib doctor`: what of this machine squib can use. Everything is tried or asked when the command runs.

mod places;
mod system;

use std::{fmt, thread::available_parallelism};

use serde::Serialize;
use squib_devices::{map, memory::GuestRam};
use squib_snapshot::host::{self, HostMemory};
use squib_vmm::{
    config::{BackendKind, MachineConfig},
    hypervisor::{self, CpuIdentity, Limits},
    machine::MachineError,
};

use crate::{
    args::DoctorArgs,
    exit::{Code, Result},
    output::{bytes, line, print_json},
};

/// How a property is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    /// As it should be.
    Ok,
    /// Not there.
    Missing,
    /// Worth knowing.
    Note,
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Property {
    name: String,
    status: Status,
    found: String,
    /// What the user can do.
    #[serde(skip_serializing_if = "Option::is_none")]
    advice: Option<String>,
    /// Whether no VM can run if it is missing.
    required: bool,
}

impl Property {
    fn new(name: impl Into<String>, status: Status, found: impl fmt::Display) -> Self {
        let found = found.to_string();
        Self { name: name.into(), status, found, advice: None, required: false }
    }

    fn ok(name: impl Into<String>, found: impl fmt::Display) -> Self {
        Self::new(name, Status::Ok, found)
    }

    fn missing(name: impl Into<String>, found: impl fmt::Display) -> Self {
        Self::new(name, Status::Missing, found)
    }

    fn note(name: impl Into<String>, found: impl fmt::Display) -> Self {
        Self::new(name, Status::Note, found)
    }

    fn advice(self, advice: impl Into<String>) -> Self {
        Self { advice: Some(advice.into()), ..self }
    }

    fn required(self) -> Self {
        Self { required: true, ..self }
    }
}

#[derive(Serialize)]
struct Report {
    version: &'static str,
    /// Whether a VM can run.
    can_run: bool,
    properties: Vec<Property>,
}

pub(crate) fn doctor(args: &DoctorArgs) -> Result<Code> {
    let mut properties = machine();
    properties.push(backend(BackendKind::Soft).required());
    properties.extend([BackendKind::Hvf, BackendKind::Kvm].map(backend));
    properties.extend(system::properties());
    properties.extend(places::properties());
    let can_run = !properties.iter().any(|p| p.required && p.status == Status::Missing);
    if args.json {
        let version = env!("CARGO_PKG_VERSION");
        print_json(&Report { version, can_run, properties })?;
    } else {
        for property in &properties {
            line!("{property}");
        }
        line!("");
        line!("{}", if can_run { "a VM can run" } else { "no VM can run" });
    }
    Ok(if can_run { Code::Done } else { Code::Failed })
}

impl fmt::Display for Property {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let status = match self.status {
            Status::Ok => "ok",
            Status::Missing => "missing",
            Status::Note => "note",
        };
        write!(f, "{status:<8} {:<17} {}", self.name, self.found)?;
        match &self.advice {
            Some(advice) => write!(f, ": {advice}"),
            None => Ok(()),
        }
    }
}

/// What holds on every system.
fn machine() -> Vec<Property> {
    let memory = match host::memory() {
        Some(HostMemory { total, available: Some(free), group: _ }) => {
            let found = format!("{}, {} of it available", bytes(total), bytes(free));
            match free < MachineConfig::new("vm", "").memory {
                true => Property::note("memory", found)
                    .advice("a guest of the default size would be swapped out; end something else"),
                false => Property::ok("memory", found),
            }
        }
        Some(HostMemory { total, .. }) => Property::ok("memory", bytes(total)),
        None => Property::note("memory", "the system does not tell how much there is"),
    };
    let cpus = match available_parallelism() {
        Ok(count) => Property::ok("cpus", count),
        Err(error) => Property::note("cpus", error),
    };
    vec![
        Property::ok("system", host::name()),
        cpus,
        memory,
        Property::ok("page size", bytes(rustix::param::page_size() as u64)),
    ]
}

/// Whether a machine can be had on the backend, and how large: one is made.
fn backend(kind: BackendKind) -> Property {
    let name = format!("backend {kind}");
    let config = MachineConfig { backend: kind, ..MachineConfig::new("vm", "") };
    match try_out(&config) {
        Ok((CpuIdentity { counter_hz, .. }, Limits { vcpus, memory })) => {
            let mhz = counter_hz as f64 / 1e6;
            let memory = bytes(memory);
            let found = format!("at most {vcpus} vCPUs and {memory}; a counter of {mhz} MHz");
            Property::ok(name, found)
        }
        Err(error) => Property::missing(name, error).advice(match kind {
            BackendKind::Hvf if cfg!(all(target_os = "macos", target_arch = "aarch64")) => {
                system::SIGN
            }
            _ => "use --backend soft",
        }),
    }
}

fn try_out(config: &MachineConfig) -> Result<(CpuIdentity, Limits), MachineError> {
    let (identity, limits) = (hypervisor::identity(config)?, hypervisor::limits(config)?);
    let size = map::RAM_MIN;
    let ram = GuestRam::new(size).map_err(|source| MachineError::Memory { size, source })?;
    drop(hypervisor::create(config, &ram)?);
    Ok((identity, limits))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_property_is_one_line_with_what_to_do() {
        let property = Property::missing("kvm", "there is no /dev/kvm").advice("load the module");
        assert_eq!(
            property.to_string(),
            "missing  kvm               there is no /dev/kvm: load the module"
        );
        assert!(!Property::ok("cpus", 2).to_string().contains('\n'));
    }
}
