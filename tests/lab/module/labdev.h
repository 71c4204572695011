/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * labdev: what a program sees of it. The registers of region 0, and the records of the migration stream.
 *
 * Region 0 is LABDEV_REGISTERS registers of 64 bits, read and written with 8 bytes at offset 8 * number. The same registers are text in
 * /sys/bus/platform/devices/labdev.N/registers: reading gives "name value" lines, writing takes one such line. So a shell script
 * can watch and disturb a device that another program holds.
 */
#ifndef LABDEV_H
#define LABDEV_H

#define LABDEV_MAGIC_VALUE 0x3130564544424c4dULL /* "MLBDEV01" */
#define LABDEV_BLOCK 4096 /* bytes of device memory that become dirty together */

/* X(constant, name in sysfs) in the order of their numbers. "rw" keeps what is written; "ro" refuses; "do" acts and reads as 0. */
#define LABDEV_REGISTER_LIST(X)                                                                                                        \
	X(MAGIC, magic)                 /* ro  LABDEV_MAGIC_VALUE */                                                                         \
	X(MEMORY_BYTES, memory_bytes)   /* ro  size of the device's own memory */                                                      \
	X(DMA_IOVA, dma_iova)           /* rw  first address of the DMA window */                                                      \
	X(DMA_BYTES, dma_bytes)         /* rw  bytes of the DMA window */                                                              \
	X(DMA_SEED, dma_seed)           /* rw  the word written at address A is A ^ seed */                                            \
	X(DMA_START, dma_start)         /* do  fill the window once; while quiescent: remember it, fill when running */                \
	X(DMA_RATE, dma_rate)           /* rw  pages a second that the device writes by itself, while it may */                        \
	X(DMA_PAGES, dma_pages)         /* ro  pages written so far */                                                                 \
	X(DMA_ERRORS, dma_errors)       /* ro  pages that could not be written */                                                      \
	X(DMA_PENDING, dma_pending)     /* ro  1: a fill waits for the device to run */                                                \
	X(TOUCH, touch)                 /* do  change that many blocks of device memory */                                             \
	X(TOUCHES, touches)             /* ro  blocks changed so far */                                                                \
	X(CRC, crc)                     /* ro  CRC-32 of device memory */                                                              \
	X(INITIAL_BYTES, initial_bytes) /* rw  how much of device memory is initial data in the next save */                           \
	X(REINIT, reinit)               /* do  while saving: that many bytes of memory become initial data again */                    \
	X(FAULT_ERROR, fault_error)     /* rw  bit per state: entering it fails and leaves the device in ERROR; once */                \
	X(FAULT_REFUSE, fault_refuse)   /* rw  bit per state: entering it fails and leaves the device as it was; once */               \
	X(FAULT_SAVE, fault_save)       /* rw  1 + offset in the stream at which reading fails with EIO; 0: never; once */             \
	X(FAULT_LOAD, fault_load)       /* rw  1 + offset in the stream at which writing fails with EIO; 0: never; once */             \
	X(FAULT_LOG, fault_log)         /* rw  LABDEV_LOG_* bits: that call fails with EIO; once */                                    \
	X(BREAK, break)                 /* do  the device goes to ERROR now */                                                         \
	X(STATE, state)                 /* ro  enum vfio_device_mig_state */                                                           \
	X(TRACE, trace)                 /* rw  the last 16 states, 4 bits each, newest lowest, f where none; any write empties it */   \
	X(SAVED_BYTES, saved_bytes)     /* ro  bytes read from the last save stream */                                                 \
	X(LOADED_BYTES, loaded_bytes)   /* ro  bytes written to the last load stream */                                                \
	X(INITIAL_LEFT, initial_left)   /* ro  bytes of initial data not yet read from the save stream */                              \
	X(LOGGING, logging)             /* ro  1 while DMA logging is on */

#define LABDEV_NUMBER(constant, name) LABDEV_##constant,
enum labdev_register { LABDEV_REGISTER_LIST(LABDEV_NUMBER) LABDEV_REGISTERS };
#undef LABDEV_NUMBER

#define LABDEV_LOG_START 1
#define LABDEV_LOG_REPORT 2
#define LABDEV_LOG_STOP 4

/*
 * Newer than kernel 6.12's <linux/vfio.h>: programs that opted in with VFIO_DEVICE_FEATURE_SET of this feature (no data) may get the
 * flag VFIO_PRECOPY_INFO_REINIT from VFIO_MIG_GET_PRECOPY_INFO. Numbers as in the uAPI header of newer kernels.
 */
#ifndef VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2
#define VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2 12
#endif
#ifndef VFIO_PRECOPY_INFO_REINIT
#define VFIO_PRECOPY_INFO_REINIT (1 << 0)
#endif

#endif
