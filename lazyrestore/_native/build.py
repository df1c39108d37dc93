"""The cffi builder of `lazyrestore._native._core`.

Our own headers are read as they are (their declarations are plain C); kernel constants are declared with `...`, so that
the compiler supplies every value.
"""

from __future__ import annotations

import re
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
HEADERS = ["executor.h", "spawn.h", "trace.h", "memory.h", "files.h", "features.h", "compress.h", "decompress.h"]
SOURCES = sorted(path.name for path in HERE.glob("*.c") if not path.name.startswith("_"))

SYSCALLS = """
    ioprio_get
    accept4 arch_prctl bind brk capset chdir chmod fchmodat chroot chown fchownat clone3 close close_range dup3
    epoll_create1 epoll_ctl eventfd2 execveat fcntl fchdir fchmod ftruncate futex getpid getresuid getrlimit gettid
    ioctl ioprio_set kill listen lseek madvise membarrier memfd_create mlock2 mlockall mmap modify_ldt mprotect mremap
    msync munmap
    openat personality pidfd_open pidfd_send_signal pipe2 ppoll prctl prlimit64 process_madvise pselect6 pwrite64 read
    restart_syscall rseq rt_sigaction rt_sigprocmask rt_sigqueueinfo rt_tgsigqueueinfo rt_sigtimedwait
    sched_setaffinity sched_setattr
    sendmsg set_robust_list set_tid_address setgroups setitimer getitimer setpgid setpriority setresgid setresuid setsid
    setsockopt sendto sigaltstack signalfd4 socket socketpair splice tee tgkill timer_create timer_delete timer_gettime
    timer_settime
    timerfd_create timerfd_settime umask unlinkat unshare userfaultfd vmsplice write writev setfsuid setfsgid
    io_getevents epoll_wait epoll_pwait epoll_pwait2 semop semtimedop nanosleep clock_nanosleep poll accept connect
    recvfrom recvmsg recvmmsg sendmmsg pause select mount wait4 exit exit_group mkdirat mknodat linkat symlinkat
    utimensat statx setdomainname sethostname setns flock shutdown readv preadv2 pwritev2 sendfile
"""

CONSTANTS = """
    PROT_NONE PROT_READ PROT_WRITE PROT_EXEC MAP_SHARED MAP_PRIVATE MAP_FIXED MAP_FIXED_NOREPLACE MAP_ANONYMOUS
    MAP_GROWSDOWN MAP_NORESERVE MAP_HUGETLB MAP_LOCKED MAP_STACK MREMAP_MAYMOVE MREMAP_FIXED MADV_DONTFORK MADV_DONTDUMP
    MADV_GUARD_INSTALL MADV_WIPEONFORK MADV_HUGEPAGE MADV_NOHUGEPAGE MADV_MERGEABLE MADV_SEQUENTIAL MADV_RANDOM
    MADV_POPULATE_READ MADV_POPULATE_WRITE
    MFD_CLOEXEC MFD_ALLOW_SEALING MFD_HUGETLB MFD_HUGE_SHIFT F_ADD_SEALS F_GET_SEALS F_GETPIPE_SZ F_SETPIPE_SZ
    F_DUPFD_CLOEXEC F_SETFD F_SETFL F_SETOWN_EX F_SETSIG FD_CLOEXEC O_CLOEXEC O_NONBLOCK O_PATH O_DIRECTORY O_TMPFILE
    O_NOFOLLOW O_LARGEFILE AT_FDCWD AT_EMPTY_PATH EFD_SEMAPHORE EFD_CLOEXEC EFD_NONBLOCK EPOLL_CTL_ADD EPOLL_CLOEXEC
    TFD_TIMER_ABSTIME TFD_TIMER_CANCEL_ON_SET TFD_CLOEXEC TFD_NONBLOCK SFD_CLOEXEC SFD_NONBLOCK SOCK_CLOEXEC
    SOCK_NONBLOCK PTRACE_O_TRACESYSGOOD PTRACE_O_EXITKILL PTRACE_O_TRACEEXIT PTRACE_O_TRACECLONE
    PTRACE_O_SUSPEND_SECCOMP PTRACE_EVENT_STOP CLONE_VM CLONE_FS
    CLONE_FILES CLONE_SIGHAND CLONE_PTRACE CLONE_THREAD CLONE_SYSVSEM CLONE_SETTLS CLONE_PARENT_SETTID
    CLONE_CHILD_CLEARTID CLONE_NEWPID CLONE_NEWNS CLONE_NEWNET PR_SET_MM PR_SET_MM_MAP PR_SET_MM_EXE_FILE PR_SET_NAME
    PR_SET_DUMPABLE PR_GET_DUMPABLE PR_SET_PDEATHSIG PR_GET_PDEATHSIG PR_SET_KEEPCAPS PR_GET_KEEPCAPS PR_SET_SECUREBITS
    PR_GET_SECUREBITS PR_SET_TIMERSLACK PR_GET_TIMERSLACK PR_SET_NO_NEW_PRIVS PR_CAPBSET_DROP PR_CAP_AMBIENT
    PR_CAP_AMBIENT_RAISE PR_CAP_AMBIENT_CLEAR_ALL PR_SET_CHILD_SUBREAPER PR_GET_CHILD_SUBREAPER
    PR_SET_MDWE PR_GET_MDWE PR_SET_MEMORY_MERGE PR_GET_MEMORY_MERGE
    PR_SET_THP_DISABLE PR_TIMER_CREATE_RESTORE_IDS PR_TIMER_CREATE_RESTORE_IDS_ON PR_TIMER_CREATE_RESTORE_IDS_OFF
    PR_GET_THP_DISABLE PR_GET_TID_ADDRESS PR_SET_VMA PR_SET_VMA_ANON_NAME PR_MCE_KILL_GET PR_GET_TSC PR_SET_TSC
    PR_SET_SPECULATION_CTRL ARCH_GET_XCOMP_PERM ARCH_REQ_XCOMP_PERM RLIMIT_NOFILE PRIO_PROCESS AT_NULL AT_SYSINFO_EHDR
    MCL_CURRENT
    MCL_FUTURE MCL_ONFAULT MLOCK_ONFAULT SIG_BLOCK SIG_SETMASK SA_RESTORER MS_REC MS_PRIVATE MS_NOSUID MS_NODEV MS_BIND
    MS_NOEXEC SIGTRAP SIGSTOP SIGKILL SIGCONT SO_BUF_LOCK SO_PEEK_OFF SO_SNDBUFFORCE SO_RCVBUFFORCE SO_PASSSEC
    SO_ATTACH_FILTER F_SEAL_FUTURE_WRITE F_SEAL_WRITE SIOCSIFFLAGS IFF_UP
"""


def declarations(header: str) -> str:
    """The declarations of one of our headers, without what cffi's parser does not take."""
    text = (HERE / header).read_text()
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    return "\n".join(line for line in text.splitlines() if not line.startswith("#"))


def names(text: str) -> list[str]:
    return sorted(set(text.split()))


PREAMBLE = """
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <elf.h>
#include <linux/futex.h>
#include <linux/if.h>
#include <linux/memfd.h>
#include <linux/prctl.h>
#include <linux/sched.h>
#include <linux/sockios.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <asm/prctl.h>
#include "abi.h"
#ifndef PR_GET_TID_ADDRESS
#define PR_GET_TID_ADDRESS 40
#endif
#ifndef PR_SET_MDWE /* 6.3 */
#define PR_SET_MDWE 65
#define PR_GET_MDWE 66
#endif
#ifndef PR_SET_MEMORY_MERGE /* 6.4 */
#define PR_SET_MEMORY_MERGE 67
#define PR_GET_MEMORY_MERGE 68
#endif
#ifndef PR_TIMER_CREATE_RESTORE_IDS /* 6.15 */
#define PR_TIMER_CREATE_RESTORE_IDS 77
#define PR_TIMER_CREATE_RESTORE_IDS_OFF 0
#define PR_TIMER_CREATE_RESTORE_IDS_ON 1
#endif
#ifndef SA_RESTORER
#define SA_RESTORER 0x04000000
#endif
#ifndef TFD_TIMER_CANCEL_ON_SET
#define TFD_TIMER_CANCEL_ON_SET (1 << 1)
#endif
"""

ffibuilder = FFI()
present = [header for header in HEADERS if (HERE / header).exists()]
ffibuilder.cdef("\n".join(declarations(header) for header in present))
ffibuilder.cdef("\n".join(f"#define SYS_{name} ..." for name in names(SYSCALLS)))
ffibuilder.cdef("\n".join(f"#define {name} ..." for name in names(CONSTANTS)))
ffibuilder.set_source(
    "lazyrestore._native._core",
    PREAMBLE + "\n".join(f'#include "{header}"' for header in present),
    sources=[f"lazyrestore/_native/{source}" for source in SOURCES],
    depends=[f"lazyrestore/_native/{header.relative_to(HERE)}" for header in HERE.rglob("*.h")],
    libraries=["zstd"],
    extra_compile_args=[
        "-iquote",
        "lazyrestore/_native",
        "-std=gnu11",
        "-O2",
        "-Wall",
        "-Wextra",
        "-Wno-unused-parameter",
        "-Wno-missing-field-initializers",
        "-pthread",
    ],
)
