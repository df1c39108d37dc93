/* One order of the calls of a window, tried on what lay where they have to do, and held against what the kernel shows there at the end; see
 * history.h. */
#pragma once
#include "apply.h"
#include <linux/userfaultfd.h>

/* What must be assumed, weighed: that a mapping grew; that it did before it was cut off from that; that a call unmapped what was not mapped; that
 * an event overtook another; that something lay there which nobody knows. Not that two threads used the same memory within a window:
 * a thread passes memory on, or ends, and another frees it at once. */
enum { GROWTH = 1, OLD_GROWTH = 2, GAP = 1, INVERSION = 1, UNKNOWN = 4 };

/* Where a mapping may have been cut: what it had grown by went on from here. */
struct anchor {
	uint64_t at;
	uint64_t image;
	uint32_t backing;
	uint64_t limit; /* something else lay from there on */
};

struct range {
	uint64_t start, end;
};

struct history {
	struct space *space;
	const struct event *events;
	uint32_t n;
	uint32_t n_calls;         /* events, but for those that are a part of another's call */
	uint32_t *low;            /* of each event: what was read until then was before its call */
	uint32_t *host;           /* of each event: the REMAP of the same call, or itself */
	uint32_t *begun;          /* of each event: when its call's first one was read */
	struct interval_map scene; /* what lay where the events have to do, before them */
	struct interval_map *truth; /* what the kernel shows there now, and right behind */
	struct interval_map now;   /* the scene in a replay; flags: the event that put it, + 1, shifted */
	struct anchor *anchors;
	uint32_t n_anchors, anchors_capacity;
	uint32_t budget;
};

/* How far a replay came, and what was wrong. */
struct outcome {
	int error;
	bool possible;
	uint32_t position; /* of the first event that is not possible; n: the end is not what the kernel shows */
	uint32_t cost; /* of what must be assumed */
	struct range wrong[2];
};

static inline bool is_move(const struct event *event) {
	return event->kind == UFFD_EVENT_REMAP;
}

static inline bool maps_away(const struct event *event) {
	return event->kind == UFFD_EVENT_REMAP || event->kind == UFFD_EVENT_UNMAP;
}

static inline struct range destination(const struct event *event) {
	return is_move(event) ? (struct range){event->to, event->to + (event->end - event->start)} : (struct range){0, 0};
}

/* Fills the scene. 0 or ENOMEM. */
int scene_set(struct history *history);

/* What the kernel shows now where events have to do, and right behind, goes to `truth`. 0 or ENOMEM. */
int scene_ask(struct space *space, const struct event *events, uint32_t n, struct interval_map *truth);

/* `order`: the numbers of the events, without those that belong to another's call. */
struct outcome scene_replay(struct history *history, const uint32_t *order);
