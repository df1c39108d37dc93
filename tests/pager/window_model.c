/* A model of the kernel's side: threads that move, resize, unmap, drop and fork memory of their own, in random interleavings of what
 * the kernel does one after the other: the change, each event queued, each read, its caller awake. The events go to the real window;
 * whenever it closes, its map must be the truth, page by page, and so must that of each forked child.
 *
 * usage: window_model FIRST_SEED SEEDS THREADS CALLS BLOCKS FORKS% [trace]; prints what was wrong; status 1 if anything was. */
#define _GNU_SOURCE
#include "window_model.h"

#include "one_backing.h"

#include "pager/apply.h"
#include "pager/callers.h"
#include "pager/proc.h"
#include "pager/space.h"
#include "pager/uffd.h"
#include <sys/eventfd.h>

static struct space space;
static bool wrong;
static int listing; /* /proc/PID/task */

/* -- what the window asks of the kernel and of the pager --------------------------------------------------------------- */

void log_line(const char *format, ...) {
	fprintf(stderr, "%s\n", format);
}

void space_kill(struct space *space, const char *why) {
	(void)space;
	printf("seed %llu: killed: %s\n", (unsigned long long)seed, why);
	wrong = true;
}

struct origin space_origin(struct space *asked, uint64_t at) {
	int page = (int)((at - BASE) / LR_PAGE);
	if (asked != &space || at < BASE || page >= PAGES || now.pages[page].kind != REGISTERED)
		return (struct origin){0};
	return (struct origin){true, LR_BACKING_TEMPLATE, address(now.pages[page].image)};
}

bool space_mapped(struct space *asked, uint64_t start, uint64_t end, struct interval *piece) {
	if (asked != &space)
		return false;
	end = end < address(PAGES) ? end : address(PAGES);
	for (uint64_t at = start; at < end; at += LR_PAGE) {
		int page = (int)((at - BASE) / LR_PAGE), n = 1;
		if (now.pages[page].kind != REGISTERED)
			continue;
		while (page + n < PAGES && is_one_vma(now.pages, page, n + 1))
			n++;
		*piece = (struct interval){.start = at, .end = at + (uint64_t)n * LR_PAGE, .image = address(now.pages[page].image)};
		return true;
	}
	return false;
}

static const struct memory *memory_of(int uffd) {
	return uffd == space.uffd ? &now : &forks[uffd - 1000];
}

enum probe uffd_probe(int uffd, uint64_t start, uint64_t end) {
	const struct memory *memory = memory_of(uffd);
	int at = (int)((start - BASE) / LR_PAGE), n = (int)((end - start) / LR_PAGE);
	if (memory == &now && changing)
		return PROBE_BUSY;
	if (start < BASE || end > address(PAGES))
		return PROBE_NOT_ONE;
	return is_one_vma(memory->pages, at, n) ? PROBE_REGISTERED : PROBE_NOT_ONE;
}

bool uffd_changing(int uffd) {
	(void)uffd;
	return changing;
}

bool proc_one_thread(struct space *space) {
	(void)space;
	return false;
}

/* Where the mapping begins is all that is asked for. */
bool proc_place_quickly(struct space *asked, uint64_t at, struct proc_place *place) {
	int page = (int)((at - BASE) / LR_PAGE), first = page;
	if (asked != &space || at < BASE || page >= PAGES || now.pages[page].kind != REGISTERED)
		return false;
	while (first > 0 && is_one_vma(now.pages, first - 1, page - first + 2))
		first--;
	place->start = address(first);
	return true;
}

void proc_tasks_init(struct proc_tasks *tasks, struct space *space) {
	(void)tasks, (void)space;
	listing = 0;
}

bool proc_next_task(struct proc_tasks *tasks, struct proc_task *task) {
	(void)tasks;
	if (listing == n_threads)
		return false;
	const struct thread *thread = &threads[listing++];
	*task = (struct proc_task){.thread = listing, .call = -1};
	switch (thread->phase) {
	case IDLE: /* does something else, or waits for something */
		task->runs = below(4);
		break;
	case CHANGED:
	case WOKEN:
		task->runs = true;
		break;
	case SLEEPS:
		if (!below(10)) {
			task->runs = true; /* another's event was read */
			break;
		}
		/* fall through */
	case WAITS:
		task->call = thread->call;
		memcpy(task->arguments, thread->arguments, sizeof task->arguments);
	}
	return true;
}

/* -- the truth --------------------------------------------------------------------------------------------------------- */

static void check_page(const char *whose, const struct interval_map *map, const struct memory *memory, int page) {
	const struct page *truth = &memory->pages[page];
	struct interval found;
	bool content = interval_map_find(map, address(page), &found) && !(found.flags & INTERVAL_ZERO);
	int image = content ? (int)((found.image + (address(page) - found.start) - BASE) / LR_PAGE) : 0;
	bool expected = truth->kind == REGISTERED && truth->content;
	if (content == expected && (!content || image == truth->image))
		return;
	printf("seed %llu: %s: page %d: ", (unsigned long long)seed, whose, page);
	printf(content ? "has %d" : "has zeros", image);
	printf(expected ? ", not %d\n" : ", not zeros or nothing (%d)\n", truth->image);
	wrong = true;
}

struct lr_error space_start(struct space *child) {
	const struct memory *memory = memory_of(child->uffd);
	CHECK(window_close(child) == WINDOW_CLOSED);
	for (int i = 0; i < memory->n_own; i++)
		for (int page = memory->own[i].at; page < memory->own[i].at + memory->own[i].n; page++)
			check_page("child", &child->map, memory, page);
	interval_map_deinit(&child->map);
	window_deinit(&child->window);
	free(child);
	return LR_OK;
}

/* -- the pager's side -------------------------------------------------------------------------------------------------- */

static void read_one(void) {
	struct message message = queue[0];
	space.window.remap_ns = now_ns(); /* however slow this machine is */
	if (callers_look(&space) == LOOKED_IN_VAIN)
		return;
	window_look(&space);
	memmove(queue, queue + 1, (size_t)--n_queued * sizeof *queue);
	threads[message.thread].phase = WOKEN;
	uint64_t start = address(message.start), end = address(message.end);
	switch (message.kind) {
	case UFFD_EVENT_UNMAP:
		CHECK(!window_unmap(&space, start, end));
		break;
	case UFFD_EVENT_REMAP:
		CHECK(!window_remap(&space, start, address(message.to), end - start, true));
		break;
	case UFFD_EVENT_REMOVE:
		CHECK(!window_remove(&space, start, end));
		break;
	case UFFD_EVENT_FORK: {
		struct space *child = calloc(1, sizeof *child);
		CHECK(child);
		interval_map_init(&child->map);
		window_init(&child->window);
		child->uffd = 1000 + message.fork;
		child->pidfd = child->maps = child->task = -1;
		CHECK(!window_fork(&space, child));
	}
	}
	int by = space.window.n_events ? space.window.events[space.window.n_events - 1].by : 0;
	TRACE("   read %s %d+%d to %d of %d, taken for %d\n",
	      message.kind == UFFD_EVENT_UNMAP ? "UNMAP" : message.kind == UFFD_EVENT_REMAP ? "REMAP" : message.kind == UFFD_EVENT_REMOVE ? "REMOVE" : "FORK",
	      message.start, message.end - message.start, message.to, message.thread + 1, by);
}

static void close_window(void) {
	if (!space.window.open || window_close(&space) != WINDOW_CLOSED)
		return;
	TRACE("-- closed\n");
	for (int page = 0; page < PAGES; page++)
		check_page("parent", &space.map, &now, page);
}

/* Nobody will call any more. */
static bool is_quiet(void) {
	for (int i = 0; i < n_threads; i++)
		if (threads[i].phase != IDLE || threads[i].calls_left)
			return false;
	return true;
}

static void play(int calls, int blocks) {
	state = seed * 0x9E3779B97F4A7C15ull + 88172645463325252ull;
	state = state ? state : 1;
	below(2);
	memset(&now, 0, sizeof now);
	memset(threads, 0, sizeof threads);
	n_forks = changing = n_queued = 0;
	wrong = false;
	int at = PAGES - below(3), gaps = below(3);
	for (int i = 0; i < n_threads * blocks; i++) {
		int n = 1 + below(BLOCK_PAGES);
		at -= n + (gaps ? below(gaps + 1) : 0);
		add(&threads[i % n_threads], at, n);
		for (int page = at; page < at + n; page++)
			now.pages[page] = (struct page){REGISTERED, true, page};
		CHECK(!interval_map_insert(&space.map, (struct interval){.start = address(at), .end = address(at + n), .image = address(at)}));
		TRACE("block of %d: %d+%d\n", i % n_threads + 1, at, n);
	}
	for (int i = 0; i < n_threads; i++)
		threads[i].calls_left = calls;
	int eager = 1 + below(4), patience = seed % 8 ? 1 : 1000;
	while (!(is_quiet() && !space.window.open) && !wrong) {
		if (below(n_threads + eager) < n_threads) {
			step(&threads[below(n_threads)]);
		} else if (n_queued) {
			read_one();
		} else if (is_quiet() || !below(patience)) {
			close_window();
		}
	}
	window_deinit(&space.window);
	window_init(&space.window);
	interval_map_deinit(&space.map);
	interval_map_init(&space.map);
}

int main(int argc, char **argv) {
	int failed = 0;
	CHECK(argc >= 7);
	int n = atoi(argv[2]);
	n_threads = atoi(argv[3]);
	fork_percent = atoi(argv[6]);
	traces = argc > 7;
	CHECK(n_threads <= MAX_THREADS && n_threads * atoi(argv[5]) * (BLOCK_PAGES + 2) < PAGES / 2);
	space.uffd = eventfd(1, 0); /* is always readable */
	space.pid = 1;
	interval_map_init(&space.map);
	window_init(&space.window);
	for (seed = strtoull(argv[1], NULL, 0); n--; seed++) {
		play(atoi(argv[4]), atoi(argv[5]));
		failed += wrong;
	}
	printf("%d failed\n", failed);
	return failed != 0;
}
