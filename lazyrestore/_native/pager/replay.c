#define _GNU_SOURCE
#include "replay.h"

#include "guards.h"
#include "pieces.h"
#include "uffd.h"
#include <errno.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/resource.h>

enum { BATCH = 128, RUNS_AT_ONCE = 16, MAX_SURPRISES = 32, MAX_THREADS = 8, NICE = 5 };

/* -- giving way ------------------------------------------------------------------------------------------------------- */

/* Facts: a new process and its restorer wake each other again and again until it runs. Who is woken is often queued behind a thread of
 * ours, though the other CPU is about to be idle, and waits there for the next tick (4 ms at 250 Hz, seen in half of the restores).
 * Choice: until it is likely to run, who brings the working set yields between pieces of some 50 us, holding nothing.
 * Cost: nothing if nobody waits; on a busy machine somebody else's turn, hardly twice, since that ends this time. */
enum { RUNS_AFTER_ATTACH_NS = 1500000, RUNS_AFTER_START_NS = 4000000 };

static void give_way(uint64_t until_ns) {
	if (now_ns() < until_ns)
		sched_yield();
}

/* -- mapping ----------------------------------------------------------------------------------------------------------- */

/* Pages of the image that are in the template; `copy`: to be installed as private copies, of `raw` if that is not NULL. */
struct run {
	uint64_t start, end; /* image addresses, and virtual ones */
	bool copy;
	const char *raw;
};

static struct uffd_result install_copy(struct space *space, struct run run, uint64_t start, uint64_t end) {
	uint64_t length = end - start < LR_MAX_CHUNK ? end - start : LR_MAX_CHUNK;
	if (run.raw)
		return uffd_copy(space->uffd, start, end, run.raw + (start - run.start));
	if (pread(space->pager->template.fd, space->unpacker.raw, length, (off_t)start) != (ssize_t)length)
		return (struct uffd_result){.code = EIO};
	return uffd_copy(space->uffd, start, start + length, space->unpacker.raw);
}

/* Installs [*at, end), which lies in one interval, and moves *at as far as it goes. EAGAIN: an event must be read first.
 * The kernel refuses a range that spans two VMAs (ENOENT), as a library's read-only and writable data do, whose bytes are
 * next to each other in the image: then less is tried, down to the VMA's end. */
static int map_piece(struct space *space, struct run run, uint64_t *at, uint64_t end) {
	uint64_t to = end;
	for (unsigned surprises = 0; *at < end && surprises < MAX_SURPRISES;) {
		enum guards guards = guards_avoid(space, *at, at, &to);
		if (guards == GUARDS_BUSY)
			return EAGAIN;
		if (guards == GUARDS_AT) {
			*at = to;
			to = end;
			continue;
		}
		struct uffd_result result = run.copy ? install_copy(space, run, *at, to) : uffd_continue(space->uffd, *at, to);
		stats_add(&space->stats, LR_COUNT_REPLAYED, result.done / LR_PAGE);
		*at += result.done;
		if (result.code == ENOENT && !result.done && to - *at > LR_PAGE) {
			to = *at + (to - *at) / LR_PAGE / 2 * LR_PAGE;
			continue;
		}
		to = end;
		if (result.done)
			continue;
		if (result.code != EEXIST)
			return result.code;
		surprises++;
		*at += LR_PAGE;
	}
	return 0;
}

/* Events and demand faults. False: the address space is gone. */
static bool serve_waiting(struct space *space) {
	uint32_t n_read;
	return space_drain(space, &n_read) && space_serve_all(space);
}

/* The parts of a run that still lie where they were. False: the address space is gone. */
static bool map_run(struct space *space, struct run run) {
	struct interval found;
	unsigned round = 0;
	for (uint64_t at = run.start; piece_next(&space->map, at, run.end, &found);) {
		bool in_place = found.image == found.start && found.backing == LR_BACKING_TEMPLATE && !found.flags;
		at = found.start;
		bool wanted = in_place && !(run.copy && space->has_own_pages);
		int error = wanted ? map_piece(space, run, &at, found.end) : 0;
		if (error == ESRCH)
			return false;
		if (error != EAGAIN) {
			at = found.end;
			continue;
		}
		/* The map may be another one afterwards. */
		space_await_event(space, round++);
		if (!serve_waiting(space))
			return false;
	}
	return true;
}

static int by_number(const void *a, const void *b) {
	uint32_t x = ((const struct lr_touched *)a)->chunk, y = ((const struct lr_touched *)b)->chunk;
	return (x > y) - (x < y);
}

/* Maps pages that are there, by chunks, sorted here, in runs. False: the address space is gone.
 * Facts: a process touches its pages in about the order in which they are brought. One that comes too early waits; if it is answered at
 * once, it is too early for the next page, too, and each time it costs two switches and a wake-up, 30 to 50 us.
 * Choice: while the restorer may be the one who waits (`soon`), faults are answered between runs, later only when all are mapped, and the
 * process has a hundred pages more. Cost: some 0.4 ms for who touches what is in no working set, and for an event. */
static bool map_chunks(struct space *space, struct lr_touched *touched, uint32_t n, bool soon) {
	const struct own_pages *own = &space->pager->own;
	struct run run = {0};
	unsigned runs = 0;
	qsort(touched, n, sizeof *touched, by_number);
	for (uint32_t i = 0; i < n; i++) {
		const struct lr_chunk *chunk = image_chunk(&space->pager->image, touched[i].chunk);
		const struct own_entry *entry = own_pages_find(own, touched[i].chunk);
		for (uint32_t page = 0; page < chunk->length / LR_PAGE; page++) {
			uint64_t at = chunk->address + page * (uint64_t)LR_PAGE;
			const char *raw = own_pages_bytes(own, entry, page);
			bool copy = raw || (page < 16 && touched[i].written >> page & 1);
			if (!image_has_page(touched[i].pages, page))
				continue;
			if (at != run.end || copy != run.copy || raw != (run.raw ? run.raw + (at - run.start) : NULL)) {
				if (!map_run(space, run))
					return false;
				if (++runs % RUNS_AT_ONCE == 0) {
					if (soon && !serve_waiting(space))
						return false;
					give_way(space->runs_ns);
				}
				run = (struct run){.start = at, .copy = copy, .raw = raw};
			}
			run.end = at + LR_PAGE;
		}
	}
	return map_run(space, run) && serve_waiting(space);
}

/* Whether what the template is to have of an entry is there: all but its own pages that are known. */
static bool is_there(const struct pager *pager, const struct lr_touched *touched) {
	const struct own_entry *entry = own_pages_find(&pager->own, touched->chunk);
	bool known = entry && atomic_load_explicit(&entry->there, memory_order_acquire);
	uint16_t pages = known ? touched->pages & ~entry->pages : touched->pages;
	if (known && !pages && touched->pages != ALL_PAGES)
		return true;
	return backing_has(&pager->template, touched->chunk, touched->pages == ALL_PAGES ? ALL_PAGES : pages);
}

/* Fills and maps the chunks of a list, which it reorders. */
static bool bring(struct space *space, struct lr_touched *touched, uint32_t n) {
	struct pager *pager = space->pager;
	bool alive = true;
	for (uint32_t done = 0; alive && done < n;) {
		/* Not all that is filled by now: sorted by address, what is touched first might come last. */
		uint32_t end = n - done < BATCH ? n : done + BATCH;
		uint32_t good = done;
		for (uint32_t i = done; alive && i < end; i++) {
			bool was_there = is_there(pager, &touched[i]);
			if (was_there || backing_fill(&pager->template, &pager->image, touched[i].chunk, &space->unpacker) == CHUNK_FILLED)
				touched[good++] = touched[i];
			if (!was_there)
				alive = serve_waiting(space);
		}
		if (alive)
			alive = map_chunks(space, touched + done, good - done, !done);
		done = end;
	}
	return alive;
}

/* A frame of the working set's pack that nobody has taken yet; NULL: there is none left. */
static const struct frame *next_frame(struct pager *pager) {
	uint32_t next = atomic_load(&pager->next_frame);
	if (next < pager->image.n_frames)
		next = atomic_fetch_add(&pager->next_frame, 1);
	return next < pager->image.n_frames ? &pager->image.frames[next] : NULL;
}

bool replay(struct space *space) {
	struct pager *pager = space->pager;
	uint32_t n;
	space->runs_ns = now_ns() + RUNS_AFTER_ATTACH_NS;
	for (const struct frame *frame; (frame = next_frame(pager));) {
		backing_fill_frame(&pager->template, &pager->image, frame, &pager->own, &space->unpacker);
		if (!serve_waiting(space))
			return false;
		give_way(space->runs_ns);
	}
	scoped_free struct lr_touched *touched = working_set_copy(&pager->working_set, &n);
	return bring(space, touched, n);
}

/* A list of all chunks of private memory; NULL: there are none, or no memory. */
static struct lr_touched *all_chunks(const struct backing *backing, uint32_t *n) {
	*n = backing->n < UINT32_MAX ? (uint32_t)backing->n : 0;
	struct lr_touched *all = *n ? calloc(*n, sizeof *all) : NULL;
	if (!all)
		*n = 0;
	for (uint32_t i = 0; i < *n; i++)
		all[i].chunk = (uint32_t)backing->first + i;
	return all;
}

bool replay_all(struct space *space) {
	uint32_t n;
	scoped_free struct lr_touched *all = all_chunks(&space->pager->template, &n);
	return bring(space, all, n);
}

/* -- filling ahead ----------------------------------------------------------------------------------------------------- */

struct prefetch {
	struct pager *pager;
	bool all; /* of private memory, when nobody else wants the CPU */
	uint64_t runs_ns; /* when the process that it is for is likely to run */
	struct lr_touched *touched;
	uint32_t n;
	_Atomic uint32_t next;
	_Atomic unsigned users;
};

static void prefetch_put(struct prefetch *work) {
	if (atomic_fetch_sub(&work->users, 1) == 1) {
		free(work->touched);
		free(work);
	}
}

static void *prefetch_main(void *argument) {
	struct prefetch *work = argument;
	struct pager *pager = work->pager;
	struct unpacker unpacker;
	prctl(PR_SET_NAME, "lr-prefetch");
	/* Whoever restores, and whoever faults, comes first. */
	const struct sched_param none = {0};
	if (!work->all)
		setpriority(PRIO_PROCESS, (id_t)gettid(), NICE);
	else
		sched_setscheduler(0, SCHED_IDLE, &none);
	if (!unpacker_init(&unpacker).code) {
		for (const struct frame *frame; !work->all && (frame = next_frame(pager));) {
			backing_fill_frame(&pager->template, &pager->image, frame, &pager->own, &unpacker);
			give_way(work->runs_ns);
		}
		for (uint32_t i; (i = atomic_fetch_add(&work->next, 1)) < work->n;) {
			const struct lr_touched *touched = &work->touched[i];
			if (work->all)
				backing_fill_at_leisure(&pager->template, &pager->image, touched->chunk, &unpacker);
			else
				backing_bring(&pager->template, &pager->image, touched->chunk, touched->pages, &unpacker);
		}
		unpacker_deinit(&unpacker);
	}
	if (work->all)
		atomic_store(&pager->all_filled, true);
	prefetch_put(work);
	return NULL;
}

static void start_threads(struct prefetch *work, unsigned threads) {
	for (unsigned i = 0; work->n && i < threads && i < MAX_THREADS; i++) {
		atomic_fetch_add(&work->users, 1);
		if (pager_thread(prefetch_main, work).code)
			prefetch_put(work);
	}
	prefetch_put(work);
}

void replay_prefetch(struct pager *pager) {
	struct prefetch *work = calloc(1, sizeof *work);
	if (!work)
		return;
	*work = (struct prefetch){.pager = pager, .users = 1, .runs_ns = now_ns() + RUNS_AFTER_START_NS};
	work->touched = working_set_copy(&pager->working_set, &work->n);
	if (pager->image.n_frames) { /* the rest of the list is in no frame */
		const struct frame *last = &pager->image.frames[pager->image.n_frames - 1];
		work->next = last->first + last->n;
	}
	cpu_set_t cpus;
	start_threads(work, sched_getaffinity(0, sizeof cpus, &cpus) ? 1 : (unsigned)CPU_COUNT(&cpus));
}

void replay_fill_idle(struct pager *pager) {
	if (atomic_exchange(&pager->filling_all, true))
		return;
	struct prefetch *work = calloc(1, sizeof *work);
	if (!work)
		return;
	*work = (struct prefetch){.pager = pager, .all = true, .users = 1};
	work->touched = all_chunks(&pager->template, &work->n);
	start_threads(work, 1);
}
