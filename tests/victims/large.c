/*
 * Much memory. usage: large CONTROL_SOCKET MIB
 *
 * Each page is filled with one word of its own. A request is the number of the first page, of a step and of pages: reads those, and
 * answers how many hold anything else.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <sys/mman.h>

#include "control.h"

#define PAGE 4096ul

int main(int argc, char **argv)
{
	uint64_t *memory;
	char line[64];
	size_t size;
	int listener;

	if (argc != 3)
		return 64;
	size = strtoul(argv[2], NULL, 10) << 20;
	memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		control_die("mmap");
	for (size_t i = 0; i < size / 8; i++)
		memory[i] = (i / 512 + 1) * UINT64_C(0x9e3779b97f4a7c15);
	listener = control_listen(argv[1]);
	for (;;) {
		int fd = control_next(listener, line, sizeof line);
		size_t first = 0, step = 0, count = 0, wrong = 0;

		sscanf(line, "%zu %zu %zu", &first, &step, &count);
		for (size_t page = first; count; page += step, count--)
			for (size_t i = 0; i < 512; i++)
				wrong += memory[page * 512 + i] != (page + 1) * UINT64_C(0x9e3779b97f4a7c15);
		dprintf(fd, "%zu wrong", wrong);
		close(fd);
	}
}
