#!/usr/bin/env bash
# One machine with one processor: the built-in guest migrates on the kernel's own KVM. `nested.sh long` tries more ways.
. "$LAB_DIR/suites/setup.sh"
lab-modules kvm-amd

# Small and slow: every instruction of the guest is emulated, twice over.
GUEST=(--memory 64M --working-set 4M --dirty-rate 1M --vcpus 1 --warm-up 200ms --downtime-limit 2s --stall 60s --quiet --report json)

# migrates NAME OPTION...
migrates() {
    local report=/tmp/$1.json
    shift
    timeout 200 "$SEND" "${GUEST[@]}" "$@" >"$report" || { cat "$report" && return 1; }
    migrated "$report"
    # A guest of threads would prove nothing here.
    grep -q kvm "$report"
}

# over_tcp NAME OPTION...: two processes, one connection for control and the channels.
over_tcp() {
    local name=$1 receiver
    shift
    timeout 200 "$RECEIVE" --listen 127.0.0.1:4444 --run-for 500ms --stall 60s --hello-deadline 30s --quiet --report json >"/tmp/$name-arrived.json" &
    receiver=$!
    sleep 2
    migrates "$name" --connect 127.0.0.1:4444 "$@"
    wait "$receiver"
    migrated "/tmp/$name-arrived.json"
}

claim "the guest migrates by the dirty ring" migrates ring --loopback --tracking ring --channels 2
claim "between two processes, by the dirty log" over_tcp log --tracking log --channels 2
if [[ ${1-} == long ]]; then
    claim "with eight channels" migrates eight --loopback --channels 8
    for round in {1..5}; do claim "again ($round)" migrates "again$round" --loopback --channels 2; done
fi
finish_suite
