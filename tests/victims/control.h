/* The Unix socket by which a test talks to a C victim: one line in, the answer out, close. */
#ifndef LR_VICTIM_CONTROL_H
#define LR_VICTIM_CONTROL_H

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static inline void control_die(const char *what)
{
	perror(what);
	_exit(70);
}

/* A listening socket at `path`. */
static inline int control_listen(const char *path)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (fd < 0)
		control_die("socket");
	if (strlen(path) >= sizeof address.sun_path)
		exit(71);
	strcpy(address.sun_path, path);
	if (bind(fd, (struct sockaddr *)&address, sizeof address) < 0)
		control_die("bind");
	if (listen(fd, 16) < 0)
		control_die("listen");
	return fd;
}

/* The next connection, its request in `line` without the newline. An accept() that fails is an error of the restore. */
static inline int control_next(int listener, char *line, size_t size)
{
	int fd = accept(listener, NULL, NULL);
	size_t used = 0;

	if (fd < 0)
		control_die("accept");
	while (used + 1 < size) {
		ssize_t got = read(fd, line + used, size - 1 - used);

		if (got < 0)
			control_die("read of a request");
		if (got == 0)
			break;
		used += (size_t)got;
		if (memchr(line, '\n', used))
			break;
	}
	line[used] = 0;
	line[strcspn(line, "\n")] = 0;
	return fd;
}

/* Answers requests for ever: with what `answer` writes to `*out`, which is open while it runs. */
_Noreturn static inline void control_serve(int listener, FILE **out, void (*answer)(char *line))
{
	char line[256];

	for (;;) {
		char *text = NULL;
		size_t length = 0;
		int fd = control_next(listener, line, sizeof line);

		*out = open_memstream(&text, &length);
		answer(line);
		fclose(*out);
		if (write(fd, text, length) != (ssize_t)length)
			control_die("write of an answer");
		free(text);
		close(fd);
	}
}

#endif
