/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
 *
 * A process whose memory is moved to another process of this program by two engines. It stands for a VMM: its guest is two threads that
 * write memory all the time, and a check that finds every write that was lost.
 *
 *   cc -O2 -pthread -I engine/include engine/examples/process.c -o process
 *   ./process destination /tmp/d.sock                      and beside it:  multifd-engine receive --vmm /tmp/d.sock --listen 127.0.0.1:4444
 *   ./process source /tmp/s.sock 64                        and beside it:  multifd-engine send --vmm /tmp/s.sock --connect 127.0.0.1:4444
 *
 * Commands on standard input: "state" prints one line, "quit" (or its end) checks the memory and ends.
 *
 * The guest's memory is two regions. Page 0 has the threads' own state; then comes a table with the generation of each data page; every
 * other page holds numbers that follow from its place and its generation. Generation 0 is a page that nobody wrote: zeros.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>

#include "multifd_engine.h"

#define PAGE 4096u
#define WORKERS 2
#define HIGH (4ull << 30) /* where the second region lies for the guest */
#define MIB_MAX 1024

/* ---- the guest ------------------------------------------------------------------------------------------------------------------ */

struct guest_state { /* in page 0 */
    uint64_t pages;      /* of both regions */
    uint64_t data_begin; /* the first page behind the table */
    struct {
        uint64_t random, steps;
    } worker[WORKERS];
};

static uint8_t *memory; /* both regions, one behind the other, as one mapping of one file */
static uint64_t memory_bytes, low_bytes;
static int memory_file = -1;
static pthread_t workers[WORKERS];
static bool running;
static volatile bool stop;

static struct guest_state *guest(void) { return (struct guest_state *)memory; }
static uint32_t *generation(uint64_t page) { return (uint32_t *)(memory + PAGE) + page; }

static uint64_t mix(uint64_t x)
{
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

static void *work(void *argument)
{
    uintptr_t self = (uintptr_t)argument;
    struct timespec pause = { 0, 1000000 };
    unsigned burst = 0;

    while (!stop) {
        uint64_t data = guest()->pages - guest()->data_begin, page, *words;
        uint32_t next;

        guest()->worker[self].random = mix(guest()->worker[self].random + 0x9e3779b97f4a7c15ull);
        page = guest()->data_begin + guest()->worker[self].random % data;
        if (page % WORKERS != self)
            continue; /* the other one's */
        next = ++*generation(page);
        words = (uint64_t *)(memory + page * PAGE);
        for (unsigned i = 0; i < PAGE / 8; i++)
            words[i] = mix(page << 32 | next) + i;
        guest()->worker[self].steps++;
        if (++burst % 4 == 0)
            nanosleep(&pause, NULL);
    }
    return NULL;
}

static void run_guest(void)
{
    stop = false;
    for (uintptr_t i = 0; i < WORKERS; i++)
        if (pthread_create(&workers[i], NULL, work, (void *)i) != 0)
            abort();
    running = true;
}

static void pause_guest(void)
{
    stop = true;
    for (unsigned i = 0; running && i < WORKERS; i++)
        pthread_join(workers[i], NULL);
    running = false;
}

static uint64_t steps(void)
{
    uint64_t sum = 0;
    for (unsigned i = 0; memory && i < WORKERS; i++)
        sum += guest()->worker[i].steps;
    return sum;
}

/* The number of pages that are not what their generation says; the guest is paused. */
static uint64_t wrong_pages(void)
{
    uint64_t wrong = 0, written = 0;

    for (uint64_t page = guest()->data_begin; page < guest()->pages; page++) {
        uint64_t *words = (uint64_t *)(memory + page * PAGE), now = *generation(page);
        bool right = true;

        for (unsigned i = 0; i < PAGE / 8; i++)
            right = right && words[i] == (now ? mix(page << 32 | now) + i : 0);
        wrong += !right;
        written += now;
    }
    return wrong + (written != steps());
}

static uint64_t hash(void)
{
    uint64_t sum = 0xcbf29ce484222325ull;
    for (uint64_t i = 0; i < memory_bytes / 8; i++)
        sum = (sum ^ ((uint64_t *)memory)[i]) * 0x100000001b3ull;
    return sum;
}

static bool make_memory(uint64_t bytes)
{
    memory_file = memfd_create("guest", MFD_CLOEXEC);
    if (memory_file < 0 || ftruncate(memory_file, bytes) != 0)
        return false;
    memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memory_file, 0);
    if (memory == MAP_FAILED)
        memory = NULL;
    memory_bytes = bytes;
    low_bytes = bytes / 4 / PAGE * PAGE; /* and the rest lies at HIGH */
    return memory != NULL;
}

static void drop_memory(void)
{
    if (memory)
        munmap(memory, memory_bytes);
    if (memory_file >= 0)
        close(memory_file);
    memory = NULL;
    memory_file = -1;
}

/* ---- the VMM -------------------------------------------------------------------------------------------------------------------- */

static uint32_t role, state = MFDE_STATE_FRESH;
static uint8_t ticket[MFDE_TICKET_BYTES];
static bool granted, paused;
static struct mfde_message question, answer;

static void say(const char *what)
{
    printf("%s steps=%llu\n", what, (unsigned long long)steps());
    fflush(stdout);
}

static void put(const void *bytes, size_t count)
{
    memcpy(answer.body + answer.header.bytes, bytes, count);
    answer.header.bytes += count;
}

static void put_count(uint32_t count)
{
    struct mfde_count list = { .count = count };
    put(&list, sizeof list);
}

/* Instead of what was put so far. */
static void refuse(uint32_t status, const char *text)
{
    mfde_close(&answer);
    answer.header.status = status;
    answer.header.bytes = 0;
    put(text, strlen(text));
}

static void answer_memory(void)
{
    struct mfde_region low = { .guest_address = 0, .bytes = low_bytes, .offset = 0 };
    struct mfde_region high = { .guest_address = HIGH, .bytes = memory_bytes - low_bytes, .offset = low_bytes };

    put_count(2);
    put(&low, sizeof low);
    put(&high, sizeof high);
    answer.descriptors[0] = dup(memory_file);
    answer.descriptor_count = 1;
}

static void answer_trackers(void)
{
    int faults = syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
    int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    struct mfde_tracker low = { .kind = MFDE_TRACKER_PROCESS, .region = 0, .address = (uintptr_t)memory, .pages = low_bytes / PAGE };
    struct mfde_tracker high = low;

    if (faults < 0 || pagemap < 0)
        return refuse(MFDE_STATUS_FAILED, "no userfaultfd, or no page map");
    high.region = 1;
    high.address += low_bytes;
    high.pages = (memory_bytes - low_bytes) / PAGE;
    put_count(2);
    put(&low, sizeof low);
    put(&high, sizeof high);
    answer.descriptors[0] = faults;
    answer.descriptors[1] = pagemap;
    answer.descriptor_count = 2;
}

/* One blob. What it means only this program knows. */
static void answer_blob(uint32_t kind, const uint64_t *words, uint32_t count)
{
    struct mfde_blob blob = { .kind = kind, .version = 1, .bytes = count * 8 };
    int file = memfd_create("blob", MFD_CLOEXEC);

    if (file < 0 || write(file, words, count * 8) != (ssize_t)(count * 8))
        return refuse(MFDE_STATUS_FAILED, "no file for a blob");
    put_count(1);
    put(&blob, sizeof blob);
    answer.descriptors[0] = file;
    answer.descriptor_count = 1;
}

/* The one blob that this program writes, of `count` words, whose table begins at `at`. */
static bool read_blob(uint32_t at, uint32_t kind, uint64_t *words, uint32_t count)
{
    struct mfde_count list;
    struct mfde_blob blob;

    if (question.header.bytes != at + sizeof list + sizeof blob || question.descriptor_count != 1)
        return false;
    memcpy(&list, question.body + at, sizeof list);
    memcpy(&blob, question.body + at + sizeof list, sizeof blob);
    return list.count == 1 && blob.kind == kind && blob.bytes == count * 8
        && pread(question.descriptors[0], words, count * 8, blob.offset) == (ssize_t)(count * 8);
}

static void prepare(void)
{
    struct mfde_count list;
    struct mfde_layout layout[2];
    uint64_t bytes;

    if (question.header.bytes < sizeof list + sizeof layout)
        return refuse(MFDE_STATUS_MALFORMED, "PREPARE is too short");
    memcpy(&list, question.body, sizeof list);
    memcpy(layout, question.body + sizeof list, sizeof layout);
    if (list.count != 2 || !read_blob(sizeof list + sizeof layout, 1, &bytes, 1) || bytes > (uint64_t)MIB_MAX << 20)
        return refuse(MFDE_STATUS_FAILED, "this is not a guest of this program");
    drop_memory();
    if (!make_memory(bytes))
        return refuse(MFDE_STATUS_FAILED, "no memory for the guest");
    if (layout[0].bytes != low_bytes || layout[1].bytes != bytes - low_bytes || layout[1].guest_address != HIGH)
        return refuse(MFDE_STATUS_FAILED, "its regions are others");
    answer_memory();
}

static void load(void)
{
    uint64_t saved[2];

    if (!memory || !read_blob(0, 2, saved, 2))
        return refuse(MFDE_STATUS_FAILED, "this is not a state of this program");
    if (saved[0] != hash())
        return refuse(MFDE_STATUS_FAILED, "the memory is not what it was at the source");
    if (saved[1] != steps())
        return refuse(MFDE_STATUS_FAILED, "the state is not of this memory");
    printf("loaded hash=%016llx\n", (unsigned long long)saved[0]);
    say("loaded");
}

static void discard(void)
{
    drop_memory();
    granted = false;
    state = MFDE_STATE_DISCARDED;
    say("discarded");
}

static void resume(void)
{
    state = MFDE_STATE_FRESH;
    if (paused)
        run_guest();
    paused = false;
    say("resumed");
}

static void hello(void)
{
    struct mfde_hello hello;
    struct mfde_welcome welcome = { .version = MFDE_VERSION, .state = state };

    if (question.header.bytes != sizeof hello)
        return refuse(MFDE_STATUS_MALFORMED, "HELLO has another size");
    memcpy(&hello, question.body, sizeof hello);
    if (hello.magic != MFDE_MAGIC || hello.version_min > MFDE_VERSION || hello.version_max < MFDE_VERSION)
        return refuse(MFDE_STATUS_VERSION, "no version in common");
    if (hello.role != role)
        return refuse(MFDE_STATUS_OUT_OF_TURN, "this process is the other side");
    if (state != MFDE_STATE_FRESH && state != MFDE_STATE_GONE)
        memcpy(welcome.ticket, ticket, sizeof ticket);
    put(&welcome, sizeof welcome);
}

static void source(void)
{
    struct mfde_word word = { 0 };
    uint64_t words[2];

    switch (question.header.kind) {
    case MFDE_MEMORY: return answer_memory();
    case MFDE_TRACKERS: return answer_trackers();
    case MFDE_CONFIG: return answer_blob(1, &memory_bytes, 1);
    case MFDE_GUEST: return put(&word, sizeof word);
    case MFDE_PAUSE:
        pause_guest();
        paused = true;
        return say("paused");
    case MFDE_SAVE:
        words[0] = hash();
        words[1] = steps();
        printf("saved hash=%016llx\n", (unsigned long long)words[0]);
        return answer_blob(2, words, 2);
    case MFDE_COMMITTING:
        if (!paused)
            return refuse(MFDE_STATUS_OUT_OF_TURN, "it was not paused");
        state = MFDE_STATE_UNDECIDED; /* from here on only RESUME and MIGRATED say whose the guest is */
        return say("committing");
    case MFDE_RESUME:
        return paused ? resume() : refuse(MFDE_STATUS_OUT_OF_TURN, "it was not paused");
    case MFDE_MIGRATED:
        if (state != MFDE_STATE_UNDECIDED)
            return refuse(MFDE_STATUS_OUT_OF_TURN, "it was not committed");
        state = MFDE_STATE_GONE;
        return say("moved");
    default: return refuse(MFDE_STATUS_UNKNOWN_KIND, "a source is not asked that");
    }
}

static void destination(void)
{
    switch (question.header.kind) {
    case MFDE_PREPARE: return prepare();
    case MFDE_LOAD: return load();
    case MFDE_RUN:
        state = MFDE_STATE_TAKEN;
        run_guest();
        return say("runs");
    case MFDE_TAKE_OVER:
        state = MFDE_STATE_TAKEN;
        return say("taken");
    case MFDE_DISCARD: return discard();
    default: return refuse(MFDE_STATUS_UNKNOWN_KIND, "a destination is not asked that");
    }
}

static void answer_question(void)
{
    uint32_t kind = question.header.kind;
    bool proof = kind == MFDE_RESUME || kind == MFDE_MIGRATED || kind == MFDE_RUN || kind == MFDE_TAKE_OVER;

    if (kind == MFDE_HELLO)
        return hello();
    if (state == MFDE_STATE_GONE || state == MFDE_STATE_TAKEN)
        return refuse(MFDE_STATUS_OUT_OF_TURN, "it is decided whose the guest is");
    if (kind == MFDE_GRANTED && state != MFDE_STATE_UNDECIDED && question.header.bytes == sizeof ticket) {
        memcpy(ticket, question.body, sizeof ticket);
        granted = true;
        state = MFDE_STATE_FRESH;
        return;
    }
    if (proof && (question.header.bytes != MFDE_SESSION_BYTES || memcmp(question.body, ticket, MFDE_SESSION_BYTES) != 0))
        return refuse(MFDE_STATUS_OUT_OF_TURN, "the proof is of another session");
    if (state == MFDE_STATE_UNDECIDED && !proof)
        return refuse(MFDE_STATUS_OUT_OF_TURN, "the outcome is not known");
    if (role == MFDE_ROLE_DESTINATION && !granted)
        return refuse(MFDE_STATUS_OUT_OF_TURN, "no session was granted");
    return role == MFDE_ROLE_SOURCE ? source() : destination();
}

/* One message of the engine; false when it is gone. */
static bool serve(int engine)
{
    if (mfde_receive(engine, &question) != 1)
        return false;
    if (question.header.kind == MFDE_ENDED) {
        struct mfde_ended ended = { 0 };
        int text = question.header.bytes > sizeof ended ? (int)(question.header.bytes - sizeof ended) : 0;

        memcpy(&ended, question.body, sizeof ended);
        printf("ended outcome=%u %.*s\n", ended.outcome, text, (char *)question.body + sizeof ended);
        fflush(stdout);
        return false;
    }
    memset(&answer.header, 0, sizeof answer.header);
    answer.header.kind = question.header.kind | MFDE_ANSWER;
    answer.header.serial = question.header.serial;
    answer.descriptor_count = 0;
    answer_question();
    bool sent = mfde_send(engine, &answer) == 0;
    mfde_close(&answer);
    mfde_close(&question);
    return sent;
}

/* The rule that makes its death harmless. */
static void engine_gone(void)
{
    if (role == MFDE_ROLE_SOURCE && state == MFDE_STATE_FRESH && paused)
        resume(); /* COMMITTING was not answered, so no commit was sent and none will be */
    if (role == MFDE_ROLE_DESTINATION && state == MFDE_STATE_FRESH && granted)
        discard(); /* RUN did not come, so this is nobody's guest */
    say("engine gone");
}

static bool is_ours(int engine)
{
    struct ucred peer;
    socklen_t bytes = sizeof peer;
    return getsockopt(engine, SOL_SOCKET, SO_PEERCRED, &peer, &bytes) == 0 && (peer.uid == 0 || peer.uid == geteuid());
}

static int listen_at(const char *path)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    int listening = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

    strncpy(address.sun_path, path, sizeof address.sun_path - 1);
    unlink(path);
    if (listening < 0 || bind(listening, (struct sockaddr *)&address, sizeof address) != 0 || listen(listening, 4) != 0) {
        perror(path);
        exit(2);
    }
    return listening;
}

static int quit(void)
{
    bool here = running || paused;
    uint64_t wrong;

    pause_guest();
    if (!memory || state == MFDE_STATE_GONE)
        return puts("no guest here"), 0;
    wrong = wrong_pages();
    printf("check %s wrong=%llu %s steps=%llu\n", wrong ? "FAILED" : "passed", (unsigned long long)wrong, here ? "ran" : "stood",
           (unsigned long long)steps());
    return wrong != 0;
}

int main(int count, char **arguments)
{
    struct pollfd ready[3] = { { .fd = STDIN_FILENO, .events = POLLIN }, { .fd = -1, .events = POLLIN }, { .fd = -1, .events = POLLIN } };
    int listening, engine = -1;
    char line[64];

    if (count < 3 || (strcmp(arguments[1], "source") && strcmp(arguments[1], "destination"))) {
        fprintf(stderr, "usage: %s source|destination SOCKET [MIB]\n", arguments[0]);
        return 2;
    }
    role = strcmp(arguments[1], "source") ? MFDE_ROLE_DESTINATION : MFDE_ROLE_SOURCE;
    if (role == MFDE_ROLE_SOURCE) {
        uint64_t mib = count > 3 ? strtoull(arguments[3], NULL, 10) : 64;
        if (mib < 4 || mib > MIB_MAX || !make_memory(mib << 20)) {
            fprintf(stderr, "from 4 to %d MiB\n", MIB_MAX);
            return 2;
        }
        guest()->pages = memory_bytes / PAGE;
        guest()->data_begin = 1 + (guest()->pages * 4 + PAGE - 1) / PAGE;
        for (unsigned i = 0; i < WORKERS; i++)
            guest()->worker[i].random = i + 1;
        run_guest();
    }
    listening = listen_at(arguments[2]);
    say("listening");
    for (;;) {
        ready[1].fd = engine < 0 ? listening : -1; /* one engine at a time */
        ready[2].fd = engine;
        if (poll(ready, 3, -1) < 0)
            continue;
        if (ready[2].revents && !serve(engine)) {
            close(engine);
            engine = -1;
            engine_gone();
        }
        if (ready[1].revents && (engine = accept4(listening, NULL, NULL, SOCK_CLOEXEC)) >= 0) {
            if (is_ours(engine)) {
                say("engine here");
            } else {
                close(engine);
                engine = -1;
            }
        }
        if (ready[0].revents) {
            ssize_t bytes = read(STDIN_FILENO, line, sizeof line);
            if (bytes <= 0 || memchr(line, 'q', bytes)) {
                unlink(arguments[2]);
                return quit();
            }
            printf("state %u %s steps=%llu\n", state, running ? "running" : "standing", (unsigned long long)steps());
            fflush(stdout);
        }
    }
}
