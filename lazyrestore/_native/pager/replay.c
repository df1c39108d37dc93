#define _GNU_SOURCE
#include "replay.h"

#include "uffd.h"
#include <errno.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/resource.h>

enum { BATCH = 64, MAX_SURPRISES = 32, MAX_THREADS = 8, NICE = 5 };

/* -- mapping ----------------------------------------------------------------------------------------------------------- */

/* Installs [start, end), which lies in one interval, as far as it goes. EAGAIN: an event must be read first. */
static int map_piece(struct space *space, uint64_t start, uint64_t end) {
	for (unsigned surprises = 0; start < end && surprises < MAX_SURPRISES;) {
		struct uffd_result result = uffd_continue(space->uffd, start, end);
		stats_add(&space->stats, LR_COUNT_REPLAYED, result.done / LR_PAGE);
		start += result.done;
		if (result.done || !result.code)
			continue;
		if (result.code != EEXIST)
			return result.code;
		surprises++;
		start += LR_PAGE;
	}
	return 0;
}

/* The parts of the filled image range [start, end) that still lie where they were. */
static int map_run(struct space *space, uint64_t start, uint64_t end) {
	struct interval found;
	for (uint64_t at = start; at < end && interval_map_next(&space->map, at, &found) && found.start < end; at = found.end) {
		bool in_place = found.image == found.start && found.backing == LR_BACKING_TEMPLATE && !found.flags;
		if (!in_place)
			continue;
		uint64_t from = found.start > at ? found.start : at, to = found.end < end ? found.end : end;
		int error = map_piece(space, from, to);
		if (error == EAGAIN || error == ESRCH)
			return error;
		found.end = to;
	}
	return 0;
}

/* Events and demand faults first. False: the address space is gone. */
static bool serve_waiting(struct space *space) {
	uint32_t n_read;
	return space_drain(space, &n_read) && space_serve_all(space);
}

static int by_number(const void *a, const void *b) {
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
	return (x > y) - (x < y);
}

/* Maps filled chunks, sorted here, run by run. False: the address space is gone. */
static bool map_chunks(struct space *space, uint32_t *chunks, uint32_t n) {
	const struct lr_chunk *index = space->pager->image.chunks;
	qsort(chunks, n, sizeof *chunks, by_number);
	for (uint32_t i = 0; i < n;) {
		uint64_t start = index[chunks[i]].address, end = start + index[chunks[i]].length;
		for (i++; i < n && index[chunks[i]].address == end; i++)
			end += index[chunks[i]].length;
		int error = map_run(space, start, end);
		if (error == ESRCH)
			return false;
		if (!serve_waiting(space)) /* after EAGAIN the run is left to its faults */
			return false;
	}
	return true;
}

bool replay(struct space *space) {
	struct pager *pager = space->pager;
	uint32_t n;
	scoped_free uint32_t *chunks = working_set_copy(&pager->working_set, &n);
	bool alive = true;
	for (uint32_t done = 0; alive && done < n;) {
		/* All that is filled by now, at least a batch. */
		uint32_t end = done;
		while (end < n && (end < done + BATCH || backing_is_filled(&pager->template, chunks[end])))
			end++;
		uint32_t good = done;
		for (uint32_t i = done; alive && i < end; i++) {
			bool was_filled = backing_is_filled(&pager->template, chunks[i]);
			if (backing_fill(&pager->template, &pager->image, chunks[i], &space->unpacker) == CHUNK_FILLED)
				chunks[good++] = chunks[i];
			if (!was_filled)
				alive = serve_waiting(space);
		}
		if (alive)
			alive = map_chunks(space, chunks + done, good - done);
		done = end;
	}
	return alive;
}

/* -- filling ahead ----------------------------------------------------------------------------------------------------- */

struct prefetch {
	struct pager *pager;
	uint32_t *chunks;
	uint32_t n;
	_Atomic uint32_t next;
	_Atomic unsigned users;
};

static void prefetch_put(struct prefetch *work) {
	if (atomic_fetch_sub(&work->users, 1) == 1) {
		free(work->chunks);
		free(work);
	}
}

static void *prefetch_main(void *argument) {
	struct prefetch *work = argument;
	struct pager *pager = work->pager;
	struct unpacker unpacker;
	prctl(PR_SET_NAME, "lr-prefetch");
	setpriority(PRIO_PROCESS, (id_t)gettid(), NICE); /* whoever restores, and whoever faults, comes first */
	if (!unpacker_init(&unpacker).code) {
		for (uint32_t i; (i = atomic_fetch_add(&work->next, 1)) < work->n;)
			backing_fill(&pager->template, &pager->image, work->chunks[i], &unpacker);
		unpacker_deinit(&unpacker);
	}
	prefetch_put(work);
	return NULL;
}

void replay_prefetch(struct pager *pager) {
	struct prefetch *work = calloc(1, sizeof *work);
	if (!work)
		return;
	work->pager = pager;
	work->users = 1;
	work->chunks = working_set_copy(&pager->working_set, &work->n);
	cpu_set_t cpus;
	unsigned threads = sched_getaffinity(0, sizeof cpus, &cpus) ? 1 : (unsigned)CPU_COUNT(&cpus);
	for (unsigned i = 0; work->n && i < threads && i < MAX_THREADS; i++) {
		atomic_fetch_add(&work->users, 1);
		if (pager_thread(prefetch_main, work).code)
			prefetch_put(work);
	}
	prefetch_put(work);
}
