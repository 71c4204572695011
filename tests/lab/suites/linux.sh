#!/usr/bin/env bash
# One machine with one processor: a distribution's kernel with two virtual processors, which checks itself (examples/vmm/guest/init.c), is moved
# from process to process of examples/vmm while it runs. `linux.sh long` moves it there and back ten times, and cuts channels and the link.
. "$LAB_DIR/suites/setup.sh"
lab-modules kvm-amd veth tcp_diag
VMM=$LAB_BIN/multifd-vmm
PATIENT=(--downtime-limit 10000 --stall 60)

# starts NAME ARGUMENT...: a VMM. Its console is /tmp/NAME.console, what it says /tmp/NAME.log, its exit status /tmp/NAME.status; what is written to
# /tmp/NAME.in is typed. WITHIN is what it is started by.
WITHIN=()
starts() {
    local name=$1
    shift
    mkfifo "/tmp/$name.in"
    (
        bash -c 'echo $$ >"$0.pid"; exec "$@"' "/tmp/$name" "${WITHIN[@]}" "$VMM" "$@" "${PATIENT[@]}" <>"/tmp/$name.in" >"/tmp/$name.console" 2>"/tmp/$name.log"
        echo $? >"/tmp/$name.status"
    ) >/dev/null 2>&1 & # or a claim would wait for it
}

# tells NAME: everything that is known, for whoever has to find out.
tells() { tail -n 40 "/tmp/$1.console" "/tmp/$1.log" && dmesg | tail -n 5; }

# beats NAME COUNT: the guest has beaten so often on this console, and nothing is wrong.
beats() {
    wait_for 120 enough "$@" || { tells "$1" && return 1; }
    ! grep 'FAILED\|Kernel panic\|BUG:\|soft lockup' "/tmp/$1.console"
}
enough() { (($(grep -c '^beat' "/tmp/$1.console") >= $2)); }

boots() {
    starts "$@" --kernel "$LAB_GUEST/vmlinuz" --initrd "$LAB_GUEST/initrd" --memory 128M --cpus 2 &&
        wait_for 90 grep -q 'guest is up: 2 processors, a random device' "/tmp/$1.console" || { tells "$1" && return 1; }
    beats "$1" 3
}

# moves FROM TO ADDRESS OPTION...: from the process that was told to move to ADDRESS, into a new one. DISTURB runs meanwhile.
DISTURB=(true)
moves() {
    local from=$1 to=$2 address=$3
    shift 3
    starts "$to" --incoming "$address" "$@"
    wait_for 20 grep -q 'listening on' "/tmp/$to.log" || { tells "$to" && return 1; }
    kill -USR1 "$(<"/tmp/$from.pid")"
    "${DISTURB[@]}"
    wait_for 120 test -s "/tmp/$from.status" || { tells "$from" && tells "$to" && return 1; }
    [[ $(<"/tmp/$from.status") == 0 ]] && grep 'moved: ' "/tmp/$from.log" || { tells "$from" && tells "$to" && return 1; }
    wait_for 20 grep 'arrived: ' "/tmp/$to.log" || { tells "$to" && return 1; }
    beats "$to" 4
}

# reports NAME KEY: what the source counted, which must not be 0.
reports() {
    sed -n 's/.*moved: //p' "/tmp/$1.log" | python3 -c 'import json, sys; value = json.load(sys.stdin)[sys.argv[1]]; print(sys.argv[1], value); sys.exit(not value)' "$2"
}

# Two network namespaces, with a wire that can be cut: 10.9.9.1 here, 10.9.9.2 there.
wire_there() {
    ip netns add there
    ip link add wire0 type veth peer name wire1 netns there
    ip addr add 10.9.9.1/24 dev wire0
    ip link set wire0 up
    ip -n there addr add 10.9.9.2/24 dev wire1
    ip -n there link set wire1 up
    ip -n there link set lo up
}

# channels COUNT: so many connections cross the wire from here, or come in from there.
channels() { (($(ss -Htn state established '( dst 10.9.9.2 )' | wc -l) >= $1)); }

# The newest connection is a data channel, for control is dialled first. It is the kernel that destroys the socket; neither program is told.
cut_lane() {
    wait_for 60 channels 5
    sleep 2
    ss -K "sport = $(ss -Htn state established '( dst 10.9.9.2 )' | awk '{ print $3 }' | sed 's/.*://' | sort -n | tail -n 1)"
}

cut_link() {
    wait_for 60 channels 5
    sleep 2
    ip link set wire0 down
    ss -K dst 10.9.9.2
    ip netns exec there ss -K dst 10.9.9.1
    sleep 5
    ip link set wire0 up
}

# disturbed KEY HOW FROM TO ARGUMENT...: a move that HOW disturbs, after which the report counts it as KEY.
disturbed() {
    local key=$1
    DISTURB=("$2")
    shift 2
    moves "$@" && reports "$1" "$key"
}

# ends NAME: the guest checks everything once more, from inside, and shuts down.
ends() {
    echo stop >"/tmp/$1.in"
    wait_for 60 grep -q 'check passed' "/tmp/$1.console" && wait_for 30 test -s "/tmp/$1.status" || { tells "$1" && return 1; }
    [[ $(<"/tmp/$1.status") == 0 ]]
}

AT=127.0.0.1
claim "a distribution's kernel boots, with two processors" boots g0 --tracking ring --migrate-to tcp:$AT:4401
claim "it is moved by TCP, running, by the dirty ring" moves g0 g1 tcp:$AT:4401 --tracking log --migrate-to tls:$AT:4402 "${TLS[@]}"
claim "and by TLS, by the dirty log" moves g1 g2 tls:$AT:4402 "${TLS[@]}" --migrate-to tcp:$AT:4403
if [[ ${1-} == long ]]; then
    LAST=2
    for round in {1..10}; do
        for way in there back; do
            claim "$way ($round)" moves g$LAST g$((LAST + 1)) tcp:$AT:$((4401 + LAST)) --migrate-to tcp:$AT:$((4402 + LAST))
            LAST=$((LAST + 1))
        done
    done
    # Slow enough that there is a middle.
    wire_there
    SLOW=(--channels 4 --bandwidth 4M)
    claim "on the way to where it is disturbed" moves g$LAST a0 tcp:$AT:$((4401 + LAST)) --migrate-to tcp:10.9.9.2:4500 "${SLOW[@]}"
    WITHIN=(ip netns exec there)
    claim "a lane is cut on the way" disturbed channels_lost cut_lane a0 a1 tcp:10.9.9.2:4500 --migrate-to tcp:10.9.9.1:4501 "${SLOW[@]}"
    WITHIN=()
    claim "the whole link is cut for 5 s, on the way back" disturbed suspensions cut_link a1 a2 tcp:10.9.9.1:4501
    LAST=a2
else
    LAST=g2
fi
claim "the guest's own check of everything passes" ends $LAST
finish_suite
