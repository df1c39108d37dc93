/* usage: nolibc REQUESTS ANSWERS: no libc, no TLS, no heap. For each byte through the FIFO one line: a running hash. */
#include <asm/unistd.h>
#include <fcntl.h>

static unsigned long table[1 << 14] = { 1 };

static long call(long number, long a, long b, long c)
{
	long result;

	__asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
	return result;
}

static void run(long *stack)
{
	char **argv = (char **)(stack + 1), line[17], byte;
	long in, out;

	if (stack[0] != 3)
		call(__NR_exit_group, 64, 0, 0);
	in = call(__NR_open, (long)argv[1], O_RDWR, 0);
	out = call(__NR_open, (long)argv[2], O_WRONLY | O_APPEND | O_CREAT, 0600);
	if (in < 0 || out < 0)
		call(__NR_exit_group, 65, 0, 0);
	for (unsigned long i = 1; i < 1 << 14; i++)
		table[i] = table[i - 1] * 0x9e3779b97f4a7c15 + i;
	byte = 'r';
	do {
		unsigned long hash = 0;

		for (unsigned long i = 0; i < 1 << 14; i++)
			hash = hash * 31 + (table[i] ^= (unsigned long)byte);
		for (int i = 0; i < 16; i++)
			line[i] = "0123456789abcdef"[hash >> (60 - 4 * i) & 15];
		line[16] = '\n';
		if (call(__NR_write, out, (long)line, 17) != 17)
			call(__NR_exit_group, 66, 0, 0);
	} while (call(__NR_read, in, (long)&byte, 1) == 1 && byte != 'q');
	call(__NR_exit_group, byte == 'q' ? 7 : 67, 0, 0);
}

__asm__(".globl _start\n_start:\n mov %rsp, %rdi\n and $-16, %rsp\n call start_here\n hlt\n");

void start_here(long *stack);
void start_here(long *stack)
{
	run(stack);
}
