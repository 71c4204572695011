/*
 * The first process of a guest that checks itself, so that a migration that loses anything is found out from inside.
 *
 *   memory   one process for each processor, bound to it: writes pages, and checks each before it writes it again
 *   files    files in a tmpfs, read and compared with their checksums, then replaced
 *   talk     one TCP connection to itself that never ends: every answer is checked
 *   random   what the virtio device gives, where there is one: never the same twice
 *
 * Each half second a line "beat N ..." says how far they are. "stop" on the console has everything checked once more; the last line is
 * "check passed ..." or "check FAILED: ...", and the guest reboots.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

enum { CPUS_MAX = 16, PAGES = 1024, WORDS = 512, FILES = 8, FILE_WORDS = 16384, MESSAGE_WORDS = 128 };
enum { FILES_AT = CPUS_MAX, TALK_AT, RANDOM_AT, WORKERS };

/* Beats without which a worker that makes no progress has been lost. */
static const unsigned PATIENCE = 60;
/* Seconds that the clock may jump: it stands still during a migration. */
static const int64_t JUMP_MAX = 60;

struct shared {
    _Atomic uint64_t done[WORKERS];
    _Atomic int stop, failed;
    char why[200];
};
static struct shared *shared;

static void fail(const char *format, ...) {
    int expected = 0;
    if (atomic_compare_exchange_strong(&shared->failed, &expected, 1)) {
        va_list list;
        va_start(list, format);
        vsnprintf(shared->why, sizeof shared->why, format, list);
        va_end(list);
        atomic_store(&shared->failed, 2);
    }
    _exit(1);
}

static uint64_t mix(uint64_t x) {
    x ^= x >> 30;
    x *= 0xbf58476d1ce4e5b9u;
    x ^= x >> 27;
    x *= 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

static void rest(long microseconds) {
    struct timespec time = {.tv_nsec = microseconds * 1000};
    nanosleep(&time, NULL);
}

static void check_page(unsigned cpu, const uint64_t *words, uint64_t page, uint64_t generation) {
    for (uint64_t word = 0; word < WORDS; word++) {
        uint64_t expected = mix(page << 44 ^ generation << 10 ^ word ^ (uint64_t)cpu << 60);
        if (words[word] != expected)
            fail("memory of cpu %u: page %llu, word %llu is not of generation %llu", cpu, (unsigned long long)page,
                 (unsigned long long)word, (unsigned long long)generation);
    }
}

static void write_page(unsigned cpu, uint64_t *words, uint64_t page, uint64_t generation) {
    for (uint64_t word = 0; word < WORDS; word++)
        words[word] = mix(page << 44 ^ generation << 10 ^ word ^ (uint64_t)cpu << 60);
}

static void memory(unsigned cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (sched_setaffinity(0, sizeof set, &set))
        fail("no processor %u: %s", cpu, strerror(errno));
    uint64_t(*pages)[WORDS] = mmap(NULL, PAGES * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED)
        fail("no memory");
    static uint64_t generation[PAGES];
    for (uint64_t page = 0; page < PAGES; page++)
        write_page(cpu, pages[page], page, 0);
    uint64_t seed = cpu + 1;
    while (!atomic_load(&shared->stop)) {
        seed = mix(seed + 0x9e3779b97f4a7c15u);
        uint64_t page = seed % PAGES;
        check_page(cpu, pages[page], page, generation[page]);
        write_page(cpu, pages[page], page, ++generation[page]);
        if (sched_getcpu() != (int)cpu)
            fail("memory of cpu %u runs on %d", cpu, sched_getcpu());
        if (atomic_fetch_add(&shared->done[cpu], 1) % 8 == 0)
            rest(2000);
    }
    for (uint64_t page = 0; page < PAGES; page++)
        check_page(cpu, pages[page], page, generation[page]);
    _exit(0);
}

static uint64_t sum_of(const uint64_t *words, size_t count) {
    uint64_t sum = 0;
    for (size_t at = 0; at < count; at++)
        sum = mix(sum ^ words[at]);
    return sum;
}

static void check_file(unsigned file, uint64_t sum) {
    static uint64_t words[FILE_WORDS];
    char name[32];
    snprintf(name, sizeof name, "/tmp/%u", file);
    int fd = open(name, O_RDONLY);
    if (fd < 0 || read(fd, words, sizeof words) != (ssize_t)sizeof words || close(fd))
        fail("file %u: %s", file, strerror(errno));
    if (sum_of(words, FILE_WORDS) != sum)
        fail("file %u is not what was written", file);
}

static uint64_t write_file(unsigned file, uint64_t seed) {
    static uint64_t words[FILE_WORDS];
    char name[32];
    for (size_t at = 0; at < FILE_WORDS; at++)
        words[at] = mix(seed + at);
    int fd = open("/tmp/new", O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (fd < 0 || write(fd, words, sizeof words) != (ssize_t)sizeof words || close(fd))
        fail("new file: %s", strerror(errno));
    snprintf(name, sizeof name, "/tmp/%u", file);
    if (rename("/tmp/new", name))
        fail("rename to %s: %s", name, strerror(errno));
    return sum_of(words, FILE_WORDS);
}

static void files(void) {
    uint64_t sums[FILES], seed = 77;
    for (unsigned file = 0; file < FILES; file++)
        sums[file] = write_file(file, seed += FILE_WORDS);
    while (!atomic_load(&shared->stop)) {
        unsigned file = mix(seed) % FILES;
        check_file(file, sums[file]);
        sums[file] = write_file(file, seed += FILE_WORDS);
        atomic_fetch_add(&shared->done[FILES_AT], 1);
        rest(100000);
    }
    for (unsigned file = 0; file < FILES; file++)
        check_file(file, sums[file]);
    _exit(0);
}

static void move_all(int fd, int out, void *bytes, size_t count) {
    char *at = bytes;
    while (count) {
        ssize_t moved = out ? write(fd, at, count) : read(fd, at, count);
        if (moved <= 0)
            fail("the TCP connection broke: %s", moved ? strerror(errno) : "end");
        at += moved;
        count -= moved;
    }
}

static void talk(void) {
    int interface = socket(AF_INET, SOCK_DGRAM, 0);
    struct ifreq request = {.ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING};
    if (interface < 0 || ioctl(interface, SIOCSIFFLAGS, &request))
        fail("lo: %s", strerror(errno));
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(7), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int listener = socket(AF_INET, SOCK_STREAM, 0), client = socket(AF_INET, SOCK_STREAM, 0);
    if (bind(listener, (void *)&address, sizeof address) || listen(listener, 1))
        fail("listen: %s", strerror(errno));
    uint64_t message[MESSAGE_WORDS];
    if (fork() == 0) {
        int server = accept(listener, NULL, NULL);
        if (server < 0)
            fail("accept: %s", strerror(errno));
        do {
            move_all(server, 0, message, sizeof message);
            for (unsigned at = 0; at < MESSAGE_WORDS; at++)
                message[at] = ~message[at];
            move_all(server, 1, message, sizeof message);
        } while (message[0] != ~UINT64_MAX);
        _exit(0);
    }
    if (connect(client, (void *)&address, sizeof address))
        fail("connect: %s", strerror(errno));
    int stop = 0;
    for (uint64_t number = 0; !stop; number++) {
        stop = atomic_load(&shared->stop);
        uint64_t first = stop ? UINT64_MAX : number;
        for (unsigned at = 0; at < MESSAGE_WORDS; at++)
            message[at] = at ? mix(first + at) : first;
        move_all(client, 1, message, sizeof message);
        move_all(client, 0, message, sizeof message);
        for (unsigned at = 0; at < MESSAGE_WORDS; at++)
            if (message[at] != ~(at ? mix(first + at) : first))
                fail("TCP: answer %llu is wrong", (unsigned long long)number);
        atomic_fetch_add(&shared->done[TALK_AT], 1);
        rest(5000);
    }
    _exit(wait(NULL) < 0 ? 1 : 0);
}

static void random_numbers(int device) {
    uint64_t last[4] = {0}, now[4];
    while (!atomic_load(&shared->stop)) {
        if (read(device, now, sizeof now) != (ssize_t)sizeof now)
            fail("hwrng: %s", strerror(errno));
        for (unsigned at = 0; at < 4; at++)
            if (now[at] == 0 || now[at] == last[at])
                fail("hwrng gives the same again");
        memcpy(last, now, sizeof last);
        atomic_fetch_add(&shared->done[RANDOM_AT], 1);
        rest(20000);
    }
    _exit(0);
}

static void load_modules(void) {
    static const char *const names[] = {"virtio_ring", "virtio", "virtio_mmio", "virtio-rng"};
    for (unsigned at = 0; at < sizeof names / sizeof *names; at++) {
        char path[64];
        snprintf(path, sizeof path, "/%s.ko", names[at]);
        int fd = open(path, O_RDONLY);
        if (fd < 0)
            continue;
        if (syscall(SYS_finit_module, fd, "", 0))
            printf("module %s: %s\n", names[at], strerror(errno));
        close(fd);
    }
}

static int64_t now_ms(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000 + time.tv_nsec / 1000000;
}

/* Whether "stop" was typed. */
static int stop_typed(void) {
    static char line[64];
    static size_t length;
    struct pollfd console = {.fd = 0, .events = POLLIN};
    while (poll(&console, 1, 0) == 1) {
        ssize_t count = read(0, line + length, sizeof line - 1 - length);
        if (count <= 0)
            break;
        length += count;
        line[length] = 0;
        if (strstr(line, "stop"))
            return 1;
        if (length > sizeof line / 2)
            length = 0;
    }
    return 0;
}

static void beat(const int *used) {
    static uint64_t last[WORKERS];
    static unsigned still[WORKERS];
    for (unsigned worker = 0; worker < WORKERS; worker++) {
        uint64_t done = atomic_load(&shared->done[worker]);
        still[worker] = done == last[worker] ? still[worker] + 1 : 0;
        last[worker] = done;
        if (used[worker] && still[worker] > PATIENCE) {
            snprintf(shared->why, sizeof shared->why, "worker %u stands still at %llu", worker, (unsigned long long)done);
            atomic_store(&shared->failed, 2);
        }
    }
}

int main(void) {
    mkdir("/dev", 0755);
    mkdir("/tmp", 0755);
    mount("dev", "/dev", "devtmpfs", 0, NULL);
    mount("tmp", "/tmp", "tmpfs", 0, NULL);
    int console = open("/dev/ttyS0", O_RDWR);
    for (int fd = 0; fd < 3; fd++)
        dup2(console, fd);
    setvbuf(stdout, NULL, _IOLBF, 0);
    load_modules();
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

    int used[WORKERS] = {0}, random_device = open("/dev/hwrng", O_RDONLY);
    char first;
    if (random_device >= 0 && read(random_device, &first, 1) != 1)
        random_device = -1;
    unsigned cpus = sysconf(_SC_NPROCESSORS_ONLN), children = 0;
    for (unsigned worker = 0; worker < WORKERS; worker++) {
        used[worker] = worker < CPUS_MAX ? worker < cpus : worker != RANDOM_AT || random_device >= 0;
        if (!used[worker])
            continue;
        children++;
        if (fork() == 0) {
            if (worker < CPUS_MAX)
                memory(worker);
            else if (worker == FILES_AT)
                files();
            else if (worker == TALK_AT)
                talk();
            else
                random_numbers(random_device);
        }
    }
    printf("guest is up: %u processors, %s\n", cpus, random_device < 0 ? "no random device" : "a random device");

    int64_t before = now_ms();
    uint64_t beats = 0;
    while (!atomic_load(&shared->failed) && !stop_typed()) {
        uint64_t memories = 0;
        for (unsigned cpu = 0; cpu < CPUS_MAX; cpu++)
            memories += atomic_load(&shared->done[cpu]);
        printf("beat %llu: memory %llu files %llu talk %llu random %llu\n", (unsigned long long)++beats, (unsigned long long)memories,
               (unsigned long long)atomic_load(&shared->done[FILES_AT]), (unsigned long long)atomic_load(&shared->done[TALK_AT]),
               (unsigned long long)atomic_load(&shared->done[RANDOM_AT]));
        rest(500000);
        int64_t now = now_ms();
        if (now < before || now - before > JUMP_MAX * 1000) {
            snprintf(shared->why, sizeof shared->why, "the clock went from %lld ms to %lld ms", (long long)before, (long long)now);
            atomic_store(&shared->failed, 2);
        }
        before = now;
        beat(used);
    }
    atomic_store(&shared->stop, 1);
    int status, whole = 1;
    for (; whole && children && !atomic_load(&shared->failed); children--) {
        if (wait(&status) < 0 || status != 0)
            whole = 0;
    }
    rest(100000);
    if (atomic_load(&shared->failed) || !whole)
        printf("check FAILED: %s\n", atomic_load(&shared->failed) ? shared->why : "a worker is gone");
    else
        printf("check passed after %llu beats\n", (unsigned long long)beats);
    tcdrain(1);
    rest(300000);
    reboot(RB_AUTOBOOT);
    return 1;
}
