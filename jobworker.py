#!/usr/bin/env python3
"""Job worker: run commands on a Linux box, each in its own cgroup, over mutual TLS 1.3 and gRPC.

One file, read top-down. ``serve`` is the server; ``start``, ``stop``, ``status`` and ``stream`` are
its clients; `Worker` is the library under it, without gRPC, TLS or any third-party import.

The processes, and the way a byte takes::

    client ══ gRPC, mTLS 1.3 ══ server ── one packet with descriptors ──> launcher
                                 │ ▲ ▲                                       │ fork
                                 │ │ └── inotify ── <state>/jobs/<id>/events <─┤
             a request: "kill alice"│ │                                         ▼
                                 └─┼── <state>/jobs/<id>/control (FIFO) ──> shim ── clone3 into ──> job
                                   │                                         │       its cgroup      │
             inotify, pread 256 KiB└── <state>/jobs/<id>/output <── splice ──┴──────── pipe <────────┘
                                                                                  stdout and stderr

The server keeps nothing in memory that it cannot read back from the folders. The launcher is this
module again, exec'ed without third-party imports, so that its forks are cheap; one shim a job is the
job's parent and finishes it whether or not a server lives.

Contents (each section uses only the sections above it)
     1. Names and limits                    what everything is called; every default
     2. Errors                              one base class; the door to libc
     3. Cgroup                              the tree, its limits, kill and removal
     4. Output log and inotify follower     one inotify descriptor; followers of a growing file
     5. Launcher and shim                   the record of a job; its three small processes
     6. Job and job table                   `Worker`: start, stop, status, stream, recovery, retention
     7. Identity and authorization          who calls, with which role, and what is theirs
     8. gRPC service                        a thin layer over `Worker`; the only maker of statuses
     9. Server                              certificates, port, signals, systemd
    10. Client                              connecting, explaining failures, resuming a stream
    11. Certificates                        the two authorities and what they sign
    12. Command line                        one table of verbs; `main`
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import functools
import gc
import importlib
import marshal
import os
import re
import resource
import select
import signal
import socket
import stat
import sys
import termios
import time
import types

TYPE_CHECKING = False  # as `typing` has it, whose import every fork would copy
if TYPE_CHECKING:
    import argparse
    import asyncio
    import ctypes
    import datetime
    import ipaddress
    import json
    import pathlib
    import pwd
    import ssl
    import subprocess
    import traceback
    import zlib
    from collections.abc import (
        AsyncGenerator,
        AsyncIterator,
        Awaitable,
        Callable,
        Coroutine,
        Iterable,
        Iterator,
        Mapping,
        Sequence,
    )
    from types import TracebackType
    from typing import Any, NoReturn, TypeAlias

    import grpc
    from cryptography import exceptions, x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
    from google.protobuf import message as protobuf
    from typing_extensions import Self

    import gen.workerservice_pb2 as pb
else:

    class Deferred:
        """A module that is imported at its first use.

        A client's start-up is felt on every call, and the launcher's memory in every fork: neither pays for what it
        does not use. `serve` imports everything when it starts (`import_everything`).
        """

        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            value = getattr(importlib.import_module(self._name), attribute)
            setattr(self, attribute, value)  # found without this function from now on
            return value

    argparse = Deferred("argparse")
    asyncio = Deferred("asyncio")
    ctypes = Deferred("ctypes")
    datetime = Deferred("datetime")
    ipaddress = Deferred("ipaddress")
    json = Deferred("json")
    pathlib = Deferred("pathlib")
    pwd = Deferred("pwd")
    ssl = Deferred("ssl")
    subprocess = Deferred("subprocess")
    traceback = Deferred("traceback")
    zlib = Deferred("zlib")
    grpc = Deferred("grpc")
    pb = Deferred("gen.workerservice_pb2")
    protobuf = Deferred("google.protobuf.message")
    x509 = Deferred("cryptography.x509")
    exceptions = Deferred("cryptography.exceptions")
    hashes = Deferred("cryptography.hazmat.primitives.hashes")
    serialization = Deferred("cryptography.hazmat.primitives.serialization")
    ec = Deferred("cryptography.hazmat.primitives.asymmetric.ec")
    ed448 = Deferred("cryptography.hazmat.primitives.asymmetric.ed448")
    ed25519 = Deferred("cryptography.hazmat.primitives.asymmetric.ed25519")
    rsa = Deferred("cryptography.hazmat.primitives.asymmetric.rsa")


# --- 1. Names and limits ------------------------------------------------------------------------------
# Owns every name, number and default that more than one section, or a reader, wants to find. No code.

VERSION = "1.0.0"
BUILD = ""  # the commit and the packages of a .pyz, set by its bootstrap
DEFAULT_PORT = 8010

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
CPU_LIMIT = 1.0  # CPUs a job may use
MEMORY_LIMIT = 512 * MIB  # bytes, swap off
PIDS_LIMIT = 512  # processes and threads
IO_LIMIT = 64 * MIB  # bytes a second, each way, each disk
OUTPUT_LIMIT = GIB  # bytes of output after which a job is ended
KEEP_SECONDS = 7 * 86400.0  # an ended job is forgotten after this
RESERVE = 0.05  # share of the state folder's file system that jobs may not fill
MAX_JOBS = 4096  # running at once
SHIMS_IO_LIMIT = 512 * MIB  # bytes a second that all shims together may write

CONTROLLERS = ("cpu", "memory", "pids", "io")
JOB_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
JOB_ID_VARIABLE = "JOBWORKER_JOB_ID"
JOB_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
ROLES = ("admin", "user")

READ_BYTES = 256 * KIB  # one read of an output, and so one message of a stream
COALESCE_SECONDS = 0.002  # between two wake-ups of an output's followers: lines that come faster share a message
STARTS_AT_ONCE, FINISHES_AT_ONCE = 48, 16  # beyond, descriptors in flight make sends to the launcher fail
STOP_SECONDS = 30.0  # how long a stop waits for the record before it says that the job will not die

# Unused by systemd and by anybody else (systemd.io/UIDS-GIDS): 4096 ranges of 65536, one a state folder.
UID_RANGES_BASE, UID_RANGE, UID_RANGES = 1879048192, 65536, 4096


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one job may use: CPUs, bytes of memory, processes, and bytes a second each way and disk."""

    cpu: float = CPU_LIMIT
    memory: int = MEMORY_LIMIT
    pids: int = PIDS_LIMIT
    io: int = IO_LIMIT


# --- 2. Errors ----------------------------------------------------------------------------------------
# Owns the one base class, and the doors at which the kernel's errno becomes an exception. Each error
# carries its sentence, the gRPC status that the service gives it, and the exit code that `main` gives it.


class JobWorkerError(Exception):
    """A sentence that a person can act on."""

    status = "INTERNAL"
    exit_code = 1


class BadRequestError(JobWorkerError):
    status = "INVALID_ARGUMENT"


class NoSuchJobError(JobWorkerError):
    status = "NOT_FOUND"

    def __init__(self, job_id: str) -> None:
        super().__init__(f"there is no job {job_id}")


class DeniedError(JobWorkerError):
    status = "PERMISSION_DENIED"


class StillRunningError(JobWorkerError):
    status = "FAILED_PRECONDITION"


class ExhaustedError(JobWorkerError):
    status = "RESOURCE_EXHAUSTED"


class IdTakenError(JobWorkerError):
    status = "ALREADY_EXISTS"


class UnavailableError(JobWorkerError):
    status = "UNAVAILABLE"


class KernelError(JobWorkerError):
    """The kernel refused something that was asked of it by name; `errno` says why."""

    def __init__(self, doing: str, error: OSError) -> None:
        super().__init__(f"{doing}: {error.strerror}")
        self.errno = error.errno


class UsageError(JobWorkerError):
    """What was asked on the command line makes no sense."""

    exit_code = 2


def say(sentence: str) -> None:
    """One line on standard error, whatever names are in it: what a server has to tell whoever runs it. A log that
    cannot be written (a full disk, a pipe that nobody reads any more) keeps nobody from their work.
    """
    line = sentence.replace("\n", "\\n")
    with contextlib.suppress(OSError):
        print(f"jobworker: {line}", file=sys.stderr, flush=True)


def read_whole(path: str) -> bytes:
    """All bytes of a small file. Raises OSError. `open` costs three times as much, and every shim would pay that."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return b"".join(iter(functools.partial(os.read, descriptor, 64 * KIB), b""))
    finally:
        os.close(descriptor)


def libc_call(name: str, *arguments: Any) -> int:
    """Call a libc function by name and return its result; raise OSError with its errno where that is -1."""
    result: int = getattr(libc(), name)(*arguments)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)
    return result


@functools.cache
def libc() -> ctypes.PyDLL:
    # PyDLL keeps the interpreter's lock: none of these calls blocks, and a clone3 in which another thread
    # could run Python would not be a fork.
    return ctypes.PyDLL(None, use_errno=True)


# --- 3. Cgroup ----------------------------------------------------------------------------------------
# Owns everything below the cgroup2 mount: where the tree stands, what it can enforce, one cgroup a job.
# Everything is written through `kernel_write`. Knows nothing of jobs, owners or the wire.
# Source of names and formats: Documentation/admin-guide/cgroup-v2.rst.


def kernel_write(path: str, value: str) -> None:
    """Write one value to one file of cgroupfs or procfs; KernelError names both."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, value.encode())
        finally:
            os.close(descriptor)
    except OSError as error:
        raise KernelError(f"cannot write {value!r} to {path}", error) from error


def kernel_read(path: str) -> str:
    """The contents of a file of cgroupfs, procfs or sysfs; empty where this kernel does not have it."""
    try:
        return os.fsdecode(read_whole(path))
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        if error.errno in (errno.ENODEV, errno.EOPNOTSUPP):  # a cgroup that was removed meanwhile
            return ""
        raise KernelError(f"cannot read {path}", error) from error


def keyed_values(text: str) -> dict[str, int]:
    """A flat keyed file (`populated 1`) as a dictionary."""
    return {key: int(value) for key, _, value in (line.partition(" ") for line in text.splitlines())}


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a job used, by the kernel's counters; None where this machine does not count it."""

    cpu_seconds: float | None = None
    memory_peak: int | None = None
    read_bytes: int | None = None
    written_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class Disk:
    """A whole disk: its device number `MAJOR:MINOR` and its name under /sys/block."""

    number: str
    name: str


def cpu_files(limits: Limits, _disks: Sequence[Disk]) -> list[tuple[str, str]]:
    period = 100_000  # microseconds; the kernel wants a quota of at least 1000
    return [("cpu.max", f"{max(1000, round(limits.cpu * period))} {period}")]


def memory_files(limits: Limits, _disks: Sequence[Disk]) -> list[tuple[str, str]]:
    return [("memory.max", str(limits.memory)), ("memory.swap.max", "0"), ("memory.oom.group", "1")]


def pids_files(limits: Limits, _disks: Sequence[Disk]) -> list[tuple[str, str]]:
    return [("pids.max", str(limits.pids))]


def io_files(limits: Limits, disks: Sequence[Disk]) -> list[tuple[str, str]]:
    return [("io.max", f"{disk.number} rbps={limits.io} wbps={limits.io}") for disk in disks]


LIMIT_FILES: dict[str, Callable[[Limits, Sequence[Disk]], list[tuple[str, str]]]] = {
    "cpu": cpu_files,
    "memory": memory_files,
    "pids": pids_files,
    "io": io_files,
}


REMOVAL_MILLISECONDS = 1000  # of a cgroup, of which the kernel tells nobody who waits for its events


class Cgroup:
    """One cgroup, by its path. Holds no descriptor: whoever opens one owns it."""

    def __init__(self, path: str) -> None:
        self.path = path

    def create(self) -> None:
        try:
            os.makedirs(self.path, mode=0o755, exist_ok=True)
        except OSError as error:
            raise KernelError(f"cannot create the cgroup {self.path}", error) from error

    def controllers(self) -> frozenset[str]:
        return frozenset(kernel_read(f"{self.path}/cgroup.controllers").split())

    def enable(self, controllers: Iterable[str]) -> frozenset[str]:
        """Give the children of this cgroup these controllers; which of them they have now."""
        file, wanted = f"{self.path}/cgroup.subtree_control", frozenset(controllers)
        missing = wanted.difference(kernel_read(file).split())
        if not missing:
            return wanted
        for controller in missing & self.controllers():
            with contextlib.suppress(KernelError):  # the answer says so; EBUSY where processes live in it
                kernel_write(file, f"+{controller}")
        return wanted.intersection(kernel_read(file).split())

    def limit(self, limits: Limits, controllers: Iterable[str], disks: Sequence[Disk]) -> None:
        for controller in controllers:
            for file, value in LIMIT_FILES[controller](limits, disks):
                # A kernel without swap accounting has no memory.swap.max, and then nothing to forbid.
                if file != "memory.swap.max" or os.path.exists(f"{self.path}/{file}"):
                    kernel_write(f"{self.path}/{file}", value)

    def attach(self, process: int) -> None:
        """Move a process in (0: the caller)."""
        kernel_write(f"{self.path}/cgroup.procs", str(process))

    def open(self) -> int:
        """A descriptor of the folder, for CLONE_INTO_CGROUP."""
        return os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def kill(self) -> None:
        """Send SIGKILL to every process below at once; forks under way are caught too."""
        if os.path.exists(f"{self.path}/cgroup.kill"):
            kernel_write(f"{self.path}/cgroup.kill", "1")
        elif os.path.isdir(self.path):
            self._kill_frozen()

    def _kill_frozen(self) -> None:
        """Before Linux 5.14: nothing forks while it is frozen, and SIGKILL reaches the frozen."""
        kernel_write(f"{self.path}/cgroup.freeze", "1")
        try:
            for folder, _, _ in os.walk(self.path):
                for process in kernel_read(f"{folder}/cgroup.procs").split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(process), signal.SIGKILL)
        finally:
            kernel_write(f"{self.path}/cgroup.freeze", "0")

    def populated(self) -> bool:
        return keyed_values(kernel_read(f"{self.path}/cgroup.events")).get("populated", 0) == 1

    def kill_all(self) -> None:
        """Kill, and return when nothing below lives any more."""
        try:
            events = os.open(f"{self.path}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return  # no such cgroup: nothing of the job is left
        try:
            waiter = select.poll()
            waiter.register(events, select.POLLPRI)
            os.pread(events, 4096, 0)  # from here on a change is an event
            while self.populated():
                self.kill()  # again after a change: the frozen way may miss what was forking
                if self.populated():
                    waiter.poll(REMOVAL_MILLISECONDS)
        finally:
            os.close(events)

    def remove(self) -> None:
        """Remove it with all below, depth first; nothing may live in it."""
        with contextlib.suppress(OSError):  # most have none below, and looking for some takes longer
            os.rmdir(self.path)
            return
        for folder, _, _ in os.walk(self.path, topdown=False):
            try:
                os.rmdir(folder)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise KernelError(f"cannot remove the cgroup {folder}", error) from error

    def out_of_memory_kills(self) -> int:
        return keyed_values(kernel_read(f"{self.path}/memory.events")).get("oom_kill", 0)

    def usage(self) -> Usage:
        cpu = keyed_values(kernel_read(f"{self.path}/cpu.stat")).get("usage_usec")
        peak = kernel_read(f"{self.path}/memory.peak").strip()  # Linux 5.19
        transfers = kernel_read(f"{self.path}/io.stat")
        counted = os.path.exists(f"{self.path}/io.stat")
        return Usage(
            cpu_seconds=None if cpu is None else cpu / 1e6,
            memory_peak=int(peak) if peak else None,
            read_bytes=sum(map(int, re.findall(r"rbytes=(\d+)", transfers))) if counted else None,
            written_bytes=sum(map(int, re.findall(r"wbytes=(\d+)", transfers))) if counted else None,
        )


class ProcessTree:
    """What a machine without a writable cgroup2 has instead of a `Cgroup`: no limits, and a kill by search.

    Finds the caller's descendants (a shim is their subreaper, prctl(2)) and whatever carries the job's id
    in its environment, which a process can change: what holds here holds against no one who means harm.
    """

    def __init__(self, job_id: str) -> None:
        self._mark = f"{JOB_ID_VARIABLE}={job_id}"

    def _find(self) -> list[int]:
        parents: dict[int, int] = {}
        found = set()
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError, KernelError, ValueError):  # it ended meanwhile
                state, parent = kernel_read(f"/proc/{name}/stat").rpartition(")")[2].split()[:2]
                if state in "ZX":
                    continue
                parents[int(name)] = int(parent)
                if self._mark in kernel_read(f"/proc/{name}/environ").split("\0"):
                    found.add(int(name))
        family = {os.getpid()}
        while more := {child for child, parent in parents.items() if parent in family} - family:
            family |= more
        return sorted((found | family) - {os.getpid()})

    def kill(self) -> None:
        for process in self._find():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)

    def kill_all(self) -> None:
        self._kill_family()
        while found := self._find():
            waiter = select.poll()
            descriptors = []
            for process in found:
                with contextlib.suppress(OSError):
                    descriptors.append(os.pidfd_open(process))
                    os.kill(process, signal.SIGKILL)
            for descriptor in descriptors:
                waiter.register(descriptor, select.POLLIN)
                waiter.poll()
                waiter.unregister(descriptor)
                os.close(descriptor)

    def _kill_family(self) -> None:
        """Kill children until there are none: whoever's parent dies becomes its subreaper's child, so nothing that
        is born meanwhile is missed, as it can be by a search."""
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # from here on nobody else waits for them
        with contextlib.suppress(ChildProcessError):
            while True:
                # Not every kernel lists children (CONFIG_PROC_CHILDREN); a search may come too late, so no wait then.
                listed = [int(child) for child in kernel_read("/proc/thread-self/children").split()]
                for process in listed or self._find():
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(process, signal.SIGKILL)
                os.waitpid(-1, 0 if listed else os.WNOHANG)

    def remove(self) -> None:
        """Nothing stands for a job without a cgroup."""

    def out_of_memory_kills(self) -> int:
        return 0

    def usage(self) -> Usage:
        return Usage()


@dataclasses.dataclass(frozen=True)
class CgroupMount:
    """Where cgroup2 is mounted, and where the caller stands below it."""

    point: str
    own: str  # the caller's cgroup as a path below `point`; equal to `point` at the visible root

    @classmethod
    def find(cls) -> CgroupMount | None:
        """The first cgroup2 of /proc/self/mountinfo (proc_pid_mountinfo(5)), or None."""
        for line in kernel_read("/proc/self/mountinfo").splitlines():
            before, _, after = line.partition(" - ")
            if after.startswith("cgroup2 "):
                root, point = (re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), word) for word in before.split()[3:5])
                break
        else:
            return None
        own = next((line[3:] for line in kernel_read("/proc/self/cgroup").splitlines() if line.startswith("0::")), "/")
        relative = os.path.relpath(own, root)
        return cls(point, point if relative.startswith(".") else f"{point}/{relative}")

    def highest_manageable(self) -> str | None:
        """The highest cgroup on the way down to the caller's in which the caller may make children and move
        processes: what a manager delegated (cgroup-v2.rst, Delegation).
        """
        path = self.point
        steps = [step for step in self.own[len(self.point) :].split("/") if step]
        for step in [None, *steps]:
            path = path if step is None else f"{path}/{step}"
            if all(os.access(f"{path}/{file}", os.W_OK) for file in (".", "cgroup.procs", "cgroup.subtree_control")):
                return path
        return None


@dataclasses.dataclass(frozen=True)
class CgroupTree:
    """The server's own tree: its root (None: this machine gives none) and what it enforces."""

    root: str | None
    controllers: frozenset[str]
    disks: tuple[Disk, ...]

    def job_path(self, uid: int, job_id: str) -> str:
        """Where a job's cgroup stands; empty where this machine gives none."""
        return f"{self.root}/u{uid}/{job_id}" if self.root else ""

    @property
    def shims(self) -> str:
        return f"{self.root}/shims" if self.root else ""

    def make_job(self, uid: int, job_id: str, limits: Limits) -> Cgroup:
        """A job's cgroup, made, with its limits written."""
        cgroup = Cgroup(f"{self.root}/u{uid}/{job_id}")
        owner = Cgroup(os.path.dirname(cgroup.path))
        owner.create()
        owner.enable(self.controllers)  # all when it is new, else what an earlier server did without
        cgroup.create()
        cgroup.limit(limits, self.controllers, self.disks)
        return cgroup

    def remove_unused(self) -> None:
        """Remove what no shim lives in and no job stands in: after a state folder's last job nothing is left."""
        if self.root:
            for folder in (*map(str, pathlib.Path(self.root).glob("u*")), self.shims, self.root):
                with contextlib.suppress(OSError):  # jobs go on in it
                    os.rmdir(folder)


def make_tree(place: str | None, folder: str, without: frozenset[str]) -> CgroupTree:
    """Make the tree of one state folder, `folder` being its name; refuse what is not in `without`.

    `place`, when given, is the tree's root instead of `jobworker` under the highest cgroup the caller
    may manage. Raises JobWorkerError naming each missing controller and the ways out.
    """
    mount = CgroupMount.find()
    top = place or (mount and tree_place(mount)) or None
    wanted = [name for name in CONTROLLERS if name not in without]
    if top is None:
        enforced: frozenset[str] = frozenset()
    else:
        enforced = enable_down_to(f"{top}/{folder}", frozenset(wanted))
    disks = whole_disks()
    missing = [name for name in wanted if name not in enforced]
    if missing and "auto" not in without:
        raise JobWorkerError(refusal(missing, mount, top))
    if top is None:
        return CgroupTree(None, frozenset(), ())
    tree = CgroupTree(f"{top}/{folder}", enforced, disks)
    shims = Cgroup(tree.shims)
    shims.create()
    if "io" in enforced:
        shims.limit(Limits(io=SHIMS_IO_LIMIT), ["io"], disks)
    return tree


def tree_place(mount: CgroupMount) -> str | None:
    """`jobworker` under the highest cgroup that the server may manage, which it leaves if it lives in it."""
    highest = mount.highest_manageable()
    if highest is None:
        return None
    real_root = not os.path.exists(f"{highest}/cgroup.type")  # only the kernel's own root lacks it
    if highest == mount.own and not real_root:
        if highest != mount.point and highest.endswith(".service"):
            unit = os.path.basename(highest)
            raise JobWorkerError(
                f"the only cgroup that this server may manage is its own unit {unit}, which systemd could not start "
                f"again while jobs live in it; run the unit as root or as a user's service (`systemctl --user`)"
            )
        leave_for_leaf(highest)
    return f"{highest}/jobworker"


def leave_for_leaf(cgroup: str) -> None:
    """Move the server, and only itself, out of an inner cgroup: one with processes gives its children no
    controllers (cgroup-v2.rst, No Internal Process Constraint).
    """
    leaf = Cgroup(f"{cgroup}/jobworker/server")
    leaf.create()
    leaf.attach(0)


def enable_down_to(path: str, controllers: frozenset[str]) -> frozenset[str]:
    """Enable controllers from the first cgroup that is not ours down to `path`, making what is missing; those that
    come through.
    """
    for step in (os.path.dirname(os.path.dirname(path)), os.path.dirname(path), path):
        if controllers:  # else nothing is left behind by a server that then refuses to start
            Cgroup(step).create()
            controllers = Cgroup(step).enable(controllers)
    return controllers


def whole_disks() -> tuple[Disk, ...]:
    """Every physical disk: a limit on a stacked device (dm, md, loop, zram) would count the same byte twice."""
    disks = []
    for name in sorted(os.listdir("/sys/block") if os.path.isdir("/sys/block") else []):
        stacked = re.match(r"(loop|ram|zram|dm-|md|sr|fd)\d*", name)
        number, size = kernel_read(f"/sys/block/{name}/dev").strip(), kernel_read(f"/sys/block/{name}/size").strip()
        if not stacked and number and size != "0":
            disks.append(Disk(number, name))
    return tuple(disks)


def refusal(missing: Sequence[str], mount: CgroupMount | None, top: str | None) -> str:
    """Why this machine cannot enforce the limits, and the ways out, in one sentence."""
    names = " and ".join(missing)
    skip = f"`--without {','.join(missing)}` to serve without these limits, or `--without auto`"
    if mount is None:
        return f"this machine has no cgroup2 mount, so it cannot limit {names}; mount one, or use {skip}"
    if top is None and os.geteuid() != 0:
        return (
            f"user {os.geteuid()} may not manage any cgroup from a login session, so {names} cannot be limited; run "
            f"`systemd-run --user --scope python3 jobworker.pyz serve --without io`, or as root, or use {skip}"
        )
    if top is None:
        return f"the cgroup2 mounted at {mount.point} is read-only here, so it cannot limit {names}; use {skip}"
    way = "boot with `systemd.unified_cgroup_hierarchy=1 cgroup_no_v1=all`"
    if os.geteuid() != 0:
        way = f"have root add `Delegate={' '.join(CONTROLLERS)}` to user@.service"
    return f"the cgroup2 at {mount.point} does not give {names} to {top}; {way}, or use {skip}"


# --- 4. Output log and inotify follower -----------------------------------------------------------------
# Owns the process's one inotify descriptor and the live ends of outputs that somebody follows. Reads
# outputs, never writes one. Nothing polls: a follower at the end of a file sleeps until the kernel says
# that it grew, or its owner that it will not grow any more. Source: inotify(7).

IN_MODIFY, IN_CLOSE_WRITE, IN_Q_OVERFLOW, IN_IGNORED, IN_ONESHOT = 0x2, 0x8, 0x4000, 0x8000, 0x80000000


@functools.cache
def splice_is_noticed(folder: str) -> bool:
    """Whether the kernel reports a splice into a file of that folder as IN_MODIFY: tried, once. It does not on the
    overlayfs of Linux 6.1, where a follower would wait for ever."""
    name = f"{folder}/.splice"
    with contextlib.ExitStack() as resources:

        def own(descriptor: int) -> int:
            resources.callback(os.close, descriptor)
            return descriptor

        try:
            file = own(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600))
            resources.callback(os.unlink, name)
            watcher = own(libc_call("inotify_init1", os.O_NONBLOCK | os.O_CLOEXEC))
            libc_call("inotify_add_watch", watcher, os.fsencode(name), ctypes.c_uint32(IN_MODIFY))
            reader, writer = map(own, os.pipe2(os.O_CLOEXEC))
            os.write(writer, b"x")
            os.splice(reader, file, 1)
            return bool(os.read(watcher, 16))
        except OSError:  # BlockingIOError: no event; EINVAL: no splice there at all
            return False


class Bell:
    """Wakes all tasks that wait for the next ring."""

    def __init__(self) -> None:
        self._next: asyncio.Event | None = None  # made by the first who waits: ten thousand ended jobs have none

    def ring(self) -> None:
        if self._next is not None:
            self._next.set()
            self._next = None

    async def wait(self) -> None:
        if self._next is None:
            self._next = asyncio.Event()
        await self._next.wait()


class Inotify:
    """The one inotify descriptor; a callback a watch, called in the event loop with the event's mask."""

    def __init__(self, overflowed: Callable[[], None]) -> None:
        self._overflowed = overflowed
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self._descriptor = -1

    def open(self) -> None:
        """Begin to listen, in the running loop."""
        try:
            self._descriptor = libc_call("inotify_init1", os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise KernelError("cannot watch files (fs.inotify.max_user_instances)", error) from error
        asyncio.get_running_loop().add_reader(self._descriptor, self._dispatch)

    @property
    def is_open(self) -> bool:
        return self._descriptor >= 0

    def close(self) -> None:
        if self._descriptor >= 0:
            asyncio.get_running_loop().remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1
            self._callbacks.clear()

    def watch(self, path: str, mask: int, callback: Callable[[int], None]) -> int:
        """Watch a file; its watch descriptor. The kernel knows one watch a file: whoever asks twice replaces."""
        try:
            watch = libc_call("inotify_add_watch", self._descriptor, os.fsencode(path), ctypes.c_uint32(mask))
        except OSError as error:
            raise KernelError(f"cannot watch {path} (fs.inotify.max_user_watches)", error) from error
        self._callbacks[watch] = callback
        return watch

    def unwatch(self, watch: int) -> None:
        """Give a watch up; one that is gone already (its file, or a one-shot that fired) is no error."""
        if self._callbacks.pop(watch, None) is not None and self._descriptor >= 0:
            with contextlib.suppress(OSError):
                libc_call("inotify_rm_watch", self._descriptor, watch)

    def __len__(self) -> int:
        return len(self._callbacks)

    def _dispatch(self) -> None:
        try:
            events = os.read(self._descriptor, 64 * KIB)
        except BlockingIOError:
            return
        offset = 0
        while offset < len(events):
            # struct inotify_event: int wd; uint32_t mask, cookie, len; char name[len]
            watch = int.from_bytes(events[offset : offset + 4], sys.byteorder, signed=True)
            mask = int.from_bytes(events[offset + 4 : offset + 8], sys.byteorder)
            offset += 16 + int.from_bytes(events[offset + 12 : offset + 16], sys.byteorder)
            self._deliver(watch, mask)

    def _deliver(self, watch: int, mask: int) -> None:
        if mask & IN_Q_OVERFLOW:
            self._overflowed()
        elif mask & IN_IGNORED:
            self._callbacks.pop(watch, None)
        elif callback := self._callbacks.get(watch):  # else: given up while the event was queued
            callback(mask)


class Output:
    """One output, open for all who follow it: one descriptor, which outlives the file's removal, and one read for
    those who are at the same byte.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._descriptor = -1
        self._recent = (0, b"")  # the last bytes read, with their offset

    def open(self) -> None:
        try:
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise KernelError(f"cannot open {self.path}", error) from error

    def close(self) -> None:
        os.close(self._descriptor)

    def read(self, offset: int) -> bytes:
        """Up to READ_BYTES bytes from `offset`; none at the end of the file."""
        if self._recent[0] == offset and self._recent[1]:
            return self._recent[1]
        try:
            chunk = os.pread(self._descriptor, READ_BYTES, offset)
        except OSError as error:
            raise KernelError(f"cannot read {self.path}", error) from error
        if chunk:
            self._recent = (offset, chunk)
        return chunk


class Tail:
    """The end of one output, shared by all who follow it: one watch, one wake-up, one `Output`.

    `acquire` and `release` count its followers.
    """

    def __init__(self, path: str, inotify: Inotify) -> None:
        self.output = Output(path)
        self._inotify = inotify
        self._followers = 0
        self._watch: int | None = None
        self._woken = 0.0  # when, by the loop's clock
        self.arm_count = 0  # how often it was armed: what was read before an arming may not have been the end
        self._bell = Bell()

    def acquire(self) -> None:
        if self._followers == 0:
            self.output.open()
        self._followers += 1

    def release(self) -> int:
        """One follower less; how many are left."""
        self._followers -= 1
        if self._followers == 0:
            self.output.close()
            self._disarm()
        return self._followers

    def arm(self) -> bool:
        """Ask for one event at the next change. True if that was news: then read once more, because what was
        written between the last read and now makes no event.
        """
        if self._watch is not None:
            return False
        self._watch = self._inotify.watch(self.output.path, IN_MODIFY | IN_ONESHOT, self._grew)
        self.arm_count += 1
        return True

    def _grew(self, _mask: int) -> None:
        """Wake the followers, at once when that is rare. Until then it counts as armed: who comes now waits too."""
        loop = asyncio.get_running_loop()
        rest = self._woken + COALESCE_SECONDS - loop.time()
        if rest > 0:
            loop.call_later(rest, self.wake)
        else:
            self.wake()

    def _disarm(self) -> None:
        if self._watch is not None:
            self._inotify.unwatch(self._watch)
            self._watch = None

    def wake(self) -> None:
        """It may have grown, or it will not grow any more: everybody looks."""
        self._woken = asyncio.get_running_loop().time()
        self._disarm()
        self._bell.ring()

    async def changed(self) -> None:
        await self._bell.wait()


# --- 5. Launcher and shim -------------------------------------------------------------------------------
# Owns what happens between the server's request and the job's process: the order (job.json), the record
# (`exit`), wishes (`control`), the launcher, the shim and the child. Of the server only class `Launcher`
# runs here; everything else runs in the small processes and may import nothing third-party.

FOLLOWS: dict[str, tuple[str, ...]] = {  # what may follow what in a record; nothing else counts
    "": ("born",),
    "born": ("started", "failed", "exited"),  # ended at once: the shim was lost on the brink
    "started": ("exited",),
    "failed": (),
    "exited": ("done",),
    "done": (),
}

MODULE = "jobworker"  # what the launcher imports: as `__main__` it would be compiled anew each time
FORK_HOOKS = ("PyOS_BeforeFork", "PyOS_AfterFork_Child", "PyOS_AfterFork_Parent")
CLONE_PIDFD, CLONE_INTO_CGROUP, SYS_CLONE3 = 0x1000, 0x200000000, 435
PR_SET_CHILD_SUBREAPER, FALLOC_FL_KEEP_SIZE = 36, 1
MIN_BATCH_BYTES, COALESCE_MILLISECONDS = 16 * KIB, 1
PIPE_BYTES = MIB  # of the job's pipe, where fs.pipe-max-size and the user's share allow it
RECORD_BYTES = 4 * KIB  # allocated when the job starts, so that a full disk cannot lose an exit code
PACKET_BYTES = 2 * KIB  # a longer spec is read from job.json: 64 packets must fit a socket's buffer


@dataclasses.dataclass(frozen=True)
class Spec:
    """What was asked for one job: the contents of its job.json. Seconds, bytes, seconds since 1970."""

    id: str
    owner: str
    command: str
    args: tuple[str, ...]
    uid: int
    gid: int
    groups: tuple[int, ...]
    user: str
    home: str
    cgroup: str  # empty: this machine has none for it
    controllers: tuple[str, ...]  # the limits that the kernel enforces
    timeout: float  # 0: none
    max_output: int
    reserve: int  # bytes of the file system that the output leaves free
    splice: bool  # whether followers would notice a splice into the output
    created: float
    limits: Limits  # last, as `from_packed` has it

    def plain(self) -> dict[str, Any]:
        """As built-in types, for json; `from_plain` reads it back."""
        return {**vars(self), "limits": vars(self.limits)}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Spec:
        """What a later version added is left out, so that an older one can take over; it must have a default here."""
        known = {name: plain[name] for name in cls.__dataclass_fields__ if name in plain}
        tuples = {name: tuple(plain[name]) for name in ("args", "groups", "controllers")}
        limits = {name: plain["limits"][name] for name in Limits.__dataclass_fields__ if name in plain["limits"]}
        return cls(**{**known, **tuples, "limits": Limits(**limits)})

    def packed(self) -> tuple[Any, ...]:
        """As built-in types without names, for marshal and a process of the same LAYOUT; `from_packed` reads it."""
        *plain, limits = vars(self).values()
        return *plain, tuple(vars(limits).values())

    @classmethod
    def from_packed(cls, values: tuple[Any, ...]) -> Spec:
        *plain, limits = values
        return cls(*[*plain, Limits(*limits)])

    def programs(self) -> list[str]:
        """Where the command is looked for, in this spec."""
        if "/" in self.command:
            return [self.command]
        return [f"{folder}/{self.command}" for folder in JOB_PATH.split(":")]

    def environment(self) -> dict[str, str]:
        return {
            "PATH": JOB_PATH,
            "HOME": self.home,
            "USER": self.user,
            "LANG": "C.UTF-8",
            "PYTHONUNBUFFERED": "1",
            JOB_ID_VARIABLE: self.id,
        }

    def processes(self) -> Cgroup | ProcessTree:
        return Cgroup(self.cgroup) if self.cgroup else ProcessTree(self.id)


LAYOUT = " ".join((*Spec.__dataclass_fields__, *Limits.__dataclass_fields__))


def write_spec(folder: str, spec: Spec) -> None:
    descriptor = os.open(f"{folder}/job.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(json.dumps(spec.plain()))


def read_spec(folder: str) -> Spec | None:
    """The order of a job's folder; None where it is missing or was half-written."""
    try:
        with open(f"{folder}/job.json", encoding="utf-8") as file:
            return Spec.from_plain(json.loads(file.read()))
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
        return None
    except OSError as error:
        raise KernelError(f"cannot read {folder}/job.json", error) from error


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a job's main process ended: status STOPPED or FINISHED, exit code as shells say it, and why."""

    status: str
    code: int
    signal: int = 0
    reason: str = ""
    by: str = ""  # who stopped it, as `encode_name` has it


LOST = Ending("FINISHED", 255, reason="LOST")


@dataclasses.dataclass(frozen=True)
class Events:
    """A job's record: its last line's word, and the facts of all lines as `word.key`."""

    phase: str = ""
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def seconds(self, word: str) -> float:
        """When that line was written, in seconds since 1970; 0: not yet."""
        return float(self.facts.get(f"{word}.at", 0))

    @property
    def failure(self) -> int:
        return int(self.facts.get("failed.errno", 0))

    @property
    def ending(self) -> Ending | None:
        if "exited.code" not in self.facts:
            return None
        status, code, number, reason, by = (
            self.facts[f"exited.{key}"] for key in ("status", "code", "signal", "reason", "by")
        )
        return Ending(status, int(code), int(number), self.facts.get("done.reason", reason).strip("-"), by.strip("-"))

    @property
    def usage(self) -> Usage:
        def number(name: str, kind: Callable[[str], Any]) -> Any:
            text = self.facts.get(f"done.{name}", "None")
            return None if text == "None" else kind(text)

        kinds = {"cpu_seconds": float, "memory_peak": int, "read_bytes": int, "written_bytes": int}
        return Usage(**{name: number(name, kind) for name, kind in kinds.items()})


def write_event(descriptor: int, word: str, **facts: object) -> None:
    """Append one line to a record; `read_events` is its reader. Values hold no blank; the dot says: complete."""
    pairs = "".join(f" {key}={'-' if value == '' else value}" for key, value in facts.items())
    os.write(descriptor, f"{word} at={time.time():.6f}{pairs} .\n".encode())


def read_events(folder: str) -> Events:
    """The record of a job's folder; a line that is torn, or may not follow the one before, does not count."""
    try:
        text = read_whole(f"{folder}/events").decode("ascii", "replace")
    except FileNotFoundError:
        return Events()
    except OSError as error:
        raise KernelError(f"cannot read {folder}/events", error) from error
    phase, facts = "", {}
    for line in text.splitlines():
        word, *pairs = line.split(" ")
        if pairs and pairs[-1] == "." and word in FOLLOWS[phase]:
            phase = sys.intern(word)
            for pair in pairs[:-1]:
                key, _, value = pair.partition("=")
                facts[f"{word}.{key}"] = value
    return Events(phase, facts)


@dataclasses.dataclass(frozen=True)
class StopRequest:
    """That a job be ended by force: for a limit's reason, or by somebody."""

    reason: str = ""
    by: str = ""


def encode_name(name: str) -> str:
    """A name of any characters as one word without blanks, for wishes and records."""
    return "".join(c if c.isalnum() and c.isascii() else f"%{ord(c):x}." for c in name)


def decode_name(word: str) -> str:
    return re.sub(r"%([0-9a-f]+)\.", lambda found: chr(int(found[1], 16)), word)


def send_stop(folder: str, by: str) -> bool:
    """Ask a job's shim to kill it; False when no shim lives. ENXIO is a FIFO without a reader (fifo(7))."""
    try:
        descriptor = os.open(f"{folder}/control", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENOENT):
            return False
        raise KernelError(f"cannot open {folder}/control", error) from error
    try:
        with contextlib.suppress(BlockingIOError):  # full of wishes: one of them will do
            os.write(descriptor, f"kill {encode_name(by)[:1000]}\n".encode())
    except BrokenPipeError:  # it has ended since
        return False
    finally:
        os.close(descriptor)
    return True


def receive_stop(control: int) -> StopRequest | None:
    """What was asked through `control`; the first request is the one that counts."""
    words = os.read(control, 4 * KIB).decode("ascii", "replace").split("\n")[0].split(" ")
    return StopRequest(by=words[1]) if words[0] == "kill" and len(words) == 2 else None


def shim_lives(folder: str) -> bool:
    """Whether anybody reads a job's `control`; a descriptor on its way to the launcher counts."""
    try:
        os.close(os.open(f"{folder}/control", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError:
        return False
    return True


async def cancelled(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait until it is."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


class Launcher:
    """The server's side of the launcher: exec's it, and again when it died; hands it one request at a time."""

    def __init__(self) -> None:
        self.start_slots = asyncio.Semaphore(STARTS_AT_ONCE)  # held while a request is on its way
        self.finish_slots = asyncio.Semaphore(FINISHES_AT_ONCE)  # held until its job is finished, which may take long
        self.queued: set[str] = set()  # jobs whose finisher waits for that
        self._waiting: set[asyncio.Task[None]] = set()  # for a place; an event loop alone would forget its tasks
        self._arguments: list[str] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None

    def open(self, shims: str) -> None:
        """Exec it. `shims` is the cgroup for it and its shims (empty: none); they, and the jobs, keep the
        RLIMIT_NOFILE that the server has now.
        """
        self._arguments = [shims, *map(str, resource.getrlimit(resource.RLIMIT_NOFILE))]
        self.ensure()

    def ensure(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        here.setblocking(False)
        folder = str(pathlib.Path(__file__).resolve().parent)
        code = f"import sys; sys.path.insert(0, {folder!r}); import {MODULE}; {MODULE}.launcher_main()"
        with there:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", code, str(there.fileno()), *self._arguments],
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                    pass_fds=[there.fileno()], start_new_session=True, cwd="/", env={},
                )  # fmt: skip
            except OSError as error:
                here.close()
                raise KernelError(f"cannot run {sys.executable} as the launcher", error) from error
        self._channel = here

    def run_in_turn(self, request: Coroutine[Any, Any, None]) -> None:
        """Have a request made that waits for a place by itself, with nobody who waits for it."""
        task = asyncio.get_running_loop().create_task(request)
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)

    async def forget_waiting(self) -> None:
        for task in list(self._waiting):
            await cancelled(task)

    @property
    def process(self) -> int:
        return self._process.pid if self._process else 0

    def send(self, kind: str, folder: str, spec: Spec, descriptors: Sequence[int]) -> None:
        """Hand over one request: `start` a job or `finish` one whose shim was lost."""
        packet = marshal.dumps((kind, folder, LAYOUT, spec.packed()))
        if len(packet) > PACKET_BYTES:
            packet = marshal.dumps((kind, folder, "", ()))
        self.ensure()
        try:
            self._send(packet, descriptors)
        except (BrokenPipeError, ConnectionResetError):  # it died since: a packet it never got is safe to send again
            self.close()
            self.ensure()
            self._send(packet, descriptors)

    def _send(self, packet: bytes, descriptors: Sequence[int]) -> None:
        assert self._channel is not None
        try:
            socket.send_fds(self._channel, [packet], list(descriptors))
        except (BlockingIOError, InterruptedError) as error:
            raise UnavailableError("the launcher has too many starts on their way; try again") from error

    def close(self) -> None:
        """Let it end: it does at the end of its channel, and what it started goes on."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is not None:
            self._process.wait()
            self._process = None


def launcher_main() -> NoReturn:
    """The launcher process, exec'ed by `Launcher`: receives requests and forks a shim for each."""
    number, shims, soft, hard = int(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:5])
    channel = socket.socket(fileno=number)
    prepare_launcher(shims, (soft, hard))
    while (request := receive_request(channel)) is not None:
        try:
            process = os.fork()
        except OSError:
            process = -1  # its descriptors close with no record begun: the server sees a job that never ran
        if process == 0:
            os.close(number)  # cheaper than `channel.close()`
            run_shim(*request)
        for descriptor in request[1]:
            os.close(descriptor)
    os._exit(0)


def prepare_launcher(shims: str, files: tuple[int, int]) -> None:
    """What shims and jobs inherit: default signals and limits, no zombies to wait for, a cgroup of their own."""
    os.umask(0o022)
    resource.setrlimit(resource.RLIMIT_NOFILE, files)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}:
        with contextlib.suppress(OSError):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended shims are reaped by the kernel
    with contextlib.suppress(KernelError):  # lowering it needs a privilege that the server may lack
        kernel_write("/proc/self/oom_score_adj", "0")
    if shims:
        Cgroup(shims).attach(0)
    fork_calls()  # found now, not in every shim
    gc.disable()
    gc.freeze()  # a collection in a shim would touch, and so copy, every page


def receive_request(channel: socket.socket) -> tuple[bytes, list[int]] | None:
    """One request, as `Launcher.send` packs it, and its descriptors; None when the server is gone.

    Not `socket.recv_fds`, which ignores its flags: without MSG_CMSG_CLOEXEC jobs would hold `control`.
    """
    packet, ancillary, _, _ = channel.recvmsg(PACKET_BYTES + KIB, socket.CMSG_SPACE(3 * 4), socket.MSG_CMSG_CLOEXEC)
    if not packet:
        return None
    descriptors = [number for _, _, data in ancillary for number in memoryview(data).cast("i")]
    return packet, descriptors


def run_shim(packet: bytes, descriptors: Sequence[int]) -> NoReturn:
    """The shim process. However it ends, it ends here; a record without `done` then says that it was lost."""
    control, record, *cgroup = descriptors
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        kind, folder, layout, packed = marshal.loads(packet)  # noqa: S302  our own server wrote it
        # Another layout: jobworker.py was replaced under a running server, whose launcher was exec'ed again since.
        spec = Spec.from_packed(packed) if layout == LAYOUT else read_spec(folder)
        if spec is None:
            write_event(record, "born")
            write_event(record, "failed", errno=errno.EIO)
        elif kind == "finish":
            finish_lost(folder, spec, record)
        else:
            Shim(folder, spec, control, record).run(cgroup[0] if cgroup else -1)
    except BaseException as error:  # noqa: BLE001
        with contextlib.suppress(OSError):  # for whoever looks: the line counts for nothing
            os.write(record, f"crashed {type(error).__name__} {error}\n".encode())
        os._exit(1)
    os._exit(0)


class Pump:
    """Moves what a job prints from its pipe into `output`, up to its cap and the disk's reserve."""

    def __init__(self, pipe: int, output: int, spec: Spec) -> None:
        self.pipe = pipe
        self.output = output
        self.open = True  # until every writer has closed
        self._spec = spec
        self.small_batch = False  # whether the last move was worth less than its cost, and the pipe has room for more
        self._written = 0
        self._unchecked = 0  # bytes since the last look at the disk
        self._splices = spec.splice
        self._min_batch = min(MIN_BATCH_BYTES, fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ) // 4)

    def move(self) -> StopRequest | None:
        """Move at most 1 MiB; the request to end the job when that was too much, for it or for the disk."""
        self.small_batch = False
        room = min(MIB, self._spec.max_output - self._written)
        try:
            moved = self._move(room) if room else self._waiting()
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
                raise
            return StopRequest("DISK_FULL")
        if moved == 0:
            self.open = False
        elif room == 0:
            return StopRequest("OUTPUT_LIMIT")
        self.small_batch = 0 < moved < self._min_batch
        self._written += moved
        self._unchecked += moved
        return self._look_at_disk() if self._unchecked >= MIB else None

    def _move(self, room: int) -> int:
        if self._splices:
            try:
                return os.splice(self.pipe, self.output, room)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
                self._splices = False  # a file system that refuses it
        chunk = os.read(self.pipe, min(room, 64 * KIB))
        rest = memoryview(chunk)
        while rest:
            rest = rest[os.write(self.output, rest) :]
        return len(chunk)

    def _waiting(self) -> int:
        """How many bytes wait in the pipe (FIONREAD, pipe(7)); none, when it was the end that woke us."""
        return int.from_bytes(fcntl.ioctl(self.pipe, termios.FIONREAD, bytes(4)), sys.byteorder)

    def _look_at_disk(self) -> StopRequest | None:
        self._unchecked = 0
        disk = os.fstatvfs(self.output)
        return StopRequest("DISK_FULL") if disk.f_bavail * disk.f_frsize < self._spec.reserve else None

    def drain(self) -> StopRequest | None:
        """Move what is in the pipe, and no more than fits one: whoever else holds it may write for ever."""
        limit = self._written + fcntl.fcntl(self.pipe, fcntl.F_GETPIPE_SZ)
        while self.open and self._written < limit:
            before = self._written
            request = self.move()
            if request or (self._written == before and self.open):
                return request
        return None


class Shim:
    """The parent of one job: pumps its output, carries out stops and limits, and finishes its record."""

    def __init__(self, folder: str, spec: Spec, control: int, record: int) -> None:
        self._folder = folder
        self._spec = spec
        self._control = control
        self._events = record
        self._processes = spec.processes()

    def run(self, cgroup: int) -> None:
        write_event(self._events, "born")
        output = os.open(f"{self._folder}/output", os.O_WRONLY | os.O_CLOEXEC)
        pipe, stdout = make_pipe(self._spec)
        if not self._spec.cgroup:  # what is left of the job then becomes the shim's, and is found by it
            libc_call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        deadline = time.monotonic() + self._spec.timeout if self._spec.timeout else None
        try:
            process, pidfd, errpipe_read = start_process(self._spec, cgroup, stdout)
            request = self._wait_for_exec(errpipe_read, pidfd, deadline)
            check_exec(process, errpipe_read)
        except OSError as error:
            write_event(self._events, "failed", errno=error.errno or errno.EINVAL)
            return
        os.close(stdout)
        if not self._spec.cgroup:
            reap_orphans(process)
        if cgroup >= 0:
            os.close(cgroup)
        write_event(self._events, "started")
        pump = Pump(pipe, output, self._spec)
        request = self._supervise(pump, pidfd, deadline, request)
        ending = self._ending(process, request or pump.drain(), forced=request is not None)
        write_event(self._events, "exited", **vars(ending))
        finish_job(self._folder, self._spec, self._events, ending, pump)

    def _wait_for_exec(self, errpipe_read: int, pidfd: int, deadline: float | None) -> StopRequest | None:
        """Wait until `report` tells of the exec: a lease or a disk may keep it. The request that ended that, if any."""
        poller = select.poll()
        for descriptor in (errpipe_read, self._control):
            poller.register(descriptor, select.POLLIN)
        while True:
            told = {descriptor for descriptor, _ in poller.poll(milliseconds_until(deadline))}
            request = self._stop_request(told, deadline)
            if request:
                self._kill(pidfd)
            if request or errpipe_read in told:
                return request

    def _stop_request(self, ready: set[int], deadline: float | None) -> StopRequest | None:
        """What a line in `control`, or the deadline, asks for."""
        request = receive_stop(self._control) if self._control in ready else None
        late = deadline is not None and time.monotonic() >= deadline
        return request or (StopRequest("TIMEOUT") if late else None)

    def _kill(self, pidfd: int) -> None:
        """Kill the job; its main process also where it has left its cgroup, as root may."""
        self._processes.kill()
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)

    def _supervise(
        self, pump: Pump, pidfd: int, deadline: float | None, request: StopRequest | None
    ) -> StopRequest | None:
        """Wait, in one poll, for the job's end, output, wishes and deadline; the request that ended it, if any."""
        poller = select.poll()
        for descriptor in (pidfd, pump.pipe, self._control):
            poller.register(descriptor, select.POLLIN)
        pause = select.poll()  # short lines that come fast share a move; nothing else waits for them
        for descriptor in (pidfd, self._control):
            pause.register(descriptor, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in poller.poll(milliseconds_until(deadline))}
            # The request is read first: one that came before the end is older than the end.
            new = self._stop_request(ready, deadline)
            if pump.pipe in ready:
                over = pump.move()
                new = over or new
                if over or not pump.open:
                    poller.unregister(pump.pipe)
            if new and request is None:
                request = new
                self._kill(pidfd)
            deadline = None if request else deadline
            if pidfd in ready:
                return request
            if pump.small_batch:
                pause.poll(COALESCE_MILLISECONDS)
                pump.small_batch = False

    def _ending(self, process: int, request: StopRequest | None, *, forced: bool) -> Ending:
        """How the main process ended. STOPPED only when it died of the kill that a request, or the kernel's
        out-of-memory killer, sent; a job that ended by itself keeps its code, and what its output lacks is said.
        """
        result = os.waitid(os.P_PID, process, os.WEXITED)
        assert result is not None
        exited = result.si_code == os.CLD_EXITED
        code, number = (result.si_status, 0) if exited else (128 + result.si_status, result.si_status)
        if number == signal.SIGKILL and forced and request:
            return Ending("STOPPED", code, number, request.reason, request.by)
        if number == signal.SIGKILL and self._processes.out_of_memory_kills():
            return Ending("STOPPED", code, number, "OOM")
        truncated = request.reason if request and request.reason != "TIMEOUT" else ""
        return Ending("FINISHED", code, number, truncated)


def milliseconds_until(deadline: float | None) -> int | None:
    """For poll(2), which takes an int: at most a day at a time, and never less than what remains."""
    if deadline is None:
        return None
    return min(86_400_000, max(0, int((deadline - time.monotonic()) * 1000) + 1))


def make_pipe(spec: Spec) -> tuple[int, int]:
    """The job's stdout and stderr: owned by the job, so that it can open /dev/stderr; read without waiting."""
    pipe, stdout = os.pipe2(os.O_CLOEXEC)
    with contextlib.suppress(OSError):  # EPERM above the user's share of pipe memory: the default size does
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    os.set_blocking(pipe, False)
    if spec.uid != os.geteuid():
        os.fchown(stdout, spec.uid, spec.gid)
    return pipe, stdout


def reap_orphans(job: int) -> None:
    """Wait for whatever the job's processes leave to their subreaper, but not for the job itself: `_ending` does."""

    def reap(_number: int, _frame: object) -> None:
        with contextlib.suppress(ChildProcessError):
            while (child := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and child.si_pid != job:
                os.waitpid(child.si_pid, 0)

    signal.signal(signal.SIGCHLD, reap)


def start_process(spec: Spec, cgroup: int, stdout: int) -> tuple[int, int, int]:
    """Start the job's process in its cgroup; its pid, its pidfd, and the pipe on which it reports (`check_exec`)."""
    errpipe_read, errpipe_write = os.pipe2(os.O_CLOEXEC)
    process, pidfd, placed = clone_into(cgroup)
    if process == 0:
        become_job(spec, stdout, errpipe_write, "" if placed else spec.cgroup)
    os.close(errpipe_write)
    return process, pidfd, errpipe_read


def check_exec(process: int, errpipe_read: int) -> None:
    """Wait until the job's command runs. Raises OSError with the errno of its exec."""
    failure = os.read(errpipe_read, 16)  # the end of file is a successful exec: the pipe closes on exec
    os.close(errpipe_read)
    if failure:
        os.waitpid(process, 0)
        raise OSError(int(failure), os.strerror(int(failure)))


@functools.cache
def fork_calls() -> list[Callable[..., Any]]:
    """syscall(2), and what the interpreter wants called around a fork that it does not make itself."""
    return [libc().syscall, *(getattr(ctypes.pythonapi, name) for name in FORK_HOOKS)]


def clone_into(cgroup: int) -> tuple[int, int, bool]:
    """Fork into a cgroup (clone3(2)): pid (0: the child), pidfd, and whether the child was born there.

    Against writing cgroup.procs afterwards this does not wait for an RCU grace period: 2.5 ms instead of
    10 to 18 a start. Before Linux 5.7, or where a container's filter refuses it, an ordinary fork.
    """
    if cgroup >= 0:
        pidfd = ctypes.c_int(-1)
        flags = CLONE_PIDFD | CLONE_INTO_CGROUP
        words = (flags, ctypes.addressof(pidfd), 0, 0, signal.SIGCHLD, 0, 0, 0, 0, 0, cgroup)  # struct clone_args
        arguments = b"".join(word.to_bytes(8, sys.byteorder) for word in words)
        syscall, before_fork, in_child, in_parent = fork_calls()
        before_fork()
        process = syscall(ctypes.c_long(SYS_CLONE3), arguments, ctypes.c_size_t(len(arguments)))
        if process == 0:
            in_child()
            return 0, -1, True
        in_parent()
        if process > 0:
            return process, pidfd.value, True
    process = os.fork()
    return process, os.pidfd_open(process) if process else -1, False


def become_job(spec: Spec, stdout: int, errpipe_write: int, cgroup: str) -> NoReturn:
    """The child: takes its place and identity, and execs. Every exception travels back as an errno."""
    failure = errno.EINVAL  # a ValueError: what execve(2) cannot be given at all
    try:
        if cgroup:
            Cgroup(cgroup).attach(0)
        os.setsid()
        os.dup2(stdout, 1)
        os.dup2(stdout, 2)
        if os.geteuid() == 0:
            os.setgroups(spec.groups)
            os.setresgid(spec.gid, spec.gid, spec.gid)
            os.setresuid(spec.uid, spec.uid, spec.uid)
        try:
            os.chdir(spec.home)
        except OSError:
            os.chdir("/")  # as sshd does for an account without a home
        exec_first(spec.programs(), [spec.command, *spec.args], spec.environment())
    except OSError as error:
        failure = error.errno or failure
    except JobWorkerError as error:
        failure = getattr(error, "errno", failure)
    finally:
        os.write(errpipe_write, str(failure).encode())
        os._exit(127)


def exec_first(programs: Sequence[str], arguments: list[str], environment: Mapping[str, str]) -> NoReturn:
    """Run the first program that can be, as execvp(3) does, at a third of the cost of `os.execvpe`. Raises the OSError
    of the first that is there, else of the last.
    """
    failure = OSError(errno.ENOENT, "no program")
    for path in programs:
        try:
            os.execve(path, arguments, environment)  # noqa: S606
        except OSError as error:
            if failure.errno in (errno.ENOENT, errno.ENOTDIR):
                failure = error
    raise failure


def finish_job(folder: str, spec: Spec, record: int, ending: Ending, pump: Pump | None) -> None:
    """Everything after the main process's end: what it left behind is killed, the last output is kept, and
    the record is completed, last. Each step may be the last one before a crash: `finish_lost` repeats them.
    """
    processes = spec.processes()
    processes.kill_all()
    rest = pump.drain() if pump else None
    usage = processes.usage()
    processes.remove()
    reason = ending.reason or (rest.reason if rest else "") or ("" if sync_folder(folder) else "DISK_FULL")
    write_event(record, "done", reason=reason, **vars(usage))
    os.fsync(record)


def finish_lost(folder: str, spec: Spec, record: int) -> None:
    """Finish a job whose shim is gone: with the ending that its record has, else as LOST."""
    ending = read_events(folder).ending
    os.write(record, b"\n")  # what the lost shim may have torn is then a line of its own
    if ending is None:
        ending = LOST
        write_event(record, "exited", **vars(ending))
    finish_job(folder, spec, record, ending, None)


def sync_folder(folder: str) -> bool:
    """Make a job's folder durable, its record aside; False where the disk did not take it all (fsync(2))."""
    try:
        for path in (f"{folder}/job.json", f"{folder}/output", folder, os.path.dirname(folder)):
            sync(path)
    except OSError:
        return False
    return True


def sync(path: str | pathlib.Path) -> None:
    """Make a file or a folder durable (fsync(2))."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- 6. Job and job table -------------------------------------------------------------------------------
# Owns the state folder: who may run as what, one folder a job, the table of jobs, recovery, retention. The
# public face of the library: everything about jobs, nothing of gRPC, TLS or who is allowed what.


@dataclasses.dataclass(frozen=True)
class WorkerOptions:
    """How one `Worker` behaves. Seconds, bytes; 0 means none where that makes sense."""

    state: pathlib.Path
    cgroup: str | None = None  # the tree's root instead of the one by rule
    without: frozenset[str] = frozenset()  # controllers that need not be enforced; "auto": whatever is missing
    defaults: Limits = Limits()
    caps: Limits = Limits()
    timeout: float = 0.0
    max_output: int = OUTPUT_LIMIT
    keep: float = KEEP_SECONDS
    keep_bytes: int = 0
    reserve: float = RESERVE
    max_jobs: int = MAX_JOBS


@dataclasses.dataclass(frozen=True)
class JobRequest:
    """What a caller asks for; None and empty mean the server's defaults."""

    command: str
    args: tuple[str, ...] = ()
    owner: str = ""
    id: str = ""
    cpu: float | None = None
    memory: int | None = None
    pids: int | None = None
    io: int | None = None
    timeout: float | None = None
    max_output: int | None = None
    run_as: str = ""


@dataclasses.dataclass(frozen=True)
class JobStatus:
    """All that is known of a job. `status` is RUNNING, STOPPED or FINISHED; `ending` is there once it ended."""

    status: str
    spec: Spec
    ending: Ending | None
    usage: Usage
    started: float  # seconds since 1970; 0: not yet
    ended: float
    output_bytes: int
    notes: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        return self.ending.code if self.ending else 0

    @property
    def stopped_by(self) -> str:
        return decode_name(self.ending.by) if self.ending else ""


@dataclasses.dataclass(frozen=True)
class Account:
    """As what a job runs."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    name: str
    home: str

    @classmethod
    def own(cls) -> Account:
        """The server's own: all that a server without root can give."""
        try:
            entry = pwd.getpwuid(os.geteuid())
            name, home = entry.pw_name, entry.pw_dir
        except KeyError:
            name, home = str(os.geteuid()), "/"
        return cls(os.geteuid(), os.getegid(), (), name, home)

    @classmethod
    def named(cls, name: str) -> Account:
        """An account of this machine, with its groups. Raises BadRequestError where there is none."""
        try:
            entry = pwd.getpwnam(name)
        except (KeyError, ValueError):
            raise BadRequestError(f"this machine has no account {name!r} to run as") from None
        return cls(entry.pw_uid, entry.pw_gid, tuple(os.getgrouplist(name, entry.pw_gid)), name, entry.pw_dir)


class Accounts:
    """Each owner's own unprivileged uid and private home, remembered in the state folder.

    `<state>/owners/UID` holds the owner's name; `<state>/home/UID` is the home. A range of uids belongs to one
    state folder, so that two servers never give the same one.
    """

    def __init__(self, state: pathlib.Path) -> None:
        self._owners = state / "owners"
        self._homes = state / "home"
        self._uids: dict[str, int] = {}

    def open(self) -> None:
        self._owners.mkdir(mode=0o700, exist_ok=True)
        self._homes.mkdir(mode=0o711, exist_ok=True)
        self._homes.chmod(0o711)
        for path in self._owners.iterdir():
            if path.name.isdigit():
                self._uids[path.read_bytes().decode("utf-8", "surrogateescape")] = int(path.name)

    def of(self, owner: str) -> Account:
        try:
            uid = self._uids.get(owner) or self._remember(owner)
            home = f"{self._homes}/{uid}"
            if not os.path.exists(home):
                os.mkdir(home, 0o700)
            if os.stat(home).st_uid != uid:  # new, or made by a server that died right here
                os.chown(home, uid, uid)
        except OSError as error:
            raise disk_error(f"cannot make a home for {owner!r}", error) from error
        return Account(uid, uid, (), owner, home)

    def _remember(self, owner: str) -> int:
        first, count = uid_range(str(self._owners))
        taken = set(self._uids.values())
        uid = next((uid for uid in range(first, first + count) if uid not in taken), None)
        if uid is None:
            raise ExhaustedError(f"all {count} uids of this server are given to owners")
        new = self._owners / f"new-{uid}"
        new.write_bytes(owner.encode("utf-8", "surrogateescape"))
        sync(new)
        new.rename(self._owners / str(uid))  # whole or not at all: a uid must never change its owner
        sync(self._owners)
        self._uids[owner] = uid
        return uid


def uid_range(place: str) -> tuple[int, int]:
    """The first uid and the number of uids for a state folder, inside what this user namespace maps."""
    first = UID_RANGES_BASE + zlib.crc32(place.encode("utf-8", "surrogateescape")) % UID_RANGES * UID_RANGE
    maps = [tuple(map(int, line.split())) for line in kernel_read("/proc/self/uid_map").splitlines()]
    if any(inside <= first and first + UID_RANGE <= inside + count for inside, _, count in maps):
        return first, UID_RANGE
    inside, _, count = max(maps, key=lambda found: found[2])
    return inside + count // 2, count // 4  # a rootless container: above what its distribution uses


class Job:
    """One job of the table: its folder, and what of it the server has at hand. All of it can be read back."""

    __slots__ = ("_spec", "attempts", "bell", "events", "folder", "id", "tail", "watch")

    def __init__(self, jobs: str, job_id: str) -> None:
        self.id = job_id
        self.folder = f"{jobs}/{job_id}"
        self.events = Events()
        self.bell = Bell()  # rings at every change of the record, and when the job leaves the table
        self.tail: Tail | None = None  # while somebody follows
        self.watch: int | None = None  # on `exit`, until the shim is gone
        self.attempts = 0  # finishers sent after a lost shim
        self._spec: Spec | None = None

    @property
    def ended(self) -> bool:
        return self.events.phase == "done"

    @property
    def spec(self) -> Spec:
        """What was asked. Raises NoSuchJobError where job.json is gone or unreadable."""
        return self._spec or spec_of(self)

    def ring(self) -> None:
        """Wake whoever waits for the job or follows it."""
        self.bell.ring()
        if self.tail is not None:
            self.tail.wake()

    def keep_spec(self, spec: Spec | None) -> None:
        """Keep the order at hand while the job runs; of ten thousand ended ones nobody needs it."""
        self._spec = spec

    def refresh(self, *, closed: bool) -> None:
        """Read the record again. `done` counts only once the shim has let go of it: then it is on the disk."""
        events = read_events(self.folder)
        if closed or events.phase != "done":
            self.events = events
        self.bell.ring()

    def fate(self, *, alive: bool) -> str:
        """What a job is, whose shim lives or not: the first rule that fits."""
        events = self.events
        if events.phase == "done":
            return "ended"
        if alive:
            return "running"
        if events.phase in ("", "failed"):
            return "never ran"
        return "unfinished" if read_spec(self.folder) else "unreadable"

    def output_bytes(self) -> int:
        try:
            return os.stat(f"{self.folder}/output").st_size
        except OSError:
            return 0


@functools.lru_cache(maxsize=1)  # a call asks twice; and an order may take megabytes
def spec_of(job: Job) -> Spec:
    """The order of an ended job, from its folder. Raises NoSuchJobError."""
    spec = read_spec(job.folder)
    if spec is None:
        raise NoSuchJobError(job.id)
    return spec


class Retention:
    """The ended jobs, oldest first, and which of them are to be forgotten next."""

    def __init__(self, keep: float, keep_bytes: int) -> None:
        self._keep = keep
        self._keep_bytes = keep_bytes
        self._sizes: dict[Job, int] = {}  # in the order in which they ended
        self._total = 0
        self.bell = Bell()

    def add(self, job: Job) -> None:
        self._sizes[job] = size = job.output_bytes() if self._keep_bytes else 0
        self._total += size
        if len(self._sizes) == 1 or (self._keep_bytes and self._total > self._keep_bytes):
            self.bell.ring()

    def discard(self, job: Job) -> None:
        self._total -= self._sizes.pop(job, 0)

    def __len__(self) -> int:
        return len(self._sizes)

    def seconds_left(self) -> float | None:
        """How long until the oldest is due; None while there is nothing to wait for."""
        oldest = next(iter(self._sizes), None)
        if oldest is None:
            return None
        if self._keep_bytes and self._total > self._keep_bytes:
            return 0.0
        return max(0.0, oldest.events.seconds("done") + self._keep - time.time()) if self._keep else None

    def oldest(self) -> Job:
        return next(iter(self._sizes))


class Worker:
    r"""Jobs on this machine: start, stop, status, stream and remove, with everything in one state folder.

    Use it in an event loop, as an asynchronous context manager. It needs no gRPC, no TLS and nothing third-party;
    who may do what to which job is its caller's business. Every error is a JobWorkerError.

    >>> import asyncio, pathlib, tempfile
    >>> async def example(state: str) -> None:
    ...     options = WorkerOptions(state=pathlib.Path(state), without=frozenset({"auto"}))
    ...     async with Worker(options) as worker:
    ...         job = await worker.start(JobRequest("sh", ("-c", "echo hello; exit 3"), owner="alice"))
    ...         async for chunk in worker.stream(job):
    ...             print(chunk)
    ...         status = worker.status(job)
    ...         print(status.status, status.exit_code)
    ...         await worker.stop(job, by="alice")  # an ended job stays as it is
    ...         worker.remove(job)
    >>> with tempfile.TemporaryDirectory() as state:
    ...     asyncio.run(example(state))
    b'hello\n'
    FINISHED 3
    """

    def __init__(self, options: WorkerOptions) -> None:
        self.options = options
        self._table: dict[str, Job] = {}
        self._resources = contextlib.AsyncExitStack()
        self._tree = CgroupTree(None, frozenset(), ())
        self._inotify = Inotify(self._look_again)
        self._launcher = Launcher()
        self._accounts = Accounts(options.state)
        self._retention = Retention(options.keep, options.keep_bytes)

    # -- Opening and closing

    async def __aenter__(self) -> Self:
        """Take the state folder and read its jobs back: after a crash as after anything else."""
        check_kernel()
        async with contextlib.AsyncExitStack() as resources:
            make_state_folder(self.options.state)
            resources.callback(os.close, lock_state_folder(self.options.state))
            self._tree = make_tree(self.options.cgroup, state_name(self.options.state), self.options.without)
            resources.callback(self._tree.remove_unused)
            self._accounts.open()
            self._inotify.open()
            resources.callback(self._inotify.close)
            self._launcher.open(self._tree.shims)
            resources.callback(self._launcher.close)
            resources.push_async_callback(self._launcher.forget_waiting)
            self._recover()
            retaining = asyncio.create_task(self._retain())
            resources.push_async_callback(cancelled, retaining)
            self._resources = resources.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.begin_shutdown()
        await self._resources.aclose()

    def begin_shutdown(self) -> None:
        """Tell everybody who follows or waits that this server ends (UnavailableError); the jobs go on."""
        self._inotify.close()
        for job in self._table.values():
            job.ring()

    @property
    def running(self) -> int:
        """How many jobs have not ended."""
        return len(self._table) - len(self._retention)

    def notes(self) -> tuple[str, ...]:
        """What this machine, or serving without root, does not give every job; a sentence each."""
        return job_notes(self._tree.root is not None, self._tree.controllers, separate=os.geteuid() == 0)

    # -- Start: the steps of the design's section 4, each safe to die after

    async def start(self, request: JobRequest) -> str:
        """Start a command and return its job's id, once it runs.

        With a UUID4 of the caller's own in `request.id`, asking twice is asking once. Raises BadRequestError for
        what cannot be run, IdTakenError, ExhaustedError, UnavailableError.
        """
        check_request(request)
        for _ in range(2):
            async with self._launcher.start_slots:
                job = self._same_job(request) or self._begin(self._spec(request))
                await self._until(job, lambda: job.events.phase != "" or not self._in_table(job))  # noqa: B023
            if await self._began(job):
                return job.id
        raise UnavailableError("the launcher died before it could start the job; try again")

    async def _began(self, job: Job) -> bool:
        """Wait until a job's command runs. False: its request was lost before anybody tried, and may be made again."""
        await self._until(job, lambda: job.events.phase not in ("", "born") or not self._in_table(job))
        if job.events.failure:
            await self._until(job, lambda: not self._in_table(job))  # nothing of it is left then
            raise start_failure(job.events.failure, job.spec)
        return job.events.phase != ""

    def _same_job(self, request: JobRequest) -> Job | None:
        """The job that an earlier try with the same id began."""
        job = self._table.get(request.id)
        if job is None:
            return None
        spec = job.spec
        if (spec.owner, spec.command, spec.args) != (request.owner, request.command, request.args):
            raise IdTakenError(f"the job id {request.id} is taken by another owner or command")
        return job

    def _spec(self, request: JobRequest) -> Spec:
        """The whole spec: the request, the defaults and caps, the account and the cgroup's name."""
        options = self.options
        if self.running >= options.max_jobs:
            raise ExhaustedError(f"{self.running} jobs are running, and `serve --max-jobs` allows no more")
        reserve = checked_reserve(options.state, options.reserve)
        account = self._account(request)
        job_id = request.id or new_job_id()
        return Spec(
            id=job_id, owner=request.owner, command=request.command, args=request.args,
            uid=account.uid, gid=account.gid, groups=account.groups, user=account.name, home=account.home,
            cgroup=self._tree.job_path(account.uid, job_id), controllers=tuple(sorted(self._tree.controllers)),
            limits=limits_of(request, options),
            timeout=options.timeout if request.timeout is None else request.timeout,
            max_output=capped("max-output", request.max_output, options.max_output, options.max_output),
            reserve=reserve, splice=splice_is_noticed(str(options.state)), created=time.time(),
        )  # fmt: skip

    def _account(self, request: JobRequest) -> Account:
        if os.geteuid() == 0:
            return Account.named(request.run_as) if request.run_as else self._accounts.of(request.owner)
        own = Account.own()
        if request.run_as not in ("", own.name):
            raise BadRequestError(f"this server runs as {own.name}, and only root can run a job as {request.run_as!r}")
        return own

    def _begin(self, spec: Spec) -> Job:
        if not self._inotify.is_open:
            raise UnavailableError("the server is stopping and starts no job any more")
        job = Job(self._jobs, spec.id)
        with contextlib.ExitStack() as undo:
            make_job_folder(job)
            undo.callback(self._delete, job)
            job.keep_spec(spec)
            self._table[job.id] = job
            with contextlib.ExitStack() as handed:
                descriptors = make_job_files(job.folder, handed)
                try:
                    write_spec(job.folder, spec)
                except OSError as error:
                    raise disk_error(f"cannot write {job.folder}/job.json", error) from error
                self._watch(job)
                descriptors += self._make_cgroup(spec, handed)
                self._launcher.send("start", job.folder, spec, descriptors)
            undo.pop_all()
        return job

    def _make_cgroup(self, spec: Spec, handed: contextlib.ExitStack) -> list[int]:
        if not spec.cgroup:
            return []
        cgroup = self._tree.make_job(spec.uid, spec.id, spec.limits)
        descriptor = cgroup.open()
        handed.callback(os.close, descriptor)
        return [descriptor]

    # -- Status, stop, stream, remove

    def job(self, job_id: str) -> Job:
        """The job of that id. Raises NoSuchJobError."""
        try:
            return self._table[job_id]
        except KeyError:
            raise NoSuchJobError(job_id) from None

    def status(self, job_id: str) -> JobStatus:
        job = self.job(job_id)
        spec, events = job.spec, job.events
        ending = events.ending if job.ended else None
        return JobStatus(
            status=ending.status if ending else "RUNNING",
            spec=spec,
            ending=ending,
            usage=events.usage,
            started=events.seconds("started"),
            ended=events.seconds("exited") if ending else 0.0,
            output_bytes=job.output_bytes(),
            notes=job_notes(spec.cgroup != "", spec.controllers, separate=spec.uid not in (0, os.geteuid())),
        )

    async def stop(self, job_id: str, by: str = "") -> None:
        """Kill the whole job and return when it is dead; an ended job stays as it is."""
        job = self.job(job_id)
        if job.ended:
            return
        if not send_stop(job.folder, by):
            job.refresh(closed=True)
            self._settle(job, alive=False)
        try:
            await asyncio.wait_for(self._until(job, lambda: job.ended or not self._in_table(job)), STOP_SECONDS)
        except asyncio.TimeoutError:
            raise UnavailableError(
                f"job {job_id} was killed but has not died within {STOP_SECONDS:.0f} s (a process that waits for a "
                f"disk or a network file system cannot); ask again"
            ) from None

    async def stop_all(self, by: str = "") -> None:
        """Stop every running job, all at once, and those that are started meanwhile."""
        while running := [job.id for job in self._table.values() if not job.ended]:
            await asyncio.gather(*(self.stop(job_id, by) for job_id in running))

    async def stream(self, job_id: str, offset: int = 0) -> AsyncGenerator[bytes, None]:
        """The job's output from byte `offset`, live, until the job has ended and everything was given."""
        job = self.job(job_id)
        tail = job.tail = job.tail or Tail(f"{job.folder}/output", self._inotify)
        tail.acquire()
        try:
            while True:
                over = job.ended or not self._in_table(job)  # asked before the read, which then has every byte
                arm_count = tail.arm_count
                if chunk := tail.output.read(offset):
                    offset += len(chunk)
                    yield chunk
                elif over:
                    return
                if over or len(chunk) == READ_BYTES:
                    continue
                if not self._inotify.is_open:
                    raise UnavailableError("the server is stopping; the job goes on")
                if not tail.arm() and tail.arm_count == arm_count:
                    await tail.changed()
        finally:
            if tail.release() == 0:
                job.tail = None

    def remove(self, job_id: str) -> None:
        """Forget an ended job and its output. Raises StillRunningError."""
        job = self.job(job_id)
        if not job.ended:
            raise StillRunningError(f"job {job_id} is running; stop it first")
        self._delete(job)

    # -- What the kernel tells: records that change, shims that are gone

    @property
    def _jobs(self) -> str:
        return f"{self.options.state}/jobs"

    def _in_table(self, job: Job) -> bool:
        return self._table.get(job.id) is job

    async def _until(self, job: Job, reached: Callable[[], bool]) -> None:
        while not reached():
            if not self._inotify.is_open:
                raise UnavailableError("the server is stopping; the job goes on")
            await job.bell.wait()

    def _watch(self, job: Job) -> None:
        def changed(mask: int) -> None:
            closed = bool(mask & IN_CLOSE_WRITE)
            job.refresh(closed=closed)
            if closed:  # the last descriptor: the shim is gone, whatever else of it may linger a moment
                self._settle(job, alive=False)

        job.watch = self._inotify.watch(f"{job.folder}/events", IN_MODIFY | IN_CLOSE_WRITE, changed)

    def _look_again(self) -> None:
        """Events were lost (IN_Q_OVERFLOW): look at every running job, and have every follower look."""
        for job in [job for job in self._table.values() if not job.ended]:
            alive = shim_lives(job.folder)
            job.refresh(closed=not alive)
            self._settle(job, alive=alive)
        for job in self._table.values():
            job.ring()

    def _settle(self, job: Job, *, alive: bool) -> None:
        """Do what a job's fate asks for."""
        actions: dict[str, Callable[[Job], None]] = {
            "running": lambda _job: None,
            "ended": self._retire,
            "never ran": self._delete,
            "unreadable": self._quarantine,
            "unfinished": self._finish,
        }
        actions[job.fate(alive=alive)](job)

    def _retire(self, job: Job) -> None:
        if job.watch is not None:
            self._inotify.unwatch(job.watch)
            job.watch = None
        job.keep_spec(None)
        self._retention.add(job)
        job.ring()

    def _finish(self, job: Job) -> None:
        """Have a shim that was lost replaced by one that only finishes: it kills what is left and says LOST."""
        if job.id in self._launcher.queued:
            return
        job.attempts += 1
        if job.attempts > 3:
            say(f"job {job.id} cannot be finished; its record {job.folder}/events says why")
            return
        if job.events.ending is None:
            say(f"the shim of job {job.id} is gone without a record: killing what is left of it")
        self._launcher.queued.add(job.id)  # until it holds `control`, and so can be seen to live
        self._launcher.run_in_turn(self._finish_in_turn(job, job.attempts))

    async def _finish_in_turn(self, job: Job, attempt: int) -> None:
        """After a power cut hundreds may be lost, and only so many requests can be on their way at once."""
        async with self._launcher.finish_slots:
            try:
                with contextlib.ExitStack() as handed:
                    handed.callback(self._launcher.queued.discard, job.id)
                    descriptors = open_job_files(job.folder, handed)
                    self._launcher.send("finish", job.folder, job.spec, descriptors)
                await self._until(job, lambda: job.ended or job.attempts != attempt or not self._in_table(job))
            except (JobWorkerError, OSError) as error:
                if self._inotify.is_open:
                    say(f"job {job.id} is not finished yet: {error}")

    def _remove_from_table(self, job: Job) -> None:
        """Take a job out of the table; whoever waits for it sees that."""
        if job.watch is not None:
            self._inotify.unwatch(job.watch)
            job.watch = None
        if self._in_table(job):
            del self._table[job.id]
        self._retention.discard(job)
        job.ring()

    def _delete(self, job: Job) -> None:
        """The one place that deletes a job: its cgroup, then its folder, the record first, so that what a crash
        leaves is a job that never ran.
        """
        try:
            spec = read_spec(job.folder)
            if spec is not None:
                spec.processes().remove()
            delete_job_folder(job.folder)
        except (JobWorkerError, OSError) as error:
            say(f"job {job.id} is not wholly removed: {error}")
        self._remove_from_table(job)

    def _quarantine(self, job: Job) -> None:
        """Keep, where nobody stumbles over it, what cannot be understood."""
        aside = self.options.state / "quarantine"
        try:
            aside.mkdir(mode=0o700, exist_ok=True)
            os.rename(job.folder, aside / f"{job.id}-{time.time_ns()}")
            say(f"{job.folder} cannot be read as a job; it is now in {aside}")
        except OSError as error:  # a full disk: the next start tries again
            say(f"{job.folder} cannot be read as a job, nor moved to {aside}: {error.strerror}")
        self._remove_from_table(job)

    # -- Recovery and retention

    def _recover(self) -> None:
        """Read every job folder back: adopt what runs, keep what ended, clear away what never ran."""
        ended = []
        for name in os.listdir(self._jobs):
            job = Job(self._jobs, name)
            if JOB_ID.fullmatch(name) is None or not os.path.isdir(job.folder):
                self._quarantine(job)
                continue
            self._table[name] = job
            job.events = read_events(job.folder)
            if job.ended:
                ended.append(job)
            else:
                self._adopt(job)
        for job in sorted(ended, key=lambda job: job.events.seconds("done")):
            self._retire(job)

    def _adopt(self, job: Job) -> None:
        """Watch first, then read: what the shim writes in between is either read or an event."""
        if os.path.exists(f"{job.folder}/events"):
            self._watch(job)
        alive = shim_lives(job.folder)
        job.refresh(closed=not alive)
        job.keep_spec(read_spec(job.folder))
        self._settle(job, alive=alive)

    async def _retain(self) -> None:
        """Forget ended jobs when their time, or the room for them, is over; one at a time, so that it is not felt."""
        while True:
            left = self._retention.seconds_left()
            if left == 0.0:
                self._delete(self._retention.oldest())
                await asyncio.sleep(0)
                continue
            # Not asyncio.wait_for, which may swallow a cancellation (until Python 3.12).
            ring = self._retention.bell.ring
            timer = None if left is None else asyncio.get_running_loop().call_later(left, ring)
            try:
                await self._retention.bell.wait()
            finally:
                if timer is not None:
                    timer.cancel()


def check_kernel() -> None:
    """Refuse a kernel without pidfds that can be waited for (Linux 5.4)."""
    release = os.uname().release
    version = tuple(map(int, re.findall(r"\d+", release)[:2]))
    if version < (5, 4):
        raise JobWorkerError(f"this is Linux {release}, and serving jobs needs 5.4 or newer")


def make_state_folder(state: pathlib.Path) -> None:
    """Make what is missing; jobs pass through the state folder to their homes, and through nothing else."""
    mode = 0o711 if os.geteuid() == 0 else 0o700
    try:
        state.mkdir(mode=mode, parents=True, exist_ok=True)
        state.chmod(mode)
        (state / "jobs").mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise KernelError(f"cannot use the state folder {state} (`--state DIR` names another)", error) from error


def lock_state_folder(state: pathlib.Path) -> int:
    """Hold `<state>/lock` (flock(2)) with the pid inside; the descriptor is the lock."""
    descriptor = os.open(state / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 32).decode().strip() or "unknown"
        os.close(descriptor)
        raise JobWorkerError(f"the state folder {state} is in use by the server with pid {holder}") from None
    size = os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)  # a full disk has room over what was there
    os.ftruncate(descriptor, size)
    return descriptor


def state_name(state: pathlib.Path) -> str:
    """The name of a state folder's part of the cgroup tree: two servers must not meet there."""
    return f"{zlib.crc32(os.fsencode(state.resolve())):08x}"


def new_job_id() -> str:
    """A random UUID4 (RFC 9562), without the import of uuid."""
    digits = os.urandom(16).hex()
    variant = "89ab"[int(digits[16], 16) % 4]
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:]}"


def check_id(job_id: str) -> str:
    """The id, if it is one. Raises BadRequestError."""
    if JOB_ID.fullmatch(job_id) is None:
        raise BadRequestError(f"{job_id!r} is not a job id: a random UUID in lower case with dashes")
    return job_id


def check_request(request: JobRequest) -> None:
    """Refuse at once what no kernel could run (execve(2))."""
    if request.id:
        check_id(request.id)
    if not request.command:
        raise BadRequestError("the command is empty")
    for number, word in enumerate((request.command, *request.args)):
        if "\0" in word:
            where = "the command" if number == 0 else f"argument {number}"
            raise BadRequestError(f"{where} contains a NUL byte, which no program can be given")
    if request.timeout is not None and not 0 <= request.timeout < float("inf"):
        raise BadRequestError(f"the timeout {request.timeout} is not a number of seconds")


def capped(name: str, asked: float | None, default: Any, cap: Any) -> Any:
    """What was asked for, or the default; BadRequestError above the cap."""
    if asked is None:
        return min(default, cap)
    if not 0 < asked <= cap:
        raise BadRequestError(
            f"{name} {asked:g} is not allowed here: more than 0 and at most {cap:g} (`serve --max-{name}`)"
        )
    return type(cap)(asked)


def limits_of(request: JobRequest, options: WorkerOptions) -> Limits:
    asked, default, cap = request, options.defaults, options.caps
    return Limits(
        cpu=capped("cpu", asked.cpu, default.cpu, cap.cpu),
        memory=capped("memory", asked.memory, default.memory, cap.memory),
        pids=capped("pids", asked.pids, default.pids, cap.pids),
        io=capped("io", asked.io, default.io, cap.io),
    )


def checked_reserve(state: pathlib.Path, share: float) -> int:
    """The bytes that jobs may not fill of the state folder's file system. Raises ExhaustedError when they are."""
    disk = os.statvfs(state)
    reserve = int(disk.f_blocks * disk.f_frsize * share)
    free = disk.f_bavail * disk.f_frsize
    if free < reserve or disk.f_favail == 0 < disk.f_files:
        raise ExhaustedError(
            f"the disk of {state} is nearly full: {free // MIB} MiB are free and {reserve // MIB} MiB are held in "
            f"reserve (`serve --reserve`)"
        )
    return reserve


def job_notes(cgroup: bool, controllers: Iterable[str], *, separate: bool) -> tuple[str, ...]:
    notes = []
    missing = [name for name in CONTROLLERS if name not in controllers]
    if missing:
        notes.append(f"limits on {', '.join(missing)} are not enforced")
    if not cgroup:
        notes.append("there is no cgroup: what a job leaves behind is searched for and killed, which it can evade")
    if not separate:
        notes.append("it runs as the server's own user or as root: limits and separation hold only if it cooperates")
    return tuple(notes)


def make_job_folder(job: Job) -> None:
    try:
        os.mkdir(job.folder, 0o700)
    except FileExistsError:
        raise IdTakenError(f"the job id {job.id} is taken") from None
    except OSError as error:
        raise disk_error(f"cannot make {job.folder}", error) from error


def make_job_files(folder: str, handed: contextlib.ExitStack) -> list[int]:
    """Make `control`, `output` and `exit`; descriptors of control and exit, which `handed` closes."""
    try:
        os.mkfifo(f"{folder}/control", 0o600)
        os.close(os.open(f"{folder}/output", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        record = os.open(f"{folder}/events", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.close(record)
        descriptors = open_job_files(folder, handed)
        allocate(descriptors[1], RECORD_BYTES)
    except OSError as error:
        raise disk_error(f"cannot make {folder}/events", error) from error
    return descriptors


def allocate(descriptor: int, size: int) -> None:
    """Reserve the record's block without changing its size (fallocate(2)), where the file system can."""
    try:
        libc_call("fallocate", descriptor, FALLOC_FL_KEEP_SIZE, ctypes.c_long(0), ctypes.c_long(size))
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise


def open_job_files(folder: str, handed: contextlib.ExitStack) -> list[int]:
    """Descriptors of `control` and `exit` for a shim. O_RDWR: a FIFO opened for reading alone polls as hung up for
    ever after its first writer (fifo(7)).
    """
    control = os.open(f"{folder}/control", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    handed.callback(os.close, control)
    record = os.open(f"{folder}/events", os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    handed.callback(os.close, record)
    return [control, record]


def disk_error(doing: str, error: OSError) -> JobWorkerError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE)
    return ExhaustedError(f"{doing}: {error.strerror}") if full else KernelError(doing, error)


def delete_job_folder(folder: str) -> None:
    for name in ("events", "control", "output", "job.json"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{folder}/{name}")
    os.rmdir(folder)


def start_failure(number: int, spec: Spec) -> JobWorkerError:
    """The sentence for a command whose exec failed with that errno (execve(2))."""
    name = spec.command
    places = [os.path.join(spec.home, path) for path in spec.programs()]
    found = next((place for place in places if os.path.lexists(place)), None)
    if number == errno.ENOENT and found is None:
        return BadRequestError(f"{name!r} is not found" + ("" if "/" in name else f" on PATH, which is {JOB_PATH}"))
    if number == errno.ENOENT:
        return BadRequestError(
            f"{found} cannot run: the interpreter that it names (its `#!` line, or its loader) is missing"
        )
    if number == errno.EACCES and found and os.path.isdir(found):
        return BadRequestError(f"{found} is a folder, not a command")
    if number == errno.EACCES:
        return BadRequestError(f"{found or name} is not executable for {spec.user}")
    if number == errno.ENOEXEC:
        return BadRequestError(f"{found or name} cannot run: it is no program of this machine and has no `#!` line")
    if number == errno.E2BIG:
        return BadRequestError(
            f"{name!r} with its {len(spec.args)} arguments is too long for the kernel (128 KiB each, 2 MiB in all)"
        )
    if number in (errno.EAGAIN, errno.ENOMEM):
        return ExhaustedError(f"this machine cannot start another process: {os.strerror(number)}")
    if number in (errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ETXTBSY, errno.EINVAL, errno.EPERM):
        return BadRequestError(f"{name!r} cannot run: {os.strerror(number)}")
    return JobWorkerError(f"{name!r} could not be started: {os.strerror(number)}")


# --- 7. Identity and authorization ----------------------------------------------------------------------
# Owns the question who calls and what is theirs. Reads certificates; makes none (section 11), and knows no
# gRPC beyond the dictionary in which it hands over what TLS found out.

ROLES_OID = "1.2.840.10070.8.1"
LONGEST_CHAIN = 5  # certificates between a client's and its authority's; the ways through more are too many to try


def encode_roles(roles: Iterable[str]) -> bytes:
    """The value of the roles extension: a DER UTF8String, comma-separated (X.690, 8.21)."""
    text = ",".join(roles).encode()
    return bytes([0x0C, len(text)]) + text


def decode_roles(value: bytes) -> frozenset[str]:
    """The roles in an extension's value; none at all when anything about it is malformed or unknown."""
    if len(value) < 3 or value[0] != 0x0C or value[1] != len(value) - 2 or value[1] > 127:
        return frozenset()
    roles = frozenset(value[2:].decode("utf-8", "replace").split(","))
    return roles if roles <= set(ROLES) else frozenset()


@dataclasses.dataclass(frozen=True)
class PeerCertificate:
    """What a client's certificate says, and when an authority stands behind it."""

    names: tuple[str, ...]
    roles: frozenset[str]
    client_auth: bool
    valid: tuple[tuple[float, float], ...]  # for each way to an authority, since and until when all of it is valid

    def valid_at(self, now: float) -> bool:
        return any(since <= now <= until for since, until in self.valid)


@functools.lru_cache(maxsize=4096)
def read_peer_certificate(pem: bytes, chain: bytes, authorities: bytes) -> PeerCertificate:
    """Parse a peer's certificate; cached by its bytes, since the same ones come with every call."""
    leaf = x509.load_pem_x509_certificate(pem)
    purposes = extension(leaf, x509.ExtendedKeyUsage)
    roles = next((e.value.value for e in leaf.extensions if e.oid.dotted_string == ROLES_OID), b"")
    intermediates = x509.load_pem_x509_certificates(chain) if chain.strip() else []
    ways = chains_to(
        x509.load_pem_x509_certificates(authorities), leaf, list(dict.fromkeys(intermediates))[:LONGEST_CHAIN]
    )
    return PeerCertificate(
        names=tuple(str(name.value) for name in leaf.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)),
        roles=decode_roles(roles),
        client_auth=purposes is not None and x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH in purposes,
        valid=tuple(
            (
                max(each.not_valid_before_utc for each in way).timestamp(),
                min(each.not_valid_after_utc for each in way).timestamp(),
            )
            for way in ways
        ),
    )


def extension(certificate: x509.Certificate, kind: type[Any]) -> Any:
    """The value of a certificate's extension, or None."""
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def chains_to(
    authorities: Sequence[x509.Certificate], leaf: x509.Certificate, intermediates: Sequence[x509.Certificate]
) -> Iterator[tuple[x509.Certificate, ...]]:
    """Every chain of signatures from a certificate to an authority (RFC 5280, 6.1), both included: a renewed one of
    either kind makes more than one, and TLS may have taken another than the one that is valid longest.
    """
    yield from ((leaf, authority) for authority in authorities if signed(leaf, authority))
    for issuer in intermediates:
        if is_authority(issuer) and signed(leaf, issuer):
            rest = [other for other in intermediates if other is not issuer]
            yield from ((leaf, *way) for way in chains_to(authorities, issuer, rest))


def is_authority(certificate: x509.Certificate) -> bool:
    basics = extension(certificate, x509.BasicConstraints)
    return basics is not None and basics.ca


def signed(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, exceptions.InvalidSignature):
        return False
    return True


@dataclasses.dataclass(frozen=True)
class Caller:
    """Who calls: the common name of the client's certificate, and whether its roles include `admin`."""

    name: str
    admin: bool

    def may_see(self, owner: str) -> bool:
        return self.admin or self.name == owner


def authenticate(tls: Mapping[str, Iterable[bytes]], authorities: bytes) -> Caller:
    """The caller behind a connection, checked anew at every call: connections outlive certificates.

    `tls` is gRPC's auth context, `authorities` the PEM of those in force now. Raises DeniedError.
    """
    if list(tls.get("ssl_tls_version", ())) != [b"TLSv1.3"]:
        raise DeniedError("this connection is not TLS 1.3")
    pem = b"".join(tls.get("x509_pem_cert", ()))
    try:
        peer = read_peer_certificate(pem, b"".join(tls.get("x509_pem_cert_chain", ())), authorities)
    except ValueError:
        raise DeniedError("the client's certificate cannot be read") from None
    if not peer.valid:
        raise DeniedError("the client's certificate is not from an authority that this server trusts now")
    if not peer.valid_at(time.time()):
        raise DeniedError("the client's certificate, or an authority behind it, is out of date")
    if not peer.client_auth:
        raise DeniedError("the client's certificate is not for clients: it lacks the purpose clientAuth")
    if len(peer.names) != 1 or not peer.names[0]:
        raise DeniedError(f"the client's certificate has {len(peer.names)} common names and must have one")
    if not peer.roles:
        raise DeniedError(f"{peer.names[0]!r} has no role here: its certificate's extension {ROLES_OID} names none")
    return Caller(peer.names[0], "admin" in peer.roles)


def allowed_job(worker: Worker, caller: Caller, job_id: str) -> Job:
    """The job, if there is one and the caller may see it. Raises NoSuchJobError: the two are indistinguishable."""
    job = worker.job(check_id(job_id))
    if not caller.may_see(job.spec.owner):
        raise NoSuchJobError(job_id)
    return job


# --- 8. gRPC service ------------------------------------------------------------------------------------
# Owns the translation between `Worker` and the wire, and is alone in making gRPC statuses. Every call comes
# through `Service._answered`, which knows the caller before anything else happens.

SERVICE_NAME = "proto.WorkerService"


def frame_result(chunk: bytes) -> bytes:
    """A GetStreamResponse of these bytes, as protobuf writes it (field 1, wire type 2), without making the message."""
    size, prefix = len(chunk), bytearray(b"\x0a")
    while size > 0x7F:
        prefix.append(size & 0x7F | 0x80)
        size >>= 7
    prefix.append(size)
    return bytes(prefix) + chunk


def result_of(message: bytes) -> bytes:
    """The bytes of a GetStreamResponse that `frame_result`, or any other protobuf, wrote."""
    size = shift = 0
    for position, byte in enumerate(message[1:6], 2):
        size |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            if message[0] == 0x0A and position + size == len(message):
                return message[position:]
            break
    return bytes(pb.GetStreamResponse.FromString(message).result)


def parsed(kind: Any, message: bytes) -> Any:
    """A request of this kind. Raises BadRequestError for bytes that are none, texts that are not UTF-8 included."""
    try:
        return kind.FromString(message)
    except protobuf.DecodeError:
        raise BadRequestError(f"these bytes are no {kind.DESCRIPTOR.name}, or a text in it is not UTF-8") from None


def optional(message: Any, field: str) -> Any:
    """The value of a proto3 `optional` field; None when the caller left it out."""
    return getattr(message, field) if message.HasField(field) else None


class Service:
    """WorkerService over a `Worker`. `authorities` tells the PEM of the client authorities in force."""

    def __init__(self, worker: Worker, authorities: Callable[[], bytes]) -> None:
        self._worker = worker
        self._authorities = authorities

    def handlers(self) -> grpc.GenericRpcHandler:
        def unary(answer: Callable[[Caller, Any], Awaitable[Any]], request: Any) -> grpc.RpcMethodHandler[Any, Any]:
            async def handle(message: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
                async with self._answered(context) as caller:
                    return await answer(caller, parsed(request, message))

            return grpc.unary_unary_rpc_method_handler(
                handle, response_serializer=lambda reply: reply.SerializeToString()
            )

        calls = {
            "StartJob": unary(self._start, pb.StartJobRequest),
            "StopJob": unary(self._stop, pb.StopJobRequest),
            "GetJobStatus": unary(self._status, pb.GetStatusRequest),
            "RemoveJob": unary(self._remove, pb.RemoveJobRequest),
            "GetOutputStream": grpc.unary_stream_rpc_method_handler(self._stream, response_serializer=frame_result),
        }
        return grpc.method_handlers_generic_handler(SERVICE_NAME, calls)

    @contextlib.asynccontextmanager
    async def _answered(self, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Caller]:
        """The one way into every call: gives the caller, and turns what fails into a status with one sentence."""
        try:
            yield authenticate(context.auth_context(), self._authorities())
        except JobWorkerError as error:
            await context.abort(grpc.StatusCode[error.status], shortened(str(error)))
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001  a mistake of ours is one line here and no traceback there
            place = traceback.extract_tb(error.__traceback__)[-1]
            say(f"unexpected {type(error).__name__} at line {place.lineno} in {place.name}: {error}")
            await context.abort(
                grpc.StatusCode.INTERNAL, "the server met an error that it did not expect; its log says more"
            )

    async def _start(self, caller: Caller, message: pb.StartJobRequest) -> pb.StartJobResponse:
        if message.run_as and not caller.admin:
            raise DeniedError("only an admin may run a job as another account")
        request = JobRequest(
            command=message.cmd, args=tuple(message.args), owner=caller.name, id=message.id, run_as=message.run_as,
            **{field: optional(message, field) for field in ("cpu", "memory", "pids", "io", "timeout", "max_output")},
        )  # fmt: skip
        return pb.StartJobResponse(ID=await self._worker.start(request))

    async def _stop(self, caller: Caller, message: pb.StopJobRequest) -> pb.StopJobResponse:
        await self._worker.stop(allowed_job(self._worker, caller, message.id).id, by=caller.name)
        return pb.StopJobResponse()

    async def _status(self, caller: Caller, message: pb.GetStatusRequest) -> pb.GetStatusResponse:
        return status_message(self._worker.status(allowed_job(self._worker, caller, message.id).id))

    async def _remove(self, caller: Caller, message: pb.RemoveJobRequest) -> pb.RemoveJobResponse:
        self._worker.remove(allowed_job(self._worker, caller, message.id).id)
        return pb.RemoveJobResponse()

    async def _stream(self, message: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        async with self._answered(context) as caller:
            request = parsed(pb.GetStreamRequest, message)
            job = allowed_job(self._worker, caller, request.id)
            offset = min(request.offset, 1 << 62)  # beyond every file, and still an offset to the kernel
            async with contextlib.aclosing(self._worker.stream(job.id, offset)) as chunks:
                async for chunk in chunks:
                    await context.write(chunk)


def shortened(sentence: str) -> str:
    """A sentence that fits the headers in which gRPC sends it (8 KiB, each of these characters up to 12 bytes)."""
    return sentence if len(sentence) <= 400 else f"{sentence[:400]}…"


def status_message(status: JobStatus) -> pb.GetStatusResponse:
    spec, ending, usage = status.spec, status.ending, status.usage
    enforced = {name: getattr(spec.limits, name) for name in spec.controllers}
    return pb.GetStatusResponse(
        status=status.status,
        exitcode=status.exit_code,
        reason=ending.reason if ending else "",
        signal=ending.signal if ending else 0,
        stopped_by=status.stopped_by,
        owner=spec.owner,
        cmd=spec.command,
        args=spec.args,
        user=spec.user if spec.uid in (0, os.geteuid()) else f"{spec.user} (uid {spec.uid})",
        created_ms=int(spec.created * 1000),
        started_ms=int(status.started * 1000),
        ended_ms=int(status.ended * 1000),
        output_bytes=status.output_bytes,
        cpu_seconds=usage.cpu_seconds,
        memory_peak=usage.memory_peak,
        read_bytes=usage.read_bytes,
        written_bytes=usage.written_bytes,
        cpu_limit=enforced.get("cpu"),
        memory_limit=enforced.get("memory"),
        pids_limit=enforced.get("pids"),
        io_limit=enforced.get("io"),
        timeout=spec.timeout,
        max_output=spec.max_output,
        notes=status.notes,
    )


# --- 9. Server ------------------------------------------------------------------------------------------
# Owns the process that serves: its port, signals, descriptors and what it tells systemd. Makes no certificate:
# it is given a folder that is complete.

KEEPALIVE_SECONDS, PING_SECONDS, HANDSHAKE_SECONDS = 10, 5, 10
LARGEST_MESSAGE = 4 * MIB  # bytes of a request; the kernel takes half of that as arguments
KEEPALIVE_OPTIONS = [
    ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
    ("grpc.keepalive_timeout_ms", PING_SECONDS * 1000),
    ("grpc.http2.ping_timeout_ms", PING_SECONDS * 1000),  # without it a half-open peer lives a minute
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
SERVER_OPTIONS = [
    *KEEPALIVE_OPTIONS,
    ("grpc.http2.min_ping_interval_without_data_ms", PING_SECONDS * 1000),  # else too_many_pings
    ("grpc.server_handshake_timeout_ms", HANDSHAKE_SECONDS * 1000),  # silent connections hold descriptors
    ("grpc.so_reuseport", 0),  # else a second server binds the same port silently
    ("grpc.max_receive_message_length", LARGEST_MESSAGE),
]


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """How one server serves. `listen` is (host, port); an empty host is every address."""

    worker: WorkerOptions
    listen: tuple[str, int]
    certs: pathlib.Path
    stop_jobs: bool = False


def prepare_grpc() -> None:
    """Set what gRPC reads from the environment when it is imported. Nobody here has a pre-shared key, so with this
    suite TLS 1.2 finds no cipher, and TLS 1.3, which the variable does not govern, is untouched.
    """
    os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-PSK-CHACHA20-POLY1305"
    os.environ["GRPC_VERBOSITY"] = "NONE"
    skip_pure_python_protobuf()


def skip_pure_python_protobuf() -> None:
    """Keep out the pure Python protobuf, which is imported and never used beside the C one: 9 ms of each call."""
    name = "google.protobuf.internal.python_message"
    stub = types.ModuleType(name)

    def load(attribute: str) -> Any:
        if sys.modules.get(name) is stub:
            del sys.modules[name]
        return getattr(importlib.import_module(name), attribute)

    stub.__getattr__ = load  # type: ignore[method-assign]  # PEP 562
    sys.modules.setdefault(name, stub)


def import_everything() -> None:
    """All imports now: a .pyz that is replaced under a running server has nothing left to give."""
    for name in ("argparse", "asyncio", "ctypes", "cryptography.x509", "gen.workerservice_pb2", "grpc", "json",
                 "pathlib", "pwd", "subprocess", "traceback", "zlib", "encodings.idna"):  # fmt: skip
        importlib.import_module(name)


RELOAD_SECONDS = 0.1


class ServerCertificates:
    """The certificates in force, read from the folder again at a reload."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        self.authorities = b""
        self._configuration: Any = None
        self._fresh = False

    def load(self) -> None:
        """Read the folder. Raises JobWorkerError and leaves what is in force in force."""
        key, certificate, authorities = read_server_folder(self._folder)
        ordered = current_first(authorities)
        self._configuration = grpc.ssl_server_certificate_configuration([(key, certificate)], ordered)
        self._fresh = True
        self.authorities = ordered

    def credentials(self) -> grpc.ServerCredentials:
        self._fresh = False
        return grpc.dynamic_ssl_server_credentials(self._configuration, self._fetch, True)

    def _fetch(self) -> Any:
        """Asked by gRPC in a thread of its own before each handshake: what is new, or None.

        A handshake takes hold of what is in force outside of the lock under which gRPC replaces and frees it
        (ssl_security_connector.cc, add_handshakers): two handshakes at once would crash the server if each brought
        something new. So only a reload does, and it first gives those a while that were let through before it.
        """
        if not self._fresh:
            return None
        self._fresh = False
        time.sleep(RELOAD_SECONDS)
        return self._configuration


def current_first(authorities: Iterable[x509.Certificate]) -> bytes:
    """Authorities as PEM, in the order in which TLS is to try them: of one name and key it takes the first."""
    now = datetime.datetime.now(datetime.timezone.utc)

    def order(authority: x509.Certificate) -> tuple[bool, datetime.timedelta]:
        outside = not authority.not_valid_before_utc <= now <= authority.not_valid_after_utc
        return outside, now - authority.not_valid_after_utc

    return b"".join(each.public_bytes(serialization.Encoding.PEM) for each in sorted(authorities, key=order))


def read_file(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise JobWorkerError(f"cannot read {path}: {error.strerror}") from error


def read_server_folder(folder: pathlib.Path) -> tuple[bytes, bytes, list[x509.Certificate]]:
    """The server's key and certificate, as PEM, and its clients' authorities. Refuses, naming the file, a certificate
    that gRPC cannot serve or that is not for its key.
    """
    paths = [folder / "server.pem", folder / "server.key"]
    try:
        certificate_pem, key_pem = map(read_file, paths)
        certificate = x509.load_pem_x509_certificate(certificate_pem)
        key = serialization.load_pem_private_key(key_pem, password=None)
        authorities = x509.load_pem_x509_certificates(read_file(folder / "client-ca.pem"))
    except (ValueError, TypeError, exceptions.UnsupportedAlgorithm) as error:
        raise JobWorkerError(
            f"the certificates in {folder} cannot be read (not PEM, or a key with a password): {error}"
        ) from None
    if not can_be_served(key):
        raise JobWorkerError(f"{paths[1]} is of a kind that gRPC cannot serve; use RSA, P-256 or P-384")
    if key.public_key() != certificate.public_key():
        raise JobWorkerError(f"{paths[0]} is not the certificate of {paths[1]}")
    if not certificate.not_valid_before_utc.timestamp() <= time.time() <= certificate.not_valid_after_utc.timestamp():
        raise JobWorkerError(f"{paths[0]} is out of date; `serve --name NAME` makes a new one where server-ca.key is")
    return key_pem, certificate_pem, authorities


def can_be_served(key: Any) -> bool:
    """Whether gRPC's BoringSSL offers TLS 1.3 with this kind of key."""
    if isinstance(key, rsa.RSAPrivateKey):
        return key.key_size >= 1024
    return isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in ("secp256r1", "secp384r1")


async def serve(options: ServeOptions) -> int:
    """Serve until a SIGTERM or SIGINT; SIGHUP reads the certificates again. The exit code."""
    import_everything()
    gc.enable()  # a .pyz starts without it
    gc.freeze()
    certificates = ServerCertificates(options.certs)
    certificates.load()
    ended = asyncio.Event()
    async with Worker(options.worker) as worker:
        raise_file_limit()
        server = grpc.aio.server(options=SERVER_OPTIONS)
        server.add_generic_rpc_handlers((Service(worker, lambda: certificates.authorities).handlers(),))
        address = bind(server, options.listen, certificates.credentials())
        await server.start()
        handle_signals(ended, certificates)
        announce(worker, address)
        await ended.wait()
        notify("STOPPING=1")
        if options.stop_jobs:
            await worker.stop_all(by="serve --stop-jobs")
        say(f"stopping; {count_of(worker.running, 'job goes', 'jobs go')} on")
        worker.begin_shutdown()  # first: `stop` alone waits out its grace for whoever follows
        await server.stop(0.3)
    return 0


def count_of(number: int, one: str, more: str) -> str:
    return f"{number} {one if number == 1 else more}"


def bind(server: grpc.aio.Server, listen: tuple[str, int], credentials: grpc.ServerCredentials) -> str:
    """Listen; the address as people write it. Raises JobWorkerError naming the port."""
    host, port = listen
    host = host or ("::" if has_ipv6() else "0.0.0.0")  # noqa: S104  a server is there to be reached
    place = f"[{host}]" if ":" in host else host
    try:
        port = server.add_secure_port(f"{place}:{port}", credentials)
    except RuntimeError:
        port = 0
    if port == 0:
        raise JobWorkerError(
            f"cannot listen on {place}:{listen[1]}: is another server using the port, or is it not this machine's?"
        )
    return f"{place}:{port}"


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::", 0))
    except OSError:
        return False
    return True


def raise_file_limit() -> None:
    """A follower is a descriptor; jobs keep the limit that the launcher was given."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def handle_signals(ended: asyncio.Event, certificates: ServerCertificates) -> None:
    loop = asyncio.get_running_loop()

    def reload() -> None:
        try:
            certificates.load()
            say("the certificates are read again")
        except JobWorkerError as error:
            say(f"the certificates stay as they were: {error}")

    def reap() -> None:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    loop.add_signal_handler(signal.SIGHUP, reload)
    if os.getpid() == 1:  # in a container: strangers' orphans come to process 1
        loop.add_signal_handler(signal.SIGCHLD, reap)


def announce(worker: Worker, address: str) -> None:
    """Say on standard output that the server listens, on standard error what does not hold here."""
    for note in worker.notes():
        say(f"warning: on this server {note}")
    account = Account.own()
    systemd = os.path.isdir("/run/systemd/system")  # sd_booted(3)
    if systemd and account.uid != 0 and not os.path.exists(f"/var/lib/systemd/linger/{account.name}"):
        say(f"warning: {account.name} has no linger, so a logout ends jobs; `loginctl enable-linger` gives it")
    line = f"jobworker: serving on {address}, with {count_of(worker.running, 'job', 'jobs')} running\n"
    with contextlib.suppress(OSError):  # as in `say`; and nothing is kept for a flush at the end, which would fail too
        os.write(1, line.encode())
    notify("READY=1")


def notify(state: str) -> None:
    """Tell systemd (sd_notify(3)), where it asked to be told."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel, contextlib.suppress(OSError):
            channel.sendto(state.encode(), "\0" + path[1:] if path.startswith("@") else path)


# --- 10. Client -----------------------------------------------------------------------------------------
# Owns the way to a server: the channel, the retries that are safe, and saying why a server is not reached.
# Knows nothing of this machine's jobs.

CONNECT_SECONDS = 4.0
CALL_SECONDS = STOP_SECONDS + 30.0
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0  # seconds between tries
CLIENT_OPTIONS = [
    *KEEPALIVE_OPTIONS,
    ("grpc.min_reconnect_backoff_ms", int(CONNECT_SECONDS * 1000)),  # also how long one connect may take
    ("grpc.use_local_subchannel_pool", 1),  # a new channel is a new connection, without an old one's back-off
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),
]


@dataclasses.dataclass(frozen=True)
class ClientOptions:
    """Which server, as whom: `identity` is the NAME of NAME.pem and NAME.key in `certs`."""

    host: str
    port: int
    certs: pathlib.Path
    identity: str
    retry_for: float = 60.0

    @property
    def address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def files(self) -> tuple[pathlib.Path, pathlib.Path]:
        return self.certs / f"{self.identity}.pem", self.certs / f"{self.identity}.key"


class Client:
    """Calls to one server. Errors are JobWorkerErrors with the server's sentence, or why it is not reached."""

    def __init__(self, options: ClientOptions) -> None:
        self._options = options
        self._credentials: Any = None
        self._reached = False

    def __enter__(self) -> Self:
        prepare_grpc()
        certificate, key = self._options.files
        hint = f"`-r NAME` picks another identity, `--certs DIR` another folder than {self._options.certs}"
        try:
            files = [read_file(path) for path in (self._options.certs / "server-ca.pem", key, certificate)]
        except JobWorkerError as error:
            raise JobWorkerError(f"{error}; {hint}") from None
        self._credentials = grpc.ssl_channel_credentials(*files)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Channels are closed after each call; nothing is left."""

    def call(self, method: str, request: Any, reply: Any) -> Any:
        """One call, tried again when the server was lost: every call here may be asked twice."""

        def attempt(channel: grpc.Channel) -> Any:
            ask = channel.unary_unary(f"/{SERVICE_NAME}/{method}", type(request).SerializeToString, reply.FromString)
            return ask(request, timeout=CALL_SECONDS)

        return self._persistently(attempt)

    def stream(self, job_id: str, offset: int, write: Callable[[bytes], None]) -> None:
        """Write a job's output from a byte on until its end, resuming at its byte when the server was lost."""
        position = offset

        def attempt(channel: grpc.Channel) -> None:
            nonlocal position
            ask = channel.unary_stream(
                f"/{SERVICE_NAME}/GetOutputStream", pb.GetStreamRequest.SerializeToString, result_of
            )
            for chunk in ask(pb.GetStreamRequest(id=job_id, offset=position)):
                self._reached = True
                write(chunk)
                position += len(chunk)

        self._persistently(attempt)

    def _persistently(self, attempt: Callable[[grpc.Channel], Any]) -> Any:
        """Try until it works, is refused, or `retry_for` seconds have passed since the server was lost."""
        lost_at, pause = 0.0, FIRST_PAUSE
        while True:
            self._reached, began = False, time.monotonic()
            try:
                with grpc.secure_channel(self._options.address, self._credentials, CLIENT_OPTIONS) as channel:
                    return attempt(channel)
            except grpc.RpcError as error:
                failure = self._explained(error, tried=lost_at > 0)
            if failure.status != "UNAVAILABLE" or self._options.retry_for == 0:
                raise failure
            if not lost_at or self._reached:
                lost_at, pause = time.monotonic(), FIRST_PAUSE
                say(f"{self._options.address} was lost ({failure}); trying for {self._options.retry_for:g} s")
            if time.monotonic() + pause > lost_at + self._options.retry_for:
                raise UnavailableError(f"gave up after {self._options.retry_for:g} s: {failure}")
            time.sleep(max(0.0, pause - (time.monotonic() - began)))
            pause = min(LONGEST_PAUSE, 2 * pause)

    def _explained(self, error: Any, *, tried: bool) -> JobWorkerError:
        """The error behind gRPC's. One that was never connected is final at the first try: only what was lost
        comes back.
        """
        details = error.details() or ""
        status = error.code().name
        if (
            status == "UNAVAILABLE"
            and not self._reached
            and re.match(r"failed to connect|DNS|errors? resolving", details)
        ):
            sentence = why_unreachable(self._options) or f"cannot reach {self._options.address}: {details}"
            failure: JobWorkerError = UnavailableError(sentence) if tried else JobWorkerError(sentence)
            return failure
        if status == "UNAVAILABLE":
            return UnavailableError(details)
        if status == "DEADLINE_EXCEEDED":
            return JobWorkerError(f"{self._options.address} did not answer within {CALL_SECONDS:.0f} s")
        return JobWorkerError(details or status)


def why_unreachable(options: ClientOptions) -> str:
    """Why no connection comes about, in one sentence: tried again by hand, since gRPC does not tell. Empty: unknown."""
    try:
        raw = socket.create_connection((options.host, options.port), CONNECT_SECONDS)
    except (socket.gaierror, UnicodeError):  # not found, or not even a name
        return f"there is no host {options.host!r} (`--server HOST[:PORT]`)"
    except TimeoutError:
        return f"{options.address} does not answer"
    except OSError as error:
        return f"cannot connect to {options.address}: {error.strerror or error}; is `serve` running there?"
    with raw:
        try:
            return why_no_handshake(options, raw)
        except OSError:
            return ""


def why_no_handshake(options: ClientOptions, raw: socket.socket) -> str:
    context = ssl.create_default_context(cafile=str(options.certs / "server-ca.pem"))
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["h2"])
    try:
        context.load_cert_chain(*map(str, options.files))
        with context.wrap_socket(raw, server_hostname=options.host) as channel:
            with contextlib.suppress(ConnectionResetError):
                # In TLS 1.3 the verdict on the client comes after the handshake: HTTP/2's first frame says yes.
                if channel.recv(1):
                    return ""
            return (
                f"{options.address} refuses {options.files[0]}: it is out of date, not for clients, or not from "
                f"the client authority of that server"
            )
    except ssl.SSLCertVerificationError as error:
        if error.verify_code in (62, 64):  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH
            return (
                f"the certificate of {options.address} is not for {options.host!r}; on the server, "
                f"`serve --name {options.host}` makes one that is"
            )
        authority = options.certs / "server-ca.pem"
        return f"the certificate of {options.address} is not trusted by {authority}: {error.verify_message}"
    except ssl.SSLError as error:
        reason = (error.reason or str(error)).replace("_", " ").lower()
        return f"{options.address} does not speak TLS 1.3 with {options.files[0]}: {reason}"


# --- 11. Certificates -----------------------------------------------------------------------------------
# Owns the making of authorities, server certificates and identities, and the rule of what a folder must hold.
# Authorities live ten years, leaves one; all are backdated by a day, since clocks differ.

DAY = 86400
AUTHORITY_DAYS, LEAF_DAYS = 3650, 365
SERVED_FILES = ("server.pem", "server.key", "client-ca.pem")  # what serving needs
MADE_FILES = (
    "server-ca.pem",
    "server-ca.key",
    "client-ca.key",
    "user.pem",
    "user.key",
    "admin.pem",
    "admin.key",
    *SERVED_FILES,
)


@dataclasses.dataclass(frozen=True)
class CertifiedKey:
    """A certificate with its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def key_pem(self) -> bytes:
        form = serialization.PrivateFormat.PKCS8
        return self.key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def sign(
    name: str, days: int, issuer: CertifiedKey | None, extensions: Sequence[tuple[x509.ExtensionType, bool]]
) -> CertifiedKey:
    """A new P-256 key and its certificate, signed by the issuer or, without one, by itself (RFC 5280)."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.timezone.utc)
    signer = issuer.key if issuer else key
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    for value, critical in extensions:
        builder = builder.add_extension(value, critical=critical)
    digest = None if isinstance(signer, (ed25519.Ed25519PrivateKey, ed448.Ed448PrivateKey)) else hashes.SHA256()
    return CertifiedKey(builder.sign(signer, digest), key)


def key_usage(*allowed: str) -> x509.KeyUsage:
    names = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
             "key_cert_sign", "crl_sign", "encipher_only", "decipher_only")  # fmt: skip
    return x509.KeyUsage(**{name: name in allowed for name in names})


def make_authority(name: str) -> CertifiedKey:
    basics = [(x509.BasicConstraints(ca=True, path_length=None), True), (key_usage("key_cert_sign", "crl_sign"), True)]
    return sign(name, AUTHORITY_DAYS, None, basics)


def leaf_basics(purpose: x509.ObjectIdentifier) -> list[tuple[x509.ExtensionType, bool]]:
    return [
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (key_usage("digital_signature"), True),
        (x509.ExtendedKeyUsage([purpose]), False),
    ]


def make_server_certificate(authority: CertifiedKey, names: Sequence[str]) -> CertifiedKey:
    """A certificate for a server that is reached by these names and addresses."""
    alternatives = x509.SubjectAlternativeName([general_name(name) for name in names])
    basics = leaf_basics(x509.oid.ExtendedKeyUsageOID.SERVER_AUTH)
    return sign("jobworker server", LEAF_DAYS, authority, [*basics, (alternatives, False)])


def make_identity(authority: CertifiedKey, name: str, roles: Sequence[str]) -> CertifiedKey:
    """A certificate for a client: its name is the owner of its jobs."""
    extension = x509.UnrecognizedExtension(x509.ObjectIdentifier(ROLES_OID), encode_roles(roles))
    basics = leaf_basics(x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH)
    return sign(name, LEAF_DAYS, authority, [*basics, (extension, False)])


def general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    with contextlib.suppress(UnicodeError):
        ascii_name = name.encode("idna").decode("ascii")
        if re.fullmatch(r"[\w*.-]+", ascii_name, re.ASCII):
            return x509.DNSName(ascii_name)
    raise UsageError(f"{name!r} is neither a host's name nor an address")


def own_names() -> list[str]:
    """By what this machine is reached: its names, and its addresses as the kernel has them (proc(5))."""
    host = socket.gethostname()
    four = re.findall(r"(\d+\.\d+\.\d+\.\d+)\n\s+/32 host LOCAL", kernel_read("/proc/net/fib_trie"))
    six = [line.split() for line in kernel_read("/proc/net/if_inet6").splitlines()]
    routed = [str(ipaddress.IPv6Address(int(words[0], 16))) for words in six if words[3] in ("00", "10")]
    names = ["localhost", host, socket.getfqdn(host), "127.0.0.1", "::1", *four, *routed]
    return list(dict.fromkeys(name for name in names if name and len(name) < 64))


def prepare_folder(folder: pathlib.Path, names: Sequence[str]) -> str:
    """Make what a server's folder needs, if it is empty, or a server.pem with the names it lacks.

    Returns what was made, as a sentence, or nothing. Raises JobWorkerError, and changes nothing, where the folder
    is half-filled or unreadable.
    """
    try:
        there = set(os.listdir(folder)) & set(MADE_FILES) if folder.exists() else set()
        missing = [name for name in SERVED_FILES if name not in there]
        if not there:
            make_folder(folder, [*own_names(), *names])
            return f"made two authorities, a server certificate and the identities `user` and `admin` in {folder}"
        if missing:
            raise JobWorkerError(
                f"the folder {folder} is half-filled: it lacks {' and '.join(missing)}; complete it or use an empty one"
            )
        return add_names(folder, names) if names else ""
    except OSError as error:
        raise JobWorkerError(
            f"cannot use the certificate folder {folder}: {error.filename or ''} {error.strerror}"
        ) from error


def make_folder(folder: pathlib.Path, names: Sequence[str]) -> None:
    """Both authorities and what they sign, in a new folder that then takes its place whole."""
    server_authority, client_authority = (
        make_authority("jobworker server authority"),
        make_authority("jobworker client authority"),
    )
    made = {"server-ca": server_authority, "client-ca": client_authority}
    made["server"] = make_server_certificate(server_authority, list(dict.fromkeys(names)))
    made |= {role: make_identity(client_authority, role, [role]) for role in ("user", "admin")}
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.with_name(f".{folder.name}-{os.getpid()}")
    new.mkdir(mode=0o755)
    try:
        for name, pair in made.items():
            write_pair(new, name, pair)
        if folder.exists() and os.listdir(folder):
            for path in sorted(new.iterdir(), key=lambda path: path.name == "server.pem"):
                path.rename(folder / path.name)
        else:
            new.rename(folder)
    finally:
        for path in new.glob("*"):
            path.unlink()
        if new.exists():
            new.rmdir()


def write_pair(folder: pathlib.Path, name: str, pair: CertifiedKey) -> None:
    """Put NAME.key and NAME.pem in place, each whole or not at all; the key is for its owner's eyes only."""
    for suffix, content, mode in ((".key", pair.key_pem(), 0o600), (".pem", pair.certificate_pem(), 0o644)):
        path = folder / f"{name}{suffix}"
        new = folder / f".{name}{suffix}-{os.getpid()}"
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.rename(new, path)


def load_authority(folder: pathlib.Path, name: str) -> CertifiedKey:
    """An authority of the folder with its key. Raises JobWorkerError where the folder has only its certificate."""
    path = folder / f"{name}.key"
    if not path.exists():
        raise JobWorkerError(f"{path} is not there: only the folder that made the authority can sign with it")
    try:
        key = serialization.load_pem_private_key(read_file(path), password=None)
        return CertifiedKey(x509.load_pem_x509_certificate(read_file(folder / f"{name}.pem")), key)  # type: ignore[arg-type]
    except (ValueError, TypeError) as error:
        raise JobWorkerError(f"{path} or its certificate cannot be read: {error}") from None


def add_names(folder: pathlib.Path, names: Sequence[str]) -> str:
    """A new server.pem with the names that the present one lacks, besides those that it has."""
    present = extension(x509.load_pem_x509_certificate(read_file(folder / "server.pem")), x509.SubjectAlternativeName)
    has = [str(name.value) for name in present or ()]
    names = [str(general_name(name).value) for name in names]
    if set(names) <= set(has):
        return ""
    authority = load_authority(folder, "server-ca")
    write_pair(folder, "server", make_server_certificate(authority, list(dict.fromkeys([*has, *names]))))
    return f"made a new {folder / 'server.pem'} for {', '.join(names)}"


# --- 12. Command line -----------------------------------------------------------------------------------
# Owns words: options, verbs, what is printed, and the exit code. A verb is `add_X_arguments` beside `run_X`,
# and one row of VERBS. Scripts rely on the lines that `start`, `stop` and `status` print.

SIZES = {"": 1, "k": KIB, "m": MIB, "g": GIB, "t": 1 << 40}
DURATIONS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": DAY}


def quantity(text: str, units: Mapping[str, int], kind: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]?)(?:i?b)?", text.strip().lower())
    if found is None or found[2] not in units:
        raise argparse.ArgumentTypeError(f"{text!r} is not a {kind}")
    value = float(found[1]) * units[found[2]]
    if value >= 1 << 63:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is too large")
    return value


def as_bytes(text: str) -> int:
    """Bytes, as `512M` or `1.5G`."""
    return int(quantity(text, SIZES, "size like 512M or 1.5G"))


def as_seconds(text: str) -> float:
    """Seconds, as `90`, `10s`, `10m`, `7d`."""
    return quantity(text, DURATIONS, "duration like 90, 10s, 10m or 7d")


def as_cpus(text: str) -> float:
    return quantity(text, {"": 1}, "number of CPUs like 0.5 or 2")


def as_count(text: str) -> int:
    return int(quantity(text, {"": 1}, "number"))


def as_share(text: str) -> float:
    """A part of the whole, as `5%` or `0.05`."""
    value = quantity(text.rstrip("%"), {"": 1}, "share like 5%") / (100 if text.endswith("%") else 1)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share like 5%")
    return value


def host_and_port(text: str) -> tuple[str, int]:
    """HOST, HOST:PORT, [ADDRESS]:PORT, :PORT or an IPv6 address alone."""
    bare = re.fullmatch(r"[0-9a-fA-F:.]*:[0-9a-fA-F:.]*:[0-9a-fA-F:.]*", text)
    found = re.fullmatch(r"(?:\[(?P<address>[^\]]+)\]|(?P<host>[^:]*))(?::(?P<port>\d{1,5}))?", text)
    if bare:
        return text, DEFAULT_PORT
    if found is None or int(found["port"] or 0) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST[:PORT]")
    return found["address"] or found["host"], DEFAULT_PORT if found["port"] is None else int(found["port"])


def text_argument(text: str) -> str:
    """A word for the wire, which is UTF-8. Raises UsageError for bytes that are none."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{text!r} is not UTF-8, which commands and arguments must be") from None


def default_certs() -> pathlib.Path:
    """`./certs` where nobody else could have put it there, else the machine's or the user's own folder."""
    here = pathlib.Path("certs")
    with contextlib.suppress(OSError):
        facts = here.stat()
        if stat.S_ISDIR(facts.st_mode) and facts.st_uid in (0, os.geteuid()) and not facts.st_mode & 0o022:
            return here
    return pathlib.Path("/etc/jobworker") if os.geteuid() == 0 else user_folder("XDG_CONFIG_HOME", ".config")


def default_state() -> pathlib.Path:
    return pathlib.Path("/var/lib/jobworker") if os.geteuid() == 0 else user_folder("XDG_STATE_HOME", ".local/state")


def user_folder(variable: str, below_home: str) -> pathlib.Path:
    base = os.environ.get(variable) or os.path.join(os.environ.get("HOME") or Account.own().home, below_home)
    return pathlib.Path(base) / "jobworker"


def write_out(chunk: bytes) -> None:
    """All bytes to standard output, however it takes them."""
    rest = memoryview(chunk)
    while rest:
        try:
            rest = rest[os.write(1, rest) :]
        except BlockingIOError:
            select.select([], [1], [])


# -- Options that several verbs have

Row: TypeAlias = "tuple[str, Callable[[str], Any], str, Any, str]"  # flag, type, metavar, default, help
LIMIT_OPTIONS: list[tuple[str, Callable[[str], Any], str]] = [
    ("cpu", as_cpus, "1"),
    ("memory", as_bytes, "512M"),
    ("pids", as_count, "512"),
    ("io", as_bytes, "64M a second, each way and disk"),
]


def add_certs_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--certs",
        metavar="DIR",
        default=os.environ.get("JOBWORKER_CERTS"),
        help="the folder of certificates and keys (env JOBWORKER_CERTS; default: ./certs if it is yours, else "
        "/etc/jobworker for root and ~/.config/jobworker for others)",
    )


def add_client_arguments(parser: argparse.ArgumentParser) -> None:
    add_certs_arguments(parser)
    parser.add_argument(
        "--server",
        type=host_and_port,
        metavar="HOST[:PORT]",
        default=os.environ.get("JOBWORKER_SERVER", "localhost"),
        help=f"where the server is (env JOBWORKER_SERVER; default: localhost:{DEFAULT_PORT})",
    )
    parser.add_argument(
        "-r",
        "--identity",
        metavar="NAME",
        default="user",
        help="use NAME.pem and NAME.key of the folder (default: user)",
    )
    parser.add_argument(
        "--retry-for",
        type=as_seconds,
        metavar="TIME",
        default=60.0,
        help="how long to try again when a server that was reached is lost (default: 60s; 0: not at all)",
    )


def add_id_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-j", dest="job", metavar="ID", help="the job's id, which may also stand alone")
    parser.add_argument("id", nargs="?", metavar="ID", help=argparse.SUPPRESS)


def chosen_id(options: argparse.Namespace) -> str:
    if (options.job is None) == (options.id is None):
        raise UsageError(f"`{options.verb}` needs one job id: jobworker.pyz {options.verb} -j ID")
    return check_id(text_argument(options.job or options.id))


def client_of(options: argparse.Namespace) -> Client:
    host, port = options.server
    certs = pathlib.Path(options.certs) if options.certs else default_certs()
    return Client(ClientOptions(host or "localhost", port, certs, options.identity, options.retry_for))


# -- serve


PLACE_OPTIONS: list[Row] = [
    ("--listen", host_and_port, "HOST:PORT", ("", DEFAULT_PORT), f"default: all addresses, port {DEFAULT_PORT}"),
    (
        "--state",
        str,
        "DIR",
        None,
        "jobs and output (default: /var/lib/jobworker for root, else ~/.local/state/jobworker)",
    ),
    (
        "--cgroup",
        str,
        "PATH",
        None,
        "where to make the tree (default: `jobworker` under the highest cgroup we may manage)",
    ),
    (
        "--without",
        str,
        "LIST",
        "",
        "limits to do without: cpu,memory,pids,io, `all`, or `auto`: whatever is missing here",
    ),
]
ENDING_OPTIONS: list[Row] = [
    ("--timeout", as_seconds, "TIME", 0.0, "end a job after this (default: never)"),
    ("--max-output", as_bytes, "SIZE", OUTPUT_LIMIT, "end a job that prints more (default: 1G)"),
]
KEEPING_OPTIONS: list[Row] = [
    ("--keep", as_seconds, "TIME", KEEP_SECONDS, "forget an ended job after this (default: 7d; 0: never)"),
    ("--keep-bytes", as_bytes, "SIZE", 0, "forget the oldest when outputs exceed this (default: no bound)"),
    ("--reserve", as_share, "SHARE", RESERVE, "of the disk, not to be filled by jobs (default: 5%%)"),
    ("--max-jobs", as_count, "N", MAX_JOBS, f"running at once (default: {MAX_JOBS})"),
]


def add_rows(parser: argparse._ActionsContainer, rows: Sequence[Row]) -> None:
    for flag, kind, metavar, default, text in rows:
        parser.add_argument(flag, type=kind, metavar=metavar, default=default, help=text)


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    add_certs_arguments(parser)
    place = parser.add_argument_group("where")
    add_rows(place, PLACE_OPTIONS)
    names = "also valid for these names or addresses: makes a new server.pem where it lacks one"
    place.add_argument("--name", nargs="+", action="extend", metavar="NAME", default=[], help=names)
    limits = parser.add_argument_group("limits of a job (what it gets by default; --max-…: what `start` may ask for)")
    for name, kind, default in LIMIT_OPTIONS:
        limits.add_argument(f"--{name}", type=kind, metavar=name.upper(), help=f"default: {default}")
        limits.add_argument(f"--max-{name}", type=kind, metavar=name.upper(), help=f"default: as --{name}")
    add_rows(limits, ENDING_OPTIONS)
    keep = parser.add_argument_group("keeping")
    add_rows(keep, KEEPING_OPTIONS)
    keep.add_argument(
        "--stop-jobs", action="store_true", help="stop all jobs when the server ends (default: they go on)"
    )


def run_serve(options: argparse.Namespace) -> int:
    prepare_grpc()
    worker = worker_options(options)
    certs = (pathlib.Path(options.certs) if options.certs else default_certs()).absolute()
    made = prepare_folder(certs, options.name)
    if made:
        say(made)
    return asyncio.run(serve(ServeOptions(worker, options.listen, certs, options.stop_jobs)))


def worker_options(options: argparse.Namespace) -> WorkerOptions:
    limits = {name: getattr(options, name) for name, _, _ in LIMIT_OPTIONS if getattr(options, name) is not None}
    defaults = Limits(**limits)
    caps = {name: getattr(options, f"max_{name}") or getattr(defaults, name) for name, _, _ in LIMIT_OPTIONS}
    for name in (*limits, "max_cpu", "max_memory", "max_pids", "max_io", "max_output", "max_jobs"):
        if getattr(options, name) == 0:
            raise UsageError(f"--{name.replace('_', '-')} 0 would let no job run")
    same = ("cgroup", "timeout", "max_output", "keep", "keep_bytes", "reserve", "max_jobs")
    return WorkerOptions(
        state=pathlib.Path(options.state or default_state()).absolute(),
        without=chosen_without(options.without),
        defaults=defaults,
        caps=Limits(**caps),
        **{name: getattr(options, name) for name in same},
    )


def chosen_without(text: str) -> frozenset[str]:
    names = frozenset(filter(None, text.split(",")))
    if unknown := names - {*CONTROLLERS, "auto", "all"}:
        raise UsageError(f"--without knows {', '.join(CONTROLLERS)}, all and auto, not {', '.join(sorted(unknown))}")
    return frozenset(CONTROLLERS) if "all" in names else names


# -- start, stop, status, stream, rm


def add_start_arguments(parser: argparse.ArgumentParser) -> None:
    add_client_arguments(parser)
    parser.add_argument("-c", dest="command", metavar="COMMAND", help="the command, found on the server's PATH")
    parser.add_argument(
        "-args",
        dest="args",
        metavar="ARG",
        help="everything after it is the command's, options included (so is `-- COMMAND ARG…`)",
    )
    for name, kind, _ in LIMIT_OPTIONS:
        parser.add_argument(
            f"--{name}", type=kind, metavar=name.upper(), help="this limit instead of the server's default"
        )
    parser.add_argument("--timeout", type=as_seconds, metavar="TIME", help="end the job after this")
    parser.add_argument("--max-output", type=as_bytes, metavar="SIZE", help="end the job when it prints more")
    parser.add_argument(
        "--run-as",
        metavar="ACCOUNT",
        default="",
        help="an account of the server's machine, root included (admins only)",
    )
    parser.add_argument(
        "--id", metavar="UUID", default="", help="the job's id, a random UUID: the same id twice is the same job"
    )


def split_command(arguments: Sequence[str]) -> tuple[list[str], list[str] | None, bool]:
    """`start`'s arguments, what follows the first `-args` or `--` verbatim (None: neither), and whether it was `--`."""
    for position, word in enumerate(arguments):
        if word in ("-args", "--"):
            return list(arguments[:position]), list(arguments[position + 1 :]), word == "--"
    return list(arguments), None, False


def run_start(options: argparse.Namespace) -> int:
    command, args = options.command, options.rest or []
    if options.dashed and command is None:
        command, args = (args[0] if args else None), args[1:]
    if command is None:
        raise UsageError("`start` needs a command: jobworker.pyz start -- COMMAND [ARG…]")
    limits = {name: getattr(options, name) for name in ("cpu", "memory", "pids", "io", "timeout", "max_output")}
    with client_of(options) as client:
        request = pb.StartJobRequest(
            cmd=text_argument(command), args=[text_argument(arg) for arg in args],
            id=text_argument(options.id) or new_job_id(), run_as=text_argument(options.run_as),
            **{name: value for name, value in limits.items() if value is not None},
        )  # fmt: skip
        print(f"started JobID: {client.call('StartJob', request, pb.StartJobResponse).ID}")
    return 0


def add_stop_arguments(parser: argparse.ArgumentParser) -> None:
    add_client_arguments(parser)
    add_id_arguments(parser)


def run_stop(options: argparse.Namespace) -> int:
    job_id = chosen_id(options)
    with client_of(options) as client:
        client.call("StopJob", pb.StopJobRequest(id=job_id), pb.StopJobResponse)
    print(f"stopped Job: {job_id}")
    return 0


def add_status_arguments(parser: argparse.ArgumentParser) -> None:
    add_client_arguments(parser)
    add_id_arguments(parser)
    parser.add_argument("--json", action="store_true", help="all that is known, as JSON")


def run_status(options: argparse.Namespace) -> int:
    job_id = chosen_id(options)
    with client_of(options) as client:
        status = client.call("GetJobStatus", pb.GetStatusRequest(id=job_id), pb.GetStatusResponse)
    if options.json:
        print(json.dumps(status_facts(job_id, status), ensure_ascii=False, indent=2))
    else:
        print(f"jobID: {job_id}, status: {pb.Status.Name(status.status)}, exitCode: {status.exitcode}")
    return 0


def status_facts(job_id: str, status: pb.GetStatusResponse) -> dict[str, Any]:
    """A status as `--json` prints it: times in UTC (ISO 8601), null for what is not known or not enforced."""

    def moment(milliseconds: int) -> str | None:
        if milliseconds == 0:
            return None
        when = datetime.datetime.fromtimestamp(milliseconds / 1000, datetime.timezone.utc)
        return when.isoformat("T", "milliseconds")

    return {
        "id": job_id,
        "status": pb.Status.Name(status.status),
        "exitCode": status.exitcode,
        "reason": status.reason or None,
        "signal": status.signal or None,
        "stoppedBy": status.stopped_by or None,
        "owner": status.owner,
        "command": [status.cmd, *status.args],
        "user": status.user,
        "created": moment(status.created_ms),
        "started": moment(status.started_ms),
        "ended": moment(status.ended_ms),
        "outputBytes": status.output_bytes,
        "usage": {
            "cpuSeconds": status.cpu_seconds if status.ended_ms else None,
            "memoryPeak": optional(status, "memory_peak"),
            "readBytes": optional(status, "read_bytes"),
            "writtenBytes": optional(status, "written_bytes"),
        },
        "limits": {
            "cpu": status.cpu_limit or None,
            "memory": status.memory_limit or None,
            "pids": status.pids_limit or None,
            "io": status.io_limit or None,
            "timeout": status.timeout or None,
            "maxOutput": status.max_output,
        },
        "notes": list(status.notes),
    }


def add_stream_arguments(parser: argparse.ArgumentParser) -> None:
    add_client_arguments(parser)
    add_id_arguments(parser)
    parser.add_argument("--offset", type=as_bytes, metavar="SIZE", default=0, help="skip so many bytes")


def run_stream(options: argparse.Namespace) -> int:
    job_id = chosen_id(options)
    with client_of(options) as client:
        client.stream(job_id, options.offset, write_out)
    return 0


def add_rm_arguments(parser: argparse.ArgumentParser) -> None:
    add_client_arguments(parser)
    parser.add_argument("ids", nargs="+", metavar="ID", help="ended jobs")


def run_rm(options: argparse.Namespace) -> int:
    ids = [check_id(text_argument(job_id)) for job_id in options.ids]
    with client_of(options) as client:
        for job_id in ids:
            client.call("RemoveJob", pb.RemoveJobRequest(id=job_id), pb.RemoveJobResponse)
            print(f"removed Job: {job_id}")
    return 0


# -- identity, unit


def add_identity_arguments(parser: argparse.ArgumentParser) -> None:
    add_certs_arguments(parser)
    parser.add_argument(
        "name", metavar="NAME", help="the common name: the owner of its jobs, and the name of its files"
    )
    parser.add_argument("--admin", action="store_true", help="may see and stop everybody's jobs (default: its own)")


def run_identity(options: argparse.Namespace) -> int:
    folder = pathlib.Path(options.certs) if options.certs else default_certs()
    name = text_argument(options.name)
    if not re.fullmatch(r"[^/\0]{1,64}", name) or name.startswith(".") or f"{name}.pem" in MADE_FILES:
        raise UsageError(
            f"{name!r} cannot name a new identity: 1 to 64 characters without a slash, and not one that serves already"
        )
    if (folder / f"{name}.pem").exists() or (folder / f"{name}.key").exists():
        raise JobWorkerError(f"{folder / name}.pem is there already")
    write_pair(
        folder, name, make_identity(load_authority(folder, "client-ca"), name, ["admin" if options.admin else "user"])
    )
    print(
        f"made identity: {folder / name}.pem and {name}.key; with server-ca.pem they are what the client's folder needs"
    )
    return 0


UNIT = """\
# {place}, made by `jobworker.pyz unit`. Jobs live outside this unit, in a cgroup tree of their own, and outlive
# it; so no Delegate= (systemd could not start the unit again while jobs live in it), and no sandboxing that jobs
# would inherit from the server (they have uids and limits of their own).
[Unit]
Description=Job worker: commands in cgroups over mutual TLS
After=network.target

[Service]
Type=notify
NotifyAccess=main
ExecStart={command}
ExecReload=/bin/kill -HUP $MAINPID
Restart=always
RestartSec=1
KillMode=process
TimeoutStopSec=10
CacheDirectory=jobworker
CacheDirectoryMode=0700
UMask=0077
LimitNOFILE=1024:524288
TasksMax=infinity
OOMPolicy=continue
{protection}
[Install]
WantedBy={target}
"""


def add_unit_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--user", action="store_true", help="a user's unit, for ~/.config/systemd/user (default: /etc/systemd/system)"
    )
    parser.add_argument(
        "serve_options", nargs=argparse.REMAINDER, metavar="-- OPTION…", help="options of `serve` for its command line"
    )


def run_unit(options: argparse.Namespace) -> int:
    more = options.serve_options[1:] if options.serve_options[:1] == ["--"] else options.serve_options
    words = [os.path.abspath(sys.executable), os.path.abspath(sys.argv[0]), "serve", *more]
    quoted = " ".join(
        word if re.fullmatch(r"[\w@+=:,./-]+", word) else json.dumps(word).replace("%", "%%").replace("$", "$$")
        for word in words
    )
    print(
        UNIT.format(
            place="~/.config/systemd/user/jobworker.service"
            if options.user
            else "/etc/systemd/system/jobworker.service",
            command=quoted,
            protection="" if options.user else "OOMScoreAdjust=-500\n",
            target="default.target" if options.user else "multi-user.target",
        ),
        end="",
    )
    return 0


VERBS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int], str]] = {
    "serve": (add_serve_arguments, run_serve, "run the server on this machine"),
    "start": (add_start_arguments, run_start, "start a command there; prints its job's id"),
    "stop": (add_stop_arguments, run_stop, "kill a job, all its processes at once"),
    "status": (add_status_arguments, run_status, "say whether a job runs, and how it ended"),
    "stream": (add_stream_arguments, run_stream, "write a job's output, from its first byte, until it ends"),
    "rm": (add_rm_arguments, run_rm, "forget ended jobs and their output"),
    "identity": (add_identity_arguments, run_identity, "make a certificate for one more client"),
    "unit": (add_unit_arguments, run_unit, "print a systemd unit that serves"),
}


def make_parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of all verbs, with the options of the one in `words`: those of all cost a client 5 ms. And only for
    help is the terminal's width asked, 3 ms.
    """
    formatter: Any = argparse.HelpFormatter
    if not {"-h", "--help"} & set(words):
        formatter = functools.partial(formatter, width=80)

    class Parser(argparse.ArgumentParser):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options, allow_abbrev=False, formatter_class=formatter)

        def error(self, message: str) -> NoReturn:
            raise UsageError(f"{message} (`{self.prog} --help`)")

    parser = Parser(prog="jobworker.pyz", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--version", action="version", version=f"jobworker {VERSION}{BUILD}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, (add_arguments, _, summary) in VERBS.items():
        own = verbs.add_parser(verb, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if verb in words[:1]:
            add_arguments(own)
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command line; `rest` is what `start` passes on verbatim. Raises UsageError."""
    rest, dashed = None, False
    words = list(arguments)
    if "start" in words[:1]:
        words, rest, dashed = split_command(words)
    options: argparse.Namespace = make_parser(words).parse_args(words)
    options.rest, options.dashed = rest, dashed
    return options


def fill_standard_descriptors() -> None:
    """What was closed (`>&-`, old daemons) is /dev/null: the next file or socket must not become standard output."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115  as long as the process
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; the exit code. What fails is one line on standard error."""
    try:
        fill_standard_descriptors()
        options = parse(sys.argv[1:] if arguments is None else arguments)
        code = VERBS[options.verb][1](options)
        sys.stdout.flush()
    except JobWorkerError as error:
        say(str(error))
        return error.exit_code
    except SystemExit as ended:  # argparse's --help and --version
        return ended.code if isinstance(ended.code, int) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what Python still flushes at its end goes nowhere
        return 128 + signal.SIGPIPE
    except OSError as error:
        say(f"{error.filename or 'this machine'}: {error.strerror}")
        return 1
    return code


def program() -> NoReturn:
    """`main` as a whole process, which is left at once: taking an interpreter down costs a client 10 ms."""
    code = main()
    with contextlib.suppress(OSError):  # a closed pipe: `main` has said what there was to say
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    program()
