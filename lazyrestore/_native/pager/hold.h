/* Holding the inode lock of a memory file, so that nothing can be punched out of it meanwhile.
 *
 * Facts (mm/shmem.c, mm/filemap.c, Linux 5.14 to 6.18): write(2) takes the inode lock of its file, then copies from the writer's
 * memory, whatever fault that takes; fallocate, by which MADV_REMOVE punches, takes the lock first of all. A fault on a mapping of the
 * file does not take it. A write whose source turns out to be unreadable writes nothing: EFAULT.
 * Choice: a thread writes from a page that is registered with a userfaultfd of our own; while its fault waits, the lock is held. To end
 * it the page is made unreadable. It has the lock when its fault is told.
 * Consequence: contents go into such a file through a mapping, since pwrite(2) would wait.
 * Cost: 11 us to take and release (two switches of threads). Whoever writes the file by a descriptor, from memory that the pager
 * must bring, would wait for the pager and be waited for: only for files of which nobody else has a descriptor.
 * When the pager is killed, so is its writing thread, and the lock is free. */
#pragma once
#include "result.h"
#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdbool.h>

struct hold {
	int fd; /* the file; the backing's */
	bool begun; /* what follows is there */
	_Atomic bool ending;
	int uffd; /* owned */
	void *trap; /* the page that is written from */
	sem_t wanted;
	pthread_t writer;
	pthread_mutex_t lock; /* held with the inode's */
};

void hold_init(struct hold *hold, int fd);
void hold_deinit(struct hold *hold);

/* Waits for whoever holds it. On failure nobody does. */
struct lr_error hold_take(struct hold *hold);
void hold_release(struct hold *hold);
