#!/usr/bin/env bash
# Two machines on one wire: the built-in guest migrates from A to B. `two.sh long` adds TLS, a lane that is cut, and a bad wire.
. "$LAB_DIR/suites/setup.sh"
lab-modules kvm-amd
wire
MODE=${1-}
GUEST=(--working-set 4M --dirty-rate 1M --vcpus 1 --warm-up 200ms --downtime-limit 3s --stall 60s --quiet --report json)
PORT=4444
DEPART=departs
MEMORY=64M

# moves TEXT KIND NAME OPTION...: one migration, each side playing its part. Both sides come here with the same arguments.
moves() {
    local text=$1
    shift
    PORT=$((PORT + 1))
    if [[ $LAB_ROLE == B ]]; then
        claim "$text (destination)" arrives "$@"
    else
        claim "$text (source)" "$DEPART" "$@"
    fi
}

arrives() {
    local kind=$1 report=/tmp/$2.json tls=()
    [[ $kind != tls ]] || tls=("${TLS[@]}")
    timeout 250 "$RECEIVE" --listen "$kind:10.9.0.2:$PORT" "${tls[@]}" --run-for 500ms --stall 60s --hello-deadline 60s --quiet --report json \
        >"$report" || { cat "$report" && return 1; }
    arrived "$report"
}

# Until somebody listens there: the source says that nobody does, and nothing has happened yet.
departs() {
    local kind=$1 report=/tmp/$2.json tls=() end=$((SECONDS + 120))
    shift 2
    [[ $kind != tls ]] || tls=("${TLS[@]}")
    until timeout 250 "$SEND" --memory "$MEMORY" "${GUEST[@]}" --connect "$kind:$PEER:$PORT" "${tls[@]}" "$@" >"$report" 2>/tmp/complaint; do
        if ! grep -qi refused "$report" /tmp/complaint || ((SECONDS > end)); then
            cat "$report" /tmp/complaint
            return 1
        fi
        sleep 1
    done
    departed "$report"
    grep -q kvm "$report" || { cat "$report" && return 1; }
}

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

# departs, with a lane cut in the middle: the report must count it.
departs_with_a_cut() {
    local cutter
    cut_lane &
    cutter=$!
    departs "$@"
    wait "$cutter"
    python3 -c 'import json, sys; lost = json.load(open(sys.argv[1]))["channels_lost"]; sys.exit(None if lost else "no channel was lost")' "/tmp/$2.json"
}

moves "the guest moves by TCP" tcp tcp --channels 2
if [[ $MODE == long ]]; then
    lab-modules tcp_diag sch_netem
    moves "by TLS" tls tls --channels 2
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
