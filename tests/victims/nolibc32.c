/* A 32-bit program that waits for ever: what lazyrestore refuses. Built with -m32 -nostdlib -static. */
void _start(void);
void _start(void)
{
	for (;;)
		__asm__ volatile("int $0x80" : : "a"(29) : "memory");	/* pause */
}
