#!/usr/bin/env bash
# One machine with one processor: the built-in guest migrates on the kernel's own KVM. `nested.sh long` tries more ways.
. "$LAB_DIR/suites/setup.sh"
lab-modules kvm-amd

# Small and slow: every instruction of the guest is emulated, twice over.
GUEST=(--memory 64M --working-set 4M --dirty-rate 1M --vcpus 1 --warm-up 200ms --downtime-limit 2s --stall 60s --quiet --report json)

# sends NAME OPTION...: the source's report is in /tmp/NAME.json.
sends() {
    local report=/tmp/$1.json
    shift
    timeout 200 "$SEND" "${GUEST[@]}" "$@" >"$report" || { cat "$report" && return 1; }
    # A guest of threads would prove nothing here.
    grep -q kvm "$report" || { cat "$report" && return 1; }
}

here() { sends "$@" --loopback && moved_here "/tmp/$1.json"; }

# over KIND NAME OPTION...: two processes.
over() {
    local kind=$1 name=$2 receiver tls=()
    shift 2
    [[ $kind != tls ]] || tls=("${TLS[@]}")
    timeout 200 "$RECEIVE" --listen "$kind:127.0.0.1:4444" "${tls[@]}" --run-for 500ms --stall 60s --hello-deadline 30s --quiet --report json \
        >"/tmp/$name-there.json" &
    receiver=$!
    sleep 2
    sends "$name" --connect "$kind:127.0.0.1:4444" "${tls[@]}" "$@"
    wait "$receiver"
    departed "/tmp/$name.json"
    arrived "/tmp/$name-there.json"
}

claim "the guest migrates by the dirty ring" here ring --tracking ring --channels 2
claim "between two processes by TCP, by the dirty log" over tcp log --tracking log --channels 2
if [[ ${1-} == long ]]; then
    claim "between two processes by TLS" over tls tls --channels 2
    claim "with eight channels" here eight --channels 8
    for round in {1..5}; do claim "again ($round)" here "again$round" --channels 2; done
fi
finish_suite
