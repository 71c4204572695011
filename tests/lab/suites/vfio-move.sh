#!/usr/bin/env bash
# One machine: whole migrations of VFIO devices with their guest, one for each kind of device and door, and with a device that breaks at each
# state. `vfio-move.sh long` breaks them at every state in both ways, and moves more of them.
. "$LAB_DIR/suites/setup.sh"
MODE=${1-}
lab-modules iommufd vfio_iommu_type1 labdev count=4 memory_kib=1024 mdev mtty
echo 1 >/sys/module/iommufd/parameters/allow_unsafe_interrupts
for id in 1 2; do echo "00000000-0000-4000-8000-00000000000$id" >/sys/class/mdev_bus/mtty/mdev_supported_types/mtty-2/create; done
MTTY=(/sys/bus/mdev/devices/00000000-0000-4000-8000-00000000000{1,2})
ONE=("$(labdev_dir 0)" "$(labdev_dir 1)")
BOTH=("${ONE[@]}" "$(labdev_dir 2)" "$(labdev_dir 3)")

# moves OPTION... DEVICE...: what it checks is its own (multifd-vfio --help).
moves() { timeout 120 "$VFIO" --memory 8 --bandwidth 16 "$@"; }

# with LABDEV-ARGUMENT...: other devices.
with() {
    rmmod labdev
    lab-modules labdev memory_kib=1024 "$@"
}

# ---- each kind of device, by each door ----
claim "the kernel's sample device moves there and back, by group" moves --times 2 "${MTTY[@]}"
claim "and by device file" moves --times 2 --door cdev "${MTTY[@]}"
claim "labdev moves, by group" moves "${ONE[@]}"
claim "and by device file, there and back" moves --times 2 --door cdev "${ONE[@]}"
claim "two devices, and what a peer asks of a quiescent one" moves --late-dma "${BOTH[@]}"
claim "two devices with new initial bytes in the middle (REINIT)" moves --initial 256 --reinit 512 "${BOTH[@]}"

# ---- a device that breaks: the guest runs on at the source, and moves after all by a second attempt ----
# The numbers of `enum vfio_device_mig_state`.
STOP=1 STOP_COPY=3 RESUMING=4 RUNNING_P2P=5 PRE_COPY=6 PRE_COPY_P2P=7

# fails SIDE STATE... : entering each breaks device 0 of that side, once.
fails() {
    local side=$1 register=$2 state
    for state in "${@:3}"; do
        printf -- '-- %s.0: %s, entering state %d\n' "$side" "$register" "$state"
        moves --door cdev --expect failed --because device0 --inject "$side.0:$register=$((1 << state))" "${BOTH[@]}"
    done
}

# breaks INJECTION...: each of them makes it fail.
breaks() {
    local injection
    for injection in "$@"; do
        printf -- '-- %s\n' "$injection"
        moves --door cdev --expect failed --because device0 --inject "$injection" "${BOTH[@]}"
    done
}

claim "a source's device that breaks entering pre-copy, pre-copy-P2P or stop-copy" fails source fault_error "$PRE_COPY" "$PRE_COPY_P2P" "$STOP_COPY"
claim "one that breaks by itself in pre-copy and in stop-copy" breaks source.0@pre-copy:break=1 source.0@stop-copy:break=1
claim "a destination's device that breaks before, while and after it is loaded" \
    breaks "destination.0:fault_error=$((1 << RESUMING))" destination.0:fault_load=5000 "destination.0@resuming:fault_error=$((1 << STOP))"
stranded() { moves --door cdev --expect stranded --inject "destination.0@resuming:fault_error=$((1 << RUNNING_P2P))" "${BOTH[@]}"; }
claim "a destination's device that breaks after the commit: nothing runs twice" stranded
if [[ $MODE == long ]]; then
    claim "a source's device that refuses each state" fails source fault_refuse "$PRE_COPY" "$PRE_COPY_P2P" "$STOP_COPY"
    claim "one that breaks in pre-copy-P2P" breaks source.0@pre-copy-p2p:break=1
    claim "one that cannot be read, in pre-copy and in stop-copy" breaks source.0:fault_save=100 "source.0@stop-copy:fault_save=1"
    claim "a destination's device that breaks on the way to being loaded" fails destination fault_error "$RUNNING_P2P" "$STOP"
    claim "one that refuses each state" fails destination fault_refuse "$RUNNING_P2P" "$STOP" "$RESUMING"
    claim "one that breaks while it is loaded, or refuses what it was given" \
        breaks destination.0@resuming:break=1 "destination.0@resuming:fault_refuse=$((1 << STOP))" destination.0:fault_load=1
    claim "labdev moves over four channels, five times" moves --times 5 --channels 4 "${ONE[@]}"
fi

# ---- devices that can less ----
with migration=1
claim "a device that can only stop and copy" moves "${ONE[@]}"
if [[ $MODE == long ]]; then
    claim "and breaks" moves --expect failed --because device0 --inject "source.0:fault_error=$((1 << STOP_COPY))" "${ONE[@]}"
    with migration=3
    claim "devices without pre-copy" moves "${ONE[@]}"
    claim "and break, quiescent and stopped" \
        eval 'for state in $RUNNING_P2P $STOP; do moves --expect failed --because device0 --inject "source.0:fault_error=$((1 << state))" "${ONE[@]}"; done'
    with migration=5
    claim "a device with pre-copy that cannot be quiescent" moves "${ONE[@]}"
fi

# ---- device state over one-sided channels ----
with memory_kib=4096
verbs_here
claim "devices over RDMA, through pooled buffers" moves --listen rdma:10.9.0.1:0 "${ONE[@]}"
[[ $MODE != long ]] || claim "and over soft-iWARP" moves --listen rdma:10.9.1.1:0 "${ONE[@]}"

# ---- behind an IOMMU: its devices hold the module, so this comes last ----
with iommu=1
claim "devices on page tables that keep dirty bits" moves --door tracked "${ONE[@]}"
finish_suite
