//! Which source tracks what, and the reasons and refusals as the user reads them.

use super::*;

struct Host {
    kernel: FakeKernel,
    logging: FakeFd,
    plain: FakeFd,
    container: FakeFd,
    dumb_container: FakeFd,
    iommufd: FakeFd,
}

impl Host {
    fn new() -> Self {
        let kernel = FakeKernel::new();
        let silent = FakeDeviceConfig {
            log_ranges_max: 0,
            ..FakeDeviceConfig::default()
        };
        let iommufd = FakeIommufd::new(PAGE, &[5]);
        iommufd.bind(1, true);
        iommufd.bind(2, false);
        Self {
            logging: device(&kernel, FakeDeviceConfig::default()).1,
            plain: device(&kernel, silent).1,
            container: FakeContainer::new(PAGE).open(&kernel),
            dumb_container: FakeContainer::new(PAGE).without_log().open(&kernel),
            iommufd: iommufd.open(&kernel),
            kernel,
        }
    }

    fn choose<'a>(
        &self,
        devices: Vec<DmaDevice<'a>>,
        translation: Option<Translation<'a>>,
        memory: DmaMemory,
    ) -> Result<Vec<(String, String)>, String> {
        let group = DmaGroup {
            name: "group",
            translation,
            devices,
            memory,
        };
        choose_with(Arc::new(self.kernel.clone()), group)
            .map(|chosen| {
                chosen
                    .iter()
                    .map(|one| (one.source.name().to_owned(), one.reason.clone()))
                    .collect()
            })
            .map_err(|error| error.to_string())
    }

    fn container(&self) -> Option<Translation<'_>> {
        Some(Translation::Container(self.container.as_fd()))
    }

    fn dumb_container(&self) -> Option<Translation<'_>> {
        Some(Translation::Container(self.dumb_container.as_fd()))
    }

    fn address_space(&self, tables: &[u32], devices: &[u32]) -> Option<Translation<'_>> {
        Some(Translation::AddressSpace {
            iommufd: self.iommufd.as_fd(),
            ioas: FakeIommufd::IOAS,
            tables: tables.to_vec(),
            devices: devices.to_vec(),
        })
    }
}

fn named<'a>(name: &'a str, fd: &'a FakeFd) -> DmaDevice<'a> {
    DmaDevice {
        name,
        device: Some(fd.as_fd()),
        options: DmaOptions::default(),
        pinned: None,
    }
}

fn fixed() -> DmaMemory {
    DmaMemory::Fixed(map())
}

fn viommu() -> DmaMemory {
    DmaMemory::Viommu {
        viommu: Box::new(|_: &mut dyn FnMut(DmaRange)| Ok(())),
    }
}

fn pairs(list: &[(&str, &str)]) -> Result<Vec<(String, String)>, String> {
    Ok(list
        .iter()
        .map(|(name, reason)| ((*name).to_owned(), (*reason).to_owned()))
        .collect())
}

#[test]
fn devices_that_all_log_are_asked_each() {
    let host = Host::new();
    let devices = vec![named("nic0", &host.logging), named("nic1", &host.logging)];
    assert_eq!(
        host.choose(devices, host.container(), fixed()),
        pairs(&[
            (
                "vfio-dma-logging nic0",
                "nic0: the device has a log of its own"
            ),
            (
                "vfio-dma-logging nic1",
                "nic1: the device has a log of its own"
            ),
        ])
    );
}

#[test]
fn a_container_is_asked_once_for_all_its_devices() {
    let host = Host::new();
    let devices = vec![named("nic0", &host.logging), named("gpu", &host.plain)];
    assert_eq!(
        host.choose(devices, host.container(), fixed()),
        pairs(&[(
            "vfio-type1 group",
            "nic0, gpu: the container logs by 4096 bytes"
        )])
    );
}

#[test]
fn page_tables_with_dirty_bits_are_used_where_devices_have_no_log() {
    let host = Host::new();
    assert_eq!(
        host.choose(
            vec![named("gpu", &host.plain)],
            host.address_space(&[5], &[1]),
            fixed()
        ),
        pairs(&[(
            "iommufd group",
            "gpu: the IOMMU's page tables have dirty bits"
        )])
    );
}

#[test]
fn what_nothing_tracks_is_all_dirty_with_the_reason() {
    let host = Host::new();
    let lone = |translation| {
        let mut chosen = host
            .choose(vec![named("gpu", &host.plain)], translation, fixed())
            .unwrap();
        chosen.remove(0)
    };
    for (translation, why) in [
        (None, "nothing is known of their address translation"),
        (
            host.dumb_container(),
            "their container has no dirty log (not offered here: a dirty log of this type 1 container: the kernel names no \
             migration capability)",
        ),
        (
            host.address_space(&[], &[1]),
            "they are attached to an address space without a page table that tracks (IOMMU_HWPT_ALLOC_DIRTY_TRACKING)",
        ),
        (
            host.address_space(&[5], &[1, 2]),
            "the IOMMU behind device 2 of their iommufd has no dirty bits",
        ),
        (
            host.address_space(&[5], &[7]),
            "their iommufd does not say (IOMMU_GET_HW_INFO: No such file or directory (os error 2))",
        ),
    ] {
        assert_eq!(
            lone(translation),
            (
                "all-dirty gpu".to_owned(),
                format!(
                    "gpu: nothing tracks it ({why}): all that it can reach counts as dirty each time"
                )
            )
        );
    }
}

#[test]
fn among_devices_without_help_each_gets_the_best_that_it_has() {
    let host = Host::new();
    let mut pinning = named("mdev", &host.plain);
    pinning.pinned = Some(Box::new(|_: &mut dyn FnMut(Run)| Ok(())));
    let devices = vec![
        named("nic0", &host.logging),
        named("gpu", &host.plain),
        pinning,
    ];
    let why = "nothing is known of their address translation";
    assert_eq!(
        host.choose(devices, None, fixed()),
        pairs(&[
            (
                "vfio-dma-logging nic0",
                "nic0: the device has a log of its own, others of its group have none"
            ),
            (
                "all-dirty gpu",
                &format!(
                    "gpu: nothing tracks it ({why}): all that it can reach counts as dirty each time"
                )
            ),
            (
                "all-dirty mdev",
                &format!(
                    "mdev: nothing tracks it ({why}): the pages that its driver pins count as dirty each time"
                )
            ),
        ])
    );
}

#[test]
fn a_device_without_tracking_is_refused_where_the_user_wants_none_such() {
    let host = Host::new();
    for memory in [fixed(), viommu()] {
        let mut device = named("gpu", &host.plain);
        device.options.untracked = Untracked::Refuse;
        assert_eq!(
            host.choose(vec![device], None, memory),
            Err(
                "not offered here: migration of gpu: it has no log of the pages that it writes, and nothing is known of their \
                 address translation. Allow that all it can reach counts as dirty, or take the device away first"
                    .to_owned()
            )
        );
    }
}

#[test]
fn pre_copy_tracking_that_is_off_is_said() {
    let host = Host::new();
    let off = |name, fd| {
        let mut device = named(name, fd);
        device.options.pre_copy = PreCopyTracking::Off;
        device
    };
    assert_eq!(
        host.choose(vec![off("nic0", &host.logging)], None, fixed()),
        pairs(&[(
            "vfio-dma-logging nic0",
            "nic0: the device has a log of its own; pre-copy-dirty-page-tracking is off: final collection only"
        )])
    );
    assert_eq!(
        host.choose(vec![off("gpu", &host.plain)], host.container(), fixed()),
        pairs(&[(
            "vfio-type1 group",
            "gpu: the container logs by 4096 bytes; pre-copy-dirty-page-tracking is off: final collection only"
        )])
    );
    let both = vec![off("gpu", &host.plain), named("nic0", &host.logging)];
    assert_eq!(
        host.choose(both, host.container(), fixed()),
        pairs(&[(
            "vfio-type1 group",
            "gpu, nic0: the container logs by 4096 bytes; pre-copy-dirty-page-tracking is off for some, which one log for \
             all cannot tell apart"
        )])
    );
}

#[test]
fn a_device_log_under_the_guests_iommu_is_refused_unless_the_hosts_iommu_tracks() {
    let host = Host::new();
    let devices = || vec![named("nic0", &host.logging)];
    assert_eq!(
        host.choose(devices(), host.dumb_container(), viommu()),
        Err(
            "not offered here: migration of nic0 under the guest's own IOMMU: the device logs by I/O address ranges that are \
             fixed when logging begins, and their container has no dirty log (not offered here: a dirty log of this type 1 \
             container: the kernel names no migration capability). Let the host's IOMMU track it, or give the guest no IOMMU"
                .to_owned()
        )
    );
    assert_eq!(
        host.choose(devices(), host.container(), viommu()),
        pairs(&[(
            "vfio-type1 group",
            "nic0: the container logs by 4096 bytes; the guest has an IOMMU: what it unmaps hands back its dirty pages, what is \
             mapped at the stop is walked"
        )])
    );
    assert_eq!(
        host.choose(vec![named("gpu", &host.plain)], None, viommu()),
        pairs(&[(
            "all-dirty gpu",
            "gpu: nothing tracks them (nothing is known of their address translation), and the guest's IOMMU may map anything: \
             all memory counts as dirty"
        )])
    );
}

#[test]
fn a_group_without_devices_is_misuse() {
    let host = Host::new();
    assert_eq!(
        host.choose(Vec::new(), None, fixed()),
        Err("group has no devices".to_owned())
    );
}
