#include "log.h"

#include <stdarg.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

static int log_fd = -1;

void log_init(int fd) {
	log_fd = fd;
}

void log_line(const char *format, ...) {
	char line[512];
	struct timespec now;
	clock_gettime(CLOCK_REALTIME, &now);
	size_t used = (size_t)snprintf(line, sizeof line, "%lld.%06ld pagerd %d: ", (long long)now.tv_sec,
				       now.tv_nsec / 1000, (int)getpid());
	va_list arguments;
	va_start(arguments, format);
	int more = vsnprintf(line + used, sizeof line - used - 1, format, arguments);
	va_end(arguments);
	if (more > 0)
		used += (size_t)more < sizeof line - used - 1 ? (size_t)more : sizeof line - used - 2;
	line[used++] = '\n';
	if (write(log_fd, line, used) < 0)
		return;
}
