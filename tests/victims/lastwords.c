/*
 * Threads that end with robust locks held, and with a tid address, that lie in memory that nobody else touches, so that in a copy the
 * kernel is the first to need it. usage: lastwords CONTROL_SOCKET. Request: "end": they end; answers who was told.
 */
#define _GNU_SOURCE
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#include "control.h"

#define FAR (4ul << 20)
#define LOCKS 8

static pthread_mutex_t *locks[LOCKS];
static uint32_t held, go;

static char *far_memory(void)
{
	char *at = mmap(NULL, FAR, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (at == MAP_FAILED)
		control_die("mmap");
	for (size_t i = 0; i < FAR; i += 4096)
		at[i + 8] = 1;
	return at + FAR / 2;
}

static void await(uint32_t *word)
{
	while (!__atomic_load_n(word, __ATOMIC_SEQ_CST))
		syscall(SYS_futex, word, FUTEX_WAIT, 0, NULL);
}

static void tell(uint32_t *word)
{
	__atomic_store_n(word, 1, __ATOMIC_SEQ_CST);
	syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL);
}

static void *hold(void *unused)
{
	for (int i = 0; i < LOCKS; i++)
		pthread_mutex_lock(locks[i]);
	tell(&held);
	await(&go);
	return unused;
}

static int end_bare(void *unused)
{
	(void)unused;
	await(&go);
	syscall(SYS_exit, 0);
	return 0;
}

int main(int argc, char **argv)
{
	uint32_t *tid, ended;
	pthread_mutexattr_t attribute;
	pthread_t thread;
	char request[64];
	int fd, died = 0;

	if (argc != 2)
		return 64;
	pthread_mutexattr_init(&attribute);
	pthread_mutexattr_setrobust(&attribute, PTHREAD_MUTEX_ROBUST);
	for (int i = 0; i < LOCKS; i++) {
		locks[i] = (pthread_mutex_t *)far_memory();
		pthread_mutexattr_setprotocol(&attribute, i % 2 ? PTHREAD_PRIO_INHERIT : PTHREAD_PRIO_NONE);
		pthread_mutex_init(locks[i], &attribute);
	}
	if (pthread_create(&thread, NULL, hold, NULL))
		return 65;
	await(&held);
	tid = (uint32_t *)far_memory();
	if (clone(end_bare, far_memory(), CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM |
		  CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID, NULL, NULL, NULL, tid) < 0)
		return 66;
	fd = control_next(control_listen(argv[1]), request, sizeof request);
	tell(&go);
	for (int i = 0; i < LOCKS; i++)
		died += pthread_mutex_lock(locks[i]) == EOWNERDEAD;
	while ((ended = __atomic_load_n(tid, __ATOMIC_SEQ_CST)))
		syscall(SYS_futex, tid, FUTEX_WAIT, ended, NULL);
	dprintf(fd, "owner died, %d locks; tid %u", died, ended);
	return 0;
}
