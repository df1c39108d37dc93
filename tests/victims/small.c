/* usage: small CONTROL_SOCKET: a static program. Requests: N: the sum of N words of a table in .data, of as many in .bss and of
 * as many on the heap, which N also changes; "float": a long sum of sines. */
#include <math.h>

#include "control.h"

static unsigned long data[8192] = { 1, 2, 3 }, bss[1 << 16];
static _Thread_local unsigned long calls = 1000;

int main(int argc, char **argv)
{
	unsigned long *heap = malloc(1 << 20);
	char request[64];
	int listener, fd;

	if (argc != 2 || !heap)
		return 64;
	for (int i = 0; i < 1 << 17; i++)
		heap[i] = (unsigned long)i * i;
	listener = control_listen(argv[1]);
	for (;;) {
		fd = control_next(listener, request, sizeof request);
		if (!strcmp(request, "exit"))
			return 7;
		if (!strcmp(request, "float")) {
			double sum = 0;

			for (int i = 0; i < 100000; i++)
				sum += sin(i + (double)calls);
			dprintf(fd, "%.17g\n", sum);
		} else {
			unsigned long n = strtoul(request, NULL, 10), sum = ++calls;

			for (unsigned long i = 0; i < n; i++)
				sum += (data[i % 8192] += n) + (bss[i * 97 % (1 << 16)] += i) + (heap[i % (1 << 17)] ^= n);
			dprintf(fd, "%lu\n", sum);
		}
		close(fd);
	}
}
