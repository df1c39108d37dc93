/* Threads that call mremap, munmap, mmap, madvise and fork at random on blocks of their own, and know what must be in them.
 *
 * usage: storm THREADS CALLS SHARED% FORKS% KINDS SEED; THREADS beside the main one, which waits for them; 0: it makes the calls, alone;
 * -1: it does, and so does another thread that comes and goes.
 * The blocks are made, "ready" is printed, SIGUSR1 starts the storm; with SEED 0 no two are alike. KINDS: which calls, a bit each as in
 * enum call. No thread touches another's block, but the kernel gives each the addresses that others have just given back.
 * Exit status 0; 1 after a line on standard output for each page that is wrong; 2: a call failed that cannot fail. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif

enum { PAGE = 4096, WORDS = PAGE / 8, MOST_PAGES = 64, MOST_BLOCKS = 700, FIRST_BLOCKS = 40, FILE_PAGES = 2048, MOST_THREADS = 64 };

enum call { MOVE, LEAVE, OVER, GROW, SHRINK, UNMAP, RENEW, DROP, WRITE, READ, RESIZE, FORK, N_CALLS };

/* Private: each page's token, 0 for zeros. Shared: the page of the thread's "file", whose tokens stand in the thread. */
struct block {
	char *at;
	int n;
	bool shared;
	uint64_t token[MOST_PAGES];
};

struct thread {
	struct block blocks[MOST_BLOCKS];
	uint64_t file[FILE_PAGES];
	int number, n_blocks, n_file, depth;
	uint64_t written, state;
	int status;
};

static struct thread *threads[MOST_THREADS];
static int n_threads, n_calls, shared_percent, fork_percent;
static long kinds;
static uint64_t seed;

static int below(struct thread *thread, int n) {
	uint64_t x = thread->state;
	x ^= x << 13;
	x ^= x >> 7;
	x ^= x << 17;
	thread->state = x;
	return n > 0 ? (int)((x >> 11) % (uint64_t)n) : 0;
}

static void failed(struct thread *thread, const char *what) {
	perror(what);
	thread->status = 2;
}

/* -- blocks and their model -------------------------------------------------------------------------------------------- */

static uint64_t *token_of(struct thread *thread, struct block *block, int page) {
	return block->shared ? &thread->file[block->token[page]] : &block->token[page];
}

static void check(struct thread *thread, struct block *block, int page, const char *when) {
	volatile uint64_t *words = (uint64_t *)(block->at + (size_t)page * PAGE);
	uint64_t token = *token_of(thread, block, page);
	int word = below(thread, WORDS);
	uint64_t expected = token ? token + (uint64_t)word : 0, found = words[word];
	if (found == expected)
		return;
	printf("%d thread %d depth %d, %s: %p (page %d of %d, %s) has %llx, not %llx\n", (int)getpid(), thread->number,
	       thread->depth, when, (void *)words, page, block->n, block->shared ? "shared" : "private",
	       (unsigned long long)found, (unsigned long long)expected);
	fflush(stdout);
	thread->status = 1;
}

static void check_all(struct thread *thread, const char *when) {
	for (int i = 0; i < thread->n_blocks; i++)
		for (int page = 0; page < thread->blocks[i].n; page++)
			check(thread, &thread->blocks[i], page, when);
}

static void fill(struct thread *thread, struct block *block, int first, int n) {
	uint64_t token = ((uint64_t)(thread->number + 1) << 48 | (uint64_t)thread->depth << 44 | ++thread->written << 16) *
			 0x9E3779B97F4A7C15ull;
	for (int page = first; page < first + n; page++) {
		uint64_t *words = (uint64_t *)(block->at + (size_t)page * PAGE);
		for (int i = 0; i < WORDS; i++)
			words[i] = token + (uint64_t)i;
		*token_of(thread, block, page) = token;
	}
}

static void add(struct thread *thread, const struct block *block) {
	thread->blocks[thread->n_blocks++] = *block;
}

static void drop(struct thread *thread, int number) {
	thread->blocks[number] = thread->blocks[--thread->n_blocks];
}

static struct block part(const struct block *block, int first, int n) {
	struct block cut = {.at = block->at + (size_t)first * PAGE, .n = n, .shared = block->shared};
	memcpy(cut.token, block->token + first, (size_t)n * sizeof *cut.token);
	return cut;
}

/* What is left of a block around [first, first + n). */
static void add_rest(struct thread *thread, const struct block *block, int first, int n) {
	struct block rest;
	if (first) {
		rest = part(block, 0, first);
		add(thread, &rest);
	}
	if (first + n < block->n) {
		rest = part(block, first + n, block->n - first - n);
		add(thread, &rest);
	}
}

static void empty(struct block *block) {
	if (!block->shared)
		memset(block->token, 0, sizeof block->token);
}

static char *reserve(int n) {
	return mmap(NULL, (size_t)n * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

/* -- calls ------------------------------------------------------------------------------------------------------------- */

static void storm_on(struct thread *thread, int calls);

static void fork_once(struct thread *thread) {
	int status;
	if (thread->depth > 1 || below(thread, 100) >= fork_percent)
		return;
	fflush(stdout);
	pid_t child = fork();
	if (child < 0)
		failed(thread, "fork");
	if (child > 0) {
		if (waitpid(child, &status, 0) != child || status)
			thread->status = WIFEXITED(status) ? 1 : 2;
		return;
	}
	if (child)
		return;
	thread->depth++;
	thread->status = 0;
	thread->state += (uint64_t)getpid() * 977;
	storm_on(thread, below(thread, 2) ? below(thread, 40) : 0);
	check_all(thread, "in a child");
	_exit(thread->status);
}

/* A part of a block to a new place; LEAVE: it stays mapped where it was, too. */
static void move(struct thread *thread, int number, int first, int n, bool leaves) {
	struct block whole = thread->blocks[number], moved = part(&whole, first, n), left = moved;
	size_t bytes = (size_t)n * PAGE;
	char *to = reserve(n);
	if (to == MAP_FAILED)
		return;
	moved.at = mremap(left.at, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED | (leaves ? MREMAP_DONTUNMAP : 0), to);
	if (moved.at != to) { /* a shared block that lies in two mappings, say */
		munmap(to, bytes);
		return;
	}
	drop(thread, number);
	add_rest(thread, &whole, first, n);
	add(thread, &moved);
	empty(&left);
	if (leaves)
		add(thread, &left);
}

/* A part of a block over a part of another. */
static void move_over(struct thread *thread, int number, int first, int n) {
	int other = below(thread, thread->n_blocks);
	struct block whole = thread->blocks[number], moved = part(&whole, first, n), under = thread->blocks[other];
	if (other == number || under.n < n)
		return;
	int place = below(thread, under.n - n + 1);
	char *to = under.at + (size_t)place * PAGE;
	if (mremap(moved.at, (size_t)n * PAGE, (size_t)n * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to)
		return failed(thread, "mremap over another block");
	moved.at = to;
	drop(thread, number > other ? number : other);
	drop(thread, number > other ? other : number);
	add_rest(thread, &whole, first, n);
	add_rest(thread, &under, place, n);
	add(thread, &moved);
}

/* `fixed`: to a new place, else where the kernel has room. */
static void resize(struct thread *thread, struct block *block, int n, bool fixed) {
	char *to = fixed ? reserve(n) : NULL;
	if (block->shared || to == MAP_FAILED)
		return;
	int flags = fixed ? MREMAP_MAYMOVE | MREMAP_FIXED : below(thread, 3) ? MREMAP_MAYMOVE : 0;
	char *at = mremap(block->at, (size_t)block->n * PAGE, (size_t)n * PAGE, flags, to);
	if (at == MAP_FAILED) { /* no room in place, or in two mappings */
		if (fixed)
			munmap(to, (size_t)n * PAGE);
		return;
	}
	block->at = at;
	for (int page = block->n; page < n; page++)
		block->token[page] = 0;
	block->n = n;
}

static void cut(struct thread *thread, int number, int first, int n, bool renew) {
	struct block whole = thread->blocks[number], gone = part(&whole, first, n);
	if (!renew)
		munmap(gone.at, (size_t)n * PAGE);
	else if (mmap(gone.at, (size_t)n * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != gone.at)
		return failed(thread, "mmap");
	drop(thread, number);
	add_rest(thread, &whole, first, n);
	gone.shared = false;
	empty(&gone);
	if (renew)
		add(thread, &gone);
}

static void drop_pages(struct thread *thread, struct block *block, int first, int n) {
	if (madvise(block->at + (size_t)first * PAGE, (size_t)n * PAGE, MADV_DONTNEED))
		return failed(thread, "madvise");
	for (int page = first; page < first + n && !block->shared; page++)
		block->token[page] = 0;
}

static void one_call(struct thread *thread) {
	if (!thread->n_blocks)
		return;
	int number = below(thread, thread->n_blocks);
	struct block *block = &thread->blocks[number];
	if (thread->n_blocks > MOST_BLOCKS - 8)
		return cut(thread, number, 0, block->n, false);
	int first = below(thread, block->n), n = 1 + below(thread, block->n - first);
	if (below(thread, 2)) {
		first = 0;
		n = block->n;
	}
	enum call call = (enum call)below(thread, N_CALLS);
	if (!(kinds & 1L << call))
		return;
	int more = block->n + 1 + below(thread, 8);
	switch (call) {
	case MOVE:
	case LEAVE:
		return move(thread, number, first, n, call == LEAVE);
	case OVER:
		return move_over(thread, number, first, n);
	case GROW:
		return more <= MOST_PAGES ? resize(thread, block, more, false) : (void)0;
	case SHRINK:
		return block->n > 1 ? resize(thread, block, 1 + below(thread, block->n - 1), false) : (void)0;
	case RESIZE:
		return resize(thread, block, 1 + below(thread, more <= MOST_PAGES ? more : MOST_PAGES), true);
	case UNMAP:
	case RENEW:
		return below(thread, 3) ? (void)0 : cut(thread, number, first, n, call == RENEW);
	case DROP:
		return drop_pages(thread, block, first, n);
	case WRITE: /* a child's would be seen by its parent */
		return block->shared && fork_percent ? (void)0 : fill(thread, block, first, n);
	case READ:
		return check(thread, block, first, "in between");
	default:
		return fork_once(thread);
	}
}

static void storm_on(struct thread *thread, int calls) {
	for (int i = 0; i < calls; i++)
		one_call(thread);
}

/* -- all --------------------------------------------------------------------------------------------------------------- */

static void *run(void *argument) {
	struct thread *thread = argument;
	storm_on(thread, n_calls);
	check_all(thread, "at the end");
	return NULL;
}

static atomic_bool guest_is_here;

static void *be_guest(void *argument) {
	storm_on(argument, 1 + below(argument, 3));
	guest_is_here = false;
	return NULL;
}

/* The main thread's calls; with a `guest`, another thread lives for a few calls at a time. */
static void storm_on_main(struct thread *thread, struct thread *guest) {
	pthread_attr_t detached;
	pthread_t id;
	pthread_attr_init(&detached);
	pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
	for (int i = 0; i < n_calls; i++) {
		if (guest && !atomic_exchange(&guest_is_here, true) && pthread_create(&id, &detached, be_guest, guest))
			abort();
		one_call(thread);
	}
	while (guest_is_here)
		sched_yield();
	check_all(thread, "at the end");
	if (guest)
		check_all(guest, "at the end");
}

static struct thread *make_thread(int number) {
	struct thread *thread =
		mmap(NULL, sizeof *thread, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (thread == MAP_FAILED)
		abort();
	thread->number = number;
	thread->state = 88172645463325252ull + (uint64_t)number * 7777 + seed * 1000003;
	for (int i = 0; i < FIRST_BLOCKS; i++) {
		struct block block = {.n = 1 + below(thread, 32), .shared = below(thread, 100) < shared_percent};
		int kind = block.shared ? MAP_SHARED : MAP_PRIVATE;
		block.at = mmap(NULL, (size_t)block.n * PAGE, PROT_READ | PROT_WRITE, kind | MAP_ANONYMOUS, -1, 0);
		if (block.at == MAP_FAILED)
			abort();
		for (int page = 0; page < block.n; page++) {
			if (block.shared)
				block.token[page] = (uint64_t)thread->n_file++;
			if (below(thread, 8))
				fill(thread, &block, page, 1);
		}
		add(thread, &block);
	}
	return thread;
}

static void nothing(int signal) {
	(void)signal;
}

int main(int argc, char **argv) {
	pthread_t ids[MOST_THREADS];
	sigset_t start, none;
	struct timespec now;
	int status = 0, made;
	if (argc != 7 || atoi(argv[1]) > MOST_THREADS)
		return 2;
	n_threads = atoi(argv[1]);
	n_calls = atoi(argv[2]);
	shared_percent = atoi(argv[3]);
	fork_percent = atoi(argv[4]);
	kinds = strtol(argv[5], NULL, 0);
	seed = strtoull(argv[6], NULL, 0);
	sigemptyset(&none);
	sigemptyset(&start);
	sigaddset(&start, SIGUSR1);
	sigprocmask(SIG_BLOCK, &start, NULL);
	signal(SIGUSR1, nothing);
	made = n_threads > 0 ? n_threads : 1 - n_threads;
	for (int i = 0; i < made; i++)
		threads[i] = make_thread(i);
	puts("ready");
	fflush(stdout);
	sigsuspend(&none);
	clock_gettime(CLOCK_REALTIME, &now);
	for (int i = 0; i < made && !seed; i++)
		threads[i]->state ^= (uint64_t)now.tv_nsec << 20 ^ (uint64_t)getpid() * 7919 * (uint64_t)(i + 1);
	if (n_threads <= 0)
		storm_on_main(threads[0], threads[1]);
	for (int i = 0; i < n_threads; i++)
		if (pthread_create(&ids[i], NULL, run, threads[i]))
			abort();
	for (int i = 0; i < n_threads; i++)
		pthread_join(ids[i], NULL);
	for (int i = 0; i < made; i++)
		if (threads[i]->status > status)
			status = threads[i]->status;
	return status;
}
