# What the suites share inside a lab machine: setting things up, and claims. Sourced by bash.
# shellcheck shell=bash disable=SC2034 # used where this is sourced
set -euo pipefail

# The programs that `check` found on the host.
SEND=${LAB_BIN:-}/multifd-send
RECEIVE=${LAB_BIN:-}/multifd-receive
VFIO=${LAB_BIN:-}/multifd-vfio

CLAIMS=0
# claim TEXT COMMAND...: runs it; its output is shown only if it fails, and then the suite is over.
claim() {
    local text=$1 output began=$SECONDS
    shift
    if output=$("$@" 2>&1); then
        printf 'ok      %s (%d s)\n' "$text" $((SECONDS - began))
        CLAIMS=$((CLAIMS + 1))
    else
        printf '%s\nFAILED  %s: %s\n' "$output" "$text" "$*"
        exit 1
    fi
}

# skip TEXT REASON: what cannot be tested, by name.
skip() { printf 'SKIPPED %s: %s\n' "$1" "$2"; }

# The end of each suite: the kernel had nothing to complain of either.
finish_suite() {
    if dmesg | grep -E -A 30 'WARNING: CPU|BUG:|Oops:|general protection|INFO: task .* blocked'; then
        printf 'FAILED  the kernel complained, see above\n'
        exit 1
    fi
    printf 'passed  %d claims\n' "$CLAIMS"
}

# wait_for SECONDS COMMAND...: until it succeeds.
wait_for() {
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < end)) || return 1
        sleep 0.2
    done
}

# Soft-RoCE (rxe0, 10.9.0.1) and soft-iWARP (siw0, 10.9.1.1) on one machine, each over a dummy interface: both ends on one device.
verbs_here() {
    lab-modules dummy crc32_generic rdma_rxe siw ib_uverbs rdma_ucm
    ip link add roce type dummy
    ip addr add 10.9.0.1/24 dev roce
    ip link set roce mtu 9000 up
    rdma link add rxe0 type rxe netdev roce
    ip link add iwarp type dummy
    ip addr add 10.9.1.1/24 dev iwarp
    ip link set iwarp up
    rdma link add siw0 type siw netdev iwarp
}

# The wire between two machines: A is 10.9.0.1, B is 10.9.0.2, and the same in 10.9.5.0/24, of which a test may take an address away. PEER is
# the other one.
wire() {
    local number=1
    PEER=10.9.0.2
    [[ $LAB_ROLE == A ]] || { number=2 && PEER=10.9.0.1; }
    lab-modules virtio_net
    ip addr add 10.9.0.$number/24 dev eth0
    ip addr add 10.9.5.$number/24 dev eth0
    ip link set eth0 mtu 9000 up
    wait_for 60 busybox ping -c 1 -W 1 "$PEER"
}

# Verbs on the wire: rxe0, or siw0 with `siw`.
verbs_on_wire() {
    lab-modules crc32_generic rdma_rxe siw ib_uverbs rdma_ucm
    case ${1-rxe} in
    siw) rdma link add siw0 type siw netdev eth0 ;;
    *) rdma link add rxe0 type rxe netdev eth0 ;;
    esac
}

labdev_dir() { printf '/sys/bus/platform/devices/labdev.%d\n' "$1"; }
# labdev_get NUMBER REGISTER; labdev_set NUMBER REGISTER VALUE: from outside, whoever holds the device.
labdev_get() { sed -n "s/^$2 //p" "$(labdev_dir "$1")/registers"; }
labdev_set() { printf '%s %s\n' "$2" "$3" >"$(labdev_dir "$1")/registers"; }

# report_says FILE KEY=VALUE...: what a program's JSON report must say (VALUE as JSON), besides that there was no error.
report_says() {
    python3 - "$@" <<'EOF'
import json, sys
report = json.load(open(sys.argv[1]))
wanted = {"error": None}
wanted.update((key, json.loads(value)) for key, value in (pair.split("=", 1) for pair in sys.argv[2:]))
wrong = [f"{key} is {report.get(key)!r}, not {value!r}" for key, value in wanted.items() if report.get(key) != value]
if wrong:
    sys.exit("the report: " + "; ".join(wrong))
EOF
}

# The guest left, all of it; it arrived, and every word of its memory is right; both, where one report speaks for both sides.
departed() { report_says "$1" outcome='"migrated"' digest_equal=true; }
arrived() { report_says "$1" outcome='"running"' guest_check='"passed"'; }
moved_here() { report_says "$1" outcome='"migrated"' digest_equal=true guest_check='"passed"'; }

# The programs' options for TLS, with what `check` made on the host: the same for both sides.
TLS=(--tls-ca "${LAB_TLS-}/ca.pem" --tls-cert "${LAB_TLS-}/own.pem" --tls-key "${LAB_TLS-}/own.key")

# ---- migrations from machine A to machine B: both run the same script, and each plays its part ----

GUEST=(--working-set 4M --dirty-rate 1M --vcpus 1 --warm-up 200ms --downtime-limit 3s --stall 60s --quiet --report json)
PORT=4444
DEPART=departs
MEMORY=64M
# Where the destination listens besides the first address: `--listen ADDRESS`...
ALSO=()

# moves TEXT KIND NAME OPTION...: one migration by that kind of channel.
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
    timeout 250 "$RECEIVE" --transport "$kind" --listen "10.9.0.2:$PORT" "${ALSO[@]}" "${tls[@]}" --run-for 500ms --stall 60s --hello-deadline 60s \
        --quiet --report json >"$report" || { cat "$report" && return 1; }
    arrived "$report"
}

# Until somebody listens there: the source says that nobody does, and nothing has happened yet.
departs() {
    local kind=$1 report=/tmp/$2.json tls=() end=$((SECONDS + 120))
    shift 2
    [[ $kind != tls ]] || tls=("${TLS[@]}")
    until timeout 250 "$SEND" --memory "$MEMORY" "${GUEST[@]}" --connect "$PEER:$PORT" --transport "$kind" "${tls[@]}" "$@" >"$report" 2>/tmp/complaint; do
        if ! grep -qi "refused\|nobody takes" "$report" /tmp/complaint || ((SECONDS > end)); then
            cat "$report" /tmp/complaint
            return 1
        fi
        sleep 1
    done
    departed "$report" || return 1
    grep -q kvm "$report" || { cat "$report" && return 1; }
}

# departs_with CUTTER KIND NAME OPTION...: departs, while CUTTER destroys a lane in the middle: the report must count it.
departs_with() {
    local cutter
    "$1" &
    cutter=$!
    shift
    departs "$@" || return 1
    wait "$cutter" || return 1
    python3 -c 'import json, sys; lost = json.load(open(sys.argv[1]))["channels_lost"]; sys.exit(None if lost else "no channel was lost")' "/tmp/$2.json"
}
