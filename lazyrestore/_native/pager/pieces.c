#include "pieces.h"

#include "space.h"

/* [start, end) of an interval. */
struct interval piece_cut(struct interval whole, uint64_t start, uint64_t end) {
	whole.image += start - whole.start;
	whole.start = start;
	whole.end = end;
	return whole;
}

/* The next piece of an interval in [at, end); false: none. */
bool piece_next(const struct interval_map *map, uint64_t at, uint64_t end, struct interval *piece) {
	if (at >= end || !interval_map_next(map, at, piece) || piece->start >= end)
		return false;
	*piece = piece_cut(*piece, piece->start < at ? at : piece->start, piece->end > end ? end : piece->end);
	return true;
}

int piece_flag(struct interval_map *map, uint64_t start, uint64_t end, uint32_t clear, uint32_t set) {
	struct interval piece;
	for (uint64_t at = start; piece_next(map, at, end, &piece);) {
		at = piece.end;
		piece.flags = (piece.flags & ~clear) | set;
		int error = interval_map_insert(map, piece);
		if (error)
			return error;
	}
	return 0;
}

/* Those parts of `piece` of which `into` holds nothing. */
int piece_fill_gap(struct interval_map *into, struct interval piece) {
	struct interval known;
	for (uint64_t at = piece.start; at < piece.end; at = known.end) {
		if (!piece_next(into, at, piece.end, &known))
			known.start = known.end = piece.end;
		int error = known.start > at ? interval_map_insert(into, piece_cut(piece, at, known.start)) : 0;
		if (error)
			return error;
	}
	return 0;
}

/* What `from` holds in [start, end) and `into` does not. */
int piece_fill_gaps(struct interval_map *into, const struct interval_map *from, uint64_t start, uint64_t end) {
	struct interval piece;
	int error = 0;
	for (uint64_t at = start; !error && piece_next(from, at, end, &piece); at = piece.end)
		error = piece_fill_gap(into, piece);
	return error;
}

int piece_empty(struct interval_map *map, const struct interval_map *before, uint64_t start, uint64_t end, uint32_t flags) {
	struct interval piece;
	for (uint64_t at = start; piece_next(before, at, end, &piece);) {
		at = piece.end;
		uint32_t old = piece.flags;
		piece.flags |= flags | (piece.backing < LR_BACKING_SHARED ? INTERVAL_ZERO : 0);
		if (map == before && piece.flags == old)
			continue;
		int error = interval_map_insert(map, piece);
		if (error)
			return error;
	}
	return 0;
}
