/* What killed pagers have left in the run-time directory. */
#pragma once

/* Removes sockets at which nobody listens, and lock files without a socket, in the directory of `socket_path`. */
void sweep_directory_of(const char *socket_path);
