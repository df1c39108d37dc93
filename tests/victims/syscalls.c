/*
 * System calls on memory that has not arrived. usage: syscalls CONTROL_SOCKET, in a directory of its own.
 *
 * Every case has a region of its own, private or shared, that was filled at the start and that nobody has touched since.
 * A request is a case's name and "private" or "shared"; the answer is every call's result and errno, and a hash of the bytes
 * that it read or wrote, all the same in a twin. "list" names the cases, "region CASE KIND" gives the address.
 */
#define _GNU_SOURCE
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>

#include "syscalls_io.h"

#define ARENA 0x200000000000ul
#define SPACING (1ul << 20)
#define MPOL_F_NODE 1
#define MPOL_F_ADDR 2

/* -- other processes --------------------------------------------------------------------------------------------------- */

static void vm_copy(unsigned char *m)
{
	struct iovec lazy = { m + 99, SIZE / 2 }, local = { plain, SIZE / 2 }, other = { m + SIZE / 2 + 200, SIZE / 4 };

	say(process_vm_readv(getpid(), &local, 1, &lazy, 1, 0));
	show(plain, SIZE);
	local.iov_len = SIZE / 4;
	say(process_vm_writev(getpid(), &local, 1, &other, 1, 0));
}

static void exec_arguments(unsigned char *m)
{
	int status = -1;
	pid_t child;

	strcpy((char *)m + PAGE - 3, "/bin/sh");
	strcpy((char *)m + 5 * PAGE, "-c");
	strcpy((char *)m + 9 * PAGE - 2, "exit 42");
	child = fork();
	if (!child) {
		execl((char *)m + PAGE - 3, (char *)m + PAGE - 3, (char *)m + 5 * PAGE, (char *)m + 9 * PAGE - 2, NULL);
		_exit(1);
	}
	say(wait4(child, (int *)memset(m + 12 * PAGE, 0, 4), 0, (struct rusage *)(m + 14 * PAGE)) == child);
	memcpy(&status, m + 12 * PAGE, 4);
	say(status);
	memset(m + 14 * PAGE, 0, sizeof(struct rusage));
}

static void spawned(unsigned char *m)
{
	char **arguments = (char **)(m + 14 * PAGE), **environment = (char **)(m + 18 * PAGE);
	pid_t *child = (pid_t *)(m + 22 * PAGE);
	int status = -1;

	arguments[0] = strcpy((char *)m + PAGE - 3, "/bin/sh");
	arguments[1] = strcpy((char *)m + 5 * PAGE, "-c");
	arguments[2] = strcpy((char *)m + 9 * PAGE - 2, "exit $STATUS");
	environment[0] = strcpy((char *)m + 26 * PAGE - 4, "STATUS=42");
	arguments[3] = environment[1] = NULL;
	say(posix_spawn(child, arguments[0], NULL, NULL, arguments, environment));
	say(waitpid(*child, &status, 0) == *child);
	say(status);
	memset(m + 14 * PAGE, 0, 9 * PAGE);
}

static int change_memory(void *at)
{
	unsigned char *m = at;

	m[5 * PAGE] ^= m[9 * PAGE];
	return (int)(hash_of(m, 8 * PAGE) % 251);
}

/* A process that shares the memory, on a stack in it. */
static void shared_vm(unsigned char *m)
{
	int status = -1;
	pid_t child = clone(change_memory, m + SIZE, CLONE_VM | CLONE_VFORK | SIGCHLD, m);

	say(waitpid(child, &status, 0) == child);
	say(status);
	memset(m + 16 * PAGE, 0, 16 * PAGE);
}

static int sealed_fd;
static unsigned char *sealed_shared, *sealed_private;

static void make_sealed(void)
{
	sealed_fd = memfd_create("sealed", MFD_ALLOW_SEALING);
	if (sealed_fd < 0 || ftruncate(sealed_fd, SIZE))
		control_die("memfd");
	sealed_shared = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, sealed_fd, 0);
	sealed_private = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE, sealed_fd, 0);
	if (sealed_shared == MAP_FAILED || sealed_private == MAP_FAILED)
		control_die("mmap");
	fill(sealed_shared, SIZE, 1234);
	memset(sealed_private + PAGE, 5, PAGE);
	if (fcntl(sealed_fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE))
		control_die("F_ADD_SEALS");
}

/* A memfd that was sealed before the snapshot, with a mapping that may still write it, and a private one. */
static void sealed(unsigned char *m)
{
	unsigned char *fresh;

	say(fcntl(sealed_fd, F_GET_SEALS));
	say(ftruncate(sealed_fd, PAGE));
	say(ftruncate(sealed_fd, 2 * SIZE));
	say(pwrite(sealed_fd, m, PAGE, 0));
	say(mmap(NULL, SIZE, PROT_WRITE, MAP_SHARED, sealed_fd, 0) == MAP_FAILED);
	fresh = mmap(NULL, SIZE, PROT_READ, MAP_SHARED, sealed_fd, 0);
	sealed_shared[0]++;
	sealed_shared[PAGE]++;
	sealed_private[2 * PAGE]++;
	show(fresh, SIZE);
	show(sealed_shared, SIZE);
	show(sealed_private, SIZE);
	say(pread(sealed_fd, m, SIZE, 0));
	munmap(fresh, SIZE);
}

/* -- threads ----------------------------------------------------------------------------------------------------------- */

static long futex(void *at, int what, unsigned value, const struct timespec *timeout, void *second, unsigned third)
{
	return syscall(SYS_futex, at, what, value, timeout, second, third);
}

/* Waits at the start of a region's page 26, which it has not read. */
static void *wait_for_wake(void *at)
{
	return (void *)futex(at, FUTEX_WAIT, (unsigned)scramble(region_seed + 26 * PAGE / 8), NULL, NULL, 0);
}

static void futexes(unsigned char *m)
{
	struct timespec *timeout = (struct timespec *)(m + 20 * PAGE);
	void *result = NULL;
	pthread_t thread;

	say(futex(m, FUTEX_WAIT, 12345, NULL, NULL, 0)); /* another value: EAGAIN */
	say(futex(m + 4 * PAGE, FUTEX_WAIT_PRIVATE, 12345, NULL, NULL, 0));
	say(futex(m + 7 * PAGE, FUTEX_WAIT, 0, &(struct timespec){ .tv_nsec = 1000 }, NULL, 0)); /* a zero page: ETIMEDOUT */
	say(futex(m + 8 * PAGE, FUTEX_WAKE, 1, NULL, NULL, 0));
	say(futex(m + 9 * PAGE, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0));
	say(futex(m + 10 * PAGE, FUTEX_REQUEUE, 1, (void *)5, m + 11 * PAGE, 0));
	say(futex(m + 12 * PAGE, FUTEX_CMP_REQUEUE, 1, (void *)5, m + 13 * PAGE, 12345));
	say(futex(m + 14 * PAGE, FUTEX_WAKE_OP, 1, (void *)1, m + 16 * PAGE, FUTEX_OP(FUTEX_OP_ADD, 5, FUTEX_OP_CMP_EQ, 0)));
	say(futex(m + 19 * PAGE, FUTEX_LOCK_PI, 0, NULL, NULL, 0)); /* a zero page: locked by this thread */
	say(futex(m + 19 * PAGE, FUTEX_UNLOCK_PI, 0, NULL, NULL, 0));
	timeout->tv_sec = 0;
	timeout->tv_nsec = 1000;
	say(futex(m + 23 * PAGE, FUTEX_WAIT, 0, timeout, NULL, 0));
	if (pthread_create(&thread, NULL, wait_for_wake, m + 26 * PAGE))
		control_die("pthread_create");
	while (futex(m + 26 * PAGE, FUTEX_WAKE, 1, NULL, NULL, 0) != 1)
		;
	pthread_join(thread, &result);
	say((long)result);
}

static void *deep(void *argument)
{
	volatile unsigned char room[20000];

	for (size_t i = 0; i < sizeof room; i++)
		room[i] = (unsigned char)i;
	return (char *)argument + room[19999];
}

static void on_signal(int number)
{
	(void)number;
}

/* Stacks in memory that has not arrived: a thread's, a signal handler's. */
static void stacks(unsigned char *m)
{
	stack_t stack = { .ss_sp = m, .ss_size = 8 * PAGE }, none = { .ss_flags = SS_DISABLE };
	struct sigaction action = { .sa_handler = on_signal, .sa_flags = SA_ONSTACK };
	pthread_attr_t attributes;
	pthread_t thread;
	void *result = NULL;

	say(sigaltstack(&stack, NULL));
	say(sigaction(SIGUSR1, &action, NULL));
	say(raise(SIGUSR1));
	say(sigaltstack(&none, NULL));
	pthread_attr_init(&attributes);
	say(pthread_attr_setstack(&attributes, m + 8 * PAGE, 24 * PAGE));
	say(pthread_create(&thread, &attributes, deep, NULL));
	say(pthread_join(thread, &result));
	say((long)result);
	memset(m, 0, SIZE); /* stacks hold addresses */
}

static void times(unsigned char *m)
{
	struct timespec *short_sleep = (struct timespec *)(m + 4 * PAGE - 8);
	sigset_t *set = (sigset_t *)(m + 8 * PAGE - 16);

	short_sleep->tv_sec = 0;
	short_sleep->tv_nsec = 1;
	say(syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, 0, short_sleep, m + 12 * PAGE));
	say(clock_gettime(CLOCK_REALTIME, (struct timespec *)(m + 16 * PAGE - 8)));
	say(syscall(SYS_clock_gettime, CLOCK_MONOTONIC, m + 20 * PAGE - 8));
	memset(m + 16 * PAGE - 8, 0, 16);
	memset(m + 20 * PAGE - 8, 0, 16);
	say(sigprocmask(SIG_BLOCK, NULL, set));
	say(getrlimit(RLIMIT_CORE, (struct rlimit *)(m + 24 * PAGE - 8)));
	say(syscall(SYS_getrandom, m + 25 * PAGE + 5, 5000, 0));
	memset(m + 25 * PAGE + 5, 0, 5000);
}

/* -- the memory itself ------------------------------------------------------------------------------------------------- */

static void mempolicy(unsigned char *m)
{
	int node = -1;

	say(syscall(SYS_get_mempolicy, &node, NULL, 0, m + 5 * PAGE, MPOL_F_NODE | MPOL_F_ADDR));
	say(node);
	say(syscall(SYS_get_mempolicy, m + 9 * PAGE, NULL, 0, m + 5 * PAGE, MPOL_F_ADDR));
	say(syscall(SYS_mbind, m, SIZE, 0, NULL, 0, 0));
}

/* What has arrived is what move_pages tells of: only its result is compared. */
static void move_pages_query(unsigned char *m)
{
	void *pages[8];
	int status[8];

	for (unsigned long i = 0; i < 8; i++)
		pages[i] = m + i * 4 * PAGE;
	say(syscall(SYS_move_pages, 0, 8, pages, NULL, status, 0));
	hash_of(m, SIZE);
	say(syscall(SYS_move_pages, 0, 8, pages, NULL, status, 0));
	for (int i = 0; i < 8; i++)
		say(i % 4 == 3 || status[i] >= 0);
}

static void locked(unsigned char *m)
{
	say(mlock(m + 123, 8 * PAGE));
	say(mlock2(m + 16 * PAGE, 8 * PAGE, MLOCK_ONFAULT));
	show(m, SIZE);
	say(munlock(m, SIZE / 2));
	say(madvise(m + 17 * PAGE, PAGE, MADV_DONTNEED)); /* locked: EINVAL */
	say(madvise(m + 18 * PAGE, PAGE, 24)); /* MADV_DONTNEED_LOCKED */
	say(munlock(m, SIZE));
}

/* Locked memory that moves and grows: the kernel brings what it grew by before it tells of the move. */
static void locked_growth(unsigned char *m)
{
	static const int protections[] = { PROT_READ | PROT_WRITE, PROT_READ, PROT_NONE };

	for (size_t i = 0; i < 3; i++) {
		unsigned char *at = m + i * 8 * PAGE, *moved;

		say(mlock(at, 4 * PAGE));
		say(mprotect(at, 4 * PAGE, protections[i]));
		moved = mremap(at, 4 * PAGE, 6 * PAGE, MREMAP_MAYMOVE);
		say(moved == MAP_FAILED || moved == at);
		say(mprotect(moved, 6 * PAGE, PROT_READ | PROT_WRITE));
		show(moved, 6 * PAGE);
		moved[5 * PAGE]++;
		say(munlock(moved, 6 * PAGE));
		say(madvise(moved + 3 * PAGE, 2 * PAGE, MADV_DONTNEED));
		show(moved, 6 * PAGE);
		say(mremap(moved, 6 * PAGE, 4 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, at) != at);
	}
}

/* The same in children, each a fork of the one before, which goes on when its own is done. */
static void locked_growth_in_children(unsigned char *m, int children)
{
	int ends[2], status = -1;
	char text[PAGE];
	pid_t child;
	ssize_t n;

	open_pipe(ends);
	child = fork();
	if (!child) {
		out = fdopen(ends[1], "w");
		if (children > 1)
			locked_growth_in_children(m, children - 1);
		locked_growth(m);
		fclose(out);
		_exit(0);
	}
	say(waitpid(child, &status, 0) == child);
	say(status);
	n = read(ends[0], text, sizeof text);
	fwrite(text, 1, n > 0 ? (size_t)n : 0, out);
	shut(ends);
}

static void locked_growth_forked(unsigned char *m)
{
	locked_growth_in_children(m, 2);
}

static void locked_all(unsigned char *m)
{
	void *later;

	say(mlockall(MCL_CURRENT | MCL_FUTURE));
	show(m, SIZE);
	later = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	show(later, SIZE);
	say(munmap(later, SIZE));
	say(munlockall());
	say(madvise(m + 2 * PAGE, 2 * PAGE, MADV_DONTNEED));
}

static void locked_all_on_fault(unsigned char *m)
{
	say(mlockall(MCL_CURRENT | MCL_ONFAULT));
	show(m, SIZE / 2);
	say(munlockall());
}

/* What a child finds of memory under `advice`; EFAULT, not a signal, where it finds nothing. */
static void child_finds(unsigned char *m, int advice)
{
	int status = -1, ends[2];
	uint64_t *hash;
	pid_t child;

	hash = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	open_pipe(ends);
	say(madvise(m + 8 * PAGE, 8 * PAGE, advice));
	child = fork();
	if (!child) {
		for (size_t i = 0; i < SIZE; i += PAGE)
			if (write(ends[1], m + i, PAGE) == (ssize_t)PAGE && read(ends[0], plain, PAGE) == (ssize_t)PAGE)
				hash[1] = hash[1] * 31 + hash_of(plain, PAGE);
			else
				hash[0]++;
		_exit(0);
	}
	say(waitpid(child, &status, 0) == child);
	say(status);
	say((long)hash[0]);
	show(hash, 16);
	munmap(hash, PAGE);
	shut(ends);
}

static void dont_fork(unsigned char *m)
{
	child_finds(m, MADV_DONTFORK);
}

static void wipe_on_fork(unsigned char *m)
{
	child_finds(m, MADV_WIPEONFORK);
}

static void collapse(unsigned char *m)
{
	say(madvise(m, SIZE, MADV_HUGEPAGE));
	madvise(m, SIZE, 25); /* MADV_COLLAPSE: as the machine likes */
	errno = 0;
}

static void process_advice(unsigned char *m)
{
	int self = (int)syscall(SYS_pidfd_open, getpid(), 0);
	struct iovec iov[2] = { { m, 4 * PAGE }, { m + 10 * PAGE, 9 * PAGE } };

	say(syscall(SYS_process_madvise, self, iov, 2, MADV_COLD, 0));
	say(syscall(SYS_process_madvise, self, iov, 2, MADV_PAGEOUT, 0));
	say(syscall(SYS_process_madvise, self, iov, 2, MADV_WILLNEED, 0));
	close(self);
}

static int dig(volatile char *above)
{
	volatile char room[4096];

	room[0] = above[0];
	room[4095] = 1;
	return above ? dig(room) + room[4095] : 0; /* without end, which the compiler must not see */
}

static char *deepest_start;
static rlim_t stack_limit;

static void on_overflow(int number, siginfo_t *info, void *context)
{
	rlim_t depth = (rlim_t)(deepest_start - (char *)info->si_addr);

	(void)context;
	_exit(number != SIGSEGV ? 1 : depth > stack_limit + (64 << 10) ? 2 : depth < stack_limit - (256 << 10) ? 3 : 42);
}

/* The main thread's stack grows to its limit, and no further. */
static void stack_to_limit(unsigned char *m)
{
	struct sigaction action = { .sa_sigaction = on_overflow, .sa_flags = SA_ONSTACK | SA_SIGINFO };
	stack_t stack = { .ss_sp = m, .ss_size = SIZE };
	struct rlimit limit;
	int status = -1;
	pid_t child = fork();

	if (!child) {
		volatile char here = 0;

		getrlimit(RLIMIT_STACK, &limit);
		stack_limit = limit.rlim_cur;
		deepest_start = (char *)&here;
		sigaltstack(&stack, NULL);
		sigaction(SIGSEGV, &action, NULL);
		_exit(dig(&here) & 1);
	}
	waitpid(child, &status, 0);
	say(WIFEXITED(status) ? WEXITSTATUS(status) : -status);
	memset(m, 0, SIZE);
}

#define CASE(name) { #name, name }
static const struct { const char *name; void (*run)(unsigned char *); } cases[] = {
	CASE(file_write), CASE(file_read), CASE(direct_write), CASE(direct_read), CASE(file_writev), CASE(file_readv),
	CASE(names), CASE(pipe_writev), CASE(pipe_readv), CASE(socket_send_receive), CASE(vmsplice_in), CASE(vmsplice_out),
	CASE(splice_tee), CASE(waiting), CASE(vm_copy), CASE(exec_arguments), CASE(spawned), CASE(shared_vm), CASE(sealed), CASE(futexes), CASE(stacks), CASE(times),
	CASE(mempolicy), CASE(move_pages_query), CASE(locked), CASE(locked_growth),
	CASE(locked_growth_forked), CASE(fixed_buffers), CASE(dont_fork), CASE(wipe_on_fork), CASE(collapse),
	CASE(process_advice), CASE(stack_to_limit), { "outside", NULL }, { "outside_vm", NULL }, { "debugger", NULL },
	{ "core", NULL }, CASE(locked_all_on_fault), CASE(locked_all), /* which bring everything, last */
};
#define CASES (sizeof cases / sizeof *cases)

static void serve(char *line)
{
	char name[32] = "", kind[32] = "", third[32] = "";

	sscanf(line, "%31s %31s %31s", name, kind, third);
	if (!strcmp(name, "list"))
		for (size_t i = 0; i < CASES; i++)
			if (cases[i].run)
				fprintf(out, "%s ", cases[i].name);
	for (size_t i = 0; i < CASES; i++) {
		unsigned long at = ARENA + i * 4 * SPACING + (strcmp(strcmp(name, "region") ? kind : third, "shared") ? 0 : SPACING);

		if (!strcmp(name, "region") && !strcmp(kind, cases[i].name))
			fprintf(out, "%lu", at);
		else if (!strcmp(name, cases[i].name) && cases[i].run) {
			fill(plain, SIZE, 99);
			errno = 0;
			region_seed = i * 2 + !strcmp(kind, "shared");
			cases[i].run((void *)at);
			show((void *)at, SIZE);
		}
	}
	if (!strcmp(name, "abort"))
		abort();
}

int main(int argc, char **argv)
{

	if (argc != 2)
		return 64;
	for (size_t i = 0; i < CASES; i++)
		for (unsigned long shared = 0; shared < 2; shared++) {
			void *at = (void *)(ARENA + i * 4 * SPACING + shared * SPACING);
			int flags = MAP_ANONYMOUS | MAP_FIXED_NOREPLACE | (shared ? MAP_SHARED : MAP_PRIVATE);

			if (mmap(at, SIZE, PROT_READ | PROT_WRITE, flags, -1, 0) != at)
				control_die("mmap");
			fill(at, SIZE, i * 2 + shared);
		}
	make_sealed();
	control_serve(control_listen(argv[1]), &out, serve);
}
