//! What only one operating system has.

#[cfg(target_os = "linux")]
pub(super) use linux::properties;
#[cfg(target_os = "macos")]
pub(super) use macos::properties;

use rustix::process::{Resource, Rlimit, getrlimit};

use super::Property;
use crate::output::bytes;

/// What a program that may not use Hypervisor.framework needs.
pub(super) const SIGN: &str = "sign it: codesign --force --sign - --entitlements cli/squib.entitlements SQUIB, or \
     cli/sign SQUIB (docs/macos.md)";
/// A VM opens about this many files besides its disks, at two a disk.
const FILES: u64 = 128;
/// Memory of a guest of the default size, with squib's own.
const ADDRESS_SPACE: u64 = 1 << 30;

/// The limits of this process, which a VM of this user inherits.
fn limits() -> Vec<Property> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let most = |limit: Option<u64>| limit.map_or("unlimited".to_owned(), |n| n.to_string());
    let found = format!("{} open files, at most {}", most(current), most(maximum));
    let files = match current {
        Some(files) if files < FILES => {
            Property::note("limit of files", found).advice(format!("`ulimit -n {FILES}` or more"))
        }
        _ => Property::ok("limit of files", found),
    };
    let size = |name: &str, flag: &str, resource, least| {
        let limit = getrlimit(resource).current;
        let found = limit.map_or("none".to_owned(), bytes);
        match limit {
            Some(limit) if limit < least => {
                Property::note(name, found).advice(format!("`ulimit {flag} unlimited`"))
            }
            _ => Property::ok(name, found),
        }
    };
    vec![
        files,
        size("limit of memory", "-v", Resource::As, ADDRESS_SPACE),
        // A disk or an image of a snapshot is one file.
        size("limit of a file", "-f", Resource::Fsize, u64::MAX),
    ]
}

#[cfg(target_os = "linux")]
mod linux {
    use std::{
        fs::{self, File},
        io::ErrorKind,
    };

    use super::{Property, limits};

    const KVM: &str = "/dev/kvm";
    const HUGE_PAGES: &str = "/sys/kernel/mm/transparent_hugepage/enabled";
    const OVERCOMMIT: &str = "/proc/sys/vm/overcommit_memory";
    const PAGEMAP: &str = "/proc/self/pagemap";

    pub(in super::super) fn properties() -> Vec<Property> {
        let mut properties = vec![kvm(), huge_pages(), overcommit(), pagemap()];
        properties.extend(limits());
        properties
    }

    fn kvm() -> Property {
        let opened = File::options().read(true).write(true).open(KVM);
        let unused = "squib does not use it in this version";
        match opened {
            Ok(_) => Property::note("kvm", format!("{KVM} is there; {unused}")),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                Property::note("kvm", format!("there is no {KVM}; {unused}"))
            }
            Err(error) => Property::note("kvm", format!("{KVM}: {error}; {unused}")),
        }
    }

    /// Guest memory is one large mapping.
    fn huge_pages() -> Property {
        let name = "huge pages";
        match fs::read_to_string(HUGE_PAGES).ok().as_deref().and_then(chosen) {
            Some("never") => Property::note(name, "never").advice(format!(
                "guest memory is slower with small pages; write `madvise` or `always` to {HUGE_PAGES}"
            )),
            Some(mode) => Property::ok(name, mode),
            None => Property::note(name, "this kernel does not tell"),
        }
    }

    /// The word in brackets.
    pub(super) fn chosen(text: &str) -> Option<&str> {
        let (_, rest) = text.split_once('[')?;
        Some(rest.split_once(']')?.0)
    }

    fn overcommit() -> Property {
        let name = "overcommit";
        let mode = fs::read_to_string(OVERCOMMIT).unwrap_or_default();
        match mode.trim() {
            "2" => Property::note(name, "strict").advice(
                "the memory of every VM counts as a whole, used or not; \
                 `sysctl vm.overcommit_memory=0` lets it grow as it is used",
            ),
            "0" | "1" => Property::ok(name, "memory of VMs counts as it is used"),
            _ => Property::note(name, "this kernel does not tell"),
        }
    }

    /// Memory that the guest never touched is told from it.
    fn pagemap() -> Property {
        let name = "untouched memory";
        match File::open(PAGEMAP) {
            Ok(_) => Property::ok(name, "is known, and not read for a snapshot"),
            Err(error) => {
                Property::note(name, format!("is read for a snapshot ({PAGEMAP}: {error})"))
            }
        }
    }
}

#[cfg(target_os = "macos")]
mod macos {
    use std::process::{Command, Stdio};

    use squib_snapshot::host::value;

    use super::{Property, SIGN, entitled, limits, major};

    /// Of macOS, which has the interrupt chip in the framework from then on.
    const LEAST: u32 = 15;

    pub(in super::super) fn properties() -> Vec<Property> {
        let mut properties = vec![version(), chip(), hypervisor(), entitlement()];
        properties.extend(limits());
        properties
    }

    fn version() -> Property {
        let name = "macOS";
        match value("kern.osproductversion") {
            Some(version) if major(&version).is_some_and(|major| major < LEAST) => {
                Property::missing(name, version).advice(format!("squib needs macOS {LEAST}"))
            }
            Some(version) => Property::ok(name, version),
            None => Property::note(name, "the version cannot be told"),
        }
    }

    fn chip() -> Property {
        let name = "chip";
        let brand = value("machdep.cpu.brand_string").unwrap_or("unknown".to_owned());
        let yes = |name: &str| value(name).as_deref() == Some("1");
        match (yes("sysctl.proc_translated"), yes("hw.optional.arm64")) {
            (true, _) => Property::missing(name, format!("{brand}, and squib runs under Rosetta"))
                .advice("build it for aarch64-apple-darwin"),
            (false, true) => Property::ok(name, brand),
            (false, false) => Property::missing(name, format!("{brand}, not Apple silicon"))
                .advice("the hvf backend needs it; soft does not"),
        }
    }

    fn hypervisor() -> Property {
        let name = "hypervisor";
        match value("kern.hv_support").as_deref() {
            Some("1") => Property::ok(name, "Hypervisor.framework is supported (kern.hv_support)"),
            Some(_) => Property::missing(name, "kern.hv_support is 0").advice(
                "Hypervisor.framework cannot be used here; in a VM, its host must allow nesting",
            ),
            None => Property::note(name, "this system has no kern.hv_support"),
        }
    }

    /// Whether this very executable may use Hypervisor.framework.
    fn entitlement() -> Property {
        let name = "entitlement";
        let executable = match std::env::current_exe() {
            Ok(path) => path,
            Err(error) => return Property::note(name, format!("own executable: {error}")),
        };
        let asked = Command::new("/usr/bin/codesign")
            .args(["--display", "--entitlements", "-", "--xml"])
            .arg(&executable)
            .stdin(Stdio::null())
            .output();
        match asked {
            Ok(out) if out.status.success() => {
                match entitled(&String::from_utf8_lossy(&out.stdout)) {
                    true => Property::ok(name, "com.apple.security.hypervisor"),
                    false => {
                        Property::missing(name, "com.apple.security.hypervisor is not signed in")
                            .advice(SIGN)
                    }
                }
            }
            Ok(out) => {
                let said = String::from_utf8_lossy(&out.stderr);
                let said = said.lines().next().unwrap_or("codesign failed").to_owned();
                Property::missing(name, said).advice(SIGN)
            }
            Err(error) => Property::note(name, format!("/usr/bin/codesign: {error}")),
        }
    }
}

/// Whether the property list, as `codesign` writes it, claims the hypervisor.
#[cfg(any(target_os = "macos", test))]
fn entitled(list: &str) -> bool {
    let Some((_, rest)) = list.split_once("<key>com.apple.security.hypervisor</key>") else {
        return false;
    };
    rest.trim_start().starts_with("<true/>")
}

/// The first number of a version.
#[cfg(any(target_os = "macos", test))]
fn major(version: &str) -> Option<u32> {
    version.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_entitlements_of_this_repository_claim_the_hypervisor() {
        let list = include_str!("../../../squib.entitlements");
        assert!(entitled(list));
        assert!(entitled(&list.replace('\n', "").replace("  ", "")), "codesign writes one line");
        assert!(!entitled(&list.replace("<true/>", "<false/>")));
        assert!(!entitled(""));
    }

    #[test]
    fn the_first_number_of_a_version_counts() {
        assert_eq!(major("15.1.1"), Some(15));
        assert_eq!(major("26"), Some(26));
        assert_eq!(major(""), None);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn the_chosen_word_is_the_one_in_brackets() {
        assert_eq!(linux::chosen("always [madvise] never\n"), Some("madvise"));
        assert_eq!(linux::chosen("always"), None);
    }
}
