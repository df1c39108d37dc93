#include "window.h"

#include "apply.h"
#include "array.h"
#include "callers.h"
#include "history.h"
#include "pieces.h"
#include "proc.h"
#include "scene.h"
#include "space.h"
#include "uffd.h"
#include <errno.h>
#include <linux/userfaultfd.h>
#include <string.h>

enum { LONG = 12 /* events: a window in which looking at what the kernel shows is worth while */ };

void window_init(struct window *window) {
	*window = (struct window){.next_look = LONG};
	interval_map_init(&window->shown);
}

static void forget_shown(struct window *window) {
	interval_map_deinit(&window->shown);
	interval_map_init(&window->shown);
	window->last = false;
}

static void forget(struct window *window) {
	window->n_events = window->n_read = window->n_moves = window->n_displaced = 0;
	window->open = window->changed = window->forked = false;
	window->attempts = 0;
	window->next_look = LONG;
	forget_shown(window);
	callers_forget(window);
}

void window_deinit(struct window *window) {
	forget(window);
	free(window->events);
	free(window->moves);
	free(window->displaced);
	free(window->calls);
}

/* -- events ------------------------------------------------------------------------------------------------------------ */

/* One was read: opens the window, unless its caller, who was asleep until then, is all there is: it leaves nothing to be settled. */
static struct window *on_event(struct space *space) {
	struct window *window = &space->window;
	window->in_order = (window->in_order || !window->open) && proc_one_thread(space);
	window->open = window->open || !window->in_order;
	return window;
}

static int settle_early(struct space *space);

/* Was this event expected as the last one? */
static bool is_last(const struct window *window, const struct event *event) {
	if (!window->last)
		return false;
	const struct event *last = &window->events[window->n_events];
	return event->kind == last->kind && event->start == last->start && event->end == last->end && event->to == last->to;
}

/* In order, the map follows at once; else it waits until all that belongs to the event was read. */
static int take(struct space *space, struct event event) {
	struct window *window = &space->window;
	if (window->in_order || !window->open)
		return apply_event(space, &event);
	event.number = event.done = ++window->n_read;
	struct event *events = array_room(window->events, window->n_events, &window->events_capacity, sizeof event);
	if (!events)
		return ENOMEM;
	window->events = events;
	bool last = is_last(window, &event);
	window->events[window->n_events++] = event;
	return last ? settle_early(space) : 0;
}

/* The REMAP, if any, that tells of the same move as this UNMAP: of the same thread, else one of which it is sure to come, else the last. */
static struct event *find_move(struct window *window, uint64_t start, uint64_t end, int32_t by) {
	struct event *found = NULL;
	for (uint32_t i = window->n_events; i--;) {
		struct event *event = &window->events[i];
		if (event->kind != UFFD_EVENT_REMAP || event->start != start || event->end != end || event->slept || differ(event->by, by))
			continue;
		if (same(event->by, by))
			return event;
		if (!found || (event->unmaps && !found->unmaps))
			found = event;
	}
	return found;
}

/* Was the unmapping undone? Facts (mm/vma.c, Linux 6.12 to 6.18; tried): mmap(MAP_FIXED) that is refused, by RLIMIT_AS, RLIMIT_DATA or
 * overcommit, puts back what it had unmapped, but tells of it. The VMA at the range's start stays cut there, where one that grew over
 * what was unmapped goes on. Of several threads, one may also have moved there what once was there (MREMAP_DONTUNMAP, and back): not where nothing
 * was moved yet. And while installs are refused the caller has done nothing since. */
static bool is_undone(struct space *space, uint64_t start, uint64_t end) {
	struct interval piece = {.end = start};
	struct proc_place place;
	do
		if (!piece_next(&space->map, piece.end, end, &piece))
			return false; /* nothing to lose: what no interval holds is zero, or its file */
	while (piece.flags & INTERVAL_ZERO || piece.backing >= LR_BACKING_SHARED);
	if (!proc_place_quickly(space, piece.start, &place) || place.start < start || place.start > piece.start)
		return false;
	struct origin origin = space_origin(space, piece.start);
	return origin.known && belongs(piece, piece.start, origin) &&
	       (space->window.in_order || (!space->window.moved && uffd_changing(space->uffd)));
}

int window_unmap(struct space *space, uint64_t start, uint64_t end) {
	struct window *window = on_event(space);
	bool moves;
	int32_t by = callers_of_unmap(window, start, end, &moves);
	if (is_undone(space, start, end))
		return 0;
	struct event *move = moves ? find_move(window, start, end, by) : NULL;
	if (!move)
		return take(space, (struct event){.kind = UFFD_EVENT_UNMAP, .start = start, .end = end, .by = by});
	move->done = ++window->n_read; /* that is all it tells, but who made it */
	move->slept = true;
	move->by = move->by ? move->by : by;
	return is_last(window, &(struct event){.kind = UFFD_EVENT_UNMAP, .start = start, .end = end}) ? settle_early(space) : 0;
}

int window_remove(struct space *space, uint64_t start, uint64_t end) {
	int32_t by = callers_of_remove(&space->window, start);
	return take(space, (struct event){.kind = UFFD_EVENT_REMOVE, .start = start, .end = end, .by = by});
}

int window_remap(struct space *space, uint64_t from, uint64_t to, uint64_t length, bool sleeps) {
	struct event event = {.kind = UFFD_EVENT_REMAP, .start = from, .end = from + length, .to = to};
	space->window.moved = true;
	if (on_event(space)->in_order)
		return take(space, event);
	space->window.remap_ns = now_ns();
	event.by = callers_of_remap(&space->window, from, to, &event.shown, &event.unmaps);
	event.slept = event.shown.known;
	if (!event.slept && sleeps)
		event.shown = space_origin(space, to);
	return take(space, event);
}

int window_fork(struct space *space, struct space *child) {
	struct window *window = on_event(space);
	window->open = window->forked = true; /* until its caller is awake, nothing can be installed for the child */
	return take(space, (struct event){.kind = UFFD_EVENT_FORK, .child = child});
}

/* -- the end of a window ----------------------------------------------------------------------------------------------- */

/* Is what the map says of a suspect what is there, as far as the kernel can tell? A neighbour may have grown over it. */
static bool is_there(struct space *space, uint64_t address) {
	struct interval piece;
	struct origin origin = space_origin(space, address);
	return !interval_map_find(&space->map, address, &piece) || belongs(piece, address, origin);
}

/* Clears the suspicion from the parts of [start, end), one interval, that are registered, erases the rest. */
static enum closing settle(struct space *space, uint64_t start, uint64_t end, uint64_t page) {
	int error = 0;
	bool there = is_there(space, start); /* still true after a probe that is not busy: nothing has moved in between */
	switch (uffd_probe(space->uffd, start, end)) {
	case PROBE_REGISTERED:
		error = there ? piece_flag(&space->map, start, end, INTERVAL_SUSPECT, 0) : interval_map_erase(&space->map, start, end);
		break;
	case PROBE_BUSY:
		return WINDOW_OPEN;
	case PROBE_GONE:
		return WINDOW_GONE;
	case PROBE_NOT_ONE:
		if (end - start > page) {
			uint64_t middle = start + (end - start) / 2 / page * page;
			enum closing lower = settle(space, start, middle, page);
			return lower == WINDOW_CLOSED ? settle(space, middle, end, page) : lower;
		}
		error = interval_map_erase(&space->map, start, end);
	}
	if (error) {
		space_kill(space, strerror(error));
		return WINDOW_GONE;
	}
	return WINDOW_CLOSED;
}

static enum closing settle_all(struct space *space) {
	struct interval piece;
	for (uint64_t at = 0; interval_map_flagged(&space->map, at, INTERVAL_SUSPECT, &piece); at = piece.end) {
		enum closing result = settle(space, piece.start, piece.end, space_backing(space, piece.backing)->page);
		if (result != WINDOW_CLOSED)
			return result;
	}
	return WINDOW_CLOSED;
}

static void give_birth(struct space *parent) {
	while (parent->window.unborn) {
		struct space *child = parent->window.unborn;
		parent->window.unborn = child->next;
		child->next = NULL;
		child->window.open = true; /* there may be suspects */
		child->window.moved = parent->window.moved;
		struct lr_error error = space_start(child);
		if (error.code)
			space_orphan(parent, child, error);
	}
}

/* 0 or ENOMEM: then children whose turn has not come cannot be served. */
static int apply_all(struct space *space) {
	struct window *window = &space->window;
	int error = 0;
	for (uint32_t i = 0; i < window->n_events; i++) {
		const struct event *event = &window->events[i];
		error = error ? error : apply_event(space, event);
		if (error && event->kind == UFFD_EVENT_FORK)
			space_orphan(space, event->child, lr_fail("interval map", error, 0));
	}
	window->n_events = 0;
	return error;
}

/* The window's events, in the order in which they stand: all of their calls are over, and `shown` is what the kernel showed then. 0 or ENOMEM. */
static int settle_calls(struct space *space, const struct interval_map *shown) {
	struct window *window = &space->window;
	uint32_t n = window->n_events;
	int error = apply_all(space);
	if (!error && window->ordered)
		error = history_record_grown(space, window->events, n, shown);
	window->ordered = false;
	window->n_displaced = 0; /* whatever took it away has been told */
	return error;
}

void window_look(struct space *space) {
	struct window *window = &space->window;
	struct event last;
	forget_shown(window);
	if (window->n_events < window->next_look || window->in_order || window->forked || !callers_last(window, &last))
		return;
	struct event *events = array_room(window->events, window->n_events, &window->events_capacity, sizeof last);
	if (!events)
		return;
	window->events = events;
	window->events[window->n_events] = last;
	window->next_look = window->n_events + window->n_events / 2;
	window->last = !scene_ask(space, window->events, window->n_events + 1, &window->shown) && callers_still(space);
}

/* The last event of the only call under way was just read: if the order is found, what was read is applied, though another call may
 * have begun. 0 or ENOMEM. */
static int settle_early(struct space *space) {
	struct window *window = &space->window;
	int error;
	history_find_of(space, window->events, window->n_events, &window->shown, &window->ordered, &error);
	if (!window->ordered || error)
		return error;
	error = settle_calls(space, &window->shown);
	window->n_moves = window->attempts = 0;
	window->changed = false;
	window->next_look = LONG;
	return error;
}

void window_abandon(struct space *space) {
	apply_all(space);
	apply_unread(space);
	give_birth(space);
}

enum closing window_close(struct space *space) {
	enum { MAX_ATTEMPTS = 20 }; /* then its events are applied as they came */
	if (!space->window.open)
		return WINDOW_CLOSED;
	enum probe quiet = uffd_probe(space->uffd, NOWHERE, NOWHERE + LR_PAGE);
	if (quiet == PROBE_BUSY || quiet == PROBE_GONE)
		return quiet == PROBE_BUSY ? WINDOW_OPEN : WINDOW_GONE;
	struct window *window = &space->window;
	__attribute__((cleanup(interval_map_deinit))) struct interval_map shown;
	interval_map_init(&shown);
	int error = 0;
	if (!window->in_order) {
		quiet = history_find(space, window->events, window->n_events, &shown, &window->ordered, &error);
		if (quiet == PROBE_GONE || (quiet == PROBE_BUSY && ++window->attempts < MAX_ATTEMPTS))
			return quiet == PROBE_GONE ? WINDOW_GONE : WINDOW_OPEN;
	}
	if (!error)
		error = settle_calls(space, &shown);
	if (error) {
		space_kill(space, strerror(error));
		return WINDOW_GONE;
	}
	enum closing result = settle_all(space);
	if (result != WINDOW_CLOSED)
		return result;
	give_birth(space);
	forget(&space->window);
	return WINDOW_CLOSED;
}
