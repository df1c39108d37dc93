/* Guard pages (MADV_GUARD_INSTALL) that a restored process makes.
 *
 * Facts (mm/madvise.c, mm/userfaultfd.c, Linux 6.15 to 6.18; tried): no event tells of them. Who touches one gets SIGSEGV, and no fault is
 * told. Mappings of files can have them since 6.15. UFFDIO_CONTINUE and UFFDIO_COPY take a guard for a page that is missing, and replace it;
 * UFFDIO_ZEROPAGE and UFFDIO_POISON refuse (EEXIST). What lay under a guard is dropped: private memory reads zero once it is removed.
 * PAGEMAP_SCAN tells where guards are, in 0.7 us for 4 pages as for 512.
 * Choice: that is asked before contents are installed, which then go round the guards; and the map says zero there from then on.
 * What remains: a guard that is installed in the microsecond between look and install is lost; one that is removed again before anything
 * was installed around it was never seen: the old contents are there. Nothing tells the pager of either. */
#pragma once
#include "space.h"

/* Of a process that stands still, or has just been let go: asked later, /proc might show another program's memory. */
void guards_begin(struct space *space);

/* Narrows [*start, *end) to the part around `at` that has no guard pages. */
enum guards {
	GUARDS_AVOIDED,
	GUARDS_AT,  /* the page at `at` is one; they end at *end, or go on there */
	GUARDS_BUSY /* an event must be read first */
};
enum guards guards_avoid(struct space *space, uint64_t at, uint64_t *start, uint64_t *end);
