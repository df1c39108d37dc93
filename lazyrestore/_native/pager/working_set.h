/* The working set of a snapshot: the pages of private memory that a restored process touches first, by chunks, in that order.
 *
 * Choice: the first address space records, and so do the children it forks, until it has touched nothing new for a while,
 * or has ended, or a client says so, or asks for the memory of that process to snapshot it: what is read then is not what the
 * process needs. A process that has touched little may have hardly run yet (a server that waits for its first request), or need
 * no more. So what it touched is *kept* - the recorder stores it - whenever it has been quiet for some seconds, and the
 * recording goes on; if little has come since when it ends, that was the shutdown, and is dropped. And a small set
 * is extended by the next restore.
 * The list is bounded, since a process that reads all of its memory has no working set. Later address
 * spaces get these chunks before they ask (replay.h). Numbers are positions in the image's index, so they need no
 * translation, and each is checked when it comes from a store. Whenever a set is kept while its process lives,
 * /proc/PID/pagemap tells which of these pages are anonymous by then: the process has written them, and so will the next.
 * Of one that ends before, as a clone that has served its one request, nothing could be told afterwards. So at each touch
 * the chunk that was touched before it is looked at: who reads an object mostly writes it at once (its count of
 * references). That finds nine of ten pages written until the end, for a microsecond per touch; at the touch after
 * the next, or the 32nd, it would hardly be more. */
#pragma once
#include "image.h"
#include <pthread.h>

enum working_set_state { WORKING_SET_NONE, WORKING_SET_RECORDING, WORKING_SET_KNOWN };

struct working_set {
	pthread_mutex_t lock; /* guards all */
	enum working_set_state state;
	uint32_t recording; /* the number of the latest one */
	struct lr_touched *chunks; /* in the order of their first touch */
	uint32_t n, capacity;
	uint32_t n_kept; /* of these, known before this recording, or kept while it went on */
	uint64_t bytes, bytes_kept; /* raw, of this recording */
	bool keeps_all; /* somebody asked for this recording: whatever comes is kept */
	bool extended; /* by the next address space that may record: the set is small */
	uint32_t *member; /* per chunk of the image: its place in the list + 1, or 0; while recording */
	uint64_t last_ns; /* of the last new chunk */
	uint32_t latest;  /* place in the list + 1 of the chunk that was touched last; 0: none yet */
	bool fresh; /* something was kept and nobody has taken notice */
	int pagemap; /* of the process that records; owned */
	const struct image *image;
};

void working_set_init(struct working_set *set, const struct image *image);

/* What the image brought from its store; chunks beyond its index are dropped. */
struct lr_error working_set_load(struct working_set *set);

/* The number of a recording, which the caller's address space, of process `pid`, makes from now on; 0: it makes none.
 * `again`: even if a set is known, which it extends then. */
uint32_t working_set_claim(struct working_set *set, int32_t pid, bool again);

/* Whether the recording goes on. Those below that name one do nothing if it has ended. */
bool working_set_records(struct working_set *set, uint32_t recording);

/* Pages of chunk `chunk`, by lr_touched.pages, are touched by a space that records. */
void working_set_touch(struct working_set *set, uint32_t recording, uint64_t chunk, uint16_t pages);

/* Ends the recording; true if it was on. */
bool working_set_end(struct working_set *set);

/* The same, of any if `recording` is 0; another one goes on with it if it is small: somebody else is about to touch the
 * process's memory. */
bool working_set_end_early(struct working_set *set, uint32_t recording);

/* If it has found something, but nothing new for a while: keeps that, or ends. True if there is something to notice. */
bool working_set_keep_if_quiet(struct working_set *set, uint32_t recording);

/* The process that recorded has ended. If it had hardly run, as one that was only parked, the next one records. */
void working_set_end_of_process(struct working_set *set, uint32_t recording);

/* True once after a set was kept. */
bool working_set_notice(struct working_set *set);

/* Whether there is one, and no recording of it under way. */
bool working_set_is_known(struct working_set *set);

/* A copy, owned by the caller, NULL if there is nothing; `n` entries in first-touch order. */
struct lr_touched *working_set_copy(struct working_set *set, uint32_t *n);
