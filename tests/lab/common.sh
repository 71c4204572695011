# What build, run, check and ci share: where things are, what is missing, how to speak. Sourced by bash, in strict mode.
# shellcheck shell=bash disable=SC2034 # used where this is sourced

LAB_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
REPOSITORY=$(cd "$LAB_DIR/../.." && pwd)

# The kernel: a meta-package of the distribution, which names the newest of its series. 6.12 is the first long-term kernel with all of VFIO's migration
# and dirty tracking that we drive; the `-cloud` flavour has neither soft-RoCE nor 9p.
LAB_KERNEL=${MULTIFD_LAB_KERNEL:-linux-image-6.12-amd64}
# Outside the repository, so that a clean clone does not build it again.
LAB_CACHE=${MULTIFD_LAB_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/multifd-lab}

say() { printf 'lab: %s\n' "$*" >&2; }

# fail STATUS MESSAGE...
fail() {
    local status=$1
    shift
    printf 'lab: error: %s\n' "$*" >&2
    exit "$status"
}

# One line each: the Debian package, and a command that succeeds where it is installed.
LAB_PACKAGES_TO_BUILD='
binutils          command -v strip
cpio              command -v cpio
dpkg              command -v dpkg-deb
gcc-12            command -v gcc-12
kmod              command -v depmod
libc6-dev         test -e /usr/include/stdio.h
libelf1           ldconfig -p | grep -q libelf.so.1
make              command -v make
xz-utils          command -v xz'
LAB_PACKAGES_TO_RUN='
busybox-static    /bin/busybox true && ! ldd /bin/busybox
ibverbs-providers test -e /etc/libibverbs.d/rxe.driver
ibverbs-utils     command -v ibv_rc_pingpong
iproute2          command -v ip && command -v rdma
qemu-system-x86   command -v qemu-system-x86_64
rdma-core         test -d /usr/share/doc/rdma-core
rdmacm-utils      command -v rping'
LAB_PACKAGES_TO_CHECK='
openssl           command -v openssl
procps            command -v pgrep
python3           command -v python3
util-linux        command -v setpriv && command -v prlimit'
# Each list ends and begins on a line of its own.
LAB_PACKAGES_TO_BUILD+=$'\n'
LAB_PACKAGES_TO_RUN+=$'\n'

# missing_packages LIST: the packages of LIST that are not installed, one a line.
missing_packages() {
    local package test
    while read -r package test; do
        [[ -n $package ]] || continue
        bash -c "PATH=\$PATH:/usr/sbin:/sbin; $test" >/dev/null 2>&1 || printf '%s\n' "$package"
    done <<<"$1"
}

# require_packages LIST PURPOSE: ends with status 69 (EX_UNAVAILABLE) and the line that installs what is missing.
require_packages() {
    local missing
    missing=$(missing_packages "$1")
    [[ -z $missing ]] && return
    missing=${missing//$'\n'/ }
    fail 69 "to $2 the lab these packages are missing: $missing
lab:   sudo apt-get install -y --no-install-recommends $missing"
}

# linux_guest: the kernel and the file system that the suite linux boots, in the directory LAB_GUEST; 69 if the kernel cannot be fetched.
linux_guest() {
    export LAB_GUEST=$LAB_CACHE/linux-guest
    CC=gcc-12 "$REPOSITORY/examples/vmm/guest/make" "$LAB_GUEST"
}

# The newest kernel of the series that the distribution offers, such as 6.12.117+deb12-amd64. Nothing if it cannot be known.
kernel_version() {
    apt-cache depends "$LAB_KERNEL" 2>/dev/null | sed -n 's/^ *Depends: linux-image-//p' | head -n 1
}

# hash_of PATH...: of the names and contents of files, and of the files in directories. Paths are relative to the lab.
hash_of() { (cd "$LAB_DIR" && find "$@" -type f -print0 | sort -z | xargs -0 sha256sum | sha256sum | cut -c 1-12); }

# Two stages, so that a change of our module does not fetch the kernel again. Each is a directory named after what it was made of.
kernel_stage() { printf '%s/%s-%s\n' "$LAB_CACHE" "$1" "$(hash_of kernel)"; }
image_stage() { printf '%s/image-%s\n' "$1" "$(hash_of build init mkinitrd lab-modules module programs)"; }

# The image to run: of the newest kernel known, or, without the distribution's lists, of the newest built.
current_image() {
    local version stage
    version=$(kernel_version)
    if [[ -n $version ]]; then
        stage=$(kernel_stage "$version")
    else
        stage=$(find "$LAB_CACHE" -maxdepth 1 -name "*-$(hash_of kernel)" 2>/dev/null | sort -V | tail -n 1)
    fi
    [[ -n $stage ]] && image_stage "$stage"
}
