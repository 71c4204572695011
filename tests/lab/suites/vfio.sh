#!/usr/bin/env bash
# One machine: VFIO devices through the kernel's interface. `vfio.sh long` repeats it with other devices.
. "$LAB_DIR/suites/setup.sh"

# The devices do what the lab says of them: programs of the lab's own.
lab-modules iommufd vfio_iommu_type1 labdev memory_kib=2048 mdev mtty
claim "labdev by group and container" vfio-labdev group
claim "labdev by device file and iommufd" vfio-labdev cdev
for id in 1 2; do echo "00000000-0000-4000-8000-00000000000$id" >/sys/class/mdev_bus/mtty/mdev_supported_types/mtty-2/create; done
claim "the kernel's sample device migrates, by group" vfio-mtty group
claim "and by device file" vfio-mtty cdev
# The project's own sources of dirty pages and adapters of devices, on these devices.
live() {
    local program
    for program in $LAB_VFIO_TESTS; do MULTIFD_REQUIRE_VFIO=$1 timeout 200 "$program" --test-threads 1 --nocapture; done
}
claim "the project's DMA sources and device states, without an IOMMU" live device
if [[ ${1-} == long ]]; then
    for round in {1..5}; do
        claim "labdev by group, again ($round)" vfio-labdev group
        claim "labdev by device file, again ($round)" vfio-labdev cdev
    done
    rmmod labdev
    lab-modules labdev memory_kib=262144
    claim "labdev with 256 MiB of memory" vfio-labdev cdev
fi
rmmod labdev

# Behind an IOMMU. Its devices hold the module, so this comes last.
lab-modules labdev iommu=1
echo 1 >/sys/module/iommufd/parameters/allow_unsafe_interrupts
claim "iommufd's dirty bits of a hardware page table" vfio-labdev iommu
claim "the project's DMA sources on page tables of iommufd" live iommu
finish_suite
