"""Tests of Job worker. Each test is named after the promise that it checks.

The tests use real processes, cgroups, files, certificates and connections. They replace none of them by a mock.
They wait for events (a line of output, the end of a process) and not for time to pass, and they assert no time and
no rate. A test that needs something of the machine (root, controllers) is skipped where the machine lacks it, and
the skip says what is missing. The banners name the sections of jobworker.py.
"""

from __future__ import annotations

import asyncio
import base64
import collections
import concurrent.futures
import contextlib
import dataclasses
import datetime
import doctest
import errno
import fcntl
import functools
import hashlib
import importlib.util
import inspect
import itertools
import json
import os
import pty
import pwd
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jobworker
from jobworker import (
    GIB,
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
    ec,
    grpc,
    hashes,
    pb,
    x509,
)

pb_grpc = jobworker.Deferred("gen.workerservice_pb2_grpc")
descriptor_pb2 = jobworker.Deferred("google.protobuf.descriptor_pb2")

# --- Commands, machine, fixtures ----------------------------------------------------------------------
# Shared by the tests of all sections. The fixture `nothing_is_left` checks the machine after every test.

HERE = Path(jobworker.__file__).resolve().parent
PYTHON = shutil.which("python3", path=jobworker.JOB_PATH) or sys.executable  # a Python that every user may run
PYTHON_FOR_ALL = Path("/usr/bin/python3")  # every user may run it, unlike a Python below /root
FOR_ALL = None if os.geteuid() else "/var/lib"  # a confined job has its own /tmp, so it sees test files only elsewhere
PATIENCE = 60  # seconds until a test gives up waiting for an event

# Commands that jobs run.
WAITS = "echo ready; exec sleep 1000"
HIDDEN_GRANDCHILDREN = """
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
FORK_STORM = """
import os, time
for _ in range(20):
    if os.fork() == 0:
        while True:  # replaces itself by a new process again and again; at most twenty exist
            if os.fork():
                os._exit(0)
os.write(1, b"storm\\n")
time.sleep(1000)
"""
FORKS_TWICE = "import os, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0: time.sleep(1000)\nos._exit(4)"
WRITES_BYTES = "import os, random, sys; sys.stdout.buffer.write(random.Random(7).randbytes(int(sys.argv[1])))"

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def missing_controllers():
    mount = CgroupMount.find()
    there = Cgroup(mount.point).controllers() if mount else frozenset()
    return [name for name in jobworker.CONTROLLERS if name not in there]


def in_loop(test):
    """Run a test's coroutine in a new event loop. An exception that the loop only logs fails the test."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        async def run_test():
            logged = []
            asyncio.get_running_loop().set_exception_handler(lambda _, context: logged.append(context))
            await asyncio.wait_for(test(*args, **kwargs), PATIENCE)
            assert not logged

        asyncio.run(run_test())

    return run


def children(process="self"):
    """The pids of a process's children."""
    found = set()
    for task in Path(f"/proc/{process}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # gRPC ended this thread meanwhile
            found |= set(map(int, (task / "children").read_text().split()))
    return found


def survivors(processes):
    """Wait until these processes have ended; return those that have not."""
    left = set()
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(process)
            if not select.select([descriptor], [], [], PATIENCE / 4)[0]:
                left.add(process)
            os.close(descriptor)
    return left


CHILDREN_BEFORE = set()  # this process's children before the test: the server that many tests share


def reap(processes):
    for process in processes:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process, os.WNOHANG)


def wait_for_orphans():
    """Wait until the launcher and the shims of a dead server have ended."""
    while left := children() - CHILDREN_BEFORE:
        assert not survivors(left)
        reap(left)


def processes_with(mark):
    """The running processes whose command line contains this word."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if mark.encode() in Path(f"/proc/{name}/cmdline").read_bytes() and int(name) != os.getpid():
                found.append(int(name))
    return found


def trees_of(state):
    """The roots of the cgroup trees of a state folder, anywhere in the hierarchy."""
    mount, name = CgroupMount.find(), jobworker.state_name(state)
    folders = os.walk(mount.point) if mount else ()  # os.walk skips a folder that vanishes; rglob raises
    return [Path(folder) for folder, _, _ in folders if os.path.basename(folder) == name]


def jobs_cgroups(state):
    return [folder for tree in trees_of(state) for folder in tree.glob("u*/*") if folder.is_dir()]


def descriptors():
    """This process's descriptors. Sockets and anonymous inodes do not count once gRPC is imported: it opens and
    closes them at any time.
    """
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the descriptor of the listing itself
            kind = os.readlink(f"/proc/self/fd/{number}").split("[")[0]
            if "grpc" not in sys.modules or not kind.startswith(("socket:", "anon_inode:")):
                found.add(number)
    return found


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    """After every test no descriptor, process, thread or cgroup exists that did not exist before it."""
    if request.node.get_closest_marker("controllers") and missing_controllers():
        pytest.skip(f"this machine's cgroup2 has no controllers {', '.join(missing_controllers())}")
    if (
        request.node.get_closest_marker("systemd")
        and (systemd := Path("/proc/1/comm").read_text().strip()) != "systemd"
    ):
        pytest.skip(f"process 1 is {systemd}, not systemd")
    jobworker.libc_call(
        "prctl", jobworker.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0
    )  # orphaned processes become children of the tests
    states = []
    before = descriptors(), set(threading.enumerate())
    CHILDREN_BEFORE.clear()
    CHILDREN_BEFORE.update(children())
    yield states
    stuck = {}
    while left := children() - CHILDREN_BEFORE:
        for process in survivors(left):
            stuck[process] = Path(f"/proc/{process}/cmdline").read_bytes()
            os.kill(process, signal.SIGKILL)
        reap(left)
    cgroups = [str(folder) for state in states for folder in jobs_cgroups(state)]
    for state in states:
        for tree in trees_of(state):
            for folder in jobs_cgroups(state):
                Cgroup(str(folder)).kill_all()
            Cgroup(str(tree)).remove()
        shutil.rmtree(state, ignore_errors=True)
        forget_claims(state)
    new_threads = set(threading.enumerate()) - before[1]
    for thread in new_threads:  # gRPC ends those of a channel a moment after it is closed
        thread.join(PATIENCE / 4)
    assert not stuck, "these processes did not end"
    assert not cgroups, "these cgroups were not removed"
    assert descriptors() == before[0], "descriptors were not closed"
    assert not [thread for thread in new_threads if thread.is_alive()], "threads did not end"


def forget_claims(state):
    """Delete the claims of a state folder, so that tests do not use up the machine's ranges of uids."""
    for claim in Path(jobworker.UID_CLAIMS).glob("[0-9]*") if os.geteuid() == 0 else ():
        with contextlib.suppress(FileNotFoundError):
            if claim.read_text().endswith(f" {state}/owners"):
                claim.unlink()


def new_state(states, parent=None):
    folder = Path(tempfile.mkdtemp(prefix="jobworker-test-", dir=parent))
    folder.chmod(0o711)  # jobs pass through it to their homes
    states.append(folder)
    return folder


@pytest.fixture
def state(nothing_is_left):
    """A new state folder."""
    return new_state(nothing_is_left)


@pytest.fixture
def port():
    """A port on which a test's servers listen one after the other. The test keeps a socket bound to it, so that no
    other process is given the port in between. A server can listen beside that socket, since it does not listen.
    """
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]


@pytest.fixture
def mark():
    """A word for the command lines of one test's processes, by which `processes_with` finds them."""
    return f"mark-{os.urandom(8).hex()}"


def worker_on(state, module=jobworker, **options):
    return module.Worker(
        module.WorkerOptions(state, **{"without": frozenset({"auto"}), "reserve": 0.0, **options}),
    )


def shell(script, **request):
    return JobRequest("sh", ("-c", script), **{"owner": "alice", **request})


def python(program, *args, **request):
    return JobRequest(PYTHON, ("-c", program, *args), **{"owner": "alice", **request})


async def start_id(worker, request):
    """Start a job and return its id."""
    return (await worker.start(request)).id


async def output(worker, job, offset=0):
    return b"".join([chunk async for chunk in worker.stream(worker.job(job), offset)])


async def wait_for_output(worker, job, marker):
    """Wait until a job has printed `marker`; return all that it has printed so far."""
    text = b""
    async with contextlib.aclosing(worker.stream(worker.job(job))) as chunks:
        async for chunk in chunks:
            text += chunk
            if marker in text:
                return text
    raise AssertionError(f"the job ended without {marker!r}: {text!r}")


async def result(worker, request):
    """Run a job to its end; return its output and its status."""
    job = await start_id(worker, request)
    text = await output(worker, job)
    return text, worker.status(worker.job(job))


def ending(worker, job):
    status = worker.status(worker.job(job))
    return status.status, status.exit_code, status.ending.reason if status.ending else ""


async def wait_until_forgotten(worker, job):
    """Wait until the server has deleted a job."""
    with contextlib.suppress(NoSuchJobError):
        entry = worker.job(job)
        await worker._until(entry, lambda: not worker._in_table(entry))


SERVER = """
import asyncio, os, pathlib, signal, sys
sys.path.insert(0, {module!r})
import jobworker
from jobworker import JobRequest, JobWorkerError, Worker, WorkerOptions

async def start_id(worker, request):
    return (await worker.start(request)).id

async def output(job):
    return b"".join([chunk async for chunk in worker.stream(worker.job(job))])

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
    """Run `body` inside `async with Worker` in a new process; return what the process printed."""
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


def dying_copy(folder, statement, before_death="pass"):
    """A copy of jobworker.py in which one process kills itself before `statement`, at the first time only.

    The process first runs `before_death` and removes the file `armed`, so a test can check that it came there.
    Returns the module and the path of `armed`.
    """
    armed = folder / "armed"
    armed.touch()
    death = f"if os.path.exists({str(armed)!r}): os.unlink({str(armed)!r}); {before_death}; os.kill(os.getpid(), 9)"
    return altered_copy(folder, statement, death), armed


async def arm_after_rehearsal(worker, dying, armed):
    """Create `armed` after the launcher's first fork: before it, the launcher itself runs statements of the shim."""
    job = await worker.start(dying.JobRequest("true", owner="alice"))
    await worker.wait(job)
    worker.remove(job)
    armed.touch()


def altered_copy(folder, statement, inserted):
    """A copy of jobworker.py with `inserted` before the one statement that begins with the text `statement`."""
    text = Path(jobworker.__file__).read_text()
    found = re.findall(rf"^ *{re.escape(statement)}", text, re.MULTILINE)
    assert len(found) == 1, f"{statement!r} stands {len(found)} times in jobworker.py"
    indent = " " * (len(found[0]) - len(found[0].lstrip()))
    (folder / "jobworker.py").write_text(text.replace(found[0], f"{indent}{inserted}\n{found[0]}"))
    return module_at(folder / "jobworker.py", "altered_jobworker")


def module_at(path, name):
    """The module in this file, imported under this name."""
    specification = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses look a module up there
    specification.loader.exec_module(module)
    return module


ID = "aa0319d4-e37d-420b-ac43-7316f6b032e5"
ID2 = "bb0319d4-e37d-420b-ac43-7316f6b032e5"


# --- Cgroup -------------------------------------------------------------------------------------------
# Where the server makes its tree, which limits the kernel enforces, and what a machine without cgroups gets.

NO_CGROUP = (  # words before a command: it then finds no cgroup2 mount
    "unshare", "-m", "sh", "-c",
    """awk '$3 == "cgroup2" { print $2 }' /proc/mounts | while read -r point; do umount -l "$point"; done; exec "$@" """,
    "sh",
)  # fmt: skip
READ_ONLY_CGROUP = (  # words before a command: it then finds a cgroup2 mount that is read-only
    "unshare", "-m", "sh", "-c",
    """awk '$3 == "cgroup2" { print $2 }' /proc/mounts |
    while read -r point; do mount -o remount,bind,ro "$point"; done; exec "$@" """,
    "sh",
)  # fmt: skip


@pytest.fixture
def nested():
    """A new cgroup in the root cgroup, with all controllers that this machine has."""
    mount = CgroupMount.find()
    assert mount
    cgroup = Cgroup(f"{mount.point}/jobworker-test-{os.urandom(4).hex()}")
    cgroup.create()
    Cgroup(mount.point).enable(jobworker.CONTROLLERS)
    yield cgroup
    cgroup.remove()


def in_cgroup(cgroup, *, container=False, leaf=""):
    """Words before a command: it then runs in this cgroup, and with `container` it sees nothing above it."""
    point = CgroupMount.find().point
    enter = f'mkdir -p {cgroup.path}{leaf} && echo 0 > {cgroup.path}{leaf}/cgroup.procs && exec "$@"'
    mount = f'umount -l {point} && mount -t cgroup2 none {point} && exec "$@"'
    namespace = ("unshare", "-C", "-m", "sh", "-c", mount, "sh") if container else ()
    return ("sh", "-c", enter, "sh", *namespace)


SHOW_TREE = """
    job = await start_id(worker, JobRequest("cat", ("/proc/self/cgroup",), owner="alice"))
    text = (await output(job)).decode()
    line = next(line for line in text.splitlines() if line.startswith("0::"))
    print("tree", worker._tree.root, "job", line[3:], "controllers", *sorted(worker._tree.controllers))
"""


@pytest.mark.tree
@as_root
def test_a_root_server_makes_its_tree_as_jobworker_in_the_root_cgroup(state):
    name, point = jobworker.state_name(state), CgroupMount.find().point
    assert f"tree {point}/jobworker/{name} job /jobworker/{name}/u" in in_server(state, SHOW_TREE)


@pytest.mark.tree
@as_root
def test_the_option_cgroup_names_the_place_of_the_tree(state, nested):
    top = f"{nested.path}/here"
    assert f"tree {top}/{jobworker.state_name(state)}" in in_server(state, SHOW_TREE, options={"cgroup": top})
    Cgroup(top).remove()


@pytest.mark.tree
@as_root
def test_in_a_container_the_server_moves_only_itself_from_the_visible_root_to_a_leaf(state, nested):
    name, point = jobworker.state_name(state), CgroupMount.find().point
    body = SHOW_TREE + '    print("server", open("/proc/self/cgroup").read().split("0::")[1])'
    printed = in_server(state, body, wrapper=in_cgroup(nested, container=True))
    assert f"tree {point}/jobworker/{name} job /jobworker/{name}/u" in printed
    assert "server /jobworker/server" in printed
    assert Path(f"{nested.path}/jobworker").is_dir()
    if not missing_controllers():
        assert "controllers cpu io memory pids" in printed


@pytest.mark.tree
@as_root
@in_loop
async def test_a_server_that_ends_removes_its_tree_except_the_cgroups_of_running_jobs(state, nested):
    async with worker_on(state, cgroup=nested.path) as worker:
        job = await start_id(worker, shell("exec sleep 1000"))
    assert len(jobs_cgroups(state)) == 1
    async with worker_on(state, cgroup=nested.path) as worker:
        await worker.stop(worker.job(job))
        (tree,) = trees_of(state)
        until(lambda: len((tree / "shims" / "cgroup.procs").read_text().split()) == 1)  # the launcher
    assert trees_of(state) == []


@pytest.mark.tree
@as_root
@in_loop
async def test_a_stop_kills_a_root_job_that_left_its_cgroup(state):
    async with worker_on(state) as worker:
        leave = f"echo $$ > {CgroupMount.find().point}/cgroup.procs; echo out; exec sleep 1000"
        job = await start_id(worker, shell(leave, run_as="root"))
        await wait_for_output(worker, job, b"out")
        await worker.stop(worker.job(job))
        assert ending(worker, job) == ("STOPPED", 137, "")


@pytest.mark.controllers
def test_a_server_that_enforces_more_than_the_one_before_starts_jobs_beside_older_jobs(state, certs, port):
    with killed_at_end(spawn(state, certs, port, "--without", "memory"), certs, port) as served:
        served.start("--", "sleep", "1000")
    with serving(state, certs, port=port) as served:
        job = served.start("--", "echo", "hello")
        assert served.run("stream", job).stdout == "hello\n"
        assert json.loads(served.run("status", "--json", job).stdout)["limits"]["memory"] == 512 * MIB


@pytest.mark.tree
@as_root
def test_a_user_s_server_makes_its_tree_in_the_highest_delegated_cgroup(state, nested):
    user = 65534
    os.chown(state, user, user)
    session = Cgroup(f"{nested.path}/session.scope")
    session.create()
    for path in (nested.path, session.path):
        for file in (".", "cgroup.procs", "cgroup.subtree_control"):
            os.chown(f"{path}/{file}", user, user)
    wrapper = (
        *in_cgroup(nested, leaf="/session.scope"),
        "setpriv",
        f"--reuid={user}",
        f"--regid={user}",
        "--clear-groups",
    )
    printed = in_server(state, SHOW_TREE, wrapper=wrapper, interpreter=PYTHON)
    assert f"tree {nested.path}/jobworker/{jobworker.state_name(state)} job " in printed


@pytest.mark.tree
@as_root
def test_a_server_refuses_to_make_its_tree_in_the_cgroup_of_its_own_unit(state, nested):
    user = 65534
    os.chown(state, user, user)
    unit = Cgroup(f"{nested.path}/box.service")
    unit.create()
    for file in (".", "cgroup.procs", "cgroup.subtree_control"):
        os.chown(f"{unit.path}/{file}", user, user)
    wrapper = (*in_cgroup(unit), "setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups")
    printed = in_server(state, "pass", wrapper=wrapper, interpreter=PYTHON, status=1)
    assert "own unit box.service" in printed


@as_root
@pytest.mark.parametrize(
    ("wrapper", "user", "sentences"),
    [
        (NO_CGROUP, None, ["no cgroup2 mount", "cpu and memory and pids and io", "--without"]),
        (READ_ONLY_CGROUP, None, ["read-only", "cpu and memory and pids and io", "--without"]),
        ((), 65534, ["may not manage any cgroup", "systemd-run --user --scope", "--without"]),
    ],
    ids=["none", "read-only", "session"],
)
def test_serve_on_a_machine_that_cannot_enforce_a_limit_is_refused_in_one_sentence(state, wrapper, user, sentences):
    if user:
        os.chown(state, user, user)
    identity = {"user": user, "group": user, "extra_groups": ()} if user else {}
    printed = in_server(
        state, "pass", wrapper=wrapper, options={"without": frozenset()}, status=1, interpreter=PYTHON, **identity
    )
    assert printed.startswith("refused: ")
    assert len(printed.splitlines()) == 1
    for sentence in sentences:
        assert sentence in printed


@pytest.mark.skipif(not missing_controllers(), reason="this machine has all controllers")
@in_loop
async def test_a_missing_controller_is_named_unless_without_lists_it(state):
    with pytest.raises(JobWorkerError, match="memory") as refused:
        async with worker_on(state, without=frozenset()):
            pass
    assert "--without cpu,memory,pids,io" in str(refused.value)
    async with worker_on(state, without=frozenset(missing_controllers())) as worker:
        assert await output(worker, await start_id(worker, shell("echo hello"))) == b"hello\n"
        assert any("not enforced" in note for note in worker.notes())


@as_root
@pytest.mark.parametrize("wrapper", [NO_CGROUP, READ_ONLY_CGROUP], ids=["none", "read-only"])
def test_without_cgroups_a_stop_kills_the_job_s_descendants_that_hide(state, mark, wrapper):
    script = (
        f"env -i {PYTHON} -c '''{HIDDEN_GRANDCHILDREN}''' {mark} & exec {PYTHON} -c '''{HIDDEN_GRANDCHILDREN}''' {mark}"
    )
    body = f"""
        first = await start_id(worker, JobRequest("sh", ("-c", {script!r}), owner="alice"))
        second = await start_id(worker, JobRequest("sh", ("-c", {script!r} + "& while ! [ -e x ]; do :; done"), owner="bob"))
        for job in first, second:
            text = b""
            async for chunk in worker.stream(worker.job(job)):
                text += chunk
                if text.count(b"deep") == 2:
                    break
            print("hidden", text.count(b"deep"))
        for job in first, second:
            await worker.stop(worker.job(job))
            print(worker.status(worker.job(job)).status, worker.status(worker.job(job)).exit_code)
        print("cgroup", [note for note in worker.status(worker.job(first)).notes if "no cgroup" in note])
    """
    printed = in_server(state, body, wrapper=wrapper)
    assert printed.count("hidden 2") == printed.count("STOPPED 137") == 2
    assert "there is no cgroup" in printed
    assert not processes_with(mark)


@as_root
def test_without_cgroups_no_fork_escapes_the_kill(state, mark):
    body = f"""
        for _ in range(10):
            job = await start_id(worker, JobRequest({PYTHON!r}, ("-c", {FORKS_TWICE!r}, {mark!r}), owner="alice"))
            await output(job)
            print("ended", worker.status(worker.job(job)).exit_code)
        job = await start_id(worker, JobRequest({PYTHON!r}, ("-c", {FORK_STORM!r}), owner="alice"))
        async for chunk in worker.stream(worker.job(job)):
            break
        await worker.stop(worker.job(job))
        print(worker.status(worker.job(job)).status)
    """
    assert in_server(state, body, wrapper=NO_CGROUP) == "ended 4\n" * 10 + "STOPPED\n"
    assert not processes_with(mark)


@as_root
def test_without_cgroups_the_processes_of_a_lost_job_are_found_and_killed(state, mark):
    body = f"""
        script = "sh -c 'sleep 1000; : {mark}' & echo $PPID $$ $!; exec sh -c 'sleep 1000; : {mark}'"
        job = await start_id(worker, JobRequest("sh", ("-c", script), owner="alice"))
        async for chunk in worker.stream(worker.job(job)):
            shim, *processes = map(int, chunk.split())
            print("marked", sum({mark!r} in pathlib.Path(f"/proc/{{pid}}/cmdline").read_text() for pid in processes))
            os.kill(shim, 9)
        print(worker.status(worker.job(job)).ending)
    """
    printed = in_server(state, body, wrapper=NO_CGROUP)
    assert "marked 2\n" in printed
    assert "code=255" in printed
    assert not processes_with(mark)


def test_a_server_without_root_runs_jobs_as_its_own_user_and_notes_it(state):
    user = os.geteuid() or 65534
    body = """
        job = await start_id(worker, JobRequest("id", ("-u",), owner="alice"))
        print("uid", (await output(job)).decode(), worker.status(worker.job(job)).notes)
        try:
            await start_id(worker, JobRequest("id", owner="alice", run_as="root"))
        except JobWorkerError as error:
            print(error)
    """
    os.chown(state, user, -1)
    identity = {"user": user, "group": user, "extra_groups": ()} if os.geteuid() == 0 else {}
    printed = in_server(state, body, interpreter=PYTHON, **identity)
    assert f"uid {user}\n" in printed
    assert "the server's own user" in printed
    assert "only root can run a job as 'root'" in printed


LIMIT_FILES = ("cpu.max", "memory.max", "memory.swap.max", "memory.oom.group", "pids.max", "io.max")


def read_limits(cgroup):
    return {file: text.strip() for file in LIMIT_FILES if (text := jobworker.kernel_read(f"{cgroup}/{file}"))}


def io_limit_text(rate):
    """What io.max holds when every disk has this limit."""
    return "\n".join(f"{disk.number} rbps={rate} wbps={rate} riops=max wiops=max" for disk in jobworker.whole_disks())


@pytest.mark.controllers
@in_loop
async def test_the_kernel_holds_a_job_s_limits_before_its_command_runs(state):
    async with worker_on(state, without=frozenset()) as worker:
        job = await start_id(worker, shell(WAITS, cpu=0.5, memory=64 * MIB, pids=10, io=MIB))
        limits = read_limits(worker.status(worker.job(job)).spec.cgroup)
        assert limits.pop("memory.swap.max", "0") == "0"
        assert limits == {
            "cpu.max": "50000 100000", "memory.max": str(64 * MIB), "memory.oom.group": "1", "pids.max": "10",
            "io.max": io_limit_text(MIB),
        }  # fmt: skip
        await worker.stop(worker.job(job))


@pytest.mark.controllers
@in_loop
async def test_a_cpu_hog_is_throttled_to_its_limit(state):
    hog = "import time\nwhile time.process_time() < 0.5: pass\nprint('done', flush=True)\ntime.sleep(1000)"
    async with worker_on(state, without=frozenset()) as worker:
        job = await start_id(worker, python(hog, cpu=0.25))
        await wait_for_output(worker, job, b"done")
        cgroup = worker.status(worker.job(job)).spec.cgroup
        counted = jobworker.keyed_values(jobworker.kernel_read(f"{cgroup}/cpu.stat"))
        assert jobworker.kernel_read(f"{cgroup}/cpu.max") == "25000 100000\n"
        assert counted["nr_periods"] >= counted["nr_throttled"] > 10
        assert counted["throttled_usec"] > 0
        assert counted["usage_usec"] >= 500_000
        await worker.stop(worker.job(job))
        assert worker.status(worker.job(job)).usage.cpu_seconds >= 0.5


@pytest.mark.controllers
@in_loop
async def test_all_processes_of_a_memory_hog_are_killed_and_its_reason_is_oom(state, mark):
    hog = "import os, sys, time\nif os.fork() == 0: time.sleep(1000)\nprint('ready', flush=True)\nx = b'x' * (1 << 30)"
    async with worker_on(state, without=frozenset()) as worker:
        other = await start_id(worker, shell(WAITS))
        job = await start_id(worker, python(hog, mark, memory=64 * MIB))
        assert await output(worker, job) == b"ready\n"
        assert ending(worker, job) == ("STOPPED", 137, "OOM")
        assert not processes_with(mark)
        peak = worker.status(worker.job(job)).usage.memory_peak
        assert peak is None or peak <= 64 * MIB
        assert ending(worker, other) == ("RUNNING", 0, "")
        await worker.stop(worker.job(other))


@pytest.mark.controllers
@in_loop
async def test_a_fork_bomb_stays_below_its_pids_limit_and_can_be_stopped(state, mark):
    bomb = "import os, signal\nwhile True:\n  try: os.fork()\n  except OSError: os.write(1, b'full'), signal.pause()"
    async with worker_on(state, without=frozenset()) as worker:
        job = await start_id(worker, python(bomb, mark, pids=20))
        await wait_for_output(worker, job, b"full")
        cgroup = worker.status(worker.job(job)).spec.cgroup
        assert int(jobworker.kernel_read(f"{cgroup}/pids.current")) <= 20
        assert jobworker.keyed_values(jobworker.kernel_read(f"{cgroup}/pids.events"))["max"] > 0
        await worker.stop(worker.job(job))
        assert ending(worker, job) == ("STOPPED", 137, "")
        assert not processes_with(mark)


@pytest.mark.controllers
@pytest.mark.skipif(not os.path.ismount("/scratch"), reason="needs /scratch, a file system on a real disk")
@in_loop
async def test_the_kernel_slows_a_writer_down_to_its_io_limit(nothing_is_left):
    """Two jobs write the same number of bytes. The one with the lower limit starts first and ends last."""
    state = new_state(nothing_is_left, "/scratch")
    writer = (
        "import mmap, os\n"
        "file = os.open('file', os.O_WRONLY | os.O_CREAT | os.O_DIRECT)\n"
        f"block = mmap.mmap(-1, {MIB // 4})\n"
        "print('ready', flush=True)\n"
        "for _ in range(32): os.write(file, block)"
    )
    async with worker_on(state, without=frozenset()) as worker:
        slow = await start_id(worker, python(writer, io=MIB))
        await wait_for_output(worker, slow, b"ready")
        assert read_limits(worker.status(worker.job(slow)).spec.cgroup)["io.max"] == io_limit_text(MIB)
        _, fast_status = await result(worker, python(writer, owner="bob"))
        assert ending(worker, slow) == ("RUNNING", 0, "")
        await output(worker, slow)
        slow_status = worker.status(worker.job(slow))
        for status in (slow_status, fast_status):
            assert (status.status, status.exit_code) == ("FINISHED", 0)
            assert status.usage.written_bytes >= 8 * MIB


@pytest.mark.controllers
@in_loop
async def test_a_job_cannot_raise_its_limits_or_leave_its_cgroup(state):
    async with worker_on(state, without=frozenset()) as worker:
        job = await start_id(
            worker, shell('echo ready; while [ ! -e "$HOME/go" ]; do :; done; . "$HOME/go"; echo tried')
        )
        cgroup = worker.status(worker.job(job)).spec.cgroup
        limits = read_limits(cgroup)
        parents = [os.path.dirname(cgroup), os.path.dirname(os.path.dirname(cgroup)), CgroupMount.find().point]
        tries = [f"echo max > {cgroup}/{file}" for file in limits if file != "io.max"]
        tries += [f"echo $$ > {folder}/cgroup.procs" for folder in (*parents, f"{cgroup}/sub")]
        tries += [f"mkdir {cgroup}/sub", f"rmdir {cgroup}", f"echo 1 > {cgroup}/cgroup.kill"]
        home = Path(worker.status(worker.job(job)).spec.home)
        (home / "new").write_text("\n".join(f"({line}) 2>/dev/null && echo did {line!r}" for line in tries))
        (home / "new").chmod(0o644)
        (home / "new").rename(home / "go")
        assert await output(worker, job) == b"ready\ntried\n"
        assert ending(worker, job)[:2] == ("FINISHED", 0)


@in_loop
async def test_a_kernel_without_cgroup_kill_kills_all_processes_of_a_cgroup(state, mark):
    async with worker_on(state) as worker:
        if worker._tree.root is None:
            pytest.skip("this machine gives no cgroup")
        job = await start_id(worker, python(HIDDEN_GRANDCHILDREN, mark))
        await wait_for_output(worker, job, b"deep")
        cgroup = Cgroup(worker.status(worker.job(job)).spec.cgroup)
        cgroup._kill_frozen()
        assert await output(worker, job) == b"deep\n"
        assert not processes_with(mark)
        assert ending(worker, job) == ("FINISHED", 137, "")


LIMITS = [  # the request; the job's memory limit, where the default is 512 MiB and the cap 1 GiB
    ({}, 512 * MIB),
    ({"memory": 1}, 1),
    ({"memory": 1024 * MIB}, 1024 * MIB),
    ({"memory": 1024 * MIB + 1}, BadRequestError),
    ({"memory": 0}, BadRequestError),
    ({"memory": -1}, BadRequestError),
    ({"cpu": float("nan")}, BadRequestError),
    ({"cpu": float("inf")}, BadRequestError),
    ({"cpu": 1.01}, BadRequestError),
    ({"pids": 0}, BadRequestError),
    ({"io": 64 * MIB + 1}, BadRequestError),
]


@pytest.mark.parametrize(("request_", "memory"), LIMITS, ids=str)
def test_a_request_may_lower_a_limit_or_raise_it_up_to_the_cap(tmp_path, request_, memory):
    options = WorkerOptions(tmp_path, caps=Limits(memory=1024 * MIB))
    if memory is BadRequestError:
        with pytest.raises(BadRequestError, match=f"{next(iter(request_))}.*--max-"):
            jobworker.limits_of(JobRequest("true", **request_), options)
    else:
        assert jobworker.limits_of(JobRequest("true", **request_), options).memory == memory


def test_half_a_cpu_may_be_asked_for_where_a_program_gave_the_cap_as_a_whole_number(tmp_path):
    options = WorkerOptions(tmp_path, caps=Limits(cpu=4))
    assert jobworker.limits_of(JobRequest("true", cpu=0.5), options).cpu == 0.5


# --- Output and inotify -------------------------------------------------------------------------------
# Every follower receives every byte. No follower disturbs another one.


@in_loop
async def test_fifty_followers_that_begin_at_different_times_receive_the_same_bytes(state):
    size, followers = 50 * MIB, []
    expected = memoryview(random.Random(7).randbytes(size))

    async def follow(worker, job, offset):
        async for chunk in worker.stream(worker.job(job), offset):
            assert chunk == expected[offset : offset + len(chunk)]
            offset += len(chunk)
        return offset

    async with worker_on(state) as worker:
        job = await start_id(worker, python(WRITES_BYTES, str(size)))
        received = 0
        async for chunk in worker.stream(worker.job(job)):
            received += len(chunk)
            while len(followers) < 50 and received >= len(followers) * MIB:
                offset = random.Random(len(followers)).choice([0, 0, received // 2, received, size])
                followers.append(asyncio.create_task(follow(worker, job, offset)))
        assert received == size
        assert len(followers) == 50
        assert await asyncio.gather(*followers) == [size] * 50
        assert await follow(worker, job, 0) == size  # and after the job has ended
        assert await output(worker, job, size + 1) == b""
        assert worker.status(worker.job(job)).output_bytes == size


@in_loop
async def test_a_slow_or_vanished_follower_does_not_disturb_the_others(state):
    async with worker_on(state) as worker:
        job = await start_id(worker, python(WRITES_BYTES, str(8 * MIB)))
        slow = worker.stream(worker.job(job))
        vanishing = worker.stream(worker.job(job))
        cancelled = asyncio.create_task(output(worker, job))
        first = await anext(slow)
        await anext(vanishing)
        await vanishing.aclose()
        cancelled.cancel()
        expected = random.Random(7).randbytes(8 * MIB)
        assert await output(worker, job) == expected
        assert ending(worker, job) == ("FINISHED", 0, "")
        assert first + b"".join([chunk async for chunk in slow]) == expected
        assert worker.job(job).tail is None


@as_root
@in_loop
async def test_a_follower_receives_each_line_while_the_job_runs(state):
    async with worker_on(state) as worker:
        # Two FIFOs: with one, the second `read` might meet the end of file of the first write.
        job = await start_id(
            worker, shell("mkfifo a b; echo one; read line < a; echo $line; read line < b; echo $line")
        )
        home = Path(worker.status(worker.job(job)).spec.home)
        text = b""
        async with contextlib.aclosing(worker.stream(worker.job(job))) as chunks:
            async for chunk in chunks:
                text += chunk
                if text in (b"one\n", b"one\ntwo\n"):
                    assert ending(worker, job)[0] == "RUNNING"
                    gate, word = ("a", b"two\n") if text == b"one\n" else ("b", b"three\n")
                    (home / gate).write_bytes(word)
        assert text == b"one\ntwo\nthree\n"


@as_root
@in_loop
async def test_an_overflow_of_inotify_loses_no_byte_and_no_end(state):
    queue = Path("/proc/sys/fs/inotify/max_queued_events")
    usual = queue.read_text()
    queue.write_text("8")
    try:
        worker = worker_on(state)
        await worker.__aenter__()
    finally:
        queue.write_text(usual)
    overflows, handle_overflow = [], worker._inotify._overflowed
    worker._inotify._overflowed = lambda: (overflows.append(1), handle_overflow())
    try:
        script = "echo $PPID; read line < gate; for i in 1 2 3 4 5 6 7 8; do echo $i; done; exit 5"
        (state / "home").chmod(0o755)
        jobs = [
            await start_id(worker, shell(f"mkfifo gate; {script}", owner=f"owner-{number}")) for number in range(16)
        ]
        shims = [int(await wait_for_output(worker, job, b"\n")) for job in jobs]
        followers = [asyncio.create_task(output(worker, job)) for job in jobs]
        await asyncio.sleep(0)
        for job in jobs:
            (Path(worker.status(worker.job(job)).spec.home) / "gate").write_text("go\n")
        assert not survivors(shims)  # this blocks the event loop, so the queue overflows
        outputs = await asyncio.gather(*followers)
        assert overflows
        for job, shim, text in zip(jobs, shims, outputs, strict=True):
            assert text == f"{shim}\n1\n2\n3\n4\n5\n6\n7\n8\n".encode()
            assert ending(worker, job) == ("FINISHED", 5, "")
        assert len(worker._inotify) == 0
    finally:
        await worker.__aexit__(None, None, None)


@in_loop
async def test_a_stream_fails_with_unavailable_when_the_server_ends_and_the_job_goes_on(state):
    async with worker_on(state) as worker:
        job = await start_id(worker, shell(WAITS))
        follower = asyncio.create_task(output(worker, job))
        await wait_for_output(worker, job, b"ready")
        worker.begin_shutdown()
        with pytest.raises(UnavailableError, match="the job goes on"):
            await follower
    async with worker_on(state) as worker:
        assert ending(worker, job) == ("RUNNING", 0, "")
        await worker.stop(worker.job(job))


# --- Job folder, launcher and shim --------------------------------------------------------------------
# The events file; a job's environment; the kill of all its processes; the death of a launcher or a shim.

EVENTS = [
    ("born", {}),
    ("started", {}),
    ("exited", {"status": "STOPPED", "code": 137, "signal": 9, "reason": "", "by": "al%69."}),
    ("done", {"reason": "", "cpu_seconds": 0.25, "memory_peak": None, "read_bytes": 0, "written_bytes": 7}),
]


def make_spec(**changes):
    account = jobworker.Account.of_server()
    return dataclasses.replace(jobworker.Spec(
        id=ID, owner="alice", command="sh", args=("-c", "exit 7"), uid=account.uid, gid=account.gid, groups=(),
        user=account.name, home="/", cgroup="", controllers=(), limits=Limits(), timeout=0.0, max_output=MIB,
        reserve=0, splice=True, created=1.0,
    ), **changes)  # fmt: skip


def write_events(folder, lines, cut=None):
    descriptor = os.open(folder / "events", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    for word, facts in lines:
        jobworker.write_event(descriptor, word, **facts)
    size = os.fstat(descriptor).st_size
    os.truncate(descriptor, size if cut is None else cut)
    os.close(descriptor)
    return size


@pytest.mark.parametrize(("waiting", "small"), [(80, True), (8192, False)])
def test_a_pump_waits_for_more_bytes_only_while_the_pipe_has_room(tmp_path, waiting, small):
    """A full pipe blocks its writer. Pipes are small for a user whose jobs have many of them (pipe(7))."""
    pipe, writer = os.pipe()
    output = os.open(tmp_path / "output", os.O_WRONLY | os.O_CREAT)
    try:
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 8192)
        pump = jobworker.Pump(pipe, output, jobworker.Room(make_spec(max_output=MIB)), splices=True)
        os.write(writer, bytes(waiting))
        assert pump.move() is None
        assert pump.small_batch == small
    finally:
        for descriptor in (pipe, writer, output):
            os.close(descriptor)


def test_events_are_read_after_many_failed_finishers_wrote_to_them(tmp_path):
    write_events(tmp_path, EVENTS[:-1])
    with (tmp_path / "events").open("ab") as file:
        file.write(b"crashed KernelError cannot remove it\n" * 2000)
        file.write(b"done at=2.0 reason= cpu_seconds=None memory_peak=None read_bytes=None written_bytes=None .\n")
    assert jobworker.JobFolder(str(tmp_path)).read_events().phase == "done"


def test_a_stop_request_to_a_shim_that_ends_meanwhile_is_no_error(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "control")
    reader = os.open(tmp_path / "control", os.O_RDONLY | os.O_NONBLOCK)
    monkeypatch.setattr(
        jobworker.StopRequest, "to_line", lambda _: os.close(reader) or b"name"
    )  # between its open and its write
    assert jobworker.JobFolder(str(tmp_path)).send_request(jobworker.StopRequest(by="name")) is False


def test_events_cut_at_any_byte_count_up_to_their_last_complete_line(tmp_path):
    size = write_events(tmp_path, EVENTS)
    text = (tmp_path / "events").read_bytes()
    for cut in range(size + 1):
        (tmp_path / "events").write_bytes(text[:cut])
        events = jobworker.JobFolder(str(tmp_path)).read_events()
        # A line is complete with its dot, also without its line end.
        complete = len(re.findall(rb" \.(\n|$)", text[:cut]))
        assert events.phase == ["", "born", "started", "exited", "done"][complete]
        assert (events.ending is not None) == (complete >= 3)
    assert events.ending == jobworker.Ending("STOPPED", 137, 9, "", "al%69.")
    assert events.usage == jobworker.Usage(0.25, None, 0, 7)


@settings(deadline=None)
@given(
    st.integers(0, 255), st.sampled_from(["", "OOM", "TIMEOUT"]), st.text(), st.integers(0, 200), st.binary(max_size=40)
)
def test_an_incomplete_line_of_events_never_counts(code, reason, by, kept, rubbish):
    with tempfile.TemporaryDirectory() as folder:
        exited = {"status": "FINISHED", "code": code, "signal": 0, "reason": reason, "by": jobworker.encode_name(by)}
        write_events(Path(folder), [("born", {}), ("started", {}), ("exited", exited)])
        with open(f"{folder}/events", "r+b") as file:
            text = file.read()
            kept = min(kept, len(text))
            file.truncate(kept)
            file.seek(kept)
            file.write(b"\n" + rubbish.replace(b".", b"") + b"\n")
        events = jobworker.JobFolder(str(folder)).read_events()
        lines = text[:kept].count(b" .\n") + (text[kept - 2 : kept] == b" .")
        assert events.phase == ["", "born", "started", "exited"][lines]
        if events.phase == "exited":
            assert events.ending == jobworker.Ending("FINISHED", code, 0, reason, jobworker.encode_name(by).strip("-"))


@given(st.text())
def test_any_name_encodes_to_one_word_and_decodes_to_itself(name):
    word = jobworker.encode_name(name)
    assert jobworker.decode_name(word) == name
    assert re.fullmatch(r"[0-9A-Za-z%.]*", word)


EVENT_LINES = [  # the lines of an events file; the phase that they give
    ("", ""),
    ("born at=1 .\n", "born"),
    ("started at=1 .\n", ""),
    ("born at=1 .\nfailed at=1 errno=2 .\n", "failed"),
    ("born at=1 .\nfailed at=1 errno=2 .\nstarted at=1 .\n", "failed"),
    ("born at=1 .\nstarted at=1 .\nborn at=2 .\n", "started"),
    ("born at=1 .\nstarted at=1 .\ndone at=1 .\n", "started"),
    (
        "born at=1 .\nstarted at=1 .\nexited at=1 st\nexited at=2 status=FINISHED code=3 signal=0 reason=- by=- .\n",
        "exited",
    ),
    ("born at=1 .\ncrashed OSError oh .\nstarted at=1 .\n", "started"),
    ("born at=1 .\n\0\0\0\xff\n", "born"),
]


@pytest.mark.parametrize(("text", "phase"), EVENT_LINES)
def test_an_event_counts_only_where_it_may_follow_the_one_before(tmp_path, text, phase):
    (tmp_path / "events").write_text(text, "latin-1")
    assert jobworker.JobFolder(str(tmp_path)).read_events().phase == phase


@in_loop
async def test_a_job_that_forks_twice_and_exits_leaves_no_process(state, mark):
    async with worker_on(state) as worker:
        for _ in range(10):
            _, status = await result(worker, python(FORKS_TWICE, mark))
            assert (status.status, status.exit_code) == ("FINISHED", 4)
            assert not processes_with(mark)
            assert not jobs_cgroups(state)


@in_loop
async def test_a_stop_kills_grandchildren_that_ignore_signals_and_have_their_own_session(state, mark):
    async with worker_on(state) as worker:
        job = await start_id(worker, python(HIDDEN_GRANDCHILDREN, mark))
        await wait_for_output(worker, job, b"deep")
        assert len(processes_with(mark)) == 3
        await worker.stop(worker.job(job), by="bob the builder")
        assert not processes_with(mark)
        assert ending(worker, job) == ("STOPPED", 137, "")
        assert worker.status(worker.job(job)).stopped_by == "bob the builder"


@in_loop
async def test_no_process_of_a_fork_storm_escapes_the_kill(state, mark):
    async with worker_on(state) as worker:
        job = await start_id(worker, python(FORK_STORM, mark))
        await wait_for_output(worker, job, b"storm")
        await worker.stop(worker.job(job))
        assert not processes_with(mark)
        assert not jobs_cgroups(state)


OUTPUTS = [  # a command; its whole output
    ("printf 'last words'", b"last words"),
    ("exec 3>&1; (echo child >&3; (echo grandchild >&3) &) | cat", b"child\ngrandchild\n"),  # cat waits for both
    ("echo x >/dev/stderr", b"x\n"),
    ("echo x | tee /dev/stderr", b"x\nx\n"),
    ("echo x >/proc/self/fd/1; echo y >/proc/self/fd/2; echo z >/dev/stdout", b"x\ny\nz\n"),
    ("echo out; echo err >&2; echo out; echo err >&2", b"out\nerr\nout\nerr\n"),
    ("true", b""),
    ("exec >&- 2>&-; sleep 0.1", b""),
    ("cat; echo end of stdin", b"end of stdin\n"),
    ("printf '\\000\\377\\r\\n\\033['", b"\0\xff\r\n\x1b["),
    ("head -c 3000000 /dev/zero; kill -9 $$", bytes(3_000_000)),
]


@pytest.mark.parametrize(("script", "expected"), OUTPUTS, ids=[script[:30] for script, _ in OUTPUTS])
@in_loop
async def test_everything_that_a_job_prints_arrives_in_order(state, script, expected):
    async with worker_on(state) as worker:
        assert (await result(worker, shell(script)))[0] == expected


@as_root
@in_loop
async def test_the_output_of_a_child_that_outlives_its_parent_is_kept(state):
    # The child prints each number before it writes it to a file. So each number in the file must have arrived.
    program = (
        "import os, time\nif os.fork(): os.read(os.open('ready', os.O_RDONLY), 1), os._exit(0)\n"
        "notes = os.open('notes', os.O_WRONLY | os.O_CREAT)\nn = 0\ngate = None\n"
        "while True:\n  n += 1\n  os.write(1, b'%d\\n' % n)\n  os.write(notes, b'%d\\n' % n)\n"
        "  if gate is None and n == 100: gate = os.open('ready', os.O_RDWR); os.write(gate, b'x')"
    )
    async with worker_on(state) as worker:
        text, status = await result(
            worker, python(f"import os\nos.path.exists('ready') or os.mkfifo('ready')\n{program}")
        )
        noted = (Path(status.spec.home) / "notes").read_bytes()
        assert status.exit_code == 0
        assert noted.count(b"\n") >= 100
        assert text.startswith(noted)


@as_root
@in_loop
async def test_a_job_cannot_change_its_own_events_output_or_shim(state):
    tries = [
        "kill -9 $PPID", "kill -STOP $PPID", "cat $STATE/jobs/$ID/job.json", "ls $STATE/jobs", "ls $STATE",
        ": > $STATE/jobs/$ID/output", "rm $STATE/jobs/$ID/output",
        "echo 'done at=1 .' >> $STATE/jobs/$ID/events", "echo 'kill x' > $STATE/jobs/$ID/control",
        "truncate -s 0 /proc/self/fd/1", "truncate -s 0 /dev/stdout", "ls /proc/$PPID/fd/", "echo x > /proc/$PPID/fd/3",
        "cat $STATE/lock", "mv $HOME $HOME.x", "mkdir $STATE/home/x", "echo -1000 > /proc/self/oom_score_adj",
    ]  # fmt: skip
    script = "\n".join(f"({line}) 2>/dev/null && echo 'could: {line}'" for line in tries)
    async with worker_on(state) as worker:
        names = f"STATE={state} ID=$JOBWORKER_JOB_ID"
        text, status = await result(worker, shell(f"echo first; {names}\n{script}\necho last; exit 3"))
        assert text == b"first\nlast\n"
        assert (status.status, status.exit_code) == ("FINISHED", 3)


@in_loop
async def test_a_job_starts_with_descriptors_0_1_and_2_and_no_other(state):
    program = "import os\nfor n in range(3000):\n  try: os.fstat(n); print(n, os.readlink(f'/proc/self/fd/{n}'))\n  except OSError: 0"
    async with worker_on(state) as worker:
        jobs = await asyncio.gather(
            *(start_id(worker, python(program)) for _ in range(16))
        )  # many starts at the same time
        for job in jobs:
            lines = [line.split(" ") for line in (await output(worker, job)).decode().splitlines()]
            assert [number for number, _ in lines] == ["0", "1", "2"]
            assert lines[0][1] == "/dev/null"
            assert lines[1][1].startswith("pipe:")
            assert lines[2][1] == lines[1][1]


@in_loop
async def test_a_job_s_environment_is_not_the_server_s(state, monkeypatch):
    monkeypatch.setenv("SECRET", "the server's")
    async with worker_on(state) as worker:
        text, status = await result(worker, JobRequest("env", owner="alice"))
        assert dict(line.split("=", 1) for line in text.decode().splitlines()) == {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": status.spec.home, "USER": status.spec.user, "LANG": "C.UTF-8", "PYTHONUNBUFFERED": "1",
            "JOBWORKER_JOB_ID": status.spec.id,
        }  # fmt: skip


def test_a_job_s_signals_limits_and_session_do_not_depend_on_the_server_s(state):
    body = """
        import resource
        job = await start_id(worker, JobRequest("sh", ("-c", "ulimit -Sn; umask"), owner="alice"))
        print(await output(job))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        os.kill(worker._launcher.process, 9)
        script = "ulimit -Sn; umask; cat /proc/self/oom_score_adj; grep Sig[BI] /proc/self/status"
        job = await start_id(worker, JobRequest("sh", ("-c", script), owner="alice"))
        print((await output(job)).decode())
        job = await start_id(worker, JobRequest("cat", ("/proc/self/stat",), owner="alice"))
        process, _, _, parent, group, session, *_ = (await output(job)).decode().split()
        print("own session", process == group == session != parent)
    """

    def change_process():
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 4096))
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD):
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGQUIT])
        os.umask(0o077)
        Path("/proc/self/oom_score_adj").write_text("500")

    printed = in_server(state, body, preexec_fn=change_process)
    assert "b'256\\n0022\\n'" in printed
    zeros = "0" * 16
    expected = f"256\n0022\n0\nSigBlk:\t{zeros}\nSigIgn:\t{zeros}\n"
    assert expected in printed
    assert "own session True" in printed


def lower_own_limits(*, hard):
    """Give this process what `ulimit`, `nice` and `taskset` give a server."""
    for name, value in (("FSIZE", 100 * KIB), ("CORE", 0), ("CPU", 600), ("DATA", 4 << 30), ("STACK", 4 * MIB)):
        number = getattr(resource, f"RLIMIT_{name}")
        resource.setrlimit(number, (value, value if hard else resource.getrlimit(number)[1]))
    os.nice(10)
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])


def has_capability(number):
    """Whether this process has a capability (capabilities(7))."""
    status = Path("/proc/self/status").read_text()
    return bool(int(re.search(r"CapEff:\s*(\w+)", status)[1], 16) >> number & 1)


CAP_SYS_RESOURCE = 24
hard_limits = pytest.param(
    True,
    marks=[
        pytest.mark.controllers,  # the guest's root has the capability
        pytest.mark.skipif(not has_capability(CAP_SYS_RESOURCE), reason="needs CAP_SYS_RESOURCE"),
    ],
)


@as_root
@pytest.mark.parametrize("hard", [False, hard_limits], ids=["soft", "hard"])
def test_a_root_server_s_ulimits_nice_value_and_cpus_do_not_reach_its_jobs(shared, state, certs, hard):
    """The jobs print more than the 100 KiB that the server's RLIMIT_FSIZE allows, and lose none of it."""
    look = ("sh", "-c", "cat /proc/self/limits; nice; grep Cpus_allowed_list /proc/self/status")
    usual = shared.run("stream", shared.start("--", *look)).stdout
    assert "\n0\n" in usual
    with serving(state, certs, preexec_fn=functools.partial(lower_own_limits, hard=hard)) as served:
        limits = Path(f"/proc/{served.process.pid}/limits").read_text()
        assert re.search("Max file size +102400 +102400 " if hard else "Max file size +102400 ", limits)
        assert served.run("stream", served.start("--", *look)).stdout == usual
        job = served.start("--", PYTHON, "-c", WRITES_BYTES, str(MIB))
        status = status_at_end(served, job)
        assert (status.status, status.exitcode, status.reason) == (pb.FINISHED, 0, "")
        assert call(served, "GetOutputStream", pb.GetStreamRequest(id=job)) == random.Random(7).randbytes(MIB)


@pytest.mark.parametrize("splice", [True, False], ids=["splice", "write"])
def test_a_shim_that_may_not_write_more_ends_its_job_with_disk_full(state, splice):
    """Only root can raise a hard RLIMIT_FSIZE. A write beyond it sends SIGXFSZ, which must not kill the shim."""
    body = f"""
        jobworker.splice_is_reported = lambda _folder: {splice}
        job = await start_id(worker, JobRequest("yes", owner="alice"))
        print("bytes", len(await output(job)))
        status = worker.status(worker.job(job))
        print(status.status, status.exit_code, status.ending.reason, status.output_bytes)
        job = await start_id(worker, JobRequest("sh", ("-c", "echo hello; exit 3"), owner="alice"))
        print(await output(job), worker.status(worker.job(job)).exit_code)
    """
    user = os.geteuid() or 65534
    os.chown(state, user, -1)
    identity = {"user": user, "group": user, "extra_groups": ()} if os.geteuid() == 0 else {}
    printed = in_server(
        state, body, interpreter=PYTHON, preexec_fn=functools.partial(lower_own_limits, hard=True), **identity
    )
    assert printed.splitlines() == ["bytes 102400", "STOPPED 137 DISK_FULL 102400", "b'hello\\n' 3"]


@as_root
@in_loop
async def test_the_start_after_a_killed_launcher_works(state):
    async with worker_on(state) as worker:
        before = await start_id(worker, shell(WAITS))
        for _ in range(2):
            os.kill(worker._launcher.process, signal.SIGKILL)
            assert (await result(worker, shell("echo hello")))[0] == b"hello\n"
        assert ending(worker, before) == ("RUNNING", 0, "")
        await worker.stop(worker.job(before))


@in_loop
async def test_no_start_is_lost_when_the_launcher_is_killed_with_requests_in_its_queue(state):
    async with worker_on(state) as worker:
        os.kill(worker._launcher.process, signal.SIGSTOP)
        starts = [asyncio.create_task(start_id(worker, shell(f"echo {number}"))) for number in range(5)]
        while worker.running < 5:
            await asyncio.sleep(0)
        os.kill(worker._launcher.process, signal.SIGKILL)
        jobs = await asyncio.gather(*starts)
        assert [await output(worker, job) for job in jobs] == [b"%d\n" % number for number in range(5)]


@in_loop
async def test_a_killed_shim_loses_its_own_job_only(state, mark, capfd):
    async with worker_on(state) as worker:
        jobs = [await start_id(worker, shell(f"echo $PPID; sh -c 'sleep 1000; : {mark}' & wait")) for _ in range(3)]
        shims = [int(await wait_for_output(worker, job, b"\n")) for job in jobs]
        os.kill(shims[1], signal.SIGKILL)
        assert await output(worker, jobs[1]) == f"{shims[1]}\n".encode()
        assert [ending(worker, job) for job in jobs] == [
            ("RUNNING", 0, ""),
            ("FINISHED", 255, "LOST"),
            ("RUNNING", 0, ""),
        ]
        assert len(processes_with(mark)) == 4
        assert len(jobs_cgroups(state)) == (2 if worker._tree.root else 0)
        await worker.stop_all("root")
        assert [ending(worker, job)[0] for job in jobs] == ["STOPPED", "FINISHED", "STOPPED"]
    assert f"job {jobs[1]}" in capfd.readouterr().err


@as_root
@in_loop
async def test_a_hundred_concurrent_starts_all_succeed(state):
    async with worker_on(state) as worker:
        jobs = await asyncio.gather(*(start_id(worker, shell(f"echo {number}")) for number in range(100)))
        assert [await output(worker, job) for job in jobs] == [b"%d\n" % number for number in range(100)]


LIMIT_ENDINGS = [  # options; request; script; the job's ending; bytes of output (None: any number)
    ({}, {"timeout": 0.2}, WAITS, ("STOPPED", 137, "TIMEOUT"), None),
    ({"timeout": 0.2}, {}, WAITS, ("STOPPED", 137, "TIMEOUT"), None),
    ({"timeout": 0.2}, {"timeout": 0.0}, "sleep 0.4; exit 3", ("FINISHED", 3, ""), 0),
    ({}, {"timeout": 0.2}, "trap '' TERM; sleep 1000 & sleep 1000", ("STOPPED", 137, "TIMEOUT"), 0),
    ({"max_output": 100_000}, {}, "yes", ("STOPPED", 137, "OUTPUT_LIMIT"), 100_000),
    ({}, {"max_output": 3 * MIB + 1}, "yes", ("STOPPED", 137, "OUTPUT_LIMIT"), 3 * MIB + 1),
    ({}, {"max_output": 6}, "echo hello; sleep 0.1; exit 4", ("FINISHED", 4, ""), 6),
    ({}, {}, "kill -15 $$", ("FINISHED", 143, ""), 0),
    ({}, {}, "kill -9 $$", ("FINISHED", 137, ""), 0),
]


@pytest.mark.parametrize(("options", "request_", "script", "expected", "size"), LIMIT_ENDINGS)
@in_loop
async def test_a_job_ends_at_its_timeout_or_at_exactly_its_output_limit(
    state, options, request_, script, expected, size
):
    async with worker_on(state, **options) as worker:
        job = await start_id(worker, shell(script, **request_))
        text = await output(worker, job)
        assert ending(worker, job) == expected
        assert size is None or len(text) == size == worker.status(worker.job(job)).output_bytes
        assert not jobs_cgroups(state)


@in_loop
async def test_a_job_that_exits_with_more_than_its_output_limit_in_the_pipe_is_finished(state):
    # The shim is stopped while the job writes and ends. So the pipe holds everything when the shim reads it.
    script = "echo $PPID; kill -STOP $$; head -c 60000 /dev/zero; exit 6"
    async with worker_on(state, max_output=50_000) as worker:
        job = await start_id(worker, shell(script))
        shim = int(await wait_for_output(worker, job, b"\n"))
        (main,) = children(shim)
        os.kill(shim, signal.SIGSTOP)
        while jobworker.kernel_read(f"/proc/{main}/stat").rpartition(")")[2].split()[0] != "Z":
            os.kill(main, signal.SIGCONT)
            await asyncio.sleep(0.01)
        os.kill(shim, signal.SIGCONT)
        text = await output(worker, job)
        assert ending(worker, job) == ("FINISHED", 6, "OUTPUT_LIMIT")
        assert len(text) == 50_000


def test_limits_end_jobs_while_no_server_runs(state):
    body = f"""
        await start_id(worker, JobRequest("yes", owner="alice", id={ID!r}, max_output=2_000_001))
        await start_id(worker, JobRequest("sleep", ("1000",), owner="alice", id={ID2!r}, timeout=1.0))
        os.kill(os.getpid(), 9)
    """
    in_server(state, body, status=-9)
    wait_for_orphans()  # the shims, which end the jobs

    @in_loop
    async def check():
        async with worker_on(state) as worker:
            assert ending(worker, ID) == ("STOPPED", 137, "OUTPUT_LIMIT")
            assert worker.status(worker.job(ID)).output_bytes == 2_000_001
            assert ending(worker, ID2) == ("STOPPED", 137, "TIMEOUT")

    check()


# --- Confinement ----------------------------------------------------------------------------------------
# What a job can reach of other owners, and what it leaves. A confined job tries each attack and must fail. An unconfined
# job tries it too and must succeed, which shows that the attack itself works.

KEYCTL = jobworker.SYS_KEYCTL.get(os.uname().machine, -1)
ADD_KEY = KEYCTL - 2  # of every architecture
UNCONFINED = {"without": frozenset({"auto", "confine"})}
NEIGHBOUR = r"""
import ctypes, os, sys, time
mark, key, add_key = sys.argv[1], *map(int, sys.argv[2:4])
libc = ctypes.CDLL(None)
assert libc.shmget(key, 4096, 0o1666) >= 0
for path in (f"/dev/shm/{mark}", f"/tmp/{mark}", f"/var/tmp/{mark}", "secret", f"/run/lock/{mark}"):
    try:
        with open(path, "w") as file:
            file.write("secret")
        os.chmod(path, 0o666)
    except OSError:
        assert "lock" in path
libc.syscall(ctypes.c_long(add_key), b"user", mark.encode(), b"secret", ctypes.c_size_t(6), -3)  # the session keyring
print(os.getpid(), flush=True)
time.sleep(1000)
"""
WAYS = [  # the attack; the account of the unconfined job with which it succeeds
    ("open(f'{state}/home/{uid}/secret').read()", "root"),
    ("os.listdir(f'{state}/home')", "root"),
    ("os.stat(f'{state}/home/{uid}')", ""),
    ("os.listdir(f'{state}/jobs')", "root"),
    ("open(f'{state}/jobs/{job}/output').read()", "root"),
    ("open(f'{state}/jobs/{job}/job.json').read()", "root"),
    ("os.stat(f'{state}/lock')", ""),
    ("open(f'/proc/{neighbour}/cmdline').read()", ""),
    ("open(f'/proc/{server}/cmdline').read()", ""),
    ("os.stat('/proc/1')", ""),
    ("open(f'/proc/{neighbour}/mem', 'rb')", "root"),
    ("os.listdir(f'/proc/{neighbour}/root/tmp')", "root"),
    ("os.listdir(f'/proc/{server}/fd')", "root"),
    ("os.kill(neighbour, 0)", "root"),
    ("os.kill(server, 0)", "root"),
    ("call(libc.ptrace, 0x4206, neighbour, 0, 0)", "root"),  # PTRACE_SEIZE
    ("call(libc.shmget, key, 0, 0)", ""),
    ("[line for line in open('/proc/sysvipc/shm') if str(key) in line][0]", ""),
    ("open(f'/dev/shm/{mark}').read()", ""),
    ("open(f'/tmp/{mark}').read()", ""),
    ("open(f'/var/tmp/{mark}').read()", ""),
    ("open(f'/run/lock/{mark}').read()", ""),
    ("os.listdir('/run/lock')", ""),
    ("call(libc.syscall, keyctl, 10, -3, b'user', mark.encode(), 0)", ""),  # KEYCTL_SEARCH in the session keyring
    ("open(f'{certs}/a.pem').read()", ""),
    ("open(f'{certs}/a.key').read()", "root"),
    ("os.listdir(tree)", "root"),
    ("os.stat(f'{tree}/u{uid}/{job}')", "root"),
    ("open(f'{tree}/u{uid}/cgroup.stat').read()", "root"),
    ("open(f'{tree}/shims/cgroup.procs').read()", "root"),
]
INTRUDER = r"""
import ctypes, json, os, sys
globals().update(json.loads(sys.argv[1]))
libc = ctypes.CDLL(None, use_errno=True)
def call(function, *arguments):
    if function(*arguments) < 0:
        raise OSError(ctypes.get_errno(), "")
for way in sys.argv[2:]:
    try:
        eval(way)
    except (OSError, IndexError):
        continue
    print(way)
"""


async def ways_that_work(state, certs, mark, ways, run_as="", **options):
    """The attacks on bob's job and on the server that succeed from a job. `run_as` is the account of that job."""
    key = int(mark[-7:], 16)
    jobworker.libc().syscall(KEYCTL, 1, None)  # KEYCTL_JOIN_SESSION_KEYRING: one that the server's processes inherit
    async with worker_on(state, hidden=(str(certs),), **options) as worker:
        words = (mark, str(key), str(ADD_KEY))
        job = await start_id(worker, JobRequest(str(PYTHON_FOR_ALL), ("-c", NEIGHBOUR, *words), owner="bob"))
        facts = {"keyctl": KEYCTL,
            "neighbour": int(await wait_for_output(worker, job, b"\n")), "server": os.getpid(), "state": str(state), "job": job,
            "uid": worker.status(worker.job(job)).spec.uid, "mark": mark, "key": key, "certs": str(certs),
            "tree": worker._tree.root or "/nowhere",
        }  # fmt: skip
        intruder = JobRequest(str(PYTHON_FOR_ALL), ("-c", INTRUDER, json.dumps(facts), *ways), "alice", run_as=run_as)
        text, status = await result(worker, intruder)
        assert status.exit_code == 0, text
        await worker.stop_all()
        return text.decode().splitlines()


@pytest.fixture
def secrets(mark):
    """A folder of certificates below a folder that every user may enter. Removes what unconfined jobs leave."""
    with tempfile.TemporaryDirectory(prefix="jobworker-secrets-", dir="/var/lib") as folder:
        os.chmod(folder, 0o755)
        for name, mode in (("a.pem", 0o644), ("a.key", 0o600)):
            Path(folder, name).write_text("secret")
            Path(folder, name).chmod(mode)
        yield folder
    for path in ("/dev/shm", "/tmp", "/var/tmp", "/run/lock"):
        Path(path, mark).unlink(missing_ok=True)
    libc = jobworker.libc()
    if (segment := libc.shmget(int(mark[-7:], 16), 0, 0)) >= 0:
        libc.shmctl(segment, 0, None)  # IPC_RMID


@as_root
@pytest.mark.tree
@pytest.mark.parametrize("parent", ["/tmp", "/var/tmp", "/var/lib"])
@in_loop
async def test_a_confined_job_cannot_reach_another_owner_s_job_or_the_server(nothing_is_left, mark, secrets, parent):
    state = new_state(nothing_is_left, parent)
    assert await ways_that_work(state, secrets, mark, [way for way, _ in WAYS]) == []


@as_root
@pytest.mark.tree
@in_loop
async def test_an_unconfined_job_can_reach_what_a_confined_job_cannot(state, mark, secrets):
    for account in ("", "root"):
        ways = [way for way, control in WAYS if control == account and can_work(way)]
        assert await ways_that_work(state, secrets, mark, ways, account, **UNCONFINED) == ways


def can_work(way):
    """Whether this machine has what the attack needs."""
    if "keyctl" in way:
        return jobworker.libc().syscall(KEYCTL, 0, -3, 1) != -1  # KEYCTL_GET_KEYRING_ID
    if "/run/lock" in way:
        return "/run/lock" in jobworker.shared_folders()
    return "tree" not in way or CgroupMount.find() is not None


LITTERS = r"""
import ctypes, os, sys
ctypes.CDLL(None).shmget(int(sys.argv[2]), 4096, 0o1666)
for place in ("/dev/shm", "/tmp", "/var/tmp"):
    open(f"{place}/{sys.argv[1]}", "w").close()
os.symlink(os.environ["HOME"], "/tmp/link")
for place in ("/tmp", "/var/tmp"):
    os.mkdir(f"{place}/closed"), open(f"{place}/closed/file", "w").close(), os.chmod(f"{place}/closed", 0)
    os.chdir(place)
    for _ in range(1500):
        os.mkdir("deep"), os.mkdir("wide"), open("file", "w").close(), os.chdir("deep")
open(os.environ["HOME"] + "/kept", "w").close()
print(os.getppid(), flush=True)
"""


@as_root
@pytest.mark.parametrize("end", ["by itself", "stop", "lost", "server killed"])
def test_a_job_leaves_nothing_behind(state, mark, end):
    last = "" if end == "by itself" else "time.sleep(1000)"
    words = (str(PYTHON_FOR_ALL), ("-c", f"import time\n{LITTERS}{last}", mark, str(int(mark[-7:], 16))))
    mounts = Path("/proc/self/mountinfo").read_text()
    body = f"""
        job = await worker.start(JobRequest(*{words!r}, owner="alice", id={ID!r}))
        async for text in worker.stream(job):
            break
        if {end!r} == "server killed":
            os.kill(os.getpid(), 9)
        if {end!r} == "lost":
            os.kill(int(text), 9)
        if {end!r} == "stop":
            await worker.stop(job)
        await output(job.id)
    """
    in_server(state, body, status=-9 if end == "server killed" else 0)

    @in_loop
    async def look():
        async with worker_on(state) as worker:
            await worker.stop(worker.job(ID))
            assert ending(worker, ID)[0] == ("FINISHED" if end in ("by itself", "lost") else "STOPPED")
            assert sorted(os.listdir(state / "jobs" / ID)) == ["control", "events", "job.json", "output"]
            assert [path.name for path in (state / "home").glob("*/*")] == ["kept"]
            assert os.listdir(state / "view/hidden") == []

    look()
    assert processes_with(mark) == []
    assert not any(os.path.lexists(f"{place}/{mark}") for place in ("/dev/shm", "/tmp", "/var/tmp"))
    assert jobworker.libc().shmget(int(mark[-7:], 16), 0, 0) == -1
    assert Path("/proc/self/mountinfo").read_text() == mounts


@as_root
@in_loop
async def test_a_confined_job_cannot_gain_a_privilege_and_sees_only_its_own_processes(state):
    script = (
        "grep -E 'CapBnd|NoNewPrivs' /proc/self/status; sleep 1000 & cat /proc/$!/cmdline; echo x > /tmp/x; df /dev/shm"
    )
    async with worker_on(state) as worker:
        text, _ = await result(worker, shell(script))
        assert text.startswith(b"CapBnd:\t0000000000000000\nNoNewPrivs:\t1\nsleep")


@as_root
@in_loop
async def test_a_confined_job_has_no_fuse(state):
    if not os.path.exists("/dev/fuse"):
        pytest.skip("needs /dev/fuse")
    async with worker_on(state) as worker:
        text, _ = await result(worker, shell("stat -c %t:%T /dev/fuse; cat /dev/fuse"))
        assert text == b"1:3\n"


@as_root
@in_loop
async def test_a_job_with_run_as_is_confined_only_if_its_request_says_so(state):
    script = "grep NoNewPrivs /proc/self/status"
    async with worker_on(state) as worker:
        for asked in (False, True):
            text, status = await result(worker, shell(script, run_as="root", confine=asked))
            assert text == b"NoNewPrivs:\t%d\n" % asked
            assert status.spec.confine == asked
    async with worker_on(state, **UNCONFINED) as worker:
        assert any("not confined" in note for note in worker.notes())
        assert any("not confined" in note for note in (await result(worker, shell("true")))[1].notes)
        with pytest.raises(BadRequestError, match="does not confine jobs"):
            await start_id(worker, shell("true", run_as="root", confine=True))


LIMITLESS = frozenset(jobworker.CONTROLLERS)
WITHOUT_ADMIN = ("setpriv", "--bounding-set", "-sys_admin")


@as_root
def test_serve_on_a_machine_that_cannot_confine_jobs_is_refused_unless_without_lists_it(state):
    printed = in_server(state, "print('served')", wrapper=WITHOUT_ADMIN, status=1, options={"without": LIMITLESS})
    assert re.search(
        r"^refused: this machine cannot confine jobs: a mount and an IPC namespace: Operation not permitted; "
        "use `--without confine`",
        printed,
        re.MULTILINE,
    )
    for without in (LIMITLESS | {"confine"}, LIMITLESS | {"auto"}):
        body = "print(*worker.notes()); print(await output((await worker.start(JobRequest('echo', ('ran',)))).id))"
        printed = in_server(state, body, wrapper=WITHOUT_ADMIN, options={"without": without})
        assert "it is not confined" in printed
        assert "b'ran\\n'" in printed


IN_CONTAINER = """
import json, os, pathlib, sys
bundle, shown, *command = pathlib.Path(sys.argv[1]), *sys.argv[2:]
folders = [(f"/{name}", "ro") for name in ("bin", "etc", "lib", "lib64", "root", "usr")]
folders += [(word[1:], "rw" if word[0] == "+" else "ro") for word in shown.split(":")]
names = "CHOWN DAC_OVERRIDE FOWNER FSETID KILL MKNOD NET_BIND_SERVICE SETFCAP SETGID SETPCAP SETUID SYS_CHROOT".split()
capabilities = {kind: [f"CAP_{name}" for name in names] for kind in ("bounding", "effective", "permitted")}
mounts = [("/proc", "proc", []), ("/dev", "tmpfs", ["mode=755"]), ("/dev/shm", "tmpfs", ["mode=1777"]), ("/tmp", "tmpfs", [])]
mounts = [{"destination": place, "type": kind, "source": kind, "options": options} for place, kind, options in mounts]
mounts += [{"destination": place, "type": "bind", "source": place, "options": ["rbind", mode]}
           for place, mode in folders if os.path.isdir(place)]
(bundle / "root").mkdir()
(bundle / "config.json").write_text(json.dumps({
    "ociVersion": "1.0.2", "root": {"path": "root"}, "mounts": mounts,
    "linux": {"namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount")]},
    "process": {"user": {"uid": 0, "gid": 0}, "cwd": "/", "args": command, "capabilities": capabilities,
                "env": ["PATH=/usr/bin:/bin"]},
}))
os.execvp("runc", ["runc", "--root", f"{bundle}/runc", "run", "--bundle", str(bundle), bundle.name])
"""  # what Docker gives by default; the network is the machine's


@as_root
@in_loop
async def test_a_state_folder_below_dev_shm_is_refused_for_confined_jobs():
    """They would have no home: their own /dev/shm covers it."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        state = Path(folder, "state")
        os.chmod(folder, 0o711)
        with pytest.raises(jobworker.JobWorkerError, match=f"{state} lies below /dev/shm.*--without confine"):
            async with jobworker.Worker(jobworker.WorkerOptions(state, without=LIMITLESS)):
                pass
        async with worker_on(state, **UNCONFINED) as worker:
            assert (await result(worker, shell("cd ~ && pwd")))[0].decode().startswith(f"{state}/home/")


@as_root
@pytest.mark.skipif(not shutil.which("runc"), reason="needs runc")
@pytest.mark.parametrize("without", ["nothing", "confine", "auto"])
def test_a_container_without_sys_admin_is_refused_by_name_or_serves_with_a_note(state, tmp_path, without):
    bundle = Path(tempfile.mkdtemp(prefix="jobworker-", dir=tmp_path))
    wrapper = (sys.executable, "-c", IN_CONTAINER, str(bundle), f"+{state}:-{HERE}")
    body = "print(os.getpid(), *worker.notes()); print(await output((await worker.start(JobRequest('echo', ('ran',)))).id))"
    options = {"without": LIMITLESS | {without}}
    printed = in_server(state, body, wrapper=wrapper, options=options, status=1 if without == "nothing" else 0)
    if without == "nothing":
        assert (
            "cannot confine jobs: a mount and an IPC namespace: Operation not permitted; use `--without confine`"
            in printed
        )
    else:
        assert re.search(r"^1 .*it is not confined", printed, re.MULTILINE)
        assert "b'ran\\n'" in printed


@as_root
@in_loop
async def test_the_error_for_a_failed_step_of_the_confinement_names_the_step(state, tmp_path):
    broken = altered_copy(tmp_path, "dropped = tuple(", 'last.append(mount_step("nowhere", "/proc"))')
    with pytest.raises(broken.JobWorkerError, match="cannot confine jobs: a mount at /proc: No such file"):
        async with broken.Worker(broken.WorkerOptions(state, without=LIMITLESS)):
            pass
    broken.try_confinement = lambda *_: None
    async with worker_on(state, broken) as worker:
        with pytest.raises(broken.JobWorkerError, match=r"^cannot confine the job: a mount at /proc: No such file"):
            await worker.start(broken.JobRequest("true", owner="alice"))
        assert left_in(state) == []


@as_root
@pytest.mark.parametrize("confined", [True, False])
@in_loop
async def test_the_error_of_a_failed_start_does_not_reveal_files_that_the_job_cannot_read(state, confined):
    with tempfile.TemporaryDirectory(prefix="jobworker-closed-", dir="/var/lib") as closed:
        os.chmod(closed, 0o700)
        Path(closed, "program").write_text("#!/nowhere\n")
        Path(closed, "program").chmod(0o755)
        Path(closed, "folder").mkdir()
        sentences = set()
        async with worker_on(state, **({} if confined else UNCONFINED)) as worker:
            await result(worker, shell("printf '#!/nowhere\\n' > program; chmod 755 program", owner="bob"))
            homes = [path.parent for path in (state / "home").glob("*/program")]
            for folder in (closed, *homes):
                for name in ("program", "nothing", "folder", "program/x"):
                    with pytest.raises(BadRequestError) as refused:
                        await start_id(worker, JobRequest(f"{folder}/{name}", owner="alice"))
                    sentences.add(str(refused.value).replace(f"{folder}/{name}", "X"))
            with pytest.raises(BadRequestError, match=r"^'program' is not found on PATH"):
                await start_id(worker, JobRequest("program", owner="alice"))
            with pytest.raises(BadRequestError, match=r"^'\./program' cannot run: the interpreter"):
                await start_id(worker, JobRequest("./program", owner="bob"))
        closed_sentence = "'X' is not found, or is in a folder that is closed to alice"
        assert sentences == ({closed_sentence, "'X' is not found"} if confined else {closed_sentence})


@as_root
@in_loop
async def test_two_state_folders_never_give_the_same_uids(nothing_is_left, tmp_path, monkeypatch):
    monkeypatch.setattr(jobworker, "UID_CLAIMS", str(tmp_path / "claims"))
    monkeypatch.setattr(jobworker.zlib, "crc32", lambda _: 7)  # every state folder hashes to one range
    one, other = new_state(nothing_is_left), new_state(nothing_is_left)
    uids = {}
    for _ in range(2):  # a second server of each finds its own range again
        async with worker_on(one) as first, worker_on(other) as second:
            for name, worker in (("one", first), ("other", second)):
                _, status = await result(worker, shell("true", owner="alice"))
                assert uids.setdefault(name, status.spec.uid) == status.spec.uid
    assert abs(uids["one"] - uids["other"]) >= jobworker.UID_RANGE
    moved = new_state(nothing_is_left)
    moved.rmdir()
    one.rename(moved)
    async with worker_on(moved) as worker, worker_on(one) as remade:
        assert (await result(worker, shell("true", owner="alice")))[1].spec.uid == uids["one"]
        assert (await result(remade, shell("true", owner="bob")))[1].spec.uid not in uids.values()


@as_root
@in_loop
async def test_a_state_folder_with_the_uids_of_another_one_is_refused(nothing_is_left, tmp_path, monkeypatch):
    monkeypatch.setattr(jobworker, "UID_CLAIMS", str(tmp_path / "claims"))
    state, copy = new_state(nothing_is_left), new_state(nothing_is_left)
    async with worker_on(state) as worker:
        await result(worker, shell("true", owner="alice"))
    shutil.copytree(state / "owners", copy / "owners")
    with pytest.raises(JobWorkerError, match="another state folder has the uids from"):
        async with worker_on(copy):
            pass


# --- Job and job table --------------------------------------------------------------------------------
# The calls of the library; what a restart, a kill at any step and a full disk leave.


def test_the_example_in_the_worker_s_docstring_runs():
    runner = doctest.DocTestRunner()
    for example in doctest.DocTestFinder(recurse=False).find(Worker, "Worker", globs=dict(vars(jobworker))):
        runner.run(example)
    assert runner.summarize().failed == 0
    assert runner.tries > 0


def left_in(state):
    return sorted(os.listdir(state / "jobs"))


@pytest.fixture
def programs():
    """A folder of files that cannot be run or have odd names. Every user can read it."""
    with tempfile.TemporaryDirectory(prefix="jobworker-programs-", dir=FOR_ALL) as folder:
        os.chmod(folder, 0o755)
        for name, mode, text in (
            ("plain", 0o644, "#!/bin/sh\n"),
            ("no-shebang", 0o755, "echo hello\n"),
            ("no-interpreter", 0o755, "#!/nowhere/sh\n"),
            ("binary", 0o755, "\x7fELF\0\0"),
            ("empty", 0o755, ""),
            ("-dash", 0o755, '#!/bin/sh\necho "$0" "$@"\n'),
            ("ünï cödé\n☃", 0o755, '#!/bin/sh\nprintf %s, "$@"\n'),
        ):
            Path(folder, name).write_text(text)
            Path(folder, name).chmod(mode)
        os.symlink("loop", f"{folder}/loop")
        os.symlink("nowhere", f"{folder}/dangling")
        yield folder


REFUSED_COMMANDS = [  # command ({}: the folder of programs); arguments; part of the error
    ("", (), "the command is empty"),
    ("no-such-command", (), "'no-such-command' is not found on PATH, which is /usr/local/sbin:/usr/local/bin"),
    ("{}/missing", (), "missing' is not found"),
    ("missing/relative", (), "is not found"),
    ("{}", (), "is a folder, not a command"),
    ("{}/plain", (), "is not executable for"),
    ("{}/plain/x", (), "Not a directory"),
    ("{}/no-shebang", (), "no `#!` line"),
    ("{}/empty", (), "no `#!` line"),
    ("{}/binary", (), "is not a program for this machine"),
    ("{}/no-interpreter", (), "interpreter that it names"),
    ("{}/dangling", (), "cannot run|not found"),
    ("{}/loop", (), "Too many levels"),
    ("x" * 300, (), "too long"),
    ("true", ("x" * 200_000,), "with its 1 arguments is too long for the kernel"),
    ("true", ("x" * 100,) * 100_000, "with its 100000 arguments is too long"),
    ("tr\0ue", (), "the command contains a NUL byte"),
    ("true", ("a", "b\0c"), "argument 2 contains a NUL byte"),
    ("true", ("\ud800",), "cannot run"),
    ("\ud800", (), "cannot run|not found"),
    (" true", (), "not found"),
    ("true\n", (), "not found"),
    ("--", (), "not found"),
]


@in_loop
async def test_a_command_that_is_not_on_the_path_of_its_own_environment_is_refused_without_that_path(state):
    async with worker_on(state) as worker:
        for command, end in (("ls", ""), ("ls -l", "; for a line of shell use `sh -c`")):
            with pytest.raises(BadRequestError) as refused:
                await start_id(worker, JobRequest(command, owner="alice", env=(("PATH", "/nowhere"),)))
            assert str(refused.value) == f"{command!r} is not found on PATH, which the job's environment sets{end}"


@pytest.mark.parametrize(
    ("command", "args", "sentence"), REFUSED_COMMANDS, ids=[repr(c)[:20] + s[:20] for c, _, s in REFUSED_COMMANDS]
)
@in_loop
async def test_a_command_that_cannot_run_is_refused_in_one_sentence_and_leaves_nothing(
    state, programs, command, args, sentence
):
    async with worker_on(state) as worker:
        with pytest.raises(BadRequestError, match=sentence) as refused:
            await start_id(worker, JobRequest(command.format(programs), args, owner="alice"))
        assert len(str(refused.value).splitlines()) == 1
        assert left_in(state) == []
        assert not jobs_cgroups(state)
        assert worker.running == len(worker._table) == len(worker._inotify) == 0


ODD_WORDS = [  # command; arguments; output
    ("true", ("x",) * 100_000, b""),
    (
        "printf",
        ("%s|", "two words", "line\nend", "", "-n", "--", "*", "$HOME", "'"),
        b"two words|line\nend||-n|--|*|$HOME|'|",
    ),
    ("printf", ("%s", "ünïcödé ☃ \U0001f600 \u202e"), "ünïcödé ☃ \U0001f600 \u202e".encode()),
    ("printf", ("%s", "\udcff\udc80"), b"\xff\x80"),
    ("{}/-dash", ("-x",), b"{}/-dash -x\n"),
    ("{}/ünï cödé\n☃", ("\r",), b"\r,"),
]


@pytest.mark.parametrize(("command", "args", "expected"), ODD_WORDS, ids=[repr(row[0])[:20] for row in ODD_WORDS])
@in_loop
async def test_odd_words_reach_the_command_unchanged(state, programs, command, args, expected):
    async with worker_on(state) as worker:
        text, status = await result(worker, JobRequest(command.format(programs), args, owner="alice"))
        assert (text, status.exit_code) == (expected.replace(b"{}", programs.encode()), 0)
    async with worker_on(state) as worker:  # job.json holds them unchanged too
        assert worker.status(worker.job(status.spec.id)).spec == status.spec


@pytest.mark.parametrize(
    "job_id", ["x", ID.upper(), ID.replace("-", ""), ID + "\n", "../" + ID, ID.replace("-4", "-1")]
)
@in_loop
async def test_an_id_that_is_not_a_random_uuid_in_lower_case_is_refused(state, job_id):
    async with worker_on(state) as worker:
        with pytest.raises(BadRequestError, match="not a job id"):
            await start_id(worker, shell("true", id=job_id))
        assert left_in(state) == []


@in_loop
async def test_starts_with_the_same_id_start_one_job(state):
    async with worker_on(state) as worker:
        requests = [shell("echo hello; exec sleep 1000", id=ID)] * 3
        assert await asyncio.gather(*(start_id(worker, request) for request in requests)) == [ID] * 3
        assert left_in(state) == [ID]
        for other in (shell("echo hello; exec sleep 1000", id=ID, owner="bob"), shell("echo bye", id=ID)):
            with pytest.raises(IdTakenError):
                await start_id(worker, other)
        await wait_for_output(worker, ID, b"hello")
        await worker.stop(worker.job(ID))
        assert await start_id(worker, requests[0]) == ID
    async with worker_on(state) as worker:
        assert await start_id(worker, requests[0]) == ID
        assert await output(worker, ID) == b"hello\n"
        assert ending(worker, ID)[0] == "STOPPED"
        with pytest.raises(BadRequestError):
            await start_id(worker, JobRequest("no-such-command", owner="alice", id=ID2))
        assert await start_id(worker, shell("true", id=ID2)) == ID2  # the refused command does not use up the id


OTHER_REQUESTS = [{"cpu": 0.75}, {"memory": 65 << 20}, {"pids": 9}, {"timeout": 500.0}, {"max_output": 2000}, {"cwd": "/"},
                  {"env": (("A", "2"),)}, {"name": "other"}, {"input": True}, {"run_as": "daemon"}, {"confine": True}]  # fmt: skip


@in_loop
async def test_a_second_start_with_the_same_id_and_another_request_is_refused(state):
    asked = {"cpu": 0.5, "memory": 64 << 20, "pids": 8, "timeout": 400.0, "max_output": 1000, "env": (("A", "1"),)}
    async with worker_on(state, without=frozenset({"auto", "confine"})) as worker:
        for request in (shell("true", id=ID, **asked), shell("true", id=ID2)):
            await start_id(worker, request)
            assert await start_id(worker, request) == request.id
        for other in OTHER_REQUESTS:
            with pytest.raises(IdTakenError, match="another owner or request"):
                await start_id(worker, shell("true", id=ID, **{**asked, **other}))
    changed = {"defaults": jobworker.Limits(cpu=0.25, pids=7), "timeout": 9.0, "max_output": 500}
    async with worker_on(state, without=frozenset({"auto", "confine"}), **changed) as worker:
        assert await start_id(worker, shell("true", id=ID, **asked)) == ID
        assert await start_id(worker, shell("true", id=ID2)) == ID2  # the server chose its limits


@in_loop
async def test_the_id_of_a_removed_job_is_free_for_another_owner_and_command(state):
    async with worker_on(state) as worker:
        for owner, word in (("alice", "hers"), ("bob", "his")):
            assert await start_id(worker, shell(f"echo {word}", id=ID, owner=owner)) == ID
            assert await output(worker, ID) == f"{word}\n".encode()
            spec = worker.status(worker.job(ID)).spec
            assert (spec.owner, spec.args) == (owner, ("-c", f"echo {word}"))
            worker.remove(worker.job(ID))


@in_loop
async def test_every_call_raises_no_such_job_for_an_unknown_id(state):
    async with worker_on(state) as worker:
        with pytest.raises(NoSuchJobError, match=ID):
            worker.job(ID)
        with pytest.raises(NoSuchJobError):
            await worker.stop(worker.job(ID))
        with pytest.raises(NoSuchJobError):
            await output(worker, ID)


@in_loop
async def test_a_second_stop_and_a_stop_after_the_end_change_nothing(state):
    async with worker_on(state) as worker:
        job = await start_id(worker, shell(WAITS))
        await asyncio.gather(*(worker.stop(worker.job(job), by=f"user {n}") for n in range(5)))
        first = worker.status(worker.job(job))
        await worker.stop(worker.job(job), by="kill_timer")
        assert worker.status(worker.job(job)) == first
        assert first.status == "STOPPED"
        ended = await start_id(worker, shell("exit 3"))
        await output(worker, ended)
        await worker.stop(worker.job(ended), by="kill_timer")
        assert ending(worker, ended) == ("FINISHED", 3, "")
        assert worker.status(worker.job(ended)).stopped_by == ""


@in_loop
async def test_a_stop_at_the_same_time_as_the_end_gives_one_lasting_result(state):
    async with worker_on(state) as worker:
        jobs = []
        for _ in range(20):
            jobs.append(await start_id(worker, shell("exit 3")))
            await worker.stop(worker.job(jobs[-1]), by="x")
        before = [ending(worker, job) for job in jobs]
        assert set(before) <= {("STOPPED", 137, ""), ("FINISHED", 3, "")}
    async with worker_on(state) as worker:
        assert [ending(worker, job) for job in jobs] == before


@in_loop
async def test_a_job_that_kills_itself_before_a_stop_is_finished_and_not_stopped(state):
    async with worker_on(state) as worker:
        job = await start_id(worker, shell("kill -9 $$"))
        await output(worker, job)
        await worker.stop(worker.job(job))
        assert ending(worker, job) == ("FINISHED", 137, "")
        assert worker.status(worker.job(job)).ending.signal == 9


@as_root
@in_loop
async def test_each_owner_keeps_the_same_uid_and_private_home(state):
    script = "id -u; id -G; pwd; stat -c %a .; touch mine"
    homes = {}
    for _ in range(2):
        async with worker_on(state) as worker:
            for owner in ("alice", "bob", "../eve", "", "ünï\r\ncödé", "ünï\ncödé"):
                text, status = await result(worker, shell(script, owner=owner))
                uid, groups, home, mode = text.decode().splitlines()
                assert uid == groups == str(status.spec.uid)
                assert int(uid) >= 1000
                assert home == status.spec.home == str(state / "home" / uid)
                assert mode == "700"
                assert homes.setdefault(owner, home) == home
            text, status = await result(worker, shell(f"ls {homes['alice']} 2>/dev/null || echo private", owner="bob"))
            assert text == b"private\n"
    assert len(set(homes.values())) == 6


@as_root
@in_loop
async def test_a_job_can_run_as_an_account_of_the_machine(state):
    async with worker_on(state) as worker:
        text, _ = await result(worker, shell("id -u; echo $USER $HOME", run_as="root"))
        assert text == b"0\nroot /root\n"
        with pytest.raises(BadRequestError, match="no account 'nobody-at-all'"):
            await start_id(worker, shell("true", run_as="nobody-at-all"))


@in_loop
async def test_a_start_beyond_max_jobs_is_refused_until_a_job_ends(state):
    async with worker_on(state, max_jobs=1) as worker:
        job = await start_id(worker, shell(WAITS))
        with pytest.raises(ExhaustedError, match="1 jobs are running"):
            await start_id(worker, shell("true"))
        await worker.stop(worker.job(job))
        assert (await result(worker, shell("exit 2")))[1].exit_code == 2


@in_loop
async def test_an_ended_job_can_be_removed_and_a_running_job_cannot(state):
    async with worker_on(state) as worker:
        job = await start_id(worker, shell(WAITS))
        with pytest.raises(StillRunningError):
            worker.remove(worker.job(job))
        await wait_for_output(worker, job, b"ready")
        await worker.stop(worker.job(job))
        stream = worker.stream(worker.job(job))
        assert await anext(stream) == b"ready\n"
        worker.remove(worker.job(job))
        assert left_in(state) == []
        with pytest.raises(NoSuchJobError):
            worker.status(worker.job(job))
        assert [chunk async for chunk in stream] == []


@in_loop
async def test_the_oldest_jobs_are_forgotten_beyond_keep_bytes_and_an_open_stream_still_completes(state, monkeypatch):
    monkeypatch.setattr(jobworker, "FRESH_SECONDS", 0.0)
    async with worker_on(state, keep_bytes=2 * MIB) as worker:
        jobs = []
        for number in range(3):
            jobs.append(await start_id(worker, python(WRITES_BYTES, str(900 * KIB))))
            if number == 0:
                stream = worker.stream(worker.job(jobs[0]))
                first = await anext(stream)
            await output(worker, jobs[-1])
        await wait_until_forgotten(worker, jobs[0])
        assert left_in(state) == sorted(jobs[1:])
        assert first + b"".join([chunk async for chunk in stream]) == random.Random(7).randbytes(900 * KIB)
        worker.remove(worker.job(jobs[2]))
        jobs.append(await start_id(worker, python(WRITES_BYTES, str(900 * KIB))))
        await output(worker, jobs[-1])
        assert left_in(state) == sorted([jobs[1], jobs[3]])  # these two fit


@in_loop
async def test_ended_jobs_are_forgotten_after_keep_seconds_by_a_later_server_too(state):
    async with worker_on(state) as worker:
        running = await start_id(worker, shell(WAITS))
        for _ in range(3):
            await result(worker, shell("echo hello"))
    async with worker_on(state, keep=0.001) as worker:
        await wait_until_forgotten(worker, worker._retention.oldest().id)
        job = await start_id(worker, shell("true"))
        await wait_until_forgotten(worker, job)
        assert left_in(state) == [running]
        await worker.stop(worker.job(running))
        await wait_until_forgotten(worker, running)
        assert left_in(state) == []


@in_loop
async def test_two_hundred_jobs_leave_no_descriptor_watch_thread_or_cgroup_in_the_server(state):
    def resources_of(worker):
        assert not survivors(children(worker._launcher.process))
        assert children() - CHILDREN_BEFORE == {worker._launcher.process}
        return len(os.listdir("/proc/self/fd")), len(worker._inotify), threading.active_count(), jobs_cgroups(state)

    async with worker_on(state) as worker:
        await result(worker, shell("true"))
        before = resources_of(worker)
        for _ in range(10):
            results = await asyncio.gather(*(result(worker, shell("echo hello; exit 9")) for _ in range(20)))
            assert {(text, status.exit_code) for text, status in results} == {(b"hello\n", 9)}
        assert resources_of(worker) == before
        assert before[1:] == (0, 1, [])


# What a restart keeps.


@in_loop
async def test_a_server_that_starts_again_knows_every_job(state, mark):
    gate = f"gate-{mark}"  # without root all jobs share one home
    async with worker_on(state) as worker:
        running = await start_id(worker, shell(f"mkfifo {gate}; echo one; read line < {gate}; echo two; exit 6"))
        stopped = await start_id(worker, shell(WAITS))
        ended, status = await result(worker, shell("echo bye; exit 3"))
        await wait_for_output(worker, running, b"one")
    async with worker_on(state) as worker:
        assert worker.status(worker.job(status.spec.id)) == status
        assert await output(worker, status.spec.id) == ended == b"bye\n"
        assert ending(worker, running) == ("RUNNING", 0, "")
        assert worker.running == 2
        follower = asyncio.create_task(output(worker, running))
        await wait_for_output(worker, stopped, b"ready")
        await worker.stop(worker.job(stopped))
        assert ending(worker, stopped) == ("STOPPED", 137, "")
        Path(worker.status(worker.job(running)).spec.home, gate).write_text("go\n")
        assert await follower == b"one\ntwo\n"
        assert ending(worker, running) == ("FINISHED", 6, "")
        last = worker.status(worker.job(running))
    async with worker_on(state) as worker:
        assert worker.status(worker.job(running)) == last


def test_jobs_survive_the_kill_of_their_server(state, mark):
    body = f"""
        for id in {ID!r}, {ID2!r}:
            await start_id(worker, JobRequest("sh", ("-c", "echo ready; sleep 1000; : {mark}"), owner="alice", id=id))
        os.kill(os.getpid(), 9)
    """
    in_server(state, body, status=-9)

    @in_loop
    async def check():
        async with worker_on(state) as worker:
            for job in (ID, ID2):
                await wait_for_output(worker, job, b"ready")
            await worker.stop(worker.job(ID), by="me")
            os.kill(worker._launcher.process, 9)
            await worker.stop(worker.job(ID2), by="me")
            assert [ending(worker, job) for job in (ID, ID2)] == [("STOPPED", 137, "")] * 2
            assert not processes_with(mark)

    check()


@in_loop
async def test_a_folder_with_other_files_is_refused_as_state_folder_and_keeps_its_mode(tmp_path):
    place = tmp_path / "shared"
    place.mkdir()
    place.chmod(0o1777)
    (place / "file").touch()
    with pytest.raises(JobWorkerError, match=f"^{place} has other files in it; give a new"):
        async with Worker(jobworker.WorkerOptions(place, without=LIMITLESS)):
            pass
    assert (stat.S_IMODE(place.stat().st_mode), os.listdir(place)) == (0o1777, ["file"])


@in_loop
async def test_a_second_server_on_a_state_folder_is_refused_and_the_error_names_the_pid_of_the_first(state):
    async with worker_on(state) as worker:
        job = await start_id(worker, shell(WAITS))
        with pytest.raises(JobWorkerError, match=f"in use by the server with pid {os.getpid()}"):
            async with worker_on(state):
                pass
        assert ending(worker, job)[0] == "RUNNING"
        await worker.stop(worker.job(job))
    async with worker_on(state):
        pass


def make_crashed_job(state, job_id, events, spec="complete"):
    """Make a job's folder as a crash may leave it: the bytes of its events file (None: no file), and its job.json."""
    folder = state / "jobs" / job_id
    folder.mkdir(parents=True)
    if events is None:
        return folder
    with contextlib.ExitStack() as handed:
        jobworker.JobFolder(str(folder)).create_files(handed)
    (folder / "events").write_bytes(events)
    (folder / "output").write_text("hello\n")
    jobworker.JobFolder(str(folder)).write_spec(make_spec(id=job_id).to_json())
    text = (folder / "job.json").read_text()
    if spec == "half":
        (folder / "job.json").write_text(text[: len(text) // 2])
    elif spec == "none":
        (folder / "job.json").unlink()
    elif spec == "newer":
        newer = {**json.loads(text), "colour": "red", "limits": {**json.loads(text)["limits"], "gpu": 1}}
        (folder / "job.json").write_text(json.dumps(newer))
    elif spec == "wrong type":
        (folder / "job.json").write_text(json.dumps({**json.loads(text), "limits": 7}))
    return folder


BORN = b"born at=1.0 .\n"
STARTED = BORN + b"started at=2.0 .\n"
ENDED = STARTED + b"exited at=3.0 status=FINISHED code=7 signal=0 reason=- by=- .\n"
DONE = ENDED + b"done at=4.0 reason=- cpu_seconds=1.5 memory_peak=None read_bytes=0 written_bytes=0 .\n"
GONE, QUARANTINE = "gone", "quarantine"
AFTER_A_CRASH = [  # events; job.json; the job's ending, or where its folder is (GONE, QUARANTINE)
    (None, "none", GONE),
    (b"", "none", GONE),
    (b"", "half", GONE),
    (b"", "complete", GONE),
    (b"bo", "complete", GONE),
    (BORN + b"failed at=1.0 errno=2 .\n", "complete", GONE),
    (BORN, "none", QUARANTINE),
    (STARTED, "half", QUARANTINE),
    (ENDED, "wrong type", QUARANTINE),
    (BORN, "complete", ("FINISHED", 255, "LOST")),
    (STARTED, "complete", ("FINISHED", 255, "LOST")),
    (ENDED[:-2], "complete", ("FINISHED", 255, "LOST")),
    (STARTED + bytes(100), "complete", ("FINISHED", 255, "LOST")),
    (ENDED, "complete", ("FINISHED", 7, "")),
    (DONE[:-10], "complete", ("FINISHED", 7, "")),
    (DONE, "complete", ("FINISHED", 7, "")),
    (DONE, "newer", ("FINISHED", 7, "")),  # a later version wrote job.json
    (STARTED, "newer", ("FINISHED", 255, "LOST")),
]


@pytest.mark.parametrize(
    ("events", "spec", "expected"), AFTER_A_CRASH, ids=[f"{(e or b'')[-9:]}-{s}-{x}" for e, s, x in AFTER_A_CRASH]
)
@in_loop
async def test_a_job_that_a_crash_left_is_finished_deleted_or_quarantined(state, capfd, events, spec, expected):
    folder = make_crashed_job(state, ID, events, spec)
    for _ in range(2):  # the second server finds the same
        async with worker_on(state, keep=0.0) as worker:
            if isinstance(expected, str):
                await wait_until_forgotten(worker, ID)
                assert not folder.exists()
                assert len(list(state.glob("quarantine/*"))) == (expected == QUARANTINE)
            else:
                assert await output(worker, ID) == b"hello\n"
                assert ending(worker, ID) == expected
            assert (await result(worker, shell("echo hello")))[0] == b"hello\n"
    # A quarantined job and a job that is lost without an ending are one line in the log. The others are none.
    assert len(capfd.readouterr().err.splitlines()) == (expected == QUARANTINE or expected[-1] == "LOST")


@in_loop
async def test_files_that_are_no_jobs_are_quarantined(state):
    (state / "jobs" / "lost+found").mkdir(parents=True)
    (state / "jobs" / "notes.txt").write_text("hello")
    (state / "jobs" / ID).write_text("not a folder")
    async with worker_on(state):
        assert left_in(state) == []
        assert len(list(state.glob("quarantine/*"))) == 3


@in_loop
async def test_two_hundred_lost_jobs_are_all_finished(state):
    ids = [jobworker.new_job_id() for _ in range(200)]
    for job in ids:
        make_crashed_job(state, job, STARTED)
    async with worker_on(state) as worker:
        assert (await result(worker, shell("echo hello")))[0] == b"hello\n"
        assert await asyncio.gather(*(output(worker, job) for job in ids)) == [b"hello\n"] * 200
        assert {ending(worker, job) for job in ids} == {("FINISHED", 255, "LOST")}


# A kill at each step.

FIRST = "echo hello; exit 7" if os.geteuid() else "[ -w . ] && echo hello; exit 7"  # root gives a job a writable home
SERVER_DEATHS = [  # the statement before which the server dies; what it does first; whether the job exists afterwards
    ("new.rename(self._owners / str(uid))", "pass", False),
    ("self._uids[owner] = uid", "pass", False),  # the owner's uid is on disk
    ("if os.stat(home).st_uid != uid:", "pass", False),  # the owner's home exists and belongs to root
    ("undo.callback(self._delete, job)", "pass", False),  # the job's folder exists
    ('os.mkfifo(f"{self.path}/control", 0o600)', "pass", False),
    ("for name in (*OUTPUTS[: 1 + split]", "pass", False),  # control exists
    ('os.close(os.open(f"{self.path}/{name}"', "pass", False),  # output exists
    ("allocate(descriptors[1], EVENTS_BYTES)", "pass", False),  # events exists
    ("job.folder.write_spec(text)", "pass", False),
    ("file.write(text)", "file.write(b'{'); file.flush()", False),
    ("self._watch(job)\n                descriptors +=", "pass", False),  # job.json is complete
    ("if not owner.create() and self.prepared", "pass", False),
    ("cgroup.create()\n        cgroup.limit", "pass", False),
    ("cgroup.limit(limits, self.controllers, self.disks)", "pass", False),  # the cgroup exists
    ('self._launcher.send("start", job.folder, text, descriptors)', "pass", False),
    ("socket.send_fds(self._channel, [packet], list(descriptors))", "pass", False),
    ("undo.pop_all()", "pass", True),  # the launcher has the request
    ("await self._until(job, lambda: job.events.phase not in", "pass", True),
    ('return job.events.phase != ""', "pass", True),
]
FAILED_START_DEATHS = [  # the same for a command that does not exist
    ('write_event(self._events, "failed"', "pass", None),  # in the shim: the server starts the job once more
    ("spec.processes().remove()", "pass", False),
    ("job.folder.delete()", "pass", False),
    ("for name in self.FILES:\n            with contextlib.suppress(FileNotFoundError)", "pass", False),
    ("os.rmdir(self.path)\n\n\ndef delete_tree", "pass", False),
    ("raise start_failure(job.events.failure", "pass", False),
]


def run_dying_server(state, tmp_path, statement, before_death, command, args=()):
    _, armed = dying_copy(tmp_path, statement, before_death)
    body = f"await start_id(worker, JobRequest({command!r}, {args!r}, owner='alice', id={ID!r}))"
    in_server(state, body, module=tmp_path, status=-9)
    assert not armed.exists()


@pytest.mark.parametrize(
    ("statement", "before_death", "exists"), SERVER_DEATHS, ids=[row[0][:40] for row in SERVER_DEATHS]
)
def test_a_server_killed_at_any_step_of_a_start_leaves_the_job_or_nothing(
    state, tmp_path, statement, before_death, exists
):
    if os.geteuid() != 0 and re.search("owner|home|cgroup", statement):
        pytest.skip("needs root: uids of owners, and a cgroup")
    run_dying_server(state, tmp_path, statement, before_death, "sh", ("-c", FIRST))

    @in_loop
    async def check():
        async with worker_on(state) as worker:
            if exists:
                assert await output(worker, ID) == b"hello\n"
                assert ending(worker, ID) == ("FINISHED", 7, "")
            else:
                assert left_in(state) == []
                assert not jobs_cgroups(state)
                assert not (state / "quarantine").exists()
            job = await start_id(worker, shell(FIRST, id=ID))  # the caller tries again
            assert await output(worker, job) == b"hello\n"
            assert ending(worker, job) == ("FINISHED", 7, "")

    check()


@pytest.mark.parametrize(
    ("statement", "before_death", "exists"), FAILED_START_DEATHS[1:], ids=lambda value: str(value)[:40]
)
def test_a_server_killed_at_any_step_of_a_failed_start_leaves_nothing(state, tmp_path, statement, before_death, exists):
    run_dying_server(state, tmp_path, statement, before_death, "no-such-command")

    @in_loop
    async def check():
        async with worker_on(state):
            assert left_in(state) == []
            assert not jobs_cgroups(state)
            assert not (state / "quarantine").exists()

    check()


LOST, EXITED_7 = ("FINISHED", 255, "LOST"), ("FINISHED", 7, "")
SHIM_DEATHS = [  # the statement before which the shim dies; what it does first; the job's ending
    ('write_event(self._events, "born")', "pass", EXITED_7),  # the server starts it once more
    ('write_event(self._events, "born")', "os.write(self._events, b'bor')", EXITED_7),
    ("outputs = self._folder.open_outputs()", "pass", LOST),
    ("for _, writer in pipes:\n            os.close", "pass", LOST),  # the job's command runs
    ('write_event(self._events, "started"', "pass", LOST),
    ("pumps = make_pumps(self._spec, pipes, outputs)", "pass", LOST),
    ("reported = {descriptor for descriptor, _ in", "pass", LOST),
    ("ready = {descriptor for descriptor, _ in", "pass", LOST),
    ("result = os.waitid(os.P_PID, self._process, os.WEXITED)", "pass", LOST),
    ("assert result is not None", "pass", LOST),
    ('write_event(self._events, "exited", **vars(ending), **self._input_bytes())', "pass", LOST),
    (
        'write_event(self._events, "exited", **vars(ending), **self._input_bytes())',
        "os.write(self._events, b'exited at=1.0 status=FIN')",
        LOST,
    ),
    ("processes.kill_all()", "pass", EXITED_7),
    ("rest = drain_all(pumps)", "pass", EXITED_7),
    ("usage = processes.usage()", "pass", EXITED_7),
    ("processes.remove()\n    with contextlib", "pass", EXITED_7),
    ("folder.delete_tmp()\n    reason", "pass", EXITED_7),
    ("reason = ending.reason or", "pass", EXITED_7),
    ('write_event(events, "done"', "pass", EXITED_7),
    ('write_event(events, "done"', "os.write(events, b'done at=1.0 reason=-')", EXITED_7),
    ("os.fsync(events)", "pass", EXITED_7),
]


@pytest.mark.parametrize(
    ("statement", "before_death", "expected"), SHIM_DEATHS, ids=[row[0][:40] for row in SHIM_DEATHS]
)
@in_loop
async def test_a_job_whose_shim_is_killed_at_any_step_still_gets_its_ending(
    state, tmp_path, mark, statement, before_death, expected
):
    dying, armed = dying_copy(tmp_path, statement, before_death)
    armed.unlink()
    async with worker_on(state, dying) as worker:
        await arm_after_rehearsal(worker, dying, armed)
        script = f"sh -c 'sleep 1000; : {mark}' & echo hello; exit 7"
        job = await start_id(worker, dying.JobRequest("sh", ("-c", script), owner="alice"))
        text = await output(worker, job)
        assert not armed.exists()
        assert ending(worker, job) == expected
        assert text == b"hello\n" or expected == LOST
        assert not processes_with(mark)
        before = worker.status(worker.job(job))
        assert not jobs_cgroups(state)
    wait_for_orphans()
    async with worker_on(state) as worker:
        assert ending(worker, job) == expected
        assert worker.status(worker.job(job)).ended == before.ended
        assert await output(worker, job) == text


@in_loop
async def test_a_job_whose_shim_is_killed_before_it_reports_a_failed_exec_is_lost(state, tmp_path):
    dying, armed = dying_copy(tmp_path, *FAILED_START_DEATHS[0][:2])
    async with worker_on(state, dying) as worker:
        job = await start_id(worker, dying.JobRequest("no-such-command", owner="alice"))
        await output(worker, job)
        assert not armed.exists()
        assert ending(worker, job) == LOST  # `born`: the command may have run


WITHOUT_PYTHON = [  # a job; its limits; what the test does to it; its ending
    ("echo hello; exec sleep 1000", {}, "stop", ("STOPPED", 137, "")),
    ("echo hello; exec sleep 1000", {}, "kill the shim", LOST),
    ("echo hello; exec yes", {"max_output": 100_000}, "", ("STOPPED", 137, "OUTPUT_LIMIT")),
    ("echo hello; exec sleep 1000", {"timeout": 0.2}, "", ("STOPPED", 137, "TIMEOUT")),
    ("echo hello; sleep 1000 & exit 3", {}, "", ("FINISHED", 3, "")),
]


@pytest.mark.parametrize("cgroup", [True, False], ids=["cgroup", "no cgroup"])
@pytest.mark.parametrize(("script", "limits", "action", "expected"), WITHOUT_PYTHON)
@in_loop
async def test_jobs_are_ended_and_finished_after_python_s_own_files_were_removed(
    state, tmp_path, monkeypatch, cgroup, script, limits, action, expected
):
    bare = altered_copy(tmp_path, "gc.freeze()  # a collection", "sys.path.clear(); sys.meta_path.clear()")
    if not cgroup:
        monkeypatch.setattr(bare.CgroupMount, "find", classmethod(lambda _class: None))
    async with worker_on(state, bare) as worker:
        job = await start_id(worker, bare.JobRequest("sh", ("-c", f"echo $PPID; {script}"), owner="alice", **limits))
        shim = int((await wait_for_output(worker, job, b"hello")).split()[0])
        if action == "kill the shim":
            os.kill(shim, signal.SIGKILL)
        if action == "stop":
            await worker.stop(worker.job(job))
        await output(worker, job)
        assert ending(worker, job) == expected


@in_loop
async def test_a_launcher_of_another_version_starts_and_finishes_jobs(state, monkeypatch):
    async with worker_on(state) as worker:
        to_json = jobworker.Spec.to_json

        def newer(spec):
            return json.dumps({"colour": "red", **json.loads(to_json(spec))}).encode()

        monkeypatch.setattr(jobworker.Spec, "to_json", newer)
        job = await start_id(worker, shell("echo $PPID; exec sleep 1000"))
        os.kill(int(await wait_for_output(worker, job, b"\n")), signal.SIGKILL)
        await output(worker, job)
        assert ending(worker, job) == LOST


@in_loop
async def test_many_stops_of_a_lost_job_start_one_finisher(state, capfd):
    async with worker_on(state) as worker:
        jobs = [await start_id(worker, shell("echo $PPID; exec sleep 1000")) for _ in range(20)]
        shims = [int(await wait_for_output(worker, job, b"\n")) for job in jobs]
        for shim in shims:
            os.kill(shim, signal.SIGKILL)
        await asyncio.gather(*(worker.stop(worker.job(job)) for job in jobs for _ in range(6)))
        assert {ending(worker, job) for job in jobs} == {("FINISHED", 255, "LOST")}
    assert "cannot be finished" not in capfd.readouterr().err


UNRUNNABLE = [  # the paths that are tried one after the other; the error
    (("nothing", "nothing"), errno.ENOENT),
    (("nothing", "text", "nothing"), errno.EACCES),
    (("text/below", "text"), errno.EACCES),
    (("text", "garbage"), errno.EACCES),
    (("garbage", "text"), errno.ENOEXEC),
    (("nothing", "text/below"), errno.ENOTDIR),
]


@pytest.mark.parametrize(("paths", "number"), UNRUNNABLE)
def test_a_command_that_cannot_run_fails_with_the_error_of_the_first_path_that_exists(tmp_path, paths, number):
    (tmp_path / "text").write_text("hello")
    (tmp_path / "garbage").write_bytes(b"\x00\x01")
    (tmp_path / "garbage").chmod(0o755)
    assert jobworker.exec_first([str(tmp_path / path) for path in paths], ["x"], {}).errno == number


LEASES = """
import fcntl, os, signal, sys
signal.signal(signal.SIGIO, signal.SIG_IGN)
for number in range(int(sys.argv[1])):
    with open(f"leased{number}", "w") as file:
        file.write("#!/bin/sh\\n")
    os.chmod(f"leased{number}", 0o755)
    fcntl.fcntl(os.open(f"leased{number}", os.O_RDWR), fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("leased", os.getcwd(), flush=True)
signal.pause()
"""


@in_loop
async def test_starts_that_wait_for_a_file_lease_can_be_stopped_and_do_not_delay_others(state):
    """execve(2) opens the file, and an open waits until a lease is given up, 45 seconds at most (fcntl(2))."""
    many = jobworker.START_SLOTS + 2
    async with worker_on(state) as worker:
        leaser = await start_id(worker, JobRequest(str(PYTHON_FOR_ALL), ("-c", LEASES, str(many)), owner="eve"))
        home = (await wait_for_output(worker, leaser, b"\n")).decode().split()[1]
        ids = [jobworker.new_job_id() for _ in range(many)]
        waiting = [
            asyncio.ensure_future(start_id(worker, JobRequest(f"{home}/leased{number}", owner="eve", id=ids[number])))
            for number in range(many)
        ]
        other = asyncio.ensure_future(result(worker, JobRequest("echo", ("free",), owner="bob")))  # starts after those
        assert (await other)[0] == b"free\n"
        assert not any(start.done() for start in waiting)
        await asyncio.gather(*(worker.stop(worker.job(job)) for job in ids))
        await asyncio.gather(*waiting)
        assert {ending(worker, job)[:2] for job in ids} == {("STOPPED", 137)}
        await worker.stop(worker.job(leaser))


# A full disk.


@pytest.fixture(params=["tmpfs", "ext4", pytest.param("/scratch", marks=pytest.mark.controllers)])
def small_disk(request, nothing_is_left):
    """A state folder on a file system with about 16 MiB of free space. /scratch is the guest's real disk."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount")
    with contextlib.ExitStack() as resources:
        if request.param == "/scratch":
            if not os.path.ismount("/scratch"):
                pytest.skip("needs /scratch, a file system on a real disk")
            filler = resources.enter_context(tempfile.NamedTemporaryFile(dir="/scratch"))
            os.posix_fallocate(filler.fileno(), 0, free_bytes("/scratch") - 16 * MIB)
            point = Path("/scratch")
        else:
            point = resources.enter_context(mounted(request.param))
        yield new_state(nothing_is_left, point)
        wait_for_orphans()
        shutil.rmtree(nothing_is_left[-1])


def free_bytes(folder):
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


@contextlib.contextmanager
def mounted(kind):
    """A new file system of 16 MiB. `few files`: a tmpfs of 4000 inodes."""
    with tempfile.TemporaryDirectory(prefix="jobworker-disk-") as folder:
        os.chmod(folder, 0o711)
        point = Path(folder, "disk")
        point.mkdir()
        words = ["-t", "tmpfs", "-o", "size=16m" + ",nr_inodes=4000" * (kind == "few files"), "none"]
        if kind == "ext4":
            with open(f"{folder}/image", "wb") as image:
                image.truncate(16 * MIB)
            subprocess.run(["mkfs.ext4", "-q", f"{folder}/image"], check=True)
            words = ["-o", "loop", f"{folder}/image"]
        if (tried := subprocess.run(["mount", *words, str(point)], stderr=subprocess.PIPE, check=False)).returncode:
            pytest.skip(f"cannot mount here: {tried.stderr.decode().strip()}")
        try:
            yield point
        finally:
            subprocess.run(["umount", str(point)], check=True)


def fill(state, leave=0):
    """Fill the file system of the state folder and leave `leave` blocks free."""
    size = 4 * KIB
    with open(state / f"filler-{os.urandom(4).hex()}", "wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while True:
                file.write(bytes(64 * KIB))
        with contextlib.suppress(OSError):
            while True:
                file.write(bytes(size))
        os.fsync(file.fileno())
        file.truncate(max(0, file.seek(0, os.SEEK_END) - leave * size))
        os.fsync(file.fileno())


@in_loop
async def test_a_job_that_fills_the_disk_is_stopped_and_its_status_is_complete(small_disk):
    async with worker_on(small_disk) as worker:
        other = await start_id(worker, shell("echo $PPID; exec sleep 1000"))
        text, status = await result(worker, JobRequest("yes", owner="alice"))
        assert (status.status, status.exit_code, status.ending.reason) == ("STOPPED", 137, "DISK_FULL")
        assert len(text) == status.output_bytes > MIB
        await worker.stop(worker.job(other))
        assert ending(worker, other) == ("STOPPED", 137, "")
        last = [worker.status(worker.job(job)) for job in (other, status.spec.id)]
    async with worker_on(small_disk) as worker:  # a server starts on a full disk too
        assert [worker.status(worker.job(job)) for job in (other, status.spec.id)] == last
        worker.remove(worker.job(status.spec.id))
        assert (await result(worker, shell("echo hello; exit 4")))[1].exit_code == 4


@in_loop
async def test_a_job_keeps_its_exit_code_when_others_fill_the_disk(small_disk):
    async with worker_on(small_disk) as worker:
        job = await start_id(worker, shell("mkfifo gate; echo ready; read line < gate; exit 5"))
        await wait_for_output(worker, job, b"ready\n")
        fill(small_disk)
        Path(worker.status(worker.job(job)).spec.home, "gate").write_text("go\n")
        assert await output(worker, job) == b"ready\n"
        assert ending(worker, job)[:2] == ("FINISHED", 5)
    async with worker_on(small_disk) as worker:
        assert ending(worker, job)[:2] == ("FINISHED", 5)


@pytest.mark.parametrize("left", range(5))
@in_loop
async def test_a_start_on_a_full_disk_is_refused_and_leaves_nothing(small_disk, left):
    async with worker_on(small_disk) as worker:
        await result(worker, shell("true"))
        before = left_in(small_disk)
        fill(small_disk, left)
        for owner in ("alice", "a new owner"):
            try:
                job = await start_id(worker, shell("exit 3", owner=owner))
            except ExhaustedError:
                assert left_in(small_disk) == before
            else:
                await output(worker, job)
                assert ending(worker, job)[:2] == ("FINISHED", 3)
                worker.remove(worker.job(job))
        (filler,) = small_disk.glob("filler-*")
        filler.unlink()
        assert (await result(worker, shell("exit 3", owner="a new owner")))[1].exit_code == 3
    async with worker_on(small_disk) as worker:
        assert (await result(worker, shell("id -u", owner="a new owner")))[1].spec.uid != worker._accounts.of(
            "alice"
        ).uid


@in_loop
async def test_jobs_do_not_use_the_reserve_of_the_disk(small_disk):
    disk = os.statvfs(small_disk)
    share = (free_bytes(small_disk) - 8 * MIB) / (disk.f_blocks * disk.f_frsize)
    async with worker_on(small_disk, reserve=share) as worker:
        text, status = await result(worker, JobRequest("yes", owner="alice"))
        assert (status.status, status.ending.reason) == ("STOPPED", "DISK_FULL")
        # The output may use half of the reserve: 16 - 4 MiB. The shim looks at the disk after less than 2 MiB, and then
        # keeps what is in the pipe, at most 1 MiB.
        assert MIB < len(text) < 15 * MIB
        with pytest.raises(ExhaustedError, match="nearly full"):
            await start_id(worker, shell("true"))
        worker.remove(worker.job(status.spec.id))
        assert (await result(worker, shell("exit 3")))[1].exit_code == 3


# --- A server over mutual TLS ---------------------------------------------------------------------------
# Shared by the sections below: certificates, a server process, a client process, a channel.

DEFAULT_CHANNEL = jobworker.CLIENT_OPTIONS
PYZ = HERE / "jobworker.pyz"
needs_pyz = pytest.mark.skipif(not PYZ.exists(), reason="needs jobworker.pyz: ./build.sh")
LIKE_PYZ = (
    Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info[1]}"
)  # the Python that built the .pyz, without its packages


PROGRAM = (sys.executable, str(HERE / "jobworker.py"))


def serve_words(state, certs, *options, program=PROGRAM, port=0):
    """The command line of a server on this port of the loopback address (0: a free one)."""
    words = ("serve", "--certs", certs, "--state", state, "--listen", f"127.0.0.1:{port}", "--without", "auto")
    return [*map(str, (*program, *words)), "--reserve", "0", *options]


def port_of(line):
    """The port in the line that a server prints when it listens."""
    assert line.startswith("jobworker: serving on "), line
    return int(line.split(",")[0].rsplit(":", 1)[1])


class ClientProcess(subprocess.Popen):
    """A client process that is killed at the end of its block."""

    def __exit__(self, *exception):
        self.kill()
        super().__exit__(*exception)


@dataclasses.dataclass(frozen=True)
class Served:
    """A server process that listens, and the folder with its clients' certificates."""

    process: subprocess.Popen[str]
    port: int
    certs: Path

    @property
    def address(self):
        return f"localhost:{self.port}"

    def run(self, *words, role="user", program=None, **popen):
        """Run one client command to its end, with the certificate `role`."""
        environment = {**os.environ, "JOBWORKER_SERVER": self.address, "JOBWORKER_CERTS": str(self.certs)}
        identity = () if role == "user" else ("-r", role)
        command = [*(program or PROGRAM), *words[:1], *identity, *words[1:]]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE, check=False,
            **{"env": environment, "stdin": None if "input" in popen else subprocess.DEVNULL, **popen},
        )  # fmt: skip

    def start(self, *words, role="user"):
        """Start a job from the command line and return its id."""
        done = self.run("start", *words, role=role)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[-1]

    def popen(self, *words, role="user", **popen):
        environment = {**os.environ, "JOBWORKER_SERVER": self.address, "JOBWORKER_CERTS": str(self.certs)}
        command = [*PROGRAM, *words[:1], "-r", role, *words[1:]]
        return ClientProcess(
            command, **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "env": environment, **popen}
        )


@contextlib.contextmanager
def serving(state, certs, *options, program=PROGRAM, end=signal.SIGTERM, port=0, **popen):
    """A server process that stops its jobs and ends with the block."""
    process = subprocess.Popen(
        serve_words(state, certs, "--stop-jobs", *options, program=program, port=port),
        stdin=subprocess.DEVNULL, text=True, **{"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, **popen},
    )  # fmt: skip
    try:
        yield Served(process, port_of(process.stdout.readline()), Path(certs))
    finally:
        if process.poll() is None:
            process.send_signal(end)
        process.wait(PATIENCE)
        process.stdout.close()
        if process.stderr:
            process.stderr.close()


@pytest.fixture(scope="session")
def certs(tmp_path_factory):
    """A folder of certificates as `serve` makes it, and the identity `user2`."""
    folder = tmp_path_factory.mktemp("tls") / "certs"
    jobworker.prepare_grpc()
    jobworker.prepare_folder(folder, [])
    authority = jobworker.load_authority(folder, "client-ca")
    jobworker.write_pair(folder, "user2", jobworker.issue_identity(authority, "user2", ["user"]))
    return folder


@pytest.fixture(scope="session")
def shared(certs, tmp_path_factory):
    """One server for all tests that do not change it."""
    folder = Path(tempfile.mkdtemp(prefix="jobworker-shared-"))
    folder.chmod(0o711)
    jobworker.libc_call("prctl", jobworker.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with serving(folder, certs) as served:
        call(
            served, "GetJobStatus", pb.GetStatusRequest(id=ID)
        )  # gRPC now opens what it never closes, before `nothing_is_left` counts
        asyncio.run(open_and_close(served))
        yield served
    for tree in trees_of(folder):
        Cgroup(str(tree)).remove()
    shutil.rmtree(folder)
    forget_claims(folder)


async def open_and_close(served):
    async with grpc.aio.insecure_channel(served.address):
        pass


def channel_to(served, identity=None, role="user"):
    """A channel as any gRPC client opens it."""
    folder = served.certs
    pair = identity or key_and_certificate(folder, role)
    credentials = grpc.ssl_channel_credentials((folder / "server-ca.pem").read_bytes(), *pair)
    return grpc.secure_channel(served.address, credentials, DEFAULT_CHANNEL)


def key_and_certificate(folder, role):
    return (folder / f"{role}.key").read_bytes(), (folder / f"{role}.pem").read_bytes()


def ask(channel, method, request, timeout=PATIENCE):
    """Make one call. Returns its reply, or the name of its status and its message."""
    reply = {"StartJob": pb.StartJobResponse, "StopJob": pb.StopJobResponse, "GetJobStatus": pb.GetStatusResponse,
             "RemoveJob": pb.RemoveJobResponse}  # fmt: skip
    path = f"/proto.WorkerService/{method}"
    try:
        if method == "GetOutputStream":
            chunks = channel.unary_stream(path, type(request).SerializeToString, pb.GetStreamResponse.FromString)
            return b"".join(chunk.result for chunk in chunks(request, timeout=timeout))
        unary = channel.unary_unary(path, type(request).SerializeToString, reply[method].FromString)
        return unary(request, timeout=timeout)
    except grpc.RpcError as error:
        failure = error.code().name, error.details()
    assert "Traceback" not in failure[1]
    return failure


def call(served, method, request, identity=None, role="user"):
    with channel_to(served, identity, role) as channel:
        return ask(channel, method, request)


def one_sentence(done, *words, status=1):
    """Check that a command failed with one line on standard error, which contains these words."""
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    assert re.fullmatch(r"jobworker: [^\n]+\n", done.stderr), done.stderr
    for word in words:
        assert word in done.stderr


# --- Identity and authorization -------------------------------------------------------------------------
# Which certificates are refused, and which jobs a caller may see.

USER_ROLE = jobworker.encode_roles(["user"])


def certificate_builder(authority, subject, public_key, start, days):
    """The builder of a certificate that is valid from `start` to `days`, in days from now, without extensions."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(authority.certificate.subject)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(days=start))
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def certificate(authority, *, names=("mallory",), roles=USER_ROLE, purposes=("CLIENT_AUTH",), start=-1.0, days=1.0):
    """A client's key and certificate, valid but for what the arguments change."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name) for name in names])
    builder = certificate_builder(authority, subject, key.public_key(), start, days)
    if purposes:
        oids = [getattr(x509.oid.ExtendedKeyUsageOID, purpose) for purpose in purposes]
        builder = builder.add_extension(x509.ExtendedKeyUsage(oids), critical=False)
    if roles is not None:
        value = x509.UnrecognizedExtension(x509.ObjectIdentifier(jobworker.ROLES_OID), roles)
        builder = builder.add_extension(value, critical=False)
    made = jobworker.CertifiedKey(builder.sign(authority.key, hashes.SHA256()), key)
    return made.key_pem(), made.certificate_pem()


REFUSED_CERTIFICATES = [  # the fault; the arguments of `certificate`; the status (UNAVAILABLE: TLS refuses)
    ("expired", {"start": -3.0, "days": -1.0}, "UNAVAILABLE"),
    ("not yet valid", {"start": 1.0, "days": 2.0}, "UNAVAILABLE"),
    ("no role", {"roles": None}, "PERMISSION_DENIED"),
    ("an unknown role", {"roles": jobworker.encode_roles(["operator"])}, "PERMISSION_DENIED"),
    (
        "an unknown role beside a known one",
        {"roles": jobworker.encode_roles(["admin", "operator"])},
        "PERMISSION_DENIED",
    ),
    ("an empty extension", {"roles": b""}, "PERMISSION_DENIED"),
    ("an empty string", {"roles": b"\x0c\x00"}, "PERMISSION_DENIED"),
    ("another type of string", {"roles": b"\x16\x04user"}, "PERMISSION_DENIED"),
    ("a length that is too long", {"roles": b"\x0c\x05user"}, "PERMISSION_DENIED"),
    ("a length that is too short", {"roles": b"\x0c\x03user"}, "PERMISSION_DENIED"),
    ("no DER at all", {"roles": b"user"}, "PERMISSION_DENIED"),
    ("bytes that are not UTF-8", {"roles": b"\x0c\x04\xff\xfe\xfd\xfc"}, "PERMISSION_DENIED"),
    ("a role in capitals", {"roles": jobworker.encode_roles(["USER"])}, "PERMISSION_DENIED"),
    ("no purpose", {"purposes": ()}, "PERMISSION_DENIED"),
    ("the purpose of a server", {"purposes": ("SERVER_AUTH",)}, "UNAVAILABLE"),
    ("two common names", {"names": ("user", "admin")}, "PERMISSION_DENIED"),
    ("no common name", {"names": ()}, "PERMISSION_DENIED"),
]


@pytest.mark.parametrize(
    ("fault", "changes", "status"), REFUSED_CERTIFICATES, ids=[row[0] for row in REFUSED_CERTIFICATES]
)
def test_a_certificate_with_a_fault_is_refused(shared, fault, changes, status):
    identity = certificate(jobworker.load_authority(shared.certs, "client-ca"), **changes)
    assert call(shared, "GetJobStatus", pb.GetStatusRequest(id=ID), identity)[0] == status
    assert call(shared, "StartJob", pb.StartJobRequest(cmd="true"), identity)[0] == status
    assert call(shared, "GetOutputStream", pb.GetStreamRequest(id=ID), identity)[0] == status


def test_a_certificate_without_a_fault_is_accepted(shared):
    identity = certificate(jobworker.load_authority(shared.certs, "client-ca"))
    assert call(shared, "GetJobStatus", pb.GetStatusRequest(id=ID), identity)[0] == "NOT_FOUND"


def test_a_certificate_from_an_unknown_authority_is_refused(shared):
    identity = certificate(jobworker.issue_authority("jobworker client authority"), names=("admin",))
    assert call(shared, "GetJobStatus", pb.GetStatusRequest(id=ID), identity)[0] == "UNAVAILABLE"


def test_the_server_s_own_certificate_is_refused_as_a_client_s(shared):
    assert call(shared, "GetJobStatus", pb.GetStatusRequest(id=ID), role="server")[0] == "UNAVAILABLE"


def test_a_client_without_a_certificate_cannot_connect(shared):
    credentials = grpc.ssl_channel_credentials((shared.certs / "server-ca.pem").read_bytes())
    with grpc.secure_channel(shared.address, credentials, DEFAULT_CHANNEL) as channel:
        assert ask(channel, "GetJobStatus", pb.GetStatusRequest(id=ID))[0] == "UNAVAILABLE"
    with grpc.insecure_channel(shared.address, DEFAULT_CHANNEL) as channel:
        assert ask(channel, "GetJobStatus", pb.GetStatusRequest(id=ID))[0] == "UNAVAILABLE"


def test_a_certificate_that_expires_while_connected_is_refused_from_then_on(shared):
    life = 3
    identity = certificate(jobworker.load_authority(shared.certs, "client-ca"), days=life / 86400)
    with channel_to(shared, identity) as channel:
        assert ask(channel, "GetJobStatus", pb.GetStatusRequest(id=ID))[0] == "NOT_FOUND"
        time.sleep(life + 1)  # the promise is about this time, and nothing reports its end
        status, sentence = ask(channel, "GetJobStatus", pb.GetStatusRequest(id=ID))
    assert (status, "out of date" in sentence) in [("PERMISSION_DENIED", True), ("UNAVAILABLE", False)]


def test_an_authority_that_expires_while_its_client_is_connected_is_refused_from_then_on(state, certs, tmp_path):
    folder, life = Path(shutil.copytree(certs, tmp_path / "certs")), 5
    authority = jobworker.issue("brief", life / 86400, None, [(x509.BasicConstraints(ca=True, path_length=None), True)])
    jobworker.write_pair(folder, "client-ca", authority)
    identity = certificate(authority)
    with serving(state, folder) as served, channel_to(served, identity) as channel:
        assert ask(channel, "GetJobStatus", pb.GetStatusRequest(id=ID))[0] == "NOT_FOUND"
        time.sleep(life + 1)  # the promise is about this time, and nothing reports its end
        status, sentence = ask(channel, "GetJobStatus", pb.GetStatusRequest(id=ID))
    assert (status, "out of date" in sentence) in [("PERMISSION_DENIED", True), ("UNAVAILABLE", False)]


def test_after_a_reload_an_old_authority_is_refused_on_connections_that_are_open(state, certs, tmp_path):
    folder = Path(shutil.copytree(certs, tmp_path / "certs"))
    with serving(state, folder, stderr=subprocess.PIPE) as served, channel_to(served) as channel:
        assert ask(channel, "GetJobStatus", pb.GetStatusRequest(id=ID))[0] == "NOT_FOUND"
        authority = jobworker.issue_authority("another")
        jobworker.write_pair(folder, "client-ca", authority)
        jobworker.write_pair(folder, "new", jobworker.issue_identity(authority, "new", ["user"]))
        served.process.send_signal(signal.SIGHUP)
        for line in served.process.stderr:
            if "read again" in line:
                break
        assert ask(channel, "GetJobStatus", pb.GetStatusRequest(id=ID))[0] == "PERMISSION_DENIED"
        assert call(served, "GetJobStatus", pb.GetStatusRequest(id=ID), role="new")[0] == "NOT_FOUND"
        assert call(served, "GetJobStatus", pb.GetStatusRequest(id=ID))[0] == "UNAVAILABLE"


def renewed_authority(authority, start, days):
    """An authority's certificate with the same name and key, valid from `start` to `days`, in days from now."""
    builder = certificate_builder(authority, authority.certificate.subject, authority.key.public_key(), start, days)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    return builder.sign(authority.key, hashes.SHA256()).public_bytes(jobworker.serialization.Encoding.PEM)


@pytest.mark.parametrize(("start", "days"), [(-9, -1), (1, 9999), (-1, 9999)])
@pytest.mark.parametrize("first", [True, False])
def test_clients_of_a_renewed_authority_are_accepted(state, certs, tmp_path, start, days, first):
    """Beside the valid certificate stands another one of the same name and key: expired, not yet valid, or valid."""
    folder = Path(shutil.copytree(certs, tmp_path / "certs"))
    current, other = (
        (folder / "client-ca.pem").read_bytes(),
        renewed_authority(jobworker.load_authority(certs, "client-ca"), start, days),
    )
    (folder / "client-ca.pem").write_bytes(other + current if first else current + other)
    with serving(state, folder) as served:
        assert call(served, "GetJobStatus", pb.GetStatusRequest(id=ID))[0] == "NOT_FOUND"


@pytest.mark.parametrize(("version", "accepted"), [("-tls1_3", True), ("-tls1_2", False), ("-tls1_1", False)])
def test_tls_older_than_1_3_is_refused(shared, version, accepted):
    words = ["openssl", "s_client", version, "-connect", shared.address, "-alpn", "h2", "-CAfile", shared.certs / "server-ca.pem",
             "-cert", shared.certs / "user.pem", "-key", shared.certs / "user.key", "-cipher", "ALL:@SECLEVEL=0"]  # fmt: skip
    printed = subprocess.run(
        words, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=PATIENCE, check=False
    ).stdout
    assert ("Verify return code: 0" in printed and "New, TLSv1.3" in printed) == accepted
    assert ("Cipher is (NONE)" in printed) != accepted


def test_only_its_owner_and_an_admin_can_reach_a_job(shared):
    job = call(shared, "StartJob", pb.StartJobRequest(cmd="sh", args=["-c", "echo mine; exec sleep 1000"])).ID
    calls = [("GetJobStatus", pb.GetStatusRequest), ("GetOutputStream", pb.GetStreamRequest), ("RemoveJob", pb.RemoveJobRequest),
             ("StopJob", pb.StopJobRequest)]  # fmt: skip
    for method, request in calls:
        foreign = call(shared, method, request(id=job), role="user2")
        unknown = call(shared, method, request(id=ID2), role="user2")
        assert foreign[0] == unknown[0] == "NOT_FOUND"
        assert foreign[1].replace(job, ID2) == unknown[1]
    taken = call(
        shared,
        "StartJob",
        pb.StartJobRequest(cmd="sh", args=["-c", "echo mine; exec sleep 1000"], id=job),
        role="user2",
    )
    assert taken[0] == "ALREADY_EXISTS"
    assert call(shared, "GetJobStatus", pb.GetStatusRequest(id=job), role="admin").owner == "user"
    assert call(shared, "RemoveJob", pb.RemoveJobRequest(id=job))[0] == "FAILED_PRECONDITION"
    assert call(shared, "StopJob", pb.StopJobRequest(id=job), role="admin") == pb.StopJobResponse()
    assert call(shared, "GetJobStatus", pb.GetStatusRequest(id=job)).stopped_by == "admin"
    assert call(shared, "GetOutputStream", pb.GetStreamRequest(id=job), role="admin") == b"mine\n"
    assert call(shared, "RemoveJob", pb.RemoveJobRequest(id=job)) == pb.RemoveJobResponse()
    assert call(shared, "GetJobStatus", pb.GetStatusRequest(id=job))[0] == "NOT_FOUND"


REACHES = [
    ("GetJobStatus", pb.GetStatusRequest()), ("GetJobStatus", pb.GetStatusRequest(wait=True)), ("StopJob", pb.StopJobRequest()),
    ("SignalJob", pb.SignalJobRequest(signal="TERM")), ("RemoveJob", pb.RemoveJobRequest()), ("SendInput", pb.SendInputRequest()),
    ("GetOutputStream", pb.GetStreamRequest()), ("GetOutputStream", pb.GetStreamRequest(tail=1)),
]  # fmt: skip


def test_a_job_of_another_owner_is_as_an_unknown_one_and_none_of_its_files_is_opened(state, certs):
    def answer(method, request):
        with pytest.raises(grpc.RpcError) as refused:
            list(channel.stream_stream(path.format(method))(iter([request.SerializeToString()]), timeout=PATIENCE))
        return refused.value.code().name, refused.value.details()

    def opened():
        with contextlib.suppress(BlockingIOError):
            return len(os.read(watcher, 65536))
        return 0

    path, watcher = "/proto.WorkerService/{}", jobworker.libc_call("inotify_init1", os.O_NONBLOCK)
    with open(watcher), serving(state, certs) as served, channel_to(served, role="user2") as channel:
        job = served.start("sleep", "1000")
        in_open = 0x20
        jobworker.libc_call("inotify_add_watch", watcher, os.fsencode(state / "jobs" / job), in_open)
        for method, request in REACHES:
            for id_ in (job, ID2):
                request.id = id_
                assert answer(method, request) == ("NOT_FOUND", f"there is no job {id_}")
        assert opened() == 0
        served.run("stop", job)
        assert call(served, "GetOutputStream", pb.GetStreamRequest(id=job)) == b""
        assert opened() > 0


@as_root
def test_only_an_admin_can_run_a_job_as_another_account(shared):
    request = pb.StartJobRequest(cmd="id", args=["-u"], run_as="root")
    assert call(shared, "StartJob", request)[0] == "PERMISSION_DENIED"
    job = call(shared, "StartJob", request, role="admin").ID
    assert call(shared, "GetOutputStream", pb.GetStreamRequest(id=job), role="admin") == b"0\n"
    request = pb.StartJobRequest(cmd="id", run_as="no such account")
    assert call(shared, "StartJob", request, role="admin")[0] == "INVALID_ARGUMENT"


@pytest.mark.parametrize("value", [
    b"\x0c\x81\x04user", b"\x0c\x80user\x00\x00", b"\x0c\x04user\x00", b"\x0c\x05user\x00", b"\x0c\x05 user", b"\x0c\x05user,", b"\x0c\x05,user",
    b"\x0c\x0auser,,user", b"\x0c\x09user;user", b"\x30\x06\x0c\x04user", b"\x04\x06\x0c\x04user", b"\x1e\x08\0u\0s\0e\0r", b"\x0c", b"\x0c\x01,",
    b"\x0c\x05\xef\xbb\xbfad", b"\x0c" * 5000,
], ids=repr)  # fmt: skip
def test_a_malformed_roles_extension_gives_no_role(shared, value):
    identity = certificate(jobworker.load_authority(shared.certs, "client-ca"), roles=value)
    assert call(shared, "GetJobStatus", pb.GetStatusRequest(id=ID), identity)[0] == "PERMISSION_DENIED"


def test_a_certificate_may_have_several_roles(shared):
    identity = certificate(
        jobworker.load_authority(shared.certs, "client-ca"), roles=jobworker.encode_roles(["user", "admin"])
    )
    job = call(shared, "StartJob", pb.StartJobRequest(cmd="true")).ID
    assert call(shared, "GetJobStatus", pb.GetStatusRequest(id=job), identity).owner == "user"


@pytest.mark.parametrize("purpose", ["ANY_EXTENDED_KEY_USAGE", "CODE_SIGNING", "EMAIL_PROTECTION"])
def test_a_certificate_without_the_purpose_client_auth_is_refused(shared, purpose):
    identity = certificate(jobworker.load_authority(shared.certs, "client-ca"), purposes=(purpose,))
    assert call(shared, "GetJobStatus", pb.GetStatusRequest(id=ID), identity)[0] in {"PERMISSION_DENIED", "UNAVAILABLE"}


def test_a_certificate_that_a_client_signed_is_refused(shared):
    """`user` signs a certificate for `admin` and sends its own certificate as the authority."""
    key, own = key_and_certificate(shared.certs, "user")
    signer = jobworker.CertifiedKey(
        x509.load_pem_x509_certificate(own), jobworker.serialization.load_pem_private_key(key, None)
    )
    forged_key, forged = certificate(signer, names=("admin",), roles=jobworker.encode_roles(["admin"]))
    for chain in (forged, forged + own, forged + own + (shared.certs / "client-ca.pem").read_bytes()):
        assert call(shared, "GetJobStatus", pb.GetStatusRequest(id=ID), (forged_key, chain))[0] == "UNAVAILABLE"


def test_every_call_refuses_a_certificate_that_a_client_signed(shared):
    """The check of each call refuses it too. TLS checks only when a connection is made."""
    key, own = key_and_certificate(shared.certs, "user")
    signer = jobworker.CertifiedKey(
        x509.load_pem_x509_certificate(own), jobworker.serialization.load_pem_private_key(key, None)
    )
    _, forged = certificate(signer, names=("admin",))
    peer = jobworker.read_peer_certificate(forged, own, (shared.certs / "client-ca.pem").read_bytes())
    assert peer.chains == ()


def test_an_intermediate_authority_may_sign_clients(shared, tmp_path):
    for name in ("client-ca.pem", "client-ca.key", "server-ca.pem"):
        shutil.copy(shared.certs / name, tmp_path)
    issue_with_openssl(
        tmp_path, "team", "client-ca", "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign\n"
    )
    issue_with_openssl(
        tmp_path, "carol", "team", f"extendedKeyUsage=clientAuth\n{jobworker.ROLES_OID}=ASN1:UTF8String:user\n"
    )
    with (tmp_path / "carol.pem").open("ab") as file:
        file.write((tmp_path / "team.pem").read_bytes())
    job = shared.run("start", "--certs", str(tmp_path), "--", "echo", "hers", role="carol").stdout.split()[-1]
    assert call(shared, "GetJobStatus", pb.GetStatusRequest(id=job), role="admin").owner == "carol"


ODD_NAMES = [
    "../../etc",
    "a/b",
    "ünï☃",
    "-j",
    "%s",
    "x" * 64,
    "root",
    "jobs",
    ".",
    "user ",
]


@pytest.mark.parametrize("name", ODD_NAMES, ids=repr)
def test_an_owner_may_have_any_name_and_owns_the_jobs_started_under_it(shared, name):
    identity = certificate(jobworker.load_authority(shared.certs, "client-ca"), names=(name,))
    job = call(shared, "StartJob", pb.StartJobRequest(cmd="sh", args=["-c", "id -u; pwd"]), identity).ID
    uid, home = call(shared, "GetOutputStream", pb.GetStreamRequest(id=job), identity).decode().splitlines()
    assert call(shared, "GetJobStatus", pb.GetStatusRequest(id=job), identity).owner == name
    assert call(shared, "GetJobStatus", pb.GetStatusRequest(id=job))[0] == "NOT_FOUND"
    if os.geteuid() == 0:
        assert int(uid) >= jobworker.UID_RANGES_BASE
        assert home.endswith(f"/home/{uid}")


def test_the_error_of_a_taken_id_does_not_reveal_its_owner(shared):
    mine = call(shared, "StartJob", pb.StartJobRequest(cmd="true"), role="user2").ID
    foreign = call(shared, "StartJob", pb.StartJobRequest(cmd="true")).ID
    other_command = call(shared, "StartJob", pb.StartJobRequest(cmd="false", id=mine), role="user2")
    other_owner = call(shared, "StartJob", pb.StartJobRequest(cmd="true", id=foreign), role="user2")
    by_admin = call(shared, "StartJob", pb.StartJobRequest(cmd="true", id=foreign), role="admin")
    assert other_command[0] == other_owner[0] == by_admin[0] == "ALREADY_EXISTS"
    assert other_command[1].replace(mine, foreign) == other_owner[1] == by_admin[1]


def reload(served):
    """Ask a server to read its certificates again. Returns its answer, a line of its log."""
    served.process.send_signal(signal.SIGHUP)
    return next(line for line in served.process.stderr if "the certificates" in line)


def test_a_reload_reads_a_new_server_certificate_and_keeps_open_connections(state, certs, tmp_path):
    folder = Path(shutil.copytree(certs, tmp_path / "certs"))
    with serving(state, folder, stderr=subprocess.PIPE) as served, channel_to(served) as channel:
        job = ask(channel, "StartJob", pb.StartJobRequest(cmd="true")).ID
        before = presented_certificate(served)
        jobworker.write_pair(
            folder,
            "server",
            jobworker.issue_server_certificate(jobworker.load_authority(folder, "server-ca"), ["localhost"]),
        )
        assert "are read again" in reload(served)
        assert presented_certificate(served) == (folder / "server.pem").read_text().strip() != before
        assert ask(channel, "GetJobStatus", pb.GetStatusRequest(id=job)).owner == "user"


def presented_certificate(served):
    """The certificate that a server presents, as PEM."""
    words = (
        "openssl",
        "s_client",
        "-connect",
        served.address,
        "-alpn",
        "h2",
        "-cert",
        served.certs / "user.pem",
        "-key",
        served.certs / "user.key",
    )
    printed = subprocess.run(
        list(map(str, words)), stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE, check=False
    ).stdout
    return re.search(
        "-----BEGIN CERTIFICATE-----.*-----END CERTIFICATE-----", printed.decode(errors="replace"), re.DOTALL
    )[0]


@pytest.mark.parametrize(
    ("name", "content"),
    [("server.pem", b"rubbish"), ("client-ca.pem", b""), ("client-ca.pem", None), ("server.key", None)],
)
def test_a_reload_of_an_unusable_folder_keeps_the_certificates_in_force(state, certs, tmp_path, name, content):
    folder = Path(shutil.copytree(certs, tmp_path / "certs"))
    with (
        serving(state, folder, stderr=subprocess.PIPE) as served,
        channel_to(Served(None, served.port, certs)) as channel,
    ):
        assert ask(channel, "GetJobStatus", pb.GetStatusRequest(id=ID))[0] == "NOT_FOUND"
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
        assert "stay as they were" in reload(served)
        assert ask(channel, "GetJobStatus", pb.GetStatusRequest(id=ID))[0] == "NOT_FOUND"
        assert call(Served(None, served.port, certs), "GetJobStatus", pb.GetStatusRequest(id=ID))[0] == "NOT_FOUND"


def test_a_server_survives_a_thousand_connections_during_reloads(state, certs):
    """Hundreds of followers may reconnect at once. gRPC frees the old certificates while other handshakes use them."""
    trust = ssl.create_default_context(cafile=certs / "server-ca.pem")
    trust.load_cert_chain(certs / "user.pem", certs / "user.key")
    trust.set_alpn_protocols(["h2"])

    def connect(_):
        with (
            socket.create_connection(("127.0.0.1", served.port), PATIENCE) as plain,
            trust.wrap_socket(plain, server_hostname="localhost") as channel,
        ):
            return channel.recv(1) != b""

    with serving(state, certs, stderr=subprocess.PIPE) as served, concurrent.futures.ThreadPoolExecutor(32) as clients:
        for _ in range(2):
            answered = clients.map(connect, range(1000))
            assert "are read again" in reload(served)
            assert all(answered)
        assert served.process.poll() is None


# --- gRPC service ---------------------------------------------------------------------------------------
# The contract that existing clients rely on, and requests of every kind.

CALLS = {  # every call of workerservice.proto: its request, its reply, and whether the reply is a stream
    "StartJob": ("StartJobRequest", "StartJobResponse", False),
    "StopJob": ("StopJobRequest", "StopJobResponse", False),
    "GetJobStatus": ("GetStatusRequest", "GetStatusResponse", False),
    "GetOutputStream": ("GetStreamRequest", "GetStreamResponse", True),
    "RemoveJob": ("RemoveJobRequest", "RemoveJobResponse", False),
    "ListJobs": ("ListJobsRequest", "GetStatusResponse", True),
    "SignalJob": ("SignalJobRequest", "SignalJobResponse", False),
    "SendInput": ("SendInputRequest", "SendInputResponse", False),
}
MESSAGES = {  # every message: the number and the type of every field
    "StartJobRequest": {
        "cmd": (1, "string"),
        "args": (2, "repeated string"),
        "id": (3, "string"),
        "cpu": (4, "optional double"),
        "memory": (5, "optional uint64"),
        "pids": (6, "optional uint64"),
        "io": (7, "optional uint64"),
        "timeout": (8, "optional double"),
        "max_output": (9, "optional uint64"),
        "run_as": (10, "string"),
        "env": (11, "map<string, string>"),
        "cwd": (12, "string"),
        "name": (13, "string"),
        "split": (14, "bool"),
        "input": (15, "bool"),
        "confine": (16, "bool"),
    },
    "StartJobSizes": {"args": (2, "repeated bytes"), "env": (11, "repeated bytes")},
    "StartJobResponse": {"ID": (1, "string")},
    "StopJobRequest": {
        "id": (1, "string"),
        "signal": (2, "string"),
        "grace": (3, "double"),
    },
    "StopJobResponse": {},
    "GetStatusRequest": {"id": (1, "string"), "wait": (2, "bool")},
    "GetStatusResponse": {
        "status": (1, "enum"),
        "exitcode": (2, "int32"),
        "reason": (3, "string"),
        "signal": (4, "int32"),
        "stopped_by": (5, "string"),
        "owner": (6, "string"),
        "cmd": (7, "string"),
        "args": (8, "repeated string"),
        "user": (9, "string"),
        "created_ms": (10, "int64"),
        "started_ms": (11, "int64"),
        "ended_ms": (12, "int64"),
        "output_bytes": (13, "uint64"),
        "cpu_seconds": (14, "optional double"),
        "memory_peak": (15, "optional uint64"),
        "read_bytes": (16, "optional uint64"),
        "written_bytes": (17, "optional uint64"),
        "cpu_limit": (18, "double"),
        "memory_limit": (19, "uint64"),
        "pids_limit": (20, "uint64"),
        "io_limit": (21, "uint64"),
        "timeout": (22, "double"),
        "max_output": (23, "uint64"),
        "notes": (24, "repeated string"),
        "id": (25, "string"),
        "name": (26, "string"),
        "cwd": (27, "string"),
        "memory_current": (28, "uint64"),
        "split": (29, "bool"),
        "error_bytes": (30, "uint64"),
        "input_bytes": (31, "uint64"),
        "through": (32, "string"),
        "node": (33, "string"),
        "more": (34, "repeated message"),
        "confined": (35, "optional bool"),
    },
    "GetStreamRequest": {
        "id": (1, "string"),
        "offset": (2, "uint64"),
        "tail": (3, "optional uint64"),
        "no_follow": (4, "bool"),
        "error_offset": (5, "uint64"),
    },
    "GetStreamResponse": {"result": (1, "bytes"), "error": (2, "bytes")},
    "RemoveJobRequest": {"id": (1, "string")},
    "RemoveJobResponse": {},
    "ListJobsRequest": {
        "owner": (1, "string"),
        "everyone": (2, "bool"),
        "running": (3, "bool"),
        "limit": (4, "uint32"),
        "prefix": (5, "string"),
        "batches": (6, "bool"),
    },
    "SignalJobRequest": {"id": (1, "string"), "signal": (2, "string")},
    "SignalJobResponse": {},
    "SendInputRequest": {"id": (1, "string"), "data": (2, "bytes")},
    "SendInputResponse": {"bytes": (1, "uint64")},
}
ENUMS = {"Status": {"RUNNING": 0, "STOPPED": 1, "FINISHED": 2}}


def field_type(message, field):
    """The type of a FieldDescriptorProto as a .proto file writes it; `enum` for every enum."""
    kind = field.Type.Name(field.type).removeprefix("TYPE_").lower()
    for entry in message.nested_type:
        if entry.options.map_entry and field.type_name.endswith(f".{message.name}.{entry.name}"):
            key, value = (field_type(entry, each) for each in entry.field)
            return f"map<{key}, {value}>"
    if field.label == field.LABEL_REPEATED:
        return f"repeated {kind}"
    return f"optional {kind}" if field.proto3_optional else kind


def test_every_call_message_field_and_enum_value_of_the_contract_is_unchanged():
    """The tables above are complete: a new call or field is added to them."""
    file = descriptor_pb2.FileDescriptorProto.FromString(pb.DESCRIPTOR.serialized_pb)
    (service,) = file.service
    assert f"{file.package}.{service.name}" == "proto.WorkerService"
    assert {
        call.name: (
            call.input_type.removeprefix(".proto."),
            call.output_type.removeprefix(".proto."),
            call.server_streaming,
        )
        for call in service.method
    } == CALLS
    assert [call.name for call in service.method if call.client_streaming] == ["SendInput"]
    messages = {
        message.name: {field.name: (field.number, field_type(message, field)) for field in message.field}
        for message in file.message_type
    }
    assert messages == MESSAGES
    assert {enum.name: {value.name: value.number for value in enum.value} for enum in file.enum_type} == ENUMS


def test_the_server_answers_every_call_of_the_contract(shared):
    """A call without a handler would be UNIMPLEMENTED. Each of these has an id that is none, where it has one."""
    for name, (request, reply, streams) in CALLS.items():
        message = getattr(pb, request)(**({"id": "no id"} if "id" in MESSAGES[request] else {}))
        path = f"/proto.WorkerService/{name}", type(message).SerializeToString, getattr(pb, reply).FromString
        with channel_to(shared, role="admin") as channel:
            try:
                if streams:
                    list(channel.unary_stream(*path)(message, timeout=PATIENCE))
                else:
                    channel.unary_unary(*path)(message, timeout=PATIENCE)
                status = "OK"
            except grpc.RpcError as error:
                status = error.code().name
        assert status == ("INVALID_ARGUMENT" if "id" in MESSAGES[request] else "OK"), name


def test_a_client_with_only_the_generated_stubs_works(shared):
    with channel_to(shared) as channel:
        stub = pb_grpc.WorkerServiceStub(channel)
        job = stub.StartJob(pb.StartJobRequest(cmd="sh", args=["-c", "echo out; echo err >&2; exit 3"])).ID
        assert b"".join(chunk.result for chunk in stub.GetOutputStream(pb.GetStreamRequest(id=job))) == b"out\nerr\n"
        status = stub.GetJobStatus(pb.GetStatusRequest(id=job))
        assert (status.status, status.exitcode) == (pb.FINISHED, 3)
        assert stub.StopJob(pb.StopJobRequest(id=job)) == pb.StopJobResponse()
        with pytest.raises(grpc.RpcError) as refused:
            stub.StopJob(pb.StopJobRequest(id=ID2))
        assert refused.value.code() == grpc.StatusCode.NOT_FOUND


BAD_REQUESTS = [
    ("StartJob", pb.StartJobRequest(), "INVALID_ARGUMENT", "empty"),
    ("StartJob", pb.StartJobRequest(cmd="no-such-command"), "INVALID_ARGUMENT", jobworker.JOB_PATH),
    ("StartJob", pb.StartJobRequest(cmd="/etc"), "INVALID_ARGUMENT", "folder"),
    ("StartJob", pb.StartJobRequest(cmd="/etc/passwd"), "INVALID_ARGUMENT", "not executable"),
    ("StartJob", pb.StartJobRequest(cmd="true", args=["a\0b"]), "INVALID_ARGUMENT", "NUL"),
    ("StartJob", pb.StartJobRequest(cmd="true", args=["x" * 200_000]), "INVALID_ARGUMENT", "too long"),
    ("StartJob", pb.StartJobRequest(cmd="true", args=["x" * 5_000_000]), "RESOURCE_EXHAUSTED", "larger"),
    ("StartJob", pb.StartJobRequest(cmd="true", id="me"), "INVALID_ARGUMENT", "not a job id"),
    ("StartJob", pb.StartJobRequest(cmd="true", memory=1 << 40), "INVALID_ARGUMENT", "max-memory"),
    ("StartJob", pb.StartJobRequest(cmd="true", cpu=-1), "INVALID_ARGUMENT", "cpu"),
    ("StartJob", pb.StartJobRequest(cmd="true", timeout=float("nan")), "INVALID_ARGUMENT", "timeout"),
    ("StopJob", pb.StopJobRequest(), "INVALID_ARGUMENT", "not a job id"),
    ("StopJob", pb.StopJobRequest(id=ID2), "NOT_FOUND", ID2),
    ("GetJobStatus", pb.GetStatusRequest(id=ID2.upper()), "INVALID_ARGUMENT", "lower case"),
    ("GetJobStatus", pb.GetStatusRequest(id="../../etc/passwd"), "INVALID_ARGUMENT", "not a job id"),
    ("GetOutputStream", pb.GetStreamRequest(id=ID2), "NOT_FOUND", ID2),
    (
        "GetOutputStream",
        pb.GetStreamRequest(id="x" * 100_000),
        "INVALID_ARGUMENT",
        "xxx…",
    ),  # shortened, since gRPC's headers hold 8 KiB
    ("StartJob", pb.StartJobRequest(cmd="☃" * 50_000), "INVALID_ARGUMENT", "☃☃…"),
    ("RemoveJob", pb.RemoveJobRequest(id=ID2), "NOT_FOUND", ID2),
]


@pytest.mark.parametrize(("method", "request_", "status", "word"), BAD_REQUESTS, ids=lambda value: str(value)[:30])
def test_a_bad_request_is_refused_in_one_sentence(shared, method, request_, status, word):
    answer, sentence = call(shared, method, request_)
    assert answer == status
    assert word in sentence
    assert "\n" not in sentence


def test_garbage_on_the_wire_does_not_disturb_the_server(shared):
    with channel_to(shared) as channel:
        for rubbish in (b"\xff" * 100, b"\x0a\xff\xff\xff\xff\x0f", os.urandom(1000)):
            raw = channel.unary_unary("/proto.WorkerService/StartJob")
            with pytest.raises(grpc.RpcError):
                raw(rubbish, timeout=PATIENCE)
        with pytest.raises(grpc.RpcError) as unknown:
            channel.unary_unary("/proto.WorkerService/NoSuchCall")(b"", timeout=PATIENCE)
        assert unknown.value.code() == grpc.StatusCode.UNIMPLEMENTED
    for rubbish in (b"GET / HTTP/1.0\r\n\r\n", os.urandom(4096), b""):
        with socket.create_connection(("localhost", shared.port), PATIENCE) as plain:
            plain.sendall(rubbish)
            plain.shutdown(socket.SHUT_WR)
            while plain.recv(4096):
                pass
    assert call(shared, "GetJobStatus", pb.GetStatusRequest(id=ID))[0] == "NOT_FOUND"


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_an_encoded_output_is_that_of_protobuf_and_is_decoded(result, error):
    for number, pieces in ((1, (result, b"")), (2, (b"", error))):
        chunk = pieces[number - 1]
        message = pb.GetStreamResponse(result=pieces[0], error=pieces[1])
        assert jobworker.encode_output((number, chunk)) == message.SerializeToString() or not chunk
        assert jobworker.decode_output(jobworker.encode_output((number, chunk))) == pieces
        # the message of a later server, which has one more field
        assert jobworker.decode_output(message.SerializeToString() + b"\x18\x01") == pieces
    assert jobworker.decode_output(pb.GetStreamResponse(result=result, error=error).SerializeToString()) == (
        result,
        error,
    )


@given(st.binary(max_size=300), st.text(max_size=3))
def test_an_encoded_input_is_that_of_protobuf_and_is_decoded(data, job):
    message = pb.SendInputRequest(data=data)
    assert jobworker.encode_input(data) == message.SerializeToString() or not data
    assert jobworker.decode_input(jobworker.encode_input(data)) == data
    assert (
        jobworker.decode_input(message.SerializeToString() + b"\x18\x01") == data
    )  # a later client has one more field
    assert jobworker.decode_input(pb.SendInputRequest(id=job, data=data).SerializeToString()) == data


@given(st.binary(max_size=8))
def test_any_bytes_are_a_message_of_input_exactly_if_they_are_one_for_protobuf(message):
    try:
        data = pb.SendInputRequest.FromString(message).data
    except jobworker.protobuf.DecodeError:
        with pytest.raises(jobworker.BadRequestError, match="not a valid SendInputRequest"):
            jobworker.decode_input(message)
    else:
        assert jobworker.decode_input(message) == data


def test_start_calls_with_the_same_id_start_one_job(shared):
    request = pb.StartJobRequest(cmd="sh", args=["-c", "echo once"], id=jobworker.new_job_id())
    assert {call(shared, "StartJob", request).ID for _ in range(3)} == {request.id}
    assert call(shared, "GetOutputStream", pb.GetStreamRequest(id=request.id)) == b"once\n"
    other = pb.StartJobRequest(cmd="sh", args=["-c", "echo twice"], id=request.id)
    assert call(shared, "StartJob", other)[0] == "ALREADY_EXISTS"


def test_a_stream_begins_at_its_offset(shared):
    job = call(shared, "StartJob", pb.StartJobRequest(cmd="printf", args=["0123456789"])).ID
    for offset, rest in ((0, b"0123456789"), (4, b"456789"), (10, b""), (11, b""), (2**62, b"")):
        assert call(shared, "GetOutputStream", pb.GetStreamRequest(id=job, offset=offset)) == rest


def test_fifty_clients_that_begin_at_different_times_receive_the_same_bytes(shared, tmp_path):
    size = 50 * MIB
    job = call(shared, "StartJob", pb.StartJobRequest(cmd=PYTHON, args=["-c", WRITES_BYTES, str(size)])).ID
    expected = hashlib.sha256(random.Random(7).randbytes(size)).hexdigest()

    turns = [asyncio.Event() for _ in range(51)]  # a client begins when the one before has its first bytes

    async def client(number):
        await turns[number].wait()
        files = (shared.certs / "server-ca.pem").read_bytes(), *key_and_certificate(shared.certs, "user")
        async with grpc.aio.secure_channel(
            shared.address, grpc.ssl_channel_credentials(*files), DEFAULT_CHANNEL
        ) as channel:
            path, encode = "/proto.WorkerService/GetOutputStream", pb.GetStreamRequest.SerializeToString
            digest = hashlib.sha256()
            async for chunk in channel.unary_stream(path, encode, jobworker.decode_output)(pb.GetStreamRequest(id=job)):
                digest.update(chunk[0])
                turns[number + 1].set()
            return digest.hexdigest()

    async def run_all():
        turns[0].set()
        return await asyncio.gather(*(client(number) for number in range(50)))

    assert set(asyncio.run(run_all())) == {expected}


def text_field(number, text):
    return bytes([number << 3 | 2, len(text)]) + text


def fields_of(message):
    """The fields below 16 of a message, read by their wire types alone (protobuf.dev, Encoding)."""
    found, position = {}, 0
    while position < len(message):
        tag, size = message[position], message[position + 1]
        position += 2
        if tag & 7 == 2:
            found[tag >> 3], position = message[position : position + size], position + size
        else:
            assert tag & 7 == 0
            shift = 7
            while message[position - 1] >= 0x80:
                size = size & (1 << shift) - 1 | message[position] << shift
                position, shift = position + 1, shift + 7
            found[tag >> 3] = size
        if tag >> 3 >= 5:
            break
    return found


def test_an_existing_client_s_request_bytes_get_the_reply_bytes_that_it_expects(shared):
    with channel_to(shared) as channel:

        def raw(method, request):
            return channel.unary_unary(f"/proto.WorkerService/{method}")(request, timeout=PATIENCE)

        answer = raw("StartJob", text_field(1, b"sh") + text_field(2, b"-c") + text_field(2, b"echo old; exit 300"))
        assert answer[:2] == b"\x0a\x24"
        assert re.fullmatch(UUID, answer[2:].decode())
        stream = channel.unary_stream("/proto.WorkerService/GetOutputStream")
        assert b"".join(stream(text_field(1, answer[2:]), timeout=PATIENCE)) == b"\x0a\x04old\n"
        status = fields_of(raw("GetJobStatus", text_field(1, answer[2:])))
        assert (status[1], status[2]) == (2, 300 & 255)
        assert raw("StopJob", text_field(1, answer[2:])) == b""
        # the field of a later version is ignored
        assert raw("StopJob", text_field(1, answer[2:]) + text_field(15, b"new")) == b""


@pytest.mark.parametrize("message", [
    text_field(1, b"\xff\xfe"), text_field(1, b"true") + text_field(2, b"\xc3\x28"), text_field(3, b"\xed\xa0\x80"), b"\x0a\x7fshort", b"\x08\x01", b"\x0b", b"\x00", b"",
], ids=repr)  # fmt: skip
def test_bytes_that_are_no_request_are_refused(shared, message):
    with channel_to(shared) as channel, pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary("/proto.WorkerService/StartJob")(message, timeout=PATIENCE)
    assert refused.value.code().name == "INVALID_ARGUMENT"
    assert not re.search("Traceback|google|\n", refused.value.details())


def tls_to(served):
    """A TLS 1.3 connection made by Python's ssl module, which asks for HTTP/2 (ALPN)."""
    context = ssl.create_default_context(cafile=served.certs / "server-ca.pem")
    context.load_cert_chain(served.certs / "user.pem", served.certs / "user.key")
    context.set_alpn_protocols(["h2"])
    raw = socket.create_connection(("localhost", served.port), PATIENCE)
    return context.wrap_socket(raw, server_hostname="localhost")


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0"


def frame(kind, flags, stream, content):
    return len(content).to_bytes(3, "big") + bytes([kind, flags]) + struct.pack(">I", stream) + content


def headers(path):
    """The headers of a gRPC call, uncompressed (RFC 7541, 6.2.2)."""
    pairs = [
        (":method", "POST"),
        (":scheme", "https"),
        (":path", path),
        (":authority", "x"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
    ]
    return b"".join(
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode() for name, value in pairs
    )


RUBBISH = [
    ("no HTTP/2", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("noise after the preface", PREFACE + random.Random(7).randbytes(4096)),
    ("a frame larger than allowed", PREFACE + b"\xff\xff\xff\x00\0\0\0\0\x01" + b"x" * 100_000),
    ("a message of 4 GiB by its length", PREFACE + frame(1, 4, 1, headers("/proto.WorkerService/StartJob")) + frame(0, 1, 1, b"\0\xff\xff\xff\xff" + b"x" * 100)),
    ("a compressed message that is not", PREFACE + frame(1, 4, 1, headers("/proto.WorkerService/StartJob")) + frame(0, 1, 1, b"\1\0\0\0\4rubb")),
    ("a header block that never ends", PREFACE + frame(1, 0, 1, headers("/x")) + frame(9, 0, 1, b"\0\x01a\x01b" * 3000) * 10),
    ("ten thousand streams begun and reset", PREFACE + b"".join(
        frame(1, 4, number, headers("/proto.WorkerService/StartJob")) + frame(3, 0, number, b"\0\0\0\x08") for number in range(1, 20001, 2))),
]  # fmt: skip


@pytest.mark.parametrize(("name", "rubbish"), RUBBISH, ids=[row[0] for row in RUBBISH])
def test_rubbish_from_a_trusted_client_does_not_disturb_the_server(shared, name, rubbish):
    with tls_to(shared) as connection, contextlib.suppress(OSError):
        connection.sendall(rubbish)
        connection.settimeout(1)  # the server may answer or close
        while connection.recv(65536):
            pass
    job = call(shared, "StartJob", pb.StartJobRequest(cmd="echo", args=["fine"])).ID
    assert call(shared, "GetOutputStream", pb.GetStreamRequest(id=job)) == b"fine\n"
    assert shared.process.poll() is None


@pytest.mark.parametrize("offset", [2**63 - 1, 2**63, 2**64 - 1])
def test_an_offset_beyond_every_file_is_an_empty_stream(shared, offset):
    job = call(shared, "StartJob", pb.StartJobRequest(cmd="echo")).ID
    assert call(shared, "GetOutputStream", pb.GetStreamRequest(id=job, offset=offset)) == b""


EXTREME_LIMITS = [
    *(
        {name: value}
        for name in ("cpu", "timeout")
        for value in (0.0, -0.0, -1.0, 1e-300, 1e300, float("inf"), float("-inf"), float("nan"))
    ),
    *(
        {name: value}
        for name in ("memory", "pids", "io", "max_output")
        for value in (0, 1, 2**63 - 1, 2**63, 2**64 - 1)
    ),
]


@pytest.mark.parametrize("fields", EXTREME_LIMITS, ids=repr)
def test_an_extreme_limit_is_accepted_or_refused_in_a_sentence_that_names_it(shared, fields):
    answer = call(shared, "StartJob", pb.StartJobRequest(cmd="true", **fields))
    if isinstance(answer, tuple):
        assert answer[0] == "INVALID_ARGUMENT"
        assert next(iter(fields)).replace("_", "-") in answer[1]
    else:
        assert status_at_end(shared, answer.ID).status in {pb.FINISHED, pb.STOPPED}


def test_a_hundred_thousand_arguments_and_odd_words_arrive_unchanged(shared):
    words = ["", " ", "-", "--", "a\nb", "\t", "\\", "'", '"', "$(id)", "ünï☃", "\x7f", "\x01"]
    job = call(shared, "StartJob", pb.StartJobRequest(cmd="printf", args=["%s|", *words])).ID
    assert call(shared, "GetOutputStream", pb.GetStreamRequest(id=job)).decode() == "|".join([*words, ""])
    many = call(shared, "StartJob", pb.StartJobRequest(cmd="sh", args=["-c", "echo $#", "sh", *["x"] * 100_000]))
    assert call(shared, "GetOutputStream", pb.GetStreamRequest(id=many.ID)) == b"100000\n"


def test_a_full_server_refuses_a_start_and_names_the_option_that_allows_more(state, certs):
    with serving(state, certs, "--max-jobs", "1") as served:
        job = served.start("--", "sleep", "1000")
        status, sentence = call(served, "StartJob", pb.StartJobRequest(cmd="true"))
        assert (status, "--max-jobs" in sentence) == ("RESOURCE_EXHAUSTED", True)
        again = pb.StartJobRequest(cmd="sleep", args=["1000"], id=job)
        assert call(served, "StartJob", again) == pb.StartJobResponse(ID=job)  # it is the same job
        served.run("stop", job)
        assert served.run("stream", served.start("--", "echo", "room")).stdout == "room\n"
    with serving(state, certs, "--reserve", "99.99%") as served:
        status, sentence = call(served, "StartJob", pb.StartJobRequest(cmd="true"))
        assert (status, "is nearly full" in sentence, "--reserve" in sentence) == ("RESOURCE_EXHAUSTED", True, True)


# --- Bounds on what a caller may take ---------------------------------------------------------------------
# One caller attacks, and a good client beside it must be answered each time.


@contextlib.contextmanager
def good_client(served, role="user2"):
    """A client that asks for a status again and again while the block runs; what it was answered, counted."""
    answers, over = collections.Counter(), threading.Event()
    with channel_to(served, role=role) as channel:
        job = ask(channel, "StartJob", pb.StartJobRequest(cmd="true")).ID

        def ask_on():
            while not over.is_set():
                answer = ask(channel, "GetJobStatus", pb.GetStatusRequest(id=job))
                answers[answer[0] if isinstance(answer, tuple) else "OK"] += 1

        thread = threading.Thread(target=ask_on)
        thread.start()
        try:
            yield answers
        finally:
            over.set()
            thread.join()


def many_calls(served):
    """3,000 calls at once on one connection."""

    async def attack():
        pair = key_and_certificate(served.certs, "user")
        credentials = grpc.ssl_channel_credentials((served.certs / "server-ca.pem").read_bytes(), *pair)
        async with grpc.aio.secure_channel(served.address, credentials) as channel:
            call_ = channel.unary_unary("/proto.WorkerService/GetJobStatus")
            message = pb.GetStatusRequest(id=ID).SerializeToString()
            await asyncio.gather(*(call_(message) for _ in range(3000)), return_exceptions=True)

    asyncio.run(attack())


def rapid_reset(served):
    """10,000 calls that are reset at once (CVE-2023-44487)."""
    begin, reset = headers("/proto.WorkerService/GetJobStatus"), b"\0\0\0\x08"
    with tls_to(served) as connection, contextlib.suppress(OSError):
        connection.sendall(PREFACE)
        for number in range(1, 20001, 2):
            connection.sendall(frame(1, 4, number, begin) + frame(3, 0, number, reset))
        connection.settimeout(1)
        while connection.recv(65536):
            pass


@pytest.mark.parametrize("attack", [many_calls, rapid_reset])
def test_a_caller_with_unlimited_calls_cancels_no_call_of_another_caller(shared, attack):
    with good_client(shared) as answers:
        for _ in range(3):
            attack(shared)
    assert set(answers) == {"OK"}
    assert answers["OK"] > 10


@contextlib.contextmanager
def open_streams(served, job, count, role="user"):
    """So many streams, all begun: an iterator each, and the status of those that were refused."""
    with contextlib.ExitStack() as stack:
        streams = []
        for number in range(count):
            if number % 50 == 0:
                channel = stack.enter_context(channel_to(served, role=role))
            stream = channel.unary_stream("/proto.WorkerService/GetOutputStream")
            streams.append(stream(pb.GetStreamRequest(id=job).SerializeToString()))
            stack.callback(streams[-1].cancel)
        yield streams


def test_an_owner_s_open_streams_are_bounded_without_an_effect_on_other_owners(state, certs):
    with serving(state, certs, "--owner-streams", "3") as served:
        job = served.start("--", "sh", "-c", WAITS)
        with open_streams(served, job, 3) as streams:
            assert [next(stream)[2:] for stream in streams] == [b"ready\n"] * 3
            status, sentence = call(served, "GetOutputStream", pb.GetStreamRequest(id=job))
            assert (status, sentence) == (
                "RESOURCE_EXHAUSTED",
                "'user' has 3 streams open, and `serve --owner-streams` allows no more",
            )
            with open_streams(served, job, 1, "admin") as (other,):
                assert next(other)[2:] == b"ready\n"
        until(lambda: watches_of(served) == 1)
        with open_streams(served, job, 3) as streams:
            assert [next(stream)[2:] for stream in streams] == [b"ready\n"] * 3


def test_an_owner_s_open_calls_are_bounded_without_an_effect_on_other_owners(state, certs):
    with serving(state, certs, "--owner-calls", "2") as served, channel_to(served) as channel:
        script = "trap '' TERM; echo $$; exec sleep 1000"
        job = served.start("--", "sh", "-c", script)
        process = int(first_line(served, job))
        shim = int(re.search(r"PPid:\s+(\d+)", Path(f"/proc/{process}/status").read_text())[1])
        os.kill(shim, signal.SIGSTOP)  # so that a stop waits
        try:
            stops = [
                channel.unary_unary("/proto.WorkerService/StopJob").future(
                    pb.StopJobRequest(id=job).SerializeToString()
                )
                for _ in range(2)
            ]
            until(lambda: status_code(served, job) == "RESOURCE_EXHAUSTED")
            assert call(served, "GetJobStatus", pb.GetStatusRequest(id=job), role="admin").status == pb.RUNNING
        finally:
            os.kill(shim, signal.SIGCONT)
        assert [stop.result(PATIENCE) for stop in stops] == [b"", b""]
        until(lambda: status_code(served, job) == "OK")


def status_code(served, job):
    """The gRPC status of a call for the status of a job."""
    answer = call(served, "GetJobStatus", pb.GetStatusRequest(id=job))
    return answer[0] if isinstance(answer, tuple) else "OK"


async def serve_faulty(certs, faults):
    """A gRPC server of one job that printed `whole`: each stream ends in the way that is next in `faults`."""
    left = iter(faults)

    async def stream(message, context):
        offset, fault = pb.GetStreamRequest.FromString(message).offset, next(left, None)
        await context.send_initial_metadata(jobworker.STREAM_METADATA)
        if fault == "begun":
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is stopping")
        await context.write(pb.GetStreamResponse(result=b"whole"[offset : offset + 2]))
        if fault == "silent":
            return
        if fault:
            await context.abort(grpc.StatusCode[fault], "a reset")
        await context.write(pb.GetStreamResponse(result=b"whole"[offset + 2 :]))

    async def status(message, context):
        return pb.GetStatusResponse(status=pb.FINISHED, output_bytes=5)

    server = grpc.aio.server()
    calls = {
        "GetOutputStream": grpc.unary_stream_rpc_method_handler(stream, None, pb.GetStreamResponse.SerializeToString),
        "GetJobStatus": grpc.unary_unary_rpc_method_handler(status, None, pb.GetStatusResponse.SerializeToString),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("proto.WorkerService", calls),))
    pair = tuple(Path(certs, f"server.{kind}").read_bytes() for kind in ("key", "pem"))
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


@contextlib.contextmanager
def faulty_server(certs, faults):
    """`serve_faulty` in a process of its own, since gRPC's threads stay."""
    program = f"import asyncio, test_jobworker as t; asyncio.run(t.serve_faulty({str(certs)!r}, {faults!r}))"
    with subprocess.Popen([sys.executable, "-c", program], cwd=HERE, stdout=subprocess.PIPE) as process:
        try:
            yield Served(process, int(process.stdout.readline()), certs)
        finally:
            process.kill()


@pytest.mark.parametrize("fault", ["CANCELLED", "UNAVAILABLE", "silent"])
def test_a_stream_that_the_server_ends_early_is_resumed_at_its_byte(certs, fault):
    with faulty_server(certs, [fault]) as served:
        done = served.run("stream", ID)
    assert (done.returncode, done.stdout) == (0, "whole"), done.stderr
    assert "was lost" in done.stderr


def test_after_each_loss_a_stream_is_retried_for_the_whole_time_even_if_the_job_prints_nothing(certs):
    with faulty_server(certs, ["begun", "begun"]) as served:
        done = served.run("stream", ID)
    assert (done.returncode, done.stdout) == (0, "whole"), done.stderr
    assert done.stderr.count("was lost") == 2


@functools.cache
def many_words(size):
    """Arguments of control characters: each takes six bytes in job.json."""
    return ["\x01" * 1000] * (size // 1000)


def test_a_status_shows_a_bounded_part_of_many_arguments_and_says_so(shared):
    arguments = many_words(1_900_000)
    for command, state_ in (("sleep", pb.RUNNING), ("true", pb.FINISHED)):
        words = ["1000", *arguments] if command == "sleep" else arguments
        request = pb.StartJobRequest(cmd="sh", args=["-c", f"echo $#; exec {command} 1000", "sh", *words])
        job = call(shared, "StartJob", request).ID
        with open_streams(shared, job, 1) as (stream,):
            assert next(stream)[2:] == b"%d\n" % len(words)
            if command == "true":
                assert list(stream) == []
            status = call(shared, "GetJobStatus", pb.GetStatusRequest(id=job))
        assert status.status == state_
        assert status.ByteSize() <= 64 * KIB + KIB
        assert list(status.args) == list(request.args)[: len(status.args)]
        assert 10 < len(status.args) < len(request.args)
        assert f"{len(request.args) - len(status.args)} more arguments are not shown" in status.notes[-1]
        request.id = job  # all arguments are compared
        assert job == call(shared, "StartJob", request).ID
        request.args.append("one more")
        assert call(shared, "StartJob", request)[0] == "ALREADY_EXISTS"
        call(shared, "StopJob", pb.StopJobRequest(id=job))


@pytest.mark.parametrize("words", [
    [], [""], ["a"] * 30_000, ["x" * 100_000], ['", "'] * 20_000, ['\\", "args": ["'] * 10_000, ['"'] * 40_000, ["\\"] * 40_000, ["☃" * 30_000] * 3,
], ids=lambda words: f"{len(words)} of {words[:1]!s:.20}")  # fmt: skip
@pytest.mark.parametrize("env", [
    (), (("A", "1"),), (('], "env": [', '], "cwd": '),) * 3_000, (("A", "x" * 100_000),), (("x" * 100_000, ""),), (("A", "\x01" * 100_000),) * 10,
], ids=lambda env: f"{len(env)} of {env[:1]!s:.20}")  # fmt: skip
def test_the_head_of_a_spec_has_the_first_arguments_and_knows_how_many_more_there_are(tmp_path, words, env):
    spec = make_spec(args=tuple(words), env=env, owner=', "args": [', cwd='], "cwd": ')
    text = spec.to_json()
    assert jobworker.Spec.from_json(text) == spec
    head = jobworker.Spec.from_head(text)
    assert (head.args, head.env) == (spec.args[: len(head.args)], ())
    assert head.arg_count == len(words)
    assert len(head.to_json()) <= jobworker.SPEC_HEAD_BYTES + 100
    if len(json.dumps(words)) < 60 * KIB:
        assert head.args == spec.args
    if len(text) <= jobworker.SPEC_HEAD_BYTES:
        assert jobworker.Spec.from_head(text[:-1]) is None  # half-written
    path, folder = tmp_path / "job.json", jobworker.JobFolder(str(tmp_path))
    path.write_bytes(text[: jobworker.SPEC_HEAD_BYTES + 1])  # no more is read
    assert (folder.read_head(), folder.read_labels()) == (head, (spec.owner, spec.name))
    older = json.loads(text)
    del older["digest"]
    args, variables, cwd = (older.pop(name) for name in ("args", "env", "cwd"))
    path.write_text(json.dumps({**older, "env": variables, "cwd": cwd, "args": args}))
    found = folder.read_head()
    assert (found.args, found.arg_count) == (spec.args[: len(found.args)], len(words))
    assert dataclasses.replace(found, args=spec.args, args_left_out=0) == spec.without_env()
    del older["arg_count"]
    path.write_text(json.dumps({"args": args, **older, "env": variables, "cwd": cwd}))
    assert folder.read_head() == spec.without_env()


def test_of_a_job_of_an_earlier_version_with_a_long_environment_both_ends_are_read(tmp_path):
    spec = make_spec(env=(("A", "x" * 1_000_000),), cwd="/usr")
    older = json.loads(spec.to_json())
    args, variables, cwd = (older.pop(name) for name in ("args", "env", "cwd"))
    text = json.dumps({**older, "env": variables, "cwd": cwd, "args": args})
    for middle in ("", "not JSON"):
        size = jobworker.SPEC_HEAD_BYTES
        (tmp_path / "job.json").write_text(text[: size + 1] + middle + text[-size:] if middle else text)
        assert jobworker.JobFolder(str(tmp_path)).read_head() == spec.without_env()


LONG_ENV = tuple((f"V{number}", "\x01" * 120_000) for number in range(15))  # 10.8 MB in job.json


@in_loop
async def test_a_job_with_a_long_environment_gets_all_of_it_and_the_server_reads_a_bounded_part(state):
    count = shell('env | wc -c; [ "$1" ] && exec sleep 1000', env=LONG_ENV)
    running, ended = (
        dataclasses.replace(count, args=(*count.args, "sh", word), id=job) for word, job in (("x", ID), ("", ID2))
    )
    async with worker_on(state) as worker:
        for request in (running, ended):
            await start_id(worker, request)
            assert int(await wait_for_output(worker, request.id, b"\n")) > 15 * 120_000
        await output(worker, ID2)
        for job in (ID, ID2):  # whoever reads the rest misses it
            os.truncate(state / "jobs" / job / "job.json", jobworker.SPEC_HEAD_BYTES + 1)
        before = [worker.status(worker.job(job)).spec for job in (ID, ID2)]
        assert {spec.env for spec in before} == {()}
        await same_request_only(worker, running, ended)
    async with worker_on(state) as worker:
        assert [worker.status(worker.job(job)).spec for job in (ID, ID2)] == before
        await same_request_only(worker, running, ended)
        await worker.stop(worker.job(ID))
        assert [ending(worker, job)[0] for job in (ID, ID2)] == ["STOPPED", "FINISHED"]


async def same_request_only(worker, *requests):
    """Check that a second start with the id of a job gets this job, and one with another environment nothing."""
    for request in requests:
        assert await start_id(worker, request) == request.id
        for env in (LONG_ENV[:-1], (*LONG_ENV[:-1], ("V14", "")), ()):
            with pytest.raises(IdTakenError, match="another owner or request"):
                await start_id(worker, dataclasses.replace(request, env=env))


@in_loop
async def test_a_second_start_finds_the_job_that_an_earlier_version_started(state):
    request = shell("true", id=ID, env=(("A", "1"),))
    async with worker_on(state) as worker:
        await start_id(worker, request)
        await output(worker, ID)
    path = state / "jobs" / ID / "job.json"
    older = json.loads(path.read_bytes())
    del older["digest"]
    path.write_text(json.dumps({**older, "args": older.pop("args")}))
    async with worker_on(state) as worker:
        assert await start_id(worker, request) == ID
        for other in ({"env": (("A", "2"),)}, {"args": ("-c", "false")}):
            with pytest.raises(IdTakenError):
                await start_id(worker, dataclasses.replace(request, **other))


def of_variables(count, size):
    return pb.StartJobRequest(cmd="true", env={f"V{number}": "x" * size for number in range(count)}).SerializeToString()


def of_arguments(count):
    return pb.StartJobRequest(cmd="true", args=[""] * count).SerializeToString()


KERNEL = "too long for the kernel (128 KiB each, 2 MiB in all)"
TOO_LARGE = [  # the bytes of a request; the status and a part of the sentence
    (of_arguments(250_000), "INVALID_ARGUMENT", f"250000 arguments with the command are {KERNEL}"),
    (of_arguments(1_000_000), "INVALID_ARGUMENT", f"1000000 arguments with the command are {KERNEL}"),
    (of_arguments(2_090_000), "RESOURCE_EXHAUSTED", "larger than max"),
    (of_variables(4_097, 1), "INVALID_ARGUMENT", "4097 variables are too many for the environment of a job, which can be given 4096: write"),
    (of_variables(150_000, 0), "INVALID_ARGUMENT", "150000 variables are too many for the environment"),
    (of_variables(1, 1) + b"Z\0" * 1_000_000, "INVALID_ARGUMENT", "1000001 variables are too many for the environment"),
    (of_variables(17, 127_000), "INVALID_ARGUMENT", f"0 arguments and an environment of 17 variables with the command are {KERNEL}: write"),
    (of_variables(1_000, 1_000) + of_arguments(150_000), "INVALID_ARGUMENT", f"150000 arguments and an environment of 1000 variables with the command are {KERNEL}"),
    (of_variables(1, 140_000), "INVALID_ARGUMENT", f"the variable 'V0' of the environment is {KERNEL}: write it to a file"),
    (of_variables(17, 125_000), "INVALID_ARGUMENT", f"'true' with its 0 arguments and its environment of 17 variables is {KERNEL}: write"),
]  # fmt: skip


def test_more_arguments_and_variables_than_the_kernel_takes_are_refused_before_they_are_unpacked(state, certs):
    with serving(state, certs) as served, channel_to(served) as channel:
        start = channel.unary_unary(f"/{jobworker.SERVICE_NAME}/StartJob")
        for message, status, sentence in TOO_LARGE:
            before = (state / "jobs").stat().st_mtime_ns
            with pytest.raises(grpc.RpcError) as refused:
                start(message, timeout=PATIENCE)
            assert (refused.value.code().name, sentence in refused.value.details()) == (status, True), (
                refused.value.details()
            )
            job_was_made = (state / "jobs").stat().st_mtime_ns != before
            assert job_was_made == sentence.startswith(("the variable", "'true'")), sentence  # the kernel refused these


@pytest.mark.parametrize(("count", "size", "sentence"), [
    (4_097, 1, "4097 variables are too many for the environment of a job, which can be given 4096: write it to a file"),
    (30, 100_000, "with its arguments and its environment is larger than a server takes (2 MiB): write it to a file"),
], ids=["many", "long"])  # fmt: skip
def test_the_command_line_names_an_environment_that_is_too_long(shared, tmp_path, count, size, sentence):
    (tmp_path / "file").write_text("".join(f"V{number}={'x' * size}\n" for number in range(count)))
    one_sentence(shared.run("start", "--env-file", str(tmp_path / "file"), "true"), sentence)


def test_the_largest_number_of_variables_is_accepted(shared):
    env = {f"V{number}": "x" * 400 for number in range(jobworker.VARIABLES)}
    job = call(shared, "StartJob", pb.StartJobRequest(cmd="sh", args=["-c", "env | grep -c '^V[0-9]*=x'"], env=env)).ID
    assert call(shared, "GetOutputStream", pb.GetStreamRequest(id=job)) == b"%d\n" % len(env)


@pytest.mark.parametrize(
    ("words", "count"), [(["x"] * 200_000, 200_000), (["x" * 100_000] * 20, 20)], ids=["many", "long"]
)
def test_the_largest_number_of_arguments_that_the_kernel_allows_is_accepted(shared, words, count):
    job = call(shared, "StartJob", pb.StartJobRequest(cmd="sh", args=["-c", "echo $#", "sh", *words])).ID
    assert call(shared, "GetOutputStream", pb.GetStreamRequest(id=job)) == b"%d\n" % count


def anonymous_memory(served):
    return int(re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{served.process.pid}/status").read_text())[1]) << 10


def unread(served, method, message, count):
    """A connection with so many calls whose answers it does not take: its HTTP/2 window is 0."""
    connection = tls_to(served)
    connection.sendall(PREFACE[:24] + frame(4, 0, 0, struct.pack(">HI", 4, 0)))
    body = b"\0" + len(message).to_bytes(4, "big") + message
    for number in range(1, 2 * count, 2):
        connection.sendall(frame(1, 4, number, headers(f"/proto.WorkerService/{method}")) + frame(0, 1, number, body))
    return connection


def test_running_jobs_with_long_environments_cost_no_memory_of_the_server(state, certs):
    request = pb.StartJobRequest(cmd="sleep", args=["1000"], env=dict(LONG_ENV))
    with serving(state, certs) as served, channel_to(served) as channel:
        used = []
        for _ in range(2):  # the first jobs bring the memory of the starts themselves
            for _ in range(20):
                assert ask(channel, "GetJobStatus", pb.GetStatusRequest(id=ask(channel, "StartJob", request).ID))
            used.append(anonymous_memory(served))
        assert used[1] - used[0] < 16 * MIB  # their environments have 36 MB


@pytest.mark.parametrize(("method", "most"), [("GetJobStatus", 32 * MIB), ("GetOutputStream", 96 * MIB)])
def test_unread_answers_cost_bounded_memory(state, certs, method, most):
    with serving(state, certs) as served, contextlib.ExitStack() as stack:
        request = pb.StartJobRequest(
            cmd="sh", args=["-c", "head -c 3000000 /dev/zero; exec sleep 1000", *many_words(1_900_000)]
        )
        job = call(served, "StartJob", request).ID
        with open_streams(served, job, 1) as (stream,):
            next(stream)
            message = pb.GetStatusRequest(id=job).SerializeToString()
            before = anonymous_memory(served)
            with good_client(served) as answers:
                for _ in range(15):
                    stack.enter_context(unread(served, method, message, 100))
                asked = answers["OK"]
                until(lambda: answers["OK"] > asked + 200)
            assert set(answers) == {"OK"}
            assert anonymous_memory(served) - before < most


def test_starts_with_a_million_arguments_cost_bounded_memory(state, certs):
    request = b"\x0a\x04true" + b"\x12\x00" * 1_080_000  # StartJobRequest: cmd, args

    async def attack():
        pair = key_and_certificate(served.certs, "user")
        credentials = grpc.ssl_channel_credentials((served.certs / "server-ca.pem").read_bytes(), *pair)
        async with grpc.aio.secure_channel(served.address, credentials, compression=grpc.Compression.Gzip) as channel:
            start = channel.unary_unary("/proto.WorkerService/StartJob")
            calls = (start(request, timeout=PATIENCE) for _ in range(32))
            answers = await asyncio.gather(*calls, return_exceptions=True)
            return {(each.code().name, "too long for the kernel" in each.details()) for each in answers}

    def most_memory():
        return int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{served.process.pid}/status").read_text())[1]) << 10

    with serving(state, certs) as served, good_client(served) as answers:
        before = most_memory()
        assert asyncio.run(attack()) == {("INVALID_ARGUMENT", True)}
        assert most_memory() - before < 256 * MIB
    assert set(answers) == {"OK"}


# A caller need not send its whole request. What it costs meanwhile is bounded.


HALF_SENT_BYTES = 2_000_000


@contextlib.contextmanager
def half_sent(served, method, count):
    """A connection with so many calls, each with the length of its request and none of its bytes."""
    with tls_to(served) as connection:
        connection.sendall(PREFACE)
        for stream in range(1, 2 * count, 2):
            connection.sendall(frame(1, 4, stream, headers(f"/proto.WorkerService/{method}")))
            connection.sendall(frame(0, 0, stream, b"\0" + HALF_SENT_BYTES.to_bytes(4, "big")))
        yield connection


def frames_from(connection):
    """The frames that arrive: the kind, the flags, the stream and the content of each."""
    with connection.makefile("rb") as file:
        while head := file.read(9):
            content = file.read(int.from_bytes(head[:3], "big"))
            if head[3] in (4, 6) and not head[4] & 1:  # SETTINGS and PING want an answer
                connection.sendall(frame(head[3], 1, 0, content if head[3] == 6 else b""))
            yield head[3], head[4], struct.unpack(">I", head[5:])[0], content


def ended_calls(connection, count):
    """The trailing headers of the first so many calls that end."""
    ends = ((stream, content) for kind, flags, stream, content in frames_from(connection) if kind == 1 and flags & 1)
    return dict(itertools.islice(ends, count))


def send_what_is_taken(connection, count):
    """Send all but the last byte of each request, as far as the server takes them (RFC 9113, 5.2)."""
    windows = {0: 65535, **dict.fromkeys(range(1, 2 * count, 2), 65530)}
    left = dict.fromkeys(windows, HALF_SENT_BYTES - 1)
    initial, arrived, in_vain = 65535, frames_from(connection), 0
    while in_vain < 5:
        connection.sendall(frame(4, 0, 0, b""))  # its answer comes after what the server has said before
        for kind, flags, stream, content in arrived:
            if kind == 4 and flags & 1:
                break
            if kind == 4:
                pairs = dict(struct.iter_unpack(">HI", content))
                for each in set(windows) - {0}:
                    windows[each] += pairs.get(4, initial) - initial
                initial = pairs.get(4, initial)
            elif kind == 8 and stream in windows:
                windows[stream] += struct.unpack(">I", content)[0]
            elif kind == 3 or (kind == 1 and flags & 1):
                windows.pop(stream, None)
        in_vain += 1
        for stream in set(windows) - {0}:
            while (size := min(16384, windows[0], windows[stream], left[stream])) > 0:
                connection.sendall(frame(0, 0, stream, bytes(size)))
                for budget, key in ((windows, 0), (windows, stream), (left, stream)):
                    budget[key] -= size
                in_vain = 0


METHODS = [
    "StartJob", "StopJob", "GetJobStatus", "RemoveJob", "SignalJob", "ListJobs", "GetOutputStream", "SendInput",
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_calls_of_one_owner_are_refused_at_their_headers_and_others_are_served(state, certs, method):
    with serving(state, certs, "--owner-calls", "2") as served, half_sent(served, method, 5) as connection:
        ends = ended_calls(connection, 3)
        assert [b"--owner-calls" in trailers for trailers in ends.values()] == [True] * 3
        assert status_code(served, ID) == "RESOURCE_EXHAUSTED"
        assert call(served, "GetJobStatus", pb.GetStatusRequest(id=ID), role="admin")[0] == "NOT_FOUND"


def test_the_half_sent_requests_of_a_lost_client_do_not_count(state, certs):
    with serving(state, certs, "--owner-calls", "2") as served:
        with half_sent(served, "GetJobStatus", 3) as connection:
            ended_calls(connection, 1)
        until(lambda: status_code(served, ID) == "NOT_FOUND")


def test_a_revoked_caller_is_refused_at_the_headers(state, certs, tmp_path):
    folder = Path(shutil.copytree(certs, tmp_path / "certs"))
    run_in_folder(folder, "revoke", "user")
    with serving(state, folder) as served, half_sent(served, "StartJob", 5) as connection:
        assert all(b"is revoked" in trailers for trailers in ended_calls(connection, 5).values())


@pytest.mark.parametrize("method", ["StartJob", "GetOutputStream", "SendInput"])
def test_half_sent_requests_cost_bounded_memory(state, certs, method):
    with serving(state, certs, "--owner-calls", "8") as served, half_sent(served, method, 100) as connection:
        before = anonymous_memory(served)
        with contextlib.suppress(ssl.SSLEOFError, ConnectionError):  # in one of 100 runs gRPC closes the connection
            send_what_is_taken(connection, 100)
        assert anonymous_memory(served) - before < 64 * MIB


@pytest.mark.parametrize("method", ["StartJob", "ListJobs", "SendInput"])
def test_a_half_sent_request_ends_with_one_sentence(state, certs, tmp_path, method):
    with (
        serving_older(state, certs, tmp_path, (r"REQUEST_SECONDS = 10.0", "REQUEST_SECONDS = 0.3")) as served,
        half_sent(served, method, 1) as connection,
    ):
        assert b"the request did not arrive within 0.3 seconds" in ended_calls(connection, 1)[1]


@pytest.mark.parametrize("method", METHODS)
def test_a_call_without_a_request_is_refused(shared, method):
    with channel_to(shared) as channel, pytest.raises(grpc.RpcError) as refused:
        list(channel.stream_stream(f"/proto.WorkerService/{method}")(iter(()), timeout=PATIENCE))
    assert (refused.value.code().name, refused.value.details()) == ("INVALID_ARGUMENT", "the call has no request")


@contextlib.contextmanager
def no_descriptors():
    """No new descriptor while the block runs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def line_in_log(capfd, words, log):
    """Wait until this process has said something on its standard error."""
    while words not in log[0]:
        await asyncio.sleep(0.01)
        log[0] += capfd.readouterr().err


@pytest.mark.parametrize("lost", [False, True], ids=["ended", "lost"])
@in_loop
async def test_a_job_s_end_without_a_free_descriptor_is_seen_when_one_is_free(state, capfd, lost):
    log = [""]
    async with worker_on(state) as worker:
        job = await start_id(worker, shell("echo $PPID; exec sleep 1000"))
        shim = int(await wait_for_output(worker, job, b"\n"))
        stream = asyncio.create_task(output(worker, job))
        await asyncio.sleep(0)
        control = os.open(worker.job(job).folder.path + "/control", os.O_WRONLY)
        with no_descriptors():
            if lost:
                os.kill(shim, signal.SIGKILL)
            else:
                os.write(control, b"kill alice\n")
            await line_in_log(capfd, "trying again", log)
            with pytest.raises(ExhaustedError):
                await worker.stop(worker.job(job))
        os.close(control)
        assert await stream == b"%d\n" % shim
        assert ending(worker, job) == (("FINISHED", 255, "LOST") if lost else ("STOPPED", 137, ""))
    assert "Traceback" not in log[0] + capfd.readouterr().err


@in_loop
async def test_a_start_without_a_free_descriptor_is_refused_and_leaves_nothing(state, capfd):
    async with worker_on(state) as worker:
        await result(worker, shell("true"))
        before = left_in(state)
        with no_descriptors(), pytest.raises(ExhaustedError, match="Too many open files"):
            await start_id(worker, shell("true", id=ID))
        while left_in(state) != before:  # the folder is deleted as soon as a descriptor is free
            await asyncio.sleep(0.01)
        assert (await result(worker, shell("exit 3", id=ID)))[1].exit_code == 3
    assert capfd.readouterr().err.count("is not wholly removed") == 1


@in_loop
async def test_a_launcher_that_cannot_be_started_without_a_free_descriptor_is_an_error_of_this_module(state):
    async with worker_on(state) as worker:
        job = worker.job(await start_id(worker, shell("true")))
        await worker.wait(job)
        os.kill(worker._launcher.process, signal.SIGKILL)
        assert not survivors([worker._launcher.process])
        with no_descriptors(), pytest.raises(ExhaustedError, match="a socket for the launcher: Too many open files"):
            worker._launcher.send("start", job.folder, b"", [])
        assert (await result(worker, shell("exit 3")))[1].exit_code == 3  # it is started when one is free


def send_many(job, request):
    for _ in range(20_000):
        job.folder.send_request(request)


@pytest.mark.parametrize("request_", [
    jobworker.SignalRequest(signal.SIGWINCH), jobworker.StopRequest("", "alice", signal.SIGWINCH, 86400),
], ids=["signals", "stops with a grace"])  # fmt: skip
@in_loop
async def test_a_stop_is_not_lost_behind_requests_that_a_stopped_shim_does_not_read(state, request_):
    async with worker_on(state) as worker:
        job = worker.job(await start_id(worker, shell("echo $PPID; exec sleep 1000")))
        shim = int(await wait_for_output(worker, job.id, b"\n"))
        os.kill(shim, signal.SIGSTOP)
        try:
            with pytest.raises(ExhaustedError, match=f"^job {job.id} has not carried out its earlier requests"):
                send_many(job, request_)
            stop = asyncio.create_task(worker.stop(job, by="alice"))
            await asyncio.sleep(0)
        finally:
            os.kill(shim, signal.SIGCONT)
        await stop
        assert ending(worker, job.id)[:2] == ("STOPPED", 137)


@in_loop
async def test_a_stop_kills_a_job_whose_shim_is_stopped_and_wakes_the_shim(state, monkeypatch):
    monkeypatch.setattr(jobworker, "LATE_SECONDS", 0.1)
    async with worker_on(state) as worker:
        job = worker.job(await start_id(worker, shell("echo $PPID; exec sleep 1000")))
        os.kill(int(await wait_for_output(worker, job.id, b"\n")), signal.SIGSTOP)
        await worker.stop(job, by="alice")
        assert (ending(worker, job.id)[0], worker.status(job).stopped_by) == ("STOPPED", "alice")


def counted(monkeypatch, owner, name, counts):
    """Count the calls of a method in `counts[name]`."""
    method = getattr(owner, name)

    def counting(*arguments):
        counts[name] += 1
        return method(*arguments)

    monkeypatch.setattr(owner, name, counting)


@in_loop
async def test_all_stops_of_a_job_whose_shim_is_stopped_share_one_search_for_the_shim(state, monkeypatch):
    counts = collections.Counter()
    monkeypatch.setattr(jobworker, "LATE_SECONDS", 0.1)
    counted(monkeypatch, jobworker.JobFolder, "wake_shim", counts)
    async with worker_on(state) as worker:
        job = worker.job(await start_id(worker, shell("echo $PPID; exec sleep 1000")))
        os.kill(int(await wait_for_output(worker, job.id, b"\n")), signal.SIGSTOP)
        await asyncio.gather(*(worker.stop(job, by="alice") for _ in range(16)))
        assert (ending(worker, job.id)[0], counts["wake_shim"]) == ("STOPPED", 1)


@pytest.mark.parametrize("search", ["wake_shim", "kill_members"])
@in_loop
async def test_a_search_of_all_processes_lets_other_tasks_run_after_each_turn(state, monkeypatch, search):
    monkeypatch.setattr(jobworker, "PART_SECONDS", 0.0)  # a turn of one process
    processes = len(list(filter(str.isdigit, os.listdir("/proc"))))
    turns = 0
    async with worker_on(state) as worker:
        job = worker.job(await start_id(worker, shell(WAITS)))
        steps = job.folder.wake_shim() if search == "wake_shim" else jobworker.ProcessTree("no job").kill_members()
        task = asyncio.create_task(worker._search(job, steps))
        while not task.done():
            turns += 1
            await asyncio.sleep(0)
        await worker.stop(job)
    assert turns > processes / 2  # other tests' processes may end meanwhile


@in_loop
async def test_a_stop_of_a_job_that_has_ended_but_for_its_files_says_so_and_searches_no_process(
    state, monkeypatch, tmp_path
):
    gate, counts = tmp_path / "gate", collections.Counter()
    os.mkfifo(gate)
    slow = altered_copy(tmp_path, "reason = ending.reason or (rest", f"os.close(os.open({str(gate)!r}, os.O_RDONLY))")
    monkeypatch.setattr(slow, "LATE_SECONDS", 0.1)
    monkeypatch.setattr(slow, "STOP_SECONDS", 0.1)
    counted(monkeypatch, slow.JobFolder, "wake_shim", counts)
    async with worker_on(state, slow) as worker:
        job = await worker.start(slow.JobRequest("sleep", ("1000",), owner="alice"))
        with pytest.raises(slow.StillRunningError) as refused:
            await worker.stop(job, by="alice")
        await asyncio.to_thread(gate.write_text, "")
        await worker.wait(job)
    assert str(refused.value) == (
        f"job {job.id} has ended, but its files are still being written or deleted; its status tells when that is done"
    )
    assert counts["wake_shim"] == 0


@pytest.mark.parametrize("options", [{}, {"through": ("env",), "grace": 0.1}], ids=["", "through"])
@pytest.mark.parametrize("restart", [False, True], ids=["", "restart"])
@in_loop
async def test_a_job_whose_shim_is_stopped_is_killed_after_its_timeout(state, monkeypatch, options, restart):
    monkeypatch.setattr(jobworker, "LATE_SECONDS", 0.1)
    monkeypatch.setattr(jobworker, "END_SECONDS", 0.1)
    async with contextlib.AsyncExitStack() as stack:
        worker = await stack.enter_async_context(worker_on(state, **options))
        job = await start_id(worker, shell("echo $PPID; exec sleep 1000", timeout=0.5))
        os.kill(int(await wait_for_output(worker, job, b"\n")), signal.SIGSTOP)
        if restart:
            await stack.aclose()
            worker = await stack.enter_async_context(worker_on(state, **options))
        await worker.wait(worker.job(job))
        assert ending(worker, job) == ("STOPPED", 137, "TIMEOUT")


@in_loop
async def test_a_job_that_stops_its_shim_before_its_start_is_recorded_is_killed_after_its_timeout(
    state, monkeypatch, tmp_path
):
    stopping = altered_copy(tmp_path, 'write_event(self._events, "started"', "os.kill(os.getpid(), signal.SIGSTOP)")
    monkeypatch.setattr(stopping, "LATE_SECONDS", 0.1)
    async with worker_on(state, stopping) as worker:
        job = await worker.start(stopping.JobRequest("sleep", ("1000",), owner="alice", timeout=0.1))
        await worker.wait(job)
        assert ending(worker, job.id) == ("STOPPED", 137, "TIMEOUT")


@pytest.mark.parametrize("separate", [pytest.param(True, marks=as_root), False], ids=["root", "user"])
@pytest.mark.parametrize(
    ("timeout", "expected"), [(None, "STOPPED 137 alice"), (0.5, "STOPPED 137 TIMEOUT")], ids=["stop", "timeout"]
)
def test_without_cgroups_a_job_whose_shim_is_stopped_is_killed_too(state, separate, timeout, expected):
    """As root the job has a uid of its own. A user's server and its jobs have one uid."""
    body = f"""
        jobworker.LATE_SECONDS = 0.1
        other = await start_id(worker, JobRequest("sleep", ("1000",), owner="alice"))
        script = "(trap '' TERM; sleep 1000) & echo $PPID; exec sleep 1000"
        job = worker.job(await start_id(worker, JobRequest("sh", ("-c", script), owner="alice", timeout={timeout})))
        async for chunk in worker.stream(job):
            os.kill(int(chunk), signal.SIGSTOP)
            await (worker.wait(job) if {timeout} else worker.stop(job, by="alice"))
        ending = worker.status(job).ending
        print(ending.status, ending.code, ending.reason or ending.by)
        print("members", worker.status(job).spec.processes().members(), worker.status(worker.job(other)).status)
        await worker.stop_all()
    """
    user = os.geteuid() or 65534
    identity = {"user": user, "group": user, "extra_groups": ()} if os.geteuid() == 0 and not separate else {}
    os.chown(state, -1 if separate else user, -1)
    wrapper = NO_CGROUP if separate else ()
    printed = in_server(state, body, wrapper=wrapper, interpreter=PYTHON, **identity)
    assert printed.splitlines()[-2:] == [expected, "members [] RUNNING"]


@contextlib.contextmanager
def kept_from_its_end(process):
    """While the block runs, this process cannot end wholly: its tracer (ptrace(2)) does not take its status."""
    jobworker.libc_call("ptrace", 0x4206, process, None, None)  # PTRACE_SEIZE
    try:
        yield
    finally:
        os.waitpid(process, 0)


def test_a_stop_of_a_job_that_cannot_die_says_so_at_once_and_is_not_repeated(state, certs, tmp_path):
    changes = [(rf"\n{name}_SECONDS = [0-9.]+ ", f"\n{name}_SECONDS = 0.1 ") for name in ("LATE", "STOP")]
    with serving_older(state, certs, tmp_path, *changes) as served:
        job = served.start("--", "sh", "-c", "echo $$; exec sleep 1000")
        with kept_from_its_end(int(first_line(served, job))):
            one_sentence(served.run("stop", job), f"job {job} was killed but has not ended within", "disk")
        assert status_at_end(served, job).status == pb.STOPPED


BLOCKS_ITS_SHIM = """
import ctypes, os, socket, threading, time
print(os.getppid(), os.getpid(), flush=True)
open("gate").read()
silent, other = socket.socketpair()
words = (ctypes.c_int(silent.fileno()), None, ctypes.c_int(1), None, ctypes.c_size_t(4096), ctypes.c_uint(0))
os.write(1, b"x")
threading.Thread(target=ctypes.CDLL(None).splice, args=words).start()
while True:
    os.write(1, b"x")
    time.sleep(0.001)
"""


@pytest.mark.tree
@in_loop
async def test_a_job_that_blocks_its_shim_in_the_kernel_is_killed_after_its_timeout(state, monkeypatch):
    def waits_in_kernel(process):
        return "State:\tD" in Path(f"/proc/{process}/status").read_text()

    if CgroupMount.find() is None:
        pytest.skip("needs a cgroup2 mount")
    monkeypatch.setattr(jobworker, "LATE_SECONDS", 0.1)
    async with worker_on(state) as worker:
        job = await start_id(worker, python("import os; os.mkfifo('gate')\n" + BLOCKS_ITS_SHIM, timeout=2.0))
        shim, process = map(int, (await wait_for_output(worker, job, b"\n")).split())
        os.kill(shim, signal.SIGSTOP)  # so that the pipe has output when the job takes its mutex
        try:
            Path(worker.status(worker.job(job)).spec.home, "gate").write_text("go\n")
            until(lambda: waits_in_kernel(process))
        finally:
            os.kill(shim, signal.SIGCONT)
        until(lambda: waits_in_kernel(shim))
        try:
            assert not await asyncio.to_thread(survivors, [process])
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        await worker.wait(worker.job(job))
        assert ending(worker, job) == ("STOPPED", 137, "TIMEOUT")


def test_silent_connections_prevent_no_job_s_end_and_no_stream(state, certs, tmp_path):
    files = 128

    def few_files():
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    log = tmp_path / "log"
    with log.open("w") as errors, serving(state, certs, preexec_fn=few_files, stderr=errors) as served:
        jobs = [served.start("--", "sh", "-c", "echo $$; exec sleep 1000") for _ in range(4)]
        processes = [int(first_line(served, job)) for job in jobs]
        with channel_to(served) as channel, contextlib.ExitStack() as stack:
            stream = channel.unary_stream("/proto.WorkerService/GetOutputStream")
            chunks = stream(pb.GetStreamRequest(id=jobs[0]).SerializeToString())
            next(chunks)
            for _ in range(2 * files):
                stack.enter_context(socket.create_connection(("localhost", served.port)))
            until(lambda: len(os.listdir(f"/proc/{served.process.pid}/fd")) >= files * 3 // 4)
            starts = [ask(channel, "StartJob", pb.StartJobRequest(cmd="true")) for _ in range(20)]
            assert [start for start in starts if isinstance(start, tuple)] == []
            for process in processes:
                os.kill(process, signal.SIGTERM)
            assert list(chunks) == []
            for job in jobs:
                until(lambda: ask(channel, "GetJobStatus", pb.GetStatusRequest(id=job)).exitcode == 143)  # noqa: B023
            assert ask(channel, "StartJob", pb.StartJobRequest(cmd="true")).ID
    assert "Traceback" not in log.read_text()
    assert f"may open {files} descriptors" in log.read_text()


def test_many_followers_of_a_fast_job_do_not_delay_other_calls(shared):
    """The good client is answered far more often than the followers are woken."""
    ticks = "import os, time\nwhile True:\n  time.sleep(0.003)\n  os.write(1, b'%020d\\n' % time.monotonic_ns())"
    job = call(shared, "StartJob", pb.StartJobRequest(cmd=PYTHON, args=["-c", ticks])).ID
    received = collections.Counter()

    async def follow(channel, number):
        chunks = channel.unary_stream("/proto.WorkerService/GetOutputStream")
        async for _ in chunks(pb.GetStreamRequest(id=job).SerializeToString()):
            received[number] += 1

    async def everybody(answers):
        pair = key_and_certificate(shared.certs, "user")
        credentials = grpc.ssl_channel_credentials((shared.certs / "server-ca.pem").read_bytes(), *pair)
        async with contextlib.AsyncExitStack() as stack:
            channels = [
                await stack.enter_async_context(grpc.aio.secure_channel(shared.address, credentials, DEFAULT_CHANNEL))
                for _ in range(6)
            ]
            tasks = [asyncio.create_task(follow(channels[number % 6], number)) for number in range(450)]
            while len(received) < len(tasks):
                await asyncio.sleep(0.05)
            before, asked = received.total(), answers["OK"]
            while received.total() < before + 5 * len(tasks):
                await asyncio.sleep(0.05)
            woken = (received.total() - before) / len(tasks)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            return (answers["OK"] - asked) / woken

    with good_client(shared) as answers:
        answered = asyncio.run(everybody(answers))
    assert set(answers) == {"OK"}
    assert answered > 3
    call(shared, "StopJob", pb.StopJobRequest(id=job))


def test_an_owner_may_run_at_most_owner_jobs_and_an_admin_can_always_start_a_job(state, certs):
    with serving(state, certs, "--max-jobs", "2", "--owner-jobs", "1") as served:
        waits = pb.StartJobRequest(cmd="sleep", args=["1000"])
        assert call(served, "StartJob", waits).ID
        status, sentence = call(served, "StartJob", waits)
        assert (status, "1 jobs of 'user' are running" in sentence) == ("RESOURCE_EXHAUSTED", True)
        assert call(served, "StartJob", waits, role="user2").ID
        assert [bool(call(served, "StartJob", waits, role="admin").ID) for _ in range(3)] == [True] * 3


@pytest.mark.parametrize("io", [1, 20_000, MIB - 1])
def test_a_rate_at_which_a_stop_would_take_minutes_is_refused(shared, state, certs, io):
    status, sentence = call(shared, "StartJob", pb.StartJobRequest(cmd="true", io=io))
    assert (status, "at least" in sentence) == ("INVALID_ARGUMENT", True)
    for option in ("--io", "--max-io"):
        one_sentence(shared.run("serve", "--state", str(state), option, str(io)), option, "at least 1M", status=2)


@in_loop
async def test_the_main_user_of_a_full_disk_is_stopped_and_refused_and_others_go_on(small_disk):
    disk = os.statvfs(small_disk)
    share = (free_bytes(small_disk) - 6 * MIB) / (disk.f_blocks * disk.f_frsize)
    if os.geteuid() != 0:
        pytest.skip("needs root, for owners with homes of their own")
    async with worker_on(small_disk, reserve=share) as worker:
        other = await start_id(worker, shell("echo ready; exec sleep 1000", owner="bob"))
        glutton = await start_id(worker, shell("head -c 8000000 /dev/zero >file; exec sleep 1000"))
        await output(worker, glutton)
        assert ending(worker, glutton) == ("STOPPED", 137, "DISK_FULL")
        assert ending(worker, other)[0] == "RUNNING"
        with pytest.raises(ExhaustedError, match="most of it is used by this owner"):
            await start_id(worker, shell("true"))
        assert (await result(worker, shell("exit 3", owner="bob")))[1].exit_code == 3
        await worker.stop(worker.job(other))


@in_loop
async def test_a_main_user_of_the_disk_without_jobs_is_refused_and_others_end_below_half_of_the_reserve(
    small_disk, capsys
):
    disk = os.statvfs(small_disk)
    share = (free_bytes(small_disk) - 5 * MIB) / (disk.f_blocks * disk.f_frsize)
    half = share * disk.f_blocks * disk.f_frsize / 2
    async with worker_on(small_disk, reserve=share) as worker:
        other = worker.job(await start_id(worker, shell("echo >file; exec sleep 1000", owner="bob")))
        _, glutton = await result(worker, shell("head -c 6000000 /dev/zero >file"))
        await worker._free_disk(os.statvfs(small_disk))
        assert not other.ended
        with pytest.raises(ExhaustedError, match="most of it is used by this owner"):
            await start_id(worker, shell("true"))
        assert (await result(worker, shell("exit 3", owner="bob")))[1].exit_code == 3
        assert "'bob'" not in capsys.readouterr().err
        with open(f"{glutton.spec.home}/more", "wb") as file:
            file.write(bytes(int(free_bytes(small_disk) - half) + MIB))
        await worker._free_disk(os.statvfs(small_disk))
        assert ending(worker, other.id) == ("STOPPED", 137, "DISK_FULL")
        log = capsys.readouterr().err
        assert "'bob' uses most of it among the owners of running jobs: ending 1 job\n" in log


@as_root
@in_loop
async def test_the_owner_of_most_files_is_stopped_and_refused_when_the_inodes_run_out_and_others_go_on(nothing_is_left):
    with mounted("few files") as point:
        async with worker_on(new_state(nothing_is_left, point), reserve=0.2) as worker:
            # bob has more bytes
            other = await start_id(worker, shell("head -c 1000000 /dev/zero >file; exec sleep 1000", owner="bob"))
            glutton = await start_id(
                worker, python("for n in range(3300): open(str(n), 'w').close()\nimport time; time.sleep(1000)")
            )
            await output(worker, glutton)
            assert ending(worker, glutton) == ("STOPPED", 137, "DISK_FULL")
            assert ending(worker, other)[0] == "RUNNING"
            with pytest.raises(
                ExhaustedError, match=r"few inodes left, and most of it is used by this owner: \d+ of 4000"
            ):
                await start_id(worker, shell("true"))
            assert (await result(worker, shell("exit 3", owner="bob")))[1].exit_code == 3
            await worker.stop(worker.job(other))
        shutil.rmtree(nothing_is_left[-1])


@in_loop
async def test_an_owner_with_files_below_a_path_that_is_too_long_counts_as_the_main_user(tmp_path):
    (tmp_path / "seen").write_bytes(bytes(100_000))
    assert 100_000 <= await jobworker.measured(str(tmp_path), files=False) < MIB
    assert await jobworker.measured(str(tmp_path), files=True) == 1
    here, name = os.open(tmp_path, os.O_RDONLY), "x" * 250
    for _ in range(20):
        os.mkdir(name, dir_fd=here)
        below = os.open(name, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    assert await jobworker.measured(str(tmp_path), files=False) == float("inf")


@pytest.mark.parametrize("listens", ["", "s.listen();"], ids=["bound", "listening"])
def test_a_job_that_holds_the_server_s_port_is_stopped_when_the_server_starts(state, certs, tmp_path, listens):
    holds = (
        f"import socket, time; s = socket.socket(); s.bind(('127.0.0.1', 0)); {listens} "
        "print(s.getsockname()[1], flush=True); time.sleep(1000)"
    )
    with serving(state, certs, end=signal.SIGKILL) as served:
        job = served.start("--", PYTHON, "-c", holds)
        port = int(first_line(served, job))
        bystander = served.start("--", "sleep", "1000")
    log = tmp_path / "log"
    with log.open("w") as errors, serving(state, certs, port=port, stderr=errors) as served:
        status = call(served, "GetJobStatus", pb.GetStatusRequest(id=job))
        assert (status.status, status.stopped_by) == (pb.STOPPED, "serve")
        assert call(served, "GetJobStatus", pb.GetStatusRequest(id=bystander)).status == pb.RUNNING
    assert f"stopped job {job}: it held the port {port}" in log.read_text()


@pytest.mark.controllers
@in_loop
async def test_the_kernel_holds_an_owner_s_total_limits(state):
    total = jobworker.OwnerLimits(cpu=0.5, memory=64 * MIB, pids=20)
    async with worker_on(state, owner=total) as worker:
        job = await start_id(worker, shell(WAITS))
        owner = Path(worker.job(job).spec.cgroup).parent
        read = {
            name: (owner / name).read_text().strip() for name in ("cpu.max", "cpu.weight", "memory.max", "pids.max")
        }
        assert read == {"cpu.max": "50000 100000", "cpu.weight": "100", "memory.max": str(64 * MIB), "pids.max": "20"}
        hogs = [
            await start_id(worker, python("x = bytearray(48 << 20); import time; time.sleep(1000)")) for _ in range(2)
        ]
        done, _ = await asyncio.wait(
            [asyncio.create_task(output(worker, hog)) for hog in hogs], return_when=asyncio.FIRST_COMPLETED
        )
        assert done
        assert ("STOPPED", 137, "OOM") in [ending(worker, hog) for hog in hogs]
        await worker.stop_all()


@pytest.mark.controllers
@in_loop
async def test_an_owner_s_total_limits_are_those_of_the_server_that_starts_the_job(state):
    async with worker_on(state, owner=jobworker.OwnerLimits(pids=20)) as worker:
        owner = Path(worker.job(await start_id(worker, shell(WAITS))).spec.cgroup).parent
    async with worker_on(state, owner=jobworker.OwnerLimits(pids=30)) as worker:
        assert (owner / "pids.max").read_text() == "20\n"
        await result(worker, shell("true"))
        assert (owner / "pids.max").read_text() == "30\n"
        await worker.stop_all()
        owner.rmdir()  # by a person
        await result(worker, shell("true"))
        assert (owner / "pids.max").read_text() == "30\n"


@pytest.mark.controllers
@in_loop
async def test_an_owner_s_totals_that_could_not_be_written_once_are_written_by_the_next_start(state):
    async with worker_on(state, owner=jobworker.OwnerLimits(pids=20)) as worker:
        job = worker.job(await start_id(worker, shell("true")))
        owner = Path(job.spec.cgroup).parent
        await worker.wait(job)
        owner.rmdir()  # by a person
        tree, worker._tree = worker._tree, dataclasses.replace(worker._tree, owner=jobworker.OwnerLimits(pids=-2))
        with pytest.raises(JobWorkerError, match="cannot write '-2'"):
            await start_id(worker, shell("true"))
        worker._tree = tree
        await result(worker, shell("true"))
        assert (owner / "pids.max").read_text() == "20\n"


@as_root
@pytest.mark.tree
@in_loop
async def test_the_group_of_each_new_job_can_pass_through_its_owner_s_cgroup(state):
    async with worker_on(state) as worker:
        if worker._tree.root is None:
            pytest.skip("needs a cgroup2 mount")
        for gid in (65533, 65534, 65533):
            path = worker._tree.job_path(7, "a-job")
            job = worker._tree.make_job(path, jobworker.Limits(), gid)
            facts = os.stat(os.path.dirname(path))
            assert (facts.st_gid, stat.S_IMODE(facts.st_mode)) == (gid, 0o710)
            job.remove()


@pytest.mark.controllers
@in_loop
async def test_a_stop_lifts_the_job_s_io_limit_before_the_kill(state):
    written = []
    with contextlib.closing(jobworker.Inotify(lambda: None)) as inotify:
        inotify.open()
        async with worker_on(state) as worker:
            job = worker.job(await start_id(worker, shell("head -c 4M /dev/zero >file; " + WAITS, io=MIB)))
            await wait_for_output(worker, job.id, b"ready")
            cgroup = job.spec.cgroup
            assert read_limits(cgroup)["io.max"] == io_limit_text(MIB)
            for file in ("io.max", "cgroup.kill"):
                note = functools.partial(lambda file, _mask: written.append(file), file)
                inotify.watch(f"{cgroup}/{file}", jobworker.IN_MODIFY, note)
            await worker.stop(job)
            inotify._dispatch()
    assert written[: written.index("cgroup.kill")] == ["io.max"] * len(jobworker.whole_disks())


# It uses one CPU wholly from SIGUSR1 on. After SIGUSR2 it uses one more second, says so, and goes on.
USES_ONE_CPU = """
import os, signal, time
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
signal.signal(signal.SIGUSR2, lambda *_: ends.append(time.process_time() + 1))
ends = []
os.write(1, b"ready")
signal.sigwait([signal.SIGUSR1])
os.write(1, b"begun")
while not ends or time.process_time() < ends[0]:
    pass
os.write(1, b"done")
while True:
    pass
"""


@pytest.mark.controllers
@in_loop
async def test_an_owner_with_eight_busy_jobs_gets_no_more_cpu_than_an_owner_with_one(state):
    async with worker_on(state) as worker:
        jobs = [
            worker.job(await start_id(worker, python(USES_ONE_CPU, owner=owner))) for owner in ["alice"] * 8 + ["bob"]
        ]
        for job in jobs:
            await wait_for_output(worker, job.id, b"ready")
        for job in jobs:
            worker.signal(job, signal.SIGUSR1)
        for job in jobs:
            await wait_for_output(worker, job.id, b"begun")
        owners = [Cgroup(os.path.dirname(job.spec.cgroup)) for job in (jobs[0], jobs[-1])]
        before = [owner.usage().cpu_seconds for owner in owners]
        worker.signal(jobs[-1], signal.SIGUSR2)
        await wait_for_output(worker, jobs[-1].id, b"done")
        alice, bob = (owner.usage().cpu_seconds - seconds for owner, seconds in zip(owners, before, strict=True))
        await worker.stop_all()
    assert 1 / 2 < alice / bob < 2


@pytest.mark.controllers
@in_loop
async def test_an_owner_s_fork_bomb_ends_at_the_owner_s_total_and_others_start_and_fork(state, mark):
    bomb = "import os, signal\nwhile True:\n  try: os.fork()\n  except OSError: os.write(1, b'full'), signal.pause()"
    async with worker_on(state, owner=jobworker.OwnerLimits(pids=40)) as worker:
        job = worker.job(await start_id(worker, python(bomb, mark)))
        await wait_for_output(worker, job.id, b"full")
        owner = os.path.dirname(job.spec.cgroup)
        assert int(jobworker.kernel_read(f"{owner}/pids.current")) == 40 < job.spec.limits.pids
        assert (await result(worker, shell("echo $(echo $(echo forked))", owner="bob")))[0] == b"forked\n"
        await worker.stop(job)
        assert ending(worker, job.id) == ("STOPPED", 137, "")
        assert not processes_with(mark)
        reap(children())  # the orphans of the job: the kernel counts a process until its parent has taken its status
        assert (await result(worker, shell("echo $(echo forked)")))[0] == b"forked\n"


@pytest.mark.parametrize("clone3", [True, False], ids=["clone3", "without-clone3"])
@pytest.mark.controllers
@in_loop
async def test_a_start_beyond_an_owner_s_total_of_processes_is_refused_and_others_start(state, tmp_path, clone3):
    without = functools.partial(altered_copy, tmp_path, "PR_SET_CHILD_SUBREAPER = 36", "SYS_CLONE3 = 1 << 20")
    module = jobworker if clone3 else without()
    request = module.JobRequest("sleep", ("1000",), owner="alice")
    async with worker_on(state, module, owner=module.OwnerLimits(pids=10)) as worker:
        jobs = [await worker.start(request) for _ in range(10)]
        owner = os.path.dirname(jobs[0].spec.cgroup)
        refused = await asyncio.gather(*(worker.start(request) for _ in range(15)), return_exceptions=True)
        assert jobworker.kernel_read(f"{owner}/pids.current") == "10\n"
        for error in refused:
            assert isinstance(error, module.ExhaustedError), error
            assert re.search("owner 'alice', .* has as many .* as it may; .*`serve --owner-pids`", str(error))
        assert worker.running == 10
        await worker.start(dataclasses.replace(request, owner="bob"))
        await worker.stop(jobs[0])
        await worker.start(request)
        await worker.stop_all()


def test_a_start_without_a_free_process_number_says_so(state):
    body = """
        import resource
        launcher, (soft, hard) = worker._launcher.process, resource.getrlimit(resource.RLIMIT_NPROC)
        resource.prlimit(launcher, resource.RLIMIT_NPROC, (1, hard))
        try:
            await start_id(worker, JobRequest("true", owner="alice"))
        except JobWorkerError as error:
            print(type(error).__name__, error)
        resource.prlimit(launcher, resource.RLIMIT_NPROC, (soft, hard))
        print(await output(await start_id(worker, JobRequest("echo", ("hello",), owner="alice"))), launcher)
        print(worker._launcher.process, worker.running, len(worker.jobs()))
    """
    user = os.geteuid() or 65534
    os.chown(state, user, -1)
    identity = {"user": user, "group": user, "extra_groups": ()} if os.geteuid() == 0 else {}
    printed = in_server(state, body, interpreter=PYTHON, **identity).splitlines()
    assert re.fullmatch(
        "ExhaustedError no process number is free for the job: .* has as many .* as it may; .*", printed[0]
    )
    assert printed[1].startswith("b'hello\\n' ")
    assert printed[2] == f"{printed[1].split()[-1]} 0 1"


@as_root
def test_an_owner_s_share_of_process_numbers_is_of_the_kernel_s_lower_bound(tmp_path):
    """systemd raises pid_max to 4,194,304. threads-max follows from the memory, and is far lower."""
    (tmp_path / "pid_max").write_text("4194304\n")
    program = "import jobworker; print(jobworker.worker_options(jobworker.make_parser(['serve'])[0].parse_args(['serve'])).owner.pids)"
    script = f'mount --bind {tmp_path}/pid_max /proc/sys/kernel/pid_max && exec "$@"'
    printed = subprocess.check_output(
        ["unshare", "-m", "sh", "-c", script, "sh", sys.executable, "-c", program], cwd=HERE, text=True
    )
    assert int(printed) == int(Path("/proc/sys/kernel/threads-max").read_text()) // 4


# --- Server ---------------------------------------------------------------------------------------------
# A server that ends, starts again, or finds another server on its port; and what clients cost it.


def read_descriptors(served, folder, read):
    """The result of `read` for each entry of `/proc/PID/fd` or `fdinfo`. A descriptor may close meanwhile."""
    found = []
    for path in Path(f"/proc/{served.process.pid}/{folder}").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(read(path))
    return found


def fds_of(served):
    return sorted(read_descriptors(served, "fd", os.readlink))


def watches_of(served):
    """The number of inotify watches on a server's jobs (proc_pid_fdinfo(5)), without the one on its certificates."""
    return sum(text.count("inotify wd:") for text in read_descriptors(served, "fdinfo", Path.read_text)) - 1


def until(reached):
    """Wait for a state of another process that no event reports."""
    deadline = time.monotonic() + PATIENCE
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def status_at_end(served, job):
    """Wait until a job has ended and return its status."""
    call(served, "GetOutputStream", pb.GetStreamRequest(id=job))
    return call(served, "GetJobStatus", pb.GetStatusRequest(id=job))


def test_certificates_identities_and_jobs_survive_a_restart(state, certs):
    with serving(state, certs) as served:
        ended = served.start("--", "sh", "-c", "echo kept; exit 5")
        assert status_at_end(served, ended).exitcode == 5
    with serving(state, certs) as served:
        assert call(served, "GetOutputStream", pb.GetStreamRequest(id=ended)) == b"kept\n"
        assert call(served, "GetJobStatus", pb.GetStatusRequest(id=ended)).exitcode == 5
        assert call(served, "GetJobStatus", pb.GetStatusRequest(id=ended), role="user2")[0] == "NOT_FOUND"


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_stream_continues_at_its_byte_when_the_next_server_runs(state, certs, port, end):
    """The job goes on without a server: a Ctrl-C at `serve` does not reach it."""
    first = spawn(state, certs, port)
    assert port_of(first.stdout.readline()) == port
    served = Served(first, port, certs)
    job = served.start("--", "sh", "-c", "mkfifo gate; echo before; read line <gate; echo after; exit 6")
    with served.popen("stream", job, stderr=subprocess.DEVNULL) as stream:
        assert stream.stdout.readline() == b"before\n"
        os.kill(first.pid, end)
        assert first.wait(PATIENCE) == (-9 if end == signal.SIGKILL else 0)
        first.stdout.close()
        with serving(state, certs, port=port) as served:
            home = next((state / "home").iterdir()) if os.geteuid() == 0 else Path.home()
            (home / "gate").write_text("go\n")
            assert stream.stdout.read() == b"after\n"
            assert stream.wait(PATIENCE) == 0
            assert status_at_end(served, job).exitcode == 6


RECORDS_IMPORTS = """
import sys
sys.path.insert(0, {module!r})
import jobworker
announce, modules = jobworker.announce, set()

def record_and_announce(*arguments):
    modules.update(sys.modules)
    announce(*arguments)

jobworker.announce = record_and_announce
code = jobworker.main()
open({report!r}, "w").write("\\n".join(sorted(set(sys.modules) - modules)))
sys.exit(code)
"""


def test_a_running_server_imports_nothing(state, certs, tmp_path):
    """A module that is imported late is missing when the .pyz was replaced meanwhile. So `serve` imports every module
    before it listens. This session takes every path that could import one.
    """
    folder, report = Path(shutil.copytree(certs, tmp_path / "certs")), tmp_path / "imported"
    program = (sys.executable, "-c", RECORDS_IMPORTS.format(module=str(HERE), report=str(report)))
    authority = jobworker.load_authority(folder, "client-ca")
    with serving(state, folder, "--keep", "1s", program=program, stderr=subprocess.PIPE) as served:
        running, lost = served.start("--", "sleep", "1000"), served.start("--", "sh", "-c", "echo $PPID; sleep 1000")
        os.kill(int(first_line(served, lost)), signal.SIGKILL)
        assert status_at_end(served, lost).reason == "LOST"
        os.kill(launchers_of(served.process.pid)[0], signal.SIGKILL)
        assert served.run("stream", served.start("--", "echo", "ünï☃")).stdout == "ünï☃\n"
        for _, changes, status in REFUSED_CERTIFICATES:
            assert (
                call(served, "GetJobStatus", pb.GetStatusRequest(id=ID), certificate(authority, **changes))[0] == status
            )
        for method, request, status, _ in BAD_REQUESTS:
            assert call(served, method, request)[0] == status
        if os.geteuid() == 0:
            request = pb.StartJobRequest(cmd="true", run_as="no-such-account")
            assert call(served, "StartJob", request, role="admin")[0] == "INVALID_ARGUMENT"
        assert served.run("status", "--json", running).returncode == 0
        for _, rubbish in RUBBISH[:3]:
            with tls_to(served) as connection, contextlib.suppress(OSError):
                connection.sendall(rubbish)
                connection.settimeout(1)
                while connection.recv(65536):
                    pass
        assert "are read again" in reload(served)
        (folder / "server.pem").write_text("rubbish")
        assert "stay as they were" in reload(served)
        assert served.run("stop", running).returncode == 0
        until(lambda: running not in left_in(state))  # forgotten after one second
    assert served.process.returncode == 0
    assert report.read_text().split() == []


def test_clients_do_not_import_the_pure_python_protobuf(tmp_path):
    """protobuf imports its pure Python implementation beside the C one. `skip_pure_python_protobuf` delays that."""
    program = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import jobworker
if sys.argv[1:] == ["all"]:
    jobworker.skip_pure_python_protobuf = lambda: None
jobworker.prepare_grpc()
import gen.workerservice_pb2 as pb, grpc
assert pb.StartJobRequest.FromString(pb.StartJobRequest(cmd="x").SerializeToString()).cmd == "x"
print(*sys.modules)
from google.protobuf.internal import python_message
assert callable(python_message.GeneratedProtocolMessageType)  # it is imported at its first use
"""
    everything, imported = (
        set(
            subprocess.run(
                [sys.executable, "-c", program, *words], capture_output=True, text=True, check=True
            ).stdout.split()
        )
        for words in (["all"], [])
    )
    internal = [
        "containers",
        "decoder",
        "encoder",
        "extension_dict",
        "message_listener",
        "type_checkers",
        "wire_format",
    ]
    assert everything - imported >= {
        *(f"google.protobuf.internal.{name}" for name in internal),
        "google.protobuf.text_format",
        "google.protobuf.unknown_fields",
        "pickle",
    }
    assert imported <= everything


def test_serve_with_stop_jobs_stops_its_jobs_when_it_ends(state, certs):
    with serving(state, certs) as served:
        job = served.start("--", "sleep", "1000")
    with serving(state, certs) as served:
        status = call(served, "GetJobStatus", pb.GetStatusRequest(id=job))
        assert (status.status, status.stopped_by) == (pb.STOPPED, "serve --stop-jobs")


def test_a_second_server_with_the_same_state_folder_or_port_is_refused(state, certs, nothing_is_left):
    with serving(state, certs) as served:
        words = ["serve", "--certs", certs, "--without", "auto", "--listen"]
        same_state = served.run(*map(str, words), "127.0.0.1:0", "--state", str(state))
        assert same_state.returncode == 1
        assert f"in use by the server with pid {served.process.pid}\n" in same_state.stderr
        same_port = served.run(*map(str, words), f"127.0.0.1:{served.port}", "--state", str(new_state(nothing_is_left)))
        assert same_port.returncode == 1
        assert f"127.0.0.1:{served.port}" in same_port.stderr
        assert "Traceback" not in same_state.stderr + same_port.stderr


def test_vanished_and_slow_clients_do_not_hold_up_the_server_or_others(state, certs):
    with serving(state, certs) as served:
        job = served.start("--", PYTHON, "-c", "import sys, time\nwhile True: sys.stdout.write('x' * 65536)")
        clients = [served.popen("stream", job, stderr=subprocess.DEVNULL) for _ in range(3)]
        for client in clients:
            assert client.stdout.read(1000) == b"x" * 1000
        clients[0].kill()
        clients[1].send_signal(signal.SIGSTOP)
        with served.popen("stream", job, stderr=subprocess.DEVNULL) as other:
            assert other.stdout.read(4 * MIB) == b"x" * 4 * MIB
            other.kill()
        assert served.run("stop", job).returncode == 0
        size = call(served, "GetJobStatus", pb.GetStatusRequest(id=job)).output_bytes
        clients[1].send_signal(signal.SIGCONT)  # it resumes and receives every byte
        assert len(clients[1].stdout.read()) == size - 1000
        assert len(clients[2].stdout.read()) == size - 1000
        for client in clients:
            client.stdout.close()
            client.wait(PATIENCE)


def test_many_calls_leave_no_descriptor_watch_or_cgroup_in_the_server(state, certs):
    with serving(state, certs) as served, channel_to(served) as channel:

        def round_of_jobs():
            for _ in range(50):
                job = ask(channel, "StartJob", pb.StartJobRequest(cmd="echo", args=["x"])).ID
                assert ask(channel, "GetOutputStream", pb.GetStreamRequest(id=job)) == b"x\n"
            threads = len(os.listdir(f"/proc/{served.process.pid}/task"))
            return sorted(name.split(":")[0] for name in fds_of(served)), watches_of(served), threads

        first = round_of_jobs()
        second = round_of_jobs()
        assert (second[0], second[1]) == (first[0], first[1])
        assert second[2] <= first[2] + 2  # gRPC's thread pool grows and shrinks
        assert second[1] == 0
        assert jobs_cgroups(state) == []


def test_the_server_drops_a_client_that_no_longer_answers(state, certs):
    """A stopped client answers no ping, like a client whose machine lost its power."""
    with serving(state, certs) as served:
        job = served.start("--", "sh", "-c", WAITS)
        with served.popen("stream", job, stderr=subprocess.DEVNULL) as client:
            assert client.stdout.readline() == b"ready\n"
            until(lambda: watches_of(served) == 2)  # one on the job's events, one on its output
            client.send_signal(signal.SIGSTOP)
            try:
                until(lambda: watches_of(served) == 1)
            finally:
                client.kill()


def test_a_server_that_ends_tells_its_followers_and_the_job_goes_on(state, certs, port):
    server = spawn(state, certs, port, stderr=subprocess.PIPE)
    assert port_of(server.stdout.readline()) == port
    served = Served(server, port, certs)
    with channel_to(served) as channel:
        job = ask(channel, "StartJob", pb.StartJobRequest(cmd="sh", args=["-c", WAITS])).ID
        path = "/proto.WorkerService/GetOutputStream"
        chunks = channel.unary_stream(path, pb.GetStreamRequest.SerializeToString, pb.GetStreamResponse.FromString)(
            pb.GetStreamRequest(id=job)
        )
        assert next(chunks).result == b"ready\n"
        server.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as ended:
            next(chunks)
    assert (ended.value.code().name, ended.value.details()) == (
        "UNAVAILABLE",
        "the server is stopping; the job goes on",
    )
    log = server.communicate(timeout=PATIENCE)[1]
    assert server.returncode == 0
    assert log.endswith("jobworker: stopping; 1 job goes on\n")
    assert "Traceback" not in log
    with serving(state, certs, port=port) as served:
        assert call(served, "GetJobStatus", pb.GetStatusRequest(id=job)).status == pb.RUNNING


def test_control_c_in_the_terminal_of_serve_does_not_reach_jobs(state, certs):
    master, terminal = pty.openpty()
    server = spawn(state, certs, 0, program=("setsid", "--ctty", *PROGRAM), stdin=terminal, stderr=subprocess.PIPE)
    os.close(terminal)
    served = Served(server, port_of(server.stdout.readline()), certs)
    job = served.start("--", "sh", "-c", WAITS)
    with served.popen("stream", "--retry-for", "0", job, stderr=subprocess.DEVNULL) as client:
        assert client.stdout.readline() == b"ready\n"
        os.write(master, b"\x03")
        log = server.communicate(timeout=PATIENCE)[1]
    os.close(master)
    assert (server.returncode, "1 job goes on" in log) == (0, True)
    with serving(state, certs) as served:
        assert served.run("status", job).stdout == f"jobID: {job}, status: RUNNING, exitCode: 0\n"


def test_a_server_tells_its_service_manager_when_it_is_ready_and_when_it_stops(state, certs, port, tmp_path):
    """Also with standard input, output and error closed, as old daemons are started (sd_notify(3))."""
    for address, closed in ((str(tmp_path / "notify"), ""), ("@jobworker-test-" + os.urandom(8).hex(), "<&- >&- 2>&-")):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(address.replace("@", "\0"))
            manager.settimeout(PATIENCE)
            words = serve_words(state, certs, "--stop-jobs", port=port)
            command = f"exec {shlex.join(words)} {closed}"
            server = subprocess.Popen(["sh", "-c", command], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                      env={**os.environ, "NOTIFY_SOCKET": address})  # fmt: skip
            assert manager.recv(100) == b"READY=1"
            served = Served(server, port, certs)
            assert (
                served.run("stream", served.start("--", "sh", "-c", "ls -l /proc/self/fd | wc -l; echo err >&2")).stdout
                == "5\nerr\n"
            )
            server.send_signal(signal.SIGTERM)
            assert manager.recv(100) == b"STOPPING=1"
            assert server.wait(PATIENCE) == 0


def test_vanished_clients_leave_no_watch_and_no_descriptor_in_the_server(state, certs):
    with serving(state, certs) as served:
        job = served.start("--", "sh", "-c", WAITS)
        before = watches_of(served), len(fds_of(served))
        clients = [served.popen("stream", job, stderr=subprocess.DEVNULL) for _ in range(8)]
        for client in clients:
            assert client.stdout.readline() == b"ready\n"
        for client in clients:
            client.kill()
            client.wait(PATIENCE)
            client.stdout.close()
        until(lambda: (watches_of(served), len(fds_of(served))) == before)


def test_clients_that_vanish_in_mid_stream_are_no_line_in_the_log(state, certs, tmp_path):
    log = tmp_path / "log"
    with log.open("w") as errors, serving(state, certs, stderr=errors) as served:
        job = served.start("--", PYTHON, "-c", "import sys\nwhile True: sys.stdout.write('x' * 65536)")
        before = watches_of(served)
        for number in range(40):
            with channel_to(served) as channel:
                chunks = channel.unary_stream("/proto.WorkerService/GetOutputStream")(
                    pb.GetStreamRequest(id=job).SerializeToString()
                )
                for _ in range(number % 20):
                    next(chunks)
        until(lambda: watches_of(served) <= before)
        served.run("stop", job)
    assert "rror" not in log.read_text()


def test_clients_that_do_not_read_cost_bounded_memory_and_later_receive_every_byte(state, certs):
    def memory():
        return int(re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{served.process.pid}/status").read_text())[1]) << 10

    size = 100 * MIB
    expected = hashlib.sha256(random.Random(7).randbytes(size)).digest()
    with serving(state, certs) as served, contextlib.ExitStack() as stack:
        job = served.start("--", PYTHON, "-c", WRITES_BYTES, str(size))
        slow = [stack.enter_context(served.popen("stream", job)) for _ in range(8)]
        for client in slow:
            stack.callback(client.kill)
        first = [client.stdout.read(1) for client in slow]
        status_at_end(served, served.start("--", "true"))
        before = memory()
        with served.popen("stream", job) as fast:
            digest = hashlib.sha256()
            while part := fast.stdout.read(MIB):
                digest.update(part)
            assert digest.digest() == expected
        assert memory() - before < 64 * MIB
        for client, first_byte in zip(slow, first, strict=True):
            digest = hashlib.sha256(first_byte)
            while part := client.stdout.read(MIB):
                digest.update(part)
            assert digest.digest() == expected
            assert client.wait(PATIENCE) == 0


@pytest.mark.parametrize(
    "connect", [lambda served: socket.create_connection(("localhost", served.port)), tls_to], ids=["TCP", "TLS"]
)
def test_silent_connections_are_closed_and_do_not_hold_up_others(shared, connect):
    before = len(fds_of(shared))
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connect(shared)) for _ in range(20)]
        assert call(shared, "GetJobStatus", pb.GetStatusRequest(id=ID))[0] == "NOT_FOUND"
        for connection in silent:
            connection.settimeout(PATIENCE)
            with contextlib.suppress(ConnectionResetError):
                while connection.recv(4096):
                    pass
    until(lambda: len(fds_of(shared)) <= before)


def can_make_networks():
    return (
        os.geteuid() == 0
        and shutil.which("ip")
        and subprocess.run(["unshare", "-n", "true"], check=False).returncode == 0
    )


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=PATIENCE)


@pytest.fixture
def veth_pair():
    """A network namespace linked to this one: its name, which is also the link's, and the address of this side."""
    name = f"jw{os.urandom(3).hex()}"
    net = random.SystemRandom().randrange(1, 250)
    near, far = f"10.203.{net}.1", f"10.203.{net}.2"
    ip("netns", "add", name)
    try:
        ip("link", "add", name, "type", "veth", "peer", "name", "far", "netns", name)
        ip("address", "add", f"{near}/24", "dev", name)
        ip("link", "set", name, "up")
        ip("-n", name, "address", "add", f"{far}/24", "dev", "far")
        ip("-n", name, "link", "set", "far", "up")
        yield name, near
    finally:
        subprocess.run(["ip", "link", "del", name], check=False)
        ip("netns", "del", name)


@pytest.mark.skipif(not can_make_networks(), reason="needs root, ip and network namespaces")
def test_a_cut_network_frees_the_server_and_loses_no_byte_for_the_client(state, certs, tmp_path, veth_pair):
    """Neither side receives an end of the connection. Both detect it, and the client resumes at its byte."""
    name, address = veth_pair
    folder = Path(shutil.copytree(certs, tmp_path / "certs"))
    with serving(state, folder, "--name", address, "--listen", f"{address}:0") as served:
        local = ("--server", f"{address}:{served.port}", "--certs", str(folder))

        def run(*words):
            return subprocess.run(
                [*PROGRAM, words[0], *local, *words[1:]],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=PATIENCE,
                check=True,
            ).stdout

        job = run("start", "--", "sh", "-c", "mkfifo gate; echo before; read line <gate; echo after; exit 6").split()[
            -1
        ]
        before = watches_of(served)
        words = ["ip", "netns", "exec", name, *PROGRAM, "stream", *local, job]
        with subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
        ) as client:
            try:
                assert client.stdout.readline() == b"before\n"
                until(lambda: watches_of(served) == before + 1)
                ip("link", "set", name, "down")
                until(lambda: watches_of(served) == before)
                assert b"was lost" in client.stderr.readline()
                home = next((state / "home").iterdir())
                (home / "gate").write_text("go\n")
                assert has_ended(run, job)
                ip("link", "set", name, "up")
                assert client.stdout.read() == b"after\n"
                assert client.wait(PATIENCE) == 0
            finally:
                client.kill()


def has_ended(run, job):
    return "FINISHED, exitCode: 6" in (run("stream", job), run("status", job))[1]


def test_a_server_on_an_ipv6_address_can_be_called(state, certs):
    if not jobworker.has_ipv6():
        pytest.skip("this machine has no IPv6")
    with serving(state, certs, "--listen", "[::1]:0") as served:
        job = served.run("start", "--server", f"[::1]:{served.port}", "--", "echo", "six").stdout.split()[-1]
        assert served.run("stream", "--server", f"[::1]:{served.port}", job).stdout == "six\n"
    with serving(state, certs, "--listen", ":0") as served:
        for host in ("[::1]", "127.0.0.1", "localhost"):
            assert served.run("status", "--server", f"{host}:{served.port}", job).returncode == 0


# --- Client ---------------------------------------------------------------------------------------------
# The errors of a client that cannot reach its server, and its retries.


def test_the_error_for_an_unreachable_server_is_one_sentence_with_the_reason(certs):
    served = Served(None, 0, certs)

    def check(address, reason, verb, *words):
        done = served.run(verb, "--server", address, *words)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("jobworker: ")
        assert reason in done.stderr
        assert done.stderr.count("\n") == 1

    with (
        socket.socket() as silent,
        socket.socket() as refused,
        concurrent.futures.ThreadPoolExecutor() as pool,  # each case waits for seconds
    ):
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        refused.bind(("127.0.0.1", 0))
        places = (
            (f"127.0.0.1:{refused.getsockname()[1]}", "is `serve` running there?"),
            (f"127.0.0.1:{silent.getsockname()[1]}", "cannot reach"),
            ("no-such-host.invalid", "there is no host 'no-such-host.invalid'"),
        )
        verbs = (("status", ID), ("stream", ID), ("start", "--", "true"))
        for case in [pool.submit(check, *place, *words) for place in places for words in verbs]:
            case.result()


def names_in_server_certificate(folder):
    certificate = x509.load_pem_x509_certificate((folder / "server.pem").read_bytes())
    return {str(name.value) for name in jobworker.extension(certificate, x509.SubjectAlternativeName)}


def test_the_error_for_a_wrong_server_name_names_the_option_that_mends_it(state, certs, tmp_path):
    folder = Path(shutil.copytree(certs, tmp_path / "certs"))
    authority = jobworker.load_authority(folder, "server-ca")
    jobworker.write_pair(folder, "server", jobworker.issue_server_certificate(authority, ["box.example"]))
    with serving(state, folder) as served:
        done = served.run("status", ID)
        assert (done.returncode, done.stdout) == (1, "")
        assert "is not for 'localhost'" in done.stderr
        assert "`serve --name localhost`" in done.stderr
    with serving(state, folder, "--name", "localhost") as served:
        assert served.run("status", ID).stderr == f"jobworker: there is no job {ID}\n"
    assert names_in_server_certificate(folder) == {"box.example", "localhost"}


def test_the_error_for_a_wrong_folder_of_certificates_names_the_wrong_file(shared, tmp_path):
    done = shared.run("status", ID, "--certs", str(tmp_path))
    assert done.returncode == 1
    assert f"{tmp_path}/server-ca.pem: No such file" in done.stderr
    other_folder = tmp_path / "other_folder"
    jobworker.prepare_folder(other_folder, [])
    done = shared.run("status", ID, "--certs", str(other_folder))
    assert done.returncode == 1
    assert f"is not trusted by {other_folder}/server-ca.pem" in done.stderr
    shutil.copy(shared.certs / "server-ca.pem", other_folder)
    done = shared.run("status", ID, "--certs", str(other_folder))
    assert done.returncode == 1
    assert f"refuses {other_folder}/user.pem" in done.stderr


def test_a_client_gives_up_after_the_time_of_retry_for(state, certs):
    with serving(state, certs) as served:
        job = served.start("--", "sh", "-c", WAITS)
        client = served.popen("stream", "--retry-for", "1s", job, stderr=subprocess.PIPE)
        assert client.stdout.readline() == b"ready\n"
        served.process.kill()
        _, log = client.communicate(timeout=PATIENCE)
        assert client.returncode == 1
        assert b"gave up after 1 s" in log
        assert log.count(b"\n") == 2
    with serving(state, certs):
        pass  # it stops the job


LISTENER = """
import socket, sys
with socket.create_server(("127.0.0.1", 0)) as server:
    print(server.getsockname()[1], flush=True)
    while True:
        connection = server.accept()[0]
        {}
"""
OTHER_SERVERS = [  # what listens on the port instead of a server: a program, or options of `openssl s_server`
    ("hangs up", "connection.close()"),
    ("ssh", "connection.sendall(b'SSH-2.0-OpenSSH_9.2\\r\\n'); connection.recv(9999); connection.close()"),
    ("http", "connection.recv(9999); connection.sendall(b'HTTP/1.1 400 Bad Request\\r\\n\\r\\n'); connection.close()"),
    (
        "a plain HTTP/2 server",
        "connection.recv(9999); connection.sendall(b'\\0\\0\\0\\4\\0\\0\\0\\0\\0'); connection.recv(9999)",
    ),
    ("TLS 1.2", ("-tls1_2",)),
    ("TLS 1.3 without HTTP/2", ("-tls1_3", "-www")),
    ("TLS 1.3 that stays silent", ("-tls1_3", "-alpn", "h2", "-quiet")),
]


@pytest.fixture
def other_server(request, certs, port):
    """The port of a server that is not ours."""
    if isinstance(request.param, str):
        words = [sys.executable, "-c", LISTENER.format(request.param)]
    else:
        words = [
            "openssl",
            "s_server",
            "-accept",
            "127.0.0.1:0",
            "-cert",
            certs / "server.pem",
            "-key",
            certs / "server.key",
            *request.param,
        ]
    quiet = "-quiet" in words
    if quiet:  # then it does not print its port
        words[3] = f"127.0.0.1:{port}"
    process = subprocess.Popen(
        list(map(str, words)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        errors="replace",
    )
    if quiet:
        until(lambda: f":{port:04X} 00000000:0000 0A" in Path("/proc/net/tcp").read_text())
    else:
        port = next(
            int(line.rsplit(":", 1)[-1]) for line in process.stdout if re.search(r"(^|ACCEPT .*:)\d+$", line.strip())
        )
    yield port
    process.kill()
    process.communicate(timeout=PATIENCE)


@pytest.mark.parametrize(
    "other_server", [row[1] for row in OTHER_SERVERS], ids=[row[0] for row in OTHER_SERVERS], indirect=True
)
def test_the_error_for_a_port_of_another_program_is_one_sentence(certs, other_server):
    served = Served(None, other_server, certs)
    one_sentence(served.run("status", ID), f"localhost:{other_server}")
    one_sentence(served.run("stream", ID), f"localhost:{other_server}")


def test_a_start_whose_answer_was_lost_with_the_server_starts_one_job(state, certs, port, tmp_path):
    _, armed = dying_copy(tmp_path, "return pb.StartJobResponse(ID=")
    (tmp_path / "gen").symlink_to(HERE / "gen")
    with serving(state, certs, program=(sys.executable, str(tmp_path / "jobworker.py")), port=port) as served:
        client = served.popen("start", "--", "sh", "-c", "echo once >>runs; cat runs", stderr=subprocess.PIPE)
        served.process.wait(PATIENCE)  # it died after the start and before the answer
        assert not armed.exists()
    with serving(state, certs, port=port) as served:
        out, log = client.communicate(timeout=PATIENCE)
        assert (client.returncode, log.count(b"\n")) == (0, 1)
        assert b"was lost" in log
        job = out.split()[-1].decode()
        assert served.run("stream", job).stdout == "once\n"
        assert [folder.name for folder in (state / "jobs").iterdir()] == [job]


@pytest.mark.parametrize("environment", [
    {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9", "grpc_proxy": "http://127.0.0.1:9"},
    {"GRPC_SSL_CIPHER_SUITES": "ECDHE-ECDSA-AES128-GCM-SHA256", "GRPC_VERBOSITY": "DEBUG", "GRPC_TRACE": "http"},
    {"GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": "/nowhere", "SSL_CERT_FILE": "/nowhere", "GRPC_DNS_RESOLVER": "native"},
    {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "ascii"},
], ids=lambda environment: next(iter(environment)))  # fmt: skip
def test_a_client_ignores_variables_that_change_other_grpc_programs(shared, environment):
    variables = {**os.environ, "JOBWORKER_SERVER": shared.address, "JOBWORKER_CERTS": str(shared.certs), **environment}
    done = shared.run("start", "--", "printf", "%s", "ünï☃", env=variables)
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run(
        [*PROGRAM, "stream", done.stdout.split()[-1]], env=variables, capture_output=True, timeout=PATIENCE, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ünï☃".encode(), b"")


# --- Certificates ---------------------------------------------------------------------------------------
# The files of a server's folder, and the error for each file that is missing or wrong.


def serve_once(folder, state, *words):
    """Run a `serve` that is expected to refuse."""
    return Served(None, 0, folder).run(
        "serve", "--certs", str(folder), "--state", str(state), "--listen", "127.0.0.1:0", "--without", "auto", *words
    )


def contents(folder):
    return {
        path.name: (path.read_bytes() if os.access(path, os.R_OK) else b"", path.stat().st_mode)
        for path in folder.iterdir()
    }


def test_a_new_folder_holds_every_file_and_only_the_owner_can_read_the_keys(certs):
    assert {path.name for path in certs.iterdir()} == {*jobworker.MADE_FILES, "user2.pem", "user2.key"}
    for path in certs.iterdir():
        assert path.stat().st_mode & 0o777 == (0o600 if path.suffix == ".key" else 0o644)


@pytest.mark.parametrize("missing", ["server.pem", "server.key", "client-ca.pem"])
def test_a_folder_that_lacks_a_file_is_refused_and_not_changed(state, certs, tmp_path, missing):
    folder = Path(shutil.copytree(certs, tmp_path / "certs"))
    (folder / missing).unlink()
    before = contents(folder)
    done = serve_once(folder, state)
    assert done.returncode == 1
    assert f"it lacks {missing}" in done.stderr
    assert contents(folder) == before


WRONG_FILES = [
    ("server.pem", b"rubbish", "cannot be read"),
    ("server.key", b"rubbish", "cannot be read"),
    ("client-ca.pem", b"", "cannot be read"),
    ("server.key", "ed25519", "a kind that gRPC cannot serve"),
    ("server.key", "another", "is not the certificate of"),
]


@pytest.mark.parametrize(("name", "content", "message"), WRONG_FILES)
def test_a_folder_with_a_wrong_file_is_refused_in_one_sentence(state, certs, tmp_path, name, content, message):
    folder = Path(shutil.copytree(certs, tmp_path / "certs"))
    made = {"ed25519": openssl("genpkey", "-algorithm", "ed25519"), "another": (certs / "user.key").read_bytes()}
    (folder / name).write_bytes(made.get(content, content))
    before = contents(folder)
    done = serve_once(folder, state)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert contents(folder) == before


BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize("name", ["server.pem", "server.key", "client-ca.pem"])
def test_a_file_with_a_byte_order_mark_is_served(state, certs, tmp_path, name):
    """Some editors write one. gRPC refuses it, and that must not be reported as a port in use."""
    folder = Path(shutil.copytree(certs, tmp_path / "certs"))
    (folder / name).write_bytes(BYTE_ORDER_MARK + (folder / name).read_bytes())
    with serving(state, folder) as served:
        assert call(served, "GetJobStatus", pb.GetStatusRequest(id=ID))[0] == "NOT_FOUND"


@pytest.mark.parametrize("name", ["server-ca.pem", "user.pem", "user.key"])
def test_a_client_s_file_with_a_byte_order_mark_is_used_or_named(shared, tmp_path, name):
    folder = Path(shutil.copytree(shared.certs, tmp_path / "certs"))
    (folder / name).write_bytes(BYTE_ORDER_MARK + (folder / name).read_bytes())
    done = shared.run("status", ID, "--certs", str(folder))
    one_sentence(done)
    assert done.stderr == f"jobworker: there is no job {ID}\n" or f"{folder}/{name}" in done.stderr


@as_root
@pytest.mark.parametrize("name", ["(none)", "", "a b", "a..b", "x" * 64], ids=repr)
def test_a_host_name_that_no_certificate_can_hold_is_left_out(state, tmp_path, name):
    """A container or an initramfs may have such a name. Its server is still reached as localhost."""
    rename = "import os, socket, sys; socket.sethostname(sys.argv[1]); os.execvp(sys.argv[2], sys.argv[2:])"
    program = ("unshare", "--uts", sys.executable, "-c", rename, name, *PROGRAM)
    with serving(state, tmp_path / "certs", program=program) as served:
        assert {"localhost", "127.0.0.1"} <= names_in_server_certificate(served.certs)
        assert name not in names_in_server_certificate(served.certs)
        assert served.run("stream", served.start("--", "hostname")).stdout == f"{name}\n"


def openssl(*words, **popen):
    return subprocess.run(
        ["openssl", *map(str, words)], check=True, capture_output=True, timeout=PATIENCE, **popen
    ).stdout


P256 = ("-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256")


def issue_with_openssl(folder, name, issuer, extensions, *, key=P256, digest=None):
    """Make a key and a certificate with openssl, as an administrator may. No issuer: it signs itself."""
    openssl("genpkey", *key, "-out", folder / f"{name}.key")
    more = (f"-{digest}",) if digest else ()
    (folder / "extensions").write_text(extensions)
    request = openssl("req", "-new", "-key", folder / f"{name}.key", "-subj", f"/CN={name}")
    signer = ("-signkey", folder / f"{name}.key") if issuer is None else (
        "-CA", folder / f"{issuer}.pem", "-CAkey", folder / f"{issuer}.key", "-CAcreateserial")  # fmt: skip
    words = ("-req", "-days", "30", *more, *signer, "-extfile", folder / "extensions")
    made = openssl("x509", *words, input=request)
    (folder / f"{name}.pem").write_bytes(made)


@pytest.mark.parametrize("kind", [("-algorithm", "RSA"), ("-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384")])
def test_a_folder_made_with_openssl_is_used_and_not_changed(state, tmp_path, kind):
    folder, ed25519 = tmp_path, ("-algorithm", "ed25519")
    authority = "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign\n"
    client = f"extendedKeyUsage=clientAuth\n{jobworker.ROLES_OID}=ASN1:UTF8String:"
    issue_with_openssl(folder, "server-ca", None, authority, key=ed25519)
    issue_with_openssl(folder, "client-ca", None, authority, key=ed25519)
    issue_with_openssl(
        folder,
        "server",
        "server-ca",
        "subjectAltName=DNS:localhost,IP:127.0.0.1\nextendedKeyUsage=serverAuth\n",
        key=kind,
    )
    issue_with_openssl(folder, "user", "client-ca", f"{client}user\n", key=kind)
    issue_with_openssl(folder, "boss", "client-ca", f"{client}user,admin\n", key=kind)
    for authority_key in folder.glob("*-ca.key"):
        authority_key.unlink()  # a server does not need them
    before = contents(folder)
    with serving(state, folder) as served:
        job = served.start("--", "echo", "openssl")
        assert served.run("stream", job, role="boss").stdout == "openssl\n"
        assert call(served, "GetJobStatus", pb.GetStatusRequest(id=job)).owner == "user"
    assert contents(folder) == before


def test_the_verb_identity_makes_a_certificate_that_works(state, certs, tmp_path):
    folder = Path(shutil.copytree(certs, tmp_path / "certs"))
    with serving(state, folder) as served:
        for name, options in (("alice", ()), ("chief", ("--admin",))):
            done = subprocess.run(
                [*PROGRAM, "identity", name, *options, "--certs", folder], capture_output=True, text=True, check=True
            )
            assert f"{folder}/{name}.pem" in done.stdout
        job = served.start("--", "echo", "hers", role="alice")
        assert served.run("status", job).returncode == 1
        assert served.run("stream", job, role="chief").stdout == "hers\n"
        again = subprocess.run(
            [*PROGRAM, "identity", "alice", "--certs", folder], capture_output=True, text=True, check=False
        )
        assert again.returncode == 1


def expire_server_certificate(folder):
    key, pem = certificate(jobworker.load_authority(folder, "server-ca"), days=-0.5, purposes=("SERVER_AUTH",))
    (folder / "server.key").write_bytes(key), (folder / "server.pem").write_bytes(pem)


def server_of_kind(folder, *kind):
    issue_with_openssl(
        folder, "server", "server-ca", "subjectAltName=DNS:localhost\nextendedKeyUsage=serverAuth\n", key=kind
    )


UNUSABLE_FILES = [  # the fault; a function that gives a folder this fault; part of the error
    ("a key with a password", lambda f: (f / "server.key").write_bytes(openssl("ec", "-in", f / "server.key", "-aes256", "-passout", "pass:x")), "password"),
    ("a certificate out of date", expire_server_certificate, "`serve --name NAME`"),
    ("a public key", lambda f: (f / "server.key").write_bytes(openssl("ec", "-in", f / "server.key", "-pubout")), "cannot be read"),
    ("DER", lambda f: (f / "server.pem").write_bytes(openssl("x509", "-in", f / "server.pem", "-outform", "DER")), "cannot be read"),
    ("a folder in a file's place", lambda f: ((f / "server.key").unlink(), (f / "server.key").mkdir()), "server.key"),
    ("a link to nowhere", lambda f: ((f / "server.pem").unlink(), (f / "server.pem").symlink_to("gone")), "server.pem"),
    ("an Ed448 key", lambda f: (f / "server.key").write_bytes(openssl("genpkey", "-algorithm", "ed448")), "cannot serve"),
    ("a curve that TLS 1.3 has not", lambda f: server_of_kind(f, "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:secp256k1"), "cannot serve"),
    ("a curve that BoringSSL does not offer", lambda f: server_of_kind(f, "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-521"), "cannot serve"),
    ("an RSA key that is too short", lambda f: server_of_kind(f, "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:512"), "cannot serve"),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "spoil", "message"), UNUSABLE_FILES, ids=[row[0] for row in UNUSABLE_FILES])
def test_a_folder_with_an_unusable_file_is_refused_and_not_changed(state, certs, tmp_path, fault, spoil, message):
    folder = Path(shutil.copytree(certs, tmp_path / "certs"))
    spoil(folder)
    before = {path.name: path.is_file() and path.read_bytes() for path in folder.iterdir()}
    one_sentence(serve_once(folder, state), message)
    assert {path.name: path.is_file() and path.read_bytes() for path in folder.iterdir()} == before


def test_a_second_authority_that_only_tls_can_read_keeps_no_server_from_starting(state, certs, tmp_path):
    folder = Path(shutil.copytree(certs, tmp_path / "certs"))
    x400 = "DER:30:04:a5:02:80:00"  # a general name of a kind that cryptography does not know
    issue_with_openssl(folder, "odd", None, f"subjectAltName={x400}\nbasicConstraints=critical,CA:TRUE\n")
    for name in ("client-ca.pem", "server-ca.pem"):
        with (folder / name).open("ab") as file:
            file.write((folder / "odd.pem").read_bytes())
    with serving(state, folder) as served:
        assert served.run("run", "echo", "hello").stdout == "hello\n"
        for words in (("identity", "bob"), ("identity", "--list"), ("revoke", "bob")):
            assert "bob" in run_in_folder(folder, *words)


def damaged(pem, chance):
    """A PEM file with other bytes in its DER."""
    kind = pem.split(b"-----")[1].removeprefix(b"BEGIN ")
    der = bytearray(base64.b64decode(pem.split(b"-----")[2]))
    for _ in range(chance.choice((1, 1, 2, 5))):
        der[chance.randrange(len(der))] = chance.choice((0, 1, 0x7F, 0xFF, chance.randrange(256)))
    return b"-----BEGIN %b-----\n%b-----END %b-----\n" % (kind, base64.encodebytes(der), kind)


CERTS_VERBS = [
    ("identity", "--list"),
    ("identity", "bob", "--bundle", "box"),
    ("identity", "user2", "--renew"),
    ("revoke", "user2"),
    ("revoke", "./user2.pem"),
]


def serve_from(folder):
    """What a server does with the files of a folder before it listens."""
    jobworker.read_server_folder(folder)
    lists = jobworker.read_revocation_lists(folder, jobworker.load_authorities(folder))
    for warning in (*jobworker.end_warnings(folder), *jobworker.overdue_warnings(lists)):
        assert warning.startswith("warning: ")
    jobworker.renew_server_certificate(folder)
    jobworker.add_names(folder, ["box"])


DAMAGED = ["server.pem", "server.key", "server-ca.pem", "client-ca.pem", "client-ca.key", "client-crl.pem", "user2.pem"]


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_of_the_certs_folder_is_one_sentence_to_whoever_reads_it(
    certs, tmp_path, monkeypatch, capfd, name
):
    whole = Path(shutil.copytree(certs, tmp_path / "whole"))
    assert jobworker.main(["revoke", "admin", "--certs", str(whole)]) == 0
    chance = random.Random(name)
    folder = tmp_path / "certs"
    for _ in range(30):
        shutil.copytree(whole, folder)
        monkeypatch.chdir(folder)
        (folder / name).write_bytes(damaged((whole / name).read_bytes(), chance))
        with contextlib.suppress(jobworker.JobWorkerError):
            serve_from(folder)
        for words in CERTS_VERBS:
            capfd.readouterr()
            if jobworker.main([*words, "--certs", str(folder)]):
                lines = capfd.readouterr().err.splitlines()  # the error, perhaps after a warning
                assert lines
                assert all(line.startswith("jobworker: ") for line in lines)
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    "kind",
    [
        ("-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:1024"),
        ("-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:4096"),
    ],
)
def test_a_server_may_have_an_rsa_key_of_another_size(state, certs, tmp_path, kind):
    folder = Path(shutil.copytree(certs, tmp_path / "certs"))
    server_of_kind(folder, *kind)
    with serving(state, folder) as served:
        assert served.run("stream", served.start("--", "echo", "rsa")).stdout == "rsa\n"


def test_serve_with_name_replaces_an_expired_server_certificate(state, certs, tmp_path):
    folder = Path(shutil.copytree(certs, tmp_path / "certs"))
    expire_server_certificate(folder)
    with serving(state, folder, "--name", "localhost") as served:
        assert served.run("status", ID).stderr == f"jobworker: there is no job {ID}\n"


def test_serve_with_name_but_without_the_authority_s_key_is_refused_and_changes_nothing(state, certs, tmp_path):
    folder = Path(shutil.copytree(certs, tmp_path / "certs"))
    (folder / "server-ca.key").unlink()
    before = contents(folder)
    one_sentence(serve_once(folder, state, "--name", "box.example"), "server-ca.key")
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["", "a..b", "no host", "x" * 70, "a/b", "a\nb"], ids=repr)
def test_an_invalid_host_name_is_wrong_usage_and_changes_nothing(state, certs, tmp_path, name):
    folder = Path(shutil.copytree(certs, tmp_path / "certs"))
    before = contents(folder)
    one_sentence(serve_once(folder, state, "--name", name), "neither a host's name nor an address", status=2)
    assert contents(folder) == before
    one_sentence(serve_once(tmp_path / "new", state, "--name", name), status=2)
    assert not (tmp_path / "new").exists()


def test_server_names_may_be_addresses_and_unicode_and_are_kept_in_a_new_certificate(certs, tmp_path):
    folder = Path(shutil.copytree(certs, tmp_path / "certs"))
    assert jobworker.prepare_folder(folder, ["10.9.8.7", "2001:db8::7", "bücher.example", "box"])
    made = (folder / "server.pem").read_bytes()
    names = jobworker.extension(x509.load_pem_x509_certificate(made), x509.SubjectAlternativeName)
    assert {"10.9.8.7", "2001:db8::7", "xn--bcher-kva.example", "box", "localhost"} <= {
        str(name.value) for name in names
    }
    assert jobworker.prepare_folder(folder, ["10.9.8.7", "bücher.example", "2001:DB8::7"]) == ""
    assert (folder / "server.pem").read_bytes() == made


def test_the_error_for_a_path_that_cannot_be_a_folder_is_one_sentence(state, tmp_path):
    (tmp_path / "file").write_text("x")
    one_sentence(serve_once(tmp_path / "file", state), f"{tmp_path}/file")
    one_sentence(serve_once(tmp_path / "file" / "below", state), f"{tmp_path}/file")
    assert (tmp_path / "file").read_text() == "x"
    one_sentence(serve_once(Path("/proc/nowhere"), state), "/proc/nowhere")


@needs_pyz
@as_root
def test_an_unreadable_folder_is_refused_and_not_changed(certs, tmp_path):
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)
    folder = Path(shutil.copytree(certs, tmp_path / "certs"))
    user, before = ("setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"), contents(folder)
    shutil.copy(PYZ, tmp_path)
    words = (
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--without",
        "auto",
        "--state",
        "/var/tmp/jobworker-54321/state",
        "--certs",
    )
    try:
        for mode, message in ((0o755, "server.key: Permission denied"), (0o700, f"{folder}")):
            folder.chmod(mode)
            done = run_pyz(*words, str(folder), program=PYTHON_FOR_ALL, pyz=tmp_path / "jobworker.pyz", wrapper=user)
            one_sentence(done, message, "Permission denied")
        done = run_pyz(
            "status", ID, "--certs", str(folder), program=PYTHON_FOR_ALL, pyz=tmp_path / "jobworker.pyz", wrapper=user
        )
        one_sentence(done, "Permission denied", "--certs DIR")
    finally:
        shutil.rmtree("/var/tmp/jobworker-54321", ignore_errors=True)
    folder.chmod(0o755)
    assert contents(folder) == before


# --- A certificate's life -------------------------------------------------------------------------------
# A certificate is made, renewed, revoked, and ends. Each weakness has its own error.

SERIAL_ONE = "1.2.840.10070.8.2"  # as long as ROLES_OID, so that it can replace it in the bytes


def der(tag, content):
    """One DER element (X.690, 8.1)."""
    size = len(content)
    length = bytes([size]) if size < 128 else bytes([0x82, size >> 8, size & 0xFF])
    return bytes([tag]) + length + content


def signed_anew(authority, made, body):
    """A certificate with another body, signed again. No library makes such certificates."""
    signature = authority.key.sign(body, ec.ECDSA(hashes.SHA256()))
    algorithm = der(0x30, bytes.fromhex("06082a8648ce3d040302"))
    whole = der(0x30, body + algorithm + der(0x03, b"\0" + signature))
    return jobworker.to_pem(x509.load_der_x509_certificate(whole))


def client_builder(authority, *, key=None, roles=USER_ROLE, critical=False, more=(), days=99):
    """The builder of a client's certificate, and its key."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "mallory")])
    builder = certificate_builder(authority, name, key.public_key(), -1, days)
    builder = builder.add_extension(x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
    for oid, value, mark in ((jobworker.ROLES_OID, roles, critical), *more):
        builder = builder.add_extension(x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value), critical=mark)
    return builder, key


def key_as_pem(key):
    return jobworker.CertifiedKey(None, key).key_pem()


def twice_the_roles(authority):
    builder, key = client_builder(authority, more=[(SERIAL_ONE, jobworker.encode_roles(["admin"]), False)])
    made = builder.sign(authority.key, hashes.SHA256())
    first, second = (x509.ObjectIdentifier(oid) for oid in (jobworker.ROLES_OID, SERIAL_ONE))
    oids = [bytes.fromhex("06072a8648ce560801"), bytes.fromhex("06072a8648ce560802")]
    assert (first.dotted_string, second.dotted_string) == (jobworker.ROLES_OID, SERIAL_ONE)
    body = made.tbs_certificate_bytes
    assert all(body.count(oid) == 1 for oid in oids)
    return key_as_pem(key), signed_anew(authority, made, body.replace(oids[1], oids[0]))


def rsa_leaf(authority, bits):
    builder, key = client_builder(authority, key=jobworker.rsa.generate_private_key(65537, bits))
    return key_as_pem(key), jobworker.to_pem(builder.sign(authority.key, hashes.SHA256()))


def below_team(authority, folder, bits, digest):
    """A client of an intermediate authority whose RSA key has `bits` and signs with `digest`."""
    issue_with_openssl(folder, "team", "client-ca", "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign\n",
            key=("-algorithm", "RSA", "-pkeyopt", f"rsa_keygen_bits:{bits}"))  # fmt: skip
    issue_with_openssl(folder, "carol", "team", f"extendedKeyUsage=clientAuth\n{jobworker.ROLES_OID}=ASN1:UTF8String:user\n",
            digest=digest)  # fmt: skip
    return (folder / "carol.key").read_bytes(), (folder / "carol.pem").read_bytes() + (folder / "team.pem").read_bytes()


WEAK = [  # the weakness; a function that makes such a certificate; part of the error
    ("twice the roles", lambda a, _: twice_the_roles(a), "more than one extension"),
    ("an RSA leaf of 1024 bits", lambda a, _: rsa_leaf(a, 1024), "RSA key of 1024 bits"),
    ("an authority of RSA 1024 below", lambda a, f: below_team(a, f, 1024, "sha256"), "RSA key of 1024 bits"),
    ("a SHA-1 signature", lambda a, f: below_team(a, f, 2048, "sha1"), "signed with SHA1"),
    ("an MD5 signature", lambda a, f: below_team(a, f, 2048, "md5"), "signed with MD5"),
    ("a name with an escape", lambda a, _: certificate(a, names=("\x1b[31mroot",)), "control character"),
    ("a name with a newline", lambda a, _: certificate(a, names=("a\nb",)), "control character"),
    ("a name with NUL", lambda a, _: certificate(a, names=("admin\0.evil",)), "control character"),
    ("a name with C1", lambda a, _: certificate(a, names=("a\x9bb",)), "control character"),
    ("a name that turns its direction", lambda a, _: certificate(a, names=("a\u202enimda",)), "control character"),
    ("a name with DEL", lambda a, _: certificate(a, names=("a\x7fb",)), "control character"),
]


def authenticated(pem, chain, authorities):
    tls = {"ssl_tls_version": [b"TLSv1.3"], "x509_pem_cert": [pem], "x509_pem_cert_chain": [chain]}
    return jobworker.authenticate(tls, jobworker.Trust(authorities))


@pytest.mark.parametrize(("weakness", "make", "message"), WEAK, ids=[row[0] for row in WEAK])
def test_each_weakness_of_a_certificate_has_its_own_error(shared, tmp_path, weakness, make, message):
    for name in ("client-ca.pem", "client-ca.key"):
        shutil.copy(shared.certs / name, tmp_path)
    key, pem = make(jobworker.load_authority(shared.certs, "client-ca"), tmp_path)
    status, sentence = call(shared, "GetJobStatus", pb.GetStatusRequest(id=ID), (key, pem))
    leaf, *chain = re.findall(rb"-----BEGIN.*?END CERTIFICATE-----\n", pem, re.DOTALL)
    with pytest.raises(jobworker.DeniedError, match=message):
        authenticated(leaf, b"".join(chain), (shared.certs / "client-ca.pem").read_bytes())
    if status != "UNAVAILABLE":  # TLS itself refused it
        assert (status, message in sentence) == ("PERMISSION_DENIED", True)
        assert jobworker.printable(sentence) == sentence


def test_a_critical_roles_extension_is_refused_and_the_client_s_error_names_it(shared, tmp_path):
    authority = jobworker.load_authority(shared.certs, "client-ca")
    builder, key = client_builder(authority, critical=True)
    pem = jobworker.to_pem(builder.sign(authority.key, hashes.SHA256()))
    with pytest.raises(jobworker.DeniedError, match=r"marks its extension .* as critical"):
        authenticated(pem, b"", (shared.certs / "client-ca.pem").read_bytes())
    shutil.copy(shared.certs / "server-ca.pem", tmp_path)
    (tmp_path / "mallory.pem").write_bytes(pem)
    (tmp_path / "mallory.key").write_bytes(key_as_pem(key))
    (tmp_path / "mallory.key").chmod(0o600)
    done = shared.run("status", ID, "--certs", str(tmp_path), role="mallory")
    one_sentence(done, f"refuses {tmp_path}/mallory.pem", "critical")


def test_a_client_with_a_strong_and_a_weak_chain_is_accepted(shared, tmp_path):
    """One strong chain is enough."""
    for name in ("client-ca.pem", "client-ca.key"):
        shutil.copy(shared.certs / name, tmp_path)
    authority = jobworker.load_authority(shared.certs, "client-ca")
    _, both = below_team(authority, tmp_path, 2048, "sha256")
    leaf, team = re.findall(rb"-----BEGIN.*?END CERTIFICATE-----\n", both, re.DOTALL)
    assert authenticated(leaf, team, (shared.certs / "client-ca.pem").read_bytes()).name == "carol"


@functools.cache
def cached_authority():
    return jobworker.issue_authority("any")


HOSTILE = st.one_of(
    st.binary(max_size=300),
    st.binary(max_size=80).map(lambda content: der(0x0C, content)),
    st.text(max_size=40).map(lambda text: der(0x0C, text.encode())),
    st.lists(st.sampled_from(["admin", "user", "Admin", "", " user", "\0", "user\0"]), max_size=40).map(
        lambda words: der(0x0C, ",".join(words).encode())
    ),
)


def grants(value):
    """The roles in a value of the roles extension, decoded without the module."""
    words = value[2:].decode("ascii", "replace").split(",")
    exact = len(value) in range(3, 130) and value[:2] == bytes([0x0C, len(value) - 2])
    return frozenset(words) if exact and set(words) <= {"admin", "user"} else frozenset()


@settings(max_examples=10_000, deadline=None)
@given(HOSTILE)
def test_hostile_der_in_the_roles_never_raises_and_never_grants(value):
    assert jobworker.decode_roles(value) == grants(value)


@functools.cache
def complete_certificate():
    authority = cached_authority()
    builder, _ = client_builder(authority, roles=b"\x0c\x04user" + b"x" * 40)
    return builder.sign(authority.key, hashes.SHA256())


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
@settings(max_examples=10_000, deadline=None)
@given(HOSTILE.map(lambda value: value[:46].ljust(46, b"\0")), st.booleans(), st.integers(0, 600), st.integers(0, 255))
def test_a_hostile_certificate_never_raises_and_never_grants(value, flip, position, byte):
    """The roles or any byte of a certificate are changed. Its signature then fits no longer."""
    whole = complete_certificate().public_bytes(jobworker.serialization.Encoding.DER)
    made = bytearray(whole.replace(b"\x0c\x04user" + b"x" * 40, value))
    if flip:
        made[position % len(made)] = byte
    pem = ssl.DER_cert_to_PEM_cert(bytes(made)).encode()
    if bytes(made) == whole:
        return
    with pytest.raises(jobworker.DeniedError):
        authenticated(pem, b"", cached_authority().certificate_pem())


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31m", "a\x7f", "a\x85b", "\u202eadmin", "a\u2028b"], ids=repr)
def test_an_identity_with_control_characters_in_its_name_is_refused(certs, tmp_path, name):
    with pytest.raises(jobworker.UsageError, match="control character"):
        jobworker.issue_identity(cached_authority(), name, ["user"])
    folder = Path(shutil.copytree(certs, tmp_path / "certs"))
    done = Served(None, 0, folder).run("identity", name)
    one_sentence(done, "control character", status=2)


def own_folder(certs, tmp_path):
    return Path(shutil.copytree(certs, tmp_path / "certs"))


def run_in_folder(folder, *words, status=0):
    """Run a verb on the server's folder of certificates and return what it printed."""
    done = Served(None, 0, folder).run(*words)
    assert (done.returncode, done.stderr) == (status, ""), done.stderr
    return done.stdout


def line_with(served, word):
    return next(line for line in served.process.stderr if word in line)


@contextlib.contextmanager
def open_stream(served, role="user", identity=None):
    """The stream of a running job after its first bytes, and the job's id."""
    with channel_to(served, identity, role) as channel:
        job = ask(channel, "StartJob", pb.StartJobRequest(cmd="sh", args=["-c", WAITS])).ID
        path = "/proto.WorkerService/GetOutputStream"
        stream = channel.unary_stream(path, pb.GetStreamRequest.SerializeToString, pb.GetStreamResponse.FromString)
        chunks = stream(pb.GetStreamRequest(id=job), timeout=PATIENCE)
        assert next(chunks).result == b"ready\n"
        yield chunks, job


def stream_failure(chunks):
    """The status and the message with which a stream failed."""
    with pytest.raises(grpc.RpcError) as ended:
        for _ in chunks:
            pass
    return ended.value.code().name, ended.value.details()


def test_a_revocation_ends_the_client_s_streams_and_calls_without_a_reload(state, certs, tmp_path):
    folder = own_folder(certs, tmp_path)
    with (
        serving(state, folder, stderr=subprocess.PIPE) as served,
        open_stream(served) as (chunks, job),
        open_stream(served, "user2") as (others, other),
    ):
        printed = run_in_folder(folder, "revoke", "user")
        assert stream_failure(chunks) == ("PERMISSION_DENIED", "the client's certificate of 'user' is revoked")
        assert f"revoked user: {serial_of(folder, 'user')}" in printed
        assert "1 entry" in line_with(served, "the revocation list")
        assert call(served, "GetJobStatus", pb.GetStatusRequest(id=job))[0] == "PERMISSION_DENIED"
        assert call(served, "StopJob", pb.StopJobRequest(id=other), role="user2") == pb.StopJobResponse()
        assert list(others) == []  # a good client's stream went on to its end


def serial_of(folder, name):
    return f"{x509.load_pem_x509_certificate((folder / f'{name}.pem').read_bytes()).serial_number:x}"


def openssl_list(folder, *names, issuer="client-ca", file="client-crl.pem"):
    """A revocation list as `openssl ca` makes it."""
    (folder / "index.txt").write_text("")
    (folder / "crlnumber").write_text("01\n")
    (folder / "ca.conf").write_text(f"[ca]\ndefault_ca=own\n[own]\ndatabase={folder}/index.txt\ncrlnumber={folder}/crlnumber\n"
                                    "default_md=sha256\ndefault_crl_days=30\n")  # fmt: skip
    signer = ("-config", folder / "ca.conf", "-cert", folder / f"{issuer}.pem", "-keyfile", folder / f"{issuer}.key")
    for name in names:
        openssl("ca", *signer, "-revoke", folder / f"{name}.pem")
    openssl("ca", *signer, "-gencrl", "-out", folder / file)


def test_a_revocation_list_made_by_openssl_is_used_and_revoke_keeps_its_entries(state, certs, tmp_path):
    folder = own_folder(certs, tmp_path)
    with serving(state, folder, stderr=subprocess.PIPE) as served, open_stream(served) as (chunks, job):
        openssl_list(folder, "user")
        assert stream_failure(chunks)[0] == "PERMISSION_DENIED"
        line_with(served, "the revocation list is read again")
        run_in_folder(folder, "revoke", str(folder / "user2.pem"))
        assert "2 entries" in line_with(served, "the revocation list is read again")
        assert call(served, "GetJobStatus", pb.GetStatusRequest(id=job), role="user2")[0] == "PERMISSION_DENIED"
        assert call(served, "StopJob", pb.StopJobRequest(id=job), role="admin") == pb.StopJobResponse()
    printed = openssl("crl", "-in", folder / "client-crl.pem", "-CAfile", folder / "client-ca.pem", "-noout", "-text")
    assert all(serial_of(folder, name).upper().encode() in printed for name in ("user", "user2"))
    with serving(state, folder) as served:  # and at a start
        assert call(served, "GetJobStatus", pb.GetStatusRequest(id=job))[0] == "PERMISSION_DENIED"


@pytest.fixture
def team(certs, tmp_path):
    """A server's folder, and a folder beside it with an intermediate authority and its clients carol and dave."""
    folder, away = own_folder(certs, tmp_path), tmp_path / "team"
    away.mkdir()
    for name in ("client-ca.pem", "client-ca.key"):
        shutil.copy(folder / name, away)
    issue_with_openssl(
        away, "team", "client-ca", "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\n"
    )
    for name in ("carol", "dave"):
        issue_with_openssl(
            away, name, "team", f"extendedKeyUsage=clientAuth\n{jobworker.ROLES_OID}=ASN1:UTF8String:user\n"
        )
    return folder, away


def of_team(away, name):
    """A client's key, and its certificate with the intermediate authority's."""
    return (away / f"{name}.key").read_bytes(), (away / f"{name}.pem").read_bytes() + (away / "team.pem").read_bytes()


def test_an_intermediate_authority_s_list_revokes_its_own_clients_and_no_other(state, team):
    folder, away = team
    with (
        serving(state, folder, stderr=subprocess.PIPE) as served,
        open_stream(served, identity=of_team(away, "carol")) as (chunks, _),
        open_stream(served, identity=of_team(away, "dave")) as (others, job),
        open_stream(served) as (mine, own),
    ):
        openssl_list(away, "carol", issuer="team", file="list")
        jobworker.write_file(folder / "client-crl.pem", (away / "list").read_bytes(), 0o644)
        assert "its issuer is 'CN=team'" in line_with(served, "the revocation list stays as it was")
        assert call(served, "GetJobStatus", pb.GetStatusRequest(id=job), of_team(away, "carol"))[0] == "NOT_FOUND"
        shutil.copy(away / "team.pem", folder)  # now the server can verify the list
        assert stream_failure(chunks) == ("PERMISSION_DENIED", "the client's certificate of 'carol' is revoked")
        assert "1 entry" in line_with(served, "the revocation list is read again")
        run_in_folder(folder, "revoke", "user")
        assert stream_failure(mine)[0] == "PERMISSION_DENIED"
        assert "2 entries" in line_with(served, "the revocation list is read again")
        assert (
            call(served, "GetJobStatus", pb.GetStatusRequest(id=job), of_team(away, "carol"))[0] == "PERMISSION_DENIED"
        )
        assert call(served, "StopJob", pb.StopJobRequest(id=job), of_team(away, "dave")) == pb.StopJobResponse()
        assert call(served, "StopJob", pb.StopJobRequest(id=own), role="admin") == pb.StopJobResponse()
        assert list(others) == []


def test_the_number_of_a_revoked_certificate_is_its_issuer_s_alone(team):
    """Two issuers gave the same serial. Each one's list revokes its own certificate."""
    folder, away = team
    carol = of_team(away, "carol")[1]
    serial = x509.load_pem_x509_certificate(carol).serial_number
    leaf, chain = re.findall(rb"-----BEGIN.*?END CERTIFICATE-----\n", carol, re.DOTALL)
    authorities, found = (folder / "client-ca.pem").read_bytes(), []
    for place, name in ((folder, "client-ca"), (away, "team")):
        authority = jobworker.load_authority(place, name)
        trust = jobworker.Trust(authorities, frozenset({(authority.certificate.subject.public_bytes(), serial)}))
        tls = {"ssl_tls_version": [b"TLSv1.3"], "x509_pem_cert": [leaf], "x509_pem_cert_chain": [chain]}
        with contextlib.suppress(jobworker.DeniedError):
            found.append((name, jobworker.authenticate(tls, trust).name))
    assert found == [("client-ca", "carol")]


def test_revoke_signs_with_the_intermediate_s_key_or_says_where_its_list_is_made(state, team):
    folder, away = team
    carol, served = tmp_chain(away, "carol"), Served(None, 0, folder)
    one_sentence(served.run("revoke", carol), "from the authority 'CN=team'", "openssl ca -gencrl", "client-crl.pem")
    for name in ("team.pem", "dave.pem"):
        shutil.copy(away / name, folder)
    one_sentence(served.run("revoke", "dave"), "whose key is not in")
    assert not (folder / "client-crl.pem").exists()
    shutil.copy(away / "team.key", folder)
    (folder / "team.key").chmod(0o600)
    run_in_folder(folder, "revoke", "user2")
    for word in ("dave", carol):
        run_in_folder(folder, "revoke", word)
    rows = {row["NAME"]: row["REVOKED"] for row in table_of(run_in_folder(folder, "identity", "--list"))}
    assert (rows["dave"], rows["user2"], rows["team"], rows["user"]) == (utc_day(), utc_day(), "no", "no")
    with serving(state, folder) as served:
        for name in ("carol", "dave"):
            assert (
                call(served, "GetJobStatus", pb.GetStatusRequest(id=ID), of_team(away, name))[0] == "PERMISSION_DENIED"
            )
        assert call(served, "GetJobStatus", pb.GetStatusRequest(id=ID), role="user2")[0] == "PERMISSION_DENIED"
        assert call(served, "GetJobStatus", pb.GetStatusRequest(id=ID))[0] == "NOT_FOUND"


def tmp_chain(away, name):
    file = away / "chain.pem"
    file.write_bytes(of_team(away, name)[1])
    return str(file)


def utc_day():
    return str(datetime.datetime.now(datetime.timezone.utc).date())


def overdue_list(folder, *serials):
    """A revocation list whose next one should have come yesterday."""
    authority = jobworker.load_authority(folder, "client-ca")
    now, day = datetime.datetime.now(datetime.timezone.utc), datetime.timedelta(days=1)
    builder = x509.CertificateRevocationListBuilder().issuer_name(authority.certificate.subject)
    builder = builder.last_update(now - 9 * day).next_update(now - day)
    for serial in serials:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now - 9 * day)
        builder = builder.add_revoked_certificate(entry.build())
    made = builder.sign(authority.key, hashes.SHA256())
    jobworker.write_file(folder / "client-crl.pem", made.public_bytes(jobworker.serialization.Encoding.PEM), 0o644)


def test_an_overdue_revocation_list_stays_in_force_with_a_warning(state, certs, tmp_path):
    folder = own_folder(certs, tmp_path)
    overdue_list(folder, int(serial_of(folder, "user"), 16))
    log = tmp_path / "log"
    for restart in (False, True):
        with log.open("w") as errors, serving(state, folder, stderr=errors) as served:
            assert call(served, "GetJobStatus", pb.GetStatusRequest(id=ID))[0] == "PERMISSION_DENIED"
            assert log.read_text().count("should have been replaced on") == 1
            if not restart:
                overdue_list(folder, *(int(serial_of(folder, name), 16) for name in ("user", "user2")))
                until(lambda: log.read_text().count("should have been replaced on") == 2)
                assert call(served, "GetJobStatus", pb.GetStatusRequest(id=ID), role="user2")[0] == "PERMISSION_DENIED"
    days_ago = datetime.datetime.now(datetime.timezone.utc).date() - datetime.timedelta(days=9)
    rows = {row["NAME"]: row["REVOKED"] for row in table_of(run_in_folder(folder, "identity", "--list"))}
    assert rows == {"user": str(days_ago), "user2": str(days_ago), "admin": "no"}


def foreign_list(folder):
    other = jobworker.issue_authority("jobworker client authority")
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = x509.CertificateRevocationListBuilder().issuer_name(other.certificate.subject).last_update(now)
    made = builder.next_update(now + datetime.timedelta(days=9)).sign(other.key, hashes.SHA256())
    return made.public_bytes(jobworker.serialization.Encoding.PEM)


BAD_LISTS = [
    ("rubbish", lambda _: b"rubbish", "holds no revocation list"),
    ("empty", lambda _: b"", "holds no revocation list"),
    ("torn", lambda f: (f / "client-crl.pem").read_bytes()[:200], "holds no revocation list"),
    ("another authority's", foreign_list, "is not signed by an authority"),
    ("no DER", lambda _: b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n", "cannot be read"),
    ("gone", lambda _: None, "cannot be read"),
]


@pytest.mark.parametrize(("fault", "content", "message"), BAD_LISTS, ids=[row[0] for row in BAD_LISTS])
def test_an_unreadable_revocation_list_is_logged_and_the_last_one_stays_in_force(
    state, certs, tmp_path, fault, content, message
):
    folder = own_folder(certs, tmp_path)
    run_in_folder(folder, "revoke", serial_of(folder, "user"))
    bad = content(folder)
    with serving(state, folder, stderr=subprocess.PIPE) as served:
        if bad is None:
            (folder / "client-crl.pem").unlink()
        else:
            jobworker.write_file(folder / "client-crl.pem", bad, 0o644)
        assert message in line_with(served, "the revocation list stays as it was")
        assert call(served, "GetJobStatus", pb.GetStatusRequest(id=ID))[0] == "PERMISSION_DENIED"
        assert call(served, "GetJobStatus", pb.GetStatusRequest(id=ID), role="user2")[0] == "NOT_FOUND"
    if bad is not None:
        one_sentence(serve_once(folder, state), message)


def test_a_new_certificate_of_a_revoked_name_works_and_owns_the_old_jobs(state, certs, tmp_path):
    folder = own_folder(certs, tmp_path)
    run_in_folder(folder, "identity", "alice")
    with serving(state, folder, stderr=subprocess.PIPE) as served:
        job = served.start("id", "-u", role="alice")
        uid = served.run("stream", job, role="alice").stdout
        run_in_folder(folder, "revoke", "alice")
        line_with(served, "the revocation list is read again")
        one_sentence(served.run("status", job, role="alice"), "is revoked")
        run_in_folder(folder, "identity", "alice")
        assert served.run("stream", job, role="alice").stdout == uid
        assert served.run("stream", served.start("id", "-u", role="alice"), role="alice").stdout == uid


def test_an_identity_that_does_not_fit_on_the_disk_leaves_nothing_and_keeps_the_old_one(certs, tmp_path):
    folder = own_folder(certs, tmp_path)
    run_in_folder(folder, "identity", "alice")
    before = contents(folder)
    for fits in ("key", "nothing"):
        room = len(before["alice.key"][0]) if fits == "key" else 0

        def little_room(room=room):
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

        words = [sys.executable, "-c", WRITES_PAIR, str(HERE), str(folder)]
        done = subprocess.run(
            words, preexec_fn=little_room, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        assert "cannot write" in done.stdout, done.stderr
        assert contents(folder) == before


WRITES_PAIR = """
import pathlib, sys
sys.path.insert(0, sys.argv[1])
sys.dont_write_bytecode = True
import jobworker
folder = pathlib.Path(sys.argv[2])
try:
    jobworker.write_pair(folder, "alice", jobworker.issue_identity(jobworker.load_authority(folder, "client-ca"), "alice", ["user"]))
except jobworker.JobWorkerError as error:
    print(error)
"""


def test_a_revocation_that_is_not_possible_is_refused_in_one_sentence(certs, tmp_path):
    folder = own_folder(certs, tmp_path)
    served = Served(None, 0, folder)
    one_sentence(served.run("revoke", "stranger"), "no certificate of 'stranger'", "identity --list")
    one_sentence(served.run("revoke", str(folder / "server.pem")), "is not from the authority")
    (folder / "client-ca.key").unlink()
    one_sentence(served.run("revoke", "user"), "client-ca.key is missing")
    assert not (folder / "client-crl.pem").exists()


def test_an_expired_certificate_ends_an_open_stream(shared):
    identity = certificate(jobworker.load_authority(shared.certs, "client-ca"), days=5 / 86400)
    with open_stream(shared, identity=identity) as (chunks, job):
        assert stream_failure(chunks) == (
            "PERMISSION_DENIED",
            "the client's certificate, or an authority behind it, is out of date",
        )
        assert call(shared, "StopJob", pb.StopJobRequest(id=job), role="admin") == pb.StopJobResponse()


def test_a_reload_without_an_authority_ends_the_streams_of_its_clients(state, certs, tmp_path):
    folder = own_folder(certs, tmp_path)
    second = jobworker.issue_authority("second")
    jobworker.write_pair(folder, "new", jobworker.issue_identity(second, "new", ["user"]))
    both = (folder / "client-ca.pem").read_bytes() + second.certificate_pem()
    (folder / "client-ca.pem").write_bytes(both)
    with (
        serving(state, folder, stderr=subprocess.PIPE) as served,
        open_stream(served) as (chunks, _),
        open_stream(served, "new") as (others, other),
    ):
        (folder / "client-ca.pem").write_bytes(second.certificate_pem())
        assert "are read again" in reload(served)
        status, sentence = stream_failure(chunks)
        assert (status, "not from an authority" in sentence) == ("PERMISSION_DENIED", True)
        assert call(served, "StopJob", pb.StopJobRequest(id=other), role="new") == pb.StopJobResponse()
        assert list(others) == []


def table_of(text):
    """The rows of a printed table, each a dictionary by column."""
    head, *rows = (re.split(r"  +", line.strip()) for line in text.splitlines())
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_identities_are_listed_with_roles_serials_days_and_revocation(certs, tmp_path):
    folder = own_folder(certs, tmp_path)
    run_in_folder(folder, "identity", "alice", "--days", "10")
    run_in_folder(folder, "revoke", "user2")
    run_in_folder(folder, "revoke", "00:11:22:33:44")
    rows = table_of(run_in_folder(folder, "identity", "--list"))
    by_name = {row["NAME"]: row for row in rows}
    assert {name: (row["ROLES"], row["REVOKED"]) for name, row in by_name.items()} == {
        "user": ("user", "no"), "admin": ("admin", "no"), "user2": ("user", utc_day()), "alice": ("user", "no"),
        "-": ("-", utc_day()),
    }  # fmt: skip
    assert by_name["alice"]["SERIAL"] == serial_of(folder, "alice")
    assert by_name["-"]["SERIAL"] == "11223344"
    today = datetime.datetime.now(datetime.timezone.utc).date()
    assert by_name["alice"]["UNTIL"] == str(today + datetime.timedelta(days=10))


def test_a_renewed_identity_has_a_new_key_and_serial_the_same_roles_and_can_be_revoked_with_the_old(
    state, certs, tmp_path
):
    folder = own_folder(certs, tmp_path)
    run_in_folder(folder, "identity", "chief", "--admin")
    old = key_and_certificate(folder, "chief")
    run_in_folder(folder, "identity", "chief", "--renew")
    new = key_and_certificate(folder, "chief")
    assert old[0] != new[0]
    rows = [row for row in table_of(run_in_folder(folder, "identity", "--list")) if row["NAME"] == "chief"]
    assert len({row["SERIAL"] for row in rows}) == 2
    assert {row["ROLES"] for row in rows} == {"admin"}
    with serving(state, folder) as served:
        for pair in (old, new):
            assert call(served, "GetJobStatus", pb.GetStatusRequest(id=ID), pair)[0] == "NOT_FOUND"
        run_in_folder(folder, "revoke", "chief")
        for pair in (old, new):
            until(lambda: call(served, "GetJobStatus", pb.GetStatusRequest(id=ID), pair)[0] == "PERMISSION_DENIED")  # noqa: B023


@pytest.mark.parametrize(("words", "status", "message"), [
    (("identity", "user2"), 1, "`identity user2 --renew`"), (("identity", "stranger", "--renew"), 1, "no certificate of 'stranger'"),
    (("identity", "x", "--days", "0"), 2, "from 1 to 3650"), (("identity", "x", "--days", "9999"), 2, "from 1 to 3650"),
    (("identity",), 2, "`identity` needs a NAME"), (("identity", "issued"), 2, "cannot name"), (("identity", "client-crl"), 2, "cannot name"),
    (("identity", "server", "--renew"), 2, "cannot name"),
], ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")  # fmt: skip
def test_an_identity_that_cannot_be_made_is_refused_in_one_sentence(certs, tmp_path, words, status, message):
    folder = own_folder(certs, tmp_path)
    before = contents(folder)
    one_sentence(Served(None, 0, folder).run(*words), message, status=status)
    assert contents(folder) == before


def test_the_identities_of_the_folder_itself_can_be_renewed(certs, tmp_path):
    folder = own_folder(certs, tmp_path)
    before = serial_of(folder, "user")
    run_in_folder(folder, "identity", "user", "--renew")
    assert serial_of(folder, "user") != before
    assert {before, serial_of(folder, "user")} <= {
        row["SERIAL"] for row in table_of(run_in_folder(folder, "identity", "--list"))
    }


def shorten_server_certificate(folder, days):
    """Replace server.pem by one that ends in some days."""
    authority = jobworker.load_authority(folder, "server-ca")
    names = [(x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.DNSName("box.example")]), False)]
    basics = jobworker.leaf_extensions(x509.oid.ExtendedKeyUsageOID.SERVER_AUTH)
    jobworker.write_pair(folder, "server", jobworker.issue("old", days, authority, [*basics, *names]))


@pytest.mark.parametrize("days", [-0.5, 1, 29.9])
def test_serve_renews_its_certificate_at_a_start_with_the_same_names_and_key(state, certs, tmp_path, days):
    folder = own_folder(certs, tmp_path)
    shorten_server_certificate(folder, days)
    key = (folder / "server.key").read_bytes()
    with serving(state, folder, stderr=subprocess.PIPE) as served:
        assert served.run("status", ID).stderr == f"jobworker: there is no job {ID}\n"
        assert "made a new" in line_with(served, "server.pem")
    assert names_in_server_certificate(folder) == {"localhost", "box.example"}
    assert (folder / "server.key").read_bytes() == key
    made = x509.load_pem_x509_certificate((folder / "server.pem").read_bytes())
    assert not jobworker.ends_soon(made)


def test_serve_renews_its_certificate_while_it_runs(state, certs, tmp_path):
    folder = own_folder(certs, tmp_path)
    shorten_server_certificate(folder, 30 + 4 / 86400)
    before = (folder / "server.pem").read_text().strip()
    with serving(state, folder, stderr=subprocess.PIPE) as served, open_stream(served) as (chunks, job):
        assert "made a new" in line_with(served, "server.pem")
        until(lambda: presented_certificate(served) == (folder / "server.pem").read_text().strip() != before)
        assert call(served, "StopJob", pb.StopJobRequest(id=job)) == pb.StopJobResponse()
        assert list(chunks) == []


def test_a_server_that_cannot_renew_its_certificate_warns_before_the_end(state, certs, tmp_path):
    folder = own_folder(certs, tmp_path)
    shorten_server_certificate(folder, 20)
    (folder / "server-ca.key").unlink()
    before = (folder / "server.pem").read_bytes()
    with serving(state, folder, stderr=subprocess.PIPE) as served:
        assert "is valid until" in line_with(served, f"warning: a certificate in {folder}/server.pem")
    assert (folder / "server.pem").read_bytes() == before


def bundle_for(folder, name, server, *words):
    """The one file that `identity NAME --bundle` prints."""
    done = Served(None, 0, folder).run("identity", name, "--bundle", server, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_client_alone(folder, *words, umask=0o077, script='exec "$@"', **more):
    """Run a client in this folder, without a variable that names a server or certificates."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("JOBWORKER_")}
    return subprocess.run(
        ["sh", "-c", script, "sh", *PROGRAM, *words], cwd=folder, env={**kept, "HOME": str(folder), **more}, umask=umask,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip


def test_a_client_is_enrolled_by_one_command_and_needs_one_file(shared, tmp_path):
    server = own_folder(shared.certs, tmp_path)
    home = tmp_path / "empty"
    home.mkdir()
    line = f'"$@" identity alice --certs {server} --bundle {shared.address} > box.pem'
    done = run_client_alone(home, script=line)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert {path.name for path in home.iterdir()} == {"box.pem"}
    assert not list(server.glob("alice*"))
    assert set(re.findall("-----BEGIN (.*)-----", (home / "box.pem").read_text())) == {"PRIVATE KEY", "CERTIFICATE"}
    started = run_client_alone(home, "start", "-r", "box.pem", "echo", "hers")
    assert (started.returncode, started.stderr) == (0, "")
    job = started.stdout.split()[-1]
    assert run_client_alone(home, "stream", job, JOBWORKER_IDENTITY="./box.pem").stdout == "hers\n"
    assert call(shared, "GetJobStatus", pb.GetStatusRequest(id=job), role="admin").owner == "alice"
    elsewhere = run_client_alone(home, "status", job, "-r", "./box.pem", "--server", "localhost:1")
    one_sentence(elsewhere, "cannot connect to localhost:1")
    run_in_folder(server, "revoke", str(home / "box.pem"))
    rows = table_of(run_in_folder(server, "identity", "--list"))
    (revoked,) = [row["REVOKED"] for row in rows if row["NAME"] == "alice"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", revoked)


def test_a_bundle_names_its_server_is_renewed_and_warns_of_a_server_without_that_name(certs, tmp_path):
    folder = own_folder(certs, tmp_path)
    done = Served(None, 0, folder).run("identity", "alice", "--bundle")
    assert done.stdout.startswith(f"# jobworker server: {socket.gethostname()}:8010\n")
    done = Served(None, 0, folder).run("identity", "alice", "--renew", "--bundle", "other.example:8011")
    assert done.stdout.startswith("# jobworker server: other.example:8011\n")
    assert "server.pem is not for 'other.example'; `serve --name other.example`" in done.stderr
    assert done.stderr.count("\n") == 1
    assert "[::1]:8010" in bundle_for(folder, "bob", "::1")


UNUSABLE_BUNDLES = [  # the fault; a function that gives the file this fault; part of the error
    ("no key", lambda text: re.sub("-----BEGIN PRIVATE.*END PRIVATE KEY-----", "", text, flags=re.DOTALL), "is no file of an identity"),
    ("empty", lambda _: "", "is no file of an identity"),
    ("no authority", lambda text: text[: text.index("-----END CERT") + 26], "is no file of an identity"),
    ("a certificate that is none", lambda text: re.sub("(CERTIFICATE-----\n)M[^-]*(-----END CERTIFICATE-----\n)$", r"\1AAAA\n\2", text), "cannot be read"),
    ("a wrong address", lambda text: text.replace("server: ", "server: a:b:c:"), "the server's address in"),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "spoil", "message"), UNUSABLE_BUNDLES, ids=[row[0] for row in UNUSABLE_BUNDLES])
def test_the_error_for_an_unusable_bundle_is_one_sentence_that_names_it(certs, tmp_path, fault, spoil, message):
    text = bundle_for(own_folder(certs, tmp_path), "alice", "localhost")
    assert spoil(text) != text
    (tmp_path / "box.pem").write_text(spoil(text))
    (tmp_path / "box.pem").chmod(0o600)
    one_sentence(run_client_alone(tmp_path, "status", ID, "-r", "box.pem"), "box.pem", message)


def test_a_bundle_with_a_key_in_openssl_s_older_format_works(shared, tmp_path):
    key = openssl("ec", "-in", shared.certs / "user.key")  # BEGIN EC PRIVATE KEY
    content = key + b"".join((shared.certs / name).read_bytes() for name in ("user.pem", "server-ca.pem"))
    (tmp_path / "box.pem").write_bytes(content)
    (tmp_path / "box.pem").chmod(0o600)
    done = run_client_alone(tmp_path, "status", ID, "-r", "box.pem", JOBWORKER_SERVER=shared.address)
    one_sentence(done, f"there is no job {ID}")


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o660, 0o604])
def test_a_key_that_others_can_read_is_refused_by_client_and_server_with_the_remedy(state, shared, tmp_path, mode):
    folder = own_folder(shared.certs, tmp_path)
    for name in ("user.key", "server.key", "client-ca.key"):
        (folder / name).chmod(mode)
    one_sentence(shared.run("status", ID, "--certs", str(folder)), f"`chmod 600 {folder}/user.key`")
    one_sentence(serve_once(folder, state), f"`chmod 600 {folder}/server.key`")
    one_sentence(shared.run("identity", "x", "--certs", str(folder)), f"`chmod 600 {folder}/client-ca.key`")
    (folder / "client-ca.key").chmod(0o600)
    (tmp_path / "box.pem").write_text(bundle_for(folder, "alice", shared.address))
    (tmp_path / "box.pem").chmod(mode)
    one_sentence(run_client_alone(tmp_path, "status", ID, "-r", "box.pem"), "`chmod 600 box.pem`")
    (tmp_path / "box.pem").chmod(0o600)
    one_sentence(run_client_alone(tmp_path, "status", ID, "-r", "box.pem"), f"there is no job {ID}")


@pytest.mark.parametrize(("days", "warned"), [(20, True), (29, True), (40, False)])
def test_a_client_warns_once_for_each_call_before_its_certificate_ends(shared, tmp_path, days, warned):
    folder = own_folder(shared.certs, tmp_path)
    (tmp_path / "box.pem").write_text(bundle_for(folder, "alice", shared.address, "--days", str(days)))
    (tmp_path / "box.pem").chmod(0o600)
    printed = run_client_alone(tmp_path, "status", ID, "-r", "box.pem").stderr.splitlines()
    end = datetime.datetime.now(datetime.timezone.utc).date() + datetime.timedelta(days=days)
    warning = f"jobworker: warning: the certificate in box.pem is valid until {end}; on the server, `identity NAME --renew` makes a new one"
    assert printed == [*([warning] if warned else []), f"jobworker: there is no job {ID}"]


DANGEROUS = "".join(
    map(chr, [*range(32), *range(127, 160), 0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)])
)


def test_no_control_character_is_printable():
    assert not set(jobworker.printable(DANGEROUS)) & set(DANGEROUS)
    assert not set(jobworker.printable_json({"name": DANGEROUS})) & (set(DANGEROUS) - {"\n"})
    assert json.loads(jobworker.printable_json([DANGEROUS])) == [DANGEROUS]
    assert jobworker.printable("ünï☃ \U0001f600") == "ünï☃ \U0001f600"


class Hostile(grpc.GenericRpcHandler):
    """A server whose replies contain control characters."""

    def service(self, details):
        reply = {
            "StartJob": pb.StartJobResponse(ID=DANGEROUS),
            "GetJobStatus": pb.GetStatusResponse(status=7, owner=DANGEROUS, reason=DANGEROUS, cmd="\x1b]0;owned\x07"),
        }.get(details.method.rsplit("/", 1)[1])

        def handle(_, context):
            if reply is None:
                context.abort(grpc.StatusCode.INTERNAL, DANGEROUS.replace("\0", ""))
            return reply

        return grpc.unary_unary_rpc_method_handler(
            handle, response_serializer=lambda message: message.SerializeToString()
        )


@pytest.mark.parametrize(("words", "status"), [(("status", ID), 0), (("status", "--json", ID), 0), (("stop", ID), 1), (("start", "x"), 0), (("rm", ID), 1)],
                         ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")  # fmt: skip
def test_control_characters_from_a_hostile_server_are_escaped(certs, words, status):
    pair = key_and_certificate(certs, "server")
    credentials = grpc.ssl_server_credentials([pair], (certs / "client-ca.pem").read_bytes(), True)
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        server = grpc.server(threads, handlers=[Hostile()])
        port = server.add_secure_port("127.0.0.1:0", credentials)
        server.start()
        done = Served(None, port, certs).run(*words)
        server.stop(None).wait()
    assert done.returncode == status, done.stderr
    assert not (set(done.stdout) | set(done.stderr)) & (set(DANGEROUS) - {"\n"})
    assert "Traceback" not in done.stderr
    if words[0] == "status":
        assert "UNKNOWN(7)" in done.stdout


def test_the_unit_s_python_runs_no_code_that_its_environment_names(state, certs, tmp_path):
    lines = unit(
        "--", "--certs", str(certs), "--state", str(state), "--listen", "127.0.0.1:0", "--without", "auto"
    ).splitlines()
    command = shlex.split(next(line for line in lines if line.startswith("ExecStart=")).removeprefix("ExecStart="))
    assert command[1] == "-I"
    (tmp_path / "sitecustomize.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / "grpc.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    process = subprocess.Popen([*command, "--stop-jobs"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)  # fmt: skip
    assert process.stdout.readline().startswith("jobworker: serving on ")
    process.terminate()
    process.communicate(timeout=PATIENCE)
    assert not (tmp_path / "ran").exists()


# --- Command line ---------------------------------------------------------------------------------------
# Options, errors, and the lines and exit codes that scripts rely on.

UUID = "[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"


def test_start_stop_status_stream_and_rm_print_the_lines_that_scripts_rely_on(shared):
    done = shared.run("start", "-c", "sh", "-args", "-c", "echo hello; exit 3")
    assert re.fullmatch(f"started JobID: {UUID}\n", done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    job = done.stdout.split()[-1]
    done = shared.run("stream", "-j", job)
    assert (done.returncode, done.stdout, done.stderr) == (0, "hello\n", "")
    done = shared.run("status", "-j", job)
    assert (done.returncode, done.stdout) == (0, f"jobID: {job}, status: FINISHED, exitCode: 3\n")
    done = shared.run("stop", "-j", job)
    assert (done.returncode, done.stdout) == (0, f"stopped Job: {job}\n")
    assert shared.run("status", job).stdout == f"jobID: {job}, status: FINISHED, exitCode: 3\n"
    running = shared.start("-c", "sleep", "-args", "1000")
    assert shared.run("status", running).stdout == f"jobID: {running}, status: RUNNING, exitCode: 0\n"
    assert shared.run("stop", running).stdout == f"stopped Job: {running}\n"
    assert shared.run("status", running).stdout == f"jobID: {running}, status: STOPPED, exitCode: 137\n"
    assert shared.run("rm", job, running).stdout == f"removed Job: {job}\nremoved Job: {running}\n"
    assert shared.run("status", running).returncode == 1


COMMAND_LINES = [  # the words after `start`; what the job prints
    (("-c", "printf", "-args", "%s|", "-c", "--json", "-args", "--", "-j"), "-c|--json|-args|--|-j|"),
    (("-c", "sh", "-args", "-c", "for i in 1 2; do echo $i; done"), "1\n2\n"),
    (("--timeout", "60", "-c", "echo"), "\n"),
    (("-c", "echo", "-args"), "\n"),
    (("--", "printf", "%s|", "--help", "-args", "", "a b", "$HOME", "ünï☃"), "--help|-args||a b|$HOME|ünï☃|"),
    (("--timeout=60", "--", "echo", "--"), "--\n"),
    (("printf", "%s|", "-l", "--json", "--help", "--", "-args", "-c"), "-l|--json|--help|--|-args|-c|"),
    (("--timeout", "60", "--memory=64M", "printf", "%s|", "--timeout", "1"), "--timeout|1|"),
    (("-r", "user", "--id", "", "echo", "-n", "user"), "user"),
    (("sh", "-c", "echo $0", "--", "x"), "--\n"),
    (("ls", "-d", "/"), "/\n"),
]


@pytest.mark.parametrize(("words", "expected"), COMMAND_LINES)
def test_the_words_after_the_command_are_passed_on_verbatim(shared, words, expected):
    assert shared.run("stream", shared.start(*words)).stdout == expected


WRONG_USAGE = [
    ("no-such-verb",),
    ("start",),
    ("start", "--"),
    ("start", "--no-such-option", "--", "true"),
    ("start", "--memory", "much", "--", "true"),
    ("status",),
    ("status", "-j", ID, ID2),
    ("status", "-j", ""),
    ("status", ""),
    ("status", "--json", "-j", ""),
    ("stream", "-j", ""),
    ("stream", ""),
    ("stop", "-j", ""),
    ("stop", ""),
    ("rm", ""),
    ("rm", ID, ""),
    ("stream", "--server", "host:port:port/"),
    ("serve", "--without", "gravity"),
    ("serve", "--cpu", "0"),
    ("serve", "--max-memory", "0"),
    ("serve", "--max-jobs", "0"),
    ("serve", "--max-output", "0"),
    ("serve", "--reserve", "200%"),
    ("identity", "a/b"),
    ("rm",),
]


@pytest.mark.parametrize("words", WRONG_USAGE, ids=" ".join)
def test_wrong_usage_is_one_sentence_and_exit_status_2(shared, words):
    one_sentence(shared.run(*words), status=2)


@pytest.mark.parametrize("words", WRONG_USAGE, ids=" ".join)
def test_the_error_for_wrong_usage_names_the_help_of_its_verb(shared, words):
    program = f"jobworker.pyz {words[0]}" if words[0] in jobworker.VERBS else "jobworker.pyz"
    assert f"`{program} --help`" in shared.run(*words).stderr


def test_a_command_line_without_words_prints_the_help(shared):
    done = shared.run()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: jobworker.pyz")
    assert done.stdout == shared.run("--help").stdout


@pytest.mark.parametrize(
    ("flags", "variables"), [(("-OO",), {}), ((), {"PYTHONOPTIMIZE": "2"})], ids=["-OO", "variable"]
)
def test_every_verb_works_in_an_optimized_python(state, tmp_path, flags, variables):
    """`python -OO` and PYTHONOPTIMIZE=2 remove docstrings and assertions."""
    program, environment = (sys.executable, *flags, str(HERE / "jobworker.py")), {**os.environ, **variables}
    for words in ((), *((verb,) for verb in jobworker.VERBS)):
        done = subprocess.run(
            [*program, *words, "--help"], env=environment, capture_output=True, text=True, timeout=PATIENCE, check=True
        )
        assert done.stdout.startswith(" ".join(["usage: jobworker.pyz", *words]))
    folder = tmp_path / "certs"
    with serving(state, folder, program=program, env=environment) as served:

        def run(*words):
            variables_of_client = {"JOBWORKER_SERVER": served.address, "JOBWORKER_CERTS": str(folder)}
            done = served.run(*words, program=program, env={**environment, **variables_of_client})
            assert (done.returncode, done.stderr) == (0, "")
            return done.stdout

        job = run("start", "--", "sh", "-c", "echo hello; exit 3").split()[-1]
        assert run("stream", job) == "hello\n"
        assert run("status", job) == f"jobID: {job}, status: FINISHED, exitCode: 3\n"
        assert json.loads(run("status", "--json", job))["exitCode"] == 3
        running = run("start", "--", "sleep", "1000").split()[-1]
        assert run("stop", running) == f"stopped Job: {running}\n"
        assert run("rm", job) == f"removed Job: {job}\n"
        assert "alice.pem" in run("identity", "alice")
        assert "ExecStart=" in run("unit")


@pytest.mark.parametrize("verb", [*jobworker.VERBS, None])
def test_help_shows_the_usage_of_a_verb_and_names_all_verbs(capsys, verb):
    assert jobworker.main([*([verb] if verb else []), "--help"]) == 0
    printed = capsys.readouterr().out
    assert "usage: jobworker.pyz" in printed
    assert all(name in printed for name in ([] if verb else jobworker.VERBS))


def test_status_json_holds_the_whole_status(shared):
    job = shared.start("--timeout", "1m", "--", "sh", "-c", "echo four; kill -TERM $$")
    shared.run("stream", job)
    facts = json.loads(shared.run("status", "--json", job).stdout)
    assert (facts["status"], facts["exitCode"], facts["signal"], facts["reason"]) == ("FINISHED", 143, 15, None)
    assert facts["command"] == ["sh", "-c", "echo four; kill -TERM $$"]
    assert (facts["owner"], facts["outputBytes"], facts["limits"]["timeout"]) == ("user", 5, 60)
    assert facts["created"] <= facts["started"] <= facts["ended"]


def test_control_c_ends_a_client_without_a_message_and_does_not_end_its_job(shared):
    job = shared.start("--", "sh", "-c", WAITS)
    client = shared.popen("stream", job, stderr=subprocess.PIPE)
    assert client.stdout.readline() == b"ready\n"
    client.send_signal(signal.SIGINT)
    assert client.communicate(timeout=PATIENCE) == (b"", b"")
    assert client.returncode == 130
    assert "RUNNING" in shared.run("status", job).stdout
    shared.run("stop", job)


def test_a_closed_pipe_ends_a_client_without_a_message(shared):
    job = shared.start("--", "yes")
    client = shared.popen("stream", job, stderr=subprocess.PIPE)
    assert client.stdout.read(4) == b"y\ny\n"
    client.stdout.close()
    assert client.stderr.read() == b""
    client.stderr.close()
    assert client.wait(PATIENCE) == 128 + signal.SIGPIPE
    shared.run("stop", job)


def test_binary_output_arrives_unchanged(shared):
    job = shared.start("--", PYTHON, "-c", WRITES_BYTES, "300000")
    with shared.popen("stream", job) as client:
        assert client.stdout.read() == random.Random(7).randbytes(300_000)


@pytest.mark.parametrize(("text", "expected"), [
    ("box", ("box", 8010)), ("box:1", ("box", 1)), (":9", ("", 9)), ("[::1]:7", ("::1", 7)), ("::1", ("::1", 8010)), ("10.0.0.1:80", ("10.0.0.1", 80)),
])  # fmt: skip
def test_an_address_is_a_host_and_a_port(text, expected):
    assert jobworker.host_and_port(text) == expected


@pytest.mark.parametrize(("convert", "text", "value"), [
    (jobworker.as_bytes, "512M", 512 * MIB), (jobworker.as_bytes, "1.5G", 3 << 29), (jobworker.as_bytes, "10k", 10 * KIB), (jobworker.as_bytes, "7", 7),
    (jobworker.as_bytes, "1GiB", 1 << 30), (jobworker.as_seconds, "90", 90), (jobworker.as_seconds, "10s", 10), (jobworker.as_seconds, "10m", 600),
    (jobworker.as_seconds, "7d", 604800), (jobworker.as_cpus, "0.5", 0.5), (jobworker.as_share, "5%", 0.05), (jobworker.as_share, "0.1", 0.1),
])  # fmt: skip
def test_sizes_durations_and_shares_may_have_units(convert, text, value):
    assert convert(text) == value


def test_the_folder_certs_here_is_used_only_if_no_other_user_can_have_made_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    elsewhere = Path("/etc/jobworker") if os.geteuid() == 0 else tmp_path / "config" / "jobworker"
    assert jobworker.default_certs() == elsewhere
    (tmp_path / "certs").mkdir(mode=0o755)
    assert jobworker.default_certs() == Path("certs")
    (tmp_path / "certs").chmod(0o777)
    assert jobworker.default_certs() == elsewhere
    if os.geteuid() == 0:
        (tmp_path / "certs").chmod(0o755)
        os.chown(tmp_path / "certs", 12345, 12345)
        assert jobworker.default_certs() == elsewhere


REFUSED_STARTS = [  # the words after `start`; the exit status; words of the error
    (("--", "no-such-command"), 1, (jobworker.JOB_PATH,)),
    (("-c", "echo a; sleep 1"), 1, ("'echo a; sleep 1' is not found", "`sh -c`")),
    (("echo a | cat",), 1, ("is not found", "`sh -c`")),
    (("/bin/ls -la",), 1, ("'/bin/ls -la' is not found", "`sh -c`")),
    (("--", "/etc"), 1, ("folder",)),
    (("--", "/etc/passwd"), 1, ("not executable",)),
    (("--", ""), 1, ("empty",)),
    (("-c", ""), 1, ("empty",)),
    (("--", "true", b"\xff\xfe"), 2, ("UTF-8",)),
    (("--", b"\xff"), 2, ("UTF-8",)),
    (("--id", "me", "--", "true"), 1, ("not a job id",)),
    (("--id", ID.upper(), "--", "true"), 1, ("lower case",)),
    (("--run-as", "root", "--", "true"), 1, ("admin",)),
    (("--memory", "1T", "--", "true"), 1, ("max-memory",)),
    (("-args", "x", "-c", "true"), 2, ("needs `-c COMMAND` before it",)),
    (("-c",), 2, ("-c",)),
    (("-r", "nobody-s", "--", "true"), 1, ("nobody-s", "-r NAME")),
    (("--server", ":1", "--", "true"), 1, ("localhost:1",)),
    (("--server", "..", "--", "true"), 1, ("there is no host '..'",)),
    (("--server", "a" * 70 + ".invalid", "--", "true"), 1, ("there is no host",)),
    (("--certs", "/nowhere", "--", "true"), 1, ("/nowhere/server-ca.pem",)),
    (("--run-as", b"\xff", "--", "true"), 2, ("UTF-8",)),
    (("--id", b"\xff", "--", "true"), 2, ("UTF-8",)),
    (("--memory", "99999999T", "--", "true"), 2, ("--memory", "too large")),
    (("--pids", "9" * 400, "--", "true"), 2, ("--pids", "too large")),
    (("--timeout", "9" * 400, "--", "true"), 2, ("--timeout", "too large")),
    (("--cpu", "-1", "--", "true"), 2, ("--cpu",)),
]


@pytest.mark.parametrize(("words", "status", "expected"), REFUSED_STARTS, ids=repr)
def test_a_refused_start_is_one_sentence_with_its_exit_status(shared, words, status, expected):
    one_sentence(shared.run("start", *words), *expected, status=status)


@pytest.mark.parametrize("words", [("stop",), ("status",), ("status", "--json"), ("stream",), ("rm",)], ids=" ".join)
def test_every_verb_has_the_same_error_for_an_unknown_job(shared, words):
    assert shared.run(*words, ID2).stderr == f"jobworker: there is no job {ID2}\n"
    one_sentence(shared.run(*words, ID2))
    one_sentence(shared.run(*words, ID2.upper()), "lower case")
    foreign = shared.start("--", "true", role="user2")
    one_sentence(shared.run(*words, foreign), f"there is no job {foreign}")


def test_rm_refuses_a_running_job(shared):
    job = shared.start("--", "sleep", "1000")
    one_sentence(shared.run("rm", job), "stop it first")
    assert shared.run("stop", job, role="admin").stdout == f"stopped Job: {job}\n"


def test_the_output_of_a_shell_loop_arrives_while_it_runs(shared):
    words = ("-c", "sh", "-args", "-c", "while true; do date; sleep 1; done")
    job = shared.start(*words)
    with shared.popen("stream", "-j", job) as client:
        assert re.search(rb"\d\d:\d\d:\d\d", client.stdout.readline())
        assert client.stdout.readline()
        assert json.loads(shared.run("status", "--json", "-j", job).stdout)["command"] == ["sh", *words[3:]]
        assert shared.run("stop", "-j", job).returncode == 0
        client.stdout.read()
        assert client.wait(PATIENCE) == 0


@pytest.mark.parametrize("words", [
    ("status", "-j", "{id}", "--server", "{server}", "--certs", "{certs}", "-r", "user2"), ("status", "--server={server}", "--certs={certs}", "--identity=user2", "-j{id}"),
    ("status", "{id}", "-r", "user2", "--certs", "{certs}", "--server", "{server}"), ("status", "-ruser2", "--certs", "{certs}", "--server", "{server}", "{id}"),
], ids=" ".join)  # fmt: skip
def test_common_options_may_stand_anywhere_after_the_verb_and_override_the_environment(shared, words):
    job = shared.start("--", "true", role="user2")
    shared.run("stream", job, role="user2")
    filled = [word.format(id=job, server=shared.address, certs=shared.certs) for word in words]
    elsewhere = {**os.environ, "JOBWORKER_SERVER": "localhost:1", "JOBWORKER_CERTS": "/nowhere"}
    done = subprocess.run(
        [*PROGRAM, *filled], env=elsewhere, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (done.stdout, done.stderr) == (f"jobID: {job}, status: FINISHED, exitCode: 0\n", "")


def test_an_empty_variable_or_option_counts_as_not_given(shared, tmp_path):
    """`--certs "$UNSET"` does not mean the working directory."""
    empty = {
        "JOBWORKER_SERVER": "",
        "JOBWORKER_CERTS": "",
        "HOME": str(tmp_path),
        "XDG_CONFIG_HOME": "",
        "PATH": os.environ["PATH"],
    }
    user = [] if os.geteuid() else ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"]
    program = f"import sys; sys.path.insert(0, {str(HERE)!r}); import jobworker; sys.exit(jobworker.main())"
    for words in (("status", ID), ("status", "--certs", "", ID)):
        done = subprocess.run(
            [*user, PYTHON, "-c", program, *words],
            env=empty,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        one_sentence(done, f"cannot read {tmp_path}/.config/jobworker/server-ca.pem")


def test_a_wrong_variable_is_wrong_usage_in_one_sentence(shared):
    one_sentence(shared.run("status", ID, env={**os.environ, "JOBWORKER_SERVER": "x:y:z"}), "x:y:z", status=2)


def test_start_with_the_same_id_starts_one_job(shared):
    job = jobworker.new_job_id()
    for _ in range(2):
        assert shared.run("start", "--id", job, "--", "echo", "once").stdout == f"started JobID: {job}\n"
    one_sentence(shared.run("start", "--id", job, "--", "echo", "twice"), "taken")
    assert shared.run("stream", job).stdout == "once\n"
    assert shared.run("stream", "--offset", "2", job).stdout == "ce\n"


STATUS_KEYS = {"id", "status", "exitCode", "reason", "signal", "stoppedBy", "owner", "command", "user", "confined", "created", "started", "ended", "outputBytes",
         "usage", "limits", "notes"}  # fmt: skip


def test_status_json_always_has_every_key(shared):
    job = shared.start("--", "sleep", "1000")
    running = json.loads(shared.run("status", "--json", job).stdout)
    shared.run("stop", job, role="admin")
    stopped = json.loads(shared.run("status", "--json", job).stdout)
    for facts in (running, stopped):
        assert set(facts) >= STATUS_KEYS
        assert set(facts["usage"]) >= {"cpuSeconds", "memoryPeak", "readBytes", "writtenBytes"}
        assert set(facts["limits"]) >= {"cpu", "memory", "pids", "io", "timeout", "maxOutput"}
    assert (running["status"], running["ended"], running["signal"], running["stoppedBy"]) == (
        "RUNNING",
        None,
        None,
        None,
    )
    assert (stopped["status"], stopped["exitCode"], stopped["signal"], stopped["stoppedBy"]) == (
        "STOPPED",
        137,
        9,
        "admin",
    )


@as_root
def test_usage_that_is_unknown_is_a_dash_in_a_list_and_sorts_first(state, certs):
    program = (*NO_CGROUP, *PROGRAM)
    with serving(state, certs, program=program, stderr=subprocess.PIPE) as served:
        ended, running = served.start("true"), served.start("sleep", "1000")
        status_at_end(served, ended)
        rows = [line.split("\t") for line in served.run("list").stdout.splitlines()]
        assert [row[7:9] for row in rows] == [["-", "-"], ["-", "-"]]
        for job in ended, running:
            usage = json.loads(served.run("status", "--json", job).stdout)["usage"]
            assert set(usage.values()) == {None}
        assert served.run("list", "-q", "--sort", "cpu").stdout.split() == [ended, running]
    unknown, least = pb.GetStatusResponse(), pb.GetStatusResponse(cpu_seconds=0)
    assert jobworker.sort_value(unknown, "cpu", None) < jobworker.sort_value(least, "cpu", None)


CONFINED = [  # options of serve, options of a job, whether the job is confined
    ((), (), True),
    ((), ("--run-as", "root"), False),
    ((), ("--run-as", "root", "--confine"), True),
    (("--without", "confine,auto"), (), False),
]


@as_root
@pytest.mark.parametrize(("server", "words", "confined"), CONFINED, ids=str)
def test_serve_and_status_say_whether_a_job_is_confined(state, certs, server, words, confined):
    with serving(state, certs, *server, stderr=subprocess.PIPE) as served:
        job = served.start(*words, "sleep", "1000", role="admin")
        facts = json.loads(served.run("status", "--json", job, role="admin").stdout)
        assert facts["confined"] is confined
        assert ("it is not confined" in " ".join(facts["notes"])) is not confined
        shown = served.run("status", "-v", job, role="admin").stdout
        assert re.search(rf"^confined: +{'yes' if confined else 'no'}$", shown, re.MULTILINE)
        served.process.terminate()
        said = served.process.stderr.read()
    assert ("jobs are confined: " in said) is (server == ())
    assert ("this server it is not confined" in said) is (server != ())


@pytest.mark.parametrize("words", [("stream",), ("status",), ("status", "--json")], ids=" ".join)
def test_the_error_for_a_full_standard_output_is_one_sentence(shared, words):
    job = shared.start("--", "echo", "x")
    shared.run("stream", job)
    done = in_shell(shared, (*words, job), ">/dev/full")
    one_sentence(done, "No space left on device")


def test_a_start_whose_id_cannot_be_printed_names_the_job_in_its_error(shared):
    done = in_shell(shared, ("start", "--", "sleep", "1000"), ">/dev/full")
    one_sentence(done, "started", "No space left on device")
    (job,) = re.findall(UUID, done.stderr)
    assert shared.run("status", job).stdout == f"jobID: {job}, status: RUNNING, exitCode: 0\n"
    assert shared.run("stop", job).returncode == 0


def test_the_hint_at_a_shell_is_given_only_for_a_command_with_a_blank(shared):
    assert "sh -c" not in shared.run("start", "no-such-command").stderr
    assert "sh -c" in shared.run("start", "no such command").stderr


def in_shell(served, words, redirections):
    """Run a client command with a shell's redirections or pipes."""
    environment = {**os.environ, "JOBWORKER_SERVER": served.address, "JOBWORKER_CERTS": str(served.certs)}
    command = f"{shlex.join([*PROGRAM, *words])} {redirections}"
    return subprocess.run(
        ["sh", "-c", command],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("words", [("stream",), ("status",), ("status", "--json"), ("stop",)], ids=" ".join)
def test_a_client_whose_standard_descriptors_are_closed_does_its_work(shared, words, closed):
    """No file or socket that it opens may become its standard output."""
    job = shared.start("--", PYTHON, "-c", WRITES_BYTES.replace("sys.stdout.buffer.write", "print"), "1000")
    shared.run("stream", job)
    done = in_shell(shared, (*words, job), closed)
    assert (done.returncode, done.stderr, done.stdout == "") == (0, "", ">&-" in closed.replace("2>&-", ""))
    failed = in_shell(shared, (*words, ID2), closed)
    assert failed.returncode == 1
    assert failed.stdout == ""


def test_a_reader_that_ends_early_ends_a_client_without_a_message(shared):
    job = shared.start("--", "yes")
    done = in_shell(shared, ("stream", job), "| head -c 10")
    assert (done.returncode, done.stdout, done.stderr) == (0, "y\n" * 5, "")
    shared.run("stop", job)


@pytest.mark.parametrize("verb", jobworker.VERBS)
def test_help_is_printed_on_standard_output_without_a_server(verb):
    done = subprocess.run(
        [*PROGRAM, verb, "--help"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: jobworker.pyz {verb}")


def unit(*words):
    done = subprocess.run(
        [*PROGRAM, "unit", *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize(
    "words", [(), ("--user",), ("--", "--listen", ":8011", "--state", "/srv/my jobs/100% $HOME")], ids=" ".join
)
@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_accepts_the_printed_unit(tmp_path, words):
    file = tmp_path / "jobworker.service"
    file.write_text(unit(*words))
    scope = ["--user"] if "--user" in words else []
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", *scope, file], capture_output=True, text=True, timeout=PATIENCE, check=False,
                          env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)})  # fmt: skip
    assert "jobworker.service" not in done.stderr


def test_the_printed_unit_restarts_the_server_and_not_its_jobs():
    text = unit("--", "--state", "/srv/my jobs/100% $HOME")
    lines = text.splitlines()
    for line in (
        "Type=notify",
        "Restart=always",
        "KillMode=process",
        "ExecReload=/bin/kill -HUP $MAINPID",
        "WantedBy=multi-user.target",
    ):
        assert line in lines
    assert not any(line.startswith("Delegate=") for line in lines)
    assert f'ExecStart={sys.executable} -I {HERE}/jobworker.py serve --state "/srv/my jobs/100%% $$HOME"' in lines
    assert "WantedBy=default.target" in unit("--user").splitlines()


def test_default_folders_are_the_machine_s_for_root_and_the_user_s_own_for_others():
    program = f"import sys; sys.path.insert(0, {str(HERE)!r}); import jobworker; print(jobworker.default_certs(), jobworker.default_state())"
    rows = [(os.geteuid(), {"HOME": "/h"})] if os.geteuid() else [(0, {"HOME": "/h"}), (54321, {"HOME": "/h"}),
        (54321, {"HOME": "/h", "XDG_CONFIG_HOME": "/c", "XDG_STATE_HOME": "/s"}), (54321, {})]  # fmt: skip
    for uid, environment in rows:
        wrapper = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"] if uid != os.geteuid() else []
        done = subprocess.run(
            [*wrapper, PYTHON, "-c", program],
            cwd="/",
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        config, state_home = (environment.get(name, f"{environment.get('HOME', '/')}/{below}".replace("//", "/")) for name, below in
                        (("XDG_CONFIG_HOME", ".config"), ("XDG_STATE_HOME", ".local/state")))  # fmt: skip
        expected = "/etc/jobworker /var/lib/jobworker" if uid == 0 else f"{config}/jobworker {state_home}/jobworker"
        assert done.stdout.strip() == expected, done.stderr


# The verbs run, list, wait and signal; names of jobs, variables, graceful stops.

TRAPS_INT = "trap 'echo interrupted; exit 7' INT; echo ready; while :; do sleep 0.05; done"
IGNORES = "trap '' INT TERM; echo ready; while :; do sleep 0.05; done"
GOES_ON = "trap 'echo noted' INT TERM; echo ready; while :; do sleep 0.05; done"
RUN_CODES = [  # the words after `run`; its exit code; a word on standard error
    (("true",), 0, ""),
    (("sh", "-c", "exit 1"), 1, ""),
    (("sh", "-c", "exit 254"), 254, ""),
    (("no-such-command",), 127, "is not found"),
    (("/etc",), 126, "is a folder"),
    (("sh", "-c", "kill -TERM $$"), 143, ""),
    (("sh", "-c", "kill -KILL $$"), 137, ""),
    (("--timeout", "0.2", "sleep", "1000"), 137, "TIMEOUT"),
    (("--max-output", "1", "sh", "-c", "echo; echo; kill -STOP $$"), 137, "OUTPUT_LIMIT"),
    (("sh", "-c", "kill -KILL $PPID; sleep 1000"), 255, "LOST"),
    (("-r", "nobody-has-this", "true"), 255, "nobody-has-this"),
    (("--server", "localhost:1", "true"), 255, "cannot connect"),
    (("--env-file", "/nonexistent", "true"), 255, "/nonexistent"),
    ((), 2, "needs a command"),
    (("--cpu", "many", "true"), 2, "'many'"),
]


@pytest.mark.parametrize(("words", "code", "word"), RUN_CODES, ids=lambda value: str(value)[:40])
def test_run_exits_with_the_code_of_its_job(state, certs, words, code, word):
    with serving(state, certs) as served:
        if "$PPID" in str(words):  # only root may kill its own shim
            words = ("--run-as", "root", *words)
        done = served.run("run", *words, role="admin" if "root" in words else "user")
    assert (done.returncode, done.stdout.strip()) == (code, "")
    assert word in done.stderr
    assert bool(word) == bool(done.stderr)


def test_run_writes_all_output_and_takes_the_command_as_it_is_typed(shared):
    assert shared.run("run", "ls", "-d", "/").stdout == "/\n"
    assert shared.run("run", "--timeout", "5m", "echo", "--timeout", "--", "-args").stdout == "--timeout -- -args\n"
    with shared.popen("run", PYTHON, "-c", WRITES_BYTES, "300000") as client:
        assert client.stdout.read() == random.Random(7).randbytes(300_000)


@pytest.mark.parametrize(
    ("script", "signals", "code", "expected"),
    [
        (TRAPS_INT, [signal.SIGINT], 7, b"interrupted\n"),
        ("echo ready; exec sleep 1000", [signal.SIGINT], 130, b""),
        ("echo ready; exec sleep 1000", [signal.SIGTERM], 143, b""),
        (GOES_ON, [signal.SIGINT, signal.SIGINT], 137, b""),
        (GOES_ON, [signal.SIGTERM, signal.SIGINT], 137, b""),
    ],
    ids=str,
)
def test_a_signal_to_run_stops_its_job_and_a_second_one_kills_it(state, certs, script, signals, code, expected):
    with serving(state, certs) as served:
        with served.popen("run", "--no-split", "sh", "-c", script, stderr=subprocess.PIPE) as client:
            assert client.stdout.readline() == b"ready\n"
            client.send_signal(signals[0])
            if script == GOES_ON:  # `sh` also says that its `sleep` was terminated
                assert b"noted\n" in iter(client.stdout.readline, b"")
                client.send_signal(signals[1])
            out, err = client.communicate(timeout=PATIENCE)
        assert (client.returncode, err) == (code, b"")
        assert script == GOES_ON or out == expected
        assert [status.status for status in listed(served)] == [pb.STOPPED]


def listed(served, role="user", **request):
    with channel_to(served, role=role) as channel:
        asking = channel.unary_stream(
            f"/{jobworker.SERVICE_NAME}/ListJobs", pb.ListJobsRequest.SerializeToString, pb.GetStatusResponse.FromString
        )
        return list(asking(pb.ListJobsRequest(**request), timeout=PATIENCE))


def test_a_terminal_that_is_closed_ends_run_and_not_its_job(state, certs):
    with serving(state, certs) as served:
        with served.popen("run", "sh", "-c", WAITS, stderr=subprocess.PIPE) as client:
            assert client.stdout.readline() == b"ready\n"
            client.send_signal(signal.SIGHUP)
            _, err = client.communicate(timeout=PATIENCE)
        (job,) = listed(served)
        assert (client.returncode, err) == (129, f"jobworker: job {job.id} goes on\n".encode())
        assert job.status == pb.RUNNING


def test_a_closed_pipe_ends_run_and_its_job(state, certs):
    with serving(state, certs) as served:
        with served.popen("run", "yes", stderr=subprocess.PIPE) as client:
            client.stdout.read(10)
            client.stdout.close()
            assert client.stderr.read() == b""
            assert client.wait(PATIENCE) == 128 + signal.SIGPIPE
        assert [job.status for job in listed(served)] == [pb.STOPPED]


def test_run_resumes_after_its_server_was_killed_and_names_its_job_when_it_gives_up(state, certs):
    with serving(state, certs, end=signal.SIGKILL) as served:
        script = "mkfifo gate; echo before; read line <gate; echo after; exit 6"
        client = served.popen("run", "sh", "-c", script, stderr=subprocess.DEVNULL)
        assert client.stdout.readline() == b"before\n"
        lost = served.popen("run", "--retry-for", "0.1s", "sh", "-c", WAITS, stderr=subprocess.PIPE)
        assert lost.stdout.readline() == b"ready\n"
    with lost:
        _, err = lost.communicate(timeout=PATIENCE)
        assert lost.returncode == 255
        assert re.search(rf"job {UUID} may go on", err.decode())
    with serving(state, certs, port=served.port) as served, client:
        served.run("run", "sh", "-c", "echo go >gate")
        assert client.stdout.read() == b"after\n"
        assert client.wait(PATIENCE) == 6


@contextlib.contextmanager
def run_without_server(state, certs, port, *words):
    """`run` of a job that sleeps. Its server was killed, and `run` has said that it was lost."""
    with contextlib.ExitStack() as stack:
        served = stack.enter_context(killed_at_end(spawn(state, certs, port), certs, port))
        script = ("sh", "-c", "echo ready; exec sleep 1000")
        client = stack.enter_context(served.popen("run", "--no-split", *words, *script, stderr=subprocess.PIPE))
        stack.callback(client.kill)
        assert client.stdout.readline() == b"ready\n"
        (job,) = listed(served)
        end(served.process)
        assert b"was lost" in client.stderr.readline()
        try:
            yield client, job.id
        finally:
            with serving(state, certs):  # it stops the job
                pass


SECOND_SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.mark.parametrize(("second", "code"), SECOND_SIGNALS, ids=str)
def test_a_second_signal_ends_run_at_once_while_its_server_is_away(state, certs, port, second, code):
    with run_without_server(state, certs, port, "--retry-for", "1000s") as (client, job):
        client.send_signal(signal.SIGINT)
        said = client.stderr.readline().decode()
        assert "cannot connect" in said
        assert "Ctrl-C again leaves" in said
        client.send_signal(second)
        assert client.communicate(timeout=PATIENCE) == (b"", f"jobworker: job {job} may go on\n".encode())
        assert client.returncode == code


def test_a_hangup_ends_run_at_once_while_its_server_is_away(state, certs, port):
    with run_without_server(state, certs, port, "--retry-for", "1000s") as (client, job):
        client.send_signal(signal.SIGHUP)
        assert client.communicate(timeout=PATIENCE) == (b"", f"jobworker: job {job} may go on\n".encode())
        assert client.returncode == 129


def test_run_says_that_its_job_may_go_on_if_no_server_comes_to_stop_it(state, certs, port):
    with run_without_server(state, certs, port, "--retry-for", "0.5s") as (client, job):
        client.send_signal(signal.SIGINT)
        _, err = client.communicate(timeout=PATIENCE)
        assert err.decode().endswith(f"; job {job} may go on\n")
        assert client.returncode == 255


def test_a_signal_stops_the_job_of_run_when_its_server_is_back(state, certs, port):
    with contextlib.ExitStack() as stack:
        client, job = stack.enter_context(run_without_server(state, certs, port))
        client.send_signal(signal.SIGINT)
        assert b"Ctrl-C again leaves" in client.stderr.readline()
        served = stack.enter_context(killed_at_end(spawn(state, certs, port), certs, port))
        assert client.communicate(timeout=PATIENCE) == (b"", b"")
        assert client.returncode == 130
        status = status_at_end(served, job)
        assert (status.status, status.exitcode) == (pb.STOPPED, 130)
        end(served.process)


def test_run_can_be_left_while_its_server_does_not_answer(state, certs):
    """A stopped server takes connections, and answers nothing."""
    with serving(state, certs) as served:
        with served.popen("run", "sh", "-c", WAITS, stderr=subprocess.PIPE) as client:
            assert client.stdout.readline() == b"ready\n"
            served.process.send_signal(signal.SIGSTOP)
            try:
                client.send_signal(signal.SIGINT)
                assert b"Ctrl-C again leaves" in client.stderr.readline()
                client.send_signal(signal.SIGINT)
                _, err = client.communicate(timeout=PATIENCE)
            finally:
                served.process.send_signal(signal.SIGCONT)
        assert re.fullmatch(rf"jobworker: job {UUID} may go on\n", err.decode())
        assert client.returncode == 130


async def pass_on_late(reader, writer, delay):
    """Pass on what one side of a connection sends, each part `delay` seconds after it came."""
    loop = asyncio.get_running_loop()
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            loop.call_later(delay, writer.write, data)
    loop.call_later(delay, writer.close)


@contextlib.contextmanager
def far_away(port, delay):
    """A port of this machine from which a server's port is `delay` seconds away, in each direction."""

    async def connect(reader, writer):
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pass_on_late(reader, there_writer, delay), pass_on_late(there_reader, writer, delay))

    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(connect, "127.0.0.1", 0))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(loop.run_forever)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            loop.call_soon_threadsafe(server.close)
            loop.call_soon_threadsafe(loop.stop)
            running.result()
            for task in asyncio.all_tasks(loop):
                task.cancel()
            loop.run_until_complete(asyncio.sleep(0))
            loop.close()


def test_a_signal_stops_the_job_of_a_run_whose_server_is_half_a_second_away(state, certs):
    with serving(state, certs) as served, far_away(served.port, 0.25) as port:
        words = ("run", "--server", f"localhost:{port}", "sh", "-c", WAITS)
        with served.popen(*words, stderr=subprocess.PIPE) as client:
            assert client.stdout.readline() == b"ready\n"
            client.send_signal(signal.SIGINT)
            _, err = client.communicate(timeout=PATIENCE)
        (job,) = listed(served)
        assert (client.returncode, status_at_end(served, job.id).status) == (130, pb.STOPPED), err


@contextlib.contextmanager
def open_stop(served):
    """A stop whose call stays open: its job ignores the signal."""
    other = served.start("--", "sh", "-c", "trap 'echo asked' TERM; echo ready; while :; do sleep 0.05; done")
    with served.popen("stream", other) as stream:
        assert stream.stdout.readline() == b"ready\n"
        with served.popen("stop", "--grace", "1000s", other):
            assert b"asked\n" in iter(stream.stdout.readline, b"")
            yield


def test_run_says_why_its_stop_was_refused_and_that_its_job_goes_on(state, certs):
    with (
        serving(state, certs, "--owner-calls", "2") as served,
        served.popen("run", "sh", "-c", WAITS, stderr=subprocess.PIPE) as client,
    ):
        assert client.stdout.readline() == b"ready\n"
        (job,) = listed(served)
        with open_stop(served), open_stop(served):
            client.send_signal(signal.SIGINT)
            said = client.stderr.readline().decode()
        assert (
            said
            == f"jobworker: 'user' has 2 calls open, and `serve --owner-calls` allows no more; job {job.id} goes on\n"
        )
        until(lambda: served.run("stop", job.id).returncode == 0)
        _, err = client.communicate(timeout=PATIENCE)
        assert client.returncode in (137, 255), err.decode()  # 255: the stream that goes on was refused, too


def test_a_terminal_that_is_closed_during_a_stop_does_not_kill_the_job(state, certs):
    with serving(state, certs) as served:
        script = "trap 'echo noted; until [ -e go ]; do sleep 0.05; done; exit 7' INT; echo ready; while :; do sleep 0.05; done"
        with served.popen("run", "sh", "-c", script, stderr=subprocess.PIPE) as client:
            assert client.stdout.readline() == b"ready\n"
            (job,) = listed(served)
            with served.popen("stream", job.id) as stream:
                client.send_signal(signal.SIGINT)
                assert b"noted\n" in iter(stream.stdout.readline, b"")  # `run` has no answer to its stop now
                client.send_signal(signal.SIGHUP)
                _, err = client.communicate(timeout=PATIENCE)
                served.run("run", "touch", "go")
        assert (client.returncode, err) == (129, f"jobworker: job {job.id} may go on\n".encode())
        status = status_at_end(served, job.id)
        assert (status.status, status.exitcode) == (pb.STOPPED, 7)


@pytest.mark.controllers
def test_run_exits_with_137_and_names_oom(state, certs):
    with serving(state, certs) as served:
        done = served.run("run", "--memory", "64M", PYTHON, "-c", "bytearray(1 << 30)")
    assert (done.returncode, done.stderr) == (137, "jobworker: the job ended with the reason OOM\n")


@contextlib.contextmanager
def in_terminal(served, *words):
    """A client with a terminal of its own, except for standard error. Yields the process and the terminal's other end."""
    master, terminal = pty.openpty()
    take = functools.partial(fcntl.ioctl, 0, jobworker.termios.TIOCSCTTY, 0)
    streams = {"stdin": terminal, "stdout": terminal, "stderr": subprocess.PIPE}
    with (
        os.fdopen(master, "r+b", buffering=0) as screen,
        served.popen(*words, **streams, start_new_session=True, preexec_fn=take) as client,
    ):
        os.close(terminal)
        yield client, screen


def wait_for_screen(screen, text):
    shown = b""
    while text not in shown:
        shown += screen.read(4096)


@pytest.mark.parametrize(
    ("script", "second", "code"),
    [(TRAPS_INT, False, 7), ("echo ready; exec sleep 1000", False, 130), (GOES_ON, True, 137)],
    ids=str,
)
def test_control_c_in_a_terminal_stops_the_job_of_run_and_a_second_one_kills_it(state, certs, script, second, code):
    with serving(state, certs) as served:
        with in_terminal(served, "run", "sh", "-c", script) as (client, screen):
            wait_for_screen(screen, b"ready")
            screen.write(b"\x03")
            if second:
                wait_for_screen(screen, b"noted")
                screen.write(b"\x03")
            assert (client.wait(PATIENCE), client.stderr.read()) == (code, b"")
        assert [job.status for job in listed(served)] == [pb.STOPPED]


@pytest.mark.parametrize("script", [WAITS, "echo ready; seq 100000; exec sleep 1000"], ids=["silent", "blocked"])
def test_run_whose_terminal_vanishes_names_its_job_which_goes_on(state, certs, script):
    with serving(state, certs) as served:
        with in_terminal(served, "run", "sh", "-c", script) as (client, screen):
            wait_for_screen(screen, b"ready")
            screen.close()
            assert client.wait(PATIENCE) == 129
            (job,) = listed(served)
            assert client.stderr.read() == f"jobworker: job {job.id} goes on\n".encode()
        assert job.status == pb.RUNNING


def test_run_whose_output_cannot_be_written_names_its_job_which_goes_on(shared):
    done = in_shell(shared, ("run", "sh", "-c", WAITS), ">/dev/full")
    one_sentence(done, "the output cannot be written: No space left on device", "goes on", status=255)
    (job,) = re.findall(UUID, done.stderr)
    assert "RUNNING" in shared.run("status", job).stdout
    assert shared.run("stop", job).returncode == 0


def wakeups(process):
    """How often the main thread of a server, which runs its event loop, has waited (proc(5))."""
    text = Path(f"/proc/{process}/task/{process}/status").read_text()
    return int(re.search(r"^voluntary_ctxt_switches:\s+(\d+)", text, re.MULTILINE)[1])


def test_clients_that_wait_do_not_wake_the_server(state, certs):
    def wakeups_of_a_job(served):
        before = wakeups(served.process.pid)
        served.run("run", "sleep", "1")
        return wakeups(served.process.pid) - before

    with serving(state, certs) as served, contextlib.ExitStack() as stack:
        channels = [stack.enter_context(channel_to(served)) for _ in range(4)]
        jobs = [ask(channel, "StartJob", pb.StartJobRequest(cmd="sleep", args=["1000"])).ID for channel in channels]
        alone = wakeups_of_a_job(served)
        path = f"/{jobworker.SERVICE_NAME}/GetJobStatus"
        coders = pb.GetStatusRequest.SerializeToString, pb.GetStatusResponse.FromString
        waits = [
            channel.unary_unary(path, *coders).future(pb.GetStatusRequest(id=job, wait=True), timeout=PATIENCE)
            for channel, job in itertools.product(channels, jobs * 12)
        ]
        for channel, job in zip(channels, jobs, strict=True):  # the waits before it have reached the server
            assert ask(channel, "GetJobStatus", pb.GetStatusRequest(id=job)).status == pb.RUNNING
        assert wakeups_of_a_job(served) < alone + 25
        assert not any(wait.done() for wait in waits)


def test_a_hundred_waits_of_one_owner_are_all_answered_at_the_end(state, certs):
    with serving(state, certs) as served, channel_to(served) as one, channel_to(served) as two:
        job = served.start("sleep", "1000")
        path = f"/{jobworker.SERVICE_NAME}/GetJobStatus"
        coders = pb.GetStatusRequest.SerializeToString, pb.GetStatusResponse.FromString
        request = pb.GetStatusRequest(id=job, wait=True)
        calls = [channel.unary_unary(path, *coders) for channel in (one, two)]
        waits = [call.future(request, timeout=PATIENCE) for call in calls for _ in range(50)]
        assert "RUNNING" in served.run("status", job).stdout
        served.run("stop", job)
        assert {wait.result().status for wait in waits} == {pb.STOPPED}


def test_list_shows_the_caller_s_jobs_newest_last(state, certs):
    with serving(state, certs) as served:
        first = served.start("--name", "build", "sh", "-c", "echo out; exit 3")
        status_at_end(served, first)
        running = served.start("sleep", "1000")
        other = served.start("true", role="user2")
        rows = [line.split("\t") for line in served.run("list").stdout.splitlines()]
        assert [row[0] for row in rows] == [first, running]
        assert rows[0][1:5] == ["build", "user", "FINISHED", "3"]
        assert (rows[0][9], rows[0][10]) == ("4", "sh -c 'echo out; exit 3'")
        assert rows[1][1:5] == ["-", "user", "RUNNING", "-"]
        assert served.run("list", "-q", "--running").stdout == f"{running}\n"
        assert served.run("list", "-q", "-n", "1").stdout == f"{running}\n"
        assert [json.loads(line)["id"] for line in served.run("list", "--json").stdout.splitlines()] == [first, running]
        assert served.run("list", "-q", "--everyone", role="admin").stdout.split() == [first, running, other]
        assert served.run("list", "-q", "--owner", "user2", role="admin").stdout == f"{other}\n"
        one_sentence(served.run("list", "-q", "--owner", "user2"), "only an admin")
        one_sentence(served.run("list", "--everyone"), "only an admin")
        second = [status.SerializeToString() for status in listed(served)]  # an ended job is answered from memory
        assert second[0] == listed(served)[0].SerializeToString()


def test_a_list_in_batches_has_the_same_jobs_as_one_with_a_message_for_each(state, certs):
    with serving(state, certs) as served:
        names = [f"job{number}" for number in range(jobworker.BATCH_JOBS + 1)]
        jobs = [call(served, "StartJob", pb.StartJobRequest(cmd="true", name=name)).ID for name in names]
        for job in jobs:
            status_at_end(served, job)
        alone = listed(served)
        batches = listed(served, batches=True)
    assert [job.name for job in alone] == names
    assert [len(batch.more) for batch in batches] == [jobworker.BATCH_JOBS - 1, 0]
    assert list(batches[0].more) == alone[1:-1]
    assert [batch.id for batch in batches] == [alone[0].id, alone[-1].id]


LONG_COMMANDS = {  # the arguments of `true`, and which of them a list shows
    "one long": (["é" * 1000], ["é" * 197 + "…"]),
    "many short": (["x" * 98] * 600, ["x" * 98] * 3 + ["x" * 94 + "…"]),
    "many empty": ([""] * 1000, [""] * 198 + ["…"]),
    "short": (["x", ""], ["x", ""]),
}


@pytest.mark.parametrize("kind", LONG_COMMANDS)
def test_a_list_shows_the_begin_of_a_long_command_and_a_status_all_of_it(shared, kind):
    args, shown = LONG_COMMANDS[kind]
    job = call(shared, "StartJob", pb.StartJobRequest(cmd="true", args=args)).ID
    status_at_end(shared, job)
    for _ in range(2):  # the second is answered from memory
        (found,) = listed(shared, prefix=job)
        assert (found.cmd, list(found.args)) == ("true", shown)
        assert found.ByteSize() <= 2 * KIB
        assert ("a list shows 400 bytes" in " ".join(found.notes)) == (args != shown)
    status = call(shared, "GetJobStatus", pb.GetStatusRequest(id=job))
    assert list(status.args) == args
    assert "a list shows" not in " ".join(status.notes)


@in_loop
async def test_owners_take_turns_however_many_lists_one_of_them_asks_for():
    turns, order = jobworker.OwnerTurns(), []

    async def list_of(owner):
        items = iter(range(5))
        while await turns.part(owner, items, 1):
            order.append(owner)

    await asyncio.gather(*(list_of("many") for _ in range(20)), list_of("one"))
    assert order.index("one") <= 1
    assert [index for index, owner in enumerate(order) if owner == "one"][-1] <= 10


def test_list_can_show_failed_and_recent_jobs_alone(state, certs):
    with serving(state, certs) as served:
        old, failed = (served.start("sh", "-c", f"seq 30; exit {code}") for code in (1, 3))
        good, stopped = served.start("true"), served.start("sleep", "1000")
        served.run("stop", stopped)
        status_at_end(served, good)
        for job in (old, failed):
            status_at_end(served, job)
        spec = state / "jobs" / old / "job.json"
        facts = json.loads(spec.read_text())
        spec.write_text(json.dumps({**facts, "created": facts["created"] - 2 * jobworker.DAY}))
        assert served.run("list", "-q", "--failed").stdout.split() == [old, failed]
        assert served.run("list", "-q", "--failed", "-n", "1").stdout.split() == [failed]
        assert served.run("list", "-q", "--since", "1d").stdout.split() == [failed, good, stopped]
        assert served.run("list", "-q", "--since", "3d", "-n", "2").stdout.split() == [good, stopped]
        program = shlex.join(PROGRAM)
        variables = {**os.environ, "JOBWORKER_SERVER": served.address, "JOBWORKER_CERTS": str(certs)}
        script = f"{program} stream --tail 2 $({program} list -q --failed -n 1)"
        assert subprocess.check_output(["sh", "-c", script], env=variables) == b"29\n30\n"


def test_list_can_be_sorted_by_usage(state, certs):
    with serving(state, certs) as served:
        sizes = {served.start("head", "-c", str(size), "/dev/zero"): size for size in (300, 100, 200)}
        for job in sizes:
            status_at_end(served, job)
        assert served.run("list", "-q", "--sort", "output").stdout.split() == sorted(sizes, key=sizes.get)
        busy, idle = served.start("sh", "-c", "while :; do :; done"), served.start("sleep", "1000")
        with served.popen("list", "-q", "--running", "--watch", "--sort", "cpu") as client:
            lines = [client.stdout.readline().decode().strip() for _ in range(4)]
        assert lines == [busy, idle, idle, busy]


@in_loop
async def test_jobs_are_in_the_order_of_their_starts_after_a_restart_too(state):
    async with worker_on(state) as worker:
        jobs = [await start_id(worker, shell("true")) for _ in range(8)]
        assert [job.id for job in worker.jobs()] == jobs
    async with worker_on(state) as worker:
        assert [job.id for job in worker.jobs()] == jobs


def test_list_fits_the_terminal(state, certs):
    with serving(state, certs) as served:
        job = served.start("echo", "x" * 1000)
        status_at_end(served, job)
        master, terminal = pty.openpty()
        with contextlib.closing(os.fdopen(master, "rb", buffering=0)) as screen:
            fcntl.ioctl(terminal, jobworker.termios.TIOCSWINSZ, struct.pack("HHHH", 24, 90, 0, 0))
            served.popen("list", stdout=terminal).wait(PATIENCE)
            os.close(terminal)
            lines = screen.read(4096).decode().split("\r\n")
        assert lines[0].split()[:3] == ["ID", "NAME", "OWNER"]
        assert lines[1].startswith(job[:8])
        assert max(map(len, lines)) <= 90


def test_a_job_can_be_named_by_its_id_a_prefix_its_name_or_as_the_last(state, certs):
    with serving(state, certs) as served:
        one = served.start("--id", "11110319-e37d-420b-ac43-7316f6b032e5", "--name", "twin", "true")
        two = served.start("--id", "11120319-e37d-420b-ac43-7316f6b032e5", "--name", "twin", "sh", "-c", "exit 2")
        served.start("--id", "22220319-e37d-420b-ac43-7316f6b032e5", "--name", "1112", "true", role="user2")
        for words in ((one,), ("1111",), ("-j", "1111")):
            assert f"jobID: {one}" in served.run("status", *words).stdout
        assert f"jobID: {two}" in served.run("status", "--last").stdout
        one_sentence(served.run("status", "twin"), "names 2 jobs", one, two)
        one_sentence(served.run("status", "111"), "there is no job '111'")
        one_sentence(served.run("status", "2222"), "there is no job '2222'")  # it is another owner's
        assert served.run("wait", "1112").returncode == 2
        assert served.run("rm", one, two).stdout == f"removed Job: {one}\nremoved Job: {two}\n"
        one_sentence(served.run("status", "--last"), "you have no job")


def test_wait_returns_at_the_end_with_the_code_of_the_last_job(state, certs):
    with serving(state, certs) as served:
        gate = served.start("sh", "-c", "mkfifo gate; echo ready; read line <gate; exit 4")
        ended = served.start("sh", "-c", "exit 5")
        with served.popen("wait", ended, gate, stderr=subprocess.PIPE) as waiting:
            served.run("run", "sh", "-c", "until [ -p gate ]; do sleep 0.05; done; echo go >gate")
            assert waiting.communicate(timeout=PATIENCE) == (b"", b"")
        assert waiting.returncode == 4
        assert served.run("wait", gate, ended).returncode == 5


@pytest.mark.parametrize(
    ("script", "grace", "expected"),
    [
        ("trap 'echo clean; exit 0' TERM; echo ready; while :; do sleep 0.05; done", 60, ("STOPPED", 0, "")),
        ("echo ready; exec sleep 1000", 60, ("STOPPED", 143, "")),
        (IGNORES, 0.2, ("STOPPED", 137, "")),
        ("(trap '' TERM; exec sleep 1000) & trap 'exit 3' TERM; echo ready; wait", 60, ("STOPPED", 3, "")),
    ],
    ids=str,
)
@in_loop
async def test_a_graceful_stop_sends_its_signal_and_kills_after_its_grace(state, script, grace, expected):
    async with worker_on(state) as worker:
        job = await start_id(worker, shell(script))
        await wait_for_output(worker, job, b"ready")
        await worker.stop(worker.job(job), by="bob", signal_number=signal.SIGTERM, grace=grace)
        assert ending(worker, job) == expected
        assert worker.status(worker.job(job)).stopped_by == "bob"


@pytest.mark.parametrize("words", [("--grace", "1000s"), ("--signal", "TERM", "--grace", "1000s")], ids=" ".join)
def test_the_verb_stop_lets_a_service_end_by_itself(state, certs, words):
    with serving(state, certs) as served:
        served.start(
            "--name", "web", "sh", "-c", "trap 'echo clean; exit 0' TERM; echo ready; while :; do sleep 0.05; done"
        )
        with served.popen("stream", "web") as stream:
            assert stream.stdout.readline() == b"ready\n"
            assert served.run("stop", *words, "web").stdout.startswith("stopped Job: ")
            assert b"clean\n" in stream.stdout.read()
        assert served.run("status", "web").stdout.endswith("status: STOPPED, exitCode: 0\n")


def test_several_jobs_are_stopped_at_the_same_time(state, certs):
    """Each job ends only when it sees that the other one has got its signal, too."""
    script = (
        "trap 'touch $1; until [ -e $2 ]; do sleep 0.05; done; exit 3' TERM; echo ready; while :; do sleep 0.05; done"
    )
    with serving(state, certs) as served:
        jobs = [served.start("sh", "-c", script, "sh", *names) for names in ("ab", "ba")]
        for job in jobs:
            assert first_line(served, job) == b"ready\n"
        done = served.run("stop", "--grace", "1000s", *jobs)
        assert (done.returncode, done.stderr) == (0, "")
        assert sorted(done.stdout.splitlines()) == sorted(f"stopped Job: {job}" for job in jobs)
        assert [(job.status, job.exitcode) for job in listed(served)] == [(pb.STOPPED, 3)] * 2


def start_stubborn(served):
    """A job that goes on after TERM, and its main process."""
    job = served.start("sh", "-c", "trap '' TERM; echo $$; exec sleep 1000")
    return job, int(first_line(served, job))


@pytest.mark.parametrize(("count", "options"), [(33, ()), (3, ("--owner-calls", "2"))], ids=["window", "owner-calls"])
def test_each_job_is_reported_when_it_ends_and_a_slow_one_does_not_hold_up_the_others(state, certs, count, options):
    with serving(state, certs, *options) as served:
        slow, process = start_stubborn(served)
        request = pb.StartJobRequest(cmd="sleep", args=["1000"])
        jobs = [call(served, "StartJob", request).ID for _ in range(count - 1)]
        with served.popen("stop", "--grace", "1000s", slow, *jobs, stderr=subprocess.PIPE) as client:
            lines = {client.stdout.readline() for _ in jobs}
            assert lines == {f"stopped Job: {job}\n".encode() for job in jobs}
            assert listed(served)[0].status == pb.RUNNING
            os.kill(process, signal.SIGKILL)
            assert client.communicate(timeout=PATIENCE) == (f"stopped Job: {slow}\n".encode(), b"")
            assert client.returncode == 0


def test_a_job_that_does_not_end_in_time_is_named_and_the_others_are_stopped(state, certs, tmp_path):
    altered_copy(tmp_path, "def run_stop(", "STOP_ANSWER_SECONDS = 3.0\n")
    (tmp_path / "gen").symlink_to(HERE / "gen")
    impatient = (sys.executable, str(tmp_path / "jobworker.py"))
    with serving(state, certs, "--through", "env", "--grace", "1000s") as served:
        slow, process = start_stubborn(served)
        jobs = [served.start("sleep", "1000") for _ in range(2)]
        try:
            done = served.run("stop", slow, *jobs, program=impatient)
        finally:
            os.kill(process, signal.SIGKILL)
        assert sorted(done.stdout.splitlines()) == sorted(f"stopped Job: {job}" for job in jobs)
        assert re.fullmatch(rf"jobworker: job {slow} has not ended yet: [^\n]+\n", done.stderr)
        assert done.returncode == 1
        assert served.run("stop", slow).stdout == f"stopped Job: {slow}\n"


def test_a_stop_waits_for_its_answer_longer_than_the_server_for_the_end_of_an_engine_s_job():
    server = 2 * jobworker.GRACE + jobworker.END_SECONDS + jobworker.LATE_SECONDS + jobworker.STOP_SECONDS
    assert server < jobworker.STOP_ANSWER_SECONDS


@pytest.mark.parametrize("calls", ["1", "3"])
def test_more_jobs_than_open_calls_of_one_owner_can_be_stopped_at_once(state, certs, calls):
    with serving(state, certs, "--owner-calls", calls) as served:
        jobs = [served.start("sleep", "1000") for _ in range(8)]
        done = served.run("stop", *jobs)
        assert (done.returncode, done.stderr) == (0, "")
        assert sorted(done.stdout.splitlines()) == sorted(f"stopped Job: {job}" for job in jobs)


@pytest.mark.parametrize("verb", ["stop", "rm"])
def test_a_job_that_is_unknown_or_refused_does_not_keep_a_verb_from_the_others(state, certs, verb):
    unknown, foreign = "aaaa0319-e37d-420b-ac43-7316f6b032e5", "bbbb0319-e37d-420b-ac43-7316f6b032e5"
    with serving(state, certs) as served:
        served.start("--id", foreign, "sleep", "1000", role="user2")
        jobs = [served.start("sleep", "1000") for _ in range(2)]
        if verb == "rm":
            served.run("stop", *jobs)
        done = served.run(verb, "no-such-name", unknown, jobs[0], foreign, jobs[1])
        printed = {"stop": "stopped", "rm": "removed"}[verb]
        assert sorted(done.stdout.splitlines()) == sorted(f"{printed} Job: {job}" for job in jobs)
        said = done.stderr.splitlines()
        assert {next(name for name in ("no-such-name", unknown, foreign) if name in line) for line in said} == {
            "no-such-name", unknown, foreign,
        }  # fmt: skip
        assert all(line.startswith("jobworker: there is no job ") for line in said)
        assert done.returncode == 1
        one_sentence(served.run(verb, jobs[0], ""), "the job id is empty", status=2)


@in_loop
async def test_a_kill_ends_a_grace_period_early(state):
    async with worker_on(state) as worker:
        job = await start_id(worker, shell(IGNORES))
        await wait_for_output(worker, job, b"ready")
        graceful = asyncio.ensure_future(
            worker.stop(worker.job(job), by="alice", signal_number=signal.SIGTERM, grace=1000)
        )
        await asyncio.sleep(0)
        await worker.stop(worker.job(job), by="bob")
        await graceful
        assert ending(worker, job) == ("STOPPED", 137, "")
        assert worker.status(worker.job(job)).stopped_by == "alice"


@in_loop
async def test_a_stop_with_a_signal_after_the_job_s_end_changes_nothing(state):
    async with worker_on(state) as worker:
        for _ in range(20):
            job = await start_id(worker, shell("exit 3"))
            await worker.stop(worker.job(job), signal_number=signal.SIGTERM, grace=60)
            assert ending(worker, job) in {("FINISHED", 3, ""), ("STOPPED", 143, ""), ("STOPPED", 3, "")}


def test_a_grace_period_ends_in_a_kill_while_no_server_runs(state):
    body = f"""
        job = await worker.start(JobRequest("sh", ("-c", {IGNORES!r}), owner="alice", id={ID!r}))
        async for chunk in worker.stream(job):
            break
        asyncio.ensure_future(worker.stop(job, signal_number=signal.SIGTERM, grace=0.5))
        await asyncio.sleep(0)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    in_server(state, body, status=-9)

    @in_loop
    async def look():
        async with worker_on(state) as worker:
            await output(worker, ID)
            assert ending(worker, ID) == ("STOPPED", 137, "")

    look()


def test_signal_reaches_the_main_process(state, certs):
    with serving(state, certs) as served:
        script = "trap 'echo reloaded' HUP; echo ready; while :; do sleep 0.05; done"
        job = served.start("--name", "service", "sh", "-c", script)
        with served.popen("stream", job) as stream:
            assert stream.stdout.readline() == b"ready\n"
            for words in (
                ("service", "HUP"), ("-j", "service", "HUP"), ("--last", "HUP"), ("HUP", "--last"),
                ("service", "--retry-for", "9s", "HUP"),
            ):  # fmt: skip
                done = served.run("signal", *words)
                assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
                assert stream.stdout.readline() == b"reloaded\n"
        one_sentence(served.run("signal", "HUP"), "`signal` needs a job", "signal -j ID SIGNAL", status=2)
        one_sentence(served.run("signal", job, "web2", "USR1"), "`signal` takes one job and one signal", status=2)
        one_sentence(served.run("signal", job, "--last", "HUP"), "`signal` takes one job", status=2)
        one_sentence(served.run("signal", job, "NOSUCH"), "there is no signal 'NOSUCH'")
        one_sentence(served.run("signal", job, "HUP", role="user2"), "there is no job")


def test_a_job_gets_its_variables_and_no_reply_contains_their_values(state, certs, tmp_path):
    (tmp_path / "file").write_text("# a comment\nFROM_FILE=file value\nBOTH=file\n\n")
    with serving(state, certs) as served:
        words = ("--env-file", str(tmp_path / "file"), "--env", "BOTH=option", "--env", "SECRET=xyzzy", "--env", "HERE")
        environment = {
            **os.environ, "JOBWORKER_SERVER": served.address, "JOBWORKER_CERTS": str(certs), "HERE": "here value",
        }  # fmt: skip
        script = 'echo "$FROM_FILE|$BOTH|$SECRET|$HERE|$HOME"'
        done = served.run("run", *words, "--name", "vars", "sh", "-c", script, env=environment)
        assert done.stdout.startswith("file value|option|xyzzy|here value|/")
        for verb in ("status --json vars", "status -v vars", "list --json"):
            assert "xyzzy" not in served.run(*verb.split()).stdout
        one_sentence(served.run("run", "--env", "=xyzzy", "true"), "cannot be a variable", status=255)
        assert "xyzzy" not in served.run("run", "--env", "=xyzzy", "true").stderr
        done = served.run("run", "--env", "PATH=/nowhere/xyzzy", "ls")
        assert (done.returncode, "xyzzy" in done.stderr) == (127, False)


READ_PROC = """
import glob
texts = {}
for path in glob.glob("/proc/[0-9]*/environ") + glob.glob("/proc/[0-9]*/cmdline"):
    try:
        texts[path] = open(path, "rb").read()
    except OSError:
        pass
print("read", len(texts), "found", [path for path in texts if b"xyz" + b"zy" in texts[path]])
"""


@as_root
@pytest.mark.parametrize("options", [(), ("--no-confine",)], ids=["confined", "unconfined"])
def test_the_values_of_a_job_s_variables_are_in_no_log_and_no_other_owner_finds_them_in_proc(
    state, certs, tmp_path, options
):
    (tmp_path / "file").write_text(f"SECRET=xyzzy\nLONG={'xyzzy' * 20_000}\n")  # an argument of the client is no secret
    words = ("--env-file", str(tmp_path / "file"), "--")
    with open(tmp_path / "log", "w+") as log, serving(state, certs, *options, stderr=log) as served:
        job = served.start(*words, "sh", "-c", "echo $PPID; exec sleep 1000")
        for command in ("no-such-command", "/etc/passwd"):
            assert "xyzzy" not in served.run("start", *words, command).stderr
        with open_streams(served, job, 1) as (stream,):
            shim = int(next(stream)[2:])
        done = served.run("run", "--", str(PYTHON_FOR_ALL), "-c", READ_PROC, role="user2")
        assert re.fullmatch(r"read [1-9][0-9]* found \[\]\n", done.stdout), done.stdout + done.stderr
        os.kill(shim, signal.SIGKILL)
        assert call(served, "GetJobStatus", pb.GetStatusRequest(id=job, wait=True)).reason == "LOST"
        log.seek(0)
        assert f"the shim of job {job} is gone" in (text := log.read())
        assert "xyzzy" not in text


def test_a_job_runs_in_the_folder_that_was_asked_for(state, certs):
    with serving(state, certs) as served:
        assert served.run("run", "--cwd", "/usr", "pwd").stdout == "/usr\n"
        home = served.run("run", "sh", "-c", "mkdir below; pwd").stdout.strip()
        assert served.run("run", "--cwd", "below", "pwd").stdout == f"{home}/below\n"
        done = served.run("run", "--cwd", "/nowhere", "pwd")
        one_sentence(done, "cannot enter the working folder '/nowhere'", status=126)
        assert not (state / "jobs" / "quarantine").exists()


@given(st.lists(st.sampled_from([b"a", b"\n", b"bc\n", b""]), max_size=30), st.integers(1, 8), st.integers(1, 5))
def test_the_last_lines_are_found_in_blocks_of_any_size(parts, lines, size):
    text = b"".join(parts)
    search, end, offset = jobworker.LineSearch(lines), len(text), 0
    while end > 0:
        begin = max(0, end - size)
        if (found := search.find(text[begin:end])) is not None:
            offset = begin + found
            break
        end = begin
    assert text[offset:] == b"".join(text.splitlines(keepends=True)[-lines:])


@in_loop
async def test_many_searches_for_last_lines_read_one_block_before_another_call_has_its_turn(state):
    def bytes_read():
        return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])

    async with worker_on(state) as worker:
        long, short = [(await result(worker, shell("echo hello")))[1].spec.id for _ in range(2)]
        os.truncate(state / "jobs" / long / "output", 16 * jobworker.READ_BYTES)  # it grows, and has no further newline
        searches = [asyncio.create_task(worker.tail_offset(worker.job(long), 2)) for _ in range(20)]
        last = asyncio.create_task(worker.tail_offset(worker.job(short), 1))
        most, before = 0, bytes_read()
        while not all(search.done() for search in searches):
            await asyncio.sleep(0)
            now = bytes_read()
            most, before = max(most, now - before), now
            assert last.done() or not any(search.done() for search in searches)  # they take turns
        assert [await search for search in searches] == [0] * len(searches)
        assert await last == 0
        assert jobworker.READ_BYTES <= most < 2 * jobworker.READ_BYTES


def test_stream_can_begin_with_the_last_lines_and_end_without_waiting(state, certs):
    with serving(state, certs) as served:
        job = served.start("sh", "-c", "seq 100000; exec sleep 1000")
        until(lambda: (state / "jobs" / job / "output").read_bytes().endswith(b"\n100000\n"))
        assert served.run("stream", job, "--no-follow", "--tail", "2").stdout == "99999\n100000\n"
        assert served.run("stream", job, "--no-follow", "--tail", "0").stdout == ""
        assert served.run("stream", job, "--no-follow").stdout == "".join(f"{n}\n" for n in range(1, 100_001))
        with served.popen("stream", job, "--tail", "1") as stream:
            assert stream.stdout.readline() == b"100000\n"
            served.run("stop", job)
            assert stream.stdout.read() == b""


def test_the_last_lines_of_a_large_output_are_read_from_its_end(state, certs):
    def bytes_read():
        return int(re.search(r"rchar: (\d+)", Path(f"/proc/{served.process.pid}/io").read_text())[1])

    with serving(state, certs) as served:
        job = served.start("echo", "first")
        status_at_end(served, job)
        with (state / "jobs" / job / "output").open("r+b") as file:
            file.truncate(1 << 30)  # sparse
            file.seek(0, os.SEEK_END)
            file.write(b"\none\ntwo\n")
        before = bytes_read()
        assert served.run("stream", "--tail", "2", job).stdout == "one\ntwo\n"
        assert bytes_read() - before < 4 * MIB


def test_several_streams_are_written_line_by_line(state, certs):
    with serving(state, certs) as served:
        one = served.start("--name", "one", "sh", "-c", "echo 1a; sleep 0.1; echo 1b")
        two = served.start("--name", "two", "sh", "-c", "echo 2a; sleep 0.1; printf 2b")
        lines = served.run("stream", "one", "two").stdout.splitlines()
        assert [line for line in lines if line.startswith(one[:8])] == [f"{one[:8]} | 1a", f"{one[:8]} | 1b"]
        assert [line for line in lines if line.startswith(two[:8])] == [f"{two[:8]} | 2a", f"{two[:8]} | 2b"]


def test_lines_of_several_streams_are_never_mixed(state, certs):
    with serving(state, certs) as served:
        ids = [served.start("sh", "-c", f"yes {letter * 20} | head -n 100000") for letter in "ab"]
        with served.popen("stream", *ids) as client:
            lines = collections.Counter(client.stdout)
        assert lines == {
            f"{job[:8]} | {letter * 20}\n".encode(): 100_000 for job, letter in zip(ids, "ab", strict=True)
        }


def test_control_c_ends_several_streams_at_once(state, certs):
    with serving(state, certs) as served:
        jobs = [served.start("sh", "-c", WAITS) for _ in range(2)]
        with served.popen("stream", *jobs) as client:
            assert {client.stdout.readline() for _ in jobs} == {f"{job[:8]} | ready\n".encode() for job in jobs}
            client.send_signal(signal.SIGINT)
            assert client.wait(PATIENCE) == 130


def test_a_watched_list_shows_rates(state, certs):
    with serving(state, certs) as served:
        served.start("sh", "-c", "while :; do echo; sleep 0.1; done")  # `yes` would reach its cap
        with served.popen("list", "--watch") as client:
            rows = [client.stdout.readline().split(b"\t") for _ in range(2)]
        assert (rows[0][7], rows[0][9]) == (b"-", b"-")
        assert rows[1][9].endswith(b"/s")


def test_serve_reads_options_from_a_file(state, certs, tmp_path):
    (tmp_path / "options").write_text("# limits\n--max-memory '3G' --timeout 7s\n")
    with serving(state, certs, f"@{tmp_path / 'options'}") as served:
        facts = json.loads(served.run("status", "--json", served.start("--memory", "2G", "true")).stdout)
        assert facts["limits"]["timeout"] == 7.0


def test_the_error_for_a_call_that_the_server_does_not_know_says_that_it_is_older(certs):
    files = [(certs / name).read_bytes() for name in ("server.key", "server.pem", "client-ca.pem")]
    credentials = grpc.ssl_server_credentials([tuple(files[:2])], files[2], require_client_auth=True)
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(1))
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        one_sentence(Served(None, port, certs).run("list"), "`list` needs a newer server")
    finally:
        server.stop(None).wait(PATIENCE)


# --- Split outputs --------------------------------------------------------------------------------------
# A job with `split` keeps standard output and standard error apart: two files, two offsets, one cap.

OUT_ERR = "echo out; echo err >&2"
WRITES_BOTH = """
import os, random, sys
rest = [memoryview(random.Random(seed).randbytes(int(sys.argv[1]))) for seed in (1, 2)]
sizes = random.Random(3)
while any(rest):
    number = sizes.randrange(2)
    written = os.write(1 + number, rest[number][: sizes.choice([1, 100, 70_000])]) if rest[number] else 0
    rest[number] = rest[number][written:]
"""


async def both(worker, job, *offsets, **options):
    """Both outputs of a job, from these offsets on."""
    found = {1: bytearray(), 2: bytearray()}
    async for number, chunk in worker.stream_split(worker.job(job), *offsets, **options):
        found[number] += chunk
    return bytes(found[1]), bytes(found[2])


async def wait_for_both(worker, job):
    """Wait until a job has printed a line on each of its outputs."""
    found = {1: b"", 2: b""}
    async with contextlib.aclosing(worker.stream_split(worker.job(job))) as pieces:
        async for number, chunk in pieces:
            found[number] += chunk
            if all(b"\n" in text for text in found.values()):
                return found[1], found[2]
    raise AssertionError(f"the job ended with {found}")


@in_loop
async def test_both_outputs_of_a_split_job_arrive_exact_at_every_follower(state):
    total = 5 * MIB
    expected = tuple(random.Random(seed).randbytes(total) for seed in (1, 2))
    async with worker_on(state) as worker:
        job = await start_id(worker, python(WRITES_BOTH, str(total), split=True))
        live = [asyncio.create_task(both(worker, job, size=size)) for size in (MIB, 256 * KIB, 17 * KIB)]
        assert await asyncio.gather(*live) == [expected] * 3
        assert await both(worker, job) == expected
        assert await output(worker, job) == expected[0]
        status = worker.status(worker.job(job))
        assert (status.output_bytes, status.error_bytes) == (total, total)
        assert worker.job(job).tail is None
        assert len(worker._inotify) == 0


@in_loop
async def test_a_job_without_split_has_one_output_and_one_file(state):
    async with worker_on(state) as worker:
        job = await start_id(worker, shell(OUT_ERR))
        assert await both(worker, job) == (b"out\nerr\n", b"")
        assert worker.status(worker.job(job)).error_bytes == 0
        assert sorted(os.listdir(state / "jobs" / job)) == ["control", "events", "job.json", "output"]


@as_root
@in_loop
async def test_each_line_of_a_split_job_arrives_while_the_job_runs(state):
    async with worker_on(state) as worker:
        script = "mkfifo a b; echo one; read l <a; echo two >&2; read l <b; echo three"
        job = await start_id(worker, shell(script, split=True))
        home, gates, pieces = Path(worker.status(worker.job(job)).spec.home), iter("ab"), []
        async for piece in worker.stream_split(worker.job(job)):
            pieces.append(piece)
            if len(pieces) < 3:
                (home / next(gates)).write_text("go\n")
        assert pieces == [(1, b"one\n"), (2, b"two\n"), (1, b"three\n")]


@in_loop
async def test_neither_output_waits_until_the_other_is_at_its_end(state):
    async with worker_on(state) as worker:
        for script in ("head -c 3000000 /dev/zero; echo err >&2", "head -c 3000000 /dev/zero >&2; echo out"):
            job = await start_id(worker, shell(script, split=True))
            await worker.wait(worker.job(job))
            pieces = [number async for number, _ in worker.stream_split(worker.job(job))]
            assert set(pieces[:2]) == {1, 2}


@in_loop
async def test_followers_of_a_split_job_that_leave_release_its_watches_and_descriptors(state):
    async with worker_on(state) as worker:
        job = await start_id(worker, shell(f"{OUT_ERR}; exec sleep 1000", split=True))
        before = len(os.listdir("/proc/self/fd")), len(worker._inotify)
        await wait_for_both(worker, job)
        waiting = [asyncio.create_task(both(worker, job)) for _ in range(3)]
        while len(worker._inotify) < before[1] + 2:
            await asyncio.sleep(0)
        for task in waiting:
            task.cancel()
        assert all(
            isinstance(end, asyncio.CancelledError) for end in await asyncio.gather(*waiting, return_exceptions=True)
        )
        assert worker.job(job).tail is None
        assert (len(os.listdir("/proc/self/fd")), len(worker._inotify)) == before
        await worker.stop(worker.job(job))


SHARED_CAPS = [  # the script; its ending with a cap of 100,000 bytes
    ("yes & yes >&2 & wait", ("STOPPED", 137, "OUTPUT_LIMIT")),
    ("echo; exec yes >&2", ("STOPPED", 137, "OUTPUT_LIMIT")),
    ("head -c 60000 /dev/zero; head -c 40000 /dev/zero >&2; exit 3", ("FINISHED", 3, "")),
    ("head -c 60000 /dev/zero; head -c 40001 /dev/zero >&2; sleep 1000", ("STOPPED", 137, "OUTPUT_LIMIT")),
    ("head -c 99999 /dev/zero >&2; exec >&- 2>&-; exit 3", ("FINISHED", 3, "")),
]


@pytest.mark.parametrize("splice", [True, False], ids=["splice", "write"])
@pytest.mark.parametrize(("script", "expected"), SHARED_CAPS)
@in_loop
async def test_both_outputs_together_have_one_cap_that_is_kept_to_the_byte(
    state, monkeypatch, splice, script, expected
):
    monkeypatch.setattr(jobworker, "splice_is_reported", lambda _: splice)
    async with worker_on(state) as worker:
        job = await start_id(worker, shell(script, split=True, max_output=100_000))
        out, err = await both(worker, job)
        assert ending(worker, job) == expected
        assert len(out) + len(err) == (99_999 if "99999" in script else 100_000)


@pytest.mark.parametrize("small_disk", ["tmpfs", "ext4"], indirect=True)
@in_loop
async def test_a_split_job_that_fills_the_disk_is_stopped_whichever_output_filled_it(small_disk):
    async with worker_on(small_disk) as worker:
        for script in ("echo out; exec yes >&2", "echo err >&2; exec yes"):
            job = await start_id(worker, shell(script, split=True))
            sizes = [len(text) for text in await both(worker, job)]
            assert ending(worker, job) == ("STOPPED", 137, "DISK_FULL")
            assert sum(sizes) == sum((small_disk / "jobs" / job / name).stat().st_size for name in ("output", "error"))
            worker.remove(worker.job(job))  # the room of both files is free again


@in_loop
async def test_the_reserve_of_the_disk_holds_for_both_outputs_together(small_disk):
    disk = os.statvfs(small_disk)
    reserve = free_bytes(small_disk) - 2 * MIB
    async with worker_on(small_disk, reserve=reserve / (disk.f_blocks * disk.f_frsize)) as worker:
        job = await start_id(worker, shell("yes & yes >&2 & wait", split=True))
        await both(worker, job)
        assert ending(worker, job) == ("STOPPED", 137, "DISK_FULL")
        assert free_bytes(small_disk) > reserve / 2 - 3.5 * MIB  # the disk is checked each MiB; two pipes hold two


SPLIT_ENDINGS = [  # a job; its limits; what the test does to it; its ending
    ("exec sleep 1000", {}, "stop", ("STOPPED", 137, "")),
    ("exec sleep 1000", {"timeout": 0.3}, "", ("STOPPED", 137, "TIMEOUT")),
    ("exec sleep 1000", {}, "kill the shim", ("FINISHED", 255, "LOST")),
    ("sleep 1000 & exit 3", {}, "", ("FINISHED", 3, "")),
    ("exec 2>&-; echo more; exit 3", {}, "", ("FINISHED", 3, "")),
    ("exec >&-; echo more >&2; exit 3", {}, "", ("FINISHED", 3, "")),
    ("exec >&- 2>&-; exit 3", {}, "", ("FINISHED", 3, "")),
]


@pytest.mark.parametrize("cgroup", [True, False], ids=["cgroup", "no cgroup"])
@pytest.mark.parametrize(("script", "limits", "action", "expected"), SPLIT_ENDINGS)
@in_loop
async def test_both_outputs_are_complete_however_a_split_job_ends(
    state, monkeypatch, cgroup, script, limits, action, expected
):
    if not cgroup:
        monkeypatch.setattr(CgroupMount, "find", classmethod(lambda _class: None))
    async with worker_on(state) as worker:
        job = await start_id(worker, shell(f"echo $PPID; echo err >&2; {script}", split=True, **limits))
        shim = int((await wait_for_both(worker, job))[0].split()[0])
        if action == "kill the shim":
            os.kill(shim, signal.SIGKILL)
        if action == "stop":
            await worker.stop(worker.job(job))
        out, err = await both(worker, job)
        more = "more\n" if "more" in script else ""
        assert out.decode() == f"{shim}\n" + ("" if ">&2; exit" in script else more)
        assert err.decode() == "err\n" + (more if ">&2; exit" in script else "")
        assert ending(worker, job) == expected


SPLIT_SHIM_DEATHS = [  # the statement before which the shim dies; what it does first; the job's ending
    *(
        row
        for row in SHIM_DEATHS
        if row[0].startswith(("outputs =", "for _, writer", "pumps = make_pumps", "rest = drain_all"))
    ),
    *(row for row in SHIM_DEATHS if row[0].startswith(('write_event(self._events, "exited"', "processes.kill_all"))),
    ("pipes = [make_pipe(self._spec)", "pass", LOST),
    ("self._move(pump, poller)", "pass", LOST),
    ("requests = [pump.drain() for pump in pumps]", "pass", LOST),
    ("requests = [pump.drain() for pump in pumps]", "pumps[0].drain()", LOST),
    ("return next(filter(None, requests), None)", "pass", LOST),
]


@pytest.mark.parametrize(
    ("statement", "before_death", "expected"), SPLIT_SHIM_DEATHS, ids=[row[0][:40] for row in SPLIT_SHIM_DEATHS]
)
@in_loop
async def test_a_split_job_whose_shim_is_killed_at_any_step_still_gets_its_ending(
    state, tmp_path, mark, statement, before_death, expected
):
    dying, armed = dying_copy(tmp_path, statement, before_death)
    armed.unlink()
    async with worker_on(state, dying) as worker:
        await arm_after_rehearsal(worker, dying, armed)
        request = ("-c", f"sh -c 'sleep 1000; : {mark}' & {OUT_ERR}; exit 7")
        job = await start_id(worker, dying.JobRequest("sh", request, owner="alice", split=True))
        texts = await both(worker, job)
        assert not armed.exists()
        assert ending(worker, job) == expected
        assert texts == (b"out\n", b"err\n") or expected == LOST
        assert not processes_with(mark)
    wait_for_orphans()
    async with worker_on(state) as worker:
        assert ending(worker, job) == expected
        assert await both(worker, job) == texts
        worker.remove(worker.job(job))
        assert left_in(state) == []


def test_each_output_is_resumed_at_each_byte_after_the_server_was_killed(state):
    body = f"""
        request = JobRequest("sh", ("-c", "printf 0123; printf abcd >&2; exec sleep 1000"), id={ID!r}, split=True)
        found = {{1: b"", 2: b""}}
        async for number, chunk in worker.stream_split(await worker.start(request)):
            found[number] += chunk
            if (found[1], found[2]) == (b"0123", b"abcd"):
                os.kill(os.getpid(), signal.SIGKILL)
    """
    in_server(state, body, status=-9)

    @in_loop
    async def resume():
        async with worker_on(state) as worker:
            for offset in range(6):
                for error_offset in range(6):
                    expected = b"0123"[offset:], b"abcd"[error_offset:]
                    assert await both(worker, ID, offset, error_offset, follow=False) == expected
            follower = asyncio.create_task(both(worker, ID, 2, 3))
            await worker.stop(worker.job(ID))
            assert await follower == (b"23", b"d")

    resume()


def test_run_writes_each_output_once_when_the_server_is_killed_in_between(state, certs):
    with serving(state, certs, end=signal.SIGKILL) as served:
        script = "mkfifo gate; echo out; echo err >&2; read line <gate; echo more; echo worse >&2; exit 6"
        client = served.popen("run", "sh", "-c", script, stderr=subprocess.PIPE)
        assert (client.stdout.readline(), client.stderr.readline()) == (b"out\n", b"err\n")
    with serving(state, certs, port=served.port) as served, client:
        served.run("run", "sh", "-c", "echo go >gate")
        out, err = client.communicate(timeout=PATIENCE)
        own = [line for line in err.splitlines(keepends=True) if line.startswith(b"jobworker: ")]
        assert (out, err.replace(b"".join(own), b""), client.returncode) == (b"more\n", b"worse\n", 6)


def test_stream_writes_each_output_of_a_split_job_to_its_own_descriptor(shared):
    job = shared.start("--split", "sh", "-c", f"{OUT_ERR}; printf x; printf yyy >&2")
    done = shared.run("stream", job)
    assert (done.returncode, done.stdout, done.stderr) == (0, "out\nx", "err\nyyy")
    done = shared.run("stream", "--offset", "4", "--error-offset", "3", job)
    assert (done.stdout, done.stderr) == ("x", "\nyyy")


def test_the_last_lines_of_each_output_of_a_split_job_can_be_read_without_waiting(state, certs):
    with serving(state, certs) as served:
        job = served.start("--split", "sh", "-c", "seq 100000 >&2; seq 5; exec sleep 1000")
        until(lambda: (state / "jobs" / job / "output").read_bytes().endswith(b"\n5\n"))
        for words, out, err in (
            (("--tail", "2"), "4\n5\n", "99999\n100000\n"),
            (("--tail", "0"), "", ""),
            (("--tail", "7"), "1\n2\n3\n4\n5\n", "".join(f"{n}\n" for n in range(99_994, 100_001))),
            ((), "1\n2\n3\n4\n5\n", "".join(f"{n}\n" for n in range(1, 100_001))),
        ):
            done = served.run("stream", job, "--no-follow", *words)
            assert (done.returncode, done.stdout, done.stderr) == (0, out, err)
        with served.popen("stream", job, "--tail", "1", stderr=subprocess.PIPE) as stream:
            assert (stream.stdout.readline(), stream.stderr.readline()) == (b"5\n", b"100000\n")
            served.run("stop", job)
            assert stream.communicate(timeout=PATIENCE) == (b"", b"")


@in_loop
async def test_both_files_count_in_keep_bytes_and_are_removed_with_their_job(state, monkeypatch):
    monkeypatch.setattr(jobworker, "FRESH_SECONDS", 0.0)
    async with worker_on(state, keep_bytes=2 * MIB) as worker:
        jobs = []
        for redirection in (">&2", ">&2", ""):
            jobs.append(await start_id(worker, shell(f"head -c 1500000 /dev/zero {redirection}", split=True)))
            await worker.wait(worker.job(jobs[-1]))
        await wait_until_forgotten(worker, jobs[1])
        assert left_in(state) == [jobs[2]]
        worker.remove(worker.job(jobs[2]))
        assert left_in(state) == []


def test_an_old_client_sees_standard_output_of_a_split_job(shared):
    """BytesValue is what GetStreamResponse was: one field of bytes with the number 1."""
    old_reply = jobworker.Deferred("google.protobuf.wrappers_pb2").BytesValue
    job = shared.start("--split", "sh", "-c", OUT_ERR)
    with channel_to(shared) as channel:
        path = "/proto.WorkerService/GetOutputStream"
        messages = channel.unary_stream(path, response_deserializer=old_reply.FromString)
        assert (
            b"".join(message.value for message in messages(text_field(1, job.encode()), timeout=PATIENCE)) == b"out\n"
        )


def test_run_with_split_works_with_a_server_that_ignores_it(state, certs, tmp_path):
    altered_copy(tmp_path, "request = JobRequest(\n            command=message.cmd", "message.split = False")
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    program = (sys.executable, str(tmp_path / "jobworker.py"))
    with serving(state, certs, program=program, env=environment) as served:
        done = served.run("run", "--split", "sh", "-c", f"{OUT_ERR}; exit 3")
        assert (done.returncode, done.stdout, done.stderr) == (3, "out\nerr\n", "")


def test_status_and_list_show_both_outputs_of_a_split_job_and_nothing_new_of_others(state, certs):
    with serving(state, certs) as served:
        for words in (("--split",), ()):
            job = served.start(*words, "sh", "-c", "echo; echo err >&2")
            served.run("wait", job)
            facts = json.loads(served.run("status", "--json", job).stdout)
            assert set(facts) - STATUS_KEYS - {"name", "cwd"} == ({"split", "errorBytes"} if words else set())
            assert (facts["outputBytes"], facts.get("errorBytes")) == ((1, 4) if words else (5, None))
        assert [line.split("\t")[9] for line in served.run("list").stdout.splitlines()] == ["5", "5"]


def test_a_second_start_with_the_same_id_is_the_same_job_whether_split_or_not(shared):
    job = jobworker.new_job_id()
    requests = [pb.StartJobRequest(cmd="sh", args=["-c", OUT_ERR], id=job, split=split) for split in (True, False)]
    assert [call(shared, "StartJob", request).ID for request in requests] == [job, job]
    assert status_at_end(shared, job).split


# Where `run` writes.

IN_TURN = "for i in 1 2 3 4 5 6 7 8 9; do echo o$i; echo e$i >&2; done"
OUT_LINES, ERR_LINES = ("".join(f"{letter}{n}\n" for n in range(1, 10)) for letter in "oe")
BOTH_IN_ORDER = "".join(f"o{n}\ne{n}\n" for n in range(1, 10))
RUN_OUTPUTS = [  # redirections; options; what is in the file `out`, in the file `err`, and on the shell's own outputs
    (">out 2>err", (), OUT_LINES, ERR_LINES, "", ""),
    (">out 2>&1", (), BOTH_IN_ORDER, None, "", ""),
    (">out 2>>out", (), BOTH_IN_ORDER, None, "", ""),
    ("2>/dev/null", (), None, None, OUT_LINES, ""),
    (">/dev/null", (), None, None, "", ERR_LINES),
    ("2>err | cat", (), None, ERR_LINES, OUT_LINES, ""),
    ("2>&1 | cat", (), None, None, BOTH_IN_ORDER, ""),
    ("", (), None, None, OUT_LINES, ERR_LINES),
    (">out 2>err", ("--no-split",), BOTH_IN_ORDER, "", "", ""),
    ("2>&-", (), None, None, OUT_LINES, ""),
    (">&-", (), None, None, "", ERR_LINES),
    (">&- 2>&-", (), None, None, "", ""),
]


@pytest.mark.parametrize(("redirections", "options", "out", "err", "stdout", "stderr"), RUN_OUTPUTS)
def test_run_keeps_its_outputs_apart_if_they_go_to_different_files(
    shared, tmp_path, redirections, options, out, err, stdout, stderr
):
    redirections = re.sub(r"\b(out|err)\b", lambda name: str(tmp_path / name[0]), redirections)
    done = in_shell(shared, ("run", *options, "sh", "-c", IN_TURN), redirections)
    assert (done.returncode, done.stdout, done.stderr) == (0, stdout, stderr)
    for name, expected in (("out", out), ("err", err)):
        assert (tmp_path / name).exists() == (expected is not None)
        assert expected is None or (tmp_path / name).read_text() == expected


def test_run_with_split_keeps_outputs_apart_that_go_to_one_file(shared, tmp_path):
    done = in_shell(shared, ("run", "--split", "sh", "-c", IN_TURN), f">{tmp_path / 'out'} 2>&1")
    assert done.returncode == 0
    lines = (tmp_path / "out").read_text().splitlines(keepends=True)
    assert "".join(line for line in lines if line[0] == "o") == OUT_LINES
    assert "".join(line for line in lines if line[0] == "e") == ERR_LINES


@pytest.mark.parametrize("apart", [False, True])
def test_run_on_a_terminal_keeps_the_order_unless_standard_error_goes_elsewhere(state, certs, apart):
    with serving(state, certs) as served, tempfile.TemporaryFile() as elsewhere:
        master, terminal = pty.openpty()
        try:
            with served.popen(
                "run", "sh", "-c", IN_TURN, stdout=terminal, stderr=elsewhere if apart else terminal
            ) as run:
                assert run.wait(PATIENCE) == 0
            expected = OUT_LINES if apart else BOTH_IN_ORDER
            assert os.read(master, 4096).decode().replace("\r\n", "\n") == expected
            elsewhere.seek(0)
            assert elsewhere.read().decode() == (ERR_LINES if apart else "")
        finally:
            os.close(master)
            os.close(terminal)
        assert [status.split for status in listed(served)] == [apart]


def test_run_keeps_the_order_if_standard_error_is_its_terminal_by_another_name(state, certs):
    def take():
        fcntl.ioctl(1, jobworker.termios.TIOCSCTTY, 0)
        os.dup2(os.open("/dev/tty", os.O_WRONLY), 2)

    with serving(state, certs) as served:
        master, terminal = pty.openpty()
        words = ("run", "sh", "-c", IN_TURN)
        with served.popen(*words, stdout=terminal, start_new_session=True, preexec_fn=take) as run:
            assert run.wait(PATIENCE) == 0
        assert os.read(master, 4096).decode().replace("\r\n", "\n") == BOTH_IN_ORDER
        os.close(master)
        os.close(terminal)
        assert [status.split for status in listed(served)] == [False]


@pytest.mark.parametrize("script", ["yes", "yes >&2"])
def test_a_closed_pipe_on_either_output_ends_run_and_its_job(state, certs, script):
    with serving(state, certs) as served:
        with served.popen("run", "sh", "-c", script, stderr=subprocess.PIPE) as client:
            closed, other = (client.stderr, client.stdout) if "&2" in script else (client.stdout, client.stderr)
            closed.read(10)
            closed.close()
            assert other.read() == b""
            assert client.wait(PATIENCE) == 128 + signal.SIGPIPE
        assert [job.status for job in listed(served)] == [pb.STOPPED]


@pytest.mark.parametrize("verb", ["stream", "run"])
def test_a_full_standard_error_ends_a_client_as_a_full_standard_output_does(shared, verb):
    job = shared.start("--split", "sh", "-c", OUT_ERR)
    words = ("stream", job) if verb == "stream" else ("run", "sh", "-c", OUT_ERR)
    full_output, full_error = (in_shell(shared, words, redirection) for redirection in (">/dev/full", "2>/dev/full"))
    assert full_output.returncode == full_error.returncode == (1 if verb == "stream" else 255)
    assert "No space left on device" in full_output.stderr


@as_root
@pytest.mark.parametrize("options", [{}, {"without": frozenset({"auto", "confine"})}], ids=["confined", "not confined"])
@in_loop
async def test_a_split_job_can_open_its_standard_files_again(state, options):
    async with worker_on(state, **options) as worker:
        script = "echo out >/dev/stdout; echo err >/dev/stderr; echo more >>/proc/self/fd/2"
        job = await start_id(worker, shell(script, split=True))
        assert await both(worker, job) == (b"out\n", b"err\nmore\n")
        assert ending(worker, job) == ("FINISHED", 0, "")


def test_lines_of_several_streams_go_to_the_output_that_they_come_from(state, certs):
    with serving(state, certs) as served:
        jobs = [served.start(*words, "sh", "-c", "echo 1; printf 2 >&2") for words in (("--split",), ())]
        done = served.run("stream", *jobs)
        assert sorted(done.stdout.splitlines()) == sorted(
            [f"{jobs[0][:8]} | 1", f"{jobs[1][:8]} | 1", f"{jobs[1][:8]} | 2"]
        )
        assert done.stderr == f"{jobs[0][:8]} | 2\n"


def test_several_streams_hold_no_more_than_a_bound_of_a_line_that_does_not_end(state, certs):
    with serving(state, certs) as served:
        endless = served.start("sh", "-c", "head -c 300000 /dev/zero; exec sleep 1000")
        with served.popen("stream", endless, served.start("true")) as client:
            prefix = f"{endless[:8]} | ".encode()
            text = client.stdout.read(200_000)  # while the line has no end
            assert text.startswith(prefix)
            assert set(text.replace(prefix, b"").replace(b"\n", b"")) == {0}


# --- Input ----------------------------------------------------------------------------------------------
# The standard input of jobs: byte for byte, with its exact end, bounded in memory, and never cut without a word.

DIGESTS_INPUT = "import hashlib, sys; data = sys.stdin.buffer.read(); print(len(data), hashlib.md5(data).hexdigest())"
SAYS_END = "echo $PPID; cat; echo end"  # `end` after an end of input, true or false; $PPID is the shim


async def chunks_of(*chunks):
    for chunk in chunks:
        yield chunk


async def without_end(*chunks):
    """These chunks, and then neither more nor an end."""
    for chunk in chunks:
        yield chunk
    await asyncio.Event().wait()


async def endless(counted):
    while True:
        counted.append(1)
        yield bytes(64 * KIB)


@pytest.mark.parametrize("sizes", [(), (0,), (1,), (3, 0, 5), (70_000, 1, 300_000, 2_000_000)], ids=str)
@in_loop
async def test_a_job_reads_its_input_byte_for_byte_and_then_its_end(state, sizes):
    chunks = [random.Random(size).randbytes(size) for size in sizes]
    data = b"".join(chunks)
    async with worker_on(state) as worker:
        job = await worker.start(python(DIGESTS_INPUT, input=True))
        assert await worker.send_input(job, chunks_of(*chunks)) == len(data)
        expected = f"{len(data)} {hashlib.md5(data).hexdigest()}\n"
        assert (await output(worker, job.id)).decode() == expected
        assert worker.status(job).input_bytes == len(data)
    async with worker_on(state) as worker:
        assert worker.status(worker.job(job.id)).input_bytes == len(data)


@pytest.mark.parametrize("script", ["exit 4", "exec <&-; echo closed; sleep 0.1; exit 4", "head -c 9; exit 4"])
@in_loop
async def test_a_job_that_does_not_read_its_input_ends_it_without_an_error(state, script):
    async with worker_on(state) as worker:
        job = await worker.start(shell(script, input=True))
        assert await worker.send_input(job, endless([])) == worker.status(job).input_bytes
        await worker.wait(job)
        assert ending(worker, job.id) == ("FINISHED", 4, "")
        assert await worker.send_input(job, endless([])) == worker.status(job).input_bytes


@in_loop
async def test_the_end_of_a_job_ends_an_input_that_waits_for_its_sender(state):
    async with worker_on(state) as worker:
        job = await worker.start(shell("read line; echo $line; exit 4", input=True))
        assert await worker.send_input(job, without_end(b"hello\n")) == 6
        assert await output(worker, job.id) == b"hello\n"
        assert ending(worker, job.id) == ("FINISHED", 4, "")


@in_loop
async def test_a_process_outside_the_job_that_holds_its_input_does_not_hold_its_sender(state):
    """It is of the job's uid, and its pipe is full: no event of the pipe reports the job's end."""
    async with worker_on(state) as worker:
        job = await worker.start(shell("echo $$; exec sleep 1000", input=True))
        process = int(await wait_for_output(worker, job.id, b"\n"))
        held, counted = os.open(f"/proc/{process}/fd/0", os.O_RDONLY), []
        try:
            sending = asyncio.ensure_future(worker.send_input(job, endless(counted)))
            while len(counted) * 64 * KIB <= jobworker.PIPE_BYTES:
                await asyncio.sleep(0)
            await worker.stop(job, by="alice")
            assert await sending == worker.status(job).input_bytes
        finally:
            os.close(held)
        assert ending(worker, job.id) == ("STOPPED", 137, "")


@in_loop
async def test_little_more_of_an_input_is_taken_than_the_job_s_pipe_holds(state):
    counted = []
    async with worker_on(state) as worker:
        job = await worker.start(shell("echo $$; exec sleep 1000", input=True))
        sending = asyncio.ensure_future(worker.send_input(job, endless(counted)))
        process = int(await wait_for_output(worker, job.id, b"\n"))
        pipe = os.open(f"/proc/{process}/fd/0", os.O_RDONLY)
        size = fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ)
        while int.from_bytes(fcntl.ioctl(pipe, jobworker.termios.FIONREAD, bytes(4)), sys.byteorder) < size:
            await asyncio.sleep(0)
        os.close(pipe)
        assert size <= worker.status(job).input_bytes <= len(counted) * 64 * KIB <= size + 4 * MIB
        await worker.stop(job)
        assert await sending == worker.status(job).input_bytes


@in_loop
async def test_dev_stdin_can_be_opened_before_and_after_the_end_of_input(state):
    """A script of one line has ended before an interpreter opens it."""
    waits = "trap 'cat /dev/stdin; exit 3' USR1; echo ready; while :; do sleep 1000 & wait; done"
    async with worker_on(state) as worker:
        late = await worker.start(shell(waits, input=True))
        assert await worker.send_input(late, chunks_of(b"hello\n")) == 6
        await wait_for_output(worker, late.id, b"ready")
        worker.signal(late, signal.SIGUSR1)
        assert await output(worker, late.id) == b"ready\nhello\n"
        early = await worker.start(shell("exec </dev/stdin; echo ready; cat", input=True))
        await wait_for_output(worker, early.id, b"ready")
        await worker.send_input(early, chunks_of(b"hello\n"))
        assert await output(worker, early.id) == b"ready\nhello\n"
        assert worker.status(early).spec.confine == worker._confines


@in_loop
async def test_an_input_has_one_sender_and_one_end(state):
    async with worker_on(state) as worker:
        job = await worker.start(shell("cat; sleep 1000", input=True))
        first = asyncio.ensure_future(worker.send_input(job, without_end(b"hello\n")))
        await wait_for_output(worker, job.id, b"hello\n")
        with pytest.raises(jobworker.InputError, match="another caller"):
            await worker.send_input(job, chunks_of(b"x"))
        await worker.stop(job)
        assert await first == 6
        whole = await worker.start(shell("cat; sleep 1000", input=True))
        assert await worker.send_input(whole, chunks_of(b"all")) == 3
        with pytest.raises(jobworker.InputError, match="has ended"):
            await worker.send_input(whole, chunks_of(b"x"))
        without = await worker.start(shell("cat; sleep 1000"))
        with pytest.raises(jobworker.InputError, match="without input"):
            await worker.send_input(without, chunks_of(b"x"))
        await worker.stop_all()
        assert await output(worker, whole.id) == b"all"


@pytest.mark.parametrize("how", ["the chunks raise", "the task is cancelled", "the worker is closed"])
@in_loop
async def test_an_input_that_is_cut_stops_its_job_which_sees_no_end_of_input(state, how):
    async def failing():
        yield b"hello\n"
        raise ZeroDivisionError

    async with worker_on(state) as worker:
        job = await worker.start(shell(SAYS_END, input=True))
        chunks = failing() if how == "the chunks raise" else without_end(b"hello\n")
        sending = asyncio.ensure_future(worker.send_input(job, chunks))
        if how != "the chunks raise":
            await wait_for_output(worker, job.id, b"hello\n")
        if how == "the task is cancelled":
            sending.cancel()
        if how == "the worker is closed":
            worker.begin_shutdown()
        error = {"the chunks raise": ZeroDivisionError, "the task is cancelled": asyncio.CancelledError}
        with pytest.raises(error.get(how, UnavailableError)):
            await sending
    async with worker_on(state) as worker:
        assert b"end" not in await output(worker, job.id)
        assert ending(worker, job.id) == ("STOPPED", 137, "INPUT_CUT")
        assert worker.status(worker.job(job.id)).input_bytes == 6


@in_loop
async def test_an_input_that_is_cut_without_a_free_descriptor_stops_its_job_when_one_is_free(state, capfd):
    log = [""]
    async with worker_on(state) as worker:
        job = await worker.start(shell(SAYS_END, input=True))
        sending = asyncio.ensure_future(worker.send_input(job, without_end(b"hello\n")))
        await wait_for_output(worker, job.id, b"hello\n")
        with no_descriptors():
            sending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sending
            await line_in_log(capfd, "was cut", log)
        assert b"end" not in await output(worker, job.id)
        assert ending(worker, job.id) == ("STOPPED", 137, "INPUT_CUT")
    assert "Traceback" not in log[0] + capfd.readouterr().err


@in_loop
async def test_a_sender_that_is_lost_after_the_end_of_its_input_cuts_nothing(state):
    async with worker_on(state) as worker:
        job = await worker.start(shell(SAYS_END, input=True))
        sending = asyncio.ensure_future(worker.send_input(job, chunks_of(b"hello\n")))
        while job.feed.told != "end":
            await asyncio.sleep(0)
        sending.cancel()
        assert (await output(worker, job.id)).endswith(b"hello\nend\n")
        assert ending(worker, job.id) == ("FINISHED", 0, "")


@in_loop
async def test_an_input_whose_mover_is_killed_is_cut(state):
    async with worker_on(state) as worker:
        await result(worker, shell("true"))
        before = children()
        job = await worker.start(shell(SAYS_END, input=True))
        sending = asyncio.ensure_future(worker.send_input(job, without_end(b"hello\n")))
        await wait_for_output(worker, job.id, b"hello\n")
        (mover,) = children() - before
        os.kill(mover, signal.SIGKILL)
        assert b"end" not in await output(worker, job.id)
        assert ending(worker, job.id) == ("STOPPED", 137, "INPUT_CUT")
        await asyncio.wait((sending,))


@in_loop
async def test_a_job_whose_input_nobody_begins_to_send_is_stopped(state, monkeypatch):
    async with worker_on(state) as worker:
        taken = await worker.start(shell("cat", input=True))
        sending = asyncio.ensure_future(worker.send_input(taken, without_end(b"hello\n")))
        whole = await worker.start(shell("cat; exec sleep 1000", input=True))
        await worker.send_input(whole, chunks_of())
        await wait_for_output(worker, taken.id, b"hello")
        monkeypatch.setattr(jobworker, "INPUT_SECONDS", 0.1)
        forgotten = await worker.start(shell(SAYS_END, input=True))
        assert b"end" not in await output(worker, forgotten.id)
        assert ending(worker, forgotten.id) == ("STOPPED", 137, "INPUT_CUT")
        for job in (taken, whole):
            job.feed.cut_unsent()
        await worker.stop_all(by="alice")
        assert [ending(worker, job.id)[2] for job in (taken, whole)] == ["", ""]  # the first request is recorded
        await sending


@in_loop
async def test_an_owner_s_jobs_that_wait_for_input_are_bounded(state, monkeypatch):
    monkeypatch.setattr(jobworker, "OWNER_INPUTS", 2)
    async with worker_on(state) as worker:
        waiting = [await worker.start(shell("cat; sleep 1000", input=True)) for _ in range(2)]
        with pytest.raises(ExhaustedError, match="2 jobs of 'alice' wait for input"):
            await worker.start(shell("cat", input=True))
        await worker.start(shell("sleep 1000"))
        await worker.start(shell("sleep 1000", input=True, owner="bob"))
        await worker.send_input(waiting[0], chunks_of())
        await worker.start(shell("sleep 1000", input=True))
        await worker.stop_all()


INPUT_DEATHS = [  # the process; the statement before which it dies; the job's ending; whether it may see the end
    ("shim", 'write_event(self._events, "input-ended"', LOST, False),
    ("shim", "os.close(pipe.writer)\n", LOST, True),
    ("mover", "move_input(channel, writer, report)\n", ("STOPPED", 137, "INPUT_CUT"), False),
    ("mover", 'os.write(report, b"%d" % moved)', ("STOPPED", 137, "INPUT_CUT"), False),
    ("server", "if self._folder.send_request(InputEnd(self.size))", ("STOPPED", 137, "INPUT_CUT"), False),
    ("server", "await self._until(job, lambda: job.events.input_bytes is not None", ("FINISHED", 0, ""), True),
]


@pytest.mark.parametrize(("process", "statement", "expected", "may_end"), INPUT_DEATHS)
def test_a_death_at_any_step_of_the_end_of_input_makes_no_false_end(
    state, tmp_path, process, statement, expected, may_end
):
    _, armed = dying_copy(tmp_path, statement)
    body = f"""
    async def chunks():
        yield b"hello\\n"
    job = await worker.start(JobRequest("sh", ("-c", {SAYS_END!r}), owner="alice", id={ID!r}, input=True))
    await worker.send_input(job, chunks())
    await worker.wait(job)
    """
    in_server(state, body, module=tmp_path, status=-9 if process == "server" else 0)
    assert not armed.exists()

    @in_loop
    async def check():
        async with worker_on(state) as worker:
            text = await output(worker, ID)
            assert ending(worker, ID) == expected
            assert may_end or b"end" not in text

    check()


def kill_launcher(served, _client, _shim):
    (launcher,) = children(served.process.pid)
    os.kill(launcher, signal.SIGKILL)


CUTS = [  # what is done in the midst of an input; the job's ending; the exit code of `run`; what it says
    ("kill server", lambda served, _c, _s: end(served.process), ("STOPPED", "INPUT_CUT"), 255, "cut after 6 bytes"),
    (
        "end server",
        lambda served, _c, _s: end(served.process, signal.SIGTERM),
        ("STOPPED", "INPUT_CUT"),
        255,
        "cut after 6 bytes: the server is stopping",
    ),
    ("kill launcher", kill_launcher, ("FINISHED", ""), 0, ""),
    ("kill shim", lambda _p, _c, shim: os.kill(shim, signal.SIGKILL), ("FINISHED", "LOST"), 255, "LOST"),
    ("kill client", lambda _p, client, _s: client.kill(), ("STOPPED", "INPUT_CUT"), -9, ""),
    (
        "close terminal",
        lambda _p, client, _s: client.send_signal(signal.SIGHUP),
        ("STOPPED", "INPUT_CUT"),
        129,
        "is stopped: its input is cut",
    ),
    ("control-c", lambda _p, client, _s: client.send_signal(signal.SIGINT), ("STOPPED", ""), 130, ""),
]


@pytest.mark.parametrize(("act", "expected", "code", "word"), [row[1:] for row in CUTS], ids=[row[0] for row in CUTS])
def test_an_input_that_is_cut_ends_its_job_and_run_says_so(state, certs, port, act, expected, code, word):
    with contextlib.ExitStack() as stack:
        served = stack.enter_context(killed_at_end(spawn(state, certs, port), certs, port))
        script = "trap 'exit 130' INT; echo $PPID; cat; echo end"
        client = served.popen("run", "-i", "sh", "-c", script, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        stack.enter_context(client)
        shim = int(client.stdout.readline())
        client.stdin.write(b"hello\n")
        client.stdin.flush()
        assert client.stdout.readline() == b"hello\n"
        act(served, client, shim)
        if served.process.poll() is not None:
            served = stack.enter_context(killed_at_end(spawn(state, certs, port), certs, port))
        if code == 0:
            client.stdin.write(b"more\n")
            out, err = client.communicate(timeout=PATIENCE)
            assert out == b"more\nend\n"
        else:
            assert client.wait(PATIENCE) == code  # its standard input is still open
            out, err = client.stdout.read(), client.stderr.read()
            assert b"end" not in out
        assert client.returncode == code
        assert word in err.decode()
        (job,) = listed(served)
        status = status_at_end(served, job.id)
        assert (pb.Status.Name(status.status), status.reason) == expected
        assert status.input_bytes == 6 or status.reason != "INPUT_CUT"
        assert call(served, "StopJob", pb.StopJobRequest(id=job.id)) == pb.StopJobResponse()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_start_says_where_its_input_was_cut(state, certs, port, tmp_path, how):
    with killed_at_end(spawn(state, certs, port), certs, port) as served:
        words = ("start", "--input", "-", "--", "sh", "-c", "cat; echo end")
        with served.popen(*words, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as client:
            job = client.stdout.readline().decode().split()[-1]
            client.stdin.write(b"hello\n")
            client.stdin.flush()
            assert first_line(served, job) == b"hello\n"
            end(served.process, how)
            assert client.wait(PATIENCE) == 1
            said = client.stderr.read().decode()
    assert re.fullmatch(rf"jobworker: the input of job {job} was cut after 6 bytes: [^\n]+\n", said)
    with killed_at_end(spawn(state, certs, port), certs, port) as served:
        assert status_at_end(served, job).reason == "INPUT_CUT"


def has_socket(process):
    with contextlib.suppress(FileNotFoundError):  # a descriptor that was closed meanwhile
        links = [os.readlink(entry) for entry in Path(f"/proc/{process.pid}/fd").iterdir()]
        return any(link.startswith("socket:") for link in links)
    return True


@pytest.mark.parametrize("back", [False, True], ids=["the server stays away", "the server comes back"])
def test_start_says_what_is_known_if_its_server_is_lost_before_the_input(state, certs, port, back):
    """It stands between both, because its standard output is a pipe that is full."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(writer, bytes(4096)):
            pass
    os.set_blocking(writer, True)
    with contextlib.ExitStack() as stack:
        served = stack.enter_context(killed_at_end(spawn(state, certs, port), certs, port))
        words = ("start", "--retry-for", "10s" if back else "0.3s", "--input", "/dev/null", "sleep", "1000")
        client = stack.enter_context(served.popen(*words, stdout=writer, stderr=subprocess.PIPE))
        os.close(writer)
        until(lambda: listed(served))
        until(lambda: not has_socket(client))  # it has the answer
        job = listed(served)[0].id
        end(served.process)
        if back:
            served = stack.enter_context(killed_at_end(spawn(state, certs, port), certs, port))
            assert status_at_end(served, job).reason == "INPUT_CUT"
        with open(reader, "rb") as printed:
            assert printed.readline().strip(b"\0").decode() == f"started JobID: {job}\n"
        assert client.wait(PATIENCE) == 1
        said = client.stderr.read().decode()
        last = said.splitlines()[-1]
        assert last.startswith(f"jobworker: the input of job {job} was cut after 0 bytes")
        assert ("gave up after 0.3 s" in last) == (not back)
    with killed_at_end(spawn(state, certs, port), certs, port) as served:
        assert status_at_end(served, job).reason == "INPUT_CUT"


def test_input_comes_from_standard_input_or_a_file_and_ends_exactly(shared, tmp_path):
    data = random.Random(7).randbytes(9 * MIB + 1)
    (tmp_path / "file").write_bytes(data)
    expected = hashlib.sha256(data).hexdigest() + "  -\n"
    with (tmp_path / "file").open("rb") as file:
        done = shared.run("run", "-i", "--", "sha256sum", stdin=file)
    assert (done.returncode, done.stdout, done.stderr) == (0, expected, "")
    assert shared.run("run", "-i", "cat").stdout == ""
    assert shared.run("run", "-i", "bash", "-s", "a", input="echo $1; exit 7").stdout == "a\n"
    job = shared.start("--input", str(tmp_path / "file"), "sha256sum")
    assert shared.run("stream", job).stdout == expected
    assert json.loads(shared.run("status", "--json", job).stdout)["inputBytes"] == len(data)
    assert "inputBytes" not in json.loads(shared.run("status", "--json", shared.start("true")).stdout)


def test_run_ends_with_its_job_while_its_standard_input_is_open(shared):
    with shared.popen("run", "-i", "sh", "-c", "exit 3", stdin=subprocess.PIPE) as client:
        assert client.wait(PATIENCE) == 3


@pytest.mark.parametrize("verb", ["run", "start"])
def test_input_that_cannot_be_read_is_one_sentence_before_the_job_is_started(state, certs, tmp_path, verb):
    with serving(state, certs) as served:
        status = 255 if verb == "run" else 1
        one_sentence(served.run(verb, "--input", "/no/such", "cat"), "/no/such", status=status)
        one_sentence(served.run(verb, "--input", str(tmp_path), "cat"), "directory", status=status)
        assert listed(served) == []
        failing = os.open("/proc/self/mem", os.O_RDONLY)  # a read at its begin is EIO
        done = served.run(verb, "-i", "cat", stdin=failing)
        os.close(failing)
        assert done.returncode == status
        assert re.search("cut after 0 bytes: cannot read standard input: Input/output error", done.stderr)
        assert "Traceback" not in done.stderr
        (job,) = listed(served)
        assert status_at_end(served, job.id).status == pb.STOPPED


def send_input(channel, *messages):
    asking = channel.stream_unary(
        "/proto.WorkerService/SendInput", pb.SendInputRequest.SerializeToString, pb.SendInputResponse.FromString
    )
    try:
        return asking(iter([pb.SendInputRequest(**message) for message in messages]), timeout=PATIENCE).bytes
    except grpc.RpcError as error:
        return error.code().name


def test_only_the_owner_and_an_admin_send_input(shared):
    request = pb.StartJobRequest(cmd="sh", args=["-c", "cat; sleep 1000"], input=True)
    jobs = [call(shared, "StartJob", request).ID for _ in range(2)]
    for role, job, expected in (
        ("user2", jobs[0], "NOT_FOUND"),
        ("user", jobs[0], 2),
        ("user", jobs[0], "FAILED_PRECONDITION"),
        ("user", jobs[1], "INVALID_ARGUMENT"),  # a message that is too large cuts the input
        ("admin", call(shared, "StartJob", request).ID, 2),
    ):
        data = b"x" * (MIB if expected == "INVALID_ARGUMENT" else 1)
        with channel_to(shared, role=role) as channel:
            assert send_input(channel, {"id": job, "data": b"x"}, {"data": data}) == expected
    assert status_at_end(shared, jobs[1]).reason == "INPUT_CUT"
    for job in listed(shared, running=True):
        call(shared, "StopJob", pb.StopJobRequest(id=job.id))


HOLDS_ITS_PIPE = """
import ctypes, os, socket
ours, theirs = socket.socketpair()
print(os.getpid(), flush=True)
ctypes.CDLL(None).splice(ours.fileno(), None, os.open("/proc/self/fd/0", os.O_WRONLY), None, 4096, 0)
"""


def test_a_job_that_holds_the_lock_of_its_input_s_pipe_keeps_no_other_caller_waiting(state, certs):
    with serving(state, certs) as served, channel_to(served) as channel:
        start = pb.StartJobRequest(cmd=PYTHON, args=["-c", HOLDS_ITS_PIPE], input=True)
        job = ask(channel, "StartJob", start).ID
        with open_streams(served, job, 1) as (stream,):
            process = int(next(stream)[2:])
        until(lambda: "splice" in Path(f"/proc/{process}/stack").read_text())
        asking = channel.stream_unary("/proto.WorkerService/SendInput", pb.SendInputRequest.SerializeToString)
        messages = (pb.SendInputRequest(id=job, data=bytes(64 * KIB)) for _ in itertools.count())
        sending = asking.future(messages)
        until(lambda: call(served, "GetJobStatus", pb.GetStatusRequest(id=job)).input_bytes > 0)
        for _ in range(20):
            assert ask(channel, "StartJob", pb.StartJobRequest(cmd="true")).ID
        call(served, "StopJob", pb.StopJobRequest(id=job))
        sending.exception()


def test_inputs_that_no_job_reads_take_bounded_memory(state, certs):
    """gRPC read 72 MB ahead for each of them."""
    count, sent = 20, collections.Counter()

    def messages(job):
        yield pb.SendInputRequest(id=job)
        while True:
            yield pb.SendInputRequest(data=bytes(jobworker.INPUT_BYTES))
            sent[job] += 1

    def stalled():
        before = sent.total()
        time.sleep(0.5)
        return len(sent) == count and sent.total() == before

    with serving(state, certs) as served, channel_to(served) as channel:
        start = pb.StartJobRequest(cmd="sleep", args=["1000"], input=True)
        jobs = [ask(channel, "StartJob", start).ID for _ in range(count)]
        before = anonymous_memory(served)
        asking = channel.stream_unary("/proto.WorkerService/SendInput", pb.SendInputRequest.SerializeToString)
        calls = [asking.future(messages(job)) for job in jobs]
        until(stalled)
        grown = anonymous_memory(served) - before
        for each in calls:
            each.cancel()
        assert {status_at_end(served, job).reason for job in jobs} == {"INPUT_CUT"}
    assert grown < count * 4 * MIB


@contextlib.contextmanager
def serving_older(state, certs, folder, *changes):
    """A server whose program lacks what these pairs of a pattern and a replacement take from it."""
    text = Path(jobworker.__file__).read_text()
    for pattern, replacement in changes:
        text, count = re.subn(pattern, replacement, text, flags=re.DOTALL)
        assert count == 1, pattern
    (folder / "jobworker.py").write_text(text)
    (folder / "gen").symlink_to(HERE / "gen")
    with serving(state, certs, program=(sys.executable, str(folder / "jobworker.py"))) as served:
        yield served


def test_an_older_server_starts_no_job_that_needs_input(state, certs, tmp_path):
    with serving_older(state, certs, tmp_path, (r' +"SendInput": grpc.*?\n +\),\n', "")) as served:
        one_sentence(served.run("run", "-i", "cat"), "`run` needs a newer server", "--input", status=255)
        one_sentence(served.run("start", "-i", "cat"), "`start` needs a newer server", "--input")
        assert listed(served) == []


def test_an_older_server_gets_no_larger_messages_of_input_than_it_takes(state, certs, tmp_path):
    untold = r" +context.set_trailing_metadata\(\(\(INPUT_BYTES_KEY[^\n]*\n", ""
    smaller = r"INPUT_BYTES, OLD_INPUT_BYTES = 512 \* KIB", "INPUT_BYTES, OLD_INPUT_BYTES = 256 * KIB"
    with serving_older(state, certs, tmp_path, untold, smaller) as served:
        (tmp_path / "data").write_bytes(bytes(MIB))
        done = served.run("run", "--input", tmp_path / "data", "wc", "-c")
        assert (done.stdout, done.stderr, done.returncode) == (f"{MIB}\n", "", 0)


def test_run_asks_an_older_server_how_its_job_ended(state, certs, tmp_path):
    untold = r"context.set_trailing_metadata\(\(\(ENDING_KEY[^\n]*", "pass"
    with serving_older(state, certs, tmp_path, untold) as served:
        done = served.run("run", "sh", "-c", "echo hello; exit 4")
        assert (done.stdout, done.stderr, done.returncode) == ("hello\n", "", 4)


def test_run_gets_the_output_and_the_exit_code_of_a_job_that_is_larger_than_keep_bytes(state, certs):
    with serving(state, certs, "--keep-bytes", "1K") as served:
        done = served.run("run", "sh", "-c", "head -c 3000000 /dev/zero; exit 4")
        assert (len(done.stdout), done.stderr, done.returncode) == (3_000_000, "", 4)


def test_a_stream_tells_how_its_job_ended_if_the_job_was_deleted_meanwhile(shared):
    job = shared.start("--", "sh", "-c", "head -c 30000000 /dev/zero; exit 4")
    with open_streams(shared, job, 1) as (stream,):
        next(stream)
        until(lambda: call(shared, "GetJobStatus", pb.GetStatusRequest(id=job)).status == pb.FINISHED)
        call(shared, "RemoveJob", pb.RemoveJobRequest(id=job))
        assert len(list(stream)) > 1
        told = pb.GetStatusResponse.FromString(dict(stream.trailing_metadata())[jobworker.ENDING_KEY])
        assert (told.status, told.exitcode) == (pb.FINISHED, 4)


# --- The .pyz -------------------------------------------------------------------------------------------
# One file that runs anywhere, or says why not. ./build.sh test has built it.


def run_pyz(*words, program=LIKE_PYZ, pyz=PYZ, wrapper=(), **environment):
    whole = {"PATH": os.environ["PATH"], **environment}
    return subprocess.run([*wrapper, str(program), str(pyz), *words], env=whole, cwd="/", stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, timeout=PATIENCE, check=False)  # fmt: skip


bootstrap = module_at(HERE / "pyz" / "__main__.py", "pyz_bootstrap")
first_run = module_at(HERE / "pyz" / "first_run.py", "pyz_first_run")
bundle = module_at(HERE / "pyz" / "bundle.py", "pyz_bundle")
VERSION_LINE = (  # argparse breaks it at the terminal's width
    rf"jobworker {re.escape(jobworker.VERSION)}\s\((commit\s[0-9a-f]{{12}}\+?,\s)?"
    r"grpcio\s[\d.]+,\sprotobuf\s[\d.]+,\scryptography\s[\d.]+\)\n"
)
BUILT_FOR = ("CPython 3.11", "Linux x86_64", "glibc 2.17")


@pytest.mark.parametrize(
    ("running", "said"),
    [
        (("CPython 3.11", "Linux x86_64", "glibc 2.17"), None),
        (("CPython 3.11", "Linux x86_64", "glibc 2.36"), None),
        (("CPython 3.11", "Linux x86_64", "glibc 2.5"), "is for .* with glibc 2.17 or newer, but this is .* with glibc 2.5"),
        (("CPython 3.11", "Linux x86_64", "musl"), "but this is .* with musl: make one with ./build.sh on a machine like this"),
        (("CPython 3.12", "Linux x86_64", "glibc 2.36"), "but this is CPython 3.12 .*: run it with python3.11, or make one"),
        (("CPython 3.11t", "Linux x86_64", "glibc 2.36"), "but this is CPython 3.11t "),
        (("PyPy 3.11", "Linux x86_64", "glibc 2.36"), "but this is PyPy 3.11 "),
        (("CPython 3.11", "Linux aarch64", "glibc 2.36"), "but this is CPython 3.11 on Linux aarch64 .*: make one"),
        (("CPython 3.11", "Linux x86_64 (32 bits)", "glibc 2.36"), "but this is .* on Linux x86_64 .32 bits. "),
        (("CPython 3.11", "Darwin arm64", "unknown libc"), "but this is .* on Darwin arm64 with unknown libc: make one"),
    ],
)  # fmt: skip
def test_a_pyz_names_what_it_was_built_for_and_what_this_machine_is(running, said):
    with pytest.raises(SystemExit, match=f"^jobworker: .*{said}") if said else contextlib.nullcontext():
        bootstrap.check_platform(running, BUILT_FOR)


def test_this_platform_is_the_one_that_runs_the_tests():
    python, machine, libc = bootstrap.this_platform()
    assert python == f"CPython {sys.version_info[0]}.{sys.version_info[1]}"
    assert machine == f"{os.uname().sysname} {os.uname().machine}"
    assert re.fullmatch(r"glibc \d+\.\d+|musl", libc)


def test_the_cache_folder_is_the_user_s_before_a_shared_one(monkeypatch, tmp_path):
    uid = os.geteuid()
    monkeypatch.delenv("CACHE_DIRECTORY", raising=False)
    for home, expected in ((str(tmp_path), f"{tmp_path}/.cache"), ("/nowhere", "")):
        monkeypatch.setenv("XDG_CACHE_HOME", "/chosen")
        monkeypatch.setenv("HOME", home)
        folders = bootstrap.cache_folders()
        assert folders == ("/chosen", "", expected, f"/var/tmp/jobworker-{uid}", f"/tmp/jobworker-{uid}")
    monkeypatch.setenv("CACHE_DIRECTORY", "/of/the/service:/second")
    assert bootstrap.cache_folders()[1] == "/of/the/service"


@pytest.mark.parametrize(
    ("owner", "mode", "said"),
    [
        (None, 0o755, None),
        (None, 0o700, None),
        (None, 0o1777, None),  # as /tmp: others cannot rename what they do not own
        (None, 0o777, "other users can write to it"),
        (None, 0o770, "other users can write to it"),
        (12345, 0o755, "belongs to another user"),
        (12345, 0o1777, "belongs to another user"),
    ],
)
def test_a_parent_folder_that_another_user_controls_is_refused(tmp_path, owner, mode, said):
    parent = tmp_path / "parent"
    parent.mkdir()
    parent.chmod(mode)
    if owner is not None:
        if os.geteuid() != 0:
            pytest.skip("needs root, to give a folder away")
        os.chown(parent, owner, owner)
    with pytest.raises(OSError, match=said) if said else contextlib.nullcontext():
        assert bootstrap.private_folder(str(parent / "a" / "b")) == str(parent / "a" / "b")
        assert (parent / "a" / "b").stat().st_mode & 0o777 == 0o700
    assert (parent / "a").exists() == (said is None)


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o1777])
def test_the_cache_folder_itself_is_this_user_s_alone(tmp_path, mode):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(mode)
    with pytest.raises(OSError, match=r"other users can write|does not belong to this user alone"):
        bootstrap.private_folder(str(tmp_path / "cache"))


@pytest.mark.parametrize(
    "change", ["none", "a file less", "a byte less", "a file more", "a link to it", "nothing there"]
)
def test_an_unpacked_folder_is_complete_or_made_anew(tmp_path, change):
    folder = tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    (folder / "one").write_bytes(b"1")
    (folder / "below" / "two").write_bytes(b"22")
    first_run.write_size(str(folder))
    if change == "a file less":
        (folder / "below" / "two").unlink()
    elif change == "a byte less":
        (folder / "below" / "two").write_bytes(b"2")
    elif change == "a file more":
        (folder / "below" / "three").touch()
    elif change == "a link to it":
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to("elsewhere")
    elif change == "nothing there":
        shutil.rmtree(folder)
    assert bootstrap.is_complete(str(folder)) == (change == "none")


def unpacked(cache):
    return [folder for folder in (cache / "jobworker").iterdir() if folder.is_dir()]


@needs_pyz
def test_the_pyz_serves_and_calls_with_nothing_but_python(state, certs, tmp_path):
    program = (str(LIKE_PYZ), "-I", "-S", str(PYZ))
    with serving(state, certs, program=program, cwd="/") as served:
        done = served.run("start", "--", "echo", "hello", program=program)
        job = done.stdout.split()[-1]
        assert served.run("stream", job, program=program).stdout == "hello\n"


@needs_pyz
def test_the_pyz_unpacks_itself_once_where_only_its_user_can_write(tmp_path):
    for _ in range(2):
        done = run_pyz("--version", XDG_CACHE_HOME=str(tmp_path))
        assert re.fullmatch(VERSION_LINE, done.stdout), done.stderr
    (cache,) = unpacked(tmp_path)
    assert cache.stat().st_mode & 0o777 == 0o700
    shutil.rmtree(cache / "grpc")  # half of it is gone: it is made anew
    assert run_pyz("status", ID, "--certs", "/nowhere", XDG_CACHE_HOME=str(tmp_path)).stderr.startswith(
        "jobworker: cannot read /nowhere"
    )
    assert (cache / "grpc").exists()


@needs_pyz
def test_two_first_runs_at_once_both_run(tmp_path):
    runs = [
        subprocess.Popen(
            [str(LIKE_PYZ), str(PYZ), "--version"], env={"XDG_CACHE_HOME": str(tmp_path)}, stdout=subprocess.PIPE
        )
        for _ in range(4)
    ]
    assert all(re.fullmatch(VERSION_LINE, run.communicate(timeout=PATIENCE)[0].decode()) for run in runs)
    assert len(unpacked(tmp_path)) == 1


@needs_pyz
@as_root
def test_the_pyz_runs_from_a_read_only_place_as_anybody_and_without_a_home(tmp_path):
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o755)
    place = tmp_path / "place"
    place.mkdir()
    shutil.copy(PYZ, place)
    mounted = (
        "unshare",
        "-m",
        "sh",
        "-c",
        f'mount --bind {place} {place}; mount -o remount,bind,ro {place}; exec "$@"',
        "sh",
    )
    other = (*mounted, "setpriv", "--reuid=54321", "--regid=54321", "--clear-groups")
    version = subprocess.run([PYTHON_FOR_ALL, "-V"], capture_output=True, text=True, check=True).stdout.split()[1]
    same_python = version.split(".")[:2] == [str(number) for number in sys.version_info[:2]]
    for wrapper, environment in (
        (mounted, {}),
        (mounted, {"HOME": "/nowhere"}),
        (other, {}),
        (other, {"HOME": "/root"}),
    ):
        done = run_pyz("--version", program=PYTHON_FOR_ALL, pyz=place / "jobworker.pyz", wrapper=wrapper, **environment)
        if same_python:
            assert re.fullmatch(VERSION_LINE, done.stdout), done.stderr
        else:
            one_sentence(done, "is for CPython")
    shutil.rmtree("/var/tmp/jobworker-54321", ignore_errors=True)


@needs_pyz
@as_root
def test_a_cache_that_another_could_have_written_is_not_used(tmp_path):
    tmp_path.chmod(0o755)
    (tmp_path / "jobworker").mkdir()
    os.chown(tmp_path / "jobworker", 12345, 12345)
    done = run_pyz("--version", XDG_CACHE_HOME=str(tmp_path), HOME=str(tmp_path / "none"))
    assert re.fullmatch(VERSION_LINE, done.stdout), done.stderr
    assert list((tmp_path / "jobworker").iterdir()) == []


@needs_pyz
@as_root
def test_a_cache_on_a_noexec_file_system_is_one_sentence(tmp_path):
    wrapper = ("unshare", "-m", "sh", "-c", f'mount -t tmpfs -o noexec none {tmp_path}; exec "$@"', "sh")
    done = run_pyz("status", ID, wrapper=wrapper, XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 1
    assert re.fullmatch(r"jobworker: [^\n]*noexec[^\n]*\n", done.stderr)


PYENV = Path("/root/.pyenv/versions")
OTHER_PYTHONS = [
    path
    for path in (sorted(PYENV.glob("3.*/bin/python3")) if os.access(PYENV, os.R_OK) else [])
    if not path.parts[4].startswith(f"3.{sys.version_info[1]}.")
]


@needs_pyz
@pytest.mark.skipif(not OTHER_PYTHONS, reason="needs another Python than the one that built the .pyz")
def test_a_wrong_python_is_told_so_in_one_sentence():
    for python in OTHER_PYTHONS:
        done = run_pyz("--version", program=python)
        assert done.returncode == 1
        assert re.fullmatch(r"jobworker: [^\n]+\n", done.stderr)
        assert f"3.{sys.version_info[1]}" in done.stderr
        assert python.parts[4].rsplit(".", 1)[0] in done.stderr


def test_the_readme_s_session_is_what_a_newcomer_gets():
    """./build.sh demo plays it; ids and dates aside, each line is the README's."""
    done = subprocess.run(
        [HERE / "build.sh", "demo"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shown = re.search(r"<!-- session -->\n```\w*\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)[1]
    plain = [re.sub(UUID, "ID", text) for text in (shown, done.stdout)]
    assert plain[0] == plain[1]


def lay_traps(folder, names):
    """Modules that, when imported, say so and fail."""
    for name in names:
        (folder / f"{name}.py").write_text("import os; os.write(2, b'TRAPPED ' + __name__.encode()); os._exit(66)\n")


TRAPS = ("jobworker", "gen", "grpc", "google", "cryptography", "_cffi_backend", "typing_extensions")
LATER_TRAPS = (
    "shutil",
    "tempfile",
    "zipfile",
    "fcntl",
    "argparse",
    "asyncio",
    "json",
    "ssl",
    "subprocess",
    "platform",
    "random",
)


@needs_pyz
def test_code_of_the_working_directory_is_never_run(shared, tmp_path):
    cache, here = tmp_path / "cache", tmp_path / "here"
    here.mkdir()
    lay_traps(here, TRAPS + LATER_TRAPS)
    environment = {
        "PATH": os.environ["PATH"],
        "XDG_CACHE_HOME": str(cache),
        "JOBWORKER_SERVER": shared.address,
        "JOBWORKER_CERTS": str(shared.certs),
    }
    for _ in range(2):  # the first run unpacks, the second does not
        done = subprocess.run(
            [LIKE_PYZ, PYZ, "status", ID],
            cwd=here,
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.stderr == f"jobworker: there is no job {ID}\n"


@needs_pyz
def test_what_python_s_own_path_names_has_no_say(shared, tmp_path):
    cache, here = tmp_path / "cache", tmp_path / "here"
    here.mkdir()
    lay_traps(here, TRAPS + LATER_TRAPS)
    environment = {
        "PATH": os.environ["PATH"],
        "XDG_CACHE_HOME": str(cache),
        "JOBWORKER_SERVER": shared.address,
        "JOBWORKER_CERTS": str(shared.certs),
    }
    for _ in range(2):  # -S: this machine's own packages may import what they like before us
        done = subprocess.run([LIKE_PYZ, "-S", PYZ, "status", ID], cwd=here, env={**environment, "PYTHONPATH": str(here)}, capture_output=True, text=True,
                              timeout=PATIENCE, check=False)  # fmt: skip
        assert done.stderr == f"jobworker: there is no job {ID}\n"


@needs_pyz
@pytest.mark.parametrize("damage", ["half", "all but the end", "a hole", "nothing"])
def test_a_file_that_was_damaged_on_its_way_is_told_so(tmp_path, damage):
    whole = PYZ.read_bytes()
    hole = bytearray(whole)
    hole[len(whole) // 3 : len(whole) // 3 + 5000] = bytes(5000)
    spoiled = {"half": whole[: len(whole) // 2], "all but the end": whole[:-30], "a hole": bytes(hole), "nothing": b""}[
        damage
    ]
    (tmp_path / "jobworker.pyz").write_bytes(spoiled)
    done = run_pyz("--version", pyz=tmp_path / "jobworker.pyz", XDG_CACHE_HOME=str(tmp_path / "cache"))
    if damage == "nothing":  # an empty script does nothing, and says nothing
        assert done.stdout == ""
        return
    assert done.returncode == 1
    assert "damaged" in done.stderr or "cut-short" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "cache" / "jobworker").exists() or unpacked(tmp_path / "cache") == []


@needs_pyz
@as_root
def test_a_cache_without_room_is_one_sentence(tmp_path):
    wrapper = ("unshare", "-m", "sh", "-c", f'mount -t tmpfs -o size=3M none {tmp_path}; exec "$@"', "sh")
    one_sentence(run_pyz("--version", wrapper=wrapper, XDG_CACHE_HOME=str(tmp_path)), "no room", str(tmp_path))


@needs_pyz
@pytest.mark.parametrize("how", ["a link elsewhere", "open to all", "a file"])
def test_a_place_that_others_could_write_is_passed_over_or_named(tmp_path, how):
    cache, home = tmp_path / "cache", tmp_path / "home"
    (home / ".cache").mkdir(parents=True)
    if how == "a file":
        cache.write_text("x")
    elif how == "open to all":
        (cache / "jobworker").mkdir(parents=True)
        (cache / "jobworker").chmod(0o777)
    else:
        (tmp_path / "shared").mkdir()
        (tmp_path / "shared").chmod(0o777)
        cache.symlink_to(tmp_path / "shared")
    done = run_pyz("--version", XDG_CACHE_HOME=str(cache), HOME=str(home))
    assert re.fullmatch(VERSION_LINE, done.stdout), done.stderr
    assert len(unpacked(home / ".cache")) == 1


@needs_pyz
def test_a_first_run_that_was_killed_leaves_nothing_that_is_used(tmp_path):
    """Killed when its half-made folder is there; the next one makes it whole and clears up."""
    for _ in range(3):
        first = subprocess.Popen(
            [LIKE_PYZ, PYZ, "--version"], env={"XDG_CACHE_HOME": str(tmp_path)}, stdout=subprocess.DEVNULL
        )
        until(
            lambda run=first: (
                run.poll() is not None
                or ((tmp_path / "jobworker").exists() and len(os.listdir(tmp_path / "jobworker")) > 1)
            )
        )
        first.kill()
        first.wait(PATIENCE)
        done = run_pyz("status", ID, "--certs", "/nowhere", XDG_CACHE_HOME=str(tmp_path))
        one_sentence(done, "/nowhere")
        (cache,) = unpacked(tmp_path)
        shutil.rmtree(cache)


# --- One file for every machine -------------------------------------------------------------------------
# What ./build.sh universal makes. ./build.sh test-universal builds it first, and tests more than fits a normal run.

UNIVERSAL = HERE / "dist" / "jobworker.pyz"
needs_universal = pytest.mark.skipif(not UNIVERSAL.exists(), reason="needs dist/jobworker.pyz: ./build.sh universal")
in_full = pytest.mark.skipif(os.environ.get("JOBWORKER_UNIVERSAL") != "all", reason="needs ./build.sh test-universal")
PYTHONS = [
    path
    for path in (*(sorted(PYENV.glob("3.1*/bin/python3")) if os.access(PYENV, os.R_OK) else []), PYTHON_FOR_ALL)
    if path.exists()
]
OLD_PYTHONS = [path for number in ("2.7", "3.[6-9]") for path in sorted(PYENV.glob(f"{number}.*/bin/python"))]


def run_universal(*words, program=LIKE_PYZ, pyz=UNIVERSAL, **options):
    return run_pyz(*words, program=program, pyz=pyz, **options)


@pytest.fixture
def small_archive(tmp_path):
    """A zip with part.tar.xz, of three folders, and the hashes of these."""
    parts = {"abi3": {"a/b.so": b"b" * 5000}, "cp314": {"c.so": b"new" * 9000}, "cp310": {"c.so": b"old" * 9000}}
    path = tmp_path / "small.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("part.tar.xz", bundle.compressed(bundle.archive_of(parts), tmp_path))
    return path, bundle.sums_of("part", parts)


def test_a_wheel_s_libraries_and_those_they_bring_go_to_the_part_of_their_python(tmp_path):
    for name, inside in (
        (
            "one-1.0-cp39-abi3-musllinux_1_2_x86_64",
            ("one/a.abi3.so", "one.libs/libgcc_s-0cd532bd.so.1", "one/x.py", "one/y.pyi"),
        ),
        ("two-2.0-cp310-cp310-musllinux_1_2_x86_64", ("two/b.cpython-310.so", "two.dist-info/LICENSE", "cffi/api.py")),
    ):
        with zipfile.ZipFile(tmp_path / f"{name}.whl", "w") as file:
            for path in inside:
                file.writestr(path, path)
    wheels = bundle.Wheels(tmp_path)
    assert sorted(wheels.abi3) == ["one.libs/libgcc_s-0cd532bd.so.1", "one/a.abi3.so"]
    assert sorted(wheels.libraries) == ["two/b.cpython-310.so"]
    assert sorted(wheels.sources) == ["licenses/two/LICENSE", "one/x.py"]
    assert wheels.versions == {"one": "1.0", "two": "2.0"}


@pytest.mark.parametrize("has_lzma", [True, False])
@pytest.mark.parametrize(("python", "content"), [("cp314", b"new"), ("cp310", b"old")])
def test_one_python_s_part_of_an_archive_is_extracted(small_archive, tmp_path, monkeypatch, has_lzma, python, content):
    path, sums = small_archive
    if not has_lzma:
        monkeypatch.setitem(sys.modules, "lzma", None)
    first_run.extract(str(path), "part", ["abi3", python], str(tmp_path / "out"), sums)
    found = {str(file.relative_to(tmp_path / "out")): file.read_bytes() for file in (tmp_path / "out").rglob("*.so")}
    assert found == {"a/b.so": b"b" * 5000, "c.so": content * 9000}


def test_without_lzma_and_xz_one_sentence_names_the_package(small_archive, tmp_path, monkeypatch):
    path, sums = small_archive
    monkeypatch.setitem(sys.modules, "lzma", None)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SystemExit, match="no lzma module, and there is no xz: install xz-utils"):
        first_run.extract(str(path), "part", ["abi3"], str(tmp_path / "out"), sums)


def test_a_part_that_is_not_what_was_built_is_damaged(small_archive, tmp_path):
    path, sums = small_archive
    with pytest.raises(first_run.DamagedError):
        first_run.extract(str(path), "part", ["abi3"], str(tmp_path / "out"), {**sums, "part/abi3": "0" * 64})


@pytest.mark.parametrize(
    ("running", "target"),
    [
        (("CPython 3.12", "Linux x86_64", "glibc 2.36"), "x86_64-glibc"),
        (("CPython 3.12", "Linux x86_64", "glibc 2.17"), "x86_64-glibc"),
        (("CPython 3.12", "Linux x86_64", "glibc 2.12"), None),
        (("CPython 3.12", "Linux aarch64", "musl"), "aarch64-musl"),
        (("CPython 3.12", "Linux x86_64", "musl"), None),
        (("CPython 3.15", "Linux x86_64", "glibc 2.36"), None),
        (("CPython 3.13t", "Linux x86_64", "glibc 2.36"), None),
        (("PyPy 3.12", "Linux x86_64", "glibc 2.36"), None),
        (("CPython 3.12", "Linux x86_64 (32 bits)", "glibc 2.36"), None),
        (("CPython 3.12", "Darwin arm64", "unknown libc"), None),
    ],
)
def test_the_target_inside_fits_python_machine_and_libc(running, target):
    built = {
        "targets": ["x86_64-glibc", "aarch64-musl"],
        "pythons": ["CPython 3.12", "CPython 3.13"],
        "glibc": [2, 17],
    }
    assert bootstrap.target_of(running, built) == target


@pytest.mark.parametrize(
    ("mapped", "libc"),
    [
        ("7f00-7f01 r-xp 00000000 08:01 12 /lib/ld-musl-x86_64.so.1", "musl"),
        ("7f00-7f01 r-xp 00000000 08:01 12 /usr/lib/x86_64-linux-musl/libc.so", "musl"),  # Debian's musl
        ("7f00-7f01 r-xp 00000000 08:01 12 /usr/lib/x86_64-linux-gnu/libc.so.6", "unknown libc"),
        ("7f00-7f01 r-xp 00000000 00:00 0", "unknown libc"),
    ],
)
def test_musl_is_known_by_what_this_process_maps(tmp_path, mapped, libc):
    (tmp_path / "maps").write_text(f"{mapped}\n")
    assert bootstrap.mapped_libc(tmp_path / "maps") == libc


def play_a_job(state, certs, cache, *program):
    """Serve, start, stream, status, stop: all by this program, in a cache of its own."""
    environment = {"PATH": os.environ["PATH"], "XDG_CACHE_HOME": str(cache)}
    with serving(state, certs, program=program, cwd="/", env=environment) as served:
        environment |= {"JOBWORKER_SERVER": served.address, "JOBWORKER_CERTS": str(certs)}

        def run(*words):
            done = served.run(*words, program=program, env=environment)
            assert done.returncode == 0, done.stderr
            return done.stdout

        job = run("start", "--", "sh", "-c", "echo hello; sleep 1000").split()[-1]
        with subprocess.Popen([*program, "stream", job], env=environment, stdout=subprocess.PIPE) as stream:
            assert stream.stdout.readline() == b"hello\n"
            assert "RUNNING" in run("status", job)
            run("stop", job)
            stream.wait(PATIENCE)
        assert "STOPPED" in run("status", job)


@needs_universal
@pytest.mark.parametrize("python", PYTHONS, ids=lambda path: path.parts[4] if "pyenv" in str(path) else "system")
def test_universal_serves_starts_streams_and_stops_on_every_python(state, certs, tmp_path, python):
    play_a_job(state, certs, tmp_path, str(python), str(UNIVERSAL))
    (folder,) = unpacked(tmp_path)
    assert folder.name.endswith(f"-{os.uname().machine}-glibc")


def python_in_root(tmp_path, script, *words, pyz=UNIVERSAL):
    """The command that runs a copy of the .pyz with the Python of the folder that .ci/SCRIPT makes, once."""
    root = HERE / "build" / "roots" / "-".join(words or ("musl",))
    subprocess.run([HERE / ".ci" / script, *words, root], check=True)
    copy = tmp_path / pyz.name
    shutil.copy(pyz, copy)
    return str(HERE / ".ci" / "in-root"), str(root), "python3", str(copy)


@needs_universal
@as_root
@in_full
@pytest.mark.parametrize(
    ("made_by", "folder"),
    [
        ("debian-root trixie amd64", "cpython-313-x86_64-glibc"),
        ("debian-root forky amd64", "cpython-314-x86_64-glibc"),
        ("debian-root bookworm arm64", "cpython-311-aarch64-glibc"),
        ("debian-root trixie arm64", "cpython-313-aarch64-glibc"),
        ("debian-root forky arm64", "cpython-314-aarch64-glibc"),
        ("musl-root", "cpython-313-x86_64-musl"),
    ],
)
def test_universal_serves_starts_streams_and_stops_on_other_systems(state, certs, tmp_path, made_by, folder):
    """In a folder with that system's programs; those of an aarch64 are run by qemu, where a first run takes a minute."""
    target = folder.split("-", 2)[2]
    with zipfile.ZipFile(UNIVERSAL) as file:
        if f"{target}.tar.xz" not in file.namelist():
            pytest.skip(f"dist/jobworker.pyz has no {target}: ./build.sh test-universal {target}")
    program = python_in_root(tmp_path, *made_by.split())
    environment = {"PATH": os.environ["PATH"], "XDG_CACHE_HOME": str(tmp_path / "cache")}
    subprocess.run([*program, "--version"], env=environment, check=True, timeout=20 * PATIENCE)
    play_a_job(state, certs, tmp_path / "cache", *program)
    assert [path.name.split("-", 1)[1] for path in unpacked(tmp_path / "cache")] == [folder]


@needs_pyz
@needs_universal
@as_root
@in_full
def test_universal_for_glibc_alone_says_on_musl_what_helps(tmp_path):
    without_musl = tmp_path / "jobworker-glibc.pyz"
    command = [sys.executable, "pyz/bundle.py", "--wheels", "build/wheels", without_musl, "x86_64-glibc"]
    subprocess.run(command, cwd=HERE, check=True, timeout=10 * PATIENCE)
    (tmp_path / "copies").mkdir()
    here = "this is CPython 3.13 on Linux x86_64 with musl"
    for pyz, said in (
        (without_musl, "python3 -m venv ~/jobworker && "),
        (PYZ, "make one with ./build.sh on a machine"),
    ):
        *wrapper, program, copy = python_in_root(tmp_path / "copies", "musl-root", pyz=pyz)
        cache = str(tmp_path / "cache")
        done = run_pyz("--version", program=program, pyz=copy, wrapper=wrapper, XDG_CACHE_HOME=cache)
        one_sentence(done, here, said)
    assert not (tmp_path / "cache").exists()


@needs_universal
@pytest.mark.parametrize("python", OLD_PYTHONS, ids=lambda path: path.parts[4])
def test_universal_tells_an_old_python_so_in_one_sentence(python):
    if python.parts[4].startswith("2."):
        one_sentence(
            run_universal("--version", program=python), "Python 3.10 or newer is needed, but this is Python 2.7"
        )
    else:
        one_sentence(
            run_universal("--version", program=python), "Python 3.10 or newer is needed, but this is Python 3."
        )


@needs_universal
@as_root
@pytest.mark.parametrize("case", ["HOME=", "HOME=/proc", "HOME=/nowhere", "another user's cache"])
def test_universal_runs_without_a_cache_of_the_user_s(tmp_path, case):
    tmp_path.chmod(0o755)
    mount = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs none /var/tmp; chmod 1777 /var/tmp; "$@"; ls /var/tmp', "sh")
    environment = {}
    if case.startswith("HOME="):
        environment["HOME"] = case[5:]
    else:
        (tmp_path / "jobworker").mkdir()
        os.chown(tmp_path / "jobworker", 12345, 12345)
        environment["XDG_CACHE_HOME"] = str(tmp_path)
    done = run_universal("--version", wrapper=mount, **environment)
    assert re.fullmatch(VERSION_LINE + "jobworker-0\n", done.stdout), done.stderr


@needs_universal
@as_root
@pytest.mark.parametrize(("options", "said"), [("noexec", "noexec"), ("size=9M", "no room for")])
def test_universal_names_a_file_system_that_does_not_do(tmp_path, options, said):
    left = f"find {tmp_path} -type f ! -name lock >&2"
    mounted = f'mount -t tmpfs -o {options} none {tmp_path}; "$@"; status=$?; {left}; exit $status'
    wrapper = ("unshare", "-m", "sh", "-c", mounted, "sh")
    one_sentence(run_universal("--version", wrapper=wrapper, XDG_CACHE_HOME=str(tmp_path)), said, str(tmp_path))


@needs_universal
def test_universal_five_first_runs_at_once_all_run(tmp_path):
    runs = [
        subprocess.Popen(
            [LIKE_PYZ, UNIVERSAL, "--version"], env={"XDG_CACHE_HOME": str(tmp_path)}, stdout=subprocess.PIPE, text=True
        )
        for _ in range(5)
    ]
    assert all(re.fullmatch(VERSION_LINE, run.communicate(timeout=PATIENCE)[0]) for run in runs)
    assert len(os.listdir(tmp_path / "jobworker")) == 2  # with the lock


@needs_universal
def test_universal_a_first_run_that_was_killed_leaves_nothing(tmp_path):
    first = subprocess.Popen([LIKE_PYZ, UNIVERSAL, "--version"], env={"XDG_CACHE_HOME": str(tmp_path)})
    until(lambda: list(tmp_path.glob("jobworker/new-*/jobworker/*")))
    first.kill()
    first.wait(PATIENCE)
    assert re.fullmatch(VERSION_LINE, run_universal("--version", XDG_CACHE_HOME=str(tmp_path)).stdout)
    assert len(os.listdir(tmp_path / "jobworker")) == 2


def flip(path, at):
    """Overwrite 8 bytes."""
    with path.open("r+b") as file:
        file.seek(at)
        before = file.read(8)
        file.seek(at)
        file.write(bytes(each ^ 255 for each in before))


@needs_universal
def test_universal_makes_a_folder_anew_that_was_damaged(tmp_path):
    run_universal("--version", XDG_CACHE_HOME=str(tmp_path))
    (folder,) = unpacked(tmp_path)
    for name, damage in (
        ("grpc/_cython/*.so", Path.unlink),
        ("grpc/_cython/*.so", lambda file: flip(file, 1 << 20)),
        ("jobworker.py", lambda file: flip(file, 1 << 10)),
    ):
        (file,) = folder.glob(name)
        before = file.read_bytes()
        damage(file)
        assert re.fullmatch(VERSION_LINE, run_universal("--version", XDG_CACHE_HOME=str(tmp_path)).stdout)
        assert file.read_bytes() == before
        assert unpacked(tmp_path) == [folder]


@needs_universal
def test_universal_bytecode_that_rotted_on_the_disk_is_one_sentence(tmp_path):
    """No time of a file tells of it. The sentence names the folder to delete."""
    run_universal("--version", XDG_CACHE_HOME=str(tmp_path))
    (folder,) = unpacked(tmp_path)
    (file,) = folder.glob("__pycache__/jobworker.*.pyc")
    info = file.stat()
    flip(file, 16)
    os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns))
    one_sentence(run_universal("--version", XDG_CACHE_HOME=str(tmp_path)), f"{folder} does not load, so delete it: ")


def places(pyz):
    """Where damage to a universal file is found by itself: what is in the parts and in front of them, and first_run.py."""
    with zipfile.ZipFile(pyz) as file:
        info = {each.filename: each for each in file.infolist()}
        directory = pyz.read_bytes()[file.start_dir :]
    native = f"{os.uname().machine}-glibc.tar.xz"
    for name in ("python.tar.xz", native, "first_run.py"):
        start, size = info[name].header_offset, info[name].file_size
        data = start + 30 + len(name)
        yield f"{name} at its beginning", data
        yield f"{name} at an eighth", data + size // 8
        yield f"{name} in its header", start
        if name.endswith(".xz"):
            yield f"{name} in the directory", file.start_dir + directory.index(name.encode())


@needs_universal
def test_universal_file_with_8_bytes_overwritten_is_one_sentence(tmp_path):
    pyz, cache = tmp_path / "jobworker.pyz", tmp_path / "cache"
    shutil.copy(UNIVERSAL, pyz)
    for place, at in places(UNIVERSAL):
        flip(pyz, at)
        done = run_universal("--version", pyz=pyz, XDG_CACHE_HOME=str(cache))
        flip(pyz, at)  # back
        assert re.fullmatch(rf"jobworker: {pyz} is damaged: copy it here again\n", done.stderr), (place, done.stderr)
        assert done.returncode == 1
        assert [each for each in cache.rglob("*") if each.name != "lock"] in ([], [cache / "jobworker"]), place
    assert re.fullmatch(VERSION_LINE, run_universal("--version", pyz=pyz, XDG_CACHE_HOME=str(cache)).stdout)


@needs_universal
@pytest.mark.parametrize("part", ["__main__.py", "python.tar.xz", f"{os.uname().machine}-glibc.tar.xz"])
def test_universal_file_that_was_cut_short_is_told_so(tmp_path, part):
    with zipfile.ZipFile(UNIVERSAL) as file:
        info = file.getinfo(part)
    (tmp_path / "jobworker.pyz").write_bytes(UNIVERSAL.read_bytes()[: info.header_offset + info.file_size // 2])
    done = run_universal("--version", pyz=tmp_path / "jobworker.pyz", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert (done.returncode, done.stdout) == (1, "")
    assert "cut-short" in done.stderr
    assert "Traceback" not in done.stderr


def hide_a_library(tmp_path, name):
    """A wrapper that runs a command on a system without the library."""
    folder = next(path.parent for path in Path("/usr/lib").rglob(name))
    for each in ("upper", "work"):
        (tmp_path / each).mkdir()
    mounts = f"mount -t tmpfs none {tmp_path}; mkdir {tmp_path}/upper {tmp_path}/work; mount -t overlay none "
    mounts += f"-o lowerdir={folder},upperdir={tmp_path}/upper,workdir={tmp_path}/work {folder}; rm {folder}/{name}*"
    return ("unshare", "-m", "sh", "-c", f'{mounts}; exec "$@"', "sh")


@needs_pyz
@as_root
@pytest.mark.parametrize("pyz", [PYZ, pytest.param(UNIVERSAL, marks=needs_universal)], ids=["ordinary", "universal"])
def test_a_missing_libstdc_is_one_sentence(certs, tmp_path, pyz):
    wrapper = hide_a_library(tmp_path, "libstdc++.so.6")
    done = run_pyz("status", ID, "--certs", str(certs), pyz=pyz, wrapper=wrapper)
    one_sentence(done, "this system has no libstdc++.so.6, which gRPC needs: install libstdc++6 (apt)")


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory):
    """A universal file in which this machine's target is not."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "wheels").mkdir()
    for path in (HERE / "build" / "wheels").iterdir():
        (folder / "wheels" / path.name.replace(os.uname().machine, "riscv64")).symlink_to(path)
    out = folder / "jobworker.pyz"
    command = [sys.executable, "pyz/bundle.py", "--wheels", folder / "wheels", out, "riscv64-glibc"]
    subprocess.run(command, cwd=HERE, check=True, timeout=10 * PATIENCE)
    return out


@needs_universal
def test_universal_takes_this_python_s_own_packages_where_it_has_none(shared, elsewhere, tmp_path):
    traps = tmp_path / "traps"
    traps.mkdir()
    lay_traps(traps, TRAPS)
    environment = {"PATH": os.environ["PATH"], "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(traps),
                   "JOBWORKER_SERVER": shared.address, "JOBWORKER_CERTS": str(shared.certs)}  # fmt: skip
    done = subprocess.run([sys.executable, elsewhere, "status", ID], cwd=traps, env=environment, capture_output=True, text=True,
                          timeout=PATIENCE, check=False)  # fmt: skip
    assert done.stderr == f"jobworker: there is no job {ID}\n"
    (folder,) = unpacked(tmp_path / "cache")
    assert folder.name.endswith("-own")
    assert not list(folder.rglob("*.so"))
    assert re.fullmatch(
        VERSION_LINE, run_pyz("--version", program=sys.executable, pyz=elsewhere, XDG_CACHE_HOME=str(tmp_path)).stdout
    )


@needs_universal
def test_universal_names_the_way_to_own_packages_where_there_are_none(elsewhere, tmp_path):
    done = run_pyz("--version", pyz=elsewhere, XDG_CACHE_HOME=str(tmp_path))
    one_sentence(
        done, "this Python has no grpcio of its own: python3 -m venv ~/jobworker && ~/jobworker/bin/pip install"
    )
    assert not (tmp_path / "jobworker").exists()


@needs_universal
def test_universal_refuses_own_packages_that_are_too_old_before_any_is_imported(elsewhere, tmp_path):
    lay_traps(tmp_path, TRAPS)
    for name, version in (("grpcio", "1.51.1"), ("protobuf", "7.36.2"), ("cryptography", "50.0.2")):
        (tmp_path / f"{name}-{version}.dist-info").mkdir()
        (tmp_path / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    code = f"import runpy, site, sys; site.getsitepackages = lambda: [{str(tmp_path)!r}]; sys.argv = [{str(elsewhere)!r}, '--version']; "
    code += "sys.path[0] = sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run([LIKE_PYZ, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=False)
    one_sentence(done, "its own grpcio is 1.51.1, older than 1.85.1")


@needs_universal
def test_universal_takes_over_from_the_ordinary_file_under_running_jobs(state, certs, tmp_path, port):
    place = tmp_path / "jobworker.pyz"
    shutil.copy(PYZ, place)
    environment = {"PATH": os.environ["PATH"], "XDG_CACHE_HOME": str(tmp_path)}
    program = (str(LIKE_PYZ), str(place))
    with serving(state, certs, program=program, port=port, end=signal.SIGKILL, env=environment) as served:
        job = served.start("--", "sh", "-c", "mkfifo gate; echo before; read line <gate; echo after; exit 6")
        shutil.copy(UNIVERSAL, tmp_path / "new")
        os.replace(tmp_path / "new", place)
        assert served.run("stream", served.start("--", "echo", "old still")).stdout == "old still\n"
    with serving(state, certs, program=program, port=port, env=environment) as served:
        home = next((state / "home").iterdir()) if os.geteuid() == 0 else Path.home()
        (home / "gate").write_text("go\n")
        assert served.run("stream", job).stdout == "before\nafter\n"
        assert "exitCode: 6" in served.run("status", job).stdout


@needs_universal
def test_universal_is_small_and_its_first_run_takes_little_memory(tmp_path):
    with zipfile.ZipFile(UNIVERSAL) as file:
        sizes = {info.filename.removesuffix(".tar.xz"): info.file_size for info in file.infolist()}
    both = sum(size for name, size in sizes.items() if not name.endswith("musl"))
    assert both - sizes.get("aarch64-glibc", 0) < 15e6
    assert both < 28e6
    # A small process starts it: a child begins with the memory of its parent, which counts.
    code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True); "
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    done = run_universal(*("-c", code, LIKE_PYZ, UNIVERSAL, "--version"), pyz="-S", XDG_CACHE_HOME=str(tmp_path))
    assert int(done.stdout) < 64 * 1024, done.stderr


@needs_universal
@in_full
def test_universal_is_the_same_bytes_from_another_python_and_an_empty_cache(tmp_path):
    with zipfile.ZipFile(UNIVERSAL) as file:
        targets = [name.removesuffix(".tar.xz") for name in file.namelist() if "-" in name]
    stated = run_universal("--version", XDG_CACHE_HOME=str(tmp_path)).stdout
    commit = re.search(r"commit\s\S+(?=,)", stated)[0].replace("\n", " ")
    wheels = tmp_path / "wheels"
    shutil.copytree(HERE / "build" / "wheels", wheels, ignore=shutil.ignore_patterns("*.xz"))
    python = next(path for path in PYTHONS if path.parts[4] != LIKE_PYZ.parts[4])
    command = [python, "pyz/bundle.py", "--commit", commit, "--wheels", wheels, tmp_path / "jobworker.pyz", *targets]
    subprocess.run(command, cwd=HERE, check=True)
    assert (tmp_path / "jobworker.pyz").read_bytes() == UNIVERSAL.read_bytes()


# --- Outliving the server -------------------------------------------------------------------------------
# Servers that are killed, replaced, restarted by systemd, or lose their power; jobs that attack their server.


def launchers_of(process):
    return [child for child in children(process) if b"launcher_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


PRINTS_UNTIL_RELEASED = """
import os, random, sys, time
seed, gate = int(sys.argv[1]), sys.argv[2]
chance, count = random.Random(seed), 0
pause = (0.02, 0.1, 0.3)[seed % 3]
while os.path.exists(gate):  # the test removes the gate
    sys.stdout.buffer.write(chance.randbytes(chance.choice((1, 80, 4096, 20_000))))
    sys.stdout.buffer.flush()
    count += 1
    time.sleep(pause)
sys.stdout.buffer.write(b"<%d>" % count)
sys.exit(seed % 200)
"""
LONG_CHAOS = os.environ.get("JOBWORKER_CHAOS") == "long"
PYZ_PROGRAM = (str(LIKE_PYZ), str(PYZ))


def expected_output(seed, received):
    """The whole output of such a job, made from the number at the end of what was received."""
    count = int(received.rsplit(b"<", 1)[1].rstrip(b">"))
    chance = random.Random(seed)
    return b"".join(chance.randbytes(chance.choice((1, 80, 4096, 20_000))) for _ in range(count)) + b"<%d>" % count


class FollowedJobs:
    """Jobs that print at different speeds until their gate is removed, each followed by a client."""

    def __init__(self, stack, folder, mark, seed):
        self.stack, self.folder, self.mark, self.seed = stack, folder, mark, seed
        self.gates = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jobworker-gates-", dir=FOR_ALL)))
        self.gates.chmod(0o711)
        self.ids, self.followers = {}, {}

    def start(self, served, channel, number):
        gate = self.gates / str(number)
        gate.touch()  # all jobs end with the folder, even if the test fails
        command = ["-c", PRINTS_UNTIL_RELEASED, str(self.seed + number), str(gate), self.mark]
        self.ids[number] = ask(channel, "StartJob", pb.StartJobRequest(cmd=PYTHON, args=command)).ID
        with (self.folder / str(number)).open("wb") as file, (self.folder / f"{number}.err").open("wb") as errors:
            self.followers[number] = self.stack.enter_context(
                pyz_client(served, "stream", self.ids[number], stdout=file, stderr=errors)
            )

    def received(self, number):
        return (self.folder / str(number)).stat().st_size

    def failure(self, number):
        """The exit code and the log of a follower that has ended. False: it runs."""
        return self.followers[number].poll() is not None and (
            number,
            self.followers[number].returncode,
            (self.folder / f"{number}.err").read_text(),
        )

    def check_output_grows(self, served, numbers):
        before = {number: self.received(number) for number in numbers}
        for number in numbers:
            until(
                lambda job=number: (
                    self.received(job) > before[job] or self.failure(job) or served.process.poll() is not None
                )
            )
            assert served.process.poll() is None, "the server died by itself"
            assert not self.failure(number)

    def check_they_are_running(self, served, numbers):
        with channel_to(served) as channel:
            states = [
                ask(channel, "GetJobStatus", pb.GetStatusRequest(id=self.ids[number])).status for number in numbers
            ]
        assert set(states) == {pb.RUNNING}
        assert all(self.followers[number].poll() is None for number in numbers)

    def check_endings(self, served):
        for number, job in self.ids.items():
            assert self.followers[number].wait(10 * PATIENCE) == 0
            received = (self.folder / str(number)).read_bytes()
            assert received == expected_output(self.seed + number, received)
            status = call(served, "GetJobStatus", pb.GetStatusRequest(id=job))
            assert (status.status, status.exitcode, status.reason) == (pb.FINISHED, (self.seed + number) % 200, "")
            assert status.output_bytes == len(received)


def pyz_client(served, *words, **popen):
    environment = {**os.environ, "JOBWORKER_SERVER": served.address, "JOBWORKER_CERTS": str(served.certs)}
    command = [*PYZ_PROGRAM, words[0], "--retry-for", "10m", *words[1:]]
    return ClientProcess(
        command, **{"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment, **popen}
    )


@needs_pyz
@pytest.mark.chaos
def test_killed_servers_lose_no_byte_and_no_exit_code(state, certs, port, tmp_path, mark):
    """The server is killed while it runs with followed jobs, while it starts, and while it starts a job. Its launcher
    is killed too. Some jobs end after each kill."""
    jobs, kills = (50, 20) if LONG_CHAOS else (8, 4)
    seed = int.from_bytes(os.urandom(4), "big")
    print("seed:", seed)
    chance, once = random.Random(seed), []
    with contextlib.ExitStack() as stack:
        jobs_followed = FollowedJobs(stack, tmp_path, mark, seed)

        def serve_here(end=signal.SIGKILL):
            return serving(state, certs, program=PYZ_PROGRAM, port=port, end=end)

        with serve_here() as served, channel_to(served) as channel:
            for number in range(jobs):
                jobs_followed.start(served, channel, number)
            until(lambda: all(map(jobs_followed.received, range(jobs))))  # a client that has reached a server retries
        for kill in range(kills):
            server = spawn(state, certs, port, program=PYZ_PROGRAM)
            time.sleep(chance.random())  # the kill comes at a random moment of its start
            end(server)
            alive = range(kill * jobs // kills, jobs)
            with serve_here() as served:
                jobs_followed.check_output_grows(served, alive)
                if chance.random() < 0.5:
                    kill_the_launcher(served)
                once.append(jobworker.new_job_id())
                client = stack.enter_context(
                    pyz_client(served, "start", "--id", once[-1], "--", "sh", "-c", f"echo {kill}")
                )
                time.sleep(chance.random())  # the kill comes at a random moment of a start
                jobs_followed.check_they_are_running(served, alive)
            for number in range(kill * jobs // kills, (kill + 1) * jobs // kills):
                (jobs_followed.gates / str(number)).unlink()  # it ends while no server runs or the next one starts
            client.kill()
        with serve_here(signal.SIGTERM) as served:
            jobs_followed.check_endings(served)
            check_each_ran_once(served, once)
            check_nothing_is_left(served, state, mark, {*jobs_followed.ids.values(), *once})


def kill_the_launcher(served):
    os.kill(launchers_of(served.process.pid)[0], signal.SIGKILL)
    assert served.run("stream", served.start("--", "echo", "still")).stdout == "still\n"


def check_each_ran_once(served, ids):
    """Start each job again with its id; it has run once, whether or not the first start was lost."""
    for number, job in enumerate(ids):
        assert served.start("--id", job, "--", "sh", "-c", f"echo {number}") == job
        assert served.run("stream", job).stdout == f"{number}\n"


def check_nothing_is_left(served, state, mark, ids):
    """Check that ended jobs have left their complete folders and nothing else."""
    assert ids <= set(left_in(state))
    for job in left_in(state):
        assert b"done" in (state / "jobs" / job / "events").read_bytes()
    assert not list((state / "quarantine").glob("*"))
    assert jobs_cgroups(state) == []
    assert processes_with(mark) == []
    assert len(launchers_of(served.process.pid)) == 1
    until(lambda: watches_of(served) == 0)
    used = descriptor_kinds(served)
    assert served.run("stream", served.start("--", "echo", "last")).stdout == "last\n"
    until(lambda: watches_of(served) == 0 and descriptor_kinds(served) == used)


def descriptor_kinds(served):
    """A server's descriptors by kind, without sockets: clients close their connections at any time."""
    kinds = (name.split("[")[0].split(":")[0] for name in fds_of(served))
    return collections.Counter(kind for kind in kinds if kind != "socket")


SCRIPTS = (
    "true",
    "echo hi",
    "exit 3",
    "sleep 0.1",
    "head -c 3000000 /dev/zero",
    "sleep 100 & exit 0",
    "kill -9 $$",
    "nonsense",
)
ALLOWED_OUTCOMES = {
    "OK",
    "NOT_FOUND",
    "FAILED_PRECONDITION",
    "DEADLINE_EXCEEDED",
    "UNAVAILABLE",
}  # the last one: the launcher was killed


def random_call(channel, ids, chance, mark):
    """Make one random call. Returns the name of its status."""
    method = chance.choice(("StartJob", "StartJob", "StopJob", "RemoveJob", "GetJobStatus", "GetOutputStream"))
    if method == "StartJob" or not ids:
        answer = ask(channel, "StartJob", pb.StartJobRequest(cmd="sh", args=["-c", chance.choice(SCRIPTS), mark]))
        ids += [] if isinstance(answer, tuple) else [answer.ID]
    else:
        kinds = {"StopJob": pb.StopJobRequest, "RemoveJob": pb.RemoveJobRequest, "GetJobStatus": pb.GetStatusRequest,
                 "GetOutputStream": pb.GetStreamRequest}  # fmt: skip
        patience = chance.choice((0.05, PATIENCE)) if method == "GetOutputStream" else PATIENCE
        answer = ask(channel, method, kinds[method](id=chance.choice(ids)), patience)
    return answer[0] if isinstance(answer, tuple) else "OK"


def do_random_harm(served, chance):
    """Reload the certificates, kill the launcher or a shim, or send rubbish to the port."""
    harm = chance.choice(("reload", "launcher", "shim", "rubbish", "rubbish"))
    with contextlib.suppress(OSError, IndexError):  # there is no launcher or no shim now
        if harm == "reload":
            served.process.send_signal(signal.SIGHUP)
        elif harm == "rubbish":
            with socket.create_connection(("127.0.0.1", served.port), PATIENCE) as connection:
                connection.sendall(chance.randbytes(500))
        else:
            launcher = launchers_of(served.process.pid)[0]
            os.kill(launcher if harm == "launcher" else chance.choice(sorted(children(launcher))), signal.SIGKILL)


@pytest.mark.chaos
def test_a_server_survives_random_calls_kills_and_rubbish_and_leaves_nothing(state, certs, mark):
    seed, calls, ids = int.from_bytes(os.urandom(4), "big"), 1500 if LONG_CHAOS else 100, []
    print("seed:", seed)

    def user(number):
        chance = random.Random(seed + number)
        with channel_to(served, role=chance.choice(("user", "admin"))) as channel:
            return {random_call(channel, ids, chance, mark) for _ in range(calls)}

    with serving(state, certs) as served, concurrent.futures.ThreadPoolExecutor(6) as users:
        busy = [users.submit(user, number) for number in range(6)]
        chance = random.Random(seed)
        while not all(one.done() for one in busy):
            do_random_harm(served, chance)
            concurrent.futures.wait(busy, chance.random() * 0.2)
        assert set().union(*(one.result() for one in busy)) <= ALLOWED_OUTCOMES
        assert served.process.poll() is None, "the server died by itself"
        with channel_to(served, role="admin") as channel:
            for job in left_in(state):
                ask(channel, "StopJob", pb.StopJobRequest(id=job))
                ask(channel, "GetOutputStream", pb.GetStreamRequest(id=job))
        assert served.run("stream", served.start("--", "echo", "still")).stdout == "still\n"
        check_nothing_is_left(served, state, mark, set())


@needs_pyz
def test_a_newer_pyz_takes_over_running_jobs_from_an_older_one(state, certs, port, tmp_path):
    newer = tmp_path / "newer"
    newer.mkdir()
    for name in (
        "build.sh",
        "gen",
        "jobworker.py",
        "pyproject.toml",
        "pyz",
        "requirements.txt",
        "workerservice.proto",
        "LICENSE",
        "README.md",
    ):
        (shutil.copytree if (HERE / name).is_dir() else shutil.copy)(HERE / name, newer / name)
    (newer / ".venv").symlink_to(HERE / ".venv")
    with (newer / "jobworker.py").open("a") as file:
        file.write("# newer\n")
    subprocess.run([newer / "build.sh", "pyz"], check=True, capture_output=True, timeout=4 * PATIENCE)
    installed = tmp_path / "jobworker.pyz"
    shutil.copy(PYZ, installed)
    environment = {"PATH": os.environ["PATH"], "XDG_CACHE_HOME": str(tmp_path)}
    program = (str(LIKE_PYZ), str(installed))
    with serving(state, certs, program=program, port=port, end=signal.SIGKILL, env=environment) as served:
        job = served.start("--", "sh", "-c", "mkfifo gate; echo before; read line <gate; echo after; exit 6")
        assert served.run("stream", served.start("--", "echo", "old")).stdout == "old\n"
        os.replace(newer / "jobworker.pyz", installed)
        os.kill(launchers_of(served.process.pid)[0], signal.SIGKILL)
        assert served.run("stream", served.start("--", "echo", "old still")).stdout == "old still\n"
    with serving(state, certs, program=program, port=port, env=environment) as served:
        assert served.run("stream", served.start("--", "echo", "new")).stdout == "new\n"
        home = next((state / "home").iterdir()) if os.geteuid() == 0 else Path.home()
        (home / "gate").write_text("go\n")
        assert served.run("stream", job).stdout == "before\nafter\n"
        assert "exitCode: 6" in served.run("status", job).stdout
    assert len(unpacked(tmp_path)) == 2


def spawn(state, certs, port, *options, program=PROGRAM, **popen):
    """Start a server whose jobs outlive it. It may not listen yet."""
    words = serve_words(state, certs, *options, program=program, port=port)
    return subprocess.Popen(
        words,
        text=True,
        **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, **popen},
    )


def end(server, number=signal.SIGKILL):
    """End a server with a signal. Returns its exit code, standard output and standard error."""
    server.send_signal(number)
    output, errors = server.communicate(timeout=PATIENCE)
    return server.returncode, output, errors


@contextlib.contextmanager
def killed_at_end(server, certs, port):
    """Wait until a server listens, and kill it at the end of the block."""
    try:
        assert port_of(server.stdout.readline()) == port
        yield Served(server, port, Path(certs))
    finally:
        if server.poll() is None:
            end(server)


def first_line(served, job):
    with served.popen("stream", job) as stream:
        return stream.stdout.readline()


def test_a_server_whose_log_cannot_be_written_does_its_work(state, certs, port, tmp_path):
    """Its standard output and error are a file on a full disk, or a pipe without a reader."""
    for sink in ("full disk", "closed pipe"):
        with contextlib.ExitStack() as stack:
            manager = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
            manager.bind(str(tmp_path / sink))
            manager.settimeout(PATIENCE)
            if sink == "full disk":
                log = os.open("/dev/full", os.O_WRONLY)
            else:
                reader, log = os.pipe()
                os.close(reader)
            stack.callback(os.close, log)
            server = spawn(
                state, certs, port, stdout=log, stderr=log, env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / sink)}
            )
            try:
                assert manager.recv(100) == b"READY=1"
                served = Served(server, port, certs)
                job = served.start("--", "sh", "-c", "echo $PPID; exec sleep 1000")
                with served.popen("stream", job) as stream:
                    os.kill(int(stream.stdout.readline()), signal.SIGKILL)  # the server logs that
                    assert stream.wait(PATIENCE) == 0
                assert served.run("status", job).stdout == f"jobID: {job}, status: FINISHED, exitCode: 255\n"
                server.send_signal(signal.SIGHUP)
                assert served.run("stream", served.start("--", "echo", "still")).stdout == "still\n"
            finally:
                assert end(server, signal.SIGTERM)[0] == 0


def test_a_slow_follower_resumes_after_its_server_was_asked_to_end(state, certs, port):
    """The server cannot finish such a stream within its grace period."""
    size = 40 * MIB
    server = spawn(state, certs, port, stderr=subprocess.PIPE)
    with killed_at_end(server, certs, port) as served:
        job = served.start("--", PYTHON, "-c", WRITES_BYTES, str(size))
        stream = served.popen("stream", job, stderr=subprocess.DEVNULL)
        first = stream.stdout.read(1000)
        assert status_at_end(served, job).exitcode == 0
        code, _, log = end(server, signal.SIGTERM)
        assert code == 0
        assert all(line.startswith("jobworker: ") for line in log.splitlines())
    with stream, serving(state, certs, port=port):
        assert first + stream.stdout.read() == random.Random(7).randbytes(size)
        assert stream.wait(PATIENCE) == 0


def test_a_server_killed_on_a_full_disk_starts_again_and_finishes_its_jobs(small_disk, certs, port):
    waits = "mkfifo gate$0; echo $PPID; read line <gate$0; echo two; exit 5"
    with killed_at_end(spawn(small_disk, certs, port), certs, port) as served:
        ended = served.start("--", "sh", "-c", "echo kept; exit 3")
        assert status_at_end(served, ended).exitcode == 3
        running, stopped, lost = (served.start("--", "sh", "-c", waits, str(number)) for number in range(3))
        shims = [first_line(served, job) for job in (running, stopped, lost)]
    make_crashed_job(small_disk, ID, b"born at=1.0 .\n", "none")  # its quarantine needs a new folder
    fill(small_disk)
    fillers = small_disk / "fillers"
    with contextlib.suppress(OSError):  # ext4 keeps some blocks for folders
        fillers.mkdir()
        for number in range(500):
            (fillers / str(number)).mkdir()
    os.kill(int(shims[2]), signal.SIGKILL)
    with killed_at_end(spawn(small_disk, certs, port), certs, port) as served:
        assert call(served, "GetOutputStream", pb.GetStreamRequest(id=ended)) == b"kept\n"
        assert status_at_end(served, ended).exitcode == 3
        for role in ("user", "admin"):  # the first has a home, the second needs one
            assert call(served, "StartJob", pb.StartJobRequest(cmd="true"), role=role)[0] == "RESOURCE_EXHAUSTED"
        assert (status_at_end(served, lost).exitcode, status_at_end(served, lost).reason) == (255, "LOST")
        assert served.run("stop", stopped).returncode == 0
        assert status_at_end(served, stopped).status == pb.STOPPED
        # The refused start of the admin may have found a block for a home of its own.
        (gate,) = (small_disk / "home").glob("*/gate0")
        gate.write_text("go\n")
        assert (status_at_end(served, running).status, status_at_end(served, running).exitcode) == (pb.FINISHED, 5)
    with killed_at_end(spawn(small_disk, certs, port), certs, port) as served:
        assert [status_at_end(served, job).exitcode for job in (ended, running, stopped, lost)] == [3, 5, 137, 255]
        for job in (ended, stopped):
            assert served.run("rm", job).returncode == 0
        (filler,) = small_disk.glob("filler-*")
        filler.unlink()
        shutil.rmtree(fillers, ignore_errors=True)
        for role in ("user", "admin"):
            assert served.run("stream", served.start("--", "echo", "room", role=role), role=role).stdout == "room\n"
    with killed_at_end(spawn(small_disk, certs, port), certs, port):
        assert ID not in left_in(small_disk)  # quarantined, now that there is space


@pytest.mark.parametrize("free", range(7))
@as_root
def test_a_start_without_free_inodes_is_refused_and_leaves_nothing(nothing_is_left, certs, tmp_path, free):
    """On a tmpfs with this number of free inodes. The first start of an owner takes nine."""
    point = tmp_path / "disk"
    point.mkdir()
    for folder in (point, *list(point.parents)[:3]):
        folder.chmod(0o711)
    words = ["mount", "-t", "tmpfs", "-o", "size=16m,nr_inodes=60", "none", point]
    if (tried := subprocess.run(words, stderr=subprocess.PIPE, check=False)).returncode:
        pytest.skip(f"cannot mount here: {tried.stderr.decode().strip()}")
    try:
        state = new_state(nothing_is_left, point)
        with serving(state, certs) as served:
            before = left_in(state)
            for number in range(os.statvfs(point).f_favail - free):
                (point / str(number)).touch()
            for role in ("user", "user2"):
                answer = call(served, "StartJob", pb.StartJobRequest(cmd="sh", args=["-c", "exit 3"]), role=role)
                if isinstance(answer, tuple):
                    assert answer[0] == "RESOURCE_EXHAUSTED"
                else:
                    call(served, "GetOutputStream", pb.GetStreamRequest(id=answer.ID), role=role)
                    assert call(served, "GetJobStatus", pb.GetStatusRequest(id=answer.ID), role=role).exitcode == 3
                    call(served, "RemoveJob", pb.RemoveJobRequest(id=answer.ID), role=role)
                assert left_in(state) == before
            for path in point.glob("[0-9]*"):
                path.unlink()
            assert (
                served.run("stream", served.start("--", "echo", "room", role="user2"), role="user2").stdout == "room\n"
            )
    finally:
        subprocess.run(["umount", point], check=True)


ATTACKS = r"""
import ctypes, os, resource, signal, sys
state, job, shim = sys.argv[1], os.environ["JOBWORKER_JOB_ID"], os.getppid()
folder, libc = f"{state}/jobs/{job}", ctypes.CDLL(None, use_errno=True)

def syscall(*arguments):
    result = libc.syscall(*(ctypes.c_long(word) if isinstance(word, int) else word for word in arguments))
    if result == -1:
        raise OSError(ctypes.get_errno(), "")
    return result

room = ctypes.create_string_buffer(16)
vector = ctypes.addressof(room).to_bytes(8, sys.byteorder) + (16).to_bytes(8, sys.byteorder)  # struct iovec

def pidfd(): return os.pidfd_open(shim)
def handle():
    room, mount = ctypes.create_string_buffer(136), ctypes.c_int()
    room[:4] = (128).to_bytes(4, sys.byteorder)
    syscall(303, -100, f"{folder}/events".encode(), room, ctypes.byref(mount), 0)
    syscall(304, os.open(state, os.O_RDONLY), room, os.O_WRONLY)

cgroup = next((line[3:-1] for line in open("/proc/self/cgroup") if line.startswith("0::")), "")
point = next((line.split()[1] for line in open("/proc/mounts") if line.split()[2] == "cgroup2"), "/nowhere") + cgroup
others = [p for p in map(int, filter(str.isdigit, os.listdir("/proc"))) if p != os.getpid() and os.stat(f"/proc/{p}").st_uid != os.getuid()]
tries = {
    **{f"signal {n}": lambda n=n: os.kill(shim, n) for n in (9, 19, 15, 2)},
    "signal the group": lambda: os.killpg(shim, 9),
    "signal all others": lambda: [os.kill(p, 9) for p in others or [shim]],
    "signal by pidfd": lambda: signal.pidfd_send_signal(pidfd(), 9),
    "descriptors by pidfd": lambda: [syscall(438, pidfd(), n, 0) for n in range(3, 12)],
    "trace": lambda: syscall(101, 16, shim, 0, 0),
    "seize": lambda: syscall(101, 0x4206, shim, 0, 0),
    "memory": lambda: os.open(f"/proc/{shim}/mem", os.O_RDWR),
    "read its memory": lambda: syscall(310, shim, vector, 1, vector, 1, 0),
    "limits": lambda: resource.prlimit(shim, resource.RLIMIT_FSIZE, (0, 0)),
    "cpu time": lambda: resource.prlimit(shim, resource.RLIMIT_CPU, (1, 1)),
    "affinity": lambda: os.sched_setaffinity(shim, {0}),
    "scheduler": lambda: os.sched_setscheduler(shim, os.SCHED_IDLE, os.sched_param(0)),
    "priority": lambda: os.setpriority(os.PRIO_PROCESS, shim, 19),
    "oom score": lambda: open(f"/proc/{shim}/oom_score_adj", "w").write("1000"),
    **{f"descriptor {n}": lambda n=n: os.open(f"/proc/{shim}/fd/{n}", os.O_WRONLY) for n in range(12)},
    "its folder": lambda: os.listdir(f"/proc/{shim}/cwd"),
    **{f"open {name}": lambda name=name: os.open(f"{folder}/{name}", os.O_WRONLY) for name in ("events", "output", "control", "job.json")},
    **{f"truncate {name}": lambda name=name: os.truncate(f"{folder}/{name}", 0) for name in ("events", "output", "job.json")},
    **{f"unlink {name}": lambda name=name: os.unlink(f"{folder}/{name}") for name in ("events", "output", "control", "job.json")},
    **{f"chmod {path}": lambda path=path: os.chmod(path, 0o777) for path in (state, f"{state}/jobs", folder, f"{state}/home", f"{state}/lock")},
    "rename the folder": lambda: os.rename(folder, f"{state}/home/x"),
    "replace the home": lambda: os.rename(os.environ["HOME"], os.environ["HOME"] + "x"),
    "link the record": lambda: os.link(f"{folder}/events", "events"),
    "by handle": handle,
    "lock": lambda: os.open(f"{state}/lock", os.O_RDONLY),
    "owners": lambda: os.listdir(f"{state}/owners"),
    **{f"cgroup {name}": lambda name=name: open(f"{point}/{name}", "w").write("max") for name in ("pids.max", "memory.max", "cgroup.procs", "cgroup.kill", "cgroup.freeze")},
    "a cgroup below": lambda: os.mkdir(f"{point}/x"),
    "remove the cgroup": lambda: os.rmdir(point),
    "the shims' cgroup": lambda: open(f"{os.path.dirname(os.path.dirname(point))}/shims/cgroup.procs", "w").write("0"),
    "truncate standard output": lambda: os.ftruncate(1, 0),
    "rewind standard output": lambda: os.lseek(1, 0, 0),
    "be root": lambda: os.setresuid(0, 0, 0),
    "have groups": lambda: os.setgroups([0]),
    "mount": lambda: syscall(165, b"none", state.encode(), b"tmpfs", 0, None),
}

def attack(where):
    for name, attempt in tries.items():
        try:
            result = attempt()
        except (OSError, ValueError):
            continue
        print("could", where, name, result)

attack("plainly")
if os.fork() == 0:  # as root of a user namespace, where the machine allows one
    try:
        syscall(272, 0x10000000 | 0x20000)
    except OSError:
        os._exit(0)
    del tries["be root"], tries["mount"], tries["have groups"]
    attack("in a user namespace")
    sys.stdout.flush()
    os._exit(0)
os.wait()
print("no more")
sys.stdout.flush()
os.kill(-1, 9) if os.fork() == 0 else signal.pause()  # kills all processes of its uid, the job itself too
"""


@as_root
def test_a_job_that_tries_everything_its_uid_allows_cannot_change_its_shim_or_server(state, certs):
    with serving(state, certs) as served:
        neighbour = served.start("--", "sh", "-c", WAITS, role="admin")
        job = served.start("--", str(PYTHON_FOR_ALL), "-c", ATTACKS, str(state))
        status = status_at_end(served, job)
        assert call(served, "GetOutputStream", pb.GetStreamRequest(id=job)) == b"no more\n"
        assert (status.status, status.exitcode, status.reason) == (pb.FINISHED, 137, "")
        assert call(served, "GetJobStatus", pb.GetStatusRequest(id=neighbour), role="admin").status == pb.RUNNING
        assert served.run("stream", served.start("--", "echo", "still")).stdout == "still\n"


@as_root
def test_a_server_kills_the_rest_of_a_lost_job_in_the_tree_of_an_earlier_server(state, certs, port, mark, nested):
    with killed_at_end(spawn(state, certs, port, "--cgroup", f"{nested.path}/one"), certs, port) as served:
        job = served.start("--", "sh", "-c", f"echo $PPID; sh -c 'trap \"\" TERM; sleep 1000; : {mark}' & wait")
        shim = first_line(served, job)
        assert len(jobs_cgroups(state)) == 1
    os.kill(int(shim), signal.SIGKILL)
    with serving(state, certs, "--cgroup", f"{nested.path}/two", port=port) as served:
        assert (status_at_end(served, job).exitcode, status_at_end(served, job).reason) == (255, "LOST")
        assert processes_with(mark) == []
        assert jobs_cgroups(state) == []
    for name in ("one", "two"):
        jobworker.Cgroup(f"{nested.path}/{name}").remove()


def systemctl(*words):
    subprocess.run(["systemctl", *words], check=True, timeout=PATIENCE, capture_output=True)


def main_process(unit):
    shown = subprocess.run(
        ["systemctl", "show", "--value", "--property=MainPID", unit], check=True, timeout=PATIENCE, capture_output=True
    )
    return int(shown.stdout)


UNIT_EVENTS = [  # the commands; whether a new process serves afterwards
    ([("restart", "jobworker-test")], True),
    ([("kill", "--kill-whom=main", "--signal=KILL", "jobworker-test")], True),  # systemd starts it again
    ([("daemon-reload",)], False),
    ([("daemon-reexec",)], False),
    ([("reload", "jobworker-test")], False),
    ([("stop", "jobworker-test"), ("daemon-reload",), ("start", "jobworker-test")], True),
]


@pytest.mark.systemd
@needs_pyz
def test_jobs_go_on_when_systemd_restarts_or_reloads_the_server_or_the_server_dies(nothing_is_left, certs, port):
    state = new_state(nothing_is_left, "/scratch")
    printed = run_pyz(
        "unit", "--", "--listen", f"127.0.0.1:{port}", "--state", str(state), "--certs", str(certs)
    ).stdout
    unit = Path("/etc/systemd/system/jobworker-test.service")
    unit.write_text(printed)
    systemctl("daemon-reload")
    systemctl("start", "jobworker-test")  # Type=notify: it listens when this returns
    try:
        served = Served(None, port, certs)
        job = served.start(
            "--",
            "sh",
            "-c",
            "echo own >/tmp/file; grep NoNewPrivs /proc/self/status; mkfifo gate; exec 3<>gate; echo ready; "
            'while read line <&3; do echo "$line $(cat /tmp/file)"; [ "$line" != end ] || exit 7; done',
        )
        (home,), (cgroup,) = (state / "home").iterdir(), jobs_cgroups(state)
        other = served.start("--", "sh", "-c", "sleep 1000 & trap 'kill $!; exit 9' TERM; wait", role="user2")
        for each, role in ((job, "user"), (other, "user2")):
            assert json.loads(served.run("status", "--json", each, role=role).stdout)["notes"] == []  # it is confined
        limits = {name: (cgroup / name).read_text() for name in LIMIT_FILES if (cgroup / name).exists()}
        assert limits.keys() == set(LIMIT_FILES)
        assert limits["memory.max"] == f"{512 * MIB}\n"
        assert "wbps=" in limits["io.max"]
        assert "jobworker-test" not in str(cgroup)
        with pyz_client(served, "stream", job, stdout=subprocess.PIPE) as stream:
            assert [stream.stdout.readline() for _ in range(2)] == [b"NoNewPrivs:\t1\n", b"ready\n"]
            processes = (cgroup / "cgroup.procs").read_text()
            for number, (event, replaced) in enumerate(UNIT_EVENTS):
                main = main_process("jobworker-test")
                for words in event:
                    systemctl(*words)
                (home / "gate").write_text(f"after {number}\n")
                assert stream.stdout.readline() == b"after %d own\n" % number
                if replaced:
                    until(lambda: main_process("jobworker-test") not in {0, main})  # noqa: B023
                assert (main_process("jobworker-test") != main) == replaced, event
                assert (cgroup / "cgroup.procs").read_text() == processes, event
                assert {name: jobworker.kernel_read(f"{cgroup}/{name}") for name in limits} == limits, event
                assert served.run("stream", served.start("--", "echo", "new")).stdout == "new\n"
            (home / "gate").write_text("end\n")
            assert stream.stdout.read() == b"end own\n"
            assert stream.wait(PATIENCE) == 0
        assert "FINISHED, exitCode: 7" in served.run("status", job).stdout
        served.run("stop", "--signal", "TERM", "--grace", "20", other, role="user2")
        assert json.loads(served.run("status", "--json", other, role="user2").stdout)["exitCode"] == 9
        assert [list((state / "jobs" / each).glob("*tmp")) for each in (job, other)] == [[], []]
    finally:
        systemctl("stop", "jobworker-test")
        unit.unlink()
        systemctl("daemon-reload")


@pytest.mark.systemd
@needs_pyz
def test_a_user_can_serve_from_a_scope_and_the_error_elsewhere_names_the_command(nothing_is_left, certs, tmp_path):
    subprocess.run(["useradd", "--uid", "4321", "--create-home", "tester"], check=True, capture_output=True)
    systemctl("start", "user@4321.service")
    state, own = new_state(nothing_is_left, "/scratch"), Path(shutil.copytree(certs, "/run/tester-certs"))
    for path in (state, own, *own.iterdir()):
        os.chown(path, 4321, 4321)
    runtime = "/run/user/4321"
    user = ("setpriv", "--reuid=4321", "--regid=4321", "--clear-groups", "env", f"XDG_RUNTIME_DIR={runtime}", "HOME=/home/tester",
            f"DBUS_SESSION_BUS_ADDRESS=unix:path={runtime}/bus")  # fmt: skip
    program = (str(PYTHON_FOR_ALL), str(PYZ))
    try:
        refused = subprocess.run(
            [*user, *program, "serve", "--certs", own, "--state", state],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert refused.returncode == 1
        assert "`systemd-run --user --scope python3 jobworker.pyz serve --without io`" in refused.stderr
        with serving(
            state, own, "--without", "io", program=(*user, "systemd-run", "--user", "--scope", "--quiet", *program)
        ) as served:
            job = served.start("--", "sh", "-c", "cat /proc/self/cgroup; id -u; exec sleep 1000")
            (cgroup,) = jobs_cgroups(state)
            assert "/user@4321.service/jobworker/" in str(cgroup)
            assert (cgroup / "memory.max").read_text() == f"{512 * MIB}\n"
            assert (cgroup / "cpu.max").read_text() == "100000 100000\n"
            notes = json.loads(served.run("status", "--json", job).stdout)["notes"]
            assert any("limits on io" in note for note in notes)
            assert any("server's own user" in note for note in notes)
            served.run("stop", job)
    finally:
        systemctl("stop", "user@4321.service")


def before_the_power_cut(folder):
    """Runs in a guest that then loses its power, while jobs have ended, run, and are being started."""
    with serving("/scratch/state", folder / "certs", end=signal.SIGKILL) as served, channel_to(served) as channel:

        def start(*words):
            return ask(channel, "StartJob", pb.StartJobRequest(cmd=words[0], args=words[1:])).ID

        running, ended = [start("sh", "-c", "echo run; exec sleep 1000") for _ in range(3)], {}
        for number in range(6):
            job = start(PYTHON, "-c", WRITES_BYTES + f"; sys.exit({number})", str(number * 100_000))
            ask(channel, "GetOutputStream", pb.GetStreamRequest(id=job))
            ended[job] = number
        (folder / "reported").write_text(json.dumps([running, ended]))
        for number in range(1000):
            start("sh", "-c", "echo x; sleep 0.01")
            if number == 5:
                (folder / "now").touch()  # now the guest loses its power


def after_the_power_cut(folder):
    """Runs in the next guest, on the same disk."""
    running, ended = json.loads((folder / "reported").read_text())
    with serving("/scratch/state", folder / "certs") as served:
        for job, number in ended.items():
            assert call(served, "GetOutputStream", pb.GetStreamRequest(id=job)) == random.Random(7).randbytes(
                number * 100_000
            )
            status = call(served, "GetJobStatus", pb.GetStatusRequest(id=job))
            assert (status.status, status.exitcode, status.reason) == (pb.FINISHED, number, "")
        for job in running:
            status = status_at_end(served, job)
            assert (
                status[0] == "NOT_FOUND"
                if isinstance(status, tuple)
                else (status.exitcode, status.reason) == (255, "LOST")
            )
        assert served.run("stream", served.start("--", "echo", "new")).stdout == "new\n"
        for folder_ in Path("/scratch/state/jobs").iterdir():
            status_at_end(served, folder_.name)


def no_guest():
    """Why this machine can run no guest; empty if it can."""
    if Path("/scratch").is_dir():
        return "this is a guest already"
    return (
        ""
        if os.geteuid() == 0 and os.uname().machine == "x86_64" and shutil.which("linux.uml")
        else "needs root, x86_64 and user-mode-linux"
    )


@pytest.mark.skipif(no_guest() != "", reason=no_guest())
def test_results_that_were_reported_before_a_power_cut_exist_after_it(certs):
    with tempfile.TemporaryDirectory(prefix=".power-", dir=HERE) as name:
        folder = Path(name)
        shutil.copytree(certs, folder / "certs")
        body = "import pathlib, test_jobworker as t; t.jobworker.prepare_grpc(); t.{}(pathlib.Path({!r}))"
        boot = [HERE / ".ci" / "guest", "--timeout", "300", "--disk-image", folder / "disk"]
        first = subprocess.run([*boot, "--power-cut-when", folder / "now", "--", sys.executable, "-c", body.format("before_the_power_cut", name)],
                               stdin=subprocess.DEVNULL, cwd=HERE, capture_output=True, text=True, check=False)  # fmt: skip
        assert first.returncode == 137, first.stdout + first.stderr
        second = subprocess.run([*boot, "--", sys.executable, "-c", body.format("after_the_power_cut", name)],
                                stdin=subprocess.DEVNULL, cwd=HERE, capture_output=True, text=True, check=False)  # fmt: skip
        assert second.returncode == 0, second.stdout + second.stderr


# --- Through an engine ------------------------------------------------------------------------------------
# `serve --through`. First without an engine: the promises of the sections above hold through `env X=1`, and what only
# an engine's client needs. Then a real slurmctld with nodes n1 and n2 on loopback (.ci/slurm).

THROUGH = ("env", "X=1")
THROUGH_OPTIONS = ("--through", "env X=1", "--grace", "0.2s")
PROMISES = [  # a test, and its arguments that are no fixtures
    (test_a_job_that_forks_twice_and_exits_leaves_no_process, {}),
    (test_a_stop_kills_grandchildren_that_ignore_signals_and_have_their_own_session, {}),
    (test_no_process_of_a_fork_storm_escapes_the_kill, {}),
    (test_the_output_of_a_child_that_outlives_its_parent_is_kept, {}),
    (test_a_job_cannot_change_its_own_events_output_or_shim, {}),
    (test_a_job_starts_with_descriptors_0_1_and_2_and_no_other, {}),
    (test_the_start_after_a_killed_launcher_works, {}),
    (test_a_killed_shim_loses_its_own_job_only, {}),
    (test_a_hundred_concurrent_starts_all_succeed, {}),
    (test_a_job_that_exits_with_more_than_its_output_limit_in_the_pipe_is_finished, {}),
    (test_limits_end_jobs_while_no_server_runs, {}),
    (test_fifty_followers_that_begin_at_different_times_receive_the_same_bytes, {}),
    (test_a_slow_or_vanished_follower_does_not_disturb_the_others, {}),
    (test_a_follower_receives_each_line_while_the_job_runs, {}),
    (test_a_second_stop_and_a_stop_after_the_end_change_nothing, {}),
    (test_each_owner_keeps_the_same_uid_and_private_home, {}),
    (test_a_server_that_starts_again_knows_every_job, {}),
    (test_jobs_survive_the_kill_of_their_server, {}),
    (test_many_stops_of_a_lost_job_start_one_finisher, {}),
    (test_certificates_identities_and_jobs_survive_a_restart, {}),
    (test_a_stream_continues_at_its_byte_when_the_next_server_runs, {"end": signal.SIGKILL}),
    (test_serve_with_stop_jobs_stops_its_jobs_when_it_ends, {}),
    (test_binary_output_arrives_unchanged, {}),
    (test_the_output_of_a_shell_loop_arrives_while_it_runs, {}),
    (test_run_writes_all_output_and_takes_the_command_as_it_is_typed, {}),
    (test_run_resumes_after_its_server_was_killed_and_names_its_job_when_it_gives_up, {}),
    (test_wait_returns_at_the_end_with_the_code_of_the_last_job, {}),
    (test_signal_reaches_the_main_process, {}),
    (test_a_job_gets_its_variables_and_no_reply_contains_their_values, {}),
    (test_a_job_runs_in_the_folder_that_was_asked_for, {}),
]


@pytest.fixture(scope="session")
def shared_through(certs, shared, tmp_path_factory):
    """A server like `shared` whose jobs run through a command."""
    folder = Path(tempfile.mkdtemp(prefix="jobworker-through-"))
    folder.chmod(0o711)
    with serving(folder, certs, *THROUGH_OPTIONS) as served:
        yield served
    for tree in trees_of(folder):
        Cgroup(str(tree)).remove()
    shutil.rmtree(folder)
    forget_claims(folder)


@pytest.mark.parametrize(("promise", "arguments"), PROMISES, ids=[row[0].__name__[5:] for row in PROMISES])
def test_a_promise_holds_through_a_command(promise, arguments, request, monkeypatch, shared_through):
    worker, words, server, result_of = worker_on, serve_words, in_server, ending
    module = sys.modules[__name__]

    def ending_with_term(*args):
        """TERM does here what SIGKILL does for other jobs."""
        status, code, reason = result_of(*args)
        return status, 137 if (status, code) == ("STOPPED", 143) else code, reason

    monkeypatch.setattr(module, "ending", ending_with_term)
    options = {"through": THROUGH, "grace": 0.2}
    monkeypatch.setattr(module, "worker_on", lambda *args, **more: worker(*args, **{**options, **more}))
    monkeypatch.setattr(module, "serve_words", lambda *args, **more: [*words(*args, **more), *THROUGH_OPTIONS])
    monkeypatch.setattr(
        module, "in_server",
        lambda *args, **more: server(*args, **{**more, "options": {**options, **(more.get("options") or {})}}),
    )  # fmt: skip
    fixtures = [name for name in inspect.signature(promise).parameters if name not in arguments]
    values = {name: shared_through if name == "shared" else request.getfixturevalue(name) for name in fixtures}
    promise(**values, **arguments)


@in_loop
async def test_a_job_s_own_path_does_not_choose_the_client_of_the_engine(state, tmp_path):
    (tmp_path / "env").write_text("#!/bin/sh\necho mine\n")
    (tmp_path / "env").chmod(0o755)
    async with worker_on(state, through=THROUGH) as worker:
        path = f"{tmp_path}:{jobworker.JOB_PATH}"
        text, _ = await result(worker, shell("echo $X $PATH", env=(("PATH", path),)))
        assert text == f"1 {path}\n".encode()


SHOWS_WORDS = "import os, sys; os.write(1, repr(sys.argv[1:]).encode())"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("{id}",), [ID]),
        (("a{owner}b", "{name}"), ["aal 'ice' \"{name}b", "-x --uid=0 'y"]),
        (("{cpus}", "{memory_mb}", "{minutes}"), ["1", "33", "2"]),
        (("{{id}}", "two words"), ["{id}", "two words"]),
    ],
)
@in_loop
async def test_the_words_have_the_values_of_the_job_and_a_value_is_never_split(state, words, expected):
    async with worker_on(state, through=(PYTHON, "-c", SHOWS_WORDS, *words)) as worker:
        request = JobRequest(
            "--uid=0", ("a\nb", "{id}"), owner="al 'ice' \"{name}", id=ID, name="-x --uid=0 'y", cpu=0.2,
            memory=32 * MIB + 1, timeout=61,
        )  # fmt: skip
        text, status = await result(worker, request)
        assert eval(text) == [*expected, "--uid=0", "a\nb", "{id}"]
        assert (status.spec.command, status.spec.args) == ("--uid=0", ("a\nb", "{id}"))


@in_loop
async def test_a_text_beside_the_command_is_quoted_for_its_shell(state):
    name = "it's $(id); a  b"
    async with worker_on(state, through=("sh", "-c", "echo {owner} {name} {cpus}; exec {command}")) as worker:
        text, status = await result(worker, shell("exit 3", owner="al ice", name=name))
        assert (text, status.exit_code) == (f"al ice {name} 1\n".encode(), 3)


@in_loop
async def test_a_client_of_an_engine_that_is_missing_is_not_taken_for_the_command(state):
    async with worker_on(state, through=("no-such-engine", "-x")) as worker:
        with pytest.raises(jobworker.CannotRunError) as refused:
            await worker.start(shell("true"))
        assert str(refused.value).startswith("the engine's client 'no-such-engine' is not found on PATH, which is /")


@in_loop
async def test_a_command_in_the_place_of_its_field_is_quoted_for_a_shell(state):
    async with worker_on(state, through=("sh", "-c", "exec {command}")) as worker:
        args = ("-c", SHOWS_WORDS, "a b", "it's", ":", "--uid=0", "$HOME", "x\ny", "{id}", "é", "")
        text, status = await result(worker, JobRequest(PYTHON, args, owner="alice"))
        assert eval(text) == list(args[2:])
        assert status.spec.args == args


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--through", "srun {jobid}"), "'{jobid}' has the field {jobid}; the fields are {id} {owner} {name} {cpus}"),
        (("--through", "srun {}"), "'{}' has the field {}"),
        (("--through", "srun {cpus.real}"), "has the field {cpus.real}"),
        (("--through", "srun {id"), "'{id' has a brace without its pair"),
        (("--through", "srun 'a"), '"srun \'a" has a quotation mark or a backslash without its pair'),
        (("--through", ""), "'' names no program"),
        (("--through", "slurm --comment={comment}"), "has the field {comment}"),
        (("--through", "srun {"), "jobworker: --through: '{' has a brace"),
        (
            ("--through", "srun", "--through-end", "squeue {command}"),
            "jobworker: --through-end: '{command}' has the field",
        ),
        (("--through-end", "squeue"), "--through-end needs --through"),
        (("--accounts", "mine"), "invalid choice: 'mine'"),
    ],
)
def test_wrong_words_are_refused_when_serve_starts(state, certs, options, said):
    done = subprocess.run(
        serve_words(state, certs, *options), capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    one_sentence(done, said, status=2)


def test_status_and_serve_say_what_runs_a_job_and_that_its_limits_are_the_engine_s(state, certs):
    options = ("--through", "env X=1", "--through-end", "echo '- n7'")
    with serving(state, certs, *options, stderr=subprocess.PIPE) as served:
        assert line_with(served, "runs through 'env'").startswith("jobworker: warning: ")
        job = served.start("--", "sh", "-c", "echo $X")
        assert served.run("stream", job).stdout == "1\n"
        facts = json.loads(served.run("status", job, "--json").stdout)
        assert (facts["through"], facts["node"], facts["command"]) == ("env X=1", "n7", ["sh", "-c", "echo $X"])
        assert {facts["limits"][name] for name in jobworker.CONTROLLERS} == {None}
        assert "limits are the engine's" in facts["notes"][0]


@pytest.mark.parametrize(
    ("script", "answer", "expected", "node"),
    [
        ("exit 0", "echo '- n1'", ("FINISHED", 0, ""), "n1"),
        ("exit 0", "echo NODE_FAIL n[1-2]", ("STOPPED", 255, "NODE_FAIL"), "n[1-2]"),
        ("exit 3", "echo CANCELLED", ("STOPPED", 255, "CANCELLED"), ""),
        ("kill -9 $$", "echo PREEMPTED n1", ("STOPPED", 255, "PREEMPTED"), "n1"),
        ("exit 3", "echo slurm_load_jobs error: down >&2; exit 1", ("FINISHED", 3, ""), ""),
        ("exit 0", "true", ("FINISHED", 0, ""), ""),
        ("exit 0", "no-such-command", ("FINISHED", 0, ""), ""),
        ("exit 0", "echo NODE_FAIL n1; echo more", ("FINISHED", 0, ""), ""),
        ("exit 0", "while echo NODE_FAIL; do true; done", ("FINISHED", 0, ""), ""),
        ("exit 0", "printf '\\377'", ("FINISHED", 0, ""), ""),
        ("exit 0", "echo NODE_FAIL n1; echo warning >&2", ("STOPPED", 255, "NODE_FAIL"), "n1"),
        ("exit 0", "echo NODE_FAIL None assigned", ("STOPPED", 255, "NODE_FAIL"), ""),
        ("exit 0", "echo EXIT_9 $(seq 99)", ("STOPPED", 255, "EXIT_9"), ""),
        ("exit 0", 'test "$0" = "$JOBWORKER_JOB_ID" -a -z "$SAID" && echo TIMEOUT', ("STOPPED", 255, "TIMEOUT"), ""),
    ],
)  # fmt: skip
@in_loop
async def test_what_the_engine_tells_of_the_end_is_the_job_s_end(state, mark, script, answer, expected, node):
    async with worker_on(state, through=THROUGH, through_end=("sh", "-c", f"{answer} #{mark}", "{id}")) as worker:
        text, status = await result(worker, shell(f"echo hello; {script}", env=(("SAID", "CANCELLED"),)))
        assert text == b"hello\n"
        assert (status.status, status.exit_code, status.ending.reason, status.node) == (*expected, node)
    wait_for_orphans()
    assert not processes_with(mark)
    async with worker_on(state) as worker:  # a later server reads the same
        assert worker.status(worker.jobs()[0]).node == node


@in_loop
async def test_an_engine_that_does_not_answer_delays_the_end_for_a_bounded_time(state, tmp_path, mark):
    altered = altered_copy(tmp_path, "def ask_engine(", "END_SECONDS = 0.5\n")
    options = {"through": THROUGH, "through_end": ("sh", "-c", f"echo NODE_FAIL; sleep 1000; : {mark}")}
    async with worker_on(state, altered, **options) as worker:
        _, status = await result(worker, altered.JobRequest("sh", ("-c", "exit 3"), owner="alice"))
        assert (status.status, status.exit_code) == ("STOPPED", 255)
    wait_for_orphans()
    assert not processes_with(mark)


TRAPS_TERM = "exec 2>/dev/null; trap 'echo term; exit 5' TERM; echo ready; while :; do sleep 0.01; done"


@pytest.mark.parametrize(
    ("request_", "stops", "expected"),
    [
        ({}, True, ("STOPPED", 5, "")),
        ({"timeout": 1.0}, False, ("STOPPED", 5, "TIMEOUT")),
    ],
)
@in_loop
async def test_every_end_of_a_job_is_term_and_a_grace(state, request_, stops, expected):
    async with worker_on(state, through=THROUGH, grace=PATIENCE) as worker:
        job = await start_id(worker, shell(TRAPS_TERM, **request_))
        await wait_for_output(worker, job, b"ready")
        if stops:
            await worker.stop(worker.job(job), by="alice")
        assert await output(worker, job) == b"ready\nterm\n"
        assert ending(worker, job) == expected


@in_loop
async def test_a_stop_with_another_signal_sends_term_and_two_stops_are_one(state):
    async with worker_on(state, through=THROUGH, grace=PATIENCE) as worker:
        job = await start_id(worker, shell(f"trap 'echo int' INT; {TRAPS_TERM}"))
        await wait_for_output(worker, job, b"ready")
        entry = worker.job(job)
        await asyncio.gather(worker.stop(entry, "alice", signal.SIGINT, 0.0), worker.stop(entry, "alice"))
        assert await output(worker, job) == b"ready\nterm\n"
        assert ending(worker, job) == ("STOPPED", 5, "")


DRAINED = """
import os, signal, sys
def end(*_):
    for _ in range(64): os.write(1, bytes(65536))  # blocks if nobody empties the pipe
    os._exit(6)
signal.signal(signal.SIGTERM, end)
while True: os.write(1, bytes(1000))
"""


@in_loop
async def test_the_output_beyond_the_limit_is_discarded_so_that_the_client_can_end(state):
    async with worker_on(state, through=THROUGH, grace=PATIENCE) as worker:
        text, status = await result(worker, python(DRAINED, max_output=5000))
        assert (status.status, status.exit_code, status.ending.reason) == ("STOPPED", 6, "OUTPUT_LIMIT")
        assert text == bytes(5000)


@pytest.mark.parametrize("loses_shim", [False, True])
@in_loop
async def test_what_the_main_process_leaves_gets_term_and_a_grace(state, tmp_path, loses_shim):
    said = tmp_path / "said"
    said.touch()
    said.chmod(0o666)
    for folder in (tmp_path, *tmp_path.parents[:2]):  # the next one is /tmp
        folder.chmod(0o711)
    script = f"sh -c 'trap \"echo term >{said}; exit\" TERM; echo ready; while :; do sleep 0.01; done' 2>/dev/null & "
    async with worker_on(state, through=THROUGH, grace=PATIENCE / 2) as worker:
        job = await start_id(worker, shell(f"{script} read none; {'sleep 1000' if loses_shim else 'sleep 0.3'}"))
        await wait_for_output(worker, job, b"ready")
        if loses_shim:
            for process in shims_of(worker):
                os.kill(process, signal.SIGKILL)
        await output(worker, job)
        assert ending(worker, job) == (LOST if loses_shim else ("FINISHED", 0, ""))
        assert said.read_text() == "term\n"


@as_root
@in_loop
async def test_term_reaches_a_main_process_that_left_its_cgroup(state):
    """`systemd-run --scope` does that."""
    async with worker_on(state, through=THROUGH, grace=PATIENCE) as worker:
        leave = f"echo $$ > {CgroupMount.find().point}/cgroup.procs"
        job = await start_id(worker, shell(f"{leave}; {TRAPS_TERM}", run_as="root"))
        await wait_for_output(worker, job, b"ready")
        await worker.stop(worker.job(job))
        assert await output(worker, job) == b"ready\nterm\n"
        assert ending(worker, job) == ("STOPPED", 5, "")


@as_root
def test_without_cgroups_all_that_the_main_process_leaves_gets_term_before_the_grace(state, mark):
    """Also what is found after a process that ignores TERM."""
    ignores = f'trap "" TERM; echo ignores; while :; do sleep 1; : {mark}; done'
    obeys = f'trap "echo term; exit" TERM; echo obeys; while :; do sleep 0.01; : {mark}; done'
    script = f"(sh -c '{ignores}' & sh -c '{obeys}' &) ; read none; exit 3"
    body = f"""
        async def nothing():
            return
            yield

        job = await start_id(worker, JobRequest("sh", ("-c", {script!r}), owner="alice", input=True))
        text = b""
        async for chunk in worker.stream(worker.job(job)):
            text += chunk
            if b"ignores" in text and b"obeys" in text:
                break
        await worker.send_input(worker.job(job), nothing())
        print((await output(job)).count(b"term"), worker.status(worker.job(job)).exit_code)
    """
    options = {"through": THROUGH, "grace": 0.5}
    assert in_server(state, body, wrapper=NO_CGROUP, options=options) == "1 3\n"
    assert not processes_with(mark)


def shims_of(worker):
    return children(worker._launcher.process)


@pytest.mark.controllers
@in_loop
async def test_limits_of_a_job_do_not_hold_the_client_of_its_engine(state):
    async with worker_on(state, through=THROUGH) as worker:
        job = await start_id(worker, shell(WAITS, memory=8 * MIB, pids=1))
        await wait_for_output(worker, job, b"ready")
        limits = read_limits(jobs_cgroups(state)[0])
        await worker.stop(worker.job(job))
        door = jobworker.ENGINE_CLIENT_LIMITS
        assert (limits["memory.max"], limits["pids.max"]) == (str(door.memory), str(door.pids))


# -- The accounts of owners


@pytest.fixture(scope="session")
def person(certs, tmp_path_factory):
    """An account of this machine, whose name is an identity too."""
    name, home = f"jw{os.getpid()}", Path(tempfile.mkdtemp(prefix="jobworker-person-", dir="/var/lib"))
    subprocess.run(
        ["useradd", "--no-create-home", "--home-dir", home, "--shell", "/bin/sh", "--password", "*", name], check=True
    )  # "*": no password is right, but sshd lets the account in
    shutil.chown(home, name)
    authority = jobworker.load_authority(certs, "client-ca")
    jobworker.write_pair(certs, name, jobworker.issue_identity(authority, name, ["user"]))
    yield name
    subprocess.run(["userdel", "--force", name], check=True)
    shutil.rmtree(home)


@as_root
@pytest.mark.parametrize("options", [(), THROUGH_OPTIONS])
def test_a_job_runs_as_the_account_of_its_owner(state, certs, person, options):
    with serving(state, certs, "--accounts", "system", *options) as served:
        job = served.start("--", "sh", "-c", "id -un; id -Gn; echo $HOME; pwd", role=person)
        home = os.path.expanduser(f"~{person}")
        assert served.run("stream", job, role=person).stdout.splitlines() == [person, person, home, home]


@as_root
@pytest.mark.parametrize("owner", ["no-such-account", "root", "daemon", "nobody", "a/b", "", "-x", "two words"])
@in_loop
async def test_an_owner_without_an_account_is_refused_in_one_sentence(state, owner):
    async with worker_on(state, accounts="system") as worker:
        with pytest.raises(jobworker.CannotRunError) as refused:
            await worker.start(JobRequest("true", owner=owner))
        assert f"this machine has no account {owner!r} with a uid of 1000 or more" in str(refused.value)
        assert left_in(state) == []


# -- ssh


@pytest.fixture(scope="session")
def ssh(person):
    """The words of an ssh to a real sshd on loopback, with the account of `person` on both sides."""
    program = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/usr/bin")
    if os.geteuid() != 0 or not program or not shutil.which("ssh"):
        pytest.skip("needs root, ssh and sshd (Debian: apt install openssh-server)")
    folder = Path(tempfile.mkdtemp(prefix="jobworker-ssh-"))
    folder.chmod(0o711)
    for name in ("host", "client"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    shutil.chown(folder / "client", person)
    os.makedirs("/run/sshd", exist_ok=True)
    fixed = (f"HostKey={folder}/host", f"AuthorizedKeysFile={folder}/client.pub", f"PidFile={folder}/pid", "UsePAM=no",
             "StrictModes=no", "ListenAddress=127.0.0.1")  # fmt: skip
    quiet = ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "BatchMode=yes")
    with socket.socket() as reserved:  # sshd can listen beside it, since it does not listen
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        port = str(reserved.getsockname()[1])
        words = [program, "-D", "-e", "-f", "/dev/null", "-p", port, *(f"-o{each}" for each in fixed)]
        with subprocess.Popen(words, stderr=subprocess.PIPE) as server:
            try:
                assert b"listening" in server.stderr.readline()
                yield ("ssh", "-p", port, "-i", f"{folder}/client", *(f"-o{each}" for each in quiet), "127.0.0.1")
            finally:
                server.terminate()
    shutil.rmtree(folder)


def over_ssh(state, ssh, **options):
    return worker_on(state, accounts="system", through=(*ssh, "{command}"), **options)


@in_loop
async def test_the_words_of_a_command_arrive_over_ssh_as_they_are(state, ssh, person):
    words = [
        "a b",
        "it's",
        'say "x"',
        ";",
        "a; echo b",
        "$HOME",
        "$(id)",
        "`id`",
        "*",
        "~",
        "x\ny",
        "\\n",
        "",
        "-p",
        "é",
    ]
    async with over_ssh(state, ssh) as worker:
        text, status = await result(worker, JobRequest(PYTHON, ("-c", SHOWS_WORDS, *words), owner=person))
        assert (eval(text), status.status, status.exit_code) == (words, "FINISHED", 0)


@pytest.mark.parametrize(
    ("script", "text", "codes"),
    [
        ("printf 'no newline'; exit 254", b"no newline", {254}),
        ("printf '\\0\\377\\r\\n' >&2; exit 3", b"\0\377\r\n", {3}),
        ("exit 255", b"", {255}),
        ("kill -9 $$", None, {137, 255}),  # 255 where the account's shell has replaced itself, else it says "Killed"
    ],
)
@in_loop
async def test_a_job_over_ssh_has_its_own_bytes_and_exit_code(state, ssh, person, script, text, codes):
    async with over_ssh(state, ssh) as worker:
        printed, status = await result(worker, shell(script, owner=person))
        assert printed == text or text is None
        assert (status.status, status.ending.reason) == ("FINISHED", "")
        assert status.exit_code in codes


@in_loop
async def test_an_input_and_its_end_pass_over_ssh(state, ssh, person):
    async def chunks():
        yield b"a\0b\r\n"
        yield b"c"

    async with over_ssh(state, ssh) as worker:
        job = await start_id(worker, shell("cat; echo end", owner=person, input=True))
        await worker.send_input(worker.job(job), chunks())
        assert await output(worker, job) == b"a\0b\r\ncend\n"


@in_loop
async def test_a_host_that_ssh_cannot_reach_is_never_reported_as_0(state, ssh, person):
    async with over_ssh(state, (*ssh[:-1], "127.0.0.2")) as worker:  # nothing listens there
        text, status = await result(worker, shell("echo never", owner=person))
        assert b"Connection refused" in text
        assert (status.status, status.exit_code) == ("FINISHED", 255)


@in_loop
async def test_a_stop_ends_ssh_and_nothing_on_its_host(state, ssh, person, mark):
    async with over_ssh(state, ssh) as worker:
        waits = "import time; print('ready', flush=True); time.sleep(1000)"
        job = await start_id(worker, python(waits, mark, owner=person))
        await wait_for_output(worker, job, b"ready")
        await worker.stop(worker.job(job), by=person)
        assert ending(worker, job) == ("STOPPED", 255, "")
    left = processes_with(mark)
    for process in left:
        os.kill(process, signal.SIGKILL)
    assert left


# -- systemd


SCOPE = (
    'sh -c "XDG_RUNTIME_DIR=/run/user/$(id -u) exec systemd-run --user --quiet --scope --unit={id} '
    '-p MemoryMax={memory_mb}M -p TimeoutStopSec=1 -- {command}"'
)
SCOPE_END = (  # it ends what the main process has left
    'sh -c "export XDG_RUNTIME_DIR=/run/user/$(id -u); '
    "systemctl --user show -p Result {id}.scope | sed -n s/.*oom-kill/OOM/p; "
    'systemctl --user stop {id}.scope; systemctl --user reset-failed {id}.scope"'
)


@pytest.fixture(params=["--user", ""], ids=["owner's manager", "root in the system's manager"])
def manager(person, request):
    """The option for one of systemd's managers. The system's manager refuses jobs of other accounts than root."""
    unit = f"user@{pwd.getpwnam(person).pw_uid}.service"
    systemctl("start", unit)
    yield request.param
    systemctl("stop", unit)


def scope_worker(states, manager):
    words = (jobworker.as_words(text.replace("--user", manager)) for text in (SCOPE, SCOPE_END))
    options = dict(zip(("through", "through_end"), words, strict=True))
    return worker_on(new_state(states, "/scratch"), accounts="system", grace=PATIENCE, **options)


def of_scope(person, manager):
    return {"owner": person, "memory": 64 * MIB, "run_as": "" if manager else "root"}


@pytest.mark.systemd
@in_loop
async def test_a_job_in_a_scope_of_systemd_has_its_limit_and_its_code(nothing_is_left, person, manager, mark):
    asked = of_scope(person, manager)
    limit = "cat /sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup)/memory.max"
    async with scope_worker(nothing_is_left, manager) as worker:
        for request, expected, end_ in [
            (shell(f"{limit}; exit 3", **asked), b"%d\n" % (64 * MIB), ("FINISHED", 3, "")),
            (shell("kill -TERM $$", **asked), b"", ("FINISHED", 143, "")),
            (python(FORKS_TWICE, mark, **asked), b"", ("FINISHED", 4, "")),
            (python("bytearray(1 << 28)", **asked), b"", ("STOPPED", 255, "OOM")),
            (JobRequest("--uid=0", ("true",), **asked), None, ("FINISHED", 1, "")),
        ]:
            text, status = await result(worker, request)
            assert (status.status, status.exit_code, status.ending.reason) == end_, text
            assert expected in (text, None)
        assert not processes_with(mark)


@pytest.mark.systemd
@in_loop
async def test_no_process_of_a_scope_of_systemd_outlives_its_job(nothing_is_left, person, manager, mark):
    async with scope_worker(nothing_is_left, manager) as worker:
        for expected in (("STOPPED", 143, ""), LOST):
            job = await start_id(worker, python(HIDDEN_GRANDCHILDREN, mark, **of_scope(person, manager)))
            await wait_for_output(worker, job, b"deep")
            if expected == LOST:
                for process in shims_of(worker):
                    os.kill(process, signal.SIGKILL)
                await output(worker, job)
            else:
                await worker.stop(worker.job(job), by=person)
            assert ending(worker, job) == expected
            assert not processes_with(mark)


# -- Slurm

KEEPER = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: the daemons become children of this process
for line in sys.stdin:
    process = os.posix_spawnp(line.split()[0], line.split(), os.environ)
    while True:
        ended, status = os.wait()
        if ended == process: break
    print(status, flush=True)
"""


class Cluster:
    """A Slurm cluster, and the owner whose account it knows. A keeper is the parent of its daemons."""

    def __init__(self, folder, nodes, owner):
        self.folder, self.nodes, self.owner = folder, nodes, owner
        self.conf = folder / "slurm.conf"
        self.known = f"SLURM_CONF={self.conf}"
        self.keeper = subprocess.Popen(
            [sys.executable, "-c", KEEPER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def do(self, verb, *words):
        self.keeper.stdin.write(" ".join(map(str, (HERE / ".ci/slurm", verb, self.folder, *words))) + "\n")
        answered = select.select([self.keeper.stdout], [], [], PATIENCE)[0]
        assert answered, f".ci/slurm {verb} does not end: see {self.folder}/log"
        assert self.keeper.stdout.readline() == "0\n", f".ci/slurm {verb}: see {self.folder}/log"

    def close(self):
        try:
            self.do("down")
        finally:
            self.keeper.kill()
            self.keeper.communicate()

    def ask(self, *words):
        done = subprocess.run(
            words, env={**os.environ, "SLURM_CONF": str(self.conf)}, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip
        return done.stdout + done.stderr

    def queue(self):
        """The states of the jobs that wait or run. Slurm offers no event, so tests ask again and again."""
        return self.ask("squeue", "--noheader", "--format=%T").split()

    def state_of(self, job):
        return self.ask("squeue", "--noheader", "--states=all", f"--name={job}", "--format=%T").strip()

    def cancel(self, job):
        self.ask("scancel", f"--name={job}")

    def let_time_run_out(self, job):
        """Slurm looks at the time limits of jobs each 30 seconds."""
        number = self.ask("squeue", "--noheader", f"--name={job}", "--format=%A").strip()
        assert not self.ask("scontrol", "update", f"JobId={number}", "EndTime=now+1seconds")

    def worker(self, state, *options, **more):
        through, end = jobworker.engine_words(("slurm", *options), ())
        known = ("env", self.known)
        more = {"accounts": "system", "through": known + through, "through_end": known + end, **more}
        return worker_on(state, **more)

    def shell(self, script, **request):
        return shell(script, owner=self.owner, **request)


def start_cluster(folder, nodes, owner):
    folder.chmod(0o755)
    cluster = Cluster(folder, nodes, owner)
    cluster.do("up", nodes)
    return cluster


@pytest.fixture(scope="session")
def slurm(certs, request):
    """One cluster of two nodes with 4 CPUs each, for all tests. /etc/slurm/slurm.conf is a link to its configuration."""
    if os.geteuid() != 0:
        pytest.skip("needs root: jobs in Slurm run as the account that submits them")
    if missing := [name for name in ("slurmctld", "slurmd", "munged", "srun") if not shutil.which(name)]:
        pytest.skip(f"there is no {' and no '.join(missing)}: `.ci/slurm install`")
    etc = Path("/etc/slurm/slurm.conf")
    if etc.exists():
        pytest.skip(f"this machine has a cluster: {etc}")
    person = request.getfixturevalue("person")
    jobworker.libc_call("prctl", jobworker.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    folder = Path(tempfile.mkdtemp(prefix="jobworker-slurm-"))
    cluster = start_cluster(folder, 2, person)
    etc.unlink(missing_ok=True)
    etc.symlink_to(cluster.conf)
    yield cluster
    etc.unlink()
    cluster.close()
    shutil.rmtree(folder)


@contextlib.contextmanager
def another_cluster(slurm, nodes):
    folder = Path(tempfile.mkdtemp(prefix="jobworker-slurm-"))
    cluster = start_cluster(folder, nodes, slurm.owner)
    try:
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(folder)


def for_slurm(test):
    return pytest.mark.slurm(test)


def task_bytes(text):
    """The bytes of a task, without what Slurm says after them: the exit code other than 0, that it did not look at the
    memory of a task that ended at once, and that a node ended its connection first.
    """
    return re.sub(rb"(slurmstepd-n\d: error: no task list created!\n|srun: error: [^\n]+\n)+\Z", b"", text)


def check_all_gone(cluster, mark):
    until(lambda: not cluster.queue())
    until(lambda: not processes_with(mark))


@for_slurm
@pytest.mark.parametrize("nodes", [2, 1])
@in_loop
async def test_a_job_on_a_cluster_has_its_own_bytes_and_exit_code(slurm, nodes, state):
    """On the shared cluster of two nodes, and on another one of one node."""
    cases = [
        ("echo out; echo err >&2", b"out\nerr\n", 0),
        ("exit 3", b"", 3),
        ("printf 'no newline'; exit 255", b"no newline", 255),
        ("kill -9 $$", b"", 137),
        ("kill -TERM $$", b"", 143),
        ("printf '\\0\\377\\r\\n'", b"\0\xff\r\n", 0),
        ("echo $JOBWORKER_JOB_ID $HOME $(pwd) $(id -un) $A", None, 0),
    ]
    with contextlib.nullcontext(slurm) if nodes == 2 else another_cluster(slurm, nodes) as cluster:
        async with cluster.worker(state) as worker:
            ids = [await start_id(worker, cluster.shell(script, env=(("A", "b c"),))) for script, _, _ in cases]
            for job, (_, expected, code) in zip(ids, cases, strict=True):
                text = task_bytes(await output(worker, job))
                home = os.path.expanduser(f"~{cluster.owner}")
                assert text == (
                    expected if expected is not None else f"{job} {home} {home} {cluster.owner} b c\n".encode()
                )
                assert ending(worker, job) == ("FINISHED", code, "")
                assert worker.status(worker.job(job)).node in [f"n{number + 1}" for number in range(nodes)]


@for_slurm
@in_loop
async def test_a_hundred_jobs_at_once_each_have_their_own_code_on_a_cluster(slurm, state):
    async with slurm.worker(state) as worker:
        requests = [slurm.shell(f"echo {number}; exit {number}") for number in range(100)]
        ids = await asyncio.gather(*(start_id(worker, request) for request in requests))
        texts = await asyncio.gather(*(output(worker, job) for job in ids))
        assert [task_bytes(text) for text in texts] == [b"%d\n" % number for number in range(100)]
        assert [ending(worker, job) for job in ids] == [("FINISHED", number, "") for number in range(100)]


@for_slurm
@in_loop
async def test_no_word_of_a_command_is_an_option_of_srun(slurm, state):
    """srun would take the words after a lone `:` for options of another part of the job."""
    words = ["--uid=0", "-N2", ":", "--uid=0", "a b", "x\ny", "{id}", "it's", "$HOME", "", "--"]
    async with slurm.worker(state) as worker:
        args = ("-c", SHOWS_WORDS, *words)
        request = JobRequest(PYTHON, args, owner=slurm.owner, name="--uid=0 'x\" :")
        text, status = await result(worker, request)
        assert (eval(text), status.exit_code) == (words, 0)
        for command in ("--uid=0", "-N2", "no such command", ":"):
            text, status = await result(worker, JobRequest(command, ("--uid=0",), owner=slurm.owner))
            assert status.exit_code in (2, 127), text


@for_slurm
@in_loop
async def test_a_stop_on_a_cluster_leaves_no_process_on_any_node_and_an_empty_queue(slurm, state, mark):
    async with slurm.worker(state) as worker:
        request = JobRequest(PYTHON, ("-c", HIDDEN_GRANDCHILDREN, mark), owner=slurm.owner)
        ids = [await start_id(worker, request) for _ in range(3)]
        for job in ids:
            await wait_for_output(worker, job, b"deep")
        await asyncio.gather(*(worker.stop(worker.job(job), by="alice") for job in ids))
        assert {ending(worker, job) for job in ids} == {("STOPPED", 137, "")}
        check_all_gone(slurm, mark)


@for_slurm
@in_loop
async def test_a_stop_takes_a_job_that_waits_for_resources_out_of_the_queue(slurm, state, mark):
    async with slurm.worker(state, defaults=Limits(cpu=4), caps=Limits(cpu=4, memory=1 << 40)) as worker:
        held = [await start_id(worker, slurm.shell(f"echo ready; sleep 1000; : {mark}")) for _ in range(2)]
        for job in held:
            await wait_for_output(worker, job, b"ready")
        waiting = await start_id(worker, slurm.shell("echo never"))
        until(lambda: slurm.state_of(waiting) == "PENDING")
        await worker.stop(worker.job(waiting), by="alice")
        assert ending(worker, waiting)[0] == "STOPPED"
        assert slurm.queue() == ["RUNNING", "RUNNING"]
        assert b"never" not in await output(worker, waiting)
        await asyncio.gather(*(worker.stop(worker.job(job)) for job in held))
        check_all_gone(slurm, mark)


@for_slurm
@pytest.mark.parametrize(
    ("script", "limit", "reason"),
    [
        ("trap '' TERM; echo ready; sleep 1000", {"timeout": 1.5}, "TIMEOUT"),
        ("trap '' TERM; yes ready", {"max_output": 1_000_000}, "OUTPUT_LIMIT"),
    ],
)
@in_loop
async def test_a_limit_ends_the_step_on_its_node_with_its_reason(slurm, state, mark, script, limit, reason):
    async with slurm.worker(state) as worker:
        text, status = await result(worker, slurm.shell(f"{script}; : {mark}", **limit))
        assert (status.status, status.ending.reason) == ("STOPPED", reason)
        assert reason == "TIMEOUT" or len(text) == limit["max_output"]
        check_all_gone(slurm, mark)


@for_slurm
@pytest.mark.parametrize("with_srun", [False, True])
@in_loop
async def test_a_killed_shim_on_a_cluster_loses_its_job_and_the_step_is_gone(slurm, state, mark, with_srun):
    """With its srun, as a power cut of the door's machine does."""
    async with slurm.worker(state) as worker:
        job = await start_id(worker, slurm.shell(f"trap '' TERM; echo ready; sleep 1000; : {mark}"))
        await wait_for_output(worker, job, b"ready")
        sruns = worker.job(job).spec.processes().members() if with_srun else ()
        for process in (*shims_of(worker), *sruns):
            os.kill(process, signal.SIGKILL)
        await output(worker, job)
        assert ending(worker, job) == LOST
        check_all_gone(slurm, mark)


FAILS_ONCE = """#!/bin/sh
mkdir "$0.failed" 2>/dev/null && echo "scancel: error: Socket timed out on send/recv operation" >&2 && exit 1
exec /usr/bin/scancel "$@"
"""


@for_slurm
@pytest.mark.parametrize("fails_once", [False, True])
@in_loop
async def test_a_step_that_lost_its_srun_is_cancelled(slurm, state, tmp_path, mark, fails_once):
    """SIGKILL of srun leaves the step to its node."""
    tmp_path.chmod(0o777)  # for the mark that `scancel` has failed
    for folder in tmp_path.parents[:2]:  # the next one is /tmp
        folder.chmod(0o711)
    if fails_once:
        (tmp_path / "scancel").write_text(FAILS_ONCE)
        (tmp_path / "scancel").chmod(0o755)
    path = f"PATH={tmp_path}:{jobworker.JOB_PATH}"
    async with slurm.worker(state, through_end=("env", slurm.known, path, *jobworker.SLURM_END)) as worker:
        job = await start_id(worker, slurm.shell(f"echo ready; sleep 1000; : {mark}"))
        await wait_for_output(worker, job, b"ready")
        for process in worker.job(job).spec.processes().members():
            if Path(f"/proc/{process}/comm").read_text() == "srun\n":
                os.kill(process, signal.SIGKILL)
        await output(worker, job)
        assert ending(worker, job) == ("FINISHED", 137, "")
        assert worker.status(worker.job(job)).node in ("n1", "n2")
        check_all_gone(slurm, mark)


@for_slurm
@pytest.mark.parametrize("slow", [False, True], ids=["quick epilog", "slow epilog"])
@in_loop
async def test_a_job_that_was_cancelled_from_outside_is_never_reported_as_0(slurm, state, slow):
    async with slurm.worker(state) as worker:
        job = await start_id(worker, slurm.shell("trap 'exit 0' TERM; echo ready; while :; do sleep 0.1; done"))
        await wait_for_output(worker, job, b"ready")
        if slow:
            (slurm.folder / "slow").touch()
        try:
            slurm.cancel(job)
            until(lambda: slurm.state_of(job) == ("COMPLETING" if slow else "CANCELLED"))
        finally:
            (slurm.folder / "slow").unlink(missing_ok=True)
        await output(worker, job)
        assert ending(worker, job) == ("STOPPED", 255, "CANCELLED")


@for_slurm
@in_loop
async def test_a_job_that_slurm_s_time_limit_ends_is_never_reported_as_0(slurm, state, mark):
    script = f"trap 'exit 0' TERM; echo ready; while :; do sleep 0.1; done; : {mark}"
    async with slurm.worker(state) as worker:
        job = await start_id(worker, slurm.shell(script))
        await wait_for_output(worker, job, b"ready")
        slurm.let_time_run_out(job)
        text = await output(worker, job)
        assert b"DUE TO TIME LIMIT" in text
        assert ending(worker, job) == ("STOPPED", 255, "TIMEOUT")
        check_all_gone(slurm, mark)


@for_slurm
@in_loop
async def test_a_preempted_job_is_never_reported_as_0(slurm, state, mark):
    async with slurm.worker(state, defaults=Limits(cpu=4), caps=Limits(cpu=4, memory=1 << 40)) as worker:
        jobs = [
            await start_id(worker, slurm.shell(f"trap 'exit 0' TERM; echo ready; sleep 1000 & wait; : {mark}"))
            for _ in range(2)
        ]
        for job in jobs:
            await wait_for_output(worker, job, b"ready")
        slurm.ask("srun", "--partition=urgent", "--nodes=2", "--ntasks=8", "true")
        for job in jobs:
            await output(worker, job)
            assert ending(worker, job) == ("STOPPED", 255, "PREEMPTED")


@for_slurm
@in_loop
async def test_a_job_whose_node_dies_is_never_reported_as_0_and_a_node_that_comes_back_is_used(slurm, state, mark):
    async with slurm.worker(state, "--nodelist=n2") as worker:
        job = await start_id(worker, slurm.shell(f"echo ready; sleep 1000; : {mark}"))
        await wait_for_output(worker, job, b"ready")
        slurm.do("node", 2, "kill")
        try:
            await output(worker, job)
            assert ending(worker, job) == ("STOPPED", 255, "NODE_FAIL")
            assert worker.status(worker.job(job)).node == "n2"
        finally:
            slurm.do("node", 2, "up")
            for process in processes_with(mark):  # what the node's dead slurmd cannot end
                os.kill(process, signal.SIGKILL)
        _, status = await result(worker, slurm.shell("exit 4"))
        assert (status.status, status.exit_code, status.node) == ("FINISHED", 4, "n2")


@for_slurm
@in_loop
async def test_a_job_larger_than_the_cluster_ends_with_slurm_s_own_sentence(slurm, state):
    async with slurm.worker(state, caps=Limits(cpu=1000, memory=1 << 40)) as worker:
        for more in ({"cpu": 64}, {"memory": 1 << 36}):
            text, status = await result(worker, slurm.shell("echo never", **more))
            assert b"srun: error: Unable to allocate resources: " in text
            assert b"never" not in text
            assert (status.status, status.exit_code) == ("FINISHED", 1)


@for_slurm
@in_loop
async def test_a_controller_that_is_down_when_a_job_starts_or_ends_hides_no_exit_code(slurm, state, tmp_path):
    """A job that starts then fails with what srun says. One that ends then has what srun told of its task, and what srun
    could not take out of the queue is cancelled. Then it is COMPLETING for up to a minute: slurmstepd sleeps that long
    before it tells of its end again. So this test has a cluster of its own, whose controller comes back after the sruns.
    """
    gate = tmp_path / "gate"
    gate.touch()
    for folder in (tmp_path, *tmp_path.parents[:2]):  # the next one is /tmp
        folder.chmod(0o711)
    script = f"echo ready; while [ -e {gate} ]; do sleep 0.1; done; echo through; exit"
    with another_cluster(slurm, 1) as cluster:
        async with cluster.worker(state) as worker:
            jobs = [await start_id(worker, cluster.shell(f"{script} {code}")) for code in (0, 7)]
            for job in jobs:
                await wait_for_output(worker, job, b"ready")
            cluster.do("controller", "down")
            gate.unlink()
            for job in jobs:
                await wait_for_output(worker, job, b"through")
            late = await start_id(worker, cluster.shell("echo never"))
            said = b"srun: error: Unable to allocate resources: Unable to contact slurm controller"
            await wait_for_output(worker, late, said)
            assert not survivors(process for job in jobs for process in processes_with(f"--job-name={job}"))  # srun
            cluster.do("controller", "up")
            for job, code in ((late, 1), *zip(jobs, (0, 7), strict=True)):
                await output(worker, job)
                assert ending(worker, job) == ("FINISHED", code, "")
        assert set(cluster.queue()) <= {"COMPLETING"}


@for_slurm
@in_loop
async def test_a_hundred_megabytes_arrive_from_a_cluster_unchanged(slurm, state):
    size = 100_000_000
    async with slurm.worker(state, caps=Limits(memory=GIB)) as worker:
        request = JobRequest(PYTHON, ("-c", WRITES_BYTES, str(size)), owner=slurm.owner, memory=GIB)
        job = await start_id(worker, request)
        digest, received = hashlib.sha256(), 0
        async with contextlib.aclosing(worker.stream(worker.job(job))) as chunks:
            async for chunk in chunks:
                digest.update(chunk)
                received += len(chunk)
        assert ending(worker, job) == ("FINISHED", 0, "")
        expected = hashlib.sha256(random.Random(7).randbytes(size)).hexdigest()
        assert (received, digest.hexdigest()) == (size, expected)


SLURM_OPTIONS = ("--through", "slurm", "--accounts", "system")


@for_slurm
def test_a_kill_of_the_server_in_the_middle_of_a_cluster_s_stream_loses_nothing(slurm, state, certs, port, mark):
    script = f"for n in 1 2 3 4 5 6; do echo line $n; sleep 0.3; done; exit 6; : {mark}"
    server = spawn(state, certs, port, *SLURM_OPTIONS)
    command = ("run", "--", "sh", "-c", script)
    with killed_at_end(server, certs, port) as served, served.popen(*command, role=slurm.owner, text=True) as client:
        assert client.stdout.readline() == "line 1\n"
        end(server)
        with serving(state, certs, *SLURM_OPTIONS, port=port):
            rest = client.communicate(timeout=PATIENCE)[0]
            assert re.sub("srun: .*\n", "", rest) == "".join(f"line {number}\n" for number in range(2, 7))
            assert client.returncode == 6
    check_all_gone(slurm, mark)


@for_slurm
def test_two_hundred_jobs_over_eight_slots_outlive_three_kills_of_the_server(slurm, state, certs, port):
    """Each job runs once, with its own output and code."""
    ids = [jobworker.new_job_id() for _ in range(200)]
    for number in range(4):
        server = spawn(state, certs, port, *SLURM_OPTIONS, "--max-jobs", "1000")
        with killed_at_end(server, certs, port) as served, channel_to(served, role=slurm.owner) as channel:
            for job in ids[number * 50 : number * 50 + 50]:
                code = ids.index(job) % 100
                request = pb.StartJobRequest(cmd="sh", args=["-c", f"echo {job}; exit {code}"], id=job)
                assert job == ask(channel, "StartJob", request).ID
            if number < 3:
                continue  # the block kills the server
            for job in ids:
                text = ask(channel, "GetOutputStream", pb.GetStreamRequest(id=job))
                status = ask(channel, "GetJobStatus", pb.GetStatusRequest(id=job))
                assert text.decode().splitlines().count(job) == 1  # under load srun tells of what it tries again
                assert (status.status, status.exitcode, status.reason) == (pb.FINISHED, ids.index(job) % 100, "")
    until(lambda: not slurm.queue())


@pytest.mark.parametrize("file", ["docs/kubernetes.yaml", "docs/nomad.hcl"])
def test_the_arguments_in_the_files_for_other_engines_are_those_of_the_command_line(file):
    (found,) = re.findall(r"^ *args(?:: | *= )(\[.*\])$", (HERE / file).read_text(), re.MULTILINE)
    words = json.loads(found)
    words = words[words.index("serve") :]
    options = jobworker.make_parser(words)[0].parse_args(words)
    assert options.listen == ("", jobworker.DEFAULT_PORT)
    assert jobworker.worker_options(options).state == Path("/var/lib/jobworker")


def test_the_words_for_slurm_end_its_options_before_the_command():
    words, end = jobworker.engine_words(("slurm", "--partition=long"), ())
    assert words[0] == "srun"
    assert words[-5:] == ("--partition=long", "--", "sh", "-c", "exec {command}")
    assert end == jobworker.SLURM_END
