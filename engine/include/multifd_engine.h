/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
 *
 * The messages between a VMM and multifd-engine, version 1. PROTOCOL.md says what each of them means.
 *
 * A message is one packet of a Unix socket (AF_UNIX, SOCK_SEQPACKET): a header, a body, and descriptors (SCM_RIGHTS). All numbers are
 * little-endian, which the host's are as well on every processor that the engine runs on; nothing is padded. A VMM listens, the engine
 * connects and asks, and the VMM answers each question before the next one comes.
 */
#ifndef MULTIFD_ENGINE_H
#define MULTIFD_ENGINE_H

#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define MFDE_VERSION 1
#define MFDE_MAGIC 0x4544464du /* "MFDE" */
#define MFDE_ANSWER 0x80000000u /* in the kind of an answer */

#define MFDE_MESSAGE_BYTES_MAX 65536
#define MFDE_HEADER_BYTES 16
#define MFDE_DESCRIPTORS_MAX 64
#define MFDE_TEXT_BYTES_MAX 1024
#define MFDE_REGIONS_MAX 1024
#define MFDE_TRACKERS_MAX 1536
#define MFDE_BLOBS_MAX 64
#define MFDE_BLOB_BYTES_MAX (16u << 20)
#define MFDE_BLOBS_BYTES_MAX (64u << 20)
#define MFDE_TICKET_BYTES 32
#define MFDE_SESSION_BYTES 16

/* Kinds. The engine asks, but for the last three. */
#define MFDE_HELLO 1
#define MFDE_GRANTED 2
#define MFDE_MEMORY 16
#define MFDE_TRACKERS 17
#define MFDE_CONFIG 18
#define MFDE_GUEST 19
#define MFDE_PAUSE 20
#define MFDE_COLLECT 21
#define MFDE_SAVE 22
#define MFDE_COMMITTING 23
#define MFDE_RESUME 24
#define MFDE_MIGRATED 25
#define MFDE_THROTTLE 26
#define MFDE_PREPARE 32
#define MFDE_LOAD 33
#define MFDE_RUN 34
#define MFDE_TAKE_OVER 35
#define MFDE_DISCARD 36
#define MFDE_ENDED 48      /* no answer */
#define MFDE_CANCEL 64     /* VMM to engine, no answer */
#define MFDE_SWITCH_OVER 65 /* VMM to engine, no answer */
#define MFDE_GUEST_GONE 66 /* VMM to engine, no answer */

/* The status of an answer. If it is not DONE the body is a text (UTF-8) for people. */
#define MFDE_STATUS_DONE 0
#define MFDE_STATUS_UNKNOWN_KIND 1
#define MFDE_STATUS_MALFORMED 2
#define MFDE_STATUS_OUT_OF_TURN 3
#define MFDE_STATUS_FAILED 4
#define MFDE_STATUS_VERSION 5

#define MFDE_ROLE_SOURCE 1
#define MFDE_ROLE_DESTINATION 2

/* What the VMM knows of its guest when an engine comes. */
#define MFDE_STATE_FRESH 0     /* source: the guest is mine; destination: none has come */
#define MFDE_STATE_UNDECIDED 1 /* source: COMMITTING was answered, and neither RESUME nor MIGRATED came */
#define MFDE_STATE_GONE 2      /* source: MIGRATED came */
#define MFDE_STATE_TAKEN 3     /* destination: RUN or TAKE_OVER came */
#define MFDE_STATE_DISCARDED 4 /* destination: a session began and its machine was discarded */

#define MFDE_TRACKER_PROCESS 1
#define MFDE_TRACKER_BITMAP 2

#define MFDE_COLLECT_START 0
#define MFDE_COLLECT_RUNNING 1
#define MFDE_COLLECT_PAUSED 2
#define MFDE_COLLECT_STOP 3

#define MFDE_OUTCOME_MIGRATED 0
#define MFDE_OUTCOME_FAILED 1
#define MFDE_OUTCOME_CANCELLED 3
#define MFDE_OUTCOME_UNKNOWN 4
#define MFDE_OUTCOME_STRANDED 6
#define MFDE_OUTCOME_GONE 7

struct mfde_header {
    uint32_t kind;
    uint32_t serial; /* of the question, and of its answer */
    uint32_t status; /* of an answer; 0 in a question */
    uint32_t bytes;  /* of the body */
};

/* HELLO */
struct mfde_hello {
    uint32_t magic;
    uint32_t version_min;
    uint32_t version_max;
    uint32_t role;
};

/* Its answer. The ticket is that of the state; zeros for FRESH and GONE. */
struct mfde_welcome {
    uint32_t version;
    uint32_t state;
    uint8_t ticket[MFDE_TICKET_BYTES];
};

/* Before every list. */
struct mfde_count {
    uint32_t count;
    uint32_t zero;
};

/* The list in the answers to MEMORY and PREPARE. */
struct mfde_region {
    uint64_t guest_address;
    uint64_t bytes;
    uint64_t offset;     /* in the file */
    uint32_t descriptor; /* index of one that is sent with the message */
    uint32_t zero;
};

/* The first list of PREPARE; a list of blobs follows. */
struct mfde_layout {
    uint64_t guest_address;
    uint64_t bytes;
};

/* The list in the answer to TRACKERS. */
struct mfde_tracker {
    uint32_t kind;
    uint32_t descriptor; /* PROCESS: the userfaultfd, and the next one is /proc/self/pagemap. BITMAP: the file */
    uint32_t region;
    uint32_t zero;
    uint64_t first_page; /* of the region, at address */
    uint64_t address;    /* in the VMM */
    uint64_t pages;
};

/* The list in the answers to CONFIG and SAVE, in PREPARE and LOAD. The bytes are in a file: the last descriptor of the message. */
struct mfde_blob {
    uint32_t kind;
    uint32_t version;
    uint64_t offset; /* in the file */
    uint64_t bytes;
};

/* The answer to GUEST (0: it runs, 1: its user has paused it), COLLECT, and THROTTLE (percent). */
struct mfde_word {
    uint32_t value;
    uint32_t zero;
};

/* ENDED; a text follows. */
struct mfde_ended {
    uint32_t outcome;
    uint32_t zero;
};

/* A message as it is received and sent. */
struct mfde_message {
    struct mfde_header header;
    uint8_t body[MFDE_MESSAGE_BYTES_MAX - MFDE_HEADER_BYTES];
    int descriptors[MFDE_DESCRIPTORS_MAX];
    uint32_t descriptor_count;
};

_Static_assert(sizeof(struct mfde_header) == MFDE_HEADER_BYTES, "a header is not padded");
_Static_assert(sizeof(struct mfde_welcome) == 40, "nothing is padded");
_Static_assert(sizeof(struct mfde_region) == 32, "nothing is padded");
_Static_assert(sizeof(struct mfde_tracker) == 40, "nothing is padded");
_Static_assert(sizeof(struct mfde_blob) == 24, "nothing is padded");
_Static_assert(offsetof(struct mfde_message, body) == MFDE_HEADER_BYTES, "the body follows the header");
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "this header is for little-endian processors"
#endif

/* Sends a message with its descriptors, which stay open. 0, or -1 with errno. */
static inline int mfde_send(int socket, const struct mfde_message *message)
{
    union {
        char bytes[CMSG_SPACE(MFDE_DESCRIPTORS_MAX * sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec part = { (void *)&message->header, MFDE_HEADER_BYTES + message->header.bytes };
    struct msghdr packet = { .msg_iov = &part, .msg_iovlen = 1 };
    ssize_t sent;

    if (message->header.bytes > sizeof message->body || message->descriptor_count > MFDE_DESCRIPTORS_MAX) {
        errno = EMSGSIZE;
        return -1;
    }
    if (message->descriptor_count > 0) {
        size_t bytes = message->descriptor_count * sizeof(int);
        struct cmsghdr *rights;

        memset(&control, 0, sizeof control);
        packet.msg_control = control.bytes;
        packet.msg_controllen = CMSG_SPACE(bytes);
        rights = CMSG_FIRSTHDR(&packet);
        rights->cmsg_level = SOL_SOCKET;
        rights->cmsg_type = SCM_RIGHTS;
        rights->cmsg_len = CMSG_LEN(bytes);
        memcpy(CMSG_DATA(rights), message->descriptors, bytes);
    }
    do
        sent = sendmsg(socket, &packet, MSG_NOSIGNAL);
    while (sent < 0 && errno == EINTR);
    return sent < 0 ? -1 : 0;
}

/* Closes the descriptors that came with a message. */
static inline void mfde_close(struct mfde_message *message)
{
    while (message->descriptor_count > 0)
        close(message->descriptors[--message->descriptor_count]);
}

/* Receives a message with its descriptors, which are the caller's. 1; 0 when the other end is closed; -1 with errno, EBADMSG for what is
 * no message. */
static inline int mfde_receive(int socket, struct mfde_message *message)
{
    union {
        char bytes[CMSG_SPACE(MFDE_DESCRIPTORS_MAX * sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec part = { &message->header, MFDE_MESSAGE_BYTES_MAX };
    struct msghdr packet = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof control.bytes
    };
    struct cmsghdr *rights;
    ssize_t bytes;

    message->descriptor_count = 0;
    do
        bytes = recvmsg(socket, &packet, MSG_CMSG_CLOEXEC);
    while (bytes < 0 && errno == EINTR);
    if (bytes < 0)
        return errno == ECONNRESET ? 0 : -1;
    for (rights = CMSG_FIRSTHDR(&packet); rights; rights = CMSG_NXTHDR(&packet, rights)) {
        if (rights->cmsg_level == SOL_SOCKET && rights->cmsg_type == SCM_RIGHTS) {
            size_t came = rights->cmsg_len - CMSG_LEN(0);
            memcpy(message->descriptors, CMSG_DATA(rights), came);
            message->descriptor_count = came / sizeof(int);
        }
    }
    if (bytes == 0)
        return 0;
    if ((packet.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) || (size_t)bytes < MFDE_HEADER_BYTES
        || message->header.bytes != (size_t)bytes - MFDE_HEADER_BYTES) {
        mfde_close(message);
        errno = EBADMSG;
        return -1;
    }
    return 1;
}

#endif
