"""epoll: an interest list.

Facts. An entry is keyed by the file and the number it had when it was added; it stays while any descriptor of that
file is open anywhere, even when the number is closed or means another file by now. fdinfo tells number, events, data
and the file's inode; kcmp(KCMP_EPOLL_TFD) tells whether a descriptor is that very file (anonymous inodes all share
one). A one-shot entry that has fired shows no events but its flags.

Consequence. An entry whose number no longer means its file cannot be added again: refused. All others are added when
every descriptor has its final number. A pending readiness is found again by the kernel when an entry is added.

Choice. Which entries those are is decided once the process stands still. A server closes connections between the look
at its epoll and the one at their numbers. Of a running process, what two looks find (descriptors.lasting_complaints)
is believed where inodes tell: of sockets, pipes and terminals.

Cost. What is refused for an entry of an eventfd, a timerfd and the like has been frozen for a moment. An edge-triggered
entry may report an edge once more that was already reported, which epoll(7) permits; a fired one-shot entry may report
EPOLLERR or EPOLLHUP, which the kernel always adds.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

import msgspec

from lazyrestore._native import _core
from lazyrestore.resources.descriptor import Build, Item, Unsupported, View

if TYPE_CHECKING:
    from lazyrestore.kernel import fdinfo

lib = _core.lib

_EVENT = struct.Struct("=IQ")  # struct epoll_event, packed on x86-64


class Target(msgspec.Struct, frozen=True):
    number: int
    events: int
    data: int


class Epoll(msgspec.Struct, frozen=True, tag="epoll"):
    flags: int
    targets: tuple[Target, ...]


def describe(record: Epoll) -> str:
    return "epoll"


def capture(view: View) -> Epoll | None:
    if view.link != b"anon_inode:[eventpoll]":
        return None
    from lazyrestore.kernel import fdinfo

    targets = sorted(fdinfo.targets(view.info.rest))  # the kernel's order is that of addresses
    if targets:
        _check(targets, view)
    return Epoll(view.flags, tuple(Target(target.number, target.events, target.data) for target in targets))


def _check(targets: list[fdinfo.Target], view: View) -> None:
    """Refuse entries for closed files. Unsupported: of a running process only for the moment."""
    from lazyrestore.kernel import libc

    frozen = view.survey.contents
    seen: set[int] = set()
    for target in targets:
        file = os.makedev(target.device >> 20, target.device & 0xFFFFF), target.inode
        if not frozen and file == view.identity:
            continue
        same = view.survey.objects.get(target.number) == file and target.number not in seen
        if not same or (
            frozen and not libc.epoll_watches(view.survey.pid, target.number, view.numbers[0], target.number)
        ):
            which = f"descriptor {target.number} (inode {target.inode})"
            raise Unsupported(f"it still watches a closed file that was {which}")
        seen.add(target.number)


def restore(items: list[Item[Epoll]], build: Build) -> None:
    for item in items:
        with build.serving(item):
            number = build.create(item, lib.SYS_epoll_create1, lib.EPOLL_CLOEXEC)
            if item.record.flags & os.O_NONBLOCK:
                build.ops.call(lib.SYS_fcntl, number, lib.F_SETFL, item.record.flags)
        build.settled.append(lambda item=item: _watch(item, build))  # type: ignore[misc]


def _watch(item: Item[Epoll], build: Build) -> None:
    targets = item.record.targets
    if not targets:
        return
    events = build.place(b"".join(_EVENT.pack(target.events, target.data) for target in targets))
    with build.serving(item):
        for position, target in enumerate(targets):
            event = events + position * _EVENT.size
            note = f"fd {target.number}: {target.events:#x}"
            build.ops.call(lib.SYS_epoll_ctl, item.numbers[0], lib.EPOLL_CTL_ADD, target.number, event, note=note)
