#!/usr/bin/env bash
# Two machines on one wire with soft-RoCE: the built-in guest migrates from A to B by RDMA, by both kinds mixed, and with an RDMA lane that is
# killed in the middle. `rdma-two.sh long` adds soft-iWARP and more ways.
. "$LAB_DIR/suites/setup.sh"
MODE=${1-}
lab-modules kvm-amd
wire
verbs_on_wire

# kill_lane: waits for a migration with two data lanes by RDMA, and takes the address of the second away: the kernel destroys what the
# device sends from; neither program is told.
kill_lane() {
    for _ in {1..600}; do
        if (($(rdma resource show qp | grep -c 'type RC state RTS') >= 3)); then
            sleep 2
            ip addr del 10.9.5.1/24 dev eth0
            return
        fi
        sleep 0.1
    done
    return 1
}
departs_with_a_kill() { RUST_LOG=warn departs_with kill_lane "$@"; }

moves "the guest moves by RDMA" rdma rdma --channels 2
ALSO=(--listen "rdma:10.9.0.2:7000")
moves "by two lanes of TCP and two of RDMA" tcp mixed --channels 4 --data "tcp:10.9.0.2:$((PORT + 1))" --data rdma:10.9.0.2:7000
# Slow enough to have a middle.
ALSO=(--listen "rdma:10.9.5.2:7001")
DEPART=departs_with_a_kill
moves "by RDMA, with one lane killed in the middle" rdma killed --channels 2 --data "rdma:10.9.0.2:$((PORT + 1))" --data rdma:10.9.5.2:7001 \
    --zero-percent 0 --bandwidth 8M
DEPART=departs
ALSO=()
if [[ $MODE == long ]]; then
    MEMORY=256M
    moves "256 MiB by four lanes of RDMA" rdma four --channels 4
    moves "with all of the guest's memory registered" rdma all --channels 2 --rdma-registration all
    MEMORY=64M
    ALSO=(--listen "rdma:10.9.0.2:7002")
    moves "by TLS and RDMA, the control channel by TLS" tls secured --channels 2 --data "tls:10.9.0.2:$((PORT + 1))" --data rdma:10.9.0.2:7002
    ALSO=()
    rdma link delete rxe0
    verbs_on_wire siw
    moves "by soft-iWARP" rdma iwarp --channels 2
fi
finish_suite
