/* Errors as values, and scope guards. A function that can fail returns struct lr_error; results go to its last
 * parameters, untouched on failure. */
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>

struct lr_error {
	const char *step; /* string constant: the system call or the check */
	int code;         /* errno; 0: no error */
	uint64_t address; /* what it was about, or 0 */
};

#define LR_OK ((struct lr_error){0})

static inline struct lr_error lr_fail(const char *step, int code, uint64_t address) {
	return (struct lr_error){.step = step, .code = code, .address = address};
}

static inline void scoped_close(int *fd) {
	if (*fd >= 0)
		close(*fd);
}
#define scoped_fd __attribute__((cleanup(scoped_close))) int

static inline int fd_release(int *fd) {
	int released = *fd;
	*fd = -1;
	return released;
}

static inline void scoped_free_at(void *pointer) {
	free(*(void **)pointer);
}
#define scoped_free __attribute__((cleanup(scoped_free_at)))

enum { LR_PAGE = 4096, LR_HUGE = 2 * 1024 * 1024 };
#define LR_ADDRESS_END (1ull << 47)
