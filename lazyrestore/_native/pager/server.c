/* One connection: requests in, replies out, in a thread of its own. */
#define _GNU_SOURCE
#include "attach.h"
#include "intervals.h"
#include "log.h"
#include "proc.h"
#include "space.h"
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>

enum { MAX_FDS = 253 }; /* SCM_MAX_FD */

struct connection {
	struct pager *pager;
	int fd;
	pid_t peer;
	bool located; /* once it was looked up where the peer is */
	char *cgroup; /* owned; where its processes need a further keeper, or NULL */
	struct cgroup_keeper *keeper; /* a reference; so that it stays from one of its processes to the next */
	struct lr_request request;
	int fds[MAX_FDS];
	unsigned n_fds;
};

static void collect_fds(struct msghdr *message, struct connection *connection) {
	for (struct cmsghdr *c = CMSG_FIRSTHDR(message); c; c = CMSG_NXTHDR(message, c))
		if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS) {
			size_t bytes = c->cmsg_len - CMSG_LEN(0);
			memcpy(connection->fds, CMSG_DATA(c), bytes);
			connection->n_fds = (unsigned)(bytes / sizeof(int));
		}
}

/* False: the connection is over. */
static bool receive(struct connection *connection) {
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(MAX_FDS * sizeof(int))];
	} control;
	struct iovec data = {.iov_base = &connection->request, .iov_len = sizeof connection->request};
	struct msghdr message = {
		.msg_iov = &data, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
	ssize_t n;
	connection->n_fds = 0;
	do
		n = recvmsg(connection->fd, &message, MSG_CMSG_CLOEXEC);
	while (n < 0 && errno == EINTR);
	if (n < 0)
		return false;
	collect_fds(&message, connection); /* an empty packet looks like the end, but may bring descriptors */
	return n == sizeof connection->request && !(message.msg_flags & (MSG_TRUNC | MSG_CTRUNC));
}

static bool send_packet(int socket, const void *data, size_t length, const int *fds, unsigned n_fds) {
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(2 * sizeof(int))];
	} control = {0};
	struct iovec part = {.iov_base = (void *)data, .iov_len = length};
	struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
	if (n_fds) {
		message.msg_control = &control;
		message.msg_controllen = CMSG_SPACE(n_fds * sizeof(int));
		struct cmsghdr *c = CMSG_FIRSTHDR(&message);
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(n_fds * sizeof(int));
		memcpy(CMSG_DATA(c), fds, n_fds * sizeof(int));
	}
	return sendmsg(socket, &message, MSG_NOSIGNAL) == (ssize_t)length;
}

static bool send_reply(struct connection *connection, struct lr_error error, const int *fds, unsigned n_fds) {
	struct pager *pager = connection->pager;
	struct lr_reply reply = {
		.kind = connection->request.kind,
		.error = error.code,
		.address = error.address,
		.pager = getpid(),
		.n_fds = n_fds,
	};
	if (error.step)
		snprintf(reply.step, sizeof reply.step, "%s", error.step);
	pthread_mutex_lock(&pager->lock);
	reply.keeper = pager->keeper.pid;
	reply.n_spaces = pager->n_spaces;
	pthread_mutex_unlock(&pager->lock);
	return send_packet(connection->fd, &reply, sizeof reply, fds, n_fds);
}

/* -- statistics -------------------------------------------------------------------------------------------------------- */

static struct lr_space_stats space_stats(const struct space *space) {
	struct quantiles times = stats_quantiles(&space->stats);
	struct lr_space_stats out = {
		.pid = space->generation ? pid_behind(space->child) : space->pid,
		.generation = space->generation,
		.id = space->id,
		.intervals = atomic_load_explicit(&space->intervals, memory_order_relaxed),
		.bytes_registered = space->bytes_registered,
		.service_p50_ns = times.p50_ns,
		.service_p99_ns = times.p99_ns,
		.service_max_ns = times.max_ns,
	};
	stats_counters(&space->stats, out.counters);
	return out;
}

static struct lr_totals totals(const struct pager *pager, const struct stats *sum) {
	struct quantiles times = stats_quantiles(sum);
	struct lr_totals out = {
		.kind = LR_STATS,
		.n_spaces = pager->n_spaces,
		.spaces_ended = pager->spaces_ended,
		.uptime_ns = now_ns() - pager->started_ns,
		.chunks_total = pager->image.n_chunks,
		.chunks_filled = fill_stats.chunks_filled,
		.chunks_bad = fill_stats.chunks_bad,
		.bytes_filled = fill_stats.bytes_filled,
		.bytes_read = fill_stats.bytes_read,
		.faults = times.samples,
		.service_p50_ns = times.p50_ns,
		.service_p99_ns = times.p99_ns,
		.service_max_ns = times.max_ns,
	};
	stats_counters(sum, out.counters);
	return out;
}

static bool send_stats(struct connection *connection) {
	struct pager *pager = connection->pager;
	scoped_free struct lr_space_stats *spaces = NULL;
	scoped_free struct stats *sum = calloc(1, sizeof *sum);
	struct lr_totals head = {.kind = LR_STATS, .error = ENOMEM};
	pthread_mutex_lock(&pager->lock);
	spaces = calloc(pager->n_spaces + 1, sizeof *spaces);
	if (sum && spaces) {
		uint32_t n = 0;
		stats_merge(sum, &pager->ended);
		for (struct space *space = pager->spaces; space; space = space->next) {
			spaces[n++] = space_stats(space);
			stats_merge(sum, &space->stats);
		}
		head = totals(pager, sum);
	}
	pthread_mutex_unlock(&pager->lock);
	if (!send_packet(connection->fd, &head, sizeof head, NULL, 0))
		return false;
	for (uint32_t i = 0; i < head.n_spaces; i++)
		if (!send_packet(connection->fd, &spaces[i], sizeof *spaces, NULL, 0))
			return false;
	return true;
}

/* ---------------------------------------------------------------------------------------------------------------------- */

static bool hello(struct connection *connection) {
	struct pager *pager = connection->pager;
	int fds[] = {pager->template.fd, pager->huge.fd};
	return send_reply(connection, LR_OK, fds, pager->image.hugetlb ? 2 : 1);
}

/* As a memfd: it may be longer than a packet. */
static bool send_list(struct connection *connection, const char *name, const void *list, size_t length) {
	scoped_fd memfd = memfd_create(name, MFD_CLOEXEC);
	if (memfd < 0)
		return send_reply(connection, lr_fail("memfd_create", errno, 0), NULL, 0);
	for (size_t done = 0; done < length;) {
		ssize_t n = write(memfd, (const char *)list + done, length - done);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return send_reply(connection, lr_fail("write of a list", n < 0 ? errno : EIO, 0), NULL, 0);
		done += (size_t)n;
	}
	return send_reply(connection, LR_OK, &memfd, 1);
}

/* Keeps those of a list whose pages are in the template, filling their chunks if need be. Returns their number. */
static uint32_t fill_chunks(struct pager *pager, struct lr_touched *touched, uint32_t n) {
	struct unpacker unpacker;
	uint32_t kept = 0;
	if (unpacker_init(&unpacker).code)
		return 0;
	for (uint32_t i = 0; i < n; i++) {
		backing_fill_own(&pager->template, &pager->image, &pager->own, touched[i].chunk);
		if (backing_bring(&pager->template, &pager->image, touched[i].chunk, touched[i].pages, &unpacker))
			touched[kept++] = touched[i];
	}
	unpacker_deinit(&unpacker);
	return kept;
}

static bool send_working_set(struct connection *connection) {
	struct working_set *set = &connection->pager->working_set;
	uint32_t n, flags = connection->request.flags;
	if (flags & LR_WORKING_SET_END && working_set_end(set))
		pager_wake(connection->pager);
	bool known = working_set_is_known(set);
	scoped_free struct lr_touched *touched = working_set_copy(set, &n);
	if (flags & LR_WORKING_SET_FILLED)
		n = known ? fill_chunks(connection->pager, touched, n) : 0;
	return send_list(connection, "lazyrestore-working-set", touched, n * sizeof *touched);
}

static bool send_intervals(struct connection *connection) {
	scoped_free struct lr_range *ranges = NULL;
	uint32_t n = 0;
	if (connection->n_fds != 1)
		return send_reply(connection, lr_fail("intervals: number of descriptors", EINVAL, connection->n_fds), NULL, 0);
	struct lr_error error = intervals_of(connection->pager, connection->fds[0], &ranges, &n);
	if (error.code)
		return send_reply(connection, error, NULL, 0);
	return send_list(connection, "lazyrestore-intervals", ranges, n * sizeof *ranges);
}

/* After a HELLO, while the restorer goes on. */
static void locate(struct connection *connection) {
	if (!connection->located)
		connection->cgroup = keepers_needed_in(connection->peer);
	connection->located = true;
}

static struct lr_error attach_for(struct connection *connection) {
	struct pager *pager = connection->pager;
	locate(connection);
	if (connection->cgroup) {
		struct cgroup_keeper *keeper = NULL;
		struct lr_error error = keepers_get(pager, connection->cgroup, &keeper);
		if (error.code)
			return error;
		SCOPED_LOCK(&pager->lock);
		keepers_put(pager, connection->keeper);
		connection->keeper = keeper;
	}
	unsigned n_fds = connection->n_fds;
	connection->n_fds = 0;
	return attach(pager, &connection->request, connection->fds, n_fds, connection->keeper);
}

static bool answer(struct connection *connection) {
	struct pager *pager = connection->pager;
	if (connection->request.version != LR_PROTOCOL_VERSION)
		return send_reply(connection, lr_fail("protocol version", EPROTO, connection->request.version), NULL, 0);
	switch (connection->request.kind) {
	case LR_HELLO:
		if (!hello(connection))
			return false;
		locate(connection);
		return true;
	case LR_ATTACH:
		return send_reply(connection, attach_for(connection), NULL, 0);
	case LR_STATS:
		return send_stats(connection);
	case LR_WORKING_SET:
		return send_working_set(connection);
	case LR_INTERVALS:
		return send_intervals(connection);
	case LR_STOP:
		pthread_mutex_lock(&pager->lock);
		pager->stopping = true;
		pthread_mutex_unlock(&pager->lock);
		return send_reply(connection, LR_OK, NULL, 0);
	default:
		return send_reply(connection, lr_fail("request", ENOSYS, connection->request.kind), NULL, 0);
	}
}

/* Only whoever may ptrace the processes we serve: the same user, or root. */
static bool is_friend(int connection, pid_t *pid) {
	struct ucred peer;
	socklen_t length = sizeof peer;
	if (getsockopt(connection, SOL_SOCKET, SO_PEERCRED, &peer, &length))
		return false;
	*pid = peer.pid;
	return peer.uid == geteuid() || peer.uid == 0;
}

static void close_fds(struct connection *connection) {
	for (unsigned i = 0; i < connection->n_fds; i++)
		scoped_close(&connection->fds[i]);
	connection->n_fds = 0;
}

static void *connection_main(void *argument) {
	struct connection *connection = argument;
	struct pager *pager = connection->pager;
	bool used = false;
	prctl(PR_SET_NAME, "lr-connection");
	if (!is_friend(connection->fd, &connection->peer))
		log_line("a connection from another user was refused");
	else
		for (bool more = true; more;) {
			more = receive(connection) && answer(connection);
			used |= more;
			close_fds(connection);
		}
	close(connection->fd);
	pthread_mutex_lock(&pager->lock);
	keepers_put(pager, connection->keeper);
	pager->n_clients--;
	pager->used |= used;
	pthread_mutex_unlock(&pager->lock);
	free(connection->cgroup);
	free(connection);
	pager_wake(pager);
	return NULL;
}

struct lr_error server_start(struct pager *pager, int fd) {
	struct connection *connection = calloc(1, sizeof *connection);
	struct lr_error error = lr_fail("calloc", ENOMEM, 0);
	if (connection) {
		*connection = (struct connection){.pager = pager, .fd = fd};
		error = pager_thread(connection_main, connection);
	}
	if (error.code) {
		free(connection);
		close(fd);
	}
	return error;
}
