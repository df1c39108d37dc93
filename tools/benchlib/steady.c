/*
 * A memory-heavy workload that says how long it took. usage: steady CONTROL_SOCKET MEGABYTES {small|huge}
 *
 * An array with the same content in every process; huge: under MADV_HUGEPAGE. Requests, each answered with the CPU time
 * in ns and a checksum: "sum" reads all of it in order, "chase SEED" follows a random walk through it (each read depends on the one before),
 * "update SEED" changes random words, "fill" changes a word of every page.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <sys/mman.h>
#include <time.h>

#include "control.h"

enum { STEPS = 1 << 19, WORDS_PER_PAGE = 512 };

static uint64_t *words, n_words;

static uint64_t scramble(uint64_t x)
{
	x = (x ^ (x >> 31)) * UINT64_C(0x9e3779b97f4a7c15) + 1;
	return x ^ (x >> 29);
}

static uint64_t cpu_time(void)
{
	struct timespec t;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t work(const char *name, uint64_t seed)
{
	uint64_t x = scramble(seed);

	if (!strcmp(name, "sum"))
		for (uint64_t i = 0; i < n_words; i++)
			x += words[i];
	else if (!strcmp(name, "chase"))
		for (uint64_t i = 0; i < STEPS; i++)
			x = scramble(x + words[x % n_words]);
	else if (!strcmp(name, "update"))
		for (uint64_t i = 0; i < STEPS; i++)
			words[(x = scramble(x)) % n_words] += i;
	else
		for (uint64_t i = 0; i < n_words; i += WORDS_PER_PAGE)
			words[i] += seed;
	return x;
}

int main(int argc, char **argv)
{
	char line[128], name[16];
	size_t length;
	int listener;

	if (argc != 4)
		return 64;
	length = (size_t)strtoul(argv[2], NULL, 10) << 20;
	words = mmap((void *)0x100000000000, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
	if (words == MAP_FAILED)
		control_die("mmap");
	if (!strcmp(argv[3], "huge") && madvise(words, length, MADV_HUGEPAGE))
		control_die("MADV_HUGEPAGE");
	n_words = length / sizeof *words;
	for (uint64_t i = 0; i < n_words; i++)
		words[i] = i % WORDS_PER_PAGE < 64 ? scramble(i) : i / 4096;
	listener = control_listen(argv[1]);
	for (;;) {
		int fd = control_next(listener, line, sizeof line);
		uint64_t seed = 1, began, result;

		if (sscanf(line, "%15s %lu", name, &seed) < 1)
			control_die("request");
		began = cpu_time();
		result = work(name, seed);
		dprintf(fd, "%lu %lx", cpu_time() - began, result);
		close(fd);
	}
}
