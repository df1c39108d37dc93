#define _GNU_SOURCE
#include "space.h"

#include "array.h"
#include "callers.h"
#include "forked.h"
#include "growth.h"
#include "guards.h"
#include "log.h"
#include "pieces.h"
#include "proc.h"
#include "removal.h"
#include "replay.h"
#include "uffd.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>

struct space *space_new(struct pager *pager) {
	struct space *space = calloc(1, sizeof *space);
	if (!space)
		return NULL;
	space->pager = pager;
	space->uffd = space->pidfd = space->maps = space->task = space->pagemap = space->child = space->pid_namespace = -1;
	interval_map_init(&space->map);
	window_init(&space->window);
	pthread_mutex_init(&space->map_lock, NULL);
	pthread_cond_init(&space->settled, NULL);
	pthread_cond_init(&space->left, NULL);
	return space;
}

void space_free(struct space *space) {
	window_deinit(&space->window);
	pthread_mutex_lock(&space->pager->lock);
	for (uint32_t i = 0; i < space->n_shared; i++)
		pager_shared_put(space->pager, space->shared[i]);
	keepers_put(space->pager, space->keeper);
	pthread_mutex_unlock(&space->pager->lock);
	if (space->uffd >= 0)
		close(space->uffd);
	if (space->pidfd >= 0)
		close(space->pidfd);
	if (space->maps >= 0)
		close(space->maps);
	if (space->task >= 0)
		close(space->task);
	scoped_close(&space->pagemap);
	scoped_close(&space->child);
	scoped_close(&space->pid_namespace);
	interval_map_deinit(&space->map);
	pthread_mutex_destroy(&space->map_lock);
	pthread_cond_destroy(&space->settled);
	pthread_cond_destroy(&space->left);
	unpacker_deinit(&space->unpacker);
	free(space->shared);
	free(space->faults);
	free(space);
}

struct backing *space_backing(struct space *space, uint32_t kind) {
	if (kind == LR_BACKING_TEMPLATE)
		return &space->pager->template;
	if (kind == LR_BACKING_HUGETLB)
		return &space->pager->huge;
	for (uint32_t i = 0; i < space->n_shared; i++)
		if (space->shared[i]->kind == kind)
			return space->shared[i];
	return NULL;
}

/* The backing that is this file; NULL: none of them. */
static struct backing *backing_of(struct space *space, dev_t device, ino_t inode) {
	struct backing *const common[] = {&space->pager->template, &space->pager->huge};
	for (uint32_t i = 0; i < 2 + space->n_shared; i++) {
		struct backing *backing = i < 2 ? common[i] : space->shared[i - 2];
		if (backing->fd >= 0 && backing->device == device && backing->inode == inode)
			return backing;
	}
	return NULL;
}

bool space_mapped(struct space *space, uint64_t start, uint64_t end, struct interval *piece) {
	struct proc_place place;
	for (uint64_t at = start; at < end && proc_place(space, at, &place) && place.start < end; at = place.end) {
		const struct backing *backing = place.inode ? backing_of(space, place.device, place.inode) : NULL;
		if (!backing)
			continue;
		*piece = (struct interval){place.start, place.end, backing->image + place.offset, backing->kind, 0};
		if (piece->start < start)
			*piece = piece_cut(*piece, start, piece->end);
		return true;
	}
	return false;
}

struct origin space_origin(struct space *space, uint64_t address) {
	struct interval piece;
	bool known = space_mapped(space, address, address + 1, &piece);
	return known ? (struct origin){true, piece.backing, piece.image} : (struct origin){0};
}

void space_kill(struct space *space, const char *why) {
	log_line("snapshot %s: process %d (space %llu) is killed: %s", space->pager->image.name, (int)space->pid,
		 (unsigned long long)space->id, why);
	if (space->pidfd >= 0 && !syscall(SYS_pidfd_send_signal, space->pidfd, SIGKILL, NULL, 0))
		return;
	/* A forked child: nobody knows its pid, so all that share its memory files go. */
	struct backing *backing = space->n_shared ? space->shared[0] : &space->pager->template;
	keeper_kill_mappers(space->pager->keeper.files, backing->inode);
}

/* -- events ------------------------------------------------------------------------------------------------------------ */

static struct lr_error adopt_child(struct space *parent, struct space *child) {
	child->pid = 0;
	child->generation = parent->generation + 1;
	child->poison = parent->poison;
	child->records = parent->records;
	child->bytes_registered = parent->bytes_registered;
	forked_begin(parent, child);
	child->shared = calloc(parent->n_shared ? parent->n_shared : 1, sizeof *child->shared);
	if (!child->shared)
		return lr_fail("calloc", ENOMEM, 0);
	pthread_mutex_lock(&parent->pager->lock);
	child->keeper = keepers_share(parent->keeper);
	for (; child->n_shared < parent->n_shared; child->n_shared++) {
		child->shared[child->n_shared] = parent->shared[child->n_shared];
		child->shared[child->n_shared]->references++;
	}
	pthread_mutex_unlock(&parent->pager->lock);
	return unpacker_init(&child->unpacker);
}

void space_orphan(struct space *parent, struct space *child, struct lr_error error) {
	log_line("snapshot %s: a child of process %d cannot be served and will wait: %s: %s", parent->pager->image.name,
		 (int)parent->pid, error.step, strerror(error.code));
	parent->pager->orphans = true;
	if (child) {
		child->uffd = -1;
		child->keeper = NULL; /* not given back: it waits for good */
		space_free(child);
	}
}

static void on_fork(struct space *parent, int uffd) {
	struct space *child = space_new(parent->pager);
	struct lr_error error = lr_fail("calloc", ENOMEM, 0);
	if (child) {
		child->uffd = uffd;
		fcntl(uffd, F_SETFL, fcntl(uffd, F_GETFL) | O_NONBLOCK);
		error = adopt_child(parent, child);
	}
	if (!error.code && window_fork(parent, child))
		error = lr_fail("interval map", ENOMEM, 0);
	if (error.code)
		space_orphan(parent, child, error);
}

static int on_fault(struct space *space, const struct uffd_msg *message, uint64_t now) {
	struct fault *faults = array_room(space->faults, space->n_faults, &space->faults_capacity, sizeof *faults);
	if (!faults)
		return ENOMEM;
	space->faults = faults;
	uint64_t flags = message->arg.pagefault.flags;
	stats_add(&space->stats, flags & UFFD_PAGEFAULT_FLAG_MINOR ? LR_COUNT_MINOR : LR_COUNT_MISSING, 1);
	if (flags & UFFD_PAGEFAULT_FLAG_WRITE)
		stats_add(&space->stats, LR_COUNT_WRITE, 1);
	space->faults[space->n_faults++] = (struct fault){
	    message->arg.pagefault.address & ~(uint64_t)(LR_PAGE - 1), now, (int32_t)message->arg.pagefault.feat.ptid};
	return 0;
}

/* `rest`: how many more were read with it; the caller of this one may have been woken before the last of them was queued. */
static int on_remap(struct space *space, const struct uffd_msg *message, uint32_t rest) {
	uint64_t from = message->arg.remap.from, to = message->arg.remap.to, length = message->arg.remap.len;
	bool sleeps = true;
	if (from == to)
		return 0;
	for (uint32_t i = 1; i <= rest; i++)
		if (message[i].event == UFFD_EVENT_UNMAP && message[i].arg.remove.start == from &&
		    message[i].arg.remove.end == from + length)
			sleeps = false;
	return window_remap(space, from, to, length, sleeps);
}

static int on_message(struct space *space, const struct removal_guard *guard, const struct uffd_msg *message, uint32_t rest, uint64_t now) {
	switch (message->event) {
	case UFFD_EVENT_PAGEFAULT:
		return on_fault(space, message, now);
	case UFFD_EVENT_FORK:
		stats_add(&space->stats, LR_COUNT_FORK, 1);
		on_fork(space, (int)message->arg.fork.ufd);
		return 0;
	case UFFD_EVENT_REMAP:
		stats_add(&space->stats, LR_COUNT_REMAP, 1);
		return on_remap(space, message, rest);
	case UFFD_EVENT_REMOVE:
		stats_add(&space->stats, LR_COUNT_REMOVE, 1);
		removal_fill(guard, message->arg.remove.start, message->arg.remove.end);
		return window_remove(space, message->arg.remove.start, message->arg.remove.end);
	case UFFD_EVENT_UNMAP:
		stats_add(&space->stats, LR_COUNT_UNMAP, 1);
		return window_unmap(space, message->arg.remove.start, message->arg.remove.end);
	default:
		return EPROTO;
	}
}

bool space_drain(struct space *space, uint32_t *n_read) {
	enum { BATCH = 32 };
	struct uffd_msg messages[BATCH];
	*n_read = 0;
	SCOPED_LOCK(&space->map_lock);
	for (;;) {
		enum look look = callers_look(space);
		if (look == LOOKED_IN_VAIN)
			break;
		window_look(space);
		__attribute__((cleanup(removal_end))) struct removal_guard guard = removal_begin(space);
		if (guard.read == REMOVAL_NOTHING)
			break;
		bool one = look == LOOKED || guard.read == REMOVAL_ONE;
		size_t wanted = space->window.open || one ? 1 : BATCH; /* in a window, what a caller does before it is woken matters */
		ssize_t n = read(space->uffd, messages, wanted * sizeof *messages);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && errno == EAGAIN)
			break;
		if (n < 0 && (errno == EMFILE || errno == ENFILE || errno == ENOMEM)) {
			/* A fork event finds no descriptor; it stays queued, and the forking thread waits. */
			log_line("no descriptor for a forked child: %s; trying on", strerror(errno));
			poll(NULL, 0, 10);
			break;
		}
		if (n < 0 || n % (ssize_t)sizeof *messages) {
			space_kill(space, "its userfaultfd cannot be read");
			return false;
		}
		uint64_t now = now_ns();
		uint32_t n_messages = (uint32_t)((size_t)n / sizeof *messages);
		for (uint32_t i = 0; i < n_messages; i++) {
			int error = on_message(space, &guard, &messages[i], n_messages - 1 - i, now);
			if (error) {
				space_kill(space, strerror(error));
				return false;
			}
		}
		*n_read += n_messages;
		if (n_messages < wanted)
			break; /* there were no more */
	}
	atomic_store_explicit(&space->intervals, space->map.count, memory_order_relaxed);
	return true;
}

/* -- the thread -------------------------------------------------------------------------------------------------------- */

/* After EAGAIN: an event is about to be queued, or was read and its thread has not run since. The kernel tells of the former by
 * POLLIN, which is waited for, of the latter not at all; hence the time-outs. Asleep, not in a loop of sched_yield: the thread
 * that must run is often queued on this CPU. Nor is it disturbed soon, unless somebody waits, or it makes one such call
 * after the other: then only a look in between, at random, ends a window. True: there is an event to read. */
bool space_await_event(struct space *space, unsigned round) {
	enum { MANY_EVENTS = 32, PATIENT_NS = 100000, SHORT_NS = 5000, MAX_DOUBLINGS = 4, ROUNDS_TO_GROWTH = 16 };
	bool awaited = space->first_fault < space->n_faults || space->window.forked || space->window_events > MANY_EVENTS;
	unsigned doublings = round < MAX_DOUBLINGS ? round : MAX_DOUBLINGS;
	const struct timespec pause = {.tv_nsec = awaited ? SHORT_NS << doublings : PATIENT_NS};
	struct pollfd readable = {.fd = space->uffd, .events = POLLIN};
	if (ppoll(&readable, 1, &pause, NULL) > 0)
		return true;
	if (round % ROUNDS_TO_GROWTH == ROUNDS_TO_GROWTH - 1 && space->first_fault < space->n_faults)
		growth_bring(space);
	return false;
}

/* One step of closing the window; a fault is served after it only. */
static enum verdict close_window(struct space *space, unsigned *round) {
	uint32_t n_read;
	if (!space->window.open)
		return SERVED;
	pthread_mutex_lock(&space->map_lock);
	enum closing closing = window_close(space);
	if (closing == WINDOW_CLOSED)
		pthread_cond_broadcast(&space->settled);
	pthread_mutex_unlock(&space->map_lock);
	switch (closing) {
	case WINDOW_CLOSED:
		space->window_events = 0;
		return SERVED;
	case WINDOW_GONE:
		return DEAD;
	case WINDOW_OPEN:
		break;
	}
	if (space_await_event(space, (*round)++)) {
		*round = 0;
		if (!space_drain(space, &n_read))
			return DEAD;
		space->window_events += n_read;
	}
	return AGAIN;
}

bool space_serve_all(struct space *space) {
	unsigned round = 0;
	uint32_t n_read;
	while (space->window.open || space->first_fault < space->n_faults) {
		enum verdict verdict = close_window(space, &round);
		if (verdict == DEAD)
			return false;
		if (verdict == AGAIN || space->first_fault == space->n_faults)
			continue;
		struct fault fault = space->faults[space->first_fault];
		struct forked_look look = forked_look(space, &fault);
		verdict = serve_fault(space, &fault);
		forked_confirm(space, &look);
		switch (verdict) {
		case DEAD:
			return false;
		case SERVED:
			space->first_fault++;
			round = 0;
			break;
		case AGAIN:
			stats_add(&space->stats, LR_COUNT_EAGAIN, 1);
			if (!space_drain(space, &n_read))
				return false;
			if (!n_read)
				space_await_event(space, round++);
			break;
		}
	}
	space->first_fault = space->n_faults = 0;
	return true;
}

/* Until the address space is gone: the pidfd tells when the process ends, but a process may also exec, a vfork child may
 * outlive it, and a forked child has none; hence a look from time to time. */
static void serve_space(struct space *space) {
	enum { UFFD, PID };
	struct latency *latency = &space->pager->latency;
	if (!space->generation)
		latency_begin(latency, &space->latency, now_ns());
	if (!space_serve_all(space)) /* a forked child may begin with an open window */
		return;
	if (space->replays && !replay(space))
		return;
	if (space->fill_now && !replay_all(space))
		return;
	if (space->fill_idle)
		replay_fill_idle(space->pager);
	for (;;) {
		struct pollfd fds[] = {
			[UFFD] = {.fd = space->uffd, .events = POLLIN},
			[PID] = {.fd = space->pidfd, .events = POLLIN},
		};
		int n = poll(fds, 2, space->latency.held ? LATENCY_QUIET_MS : space->pidfd >= 0 ? 1000 : 200);
		if (!n && space->latency.held) {
			latency_end(latency, &space->latency, now_ns());
			continue;
		}
		if (!n && space->fill_idle && atomic_load(&space->pager->all_filled)) {
			space->fill_idle = false;
			if (!replay_all(space))
				return;
		}
		if (!n && space->records && working_set_keep_if_quiet(&space->pager->working_set, space->records))
			pager_wake(space->pager);
		if (fds[PID].revents) {
			pthread_mutex_lock(&space->pager->lock); /* a visitor may be looking at it */
			scoped_close(&space->pidfd);
			space->pidfd = -1;
			pthread_mutex_unlock(&space->pager->lock);
		}
		if (!n || fds[PID].revents)
			if (!uffd_alive(space->uffd))
				return;
		if (n > 0 && fds[UFFD].revents) {
			uint32_t n_read;
			latency_messages(latency, &space->latency, now_ns());
			if (!space_drain(space, &n_read) || !space_serve_all(space))
				return;
		}
	}
}

/* A process that was killed here may take a moment; its descriptor must not close before. */
static void await_end(struct space *space) {
	for (struct timespec pause = {.tv_nsec = 1000000}; uffd_alive(space->uffd);)
		nanosleep(&pause, NULL);
}

/* A thread of the process sleeps while this one works. Short slices: since Linux 6.12 one that asks for them runs at once when it
 * is woken on a CPU that others keep busy; older kernels ignore it. And time-outs without the usual slack of 50 us. */
static void hurry(void) {
	enum { SLICE_NS = 100000 }; /* the least there is */
	struct {
		uint32_t size, policy;
		uint64_t flags;
		int32_t nice;
		uint32_t priority;
		uint64_t runtime, deadline, period;
	} attributes = {.size = sizeof attributes, .policy = SCHED_OTHER, .runtime = SLICE_NS};
	attributes.nice = getpriority(PRIO_PROCESS, 0);
	syscall(SYS_sched_setattr, 0, &attributes, 0);
	prctl(PR_SET_TIMERSLACK, 1ul);
}

static void *space_main(void *argument) {
	struct space *space = argument;
	struct pager *pager = space->pager;
	prctl(PR_SET_NAME, "lr-space");
	hurry();
	serve_space(space);
	latency_end(&pager->latency, &space->latency, now_ns());
	window_abandon(space);
	await_end(space);
	pthread_mutex_lock(&space->map_lock);
	space->gone = true;
	pthread_cond_broadcast(&space->settled);
	pthread_mutex_unlock(&space->map_lock);
	if (space->records && space->pid) /* the one that was restored, not a child */
		working_set_end_of_process(&pager->working_set, space->records);
	pthread_mutex_lock(&pager->lock);
	while (space->visitors)
		pthread_cond_wait(&space->left, &pager->lock);
	for (struct space **link = &pager->spaces; *link; link = &(*link)->next)
		if (*link == space) {
			*link = space->next;
			break;
		}
	pager->n_spaces--;
	pager->spaces_ended++;
	stats_merge(&pager->ended, &space->stats);
	pthread_mutex_unlock(&pager->lock);
	space_free(space);
	pager_wake(pager);
	return NULL;
}

/* -- visitors ---------------------------------------------------------------------------------------------------------- */

/* Of two living processes no two have one pid: the space's own pidfd tells whether its process is still the one that has it. */
static struct space *find_living(struct pager *pager, int32_t pid) {
	for (struct space *space = pager->spaces; space; space = space->next)
		if (pid && space->pid == pid && space->pidfd >= 0 && pid_behind(space->pidfd) == pid)
			return space;
	return NULL;
}

struct lr_error space_visit(struct pager *pager, int pidfd, struct space **visited, struct interval_map *map) {
	int32_t pid = pid_behind(pidfd);
	pthread_mutex_lock(&pager->lock);
	struct space *space = find_living(pager, pid);
	if (space)
		space->visitors++;
	pthread_mutex_unlock(&pager->lock);
	if (!space)
		return lr_fail("no such address space", ESRCH, 0);
	pthread_mutex_lock(&space->map_lock);
	while (space->window.open && !space->gone)
		pthread_cond_wait(&space->settled, &space->map_lock);
	int error = space->gone ? ESRCH : interval_map_copy(&space->map, map);
	pthread_mutex_unlock(&space->map_lock);
	if (error) {
		space_leave(space);
		return lr_fail("copy of the interval map", error, 0);
	}
	*visited = space;
	return LR_OK;
}

void space_leave(struct space *space) {
	SCOPED_LOCK(&space->pager->lock);
	if (!--space->visitors)
		pthread_cond_signal(&space->left);
}

struct lr_error space_start(struct space *space) {
	struct pager *pager = space->pager;
	if (!space->generation)
		guards_begin(space); /* here, where the process stands still */
	SCOPED_LOCK(&pager->lock);
	space->id = pager->next_id++;
	space->intervals = space->map.count;
	space->next = pager->spaces;
	pager->spaces = space;
	struct lr_error error = pager_thread(space_main, space);
	if (error.code)
		pager->spaces = space->next;
	else
		pager->n_spaces++;
	return error;
}
