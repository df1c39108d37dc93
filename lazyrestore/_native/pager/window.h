/* Events whose order is not the order of what they tell, and how the truth is found.
 *
 * Facts (fs/userfaultfd.c, mm/mremap.c, Linux 6.18): fork, mremap and munmap change the address space under mmap_lock and count it in
 * mmap_changing, drop the lock, and only then queue their event and sleep until it is read; mmap_changing falls when
 * the sleeper has run. While it is not zero, every install answers EAGAIN. So events of one thread, or of threads that wait for one another, are
 * queued in the order of what happened, but those of calls that ran side by side may not be: A unmaps R, B's mremap is given R by the kernel,
 * and B's event comes first. A mremap that moves tells REMAP, then UNMAP of its source, unless it was MREMAP_DONTUNMAP.
 * REMOVE is queued before memory is dropped, and changes no mapping.
 * Consequence: a window is open from the first such event read until an ioctl does not answer EAGAIN: then every call that the window's
 * events tell of is over. Nothing can be installed meanwhile. Only these orders matter to a program that does not itself race for an address:
 *   UNMAP over what a REMAP of the window moved there      may be older than it: the interval stays, as a suspect
 *   REMAP to where the map holds something                 that has left, by a call whose event comes later: it is kept, displaced
 *   REMAP from where something was moved or displaced      may be older than that move: the kernel is asked what it moved. It is
 *                                                          still there, since its mover sleeps until its UNMAP is read
 *   UNMAP or REMAP read beside a FORK, before or after     the child may have been copied on either side of it: its map is made of
 *                                                          all that was there at some time of the window, each of it a suspect;
 *                                                          a move happened before if its destination is registered in the child
 * While the process has one thread (and nobody shares its memory by a bare CLONE_VM), events come as calls happened, and
 * none of this is needed.
 * Choice: when the window closes, each suspect is held against the kernel: a UFFDIO_COPY from where nothing can be read ends
 * in ENOENT where nothing is registered and in EFAULT where something is, and changes nothing. What is not registered is erased,
 * and what is, but is another part of the file (a neighbour grew over it, which no event tells).
 * Cost: two or three short system calls of the pager after each munmap, mremap and fork, none of which their caller waits for; and a
 * forked child's first fault waits for the end of calls that its parent's other threads had begun. A forked child's pid is
 * not known, so it cannot be asked about: there the oldest that was displaced is taken. What stays open: a program
 * that races for an address itself (one thread reads in a forked child what another was unmapping or dropping at the moment of the fork) may
 * see a mix of before and after; and if one of several threads unmaps, grows a neighbour over it, and forks, all within one window, the
 * child reads there what was unmapped. */
#pragma once
#include "interval_map.h"

struct space;
struct move;

struct window {
	bool open;
	bool in_order;             /* at each of its events so far the process had one thread */
	bool changed;              /* an UNMAP or REMAP was among its events */
	struct interval_map taken; /* what these took away, wherever it was */
	struct move *moves;        /* its REMAPs, from the first that may not be in order */
	uint32_t n_moves, moves_capacity;
	struct interval *displaced; /* overwritten by REMAPs, the oldest first */
	uint32_t n_displaced, displaced_capacity;
	struct move *inherited; /* a child's: the moves of the parent's window in which it was forked, */
	uint32_t n_inherited;
	uint32_t n_before; /* so many of them read before the fork; `taken` is the parent's of then */
	struct space *unborn; /* chained: children that wait for the window to close */
};

void window_init(struct window *window);

/* Starts the unborn children of an address space that is gone. */
void window_abandon(struct space *space);

/* No child may be unborn. */
void window_deinit(struct window *window);

/* The events. 0 or an errno: the map can no longer be trusted. */
int window_unmap(struct space *space, uint64_t start, uint64_t end);
int window_remap(struct space *space, uint64_t from, uint64_t to, uint64_t length);

/* Takes `child`, whose map is a copy of the parent's, when it succeeds; it is started when the window closes. */
int window_fork(struct space *space, struct space *child);

enum closing { WINDOW_CLOSED, WINDOW_OPEN, WINDOW_GONE };

/* Closes the window if no call is under way; else drain and try again. WINDOW_GONE: no address space, or no memory (it was killed). */
enum closing window_close(struct space *space);
