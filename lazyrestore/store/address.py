"""Where a buffer's bytes are in this process."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import _cffi_backend

_ffi = _cffi_backend.FFI()


def address_of(view: memoryview | bytes) -> int:
    """The address of the first byte, whether it may be written or not; 0 for an empty buffer."""
    if not len(view):
        return 0
    with _ffi.from_buffer("char[]", view) as held:
        return int(_ffi.cast("uintptr_t", held))


def contents_of(views: Sequence[memoryview | bytes]) -> array[int]:
    """Address and length of each, one behind the other: struct lr_content[]."""
    places = array("Q")
    for view in views:
        places.extend((address_of(view), len(view)))
    return places
