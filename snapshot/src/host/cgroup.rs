//! What the control groups of this process leave it of the host's memory (Linux, cgroups v1 and v2).

use std::{
    fs,
    path::{Path, PathBuf},
};

/// A limit that a control group sets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Limit {
    /// Most bytes that the processes of the group may have.
    pub(super) total: u64,
    /// What is left of them; what the group keeps in the page cache can be had back.
    pub(super) available: u64,
    /// The group's folder.
    pub(super) group: PathBuf,
}

/// Names of the files of a version.
struct Files {
    limit: &'static str,
    usage: &'static str,
    /// Fields of `memory.stat` that count page cache.
    cache: [&'static str; 2],
}

const V1: Files = Files {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    cache: ["total_inactive_file", "total_active_file"],
};
const V2: Files =
    Files { limit: "memory.max", usage: "memory.current", cache: ["inactive_file", "active_file"] };

/// The narrowest limits of the groups that `groups`, the text of `/proc/self/cgroup`, names below `mount`,
/// where the hierarchies are mounted. A group's limit holds for all below it.
pub(super) fn limits(mount: &Path, groups: &str) -> Vec<Limit> {
    let mut found = Vec::new();
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) =
            (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let (root, files) = match controllers {
            "" if mount.join("unified").is_dir() => (mount.join("unified"), V2),
            "" => (mount.to_owned(), V2),
            list if list.split(',').any(|name| name == "memory") => (mount.join("memory"), V1),
            _ => continue,
        };
        // In a namespace of its own a process may see paths that are above its root.
        let inside = path.trim_start_matches('/');
        let below = !Path::new(inside).components().any(|part| part.as_os_str() == "..");
        let mut group = if below { root.join(inside) } else { root.clone() };
        while group.starts_with(&root) {
            found.extend(limit(&group, &files));
            if !group.pop() {
                break;
            }
        }
    }
    found
}

fn limit(group: &Path, files: &Files) -> Option<Limit> {
    let read = |name: &str| fs::read_to_string(group.join(name)).ok();
    // "max" is no limit in version 2, a number near 2^63 in version 1.
    let total = read(files.limit)?.trim().parse::<u64>().ok().filter(|limit| *limit < 1 << 60)?;
    let used = read(files.usage)?.trim().parse::<u64>().ok()?;
    let stat = read("memory.stat").unwrap_or_default();
    let field = |name: &str| -> Option<u64> {
        let value = stat.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
        value.trim().parse().ok()
    };
    let cache = files.cache.iter().filter_map(|name| field(name)).fold(0, u64::saturating_add);
    let available = total.saturating_sub(used.saturating_sub(cache));
    Some(Limit { total, available, group: group.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(dir: &Path, path: &str, files: &[(&str, &str)]) {
        fs::create_dir_all(dir.join(path)).unwrap();
        for (name, text) in files {
            fs::write(dir.join(path).join(name), text).unwrap();
        }
    }

    #[test]
    fn a_group_of_version_2_and_those_above_it_limit_a_process() {
        let dir = tempfile::tempdir().unwrap();
        let unlimited = [("memory.max", "max\n"), ("memory.current", "5\n")];
        group(dir.path(), "", &unlimited);
        let stat = "anon 700\ninactive_file 100\nactive_file 50\nfile 150\n";
        let limited =
            [("memory.max", "1000\n"), ("memory.current", "850\n"), ("memory.stat", stat)];
        group(dir.path(), "user.slice", &limited);
        group(dir.path(), "user.slice/vm", &unlimited);
        let found = limits(dir.path(), "0::/user.slice/vm\n");
        let group = dir.path().join("user.slice");
        assert_eq!(found, [Limit { total: 1000, available: 300, group }]);
        assert!(limits(dir.path(), "0::/\n").is_empty());
        assert!(limits(dir.path(), "0::/../elsewhere\n").is_empty());
    }

    #[test]
    fn a_group_of_version_1_limits_a_process() {
        let dir = tempfile::tempdir().unwrap();
        let none =
            [("memory.limit_in_bytes", "9223372036854771712\n"), ("memory.usage_in_bytes", "7\n")];
        group(dir.path(), "memory", &none);
        let limited = [
            ("memory.limit_in_bytes", "4096\n"),
            ("memory.usage_in_bytes", "5000\n"),
            ("memory.stat", "inactive_file 9\ntotal_inactive_file 1000\n"),
        ];
        group(dir.path(), "memory/docker/id", &limited);
        let text = "12:cpu,cpuacct:/docker/id\n11:memory:/docker/id\n0::/\n";
        let found = limits(dir.path(), text);
        let group = dir.path().join("memory/docker/id");
        assert_eq!(found, [Limit { total: 4096, available: 96, group }]);
    }

    #[test]
    fn files_that_say_nothing_limit_nothing() {
        let dir = tempfile::tempdir().unwrap();
        group(dir.path(), "", &[("memory.max", "many\n"), ("memory.current", "0\n")]);
        for text in ["", "0::", "nonsense", "0::/\n", "1:memory:/x\n", "::::\n"] {
            assert!(limits(dir.path(), text).is_empty(), "{text}");
        }
        group(dir.path(), "", &[("memory.max", "1000\n")]);
        fs::remove_file(dir.path().join("memory.current")).unwrap();
        assert!(limits(dir.path(), "0::/\n").is_empty());
    }
}
