"""Compiling a manifest to a restore program: the order in which a new process becomes the old one.

The order, and why. The new process's own vdso goes aside and everything else is unmapped, so that every address is
free. All VMAs are mapped before the exe link is set (the old executable must be unmapped by then). Descriptors and
paths come before the root and working directory change. userfaultfd comes next, then a stop: the tracer hands it to the
pager and writes what must be there at once. Only then may anything touch lazy memory, so threads, robust lists and rseq
(which the kernel writes to) come after. Limits and credentials are last: before, we need the privileges.
"""

from __future__ import annotations

import os
import resource
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

from lazyrestore import network_namespace, own_pages, pid_namespace
from lazyrestore.kernel import procfs
from lazyrestore.kernel.tracee import HOLE_GAP, find_hole
from lazyrestore.manifest import Manifest
from lazyrestore.pager.client import BACKING_HUGETLB, BACKING_SHARED, BACKING_TEMPLATE, Range, pack_ranges
from lazyrestore.program import Descriptors, KernelMapping, Program, lib
from lazyrestore.resources import attributes, descriptors, posix_timers, signals, threads, vma
from lazyrestore.resources.attributes import Credentials
from lazyrestore.resources.descriptor import RestoreContext
from lazyrestore.restore_options import AS_IT_WAS, Options
from lazyrestore.restore_plan import (
    NOTHING,
    OPEN_SHARE,
    SIGNATURE,
    UNKNOWN,
    Ahead,
    Compiled,
    Layout,
    MappedFiles,
    RestorePlan,
    ThreadState,
    Written,
)

TASK_END = 0x7FFF_FFFF_F000  # the end of user space with four-level page tables
FIRST_HIGH = 1000  # handed-over descriptors start here, or lower if the limit is low, or above the snapshot's highest
ROOM_ABOVE = 16  # numbers above the handed-over ones, for descriptors that are moved out of the way
MOST_FILES = 128  # that are handed over open


def compile_for(
    manifest: Manifest,
    options: Options = AS_IT_WAS,
    ahead: Ahead = NOTHING,
    layout: Layout | None = None,
) -> tuple[Program, Compiled]:
    """compile_program() for a process that the calling one starts."""
    own = attributes.credentials_of(os.getpid(), threading.get_native_id())
    layout = layout or layout_for(manifest, 0, options.inherited_numbers)
    return compile_program(manifest, layout, own, options, ahead)


def make_plan(
    manifest: Manifest,
    options: Options = AS_IT_WAS,
    ahead: Ahead = NOTHING,
    minimum: int = 0,
    *,
    open_files: bool = True,
) -> RestorePlan:
    """All that a restore with these options by the calling process needs; handed-over descriptors get numbers from
    `minimum` on. open_files: hand over mapped files, too. Raises RestoreError if a kind refuses."""
    layout = layout_for(manifest, minimum, options.inherited_numbers, open_files=open_files)
    _, compiled = compile_for(manifest, options, ahead, layout)
    about, table = manifest.attributes, manifest.descriptors
    return RestorePlan(
        pid=manifest.pid,
        session=1 if about.session_leader else 2 if about.group_leader else 0,
        stopped=about.stopped,
        oom_score_adjust=about.oom_score_adjust,
        core_dump_filter=about.core_dump_filter,
        host=manifest.host,
        compiled=compiled,
        threads=[
            ThreadState(t.tid, t.registers, t.xstate, t.signal_mask, threads.futex_words(t)) for t in manifest.threads
        ],
        shared=[vma.memory_file(shared) for shared in manifest.shared],
        ranges=pack_ranges(_ranges(manifest)),
        contents=[
            Written(v.label, start, end, v.kind in ("file", "shared"))
            for v in manifest.vmas
            for start, end in v.written
        ],
        folders=[about.cwd, about.root],
        files=_mapped_files(manifest.files),
        opened=descriptors.opened_paths(table),
        addresses=descriptors.addresses(table, options.inherited_numbers, own_network=options.new_net),
        reusable=descriptors.is_reusable(table),
    )


def _mapped_files(files: Sequence[vma.FileIdentity]) -> MappedFiles:
    paths = b"".join(os.fsencode(file.path) + b"\0" for file in files)
    signatures = b"".join(SIGNATURE.pack(*file.seen) if file.seen else UNKNOWN for file in files)
    return MappedFiles(len(files), paths, signatures, any(file.content is not None for file in files))


def _ranges(manifest: Manifest) -> Iterator[Range]:
    """What the pager serves of the address space."""
    for v in manifest.vmas:
        if v.kind == "lazy":
            yield Range(v.start, v.end, v.start, BACKING_TEMPLATE)
        elif v.kind == "hugetlb":
            yield Range(v.start, v.end, v.start, BACKING_HUGETLB)
        elif v.kind == "shared" and manifest.shared[v.shared_object].anonymous:
            image = manifest.shared[v.shared_object].image + v.offset
            yield Range(v.start, v.end, image, BACKING_SHARED + v.shared_object)


def layout_for(
    manifest: Manifest, minimum: int = 0, inherited: Sequence[int] = (), *, open_files: bool = True
) -> Layout:
    """Where handed-over descriptors go: above the snapshot's own numbers and not below `minimum`."""
    highest = max((descriptor.number for descriptor in manifest.descriptors.descriptors), default=0)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        hard = sys.maxsize
    most = min(MOST_FILES, hard // OPEN_SHARE) if open_files else 0
    files = vma.read_only_files(manifest.vmas, manifest.files)[:most]
    count = 6 + len(manifest.shared) + len(inherited) + len(files)
    fits = hard - count - ROOM_ABOVE
    base = max(min(FIRST_HIGH, fits), highest + 1, minimum)
    numbers = iter(range(base + 3, base + count))
    return Layout(
        base,
        base + 1,
        base + 2,
        streams={stream: next(numbers) for stream in range(3)},
        shared={number: next(numbers) for number in range(len(manifest.shared))},
        inherited={number: next(numbers) for number in inherited},
        files={number: next(numbers) for number in files},
    )


def compile_program(
    manifest: Manifest,
    layout: Layout,
    own: Credentials,
    options: Options = AS_IT_WAS,
    ahead: Ahead = NOTHING,
) -> tuple[Program, Compiled]:
    """The program that turns a fresh process into the snapshot's. Raises RestoreError if a kind refuses.

    ahead.own: lazy memory that is in the template.
    In a PID namespace of its own it gets a mount namespace with a /proc that shows it.
    """
    program = Program()
    ops = program.add_list()
    fds = Descriptors(ops, range(layout.program, layout.end), layout.end)
    mappings = _as_mappings(manifest)
    # The layout of addresses must be known before the size is: leave room generously, and check below.
    kernel_length = sum(length for _, _, length in manifest.host.vdso)
    contents = descriptors.queued_bytes(manifest.descriptors)
    room = (4 << 20) + 4096 * (len(manifest.threads) + len(manifest.vmas) + contents // 4096) + kernel_length
    base = find_hole(mappings, room)
    aside = base + room - kernel_length

    if options.new_net:
        network_namespace.enter_new(program, ops, fds)
    if options.new_pid:
        pid_namespace.own_mounts(program, ops, options.mounts)
    moves = lib.MREMAP_MAYMOVE | lib.MREMAP_FIXED
    with ops.serving("vdso"):
        at = aside
        for number, (name, _, length) in enumerate(manifest.host.vdso):
            ops.call_expecting(at, lib.SYS_mremap, KernelMapping(number), length, length, moves, at, note=name)
            at += length
    with ops.serving("old address space"):
        ops.call(lib.SYS_munmap, 0, base)
        ops.call(lib.SYS_munmap, base + room, TASK_END - base - room)
    # Before all else: mremap wants room for three mappings more, and the old process may have had all there can be.
    with ops.serving("vdso"):
        at = aside
        for name, start, length in manifest.host.vdso:
            ops.call_expecting(start, lib.SYS_mremap, at, length, length, moves, start, note=name)
            at += length
    handed = vma.Handed(layout.template, layout.hugetlb, layout.shared, layout.files)
    vma.restore(manifest.vmas, manifest.files, program, ops, fds, handed)
    attributes.restore_memory(manifest.attributes, program, ops, fds)
    context = RestoreContext(
        layout.streams, _shared_lookup(manifest, layout), manifest.attributes.cwd, layout.inherited
    )
    descriptors.compile(manifest.descriptors, ops, fds, context)
    attributes.restore_place(manifest.attributes, program, ops)
    attributes.restore_membarriers(manifest.attributes, ops)
    signals.restore(manifest.signals, program, ops)

    with ops.serving("lazy memory"):
        own_pages.restore(ahead, manifest.pid, program, ops, fds)
        # It gets a number that is free now and is closed before the process runs.
        userfaultfd = fds.create(lib.SYS_userfaultfd, os.O_CLOEXEC | os.O_NONBLOCK)
        ops.stop("the tracer hands the userfaultfd to the pager")
        fds.close(userfaultfd)
    with ops.serving("handed-over descriptors"):
        ops.call(lib.SYS_close_range, layout.program, (1 << 32) - 1, 0)

    leader, *others = manifest.threads
    lists = [program.add_list() for _ in others]
    for thread, own_ops in zip(others, lists, strict=True):
        threads.restore_start(thread, program, ops, own_ops)
    for thread, own_ops in [*zip(others, lists, strict=True), (leader, ops)]:
        threads.restore_own(thread, program, own_ops, leader=thread is leader)
    signals.restore_queue_and_timers(manifest.signals, manifest.pid, program, ops)
    posix_timers.restore(manifest.posix_timers, program, ops)
    attributes.restore_flags(manifest.attributes, program, ops)
    for thread, own_ops in [*zip(others, lists, strict=True), (leader, ops)]:
        attributes.restore_credentials(manifest.attributes, own, program, own_ops)
        threads.restore_pending(thread, manifest.pid, program, own_ops)
    descriptors.listen_again(manifest.descriptors, ops, layout.inherited)
    attributes.restore_after_credentials(manifest.attributes, ops)

    trap = manifest.signals.actions.get(lib.SIGTRAP)
    trap_pointer = program.place(trap) if trap else None
    linked = program.link(base)
    if len(linked.image) > room - kernel_length:
        raise AssertionError("the program outgrew its room")
    trap_action = linked.data + trap_pointer.offset if trap_pointer else 0
    return program, Compiled(linked, layout, userfaultfd, base + room, trap_action)


def _shared_lookup(manifest: Manifest, layout: Layout) -> Callable[[int, int], int | None]:
    numbers = {shared.key: layout.shared[index] for index, shared in enumerate(manifest.shared)}
    return lambda device, inode: numbers.get((device, inode))


def _as_mappings(manifest: Manifest) -> list[procfs.Mapping]:
    """The manifest's VMAs in the form that find_hole() takes.

    The space around the stack is kept free for it to grow.
    """
    limit = min(1 << 30, 256 * HOLE_GAP)
    return [
        procfs.Mapping(v.start - (limit if v.grows_down else 0), v.end, False, False, False, False, 0, "", 0, "", False)
        for v in manifest.vmas
    ]
