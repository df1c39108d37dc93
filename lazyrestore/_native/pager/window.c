#include "window.h"

#include "log.h"
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

enum { FIRST_MOVES = 16 };

void window_init(struct window *window) {
	*window = (struct window){0};
	interval_map_init(&window->taken);
}

static void forget(struct window *window) {
	interval_map_deinit(&window->taken);
	free(window->inherited);
	window->inherited = NULL;
	window->n_moves = window->n_inherited = window->n_before = 0;
	window->open = window->changed = window->suspects = false;
}

void window_deinit(struct window *window) {
	forget(window);
	free(window->moves);
}

/* The next piece of an interval in [at, end); false: none. */
static bool next_piece(const struct interval_map *map, uint64_t at, uint64_t end, struct interval *piece) {
	if (at >= end || !interval_map_next(map, at, piece) || piece->start >= end)
		return false;
	if (piece->start < at) {
		if (!(piece->flags & INTERVAL_ZERO))
			piece->image += at - piece->start;
		piece->start = at;
	}
	if (piece->end > end)
		piece->end = end;
	if (piece->flags & INTERVAL_ZERO)
		piece->image = piece->start;
	return true;
}

static int flag(struct interval_map *map, uint64_t start, uint64_t end, uint32_t clear, uint32_t set) {
	struct interval piece;
	for (uint64_t at = start; next_piece(map, at, end, &piece);) {
		at = piece.end;
		piece.flags = (piece.flags & ~clear) | set;
		int error = interval_map_insert(map, piece);
		if (error)
			return error;
	}
	return 0;
}

/* What `from` holds in [start, end) and `into` does not. */
static int fill_gaps(struct interval_map *into, const struct interval_map *from, uint64_t start, uint64_t end) {
	struct interval piece, known;
	for (uint64_t at = start; next_piece(from, at, end, &piece);) {
		at = piece.end;
		if (next_piece(into, piece.start, piece.end, &known)) {
			if (known.start == piece.start) {
				at = known.end;
				continue;
			}
			piece.end = at = known.start;
		}
		int error = interval_map_insert(into, piece);
		if (error)
			return error;
	}
	return 0;
}

/* -- events ------------------------------------------------------------------------------------------------------------ */

static int add_move(struct window *window, struct move move) {
	if (window->n_moves == window->capacity) {
		uint32_t capacity = window->capacity ? window->capacity * 2 : FIRST_MOVES;
		struct move *moves = realloc(window->moves, capacity * sizeof *moves);
		if (!moves)
			return ENOMEM;
		window->moves = moves;
		window->capacity = capacity;
	}
	window->moves[window->n_moves++] = move;
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

int window_unmap(struct space *space, uint64_t start, uint64_t end) {
	struct window *window = &space->window;
	window->open = window->changed = true;
	int error = fill_gaps(&window->taken, &space->map, start, end);
	for (uint64_t at = start; !error && at < end;) {
		bool inside;
		uint64_t piece = moved_piece(window, at, end, &inside);
		if (inside) {
			window->suspects = true;
			error = flag(&space->map, at, piece, 0, INTERVAL_SUSPECT);
		} else {
			error = interval_map_erase(&space->map, at, piece);
		}
		at = piece;
	}
	return error;
}

/* The source of a move: unmapped if an UNMAP follows, else (MREMAP_DONTUNMAP) private memory is empty and a shared file shows on. */
static int leave_behind(struct space *space, const struct interval_map *before, uint64_t start, uint64_t end, uint32_t flags) {
	struct interval piece;
	for (uint64_t at = start; next_piece(before, at, end, &piece);) {
		at = piece.end;
		if (piece.backing < LR_BACKING_SHARED) {
			piece.flags |= INTERVAL_ZERO;
			piece.image = piece.start;
		}
		piece.flags |= flags;
		int error = interval_map_insert(&space->map, piece);
		if (error)
			return error;
	}
	return 0;
}

int window_remap(struct space *space, uint64_t from, uint64_t to, uint64_t length) {
	struct window *window = &space->window;
	__attribute__((cleanup(interval_map_deinit))) struct interval_map before;
	interval_map_init(&before);
	window->open = window->changed = true;
	for (uint32_t i = 0; i < window->n_moves; i++)
		if (window->moves[i].to >= from && window->moves[i].to + window->moves[i].length <= from + length)
			window->moves[i].left = true;
	int error = fill_gaps(&before, &space->map, from, from + length);
	if (!error)
		error = fill_gaps(&window->taken, &before, from, from + length);
	if (!error)
		error = interval_map_move(&space->map, from, to, length);
	if (!error)
		error = leave_behind(space, &before, from, from + length, 0);
	return error ? error : add_move(window, (struct move){from, to, length, false});
}

int window_fork(struct space *space, struct space *child) {
	int error = interval_map_copy(&space->window.taken, &child->window.taken);
	if (error)
		return error;
	child->window.n_before = space->window.n_moves;
	child->next = space->window.unborn;
	space->window.unborn = child;
	space->window.open = true;
	return 0;
}

/* -- the end of a window ----------------------------------------------------------------------------------------------- */

/* Clears the suspicion from the parts of [start, end) that are registered, erases the rest. */
static enum closing settle(struct space *space, uint64_t start, uint64_t end, uint64_t page) {
	int error = 0;
	switch (uffd_probe(space->uffd, start, end)) {
	case PROBE_REGISTERED:
		error = flag(&space->map, start, end, INTERVAL_SUSPECT, 0);
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
	if (!next_piece(before ? &window->taken : &space->map, move->from, end, &piece))
		return WINDOW_CLOSED;
	switch (uffd_probe(space->uffd, move->to, move->to + space_backing(space, piece.backing)->page)) {
	case PROBE_BUSY:
		return WINDOW_OPEN;
	case PROBE_GONE:
		return WINDOW_GONE;
	case PROBE_REGISTERED:
		if (!before)
			error = leave_behind(space, &space->map, move->from, end, INTERVAL_SUSPECT);
		break;
	case PROBE_NOT_ONE:
		if (!before)
			break;
		error = interval_map_erase(&space->map, move->from, end);
		if (!error)
			error = fill_gaps(&space->map, &window->taken, move->from, end);
		if (!error)
			error = flag(&space->map, move->from, end, 0, INTERVAL_SUSPECT);
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
	for (uint64_t at = 0; next_piece(&space->map, at, LR_ADDRESS_END, &piece); at = piece.end) {
		if (!(piece.flags & INTERVAL_SUSPECT))
			continue;
		enum closing result = settle(space, piece.start, piece.end, space_backing(space, piece.backing)->page);
		if (result != WINDOW_CLOSED)
			return result;
	}
	return WINDOW_CLOSED;
}

/* Makes a child of a window with other events: all that was anywhere, until its own kernel side is asked. */
static int doubt(struct space *parent, struct space *child) {
	int error = fill_gaps(&child->map, &child->window.taken, 0, LR_ADDRESS_END);
	if (!error)
		error = fill_gaps(&child->map, &parent->map, 0, LR_ADDRESS_END);
	if (!error)
		error = flag(&child->map, 0, LR_ADDRESS_END, 0, INTERVAL_SUSPECT);
	if (!error && parent->window.n_moves) {
		child->window.inherited = calloc(parent->window.n_moves, sizeof *child->window.inherited);
		if (!child->window.inherited)
			return ENOMEM;
		child->window.n_inherited = parent->window.n_moves;
		memcpy(child->window.inherited, parent->window.moves, parent->window.n_moves * sizeof *parent->window.moves);
	}
	child->window.open = child->window.suspects = true;
	return error;
}

static void give_birth(struct space *parent) {
	while (parent->window.unborn) {
		struct space *child = parent->window.unborn;
		parent->window.unborn = child->next;
		child->next = NULL;
		struct lr_error error = LR_OK;
		if (parent->window.changed && doubt(parent, child))
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
	if (space->window.suspects) {
		enum closing result = settle_all(space);
		if (result != WINDOW_CLOSED)
			return result;
	}
	give_birth(space);
	forget(&space->window);
	return WINDOW_CLOSED;
}
