/* Reading another process's memory in bulk. */
#pragma once
#include <stddef.h>
#include <stdint.h>

struct lr_run { /* one run of memory: `length` bytes at `address` go to `offset` in the buffer */
	uint64_t address, offset, length;
};

/* Copy runs[0 … count) from process `pid` into buffer, by `threads` threads. 0, or -errno with *failed = the address. */
int lr_copy_runs(int32_t pid, const struct lr_run *runs, size_t count, void *buffer, int32_t threads, uint64_t *failed);

/* The entry of that type in the auxiliary vector of a process that stands at its first instruction with that stack pointer; 0 if
 * there is none. */
uint64_t lr_auxiliary_value(int32_t pid, uint64_t stack, uint64_t type);

/* Pages that are present or swapped, by what they are. */
enum {
	LR_PAGES_WITH_CONTENT = 0, /* not the kernel's zero page */
	LR_PAGES_OWN = 1,	   /* the process's own: neither the zero page nor a page of a file */
	LR_PAGES_ZERO = 2,	   /* the kernel's zero page */
	LR_PAGES_OF_FILE = 3,
	LR_PAGES_GUARD = 4 /* a guard page (MADV_GUARD_INSTALL); none before Linux 6.15 */
};

/* The ranges of [start, end) whose pages are of that kind, by PAGEMAP_SCAN (Linux 6.7) on a descriptor of /proc/PID/pagemap.
 * With LR_PAGES_WITH_CONTENT guard pages (MADV_GUARD_INSTALL) come too, from Linux 6.15 on, as ranges of their own whose end
 * is odd. Returns how many ranges (start, end pairs) were written to `ranges`; when room runs out, *next is where to go on,
 * else *next == end. -errno on failure (-ENOTTY: an older kernel). */
int64_t lr_scan_pages(int32_t pagemap, uint64_t start, uint64_t end, int32_t kind, uint64_t *ranges, size_t room,
		      uint64_t *next);
