/* See executor.h. Compiled so that the section holds all it needs: no calls out, no tables, no stack protector. */
#include "executor.h"

#define EXECUTOR __attribute__((section("lr_executor"), used, noinline, no_stack_protector, visibility("hidden"), \
				no_sanitize("address", "undefined", "thread"), no_instrument_function))

extern const char __start_lr_executor[], __stop_lr_executor[];

__attribute__((always_inline)) static inline int64_t
syscall6(uint64_t number, const uint64_t *a)
{
	int64_t result;
	register uint64_t r10 __asm__("r10") = a[3];
	register uint64_t r8 __asm__("r8") = a[4];
	register uint64_t r9 __asm__("r9") = a[5];
	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(a[0]), "S"(a[1]), "d"(a[2]), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return result;
}

__attribute__((always_inline)) static inline void
stop(uint64_t index, uint64_t why, int64_t result)
{
	__asm__ volatile("int3" : : "a"(result), "D"(index), "S"(why) : "memory");
}

/* clone3: the child starts on its own stack with every register as it was, so r12 carries its list to the entry. */
__attribute__((always_inline)) static inline int64_t
spawn_thread(uint64_t args, uint64_t size, uint64_t list)
{
	int64_t result;
	__asm__ volatile("mov %[list], %%r12\n\t"
			 "syscall\n\t"
			 "test %%rax, %%rax\n\t"
			 "jnz 1f\n\t"
			 "jmp lr_executor_entry\n"
			 "1:"
			 : "=a"(result)
			 : "a"((uint64_t)435), "D"(args), "S"(size), [list] "r"(list)
			 : "rcx", "r11", "r12", "memory");
	return result;
}

EXECUTOR void
lr_executor_run(const struct lr_list *list, uint64_t kernel0, uint64_t kernel1, uint64_t kernel2)
{
	struct lr_op *ops = (struct lr_op *)list->ops;
	for (uint64_t i = 0; i < list->count; i++) {
		struct lr_op *op = &ops[i];
		uint64_t a[6];
		for (int k = 0; k < 6; k++) {
			a[k] = op->arg[k];
			if (op->kind[k] == LR_RESULT)
				a[k] = (uint64_t)ops[a[k]].result;
			else if (op->kind[k] == LR_WORD)
				a[k] = (uint64_t)(int64_t) * (int32_t *)a[k];
			else if (op->kind[k] == LR_KERNEL)
				a[k] = a[k] == 0 ? kernel0 : a[k] == 1 ? kernel1 : kernel2;
		}
		if (op->number == LR_OP_STOP) {
			stop(i, LR_STOP_ASKED, 0);
			continue;
		}
		if (op->number == LR_OP_REPEAT) {
			if (!a[0])
				i = a[1] - 1;
			continue;
		}
		int64_t result = op->number == LR_OP_THREAD ? spawn_thread(a[0], a[1], a[2]) : syscall6(op->number, a);
		if (op->keep)
			op->result = result;
		if ((op->expect == LR_EXPECT_OK && result < 0 && result >= -4095) ||
		    (op->expect == LR_EXPECT_EQUAL && result != op->want)) {
			for (;;)
				stop(i, LR_STOP_SURPRISE, result);
		}
	}
	for (;;)
		stop(list->count, LR_STOP_END, 0);
}

__asm__(".pushsection lr_executor, \"ax\", @progbits\n"
	".globl lr_executor_entry\n"
	".hidden lr_executor_entry\n"
	".type lr_executor_entry, @function\n"
	"lr_executor_entry:\n\t"
	"mov %r12, %rdi\n\t"
	"mov %r13, %rsi\n\t"
	"mov %r14, %rdx\n\t"
	"mov %r15, %rcx\n\t"
	"xor %ebp, %ebp\n\t"
	"call lr_executor_run\n\t"
	"ud2\n"
	".popsection\n");
extern const char lr_executor_entry[] __attribute__((visibility("hidden")));

const void *
lr_executor_code(size_t *length, size_t *entry)
{
	*length = (size_t)(__stop_lr_executor - __start_lr_executor);
	*entry = (size_t)(lr_executor_entry - __start_lr_executor);
	return __start_lr_executor;
}
