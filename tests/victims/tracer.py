"""Traces a process until it is ended. usage: tracer.py PID READY_FILE"""

import ctypes
import signal
import sys
from pathlib import Path

PTRACE_SEIZE = 0x4206
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
if libc.ptrace(PTRACE_SEIZE, int(sys.argv[1]), None, None) < 0:
    sys.exit(f"ptrace: {ctypes.get_errno()}")
Path(sys.argv[2]).touch()
while True:
    signal.pause()
