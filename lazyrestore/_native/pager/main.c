/* pagerd: gives restored processes their memory when they touch it.
 *
 * Start: exec'd by a restorer with descriptors whose numbers are on the command line. The exec'd process forks and exits at
 * once, so that nobody has the pager as a child; the listening socket already queues connections, so no further handshake
 * is needed. The pager opens the image, clones the keeper, and accepts. The template's memory file is made by the restorer,
 * so that a new process can map it while the pager is still starting.
 * End: when there has been no address space and no connection for the lingering time. Restorers connect or start a pager
 * under an exclusive flock(2) of the lock file; the pager takes the same lock (it must hold its own open file description)
 * before it looks at the queue of connections for the last time and removes the socket. */
#define _GNU_SOURCE
#include "log.h"
#include "pager.h"
#include "replay.h"
#include "sweep.h"
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>

enum { RECORDER_NICE = 10 };
enum { LISTEN, DATA, PIN, LOCK, LOG, IMAGE, TEMPLATE, N_FDS };

struct options {
	int fds[N_FDS];
	uint64_t linger_ms, pin_at; /* pin_at: the byte of the pin's file that is not 0 if the snapshot was removed */
	bool awake; /* idle CPUs, while processes fault */
	char **recorder; /* what follows "--": the command that keeps a recorded working set */
};

static struct lr_error parse(int argc, char **argv, struct options *options) {
	static const char *const names[N_FDS] = {"--listen", "--data", "--pin", "--lock", "--log", "--image", "--template"};
	unsigned seen = 0;
	options->linger_ms = 1000;
	options->awake = true;
	for (int i = 1; i + 1 < argc; i += 2) {
		if (!strcmp(argv[i], "--")) {
			options->recorder = argv + i + 1;
			break;
		}
		char *rest;
		unsigned long value = strtoul(argv[i + 1], &rest, 10);
		bool linger = !strcmp(argv[i], "--linger"), pin_at = !strcmp(argv[i], "--pin-at");
		bool awake = !strcmp(argv[i], "--awake"), number = linger || pin_at || awake;
		if (*rest || rest == argv[i + 1] || value > INT32_MAX || (!number && value <= STDERR_FILENO))
			return lr_fail(argv[i], EINVAL, 0);
		if (linger)
			options->linger_ms = value;
		if (pin_at)
			options->pin_at = value;
		if (awake)
			options->awake = value;
		for (unsigned k = 0; k < N_FDS; k++)
			if (!strcmp(argv[i], names[k])) {
				options->fds[k] = (int)value;
				seen |= 1u << k;
			}
	}
	return seen == (1u << N_FDS) - 1 ? LR_OK : lr_fail("command line", EINVAL, seen);
}

/* Closes all but ours. The standard streams become /dev/null, so that no memory file ever gets their numbers. */
static void close_others(const struct options *options) {
	int null = open("/dev/null", O_RDWR);
	for (int stream = 0; stream <= STDERR_FILENO; stream++)
		dup2(null, stream);
	for (unsigned next = STDERR_FILENO + 1;;) {
		unsigned keep = ~0u;
		for (int k = 0; k < N_FDS; k++)
			if ((unsigned)options->fds[k] >= next && (unsigned)options->fds[k] < keep)
				keep = (unsigned)options->fds[k];
		if (keep > next)
			syscall(SYS_close_range, next, keep - 1, 0);
		if (keep == ~0u)
			return;
		fcntl((int)keep, F_SETFD, FD_CLOEXEC);
		next = keep + 1;
	}
}

static void detach(void) {
	sigset_t none;
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	for (int number = 1; number < NSIG; number++)
		signal(number, SIG_DFL);
	/* Processes live by the pager: only LR_STOP, or SIGKILL, ends it. */
	const int ignored[] = {SIGHUP, SIGINT, SIGTERM, SIGPIPE, SIGXFSZ, SIGUSR1, SIGUSR2};
	for (unsigned i = 0; i < sizeof ignored / sizeof *ignored; i++)
		signal(ignored[i], SIG_IGN);
	struct rlimit limit;
	if (!getrlimit(RLIMIT_NOFILE, &limit)) { /* one descriptor per forked child, two per restored process */
		limit.rlim_cur = limit.rlim_max;
		setrlimit(RLIMIT_NOFILE, &limit);
	}
	limit = (struct rlimit){RLIM_INFINITY, RLIM_INFINITY}; /* it counts for memory files too; only root may raise it */
	setrlimit(RLIMIT_FSIZE, &limit);
	prctl(PR_SET_NAME, "lr-pager");
	setsid();
	if (chdir("/"))
		return; /* never fails; if it did, a mount would stay busy, no more */
}

static struct lr_error open_backings(struct pager *pager, int template) {
	struct lr_error error = backing_take_template(&pager->image, template, &pager->template);
	if (!error.code)
		error = keeper_add(&pager->keeper, pager->template.device, pager->template.inode, &pager->template.keeper_slot);
	if (error.code || !pager->image.hugetlb)
		return error;
	error = backing_create_huge_template(&pager->image, &pager->huge);
	if (!error.code)
		error = keeper_add(&pager->keeper, pager->huge.device, pager->huge.inode, &pager->huge.keeper_slot);
	return error;
}

static struct lr_error pager_init(struct pager *pager, const struct options *options) {
	struct sockaddr_un address = {0};
	socklen_t length = sizeof address - 1;
	pthread_mutex_init(&pager->lock, NULL);
	pthread_mutex_init(&pager->keepers_lock, NULL);
	pager->started_ns = now_ns();
	pager->huge.fd = -1;
	latency_init(&pager->latency, options->awake);
	pager->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (pager->wake_fd < 0)
		return lr_fail("eventfd", errno, 0);
	pager->keepers_watch = epoll_create1(EPOLL_CLOEXEC);
	if (pager->keepers_watch < 0)
		return lr_fail("epoll_create1", errno, 0);
	if (getsockname(options->fds[LISTEN], (struct sockaddr *)&address, &length))
		return lr_fail("getsockname", errno, 0);
	int flags = fcntl(options->fds[LISTEN], F_GETFL);
	if (flags < 0 || fcntl(options->fds[LISTEN], F_SETFL, flags | O_NONBLOCK) < 0)
		return lr_fail("listening socket: O_NONBLOCK", errno, 0);
	struct lr_error error = keeper_init(&pager->keeper, address.sun_path);
	if (!error.code)
		error = image_init(options->fds[IMAGE], options->fds[DATA], &pager->image);
	close(options->fds[IMAGE]);
	if (!error.code)
		error = open_backings(pager, options->fds[TEMPLATE]);
	own_pages_init(&pager->own, &pager->image);
	working_set_init(&pager->working_set, &pager->image);
	if (!error.code)
		error = working_set_load(&pager->working_set);
	pager->recorder = options->recorder;
	pager->recorder_pidfd = -1;
	return error.code ? error : keeper_start(&pager->keeper);
}

static void accept_all(struct pager *pager, int listener) {
	int connection;
	while ((connection = accept4(listener, NULL, NULL, SOCK_CLOEXEC)) >= 0) {
		pthread_mutex_lock(&pager->lock);
		pager->n_clients++;
		pthread_mutex_unlock(&pager->lock);
		struct lr_error error = server_start(pager, connection);
		if (!error.code)
			continue;
		log_line("a connection was dropped: %s: %s", error.step, strerror(error.code));
		pthread_mutex_lock(&pager->lock);
		pager->n_clients--;
		pthread_mutex_unlock(&pager->lock);
	}
}

static bool is_idle(struct pager *pager, bool *stopping) {
	SCOPED_LOCK(&pager->lock);
	*stopping = pager->stopping;
	return !pager->n_spaces && !pager->n_clients && pager->recorder_pidfd < 0;
}

/* Whether it was used since this was last asked. */
static bool was_used(struct pager *pager) {
	SCOPED_LOCK(&pager->lock);
	bool used = pager->used;
	pager->used = pager->n_spaces || pager->recorder_pidfd >= 0;
	return used;
}

/* The lock file goes with the socket: whoever has taken a lock looks whether its file is still the one at the path. */
static void unlink_socket_and_lock(const char *socket_path) {
	char lock[128];
	size_t length = strlen(socket_path);
	unlink(socket_path);
	if (length < 5 || length >= sizeof lock || strcmp(socket_path + length - 5, ".sock") != 0)
		return;
	memcpy(lock, socket_path, length + 1);
	memcpy(lock + length - 5, ".lock", 5);
	unlink(lock);
}

/* When a recording has ended: the command asks this pager for the working set and stores it. The pager stays as long. */
static void keep_working_set(struct pager *pager) {
	if (!pager->recorder || pager->recorder_pidfd >= 0 || !working_set_notice(&pager->working_set))
		return;
	pid_t child = fork();
	if (!child) {
		/* Behind what was restored; but not SCHED_IDLE: for a moment it has the store's write lock. */
		setpriority(PRIO_PROCESS, 0, RECORDER_NICE);
		execv(pager->recorder[0], pager->recorder);
		_exit(127);
	}
	if (child > 0)
		pager->recorder_pidfd = (int)syscall(SYS_pidfd_open, child, 0);
}

/* True with the lock held for good, the socket gone and nobody waiting. */
static bool may_leave(struct pager *pager, const struct options *options) {
	bool stopping;
	if (flock(options->fds[LOCK], LOCK_EX | LOCK_NB))
		return false;
	accept_all(pager, options->fds[LISTEN]);
	keep_working_set(pager);
	if (is_idle(pager, &stopping)) {
		if (pager->orphans) /* nobody else maps its memory now */
			keeper_kill_mappers(pager->keeper.files, 0);
		keeper_dismiss(&pager->keeper);
		unlink_socket_and_lock(pager->keeper.socket_path);
		return true;
	}
	flock(options->fds[LOCK], LOCK_UN);
	return false;
}

static void restart_keeper(struct pager *pager) {
	waitpid(pager->keeper.pid, NULL, 0);
	pthread_mutex_lock(&pager->lock);
	struct lr_error error = keeper_start(&pager->keeper);
	pthread_mutex_unlock(&pager->lock);
	if (error.code)
		log_line("no keeper: %s: %s; trying on", error.step, strerror(error.code));
	else
		log_line("the keeper died; process %d took its place", (int)pager->keeper.pid);
}

static void reap_recorder(struct pager *pager) {
	siginfo_t info = {0};
	if (pager->recorder_pidfd < 0 || waitid(P_PIDFD, (id_t)pager->recorder_pidfd, &info, WEXITED | WNOHANG) || !info.si_pid)
		return;
	if (info.si_code != CLD_EXITED || info.si_status)
		log_line("snapshot %s: the working set was not kept: its recorder ended with %d", pager->image.name, info.si_status);
	close(pager->recorder_pidfd);
	pager->recorder_pidfd = -1;
}

/* pins: the pin's file. Only a store's image, which has a recorder, can be removed. */
static bool is_removed(int pins, const struct options *options) {
	uint8_t removed = 0;
	return options->recorder && pread(pins, &removed, 1, (off_t)options->pin_at) == 1 && removed;
}

/* If the snapshot was removed while it was in use, the recorder's command, with "-" as its last word, frees what it needed.
 * The pin goes first, and through another open file description it is seen whether there is something to free: who removes a
 * snapshot says so first, and looks for pins then. So one of the two frees it. */
static void free_if_removed(const struct options *options) {
	char path[64];
	snprintf(path, sizeof path, "/proc/self/fd/%d", options->fds[PIN]);
	scoped_fd pins = open(path, O_RDONLY | O_CLOEXEC);
	close(options->fds[PIN]);
	if (pins < 0 || !is_removed(pins, options))
		return;
	char **last = options->recorder;
	while (last[1])
		last++;
	*last = (char[]){"-"};
	setpriority(PRIO_PROCESS, 0, RECORDER_NICE);
	execv(options->recorder[0], options->recorder);
}

static void serve(struct pager *pager, const struct options *options) {
	enum { RETRY_MS = 50, LOOK_MS = 1000 };
	uint64_t idle_since = now_ns();
	bool stopping = false, settled = true;
	accept_all(pager, options->fds[LISTEN]); /* who waits for an answer comes before the working set */
	replay_prefetch(pager);
	for (;;) {
		struct pollfd fds[] = {
			{.fd = options->fds[LISTEN], .events = POLLIN},
			{.fd = pager->wake_fd, .events = POLLIN},
			{.fd = pager->keeper.pidfd, .events = POLLIN},
			{.fd = pager->recorder_pidfd, .events = POLLIN},
			{.fd = pager->keepers_watch, .events = POLLIN},
		};
		bool idle = is_idle(pager, &stopping);
		if (was_used(pager))
			idle_since = now_ns();
		int timeout = -1;
		if (idle) {
			uint64_t passed = (now_ns() - idle_since) / 1000000;
			if (stopping || passed >= options->linger_ms || is_removed(options->fds[PIN], options)) {
				if (may_leave(pager, options))
					return;
				timeout = RETRY_MS; /* a restorer is at work under the lock; it will connect or let go */
			} else {
				uint64_t left = options->linger_ms - passed + 1;
				timeout = left < LOOK_MS ? (int)left : LOOK_MS; /* nobody says that the snapshot was removed */
			}
		}
		if (!settled || pager->keeper.pidfd < 0)
			timeout = RETRY_MS;
		poll(fds, sizeof fds / sizeof *fds, timeout);
		uint64_t drained;
		if (fds[1].revents && read(pager->wake_fd, &drained, sizeof drained) < 0)
			continue;
		accept_all(pager, options->fds[LISTEN]);
		reap_recorder(pager);
		keep_working_set(pager);
		if (fds[2].revents || pager->keeper.pidfd < 0)
			restart_keeper(pager);
		settled = keepers_settle(pager);
	}
}

int main(int argc, char **argv) {
	static struct pager pager;
	struct options options = {0};
	if (parse(argc, argv, &options).code)
		return 2;
	pid_t child = fork();
	if (child)
		return child < 0 ? 1 : 0;
	log_init(options.fds[LOG]);
	detach();
	close_others(&options);
	struct lr_error error = pager_init(&pager, &options);
	if (!error.code) {
		serve(&pager, &options);
		sweep_directory_of(pager.keeper.socket_path);
	} else {
		log_line("cannot start: %s: %s (%#llx)", error.step, strerror(error.code), (unsigned long long)error.address);
	}
	if (error.code && pager.keeper.socket_path[0])
		unlink(pager.keeper.socket_path);
	keepers_deinit(&pager);
	keeper_deinit(&pager.keeper);
	if (!error.code)
		free_if_removed(&options);
	return error.code ? 1 : 0;
}
