/*
 * Threads that wait in the kernel on futex words each of which lies alone in memory that nobody else touches, so that in a copy
 * the kernel is the first to need it. usage: farlocks CONTROL_SOCKET. Request: "release": wakes all, answers "ok" when all of
 * them have ended as they should.
 */
#define _GNU_SOURCE
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>

#include "control.h"

#define FAR (4ul << 20)

static char *far_memory(void)
{
	char *at = mmap(NULL, FAR, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (at == MAP_FAILED)
		control_die("mmap");
	for (size_t i = 0; i < FAR; i += 4096)
		at[i + 8] = 1;
	return at + FAR / 2;
}

static pthread_mutex_t *inherit, *robust;
static sem_t *semaphore;
static uint32_t *word;

static void *lock_inherit(void *unused)
{
	long error = pthread_mutex_lock(inherit);

	(void)unused;
	return (void *)(error ? error : pthread_mutex_unlock(inherit));
}

static void *lock_robust(void *unused)
{
	long error = pthread_mutex_lock(robust);

	(void)unused;
	return (void *)(error ? error : pthread_mutex_unlock(robust));
}

static void *wait_semaphore(void *unused)
{
	(void)unused;
	return (void *)(long)sem_wait(semaphore);
}

static void *wait_word(void *unused)
{
	struct timespec long_time = { 100000, 0 };

	(void)unused;
	return (void *)syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, 0, &long_time);
}

int main(int argc, char **argv)
{
	void *(*const waits[])(void *) = { lock_inherit, lock_robust, wait_semaphore, wait_word };
	pthread_t threads[4];
	pthread_mutexattr_t attribute;
	char request[64];
	int listener, fd;

	if (argc != 2)
		return 64;
	inherit = (pthread_mutex_t *)far_memory();
	robust = (pthread_mutex_t *)far_memory();
	semaphore = (sem_t *)far_memory();
	word = (uint32_t *)far_memory();
	pthread_mutexattr_init(&attribute);
	pthread_mutexattr_setprotocol(&attribute, PTHREAD_PRIO_INHERIT);
	pthread_mutex_init(inherit, &attribute);
	pthread_mutexattr_setprotocol(&attribute, PTHREAD_PRIO_NONE);
	pthread_mutexattr_setrobust(&attribute, PTHREAD_MUTEX_ROBUST);
	pthread_mutex_init(robust, &attribute);
	sem_init(semaphore, 0, 0);
	pthread_mutex_lock(inherit);
	pthread_mutex_lock(robust);
	for (int i = 0; i < 4; i++)
		if (pthread_create(&threads[i], NULL, waits[i], NULL))
			return 65;
	listener = control_listen(argv[1]);
	fd = control_next(listener, request, sizeof request);
	pthread_mutex_unlock(inherit);
	pthread_mutex_unlock(robust);
	sem_post(semaphore);
	syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL);
	for (int i = 0; i < 4; i++) {
		void *result;

		if (pthread_join(threads[i], &result))
			dprintf(fd, "join %d ", i);
		if (result)
			dprintf(fd, "wait %d: %ld ", i, (long)result);
	}
	dprintf(fd, "ok");
	return 0;
}
