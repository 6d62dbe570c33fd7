//! What the host's operating system says of itself.

#[cfg(target_os = "linux")]
mod cgroup;

/// Memory of the host, or what a control group leaves this process of it, in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostMemory {
    /// All of it.
    pub total: u64,
    /// What this process can still get without others being swapped out, where the system tells.
    pub available: Option<u64>,
    /// The control group that allows less than the host has.
    pub group: Option<String>,
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
    use std::path::Path;

    use super::{
        HostMemory,
        cgroup::{self, Limit},
    };

    pub(super) fn build() -> String {
        std::fs::read_to_string("/proc/version").unwrap_or_default()
    }

    pub(super) fn memory() -> Option<HostMemory> {
        let text = std::fs::read_to_string("/proc/meminfo").ok()?;
        let field = |name: &str| -> Option<u64> {
            let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
            rest.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
        };
        let host = HostMemory {
            total: field("MemTotal:")?,
            available: field("MemAvailable:"),
            group: None,
        };
        let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let limits = cgroup::limits(Path::new("/sys/fs/cgroup"), &groups);
        Some(limits.into_iter().fold(host, narrowed))
    }

    fn narrowed(host: HostMemory, limit: Limit) -> HostMemory {
        let Limit { total, available, group } = limit;
        HostMemory {
            total: host.total.min(total),
            available: Some(host.available.map_or(available, |free| free.min(available))),
            group: if total < host.total { Some(group.display().to_string()) } else { host.group },
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn the_narrowest_limit_counts() {
            let host = HostMemory { total: 1000, available: Some(500), group: None };
            let limit =
                |total, available, group: &str| Limit { total, available, group: group.into() };
            let wide = narrowed(host.clone(), limit(2000, 100, "/wide"));
            assert_eq!(wide, HostMemory { available: Some(100), ..host.clone() });
            let narrow = narrowed(host.clone(), limit(800, 700, "/narrow"));
            let group = Some("/narrow".to_owned());
            assert_eq!(narrow, HostMemory { total: 800, available: Some(500), group });
            let unknown = narrowed(HostMemory { available: None, ..host }, limit(800, 700, "/g"));
            assert_eq!(unknown.available, Some(700));
        }
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
        let total: u64 = value("hw.memsize")?.parse().ok()?;
        // The share of memory that is free, in percent: what the command `memory_pressure` prints.
        let free = value("kern.memorystatus_level").and_then(|level| level.parse::<u64>().ok());
        let available = free.filter(|level| *level <= 100).map(|level| total / 100 * level);
        Some(HostMemory { total, available, group: None })
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
