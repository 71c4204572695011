//! What the memory control groups of this process have left, of version 2 and of version 1.
//!
//! Source: `Documentation/admin-guide/cgroup-v2.rst` and `cgroup-v1/memory.rst`. Page cache counts as used there, but the kernel takes
//! it back before it kills anybody, so it counts as left here.

use std::fs;
use std::path::{Path, PathBuf};

/// A limit above this is none: version 1 writes a number near 2^63.
const LIMIT_BYTES_MAX: u64 = 1 << 60;

/// The names of a version's files.
struct Names {
    limit: &'static str,
    used: &'static str,
    /// Page cache, in `memory.stat`.
    cache: [&'static str; 2],
}

const VERSION_2: Names = Names {
    limit: "memory.max",
    used: "memory.current",
    cache: ["inactive_file", "active_file"],
};
const VERSION_1: Names = Names {
    limit: "memory.limit_in_bytes",
    used: "memory.usage_in_bytes",
    cache: ["total_inactive_file", "total_active_file"],
};

/// Each control group above this process that has a limit: its name, and how many bytes it has left.
pub(super) fn left() -> Vec<(String, u64)> {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    left_of(&read("/proc/self/cgroup"), &read("/proc/self/mountinfo"))
}

fn left_of(cgroup: &str, mounts: &str) -> Vec<(String, u64)> {
    let mut found = Vec::new();
    for line in cgroup.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next())
        else {
            continue;
        };
        let (names, kind, option) = match controllers {
            "" => (VERSION_2, "cgroup2", None),
            list if list.split(',').any(|one| one == "memory") => {
                (VERSION_1, "cgroup", Some("memory"))
            }
            _ => continue,
        };
        let Some((root, mount)) = mounts.lines().find_map(|line| mounted(line, kind, option))
        else {
            continue;
        };
        // Seen from inside a container the path may begin above what is mounted.
        let inside = Path::new(path).strip_prefix(&root).unwrap_or(Path::new(""));
        for group in inside.ancestors() {
            let name = Path::new("/").join(group);
            let left = left_in(&mount.join(group), &names);
            found.extend(left.map(|left| (format!("the control group {}", name.display()), left)));
        }
    }
    found
}

/// The root and the mount point, if the line of `mountinfo` is of a file system of this kind, with this option.
fn mounted(line: &str, kind: &str, option: Option<&str>) -> Option<(PathBuf, PathBuf)> {
    let (mount, system) = line.split_once(" - ")?;
    let mut system = system.split(' ');
    if system.next()? != kind {
        return None;
    }
    let options = system.nth(1)?;
    if option.is_some_and(|option| !options.split(',').any(|one| one == option)) {
        return None;
    }
    let mut mount = mount.split(' ').skip(3);
    Some((mount.next()?.into(), mount.next()?.into()))
}

/// What a group has left, if it has a limit.
fn left_in(group: &Path, names: &Names) -> Option<u64> {
    let read = |name: &str| fs::read_to_string(group.join(name)).ok();
    let number = |name: &str| read(name)?.trim().parse::<u64>().ok();
    // Version 2 says "max" where there is none.
    let limit = number(names.limit).filter(|limit| *limit < LIMIT_BYTES_MAX)?;
    let used = number(names.used)?;
    let stat = read("memory.stat").unwrap_or_default();
    let cache = stat.lines().filter_map(|line| {
        let (name, value) = line.split_once(' ')?;
        let octets = value.parse::<u64>().ok()?;
        names.cache.contains(&name).then_some(octets)
    });
    let cache: u64 = cache.sum();
    Some(limit.saturating_sub(used.saturating_sub(cache)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory that is gone afterwards.
    struct Directory(PathBuf);

    impl Directory {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("{name}-{}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        fn write(&self, files: &[(&str, &str)]) {
            for (name, text) in files {
                let path = self.0.join(name);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            }
        }
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn each_limit_above_the_process_is_found_and_page_cache_counts_as_left() {
        let mount = Directory::new("multifd-cgroup2");
        mount.write(&[
            ("vms/one/memory.max", "1000000\n"),
            ("vms/one/memory.current", "400000\n"),
            (
                "vms/one/memory.stat",
                "anon 5\ninactive_file 100000\nactive_file 50000\n",
            ),
            ("vms/memory.max", "max\n"),
            ("vms/memory.current", "7\n"),
            ("memory.max", "500\n"),
            ("memory.current", "900\n"),
        ]);
        let mounts = format!(
            "30 24 0:26 / {} rw,nosuid - cgroup2 cgroup2 rw\n",
            mount.0.display()
        );
        let limits = left_of("1:name=systemd:/\n0::/vms/one\n", &mounts);
        let expected = [
            ("the control group /vms/one", 750_000),
            ("the control group /", 0),
        ];
        assert_eq!(limits, expected.map(|(name, left)| (name.to_owned(), left)));
    }

    #[test]
    fn version_1_is_read_under_its_own_names_and_inside_a_container() {
        let mount = Directory::new("multifd-cgroup1");
        mount.write(&[
            ("memory.limit_in_bytes", "9223372036854771712\n"),
            ("memory.usage_in_bytes", "5\n"),
            ("inner/memory.limit_in_bytes", "1000\n"),
            ("inner/memory.usage_in_bytes", "600\n"),
            (
                "inner/memory.stat",
                "inactive_file 1\ntotal_inactive_file 100\n",
            ),
        ]);
        let mounts = format!(
            "1 0 0:1 / /x rw - cgroup cgroup rw,cpu\n2 0 0:2 /outer {} rw - cgroup cgroup rw,memory\n",
            mount.0.display()
        );
        let limits = left_of("4:cpu:/\n3:memory:/outer/inner\n", &mounts);
        assert_eq!(limits, [("the control group /inner".to_owned(), 500)]);
    }
}
