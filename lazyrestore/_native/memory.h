/* Reading another process's memory in bulk. */
#pragma once
#include <stddef.h>
#include <stdint.h>

struct lr_run { /* one run of memory: `length` bytes at `address` go to `offset` in the buffer */
	uint64_t address, offset, length;
};

/* Copy runs[0 … count) from process `pid` into buffer, by `threads` threads. 0, or -errno with *failed = the address. */
int lr_copy_runs(int32_t pid, const struct lr_run *runs, size_t count, void *buffer, int32_t threads, uint64_t *failed);

/* The populated ranges of [start, end) by PAGEMAP_SCAN (Linux 6.7) on a descriptor of /proc/PID/pagemap: pages that are
 * present or swapped and not the kernel's zero page; with `anonymous`, only those that are no page of a file. Returns
 * how many ranges (start, end pairs) were written to `ranges`; when room runs out, *next is where to go on, else *next
 * == end. -errno on failure (-ENOTTY: an older kernel). */
int64_t lr_scan_populated(int32_t pagemap, uint64_t start, uint64_t end, int32_t anonymous, uint64_t *ranges, size_t room,
			  uint64_t *next);
