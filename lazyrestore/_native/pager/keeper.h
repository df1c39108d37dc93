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
 * It has a session of its own, so that no signal to a process group reaches both. One cgroup.kill may: keepers.h.
 * Cost: one sleeping process. Nobody covers all of them being killed one by one before the first one's death was acted on
 * (killall, the kernel's OOM killer twice): untouched memory of the restored processes reads as zeros then. A process whose
 * maps the keeper may not read (it changed its credentials, and we are not root) is not found either. */
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
	_Atomic int acting;  /* a pidfd: the keeper whose turn it is; -1: nobody's */
	_Atomic bool settled; /* nothing is left to do for a keeper */
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

/* Clones one that is the caller's: *pidfd, and the child. */
struct lr_error keeper_clone(const struct keeper *keeper, pid_t *pid, int *pidfd);

/* From now on there is nothing to do for any keeper: the pager is about to leave. */
void keeper_dismiss(struct keeper *keeper);

/* Kills and reaps the keeper: only when no address space is left. */
void keeper_deinit(struct keeper *keeper);

/* Guarded by the pager's lock. ENOSPC when there are too many. */
struct lr_error keeper_add(struct keeper *keeper, dev_t device, ino_t inode, uint32_t *slot);
void keeper_remove(struct keeper *keeper, uint32_t slot);

/* Kills all that map one of the files, or the one with inode `only` if that is not 0, and waits until none is left.
 * Returns how many there were. */
unsigned keeper_kill_mappers(const struct keeper_files *files, uint64_t only);
