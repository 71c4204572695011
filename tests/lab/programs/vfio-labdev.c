/*
 * Whether the lab's own device, labdev, does what it says: every claim is checked through the kernel's VFIO interface, on two devices under one memory.
 *
 *	vfio-labdev group|cdev       migration, P2P, initial data, REINIT, DMA and its logs, every fault
 *	vfio-labdev iommu            the devices are behind an IOMMU (iommu=1): iommufd's dirty bits of a hardware page table
 */
#include "vfio.h"

static uint64_t dirty[PAGES / 64], seen[PAGES / 64];

static void forget(void)
{
	memset(dirty, 0, sizeof(dirty));
}

/* ---- DMA and what reports it ---- */

static void fill_window(int fd, uint64_t first_page, uint64_t pages, uint64_t seed)
{
	set(fd, LABDEV_DMA_IOVA, MEMORY_IOVA + first_page * PAGE);
	set(fd, LABDEV_DMA_BYTES, pages * PAGE);
	set(fd, LABDEV_DMA_SEED, seed);
}

/* Whether pages hold what a fill with `seed` writes. */
static bool filled(struct host *host, uint64_t first_page, uint64_t pages, uint64_t seed)
{
	const uint64_t *word = (const uint64_t *)(host->memory + first_page * PAGE);

	for (uint64_t at = 0; at < pages * PAGE; at += 8)
		if (word[at / 8] != ((MEMORY_IOVA + first_page * PAGE + at) ^ seed))
			return false;
	return true;
}

static bool exactly(const uint64_t *bitmap, uint64_t first_page, uint64_t pages)
{
	for (uint64_t page = first_page; page < first_page + pages; page++)
		if (!bit(bitmap, page))
			return false;
	return bits(bitmap) == pages;
}

static void dma_and_its_log(struct host *host, int fd)
{
	uint64_t errors;
	int result;

	fill_window(fd, 100, 7, 77);
	forget();
	result = log_report(fd, dirty);
	claim(result == -EINVAL, "a report without logging is refused: %d", result);
	result = log_begin(fd, MEMORY_IOVA, MEMORY_BYTES);
	claim(!result && get(fd, LABDEV_LOGGING) == 1, "DMA logging starts: %d", result);
	result = log_begin(fd, MEMORY_IOVA, MEMORY_BYTES);
	claim(result == -EBUSY, "and not twice: %d", result);
	result = set(fd, LABDEV_DMA_START, 1);
	claim(!result && filled(host, 100, 7, 77), "the device fills seven pages of our memory: %d", result);
	forget();
	result = log_report(fd, dirty);
	claim(!result && exactly(dirty, 100, 7), "the log names these seven pages and no other: %d, %u pages", result, bits(dirty));
	forget();
	result = log_report(fd, dirty);
	claim(!result && !bits(dirty), "and the second time none: %d, %u pages", result, bits(dirty));

	set(fd, LABDEV_FAULT_LOG, LABDEV_LOG_REPORT);
	result = log_report(fd, dirty);
	claim(result == -EIO, "a report fails when told to: %d", result);
	result = log_report(fd, dirty);
	claim(!result, "once: %d", result);
	set(fd, LABDEV_FAULT_LOG, LABDEV_LOG_STOP);
	claim(log_end(fd) == -EIO && !log_end(fd) && !get(fd, LABDEV_LOGGING), "stopping fails when told to, once, then stops");
	set(fd, LABDEV_FAULT_LOG, LABDEV_LOG_START);
	claim(log_begin(fd, MEMORY_IOVA, MEMORY_BYTES) == -EIO, "so does starting");

	fill_window(fd, PAGES, 1, 1);
	errors = get(fd, LABDEV_DMA_ERRORS);
	result = set(fd, LABDEV_DMA_START, 1);
	claim(result < 0 && get(fd, LABDEV_DMA_ERRORS) == errors + 1, "DMA to where nothing is mapped fails and is counted: %d", result);
}

static void type1_dirty_pages(struct host *host, int fd)
{
	struct vfio_iommu_type1_dirty_bitmap start = { .argsz = sizeof(start), .flags = VFIO_IOMMU_DIRTY_PAGES_FLAG_START };
	struct {
		struct vfio_iommu_type1_dirty_bitmap head;
		struct vfio_iommu_type1_dirty_bitmap_get get;
	} ask = { .head = { sizeof(ask), VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP },
		  .get = { .iova = MEMORY_IOVA, .size = MEMORY_BYTES, .bitmap = { .pgsize = PAGE, .size = PAGES / 8, .data = (void *)dirty } } };
	long result;

	claim(!call(host->container, VFIO_IOMMU_DIRTY_PAGES, &start), "the container tracks dirty pages");
	fill_window(fd, 300, 5, 5);
	set(fd, LABDEV_DMA_START, 1);
	forget();
	result = call(host->container, VFIO_IOMMU_DIRTY_PAGES, &ask);
	claim(!result && exactly(dirty, 300, 5), "and names the five pages that were written: %ld, %u pages", result, bits(dirty));
	start.flags = VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP;
	claim(!call(host->container, VFIO_IOMMU_DIRTY_PAGES, &start), "until it is told to stop");
}

/* ---- migration ---- */

static uint8_t buffer[256 << 10];

/* Moves what there is from `from` to `into` (nowhere if -1): 0 at the end of the stream, or -errno (ENOMSG: nothing more for now). */
static int pump(int from, int into, uint64_t *moved)
{
	for (;;) {
		ssize_t bytes = read(from, buffer, sizeof(buffer));

		if (bytes <= 0)
			return bytes ? -errno : 0;
		*moved += bytes;
		for (ssize_t done = 0; into >= 0 && done < bytes;) {
			ssize_t part = write(into, buffer + done, bytes - done);

			if (part <= 0)
				return part ? -errno : -EPIPE;
			done += part;
		}
	}
}

static int precopy_info(int stream, struct vfio_precopy_info *info)
{
	*info = (struct vfio_precopy_info){ .argsz = sizeof(*info) };
	return call(stream, VFIO_MIG_GET_PRECOPY_INFO, info);
}

static void initial_data_and_reinit(int a)
{
	const uint64_t memory = get(a, LABDEV_MEMORY_BYTES), record = LABDEV_BLOCK + 16;
	struct vfio_precopy_info info;
	uint64_t moved = 0;
	int stream, result;

	set(a, LABDEV_INITIAL_BYTES, memory / 4);
	claim(!go_to(a, VFIO_DEVICE_STATE_PRE_COPY, &stream) && stream >= 0, "PRE_COPY gives a stream");
	result = precopy_info(stream, &info);
	claim(!result && info.initial_bytes == memory / 4 / LABDEV_BLOCK * record && info.dirty_bytes == memory / 4 * 3 / LABDEV_BLOCK * record,
	      "a quarter of the memory is initial data, the rest dirty: %llu and %llu bytes", (unsigned long long)info.initial_bytes,
	      (unsigned long long)info.dirty_bytes);
	result = pump(stream, -1, &moved);
	claim(result == -ENOMSG && moved > memory, "reading ends with ENOMSG while the device runs: %d after %llu bytes", result, (unsigned long long)moved);
	result = precopy_info(stream, &info);
	claim(!result && !info.initial_bytes && !info.dirty_bytes, "then nothing is left");
	set(a, LABDEV_TOUCH, 10);
	result = precopy_info(stream, &info);
	claim(!result && !info.initial_bytes && info.dirty_bytes > 0 && info.dirty_bytes <= 10 * record, "ten changes give up to ten dirty blocks");

	set(a, LABDEV_REINIT, 3 * LABDEV_BLOCK);
	result = precopy_info(stream, &info);
	claim(!result && !info.initial_bytes && !info.flags, "REINIT is no initial data for a program that did not opt in");
	claim(!precopy_v2(a), "opting in to the second version of the pre-copy information");
	set(a, LABDEV_REINIT, 3 * LABDEV_BLOCK);
	result = precopy_info(stream, &info);
	claim(!result && info.flags == VFIO_PRECOPY_INFO_REINIT && info.initial_bytes >= 3 * record && !info.dirty_bytes,
	      "then it is, with the flag, and what was dirty goes with it: %llu bytes", (unsigned long long)info.initial_bytes);
	result = precopy_info(stream, &info);
	claim(!result && !info.flags && info.initial_bytes >= 3 * record, "the flag is seen once");
	pump(stream, -1, &moved);
	claim(!get(a, LABDEV_INITIAL_LEFT), "and read like the first");
	claim(!go_to(a, VFIO_DEVICE_STATE_RUNNING, NULL) && read(stream, buffer, 16) < 0 && errno == ENODEV, "back to RUNNING, the stream is dead");
	close(stream);
	set(a, LABDEV_INITIAL_BYTES, memory);
}

static void live_migration(struct host *host, int a, int b)
{
	uint64_t moved = 0, rounds_dirty = 0, before, sum_a, stopped;
	struct vfio_precopy_info info;
	int save, load, result;

	set(a, LABDEV_TRACE, 0);
	set(b, LABDEV_TRACE, 0);
	log_begin(a, MEMORY_IOVA, MEMORY_BYTES);
	fill_window(a, 0, PAGES, 9);
	set(a, LABDEV_DMA_RATE, 5000);
	NEED(!go_to(a, VFIO_DEVICE_STATE_PRE_COPY, &save), "PRE_COPY");
	NEED(!go_to(b, VFIO_DEVICE_STATE_RESUMING, &load), "RESUMING");
	for (int round = 0; round < 4; round++) {
		result = pump(save, load, &moved);
		claim(result == -ENOMSG, "round %d: all there was is moved: %d, %llu bytes so far", round, result, (unsigned long long)moved);
		usleep(60000);
		forget();
		log_report(a, dirty);
		rounds_dirty += bits(dirty);
	}
	claim(rounds_dirty > 0, "the device's own DMA dirtied %llu pages meanwhile", (unsigned long long)rounds_dirty);
	result = precopy_info(save, &info);
	claim(!result && !info.initial_bytes && info.dirty_bytes, "and blocks of its memory became dirty again");

	/* Quiescent: it answers, and starts nothing. */
	claim(!go_to(a, VFIO_DEVICE_STATE_PRE_COPY_P2P, NULL), "PRE_COPY_P2P");
	before = get(a, LABDEV_DMA_PAGES);
	usleep(60000);
	claim(get(a, LABDEV_DMA_PAGES) == before, "a quiescent device writes nothing by itself");
	fill_window(a, 500, 2, 11);
	claim(!set(a, LABDEV_DMA_START, 1) && !filled(host, 500, 2, 11) && get(a, LABDEV_DMA_PENDING) == 1, "and puts off what a peer asks for");
	claim(!go_to(a, VFIO_DEVICE_STATE_STOP_COPY, NULL), "STOP_COPY, with the same stream");
	claim(set(a, LABDEV_DMA_START, 1) == -EBUSY, "a stopped device refuses");
	forget();
	log_report(a, dirty);
	memcpy(seen, dirty, sizeof(seen));
	usleep(60000);
	forget();
	log_report(a, dirty);
	claim(!bits(dirty), "after STOP_COPY no page becomes dirty");
	stopped = moved;
	result = pump(save, load, &moved);
	claim(!result && moved > stopped, "STOP_COPY is read to its end: %d, %llu bytes", result, (unsigned long long)(moved - stopped));

	sum_a = get(a, LABDEV_CRC);
	claim(get(b, LABDEV_CRC) == sum_a, "the destination has the source's memory: CRC %08llx", (unsigned long long)sum_a);
	claim(!go_to(b, VFIO_DEVICE_STATE_RUNNING_P2P, NULL) && !filled(host, 500, 2, 11), "the destination is quiescent first");
	claim(!go_to(b, VFIO_DEVICE_STATE_RUNNING, NULL) && filled(host, 500, 2, 11), "and, running, does what was put off");
	usleep(60000);
	claim(get(b, LABDEV_DMA_PAGES) > before, "it carries on where the source stopped: %llu pages then, %llu now", (unsigned long long)before,
	      (unsigned long long)get(b, LABDEV_DMA_PAGES));
	claim(get(a, LABDEV_TRACE) == 0xfffffffffffff673ULL, "the source's states in order: %016llx", (unsigned long long)get(a, LABDEV_TRACE));
	claim(get(b, LABDEV_TRACE) == 0xffffffffff514152ULL, "the destination's states in order: %016llx", (unsigned long long)get(b, LABDEV_TRACE));
	claim(!go_to(a, VFIO_DEVICE_STATE_RUNNING, NULL), "the source can run again: nothing was lost there");
	close(save);
	close(load);
	set(a, LABDEV_DMA_RATE, 0);
	set(b, LABDEV_DMA_RATE, 0);
	log_end(a);
}

/* ---- faults ---- */

static const int saving_path[] = { VFIO_DEVICE_STATE_PRE_COPY, VFIO_DEVICE_STATE_PRE_COPY_P2P, VFIO_DEVICE_STATE_STOP_COPY };
static const int loading_path[] = { VFIO_DEVICE_STATE_RUNNING_P2P, VFIO_DEVICE_STATE_STOP, VFIO_DEVICE_STATE_RESUMING };

static void fault_at(int fd, const int *path, int at)
{
	int target = path[at], result, stream;

	for (int step = 0; step < at; step++)
		NEED(!go_to(fd, path[step], &stream), "on the way to %s", state_name(target));
	set(fd, LABDEV_FAULT_REFUSE, 1ULL << target);
	result = go_to(fd, target, &stream);
	claim(result == -EBUSY && state_of(fd) == (at ? path[at - 1] : VFIO_DEVICE_STATE_RUNNING), "entering %s is refused when told to: stays in %s",
	      state_name(target), state_name(state_of(fd)));
	set(fd, LABDEV_FAULT_ERROR, 1ULL << target);
	result = go_to(fd, target, &stream);
	claim(result == -EIO && state_of(fd) == VFIO_DEVICE_STATE_ERROR, "entering %s breaks the device when told to: %s", state_name(target),
	      state_name(state_of(fd)));
	claim(go_to(fd, VFIO_DEVICE_STATE_RUNNING, NULL) < 0, "which no state change mends");
	ioctl(fd, VFIO_DEVICE_RESET);
	claim(state_of(fd) == VFIO_DEVICE_STATE_RUNNING, "and a reset does");
}

static void faults(int a, int b)
{
	struct vfio_precopy_info info;
	uint64_t moved = 0;
	int save, load, result;

	for (int at = 0; at < 3; at++)
		fault_at(a, saving_path, at);
	for (int at = 0; at < 3; at++)
		fault_at(b, loading_path, at);

	set(a, LABDEV_FAULT_SAVE, 1 + 100000);
	NEED(!go_to(a, VFIO_DEVICE_STATE_PRE_COPY, &save), "PRE_COPY");
	result = pump(save, -1, &moved);
	claim(result == -EIO && moved == 100000, "reading fails where told to: after %llu bytes", (unsigned long long)moved);
	set(a, LABDEV_BREAK, 1);
	claim(state_of(a) == VFIO_DEVICE_STATE_ERROR && precopy_info(save, &info) == -ENODEV, "a device that breaks takes its stream with it");
	close(save);
	ioctl(a, VFIO_DEVICE_RESET);

	NEED(!go_to(a, VFIO_DEVICE_STATE_STOP_COPY, &save), "STOP_COPY without PRE_COPY");
	NEED(!go_to(b, VFIO_DEVICE_STATE_RESUMING, &load), "RESUMING");
	set(b, LABDEV_FAULT_LOAD, 1 + 50000);
	moved = 0;
	result = pump(save, load, &moved);
	claim(result == -EIO, "writing fails where told to: %d", result);
	claim(go_to(b, VFIO_DEVICE_STATE_RUNNING, NULL) == -EINVAL, "and half a state cannot run");
	ioctl(b, VFIO_DEVICE_RESET);
	close(load);
	NEED(!go_to(b, VFIO_DEVICE_STATE_RESUMING, &load), "RESUMING");
	result = write(load, "this is no state of a device at all", 35) < 0 ? -errno : 0;
	claim(result == -EINVAL, "what is no state is refused: %d", result);
	close(load);
	ioctl(a, VFIO_DEVICE_RESET);
	ioctl(b, VFIO_DEVICE_RESET);
}

/* ---- iommufd's dirty bits ---- */

static int hwpt_dirty(int iommu, uint32_t table, uint32_t flags)
{
	struct iommu_hwpt_get_dirty_bitmap ask = {
		.size = sizeof(ask),
		.hwpt_id = table,
		.flags = flags,
		.iova = MEMORY_IOVA,
		.length = MEMORY_BYTES,
		.page_size = PAGE,
		.data = (uintptr_t)dirty,
	};

	forget();
	return call(iommu, IOMMU_HWPT_GET_DIRTY_BITMAP, &ask);
}

static int behind_iommu(void)
{
	struct iommu_hw_info info = { .size = sizeof(info) };
	struct iommu_hwpt_alloc alloc = { .size = sizeof(alloc), .flags = IOMMU_HWPT_ALLOC_DIRTY_TRACKING };
	struct iommu_hwpt_set_dirty_tracking track = { .size = sizeof(track), .flags = IOMMU_HWPT_DIRTY_TRACKING_ENABLE };
	struct iommu_ioas_unmap unmap = { .size = sizeof(unmap), .iova = MEMORY_IOVA, .length = MEMORY_BYTES };
	struct device_name name = labdev_name(0);
	struct host host;
	int fd, result;

	host_open(&host, BY_CDEV);
	info.dev_id = alloc.dev_id = cdev_bind(&host, &name, &fd);
	map_memory(&host);
	result = call(host.iommu, IOMMU_GET_HW_INFO, &info);
	claim(!result && (info.out_capabilities & IOMMU_HW_CAP_DIRTY_TRACKING), "the IOMMU says that it tracks dirty pages: %d", result);
	alloc.pt_id = host.ioas;
	result = call(host.iommu, IOMMU_HWPT_ALLOC, &alloc);
	claim(!result, "a hardware page table with dirty tracking: %d", result);
	cdev_attach(fd, alloc.out_hwpt_id);
	track.hwpt_id = alloc.out_hwpt_id;
	result = hwpt_dirty(host.iommu, track.hwpt_id, 0);
	/* Kernel 6.12 drops the error of the page table's driver here: success, and an empty bitmap. Later ones may not. */
	claim(result == -EINVAL || (!result && !bits(dirty)), "before tracking starts there is no error to rely on, and no page: %d", result);
	result = call(host.iommu, IOMMU_HWPT_SET_DIRTY_TRACKING, &track);
	claim(!result, "tracking starts: %d", result);
	fill_window(fd, 1000, 9, 3);
	result = set(fd, LABDEV_DMA_START, 1);
	claim(!result && filled(&host, 1000, 9, 3), "the device fills nine pages through its IOMMU: %d", result);
	result = hwpt_dirty(host.iommu, track.hwpt_id, IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR);
	claim(!result && exactly(dirty, 1000, 9), "the page table names them, without clearing: %d, %u pages", result, bits(dirty));
	result = hwpt_dirty(host.iommu, track.hwpt_id, 0);
	claim(!result && exactly(dirty, 1000, 9), "and clearing: %d, %u pages", result, bits(dirty));
	result = hwpt_dirty(host.iommu, track.hwpt_id, 0);
	claim(!result && !bits(dirty), "after which none is left: %d, %u pages", result, bits(dirty));
	unmap.ioas_id = host.ioas;
	result = call(host.iommu, IOMMU_IOAS_UNMAP, &unmap);
	claim(!result && set(fd, LABDEV_DMA_START, 1) < 0, "what is unmapped cannot be written: %d", result);
	return finish();
}

int main(int count, char **arguments)
{
	const char *mode = count > 1 ? arguments[1] : "";
	struct device_name first = labdev_name(0), second = labdev_name(1);
	struct host host;
	int a, b;

	setvbuf(stdout, NULL, _IOLBF, 0);
	if (!strcmp(mode, "iommu"))
		return behind_iommu();
	if (strcmp(mode, "group") && strcmp(mode, "cdev")) {
		fprintf(stderr, "usage: vfio-labdev group|cdev|iommu\n");
		return 2;
	}
	host_open(&host, strcmp(mode, "group") ? BY_CDEV : BY_GROUP);
	a = device_open(&host, &first);
	b = device_open(&host, &second);
	map_memory(&host);
	claim(get(a, LABDEV_MAGIC) == LABDEV_MAGIC_VALUE && get(a, LABDEV_CRC) != get(b, LABDEV_CRC), "two devices, each with content of its own");
	dma_and_its_log(&host, a);
	if (host.way == BY_GROUP)
		type1_dirty_pages(&host, a);
	initial_data_and_reinit(a);
	live_migration(&host, a, b);
	faults(a, b);
	return finish();
}
