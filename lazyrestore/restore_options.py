"""How one restore differs from putting the process back where it was."""

from __future__ import annotations

import msgspec


class Options(msgspec.Struct, frozen=True):
    """new_pid, new_net: in a PID namespace, a network namespace of its own.

    inherited: (number of a listening socket in the process, descriptor of the caller that takes its place), sorted.
    parked: stopped before its first instruction, with new_pid only; SIGCONT lets it run. ends_with_caller: it is killed
    when the thread that restored it ends, with new_pid only. held: so it is until that thread lets it go. record: the
    working set, None: if none is known. fill: bring all private memory: "none", "idle" (when the CPUs have nothing else
    to do) or "now". mounts: with new_pid, (path, path that it is mounted over), in the mount namespace that comes with
    the PID namespace.
    """

    new_pid: bool = False
    new_net: bool = False
    inherited: tuple[tuple[int, int], ...] = ()
    parked: bool = False
    ends_with_caller: bool = False
    held: bool = False
    record: bool | None = None
    fill: str = "none"
    mounts: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.fill not in ("none", "idle", "now"):
            raise ValueError(f'fill={self.fill!r}: must be "none", "idle" or "now"')
        if (self.ends_with_caller or self.held) and not self.new_pid:
            raise ValueError("ends_with_caller and held want new_pid")

    @property
    def inherited_numbers(self) -> tuple[int, ...]:
        return tuple(number for number, _ in self.inherited)

    @property
    def shape(self) -> tuple[object, ...]:
        """What the restore program depends on."""
        return self.new_pid, self.new_net, self.inherited_numbers, self.mounts, self.parked


AS_IT_WAS = Options()
