"""The layouts of `_native/pager/protocol.h` for `struct`; tests/pager/test_wire.py compares them with the compiler."""

from __future__ import annotations

from struct import Struct

VERSION = 6
IMAGE_MAGIC = 0x474D494C
IMAGE_HUGETLB, IMAGE_SUMS = 1, 2
INDEX_BLOCK = 128
MAX_SHARED = 248
MAX_CHUNK = 2 << 20

HELLO, ATTACH, STATS, STOP, WORKING_SET, INTERVALS = 1, 2, 3, 4, 5, 6
ATTACH_EAGER, ATTACH_NO_RECORD, ATTACH_NO_REPLAY, ATTACH_RECORD_AGAIN = 1, 2, 4, 8
ATTACH_FILL_IDLE, ATTACH_FILL_NOW, ATTACH_OWN_PAGES = 16, 32, 64
WORKING_SET_END, WORKING_SET_FILLED = 1, 2
RANGE_ZERO = 1

IMAGE = Struct(
    "<IIIIQQIIQ96s"
)  # magic, version, flags, packs, index offset, chunks, touched, frames, their offset, name
PACK = Struct("<QQ")  # offset into the data file, length
CHUNK = Struct("<QIIII")  # image address, raw length, pack, offset into the pack, stored length
TOUCHED = Struct("<IHH")  # position in the index, bits: pages written, bits: pages touched (0: all)
FRAME = Struct("<III")  # compressed bytes, chunks, tag
RANGE = Struct("<QQQII")  # start, end, image address, backing, flags
REQUEST = Struct("<5I248I")  # kind, version, flags, ranges, shared, shared object numbers
REPLY = Struct("<IiQ64siiII")  # kind, errno, address, step, pager, keeper, descriptors, spaces
TOTALS = Struct("<IiII10Q15Q")
SPACE = Struct("<iI6Q15Q")

COUNTERS = (
    "missing",
    "minor",
    "write",
    "zero_faults",
    "zero_pages",
    "pages",
    "forks",
    "remaps",
    "removes",
    "unmaps",
    "retries",
    "exists",
    "gone",
    "poisoned",
    "replayed",
)
