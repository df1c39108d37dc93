#include "working_set.h"

#include "stats.h"
#include <errno.h>
#include <string.h>

enum { LEAST_CHUNKS = 64, CAPACITY = 1024 };
static const uint64_t QUIET_NS = 1000000000, MOST_BYTES = 128u << 20;

struct scoped_lock {
	pthread_mutex_t *mutex;
};

static void unlock(struct scoped_lock *lock) {
	pthread_mutex_unlock(lock->mutex);
}
#define LOCKED(set)                                                                                                    \
	__attribute__((cleanup(unlock), unused)) struct scoped_lock locked = {&(set)->lock};                           \
	pthread_mutex_lock(&(set)->lock)

void working_set_init(struct working_set *set) {
	*set = (struct working_set){.state = WORKING_SET_NONE};
	pthread_mutex_init(&set->lock, NULL);
}

struct lr_error working_set_load(struct working_set *set, const struct image *image, const uint32_t *chunks, uint32_t n) {
	LOCKED(set);
	if (!n)
		return LR_OK;
	set->chunks = malloc(n * sizeof *chunks);
	if (!set->chunks)
		return lr_fail("malloc", ENOMEM, 0);
	for (uint32_t i = 0; i < n; i++)
		if (chunks[i] < image->n_chunks)
			set->chunks[set->n++] = chunks[i];
	set->capacity = n;
	set->state = WORKING_SET_KNOWN;
	return LR_OK;
}

bool working_set_claim(struct working_set *set, const struct image *image) {
	LOCKED(set);
	if (set->state != WORKING_SET_NONE)
		return false;
	set->member = calloc(image->n_chunks ? image->n_chunks : 1, 1);
	set->chunks = malloc(CAPACITY * sizeof *set->chunks);
	if (!set->member || !set->chunks) {
		free(set->member);
		free(set->chunks);
		set->member = NULL;
		set->chunks = NULL;
		return false;
	}
	set->capacity = CAPACITY;
	set->state = WORKING_SET_RECORDING;
	set->last_ns = now_ns();
	return true;
}

static bool end(struct working_set *set) {
	if (set->state != WORKING_SET_RECORDING)
		return false;
	set->state = WORKING_SET_KNOWN;
	free(set->member);
	set->member = NULL;
	return true;
}

void working_set_touch(struct working_set *set, const struct image *image, uint64_t chunk) {
	LOCKED(set);
	if (set->state != WORKING_SET_RECORDING || set->member[chunk])
		return;
	if (set->n == set->capacity) {
		uint32_t *more = realloc(set->chunks, 2ull * set->capacity * sizeof *more);
		if (!more) {
			end(set);
			return;
		}
		set->chunks = more;
		set->capacity *= 2;
	}
	set->member[chunk] = 1;
	set->chunks[set->n++] = (uint32_t)chunk;
	set->bytes += image->chunks[chunk].length;
	set->last_ns = now_ns();
	if (set->bytes >= MOST_BYTES)
		end(set);
}

bool working_set_end(struct working_set *set, bool if_quiet) {
	LOCKED(set);
	if (if_quiet && (set->n < LEAST_CHUNKS || now_ns() - set->last_ns < QUIET_NS))
		return false;
	return end(set);
}

uint32_t *working_set_copy(struct working_set *set, uint32_t *n) {
	LOCKED(set);
	uint32_t *copy = set->n ? malloc(set->n * sizeof *copy) : NULL;
	*n = copy ? set->n : 0;
	if (copy)
		memcpy(copy, set->chunks, set->n * sizeof *copy);
	return copy;
}

bool working_set_is_recorded(struct working_set *set) {
	LOCKED(set);
	return set->state == WORKING_SET_KNOWN && set->n;
}
