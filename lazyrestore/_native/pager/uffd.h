/* userfaultfd's ioctls, one function each: how far it came, and the errno that stopped it.
 *
 * Facts: an ioctl over a range may stop half way. The kernel then answers EAGAIN with the bytes done in the struct's last
 * field; the true reason shows when the rest is tried. It wakes the threads that wait in the part that was done. EAGAIN
 * with nothing done means that fork, mremap, munmap or madvise is under way (mmap_changing): the event comes, or was
 * read and the thread that waits for us has not run yet. */
#pragma once
#include "result.h"
#include <stdbool.h>

struct uffd_result {
	uint64_t done; /* bytes; may be more than 0 beside an error */
	int code;      /* 0: the whole range */
};

/* Negotiates all events and missing and minor faults on shmem; hugetlb and poison where the kernel has them. */
struct lr_error uffd_api(int uffd, bool *poison, bool *hugetlb);

/* Any VMAs that lie in [start, end), for missing and minor faults.
 * For write protection, too, where the kernel has it, though nothing is ever protected: collapse_pte_mapped_thp() (mm/khugepaged.c,
 * Linux 6.1 to 6.18; tried) leaves such VMAs alone. In others MADV_COLLAPSE maps a huge page of the file, without any fault,
 * also over pages that were dropped and not touched since: private memory that should read zero would show its old contents. */
struct lr_error uffd_register(int uffd, uint64_t start, uint64_t end);

struct lr_error uffd_unregister(int uffd, uint64_t start, uint64_t end);

struct uffd_result uffd_continue(int uffd, uint64_t start, uint64_t end);
struct uffd_result uffd_zero(int uffd, uint64_t start, uint64_t end);
struct uffd_result uffd_copy(int uffd, uint64_t start, uint64_t end, const void *source);
struct uffd_result uffd_poison(int uffd, uint64_t start, uint64_t end);

/* Threads that wait in the range try again. Cannot fail for a range that is one. */
void uffd_wake(int uffd, uint64_t start, uint64_t end);

/* A page that is never mapped: to ask whether calls are under way. */
#define NOWHERE (LR_ADDRESS_END - 2 * LR_PAGE)

/* Whether [start, end) lies in one VMA that is registered with this descriptor; changes nothing. */
enum probe { PROBE_REGISTERED, PROBE_NOT_ONE, PROBE_BUSY /* EAGAIN */, PROBE_GONE };
enum probe uffd_probe(int uffd, uint64_t start, uint64_t end);

/* Is fork, mremap, munmap or madvise under way, so that installs answer EAGAIN? */
bool uffd_changing(int uffd);

/* Is there still an address space behind this descriptor? */
bool uffd_alive(int uffd);
