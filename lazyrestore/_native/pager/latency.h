/* Keeping idle CPUs awake while processes fault.
 *
 * Facts: a fault is two wake-ups, of the pager's thread and of the process's. If the two are on different CPUs, each finds the other's
 * CPU idle, often halted, and ends that first: in a virtual machine two exits to the host. Bare userfaultfd here, same program and
 * hour: 7.4 us on one CPU, 44 to 58 on two, 8.2 on two while a request for a latency of 0 us is held (Documentation/power/
 * pm_qos_interface.rst): then all cpuidle governors pick the state that polls. The request is a write(2) of an int32_t to
 * /dev/cpu_dma_latency and lasts until the file is closed, so nothing is left behind by a pager that was killed.
 * Choice: each address space has one second for it in all: from its start, and whenever its messages come less than a millisecond
 * apart, until none has come for ten. So a process that faults or unmaps for hours does not heat the host for as long.
 * Cost: CPUs that would have slept poll meanwhile; they still run whatever comes. Without the file (a container, another user than
 * root), or with --awake 0, nothing is asked for and everything works as ever. */
#pragma once
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

enum { LATENCY_QUIET_MS = 10 };

/* The pager's request, held as long as one address space holds it. */
struct latency {
	pthread_mutex_t lock;
	int fd; /* owned; -1: there is no such file */
	uint32_t holders;
};

/* One address space's share in it, for its own thread. */
struct latency_share {
	bool held;
	uint64_t since_ns, spent_ns, message_ns;
};

/* `wanted`: false if somebody has switched it off. */
void latency_init(struct latency *latency, bool wanted);

/* The process is about to fault. */
void latency_begin(struct latency *latency, struct latency_share *share, uint64_t now);

/* Messages have come. */
void latency_messages(struct latency *latency, struct latency_share *share, uint64_t now);

/* None has come for LATENCY_QUIET_MS, or none will. */
void latency_end(struct latency *latency, struct latency_share *share, uint64_t now);
