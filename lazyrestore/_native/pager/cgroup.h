/* Which cgroup a process is in, and whose end ends whom.
 *
 * Facts: /proc/PID/cgroup has a line for each hierarchy; that of version 2, "0::PATH", is the one with cgroup.kill (Linux
 * 5.14), which kills all that is in a cgroup or below it, in one instant. PATH begins at the root of the reader's cgroup
 * namespace, and with /.. where the cgroup is not below that.
 * Version 1 has nothing of the kind: whoever ends a cgroup there kills one process after the other.
 * Choice: version 2 only. Where there is none, or /proc does not tell, all processes are taken to be in the same one. */
#pragma once
#include <stdbool.h>
#include <sys/types.h>

/* The path of a process's cgroup; to be freed. NULL: nobody tells. */
char *cgroup_of(pid_t pid);

/* Is `above` that cgroup, or one above it? Then what kills all in `above` kills all in `path`. */
bool cgroup_covers(const char *above, const char *path);

/* Is it not below the root of our cgroup namespace? Nothing of ours can go there. */
bool cgroup_is_beyond(const char *path);

/* Moves a process. 0, or an errno; ENOTSUP: cgroups of version 2 are mounted nowhere. */
int cgroup_move(pid_t pid, const char *path);
