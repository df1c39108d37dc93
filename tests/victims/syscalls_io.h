/* What syscalls.c has of files, pipes and sockets, and what all of its cases use. */
#ifndef LR_VICTIM_SYSCALLS_IO_H
#define LR_VICTIM_SYSCALLS_IO_H

#include <fcntl.h>
#include <linux/io_uring.h>
#include <poll.h>
#include <stdint.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include "control.h"

#define PAGE 4096ul
#define SIZE (32 * PAGE)

static FILE *out;
static uint64_t region_seed; /* of the region of the case that runs */
static unsigned char plain[SIZE]; /* ordinary memory, touched before every case */

static uint64_t scramble(uint64_t x)
{
	x = (x ^ (x >> 31)) * UINT64_C(0x9e3779b97f4a7c15) + 1;
	return x ^ (x >> 29);
}

static void fill(void *to, size_t size, uint64_t seed)
{
	for (size_t i = 0; i < size / 8; i++)
		((uint64_t *)to)[i] = i / 512 % 4 == 3 ? 0 : scramble(seed + i); /* every fourth page is zero */
}

static uint64_t hash_of(const void *from, size_t size)
{
	uint64_t hash = size;

	for (size_t i = 0; i < size; i++)
		hash = (hash ^ ((const volatile unsigned char *)from)[i]) * UINT64_C(0x100000001b3);
	return hash;
}

static long say(long result)
{
	int error = errno;

	fprintf(out, "%ld", result);
	if (result == -1)
		fprintf(out, "(%s)", strerrorname_np(error));
	fputc(' ', out);
	errno = 0;
	return result;
}

static void show(const void *from, size_t size)
{
	fprintf(out, "%016lx ", (unsigned long)hash_of(from, size));
}

static int scratch(int flags)
{
	int fd = open("scratch", O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

	if (fd < 0 || write(fd, plain, SIZE) != SIZE)
		control_die("scratch");
	close(fd);
	return open("scratch", O_RDWR | O_CLOEXEC | flags);
}

static void open_pipe(int *ends)
{
	if (pipe2(ends, O_CLOEXEC) || fcntl(ends[1], F_SETPIPE_SZ, 4 * (int)SIZE) < 0)
		control_die("pipe");
}

static void shut(const int *ends)
{
	close(ends[0]);
	close(ends[1]);
}

/* -- files ------------------------------------------------------------------------------------------------------------- */

static void file_write(unsigned char *m)
{
	int fd = scratch(0);

	say(write(fd, m + 123, SIZE - 1000));
	say(pread(fd, plain, SIZE, 0));
	show(plain, SIZE);
	close(fd);
}

static void file_read(unsigned char *m)
{
	int fd = scratch(0);

	say(read(fd, m + 5001, SIZE / 2 + 77)); /* the pages at either end keep what is beside it */
	close(fd);
}

static void direct_write(unsigned char *m)
{
	int fd = scratch(O_DIRECT);

	say(pwrite(fd, m, SIZE, 0));
	close(fd);
	fd = open("scratch", O_RDONLY | O_CLOEXEC);
	say(pread(fd, plain, SIZE, 0));
	show(plain, SIZE);
	close(fd);
}

static void direct_read(unsigned char *m)
{
	int fd = scratch(O_DIRECT);

	fsync(fd);
	say(pread(fd, m + 2 * PAGE, SIZE / 2, PAGE));
	say(pread(fd, m + 25 * PAGE + 512, 512, 1024)); /* less than a page */
	close(fd);
}

static void vectors(struct iovec *iov, unsigned char *m)
{
	for (int i = 0; i < 6; i++)
		iov[i] = (struct iovec){ m + (unsigned long)i * 5 * PAGE + 100, 3 * PAGE + (unsigned long)i };
}

static void file_writev(unsigned char *m)
{
	struct iovec iov[6];
	int fd = scratch(0);

	vectors(iov, m);
	say(writev(fd, iov, 6));
	say(pwritev2(fd, iov, 6, 50, RWF_DSYNC));
	say(pread(fd, plain, SIZE, 0));
	show(plain, SIZE);
	close(fd);
}

static void file_readv(unsigned char *m)
{
	struct iovec *iov = (struct iovec *)(m + 31 * PAGE); /* itself in memory that has not arrived, behind the rest */
	struct iovec local[6];
	int fd = scratch(0);

	vectors(local, m);
	say(readv(fd, local, 6));
	memcpy(iov, local, sizeof local);
	say(preadv2(fd, iov, 3, 200, 0));
	memset(iov, 0, sizeof local); /* addresses */
	close(fd);
}

static void names(unsigned char *m)
{
	struct stat *status = (struct stat *)(m + 4 * PAGE);

	close(scratch(0));
	say(stat("scratch", status));
	say(status->st_size);
	memset(status, 0, sizeof *status);
	strcpy((char *)m + PAGE - 5, "scratch"); /* across a page */
	say(access((char *)m + PAGE - 5, R_OK));
	say(unlink((char *)m + PAGE - 5));
	say(access((char *)m + 8 * PAGE, R_OK)); /* whatever it is, there is no such file */
	say(readlink("/proc/self/cwd", (char *)m + 9 * PAGE, 3));
}

/* -- pipes and sockets ------------------------------------------------------------------------------------------------- */

static void pipe_writev(unsigned char *m)
{
	struct iovec iov[6];
	int ends[2];

	open_pipe(ends);
	vectors(iov, m);
	say(writev(ends[1], iov, 6));
	say(read(ends[0], plain, SIZE));
	show(plain, SIZE);
	shut(ends);
}

static void pipe_readv(unsigned char *m)
{
	struct iovec iov[6];
	int ends[2];

	open_pipe(ends);
	vectors(iov, m);
	say(write(ends[1], plain, SIZE / 2));
	say(readv(ends[0], iov, 6));
	shut(ends);
}

static void socket_send_receive(unsigned char *m)
{
	struct iovec from = { m + 77, 5 * PAGE }, to = { m + 9 * PAGE + 5, 5 * PAGE };
	struct msghdr message = { .msg_iov = &from, .msg_iovlen = 1 };
	int ends[2];

	if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends))
		control_die("socketpair");
	say(sendmsg(ends[0], &message, 0));
	message.msg_iov = &to;
	say(recvmsg(ends[1], &message, MSG_WAITALL));
	say(send(ends[0], m + 20 * PAGE, 2 * PAGE, 0));
	say(recv(ends[1], m + 28 * PAGE + 1, 2 * PAGE, MSG_WAITALL));
	shut(ends);
}

static void vmsplice_in(unsigned char *m)
{
	struct iovec iov = { m, SIZE };
	int ends[2], fd = scratch(0);

	open_pipe(ends);
	say(vmsplice(ends[1], &iov, 1, 0)); /* the pipe holds the process's own pages */
	say(splice(ends[0], NULL, fd, NULL, SIZE / 2, 0));
	say(read(ends[0], plain, SIZE));
	show(plain, SIZE);
	say(pread(fd, plain, SIZE, 0));
	show(plain, SIZE);
	close(fd);
	shut(ends);
}

static void vmsplice_out(unsigned char *m)
{
	struct iovec iov = { m + 3000, SIZE / 2 };
	int ends[2];

	open_pipe(ends);
	say(write(ends[1], plain, SIZE));
	say(vmsplice(ends[0], &iov, 1, 0));
	shut(ends);
}

static void splice_tee(unsigned char *m)
{
	int one[2], two[2];

	open_pipe(one);
	open_pipe(two);
	say(write(one[1], m + 1, SIZE / 2));
	say(tee(one[0], two[1], SIZE / 2, 0));
	say(read(one[0], plain, SIZE));
	show(plain, SIZE);
	say(read(two[0], m + SIZE / 2 + 100, SIZE / 4));
	shut(one);
	shut(two);
}

static void waiting(unsigned char *m)
{
	struct pollfd *polled = (struct pollfd *)(m + 2 * PAGE - 8);
	struct epoll_event *events = (struct epoll_event *)(m + 5 * PAGE - 6);
	int *count = (int *)(m + 8 * PAGE), ends[2], epoll = epoll_create1(EPOLL_CLOEXEC);

	open_pipe(ends);
	say(write(ends[1], "abc", 3));
	say(ioctl(ends[0], FIONREAD, count));
	say(*count);
	polled[0] = (struct pollfd){ .fd = ends[0], .events = POLLIN };
	polled[1] = (struct pollfd){ .fd = ends[1], .events = POLLOUT };
	say(poll(polled, 2, 0));
	say(polled[0].revents * 1000 + polled[1].revents);
	memset(polled, 0, 2 * sizeof *polled);
	say(epoll_ctl(epoll, EPOLL_CTL_ADD, ends[0], &(struct epoll_event){ .events = EPOLLIN, .data.u64 = 7 }));
	say(epoll_wait(epoll, events, 4, 0));
	close(epoll);
	shut(ends);
}

/* io_uring: buffers that are pinned for as long as the ring lives, while some of their pages are dropped and others written. */
static void fixed_buffers(unsigned char *m)
{
	struct iovec buffers[2] = { { m, SIZE / 2 }, { m + SIZE / 2, SIZE / 2 } };
	struct io_uring_params about = { 0 };
	int ring = (int)syscall(SYS_io_uring_setup, 2, &about), fd = scratch(0);
	struct io_uring_sqe *entries;
	unsigned char *queue;

	say(ring < 0 ? ring : 0);
	say(syscall(SYS_io_uring_register, ring, IORING_REGISTER_BUFFERS, buffers, 2));
	queue = mmap(NULL, about.sq_off.array + 8, PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQ_RING);
	entries = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQES);
	for (unsigned i = 0; i < 2 && queue != MAP_FAILED && entries != MAP_FAILED; i++) {
		entries[i] = (struct io_uring_sqe){
			.opcode = i ? IORING_OP_READ_FIXED : IORING_OP_WRITE_FIXED,
			.fd = fd,
			.addr = (uintptr_t)(i ? m + 19 * PAGE + 7 : m + 3 * PAGE + 5),
			.len = 8 * PAGE,
			.buf_index = (uint16_t)i,
		};
		((unsigned *)(queue + about.sq_off.array))[i] = i;
		__atomic_store_n((unsigned *)(queue + about.sq_off.tail), i + 1, __ATOMIC_RELEASE);
		say(syscall(SYS_io_uring_enter, ring, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0));
		say(madvise(m + (i ? 20 : 5) * PAGE, PAGE, MADV_DONTNEED));
		memset(m + (i ? 30 : 1) * PAGE + 99, 5, 9);
	}
	if (queue != MAP_FAILED)
		munmap(queue, about.sq_off.array + 8);
	if (entries != MAP_FAILED)
		munmap(entries, PAGE);
	close(ring);
	close(fd);
}

#endif
