//! What the host's operating system says of itself.

/// Memory of the host, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostMemory {
    /// All of it.
    pub total: u64,
    /// What programs can still get without others being swapped out, where the system tells.
    pub available: Option<u64>,
}

/// Name, architecture and, where it can be told, build of this host's operating system.
pub fn name() -> String {
    let name = format!("{} {} {}", std::env::consts::OS, std::env::consts::ARCH, sys::build());
    name.trim_end().to_owned()
}

/// The host's memory, if the system tells.
pub fn memory() -> Option<HostMemory> {
    sys::memory()
}

#[cfg(target_os = "macos")]
pub use sys::value;

#[cfg(target_os = "linux")]
mod sys {
    use super::HostMemory;

    pub(super) fn build() -> String {
        std::fs::read_to_string("/proc/version").unwrap_or_default()
    }

    pub(super) fn memory() -> Option<HostMemory> {
        let text = std::fs::read_to_string("/proc/meminfo").ok()?;
        let field = |name: &str| -> Option<u64> {
            let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
            rest.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
        };
        Some(HostMemory { total: field("MemTotal:")?, available: field("MemAvailable:") })
    }
}

#[cfg(target_os = "macos")]
mod sys {
    use sysctl::{Ctl, Sysctl as _};

    use super::HostMemory;

    /// What `sysctl NAME` prints, if there is such a value.
    pub fn value(name: &str) -> Option<String> {
        let value = Ctl::new(name).ok()?.value_string().ok()?;
        Some(value.trim().to_owned()).filter(|value| !value.is_empty())
    }

    pub(super) fn build() -> String {
        let version = value("kern.osproductversion").unwrap_or_default();
        // The saved state of the framework's interrupt controller holds for one build.
        match value("kern.osversion") {
            Some(build) => format!("{version} ({build})"),
            None => version,
        }
    }

    pub(super) fn memory() -> Option<HostMemory> {
        Some(HostMemory { total: value("hw.memsize")?.parse().ok()?, available: None })
    }
}

#[cfg(not(any(target_os = "linux", target_os = "macos")))]
mod sys {
    use super::HostMemory;

    pub(super) fn build() -> String {
        String::new()
    }

    pub(super) fn memory() -> Option<HostMemory> {
        None
    }
}

#[cfg(test)]
mod tests {
    #[test]
    #[cfg(any(target_os = "linux", target_os = "macos"))]
    fn the_host_names_its_system_and_its_memory() {
        let name = super::name();
        let start = format!("{} {} ", std::env::consts::OS, std::env::consts::ARCH);
        assert!(name.strip_prefix(&start).is_some_and(|build| build.contains('.')), "{name}");
        let memory = super::memory().unwrap();
        assert!(memory.total > 64 << 20, "{memory:?}");
        assert!(memory.available.is_none_or(|available| available <= memory.total), "{memory:?}");
    }
}
