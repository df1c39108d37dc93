/* The keeper: a second process that holds the pager's descriptors, so that the pager's death is not silent.
 *
 * Facts: when the last descriptor of a userfaultfd closes, its registrations vanish, waiting threads go on, and pages that
 * were never installed read as what the file holds: for the template's holes, zeros. A process that is killed with
 * kill -9 closes its descriptors, unless another process shares the file table (clone(CLONE_FILES)).
 * Choice: two processes, one table. When the pager dies the keeper kills every process that maps one of the pager's memory
 * files (found by device and inode in /proc/PID/maps, held by pidfd from before the look), again and again until one
 * whole pass finds none, since a fork may race; only then do the descriptors close. Before that it shuts the clients'
 * connections down: one may trace a new process, which does not die before its tracer has heard of it. When the keeper dies the pager
 * starts another one.
 * Cost: one sleeping process. Nobody covers both being killed in the same instant, or the second before the first
 * one's death was acted on (kill -9 of the whole session or cgroup, the kernel's OOM killer twice): untouched memory of
 * the restored processes, if they survive that, reads as zeros. A process whose maps the keeper may not read (it
 * changed its credentials, and we are not root) is not found either. */
#pragma once
#include "result.h"
#include <stdatomic.h>
#include <stdbool.h>
#include <sys/types.h>

enum { KEEPER_FILES = 4096 };

/* In memory that pager and keeper share. An entry counts when its inode is not 0. */
struct keeper_files {
	struct {
		_Atomic uint64_t inode;
		_Atomic uint64_t device;
	} files[KEEPER_FILES];
	_Atomic uint32_t n; /* entries ever used */
};

struct keeper {
	struct keeper_files *files;
	char socket_path[108];
	int pager_pidfd;
	pid_t pid; /* of the keeper that runs */
	int pidfd;
};

struct lr_error keeper_init(struct keeper *keeper, const char *socket_path);

/* Clones a keeper that watches the calling process. Also for a later one, after the first died. */
struct lr_error keeper_start(struct keeper *keeper);

/* Kills and reaps the keeper: only when no address space is left. */
void keeper_deinit(struct keeper *keeper);

/* Guarded by the pager's lock. ENOSPC when there are too many. */
struct lr_error keeper_add(struct keeper *keeper, dev_t device, ino_t inode, uint32_t *slot);
void keeper_remove(struct keeper *keeper, uint32_t slot);

/* Kills all that map one of the files, or the one with inode `only` if that is not 0, and waits until none is left.
 * Returns how many there were. */
unsigned keeper_kill_mappers(const struct keeper_files *files, uint64_t only);
