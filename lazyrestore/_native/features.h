/* Trying kernel features, one function for each: what a version number or a header promises, a container's filter or a
 * sysctl may have taken away again.
 *
 * Each lr_try_ function returns 0 if the feature works, else an errno; *step is then the call that failed (a literal,
 * never freed). EPROTO: no call failed, yet what should have happened did not. Nothing stays behind: children are
 * reaped, descriptors closed. All are safe in a multi-threaded process: their children make system calls only, and end
 * without SIGCHLD.
 */
#pragma once
#include <stdint.h>

enum lr_uffd_source { LR_UFFD_CALL = 0, LR_UFFD_DEVICE = 1 };

/* One handshake (UFFDIO_API) that asks for `features`, a set of UFFD_FEATURE_ bits. */
int lr_try_userfaultfd(int source, uint64_t features, const char **step);

/* What the toucher does with a private, registered mapping of a memory file, while the pager's side answers. */
enum lr_lazy {
	LR_LAZY_READ = 0,    /* read a filled page: CONTINUE shows the file's bytes */
	LR_LAZY_SYSTEM = 1,  /* the same from inside a system call */
	LR_LAZY_WRITE = 2,   /* write a filled page: the file keeps its bytes */
	LR_LAZY_ZERO = 3,    /* read a hole: ZEROPAGE */
	LR_LAZY_REMOVE = 4,  /* MADV_DONTNEED, then read: an event, then zero */
	LR_LAZY_REMAP = 5,   /* mremap to elsewhere: an event, and the page arrives there */
	LR_LAZY_UNMAP = 6,   /* munmap: an event */
	LR_LAZY_POISON = 7   /* POISON, then a system call on the page: EFAULT */
};

/* A whole round trip. page_size: 4096, or a huge page size in bytes, of which two free pages are used (LR_LAZY_READ
 * only). */
int lr_try_lazy(int action, uint64_t page_size, const char **step);

/* A child with a registered mapping forks: an event that carries the grandchild's userfaultfd. */
int lr_try_uffd_fork(const char **step);

/* UFFD_FEATURE_ bits by their name without the prefix; 0 if this build does not know it. */
uint64_t lr_uffd_feature(const char *name);

enum lr_trace {
	LR_TRACE_CHILD = 0,    /* seize, interrupt, read registers and the signal mask */
	LR_TRACE_STRANGER = 1, /* the same with a process that does not descend from us */
	LR_TRACE_XSTATE = 2,   /* read and write back the extended state */
	LR_TRACE_RSEQ = 3,     /* read where the thread registered rseq */
	LR_TRACE_SECCOMP = 4,  /* suspend the tracee's seccomp filters */
	LR_TRACE_MEMORY = 5    /* write a read-only page by /proc/PID/mem */
};

/* address: for LR_TRACE_MEMORY, eight bytes of a read-only private mapping of ours (the tracee is our copy); else 0. */
int lr_try_trace(int what, uint64_t address, const char **step);

int lr_try_set_tid(const char **step);       /* clone3 with a chosen process id */
int lr_try_pid_namespace(const char **step); /* a new namespace, and a chosen process id in it */
int lr_try_pidfd_getfd(const char **step);
int lr_try_kcmp(const char **step);
int lr_try_prlimit(const char **step);       /* another process's limits, another user's where we may have one */
int lr_try_mm_map(const char **step);        /* PR_SET_MM_MAP with our own values, in a child */
int lr_try_exe_link(const char **step);      /* whether PR_SET_MM_MAP may set the exe link */
int lr_try_move(uint64_t start, uint64_t end, const char **step); /* mremap [start, end) elsewhere, in a child */
int lr_try_memfd(const char **step);
int lr_try_memfd_exec(const char **step);    /* run a tiny ELF file from a memfd */
int lr_try_sparse_memfd(uint64_t size, const char **step); /* write and read back the last page of `size` bytes */
int lr_try_pagemap_scan(const char **step);

/* The CPU's state components that the kernel has switched on (XCR0), and the size in bytes of an XSAVE area that holds
 * them all; both 0 on a CPU without XSAVE. */
uint64_t lr_cpu_xcr0(void);
uint32_t lr_cpu_xsave_size(void);
