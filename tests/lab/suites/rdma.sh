#!/usr/bin/env bash
# One machine with soft-RoCE and soft-iWARP: the conformance suite of channels, and a hostile peer.
# `rdma.sh long` runs every check, and lowers the limit on locked memory; MULTIFD_CHECK=NAME[,NAME...] only these of the conformance suite.
. "$LAB_DIR/suites/setup.sh"
verbs_here
export MULTIFD_RDMA=10.9.0.1,10.9.1.1 MULTIFD_REQUIRE_RDMA=1
MODE=${1-}

# Each of these is a property of its own of one-sided channels: order and placement of bodies, canaries beside them, a guest that writes
# meanwhile, patience, and the ends.
SHORT=octets_arrive_in_order,bodies_land_where_they_belong,nothing_outside_the_spans_is_written,both_directions_work_at_once
SHORT+=,frames_stay_framed_while_the_guest_writes,deadline_in_a_body_says_how_much_landed,stall_ends_a_receive_and_a_send
SHORT+=,shutdown_wakes_a_send,close_in_a_frame_says_how_much_came,dropped_send_half_ends_one_direction_only
SHORT+=,farewell_is_read_though_octets_were_unread

# tests SECONDS PROGRAM ARGUMENT...: tests of the project, which say `ok` or why not.
tests() { RUST_BACKTRACE=0 timeout "$1" "$2" --test-threads 1 "${@:3}"; }

conformance() { tests 900 "$LAB_RDMA_TESTS" --exact every_check_of_the_suite_passes_on_every_device; }
if [[ $MODE == long || -n ${MULTIFD_CHECK-} ]]; then
    claim "the conformance suite passes over soft-RoCE and soft-iWARP" conformance
else
    MULTIFD_CHECK=$SHORT claim "the conformance suite passes over soft-RoCE and soft-iWARP, in short" conformance
fi
claim "registration, refusals and deadlines over both" tests 300 "$LAB_RDMA_TESTS" --skip every_check_of_the_suite
claim "a hostile peer is refused over both, and canaries stay whole" tests 300 "$LAB_TRANSPORT_TESTS" rdma::
[[ $MODE != long ]] || claim "no descriptor stays open over either" tests 300 "$LAB_RDMA_DESCRIPTORS"

# ---- the limit on locked memory (RLIMIT_MEMLOCK): a guest of 64 MiB below a limit of 8 ----

# limited KIB COMMAND...: with that limit, and without the right to pass over it that root has.
limited() {
    local bytes=unlimited
    [[ $1 == unlimited ]] || bytes=$(($1 << 10))
    prlimit --memlock="$bytes:$bytes" setpriv --bounding-set -ipc_lock --inh-caps -ipc_lock "${@:2}"
}

GUEST=(--memory 64M --tracking process --vcpus 1 --working-set 4M --dirty-rate 1M --warm-up 200ms --downtime-limit 5s --stall 60s
    --channels 2 --quiet --report json)
PORT=5000

# sends HOST NAME KIB OPTION...: a migration over RDMA between two processes, of which the source may lock KIB. The largest amount that it had
# pinned is in /tmp/NAME.pinned, in KiB. Gives the source's status.
sends() {
    local host=$1 name=$2 kib=$3 receiver sender process pinned peak=0 status=0
    shift 3
    PORT=$((PORT + 1))
    timeout 200 "$RECEIVE" --listen "$host:$PORT" --transport rdma --run-for 200ms --stall 60s --hello-deadline 30s --quiet --report json \
        >"/tmp/$name-there.json" 2>"/tmp/$name-there.err" &
    receiver=$!
    sleep 2
    limited "$kib" timeout 200 "$SEND" "${GUEST[@]}" --connect "$host:$PORT" --transport rdma "$@" >"/tmp/$name.json" 2>"/tmp/$name.err" &
    sender=$!
    while kill -0 "$sender" 2>/dev/null; do
        process=$(pgrep -nx multifd-send || true)
        pinned=$(sed -n 's/^VmPin:[[:space:]]*\([0-9]*\) kB/\1/p' "/proc/${process:-0}/status" 2>/dev/null || true)
        ((${pinned:-0} <= peak)) || peak=$pinned
        sleep 0.05
    done
    wait "$sender" || status=$?
    echo "$peak" >"/tmp/$name.pinned"
    ((status == 0)) || kill "$receiver" 2>/dev/null || true
    wait "$receiver" || true
    return "$status"
}

# below KIB NAME: never more than that was pinned, and something was.
below() {
    local peak
    peak=$(cat "/tmp/$2.pinned")
    echo "at most $peak KiB were pinned"
    ((peak > 0 && peak <= $1))
}

# A guest larger than the limit arrives, by chunks that come and go.
by_chunks() {
    sends "$1" "$2" 8192 --zero-percent 0 || { cat "/tmp/$2.json" "/tmp/$2.err" "/tmp/$2-there.json" "/tmp/$2-there.err" && return 1; }
    departed "/tmp/$2.json" && arrived "/tmp/$2-there.json" && below 8192 "$2"
}

# refused NAME TEXT KIB OPTION...: the source says why, and that the limit is the reason.
refused() {
    local name=$1 text=$2 kib=$3
    shift 3
    if sends 10.9.0.1 "$name" "$kib" "$@"; then
        echo "it migrated all the same"
        return 1
    fi
    cat "/tmp/$name.json" "/tmp/$name.err"
    cat "/tmp/$name.json" "/tmp/$name.err" | grep -q "$text"
}

# Zero pages are not registered: of a guest without content, little more is pinned than the channels' own buffers.
unregistered_zeros() {
    sends 10.9.0.1 zeros unlimited --zero-percent 100 || { cat /tmp/zeros.json /tmp/zeros.err && return 1; }
    departed /tmp/zeros.json && below 24576 zeros
}

if [[ $MODE == long ]]; then
    claim "a guest larger than the limit on locked memory moves over soft-RoCE, and no more is pinned than that" by_chunks 10.9.0.1 roce
    claim "registering all of it is refused, and the error names the limit" refused all RLIMIT_MEMLOCK 8192 --rdma-registration all
    claim "the same guest over soft-iWARP" by_chunks 10.9.1.1 iwarp
    claim "a limit too low for a channel's own buffers is named" refused low RLIMIT_MEMLOCK 512
    claim "zero pages are not registered" unregistered_zeros
fi
finish_suite
