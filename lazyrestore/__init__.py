"""lazyrestore: snapshot a running Linux process into a compressed memory image; restore it lazily, in milliseconds.

    import lazyrestore

    with lazyrestore.Store.open("/var/lib/snapshots") as store:
        snapshot = store.snapshot(pid, name="worker", kill=True)
        process = snapshot.restore()  # like subprocess.Popen
        process.wait()

Importing the package costs next to nothing; its parts are imported when they are first used.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as typing has it, whose import takes half as long as all that `import lazyrestore` does

if TYPE_CHECKING:
    from typing import Any

    from lazyrestore.api import RestoredProcess, Snapshot, Store
    from lazyrestore.errors import LazyrestoreError

__version__ = "0.1.0"
__all__ = ["LazyrestoreError", "RestoredProcess", "Snapshot", "Store", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("RestoredProcess", "Snapshot", "Store"):
        from lazyrestore import api

        return getattr(api, name)
    if name == "LazyrestoreError":
        from lazyrestore.errors import LazyrestoreError

        return LazyrestoreError
    raise AttributeError(f"module 'lazyrestore' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
