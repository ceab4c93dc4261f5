"""Make jobworker.pyz: a zip of the bootstrap (pyz/__main__.py), the product and the packages that it imports.

    python pyz/bundle.py OUT PACKAGE...

The packages are those that are installed for the Python that runs this. They lie below jobworker/ as bytecode that is
never compared with a source. The same input makes the same bytes.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import pathlib
import py_compile
import re
import sys
import tempfile
import zipfile
from typing import Any

BOOTSTRAP = pathlib.Path(__file__).with_name("__main__.py")
UNUSED = ("cffi/", "pycparser/")  # cryptography needs only _cffi_backend at run time
MODE = py_compile.PycInvalidationMode.UNCHECKED_HASH
# The second line is for a copy that was cut short: Python takes it for a script and prints this name in its error.
FIRST_LINES = b"#!/usr/bin/env python3\n# coding: this-jobworker.pyz-was-cut-short--copy-it-again\n"


def compiled(source: pathlib.Path, name: str) -> bytes:
    with tempfile.NamedTemporaryFile() as pyc:
        py_compile.compile(str(source), pyc.name, "jobworker.pyz/" + name, doraise=True, invalidation_mode=MODE)
        return pathlib.Path(pyc.name).read_bytes()


def package_files(package: importlib.metadata.Distribution) -> dict[str, bytes]:
    """Return what a package needs at run time: bytecode, libraries, licences."""
    files = {}
    for file in package.files or ():
        path, source = str(file), pathlib.Path(str(file.locate()))
        if ".dist-info/" in path:
            if re.match("licen|notice|copying", file.name, re.IGNORECASE):
                files[f"licenses/{package.name}/{file.name}"] = source.read_bytes()
        elif path.startswith(("..", *UNUSED)):
            continue
        elif file.suffix == ".py":
            files[path + "c"] = compiled(source, path)
        elif file.suffix == ".so":
            files[path] = source.read_bytes()
    return files


def product_files() -> dict[str, bytes]:
    """Return jobworker.py and gen/, with their sources for tracebacks."""
    files = {}
    for source in (pathlib.Path("jobworker.py"), *pathlib.Path("gen").glob("*.py")):
        files[str(source)] = source.read_bytes()
        files[importlib.util.cache_from_source(str(source))] = compiled(source, str(source))
    return files


def oldest_libc(packages: list[importlib.metadata.Distribution]) -> str:
    """Return the oldest libc that all the packages were built for: 'glibc 2.17', or 'musl'."""
    glibc = [(2, 17)]
    for package in packages:
        tags = package.read_text("WHEEL") or ""
        if "musllinux" in tags:
            return "musl"
        found = [(int(a), int(b)) for a, b in re.findall(r"manylinux_(\d+)_(\d+)_", tags)]
        glibc.append(min(found, default=(2, 17)))
    return "glibc {}.{}".format(*max(glibc))


def installed(names: list[str]) -> list[importlib.metadata.Distribution]:
    found = []
    for name in names:
        try:
            found.append(importlib.metadata.distribution(name))
        except importlib.metadata.PackageNotFoundError:  # the lock has it for other Pythons only
            continue
    return found


def content_hash(files: dict[str, bytes]) -> str:
    return hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:16]


def bootstrap_with(built: dict[str, Any]) -> bytes:
    """Return the bootstrap with its BUILT filled."""
    return BOOTSTRAP.read_text().replace("BUILT = {}", f"BUILT = {built!r}", 1).encode()


def this_platform() -> tuple[str, str, str]:
    scope: dict[str, Any] = {"__name__": "bootstrap"}
    exec(compile(BOOTSTRAP.read_text(), str(BOOTSTRAP), "exec"), scope)
    python, machine, libc = scope["this_platform"]()
    return python, machine, libc


def write_pyz(out: pathlib.Path, content: dict[str, bytes]) -> None:
    """Write the zip beside `out` and rename it. What runs from the old file goes on running."""
    new = out.with_name(out.name + ".new")
    with new.open("wb") as raw:
        raw.write(FIRST_LINES)
        with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as pyz:
            for name, data in sorted(content.items()):
                info = zipfile.ZipInfo(name)
                info.external_attr = 0o644 << 16
                info.compress_type = zipfile.ZIP_STORED if name.startswith("__main__") else zipfile.ZIP_DEFLATED
                pyz.writestr(info, data)
    new.chmod(0o755)
    new.replace(out)


def make_for_this_machine(out: pathlib.Path, names: list[str]) -> None:
    packages = installed(names)
    files = product_files()
    for package in packages:
        files.update(package_files(package))
    python, machine, _libc = this_platform()
    main = bootstrap_with(
        {
            "platform": (python, machine, oldest_libc(packages)),
            "hash": content_hash(files),
            "modules": sorted({re.split("[./]", name)[0] for name in files} - {"__pycache__", "licenses"}),
            "files": (len(files), sum(map(len, files.values()))),
        }
    )
    content = {"jobworker/" + name: data for name, data in files.items()}
    content["__main__.py"] = main
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder, "__main__.py")
        source.write_bytes(main)
        content["__main__.pyc"] = compiled(source, "__main__.py")
    write_pyz(out, content)


if __name__ == "__main__":
    make_for_this_machine(pathlib.Path(sys.argv[1]), sys.argv[2:])
