/* Giving an address space its working set before it asks.
 *
 * Facts: CONTINUE over a run of pages costs a fraction of a fault each, and a fault is two context switches. A page that is
 * there already (EEXIST), a range that changed hands (ENOENT) or an event under way (EAGAIN) are no errors: whoever
 * touches the page faults as ever. Choice: the space's own thread replays, before and between its other work, so that the
 * rules of space.h hold without a word more; demand faults and events go first, every few runs. Of a parked clone, the thread that
 * registers it does, before the clone can run (attach.c). In a new pager, threads that run since its start fill the chunks in first-touch
 * order, and the space's thread follows them. Pages are mapped in that order, too, but for each hundred chunks in runs by address: by
 * address as a whole, what the process asks for first may come last. Pages that the recorded process had written are installed as private
 * copies (UFFDIO_COPY into a private file mapping makes anonymous memory): the kernel's own copy would cost the process a fault. Those of a
 * pack never were in the template (own_pages.h). */
#pragma once
#include "space.h"

/* False: the address space is gone. */
bool replay(struct space *space);

/* Brings all private memory. False: the address space is gone. */
bool replay_all(struct space *space);

/* Starts, once, a thread that fills all chunks of private memory when nobody else wants the CPU; sets pager->all_filled. */
void replay_fill_idle(struct pager *pager);

/* Starts the threads that fill the chunks of the working set; they end with it. No threads is no error. */
void replay_prefetch(struct pager *pager);
