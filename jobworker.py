#!/usr/bin/env python3
"""Job worker runs commands on a Linux machine, each in its own cgroup, over mutual TLS 1.3 and gRPC.

This is one module, and it reads from top to bottom. ``serve`` is the server. ``run``, ``start``, ``stop``, ``stream``
and the other verbs are clients of it. `Worker` is the library below both: it needs no gRPC, no TLS and no third-party
package.

The processes, and the path of a byte from a job to a client::

    client ══ gRPC, mTLS 1.3 ══ server ── one packet with descriptors ──> launcher
                                 │ ▲ ▲                                       │ fork
                                 │ │ └─ inotify ─ <state>/jobs/<id>/events <─┤
                    stop request │ │                                         ▼
                                 └─┼──> <state>/jobs/<id>/control (FIFO) ─> shim ── clone3 into ──> job
                                   │                                         │      its cgroup       │
            inotify, pread 256 KiB └─── <state>/jobs/<id>/output <─ splice ──┴──────── pipe <────────┘
                                                                                  stdout and stderr

The server holds nothing in memory that it cannot read back from the job folders. The launcher is this module again,
started without third-party imports, so that its forks are cheap. Each job has one shim: the shim is the parent of the
job's main process and writes the job's end to disk, whether or not a server runs. A job with input has one more
process, the mover: server ══ socket ══> mover ── pipe ──> job. Only the mover blocks if a job reads no input.

An owner is the common name of a caller's certificate. An engine is another scheduler, for example Slurm: the job's main
process is then the engine's client (srun), and the engine runs the command.

Contents (each section uses only the sections above it)
     1. Names and limits                    the defaults, and the numbers that several sections use
     2. Errors                              one base class; calls of libc; printable text
     3. Cgroup                              the cgroup tree: limits, kill, removal
     4. Output and inotify                  one inotify descriptor; following a file
     5. Job folder                          every file of the state folder: spec, events, control, output
     6. Confinement                         namespaces, mounts and privileges of a confined job
     7. Launcher and shim                   the launcher of the server; the shim and the child of each job
     8. Accounts                            the uid and the home that a job runs with
     9. Requests                            what a caller may ask for, and why a command could not be started
    10. Disk and ports                      what is free, who uses it, and who holds a port
    11. Input                               a job's standard input: its pipe, its one sender, its end
    12. Job and job table                   `Worker`: start, stop, status, stream, recovery, retention
    13. Certificates                        authorities, what they issue, and what a server's folder holds
    14. Identity and authorization          the caller, the caller's role, and the jobs that the caller may see
    15. gRPC service                        a thin layer over `Worker`; the only place that makes gRPC statuses
    16. Server                              port, signals, reload, systemd
    17. Client                              connecting, retrying, explaining failures, resuming a stream
    18. Options and printed lines           what several verbs share
    19. Verbs of the server's machine       serve, identity, revoke, unit
    20. Verbs of a client                   run, start, stop, status, stream, list, wait, signal, rm
    21. Main                                one table of verbs; `main`

As a library, `Worker` and the names in `__all__` are stable within a major version. Everything else may change.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import functools
import gc
import importlib
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

TYPE_CHECKING = False  # `typing` is not imported: it would make the launcher, and so each shim, larger
if TYPE_CHECKING:
    import argparse
    import asyncio
    import binascii
    import ctypes
    import datetime
    import hashlib
    import io
    import ipaddress
    import json
    import pathlib
    import pwd
    import queue
    import shlex
    import shutil
    import ssl
    import subprocess
    import threading
    import traceback
    import weakref
    import zlib
    from collections.abc import (
        AsyncGenerator,
        AsyncIterable,
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

__all__ = [
    "BadRequestError",
    "CannotRunError",
    "DeniedError",
    "Ending",
    "ExhaustedError",
    "IdTakenError",
    "InputCutError",
    "InputError",
    "Job",
    "JobRequest",
    "JobStatus",
    "JobWorkerError",
    "KernelError",
    "Limits",
    "NoAnswerError",
    "NoSuchJobError",
    "OwnerLimits",
    "Spec",
    "StillRunningError",
    "UnavailableError",
    "Usage",
    "Worker",
    "WorkerOptions",
    "main",
]

DEFERRED = {  # each of these names is a module that is imported at its first use
    "argparse": "argparse",
    "asyncio": "asyncio",
    "binascii": "binascii",
    "ctypes": "ctypes",
    "datetime": "datetime",
    "hashlib": "hashlib",
    "ipaddress": "ipaddress",
    "json": "json",
    "pathlib": "pathlib",
    "pwd": "pwd",
    "queue": "queue",
    "shlex": "shlex",
    "shutil": "shutil",
    "ssl": "ssl",
    "subprocess": "subprocess",
    "threading": "threading",
    "traceback": "traceback",
    "weakref": "weakref",
    "zlib": "zlib",
    "grpc": "grpc",
    "pb": "gen.workerservice_pb2",
    "protobuf": "google.protobuf.message",
    "x509": "cryptography.x509",
    "exceptions": "cryptography.exceptions",
    "hashes": "cryptography.hazmat.primitives.hashes",
    "serialization": "cryptography.hazmat.primitives.serialization",
    "ec": "cryptography.hazmat.primitives.asymmetric.ec",
    "ed448": "cryptography.hazmat.primitives.asymmetric.ed448",
    "ed25519": "cryptography.hazmat.primitives.asymmetric.ed25519",
    "rsa": "cryptography.hazmat.primitives.asymmetric.rsa",
}


class Deferred:
    """A module that is imported at its first use.

    A client pays for each import at every call, and each shim pays for what the launcher has imported. So a module is
    imported at its first use. `serve` imports all of them when it starts (`import_everything`).
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(importlib.import_module(self._name), attribute)
        setattr(self, attribute, value)  # the next access does not call this function
        return value


if not TYPE_CHECKING:
    globals().update({name: Deferred(module) for name, module in DEFERRED.items()})


# --- 1. Names and limits ------------------------------------------------------------------------------
# Owns the defaults of jobs, and the names and numbers that several sections use. A number that only one section uses
# stands at the head of that section. It holds no code.

VERSION = "1.0.0"
SUMMARY = "Job worker runs commands on a Linux machine, each in its own cgroup, over mutual TLS 1.3 and gRPC."
BUILD = ""  # the commit and the packages of a .pyz, set by its bootstrap
DEFAULT_PORT = 8010

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
CPU_LIMIT = 1.0  # CPUs that a job may use
MEMORY_LIMIT = 512 * MIB  # bytes; swap is off
PIDS_LIMIT = 512  # processes and threads
IO_LIMIT = 64 * MIB  # bytes a second, each way, on each disk
OUTPUT_LIMIT = GIB  # bytes of output; a job that prints more is ended
KEEP_SECONDS = 7 * 86400.0  # how long an ended job is kept
RESERVE = 0.05  # the share of the state folder's file system that jobs may not fill
MAX_JOBS = 4096  # jobs that run at the same time
ADMIN_JOBS = 16  # jobs that admins may start beyond MAX_JOBS
IO_FLOOR = MIB  # bytes a second; below it a kill waits for minutes until written pages have reached the disk
NO_BOUND = (1 << 63) - 1
OWNER_MEMORY, OWNER_PIDS = 0.75, 0.25  # shares of the machine's memory and of its process numbers, for one owner
OWNER_CALLS, OWNER_STREAMS = 64, 512  # calls and streams that one owner has open at the same time
OWNER_INPUTS = 64  # jobs of one owner whose input has not ended; each holds messages, a pipe and a process
SHIMS_IO_LIMIT = 512 * MIB  # bytes a second that all shims together may write

CONTROLLERS = ("cpu", "memory", "pids", "io")
JOB_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
JOB_ID_VARIABLE = "JOBWORKER_JOB_ID"
JOB_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
ROLES = ("admin", "user")

Content: TypeAlias = "bytes | memoryview"  # a view is a part of a message that is not copied
READ_BYTES, SMALLEST_READ_BYTES = 256 * KIB, 16 * KIB  # one read of an output, and so one message of a stream
INPUT_BYTES, OLD_INPUT_BYTES = 512 * KIB, 256 * KIB  # of one message of an input; and what an older server takes
INPUT_SECONDS = 60.0  # a job whose input nobody has begun to send this long after its start is stopped
STREAMS_BYTES = 4 * MIB  # one message of each stream of an owner, together; more streams have smaller messages
COALESCE_SECONDS = 0.002  # shortest time between two wake-ups of a follower; what is written meanwhile is one message
FOLLOWER_SECONDS = 0.0002  # the pause after a wake-up, for each follower that it woke; one message costs 0.1 ms
WAKE_GROUP = 16  # followers that are woken at the same time
# The launcher's socket holds 64 packets of PACKET_BYTES (section 7), so 48 + 16 requests fit. A send to a full socket
# fails.
START_SLOTS, FINISH_SLOTS = 48, 16
LONGEST_GRACE = 86400  # seconds between the signal and the kill of a stop
ARGUMENTS_BYTES = 2 * MIB  # of a command, its arguments and its environment: a quarter of the stack's limit (execve(2))
VARIABLES = 4096  # that a request may add to a job's environment
GRACE = 5.0  # seconds from TERM to the kill of a job that runs through an engine
END_SECONDS = 120.0  # how long an engine may take to tell how a job ended; its controller may restart meanwhile
STOP_SECONDS = 30.0  # how long a stop waits for a job that the server itself killed before it reports that it lives

# systemd.io/UIDS-GIDS lists this range as unused: 4096 ranges of 65536 uids, one range for each state folder.
UID_RANGES_BASE, UID_RANGE, UID_RANGES = 1879048192, 65536, 4096
UID_CLAIMS = "/var/lib/jobworker-uids"  # a file for each range that is claimed: which state folder has it


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one job may use: CPUs, bytes of memory, processes, and bytes a second each way on each disk."""

    cpu: float = CPU_LIMIT
    memory: int = MEMORY_LIMIT
    pids: int = PIDS_LIMIT
    io: int = IO_LIMIT


# Of an engine's client: srun has 20 MB, whatever memory its job asks for.
ENGINE_CLIENT_LIMITS = Limits(memory=256 * MIB)


@dataclasses.dataclass(frozen=True)
class OwnerLimits:
    """What all jobs of one owner may use together. 0: no limit."""

    cpu: float = 0.0  # CPUs
    memory: int = 0  # bytes
    pids: int = 0  # processes and threads
    jobs: int = 0  # that run at the same time


# --- 2. Errors ----------------------------------------------------------------------------------------
# Owns the one base class of all errors, and the functions that turn the kernel's errno into an exception. An error
# carries its sentence, the gRPC status that the service sends, and the exit code that `main` returns. It also owns the
# calls of libc, the reading of small files, and the escaping of text from other people.


class JobWorkerError(Exception):
    """One sentence that tells a person what is wrong and what to do."""

    status = "INTERNAL"
    exit_code = 1


class BadRequestError(JobWorkerError):
    """A request that no server would carry out, for example with a limit above the server's maximum."""

    status = "INVALID_ARGUMENT"


class CannotRunError(BadRequestError):
    """A command cannot be run. `shell_code` is what a shell would exit with: 127 not found, 126 not runnable."""

    def __init__(self, sentence: str, shell_code: int = 126) -> None:
        super().__init__(sentence)
        self.shell_code = shell_code


class NoSuchJobError(JobWorkerError):
    """There is no such job, or the caller may not see it."""

    status = "NOT_FOUND"

    def __init__(self, job_id: str) -> None:
        super().__init__(f"there is no job {job_id}")


class NoAnswerError(JobWorkerError):
    """An answer did not come in time."""

    status = "DEADLINE_EXCEEDED"


class DeniedError(JobWorkerError):
    """The caller may not do this."""

    status = "PERMISSION_DENIED"


class StillRunningError(JobWorkerError):
    """A job that runs cannot be deleted."""

    status = "FAILED_PRECONDITION"


class InputError(JobWorkerError):
    """A job takes no input, or no more."""

    status = "FAILED_PRECONDITION"


class ExhaustedError(JobWorkerError):
    """The disk, the descriptors, the process numbers, or what one owner may have, are used up."""

    status = "RESOURCE_EXHAUSTED"


class IdTakenError(JobWorkerError):
    """A job with this id exists, and was started with another request."""

    status = "ALREADY_EXISTS"


class UnavailableError(JobWorkerError):
    """The server is stopping or cannot be reached. The same call can be made again: a start with an id starts once."""

    status = "UNAVAILABLE"


class KernelError(JobWorkerError):
    """A system call failed. The sentence names what was tried; `errno` is the kernel's reason."""

    def __init__(self, doing: str, error: OSError) -> None:
        super().__init__(f"{doing}: {error.strerror}")
        self.errno = error.errno


class OneJobError(JobWorkerError):
    """A call for one job was refused, or a word names no job. A verb goes on with its other jobs."""


class BusyError(OneJobError):
    """A call was refused because a limit was reached, for example `--owner-calls`."""


class OldServerError(JobWorkerError):
    """The server does not know a call that the client's verb needs."""


class ExposedKeyError(JobWorkerError):
    """Other users can read a private key."""


class InputCutError(JobWorkerError):
    """A job did not get all of its input, and was stopped."""

    status = "ABORTED"


class UsageError(JobWorkerError):
    """The command line is wrong."""

    exit_code = 2


def disk_error(doing: str, error: OSError) -> JobWorkerError:
    """ExhaustedError if a disk or the descriptors ran out, else KernelError."""
    exhausted = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE)
    return ExhaustedError(f"{doing}: {error.strerror}") if exhausted else KernelError(doing, error)


def errno_of(error: BaseException) -> int:
    """The kernel's reason for an OSError, or for the error of this module that was raised from it; 0: none."""
    return getattr(error, "errno", None) or getattr(error.__cause__, "errno", None) or 0


# What a terminal would obey: C0, DEL, C1, the line separators, and the marks that change the direction of a text.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """A text in which every control character is escaped. Names and sentences come from other people, and a terminal
    would obey an escape sequence in them. A newline would forge a second line.
    """
    if text.isprintable():  # it has no control character. Most texts are printable, and this check costs a tenth
        return text
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def say(sentence: str) -> None:
    """Write one line to standard error. A log that cannot be written (a full disk, a closed pipe) must not stop the
    server, so errors are ignored.
    """
    with contextlib.suppress(OSError):
        print(f"jobworker: {printable(sentence)}", file=sys.stderr, flush=True)


def read_whole(path: str) -> bytes:
    """All bytes of a small file. Raises OSError. The built-in `open` costs three times as much in each shim."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return b"".join(iter(functools.partial(os.read, descriptor, 64 * KIB), b""))
    finally:
        os.close(descriptor)


def read_start(path: str, size: int) -> bytes:
    """The first `size` bytes of a file. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, size)
    finally:
        os.close(descriptor)


def read_end(path: str, size: int) -> bytes:
    """The last `size` bytes of a file. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(descriptor, size, max(0, os.fstat(descriptor).st_size - size))
    finally:
        os.close(descriptor)


def libc_call(name: str, *arguments: Any) -> int:
    """Call a libc function by its name. Raises OSError with libc's errno if it returns -1."""
    result: int = getattr(libc(), name)(*arguments)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)
    return result


@functools.cache
def libc() -> ctypes.PyDLL:
    # PyDLL does not release the GIL, since no other thread may run Python during clone3. No call here blocks for long.
    return ctypes.PyDLL(None, use_errno=True)


# --- 3. Cgroup ----------------------------------------------------------------------------------------
# Owns everything below the cgroup2 mount: the place of the tree, the controllers that it has, one cgroup for each job.
# Every write goes through `kernel_write`. It knows a job only as an id and a uid, and nothing of the wire.
# The names and formats of files are those of Documentation/admin-guide/cgroup-v2.rst.


def kernel_write(path: str, value: str) -> None:
    """Write one value to one file of cgroupfs or procfs. Raises KernelError, which names the value and the file."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, value.encode())
        finally:
            os.close(descriptor)
    except OSError as error:
        raise KernelError(f"cannot write {value!r} to {path}", error) from error


def kernel_read(path: str) -> str:
    """The contents of a file of cgroupfs, procfs or sysfs; empty if this kernel does not have the file."""
    try:
        return os.fsdecode(read_whole(path))
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        if error.errno in (errno.ENODEV, errno.EOPNOTSUPP):  # the cgroup was removed after the file was opened
            return ""
        raise KernelError(f"cannot read {path}", error) from error


def keyed_values(text: str) -> dict[str, int]:
    """A flat keyed file (`populated 1`) as a dictionary."""
    return {key: int(value) for key, _, value in (line.partition(" ") for line in text.splitlines())}


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a job used, by the kernel's counters. None: this machine does not count it."""

    cpu_seconds: float | None = None
    memory_peak: int | None = None  # bytes
    read_bytes: int | None = None
    written_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class Disk:
    """A whole disk: its device number `MAJOR:MINOR` and its name below /sys/block."""

    number: str
    name: str


def cpu_files(limits: Limits, _disks: Sequence[Disk]) -> list[tuple[str, str]]:
    period = 100_000  # microseconds; the kernel accepts no quota below 1000
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


POPULATED_MILLISECONDS = 1000  # the kernel sends no event when a cgroup is removed, so the poll has a timeout


class Cgroup:
    """One cgroup, by its path. It holds no descriptor."""

    def __init__(self, path: str) -> None:
        self.path = path

    def create(self) -> bool:
        """Make this cgroup and those above it. Returns whether it is new. Raises KernelError."""
        try:
            os.makedirs(self.path, mode=0o755)
        except FileExistsError:
            return False
        except OSError as error:
            raise KernelError(f"cannot create the cgroup {self.path}", error) from error
        return True

    def hide(self, mode: int, gid: int = -1) -> None:
        """Do not let other users list this cgroup: the names in it are uids and ids of jobs."""
        try:
            os.chown(self.path, -1, gid)
            os.chmod(self.path, mode)
        except OSError as error:
            raise KernelError(f"cannot change the mode of the cgroup {self.path}", error) from error

    def controllers(self) -> frozenset[str]:
        return frozenset(kernel_read(f"{self.path}/cgroup.controllers").split())

    def enable(self, controllers: Iterable[str]) -> frozenset[str]:
        """Enable controllers for the children of this cgroup. Returns those that are enabled afterwards."""
        file, wanted = f"{self.path}/cgroup.subtree_control", frozenset(controllers)
        missing = wanted.difference(kernel_read(file).split())
        if not missing:
            return wanted
        for controller in missing & self.controllers():
            with contextlib.suppress(KernelError):  # EBUSY if processes are in this cgroup; the result lacks it then
                kernel_write(file, f"+{controller}")
        return wanted.intersection(kernel_read(file).split())

    def limit(self, limits: Limits, controllers: Iterable[str], disks: Sequence[Disk]) -> None:
        for controller in controllers:
            for file, value in LIMIT_FILES[controller](limits, disks):
                # A kernel without swap accounting has no memory.swap.max, and no swap is charged to the job.
                if file != "memory.swap.max" or os.path.exists(f"{self.path}/{file}"):
                    kernel_write(f"{self.path}/{file}", value)

    def limit_total(self, total: OwnerLimits, controllers: Iterable[str]) -> None:
        """Limit what all cgroups below this one use together. Each owner's cgroup has the same share of the CPUs."""
        period = 100_000
        values = {
            "cpu": [
                ("cpu.weight", "100"),
                ("cpu.max", f"{max(1000, round(total.cpu * period)) if total.cpu else 'max'} {period}"),
            ],
            "memory": [("memory.max", str(total.memory or "max"))],
            "pids": [("pids.max", str(total.pids or "max"))],
        }
        for controller in controllers:
            for file, value in values.get(controller, []):
                kernel_write(f"{self.path}/{file}", value)

    def attach(self, process: int) -> None:
        """Move a process into this cgroup. 0 is the caller."""
        kernel_write(f"{self.path}/cgroup.procs", str(process))

    def attach_within_total(self) -> None:
        """Move the caller into this cgroup. Raises OSError (EAGAIN) if the cgroup above has more processes then than
        its pids.max: the kernel lets an attach pass it. The caller has to end then.

        The count is read after the attach. Of several starts at the bound each would find room before it.
        """
        self.attach(0)
        owner = os.path.dirname(self.path)
        bound, count = (kernel_read(f"{owner}/pids.{name}").strip() for name in ("max", "current"))
        if bound.isdigit() and int(count) > int(bound):
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def open(self) -> int:
        """A descriptor of the cgroup's folder, for CLONE_INTO_CGROUP. The caller closes it. Raises OSError."""
        return os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def kill(self) -> None:
        """Send SIGKILL to every process in this cgroup and below at once, including processes that are forking."""
        self._lift_io()
        if os.path.exists(f"{self.path}/cgroup.kill"):
            kernel_write(f"{self.path}/cgroup.kill", "1")
        elif os.path.isdir(self.path):
            self._kill_frozen()

    def _lift_io(self) -> None:
        """Remove io.max: a process cannot die before its writes are done, which took minutes at 20 kB a second."""
        for line in kernel_read(f"{self.path}/io.max").splitlines():
            with contextlib.suppress(KernelError):
                kernel_write(f"{self.path}/io.max", f"{line.split()[0]} rbps=max wbps=max riops=max wiops=max")

    def members(self) -> list[int]:
        """The processes in this cgroup and below."""
        folders = (folder for folder, _, _ in os.walk(self.path))
        return [int(process) for folder in folders for process in kernel_read(f"{folder}/cgroup.procs").split()]

    def _kill_frozen(self) -> None:
        """Kill without cgroup.kill, which Linux has from 5.14. A frozen process cannot fork, and SIGKILL ends it."""
        kernel_write(f"{self.path}/cgroup.freeze", "1")
        try:
            self.send(signal.SIGKILL)
        finally:
            kernel_write(f"{self.path}/cgroup.freeze", "0")

    def send(self, number: int) -> None:
        """Send a signal to every process in this cgroup and below. A child that is forked meanwhile may not get it."""
        for folder, _, _ in os.walk(self.path):
            for process in kernel_read(f"{folder}/cgroup.procs").split():
                with contextlib.suppress(ProcessLookupError, PermissionError):  # EPERM: the process has another uid now
                    os.kill(int(process), number)

    def populated(self) -> bool:
        return keyed_values(kernel_read(f"{self.path}/cgroup.events")).get("populated", 0) == 1

    def kill_all(self) -> None:
        """Kill, and return when no process lives in this cgroup or below."""
        with self._changes() as waiter:
            while self.populated():
                # Repeated after each change: without cgroup.kill, a child that is forked before the freeze takes effect
                # can be missed.
                self.kill()
                if self.populated():
                    waiter.poll(POPULATED_MILLISECONDS)

    def end_all(self, grace: float) -> None:
        """Send TERM, and return when no process lives in this cgroup or below, or after `grace` seconds."""
        with self._changes() as waiter:
            self.send(signal.SIGTERM)
            self.send(signal.SIGCONT)
            deadline = time.monotonic() + grace
            while self.populated() and (left := deadline - time.monotonic()) > 0:
                waiter.poll(min(left * 1000, POPULATED_MILLISECONDS))

    @contextlib.contextmanager
    def _changes(self) -> Iterator[select.poll]:
        """A poll that reports when `populated` may have changed since the block began (cgroup.events)."""
        waiter = select.poll()
        with contextlib.ExitStack() as resources:
            with contextlib.suppress(FileNotFoundError):  # the cgroup is gone, so no process is in it
                events = os.open(f"{self.path}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
                resources.callback(os.close, events)
                waiter.register(events, select.POLLPRI)
                os.pread(events, 4096, 0)  # a change after this read is reported as POLLPRI
            yield waiter

    def remove(self) -> None:
        """Remove this cgroup and all below it, children first. No process may live in it."""
        with contextlib.suppress(OSError):  # most cgroups have no children, and this call is cheaper than the walk
            os.rmdir(self.path)
            return
        for folder, _, _ in os.walk(self.path, topdown=False):
            try:
                os.rmdir(folder)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise KernelError(f"cannot remove the cgroup {folder}", error) from error

    def memory_current(self) -> int:
        """Bytes of memory in use now; 0 if this kernel does not count them."""
        return int(kernel_read(f"{self.path}/memory.current").strip() or 0)

    def out_of_memory_kills(self) -> int:
        return keyed_values(kernel_read(f"{self.path}/memory.events")).get("oom_kill", 0)

    def usage(self) -> Usage:
        cpu = keyed_values(kernel_read(f"{self.path}/cpu.stat")).get("usage_usec")
        peak = kernel_read(f"{self.path}/memory.peak").strip()  # from Linux 5.19
        transfers = kernel_read(f"{self.path}/io.stat")
        counted = os.path.exists(f"{self.path}/io.stat")
        return Usage(
            cpu_seconds=None if cpu is None else cpu / 1e6,
            memory_peak=int(peak) if peak else None,
            read_bytes=sum(map(int, re.findall(r"rbytes=(\d+)", transfers))) if counted else None,
            written_bytes=sum(map(int, re.findall(r"wbytes=(\d+)", transfers))) if counted else None,
        )


def all_processes() -> Iterator[int]:
    """The processes of this machine. The kernel lists them in blocks, so no step takes long."""
    with os.scandir("/proc") as entries:
        for entry in entries:
            if entry.name.isdigit():
                yield int(entry.name)


class ProcessTree:
    """Replaces `Cgroup` on a machine without a writable cgroup2: no limits, and processes are found by a search.

    It finds the descendants of the caller (a shim is their subreaper, prctl(2)) and every process that has the job's
    id in its environment. A process can change its environment, so a hostile job can evade this search.
    """

    def __init__(self, job_id: str) -> None:
        self._variable = f"{JOB_ID_VARIABLE}={job_id}"

    def members(self) -> list[int]:
        """The processes that have the job's id in their environment."""
        return [process for process in all_processes() if self._has(process)]

    def _has(self, process: int) -> bool:
        with contextlib.suppress(OSError, KernelError):
            return self._variable in kernel_read(f"/proc/{process}/environ").split("\0")
        return False

    def kill_members(self) -> Iterator[None]:
        """Kill the processes that `members` finds. This is for the server, whose descendants are all shims and jobs.
        It yields after each process of the machine, so that its caller can let other tasks run.
        """
        for process in all_processes():
            if self._has(process):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(process, signal.SIGKILL)
            yield

    def _find(self) -> list[int]:
        parents: dict[int, int] = {}
        found = set()
        for process in all_processes():
            with contextlib.suppress(OSError, KernelError, ValueError):  # the process ended during the search
                state, parent = kernel_read(f"/proc/{process}/stat").rpartition(")")[2].split()[:2]
                if state in "ZX":
                    continue
                parents[process] = int(parent)
                if self._has(process):
                    found.add(process)
        family = {os.getpid()}
        while more := {child for child, parent in parents.items() if parent in family} - family:
            family |= more
        return sorted((found | family) - {os.getpid()})

    def kill(self) -> None:
        self.send(signal.SIGKILL)

    def send(self, number: int) -> None:
        for process in self._find():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, number)

    def kill_all(self) -> None:
        self._kill_children()
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

    def end_all(self, grace: float) -> None:
        """Send TERM, and return when each process that is found has ended, or after `grace` seconds."""
        deadline = time.monotonic() + grace
        with contextlib.ExitStack() as resources:
            descriptors = []
            for process in self._find():
                with contextlib.suppress(OSError):
                    descriptors.append(os.pidfd_open(process))
                    resources.callback(os.close, descriptors[-1])
                    signal.pidfd_send_signal(descriptors[-1], signal.SIGTERM)
                    signal.pidfd_send_signal(descriptors[-1], signal.SIGCONT)
            for descriptor in descriptors:
                poller = select.poll()  # select(2) takes no descriptor above 1023
                poller.register(descriptor, select.POLLIN)
                poller.poll(max(0.0, deadline - time.monotonic()) * 1000)

    def _kill_children(self) -> None:
        """Kill children until none is left.

        Orphans are reparented to the caller, their subreaper. So the list of children is complete even for processes
        that are forked meanwhile, which a search of /proc can miss.
        """
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the handler of `reap_orphans` must not take children from here
        with contextlib.suppress(ChildProcessError):
            while True:
                # A kernel without CONFIG_PROC_CHILDREN does not list children. Then `_find` is used, which can
                # miss a child, so waitpid must not block.
                listed = [int(child) for child in kernel_read("/proc/thread-self/children").split()]
                for process in listed or self._find():
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(process, signal.SIGKILL)
                os.waitpid(-1, 0 if listed else os.WNOHANG)

    def remove(self) -> None:
        """Do nothing: a job without a cgroup has nothing to remove."""

    def memory_current(self) -> int:
        return 0

    def out_of_memory_kills(self) -> int:
        return 0

    def usage(self) -> Usage:
        return Usage()


@dataclasses.dataclass(frozen=True)
class CgroupMount:
    """The mount point of cgroup2, and the caller's place below it."""

    point: str
    own: str  # the caller's cgroup, as a path below `point`; equal to `point` at the visible root

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
        """The highest cgroup, from the mount point down to the caller's cgroup, in which the caller may make children
        and move processes (cgroup-v2.rst, Delegation). None: there is none.
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
    """The server's own tree: its root (None: this machine gives none) and the controllers that it enforces."""

    root: str | None
    controllers: frozenset[str]
    disks: tuple[Disk, ...]
    owner: OwnerLimits = OwnerLimits()  # of each owner's cgroup `u<uid>`
    # The owners' cgroups that have the limits of this server, each with the group that can pass through it.
    prepared: dict[str, int] = dataclasses.field(default_factory=dict)

    def job_path(self, uid: int, job_id: str) -> str:
        """The path of a job's cgroup; empty if this machine gives none."""
        return f"{self.root}/u{uid}/{job_id}" if self.root else ""

    @property
    def shims(self) -> str:
        return f"{self.root}/shims" if self.root else ""

    def make_job(self, path: str, limits: Limits, gid: int) -> Cgroup:
        """Make a job's cgroup at its `job_path` and write its limits. Of all other users, only the group `gid` can pass
        through the owner's cgroup.
        """
        cgroup = Cgroup(path)
        self._prepare_owner(Cgroup(os.path.dirname(path)), gid)
        cgroup.create()
        cgroup.limit(limits, self.controllers, self.disks)
        return cgroup

    def _prepare_owner(self, owner: Cgroup, gid: int) -> None:
        """Make an owner's cgroup and write what all its jobs may use. One that exists may be of an earlier server.
        Accounts with the same uid may have other groups.
        """
        if not owner.create() and self.prepared.get(owner.path) == gid:
            return
        self.prepared.pop(owner.path, None)  # if a write fails here, the next start repeats all of them
        if os.geteuid() == 0:
            owner.hide(0o710, gid)
        owner.enable(self.controllers)
        owner.limit_total(self.owner, self.controllers)
        self.prepared[owner.path] = gid

    def remove_unused(self) -> None:
        """Remove every cgroup without a shim or a job. After the last job of a state folder nothing is left."""
        if self.root:
            for folder in (*map(str, pathlib.Path(self.root).glob("u*")), self.shims, self.root):
                with contextlib.suppress(OSError):  # jobs or shims are in it
                    os.rmdir(folder)


def make_tree(top: str | None, folder: str, without: frozenset[str]) -> CgroupTree:
    """Make the tree of one state folder, whose name is `folder`.

    `top`, if it is given, replaces `jobworker` below the highest cgroup that the caller may manage. Raises
    JobWorkerError, which names each controller that is missing and not listed in `without`, and the remedies.
    """
    mount = CgroupMount.find()
    top = top or (mount and tree_top(mount)) or None
    wanted = [name for name in CONTROLLERS if name not in without]
    if top is None:
        enforced: frozenset[str] = frozenset()
    else:
        enforced = enable_down_to(f"{top}/{folder}", frozenset(wanted))
    disks = whole_disks()
    missing = [name for name in wanted if name not in enforced]
    if missing and "auto" not in without:
        raise JobWorkerError(missing_controllers(missing, mount, top))
    if top is None:
        return CgroupTree(None, frozenset(), ())
    tree = CgroupTree(f"{top}/{folder}", enforced, disks)
    shims = Cgroup(tree.shims)
    shims.create()
    if os.geteuid() == 0:
        Cgroup(f"{top}/{folder}").hide(0o711)
        shims.hide(0o700)
    if "io" in enforced:
        shims.limit(Limits(io=SHIMS_IO_LIMIT), ["io"], disks)
    return tree


def tree_top(mount: CgroupMount) -> str | None:
    """`jobworker` below the highest cgroup that the server may manage. If the server's own process is in that cgroup,
    it moves into a leaf below it.
    """
    highest = mount.highest_manageable()
    if highest is None:
        return None
    real_root = not os.path.exists(f"{highest}/cgroup.type")  # only the kernel's own root has no such file
    if highest == mount.own and not real_root:
        if highest != mount.point and highest.endswith(".service"):
            unit = os.path.basename(highest)
            raise JobWorkerError(
                f"the only cgroup that this server may manage is its own unit {unit}, and systemd could not start that "
                f"unit again while jobs are in it; run the unit as root or as a user's service (`systemctl --user`)"
            )
        move_to_leaf(highest)
    return f"{highest}/jobworker"


def move_to_leaf(cgroup: str) -> None:
    """Move the server, and no other process, to a leaf: a cgroup that has processes of its own cannot give controllers
    to its children (cgroup-v2.rst, No Internal Process Constraint).
    """
    leaf = Cgroup(f"{cgroup}/jobworker/server")
    leaf.create()
    leaf.attach(0)


def enable_down_to(path: str, controllers: frozenset[str]) -> frozenset[str]:
    """Enable controllers in `path` and its two parents, and make missing cgroups. Returns what is enabled in `path`."""
    for step in (os.path.dirname(os.path.dirname(path)), os.path.dirname(path), path):
        if controllers:
            Cgroup(step).create()
            controllers = Cgroup(step).enable(controllers)
    return controllers


def whole_disks() -> tuple[Disk, ...]:
    """Every physical disk. A limit on a stacked device (dm, md, loop, zram) would count the same byte twice."""
    disks = []
    for name in sorted(os.listdir("/sys/block") if os.path.isdir("/sys/block") else []):
        stacked = re.match(r"(loop|ram|zram|dm-|md|sr|fd)\d*", name)
        number, size = kernel_read(f"/sys/block/{name}/dev").strip(), kernel_read(f"/sys/block/{name}/size").strip()
        if not stacked and number and size != "0":
            disks.append(Disk(number, name))
    return tuple(disks)


def missing_controllers(missing: Sequence[str], mount: CgroupMount | None, top: str | None) -> str:
    """The sentence that says why this machine cannot enforce these limits, with the remedies."""
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
    remedy = "boot with `systemd.unified_cgroup_hierarchy=1 cgroup_no_v1=all`"
    if os.geteuid() != 0:
        remedy = f"have root add `Delegate={' '.join(CONTROLLERS)}` to user@.service"
    return f"the cgroup2 at {mount.point} does not give {names} to {top}; {remedy}, or use {skip}"


# --- 4. Output and inotify ------------------------------------------------------------------------------
# Owns the class of inotify descriptors, and the reading of outputs that clients follow. It never writes an output. It
# never polls: at the end of a file a follower sleeps until the kernel reports that the file grew, or until `Worker`
# wakes it. The source is inotify(7). It also owns how the tasks of the event loop wait for each other (`Bell`, `Turn`).

SHORTEST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 0.05, 1.0
PART_SECONDS = 0.0005  # of long work in one turn of the event loop
IN_MODIFY, IN_CLOSE_WRITE, IN_Q_OVERFLOW, IN_IGNORED, IN_ONESHOT = 0x2, 0x8, 0x4000, 0x8000, 0x80000000
IN_FOLDER = 0x2CC  # IN_ATTRIB, IN_CLOSE_WRITE, IN_MOVED_FROM, IN_MOVED_TO, IN_DELETE: a file in a folder has changed


@functools.cache
def splice_is_reported(folder: str) -> bool:
    """Whether the kernel reports a splice into a file of this folder as IN_MODIFY, by trying it once.

    The overlayfs of Linux 6.1 does not report it, and a follower would wait without end.
    """
    name = f"{folder}/.splice"
    with contextlib.ExitStack() as resources:

        def owned(descriptor: int) -> int:
            resources.callback(os.close, descriptor)
            return descriptor

        try:
            file = owned(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600))
            resources.callback(os.unlink, name)
            watcher = owned(libc_call("inotify_init1", os.O_NONBLOCK | os.O_CLOEXEC))
            libc_call("inotify_add_watch", watcher, os.fsencode(name), ctypes.c_uint32(IN_MODIFY))
            reader, writer = map(owned, os.pipe2(os.O_CLOEXEC))
            os.write(writer, b"x")
            os.splice(reader, file, 1)
            return bool(os.read(watcher, 16))
        except OSError:  # BlockingIOError: there is no event. EINVAL: this file system has no splice
            return False


class Bell:
    """Wakes all tasks that wait for the next ring."""

    def __init__(self) -> None:
        self._next: asyncio.Event | None = None  # made by the first waiter, since most ended jobs have no waiter

    def ring(self) -> None:
        if self._next is not None:
            self._next.set()
            self._next = None

    async def wait(self) -> None:
        if self._next is None:
            self._next = asyncio.Event()
        await self._next.wait()


class Turn:
    """Shares the event loop among works that take long: in a turn of the loop one part of one of them is done, however
    many there are. When each did a part, 60 lists of one owner kept the calls of another waiting for 0.4 s.
    """

    def __init__(self) -> None:
        self._lock = asyncio.Lock()  # it serves those who wait for it in their order

    async def part(self, items: Iterator[Any], most: int = sys.maxsize) -> list[Any]:
        """The next of these items, as many as PART_SECONDS are enough for; none if there are no more."""
        async with self._lock:
            await asyncio.sleep(0)
            end = time.perf_counter() + PART_SECONDS
            found = []
            for item in items:
                found.append(item)
                if len(found) >= most or time.perf_counter() >= end:
                    break
            return found


class Inotify:
    """One inotify descriptor. Each watch has a callback, which the event loop calls with the event's mask.

    A callback that raises an error, for example because descriptors ran out, is called again later, with a growing
    pause.
    """

    def __init__(self, overflowed: Callable[[], None]) -> None:
        self._overflowed = overflowed
        self._missed: dict[int, int] = {}  # the masks of events whose callback raised, by their watch
        self._retry: asyncio.TimerHandle | None = None
        self._retry_seconds = SHORTEST_RETRY_SECONDS
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
            self._missed.clear()
            if self._retry is not None:
                self._retry.cancel()

    def watch(self, path: str, mask: int, callback: Callable[[int], None]) -> int:
        """Watch a file and return the watch descriptor. inotify has one watch per file: a second call replaces it."""
        try:
            watch = libc_call("inotify_add_watch", self._descriptor, os.fsencode(path), ctypes.c_uint32(mask))
        except OSError as error:
            raise KernelError(f"cannot watch {path} (fs.inotify.max_user_watches)", error) from error
        self._callbacks[watch] = callback
        return watch

    def unwatch(self, watch: int) -> None:
        """End a watch. The kernel may have ended it already: the file is gone, or a one-shot event was sent."""
        self._missed.pop(watch, None)
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
        mask |= self._missed.pop(watch, 0)
        try:
            if mask & IN_Q_OVERFLOW:
                self._overflowed()
            elif mask & IN_IGNORED:
                self._callbacks.pop(watch, None)
            elif callback := self._callbacks.get(watch):  # a watch that was ended may still have an event in the queue
                callback(mask)
        except (JobWorkerError, OSError) as error:
            self._missed[watch] = mask
            if self._retry is None:
                say(f"{error}; trying again until it works")
                self._schedule_retry()

    def _schedule_retry(self) -> None:
        self._retry = asyncio.get_running_loop().call_later(self._retry_seconds, self._deliver_missed)
        self._retry_seconds = min(LONGEST_RETRY_SECONDS, 2 * self._retry_seconds)

    def _deliver_missed(self) -> None:
        """Call again the callbacks that raised. The timer runs only while there are any."""
        for watch in list(self._missed):
            self._deliver(watch, 0)
        if self._missed:
            self._schedule_retry()
        else:
            self._retry, self._retry_seconds = None, SHORTEST_RETRY_SECONDS


class Pace:
    """When the followers of an output may be woken. All outputs share it, so that followers never take more than half
    of the event loop: 900 followers of a job that prints each 3 ms kept every other caller waiting for 9 s.
    """

    def __init__(self) -> None:
        self._free_at = 0.0  # by the loop's clock

    def take(self, now: float, followers: int) -> float:
        """Take the next time for so many followers."""
        due = max(now, self._free_at)
        self._free_at = due + followers * FOLLOWER_SECONDS
        return due


class Tail:
    """The outputs of one job that are followed. All followers share the descriptors, the watches and the wake-ups.

    The descriptors outlive the removal of the files. `acquire` and `release` count the followers.
    """

    def __init__(self, paths: Sequence[str], inotify: Inotify, pace: Pace) -> None:
        self.paths = paths
        self._inotify = inotify
        self._pace = pace
        self._followers = 0
        self._descriptors: list[int] = []
        # A file, an offset and the bytes there: followers at the same byte share one read.
        self._last_read = (0, 0, b"")
        self._watches: list[int] = []
        self._woken_at = 0.0  # by the loop's clock
        # How often the watches were set. If it changed since a follower's read, that follower must read again before it
        # sleeps.
        self.arm_count = 0
        self._bell = Bell()

    def acquire(self) -> float:
        """Add one follower. Returns the seconds that it waits after a wake-up: not all may read at the same time."""
        if self._followers == 0:
            self._open()
        self._followers += 1
        return (self._followers - 1) // WAKE_GROUP * WAKE_GROUP * FOLLOWER_SECONDS

    def _open(self) -> None:
        for path in self.paths:
            try:
                self._descriptors.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            except OSError as error:
                self._close()
                raise disk_error(f"cannot open {path}", error) from error

    def _close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    def release(self) -> int:
        """Remove one follower and return how many are left."""
        self._followers -= 1
        if self._followers == 0:
            self._close()
            self._disarm()
        return self._followers

    def read(self, file: int, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset` of the file with this index in `paths`; none at its end."""
        if self._last_read[:2] == (file, offset) and self._last_read[2]:
            return self._last_read[2][:size]
        try:
            chunk = os.pread(self._descriptors[file], size, offset)
        except OSError as error:
            raise KernelError(f"cannot read {self.paths[file]}", error) from error
        if chunk:
            self._last_read = (file, offset, chunk)
        return chunk

    def arm(self) -> bool:
        """Ask the kernel for one event at the next change of each file.

        True: an event was not asked for before. The caller then reads once more, because bytes that were written
        between its last read and now cause no event.
        """
        if len(self._watches) == len(self.paths):
            return False
        self._disarm()  # an earlier call may have set a part of them before it failed
        for path in self.paths:
            self._watches.append(self._inotify.watch(path, IN_MODIFY | IN_ONESHOT, self._grew))
        self.arm_count += 1
        return True

    def _grew(self, _mask: int) -> None:
        """Wake the followers, at the earliest COALESCE_SECONDS after the last wake-up, and when `Pace` allows it.
        Until then `_watches` stay set, so that a follower that reaches the end meanwhile sets no new watch but waits
        for the same wake-up.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        due = max(self._woken_at + COALESCE_SECONDS, self._pace.take(now, self._followers * len(self.paths)))
        if due > now:
            loop.call_at(due, self.wake)
        else:
            self.wake()

    def _disarm(self) -> None:
        while self._watches:
            self._inotify.unwatch(self._watches.pop())

    def wake(self) -> None:
        """Make every follower read: an output may have grown, or it will not grow any more."""
        self._woken_at = asyncio.get_running_loop().time()
        self._disarm()
        self._bell.ring()

    async def changed(self) -> None:
        await self._bell.wait()


class LineSearch:
    """Finds where the last N lines of a text begin, in blocks from its end to its beginning."""

    def __init__(self, lines: int) -> None:
        self._left = lines
        self._at_end = True

    def find(self, block: bytes) -> int | None:
        """Where in this block the lines begin; None: in an earlier block."""
        end = len(block)
        if self._at_end and block.endswith(b"\n"):
            end -= 1  # the last line's own end does not begin another line
        self._at_end = False
        if (found := block.count(b"\n", 0, end)) < self._left:
            self._left -= found
            return None
        for _ in range(self._left):
            end = block.rfind(b"\n", 0, end)
        return end + 1


# --- 5. Job folder --------------------------------------------------------------------------------------
# Owns every file of the state folder, except those of the accounts (section 8). It creates, reads, writes, syncs and
# deletes them, and each encoder stands beside its decoder. Only outputs are read by section 4 and written by section 7.
# It starts no process and knows no table of jobs.
#
#     <state>/lock                 locked by the one server of this state folder (flock(2)); holds its pid
#     <state>/jobs/<id>/job.json   the spec: what was asked for; written once
#     <state>/jobs/<id>/output     what the job printed; only its shim writes it
#     <state>/jobs/<id>/error      its standard error. If there is such a file, `output` has only standard output
#     <state>/jobs/<id>/events     what happened to the job, one line each (NEXT_PHASES); the shim appends
#     <state>/jobs/<id>/control    a FIFO that the shim reads: requests; it has a reader while the shim lives
#     <state>/jobs/<id>/tmp        /tmp of a confined job, until the job ends
#     <state>/jobs/<id>/var-tmp    /var/tmp of a confined job, until the job ends
#     <state>/owners/UID           the name of the owner who has this uid (section 8)
#     <state>/owners/token         a random word that names this state folder where it claims uids (section 8)
#     <state>/home/UID             the home of that owner's jobs (section 8)
#     <state>/view/UID             the state folder as that owner's confined jobs see it (section 6)
#     <state>/view/hidden, trial   what such a job sees in place of a hidden folder; what a trial of confinement enters
#     <state>/.splice              exists for a moment at a start (`splice_is_reported`)
#     <state>/quarantine/          folders that could not be read as a job, for a person to look at
#
# The status of a job follows from `events` and from whether `control` has a reader. No pid is stored, since the kernel
# gives the number of an ended process to another one.

# For each phase, the phases that may follow it. `Events.parse` ignores any other line.
NEXT_PHASES: dict[str, tuple[str, ...]] = {
    "": ("born",),  # the shim has the request; the command may run from here on
    "born": ("started", "failed", "exited"),  # exited: the shim was lost between the fork and `started`
    "started": ("input-ended", "exited"),
    "input-ended": ("exited",),  # every byte of input is in the job's pipe, or the job had closed it
    "failed": (),  # the command could not be run
    "exited": ("done",),  # the main process ended; other processes of the job may live
    "done": (),  # no process of the job is left, and its output is complete
}
FALLOC_FL_KEEP_SIZE = 1
OUTPUTS = ("output", "error")  # the files of standard output and standard error, in the order of their descriptors
TMP_FOLDERS = {"tmp": "/tmp", "var-tmp": "/var/tmp"}  # noqa: S108  a confined job's folders, and where it sees them
HIDDEN = "view/hidden"  # below the state folder: what a confined job sees in place of a hidden folder
TRIAL = "view/trial"  # in place of a job's folder; it stays, so that a full disk keeps no server from its next start
TREE_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
COMMAND_MARK = "\0"  # in `Spec.through`: stands for the command, quoted for a shell; no argument contains a NUL byte
# Of a job.json that the server reads or keeps. Arguments and an environment of control characters, six bytes each, can
# make it 12 MiB long.
SPEC_HEAD_BYTES = 64 * KIB
EVENTS_BYTES = 4 * KIB  # allocated when the job starts, so that a full disk cannot lose an exit code


TUPLE_FIELDS = ("args", "groups", "controllers", "hidden", "through", "through_end")  # of a Spec, beside `env`


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
    controllers: tuple[str, ...]  # those whose limits the kernel enforces
    limits: Limits
    timeout: float  # 0: none
    max_output: int
    reserve: int  # bytes of the file system that the output leaves free
    splice: bool  # whether inotify reports a splice into `output`
    created: float
    # Added to `environment`. No answer contains the values. Only the shim needs them, and the server keeps none.
    env: tuple[tuple[str, str], ...] = ()
    cwd: str = ""  # relative to `home`; empty: `home`
    name: str = ""
    confine: bool = False  # whether the job is confined (section 6)
    input: bool = False  # whether standard input is a pipe; otherwise it is /dev/null
    hidden: tuple[str, ...] = ()  # folders that a confined job sees empty
    split: bool = False  # whether standard error is kept apart from standard output
    through: tuple[str, ...] = ()  # the words of an engine's client, which runs the command
    through_end: tuple[str, ...] = ()  # a command that tells how the engine saw the job's end (EngineReport)
    grace: float = 0.0  # with `through`: seconds from TERM to the kill
    args_left_out: int = 0  # how many arguments more job.json holds; see `SPEC_HEAD_BYTES`
    digest: str = ""  # of `args` and `env` (digest_of); an earlier version wrote none

    def to_json(self) -> bytes:
        """The contents of job.json. What may be long comes last, so that a reader can leave most of it out."""
        labels = {"id": self.id, "owner": self.owner, "name": self.name}  # first, for `JobFolder.read_labels`
        plain = {**labels, **vars(self), "limits": vars(self.limits), "arg_count": self.arg_count}
        del plain["args"], plain["args_left_out"], plain["env"]
        return json.dumps({**plain, "args": self.args, "env": self.env}).encode()

    @property
    def arg_count(self) -> int:
        return len(self.args) + self.args_left_out

    @classmethod
    def from_json(cls, text: bytes) -> Spec | None:
        """The spec in a job.json; None if it is half-written or not a spec.

        Fields that a later version added are ignored, so that an older version can take over its jobs.
        """
        try:
            plain = json.loads(text)
            known = {name: plain[name] for name in cls.__dataclass_fields__ if name in plain}
            tuples = {name: tuple(plain.get(name, ())) for name in TUPLE_FIELDS}
            tuples["env"] = tuple(tuple(pair) for pair in plain.get("env", ()))
            limits = {name: plain["limits"][name] for name in Limits.__dataclass_fields__ if name in plain["limits"]}
            left_out = plain.get("arg_count", len(tuples["args"])) - len(tuples["args"])
            return cls(**{**known, **tuples, "limits": Limits(**limits), "args_left_out": left_out})
        except (ValueError, TypeError, KeyError, AttributeError):
            return None

    @classmethod
    def from_head(cls, text: bytes) -> Spec | None:
        """The spec in a job.json without its environment, and with those arguments that its first SPEC_HEAD_BYTES hold.

        A quotation mark inside of a JSON string has a backslash before it, so all the texts that are searched here and
        in `from_ends` stand between strings only.
        """
        short = len(text) <= SPEC_HEAD_BYTES
        before, mark, rest = text[:SPEC_HEAD_BYTES].partition(b', "args": [')
        args, whole, _ = rest.partition(b'], "env": [')
        if whole and (not short or text.endswith(b"]}")):  # otherwise it is half-written
            text = before + mark + args + b"]}"  # without the 2 ms that 4,096 small variables take
        elif not short:
            text = before + mark + args[: args.rfind(b'", "') + 1] + b"]}"
        spec = cls.from_json(text)
        return spec and spec.without_env()

    @classmethod
    def from_ends(cls, head: bytes, tail: bytes) -> Spec | None:
        """The same from both ends of a long job.json of an earlier version, which wrote `env` before `args`. None: its
        arguments are long too.
        """
        before, env, _ = head.partition(b', "env": [')
        _, cwd, after = tail.partition(b'], "cwd": ')
        return cls.from_json(before + b', "cwd": ' + after) if env and cwd else None

    def without_env(self) -> Spec:
        return dataclasses.replace(self, env=()) if self.env else self

    @property
    def program(self) -> str:
        """The program that runs on this machine: the command, or an engine's client."""
        return self.through[0] if self.through else self.command

    def words(self) -> list[str]:
        """The program with its arguments."""
        command = [self.command, *self.args]
        if not any(COMMAND_MARK in word for word in self.through):
            return [*self.through, *command]
        quoted = " ".join(map(quote, command))
        return [word.replace(COMMAND_MARK, quoted) for word in self.through]

    def programs(self) -> list[str]:
        """The paths where the program is searched, in this order."""
        if "/" in self.program:
            return [self.program]
        return [f"{folder or '.'}/{self.program}" for folder in self.path().split(":")]

    def path(self) -> str:
        """The PATH on which the program is searched. A job's own PATH does not choose the engine's client."""
        return JOB_PATH if self.through else dict(self.env).get("PATH", JOB_PATH)

    def environment(self) -> dict[str, str]:
        return {
            "PATH": JOB_PATH,
            "HOME": self.home,
            "USER": self.user,
            "LANG": "C.UTF-8",
            "PYTHONUNBUFFERED": "1",
            **dict(self.env),
            JOB_ID_VARIABLE: self.id,
        }

    def processes(self) -> Cgroup | ProcessTree:
        return Cgroup(self.cgroup) if self.cgroup else ProcessTree(self.id)


def quote(word: str) -> str:
    """A word quoted for a shell. The shim cannot import `shlex`."""
    return "'" + word.replace("'", "'\"'\"'") + "'"


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a job's main process ended: STOPPED or FINISHED, the exit code as a shell reports it, and the reason.

    `by` and `node` are encoded; `JobStatus.stopped_by` and `JobStatus.node` are the texts.
    """

    status: str
    code: int
    signal: int = 0
    reason: str = ""
    by: str = ""  # the name of the caller who stopped it, encoded by `encode_name`
    node: str = ""  # where an engine ran it, encoded by `encode_name`


LOST = Ending("FINISHED", 255, reason="LOST")


CWD_STEP = "the working folder"  # the step of a start that enters it


@dataclasses.dataclass(frozen=True)
class StartFailure:
    """Why a command could not be run, as its process saw it with the job's uid."""

    errno: int
    found: str = ""  # what is at the command's path: "folder", "file", or empty: nothing, or nothing that it may see
    step: str = ""  # the step of the confinement that failed, or CWD_STEP

    def to_word(self) -> bytes:
        """For the pipe between the child and its shim, and for `events`."""
        return f"{self.errno} {encode_name(self.found)} {encode_name(self.step)}".encode()

    @classmethod
    def from_word(cls, text: bytes) -> StartFailure:
        number, found, step = text.decode("ascii").split(" ")
        return cls(int(number), decode_name(found), decode_name(step))


@dataclasses.dataclass(frozen=True)
class Events:
    """What a job's `events` file says: the phase of its last valid line, and the facts of all lines as `phase.key`."""

    phase: str = ""
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def seconds(self, phase: str) -> float:
        """When that phase began, in seconds since 1970; 0: it has not begun."""
        return float(self.facts.get(f"{phase}.at", 0))

    @property
    def failure(self) -> StartFailure | None:
        """Why the command could not be run; None: it could."""
        if "failed.errno" not in self.facts:
            return None
        found, step = (decode_name(self.facts.get(f"failed.{key}", "-").strip("-")) for key in ("found", "step"))
        return StartFailure(int(self.facts["failed.errno"]), found, step)

    @property
    def ending(self) -> Ending | None:
        if "exited.code" not in self.facts:
            return None
        status, code, number, reason, by = (
            self.facts[f"exited.{key}"] for key in ("status", "code", "signal", "reason", "by")
        )
        reason = self.facts.get("done.reason", reason).strip("-")
        node = self.facts.get("exited.node", "").strip("-")
        return Ending(status, int(code), int(number), reason, by.strip("-"), node)

    @property
    def deadline(self) -> float | None:
        """When the job's timeout ends, on the machine's monotonic clock; None: it has none, or has not started."""
        text = self.facts.get("started.deadline")
        return None if text is None else float(text)

    @property
    def input_bytes(self) -> int | None:
        """How much input the job was given; None: neither the end of its input nor a cut is recorded."""
        size = self.facts.get("input-ended.bytes", self.facts.get("exited.input_bytes"))
        return None if size is None else int(size)

    @property
    def usage(self) -> Usage:
        def number(name: str, kind: Callable[[str], Any]) -> Any:
            text = self.facts.get(f"done.{name}", "None")
            return None if text == "None" else kind(text)

        kinds = {"cpu_seconds": float, "memory_peak": int, "read_bytes": int, "written_bytes": int}
        return Usage(**{name: number(name, kind) for name, kind in kinds.items()})

    @classmethod
    def parse(cls, text: str) -> Events:
        """Read the lines that `write_event` wrote. A torn line, or a line that may not follow, does not count."""
        phase, facts = "", {}
        for line in text.splitlines():
            word, *pairs = line.split(" ")
            if pairs and pairs[-1] == "." and word in NEXT_PHASES[phase]:
                phase = sys.intern(word)
                for pair in pairs[:-1]:
                    key, _, value = pair.partition("=")
                    facts[f"{word}.{key}"] = value
        return cls(phase, facts)


def write_event(descriptor: int, phase: str, **facts: object) -> None:
    """Append one line to an `events` file. A value contains no blank. The dot marks a line that is complete."""
    pairs = "".join(f" {key}={'-' if value == '' else value}" for key, value in facts.items())
    os.write(descriptor, f"{phase} at={time.time():.6f}{pairs} .\n".encode())


def encode_name(name: str) -> str:
    """A name of any characters as one word without blanks, for `control` and `events`."""
    return "".join(c if c.isalnum() and c.isascii() else f"%{ord(c):x}." for c in name)


def decode_name(word: str) -> str:
    return re.sub(r"%([0-9a-f]+)\.", lambda found: chr(int(found[1], 16)), word)


@dataclasses.dataclass(frozen=True)
class StopRequest:
    """A request to end a job. `by`: the caller who asked. `reason`: the limit that was exceeded.

    Without a signal the job is killed at once. With one, every process of the job gets it, and the kill follows after
    `grace` seconds.
    """

    reason: str = ""
    by: str = ""  # encoded by `encode_name` if `parse_request_line` made the request
    signal: int = 0
    grace: float = 0.0

    @property
    def kills(self) -> bool:
        return not self.signal

    def to_line(self) -> bytes:
        # A shim of an earlier version takes the reason of a kill for a name, and kills as well.
        word = f"!{self.reason}" if self.reason else encode_name(self.by[:100])
        return (f"stop {self.signal} {self.grace:.3f} {word}\n" if self.signal else f"kill {word}\n").encode()


@dataclasses.dataclass(frozen=True)
class SignalRequest:
    """A request to send a signal to the main process of a job."""

    number: int
    kills = False

    def to_line(self) -> bytes:
        return f"signal {self.number}\n".encode()


@dataclasses.dataclass(frozen=True)
class InputEnd:
    """A request to close the pipe of the job's input, which has had `size` bytes."""

    size: int
    kills = False

    def to_line(self) -> bytes:
        return f"end-input {self.size}\n".encode()


@dataclasses.dataclass(frozen=True)
class InputCut:
    """A request to stop the job, because its input was cut after `size` bytes."""

    size: int
    kills = True

    def to_line(self) -> bytes:
        """Two lines, of which a shim of an earlier version ignores the first."""
        return f"cut-input {self.size}\n".encode() + StopRequest("INPUT_CUT").to_line()


Request: TypeAlias = "StopRequest | SignalRequest | InputEnd | InputCut"


def parse_request_line(line: bytes) -> Request | None:
    """The request in one line of `control`; None for a line that this version does not know."""
    words = line.decode("ascii", "replace").split(" ")
    reason, by = (words[-1][1:], "") if words[-1].startswith("!") else ("", words[-1])
    with contextlib.suppress(ValueError):
        if words[0] == "kill" and len(words) == 2:
            return StopRequest(reason, by)
        if words[0] == "stop" and len(words) == 4:
            return StopRequest(reason, by, int(words[1]), float(words[2]))
        if words[0] == "signal" and len(words) == 2:
            return SignalRequest(int(words[1]))
        if words[0] == "end-input" and len(words) == 2:
            return InputEnd(int(words[1]))
        if words[0] == "cut-input" and len(words) == 2:
            return InputCut(int(words[1]))  # the next line is the request to stop
    return None


class JobFolder:
    """The folder of one job. The table at the top of this section says what each file holds."""

    # `events` is deleted first. After a crash in between, recovery takes the rest for a job that never ran, and deletes
    # it.
    FILES = ("events", "control", *OUTPUTS, "job.json")

    def __init__(self, path: str) -> None:
        self.path = path

    def create(self) -> None:
        """Make the folder. Raises IdTakenError if it exists: a retry with the same id finds the first try here."""
        try:
            os.mkdir(self.path, 0o700)
        except FileExistsError:
            raise IdTakenError(f"the job id {os.path.basename(self.path)} is taken") from None
        except OSError as error:
            raise disk_error(f"cannot make {self.path}", error) from error

    def create_files(self, resources: contextlib.ExitStack, *, split: bool = False) -> list[int]:
        """Make `control`, the outputs and `events`. Returns descriptors for the shim, as `open_for_shim` does."""
        try:
            os.mkfifo(f"{self.path}/control", 0o600)
            for name in (*OUTPUTS[: 1 + split], "events"):
                os.close(os.open(f"{self.path}/{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            descriptors = self.open_for_shim(resources)
            allocate(descriptors[1], EVENTS_BYTES)
        except OSError as error:
            raise disk_error(f"cannot make the files of {self.path}", error) from error
        return descriptors

    def open_for_shim(self, resources: contextlib.ExitStack) -> list[int]:
        """Descriptors of `control` and `events`, which `resources` closes. Raises OSError.

        `control` is opened with O_RDWR. A FIFO that is opened for reading alone is reported as hung up for ever after
        its first writer closes it (fifo(7)): poll then returns at once, again and again
        (155,131 times in 0.2 s).
        """
        control = os.open(f"{self.path}/control", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        resources.callback(os.close, control)
        events = os.open(f"{self.path}/events", os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        resources.callback(os.close, events)
        return [control, events]

    def create_tmp(self, points: Iterable[str]) -> None:
        """Make a confined job's folders for temporary files, and in them the mount points `points`."""
        try:
            for name in TMP_FOLDERS:
                os.mkdir(f"{self.path}/{name}")
                os.chmod(f"{self.path}/{name}", 0o1777)  # noqa: S103  as /tmp; mkdir(2) applies the umask
            for point in points:
                os.makedirs(f"{self.path}/{point}", 0o711)
        except OSError as error:
            raise disk_error(f"cannot make the folders of {self.path}", error) from error

    def delete_tmp(self) -> None:
        """Delete a confined job's temporary files. Raises OSError. No process of the job may live."""
        for name in TMP_FOLDERS:
            delete_tree(f"{self.path}/{name}")

    def write_spec(self, text: bytes) -> None:
        try:
            descriptor = os.open(f"{self.path}/job.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(descriptor, "wb") as file:
                file.write(text)
        except OSError as error:
            raise disk_error(f"cannot write {self.path}/job.json", error) from error

    def read_spec(self) -> Spec | None:
        """The spec; None if job.json is missing or was half-written."""
        try:
            return Spec.from_json(read_whole(f"{self.path}/job.json"))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise disk_error(f"cannot read {self.path}/job.json", error) from error

    def read_head(self) -> Spec | None:
        """The spec without its environment and without most of very many arguments; None as for `read_spec`.

        It takes a bounded time, except for some jobs of earlier versions. A job.json that has its arguments in the
        middle (version 1.0.0), or has a long environment before long arguments, is read as a whole. That is as long as
        a start allows, and it ends when the last such job is deleted.
        """
        path = f"{self.path}/job.json"
        try:
            head = read_start(path, SPEC_HEAD_BYTES + 1)
            if (spec := Spec.from_head(head)) or len(head) <= SPEC_HEAD_BYTES:
                return spec
            if spec := Spec.from_ends(head, read_end(path, SPEC_HEAD_BYTES)):
                return spec
        except FileNotFoundError:
            return None
        except OSError as error:
            raise disk_error(f"cannot read {path}", error) from error
        spec = self.read_spec()
        return spec and spec.without_env()

    def read_labels(self) -> tuple[str, str]:
        """The owner and the name in job.json, at a tenth of the cost of the whole spec; empty if there are none.

        Inside of a JSON string a quotation mark has a backslash before it, so both patterns match outside of strings.
        """
        try:
            head = read_start(f"{self.path}/job.json", 4 * KIB)
            owner, name = (re.search(rb'"%s": ("(?:[^"\\]|\\.)*")' % key, head) for key in (b"owner", b"name"))
            return str(json.loads(owner[1])) if owner else "", str(json.loads(name[1])) if name else ""
        except (OSError, ValueError):
            return "", ""

    def read_events(self) -> Events:
        try:
            return Events.parse(read_whole(f"{self.path}/events").decode("ascii", "replace"))
        except FileNotFoundError:
            return Events()
        except OSError as error:
            raise disk_error(f"cannot read {self.path}/events", error) from error

    def has_events(self) -> bool:
        return os.path.exists(f"{self.path}/events")

    def send_request(self, request: Request) -> bool:
        """Send a request to the job's shim. False: no shim lives. ENXIO: the FIFO has no reader (fifo(7)).

        Half of the FIFO is kept for kills. A stopped shim reads nothing, and other requests must not fill the FIFO.
        Raises ExhaustedError if there is no room for another request.
        """
        try:
            descriptor = self._open_control()
        except OSError as error:
            if error.errno in (errno.ENXIO, errno.ENOENT):
                return False
            raise disk_error(f"cannot open {self.path}/control", error) from error
        try:
            if not request.kills and waiting_bytes(descriptor) > fcntl.fcntl(descriptor, fcntl.F_GETPIPE_SZ) // 2:
                raise ExhaustedError(
                    f"job {os.path.basename(self.path)} has not carried out its earlier requests yet; try again, or "
                    f"stop it without a grace"
                )
            with contextlib.suppress(BlockingIOError):  # the FIFO is full, so kills are in it, and one is enough
                os.write(descriptor, request.to_line())
        except BrokenPipeError:  # the shim ended after the open
            return False
        finally:
            os.close(descriptor)
        return True

    def shim_lives(self) -> bool:
        """Whether `control` has a reader. A descriptor on its way to the launcher counts as one."""
        try:
            os.close(self._open_control())
        except OSError as error:
            if error.errno in (errno.ENXIO, errno.ENOENT):
                return False
            raise disk_error(f"cannot open {self.path}/control", error) from error
        return True

    def wake_shim(self) -> Iterator[None]:
        """Let the job's shim go on if it is stopped. A stopped process that has `control` open is the shim, or a child
        of it before its exec.

        It yields after each process of the machine, and after each descriptor of a stopped one, which may have a
        million. So its caller can let other tasks run.
        """
        for process in all_processes():
            yield
            with contextlib.suppress(OSError, KernelError, IndexError):  # the process ended, or is another user's
                if kernel_read(f"/proc/{process}/stat").rpartition(")")[2].split()[0] != "T":
                    continue
                for number in os.listdir(f"/proc/{process}/fd"):
                    yield
                    if os.readlink(f"/proc/{process}/fd/{number}") == f"{self.path}/control":
                        os.kill(process, signal.SIGCONT)
                        break

    def _open_control(self) -> int:
        return os.open(f"{self.path}/control", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def outputs(self) -> tuple[str, ...]:
        """The paths of the files with output: one, or two if the outputs are kept apart. The existence of `error`
        decides, because the spec of an ended job is not in memory.
        """
        paths = tuple(f"{self.path}/{name}" for name in OUTPUTS)
        return paths if os.path.exists(paths[1]) else paths[:1]

    def open_outputs(self) -> list[int]:
        """Descriptors for the shim to write the outputs. Raises OSError."""
        return [os.open(path, os.O_WRONLY | os.O_CLOEXEC) for path in self.outputs()]

    def disk_bytes(self) -> int:
        """The size of all files of the folder."""
        total = 0
        for name in self.FILES:
            with contextlib.suppress(OSError):
                total += os.lstat(f"{self.path}/{name}").st_size
        return total

    def output_bytes(self, name: str = OUTPUTS[0]) -> int:
        try:
            return os.stat(f"{self.path}/{name}").st_size
        except OSError:
            return 0

    def read_output(self, name: str, offset: int, size: int) -> bytes:
        """Up to `size` bytes of an output. Raises KernelError."""
        path = f"{self.path}/{name}"
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                return os.pread(descriptor, size, offset)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise KernelError(f"cannot read {path}", error) from error

    def sync(self) -> bool:
        """Make all files durable except `events`. False: the disk did not take them (fsync(2))."""
        try:
            for path in (f"{self.path}/job.json", *self.outputs(), self.path, os.path.dirname(self.path)):
                sync(path)
        except OSError:
            return False
        return True

    def delete(self) -> None:
        """Delete the folder. Raises OSError. A crash in the middle leaves a folder that recovery deletes."""
        for name in self.FILES:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{self.path}/{name}")
        self.delete_tmp()
        os.rmdir(self.path)


def delete_tree(path: str) -> None:
    """Delete a folder that a job filled. Raises OSError.

    The job may have made a tree of any depth, and another job of its owner may hold folders of it open and change them
    meanwhile. So each folder is taken from its owner before it is emptied, no link is followed, and a folder in a
    folder is first moved to the top: at most two folders are open at any time.
    """
    with contextlib.suppress(OSError):  # most are empty, and this takes an eighth of the time of what follows
        os.rmdir(path)
        return
    try:
        top = os.open(path, TREE_FLAGS)
    except FileNotFoundError:
        return
    try:
        take_ownership(top)
        while flatten(top):
            pass
    finally:
        os.close(top)
    os.rmdir(path)


def flatten(top: int) -> bool:
    """Delete the files and empty folders in `top`, and move deeper folders up into `top`. False: `top` was empty."""
    found = False
    with os.scandir(top) as entries:  # a list of all names could be larger than the shim's memory
        for entry in entries:
            found = True
            if not delete_file(entry.name, top):
                move_folders(entry.name, top)
                delete_file(entry.name, top)
    return found


def move_folders(name: str, top: int) -> None:
    """Empty a folder of `top`: delete its files, and move its folders to `top`."""
    folder = os.open(name, TREE_FLAGS, dir_fd=top)
    try:
        take_ownership(folder)
        with os.scandir(folder) as entries:
            for entry in entries:
                if not delete_file(entry.name, folder):
                    os.rename(entry.name, os.urandom(16).hex(), src_dir_fd=folder, dst_dir_fd=top)
    finally:
        os.close(folder)


def take_ownership(folder: int) -> None:
    os.fchown(folder, os.geteuid(), os.getegid())
    os.fchmod(folder, 0o700)


def delete_file(name: str, folder: int) -> bool:
    """Delete a file or an empty folder. False: it is a folder that is not empty."""
    try:
        os.unlink(name, dir_fd=folder)
    except IsADirectoryError:
        try:
            os.rmdir(name, dir_fd=folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return False
    return True


def receive_requests(control: int) -> list[Request]:
    """The requests in `control`, oldest first. A write of at most PIPE_BUF bytes is atomic (pipe(7))."""
    lines = os.read(control, 64 * KIB).split(b"\n")
    return [request for line in lines if (request := parse_request_line(line)) is not None]


def waiting_bytes(pipe: int) -> int:
    """How many bytes are in a pipe (FIONREAD, pipe(7)). 0 after poll reported the pipe: end of file."""
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


def allocate(descriptor: int, size: int) -> None:
    """Reserve disk blocks without a change of the file's size (fallocate(2)), if the file system can."""
    try:
        libc_call("fallocate", descriptor, FALLOC_FL_KEEP_SIZE, ctypes.c_long(0), ctypes.c_long(size))
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise


def sync(path: str | pathlib.Path) -> None:
    """Make a file or a folder durable (fsync(2)). Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_state_folder(state: pathlib.Path) -> None:
    """Make what is missing. If root serves, other uids can pass through the state folder to their homes.

    A folder with other files in it is refused: its mode would change, and `--state /tmp` would close /tmp to others.
    """
    mode = 0o711 if os.geteuid() == 0 else 0o700
    try:
        state.mkdir(mode=mode, parents=True, exist_ok=True)
        found = set(os.listdir(state)) - {"lost+found"}
        if found and found.isdisjoint({"jobs", "owners"}):
            raise JobWorkerError(f"{state} has other files in it; give a new or an empty folder with `--state DIR`")
        state.chmod(mode)
        (state / "jobs").mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise KernelError(f"cannot use the state folder {state} (`--state DIR` names another)", error) from error


def make_views(state: str, hidden: Sequence[str]) -> tuple[str, ...]:
    """Make what confined jobs see in place of hidden folders. Returns the folders that must be hidden one by one.

    A hidden folder below the state folder or below a folder for temporary files needs no mount: its parent is covered.
    A hidden folder above the state folder gets a mount point for the state folder.
    """
    try:
        for folder, mode in (("view", 0o700), (HIDDEN, 0o711)):
            os.makedirs(f"{state}/{folder}", exist_ok=True)
            os.chmod(f"{state}/{folder}", mode)
        for name in (*TMP_FOLDERS, *tmp_points(state)):
            os.makedirs(f"{state}/{TRIAL}/{name}", exist_ok=True)
        alone = []
        for folder in map(os.path.realpath, hidden):
            if any(is_below(folder, place) for place in (state, *map(os.path.realpath, TMP_FOLDERS.values()))):
                continue
            alone.append(folder)
            if is_below(state, folder):
                os.makedirs(f"{state}/{HIDDEN}/{os.path.relpath(state, folder)}", 0o711, exist_ok=True)
    except OSError as error:
        raise disk_error(f"cannot make {state}/view", error) from error
    return tuple(alone)


def make_view(state: str, uid: int) -> None:
    """Make the state folder as the confined jobs of one owner see it: with a mount point for their home, and no more.
    Raises OSError.
    """
    home = f"{state}/view/{uid}/home/{uid}"
    if not os.path.exists(home):
        os.makedirs(home, 0o711)
        for folder in (f"{state}/view/{uid}", os.path.dirname(home), home):  # the umask may have taken more
            os.chmod(folder, 0o711)  # noqa: S103  it can be passed, not listed


def is_below(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


def tmp_points(state: str) -> list[str]:
    """The mount point that a state folder below /tmp or /var/tmp needs in its jobs' folders for temporary files."""
    places = {name: os.path.realpath(place) for name, place in TMP_FOLDERS.items()}
    return [f"{name}/{os.path.relpath(state, place)}" for name, place in places.items() if is_below(state, place)]


def lock_state_folder(state: pathlib.Path) -> int:
    """Lock `<state>/lock` (flock(2)) and write the pid into it. Closing the returned descriptor unlocks it."""
    descriptor = os.open(state / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 32).decode().strip() or "unknown"
        os.close(descriptor)
        raise JobWorkerError(f"the state folder {state} is in use by the server with pid {holder}") from None
    # On a full disk this works only if the file has a block already.
    size = os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    os.ftruncate(descriptor, size)
    return descriptor


def state_name(state: pathlib.Path) -> str:
    """The name of a state folder's part of the cgroup tree, so that two servers do not share one."""
    return f"{zlib.crc32(os.fsencode(state.resolve())):08x}"


def quarantine(folder: str, state: pathlib.Path) -> None:
    """Move what cannot be read as a job to `<state>/quarantine`, and say so. If that fails, the next start tries
    again.
    """
    place = state / "quarantine"
    try:
        place.mkdir(mode=0o700, exist_ok=True)
        os.rename(folder, place / f"{os.path.basename(folder)}-{time.time_ns()}")
        say(f"{folder} cannot be read as a job; it is now in {place}")
    except OSError as error:
        say(f"{folder} cannot be read as a job, and cannot be moved to {place}: {error.strerror}")


# --- 6. Confinement -------------------------------------------------------------------------------------
# Owns what a job gets at its start, beside its uid, if root runs the server: namespaces, mounts, a keyring and no way
# to more privileges. The shim prepares a list of steps, and the child carries it out. It starts no process.

CLONE_NEWNS, CLONE_NEWIPC = 0x20000, 0x8000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x8, 0x1000, 0x4000, 0x40000
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 24, 38
KEYCTL_JOIN_SESSION_KEYRING = 1
SYS_KEYCTL = {"x86_64": 250, "aarch64": 219, "riscv64": 219, "ppc64le": 271, "s390x": 280}  # by uname(2)'s machine
SHARED_FOLDERS = ("/run/lock", "/run/screen", "/var/crash", "/var/spool/samba")  # hidden if every user can write them
# One step: what it makes, the libc function, the arguments of each call, and the errnos that mean: nothing to do.
Step: TypeAlias = "tuple[str, str, tuple[tuple[Any, ...], ...], tuple[int, ...]]"


def confinement_steps(state: str, folder: str, view: str, home: str, hidden: Sequence[str]) -> list[Step]:
    """The steps that confine a process, in this order. `folder` (a job's), `view` and `home` lie below `state`.

    The first step after the new namespaces enters the state folder. So the paths of sources are relative, and they hold
    after the state folder is covered. `home` is empty if the job uses the home of an account, which lies elsewhere.
    """
    first, last = fixed_steps()
    steps: list[Step] = [
        *first,
        ("the state folder as working folder", "chdir", ((os.fsencode(state),),), ()),
        *(mount_step(f"{folder}/{name}", place) for name, place in TMP_FOLDERS.items()),
        *(mount_step(HIDDEN, place, harmless=(errno.ENOENT,)) for place in hidden),
        mount_step(view, state),
    ]
    if home:
        steps.append(mount_step(home, f"{state}/{home}"))
    steps += last
    return steps


@functools.cache
def fixed_steps() -> tuple[list[Step], list[Step]]:
    """The first and the last steps. They are the same for all jobs, and the launcher makes them before its first fork:
    a shim that made them itself, on pages that it must copy, took 0.07 ms more.
    """
    first = [
        ("a mount and an IPC namespace", "unshare", ((CLONE_NEWNS | CLONE_NEWIPC,),), ()),
        mount_step("", "/", flags=MS_REC | MS_PRIVATE),
    ]
    last: list[Step] = []
    if number := SYS_KEYCTL.get(os.uname().machine):  # otherwise all jobs share the keyring of the server's session
        words = (ctypes.c_long(number), ctypes.c_long(KEYCTL_JOIN_SESSION_KEYRING), None)
        # A container's filter refuses keyctl(2) with EPERM, and so a job there has no keys.
        last.append(("a session keyring", "syscall", (words,), (errno.ENOSYS, errno.EPERM)))
    last += [
        mount_step("tmpfs", "/dev/shm", "tmpfs", "mode=1777", harmless=(errno.ENOENT,)),  # noqa: S108
        mount_step("proc", "/proc", "proc", "hidepid=invisible"),
        # In a user namespace of its own a job could mount a FUSE that never answers. Whoever then reads the job's pipes
        # cannot be killed.
        mount_step("/dev/null", "/dev/fuse", harmless=(errno.ENOENT,)),
        ("no_new_privs", "prctl", ((PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),), ()),
    ]
    if os.path.exists("/dev/mqueue"):  # a kernel without mqueue would run modprobe at each try, which took 0.25 ms
        last.append(mount_step("mqueue", "/dev/mqueue", "mqueue"))
    dropped = tuple((PR_CAPBSET_DROP, number, 0, 0, 0) for number in range(capabilities()))
    last.append(("an empty bounding set", "prctl", dropped, ()))
    return first, last


def mount_step(
    source: str, target: str, kind: str = "", data: str = "", *, flags: int = MS_BIND, harmless: tuple[int, ...] = ()
) -> Step:
    """mount(2): a folder seen at another place, or a new file system if `kind` names one."""
    flags = MS_NOSUID | MS_NODEV | MS_NOEXEC * (kind != "tmpfs") if kind else flags
    words = (os.fsencode(word) or None for word in (source, target, kind))
    return f"a mount at {target}", "mount", ((*words, ctypes.c_ulong(flags), os.fsencode(data) or None),), harmless


@functools.cache
def capabilities() -> int:
    """How many capabilities this kernel has (capabilities(7))."""
    return int(kernel_read("/proc/sys/kernel/cap_last_cap") or 40) + 1


def shared_folders() -> list[str]:
    """Those folders of the system that every user can write. Files that jobs leave there would outlive them."""
    found = []
    for folder in SHARED_FOLDERS:
        with contextlib.suppress(OSError):
            facts = os.stat(folder)
            if stat.S_ISDIR(facts.st_mode) and facts.st_mode & stat.S_IWOTH:
                found.append(folder)
    return found


class ConfinementError(OSError):
    """A step of the child failed before the exec. `step` says what it makes."""

    def __init__(self, number: int, step: str) -> None:
        super().__init__(number, os.strerror(number))
        self.number = number
        self.step = step


def confine(steps: Iterable[Step]) -> None:
    """Confine the calling thread. Raises ConfinementError, which names the first step that failed."""
    for step, function, calls, harmless in steps:
        try:
            for arguments in calls:
                libc_call(function, *arguments)
        except OSError as error:
            number = error.errno or errno.EINVAL
            if number not in harmless:
                raise ConfinementError(number, step) from None


def steps_of(folder: JobFolder, spec: Spec) -> list[Step]:
    """The steps for one job; none if it is not confined."""
    if not spec.confine:
        return []
    jobs, job = os.path.split(folder.path)
    state = os.path.dirname(jobs)
    own = spec.home == f"{state}/home/{spec.uid}"
    view, home = (f"view/{spec.uid}", f"home/{spec.uid}") if own else (HIDDEN, "")
    return confinement_steps(state, f"jobs/{job}", view, home, spec.hidden)


def try_confinement(state: str, hidden: Sequence[str]) -> ConfinementError | None:
    """Confine a thread of this process, which then ends. Returns the error if this machine cannot do it."""
    failures: list[ConfinementError] = []

    def attempt() -> None:
        try:
            confine(confinement_steps(state, TRIAL, HIDDEN, "", hidden))
        except ConfinementError as error:
            failures.append(error)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return failures[0] if failures else None


# --- 7. Launcher and shim -------------------------------------------------------------------------------
# Owns everything between a request of the server and the job's main process: the launcher, the shim and the child. Of
# this section only class `Launcher` runs in the server. The rest runs in the small processes, imports nothing
# third-party, and imports nothing at all after the launcher's first fork, because an upgrade of Python may replace the
# files of a module that is not imported yet.

MODULE = "jobworker"  # the launcher imports this module; Python would compile a `__main__` anew at each start
FORK_HOOKS = ("PyOS_BeforeFork", "PyOS_AfterFork_Child", "PyOS_AfterFork_Parent")
CLONE_PIDFD, CLONE_INTO_CGROUP, SYS_CLONE3 = 0x1000, 0x200000000, 435
# What clone3 fails with where it, or CLONE_INTO_CGROUP, cannot be had. ENOSYS: before Linux 5.3, and Docker's filter.
# E2BIG, EINVAL: before Linux 5.7. EPERM, EACCES: older filters. EOPNOTSUPP: a threaded cgroup. An attach to the cgroup
# is checked anew. EAGAIN is the bound of a pids.max, which an attach would pass.
NO_CLONE3 = (errno.ENOSYS, errno.E2BIG, errno.EINVAL, errno.EPERM, errno.EACCES, errno.EOPNOTSUPP)
PR_SET_CHILD_SUBREAPER = 36
PIPE_BYTES = MIB  # of each pipe of a job, if fs.pipe-max-size and the user's quota (fs.pipe-user-pages-soft) allow it
PACKET_BYTES = 2 * KIB  # of a request; a shim reads a longer spec from job.json
MIN_BATCH_BYTES, BATCH_MILLISECONDS = 16 * KIB, 1  # after a smaller move the shim waits once for more output
STACK_BYTES, CORE_BYTES = 8 * MIB, 0  # the kernel's default soft limits; the others are unlimited


class Launcher:
    """The server's side of the launcher: it starts the process, restarts it if it died, and sends it requests."""

    def __init__(self) -> None:
        self._arguments: list[str] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None

    def open(self, shims: str) -> None:
        """Start the launcher. `shims` is the cgroup for it and its shims (empty: none). They and the jobs keep the
        RLIMIT_NOFILE that the server has now.
        """
        self._arguments = [shims, *map(str, resource.getrlimit(resource.RLIMIT_NOFILE))]
        self._ensure()

    def _ensure(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            raise disk_error("cannot make a socket for the launcher", error) from error
        ours.setblocking(False)
        folder = str(pathlib.Path(__file__).resolve().parent)
        code = f"import sys; sys.path.insert(0, {folder!r}); import {MODULE}; {MODULE}.launcher_main()"
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", code, str(theirs.fileno()), *self._arguments],
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()], start_new_session=True, cwd="/", env={},
                )  # fmt: skip
            except OSError as error:
                ours.close()
                raise disk_error(f"cannot run {sys.executable} as the launcher", error) from error
        self._channel = ours

    @property
    def process(self) -> int:
        return self._process.pid if self._process else 0

    def send(self, kind: str, folder: JobFolder, spec: bytes, descriptors: Sequence[int]) -> None:
        """Send one request: `start` a job, or `finish` a job whose shim was lost. `spec` is its job.json."""
        packet = encode_request(kind, folder.path, spec)
        self._ensure()
        try:
            self._send(packet, descriptors)
        except (BrokenPipeError, ConnectionResetError):  # it died and did not receive the packet, so it is sent again
            self.close()
            self._ensure()
            self._send(packet, descriptors)

    def _send(self, packet: bytes, descriptors: Sequence[int]) -> None:
        assert self._channel is not None
        try:
            socket.send_fds(self._channel, [packet], list(descriptors))
        except (BlockingIOError, InterruptedError) as error:
            raise UnavailableError("too many starts are on their way to the launcher; try again") from error

    def close(self) -> None:
        """Close the channel, which ends the launcher. Its shims and their jobs go on."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is not None:
            self._process.wait()
            self._process = None


def encode_request(kind: str, folder: str, spec: bytes) -> bytes:
    """A packet for the launcher. It has no spec if that is too long: the shim then reads job.json."""
    packet = b"\0".join((kind.encode(), os.fsencode(folder), spec))
    return packet if len(packet) <= PACKET_BYTES else b"\0".join((kind.encode(), os.fsencode(folder), b""))


def decode_request(packet: bytes) -> tuple[str, JobFolder, Spec | None]:
    """The kind of a request, the job's folder and its spec; None if job.json cannot be read."""
    kind, path, spec = packet.split(b"\0", 2)
    folder = JobFolder(os.fsdecode(path))
    return kind.decode(), folder, Spec.from_json(spec) if spec else folder.read_spec()


def launcher_main() -> NoReturn:
    """The launcher process: receives requests and forks a shim for each."""
    number, shims, soft, hard = int(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:5])
    channel = socket.socket(fileno=number)
    prepare_launcher(shims, (soft, hard))
    while (request := receive_request(channel)) is not None:
        try:
            process = os.fork()
        except OSError as error:
            process = -1
            record_failed_fork(*request, error)
        if process == 0:
            os.close(number)
            run_shim(*request)
        for descriptor in request[1]:
            os.close(descriptor)
    os._exit(0)


def record_failed_fork(packet: bytes, descriptors: Sequence[int], error: OSError) -> None:
    """Record why a job could not be started. The job of a finisher may have run, so its events say nothing of it."""
    if packet.startswith(b"start\0"):
        with contextlib.suppress(OSError, IndexError):  # the launcher goes on; the server then reads no event
            write_event(descriptors[1], "born")
            write_event(descriptors[1], "failed", errno=error.errno)


def prepare_launcher(shims: str, files: tuple[int, int]) -> None:
    """Set what shims and jobs inherit: default signals, limits and priority, and a cgroup for the shims."""
    os.umask(0o022)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}:
        with contextlib.suppress(OSError):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond RLIMIT_FSIZE is EFBIG then, and ends no shim
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps ended shims
    set_default_limits(files)
    with contextlib.suppress(KernelError):  # lowering it needs a privilege that the server may not have
        kernel_write("/proc/self/oom_score_adj", "0")
    if shims:
        Cgroup(shims).attach(0)
    clone_calls()  # found once here, and not in every shim
    spec = Spec("", "", "", (), os.geteuid(), 0, (), "", "", "", (), Limits(), 0.0, KIB, 0, splice=True, created=0.0)
    warm_up_decoding(spec)
    warm_up_supervision(spec)
    warm_up_confinement()
    gc.disable()
    gc.freeze()  # a collection in a shim would touch, and so copy, every page


def warm_up_decoding(spec: Spec) -> None:
    """Decode a request twenty times before the first fork. This imports `json` and lets Python specialize
    the bytecode before the fork, so that the shims share those pages: each has 40 kB less memory of its own.
    """
    packet = encode_request("start", "/", spec.to_json())
    for _ in range(20):
        decode_request(packet)


def warm_up_supervision(spec: Spec) -> None:
    """Supervise twenty jobs that have printed a line and ended, before the first fork. The pages are shared then."""
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)  # poll reports it as readable, as the pidfd of an ended job
    for _ in range(20):
        pipe, writer = make_pipe(spec)
        os.write(writer, b"\n")
        shim = Shim(JobFolder("/"), spec, nothing, nothing)
        shim.supervise(nothing, make_pumps(spec, [(pipe, writer)], [nothing]))
        write_event(nothing, "exited", **vars(LOST))
        os.close(pipe)
        os.close(writer)
    os.close(nothing)


def warm_up_confinement() -> None:
    """Make a list of steps, and find the libc functions in it, before the first fork. The pages are shared then."""
    for _ in range(20):
        for _, function, _, _ in confinement_steps("/", "jobs", HIDDEN, "home", ()):
            getattr(libc(), function)


def set_default_limits(files: tuple[int, int]) -> None:
    """Give this process the kernel's default limits, nice value and CPUs, as far as its privileges allow.

    `files` is its RLIMIT_NOFILE. A server may have been started with `ulimit`, `nice` or `taskset`; jobs must not
    inherit that (getrlimit(2), sched_setaffinity(2)).
    """
    defaults = {getattr(resource, f"RLIMIT_{name}"): (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
                for name in ("AS", "CPU", "DATA", "FSIZE", "RSS")}  # fmt: skip
    defaults[resource.RLIMIT_STACK] = (STACK_BYTES, resource.RLIM_INFINITY)
    defaults[resource.RLIMIT_CORE] = (CORE_BYTES, resource.RLIM_INFINITY)
    defaults[resource.RLIMIT_NOFILE] = files
    for name, (soft, hard) in defaults.items():
        try:
            resource.setrlimit(name, (soft, hard))
        except (OSError, ValueError):  # only root may raise a hard limit
            own = resource.getrlimit(name)[1]
            resource.setrlimit(name, (own if soft == resource.RLIM_INFINITY else min(soft, own), own))
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, 0)
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))  # the kernel keeps those that a cpuset allows


def receive_request(channel: socket.socket) -> tuple[bytes, list[int]] | None:
    """One packet and its descriptors; None when the server is gone.

    `socket.recv_fds` ignores its flags. Without MSG_CMSG_CLOEXEC the jobs would inherit `control` and `events`.
    """
    packet, ancillary, _, _ = channel.recvmsg(PACKET_BYTES + KIB, socket.CMSG_SPACE(5 * 4), socket.MSG_CMSG_CLOEXEC)
    if not packet:
        return None
    descriptors = [number for _, _, data in ancillary for number in memoryview(data).cast("i")]
    return packet, descriptors


def run_shim(packet: bytes, descriptors: Sequence[int]) -> NoReturn:
    """The shim process. Every path ends in `os._exit`. A shim that ends without `done` in `events` is lost."""
    control, events, *more = descriptors
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        kind, folder, spec = decode_request(packet)
        if spec is None:
            write_event(events, "born")
            write_event(events, "failed", errno=errno.EIO)
        elif kind == "finish":
            finish_lost(folder, spec, events)
        else:
            cgroup = more.pop() if spec.cgroup else -1
            Shim(folder, spec, control, events, more).run(cgroup)
    except BaseException as error:  # noqa: BLE001
        with contextlib.suppress(OSError):  # for a person who reads the file; this line has no phase
            os.write(events, f"crashed {type(error).__name__} {error}\n".encode())
        os._exit(1)
    os._exit(0)


class Room:
    """What the outputs of a job may still take together: of the job's cap, and of the disk."""

    def __init__(self, spec: Spec) -> None:
        self.left = spec.max_output
        self._reserve = spec.reserve
        self._unchecked = 0  # bytes since the last check of the disk

    def take(self, size: int, output: int) -> StopRequest | None:
        """Count bytes that were written to `output`. Returns a request to end the job if the disk is exhausted."""
        self.left -= size
        self._unchecked += size
        if self._unchecked < MIB:
            return None
        self._unchecked = 0
        disk = os.fstatvfs(output)
        return StopRequest("DISK_FULL") if disk.f_bavail * disk.f_frsize < self._reserve else None


class Pump:
    """Moves what a job prints from a pipe to a file, up to the job's cap and the disk's reserve."""

    def __init__(self, pipe: int, output: int, room: Room, *, splices: bool) -> None:
        os.set_blocking(pipe, False)
        self.pipe = pipe
        self.output = output
        self.open = True  # until every writer has closed the pipe
        self.small_batch = False  # whether the last move was small: then it is worth 1 ms to wait for more
        self._room = room
        self._exhausted: StopRequest | None = None  # from then on `move` discards
        self._written = 0
        self._splices = splices
        self._min_batch = min(MIN_BATCH_BYTES, fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ) // 4)

    def move(self) -> StopRequest | None:
        """Move at most 1 MiB. Returns a request to end the job if the cap or the disk is exhausted."""
        self.small_batch = False
        if self._exhausted:
            with contextlib.suppress(BlockingIOError):
                self.open = os.read(self.pipe, MIB) != b""
            return None
        room = min(MIB, self._room.left)
        try:
            moved = self._move(room) if room else waiting_bytes(self.pipe)  # 0: the end
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
        return self._room.take(moved, self.output)

    def _move(self, room: int) -> int:
        if self._splices:
            try:
                return os.splice(self.pipe, self.output, room)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
                self._splices = False  # this file system has no splice
        chunk = os.read(self.pipe, min(room, 64 * KIB))
        rest = memoryview(chunk)
        while rest:
            rest = rest[os.write(self.output, rest) :]
        return len(chunk)

    def discard_from_now(self, exhausted: StopRequest) -> None:
        """Go on emptying the pipe. An engine's client that waits for a full pipe could not obey TERM."""
        self._exhausted = exhausted

    def drain(self) -> StopRequest | None:
        """Move what is in the pipe, and no more than one pipe holds: a process outside the job may hold the pipe open
        and write without end. Returns why not all was kept.
        """
        if self._exhausted:
            return self._exhausted
        limit = self._written + fcntl.fcntl(self.pipe, fcntl.F_GETPIPE_SZ)
        while self.open and self._written < limit:
            before = self._written
            request = self.move()
            if request or (self._written == before and self.open):
                return request
        return None


def make_pumps(spec: Spec, pipes: Sequence[tuple[int, int]], outputs: Sequence[int]) -> list[Pump]:
    """A pump from each pipe to its file. They share the cap and the reserve."""
    room = Room(spec)
    return [Pump(pipe, output, room, splices=spec.splice) for (pipe, _), output in zip(pipes, outputs, strict=True)]


def drain_all(pumps: Sequence[Pump]) -> StopRequest | None:
    """Drain each pipe. Returns the first request to end the job."""
    requests = [pump.drain() for pump in pumps]
    return next(filter(None, requests), None)


class Shim:
    """The parent of one job's main process: it moves the output, carries out requests and limits, records the end."""

    def __init__(self, folder: JobFolder, spec: Spec, control: int, events: int, channels: Sequence[int] = ()) -> None:
        self._folder = folder
        self._spec = spec
        self._control = control
        self._events = events
        self._channels = list(channels)  # a socket from the server, if the job has input
        self._input: InputPipe | None = None
        self._cut: InputCut | None = None
        self._processes = spec.processes()
        self._process = self._pidfd = -1
        self._request: StopRequest | None = None  # the first one that ends the job
        self._deadline: float | None = None  # of the timeout, and then of the grace

    def run(self, cgroup: int) -> None:
        """Start the job, supervise it and finish it. `cgroup` is a descriptor of its cgroup; -1: it has none."""
        write_event(self._events, "born")
        try:
            outputs = self._folder.open_outputs()
            pipes = [make_pipe(self._spec) for _ in outputs]
            for channel in self._channels:  # before the next statement, or the mover's parent would be the shim
                self._input = InputPipe(self._spec, channel)
            if not self._spec.cgroup:  # orphans are reparented to the shim, which can then kill and reap them
                libc_call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            failure = self._start(cgroup, [writer for _, writer in pipes])
        except OSError as error:
            failure = StartFailure(error.errno or errno.EINVAL)
        if failure:
            names = {"found": encode_name(failure.found), "step": encode_name(failure.step)}
            write_event(self._events, "failed", errno=failure.errno, **names)
            return
        for _, writer in pipes:
            os.close(writer)
        if self._input:
            os.close(self._input.stdin)  # only the job reads, so that the mover sees that the job closed its input
        if not self._spec.cgroup:
            reap_orphans(self._process)
        if cgroup >= 0:
            os.close(cgroup)
        write_event(self._events, "started", **({"deadline": self._deadline} if self._deadline else {}))
        pumps = make_pumps(self._spec, pipes, outputs)
        self.supervise(self._pidfd, pumps)
        ending = self._ending(None if self._request else drain_all(pumps))
        if self._spec.through_end:
            ending = ask_engine(self._spec).correct(ending)
        write_event(self._events, "exited", **vars(ending), **self._input_bytes())
        finish_job(self._folder, self._spec, self._events, ending, pumps)

    def _input_bytes(self) -> dict[str, int]:
        """After how many bytes the input was cut, for `events`. A server that was killed has not said it."""
        size = self._cut.size if self._cut else self._input.moved if self._input else None
        return {} if size is None else {"input_bytes": size}

    def _start(self, cgroup: int, writers: Sequence[int]) -> StartFailure | None:
        """Start the main process. Returns why its command could not be run. Raises OSError."""
        self._deadline = time.monotonic() + self._spec.timeout if self._spec.timeout else None
        steps = steps_of(self._folder, self._spec)
        stdin = [self._input.stdin] if self._input else []
        self._process, self._pidfd, errpipe = start_process(self._spec, cgroup, stdin, writers, steps)
        self._wait_for_exec(errpipe)
        return check_exec(self._process, errpipe)

    def _wait_for_exec(self, errpipe: int) -> None:
        """Wait until `errpipe` reports the exec, which a lease or a slow disk can delay, or until the job is killed."""
        poller = select.poll()
        for descriptor in (errpipe, self._control):
            poller.register(descriptor, select.POLLIN)
        while True:
            reported = {descriptor for descriptor, _ in poller.poll(milliseconds_until(self._deadline))}
            self._carry_out(reported)
            if errpipe in reported or (self._request and self._deadline is None):
                return

    def supervise(self, pidfd: int, pumps: Sequence[Pump]) -> None:
        """Wait for the end of the main process. Move its output and carry out requests meanwhile."""
        poller = select.poll()
        for descriptor in (pidfd, *(pump.pipe for pump in pumps), self._control):
            poller.register(descriptor, select.POLLIN)
        if self._input:
            poller.register(self._input.report, select.POLLIN)
        batch = select.poll()  # waits for all but output, so that short lines that come fast share a move
        for descriptor in (pidfd, self._control):
            batch.register(descriptor, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in poller.poll(milliseconds_until(self._deadline))}
            # Requests are carried out before the end is handled: if both are in one poll, a kill counts as the first.
            self._carry_out(ready)
            if self._input and self._input.report in ready:
                poller.unregister(self._input.report)
                self._input_moved(self._input)
            small_batch = False
            for pump in pumps:
                if pump.pipe in ready:
                    self._move(pump, poller)
                    small_batch |= pump.small_batch
            if pidfd in ready:
                return
            if small_batch:
                batch.poll(BATCH_MILLISECONDS)

    def _move(self, pump: Pump, poller: select.poll) -> None:
        """Move output, and end the job if the cap or the disk is exhausted. A pipe at its end leaves the poll."""
        exhausted = pump.move()
        if exhausted:
            self._stop(exhausted)
        if exhausted and self._spec.through:
            pump.discard_from_now(exhausted)
        elif exhausted or not pump.open:
            poller.unregister(pump.pipe)

    def _carry_out(self, ready: set[int]) -> None:
        """Carry out the requests in `control`, and the deadline if it has passed."""
        for request in receive_requests(self._control) if self._control in ready else ():
            if isinstance(request, SignalRequest):
                self._signal_main_process(request.number)
            elif isinstance(request, InputEnd):
                if self._input:
                    self._input.is_whole = True
                    self._end_input(self._input)
            elif isinstance(request, InputCut):
                self._cut = request
            else:
                self._stop(request)
        if self._deadline is not None and time.monotonic() >= self._deadline:
            if self._request:  # this is the end of the grace
                self._deadline = None
                self._kill()
            else:
                self._stop(StopRequest("TIMEOUT"))

    def _input_moved(self, pipe: InputPipe) -> None:
        """The mover has ended. Unless it was killed, the pipe has all that the server sent."""
        if number := os.read(pipe.report, 32):
            pipe.moved = int(number)
        else:
            self._stop(StopRequest("INPUT_CUT"))
        self._end_input(pipe)

    def _end_input(self, pipe: InputPipe) -> None:
        """Record the end of input and close the pipe, if the server has said the end and the pipe has all bytes."""
        if pipe.moved is not None and pipe.is_whole:
            write_event(self._events, "input-ended", bytes=pipe.moved)
            os.close(pipe.writer)
            self._input = None

    def _stop(self, request: StopRequest) -> None:
        """End the job as requested. The first request is recorded; a later one can only end the job sooner.

        An engine's client gets TERM and a grace in any case: if it is killed at once, the engine goes on with the job,
        and srun ignores a single INT.
        """
        if self._spec.through:
            request = dataclasses.replace(request, signal=signal.SIGTERM, grace=max(request.grace, self._spec.grace))
        first = self._request is None
        if first and request.signal and self._main_process_ended():
            return  # a stop that comes too late does not turn FINISHED into STOPPED
        self._request = self._request or request
        if not request.signal:
            self._deadline = None
            self._kill()
        else:
            kill_at = time.monotonic() + request.grace
            if first and self._spec.through:
                self._deadline = None  # a timeout must not shorten the grace
            self._deadline = kill_at if self._deadline is None else min(self._deadline, kill_at)
            self._signal_all(request.signal)
            self._signal_all(signal.SIGCONT)  # a stopped process could not end

    def _main_process_ended(self) -> bool:
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        return bool(poller.poll(0))

    def _kill(self) -> None:
        """Kill the job. Its main process is killed by its pidfd too, since root can move it to another cgroup."""
        self._processes.kill()
        self._signal_main_process(signal.SIGKILL)

    def _signal_all(self, number: int) -> None:
        """Send a signal to the job, also if its main process has left its cgroup, as `systemd-run --scope` does."""
        if self._spec.cgroup and self._process not in self._processes.members():
            self._signal_main_process(number)
        self._processes.send(number)

    def _signal_main_process(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # EPERM: the process has another uid now
            signal.pidfd_send_signal(self._pidfd, number)

    def _ending(self, exhausted: StopRequest | None) -> Ending:
        """How the main process ended. `exhausted` says why its last output was not kept; None: it was.

        STOPPED: it ended after the signal of a request, or it died of the SIGKILL that a request or the kernel's
        out-of-memory killer sent. Any other job ended by itself and keeps its exit code, and the reason says why its
        output is incomplete.
        """
        result = os.waitid(os.P_PID, self._process, os.WEXITED)
        assert result is not None
        exited = result.si_code == os.CLD_EXITED
        code, number = (result.si_status, 0) if exited else (128 + result.si_status, result.si_status)
        request = self._request
        if request and (request.signal or number == signal.SIGKILL):
            return Ending("STOPPED", code, number, request.reason, request.by)
        if number == signal.SIGKILL and self._processes.out_of_memory_kills():
            return Ending("STOPPED", code, number, "OOM")
        if number == signal.SIGKILL and milliseconds_until(self._deadline) == 0:
            return Ending("STOPPED", code, number, "TIMEOUT")  # the server killed it, see `Worker._kill_overdue`
        incomplete = request or exhausted
        reason = incomplete.reason if incomplete and incomplete.reason not in ("TIMEOUT", "INPUT_CUT") else ""
        return Ending("FINISHED", code, number, reason)


def milliseconds_until(deadline: float | None) -> int | None:
    """For poll(2), which takes an int: at most a day, and never less than the time that is left."""
    if deadline is None:
        return None
    return min(86_400_000, max(0, int((deadline - time.monotonic()) * 1000) + 1))


def make_pipe(spec: Spec) -> tuple[int, int]:
    """A pipe for the input or an output of the job: the end to read from, and the end to write to.

    The job's uid owns it: an open of /dev/stdin or /dev/stderr opens the pipe anew and checks the permission.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    with contextlib.suppress(OSError):  # EPERM: the user's quota of pipe memory is used up, and the default size works
        fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    if spec.uid != os.geteuid():
        os.fchown(reader, spec.uid, spec.gid)
    return reader, writer


class InputPipe:
    """The pipe of a job's input, and the mover: the process that fills the pipe with what the server sends.

    A job can hold the lock of its pipe for as long as it likes, for example by a splice(2) to a socket that nobody
    reads. A writer then sleeps, with O_NONBLOCK too. So neither the server nor the shim writes to the pipe: one such
    job kept every caller of the server waiting. The shim holds the pipe open until the end of input was said, so that
    the job sees no end of input if the server or the mover dies.

    The pipe is not a FIFO in the job's folder. Opening a FIFO waits for a writer (fifo(7)). The input of a script of
    one line has ended before an interpreter opens /dev/stdin, and that open would wait for ever.
    """

    def __init__(self, spec: Spec, channel: int) -> None:
        """Make the pipe, and start the mover. Raises OSError."""
        self.stdin, self.writer = make_pipe(spec)
        self.report, report = os.pipe2(os.O_CLOEXEC)  # gets the number of bytes when the mover has moved all
        self.moved: int | None = None  # that number
        self.is_whole = False  # the server has said the end of input
        parent = os.fork()
        if parent == 0:
            start_mover(channel, self.writer, report)
        os.waitpid(parent, 0)
        os.close(channel)
        os.close(report)


def start_mover(channel: int, writer: int, report: int) -> NoReturn:
    """The mover's parent. It ends at once, so that the mover is not a descendant of the shim: `ProcessTree` takes every
    descendant of the shim for a process of the job.
    """
    try:
        if os.fork() == 0:
            move_input(channel, writer, report)
    finally:
        os._exit(0)


def move_input(channel: int, writer: int, report: int) -> NoReturn:
    """The mover: moves bytes from the server's socket to the job's pipe until the server closes it."""
    try:
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        close_all_but(channel, writer, report)  # also `control` and `events`: who holds these is a shim
        buffer, moved = bytearray(PIPE_BYTES // 4), 0
        with contextlib.suppress(BrokenPipeError):  # the job reads no more
            while count := os.readv(channel, [buffer]):
                rest = memoryview(buffer)[:count]
                while rest:
                    written = os.write(writer, rest)
                    moved += written
                    rest = rest[written:]
        os.write(report, b"%d" % moved)
    finally:
        os._exit(0)


def close_all_but(*kept: int) -> None:
    """Close all descriptors but these and 0 to 2."""
    for descriptor in {int(name) for name in os.listdir("/proc/self/fd")}.difference(range(3), kept):
        with contextlib.suppress(OSError):  # EBADF: the one that listed them
            os.close(descriptor)


def reap_orphans(main_process: int) -> None:
    """Reap the job's orphans, which become children of the shim, but not the main process: `_ending` reaps that one."""

    def reap(_number: int, _frame: object) -> None:
        with contextlib.suppress(ChildProcessError):
            while child := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                if child.si_pid == main_process:
                    return
                os.waitpid(child.si_pid, 0)

    signal.signal(signal.SIGCHLD, reap)


def start_process(
    spec: Spec, cgroup: int, stdin: Sequence[int], writers: Sequence[int], steps: Sequence[Step]
) -> tuple[int, int, int]:
    """Start the job's main process in its cgroup. Returns its pid, its pidfd, and the pipe that `check_exec` reads."""
    errpipe_read, errpipe_write = os.pipe2(os.O_CLOEXEC)
    process, pidfd, in_cgroup = clone_into(cgroup)
    if process == 0:
        become_job(spec, stdin, writers, errpipe_write, way_in(spec, cgroup, in_cgroup=in_cgroup), steps)
    os.close(errpipe_write)
    return process, pidfd, errpipe_read


def way_in(spec: Spec, cgroup: int, *, in_cgroup: bool) -> Callable[[], None]:
    """How the child enters the job's cgroup. What asks an engine for a job's end (`cgroup` is -1) enters in any case:
    the end must be known although its owner has as many processes as it may.
    """
    if in_cgroup or not spec.cgroup:
        return lambda: None
    job = Cgroup(spec.cgroup)
    return functools.partial(job.attach, 0) if cgroup < 0 else job.attach_within_total


def check_exec(process: int, errpipe: int) -> StartFailure | None:
    """Wait until the job's command runs. Returns what failed."""
    failure = os.read(errpipe, KIB)  # a successful exec closes the pipe, which is the end of file
    os.close(errpipe)
    if not failure:
        return None
    os.waitpid(process, 0)
    return StartFailure.from_word(failure)


@functools.cache
def clone_calls() -> tuple[Any, list[Callable[..., Any]]]:
    """`struct clone_args` (clone3(2)), and syscall(2) with the functions that Python calls around its own fork."""

    class CloneArgs(ctypes.Structure):
        _fields_ = [
            (name, ctypes.c_uint64)
            for name in (
                "flags", "pidfd", "child_tid", "parent_tid", "exit_signal", "stack", "stack_size", "tls", "set_tid",
                "set_tid_size", "cgroup",
            )
        ]  # fmt: skip

    return CloneArgs, [libc().syscall, *(getattr(ctypes.pythonapi, name) for name in FORK_HOOKS)]


def clone_into(cgroup: int) -> tuple[int, int, bool]:
    """Fork into a cgroup (clone3(2)). Returns the pid (0: the child), the pidfd, and whether the child is in it.

    A write to cgroup.procs after a fork waits for an RCU grace period: a start then took 10 to 18 ms instead of 2.5.
    Before Linux 5.7, and if a container's filter refuses clone3, it is an ordinary fork. Raises OSError.
    """
    if cgroup >= 0:
        pidfd = ctypes.c_int(-1)
        structure, (syscall, before_fork, in_child, in_parent) = clone_calls()
        arguments = structure(
            flags=CLONE_PIDFD | CLONE_INTO_CGROUP, pidfd=ctypes.addressof(pidfd), exit_signal=signal.SIGCHLD,
            cgroup=cgroup,
        )  # fmt: skip
        before_fork()
        process = syscall(ctypes.c_long(SYS_CLONE3), ctypes.byref(arguments), ctypes.c_size_t(ctypes.sizeof(arguments)))
        if process == 0:
            in_child()
            return 0, -1, True
        in_parent()
        if process > 0:
            return process, pidfd.value, True
        if (number := ctypes.get_errno()) not in NO_CLONE3:
            raise OSError(number, os.strerror(number))
    process = os.fork()
    return process, os.pidfd_open(process) if process else -1, False


def become_job(
    spec: Spec,
    stdin: Sequence[int],
    writers: Sequence[int],
    errpipe: int,
    enter: Callable[[], None],
    steps: Sequence[Step],
) -> NoReturn:
    """The child: takes the job's cgroup, session, descriptors, confinement and uid, and runs the command.

    Every exception becomes a StartFailure in `errpipe`, which closes on a successful exec.
    """
    failure = StartFailure(errno.EINVAL)  # for a ValueError: execve(2) cannot be given these arguments
    try:
        enter()
        os.setsid()
        for descriptor in stdin:  # none: it stays /dev/null
            os.dup2(descriptor, 0)
        os.dup2(writers[0], 1)
        os.dup2(writers[-1], 2)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        confine(steps)
        if os.geteuid() == 0:
            os.setgroups(spec.groups)
            os.setresgid(spec.gid, spec.gid, spec.gid)
            os.setresuid(spec.uid, spec.uid, spec.uid)
        enter_folder(spec)
        failure = exec_first(spec.programs(), spec.words(), spec.environment())
    except ConfinementError as error:
        failure = StartFailure(error.number, step=error.step)
    except OSError as error:
        failure = StartFailure(error.errno or errno.EINVAL)
    except JobWorkerError as error:
        failure = StartFailure(getattr(error, "errno", errno.EINVAL))
    finally:
        os.write(errpipe, failure.to_word())
        os._exit(127)


def enter_folder(spec: Spec) -> None:
    """Enter the job's working folder. Raises ConfinementError, whose step names the folder that was asked for."""
    try:
        os.chdir(spec.home)
    except OSError:
        os.chdir("/")  # as sshd does for an account without a home
    try:
        if spec.cwd:
            os.chdir(spec.cwd)
    except OSError as error:
        raise ConfinementError(error.errno or errno.EINVAL, CWD_STEP) from None


def exec_first(programs: Sequence[str], arguments: list[str], environment: Mapping[str, str]) -> StartFailure:
    """Run the first program that can be run, as execvp(3) does, at a third of the cost of `os.execvpe`.

    Returns the failure of the first program that exists, else that of the last one. The job's own uid decides here what
    exists: the server's sentence must not tell an owner what lies in a folder that the owner cannot read.
    """
    failure = StartFailure(errno.ENOENT)
    for path in programs:
        try:
            os.execve(path, arguments, environment)  # noqa: S606
        except OSError as error:
            if failure.errno in (errno.ENOENT, errno.ENOTDIR) and not failure.found:
                found = "folder" if os.path.isdir(path) else "file" if os.path.lexists(path) else ""
                failure = StartFailure(error.errno or errno.EINVAL, found)
    return failure


@dataclasses.dataclass(frozen=True)
class EngineReport:
    """What an engine says of a job's end: a reason if the job did not end by itself, and the node that ran it.

    The command `through_end` prints it as one line, `REASON NODE` or `- NODE`. A reason counts, whatever follows it in
    its line. Anything else counts as: unknown.
    """

    reason: str = ""
    node: str = ""

    LINE = re.compile(rb"(-|[A-Z][A-Z0-9_]{0,31})(?:[ \t]+([^\n]*))?\s*")
    NODE = re.compile(r"[A-Za-z0-9_.,:\[\]-]{1,100}")

    @classmethod
    def parse(cls, text: bytes) -> EngineReport:
        found = cls.LINE.fullmatch(text)
        if not found:
            return cls()
        node = (found[2] or b"").decode("ascii", "replace").strip()
        return cls(found[1].decode().strip("-"), node if cls.NODE.fullmatch(node) else "")

    def correct(self, ending: Ending) -> Ending:
        """An ending with what the engine knows. A job that the engine ended is never FINISHED, and its code is 255."""
        ending = dataclasses.replace(ending, node=encode_name(self.node))
        if not self.reason or ending.status == "STOPPED":
            return ending
        return dataclasses.replace(ending, status="STOPPED", code=255, reason=self.reason)


def ask_engine(spec: Spec) -> EngineReport:
    """Run `through_end` with the job's account, and none of its variables, in the job's cgroup.

    Its standard error is discarded: a warning beside an answer does not make a bad end unknown.
    """
    cgroup = spec.cgroup if os.path.isdir(spec.cgroup) else ""  # a reboot removed the cgroup of a lost job
    command, *args = spec.through_end
    asking = dataclasses.replace(spec, command=command, args=tuple(args), through=(), env=(), cwd="", cgroup=cgroup)
    with contextlib.ExitStack() as resources, contextlib.suppress(OSError):  # no process or descriptor can be had
        null = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
        resources.callback(os.close, null)
        answer, writer = os.pipe2(os.O_CLOEXEC)
        resources.callback(os.close, answer)
        try:
            _, pidfd, errpipe = start_process(asking, -1, (), [writer, null], ())
        finally:
            os.close(writer)
        for descriptor in (errpipe, pidfd):
            resources.callback(os.close, descriptor)
        text = read_answer(answer, time.monotonic() + END_SECONDS)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        return EngineReport.parse(text)
    return EngineReport()


def read_answer(pipe: int, deadline: float) -> bytes:
    """What comes from a pipe until its end or the deadline; about 1 KiB at most."""
    text = b""
    while len(text) < KIB and select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
        chunk = os.read(pipe, KIB)
        if not chunk:
            break
        text += chunk
    return text


def finish_job(folder: JobFolder, spec: Spec, events: int, ending: Ending, pumps: Sequence[Pump]) -> None:
    """Finish a job after the end of its main process: kill what is left, keep the last output, write `done` last.

    A crash may happen after any step. `finish_lost` then repeats all of them.
    """
    processes = spec.processes()
    if spec.through:
        processes.end_all(spec.grace)
    processes.kill_all()
    rest = drain_all(pumps)
    usage = processes.usage()
    processes.remove()
    with contextlib.suppress(OSError):  # a disk that fails must not keep the job from its end; `delete` tries again
        folder.delete_tmp()
    reason = ending.reason or (rest.reason if rest else "") or ("" if folder.sync() else "DISK_FULL")
    write_event(events, "done", reason=reason, **vars(usage))
    os.fsync(events)


def finish_lost(folder: JobFolder, spec: Spec, events: int) -> None:
    """Finish a job whose shim is gone: with the ending that its events have, else as LOST."""
    ending = folder.read_events().ending
    os.write(events, b"\n")  # a line that the lost shim tore stays a line of its own
    if ending is None:
        ending = LOST
        if spec.through_end:  # it removes from the engine what the lost job left there
            spec.processes().end_all(spec.grace)
            ask_engine(spec)
        write_event(events, "exited", **vars(ending))
    finish_job(folder, spec, events, ending, ())


# --- 8. Accounts ----------------------------------------------------------------------------------------
# Owns the uids: which account a job runs with, and the private home of each owner. It writes only `<state>/owners`,
# `<state>/home`, `<state>/view/UID` and the claims of uids (UID_CLAIMS). It knows nothing of jobs or of who may do
# what.


FIRST_USER_UID, NOBODY = 1000, 65534  # lower uids belong to the system (UID_MIN of login.defs(5)), as does `nobody`


@dataclasses.dataclass(frozen=True)
class Account:
    """The account that a job runs with."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    name: str
    home: str

    @classmethod
    def of_server(cls) -> Account:
        """The server's own account: the only one that a server without root can give."""
        try:
            entry = pwd.getpwuid(os.geteuid())
            name, home = entry.pw_name, entry.pw_dir
        except KeyError:
            name, home = str(os.geteuid()), "/"
        return cls(os.geteuid(), os.getegid(), (), name, home)

    @classmethod
    def named(cls, name: str) -> Account:
        """An account of this machine, with its groups. Raises BadRequestError if there is none."""
        try:
            entry = pwd.getpwnam(name)
        except (KeyError, ValueError):
            raise BadRequestError(f"this machine has no account {name!r} to run as") from None
        return cls(entry.pw_uid, entry.pw_gid, tuple(os.getgrouplist(name, entry.pw_gid)), name, entry.pw_dir)

    @classmethod
    def of_person(cls, owner: str) -> Account:
        """The account of a person with the owner's name. Raises CannotRunError if there is none."""
        with contextlib.suppress(BadRequestError):
            account = cls.named(owner)
            if account.uid >= FIRST_USER_UID and account.uid != NOBODY:
                return account
        raise CannotRunError(
            f"this server runs a job as its owner's account, and this machine has no account {owner!r} with a uid of "
            f"{FIRST_USER_UID} or more (`serve --accounts system`)"
        )


class Accounts:
    """The unprivileged uid and the private home of each owner.

    `<state>/owners/UID` holds the owner's name, and `<state>/home/UID` is the home. Each state folder claims a range of
    uids of its own, so that two servers do not give the same uid to two owners.
    """

    def __init__(self, state: pathlib.Path) -> None:
        self._state = state
        self._owners = state / "owners"
        self._homes = state / "home"
        self._uids: dict[str, int] = {}
        self._range = (0, 0)  # the first uid, and how many

    def open(self) -> None:
        self._owners.mkdir(mode=0o700, exist_ok=True)
        self._homes.mkdir(mode=0o711, exist_ok=True)
        self._homes.chmod(0o711)
        for path in self._owners.iterdir():
            if path.name.isdigit():
                self._uids[path.read_bytes().decode("utf-8", "surrogateescape")] = int(path.name)
        if os.geteuid() == 0:
            self._range = claim_uids(self._owners, self._uids.values())

    def homes(self) -> dict[str, str]:
        """The home of each owner."""
        return {owner: f"{self._homes}/{uid}" for owner, uid in self._uids.items()}

    def of(self, owner: str) -> Account:
        """The account of an owner, made at the owner's first job. Raises ExhaustedError or KernelError."""
        try:
            uid = self._uids.get(owner) or self._assign(owner)
            home = f"{self._homes}/{uid}"
            if not os.path.exists(home):
                os.mkdir(home, 0o700)
            if os.stat(home).st_uid != uid:  # it is new, or an earlier server was killed between these two steps
                os.chown(home, uid, uid)
            make_view(str(self._state), uid)
        except OSError as error:
            raise disk_error(f"cannot make a home for {owner!r}", error) from error
        return Account(uid, uid, (), owner, home)

    def _assign(self, owner: str) -> int:
        """Give the owner a free uid. The file gets its name last, so that a crash never changes the owner of a uid."""
        first, count = self._range
        taken = set(self._uids.values())
        uid = next((uid for uid in range(first, first + count) if uid not in taken), None)
        if uid is None:
            raise ExhaustedError(f"all {count} uids of this server are given to owners")
        new = self._owners / f"new-{uid}"
        new.write_bytes(owner.encode("utf-8", "surrogateescape"))
        sync(new)
        new.rename(self._owners / str(uid))
        sync(self._owners)
        self._uids[owner] = uid
        return uid


def uid_ranges() -> tuple[int, int, int]:
    """The first uid of all ranges, the uids in a range, and the number of ranges that this user namespace maps."""
    maps = [tuple(map(int, line.split())) for line in kernel_read("/proc/self/uid_map").splitlines()]
    end = UID_RANGES_BASE + UID_RANGE * UID_RANGES
    if any(inside <= UID_RANGES_BASE and end <= inside + count for inside, _, count in maps):
        return UID_RANGES_BASE, UID_RANGE, UID_RANGES
    inside, _, count = max(maps, key=lambda found: found[2])
    # A small uid map, as in a rootless container: the third quarter of it, since the accounts of the image are below.
    return inside + count // 2, max(1, count // 64), 16


def claim_uids(owners: pathlib.Path, given: Iterable[int]) -> tuple[int, int]:
    """Claim a range of uids for the state folder with this `owners`, which gave the uids `given` to owners already.

    Two state folders can hash to one range. So each range has a file in UID_CLAIMS, which outlives reboots as the homes
    do. Raises JobWorkerError if another state folder has the range of these uids.
    """
    first, size, count = uid_ranges()
    begin = zlib.crc32(os.fsencode(owners)) % count
    used = sorted({(uid - first) // size for uid in given if first <= uid < first + size * count})
    try:
        token = make_token(owners)
        with locked_claims() as claims:
            for number in used or [(begin + step) % count for step in range(count)]:
                if claim_range(claims / str(first + number * size), token, owners):
                    return first + number * size, size
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT):
            raise disk_error(f"cannot claim uids in {UID_CLAIMS}", error) from error
        say(f"cannot claim uids in {UID_CLAIMS}: {error.strerror}; another state folder may give the same uids")
        return first + (used or [begin])[0] * size, size
    if used:
        raise JobWorkerError(
            f"another state folder has the uids from {first + used[0] * size}, which {owners.parent} gave to owners "
            f"({UID_CLAIMS} says which); use another state folder"
        )
    raise ExhaustedError(f"all {count} ranges of uids are claimed; delete files of old state folders in {UID_CLAIMS}")


def claim_range(claim: pathlib.Path, token: str, owners: pathlib.Path) -> bool:
    """Claim one range. False: another state folder has it."""
    if claim.exists():
        holder, _, place = os.fsdecode(claim.read_bytes()).partition(" ")
        if place == str(owners):
            if holder == token:
                return True
        elif holder != token or read_token(pathlib.Path(place)) == token:
            return False  # another state folder has the range, or this one is a copy of the folder that has it
    new = claim.with_name(f"new-{claim.name}")
    new.write_bytes(os.fsencode(f"{token} {owners}"))
    sync(new)
    new.rename(claim)
    sync(claim.parent)
    return True


@contextlib.contextmanager
def locked_claims() -> Iterator[pathlib.Path]:
    """The folder of claims, locked: two servers that start at once must not claim one range. Raises OSError."""
    folder = pathlib.Path(UID_CLAIMS)
    folder.mkdir(mode=0o700, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield folder
    finally:
        os.close(descriptor)


def read_token(owners: pathlib.Path) -> str:
    try:
        return (owners / "token").read_text("ascii", "replace")
    except OSError:
        return ""


def make_token(owners: pathlib.Path) -> str:
    """The random word that names a state folder also after it was moved. Raises OSError."""
    if not read_token(owners):
        new = owners / "new-token"
        new.write_text(os.urandom(16).hex())
        sync(new)
        new.rename(owners / "token")
        sync(owners)
    return read_token(owners)


# --- 9. Requests ---------------------------------------------------------------------------------------
# Owns what a caller may ask for, what this machine can give, and the sentence for a command that cannot be started. It
# starts nothing and knows no job.

FILE_INSTEAD = "write it to a file that the command reads"  # the remedy for an environment that is too long


@dataclasses.dataclass(frozen=True)
class WorkerOptions:
    """How one `Worker` behaves. Seconds and bytes. `timeout`, `keep`, `keep_bytes`: 0 is no bound."""

    state: pathlib.Path
    cgroup: str | None = None  # the root of the cgroup tree; None: chosen by `make_tree`
    # Controllers, and "confine", that are not needed. "auto": all that this machine lacks.
    without: frozenset[str] = frozenset()
    hidden: tuple[str, ...] = ()  # folders that confined jobs see empty, beside the state folder
    defaults: Limits = Limits()
    caps: Limits = Limits()
    timeout: float = 0.0
    max_output: int = OUTPUT_LIMIT
    keep: float = KEEP_SECONDS
    keep_bytes: int = 0
    reserve: float = RESERVE
    max_jobs: int = MAX_JOBS
    owner: OwnerLimits = OwnerLimits()
    accounts: str = "own"  # "own": uids that this server gives to owners; "system": accounts of the owners' names
    # The words of an engine's client, put before each command; `fill_words` has their fields. Empty: no engine.
    through: tuple[str, ...] = ()
    through_end: tuple[str, ...] = ()  # a command that tells how the engine saw the job's end (EngineReport)
    grace: float = GRACE  # with `through`: seconds from TERM to the kill


@dataclasses.dataclass(frozen=True)
class JobRequest:
    """What a caller asks for. None and empty mean the server's defaults."""

    command: str
    args: tuple[str, ...] = ()
    owner: str = ""
    id: str = ""  # a UUID4; empty: a new one
    cpu: float | None = None  # CPUs
    memory: int | None = None  # bytes
    pids: int | None = None  # processes and threads
    io: int | None = None  # bytes a second, each way, on each disk
    timeout: float | None = None  # seconds; 0: none
    max_output: int | None = None  # bytes
    run_as: str = ""  # the name of an account
    env: tuple[tuple[str, str], ...] = ()
    cwd: str = ""  # relative to the home
    name: str = ""
    split: bool = False  # keep standard error apart from standard output
    confine: bool = False  # a job with `run_as` is confined only if this asks for it; others always
    input: bool = False  # standard input comes with `Worker.send_input`
    admin: bool = False  # ADMIN_JOBS more may run, and the limit of one owner's jobs does not count


def count_of(number: int, one: str, more: str) -> str:
    return f"{number} {one if number == 1 else more}"


def kernel_version() -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", os.uname().release)[:2]))


def check_kernel() -> None:
    """Refuse a kernel older than Linux 5.4: poll(2) cannot wait for a pidfd there."""
    if kernel_version() < (5, 4):
        raise JobWorkerError(f"this is Linux {os.uname().release}, and serving jobs needs 5.4 or newer")


def new_job_id() -> str:
    """A random UUID4 (RFC 9562). The import of `uuid` would cost a client more than this."""
    digits = os.urandom(16).hex()
    variant = "89ab"[int(digits[16], 16) % 4]
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:]}"


def check_id(job_id: str) -> str:
    """The id, if it is one. Raises BadRequestError."""
    if JOB_ID.fullmatch(job_id) is None:
        raise BadRequestError(f"{job_id!r} is not a job id: a random UUID in lower case with dashes")
    return job_id


def check_request(request: JobRequest) -> None:
    """Refuse what no kernel could run (execve(2)). Raises BadRequestError."""
    if request.id:
        check_id(request.id)
    if not request.command:
        raise BadRequestError("the command is empty")
    words = (request.command, *request.args)
    if "\0" in "".join(words):
        number = next(number for number, word in enumerate(words) if "\0" in word)
        where = "the command" if number == 0 else f"argument {number}"
        raise BadRequestError(f"{where} contains a NUL byte, which no program can be given")
    check_environment(request)
    if request.timeout is not None and not 0 <= request.timeout < float("inf"):
        raise BadRequestError(f"the timeout {request.timeout} is not allowed: give 0 (no timeout) or more seconds")


def check_environment(request: JobRequest) -> None:
    """Refuse a variable, folder or name that no process could be given. The sentence never contains a value."""
    for key, value in request.env:
        if not key or "=" in key or "\0" in key or "\0" in value:
            raise BadRequestError(
                f"{key!r} cannot be a variable of the environment: its name is empty or has `=`, or there is a NUL byte"
            )
    for what, text in (("the working folder", request.cwd), ("the name", request.name)):
        if "\0" in text:
            raise BadRequestError(f"{what} contains a NUL byte")
    if len(request.name) > 200 or any(not character.isprintable() for character in request.name):
        raise BadRequestError(
            f"the job's name {request.name[:40]!r} is not allowed: use at most 200 characters, all of them printable"
        )


def capped(name: str, asked: float | None, default: Any, cap: Any) -> Any:
    """The value that was asked for, or the default. Raises BadRequestError above the cap."""
    if asked is None:
        return min(default, cap)
    if not 0 < asked <= cap:
        option = name if name.startswith("max-") else f"max-{name}"
        raise BadRequestError(
            f"{name} {asked:,.15g} is not allowed here: it must be more than 0 and at most {cap:,.15g} "
            f"(`serve --{option}`)"
        )
    return asked


def limits_of(request: JobRequest, options: WorkerOptions) -> Limits:
    if request.io is not None and 0 < request.io < IO_FLOOR:
        raise BadRequestError(f"io {request.io} is not allowed: at least {IO_FLOOR} (1M), or a stop would take minutes")
    asked, default, cap = request, options.defaults, options.caps
    return Limits(
        cpu=float(capped("cpu", asked.cpu, default.cpu, cap.cpu)),
        memory=int(capped("memory", asked.memory, default.memory, cap.memory)),
        pids=int(capped("pids", asked.pids, default.pids, cap.pids)),
        io=int(capped("io", asked.io, default.io, cap.io)),
    )


def digest_of(args: tuple[str, ...], env: tuple[tuple[str, str], ...]) -> str:
    """What tells the arguments and the environment of a job from those of another one, without either in memory."""
    return hashlib.sha256(json.dumps([args, env]).encode()).hexdigest()


def is_same_request(request: JobRequest, spec: Spec) -> bool:
    """Whether a job can be this request's. A value that the request leaves to the server is not compared, because the
    defaults may have changed. `split` is not compared: `run` chooses it by where its outputs go.
    """
    if request.owner != spec.owner:
        return False
    asked = (request.command, request.cwd, request.name, request.input)
    limits = {**vars(spec.limits), "timeout": spec.timeout, "max_output": spec.max_output}
    return (
        (spec.command, spec.cwd, spec.name, spec.input) == asked
        and request.run_as in ("", spec.user)
        and spec.confine >= request.confine
        and all(getattr(request, name) in (None, limit) for name, limit in limits.items())
        and digest_of(request.args, request.env) == (spec.digest or digest_of(spec.args, spec.env))
    )


WORD_FIELDS = ("id", "owner", "name", "cpus", "memory_mb", "minutes", "command")


def check_words(words: Iterable[str], fields: Sequence[str] = WORD_FIELDS) -> None:
    """Refuse words that `fill_words` could not fill. Raises BadRequestError."""
    for word in words:
        names = re.findall(r"\{([^{}]*)\}", re.sub(r"\{\{|\}\}", "", word))
        unknown = [name for name in names if name not in fields]
        if unknown:
            known = " ".join(f"{{{name}}}" for name in fields)
            raise BadRequestError(f"{word!r} has the field {{{unknown[0]}}}; the fields are {known}")
        try:
            word.format_map(dict.fromkeys(fields, ""))
        except ValueError:
            raise BadRequestError(f"{word!r} has a brace without its pair; {{{{ and }}}} stand for braces") from None


def fill_words(words: Iterable[str], spec: Spec) -> tuple[str, ...]:
    """The words with this job's values in their fields. A value is a part of one word, whatever it contains.

    A word with the command is for a shell, so the texts in it are quoted too.
    """
    fields: dict[str, Any] = {
        "id": spec.id,
        "owner": spec.owner.replace("\0", ""),
        "name": spec.name,
        "cpus": rounded_up(spec.limits.cpu),
        "memory_mb": rounded_up(spec.limits.memory / MIB),
        "minutes": rounded_up(spec.timeout / 60),  # 0: none
        "command": COMMAND_MARK,
    }
    quoted = {**fields, "owner": quote(fields["owner"]), "name": quote(fields["name"])}
    return tuple(word.format_map(quoted if COMMAND_MARK in word.format_map(fields) else fields) for word in words)


def rounded_up(value: float) -> int:
    return int(-(-value // 1))


def confinement_failure(state: str, hidden: Sequence[str]) -> str:
    """Why this machine cannot confine jobs; empty: it can."""
    if kernel_version() < (5, 8):
        # There hidepid is one setting of the whole machine, and a job's mount would change it for everybody.
        return f"this is Linux {os.uname().release}, and a /proc of a job's own needs 5.8"
    if is_below(os.path.realpath(state), os.path.realpath("/dev/shm")):  # noqa: S108
        return f"the state folder {state} lies below /dev/shm, and each confined job has a /dev/shm of its own"
    failure = try_confinement(state, hidden)
    return f"{failure.step}: {failure.strerror}" if failure else ""


def job_notes(
    cgroup: bool, controllers: Iterable[str], *, separate: bool, confined: bool, through: Sequence[str] = ()
) -> tuple[str, ...]:
    notes = []
    missing = [name for name in CONTROLLERS if name not in controllers]
    if through:
        notes.append(
            f"the job runs through {through[0]!r}: its limits are the engine's, those of this machine hold only the "
            f"engine's client, and it is not confined here"
        )
    elif missing:
        notes.append(f"limits on {', '.join(missing)} are not enforced")
    if not cgroup:
        notes.append("there is no cgroup: leftover processes are found by a search of /proc, which a job can evade")
    if not separate:
        notes.append(
            "the job runs as the server's own user or as root: limits and separation hold only if it cooperates"
        )
    if not confined and not through:
        notes.append("it is not confined: it shares /tmp, shared memory and the list of processes with other users")
    return tuple(notes)


def start_failure(failure: StartFailure, spec: Spec) -> JobWorkerError:
    """The error for a command that could not be run (execve(2)).

    It repeats the command as it was typed, and tells only what the job's own uid could see.
    """
    number = failure.errno
    name = f"the engine's client {spec.program!r}" if spec.through else repr(spec.program)
    reason = os.strerror(number)
    if failure.step == CWD_STEP:
        return CannotRunError(f"cannot enter the working folder {spec.cwd!r}: {reason}")
    if failure.step:
        exhausted = number in (errno.ENOSPC, errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE)
        sentence = f"cannot confine the job: {failure.step}: {reason}"
        return ExhaustedError(sentence) if exhausted else JobWorkerError(sentence)
    if number == errno.ENOENT and not failure.found:
        return CannotRunError(f"{name} is not found" + not_found_hint(spec), 127)
    if number == errno.ENOENT:
        return CannotRunError(
            f"{name} cannot run: the interpreter that it names (its `#!` line, or its loader) is missing"
        )
    if number == errno.EACCES and failure.found == "folder":
        return CannotRunError(f"{name} is a folder, not a command")
    if number == errno.EACCES and failure.found:
        return CannotRunError(f"{name} is not executable for {spec.user}")
    if number == errno.EACCES:
        return CannotRunError(f"{name} is not found, or is in a folder that is closed to {spec.user}", 127)
    if number == errno.ENOEXEC:
        return CannotRunError(f"{name} cannot run: it is not a program for this machine, and it has no `#!` line")
    if number == errno.E2BIG:
        return CannotRunError(too_long(name, spec))
    if number == errno.EAGAIN:
        # The job's own limit (`--pids`) is at least 1, so it is not the reason.
        total = bool(spec.cgroup) and "pids" in spec.controllers
        owner, option = (f"its owner {spec.owner!r}, ", "`serve --owner-pids`, ") if total else ("", "")
        return ExhaustedError(
            f"no process number is free for the job: {owner}this machine, its container, or the account that serves "
            f"has as many processes as it may; stop some, or raise the limit ({option}kernel.pid_max, pids.max, "
            f"`ulimit -u`)"
        )
    if number == errno.ENOMEM:
        return ExhaustedError(f"this machine cannot start another process: {reason}")
    if number in (errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ETXTBSY, errno.EINVAL, errno.EPERM):
        return CannotRunError(f"{name} cannot run: {reason}")
    return JobWorkerError(f"{name} could not be started: {reason}")


def too_long(name: str, spec: Spec) -> str:
    """The sentence for a command that is too long (E2BIG). It names the environment where that is a part of it."""
    kernel = "too long for the kernel (128 KiB each, 2 MiB in all)"
    for key, value in spec.env:
        if len(os.fsencode(key)) + len(os.fsencode(value)) + 2 > 128 * KIB:
            return f"the variable {key[:40]!r} of the environment is {kernel}: {FILE_INSTEAD}"
    if not spec.env:
        return f"{name} with its {spec.arg_count} arguments is {kernel}"
    variables = count_of(len(spec.env), "variable", "variables")
    return f"{name} with its {spec.arg_count} arguments and its environment of {variables} is {kernel}: {FILE_INSTEAD}"


def not_found_hint(spec: Spec) -> str:
    """What follows "is not found": the PATH that was searched, and the remedy for a shell line. It does not repeat a
    PATH of the job's environment.
    """
    path = "" if "/" in spec.program else " on PATH, which "
    if path:
        path += f"is {JOB_PATH}" if spec.path() == JOB_PATH else "the job's environment sets"
    return path + ("; for a line of shell use `sh -c`" if re.search(r"[\s;|&<>]", spec.program) else "")


# --- 10. Disk and ports --------------------------------------------------------------------------------
# Owns the questions about the machine that the job table acts on: how much of the disk is free, who uses it, and which
# process holds a port. It changes nothing.

MEASURED_STEPS = 200  # files that are measured before other tasks run; 200 take about 1 ms
SYS_PIDFD_GETFD = 438


async def measured(folder: str, *, files: bool) -> float:
    """The bytes, or the number of files, of a folder and all below. Other tasks run in between.

    A path that is too long for the kernel cannot be looked into. It counts as infinite: no owner can hide files.
    """
    total, folders = 0, [folder]
    while folders:
        await asyncio.sleep(0)
        try:
            with os.scandir(folders.pop()) as entries:
                found, below = await measured_entries(entries, files=files)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                return float("inf")
        else:
            total += found
            folders += below
    return total


async def measured_entries(entries: Iterable[os.DirEntry[str]], *, files: bool) -> tuple[int, list[str]]:
    """The bytes, or the number, of these entries, and the folders among them. Raises OSError."""
    total, folders = 0, []
    for number, entry in enumerate(entries, 1):
        if number % MEASURED_STEPS == 0:
            await asyncio.sleep(0)
        facts = entry.stat(follow_symlinks=False)
        total += 1 if files else facts.st_blocks * 512
        if stat.S_ISDIR(facts.st_mode):
            folders.append(entry.path)
    return total, folders


def process_has_port(process: int, port: int) -> bool:
    """Whether a process has a TCP socket with this local port. A socket that is bound and does not listen stands in no
    file of /proc, so each socket is looked at with a copy of its descriptor (pidfd_getfd(2), Linux 5.6).
    """
    with contextlib.ExitStack() as resources, contextlib.suppress(OSError):
        pidfd = os.pidfd_open(process)
        resources.callback(os.close, pidfd)
        return any(descriptor_has_port(process, pidfd, int(name), port) for name in os.listdir(f"/proc/{process}/fd"))
    return False


def descriptor_has_port(process: int, pidfd: int, descriptor: int, port: int) -> bool:
    """Whether this descriptor of a process is a TCP socket with this local port."""
    with contextlib.suppress(OSError):
        if os.readlink(f"/proc/{process}/fd/{descriptor}").startswith("socket:"):
            words = (ctypes.c_long(number) for number in (SYS_PIDFD_GETFD, pidfd, descriptor, 0))
            with socket.socket(fileno=libc_call("syscall", *words)) as copy:
                tcp = copy.family in (socket.AF_INET, socket.AF_INET6) and copy.type == socket.SOCK_STREAM
                return bool(tcp and copy.getsockname()[1] == port)
    return False


def is_short_of_files(disk: os.statvfs_result, share: float) -> bool:
    """Whether less than this share of the inodes is free. Some file systems count none."""
    return disk.f_files > 0 and (disk.f_favail == 0 or disk.f_favail < disk.f_files * share)


def is_short(disk: os.statvfs_result, share: float) -> bool:
    """Whether less than this share of a file system is free, in bytes or in inodes."""
    return disk.f_bavail < disk.f_blocks * share or is_short_of_files(disk, share)


def checked_reserve(state: pathlib.Path, share: float, *, refused: bool) -> int:
    """The bytes of the state folder's file system that an output leaves free: half of the reserve.

    Raises ExhaustedError below that half, and below the whole reserve for an owner who is `refused`.
    """
    disk = os.statvfs(state)
    reserve, free = int(disk.f_blocks * disk.f_frsize * share), disk.f_bavail * disk.f_frsize
    bound = share if refused else share / 2
    whose = ", and most of it is used by this owner" if refused else ""
    if is_short_of_files(disk, bound):
        raise ExhaustedError(
            f"the disk of {state} has few inodes left{whose}: {disk.f_favail} of {disk.f_files} are free, and "
            f"{free // MIB} MiB; delete files or ended jobs"
        )
    if is_short(disk, bound):
        raise ExhaustedError(
            f"the disk of {state} is nearly full{whose}: {free // MIB} MiB are free and {reserve // MIB} MiB are held "
            f"in reserve (`serve --reserve`)"
        )
    return reserve // 2


# --- 11. Input ------------------------------------------------------------------------------------------
# Owns a job's standard input in the server that started the job: the way to the job's pipe, its one sender and its end.
# A part of an input never passes for the whole: the shim holds the pipe open until this section tells it the end of
# input, or that the input is cut and the job is to be stopped.

SO_SNDBUFFORCE = 32  # asm-generic/socket.h; with the usual 208 KiB, `run -i cat` of 1 GiB took 6.9 s instead of 5.7
SMALL_WRITE_BYTES, FEED_SECONDS = 64 * KIB, 0.001  # after a smaller write into a full socket a feed pauses


class Feed:
    """The server's end of a socket to the process that fills the pipe of a job's input (`move_input`). It never blocks,
    and it holds no bytes.
    """

    def __init__(self, job_id: str, folder: JobFolder) -> None:
        self._job_id = job_id
        self._folder = folder
        self._socket: socket.socket | None = None
        self._sender: asyncio.Task[None] | None = None  # of the one caller who sends the input
        self.told = ""  # what the shim was told of the input: "end" or "cut"
        self.size = 0  # bytes that the socket has taken

    def open(self, handed_over: contextlib.ExitStack) -> int:
        """Make the socket. Returns the shim's end, which `handed_over` closes. Raises JobWorkerError."""
        try:
            self._socket, theirs = socket.socketpair()
        except OSError as error:
            raise disk_error("cannot make a socket for the job's input", error) from error
        handed_over.enter_context(theirs)
        self._socket.setblocking(False)
        with contextlib.suppress(OSError):  # EPERM: only root may have more than net.core.wmem_max
            self._socket.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, MIB)
        asyncio.get_running_loop().call_later(INPUT_SECONDS, self.cut_unsent)
        return theirs.fileno()

    @property
    def is_open(self) -> bool:
        """Whether the socket is open: until the shim has recorded the end of input, the job has ended, or the input is
        cut.
        """
        return self._socket is not None

    async def send(self, chunks: AsyncIterable[Content]) -> None:
        """Pass on all chunks, and tell the shim the end of input. It returns early if the job reads no more.

        If `chunks` raises, or if this task is cancelled, the input is cut. Raises InputError if the input has ended or
        has another sender, and UnavailableError if the server stops and cuts it.
        """
        if not self.is_open:
            raise InputError(f"the input of job {self._job_id} has ended")
        if self._sender is not None:
            raise InputError(f"another caller sends the input of job {self._job_id}")
        self._sender = sender = asyncio.ensure_future(self._pass_on(chunks))
        try:
            await asyncio.wait((sender,))
            if not sender.cancelled():
                sender.result()
        finally:
            self.cut()
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)
        if self.told == "cut":
            raise UnavailableError(
                f"the server is stopping, and the job is stopped, because its input was cut after {self.size} bytes"
            )

    async def _pass_on(self, chunks: AsyncIterable[Content]) -> None:
        assert self._socket is not None
        async for chunk in chunks:
            if not await self._write(self._socket, chunk):
                break  # the job has closed its standard input, or has ended; as with ssh, that is no error
        with contextlib.suppress(OSError):  # ENOTCONN: the other end is closed
            self._socket.shutdown(socket.SHUT_WR)
        if self._folder.send_request(InputEnd(self.size)):
            self.told = "end"

    async def _write(self, channel: socket.socket, chunk: Content) -> bool:
        """Return when the socket has taken all bytes. False: no process of the job reads the input any more."""
        rest, count = memoryview(chunk), len(chunk)
        while rest:
            try:
                count = channel.send(rest)
            except BlockingIOError:
                await self._until_writable(channel)
                if count < SMALL_WRITE_BYTES:  # the job reads little at a time, and the next write shall be larger
                    await asyncio.sleep(FEED_SECONDS)
            except (BrokenPipeError, ConnectionResetError):
                return False
            else:
                self.size += count
                rest = rest[count:]
        return True

    async def _until_writable(self, channel: socket.socket) -> None:
        loop, writable = asyncio.get_running_loop(), asyncio.Event()
        loop.add_writer(channel, writable.set)
        try:
            await writable.wait()
        finally:
            if self.is_open:
                loop.remove_writer(channel)

    def cut_unsent(self) -> None:
        """Cut the input if its caller was lost between the start and the input. The job would wait for ever."""
        if self._sender is None:
            self.cut()

    def cut(self) -> None:
        """Stop the job, unless the shim was told the end of input. If the shim is gone, the socket stays open until the
        job is dead, which then sees no end of input.
        """
        if not self.is_open or self.told:
            return
        try:
            if self._folder.send_request(InputCut(self.size)):
                self.told = "cut"
                self.close()
        except JobWorkerError as error:  # no descriptor is free
            say(f"the input of job {self._job_id} was cut, but the job is not stopped yet: {error}")
            asyncio.get_running_loop().call_later(LONGEST_RETRY_SECONDS, self.cut)

    def close(self) -> None:
        """Close the socket, and end its sender."""
        if self._socket is not None:
            asyncio.get_running_loop().remove_writer(self._socket)
            self._socket.close()
            self._socket = None
            if self._sender is not None:
                self._sender.cancel()


# --- 12. Job and job table -----------------------------------------------------------------------------
# Owns the table of jobs, their recovery and their retention. It is the public face of the library: everything about
# jobs, and nothing of gRPC, TLS or of who may do what. It reads and writes files through sections 4, 5, 8 and 10.

DISK_SECONDS = 1.0  # between two looks at the disk while jobs run
FRESH_SECONDS = 10.0  # an ended job is not deleted to save space before this age: `run` may not have begun to read it
LATE_SECONDS = 5.0  # from when the shim should have killed a job until the server itself kills it


@dataclasses.dataclass(frozen=True)
class JobStatus:
    """All that is known of a job. `status` is RUNNING, STOPPED or FINISHED; a RUNNING job has no `ending`."""

    status: str
    spec: Spec
    ending: Ending | None
    usage: Usage
    started: float  # seconds since 1970; 0: not yet
    ended: float  # seconds since 1970; 0: not yet
    output_bytes: int
    memory_current: int  # bytes
    notes: tuple[str, ...]
    error_bytes: int = 0  # of standard error, if it is kept apart. `output_bytes` then counts standard output only
    input_bytes: int = 0  # that the job was given

    @property
    def exit_code(self) -> int:
        return self.ending.code if self.ending else 0

    @property
    def stopped_by(self) -> str:
        return decode_name(self.ending.by) if self.ending else ""

    @property
    def node(self) -> str:
        """Where an engine ran the job, if the engine told."""
        return decode_name(self.ending.node) if self.ending else ""


class Job:
    """One job of the table: its folder, and what the server remembers of it. All of it can be read again from the
    folder.
    """

    __slots__ = (
        "__weakref__",
        "_spec",
        "bell",
        "events",
        "feed",
        "finisher_waits",
        "finishers",
        "folder",
        "id",
        "kill_timer",
        "killer",
        "name",
        "owner",
        "tail",
        "watch",
    )

    def __init__(self, jobs: str, job_id: str, spec: Spec | None = None) -> None:
        self.id = job_id
        self.folder = JobFolder(f"{jobs}/{job_id}")
        self.events = Events()
        self.bell = Bell()  # rings when `events` changes, and when the job leaves the table
        self.tail: Tail | None = None  # while a client follows the output
        self.feed: Feed | None = None  # of a job with input, in the server that started it
        self.watch: int | None = None  # on `events`, until the shim is gone
        self.kill_timer: asyncio.TimerHandle | None = None  # while a job with a timeout runs
        self.killer: asyncio.Task[None] | None = None  # the last kill without the shim. All stops share it
        self.finishers = 0  # how many were started after the shim was lost
        self.finisher_waits = False  # for a slot, or for the launcher
        self._spec = spec
        # Owner and name never change. They are read here: a later read would take time, and from that time a caller
        # could tell that another owner has this id. Without a readable job.json the owner is empty.
        owner, name = (spec.owner, spec.name) if spec else self.folder.read_labels()
        self.owner, self.name = sys.intern(owner), sys.intern(name)

    @property
    def ended(self) -> bool:
        return self.events.phase == "done"

    @property
    def spec(self) -> Spec:
        """What was asked for, without most of very many arguments. Raises NoSuchJobError if job.json is gone or
        unreadable.
        """
        spec = self._spec or self.folder.read_head()
        if spec is None:
            raise NoSuchJobError(self.id)
        return spec

    def keep_spec(self, spec: Spec | None) -> None:
        """Keep the spec in memory while the job runs. The specs of ten thousand ended jobs stay on the disk."""
        self._spec = spec

    def ring(self) -> None:
        """Wake every task that waits for the job or follows it."""
        self.bell.ring()
        if self.tail is not None:
            self.tail.wake()

    def refresh(self, *, closed: bool) -> None:
        """Read `events` again. `done` counts only after the shim has closed the file: then it is on the disk."""
        events = self.folder.read_events()
        if closed or events.phase != "done":
            self.events = events
        if events.input_bytes is not None:
            self.close_feed()  # the shim has closed its end before, so the job now sees the end of input
        self.bell.ring()

    @property
    def input_bytes(self) -> int:
        """How many bytes of input the job was given. A job that ended by itself before the end of its input may have no
        record of it.
        """
        recorded = self.events.input_bytes
        return recorded if recorded is not None else self.feed.size if self.feed else 0

    @property
    def takes_input(self) -> bool:
        return self.feed is not None and self.feed.is_open

    def close_feed(self) -> None:
        if self.feed is not None:
            self.feed.close()


class Retention:
    """The ended jobs, oldest first, and which of them is deleted next."""

    def __init__(self, keep: float, keep_bytes: int) -> None:
        self._keep = keep
        self._keep_bytes = keep_bytes
        self._sizes: dict[Job, int] = {}  # in the order of their ends
        self._total = 0
        self.bell = Bell()

    def add(self, job: Job) -> None:
        self._sizes[job] = size = job.folder.disk_bytes() if self._keep_bytes else 0
        self._total += size
        if len(self._sizes) == 1 or (self._keep_bytes and self._total > self._keep_bytes):
            self.bell.ring()

    def discard(self, job: Job) -> None:
        self._total -= self._sizes.pop(job, 0)

    def __len__(self) -> int:
        return len(self._sizes)

    def seconds_left(self) -> float | None:
        """The time until the oldest job is deleted; None while there is nothing to wait for."""
        oldest = next(iter(self._sizes), None)
        if oldest is None:
            return None
        age = time.time() - oldest.events.seconds("done")
        if self._keep_bytes and self._total > self._keep_bytes:
            return max(0.0, FRESH_SECONDS - age)
        return max(0.0, self._keep - age) if self._keep else None

    def oldest(self) -> Job:
        return next(iter(self._sizes))


def shim_seconds(job: Job, grace: float) -> float:
    """How long a stop leaves the end of a job to its shim. A job that runs through an engine has its own grace twice:
    for its main process, and for what that leaves behind.
    """
    with contextlib.suppress(NoSuchJobError):
        return grace + end_seconds(job.spec) + LATE_SECONDS
    return grace + LATE_SECONDS


def end_seconds(spec: Spec) -> float:
    """How long the end of a job may take if it runs through an engine. Other jobs are killed at once: 0."""
    return 2 * spec.grace + END_SECONDS if spec.through else 0.0


def still_running(job: Job) -> StillRunningError:
    """Why a job is not done after its kill. After the end of its main process, its shim kills the other processes and
    then has only files to write and delete.
    """
    with contextlib.suppress(JobWorkerError):
        processes = job.spec.processes()
        lives = isinstance(processes, Cgroup) and processes.populated()
        if job.events.ending is not None and not lives:
            return StillRunningError(
                f"job {job.id} has ended, but its files are still being written or deleted; its status tells when that "
                f"is done"
            )
    return StillRunningError(
        f"job {job.id} was killed but has not ended within {STOP_SECONDS:.0f} s (a process that waits for a disk or a "
        f"network file system cannot die before that answers); its status tells when it has ended"
    )


class TaskSet:
    """Background tasks. The event loop keeps only weak references, so this set keeps them alive."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def cancel(self) -> None:
        """Cancel all of them, and return when they have ended."""
        for task in list(self._tasks):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


class Worker:
    r"""Jobs on this machine: start, stop, status, stream and remove, with everything in one state folder.

    Use it in an event loop, as an asynchronous context manager. It needs no gRPC, no TLS and no third-party package.
    It does not check who may do what: that is its caller's task. Every error is a JobWorkerError.

    >>> import asyncio, pathlib, tempfile
    >>> async def example(state: str) -> None:
    ...     options = WorkerOptions(state=pathlib.Path(state), without=frozenset({"auto"}))
    ...     async with Worker(options) as worker:
    ...         job = await worker.start(JobRequest("sh", ("-c", "echo hello; exit 3"), owner="alice"))
    ...         async for chunk in worker.stream(job):
    ...             print(chunk)
    ...         status = worker.status(job)
    ...         print(status.status, status.exit_code)
    ...         await worker.stop(job, by="alice")  # an ended job does not change
    ...         worker.remove(job)
    >>> with tempfile.TemporaryDirectory() as state:
    ...     asyncio.run(example(state))
    b'hello\n'
    FINISHED 3
    """

    def __init__(self, options: WorkerOptions) -> None:
        self.options = options = dataclasses.replace(options, state=options.state.resolve())
        self._confines = False  # whether this machine confines jobs
        self._hidden: tuple[str, ...] = ()
        self._tmp_points = tmp_points(str(options.state))
        self._table: dict[str, Job] = {}  # in the order of their starts
        self._running: dict[str, set[Job]] = {}  # of each owner
        self._refused: set[str] = set()  # owners who used most of the disk when it was nearly full
        self._begun = Bell()  # rings when a job begins to run
        self._resources = contextlib.AsyncExitStack()
        self._tree = CgroupTree(None, frozenset(), ())
        self._inotify = Inotify(self._check_all)
        self._pace = Pace()
        self._launcher = Launcher()
        self._accounts = Accounts(options.state)
        self._retention = Retention(options.keep, options.keep_bytes)
        self._tasks = TaskSet()
        self._start_slots = asyncio.Semaphore(START_SLOTS)  # held until the shim has the request
        self._finish_slots = asyncio.Semaphore(FINISH_SLOTS)  # held until the job is finished, which may take long
        self._search_turn = asyncio.Lock()  # held for the read of one block, see `tail_offset`
        self._kill_turn = Turn()  # of the searches of /proc, see `_search`

    # -- Opening and closing

    async def __aenter__(self) -> Self:
        """Take the state folder and read its jobs back. A start after a crash is the same as any other start."""
        check_kernel()
        check_words(self.options.through)
        check_words(self.options.through_end, WORD_FIELDS[:-1])
        if self.options.accounts == "system" and os.geteuid() != 0:
            raise JobWorkerError("only root can run jobs as the accounts of their owners (`serve --accounts system`)")
        async with contextlib.AsyncExitStack() as resources:
            make_state_folder(self.options.state)
            resources.callback(os.close, lock_state_folder(self.options.state))
            tree = make_tree(self.options.cgroup, state_name(self.options.state), self.options.without)
            self._tree = dataclasses.replace(tree, owner=self.options.owner)
            resources.callback(self._tree.remove_unused)
            self._prepare_confinement()
            self._accounts.open()
            self._inotify.open()
            resources.callback(self._inotify.close)
            self._launcher.open(self._tree.shims)
            resources.callback(self._launcher.close)
            resources.push_async_callback(self._tasks.cancel)
            self._recover()
            self._tasks.spawn(self._retain())
            self._tasks.spawn(self._watch_disk())
            self._resources = resources.pop_all()
        return self

    def _prepare_confinement(self) -> None:
        """Try the confinement of jobs once. Raises JobWorkerError if the machine cannot give it and it is needed."""
        if os.geteuid() != 0 or "confine" in self.options.without or self.options.through:
            return
        state = str(self.options.state)
        self._hidden = make_views(state, [*self.options.hidden, *shared_folders()])
        failure = confinement_failure(state, self._hidden)
        if failure and "auto" not in self.options.without:
            raise JobWorkerError(
                f"this machine cannot confine jobs: {failure}; use `--without confine` to serve without it, or "
                f"`--without auto`"
            )
        self._confines = not failure

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.begin_shutdown()
        await self._resources.aclose()

    def begin_shutdown(self) -> None:
        """End every stream and every wait with UnavailableError. The jobs go on, except those whose input is cut."""
        self._inotify.close()
        for job in self._table.values():
            if job.feed is not None:
                job.feed.cut()
                job.feed.close()
            self._cancel_kill_timer(job)
            job.ring()

    @property
    def confines(self) -> bool:
        """Whether jobs are confined; one with `run_as` only if its request says so."""
        return self._confines

    @property
    def running(self) -> int:
        """How many jobs have not ended."""
        return len(self._table) - len(self._retention)

    @property
    def feeds(self) -> int:
        """How many jobs have input whose end was not said. A server that stops cuts it."""
        return sum(job.takes_input for job in self._table.values())

    def notes(self) -> tuple[str, ...]:
        """What this machine, or a server without root, cannot give to a job; one sentence each."""
        separate = os.geteuid() == 0
        return job_notes(
            self._tree.root is not None, self._tree.controllers, separate=separate, confined=self._confines,
            through=self.options.through,
        )  # fmt: skip

    # -- Start: a crash after any of these steps leaves a job that recovery understands

    async def start(self, request: JobRequest) -> Job:
        """Start a command, and return its job when the command runs.

        `request.id` may be a random UUID4 of the caller's. A second start with the same id returns the same job, so a
        caller that lost the answer can ask again. Raises BadRequestError for a command that cannot be run,
        IdTakenError, ExhaustedError, UnavailableError.
        """
        check_request(request)
        for _ in range(2):
            async with self._start_slots:
                job = self._same_job(request) or self._begin(self._make_spec(request))
                await self._until(job, lambda: job.events.phase != "" or not self._in_table(job))  # noqa: B023
            if await self._command_runs(job, request):
                return job
        raise UnavailableError("the launcher died before it could start the job; try again")

    async def _command_runs(self, job: Job, request: JobRequest) -> bool:
        """Wait until a job's command runs. False: the launcher died before a shim had the request, so that the request
        can be sent again.
        """
        await self._until(job, lambda: job.events.phase not in ("", "born") or not self._in_table(job))
        if job.events.failure:
            await self._until(job, lambda: not self._in_table(job))  # then its folder is deleted
            raise start_failure(job.events.failure, dataclasses.replace(job.spec, env=request.env))
        return job.events.phase != ""

    def _same_job(self, request: JobRequest) -> Job | None:
        """The job that an earlier start with the same id made."""
        job = self._table.get(request.id)
        if job is None:
            return None
        spec = job.spec
        if spec.owner == request.owner and not spec.digest:  # of an earlier version
            spec = job.folder.read_spec() or spec
        if not is_same_request(request, spec):
            raise IdTakenError(f"the job id {request.id} is taken by another owner or request")
        return job

    def _make_spec(self, request: JobRequest) -> Spec:
        """The whole spec: the request, the defaults and caps, the account and the cgroup's path."""
        options = self.options
        self._check_places(request)
        reserve = checked_reserve(options.state, options.reserve, refused=request.owner in self._refused)
        account = self._account(request)
        confine = self._confines and (request.confine or not request.run_as)
        if request.confine and not confine:
            raise BadRequestError("this server does not confine jobs; start the job without `--confine`")
        job_id = request.id or new_job_id()
        spec = Spec(
            id=job_id, owner=request.owner, command=request.command, args=request.args,
            uid=account.uid, gid=account.gid, groups=account.groups, user=account.name, home=account.home,
            cgroup=self._tree.job_path(account.uid, job_id), controllers=tuple(sorted(self._tree.controllers)),
            limits=limits_of(request, options),
            timeout=options.timeout if request.timeout is None else request.timeout,
            max_output=int(capped("max-output", request.max_output, options.max_output, options.max_output)),
            reserve=reserve, splice=splice_is_reported(str(options.state)), created=time.time(),
            env=request.env, cwd=request.cwd, name=request.name, split=request.split,
            confine=confine, hidden=self._hidden if confine else (), input=request.input,
            digest=digest_of(request.args, request.env),
        )  # fmt: skip
        if not options.through:
            return spec
        through, through_end = (fill_words(words, spec) for words in (options.through, options.through_end))
        return dataclasses.replace(spec, through=through, through_end=through_end, grace=options.grace)

    def _check_places(self, request: JobRequest) -> None:
        """Raise ExhaustedError if this owner, or all owners, have as many jobs as they may. Some are for admins."""
        own = len(self._running.get(request.owner, ()))
        if self.running >= self.options.max_jobs + (ADMIN_JOBS if request.admin else 0):
            raise ExhaustedError(f"{self.running} jobs are running, and `serve --max-jobs` allows no more")
        if 0 < self.options.owner.jobs <= own and not request.admin:
            raise ExhaustedError(
                f"{own} jobs of {request.owner!r} are running, and `serve --owner-jobs` allows no more"
            )
        if request.input:
            feeds = sum(job.takes_input for job in self._running.get(request.owner, ()))
            if feeds >= OWNER_INPUTS:
                raise ExhaustedError(
                    f"{feeds} jobs of {request.owner!r} wait for input, and {OWNER_INPUTS} is the limit; end the input "
                    f"of one of them first"
                )

    def _count_running(self, job: Job) -> None:
        self._running.setdefault(job.owner, set()).add(job)
        self._begun.ring()

    def _uncount_running(self, job: Job) -> None:
        jobs = self._running.get(job.owner, set())
        jobs.discard(job)
        if not jobs:
            self._running.pop(job.owner, None)

    def _account(self, request: JobRequest) -> Account:
        if os.geteuid() == 0:
            if request.run_as:
                return Account.named(request.run_as)
            system = self.options.accounts == "system"
            return Account.of_person(request.owner) if system else self._accounts.of(request.owner)
        own = Account.of_server()
        if request.run_as not in ("", own.name):
            raise BadRequestError(f"this server runs as {own.name}, and only root can run a job as {request.run_as!r}")
        return own

    def _begin(self, spec: Spec) -> Job:
        """Make the job's folder and cgroup, and send the request to the launcher. A failure removes all of it."""
        if not self._inotify.is_open:
            raise UnavailableError(
                "the server is stopping and starts no more jobs (in a program: the Worker is closing, or `async with` "
                "is missing)"
            )
        job = Job(self._jobs_folder, spec.id, spec)
        with contextlib.ExitStack() as undo:
            job.folder.create()
            undo.callback(self._delete, job)
            self._table[job.id] = job
            self._count_running(job)
            with contextlib.ExitStack() as handed_over:
                descriptors = job.folder.create_files(handed_over, split=spec.split)
                if spec.confine:
                    job.folder.create_tmp(self._tmp_points)
                text = spec.to_json()
                job.folder.write_spec(text)
                if spec.input:
                    job.feed = Feed(job.id, job.folder)
                    descriptors.append(job.feed.open(handed_over))
                self._watch(job)
                descriptors += self._make_cgroup(spec, handed_over)
                self._launcher.send("start", job.folder, text, descriptors)
            short = len(text) <= SPEC_HEAD_BYTES
            # None: the command itself is that long.
            job.keep_spec((None if short else Spec.from_head(text)) or spec.without_env())
            undo.pop_all()
        return job

    def _make_cgroup(self, spec: Spec, handed_over: contextlib.ExitStack) -> list[int]:
        if not spec.cgroup:
            return []
        cgroup = self._tree.make_job(spec.cgroup, ENGINE_CLIENT_LIMITS if spec.through else spec.limits, spec.gid)
        descriptor = cgroup.open()
        handed_over.callback(os.close, descriptor)
        return [descriptor]

    # -- Status, stop, stream, remove

    def job(self, job_id: str) -> Job:
        """The job with this id. Raises NoSuchJobError."""
        try:
            return self._table[job_id]
        except KeyError:
            raise NoSuchJobError(job_id) from None

    def jobs(self) -> list[Job]:
        """All jobs of the table, oldest first."""
        return list(self._table.values())

    def status(self, job: Job) -> JobStatus:
        """All that is known of a job. Raises NoSuchJobError if it was deleted meanwhile."""
        spec, events = job.spec, job.events
        ending = events.ending if job.ended else None
        processes = None if ending else spec.processes()
        return JobStatus(
            status=ending.status if ending else "RUNNING",
            spec=spec,
            ending=ending,
            usage=processes.usage() if processes else events.usage,
            started=events.seconds("started"),
            ended=events.seconds("exited") if ending else 0.0,
            output_bytes=job.folder.output_bytes(),
            input_bytes=job.input_bytes,
            memory_current=processes.memory_current() if processes else 0,
            notes=job_notes(
                spec.cgroup != "",
                spec.controllers,
                separate=spec.uid not in (0, os.geteuid()),
                confined=spec.confine,
                through=spec.through,
            ),
            error_bytes=job.folder.output_bytes(OUTPUTS[1]) if spec.split else 0,
        )

    async def wait(self, job: Job) -> None:
        """Return when a job has ended, or was deleted."""
        await self._until(job, lambda: job.ended or not self._in_table(job))

    def signal(self, job: Job, number: int) -> None:
        """Send a signal to the main process of a job. Nothing happens if the job has ended."""
        if not job.ended:
            job.folder.send_request(SignalRequest(number))

    async def send_input(self, job: Job, chunks: AsyncIterable[Content]) -> int:
        """Pass on a job's standard input, and at the end of `chunks` its end. Returns how many bytes the job was given.

        The next chunk is asked for when the job's pipe has taken all of this one, so nothing is stored. It returns
        early if the job ends, or closes its standard input. Input that is cut, because `chunks` raises or because this
        task is cancelled, stops the job with the reason INPUT_CUT. Raises InputError, InputCutError if it was cut
        before, UnavailableError.
        """
        await self._until(job, lambda: not self._in_table(job) or job.events.phase not in ("", "born"))
        if not job.spec.input:
            raise InputError(f"job {job.id} was started without input: start it with `run -i` or `start --input`")
        if job.events.ending is not None and job.events.ending.reason == "INPUT_CUT":
            raise InputCutError(f"job {job.id} is stopped, because its input was cut before")
        if job.ended:
            return job.input_bytes
        if job.feed is None:
            raise InputError(f"the input of job {job.id} has ended")
        await job.feed.send(chunks)
        await self._until(job, lambda: job.events.input_bytes is not None or job.ended or not self._in_table(job))
        return job.input_bytes

    async def stop(self, job: Job, by: str = "", signal_number: int = 0, grace: float = 0.0, reason: str = "") -> None:
        """End the whole job, and return when it is dead. An ended job does not change.

        Without a signal the job is killed at once. With one, every process of the job gets it first, and the job's shim
        kills what still lives after `grace` seconds. Raises StillRunningError if the job does not die.
        """
        if job.ended:
            return
        before = job.killer
        if not job.folder.send_request(StopRequest(reason, by, signal_number, grace)):
            self._update(job, alive=False)
        if job.kill_timer is not None and job.spec.through:  # the end of its timeout does not shorten its grace
            self._set_kill_timer(
                job, max(job.kill_timer.when(), asyncio.get_running_loop().time() + shim_seconds(job, grace))
            )
        if await self._ends_within(job, shim_seconds(job, grace if signal_number else 0)):
            return
        if job.killer is before:  # else another stop, or the timeout, has begun a kill meanwhile
            self._kill_without_shim(job)
        if not await self._ends_within(job, STOP_SECONDS):
            raise still_running(job)

    async def _ends_within(self, job: Job, seconds: float) -> bool:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.wait(job), seconds)
            return True
        return False

    def _kill_without_shim(self, job: Job) -> None:
        """Begin to kill the processes of a job whose shim does not, unless that is under way. A shim that has recorded
        the end of the main process works: it may delete a large /tmp, or wait for a slow disk.
        """
        if job.events.ending is None and (job.killer is None or job.killer.done()):
            job.killer = self._tasks.spawn(self._kill_and_wake(job))

    async def _kill_and_wake(self, job: Job) -> None:
        """Kill a job. A job of the server's own user can stop the shim, so it is woken, and records the end. This comes
        after the kill: the job could stop it again.
        """
        with contextlib.suppress(JobWorkerError, OSError):  # the job has ended meanwhile, or no descriptor is free
            processes = job.spec.processes()
            if isinstance(processes, Cgroup):
                processes.kill()
            else:
                await self._search(job, processes.kill_members())
            await self._search(job, job.folder.wake_shim())

    async def _search(self, job: Job, steps: Iterator[None]) -> None:
        """Carry out the steps of a search of /proc until the main process of the job has ended. One process takes
        0.04 ms: with 8,192 of them, 64 searches at once kept all other callers waiting for 11 s.
        """
        while job.events.ending is None and await self._kill_turn.part(steps):
            pass

    def _await_deadline(self, job: Job) -> None:
        """Have a job killed some seconds after the end of its timeout. A job can block its shim: a process in splice(2)
        holds the pipe's mutex while it waits for a silent socket, and so the shim's own splice waits as long.
        """
        if job.kill_timer is not None or job.ended or not self._inotify.is_open:
            return
        with contextlib.suppress(NoSuchJobError):
            deadline = job.events.deadline
            if job.events.phase == "born" and job.spec.timeout:  # a job can stop its shim before it writes `started`
                deadline = time.monotonic() + job.spec.timeout
            if deadline is not None:
                left = deadline - time.monotonic() + end_seconds(job.spec) + LATE_SECONDS
                self._set_kill_timer(job, asyncio.get_running_loop().time() + left)

    def _set_kill_timer(self, job: Job, when: float) -> None:
        self._cancel_kill_timer(job)
        job.kill_timer = asyncio.get_running_loop().call_at(when, self._kill_overdue, job)

    def _cancel_kill_timer(self, job: Job) -> None:
        if job.kill_timer is not None:
            job.kill_timer.cancel()
            job.kill_timer = None

    def _kill_overdue(self, job: Job) -> None:
        if job.events.ending is None:
            say(f"job {job.id} is still running after its timeout: killing it without its shim")
            self._kill_without_shim(job)

    async def stop_all(self, by: str = "") -> None:
        """Stop every running job at once, and those that are started meanwhile."""
        while running := [job for job in self._table.values() if not job.ended]:
            await asyncio.gather(*(self.stop(job, by) for job in running))

    async def tail_offset(self, job: Job, lines: int, number: int = 1) -> int:
        """The offset at which the last `lines` lines of an output begin. It reads the output backwards, in blocks.

        `number` is 1 for standard output, and 2 for standard error if both are kept apart. All searches together read
        one block in a turn of the event loop: when each read one, 500 searches kept other calls waiting for 16 s.
        """
        name = OUTPUTS[number - 1]
        end = job.folder.output_bytes(name)
        if lines == 0:
            return end
        search = LineSearch(lines)
        while end > 0:
            begin = max(0, end - READ_BYTES)
            async with self._search_turn:
                await asyncio.sleep(0)
                found = search.find(job.folder.read_output(name, begin, end - begin))
            if found is not None:
                return begin + found
            end = begin
        return 0

    async def stop_holders_of(self, port: int) -> list[str]:
        """Stop every running job that holds this TCP port. Returns their ids."""
        running = [job for jobs in self._running.values() for job in jobs]
        held = [job for job in running if any(process_has_port(each, port) for each in job.spec.processes().members())]
        await asyncio.gather(*(self.stop(job, by="serve") for job in held))
        return [job.id for job in held]

    async def stream(
        self, job: Job, offset: int = 0, size: int = READ_BYTES, *, follow: bool = True
    ) -> AsyncGenerator[bytes, None]:
        """The job's output from byte `offset` on, at most `size` bytes at a time. It ends when the job has ended and
        every byte was given, or, without `follow`, at the present end of the output.

        Of a job that keeps both outputs apart it is standard output; `stream_split` gives both.
        """
        async with contextlib.aclosing(self._follow(job, [offset], size, follow=follow)) as pieces:
            async for _, chunk in pieces:
                yield chunk

    def stream_split(
        self, job: Job, offset: int = 0, error_offset: int = 0, size: int = READ_BYTES, *, follow: bool = True
    ) -> AsyncGenerator[tuple[int, bytes], None]:
        """Both outputs of a job as pairs of a number and bytes, each output in its own order and from its own offset.

        The number is 1 for standard output and 2 for standard error. If the job does not keep them apart, it is 1 for
        both. It ends as `stream` does.
        """
        return self._follow(job, [offset, error_offset], size, follow=follow)

    async def _follow(
        self, job: Job, offsets: list[int], size: int, *, follow: bool
    ) -> AsyncGenerator[tuple[int, bytes], None]:
        """The bytes of a job's outputs from these offsets on. The outputs take turns, so that none waits for the end of
        the other.
        """
        tail = job.tail = job.tail or Tail(job.folder.outputs(), self._inotify, self._pace)
        delay = tail.acquire()
        try:
            del offsets[len(tail.paths) :]
            while True:
                # It is looked at before the reads: if it is true, they return every byte.
                complete = not follow or job.ended or not self._in_table(job)
                arm_count = tail.arm_count
                most = 0
                for number, offset in enumerate(offsets, 1):
                    if chunk := tail.read(number - 1, offset, size):
                        offsets[number - 1] += len(chunk)
                        most = max(most, len(chunk))
                        yield number, chunk
                if complete and not most:
                    return
                if complete or most == size:
                    continue
                if not self._inotify.is_open:
                    raise UnavailableError("the server is stopping; the job goes on")
                if not tail.arm() and tail.arm_count == arm_count:
                    await tail.changed()
                    if delay and self._inotify.is_open:
                        await asyncio.sleep(delay)
        finally:
            if tail.release() == 0:
                job.tail = None

    def remove(self, job: Job) -> None:
        """Delete an ended job and its output. Raises StillRunningError."""
        if not job.ended:
            raise StillRunningError(f"job {job.id} is running; stop it first")
        self._delete(job)

    # -- Events from the kernel: `events` changed, or a shim is gone

    @property
    def _jobs_folder(self) -> str:
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
            # A close comes after the shim's last write, even if the kernel closes its other descriptors later.
            self._update(job, alive=not mask & IN_CLOSE_WRITE)

        job.watch = self._inotify.watch(f"{job.folder.path}/events", IN_MODIFY | IN_CLOSE_WRITE, changed)

    def _unwatch(self, job: Job) -> None:
        self._cancel_kill_timer(job)
        if job.watch is not None:
            self._inotify.unwatch(job.watch)
            job.watch = None

    def _check_all(self) -> None:
        """Check every running job and wake every follower: the kernel dropped events (IN_Q_OVERFLOW)."""
        for job in [job for job in self._table.values() if not job.ended]:
            self._update(job, alive=job.folder.shim_lives())
        for job in self._table.values():
            job.ring()

    def _update(self, job: Job, *, alive: bool) -> None:
        """Read a job's events again, and do what they ask for. `alive`: whether its shim lives."""
        job.refresh(closed=not alive)
        self._await_deadline(job)
        self._settle(job, alive=alive)

    def _settle(self, job: Job, *, alive: bool) -> None:
        """Do what a job's phase asks for. `alive`: whether its shim lives."""
        phase = job.events.phase
        if phase == "done":
            self._retire(job)
        elif alive:
            return
        elif phase in ("", "failed"):  # the command never ran
            self._delete(job)
        elif job.folder.read_head() is None:
            quarantine(job.folder.path, self.options.state)
            self._remove_from_table(job)
        else:
            self._finish(job)

    def _retire(self, job: Job) -> None:
        """Turn a running job into an ended one."""
        self._unwatch(job)
        self._uncount_running(job)
        job.close_feed()
        job.keep_spec(None)
        self._retention.add(job)
        job.ring()

    def _finish(self, job: Job) -> None:
        """Start a finisher for a job whose shim was lost: a shim that kills what is left and records the end."""
        if job.finisher_waits:
            return
        job.finishers += 1
        if job.finishers > 3:
            say(f"job {job.id} cannot be finished; {job.folder.path}/events says why")
            return
        if job.events.ending is None:
            say(f"the shim of job {job.id} is gone and has not recorded an end: killing what is left of the job")
        job.finisher_waits = True
        self._tasks.spawn(self._run_finisher(job, job.finishers))

    async def _run_finisher(self, job: Job, number: int) -> None:
        """Wait for a slot, send the request, and hold the slot until the job is finished: a power cut can lose hundreds
        of shims at once, and the launcher takes only FINISH_SLOTS requests.
        """
        async with self._finish_slots:
            try:
                with contextlib.ExitStack() as handed_over:
                    descriptors = job.folder.open_for_shim(handed_over)
                    self._launcher.send("finish", job.folder, job.spec.to_json(), descriptors)
                    job.finisher_waits = False  # from here on `control` has a reader
                await self._until(job, lambda: job.ended or job.finishers != number or not self._in_table(job))
            except (JobWorkerError, OSError) as error:
                job.finisher_waits = False
                if self._inotify.is_open:
                    say(f"job {job.id} is not finished yet: {error}")
                    job.finishers -= 1  # no finisher had the request
                    asyncio.get_running_loop().call_later(LONGEST_RETRY_SECONDS, self._finish_again, job)

    def _finish_again(self, job: Job) -> None:
        if self._inotify.is_open and self._in_table(job) and not job.ended:
            self._settle(job, alive=False)

    def _remove_from_table(self, job: Job) -> None:
        """Remove a job from the table, and wake every task that waits for it."""
        self._unwatch(job)
        job.close_feed()
        if self._in_table(job):
            del self._table[job.id]
        self._uncount_running(job)
        self._retention.discard(job)
        job.ring()

    def _delete(self, job: Job) -> None:
        """Delete a job: its cgroup, its folder, its row in the table. No other function deletes a job."""
        try:
            self._delete_files(job)
        except (JobWorkerError, OSError) as error:
            say(f"job {job.id} is not wholly removed: {error}")
            self._delete_later(job, error)
        self._remove_from_table(job)

    def _delete_files(self, job: Job) -> None:
        spec = job.folder.read_head()
        if spec is not None:
            spec.processes().remove()
        job.folder.delete()

    def _delete_later(self, job: Job, error: BaseException) -> None:
        """Try again in a while if descriptors or memory ran out. Any other error stays until the next start."""
        if self._inotify.is_open and errno_of(error) in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            asyncio.get_running_loop().call_later(LONGEST_RETRY_SECONDS, self._delete_again, job)

    def _delete_again(self, job: Job) -> None:
        try:
            self._delete_files(job)  # no new job has this id while the folder exists
        except (JobWorkerError, OSError) as error:
            self._delete_later(job, error)

    # -- Recovery and retention

    def _recover(self) -> None:
        """Read every job folder: take over running jobs, keep ended ones, delete those that never ran."""
        ended = []
        for name in os.listdir(self._jobs_folder):
            job = Job(self._jobs_folder, name)
            if JOB_ID.fullmatch(name) is None or not os.path.isdir(job.folder.path):
                quarantine(job.folder.path, self.options.state)
                continue
            self._table[name] = job
            job.events = job.folder.read_events()
            if job.ended:
                ended.append(job)
            else:
                self._take_over(job)
        for job in sorted(ended, key=lambda job: job.events.seconds("done")):
            self._retire(job)
        self._table = {job.id: job for job in sorted(self._table.values(), key=lambda job: job.events.seconds("born"))}

    def _take_over(self, job: Job) -> None:
        """Watch a job of an earlier server, then read its events: a line that is written in between causes an event."""
        if job.folder.has_events():
            self._watch(job)
        alive = job.folder.shim_lives()
        spec = job.folder.read_head()
        job.keep_spec(spec)
        if spec is not None:
            self._count_running(job)
        self._update(job, alive=alive)
        if alive and spec is not None and spec.input and not job.ended and job.events.input_bytes is None:
            job.folder.send_request(StopRequest("INPUT_CUT"))  # only the earlier server had the pipe

    async def _retain(self) -> None:
        """Delete ended jobs after their time, or when their files exceed the bound. Other tasks run in between."""
        while True:
            left = self._retention.seconds_left()
            if left == 0.0:
                self._delete(self._retention.oldest())
                await asyncio.sleep(0)
                continue
            # Until Python 3.12 asyncio.wait_for may lose a cancellation, so a timer rings the bell.
            ring = self._retention.bell.ring
            timer = None if left is None else asyncio.get_running_loop().call_later(left, ring)
            try:
                await self._retention.bell.wait()
            finally:
                if timer is not None:
                    timer.cancel()

    # -- The disk

    async def _watch_disk(self) -> None:
        """While jobs run, look at the disk once a second. Below the reserve, end the jobs of its main user."""
        while True:
            if not self._running:
                await self._begun.wait()
            await asyncio.sleep(DISK_SECONDS)
            try:
                disk = os.statvfs(self.options.state)
                if is_short(disk, self.options.reserve):
                    await self._free_disk(disk)
                else:
                    self._refused.clear()
            except (JobWorkerError, OSError) as error:
                say(f"cannot read the free space of {self.options.state}: {error}")

    async def _free_disk(self, disk: os.statvfs_result) -> None:
        """Refuse the main user of the disk, and end its jobs. Others' jobs end only if it has none and half of the
        reserve is used.
        """
        used = await self._disk_use(files=is_short_of_files(disk, self.options.reserve))
        if not used:
            return
        owner, among = max(used, key=lambda name: used[name]), ""
        if owner not in self._refused and not self._running.get(owner):
            say(f"the disk is nearly full. {owner!r} uses most of it, has no running job, and can start none now")
        self._refused.add(owner)
        if not self._running.get(owner) and is_short(disk, self.options.reserve / 2):
            running = [name for name in used if self._running.get(name)]
            owner, among = max(running, key=lambda name: used[name], default=owner), " among the owners of running jobs"
        jobs = list(self._running.get(owner, ()))
        if jobs:
            count = count_of(len(jobs), "job", "jobs")
            say(f"the disk is nearly full. {owner!r} uses most of it{among}: ending {count}")
        await asyncio.gather(*(self.stop(job, reason="DISK_FULL") for job in jobs), return_exceptions=True)

    async def _disk_use(self, *, files: bool) -> dict[str, float]:
        """What each owner has on the disk, in bytes or in files: their homes, and all folders of their jobs."""
        used: dict[str, float] = {}
        folders = list(self._accounts.homes().items())
        folders += [(job.owner, job.folder.path) for job in self._table.values()]
        for owner, folder in folders:
            used[owner] = used.get(owner, 0) + await measured(folder, files=files)
        return used


# --- 13. Certificates ----------------------------------------------------------------------------------
# Owns the making of authorities, server certificates and identities, the reading of a server's folder, and the rules
# for what such a folder holds. Authorities are valid for ten years and leaves for one. All are backdated by a day,
# since clocks differ. Source: RFC 5280.

DAY = 86400
AUTHORITY_DAYS, LEAF_DAYS = 3650, 365
WARN_DAYS = 30  # before its end a certificate is renewed, or the server and the client warn
CRL_FILE = "client-crl.pem"  # the certificate revocation list (RFC 5280, 5): the clients that the server refuses
ISSUED_FILE = "issued.pem"  # every certificate that `identity` made, so that a renewed one can still be revoked
ROLES_OID = "1.2.840.10070.8.1"
WEAK_DIGESTS = ("md5", "sha1")
SERVED_FILES = ("server.pem", "server.key", "client-ca.pem")  # a server needs these
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


def encode_roles(roles: Iterable[str]) -> bytes:
    """The value of the roles extension: a DER UTF8String, comma-separated (X.690, 8.21)."""
    text = ",".join(roles).encode()
    return bytes([0x0C, len(text)]) + text


def decode_roles(value: bytes) -> frozenset[str]:
    """The roles in an extension's value. It is empty if anything in the value is malformed or unknown."""
    if len(value) < 3 or value[0] != 0x0C or value[1] != len(value) - 2 or value[1] > 127:
        return frozenset()
    roles = frozenset(value[2:].decode("utf-8", "replace").split(","))
    return roles if roles <= set(ROLES) else frozenset()


@dataclasses.dataclass(frozen=True)
class CertifiedKey:
    """A private key and the certificate for it."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def certificate_pem(self) -> bytes:
        return to_pem(self.certificate)

    def key_pem(self) -> bytes:
        form = serialization.PrivateFormat.PKCS8
        return self.key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def to_pem(*certificates: x509.Certificate) -> bytes:
    return b"".join(each.public_bytes(serialization.Encoding.PEM) for each in certificates)


def extension(certificate: x509.Certificate | x509.CertificateRevocationList, kind: type[Any]) -> Any:
    """The value of a certificate's extension, or None."""
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def issue(
    name: str,
    days: float,
    issuer: CertifiedKey | None,
    extensions: Sequence[tuple[x509.ExtensionType, bool]],
    key: ec.EllipticCurvePrivateKey | None = None,
) -> CertifiedKey:
    """A certificate for a key, which is a new P-256 key by default. The issuer signs it; without an issuer it signs
    itself. It is valid no longer than its issuer.
    """
    key = key or ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.timezone.utc)
    until = now + datetime.timedelta(days=days)
    signer = issuer.key if issuer else key
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(min(until, issuer.certificate.not_valid_after_utc) if issuer else until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    for value, critical in extensions:
        builder = builder.add_extension(value, critical=critical)
    return CertifiedKey(builder.sign(signer, digest_for(signer)), key)


def digest_for(key: Any) -> hashes.SHA256 | None:
    return None if isinstance(key, (ed25519.Ed25519PrivateKey, ed448.Ed448PrivateKey)) else hashes.SHA256()


def key_usage(*allowed: str) -> x509.KeyUsage:
    names = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
             "key_cert_sign", "crl_sign", "encipher_only", "decipher_only")  # fmt: skip
    return x509.KeyUsage(**{name: name in allowed for name in names})


def issue_authority(name: str) -> CertifiedKey:
    basics = [(x509.BasicConstraints(ca=True, path_length=None), True), (key_usage("key_cert_sign", "crl_sign"), True)]
    return issue(name, AUTHORITY_DAYS, None, basics)


def leaf_extensions(purpose: x509.ObjectIdentifier) -> list[tuple[x509.ExtensionType, bool]]:
    return [
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (key_usage("digital_signature"), True),
        (x509.ExtendedKeyUsage([purpose]), False),
    ]


def issue_server_certificate(authority: CertifiedKey, names: Sequence[str], key: Any = None) -> CertifiedKey:
    """A certificate for a server that has these host names and addresses, for its key or a new one."""
    alternatives = x509.SubjectAlternativeName([general_name(name) for name in names])
    basics = leaf_extensions(x509.oid.ExtendedKeyUsageOID.SERVER_AUTH)
    return issue("jobworker server", LEAF_DAYS, authority, [*basics, (alternatives, False)], key)


def issue_identity(authority: CertifiedKey, name: str, roles: Sequence[str], days: float = LEAF_DAYS) -> CertifiedKey:
    """A certificate for a client. Its common name is the owner of the client's jobs. Raises UsageError."""
    if CONTROL.search(name):
        raise UsageError(f"{name!r} has a control character, which no name of an identity may have")
    roles_extension = x509.UnrecognizedExtension(x509.ObjectIdentifier(ROLES_OID), encode_roles(roles))
    basics = leaf_extensions(x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH)
    return issue(name, days, authority, [*basics, (roles_extension, False)])


def general_name(name: str) -> x509.GeneralName:
    """A host name or an address as a certificate holds it. Raises UsageError."""
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    with contextlib.suppress(UnicodeError):
        ascii_name = name.encode("idna").decode("ascii")
        if re.fullmatch(r"[\w*.-]+", ascii_name, re.ASCII):
            return x509.DNSName(ascii_name)
    raise UsageError(f"{name!r} is neither a host's name nor an address")


def machine_names() -> list[str]:
    """The host names and addresses of this machine (proc(5)). A name that no certificate can hold is left out."""
    host = socket.gethostname()
    four = re.findall(r"(\d+\.\d+\.\d+\.\d+)\n\s+/32 host LOCAL", kernel_read("/proc/net/fib_trie"))
    six = [line.split() for line in kernel_read("/proc/net/if_inet6").splitlines()]
    routed = [str(ipaddress.IPv6Address(int(words[0], 16))) for words in six if words[3] in ("00", "10")]
    full = host
    with contextlib.suppress(UnicodeError):  # a host name that no name server can be asked for
        full = socket.getfqdn(host)
    names = ["localhost", host, full, "127.0.0.1", "::1", *four, *routed]
    return list(dict.fromkeys(name for name in names if name and len(name) < 64 and is_general_name(name)))


def is_general_name(name: str) -> bool:
    try:
        general_name(name)
    except UsageError:  # for example `(none)`, the name of a machine that was given none
        return False
    return True


def prepare_folder(folder: pathlib.Path, names: Sequence[str]) -> str:
    """Fill an empty folder with what a server needs, or replace server.pem by one that has these names too.

    Returns a sentence that says what was made, or nothing. Raises JobWorkerError, and changes nothing, if the folder
    is incomplete or unreadable.
    """
    try:
        present = set(os.listdir(folder)) & set(MADE_FILES) if folder.exists() else set()
        missing = [name for name in SERVED_FILES if name not in present]
        if not present:
            fill_folder(folder, [*machine_names(), *names])
            return f"made two authorities, a server certificate and the identities `user` and `admin` in {folder}"
        if missing:
            raise JobWorkerError(
                f"the certificate folder {folder} is incomplete: it lacks {' and '.join(missing)}; add them or name "
                f"an empty folder"
            )
        return (add_names(folder, names) if names else "") or renew_server_certificate(folder)
    except OSError as error:
        raise JobWorkerError(
            f"cannot use the certificate folder {folder}: {error.filename or ''} {error.strerror}"
        ) from error


def fill_folder(folder: pathlib.Path, names: Sequence[str]) -> None:
    """Make both authorities and what they issue in a new folder, and rename it, so that it appears complete."""
    server_authority, client_authority = (
        issue_authority("jobworker server authority"),
        issue_authority("jobworker client authority"),
    )
    made = {"server-ca": server_authority, "client-ca": client_authority}
    made["server"] = issue_server_certificate(server_authority, list(dict.fromkeys(names)))
    made |= {role: issue_identity(client_authority, role, [role]) for role in ("user", "admin")}
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.with_name(f".{folder.name}-{os.getpid()}")
    new.mkdir(mode=0o755)
    try:
        for name, pair in made.items():
            write_pair(new, name, pair)
        if folder.is_symlink() or os.path.ismount(folder) or (folder.exists() and os.listdir(folder)):
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
    """Write NAME.key and NAME.pem, each by an atomic rename. Only its owner can read the key."""
    write_files(
        [(folder / f"{name}.key", pair.key_pem(), 0o600), (folder / f"{name}.pem", pair.certificate_pem(), 0o644)]
    )


def write_file(path: pathlib.Path, content: bytes, mode: int) -> None:
    """Replace a file by an atomic rename. Raises JobWorkerError."""
    write_files([(path, content, mode)])


def write_files(files: Sequence[tuple[pathlib.Path, bytes, int]]) -> None:
    """Replace files, each by an atomic rename, when all are on the disk. On a full disk none is replaced, and nothing
    is left. Raises JobWorkerError.
    """
    with contextlib.ExitStack() as left:
        made = []
        for path, content, mode in files:
            new = path.with_name(f".{path.name}-{os.getpid()}")
            try:
                descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
                left.callback(new.unlink, missing_ok=True)
                with open(descriptor, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise disk_error(f"cannot write {path}", error) from error
            made.append((new, path))
        for new, path in made:
            os.rename(new, path)


@contextlib.contextmanager
def locked_folder(folder: pathlib.Path) -> Iterator[None]:
    """Hold a folder's lock (flock(2)): two commands at the same time would lose one entry of its lists."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise JobWorkerError(f"cannot use the certificate folder {folder}: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_file(path: pathlib.Path) -> bytes:
    """The contents of a file that a person may have edited, without the byte-order mark that some editors write."""
    try:
        return path.read_bytes().removeprefix(BYTE_ORDER_MARK)
    except OSError as error:
        raise JobWorkerError(f"cannot read {path}: {error.strerror}") from error


def read_key(path: pathlib.Path) -> bytes:
    """The bytes of a file that holds a key. As ssh does, it refuses a file of this user's that others can read."""
    try:
        with path.open("rb") as file:
            facts = os.fstat(file.fileno())
            content = file.read().removeprefix(BYTE_ORDER_MARK)
    except OSError as error:
        raise JobWorkerError(f"cannot read {path}: {error.strerror}") from error
    if facts.st_uid == os.geteuid() and facts.st_mode & 0o077:
        raise ExposedKeyError(f"others can read the key in {path}; `chmod 600 {path}` takes that right from them")
    return content


def damage_errors() -> tuple[type[Exception], ...]:
    """What cryptography raises for a key, a certificate or a revocation list that is damaged or that it cannot read."""
    extensions = x509.DuplicateExtension, x509.UnsupportedGeneralNameType
    return ValueError, TypeError, exceptions.UnsupportedAlgorithm, x509.InvalidVersion, *extensions


def load_key(path: pathlib.Path) -> Any:
    """The private key in a file. Raises JobWorkerError."""
    try:
        return serialization.load_pem_private_key(read_key(path), password=None)
    except damage_errors() as error:
        raise JobWorkerError(f"{path} cannot be read (it is not PEM, or it has a password): {error}") from None


def load_certificates(path: pathlib.Path) -> list[x509.Certificate]:
    """The certificates in a file; at least one. Raises JobWorkerError."""
    return parse_certificates(read_file(path), path)


def parse_certificates(pem: bytes, path: pathlib.Path) -> list[x509.Certificate]:
    """The certificates in PEM that a file has. Raises JobWorkerError.

    cryptography parses some parts of a certificate at their first use. They are used here, so that no later use of a
    damaged certificate raises. Of those after the first one, which are a chain or more authorities, gRPC can use some
    that cryptography cannot read as a whole.
    """
    try:
        found = x509.load_pem_x509_certificates(pem)
        for each in found:
            _ = each.subject, each.issuer, each.not_valid_before_utc, each.not_valid_after_utc
        _ = found[0].public_key(), found[0].signature_hash_algorithm, list(found[0].extensions)
    except damage_errors() as error:
        raise JobWorkerError(
            f"{path} cannot be read: it has no certificate in PEM, or a damaged or unknown kind of one ({error})"
        ) from None
    return found


def is_key_of(key: Any, certificate: x509.Certificate) -> bool:
    with contextlib.suppress(*damage_errors()):
        return bool(key.public_key() == certificate.public_key())
    return False


def load_authority(folder: pathlib.Path, name: str) -> CertifiedKey:
    """An authority of the folder with its key. Raises JobWorkerError if the folder has only its certificate."""
    path = folder / f"{name}.key"
    if not path.exists():
        raise JobWorkerError(f"{path} is missing: only the folder that made the authority can issue with it")
    return CertifiedKey(load_certificates(folder / f"{name}.pem")[0], load_key(path))


def load_authorities(folder: pathlib.Path) -> list[x509.Certificate]:
    """The client authorities of a folder. Raises JobWorkerError."""
    return load_certificates(folder / "client-ca.pem")


def add_names(folder: pathlib.Path, names: Sequence[str]) -> str:
    """Make a new server.pem if the present one lacks some of these names. It keeps the names that it has."""
    present = extension(load_certificates(folder / "server.pem")[0], x509.SubjectAlternativeName)
    has = [str(name.value) for name in present or ()]
    names = [str(general_name(name).value) for name in names]
    if set(names) <= set(has):
        return ""
    authority = load_authority(folder, "server-ca")
    write_pair(folder, "server", issue_server_certificate(authority, list(dict.fromkeys([*has, *names]))))
    return f"made a new {folder / 'server.pem'} for {', '.join(names)}"


def renew_server_certificate(folder: pathlib.Path) -> str:
    """Make a new server.pem if at most WARN_DAYS are left and the folder can issue one. It keeps the key, so that
    one rename renews it. Returns a sentence that says so, or nothing.
    """
    path = folder / "server.pem"
    try:
        old = load_certificates(path)[0]
        if not ends_soon(old) or not (folder / "server-ca.key").exists():
            return ""
        key = load_key(folder / "server.key")
        authority = load_authority(folder, "server-ca")
    except JobWorkerError:
        return ""  # `read_server_folder` has the sentence for it
    names = [str(name.value) for name in extension(old, x509.SubjectAlternativeName) or ()]
    longer = authority.certificate.not_valid_after_utc > old.not_valid_after_utc
    usable = list(filter(is_general_name, names))
    ours = can_be_served(key) and is_key_of(key, old) and is_issued_by(old, authority.certificate)
    if not (ours and longer and usable):
        return ""
    made = issue_server_certificate(authority, usable, key)
    write_file(path, made.certificate_pem(), 0o644)
    return f"made a new {path}, valid until {day_of(made.certificate)}; the old one was valid until {day_of(old)}"


def bundle_of(folder: pathlib.Path, made: CertifiedKey, host: str, port: int) -> bytes:
    """All that a client needs in one PEM: the server's address as a comment, key, certificate, server authority."""
    authorities = to_pem(*load_certificates(folder / "server-ca.pem"))
    address = f"# jobworker server: {written_address(host, port)}\n".encode()
    return address + made.key_pem() + made.certificate_pem() + authorities


def written_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_named(folder: pathlib.Path, host: str) -> bool:
    """Whether server.pem holds this host name or address, so that a client can verify it."""
    names = extension(load_certificates(folder / "server.pem")[0], x509.SubjectAlternativeName) or ()
    return str(general_name(host).value).lower() in [str(name.value).lower() for name in names]


def ends_soon(certificate: x509.Certificate) -> bool:
    return certificate.not_valid_after_utc.timestamp() - time.time() <= WARN_DAYS * DAY


def day_of(certificate: x509.Certificate) -> str:
    return certificate.not_valid_after_utc.date().isoformat()


def end_warnings(folder: pathlib.Path) -> Iterator[str]:
    """A sentence for each certificate that a server lives by and that ends soon."""
    for name, remedy in (
        ("server.pem", "`serve` renews it if server-ca.key is there and server-ca.pem is valid for longer"),
        ("server-ca.pem", "make a new authority, and give it to every client before that day"),
        ("client-ca.pem", "make a new authority, and a new identity for every client before that day"),
    ):
        try:
            certificates = load_certificates(folder / name) if (folder / name).is_file() else []
        except JobWorkerError as error:
            yield f"warning: {error}"
            continue
        for certificate in filter(ends_soon, certificates):
            yield f"warning: a certificate in {folder / name} is valid until {day_of(certificate)}; {remedy}"


def read_server_folder(folder: pathlib.Path) -> tuple[bytes, bytes, list[x509.Certificate], float]:
    """The server's key and certificates as PEM, the authorities of its clients, and when its certificate ends.

    The PEM is written anew from what was parsed: gRPC refuses text that the parser here accepts, for example a
    byte-order mark before it. Raises JobWorkerError, which names the file, if gRPC cannot serve them.
    """
    pem, key_path = folder / "server.pem", folder / "server.key"
    certificates, key, authorities = load_certificates(pem), load_key(key_path), load_authorities(folder)
    if not can_be_served(key):
        raise JobWorkerError(f"{key_path} is of a kind that gRPC cannot serve; use RSA, P-256 or P-384")
    if not is_key_of(key, certificates[0]):
        raise JobWorkerError(f"{pem} is not the certificate of {key_path}")
    since, until = validity(certificates[:1])
    if not since <= time.time() <= until:
        raise JobWorkerError(f"{pem} is out of date; `serve --name NAME` makes a new one if server-ca.key is there")
    form, encryption = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    key_pem = key.private_bytes(serialization.Encoding.PEM, form, encryption)
    return key_pem, to_pem(*certificates), authorities, until


def read_identity(leaf: x509.Certificate) -> tuple[str, frozenset[str], str]:
    """The name and the roles in a client's certificate, and what is wrong with them."""
    names = [str(name.value) for name in leaf.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)]
    purposes = extension(leaf, x509.ExtendedKeyUsage)
    found = next((each for each in leaf.extensions if each.oid.dotted_string == ROLES_OID), None)
    roles = decode_roles(found.value.value) if found else frozenset()
    fault = ""
    if purposes is None or x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH not in purposes:
        fault = "the client's certificate is not for clients: it lacks the purpose clientAuth"
    elif len(names) != 1 or not names[0]:
        fault = f"the client's certificate has {len(names)} common names and must have one"
    elif CONTROL.search(names[0]):
        fault = f"the client's certificate has a control character in its common name, {printable(names[0])}"
    elif found and found.critical:
        fault = f"the client's certificate marks its extension {ROLES_OID} as critical, which no TLS library accepts"
    elif not roles:
        fault = f"{names[0]!r} has no role here: its certificate's extension {ROLES_OID} names none"
    return (names[0] if names else ""), roles, fault


def pem_blocks(content: bytes, label: bytes) -> list[bytes]:
    """The complete PEM blocks with this label. A block that a crash cut off is left out."""
    return re.findall(b"-----BEGIN %b-----[A-Za-z0-9+/=\\s]+-----END %b-----\n?" % (label, label), content)


def record_issued(folder: pathlib.Path, certificates: Iterable[x509.Certificate]) -> None:
    """Append certificates to the list of those that were made. It begins with a newline: an earlier record may be cut
    off.
    """
    with (folder / ISSUED_FILE).open("ab") as file:
        file.write(b"\n" + to_pem(*certificates))
        file.flush()
        os.fsync(file.fileno())


def certificates_of(folder: pathlib.Path) -> Iterator[x509.Certificate]:
    """Every certificate that the folder has, in the list of those that were made or in a file."""
    for path in [folder / ISSUED_FILE, *sorted(folder.glob("*.pem"))]:
        for block in pem_blocks(path.read_bytes() if path.is_file() else b"", b"CERTIFICATE"):
            with contextlib.suppress(JobWorkerError):
                yield from parse_certificates(block, path)


def issued_certificates(folder: pathlib.Path, authority: x509.Certificate) -> list[x509.Certificate]:
    """Every client's certificate of this authority that the folder has; the oldest first."""
    found = {}
    for certificate in certificates_of(folder):
        if is_issued_by(certificate, authority) and certificate.subject != authority.subject:
            found[certificate.serial_number] = certificate
    return sorted(found.values(), key=lambda certificate: certificate.not_valid_before_utc)


def with_intermediates(
    authorities: Sequence[x509.Certificate], certificates: Iterable[x509.Certificate]
) -> list[x509.Certificate]:
    """These authorities, and after them every intermediate authority below them among the certificates."""
    found = list(dict.fromkeys(authorities))
    left = {each for each in certificates if is_authority(each) and not has_weak_digest(each)}.difference(found)
    while more := {each for each in left if any(is_issued_by(each, issuer) for issuer in found)}:
        found += sorted(more, key=lambda each: each.not_valid_before_utc)
        left -= more
    return found


def is_authority(certificate: x509.Certificate) -> bool:
    with contextlib.suppress(*damage_errors()):
        basics = extension(certificate, x509.BasicConstraints)
        return basics is not None and basics.ca
    return False


def is_issued_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Whether the issuer's key signed a certificate. The x509 package verifies no SHA-1 and no MD5. So the name decides
    there, and `weakness` then refuses the chain with a sentence of its own.
    """
    if has_weak_digest(certificate):
        return certificate.issuer == issuer.subject
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, exceptions.InvalidSignature, exceptions.UnsupportedAlgorithm):
        return False
    return True


def has_weak_digest(certificate: x509.Certificate) -> bool:
    with contextlib.suppress(*damage_errors()):
        digest = certificate.signature_hash_algorithm
        return digest is not None and digest.name in WEAK_DIGESTS
    return False


def read_revocation_lists(
    folder: pathlib.Path, authorities: Sequence[x509.Certificate]
) -> list[x509.CertificateRevocationList]:
    """The lists in `client-crl.pem`, one for each issuer; none without that file. Raises JobWorkerError if one cannot
    be relied on. An intermediate authority's list is verified with its certificate, which the folder must have.
    """
    path = folder / CRL_FILE
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise JobWorkerError(f"cannot read {path}: {error.strerror}") from None
    blocks = pem_blocks(content, b"X509 CRL")
    if not blocks:
        raise JobWorkerError(f"{path} cannot be read: it holds no revocation list (X509 CRL) in PEM")
    try:
        lists = [x509.load_pem_x509_crl(block) for block in blocks]
        issuers = with_intermediates(authorities, certificates_of(folder))
        for each in lists:
            if not any(is_list_of(each, issuer) for issuer in issuers):
                raise JobWorkerError(
                    f"a list in {path} is not signed by an authority in client-ca.pem, nor by one below it whose "
                    f"certificate is in {folder}: its issuer is {written_name(each.issuer)}"
                )
            if any(value.critical for value in each.extensions):
                raise JobWorkerError(
                    f"{path} is a partial list (a delta, or of one kind), and the server needs a whole one"
                )
            _ = each.next_update_utc, revocation_days([each])  # what is damaged raises now, and not at a later use
    except damage_errors() as error:
        raise JobWorkerError(f"{path} cannot be read: {error}") from None
    return lists


def is_list_of(revocations: x509.CertificateRevocationList, issuer: x509.Certificate) -> bool:
    """Whether this authority's key signed a revocation list in its name."""
    if revocations.issuer != issuer.subject:
        return False
    with contextlib.suppress(*damage_errors()):  # for example, the signature is not of the key's kind
        return revocations.is_signature_valid(issuer.public_key())  # type: ignore[arg-type]
    return False


Revoked: TypeAlias = "frozenset[tuple[bytes, int]]"  # the issuer's name in DER, and the serial


def renewable_roles(known: Sequence[x509.Certificate], name: str, revoked: Revoked) -> list[str]:
    """The roles of the newest certificate of this name that is not revoked. Raises JobWorkerError."""
    for each in reversed(known):
        subject, roles, _ = read_identity(each)
        if subject == name and mark_of(each) not in revoked:
            return [role for role in ROLES if role in roles]
    raise JobWorkerError(
        f"there is no certificate of {name!r} to renew; `identity {printable(name)}` makes a first one"
    )


def revoked_of(lists: Iterable[x509.CertificateRevocationList]) -> Revoked:
    return frozenset(revocation_days(lists))


def revocation_days(lists: Iterable[x509.CertificateRevocationList]) -> dict[tuple[bytes, int], str]:
    """The day on which each certificate was revoked, in UTC."""
    return {
        (each.issuer.public_bytes(), entry.serial_number): entry.revocation_date_utc.date().isoformat()
        for each in lists
        for entry in each
    }


def overdue_warnings(lists: Iterable[x509.CertificateRevocationList]) -> Iterator[str]:
    """A sentence for each list whose issuer promised a newer one before now (RFC 5280, 5.1.2.5)."""
    for each in lists:
        if each.next_update_utc and each.next_update_utc.timestamp() < time.time():
            yield (
                f"warning: the revocation list of {written_name(each.issuer)} should have been replaced on "
                f"{each.next_update_utc.date()}; it stays in force, and may lack later revocations"
            )


def written_name(name: x509.Name) -> str:
    return repr(printable(name.rfc4514_string()))


def mark_of(certificate: x509.Certificate) -> tuple[bytes, int]:
    """Issuer and serial: a revocation list names a certificate by them."""
    return certificate.issuer.public_bytes(), certificate.serial_number


def add_to_revocation_list(folder: pathlib.Path, authority: CertifiedKey, serials: Iterable[int]) -> None:
    """Write `client-crl.pem` anew with more serials. It keeps the entries that it has, and other authorities' lists."""
    present = read_revocation_lists(folder, load_authorities(folder))
    own = [each for each in present if is_list_of(each, authority.certificate)]
    numbers = [value.crl_number for each in own if (value := extension(each, x509.CRLNumber))]
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.certificate.subject)
        .last_update(now - datetime.timedelta(days=1))
        .next_update(now + datetime.timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.CRLNumber(max(numbers, default=0) + 1), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False)
    )
    entries = {entry.serial_number: entry for each in own for entry in each}
    for serial in serials:
        fresh = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now)
        entries.setdefault(serial, fresh.build())
    for entry in entries.values():
        builder = builder.add_revoked_certificate(entry)
    made = [builder.sign(authority.key, digest_for(authority.key)), *(each for each in present if each not in own)]
    content = b"".join(each.public_bytes(serialization.Encoding.PEM) for each in made)
    write_file(folder / CRL_FILE, content, 0o644)


def validity(chain: Sequence[x509.Certificate]) -> tuple[float, float]:
    """The period in which all these certificates are valid: its start and its end, in seconds since 1970."""
    return (
        max(each.not_valid_before_utc for each in chain).timestamp(),
        min(each.not_valid_after_utc for each in chain).timestamp(),
    )


def can_be_served(key: Any) -> bool:
    """Whether gRPC's BoringSSL offers TLS 1.3 with this kind of key."""
    if isinstance(key, rsa.RSAPrivateKey):
        return key.key_size >= 1024
    return isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in ("secp256r1", "secp384r1")


def valid_authorities_first(authorities: Iterable[x509.Certificate]) -> bytes:
    """Authorities as PEM, in the order in which TLS tries them. TLS takes only the first of several with the same name
    and key, so those that are valid now, and of them the one that is valid longest, come first.
    """
    now = datetime.datetime.now(datetime.timezone.utc)

    def order(authority: x509.Certificate) -> tuple[bool, datetime.timedelta]:
        outside = not authority.not_valid_before_utc <= now <= authority.not_valid_after_utc
        return outside, now - authority.not_valid_after_utc

    return to_pem(*sorted(authorities, key=order))


# --- 14. Identity and authorization --------------------------------------------------------------------
# Owns the questions who the caller is and which jobs the caller may see. It makes no certificate. Of gRPC it knows only
# the dictionary that holds the results of the TLS handshake.

LONGEST_CHAIN = 5  # intermediates that are tried; the number of possible chains grows with their factorial
SHORTEST_RSA = 2048  # bits; NIST SP 800-57 allows no fewer


@dataclasses.dataclass(frozen=True)
class Trust:
    """What a server checks its clients against: the client authorities, as PEM, and the revoked certificates."""

    authorities: bytes = b""
    revoked: Revoked = frozenset()


@dataclasses.dataclass(frozen=True)
class PeerCertificate:
    """What a client's certificate says, and when a chain to an authority is valid."""

    fault: str = ""  # what is wrong with it at any time, as a sentence
    name: str = ""
    roles: frozenset[str] = frozenset()
    chains: tuple[PeerChain, ...] = ()


@dataclasses.dataclass(frozen=True)
class PeerChain:
    """A chain to an authority: when all of it is valid, and by what a revocation list names its certificates."""

    since: float
    until: float
    marks: Revoked


@functools.lru_cache(maxsize=4096)
def read_peer_certificate(pem: bytes, chain: bytes, authorities: bytes) -> PeerCertificate:
    """Judge a peer's certificate. It never raises, whatever the bytes are. The cache saves this work, since each call
    of a client brings the same bytes.
    """
    try:
        return judge_peer_certificate(pem, chain, authorities)
    except x509.DuplicateExtension as error:
        oid = error.oid.dotted_string
        return PeerCertificate(f"the client's certificate, or one behind it, has more than one extension {oid}")
    except damage_errors():
        return PeerCertificate("the client's certificate cannot be read")


def judge_peer_certificate(pem: bytes, chain: bytes, authorities: bytes) -> PeerCertificate:
    leaf = x509.load_pem_x509_certificate(pem)
    sent = x509.load_pem_x509_certificates(chain) if chain.strip() else []
    intermediates = list(dict.fromkeys(sent))[:LONGEST_CHAIN]
    chains = list(chains_to(x509.load_pem_x509_certificates(authorities), leaf, intermediates))
    strong = [chain for chain in chains if not weakness(chain)]
    name, roles, fault = read_identity(leaf)
    if not chains:
        fault = "the client's certificate is not from an authority that this server trusts now"
    elif not strong:
        fault = weakness(chains[0])
    return PeerCertificate(
        fault, name, roles, tuple(PeerChain(*validity(chain), frozenset(map(mark_of, chain))) for chain in strong)
    )


def weakness(chain: Sequence[x509.Certificate]) -> str:
    """Why a chain can be forged, as a sentence; empty: it cannot. The last certificate is an authority that this server
    was given, so its own signature is of no importance (RFC 5280, 6.1).
    """
    for certificate in chain:
        key = certificate.public_key()
        if isinstance(key, rsa.RSAPublicKey) and key.key_size < SHORTEST_RSA:
            return f"{subject_of(certificate)} has an RSA key of {key.key_size} bits; it needs {SHORTEST_RSA}"
    for certificate in filter(has_weak_digest, chain[:-1]):
        digest = certificate.signature_hash_algorithm
        name = digest.name.upper() if digest else ""
        return f"{subject_of(certificate)} is signed with {name}, which can be forged; use SHA-256"
    return ""


def subject_of(certificate: x509.Certificate) -> str:
    return f"the certificate {written_name(certificate.subject)}"


def chains_to(
    authorities: Sequence[x509.Certificate], leaf: x509.Certificate, intermediates: Sequence[x509.Certificate]
) -> Iterator[tuple[x509.Certificate, ...]]:
    """Every chain of signatures from a certificate to an authority, both included (RFC 5280, 6.1).

    A renewed authority or intermediate makes a second chain, and TLS may have used the one that expires first.
    """
    yield from ((leaf, authority) for authority in authorities if is_issued_by(leaf, authority))
    for issuer in intermediates:
        if is_authority(issuer) and is_issued_by(leaf, issuer):
            rest = [other for other in intermediates if other is not issuer]
            yield from ((leaf, *chain) for chain in chains_to(authorities, issuer, rest))


@dataclasses.dataclass(frozen=True)
class Caller:
    """The caller: the common name of the client's certificate, whether its roles include `admin`, and until when the
    certificate is valid, in seconds since 1970.
    """

    name: str
    admin: bool
    until: float = 0.0

    def may_see(self, owner: str) -> bool:
        return self.admin or self.name == owner


def authenticate(tls: Mapping[str, Iterable[bytes]], trust: Trust) -> Caller:
    """The caller of one call. Every call is checked, since a connection outlives certificates.

    `tls` is gRPC's auth context. Raises DeniedError.
    """
    if list(tls.get("ssl_tls_version", ())) != [b"TLSv1.3"]:
        raise DeniedError("this connection is not TLS 1.3")
    leaf, sent = (b"".join(tls.get(key, ())) for key in ("x509_pem_cert", "x509_pem_cert_chain"))
    peer = read_peer_certificate(leaf, sent, trust.authorities)
    if peer.fault:
        raise DeniedError(peer.fault)
    now = time.time()
    valid = [chain for chain in peer.chains if chain.since <= now <= chain.until]
    if not valid:
        raise DeniedError("the client's certificate, or an authority behind it, is out of date")
    trusted = [chain for chain in valid if not chain.marks & trust.revoked]
    if not trusted:
        raise DeniedError(f"the client's certificate of {peer.name!r} is revoked")
    return Caller(peer.name, "admin" in peer.roles, max(chain.until for chain in trusted))


class OpenCall:
    """A call that has not ended: the task that answers it, and why it is ended by force."""

    def __init__(self, tls: Mapping[str, Iterable[bytes]], task: asyncio.Task[Any]) -> None:
        self.tls = tls
        self.task = task
        self.refusal: DeniedError | None = None
        self.timer: asyncio.TimerHandle | None = None


class Gate:
    """Admits calls, and ends those that are open when their certificate is no longer good: it expired, it was revoked,
    or its authority was removed.
    """

    def __init__(self) -> None:
        self.trust = Trust()
        self._open: set[OpenCall] = set()

    def use(self, trust: Trust) -> None:
        """Use this trust from now on, and check the open calls again."""
        self.trust = trust
        for call in list(self._open):
            self._judge(call)

    @contextlib.contextmanager
    def admitted(self, tls: Mapping[str, Iterable[bytes]]) -> Iterator[Caller]:
        """The caller, for as long as one call lasts. Raises DeniedError, at the start of the call or during it."""
        caller = authenticate(tls, self.trust)
        task = asyncio.current_task()
        call = OpenCall(tls, task)  # type: ignore[arg-type]  # gRPC runs each call in a task
        self._open.add(call)
        self._wait_for_end(call, caller.until)
        try:
            yield caller
        except asyncio.CancelledError:
            if call.refusal is None:
                raise
            raise call.refusal from None
        finally:
            self._open.discard(call)
            if call.timer:
                call.timer.cancel()

    def _wait_for_end(self, call: OpenCall, until: float) -> None:
        if call.timer:
            call.timer.cancel()
        # 10 ms more, since the timer's clock may be ahead of the one that certificates go by.
        call.timer = asyncio.get_running_loop().call_later(until - time.time() + 0.01, self._judge, call)

    def _judge(self, call: OpenCall) -> None:
        try:
            self._wait_for_end(call, authenticate(call.tls, self.trust).until)
        except DeniedError as error:
            call.refusal = error
            self._open.discard(call)
            call.task.cancel()  # `admitted` turns this into the refusal


def allowed_job(worker: Worker, caller: Caller, job_id: str) -> Job:
    """The job, if it exists and the caller may see it. Raises NoSuchJobError, which is the same for both."""
    job = worker.job(check_id(job_id))
    if not caller.may_see(job.owner):
        raise NoSuchJobError(job_id)
    return job


# --- 15. gRPC service ----------------------------------------------------------------------------------
# Owns the translation between `Worker` and the wire. It is the only section that makes gRPC statuses. Every call passes
# through `Service._checked`, which identifies the caller before anything else happens.

SERVICE_NAME = "proto.WorkerService"
SEND_INPUT = f"/{SERVICE_NAME}/SendInput"
OFFSET_KEYS = "offset", "error-offset"  # metadata of a stream with `tail`: where each output begins
ENDING_KEY = "ending-bin"  # metadata at the end of a stream: how its job ended, as a GetStatusResponse
INPUT_BYTES_KEY = "input-bytes"  # metadata of an answer to SendInput: how many bytes one message may have
SHELL_CODE_KEY = "shell-code"  # metadata of a start that failed: the exit code that a shell would have
LARGE_REQUEST = 2 * VARIABLES  # bytes, see check_size; an owner's larger ones are read one after the other
REQUEST_SECONDS = 10.0  # from a call's headers until its first message is here
LISTED_BYTES = 400  # of a command with its arguments, and of a working folder, that a list shows
SHORTEST_PREFIX = 4  # characters of an id that may stand for it
BATCH_JOBS = 100  # of one message of a list
MORE_FIELD = 34  # GetStatusResponse.more
DATA_FIELD = 2  # SendInputRequest.data
STREAM_METADATA = (("jobworker-version", VERSION),)  # sent at once, so that a client knows that its stream has begun
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


def wire_field(number: int, content: bytes) -> bytes:
    """A field of bytes, or of a message, as protobuf writes it (wire type 2), without a message object."""
    prefix = bytearray()
    for value in (number << 3 | 2, len(content)):
        rest = value
        while rest > 0x7F:
            prefix.append(rest & 0x7F | 0x80)
            rest >>= 7
        prefix.append(rest)
    return bytes(prefix) + content


def encode_output(piece: tuple[int, bytes]) -> bytes:
    """A GetStreamResponse with bytes of one output. The number of the output is the number of its field: 1 for
    `result`, 2 for `error`.
    """
    return wire_field(*piece)


def encode_batch(summaries: Sequence[bytes]) -> bytes:
    """A GetStatusResponse of the first job with those of the others in its field `more`. All are serialized."""
    return summaries[0] + b"".join(wire_field(MORE_FIELD, each) for each in summaries[1:])


def parse_request(kind: Any, message: bytes) -> Any:
    """A request of this kind. Raises BadRequestError if the bytes are not one, or a text in them is not UTF-8."""
    try:
        return kind.FromString(message)
    except protobuf.DecodeError:
        raise BadRequestError(
            f"the request is not a valid {kind.DESCRIPTOR.name}, or a text in it is not UTF-8"
        ) from None


def only_field(message: bytes) -> tuple[int, memoryview]:
    """The number and the bytes of the one field of a message that `wire_field` wrote. The number is 0 for any other
    message. The bytes are not copied.
    """
    size = shift = 0
    for position, byte in enumerate(message[1:6], 2):
        size |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            if message[0] & 0x87 == 2 and position + size == len(message):
                return message[0] >> 3, memoryview(message)[position:]
            break
    return 0, memoryview(b"")


def decode_output(message: bytes) -> tuple[Content, Content]:
    """The bytes of both outputs in a GetStreamResponse that `encode_output`, or any other protobuf, wrote."""
    number, piece = only_field(message)
    if number in (1, 2):
        return (piece, b"") if number == 1 else (b"", piece)
    reply = pb.GetStreamResponse.FromString(message)
    return reply.result, reply.error


def encode_input(chunk: bytes) -> bytes:
    """A SendInputRequest with bytes of the input."""
    return wire_field(DATA_FIELD, chunk)


def decode_input(message: bytes) -> Content:
    """The bytes of the input in a SendInputRequest that `encode_input`, or any other protobuf, wrote. Raises
    BadRequestError.
    """
    number, chunk = only_field(message)
    return chunk if number == DATA_FIELD else parse_request(pb.SendInputRequest, message).data


def optional(message: Any, field: str) -> Any:
    """The value of a proto3 `optional` field; None if the caller left it out."""
    return getattr(message, field) if message.HasField(field) else None


async def first_message(context: Context) -> Any:
    """The first message of a call. Raises BadRequestError if there is none, or NoAnswerError if it does not arrive.

    It is not `asyncio.wait_for`: before Python 3.12 that can lose the cancellation with which the gate ends a call.
    """
    task, late = asyncio.current_task(), False

    def give_up() -> None:
        nonlocal late
        late = True
        task.cancel()  # type: ignore[union-attr]  # gRPC runs each call in a task

    timer = asyncio.get_running_loop().call_later(REQUEST_SECONDS, give_up)
    try:
        message = await context.read()
    except asyncio.CancelledError:
        if not late:
            raise
        raise NoAnswerError(f"the request did not arrive within {REQUEST_SECONDS:g} seconds") from None
    finally:
        timer.cancel()
    if message is grpc.aio.EOF:
        raise BadRequestError("the call has no request")
    return message


class OpenCalls:
    """The open calls of each owner, and how many one owner may have. A call is open until its answer was sent, unless
    it leaves before.
    """

    def __init__(self, most: int, kind: str) -> None:
        self._most = most
        self._kind = kind  # "calls" or "streams"
        self._open: dict[str, set[Context]] = {}

    def enter(self, owner: str, context: Context) -> int:
        """Count a call until gRPC is done with it. Returns how many are open. Raises ExhaustedError."""
        count = len(self._open.get(owner, ()))
        if count >= self._most:
            raise ExhaustedError(
                f"{owner!r} has {count} {self._kind} open, and `serve --owner-{self._kind}` allows no more"
            )
        self._open.setdefault(owner, set()).add(context)
        context.add_done_callback(lambda _: self.leave(owner, context))  # type: ignore[arg-type]
        return count + 1

    def leave(self, owner: str, context: Context) -> None:
        if calls := self._open.get(owner):
            calls.discard(context)
            if not calls:
                del self._open[owner]


class OwnerTurns:
    """A `Turn` for all lists. Owners take turns, too, however many lists one of them asks for."""

    def __init__(self) -> None:
        self._turn = Turn()
        self._of_owner: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    async def part(self, owner: str, items: Iterator[Any], most: int = sys.maxsize) -> list[Any]:
        """As `Turn.part`."""
        of_owner = self._of_owner.setdefault(owner, asyncio.Lock())
        async with of_owner:
            return await self._turn.part(items, most)


@dataclasses.dataclass(frozen=True)
class CallLimits:
    """How many calls and how many streams one owner may have open."""

    calls: int = OWNER_CALLS
    streams: int = OWNER_STREAMS


class Service:
    """WorkerService over a `Worker`, for the callers that the gate admits."""

    def __init__(self, worker: Worker, gate: Gate, limits: CallLimits = CallLimits()) -> None:
        self._worker = worker
        self._gate = gate
        self._calls = OpenCalls(limits.calls, "calls")
        self._streams = OpenCalls(limits.streams, "streams")
        # One of 2 MiB can take 30 ms and 80 MB to read, so each owner's are read one after the other.
        self._large_requests: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._summaries: weakref.WeakKeyDictionary[Job, bytes] = weakref.WeakKeyDictionary()
        self._turns = OwnerTurns()

    def handlers(self) -> grpc.GenericRpcHandler:
        def unary(answer: Callable[[Caller, Any], Awaitable[Any]], kind: Any) -> grpc.RpcMethodHandler[Any, Any]:
            async def handle(_messages: AsyncIterator[bytes], context: Context) -> Any:
                async with self._checked(context) as caller:
                    request = await self._request(kind, caller, context)
                    if getattr(request, "wait", False):
                        self._become_stream(caller, context)  # it is open until its job ends
                    return await answer(caller, request)

            # As a stream of requests: gRPC reads the message of a unary call before this code runs (see `_request`).
            return grpc.stream_unary_rpc_method_handler(
                handle, response_serializer=lambda reply: reply.SerializeToString()
            )

        calls = {
            "StartJob": unary(self._start, pb.StartJobRequest),
            "StopJob": unary(self._stop, pb.StopJobRequest),
            "GetJobStatus": unary(self._status, pb.GetStatusRequest),
            "RemoveJob": unary(self._remove, pb.RemoveJobRequest),
            "SignalJob": unary(self._signal, pb.SignalJobRequest),
            "ListJobs": grpc.stream_stream_rpc_method_handler(self._list),
            "GetOutputStream": grpc.stream_stream_rpc_method_handler(self._stream, response_serializer=encode_output),
            "SendInput": grpc.stream_unary_rpc_method_handler(
                self._input, response_serializer=pb.SendInputResponse.SerializeToString
            ),
        }
        return grpc.method_handlers_generic_handler(SERVICE_NAME, calls)

    @contextlib.asynccontextmanager
    async def _checked(self, context: Context) -> AsyncIterator[Caller]:
        """Identify the caller, run the call, and turn every error into a status with one sentence."""
        try:
            with self._gate.admitted(context.auth_context()) as caller:
                yield caller
        except CannotRunError as error:
            metadata = ((SHELL_CODE_KEY, str(error.shell_code)),)
            await context.abort(grpc.StatusCode[error.status], shortened(str(error)), metadata)
        except JobWorkerError as error:
            await context.abort(grpc.StatusCode[error.status], shortened(str(error)))
        except (grpc.aio.AbortError, grpc.aio.InternalError):  # InternalError: the client is lost, and gRPC ignores it
            raise
        except Exception as error:  # noqa: BLE001  a mistake in this module: one line in the log, no traceback sent
            frame = traceback.extract_tb(error.__traceback__)[-1]
            say(f"unexpected {type(error).__name__} at line {frame.lineno} in {frame.name}: {error}")
            await context.abort(
                grpc.StatusCode.INTERNAL, "the server met an error that it did not expect; its log says more"
            )

    async def _request(self, kind: Any, caller: Caller, context: Context) -> Any:
        """The first message of a call. The call is counted before its message is read. Until then a stream counts as a
        call, too. So `--owner-calls` bounds the memory of messages that are under way.
        """
        self._calls.enter(caller.name, context)
        message = await first_message(context)
        if len(message) <= LARGE_REQUEST:
            return parse_request(kind, message)
        async with self._large_requests.setdefault(caller.name, asyncio.Lock()):
            began = time.monotonic()
            try:
                if kind is pb.StartJobRequest:
                    check_size(message)
                return parse_request(kind, message)
            finally:
                await asyncio.sleep(3 * (time.monotonic() - began))  # other calls have three quarters of the time

    def _become_stream(self, caller: Caller, context: Context) -> int:
        """Count a call as a stream from now on. Returns how many its owner has open. Raises ExhaustedError."""
        self._calls.leave(caller.name, context)
        return self._streams.enter(caller.name, context)

    async def _start(self, caller: Caller, message: pb.StartJobRequest) -> pb.StartJobResponse:
        if message.run_as and not caller.admin:
            raise DeniedError("only an admin may run a job as another account")
        request = JobRequest(
            command=message.cmd, args=tuple(message.args), owner=caller.name, id=message.id, run_as=message.run_as,
            env=tuple(sorted(message.env.items())), cwd=message.cwd, name=message.name, split=message.split,
            confine=message.confine, input=message.input,
            admin=caller.admin,
            **{field: optional(message, field) for field in ("cpu", "memory", "pids", "io", "timeout", "max_output")},
        )  # fmt: skip
        return pb.StartJobResponse(ID=(await self._worker.start(request)).id)

    async def _stop(self, caller: Caller, message: pb.StopJobRequest) -> pb.StopJobResponse:
        job = allowed_job(self._worker, caller, message.id)
        if not 0 <= message.grace <= LONGEST_GRACE:
            raise BadRequestError(f"a grace is from 0 to {LONGEST_GRACE} seconds, not {message.grace:g}")
        number = parse_signal(message.signal or ("TERM" if message.grace else ""))
        await self._worker.stop(job, by=caller.name, signal_number=number, grace=message.grace)
        return pb.StopJobResponse()

    async def _signal(self, caller: Caller, message: pb.SignalJobRequest) -> pb.SignalJobResponse:
        job = allowed_job(self._worker, caller, message.id)
        number = parse_signal(message.signal)
        if number == 0:
            raise BadRequestError("the signal is empty; for example HUP, USR1 or TERM")
        self._worker.signal(job, number)
        return pb.SignalJobResponse()

    async def _status(self, caller: Caller, message: pb.GetStatusRequest) -> pb.GetStatusResponse:
        job = allowed_job(self._worker, caller, message.id)
        if message.wait:
            await self._worker.wait(job)
        return status_message(self._worker.status(job))

    async def _list(self, _messages: AsyncIterator[bytes], context: Context) -> None:
        async with self._checked(context) as caller:
            request = await self._request(pb.ListJobsRequest, caller, context)
            self._become_stream(caller, context)
            if not caller.admin and (request.everyone or request.owner not in ("", caller.name)):
                raise DeniedError("only an admin may list the jobs of other owners")
            most = BATCH_JOBS if request.batches else 1
            summaries = map(self._summary, await self._listed(caller, request))
            batch: list[bytes] = []
            while part := await self._turns.part(caller.name, summaries, BATCH_JOBS):
                batch += filter(None, part)
                while len(batch) >= most:  # without the turn: a client that does not read makes its own list wait
                    await context.write(encode_batch(batch[:most]))
                    del batch[:most]
            if batch:
                await context.write(encode_batch(batch))

    async def _listed(self, caller: Caller, request: pb.ListJobsRequest) -> list[Job]:
        """The jobs that a list shows, oldest first. The newest are searched first, so a limit makes it short."""
        asked = choice(caller, request)
        jobs = (job if asked(job) else None for job in reversed(self._worker.jobs()))
        found: list[Job] = []
        while part := await self._turns.part(caller.name, jobs):
            found += filter(None, part)
            if 0 < request.limit <= len(found):
                break
        return found[: request.limit or None][::-1]

    def _summary(self, job: Job) -> bytes:
        """A job's line of a list as bytes; empty if it was deleted meanwhile. Those of ended jobs do not change, so
        they are kept: about 0.5 KB for each job of the table.
        """
        if kept := self._summaries.get(job):
            return kept
        try:
            summary: bytes = summary_message(self._worker.status(job)).SerializeToString()
        except NoSuchJobError:
            return b""
        if job.ended:
            self._summaries[job] = summary
        return summary

    async def _remove(self, caller: Caller, message: pb.RemoveJobRequest) -> pb.RemoveJobResponse:
        self._worker.remove(allowed_job(self._worker, caller, message.id))
        return pb.RemoveJobResponse()

    async def _stream(self, _messages: AsyncIterator[bytes], context: Context) -> None:
        async with self._checked(context) as caller:
            request = await self._request(pb.GetStreamRequest, caller, context)
            size = read_size(self._become_stream(caller, context))
            job = allowed_job(self._worker, caller, request.id)
            # 2^62 is larger than any file, and still an offset for the kernel.
            offset, error_offset = (min(each, 1 << 62) for each in (request.offset, request.error_offset))
            metadata = list(STREAM_METADATA)
            if request.HasField("tail"):
                offset, error_offset = [await self._worker.tail_offset(job, request.tail, each) for each in (1, 2)]
                metadata += zip(OFFSET_KEYS, (str(offset), str(error_offset)), strict=True)
            await context.send_initial_metadata(tuple(metadata))
            stream = self._worker.stream_split(job, offset, error_offset, size, follow=not request.no_follow)
            async with contextlib.aclosing(stream) as pieces:
                async for piece in pieces:
                    await context.write(piece)
            if job.events.ending and not request.no_follow:  # nobody may be able to ask later: the job may be deleted
                ending = ending_message(job.events.ending).SerializeToString()
                context.set_trailing_metadata(((ENDING_KEY, ending),))

    async def _input(self, messages: AsyncIterator[bytes], context: Context) -> Any:
        async with self._checked(context) as caller:
            context.set_trailing_metadata(((INPUT_BYTES_KEY, str(INPUT_BYTES)),))
            first = await self._request(pb.SendInputRequest, caller, context)
            self._become_stream(caller, context)
            job = allowed_job(self._worker, caller, first.id)
            async with contextlib.aclosing(input_chunks(first.data, messages, context)) as chunks:
                return pb.SendInputResponse(bytes=await self._worker.send_input(job, chunks))


async def input_chunks(
    chunk: Content, messages: AsyncIterator[bytes], context: Context
) -> AsyncGenerator[Content, None]:
    """The bytes of an input: the first chunk, and those of the further messages.

    gRPC ends `messages` in the same way when the client has sent all and when the client is lost. But it can send
    nothing more to a client that is lost. So the answer's metadata is sent before the job is told the end of input.
    """
    yield checked_chunk(chunk)
    async for message in messages:
        yield checked_chunk(decode_input(message))
    await context.send_initial_metadata(STREAM_METADATA)


def checked_chunk(chunk: Content) -> Content:
    if len(chunk) > INPUT_BYTES:
        raise BadRequestError(f"a message of input has {len(chunk)} bytes, and {INPUT_BYTES} are the most")
    return chunk


def parse_signal(name: str) -> int:
    """The number of a signal, from `TERM`, `SIGTERM` or `15`; 0 where the name is empty. Raises BadRequestError."""
    if not name:
        return 0
    if name.isascii() and name.isdigit() and int(name) in signal.valid_signals():
        return int(name)
    try:
        return signal.Signals[f"SIG{name.upper().removeprefix('SIG')}"].value
    except KeyError:
        raise BadRequestError(f"there is no signal {name!r}; for example TERM, INT, HUP or USR1") from None


def read_size(streams: int) -> int:
    """The bytes of one message of a stream, by the number of streams that its owner has open.

    gRPC holds two copies of a message that a client does not read. 512 unread streams of one owner held 283 MB when
    each message had 256 KiB.
    """
    return max(SMALLEST_READ_BYTES, min(READ_BYTES, STREAMS_BYTES // streams))


def check_size(message: bytes) -> None:
    """Refuse a start with more arguments and variables than the kernel takes, or than VARIABLES, before any of them is
    unpacked. Raises BadRequestError.

    150,000 variables, which the kernel takes, kept the server busy for 0.4 s. Their map alone takes 2 µs for each, so
    they are counted in a message that has none. Beside its text the kernel counts 9 bytes for an argument and 10 for a
    variable (execve(2)), and the wire has 2 and 6, or some more for a long one. These, and what else a request has,
    are less than 32 KiB.
    """
    if len(message) <= 2 * VARIABLES:  # each has two bytes or more
        return
    counted = parse_request(pb.StartJobSizes, message)
    args, variables = len(counted.args), len(counted.env)
    del counted  # an error's traceback would keep it, with 46 MB, until the answer was sent
    if variables > VARIABLES:
        raise BadRequestError(
            f"{variables} variables are too many for the environment of a job, which can be given {VARIABLES}: "
            f"{FILE_INSTEAD}"
        )
    if len(message) + 7 * args + 4 * variables > ARGUMENTS_BYTES + 32 * KIB:
        of_env = f" and an environment of {count_of(variables, 'variable', 'variables')}" if variables else ""
        remedy = f": {FILE_INSTEAD}" if variables else ""
        raise BadRequestError(
            f"{count_of(args, 'argument', 'arguments')}{of_env} with the command are too long for the kernel "
            f"(128 KiB each, 2 MiB in all){remedy}"
        )


def shortened(sentence: str) -> str:
    """A sentence that fits the headers in which gRPC sends it: 8 KiB, in which a character takes up to 12 bytes."""
    return sentence if len(sentence) <= 400 else f"{sentence[:400]}…"


def choice(caller: Caller, request: pb.ListJobsRequest) -> Callable[[Job], bool]:
    """Whether a list shows a job. A prefix is searched among all jobs that the caller may see."""
    name, running = request.prefix, request.running
    prefix = name if len(name) >= SHORTEST_PREFIX else " "  # no id contains a blank
    owner = "" if request.everyone or name else request.owner or caller.name

    def asked(job: Job) -> bool:
        if (owner and job.owner != owner) or not caller.may_see(job.owner) or (running and job.ended):
            return False
        return not name or job.name == name or job.id.startswith(prefix)

    return asked


def ending_message(ending: Ending) -> pb.GetStatusResponse:
    return pb.GetStatusResponse(status=ending.status, exitcode=ending.code, reason=ending.reason, signal=ending.signal)


def status_message(status: JobStatus) -> pb.GetStatusResponse:
    spec, ending, usage = status.spec, status.ending, status.usage
    enforced = {name: getattr(spec.limits, name) for name in spec.controllers if not spec.through}
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
        notes=(*status.notes, *left_out_note(spec)),
        id=spec.id,
        name=spec.name,
        cwd=spec.cwd,
        memory_current=status.memory_current,
        split=spec.split,
        error_bytes=status.error_bytes,
        input_bytes=status.input_bytes,
        through=shlex.join(spec.through).replace(COMMAND_MARK, "{command}"),
        node=status.node,
        confined=spec.confine,
    )


def summary_message(status: JobStatus) -> pb.GetStatusResponse:
    """A status as a list has it: about 1 KiB at most, so that those of all ended jobs can be kept in memory."""
    spec = status.spec
    command, *args = first_words((spec.command, *spec.args), LISTED_BYTES)
    cwd = first_words((spec.cwd,), LISTED_BYTES)[0]
    if (command, tuple(args), cwd) == (spec.command, spec.args, spec.cwd):
        return status_message(status)
    note = f"a list shows {LISTED_BYTES} bytes of a command with its arguments, and of a folder; a status shows more"
    brief = dataclasses.replace(spec, command=command, args=tuple(args), cwd=cwd, args_left_out=0)
    return status_message(dataclasses.replace(status, spec=brief, notes=(*status.notes, note)))


def first_words(words: Iterable[str], size: int) -> list[str]:
    """The words that `size` bytes hold, where each takes two bytes more. What follows them is shown as `…`."""
    found: list[str] = []
    for word in words:
        text = word.encode()
        if len(text) > size:
            return [*found, text[: max(0, size)].decode(errors="ignore") + "…"]
        found.append(word)
        size -= len(text) + 2
    return found


def left_out_note(spec: Spec) -> list[str]:
    if not spec.args_left_out:
        return []
    return [
        f"{spec.args_left_out} more arguments are not shown here: a status shows {SPEC_HEAD_BYTES // KIB} KiB of them"
    ]


# --- 16. Server ----------------------------------------------------------------------------------------
# Owns the process that serves: its port, its signals, its descriptors, and what it reports to systemd. The folder of
# certificates that it is given is complete. It makes only the next server.pem, before the present one expires.

KEEPALIVE_SECONDS, PING_SECONDS, HANDSHAKE_SECONDS = 10, 5, 10
LARGEST_MESSAGE = ARGUMENTS_BYTES + 64 * KIB  # bytes of a request
# Bytes of a call beyond the messages that it has asked for. 512 streams held 284 MB of it, and 545 MB with 1 MiB; with
# 256 KiB an input of 1 GiB took 25% longer.
READ_AHEAD_BYTES = 512 * KIB
FEW_FILES = 4096  # descriptors; with fewer, `serve` warns
CONNECTION_CALLS = 100  # open calls of one connection
WAITING_CALLS = 1_000_000  # of all connections; 10,000 connections can have as many
KEEPALIVE_OPTIONS = [
    ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
    ("grpc.keepalive_timeout_ms", PING_SECONDS * 1000),
    ("grpc.http2.ping_timeout_ms", PING_SECONDS * 1000),  # without it a half-open peer is kept for a minute
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
SERVER_OPTIONS = [
    *KEEPALIVE_OPTIONS,
    ("grpc.http2.min_ping_interval_without_data_ms", PING_SECONDS * 1000),  # without it: GOAWAY too_many_pings
    ("grpc.server_handshake_timeout_ms", HANDSHAKE_SECONDS * 1000),  # a silent connection holds a descriptor
    # A window that adapts itself to the connection read up to 72 MB ahead for an input that its job did not read, and
    # 100 of them took 5.6 GB. This one is fixed.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", READ_AHEAD_BYTES),
    ("grpc.so_reuseport", 0),  # without it a second server binds the same port and no error is reported
    ("grpc.max_receive_message_length", LARGEST_MESSAGE),
    ("grpc.max_concurrent_streams", CONNECTION_CALLS),
    # Above 1000 waiting calls gRPC cancels some at random, and so the calls of other callers.
    ("grpc.server.max_pending_requests", WAITING_CALLS),
    ("grpc.server.max_pending_requests_hard_limit", WAITING_CALLS),
]
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
RELOAD_SECONDS = 0.1  # see ServerCertificates._fetch
LATER_MODULES = (  # modules that the packages import at their first use
    "encodings.idna",
    "cryptography.hazmat.backends.openssl.backend",
)


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """How one server serves. `listen` is (host, port); an empty host means every address."""

    worker: WorkerOptions
    listen: tuple[str, int]
    certs: pathlib.Path
    stop_jobs: bool = False
    calls: CallLimits = CallLimits()


def prepare_grpc() -> None:
    """Set malloc's options, and the variables that gRPC reads when it is imported.

    gRPC for Python cannot set a minimum version of TLS. The cipher suites govern TLS 1.2 only, and this one needs a
    pre-shared key, which no peer has. So TLS 1.2 finds no cipher, and TLS 1.3 is not affected.
    """
    os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-PSK-CHACHA20-POLY1305"
    os.environ["GRPC_VERBOSITY"] = "NONE"
    keep_freed_memory()
    skip_pure_python_protobuf()


def keep_freed_memory() -> None:
    """Let malloc keep what the buffers of messages have freed (mallopt(3)).

    Otherwise glibc returns it to the kernel, and the next buffers are new pages, which the kernel clears: 1 GiB of
    input took 10% more CPU time.
    """
    with contextlib.suppress(AttributeError):  # musl has no such function, and keeps freed memory for less time
        for option, size in ((M_MMAP_THRESHOLD, 8 * MIB), (M_TRIM_THRESHOLD, 16 * MIB), (M_TOP_PAD, MIB)):
            libc_call("mallopt", option, size)


def skip_pure_python_protobuf() -> None:
    """Import protobuf's pure Python implementation only if it is used. protobuf imports it beside the C one, and that
    costs a client 9 ms.
    """
    name = "google.protobuf.internal.python_message"
    stub = types.ModuleType(name)

    def load(attribute: str) -> Any:
        if sys.modules.get(name) is stub:
            del sys.modules[name]
        return getattr(importlib.import_module(name), attribute)

    stub.__getattr__ = load  # type: ignore[method-assign]  # PEP 562
    sys.modules.setdefault(name, stub)


def import_everything() -> None:
    """Import every deferred module now: an import fails after the .pyz of a running server was replaced."""
    for name in (*DEFERRED.values(), *LATER_MODULES):
        importlib.import_module(name)


class ServerCertificates:
    """The certificates in force. A reload reads the folder again. A changed revocation list is in force at once."""

    def __init__(self, folder: pathlib.Path, gate: Gate) -> None:
        self._folder = folder
        self._gate = gate
        self._authorities: list[x509.Certificate] = []
        self._configuration: Any = None
        self._changed = False
        self._server_until = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._list: bytes | None = None  # the file of revocation lists as it was read last
        self._list_fault = ""  # why it is not in force; empty: it is
        self._lists: Sequence[x509.CertificateRevocationList] = ()  # those in force
        self._inotify = Inotify(self._check_list)

    def load(self) -> None:
        """Read the folder. Raises JobWorkerError, and then what was in force stays in force."""
        key, certificates, authorities, until = read_server_folder(self._folder)
        content = self._read_list()
        lists = read_revocation_lists(self._folder, authorities)
        ordered = valid_authorities_first(authorities)
        self._configuration = grpc.ssl_server_certificate_configuration([(key, certificates)], ordered)
        self._changed = True
        self._authorities, self._server_until = authorities, until
        self._list, self._list_fault, self._lists = content, "", lists
        self._gate.use(Trust(ordered, revoked_of(lists)))

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Renew server.pem in time, and watch the revocation list: its folder, and if it is a link the folder that
        it leads to.
        """
        self._inotify.open()
        try:
            for folder in {os.path.realpath(self._folder), os.path.dirname(os.path.realpath(self._folder / CRL_FILE))}:
                self._inotify.watch(folder, IN_FOLDER, lambda _mask: self._check_list())
            self._check_list()  # it may have changed after `load`
            self.renew()
            yield
        finally:
            if self._timer:
                self._timer.cancel()
            self._inotify.close()

    def renew(self) -> None:
        """Renew server.pem when its time comes, and warn of what else ends. It looks again once a day, since a clock
        may be set.
        """
        try:
            made = renew_server_certificate(self._folder)
            if made:
                say(made)
                self.load()
            for warning in (*end_warnings(self._folder), *overdue_warnings(self._lists)):
                say(warning)
        except (JobWorkerError, OSError, ValueError) as error:
            say(f"{self._folder}/server.pem cannot be renewed: {error}")
        left = self._server_until - WARN_DAYS * DAY - time.time()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(min(left, DAY) + 0.01 if left > 0 else DAY, self.renew)

    def _read_list(self) -> bytes | None:
        try:
            return (self._folder / CRL_FILE).read_bytes()
        except OSError:
            return None

    def _check_list(self) -> None:
        """Put a changed revocation list in force. One that is gone or unreadable changes nothing: an accident must
        admit no client that was revoked. It is read again at each change of the folder, which may bring the certificate
        of its issuer.
        """
        content = self._read_list()
        if content == self._list and not self._list_fault:
            return
        self._list = content
        known, self._list_fault = self._list_fault, "" if content else f"{self._folder / CRL_FILE} cannot be read"
        try:
            lists = read_revocation_lists(self._folder, self._authorities)
        except JobWorkerError as error:
            self._list_fault = str(error)
        if self._list_fault:
            if self._list_fault != known:
                say(f"the revocation list stays as it was: {self._list_fault}")
            return
        self._lists = lists
        revoked = revoked_of(self._lists)
        self._gate.use(dataclasses.replace(self._gate.trust, revoked=revoked))
        say(f"the revocation list is read again; it has {count_of(len(revoked), 'entry', 'entries')}")
        for warning in overdue_warnings(self._lists):
            say(warning)

    def credentials(self) -> grpc.ServerCredentials:
        self._changed = False
        return grpc.dynamic_ssl_server_credentials(self._configuration, self._fetch, True)

    def _fetch(self) -> Any:
        """Return the new configuration after a reload, else None. gRPC calls this before each handshake, in a thread.

        gRPC replaces and frees the old configuration under a lock, but a handshake reads it outside of that lock
        (ssl_security_connector.cc, add_handshakers). Two handshakes at the same time would crash the server if each
        brought a new configuration. So only a reload brings one, and it waits until the handshakes that began before it
        have read theirs.
        """
        if not self._changed:
            return None
        self._changed = False
        time.sleep(RELOAD_SECONDS)
        return self._configuration


async def serve(options: ServeOptions) -> int:
    """Serve until SIGTERM or SIGINT. SIGHUP reads the certificates again. Returns the exit code."""
    import_everything()
    gc.enable()  # the bootstrap of a .pyz disables it
    gc.freeze()
    gate = Gate()
    certificates = ServerCertificates(options.certs, gate)
    certificates.load()
    ended = asyncio.Event()
    async with Worker(options.worker) as worker:
        files = raise_file_limit()
        # The rest is for outputs that are followed and for starts: connections alone never use all descriptors.
        server = grpc.aio.server(options=[*SERVER_OPTIONS, ("grpc.max_allowed_incoming_connections", files * 3 // 4)])
        server.add_generic_rpc_handlers((Service(worker, gate, options.calls).handlers(),))
        address = await bind_port(server, options.listen, certificates, worker)
        await server.start()
        handle_signals(ended, certificates)
        with certificates.watched():
            announce(worker, address)
            await ended.wait()
        notify("STOPPING=1")
        if options.stop_jobs:
            await worker.stop_all(by="serve --stop-jobs")
        cut = worker.feeds
        say(
            f"stopping; {count_of(worker.running - cut, 'job goes', 'jobs go')} on"
            + (f", and {count_of(cut, 'job is', 'jobs are')} stopped, because their input is cut" if cut else "")
        )
        worker.begin_shutdown()  # before `server.stop`, which would wait for every follower until its grace is over
        await server.stop(0.3)
    return 0


async def bind_port(
    server: grpc.aio.Server, listen: tuple[str, int], certificates: ServerCertificates, worker: Worker
) -> str:
    """Listen as `bind` does. A job of this server that took the port while no server held it is stopped."""
    try:
        return bind(server, listen, certificates.credentials())
    except JobWorkerError:
        held = await worker.stop_holders_of(listen[1])
        if not held:
            raise
    say(f"stopped job {', '.join(held)}: it held the port {listen[1]} of this server")
    return bind(server, listen, certificates.credentials())


def bind(server: grpc.aio.Server, listen: tuple[str, int], credentials: grpc.ServerCredentials) -> str:
    """Listen, and return HOST:PORT, with brackets around IPv6. Raises JobWorkerError, which names the port."""
    host, port = listen
    host = host or ("::" if has_ipv6() else "0.0.0.0")  # noqa: S104  a server listens on all addresses by default
    written = f"[{host}]" if ":" in host else host
    try:
        port = server.add_secure_port(f"{written}:{port}", credentials)
    except RuntimeError:
        port = 0
    if port == 0:
        raise JobWorkerError(why_not_listening(host, listen[1], written))
    return f"{written}:{port}"


def why_not_listening(host: str, port: int, written: str) -> str:
    """The sentence for a port that gRPC refused, from an attempt to bind it without gRPC."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
    except OSError as error:
        return (
            f"cannot listen on {written}:{port} ({error.strerror}): is another server using the port, or is the "
            f"address not this machine's?"
        )
    return f"gRPC refuses to serve on {written}:{port} with the certificates of this server, though it can read them"


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::", 0))
    except OSError:
        return False
    return True


def raise_file_limit() -> int:
    """Allow as many descriptors as the hard limit, which is returned: each follower has one. The launcher was
    started with the old limit, which the jobs inherit.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


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
    if os.getpid() == 1:  # in a container, where process 1 is the parent of all orphans
        loop.add_signal_handler(signal.SIGCHLD, reap)


def announce(worker: Worker, address: str) -> None:
    """Report on standard output that the server listens, and on standard error what it cannot give to jobs."""
    if worker.confines:
        say("jobs are confined: their own /tmp, shared memory and list of processes (`--run-as` needs `--confine`)")
    for note in worker.notes():
        say(f"warning: on this server {note}")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard < FEW_FILES:
        say(
            f"warning: this server may open {hard} descriptors, and each connection and each output that is followed "
            f"takes one; `ulimit -Hn` or LimitNOFILE= gives more"
        )
    account = Account.of_server()
    systemd = os.path.isdir("/run/systemd/system")  # sd_booted(3)
    if systemd and account.uid != 0 and not os.path.exists(f"/var/lib/systemd/linger/{account.name}"):
        say(f"warning: {account.name} has no linger, so a logout ends jobs; `loginctl enable-linger` gives it")
    line = f"jobworker: serving on {address}, with {count_of(worker.running, 'job', 'jobs')} running\n"
    with contextlib.suppress(OSError):  # as in `say`; os.write leaves nothing for a flush at the end, which would fail
        os.write(1, line.encode())
    notify("READY=1")


def notify(state: str) -> None:
    """Report a state to systemd, if it asked for reports (sd_notify(3))."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel, contextlib.suppress(OSError):
            channel.sendto(state.encode(), "\0" + path[1:] if path.startswith("@") else path)


# --- 17. Client ----------------------------------------------------------------------------------------
# Owns the connection to a server: the channel, the retries that are safe, and the reason why a server is not reached.
# It knows nothing of this machine's jobs.

CONNECT_SECONDS = 4.0
CALL_SECONDS = STOP_SECONDS + 30.0
FIRST_ANSWER_SECONDS = 2.0  # how long `run` waits for an answer before it says that its server is away
STOP_REQUEST_SECONDS = 1.0  # `run` waits so long for the end of its job, and then writes output again
# How long the answer of a stop may take after its grace. A server waits up to 165 s for a job of an engine, and longer
# with a `serve --grace` of more than 5 s: 6 minutes of it are covered. Keepalive finds a server that is away.
STOP_ANSWER_SECONDS = 900.0
STOPS_AT_ONCE = 32  # calls of one `stop`; half of OWNER_CALLS, so that the owner's other clients are not refused
ONCE = ("SignalJob", "RemoveJob")  # calls whose second try would have an effect, or a wrong answer
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0  # seconds between tries
CLIENT_OPTIONS = [
    *KEEPALIVE_OPTIONS,
    ("grpc.min_reconnect_backoff_ms", int(CONNECT_SECONDS * 1000)),  # gRPC also limits one connect to this time
    ("grpc.use_local_subchannel_pool", 1),  # a new channel makes a new connection, without the back-off of an old one
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),
]
# grpc.experimental.ChannelOptions. Without it each message passes from one thread to another: a list of 10,000 jobs
# then cost the client 0.7 s of CPU instead of 0.4.
STREAM_OPTIONS = [*CLIENT_OPTIONS, ("SingleThreadedUnaryStream", 1)]


@dataclasses.dataclass(frozen=True)
class Credentials:
    """What a client shows and trusts, as PEM, the files that it came from, and the server's address if one is known."""

    key: bytes
    certificate: bytes
    authorities: bytes
    file: str
    authorities_file: str
    server: str = ""

    def warning(self) -> str:
        """A sentence if the certificate, or an authority of the server, is at its end or near it; else empty."""
        soon = time.strftime("%Y%m%d", time.gmtime(time.time() + WARN_DAYS * DAY))
        for file, content, remedy in (
            (self.file, self.certificate, "on the server, `identity NAME --renew` makes a new one"),
            (self.authorities_file, self.authorities, "ask the server's admin for the new authority"),
        ):
            with contextlib.suppress(ValueError, IndexError):  # what cannot be read has its sentence elsewhere
                until = min(map(last_day, pem_blocks(content, b"CERTIFICATE")))
                if until <= soon:
                    day = f"{until[:4]}-{until[4:6]}-{until[6:]}"
                    return f"warning: the certificate in {file} is valid until {day}; {remedy}"
        return ""


def read_credentials(certs: pathlib.Path, identity: str) -> Credentials:
    """The credentials in one file, or of a NAME in the folder `certs`. Raises JobWorkerError."""
    if "/" in identity or identity.endswith(".pem"):
        return read_bundle(pathlib.Path(identity))
    authorities, key, certificate = certs / "server-ca.pem", certs / f"{identity}.key", certs / f"{identity}.pem"
    try:
        files = read_file(authorities), read_key(key), read_file(certificate)
    except JobWorkerError as error:
        hint = f"`-r NAME` picks another identity, `--certs DIR` another folder than {certs}"
        raise error if isinstance(error, ExposedKeyError) else JobWorkerError(f"{error}; {hint}") from None
    return Credentials(files[1], files[2], files[0], str(certificate), str(authorities))


def read_bundle(path: pathlib.Path) -> Credentials:
    """One file with a key, the client's certificate, and then the server's authorities. If a later certificate is
    self-signed, those that are not are the client's intermediates.
    """
    content = read_key(path)
    keys = [
        block
        for label in (b"PRIVATE KEY", b"EC PRIVATE KEY", b"RSA PRIVATE KEY")
        for block in pem_blocks(content, label)
    ]
    certificates = pem_blocks(content, b"CERTIFICATE")
    if len(keys) != 1 or len(certificates) < 2:
        raise JobWorkerError(
            f"{path} is no file of an identity: it needs a key, its certificate and a server authority, in PEM; "
            f"`identity NAME --bundle` makes one"
        )
    try:
        roots = [block for block in certificates[1:] if is_self_signed(block)] or certificates[1:]
    except (ValueError, IndexError):
        raise JobWorkerError(f"{path} holds a certificate that cannot be read") from None
    chain = [block for block in certificates if block not in roots]
    server = re.search(rb"^# jobworker server: (\S+)", content, re.MULTILINE)
    address = server[1].decode("utf-8", "replace") if server else ""
    return Credentials(keys[0], b"".join(chain), b"".join(roots), str(path), str(path), address)


def der_elements(content: bytes) -> list[tuple[int, bytes]]:
    """The elements in DER (X.690, 8.1), each with its tag. A client reads this little itself, since the x509 package
    would add 60 ms or more to each call.
    """
    found, position = [], 0
    while position < len(content):
        tag, size = content[position], content[position + 1]
        position += 2
        if size & 0x80:
            length = size & 0x7F
            size = int.from_bytes(content[position : position + length], "big")
            position += length
        found.append((tag, content[position : position + size]))
        position += size
    return found


def certificate_fields(block: bytes) -> list[tuple[int, bytes]]:
    """Serial, algorithm, issuer, validity, subject and the rest of a certificate (RFC 5280, 4.1)."""
    certificate = der_elements(binascii.a2b_base64(block.split(b"-----")[2]))[0][1]
    fields = der_elements(der_elements(certificate)[0][1])
    return fields[1:] if fields[0][0] == 0xA0 else fields


def is_self_signed(block: bytes) -> bool:
    fields = certificate_fields(block)
    return fields[2] == fields[4]


def last_day(block: bytes) -> str:
    """The day on which a certificate ends, as `20271231` (RFC 5280, 4.1.2.5)."""
    tag, moment = der_elements(certificate_fields(block)[3][1])[1]
    text = moment.decode("ascii")
    if tag == 0x17:
        text = ("19" if text[:2] >= "50" else "20") + text
    return text[:8]


@dataclasses.dataclass(frozen=True)
class ClientOptions:
    """The server, and the client's credentials."""

    host: str
    port: int
    credentials: Credentials
    retry_for: float = 60.0

    @property
    def address(self) -> str:
        return written_address(self.host, self.port)


class Sink:
    """Where a stream is written: `write` gets the number of an output (1: standard output, 2: standard error) and
    bytes. `offsets` has the offset of each output's next byte; it changes only after a whole chunk was written.
    """

    def __init__(self, write: Callable[[int, Content], None], offset: int = 0, error_offset: int = 0) -> None:
        self._write = write
        self.offsets = {1: offset, 2: error_offset}
        self.busy = False  # a signal handler must not raise now, or bytes would be written twice

    def take(self, number: int, chunk: Content) -> None:
        self.busy = True  # and it stays so if the write fails: a signal must not interrupt the handler of the error
        self._write(number, chunk)
        self.offsets[number] += len(chunk)
        self.busy = False


class Sending:
    """The input of one job, which gRPC reads from `file` and sends in a thread of its own."""

    def __init__(self, channel: grpc.Channel, job_id: str, file: io.FileIO, message_bytes: int) -> None:
        self.job_id = job_id
        self.size = 0  # bytes that were sent
        self._file = file
        self._message_bytes = message_bytes
        self._failure = ""  # why the file could not be read
        self._made = threading.Event()
        self._begun = threading.Event()  # the first message was sent, or the call has ended
        self._turn = threading.Lock()  # taken once: by the reader of the file, or by a caller who makes another call
        call: Any = channel.stream_unary(SEND_INPUT, None, pb.SendInputResponse.FromString)
        self._call = call.future(self._messages())
        self._made.set()
        self._call.add_done_callback(lambda _: self._begun.set())

    def _messages(self) -> Iterator[bytes]:
        yield pb.SendInputRequest(id=self.job_id).SerializeToString()
        if not self._turn.acquire(blocking=False):
            return
        self._begun.set()
        try:
            while chunk := self._read():
                yield encode_input(chunk)
                self.size += len(chunk)
        except OSError as error:
            self._failure = f"cannot read {self._file.name or 'standard input'}: {error.strerror}"
            self._made.wait()
            self._call.cancel()  # before the end of this iterator, which gRPC sends as the end of input

    def _read(self) -> bytes:
        while (chunk := self._file.read(self._message_bytes)) is None:  # it does not block, and has nothing now
            select.select([self._file], [], [])
        return chunk

    def begin(self) -> Self:
        """Wait until gRPC begins to read the file. Raises grpc.RpcError if the server was lost before. Then the file
        will not be read, and another call can send it.
        """
        self._begun.wait()
        lost: Any = self._call
        if lost.done() and is_loss(lost.code().name, lost.details() or "") and self._turn.acquire(blocking=False):
            raise lost
        return self

    @property
    def is_under_way(self) -> bool:
        return not self._call.done()

    @property
    def is_refused(self) -> bool:
        """Whether the server may have taken nothing. Then it stops no job, and the job waits for its input."""
        if not self._call.done() or self._call.code() in (grpc.StatusCode.OK, grpc.StatusCode.FAILED_PRECONDITION):
            return False
        return bool(self._failure) or not is_loss(self._call.code().name, self._call.details() or "")

    def when_refused(self, act: Callable[[], None]) -> None:
        """Call `act` once if the input is refused, in a thread of gRPC's."""
        self._call.add_done_callback(lambda _: act() if self.is_refused else None)

    def finish(self) -> None:
        """Wait until the job has its input, or takes no more of it. Raises JobWorkerError."""
        with contextlib.suppress(grpc.RpcError, grpc.FutureCancelledError):
            self._call.result()
        if failure := self.failure():
            raise failure

    def failure(self) -> JobWorkerError | None:
        """Why the input was cut or refused; None: it was not, or it is under way."""
        if not self._call.done() or self._call.code() is grpc.StatusCode.OK:
            return None
        details = self._failure or self._call.details() or self._call.code().name
        if self._call.code() is grpc.StatusCode.FAILED_PRECONDITION:
            return JobWorkerError(details)
        return self.cut(details)

    def cut(self, reason: str = "the server was lost") -> InputCutError:
        return InputCutError(f"the input of job {self.job_id} was cut after {self.size} bytes: {reason}")


def ask_once(channel: grpc.Channel, method: str, request: Any, reply: Any, timeout: float | None = CALL_SECONDS) -> Any:
    """One call with one answer, without a retry. Raises grpc.RpcError."""
    ask = channel.unary_unary(f"/{SERVICE_NAME}/{method}", type(request).SerializeToString, reply.FromString)
    return ask(request, timeout=timeout)


def stop_call(channel: grpc.Channel) -> Any:
    """The call StopJob; its `future(request, timeout)` sends one."""
    return channel.unary_unary(
        f"/{SERVICE_NAME}/StopJob", pb.StopJobRequest.SerializeToString, pb.StopJobResponse.FromString
    )


class Client:
    """Calls to one server. Every error is a JobWorkerError: the server's sentence, or why the server is not reached."""

    def __init__(self, options: ClientOptions) -> None:
        self._options = options
        self._credentials: Any = None
        self._reached = False  # by the last try
        self._known = False  # an earlier call has reached the server
        self.is_lost = False  # it was lost, and has not been reached since
        self._input_bytes = OLD_INPUT_BYTES

    def __enter__(self) -> Self:
        prepare_grpc()
        own = self._options.credentials
        self._credentials = grpc.ssl_channel_credentials(own.authorities, own.key, own.certificate)
        if warning := own.warning():
            say(warning)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Do nothing: each call closes its channel."""

    def call(self, method: str, request: Any, reply: Any, timeout: float | None = CALL_SECONDS) -> Any:
        """One call, repeated when the server was lost, unless a second one would have an effect of its own."""

        def attempt(channel: grpc.Channel) -> Any:
            return ask_once(channel, method, request, reply, timeout)

        return self._with_retries(attempt, repeat=method not in ONCE)

    def send_stop(self, request: pb.StopJobRequest, connection: contextlib.ExitStack, hint: str) -> None:
        """Ask for a stop, and do not wait for the job's end. `hint` is said if the server is lost.

        It first asks for the job's status, with a deadline that is twice as long at each try. Without that call, a
        client could not tell a server that waits for the job's end from one that is away behind a network which drops
        packets. `connection` gets the connection, since a stop ends with it if the server has not begun with it.
        """
        patience = FIRST_ANSWER_SECONDS / 2

        def attempt(channel: grpc.Channel) -> None:
            nonlocal patience
            patience = min(2 * patience, CALL_SECONDS)
            try:
                ask_once(channel, "GetJobStatus", pb.GetStatusRequest(id=request.id), pb.GetStatusResponse, patience)
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise UnavailableError(f"{self._options.address} does not answer") from None
                raise
            self._note_reached()
            ask = stop_call(channel)
            with contextlib.suppress(grpc.FutureTimeoutError):
                ask.future(request).result(STOP_REQUEST_SECONDS)

        self._with_retries(attempt, connection=connection, hint=hint)

    def stop(
        self,
        requests: Iterable[pb.StopJobRequest],
        timeout: float,
        report: Callable[[str, JobWorkerError | None], None],
    ) -> None:
        """Stop several jobs at the same time. `report` gets each id when its call has ended, and what went wrong."""
        rest = {request.id: request for request in requests}

        def attempt(channel: grpc.Channel) -> None:
            for job_id, failure in self._stop_all(channel, rest.values(), timeout):
                del rest[job_id]
                report(job_id, failure)

        self._with_retries(attempt)

    def _stop_all(
        self, channel: grpc.Channel, requests: Iterable[pb.StopJobRequest], timeout: float
    ) -> Iterator[tuple[str, JobWorkerError | None]]:
        """Send these stops, and yield each id when its call has ended. Raises grpc.RpcError or JobWorkerError.

        A call beyond `--owner-calls` is sent again when another one has ended. It has a second try then, because the
        server counts a call for a moment after its answer.
        """
        ask = stop_call(channel)
        ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
        waiting = list(requests)[::-1]
        calls: dict[Any, pb.StopJobRequest] = {}
        most, second_try = STOPS_AT_ONCE, 1
        while waiting or calls:
            while waiting and len(calls) < most:
                call = ask.future(waiting[-1], timeout=timeout)
                calls[call] = waiting.pop()
                call.add_done_callback(ended.put)
            call = ended.get()
            request = calls.pop(call)
            failure = self._refusal(call, request.id, timeout)
            self._note_reached()
            is_exhausted = call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            if is_exhausted and (calls or second_try):
                waiting.append(request)
                most, second_try = len(calls) + second_try, 0
                continue
            if not is_exhausted:
                most, second_try = min(STOPS_AT_ONCE, most + 1), 1
            yield request.id, failure

    def _refusal(self, call: Any, job_id: str, timeout: float) -> JobWorkerError | None:
        """Why a job was not stopped by this call, which has ended. Raises grpc.RpcError or JobWorkerError."""
        error = call.exception()
        if error is None:
            return None
        if is_loss(error.code().name, error.details() or ""):
            raise error
        failure = self._explained(error, retried=False)
        if isinstance(failure, NoAnswerError):
            return NoAnswerError(
                f"job {job_id} has not ended yet: {self._options.address} did not answer its stop within "
                f"{timeout:g} s, and the stop goes on; its status tells when it has ended"
            )
        if not isinstance(failure, OneJobError):
            raise failure
        return failure

    def start(self, request: pb.StartJobRequest) -> str:
        """Start a job, and return its id. Raises OldServerError if it needs input and the server knows of none."""

        def attempt(channel: grpc.Channel) -> str:
            if request.input:
                self._check_input(channel)
            return str(ask_once(channel, "StartJob", request, pb.StartJobResponse).ID)

        job_id: str = self._with_retries(attempt)
        return job_id

    def _check_input(self, channel: grpc.Channel) -> None:
        """Ask how much input one message may have. An older server would start the job with /dev/null, so this comes
        before the start.
        """
        ask = channel.stream_unary(SEND_INPUT, pb.SendInputRequest.SerializeToString, pb.SendInputResponse.FromString)
        try:
            ask(iter([pb.SendInputRequest()]), timeout=CALL_SECONDS)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                raise OldServerError(f"the one at {self._options.address} does not know `--input`") from None
            if error.code() is not grpc.StatusCode.INVALID_ARGUMENT:  # there is no job without an id
                raise
            self._input_bytes = int(metadata_of(error).get(INPUT_BYTES_KEY, OLD_INPUT_BYTES))

    @contextlib.contextmanager
    def sending(self, job_id: str, file: io.FileIO) -> Iterator[Sending]:
        """Send a file as the input of a job while the block runs. The end of the block cuts what is under way.

        Raises InputCutError if the server was lost before the first byte, and does not come back.
        """

        def attempt(channel: grpc.Channel) -> Sending:
            return Sending(channel, job_id, file, self._input_bytes).begin()

        with contextlib.ExitStack() as connection:
            try:
                sending = self._with_retries(attempt, connection=connection)
            except UnavailableError as error:
                sentence = f"the input of job {job_id} was cut after 0 bytes, and its server stops it: {error}"
                raise InputCutError(sentence) from None
            yield sending

    def list(self, request: pb.ListJobsRequest) -> list[pb.GetStatusResponse]:
        """The jobs that the request asks for, oldest first."""
        request.batches = True

        def attempt(channel: grpc.Channel) -> list[pb.GetStatusResponse]:
            reply = pb.GetStatusResponse.FromString
            ask = channel.unary_stream(f"/{SERVICE_NAME}/ListJobs", pb.ListJobsRequest.SerializeToString, reply)
            return [each for first in ask(request, timeout=CALL_SECONDS) for each in (first, *first.more)]

        found: list[pb.GetStatusResponse] = self._with_retries(attempt, options=STREAM_OPTIONS)
        return found

    def stream(
        self, job_id: str, sink: Sink, *, tail: int | None = None, follow: bool = True
    ) -> pb.GetStatusResponse | None:
        """Write a job's outputs to `sink`, each from its offset. After a loss of the server it resumes.

        Returns how the job ended; None: it was not followed to its end, or an older server has deleted it.
        """

        def attempt(channel: grpc.Channel) -> pb.GetStatusResponse | None:
            nonlocal tail
            offsets = {"offset": sink.offsets[1], "error_offset": sink.offsets[2]}
            request = pb.GetStreamRequest(id=job_id, **offsets, tail=tail, no_follow=not follow)
            ask = channel.unary_stream(
                f"/{SERVICE_NAME}/GetOutputStream", pb.GetStreamRequest.SerializeToString, decode_output
            )
            messages = ask(request)
            metadata = dict(messages.initial_metadata())
            if metadata:  # a server of an earlier version sends none
                self._note_reached()
            if tail is not None and OFFSET_KEYS[0] not in metadata:
                next(messages, None)  # raises the error of the call, if there is one
                raise OldServerError(f"the one at {self._options.address} does not know `--tail`")
            if tail is not None:
                tail = None
                sink.offsets = {number: int(metadata.get(key, 0)) for number, key in enumerate(OFFSET_KEYS, 1)}
            for pieces in messages:
                self._note_reached()
                for number, chunk in enumerate(pieces, 1):
                    if chunk:
                        sink.take(number, chunk)
            if not follow:
                return None
            if ending := metadata_of(messages).get(ENDING_KEY):
                return pb.GetStatusResponse.FromString(ending)
            return ending_by_status(channel, job_id, sink.offsets)

        ending: pb.GetStatusResponse | None = self._with_retries(attempt, options=STREAM_OPTIONS)
        return ending

    def _with_retries(
        self,
        attempt: Callable[[grpc.Channel], Any],
        *,
        repeat: bool = True,
        options: Sequence[tuple[str, Any]] = CLIENT_OPTIONS,
        connection: contextlib.ExitStack | None = None,
        hint: str = "",
    ) -> Any:
        """Try until it works, is refused, or `retry_for` seconds have passed since the server was lost. `connection`
        gets the channel of the try that worked; otherwise it is closed. `hint` ends the sentence about the loss.
        """
        lost_at, pause = 0.0, FIRST_PAUSE
        while True:
            self._reached, began = False, time.monotonic()
            try:
                return self._try(attempt, options, connection)
            except grpc.RpcError as error:
                failure = self._explained(error, retried=lost_at > 0)
            except UnavailableError as error:
                failure = error
            if failure.status != "UNAVAILABLE" or self._options.retry_for == 0 or not repeat:
                raise failure
            if not lost_at or self._reached:
                lost_at, pause = time.monotonic(), FIRST_PAUSE
                self.is_lost = self._known = True
                say(f"{self._options.address} was lost ({failure}); trying for {self._options.retry_for:g} s{hint}")
            if time.monotonic() + pause > lost_at + self._options.retry_for:
                raise UnavailableError(f"gave up after {self._options.retry_for:g} s: {failure}")
            time.sleep(max(0.0, pause - (time.monotonic() - began)))
            pause = min(LONGEST_PAUSE, 2 * pause)

    def _try(
        self,
        attempt: Callable[[grpc.Channel], Any],
        options: Sequence[tuple[str, Any]],
        connection: contextlib.ExitStack | None,
    ) -> Any:
        """One try of `_with_retries`, with a connection of its own."""
        with contextlib.ExitStack() as resources:
            channel = resources.enter_context(grpc.secure_channel(self._options.address, self._credentials, options))
            result = attempt(channel)
            self._note_reached()
            if connection is not None:
                connection.enter_context(resources.pop_all())
            return result

    def _note_reached(self) -> None:
        self._reached = self._known = True
        self.is_lost = False

    def _explained(self, error: Any, *, retried: bool) -> JobWorkerError:
        """The error for gRPC's. A server that was never reached is reported at once: a retry helps only if a server
        was reached and then lost, by this call (`retried`) or by an earlier one.
        """
        details = error.details() or ""
        status = error.code().name
        if (
            status == "UNAVAILABLE"
            and not self._reached
            and re.match(r"failed to connect|DNS|errors? resolving", details)
        ):
            sentence = why_unreachable(self._options) or f"cannot reach {self._options.address}: {details}"
            return UnavailableError(sentence) if retried or self._known else JobWorkerError(sentence)
        if is_loss(status, details):
            return UnavailableError(details or status)
        if status == "DEADLINE_EXCEEDED":
            return NoAnswerError(f"{self._options.address} did not answer in time")
        if status == "RESOURCE_EXHAUSTED" and "larger than max" in details:  # gRPC's own sentence
            return JobWorkerError(
                f"the command with its arguments and its environment is larger than a server takes (2 MiB): "
                f"{FILE_INSTEAD}"
            )
        if status == "UNIMPLEMENTED":
            return OldServerError(f"the one at {self._options.address} does not know this call")
        if code := metadata_of(error).get(SHELL_CODE_KEY):
            return CannotRunError(details, int(code))
        return (BusyError if status == "RESOURCE_EXHAUSTED" else OneJobError)(details or status)


def metadata_of(call: Any) -> dict[str, Any]:
    """What a server sent at the end of a call, or with its error."""
    return dict(call.trailing_metadata() or ())


def is_loss(status: str, details: str) -> bool:
    """Whether gRPC's error means that the server or the connection was lost.

    A server that ends may reset a call before it has sent a status. gRPC reports that as CANCELLED, which this client
    never asks for, as INTERNAL or as UNKNOWN.
    """
    return status in ("UNAVAILABLE", "CANCELLED") or bool(re.search("RST_STREAM|GOAWAY|Stream removed", details))


def ending_by_status(channel: grpc.Channel, job_id: str, offsets: Mapping[int, int]) -> pb.GetStatusResponse | None:
    """How a job ended, from an older server, which does not tell it at the end of a stream; None: it was deleted.

    Raises UnavailableError if the stream ended before its job did, or before the last byte.
    """
    try:
        request = pb.GetStatusRequest(id=job_id)
        status: pb.GetStatusResponse = ask_once(channel, "GetJobStatus", request, pb.GetStatusResponse)
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.NOT_FOUND:
            return None  # its streams had every byte before that
        raise
    if status.status == pb.RUNNING or status.output_bytes > offsets[1] or status.error_bytes > offsets[2]:
        raise UnavailableError("the stream ended before the job's output did")
    return status


def why_unreachable(options: ClientOptions) -> str:
    """Why there is no connection, in one sentence; empty: unknown. gRPC does not tell, so this connects without it."""
    try:
        raw = socket.create_connection((options.host, options.port), CONNECT_SECONDS)
    except (socket.gaierror, UnicodeError):  # UnicodeError: the text cannot be a host name
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
    own = options.credentials
    context = ssl.create_default_context(cadata=own.authorities.decode("ascii", "replace"))
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["h2"])
    try:
        with open(os.memfd_create("credentials"), "wb") as file:  # the ssl package reads keys from files only
            file.write(own.certificate + own.key)
            file.flush()
            context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")
        with context.wrap_socket(raw, server_hostname=options.host) as channel:
            with contextlib.suppress(ConnectionResetError):
                # In TLS 1.3 the server judges the client after the handshake. HTTP/2's first frame means: accepted.
                if channel.recv(1):
                    return ""
            return (
                f"{options.address} refuses {own.file}: it is out of date, not for clients, not from the client "
                f"authority of that server, or has an extension that is marked as critical and that TLS does not know"
            )
    except ssl.SSLCertVerificationError as error:
        if error.verify_code in (62, 64):  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH
            return (
                f"the certificate of {options.address} is not for {options.host!r}; on the server, "
                f"`serve --name {options.host}` makes one that is"
            )
        return f"the certificate of {options.address} is not trusted by {own.authorities_file}: {error.verify_message}"
    except ssl.SSLError as error:
        reason = (error.reason or str(error)).replace("_", " ").lower()
        return f"{options.address} does not speak TLS 1.3 with {own.file}: {reason}"


# --- 18. Options and printed lines ---------------------------------------------------------------------
# Owns how a person types a size, a duration or a job, the options that several verbs have, and how lines are printed.

SIZES = {"": 1, "k": KIB, "m": MIB, "g": GIB, "t": 1 << 40}
DURATIONS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": DAY}
PROGRAM = "jobworker.pyz"


def quantity(text: str, units: Mapping[str, int], kind: str) -> float:
    suffix = "(?:i?b)?" if units is SIZES else ""
    found = re.fullmatch(rf"(\d+(?:\.\d+)?)\s*([a-z]?){suffix}", text.strip().lower(), re.ASCII)
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
    count = quantity(text, {"": 1}, "whole number")
    if count != int(count):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(count)


def as_words(text: str) -> tuple[str, ...]:
    """Words as a shell splits them."""
    try:
        words = tuple(shlex.split(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} has a quotation mark or a backslash without its pair") from None
    if not words or not words[0] or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} names no program")
    return words


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


def utf8_text(text: str) -> str:
    """A word for the wire, which is UTF-8. Raises UsageError for other bytes."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{text!r} is not UTF-8, and every word of a command line must be") from None


def default_certs() -> pathlib.Path:
    """`./certs` if no other user could have made it, else the folder of the machine or of the user."""
    local = pathlib.Path("certs")
    with contextlib.suppress(OSError):
        facts = local.stat()
        if stat.S_ISDIR(facts.st_mode) and facts.st_uid in (0, os.geteuid()) and not facts.st_mode & 0o022:
            return local
    return pathlib.Path("/etc/jobworker") if os.geteuid() == 0 else user_folder("XDG_CONFIG_HOME", ".config")


def default_state() -> pathlib.Path:
    return pathlib.Path("/var/lib/jobworker") if os.geteuid() == 0 else user_folder("XDG_STATE_HOME", ".local/state")


def user_folder(variable: str, below_home: str) -> pathlib.Path:
    home = os.environ.get("HOME") or Account.of_server().home
    return pathlib.Path(os.environ.get(variable) or os.path.join(home, below_home)) / "jobworker"


def write_to(descriptor: int, chunk: Content) -> None:
    """Write all bytes to a descriptor (1: standard output, 2: standard error), also if it does not block."""
    rest = memoryview(chunk)
    while rest:
        try:
            rest = rest[os.write(descriptor, rest) :]
        except BlockingIOError:
            select.select([], [descriptor], [])


def print_line(text: str) -> None:
    """Print one line of what a server or a file said. Every verb prints such text with this function, or as JSON with
    the next, so that no control character reaches a terminal.
    """
    print(printable(text))


def printable_json(value: Any, indent: int | None = None) -> str:
    """JSON that a terminal shows as it is. JSON leaves DEL, C1 and the marks of direction unescaped."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return CONTROL.sub(lambda found: "\n" if found[0] == "\n" else f"\\u{ord(found[0]):04x}", text)


Row: TypeAlias = "tuple[str, Callable[[str], Any], str, Any, str]"  # flag, type, metavar, default, help
LIMIT_OPTIONS: list[tuple[str, Callable[[str], Any], str, str, str]] = [  # name, type, metavar, what it is, default
    ("cpu", as_cpus, "CPUS", "CPUs", "1"),
    ("memory", as_bytes, "SIZE", "memory", "512M"),
    ("pids", as_count, "N", "processes and threads", "512"),
    ("io", as_bytes, "SIZE", "bytes a second, each way on each disk", "64M"),
]


def add_rows(parser: argparse._ActionsContainer, rows: Sequence[Row]) -> None:
    for flag, kind, metavar, default, text in rows:
        parser.add_argument(flag, type=kind, metavar=metavar, default=default, help=text)


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
        default=os.environ.get("JOBWORKER_SERVER") or None,
        help=f"the server's address (env JOBWORKER_SERVER; default: the one in the identity's file, else "
        f"localhost:{DEFAULT_PORT})",
    )
    parser.add_argument(
        "-r",
        "--identity",
        metavar="NAME|FILE",
        default=os.environ.get("JOBWORKER_IDENTITY") or "user",
        help="use NAME.pem and NAME.key of the folder, or one file that `identity --bundle` made (a word with a slash, "
        "or ending in .pem; it needs no --certs and no --server) (env JOBWORKER_IDENTITY; default: user)",
    )
    parser.add_argument(
        "--retry-for",
        type=as_seconds,
        metavar="TIME",
        default=60.0,
        help="how long to retry after a server that was reached is lost (default: 60s; 0: no retry)",
    )


def add_job_arguments(parser: argparse.ArgumentParser, nargs: str = "?") -> None:
    parser.add_argument("-j", dest="job", metavar="JOB", help="the same as JOB")
    parser.add_argument("--last", action="store_true", help="the newest of your jobs")
    parser.add_argument(
        "jobs",
        nargs=nargs,
        metavar="JOB",
        help=f"a job: its id, the first {SHORTEST_PREFIX} or more characters of it, or its name",
    )


def chosen_jobs(client: Client, options: argparse.Namespace) -> list[str]:
    """The ids of the jobs that the command line names. Raises UsageError or JobWorkerError."""
    words = [options.jobs] if isinstance(options.jobs, str) else list(options.jobs or ())
    words += [options.job] if options.job is not None else []
    if options.last:
        newest = client.list(pb.ListJobsRequest(limit=1))
        if not newest:
            raise JobWorkerError("you have no job")
        return [newest[0].id, *(find_job(client, word) for word in words)]
    if not words:
        needs, more = ("a job and a signal", " SIGNAL") if options.verb == "signal" else ("a job", "")
        raise UsageError(f"`{options.verb}` needs {needs}: {PROGRAM} {options.verb} -j ID{more}")
    return [find_job(client, word) for word in words]


def all_jobs(client: Client, options: argparse.Namespace) -> tuple[list[str], list[JobWorkerError]]:
    """The ids of the jobs that the command line names, each once, and the errors of the words that name none."""
    words = list(options.jobs) + ([options.job] if options.job is not None else [])
    if options.last or "" in words or len(words) < 2:
        return chosen_jobs(client, options), []
    found: list[str] = []
    failures: list[JobWorkerError] = []
    for word in words:
        try:
            found.append(find_job(client, word))
        except (OneJobError, BadRequestError) as error:
            failures.append(error)
    return list(dict.fromkeys(found)), failures


def say_failures(failures: Iterable[JobWorkerError]) -> int:
    """Say each sentence once, after the jobs that went well. Returns the exit code."""
    sentences = dict.fromkeys(map(str, failures))
    for sentence in sentences:
        say(sentence)
    return 1 if sentences else 0


def chosen_job(client: Client, options: argparse.Namespace) -> str:
    if options.job is not None and options.jobs:
        raise UsageError(f"`{options.verb}` takes one job")
    jobs = chosen_jobs(client, options)
    if len(jobs) != 1:
        raise UsageError(f"`{options.verb}` takes one job")
    return jobs[0]


def find_job(client: Client, word: str) -> str:
    """The id of the job that a word names: a whole id, four or more characters of its beginning, or a name."""
    word = utf8_text(word)
    if len(word) == 36 and word.count("-") == 4:
        return check_id(word)
    if not word:
        raise UsageError("the job id is empty: was it taken from a variable that is not set?")
    found = client.list(pb.ListJobsRequest(prefix=word))
    if not found:
        raise OneJobError(
            f"there is no job {word!r}: give the first {SHORTEST_PREFIX} or more characters of an id, or a job's name"
        )
    if len(found) > 1:
        ids = ", ".join(status.id for status in found[-5:])
        raise OneJobError(f"{word!r} names {len(found)} jobs; give more of an id: {ids}")
    return found[0].id


def client_of(options: argparse.Namespace) -> Client:
    certs = pathlib.Path(options.certs) if options.certs else default_certs()
    credentials = read_credentials(certs, options.identity)
    host, port = options.server or ("", DEFAULT_PORT)
    if (host, port) == ("", DEFAULT_PORT) and credentials.server:
        try:
            host, port = host_and_port(credentials.server)
        except argparse.ArgumentTypeError as error:
            raise JobWorkerError(f"the server's address in {credentials.file} is wrong: {error}") from None
    return Client(ClientOptions(host or "localhost", port, credentials, options.retry_for))


# --- 19. Verbs of the server's machine -----------------------------------------------------------------
# Owns `serve`, `identity`, `revoke` and `unit`. A verb is a function `add_X_arguments` beside a function `run_X`, and
# one row of VERBS (section 21).

PLACE_OPTIONS: list[Row] = [
    (
        "--listen",
        host_and_port,
        "HOST:PORT",
        ("", DEFAULT_PORT),
        f"the address to listen on (default: all addresses, port {DEFAULT_PORT})",
    ),
    (
        "--state",
        str,
        "DIR",
        None,
        "the folder of jobs and their output (default: /var/lib/jobworker for root, else ~/.local/state/jobworker)",
    ),
    (
        "--cgroup",
        str,
        "PATH",
        None,
        "the root of the cgroup tree (default: `jobworker` below the highest cgroup that the server may manage)",
    ),
    (
        "--without",
        str,
        "LIST",
        "",
        "serve even without these: cpu,memory,pids,io,confine, `all` limits, or `auto` (all that this machine lacks)",
    ),
]
ENDING_OPTIONS: list[Row] = [
    ("--timeout", as_seconds, "TIME", 0.0, "end a job after this time (default: never)"),
    ("--max-output", as_bytes, "SIZE", OUTPUT_LIMIT, "end a job that prints more (default: 1G)"),
]
THROUGH_HELP = """put these words before each command. {id} {owner} {name} {cpus} {memory_mb} {minutes} (0: none) stand
for values of the job. {command} stands for the command, quoted for a shell. In a word with {command}, {owner} and
{name} are quoted too. `slurm [OPTION…]`: the words for Slurm's srun, with more of its options"""
THROUGH_END_HELP = """a command that tells how the engine saw a job's end. It prints `REASON NODE` if the job did not
end by itself, else `- NODE` (default: for `slurm`, by squeue; otherwise none)"""
ENGINE_OPTIONS: list[Row] = [
    ("--through", as_words, "WORDS", (), THROUGH_HELP),
    ("--through-end", as_words, "WORDS", (), THROUGH_END_HELP),
    ("--grace", as_seconds, "TIME", GRACE, "with --through: the time from TERM to the kill (default: 5s)"),
]
KEEPING_OPTIONS: list[Row] = [
    ("--keep", as_seconds, "TIME", KEEP_SECONDS, "delete an ended job after this time (default: 7d; 0: never)"),
    ("--keep-bytes", as_bytes, "SIZE", 0, "delete the oldest ended jobs when their files exceed this (default: none)"),
    ("--reserve", as_share, "SHARE", RESERVE, "the share of the disk that jobs may not fill (default: 5%%)"),
    ("--max-jobs", as_count, "N", MAX_JOBS, f"jobs that run at the same time (default: {MAX_JOBS})"),
]
OWNER_OPTIONS: list[Row] = [
    ("--owner-memory", as_bytes, "SIZE", None, "memory of all jobs (default: 75%% of this machine's)"),
    ("--owner-pids", as_count, "N", None, "processes and threads of all jobs (default: a quarter of this machine's)"),
    ("--owner-cpu", as_cpus, "CPUS", None, "CPUs of all jobs (default: no bound; owners have equal shares)"),
    ("--owner-jobs", as_count, "N", None, "jobs that run at the same time (default: a quarter of --max-jobs)"),
    ("--owner-calls", as_count, "N", OWNER_CALLS, f"calls that are open at the same time (default: {OWNER_CALLS})"),
    ("--owner-streams", as_count, "N", OWNER_STREAMS, f"streams that are open (default: {OWNER_STREAMS})"),
]


# srun takes a lone `:` among the arguments for the start of another part of the job, with options. So the command is
# one word, which a shell on the node splits.
SLURM = (
    "srun", "--quiet", "--unbuffered", "--job-name={id}", "--comment={name}", "--nodes=1", "--ntasks=1",
    "--cpus-per-task={cpus}", "--mem={memory_mb}", "--time={minutes}",
)  # fmt: skip
SLURM_COMMAND = ("--", "sh", "-c", "exec {command}")
# How Slurm saw a job's end. Slurm offers no event. So squeue is repeated while it does not answer, and while the job is
# COMPLETING, because squeue does not tell the final state then. A job that still waits or runs has lost its srun, so it
# is cancelled. scancel is repeated until it works: otherwise the job would hold its resources for ever.
SLURM_END = (
    "sh", "-c",
    """command -v squeue >/dev/null || exit
while ! line=$(squeue --noheader --all --me --states=all --name="$1" --format="%T %N" 2>/dev/null) ||
    [ "${{line%% *}}" = COMPLETING ]; do sleep 0.1; done
node=${{line#* }}
case ${{line%% *}} in
    "") ;;
    OUT_OF_MEMORY) echo "OOM $node" ;;
    BOOT_FAIL | CANCELLED | DEADLINE | NODE_FAIL | PREEMPTED | TIMEOUT) echo "${{line%% *}} $node" ;;
    COMPLETED | FAILED) echo "- $node" ;;
    *) echo "- $node"; until scancel --quiet --me --name="$1"; do sleep 0.1; done ;;
esac 2>/dev/null""",
    "sh", "{id}",
)  # fmt: skip
MAX_DEFAULTS = {
    "cpu": "--owner-cpu, or this machine's",
    "memory": "--owner-memory",
    "pids": "--owner-pids",
    "io": "no bound",
}


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.fromfile_prefix_chars = "@"
    parser.epilog = "@FILE reads options from FILE. Each line is split as a shell does it; # begins a comment."
    add_certs_arguments(parser)
    place = parser.add_argument_group("addresses and folders")
    add_rows(place, PLACE_OPTIONS)
    place.add_argument(
        "--no-confine", action="store_true", help="let jobs share /tmp, shared memory and the list of processes"
    )
    names = "names that clients use for this server; server.pem is issued again if it lacks one"
    place.add_argument("--name", nargs="+", action="extend", metavar="NAME", default=[], help=names)
    limits = parser.add_argument_group("limits of a job (--X: the default; --max-X: the most that `start` may ask for)")
    for name, kind, metavar, what, default in LIMIT_OPTIONS:
        limits.add_argument(f"--{name}", type=kind, metavar=metavar, help=f"{what} (default: {default})")
        limits.add_argument(f"--max-{name}", type=kind, metavar=metavar, help=f"default: {MAX_DEFAULTS[name]}")
    add_rows(limits, ENDING_OPTIONS)
    engine = parser.add_argument_group("an engine that runs the jobs on other machines")
    add_rows(engine, ENGINE_OPTIONS)
    engine.add_argument(
        "--accounts",
        choices=("own", "system"),
        default="own",
        help="own: a uid of this server's for each owner; system: the account of the owner's name (default: own)",
    )
    together = "limits of all jobs and calls of one owner together (without root: memory, pids, cpu of all owners)"
    add_rows(parser.add_argument_group(together), OWNER_OPTIONS)
    keep = parser.add_argument_group("retention")
    add_rows(keep, KEEPING_OPTIONS)
    keep.add_argument(
        "--stop-jobs", action="store_true", help="stop all jobs when the server ends (default: they go on)"
    )


def run_serve(options: argparse.Namespace) -> int:
    prepare_grpc()
    certs = (pathlib.Path(options.certs) if options.certs else default_certs()).absolute()
    worker = dataclasses.replace(worker_options(options), hidden=(str(certs),))
    made = prepare_folder(certs, options.name)
    if made:
        say(made)
    calls = CallLimits(options.owner_calls, options.owner_streams)
    return asyncio.run(serve(ServeOptions(worker, options.listen, certs, options.stop_jobs, calls)))


OWNER_OPTION_NAMES = tuple(flag[2:].replace("-", "_") for flag, *_ in OWNER_OPTIONS)


def worker_options(options: argparse.Namespace) -> WorkerOptions:
    limits = {name: getattr(options, name) for name, *_ in LIMIT_OPTIONS if getattr(options, name) is not None}
    defaults = Limits(**limits)
    owner = owner_limits(options)
    machine = Limits(cpu=owner.cpu or float(os.cpu_count() or 1), memory=owner.memory, pids=owner.pids, io=NO_BOUND)
    caps = {name: getattr(options, f"max_{name}") or getattr(machine, name) for name, *_ in LIMIT_OPTIONS}
    for name in (*limits, "max_cpu", "max_memory", "max_pids", "max_io", "max_output", "max_jobs", *OWNER_OPTION_NAMES):
        if getattr(options, name) == 0:
            raise UsageError(f"--{name.replace('_', '-')} 0 would let nothing run")
    for name in ("io", "max_io"):
        if (getattr(options, name) or IO_FLOOR) < IO_FLOOR:
            raise UsageError(f"--{name.replace('_', '-')} is at least 1M a second: below it, a stop would take minutes")
    same = ("cgroup", "timeout", "max_output", "keep", "keep_bytes", "reserve", "max_jobs", "accounts", "grace")
    through, through_end = engine_words(options.through, options.through_end)
    return WorkerOptions(
        state=pathlib.Path(options.state or default_state()).absolute(),
        without=chosen_without(options.without) | ({"confine"} if options.no_confine else set()),
        defaults=defaults,
        caps=Limits(**caps),
        owner=owner,
        through=through,
        through_end=through_end,
        **{name: getattr(options, name) for name in same},
    )


def engine_words(through: tuple[str, ...], through_end: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The words of --through and --through-end, with those of Slurm in place of `slurm`. Raises UsageError."""
    if through[:1] == ("slurm",):
        through, through_end = (*SLURM, *through[1:], *SLURM_COMMAND), through_end or SLURM_END
    if through_end and not through:
        raise UsageError("--through-end needs --through")
    for option, words, fields in (
        ("--through", through, WORD_FIELDS),
        ("--through-end", through_end, WORD_FIELDS[:-1]),
    ):
        try:
            check_words(words, fields)
        except BadRequestError as error:
            raise UsageError(f"{option}: {error}") from None
    return through, through_end


def owner_limits(options: argparse.Namespace) -> OwnerLimits:
    """The totals of one owner, which default to shares of this machine's (proc_meminfo(5), proc_sys_kernel(5)).

    systemd sets pid_max to 4,194,304, but the kernel allows threads-max threads: 192,730 with 24 GiB of memory.
    """
    memory = int(re.findall(r"MemTotal:\s+(\d+)", kernel_read("/proc/meminfo"))[0]) * KIB
    numbers = min(int(kernel_read(f"/proc/sys/kernel/{name}")) for name in ("pid_max", "threads-max"))
    return OwnerLimits(
        cpu=options.owner_cpu or 0.0,
        memory=options.owner_memory or int(memory * OWNER_MEMORY),
        pids=options.owner_pids or int(numbers * OWNER_PIDS),
        jobs=options.owner_jobs or max(1, options.max_jobs // 4),
    )


def chosen_without(text: str) -> frozenset[str]:
    names = frozenset(filter(None, text.split(",")))
    known = (*CONTROLLERS, "confine", "all")
    if unknown := names - {*known, "auto"}:
        raise UsageError(f"--without takes {', '.join(known)} and auto, not {', '.join(sorted(unknown))}")
    return names | {*CONTROLLERS, "auto"} if "all" in names else names


def as_days(text: str) -> int:
    days = as_count(text)
    if not 1 <= days <= AUTHORITY_DAYS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of days from 1 to {AUTHORITY_DAYS}")
    return days


def add_identity_arguments(parser: argparse.ArgumentParser) -> None:
    add_certs_arguments(parser)
    parser.add_argument(
        "name",
        nargs="?",
        metavar="NAME",
        help="the common name: the owner of the client's jobs, and the name of its files",
    )
    parser.add_argument(
        "--admin",
        action="store_true",
        help="make an admin: all jobs, and --run-as any account, root included (default: a user)",
    )
    parser.add_argument(
        "--renew", action="store_true", help="make a new key and certificate for a name that exists, with its roles"
    )
    days = f"how many days the certificate is valid (default: {LEAF_DAYS})"
    parser.add_argument("--days", type=as_days, metavar="N", default=LEAF_DAYS, help=days)
    parser.add_argument(
        "--bundle",
        nargs="?",
        type=host_and_port,
        const=("", DEFAULT_PORT),
        metavar="HOST[:PORT]",
        help="print one file for the client (key, certificate, server authority, the server's address; "
        "default: this machine's name); no file of the identity is left here",
    )
    table = "print the identities of this folder as a table; its column REVOKED has the day, or `no`"
    parser.add_argument("--list", action="store_true", help=table)


def run_identity(options: argparse.Namespace) -> int:
    folder = pathlib.Path(options.certs) if options.certs else default_certs()
    if options.list:
        return list_identities(folder)
    if not options.name:
        raise UsageError(f"`identity` needs a NAME: {PROGRAM} identity alice")
    name = checked_name(utf8_text(options.name), renew=options.renew)
    with locked_folder(folder):
        authority = load_authority(folder, "client-ca")
        known = issued_certificates(folder, authority.certificate)
        revoked = revoked_of(read_revocation_lists(folder, load_authorities(folder)))
        if options.renew:
            roles = renewable_roles(known, name, revoked)
        else:
            check_new_name(folder, name, known, revoked)
            roles = ["admin" if options.admin else "user"]
        made = issue_identity(authority, name, roles, options.days)
        old = [each for each in known if read_identity(each)[0] == name]  # so that it can be revoked, once overwritten
        bundle = checked_bundle(folder, made, options.bundle) if options.bundle else b""
        record_issued(folder, [*old, made.certificate])
        if not bundle:
            write_pair(folder, name, made)
    if bundle:
        write_to(1, bundle)
        return 0
    print(f"made identity: {folder / name}.pem and {name}.key; a client needs these two files and server-ca.pem")
    return 0


def checked_bundle(folder: pathlib.Path, made: CertifiedKey, server: tuple[str, int]) -> bytes:
    """The client's one file. Warns if server.pem is for other names, since the client would refuse the server."""
    host = server[0] or socket.gethostname()
    if not is_named(folder, host):
        say(f"warning: {folder / 'server.pem'} is not for {host!r}; `serve --name {host}` makes one that is")
    return bundle_of(folder, made, host, server[1])


def checked_name(name: str, *, renew: bool) -> str:
    """A name that an identity may have. Raises UsageError."""
    if CONTROL.search(name):
        raise UsageError(f"{name!r} has a control character, which no name of an identity may have")
    in_use = f"{name}.pem" in {*MADE_FILES, ISSUED_FILE, CRL_FILE} and not (renew and name in ROLES)
    if not re.fullmatch(r"[^/]{1,64}", name) or name.startswith(".") or in_use:
        raise UsageError(
            f"{name!r} cannot name a new identity: 1 to 64 characters without a slash, and not one that is in use here"
        )
    return name


def check_new_name(folder: pathlib.Path, name: str, known: Sequence[x509.Certificate], revoked: Revoked) -> None:
    """Refuse a name whose files or jobs another certificate has. Raises JobWorkerError."""
    mine = [each for each in known if read_identity(each)[0] == name]
    remedy = f"`identity {name} --renew` makes a new one, `revoke {name}` ends it"
    for each in mine:
        if mark_of(each) not in revoked and each.not_valid_after_utc.timestamp() > time.time():
            raise JobWorkerError(f"{name!r} exists already, valid until {day_of(each)}; {remedy}")
    if not mine and ((folder / f"{name}.pem").exists() or (folder / f"{name}.key").exists()):
        raise JobWorkerError(f"{folder / name}.pem exists already")


def list_identities(folder: pathlib.Path) -> int:
    """Print every client's certificate that the folder knows of, and what else its revocation list has."""
    authorities = load_authorities(folder)
    revoked = revocation_days(read_revocation_lists(folder, authorities))
    issuers = with_intermediates(authorities, certificates_of(folder))
    known = {mark_of(each): each for issuer in issuers for each in issued_certificates(folder, issuer)}
    rows = [("NAME", "ROLES", "SERIAL", "FROM", "UNTIL", "REVOKED")]
    for mark, each in known.items():
        name, roles, _ = read_identity(each)
        since = each.not_valid_before_utc.date().isoformat()
        revocation = revoked.get(mark, "no")
        rows.append((printable(name), ",".join(sorted(roles)) or "-", f"{mark[1]:x}", since, day_of(each), revocation))
    rows += [("-", "-", f"{mark[1]:x}", "-", "-", revoked[mark]) for mark in sorted(revoked.keys() - known.keys())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def add_revoke_arguments(parser: argparse.ArgumentParser) -> None:
    add_certs_arguments(parser)
    parser.add_argument(
        "identity",
        metavar="NAME|SERIAL|FILE",
        help="an identity's name (all its certificates), one certificate's serial in hexadecimal, or its file (a word "
        "with a slash, or ending in .pem)",
    )


def run_revoke(options: argparse.Namespace) -> int:
    folder = pathlib.Path(options.certs) if options.certs else default_certs()
    with locked_folder(folder):
        chosen = chosen_certificates(folder, utf8_text(options.identity))
        authorities = [certified_issuer(folder, issuer) for issuer in chosen]  # all of them, before the first change
        for authority, serials in zip(authorities, chosen.values(), strict=True):
            add_to_revocation_list(folder, authority, serials)
    written = ", ".join(f"{serial:x}" for serials in chosen.values() for serial in serials)
    print(f"revoked {printable(options.identity)}: {written}; a server of {folder} refuses it from now on")
    return 0


def chosen_certificates(folder: pathlib.Path, word: str) -> dict[x509.Certificate, list[int]]:
    """The serials of the certificates that a word stands for, by their issuers. Raises JobWorkerError."""
    authorities = load_authorities(folder)
    if "/" in word or word.endswith(".pem"):
        sent = load_certificates(pathlib.Path(word))
        issuers = with_intermediates(authorities, [*certificates_of(folder), *sent])
        for issuer in issuers:
            if is_issued_by(sent[0], issuer):
                return {issuer: [sent[0].serial_number]}
        raise JobWorkerError(f"the certificate in {word} is not from the authority {folder / 'client-ca.pem'}")
    issuers = with_intermediates(authorities, certificates_of(folder))
    issued = {issuer: issued_certificates(folder, issuer) for issuer in issuers}
    number = serial_in(word)
    for chosen in (lambda each: read_identity(each)[0] == word, lambda each: each.serial_number == number):
        found = {issuer: [each.serial_number for each in known if chosen(each)] for issuer, known in issued.items()}
        if any(found.values()):
            return {issuer: serials for issuer, serials in found.items() if serials}
    if number is not None:
        return {authorities[0]: [number]}
    raise JobWorkerError(f"{folder} has no certificate of {word!r}; `identity --list` prints names and serials")


def serial_in(word: str) -> int | None:
    digits = word.removeprefix("0x").replace(":", "")
    return int(digits, 16) if re.fullmatch("[0-9a-fA-F]{8,40}", digits) else None


def certified_issuer(folder: pathlib.Path, issuer: x509.Certificate) -> CertifiedKey:
    """An authority with its key, which signs its revocation list. Raises JobWorkerError if its key is not here."""
    if issuer == load_authorities(folder)[0]:
        return load_authority(folder, "client-ca")
    for path in sorted(folder.glob("*.key")):
        with contextlib.suppress(JobWorkerError):
            key = load_key(path)
            if is_key_of(key, issuer):
                return CertifiedKey(issuer, key)
    raise JobWorkerError(
        f"the certificate is from the authority {written_name(issuer.subject)}, whose key is not in {folder}; "
        f"`openssl ca -gencrl` makes a list where that key is, and the list is then added to {folder / CRL_FILE}"
    )


UNIT = """\
# {place}, made by `jobworker.pyz unit`. Jobs live outside this unit, in a cgroup tree of their own, and outlive it.
# So it has no Delegate= (systemd could not start the unit again while jobs are in it), and no sandboxing, which the
# jobs would inherit from the server (they have uids and limits of their own).
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
    words = [os.path.abspath(sys.executable), "-I", os.path.abspath(sys.argv[0]), "serve", *more]
    quoted = " ".join(
        word if re.fullmatch(r"[\w@+=:,./-]+", word) else json.dumps(word).replace("%", "%%").replace("$", "$$")
        for word in words
    )
    text = UNIT.format(
        place="~/.config/systemd/user/jobworker.service" if options.user else "/etc/systemd/system/jobworker.service",
        command=quoted,
        protection="" if options.user else "OOMScoreAdjust=-500\n",
        target="default.target" if options.user else "multi-user.target",
    )
    print(text, end="")
    return 0


# --- 20. Verbs of a client -----------------------------------------------------------------------------
# Owns `run`, `start`, `stop`, `status`, `stream`, `list`, `wait`, `signal` and `rm`: what they print, and their exit
# codes. Scripts rely on the lines of `start`, `stop` and `status`.

INTERRUPT_GRACE = 10.0  # seconds from a first Ctrl-C, or the signal of a stop, to the kill
WATCH_SECONDS = 2.0
TIOCGDEV = 0x80045432  # asm-generic/ioctls.h
LINE_BYTES = 64 * KIB  # of a line of several streams, before it is broken


def add_start_arguments(parser: argparse.ArgumentParser) -> None:
    add_client_arguments(parser)
    parser.add_argument("-c", dest="command", metavar="COMMAND", help="the command (the form `-c COMMAND -args ARG…`)")
    parser.add_argument("--split", action="store_true", help="keep standard error apart from standard output")
    add_job_options(parser)


def add_job_options(parser: argparse.ArgumentParser) -> None:
    """The options of a job that `start` and `run` have."""
    parser.add_argument("--name", metavar="NAME", default="", help="a name that other verbs accept instead of the id")
    parser.add_argument(
        "--env", action="append", metavar="K=V", default=[], help="a variable (K alone: its value here)"
    )
    parser.add_argument("--env-file", action="append", metavar="FILE", default=[], help="a file of lines K=V")
    parser.add_argument("--cwd", metavar="DIR", default="", help="the working folder (default: the account's home)")
    parser.add_argument("--input", metavar="FILE", help="send this file as standard input (default: there is none)")
    parser.add_argument("-i", dest="input", action="store_const", const="-", help="the same as `--input -`: send stdin")
    for name, kind, metavar, what, _ in LIMIT_OPTIONS:
        parser.add_argument(f"--{name}", type=kind, metavar=metavar, help=f"limit of {what} (default: the server's)")
    parser.add_argument("--timeout", type=as_seconds, metavar="TIME", help="end the job after this time")
    parser.add_argument("--max-output", type=as_bytes, metavar="SIZE", help="end the job when it prints more")
    parser.add_argument(
        "--run-as",
        metavar="ACCOUNT",
        default="",
        help="an account of the server's machine, root included (admins only)",
    )
    parser.add_argument(
        "--confine", action="store_true", help="confine this job although it has --run-as (if root serves)"
    )
    parser.add_argument(
        "--id", metavar="UUID", default="", help="a random UUID; a second start with it returns the first job"
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="COMMAND [ARG…]",
        help="the command and its arguments. The command begins at the first word that is not an option, or after "
        "`--`. All later words belong to it",
    )


def environment_of(options: argparse.Namespace) -> dict[str, str]:
    """The variables of `--env-file` and then of `--env`. Raises UsageError. No sentence contains a value."""
    lines = []
    for path in options.env_file:
        text = read_file(pathlib.Path(path)).decode("utf-8", "surrogateescape")
        lines += [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    environment = {}
    for line in [*lines, *options.env]:
        key, separator, value = line.partition("=")
        if not separator and key not in os.environ:
            continue  # as docker does: a variable that is not set here is not set there
        environment[utf8_text(key)] = utf8_text(value if separator else os.environ[key])
    return environment


def split_command(arguments: Sequence[str], value_flags: Iterable[str]) -> tuple[list[str], list[str] | None, bool]:
    """Split `start`'s arguments into its own options and the words of the command, which are passed on verbatim.

    The command begins after `--`, or at the first word that is neither an option nor the value of one of `value_flags`.
    After `-args` come the arguments of the command that `-c` names; the third result says so. None: no such word.
    """
    flags = frozenset(value_flags)
    position = 0
    while position < len(arguments):
        word = arguments[position]
        if word in ("-args", "--"):
            return list(arguments[:position]), list(arguments[position + 1 :]), word == "-args"
        if not word.startswith("-") or word == "-":
            return list(arguments[:position]), list(arguments[position:]), False
        position += 2 if word in flags else 1
    return list(arguments), None, False


def command_of(options: argparse.Namespace) -> tuple[str, list[str]]:
    """The command and its arguments. Raises UsageError."""
    words = list(options.words or [])
    command = getattr(options, "command", None)
    if command is None and options.after_args:
        raise UsageError(f"`-args` needs `-c COMMAND` before it: {PROGRAM} start -c COMMAND -args ARG…")
    if command is None and words:
        command, words = words[0], words[1:]
    if command is None:
        raise UsageError(f"`{options.verb}` needs a command: {PROGRAM} {options.verb} COMMAND [ARG…]")
    return utf8_text(command), [utf8_text(word) for word in words]


def start_request(options: argparse.Namespace) -> pb.StartJobRequest:
    command, args = command_of(options)
    limits = {name: getattr(options, name) for name in ("cpu", "memory", "pids", "io", "timeout", "max_output")}
    return pb.StartJobRequest(
        cmd=command, args=args, id=utf8_text(options.id) or new_job_id(), run_as=utf8_text(options.run_as),
        env=environment_of(options), cwd=utf8_text(options.cwd), name=utf8_text(options.name),
        confine=options.confine, split=options.split, input=options.input is not None,
        **{name: value for name, value in limits.items() if value is not None},
    )  # fmt: skip


def run_start(options: argparse.Namespace) -> int:
    request = start_request(options)
    with open_input(options) as file, client_of(options) as client:
        job_id = client.start(request)
        failure = ""
        try:
            print_line(f"started JobID: {job_id}")
            sys.stdout.flush()
        except OSError as error:
            failure = f"started job {job_id}, but standard output cannot be written: {error.strerror}"
        if file is not None:
            send_whole_input(client, job_id, file, options)
    if failure:
        raise JobWorkerError(failure)
    return 0


@contextlib.contextmanager
def open_input(options: argparse.Namespace) -> Iterator[io.FileIO | None]:
    """The file that `--input` names; None: the job has no input. Raises JobWorkerError."""
    if options.input is None:
        yield None
        return
    name = 0 if options.input == "-" else options.input
    try:
        file = open(name, "rb", buffering=0, closefd=name != 0)  # noqa: SIM115  closed by the next block
    except OSError as error:
        raise JobWorkerError(f"cannot read {options.input}: {error.strerror}") from None
    with file:
        yield file


def send_whole_input(client: Client, job_id: str, file: io.FileIO, options: argparse.Namespace) -> None:
    """Send a job's input to its end. Raises JobWorkerError."""
    with client.sending(job_id, file) as sending:
        try:
            sending.finish()
        except KeyboardInterrupt:
            say(str(sending.cut("this client was interrupted")))
            raise
        except JobWorkerError:
            if sending.is_refused:
                stop_unfed(job_id, options)
            raise


def stop_unfed(job_id: str, options: argparse.Namespace) -> None:
    """Stop a job whose input was refused, or it would wait for ever. It has a client of its own, because a thread of
    gRPC's may call this.
    """
    with contextlib.suppress(JobWorkerError), client_of(options) as client:
        client.call("StopJob", pb.StopJobRequest(id=job_id), pb.StopJobResponse)


class Interrupted(Exception):  # noqa: N818  it is no error
    """A signal reached `run`."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class InterruptibleSink(Sink):
    """Standard output and error, for `run`. A signal raises Interrupted; during a write, after the write. The next one
    waits until `listen`, since an exception in the handler of an exception would reach the user.
    """

    def __init__(self) -> None:
        super().__init__(write_to)
        self._pending = 0
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # nohup(1) ignores SIGHUP, and a shell without job control ignores SIGINT of `run … &`.
            if signal.getsignal(number) != signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: object) -> None:
        if not self.busy:
            self.busy = True
            raise Interrupted(number)
        if self._pending != signal.SIGHUP:  # which no other signal may replace: the job would be killed
            self._pending = number

    def listen(self) -> None:
        """Let a signal raise from now on. Raises Interrupted if one came before."""
        self.busy = True
        if self._pending:
            number, self._pending = self._pending, 0
            raise Interrupted(number)
        self.busy = False

    def take(self, number: int, chunk: Content) -> None:
        super().take(number, chunk)
        self.listen()


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    add_client_arguments(parser)
    parser.add_argument(
        "--split",
        action=argparse.BooleanOptionalAction,
        help="keep standard error apart from standard output (default: if they go to different files here)",
    )
    add_job_options(parser)
    parser.epilog = (
        "Ctrl-C sends the job INT, and kills it after 10 s. A second Ctrl-C kills it at once.\n"
        "While the server is away, a second Ctrl-C ends this client, and the job may go on.\n"
        "If the terminal is closed, the job goes on. A job whose input is cut is stopped.\n"
        "\n"
        "The exit code is the job's own (128+N after signal N), or:\n"
        "  127, 126  the command is not found, or cannot be run\n"
        "  2         wrong usage\n"
        "  129, 130  the terminal was closed, or Ctrl-C ended this client and the job may go on\n"
        "  255       another error; the job's own code is not known"
    )


def run_run(options: argparse.Namespace) -> int:
    """Start a job, write its output, and return its exit code."""
    if options.split is None:
        options.split = not is_same_place(1, 2)
    try:
        request = start_request(options)
        with contextlib.ExitStack() as resources:
            file = resources.enter_context(open_input(options))
            client = resources.enter_context(client_of(options))
            job = ForegroundJob(client, request, resources.enter_context(InterruptibleSink()), file)
            return job.run(resources, functools.partial(stop_unfed, request.id, options))
    except Interrupted as interrupt:  # when `run` was about to end
        return 128 + interrupt.number
    except CannotRunError as error:
        say(str(error))
        return error.shell_code
    except UsageError:
        raise
    except OldServerError as error:
        say(f"`run` needs a newer server: {error}")
        return 255
    except JobWorkerError as error:
        say(str(error))
        return 255


def is_same_place(first: int, second: int) -> bool:
    """Whether two descriptors lead to one file or terminal. /dev/tty is a file of its own beside its terminal."""
    terminal = terminal_of(first)
    return os.path.sameopenfile(first, second) or (terminal > 0 and terminal == terminal_of(second))


def terminal_of(descriptor: int) -> int:
    """The device number of the terminal that a descriptor leads to; 0: it is none, or the kernel does not tell."""
    with contextlib.suppress(OSError):
        return int.from_bytes(fcntl.ioctl(descriptor, TIOCGDEV, bytes(4)), sys.byteorder)
    return 0


class ForegroundJob:
    """The job of one `run`. It ends with `run`, except if the terminal was closed or the server is lost."""

    def __init__(
        self, client: Client, request: pb.StartJobRequest, sink: InterruptibleSink, file: io.FileIO | None
    ) -> None:
        self._client = client
        self._request = request
        self._sink = sink
        self._file = file
        self._sending: Sending | None = None
        self._started = False
        self._closed = False  # nobody reads the output
        self._stops = 0  # how many were asked for
        self._stop: pb.StopJobRequest | None = None  # the one that the server does not have yet

    def run(self, resources: contextlib.ExitStack, stop_unfed: Callable[[], None]) -> int:
        """The exit code. Raises JobWorkerError. `resources` holds the connections of the input and of a stop."""
        while True:
            try:
                self._sink.listen()
                self._send_stop(resources)
                if self._closed:
                    return 128 + signal.SIGPIPE
                return self._follow(resources, stop_unfed)
            except Interrupted as interrupt:
                if self._is_to_leave(interrupt.number):
                    return self._leave(interrupt.number)
                self._ask_stop(interrupt.number)
            except BrokenPipeError:
                self._closed = True
                self._ask_stop(signal.SIGTERM)
            except OSError as error:
                if error.errno == errno.EIO:  # a closed terminal, whose SIGHUP comes later or is ignored
                    return self._leave(signal.SIGHUP)
                raise JobWorkerError(f"the output cannot be written: {error.strerror}; {self._fate()}") from None
            except UnavailableError as error:
                raise JobWorkerError(f"{error}; job {self._request.id} may go on") from None
            except BusyError as error:
                raise JobWorkerError(f"{error}; {self._fate()}" if self._started else str(error)) from None

    def _follow(self, resources: contextlib.ExitStack, stop_unfed: Callable[[], None]) -> int:
        """Start the job and its input, unless that was done, and write its output to the end. Returns its exit code."""
        if not self._started:
            self._client.start(self._request)
            self._started = True
        if self._file is not None and self._sending is None:
            self._sending = resources.enter_context(self._client.sending(self._request.id, self._file))
            self._sending.when_refused(stop_unfed)
        return self._exit_code(self._client.stream(self._request.id, self._sink))

    def _exit_code(self, status: pb.GetStatusResponse | None) -> int:
        """The exit code of the ended job. Raises JobWorkerError if it did not get its input."""
        if status is None:
            raise JobWorkerError(f"job {self._request.id} has ended and was deleted, so its exit code is unknown")
        if self._sending is not None:
            failure = self._sending.failure()
            if failure is not None and (status.status == pb.STOPPED or not isinstance(failure, InputCutError)):
                raise failure
            if status.reason == "INPUT_CUT":
                raise self._sending.cut()
        return exit_code_of(status)

    def _fate(self) -> str:
        """What becomes of the job if `run` ends now."""
        if self._sending is not None and self._sending.is_under_way:
            return f"job {self._request.id} is stopped: its input is cut"
        known = self._started and not self._stops and not self._client.is_lost
        return f"job {self._request.id} {'goes on' if known else 'may go on'}"

    def _is_to_leave(self, number: int) -> bool:
        """Whether a signal ends `run`: a hangup, one after a kill, or one after a stop that the server did not get."""
        late = self._client.is_lost if self._stop is not None else self._stops > 1
        return late or number == signal.SIGHUP

    def _leave(self, number: int) -> int:
        say(self._fate())
        return 128 + number

    def _ask_stop(self, number: int) -> None:
        """Have the next turn of `run` send a stop, or a kill if a stop was asked for before."""
        self._stops += 1
        name = signal.Signals(number).name if self._stops == 1 else ""
        self._stop = pb.StopJobRequest(id=self._request.id, signal=name, grace=INTERRUPT_GRACE if name else 0)

    def _send_stop(self, connection: contextlib.ExitStack) -> None:
        """Send the stop, and do not wait for the end: the job's output is written meanwhile."""
        if self._stop is None:
            return
        hint = f"; job {self._request.id} is not stopped yet, and Ctrl-C again leaves"
        try:
            self._client.send_stop(self._stop, connection, hint)
        except OneJobError as error:  # for example `--owner-calls`; another Ctrl-C tries again
            self._stops -= 1
            say(f"{error}; {self._fate()}")
        self._stop = None


def exit_code_of(status: pb.GetStatusResponse) -> int:
    """The exit code of a client for a job that has ended. If the job has a reason, it is printed to stderr."""
    if status.reason:
        say(f"the job ended with the reason {status.reason}")
    return int(status.exitcode)


def add_stop_arguments(parser: argparse.ArgumentParser) -> None:
    add_client_arguments(parser)
    add_job_arguments(parser, "*")
    parser.add_argument(
        "--signal", metavar="NAME", default="", help="send this first, for example TERM (default: kill)"
    )
    parser.add_argument("--grace", type=as_seconds, metavar="TIME", help="from the signal to the kill (default: 10s)")


def run_stop(options: argparse.Namespace) -> int:
    name = options.signal or ("TERM" if options.grace is not None else "")
    grace = (INTERRUPT_GRACE if options.grace is None else options.grace) if name else 0.0
    with client_of(options) as client:
        jobs, failures = all_jobs(client, options)

        def report(job_id: str, failure: JobWorkerError | None) -> None:
            if failure is None:
                print_line(f"stopped Job: {job_id}")
                sys.stdout.flush()
            else:
                failures.append(failure)

        requests = [pb.StopJobRequest(id=job_id, signal=name, grace=grace) for job_id in jobs]
        client.stop(requests, grace + STOP_ANSWER_SECONDS, report)
    return say_failures(failures)


def add_signal_arguments(parser: argparse.ArgumentParser) -> None:
    add_client_arguments(parser)
    add_job_arguments(parser)
    parser.add_argument("signal", metavar="SIGNAL", help="for example HUP, USR1 or TERM")


def run_signal(options: argparse.Namespace) -> int:
    with client_of(options) as client:
        request = pb.SignalJobRequest(id=chosen_job(client, options), signal=options.signal)
        client.call("SignalJob", request, pb.SignalJobResponse)
    return 0


def add_status_arguments(parser: argparse.ArgumentParser) -> None:
    add_client_arguments(parser)
    add_job_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print all that is known, as JSON")
    parser.add_argument("-v", "--verbose", action="store_true", help="print all that is known, for people")


def run_status(options: argparse.Namespace) -> int:
    with client_of(options) as client:
        job_id = chosen_job(client, options)
        status = client.call("GetJobStatus", pb.GetStatusRequest(id=job_id), pb.GetStatusResponse)
    if options.json:
        print(printable_json(status_facts(job_id, status), indent=2))
    elif options.verbose:
        print_facts(status_facts(job_id, status))
    else:
        print_line(f"jobID: {job_id}, status: {status_name(status.status)}, exitCode: {status.exitcode}")
    return 0


def print_facts(facts: Mapping[str, Any], indent: str = "") -> None:
    """One line for each fact that is known, and the facts of a group below its name."""
    for key, value in facts.items():
        words = re.sub(r"([A-Z])", lambda found: f" {found[1].lower()}", key)
        if isinstance(value, dict):
            print_line(f"{indent}{words}:")
            print_facts(value, f"{indent}  ")
        elif value not in (None, "", []):
            text = shlex.join(value) if key == "command" else "; ".join(value) if key == "notes" else value
            text = ("no", "yes")[value] if isinstance(value, bool) else text
            print_line(f"{indent}{words + ':':<18} {text}")


def add_wait_arguments(parser: argparse.ArgumentParser) -> None:
    add_client_arguments(parser)
    add_job_arguments(parser, "*")


def run_wait(options: argparse.Namespace) -> int:
    """Wait for jobs in turn. The exit code is that of the last one."""
    code = 0
    with client_of(options) as client:
        for job_id in chosen_jobs(client, options):
            request = pb.GetStatusRequest(id=job_id, wait=True)
            status = client.call("GetJobStatus", request, pb.GetStatusResponse, timeout=None)
            if status.status == pb.RUNNING:
                raise OldServerError("this one answered before the job had ended")
            code = exit_code_of(status)
    return code


LIST_COLUMNS = ("ID", "NAME", "OWNER", "STATE", "CODE", "AGE", "TIME", "CPU", "MEMORY", "OUTPUT", "COMMAND")


def add_list_arguments(parser: argparse.ArgumentParser) -> None:
    add_client_arguments(parser)
    parser.add_argument("--running", action="store_true", help="only jobs that run")
    parser.add_argument("--failed", action="store_true", help="only jobs that failed: a code other than 0, no `stop`")
    parser.add_argument("--since", type=as_seconds, metavar="TIME", help="only jobs of the last TIME, like 12h or 2d")
    parser.add_argument("-n", dest="limit", type=as_count, metavar="N", default=0, help="only the newest N")
    parser.add_argument("--owner", metavar="NAME", default="", help="the jobs of this owner (admins only)")
    parser.add_argument("--everyone", action="store_true", help="the jobs of all owners (admins only)")
    parser.add_argument("-q", dest="quiet", action="store_true", help="print ids only")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.add_argument(
        "--watch",
        action="store_true",
        help="print the list every two seconds, with CPU in %% and output bytes a second",
    )
    parser.add_argument("--sort", choices=("cpu", "memory", "output"), help="sort by this, the largest last")


def run_list(options: argparse.Namespace) -> int:
    with client_of(options) as client:
        if not options.watch:
            print_list(jobs_of_list(client, options), options)
            return 0
        before: dict[str, tuple[float, float, int]] = {}
        while True:
            found = jobs_of_list(client, options)
            print("\033[H\033[J" if os.isatty(1) else "", end="")
            print_list(found, options, before)
            sys.stdout.flush()
            now = time.monotonic()
            before = {status.id: (now, status.cpu_seconds, shown_output(status)) for status in found}
            time.sleep(WATCH_SECONDS)


def jobs_of_list(client: Client, options: argparse.Namespace) -> list[pb.GetStatusResponse]:
    """The jobs that a list shows. The wire has no `--failed` and `--since`, so that `-n` counts here."""
    request = pb.ListJobsRequest(owner=utf8_text(options.owner), everyone=options.everyone, running=options.running)
    if not options.failed and options.since is None:
        request.limit = options.limit
    found = client.list(request)
    if options.failed:
        found = [each for each in found if each.status != pb.RUNNING and each.exitcode and not each.stopped_by]
    if options.since is not None:
        oldest = (time.time() - options.since) * 1000
        found = [each for each in found if each.created_ms >= oldest]
    return found[-options.limit :]


def sort_value(
    status: pb.GetStatusResponse, column: str, before: Mapping[str, tuple[float, float, int]] | None
) -> float:
    """What `--sort` sorts by: the whole usage of a job, or with `--watch` that since the last list."""
    if column == "memory":
        return shown_memory(status) or 0
    if column == "cpu" and not status.HasField("cpu_seconds"):
        return -1
    now = (0.0, status.cpu_seconds, shown_output(status))
    position = 1 if column == "cpu" else 2
    return now[position] - (0 if before is None else before.get(status.id, now)[position])


def shown_memory(status: pb.GetStatusResponse) -> int | None:
    """The memory that a list shows; None: it is unknown. No job uses 0 bytes."""
    return int(status.memory_current if status.status == pb.RUNNING else status.memory_peak) or None


def shown_output(status: pb.GetStatusResponse) -> int:
    return int(status.output_bytes + status.error_bytes)


def print_list(
    found: Sequence[pb.GetStatusResponse],
    options: argparse.Namespace,
    before: Mapping[str, tuple[float, float, int]] | None = None,
) -> None:
    """A table that fits the terminal, or, if standard output is no terminal, whole values between tabs.

    With `--watch`, `before` has the time, CPU seconds and output of each job at the last list: then the columns CPU and
    OUTPUT are rates.
    """
    if options.sort:
        found = sorted(found, key=lambda status: sort_value(status, options.sort, before))
    if options.quiet:
        lines = [printable(status.id) for status in found]
    elif options.json:
        lines = [printable_json(status_facts(status.id, status)) for status in found]
    elif os.isatty(1):
        rows = [LIST_COLUMNS, *(list_row(status, status.id[:8], before) for status in found)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(LIST_COLUMNS))]
        width = shutil.get_terminal_size().columns
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip()[:width] for row in rows]
    else:
        lines = ["\t".join(list_row(status, status.id, before)) for status in found]
    print("".join(f"{line}\n" for line in lines), end="")


def rates(status: pb.GetStatusResponse, before: Mapping[str, tuple[float, float, int]]) -> tuple[str, str]:
    """The share of a CPU and the bytes of output a second since the last list; `-` if there is no last one."""
    if status.id not in before or status.status != pb.RUNNING:
        return "-", "-"
    moment, cpu_seconds, output_bytes = before[status.id]
    seconds = max(0.001, time.monotonic() - moment)
    cpu = max(0.0, status.cpu_seconds - cpu_seconds) / seconds
    output = (shown_output(status) - output_bytes) / seconds
    return f"{cpu:.0%}" if status.HasField("cpu_seconds") else "-", f"{size_text(int(output))}/s"


def list_row(
    status: pb.GetStatusResponse, job_id: str, before: Mapping[str, tuple[float, float, int]] | None
) -> tuple[str, ...]:
    """The columns of LIST_COLUMNS, as people read them."""
    used = f"{status.cpu_seconds:.1f}s" if status.HasField("cpu_seconds") else "-"
    totals = used, size_text(shown_output(status))
    memory = shown_memory(status)
    cpu, output = totals if before is None else rates(status, before)
    now = int(time.time() * 1000)
    running = status.status == pb.RUNNING
    state = status_name(status.status) + (f" ({status.reason})" if status.reason else "")
    columns = (
        job_id,
        status.name or "-",
        status.owner,
        state,
        "-" if running else str(status.exitcode),
        duration_text(now - status.created_ms),
        duration_text((now if running else status.ended_ms) - status.started_ms) if status.started_ms else "-",
        cpu,
        "-" if memory is None else size_text(memory),
        output,
        shlex.join([status.cmd, *status.args]),
    )
    return tuple(map(printable, columns))


def duration_text(milliseconds: int) -> str:
    """A duration as `45s`, `12m`, `3h` or `9d`."""
    seconds = max(0, milliseconds // 1000)
    for unit, size in (("d", DAY), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def size_text(size: int) -> str:
    """A number of bytes as `512`, `12K`, `1.5M` or `3.0G`."""
    for unit, factor in (("G", GIB), ("M", MIB), ("K", KIB)):
        if size >= factor:
            return f"{size / factor:.1f}{unit}"
    return str(size)


@functools.cache  # protobuf's own look-up costs a list of 10,000 jobs 40 ms
def status_name(number: int) -> str:
    """A status of the wire in words. A newer server may send a number that this client does not know."""
    return pb.Status.Name(number) if number in pb.Status.values() else f"UNKNOWN({number})"


def status_facts(job_id: str, status: pb.GetStatusResponse) -> dict[str, Any]:
    """A status as `--json` prints it: times in UTC (ISO 8601), null for a value that is unknown or not enforced."""
    return {
        "id": job_id,
        "name": status.name or None,
        "status": status_name(status.status),
        "exitCode": status.exitcode,
        "reason": status.reason or None,
        "signal": status.signal or None,
        "stoppedBy": status.stopped_by or None,
        "owner": status.owner,
        "command": [status.cmd, *status.args],
        "user": status.user,
        "confined": optional(status, "confined"),
        "cwd": status.cwd or None,
        "created": iso_time(status.created_ms),
        "started": iso_time(status.started_ms),
        "ended": iso_time(status.ended_ms),
        "outputBytes": status.output_bytes,
        **({"split": True, "errorBytes": status.error_bytes} if status.split else {}),
        **({"inputBytes": status.input_bytes} if status.input_bytes else {}),
        **({"through": status.through, "node": status.node or None} if status.through else {}),
        "usage": {
            "cpuSeconds": optional(status, "cpu_seconds"),
            "memoryCurrent": status.memory_current or None,
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


def iso_time(milliseconds: int) -> str | None:
    """A moment in UTC (ISO 8601); None for 0, which means: not yet."""
    if milliseconds == 0:
        return None
    moment = datetime.datetime.fromtimestamp(milliseconds / 1000, datetime.timezone.utc)
    return moment.isoformat("T", "milliseconds")


def add_stream_arguments(parser: argparse.ArgumentParser) -> None:
    add_client_arguments(parser)
    add_job_arguments(parser, "*")
    parser.add_argument("--offset", type=as_bytes, metavar="SIZE", default=0, help="skip this many bytes")
    parser.add_argument(
        "--error-offset", type=as_bytes, metavar="SIZE", default=0, help="skip this many bytes of standard error"
    )
    parser.add_argument("--tail", type=as_count, metavar="N", help="begin with the last N lines")
    parser.add_argument("--no-follow", action="store_true", help="do not wait for more output")


def run_stream(options: argparse.Namespace) -> int:
    with client_of(options) as client:
        jobs = chosen_jobs(client, options)
        if len(jobs) == 1:
            sink = Sink(write_to, options.offset, options.error_offset)
            client.stream(jobs[0], sink, tail=options.tail, follow=not options.no_follow)
            return 0
    return stream_several(jobs, options)


def stream_several(jobs: Sequence[str], options: argparse.Namespace) -> int:
    """Write the outputs of several jobs, each line after the first characters of its job's id."""
    lock, ended = threading.Lock(), threading.Semaphore(0)
    failures: list[Exception] = []

    def follow(job_id: str) -> None:
        lines = LineSink(f"{job_id[:8]} | ".encode(), options, lock)
        try:
            with client_of(options) as client:
                client.stream(job_id, lines, tail=options.tail, follow=not options.no_follow)
            lines.finish()
        except Exception as error:  # noqa: BLE001  the main thread raises it
            failures.append(error)
        finally:
            ended.release()

    for job_id in jobs:  # daemons, so that Ctrl-C and an error of one end the process at once
        threading.Thread(target=follow, args=(job_id,), daemon=True).start()
    for _ in jobs:
        ended.acquire()
        if failures:
            raise failures[0]
    return 0


class LineSink(Sink):
    """Standard output and error, whole lines at a time, with a prefix. A lock keeps the lines of several sinks apart.

    A line that is longer than LINE_BYTES is broken, so that output without newlines does not fill the memory.
    """

    def __init__(self, prefix: bytes, options: argparse.Namespace, lock: threading.Lock) -> None:
        super().__init__(self._write_lines, options.offset, options.error_offset)
        self._lock = lock
        self._prefix = prefix
        self._rests = {1: b"", 2: b""}  # of each output: the beginning of a line

    def _write_lines(self, number: int, chunk: Content) -> None:
        *lines, rest = (self._rests[number] + chunk).split(b"\n")
        if len(rest) > LINE_BYTES:
            lines, rest = [*lines, rest], b""
        self._rests[number] = rest
        with self._lock:
            write_to(number, b"".join(b"%s%s\n" % (self._prefix, line) for line in lines))

    def finish(self) -> None:
        for number, rest in self._rests.items():
            if rest:
                self._write_lines(number, b"\n")


def add_rm_arguments(parser: argparse.ArgumentParser) -> None:
    add_client_arguments(parser)
    add_job_arguments(parser, "*")


def run_rm(options: argparse.Namespace) -> int:
    with client_of(options) as client:
        jobs, failures = all_jobs(client, options)
        for job_id in jobs:
            try:
                client.call("RemoveJob", pb.RemoveJobRequest(id=job_id), pb.RemoveJobResponse)
                print_line(f"removed Job: {job_id}")
            except OneJobError as error:
                failures.append(error)
    return say_failures(failures)


# --- 21. Main ------------------------------------------------------------------------------------------
# Owns the table of verbs and the parser. `main` turns an error into an exit code, as `run_run` does for `run`.


@dataclasses.dataclass(frozen=True)
class Verb:
    """One verb: the function that declares its options, the one that runs it, a line of help, and examples."""

    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    summary: str
    examples: tuple[str, ...]


VERBS = {
    "serve": Verb(
        add_serve_arguments,
        run_serve,
        "run the server on this machine",
        (
            "serve",
            "serve --without auto --max-cpu 4 --max-memory 8G",
            "serve @/etc/jobworker/options",
            "serve --through slurm --accounts system",
        ),
    ),
    "run": Verb(
        add_run_arguments,
        run_run,
        "run a command on the server's machine, write its output and exit with its code",
        (
            "run make -j4 2>errors",
            "run --timeout 5m --env CC=clang make test",
            "run sh -c 'grep error *.log | sort | uniq -c'",
            "run -i -- bash -s <script",
            "run --input tree.tar tar x",
        ),
    ),
    "start": Verb(
        add_start_arguments,
        run_start,
        "start a command on the server's machine and print its job's id",
        (
            "start --name web --memory 2G python3 -m http.server",
            "start --split sh -c 'make && make test'",
            "start --input data.csv -- sort -n",
        ),
    ),
    "stop": Verb(
        add_stop_arguments,
        run_stop,
        "kill all processes of jobs; with --grace, ask them to end first",
        ("stop web", "stop --signal TERM --grace 10s web", "stop --last"),
    ),
    "status": Verb(
        add_status_arguments,
        run_status,
        "print whether a job runs, and how it ended",
        ("status web", "status -v --last", "status --json 5d8b"),
    ),
    "stream": Verb(
        add_stream_arguments,
        run_stream,
        "write a job's output, from its first byte, until the job ends",
        (
            "stream web",
            "stream --tail 20 --no-follow web",
            "stream --tail 20 $(jobworker.pyz list -q --failed -n 1)",
            "stream web worker",
        ),
    ),
    "list": Verb(
        add_list_arguments,
        run_list,
        "list jobs and what they use, newest last",
        (
            "list --failed --since 2d",
            "list --running --watch --sort cpu",
            "list --json | jq .exitCode",
            "stop $(jobworker.pyz list -q --running)",
        ),
    ),
    "wait": Verb(
        add_wait_arguments,
        run_wait,
        "wait until jobs have ended; exit with the code of the job named last",
        ("wait --last", "wait build test"),
    ),
    "signal": Verb(
        add_signal_arguments,
        run_signal,
        "send a signal to the main process of a job",
        ("signal web HUP", "signal --last USR1"),
    ),
    "rm": Verb(add_rm_arguments, run_rm, "delete ended jobs and their output", ("rm 5d8b", "rm --last")),
    "identity": Verb(
        add_identity_arguments,
        run_identity,
        "make a certificate for one more client",
        (
            "identity alice --bundle box | install -m 600 /dev/stdin box.pem",
            "identity boss --admin",
            "identity alice --renew --days 90",
            "identity --list",
        ),
    ),
    "revoke": Verb(
        add_revoke_arguments,
        run_revoke,
        "refuse a client's certificate from now on",
        ("revoke alice", "revoke 5f0c2a77d1", "revoke ./alice.pem"),
    ),
    "unit": Verb(
        add_unit_arguments,
        run_unit,
        "print a systemd unit that runs the server",
        ("unit >/etc/systemd/system/jobworker.service", "unit -- --max-cpu 4"),
    ),
}


COMMAND_VERBS = ("run", "start")  # their options end where the command begins


def make_parser(words: Sequence[str]) -> tuple[argparse.ArgumentParser, list[str]]:
    """The parser of all verbs, and the flags with a value of the verb in `words`.

    Only that verb gets its options, since those of all verbs cost a client 5 ms. Only help asks for the width of the
    terminal, which costs 3 ms.
    """
    formatter: Any = argparse.RawDescriptionHelpFormatter
    if words and not {"-h", "--help"} & set(words):
        formatter = functools.partial(formatter, width=80)
    value_flags: list[str] = []

    class Parser(argparse.ArgumentParser):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options, allow_abbrev=False, formatter_class=formatter)

        def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
            action = super().add_argument(*names, **options)
            value_flags.extend(action.option_strings if action.nargs != 0 else ())
            return action

        def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
            return shlex.split(arg_line, comments=True)

        def error(self, message: str) -> NoReturn:
            raise UsageError(message)

    parser = Parser(prog=PROGRAM, description=SUMMARY)
    parser.add_argument("--version", action="version", version=f"jobworker {VERSION}{BUILD}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    for name, verb in VERBS.items():
        own = verbs.add_parser(name, help=verb.summary, description=f"{verb.summary[0].upper()}{verb.summary[1:]}.")
        if name in words[:1]:
            verb.add_arguments(own)
            lines = [f"  {PROGRAM} {line}" for line in verb.examples]
            own.epilog = "\n".join([*([own.epilog, ""] if own.epilog else []), "examples:", *lines])
    return parser, value_flags


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command line. Raises UsageError."""
    parser, value_flags = make_parser(arguments)
    if not arguments:
        parser.print_help()
        parser.exit()
    if arguments[0] == "signal":
        arguments = [arguments[0], *options_first(arguments[1:], value_flags)]
    if arguments[0] not in COMMAND_VERBS:
        options, rest = parser.parse_known_args(arguments)
        if rest:
            refuse_words(options, rest)
        return options
    own, words, after_args = split_command(arguments[1:], value_flags)
    options = parser.parse_args([arguments[0], *own])
    options.words, options.after_args = words, after_args
    return options


def refuse_words(options: argparse.Namespace, rest: Sequence[str]) -> NoReturn:
    """Raise UsageError for the words of a command line that its verb does not take."""
    if isinstance(getattr(options, "jobs", None), str) and not any(word.startswith("-") for word in rest):
        raise UsageError(f"`{options.verb}` takes one job{' and one signal' * (options.verb == 'signal')}")
    raise UsageError(f"unrecognized arguments: {' '.join(rest)}")


def options_first(words: Sequence[str], value_flags: Iterable[str]) -> list[str]:
    """The options and then the other words. Otherwise argparse would take the first word of `web --last HUP` as the
    signal, because the job may be left out.
    """
    flags = frozenset(value_flags)
    own: list[str] = []
    others: list[str] = []
    position = 0
    while position < len(words) and words[position] != "--":
        size = 2 if words[position] in flags else 1
        (own if words[position].startswith("-") else others).extend(words[position : position + size])
        position += size
    return [*own, *others, *words[position:]]


def fill_standard_descriptors() -> None:
    """Open /dev/null for each standard descriptor that is closed (`>&-`, old daemons). Otherwise the next file or
    socket would become standard output.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115  used until the process ends
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code. A failure is one line on standard error."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        fill_standard_descriptors()
        options = parse(words)
        code = VERBS[options.verb].run(options)
        sys.stdout.flush()
    except UsageError as error:
        say(f"{error} (see `{' '.join([PROGRAM, *(word for word in words[:1] if word in VERBS)])} --help`)")
        return error.exit_code
    except OldServerError as error:
        say(f"`{words[0]}` needs a newer server: {error}")
        return error.exit_code
    except JobWorkerError as error:
        say(str(error))
        return error.exit_code
    except SystemExit as ended:  # argparse's --help and --version
        return ended.code if isinstance(ended.code, int) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes its rest at the end, and that must not fail
        return 128 + signal.SIGPIPE
    except OSError as error:
        say(f"{error.filename or 'this machine'}: {error.strerror}")
        return 1
    return code


def program() -> NoReturn:
    """Run `main` as a whole process, and leave at once: taking the interpreter down costs a client 10 ms."""
    code = main()
    with contextlib.suppress(OSError):  # a closed pipe, which `main` has handled
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    if sys.flags.isolated:  # `python3 -I` of the unit leaves out the folder of this module, in which gen/ is
        sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    program()
