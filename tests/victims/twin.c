/*
 * Does to its memory what it is told, and says what came of it. usage: twin CONTROL_SOCKET
 *
 * A request is a word and numbers; its answer is the result, errno, and what was read. All addresses are the caller's, in an arena that
 * is free at the start, so that two of these answer alike, whatever their layouts.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <malloc.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/personality.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "control.h"

#ifndef SYS_mseal
#define SYS_mseal 462 /* Linux 6.10 */
#endif

#define PAGE 4096ul
#define MEMFD_PAGES 64
#define NUMBERS 6

typedef unsigned long word;

static word arena_start, arena_end;
static int memory_fd;
static char *heap;
static FILE *out;
static __thread sigjmp_buf on_fault;
static __thread volatile sig_atomic_t guarded;

static uint64_t scramble(uint64_t x)
{
	x = (x ^ (x >> 31)) * UINT64_C(0x9e3779b97f4a7c15) + 1;
	return x ^ (x >> 29);
}

static uint64_t mix(uint64_t hash, uint64_t value)
{
	return (hash ^ value) * UINT64_C(0x100000001b3) + (hash >> 37);
}

static void *at(word address)
{
	return (void *)(uintptr_t)address;
}

static void fault(int number)
{
	if (!guarded)
		_exit(100 + number);
	siglongjmp(on_fault, number);
}

/* The hash of a page; its address and the signal where it cannot be read. */
static uint64_t page_hash(word address)
{
	uint64_t hash = 0xcbf29ce484222325;
	int number = sigsetjmp(on_fault, 1);

	guarded = 1;
	if (number)
		hash = mix(hash, (uint64_t)number << 48);
	else
		for (const volatile uint64_t *p = at(address); p < (uint64_t *)at(address + PAGE); p++)
			hash = mix(hash, *p);
	guarded = 0;
	return hash;
}

static uint64_t range_hash(word start, word length)
{
	uint64_t hash = 0;

	for (word a = start; a < start + length; a += PAGE)
		hash = mix(hash, page_hash(a));
	return hash;
}

/* The pattern that belongs to [start, start + length), written to `to`. */
static __attribute__((noinline)) void write_pattern_to(volatile uint64_t *to, word start, word length, word seed)
{
	uint64_t x = seed;

	for (word a = start; a < start + length; a += 8) {
		x = a % 512 < 256 ? scramble(x + a) : x;
		*to++ = x;
	}
}

/* Writes a pattern; the signal that ended it, or 0. */
static int fill(word start, word length, word seed)
{
	int number = sigsetjmp(on_fault, 1);

	guarded = 1;
	if (!number)
		write_pattern_to(at(start), start, length, seed);
	guarded = 0;
	return number;
}

static void report(long result, uint64_t hash)
{
	fprintf(out, "%ld %d %lx", result, result == -1 ? errno : 0, (unsigned long)hash);
}

/* Runs of equal permissions in the arena, then, if wanted, a hash of every readable page. */
static uint64_t arena(bool contents, FILE *list)
{
	FILE *maps = fopen("/proc/self/maps", "re");
	char line[512], permissions[8], last[8] = "";
	word start, end, run = 0, run_end = 0;
	uint64_t hash = 0;

	if (!maps)
		control_die("maps");
	while (fgets(line, sizeof line, maps)) {
		if (sscanf(line, "%lx-%lx %7s", &start, &end, permissions) != 3 || start >= arena_end || end <= arena_start)
			continue;
		if (start != run_end || strcmp(permissions, last)) {
			if (list && run_end)
				fprintf(list, " %lx-%lx:%s", run, run_end, last);
			run = start;
			strcpy(last, permissions);
		}
		run_end = end;
	}
	if (list && run_end)
		fprintf(list, " %lx-%lx:%s", run, run_end, last);
	rewind(maps);
	while (contents && fgets(line, sizeof line, maps))
		if (sscanf(line, "%lx-%lx %7s", &start, &end, permissions) == 3 && start < arena_end && end > arena_start &&
		    permissions[0] == 'r')
			for (word a = start; a < end; a += PAGE)
				hash = mix(mix(hash, a), page_hash(a));
	fclose(maps);
	return hash;
}

/* A child hashes all it has, before and after it wrote to a range; the parent's own view comes later. */
static void forked(word start, word length, word seed, bool shared_vm)
{
	uint64_t hashes[3] = { 0 };
	int ends[2], status = -1;
	pid_t child;

	if (pipe(ends))
		control_die("pipe");
	child = shared_vm ? vfork() : fork();
	if (!child) {
		if (shared_vm)
			_exit((int)(page_hash(start) % 251));
		hashes[0] = arena(true, NULL);
		hashes[1] = (uint64_t)fill(start, length, seed);
		if (length % (2 * PAGE) == 0) { /* a grandchild reads it all, too */
			child = fork();
			if (!child)
				_exit((int)(arena(true, NULL) % 251));
			if (waitpid(child, &status, 0) != child)
				status = -1;
		}
		hashes[2] = mix(arena(true, NULL), (uint64_t)status);
		_exit(write(ends[1], hashes, sizeof hashes) == sizeof hashes ? 0 : 1);
	}
	close(ends[1]);
	if (!shared_vm && read(ends[0], hashes, sizeof hashes) != sizeof hashes)
		hashes[0] = 0xdead;
	close(ends[0]);
	waitpid(child, &status, 0);
	report(status, mix(mix(hashes[0], hashes[1]), hashes[2]));
}

/* The range through a pipe and back to where it was: the kernel reads and writes the memory. */
static void through_pipe(word start, word length)
{
	int ends[2];
	ssize_t n;

	if (pipe(ends))
		control_die("pipe");
	n = write(ends[1], at(start), length);
	if (n > 0)
		n = read(ends[0], at(start), (size_t)n);
	report(n, range_hash(start, length));
	close(ends[0]);
	close(ends[1]);
}

struct racer {
	word start, length, times;
	const uint64_t *expected; /* each word, before */
	long wrong;
};

/* Each word is what it was, or zero: another thread may drop its page between two of them. */
static void *race_touch(void *argument)
{
	struct racer *racer = argument;
	word pages = racer->length / PAGE;

	for (word i = 0; i < racer->times * pages; i++) {
		word page = i * 7 % pages;
		const volatile uint64_t *words = at(racer->start + page * PAGE);

		for (word k = 0; k < PAGE / 8; k++) {
			uint64_t seen = words[k];

			if (seen && seen != racer->expected[page * PAGE / 8 + k])
				racer->wrong++;
		}
	}
	return NULL;
}

static void *race_drop(void *argument)
{
	struct racer *racer = argument;

	for (word i = 0; i < racer->times; i++)
		if (madvise(at(racer->start + i * 3 % (racer->length / PAGE) * PAGE), PAGE, MADV_DONTNEED))
			racer->wrong++;
	return NULL;
}

static void *race_fork(void *argument)
{
	struct racer *racer = argument;

	for (word i = 0; i < racer->times; i++) {
		int status = -1;
		pid_t child = fork();

		if (!child) {
			struct racer mine = *racer;

			mine.wrong = 0;
			mine.times = 1;
			race_touch(&mine);
			_exit(mine.wrong != 0);
		}
		if (waitpid(child, &status, 0) != child || status)
			racer->wrong++;
	}
	return NULL;
}

/* Memory that fill_pages() wrote holds, at any time and in any child, what it wrote, or zero. */
static void race(word start, word length, word times, word seed)
{
	uint64_t *expected = calloc(1, length);
	pthread_t threads[4];
	struct racer racers[4];
	void *(*const work[4])(void *) = { race_touch, race_touch, race_drop, race_fork };
	long wrong = 0;

	if (!expected)
		control_die("calloc");
	for (word a = start; a < start + length; a += PAGE)
		write_pattern_to(expected + (a - start) / 8, a, PAGE, seed);
	for (int i = 0; i < 4; i++) {
		racers[i] = (struct racer){ start, length, work[i] == race_drop ? times * length / PAGE : times, expected, 0 };
		if (pthread_create(&threads[i], NULL, work[i], &racers[i]))
			control_die("pthread_create");
	}
	for (int i = 0; i < 4; i++) {
		pthread_join(threads[i], NULL);
		wrong += racers[i].wrong;
	}
	free(expected);
	report(wrong, 0);
}

/* -- one thread is given what another has just unmapped ---------------------------------------------------------------- */

struct swap {
	word from, to, pieces;
	long wrong;
};

#define PIECE (2 * PAGE)

static void *swap_unmap(void *argument)
{
	struct swap *swap = argument;

	for (word i = 0; i < swap->pieces; i++)
		if (munmap(at(swap->to + i * PIECE), PIECE))
			swap->wrong++;
	return NULL;
}

/* Moves a piece as soon as its destination is free, which is before the munmap has returned. */
static void *swap_move(void *argument)
{
	struct swap *swap = argument;
	unsigned char resident[PIECE / PAGE];

	for (word i = 0; i < swap->pieces; i++) {
		void *to = at(swap->to + i * PIECE);

		while (!mincore(to, PIECE, resident) || errno != ENOMEM)
			;
		if (mremap(at(swap->from + i * PIECE), PIECE, PIECE, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to)
			swap->wrong++;
	}
	return NULL;
}

/* [start, start + length) is unmapped while what lies behind it moves there, and what lies behind that is read, and forked. */
static void swap(word start, word length, word times, word seed)
{
	uint64_t *expected = calloc(2, length);
	struct swap swaps[2];
	struct racer racers[2];
	pthread_t threads[4];
	long wrong = 0;

	if (!expected)
		control_die("calloc");
	for (word a = start + length; a < start + 3 * length; a += PAGE)
		write_pattern_to(expected + (a - start - length) / 8, a, PAGE, seed);
	for (int i = 0; i < 2; i++) {
		swaps[i] = (struct swap){ start + length, start, length / PIECE, 0 };
		racers[i] = (struct racer){ start + 2 * length, length, times, expected + length / 8, 0 };
	}
	if (pthread_create(&threads[0], NULL, swap_unmap, &swaps[0]) || pthread_create(&threads[1], NULL, swap_move, &swaps[1]) ||
	    pthread_create(&threads[2], NULL, race_touch, &racers[0]) || pthread_create(&threads[3], NULL, race_fork, &racers[1]))
		control_die("pthread_create");
	for (int i = 0; i < 4; i++)
		pthread_join(threads[i], NULL);
	for (word i = 0; i < length / 8; i++)
		wrong += ((uint64_t *)at(start))[i] != expected[i];
	free(expected);
	report(wrong + swaps[0].wrong + swaps[1].wrong + racers[0].wrong + racers[1].wrong, 0);
}

/* Like fill(), each page by itself, so that race() can tell what each holds. */
static int fill_pages(word start, word length, word seed)
{
	int number = 0;

	for (word a = start; a < start + length && !number; a += PAGE)
		number = fill(a, PAGE, seed);
	return number;
}

static void map(const word *a)
{
	static const int kinds[] = { MAP_PRIVATE | MAP_ANONYMOUS, MAP_SHARED | MAP_ANONYMOUS, MAP_PRIVATE, MAP_SHARED };
	int flags = kinds[a[3] % 4] | (a[5] ? MAP_FIXED : MAP_FIXED_NOREPLACE) | MAP_NORESERVE;

	report(mmap(at(a[0]), a[1], (int)a[2], flags, a[3] % 4 < 2 ? -1 : memory_fd, (off_t)a[4]) == MAP_FAILED ? -1 : 0, 0);
}

static void grow_heap(long delta, word seed)
{
	char *now = sbrk(0);
	long result = sbrk(delta) == (void *)-1 ? -1 : 0;
	word length = (word)((char *)sbrk(0) - heap);

	if (!result && delta > 0)
		fill((word)(uintptr_t)now, (word)delta / 2 & -PAGE, seed); /* the rest stays zero */
	errno = 0;
	report((long)length, range_hash((word)(uintptr_t)heap, length & -PAGE));
}

static void serve(char *request)
{
	char name[16] = "";
	word a[NUMBERS] = { 0 };

	sscanf(request, "%15s %lu %lu %lu %lu %lu %lu", name, a, a + 1, a + 2, a + 3, a + 4, a + 5);
	errno = 0;
	if (!strcmp(name, "map"))
		map(a);
	else if (!strcmp(name, "unmap"))
		report(munmap(at(a[0]), a[1]), 0);
	else if (!strcmp(name, "protect"))
		report(mprotect(at(a[0]), a[1], (int)a[2]), 0);
	else if (!strcmp(name, "remap"))
		report(mremap(at(a[0]), a[1], a[2], (int)a[4], at(a[3])) == MAP_FAILED ? -1 : 0, 0);
	else if (!strcmp(name, "advise"))
		report(madvise(at(a[0]), a[1], (int)a[2]), 0);
	else if (!strcmp(name, "write"))
		report(fill_pages(a[0], a[1], a[2]), 0);
	else if (!strcmp(name, "read"))
		report(0, range_hash(a[0], a[1]));
	else if (!strcmp(name, "fork"))
		forked(a[0], a[1], a[2], false);
	else if (!strcmp(name, "vfork"))
		forked(a[0], a[1], a[2], true);
	else if (!strcmp(name, "seal"))
		report(syscall(SYS_mseal, at(a[0]), a[1], 0), 0);
	else if (!strcmp(name, "pipe"))
		through_pipe(a[0], a[1]);
	else if (!strcmp(name, "file"))
		report(pread(memory_fd, at(a[0]), a[1], (off_t)a[2]), range_hash(a[0], a[1]));
	else if (!strcmp(name, "brk"))
		grow_heap((long)a[0], a[1]);
	else if (!strcmp(name, "race"))
		race(a[0], a[1], a[2], a[3]);
	else if (!strcmp(name, "swap"))
		swap(a[0], a[1], a[2], a[3]);
	else if (!strcmp(name, "list")) {
		fprintf(out, "mapped:");
		arena(false, out);
	} else if (!strcmp(name, "digest")) {
		fprintf(out, "mapped:");
		uint64_t hash = arena(true, out);

		fprintf(out, " %lx", (unsigned long)hash);
	} else
		fprintf(out, "unknown request %s", name);
}

int main(int argc, char **argv)
{
	struct sigaction action = { .sa_handler = fault, .sa_flags = SA_NODEFER };

	if (argc != 4)
		return 64;
	if (!(personality(0xffffffff) & ADDR_NO_RANDOMIZE)) { /* the heap of both at the same place */
		personality(ADDR_NO_RANDOMIZE);
		execv("/proc/self/exe", argv);
		control_die("execv");
	}
	mallopt(M_MMAP_THRESHOLD, 0); /* the heap is the test's */
	arena_start = strtoul(argv[2], NULL, 0);
	arena_end = strtoul(argv[3], NULL, 0);
	sigaction(SIGSEGV, &action, NULL);
	sigaction(SIGBUS, &action, NULL);
	memory_fd = memfd_create("twin", MFD_CLOEXEC);
	if (memory_fd < 0 || ftruncate(memory_fd, MEMFD_PAGES * PAGE))
		control_die("memfd");
	for (word i = 0; i < MEMFD_PAGES * PAGE / 8; i++) {
		uint64_t value = i / 512 % 3 ? scramble(i) : 0;

		if (value && pwrite(memory_fd, &value, sizeof value, (off_t)(i * 8)) != sizeof value)
			control_die("pwrite");
	}
	heap = (char *)(((uintptr_t)sbrk(0) + PAGE - 1) & -PAGE);
	if (brk(heap))
		control_die("brk");
	control_serve(control_listen(argv[1]), &out, serve);
}
