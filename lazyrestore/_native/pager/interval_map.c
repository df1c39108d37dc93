#include "interval_map.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* Index 0 is no node. `left` also chains free nodes. */
struct interval_node {
	struct interval interval;
	uint32_t priority; /* a parent's is not lower than its children's */
	uint32_t left;
	uint32_t right;
	uint16_t left_flags; /* of all intervals of a subtree, or'ed: here, so that who has one child at hand need not look at the other */
	uint16_t right_flags;
};

enum { NONE = 0, FIRST_CAPACITY = 64 };

void interval_map_init(struct interval_map *map) {
	*map = (struct interval_map){.used = 1, .seed = 2463534242u};
}

void interval_map_deinit(struct interval_map *map) {
	free(map->nodes);
	interval_map_init(map);
}

int interval_map_copy(const struct interval_map *map, struct interval_map *copy) {
	struct interval_node *nodes = NULL;
	if (map->capacity) {
		nodes = malloc(map->capacity * sizeof *nodes);
		if (!nodes)
			return ENOMEM;
		memcpy(nodes, map->nodes, map->used * sizeof *nodes);
	}
	*copy = *map;
	copy->nodes = nodes;
	return 0;
}

/* Makes sure that `wanted` nodes can be taken without failing: a change is whole or does not begin. */
static int reserve(struct interval_map *map, uint32_t wanted) {
	uint32_t live = map->count + 1;
	if (live + wanted <= map->capacity)
		return 0;
	uint32_t capacity = map->capacity ? map->capacity * 2 : FIRST_CAPACITY;
	while (capacity < live + wanted)
		capacity *= 2;
	struct interval_node *nodes = realloc(map->nodes, capacity * sizeof *nodes);
	if (!nodes)
		return ENOMEM;
	map->nodes = nodes;
	map->capacity = capacity;
	return 0;
}

static uint32_t node_take(struct interval_map *map, struct interval interval) {
	uint32_t index = map->free;
	if (index != NONE)
		map->free = map->nodes[index].left;
	else
		index = map->used++;
	map->seed ^= map->seed << 13;
	map->seed ^= map->seed >> 17;
	map->seed ^= map->seed << 5;
	map->nodes[index] = (struct interval_node){.interval = interval, .priority = map->seed};
	map->count++;
	return index;
}

static void node_give(struct interval_map *map, uint32_t index) {
	map->nodes[index].left = map->free;
	map->free = index;
	map->count--;
}

static void tree_give(struct interval_map *map, uint32_t tree) {
	if (tree == NONE)
		return;
	tree_give(map, map->nodes[tree].left);
	tree_give(map, map->nodes[tree].right);
	node_give(map, tree);
}

static uint16_t flags_of(const struct interval_node *nodes, uint32_t tree) {
	if (tree == NONE)
		return 0;
	return (uint16_t)(nodes[tree].interval.flags | nodes[tree].left_flags | nodes[tree].right_flags);
}

static void set_left(struct interval_node *nodes, uint32_t index, uint32_t child) {
	nodes[index].left = child;
	nodes[index].left_flags = flags_of(nodes, child);
}

static void set_right(struct interval_node *nodes, uint32_t index, uint32_t child) {
	nodes[index].right = child;
	nodes[index].right_flags = flags_of(nodes, child);
}

/* Everything in `low` lies before everything in `high`. */
static uint32_t join(struct interval_map *map, uint32_t low, uint32_t high) {
	if (low == NONE)
		return high;
	if (high == NONE)
		return low;
	struct interval_node *nodes = map->nodes;
	if (nodes[low].priority >= nodes[high].priority) {
		set_right(nodes, low, join(map, nodes[low].right, high));
		return low;
	}
	set_left(nodes, high, join(map, low, nodes[high].left));
	return high;
}

/* Parts `tree` at `address`, which no interval lies across. */
static void split(struct interval_map *map, uint32_t tree, uint64_t address, uint32_t *low, uint32_t *high) {
	if (tree == NONE) {
		*low = *high = NONE;
	} else if (map->nodes[tree].interval.start < address) {
		uint32_t middle;
		split(map, map->nodes[tree].right, address, &middle, high);
		set_right(map->nodes, tree, middle);
		*low = tree;
	} else {
		uint32_t middle;
		split(map, map->nodes[tree].left, address, low, &middle);
		set_left(map->nodes, tree, middle);
		*high = tree;
	}
}

/* split(), after cutting the interval that lies across `address`, if any; takes at most one node. */
static void cut(struct interval_map *map, uint32_t tree, uint64_t address, uint32_t *low, uint32_t *high) {
	uint32_t across = tree;
	while (across != NONE) {
		const struct interval *here = &map->nodes[across].interval;
		if (here->end <= address)
			across = map->nodes[across].right;
		else if (here->start >= address)
			across = map->nodes[across].left;
		else
			break;
	}
	uint32_t upper = NONE;
	if (across != NONE) {
		struct interval rest = map->nodes[across].interval;
		map->nodes[across].interval.end = address;
		rest.image += address - rest.start;
		rest.start = address;
		upper = node_take(map, rest);
	}
	split(map, tree, address, low, high);
	*high = join(map, upper, *high);
}

static uint32_t leftmost(const struct interval_map *map, uint32_t tree) {
	while (tree != NONE && map->nodes[tree].left != NONE)
		tree = map->nodes[tree].left;
	return tree;
}

static uint32_t rightmost(const struct interval_map *map, uint32_t tree) {
	while (tree != NONE && map->nodes[tree].right != NONE)
		tree = map->nodes[tree].right;
	return tree;
}

static bool continues(const struct interval *one, const struct interval *next) {
	return one->end == next->start && one->backing == next->backing && one->flags == next->flags &&
	       one->image + (one->end - one->start) == next->image;
}

/* join(), and the two intervals at the seam become one if they continue each other. */
static uint32_t seam(struct interval_map *map, uint32_t low, uint32_t high) {
	uint32_t last = rightmost(map, low);
	uint32_t first = leftmost(map, high);
	if (last == NONE || first == NONE || !continues(&map->nodes[last].interval, &map->nodes[first].interval))
		return join(map, low, high);
	uint64_t end = map->nodes[first].interval.end;
	uint32_t dropped, rest;
	split(map, high, end, &dropped, &rest);
	tree_give(map, dropped);
	map->nodes[last].interval.end = end;
	return join(map, low, rest);
}

bool interval_map_find(const struct interval_map *map, uint64_t address, struct interval *found) {
	struct interval next;
	if (!interval_map_next(map, address, &next) || next.start > address)
		return false;
	*found = next;
	return true;
}

bool interval_map_before(const struct interval_map *map, uint64_t address, struct interval *found) {
	uint32_t best = NONE;
	for (uint32_t tree = map->root; tree != NONE;) {
		if (map->nodes[tree].interval.end <= address) {
			best = tree;
			tree = map->nodes[tree].right;
		} else {
			tree = map->nodes[tree].left;
		}
	}
	if (best == NONE)
		return false;
	*found = map->nodes[best].interval;
	return true;
}

bool interval_map_next(const struct interval_map *map, uint64_t address, struct interval *found) {
	uint32_t best = NONE;
	for (uint32_t tree = map->root; tree != NONE;) {
		if (map->nodes[tree].interval.end > address) {
			best = tree;
			tree = map->nodes[tree].left;
		} else {
			tree = map->nodes[tree].right;
		}
	}
	if (best == NONE)
		return false;
	*found = map->nodes[best].interval;
	return true;
}

/* The first of a tree that ends after `address` and has one of the flags. */
static uint32_t first_flagged(const struct interval_map *map, uint32_t tree, uint64_t address, uint32_t flags) {
	if (!(flags_of(map->nodes, tree) & flags))
		return NONE;
	const struct interval_node *node = &map->nodes[tree];
	if (node->interval.end > address) {
		uint32_t lower = first_flagged(map, node->left, address, flags);
		if (lower != NONE)
			return lower;
		if (node->interval.flags & flags)
			return tree;
	}
	return first_flagged(map, node->right, address, flags);
}

bool interval_map_flagged(const struct interval_map *map, uint64_t address, uint32_t flags, struct interval *found) {
	uint32_t first = first_flagged(map, map->root, address, flags);
	if (first == NONE)
		return false;
	*found = map->nodes[first].interval;
	return true;
}

/* Takes [start, end) out of the map; at most two nodes are taken from the pool. */
static void cut_out(struct interval_map *map, uint64_t start, uint64_t end, uint32_t *low, uint32_t *out, uint32_t *high) {
	uint32_t rest;
	cut(map, map->root, start, low, &rest);
	cut(map, rest, end, out, high);
	map->root = NONE;
}

int interval_map_erase(struct interval_map *map, uint64_t start, uint64_t end) {
	if (start >= end)
		return EINVAL;
	int error = reserve(map, 2);
	if (error)
		return error;
	uint32_t low, out, high;
	cut_out(map, start, end, &low, &out, &high);
	tree_give(map, out);
	map->root = join(map, low, high);
	return 0;
}

int interval_map_insert(struct interval_map *map, struct interval interval) {
	if (interval.start >= interval.end)
		return EINVAL;
	int error = reserve(map, 3);
	if (error)
		return error;
	uint32_t low, out, high;
	cut_out(map, interval.start, interval.end, &low, &out, &high);
	tree_give(map, out);
	map->root = seam(map, seam(map, low, node_take(map, interval)), high);
	return 0;
}

static void shift(struct interval_map *map, uint32_t tree, uint64_t distance) {
	if (tree == NONE)
		return;
	map->nodes[tree].interval.start += distance;
	map->nodes[tree].interval.end += distance;
	shift(map, map->nodes[tree].left, distance);
	shift(map, map->nodes[tree].right, distance);
}

int interval_map_move(struct interval_map *map, uint64_t from, uint64_t to, uint64_t length) {
	if (!length || from + length < from || to + length < to)
		return EINVAL;
	int error = reserve(map, 4);
	if (error)
		return error;
	uint32_t low, moved, high, dropped;
	cut_out(map, from, from + length, &low, &moved, &high);
	map->root = join(map, low, high);
	cut_out(map, to, to + length, &low, &dropped, &high);
	tree_give(map, dropped);
	shift(map, moved, to - from);
	map->root = seam(map, seam(map, low, moved), high);
	return 0;
}
