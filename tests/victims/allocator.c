/*
 * Allocates, fills, checks and frees, by whatever malloc it was linked or preloaded with. usage: allocator CONTROL_SOCKET
 * [TRIM], where TRIM is a function of the allocator's, void(void) or void(int), that returns free memory to the kernel.
 *
 * Three threads that live as long as the process, each with blocks of its own, and the main one with a fourth set. Every
 * block holds a pattern of its number and seed; every read checks all of it. What calloc gives must be zero.
 * Requests: "work SEED TIMES", "check", "empty" (frees nine blocks of ten and trims), each answered with the number of
 * wrong bytes and a hash of all live blocks, which is the same in a twin.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <malloc.h>
#include <pthread.h>
#include <stdint.h>

#include "control.h"

#define WORKERS 4
#define BLOCKS 500

struct block {
	unsigned char *at;
	size_t size;
	uint64_t seed;
};

struct worker {
	struct block blocks[BLOCKS];
	uint64_t hash;
	long wrong;
};

static struct worker workers[WORKERS];
static pthread_barrier_t start, finish;
static struct { char name[16]; uint64_t seed, times; } job;

static uint64_t scramble(uint64_t x)
{
	x = (x ^ (x >> 31)) * UINT64_C(0x9e3779b97f4a7c15) + 1;
	return x ^ (x >> 29);
}

/* A pattern that depends on the place, and is half zeros. */
static uint64_t pattern(const struct block *b, size_t word)
{
	return word % 128 < 64 ? scramble(b->seed + word) : 0;
}

static void fill(struct block *b)
{
	for (size_t i = 0; i < b->size / 8; i++)
		((uint64_t *)b->at)[i] = pattern(b, i);
}

static long check(const struct block *b, size_t size)
{
	long wrong = 0;

	for (size_t i = 0; i < size / 8; i++)
		wrong += ((const uint64_t *)b->at)[i] != pattern(b, i);
	return wrong;
}

/* Small blocks mostly, some of pages, few that a malloc maps by themselves. */
static size_t size_of(uint64_t x)
{
	uint64_t kind = x % 100;

	x = x / 100 % 4096;
	return kind < 70 ? 16 + x % 128 * 8 : kind < 92 ? 1024 + x * 8 : kind < 99 ? 65536 + x * 16 : (1 << 20) + x * 256;
}

static void take(struct worker *w, struct block *b, uint64_t x)
{
	b->size = size_of(scramble(x)) & ~UINT64_C(7);
	b->seed = x;
	if (x % 5 == 0) {
		b->at = calloc(1, b->size);
		for (size_t i = 0; b->at && i < b->size; i++)
			w->wrong += b->at[i] != 0;
	} else if (x % 5 == 1) {
		b->at = memalign(x % 2 ? 4096 : 64, b->size);
	} else
		b->at = malloc(b->size);
	if (!b->at)
		control_die("allocation");
	fill(b);
}

static void give(struct worker *w, struct block *b)
{
	w->wrong += check(b, b->size);
	free(b->at);
	b->at = NULL;
}

static void resize(struct worker *w, struct block *b, uint64_t x)
{
	size_t size = size_of(x) & ~UINT64_C(7), kept = size < b->size ? size : b->size;

	b->at = realloc(b->at, size);
	if (!b->at)
		control_die("realloc");
	w->wrong += check(b, kept);
	b->size = size;
	fill(b);
}

static void run(int number)
{
	struct worker *w = &workers[number];
	uint64_t x = scramble(job.seed * WORKERS + (uint64_t)number);

	if (!strcmp(job.name, "work"))
		for (uint64_t i = 0; i < job.times; i++) {
			struct block *b = &w->blocks[x % BLOCKS];

			x = scramble(x + i);
			if (!b->at)
				take(w, b, x);
			else if (x % 3)
				give(w, b);
			else
				resize(w, b, x);
		}
	else if (!strcmp(job.name, "empty"))
		for (int i = 0; i < BLOCKS; i++)
			if (w->blocks[i].at && i % 10)
				give(w, &w->blocks[i]);
	w->hash = 0;
	for (int i = 0; i < BLOCKS; i++) {
		const struct block *b = &w->blocks[i];

		if (!b->at)
			continue;
		w->wrong += check(b, b->size);
		for (size_t k = 0; k < b->size / 8; k++)
			w->hash = (w->hash ^ ((uint64_t *)b->at)[k]) * UINT64_C(0x100000001b3);
	}
}

static void *worker(void *number)
{
	for (;;) {
		pthread_barrier_wait(&start);
		run((int)(intptr_t)number);
		pthread_barrier_wait(&finish);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	void (*trim)(int) = NULL;
	char line[128];
	int listener;

	if (argc < 2)
		return 64;
	if (argc > 2) {
		void *symbol = dlsym(RTLD_DEFAULT, argv[2]);

		if (!symbol)
			return 65;
		memcpy(&trim, &symbol, sizeof trim);
	}
	pthread_barrier_init(&start, NULL, WORKERS);
	pthread_barrier_init(&finish, NULL, WORKERS);
	for (intptr_t i = 1; i < WORKERS; i++) {
		pthread_t thread;

		if (pthread_create(&thread, NULL, worker, (void *)i))
			control_die("pthread_create");
	}
	listener = control_listen(argv[1]);
	for (;;) {
		int fd = control_next(listener, line, sizeof line);
		uint64_t hash = 0;
		long wrong = 0;

		job.times = 0;
		sscanf(line, "%15s %lu %lu", job.name, &job.seed, &job.times);
		pthread_barrier_wait(&start);
		run(0);
		pthread_barrier_wait(&finish);
		if (trim && !strcmp(job.name, "empty"))
			trim(1);
		for (int i = 0; i < WORKERS; i++) {
			hash = scramble(hash ^ workers[i].hash);
			wrong += workers[i].wrong;
		}
		dprintf(fd, "%ld wrong, %lx", wrong, hash);
		close(fd);
	}
}
