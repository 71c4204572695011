// SPDX-License-Identifier: GPL-2.0
/*
 * labdev: migration. The states are walked as the VFIO core says; entering a state opens or closes the stream that belongs to it.
 *
 * The stream is records, each a head of 16 bytes and its body:
 *
 *	HEAD   magic, version, bytes of device memory
 *	BLOCK  one block of memory, at `offset`: initial data first, then what changed, again and again
 *	END    the registers that migrate, and the CRC-32 of memory: written in STOP_COPY when nothing is left
 *
 * Loading checks everything that it is given, and memory's CRC at the end. A stream without its END cannot be left for STOP.
 */
#include <linux/anon_inodes.h>
#include <linux/bitmap.h>
#include <linux/crc32.h>
#include <linux/file.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "private.h"

#define STREAM_VERSION 1

enum record_kind { RECORD_HEAD = 1, RECORD_BLOCK, RECORD_END };

struct record {
	__le32 kind;
	__le32 bytes;
	__le64 offset;
};

struct head_body {
	__le64 magic;
	__le64 version;
	__le64 memory_bytes;
};

/* The registers that belong to the device's state, in the order of the END record. */
static const enum labdev_register migrating[] = {
	LABDEV_DMA_IOVA,  LABDEV_DMA_BYTES,   LABDEV_DMA_SEED, LABDEV_DMA_RATE,
	LABDEV_DMA_PAGES, LABDEV_DMA_PENDING, LABDEV_TOUCHES,  LABDEV_INITIAL_BYTES,
};

struct end_body {
	__le64 crc;
	__le64 reg[ARRAY_SIZE(migrating)];
};

/* One data stream, guarded by its device's lock. Its descriptor keeps the device, and gives ENODEV once the device has left the state. */
struct labdev_stream {
	struct labdev *dev;
	struct file *file;
	bool left;
	bool has_head;
	bool has_end;
	bool staged_initial; /* saving: what is in `staged` is initial data */
	u64 total;
	size_t used; /* bytes in `staged`; loading: received so far */
	size_t taken; /* saving: bytes of `staged` already read */
	u8 staged[sizeof(struct record) + LABDEV_BLOCK];
};

static u64 blocks_as_records(const unsigned long *bits, const struct labdev *dev)
{
	return (u64)bitmap_weight(bits, dev->blocks) * (sizeof(struct record) + LABDEV_BLOCK);
}

u64 labdev_initial_left(struct labdev *dev)
{
	u64 staged = dev->saving && dev->saving->staged_initial ? dev->saving->used - dev->saving->taken : 0;

	return blocks_as_records(dev->initial, dev) + staged;
}

/* A new device reconfigures itself: what changed so far, and the first `bytes` of memory, are initial data from now on. */
void labdev_reinit(struct labdev *dev, u64 bytes)
{
	unsigned long blocks = min_t(u64, DIV_ROUND_UP(bytes, LABDEV_BLOCK), dev->blocks);

	if (!dev->precopy_v2) {
		bitmap_set(dev->changed, 0, blocks);
		return;
	}
	bitmap_or(dev->initial, dev->initial, dev->changed, dev->blocks);
	bitmap_set(dev->initial, 0, blocks);
	bitmap_zero(dev->changed, dev->blocks);
	dev->reinit_unseen = true;
}

/* ---- saving ---- */

static void stage(struct labdev_stream *stream, enum record_kind kind, u64 offset, const void *body, size_t bytes)
{
	struct record record = {
		.kind = cpu_to_le32(kind),
		.bytes = cpu_to_le32(bytes),
		.offset = cpu_to_le64(offset),
	};

	memcpy(stream->staged, &record, sizeof(record));
	memcpy(stream->staged + sizeof(record), body, bytes);
	stream->used = sizeof(record) + bytes;
	stream->taken = 0;
}

static void stage_end(struct labdev *dev, struct labdev_stream *stream)
{
	struct end_body body = { .crc = cpu_to_le64(crc32_le(~0, dev->memory, dev->blocks * LABDEV_BLOCK)) };
	int i;

	for (i = 0; i < ARRAY_SIZE(migrating); i++)
		body.reg[i] = cpu_to_le64(dev->reg[migrating[i]]);
	stage(stream, RECORD_END, 0, &body, sizeof(body));
	stream->has_end = true;
}

/* Stages the next record: 0, or -ENODATA at the end of the stream, or -ENOMSG if there is nothing until the device changes or stops. */
static int stage_next(struct labdev *dev, struct labdev_stream *stream)
{
	unsigned long block;

	if (!stream->has_head) {
		struct head_body body = {
			.magic = cpu_to_le64(LABDEV_MAGIC_VALUE),
			.version = cpu_to_le64(STREAM_VERSION),
			.memory_bytes = cpu_to_le64((u64)dev->blocks * LABDEV_BLOCK),
		};

		stage(stream, RECORD_HEAD, 0, &body, sizeof(body));
		stream->staged_initial = true;
		stream->has_head = true;
		return 0;
	}
	block = find_first_bit(dev->initial, dev->blocks);
	stream->staged_initial = block < dev->blocks;
	if (!stream->staged_initial)
		block = find_first_bit(dev->changed, dev->blocks);
	if (block < dev->blocks) {
		__clear_bit(block, dev->initial);
		__clear_bit(block, dev->changed);
		stage(stream, RECORD_BLOCK, (u64)block * LABDEV_BLOCK, dev->memory + block * LABDEV_BLOCK, LABDEV_BLOCK);
		return 0;
	}
	if (dev->state != VFIO_DEVICE_STATE_STOP_COPY)
		return -ENOMSG;
	if (stream->has_end)
		return -ENODATA;
	stage_end(dev, stream);
	return 0;
}

/* How many of `bytes` may pass before the fault `reg` (1 + offset in the stream) strikes; at 0 it does, and is over. */
static size_t before_fault(struct labdev_stream *stream, enum labdev_register reg, size_t bytes)
{
	u64 at = stream->dev->reg[reg];

	if (!at || stream->total + bytes < at)
		return bytes;
	if (stream->total < at - 1)
		return at - 1 - stream->total;
	stream->dev->reg[reg] = 0;
	return 0;
}

static ssize_t save_read(struct file *file, char __user *to, size_t bytes, loff_t *pos)
{
	struct labdev_stream *stream = file->private_data;
	struct labdev *dev = stream->dev;
	ssize_t done = 0;
	int error = 0;

	if (pos)
		return -ESPIPE;
	if (!bytes)
		return 0;
	mutex_lock(&dev->lock);
	bytes = before_fault(stream, LABDEV_FAULT_SAVE, bytes);
	if (stream->left)
		error = -ENODEV;
	else if (!bytes)
		error = -EIO;
	while (!error && done < bytes) {
		size_t part;

		if (stream->taken == stream->used) {
			error = stage_next(dev, stream);
			continue;
		}
		part = min(bytes - done, stream->used - stream->taken);
		if (copy_to_user(to + done, stream->staged + stream->taken, part)) {
			error = -EFAULT;
			break;
		}
		stream->taken += part;
		stream->total += part;
		done += part;
	}
	dev->reg[LABDEV_SAVED_BYTES] = stream->total;
	mutex_unlock(&dev->lock);
	if (done)
		return done;
	return error == -ENODATA ? 0 : error;
}

static long save_precopy_info(struct labdev_stream *stream, unsigned long arg)
{
	struct labdev *dev = stream->dev;
	const size_t known = offsetofend(struct vfio_precopy_info, dirty_bytes);
	struct vfio_precopy_info info;
	long error = 0;

	if (copy_from_user(&info, (void __user *)arg, known))
		return -EFAULT;
	if (info.argsz < known)
		return -EINVAL;
	mutex_lock(&dev->lock);
	if (stream->left)
		error = -ENODEV;
	else if (dev->state != VFIO_DEVICE_STATE_PRE_COPY && dev->state != VFIO_DEVICE_STATE_PRE_COPY_P2P)
		error = -EINVAL;
	/* Without the opt-in, flags come back as they were given: so do the drivers of kernels before it. */
	if (dev->precopy_v2)
		info.flags = dev->reinit_unseen ? VFIO_PRECOPY_INFO_REINIT : 0;
	if (!error)
		dev->reinit_unseen = false;
	info.initial_bytes = labdev_initial_left(dev);
	info.dirty_bytes = blocks_as_records(dev->changed, dev) + (stream->staged_initial ? 0 : stream->used - stream->taken);
	mutex_unlock(&dev->lock);
	if (!error && copy_to_user((void __user *)arg, &info, known))
		error = -EFAULT;
	return error;
}

static long save_ioctl(struct file *file, unsigned int command, unsigned long arg)
{
	return command == VFIO_MIG_GET_PRECOPY_INFO ? save_precopy_info(file->private_data, arg) : -ENOTTY;
}

/* ---- loading ---- */

/* A whole record is in `staged`. */
static int load_record(struct labdev *dev, struct labdev_stream *stream)
{
	const struct record *record = (const void *)stream->staged;
	const u8 *body = stream->staged + sizeof(*record);
	u32 kind = le32_to_cpu(record->kind), bytes = le32_to_cpu(record->bytes);
	u64 offset = le64_to_cpu(record->offset), memory_bytes = (u64)dev->blocks * LABDEV_BLOCK;
	const struct head_body *head = (const void *)body;
	const struct end_body *end = (const void *)body;
	int i;

	if (stream->has_end || stream->has_head == (kind == RECORD_HEAD))
		return -EINVAL;
	switch (kind) {
	case RECORD_HEAD:
		if (bytes != sizeof(*head) || offset || le64_to_cpu(head->magic) != LABDEV_MAGIC_VALUE ||
		    le64_to_cpu(head->version) != STREAM_VERSION || le64_to_cpu(head->memory_bytes) != memory_bytes)
			return -EINVAL;
		stream->has_head = true;
		return 0;
	case RECORD_BLOCK:
		if (bytes != LABDEV_BLOCK || offset % LABDEV_BLOCK || offset >= memory_bytes)
			return -EINVAL;
		memcpy(dev->memory + offset, body, LABDEV_BLOCK);
		return 0;
	case RECORD_END:
		if (bytes != sizeof(*end) || offset)
			return -EINVAL;
		if (le64_to_cpu(end->crc) != crc32_le(~0, dev->memory, memory_bytes))
			return -EILSEQ;
		for (i = 0; i < ARRAY_SIZE(migrating); i++)
			dev->reg[migrating[i]] = le64_to_cpu(end->reg[i]);
		stream->has_end = true;
		return 0;
	}
	return -EINVAL;
}

static ssize_t load_write(struct file *file, const char __user *from, size_t bytes, loff_t *pos)
{
	struct labdev_stream *stream = file->private_data;
	struct labdev *dev = stream->dev;
	ssize_t done = 0;
	int error = 0;

	if (pos)
		return -ESPIPE;
	if (!bytes)
		return 0;
	mutex_lock(&dev->lock);
	bytes = before_fault(stream, LABDEV_FAULT_LOAD, bytes);
	if (stream->left)
		error = -ENODEV;
	else if (!bytes)
		error = -EIO;
	while (!error && done < bytes) {
		const struct record *record = (const void *)stream->staged;
		size_t whole = sizeof(*record), part;

		if (stream->used >= whole)
			whole += le32_to_cpu(record->bytes);
		if (whole > sizeof(stream->staged)) {
			error = -EINVAL;
			break;
		}
		part = min(bytes - done, whole - stream->used);
		if (copy_from_user(stream->staged + stream->used, from + done, part)) {
			error = -EFAULT;
			break;
		}
		stream->used += part;
		stream->total += part;
		done += part;
		if (stream->used >= sizeof(*record) && stream->used == sizeof(*record) + le32_to_cpu(record->bytes)) {
			error = load_record(dev, stream);
			stream->used = 0;
		}
	}
	dev->reg[LABDEV_LOADED_BYTES] = stream->total;
	mutex_unlock(&dev->lock);
	return error ? error : done;
}

/* ---- streams and states ---- */

static int stream_release(struct inode *inode, struct file *file)
{
	struct labdev_stream *stream = file->private_data;

	put_device(&stream->dev->vdev.device);
	kvfree(stream);
	return 0;
}

static const struct file_operations save_operations = {
	.owner = THIS_MODULE,
	.read = save_read,
	.unlocked_ioctl = save_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.release = stream_release,
};

static const struct file_operations load_operations = {
	.owner = THIS_MODULE,
	.write = load_write,
	.release = stream_release,
};

/* A stream in `*slot`, with one reference for the device and one for the descriptor that the caller will get. */
static struct file *open_stream(struct labdev *dev, struct labdev_stream **slot, bool saving)
{
	struct labdev_stream *stream = kvzalloc(sizeof(*stream), GFP_KERNEL_ACCOUNT);
	struct file *file;

	if (!stream)
		return ERR_PTR(-ENOMEM);
	stream->dev = dev;
	file = anon_inode_getfile("labdev-stream", saving ? &save_operations : &load_operations, stream, saving ? O_RDONLY : O_WRONLY);
	if (IS_ERR(file)) {
		kvfree(stream);
		return file;
	}
	get_device(&dev->vdev.device);
	stream_open(file_inode(file), file);
	stream->file = file;
	*slot = stream;
	return get_file(file);
}

static void close_stream(struct labdev_stream **slot)
{
	struct labdev_stream *stream = *slot;

	if (!stream)
		return;
	*slot = NULL;
	stream->left = true;
	fput(stream->file);
}

void labdev_close_streams(struct labdev *dev)
{
	close_stream(&dev->saving);
	close_stream(&dev->loading);
	dev->reinit_unseen = false;
}

/* The device is in `state` now. */
void labdev_enter(struct labdev *dev, enum vfio_device_mig_state state)
{
	dev->state = state;
	dev->reg[LABDEV_TRACE] = dev->reg[LABDEV_TRACE] << 4 | (state & 0xf);
	if (state == VFIO_DEVICE_STATE_ERROR)
		labdev_close_streams(dev);
}

static struct file *begin_saving(struct labdev *dev)
{
	unsigned long initial = min_t(u64, DIV_ROUND_UP(dev->reg[LABDEV_INITIAL_BYTES], LABDEV_BLOCK), dev->blocks);
	struct file *file = open_stream(dev, &dev->saving, true);

	if (IS_ERR(file))
		return file;
	bitmap_fill(dev->changed, dev->blocks);
	bitmap_clear(dev->changed, 0, initial);
	bitmap_zero(dev->initial, dev->blocks);
	bitmap_set(dev->initial, 0, initial);
	dev->reg[LABDEV_SAVED_BYTES] = 0;
	dev->reinit_unseen = false;
	return file;
}

/* One legal arc. Those not named (into and out of P2P, stop and start, PRE_COPY_P2P to STOP_COPY) change nothing but the state. */
static struct file *step(struct labdev *dev, enum vfio_device_mig_state to)
{
	enum vfio_device_mig_state from = dev->state;
	bool from_precopy = from == VFIO_DEVICE_STATE_PRE_COPY || from == VFIO_DEVICE_STATE_PRE_COPY_P2P;
	bool to_precopy = to == VFIO_DEVICE_STATE_PRE_COPY || to == VFIO_DEVICE_STATE_PRE_COPY_P2P;

	if (from == VFIO_DEVICE_STATE_RESUMING) {
		if (!dev->loading->has_end)
			return ERR_PTR(-EINVAL);
		close_stream(&dev->loading);
	} else if (to == VFIO_DEVICE_STATE_RESUMING) {
		dev->reg[LABDEV_LOADED_BYTES] = 0;
		return open_stream(dev, &dev->loading, false);
	} else if ((to_precopy || to == VFIO_DEVICE_STATE_STOP_COPY) && !dev->saving) {
		return begin_saving(dev);
	} else if (dev->saving && !to_precopy && to != VFIO_DEVICE_STATE_STOP_COPY) {
		WARN_ON(!from_precopy && from != VFIO_DEVICE_STATE_STOP_COPY);
		labdev_close_streams(dev);
	}
	return NULL;
}

/* A fault that was set for entering `state`, once: the device breaks, or stays where it is. */
static int enter_fault(struct labdev *dev, enum vfio_device_mig_state state)
{
	if (dev->reg[LABDEV_FAULT_ERROR] & BIT_ULL(state)) {
		dev->reg[LABDEV_FAULT_ERROR] &= ~BIT_ULL(state);
		labdev_enter(dev, VFIO_DEVICE_STATE_ERROR);
		return -EIO;
	}
	if (dev->reg[LABDEV_FAULT_REFUSE] & BIT_ULL(state)) {
		dev->reg[LABDEV_FAULT_REFUSE] &= ~BIT_ULL(state);
		return -EBUSY;
	}
	return 0;
}

static struct file *set_state(struct vfio_device *vdev, enum vfio_device_mig_state target)
{
	struct labdev *dev = labdev_of(vdev);
	struct file *file = NULL;
	int error = 0;

	mutex_lock(&dev->lock);
	/* No arc leads out of ERROR; only a reset does. */
	if (dev->state == VFIO_DEVICE_STATE_ERROR)
		error = -EINVAL;
	while (!error && dev->state != target) {
		enum vfio_device_mig_state next;

		error = vfio_mig_get_next_state(vdev, dev->state, target, &next);
		if (!error)
			error = enter_fault(dev, next);
		if (error)
			break;
		file = step(dev, next);
		if (IS_ERR(file)) {
			error = PTR_ERR(file);
			break;
		}
		labdev_enter(dev, next);
		/* The core's arcs give a descriptor in the last step only. */
		if (WARN_ON(file && next != target)) {
			fput(file);
			error = -EINVAL;
			break;
		}
	}
	if (!error)
		labdev_run_pending(dev);
	mutex_unlock(&dev->lock);
	return error ? ERR_PTR(error) : file;
}

static int get_state(struct vfio_device *vdev, enum vfio_device_mig_state *state)
{
	struct labdev *dev = labdev_of(vdev);

	mutex_lock(&dev->lock);
	*state = dev->state;
	mutex_unlock(&dev->lock);
	return 0;
}

/* What STOP_COPY would still have to carry. */
static int get_data_size(struct vfio_device *vdev, unsigned long *bytes)
{
	struct labdev *dev = labdev_of(vdev);

	mutex_lock(&dev->lock);
	*bytes = sizeof(struct record) + sizeof(struct end_body);
	if (dev->saving)
		*bytes += labdev_initial_left(dev) + blocks_as_records(dev->changed, dev);
	else
		*bytes += sizeof(struct record) + sizeof(struct head_body) + dev->blocks * (sizeof(struct record) + LABDEV_BLOCK);
	mutex_unlock(&dev->lock);
	return 0;
}

const struct vfio_migration_ops labdev_migration_ops = {
	.migration_set_state = set_state,
	.migration_get_state = get_state,
	.migration_get_data_size = get_data_size,
};
