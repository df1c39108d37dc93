/* Counters and service times. Written by one thread without locks, read by any. */
#pragma once
#include "protocol.h"
#include <stdatomic.h>
#include <time.h>

/* Times in buckets of 1/8 of a power of two: a quantile is off by 12 % at most. */
enum { TIME_BUCKETS = 64 * 8 };

struct stats {
	_Atomic uint64_t counters[LR_N_COUNTERS];
	_Atomic uint64_t times[TIME_BUCKETS];
	_Atomic uint64_t max_ns;
};

struct quantiles {
	uint64_t samples, p50_ns, p99_ns, max_ns;
};

static inline void stats_add(struct stats *stats, int counter, uint64_t n) {
	atomic_fetch_add_explicit(&stats->counters[counter], n, memory_order_relaxed);
}

static inline uint64_t now_ns(void) {
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

void stats_time(struct stats *stats, uint64_t ns);
void stats_merge(struct stats *into, const struct stats *from);
void stats_counters(const struct stats *stats, uint64_t *counters);
struct quantiles stats_quantiles(const struct stats *stats);
