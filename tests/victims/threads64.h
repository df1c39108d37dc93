/* The frame of threads64: a worker per thread, and how one reports what it saw. */
#ifndef LR_VICTIM_THREADS64_H
#define LR_VICTIM_THREADS64_H

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <fenv.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/select.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define THREADS 64
#define ALTSTACK 32768

struct worker;

struct kind {
	const char *name;		/* also the thread's name, with its index */
	void (*step)(struct worker *);	/* one round, ends by itself or by wake() */
	void (*wake)(struct worker *);	/* never blocks; NULL: the step needs nobody */
	void (*setup)(struct worker *);	/* may be NULL */
	long argument;			/* milliseconds, a signal, ... */
	int count;
};

struct worker {
	int index;
	const struct kind *kind;
	long argument;
	pthread_t thread;
	pid_t tid;
	_Atomic uint64_t rounds, signals;
	_Atomic bool done;
	_Atomic uint32_t word;
	int in, out, epoll;
	pthread_mutex_t mutex;
	pthread_cond_t cond;
	bool flag;
	sem_t sem;
	sigset_t mask;
	char *altstack;
	uint64_t gs;
	void *robust_head;
	uint64_t added;			/* successful rseq increments */
};

extern struct worker workers[THREADS];
extern _Atomic bool stopping;
extern _Thread_local struct worker *self;

/* Record an error; what the test reads. */
void fail(const struct worker *w, const char *format, ...) __attribute__((format(printf, 2, 3)));

static inline int64_t now_ns(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

static inline struct timespec to_timespec(int64_t ns)
{
	return (struct timespec){ ns / 1000000000, ns % 1000000000 };
}

static inline long futex(_Atomic uint32_t *word, int op, uint32_t value, const struct timespec *timeout)
{
	return syscall(SYS_futex, word, op, value, timeout, NULL, FUTEX_BITSET_MATCH_ANY);
}

#endif
