"""A traced thread that is killed at the very moment when it is let go: who traces it hears of it, and does not wait."""

from __future__ import annotations

import subprocess
import sys

import pytest
from helpers import GUARD_SECONDS

# In a process of its own: it must be the tracer, and hangs if the kill is missed. The victim's second thread is traced,
# too, and not collected: so the end of the leader is told to nobody.
TRACER = """
import os, signal, subprocess, sys
from lazyrestore._native import _core
lib, ffi = _core.lib, _core.ffi
code = "from threading import *; Thread(target=Event().wait).start(); print(flush=True); Event().wait()"
victim = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
victim.stdout.readline()
tids = sorted(map(int, os.listdir(f"/proc/{victim.pid}/task")))
status, registers, mask = ffi.new("int32_t *"), ffi.new("struct lr_registers *"), ffi.new("uint64_t *")
options = lib.PTRACE_O_EXITKILL | lib.PTRACE_O_TRACESYSGOOD | lib.PTRACE_O_TRACEEXIT
for tid in tids:
    assert lib.lr_stop_thread(tid, options, ffi.NULL, 0, 0, 1000, registers, mask) > 0
os.kill(victim.pid, signal.SIGKILL)
for tid in tids:  # the stop that each of them makes before it ends
    while os.waitid(os.P_PID, tid, os.WSTOPPED | os.WNOWAIT | 0x40000000).si_status >> 8 != 6:
        pass
how = sys.argv[1]
if how == "call":
    print(lib.lr_syscall_stop(victim.pid, status))
else:
    index, why, result = ffi.new("uint64_t *"), ffi.new("uint64_t *"), ffi.new("int64_t *")
    print(lib.lr_next_stop(victim.pid, 1, status, index, why, result, ffi.NULL, 0), status[0] >> 16)
"""


@pytest.mark.requires("root")
@pytest.mark.parametrize(("how", "answer"), [("call", "-3\n"), ("program", "-3 6\n")])
def test_the_end_of_a_leader_is_noticed(how: str, answer: str) -> None:
    """-ESRCH, and PTRACE_EVENT_EXIT."""
    tracer = subprocess.run(
        [sys.executable, "-c", TRACER, how], capture_output=True, text=True, check=False, timeout=GUARD_SECONDS
    )
    assert (tracer.stdout, tracer.stderr) == (answer, "")
