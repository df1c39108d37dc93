/* Known values in every register, held through a loop or through a system call, and what is left of them afterwards. */
#ifndef LR_VICTIM_REGISTERS_H
#define LR_VICTIM_REGISTERS_H

#include <stdint.h>
#include <time.h>

struct registers {
	uint8_t vector[32][64];	/* ymm0-15: 32 bytes each, packed; zmm0-31: 64 bytes each */
	uint64_t mask[8];	/* k0-k7 */
	uint64_t general[12];	/* rax rbx rdx rbp r8-r15 */
	uint64_t red_zone;	/* the word at -64(%rsp) */
	uint64_t carry;		/* the carry flag, always set */
};

/* Offsets of the above, for the assembler. */
#define REG_MASK "2048"
#define REG_GENERAL "2112"
#define REG_RED "2208"
#define REG_CARRY "2216"

_Static_assert(__builtin_offsetof(struct registers, mask) == 2048, "REG_MASK");
_Static_assert(__builtin_offsetof(struct registers, general) == 2112, "REG_GENERAL");
_Static_assert(__builtin_offsetof(struct registers, red_zone) == 2208, "REG_RED");
_Static_assert(__builtin_offsetof(struct registers, carry) == 2216, "REG_CARRY");

/* Load all from `in`, count `loops` down, store all to `out`. */
void spin_ymm(const struct registers *in, struct registers *out, uint64_t loops);
void spin_zmm(const struct registers *in, struct registers *out, uint64_t loops);
/* The same around nanosleep(`time`, NULL); returns its result. rax, rcx and r11 are the system call's. */
long sleep_ymm(const struct registers *in, struct registers *out, const struct timespec *time);

#define SIXTEEN "0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15"
#define THIRTY_TWO SIXTEEN ",16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31"
#define LOAD_YMM(from) ".irp i," SIXTEEN "\n vmovdqu \\i*32(" from "), %ymm\\i\n .endr\n"
#define STORE_YMM(to) ".irp i," SIXTEEN "\n vmovdqu %ymm\\i, \\i*32(" to ")\n .endr\n"
#define LOAD_ZMM(from) ".irp i," THIRTY_TWO "\n vmovdqu64 \\i*64(" from "), %zmm\\i\n .endr\n" \
	".irp i,0,1,2,3,4,5,6,7\n kmovq " REG_MASK "+\\i*8(" from "), %k\\i\n .endr\n"
#define STORE_ZMM(to) ".irp i," THIRTY_TWO "\n vmovdqu64 %zmm\\i, \\i*64(" to ")\n .endr\n" \
	".irp i,0,1,2,3,4,5,6,7\n kmovq %k\\i, " REG_MASK "+\\i*8(" to ")\n .endr\n"
#define GENERAL_AT(i) REG_GENERAL "+8*" #i
#define LOAD_GENERAL(from) \
	"mov " REG_RED "(" from "), %rax\n mov %rax, -64(%rsp)\n" \
	"mov " GENERAL_AT(0) "(" from "), %rax\n mov " GENERAL_AT(1) "(" from "), %rbx\n" \
	"mov " GENERAL_AT(2) "(" from "), %rdx\n mov " GENERAL_AT(3) "(" from "), %rbp\n" \
	".irp i,8,9,10,11,12,13,14,15\n mov " REG_GENERAL "-32+8*\\i(" from "), %r\\i\n .endr\n"
#define STORE_GENERAL(to) \
	"mov %rax, " GENERAL_AT(0) "(" to ")\n mov %rbx, " GENERAL_AT(1) "(" to ")\n" \
	"mov %rdx, " GENERAL_AT(2) "(" to ")\n mov %rbp, " GENERAL_AT(3) "(" to ")\n" \
	".irp i,8,9,10,11,12,13,14,15\n mov %r\\i, " REG_GENERAL "-32+8*\\i(" to ")\n .endr\n" \
	"mov -64(%rsp), %rax\n mov %rax, " REG_RED "(" to ")\n"
#define PUSH "push %rbx\n push %rbp\n push %r12\n push %r13\n push %r14\n push %r15\n"
#define POP "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbp\n pop %rbx\n"
#define FUNCTION(name, body) \
	__asm__(".pushsection .text\n .globl " name "\n .type " name ", @function\n" name ":\n" \
		PUSH body POP "ret\n .size " name ", .-" name "\n .popsection\n")

/* dec leaves the carry flag alone, so stc before the loop is still visible behind it. */
#define LOOP "mov %rdx, %rcx\n"
#define COUNT "stc\n 1: dec %rcx\n jnz 1b\n setc " REG_CARRY "(%rsi)\n"

FUNCTION("spin_ymm", LOOP LOAD_YMM("%rdi") LOAD_GENERAL("%rdi") COUNT STORE_GENERAL("%rsi") STORE_YMM("%rsi") "vzeroupper\n");
FUNCTION("spin_zmm", LOOP LOAD_ZMM("%rdi") LOAD_GENERAL("%rdi") COUNT STORE_GENERAL("%rsi") STORE_ZMM("%rsi") "vzeroupper\n");
FUNCTION("sleep_ymm",
	 "push %rsi\n push %rdx\n" LOAD_YMM("%rdi") LOAD_GENERAL("%rdi")
	 "mov (%rsp), %rdi\n xor %esi, %esi\n mov $35, %eax\n syscall\n"
	 "pop %rdi\n pop %rsi\n mov -80(%rsp), %rcx\n mov %rcx, " REG_RED "(%rsi)\n push %rax\n"
	 "mov %rbx, " GENERAL_AT(1) "(%rsi)\n mov %rdx, " GENERAL_AT(2) "(%rsi)\n mov %rbp, " GENERAL_AT(3) "(%rsi)\n"
	 ".irp i,8,9,10,12,13,14,15\n mov %r\\i, " REG_GENERAL "-32+8*\\i(%rsi)\n .endr\n"
	 STORE_YMM("%rsi") "vzeroupper\n pop %rax\n");

#endif
