#include "apply.h"

#include "array.h"
#include "pieces.h"
#include "space.h"
#include <errno.h>
#include <linux/userfaultfd.h>

static int add_move(struct window *window, struct move move) {
	struct move *moves = array_room(window->moves, window->n_moves, &window->moves_capacity, sizeof move);
	if (!moves)
		return ENOMEM;
	window->moves = moves;
	window->moves[window->n_moves++] = move;
	return 0;
}

/* What left [start, end) may have left before the children were made of whom was told already. */
static int doubt_children(struct space *space, uint64_t start, uint64_t end) {
	int error = 0;
	for (struct space *child = space->window.unborn; child && !error; child = child->next)
		error = piece_flag(&child->map, start, end, 0, INTERVAL_SUSPECT);
	return error;
}

int apply_unread(struct space *space) {
	return doubt_children(space, 0, LR_ADDRESS_END);
}

/* -- what was displaced ------------------------------------------------------------------------------------------------ */

static int add_displaced(struct window *window, struct displaced one) {
	struct displaced *displaced = array_room(window->displaced, window->n_displaced, &window->displaced_capacity, sizeof one);
	if (!displaced)
		return ENOMEM;
	window->displaced = displaced;
	window->displaced[window->n_displaced++] = one;
	return 0;
}

/* Empties [start, end); what the map holds there may have left before, and is kept. */
static int displace(struct space *space, uint64_t start, uint64_t end, int32_t by, uint64_t unmapped) {
	struct interval piece;
	for (uint64_t at = start; piece_next(&space->map, at, end, &piece); at = piece.end) {
		int error = add_displaced(&space->window, (struct displaced){piece, by, unmapped});
		if (error)
			return error;
	}
	return interval_map_erase(&space->map, start, end);
}

/* Takes [start, end) out of a displaced piece; one of which nothing is left stays, empty. */
static int cut_displaced(struct window *window, uint32_t number, uint64_t start, uint64_t end) {
	struct displaced whole = window->displaced[number];
	struct interval rest[2] = {0};
	unsigned n = 0;
	if (whole.piece.start < start)
		rest[n++] = piece_cut(whole.piece, whole.piece.start, start);
	if (end < whole.piece.end)
		rest[n++] = piece_cut(whole.piece, end, whole.piece.end);
	window->displaced[number].piece = rest[0];
	return n > 1 ? add_displaced(window, (struct displaced){rest[1], whole.by, whole.unmapped}) : 0;
}

bool belongs(struct interval piece, uint64_t from, struct origin origin) {
	return !origin.known ||
	       (piece.backing == origin.backing && piece.image - piece.start == origin.image - from);
}

/* May a call have taken what was displaced? Of what was unmapped, only a REMAP of all of it can tell more: that of a mapping which shrank,
 * grew again and moved, each by another thread, takes along what was not unmapped. */
static bool may_be_older(const struct event *call, const struct displaced *one) {
	if (same(one->by, call->by))
		return false;
	return !one->unmapped || (call->kind == UFFD_EVENT_REMAP && one->unmapped <= call->start);
}

/* Takes what lay in the range of a call before it was displaced: what belongs to `origin`, else what is oldest. */
static int take_displaced(struct window *window, const struct event *call, struct origin origin, struct interval_map *taken) {
	uint32_t n = window->n_displaced;
	int error = 0;
	for (uint32_t i = 0; !error && i < n; i++) {
		struct displaced one = window->displaced[i];
		struct interval piece = one.piece;
		uint64_t start = piece.start > call->start ? piece.start : call->start;
		uint64_t stop = piece.end < call->end ? piece.end : call->end;
		if (start >= stop || !may_be_older(call, &one) || !belongs(piece, call->start, origin))
			continue;
		error = piece_fill_gap(taken, piece_cut(piece, start, stop));
		if (!error)
			error = cut_displaced(window, i, start, stop);
	}
	return error;
}

/* -- UNMAP ------------------------------------------------------------------------------------------------------------- */

/* The longest piece of [at, end) that lies wholly in what a move put there, or wholly outside: then `inside` is NULL. */
static uint64_t moved_piece(const struct window *window, uint64_t at, uint64_t end, const struct move **inside) {
	*inside = NULL;
	for (uint32_t i = window->n_moves; i--;) { /* the last one is what the map holds */
		const struct move *move = &window->moves[i];
		if (move->left)
			continue;
		if (move->to <= at && at < move->to + move->length) {
			*inside = move;
			return move->to + move->length < end ? move->to + move->length : end;
		}
		if (move->to > at && move->to < end)
			end = move->to;
	}
	return end;
}

/* Does the map hold anything in [start, end) that was not moved there in this window? */
static bool holds_other(struct space *space, uint64_t start, uint64_t end) {
	const struct move *inside;
	struct interval found;
	for (uint64_t at = start, piece; at < end; at = piece) {
		piece = moved_piece(&space->window, at, end, &inside);
		if (!inside && piece_next(&space->map, at, piece, &found))
			return true;
	}
	return false;
}

/* Is an UNMAP older than a move that was told before it, to where it unmaps? */
enum age { OLDER, PERHAPS_OLDER, NEWER };
static enum age age(const struct event *unmap, const struct move *move, bool perhaps) {
	if (move->done >= unmap->number)
		return OLDER;
	if (same(unmap->by, move->by))
		return NEWER;
	return differ(unmap->by, move->by) || perhaps ? PERHAPS_OLDER : NEWER;
}

/* A munmap, the end of a mapping that shrinks, or what is mapped over: one call, and all of it was there when it was made. */
static int unmap(struct space *space, const struct event *event) {
	struct window *window = &space->window;
	uint64_t start = event->start, end = event->end;
	__attribute__((cleanup(interval_map_deinit))) struct interval_map explained;
	interval_map_init(&explained);
	window->changed = window->open;
	int error = window->in_order ? 0 : doubt_children(space, start, end);
	if (error || window->in_order || window->ordered)
		return error ? error : interval_map_erase(&space->map, start, end);
	if (!error)
		error = take_displaced(window, event, (struct origin){0}, &explained);
	bool perhaps_older = explained.count || holds_other(space, start, end);
	for (uint64_t at = start; !error && at < end;) {
		const struct move *inside;
		uint64_t piece = moved_piece(window, at, end, &inside);
		switch (inside ? age(event, inside, perhaps_older) : NEWER) {
		case NEWER:
			error = event->by ? displace(space, at, piece, event->by, start) : interval_map_erase(&space->map, at, piece);
			break;
		case PERHAPS_OLDER:
			error = piece_flag(&space->map, at, piece, 0, INTERVAL_SUSPECT);
			break;
		case OLDER:
			break;
		}
		at = piece;
	}
	return error;
}

/* -- REMAP ------------------------------------------------------------------------------------------------------------- */

/* Takes what lies in [from, end) now and belongs to `origin`; `before`: what that is, to be left behind. */
static int take_current(struct space *space, uint64_t from, uint64_t end, struct origin origin, struct interval_map *before) {
	struct window *window = &space->window;
	struct interval piece;
	int error = 0;
	for (uint64_t at = from; !error && piece_next(&space->map, at, end, &piece); at = piece.end)
		if (belongs(piece, from, origin))
			error = interval_map_insert(before, piece);
	for (uint32_t i = 0; before->count && i < window->n_moves; i++) {
		struct move *move = &window->moves[i];
		if (move->to >= from && move->to + move->length <= end && piece_next(before, move->to, move->to + move->length, &piece))
			move->left = true;
	}
	return error;
}

/* The source of a move, as far as it was taken from the map: unmapped, or emptied by MREMAP_DONTUNMAP; where an UNMAP is still to be
 * read, that looks the same. */
static int leave(struct space *space, const struct interval_map *before, const struct event *event) {
	struct interval piece;
	int error = 0;
	if (!event_unmaps(event))
		return piece_empty(&space->map, before, event->start, event->end, 0);
	for (uint64_t at = event->start; !error && piece_next(before, at, event->end, &piece); at = piece.end)
		error = interval_map_erase(&space->map, piece.start, piece.end);
	return error;
}

/* Did a call of this window put something into [start, end)? Then this call may be older, and take what was there before. */
static bool is_doubtful(const struct window *window, uint64_t start, uint64_t end) {
	for (uint32_t i = 0; i < window->n_moves; i++)
		if (!window->moves[i].left && window->moves[i].to < end && start < window->moves[i].to + window->moves[i].length)
			return true;
	for (uint32_t i = 0; i < window->n_displaced; i++)
		if (window->displaced[i].piece.start < end && start < window->displaced[i].piece.end)
			return true;
	return false;
}

/* Puts what was moved where nothing else is then. What the kernel says is there, and nobody knew, is dropped or grown memory. */
static int put(struct space *space, struct interval_map *moved, struct move move, struct origin origin) {
	struct interval piece;
	int error = 0;
	for (uint64_t at = move.to; !error && origin.known && piece_next(&space->map, at, move.to + move.length, &piece); at = piece.end)
		if (belongs(piece, move.to, origin)) { /* it was seen there before this call was told */
			struct interval back = piece;
			back.start += move.from - move.to;
			back.end += move.from - move.to;
			error = piece_fill_gap(moved, back);
		}
	if (!error)
		error = displace(space, move.to, move.to + move.length, move.by, 0);
	if (!error && origin.known)
		error = interval_map_insert(&space->map,
					    (struct interval){.start = move.to,
							      .end = move.to + move.length,
							      .image = origin.image,
							      .backing = origin.backing,
							      .flags = origin.backing >= LR_BACKING_SHARED ? 0 : INTERVAL_ZERO});
	if (!error)
		error = interval_map_move(moved, move.from, move.to, move.length);
	for (uint64_t at = move.to; !error && piece_next(moved, at, move.to + move.length, &piece); at = piece.end)
		error = interval_map_insert(&space->map, piece);
	return error;
}

/* mremap with an old size of 0: shared memory is mapped a second time. The first page is enough to tell how the file goes on. */
static int duplicate(struct space *space, uint64_t from, uint64_t to) {
	struct interval found;
	bool known = interval_map_find(&space->map, from, &found) || interval_map_before(&space->map, from, &found);
	if (!known || found.backing < LR_BACKING_SHARED)
		return 0;
	found.image += from - found.start;
	found.start = to;
	found.end = to + space_backing(space, found.backing)->page;
	return interval_map_insert(&space->map, found);
}

static int remap(struct space *space, const struct event *event) {
	struct window *window = &space->window;
	__attribute__((cleanup(interval_map_deinit))) struct interval_map moved;
	__attribute__((cleanup(interval_map_deinit))) struct interval_map before;
	uint64_t from = event->start, end = event->end;
	struct move move = {.from = from, .to = event->to, .length = end - from, .done = event->done, .by = event->by};
	struct origin origin = {0};
	struct interval piece;
	int error = 0;
	interval_map_init(&moved);
	interval_map_init(&before);
	bool unknown = window->changed && !piece_next(&space->map, from, end, &piece);
	window->changed = window->open;
	if (!move.length)
		return duplicate(space, from, move.to);
	if (!window->in_order && !window->ordered && event->slept && (event->shown.known || unknown || is_doubtful(window, from, end))) {
		origin = event->shown;
		error = take_displaced(window, event, origin, &moved);
	}
	if (!error && (origin.known || !moved.count))
		error = take_current(space, from, end, origin, &before);
	if (!error)
		error = piece_fill_gaps(&moved, &before, from, end);
	if (!error && !window->in_order)
		error = doubt_children(space, from, end);
	if (!error)
		error = put(space, &moved, move, origin);
	if (!error)
		error = leave(space, &before, event);
	return error || window->in_order || window->ordered ? error : add_move(window, move);
}

/* -- all --------------------------------------------------------------------------------------------------------------- */

static int fork_map(struct space *parent, struct space *child) {
	int error = interval_map_copy(&parent->map, &child->map);
	if (error)
		return error;
	child->next = parent->window.unborn;
	parent->window.unborn = child;
	return 0;
}

int apply_event(struct space *space, const struct event *event) {
	switch (event->kind) {
	case UFFD_EVENT_UNMAP:
		return unmap(space, event);
	case UFFD_EVENT_REMAP:
		return remap(space, event);
	case UFFD_EVENT_REMOVE:
		return piece_empty(&space->map, &space->map, event->start, event->end, 0);
	default:
		return fork_map(space, event->child);
	}
}
