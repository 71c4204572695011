// SPDX-License-Identifier: GPL-2.0
/*
 * labdev: an IOMMU in software, for devices with iommu=1. Its page table is an xarray: page number of the I/O address -> frame and permission; the dirty
 * bit of a page is a mark in it. iommufd's hardware page tables with dirty tracking, and the type 1 container, work on it as on a real one.
 *
 * A domain's mutex makes one write of the device, one unmap, and one reading of dirty bits exclude each other: nothing is
 * written after an unmap returned, and no dirty bit is cleared between a write and its mark.
 */
#include <linux/highmem.h>
#include <linux/iommu.h>
#include <linux/iommufd.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/xarray.h>
#include <uapi/linux/iommufd.h>

#include "private.h"

#define DIRTY XA_MARK_0
#define WRITABLE 1UL

struct lab_domain {
	struct iommu_domain domain;
	struct mutex lock;
	struct xarray pages;
	bool tracking;
};

/* Which domain each device is attached to: NULL if to none that translates. */
static DEFINE_MUTEX(attach_lock);
static struct lab_domain *attached[LABDEV_DEVICES_MAX];

static struct lab_domain *lab_domain_of(struct iommu_domain *domain)
{
	return container_of(domain, struct lab_domain, domain);
}

/* The device's write: inside one page, which must be mapped writable. */
int labdev_iommu_write(struct device *device, u64 iova, const void *from, size_t bytes)
{
	unsigned long index = iova >> PAGE_SHIFT, value;
	struct lab_domain *domain;
	int error = -EFAULT;
	void *entry;

	mutex_lock(&attach_lock);
	domain = attached[to_platform_device(device)->id];
	if (!domain || offset_in_page(iova) + bytes > PAGE_SIZE)
		goto out;
	mutex_lock(&domain->lock);
	entry = xa_load(&domain->pages, index);
	value = entry ? xa_to_value(entry) : 0;
	if (value & WRITABLE) {
		memcpy_to_page(pfn_to_page(value >> 1), offset_in_page(iova), from, bytes);
		if (domain->tracking)
			xa_set_mark(&domain->pages, index, DIRTY);
		error = 0;
	}
	mutex_unlock(&domain->lock);
out:
	mutex_unlock(&attach_lock);
	return error;
}

/* ---- domains ---- */

static int map_pages(struct iommu_domain *of, unsigned long iova, phys_addr_t frame, size_t page_bytes, size_t pages, int prot, gfp_t gfp,
		     size_t *mapped)
{
	struct lab_domain *domain = lab_domain_of(of);
	size_t at;
	int error = 0;

	mutex_lock(&domain->lock);
	for (at = 0; at < page_bytes * pages; at += PAGE_SIZE) {
		unsigned long value = ((frame + at) >> PAGE_SHIFT) << 1 | (prot & IOMMU_WRITE ? WRITABLE : 0);

		error = xa_err(xa_store(&domain->pages, (iova + at) >> PAGE_SHIFT, xa_mk_value(value), gfp));
		if (error)
			break;
		*mapped += PAGE_SIZE;
	}
	mutex_unlock(&domain->lock);
	return error;
}

static size_t unmap_pages(struct iommu_domain *of, unsigned long iova, size_t page_bytes, size_t pages, struct iommu_iotlb_gather *gather)
{
	struct lab_domain *domain = lab_domain_of(of);
	size_t at;

	mutex_lock(&domain->lock);
	for (at = 0; at < page_bytes * pages; at += PAGE_SIZE)
		if (!xa_erase(&domain->pages, (iova + at) >> PAGE_SHIFT))
			break;
	mutex_unlock(&domain->lock);
	return at;
}

static phys_addr_t iova_to_phys(struct iommu_domain *of, dma_addr_t iova)
{
	void *entry = xa_load(&lab_domain_of(of)->pages, iova >> PAGE_SHIFT);

	return entry ? (phys_addr_t)(xa_to_value(entry) >> 1) << PAGE_SHIFT | offset_in_page(iova) : 0;
}

static int set_dirty_tracking(struct iommu_domain *of, bool enable)
{
	struct lab_domain *domain = lab_domain_of(of);

	mutex_lock(&domain->lock);
	domain->tracking = enable;
	mutex_unlock(&domain->lock);
	return 0;
}

/* Without a bitmap to record into, the bits are only cleared: so iommufd begins. */
static int read_and_clear_dirty(struct iommu_domain *of, unsigned long iova, size_t bytes, unsigned long flags, struct iommu_dirty_bitmap *dirty)
{
	struct lab_domain *domain = lab_domain_of(of);
	unsigned long index = iova >> PAGE_SHIFT, last = (iova + bytes - 1) >> PAGE_SHIFT;
	void *entry;

	if (!domain->tracking && dirty->bitmap)
		return -EINVAL;
	mutex_lock(&domain->lock);
	for (entry = xa_find(&domain->pages, &index, last, DIRTY); entry; entry = xa_find_after(&domain->pages, &index, last, DIRTY)) {
		iommu_dirty_bitmap_record(dirty, index << PAGE_SHIFT, PAGE_SIZE);
		if (!(flags & IOMMU_DIRTY_NO_CLEAR))
			xa_clear_mark(&domain->pages, index, DIRTY);
	}
	mutex_unlock(&domain->lock);
	return 0;
}

static const struct iommu_dirty_ops dirty_ops = {
	.set_dirty_tracking = set_dirty_tracking,
	.read_and_clear_dirty = read_and_clear_dirty,
};

static int attach(struct device *device, struct lab_domain *domain)
{
	mutex_lock(&attach_lock);
	attached[to_platform_device(device)->id] = domain;
	mutex_unlock(&attach_lock);
	return 0;
}

static int attach_translating(struct iommu_domain *of, struct device *device)
{
	return attach(device, lab_domain_of(of));
}

static int attach_plain(struct iommu_domain *of, struct device *device)
{
	return attach(device, NULL);
}

static void free_domain(struct iommu_domain *of)
{
	struct lab_domain *domain = lab_domain_of(of);

	xa_destroy(&domain->pages);
	kfree(domain);
}

static const struct iommu_domain_ops translating_ops = {
	.attach_dev = attach_translating,
	.map_pages = map_pages,
	.unmap_pages = unmap_pages,
	.iova_to_phys = iova_to_phys,
	.free = free_domain,
};

static const struct iommu_domain_ops plain_ops = { .attach_dev = attach_plain };
/* No device does DMA through either: `identity` is what the core gives to a group that nobody uses. */
static struct iommu_domain identity = { .type = IOMMU_DOMAIN_IDENTITY, .ops = &plain_ops };
static struct iommu_domain blocked = { .type = IOMMU_DOMAIN_BLOCKED, .ops = &plain_ops };

static const struct iommu_ops lab_iommu_ops;

static struct iommu_domain *alloc_paging(struct device *device)
{
	struct lab_domain *domain = kzalloc(sizeof(*domain), GFP_KERNEL);

	if (!domain)
		return ERR_PTR(-ENOMEM);
	mutex_init(&domain->lock);
	xa_init(&domain->pages);
	domain->domain.type = IOMMU_DOMAIN_UNMANAGED;
	domain->domain.ops = &translating_ops;
	domain->domain.owner = &lab_iommu_ops;
	domain->domain.pgsize_bitmap = PAGE_SIZE;
	domain->domain.geometry.aperture_end = (1ULL << 48) - 1;
	domain->domain.geometry.force_aperture = true;
	return &domain->domain;
}

static struct iommu_domain *alloc_user(struct device *device, u32 flags, struct iommu_domain *parent, const struct iommu_user_data *data)
{
	struct iommu_domain *domain;

	if ((flags & ~IOMMU_HWPT_ALLOC_DIRTY_TRACKING) || parent || data)
		return ERR_PTR(-EOPNOTSUPP);
	domain = alloc_paging(device);
	if (!IS_ERR(domain) && (flags & IOMMU_HWPT_ALLOC_DIRTY_TRACKING))
		domain->dirty_ops = &dirty_ops;
	return domain;
}

/* ---- the IOMMU ---- */

static struct iommu_device lab_iommu;

static struct iommu_device *probe_device(struct device *device)
{
	/* The core asks about every device that has no other IOMMU. */
	bool ours = device->bus == &platform_bus_type && strstarts(dev_name(device), "labdev.");

	return ours ? &lab_iommu : ERR_PTR(-ENODEV);
}

static bool iommu_is_capable(struct device *device, enum iommu_cap cap)
{
	return cap == IOMMU_CAP_CACHE_COHERENCY || cap == IOMMU_CAP_DIRTY_TRACKING;
}

static int def_domain_type(struct device *device)
{
	return IOMMU_DOMAIN_IDENTITY;
}

static const struct iommu_ops lab_iommu_ops = {
	.capable = iommu_is_capable,
	.domain_alloc_paging = alloc_paging,
	.domain_alloc_user = alloc_user,
	.probe_device = probe_device,
	.device_group = generic_device_group,
	.def_domain_type = def_domain_type,
	.identity_domain = &identity,
	.blocked_domain = &blocked,
	.pgsize_bitmap = PAGE_SIZE,
	.owner = THIS_MODULE,
};

int labdev_iommu_register(void)
{
	int error = iommu_device_sysfs_add(&lab_iommu, NULL, NULL, "labdev-iommu");

	if (error)
		return error;
	error = iommu_device_register(&lab_iommu, &lab_iommu_ops, NULL);
	if (error)
		iommu_device_sysfs_remove(&lab_iommu);
	return error;
}

void labdev_iommu_unregister(void)
{
	iommu_device_unregister(&lab_iommu);
	iommu_device_sysfs_remove(&lab_iommu);
}
