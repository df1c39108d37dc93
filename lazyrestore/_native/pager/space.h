/* One restored address space: its userfaultfd, its interval map, and the one thread that serves both.
 *
 * Facts: events tell what fork, mremap, munmap and madvise did, in order, and their callers sleep until the event is
 * read; but read(2) hands out page faults before events that were queued earlier. While an event is unread, every install
 * answers EAGAIN. A protection change is not told: a VMA may be split where the map shows one interval.
 * Consequence: only one thread installs pages and reads events; a fault is looked up in the map at the moment it is
 * served, again after each EAGAIN. An install that succeeds was made with a map that is up to date.
 * Choice, what an address means:
 *   in an interval                 the image at that address
 *   in a zero interval             zeros: private memory after MADV_DONTNEED (EVENT_REMOVE)
 *   in no interval                 a mapping grew there (mremap in place tells nothing): beyond a shared mapping's end the
 *                                  file goes on, anything else is zero
 * The order of events of calls that ran side by side is dealt with in window.h.
 * Another thread may look at the map (space_visit): the space's own thread changes it under map_lock, from the read of events to
 * their end, so that what a call of the process has done is in the map, or its window is open, before the call returns. map_lock may be
 * held when the pager's lock is taken, never the other way round.
 * MADV_REMOVE and MADV_DONTNEED of shared memory look the same: removal.h. */
#pragma once
#include "interval_map.h"
#include "pager.h"
#include "window.h"

/* interval.flags */
enum {
	INTERVAL_ZERO = 1,
	INTERVAL_SUSPECT = 2 /* perhaps not mapped any more; see window.h */
};

enum { ZERO_STREAMS = 8, CHUNK_STREAMS = 8 };

/* The last run of zeros of one of the threads that walk through memory, up or down: the next one will be longer. */
struct zero_stream {
	uint64_t start;
	uint64_t end;
};

/* A thread that walks up through memory: the image address that it will ask for next, of a page or of the chunk that holds it, and how
 * many of these it got ahead the last time. */
struct chunk_stream {
	uint64_t next;
	uint32_t ahead;
};

struct fault {
	uint64_t address;
	uint64_t read_ns;
	int32_t thread; /* in its own PID namespace */
};

struct space {
	struct pager *pager;
	struct space *next;
	uint64_t id;
	int uffd;  /* owned */
	int maps, task; /* owned; /proc/PID/maps and task, once they were asked (proc.h), else -1 */
	int pagemap; /* owned; /proc/PID/pagemap, or -1 (guards.h) */
	int pidfd; /* owned; -1: a forked child, or the process ended but its memory lives on (vfork) */
	int32_t pid;
	uint32_t generation;
	int child;         /* owned; a forked child's pidfd, once it was found (forked.h), else -1; changed under the pager's lock */
	int pid_namespace; /* owned; of its children, and a forked child's own, once they were asked for, else -1 */
	uint32_t looks;    /* at who the child is */
	bool poison; /* UFFDIO_POISON works */
	struct cgroup_keeper *keeper; /* one reference, or NULL */
	_Atomic uint32_t records; /* the recording of the working set that its faults make; 0: none */
	bool replays; /* it gets the working set */
	uint64_t runs_ns; /* when the process is likely to run by itself */
	bool has_own_pages; /* of it: those that are private copies */
	bool fill_now, fill_idle; /* it gets all of its private memory: after the working set; once it is filled */
	uint64_t bytes_registered;
	struct interval_map map;
	struct window window; /* while it is open, nothing is served */
	uint32_t window_events; /* read since it was opened, about */
	pthread_mutex_t map_lock; /* guards map and window against visitors */
	pthread_cond_t settled;   /* the window is closed, or the address space is gone */
	bool gone;                /* nobody looks after the map any more */
	unsigned visitors;        /* guarded by the pager's lock */
	pthread_cond_t left;      /* the last visitor has gone */
	_Atomic uint32_t intervals; /* map.count for other threads */
	struct backing **shared;    /* one reference each */
	uint32_t n_shared;
	struct unpacker unpacker;
	struct stats stats;
	struct latency_share latency;
	struct fault *faults; /* read, not yet served: [first, n_faults) */
	uint32_t first_fault, n_faults, faults_capacity;
	struct zero_stream streams[ZERO_STREAMS];
	unsigned next_stream;
	struct chunk_stream chunk_streams[CHUNK_STREAMS];
	unsigned next_chunk_stream;
};

/* Allocates; owns nothing yet. NULL: no memory. */
struct space *space_new(struct pager *pager);

/* Closes and frees all it owns, shared backings too. Not for one whose process may live. */
void space_free(struct space *space);

/* The address space that was restored as the living process behind a pidfd, and a copy of its map, made when no event is in doubt;
 * ESRCH: there is none. The space stays until space_leave(), and `map`, which the caller frees then, belongs to it. */
struct lr_error space_visit(struct pager *pager, int pidfd, struct space **space, struct interval_map *map);
void space_leave(struct space *space);

/* What is mapped at an address, told by the kernel. */
struct origin space_origin(struct space *space, uint64_t address);

/* The first piece from `start` on where the kernel shows one of the backings, if it begins before `end`. False: there is none, or nobody can be asked. */
bool space_mapped(struct space *space, uint64_t start, uint64_t end, struct interval *piece);

/* Adds it to the pager's list and starts its thread, which owns it from then on. On failure it stays the caller's. */
struct lr_error space_start(struct space *space);

/* The backing behind an interval. */
struct backing *space_backing(struct space *space, uint32_t kind);

/* Reads all messages: events change the map, faults join the queue. False: the space cannot be kept right. */
bool space_drain(struct space *space, uint32_t *n_read);

/* After EAGAIN, for the `round`th time: waits for an event, or for the thread whose event was read. True: there is an event. */
bool space_await_event(struct space *space, unsigned round);

/* Serves the faults that were read. False: the address space is gone. */
bool space_serve_all(struct space *space);

/* A child that cannot be served must not run on zeros: its descriptor stays open, and its first fault waits, until it is killed
 * when the pager leaves. Frees `child`, which may be NULL, without its descriptor. */
void space_orphan(struct space *parent, struct space *child, struct lr_error error);

/* Kills the process, for want of a way to give it the right bytes. */
void space_kill(struct space *space, const char *why);

/* serve.c */
enum verdict { SERVED, AGAIN, DEAD };
enum verdict serve_fault(struct space *space, const struct fault *fault);
