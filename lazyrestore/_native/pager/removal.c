#include "removal.h"

#include "pieces.h"
#include "space.h"
#include "uffd.h"
#include <errno.h>
#include <poll.h>
#include <string.h>

enum { FEW_CHUNKS = 16 };

static bool is_lazy(struct space *space) {
	for (uint32_t i = 0; i < space->n_shared; i++)
		if (!backing_is_complete(space->shared[i]))
			return true;
	return false;
}

struct removal_guard removal_begin(struct space *space) {
	struct removal_guard guard = {.space = space};
	if (!is_lazy(space))
		return guard;
	struct pollfd readable = {.fd = space->uffd, .events = POLLIN};
	guard.read = poll(&readable, 1, 0) > 0 ? REMOVAL_ONE : REMOVAL_NOTHING;
	if (guard.read == REMOVAL_NOTHING || !uffd_changing(space->uffd))
		return guard;
	guard.read = REMOVAL_ANY;
	for (uint32_t i = 0; i < space->n_shared; i++) { /* the same order in all spaces that share them */
		if (space->shared[i]->n <= FEW_CHUNKS)
			backing_fill_all(space->shared[i], &space->pager->image, &space->unpacker);
		if (backing_is_complete(space->shared[i]))
			continue;
		if (hold_take(&space->shared[i]->hold).code)
			backing_fill_all(space->shared[i], &space->pager->image, &space->unpacker); /* or as much as is sound */
		else
			guard.held[i / 64] |= 1ull << i % 64;
	}
	return guard;
}

void removal_end(struct removal_guard *guard) {
	for (uint32_t i = 0; i < guard->space->n_shared; i++)
		if (guard->held[i / 64] >> i % 64 & 1)
			hold_release(&guard->space->shared[i]->hold);
}

static void keep(const struct removal_guard *guard, struct backing *backing, uint64_t from, uint64_t to) {
	const struct image *image = &guard->space->pager->image;
	if (guard->read == REMOVAL_ANY)
		backing_fill_range(backing, image, from, to, &guard->space->unpacker);
	else
		backing_spoil_range(backing, image, from, to);
}

void removal_fill(const struct removal_guard *guard, uint64_t start, uint64_t end) {
	struct space *space = guard->space;
	struct interval piece;
	uint64_t covered = start;
	if (!is_lazy(space))
		return;
	/* One event is about one mapping. What the kernel shows there, and what the map says: a call beside this one may have moved it. */
	struct origin origin = space_origin(space, start);
	if (origin.known && origin.backing >= LR_BACKING_SHARED)
		keep(guard, space_backing(space, origin.backing), origin.image, origin.image + (end - start));
	for (uint64_t at = start; piece_next(&space->map, at, end, &piece); at = piece.end) {
		if (piece.backing >= LR_BACKING_SHARED)
			keep(guard, space_backing(space, piece.backing), piece.image, piece.image + (piece.end - piece.start));
		if (piece.start == covered)
			covered = piece.end;
	}
	if (origin.known || (covered == end && !space->window.open))
		return;
	for (uint32_t i = 0; i < space->n_shared; i++) /* nobody knows */
		keep(guard, space->shared[i], space->shared[i]->image, space->shared[i]->image + LR_ADDRESS_END);
}
