/* As many mappings as a process may have (vm.max_map_count), then a file "ready". */
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

int main(void)
{
	char *memory = mmap(0, 1ul << 30, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	for (long i = 0; i < 1l << 17 && !mprotect(memory + i * 8192, 4096, PROT_READ); i++)
		memory[i * 8192 + 4096] = (char)i;
	close(open("ready", O_CREAT | O_WRONLY, 0600));
	for (;;)
		pause();
}
