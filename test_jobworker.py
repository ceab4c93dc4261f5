"""Tests of Job worker: each is named after the promise that it checks, and uses the real thing.

Real processes, cgroups, files, certificates and connections; nothing is replaced by a stand-in. They wait for
events (a job that says something, a process that ends), never for time to pass, and never assert a time. What a
test needs of the machine (root, controllers) and does not find is the reason with which it is skipped. The banners
are those of jobworker.py.
"""

from __future__ import annotations

import asyncio
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
import json
import os
import pty
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
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
    ec,
    grpc,
    hashes,
    pb,
    x509,
)

pb_grpc = jobworker.Deferred("gen.workerservice_pb2_grpc")

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
FORKS_TWICE = "import os, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0: time.sleep(1000)\nos._exit(4)"
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
    found = set()
    for task in Path(f"/proc/{process}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread of gRPC's that ended
            found |= set(map(int, (task / "children").read_text().split()))
    return found


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


EARLIER = set()  # the processes that were there before the test: a server that many share


def reap(processes):
    for process in processes:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process, os.WNOHANG)


def wait_for_orphans():
    """Wait until the launcher and the shims of a server that died have ended."""
    while left := children() - EARLIER:
        assert not all_gone(left)
        reap(left)


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
    mount, name = CgroupMount.find(), jobworker.state_name(state)
    folders = os.walk(mount.point) if mount else ()  # unlike rglob it minds no folder that vanishes
    return [Path(folder) for folder, _, _ in folders if os.path.basename(folder) == name]


def jobs_cgroups(state):
    return [folder for tree in trees_of(state) for folder in tree.glob("u*/*") if folder.is_dir()]


def descriptors():
    """This process's descriptors, but for those that gRPC, once it is here, opens and closes when it likes."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the folder's own
            kind = os.readlink(f"/proc/self/fd/{number}").split("[")[0]
            if "grpc" not in sys.modules or not kind.startswith(("socket:", "anon_inode:")):
                found.add(number)
    return found


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    """After every test: no descriptor, process, thread or cgroup that was not there before."""
    if request.node.get_closest_marker("controllers") and missing_controllers():
        pytest.skip(f"this machine's cgroup2 has no controllers {', '.join(missing_controllers())}")
    if (
        request.node.get_closest_marker("systemd")
        and (systemd := Path("/proc/1/comm").read_text().strip()) != "systemd"
    ):
        pytest.skip(f"process 1 is {systemd}, not systemd")
    jobworker.libc_call("prctl", jobworker.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what is orphaned becomes ours
    states = []
    before = descriptors(), threading.active_count()
    EARLIER.clear()
    EARLIER.update(children())
    yield states
    stuck = {}
    while left := children() - EARLIER:
        for process in all_gone(left):
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
    assert not stuck, "these processes were left"
    assert not cgroups, "these cgroups were left"
    assert descriptors() == before[0], "descriptors were left"
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


async def start_id(worker, request):
    """Start a job; its id."""
    return (await worker.start(request)).id


async def output(worker, job, offset=0):
    return b"".join([chunk async for chunk in worker.stream(worker.job(job), offset)])


async def said(worker, job, marker):
    """Wait until a job has said something; all that it said until then."""
    text = b""
    async with contextlib.aclosing(worker.stream(worker.job(job))) as chunks:
        async for chunk in chunks:
            text += chunk
            if marker in text:
                return text
    raise AssertionError(f"it ended without saying {marker!r}: {text!r}")


async def result(worker, request):
    """Run a job to its end: what it printed and its status."""
    job = await start_id(worker, request)
    text = await output(worker, job)
    return text, worker.status(worker.job(job))


def ending(worker, job):
    status = worker.status(worker.job(job))
    return status.status, status.exit_code, status.ending.reason if status.ending else ""


async def forgotten(worker, job):
    """Wait until a job has left the table."""
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
    """A copy of jobworker.py of which one process dies, once, before the statement that begins like `place`.

    It dies when the file `armed` is there; so that a test can tell that the place was reached.
    """
    armed = folder / "armed"
    armed.touch()
    death = f"if os.path.exists({str(armed)!r}): os.unlink({str(armed)!r}); {last_words}; os.kill(os.getpid(), 9)"
    return altered_copy(folder, place, death), armed


def altered_copy(folder, place, statement):
    """A copy of jobworker.py with one more statement, before the one that begins like `place`."""
    text = Path(jobworker.__file__).read_text()
    found = re.findall(rf"^ *{re.escape(place)}", text, re.MULTILINE)
    assert len(found) == 1, f"{place!r} stands {len(found)} times in jobworker.py"
    indent = " " * (len(found[0]) - len(found[0].lstrip()))
    (folder / "jobworker.py").write_text(text.replace(found[0], f"{indent}{statement}\n{found[0]}"))
    specification = importlib.util.spec_from_file_location("altered_jobworker", folder / "jobworker.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules["altered_jobworker"] = module  # where dataclasses look for it
    specification.loader.exec_module(module)
    return module


ID = "aa0319d4-e37d-420b-ac43-7316f6b032e5"
ID2 = "bb0319d4-e37d-420b-ac43-7316f6b032e5"


# --- 3. Cgroup ----------------------------------------------------------------------------------------
# Where the tree stands, what the kernel enforces in it, and what holds where there is none.

NO_CGROUP = (  # the words before a command that is to see a machine on which it can make no cgroup
    "unshare", "-m", "sh", "-c",
    """awk '$3 == "cgroup2" { print $2 }' /proc/mounts | while read -r point; do umount -l "$point"; done; exec "$@" """,
    "sh",
)  # fmt: skip
READ_ONLY_CGROUP = (
    "unshare", "-m", "sh", "-c",
    """awk '$3 == "cgroup2" { print $2 }' /proc/mounts |
    while read -r point; do mount -o remount,bind,ro "$point"; done; exec "$@" """,
    "sh",
)  # fmt: skip


@pytest.fixture
def nested():
    """A cgroup of the test's own, with all controllers that there are, beside the real root's others."""
    mount = CgroupMount.find()
    assert mount
    cgroup = Cgroup(f"{mount.point}/jobworker-test-{os.urandom(4).hex()}")
    cgroup.create()
    Cgroup(mount.point).enable(jobworker.CONTROLLERS)
    yield cgroup
    cgroup.remove()


def inside(cgroup, *, container=False, leaf=""):
    """The words before a command that is to run in a cgroup, as a container does: with nothing above visible."""
    point = CgroupMount.find().point
    enter = f'mkdir -p {cgroup.path}{leaf} && echo 0 > {cgroup.path}{leaf}/cgroup.procs && exec "$@"'
    mount = f'umount -l {point} && mount -t cgroup2 none {point} && exec "$@"'
    more = ("unshare", "-C", "-m", "sh", "-c", mount, "sh") if container else ()
    return ("sh", "-c", enter, "sh", *more)


SHOW_TREE = """
    job = await start_id(worker, JobRequest("cat", ("/proc/self/cgroup",), owner="alice"))
    text = (await output(job)).decode()
    line = next(line for line in text.splitlines() if line.startswith("0::"))
    print("tree", worker._tree.root, "job", line[3:], "controllers", *sorted(worker._tree.controllers))
"""


@pytest.mark.tree
@as_root
def test_on_a_host_root_s_tree_is_jobworker_in_the_root_cgroup(state):
    name, point = jobworker.state_name(state), CgroupMount.find().point
    assert f"tree {point}/jobworker/{name} job /jobworker/{name}/u" in in_server(state, SHOW_TREE)


@pytest.mark.tree
@as_root
def test_the_tree_can_be_named(state, nested):
    place = f"{nested.path}/here"
    told = in_server(state, SHOW_TREE, options={"cgroup": place})
    assert f"tree {place}/{jobworker.state_name(state)}" in told
    Cgroup(place).remove()


@pytest.mark.tree
@as_root
def test_in_a_container_the_server_leaves_the_visible_root_for_a_leaf_and_only_it(state, nested):
    name, point = jobworker.state_name(state), CgroupMount.find().point
    body = SHOW_TREE + '    print("server", open("/proc/self/cgroup").read().split("0::")[1])'
    told = in_server(state, body, wrapper=inside(nested, container=True))
    assert f"tree {point}/jobworker/{name} job /jobworker/{name}/u" in told
    assert "server /jobworker/server" in told
    assert Path(f"{nested.path}/jobworker").is_dir()
    if not missing_controllers():
        assert "controllers cpu io memory pids" in told


@pytest.mark.tree
@as_root
@in_loop
async def test_of_a_tree_only_what_jobs_go_on_in_outlives_its_server(state, nested):
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
async def test_a_job_that_left_its_cgroup_is_stopped_all_the_same(state):
    async with worker_on(state) as worker:
        out = f"echo $$ > {CgroupMount.find().point}/cgroup.procs; echo out; exec sleep 1000"
        job = await start_id(worker, shell(out, run_as="root"))
        await said(worker, job, b"out")
        await worker.stop(worker.job(job))
        assert ending(worker, job) == ("STOPPED", 137, "")


@pytest.mark.controllers
def test_a_server_that_enforces_more_than_the_last_starts_jobs_beside_its_jobs(state, certs):
    port = free_port()
    with killed(spawn(state, certs, port, "--without", "memory"), certs, port) as served:
        served.start("--", "sleep", "1000")
    with serving(state, certs, port=port) as served:
        job = served.start("--", "echo", "hello")
        assert served.run("stream", job).stdout == "hello\n"
        assert json.loads(served.run("status", "--json", job).stdout)["limits"]["memory"] == 512 * MIB


@pytest.mark.tree
@as_root
def test_a_user_s_tree_stands_in_the_highest_cgroup_that_was_delegated(state, nested):
    user = 65534
    os.chown(state, user, user)
    session = Cgroup(f"{nested.path}/session.scope")
    session.create()
    for path in (nested.path, session.path):
        for file in (".", "cgroup.procs", "cgroup.subtree_control"):
            os.chown(f"{path}/{file}", user, user)
    wrapper = (
        *inside(nested, leaf="/session.scope"),
        "setpriv",
        f"--reuid={user}",
        f"--regid={user}",
        "--clear-groups",
    )
    told = in_server(state, SHOW_TREE, wrapper=wrapper, interpreter=PYTHON)
    assert f"tree {nested.path}/jobworker/{jobworker.state_name(state)} job " in told


@pytest.mark.tree
@as_root
def test_the_server_s_own_unit_is_refused_as_the_place_of_the_tree(state, nested):
    user = 65534
    os.chown(state, user, user)
    unit = Cgroup(f"{nested.path}/box.service")
    unit.create()
    for file in (".", "cgroup.procs", "cgroup.subtree_control"):
        os.chown(f"{unit.path}/{file}", user, user)
    wrapper = (*inside(unit), "setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups")
    told = in_server(state, "pass", wrapper=wrapper, interpreter=PYTHON, status=1)
    assert "own unit box.service" in told


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
def test_a_machine_that_cannot_enforce_a_limit_is_refused_in_one_sentence(state, wrapper, user, sentences):
    if user:
        os.chown(state, user, user)
    more = {"user": user, "group": user, "extra_groups": ()} if user else {}
    told = in_server(
        state, "pass", wrapper=wrapper, options={"without": frozenset()}, status=1, interpreter=PYTHON, **more
    )
    assert told.startswith("refused: ")
    assert len(told.splitlines()) == 1
    for sentence in sentences:
        assert sentence in told


@pytest.mark.skipif(not missing_controllers(), reason="this machine has all controllers")
@in_loop
async def test_a_missing_controller_is_named_unless_it_is_not_needed(state):
    with pytest.raises(JobWorkerError, match="memory") as refused:
        async with worker_on(state, without=frozenset()):
            pass
    assert "--without cpu,memory,pids,io" in str(refused.value)
    async with worker_on(state, without=frozenset(missing_controllers())) as worker:
        assert await output(worker, await start_id(worker, shell("echo hello"))) == b"hello\n"
        assert any("not enforced" in note for note in worker.notes())


@as_root
@pytest.mark.parametrize("wrapper", [NO_CGROUP, READ_ONLY_CGROUP], ids=["none", "read-only"])
def test_without_any_cgroup_the_shim_kills_what_descends_from_the_job(state, mark, wrapper):
    burrows = f"env -i {PYTHON} -c '''{BURROWS}''' {mark} & exec {PYTHON} -c '''{BURROWS}''' {mark}"
    body = f"""
        first = await start_id(worker, JobRequest("sh", ("-c", {burrows!r}), owner="alice"))
        second = await start_id(worker, JobRequest("sh", ("-c", {burrows!r} + "& while ! [ -e x ]; do :; done"), owner="bob"))
        for job in first, second:
            heard = b""
            async for chunk in worker.stream(worker.job(job)):
                heard += chunk
                if heard.count(b"deep") == 2:
                    break
            print("said", heard.count(b"deep"))
        for job in first, second:
            await worker.stop(worker.job(job))
            print(worker.status(worker.job(job)).status, worker.status(worker.job(job)).exit_code)
        print("cgroup", [note for note in worker.status(worker.job(first)).notes if "no cgroup" in note])
    """
    told = in_server(state, body, wrapper=wrapper)
    assert told.count("said 2") == told.count("STOPPED 137") == 2
    assert "there is no cgroup" in told
    assert not processes_with(mark)


@as_root
def test_without_any_cgroup_nothing_outruns_the_kill(state, mark):
    body = f"""
        for _ in range(10):
            job = await start_id(worker, JobRequest({PYTHON!r}, ("-c", {FORKS_TWICE!r}, {mark!r}), owner="alice"))
            await output(job)
            print("ended", worker.status(worker.job(job)).exit_code)
        job = await start_id(worker, JobRequest({PYTHON!r}, ("-c", {COMETS!r}), owner="alice"))
        async for chunk in worker.stream(worker.job(job)):
            break
        await worker.stop(worker.job(job))
        print(worker.status(worker.job(job)).status)
    """
    assert in_server(state, body, wrapper=NO_CGROUP) == "ended 4\n" * 10 + "STOPPED\n"
    assert not processes_with(mark)


@as_root
def test_without_any_cgroup_a_lost_shim_s_job_is_found_and_killed(state, mark):
    body = f"""
        job = await start_id(worker, JobRequest("sh", ("-c", "sleep 1000 {mark} & echo $PPID; exec sleep 1000 {mark}"),
                                 owner="alice"))
        async for chunk in worker.stream(worker.job(job)):
            os.kill(int(chunk), 9)
        print(worker.status(worker.job(job)).ending)
    """
    assert "code=255" in in_server(state, body.replace(f" {mark}", ""), wrapper=NO_CGROUP)
    assert not processes_with(mark)


def test_a_server_without_root_runs_jobs_as_itself_and_says_so(state):
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
    more = {"user": user, "group": user, "extra_groups": ()} if os.geteuid() == 0 else {}
    told = in_server(state, body, interpreter=PYTHON, **more)
    assert f"uid {user}\n" in told
    assert "the server's own user" in told
    assert "only root can run a job as 'root'" in told


def read_limits(cgroup):
    files = ("cpu.max", "memory.max", "memory.swap.max", "memory.oom.group", "pids.max", "io.max")
    return {file: text.strip() for file in files if (text := jobworker.kernel_read(f"{cgroup}/{file}"))}


@pytest.mark.controllers
@in_loop
async def test_a_job_s_limits_are_the_kernel_s_before_it_runs(state):
    async with worker_on(state, without=frozenset()) as worker:
        job = await start_id(worker, shell(WAITS, cpu=0.5, memory=64 * MIB, pids=10, io=MIB))
        limits = read_limits(worker.status(worker.job(job)).spec.cgroup)
        assert limits.pop("memory.swap.max", "0") == "0"
        disks = "\n".join(
            f"{disk.number} rbps={MIB} wbps={MIB} riops=max wiops=max" for disk in jobworker.whole_disks()
        )
        assert limits == {
            "cpu.max": "50000 100000", "memory.max": str(64 * MIB), "memory.oom.group": "1", "pids.max": "10",
            "io.max": disks,
        }  # fmt: skip
        await worker.stop(worker.job(job))


@pytest.mark.controllers
@in_loop
async def test_a_cpu_hog_is_throttled_to_its_limit(state):
    hog = "import time\nwhile time.process_time() < 0.5: pass\nprint('done', flush=True)\ntime.sleep(1000)"
    async with worker_on(state, without=frozenset()) as worker:
        job = await start_id(worker, python(hog, cpu=0.25))
        await said(worker, job, b"done")
        counted = jobworker.keyed_values(
            jobworker.kernel_read(f"{worker.status(worker.job(job)).spec.cgroup}/cpu.stat")
        )
        assert counted["nr_throttled"] > 10
        assert counted["usage_usec"] <= 1.2 * 25_000 * (counted["nr_periods"] + 1)
        await worker.stop(worker.job(job))
        assert worker.status(worker.job(job)).usage.cpu_seconds >= 0.5


@pytest.mark.controllers
@in_loop
async def test_a_memory_hog_is_killed_as_a_group_and_said_to_be_out_of_memory(state, mark):
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
async def test_a_fork_bomb_is_held_at_its_limit_and_can_be_stopped(state, mark):
    bomb = "import os, signal\nwhile True:\n  try: os.fork()\n  except OSError: os.write(1, b'held'), signal.pause()"
    async with worker_on(state, without=frozenset()) as worker:
        job = await start_id(worker, python(bomb, mark, pids=20))
        await said(worker, job, b"held")
        cgroup = worker.status(worker.job(job)).spec.cgroup
        assert int(jobworker.kernel_read(f"{cgroup}/pids.current")) <= 20
        assert jobworker.keyed_values(jobworker.kernel_read(f"{cgroup}/pids.events"))["max"] > 0
        await worker.stop(worker.job(job))
        assert ending(worker, job) == ("STOPPED", 137, "")
        assert not processes_with(mark)


@pytest.mark.controllers
@pytest.mark.skipif(not os.path.ismount("/scratch"), reason="needs /scratch, a file system on a real disk")
@in_loop
async def test_a_writer_is_held_to_its_rate(nothing_is_left):
    state = new_state(nothing_is_left, "/scratch")
    rate = 4 * MIB
    writer = (
        "import mmap, os, time\n"
        "file = os.open('file', os.O_WRONLY | os.O_CREAT | os.O_DIRECT)\n"
        f"block = mmap.mmap(-1, {MIB // 4})\n"
        "os.write(file, block)\n"
        "begin = time.monotonic()\n"
        "for _ in range(64): os.write(file, block)\n"
        "print(time.monotonic() - begin)"
    )
    async with worker_on(state, without=frozenset()) as worker:
        text, status = await result(worker, python(writer, io=rate))
        assert status.usage.written_bytes >= 16 * MIB
        assert 16 * MIB / float(text) == pytest.approx(rate, rel=0.2)


@pytest.mark.controllers
@in_loop
async def test_a_job_can_neither_raise_its_limits_nor_leave_its_cgroup(state):
    async with worker_on(state, without=frozenset()) as worker:
        job = await start_id(
            worker, shell('echo ready; while [ ! -e "$HOME/go" ]; do :; done; . "$HOME/go"; echo tried')
        )
        cgroup = worker.status(worker.job(job)).spec.cgroup
        limits = read_limits(cgroup)
        above = [os.path.dirname(cgroup), os.path.dirname(os.path.dirname(cgroup)), CgroupMount.find().point]
        tries = [f"echo max > {cgroup}/{file}" for file in limits if file != "io.max"]
        tries += [f"echo $$ > {place}/cgroup.procs" for place in (*above, f"{cgroup}/sub")]
        tries += [f"mkdir {cgroup}/sub", f"rmdir {cgroup}", f"echo 1 > {cgroup}/cgroup.kill"]
        home = Path(worker.status(worker.job(job)).spec.home)
        (home / "new").write_text("\n".join(f"({line}) 2>/dev/null && echo did {line!r}" for line in tries))
        (home / "new").chmod(0o644)
        (home / "new").rename(home / "go")
        assert await output(worker, job) == b"ready\ntried\n"
        assert ending(worker, job)[:2] == ("FINISHED", 0)


@in_loop
async def test_kernels_before_cgroup_kill_have_their_way_of_killing_all(state, mark):
    async with worker_on(state) as worker:
        if worker._tree.root is None:
            pytest.skip("this machine gives no cgroup")
        job = await start_id(worker, python(BURROWS, mark))
        await said(worker, job, b"deep")
        cgroup = Cgroup(worker.status(worker.job(job)).spec.cgroup)
        cgroup._kill_frozen()
        assert await output(worker, job) == b"deep\n"
        assert not processes_with(mark)
        assert ending(worker, job) == ("FINISHED", 137, "")


LIMITS = [  # what is asked, and what comes of it with a default of 512 MiB and a cap of 1 GiB
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


@pytest.mark.parametrize(("asked", "given"), LIMITS, ids=str)
def test_a_job_may_ask_for_less_or_for_more_up_to_the_cap(tmp_path, asked, given):
    options = WorkerOptions(tmp_path, caps=Limits(memory=1024 * MIB))
    if given is BadRequestError:
        with pytest.raises(BadRequestError, match=f"{next(iter(asked))}.*--max-"):
            jobworker.limits_of(JobRequest("true", **asked), options)
    else:
        assert jobworker.limits_of(JobRequest("true", **asked), options).memory == given


# --- 4. Output log and inotify follower ---------------------------------------------------------------
# Every follower gets every byte, whatever the others do.


@in_loop
async def test_fifty_followers_at_different_times_each_receive_the_identical_bytes(state):
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
        assert await follow(worker, job, 0) == size  # and once it has ended
        assert await output(worker, job, size + 1) == b""
        assert worker.status(worker.job(job)).output_bytes == size


@in_loop
async def test_a_follower_that_is_slow_or_vanishes_disturbs_nobody(state):
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
async def test_a_stream_is_live(state):
    async with worker_on(state) as worker:
        # A gate each: at one that is shared, the second read may meet the end of what the first was given.
        job = await start_id(
            worker, shell("mkfifo a b; echo one; read line < a; echo $line; read line < b; echo $line")
        )
        home = Path(worker.status(worker.job(job)).spec.home)
        heard = b""
        async with contextlib.aclosing(worker.stream(worker.job(job))) as chunks:
            async for chunk in chunks:
                heard += chunk
                if heard in (b"one\n", b"one\ntwo\n"):
                    assert ending(worker, job)[0] == "RUNNING"
                    gate, word = ("a", b"two\n") if heard == b"one\n" else ("b", b"three\n")
                    (home / gate).write_bytes(word)
        assert heard == b"one\ntwo\nthree\n"


@as_root
@in_loop
async def test_an_overflow_of_inotify_loses_nothing(state):
    queue = Path("/proc/sys/fs/inotify/max_queued_events")
    usual = queue.read_text()
    queue.write_text("8")
    try:
        worker = worker_on(state)
        await worker.__aenter__()
    finally:
        queue.write_text(usual)
    overflows, look = [], worker._inotify._overflowed
    worker._inotify._overflowed = lambda: (overflows.append(1), look())
    try:
        script = "echo $PPID; read line < gate; for i in 1 2 3 4 5 6 7 8; do echo $i; done; exit 5"
        (state / "home").chmod(0o755)
        jobs = [
            await start_id(worker, shell(f"mkfifo gate; {script}", owner=f"owner-{number}")) for number in range(16)
        ]
        shims = [int(await said(worker, job, b"\n")) for job in jobs]
        followers = [asyncio.create_task(output(worker, job)) for job in jobs]
        await asyncio.sleep(0)
        for job in jobs:
            (Path(worker.status(worker.job(job)).spec.home) / "gate").write_text("go\n")
        assert not all_gone(shims)  # the loop is not run meanwhile: that is what overflows
        outputs = await asyncio.gather(*followers)
        assert overflows
        for job, shim, text in zip(jobs, shims, outputs, strict=True):
            assert text == f"{shim}\n1\n2\n3\n4\n5\n6\n7\n8\n".encode()
            assert ending(worker, job) == ("FINISHED", 5, "")
        assert len(worker._inotify) == 0
    finally:
        await worker.__aexit__(None, None, None)


@in_loop
async def test_when_the_server_ends_its_streams_say_so_and_the_job_goes_on(state):
    async with worker_on(state) as worker:
        job = await start_id(worker, shell(WAITS))
        follower = asyncio.create_task(output(worker, job))
        await said(worker, job, b"ready")
        worker.begin_shutdown()
        with pytest.raises(UnavailableError, match="the job goes on"):
            await follower
    async with worker_on(state) as worker:
        assert ending(worker, job) == ("RUNNING", 0, "")
        await worker.stop(worker.job(job))


# --- 5. Launcher and shim -----------------------------------------------------------------------------
# The record; what a job is given; that all of it dies; that the small processes may die.

RECORD = [
    ("born", {}),
    ("started", {}),
    ("exited", {"status": "STOPPED", "code": 137, "signal": 9, "reason": "", "by": "al%69."}),
    ("done", {"reason": "", "cpu_seconds": 0.25, "memory_peak": None, "read_bytes": 0, "written_bytes": 7}),
]


def a_spec(**changes):
    account = jobworker.Account.of_server()
    return dataclasses.replace(jobworker.Spec(
        id=ID, owner="alice", command="sh", args=("-c", "exit 7"), uid=account.uid, gid=account.gid, groups=(),
        user=account.name, home="/", cgroup="", controllers=(), limits=Limits(), timeout=0.0, max_output=MIB,
        reserve=0, splice=True, created=1.0,
    ), **changes)  # fmt: skip


def events_of(folder, lines, cut=None):
    descriptor = os.open(folder / "events", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    for word, facts in lines:
        jobworker.write_event(descriptor, word, **facts)
    size = os.fstat(descriptor).st_size
    os.truncate(descriptor, size if cut is None else cut)
    os.close(descriptor)
    return size


@pytest.mark.parametrize(("waiting", "shared"), [(80, True), (8192, False)])
def test_only_what_leaves_room_in_the_pipe_waits_for_more(tmp_path, waiting, shared):
    """A small pipe that is full holds its writer up: many users' jobs have small ones (pipe(7))."""
    pipe, writer = os.pipe()
    output = os.open(tmp_path / "output", os.O_WRONLY | os.O_CREAT)
    try:
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 8192)
        pump = jobworker.Pump(pipe, output, a_spec(max_output=MIB))
        os.write(writer, bytes(waiting))
        assert pump.move() is None
        assert pump.small_batch == shared
    finally:
        for descriptor in (pipe, writer, output):
            os.close(descriptor)


def test_a_record_may_grow_by_finishers_that_fail(tmp_path):
    events_of(tmp_path, RECORD[:-1])
    with (tmp_path / "events").open("ab") as file:
        file.write(b"crashed KernelError cannot remove it\n" * 2000)
        file.write(b"done at=2.0 reason= cpu_seconds=None memory_peak=None read_bytes=None written_bytes=None .\n")
    assert jobworker.JobFolder(str(tmp_path)).read_events().phase == "done"


def test_a_wish_that_comes_as_the_shim_ends_is_no_error(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "control")
    reader = os.open(tmp_path / "control", os.O_RDONLY | os.O_NONBLOCK)
    monkeypatch.setattr(
        jobworker.StopRequest, "to_line", lambda _: os.close(reader) or b"name"
    )  # between its open and its write
    assert jobworker.JobFolder(str(tmp_path)).send_stop(jobworker.StopRequest(by="name")) is False


def test_a_record_cut_anywhere_is_the_record_of_its_whole_lines(tmp_path):
    size = events_of(tmp_path, RECORD)
    text = (tmp_path / "events").read_bytes()
    for cut in range(size + 1):
        (tmp_path / "events").write_bytes(text[:cut])
        events = jobworker.JobFolder(str(tmp_path)).read_events()
        # A line without its line end is whole too: its dot is its last word.
        whole = len(re.findall(rb" \.(\n|$)", text[:cut]))
        assert events.phase == ["", "born", "started", "exited", "done"][whole]
        assert (events.ending is not None) == (whole >= 3)
    assert events.ending == jobworker.Ending("STOPPED", 137, 9, "", "al%69.")
    assert events.usage == jobworker.Usage(0.25, None, 0, 7)


@settings(deadline=None)
@given(
    st.integers(0, 255), st.sampled_from(["", "OOM", "TIMEOUT"]), st.text(), st.integers(0, 200), st.binary(max_size=40)
)
def test_what_is_torn_in_a_record_never_counts(code, reason, by, kept, rubbish):
    with tempfile.TemporaryDirectory() as folder:
        exited = {"status": "FINISHED", "code": code, "signal": 0, "reason": reason, "by": jobworker.encode_name(by)}
        events_of(Path(folder), [("born", {}), ("started", {}), ("exited", exited)])
        with open(f"{folder}/events", "r+b") as file:
            whole = file.read()
            kept = min(kept, len(whole))
            file.truncate(kept)
            file.seek(kept)
            file.write(b"\n" + rubbish.replace(b".", b"") + b"\n")
        events = jobworker.JobFolder(str(folder)).read_events()
        lines = whole[:kept].count(b" .\n") + (whole[kept - 2 : kept] == b" .")
        assert events.phase == ["", "born", "started", "exited"][lines]
        if events.phase == "exited":
            assert events.ending == jobworker.Ending("FINISHED", code, 0, reason, jobworker.encode_name(by).strip("-"))


@given(st.text())
def test_a_name_of_any_characters_is_one_word_and_comes_back(name):
    word = jobworker.encode_name(name)
    assert jobworker.decode_name(word) == name
    assert re.fullmatch(r"[0-9A-Za-z%.]*", word)


RECORD_LINES = [  # lines, and the phase that they make
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


@pytest.mark.parametrize(("text", "phase"), RECORD_LINES)
def test_only_what_may_follow_counts_in_a_record(tmp_path, text, phase):
    (tmp_path / "events").write_text(text, "latin-1")
    assert jobworker.JobFolder(str(tmp_path)).read_events().phase == phase


@in_loop
async def test_a_job_that_forks_twice_at_once_and_exits_leaves_no_process(state, mark):
    async with worker_on(state) as worker:
        for _ in range(10):
            _, status = await result(worker, python(FORKS_TWICE, mark))
            assert (status.status, status.exit_code) == ("FINISHED", 4)
            assert not processes_with(mark)
            assert not jobs_cgroups(state)


@in_loop
async def test_stop_kills_grandchildren_that_ignore_signals_and_changed_session(state, mark):
    async with worker_on(state) as worker:
        job = await start_id(worker, python(BURROWS, mark))
        await said(worker, job, b"deep")
        assert len(processes_with(mark)) == 3
        await worker.stop(worker.job(job), by="bob the builder")
        assert not processes_with(mark)
        assert ending(worker, job) == ("STOPPED", 137, "")
        assert worker.status(worker.job(job)).stopped_by == "bob the builder"


@in_loop
async def test_a_fork_storm_cannot_outrun_the_kill(state, mark):
    async with worker_on(state) as worker:
        job = await start_id(worker, python(COMETS, mark))
        await said(worker, job, b"storm")
        await worker.stop(worker.job(job))
        assert not processes_with(mark)
        assert not jobs_cgroups(state)


OUTPUTS = [  # a command, and all that must arrive
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
async def test_what_a_child_wrote_after_its_parent_s_end_is_kept(state):
    # The child says each number before it notes it in a file; so whatever is noted must have arrived.
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
async def test_no_job_can_touch_its_own_record_output_or_shim(state):
    tries = [
        "kill -9 $PPID", "kill -STOP $PPID", "cat $STATE/jobs/$ID/job.json", "ls $STATE/jobs", "ls $STATE",
        ": > $STATE/jobs/$ID/output", "rm -f $STATE/jobs/$ID/output && [ ! -d $STATE/jobs/$ID ]",
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
async def test_a_job_holds_descriptors_0_1_and_2_and_no_other(state):
    program = "import os\nfor n in range(3000):\n  try: os.fstat(n); print(n, os.readlink(f'/proc/self/fd/{n}'))\n  except OSError: 0"
    async with worker_on(state) as worker:
        jobs = await asyncio.gather(
            *(start_id(worker, python(program)) for _ in range(16))
        )  # many on their way at once
        for job in jobs:
            lines = [line.split(" ") for line in (await output(worker, job)).decode().splitlines()]
            assert [number for number, _ in lines] == ["0", "1", "2"]
            assert lines[0][1] == "/dev/null"
            assert lines[1][1].startswith("pipe:")
            assert lines[2][1] == lines[1][1]


@in_loop
async def test_a_job_s_environment_is_a_small_one_of_its_own(state, monkeypatch):
    monkeypatch.setenv("SECRET", "the server's")
    async with worker_on(state) as worker:
        text, status = await result(worker, JobRequest("env", owner="alice"))
        assert dict(line.split("=", 1) for line in text.decode().splitlines()) == {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": status.spec.home, "USER": status.spec.user, "LANG": "C.UTF-8", "PYTHONUNBUFFERED": "1",
            "JOBWORKER_JOB_ID": status.spec.id,
        }  # fmt: skip


def test_a_job_s_signals_limits_and_session_are_the_defaults_whatever_the_server_s(state):
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

    def spoil():
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 4096))
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD):
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGQUIT])
        os.umask(0o077)
        Path("/proc/self/oom_score_adj").write_text("500")

    told = in_server(state, body, preexec_fn=spoil)
    assert "b'256\\n0022\\n'" in told
    zeros = "0" * 16
    expected = f"256\n0022\n0\nSigBlk:\t{zeros}\nSigIgn:\t{zeros}\n"
    assert expected in told
    assert "own session True" in told


@as_root
@in_loop
async def test_a_killed_launcher_is_replaced_and_the_next_start_works(state):
    async with worker_on(state) as worker:
        before = await start_id(worker, shell(WAITS))
        for _ in range(2):
            os.kill(worker._launcher.process, signal.SIGKILL)
            assert (await result(worker, shell("echo hello")))[0] == b"hello\n"
        assert ending(worker, before) == ("RUNNING", 0, "")
        await worker.stop(worker.job(before))


@in_loop
async def test_a_launcher_killed_with_starts_in_hand_costs_no_job(state):
    async with worker_on(state) as worker:
        os.kill(worker._launcher.process, signal.SIGSTOP)
        starts = [asyncio.create_task(start_id(worker, shell(f"echo {number}"))) for number in range(5)]
        while worker.running < 5:
            await asyncio.sleep(0)
        os.kill(worker._launcher.process, signal.SIGKILL)
        jobs = await asyncio.gather(*starts)
        assert [await output(worker, job) for job in jobs] == [b"%d\n" % number for number in range(5)]


@in_loop
async def test_a_killed_shim_is_one_lost_job_and_nothing_else(state, mark, capfd):
    async with worker_on(state) as worker:
        jobs = [await start_id(worker, shell(f"echo $PPID; sh -c 'sleep 1000; : {mark}' & wait")) for _ in range(3)]
        shims = [int(await said(worker, job, b"\n")) for job in jobs]
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
async def test_a_hundred_starts_at_once_all_start(state):
    async with worker_on(state) as worker:
        jobs = await asyncio.gather(*(start_id(worker, shell(f"echo {number}")) for number in range(100)))
        assert [await output(worker, job) for job in jobs] == [b"%d\n" % number for number in range(100)]


ENDED_BY = [  # options, request, script; how it ends; bytes of output (None: whatever)
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


@pytest.mark.parametrize(("options", "request_", "script", "how", "size"), ENDED_BY)
@in_loop
async def test_limits_of_time_and_output_end_a_job_exactly_there(state, options, request_, script, how, size):
    async with worker_on(state, **options) as worker:
        job = await start_id(worker, shell(script, **request_))
        text = await output(worker, job)
        assert ending(worker, job) == how
        assert size is None or len(text) == size == worker.status(worker.job(job)).output_bytes
        assert not jobs_cgroups(state)


@in_loop
async def test_a_job_that_ends_by_itself_with_more_than_its_cap_in_the_pipe_is_finished(state):
    # The shim is stopped while the job writes and ends: so all of it is in the pipe when the shim looks.
    script = "echo $PPID; kill -STOP $$; head -c 60000 /dev/zero; exit 6"
    async with worker_on(state, max_output=50_000) as worker:
        job = await start_id(worker, shell(script))
        shim = int(await said(worker, job, b"\n"))
        (main,) = children(shim)
        os.kill(shim, signal.SIGSTOP)
        while jobworker.kernel_read(f"/proc/{main}/stat").rpartition(")")[2].split()[0] != "Z":
            os.kill(main, signal.SIGCONT)
            await asyncio.sleep(0.01)
        os.kill(shim, signal.SIGCONT)
        text = await output(worker, job)
        assert ending(worker, job) == ("FINISHED", 6, "OUTPUT_LIMIT")
        assert len(text) == 50_000


def test_limits_hold_while_no_server_lives(state):
    body = f"""
        await start_id(worker, JobRequest("yes", owner="alice", id={ID!r}, max_output=2_000_001))
        await start_id(worker, JobRequest("sleep", ("1000",), owner="alice", id={ID2!r}, timeout=1.0))
        os.kill(os.getpid(), 9)
    """
    in_server(state, body, status=-9)
    wait_for_orphans()  # the shims: nobody else is there to end the jobs

    @in_loop
    async def look():
        async with worker_on(state) as worker:
            assert ending(worker, ID) == ("STOPPED", 137, "OUTPUT_LIMIT")
            assert worker.status(worker.job(ID)).output_bytes == 2_000_001
            assert ending(worker, ID2) == ("STOPPED", 137, "TIMEOUT")

    look()


# --- 6. Job and job table -----------------------------------------------------------------------------
# The public face of the library; what survives what.


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
    """A folder of things that are not quite programs, which every user can reach."""
    with tempfile.TemporaryDirectory(prefix="jobworker-programs-") as folder:
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


REFUSED = [  # command ({}: the folder of programs), arguments, what the sentence says
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


@pytest.mark.parametrize(("command", "args", "sentence"), REFUSED, ids=[repr(c)[:20] + s[:20] for c, _, s in REFUSED])
@in_loop
async def test_what_cannot_run_is_refused_in_a_sentence_and_leaves_nothing(state, programs, command, args, sentence):
    async with worker_on(state) as worker:
        with pytest.raises(BadRequestError, match=sentence) as refused:
            await start_id(worker, JobRequest(command.format(programs), args, owner="alice"))
        assert len(str(refused.value).splitlines()) == 1
        assert left_in(state) == []
        assert not jobs_cgroups(state)
        assert worker.running == len(worker._table) == len(worker._inotify) == 0


RUN = [  # command, arguments, output
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


@pytest.mark.parametrize(("command", "args", "expected"), RUN, ids=[repr(row[0])[:20] for row in RUN])
@in_loop
async def test_odd_words_reach_the_command_as_they_are(state, programs, command, args, expected):
    async with worker_on(state) as worker:
        text, status = await result(worker, JobRequest(command.format(programs), args, owner="alice"))
        assert (text, status.exit_code) == (expected.replace(b"{}", programs.encode()), 0)
    async with worker_on(state) as worker:  # and they are remembered
        assert worker.status(worker.job(status.spec.id)).spec == status.spec


@pytest.mark.parametrize(
    "job_id", ["x", ID.upper(), ID.replace("-", ""), ID + "\n", "../" + ID, ID.replace("-4", "-1")]
)
@in_loop
async def test_an_id_that_is_no_lower_case_random_uuid_is_refused(state, job_id):
    async with worker_on(state) as worker:
        with pytest.raises(BadRequestError, match="not a job id"):
            await start_id(worker, shell("true", id=job_id))
        assert left_in(state) == []


@in_loop
async def test_asking_twice_with_one_id_is_asking_once(state):
    async with worker_on(state) as worker:
        requests = [shell("echo hello; exec sleep 1000", id=ID)] * 3
        assert await asyncio.gather(*(start_id(worker, request) for request in requests)) == [ID] * 3
        assert left_in(state) == [ID]
        for other in (shell("echo hello; exec sleep 1000", id=ID, owner="bob"), shell("echo bye", id=ID)):
            with pytest.raises(IdTakenError):
                await start_id(worker, other)
        await said(worker, ID, b"hello")
        await worker.stop(worker.job(ID))
        assert await start_id(worker, requests[0]) == ID
    async with worker_on(state) as worker:
        assert await start_id(worker, requests[0]) == ID
        assert await output(worker, ID) == b"hello\n"
        assert ending(worker, ID)[0] == "STOPPED"
        with pytest.raises(BadRequestError):
            await start_id(worker, JobRequest("no-such-command", owner="alice", id=ID2))
        assert await start_id(worker, shell("true", id=ID2)) == ID2  # what never ran does not take an id


@in_loop
async def test_an_id_that_was_forgotten_is_free_for_another_owner_and_command(state):
    async with worker_on(state) as worker:
        for owner, word in (("alice", "hers"), ("bob", "his")):
            assert await start_id(worker, shell(f"echo {word}", id=ID, owner=owner)) == ID
            assert await output(worker, ID) == f"{word}\n".encode()
            spec = worker.status(worker.job(ID)).spec
            assert (spec.owner, spec.args) == (owner, ("-c", f"echo {word}"))
            worker.remove(worker.job(ID))


@in_loop
async def test_an_unknown_job_is_no_such_job_to_every_call(state):
    async with worker_on(state) as worker:
        with pytest.raises(NoSuchJobError, match=ID):
            worker.job(ID)
        with pytest.raises(NoSuchJobError):
            await worker.stop(worker.job(ID))
        with pytest.raises(NoSuchJobError):
            await output(worker, ID)


@in_loop
async def test_stopping_twice_or_what_has_ended_changes_nothing(state):
    async with worker_on(state) as worker:
        job = await start_id(worker, shell(WAITS))
        await asyncio.gather(*(worker.stop(worker.job(job), by=f"user {n}") for n in range(5)))
        first = worker.status(worker.job(job))
        await worker.stop(worker.job(job), by="late")
        assert worker.status(worker.job(job)) == first
        assert first.status == "STOPPED"
        ended = await start_id(worker, shell("exit 3"))
        await output(worker, ended)
        await worker.stop(worker.job(ended), by="late")
        assert ending(worker, ended) == ("FINISHED", 3, "")
        assert worker.status(worker.job(ended)).stopped_by == ""


@in_loop
async def test_a_stop_that_races_the_end_leaves_one_of_the_two_and_for_good(state):
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
async def test_a_job_that_ends_itself_by_the_kill_signal_before_a_stop_is_finished(state):
    async with worker_on(state) as worker:
        job = await start_id(worker, shell("kill -9 $$"))
        await output(worker, job)
        await worker.stop(worker.job(job))
        assert ending(worker, job) == ("FINISHED", 137, "")
        assert worker.status(worker.job(job)).ending.signal == 9


@as_root
@in_loop
async def test_each_owner_has_a_uid_and_a_private_home_for_good(state):
    look = "id -u; id -G; pwd; stat -c %a .; touch mine"
    homes = {}
    for _ in range(2):
        async with worker_on(state) as worker:
            for owner in ("alice", "bob", "../eve", "", "ünï\r\ncödé", "ünï\ncödé"):
                text, status = await result(worker, shell(look, owner=owner))
                uid, groups, place, mode = text.decode().splitlines()
                assert uid == groups == str(status.spec.uid)
                assert int(uid) >= 1000
                assert place == status.spec.home == str(state / "home" / uid)
                assert mode == "700"
                assert homes.setdefault(owner, place) == place
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
async def test_more_jobs_than_allowed_are_refused_until_one_ends(state):
    async with worker_on(state, max_jobs=1) as worker:
        job = await start_id(worker, shell(WAITS))
        with pytest.raises(ExhaustedError, match="1 jobs are running"):
            await start_id(worker, shell("true"))
        await worker.stop(worker.job(job))
        assert (await result(worker, shell("exit 2")))[1].exit_code == 2


@in_loop
async def test_an_ended_job_can_be_removed_and_a_running_one_not(state):
    async with worker_on(state) as worker:
        job = await start_id(worker, shell(WAITS))
        with pytest.raises(StillRunningError):
            worker.remove(worker.job(job))
        await said(worker, job, b"ready")
        await worker.stop(worker.job(job))
        stream = worker.stream(worker.job(job))
        assert await anext(stream) == b"ready\n"
        worker.remove(worker.job(job))
        assert left_in(state) == []
        with pytest.raises(NoSuchJobError):
            worker.status(worker.job(job))
        assert [chunk async for chunk in stream] == []


@in_loop
async def test_the_oldest_are_forgotten_when_there_is_no_room_but_an_open_stream_completes(state):
    async with worker_on(state, keep_bytes=2 * MIB) as worker:
        jobs = []
        for number in range(3):
            jobs.append(await start_id(worker, python(WRITES_BYTES, str(900 * KIB))))
            if number == 0:
                stream = worker.stream(worker.job(jobs[0]))
                first = await anext(stream)
            await output(worker, jobs[-1])
        await forgotten(worker, jobs[0])
        assert left_in(state) == sorted(jobs[1:])
        assert first + b"".join([chunk async for chunk in stream]) == random.Random(7).randbytes(900 * KIB)
        worker.remove(worker.job(jobs[2]))
        jobs.append(await start_id(worker, python(WRITES_BYTES, str(900 * KIB))))
        await output(worker, jobs[-1])
        assert left_in(state) == sorted([jobs[1], jobs[3]])  # there was room


@in_loop
async def test_ended_jobs_are_forgotten_after_their_time_also_by_a_later_server(state):
    async with worker_on(state) as worker:
        running = await start_id(worker, shell(WAITS))
        for _ in range(3):
            await result(worker, shell("echo hello"))
    async with worker_on(state, keep=0.001) as worker:
        await forgotten(worker, worker._retention.oldest().id)
        job = await start_id(worker, shell("true"))
        await forgotten(worker, job)
        assert left_in(state) == [running]
        await worker.stop(worker.job(running))
        await forgotten(worker, running)
        assert left_in(state) == []


@in_loop
async def test_two_hundred_jobs_leave_nothing_behind_in_the_server(state):
    def held(worker):
        assert not all_gone(children(worker._launcher.process))
        assert children() - EARLIER == {worker._launcher.process}
        return len(os.listdir("/proc/self/fd")), len(worker._inotify), threading.active_count(), jobs_cgroups(state)

    async with worker_on(state) as worker:
        await result(worker, shell("true"))
        before = held(worker)
        for _ in range(10):
            results = await asyncio.gather(*(result(worker, shell("echo hello; exit 9")) for _ in range(20)))
            assert {(text, status.exit_code) for text, status in results} == {(b"hello\n", 9)}
        assert held(worker) == before
        assert before[1:] == (0, 1, [])


# What a restart keeps


@in_loop
async def test_a_server_that_starts_again_takes_everything_up(state):
    gate = state / "gate"
    os.mkfifo(gate)
    gate.chmod(0o666)
    async with worker_on(state) as worker:
        running = await start_id(worker, shell(f"echo one; read line < {gate}; echo two; exit 6"))
        stopped = await start_id(worker, shell(WAITS))
        ended, status = await result(worker, shell("echo bye; exit 3"))
        await said(worker, running, b"one")
    async with worker_on(state) as worker:
        assert worker.status(worker.job(status.spec.id)) == status
        assert await output(worker, status.spec.id) == ended == b"bye\n"
        assert ending(worker, running) == ("RUNNING", 0, "")
        assert worker.running == 2
        follower = asyncio.create_task(output(worker, running))
        await said(worker, stopped, b"ready")
        await worker.stop(worker.job(stopped))
        assert ending(worker, stopped) == ("STOPPED", 137, "")
        gate.write_text("go\n")
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
    async def look():
        async with worker_on(state) as worker:
            for job in (ID, ID2):
                await said(worker, job, b"ready")
            await worker.stop(worker.job(ID), by="me")
            os.kill(worker._launcher.process, 9)
            await worker.stop(worker.job(ID2), by="me")
            assert [ending(worker, job) for job in (ID, ID2)] == [("STOPPED", 137, "")] * 2
            assert not processes_with(mark)

    look()


@in_loop
async def test_a_second_server_on_one_state_folder_is_refused_by_the_first_s_pid(state):
    async with worker_on(state) as worker:
        job = await start_id(worker, shell(WAITS))
        with pytest.raises(JobWorkerError, match=f"in use by the server with pid {os.getpid()}"):
            async with worker_on(state):
                pass
        assert ending(worker, job)[0] == "RUNNING"
        await worker.stop(worker.job(job))
    async with worker_on(state):
        pass


def fabricate(state, job_id, record, spec="whole"):
    """A job's folder as a crash might have left it."""
    folder = state / "jobs" / job_id
    folder.mkdir(parents=True)
    if record is None:
        return folder
    with contextlib.ExitStack() as handed:
        jobworker.JobFolder(str(folder)).create_files(handed)
    (folder / "events").write_bytes(record)
    (folder / "output").write_text("said\n")
    jobworker.JobFolder(str(folder)).write_spec(a_spec(id=job_id).to_json())
    text = (folder / "job.json").read_text()
    if spec == "torn":
        (folder / "job.json").write_text(text[: len(text) // 2])
    elif spec == "none":
        (folder / "job.json").unlink()
    elif spec == "newer":
        newer = {**json.loads(text), "colour": "red", "limits": {**json.loads(text)["limits"], "gpu": 1}}
        (folder / "job.json").write_text(json.dumps(newer))
    elif spec == "strange":
        (folder / "job.json").write_text(json.dumps({**json.loads(text), "limits": 7}))
    return folder


BORN = b"born at=1.0 .\n"
STARTED = BORN + b"started at=2.0 .\n"
ENDED = STARTED + b"exited at=3.0 status=FINISHED code=7 signal=0 reason=- by=- .\n"
DONE = ENDED + b"done at=4.0 reason=- cpu_seconds=1.5 memory_peak=None read_bytes=0 written_bytes=0 .\n"
GONE, QUARANTINE = "gone", "quarantine"
FATES = [  # record, job.json; what becomes of the job when its shim is gone
    (None, "none", GONE),
    (b"", "none", GONE),
    (b"", "torn", GONE),
    (b"", "whole", GONE),
    (b"bo", "whole", GONE),
    (BORN + b"failed at=1.0 errno=2 .\n", "whole", GONE),
    (BORN, "none", QUARANTINE),
    (STARTED, "torn", QUARANTINE),
    (ENDED, "strange", QUARANTINE),
    (BORN, "whole", ("FINISHED", 255, "LOST")),
    (STARTED, "whole", ("FINISHED", 255, "LOST")),
    (ENDED[:-2], "whole", ("FINISHED", 255, "LOST")),
    (STARTED + bytes(100), "whole", ("FINISHED", 255, "LOST")),
    (ENDED, "whole", ("FINISHED", 7, "")),
    (DONE[:-10], "whole", ("FINISHED", 7, "")),
    (DONE, "whole", ("FINISHED", 7, "")),
    (DONE, "newer", ("FINISHED", 7, "")),  # a later version wrote it, and this one took over again
    (STARTED, "newer", ("FINISHED", 255, "LOST")),
]


@pytest.mark.parametrize(("record", "spec", "fate"), FATES, ids=[f"{(r or b'')[-9:]}-{o}-{f}" for r, o, f in FATES])
@in_loop
async def test_what_a_crash_left_of_a_job_has_its_fate(state, capfd, record, spec, fate):
    folder = fabricate(state, ID, record, spec)
    for _ in range(2):  # and a second server finds the same
        async with worker_on(state, keep=0.0) as worker:
            if isinstance(fate, str):
                await forgotten(worker, ID)
                assert not folder.exists()
                assert len(list(state.glob("quarantine/*"))) == (fate == QUARANTINE)
            else:
                assert await output(worker, ID) == b"said\n"
                assert ending(worker, ID) == fate
            assert (await result(worker, shell("echo hello")))[0] == b"hello\n"
    # One line for what is set aside or lost without an ending, and silence for the rest.
    assert len(capfd.readouterr().err.splitlines()) == (fate == QUARANTINE or fate[-1] == "LOST")


@in_loop
async def test_strangers_in_the_folder_of_jobs_are_set_aside(state):
    (state / "jobs" / "lost+found").mkdir(parents=True)
    (state / "jobs" / "notes.txt").write_text("hello")
    (state / "jobs" / ID).write_text("not a folder")
    async with worker_on(state):
        assert left_in(state) == []
        assert len(list(state.glob("quarantine/*"))) == 3


@in_loop
async def test_hundreds_of_lost_jobs_are_all_finished(state):
    ids = [jobworker.new_job_id() for _ in range(200)]
    for job in ids:
        fabricate(state, job, STARTED)
    async with worker_on(state) as worker:
        assert (await result(worker, shell("echo hello")))[0] == b"hello\n"
        assert await asyncio.gather(*(output(worker, job) for job in ids)) == [b"said\n"] * 200
        assert {ending(worker, job) for job in ids} == {("FINISHED", 255, "LOST")}


# What dies at each step

FIRST = "echo said; exit 7" if os.geteuid() else "[ -w . ] && echo said; exit 7"  # served by root, its home is its own
SERVER_DEATHS = [  # the statement before which the server dies; last words; whether the job is there afterwards
    ("new.rename(self._owners / str(uid))", "pass", False),
    ("self._uids[owner] = uid", "pass", False),  # the owner has a uid
    ("if os.stat(home).st_uid != uid:", "pass", False),  # and a home, which is still the server's
    ("undo.callback(self._delete, job)", "pass", False),  # the folder is made
    ('os.mkfifo(f"{self.path}/control", 0o600)', "pass", False),
    ('for name in ("output", "events"):', "pass", False),  # and control
    ('os.close(os.open(f"{self.path}/{name}"', "pass", False),  # and output
    ("allocate(descriptors[1], EVENTS_BYTES)", "pass", False),  # and exit
    ("job.folder.write_spec(text)", "pass", False),
    ("file.write(text)", "file.write(b'{'); file.flush()", False),
    ("self._watch(job)\n                descriptors +=", "pass", False),  # job.json is whole
    ("owner.create()", "pass", False),
    ("cgroup.create()\n        cgroup.limit", "pass", False),
    ("cgroup.limit(limits, self.controllers, self.disks)", "pass", False),  # the cgroup is made
    ('self._launcher.send("start", job.folder, text, descriptors)', "pass", False),
    ("socket.send_fds(self._channel, [packet], list(descriptors))", "pass", False),
    ("undo.pop_all()", "pass", True),  # the launcher has it
    ("await self._until(job, lambda: job.events.phase not in", "pass", True),
    ('return job.events.phase != ""', "pass", True),
]
FAILED_START_DEATHS = [  # the same, for a command that is not there
    ('write_event(self._events, "failed"', "pass", None),  # in the shim: the server starts it once more
    ("spec.processes().remove()", "pass", False),
    ("job.folder.delete()", "pass", False),
    ("for name in self.FILES:", "pass", False),
    ("os.rmdir(self.path)\n\n\ndef receive_stop", "pass", False),
    ("raise start_failure(job.events.failure, job.spec)", "pass", False),
]


def server_dies(state, tmp_path, place, last_words, command, args=()):
    _, armed = dying_copy(tmp_path, place, last_words)
    body = f"await start_id(worker, JobRequest({command!r}, {args!r}, owner='alice', id={ID!r}))"
    in_server(state, body, module=tmp_path, status=-9)
    assert not armed.exists()


@pytest.mark.parametrize(("place", "last_words", "there"), SERVER_DEATHS, ids=[row[0][:40] for row in SERVER_DEATHS])
def test_a_server_killed_at_any_step_of_a_start_leaves_the_job_or_nothing(state, tmp_path, place, last_words, there):
    if os.geteuid() != 0 and re.search("owner|home|cgroup", place):
        pytest.skip("needs root: uids of owners, and a cgroup")
    server_dies(state, tmp_path, place, last_words, "sh", ("-c", FIRST))

    @in_loop
    async def look():
        async with worker_on(state) as worker:
            if there:
                assert await output(worker, ID) == b"said\n"
                assert ending(worker, ID) == ("FINISHED", 7, "")
            else:
                assert left_in(state) == []
                assert not jobs_cgroups(state)
                assert not (state / "quarantine").exists()
            job = await start_id(worker, shell(FIRST, id=ID))  # the caller tries again
            assert await output(worker, job) == b"said\n"
            assert ending(worker, job) == ("FINISHED", 7, "")

    look()


@pytest.mark.parametrize(("place", "last_words", "there"), FAILED_START_DEATHS[1:], ids=lambda value: str(value)[:40])
def test_a_server_killed_at_any_step_of_a_failed_start_leaves_nothing(state, tmp_path, place, last_words, there):
    server_dies(state, tmp_path, place, last_words, "no-such-command")

    @in_loop
    async def look():
        async with worker_on(state):
            assert left_in(state) == []
            assert not jobs_cgroups(state)
            assert not (state / "quarantine").exists()

    look()


LOST, SEVEN = ("FINISHED", 255, "LOST"), ("FINISHED", 7, "")
SHIM_DEATHS = [  # the statement before which the shim dies; last words; how the job then ended
    ('write_event(self._events, "born")', "pass", SEVEN),  # it is started once more
    ('write_event(self._events, "born")', "os.write(self._events, b'bor')", SEVEN),
    ("output = self._folder.open_output()", "pass", LOST),
    ("os.close(stdout)\n        if not self._spec.cgroup", "pass", LOST),  # the job runs
    ('write_event(self._events, "started")', "pass", LOST),
    ("pump = Pump(pipe, output, self._spec)", "pass", LOST),
    ("reported = {descriptor for descriptor, _ in", "pass", LOST),
    ("ready = {descriptor for descriptor, _ in", "pass", LOST),
    ("result = os.waitid(os.P_PID, process, os.WEXITED)", "pass", LOST),
    ("assert result is not None", "pass", LOST),
    ('write_event(self._events, "exited", **vars(ending))', "pass", LOST),
    (
        'write_event(self._events, "exited", **vars(ending))',
        "os.write(self._events, b'exited at=1.0 status=FIN')",
        LOST,
    ),
    ("processes.kill_all()", "pass", SEVEN),
    ("rest = pump.drain() if pump else None", "pass", SEVEN),
    ("usage = processes.usage()", "pass", SEVEN),
    ("processes.remove()\n    reason", "pass", SEVEN),
    ("reason = ending.reason or", "pass", SEVEN),
    ('write_event(events, "done"', "pass", SEVEN),
    ('write_event(events, "done"', "os.write(events, b'done at=1.0 reason=-')", SEVEN),
    ("os.fsync(events)", "pass", SEVEN),
]


@pytest.mark.parametrize(("place", "last_words", "how"), SHIM_DEATHS, ids=[row[0][:40] for row in SHIM_DEATHS])
@in_loop
async def test_a_shim_killed_at_any_step_is_made_good(state, tmp_path, mark, place, last_words, how):
    dying, armed = dying_copy(tmp_path, place, last_words)
    async with worker_on(state, dying) as worker:
        request = dying.JobRequest(
            "sh", ("-c", f"sleep 1000 {mark} & echo said; exit 7".replace(f" {mark}", "")), owner="alice"
        )
        job = await start_id(worker, request)
        text = await output(worker, job)
        assert not armed.exists()
        assert ending(worker, job) == how
        assert text == b"said\n" or how == LOST
        before = worker.status(worker.job(job))
        assert not jobs_cgroups(state)
    wait_for_orphans()
    async with worker_on(state) as worker:
        assert ending(worker, job) == how
        assert worker.status(worker.job(job)).ended == before.ended
        assert await output(worker, job) == text


@in_loop
async def test_a_shim_killed_before_it_says_that_a_start_failed_is_made_good(state, tmp_path):
    dying, armed = dying_copy(tmp_path, *FAILED_START_DEATHS[0][:2])
    async with worker_on(state, dying) as worker:
        job = await start_id(worker, dying.JobRequest("no-such-command", owner="alice"))
        await output(worker, job)
        assert not armed.exists()
        assert ending(worker, job) == LOST  # `born`: the command may have run


WITHOUT_PYTHON = [  # a job; what is done to it; how it ends
    ("echo said; exec sleep 1000", {}, "stop", ("STOPPED", 137, "")),
    ("echo said; exec sleep 1000", {}, "lose", LOST),
    ("echo said; exec yes", {"max_output": 100_000}, "", ("STOPPED", 137, "OUTPUT_LIMIT")),
    ("echo said; exec sleep 1000", {"timeout": 0.2}, "", ("STOPPED", 137, "TIMEOUT")),
    ("echo said; sleep 1000 & exit 3", {}, "", ("FINISHED", 3, "")),
]


@pytest.mark.parametrize("cgroup", [True, False], ids=["cgroup", "no cgroup"])
@pytest.mark.parametrize(("script", "limits", "deed", "how"), WITHOUT_PYTHON)
@in_loop
async def test_a_python_that_was_removed_meanwhile_keeps_no_job_from_its_end(
    state, tmp_path, monkeypatch, cgroup, script, limits, deed, how
):
    bare = altered_copy(tmp_path, "gc.freeze()  # a collection", "sys.path.clear(); sys.meta_path.clear()")
    if not cgroup:
        monkeypatch.setattr(bare.CgroupMount, "find", classmethod(lambda _class: None))
    async with worker_on(state, bare) as worker:
        job = await start_id(worker, bare.JobRequest("sh", ("-c", f"echo $PPID; {script}"), owner="alice", **limits))
        shim = int((await said(worker, job, b"said")).split()[0])
        if deed == "lose":
            os.kill(shim, signal.SIGKILL)
        if deed == "stop":
            await worker.stop(worker.job(job))
        await output(worker, job)
        assert ending(worker, job) == how


@in_loop
async def test_a_launcher_of_another_version_starts_and_finishes_jobs(state, monkeypatch):
    async with worker_on(state) as worker:
        to_json = jobworker.Spec.to_json

        def newer(spec):
            return json.dumps({"colour": "red", **json.loads(to_json(spec))}).encode()

        monkeypatch.setattr(jobworker.Spec, "to_json", newer)
        job = await start_id(worker, shell("echo $PPID; exec sleep 1000"))
        os.kill(int(await said(worker, job, b"\n")), signal.SIGKILL)
        await output(worker, job)
        assert ending(worker, job) == LOST


@in_loop
async def test_many_stops_of_a_lost_job_send_one_finisher(state, capfd):
    async with worker_on(state) as worker:
        jobs = [await start_id(worker, shell("echo $PPID; exec sleep 1000")) for _ in range(20)]
        shims = [int(await said(worker, job, b"\n")) for job in jobs]
        for shim in shims:
            os.kill(shim, signal.SIGKILL)
        await asyncio.gather(*(worker.stop(worker.job(job)) for job in jobs for _ in range(6)))
        assert {ending(worker, job) for job in jobs} == {("FINISHED", 255, "LOST")}
    assert "cannot be finished" not in capfd.readouterr().err


UNRUNNABLE = [  # what stands at the places where a command is looked for; what is said of it
    (("nothing", "nothing"), errno.ENOENT),
    (("nothing", "text", "nothing"), errno.EACCES),
    (("text/below", "text"), errno.EACCES),
    (("text", "garbage"), errno.EACCES),
    (("garbage", "text"), errno.ENOEXEC),
    (("nothing", "text/below"), errno.ENOTDIR),
]


@pytest.mark.parametrize(("places", "said_"), UNRUNNABLE)
def test_a_command_that_cannot_run_fails_for_the_first_place_where_it_is(tmp_path, places, said_):
    (tmp_path / "text").write_text("hello")
    (tmp_path / "garbage").write_bytes(b"\x00\x01")
    (tmp_path / "garbage").chmod(0o755)
    with pytest.raises(OSError, match=rf"\[Errno {said_}\]"):
        jobworker.exec_first([str(tmp_path / place) for place in places], ["x"], {})


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
async def test_starts_that_wait_for_leases_can_be_stopped_and_keep_nobody_waiting(state):
    """Who opens such a file, as execve(2) does, waits for its lease, 45 seconds at most (fcntl(2))."""
    many = jobworker.START_SLOTS + 2
    async with worker_on(state) as worker:
        leaser = await start_id(worker, JobRequest(str(PYTHON_FOR_ALL), ("-c", LEASES, str(many)), owner="eve"))
        home = (await said(worker, leaser, b"\n")).decode().split()[1]
        ids = [jobworker.new_job_id() for _ in range(many)]
        held = [
            asyncio.ensure_future(start_id(worker, JobRequest(f"{home}/leased{number}", owner="eve", id=ids[number])))
            for number in range(many)
        ]
        free = asyncio.ensure_future(result(worker, JobRequest("echo", ("free",), owner="bob")))  # begins after those
        assert (await free)[0] == b"free\n"
        assert not any(start.done() for start in held)
        await asyncio.gather(*(worker.stop(worker.job(job)) for job in ids))
        await asyncio.gather(*held)
        assert {ending(worker, job)[:2] for job in ids} == {("STOPPED", 137)}
        await worker.stop(worker.job(leaser))


# What a full disk costs


@pytest.fixture(params=["tmpfs", "ext4", pytest.param("/scratch", marks=pytest.mark.controllers)])
def small_disk(request, nothing_is_left):
    """A state folder on a file system with about 16 MiB of room; /scratch is the guest's real disk."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount")
    with contextlib.ExitStack() as resources:
        if request.param == "/scratch":
            if not os.path.ismount("/scratch"):
                pytest.skip("needs /scratch, a file system on a real disk")
            filler = resources.enter_context(tempfile.NamedTemporaryFile(dir="/scratch"))
            os.posix_fallocate(filler.fileno(), 0, room("/scratch") - 16 * MIB)
            point = Path("/scratch")
        else:
            point = resources.enter_context(mounted(request.param))
        yield new_state(nothing_is_left, point)
        wait_for_orphans()
        shutil.rmtree(nothing_is_left[-1])


def room(folder):
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


@contextlib.contextmanager
def mounted(kind):
    """A new file system of 16 MiB."""
    with tempfile.TemporaryDirectory(prefix="jobworker-disk-") as folder:
        os.chmod(folder, 0o711)
        point = Path(folder, "disk")
        point.mkdir()
        words = ["-t", "tmpfs", "-o", "size=16m", "none"]
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
    """Fill the file system of the state folder, but for some blocks."""
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
async def test_a_job_that_fills_the_disk_is_ended_and_its_record_is_whole(small_disk):
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
async def test_a_job_keeps_its_exit_code_on_a_disk_that_others_filled(small_disk):
    gate = small_disk / "gate"
    os.mkfifo(gate)
    gate.chmod(0o666)
    async with worker_on(small_disk) as worker:
        job = await start_id(worker, shell(f"read line < {gate}; exit 5"))
        fill(small_disk)
        gate.write_text("go\n")
        assert await output(worker, job) == b""
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
async def test_jobs_leave_the_reserve_of_the_disk_alone(small_disk):
    disk = os.statvfs(small_disk)
    share = (room(small_disk) - 8 * MIB) / (disk.f_blocks * disk.f_frsize)
    async with worker_on(small_disk, reserve=share) as worker:
        text, status = await result(worker, JobRequest("yes", owner="alice"))
        assert (status.status, status.ending.reason) == ("STOPPED", "DISK_FULL")
        assert MIB < len(text) < 14 * MIB  # up to half of the reserve
        with pytest.raises(ExhaustedError, match="nearly full"):
            await start_id(worker, shell("true"))
        worker.remove(worker.job(status.spec.id))
        assert (await result(worker, shell("exit 3")))[1].exit_code == 3


# --- A server over mutual TLS ---------------------------------------------------------------------------
# What the tests of the sections below share: certificates, a server process, a client process, a channel.

DEFAULT_CHANNEL = jobworker.CLIENT_OPTIONS
PYZ = HERE / "jobworker.pyz"
needs_pyz = pytest.mark.skipif(not PYZ.exists(), reason="needs jobworker.pyz: ./build.sh")
LIKE_PYZ = (
    Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info[1]}"
)  # the interpreter that built it, without its packages
PYTHON_FOR_ALL = Path("/usr/bin/python3")  # /root's own is nobody else's to run


class ClientProcess(subprocess.Popen):
    """A client that does not outlive its block, however that ends."""

    def __exit__(self, *how):
        self.kill()
        super().__exit__(*how)


@dataclasses.dataclass(frozen=True)
class Served:
    """A server process that listens, and the folder of its clients."""

    process: subprocess.Popen[str]
    port: int
    certs: Path

    @property
    def address(self):
        return f"localhost:{self.port}"

    def run(self, *words, role="user", program=None, **popen):
        """Run one client command to its end."""
        environment = {**os.environ, "JOBWORKER_SERVER": self.address, "JOBWORKER_CERTS": str(self.certs)}
        place = () if role == "user" else ("-r", role)
        command = [*(program or PROGRAM), *words[:1], *place, *words[1:]]
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE, check=False,
            **{"env": environment, **popen},
        )  # fmt: skip

    def start(self, *words, role="user"):
        """Start a job from the command line; its id."""
        done = self.run("start", *words, role=role)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[-1]

    def popen(self, *words, role="user", **popen):
        environment = {**os.environ, "JOBWORKER_SERVER": self.address, "JOBWORKER_CERTS": str(self.certs)}
        command = [*PROGRAM, *words[:1], "-r", role, *words[1:]]
        return ClientProcess(
            command, **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "env": environment, **popen}
        )


PROGRAM = (sys.executable, str(HERE / "jobworker.py"))


@contextlib.contextmanager
def serving(state, certs, *options, program=PROGRAM, end=signal.SIGTERM, port=0, **popen):
    """A server process, until the block ends; it then stops its jobs."""
    words = [
        "serve",
        "--certs",
        certs,
        "--state",
        state,
        "--listen",
        f"127.0.0.1:{port}",
        "--without",
        "auto",
        "--reserve",
        "0",
    ]
    process = subprocess.Popen(
        [*program, *map(str, words), "--stop-jobs", *options],
        stdin=subprocess.DEVNULL, text=True, **{"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, **popen},
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        assert line.startswith("jobworker: serving on "), line
        yield Served(process, int(line.split(",")[0].rsplit(":", 1)[1]), Path(certs))
    finally:
        if process.poll() is None:
            process.send_signal(end)
        process.wait(PATIENCE)
        process.stdout.close()
        if process.stderr:
            process.stderr.close()


@pytest.fixture(scope="session")
def certs(tmp_path_factory):
    """A folder as `serve` makes it, with one identity more."""
    folder = tmp_path_factory.mktemp("tls") / "certs"
    jobworker.prepare_grpc()
    jobworker.prepare_folder(folder, [])
    authority = jobworker.load_authority(folder, "client-ca")
    jobworker.write_pair(folder, "user2", jobworker.issue_identity(authority, "user2", ["user"]))
    return folder


@pytest.fixture(scope="session")
def shared(certs, tmp_path_factory):
    """One server for all tests that do nothing to it."""
    folder = Path(tempfile.mkdtemp(prefix="jobworker-shared-"))
    folder.chmod(0o711)
    jobworker.libc_call("prctl", jobworker.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with serving(folder, certs) as served:
        call(served, "GetJobStatus", pb.GetStatusRequest(id=ID))  # so that what gRPC keeps for ever is there before
        asyncio.run(open_and_close(served))
        yield served
    for tree in trees_of(folder):
        Cgroup(str(tree)).remove()
    shutil.rmtree(folder)


async def open_and_close(served):
    async with grpc.aio.insecure_channel(served.address):
        pass


def channel_to(served, identity=None, role="user"):
    """A channel as a client of any make would open it."""
    folder = served.certs
    pair = identity or jobworker_pair(folder, role)
    credentials = grpc.ssl_channel_credentials((folder / "server-ca.pem").read_bytes(), *pair)
    return grpc.secure_channel(served.address, credentials, DEFAULT_CHANNEL)


def jobworker_pair(folder, role):
    return (folder / f"{role}.key").read_bytes(), (folder / f"{role}.pem").read_bytes()


def ask(channel, method, request, timeout=PATIENCE):
    """One call; its reply, or the name of its status with its sentence."""
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
        told = error.code().name, error.details()
    assert "Traceback" not in told[1]
    return told


def call(served, method, request, identity=None, role="user"):
    with channel_to(served, identity, role) as channel:
        return ask(channel, method, request)


def one_sentence(done, *words, status=1):
    """A client or a server that failed with one line on standard error, and with these words in it."""
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    assert re.fullmatch(r"jobworker: [^\n]+\n", done.stderr), done.stderr
    for word in words:
        assert word in done.stderr


# --- 7. Identity and authorization ----------------------------------------------------------------------
# Which certificates are refused, and who sees what.

UTF8 = jobworker.encode_roles(["user"])


def unsigned(authority, subject, public_key, start, days):
    """A certificate that an authority may sign, for some days from now on, with nothing else in it yet."""
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


def certificate(authority, *, names=("mallory",), roles=UTF8, purposes=("CLIENT_AUTH",), start=-1.0, days=1.0):
    """A client's key and certificate in which anything may be wrong."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name) for name in names])
    builder = unsigned(authority, subject, key.public_key(), start, days)
    if purposes:
        oids = [getattr(x509.oid.ExtendedKeyUsageOID, purpose) for purpose in purposes]
        builder = builder.add_extension(x509.ExtendedKeyUsage(oids), critical=False)
    if roles is not None:
        value = x509.UnrecognizedExtension(x509.ObjectIdentifier(jobworker.ROLES_OID), roles)
        builder = builder.add_extension(value, critical=False)
    made = jobworker.CertifiedKey(builder.sign(authority.key, hashes.SHA256()), key)
    return made.key_pem(), made.certificate_pem()


REFUSED = [  # what is wrong; the certificate; the status (UNAVAILABLE: no connection comes about)
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


@pytest.mark.parametrize(("wrong", "how", "status"), REFUSED, ids=[row[0] for row in REFUSED])
def test_a_certificate_with_anything_wrong_is_refused(shared, wrong, how, status):
    identity = certificate(jobworker.load_authority(shared.certs, "client-ca"), **how)
    assert call(shared, "GetJobStatus", pb.GetStatusRequest(id=ID), identity)[0] == status
    assert call(shared, "StartJob", pb.StartJobRequest(cmd="true"), identity)[0] == status
    assert call(shared, "GetOutputStream", pb.GetStreamRequest(id=ID), identity)[0] == status


def test_a_certificate_with_nothing_wrong_is_not_refused(shared):
    identity = certificate(jobworker.load_authority(shared.certs, "client-ca"))
    assert call(shared, "GetJobStatus", pb.GetStatusRequest(id=ID), identity)[0] == "NOT_FOUND"


def test_a_foreign_authority_s_certificate_is_refused(shared):
    identity = certificate(jobworker.issue_authority("jobworker client authority"), names=("admin",))
    assert call(shared, "GetJobStatus", pb.GetStatusRequest(id=ID), identity)[0] == "UNAVAILABLE"


def test_the_server_s_own_certificate_is_no_client_s(shared):
    assert call(shared, "GetJobStatus", pb.GetStatusRequest(id=ID), role="server")[0] == "UNAVAILABLE"


def test_no_certificate_is_no_connection(shared):
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
        time.sleep(life + 1)  # the promise is about this time, and no event tells of its end
        status, sentence = ask(channel, "GetJobStatus", pb.GetStatusRequest(id=ID))
    assert (status, "out of date" in sentence) in [("PERMISSION_DENIED", True), ("UNAVAILABLE", False)]


def test_an_authority_that_expires_while_its_client_is_connected_is_refused_from_then_on(state, certs, tmp_path):
    folder, life = Path(shutil.copytree(certs, tmp_path / "certs")), 5
    authority = jobworker.issue("brief", life / 86400, None, [(x509.BasicConstraints(ca=True, path_length=None), True)])
    jobworker.write_pair(folder, "client-ca", authority)
    identity = certificate(authority)
    with serving(state, folder) as served, channel_to(served, identity) as channel:
        assert ask(channel, "GetJobStatus", pb.GetStatusRequest(id=ID))[0] == "NOT_FOUND"
        time.sleep(life + 1)  # the promise is about this time, and no event tells of its end
        status, sentence = ask(channel, "GetJobStatus", pb.GetStatusRequest(id=ID))
    assert (status, "out of date" in sentence) in [("PERMISSION_DENIED", True), ("UNAVAILABLE", False)]


def test_an_authority_that_is_no_longer_current_is_refused_on_a_living_connection(state, certs, tmp_path):
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


def twin(authority, start, days):
    """An authority's certificate again, of the same name and key, for other days."""
    builder = unsigned(authority, authority.certificate.subject, authority.key.public_key(), start, days)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    return builder.sign(authority.key, hashes.SHA256()).public_bytes(jobworker.serialization.Encoding.PEM)


@pytest.mark.parametrize(("start", "days"), [(-9, -1), (1, 9999), (-1, 9999)])
@pytest.mark.parametrize("first", [True, False])
def test_an_authority_s_renewal_keeps_nobody_out(state, certs, tmp_path, start, days, first):
    """Beside the one in force stands another of its name and key, which is over, to come, or valid as well."""
    folder = Path(shutil.copytree(certs, tmp_path / "certs"))
    current, other = (
        (folder / "client-ca.pem").read_bytes(),
        twin(jobworker.load_authority(certs, "client-ca"), start, days),
    )
    (folder / "client-ca.pem").write_bytes(other + current if first else current + other)
    with serving(state, folder) as served:
        assert call(served, "GetJobStatus", pb.GetStatusRequest(id=ID))[0] == "NOT_FOUND"


@pytest.mark.parametrize(("version", "spoken"), [("-tls1_3", True), ("-tls1_2", False), ("-tls1_1", False)])
def test_nothing_older_than_tls_1_3_is_spoken(shared, version, spoken):
    words = ["openssl", "s_client", version, "-connect", shared.address, "-alpn", "h2", "-CAfile", shared.certs / "server-ca.pem",
             "-cert", shared.certs / "user.pem", "-key", shared.certs / "user.key", "-cipher", "ALL:@SECLEVEL=0"]  # fmt: skip
    told = subprocess.run(
        words, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=PATIENCE, check=False
    ).stdout
    assert ("Verify return code: 0" in told and "New, TLSv1.3" in told) == spoken
    assert ("Cipher is (NONE)" in told) != spoken


def test_whose_a_job_is_decides_who_sees_it(shared):
    job = call(shared, "StartJob", pb.StartJobRequest(cmd="sh", args=["-c", "echo mine; exec sleep 1000"])).ID
    calls = [("GetJobStatus", pb.GetStatusRequest), ("GetOutputStream", pb.GetStreamRequest), ("RemoveJob", pb.RemoveJobRequest),
             ("StopJob", pb.StopJobRequest)]  # fmt: skip
    for method, request in calls:
        foreign = call(shared, method, request(id=job), role="user2")
        nobody_s = call(shared, method, request(id=ID2), role="user2")
        assert foreign[0] == nobody_s[0] == "NOT_FOUND"
        assert foreign[1].replace(job, ID2) == nobody_s[1]
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


@as_root
def test_only_an_admin_runs_a_job_as_another_account(shared):
    request = pb.StartJobRequest(cmd="id", args=["-u"], run_as="root")
    assert call(shared, "StartJob", request)[0] == "PERMISSION_DENIED"
    job = call(shared, "StartJob", request, role="admin").ID
    assert call(shared, "GetOutputStream", pb.GetStreamRequest(id=job), role="admin") == b"0\n"
    nobody = pb.StartJobRequest(cmd="id", run_as="no such account")
    assert call(shared, "StartJob", nobody, role="admin")[0] == "INVALID_ARGUMENT"


@pytest.mark.parametrize("value", [
    b"\x0c\x81\x04user", b"\x0c\x80user\x00\x00", b"\x0c\x04user\x00", b"\x0c\x05user\x00", b"\x0c\x05 user", b"\x0c\x05user,", b"\x0c\x05,user",
    b"\x0c\x0auser,,user", b"\x0c\x09user;user", b"\x30\x06\x0c\x04user", b"\x04\x06\x0c\x04user", b"\x1e\x08\0u\0s\0e\0r", b"\x0c", b"\x0c\x01,",
    b"\x0c\x05\xef\xbb\xbfad", b"\x0c" * 5000,
], ids=repr)  # fmt: skip
def test_a_roles_extension_that_is_not_exactly_right_is_no_role(shared, value):
    identity = certificate(jobworker.load_authority(shared.certs, "client-ca"), roles=value)
    assert call(shared, "GetJobStatus", pb.GetStatusRequest(id=ID), identity)[0] == "PERMISSION_DENIED"


def test_several_roles_are_one_identity(shared):
    identity = certificate(
        jobworker.load_authority(shared.certs, "client-ca"), roles=jobworker.encode_roles(["user", "admin"])
    )
    job = call(shared, "StartJob", pb.StartJobRequest(cmd="true")).ID
    assert call(shared, "GetJobStatus", pb.GetStatusRequest(id=job), identity).owner == "user"


@pytest.mark.parametrize("purpose", ["ANY_EXTENDED_KEY_USAGE", "CODE_SIGNING", "EMAIL_PROTECTION"])
def test_another_purpose_than_a_client_s_is_refused(shared, purpose):
    identity = certificate(jobworker.load_authority(shared.certs, "client-ca"), purposes=(purpose,))
    assert call(shared, "GetJobStatus", pb.GetStatusRequest(id=ID), identity)[0] in {"PERMISSION_DENIED", "UNAVAILABLE"}


def test_nobody_makes_an_identity_with_an_identity_s_key(shared):
    """`user` signs a certificate for `admin`, and sends its own along as if it were an authority."""
    key, own = jobworker_pair(shared.certs, "user")
    signer = jobworker.CertifiedKey(
        x509.load_pem_x509_certificate(own), jobworker.serialization.load_pem_private_key(key, None)
    )
    forged_key, forged = certificate(signer, names=("admin",), roles=jobworker.encode_roles(["admin"]))
    for chain in (forged, forged + own, forged + own + (shared.certs / "client-ca.pem").read_bytes()):
        assert call(shared, "GetJobStatus", pb.GetStatusRequest(id=ID), (forged_key, chain))[0] == "UNAVAILABLE"


def test_a_signature_by_what_is_no_authority_is_no_trust(shared):
    """The same, as every call checks it anew: TLS looked only when the connection came about."""
    key, own = jobworker_pair(shared.certs, "user")
    signer = jobworker.CertifiedKey(
        x509.load_pem_x509_certificate(own), jobworker.serialization.load_pem_private_key(key, None)
    )
    _, forged = certificate(signer, names=("admin",))
    peer = jobworker.read_peer_certificate(forged, own, (shared.certs / "client-ca.pem").read_bytes())
    assert peer.validities == ()


def test_an_authority_below_the_authority_vouches_for_clients(shared, tmp_path):
    for name in ("client-ca.pem", "client-ca.key", "server-ca.pem"):
        shutil.copy(shared.certs / name, tmp_path)
    by_hand(tmp_path, "team", "client-ca", "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign\n")
    by_hand(tmp_path, "carol", "team", f"extendedKeyUsage=clientAuth\n{jobworker.ROLES_OID}=ASN1:UTF8String:user\n")
    with (tmp_path / "carol.pem").open("ab") as file:
        file.write((tmp_path / "team.pem").read_bytes())
    job = shared.run("start", "--certs", str(tmp_path), "--", "echo", "hers", role="carol").stdout.split()[-1]
    assert call(shared, "GetJobStatus", pb.GetStatusRequest(id=job), role="admin").owner == "carol"


ODD_NAMES = [
    "../../etc",
    "a/b",
    "two\nlines",
    "a b\tc",
    "ünï☃",
    "-j",
    "%s",
    "x" * 64,
    "root",
    "jobs",
    ".",
    "\x1b[31m",
    "user ",
]


@pytest.mark.parametrize("name", ODD_NAMES, ids=repr)
def test_an_owner_may_have_any_name_and_owns_what_is_started_in_it(shared, name):
    identity = certificate(jobworker.load_authority(shared.certs, "client-ca"), names=(name,))
    job = call(shared, "StartJob", pb.StartJobRequest(cmd="sh", args=["-c", "id -u; pwd"]), identity).ID
    uid, home = call(shared, "GetOutputStream", pb.GetStreamRequest(id=job), identity).decode().splitlines()
    assert call(shared, "GetJobStatus", pb.GetStatusRequest(id=job), identity).owner == name
    assert call(shared, "GetJobStatus", pb.GetStatusRequest(id=job))[0] == "NOT_FOUND"
    if os.geteuid() == 0:
        assert int(uid) >= jobworker.UID_RANGES_BASE
        assert home.endswith(f"/home/{uid}")


def test_whose_an_id_is_cannot_be_told_from_its_being_taken(shared):
    mine = call(shared, "StartJob", pb.StartJobRequest(cmd="true"), role="user2").ID
    foreign = call(shared, "StartJob", pb.StartJobRequest(cmd="true")).ID
    other_command = call(shared, "StartJob", pb.StartJobRequest(cmd="false", id=mine), role="user2")
    other_owner = call(shared, "StartJob", pb.StartJobRequest(cmd="true", id=foreign), role="user2")
    admin_s_own = call(shared, "StartJob", pb.StartJobRequest(cmd="true", id=foreign), role="admin")
    assert other_command[0] == other_owner[0] == admin_s_own[0] == "ALREADY_EXISTS"
    assert other_command[1].replace(mine, foreign) == other_owner[1] == admin_s_own[1]


def reloaded(served):
    """Ask a server to read its certificates again; what it says."""
    served.process.send_signal(signal.SIGHUP)
    return next(line for line in served.process.stderr if "the certificates" in line)


def test_a_reload_takes_a_new_server_certificate_and_leaves_connections_alone(state, certs, tmp_path):
    folder = Path(shutil.copytree(certs, tmp_path / "certs"))
    with serving(state, folder, stderr=subprocess.PIPE) as served, channel_to(served) as channel:
        job = ask(channel, "StartJob", pb.StartJobRequest(cmd="true")).ID
        before = presented(served)
        jobworker.write_pair(
            folder,
            "server",
            jobworker.issue_server_certificate(jobworker.load_authority(folder, "server-ca"), ["localhost"]),
        )
        assert "are read again" in reloaded(served)
        assert presented(served) == (folder / "server.pem").read_text().strip() != before
        assert ask(channel, "GetJobStatus", pb.GetStatusRequest(id=job)).owner == "user"


def presented(served):
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
    told = subprocess.run(
        list(map(str, words)), stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE, check=False
    ).stdout
    return re.search(
        "-----BEGIN CERTIFICATE-----.*-----END CERTIFICATE-----", told.decode(errors="replace"), re.DOTALL
    )[0]


@pytest.mark.parametrize(
    ("name", "content"),
    [("server.pem", b"rubbish"), ("client-ca.pem", b""), ("client-ca.pem", None), ("server.key", None)],
)
def test_a_reload_of_a_folder_that_cannot_be_served_changes_nothing(state, certs, tmp_path, name, content):
    folder = Path(shutil.copytree(certs, tmp_path / "certs"))
    with (
        serving(state, folder, stderr=subprocess.PIPE) as served,
        channel_to(Served(None, served.port, certs)) as channel,
    ):
        assert ask(channel, "GetJobStatus", pb.GetStatusRequest(id=ID))[0] == "NOT_FOUND"
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
        assert "stay as they were" in reloaded(served)
        assert ask(channel, "GetJobStatus", pb.GetStatusRequest(id=ID))[0] == "NOT_FOUND"
        assert call(Served(None, served.port, certs), "GetJobStatus", pb.GetStatusRequest(id=ID))[0] == "NOT_FOUND"


def test_a_storm_of_connections_among_reloads_does_not_end_the_server(state, certs):
    """As hundreds of followers come back at once; gRPC frees what it replaces under other handshakes."""
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
            greeted = clients.map(connect, range(1000))
            assert "are read again" in reloaded(served)
            assert all(greeted)
        assert served.process.poll() is None


# --- 8. gRPC service ------------------------------------------------------------------------------------
# The contract, as clients know it that were written against it.

CONTRACT = {  # message: its fields with their numbers and types, which never change
    "StartJobRequest": {"cmd": (1, "string"), "args": (2, "string"), "id": (3, "string")},
    "StartJobResponse": {"ID": (1, "string")},
    "StopJobRequest": {"id": (1, "string")},
    "StopJobResponse": {},
    "GetStatusRequest": {"id": (1, "string")},
    "GetStatusResponse": {
        "status": (1, "enum"),
        "exitcode": (2, "int32"),
        "reason": (3, "string"),
        "signal": (4, "int32"),
    },
    "GetStreamRequest": {"id": (1, "string"), "offset": (2, "uint64")},
    "GetStreamResponse": {"result": (1, "bytes")},
}


def test_the_public_contract_is_unchanged():
    types = {"string": 9, "enum": 14, "int32": 5, "uint64": 4, "bytes": 12}
    for message, fields in CONTRACT.items():
        there = pb.DESCRIPTOR.message_types_by_name[message].fields_by_name
        for name, (number, kind) in fields.items():
            assert (there[name].number, there[name].type) == (number, types[kind]), f"{message}.{name}"
    assert dict(pb.Status.items()) == {"RUNNING": 0, "STOPPED": 1, "FINISHED": 2}
    assert pb.DESCRIPTOR.package == "proto"
    assert {"StartJob", "StopJob", "GetJobStatus", "GetOutputStream"} <= set(
        pb.DESCRIPTOR.services_by_name["WorkerService"].methods_by_name
    )


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
    ("GetOutputStream", pb.GetStreamRequest(id="x" * 100_000), "INVALID_ARGUMENT", "xxx…"),  # fits what gRPC sends
    ("StartJob", pb.StartJobRequest(cmd="☃" * 50_000), "INVALID_ARGUMENT", "☃☃…"),
    ("RemoveJob", pb.RemoveJobRequest(id=ID2), "NOT_FOUND", ID2),
]


@pytest.mark.parametrize(("method", "request_", "status", "word"), BAD_REQUESTS, ids=lambda value: str(value)[:30])
def test_a_request_that_cannot_be_met_is_told_so_in_one_sentence(shared, method, request_, status, word):
    told, sentence = call(shared, method, request_)
    assert told == status
    assert word in sentence
    assert "\n" not in sentence


def test_garbage_on_the_wire_hurts_nobody(shared):
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


@given(st.binary(max_size=300))
def test_a_framed_result_is_what_protobuf_writes_and_reads(chunk):
    assert jobworker.frame_result(chunk) == pb.GetStreamResponse(result=chunk).SerializeToString() or not chunk
    assert jobworker.result_of(jobworker.frame_result(chunk)) == chunk
    assert pb.GetStreamResponse.FromString(jobworker.frame_result(chunk)).result == chunk
    # a later server's message, with a field that this one does not know
    assert jobworker.result_of(pb.GetStreamResponse(result=chunk).SerializeToString() + b"\x10\x01") == chunk


def test_starting_twice_with_one_id_is_starting_once(shared):
    request = pb.StartJobRequest(cmd="sh", args=["-c", "echo once"], id=jobworker.new_job_id())
    assert {call(shared, "StartJob", request).ID for _ in range(3)} == {request.id}
    assert call(shared, "GetOutputStream", pb.GetStreamRequest(id=request.id)) == b"once\n"
    other = pb.StartJobRequest(cmd="sh", args=["-c", "echo twice"], id=request.id)
    assert call(shared, "StartJob", other)[0] == "ALREADY_EXISTS"


def test_a_stream_skips_the_bytes_that_it_is_told_to(shared):
    job = call(shared, "StartJob", pb.StartJobRequest(cmd="printf", args=["0123456789"])).ID
    for offset, rest in ((0, b"0123456789"), (4, b"456789"), (10, b""), (11, b""), (2**62, b"")):
        assert call(shared, "GetOutputStream", pb.GetStreamRequest(id=job, offset=offset)) == rest


def test_fifty_clients_at_different_times_each_receive_the_identical_bytes(shared, tmp_path):
    size = 50 * MIB
    job = call(shared, "StartJob", pb.StartJobRequest(cmd=PYTHON, args=["-c", WRITES_BYTES, str(size)])).ID
    whole = hashlib.sha256(random.Random(7).randbytes(size)).hexdigest()

    begun = [asyncio.Event() for _ in range(51)]  # each client begins when the one before has a part

    async def client(number):
        await begun[number].wait()
        files = (shared.certs / "server-ca.pem").read_bytes(), *jobworker_pair(shared.certs, "user")
        async with grpc.aio.secure_channel(
            shared.address, grpc.ssl_channel_credentials(*files), DEFAULT_CHANNEL
        ) as channel:
            path, encode = "/proto.WorkerService/GetOutputStream", pb.GetStreamRequest.SerializeToString
            digest = hashlib.sha256()
            async for chunk in channel.unary_stream(path, encode, jobworker.result_of)(pb.GetStreamRequest(id=job)):
                digest.update(chunk)
                begun[number + 1].set()
            return digest.hexdigest()

    async def everybody():
        begun[0].set()
        return await asyncio.gather(*(client(number) for number in range(50)))

    assert set(asyncio.run(everybody())) == {whole}


def text_field(number, text):
    return bytes([number << 3 | 2, len(text)]) + text


def fields_of(message):
    """What a client that knows no more than wire types reads (protobuf's encoding, fields below 16)."""
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


def test_the_bytes_that_existing_clients_send_are_answered_with_those_that_they_read(shared):
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
        # fields of a later version are passed over
        assert raw("StopJob", text_field(1, answer[2:]) + text_field(15, b"new")) == b""


@pytest.mark.parametrize("message", [
    text_field(1, b"\xff\xfe"), text_field(1, b"true") + text_field(2, b"\xc3\x28"), text_field(3, b"\xed\xa0\x80"), b"\x0a\x7fshort", b"\x08\x01", b"\x0b", b"\x00", b"",
], ids=repr)  # fmt: skip
def test_bytes_that_are_no_request_start_nothing(shared, message):
    with channel_to(shared) as channel, pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary("/proto.WorkerService/StartJob")(message, timeout=PATIENCE)
    assert refused.value.code().name == "INVALID_ARGUMENT"
    assert not re.search("Traceback|google|\n", refused.value.details())


def tls_to(served):
    """A TLS 1.3 connection of Python's own OpenSSL, as far as HTTP/2 (ALPN)."""
    context = ssl.create_default_context(cafile=served.certs / "server-ca.pem")
    context.load_cert_chain(served.certs / "user.pem", served.certs / "user.key")
    context.set_alpn_protocols(["h2"])
    raw = socket.create_connection(("localhost", served.port), PATIENCE)
    return context.wrap_socket(raw, server_hostname="localhost")


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0"


def frame(kind, flags, stream, content):
    return len(content).to_bytes(3, "big") + bytes([kind, flags]) + struct.pack(">I", stream) + content


def headers(path):
    """HPACK, all literal (RFC 7541, 6.2.2)."""
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
    ("a message said to be 4 GiB", PREFACE + frame(1, 4, 1, headers("/proto.WorkerService/StartJob")) + frame(0, 1, 1, b"\0\xff\xff\xff\xff" + b"x" * 100)),
    ("a compressed message that is not", PREFACE + frame(1, 4, 1, headers("/proto.WorkerService/StartJob")) + frame(0, 1, 1, b"\1\0\0\0\4rubb")),
    ("a header block that never ends", PREFACE + frame(1, 0, 1, headers("/x")) + frame(9, 0, 1, b"\0\x01a\x01b" * 3000) * 10),
    ("ten thousand streams begun and reset", PREFACE + b"".join(
        frame(1, 4, number, headers("/proto.WorkerService/StartJob")) + frame(3, 0, number, b"\0\0\0\x08") for number in range(1, 20001, 2))),
]  # fmt: skip


@pytest.mark.parametrize(("what", "rubbish"), RUBBISH, ids=[row[0] for row in RUBBISH])
def test_rubbish_of_a_client_that_is_trusted_hurts_nobody(shared, what, rubbish):
    with tls_to(shared) as connection, contextlib.suppress(OSError):
        connection.sendall(rubbish)
        connection.settimeout(1)  # it may answer or hang up; whatever it does, others are served
        while connection.recv(65536):
            pass
    job = call(shared, "StartJob", pb.StartJobRequest(cmd="echo", args=["fine"])).ID
    assert call(shared, "GetOutputStream", pb.GetStreamRequest(id=job)) == b"fine\n"
    assert shared.process.poll() is None


@pytest.mark.parametrize("offset", [2**63 - 1, 2**63, 2**64 - 1])
def test_an_offset_beyond_every_file_is_an_empty_stream(shared, offset):
    job = call(shared, "StartJob", pb.StartJobRequest(cmd="echo")).ID
    assert call(shared, "GetOutputStream", pb.GetStreamRequest(id=job, offset=offset)) == b""


ENDS_OF_NUMBERS = [
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


@pytest.mark.parametrize("fields", ENDS_OF_NUMBERS, ids=repr)
def test_a_limit_is_taken_or_refused_in_a_sentence_whatever_number_it_is(shared, fields):
    answer = call(shared, "StartJob", pb.StartJobRequest(cmd="true", **fields))
    if isinstance(answer, tuple):
        assert answer[0] == "INVALID_ARGUMENT"
        assert next(iter(fields)).replace("_", "-") in answer[1]
    else:
        assert end_of_stream(shared, answer.ID).status in {pb.FINISHED, pb.STOPPED}


def test_a_hundred_thousand_arguments_and_odd_words_arrive_as_they_are(shared):
    words = ["", " ", "-", "--", "a\nb", "\t", "\\", "'", '"', "$(id)", "ünï☃", "\x7f", "\x01"]
    job = call(shared, "StartJob", pb.StartJobRequest(cmd="printf", args=["%s|", *words])).ID
    assert call(shared, "GetOutputStream", pb.GetStreamRequest(id=job)).decode() == "|".join([*words, ""])
    many = call(shared, "StartJob", pb.StartJobRequest(cmd="sh", args=["-c", "echo $#", "sh", *["x"] * 100_000]))
    assert call(shared, "GetOutputStream", pb.GetStreamRequest(id=many.ID)) == b"100000\n"


def test_a_server_that_is_full_says_so_and_what_allows_more(state, certs):
    with serving(state, certs, "--max-jobs", "1") as served:
        job = served.start("--", "sleep", "1000")
        status, sentence = call(served, "StartJob", pb.StartJobRequest(cmd="true"))
        assert (status, "--max-jobs" in sentence) == ("RESOURCE_EXHAUSTED", True)
        again = pb.StartJobRequest(cmd="sleep", args=["1000"], id=job)
        assert call(served, "StartJob", again) == pb.StartJobResponse(ID=job)  # which is not one more
        served.run("stop", job)
        assert served.run("stream", served.start("--", "echo", "room")).stdout == "room\n"
    with serving(state, certs, "--reserve", "99.99%") as served:
        status, sentence = call(served, "StartJob", pb.StartJobRequest(cmd="true"))
        assert (status, "disk" in sentence or "free" in sentence) == ("RESOURCE_EXHAUSTED", True), sentence


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
        pair = jobworker_pair(served.certs, "user")
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
def test_calls_without_number_cancel_no_other_caller_s_call(shared, attack):
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


def test_an_owner_s_open_streams_are_bounded_and_nobody_else_s(state, certs):
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


def test_an_owner_s_open_calls_are_bounded_and_nobody_else_s(state, certs):
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
            until(lambda: call(served, "GetJobStatus", pb.GetStatusRequest(id=job))[0:1] == ("RESOURCE_EXHAUSTED",))
            assert call(served, "GetJobStatus", pb.GetStatusRequest(id=job), role="admin").status == pb.RUNNING
        finally:
            os.kill(shim, signal.SIGCONT)
        assert [stop.result(PATIENCE) for stop in stops] == [b"", b""]
        until(lambda: not isinstance(call(served, "GetJobStatus", pb.GetStatusRequest(id=job)), tuple))


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


def test_each_loss_of_a_stream_has_the_whole_time_to_retry_also_of_a_job_that_prints_nothing(certs):
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
def test_the_head_of_a_spec_has_the_first_arguments_and_knows_how_many_more_there_are(tmp_path, words):
    spec = a_spec(args=tuple(words), owner=', "args": [')
    text = spec.to_json()
    assert jobworker.Spec.from_json(text) == spec
    head = jobworker.Spec.from_head(text)
    assert head.args == spec.args[: len(head.args)]
    assert head.arg_count == len(words)
    assert len(head.to_json()) <= jobworker.SPEC_HEAD_BYTES + 100
    (tmp_path / "job.json").write_bytes(text)
    folder = jobworker.JobFolder(str(tmp_path))
    assert (folder.read_head(), folder.read_owner()) == (head, spec.owner)
    first_version = {**json.loads(text)}
    del first_version["arg_count"]
    (tmp_path / "job.json").write_text(json.dumps({"args": first_version.pop("args"), **first_version}))
    assert folder.read_head() == spec


@pytest.mark.parametrize("count", [250_000, 1_000_000, 2_090_000])
def test_more_arguments_than_the_kernel_takes_are_refused_before_they_are_unpacked(shared, monkeypatch, count):
    answer = call(shared, "StartJob", pb.StartJobRequest(cmd="true", args=[""] * count))
    assert (answer[0], "larger" in answer[1] or "too long" in answer[1]) in {
        ("INVALID_ARGUMENT", True),
        ("RESOURCE_EXHAUSTED", True),
    }


@pytest.mark.parametrize(
    ("words", "count"), [(["x"] * 200_000, 200_000), (["x" * 100_000] * 20, 20)], ids=["many", "long"]
)
def test_as_many_arguments_as_the_kernel_takes_are_taken(shared, words, count):
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


@pytest.mark.parametrize(("method", "most"), [("GetJobStatus", 32 * MIB), ("GetOutputStream", 96 * MIB)])
def test_answers_that_are_not_read_cost_bounded_memory(state, certs, method, most):
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
async def test_an_end_that_comes_when_no_descriptor_is_free_is_seen_when_one_is(state, capfd, lost):
    log = [""]
    async with worker_on(state) as worker:
        job = await start_id(worker, shell("echo $PPID; exec sleep 1000"))
        shim = int(await said(worker, job, b"\n"))
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


def test_connections_that_say_nothing_take_no_job_s_end_and_no_stream(state, certs, tmp_path):
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
            for process in processes:
                os.kill(process, signal.SIGTERM)
            assert list(chunks) == []
            for job in jobs:
                until(lambda: ask(channel, "GetJobStatus", pb.GetStatusRequest(id=job)).exitcode == 143)  # noqa: B023
            assert ask(channel, "StartJob", pb.StartJobRequest(cmd="true")).ID
    assert "Traceback" not in log.read_text()
    assert f"may open {files} descriptors" in log.read_text()


def test_many_followers_of_a_job_that_prints_fast_keep_nobody_waiting(shared):
    """The good client is answered far more often than the followers are woken."""
    ticks = "import os, time\nwhile True:\n  time.sleep(0.003)\n  os.write(1, b'%020d\\n' % time.monotonic_ns())"
    job = call(shared, "StartJob", pb.StartJobRequest(cmd=PYTHON, args=["-c", ticks])).ID
    received = collections.Counter()

    async def follow(channel, number):
        chunks = channel.unary_stream("/proto.WorkerService/GetOutputStream")
        async for _ in chunks(pb.GetStreamRequest(id=job).SerializeToString()):
            received[number] += 1

    async def everybody(answers):
        pair = jobworker_pair(shared.certs, "user")
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


def test_an_owner_has_a_part_of_the_places_and_an_admin_always_one(state, certs):
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
async def test_the_disk_s_main_user_is_ended_and_refused_and_the_others_go_on(small_disk):
    disk = os.statvfs(small_disk)
    share = (room(small_disk) - 6 * MIB) / (disk.f_blocks * disk.f_frsize)
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
async def test_an_owner_who_hides_files_below_too_long_a_path_counts_as_the_main_user(tmp_path):
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
    port = free_port()
    holds = f"import socket, time; s = socket.socket(); s.bind(('127.0.0.1', {port})); {listens} print('held', flush=True); time.sleep(1000)"
    server = spawn(state, certs, first := free_port())
    with killed(server, certs, first) as served:
        job = served.start("--", PYTHON, "-c", holds)
        assert first_line(served, job) == b"held\n"
        bystander = served.start("--", "sleep", "1000")
    log = tmp_path / "log"
    with log.open("w") as errors, serving(state, certs, port=port, stderr=errors) as served:
        status = call(served, "GetJobStatus", pb.GetStatusRequest(id=job))
        assert (status.status, status.stopped_by) == (pb.STOPPED, "serve")
        assert call(served, "GetJobStatus", pb.GetStatusRequest(id=bystander)).status == pb.RUNNING
    assert f"stopped job {job}: it held the port {port}" in log.read_text()


@pytest.mark.controllers
@in_loop
async def test_an_owner_s_totals_are_the_kernel_s(state):
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
async def test_a_stop_lifts_the_rate_of_the_disk_first(state):
    async with worker_on(state) as worker:
        job = await start_id(worker, shell(WAITS, io=MIB))
        cgroup = Cgroup(worker.job(job).spec.cgroup)
        assert "wbps=1048576" in Path(cgroup.path, "io.max").read_text()
        cgroup._lift_io()
        assert Path(cgroup.path, "io.max").read_text() == ""
        await worker.stop(worker.job(job))


# --- 9. Server ------------------------------------------------------------------------------------------
# What a server does when it ends, starts again, or finds another one in its place.


def of_descriptors(served, folder, look):
    """What a look at each entry of `/proc/PID/fd` or `fdinfo` finds; one may close meanwhile."""
    found = []
    for path in Path(f"/proc/{served.process.pid}/{folder}").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(look(path))
    return found


def fds_of(served):
    return sorted(of_descriptors(served, "fd", os.readlink))


def watches_of(served):
    """The inotify watches of a server (proc_pid_fdinfo(5))."""
    return sum(text.count("inotify wd:") for text in of_descriptors(served, "fdinfo", Path.read_text))


def until(reached):
    """Wait for what another process holds, of which no event tells."""
    deadline = time.monotonic() + PATIENCE
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def end_of_stream(served, job):
    """Wait until a job has ended; its status."""
    call(served, "GetOutputStream", pb.GetStreamRequest(id=job))
    return call(served, "GetJobStatus", pb.GetStatusRequest(id=job))


def test_certificates_identities_and_jobs_survive_a_restart(state, certs):
    with serving(state, certs) as served:
        ended = served.start("--", "sh", "-c", "echo kept; exit 5")
        assert end_of_stream(served, ended).exitcode == 5
    with serving(state, certs) as served:
        assert call(served, "GetOutputStream", pb.GetStreamRequest(id=ended)) == b"kept\n"
        assert call(served, "GetJobStatus", pb.GetStatusRequest(id=ended)).exitcode == 5
        assert call(served, "GetJobStatus", pb.GetStatusRequest(id=ended), role="user2")[0] == "NOT_FOUND"


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_stream_goes_on_at_its_byte_in_the_next_server(state, certs, end):
    """And the job does not notice: a Ctrl-C at `serve` reaches no job."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    words = [
        *PROGRAM,
        "serve",
        "--certs",
        certs,
        "--state",
        state,
        "--listen",
        f"127.0.0.1:{port}",
        "--without",
        "auto",
    ]
    first = subprocess.Popen(
        list(map(str, words)), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert first.stdout.readline()
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
            assert end_of_stream(served, job).exitcode == 6


def test_serve_stop_jobs_stops_them(state, certs):
    with serving(state, certs) as served:
        job = served.start("--", "sleep", "1000")
    with serving(state, certs) as served:
        status = call(served, "GetJobStatus", pb.GetStatusRequest(id=job))
        assert (status.status, status.stopped_by) == (pb.STOPPED, "serve --stop-jobs")


def test_a_second_server_is_refused_by_the_state_and_by_the_port(state, certs, nothing_is_left):
    with serving(state, certs) as served:
        words = ["serve", "--certs", certs, "--without", "auto", "--listen"]
        same_state = served.run(*map(str, words), "127.0.0.1:0", "--state", str(state))
        assert same_state.returncode == 1
        assert f"in use by the server with pid {served.process.pid}\n" in same_state.stderr
        same_port = served.run(*map(str, words), f"127.0.0.1:{served.port}", "--state", str(new_state(nothing_is_left)))
        assert same_port.returncode == 1
        assert f"127.0.0.1:{served.port}" in same_port.stderr
        assert "Traceback" not in same_state.stderr + same_port.stderr


def test_clients_that_vanish_or_read_slowly_cost_the_server_nothing(state, certs):
    with serving(state, certs) as served:
        job = served.start("--", PYTHON, "-c", "import sys, time\nwhile True: sys.stdout.write('x' * 65536)")
        end_of = [served.popen("stream", job, stderr=subprocess.DEVNULL) for _ in range(3)]
        for client in end_of:
            assert client.stdout.read(1000) == b"x" * 1000
        end_of[0].kill()
        end_of[1].send_signal(signal.SIGSTOP)
        with served.popen("stream", job, stderr=subprocess.DEVNULL) as other:
            assert other.stdout.read(4 * MIB) == b"x" * 4 * MIB
            other.kill()
        assert served.run("stop", job).returncode == 0
        size = call(served, "GetJobStatus", pb.GetStatusRequest(id=job)).output_bytes
        end_of[1].send_signal(signal.SIGCONT)  # a sleeping one resumes, and misses nothing
        assert len(end_of[1].stdout.read()) == size - 1000
        assert len(end_of[2].stdout.read()) == size - 1000
        for client in end_of:
            client.stdout.close()
            client.wait(PATIENCE)


def test_after_many_calls_the_server_holds_what_it_held_before(state, certs):
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
        assert second[2] <= first[2] + 2  # gRPC's own pool breathes
        assert second[1] == 0
        assert jobs_cgroups(state) == []


def test_half_open_clients_are_gone_within_seconds(state, certs):
    """A client whose machine vanished answers no ping: here, one that is stopped."""
    with serving(state, certs) as served:
        job = served.start("--", "sh", "-c", WAITS)
        with served.popen("stream", job, stderr=subprocess.DEVNULL) as client:
            assert client.stdout.readline() == b"ready\n"
            until(lambda: watches_of(served) == 2)  # on the record, and on the followed output
            client.send_signal(signal.SIGSTOP)
            try:
                until(lambda: watches_of(served) == 1)
            finally:
                client.kill()


def test_when_a_server_ends_its_followers_are_told_and_the_job_goes_on(state, certs):
    port = free_port()
    words = [
        *PROGRAM,
        "serve",
        "--certs",
        certs,
        "--state",
        state,
        "--listen",
        f"127.0.0.1:{port}",
        "--without",
        "auto",
    ]
    server = subprocess.Popen(
        list(map(str, words)), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert server.stdout.readline().startswith("jobworker: serving on ")
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
    told = server.communicate(timeout=PATIENCE)[1]
    assert server.returncode == 0
    assert told.endswith("jobworker: stopping; 1 job goes on\n")
    assert "Traceback" not in told
    with serving(state, certs, port=port) as served:
        assert call(served, "GetJobStatus", pb.GetStatusRequest(id=job)).status == pb.RUNNING


def test_control_c_in_the_terminal_of_serve_reaches_no_job(state, certs):
    master, terminal = pty.openpty()
    words = [
        "setsid",
        "--ctty",
        *PROGRAM,
        "serve",
        "--certs",
        certs,
        "--state",
        state,
        "--listen",
        "127.0.0.1:0",
        "--without",
        "auto",
    ]
    server = subprocess.Popen(
        list(map(str, words)), stdin=terminal, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    os.close(terminal)
    line = server.stdout.readline()
    served = Served(server, int(line.split(",")[0].rsplit(":", 1)[1]), certs)
    job = served.start("--", "sh", "-c", WAITS)
    with served.popen("stream", "--retry-for", "0", job, stderr=subprocess.DEVNULL) as client:
        assert client.stdout.readline() == b"ready\n"
        os.write(master, b"\x03")
        told = server.communicate(timeout=PATIENCE)[1]
    os.close(master)
    assert (server.returncode, "1 job goes on" in told) == (0, True)
    with serving(state, certs) as served:
        assert served.run("status", job).stdout == f"jobID: {job}, status: RUNNING, exitCode: 0\n"


def test_a_service_manager_is_told_when_it_serves_and_when_it_stops(state, certs, tmp_path):
    """Also with standard input, output and error closed, as old daemons are started (sd_notify(3))."""
    for place, closed in ((str(tmp_path / "notify"), ""), ("@jobworker-test-" + os.urandom(8).hex(), "<&- >&- 2>&-")):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(place.replace("@", "\0"))
            manager.settimeout(PATIENCE)
            port = free_port()
            words = [
                *PROGRAM,
                "serve",
                "--certs",
                certs,
                "--state",
                state,
                "--listen",
                f"127.0.0.1:{port}",
                "--without",
                "auto",
                "--stop-jobs",
            ]
            command = f"exec {shlex.join(map(str, words))} {closed}"
            server = subprocess.Popen(["sh", "-c", command], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                      env={**os.environ, "NOTIFY_SOCKET": place})  # fmt: skip
            assert manager.recv(100) == b"READY=1"
            served = Served(server, port, certs)
            assert (
                served.run("stream", served.start("--", "sh", "-c", "ls -l /proc/self/fd | wc -l; echo err >&2")).stdout
                == "5\nerr\n"
            )
            server.send_signal(signal.SIGTERM)
            assert manager.recv(100) == b"STOPPING=1"
            assert server.wait(PATIENCE) == 0


def test_clients_that_vanish_leave_nothing_in_the_server(state, certs):
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


def test_clients_that_do_not_read_cost_bounded_memory_and_miss_nothing(state, certs):
    def memory():
        return int(re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{served.process.pid}/status").read_text())[1]) << 10

    size = 100 * MIB
    whole = hashlib.sha256(random.Random(7).randbytes(size)).digest()
    with serving(state, certs) as served, contextlib.ExitStack() as stack:
        job = served.start("--", PYTHON, "-c", WRITES_BYTES, str(size))
        slow = [stack.enter_context(served.popen("stream", job)) for _ in range(8)]
        for client in slow:
            stack.callback(client.kill)
        first = [client.stdout.read(1) for client in slow]
        end_of_stream(served, served.start("--", "true"))
        before = memory()
        with served.popen("stream", job) as fast:
            digest = hashlib.sha256()
            while part := fast.stdout.read(MIB):
                digest.update(part)
            assert digest.digest() == whole
        assert memory() - before < 64 * MIB
        for client, begun in zip(slow, first, strict=True):
            digest = hashlib.sha256(begun)
            while part := client.stdout.read(MIB):
                digest.update(part)
            assert digest.digest() == whole
            assert client.wait(PATIENCE) == 0


@pytest.mark.parametrize(
    "connect", [lambda served: socket.create_connection(("localhost", served.port)), tls_to], ids=["TCP", "TLS"]
)
def test_connections_that_say_nothing_are_closed_and_hold_up_nobody(shared, connect):
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
def cable():
    """A network of its own: its name, its link, and the address of this side."""
    name = f"jw{os.urandom(3).hex()}"
    net = random.SystemRandom().randrange(1, 250)
    here, there = f"10.203.{net}.1", f"10.203.{net}.2"
    ip("netns", "add", name)
    try:
        ip("link", "add", name, "type", "veth", "peer", "name", "far", "netns", name)
        ip("address", "add", f"{here}/24", "dev", name)
        ip("link", "set", name, "up")
        ip("-n", name, "address", "add", f"{there}/24", "dev", "far")
        ip("-n", name, "link", "set", "far", "up")
        yield name, here
    finally:
        subprocess.run(["ip", "link", "del", name], check=False)
        ip("netns", "del", name)


@pytest.mark.skipif(not can_make_networks(), reason="needs root, ip and network namespaces")
def test_a_cut_cable_frees_the_server_and_costs_the_client_no_byte(state, certs, tmp_path, cable):
    """Half open: neither side hears of the other's end. Both find out; the client goes on where it was."""
    name, address = cable
    folder = Path(shutil.copytree(certs, tmp_path / "certs"))
    with serving(state, folder, "--name", address, "--listen", f"{address}:0") as served:
        local = ("--server", f"{address}:{served.port}", "--certs", str(folder))

        def here(*words):
            return subprocess.run(
                [*PROGRAM, words[0], *local, *words[1:]],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=PATIENCE,
                check=True,
            ).stdout

        job = here("start", "--", "sh", "-c", "mkfifo gate; echo before; read line <gate; echo after; exit 6").split()[
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
                assert here_ended(here, job)
                ip("link", "set", name, "up")
                assert client.stdout.read() == b"after\n"
                assert client.wait(PATIENCE) == 0
            finally:
                client.kill()


def here_ended(here, job):
    return "FINISHED, exitCode: 6" in (here("stream", job), here("status", job))[1]


def test_an_ipv6_address_is_served_and_called(state, certs):
    if not jobworker.has_ipv6():
        pytest.skip("this machine has no IPv6")
    with serving(state, certs, "--listen", "[::1]:0") as served:
        job = served.run("start", "--server", f"[::1]:{served.port}", "--", "echo", "six").stdout.split()[-1]
        assert served.run("stream", "--server", f"[::1]:{served.port}", job).stdout == "six\n"
    with serving(state, certs, "--listen", ":0") as served:
        for host in ("[::1]", "127.0.0.1", "localhost"):
            assert served.run("status", "--server", f"{host}:{served.port}", job).returncode == 0


# --- 10. Client -----------------------------------------------------------------------------------------
# What a client says when it does not reach its server.


def test_an_unreachable_server_is_one_sentence_that_says_why(certs):
    with socket.socket() as silent, socket.socket() as refused:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        refused.bind(("127.0.0.1", 0))
        for place, why in (
            (f"127.0.0.1:{refused.getsockname()[1]}", "is `serve` running there?"),
            (f"127.0.0.1:{silent.getsockname()[1]}", "cannot reach"),
            ("no-such-host.invalid", "there is no host 'no-such-host.invalid'"),
        ):
            served = Served(None, 0, certs)
            for words in (("status", ID), ("stream", ID), ("start", "--", "true")):
                done = (
                    served.run(*words, "--server", place)
                    if words[0] != "start"
                    else served.run("start", "--server", place, *words[1:])
                )
                assert (done.returncode, done.stdout) == (1, "")
                assert done.stderr.startswith("jobworker: ")
                assert why in done.stderr
                assert done.stderr.count("\n") == 1


def served_names(folder):
    certificate = x509.load_pem_x509_certificate((folder / "server.pem").read_bytes())
    return {str(name.value) for name in jobworker.extension(certificate, x509.SubjectAlternativeName)}


def test_a_server_reached_by_another_name_is_told_with_the_remedy_that_works(state, certs, tmp_path):
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
    assert served_names(folder) == {"box.example", "localhost"}


def test_a_wrong_folder_of_certificates_is_told_which_file_is_wrong(shared, tmp_path):
    done = shared.run("status", ID, "--certs", str(tmp_path))
    assert done.returncode == 1
    assert f"{tmp_path}/server-ca.pem: No such file" in done.stderr
    stranger = tmp_path / "stranger"
    jobworker.prepare_folder(stranger, [])
    done = shared.run("status", ID, "--certs", str(stranger))
    assert done.returncode == 1
    assert f"is not trusted by {stranger}/server-ca.pem" in done.stderr
    shutil.copy(shared.certs / "server-ca.pem", stranger)
    done = shared.run("status", ID, "--certs", str(stranger))
    assert done.returncode == 1
    assert f"refuses {stranger}/user.pem" in done.stderr


def test_a_client_gives_up_after_the_time_that_it_was_given(state, certs):
    with serving(state, certs) as served:
        job = served.start("--", "sh", "-c", WAITS)
        client = served.popen("stream", "--retry-for", "1s", job, stderr=subprocess.PIPE)
        assert client.stdout.readline() == b"ready\n"
        served.process.kill()
        _, told = client.communicate(timeout=PATIENCE)
        assert client.returncode == 1
        assert b"gave up after 1 s" in told
        assert told.count(b"\n") == 2
    with serving(state, certs):
        pass  # it stops the job


SAYS = """
import socket, sys
with socket.create_server(("127.0.0.1", 0)) as server:
    print(server.getsockname()[1], flush=True)
    while True:
        connection = server.accept()[0]
        {}
"""
STRANGERS = [  # what listens there instead
    ("hangs up", "connection.close()"),
    ("ssh", "connection.sendall(b'SSH-2.0-OpenSSH_9.2\\r\\n'); connection.recv(9999); connection.close()"),
    ("http", "connection.recv(9999); connection.sendall(b'HTTP/1.1 400 Bad Request\\r\\n\\r\\n'); connection.close()"),
    (
        "a plain HTTP/2 server",
        "connection.recv(9999); connection.sendall(b'\\0\\0\\0\\4\\0\\0\\0\\0\\0'); connection.recv(9999)",
    ),
    ("TLS 1.2", ("-tls1_2",)),
    ("TLS 1.3 without HTTP/2", ("-tls1_3", "-www")),
    ("TLS 1.3 that then says nothing", ("-tls1_3", "-alpn", "h2", "-quiet")),
]


@pytest.fixture
def stranger(request, certs):
    """The port of a server of another kind."""
    if isinstance(request.param, str):
        words = [sys.executable, "-c", SAYS.format(request.param)]
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
    if quiet:  # then it does not say its port
        port = free_port()
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


@pytest.mark.parametrize("stranger", [row[1] for row in STRANGERS], ids=[row[0] for row in STRANGERS], indirect=True)
def test_a_port_that_is_something_else_is_said_in_one_sentence(certs, stranger):
    served = Served(None, stranger, certs)
    one_sentence(served.run("status", ID), f"localhost:{stranger}")
    one_sentence(served.run("stream", ID), f"localhost:{stranger}")


def test_an_answer_that_was_lost_with_its_server_costs_no_second_job(state, certs, tmp_path):
    _, armed = dying_copy(tmp_path, "return pb.StartJobResponse(ID=")
    (tmp_path / "gen").symlink_to(HERE / "gen")
    port = free_port()
    with serving(state, certs, program=(sys.executable, str(tmp_path / "jobworker.py")), port=port) as served:
        client = served.popen("start", "--", "sh", "-c", "echo once >>runs; cat runs", stderr=subprocess.PIPE)
        served.process.wait(PATIENCE)  # it died with the job begun and the answer unsent
        assert not armed.exists()
    with serving(state, certs, port=port) as served:
        out, told = client.communicate(timeout=PATIENCE)
        assert (client.returncode, told.count(b"\n")) == (0, 1)
        assert b"was lost" in told
        job = out.split()[-1].decode()
        assert served.run("stream", job).stdout == "once\n"
        assert [folder.name for folder in (state / "jobs").iterdir()] == [job]


@pytest.mark.parametrize("environment", [
    {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9", "grpc_proxy": "http://127.0.0.1:9"},
    {"GRPC_SSL_CIPHER_SUITES": "ECDHE-ECDSA-AES128-GCM-SHA256", "GRPC_VERBOSITY": "DEBUG", "GRPC_TRACE": "http"},
    {"GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": "/nowhere", "SSL_CERT_FILE": "/nowhere", "GRPC_DNS_RESOLVER": "native"},
    {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "ascii"},
], ids=lambda environment: next(iter(environment)))  # fmt: skip
def test_a_client_is_not_led_astray_by_its_environment(shared, environment):
    with_it = {**os.environ, "JOBWORKER_SERVER": shared.address, "JOBWORKER_CERTS": str(shared.certs), **environment}
    done = shared.run("start", "--", "printf", "%s", "ünï☃", env=with_it)
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run(
        [*PROGRAM, "stream", done.stdout.split()[-1]], env=with_it, capture_output=True, timeout=PATIENCE, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ünï☃".encode(), b"")


# --- 11. Certificates -----------------------------------------------------------------------------------
# What a folder must hold, and what is done with one that does not.


def serve_once(folder, state, *words):
    """`serve` that is expected to refuse."""
    return Served(None, 0, folder).run(
        "serve", "--certs", str(folder), "--state", str(state), "--listen", "127.0.0.1:0", "--without", "auto", *words
    )


def contents(folder):
    return {
        path.name: (path.read_bytes() if os.access(path, os.R_OK) else b"", path.stat().st_mode)
        for path in folder.iterdir()
    }


def test_an_empty_folder_is_filled_with_keys_for_their_owner_s_eyes_only(certs):
    assert {path.name for path in certs.iterdir()} == {*jobworker.MADE_FILES, "user2.pem", "user2.key"}
    for path in certs.iterdir():
        assert path.stat().st_mode & 0o777 == (0o600 if path.suffix == ".key" else 0o644)


@pytest.mark.parametrize("missing", ["server.pem", "server.key", "client-ca.pem"])
def test_a_half_filled_folder_is_refused_and_left_as_it_is(state, certs, tmp_path, missing):
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


@pytest.mark.parametrize(("name", "what", "told"), WRONG_FILES)
def test_a_folder_that_cannot_be_served_is_refused_in_one_sentence(state, certs, tmp_path, name, what, told):
    folder = Path(shutil.copytree(certs, tmp_path / "certs"))
    made = {"ed25519": openssl("genpkey", "-algorithm", "ed25519"), "another": (certs / "user.key").read_bytes()}
    (folder / name).write_bytes(made.get(what, what))
    before = contents(folder)
    done = serve_once(folder, state)
    assert done.returncode == 1
    assert told in done.stderr
    assert done.stderr.count("\n") == 1
    assert contents(folder) == before


def openssl(*words, **popen):
    return subprocess.run(
        ["openssl", *map(str, words)], check=True, capture_output=True, timeout=PATIENCE, **popen
    ).stdout


def by_hand(folder, name, issuer, extensions, *, key=("-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256")):
    """A key and a certificate as a person with openssl makes them."""
    (folder / f"{name}.key").write_bytes(openssl("genpkey", *key))
    (folder / "extensions").write_text(extensions)
    request = openssl("req", "-new", "-key", folder / f"{name}.key", "-subj", f"/CN={name}")
    signer = ("-signkey", folder / f"{name}.key") if issuer is None else (
        "-CA", folder / f"{issuer}.pem", "-CAkey", folder / f"{issuer}.key", "-CAcreateserial")  # fmt: skip
    made = openssl("x509", "-req", "-days", "30", *signer, "-extfile", folder / "extensions", input=request)
    (folder / f"{name}.pem").write_bytes(made)


@pytest.mark.parametrize("kind", [("-algorithm", "RSA"), ("-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384")])
def test_a_folder_made_by_hand_with_openssl_is_used_as_it_stands(state, tmp_path, kind):
    folder, ed25519 = tmp_path, ("-algorithm", "ed25519")
    authority = "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign\n"
    client = f"extendedKeyUsage=clientAuth\n{jobworker.ROLES_OID}=ASN1:UTF8String:"
    by_hand(folder, "server-ca", None, authority, key=ed25519)
    by_hand(folder, "client-ca", None, authority, key=ed25519)
    by_hand(
        folder,
        "server",
        "server-ca",
        "subjectAltName=DNS:localhost,IP:127.0.0.1\nextendedKeyUsage=serverAuth\n",
        key=kind,
    )
    by_hand(folder, "user", "client-ca", f"{client}user\n", key=kind)
    by_hand(folder, "boss", "client-ca", f"{client}user,admin\n", key=kind)
    for authority_key in folder.glob("*-ca.key"):
        authority_key.unlink()  # a folder without them is complete
    before = contents(folder)
    with serving(state, folder) as served:
        job = served.start("--", "echo", "by hand")
        assert served.run("stream", job, role="boss").stdout == "by hand\n"
        assert call(served, "GetJobStatus", pb.GetStatusRequest(id=job)).owner == "user"
    assert contents(folder) == before


def test_one_more_identity_is_one_command(state, certs, tmp_path):
    folder = Path(shutil.copytree(certs, tmp_path / "certs"))
    with serving(state, folder) as served:
        for name, more in (("alice", ()), ("chief", ("--admin",))):
            done = subprocess.run(
                [*PROGRAM, "identity", name, *more, "--certs", folder], capture_output=True, text=True, check=True
            )
            assert f"{folder}/{name}.pem" in done.stdout
        job = served.start("--", "echo", "hers", role="alice")
        assert served.run("status", job).returncode == 1
        assert served.run("stream", job, role="chief").stdout == "hers\n"
        again = subprocess.run(
            [*PROGRAM, "identity", "alice", "--certs", folder], capture_output=True, text=True, check=False
        )
        assert again.returncode == 1


def expire(folder):
    key, pem = certificate(jobworker.load_authority(folder, "server-ca"), days=-0.5, purposes=("SERVER_AUTH",))
    (folder / "server.key").write_bytes(key), (folder / "server.pem").write_bytes(pem)


def server_of_kind(folder, *kind):
    by_hand(folder, "server", "server-ca", "subjectAltName=DNS:localhost\nextendedKeyUsage=serverAuth\n", key=kind)


UNUSABLE = [  # what is done to a copy of a whole folder; what the sentence says
    ("a key with a password", lambda f: (f / "server.key").write_bytes(openssl("ec", "-in", f / "server.key", "-aes256", "-passout", "pass:x")), "password"),
    ("a certificate out of date", expire, "`serve --name NAME`"),
    ("a public key", lambda f: (f / "server.key").write_bytes(openssl("ec", "-in", f / "server.key", "-pubout")), "cannot be read"),
    ("DER", lambda f: (f / "server.pem").write_bytes(openssl("x509", "-in", f / "server.pem", "-outform", "DER")), "cannot be read"),
    ("a folder in a file's place", lambda f: ((f / "server.key").unlink(), (f / "server.key").mkdir()), "server.key"),
    ("a link to nowhere", lambda f: ((f / "server.pem").unlink(), (f / "server.pem").symlink_to("gone")), "server.pem"),
    ("an Ed448 key", lambda f: (f / "server.key").write_bytes(openssl("genpkey", "-algorithm", "ed448")), "cannot serve"),
    ("a curve that TLS 1.3 has not", lambda f: server_of_kind(f, "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:secp256k1"), "cannot serve"),
    ("a curve that BoringSSL does not offer", lambda f: server_of_kind(f, "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-521"), "cannot serve"),
    ("an RSA key that is too short", lambda f: server_of_kind(f, "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:512"), "cannot serve"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "spoil", "told"), UNUSABLE, ids=[row[0] for row in UNUSABLE])
def test_a_folder_with_one_unusable_file_is_refused_and_left_as_it_is(state, certs, tmp_path, what, spoil, told):
    folder = Path(shutil.copytree(certs, tmp_path / "certs"))
    spoil(folder)
    before = {path.name: path.is_file() and path.read_bytes() for path in folder.iterdir()}
    one_sentence(serve_once(folder, state), told)
    assert {path.name: path.is_file() and path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    "kind",
    [
        ("-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:1024"),
        ("-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:4096"),
    ],
)
def test_rsa_keys_of_other_sizes_are_served(state, certs, tmp_path, kind):
    folder = Path(shutil.copytree(certs, tmp_path / "certs"))
    server_of_kind(folder, *kind)
    with serving(state, folder) as served:
        assert served.run("stream", served.start("--", "echo", "rsa")).stdout == "rsa\n"


def test_a_renewed_server_certificate_is_one_option_and_an_expired_one_names_it(state, certs, tmp_path):
    folder = Path(shutil.copytree(certs, tmp_path / "certs"))
    expire(folder)
    with serving(state, folder, "--name", "localhost") as served:
        assert served.run("status", ID).stderr == f"jobworker: there is no job {ID}\n"


def test_a_name_without_the_authority_s_key_is_refused_and_changes_nothing(state, certs, tmp_path):
    folder = Path(shutil.copytree(certs, tmp_path / "certs"))
    (folder / "server-ca.key").unlink()
    before = contents(folder)
    one_sentence(serve_once(folder, state, "--name", "box.example"), "server-ca.key")
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["", "a..b", "no host", "x" * 70, "a/b", "a\nb"], ids=repr)
def test_a_name_that_no_host_has_is_wrong_usage_and_changes_nothing(state, certs, tmp_path, name):
    folder = Path(shutil.copytree(certs, tmp_path / "certs"))
    before = contents(folder)
    one_sentence(serve_once(folder, state, "--name", name), "neither a host's name nor an address", status=2)
    assert contents(folder) == before
    one_sentence(serve_once(tmp_path / "new", state, "--name", name), status=2)
    assert not (tmp_path / "new").exists()


def test_names_may_be_addresses_or_of_any_script_and_are_kept(certs, tmp_path):
    folder = Path(shutil.copytree(certs, tmp_path / "certs"))
    assert jobworker.prepare_folder(folder, ["10.9.8.7", "2001:db8::7", "bücher.example", "box"])
    made = (folder / "server.pem").read_bytes()
    names = jobworker.extension(x509.load_pem_x509_certificate(made), x509.SubjectAlternativeName)
    assert {"10.9.8.7", "2001:db8::7", "xn--bcher-kva.example", "box", "localhost"} <= {
        str(name.value) for name in names
    }
    assert jobworker.prepare_folder(folder, ["10.9.8.7", "bücher.example", "2001:DB8::7"]) == ""
    assert (folder / "server.pem").read_bytes() == made


def test_a_place_that_can_be_no_folder_of_certificates_is_said_in_one_sentence(state, tmp_path):
    (tmp_path / "file").write_text("x")
    one_sentence(serve_once(tmp_path / "file", state), f"{tmp_path}/file")
    one_sentence(serve_once(tmp_path / "file" / "below", state), f"{tmp_path}/file")
    assert (tmp_path / "file").read_text() == "x"
    one_sentence(serve_once(Path("/proc/nowhere"), state), "/proc/nowhere")


@needs_pyz
@as_root
def test_a_folder_that_may_not_be_read_is_refused_and_left_as_it_is(certs, tmp_path):
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
        for mode, told in ((0o755, "server.key: Permission denied"), (0o700, f"{folder}")):
            folder.chmod(mode)
            done = run_pyz(*words, str(folder), program=PYTHON_FOR_ALL, pyz=tmp_path / "jobworker.pyz", wrapper=user)
            one_sentence(done, told, "Permission denied")
        done = run_pyz(
            "status", ID, "--certs", str(folder), program=PYTHON_FOR_ALL, pyz=tmp_path / "jobworker.pyz", wrapper=user
        )
        one_sentence(done, "Permission denied", "--certs DIR")
    finally:
        shutil.rmtree("/var/tmp/jobworker-54321", ignore_errors=True)
    folder.chmod(0o755)
    assert contents(folder) == before


# --- 12. Command line -----------------------------------------------------------------------------------
# The lines and exit codes that scripts rely on.

UUID = "[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"


def test_the_lines_that_scripts_rely_on(shared):
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
]


@pytest.mark.parametrize(("words", "said"), COMMAND_LINES)
def test_what_follows_the_command_is_passed_on_verbatim(shared, words, said):
    assert shared.run("stream", shared.start(*words)).stdout == said


WRONG_USAGE = [
    ("no-such-verb",),
    ("start",),
    ("start", "--"),
    ("start", "--no-such-option", "--", "true"),
    ("start", "--memory", "much", "--", "true"),
    ("status",),
    ("status", "-j", ID, ID2),
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
    done = shared.run(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"jobworker: [^\n]+\n", done.stderr)


@pytest.mark.parametrize("verb", [*jobworker.VERBS, None])
def test_the_help_of_every_verb_is_enough(capsys, verb):
    assert jobworker.main([*([verb] if verb else []), "--help"]) == 0
    told = capsys.readouterr().out
    assert "usage: jobworker.pyz" in told
    assert all(name in told for name in ([] if verb else jobworker.VERBS))


def test_status_as_json_tells_all(shared):
    job = shared.start("--timeout", "1m", "--", "sh", "-c", "echo four; kill -TERM $$")
    shared.run("stream", job)
    facts = json.loads(shared.run("status", "--json", job).stdout)
    assert (facts["status"], facts["exitCode"], facts["signal"], facts["reason"]) == ("FINISHED", 143, 15, None)
    assert facts["command"] == ["sh", "-c", "echo four; kill -TERM $$"]
    assert (facts["owner"], facts["outputBytes"], facts["limits"]["timeout"]) == ("user", 5, 60)
    assert facts["created"] <= facts["started"] <= facts["ended"]


def test_control_c_ends_a_client_quietly_and_not_its_job(shared):
    job = shared.start("--", "sh", "-c", WAITS)
    client = shared.popen("stream", job, stderr=subprocess.PIPE)
    assert client.stdout.readline() == b"ready\n"
    client.send_signal(signal.SIGINT)
    assert client.communicate(timeout=PATIENCE) == (b"", b"")
    assert client.returncode == 130
    assert "RUNNING" in shared.run("status", job).stdout
    shared.run("stop", job)


def test_a_closed_pipe_ends_a_client_quietly(shared):
    job = shared.start("--", "yes")
    client = shared.popen("stream", job, stderr=subprocess.PIPE)
    assert client.stdout.read(4) == b"y\ny\n"
    client.stdout.close()
    assert client.stderr.read() == b""
    client.stderr.close()
    assert client.wait(PATIENCE) == 128 + signal.SIGPIPE
    shared.run("stop", job)


def test_binary_output_arrives_byte_for_byte(shared):
    job = shared.start("--", PYTHON, "-c", WRITES_BYTES, "300000")
    with shared.popen("stream", job) as client:
        assert client.stdout.read() == random.Random(7).randbytes(300_000)


@pytest.mark.parametrize(("text", "place"), [
    ("box", ("box", 8010)), ("box:1", ("box", 1)), (":9", ("", 9)), ("[::1]:7", ("::1", 7)), ("::1", ("::1", 8010)), ("10.0.0.1:80", ("10.0.0.1", 80)),
])  # fmt: skip
def test_a_place_is_a_host_and_a_port(text, place):
    assert jobworker.host_and_port(text) == place


@pytest.mark.parametrize(("convert", "text", "value"), [
    (jobworker.as_bytes, "512M", 512 * MIB), (jobworker.as_bytes, "1.5G", 3 << 29), (jobworker.as_bytes, "10k", 10 * KIB), (jobworker.as_bytes, "7", 7),
    (jobworker.as_bytes, "1GiB", 1 << 30), (jobworker.as_seconds, "90", 90), (jobworker.as_seconds, "10s", 10), (jobworker.as_seconds, "10m", 600),
    (jobworker.as_seconds, "7d", 604800), (jobworker.as_cpus, "0.5", 0.5), (jobworker.as_share, "5%", 0.05), (jobworker.as_share, "0.1", 0.1),
])  # fmt: skip
def test_quantities_read_as_people_write_them(convert, text, value):
    assert convert(text) == value


def test_the_folder_of_certificates_here_is_used_only_if_nobody_else_could_have_made_it(tmp_path, monkeypatch):
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


CANNOT_RUN = [  # the words after `start`; the exit status; words of the sentence
    (("--", "no-such-command"), 1, (jobworker.JOB_PATH,)),
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


@pytest.mark.parametrize(("words", "status", "told"), CANNOT_RUN, ids=repr)
def test_what_cannot_be_started_is_one_sentence_and_its_exit_status(shared, words, status, told):
    one_sentence(shared.run("start", *words), *told, status=status)


@pytest.mark.parametrize("words", [("stop",), ("status",), ("status", "--json"), ("stream",), ("rm",)], ids=" ".join)
def test_every_verb_says_alike_that_there_is_no_such_job(shared, words):
    assert shared.run(*words, ID2).stderr == f"jobworker: there is no job {ID2}\n"
    one_sentence(shared.run(*words, ID2))
    one_sentence(shared.run(*words, ID2.upper()), "lower case")
    foreign = shared.start("--", "true", role="user2")
    one_sentence(shared.run(*words, foreign), f"there is no job {foreign}")


def test_a_running_job_is_not_forgotten(shared):
    job = shared.start("--", "sleep", "1000")
    one_sentence(shared.run("rm", job), "stop it first")
    assert shared.run("stop", job, role="admin").stdout == f"stopped Job: {job}\n"


def test_a_loop_with_options_of_its_own_is_passed_on_and_seen_live(shared):
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
def test_the_common_options_stand_anywhere_after_the_verb_and_outrank_the_environment(shared, words):
    job = shared.start("--", "true", role="user2")
    shared.run("stream", job, role="user2")
    filled = [word.format(id=job, server=shared.address, certs=shared.certs) for word in words]
    elsewhere = {**os.environ, "JOBWORKER_SERVER": "localhost:1", "JOBWORKER_CERTS": "/nowhere"}
    done = subprocess.run(
        [*PROGRAM, *filled], env=elsewhere, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (done.stdout, done.stderr) == (f"jobID: {job}, status: FINISHED, exitCode: 0\n", "")


def test_an_empty_variable_or_option_is_none(shared, tmp_path):
    """`--certs "$UNSET"` fills no working directory with keys."""
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


def test_a_wrong_environment_is_wrong_usage(shared):
    one_sentence(shared.run("status", ID, env={**os.environ, "JOBWORKER_SERVER": "x:y:z"}), "x:y:z", status=2)


def test_one_id_at_the_command_line_is_one_job(shared):
    job = jobworker.new_job_id()
    for _ in range(2):
        assert shared.run("start", "--id", job, "--", "echo", "once").stdout == f"started JobID: {job}\n"
    one_sentence(shared.run("start", "--id", job, "--", "echo", "twice"), "taken")
    assert shared.run("stream", job).stdout == "once\n"
    assert shared.run("stream", "--offset", "2", job).stdout == "ce\n"


FACTS = {"id", "status", "exitCode", "reason", "signal", "stoppedBy", "owner", "command", "user", "created", "started", "ended", "outputBytes",
         "usage", "limits", "notes"}  # fmt: skip


def test_the_keys_of_status_as_json_are_always_there(shared):
    job = shared.start("--", "sleep", "1000")
    running = json.loads(shared.run("status", "--json", job).stdout)
    shared.run("stop", job, role="admin")
    stopped = json.loads(shared.run("status", "--json", job).stdout)
    for facts in (running, stopped):
        assert set(facts) >= FACTS
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


@pytest.mark.parametrize("words", [("stream",), ("status",), ("status", "--json")], ids=" ".join)
def test_output_that_cannot_be_written_is_one_sentence(shared, words):
    job = shared.start("--", "echo", "x")
    shared.run("stream", job)
    done = in_shell(shared, (*words, job), ">/dev/full")
    one_sentence(done, "No space left on device")


def in_shell(served, words, redirections):
    """A client command behind a shell's redirections or pipes."""
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
    """And nothing that it opens becomes standard output: ssh and login do so too."""
    job = shared.start("--", PYTHON, "-c", WRITES_BYTES.replace("sys.stdout.buffer.write", "print"), "1000")
    shared.run("stream", job)
    done = in_shell(shared, (*words, job), closed)
    assert (done.returncode, done.stderr, done.stdout == "") == (0, "", ">&-" in closed.replace("2>&-", ""))
    failed = in_shell(shared, (*words, ID2), closed)
    assert failed.returncode == 1
    assert failed.stdout == ""


def test_a_pipe_that_was_read_enough_of_ends_a_client_quietly(shared):
    job = shared.start("--", "yes")
    done = in_shell(shared, ("stream", job), "| head -c 10")
    assert (done.returncode, done.stdout, done.stderr) == (0, "y\n" * 5, "")
    shared.run("stop", job)


@pytest.mark.parametrize("verb", jobworker.VERBS)
def test_the_help_of_a_verb_reaches_a_terminal(verb):
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
def test_systemd_understands_the_unit(tmp_path, words):
    file = tmp_path / "jobworker.service"
    file.write_text(unit(*words))
    scope = ["--user"] if "--user" in words else []
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", *scope, file], capture_output=True, text=True, timeout=PATIENCE, check=False,
                          env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)})  # fmt: skip
    assert "jobworker.service" not in done.stderr


def test_a_unit_restarts_its_server_and_leaves_its_jobs_alone():
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
    assert f'ExecStart={sys.executable} {HERE}/jobworker.py serve --state "/srv/my jobs/100%% $$HOME"' in lines
    assert "WantedBy=default.target" in unit("--user").splitlines()


def test_where_certificates_and_state_are_by_default_depends_on_who_asks():
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
        config, kept = (environment.get(name, f"{environment.get('HOME', '/')}/{below}".replace("//", "/")) for name, below in
                        (("XDG_CONFIG_HOME", ".config"), ("XDG_STATE_HOME", ".local/state")))  # fmt: skip
        expected = "/etc/jobworker /var/lib/jobworker" if uid == 0 else f"{config}/jobworker {kept}/jobworker"
        assert done.stdout.strip() == expected, done.stderr


# --- The .pyz -------------------------------------------------------------------------------------------
# One file that runs anywhere, or says why not. ./build.sh test has built it.


def run_pyz(*words, program=LIKE_PYZ, pyz=PYZ, wrapper=(), **environment):
    whole = {"PATH": os.environ["PATH"], **environment}
    return subprocess.run([*wrapper, str(program), str(pyz), *words], env=whole, cwd="/", stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, timeout=PATIENCE, check=False)  # fmt: skip


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
        assert (done.returncode, done.stdout) == (0, f"jobworker {jobworker.VERSION}\n")
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
    assert {run.communicate(timeout=PATIENCE)[0] for run in runs} == {f"jobworker {jobworker.VERSION}\n".encode()}
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
    for wrapper, environment in (
        (mounted, {}),
        (mounted, {"HOME": "/nowhere"}),
        (other, {}),
        (other, {"HOME": "/root"}),
    ):
        done = run_pyz("--version", program=PYTHON_FOR_ALL, pyz=place / "jobworker.pyz", wrapper=wrapper, **environment)
        assert (
            done.stdout == f"jobworker {jobworker.VERSION}\n"
            or "is for CPython" in done.stderr
            or "needs" in done.stderr
        ), done.stderr
    shutil.rmtree("/var/tmp/jobworker-54321", ignore_errors=True)


@needs_pyz
@as_root
def test_a_cache_that_another_could_have_written_is_not_used(tmp_path):
    tmp_path.chmod(0o755)
    (tmp_path / "jobworker").mkdir()
    os.chown(tmp_path / "jobworker", 12345, 12345)
    done = run_pyz("--version", XDG_CACHE_HOME=str(tmp_path), HOME=str(tmp_path / "none"))
    assert done.stdout == f"jobworker {jobworker.VERSION}\n"
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
    assert done.stdout == f"jobworker {jobworker.VERSION}\n"
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


# --- Outliving the server -------------------------------------------------------------------------------
# Whole servers that are killed, replaced, restarted by systemd, or lose their power.


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def launchers_of(process):
    return [child for child in children(process) if b"launcher_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


CHATTERS = """
import os, random, sys, time
seed, gate = int(sys.argv[1]), sys.argv[2]
chance, said = random.Random(seed), 0
pause = (0.02, 0.1, 0.3)[seed % 3]
while os.path.exists(gate):  # it cannot end before the test lets it
    sys.stdout.buffer.write(chance.randbytes(chance.choice((1, 80, 4096, 20_000))))
    sys.stdout.buffer.flush()
    said += 1
    time.sleep(pause)
sys.stdout.buffer.write(b"<%d>" % said)
sys.exit(seed % 200)
"""
LONG_CHAOS = os.environ.get("JOBWORKER_CHAOS") == "long"
PYZ_PROGRAM = (str(LIKE_PYZ), str(PYZ))


def chatter(seed, received):
    """All that such a job says, from how often it says it did."""
    said = int(received.rsplit(b"<", 1)[1].rstrip(b">"))
    chance = random.Random(seed)
    return b"".join(chance.randbytes(chance.choice((1, 80, 4096, 20_000))) for _ in range(said)) + b"<%d>" % said


class Chatting:
    """Jobs of different speeds, each followed by a client; each talks until it is let go."""

    def __init__(self, stack, folder, mark, seed):
        self.stack, self.folder, self.mark, self.seed = stack, folder, mark, seed
        self.gates = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jobworker-gates-")))
        self.gates.chmod(0o711)
        self.ids, self.followers = {}, {}

    def start(self, served, channel, number):
        gate = self.gates / str(number)
        gate.touch()  # with the folder all jobs end, however the test does
        command = ["-c", CHATTERS, str(self.seed + number), str(gate), self.mark]
        self.ids[number] = ask(channel, "StartJob", pb.StartJobRequest(cmd=PYTHON, args=command)).ID
        with (self.folder / str(number)).open("wb") as file, (self.folder / f"{number}.err").open("wb") as errors:
            self.followers[number] = self.stack.enter_context(
                pyz_client(served, "stream", self.ids[number], stdout=file, stderr=errors)
            )

    def received(self, number):
        return (self.folder / str(number)).stat().st_size

    def told(self, number):
        """What a follower that ended before its time has said."""
        return self.followers[number].poll() is not None and (
            number,
            self.followers[number].returncode,
            (self.folder / f"{number}.err").read_text(),
        )

    def check_they_go_on(self, served, numbers):
        before = {number: self.received(number) for number in numbers}
        for number in numbers:
            until(
                lambda: self.received(number) > before[number] or self.told(number) or served.process.poll() is not None  # noqa: B023
            )
            assert served.process.poll() is None, "the server died by itself"
            assert not self.told(number)

    def check_they_run(self, served, numbers):
        with channel_to(served) as channel:
            states = [
                ask(channel, "GetJobStatus", pb.GetStatusRequest(id=self.ids[number])).status for number in numbers
            ]
        assert set(states) == {pb.RUNNING}
        assert all(self.followers[number].poll() is None for number in numbers)

    def check_lives(self, served):
        for number, job in self.ids.items():
            assert self.followers[number].wait(10 * PATIENCE) == 0
            received = (self.folder / str(number)).read_bytes()
            assert received == chatter(self.seed + number, received)
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
def test_no_byte_and_no_exit_code_is_lost_to_servers_that_are_killed(state, certs, tmp_path, mark):
    """The server is killed while jobs run and are followed, while it starts itself, and while a job is being started;
    its launcher too. Some jobs end after each kill."""
    jobs, kills = (50, 20) if LONG_CHAOS else (8, 4)
    seed = int.from_bytes(os.urandom(4), "big")
    print("seed:", seed)
    chance, port, once = random.Random(seed), free_port(), []
    with contextlib.ExitStack() as stack:
        chatting = Chatting(stack, tmp_path, mark, seed)

        def serving_here(how=signal.SIGKILL):
            return serving(state, certs, program=PYZ_PROGRAM, port=port, end=how)

        with serving_here() as served, channel_to(served) as channel:
            for number in range(jobs):
                chatting.start(served, channel, number)
            until(lambda: all(map(chatting.received, range(jobs))))  # who has reached the server tries again
        for kill in range(kills):
            server = spawn(state, certs, port, program=PYZ_PROGRAM)
            time.sleep(chance.random())  # a random moment of its own start is the point
            end(server)
            alive = range(kill * jobs // kills, jobs)
            with serving_here() as served:
                chatting.check_they_go_on(served, alive)
                if chance.random() < 0.5:
                    kill_the_launcher(served)
                once.append(jobworker.new_job_id())
                client = stack.enter_context(
                    pyz_client(served, "start", "--id", once[-1], "--", "sh", "-c", f"echo {kill}")
                )
                time.sleep(chance.random())  # a random moment of a start is the point
                chatting.check_they_run(served, alive)
            for number in range(kill * jobs // kills, (kill + 1) * jobs // kills):
                (chatting.gates / str(number)).unlink()  # it ends while no server is there, or the next one starts
            client.kill()
        with serving_here(signal.SIGTERM) as served:
            chatting.check_lives(served)
            check_they_ran_once(served, once)
            check_nothing_odd(served, state, mark, {*chatting.ids.values(), *once})


def kill_the_launcher(served):
    os.kill(launchers_of(served.process.pid)[0], signal.SIGKILL)
    assert served.run("stream", served.start("--", "echo", "still")).stdout == "still\n"


def check_they_ran_once(served, ids):
    """Tried again they ran once, whether or not they were there."""
    for number, job in enumerate(ids):
        assert served.start("--id", job, "--", "sh", "-c", f"echo {number}") == job
        assert served.run("stream", job).stdout == f"{number}\n"


def check_nothing_odd(served, state, mark, ids):
    """Nothing is left of jobs that have ended, but their folders, each whole."""
    assert ids <= set(left_in(state))
    for job in left_in(state):
        assert b"done" in (state / "jobs" / job / "events").read_bytes()
    assert not list((state / "quarantine").glob("*"))
    assert jobs_cgroups(state) == []
    assert processes_with(mark) == []
    assert len(launchers_of(served.process.pid)) == 1
    until(lambda: watches_of(served) == 0)
    used = kinds_of(served)
    assert served.run("stream", served.start("--", "echo", "last")).stdout == "last\n"
    until(lambda: watches_of(served) == 0 and kinds_of(served) == used)


def kinds_of(served):
    """A server's descriptors, but for the connections that its clients leave in their own time."""
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
OUTCOMES = {
    "OK",
    "NOT_FOUND",
    "FAILED_PRECONDITION",
    "DEADLINE_EXCEEDED",
    "UNAVAILABLE",
}  # the last: its launcher was killed


def any_call(channel, ids, chance, mark):
    """One call of any kind; the name of its outcome."""
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


def any_harm(served, chance):
    """A reload, a killed launcher, a killed shim, or a stranger that says rubbish."""
    harm = chance.choice(("reload", "launcher", "shim", "rubbish", "rubbish"))
    with contextlib.suppress(OSError, IndexError):  # there is none, or not any more
        if harm == "reload":
            served.process.send_signal(signal.SIGHUP)
        elif harm == "rubbish":
            with socket.create_connection(("127.0.0.1", served.port), PATIENCE) as stranger:
                stranger.sendall(chance.randbytes(500))
        else:
            launcher = launchers_of(served.process.pid)[0]
            os.kill(launcher if harm == "launcher" else chance.choice(sorted(children(launcher))), signal.SIGKILL)


@pytest.mark.chaos
def test_whatever_happens_at_once_the_server_stands_and_nothing_is_left(state, certs, mark):
    seed, calls, ids = int.from_bytes(os.urandom(4), "big"), 1500 if LONG_CHAOS else 100, []
    print("seed:", seed)

    def user(number):
        chance = random.Random(seed + number)
        with channel_to(served, role=chance.choice(("user", "admin"))) as channel:
            return {any_call(channel, ids, chance, mark) for _ in range(calls)}

    with serving(state, certs) as served, concurrent.futures.ThreadPoolExecutor(6) as users:
        busy = [users.submit(user, number) for number in range(6)]
        chance = random.Random(seed)
        while not all(one.done() for one in busy):
            any_harm(served, chance)
            concurrent.futures.wait(busy, chance.random() * 0.2)
        assert set().union(*(one.result() for one in busy)) <= OUTCOMES
        assert served.process.poll() is None, "the server died by itself"
        with channel_to(served, role="admin") as channel:
            for job in left_in(state):
                ask(channel, "StopJob", pb.StopJobRequest(id=job))
                ask(channel, "GetOutputStream", pb.GetStreamRequest(id=job))
        assert served.run("stream", served.start("--", "echo", "still")).stdout == "still\n"
        check_nothing_odd(served, state, mark, set())


@needs_pyz
def test_a_newer_pyz_takes_over_from_the_old_under_running_jobs(state, certs, tmp_path):
    newer = tmp_path / "newer"
    newer.mkdir()
    for name in (
        "build.sh",
        "gen",
        "jobworker.py",
        "pyproject.toml",
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
    place, port = tmp_path / "jobworker.pyz", free_port()
    shutil.copy(PYZ, place)
    environment = {"PATH": os.environ["PATH"], "XDG_CACHE_HOME": str(tmp_path)}
    program = (str(LIKE_PYZ), str(place))
    with serving(state, certs, program=program, port=port, end=signal.SIGKILL, env=environment) as served:
        job = served.start("--", "sh", "-c", "mkfifo gate; echo before; read line <gate; echo after; exit 6")
        assert served.run("stream", served.start("--", "echo", "old")).stdout == "old\n"
        os.replace(newer / "jobworker.pyz", place)
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
    """A server whose jobs outlive it, however it ends; it may not listen yet."""
    words = [
        "serve",
        "--certs",
        certs,
        "--state",
        state,
        "--listen",
        f"127.0.0.1:{port}",
        "--without",
        "auto",
        "--reserve",
        "0",
    ]
    return subprocess.Popen([*program, *map(str, words), *options], stdin=subprocess.DEVNULL, text=True,
                            **{"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, **popen})  # fmt: skip


def end(server, how=signal.SIGKILL):
    """End a server; its exit code and what it said."""
    server.send_signal(how)
    told = server.communicate(timeout=PATIENCE)
    return server.returncode, *told


@contextlib.contextmanager
def killed(server, certs, port):
    """A server that listens and is killed at the end of the block."""
    try:
        line = server.stdout.readline()
        assert line.startswith("jobworker: serving on "), line
        yield Served(server, port, Path(certs))
    finally:
        if server.poll() is None:
            end(server)


def first_line(served, job):
    with served.popen("stream", job) as stream:
        return stream.stdout.readline()


def test_a_server_whose_log_cannot_be_written_does_its_work(state, certs, tmp_path):
    """Its standard output and error are on a disk that is full, or a pipe that nobody reads any more."""
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
            port, served = free_port(), None
            server = spawn(
                state, certs, port, stdout=log, stderr=log, env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / sink)}
            )
            try:
                assert manager.recv(100) == b"READY=1"
                served = Served(server, port, certs)
                job = served.start("--", "sh", "-c", "echo $PPID; exec sleep 1000")
                with served.popen("stream", job) as stream:
                    os.kill(int(stream.stdout.readline()), signal.SIGKILL)  # which is a line in the log
                    assert stream.wait(PATIENCE) == 0
                assert served.run("status", job).stdout == f"jobID: {job}, status: FINISHED, exitCode: 255\n"
                server.send_signal(signal.SIGHUP)
                assert served.run("stream", served.start("--", "echo", "still")).stdout == "still\n"
            finally:
                assert end(server, signal.SIGTERM)[0] == 0


def test_a_follower_that_reads_slowly_resumes_when_its_server_is_told_to_end(state, certs):
    """The server cannot finish such a stream within its grace."""
    port, size = free_port(), 40 * MIB
    server = spawn(state, certs, port, stderr=subprocess.PIPE)
    with killed(server, certs, port) as served:
        job = served.start("--", PYTHON, "-c", WRITES_BYTES, str(size))
        stream = served.popen("stream", job, stderr=subprocess.DEVNULL)
        first = stream.stdout.read(1000)
        assert end_of_stream(served, job).exitcode == 0
        code, _, told = end(server, signal.SIGTERM)
        assert code == 0
        assert all(line.startswith("jobworker: ") for line in told.splitlines())
    with stream, serving(state, certs, port=port):
        assert first + stream.stdout.read() == random.Random(7).randbytes(size)
        assert stream.wait(PATIENCE) == 0


def test_a_server_killed_on_a_full_disk_starts_again_and_finishes_what_runs(small_disk, certs):
    port = free_port()
    waits = "mkfifo gate$0; echo $PPID; read line <gate$0; echo two; exit 5"
    with killed(spawn(small_disk, certs, port), certs, port) as served:
        ended = served.start("--", "sh", "-c", "echo kept; exit 3")
        assert end_of_stream(served, ended).exitcode == 3
        running, stopped, lost = (served.start("--", "sh", "-c", waits, str(number)) for number in range(3))
        shims = [first_line(served, job) for job in (running, stopped, lost)]
    fabricate(small_disk, ID, b"born at=1.0 .\n", "none")  # what must be set aside needs a folder
    fill(small_disk)
    fillers = small_disk / "fillers"
    with contextlib.suppress(OSError):  # ext4 has some blocks more for folders than for files
        fillers.mkdir()
        for number in range(500):
            (fillers / str(number)).mkdir()
    os.kill(int(shims[2]), signal.SIGKILL)
    with killed(spawn(small_disk, certs, port), certs, port) as served:
        assert call(served, "GetOutputStream", pb.GetStreamRequest(id=ended)) == b"kept\n"
        assert end_of_stream(served, ended).exitcode == 3
        for role in ("user", "admin"):  # one who has a home, and one who has none
            assert call(served, "StartJob", pb.StartJobRequest(cmd="true"), role=role)[0] == "RESOURCE_EXHAUSTED"
        assert (end_of_stream(served, lost).exitcode, end_of_stream(served, lost).reason) == (255, "LOST")
        assert served.run("stop", stopped).returncode == 0
        assert end_of_stream(served, stopped).status == pb.STOPPED
        (home,) = (small_disk / "home").iterdir()
        (home / "gate0").write_text("go\n")
        assert (end_of_stream(served, running).status, end_of_stream(served, running).exitcode) == (pb.FINISHED, 5)
    with killed(spawn(small_disk, certs, port), certs, port) as served:
        assert [end_of_stream(served, job).exitcode for job in (ended, running, stopped, lost)] == [3, 5, 137, 255]
        for job in (ended, stopped):
            assert served.run("rm", job).returncode == 0
        (filler,) = small_disk.glob("filler-*")
        filler.unlink()
        shutil.rmtree(fillers, ignore_errors=True)
        for role in ("user", "admin"):
            assert served.run("stream", served.start("--", "echo", "room", role=role), role=role).stdout == "room\n"
    with killed(spawn(small_disk, certs, port), certs, port):
        assert ID not in left_in(small_disk)  # set aside, now that there is room for it


@pytest.mark.parametrize("free", range(7))
@as_root
def test_a_start_without_inodes_is_refused_and_leaves_nothing(nothing_is_left, certs, tmp_path, free):
    """A tmpfs with so many inodes left; the first start of an owner takes nine."""
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
place = ctypes.addressof(room).to_bytes(8, sys.byteorder) + (16).to_bytes(8, sys.byteorder)  # struct iovec

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
    "signal all others": lambda: [os.kill(p, 9) for p in others],
    "signal by pidfd": lambda: signal.pidfd_send_signal(pidfd(), 9),
    "descriptors by pidfd": lambda: [syscall(438, pidfd(), n, 0) for n in range(3, 12)],
    "trace": lambda: syscall(101, 16, shim, 0, 0),
    "seize": lambda: syscall(101, 0x4206, shim, 0, 0),
    "memory": lambda: os.open(f"/proc/{shim}/mem", os.O_RDWR),
    "read its memory": lambda: syscall(310, shim, place, 1, place, 1, 0),
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
if os.fork() == 0:  # as root of a user namespace, where there is one to be had
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
os.kill(-1, 9) if os.fork() == 0 else signal.pause()  # all that is its own: that is the job's end
"""


@as_root
def test_a_job_with_every_weapon_of_its_uid_reaches_nothing_of_what_keeps_it(state, certs):
    with serving(state, certs) as served:
        neighbour = served.start("--", "sh", "-c", WAITS, role="admin")
        job = served.start("--", str(PYTHON_FOR_ALL), "-c", ATTACKS, str(state))
        status = end_of_stream(served, job)
        assert call(served, "GetOutputStream", pb.GetStreamRequest(id=job)) == b"no more\n"
        assert (status.status, status.exitcode, status.reason) == (pb.FINISHED, 137, "")
        assert call(served, "GetJobStatus", pb.GetStatusRequest(id=neighbour), role="admin").status == pb.RUNNING
        assert served.run("stream", served.start("--", "echo", "still")).stdout == "still\n"


@as_root
def test_what_is_left_of_a_lost_job_is_killed_in_whatever_tree_an_earlier_server_had(state, certs, mark, nested):
    port = free_port()
    with killed(spawn(state, certs, port, "--cgroup", f"{nested.path}/one"), certs, port) as served:
        job = served.start("--", "sh", "-c", f"echo $PPID; sh -c 'trap \"\" TERM; sleep 1000; : {mark}' & wait")
        shim = first_line(served, job)
        assert len(jobs_cgroups(state)) == 1
    os.kill(int(shim), signal.SIGKILL)
    with serving(state, certs, "--cgroup", f"{nested.path}/two", port=port) as served:
        assert (end_of_stream(served, job).exitcode, end_of_stream(served, job).reason) == (255, "LOST")
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


LIMIT_NAMES = ("cpu.max", "memory.max", "memory.swap.max", "memory.oom.group", "pids.max", "io.max")
UNIT_EVENTS = [  # each with whether another process serves after it
    ([("restart", "jobworker-test")], True),
    ([("kill", "--kill-whom=main", "--signal=KILL", "jobworker-test")], True),  # systemd starts it again by itself
    ([("daemon-reload",)], False),
    ([("daemon-reexec",)], False),
    ([("reload", "jobworker-test")], False),
    ([("stop", "jobworker-test"), ("daemon-reload",), ("start", "jobworker-test")], True),
]


@pytest.mark.systemd
@needs_pyz
def test_no_job_ends_when_systemd_restarts_reloads_or_loses_its_server(nothing_is_left, certs):
    state, port = new_state(nothing_is_left, "/scratch"), free_port()
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
            'mkfifo gate; exec 3<>gate; echo ready; while read line <&3; do echo "$line"; [ "$line" != end ] || exit 7; done',
        )
        (home,), (cgroup,) = (state / "home").iterdir(), jobs_cgroups(state)
        limits = {name: (cgroup / name).read_text() for name in LIMIT_NAMES if (cgroup / name).exists()}
        assert limits.keys() == set(LIMIT_NAMES)
        assert limits["memory.max"] == f"{512 * MIB}\n"
        assert "wbps=" in limits["io.max"]
        assert "jobworker-test" not in str(cgroup)
        with pyz_client(served, "stream", job, stdout=subprocess.PIPE) as stream:
            assert stream.stdout.readline() == b"ready\n"
            processes = (cgroup / "cgroup.procs").read_text()
            for number, (event, another) in enumerate(UNIT_EVENTS):
                main = main_process("jobworker-test")
                for words in event:
                    systemctl(*words)
                (home / "gate").write_text(f"after {number}\n")
                assert stream.stdout.readline() == b"after %d\n" % number
                if another:
                    until(lambda: main_process("jobworker-test") not in {0, main})  # noqa: B023
                assert (main_process("jobworker-test") != main) == another, event
                assert (cgroup / "cgroup.procs").read_text() == processes, event
                assert {name: jobworker.kernel_read(f"{cgroup}/{name}") for name in limits} == limits, event
                assert served.run("stream", served.start("--", "echo", "new")).stdout == "new\n"
            (home / "gate").write_text("end\n")
            assert stream.stdout.read() == b"end\n"
            assert stream.wait(PATIENCE) == 0
        assert "FINISHED, exitCode: 7" in served.run("status", job).stdout
    finally:
        systemctl("stop", "jobworker-test")
        unit.unlink()
        systemctl("daemon-reload")


@pytest.mark.systemd
@needs_pyz
def test_a_user_serves_from_a_scope_of_their_manager_and_is_told_so_elsewhere(nothing_is_left, certs, tmp_path):
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


def before_the_cut(folder):
    """In a guest that is about to lose its power: jobs that ended, that run, and that are being started."""
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
                (folder / "now").touch()  # and the power is gone


def after_the_cut(folder):
    """In the next guest, on the same disk."""
    running, ended = json.loads((folder / "reported").read_text())
    with serving("/scratch/state", folder / "certs") as served:
        for job, number in ended.items():
            assert call(served, "GetOutputStream", pb.GetStreamRequest(id=job)) == random.Random(7).randbytes(
                number * 100_000
            )
            status = call(served, "GetJobStatus", pb.GetStatusRequest(id=job))
            assert (status.status, status.exitcode, status.reason) == (pb.FINISHED, number, "")
        for job in running:
            status = end_of_stream(served, job)
            assert (
                status[0] == "NOT_FOUND"
                if isinstance(status, tuple)
                else (status.exitcode, status.reason) == (255, "LOST")
            )
        assert served.run("stream", served.start("--", "echo", "new")).stdout == "new\n"
        for folder_ in Path("/scratch/state/jobs").iterdir():
            end_of_stream(served, folder_.name)


def no_guest():
    """Why there can be no guest here, if so."""
    if Path("/scratch").is_dir():
        return "this is a guest already"
    return (
        ""
        if os.geteuid() == 0 and os.uname().machine == "x86_64" and shutil.which("linux.uml")
        else "needs root, x86_64 and user-mode-linux"
    )


@pytest.mark.skipif(no_guest() != "", reason=no_guest())
def test_what_was_reported_before_a_power_cut_is_there_after_it(certs):
    with tempfile.TemporaryDirectory(prefix=".power-", dir=HERE) as name:
        folder = Path(name)
        shutil.copytree(certs, folder / "certs")
        body = "import pathlib, test_jobworker as t; t.jobworker.prepare_grpc(); t.{}(pathlib.Path({!r}))"
        boot = [HERE / ".ci" / "guest", "--timeout", "300", "--disk-image", folder / "disk"]
        first = subprocess.run([*boot, "--power-cut-when", folder / "now", "--", sys.executable, "-c", body.format("before_the_cut", name)],
                               stdin=subprocess.DEVNULL, cwd=HERE, capture_output=True, text=True, check=False)  # fmt: skip
        assert first.returncode == 137, first.stdout + first.stderr
        second = subprocess.run([*boot, "--", sys.executable, "-c", body.format("after_the_cut", name)],
                                stdin=subprocess.DEVNULL, cwd=HERE, capture_output=True, text=True, check=False)  # fmt: skip
        assert second.returncode == 0, second.stdout + second.stderr
