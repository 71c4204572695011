/*
 * Whether the kernel's sample device (mtty) migrates in the lab: a serial port whose state, set on the source, is there on the destination.
 *
 *	vfio-mtty group|cdev        two devices, 00000000-0000-4000-8000-000000000001 and ...2
 */
#include "vfio.h"

#define SCRATCH 7 /* the scratch register of an 8250 */
#define LINE_CONTROL 3

static struct device_name mtty_name(int number)
{
	struct device_name device;

	snprintf(device.name, sizeof(device.name), "00000000-0000-4000-8000-%012d", number);
	snprintf(device.directory, sizeof(device.directory), "/sys/bus/mdev/devices/%s", device.name);
	return device;
}

/* Where region 0, the ports, begins in the device's file. */
static uint64_t ports_of(int fd)
{
	struct vfio_region_info info = { .argsz = sizeof(info), .index = VFIO_PCI_BAR0_REGION_INDEX };

	NEED(!ioctl(fd, VFIO_DEVICE_GET_REGION_INFO, &info), "VFIO_DEVICE_GET_REGION_INFO");
	return info.offset;
}

static uint8_t port(int fd, int number)
{
	uint8_t value = 0;

	NEED(pread(fd, &value, 1, ports_of(fd) + number) == 1, "reading port %d", number);
	return value;
}

static void set_port(int fd, int number, uint8_t value)
{
	NEED(pwrite(fd, &value, 1, ports_of(fd) + number) == 1, "writing port %d", number);
}

int main(int count, char **arguments)
{
	const char *mode = count > 1 ? arguments[1] : "";
	struct device_name first = mtty_name(1), second = mtty_name(2);
	struct vfio_precopy_info info = { .argsz = sizeof(info) };
	static uint8_t state[65536];
	size_t bytes = 0;
	struct host host;
	int a, b, save, load;
	ssize_t part;

	if (strcmp(mode, "group") && strcmp(mode, "cdev")) {
		fprintf(stderr, "usage: vfio-mtty group|cdev\n");
		return 2;
	}
	host_open(&host, strcmp(mode, "group") ? BY_CDEV : BY_GROUP);
	a = device_open(&host, &first);
	b = device_open(&host, &second);
	/* This driver keeps the state that the last program left. */
	ioctl(a, VFIO_DEVICE_RESET);
	ioctl(b, VFIO_DEVICE_RESET);
	set_port(a, SCRATCH, 0x5a);
	set_port(a, LINE_CONTROL, 0x1b);
	set_port(b, SCRATCH, 0);
	claim(!go_to(a, VFIO_DEVICE_STATE_PRE_COPY, &save), "the source pre-copies");
	NEED(!ioctl(save, VFIO_MIG_GET_PRECOPY_INFO, &info), "VFIO_MIG_GET_PRECOPY_INFO");
	claim(info.initial_bytes > 0, "it has initial data: %llu bytes", (unsigned long long)info.initial_bytes);
	claim(!go_to(b, VFIO_DEVICE_STATE_RESUMING, &load), "the destination resumes");
	while ((part = read(save, state + bytes, sizeof(state) - bytes)) > 0)
		bytes += part;
	/* This driver says 0, the end, where others say ENOMSG: nothing for now. */
	claim(bytes > 0 && (!part || errno == ENOMSG), "pre-copy gives %zu bytes, and then nothing for now", bytes);
	claim(!go_to(a, VFIO_DEVICE_STATE_PRE_COPY_P2P, NULL) && !go_to(a, VFIO_DEVICE_STATE_STOP_COPY, NULL), "quiescent, then stopped");
	while ((part = read(save, state + bytes, sizeof(state) - bytes)) > 0)
		bytes += part;
	claim(!part, "the stream ends after %zu bytes", bytes);
	claim(write(load, state, bytes) == (ssize_t)bytes, "the destination takes them");
	claim(!go_to(b, VFIO_DEVICE_STATE_RUNNING, NULL) && state_of(b) == VFIO_DEVICE_STATE_RUNNING, "and runs");
	claim(port(b, SCRATCH) == 0x5a && port(b, LINE_CONTROL) == 0x1b, "with the source's state: %02x %02x", port(b, SCRATCH), port(b, LINE_CONTROL));
	return finish();
}
