/* What one fault costs the thread that has it. Memory is touched once per chunk of 16 KiB, in random order.
 *
 * fault bare MEGABYTES: with userfaultfd alone: another thread reads the event and maps the chunk, whose bytes are there
 *   already. Prints "NS ZSTD_NS": the median of a touch, and of decompressing one chunk into a buffer that is warm.
 * fault restored MEGABYTES FILE: fills its memory and waits for SIGUSR1; then it touches, and writes "NS" to FILE. */
#define _GNU_SOURCE
#include "abi.h"
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#include <zstd.h>

enum { CHUNK = 16 << 10 };

static uint64_t now(void) {
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static int compare(const void *a, const void *b) {
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
	return x < y ? -1 : x > y;
}

static uint64_t median(uint64_t *values, size_t n) {
	qsort(values, n, sizeof *values, compare);
	return values[n / 2];
}

/* Different in every chunk, and about as compressible as memory is. */
static void fill(unsigned char *memory, size_t size) {
	uint32_t state = 1;
	for (size_t i = 0; i < size; i++) {
		state = state * 1664525 + 1013904223;
		memory[i] = i % 16 < 6 ? state >> 28 : (unsigned char)(i >> 14);
	}
}

static uint64_t touch_all(const unsigned char *memory, const uint32_t *order, uint64_t *times, size_t n) {
	for (size_t i = 0; i < n; i++) {
		uint64_t start = now();
		(void)*(volatile const unsigned char *)(memory + (size_t)order[i] * CHUNK);
		times[i] = now() - start;
	}
	return median(times, n);
}

struct served {
	int uffd;
	uint64_t start;
};

static void *serve(void *argument) {
	int uffd = ((struct served *)argument)->uffd;
	uint64_t start = ((struct served *)argument)->start;
	struct uffd_msg message;
	while (read(uffd, &message, sizeof message) == sizeof message) {
		uint64_t offset = message.arg.pagefault.address - start;
		struct uffdio_continue range = {.range = {start + offset / CHUNK * CHUNK, CHUNK}};
		ioctl(uffd, UFFDIO_CONTINUE, &range);
	}
	return NULL;
}

static uint64_t zstd_time(const unsigned char *memory, uint64_t *times, size_t n) {
	static unsigned char packed[2 * CHUNK], raw[CHUNK];
	ZSTD_CCtx *compressor = ZSTD_createCCtx();
	ZSTD_DCtx *decompressor = ZSTD_createDCtx();
	ZSTD_CCtx_setParameter(compressor, ZSTD_c_checksumFlag, 1);
	ZSTD_CCtx_setParameter(compressor, ZSTD_c_compressionLevel, 1);
	for (size_t i = 0; i < n; i++) {
		size_t length = ZSTD_compress2(compressor, packed, sizeof packed, memory + i * CHUNK, CHUNK);
		uint64_t start = now();
		ZSTD_decompressDCtx(decompressor, raw, CHUNK, packed, length);
		times[i] = now() - start;
	}
	return median(times, n);
}

int main(int argc, char **argv) {
	if (argc < 3)
		return 2;
	size_t size = (size_t)atoi(argv[2]) << 20, n = size / CHUNK;
	int bare = !strcmp(argv[1], "bare"), memfd = bare ? memfd_create("fault", MFD_CLOEXEC) : -1;
	if (bare && ftruncate(memfd, (off_t)size))
		return 1;
	unsigned char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, bare ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS, memfd, 0);
	uint32_t *order = malloc(n * sizeof *order);
	uint64_t *times = malloc(n * sizeof *times);
	if (memory == MAP_FAILED || !order || !times)
		return 1;
	fill(memory, size);
	memset(times, 0, n * sizeof *times);
	for (size_t i = 0; i < n; i++) { /* Fisher and Yates, inside out */
		size_t other = (size_t)random() % (i + 1);
		order[i] = order[other];
		order[other] = (uint32_t)i;
	}
	if (bare) {
		unsigned char *lazy = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE, memfd, 0);
		int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
		struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_MINOR_SHMEM};
		struct uffdio_register range = {{(uint64_t)(uintptr_t)lazy, size}, UFFDIO_REGISTER_MODE_MINOR, 0};
		struct served served = {uffd, (uint64_t)(uintptr_t)lazy};
		pthread_t thread;
		if (lazy == MAP_FAILED || uffd < 0 || ioctl(uffd, UFFDIO_API, &api) || ioctl(uffd, UFFDIO_REGISTER, &range) ||
		    pthread_create(&thread, NULL, serve, &served))
			return 1;
		unsigned long long round_trip = touch_all(lazy, order, times, n);
		printf("%llu %llu\n", round_trip, (unsigned long long)zstd_time(memory, times, n));
		return 0;
	}
	sigset_t wanted;
	sigemptyset(&wanted);
	sigaddset(&wanted, SIGUSR1);
	sigprocmask(SIG_BLOCK, &wanted, NULL);
	puts("ready");
	fflush(stdout);
	int number;
	sigwait(&wanted, &number);
	unsigned long long taken = touch_all(memory, order, times, n);
	FILE *out = fopen(argv[3], "w");
	fprintf(out, "%llu\n", taken);
	fclose(out);
	return 0;
}
