#define _GNU_SOURCE
#include "keepers.h"

#include "cgroup.h"
#include "log.h"
#include "pager.h"
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/wait.h>

char *keepers_needed_in(pid_t pid) {
	char *its = cgroup_of(pid);
	scoped_free char *own = its ? cgroup_of(getpid()) : NULL;
	if (own && !cgroup_covers(own, its))
		return its;
	free(its);
	return NULL;
}

static bool runs(const struct cgroup_keeper *keeper) {
	struct pollfd ended = {.fd = keeper->pidfd, .events = POLLIN};
	return keeper->pid && !poll(&ended, 1, 0);
}

static void collect(struct pager *pager, struct cgroup_keeper *keeper) {
	if (!keeper->pid)
		return;
	kill(keeper->pid, SIGKILL);
	waitpid(keeper->pid, NULL, 0);
	epoll_ctl(pager->keepers_watch, EPOLL_CTL_DEL, keeper->pidfd, NULL);
	close(keeper->pidfd);
	keeper->pid = 0;
}

/* Into its cgroup, or as near above it as can be. */
static struct lr_error move(struct cgroup_keeper *keeper) {
	int first = 0;
	for (;;) {
		bool beyond = cgroup_is_beyond(keeper->cgroup);
		int error = beyond ? EXDEV : cgroup_move(keeper->pid, keeper->cgroup);
		if (!error)
			return LR_OK;
		first = first ? first : error;
		if (beyond || !strcmp(keeper->cgroup, "/"))
			return lr_fail("a keeper for the restorer's cgroup", first, 0);
		char *last = strrchr(keeper->cgroup, '/');
		last[last == keeper->cgroup] = 0;
	}
}

static struct lr_error start(struct pager *pager, struct cgroup_keeper *keeper) {
	struct epoll_event event = {.events = EPOLLIN};
	struct lr_error error = keeper_clone(&pager->keeper, &keeper->pid, &keeper->pidfd);
	if (error.code)
		return error;
	if (epoll_ctl(pager->keepers_watch, EPOLL_CTL_ADD, keeper->pidfd, &event))
		error = lr_fail("epoll_ctl", errno, 0);
	if (!error.code)
		error = move(keeper);
	if (error.code)
		collect(pager, keeper);
	return error;
}

static struct lr_error make(struct pager *pager, const char *cgroup, struct cgroup_keeper **made) {
	struct cgroup_keeper *keeper = calloc(1, sizeof *keeper);
	char *path = strdup(cgroup);
	struct lr_error error = lr_fail("calloc", ENOMEM, 0);
	if (keeper && path) {
		keeper->cgroup = path;
		error = start(pager, keeper);
	}
	if (error.code) {
		free(path);
		free(keeper);
		return error;
	}
	keeper->next = pager->keepers;
	pager->keepers = *made = keeper;
	return LR_OK;
}

struct lr_error keepers_get(struct pager *pager, const char *cgroup, struct cgroup_keeper **found) {
	struct lr_error error = LR_OK;
	SCOPED_LOCK(&pager->keepers_lock);
	struct cgroup_keeper *keeper = pager->keepers;
	while (keeper && !cgroup_covers(keeper->cgroup, cgroup))
		keeper = keeper->next;
	if (!keeper) {
		error = make(pager, cgroup, &keeper);
	} else if (!runs(keeper)) {
		collect(pager, keeper);
		error = start(pager, keeper);
	}
	if (error.code == ENOTSUP) {
		if (!pager->keepers_refused)
			log_line("processes in %s would outlive pager and keeper if both were killed at once: no cgroups are mounted",
				 cgroup);
		pager->keepers_refused = true;
		return LR_OK;
	}
	if (error.code)
		return error;
	pthread_mutex_lock(&pager->lock);
	*found = keepers_share(keeper);
	pthread_mutex_unlock(&pager->lock);
	return LR_OK;
}

struct cgroup_keeper *keepers_share(struct cgroup_keeper *keeper) {
	if (keeper)
		keeper->references++;
	return keeper;
}

void keepers_put(struct pager *pager, struct cgroup_keeper *keeper) {
	if (keeper && !--keeper->references)
		pager_wake(pager);
}

static bool is_needed(struct pager *pager, const struct cgroup_keeper *keeper) {
	SCOPED_LOCK(&pager->lock);
	return keeper->references;
}

bool keepers_settle(struct pager *pager) {
	bool settled = true;
	SCOPED_LOCK(&pager->keepers_lock);
	for (struct cgroup_keeper **link = &pager->keepers, *keeper; (keeper = *link);) {
		if (!is_needed(pager, keeper)) {
			collect(pager, keeper);
			*link = keeper->next;
			free(keeper->cgroup);
			free(keeper);
			continue;
		}
		link = &keeper->next;
		if (runs(keeper))
			continue;
		bool died = keeper->pid;
		collect(pager, keeper);
		struct lr_error error = start(pager, keeper);
		settled &= !error.code;
		if (!error.code)
			log_line("the keeper in %s died; process %d took its place", keeper->cgroup, (int)keeper->pid);
		else if (died)
			log_line("the keeper in %s died: %s: %s; trying on", keeper->cgroup, error.step, strerror(error.code));
	}
	return settled;
}

void keepers_deinit(struct pager *pager) {
	SCOPED_LOCK(&pager->keepers_lock);
	for (struct cgroup_keeper *keeper = pager->keepers; keeper; keeper = keeper->next)
		collect(pager, keeper); /* the rest goes with the process: a thread may be about to let go */
}
