"""Unpack a jobworker.pyz on its first run, or find this Python's own packages. The bootstrap imports this when needed.

A universal .pyz holds python.tar.xz (jobworker.py, gen/, the sources and licences of the packages) and a file
ARCH-LIBC.tar.xz for each target: the folder abi3 with the libraries for all Pythons, then one folder for each CPython,
the newest first. Each is one compressed stream, which is read only as far as the wanted folder. Since that is not as
far as the stream's own checksum, each folder is compared with a hash that the bootstrap names.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import py_compile
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from typing import IO, TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DAMAGED = "%s is damaged: copy it here again"


class DamagedError(Exception):
    """What was read from the archive is not what the build wrote to it."""


# The others are what zipfile and tarfile raise, some of them undocumented: a KeyError for a name that is not there, a
# RuntimeError for a flag or a method that no build writes.
DAMAGES = (
    *(DamagedError, zipfile.BadZipFile, zlib.error, tarfile.TarError),
    *(EOFError, LookupError, RuntimeError, ValueError),
)


def die(sentence: str) -> NoReturn:
    sys.exit("jobworker: " + sentence)


# --- 1. A new folder, complete or absent --------------------------------------------------------------------------


def install(archive: str, folder: str, kind: str, built: dict[str, Any], is_complete: Callable[[str], bool]) -> None:
    """Unpack to a new folder and rename it, so that `folder` is complete or absent. A second first run waits."""
    parent = os.path.dirname(folder)
    umask = os.umask(0o077)
    try:
        with open(parent + "/lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                for name in os.listdir(parent):
                    if name.startswith("new-"):  # a first run was killed and left it
                        shutil.rmtree(parent + "/" + name, ignore_errors=True)
            except OSError:  # this file system has no locks; the rename decides
                pass
            if not is_complete(folder):
                unpack_and_rename(archive, folder, kind, built, is_complete)
    finally:
        os.umask(umask)


def unpack_and_rename(
    archive: str, folder: str, kind: str, built: dict[str, Any], is_complete: Callable[[str], bool]
) -> None:
    new = tempfile.mkdtemp(prefix="new-", dir=os.path.dirname(folder))
    try:
        if kind == "ordinary":
            unpack_ordinary(archive, new)
        else:
            unpack_universal(archive, new + "/jobworker", kind, built["sums"])
        write_size(new + "/jobworker")
        if os.path.lexists(folder):
            os.rename(folder, new + "/damaged")
        os.rename(new + "/jobworker", folder)
    except OSError:
        if not is_complete(folder):
            raise
    except DAMAGES:
        die(DAMAGED % archive)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def unpack_ordinary(archive: str, folder: str) -> None:
    with zipfile.ZipFile(archive) as pyz:
        pyz.extractall(folder, [name for name in pyz.namelist() if name.startswith("jobworker/")])


def write_size(folder: str) -> None:
    """Write the number of files and bytes to the file SIZE, itself included, so its width is fixed."""
    count = size = 0
    for path, _folders, names in os.walk(folder):
        count += len(names)
        size += sum(os.lstat(path + "/" + name).st_size for name in names)
    with open(folder + "/SIZE", "w") as file:
        file.write(f"{count + 1:12} {size + 26:12}\n")


# --- 2. The universal layout --------------------------------------------------------------------------------------


def unpack_universal(archive: str, folder: str, target: str, sums: dict[str, str]) -> None:
    """Unpack for this CPython and the target, or only the product for the target 'own', and compile."""
    os.mkdir(folder)
    extract(archive, "python", ["product"] if target == "own" else ["product", "packages"], folder, sums)
    if target != "own":
        python = "cp{}{}".format(*sys.version_info)
        extract(archive, target, ["abi3", python], folder, sums)
    compile_sources(folder)


def extract(archive: str, name: str, parts: list[str], folder: str, sums: dict[str, str]) -> None:
    """Extract the parts, which are folders of NAME.tar.xz, into the folder, without the part in their names."""
    hashes = {part: hashlib.sha256() for part in parts}
    seen: set[str] = set()
    with (
        zipfile.ZipFile(archive) as pyz,
        pyz.open(name + ".tar.xz") as packed,
        decompressed(packed) as stream,
        tarfile.open(fileobj=stream, mode="r|") as tar,
    ):
        for member in tar:
            part, _slash, path = member.name.partition("/")
            if part in hashes:
                seen.add(part)
                write_member(tar, member, f"{folder}/{path}", hashes[part])
            elif len(seen) == len(parts):
                break
    for part in parts:
        if hashes[part].hexdigest() != sums[name + "/" + part]:
            raise DamagedError(archive)


def write_member(tar: tarfile.TarFile, member: tarfile.TarInfo, path: str, digest: hashlib._Hash) -> None:
    digest.update(f"{member.name} {member.size}\n".encode())
    os.makedirs(os.path.dirname(path), exist_ok=True)
    source = tar.extractfile(member)
    if source is None:
        raise DamagedError(member.name)
    with open(path, "wb") as file:
        for chunk in iter(lambda: source.read(1 << 20), b""):
            digest.update(chunk)
            file.write(chunk)


@contextlib.contextmanager
def decompressed(packed: IO[bytes]) -> Iterator[IO[bytes]]:
    """Decompress with lzma, or with xz(1), since a Python can be built without lzma."""
    try:
        import lzma
    except ImportError:
        with from_xz(packed) as stream:
            yield stream
        return
    try:
        yield lzma.LZMAFile(packed)  # noqa: SIM115  # its source is closed by the caller
    except lzma.LZMAError as error:
        raise DamagedError(str(error)) from None


@contextlib.contextmanager
def from_xz(packed: IO[bytes]) -> Iterator[IO[bytes]]:
    xz = shutil.which("xz")
    if xz is None:
        die("this Python has no lzma module, and there is no xz: install xz-utils (apt) or xz (dnf, apk)")
    with tempfile.TemporaryFile() as file:  # zipfile's stream has no descriptor
        shutil.copyfileobj(packed, file)
        file.seek(0)
        with subprocess.Popen([xz, "-dc"], stdin=file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            try:
                yield process.stdout
            finally:
                process.kill()  # the rest of the stream is not wanted


def compile_sources(folder: str) -> None:
    """Compile all sources to bytecode that is never compared with them. Only the product keeps them, for tracebacks."""
    for path, _folders, names in os.walk(folder):
        for name in names:
            if name.endswith(".py"):
                source = path + "/" + name
                inside = source[len(folder) + 1 :]
                keep = inside == "jobworker.py" or inside.startswith("gen/")
                py_compile.compile(
                    source,
                    None if keep else source + "c",
                    "jobworker.pyz/" + inside,
                    doraise=True,
                    invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
                )
                if not keep:
                    os.unlink(source)


# --- 3. This Python's own packages --------------------------------------------------------------------------------


def own_packages(running: tuple[str, str, str], built: dict[str, Any]) -> tuple[list[str], str]:
    """Return the folders of this Python's own packages and their versions, or end with one sentence.

    A universal .pyz takes them where it has none for the running target. All three come from there, since libraries and
    sources of different releases do not fit. Their versions are read before anything is imported.
    """
    from importlib import metadata

    problem = (
        f"this jobworker.pyz is for {built['for']} on {', '.join(built['targets'])}, "
        "but this is {} on {} with {}, ".format(*running)
    )
    wanted = " ".join(f"'{name}>={least}'" for name, least in built["least"])
    remedy = (
        f"python3 -m venv ~/jobworker && ~/jobworker/bin/pip install {wanted} && "
        f"~/jobworker/bin/python {sys.argv[0]} --version"
    )
    folders = package_folders()
    found = {}
    for name, least in built["least"]:
        version = next((d.version for d in metadata.distributions(name=name, path=folders)), None)
        if version is None:
            die(f"{problem}and this Python has no {name} of its own: {remedy}")
        if numbers(version) < numbers(least):
            die(f"{problem}and its own {name} is {version}, older than {least}: {remedy}")
        found[name] = version
    return folders, ", ".join(f"{name} {version}" for name, version in found.items())


def package_folders() -> list[str]:
    """Return the folders of installed packages, without those that only PYTHONPATH or the working folder name."""
    site = sys.modules.get("site")  # absent with -S, as is what it adds
    if site is None:
        return []
    folders = list(site.getsitepackages())
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    return [folder for folder in folders if os.path.isdir(folder)]


def numbers(version: str) -> list[int]:
    digits = []
    for word in version.split("."):
        if not word.isdigit():
            break
        digits.append(int(word))
    return digits
