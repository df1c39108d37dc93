/* Events whose order is not the order of what they tell, and how the truth is found.
 *
 * Facts (fs/userfaultfd.c, mm/mremap.c, Linux 6.18): fork, mremap and munmap change the address space under mmap_lock and count it in
 * mmap_changing, drop the lock, and only then queue their event and sleep until it is read; mmap_changing falls when
 * the sleeper has run. While it is not zero, every install answers EAGAIN. So events of one thread, or of threads that wait for one another, are
 * queued in the order of what happened, but those of calls that ran side by side may not be: A unmaps R, B's mremap is given R by the kernel,
 * and B's event comes first. A mremap that moves tells REMAP, then UNMAP of just its source, unless it was MREMAP_DONTUNMAP.
 * REMOVE is queued before memory is dropped, and changes no mapping.
 * Consequence: a window is open from the first such event read until an ioctl does not answer EAGAIN: then every call that the window's
 * events tell of is over, and none of its events is missing. Nothing can be installed meanwhile. Growth tells nothing, so of an UNMAP
 * or REMAP of what a mapping grew by only the calling thread tells whose it is (callers.h).
 * Choice: the events are kept, in the order in which they were read, and the map is changed when the window closes (apply.h). So it is known
 * of each REMAP whether its UNMAP came, that is, whether its caller slept until then. If so, what the kernel shows at its destination when
 * the REMAP is read is what was moved. If not, the source is still mapped: the kernel is asked about it before the REMAP is read, while its caller
 * sleeps; where nobody looked, the map is taken to be right about it.
 * A thread that calls without a pause keeps it open for hundreds of events, whose order nobody finds. So a long one is closed, too, where
 * all threads sleep, one of them before the last event of its call and the others in none: what the kernel shows then is how the calls ended.
 * When it closes, the events are put into the order in which their calls were made, if one is found (history.h); then each changes the map as
 * it stands. What follows is for windows for which none is found, and for forked children.
 * Only these orders matter to a program that does not itself race for an address:
 *   UNMAP over what a REMAP of the window moved there      is older, if it is read before that of the REMAP's source: its mover slept. Else it
 *                                                          is newer, if it is by the same thread, and may be older, if it is by
 *                                                          another: the interval stays, as a suspect. Of unknown threads it may be
 *                                                          older if something was displaced there, which it explains, or if it
 *                                                          hits other things, too
 *   REMAP to where the map holds something                 that has left, by a call whose event comes later: it is kept, displaced
 *   UNMAP by a known thread                                what lay there may have left before a neighbour grew over it: kept, too
 *   REMAP                                                  takes what the kernel showed, of what is in the map or was displaced by
 *                                                          others: a neighbour may have grown over what the map has there
 *   UNMAP or REMAP read after a FORK                       may be older than it: what lay there is a suspect in the child
 * What is read before a FORK is over when the child first runs, for none of its callers can have waited for the fork's return: so it
 * was before the fork, or beside it, when no program can know which.
 * While the process has one thread (and nobody shares its memory by a bare CLONE_VM), events come as calls happened, and
 * none of this is needed: they change the map at once, and only a fork opens a window.
 * Then each suspect is held against the kernel: a UFFDIO_COPY from where nothing can be read ends
 * in ENOENT where nothing is registered and in EFAULT where something is, and changes nothing. What is not registered is erased,
 * and what is, but is another part of the file (a neighbour grew over it, which no event tells).
 * Cost: two or three short system calls of the pager after each munmap, mremap and fork, none of which their caller waits for; and a
 * forked child's first fault waits for the end of calls that its parent's other threads had begun. A forked child's pid is
 * not known, so the kernel cannot be asked what it shows there, only whether it is registered: of its own moves told in another order,
 * the oldest that was displaced is taken; and where one of several threads unmaps, another grows a neighbour over it and forks before the
 * first call is told, the child reads there what was unmapped. A program that races itself (one thread reads in a forked child
 * what another was unmapping, moving or dropping at the moment of the fork) may read zeros there. */
#pragma once
#include "interval_map.h"

struct space;
struct event;
struct move;
struct displaced;
struct call;

/* What the kernel shows at an address: a byte of one of the backings. */
struct origin {
	bool known;
	uint32_t backing;
	uint64_t image; /* of that byte */
};

struct window {
	bool open;
	bool in_order;        /* at each of its events so far the process had one thread */
	bool ordered;         /* while its events are applied: in the order of their calls, as found (history.h) */
	uint32_t attempts;    /* at closing it, between which another call was made */
	bool changed;         /* an UNMAP or REMAP was among those applied */
	bool forked;          /* a FORK was among its events: a child waits */
	struct event *events; /* read, not yet applied */
	uint32_t n_events, events_capacity;
	uint32_t n_read; /* of them */
	struct move *moves; /* its REMAPs, from the first that may not be in order */
	uint32_t n_moves, moves_capacity;
	struct displaced *displaced; /* by REMAPs and UNMAPs, the oldest first */
	uint32_t n_displaced, displaced_capacity;
	uint64_t remap_ns; /* when the last REMAP was read that may not be in order; 0: none. It outlives the window */
	bool moved; /* something was, ever, or by a parent: then two places may show the same */
	struct call *calls; /* in which threads slept before the event that is being read (callers.h) */
	uint32_t n_calls, calls_capacity;
	bool last;                 /* the event behind the last one is expected; when it is read all calls are over, see window_look() */
	struct interval_map shown; /* what the kernel shows then */
	uint32_t next_look;        /* at how many events */
	int32_t running; /* the one thread that seems to run, and was seen in none of them; 0: none, -1: several */
	struct space *unborn; /* chained: children whose map is made */
};

void window_init(struct window *window);

/* Starts the unborn children of an address space that is gone. */
void window_abandon(struct space *space);

/* No child may be unborn. */
void window_deinit(struct window *window);

/* To be called after callers_look(), before a message is read: a window in which a thread calls without a pause would grow for ever; so where
 * it is certain what the kernel shows at the end of the call under way, its events are applied then. */
void window_look(struct space *space);

/* The events, as they are read. 0 or an errno: the map can no longer be trusted. */
int window_unmap(struct space *space, uint64_t start, uint64_t end);
int window_remove(struct space *space, uint64_t start, uint64_t end);

/* `sleeps`: if an UNMAP is to follow, its caller cannot have been woken yet. */
int window_remap(struct space *space, uint64_t from, uint64_t to, uint64_t length, bool sleeps);

/* Takes `child`, whose map is still empty, when it succeeds; it is started when the window closes. */
int window_fork(struct space *space, struct space *child);

enum closing { WINDOW_CLOSED, WINDOW_OPEN, WINDOW_GONE };

/* Closes the window if no call is under way; else drain and try again. WINDOW_GONE: no address space, or no memory (it was killed). */
enum closing window_close(struct space *space);
