#include "working_set.h"

#include "array.h"
#include "pager.h"
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static const uint64_t QUIET_NS = 1000000000, LEAST_BYTES = 1 << 20, MOST_BYTES = 128 << 20;
static const uint64_t LONG_QUIET_NS = 3000000000; /* of a process that has touched less than LEAST_BYTES */

void working_set_init(struct working_set *set, const struct image *image) {
	*set = (struct working_set){.state = WORKING_SET_NONE, .image = image, .pagemap = -1};
	pthread_mutex_init(&set->lock, NULL);
}

static bool is_small(const struct working_set *set) {
	uint64_t bytes = 0;
	for (uint32_t i = 0; i < set->n && bytes < LEAST_BYTES; i++)
		bytes += image_touched_bytes(set->image, &set->chunks[i]);
	return bytes < LEAST_BYTES;
}

struct lr_error working_set_load(struct working_set *set) {
	const struct image *image = set->image;
	SCOPED_LOCK(&set->lock);
	if (!image->n_working_set)
		return LR_OK;
	set->chunks = malloc(image->n_working_set * sizeof *set->chunks);
	if (!set->chunks)
		return lr_fail("malloc", ENOMEM, 0);
	for (uint32_t i = 0; i < image->n_working_set; i++)
		if (image->working_set[i].chunk < image->n_chunks) {
			struct lr_touched touched = image->working_set[i];
			if (touched.pages != ALL_PAGES)
				touched.pages |= touched.written;
			set->chunks[set->n++] = touched;
		}
	set->capacity = image->n_working_set;
	set->state = WORKING_SET_KNOWN;
	set->extended = is_small(set);
	return LR_OK;
}

uint32_t working_set_claim(struct working_set *set, int32_t pid, bool again) {
	char path[64];
	SCOPED_LOCK(&set->lock);
	if (set->state == WORKING_SET_RECORDING || (set->state == WORKING_SET_KNOWN && !again && !set->extended))
		return 0;
	set->member = calloc(set->image->n_chunks + 1, sizeof *set->member);
	if (!set->member)
		return 0;
	set->n_kept = set->n;
	set->bytes = set->bytes_kept = 0;
	set->latest = 0;
	set->keeps_all = again;
	for (uint32_t i = 0; i < set->n; i++)
		set->member[set->chunks[i].chunk] = i + 1;
	snprintf(path, sizeof path, "/proc/%d/pagemap", (int)pid);
	set->pagemap = open(path, O_RDONLY | O_CLOEXEC); /* without it, nothing counts as written */
	set->state = WORKING_SET_RECORDING;
	set->last_ns = now_ns();
	set->recording += set->recording == UINT32_MAX ? 2 : 1;
	return set->recording;
}

static bool is_on(const struct working_set *set, uint32_t recording) {
	return set->state == WORKING_SET_RECORDING && set->recording == recording;
}

/* Which pages of the chunk are anonymous now, in a process whose private memory lies at its image address. */
static uint16_t written_pages(int pagemap, const struct lr_chunk *chunk) {
	static const uint64_t PRESENT = 1ull << 63, OF_A_FILE = 1ull << 61;
	enum { MOST = 16 };
	uint64_t entries[MOST];
	uint32_t n = chunk->length / LR_PAGE < MOST ? chunk->length / LR_PAGE : MOST;
	uint16_t written = 0;
	if (pread(pagemap, entries, n * sizeof *entries, (off_t)(chunk->address / LR_PAGE * sizeof *entries)) !=
	    (ssize_t)(n * sizeof *entries))
		return 0;
	for (uint32_t i = 0; i < n; i++)
		if ((entries[i] & (PRESENT | OF_A_FILE)) == PRESENT)
			written |= (uint16_t)(1u << i);
	return written;
}

/* What its process has written of a chunk by now; nothing new if it has ended. */
static void look(const struct working_set *set, struct lr_touched *touched) {
	if (set->pagemap >= 0)
		touched->written |= written_pages(set->pagemap, image_chunk(set->image, touched->chunk));
	if (touched->pages != ALL_PAGES)
		touched->pages |= touched->written;
}

static void keep(struct working_set *set) {
	for (uint32_t i = 0; i < set->n; i++)
		look(set, &set->chunks[i]);
	set->n_kept = set->n;
	set->bytes_kept = set->bytes;
	set->fresh = set->n;
}

static void stop(struct working_set *set) {
	set->state = set->n ? WORKING_SET_KNOWN : WORKING_SET_NONE;
	if (set->pagemap >= 0)
		close(set->pagemap);
	set->pagemap = -1;
	free(set->member);
	set->member = NULL;
}

static bool end(struct working_set *set, bool early) {
	if (set->state != WORKING_SET_RECORDING)
		return false;
	keep(set);
	set->extended = early && is_small(set);
	stop(set);
	return true;
}

/* The entry of a chunk, made if it has none; NULL: no memory. */
static struct lr_touched *entry_of(struct working_set *set, uint64_t chunk) {
	if (set->member[chunk])
		return &set->chunks[set->member[chunk] - 1];
	struct lr_touched *chunks = array_room(set->chunks, set->n, &set->capacity, sizeof *chunks);
	if (!chunks)
		return NULL;
	set->chunks = chunks;
	set->chunks[set->n++] = (struct lr_touched){.chunk = (uint32_t)chunk};
	set->member[chunk] = set->n;
	return &chunks[set->n - 1];
}

bool working_set_records(struct working_set *set, uint32_t recording) {
	SCOPED_LOCK(&set->lock);
	return is_on(set, recording);
}

void working_set_touch(struct working_set *set, uint32_t recording, uint64_t chunk, uint16_t pages) {
	SCOPED_LOCK(&set->lock);
	if (!is_on(set, recording))
		return;
	uint32_t known = set->n;
	struct lr_touched *touched = entry_of(set, chunk);
	if (!touched) {
		end(set, false);
		return;
	}
	if (set->latest)
		look(set, &set->chunks[set->latest - 1]);
	set->latest = set->member[chunk];
	uint64_t before = 0;
	if (set->n > known) {
		touched->pages = pages;
	} else {
		before = image_touched_bytes(set->image, touched);
		touched->pages = touched->pages == ALL_PAGES || pages == ALL_PAGES ? ALL_PAGES : touched->pages | pages;
	}
	uint64_t more = image_touched_bytes(set->image, touched) - before;
	if (more)
		set->last_ns = now_ns();
	set->bytes += more;
	if (set->bytes >= MOST_BYTES)
		end(set, false);
}

bool working_set_end(struct working_set *set) {
	SCOPED_LOCK(&set->lock);
	return end(set, false);
}

bool working_set_end_early(struct working_set *set, uint32_t recording) {
	SCOPED_LOCK(&set->lock);
	return (!recording || recording == set->recording) && end(set, true);
}

bool working_set_keep_if_quiet(struct working_set *set, uint32_t recording) {
	SCOPED_LOCK(&set->lock);
	bool small = set->bytes < LEAST_BYTES;
	if (!is_on(set, recording) || now_ns() - set->last_ns < (small ? LONG_QUIET_NS : QUIET_NS))
		return false;
	if (!small)
		return end(set, false);
	if (set->bytes == set->bytes_kept)
		return false;
	keep(set);
	return true;
}

void working_set_end_of_process(struct working_set *set, uint32_t recording) {
	SCOPED_LOCK(&set->lock);
	if (!is_on(set, recording))
		return;
	if (set->bytes - set->bytes_kept < LEAST_BYTES && !set->keeps_all)
		set->n = set->n_kept;
	else
		keep(set);
	set->extended = is_small(set);
	stop(set);
}

struct lr_touched *working_set_copy(struct working_set *set, uint32_t *n) {
	SCOPED_LOCK(&set->lock);
	struct lr_touched *copy = set->n ? malloc(set->n * sizeof *copy) : NULL;
	*n = copy ? set->n : 0;
	if (copy)
		memcpy(copy, set->chunks, set->n * sizeof *copy);
	return copy;
}

bool working_set_is_known(struct working_set *set) {
	SCOPED_LOCK(&set->lock);
	return set->state == WORKING_SET_KNOWN;
}

bool working_set_notice(struct working_set *set) {
	SCOPED_LOCK(&set->lock);
	bool fresh = set->fresh;
	set->fresh = false;
	return fresh;
}
