/* What the events of a window do to the map of their address space; see window.h for why it is not simple. */
#pragma once
#include "window.h"

struct event {
	uint64_t start, end; /* a REMAP's: its source */
	uint64_t to;
	struct origin shown; /* of what is moved, asked when the REMAP was read */
	bool slept;          /* `shown` is right: its caller slept when the kernel was asked */
	bool unmaps;         /* a REMAP's: the UNMAP of its source is sure to come */
	int32_t by;          /* the thread that made the call; 0: unknown */
	struct space *child; /* a FORK's */
	uint32_t number;     /* events are counted as they are read */
	uint32_t done;       /* a REMAP's: the number of its source's UNMAP, until which its caller slept; its own: none came */
	uint8_t kind;        /* UFFD_EVENT_… */
};

/* Of a REMAP: has the UNMAP of its source come? */
static inline bool event_unmaps(const struct event *event) {
	return event->done != event->number;
}

/* Is it known that these threads are two, or one? What one thread did is in the order of its events. */
static inline bool differ(int32_t a, int32_t b) {
	return a && b && a != b;
}

static inline bool same(int32_t a, int32_t b) {
	return a && a == b;
}

struct move {
	uint64_t from;
	uint64_t to;
	uint64_t length;
	uint32_t done; /* the event before which its caller cannot have made another call */
	bool left;     /* moved on, in the same window */
	int32_t by;
};

/* What lay where something else was put, or was unmapped: it may have left before that, as an event to come will tell. */
struct displaced {
	struct interval piece;
	int32_t by;        /* who did that, whose later calls cannot have been before it; 0: unknown */
	uint64_t unmapped; /* where that UNMAP began; 0: it was a REMAP */
};

/* The next event of the window's. 0 or ENOMEM. */
int apply_event(struct space *space, const struct event *event);

/* Of an address space that is gone: events that nobody can read any more. */
int apply_unread(struct space *space);

/* Is `piece` a part of what lay at `from` and is `origin`? Where that is not known, of course. */
bool belongs(struct interval piece, uint64_t from, struct origin origin);
