#!/usr/bin/env bash
# Two machines on one wire: the built-in guest migrates from A to B. `two.sh long` adds lanes, one that is cut, and a bad wire.
. "$LAB_DIR/suites/setup.sh"
lab-modules kvm-amd
wire
MODE=${1-}

# cut_lane: waits for a migration, and cuts its newest connection: a data lane, for control is dialled first. It is the kernel that destroys the
# socket; neither program is told.
cut_lane() {
    local lanes newest
    for _ in {1..600}; do
        # Descriptor and local port of each connection to the destination.
        lanes=$(ss -Htnp state established "dport = $PORT" | sed -n 's/.*:\([0-9]*\) .*:[0-9]* .*fd=\([0-9]*\).*/\2 \1/p' | sort -n)
        if (($(wc -l <<<"$lanes") >= 4)); then
            newest=$(tail -n 1 <<<"$lanes")
            sleep 0.3
            ss -K "sport = ${newest#* }" >/dev/null
            return
        fi
        sleep 0.1
    done
    return 1
}

departs_with_a_cut() { departs_with cut_lane "$@"; }

moves "the guest moves by TCP" tcp tcp --channels 2
moves "by TLS, with certificates both ways" tls tls --channels 2
if [[ $MODE == long ]]; then
    lab-modules tcp_diag sch_netem
    moves "with four channels" tcp four --channels 4
    DEPART=departs_with_a_cut
    MEMORY=256M # more to move, so that there is a middle
    moves "with a lane cut in the middle" tcp cut --channels 4 --zero-percent 0
    DEPART=departs
    MEMORY=64M
    tc qdisc add dev eth0 root netem delay 20ms loss 1%
    moves "over a wire with 40 ms and 1 % of loss" tcp lossy --channels 4
    tc qdisc del dev eth0 root
fi
finish_suite
