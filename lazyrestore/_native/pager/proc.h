/* What /proc tells of a restored process; of a forked child nothing, since its pid is not known.
 *
 * Facts: /proc/PID/maps belongs to the address space that the process had when it was opened; from Linux 6.11 on one VMA can
 * be asked for (PROCMAP_QUERY, include/uapi/linux/fs.h; 2 us here), before that the text must be read.
 * /proc/PID/task has as many links as the process has threads, and two. Of a thread that sleeps in a system call, "syscall" there shows its
 * number and arguments. */
#pragma once
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

struct space;

/* A file of /proc/PID, opened with `flags` (O_RDONLY, O_RDWR). -1: it cannot be, or the process has ended, and its pid may be another's. */
int proc_open(const struct space *space, const char *name, int flags);

/* Where in which file an address is mapped. */
struct proc_place {
	uint64_t start, end; /* of the mapping */
	dev_t device;
	ino_t inode;
	uint64_t offset; /* of the mapping's first byte, in that file */
};

/* The mapping, of whatever, that holds `address`, or else the next one: its inode may be 0. False: none, or nobody can be asked. */
bool proc_place(struct space *space, uint64_t address, struct proc_place *place);

/* The same, where the kernel is asked for one VMA, else false. */
bool proc_place_quickly(struct space *space, uint64_t address, struct proc_place *place);

/* The pid behind a pidfd in the pager's own PID namespace, 0 if it is in none of ours or dead. */
int32_t pid_behind(int pidfd);

/* Does the process have one thread only? False where it cannot be asked. */
bool proc_one_thread(struct space *space);

/* The number that a thread has for itself, in the innermost PID namespace; 0: nobody tells. */
int32_t proc_own_number(struct space *space, int32_t thread);

/* The threads of a process, one after the other. */
struct proc_tasks {
	int directory; /* the space's; -1: the process cannot be asked */
	long read, used;
	char entries[4096];
};

struct proc_task {
	int32_t thread;
	bool runs;    /* or could, if there was a CPU for it */
	long call;    /* SYS_…: in which it sleeps; -1: in none */
	uint64_t arguments[5];
};

void proc_tasks_init(struct proc_tasks *tasks, struct space *space);

/* The next thread. False: there is none, or none that may be asked. */
bool proc_next_task(struct proc_tasks *tasks, struct proc_task *task);
