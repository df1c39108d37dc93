/* Spawning: a new process that runs a given executable file, stopped at its first instruction, traced by the caller. */
#pragma once
#include <stddef.h>
#include <stdint.h>

enum lr_spawn_step {
	LR_SPAWN_CLONE = 1, LR_SPAWN_DUP = 2, LR_SPAWN_TRACEME = 3, LR_SPAWN_EXEC = 4,
	LR_SPAWN_SETNS = 5, LR_SPAWN_WAIT = 6, LR_SPAWN_SESSION = 7, LR_SPAWN_LIMIT = 8
};

struct lr_spawn {
	int32_t executable;      /* descriptor of the ELF file */
	int32_t count;           /* descriptors handed over: source[i] becomes target[i]; all others are closed by exec */
	const int32_t *source;   /* each must be >= 0 */
	const int32_t *target;
	int32_t wanted_pid;      /* 0: any */
	int32_t pid_namespace;   /* a descriptor for setns(), -1: none; applies to the new process only */
	int32_t new_pid_namespace; /* 1: the new process is the init of a PID namespace of its own */
	int32_t new_session;     /* 1: setsid(), 2: setpgid(0, 0), 0: neither */
	uint64_t descriptor_limit; /* the soft RLIMIT_NOFILE needed while descriptors are placed; 0: leave it */
	int32_t trace;           /* 1: PTRACE_TRACEME, and wait for the stop at exec */
	int32_t pid;             /* out */
	int32_t pidfd;           /* out; as it was after an error: the process is collected then */
	int32_t step;            /* out, on failure: enum lr_spawn_step */
};

int lr_spawn(struct lr_spawn *spawn);
