/* What /proc tells of a restored process; of a forked child nothing, since its pid is not known.
 *
 * Facts: /proc/PID/maps belongs to the address space that the process had when it was opened; from Linux 6.11 on one VMA can
 * be asked for (PROCMAP_QUERY, include/uapi/linux/fs.h; 2 us here), before that the text must be read.
 * /proc/PID/task has as many links as the process has threads, and two. */
#pragma once
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

struct space;

/* Where in which file an address is mapped. */
struct proc_place {
	dev_t device;
	ino_t inode;
	uint64_t offset; /* of the byte that was asked about, in that file */
};

/* False: nothing of a file is mapped there, or the process cannot be asked. */
bool proc_place(struct space *space, uint64_t address, struct proc_place *place);

/* Does the process have one thread only? False where it cannot be asked. */
bool proc_one_thread(struct space *space);
