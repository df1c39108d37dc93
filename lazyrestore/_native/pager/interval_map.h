/* A map from virtual ranges to image ranges: a B+ tree of disjoint intervals.
 *
 * Facts: a restored process splits, moves and drops pieces of its mappings for as long as it lives, and every fault asks
 * for the piece at one address; fork copies everything; after some time what is asked for is in no cache. Choice: a tree of
 * 1 KiB blocks, three levels for 57,000 intervals, in one array, linked by index, so that a copy is one memcpy and all changes
 * are O(log n) plus the intervals they drop. Cost: a change moves up to a block's intervals. Knows nothing of userfaultfd. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct interval {
	uint64_t start;
	uint64_t end;   /* exclusive */
	uint64_t image; /* what `start` maps to */
	uint32_t backing;
	uint32_t flags; /* below 1 << 16 */
};

struct interval_block;

struct interval_map {
	struct interval_block *blocks;
	uint32_t capacity;
	uint32_t used; /* blocks ever handed out; the free ones among them are chained from `free` */
	uint32_t free;
	uint32_t levels; /* of blocks above the leaves */
	uint32_t count;  /* intervals */
};

void interval_map_init(struct interval_map *map);
void interval_map_deinit(struct interval_map *map);

/* 0, or ENOMEM with both maps unchanged; `copy` must be initialised and empty. */
int interval_map_copy(const struct interval_map *map, struct interval_map *copy);

/* The interval that holds `address`. */
bool interval_map_find(const struct interval_map *map, uint64_t address, struct interval *found);

/* The last interval that ends at or before `address`. */
bool interval_map_before(const struct interval_map *map, uint64_t address, struct interval *found);

/* The first interval that ends after `address`. */
bool interval_map_next(const struct interval_map *map, uint64_t address, struct interval *found);

/* The first interval that ends after `address` and has one of `flags`, in O(log n). */
bool interval_map_flagged(const struct interval_map *map, uint64_t address, uint32_t flags, struct interval *found);

/* Each returns 0, EINVAL (an empty or wrapping range) or ENOMEM, with the map unchanged. */
int interval_map_erase(struct interval_map *map, uint64_t start, uint64_t end);

/* Replaces what was there; joins neighbours that continue one another. */
int interval_map_insert(struct interval_map *map, struct interval interval);

/* What [from, from + length) holds is at [to, to + length) afterwards, and nothing else is there; the two may overlap. Copies the map. */
int interval_map_move(struct interval_map *map, uint64_t from, uint64_t to, uint64_t length);
