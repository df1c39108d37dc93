/*
 * One of every kind of memory. usage: memzoo CONTROL_SOCKET, in a directory of its own.
 *
 * Requests: "digest": a hash per region, the same in every copy and in a twin; the others do something to the memory and answer
 * "ok", or what was wrong: fork, dontneed, remap, stack, brk, protect, code, unmap, share, write.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include "control.h"

#define PAGE 4096ul
#define KIB 1024ul
#define MIB (KIB * KIB)
#define GIB (KIB * MIB)
#define REGIONS 48

struct region {
	const char *name;
	unsigned char *at;
	size_t size;
	size_t step;		/* the digest reads one page in every `step` bytes; PAGE: all of them */
	bool wiped;		/* zero in a forked child */
	bool absent;		/* not there in a forked child */
};

static struct region regions[REGIONS];
static int region_count;
static int memory_fd, file_fd;

static uint64_t scramble(uint64_t x)
{
	x = (x ^ (x >> 31)) * UINT64_C(0x9e3779b97f4a7c15) + 1;
	return x ^ (x >> 29);
}

static void fill(void *at, size_t size, uint64_t seed)
{
	uint64_t *words = at;

	for (size_t i = 0; i < size / 8; i++)
		words[i] = i % 64 < 40 ? seed = scramble(seed) : seed;
}

static void *map(size_t size, int protection, int flags, int fd, off_t offset)
{
	void *at = mmap(NULL, size, protection, flags, fd, offset);

	if (at == MAP_FAILED)
		control_die("mmap");
	return at;
}

static void *anonymous(size_t size)
{
	return map(size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

static struct region *add(const char *name, void *at, size_t size)
{
	struct region *r = &regions[region_count++];

	if (region_count > REGIONS)
		exit(71);
	*r = (struct region){ .name = name, .at = at, .size = size, .step = PAGE };
	return r;
}

static struct region *find(const char *name)
{
	for (int i = 0; i < region_count; i++)
		if (!strcmp(regions[i].name, name))
			return &regions[i];
	exit(72);
}

static void must(const char *what, int result)
{
	if (result)
		control_die(what);
}

/* -- what there is ------------------------------------------------------------------------------------------------- */

static void make_private(void)
{
	unsigned char *at = anonymous(8 * MIB);

	for (size_t page = 0; page < 8 * MIB / PAGE; page++)
		if (page % 3)			/* every third page is never touched */
			fill(at + page * PAGE, PAGE, page);
	add("holes", at, 8 * MIB);
	add("zeros", memset(anonymous(4 * MIB), 0, 4 * MIB), 4 * MIB);
	add("untouched", anonymous(64 * MIB), 64 * MIB)->step = 4 * MIB;
	add("drop", at = anonymous(4 * MIB), 4 * MIB);
	fill(at, 4 * MIB, 5);
	add("move", at = anonymous(2 * MIB), 2 * MIB);
	fill(at, 2 * MIB, 6);
	add("unmap", at = anonymous(2 * MIB), 2 * MIB);
	fill(at, 2 * MIB, 7);
	add("read only", at = anonymous(MIB), MIB);
	fill(at, MIB, 8);
	must("mprotect", mprotect(at, MIB, PROT_READ));
	at = map(256 * GIB, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	must("mprotect", mprotect(at + 128 * GIB, 64 * KIB, PROT_READ | PROT_WRITE));
	fill(at + 128 * GIB, 64 * KIB, 9);
	add("island", at + 128 * GIB, 64 * KIB);
	at = map(4 * GIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	for (size_t i = 0; i < 4; i++)
		fill(at + i * GIB, PAGE, i);
	add("huge", at, 4 * GIB)->step = 256 * MIB;
	at = anonymous(300 * PAGE);
	fill(at, 300 * PAGE, 10);
	for (size_t i = 0; i < 300; i += 2)
		must("mprotect", mprotect(at + i * PAGE, PAGE, PROT_READ));
	add("striped", at, 300 * PAGE);
	add("locked", at = anonymous(64 * KIB), 64 * KIB);
	fill(at, 64 * KIB, 11);
	must("mlock", mlock(at, 64 * KIB));
	add("not dumped", at = anonymous(64 * KIB), 64 * KIB);
	fill(at, 64 * KIB, 12);
	must("MADV_DONTDUMP", madvise(at, 64 * KIB, MADV_DONTDUMP));
	add("wiped", at = anonymous(64 * KIB), 64 * KIB)->wiped = true;
	fill(at, 64 * KIB, 13);
	must("MADV_WIPEONFORK", madvise(at, 64 * KIB, MADV_WIPEONFORK));
	add("not forked", at = anonymous(64 * KIB), 64 * KIB)->absent = true;
	fill(at, 64 * KIB, 14);
	must("MADV_DONTFORK", madvise(at, 64 * KIB, MADV_DONTFORK));
	add("heap", at = malloc(100000), 96 * KIB);
	fill(at, 96 * KIB, 15);
	at = anonymous(64 * KIB);		/* hidden: contents behind PROT_NONE, until "protect" */
	fill(at, 64 * KIB, 16);
	must("mprotect", mprotect(at, 64 * KIB, PROT_NONE));
	add("hidden", at, 64 * KIB)->step = 0;
	at = anonymous(PAGE);
	memcpy(at, "\xb8\x2a\x00\x00\x00\xc3", 6);	/* mov $42, %eax; ret */
	must("mprotect", mprotect(at, PAGE, PROT_READ | PROT_EXEC));
	add("code", at, PAGE);
	at = map(PAGE, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	memcpy(at, "\xb8\x2b\x00\x00\x00\xc3", 6);
	add("writable code", at, PAGE);
}

static void make_files(void)
{
	unsigned char block[PAGE], *at;

	file_fd = open("file", O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	for (uint64_t page = 0; page < 64; page++) {
		fill(block, PAGE, page + 100);
		if (pwrite(file_fd, block, page == 63 ? 1000 : PAGE, (off_t)(page * PAGE)) < 0)
			control_die("pwrite");
	}
	add("file clean", map(64 * PAGE, PROT_READ, MAP_PRIVATE, file_fd, 0), 64 * PAGE);
	add("file untouched", map(8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, file_fd, 5 * PAGE), 8 * PAGE)->step = 0;
	add("file dirty", at = map(32 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, file_fd, 3 * PAGE), 32 * PAGE);
	fill(at + 4 * PAGE, 2 * PAGE, 17);
	fill(at + 30 * PAGE, PAGE, 18);
	add("file shared", map(16 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file_fd, 8 * PAGE), 16 * PAGE);
	must("symlink", symlink("file", "link"));
}

static void make_shared(void)
{
	unsigned char *at;
	char path[64];
	int fd;

	add("shared", at = map(2 * MIB, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0), 2 * MIB);
	fill(at, MIB, 20);			/* the second half is never touched */
	memory_fd = memfd_create("zoo", MFD_CLOEXEC);
	must("ftruncate", ftruncate(memory_fd, MIB));
	add("memfd", at = map(MIB, PROT_READ | PROT_WRITE, MAP_SHARED, memory_fd, 0), MIB);
	fill(at, MIB / 2, 21);
	add("memfd again", map(MIB / 4, PROT_READ, MAP_SHARED, memory_fd, MIB / 4), MIB / 4);
	add("memfd private", at = map(MIB / 2, PROT_READ | PROT_WRITE, MAP_PRIVATE, memory_fd, 0), MIB / 2);
	fill(at + 8 * PAGE, PAGE, 22);
	snprintf(path, sizeof path, "/dev/shm/lazyrestore-zoo-%d", getpid());
	fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
	must("ftruncate", ftruncate(fd, 256 * KIB));
	add("shm file", at = map(256 * KIB, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), 256 * KIB);
	fill(at, 128 * KIB, 23);
	close(fd);
}

/* -- digests ------------------------------------------------------------------------------------------------------- */

static uint64_t digest_of(const struct region *r)
{
	uint64_t hash = r->size;

	for (size_t page = 0; r->step && page < r->size; page += r->step)
		for (size_t i = 0; i < PAGE / 8; i++)
			hash = (hash ^ ((const uint64_t *)(r->at + page))[i]) * UINT64_C(0x100000001b3);
	return hash;
}

static uint64_t zero_digest(const struct region *r)
{
	uint64_t hash = r->size;

	for (size_t i = 0; i < r->size / 8; i++)
		hash *= UINT64_C(0x100000001b3);
	return hash;
}

static void digest(int fd)
{
	for (int i = 0; i < region_count; i++)
		dprintf(fd, "%s %016llx\n", regions[i].name, (unsigned long long)digest_of(&regions[i]));
}

/* -- requests: NULL, or what was wrong ----------------------------------------------------------------------------- */

/* The child reads everything first; only then does the parent. What the child writes the parent must not see. */
static const char *do_fork(void)
{
	static char wrong[128];
	uint64_t *seen = map(REGIONS * 8, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	int status;
	pid_t child = fork();

	if (child == 0) {
		for (int i = 0; i < region_count; i++)
			if (!regions[i].absent)
				seen[i] = digest_of(&regions[i]);
		fill(find("holes")->at, 8 * MIB, 99);
		fill(find("memfd private")->at, MIB / 2, 99);
		fill(find("heap")->at, 64 * KIB, 99);
		_exit(0);
	}
	if (child < 0 || waitpid(child, &status, 0) != child)
		return "fork or wait";
	if (status)
		return "the child died";
	for (int i = 0; i < region_count; i++) {
		const struct region *r = &regions[i];
		uint64_t wanted = r->wiped ? zero_digest(r) : digest_of(r);

		if (!r->absent && seen[i] != wanted) {
			snprintf(wrong, sizeof wrong, "the child saw another %s", r->name);
			return wrong;
		}
	}
	munmap(seen, REGIONS * 8);
	return NULL;
}

static bool is_zero(const unsigned char *at, size_t size)
{
	for (size_t i = 0; i < size / 8; i++)
		if (((const uint64_t *)at)[i])
			return false;
	return true;
}

static bool is_filled(const unsigned char *at, size_t offset, size_t size, size_t whole, uint64_t seed)
{
	unsigned char *wanted = malloc(whole);
	bool same;

	fill(wanted, whole, seed);
	same = !memcmp(at, wanted + offset, size);
	free(wanted);
	return same;
}

/* Drops every other 64 KiB and reads all: zero where dropped, what it was elsewhere. */
static const char *do_dontneed(void)
{
	unsigned char *at = find("drop")->at;

	for (size_t i = 0; i < 4 * MIB; i += 128 * KIB)
		must("MADV_DONTNEED", madvise(at + i, 64 * KIB, MADV_DONTNEED));
	for (size_t i = 0; i < 4 * MIB; i += 128 * KIB) {
		if (!is_zero(at + i, 64 * KIB))
			return "dropped memory is not zero";
		if (!is_filled(at + i + 64 * KIB, i + 64 * KIB, 64 * KIB, 4 * MIB, 5))
			return "memory beside dropped memory";
	}
	return NULL;
}

/* Grows and moves a region that nobody has touched: old contents first, zero behind them. */
static const char *do_remap(void)
{
	struct region *r = find("move");
	unsigned char *at = mremap(r->at, 2 * MIB, 6 * MIB, MREMAP_MAYMOVE);

	if (at == MAP_FAILED)
		return "mremap";
	if (!is_zero(at + 2 * MIB, 4 * MIB))
		return "what a mapping grew by is not zero";
	if (!is_filled(at, 0, 2 * MIB, 2 * MIB, 6))
		return "moved memory";
	fill(at + 2 * MIB, 4 * MIB, 60);
	at = mremap(at, 6 * MIB, 2 * MIB, MREMAP_MAYMOVE);
	if (at == MAP_FAILED || !is_filled(at, 0, 2 * MIB, 2 * MIB, 6))
		return "shrunk memory";
	r->at = at;
	return NULL;
}

static uint64_t recurse(int depth, uint64_t seed)
{
	uint64_t block[512];
	uint64_t below;

	fill(block, sizeof block, seed);
	below = depth ? recurse(depth - 1, seed + 1) : 1;
	for (int i = 0; i < 512; i++)
		below = below * 31 + ((volatile uint64_t *)block)[i];
	return below;
}

/* 6 MiB deeper than before: the main stack grows by itself. Twice, since the second time it is there already. */
static const char *do_stack(void)
{
	return recurse(1500, 1) == recurse(1500, 1) ? NULL : "the stack";
}

static const char *do_brk(void)
{
	unsigned char *end = sbrk(0), *at = sbrk(3 * MIB);

	if (at != end)
		return "brk is not where it was";
	if (!is_zero(at + PAGE, 3 * MIB - PAGE))
		return "what brk grew by is not zero";
	fill(at, 3 * MIB, 61);
	if (!is_filled(at, 0, 3 * MIB, 3 * MIB, 61) || brk(end))
		return "brk";
	return NULL;
}

static const char *do_protect(void)
{
	struct region *hidden = find("hidden"), *read_only = find("read only");

	must("mprotect", mprotect(hidden->at, hidden->size, PROT_READ | PROT_WRITE));
	must("mprotect", mprotect(read_only->at, read_only->size, PROT_READ | PROT_WRITE));
	if (!is_filled(hidden->at, 0, 64 * KIB, 64 * KIB, 16))
		return "what was behind PROT_NONE";
	read_only->at[5] ^= 0;
	if (!is_filled(read_only->at, 0, MIB, MIB, 8))
		return "what was read-only";
	return NULL;
}

static const char *do_code(void)
{
	int (*fixed)(void) = (int (*)(void))(uintptr_t)find("code")->at;
	unsigned char *writable = find("writable code")->at;
	int (*changing)(void) = (int (*)(void))(uintptr_t)writable;

	if (fixed() != 42 || changing() != 43)
		return "generated code";
	writable[1] = 77;
	if (changing() != 77)
		return "code generated again";
	writable[1] = 43;
	return NULL;
}

/* Unmaps untouched memory and maps the addresses again: zero, not the snapshot. */
static const char *do_unmap(void)
{
	struct region *r = find("unmap");
	unsigned char *at;

	must("munmap", munmap(r->at + MIB, MIB / 2));
	at = mmap(r->at + MIB, MIB / 2, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	if (at != r->at + MIB || !is_zero(at, MIB / 2))
		return "memory that was mapped anew is not zero";
	if (!is_filled(r->at, 0, MIB, 2 * MIB, 7) || !is_filled(at + MIB / 2, MIB * 3 / 2, MIB / 2, 2 * MIB, 7))
		return "memory beside unmapped memory";
	return NULL;
}

/* Writes into shared memory are seen by its other mapping, by its descriptor, by a child and by its file. */
static const char *do_share(void)
{
	struct region *memfd = find("memfd"), *again = find("memfd again"), *file = find("file shared"), *shared = find("shared");
	unsigned char byte;
	int status;
	pid_t child;

	memfd->at[MIB / 4 + 5] = 0xa5;
	if (again->at[5] != 0xa5 || pread(memory_fd, &byte, 1, MIB / 4 + 5) != 1 || byte != 0xa5)
		return "memfd: two views differ";
	if (pwrite(memory_fd, "x", 1, MIB / 4 + 9) != 1 || again->at[9] != 'x' || memfd->at[MIB / 4 + 9] != 'x')
		return "memfd: a write by descriptor is not seen";
	if (find("memfd private")->at[8 * PAGE] == memfd->at[8 * PAGE])
		return "memfd: a private page is shared";
	file->at[7] = 0x5a;
	if (pread(file_fd, &byte, 1, 8 * PAGE + 7) != 1 || byte != 0x5a)
		return "file: a write is not in the file";
	child = fork();
	if (child == 0) {
		shared->at[3] = 33;
		shared->at[2 * MIB - 1] = 44;
		_exit(0);
	}
	if (waitpid(child, &status, 0) != child || status || shared->at[3] != 33 || shared->at[2 * MIB - 1] != 44)
		return "shared memory is not shared with a child";
	return NULL;
}

/* Writes one byte into every page of everything writable, and reads it back. */
static const char *do_write(void)
{
	static const char *const names[] = { "holes", "zeros", "island", "locked", "not dumped", "heap", "file dirty", "shared" };

	for (size_t n = 0; n < sizeof names / sizeof *names; n++) {
		struct region *r = find(names[n]);

		for (size_t i = 0; i < r->size; i += PAGE)
			r->at[i] ^= 0xff;
		for (size_t i = 0; i < r->size; i += PAGE)
			r->at[i] ^= 0xff;
	}
	return NULL;
}

static const struct { const char *name; const char *(*run)(void); } requests[] = {
	{ "fork", do_fork }, { "dontneed", do_dontneed }, { "remap", do_remap }, { "stack", do_stack }, { "brk", do_brk },
	{ "protect", do_protect }, { "code", do_code }, { "unmap", do_unmap }, { "share", do_share }, { "write", do_write },
};

int main(int argc, char **argv)
{
	char request[64];
	int listener, fd;

	if (argc != 2)
		return 64;
	make_private();
	make_files();
	make_shared();
	listener = control_listen(argv[1]);
	for (;;) {
		const char *wrong = "unknown request";

		fd = control_next(listener, request, sizeof request);
		if (!strcmp(request, "digest"))
			digest(fd);
		else {
			for (size_t i = 0; i < sizeof requests / sizeof *requests; i++)
				if (!strcmp(request, requests[i].name))
					wrong = requests[i].run();
			dprintf(fd, "%s", wrong ? wrong : "ok");
		}
		close(fd);
	}
}
