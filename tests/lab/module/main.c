// SPDX-License-Identifier: GPL-2.0
/*
 * labdev: a VFIO device with nothing behind it, for tests of live migration. The kernel's own VFIO core is what a program speaks to; this is the driver's
 * part: memory of any size, pre-copy with initial data and REINIT, P2P, DMA, a DMA log, and faults on demand.
 *
 *	insmod labdev.ko count=2 memory_kib=8192 migration=7 logging=1 iommu=0
 *
 * iommu=0: an emulated device, which reaches memory through what the VFIO container or iommufd has mapped (vfio_dma_rw).
 * iommu=1: a device behind an IOMMU of this module's own, which keeps dirty bits that iommufd can ask for.
 */
#include <linux/bitmap.h>
#include <linux/crc32.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>

#include "private.h"

static unsigned int count = 2;
module_param(count, uint, 0444);
MODULE_PARM_DESC(count, "number of devices, up to 8");

static unsigned int memory_kib = 1024;
module_param(memory_kib, uint, 0444);
MODULE_PARM_DESC(memory_kib, "memory of each device");

static unsigned int migration = VFIO_MIGRATION_STOP_COPY | VFIO_MIGRATION_P2P | VFIO_MIGRATION_PRE_COPY;
module_param(migration, uint, 0444);
MODULE_PARM_DESC(migration, "VFIO_MIGRATION_* bits: 1 stop-copy, 2 P2P, 4 pre-copy; 0: cannot migrate");

static bool logging = true;
module_param(logging, bool, 0444);
MODULE_PARM_DESC(logging, "whether the devices can log their DMA");

bool labdev_with_iommu;
module_param_named(iommu, labdev_with_iommu, bool, 0444);
MODULE_PARM_DESC(iommu, "whether the devices are behind an IOMMU with dirty bits");

static const char *const register_name[] = {
#define LABDEV_NAME(constant, name) #name,
	LABDEV_REGISTER_LIST(LABDEV_NAME)
#undef LABDEV_NAME
};

/* ---- registers ---- */

static u64 register_read(struct labdev *dev, enum labdev_register reg)
{
	switch (reg) {
	case LABDEV_CRC:
		return crc32_le(~0, dev->memory, dev->blocks * LABDEV_BLOCK);
	case LABDEV_STATE:
		return dev->state;
	case LABDEV_INITIAL_LEFT:
		return labdev_initial_left(dev);
	case LABDEV_LOGGING:
		return dev->logging;
	default:
		return dev->reg[reg];
	}
}

static int register_write(struct labdev *dev, enum labdev_register reg, u64 value)
{
	switch (reg) {
	case LABDEV_DMA_IOVA:
	case LABDEV_DMA_BYTES:
	case LABDEV_DMA_SEED:
	case LABDEV_DMA_RATE:
	case LABDEV_INITIAL_BYTES:
	case LABDEV_FAULT_ERROR:
	case LABDEV_FAULT_REFUSE:
	case LABDEV_FAULT_SAVE:
	case LABDEV_FAULT_LOAD:
	case LABDEV_FAULT_LOG:
		dev->reg[reg] = value;
		return 0;
	case LABDEV_DMA_START:
		if (labdev_may_dma(dev))
			return labdev_dma_fill(dev);
		if (dev->state != VFIO_DEVICE_STATE_RUNNING_P2P && dev->state != VFIO_DEVICE_STATE_PRE_COPY_P2P)
			return -EBUSY;
		dev->reg[LABDEV_DMA_PENDING] = 1;
		return 0;
	case LABDEV_TOUCH:
		labdev_touch(dev, value);
		return 0;
	case LABDEV_REINIT:
		if (!dev->saving)
			return -EBUSY;
		labdev_reinit(dev, value);
		return 0;
	case LABDEV_BREAK:
		labdev_enter(dev, VFIO_DEVICE_STATE_ERROR);
		return 0;
	case LABDEV_TRACE:
		dev->reg[reg] = ~0ULL;
		return 0;
	default:
		return -EPERM;
	}
}

static ssize_t registers_show(struct device *device, struct device_attribute *attr, char *to)
{
	struct labdev *dev = dev_get_drvdata(device);
	ssize_t bytes = 0;
	int reg;

	mutex_lock(&dev->lock);
	for (reg = 0; reg < LABDEV_REGISTERS; reg++)
		bytes += sysfs_emit_at(to, bytes, reg == LABDEV_TRACE ? "%s %016llx\n" : "%s %llu\n", register_name[reg],
				       register_read(dev, reg));
	mutex_unlock(&dev->lock);
	return bytes;
}

static ssize_t registers_store(struct device *device, struct device_attribute *attr, const char *from, size_t bytes)
{
	struct labdev *dev = dev_get_drvdata(device);
	char name[32];
	u64 value;
	int reg, error;

	if (sscanf(from, "%31s %lli", name, (long long *)&value) != 2)
		return -EINVAL;
	for (reg = 0; reg < LABDEV_REGISTERS; reg++)
		if (!strcmp(name, register_name[reg]))
			break;
	if (reg == LABDEV_REGISTERS)
		return -EINVAL;
	mutex_lock(&dev->lock);
	error = register_write(dev, reg, value);
	mutex_unlock(&dev->lock);
	return error ? error : bytes;
}
static DEVICE_ATTR_RW(registers);

static struct attribute *labdev_attrs[] = {
	&dev_attr_registers.attr,
	NULL,
};
ATTRIBUTE_GROUPS(labdev);

/* ---- what VFIO calls ---- */

/* Which register an access means: 8 bytes, at a multiple of 8. */
static int register_at(size_t bytes, loff_t pos)
{
	if (bytes != sizeof(u64) || pos < 0 || pos % sizeof(u64) || pos / sizeof(u64) >= LABDEV_REGISTERS)
		return -EINVAL;
	return pos / sizeof(u64);
}

static ssize_t labdev_read(struct vfio_device *vdev, char __user *to, size_t bytes, loff_t *pos)
{
	struct labdev *dev = labdev_of(vdev);
	int reg = register_at(bytes, *pos);
	u64 value;

	if (reg < 0)
		return reg;
	mutex_lock(&dev->lock);
	value = register_read(dev, reg);
	mutex_unlock(&dev->lock);
	if (copy_to_user(to, &value, sizeof(value)))
		return -EFAULT;
	*pos += bytes;
	return bytes;
}

static ssize_t labdev_write(struct vfio_device *vdev, const char __user *from, size_t bytes, loff_t *pos)
{
	struct labdev *dev = labdev_of(vdev);
	int reg = register_at(bytes, *pos), error;
	u64 value;

	if (reg < 0)
		return reg;
	if (copy_from_user(&value, from, sizeof(value)))
		return -EFAULT;
	mutex_lock(&dev->lock);
	error = register_write(dev, reg, value);
	mutex_unlock(&dev->lock);
	if (error)
		return error;
	*pos += bytes;
	return bytes;
}

static long get_info(void __user *arg)
{
	const size_t known = offsetofend(struct vfio_device_info, num_irqs);
	struct vfio_device_info info;

	if (copy_from_user(&info, arg, known))
		return -EFAULT;
	if (info.argsz < known)
		return -EINVAL;
	info.flags = VFIO_DEVICE_FLAGS_RESET;
	info.num_regions = 1;
	info.num_irqs = 0;
	return copy_to_user(arg, &info, known) ? -EFAULT : 0;
}

static long get_region_info(void __user *arg)
{
	const size_t known = offsetofend(struct vfio_region_info, offset);
	struct vfio_region_info info;

	if (copy_from_user(&info, arg, known))
		return -EFAULT;
	if (info.argsz < known || info.index)
		return -EINVAL;
	info.flags = VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE;
	info.cap_offset = 0;
	info.size = LABDEV_REGISTERS * sizeof(u64);
	info.offset = 0;
	return copy_to_user(arg, &info, known) ? -EFAULT : 0;
}

/* Running, without streams, faults, or DMA of its own. Memory stays. */
static void reset(struct labdev *dev)
{
	labdev_close_streams(dev);
	dev->reg[LABDEV_DMA_RATE] = 0;
	dev->reg[LABDEV_DMA_PENDING] = 0;
	dev->reg[LABDEV_FAULT_ERROR] = 0;
	dev->reg[LABDEV_FAULT_REFUSE] = 0;
	dev->reg[LABDEV_FAULT_SAVE] = 0;
	dev->reg[LABDEV_FAULT_LOAD] = 0;
	dev->reg[LABDEV_FAULT_LOG] = 0;
	labdev_enter(dev, VFIO_DEVICE_STATE_RUNNING);
}

static long labdev_ioctl(struct vfio_device *vdev, unsigned int command, unsigned long arg)
{
	struct labdev *dev = labdev_of(vdev);

	switch (command) {
	case VFIO_DEVICE_GET_INFO:
		return get_info((void __user *)arg);
	case VFIO_DEVICE_GET_REGION_INFO:
		return get_region_info((void __user *)arg);
	case VFIO_DEVICE_RESET:
		mutex_lock(&dev->lock);
		reset(dev);
		mutex_unlock(&dev->lock);
		return 0;
	default:
		return -ENOTTY;
	}
}

/* Kernel 6.12's core hands the features that it does not know to the driver; newer cores see to this one themselves. */
static int labdev_feature(struct vfio_device *vdev, u32 flags, void __user *arg, size_t bytes)
{
	struct labdev *dev = labdev_of(vdev);
	int doit;

	if ((flags & VFIO_DEVICE_FEATURE_MASK) != VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2 ||
	    !(vdev->migration_flags & VFIO_MIGRATION_PRE_COPY))
		return -ENOTTY;
	doit = vfio_check_feature(flags, bytes, VFIO_DEVICE_FEATURE_SET, 0);
	if (doit != 1)
		return doit;
	mutex_lock(&dev->lock);
	dev->precopy_v2 = true;
	mutex_unlock(&dev->lock);
	return 0;
}

/* Faults that were set before stay set: a script may arm them before the program opens the device. */
static int labdev_open(struct vfio_device *vdev)
{
	struct labdev *dev = labdev_of(vdev);

	mutex_lock(&dev->lock);
	dev->open = true;
	dev->precopy_v2 = false;
	dev->reg[LABDEV_TRACE] = ~0ULL;
	labdev_enter(dev, VFIO_DEVICE_STATE_RUNNING);
	mutex_unlock(&dev->lock);
	schedule_delayed_work(&dev->engine, 0);
	return 0;
}

static void labdev_close(struct vfio_device *vdev)
{
	struct labdev *dev = labdev_of(vdev);

	mutex_lock(&dev->lock);
	dev->open = false;
	dev->reg[LABDEV_DMA_RATE] = 0;
	dev->reg[LABDEV_DMA_PENDING] = 0;
	labdev_close_streams(dev);
	mutex_unlock(&dev->lock);
	cancel_delayed_work_sync(&dev->engine);
	labdev_log_end(dev);
}

/* Nothing is pinned for longer than one write, so there is nothing to let go. The core wants the call to be there. */
static void labdev_dma_unmap(struct vfio_device *vdev, u64 iova, u64 bytes)
{
}

static int labdev_init(struct vfio_device *vdev)
{
	struct labdev *dev = labdev_of(vdev);
	u64 *word, *end;

	mutex_init(&dev->lock);
	mutex_init(&dev->log_lock);
	INIT_DELAYED_WORK(&dev->engine, labdev_engine);
	dev->blocks = max(1UL, memory_kib * 1024UL / LABDEV_BLOCK);
	dev->memory = vzalloc(dev->blocks * LABDEV_BLOCK);
	dev->initial = vzalloc(BITS_TO_LONGS(dev->blocks) * sizeof(long));
	dev->changed = vzalloc(BITS_TO_LONGS(dev->blocks) * sizeof(long));
	if (!dev->memory || !dev->initial || !dev->changed) {
		vfree(dev->changed);
		vfree(dev->initial);
		vfree(dev->memory);
		return -ENOMEM;
	}
	/* Each device begins with content of its own, so that state that did not move is seen. */
	prandom_seed_state(&dev->random, to_platform_device(vdev->dev)->id + 1);
	end = (u64 *)(dev->memory + dev->blocks * LABDEV_BLOCK);
	for (word = (u64 *)dev->memory; word < end; word += 64)
		*word = prandom_u32_state(&dev->random);
	dev->reg[LABDEV_MAGIC] = LABDEV_MAGIC_VALUE;
	dev->reg[LABDEV_MEMORY_BYTES] = (u64)dev->blocks * LABDEV_BLOCK;
	dev->reg[LABDEV_INITIAL_BYTES] = dev->reg[LABDEV_MEMORY_BYTES];
	dev->reg[LABDEV_TRACE] = ~0ULL;
	dev->state = VFIO_DEVICE_STATE_RUNNING;
	if (migration) {
		vdev->migration_flags = migration;
		vdev->mig_ops = &labdev_migration_ops;
	}
	if (logging)
		vdev->log_ops = &labdev_log_ops;
	return 0;
}

static void labdev_release(struct vfio_device *vdev)
{
	struct labdev *dev = labdev_of(vdev);

	vfree(dev->changed);
	vfree(dev->initial);
	vfree(dev->memory);
}

#define LABDEV_OPS(kind)                                                                                                               \
	{                                                                                                                              \
		.name = "labdev", .init = labdev_init, .release = labdev_release, .open_device = labdev_open,                          \
		.close_device = labdev_close, .read = labdev_read, .write = labdev_write, .ioctl = labdev_ioctl,                       \
		.dma_unmap = labdev_dma_unmap, .device_feature = labdev_feature, .bind_iommufd = vfio_iommufd_##kind##_bind,           \
		.unbind_iommufd = vfio_iommufd_##kind##_unbind, .attach_ioas = vfio_iommufd_##kind##_attach_ioas,                      \
		.detach_ioas = vfio_iommufd_##kind##_detach_ioas,                                                                      \
	}
static const struct vfio_device_ops emulated_ops = LABDEV_OPS(emulated);
static const struct vfio_device_ops behind_iommu_ops = LABDEV_OPS(physical);

/* ---- the platform devices ---- */

static int labdev_probe(struct platform_device *platform)
{
	struct labdev *dev;
	int error;

	dev = vfio_alloc_device(labdev, vdev, &platform->dev, labdev_with_iommu ? &behind_iommu_ops : &emulated_ops);
	if (IS_ERR(dev))
		return PTR_ERR(dev);
	platform_set_drvdata(platform, dev);
	if (labdev_with_iommu)
		error = vfio_register_group_dev(&dev->vdev);
	else
		error = vfio_register_emulated_iommu_dev(&dev->vdev);
	if (error)
		vfio_put_device(&dev->vdev);
	return error;
}

static void labdev_remove(struct platform_device *platform)
{
	struct labdev *dev = platform_get_drvdata(platform);

	vfio_unregister_group_dev(&dev->vdev);
	vfio_put_device(&dev->vdev);
}

static struct platform_driver labdev_driver = {
	.probe = labdev_probe,
	.remove_new = labdev_remove,
	.driver = {
		.name = "labdev",
		.dev_groups = labdev_groups,
	},
	/* VFIO itself claims the group's DMA; the device does none through the DMA API. */
	.driver_managed_dma = true,
};

static struct platform_device *platforms[LABDEV_DEVICES_MAX];

static void remove_devices(void)
{
	int i;

	for (i = 0; i < LABDEV_DEVICES_MAX; i++)
		if (!IS_ERR_OR_NULL(platforms[i]))
			platform_device_unregister(platforms[i]);
	platform_driver_unregister(&labdev_driver);
	if (labdev_with_iommu)
		labdev_iommu_unregister();
}

static int __init labdev_begin(void)
{
	int i, error;

	if (count > LABDEV_DEVICES_MAX)
		return -EINVAL;
	error = labdev_with_iommu ? labdev_iommu_register() : 0;
	if (error)
		return error;
	error = platform_driver_register(&labdev_driver);
	if (error) {
		if (labdev_with_iommu)
			labdev_iommu_unregister();
		return error;
	}
	for (i = 0; i < count; i++) {
		platforms[i] = platform_device_register_simple("labdev", i, NULL, 0);
		if (IS_ERR(platforms[i])) {
			error = PTR_ERR(platforms[i]);
			remove_devices();
			return error;
		}
	}
	return 0;
}

static void __exit labdev_end(void)
{
	remove_devices();
}

module_init(labdev_begin);
module_exit(labdev_end);
MODULE_LICENSE("GPL");
MODULE_IMPORT_NS(IOMMUFD);
MODULE_DESCRIPTION("A VFIO device for tests of live migration");
