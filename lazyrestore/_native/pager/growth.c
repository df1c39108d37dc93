#define _GNU_SOURCE
#include "growth.h"

#include "forked.h"
#include "log.h"
#include "proc.h"
#include "space.h"
#include "uffd.h"
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/syscall.h>

enum { PIECE = 64 * 1024 };

/* What a mapping grew by, at its new place; `origin` of its first byte. */
struct growth {
	uint64_t start, end;
	struct origin origin;
};

static uint64_t whole_pages(uint64_t bytes) {
	return (bytes + LR_PAGE - 1) / LR_PAGE * LR_PAGE;
}

/* Is it by such a call that this thread waits at `address`? The first page is the first to be asked for, and none of them arrives. */
static bool find(struct space *space, const struct proc_task *task, uint64_t address, struct growth *growth) {
	uint64_t from = task->arguments[0], old = whole_pages(task->arguments[1]), new = whole_pages(task->arguments[2]);
	struct proc_place place;
	if (task->call != SYS_mremap || new <= old || address < old)
		return false;
	*growth = (struct growth){address, address + (new - old), space_origin(space, address)};
	if (!growth->origin.known || space_backing(space, growth->origin.backing)->page != LR_PAGE)
		return false;
	if (!proc_place(space, address, &place) || place.start > address - old || place.end < growth->end)
		return false;
	return from < place.start || from >= place.end; /* else it has grown in place, which holds nobody up */
}

/* 0 or an errno. */
static int bring(int memory, const struct growth *growth) {
	static const char zeros[PIECE];
	char room[PIECE];
	bool shared = growth->origin.backing >= LR_BACKING_SHARED;
	for (uint64_t at = growth->start; at < growth->end;) {
		size_t length = growth->end - at < PIECE ? growth->end - at : PIECE;
		ssize_t n = shared ? pread(memory, room, length, (off_t)at) : pwrite(memory, zeros, length, (off_t)at);
		if (n <= 0)
			return n ? errno : EIO;
		at += (uint64_t)n;
	}
	return 0;
}

static void help(struct space *space, const struct growth *growth) {
	scoped_fd memory = proc_open(space, "mem", O_RDWR);
	uint64_t image = growth->origin.image;
	int error = memory < 0 ? errno : 0;
	if (growth->origin.backing >= LR_BACKING_SHARED)
		backing_fill_range(space_backing(space, growth->origin.backing), &space->pager->image, image,
				   image + (growth->end - growth->start), &space->unpacker);
	if (!error)
		error = uffd_unregister(space->uffd, growth->start, growth->end).code;
	if (!error)
		error = bring(memory, growth);
	if (!error)
		error = uffd_register(space->uffd, growth->start, growth->end).code;
	if (error) {
		log_line("snapshot %s: process %d: what locked memory grew by at %#llx cannot be brought", space->pager->image.name,
			 (int)space->pid, (unsigned long long)growth->start);
		space_kill(space, strerror(error));
	}
}

static void bring_all(struct space *space) {
	struct proc_tasks tasks;
	struct proc_task task;
	struct growth growth;
	for (proc_tasks_init(&tasks, space); proc_next_task(&tasks, &task);)
		for (uint32_t i = space->first_fault; task.call == SYS_mremap && i < space->n_faults; i++)
			if (space->faults[i].thread == proc_own_number(space, task.thread) &&
			    find(space, &task, space->faults[i].address, &growth))
				help(space, &growth);
}

static void set_process(struct space *space, int32_t pid, int pidfd) {
	SCOPED_LOCK(&space->pager->lock); /* a visitor may be looking at it */
	space->pid = pid;
	space->pidfd = pidfd;
}

/* In a forked child, which is the process of the thread for as long as this takes. */
static void bring_in_child(struct space *space, int32_t thread) {
	int32_t pid = thread > 0 ? forked_process(thread) : 0;
	scoped_fd pidfd = pid > 0 ? (int)syscall(SYS_pidfd_open, pid, 0) : -1;
	if (pidfd < 0)
		return;
	set_process(space, pid, pidfd);
	bring_all(space);
	set_process(space, 0, -1);
	scoped_close(&space->maps);
	scoped_close(&space->task);
	space->maps = space->task = -1;
}

void growth_bring(struct space *space) {
	if (!space->generation)
		bring_all(space);
	for (uint32_t i = space->first_fault; space->generation && i < space->n_faults; i++)
		bring_in_child(space, forked_thread(space, &space->faults[i]));
}
