/*
 * One thread per call that waits, each with a signal of its own, which only that thread lets through, and a handler for it.
 * usage: interrupted CONTROL_SOCKET. Request: "report": a line per thread: name, "waits" or the call's error, how often its handler ran.
 */
#define _GNU_SOURCE
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/epoll.h>
#include <sys/syscall.h>
#include <time.h>

#include "control.h"

#define LONG 100000 /* seconds */

static const sigset_t *outside; /* the signals that are blocked outside of epoll_pwait and ppoll: all */
static int never[2]; /* a pipe that nothing is written to */

static long wait_epoll(const sigset_t *mask)
{
	struct epoll_event event;
	int epoll = epoll_create1(0);

	return mask ? epoll_pwait(epoll, &event, 1, -1, mask) : epoll_wait(epoll, &event, 1, LONG * 1000);
}

static long wait_poll(const sigset_t *mask)
{
	struct pollfd event = { .fd = never[0], .events = POLLIN };

	return mask ? ppoll(&event, 1, NULL, mask) : poll(&event, 1, LONG * 1000);
}

static long wait_nanosleep(const sigset_t *unused)
{
	struct timespec time = { LONG, 0 };

	(void)unused;
	return syscall(SYS_nanosleep, &time, &time);
}

static long wait_futex(const sigset_t *unused)
{
	struct timespec time = { LONG, 0 };
	uint32_t word = 0;

	(void)unused;
	return syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, &time);
}

static long wait_sigtimedwait(const sigset_t *unused)
{
	struct timespec time = { LONG, 0 };
	sigset_t other;

	(void)unused;
	sigemptyset(&other);
	sigaddset(&other, SIGUSR1);
	return sigtimedwait(&other, NULL, &time);
}

static long wait_read(const sigset_t *unused)
{
	char byte;

	(void)unused;
	return read(never[0], &byte, 1);
}

static struct waiter {
	const char *name;
	long (*wait)(const sigset_t *mask);
	int flags;	/* of the handler */
	int masked;	/* its signal is let through by the call only */
	_Atomic int handled, ended, error;
} waiters[] = {
	{ .name = "epoll_wait", .wait = wait_epoll, .flags = SA_RESTART },
	{ .name = "epoll_pwait", .wait = wait_epoll, .flags = SA_RESTART, .masked = 1 },
	{ .name = "poll", .wait = wait_poll, .flags = SA_RESTART },
	{ .name = "ppoll", .wait = wait_poll, .flags = SA_RESTART, .masked = 1 },
	{ .name = "nanosleep", .wait = wait_nanosleep, .flags = SA_RESTART },
	{ .name = "futex", .wait = wait_futex, .flags = SA_RESTART },
	{ .name = "sigtimedwait", .wait = wait_sigtimedwait, .flags = SA_RESTART },
	{ .name = "read", .wait = wait_read, .flags = 0 },
	{ .name = "read_restart", .wait = wait_read, .flags = SA_RESTART },
};
enum { WAITERS = sizeof waiters / sizeof *waiters };

static void handle(int signal) { waiters[signal - SIGRTMIN].handled++; }

static void *run(void *argument)
{
	struct waiter *waiter = argument;
	sigset_t own;
	long result;

	sigemptyset(&own);
	sigaddset(&own, SIGRTMIN + (int)(waiter - waiters));
	pthread_setname_np(pthread_self(), waiter->name);
	if (waiter->masked) {
		sigset_t mask = *outside;

		sigdelset(&mask, SIGRTMIN + (int)(waiter - waiters));
		result = waiter->wait(&mask);
	} else {
		pthread_sigmask(SIG_UNBLOCK, &own, NULL);
		result = waiter->wait(NULL);
	}
	waiter->error = result < 0 ? errno : 0;
	waiter->ended = 1;
	return NULL;
}

int main(int argc, char **argv)
{
	static sigset_t all;
	pthread_t thread;
	char request[64];
	int listener, fd;

	if (argc != 2 || pipe(never) < 0)
		return 64;
	sigfillset(&all);
	sigprocmask(SIG_BLOCK, &all, NULL);
	outside = &all;
	for (int i = 0; i < WAITERS; i++) {
		struct sigaction action = { .sa_handler = handle, .sa_flags = waiters[i].flags };

		sigaction(SIGRTMIN + i, &action, NULL);
		if (pthread_create(&thread, NULL, run, &waiters[i]))
			return 65;
	}
	listener = control_listen(argv[1]);
	for (;;) {
		fd = control_next(listener, request, sizeof request);
		for (int i = 0; i < WAITERS; i++)
			dprintf(fd, "%s %s %d\n", waiters[i].name, waiters[i].ended ? strerrorname_np(waiters[i].error) : "waits",
				waiters[i].handled);
		close(fd);
	}
}
