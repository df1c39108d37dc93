"""Finding a snapshot's pager on this host, or starting one.

Facts: two restorers may start at the same moment, and a pager may be about to exit for want of work. Choice: whoever
connects, starts, or exits does so under flock(2) of one lock file per snapshot; so a pager that was reached cannot have
decided to leave. flock belongs to the open file description: the pager gets one of its own, never the restorer's. The
pager is spawned as vfork does (os.posix_spawn), so its start costs the same from any caller and is safe with threads,
and it inherits just the descriptors named on its command line. It needs about 2 ms to start, but its socket takes
connections before it runs: so whoever starts it connects at once, lets go of the lock, and waits for the answer only
when there is nothing else left to do. Cost: what a pager says that cannot start is in its log only.

A pager's keeper finds what is to die with it in /proc, which shows its own PID namespace and those below, and when that
namespace ends both die in one instant. So there is a pager per PID namespace: its processes are in it or below.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from _blake2 import blake2b  # hashlib's own, without OpenSSL, which takes 3 ms to load
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, Self

from ..errors import PagerError
from ..kernel import cpu_latency
from . import wire
from .client import PagerClient, PagerGone, PagerStats

PAGERD = os.path.join(os.path.dirname(os.path.dirname(os.path.realpath(__file__))), "_native", "pagerd")
StrPath = str | os.PathLike[str]  # results are str: pathlib takes 4 ms to import, longer than most restores
_SOCKET = ".sock"
_ELSEWHERE = "set XDG_RUNTIME_DIR to a short path that is yours"
_PATIENCE = 5.0
_LONGEST_PATH = 107  # sockaddr_un.sun_path without its zero byte


class StoredImage(Protocol):
    """What the pager must know of a stored snapshot; the descriptors stay the owner's."""

    @property
    def key(self) -> str:
        """Names the snapshot on this host: the store's path and the snapshot's id."""

    @property
    def name(self) -> str:
        """For log lines and errors."""

    @property
    def data_fd(self) -> int:
        """LMDB's data file, open for reading."""

    @property
    def pin_fd(self) -> int:
        """Held open by the pager as long as it may need the packs."""

    @property
    def pin_at(self) -> int:
        """The byte of its file that is not 0 once the snapshot was removed while it was in use."""

    @property
    def index_offset(self) -> int:
        """Bytes into the data file."""

    @property
    def n_chunks(self) -> int: ...

    @property
    def sums(self) -> bool:
        """Whether the index is followed by a CRC-32 of each INDEX_BLOCK of its entries."""

    @property
    def packs(self) -> Sequence[tuple[int, int]]:
        """(offset into the data file, length), bytes."""

    @property
    def working_set(self) -> bytes:
        """struct lr_touched each, in the order of first touch; empty if none was recorded."""

    @property
    def frames(self) -> bytes:
        """struct lr_frame each, of the working set's pack; empty if there is none."""

    @property
    def frames_offset(self) -> int:
        """Bytes into the data file, of the first frame."""

    @property
    def recorder(self) -> Sequence[str]:
        """The command that asks a pager for a recorded working set and stores it; the pager's socket is added as its
        last word, or "-": the pager has ended and its snapshot was removed, so that is to be freed. Empty: none."""

    @property
    def hugetlb(self) -> bool:
        """Whether the snapshot has hugetlb memory."""


def runtime_directory() -> str:
    """The private directory for sockets, locks and the pagers' log; made if it is missing.

    $XDG_RUNTIME_DIR/lazyrestore, else /run/lazyrestore (root), /run/user/UID/lazyrestore, or one in the temporary
    directory. Raises PagerError if it belongs to somebody else or others may enter it.
    """
    uid = os.geteuid()
    if base := os.environ.get("XDG_RUNTIME_DIR"):
        path = os.path.join(base, "lazyrestore")
    elif uid == 0:
        path = "/run/lazyrestore"
    elif os.access(f"/run/user/{uid}", os.W_OK):
        path = f"/run/user/{uid}/lazyrestore"
    else:
        path = os.path.join(os.environ.get("TMPDIR", "/tmp"), f"lazyrestore-{uid}")
    _make_private(path)
    return path


def _make_private(path: StrPath) -> None:
    try:
        try:
            about = os.lstat(path)
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, 0o700)
            about = os.lstat(path)
    except OSError as error:
        raise PagerError(f"run-time directory {path}", "mkdir", advice=_ELSEWHERE, errno=error.errno) from error
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & 0o077:
        raise PagerError(
            f"run-time directory {path}", "check", "not a private directory of ours", f"remove it, or {_ELSEWHERE}"
        )


class Connecting:
    """A connection to a pager that may not have answered yet. One thread; `close()` it, or leave it as a context.

    template: the template's memory file, if the pager is being started by us: it can be mapped before the pager
    answers, but not touched; else -1. Valid until answered() or close().
    """

    def __init__(self, image: StoredImage, directory: str, linger_ms: int) -> None:
        self._image, self._directory, self._linger_ms = image, directory, linger_ms
        self._path, self._name = _socket_path(directory, image.key), f"pager of {image.name}"
        self._started = False
        self._starter = 0  # the child that starts the pager, until it is collected
        self._connection: socket.socket | None = None
        self.template = -1
        with _locked(self._path):
            try:
                self._connection = _dial(self._path)
            except (FileNotFoundError, ConnectionRefusedError):
                self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def answered(self) -> PagerClient:
        """The pager, once it answers; called once. Raises PagerError."""
        try:
            return self._client()
        except PagerGone as error:
            if self._started:
                raise self._ended_at_once(error) from error
        with _locked(self._path):  # it was killed as we came: there is another one by now, or we start it
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError, PagerGone):
                return _connect(self._path, self._name)
            self._start()
        try:
            return self._client()
        except PagerGone as error:
            raise self._ended_at_once(error) from error

    def close(self) -> None:
        """Let go of what was not handed out. Called once more if an interrupt comes as one of these calls returns."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        template, self.template = self.template, -1
        if template >= 0:
            os.close(template)
        if self._starter:
            with contextlib.suppress(ChildProcessError):  # somebody else's waitpid(-1) was faster
                os.waitpid(self._starter, 0)
            self._starter = 0

    def _client(self) -> PagerClient:
        connection, self._connection = self._connection, None
        assert connection is not None
        try:
            return PagerClient(connection, self._name)
        finally:
            self.close()

    def _start(self) -> None:
        try:
            self.template = os.memfd_create("lazyrestore", os.MFD_CLOEXEC)
            self._starter = _start(self._image, self._directory, self._path, self._linger_ms, self.template)
        except PagerError:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise PagerError(self._name, "start", advice=self._advice(), errno=error.errno) from error
        self._started = True
        try:
            self._connection = _dial(self._path)
        except OSError as error:
            self.close()
            if isinstance(error, FileNotFoundError | ConnectionRefusedError):
                raise self._ended_at_once(error) from error
            raise PagerError(self._name, "connect", errno=error.errno) from error

    def _ended_at_once(self, error: OSError | PagerError) -> PagerError:
        return PagerError(self._name, "start", "it ended at once", self._advice(), errno=error.errno)

    def _advice(self) -> str:
        from resource import RLIM_INFINITY, RLIMIT_FSIZE, getrlimit

        if getrlimit(RLIMIT_FSIZE)[0] != RLIM_INFINITY:  # it counts for memory files too
            return "raise the limit on file sizes: ulimit -f unlimited"
        return f"see {_log(self._directory)}"


def begin(image: StoredImage, *, runtime_dir: StrPath | None = None, linger_ms: int = 2000) -> Connecting:
    """Find the pager of `image` or start it, without waiting for its answer; it outlives the caller.

    linger_ms: how long a pager started here stays without address spaces and connections. Raises PagerError.
    """
    return Connecting(image, _directory(runtime_dir), linger_ms)


def connect_or_start(image: StoredImage, *, runtime_dir: StrPath | None = None, linger_ms: int = 2000) -> PagerClient:
    """begin(), and its answer."""
    with begin(image, runtime_dir=runtime_dir, linger_ms=linger_ms) as connecting:
        return connecting.answered()


def connect_existing(key: str, name: str, *, runtime_dir: StrPath | None = None) -> PagerClient | None:
    """The running pager of the snapshot `key`; None if there is none."""
    path = _socket_path(_directory(runtime_dir), key)
    with _locked(path):
        try:
            return _connect(path, f"pager of {name}")
        except (FileNotFoundError, ConnectionRefusedError, PagerGone):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(_lock_path(path))  # made by asking
            return None


def stats_of(key: str, name: str, *, runtime_dir: StrPath | None = None) -> PagerStats | None:
    """What the pager of that image counted; None: there is none. Raises PagerError, PagerGone."""
    client = connect_existing(key, name, runtime_dir=runtime_dir)
    if client is None:
        return None
    with client:
        return client.stats()


def connect_all(
    *, runtime_dir: StrPath | None = None, patience: float = _PATIENCE
) -> Iterator[tuple[str, PagerClient]]:
    """Every running pager of this user, with its socket's path; the caller closes the clients.

    patience: seconds after which one that does not answer is passed over: it has died, and a debugger holds one of the
    processes that end with it, or it is stopped.
    """
    for path in _sockets(_directory(runtime_dir)):
        with _locked(path):
            try:
                client = _connect(path, f"pager {os.path.basename(path).removesuffix(_SOCKET)}", patience)
            except (FileNotFoundError, ConnectionRefusedError, PagerGone):
                continue
            except PagerError as error:
                if error.errno != errno.EPROTO:  # one of another version of lazyrestore
                    raise
                continue
        yield path, client


def running(keys: Iterable[str], *, runtime_dir: StrPath | None = None) -> list[str]:
    """Those of the keys that a pager, which may have ended, was started for."""
    directory = _directory(runtime_dir)
    sockets = set(_sockets(directory))
    return [key for key in keys if sockets and _socket_path(directory, key) in sockets]


def socket_path(key: str, *, runtime_dir: StrPath | None = None) -> str:
    """Where the pager of the snapshot `key` listens."""
    return _socket_path(_directory(runtime_dir), key)


def _sockets(directory: str) -> list[str]:
    return [os.path.join(directory, name) for name in sorted(os.listdir(directory)) if name.endswith(_SOCKET)]


def _directory(given: StrPath | None) -> str:
    if given is None:
        return runtime_directory()
    _make_private(given)
    return os.path.realpath(given)


def _socket_path(directory: StrPath, key: str) -> str:
    whose = f"{wire.VERSION} {_pid_namespace()} {key}"
    path = os.path.join(directory, blake2b(whose.encode(), digest_size=8).hexdigest() + _SOCKET)
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise PagerError(
            f"run-time directory {directory}", "socket", "path too long", _ELSEWHERE, errno=errno.ENAMETOOLONG
        )
    return path


def _pid_namespace() -> int:
    """Its number; 0 where /proc shows another one than ours, in which nothing is restored."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def _lock_path(path: str) -> str:
    return path.removesuffix(_SOCKET) + ".lock"


def _log(directory: str) -> str:
    return os.path.join(directory, "pager.log")


def _open_lock(path: str) -> int:
    return os.open(_lock_path(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    """The lock of the socket at `path`. A pager that leaves removes the file, so it is looked at again once locked."""
    while True:
        lock = _open_lock(path)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _is_at(lock, _lock_path(path)):
                yield
                return
        finally:
            os.close(lock)


def _is_at(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _connect(path: str, name: str, patience: float | None = None) -> PagerClient:
    connection = _dial(path)
    connection.settimeout(patience)
    client = PagerClient(connection, name)
    connection.settimeout(None)
    return client


def _dial(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(path)
    except BaseException:
        connection.close()
        raise
    return connection


def _image_memfd(image: StoredImage) -> int:
    flags = (wire.IMAGE_HUGETLB if image.hugetlb else 0) | (wire.IMAGE_SUMS if image.sums else 0)
    name = image.name.encode()[:95]
    header = wire.IMAGE.pack(
        wire.IMAGE_MAGIC,
        wire.VERSION,
        flags,
        len(image.packs),
        image.index_offset,
        image.n_chunks,
        len(image.working_set) // wire.TOUCHED.size,
        len(image.frames) // wire.FRAME.size,
        image.frames_offset,
        name,
    )
    memfd = os.memfd_create("lazyrestore-image", os.MFD_CLOEXEC)
    with os.fdopen(memfd, "wb", closefd=False) as file:
        file.write(header)
        file.writelines(wire.PACK.pack(offset, length) for offset, length in image.packs)
        file.write(image.working_set)
        file.write(image.frames)
    return memfd


def _start(image: StoredImage, directory: str, path: str, linger_ms: int, template: int) -> int:
    """Returns the process id of the child that starts the pager and ends; it is to be collected."""
    with contextlib.ExitStack() as stack:

        def owned(fd: int) -> int:
            stack.callback(os.close, fd)
            return fd

        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        listener.bind(path)
        listener.listen(128)
        log_flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        fds = {
            "--listen": listener.fileno(),
            "--data": image.data_fd,
            "--pin": image.pin_fd,
            "--lock": owned(_open_lock(path)),
            "--log": owned(os.open(_log(directory), log_flags, 0o600)),
            "--image": owned(_image_memfd(image)),
            "--template": template,
        }
        # posix_spawn's dup2 onto itself makes a descriptor inheritable in the child only. The pager refuses 0 to 2.
        duplicates = {k: owned(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)) for k, fd in fds.items() if fd < 3}
        fds |= duplicates
        arguments = [word for key, fd in fds.items() for word in (key, str(fd))]
        numbers = ["--linger", str(linger_ms), "--pin-at", str(image.pin_at), "--awake", str(int(cpu_latency.wanted()))]
        recorder = ["--", *image.recorder, os.fspath(path)] if image.recorder else []
        try:
            return os.posix_spawn(
                os.fspath(PAGERD),
                ["pagerd", *arguments, *numbers, *recorder],
                {},
                file_actions=[(os.POSIX_SPAWN_DUP2, fd, fd) for fd in fds.values()],
            )
        except OSError as error:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            raise PagerError(f"pager of {image.name}", f"posix_spawn {PAGERD}", errno=error.errno) from error
