#include "interval_map.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* What a block above knows of one: all that a change of its neighbour asks for, so that only what changes is touched. */
struct entry {
	uint64_t start; /* of the first interval */
	uint32_t block; /* in a free block: the next free one */
	uint16_t count; /* of intervals or entries */
	uint16_t flags; /* of all intervals, or'ed */
};

#ifndef INTERVAL_MAP_BLOCK
#define INTERVAL_MAP_BLOCK 1024 /* bytes; tests have less, for more blocks */
#endif
enum {
	LEAF = INTERVAL_MAP_BLOCK / sizeof(struct interval),
	FAN = INTERVAL_MAP_BLOCK / sizeof(struct entry),
	LEVELS = 16, /* a block parts after FAN / 4 or more of those below it have: 17^16 changes > 2^64 */
	FIRST_CAPACITY = 4,
};

/* Sorted intervals, or entries of the level below. */
struct interval_block {
	union {
		struct interval intervals[LEAF];
		struct entry entries[FAN];
		unsigned char bytes[INTERVAL_MAP_BLOCK];
	};
};

/* The way to a leaf. */
struct path {
	struct entry *at[LEVELS + 1]; /* the root's, which alone is in block 0, to the leaf's */
	struct interval *intervals;   /* of the leaf */
	uint32_t count;
	uint64_t after; /* where the next leaf starts, or UINT64_MAX */
};

void interval_map_init(struct interval_map *map) {
	*map = (struct interval_map){0};
}

void interval_map_deinit(struct interval_map *map) {
	free(map->blocks);
	interval_map_init(map);
}

int interval_map_copy(const struct interval_map *map, struct interval_map *copy) {
	struct interval_block *blocks = NULL;
	if (map->capacity) {
		blocks = malloc(map->capacity * sizeof *blocks);
		if (!blocks)
			return ENOMEM;
		memcpy(blocks, map->blocks, map->used * sizeof *blocks);
	}
	*copy = *map;
	copy->blocks = blocks;
	return 0;
}

/* Makes sure that a change, which adds at most a block to each level and one above them, cannot fail: it is whole or does not begin. */
static int reserve(struct interval_map *map) {
	if (map->used + map->levels + 2 <= map->capacity)
		return 0;
	uint32_t capacity = map->capacity ? map->capacity * 2 : FIRST_CAPACITY;
	struct interval_block *blocks = realloc(map->blocks, capacity * sizeof *blocks);
	if (!blocks)
		return ENOMEM;
	map->blocks = blocks;
	map->capacity = capacity;
	if (!map->used) {
		blocks[0].entries[0] = (struct entry){.block = 1};
		map->used = 2;
	}
	return 0;
}

static uint32_t block_take(struct interval_map *map) {
	uint32_t block = map->free;
	if (!block)
		return map->used++;
	map->free = map->blocks[block].entries[0].block;
	return block;
}

static void block_give(struct interval_map *map, uint32_t block) {
	map->blocks[block].entries[0].block = map->free;
	map->free = block;
}

static struct entry *root(const struct interval_map *map) {
	return &map->blocks[0].entries[0];
}

/* How many of `count` items, which begin with where they start, start at or before `address`. */
static inline uint32_t until(const void *items, size_t size, uint32_t count, uint64_t address) {
	const unsigned char *first = items;
	if (!count)
		return 0;
	while (count > 1) {
		uint32_t half = count / 2;
		first += *(const uint64_t *)(first + half * size) <= address ? half * size : 0;
		count -= half;
	}
	return (uint32_t)((size_t)(first - (const unsigned char *)items) / size) + (*(const uint64_t *)first <= address);
}

/* Goes to the one leaf that may hold what starts at `address`; returns how many of its intervals start at or before that. */
static uint32_t descend(const struct interval_map *map, uint64_t address, struct path *path) {
	struct entry *entry = root(map);
	path->after = UINT64_MAX;
	for (uint32_t level = 0; level < map->levels; level++) {
		path->at[level] = entry;
		struct entry *entries = map->blocks[entry->block].entries;
		uint32_t next = until(entries, sizeof *entries, entry->count, address);
		next += !next;
		if (next < entry->count)
			path->after = entries[next].start;
		entry = &entries[next - 1];
	}
	path->at[map->levels] = entry;
	path->intervals = map->blocks[entry->block].intervals;
	path->count = entry->count;
	return until(path->intervals, sizeof *path->intervals, path->count, address);
}

bool interval_map_find(const struct interval_map *map, uint64_t address, struct interval *found) {
	struct path path;
	uint32_t n = map->count ? descend(map, address, &path) : 0;
	if (!n || path.intervals[n - 1].end <= address)
		return false;
	*found = path.intervals[n - 1];
	return true;
}

bool interval_map_before(const struct interval_map *map, uint64_t address, struct interval *found) {
	struct path path;
	for (; map->count && address; address = found->start) {
		uint32_t n = descend(map, address - 1, &path);
		if (!n)
			return false;
		*found = path.intervals[n - 1];
		if (found->end <= address)
			return true;
	}
	return false;
}

bool interval_map_next(const struct interval_map *map, uint64_t address, struct interval *found) {
	struct path path;
	if (!map->count)
		return false;
	uint32_t n = descend(map, address, &path);
	n -= n && path.intervals[n - 1].end > address;
	if (n == path.count) {
		if (path.after == UINT64_MAX)
			return false;
		n = descend(map, path.after, &path) - 1;
	}
	*found = path.intervals[n];
	return true;
}

/* The first below an entry that ends after `address` and has one of the flags. */
static bool first_flagged(const struct interval_map *map, const struct entry *entry, uint32_t level, uint64_t address, uint32_t flags,
			  struct interval *found) {
	if (!(entry->flags & flags))
		return false;
	const struct interval_block *block = &map->blocks[entry->block];
	bool leaf = level == map->levels;
	uint32_t i = until(block, leaf ? sizeof *block->intervals : sizeof *block->entries, entry->count, address);
	for (i -= i > 0; i < entry->count; i++) {
		if (!leaf && first_flagged(map, &block->entries[i], level + 1, address, flags, found))
			return true;
		if (leaf && block->intervals[i].end > address && block->intervals[i].flags & flags) {
			*found = block->intervals[i];
			return true;
		}
	}
	return false;
}

bool interval_map_flagged(const struct interval_map *map, uint64_t address, uint32_t flags, struct interval *found) {
	return map->count && first_flagged(map, root(map), 0, address, flags, found);
}

static struct entry entry_of(const struct interval_map *map, bool leaf, uint32_t index, uint32_t count) {
	const struct interval_block *block = &map->blocks[index];
	struct entry entry = {.start = block->entries[0].start, .block = index, .count = (uint16_t)count};
	for (uint32_t i = 0; i < count; i++)
		entry.flags |= leaf ? (uint16_t)block->intervals[i].flags : block->entries[i].flags;
	return entry;
}

/* Replaces items [i, j) of a block by `n` others, at most two more; returns how many blocks that takes, 0 to 2, and makes their entries. */
static uint32_t put(struct interval_map *map, bool leaf, const struct entry *entry, uint32_t i, uint32_t j, const void *items, uint32_t n,
		    struct entry *made) {
	size_t size = leaf ? sizeof(struct interval) : sizeof(struct entry);
	uint32_t behind = entry->count - j, total = i + n + behind;
	unsigned char *block = map->blocks[entry->block].bytes;
	if (total <= (leaf ? LEAF : FAN)) {
		memmove(block + (i + n) * size, block + j * size, behind * size);
		memcpy(block + i * size, items, n * size);
		made[0] = entry_of(map, leaf, entry->block, total);
		return total > 0;
	}
	unsigned char all[INTERVAL_MAP_BLOCK + 2 * sizeof(struct interval)];
	memcpy(all, block, i * size);
	memcpy(all + i * size, items, n * size);
	memcpy(all + (i + n) * size, block + j * size, behind * size);
	uint32_t low = total / 2, other = block_take(map);
	memcpy(block, all, low * size);
	memcpy(map->blocks[other].bytes, all + low * size, (total - low) * size);
	made[0] = entry_of(map, leaf, entry->block, low);
	made[1] = entry_of(map, leaf, other, total - low);
	return 2;
}

/* Makes one of two neighbours if that leaves a quarter of a block free, so that they do not part again at once. */
static bool join(struct interval_map *map, bool leaf, struct entry *low, const struct entry *high) {
	size_t size = leaf ? sizeof(struct interval) : sizeof(struct entry);
	if (low->count + high->count > (leaf ? LEAF : FAN) * 3 / 4)
		return false;
	memcpy(map->blocks[low->block].bytes + low->count * size, map->blocks[high->block].bytes, high->count * size);
	block_give(map, high->block);
	low->count += high->count;
	low->flags |= high->flags;
	return true;
}

/* Replaces intervals [i, j) of a leaf by `n` others, at most two more. */
static void splice(struct interval_map *map, const struct path *path, uint32_t i, uint32_t j, const struct interval *intervals, uint32_t n) {
	struct entry made[2];
	uint32_t level = map->levels, blocks = put(map, true, path->at[level], i, j, intervals, n, made);
	map->count += n - (j - i);
	for (; level; level--) {
		bool leaf = level == map->levels;
		const struct entry *above = path->at[level - 1];
		struct entry *siblings = map->blocks[above->block].entries;
		i = (uint32_t)(path->at[level] - siblings);
		j = i + 1;
		if (!blocks) {
			block_give(map, siblings[i].block);
			if (i) { /* two others are neighbours now */
				made[0] = siblings[--i];
				blocks = 1;
			}
		}
		if (blocks == 1 && j < above->count && join(map, leaf, &made[0], &siblings[j]))
			j++;
		if (blocks == 1 && i && join(map, leaf, &siblings[i - 1], &made[0]))
			made[0] = siblings[--i];
		if (blocks == 1 && j - i == 1 && made[0].start == siblings[i].start && made[0].flags == siblings[i].flags) {
			siblings[i] = made[0]; /* nothing that those above know of has changed */
			return;
		}
		blocks = put(map, false, above, i, j, made, blocks, made);
	}
	if (blocks == 2) {
		uint32_t top = block_take(map);
		memcpy(map->blocks[top].entries, made, sizeof made);
		made[0] = entry_of(map, false, top, 2);
		map->levels++;
	}
	for (; map->levels && made[0].count == 1; map->levels--) {
		uint32_t top = made[0].block;
		made[0] = map->blocks[top].entries[0];
		block_give(map, top);
	}
	*root(map) = made[0];
}

/* Drops what starts in [start, end), and puts `n` intervals there instead, at most two more. */
static void replace(struct interval_map *map, uint64_t start, uint64_t end, const struct interval *intervals, uint32_t n) {
	struct path path;
	uint32_t i = descend(map, start, &path);
	while (path.after < end) { /* as much as the next leaf holds of it */
		descend(map, path.after, &path);
		splice(map, &path, 0, until(path.intervals, sizeof *path.intervals, path.count, end - 1), intervals, 0);
		i = descend(map, start, &path);
	}
	i -= i && path.intervals[i - 1].start == start;
	uint32_t j = until(path.intervals, sizeof *path.intervals, path.count, end - 1);
	if (i < j || n)
		splice(map, &path, i, j, intervals, n);
}

static bool continues(const struct interval *one, const struct interval *next) {
	return one->end == next->start && one->backing == next->backing && one->flags == next->flags &&
	       one->image + (one->end - one->start) == next->image;
}

/* Appends an interval to `n` others, or to the last of them if it continues that; returns how many they are then. */
static uint32_t append(struct interval *intervals, uint32_t n, struct interval next) {
	if (n && continues(&intervals[n - 1], &next)) {
		intervals[n - 1].end = next.end;
		return n;
	}
	intervals[n] = next;
	return n + 1;
}

/* Makes [start, end) hold `interval`, or nothing if that is NULL. What lies across or beside a border is put back, cut or joined. */
static int change(struct interval_map *map, uint64_t start, uint64_t end, const struct interval *interval) {
	struct interval intervals[3], beside;
	uint32_t n = 0;
	uint64_t from = start, to = end;
	if (start >= end)
		return EINVAL;
	int error = reserve(map);
	if (error)
		return error;
	if (start && interval_map_find(map, start - 1, &beside)) {
		from = beside.start;
		beside.end = start;
		n = append(intervals, n, beside);
	}
	if (interval)
		n = append(intervals, n, *interval);
	if (interval_map_find(map, end, &beside)) {
		to = beside.end;
		beside.image += end - beside.start;
		beside.start = end;
		n = append(intervals, n, beside);
	}
	replace(map, from, to, intervals, n);
	return 0;
}

int interval_map_erase(struct interval_map *map, uint64_t start, uint64_t end) {
	return change(map, start, end, NULL);
}

int interval_map_insert(struct interval_map *map, struct interval interval) {
	return change(map, interval.start, interval.end, &interval);
}

int interval_map_move(struct interval_map *map, uint64_t from, uint64_t to, uint64_t length) {
	uint64_t end = from + length;
	struct interval_map after;
	struct interval piece;
	if (!length || end < from || to + length < to)
		return EINVAL;
	interval_map_init(&after);
	int error = interval_map_copy(map, &after);
	if (!error)
		error = interval_map_erase(&after, from, end);
	if (!error)
		error = interval_map_erase(&after, to, to + length);
	for (uint64_t at = from; !error && at < end && interval_map_next(map, at, &piece) && piece.start < end;) {
		if (piece.start < at) {
			piece.image += at - piece.start;
			piece.start = at;
		}
		at = piece.end < end ? piece.end : end;
		piece.start += to - from;
		piece.end = at + (to - from);
		error = interval_map_insert(&after, piece);
	}
	if (!error) {
		struct interval_map before = *map;
		*map = after;
		after = before;
	}
	interval_map_deinit(&after);
	return error;
}
