/* Trying memory files, the layout of a process and the CPU's state: see features.h.
 *
 * Facts. vm.memfd_noexec may forbid to run a memfd. A process may move its own vdso unless the kernel sealed it
 * (CONFIG_MSEAL_SYSTEM_MAPPINGS, Linux 6.16). PR_SET_MM_MAP exists with CONFIG_CHECKPOINT_RESTORE only, and checks the
 * addresses, then the capability for the exe link, then whether the old file is still mapped (EBUSY).
 * Choice. What changes a process is tried in a child (see features_process.c); the exe link counts as
 * permitted when only EBUSY stands in the way, since a child of ours still maps our file.
 */
#define _GNU_SOURCE
#include "features.h"

#include "abi.h"

#include <cpuid.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/prctl.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef MFD_EXEC /* 6.3 */
#define MFD_EXEC 0x0010U
#endif

#define FAILED(name) (*step = (name), errno)
#define SURPRISE(name) (*step = (name), EPROTO)

enum { PAGE = 4096, EXIT_FINE = 42 };

static void close_fd(const int *fd)
{
	if (*fd >= 0)
		close(*fd);
}

#define scoped_fd int __attribute__((cleanup(close_fd)))

/* Waits for a child whose exit status is an errno. */
static int child_error(long child, const char *name, const char **step)
{
	int status;

	if (child < 0)
		return FAILED("clone");
	if (waitpid((pid_t)child, &status, __WALL) != child)
		return FAILED("waitpid");
	errno = WIFEXITED(status) ? WEXITSTATUS(status) : EPROTO;
	return errno ? FAILED(name) : 0;
}

int lr_try_memfd(const char **step)
{
	scoped_fd fd = memfd_create("lazyrestore-doctor", MFD_CLOEXEC | MFD_ALLOW_SEALING);

	return fd < 0 ? FAILED("memfd_create") : 0;
}

int lr_try_sparse_memfd(uint64_t size, const char **step)
{
	char written = 1, found = 0;
	struct rlimit limit;

	/* Beyond the limit the kernel would send SIGXFSZ. */
	if (getrlimit(RLIMIT_FSIZE, &limit))
		return FAILED("getrlimit");
	if (limit.rlim_cur < size)
		return errno = EFBIG, FAILED("RLIMIT_FSIZE");
	scoped_fd fd = memfd_create("lazyrestore-doctor", MFD_CLOEXEC);

	if (fd < 0)
		return FAILED("memfd_create");
	if (ftruncate(fd, (off_t)size))
		return FAILED("ftruncate");
	if (pwrite(fd, &written, 1, (off_t)size - PAGE) != 1)
		return FAILED("pwrite");
	if (pread(fd, &found, 1, (off_t)size - PAGE) != 1)
		return FAILED("pread");
	return found == written ? 0 : SURPRISE("pread");
}

int lr_try_memfd_exec(const char **step)
{
	/* mov edi, EXIT_FINE; mov eax, SYS_exit_group; syscall */
	static const uint8_t code[] = {0xbf, EXIT_FINE, 0, 0, 0, 0xb8, 231, 0, 0, 0, 0x0f, 0x05};
	static const uint64_t base = 0x10000000;
	struct {
		Elf64_Ehdr header;
		Elf64_Phdr segment;
		uint8_t code[sizeof code];
	} image = {
		.header = {.e_ident = {ELFMAG0, ELFMAG1, ELFMAG2, ELFMAG3, ELFCLASS64, ELFDATA2LSB, EV_CURRENT},
		           .e_type = ET_EXEC, .e_machine = EM_X86_64, .e_version = EV_CURRENT,
		           .e_entry = base + sizeof(Elf64_Ehdr) + sizeof(Elf64_Phdr), .e_phoff = sizeof(Elf64_Ehdr),
		           .e_ehsize = sizeof(Elf64_Ehdr), .e_phentsize = sizeof(Elf64_Phdr), .e_phnum = 1},
		.segment = {.p_type = PT_LOAD, .p_flags = PF_R | PF_X, .p_vaddr = base, .p_filesz = sizeof image,
		            .p_memsz = sizeof image, .p_align = PAGE},
	};
	char *const arguments[] = {"lazyrestore-doctor", NULL}, *const environment[] = {NULL};

	memcpy(image.code, code, sizeof code);
	int fd = memfd_create("lazyrestore-doctor", MFD_CLOEXEC | MFD_EXEC);

	if (fd < 0 && errno == EINVAL) /* before 6.3 every memfd is executable */
		fd = memfd_create("lazyrestore-doctor", MFD_CLOEXEC);
	scoped_fd guard = fd;

	if (fd < 0)
		return FAILED("memfd_create");
	if (write(fd, &image, sizeof image) != sizeof image)
		return FAILED("write");
	long child = syscall(SYS_clone, 0, NULL, NULL, NULL, NULL);

	if (!child) {
		syscall(SYS_execveat, fd, "", arguments, environment, AT_EMPTY_PATH);
		_exit(errno);
	}
	int error = child_error(child, "execveat of a memfd", step);

	(void)guard;
	return error == EXIT_FINE ? 0 : error ? error : SURPRISE("execveat of a memfd");
}

/* Our own layout, as /proc/self/stat tells it (proc_pid_stat(5); fields counted from 1). */
static int read_layout(struct prctl_mm_map *map, const char **step)
{
	unsigned long long field[53] = {0};
	char text[2048];
	scoped_fd fd = open("/proc/self/stat", O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return FAILED("open /proc/self/stat");
	ssize_t length = read(fd, text, sizeof text - 1);

	if (length <= 0)
		return FAILED("read /proc/self/stat");
	text[length] = 0;
	char *rest = strrchr(text, ')'), *word, *state = NULL;

	if (!rest)
		return SURPRISE("read /proc/self/stat");
	int number = 3;

	for (word = strtok_r(rest + 1, " ", &state); word && number < 53; word = strtok_r(NULL, " ", &state), number++)
		sscanf(word, "%llu", &field[number]);
	*map = (struct prctl_mm_map){
		.start_code = field[26], .end_code = field[27], .start_stack = field[28],
		.start_data = field[45], .end_data = field[46], .start_brk = field[47],
		.brk = (uint64_t)syscall(SYS_brk, 0),
		.arg_start = field[48], .arg_end = field[49], .env_start = field[50], .env_end = field[51],
		.exe_fd = (uint32_t)-1,
	};
	return number > 51 ? 0 : SURPRISE("read /proc/self/stat");
}

static int try_layout(bool exe_link, const char **step)
{
	struct prctl_mm_map map;
	scoped_fd exe = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
	int error = read_layout(&map, step);

	if (error)
		return error;
	if (exe < 0)
		return FAILED("open /proc/self/exe");
	if (exe_link)
		map.exe_fd = (uint32_t)exe;
	long child = syscall(SYS_clone, 0, NULL, NULL, NULL, NULL);

	if (!child)
		_exit(prctl(PR_SET_MM, PR_SET_MM_MAP, &map, sizeof map, 0) ? errno : 0);
	return child_error(child, "PR_SET_MM_MAP", step);
}

int lr_try_mm_map(const char **step)
{
	return try_layout(false, step);
}

int lr_try_exe_link(const char **step)
{
	int error = try_layout(true, step);

	return error == EBUSY ? 0 : error;
}

int lr_try_move(uint64_t start, uint64_t end, const char **step)
{
	size_t length = end - start;
	long child = syscall(SYS_clone, 0, NULL, NULL, NULL, NULL);

	if (!child) {
		/* Raw calls only: libc's clock functions would look for the vdso. */
		void *target = mmap(NULL, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		if (target == MAP_FAILED)
			_exit(errno);
		_exit(mremap((void *)start, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, target) == MAP_FAILED ? errno : 0);
	}
	return child_error(child, "mremap", step);
}

int lr_try_pagemap_scan(const char **step)
{
	enum { PAGES = 4 };
	struct page_region region = {0};
	scoped_fd fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return FAILED("open /proc/self/pagemap");
	char *memory = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (memory == MAP_FAILED)
		return FAILED("mmap");
	madvise(memory, PAGES * PAGE, MADV_NOHUGEPAGE);
	*(volatile char *)(memory + PAGE) = 1;
	struct pm_scan_arg scan = {.size = sizeof scan, .start = (uintptr_t)memory, .end = (uintptr_t)memory + PAGES * PAGE,
	                           .vec = (uintptr_t)&region, .vec_len = 1,
	                           .category_mask = PAGE_IS_PRESENT, .return_mask = PAGE_IS_PRESENT};
	int found = ioctl(fd, PAGEMAP_SCAN, &scan), error = found < 0 ? FAILED("PAGEMAP_SCAN") : 0;
	bool right = found == 1 && region.start == (uintptr_t)memory + PAGE && region.end == region.start + PAGE;

	munmap(memory, PAGES * PAGE);
	return error ? error : right ? 0 : SURPRISE("PAGEMAP_SCAN");
}

static bool cpu_has_xsave(void)
{
	unsigned a, b, c, d;

	return __get_cpuid(1, &a, &b, &c, &d) && c & bit_OSXSAVE;
}

uint64_t lr_cpu_xcr0(void)
{
	uint32_t low, high;

	if (!cpu_has_xsave())
		return 0;
	__asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
	return (uint64_t)high << 32 | low;
}

uint32_t lr_cpu_xsave_size(void)
{
	unsigned a, b, c, d;

	return cpu_has_xsave() && __get_cpuid_count(0xd, 0, &a, &b, &c, &d) ? b : 0;
}
