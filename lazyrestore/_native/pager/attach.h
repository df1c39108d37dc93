#pragma once
#include "pager.h"

/* Takes an address space into service. `fds` are the request's descriptors, in order; all of them are taken over, that
 * is, closed or kept. `keeper` may be NULL; the address space gets a reference of its own. The error's address is the
 * virtual address of the range that failed. */
struct lr_error attach(struct pager *pager, const struct lr_request *request, int *fds, unsigned n_fds,
		       struct cgroup_keeper *keeper);
