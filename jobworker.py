#!/usr/bin/env python3
"""Job worker: run commands on a Linux box, each in its own cgroup, over mutual TLS 1.3 and gRPC.

One file, read top-down. ``serve`` is the server; ``start``, ``stop``, ``status`` and ``stream`` are
its clients; `Worker` is the library under it, without gRPC, TLS or any third-party import.

The processes, and the way a byte takes::

    client ══ gRPC, mTLS 1.3 ══ server ── one packet with descriptors ──> launcher
                                 │ ▲ ▲                                       │ fork
                                 │ │ └── inotify ── <state>/jobs/<id>/exit <─┤
             a wish: "kill alice"│ │                                         ▼
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
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn


if TYPE_CHECKING:
    import argparse
    import asyncio
    import ctypes
    import json
    import pwd
    import subprocess
    import urllib.parse
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
    from types import TracebackType
else:

    class Deferred:
        """A module that is imported at its first use.

        A client's start-up is felt on every call, and the launcher's memory in every fork: neither pays
        for what it does not use. `serve` imports everything when it starts (`import_everything`).
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
    json = Deferred("json")
    pwd = Deferred("pwd")
    subprocess = Deferred("subprocess")


# --- 1. Names and limits ------------------------------------------------------------------------------
# Owns every name, number and default that more than one section, or a reader, wants to find. No code.

VERSION = "1.0.0"
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
STARTS_AT_ONCE = 64  # beyond, descriptors in flight make sends to the launcher fail
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
    """One line on standard error: what a server has to tell whoever runs it."""
    print(f"jobworker: {sentence}", file=sys.stderr, flush=True)


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
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
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


def cpu_files(limits: Limits, disks: Sequence[Disk]) -> list[tuple[str, str]]:
    period = 100_000  # microseconds; the kernel wants a quota of at least 1000
    return [("cpu.max", f"{max(1000, round(limits.cpu * period))} {period}")]


def memory_files(limits: Limits, disks: Sequence[Disk]) -> list[tuple[str, str]]:
    return [("memory.max", str(limits.memory)), ("memory.swap.max", "0"), ("memory.oom.group", "1")]


def pids_files(limits: Limits, disks: Sequence[Disk]) -> list[tuple[str, str]]:
    return [("pids.max", str(limits.pids))]


def io_files(limits: Limits, disks: Sequence[Disk]) -> list[tuple[str, str]]:
    return [("io.max", f"{disk.number} rbps={limits.io} wbps={limits.io}") for disk in disks]


LIMIT_FILES: dict[str, Callable[[Limits, Sequence[Disk]], list[tuple[str, str]]]] = {
    "cpu": cpu_files,
    "memory": memory_files,
    "pids": pids_files,
    "io": io_files,
}


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

    def enable(self, controller: str) -> bool:
        """Give the children of this cgroup a controller; whether they have it now."""
        file = f"{self.path}/cgroup.subtree_control"
        if controller in kernel_read(file).split():
            return True
        if controller in self.controllers():
            with contextlib.suppress(KernelError):  # the answer says so; EBUSY where processes live in it
                kernel_write(file, f"+{controller}")
        return controller in kernel_read(file).split()

    def limit(self, limits: Limits, controllers: Iterable[str], disks: Sequence[Disk]) -> None:
        for controller in controllers:
            for file, value in LIMIT_FILES[controller](limits, disks):
                # A kernel without swap accounting has no memory.swap.max, and then nothing to forbid.
                if file != "memory.swap.max" or os.path.exists(f"{self.path}/{file}"):
                    kernel_write(f"{self.path}/{file}", value)

    def adopt(self, process: int) -> None:
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
                    waiter.poll()
        finally:
            os.close(events)

    def remove(self) -> None:
        """Remove it with all below, depth first; nothing may live in it."""
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


class Descendants:
    """What a machine without a writable cgroup2 has instead of a `Cgroup`: no limits, and a kill by search.

    Finds the caller's descendants (a shim is their subreaper, prctl(2)) and whatever carries the job's id
    in its environment, which a process can change: what holds here holds against no one who means harm.
    """

    def __init__(self, job_id: str) -> None:
        self._mark = f"{JOB_ID_VARIABLE}={job_id}".encode()

    def _find(self) -> list[int]:
        parents: dict[int, int] = {}
        found = set()
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError, KernelError, IndexError):
                state, parent = kernel_read(f"/proc/{name}/stat").rpartition(")")[2].split()[:2]
                if state in "ZX":
                    continue
                parents[int(name)] = int(parent)
                if self._mark in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
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
        processes: what a manager delegated (cgroup-v2.rst, Delegation)."""
        path = self.point
        steps = [step for step in self.own[len(self.point):].split("/") if step]
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
        if not os.path.isdir(owner.path):
            owner.create()
            for controller in self.controllers:
                owner.enable(controller)
        cgroup.create()
        cgroup.limit(limits, self.controllers, self.disks)
        return cgroup


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
        path = f"{top}/{folder}"
        enforced = frozenset(name for name in wanted if enable_down_to(path, name))
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
    controllers (cgroup-v2.rst, No Internal Process Constraint)."""
    leaf = Cgroup(f"{cgroup}/jobworker/server")
    leaf.create()
    leaf.adopt(0)


def enable_down_to(path: str, controller: str) -> bool:
    """Enable a controller from the first cgroup that is not ours down to `path`, making what is missing."""
    steps = [os.path.dirname(os.path.dirname(path)), os.path.dirname(path), path]
    for step in steps:
        Cgroup(step).create()
        if not Cgroup(step).enable(controller):
            return False
    return True


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


class Tail:
    """The end of one output, shared by all who follow it: one descriptor, one watch, one wake-up, one read.

    `acquire` and `release` count its followers; the descriptor outlives the removal of the file.
    """

    def __init__(self, path: str, inotify: Inotify) -> None:
        self._path = path
        self._inotify = inotify
        self._followers = 0
        self._descriptor = -1
        self._watch: int | None = None
        self._recent = (0, b"")  # the last bytes read, with their offset: others at that byte take them from here
        self._bell = Bell()

    def acquire(self) -> None:
        if self._followers == 0:
            try:
                self._descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise KernelError(f"cannot open {self._path}", error) from error
        self._followers += 1

    def release(self) -> int:
        """One follower less; how many are left."""
        self._followers -= 1
        if self._followers == 0:
            os.close(self._descriptor)
            self._disarm()
        return self._followers

    def read(self, offset: int) -> bytes:
        """Up to READ_BYTES bytes from `offset`; none at the end of the file."""
        if self._recent[0] == offset and self._recent[1]:
            return self._recent[1]
        try:
            chunk = os.pread(self._descriptor, READ_BYTES, offset)
        except OSError as error:
            raise KernelError(f"cannot read {self._path}", error) from error
        if chunk:
            self._recent = (offset, chunk)
        return chunk

    def arm(self) -> bool:
        """Ask for one event at the next change. True if that was news: then read once more, because what was
        written between the last read and now makes no event."""
        if self._watch is not None:
            return False
        self._watch = self._inotify.watch(self._path, IN_MODIFY | IN_ONESHOT, lambda mask: self.wake())
        return True

    def _disarm(self) -> None:
        if self._watch is not None:
            self._inotify.unwatch(self._watch)
            self._watch = None

    def wake(self) -> None:
        """It may have grown, or it will not grow any more: everybody looks."""
        self._disarm()
        self._bell.ring()

    async def changed(self) -> None:
        await self._bell.wait()


# --- 5. Launcher and shim -------------------------------------------------------------------------------
# Owns what happens between the server's wish and the job's process: the order (job.json), the record
# (`exit`), wishes (`control`), the launcher, the shim and the child. Of the server only class `Launcher`
# runs here; everything else runs in the small processes and may import nothing third-party.

FOLLOWS: dict[str, tuple[str, ...]] = {  # what may follow what in a record; nothing else counts
    "": ("born",),
    "born": ("started", "failed", "ended"),  # ended at once: the shim was lost on the brink
    "started": ("ended",),
    "failed": (),
    "ended": ("done",),
    "done": (),
}

MODULE = "jobworker"  # what the launcher imports: as `__main__` it would be compiled anew each time
CLONE_PIDFD, CLONE_INTO_CGROUP, SYS_CLONE3 = 0x1000, 0x200000000, 435
PR_SET_CHILD_SUBREAPER, FALLOC_FL_KEEP_SIZE = 36, 1
PIPE_BYTES = MIB  # of the job's pipe, where fs.pipe-max-size and the user's share allow it
RECORD_BYTES = 4 * KIB  # allocated when the job starts, so that a full disk cannot lose an exit code
PACKET_BYTES = 2 * KIB  # a longer order is read from job.json: 64 packets must fit a socket's buffer


@dataclasses.dataclass(frozen=True)
class Order:
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
    limits: Limits
    timeout: float  # 0: none
    max_output: int
    reserve: int  # bytes of the file system that the output leaves free
    created: float

    def plain(self) -> dict[str, Any]:
        """As built-in types, for json and marshal; `from_plain` reads it back."""
        return {**vars(self), "limits": vars(self.limits)}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Order:
        tuples = {name: tuple(plain[name]) for name in ("args", "groups", "controllers")}
        return cls(**{**plain, **tuples, "limits": Limits(**plain["limits"])})

    def environment(self) -> dict[str, str]:
        return {
            "PATH": JOB_PATH,
            "HOME": self.home,
            "USER": self.user,
            "LANG": "C.UTF-8",
            "PYTHONUNBUFFERED": "1",
            JOB_ID_VARIABLE: self.id,
        }

    def processes(self) -> Cgroup | Descendants:
        return Cgroup(self.cgroup) if self.cgroup else Descendants(self.id)


def write_order(folder: str, order: Order) -> None:
    descriptor = os.open(f"{folder}/job.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(json.dumps(order.plain()))


def read_order(folder: str) -> Order | None:
    """The order of a job's folder; None where it is missing or was half-written."""
    try:
        with open(f"{folder}/job.json", encoding="utf-8") as file:
            return Order.from_plain(json.loads(file.read()))
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
class Record:
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
        if "ended.code" not in self.facts:
            return None
        status, code, number, reason, by = (self.facts[f"ended.{key}"] for key in ("status", "code", "signal", "reason", "by"))
        return Ending(status, int(code), int(number), self.facts.get("done.reason", reason).strip("-"), by.strip("-"))

    @property
    def usage(self) -> Usage:
        def number(name: str, kind: Callable[[str], Any]) -> Any:
            text = self.facts.get(f"done.{name}", "None")
            return None if text == "None" else kind(text)

        kinds = {"cpu_seconds": float, "memory_peak": int, "read_bytes": int, "written_bytes": int}
        return Usage(**{name: number(name, kind) for name, kind in kinds.items()})


def write_record(descriptor: int, word: str, **facts: object) -> None:
    """Append one line to a record; `read_record` is its reader. Values hold no blank; the dot says: complete."""
    pairs = "".join(f" {key}={'-' if value == '' else value}" for key, value in facts.items())
    os.write(descriptor, f"{word} at={time.time():.6f}{pairs} .\n".encode())


def read_record(folder: str) -> Record:
    """The record of a job's folder; a line that is torn, or may not follow the one before, does not count."""
    try:
        with open(f"{folder}/exit", "rb") as file:
            text = file.read().decode("ascii", "replace")
    except FileNotFoundError:
        return Record()
    except OSError as error:
        raise KernelError(f"cannot read {folder}/exit", error) from error
    phase, facts = "", {}
    for line in text.splitlines():
        word, *pairs = line.split(" ")
        if pairs and pairs[-1] == "." and word in FOLLOWS[phase]:
            phase = sys.intern(word)
            facts.update({f"{word}.{key}": value for key, _, value in (pair.partition("=") for pair in pairs[:-1])})
    return Record(phase, facts)


@dataclasses.dataclass(frozen=True)
class Wish:
    """That a job be ended by force: for a limit's reason, or by somebody."""

    reason: str = ""
    by: str = ""


def encode_name(name: str) -> str:
    """A name of any characters as one word without blanks, for wishes and records."""
    return "".join(c if c.isalnum() and c.isascii() else f"%{ord(c):x}." for c in name)


def decode_name(word: str) -> str:
    return re.sub(r"%([0-9a-f]+)\.", lambda found: chr(int(found[1], 16)), word)


def send_wish(folder: str, by: str) -> bool:
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
    finally:
        os.close(descriptor)
    return True


def receive_wish(control: int) -> Wish | None:
    """What was asked through `control`; the first wish is the one that counts."""
    words = os.read(control, 4 * KIB).decode("ascii", "replace").split("\n")[0].split(" ")
    return Wish(by=words[1]) if words[0] == "kill" and len(words) == 2 else None


def shim_lives(folder: str) -> bool:
    """Whether anybody reads a job's `control`; a descriptor on its way to the launcher counts."""
    try:
        os.close(os.open(f"{folder}/control", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError:
        return False
    return True


class Launcher:
    """The server's side of the launcher: exec's it, and again when it died; hands it one request at a time."""

    def __init__(self) -> None:
        self.places = asyncio.Semaphore(STARTS_AT_ONCE)  # held while a request is on its way
        self._arguments: list[str] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None

    def open(self, shims: str) -> None:
        """Exec it. `shims` is the cgroup for it and its shims (empty: none); they, and the jobs, keep the
        RLIMIT_NOFILE that the server has now."""
        self._arguments = [shims, *map(str, resource.getrlimit(resource.RLIMIT_NOFILE))]
        self.ensure()

    def ensure(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        here.setblocking(False)
        program = f"import sys; sys.path.insert(0, {str(Path(__file__).resolve().parent)!r}); import {MODULE}; {MODULE}.launcher_main()"
        with there:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", program, str(there.fileno()), *self._arguments],
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                    pass_fds=[there.fileno()], start_new_session=True, cwd="/", env={},
                )  # fmt: skip
            except OSError as error:
                here.close()
                raise KernelError(f"cannot run {sys.executable} as the launcher", error) from error
        self._channel = here

    @property
    def process(self) -> int:
        return self._process.pid if self._process else 0

    def send(self, kind: str, folder: str, order: Order, descriptors: Sequence[int]) -> None:
        """Hand over one request: `start` a job or `finish` one whose shim was lost."""
        packet = marshal.dumps((kind, folder, order.plain()))
        if len(packet) > PACKET_BYTES:
            packet = marshal.dumps((kind, folder, None))
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
    channel, shims, soft, hard = socket.socket(fileno=int(sys.argv[1])), sys.argv[2], *map(int, sys.argv[3:5])
    prepare_launcher(shims, (soft, hard))
    while (request := receive_request(channel)) is not None:
        try:
            process = os.fork()
        except OSError:
            process = -1  # its descriptors close with no record begun: the server sees a job that never ran
        if process == 0:
            channel.close()
            run_shim(request)
        for descriptor in request[3]:
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
        Cgroup(shims).adopt(0)
    libc()
    ctypes.pythonapi.PyOS_BeforeFork  # noqa: B018  found now, not in every shim
    gc.disable()
    gc.freeze()  # a collection in a shim would touch, and so copy, every page


def receive_request(channel: socket.socket) -> tuple[str, str, dict[str, Any] | None, list[int]] | None:
    """One request (kind, folder, order if it fitted, descriptors), or None when the server is gone.

    Not `socket.recv_fds`, which ignores its flags: without MSG_CMSG_CLOEXEC jobs would hold `control`.
    """
    packet, ancillary, _, _ = channel.recvmsg(PACKET_BYTES + KIB, socket.CMSG_SPACE(3 * 4), socket.MSG_CMSG_CLOEXEC)
    if not packet:
        return None
    descriptors = [number for _, _, data in ancillary for number in memoryview(data).cast("i")]
    kind, folder, plain = marshal.loads(packet)
    return kind, folder, plain, descriptors


def run_shim(request: tuple[str, str, dict[str, Any] | None, list[int]]) -> NoReturn:
    """The shim process. However it ends, it ends here; a record without `done` then says that it was lost."""
    kind, folder, plain, (control, record, *cgroup) = request
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        order = read_order(folder) if plain is None else Order.from_plain(plain)
        if order is None:
            write_record(record, "born")
            write_record(record, "failed", errno=errno.EIO)
        elif kind == "finish":
            finish_lost(folder, order, record)
        else:
            Shim(folder, order, control, record).run(cgroup[0] if cgroup else -1)
    except BaseException as error:
        with contextlib.suppress(OSError):  # for whoever looks: the line counts for nothing
            os.write(record, f"crashed {type(error).__name__} {error}\n".encode())
        os._exit(1)
    os._exit(0)


class Pump:
    """Moves what a job prints from its pipe into `output`, up to its cap and the disk's reserve."""

    def __init__(self, pipe: int, output: int, order: Order) -> None:
        self.pipe = pipe
        self.output = output
        self.open = True  # until every writer has closed
        self._order = order
        self._written = 0
        self._unchecked = 0  # bytes since the last look at the disk
        self._splices = True

    def move(self) -> Wish | None:
        """Move at most 1 MiB; the wish to end the job when that was too much, for it or for the disk."""
        room = min(MIB, self._order.max_output - self._written)
        try:
            moved = self._move(room) if room else self._waiting()
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
                raise
            return Wish("DISK_FULL")
        if moved == 0:
            self.open = False
        elif room == 0:
            return Wish("OUTPUT_LIMIT")
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

    def _look_at_disk(self) -> Wish | None:
        self._unchecked = 0
        disk = os.fstatvfs(self.output)
        return Wish("DISK_FULL") if disk.f_bavail * disk.f_frsize < self._order.reserve else None

    def drain(self) -> Wish | None:
        """Move what is in the pipe, and no more than fits one: whoever else holds it may write for ever."""
        limit = self._written + fcntl.fcntl(self.pipe, fcntl.F_GETPIPE_SZ)
        while self.open and self._written < limit:
            before = self._written
            wish = self.move()
            if wish or (self._written == before and self.open):
                return wish
        return None


class Shim:
    """The parent of one job: pumps its output, carries out stops and limits, and finishes its record."""

    def __init__(self, folder: str, order: Order, control: int, record: int) -> None:
        self._folder = folder
        self._order = order
        self._control = control
        self._record = record
        self._processes = order.processes()

    def run(self, cgroup: int) -> None:
        write_record(self._record, "born")
        output = os.open(f"{self._folder}/output", os.O_WRONLY | os.O_CLOEXEC)
        pipe, stdout = make_pipe(self._order)
        if not self._order.cgroup:  # what is left of the job then becomes the shim's, and is found by it
            libc_call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        try:
            process, pidfd = start_process(self._order, cgroup, stdout)
        except OSError as error:
            write_record(self._record, "failed", errno=error.errno or errno.EINVAL)
            return
        os.close(stdout)
        if not self._order.cgroup:
            reap_orphans(process)
        if cgroup >= 0:
            os.close(cgroup)
        write_record(self._record, "started")
        pump = Pump(pipe, output, self._order)
        wish = self._supervise(pump, pidfd)
        ending = self._ending(process, wish or pump.drain(), forced=wish is not None)
        finish_job(self._folder, self._order, self._record, ending, pump)

    def _supervise(self, pump: Pump, pidfd: int) -> Wish | None:
        """Wait, in one poll, for the job's end, output, wishes and deadline; the wish that ended it, if any."""
        poller = select.poll()
        for descriptor in (pidfd, pump.pipe, self._control):
            poller.register(descriptor, select.POLLIN)
        deadline = time.monotonic() + self._order.timeout if self._order.timeout else None
        wish = None
        while True:
            ready = {descriptor for descriptor, _ in poller.poll(milliseconds_until(deadline))}
            # The wish is read first: one that came before the end is older than the end.
            new = receive_wish(self._control) if self._control in ready else None
            if pump.pipe in ready:
                new = pump.move() or new
                if not pump.open or (new and new.reason):
                    poller.unregister(pump.pipe)
            if deadline is not None and time.monotonic() >= deadline:
                new, deadline = new or Wish("TIMEOUT"), None
            if new and wish is None:
                wish = new
                self._processes.kill()
            if pidfd in ready:
                return wish

    def _ending(self, process: int, wish: Wish | None, *, forced: bool) -> Ending:
        """How the main process ended. STOPPED only when it died of the kill that a wish, or the kernel's
        out-of-memory killer, sent; a job that ended by itself keeps its code, and what its output lacks is said."""
        result = os.waitid(os.P_PID, process, os.WEXITED)
        assert result is not None
        exited = result.si_code == os.CLD_EXITED
        code, number = (result.si_status, 0) if exited else (128 + result.si_status, result.si_status)
        if number == signal.SIGKILL and forced and wish:
            return Ending("STOPPED", code, number, wish.reason, wish.by)
        if number == signal.SIGKILL and self._processes.out_of_memory_kills():
            return Ending("STOPPED", code, number, "OOM")
        truncated = wish.reason if wish and wish.reason != "TIMEOUT" else ""
        return Ending("FINISHED", code, number, truncated)


def milliseconds_until(deadline: float | None) -> int | None:
    """For poll(2), which takes an int: at most a day at a time, and never less than what remains."""
    if deadline is None:
        return None
    return min(86_400_000, max(0, int((deadline - time.monotonic()) * 1000) + 1))


def make_pipe(order: Order) -> tuple[int, int]:
    """The job's stdout and stderr: owned by the job, so that it can open /dev/stderr; read without waiting."""
    pipe, stdout = os.pipe2(os.O_CLOEXEC)
    with contextlib.suppress(OSError):  # EPERM above the user's share of pipe memory: the default size does
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    os.set_blocking(pipe, False)
    if order.uid != os.geteuid():
        os.fchown(stdout, order.uid, order.gid)
    return pipe, stdout


def reap_orphans(main: int) -> None:
    """Wait for whatever the job's processes leave to their subreaper, but not for the job itself: `_ending` does."""

    def reap(_number: int, _frame: object) -> None:
        with contextlib.suppress(ChildProcessError):
            while (child := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and child.si_pid != main:
                os.waitpid(child.si_pid, 0)

    signal.signal(signal.SIGCHLD, reap)


def start_process(order: Order, cgroup: int, stdout: int) -> tuple[int, int]:
    """Start the job's process in its cgroup; its pid and pidfd. Raises OSError with the errno of its exec."""
    report, reporter = os.pipe2(os.O_CLOEXEC)
    process, pidfd, placed = clone_into(cgroup)
    if process == 0:
        become_job(order, stdout, reporter, "" if placed else order.cgroup)
    os.close(reporter)
    failure = os.read(report, 16)  # the end of file is a successful exec: the pipe closes on exec
    os.close(report)
    if failure:
        os.waitpid(process, 0)
        raise OSError(int(failure), os.strerror(int(failure)))
    return process, pidfd


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
        ctypes.pythonapi.PyOS_BeforeFork()
        process = libc().syscall(ctypes.c_long(SYS_CLONE3), arguments, ctypes.c_size_t(len(arguments)))
        if process == 0:
            ctypes.pythonapi.PyOS_AfterFork_Child()
            return 0, -1, True
        ctypes.pythonapi.PyOS_AfterFork_Parent()
        if process > 0:
            return process, pidfd.value, True
    process = os.fork()
    return process, os.pidfd_open(process) if process else -1, False


def become_job(order: Order, stdout: int, reporter: int, cgroup: str) -> NoReturn:
    """The child: takes its place and identity, and execs. Every exception travels back as an errno."""
    failure = errno.EINVAL  # a ValueError: what execve(2) cannot be given at all
    try:
        if cgroup:
            Cgroup(cgroup).adopt(0)
        os.setsid()
        os.dup2(stdout, 1)
        os.dup2(stdout, 2)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if os.geteuid() == 0:
            os.setgroups(order.groups)
            os.setresgid(order.gid, order.gid, order.gid)
            os.setresuid(order.uid, order.uid, order.uid)
        try:
            os.chdir(order.home)
        except OSError:
            os.chdir("/")  # as sshd does for an account without a home
        os.execvpe(order.command, [order.command, *order.args], order.environment())
    except OSError as error:
        failure = error.errno or failure
    except JobWorkerError as error:
        failure = getattr(error, "errno", failure)
    finally:
        os.write(reporter, str(failure).encode())
        os._exit(127)


def finish_job(folder: str, order: Order, record: int, ending: Ending, pump: Pump | None) -> None:
    """Everything after the main process's end: what it left behind is killed, the last output is kept, and
    the record is completed, last. Each step may be the last one before a crash: `finish_lost` repeats them."""
    processes = order.processes()
    write_record(record, "ended", **vars(ending))
    processes.kill_all()
    rest = pump.drain() if pump else None
    usage = processes.usage()
    processes.remove()
    reason = ending.reason or (rest.reason if rest else "") or ("" if sync_folder(folder) else "DISK_FULL")
    write_record(record, "done", reason=reason, **vars(usage))
    os.fsync(record)


def finish_lost(folder: str, order: Order, record: int) -> None:
    """Finish a job whose shim is gone: with the ending that its record has, else as LOST."""
    ending = read_record(folder).ending or LOST
    os.write(record, b"\n")  # what the lost shim may have torn is then a line of its own
    finish_job(folder, order, record, ending, None)


def sync_folder(folder: str) -> bool:
    """Make a job's folder durable, its record aside; False where the disk did not take it all (fsync(2))."""
    try:
        for path in (f"{folder}/job.json", f"{folder}/output", folder, os.path.dirname(folder)):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    except OSError:
        return False
    return True


# --- 6. Job and job table -------------------------------------------------------------------------------
# Owns the state folder: who may run as what, one folder a job, the table of jobs, recovery, retention. The
# public face of the library: everything about jobs, nothing of gRPC, TLS or who is allowed what.


@dataclasses.dataclass(frozen=True)
class WorkerOptions:
    """How one `Worker` behaves. Seconds, bytes; 0 means none where that makes sense."""

    state: Path
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
    order: Order
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

    def __init__(self, state: Path) -> None:
        self._owners = state / "owners"
        self._homes = state / "home"
        self._uids: dict[str, int] = {}

    def open(self) -> None:
        self._owners.mkdir(mode=0o700, exist_ok=True)
        self._homes.mkdir(mode=0o711, exist_ok=True)
        self._homes.chmod(0o711)
        for path in self._owners.iterdir():
            if path.name.isdigit():
                self._uids[path.read_text("utf-8", "surrogateescape")] = int(path.name)

    def of(self, owner: str) -> Account:
        uid = self._uids.get(owner)
        if uid is None:
            uid = self._remember(owner)
        home = self._homes / str(uid)
        if not home.is_dir():
            home.mkdir(mode=0o700)
            os.chown(home, uid, uid)
        return Account(uid, uid, (), owner, str(home))

    def _remember(self, owner: str) -> int:
        first, count = uid_range(str(self._owners))
        taken = set(self._uids.values())
        uid = next((uid for uid in range(first, first + count) if uid not in taken), None)
        if uid is None:
            raise ExhaustedError(f"all {count} uids of this server are given to owners")
        new = self._owners / f"new-{uid}"
        new.write_text(owner, "utf-8", "surrogateescape")
        new.rename(self._owners / str(uid))  # whole or not at all: a uid must never change its owner
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

    __slots__ = ("_order", "attempts", "bell", "folder", "id", "record", "tail", "watch")

    def __init__(self, jobs: str, job_id: str) -> None:
        self.id = job_id
        self.folder = f"{jobs}/{job_id}"
        self.record = Record()
        self.bell = Bell()  # rings at every change of the record, and when the job leaves the table
        self.tail: Tail | None = None  # while somebody follows
        self.watch: int | None = None  # on `exit`, until the shim is gone
        self.attempts = 0  # finishers sent after a lost shim
        self._order: Order | None = None

    @property
    def ended(self) -> bool:
        return self.record.phase == "done"

    @property
    def order(self) -> Order:
        """What was asked. Raises NoSuchJobError where job.json is gone or unreadable."""
        order = self._order or read_order(self.folder)
        if order is None:
            raise NoSuchJobError(self.id)
        return order

    def ring(self) -> None:
        """Wake whoever waits for the job or follows it."""
        self.bell.ring()
        if self.tail is not None:
            self.tail.wake()

    def hold(self, order: Order | None) -> None:
        """Keep the order at hand while the job runs; of ten thousand ended ones nobody needs it."""
        self._order = order

    def refresh(self, *, closed: bool) -> None:
        """Read the record again. `done` counts only once the shim has let go of it: then it is on the disk."""
        record = read_record(self.folder)
        if closed or record.phase != "done":
            self.record = record
        self.bell.ring()

    def fate(self, *, alive: bool) -> str:
        """What a job is, whose shim lives or not: the first rule that fits."""
        record = self.record
        if record.phase == "done":
            return "ended"
        if alive:
            return "running"
        if record.phase in ("", "failed"):
            return "never ran"
        return "unfinished" if read_order(self.folder) else "unreadable"

    def output_bytes(self) -> int:
        try:
            return os.stat(f"{self.folder}/output").st_size
        except OSError:
            return 0


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
        return max(0.0, oldest.record.seconds("done") + self._keep - time.time()) if self._keep else None

    def oldest(self) -> Job:
        return next(iter(self._sizes))


class Worker:
    """Jobs on this machine: start, stop, status, stream and remove, with everything in one state folder.

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
    b'hello\\n'
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

    async def __aenter__(self) -> Worker:
        """Take the state folder and read its jobs back: after a crash as after anything else."""
        check_kernel()
        async with contextlib.AsyncExitStack() as resources:
            make_state_folder(self.options.state)
            resources.callback(os.close, lock_state_folder(self.options.state))
            self._tree = make_tree(self.options.cgroup, state_name(self.options.state), self.options.without)
            self._accounts.open()
            self._inotify.open()
            resources.callback(self._inotify.close)
            self._launcher.open(self._tree.shims)
            resources.callback(self._launcher.close)
            self._recover()
            retaining = asyncio.create_task(self._retain())
            resources.push_async_callback(cancelled, retaining)
            self._resources = resources.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.dismiss()
        await self._resources.aclose()

    def dismiss(self) -> None:
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
        async with self._launcher.places:
            for _ in range(2):
                job = self._same_job(request) or self._begin(self._order(request))
                await self._until(job, lambda: job.record.phase not in ("", "born") or not self._holds(job))
                if job.record.failure:
                    await self._until(job, lambda: not self._holds(job))
                    raise start_failure(job.record.failure, job.order)
                if job.record.phase:
                    return job.id
        raise UnavailableError("the launcher died before it could start the job; try again")

    def _same_job(self, request: JobRequest) -> Job | None:
        """The job that an earlier try with the same id began."""
        job = self._table.get(request.id)
        if job is None:
            return None
        order = job.order
        if (order.owner, order.command, order.args) != (request.owner, request.command, request.args):
            raise IdTakenError(f"the job id {request.id} is taken by another owner or command")
        return job

    def _order(self, request: JobRequest) -> Order:
        """The whole order: the request, the defaults and caps, the account and the cgroup's name."""
        options = self.options
        if self.running >= options.max_jobs:
            raise ExhaustedError(f"{self.running} jobs are running, and `serve --max-jobs` allows no more")
        reserve = checked_reserve(options.state, options.reserve)
        account = self._account(request)
        job_id = request.id or new_job_id()
        return Order(
            id=job_id, owner=request.owner, command=request.command, args=request.args,
            uid=account.uid, gid=account.gid, groups=account.groups, user=account.name, home=account.home,
            cgroup=self._tree.job_path(account.uid, job_id), controllers=tuple(sorted(self._tree.controllers)),
            limits=limits_of(request, options),
            timeout=options.timeout if request.timeout is None else request.timeout,
            max_output=capped("max-output", request.max_output, options.max_output, options.max_output),
            reserve=reserve, created=time.time(),
        )  # fmt: skip

    def _account(self, request: JobRequest) -> Account:
        if os.geteuid() == 0:
            return Account.named(request.run_as) if request.run_as else self._accounts.of(request.owner)
        own = Account.own()
        if request.run_as not in ("", own.name):
            raise BadRequestError(f"this server runs as {own.name}, and only root can run a job as {request.run_as!r}")
        return own

    def _begin(self, order: Order) -> Job:
        job = Job(self._jobs, order.id)
        with contextlib.ExitStack() as undo:
            make_job_folder(job)
            undo.callback(self._dispose, job)
            job.hold(order)
            self._table[job.id] = job
            with contextlib.ExitStack() as handed:
                descriptors = make_record(job.folder, handed)
                write_order(job.folder, order)
                self._watch(job)
                descriptors += self._make_cgroup(order, handed)
                self._launcher.send("start", job.folder, order, descriptors)
            undo.pop_all()
        return job

    def _make_cgroup(self, order: Order, handed: contextlib.ExitStack) -> list[int]:
        if not order.cgroup:
            return []
        cgroup = self._tree.make_job(order.uid, order.id, order.limits)
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
        order, record = job.order, job.record
        ending = record.ending if job.ended else None
        return JobStatus(
            status=ending.status if ending else "RUNNING",
            order=order,
            ending=ending,
            usage=record.usage,
            started=record.seconds("started"),
            ended=record.seconds("ended") if ending else 0.0,
            output_bytes=job.output_bytes(),
            notes=job_notes(order.cgroup != "", order.controllers, separate=order.uid not in (0, os.geteuid())),
        )

    async def stop(self, job_id: str, by: str = "") -> None:
        """Kill the whole job and return when it is dead; an ended job stays as it is."""
        job = self.job(job_id)
        if job.ended:
            return
        if not send_wish(job.folder, by):
            job.refresh(closed=True)
            self._settle(job, alive=False)
        try:
            await asyncio.wait_for(self._until(job, lambda: job.ended or not self._holds(job)), STOP_SECONDS)
        except asyncio.TimeoutError:
            raise UnavailableError(
                f"job {job_id} was killed but has not died within {STOP_SECONDS:.0f} s (a process that waits for a "
                f"disk or a network file system cannot); ask again"
            ) from None

    async def stop_all(self, by: str = "") -> None:
        """Stop every running job, all at once."""
        running = [job.id for job in self._table.values() if not job.ended]
        await asyncio.gather(*(self.stop(job_id, by) for job_id in running))

    async def stream(self, job_id: str, offset: int = 0) -> AsyncIterator[bytes]:
        """The job's output from byte `offset`, live, until the job has ended and everything was given."""
        job = self.job(job_id)
        tail = job.tail = job.tail or Tail(f"{job.folder}/output", self._inotify)
        tail.acquire()
        try:
            while True:
                over = job.ended or not self._holds(job)  # asked before the read, which then has every byte
                if chunk := tail.read(offset):
                    offset += len(chunk)
                    yield chunk
                elif over:
                    return
                elif not self._inotify.is_open:
                    raise UnavailableError("the server is stopping; the job goes on")
                elif not tail.arm():
                    await tail.changed()
        finally:
            if tail.release() == 0:
                job.tail = None

    def remove(self, job_id: str) -> None:
        """Forget an ended job and its output. Raises StillRunningError."""
        job = self.job(job_id)
        if not job.ended:
            raise StillRunningError(f"job {job_id} is running; stop it first")
        self._dispose(job)

    # -- What the kernel tells: records that change, shims that are gone

    @property
    def _jobs(self) -> str:
        return f"{self.options.state}/jobs"

    def _holds(self, job: Job) -> bool:
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

        job.watch = self._inotify.watch(f"{job.folder}/exit", IN_MODIFY | IN_CLOSE_WRITE, changed)

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
            "running": lambda job: None,
            "ended": self._retire,
            "never ran": self._dispose,
            "unreadable": self._set_aside,
            "unfinished": self._finish,
        }
        actions[job.fate(alive=alive)](job)

    def _retire(self, job: Job) -> None:
        if job.watch is not None:
            self._inotify.unwatch(job.watch)
            job.watch = None
        job.hold(None)
        self._retention.add(job)
        job.ring()

    def _finish(self, job: Job) -> None:
        """Have a shim that was lost replaced by one that only finishes: it kills what is left and says LOST."""
        job.attempts += 1
        if job.attempts > 3:
            say(f"job {job.id} cannot be finished; its record {job.folder}/exit says why")
            return
        if job.record.ending is None:
            say(f"the shim of job {job.id} is gone without a record: killing what is left of it")
        with contextlib.ExitStack() as handed:
            descriptors = open_record(job.folder, handed)
            self._launcher.send("finish", job.folder, job.order, descriptors)

    def _leave(self, job: Job) -> None:
        """Take a job out of the table; whoever waits for it sees that."""
        if job.watch is not None:
            self._inotify.unwatch(job.watch)
            job.watch = None
        if self._holds(job):
            del self._table[job.id]
        self._retention.discard(job)
        job.ring()

    def _dispose(self, job: Job) -> None:
        """The one place that deletes a job: its cgroup, then its folder, the record first, so that what a crash
        leaves is a job that never ran."""
        try:
            order = read_order(job.folder)
            if order is not None:
                order.processes().remove()
            delete_job_folder(job.folder)
        except (JobWorkerError, OSError) as error:
            say(f"job {job.id} is not wholly removed: {error}")
        self._leave(job)

    def _set_aside(self, job: Job) -> None:
        """Keep, where nobody stumbles over it, what cannot be understood."""
        aside = self.options.state / "aside"
        aside.mkdir(mode=0o700, exist_ok=True)
        os.rename(job.folder, aside / f"{job.id}-{time.time_ns()}")
        say(f"{job.folder} cannot be read as a job; it is now in {aside}")
        self._leave(job)

    # -- Recovery and retention

    def _recover(self) -> None:
        """Read every job folder back: adopt what runs, keep what ended, clear away what never ran."""
        ended = []
        for name in os.listdir(self._jobs):
            job = Job(self._jobs, name)
            if JOB_ID.fullmatch(name) is None or not os.path.isdir(job.folder):
                self._set_aside(job)
                continue
            self._table[name] = job
            job.record = read_record(job.folder)
            if job.ended:
                ended.append(job)
            else:
                self._adopt(job)
        for job in sorted(ended, key=lambda job: job.record.seconds("done")):
            self._retire(job)

    def _adopt(self, job: Job) -> None:
        """Watch first, then read: what the shim writes in between is either read or an event."""
        if os.path.exists(f"{job.folder}/exit"):
            self._watch(job)
        alive = shim_lives(job.folder)
        job.refresh(closed=not alive)
        job.hold(read_order(job.folder))
        self._settle(job, alive=alive)

    async def _retain(self) -> None:
        """Forget ended jobs when their time, or the room for them, is over; one at a time, so that it is not felt."""
        while True:
            left = self._retention.seconds_left()
            if left == 0.0:
                self._dispose(self._retention.oldest())
                await asyncio.sleep(0)
                continue
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._retention.bell.wait(), left)


async def cancelled(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait until it is."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def check_kernel() -> None:
    """Refuse a kernel without pidfds that can be waited for (Linux 5.4)."""
    release = os.uname().release
    version = tuple(map(int, re.findall(r"\d+", release)[:2]))
    if version < (5, 4):
        raise JobWorkerError(f"this is Linux {release}, and serving jobs needs 5.4 or newer")


def make_state_folder(state: Path) -> None:
    """Make what is missing; jobs pass through the state folder to their homes, and through nothing else."""
    mode = 0o711 if os.geteuid() == 0 else 0o700
    try:
        state.mkdir(mode=mode, parents=True, exist_ok=True)
        state.chmod(mode)
        (state / "jobs").mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise KernelError(f"cannot use the state folder {state} (`--state DIR` names another)", error) from error


def lock_state_folder(state: Path) -> int:
    """Hold `<state>/lock` (flock(2)) with the pid inside; the descriptor is the lock."""
    descriptor = os.open(state / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 32).decode().strip() or "unknown"
        os.close(descriptor)
        raise JobWorkerError(f"the state folder {state} is in use by the server with pid {holder}") from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def state_name(state: Path) -> str:
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
        raise BadRequestError(f"{name} {asked:g} is not allowed here: more than 0 and at most {cap:g} (`serve --max-{name}`)")
    return type(cap)(asked)


def limits_of(request: JobRequest, options: WorkerOptions) -> Limits:
    asked, default, cap = request, options.defaults, options.caps
    return Limits(
        cpu=capped("cpu", asked.cpu, default.cpu, cap.cpu),
        memory=capped("memory", asked.memory, default.memory, cap.memory),
        pids=capped("pids", asked.pids, default.pids, cap.pids),
        io=capped("io", asked.io, default.io, cap.io),
    )


def checked_reserve(state: Path, share: float) -> int:
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


def make_record(folder: str, handed: contextlib.ExitStack) -> list[int]:
    """Make `control`, `output` and `exit`; descriptors of control and exit, which `handed` closes."""
    try:
        os.mkfifo(f"{folder}/control", 0o600)
        os.close(os.open(f"{folder}/output", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        record = os.open(f"{folder}/exit", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.close(record)
        descriptors = open_record(folder, handed)
        allocate(descriptors[1], RECORD_BYTES)
    except OSError as error:
        raise disk_error(f"cannot make {folder}/exit", error) from error
    return descriptors


def allocate(descriptor: int, size: int) -> None:
    """Reserve the record's block without changing its size (fallocate(2)), where the file system can."""
    try:
        libc_call("fallocate", descriptor, FALLOC_FL_KEEP_SIZE, ctypes.c_long(0), ctypes.c_long(size))
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise


def open_record(folder: str, handed: contextlib.ExitStack) -> list[int]:
    """Descriptors of `control` and `exit` for a shim. O_RDWR: a FIFO opened for reading alone polls as hung up for
    ever after its first writer (fifo(7))."""
    control = os.open(f"{folder}/control", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    handed.callback(os.close, control)
    record = os.open(f"{folder}/exit", os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    handed.callback(os.close, record)
    return [control, record]


def disk_error(doing: str, error: OSError) -> JobWorkerError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE)
    return ExhaustedError(f"{doing}: {error.strerror}") if full else KernelError(doing, error)


def delete_job_folder(folder: str) -> None:
    for name in ("exit", "control", "output", "job.json"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{folder}/{name}")
    os.rmdir(folder)


def start_failure(number: int, order: Order) -> JobWorkerError:
    """The sentence for a command whose exec failed with that errno (execve(2))."""
    name = order.command
    places = [name] if "/" in name else [f"{folder}/{name}" for folder in JOB_PATH.split(":")]
    found = next((path for path in (os.path.join(order.home, place) for place in places) if os.path.lexists(path)), None)
    if number == errno.ENOENT and found is None:
        return BadRequestError(f"{name!r} is not found" + ("" if "/" in name else f" on PATH, which is {JOB_PATH}"))
    if number == errno.ENOENT:
        return BadRequestError(f"{found} cannot run: the interpreter that it names (its `#!` line, or its loader) is missing")
    if number == errno.EACCES and found and os.path.isdir(found):
        return BadRequestError(f"{found} is a folder, not a command")
    if number == errno.EACCES:
        return BadRequestError(f"{found or name} is not executable for {order.user}")
    if number == errno.ENOEXEC:
        return BadRequestError(f"{found or name} cannot run: it is no program of this machine and has no `#!` line")
    if number == errno.E2BIG:
        return BadRequestError(f"{name!r} with its {len(order.args)} arguments is too long for the kernel (128 KiB each, 2 MiB in all)")
    if number in (errno.EAGAIN, errno.ENOMEM):
        return ExhaustedError(f"this machine cannot start another process: {os.strerror(number)}")
    if number in (errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ETXTBSY, errno.EINVAL, errno.EPERM):
        return BadRequestError(f"{name!r} cannot run: {os.strerror(number)}")
    return JobWorkerError(f"{name!r} could not be started: {os.strerror(number)}")


