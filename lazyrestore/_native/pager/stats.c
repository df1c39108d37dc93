#include "stats.h"

static unsigned bucket(uint64_t ns) {
	if (ns < 8)
		return (unsigned)ns;
	unsigned power = 63 - (unsigned)__builtin_clzll(ns);
	return (power - 2) * 8 + (unsigned)(ns >> (power - 3) & 7);
}

/* The largest value that falls into bucket `index`. */
static uint64_t bucket_end(unsigned index) {
	if (index < 8)
		return index;
	unsigned power = index / 8 + 2;
	return ((uint64_t)(index % 8 + 9) << (power - 3)) - 1;
}

void stats_time(struct stats *stats, uint64_t ns) {
	atomic_fetch_add_explicit(&stats->times[bucket(ns)], 1, memory_order_relaxed);
	if (ns > atomic_load_explicit(&stats->max_ns, memory_order_relaxed))
		atomic_store_explicit(&stats->max_ns, ns, memory_order_relaxed);
}

void stats_merge(struct stats *into, const struct stats *from) {
	for (int i = 0; i < LR_N_COUNTERS; i++)
		into->counters[i] += from->counters[i];
	for (int i = 0; i < TIME_BUCKETS; i++)
		into->times[i] += from->times[i];
	if (from->max_ns > into->max_ns)
		into->max_ns = from->max_ns;
}

void stats_counters(const struct stats *stats, uint64_t *counters) {
	for (int i = 0; i < LR_N_COUNTERS; i++)
		counters[i] = atomic_load_explicit(&stats->counters[i], memory_order_relaxed);
}

struct quantiles stats_quantiles(const struct stats *stats) {
	struct quantiles result = {.max_ns = stats->max_ns};
	for (int i = 0; i < TIME_BUCKETS; i++)
		result.samples += stats->times[i];
	uint64_t below = 0;
	for (unsigned i = 0; i < TIME_BUCKETS; i++) {
		below += stats->times[i];
		uint64_t value = bucket_end(i) < result.max_ns ? bucket_end(i) : result.max_ns;
		if (!result.p50_ns && below * 2 >= result.samples && below)
			result.p50_ns = value;
		if (!result.p99_ns && below * 100 >= result.samples * 99 && below)
			result.p99_ns = value;
	}
	return result;
}
