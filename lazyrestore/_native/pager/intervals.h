/* What the memory of a restored process shows where the process never wrote: for a snapshot of it (LR_INTERVALS).
 *
 * Facts: a private page is the process's own once it was written, which the kernel knows (/proc/PID/pagemap) and the pager
 * does not; what any other page shows, or would show if it were touched, is what its interval says. Shared memory is written in place,
 * by whoever maps it: only a chunk that was never filled is sure to be as it is stored.
 * Choice: the intervals as they are for private memory; of shared memory the pieces that lie in chunks not filled.
 * Consequence: this is true for as long as the process stands still. */
#pragma once
#include "pager.h"

/* Of the living process behind `pidfd`: sorted by start, allocated. ESRCH: it was not restored here. */
struct lr_error intervals_of(struct pager *pager, int pidfd, struct lr_range **ranges, uint32_t *n);
