//! How much memory is to be had: what bounds whatever a peer announces (SPEC: SEC-4).
//!
//! Rule: the least of what the host, each control group above this process, and the limits of the process have left.

use std::path::Path;

use rustix::process::{Resource, getrlimit};

/// Bytes of memory that this process can still get. What can't be found out does not bound it.
#[must_use]
pub fn memory_to_be_had() -> u64 {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let host = available(&read("/proc/meminfo"));
    let groups = groups_room(&read("/proc/self/cgroup"), Path::new("/sys/fs/cgroup"));
    [host, groups, limits_room(&read("/proc/self/statm"))]
        .into_iter()
        .flatten()
        .min()
        .unwrap_or(u64::MAX)
}

/// MemAvailable of /proc/meminfo.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// What is left of the limits of the process: RLIMIT_AS, RLIMIT_DATA.
fn limits_room(statm: &str) -> Option<u64> {
    let page = u64::try_from(rustix::param::page_size()).ok()?;
    let mut sizes = statm
        .split_whitespace()
        .map(|pages| pages.parse::<u64>().ok());
    let (whole, data) = (sizes.next().flatten(), sizes.nth(4).flatten());
    let room = |limit, used: Option<u64>| {
        let used = used.unwrap_or(0).saturating_mul(page);
        getrlimit(limit)
            .current
            .map(|most| most.saturating_sub(used))
    };
    [room(Resource::As, whole), room(Resource::Data, data)]
        .into_iter()
        .flatten()
        .min()
}

/// What is left of the control groups' limits, of version 2 and 1, from this process's group to the root.
fn groups_room(groups: &str, root: &Path) -> Option<u64> {
    let mut least = None;
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else {
            continue;
        };
        let (bases, most, used): (&[&str], _, _) = match controllers {
            "" => (&["", "unified"], "memory.max", "memory.current"),
            _ if controllers.split(',').any(|name| name == "memory") => (
                &["memory"],
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
            ),
            _ => continue,
        };
        for base in bases {
            let base = root.join(base);
            let leaf = base.join(path.trim_start_matches('/'));
            for group in leaf
                .ancestors()
                .take_while(|group| group.starts_with(&base))
            {
                // "max" is no number, and no bound.
                let number = |file: &str| -> Option<u64> {
                    std::fs::read_to_string(group.join(file))
                        .ok()?
                        .trim()
                        .parse()
                        .ok()
                };
                let Some(room) =
                    number(most).map(|most| most.saturating_sub(number(used).unwrap_or(0)))
                else {
                    continue;
                };
                least = Some(least.map_or(room, |least: u64| least.min(room)));
            }
        }
    }
    least
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_host_has_is_read_from_its_table() {
        let table = "MemTotal:  24683656 kB\nMemAvailable:   21867260 kB\n";
        assert_eq!(available(table), Some(21_867_260 * 1024));
        assert_eq!(available(""), None);
        assert!(memory_to_be_had() > 0);
    }

    #[test]
    fn each_group_from_here_to_the_root_bounds_it() {
        let root = std::env::temp_dir().join(format!("multifd-ceiling-{}", std::process::id()));
        let group = root.join("outer/inner");
        std::fs::create_dir_all(&group).unwrap();
        let write = |path: &str, text: &str| std::fs::write(root.join(path), text).unwrap();
        write("outer/memory.max", "1000\n");
        write("outer/memory.current", "300\n");
        write("outer/inner/memory.max", "max\n");
        assert_eq!(groups_room("0::/outer/inner\n", &root), Some(700));
        std::fs::create_dir_all(root.join("memory/old")).unwrap();
        write("memory/old/memory.limit_in_bytes", "500");
        write("memory/old/memory.usage_in_bytes", "600");
        let both = "4:memory,cpu:/old\n3:cpuset:/x\n0::/outer/inner\n";
        assert_eq!(groups_room(both, &root), Some(0));
        assert_eq!(groups_room("", &root), None);
        std::fs::remove_dir_all(&root).unwrap();
    }
}
