/*
 * 64 threads that compute, sleep and wait, each of which checks everything it can about itself. Nothing of what the test does
 * (snapshots of the running process, a restored copy) may be visible to any of them.
 *
 * usage: threads64 CONTROL_SOCKET, in a directory of its own (for FIFOs). Requests: "report" (errors, then one line per
 * thread), "finish" (end all threads, check what only the end shows, report; the exit status is 1 if there was an error).
 */
#include "threads64.h"

#include <asm/prctl.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/rseq.h>

#include "control.h"
#include "registers.h"
#include "threads64_waits.h"

#define ERRORS 64
#define CPUS 1024
#define WORDS 8192

struct worker workers[THREADS];
_Atomic bool stopping;
_Thread_local struct worker *self;
static _Thread_local uint64_t canary[8];
static char errors[ERRORS][256];
static _Atomic unsigned error_count;
static pthread_mutex_t robust;
static pthread_barrier_t started;
static uint32_t cpus;
static struct { uint64_t count, padding[7]; } per_cpu[CPUS];

void fail(const struct worker *w, const char *format, ...)
{
	unsigned slot = atomic_fetch_add(&error_count, 1);
	va_list arguments;
	int used;

	if (slot >= ERRORS)
		return;
	used = snprintf(errors[slot], sizeof errors[slot], "%s %d, round %llu: ", w ? w->kind->name : "main",
			w ? w->index : -1, w ? (unsigned long long)atomic_load(&w->rounds) : 0);
	va_start(arguments, format);
	vsnprintf(errors[slot] + used, sizeof errors[slot] - (size_t)used, format, arguments);
	va_end(arguments);
}

/* -- steps that compute -------------------------------------------------------------------------------------------- */

static uint64_t scramble(uint64_t x)
{
	x = (x ^ (x >> 31)) * UINT64_C(0x9e3779b97f4a7c15) + 1;
	return x ^ (x >> 29);
}

static void fill(struct worker *w, struct registers *r)
{
	uint64_t x = (uint64_t)w->index << 32 | (uint32_t)atomic_load(&w->rounds);

	for (size_t i = 0; i < sizeof *r / 8; i++)
		((uint64_t *)r)[i] = x = scramble(x);
	r->carry = 1;
}

static void compare(struct worker *w, const char *what, const void *wanted, const void *got, size_t size)
{
	const uint64_t *a = wanted, *b = got;

	for (size_t i = 0; i < size / 8; i++)
		if (a[i] != b[i]) {
			fail(w, "%s: word %zu is %#llx, not %#llx", what, i, (unsigned long long)b[i], (unsigned long long)a[i]);
			return;
		}
}

static void step_ymm(struct worker *w)
{
	struct registers in, out;

	fill(w, &in);
	memset(&out, 0, sizeof out);
	spin_ymm(&in, &out, 2000000);
	compare(w, "ymm", in.vector, out.vector, 16 * 32);
	compare(w, "general registers", in.general, out.general, sizeof in.general + sizeof in.red_zone);
	compare(w, "carry flag", &in.carry, &out.carry, 8);
}

static void step_zmm(struct worker *w)
{
	struct registers in, out;

	if (!__builtin_cpu_supports("avx512bw")) {
		step_ymm(w);
		return;
	}
	fill(w, &in);
	memset(&out, 0, sizeof out);
	spin_zmm(&in, &out, 2000000);
	compare(w, "zmm, k, general registers, carry flag", &in, &out, sizeof in);
}

static void step_sleep_ymm(struct worker *w)
{
	struct timespec t = span(w);
	int64_t start = now_ns(CLOCK_MONOTONIC);
	struct registers in, out;
	long result;

	fill(w, &in);
	out = in;
	memset(out.vector, 0, sizeof out.vector);
	memset(&out.general[1], 0, sizeof out.general[1] * 6);
	result = sleep_ymm(&in, &out, &t);
	if (result)
		fail(w, "nanosleep by hand: %ld", result);
	lasted(w, "nanosleep by hand", start, w->argument * 1000000);
	compare(w, "ymm over a system call", in.vector, out.vector, 16 * 32);
	compare(w, "general registers over a system call", in.general, out.general, sizeof in.general + sizeof in.red_zone);
}

static void step_round(struct worker *w)
{
	static const int modes[] = { FE_TONEAREST, FE_DOWNWARD, FE_UPWARD, FE_TOWARDZERO };
	int mode = modes[w->argument];
	volatile double one = 1, seven = 7;
	volatile long double lone = 1;
	double first = one / seven;
	long double lfirst = lone / seven;

	for (int i = 0; i < 200000; i++)
		if (one / seven != first || lone / seven != lfirst || fegetround() != mode) {
			fail(w, "rounding changed: mode %#x", (unsigned)fegetround());
			return;
		}
}

static void setup_round(struct worker *w)
{
	static const int modes[] = { FE_TONEAREST, FE_DOWNWARD, FE_UPWARD, FE_TOWARDZERO };

	w->argument = w->index % 4;
	fesetround(modes[w->argument]);
}

static void step_memory(struct worker *w)
{
	uint64_t words[WORDS], x = (uint64_t)w->index, y = x;

	for (int i = 0; i < WORDS; i++)
		words[i] = x = scramble(x);
	for (int round = 0; round < 20; round++)
		for (int i = 0; i < WORDS; i++)
			words[i] = (words[i] << 1 | words[i] >> 63) ^ (uint64_t)round;
	for (int i = 0; i < WORDS; i++) {
		uint64_t value = y = scramble(y);

		for (int round = 0; round < 20; round++)
			value = (value << 1 | value >> 63) ^ (uint64_t)round;
		if (words[i] != value) {
			fail(w, "memory: word %d", i);
			return;
		}
	}
}

static struct rseq *rseq_area(void)
{
	return (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
}

/*
 * One increment of this CPU's counter by a critical section so long that most stops fall into it. A thread that went on in the
 * middle, instead of at the abort handler, would write back an old value: the sum of the counters would be too small.
 * Returns whether it was committed.
 */
static bool rseq_increment(void)
{
	struct rseq *area = rseq_area();
	int aborted = 0;

	__asm__ volatile(
		".pushsection __rseq_cs, \"aw\"\n\t"
		".balign 32\n"
		"3:\t.long 0, 0\n\t"
		".quad 1f, 2f - 1f, 4f\n\t"
		".popsection\n\t"
		"leaq 3b(%%rip), %%rax\n\t"
		"movq %%rax, %[section]\n"
		"1:\tmovl %[cpu], %%eax\n\t"
		"shlq $6, %%rax\n\t"
		"addq %[counters], %%rax\n\t"
		"movq (%%rax), %%rdx\n\t"
		"movl $100000, %%ecx\n"
		"6:\tdecl %%ecx\n\t"
		"jnz 6b\n\t"
		"incq %%rdx\n\t"
		"movq %%rdx, (%%rax)\n"
		"2:\n\t"
		".pushsection .text.unlikely\n\t"
		".byte 0x0f, 0xb9, 0x3d\n\t"
		".long 0x53053053\n"
		"4:\tmovl $1, %[aborted]\n\t"
		"jmp 5f\n\t"
		".popsection\n"
		"5:\n"
		: [aborted] "+r"(aborted), [section] "=m"(area->rseq_cs)
		: [cpu] "m"(area->cpu_id), [counters] "r"(per_cpu)
		: "rax", "rcx", "rdx", "memory", "cc");
	return !aborted;
}

static void step_rseq(struct worker *w)
{
	for (int i = 0; i < 50; i++)
		w->added += rseq_increment();
}

/* The waker: every few milliseconds one wake() for each of its share of the waiting threads, until all of them are done. */
static void step_waker(struct worker *w)
{
	bool left = true;

	while (left && (w->argument || atomic_load(&stopping))) {
		struct timespec t = to_timespec(w->argument * 1000000);

		left = false;
		for (int i = 0; i < THREADS; i++) {
			struct worker *other = &workers[i];

			if (!other->kind->wake || i % 4 != w->index % 4 || atomic_load(&other->done))
				continue;
			left = true;
			other->kind->wake(other);
		}
		expect(w, "the waker's nanosleep", nanosleep(&t, NULL), 0, 0);
		atomic_fetch_add(&w->rounds, 1);
	}
}

static const struct kind kinds[] = {
	{ "ymm", step_ymm, NULL, NULL, 0, 4 },
	{ "zmm", step_zmm, NULL, NULL, 0, 2 },
	{ "sleepymm", step_sleep_ymm, NULL, NULL, 30, 2 },
	{ "round", step_round, NULL, setup_round, 0, 2 },
	{ "memory", step_memory, NULL, NULL, 0, 2 },
	{ "rseq", step_rseq, NULL, NULL, 0, 4 },
	{ "nanosleep", step_nanosleep, NULL, NULL, 3, 1 },
	{ "nanosleep", step_nanosleep, NULL, NULL, 250, 1 },
	{ "clockrel", step_clock_relative, NULL, NULL, 60, 1 },
	{ "untilmono", step_until_monotonic, NULL, NULL, 120, 1 },
	{ "untilreal", step_until_realtime, NULL, NULL, 90, 1 },
	{ "poll", step_poll, NULL, setup_pipe, 70, 1 },
	{ "ppoll", step_ppoll, NULL, setup_pipe, 110, 1 },
	{ "select", step_select, NULL, setup_pipe, 80, 1 },
	{ "pselect", step_pselect, NULL, setup_pipe, 100, 1 },
	{ "epoll", step_epoll, NULL, setup_epoll, 75, 2 },
	{ "epollpwait", step_epoll_pwait, NULL, setup_epoll, 85, 1 },
	{ "sigtimed", step_sigtimedwait, NULL, NULL, 95, 1 },
	{ "futexrel", step_futex_relative, NULL, NULL, 65, 1 },
	{ "futexuntil", step_futex_until, NULL, NULL, 130, 1 },
	{ "condtimed", step_cond_timed, NULL, NULL, 115, 1 },
	{ "semtimed", step_sem_timed, NULL, NULL, 105, 1 },
	{ "rcvtimeo", step_receive_timed, NULL, setup_sockets_timed, 125, 1 },
	{ "futex", step_futex, wake_futex, NULL, 0, 2 },
	{ "cond", step_cond, wake_cond, NULL, 0, 2 },
	{ "sem", step_sem, wake_sem, NULL, 0, 2 },
	{ "mutex", step_lock, wake_lock, NULL, 0, 1 },
	{ "pi", step_lock, wake_lock, setup_pi, 0, 1 },
	{ "pipe", step_read, wake_write, setup_pipe, 0, 2 },
	{ "fifo", step_read, wake_write, setup_fifo, 0, 1 },
	{ "eventfd", step_read, wake_write, setup_eventfd, 0, 1 },
	{ "timerfd", step_read, NULL, setup_timerfd, 0, 1 },
	{ "socket", step_receive, wake_write, setup_sockets, 0, 1 },
	{ "fullpipe", step_write, wake_drain, setup_full_pipe, 0, 1 },
	{ "pollfor", step_poll_for, wake_write, setup_pipe, 0, 2 },
	{ "selectfor", step_select_for, wake_write, setup_pipe, 0, 1 },
	{ "epollfor", step_epoll_for, wake_write, setup_epoll, 0, 2 },
	{ "sigwait", step_sigwait, wake_signal, NULL, SIGUSR1, 1 },
	{ "signalfd", step_signalfd, wake_signal, setup_signalfd, SIGWINCH, 1 },
	{ "pause", step_pause, wake_signal, NULL, SIGUSR2, 2 },
	{ "sigsuspend", step_sigsuspend, wake_signal, NULL, SIGURG, 2 },
	{ "waker", step_waker, NULL, NULL, 1, 1 },
	{ "waker", step_waker, NULL, NULL, 4, 1 },
	{ "waker", step_waker, NULL, NULL, 20, 1 },
	{ "waker", step_waker, NULL, NULL, 60, 1 },
};

/* -- a thread ------------------------------------------------------------------------------------------------------ */

static void on_signal(int number)
{
	char here;

	(void)number;
	atomic_fetch_add(&self->signals, 1);
	if (&here < self->altstack || &here >= self->altstack + ALTSTACK)
		fail(self, "a handler ran on another stack");
}

static long rseq_again(void)
{
	/* glibc registers 32 bytes, the first version's size, even where __rseq_size says how many of them are in use. */
	return syscall(SYS_rseq, rseq_area(), __rseq_size < 32 ? 32 : __rseq_size, 0, 0x53053053);
}

static void name_of(const struct worker *w, char name[16])
{
	snprintf(name, 16, "%.12s%d", w->kind->name, w->index);
}

/* What belongs to the thread, and what the kernel says of it. */
static void check_self(struct worker *w)
{
	char wanted[16], name[16] = "";
	unsigned long gs = 0;
	stack_t stack;
	sigset_t mask;
	size_t length;
	void *head = NULL;

	for (int i = 0; i < 8; i++)
		if (canary[i] != scramble((uint64_t)(w->index * 8 + i)))
			fail(w, "TLS: word %d", i);
	if (self != w || w->tid != syscall(SYS_gettid) || !pthread_equal(w->thread, pthread_self()))
		fail(w, "identity");
	pthread_sigmask(SIG_SETMASK, NULL, &mask);
	if (memcmp(&mask, &w->mask, sizeof(uint64_t)))
		fail(w, "signal mask %#lx, not %#lx", *(unsigned long *)&mask, *(unsigned long *)&w->mask);
	if (sigaltstack(NULL, &stack) || stack.ss_sp != w->altstack || stack.ss_size != ALTSTACK || stack.ss_flags)
		fail(w, "alternate stack %p, flags %d", stack.ss_sp, stack.ss_flags);
	name_of(w, wanted);
	if (prctl(PR_GET_NAME, name) || strcmp(name, wanted))
		fail(w, "name %s", name);
	if (prctl(PR_GET_TIMERSLACK) != 50000 + w->index)
		fail(w, "timer slack %d", prctl(PR_GET_TIMERSLACK));
	if (syscall(SYS_arch_prctl, ARCH_GET_GS, &gs) || gs != w->gs)
		fail(w, "gs base %#lx", gs);
	if (syscall(SYS_get_robust_list, 0, &head, &length) || head != w->robust_head)
		fail(w, "robust list %p", head);
	if (getpriority(PRIO_PROCESS, 0) != w->index % 3)
		fail(w, "nice %d", getpriority(PRIO_PROCESS, 0));
	if (rseq_again() != -1 || errno != EBUSY)
		fail(w, "rseq is not registered: %s", strerror(errno));
	if (rseq_area()->cpu_id >= cpus)
		fail(w, "rseq: CPU %u", rseq_area()->cpu_id);
}

static void setup_self(struct worker *w)
{
	char name[16];
	stack_t stack = { .ss_size = ALTSTACK };
	size_t length;

	self = w;
	w->tid = (pid_t)syscall(SYS_gettid);
	w->thread = pthread_self();
	for (int i = 0; i < 8; i++)
		canary[i] = scramble((uint64_t)(w->index * 8 + i));
	w->altstack = stack.ss_sp = malloc(ALTSTACK);
	sigaltstack(&stack, NULL);
	pthread_sigmask(SIG_SETMASK, NULL, &w->mask);
	if (w->kind->step == step_pause)
		sigdelset(&w->mask, SIGUSR2);
	for (int i = 5; i < 20; i++)
		if (scramble((uint64_t)(w->index * 64 + i)) & 1)
			sigaddset(&w->mask, SIGRTMIN + i);
	pthread_sigmask(SIG_SETMASK, &w->mask, NULL);
	name_of(w, name);
	prctl(PR_SET_NAME, name);
	prctl(PR_SET_TIMERSLACK, 50000 + w->index);
	setpriority(PRIO_PROCESS, 0, w->index % 3);
	w->gs = UINT64_C(0x100000000000) + (uint64_t)w->index * 4096;
	syscall(SYS_arch_prctl, ARCH_SET_GS, w->gs);
	syscall(SYS_get_robust_list, 0, &w->robust_head, &length);
	if (w->index == 0)
		pthread_mutex_lock(&robust);
}

static void *work(void *argument)
{
	struct worker *w = argument;

	if (w->kind->setup)
		w->kind->setup(w);
	setup_self(w);
	pthread_barrier_wait(&started);
	while (!atomic_load(&stopping)) {
		check_self(w);
		w->kind->step(w);
		atomic_fetch_add(&w->rounds, 1);
	}
	check_self(w);
	atomic_store(&w->done, true);
	return NULL;	/* worker 0 with the robust mutex locked */
}

/* -- the process --------------------------------------------------------------------------------------------------- */

static void start(void)
{
	struct sigaction action = { .sa_handler = on_signal, .sa_flags = SA_ONSTACK };
	pthread_mutexattr_t attribute;
	sigset_t blocked;
	pthread_t thread;
	int index = 0;

	cpus = (uint32_t)sysconf(_SC_NPROCESSORS_CONF);
	sigaction(SIGUSR2, &action, NULL);
	sigaction(SIGURG, &action, NULL);
	sigemptyset(&blocked);
	for (const int *s = (int[]){ SIGUSR1, SIGUSR2, SIGURG, SIGWINCH, SIGIO, 0 }; *s; s++)
		sigaddset(&blocked, *s);
	pthread_sigmask(SIG_BLOCK, &blocked, NULL);
	pthread_mutexattr_init(&attribute);
	pthread_mutexattr_setrobust(&attribute, PTHREAD_MUTEX_ROBUST);
	pthread_mutex_init(&robust, &attribute);
	pthread_barrier_init(&started, NULL, THREADS + 1);
	for (const struct kind *k = kinds; k < kinds + sizeof kinds / sizeof *kinds; k++)
		for (int i = 0; i < k->count; i++, index++) {
			struct worker *w = &workers[index];

			if (index >= THREADS)
				exit(73);
			*w = (struct worker){ .index = index, .kind = k, .argument = k->argument,
				.mutex = PTHREAD_MUTEX_INITIALIZER, .cond = PTHREAD_COND_INITIALIZER };
			sem_init(&w->sem, 0, 0);
		}
	if (index != THREADS)
		exit(74);
	for (int i = 0; i < THREADS; i++)
		if (pthread_create(&thread, NULL, work, &workers[i]))
			exit(75);
	pthread_barrier_wait(&started);
}

/* Ends all threads; each pthread_join needs the kernel to clear the thread's tid address. */
static void finish(void)
{
	uint64_t added = 0, counted = 0;
	int error;

	atomic_store(&stopping, true);
	for (int i = 0; i < THREADS; i++)
		if ((error = pthread_join(workers[i].thread, NULL)))
			fail(&workers[i], "pthread_join: %s", strerror(error));
	error = pthread_mutex_lock(&robust);
	if (error != EOWNERDEAD)
		fail(NULL, "robust mutex: %s", strerror(error));
	for (int i = 0; i < THREADS; i++)
		added += workers[i].added;
	for (int i = 0; i < CPUS; i++)
		counted += per_cpu[i].count;
	if (added != counted)
		fail(NULL, "rseq: %llu increments, counted %llu", (unsigned long long)added, (unsigned long long)counted);
}

static void report(int fd)
{
	unsigned count = atomic_load(&error_count);

	dprintf(fd, "errors %u\n", count);
	for (unsigned i = 0; i < count && i < ERRORS; i++)
		dprintf(fd, "error %s\n", errors[i]);
	for (int i = 0; i < THREADS; i++)
		dprintf(fd, "thread %d %s %llu\n", i, workers[i].kind->name, (unsigned long long)atomic_load(&workers[i].rounds));
}

int main(int argc, char **argv)
{
	char request[64];
	int listener, fd;

	if (argc != 2)
		return 64;
	start();
	listener = control_listen(argv[1]);
	for (;;) {
		fd = control_next(listener, request, sizeof request);
		if (!strcmp(request, "finish"))
			break;
		report(fd);
		close(fd);
	}
	finish();
	report(fd);
	close(fd);
	return atomic_load(&error_count) != 0;
}
