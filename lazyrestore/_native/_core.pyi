# The cffi extension: names come from our headers and build.py, values from the compiler.
from typing import Any

ffi: Any
lib: Any
