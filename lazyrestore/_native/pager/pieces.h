/* Parts of intervals, and maps made of parts of other maps. An interval of zeros keeps its
 * image: that is what the kernel shows there, and how it is known again. */
#pragma once
#include "interval_map.h"

/* [start, end) of an interval. */
struct interval piece_cut(struct interval whole, uint64_t start, uint64_t end);

/* The next piece of an interval in [at, end); false: none. */
bool piece_next(const struct interval_map *map, uint64_t at, uint64_t end, struct interval *piece);

/* Clears and sets flags of what the map holds in [start, end). The ints: 0 or ENOMEM. */
int piece_flag(struct interval_map *map, uint64_t start, uint64_t end, uint32_t clear, uint32_t set);

/* Those parts of `piece` of which `into` holds nothing. */
int piece_fill_gap(struct interval_map *into, struct interval piece);

/* What `from` holds in [start, end) and `into` does not. */
int piece_fill_gaps(struct interval_map *into, const struct interval_map *from, uint64_t start, uint64_t end);

/* Puts into `map`, with `flags`, what `before` (it may be the same) holds in [start, end), emptied: private memory reads zero,
 * shared memory keeps what its file holds. */
int piece_empty(struct interval_map *map, const struct interval_map *before, uint64_t start, uint64_t end, uint32_t flags);
