/* Real mapping calls, their real events, applied to a real window in another order; prints the maps that come out.
 *
 * usage: window SCENARIO ORDER KERNEL; SCENARIO: a letter per call; with digits: made by that thread,
 * which the window sees, else by one that it does not; ORDER: a digit per event, the position in which it really came; KERNEL: whether it can be
 * asked what is mapped: new (PROCMAP_QUERY), old (the text), none (as of a forked child). */
#define _GNU_SOURCE
#include "one_backing.h"
#include "pager/callers.h"
#include "pager/proc.h"
#include "pager/space.h"
#include "pager/uffd.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>

enum { SIZE = 16 * LR_PAGE, MAX_EVENTS = 8, MAX_CALLS = 4, THREADS = 2 };
#define X 0x100000000ull /* registered mappings, and free room */
#define W (X - SIZE)     /* ends where X begins; its image is V */
#define S 0x200000000ull
#define D 0x300000000ull
#define E 0x400000000ull
#define V 0x500000000ull
#define CHECK(condition)                                                                                               \
	do {                                                                                                           \
		if (!(condition)) {                                                                                    \
			perror(#condition);                                                                            \
			exit(1);                                                                                       \
		}                                                                                                      \
	} while (0)

static struct uffd_msg events[MAX_EVENTS];
static struct origin shown[MAX_EVENTS]; /* at a REMAP's destination, when it was read */
static struct space space;
static const struct origin *answer; /* to be given in place of what is there now */
static struct call calls[MAX_EVENTS][MAX_CALLS]; /* in which threads slept before it was read */
static uint32_t n_calls[MAX_EVENTS];
static unsigned n_events;
static bool looks;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t more = PTHREAD_COND_INITIALIZER;
static int uffd;

/* -- what window.c needs of the pager ---------------------------------------------------------------------------------- */

void log_line(const char *format, ...) {
	fprintf(stderr, "%s\n", format);
}

void space_kill(struct space *space, const char *why) {
	(void)space;
	fprintf(stderr, "killed: %s\n", why);
	exit(1);
}

bool space_mapped(struct space *space, uint64_t start, uint64_t end, struct interval *piece) {
	struct proc_place place;
	for (uint64_t at = start; at < end && proc_place(space, at, &place) && place.start < end; at = place.end) {
		if (place.device != template.device || place.inode != template.inode)
			continue;
		uint64_t from = place.start > start ? place.start : start;
		*piece = (struct interval){.start = from,
					   .end = place.end,
					   .image = place.offset + (from - place.start),
					   .backing = LR_BACKING_TEMPLATE};
		return true;
	}
	return false;
}

struct origin space_origin(struct space *space, uint64_t address) {
	struct interval piece;
	if (answer)
		return *answer;
	if (!space_mapped(space, address, address + 1, &piece))
		return (struct origin){0};
	return (struct origin){true, LR_BACKING_TEMPLATE, piece.image};
}

/* From now on this is Linux 6.10: /proc/PID/maps knows no ioctl. */
static void forget_procmap_query(void) {
	const unsigned procmap_query = 0xc0686611;
	struct sock_filter filter[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_ioctl, 0, 3),
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[1])),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, procmap_query, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOTTY),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = {.len = sizeof filter / sizeof *filter, .filter = filter};
	CHECK(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	CHECK(!syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program));
}

static void print_map(const char *whose, const struct interval_map *map) {
	struct interval found;
	for (uint64_t at = 0; interval_map_next(map, at, &found); at = found.end)
		printf("%s %llx+%llx %s%llx%s\n", whose, (unsigned long long)found.start,
		       (unsigned long long)(found.end - found.start), found.flags & INTERVAL_ZERO ? "zero " : "",
		       found.flags & INTERVAL_ZERO ? 0 : (unsigned long long)found.image,
		       found.flags & INTERVAL_SUSPECT ? " suspect" : "");
}

struct lr_error space_start(struct space *child) {
	enum closing result;
	do
		result = window_close(child);
	while (result == WINDOW_OPEN);
	CHECK(result == WINDOW_CLOSED);
	print_map("child", &child->map);
	return LR_OK;
}

/* -- events ------------------------------------------------------------------------------------------------------------ */

/* Whoever made the call sleeps until its event is read; but not yet, if it is seen in the instant in which it is queued. */
static void look(void) {
	struct pollfd readable = {.fd = uffd, .events = POLLIN};
	CHECK(poll(&readable, 1, -1) == 1);
	while (looks && !space.window.n_calls) {
		callers_forget(&space.window);
		space.window.remap_ns = now_ns();
		callers_look(&space);
	}
	CHECK(space.window.n_calls <= MAX_CALLS);
}

static void *read_events(void *unused) {
	struct uffd_msg message;
	for (;;) {
		look();
		if (read(uffd, &message, sizeof message) != sizeof message)
			return unused;
		pthread_mutex_lock(&lock);
		CHECK(n_events < MAX_EVENTS);
		if (message.event == UFFD_EVENT_REMAP)
			shown[n_events] = space_origin(&space, message.arg.remap.to);
		n_calls[n_events] = space.window.n_calls;
		if (space.window.n_calls)
			memcpy(calls[n_events], space.window.calls, space.window.n_calls * sizeof *space.window.calls);
		events[n_events++] = message;
		space.window.n_calls = 0;
		pthread_cond_broadcast(&more);
		pthread_mutex_unlock(&lock);
	}
}

static void await_events(unsigned n) {
	pthread_mutex_lock(&lock);
	while (n_events < n)
		pthread_cond_wait(&more, &lock);
	pthread_mutex_unlock(&lock);
}

static void apply(struct space *space, const struct uffd_msg *event) {
	answer = &shown[event - events];
	space->window.n_calls = n_calls[event - events];
	if (space->window.n_calls)
		memcpy(space->window.calls, calls[event - events], space->window.n_calls * sizeof *space->window.calls);
	switch (event->event) {
	case UFFD_EVENT_UNMAP:
		CHECK(!window_unmap(space, event->arg.remove.start, event->arg.remove.end));
		break;
	case UFFD_EVENT_REMAP:
		CHECK(!window_remap(space, event->arg.remap.from, event->arg.remap.to, event->arg.remap.len, true));
		break;
	case UFFD_EVENT_FORK: {
		struct space *child = calloc(1, sizeof *child);
		CHECK(child);
		interval_map_init(&child->map);
		window_init(&child->window);
		child->uffd = (int)event->arg.fork.ufd;
		child->maps = child->task = child->pidfd = -1;
		CHECK(!window_fork(space, child));
		break;
	}
	default:
		CHECK(!"an expected event");
	}
	answer = NULL;
}

/* -- scenarios --------------------------------------------------------------------------------------------------------- */

static void add(struct space *space, int memfd, uint64_t at, uint64_t image) {
	CHECK(mmap((void *)at, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED_NOREPLACE, memfd, (off_t)image) !=
	      MAP_FAILED);
	CHECK(!uffd_register(uffd, at, at + SIZE).code);
	CHECK(!interval_map_insert(&space->map, (struct interval){.start = at, .end = at + SIZE, .image = image}));
}

static void move_bytes(uint64_t from, uint64_t bytes, uint64_t to, int flags) {
	CHECK(mremap((void *)from, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED | flags, (void *)to) != MAP_FAILED);
}

static void move(uint64_t from, uint64_t to, int flags) {
	move_bytes(from, SIZE, to, flags);
}

static void resize(uint64_t at, uint64_t from, uint64_t to) {
	CHECK(mremap((void *)at, from, to, 0) == (void *)at);
}

static pid_t fork_child(void) {
	pid_t child = fork();
	CHECK(child >= 0);
	while (!child)
		pause();
	return child;
}

static pid_t child;

static void make_call(char step) {
	switch (step) {
	case 'u': /* unmap S */
		CHECK(!munmap((void *)S, SIZE));
		break;
	case 'h': /* unmap half of S */
		CHECK(!munmap((void *)(S + SIZE / 2), SIZE / 2));
		break;
	case 's': /* X to S */
		move(X, S, 0);
		break;
	case 'd': /* X to D */
		move(X, D, 0);
		break;
	case 'k': /* X to D, and X stays mapped */
		move(X, D, MREMAP_DONTUNMAP);
		break;
	case 't': /* S to X, which must be free */
		move(S, X, 0);
		break;
	case 'p': /* half of S to X, which must be free */
		move_bytes(S, SIZE / 2, X, 0);
		break;
	case 'l': /* S to X, and S stays mapped */
		move(S, X, MREMAP_DONTUNMAP);
		break;
	case 'e': /* X to E */
		move(X, E, 0);
		break;
	case 'm': /* W, grown over X, to E, and stays mapped */
		move_bytes(W, 2 * SIZE, E, MREMAP_DONTUNMAP);
		break;
	case 'z': /* unmap X */
		CHECK(!munmap((void *)X, SIZE));
		break;
	case 'b': /* D back to X */
		move(D, X, 0);
		break;
	case 'w': /* W grows over X, which must be free */
		resize(W, SIZE, 2 * SIZE);
		break;
	case 'c': /* and shrinks */
		resize(W, 2 * SIZE, SIZE);
		break;
	case 'r': /* D shrinks to a half */
		resize(D, SIZE, SIZE / 2);
		break;
	case 'g': /* and grows again */
		resize(D, SIZE / 2, SIZE);
		break;
	case 'x': /* X shrinks to a half */
		resize(X, SIZE, SIZE / 2);
		break;
	case 'y': /* and grows again */
		resize(X, SIZE / 2, SIZE);
		break;
	case 'f':
		child = fork_child();
		break;
	default:
		CHECK(!"a known step");
	}
}

static char next_step; /* for the thread whose turn it is; 0: it has made its call */
static unsigned turn;

__attribute__((noreturn)) static void *make_calls(void *number) {
	pthread_mutex_lock(&lock);
	for (;;) {
		while (!next_step || turn != (uintptr_t)number)
			pthread_cond_wait(&more, &lock);
		char step = next_step;
		pthread_mutex_unlock(&lock);
		make_call(step);
		pthread_mutex_lock(&lock);
		next_step = 0;
		pthread_cond_broadcast(&more);
	}
}

static void play(const char *scenario) {
	pthread_mutex_lock(&lock);
	for (turn = 1; *scenario; scenario++) {
		if (*scenario >= '1' && *scenario < '1' + THREADS) {
			turn = (unsigned)(*scenario - '0');
			continue;
		}
		next_step = *scenario;
		pthread_cond_broadcast(&more);
		while (next_step)
			pthread_cond_wait(&more, &lock);
	}
	pthread_mutex_unlock(&lock);
}

int main(int argc, char **argv) {
	bool poison, hugetlb;
	pthread_t thread;
	struct stat file;
	CHECK(argc == 4);
	const char *scenario = argv[1], *order = argv[2], *kernel = argv[3];
	int memfd = memfd_create("template", MFD_CLOEXEC);
	CHECK(memfd >= 0 && !ftruncate(memfd, (off_t)LR_ADDRESS_END) && !fstat(memfd, &file));
	template.device = file.st_dev;
	template.inode = file.st_ino;
	uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
	CHECK(uffd >= 0 && !uffd_api(uffd, &poison, &hugetlb).code);
	CHECK(!fcntl(uffd, F_SETFL, 0)); /* read blocks */
	space.uffd = uffd;
	space.pid = getpid();
	space.maps = space.task = space.pidfd = -1;
	if (strcmp(kernel, "none") != 0)
		CHECK((space.pidfd = (int)syscall(SYS_pidfd_open, getpid(), 0)) >= 0);
	if (!strcmp(kernel, "old"))
		forget_procmap_query();
	interval_map_init(&space.map);
	window_init(&space.window);
	add(&space, memfd, X, X);
	add(&space, memfd, S, S);
	if (strchr(scenario, 'w'))
		add(&space, memfd, W, V);
	looks = strpbrk(scenario, "12");
	CHECK(!pthread_create(&thread, NULL, read_events, NULL));
	for (uintptr_t number = 1; number <= THREADS; number++)
		CHECK(!pthread_create(&thread, NULL, make_calls, (void *)number));

	play(scenario);
	unsigned n = (unsigned)strlen(order);
	await_events(n);
	CHECK(n_events == n);
	for (unsigned i = 0; i < n; i++)
		apply(&space, &events[order[i] - '0']);
	enum closing result;
	do
		result = window_close(&space);
	while (result == WINDOW_OPEN);
	CHECK(result == WINDOW_CLOSED);
	print_map("self", &space.map);
	if (child) {
		kill(child, SIGKILL);
		waitpid(child, NULL, 0);
	}
	fflush(stdout);
	_exit(0);
}
