"""Which processes can be parked without noticing it.

Facts. A stopped process goes on with SIGCONT, which the kernel acts upon while it is being sent. It then discards the
signal if its action is the default one or to ignore it, and it is not blocked in the main thread; otherwise it is
queued, and a handler runs, or sigwait(), a signalfd or sigpending() shows it. SIGCONT also removes stop signals that
are pending, SIGSTOP removes a pending SIGCONT (kernel/signal.c, prepare_signal()).

Choice. A snapshot that would see one of these is refused. Parking under ptrace would show nothing to any process, but
needs a thread of ours per parked clone, which alone can let it go: two thread switches per hand-out.

Cost. Time passes for a parked clone as for a process that is not scheduled: its timers run.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from lazyrestore.errors import RestoreError

if TYPE_CHECKING:
    from lazyrestore.manifest import Manifest

SIGCONT, STOPPING = 18, (20, 21, 22)  # SIGTSTP, SIGTTIN, SIGTTOU
_PLAIN = (0, 1)  # SIG_DFL, SIG_IGN


def check(name: str, manifest: Manifest) -> None:
    """RestoreError if a process of this snapshot would see that it was parked."""
    if reason := _trace(manifest):
        raise RestoreError(f"snapshot {name}", "park", reason, "restore() it when it is needed instead")


def _trace(manifest: Manifest) -> str:
    action = manifest.signals.actions.get(SIGCONT)
    if action is not None and struct.unpack_from("<Q", action)[0] not in _PLAIN:
        return "the process handles SIGCONT, by which a parked one goes on"
    if manifest.threads[0].signal_mask >> (SIGCONT - 1) & 1:
        return "the process blocks SIGCONT, by which a parked one goes on"
    pending = [*manifest.signals.pending, *(info for thread in manifest.threads for info in thread.pending)]
    if any(struct.unpack_from("<i", info)[0] in (SIGCONT, *STOPPING) for info in pending):
        return "a job control signal is pending, which going on would discard"
    if manifest.attributes.stopped:
        return "the process is stopped"
    return ""
