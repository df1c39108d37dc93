#include "working_set.h"

#include "pager.h"
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { FIRST_CAPACITY = 1024 };
static const uint64_t QUIET_NS = 1000000000, LEAST_BYTES = 1 << 20, MOST_BYTES = 128 << 20;

void working_set_init(struct working_set *set, const struct image *image) {
	*set = (struct working_set){.state = WORKING_SET_NONE, .image = image, .pagemap = -1};
	pthread_mutex_init(&set->lock, NULL);
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
		if (image->working_set[i].chunk < image->n_chunks)
			set->chunks[set->n++] = image->working_set[i];
	set->capacity = image->n_working_set;
	set->state = WORKING_SET_KNOWN;
	return LR_OK;
}

bool working_set_claim(struct working_set *set, int32_t pid, bool again) {
	char path[64];
	SCOPED_LOCK(&set->lock);
	if (set->state == WORKING_SET_RECORDING || (set->state == WORKING_SET_KNOWN && !again))
		return false;
	set->member = calloc(set->image->n_chunks ? set->image->n_chunks : 1, 1);
	if (!set->member)
		return false;
	set->n_before = set->n;
	for (uint32_t i = 0; i < set->n; i++)
		set->member[set->chunks[i].chunk] = 1;
	snprintf(path, sizeof path, "/proc/%d/pagemap", (int)pid);
	set->pagemap = open(path, O_RDONLY | O_CLOEXEC); /* without it, nothing counts as written */
	set->state = WORKING_SET_RECORDING;
	set->last_ns = now_ns();
	return true;
}

/* Which pages of the chunk are anonymous now, in a process whose private memory lies at its image address. */
static uint32_t written_pages(int pagemap, const struct lr_chunk *chunk) {
	static const uint64_t PRESENT = 1ull << 63, OF_A_FILE = 1ull << 61;
	enum { MOST = 32 };
	uint64_t entries[MOST];
	uint32_t n = chunk->length / LR_PAGE < MOST ? chunk->length / LR_PAGE : MOST, written = 0;
	if (pread(pagemap, entries, n * sizeof *entries, (off_t)(chunk->address / LR_PAGE * sizeof *entries)) !=
	    (ssize_t)(n * sizeof *entries))
		return 0;
	for (uint32_t i = 0; i < n; i++)
		if ((entries[i] & (PRESENT | OF_A_FILE)) == PRESENT)
			written |= 1u << i;
	return written;
}

static bool end(struct working_set *set) {
	if (set->state != WORKING_SET_RECORDING)
		return false;
	set->state = WORKING_SET_KNOWN;
	set->fresh = set->n;
	for (uint32_t i = 0; set->pagemap >= 0 && i < set->n; i++)
		set->chunks[i].written |= written_pages(set->pagemap, &set->image->chunks[set->chunks[i].chunk]);
	if (set->pagemap >= 0)
		close(set->pagemap);
	set->pagemap = -1;
	free(set->member);
	set->member = NULL;
	return true;
}

void working_set_touch(struct working_set *set, uint64_t chunk) {
	SCOPED_LOCK(&set->lock);
	if (set->state != WORKING_SET_RECORDING || set->member[chunk])
		return;
	if (set->n == set->capacity) {
		uint32_t capacity = set->capacity ? 2 * set->capacity : FIRST_CAPACITY;
		struct lr_touched *more = realloc(set->chunks, capacity * sizeof *more);
		if (!more) {
			end(set);
			return;
		}
		set->chunks = more;
		set->capacity = capacity;
	}
	set->member[chunk] = 1;
	set->chunks[set->n++] = (struct lr_touched){.chunk = (uint32_t)chunk};
	set->bytes += set->image->chunks[chunk].length;
	set->last_ns = now_ns();
	if (set->bytes >= MOST_BYTES)
		end(set);
}

bool working_set_end(struct working_set *set) {
	SCOPED_LOCK(&set->lock);
	return end(set);
}

bool working_set_end_if_quiet(struct working_set *set) {
	SCOPED_LOCK(&set->lock);
	if (set->bytes < LEAST_BYTES || now_ns() - set->last_ns < QUIET_NS)
		return false;
	return end(set);
}

void working_set_end_of_process(struct working_set *set) {
	SCOPED_LOCK(&set->lock);
	bool said_nothing = set->bytes < LEAST_BYTES && set->n_before == 0;
	if (!end(set) || !said_nothing)
		return;
	set->state = WORKING_SET_NONE;
	set->fresh = false;
	set->n = 0;
	set->bytes = 0;
}

struct lr_touched *working_set_copy(struct working_set *set, uint32_t *n) {
	SCOPED_LOCK(&set->lock);
	struct lr_touched *copy = set->n ? malloc(set->n * sizeof *copy) : NULL;
	*n = copy ? set->n : 0;
	if (copy)
		memcpy(copy, set->chunks, set->n * sizeof *copy);
	return copy;
}

bool working_set_notice(struct working_set *set) {
	SCOPED_LOCK(&set->lock);
	bool fresh = set->fresh;
	set->fresh = false;
	return fresh;
}
