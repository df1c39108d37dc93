/*
 * Memory of 2 MiB pages. usage: hugepages CONTROL_SOCKET private|shared|untouched
 *
 * Eight pages, of which every third is never touched. Requests, each answered with "ok" or what went wrong, and a hash of all: "digest",
 * "write" (a byte in every 4 KiB), "sparse" (a single byte in a page that was never touched), "dontneed" (the fifth page), "fork"
 * (a child reads all, then writes all).
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include "control.h"

#define HUGE (2ul << 20)
#define PAGES 8
#define SIZE (PAGES * HUGE)

static unsigned char *memory;

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
		_exit(0);
	}
	if (waitpid(child, &status, 0) != child || status)
		return "the child died";
	if (seen[0] == seen[1])
		return "the child's writes";
	if (digest() != seen[0])
		return "what the child saw is not what the parent sees";
	munmap(seen, 4096);
	return "ok";
}

int main(int argc, char **argv)
{
	char line[64];
	int listener;

	if (argc != 3)
		return 64;
	memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE,
		      MAP_ANONYMOUS | MAP_HUGETLB | (strcmp(argv[2], "shared") ? MAP_PRIVATE : MAP_SHARED), -1, 0);
	if (memory == MAP_FAILED)
		control_die("mmap");
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
