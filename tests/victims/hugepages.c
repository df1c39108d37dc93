/*
 * Memory of 2 MiB pages. usage: hugepages CONTROL_SOCKET private|untouched|shared|memfd|memfd-private|huger
 *
 * memfd: a shared mapping of a memfd, whose first half is mapped once more; memfd-private: a private one; huger: of one page of 1 GiB.
 *
 * Eight pages, of which every third is never touched. Requests, each answered with "ok" or what went wrong, and a hash of all: "digest",
 * "write" (a byte in every 4 KiB), "sparse" (a single byte in a page that was never touched), "dontneed" (the fifth page), "fork"
 * (a child reads all, then writes all, which the parent sees if it is shared).
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include "control.h"

#ifndef MAP_HUGE_SHIFT
#define MAP_HUGE_SHIFT 26
#endif
#define HUGE (2ul << 20)
#define PAGES 8
#define SIZE (PAGES * HUGE)

static unsigned char *memory, *again;
static int shared;

static uint64_t digest(void)
{
	uint64_t hash = 0;

	for (size_t i = 0; i < SIZE / 8; i++) {
		hash = (hash ^ ((volatile uint64_t *)memory)[i]) * UINT64_C(0x100000001b3) + i;
		hash ^= hash >> 29;
	}
	return hash;
}

static void write_all(uint64_t step)
{
	for (size_t i = 0; i < SIZE; i += 4096)
		memory[i + step] += (unsigned char)step;
}

static const char *forked(void)
{
	uint64_t *seen = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	int status = -1;
	pid_t child = fork();

	if (!child) {
		seen[0] = digest();
		write_all(2);
		seen[1] = digest();
		_exit(again && memcmp(memory, again, SIZE / 2) ? 1 : 0);
	}
	if (waitpid(child, &status, 0) != child || status)
		return "the child died";
	if (seen[0] == seen[1])
		return "the child's writes";
	if (digest() != seen[shared])
		return "what the child saw is not what the parent sees";
	munmap(seen, 4096);
	return "ok";
}

static unsigned char *map(const char *how)
{
	int access = PROT_READ | PROT_WRITE, anonymous = MAP_ANONYMOUS | MAP_HUGETLB, fd;

	shared = !strcmp(how, "shared") || !strcmp(how, "memfd");
	if (!strcmp(how, "huger"))
		return mmap(NULL, 1ul << 30, access, anonymous | MAP_PRIVATE | 30 << MAP_HUGE_SHIFT, -1, 0);
	if (strncmp(how, "memfd", 5))
		return mmap(NULL, SIZE, access, anonymous | (shared ? MAP_SHARED : MAP_PRIVATE), -1, 0);
	fd = memfd_create("huge", MFD_HUGETLB | MFD_ALLOW_SEALING);
	if (fd < 0 || ftruncate(fd, SIZE))
		control_die("memfd");
	if (shared)
		again = mmap(NULL, SIZE / 2, access, MAP_SHARED, fd, 0);
	return mmap(NULL, SIZE, access, shared ? MAP_SHARED : MAP_PRIVATE, fd, 0);
}

int main(int argc, char **argv)
{
	char line[64];
	int listener;

	if (argc != 3)
		return 64;
	memory = map(argv[2]);
	if (memory == MAP_FAILED || again == MAP_FAILED)
		control_die("mmap");
	if (!strcmp(argv[2], "huger")) {
		memory[12345] = 1;
		pause();
	}
	for (size_t page = 0; page < PAGES && strcmp(argv[2], "untouched"); page++)
		for (size_t i = 0; page % 3 != 2 && i < HUGE / 8; i++)
			((uint64_t *)(memory + page * HUGE))[i] = i % 3 ? page * 1000003 + i * i : 0;
	listener = control_listen(argv[1]);
	for (;;) {
		int fd = control_next(listener, line, sizeof line);
		const char *said = "ok";

		if (!strcmp(line, "write"))
			write_all(1);
		else if (!strcmp(line, "sparse"))
			memory[2 * HUGE + 12345] = 77;
		else if (!strcmp(line, "dontneed"))
			said = madvise(memory + 4 * HUGE, HUGE, MADV_DONTNEED) ? strerror(errno) : "ok";
		else if (!strcmp(line, "fork"))
			said = forked();
		dprintf(fd, "%s %lx", said, (unsigned long)digest());
		close(fd);
	}
}
