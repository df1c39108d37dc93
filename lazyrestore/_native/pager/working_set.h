/* The working set of a snapshot: the chunks of private memory that a restored process touches first, in that order.
 *
 * Choice: the first address space records, and so do the children it forks, until it has touched nothing new for a while,
 * or has ended, or a client says so; a process that has hardly run yet (a server that waits for its first request) is not
 * done recording. The list is bounded, since a process that reads all of its memory has no working set. Later address
 * spaces get these chunks before they ask (replay.h). Numbers are positions in the image's index, so they need no
 * translation, and each is checked when it comes from a store. At the end of a recording that the process outlives,
 * /proc/PID/pagemap tells which of these pages are anonymous by then: the process has written them, and so will the next. */
#pragma once
#include "image.h"
#include <pthread.h>

enum working_set_state { WORKING_SET_NONE, WORKING_SET_RECORDING, WORKING_SET_KNOWN };

struct working_set {
	pthread_mutex_t lock; /* guards all */
	enum working_set_state state;
	struct lr_touched *chunks; /* in the order of their first touch */
	uint32_t n, capacity;
	uint32_t n_before; /* known before this recording */
	uint64_t bytes; /* raw */
	uint8_t *member; /* a byte per chunk of the image; while recording */
	uint64_t last_ns; /* of the last new chunk */
	bool fresh; /* a recording has ended and nobody has taken notice */
	int pagemap; /* of the process that records; owned */
	const struct image *image;
};

void working_set_init(struct working_set *set, const struct image *image);

/* What the image brought from its store; chunks beyond its index are dropped. */
struct lr_error working_set_load(struct working_set *set);

/* True: the caller's address space, of process `pid`, records from now on; `again`: even if a set is known, which it
 * extends then. */
bool working_set_claim(struct working_set *set, int32_t pid, bool again);

/* Chunk `chunk` is touched by a space that records. */
void working_set_touch(struct working_set *set, uint64_t chunk);

/* These end the recording; true if it was on. */
bool working_set_end(struct working_set *set);
bool working_set_end_if_quiet(struct working_set *set); /* if it has found something, but nothing new for a while */

/* The process that recorded has ended. If it had hardly run, as one that was only parked, the next one records. */
void working_set_end_of_process(struct working_set *set);

/* True once after each recording that has ended with something in it. */
bool working_set_notice(struct working_set *set);

/* A copy, owned by the caller, NULL if there is nothing; `n` entries in first-touch order. */
struct lr_touched *working_set_copy(struct working_set *set, uint32_t *n);
