/* A process that does to its memory what a test tells it: one command line in, one answer line out. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096, MAX_THREADS = 64 };
typedef unsigned long long word;

static uint32_t table[256];

static void table_init(void) {
	for (uint32_t i = 0; i < 256; i++) {
		uint32_t c = i;
		for (int k = 0; k < 8; k++)
			c = c & 1 ? 0xEDB88320u ^ c >> 1 : c >> 1;
		table[i] = c;
	}
}

static uint32_t crc32_of(word start, word length) {
	const volatile unsigned char *bytes = (const volatile unsigned char *)(uintptr_t)start;
	uint32_t c = ~0u;
	for (word i = 0; i < length; i++)
		c = table[(c ^ bytes[i]) & 255] ^ c >> 8;
	return ~c;
}

struct walk {
	word start, pages, sum;
	unsigned seed;
};

/* The sum of all pages' CRCs, visited in a random order. */
static void *walk(void *argument) {
	struct walk *w = argument;
	word *order = malloc(w->pages * sizeof *order);
	for (word i = 0; i < w->pages; i++)
		order[i] = i;
	for (word i = w->pages; i > 1; i--) {
		word k = (word)rand_r(&w->seed) % i, swap = order[i - 1];
		order[i - 1] = order[k];
		order[k] = swap;
	}
	for (word i = 0; i < w->pages; i++)
		w->sum += crc32_of(w->start + order[i] * PAGE, PAGE);
	free(order);
	return NULL;
}

static void run_walks(unsigned n, word start, word length, unsigned seed) {
	pthread_t threads[MAX_THREADS];
	struct walk walks[MAX_THREADS];
	for (unsigned i = 0; i < n; i++) {
		walks[i] = (struct walk){.start = start, .pages = length / PAGE, .seed = seed + i};
		pthread_create(&threads[i], NULL, walk, &walks[i]);
	}
	for (unsigned i = 0; i < n; i++) {
		pthread_join(threads[i], NULL);
		printf("%llu ", walks[i].sum);
	}
	printf("\n");
}

static sigjmp_buf after_fault;

static void on_signal(int number) {
	siglongjmp(after_fault, number);
}

static void touch(word address) {
	int number = sigsetjmp(after_fault, 1);
	if (number)
		printf("%s\n", number == SIGBUS ? "SIGBUS" : "SIGSEGV");
	else
		printf("%d\n", *(volatile unsigned char *)(uintptr_t)address);
}

static void status(int failed) {
	printf(failed ? "errno %d\n" : "ok\n", errno);
}

static void *at(word address) {
	return (void *)(uintptr_t)address;
}

static void *trim_loop(void *argument) {
	word *range = argument;
	for (word i = 0; i < range[2]; i++)
		madvise(at(range[0]), range[1], MADV_DONTNEED);
	return NULL;
}

/* One thread drops a range again and again while this one reads another; the sum of the reads' CRCs. */
static void read_beside_trim(word dropped, word dropped_length, word times, word start, word length) {
	word range[] = {dropped, dropped_length, times};
	pthread_t thread;
	struct walk w = {.start = start, .pages = length / PAGE, .seed = 1};
	pthread_create(&thread, NULL, trim_loop, range);
	walk(&w);
	pthread_join(thread, NULL);
	printf("%llu\n", w.sum);
}

/* One thread punches out every second page while this one reads those between; prints the CRC of it all. */
static void *punch_every_second(void *argument) {
	word *range = argument;
	for (word i = 0; i < range[1] / PAGE; i += 2)
		madvise(at(range[0] + i * PAGE), PAGE, MADV_REMOVE);
	return NULL;
}

static void read_beside_punches(word start, word length) {
	word range[] = {start, length}, sum = 0;
	pthread_t thread;
	pthread_create(&thread, NULL, punch_every_second, range);
	for (word i = length / PAGE; i--;)
		if (i % 2)
			sum += *(volatile unsigned char *)at(start + i * PAGE);
	pthread_join(thread, NULL);
	printf("%u %llu\n", crc32_of(start, length), sum);
}

/* The sum of the bytes at `start`, `start` + step, …; with `apart`, of those `apart` bytes on too, in turns. */
static void stride(word start, word step, word times, word apart) {
	word sum = 0;
	for (word i = 0; i < times; i++) {
		sum += *(volatile unsigned char *)(uintptr_t)(start + i * step);
		if (apart)
			sum += *(volatile unsigned char *)(uintptr_t)(start + i * step + apart);
	}
	printf("%llu\n", sum);
}

static void wrap(word start, word length, word step, word times) {
	word sum = 0;
	for (word i = 0; i < times; i++)
		sum += *(volatile unsigned char *)(uintptr_t)(start + i * step % length);
	printf("%llu\n", sum);
}

/* Forks again and again beside a walk; prints the walk's sum, and each child's exit status: the CRC of a range, mod 251. */
static void forks(unsigned n, word checked, word checked_length, word start, word length) {
	pthread_t thread;
	pid_t children[MAX_THREADS];
	struct walk w = {.start = start, .pages = length / PAGE, .seed = 1};
	pthread_create(&thread, NULL, walk, &w);
	for (unsigned i = 0; i < n; i++) {
		children[i] = fork();
		if (!children[i])
			_exit((int)(crc32_of(checked, checked_length) % 251));
	}
	pthread_join(thread, NULL);
	printf("%llu", w.sum);
	for (unsigned i = 0; i < n; i++) {
		int state = -1;
		waitpid(children[i], &state, 0);
		printf(" %d", WIFEXITED(state) ? WEXITSTATUS(state) : -1);
	}
	printf("\n");
}

static void execute(const char *name, const word *a) {
	if (!strcmp(name, "map")) /* address length fd offset shared huge */
		status(mmap(at(a[0]), a[1], PROT_READ | PROT_WRITE,
			    (a[4] ? MAP_SHARED : MAP_PRIVATE) | MAP_FIXED_NOREPLACE | MAP_NORESERVE, (int)a[2],
			    (off_t)a[3]) == MAP_FAILED);
	else if (!strcmp(name, "uffd"))
		printf("%d\n", (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK));
	else if (!strcmp(name, "close"))
		status(close((int)a[0]));
	else if (!strcmp(name, "crc")) /* address length */
		printf("%u\n", crc32_of(a[0], a[1]));
	else if (!strcmp(name, "walk")) /* threads address length seed */
		run_walks((unsigned)a[0], a[1], a[2], (unsigned)a[3]);
	else if (!strcmp(name, "stride")) /* address step times apart; step: two's complement */
		stride(a[0], a[1], a[2], a[3]);
	else if (!strcmp(name, "wrap")) /* address length step times */
		wrap(a[0], a[1], a[2], a[3]);
	else if (!strcmp(name, "touch"))
		touch(a[0]);
	else if (!strcmp(name, "poke")) { /* address byte */
		*(volatile unsigned char *)at(a[0]) = (unsigned char)a[1];
		printf("ok\n");
	} else if (!strcmp(name, "dontneed"))
		status(madvise(at(a[0]), a[1], MADV_DONTNEED));
	else if (!strcmp(name, "punch"))
		status(madvise(at(a[0]), a[1], MADV_REMOVE));
	else if (!strcmp(name, "punches")) /* address length */
		read_beside_punches(a[0], a[1]);
	else if (!strcmp(name, "munmap"))
		status(munmap(at(a[0]), a[1]));
	else if (!strcmp(name, "mprotect")) /* address length protection */
		status(mprotect(at(a[0]), a[1], (int)a[2]));
	else if (!strcmp(name, "remap")) /* address old new to */
		status(mremap(at(a[0]), a[1], a[2], MREMAP_MAYMOVE | MREMAP_FIXED, at(a[3])) == MAP_FAILED);
	else if (!strcmp(name, "grow")) /* address old new */
		status(mremap(at(a[0]), a[1], a[2], 0) == MAP_FAILED);
	else if (!strcmp(name, "trim")) /* dropped length times address length */
		read_beside_trim(a[0], a[1], a[2], a[3], a[4]);
	else if (!strcmp(name, "forks")) /* times checked length address length */
		forks((unsigned)a[0], a[1], a[2], a[3], a[4]);
	else if (!strcmp(name, "readfd")) { /* fd offset length: the descriptor's bytes, as a CRC */
		unsigned char *buffer = malloc(a[2]);
		ssize_t n = pread((int)a[0], buffer, a[2], (off_t)a[1]);
		printf("%u\n", n == (ssize_t)a[2] ? crc32_of((word)(uintptr_t)buffer, a[2]) : 0);
		free(buffer);
	} else if (!strcmp(name, "exec"))
		execlp("cat", "cat", NULL);
	else
		printf("unknown\n");
}

int main(int argc, char **argv) {
	char line[256], name[32];
	word a[6];
	struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_NODEFER};
	table_init();
	sigaction(SIGBUS, &action, NULL);
	sigaction(SIGSEGV, &action, NULL);
	while (fgets(line, sizeof line, stdin)) {
		memset(a, 0, sizeof a);
		if (sscanf(line, "%31s %llu %llu %llu %llu %llu %llu", name, a, a + 1, a + 2, a + 3, a + 4, a + 5) < 1)
			continue;
		if (!strcmp(name, "open")) {
			line[strcspn(line, "\n")] = 0;
			printf("%d\n", open(line + strlen("open "), O_RDWR | O_CLOEXEC));
		} else if (!strcmp(name, "fork")) { /* the child goes on with the descriptors of the command line */
			pid_t child = fork();
			if (child)
				printf("%d\n", (int)child);
			else if (argc > 2) {
				dup2(atoi(argv[1]), 0);
				dup2(atoi(argv[2]), 1);
			}
		} else
			execute(name, a);
		fflush(stdout);
	}
	return 0;
}
