#!/usr/bin/env bash
# Two machines on one wire: the built-in guest migrates from A to B. `two.sh long` adds loss and delay on the wire, and lost lanes.
. "$LAB_DIR/suites/setup.sh"
lab-modules kvm-amd
wire
MODE=${1-}
GUEST=(--memory 64M --working-set 4M --dirty-rate 1M --vcpus 1 --warm-up 200ms --downtime-limit 3s --stall 60s --quiet --report json)
PORT=4444

# moves TEXT NAME OPTION...: one migration, each side playing its part. Both sides come here with the same arguments.
moves() {
    local text=$1 name=$2
    shift 2
    PORT=$((PORT + 1))
    if [[ $LAB_ROLE == B ]]; then
        claim "$text (destination)" arrives "$name" "$@"
    else
        claim "$text (source)" departs "$name" "$@"
    fi
}

arrives() {
    local report=/tmp/$1.json
    timeout 250 "$RECEIVE" --listen "0.0.0.0:$PORT" --run-for 500ms --stall 60s --hello-deadline 60s --quiet --report json >"$report" || { cat "$report" && return 1; }
    migrated "$report"
}

departs() {
    local report=/tmp/$1.json
    shift
    # The other machine may be slower: its port answers when its program listens. busybox nc only looks.
    wait_for 200 is_open "$PEER" "$PORT"
    timeout 250 "$SEND" "${GUEST[@]}" --connect "$PEER:$PORT" "$@" >"$report" || { cat "$report" && return 1; }
    migrated "$report"
    grep -q kvm "$report"
}

# Whether somebody listens there: asked of the peer's kernel without taking a connection away from the program.
is_open() { busybox nc -z -w 2 "$1" "$2" || (exec 3<>"/dev/tcp/$1/$2") 2>/dev/null; }

moves "the guest moves by TCP" tcp --channels 2
if [[ $MODE == long ]]; then
    moves "with four channels" tcp4 --channels 4
    tc qdisc add dev eth0 root netem delay 20ms loss 1%
    moves "over a wire with 40 ms and 1 % of loss" lossy --channels 4
    tc qdisc del dev eth0 root
fi
finish_suite
