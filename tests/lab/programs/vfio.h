/*
 * What the VFIO test programs share: claims, and the kernel's calls as functions. Errors of a call come back as -errno, so that a claim can name the
 * one that it expects.
 */
#ifndef LAB_VFIO_H
#define LAB_VFIO_H

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <linux/iommufd.h>
#include <linux/vfio.h>

#include "labdev.h"

#define PAGE 4096ULL
#define MEMORY_BYTES (16ULL << 20)
#define MEMORY_IOVA 0x40000000ULL
#define PAGES (MEMORY_BYTES / PAGE)

enum way { BY_GROUP, BY_CDEV };

static int failed;

/* One claim, on one line. */
__attribute__((format(printf, 2, 3))) static inline bool claim(bool holds, const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	printf("%s  ", holds ? "ok    " : "FAILED");
	vprintf(format, arguments);
	putchar('\n');
	va_end(arguments);
	failed += !holds;
	return holds;
}

/* Without this nothing further can be tested. */
#define NEED(condition, ...)                                                                                                           \
	do {                                                                                                                           \
		if (!(condition)) {                                                                                                    \
			int reason = errno;                                                                                            \
			printf("FAILED  " __VA_ARGS__);                                                                                \
			printf(": %s\n", strerror(reason));                                                                            \
			exit(1);                                                                                                       \
		}                                                                                                                      \
	} while (0)

static inline long call(int fd, unsigned long request, void *argument)
{
	long result = ioctl(fd, request, argument);

	return result < 0 ? -errno : result;
}

/* ---- opening a device, by the container or by iommufd ---- */

struct host {
	enum way way;
	int container; /* BY_GROUP */
	int iommu;     /* BY_CDEV */
	uint32_t ioas;
	uint8_t *memory;
};

/* sysfs names of the device's directory and of what VFIO calls it */
struct device_name {
	char directory[128];
	char name[64];
};

static inline struct device_name labdev_name(int number)
{
	struct device_name device;

	snprintf(device.name, sizeof(device.name), "labdev.%d", number);
	snprintf(device.directory, sizeof(device.directory), "/sys/bus/platform/devices/%s", device.name);
	return device;
}

static inline void host_open(struct host *host, enum way way)
{
	struct iommu_ioas_alloc alloc = { .size = sizeof(alloc) };

	host->way = way;
	host->memory = mmap(NULL, MEMORY_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	NEED(host->memory != MAP_FAILED, "memory");
	if (way == BY_GROUP) {
		host->container = open("/dev/vfio/vfio", O_RDWR);
		NEED(host->container >= 0, "/dev/vfio/vfio");
		return;
	}
	host->iommu = open("/dev/iommu", O_RDWR);
	NEED(host->iommu >= 0, "/dev/iommu");
	NEED(!ioctl(host->iommu, IOMMU_IOAS_ALLOC, &alloc), "IOMMU_IOAS_ALLOC");
	host->ioas = alloc.out_ioas_id;
}

static inline int device_by_group(struct host *host, const struct device_name *device)
{
	char path[256], link[256];
	ssize_t bytes;
	int group, fd;

	snprintf(path, sizeof(path), "%s/iommu_group", device->directory);
	bytes = readlink(path, link, sizeof(link) - 1);
	NEED(bytes > 0, "%s", path);
	link[bytes] = 0;
	snprintf(path, sizeof(path), "/dev/vfio/%s", strrchr(link, '/') + 1);
	group = open(path, O_RDWR);
	NEED(group >= 0, "%s", path);
	NEED(!ioctl(group, VFIO_GROUP_SET_CONTAINER, &host->container), "VFIO_GROUP_SET_CONTAINER");
	/* The first group decides; for the others it is decided. */
	NEED(!ioctl(host->container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU) || errno == EINVAL || errno == EBUSY, "VFIO_SET_IOMMU");
	fd = ioctl(group, VFIO_GROUP_GET_DEVICE_FD, device->name);
	NEED(fd >= 0, "VFIO_GROUP_GET_DEVICE_FD %s", device->name);
	return fd;
}

static inline int cdev_open(const struct device_name *device)
{
	struct dirent *entry;
	char path[512];
	int fd = -1;
	DIR *directory;

	snprintf(path, sizeof(path), "%s/vfio-dev", device->directory);
	directory = opendir(path);
	NEED(directory, "%s", path);
	while (fd < 0 && (entry = readdir(directory)))
		if (!strncmp(entry->d_name, "vfio", 4)) {
			snprintf(path, sizeof(path), "/dev/vfio/devices/%s", entry->d_name);
			fd = open(path, O_RDWR);
		}
	closedir(directory);
	NEED(fd >= 0, "%s", path);
	return fd;
}

/* Bound to the iommufd; returns its id there, and the device in *fd. */
static inline uint32_t cdev_bind(struct host *host, const struct device_name *device, int *fd)
{
	struct vfio_device_bind_iommufd bind = { .argsz = sizeof(bind), .iommufd = host->iommu };

	*fd = cdev_open(device);
	NEED(!ioctl(*fd, VFIO_DEVICE_BIND_IOMMUFD, &bind), "VFIO_DEVICE_BIND_IOMMUFD %s", device->name);
	return bind.out_devid;
}

static inline void cdev_attach(int fd, uint32_t table)
{
	struct vfio_device_attach_iommufd_pt attach = { .argsz = sizeof(attach), .pt_id = table };

	NEED(!ioctl(fd, VFIO_DEVICE_ATTACH_IOMMUFD_PT, &attach), "VFIO_DEVICE_ATTACH_IOMMUFD_PT");
}

static inline int device_open(struct host *host, const struct device_name *device)
{
	int fd;

	if (host->way == BY_GROUP)
		return device_by_group(host, device);
	cdev_bind(host, device, &fd);
	cdev_attach(fd, host->ioas);
	return fd;
}

/* The host's memory at MEMORY_IOVA, for all devices. Needs a device in the container. */
static inline void map_memory(struct host *host)
{
	struct vfio_iommu_type1_dma_map type1 = {
		.argsz = sizeof(type1),
		.flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
		.vaddr = (uintptr_t)host->memory,
		.iova = MEMORY_IOVA,
		.size = MEMORY_BYTES,
	};
	struct iommu_ioas_map ioas = {
		.size = sizeof(ioas),
		.flags = IOMMU_IOAS_MAP_FIXED_IOVA | IOMMU_IOAS_MAP_READABLE | IOMMU_IOAS_MAP_WRITEABLE,
		.ioas_id = host->ioas,
		.user_va = (uintptr_t)host->memory,
		.length = MEMORY_BYTES,
		.iova = MEMORY_IOVA,
	};

	if (host->way == BY_GROUP)
		NEED(!ioctl(host->container, VFIO_IOMMU_MAP_DMA, &type1), "VFIO_IOMMU_MAP_DMA");
	else
		NEED(!ioctl(host->iommu, IOMMU_IOAS_MAP, &ioas), "IOMMU_IOAS_MAP");
}

/* ---- registers ---- */

static inline uint64_t get(int fd, enum labdev_register reg)
{
	uint64_t value = 0;

	NEED(pread(fd, &value, sizeof(value), reg * sizeof(value)) == sizeof(value), "reading register %d", reg);
	return value;
}

static inline int set(int fd, enum labdev_register reg, uint64_t value)
{
	return pwrite(fd, &value, sizeof(value), reg * sizeof(value)) == sizeof(value) ? 0 : -errno;
}

/* ---- VFIO_DEVICE_FEATURE ---- */

static inline const char *state_name(int state)
{
	static const char *const names[] = { "ERROR", "STOP", "RUNNING", "STOP_COPY", "RESUMING", "RUNNING_P2P", "PRE_COPY", "PRE_COPY_P2P" };

	return state >= 0 && state < 8 ? names[state] : "?";
}

static inline int state_of(int fd)
{
	struct {
		struct vfio_device_feature head;
		struct vfio_device_feature_mig_state state;
	} ask = { .head = { sizeof(ask), VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE } };
	long result = call(fd, VFIO_DEVICE_FEATURE, &ask);

	return result ? (int)result : (int)ask.state.device_state;
}

/* 0 or -errno; the stream's descriptor, or -1, in *stream. */
static inline int go_to(int fd, int state, int *stream)
{
	struct {
		struct vfio_device_feature head;
		struct vfio_device_feature_mig_state state;
	} ask = { .head = { sizeof(ask), VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE },
		  .state = { .device_state = state, .data_fd = -1 } };
	long result = call(fd, VFIO_DEVICE_FEATURE, &ask);

	if (stream)
		*stream = result ? -1 : ask.state.data_fd;
	return result;
}

static inline int precopy_v2(int fd)
{
	struct vfio_device_feature ask = { sizeof(ask), VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2 };

	return call(fd, VFIO_DEVICE_FEATURE, &ask);
}

static inline int log_begin(int fd, uint64_t iova, uint64_t bytes)
{
	struct vfio_device_feature_dma_logging_range range = { .iova = iova, .length = bytes };
	struct {
		struct vfio_device_feature head;
		struct vfio_device_feature_dma_logging_control control;
	} ask = { .head = { sizeof(ask), VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_DMA_LOGGING_START },
		  .control = { .page_size = PAGE, .num_ranges = 1, .ranges = (uintptr_t)&range } };

	return call(fd, VFIO_DEVICE_FEATURE, &ask);
}

static inline int log_end(int fd)
{
	struct vfio_device_feature ask = { sizeof(ask), VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP };

	return call(fd, VFIO_DEVICE_FEATURE, &ask);
}

/* Adds the pages that the log names to `bitmap`. */
static inline int log_report(int fd, uint64_t *bitmap)
{
	struct {
		struct vfio_device_feature head;
		struct vfio_device_feature_dma_logging_report report;
	} ask = { .head = { sizeof(ask), VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT },
		  .report = { .iova = MEMORY_IOVA, .length = MEMORY_BYTES, .page_size = PAGE, .bitmap = (uintptr_t)bitmap } };

	return call(fd, VFIO_DEVICE_FEATURE, &ask);
}

/* ---- bitmaps ---- */

static inline bool bit(const uint64_t *bitmap, uint64_t page)
{
	return bitmap[page / 64] >> page % 64 & 1;
}

static inline unsigned int bits(const uint64_t *bitmap)
{
	unsigned int count = 0;

	for (unsigned int word = 0; word < PAGES / 64; word++)
		count += __builtin_popcountll(bitmap[word]);
	return count;
}

static inline int finish(void)
{
	printf(failed ? "%d claims failed\n" : "all claims hold\n", failed);
	return failed != 0;
}

#endif
