/* What the kernel has mapped at an address of a restored process.
 *
 * Facts: /proc/PID/maps belongs to the address space that the process had when it was opened; from Linux 6.11 on one VMA can
 * be asked for (PROCMAP_QUERY, include/uapi/linux/fs.h; 2 us here), before that the text must be read. */
#pragma once
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

struct space;

struct vma_place {
	dev_t device;
	ino_t inode;
	uint64_t offset; /* of the byte that was asked about, in that file */
};

/* False: nothing of a file is mapped there, or the process cannot be asked (a forked child: its pid is not known). */
bool vma_place(struct space *space, uint64_t address, struct vma_place *place);
