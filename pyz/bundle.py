"""Make jobworker.pyz: a zip of the bootstrap (pyz/__main__.py), the product and the packages that it imports.

    python pyz/bundle.py [--commit ID] OUT PACKAGE...               for the Python and the machine that run this
    python pyz/bundle.py [--commit ID] --wheels FOLDER OUT TARGET...    for CPython 3.10 to 3.14 on each TARGET

The first packs the installed packages, below jobworker/, as bytecode that is never compared with a source. The second
packs FOLDER/TARGET-MINOR/*.whl (a TARGET is x86_64-glibc, say) as first_run.py tells. Streams that are compressed for
minutes are kept in FOLDER. The same input makes the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import io
import lzma
import pathlib
import py_compile
import re
import tarfile
import tempfile
import zipfile
from typing import Any

BOOTSTRAP = pathlib.Path(__file__).with_name("__main__.py")
FIRST_RUN = pathlib.Path(__file__).with_name("first_run.py")
MINORS = (14, 13, 12, 11, 10)  # of CPython 3, the newest first: an older one's library compresses well after it
NAMED = ("grpcio", "protobuf", "cryptography")  # what --version names
OLDEST_CRYPTOGRAPHY = "42.0"  # the first with not_valid_after_utc
UNUSED = ("cffi/", "pycparser/")  # cryptography needs only _cffi_backend at run time
LIBRARY = r"\.so(\.\d+)*$"  # cryptography for musl brings its libgcc_s.so.1 in cryptography.libs
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
        elif re.search(LIBRARY, path):
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


def hash_of(files: dict[str, bytes]) -> str:
    return hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:16]


def top_level(files: dict[str, bytes]) -> list[str]:
    """Return the modules that the files hold. The bootstrap forgets those that this Python imported before."""
    return sorted({re.split("[./]", name)[0] for name in files} - {"__pycache__", "licenses"})


def named_versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {versions[name]}" for name in NAMED)


def bootstrap_with(built: dict[str, Any]) -> bytes:
    """Return the bootstrap with its BUILT filled."""
    return BOOTSTRAP.read_text().replace("BUILT = {}", f"BUILT = {built!r}", 1).encode()


def this_platform() -> tuple[str, str, str]:
    scope: dict[str, Any] = {"__name__": "bootstrap"}
    exec(compile(BOOTSTRAP.read_text(), str(BOOTSTRAP), "exec"), scope)
    python, machine, libc = scope["this_platform"]()
    return python, machine, libc


def write_pyz(out: pathlib.Path, content: dict[str, bytes]) -> None:
    """Write the zip beside `out` and rename it. A server that runs from the old file goes on running."""
    new = out.with_name(out.name + ".new")
    with new.open("wb") as raw:
        raw.write(FIRST_LINES)
        with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as pyz:
            for name, data in sorted(content.items()):
                info = zipfile.ZipInfo(name)
                info.external_attr = 0o644 << 16
                info.compress_type = zipfile.ZIP_DEFLATED if "/" in name else zipfile.ZIP_STORED
                pyz.writestr(info, data)
    new.chmod(0o755)
    new.replace(out)


# --- 1. For this machine ------------------------------------------------------------------------------------------


def make_for_this_machine(out: pathlib.Path, names: list[str], commit: str) -> None:
    packages = installed(names)
    files = product_files()
    for package in packages:
        files.update(package_files(package))
    python, machine, _libc = this_platform()
    size = sum(map(len, files.values()))
    content = {
        "__main__.py": bootstrap_with(
            {
                "platform": (python, machine, oldest_libc(packages)),
                "hash": hash_of(files),
                "modules": top_level(files),
                "megabytes": size >> 20,
                "commit": commit,
                "packages": named_versions({package.name: package.version for package in packages}),
            }
        ),
        "first_run.py": FIRST_RUN.read_bytes(),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name in list(content):
            source = pathlib.Path(folder, name)
            source.write_bytes(content[name])
            content[name + "c"] = compiled(source, name)
    write_pyz(out, {**content, **{"jobworker/" + name: data for name, data in files.items()}})


# --- 2. For many machines -----------------------------------------------------------------------------------------


class Wheels:
    """What the wheels of one target and CPython hold, by kind, and their versions."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.sources: dict[str, bytes] = {}
        self.abi3: dict[str, bytes] = {}
        self.libraries: dict[str, bytes] = {}
        self.versions: dict[str, str] = {}
        for path in sorted(folder.glob("*.whl")):
            self.add(path)

    def add(self, path: pathlib.Path) -> None:
        package, version = path.name.split("-")[:2]
        self.versions[package] = version
        with zipfile.ZipFile(path) as wheel:
            for name in wheel.namelist():
                base = name.rsplit("/", 1)[-1]
                if ".dist-info/" in name:
                    if re.match("licen|notice|copying", base, re.IGNORECASE):
                        self.sources[f"licenses/{package}/{base}"] = wheel.read(name)
                elif name.startswith(UNUSED):
                    continue
                elif name.endswith(".py"):
                    self.sources[name] = wheel.read(name)
                elif re.search(LIBRARY, name):
                    (self.abi3 if "-abi3-" in path.name else self.libraries)[name] = wheel.read(name)


def archive_of(parts: dict[str, dict[str, bytes]]) -> bytes:
    """Return a tar with a folder for each part, in the order of the parts, of the same bytes for the same input."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for part, files in parts.items():
            for name, data in sorted(files.items()):
                info = tarfile.TarInfo(f"{part}/{name}")
                info.size, info.mode = len(data), 0o644
                tar.addfile(info, io.BytesIO(data))
    return raw.getvalue()


def compressed(data: bytes, cache: pathlib.Path) -> bytes:
    """Compress as one stream of 24 MiB dictionary: a library finds the last CPython's in it. BCJ made it larger."""
    kept = cache / f"{hashlib.sha256(data).hexdigest()}.xz"
    if not kept.exists():
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 24 << 20}]
        new = kept.with_suffix(".new")
        new.write_bytes(lzma.compress(data, check=lzma.CHECK_CRC32, filters=filters))
        new.replace(kept)
    return kept.read_bytes()


def sums_of(name: str, parts: dict[str, dict[str, bytes]]) -> dict[str, str]:
    """Return the hash of each part, as first_run.py makes it."""
    sums = {}
    for part, files in parts.items():
        digest = hashlib.sha256()
        for path, data in sorted(files.items()):
            digest.update(f"{part}/{path} {len(data)}\n".encode() + data)
        sums[f"{name}/{part}"] = digest.hexdigest()
    return sums


def merge(into: dict[str, bytes], files: dict[str, bytes], target: str) -> None:
    """Add the files. Raises SystemExit if two targets' sources differ, since all targets share them."""
    for name, data in files.items():
        if into.setdefault(name, data) != data:
            raise SystemExit(f"bundle.py: {name} of {target} differs from another target's")


def generated_by() -> list[tuple[str, str]]:
    """Return the oldest release of each package that gen/ and jobworker.py run with."""
    grpc = re.search(r"GRPC_GENERATED_VERSION = '([\d.]+)'", pathlib.Path("gen/workerservice_pb2_grpc.py").read_text())
    protobuf = re.search(r"Protobuf Python Version: ([\d.]+)", pathlib.Path("gen/workerservice_pb2.py").read_text())
    if grpc is None or protobuf is None:
        raise SystemExit("bundle.py: gen/ does not name the releases that made it")
    return [("grpcio", grpc[1]), ("protobuf", protobuf[1]), ("cryptography", OLDEST_CRYPTOGRAPHY)]


def make_universal(out: pathlib.Path, targets: list[str], wheels: pathlib.Path, commit: str) -> None:
    targets = sorted(set(targets), reverse=True)  # the order in which they are named makes no difference
    sources: dict[str, bytes] = {}
    archives: dict[str, dict[str, dict[str, bytes]]] = {}
    versions: dict[str, str] = {}
    for target in targets:
        parts: dict[str, dict[str, bytes]] = {"abi3": {}}
        for minor in MINORS:
            found = Wheels(wheels / f"{target}-{minor}")
            merge(sources, found.sources, f"{target}-{minor}")
            parts["abi3"].update(found.abi3)  # the last, of the oldest CPython, serve all
            parts[f"cp3{minor}"] = found.libraries
            versions.update(found.versions)
        archives[target] = parts
    product = {
        str(path): path.read_bytes() for path in (pathlib.Path("jobworker.py"), *pathlib.Path("gen").glob("*.py"))
    }
    product["licenses/jobworker/LICENSE"] = pathlib.Path("LICENSE").read_bytes()
    archives = {"python": {"product": product, "packages": sources}, **archives}
    sums: dict[str, str] = {}
    content: dict[str, bytes] = {"first_run.py": FIRST_RUN.read_bytes()}
    for name, parts in archives.items():
        sums.update(sums_of(name, parts))
        content[name + ".tar.xz"] = compressed(archive_of(parts), wheels)
    libraries = max(sum(map(len, files.values())) for name in targets for files in archives[name].values())
    abi3 = max(sum(map(len, archives[name]["abi3"].values())) for name in targets)
    built = {
        "targets": targets,
        "pythons": [f"CPython 3.{minor}" for minor in sorted(MINORS)],
        "for": f"CPython 3.{min(MINORS)} to 3.{max(MINORS)}",
        "glibc": [2, 17],
        "sums": sums,
        "modules": top_level({**product, **sources, **archives[targets[0]]["cp314"]}),
        "megabytes": (libraries + abi3 + 2 * sum(map(len, sources.values()))) >> 20,
        "least": generated_by(),
        "commit": commit,
        "packages": named_versions(versions),
    }
    built["hash"] = hash_of({"bootstrap": bootstrap_with(built), "first_run": content["first_run.py"]})
    write_pyz(out, {**content, "__main__.py": bootstrap_with(built)})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--commit", default="")
    parser.add_argument("--wheels", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("names", nargs="+", metavar="PACKAGE or TARGET")
    options = parser.parse_args()
    if options.wheels:
        make_universal(options.out, options.names, options.wheels, options.commit)
    else:
        make_for_this_machine(options.out, options.names, options.commit)


if __name__ == "__main__":
    main()
