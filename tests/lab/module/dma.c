// SPDX-License-Identifier: GPL-2.0
/*
 * labdev: what the device writes. Its engine fills the DMA window when told to, and writes random pages of it by itself at a given rate;
 * every page written is logged for VFIO's DMA logging, after the write, so that a report never clears a write that is still to come.
 */
#include <linux/interval_tree.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>

#include "private.h"

#define ENGINE_MS 10

/* A quiescent (P2P) device answers its peers and starts nothing; a stopped one does neither. */
bool labdev_may_dma(const struct labdev *dev)
{
	return dev->state == VFIO_DEVICE_STATE_RUNNING || dev->state == VFIO_DEVICE_STATE_PRE_COPY;
}

static void log_write(struct labdev *dev, u64 iova, u64 bytes)
{
	u64 first = iova & PAGE_MASK, end = PAGE_ALIGN(iova + bytes), page;
	unsigned int i;

	mutex_lock(&dev->log_lock);
	for (i = 0; dev->logging && i < dev->range_count; i++) {
		struct labdev_range *range = &dev->range[i];

		for (page = max(first, range->first); page < min(end, range->first + range->bytes); page += PAGE_SIZE)
			__set_bit((page - range->first) >> PAGE_SHIFT, range->dirty);
	}
	mutex_unlock(&dev->log_lock);
}

/* Writes inside one page. A write that failed may have reached memory in part: it is logged all the same. */
static int dma_write(struct labdev *dev, u64 iova, void *from, size_t bytes)
{
	int error;

	if (labdev_with_iommu)
		error = labdev_iommu_write(dev->vdev.dev, iova, from, bytes);
	else
		error = vfio_dma_rw(&dev->vdev, iova, from, bytes, true);
	log_write(dev, iova, bytes);
	dev->reg[error ? LABDEV_DMA_ERRORS : LABDEV_DMA_PAGES]++;
	return error;
}

/* Fills the window: the word at address A becomes A ^ seed. */
int labdev_dma_fill(struct labdev *dev)
{
	u64 iova = dev->reg[LABDEV_DMA_IOVA], end = iova + dev->reg[LABDEV_DMA_BYTES];
	u64 *page;
	int error = 0;

	if (end < iova || (iova | end) % sizeof(*page))
		return -EINVAL;
	page = kmalloc(PAGE_SIZE, GFP_KERNEL);
	if (!page)
		return -ENOMEM;
	while (iova < end && !error) {
		u64 bytes = min(end, (iova | ~PAGE_MASK) + 1) - iova, at;

		for (at = 0; at < bytes; at += sizeof(*page))
			page[at / sizeof(*page)] = (iova + at) ^ dev->reg[LABDEV_DMA_SEED];
		error = dma_write(dev, iova, page, bytes);
		iova += bytes;
	}
	kfree(page);
	return error;
}

/* What a peer asked for while the device was quiescent, perhaps on another machine. */
void labdev_run_pending(struct labdev *dev)
{
	if (!dev->reg[LABDEV_DMA_PENDING] || !labdev_may_dma(dev))
		return;
	dev->reg[LABDEV_DMA_PENDING] = 0;
	labdev_dma_fill(dev);
}

/* Changes blocks of the device's own memory: all of a first pass differ, and no two changes give the same content. */
void labdev_touch(struct labdev *dev, u64 blocks)
{
	/* Bounded, for it runs under the lock; more changes than blocks change nothing more. */
	for (blocks = min_t(u64, blocks, 4 * dev->blocks); blocks; blocks--) {
		unsigned long block = prandom_u32_state(&dev->random) % dev->blocks;
		u64 *word = (u64 *)(dev->memory + block * LABDEV_BLOCK);

		word[0] = ++dev->reg[LABDEV_TOUCHES];
		word[LABDEV_BLOCK / sizeof(*word) - 1] = ~word[0];
		__set_bit(block, dev->changed);
	}
}

void labdev_engine(struct work_struct *work)
{
	struct labdev *dev = container_of(to_delayed_work(work), struct labdev, engine);
	u64 pages, count;

	mutex_lock(&dev->lock);
	labdev_run_pending(dev);
	pages = dev->reg[LABDEV_DMA_BYTES] >> PAGE_SHIFT;
	if (labdev_may_dma(dev) && dev->reg[LABDEV_DMA_RATE] && pages) {
		for (count = DIV_ROUND_UP(dev->reg[LABDEV_DMA_RATE], 1000 / ENGINE_MS); count; count--) {
			u64 stamp = dev->reg[LABDEV_DMA_PAGES] + 1;
			u64 page = prandom_u32_state(&dev->random) % pages;

			dma_write(dev, dev->reg[LABDEV_DMA_IOVA] + page * PAGE_SIZE, &stamp, sizeof(stamp));
		}
		labdev_touch(dev, 1);
	}
	if (dev->open)
		schedule_delayed_work(&dev->engine, msecs_to_jiffies(ENGINE_MS));
	mutex_unlock(&dev->lock);
}

/* One-shot faults of the log, set by a register. */
static bool log_fails(struct labdev *dev, u64 call)
{
	bool fails = READ_ONCE(dev->reg[LABDEV_FAULT_LOG]) & call;

	if (fails)
		dev->reg[LABDEV_FAULT_LOG] &= ~call;
	return fails;
}

static void free_ranges(struct labdev *dev)
{
	dev->logging = false;
	while (dev->range_count)
		vfree(dev->range[--dev->range_count].dirty);
}

void labdev_log_end(struct labdev *dev)
{
	mutex_lock(&dev->log_lock);
	free_ranges(dev);
	mutex_unlock(&dev->log_lock);
}

static int log_start(struct vfio_device *vdev, struct rb_root_cached *ranges, u32 count, u64 *page_bytes)
{
	struct labdev *dev = labdev_of(vdev);
	struct interval_tree_node *node;
	int error = 0;

	mutex_lock(&dev->log_lock);
	if (log_fails(dev, LABDEV_LOG_START))
		error = -EIO;
	else if (dev->logging)
		error = -EBUSY;
	else if (count > LABDEV_RANGES_MAX)
		error = -E2BIG;
	if (error)
		goto out;
	for (node = interval_tree_iter_first(ranges, 0, ULONG_MAX); node; node = interval_tree_iter_next(node, 0, ULONG_MAX)) {
		struct labdev_range *range = &dev->range[dev->range_count];

		range->first = round_down(node->start, PAGE_SIZE);
		range->bytes = PAGE_ALIGN(node->last - range->first + 1);
		range->dirty = vzalloc(BITS_TO_LONGS(range->bytes >> PAGE_SHIFT) * sizeof(long));
		if (!range->dirty) {
			free_ranges(dev);
			error = -ENOMEM;
			goto out;
		}
		dev->range_count++;
	}
	dev->logging = true;
	*page_bytes = PAGE_SIZE;
out:
	mutex_unlock(&dev->log_lock);
	return error;
}

static int log_stop(struct vfio_device *vdev)
{
	struct labdev *dev = labdev_of(vdev);
	int error = 0;

	mutex_lock(&dev->log_lock);
	if (log_fails(dev, LABDEV_LOG_STOP))
		error = -EIO;
	else
		free_ranges(dev);
	mutex_unlock(&dev->log_lock);
	return error;
}

static int log_read_and_clear(struct vfio_device *vdev, unsigned long iova, unsigned long bytes, struct iova_bitmap *dirty)
{
	struct labdev *dev = labdev_of(vdev);
	unsigned int i;
	u64 page;
	int error = 0;

	mutex_lock(&dev->log_lock);
	if (log_fails(dev, LABDEV_LOG_REPORT))
		error = -EIO;
	else if (!dev->logging)
		error = -EINVAL;
	for (i = 0; !error && i < dev->range_count; i++) {
		struct labdev_range *range = &dev->range[i];
		u64 end = min_t(u64, (u64)iova + bytes, range->first + range->bytes);

		for (page = max_t(u64, round_down(iova, PAGE_SIZE), range->first); page < end; page += PAGE_SIZE)
			if (__test_and_clear_bit((page - range->first) >> PAGE_SHIFT, range->dirty))
				iova_bitmap_set(dirty, max_t(u64, page, iova), min_t(u64, PAGE_SIZE, end - page));
	}
	mutex_unlock(&dev->log_lock);
	return error;
}

const struct vfio_log_ops labdev_log_ops = {
	.log_start = log_start,
	.log_stop = log_stop,
	.log_read_and_clear = log_read_and_clear,
};
