#include "scene.h"

#include "array.h"
#include "pieces.h"
#include "space.h"
#include <errno.h>

enum { PER_REPLAY = 10, PUT_SHIFT = 8, NUMBER_MASK = 0xfff };

/* -- the scene --------------------------------------------------------------------------------------------------------- */

static int add_scene(struct history *history, struct range range) {
	struct interval piece;
	int error = 0;
	if (range.start >= range.end)
		return 0;
	if (interval_map_before(&history->space->map, range.start, &piece))
		error = interval_map_insert(&history->scene, piece);
	for (uint64_t at = range.start;
	     !error && interval_map_next(&history->space->map, at, &piece) && piece.start < range.end; at = piece.end)
		error = interval_map_insert(&history->scene, piece);
	return error;
}

int scene_set(struct history *history) {
	int error = 0;
	for (uint32_t i = 0; !error && i < history->n; i++) {
		const struct event *event = &history->events[i];
		if (event->kind != UFFD_EVENT_FORK)
			error = add_scene(history, (struct range){event->start, event->end});
		if (!error)
			error = add_scene(history, destination(event));
	}
	return error;
}

static int ask(struct space *space, struct range range, struct interval_map *truth) {
	struct interval piece;
	int error = 0;
	if (range.start >= range.end)
		return 0;
	for (uint64_t at = range.start; !error && space_mapped(space, at, range.end, &piece); at = piece.end)
		error = interval_map_insert(truth, piece);
	if (!error && space_mapped(space, range.end, range.end + 1, &piece))
		error = interval_map_insert(truth, piece);
	return error;
}

int scene_ask(struct space *space, const struct event *events, uint32_t n, struct interval_map *truth) {
	int error = 0;
	for (uint32_t i = 0; !error && i < n; i++) {
		if (events[i].kind != UFFD_EVENT_FORK)
			error = ask(space, (struct range){events[i].start, events[i].end}, truth);
		if (!error)
			error = ask(space, destination(&events[i]), truth);
	}
	return error;
}

/* -- a replay ---------------------------------------------------------------------------------------------------------- */

static int add_anchor(struct history *history, struct interval last) {
	struct interval next;
	uint64_t limit = interval_map_next(&history->now, last.end, &next) ? next.start : LR_ADDRESS_END;
	if (limit == last.end)
		return 0;
	struct anchor *anchors =
		array_room(history->anchors, history->n_anchors, &history->anchors_capacity, sizeof *anchors);
	if (!anchors)
		return ENOMEM;
	history->anchors = anchors;
	anchors[history->n_anchors++] = (struct anchor){last.end, last.image + (last.end - last.start), last.backing, limit};
	return 0;
}

/* What may have grown at `address`, which is free: from the piece before it, or from one that was cut off since. If `origin` is known, it must
 * be that. */
static bool may_have_grown(struct history *history, uint64_t address, struct origin origin, struct interval *from) {
	struct interval before;
	if (interval_map_before(&history->now, address, &before)) {
		struct origin there = {true, before.backing, before.image + (address - before.start)};
		if (!origin.known || (there.backing == origin.backing && there.image == origin.image)) {
			*from = before;
			return true;
		}
	}
	for (uint32_t i = history->n_anchors; i--;) {
		const struct anchor *anchor = &history->anchors[i];
		if (anchor->at > address || anchor->limit <= address ||
		    (origin.known && (anchor->backing != origin.backing || anchor->image + (address - anchor->at) != origin.image)))
			continue;
		*from = (struct interval){.start = anchor->at, .end = anchor->at, .image = anchor->image, .backing = anchor->backing};
		return true;
	}
	return false;
}

/* What must be assumed so that there is something at `address`, which is free; the cost of that. `from` and `origin` as in may_have_grown(). */
static uint32_t assume(struct history *history, uint64_t address, struct origin origin, struct interval *from) {
	if (may_have_grown(history, address, origin, from))
		return from->end > from->start ? GROWTH : OLD_GROWTH;
	*from = (struct interval){.start = address, .end = address, .image = origin.image, .backing = origin.backing};
	return UNKNOWN;
}

/* A piece that goes on from `from` over [start, end). */
static struct interval continued(struct interval from, uint64_t start, uint64_t end) {
	return (struct interval){.start = start,
				 .end = end,
				 .image = from.image + (start - from.start),
				 .backing = from.backing,
				 .flags = from.backing < LR_BACKING_SHARED ? INTERVAL_ZERO : 0};
}

/* Has whoever put this there not yet returned when `event` was read, so that nobody else could have used it? */
static bool is_too_new(const struct history *history, struct interval piece, const struct event *event) {
	uint32_t put = piece.flags >> PUT_SHIFT & NUMBER_MASK;
	return put && history->events[put - 1].done >= history->begun[event - history->events];
}

static int replay_unmap(struct history *history, const struct event *event, struct outcome *outcome) {
	struct interval piece, from, last = {0};
	int error = 0;
	outcome->wrong[0] = (struct range){event->start, event->end};
	for (uint64_t at = event->start; piece_next(&history->now, at, event->end, &piece); at = piece.end) {
		if (is_too_new(history, piece, event))
			return 0;
		outcome->cost += piece.start > at ? GAP : 0;
		last = piece;
	}
	outcome->cost += last.end && last.end < event->end ? GAP : 0;
	if (!last.end) {
		outcome->cost += assume(history, event->start, (struct origin){0}, &from);
		if (from.end > from.start && from.end < event->start)
			error = interval_map_insert(&history->now, continued(from, from.end, event->start));
		last = continued(from, event->start, event->end);
	}
	outcome->possible = true;
	if (!error)
		error = interval_map_erase(&history->now, event->start, event->end);
	return error ? error : add_anchor(history, continued(last, event->start, event->end));
}

/* Leaves in the range of an event what `before` holds there, empty. */
static int leave_zeros(struct history *history, const struct interval_map *before, const struct event *event) {
	struct interval piece;
	int error = 0;
	for (uint64_t at = event->start; !error && piece_next(before, at, event->end, &piece); at = piece.end)
		error = interval_map_insert(&history->now, continued(piece, piece.start, piece.end));
	return error;
}

static int replay_remove(struct history *history, const struct event *event, struct outcome *outcome) {
	struct interval piece;
	for (uint64_t at = event->start; piece_next(&history->now, at, event->end, &piece); at = piece.end)
		if (is_too_new(history, piece, event))
			return 0;
	outcome->possible = true;
	return leave_zeros(history, &history->now, event);
}

static int replay_move(struct history *history, uint32_t number, struct outcome *outcome) {
	const struct event *event = &history->events[number];
	__attribute__((cleanup(interval_map_deinit))) struct interval_map moved;
	struct origin origin = event->slept ? event->shown : (struct origin){0};
	uint64_t distance = event->to - event->start, end = event->to + (event->end - event->start);
	struct interval piece, from;
	int error = 0;
	interval_map_init(&moved);
	outcome->wrong[0] = (struct range){event->start, event->end};
	outcome->wrong[1] = (struct range){event->to, end};
	for (uint64_t at = event->start; !error && at < event->end; at = piece.end) {
		if (!piece_next(&history->now, at, event->end, &piece))
			piece.start = piece.end = event->end;
		if (piece.start > at) { /* a gap */
			struct origin here = origin;
			here.image += at - event->start;
			outcome->cost += assume(history, at, here, &from);
			if (!origin.known && from.start == at && from.end == at)
				return 0; /* nothing is known of it */
			error = interval_map_insert(&moved, continued(from, at, piece.start));
			if (!origin.known)
				origin = (struct origin){true, from.backing, from.image + (event->start - from.start)};
			if (!error && from.end > from.start && from.end < at && at == event->start)
				error = interval_map_insert(&history->now, continued(from, from.end, at));
		}
		if (error || piece.start == piece.end)
			continue;
		if (!belongs(piece, event->start, origin) || is_too_new(history, piece, event))
			return 0;
		if (!origin.known)
			origin = (struct origin){true, piece.backing, piece.image - (piece.start - event->start)};
		error = interval_map_insert(&moved, piece);
	}
	if (error)
		return error;
	if (event_unmaps(event)) {
		error = interval_map_erase(&history->now, event->start, event->end);
		if (!error)
			error = add_anchor(history, (struct interval){.start = event->start, .end = event->end, .image = origin.image, .backing = origin.backing});
	} else {
		error = leave_zeros(history, &moved, event);
	}
	if (error)
		return error;
	if (piece_next(&history->now, event->to, end, &piece))
		return 0; /* somebody must have taken that away before */
	outcome->possible = true;
	for (uint64_t at = event->start; !error && piece_next(&moved, at, event->end, &piece); at = piece.end) {
		struct interval put = piece;
		put.start += distance;
		put.end += distance;
		put.flags = (piece.flags & INTERVAL_ZERO) | (number + 1) << PUT_SHIFT;
		error = interval_map_insert(&history->now, put);
	}
	return error;
}

static int replay_event(struct history *history, uint32_t number, struct outcome *outcome) {
	const struct event *event = &history->events[number];
	int error = 0;
	for (uint32_t i = 0; is_move(event) && i < history->n; i++)
		if (history->host[i] == number && i != number) {
			outcome->possible = false;
			outcome->wrong[1] = (struct range){0, 0};
			error = replay_unmap(history, &history->events[i], outcome);
			if (error || !outcome->possible)
				return error;
		}
	outcome->possible = false;
	outcome->wrong[1] = (struct range){0, 0};
	if (event->start == event->end) { /* a FORK, or shared memory that is mapped twice */
		outcome->possible = true;
		return 0;
	}
	switch (event->kind) {
	case UFFD_EVENT_UNMAP:
		return replay_unmap(history, event, outcome);
	case UFFD_EVENT_REMAP:
		return replay_move(history, number, outcome);
	default:
		return replay_remove(history, event, outcome);
	}
}

/* Is what the replay left in a range what the kernel shows? */
static bool ends_right(struct history *history, struct range range, struct outcome *outcome) {
	struct interval piece, shown, from;
	for (uint64_t at = range.start; piece_next(&history->now, at, range.end, &piece); at = piece.end) {
		outcome->wrong[0] = (struct range){piece.start, piece.end};
		for (uint64_t part = piece.start; part < piece.end; part = shown.end)
			if (!piece_next(history->truth, part, piece.end, &shown) || shown.start != part ||
			    shown.backing != piece.backing || shown.image - shown.start != piece.image - piece.start)
				return false;
	}
	for (uint64_t at = range.start; piece_next(history->truth, at, range.end, &shown); at = shown.end) {
		if (piece_next(&history->now, shown.start, shown.end, &piece)) {
			if (piece.start == shown.start) {
				shown.end = piece.end;
				continue;
			}
			shown.end = piece.start;
		}
		outcome->wrong[0] = (struct range){shown.start, shown.end};
		if (shown.backing >= LR_BACKING_SHARED)
			continue;
		outcome->cost += assume(history, shown.start, (struct origin){true, shown.backing, shown.image}, &from);
		outcome->error = interval_map_insert(&history->now, continued(from, shown.start, shown.end));
		if (outcome->error)
			return false;
	}
	return true;
}

struct outcome scene_replay(struct history *history, const uint32_t *order) {
	struct outcome outcome = {0};
	uint32_t cost = PER_REPLAY + history->scene.count / 8 + history->n_calls;
	history->budget -= cost < history->budget ? cost : history->budget;
	history->n_anchors = 0;
	interval_map_deinit(&history->now);
	interval_map_init(&history->now);
	outcome.error = interval_map_copy(&history->scene, &history->now);
	for (; !outcome.error && outcome.position < history->n_calls; outcome.position++) {
		outcome.error = replay_event(history, order[outcome.position], &outcome);
		if (!outcome.possible)
			return outcome;
	}
	outcome.wrong[1] = (struct range){0, 0};
	for (uint32_t i = 0; !outcome.error && i < history->n; i++) {
		const struct event *event = &history->events[i];
		outcome.possible = (event->kind == UFFD_EVENT_FORK || ends_right(history, (struct range){event->start, event->end}, &outcome)) &&
				   ends_right(history, destination(event), &outcome);
		if (!outcome.possible)
			return outcome;
	}
	return outcome;
}
