/*
 * What munmap, MADV_DONTNEED, mremap and fork cost their caller. usage: events CONTROL_SOCKET {plain|thread|process}
 *
 * An arena of private memory, of which one page in 64 has content. plain: anonymous memory and no userfaultfd; so it is before a snapshot,
 * and in the twin. thread, process: the smallest handler there is, which does nothing but read(2) the events, in a thread
 * or in a process and session of its own; the arena is then a private mapping of a memory file, as in a restored process.
 * Requests, each with a seed and a number of calls: "sample SEED TIMES PAUSE" (all but fork; microseconds asleep between two), "forks SEED TIMES
 * PAUSE" answer with a line "KIND NANOSECONDS" for each, "storm SEED TIMES" only with the number of those that failed, as all do. The same seeds
 * make the same calls in every process.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>

#include "control.h"

#define PAGE UINT64_C(4096)
#define ARENA ((char *)0x100000000000)
#define ARENA_PAGES (UINT64_C(1) << 20)
#define ASIDE ((char *)0x200000000000) /* where mremap moves to, and from again */
#define CONTENT_EVERY 64

enum { UNMAP_PAGES = 4, DROP_PAGES = 64, MOVE_PAGES = 32, TRIES = 100 };

static unsigned char unmapped[ARENA_PAGES];
static uint64_t seed;
static long failed;
static FILE *out; /* NULL: a storm */

static uint64_t draw(uint64_t below)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return seed % below;
}

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* A random run of at most `most` pages of which none is unmapped. */
static char *choose(uint64_t most, uint64_t *length)
{
	for (int i = 0; i < TRIES; i++) {
		uint64_t pages = 1 + draw(most), first = draw(ARENA_PAGES - pages);

		*length = pages * PAGE;
		if (!memchr(unmapped + first, 1, pages))
			return ARENA + first * PAGE;
	}
	control_die("choose");
	return NULL;
}

static void report(const char *kind, uint64_t began, bool failure)
{
	uint64_t took = now() - began;

	failed += failure;
	if (out && !failure)
		fprintf(out, "%s %lu\n", kind, took);
}

static void unmap(void)
{
	uint64_t length, began;
	char *at = choose(UNMAP_PAGES, &length);

	memset(unmapped + (uint64_t)(at - ARENA) / PAGE, 1, length / PAGE);
	began = now();
	report("munmap", began, munmap(at, length));
}

static void drop(void)
{
	uint64_t length, began;
	char *at = choose(DROP_PAGES, &length);

	began = now();
	report("MADV_DONTNEED", began, madvise(at, length, MADV_DONTNEED));
}

static void move(char *from, char *to, uint64_t length)
{
	uint64_t began = now();
	void *at = mremap(from, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, to);

	report("mremap", began, at == MAP_FAILED);
}

static void there_and_back(void)
{
	uint64_t length;
	char *at = choose(MOVE_PAGES, &length);
	long before = failed;

	move(at, ASIDE, length);
	if (failed == before) /* a move back before made it a part of several mappings */
		move(ASIDE, at, length);
}

static void fork_once(void)
{
	uint64_t began = now();
	pid_t child = fork();

	if (!child)
		_exit(0);
	report("fork", began, child < 0);
	if (child > 0 && waitpid(child, NULL, 0) < 0)
		control_die("waitpid");
}

static void calls(uint64_t times, uint64_t pause, bool forks)
{
	for (uint64_t i = 0; i < times; i++) {
		struct timespec asleep = { .tv_nsec = (long)(pause * 1000) };

		switch (forks ? 3 : draw(3)) {
		case 0:
			unmap();
			break;
		case 1:
			drop();
			break;
		case 2:
			there_and_back();
			break;
		case 3:
			fork_once();
		}
		if (pause)
			nanosleep(&asleep, NULL);
	}
}

static void handle(int uffd)
{
	struct uffd_msg message;

	while (read(uffd, &message, sizeof message) > 0)
		if (message.event == UFFD_EVENT_FORK)
			close((int)message.arg.fork.ufd);
}

static void *handler_thread(void *uffd)
{
	handle(*(int *)uffd);
	return NULL;
}

static void start_handler(int uffd, bool in_thread)
{
	pthread_t thread;
	pid_t child;

	if (in_thread) {
		if (pthread_create(&thread, NULL, handler_thread, &uffd))
			control_die("pthread_create");
		return;
	}
	child = fork();
	if (child < 0)
		control_die("fork");
	if (!child) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		setsid(); /* as a pager: the scheduler groups by session */
		handle(uffd);
		_exit(0);
	}
}

static void prepare(bool registered, bool in_thread)
{
	static int uffd;
	int file = -1, flags = MAP_PRIVATE | MAP_FIXED_NOREPLACE | MAP_NORESERVE;
	struct uffdio_api api = { .api = UFFD_API,
				  .features = UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_REMOVE |
					      UFFD_FEATURE_EVENT_UNMAP | UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM };
	struct uffdio_register range = { .range = { (uintptr_t)ARENA, ARENA_PAGES * PAGE },
					 .mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR };

	if (registered) {
		file = memfd_create("events", MFD_CLOEXEC);
		if (file < 0 || ftruncate(file, (off_t)(ARENA_PAGES * PAGE)))
			control_die("memfd");
	}
	if (mmap(ARENA, ARENA_PAGES * PAGE, PROT_READ | PROT_WRITE, flags | (registered ? 0 : MAP_ANONYMOUS), file, 0) != ARENA)
		control_die("mmap");
	if (!registered) {
		for (uint64_t page = 0; page < ARENA_PAGES; page += CONTENT_EVERY)
			*(uint64_t *)(ARENA + page * PAGE) = page + 1;
		return;
	}
	uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
	if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api))
		control_die("userfaultfd");
	start_handler(uffd, in_thread);
	if (ioctl(uffd, UFFDIO_REGISTER, &range))
		control_die("UFFDIO_REGISTER");
}

int main(int argc, char **argv)
{
	char line[128], word[16];
	int listener;

	if (argc != 3)
		return 64;
	prepare(strcmp(argv[2], "plain"), !strcmp(argv[2], "thread"));
	listener = control_listen(argv[1]);
	for (;;) {
		int fd = control_next(listener, line, sizeof line);
		uint64_t times = 0, pause = 0;
		FILE *answer = fdopen(fd, "w");

		if (!answer || sscanf(line, "%15s %lu %lu %lu", word, &seed, &times, &pause) < 3 || !seed)
			control_die("request");
		failed = 0;
		out = strcmp(word, "storm") ? answer : NULL;
		calls(times, pause, !strcmp(word, "forks"));
		fprintf(answer, "failed %ld\n", failed);
		fclose(answer);
	}
}
