#include "window.h"

#include "array.h"
#include "log.h"
#include "pieces.h"
#include "proc.h"
#include "space.h"
#include "uffd.h"
#include <errno.h>
#include <string.h>

struct move {
	uint64_t from;
	uint64_t to;
	uint64_t length;
	bool left; /* moved on, in the same window */
};

void window_init(struct window *window) {
	*window = (struct window){0};
	interval_map_init(&window->taken);
}

static void forget(struct window *window) {
	interval_map_deinit(&window->taken);
	free(window->inherited);
	window->inherited = NULL;
	window->n_moves = window->n_displaced = window->n_inherited = window->n_before = 0;
	window->open = window->changed = false;
}

void window_deinit(struct window *window) {
	forget(window);
	free(window->moves);
	free(window->displaced);
}

/* -- events ------------------------------------------------------------------------------------------------------------ */

static int add_move(struct window *window, struct move move) {
	struct move *moves = array_room(window->moves, window->n_moves, &window->moves_capacity, sizeof move);
	if (!moves)
		return ENOMEM;
	window->moves = moves;
	window->moves[window->n_moves++] = move;
	return 0;
}

static int add_displaced(struct window *window, struct interval piece) {
	struct interval *displaced =
		array_room(window->displaced, window->n_displaced, &window->displaced_capacity, sizeof piece);
	if (!displaced)
		return ENOMEM;
	window->displaced = displaced;
	window->displaced[window->n_displaced++] = piece;
	return 0;
}

/* The longest piece of [at, end) that lies wholly in what was moved there, or wholly outside. */
static uint64_t moved_piece(const struct window *window, uint64_t at, uint64_t end, bool *inside) {
	*inside = false;
	for (uint32_t i = 0; i < window->n_moves; i++) {
		const struct move *move = &window->moves[i];
		if (move->left)
			continue;
		if (move->to <= at && at < move->to + move->length) {
			*inside = true;
			return move->to + move->length < end ? move->to + move->length : end;
		}
		if (move->to > at && move->to < end)
			end = move->to;
	}
	return end;
}

/* An event was read: opens the window. */
static struct window *on_event(struct space *space) {
	struct window *window = &space->window;
	window->in_order = (window->in_order || !window->open) && proc_one_thread(space);
	window->open = true;
	return window;
}

int window_unmap(struct space *space, uint64_t start, uint64_t end) {
	struct window *window = on_event(space);
	window->changed = true;
	if (window->in_order)
		return interval_map_erase(&space->map, start, end);
	int error = piece_fill_gaps(&window->taken, &space->map, start, end);
	for (uint64_t at = start; !error && at < end;) {
		bool inside;
		uint64_t piece = moved_piece(window, at, end, &inside);
		error = inside ? piece_flag(&space->map, at, piece, 0, INTERVAL_SUSPECT)
			       : interval_map_erase(&space->map, at, piece);
		at = piece;
	}
	return error;
}

/* Something is about to be put where the map holds [start, end): that has left, as an event to come will tell. */
static int displace(struct space *space, uint64_t start, uint64_t end) {
	struct interval piece;
	for (uint64_t at = start; piece_next(&space->map, at, end, &piece); at = piece.end) {
		int error = add_displaced(&space->window, piece);
		if (!error)
			error = piece_fill_gap(&space->window.taken, piece);
		if (error)
			return error;
	}
	return interval_map_erase(&space->map, start, end);
}

/* Is `piece` a part of what lay at `from` and is `origin`? Where that is not known, of course. */
static bool belongs(struct interval piece, uint64_t from, struct origin origin) {
	if (!origin.known)
		return true;
	return !(piece.flags & INTERVAL_ZERO) && piece.backing == origin.backing &&
	       piece.image - piece.start == origin.image - from;
}

/* What could have been moved from [from, end), as far as it matters here. */
struct candidates {
	bool belong, differ; /* contents that are a part of the origin, or are not */
	bool zeros;          /* displaced ones, of whatever part */
};

static void consider(struct interval piece, uint64_t from, struct origin origin, struct candidates *found) {
	if (piece.flags & INTERVAL_ZERO)
		return;
	if (belongs(piece, from, origin))
		found->belong = true;
	else
		found->differ = true;
}

/* The origin of what was moved from [from, end) to `to`. Not known: the kernel cannot be asked; or it shows something that never was
 * at `from`, as after MREMAP_DONTUNMAP, whose caller does not sleep and may have gone on. */
static struct origin origin_of_move(struct space *space, uint64_t from, uint64_t end, uint64_t to) {
	struct origin origin = space_origin(space, to);
	struct candidates found = {0};
	struct interval piece;
	for (uint32_t i = 0; i < space->window.n_displaced; i++) {
		piece = space->window.displaced[i];
		if (piece.start >= end || piece.end <= from)
			continue;
		found.zeros |= piece.flags & INTERVAL_ZERO;
		consider(piece, from, origin, &found);
	}
	for (uint64_t at = from; piece_next(&space->map, at, end, &piece); at = piece.end)
		consider(piece, from, origin, &found);
	bool trusted = found.belong || found.zeros || !found.differ;
	return trusted ? origin : (struct origin){0};
}

/* Takes what lay in [from, end) before something else was put there: what belongs to `origin`, else what is oldest. */
static int take_displaced(struct window *window, uint64_t from, uint64_t end, struct origin origin, struct interval_map *moved) {
	int error = 0;
	uint32_t n = window->n_displaced, kept = 0;
	if (!n)
		return 0; /* and there may be no array yet, which memmove must not be given */
	for (uint32_t i = 0; !error && i < n; i++) {
		struct interval piece = window->displaced[i];
		uint64_t start = piece.start > from ? piece.start : from, stop = piece.end < end ? piece.end : end;
		if (start >= stop || !belongs(piece, from, origin)) {
			window->displaced[kept++] = piece;
			continue;
		}
		error = piece_fill_gap(moved, piece_cut(piece, start, stop));
		if (piece.start < start)
			window->displaced[kept++] = piece_cut(piece, piece.start, start);
		if (!error && stop < piece.end)
			error = add_displaced(window, piece_cut(piece, stop, piece.end));
	}
	memmove(window->displaced + kept, window->displaced + n, (window->n_displaced - n) * sizeof *window->displaced);
	window->n_displaced -= n - kept;
	return error;
}

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

/* Takes what `origin` is, of private memory, from where the map has it and the kernel does not: two moves met at `from`, and the
 * one that brought it there is told later. */
static int take_elsewhere(struct space *space, uint64_t from, uint64_t length, struct origin origin, struct interval_map *moved) {
	struct interval piece;
	int error = 0;
	for (uint64_t at = 0; !error && piece_next(&space->map, at, LR_ADDRESS_END, &piece); at = piece.end) {
		uint64_t image_end = piece.image + (piece.end - piece.start), end = origin.image + length;
		if (piece.flags & INTERVAL_ZERO || piece.backing != origin.backing || piece.image >= end || image_end <= origin.image)
			continue;
		uint64_t first = piece.image > origin.image ? piece.image : origin.image, last = image_end < end ? image_end : end;
		struct interval part = piece_cut(piece, piece.start + (first - piece.image), piece.start + (last - piece.image));
		struct origin there = space_origin(space, part.start);
		if (there.known && belongs(part, part.start, there))
			continue; /* the same part of the file, shown by a mapping that grew */
		error = interval_map_erase(&space->map, part.start, part.end);
		part.end = from + (last - origin.image);
		part.start = from + (first - origin.image);
		if (!error)
			error = interval_map_insert(moved, part);
	}
	return error;
}

/* Did a call of this window put something into [start, end)? Then this call may be older, and take what was there before. */
static bool is_doubtful(const struct window *window, uint64_t start, uint64_t end) {
	for (uint32_t i = 0; i < window->n_moves; i++)
		if (!window->moves[i].left && window->moves[i].to < end && start < window->moves[i].to + window->moves[i].length)
			return true;
	for (uint32_t i = 0; i < window->n_displaced; i++)
		if (window->displaced[i].start < end && start < window->displaced[i].end)
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
		error = displace(space, move.to, move.to + move.length);
	if (!error && origin.known) {
		bool shared = origin.backing >= LR_BACKING_SHARED;
		error = interval_map_insert(&space->map, (struct interval){.start = move.to,
									   .end = move.to + move.length,
									   .image = shared ? origin.image : move.to,
									   .backing = origin.backing,
									   .flags = shared ? 0 : INTERVAL_ZERO});
	}
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

int window_remap(struct space *space, uint64_t from, uint64_t to, uint64_t length) {
	struct window *window = on_event(space);
	__attribute__((cleanup(interval_map_deinit))) struct interval_map moved;
	__attribute__((cleanup(interval_map_deinit))) struct interval_map before;
	struct origin origin = {0};
	struct move move = {from, to, length, false};
	struct interval piece;
	int error = 0;
	interval_map_init(&moved);
	interval_map_init(&before);
	bool unknown = window->changed && !piece_next(&space->map, from, from + length, &piece);
	window->changed = true;
	if (!length)
		return duplicate(space, from, to);
	if (!window->in_order && (unknown || is_doubtful(window, from, from + length))) {
		origin = origin_of_move(space, from, from + length, to);
		error = take_displaced(window, from, from + length, origin, &moved);
	}
	if (!error && (origin.known || !moved.count))
		error = take_current(space, from, from + length, origin, &before);
	if (!error)
		error = piece_fill_gaps(&moved, &before, from, from + length);
	if (!error && !moved.count && origin.known && origin.backing < LR_BACKING_SHARED)
		error = take_elsewhere(space, from, length, origin, &moved);
	if (!error)
		error = piece_fill_gaps(&window->taken, &moved, from, from + length);
	if (!error)
		error = put(space, &moved, move, origin);
	if (!error) /* unmapped if an UNMAP follows, else (MREMAP_DONTUNMAP) private memory is empty and a shared file shows on */
		error = piece_empty(&space->map, &before, from, from + length, 0);
	return error || window->in_order ? error : add_move(window, move);
}

int window_fork(struct space *space, struct space *child) {
	int error = interval_map_copy(&on_event(space)->taken, &child->window.taken);
	if (error)
		return error;
	child->window.n_before = space->window.n_moves;
	child->next = space->window.unborn;
	space->window.unborn = child;
	return 0;
}

/* -- the end of a window ----------------------------------------------------------------------------------------------- */

/* Is what the map says of a suspect what is there, as far as the kernel can tell? A neighbour may have grown over it. */
static bool is_there(struct space *space, uint64_t address) {
	struct interval piece;
	struct origin origin = space_origin(space, address);
	return !interval_map_find(&space->map, address, &piece) || piece.flags & INTERVAL_ZERO || belongs(piece, address, origin);
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

static bool overlap(const struct move *destination, const struct move *source) {
	return destination->to < source->from + source->length && source->from < destination->to + destination->length;
}

/* Did a move of the parent's come before the fork? Then its source is what a move leaves behind, else what it was. */
static enum closing settle_move(struct space *space, uint32_t number) {
	struct window *window = &space->window;
	const struct move *move = &window->inherited[number];
	uint64_t end = move->from + move->length;
	bool before = number < window->n_before;
	struct interval piece;
	int error = 0;
	for (uint32_t i = 0; i < window->n_inherited; i++)
		if (overlap(&window->inherited[i], move))
			return WINDOW_CLOSED; /* something else was put there */
	if (!piece_next(before ? &window->taken : &space->map, move->from, end, &piece))
		return WINDOW_CLOSED;
	switch (uffd_probe(space->uffd, move->to, move->to + space_backing(space, piece.backing)->page)) {
	case PROBE_BUSY:
		return WINDOW_OPEN;
	case PROBE_GONE:
		return WINDOW_GONE;
	case PROBE_REGISTERED:
		if (!before)
			error = piece_empty(&space->map, &space->map, move->from, end, INTERVAL_SUSPECT);
		break;
	case PROBE_NOT_ONE:
		if (!before)
			break;
		error = interval_map_erase(&space->map, move->from, end);
		if (!error)
			error = piece_fill_gaps(&space->map, &window->taken, move->from, end);
		if (!error)
			error = piece_flag(&space->map, move->from, end, 0, INTERVAL_SUSPECT);
	}
	if (error) {
		space_kill(space, strerror(error));
		return WINDOW_GONE;
	}
	return WINDOW_CLOSED;
}

static enum closing settle_all(struct space *space) {
	struct window *window = &space->window;
	for (; window->n_inherited; window->n_inherited--) {
		enum closing result = settle_move(space, window->n_inherited - 1);
		if (result != WINDOW_CLOSED)
			return result;
	}
	struct interval piece;
	for (uint64_t at = 0; interval_map_flagged(&space->map, at, INTERVAL_SUSPECT, &piece); at = piece.end) {
		enum closing result = settle(space, piece.start, piece.end, space_backing(space, piece.backing)->page);
		if (result != WINDOW_CLOSED)
			return result;
	}
	return WINDOW_CLOSED;
}

/* Makes a child of a window with other events: all that was anywhere, until its own kernel side is asked. */
static int doubt(struct space *parent, struct space *child) {
	int error = piece_fill_gaps(&child->map, &child->window.taken, 0, LR_ADDRESS_END);
	if (!error)
		error = piece_fill_gaps(&child->map, &parent->map, 0, LR_ADDRESS_END);
	if (!error)
		error = piece_flag(&child->map, 0, LR_ADDRESS_END, 0, INTERVAL_SUSPECT);
	if (!error && parent->window.n_moves) {
		child->window.inherited = calloc(parent->window.n_moves, sizeof *child->window.inherited);
		if (!child->window.inherited)
			return ENOMEM;
		child->window.n_inherited = parent->window.n_moves;
		memcpy(child->window.inherited, parent->window.moves, parent->window.n_moves * sizeof *parent->window.moves);
	}
	child->window.open = true;
	return error;
}

static void give_birth(struct space *parent) {
	while (parent->window.unborn) {
		struct space *child = parent->window.unborn;
		parent->window.unborn = child->next;
		child->next = NULL;
		struct lr_error error = LR_OK;
		if (parent->window.changed && !parent->window.in_order && doubt(parent, child))
			error = lr_fail("interval map", ENOMEM, 0);
		if (!error.code)
			error = space_start(child);
		if (error.code)
			space_orphan(parent, child, error);
	}
}

void window_abandon(struct space *space) {
	space->window.changed = true; /* there may have been events that nobody read */
	give_birth(space);
}

enum closing window_close(struct space *space) {
	const uint64_t nowhere = LR_ADDRESS_END - 2 * LR_PAGE; /* never mapped */
	if (!space->window.open)
		return WINDOW_CLOSED;
	enum probe quiet = uffd_probe(space->uffd, nowhere, nowhere + LR_PAGE);
	if (quiet == PROBE_BUSY || quiet == PROBE_GONE)
		return quiet == PROBE_BUSY ? WINDOW_OPEN : WINDOW_GONE;
	enum closing result = settle_all(space);
	if (result != WINDOW_CLOSED)
		return result;
	give_birth(space);
	forget(&space->window);
	return WINDOW_CLOSED;
}
