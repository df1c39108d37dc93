/*
 * Every way to wait. A wait that times out must last at least as long as asked and say that it timed out; a wait for something
 * must say that it came. EINTR is an error everywhere but in pause() and sigsuspend(), where a handler must have run.
 */
#include "threads64.h"

static void lasted(struct worker *w, const char *what, int64_t start, int64_t wanted_ns)
{
	int64_t took = now_ns(CLOCK_MONOTONIC) - start;

	if (took < wanted_ns)
		fail(w, "%s: lasted %lld of %lld ns", what, (long long)took, (long long)wanted_ns);
}

static void expect(struct worker *w, const char *what, long result, long wanted, int wanted_errno)
{
	int error = result < 0 ? errno : 0;

	if (result != wanted || error != wanted_errno)
		fail(w, "%s: %ld (%s), wanted %ld (%s)", what, result, strerror(error), wanted, strerror(wanted_errno));
}

/* Run `call`, which is to time out after the kind's milliseconds with `wanted` and `error`. One that was interrupted is one error, not two. */
#define TIMED(w, call, wanted, error) do { \
	int64_t start_ = now_ns(CLOCK_MONOTONIC); \
	long result_ = (call); \
	bool interrupted_ = result_ < 0 && errno == EINTR; \
	expect(w, #call, result_, wanted, error); \
	if (!interrupted_) \
		lasted(w, #call, start_, (w)->argument * INT64_C(1000000)); \
} while (0)

/* -- timeouts ------------------------------------------------------------------------------------------------------ */

static struct timespec span(const struct worker *w)
{
	return to_timespec(w->argument * INT64_C(1000000));
}

static void step_nanosleep(struct worker *w)
{
	struct timespec t = span(w), left = { 0, 0 };

	TIMED(w, nanosleep(&t, &left), 0, 0);
}

static void step_clock_relative(struct worker *w)
{
	struct timespec t = span(w), left;

	TIMED(w, clock_nanosleep(CLOCK_MONOTONIC, 0, &t, &left), 0, 0);
}

static void sleep_until(struct worker *w, clockid_t clock)
{
	int64_t end = now_ns(clock) + w->argument * 1000000;
	struct timespec t = to_timespec(end);

	expect(w, "clock_nanosleep until", clock_nanosleep(clock, TIMER_ABSTIME, &t, NULL), 0, 0);
	if (now_ns(clock) < end)
		fail(w, "clock_nanosleep until: woke early");
}

static void step_until_monotonic(struct worker *w)
{
	sleep_until(w, CLOCK_MONOTONIC);
}

static void step_until_realtime(struct worker *w)
{
	sleep_until(w, CLOCK_REALTIME);
}

static void step_poll(struct worker *w)
{
	struct pollfd fd = { .fd = w->in, .events = POLLIN };

	TIMED(w, poll(&fd, 1, (int)w->argument), 0, 0);
}

static void step_ppoll(struct worker *w)
{
	struct pollfd fd = { .fd = w->in, .events = POLLIN };
	struct timespec t = span(w);
	sigset_t all;

	sigfillset(&all);
	TIMED(w, ppoll(&fd, 1, &t, &all), 0, 0);
}

static void step_select(struct worker *w)
{
	struct timeval t = { w->argument / 1000, w->argument % 1000 * 1000 };
	fd_set set;

	FD_ZERO(&set);
	FD_SET(w->in, &set);
	TIMED(w, select(w->in + 1, &set, NULL, NULL, &t), 0, 0);
}

static void step_pselect(struct worker *w)
{
	struct timespec t = span(w);
	sigset_t all;
	fd_set set;

	sigfillset(&all);
	FD_ZERO(&set);
	FD_SET(w->in, &set);
	TIMED(w, pselect(w->in + 1, &set, NULL, NULL, &t, &all), 0, 0);
}

static void step_epoll(struct worker *w)
{
	struct epoll_event event;

	TIMED(w, epoll_wait(w->epoll, &event, 1, (int)w->argument), 0, 0);
}

static void step_epoll_pwait(struct worker *w)
{
	struct epoll_event event;
	sigset_t all;

	sigfillset(&all);
	TIMED(w, epoll_pwait(w->epoll, &event, 1, (int)w->argument, &all), 0, 0);
}

static void step_sigtimedwait(struct worker *w)
{
	struct timespec t = span(w);
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGIO);
	TIMED(w, sigtimedwait(&set, NULL, &t), -1, EAGAIN);
}

static void step_futex_relative(struct worker *w)
{
	struct timespec t = span(w);

	TIMED(w, futex(&w->word, FUTEX_WAIT_PRIVATE, 0, &t), -1, ETIMEDOUT);
}

static void step_futex_until(struct worker *w)
{
	struct timespec t = to_timespec(now_ns(CLOCK_MONOTONIC) + w->argument * 1000000);

	TIMED(w, futex(&w->word, FUTEX_WAIT_BITSET_PRIVATE, 0, &t), -1, ETIMEDOUT);
}

static void step_cond_timed(struct worker *w)
{
	struct timespec t = to_timespec(now_ns(CLOCK_REALTIME) + w->argument * 1000000);

	pthread_mutex_lock(&w->mutex);
	expect(w, "pthread_cond_timedwait", pthread_cond_timedwait(&w->cond, &w->mutex, &t), ETIMEDOUT, 0);
	pthread_mutex_unlock(&w->mutex);
}

static void step_sem_timed(struct worker *w)
{
	struct timespec t = to_timespec(now_ns(CLOCK_REALTIME) + w->argument * 1000000);

	expect(w, "sem_timedwait", sem_timedwait(&w->sem, &t), -1, ETIMEDOUT);
}

static void step_receive_timed(struct worker *w)
{
	char byte;

	TIMED(w, recv(w->in, &byte, 1, 0), -1, EAGAIN);
}

/* -- waits for something that a waker does ------------------------------------------------------------------------- */

static void step_futex(struct worker *w)
{
	uint32_t seen = atomic_load(&w->word);
	long result = futex(&w->word, FUTEX_WAIT_PRIVATE, seen, NULL);

	if (result < 0 && errno != EAGAIN)
		fail(w, "futex: %s", strerror(errno));
	else if (atomic_load(&w->word) == seen)
		fail(w, "futex: woken for nothing");
}

static void wake_futex(struct worker *w)
{
	atomic_fetch_add(&w->word, 1);
	futex(&w->word, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL);
}

static void step_cond(struct worker *w)
{
	pthread_mutex_lock(&w->mutex);
	while (!w->flag)
		expect(w, "pthread_cond_wait", pthread_cond_wait(&w->cond, &w->mutex), 0, 0);
	w->flag = false;
	pthread_mutex_unlock(&w->mutex);
}

static void wake_cond(struct worker *w)
{
	pthread_mutex_lock(&w->mutex);
	w->flag = true;
	pthread_cond_signal(&w->cond);
	pthread_mutex_unlock(&w->mutex);
}

static void step_sem(struct worker *w)
{
	expect(w, "sem_wait", sem_wait(&w->sem), 0, 0);
}

static void wake_sem(struct worker *w)
{
	int value;

	if (!sem_getvalue(&w->sem, &value) && value < 1)
		sem_post(&w->sem);
}

/* A lock that the waker holds for short times: contention, with a waiter in the kernel (FUTEX_LOCK_PI for PI mutexes). */
static void step_lock(struct worker *w)
{
	expect(w, "pthread_mutex_lock", pthread_mutex_lock(&w->mutex), 0, 0);
	w->flag = !w->flag;
	expect(w, "pthread_mutex_unlock", pthread_mutex_unlock(&w->mutex), 0, 0);
}

static void wake_lock(struct worker *w)
{
	struct timespec t = { 0, 2000000 };

	if (pthread_mutex_trylock(&w->mutex))
		return;
	nanosleep(&t, NULL);
	expect(w, "the waker's unlock", pthread_mutex_unlock(&w->mutex), 0, 0);
}

static void step_read(struct worker *w)
{
	char bytes[64];
	ssize_t got = read(w->in, bytes, sizeof bytes);

	if (got < 1)
		fail(w, "read: %zd (%s)", got, strerror(errno));
}

static void wake_write(struct worker *w)
{
	uint64_t one = 1;

	if (write(w->out, &one, sizeof one) < 0 && errno != EAGAIN)
		fail(w, "the waker's write: %s", strerror(errno));
}

static void step_receive(struct worker *w)
{
	char bytes[64];
	ssize_t got = recv(w->in, bytes, sizeof bytes, 0);

	if (got < 1)
		fail(w, "recv: %zd (%s)", got, strerror(errno));
}

static void step_poll_for(struct worker *w)
{
	struct pollfd fd = { .fd = w->in, .events = POLLIN };

	expect(w, "poll without a limit", poll(&fd, 1, -1), 1, 0);
	if (fd.revents != POLLIN)
		fail(w, "poll: events %#x", (unsigned)fd.revents);
	step_read(w);
}

static void step_select_for(struct worker *w)
{
	fd_set set;

	FD_ZERO(&set);
	FD_SET(w->in, &set);
	expect(w, "select without a limit", select(w->in + 1, &set, NULL, NULL, NULL), 1, 0);
	step_read(w);
}

static void step_epoll_for(struct worker *w)
{
	struct epoll_event event = { 0 };

	expect(w, "epoll_wait without a limit", epoll_wait(w->epoll, &event, 1, -1), 1, 0);
	if (event.data.u64 != UINT64_C(0xabcd000000000000) + (unsigned)w->index)
		fail(w, "epoll: data %#llx", (unsigned long long)event.data.u64);
	step_read(w);
}

/* Writes into a pipe that is full until the waker empties it. */
static void step_write(struct worker *w)
{
	static const char block[4096];

	expect(w, "write to a full pipe", write(w->out, block, sizeof block), sizeof block, 0);
}

static void wake_drain(struct worker *w)
{
	char block[16384];

	while (read(w->in, block, sizeof block) > 0)
		;
}

static void step_sigwait(struct worker *w)
{
	sigset_t set;
	siginfo_t info = { 0 };

	sigemptyset(&set);
	sigaddset(&set, (int)w->argument);
	expect(w, "sigwaitinfo", sigwaitinfo(&set, &info), w->argument, 0);
	if (info.si_pid != getpid() || info.si_code != SI_USER)	/* glibc reports SI_TKILL as SI_USER */
		fail(w, "sigwaitinfo: pid %d, code %d", info.si_pid, info.si_code);
}

static void step_signalfd(struct worker *w)
{
	struct signalfd_siginfo info = { 0 };

	expect(w, "read of a signalfd", read(w->in, &info, sizeof info), sizeof info, 0);
	if (info.ssi_signo != (uint32_t)w->argument)
		fail(w, "signalfd: signal %u", info.ssi_signo);
}

static void wake_signal(struct worker *w)
{
	pthread_kill(w->thread, (int)w->argument);
}

static void step_pause(struct worker *w)
{
	uint64_t before = atomic_load(&w->signals);

	expect(w, "pause", pause(), -1, EINTR);
	if (atomic_load(&w->signals) == before)
		fail(w, "pause: returned, but no handler ran");
}

static void step_sigsuspend(struct worker *w)
{
	uint64_t before = atomic_load(&w->signals);
	sigset_t set = w->mask;

	sigdelset(&set, (int)w->argument);
	expect(w, "sigsuspend", sigsuspend(&set), -1, EINTR);
	if (atomic_load(&w->signals) == before)
		fail(w, "sigsuspend: returned, but no handler ran");
}

/* -- what they wait on --------------------------------------------------------------------------------------------- */

static void check_setup(const char *what, long result)
{
	if (result < 0) {
		perror(what);
		_exit(72);
	}
}

static void setup_pipe(struct worker *w)
{
	int ends[2];

	check_setup("pipe2", pipe2(ends, O_CLOEXEC));
	w->in = ends[0];
	w->out = ends[1];
	check_setup("fcntl", fcntl(w->out, F_SETFL, O_NONBLOCK));
}

static void setup_full_pipe(struct worker *w)
{
	int ends[2];

	check_setup("pipe2", pipe2(ends, O_CLOEXEC));
	w->in = ends[0];
	w->out = ends[1];
	check_setup("fcntl", fcntl(w->in, F_SETFL, O_NONBLOCK));
	check_setup("fcntl", fcntl(w->out, F_SETPIPE_SZ, 4096));
}

static void setup_epoll(struct worker *w)
{
	struct epoll_event event = { .events = EPOLLIN, .data.u64 = UINT64_C(0xabcd000000000000) + (unsigned)w->index };

	setup_pipe(w);
	check_setup("epoll_create1", w->epoll = epoll_create1(EPOLL_CLOEXEC));
	check_setup("epoll_ctl", epoll_ctl(w->epoll, EPOLL_CTL_ADD, w->in, &event));
}

static void setup_eventfd(struct worker *w)
{
	check_setup("eventfd", w->in = w->out = eventfd(0, EFD_CLOEXEC));
}

static void setup_timerfd(struct worker *w)
{
	struct itimerspec time = { { 0, 7000000 }, { 0, 7000000 } };

	check_setup("timerfd_create", w->in = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC));
	check_setup("timerfd_settime", timerfd_settime(w->in, 0, &time, NULL));
}

static void setup_signalfd(struct worker *w)
{
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, (int)w->argument);
	check_setup("signalfd", w->in = signalfd(-1, &set, SFD_CLOEXEC));
}

static void setup_fifo(struct worker *w)
{
	char path[64];

	snprintf(path, sizeof path, "fifo%d", w->index);
	check_setup("mkfifo", mkfifo(path, 0600));
	check_setup("open of a FIFO", w->in = open(path, O_RDWR | O_CLOEXEC));
	check_setup("open of a FIFO", w->out = open(path, O_WRONLY | O_NONBLOCK | O_CLOEXEC));
}

static void setup_sockets(struct worker *w)
{
	int ends[2];

	check_setup("socketpair", socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends));
	w->in = ends[0];
	w->out = ends[1];
	check_setup("fcntl", fcntl(w->out, F_SETFL, O_NONBLOCK));
}

static void setup_sockets_timed(struct worker *w)
{
	struct timeval t = { w->argument / 1000, w->argument % 1000 * 1000 };

	setup_sockets(w);
	check_setup("SO_RCVTIMEO", setsockopt(w->in, SOL_SOCKET, SO_RCVTIMEO, &t, sizeof t));
}

static void setup_pi(struct worker *w)
{
	pthread_mutexattr_t attribute;

	pthread_mutexattr_init(&attribute);
	pthread_mutexattr_setprotocol(&attribute, PTHREAD_PRIO_INHERIT);
	pthread_mutex_init(&w->mutex, &attribute);
	pthread_mutexattr_destroy(&attribute);
}
