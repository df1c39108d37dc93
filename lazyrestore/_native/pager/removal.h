/* MADV_REMOVE of shared memory that has not arrived.
 *
 * Facts: MADV_REMOVE and MADV_DONTNEED tell the same event, REMOVE, before they do anything, and go on once it is read. The first then
 * punches a hole into the file, the second leaves the file alone. Nothing shows afterwards which it was, if the file had
 * nothing there: what was never filled must be the stored contents after the one, zeros after the other.
 * Choice: while the event is read, the inode locks of the process's shared files are held (hold.h), so that no hole can be punched
 * before what it would hit has been filled. Then both do what they do to any file.
 * So that faults do not cost that, too: while no call is under way (installs do not answer EAGAIN), what is readable is a fault, and
 * faults are read before events; then one message is read, without the locks. If a signal withdraws that fault, and a REMOVE
 * comes, all in the microsecond between look and read, it is read unguarded. Nobody can tell what it was: what it hits is
 * poisoned, SIGBUS rather than a wrong byte.
 * Cost: while shared memory of a process is incomplete, 0.6 us per fault, 11 us per event and shared object; what
 * MADV_DONTNEED hits is brought. A small object is brought whole by the first event, in half a millisecond at most: a process may have
 * hundreds of them. Without a userfaultfd for the locks everything is filled at the first event. */
#pragma once
#include "protocol.h"
#include <stdbool.h>

struct space;

enum removal_read {
	REMOVAL_ANY,    /* read as much as you like */
	REMOVAL_ONE,    /* read one message */
	REMOVAL_NOTHING /* there is nothing to read */
};

/* Around one read of a space's messages and their handling. */
struct removal_guard {
	struct space *space;
	enum removal_read read;
	uint64_t held[(LR_MAX_SHARED + 63) / 64]; /* bit i: the lock of the space's shared object i */
};
struct removal_guard removal_begin(struct space *space);
void removal_end(struct removal_guard *guard);

/* A REMOVE was read, within the guard. */
void removal_fill(const struct removal_guard *guard, uint64_t start, uint64_t end);
