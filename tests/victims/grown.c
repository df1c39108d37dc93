/*
 * A mapping that grows in place over what was unmapped a moment ago, by one thread. usage: grown CONTROL_SOCKET [THREAD]
 * THREAD: whatever it is, there is a second thread, which does nothing.
 *
 * Requests: "fork" (munmap, growth, fork: what does the child read?) and "moved" (mremap, munmap of the destination, growth), each answered with
 * the number of times that what a mapping grew by did not read zero; and "beside": a mapping grows where a shared one was cut off, and what it
 * had before moves away.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include "control.h"

enum { SLOTS = 200, PAGE = 4096, BLOCK = 16 * PAGE, SLOT = 128 * PAGE, LOWER = 64 * PAGE };

static char *const arena = (char *)0x100000000000;
static char *const shared = (char *)0x200000000000, *const private = (char *)0x200100000000;

static void check(int failed, const char *what)
{
	if (failed)
		control_die(what);
}

/* The grown part, which was the second half of the mapping, as a child sees it. */
static int grown_in_child(char *at)
{
	pid_t child;
	int status;

	check(munmap(at + BLOCK, BLOCK), "munmap");
	check(mremap(at, BLOCK, 2 * BLOCK, 0) == MAP_FAILED, "growth");
	child = fork();
	check(child < 0, "fork");
	if (!child)
		_exit(at[BLOCK] != 0);
	check(waitpid(child, &status, 0) < 0, "waitpid");
	return status != 0;
}

/* `from` is moved behind `at` and unmapped there, and the mapping at `at` grows to where it was. */
static int grown_over_moved(char *from, char *at)
{
	check(mremap(from, BLOCK, BLOCK, MREMAP_MAYMOVE | MREMAP_FIXED, at + BLOCK) == MAP_FAILED, "move");
	check(munmap(at + BLOCK, BLOCK), "munmap");
	check(mremap(at, BLOCK, 2 * BLOCK, 0) == MAP_FAILED, "growth");
	return at[BLOCK] != 0;
}

/* Pages 0 to 3 are shared, the rest of that mapping is unmapped; private memory moves to page 8, grows there, and leaves what it grew by. */
static int grown_beside_shared(void)
{
	char *at = shared + 8 * PAGE;

	check(private[7 * PAGE] != 7, "what the file behind the growth holds has arrived");
	check(munmap(private + 4 * PAGE, 4 * PAGE) || munmap(shared + 4 * PAGE, BLOCK - 4 * PAGE), "munmap");
	check(mremap(private, 4 * PAGE, 4 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, at) == MAP_FAILED, "move");
	check(mremap(at, 4 * PAGE, 8 * PAGE, 0) == MAP_FAILED, "growth");
	check(mremap(at, 4 * PAGE, 4 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, private) == MAP_FAILED, "move back");
	return at[4 * PAGE] != 0 || at[7 * PAGE] != 0 || *private != 7 || *shared != 5;
}

static void map(char *at, size_t length, int kind, int content)
{
	check(mmap(at, length, PROT_READ | PROT_WRITE, kind | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) != at, "mmap");
	memset(at, content, length);
}

static void *idle(void *nothing)
{
	for (;;)
		pause();
	return nothing;
}

int main(int argc, char **argv)
{
	char line[64];
	pthread_t thread;
	int listener;

	if (argc < 2)
		return 64;
	check(argc > 2 && pthread_create(&thread, NULL, idle, NULL), "pthread_create");
	for (int i = 0; i < 2 * SLOTS; i++) {
		char *at = arena + (size_t)i * SLOT;

		for (int half = 0; half < 2; half++) {
			char *block = at + half * LOWER;
			size_t length = i < SLOTS && half ? 2 * BLOCK : BLOCK;

			map(block, length, MAP_PRIVATE, 1 + i % 200);
		}
	}
	map(shared, BLOCK, MAP_SHARED, 5);
	map(private, 8 * PAGE, MAP_PRIVATE, 7);
	listener = control_listen(argv[1]);
	for (;;) {
		int fd = control_next(listener, line, sizeof line), wrong = 0;
		size_t first = strcmp(line, "fork") ? SLOTS : 0;

		if (!strcmp(line, "beside")) {
			dprintf(fd, "%d", grown_beside_shared());
			close(fd);
			continue;
		}
		for (size_t i = first; i < first + SLOTS; i++) {
			char *at = arena + i * SLOT;

			wrong += first ? grown_over_moved(at, at + LOWER) : grown_in_child(at + LOWER);
		}
		dprintf(fd, "%d", wrong);
		close(fd);
	}
}
