/* Answering one page fault: what belongs at the address, and one ioctl that puts it there, with its neighbourhood. */
#include "forked.h"
#include "guards.h"
#include "log.h"
#include "uffd.h"
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/mman.h>

enum { CHUNKS_AHEAD_MAX = 16, PAGES_AHEAD_MAX = 64, ZERO_BLOCK = 64 * 1024, ZERO_RUN_MAX = 2 * 1024 * 1024, MAX_SKIPS = 4 };

enum install { INSTALL_CONTINUE, INSTALL_ZERO, INSTALL_COPY_ZERO, INSTALL_POISON };

/* What to put where. [start, end) contains `at`, the page that somebody waits for; the rest is a favour. */
struct job {
	enum install what;
	uint64_t at;
	uint64_t start;
	uint64_t end;
	uint32_t page; /* bytes */
	bool shared;
};

static struct uffd_result attempt(int uffd, enum install what, uint64_t start, uint64_t end) {
	static const void *_Atomic huge_zeros;
	switch (what) {
	case INSTALL_CONTINUE:
		return uffd_continue(uffd, start, end);
	case INSTALL_ZERO:
		return uffd_zero(uffd, start, end);
	case INSTALL_POISON:
		return uffd_poison(uffd, start, end);
	case INSTALL_COPY_ZERO:
		break;
	}
	if (!huge_zeros) {
		void *zeros = mmap(NULL, LR_HUGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
		if (zeros == MAP_FAILED)
			return (struct uffd_result){.code = ENOMEM};
		huge_zeros = zeros; /* two threads at once waste one mapping of the zero page */
	}
	return uffd_copy(uffd, start, start + LR_HUGE, huge_zeros);
}

static enum verdict poison(struct space *space, struct job job);

/* Halves [start, end) around `at`: the range may span VMAs, which one ioctl does not. */
static void halve(struct job *job) {
	uint64_t half = (job->end - job->start) / 2 / job->page * job->page;
	if (job->at < job->start + half)
		job->end = job->start + half;
	else
		job->start += half;
}

static void count_pages(struct space *space, enum install what, uint64_t bytes) {
	if (bytes && what != INSTALL_POISON)
		stats_add(&space->stats, what == INSTALL_CONTINUE ? LR_COUNT_PAGES : LR_COUNT_ZERO_PAGES, bytes / LR_PAGE);
}

/* One page of a file's contents, unless it is a guard page by now. */
static struct uffd_result show_file(struct space *space, uint64_t at, uint32_t page) {
	uint64_t start = at, end = at + page;
	enum guards guards = guards_avoid(space, at, &start, &end);
	if (guards != GUARDS_AVOIDED)
		return (struct uffd_result){.code = guards == GUARDS_AT ? EEXIST : EAGAIN};
	return uffd_continue(space->uffd, start, end);
}

/* One page of a shared file that no chunk covers: it is there if the process wrote it, else it is zero. */
static struct uffd_result settle_shared(struct space *space, uint64_t at, uint32_t page) {
	struct uffd_result result = show_file(space, at, page);
	if (result.code == EFAULT)
		result = uffd_zero(space->uffd, at, at + page);
	return result;
}

/* Whether a huge page of zeros could not be had. Fact (mm/hugetlb.c, hugetlb_mfill_atomic_pte(), Linux 6.18; tried): UFFDIO_COPY then answers
 * EEXIST, too, once the page table has room for an entry; the process would fault there for ever. Nobody but the caller's thread installs
 * anything, so what was not there before a second attempt, of which EEXIST is said, is not there at all. */
static bool none_left(const struct space *space, uint64_t at) {
	uint64_t entry;
	ssize_t n = space->pagemap < 0 ? -1 : pread(space->pagemap, &entry, sizeof entry, (off_t)(at / LR_PAGE * sizeof entry));
	return n == sizeof entry && !(entry >> 62) && attempt(space->uffd, INSTALL_COPY_ZERO, at, at + LR_HUGE).code == EEXIST;
}

static enum verdict give_up(struct space *space, struct job job, int code) {
	log_line("snapshot %s: process %d: page %#llx cannot be installed: %s", space->pager->image.name, (int)space->pid,
		 (unsigned long long)job.at, strerror(code));
	if (job.what == INSTALL_POISON) {
		space_kill(space, "a page can be neither installed nor poisoned");
		return DEAD;
	}
	job.what = INSTALL_POISON;
	job.start = job.at;
	job.end = job.at + job.page;
	return poison(space, job);
}

static enum verdict install(struct space *space, struct job job) {
	bool served = false; /* the page at job.at is there */
	if (job.what == INSTALL_CONTINUE && job.page == LR_PAGE) {
		if (forked_sought(space)) {
			job.start = job.at;
			job.end = job.at + job.page;
		}
		enum guards guards = guards_avoid(space, job.at, &job.start, &job.end);
		if (guards == GUARDS_BUSY)
			return AGAIN;
		if (guards == GUARDS_AT) { /* since its fault: who waits there gets the signal */
			uffd_wake(space->uffd, job.at, job.at + job.page);
			return SERVED;
		}
	}
	while (job.start < job.end) {
		struct uffd_result result = attempt(space->uffd, job.what, job.start, job.end);
		if (job.shared && result.code == (job.what == INSTALL_ZERO ? EEXIST : EFAULT) && !result.done)
			result = settle_shared(space, job.start, job.page);
		count_pages(space, job.what, result.done);
		if (job.at - job.start < result.done)
			served = true;
		job.start += result.done;
		if (result.done)
			continue; /* EAGAIN here means only that it stopped; the next attempt tells why */
		switch (result.code) {
		case 0:
			break;
		case EAGAIN:
			return served ? SERVED : AGAIN;
		case EEXIST:
			stats_add(&space->stats, LR_COUNT_EEXIST, 1);
			if (job.start == job.at) {
				if (job.what == INSTALL_COPY_ZERO && none_left(space, job.at))
					return give_up(space, job, ENOMEM);
				if (job.what == INSTALL_ZERO) /* or the file's, if it is shared and the map has lost it */
					show_file(space, job.at, job.page);
				uffd_wake(space->uffd, job.at, job.at + job.page);
				served = true;
			} else if (served && job.what != INSTALL_CONTINUE) {
				return SERVED;
			}
			job.start += job.page;
			break;
		case ENOENT:
			if (served)
				return SERVED;
			if (job.end - job.start > job.page) {
				halve(&job);
				break;
			}
			stats_add(&space->stats, LR_COUNT_GONE, 1);
			uffd_wake(space->uffd, job.at, job.at + job.page);
			return SERVED;
		case ESRCH:
			return DEAD;
		default:
			if (served)
				return SERVED;
			if (job.start != job.at) { /* not the page that matters */
				job.start += job.page;
				break;
			}
			return give_up(space, job, result.code);
		}
	}
	return SERVED;
}

static enum verdict poison(struct space *space, struct job job) {
	if (!space->poison) { /* before Linux 6.6 */
		space_kill(space, "damaged memory, and this kernel cannot mark it");
		return DEAD;
	}
	job.what = INSTALL_POISON;
	enum verdict verdict = install(space, job);
	if (verdict == SERVED)
		stats_add(&space->stats, LR_COUNT_POISON, 1);
	return verdict;
}

static uint64_t later(uint64_t a, uint64_t b) {
	return a > b ? a : b;
}

static uint64_t earlier(uint64_t a, uint64_t b) {
	return a < b ? a : b;
}

/* What the kernel shows at an address that no interval holds. A forked child's cannot be asked about: there it goes on from the interval
 * before it, if one VMA holds both. */
static struct origin origin_beyond(struct space *space, const struct interval *before, uint64_t address) {
	struct origin origin = space_origin(space, address);
	uint64_t page = space_backing(space, before->backing)->page;
	if (origin.known || uffd_probe(space->uffd, before->end - page, (address & ~(page - 1)) + page) != PROBE_REGISTERED)
		return origin;
	return (struct origin){true, before->backing, before->image + (address - before->start)};
}

/* The interval that decides about `address`. What no interval holds belongs to a mapping that grew: where it is shared, its file
 * goes on, one page at a time, since others may have grown beyond it; else it is zero. */
static struct interval locate(struct space *space, uint64_t address) {
	struct interval found, next, before = {.backing = LR_BACKING_TEMPLATE};
	if (interval_map_find(&space->map, address, &found))
		return found;
	uint64_t end = interval_map_next(&space->map, address, &next) ? next.start : LR_ADDRESS_END;
	struct interval grown = {.end = end, .backing = LR_BACKING_TEMPLATE, .flags = INTERVAL_ZERO};
	if (interval_map_before(&space->map, address, &before))
		grown.start = before.end;
	if (!space->n_shared && before.backing == LR_BACKING_TEMPLATE)
		return grown; /* what all of it is */
	struct origin origin = before.end ? origin_beyond(space, &before, address) : space_origin(space, address);
	if (origin.known && origin.backing >= LR_BACKING_SHARED) {
		uint64_t page = space_backing(space, origin.backing)->page;
		grown.start = address & ~(page - 1);
		grown.end = earlier(grown.start + page, end);
		grown.image = origin.image - (address - grown.start);
		grown.flags = 0;
	}
	if (origin.known)
		grown.backing = origin.backing;
	return grown;
}

/* Narrows the job to what to fill for this fault: twice as much as the last time, in the direction of a stream that goes
 * on at either end of its last run, or else the aligned block around the fault. */
static struct zero_stream *choose_run(struct space *space, struct job *job) {
	for (unsigned i = 0; i < ZERO_STREAMS; i++) {
		struct zero_stream *stream = &space->streams[i];
		uint64_t run = earlier(2 * (stream->end - stream->start), ZERO_RUN_MAX);
		if (!run || (job->at != stream->end && job->at + job->page != stream->start))
			continue;
		run = later(run, ZERO_BLOCK);
		if (job->at == stream->end) {
			job->start = job->at;
			job->end = earlier(job->end, job->at + run);
		} else {
			job->start = later(job->start, later(job->at + job->page, run) - run);
			job->end = job->at + job->page;
		}
		return stream;
	}
	uint64_t block = job->at & ~(uint64_t)(ZERO_BLOCK - 1);
	job->start = later(job->start, block);
	job->end = earlier(job->end, block + ZERO_BLOCK);
	return &space->streams[space->next_stream++ % ZERO_STREAMS];
}

/* Zeros below the page that was asked for: a favour, given up at the first surprise. */
static void zero_below(struct space *space, uint64_t start, uint64_t end) {
	for (unsigned skips = 0; start < end;) {
		struct uffd_result result = uffd_zero(space->uffd, start, end);
		count_pages(space, INSTALL_ZERO, result.done);
		start += result.done;
		if (result.done || !result.code)
			continue;
		if (result.code != EEXIST || ++skips > MAX_SKIPS)
			return;
		stats_add(&space->stats, LR_COUNT_EEXIST, 1);
		start += LR_PAGE;
	}
}

/* What is to do once the page that was asked for is there. */
struct favour {
	uint64_t zero_start, zero_end; /* zeros to put below it; empty: none */
	struct backing *backing; /* the rest of chunk `chunk` is to be written; NULL: no */
	uint64_t chunk;
};

static enum verdict serve_zero(struct space *space, struct job job, struct favour *favour) {
	struct zero_stream *stream = NULL;
	uint64_t start = job.at;
	if (job.page == LR_HUGE) {
		job.what = INSTALL_COPY_ZERO;
		job.start = job.at;
		job.end = job.at + LR_HUGE;
	} else {
		job.what = INSTALL_ZERO;
		stream = choose_run(space, &job);
		start = job.start;
		job.start = job.at;
	}
	enum verdict verdict = install(space, job);
	if (verdict != SERVED)
		return verdict;
	stats_add(&space->stats, LR_COUNT_ZERO, 1);
	if (stream) {
		*stream = (struct zero_stream){.start = start, .end = job.end};
		favour->zero_start = start;
		favour->zero_end = job.at;
	}
	return SERVED;
}

/* Whether a fault of this space tells which single pages it touches: then it gets no more than these. */
static bool records_pages(const struct space *space, const struct backing *backing, const struct lr_chunk *chunk) {
	return space->records && backing->kind == LR_BACKING_TEMPLATE && chunk->length <= 16 * LR_PAGE;
}

/* Image addresses [from, to), of which the first lies in chunk `chunk`, and no hole. */
static void record(struct space *space, const struct backing *backing, uint64_t chunk, uint64_t from, uint64_t to) {
	for (; space->records && backing->kind == LR_BACKING_TEMPLATE && from < to; chunk++) {
		const struct lr_chunk *about = image_chunk(&space->pager->image, chunk);
		uint64_t stop = earlier(about->address + about->length, to);
		uint64_t first = (from - about->address) / LR_PAGE, n = (stop - from) / LR_PAGE;
		uint16_t pages = records_pages(space, backing, about) ? (uint16_t)(((1u << n) - 1) << first) : ALL_PAGES;
		working_set_touch(&space->pager->working_set, space->records, chunk, pages);
		from = stop;
	}
}

/* How much to bring behind what was asked for, which begins at image address `asked`: nothing, unless a stream goes on there. */
static struct chunk_stream *choose_stream(struct space *space, uint64_t asked, uint32_t most) {
	for (unsigned i = 0; i < CHUNK_STREAMS; i++) {
		struct chunk_stream *stream = &space->chunk_streams[i];
		if (!stream->next || stream->next != asked)
			continue;
		stream->ahead = stream->ahead ? 2 * stream->ahead : 1;
		if (stream->ahead > most)
			stream->ahead = most;
		return stream;
	}
	struct chunk_stream *stream = &space->chunk_streams[space->next_chunk_stream++ % CHUNK_STREAMS];
	*stream = (struct chunk_stream){0};
	return stream;
}

/* Fills what lies behind a page that was asked for, or its chunk if not `single`, for a thread that walks through memory, and moves the
 * job's end there: it is mapped with it, since the walker would ask for it before it could be brought behind its back. None if
 * somebody else waits. `fresh`: the chunk was not filled before; if it was, others are not either: who reads what is left of it may be
 * a snapshot, which goes no further. */
static void fill_ahead(struct space *space, struct backing *backing, const struct interval *interval, uint64_t chunk, bool single,
		       bool fresh, struct job *job) {
	const struct image *image = &space->pager->image;
	const struct lr_chunk *about = image_chunk(image, chunk);
	uint64_t asked = interval->image + (job->at - interval->start), end = interval->image + (job->end - interval->start);
	uint64_t limit = interval->image + (interval->end - interval->start);
	struct chunk_stream *stream = single ? choose_stream(space, asked, PAGES_AHEAD_MAX)
					     : choose_stream(space, about->address, CHUNKS_AHEAD_MAX);
	uint64_t stop = earlier(end + stream->ahead * (single ? LR_PAGE : (uint64_t)about->length), limit);
	if (end < stop)
		backing_finish(backing, image, chunk, &space->unpacker);
	if (end < stop && backing_fill(backing, image, chunk, &space->unpacker) != CHUNK_FILLED)
		stop = end;
	while (end < stop) {
		if (end == about->address + about->length) {
			struct pollfd waiting = {.fd = space->uffd, .events = POLLIN};
			if (++chunk == backing->first + backing->n || (++about)->address != end ||
			    (!single && about->length > stop - end) || poll(&waiting, 1, 0) ||
			    (!single && !fresh && !backing_has(backing, chunk, ALL_PAGES)) ||
			    backing_fill(backing, image, chunk, &space->unpacker) != CHUNK_FILLED)
				break;
		}
		end = earlier(about->address + about->length, stop);
	}
	stream->next = end;
	job->end = interval->start + (end - interval->image);
}

static enum verdict serve_page(struct space *space, uint64_t address, struct favour *favour) {
	const struct image *image = &space->pager->image;
	struct interval interval = locate(space, address);
	struct backing *backing = space_backing(space, interval.backing);
	if (space->records && !working_set_records(&space->pager->working_set, space->records))
		space->records = 0;
	struct job job = {.page = backing->page, .shared = interval.backing >= LR_BACKING_SHARED};
	job.at = address & ~(uint64_t)(job.page - 1);
	job.start = interval.start;
	job.end = interval.end;
	if (interval.flags & INTERVAL_ZERO)
		return serve_zero(space, job, favour);

	uint64_t wanted = interval.image + (job.at - interval.start);
	struct image_place place = image_find(image, wanted);
	if (job.end - job.at > place.end - wanted)
		job.end = job.at + (place.end - wanted);
	if (wanted - place.start < job.at - interval.start)
		job.start = job.at - (wanted - place.start);
	if (place.damaged) {
		job.start = job.at;
		job.end = job.at + job.page;
		return poison(space, job);
	}
	if (place.hole && backing->page == LR_HUGE && (place.start > wanted || place.end < wanted + LR_HUGE))
		return poison(space, job); /* a part of it is stored: a huge page arrives whole or not at all */
	if (place.hole)
		return serve_zero(space, job, favour);
	job.what = INSTALL_CONTINUE;
	const struct lr_chunk *chunk = image_chunk(image, place.chunk);
	uint32_t page = (uint32_t)((wanted - chunk->address) / LR_PAGE);
	bool single = records_pages(space, backing, chunk), fresh = !backing_has(backing, place.chunk, ALL_PAGES);
	bool there = single ? backing_bring_page(backing, image, place.chunk, page, &space->unpacker)
			    : backing_fill(backing, image, place.chunk, &space->unpacker) == CHUNK_FILLED;
	/* Of a damaged chunk, the working set's pack may have brought some pages. */
	bool alone = !there && backing_has_page(backing, place.chunk, page);
	if (!there && !alone)
		return poison(space, job);
	if (single || alone) {
		job.start = job.at;
		job.end = job.at + LR_PAGE;
	}
	if (!alone && backing->page == LR_PAGE && (single || place.end - wanted == job.end - job.at))
		fill_ahead(space, backing, &interval, place.chunk, single, fresh, &job);
	enum verdict verdict = install(space, job);
	if (verdict == SERVED)
		record(space, backing, place.chunk, later(place.start, wanted - (job.at - job.start)), wanted + (job.end - job.at));
	favour->backing = backing;
	favour->chunk = place.chunk;
	return verdict;
}

enum verdict serve_fault(struct space *space, const struct fault *fault) {
	struct favour favour = {0};
	enum verdict verdict = serve_page(space, fault->address, &favour);
	if (verdict != SERVED)
		return verdict;
	stats_time(&space->stats, now_ns() - fault->read_ns);
	zero_below(space, favour.zero_start, favour.zero_end);
	if (favour.backing)
		backing_finish(favour.backing, &space->pager->image, favour.chunk, &space->unpacker);
	return SERVED;
}
