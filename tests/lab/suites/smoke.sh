#!/usr/bin/env bash
# One machine: everything that the lab promises is there, and does what its kind does.
. "$LAB_DIR/suites/setup.sh"

# both_ends SERVER -- CLIENT: two programs that speak to each other; both must succeed.
both_ends() {
    local server=() pid
    while [[ $1 != -- ]]; do server+=("$1") && shift; done
    shift
    timeout 60 "${server[@]}" &
    pid=$!
    sleep 1
    timeout 60 "$@" && wait "$pid"
}

# A delay that netem puts on the way of a ping must be seen.
delayed() {
    tc qdisc add dev lo root netem delay 100ms
    local times
    times=$(busybox ping -c 2 127.0.0.1 | sed -n 's/.*min\/avg\/max = \([0-9]*\).*/\1/p')
    tc qdisc del dev lo root
    ((times >= 200))
}

verbs_here
claim "two devices speak verbs" bash -c 'ibv_devices | grep -q rxe0 && ibv_devices | grep -q siw0'
claim "soft-RoCE moves data by verbs alone" both_ends ibv_rc_pingpong -d rxe0 -g 1 -n 200 -- ibv_rc_pingpong -d rxe0 -g 1 -n 200 10.9.0.1
claim "soft-RoCE: reads and writes by the connection manager, content checked" \
    both_ends rping -s -a 10.9.0.1 -C 20 -V -- rping -c -a 10.9.0.1 -C 20 -V
claim "soft-iWARP: reads and writes by the connection manager, content checked" \
    both_ends rping -s -a 10.9.1.1 -C 20 -V -- rping -c -a 10.9.1.1 -C 20 -V

lab-modules iommufd vfio_iommu_type1 labdev mdev mtty
echo 00000000-0000-4000-8000-000000000001 >/sys/class/mdev_bus/mtty/mdev_supported_types/mtty-2/create
claim "VFIO's container and iommufd are there" test -c /dev/vfio/vfio -a -c /dev/iommu
claim "our devices have groups and device files" test -e "$(labdev_dir 0)/iommu_group" -a -e "$(labdev_dir 1)/vfio-dev"
claim "so has the kernel's sample device" test -e /sys/bus/mdev/devices/00000000-0000-4000-8000-000000000001/vfio-dev
claim "a script reads a device's registers" test "$(labdev_get 0 memory_bytes)" = 1048576

lab-modules sch_netem tls kvm-amd
claim "netem delays" delayed
claim "sockets can do TLS in the kernel" grep -qw tls /proc/sys/net/ipv4/tcp_available_ulp
claim "there is a KVM" test -c /dev/kvm
finish_suite
