/* SPDX-License-Identifier: GPL-2.0 */
/*
 * labdev: what its files share.
 *
 * One mutex, `lock`, guards a device: its registers, its state, its memory, its streams. DMA and state changes hold it, so no DMA is under way once a
 * state change to a state without DMA has returned. The log has a mutex of its own, always taken inside `lock` or alone.
 */
#ifndef LABDEV_PRIVATE_H
#define LABDEV_PRIVATE_H

#include <linux/iova_bitmap.h>
#include <linux/mutex.h>
#include <linux/platform_device.h>
#include <linux/prandom.h>
#include <linux/vfio.h>
#include <linux/workqueue.h>

#include "labdev.h"

#define LABDEV_DEVICES_MAX 8
#define LABDEV_RANGES_MAX 64

struct labdev_stream;

/* One range of the DMA log: a bit for each page. */
struct labdev_range {
	u64 first;
	u64 bytes;
	unsigned long *dirty;
};

struct labdev {
	struct vfio_device vdev;
	struct mutex lock;
	bool open;
	u64 reg[LABDEV_REGISTERS];

	/* Device memory, and which blocks of it a save stream has still to carry: as initial data, or since they changed. */
	u8 *memory;
	unsigned long blocks;
	unsigned long *initial;
	unsigned long *changed;

	enum vfio_device_mig_state state;
	struct labdev_stream *saving;
	struct labdev_stream *loading;
	bool precopy_v2;
	bool reinit_unseen;

	struct mutex log_lock;
	bool logging;
	unsigned int range_count;
	struct labdev_range range[LABDEV_RANGES_MAX];

	struct delayed_work engine;
	struct rnd_state random;
};

static inline struct labdev *labdev_of(struct vfio_device *vdev)
{
	return container_of(vdev, struct labdev, vdev);
}

/* stream.c: the state machine and the two data streams */
extern const struct vfio_migration_ops labdev_migration_ops;
void labdev_enter(struct labdev *dev, enum vfio_device_mig_state state);
void labdev_close_streams(struct labdev *dev);
void labdev_reinit(struct labdev *dev, u64 bytes);
u64 labdev_initial_left(struct labdev *dev);

/* dma.c: what the device writes, into guest memory and into its own, and the log of it */
extern const struct vfio_log_ops labdev_log_ops;
bool labdev_may_dma(const struct labdev *dev);
int labdev_dma_fill(struct labdev *dev);
void labdev_run_pending(struct labdev *dev);
void labdev_touch(struct labdev *dev, u64 blocks);
void labdev_engine(struct work_struct *work);
void labdev_log_end(struct labdev *dev);

/* iommu.c: an IOMMU in software behind the devices, for those who want to see iommufd's own dirty tracking */
int labdev_iommu_register(void);
void labdev_iommu_unregister(void);
int labdev_iommu_write(struct device *device, u64 iova, const void *from, size_t bytes);

/* main.c */
extern bool labdev_with_iommu;

#endif
