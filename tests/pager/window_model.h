/* The kernel's side of window_model.c: memory, and the calls of its threads, one step at a time. */
#pragma once
#include "pager/result.h"
#include <linux/userfaultfd.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>

enum { PAGES = 256, MAX_THREADS = 8, MAX_BLOCKS = 64, MAX_CALL_EVENTS = 4, MAX_QUEUE = 64, MAX_FORKS = 64, BLOCK_PAGES = 4 };
#define BASE 0x100000000ull
#define CHECK(condition)                                                                                               \
	do {                                                                                                           \
		if (!(condition)) {                                                                                    \
			fprintf(stderr, "line %d: %s\n", __LINE__, #condition);                                            \
			exit(2);                                                                                       \
		}                                                                                                      \
	} while (0)

/* -- the kernel's memory ----------------------------------------------------------------------------------------------- */

enum kind { FREE, PLAIN /* mapped, not registered */, REGISTERED };

struct page {
	enum kind kind;
	bool content; /* else zeros */
	int image;    /* the page of the file that is mapped there */
};

struct block {
	int at, n;
};

struct memory {
	struct page pages[PAGES];
	struct block own[MAX_BLOCKS]; /* of who forked */
	int n_own;
};

enum phase { IDLE, WAITS /* for the lock */, CHANGED /* its next event is to be queued */, SLEEPS, WOKEN };

struct message {
	uint8_t kind;
	int start, end, to, thread;
	int fork;
};

struct thread {
	enum phase phase;
	struct block blocks[MAX_BLOCKS];
	int n_blocks, calls_left;
	long call;
	uint64_t arguments[5];
	struct message messages[MAX_CALL_EVENTS];
	int n_messages, next_message;
	struct { int what, number, first, n, more; bool may_move; } plan;
};

static struct memory now, forks[MAX_FORKS];
static int n_forks, changing, n_threads, fork_percent;
static struct thread threads[MAX_THREADS];
static struct message queue[MAX_QUEUE];
static int n_queued;
static uint64_t state, seed;
static bool traces;

#define TRACE(...)                                                                                                     \
	do {                                                                                                           \
		if (traces)                                                                                            \
			printf(__VA_ARGS__);                                                                           \
	} while (0)

static int below(int n) {
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return n > 0 ? (int)((state >> 11) % (uint64_t)n) : 0;
}

static uint64_t address(int page) {
	return BASE + (uint64_t)page * LR_PAGE;
}

static bool is_one_vma(const struct page *pages, int at, int n) {
	for (int i = at; i < at + n; i++)
		if (pages[i].kind != REGISTERED || pages[i].image != pages[at].image + (i - at))
			return false;
	return true;
}

static bool is_all(int at, int n, enum kind kind) {
	for (int i = at; i < at + n; i++)
		if (i >= PAGES || now.pages[i].kind != kind)
			return false;
	return true;
}

static int find_room(int n) {
	for (int at = PAGES - n; at > 0; at--)
		if (is_all(at, n, FREE))
			return at;
	return -1;
}

/* -- calls ------------------------------------------------------------------------------------------------------------- */

enum what { MOVE, LEAVE, OVER, GROW, SHRINK, UNMAP, RENEW, DROP, RESIZE, FORK, N_CALLS };
static const char *const names[] = {"move", "leave", "over", "grow", "shrink", "unmap", "renew", "drop", "resize", "fork"};

static void tell(struct thread *thread, uint8_t kind, int start, int end, int to) {
	struct message message = {.kind = kind, .start = start, .end = end, .to = to, .thread = (int)(thread - threads)};
	thread->messages[thread->n_messages++] = message;
	changing++;
}

static void free_pages(struct thread *thread, int at, int n) {
	bool told = false;
	for (int i = at; i < at + n; i++) {
		told |= now.pages[i].kind == REGISTERED;
		now.pages[i] = (struct page){0};
	}
	if (told)
		tell(thread, UFFD_EVENT_UNMAP, at, at + n, 0);
}

static void add(struct thread *thread, int at, int n) {
	if (n)
		thread->blocks[thread->n_blocks++] = (struct block){at, n};
}

static void take(struct thread *thread, int number, int first, int n) {
	struct block whole = thread->blocks[number];
	thread->blocks[number] = thread->blocks[--thread->n_blocks];
	add(thread, whole.at, first);
	add(thread, whole.at + first + n, whole.n - first - n);
}

/* n pages from `at` become `more` pages at `to`. */
static void relocate(struct thread *thread, int at, int n, int to, int more, bool leaves) {
	struct page moved[PAGES];
	int kept = more < n ? more : n;
	memcpy(moved, &now.pages[at], (size_t)kept * sizeof *moved);
	for (int i = at; i < at + kept; i++) {
		if (leaves)
			now.pages[i].content = false;
		else
			now.pages[i] = (struct page){0};
	}
	for (int i = 0; i < more; i++)
		now.pages[to + i] = i < kept ? moved[i] : (struct page){REGISTERED, false, moved[0].image + i};
	tell(thread, UFFD_EVENT_REMAP, at, at + kept, to);
	if (more < n)
		free_pages(thread, at + kept, n - kept);
	if (!leaves)
		tell(thread, UFFD_EVENT_UNMAP, at, at + kept, 0);
}

static void set_call(struct thread *thread, long call, uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e) {
	thread->call = call;
	memcpy(thread->arguments, (uint64_t[]){a, b, c, d, e}, sizeof thread->arguments);
}

static int room_for(int n) {
	int to = find_room(n);
	for (int i = to; to >= 0 && i < to + n; i++)
		now.pages[i].kind = PLAIN;
	return to;
}

/* Chooses a call; the thread then waits for the lock. */
static void begin(struct thread *thread) {
	thread->calls_left--;
	if (!thread->n_blocks)
		return;
	int number = below(thread->n_blocks), bytes = LR_PAGE, to = -1;
	struct block *block = &thread->blocks[number], *other;
	int first = below(block->n), n = 1 + below(block->n - first), more = block->n + 1 + below(3);
	if (below(2)) {
		first = 0;
		n = block->n;
	}
	int at = block->at + first, what = below(N_CALLS);
	if (thread->n_blocks > MAX_BLOCKS - 4)
		what = UNMAP;
	thread->plan.may_move = below(3);
	switch (what) {
	case MOVE:
	case LEAVE:
		if (!is_one_vma(now.pages, at, n) || (to = room_for(n)) < 0)
			return;
		set_call(thread, SYS_mremap, address(at), (uint64_t)n * bytes, (uint64_t)n * bytes,
			 MREMAP_MAYMOVE | MREMAP_FIXED | (what == LEAVE ? MREMAP_DONTUNMAP : 0), address(to));
		break;
	case OVER:
		other = &thread->blocks[below(thread->n_blocks)];
		if (other == block || other->n < n || !is_one_vma(now.pages, at, n))
			return;
		to = other->at + below(other->n - n + 1);
		set_call(thread, SYS_mremap, address(at), (uint64_t)n * bytes, (uint64_t)n * bytes, MREMAP_MAYMOVE | MREMAP_FIXED,
			 address(to));
		break;
	case RESIZE:
		more = 1 + below(more);
		if (!is_one_vma(now.pages, block->at, block->n) || (to = room_for(more)) < 0)
			return;
		set_call(thread, SYS_mremap, address(block->at), (uint64_t)block->n * bytes, (uint64_t)more * bytes,
			 MREMAP_MAYMOVE | MREMAP_FIXED, address(to));
		break;
	case SHRINK:
		if (block->n < 2)
			return;
		more = 1 + below(block->n - 1);
		/* fall through */
	case GROW:
		if (!is_one_vma(now.pages, block->at, block->n))
			return;
		set_call(thread, SYS_mremap, address(block->at), (uint64_t)block->n * bytes, (uint64_t)more * bytes,
			 thread->plan.may_move ? MREMAP_MAYMOVE : 0, 0);
		break;
	case UNMAP:
		set_call(thread, SYS_munmap, address(at), (uint64_t)n * bytes, 0, 0, 0);
		break;
	case RENEW:
		set_call(thread, SYS_mmap, address(at), (uint64_t)n * bytes, 3, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS, ~0ull);
		break;
	case DROP:
		if (!is_one_vma(now.pages, at, n))
			return;
		set_call(thread, SYS_madvise, address(at), (uint64_t)n * bytes, MADV_DONTNEED, 0, 0);
		break;
	case FORK:
		if (below(100) >= fork_percent || n_forks == MAX_FORKS)
			return;
		set_call(thread, SYS_clone, 0, 0, 0, 0, 0);
	}
	thread->plan.what = what;
	thread->plan.number = number;
	thread->plan.first = first;
	thread->plan.n = n;
	thread->plan.more = more;
	if (to >= 0)
		thread->arguments[4] = address(to);
	thread->phase = WAITS;
}

/* The call changes the address space, all at once. */
static void change(struct thread *thread) {
	int number = thread->plan.number, first = thread->plan.first, n = thread->plan.n, more = thread->plan.more;
	struct block whole = thread->blocks[number];
	int at = whole.at + first, to = (int)((thread->arguments[4] - BASE) / LR_PAGE), under;
	thread->n_messages = thread->next_message = 0;
	switch (thread->plan.what) {
	case MOVE:
	case LEAVE:
		take(thread, number, first, n);
		relocate(thread, at, n, to, n, thread->plan.what == LEAVE);
		add(thread, to, n);
		if (thread->plan.what == LEAVE)
			add(thread, at, n);
		break;
	case OVER:
		for (under = 0; thread->blocks[under].at > to || to >= thread->blocks[under].at + thread->blocks[under].n;)
			under++;
		first = to - thread->blocks[under].at;
		if (under > number) {
			take(thread, under, first, n);
			take(thread, number, thread->plan.first, n);
		} else {
			take(thread, number, thread->plan.first, n);
			for (under = 0; thread->blocks[under].at > to || to >= thread->blocks[under].at + thread->blocks[under].n;)
				under++;
			take(thread, under, to - thread->blocks[under].at, n);
		}
		free_pages(thread, to, n);
		relocate(thread, at, n, to, n, false);
		add(thread, to, n);
		break;
	case RESIZE:
		relocate(thread, whole.at, whole.n, to, more, false);
		thread->blocks[number] = (struct block){to, more};
		break;
	case SHRINK:
		free_pages(thread, whole.at + more, whole.n - more);
		thread->blocks[number].n = more;
		break;
	case GROW:
		if (is_all(whole.at + whole.n, more - whole.n, FREE)) {
			for (int i = whole.n; i < more; i++)
				now.pages[whole.at + i] =
					(struct page){REGISTERED, false, now.pages[whole.at].image + i};
			thread->blocks[number].n = more;
		} else if (thread->plan.may_move && (to = find_room(more)) >= 0) {
			relocate(thread, whole.at, whole.n, to, more, false);
			thread->blocks[number] = (struct block){to, more};
		}
		break;
	case UNMAP:
	case RENEW:
		free_pages(thread, at, n);
		take(thread, number, first, n);
		for (int i = at; thread->plan.what == RENEW && i < at + n; i++)
			now.pages[i].kind = PLAIN;
		if (thread->plan.what == RENEW)
			add(thread, at, n);
		break;
	case DROP:
		for (int i = at; i < at + n; i++)
			now.pages[i].content = false;
		tell(thread, UFFD_EVENT_REMOVE, at, at + n, 0);
		break;
	case FORK:
		forks[n_forks] = now;
		memcpy(forks[n_forks].own, thread->blocks, sizeof thread->blocks);
		forks[n_forks].n_own = thread->n_blocks;
		tell(thread, UFFD_EVENT_FORK, 0, 0, 0);
		thread->messages[0].fork = n_forks++;
	}
	TRACE("%d %s %d+%d (%d) to %d%s\n", (int)(thread - threads) + 1, names[thread->plan.what], at, n, more,
	      thread->call == SYS_mremap ? to : 0, thread->n_messages ? "" : ", untold");
	thread->phase = thread->n_messages ? CHANGED : IDLE;
}

static void step(struct thread *thread) {
	switch (thread->phase) {
	case IDLE:
		if (thread->calls_left)
			begin(thread);
		break;
	case WAITS:
		change(thread);
		break;
	case CHANGED:
		CHECK(n_queued < MAX_QUEUE);
		queue[n_queued++] = thread->messages[thread->next_message++];
		thread->phase = SLEEPS;
		break;
	case SLEEPS:
		break;
	case WOKEN:
		changing--;
		thread->phase = thread->next_message < thread->n_messages ? CHANGED : IDLE;
	}
}
