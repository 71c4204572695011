#!/usr/bin/env bash
# Two machines on one wire: the built-in guest migrates from A to B. `two.sh long` adds loss and delay on the wire, and lost lanes.
. "$LAB_DIR/suites/setup.sh"
lab-modules kvm-amd
wire
MODE=${1-}
GUEST=(--memory 64M --working-set 4M --dirty-rate 1M --vcpus 1 --warm-up 200ms --downtime-limit 3s --stall 60s --quiet --report json)
PORT=4444

# moves TEXT KIND NAME OPTION...: one migration, each side playing its part. Both sides come here with the same arguments.
moves() {
    local text=$1
    shift
    PORT=$((PORT + 1))
    if [[ $LAB_ROLE == B ]]; then
        claim "$text (destination)" arrives "$@"
    else
        claim "$text (source)" departs "$@"
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
    until timeout 250 "$SEND" "${GUEST[@]}" --connect "$kind:$PEER:$PORT" "${tls[@]}" "$@" >"$report" 2>/tmp/complaint; do
        grep -qi refused "$report" /tmp/complaint && ((SECONDS < end)) || { cat "$report" /tmp/complaint && return 1; }
        sleep 1
    done
    departed "$report"
    grep -q kvm "$report" || { cat "$report" && return 1; }
}

# The same certificates on both sides: each makes its own copy of what A made, in the directory that the host keeps for both.
share_certificates() {
    if [[ $LAB_ROLE == A ]]; then
        certificates /tmp/tls
        tar -C /tmp -cf - tls | busybox nc -l -p 4400
    else
        sleep 3
        until busybox nc "$PEER" 4400 </dev/null | tar -C /tmp -xf - 2>/dev/null; do sleep 1; done
    fi
}

moves "the guest moves by TCP" tcp tcp --channels 2
if [[ $MODE == long ]]; then
    claim "certificates for both" share_certificates
    moves "by TLS" tls tls --channels 2
    moves "with four channels" tcp four --channels 4
    tc qdisc add dev eth0 root netem delay 20ms loss 1%
    moves "over a wire with 40 ms and 1 % of loss" tcp lossy --channels 4
    tc qdisc del dev eth0 root
fi
finish_suite
