/*
 * One thread per call that waits, each with a signal of its own, which only that thread lets through, and a handler for it.
 * usage: interrupted CONTROL_SOCKET [senders]. Senders wait for room, which a copy has: its queues are not as full.
 * Request: "report": a line per thread: name, "waits" or the call's error, how often its handler ran.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/un.h>
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

static long wait_sleep(const sigset_t *unused)
{
	struct timespec time = { LONG, 0 };

	(void)unused;
	return syscall(SYS_nanosleep, &time, NULL);
}

static long wait_clock_nanosleep(const sigset_t *unused)
{
	struct timespec time = { LONG, 0 };

	(void)unused;
	return syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, 0, &time, &time);
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

static void set_timeouts(int socket)
{
	struct timeval time = { LONG, 0 };

	setsockopt(socket, SOL_SOCKET, SO_SNDTIMEO, &time, sizeof time);
	setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &time, sizeof time);
}

/* Its sending side is full, its receiving side is empty. */
static int full_socket(void)
{
	static const char block[4096];
	int ends[2];

	if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends) < 0)
		exit(66);
	while (send(ends[0], block, sizeof block, MSG_DONTWAIT) > 0)
		continue;
	set_timeouts(ends[0]);
	return ends[0];
}

static long wait_readv(const sigset_t *unused)
{
	char byte;
	struct iovec whole = { &byte, 1 };

	(void)unused;
	return readv(full_socket(), &whole, 1);
}

static long wait_write(const sigset_t *unused)
{
	(void)unused;
	return write(full_socket(), "x", 1);
}

static long wait_writev(const sigset_t *unused)
{
	struct iovec whole = { "x", 1 };

	(void)unused;
	return writev(full_socket(), &whole, 1);
}

static long wait_sendfile(const sigset_t *unused)
{
	(void)unused;
	return sendfile(full_socket(), open("/proc/self/exe", O_RDONLY), NULL, 1);
}

/* To a listener whose queue is full. */
static long wait_connect(const sigset_t *unused)
{
	struct sockaddr_un name = { .sun_family = AF_UNIX };
	socklen_t length = sizeof name;
	int listener = socket(AF_UNIX, SOCK_STREAM, 0), first = socket(AF_UNIX, SOCK_STREAM, 0);
	int second = socket(AF_UNIX, SOCK_STREAM, 0);

	(void)unused;
	if (bind(listener, (struct sockaddr *)&name, sizeof name.sun_family) || listen(listener, 0)
	    || getsockname(listener, (struct sockaddr *)&name, &length) || connect(first, (struct sockaddr *)&name, length))
		exit(67);
	set_timeouts(second);
	return connect(second, (struct sockaddr *)&name, length);
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
	{ .name = "sleep", .wait = wait_sleep, .flags = SA_RESTART },
	{ .name = "clock_nanosleep", .wait = wait_clock_nanosleep, .flags = SA_RESTART },
	{ .name = "readv", .wait = wait_readv, .flags = SA_RESTART },
	{ .name = "write", .wait = wait_write, .flags = SA_RESTART },
	{ .name = "writev", .wait = wait_writev, .flags = SA_RESTART },
	{ .name = "sendfile", .wait = wait_sendfile, .flags = SA_RESTART },
	{ .name = "connect", .wait = wait_connect, .flags = SA_RESTART },
};
enum { SENDERS = 4, WAITERS = sizeof waiters / sizeof *waiters };

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
	int listener, fd, count = argc == 3 ? WAITERS : WAITERS - SENDERS;

	if (argc < 2 || pipe(never) < 0)
		return 64;
	sigfillset(&all);
	sigprocmask(SIG_BLOCK, &all, NULL);
	outside = &all;
	for (int i = 0; i < count; i++) {
		struct sigaction action = { .sa_handler = handle, .sa_flags = waiters[i].flags };

		sigaction(SIGRTMIN + i, &action, NULL);
		if (pthread_create(&thread, NULL, run, &waiters[i]))
			return 65;
	}
	listener = control_listen(argv[1]);
	for (;;) {
		fd = control_next(listener, request, sizeof request);
		for (int i = 0; i < count; i++)
			dprintf(fd, "%s %s %d\n", waiters[i].name, waiters[i].ended ? strerrorname_np(waiters[i].error) : "waits",
				waiters[i].handled);
		close(fd);
	}
}
