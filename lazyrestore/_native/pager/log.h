/* One line per remark in the log file that the restorer gave. */
#pragma once

void log_init(int fd);

/* Adds time and pid; one write(2), so lines of several processes do not mix. Errors are not reported anywhere. */
__attribute__((format(printf, 1, 2))) void log_line(const char *format, ...);
