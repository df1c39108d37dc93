"""The native parts: the cffi extension `_core`, and `pagerd`, an executable built and installed like an extension."""

from __future__ import annotations

from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

PAGERD = "lazyrestore._native.pagerd"


class BuildNative(build_ext):
    """build_ext that can also link an executable: the pager runs without Python, from a file beside the extension."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname == PAGERD or fullname == "pagerd":
            return fullname.replace(".", "/")
        return super().get_ext_filename(fullname)

    def build_extension(self, ext: Extension) -> None:
        if ext.name != PAGERD:
            super().build_extension(ext)
            return
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        objects = self.compiler.compile(
            ext.sources,
            output_dir=self.build_temp,
            include_dirs=ext.include_dirs,
            extra_postargs=ext.extra_compile_args,
            depends=ext.depends,
        )
        self.compiler.link_executable(
            objects, target.name, output_dir=str(target.parent), libraries=ext.libraries, extra_postargs=["-pthread"]
        )


SOURCES = sorted(glob("lazyrestore/_native/pager/*.c"))

setup(
    cffi_modules=["lazyrestore/_native/build.py:ffibuilder"],
    ext_modules=[
        Extension(
            PAGERD,
            sources=SOURCES,
            depends=sorted(glob("lazyrestore/_native/**/*.h", recursive=True)),
            libraries=["zstd"],
            extra_compile_args=[
                "-iquote",
                "lazyrestore/_native",
                "-std=gnu11",
                "-O2",
                "-g",
                "-Wall",
                "-Wextra",
                "-pthread",
            ],
        )
    ]
    if SOURCES
    else [],
    cmdclass={"build_ext": BuildNative},
)
