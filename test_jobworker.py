"""Tests of Job worker: each is named after the promise that it checks, and uses the real thing.

Real processes, cgroups, files, certificates and connections; nothing is replaced by a stand-in. They wait for
events (a job that says something, a process that ends), never for time to pass, and never assert a time. What a
test needs of the machine (root, controllers) and does not find is the reason with which it is skipped. The banners
are those of jobworker.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import doctest
import errno
import functools
import importlib.util
import json
import logging
import os
import random
import re
import resource
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jobworker
from jobworker import (
    KIB,
    MIB,
    BadRequestError,
    Cgroup,
    CgroupMount,
    ExhaustedError,
    IdTakenError,
    JobRequest,
    JobWorkerError,
    Limits,
    NoSuchJobError,
    StillRunningError,
    UnavailableError,
    Worker,
    WorkerOptions,
)

# --- Commands, machine, fixtures ----------------------------------------------------------------------
# What all sections' tests use. `nothing_is_left` looks after every test.

HERE = Path(jobworker.__file__).resolve().parent
PYTHON = shutil.which("python3", path=jobworker.JOB_PATH) or sys.executable  # one that every user may run
PATIENCE = 60  # seconds after which what should have happened is said not to

# Commands that jobs run; each `MARK` is replaced by a word that no other process has in its command line.
WAITS = "echo ready; exec sleep 1000"
BURROWS = """
import os, signal, sys, time
if os.fork() == 0:
    os.setsid()
    for number in range(1, 32):
        if number not in (9, 19):
            signal.signal(number, signal.SIG_IGN)
    if os.fork() == 0:
        sys.stdout.write("deep\\n"), sys.stdout.flush()
        time.sleep(1000)
    time.sleep(1000)
time.sleep(1000)
"""
COMETS = """
import os, time
for _ in range(20):
    if os.fork() == 0:
        while True:  # always a new process, and never more than twenty
            if os.fork():
                os._exit(0)
os.write(1, b"storm\\n")
time.sleep(1000)
"""
WRITES_BYTES = "import os, random, sys; sys.stdout.buffer.write(random.Random(7).randbytes(int(sys.argv[1])))"

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def missing_controllers():
    mount = CgroupMount.find()
    there = Cgroup(mount.point).controllers() if mount else frozenset()
    return [name for name in jobworker.CONTROLLERS if name not in there]


def in_loop(test):
    """Run a test's coroutine in an event loop of its own, in which nothing may fail unseen."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        async def whole():
            unseen = []
            asyncio.get_running_loop().set_exception_handler(lambda _, context: unseen.append(context))
            await asyncio.wait_for(test(*args, **kwargs), PATIENCE)
            assert not unseen

        asyncio.run(whole())

    return run


def children(process="self"):
    """The processes that a process is the parent of."""
    tasks = Path(f"/proc/{process}/task")
    return {int(child) for task in tasks.iterdir() for child in (task / "children").read_text().split()}


def all_gone(processes):
    """Wait until processes have ended; those that do not."""
    left = set()
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(process)
            if not select.select([descriptor], [], [], PATIENCE / 4)[0]:
                left.add(process)
            os.close(descriptor)
    return left


def reap():
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def processes_with(mark):
    """The living processes with this word in their command line."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if mark.encode() in Path(f"/proc/{name}/cmdline").read_bytes() and int(name) != os.getpid():
                found.append(int(name))
    return found


def trees_of(state):
    """Where the cgroups of a state folder stand, wherever the tree's root is."""
    mount = CgroupMount.find()
    return list(Path(mount.point).rglob(jobworker.state_name(state))) if mount else []


def jobs_cgroups(state):
    return [folder for tree in trees_of(state) for folder in tree.glob("u*/*") if folder.is_dir()]


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    """After every test: no descriptor, process, thread or cgroup that was not there before."""
    if request.node.get_closest_marker("controllers") and missing_controllers():
        pytest.skip(f"this machine's cgroup2 has no controllers {', '.join(missing_controllers())}")
    jobworker.libc_call("prctl", jobworker.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what is orphaned becomes ours
    states = []
    before = set(os.listdir("/proc/self/fd")), threading.active_count(), children()
    yield states
    stuck = all_gone(children() - before[2])
    while left := children() - before[2]:
        for process in left if stuck else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        all_gone(left)
        reap()
    cgroups = [str(folder) for state in states for folder in jobs_cgroups(state)]
    for state in states:
        for tree in trees_of(state):
            for folder in jobs_cgroups(state):
                Cgroup(str(folder)).kill_all()
            Cgroup(str(tree)).remove()
        shutil.rmtree(state)
    assert not stuck, "these processes were left"
    assert not cgroups, "these cgroups were left"
    assert set(os.listdir("/proc/self/fd")) == before[0], "descriptors were left"
    assert threading.active_count() <= before[1], "threads were left"


def new_state(states, parent=None):
    folder = Path(tempfile.mkdtemp(prefix="jobworker-test-", dir=parent))
    folder.chmod(0o711)  # on the way to the homes of jobs
    states.append(folder)
    return folder


@pytest.fixture
def state(nothing_is_left):
    """A state folder of the test's own."""
    return new_state(nothing_is_left)


@pytest.fixture
def mark():
    return f"mark-{os.urandom(8).hex()}"


def worker_on(state, module=jobworker, **options):
    return module.Worker(
        module.WorkerOptions(state, **{"without": frozenset({"auto"}), "reserve": 0.0, **options}),
    )


def shell(script, **request):
    return JobRequest("sh", ("-c", script), **{"owner": "alice", **request})


def python(program, *args, **request):
    return JobRequest(PYTHON, ("-c", program, *args), **{"owner": "alice", **request})


async def output(worker, job, offset=0):
    return b"".join([chunk async for chunk in worker.stream(job, offset)])


async def said(worker, job, marker):
    """Wait until a job has said something; all that it said until then."""
    text = b""
    async with contextlib.aclosing(worker.stream(job)) as chunks:
        async for chunk in chunks:
            text += chunk
            if marker in text:
                return text
    raise AssertionError(f"it ended without saying {marker!r}: {text!r}")


async def result(worker, request):
    """Run a job to its end: what it printed and its status."""
    job = await worker.start(request)
    text = await output(worker, job)
    return text, worker.status(job)


def ending(worker, job):
    status = worker.status(job)
    return status.status, status.exit_code, status.ending.reason if status.ending else ""


async def forgotten(worker, job):
    """Wait until a job has left the table."""
    with contextlib.suppress(NoSuchJobError):
        entry = worker.job(job)
        await worker._until(entry, lambda: not worker._holds(entry))


SERVER = """
import asyncio, os, pathlib, signal, sys
sys.path.insert(0, {module!r})
import jobworker
from jobworker import JobRequest, JobWorkerError, Worker, WorkerOptions

async def output(job):
    return b"".join([chunk async for chunk in worker.stream(job)])

async def main():
    global worker
    async with Worker(WorkerOptions(pathlib.Path({state!r}), **{options!r})) as worker:
{body}

try:
    asyncio.run(main())
except JobWorkerError as error:
    sys.exit(f"refused: {{error}}")
"""


def in_server(state, body, *, wrapper=(), module=HERE, status=0, interpreter=sys.executable, options=None, **popen):
    """Run a server of its own process, with `body` inside its `async with Worker`; what it printed."""
    options = {"without": frozenset({"auto"}), "reserve": 0.0, **(options or {})}
    body = textwrap.indent(textwrap.dedent(body), " " * 8)
    program = SERVER.format(module=str(module), state=str(state), options=options, body=body)
    done = subprocess.run(
        [*wrapper, interpreter, "-c", program],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        timeout=PATIENCE, check=False, **popen,
    )  # fmt: skip
    assert done.returncode == status, done.stdout.decode()
    return done.stdout.decode()


def dying_copy(folder, place, last_words="pass"):
    """A copy of jobworker.py of which one process dies, once, before the statement that begins with `place`.

    It dies when the file `armed` is there; so that a test can tell that the place was reached.
    """
    text = Path(jobworker.__file__).read_text()
    lines = [line for line in text.splitlines() if line.strip().startswith(place)]
    assert len(lines) == 1, f"{place!r} stands {len(lines)} times in jobworker.py"
    armed = folder / "armed"
    armed.touch()
    indent = " " * (len(lines[0]) - len(lines[0].lstrip()))
    death = f"{indent}if os.path.exists({str(armed)!r}): os.unlink({str(armed)!r}); {last_words}; os.kill(os.getpid(), 9)\n"
    (folder / "jobworker.py").write_text(text.replace(lines[0], death + lines[0], 1))
    specification = importlib.util.spec_from_file_location("dying_jobworker", folder / "jobworker.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules["dying_jobworker"] = module  # where dataclasses look for it
    specification.loader.exec_module(module)
    return module, armed


ID = "aa0319d4-e37d-420b-ac43-7316f6b032e5"
ID2 = "bb0319d4-e37d-420b-ac43-7316f6b032e5"
