#define _GNU_SOURCE
#include "callers.h"

#include "apply.h"
#include "array.h"
#include "proc.h"
#include "space.h"
#include "uffd.h"
#include <linux/userfaultfd.h>
#include <poll.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>

static uint64_t pages(uint64_t bytes) {
	return (bytes + LR_PAGE - 1) / LR_PAGE * LR_PAGE;
}

/* -- looking ----------------------------------------------------------------------------------------------------------- */

static bool changes_mappings(long call) {
	return call == SYS_munmap || call == SYS_mremap || call == SYS_mmap || call == SYS_brk || call == SYS_shmdt ||
	       call == SYS_madvise;
}

static void add(struct window *window, struct call call) {
	struct call *calls = array_room(window->calls, window->n_calls, &window->calls_capacity, sizeof call);
	if (!calls)
		return; /* one that stays unknown */
	window->calls = calls;
	window->calls[window->n_calls++] = call;
}

/* A thread that seems to run: is it still in the call in which it was seen, one of the first `n`? */
static void add_running(struct window *window, uint32_t n, int32_t thread) {
	for (uint32_t i = 0; i < n; i++)
		if (window->calls[i].task.thread == thread && window->calls[i].task.call >= 0) {
			add(window, window->calls[i]);
			window->running = -1; /* or in its next one: if its last event was taken for another's */
			return;
		}
	window->running = window->running ? -1 : thread;
}

static void look_at_all(struct space *space) {
	struct window *window = &space->window;
	uint32_t n = window->n_calls;
	struct proc_tasks tasks;
	struct call call = {0};
	window->running = 0;
	for (proc_tasks_init(&tasks, space); proc_next_task(&tasks, &call.task);) {
		if (call.task.runs) {
			add_running(window, n, call.task.thread);
		} else if (changes_mappings(call.task.call)) {
			bool leaves = call.task.call == SYS_mremap && call.task.arguments[3] & MREMAP_DONTUNMAP;
			call.left = leaves ? space_origin(space, call.task.arguments[0]) : (struct origin){0};
			add(window, call);
		}
	}
	window->n_calls -= n;
	if (n)
		memmove(window->calls, window->calls + n, window->n_calls * sizeof call);
}

enum look callers_look(struct space *space) {
	enum { AFTER_REMAP_NS = 1000000000 };
	struct window *window = &space->window;
	struct pollfd readable = {.fd = space->uffd, .events = POLLIN};
	if (!window->remap_ns || now_ns() - window->remap_ns > AFTER_REMAP_NS) {
		callers_forget(window);
		return LOOK_NOT_NEEDED;
	}
	if (poll(&readable, 1, 0) <= 0)
		return LOOKED_IN_VAIN;
	if (uffd_changing(space->uffd))
		look_at_all(space); /* else it is a fault, which is read before any event that is queued now */
	return LOOKED;
}

void callers_forget(struct window *window) {
	window->n_calls = 0;
	window->running = 0;
}

/* -- matching ---------------------------------------------------------------------------------------------------------- */

static int32_t only_running(const struct window *window) {
	return window->running > 0 ? window->running : 0;
}

/* Was the REMAP of this call read, and not yet the UNMAP of its source? */
static bool has_moved(const struct window *window, const struct proc_task *task) {
	for (uint32_t i = window->n_events; i--;) {
		const struct event *event = &window->events[i];
		if (event->kind == UFFD_EVENT_REMAP && event->start == task->arguments[0] && !event->slept && !differ(event->by, task->thread))
			return true;
	}
	return false;
}

/* How well an UNMAP fits a call: 0, not at all; 2, it is what the call is for; 1, it is in its way. */
static int fit(const struct window *window, const struct proc_task *task, uint64_t start, uint64_t end) {
	const uint64_t *with = task->arguments;
	uint64_t first = with[0], old = first + pages(with[1]), new = first + pages(with[2]);
	switch (task->call) {
	case SYS_munmap:
		return start == first && end == old ? 2 : 0;
	case SYS_shmdt:
	case SYS_brk:
		return start == pages(first) ? 2 : 0;
	case SYS_mmap:
		return with[3] & MAP_FIXED && start == first && end == old;
	case SYS_mremap:
		if (start == new && end == old) /* the end of what shrinks */
			return 2;
		if (has_moved(window, task))
			return start == first && end <= old ? 2 : 0;
		return with[3] & MREMAP_FIXED && start == with[4] && end == with[4] + pages(with[2]);
	default:
		return 0;
	}
}

/* The one call that is under way, where no other thread runs; else NULL. */
static const struct proc_task *only_call(const struct window *window) {
	return window->n_calls == 1 && !window->running ? &window->calls[0].task : NULL;
}

bool callers_last(const struct window *window, struct event *last) {
	const struct proc_task *task = only_call(window);
	if (!task)
		return false;
	const uint64_t *with = task->arguments;
	*last = (struct event){.start = with[0], .end = with[0] + pages(with[1])};
	if (task->call == SYS_madvise && (with[2] == MADV_DONTNEED || with[2] == MADV_DONTNEED_LOCKED)) {
		last->kind = UFFD_EVENT_REMOVE;
		return true;
	}
	if (task->call != SYS_mremap)
		return false;
	if (with[3] & MREMAP_DONTUNMAP) {
		last->kind = UFFD_EVENT_REMAP;
		last->to = with[4];
		return with[3] & MREMAP_FIXED;
	}
	last->kind = UFFD_EVENT_UNMAP;
	return with[1] && has_moved(window, task);
}

bool callers_still(struct space *space) {
	struct proc_task before = space->window.calls[0].task;
	look_at_all(space);
	const struct proc_task *task = only_call(&space->window);
	return task && task->thread == before.thread && task->call == before.call &&
	       !memcmp(task->arguments, before.arguments, sizeof before.arguments);
}

int32_t callers_of_unmap(struct window *window, uint64_t start, uint64_t end, bool *moves) {
	struct proc_task *found = NULL;
	int best = 0;
	*moves = true;
	for (uint32_t i = 0; i < window->n_calls; i++) {
		int fits = fit(window, &window->calls[i].task, start, end);
		if (fits && fits == best)
			found = NULL; /* of two that fit, it may be either */
		if (fits <= best)
			continue;
		best = fits;
		found = &window->calls[i].task;
	}
	if (!best)
		return only_running(window);
	if (!found)
		return 0;
	*moves = found->call == SYS_mremap && start == found->arguments[0];
	if (found->call != SYS_mremap || *moves)
		found->call = -1; /* this was its last event */
	return found->thread;
}

int32_t callers_of_remove(struct window *window, uint64_t start) {
	for (uint32_t i = 0; i < window->n_calls; i++) {
		struct proc_task *task = &window->calls[i].task;
		if (task->call != SYS_madvise || task->arguments[0] > start || start - task->arguments[0] >= pages(task->arguments[1]))
			continue;
		if (task->arguments[0] == start)
			task->call = -1; /* but for a range of several mappings, of which each has an event: those stay unknown */
		return task->thread;
	}
	return only_running(window);
}

int32_t callers_of_remap(struct window *window, uint64_t from, uint64_t to, struct origin *left, bool *unmaps) {
	struct call *found = NULL;
	*left = (struct origin){0};
	*unmaps = false;
	for (uint32_t i = 0; i < window->n_calls; i++) {
		struct call *call = &window->calls[i];
		const uint64_t *with = call->task.arguments;
		if (call->task.call != SYS_mremap || with[0] != from || (with[3] & MREMAP_FIXED && with[4] != to))
			continue;
		if (found)
			return 0;
		found = call;
	}
	if (!found)
		return only_running(window);
	*left = found->left;
	*unmaps = !(found->task.arguments[3] & MREMAP_DONTUNMAP);
	if (!*unmaps)
		found->task.call = -1; /* this was its last event */
	return found->task.thread;
}
