/* The executor: runs a flat list of system calls in a new process, and knows nothing else.
 *
 * Facts. The code is position independent, touches no data but the list it is given, needs a few hundred bytes of
 * stack, and makes no call outside its own section, so its bytes can be copied to any address of any process. It is
 * compiled into this extension in a section of its own; lr_executor_code() hands out those bytes. It writes to a program
 * only where a later operation refers to a result: the rest of it stays the one copy that all new processes map.
 *
 * Contract with the tracer. It starts at lr_executor_entry() with r12 = list, r13 to r15 = where the kernel's own mappings
 * lie in this process (LR_KERNEL arguments are their numbers), and rsp = a 16-byte aligned stack. It
 * stops (int3) at an OP_STOP, at the end of a list and at the first surprise, with rdi = index of the op, rsi = enum
 * lr_stop, rax = the op's result; continuing after an OP_STOP goes on with the next op. SIGTRAP must not be blocked.
 */
#pragma once
#include <stddef.h>
#include <stdint.h>

enum lr_arg_kind { LR_LITERAL = 0, LR_RESULT = 1, LR_WORD = 2, LR_KERNEL = 3 };
enum lr_expect { LR_EXPECT_OK = 0, LR_EXPECT_EQUAL = 1, LR_EXPECT_ANY = 2 };
enum lr_special { LR_OP_STOP = 0x10000, LR_OP_THREAD = 0x10001, LR_OP_REPEAT = 0x10002 };
enum lr_stop { LR_STOP_ASKED = 0, LR_STOP_END = 1, LR_STOP_SURPRISE = 2 };

struct lr_op {
	uint32_t number;  /* system call number, or enum lr_special */
	/* enum lr_arg_kind of each argument: the value itself, the result of op number `arg`, the int32 at address `arg`, the
	 * address of kernel mapping number `arg` */
	uint8_t kind[6];
	uint8_t expect;   /* enum lr_expect: any result that is no error, exactly `want`, anything */
	uint8_t keep;     /* 1: a later op refers to the result */
	/* LR_OP_THREAD: clone_args, their size, the new thread's list; LR_OP_REPEAT: a value (kind LR_RESULT), and the index
	 * of the op to go back to if it is 0 */
	uint64_t arg[6];
	int64_t want;
	int64_t result;
};

struct lr_list {
	uint64_t ops; /* address of the first op */
	uint64_t count;
};

const void *lr_executor_code(size_t *length, size_t *entry);
