#!/usr/bin/env python3
"""Measure Job worker, each figure beside a peer or floor that is measured in the same run.

    ./build.sh bench [--quick] [--json] [ITEM...]        ITEM: stream latency speed starts calls scale growth

Real servers, real mTLS, loopback only. A figure is the median of its rounds, with the smallest and the largest;
trust ratios before figures, since both sides of one were measured on the same machine in the same minute.

Contents: 1. rows and the table, 2. servers, clients, processes, 3. streams and latency, 4. a job's own speed,
5. starts and calls, 6. scale and growth, 7. command line.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import math
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jobworker
from jobworker import CLIENT_OPTIONS, MIB, count_of, grpc, pb

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

HERE = Path(__file__).resolve().parent
PYZ = HERE / "jobworker.pyz"
UNIVERSAL = HERE / "dist" / "jobworker.pyz"
OURS, FLOOR = jobworker.SERVICE_NAME, "floor"
PYTHON = shutil.which("python3", path=jobworker.JOB_PATH) or sys.executable

# --- 1. Rows and the table ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure: its rounds, and those of its peer or floor."""

    what: str
    unit: str
    rounds: list[float]
    peer: str = ""
    peer_rounds: list[float] = dataclasses.field(default_factory=list)

    def ratio(self) -> float | None:
        return statistics.median(self.rounds) / statistics.median(self.peer_rounds) if self.peer_rounds else None


def spread(rounds: list[float]) -> str:
    if not rounds:
        return ""
    middle = statistics.median(rounds)
    digits = 0 if middle >= 100 else 1 if middle >= 10 else 2
    text = f"{middle:.{digits}f}"
    return text if len(rounds) == 1 else f"{text} ({min(rounds):.{digits}f} to {max(rounds):.{digits}f})"


def print_table(rows: list[Row]) -> None:
    print(f"{machine()}\n\n| what | figure | peer or floor | ratio |\n|---|---|---|---|")
    for row in rows:
        ratio = "" if row.ratio() is None else f"{row.ratio():.2f}"
        print(f"| {row.what} | {spread(row.rounds)} {row.unit} | {row.peer} {spread(row.peer_rounds)} | {ratio} |")


def machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    versions = f"Python {platform.python_version()}, grpcio {grpc.__version__}, jobworker {jobworker.VERSION}"
    return f"{os.cpu_count()} cores, {memory:.0f} GiB, Linux {os.uname().release}, {versions}"


def quantile(values: list[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * part))]


# --- 2. Servers, clients, processes ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Server:
    process: subprocess.Popen[str]
    port: int
    certs: Path

    def channel(self) -> Any:
        files = [(self.certs / name).read_bytes() for name in ("server-ca.pem", "user.key", "user.pem")]
        options = [*CLIENT_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]  # a connection of its own
        credentials = grpc.ssl_channel_credentials(*files)
        return grpc.aio.secure_channel(f"localhost:{self.port}", credentials, options)

    def cpu(self) -> float:
        """Seconds of CPU that its threads have used, by the scheduler's own count."""
        tasks = Path(f"/proc/{self.process.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9

    def memory(self) -> float:
        return kilobytes(f"/proc/{self.process.pid}/status", "VmRSS") / 1e3  # resident MB


def kilobytes(file: str, *keys: str) -> float:
    lines = (line.split() for line in Path(file).read_text().splitlines())
    return sum(int(words[1]) for words in lines if words[0].rstrip(":").startswith(keys)) * 1.024


@contextlib.contextmanager
def running(words: list[str], certs: Path) -> Iterator[Server]:
    """A server that has said that it listens, ended by its pid."""
    words, log = [sys.executable, *words], certs.parent / "log"
    with log.open("w") as errors:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if "serving on" not in line:
            raise SystemExit(f"bench: the server did not start: {log.read_text()}")
        yield Server(process, int(line.split(",")[0].rsplit(":", 1)[1]), certs)
    finally:
        process.terminate()
        process.wait()


def serving(folder: Path) -> contextlib.AbstractContextManager[Server]:
    words = f"serve --listen 127.0.0.1:0 --without auto --reserve 0 --max-output 4G --stop-jobs --state {folder}/state"
    return running([str(PYZ), *words.split(), "--certs", f"{folder}/certs"], folder / "certs")


def floor(folder: Path) -> contextlib.AbstractContextManager[Server]:
    return running([__file__, "--floor", f"{folder}/certs"], folder / "certs")


async def serve_floor(certs: Path) -> None:
    """A bare grpc.aio server with no job behind it: `offset` zeros, or ticks, so many seconds apart as the id says; a status."""
    chunk, bell, stamp, ticker = bytes(jobworker.READ_BYTES), jobworker.Bell(), b"", None

    async def tick(pause: float) -> None:
        nonlocal stamp
        while True:
            await asyncio.sleep(pause)
            stamp = b"%020d\n" % time.monotonic_ns()
            bell.ring()

    async def stream(message: Any, context: Any) -> None:
        nonlocal ticker
        for _ in range(message.offset // len(chunk)):
            await context.write(chunk)
        if message.id:
            ticker = ticker or asyncio.create_task(tick(float(message.id)))
        while message.id:
            await bell.wait()
            await context.write(stamp)

    async def status(_message: Any, _context: Any) -> Any:
        return pb.GetStatusResponse(status=pb.RUNNING)

    key, pem, authorities = ((certs / name).read_bytes() for name in ("server.key", "server.pem", "client-ca.pem"))
    server = grpc.aio.server(options=jobworker.SERVER_OPTIONS)
    reads, writes = pb.GetStreamRequest.FromString, pb.GetStatusResponse.SerializeToString
    handlers: dict[str, Any] = {
        "GetOutputStream": grpc.unary_stream_rpc_method_handler(stream, reads, jobworker.frame_result),
        "GetJobStatus": grpc.unary_unary_rpc_method_handler(status, reads, writes),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(FLOOR, handlers),))
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, pem)], authorities, True))
    await server.start()
    print(f"serving on 127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


async def call(channel: Any, method: str, request: Any, reply: Any, service: str = OURS) -> Any:
    path = f"/{service}/{method}"
    return await channel.unary_unary(path, type(request).SerializeToString, reply.FromString)(request)


async def start(channel: Any, *words: str) -> str:
    request = pb.StartJobRequest(cmd=words[0], args=words[1:])
    return str((await call(channel, "StartJob", request, pb.StartJobResponse)).ID)


def stream(channel: Any, job: str, offset: int = 0, service: str = OURS) -> AsyncIterator[bytes]:
    path = f"/{service}/GetOutputStream"
    ask = channel.unary_stream(path, pb.GetStreamRequest.SerializeToString, jobworker.result_of)
    return ask(pb.GetStreamRequest(id=job, offset=offset))  # type: ignore[no-any-return]


async def drain(channel: Any, job: str, offset: int = 0, service: str = OURS) -> int:
    return sum([len(chunk) async for chunk in stream(channel, job, offset, service)])


async def timed(work: Awaitable[Any]) -> float:
    began = time.perf_counter()
    await work
    return time.perf_counter() - began


def timed_process(*words: str, **more: str) -> float:
    began = time.perf_counter()
    subprocess.run(words, env={**os.environ, **more}, check=True, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    return time.perf_counter() - began


@contextlib.contextmanager
def sshd(folder: Path) -> Iterator[list[str]]:
    """The words of an ssh to a server of our own on loopback; none where no sshd is installed, or starts."""
    program = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None or shutil.which("ssh") is None:
        yield []
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for name in ("host", "me"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    files = (f"HostKey={folder}/host", f"AuthorizedKeysFile={folder}/me.pub", f"PidFile={folder}/pid")
    fixed = ("StrictModes=no", "UsePAM=no", "ListenAddress=127.0.0.1")
    os.makedirs("/run/sshd", exist_ok=True)
    words = [program, "-D", "-e", "-f", "/dev/null", "-p", str(port), *(f"-o{o}" for o in (*files, *fixed))]
    process = subprocess.Popen(words, stderr=subprocess.PIPE)
    try:
        assert process.stderr is not None
        quiet = ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "IdentitiesOnly=yes")
        ssh = ["ssh", "-p", str(port), "-i", f"{folder}/me", *(f"-o{o}" for o in quiet), "127.0.0.1"]
        yield ssh if b"listening" in process.stderr.readline() else []
    finally:
        process.terminate()
        process.communicate()


# --- 3. Streams and latency -----------------------------------------------------------------------------


async def stream_rate(many: int, size: int, *stream: Any) -> float:
    """So many streams of `size` bytes at once, in MB/s."""
    return many * size / 1e6 / await timed(asyncio.gather(*(drain(*stream) for _ in range(many))))


async def bench_stream(folder: Path, quick: bool) -> list[Row]:
    size, rounds = (48 if quick else 512) * MIB, 3 if quick else 5
    ours: dict[int, list[float]] = {1: [], 8: []}
    bare: dict[int, list[float]] = {1: [], 8: []}
    by_ssh = []
    with serving(folder) as server, floor(folder) as other, sshd(folder) as ssh:
        async with server.channel() as one, other.channel() as two:
            job = await start(one, "head", "-c", str(size), "/dev/zero")
            assert await drain(one, job) == size
            for _ in range(rounds):
                for many, rates in ours.items():
                    rates.append(await stream_rate(many, size, one, job))
                    bare[many].append(await stream_rate(many, size, two, "", size, FLOOR))
                if ssh:
                    by_ssh.append(size / 1e6 / timed_process(*ssh, "cat", f"{folder}/state/jobs/{job}/output"))
    what = f"of {size // MIB} MiB"
    rows = [
        Row(f"{count_of(many, 'stream', 'streams')} {what}", "MB/s", rates, "bare grpc.aio", bare[many])
        for many, rates in ours.items()
    ]
    peer = "ssh cat" if ssh else "no sshd here"
    return [*rows, Row(f"1 stream {what}", "MB/s", ours[1], peer, by_ssh)]


TICKS = """
import os, sys, time
while True:
    time.sleep(float(sys.argv[1]))
    os.write(1, b"%020d\\n" % time.monotonic_ns())
"""


@dataclasses.dataclass
class Ticks:
    """What all followers of one job have seen of its ticks since `settled` (ns): how late (ms), in how many messages."""

    settled: float = math.inf
    arrived: int = 0
    messages: int = 0
    late: list[float] = dataclasses.field(default_factory=list)

    async def follow(self, chunks: AsyncIterator[bytes]) -> None:
        new = True
        async for chunk in chunks:
            now = time.monotonic_ns()
            self.arrived, new = self.arrived + new, False
            ticks = [int(line) for line in chunk.split()]
            self.late.extend((now - tick) / 1e6 for tick in ticks if tick > self.settled)
            self.messages += ticks[-1] > self.settled


async def latency_of(server: Server, many: int, seconds: float, service: str = OURS) -> list[float]:
    """p50 and p99 of the lateness of all ticks at all followers (ms), server CPU a message (µs), its memory (MB)."""
    seen, pause = Ticks(), str(max(0.05, many * 4e-4))  # so rare that a core is half idle
    async with contextlib.AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(server.channel()) for _ in range(many)]
        for channel in channels:  # one by one: a crowd of handshakes is not what is measured
            await channel.channel_ready()
        job = await start(channels[0], PYTHON, "-c", TICKS, pause) if service == OURS else pause
        tasks = [asyncio.create_task(seen.follow(stream(channel, job, 0, service))) for channel in channels]
        while seen.arrived < many and not any(task.done() for task in tasks):
            await asyncio.sleep(0.1)
        await asyncio.sleep(1)
        seen.settled, before = time.monotonic_ns(), server.cpu()
        await asyncio.sleep(seconds)
        used, memory = server.cpu() - before, server.memory()
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        if service == OURS:
            await call(channels[0], "StopJob", pb.StopJobRequest(id=job), pb.StopJobResponse)
    return [quantile(seen.late, 0.5), quantile(seen.late, 0.99), used / seen.messages * 1e6, memory]


async def latency_without_grpc(state: Path, seconds: float) -> list[float]:
    """How late the ticks of a job are in a `Worker` (ms): what job, shim and follower take, with no gRPC behind them."""
    seen, options = Ticks(), jobworker.WorkerOptions(state, without=frozenset({"auto"}), reserve=0)
    async with jobworker.Worker(options) as worker:
        job = await worker.start(jobworker.JobRequest(PYTHON, ("-c", TICKS, "0.05"), owner="bench"))
        task = asyncio.create_task(seen.follow(worker.stream(job)))
        await asyncio.sleep(1)
        seen.settled = time.monotonic_ns()
        await asyncio.sleep(seconds)
        await worker.stop(job)
        await task
    return seen.late


async def bench_latency(folder: Path, quick: bool) -> list[Row]:
    rows, rounds, seconds = [], 2 if quick else 3, 2 if quick else 10
    alone = [quantile(await latency_without_grpc(folder / "alone", seconds), 0.5) for _ in range(rounds)]
    names = {"write() to client, p50": "ms", "write() to client, p99": "ms", "server CPU a message": "µs", "RSS": "MB"}
    for many in (1, 100, *(() if quick else (1000,))):
        ours, bare = [], []
        for _ in range(rounds):
            with serving(folder) as server:
                ours.append(await latency_of(server, many, seconds))
            with floor(folder) as other:
                bare.append(await latency_of(other, many, seconds, FLOOR))
        sides = zip(names.items(), zip(*ours, strict=True), zip(*bare, strict=True), strict=True)
        rows += [
            Row(f"{count_of(many, 'follower', 'followers')}: {name}", unit, list(mine), "bare grpc.aio", list(its))
            for (name, unit), mine, its in sides
        ]
    both = [ours + bare for ours, bare in zip(alone, rows[0].peer_rounds, strict=True)]
    rows.insert(1, dataclasses.replace(rows[0], peer="bare grpc.aio + all but gRPC", peer_rounds=both))
    return rows


# --- 4. A job's own speed -------------------------------------------------------------------------------


async def until_ended(channel: Any, job: str) -> int:
    """Wait without following; the bytes of its output."""
    request, reply = pb.GetStatusRequest(id=job), pb.GetStatusResponse
    while (status := await call(channel, "GetJobStatus", request, reply)).status == pb.RUNNING:
        await asyncio.sleep(0.02)
    return int(status.output_bytes)


def seconds_told(text: bytes) -> float:
    """How long a `dd` says, at the end of what it prints, that it took."""
    return float(text.rsplit(b"copied, ", 1)[1].split()[0])


async def speed_of(server: Server, followers: int, *words: str) -> float:
    """Seconds that a `dd` says it took, as a job with so many followers."""
    async with server.channel() as channel:
        job = await start(channel, "dd", "if=/dev/zero", *words)
        await asyncio.gather(*(drain(channel, job) for _ in range(followers)))
        size = await until_ended(channel, job)
        last = b"".join([chunk async for chunk in stream(channel, job, max(0, size - 100))])
        await call(channel, "RemoveJob", pb.RemoveJobRequest(id=job), pb.RemoveJobResponse)
        return seconds_told(last)


def piped(*words: str) -> float:
    """Seconds that a `dd` says it took into a pipe that `cat` empties: what any pipe costs a job."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as cat:
        told = subprocess.run(
            ["dd", "if=/dev/zero", *words], stdout=cat.stdin, stderr=subprocess.PIPE, check=True, env={"LC_ALL": "C"}
        )
    return seconds_told(told.stderr)


async def forget_own_file(server: Server) -> None:
    async with server.channel() as channel:
        await drain(channel, await start(channel, "rm", "own-file"))


async def bench_speed(folder: Path, quick: bool) -> list[Row]:
    rows, rounds, blocks = [], 3 if quick else 5, 256 if quick else 1024
    shapes = {"500,000 lines": ("bs=80", "count=500000"), f"{blocks} MiB": ("bs=1M", f"count={blocks}")}
    crowds = (0, 1) if quick else (0, 1, 20)
    with serving(folder) as server:
        for what, words in shapes.items():
            took: dict[int, list[float]] = {crowd: [] for crowd in crowds}
            own, pipe = [], []
            for _ in range(rounds):
                pipe.append(piped(*words))
                own.append(await speed_of(server, 0, *words, "of=own-file"))
                await forget_own_file(server)  # else the next writes beside its write-back
                for crowd, seconds in took.items():
                    seconds.append(await speed_of(server, crowd, *words))
            rows += [
                Row(f"dd writes {what}, {count_of(crowd, 'follower', 'followers')}", "s", seconds, "own file", own)
                for crowd, seconds in took.items()
            ]
            rows.append(Row(f"dd writes {what}, 0 followers", "s", took[0], "a pipe to cat", pipe))
    return rows


# --- 5. Starts and calls --------------------------------------------------------------------------------


async def start_rate(channel: Any, count: int, at_once: int) -> float:
    """Starts a second, so many at a time."""
    left = iter(range(count))

    async def some() -> None:
        for _ in left:
            await start(channel, "true")

    return count / await timed(asyncio.gather(*(some() for _ in range(at_once))))


async def start_to_end(channel: Any) -> None:
    await drain(channel, await start(channel, "true"))


async def stop_to_dead(channel: Any) -> float:
    request = pb.StopJobRequest(id=await start(channel, "sleep", "1000"))
    return 1e3 * await timed(call(channel, "StopJob", request, pb.StopJobResponse))


def folder_made(place: Path, number: int) -> float:
    """What a job's folder alone costs on this file system: its FIFO and three files, in ms."""
    began, folder = time.perf_counter(), place / str(number)
    folder.mkdir()
    os.mkfifo(folder / "control")
    for name in ("job.json", "output", "events"):
        (folder / name).touch()
    return 1e3 * (time.perf_counter() - began)


FORKS = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import jobworker
jobworker.prepare_launcher("", jobworker.resource.getrlimit(jobworker.resource.RLIMIT_NOFILE))
while os.read(0, 1):
    began = time.perf_counter()
    reader, writer = os.pipe2(os.O_CLOEXEC)
    if os.fork() == 0:
        if os.fork() == 0:
            os.execv("/bin/true", ["true"])
        os._exit(0)
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)
    os.write(1, b"%f\\n" % (1e3 * (time.perf_counter() - began)))
"""


@contextlib.contextmanager
def forks() -> Iterator[Callable[[], float]]:
    """A process like the launcher, which tells at each call what the shim's fork, the job's fork and its exec cost alone, in ms."""
    words = [sys.executable, "-I", "-S", "-c", FORKS, str(HERE)]
    with subprocess.Popen(words, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        asked, told = process.stdin, process.stdout
        assert asked is not None
        assert told is not None
        yield lambda: float(told.readline() if asked.write(b"x") else "nan")


def systemd_run() -> list[float]:
    """The same by systemd-run, its end read from `systemctl show`, in ms; nothing where there is no systemd."""
    if Path("/proc/1/comm").read_text().strip() != "systemd":
        return []
    took = []
    for number in range(10):
        unit = f"bench-{os.getpid()}-{number}"
        began = time.perf_counter()
        subprocess.run(["systemd-run", "--quiet", "--remain-after-exit", f"--unit={unit}", "true"], check=True)
        while b"exited" not in subprocess.check_output(["systemctl", "show", unit, "-pSubState"]):
            pass
        took.append(1e3 * (time.perf_counter() - began))
        subprocess.run(["systemctl", "stop", unit], check=True)
    return took


async def bench_starts(folder: Path, quick: bool) -> list[Row]:
    count = 60 if quick else 200
    one_by_one, parts, plain, made = [], [], [], []
    with serving(folder) as server, floor(folder) as other, forks() as fork:
        async with server.channel() as channel, other.channel() as its:
            await start_rate(channel, 20, 1)
            for number in range(count):  # in turns of ten: a shared machine may be half as fast a second later
                if number % 10 == 0:
                    one_by_one += [1e3 * await timed(start(channel, "true")) for _ in range(10)]
                made.append(folder_made(folder, number))
                parts.append(made[-1] + fork() + 1e3 / await status_rate(its, "", 1, FLOOR, 1))
                plain.append(1e3 * timed_process("true"))
            sparse = [await asyncio.sleep(0.15, 1e3) * await timed(start(channel, "true")) for _ in range(count // 4)]
            rates = [await start_rate(channel, 2 * count, 16) for _ in range(3)]
            whole = [1e3 * await timed(start_to_end(channel)) for _ in range(count // 2)]
            stops = [await stop_to_dead(channel) for _ in range(count // 4)]
    by_systemd = systemd_run()
    return [
        Row("StartJob, one after the other", "ms", one_by_one, "a call, a folder, two forks, an exec", parts),
        Row("StartJob, one after the other", "ms", one_by_one, "subprocess.run true", plain),
        Row("StartJob, one each 150 ms", "ms", sparse, "its folder alone", made),
        Row("StartJob, 16 at a time", "/s", rates),
        Row("start to end known", "ms", whole, "systemd-run" if by_systemd else "no systemd here", by_systemd),
        Row("stop to dead", "ms", stops),
    ]


async def status_rate(channel: Any, job: str, count: int, service: str = OURS, at_once: int = 16) -> float:
    """Calls a second."""

    async def some() -> None:
        for _ in range(count // at_once):
            await call(channel, "GetJobStatus", pb.GetStatusRequest(id=job), pb.GetStatusResponse, service)

    return count / await timed(asyncio.gather(*(some() for _ in range(at_once))))


async def bench_calls(folder: Path, quick: bool) -> list[Row]:
    rounds = 7 if quick else 15
    program = [sys.executable, str(PYZ)]
    with serving(folder) as server, floor(folder) as other, sshd(folder) as ssh:
        async with server.channel() as channel, other.channel() as its:
            job = await start(channel, "true")
            rates, bare = [], []
            for _ in range(3):
                rates.append(await status_rate(channel, job, 1600))
                bare.append(await status_rate(its, job, 1600, FLOOR))
        where = {"JOBWORKER_SERVER": f"localhost:{server.port}", "JOBWORKER_CERTS": str(server.certs)}
        processes: dict[str, Callable[[], float]] = {
            "status": lambda: timed_process(*program, "status", job, **where),
            "start": lambda: timed_process(*program, "start", "--", "true", **where),
            "pass": lambda: timed_process(sys.executable, "-c", "pass"),
            "import": lambda: timed_process(sys.executable, "-c", "import grpc"),
            "ssh": lambda: timed_process(*ssh, "true") if ssh else 0.0,
        }
        took: dict[str, list[float]] = {name: [] for name in processes}
        for _ in range(rounds):
            for name, measure in processes.items():
                took[name].append(1e3 * measure())
    by_ssh = ("ssh true", took["ssh"]) if ssh else ("no sshd here",)
    return [
        *start_of_the_universal_file(folder, rounds),
        Row("status calls, 16 at a time", "/s", rates, "bare grpc.aio", bare),
        Row("`status` as a process, from the .pyz", "ms", took["status"], "python -c 'import grpc'", took["import"]),
        Row("`status` as a process, from the .pyz", "ms", took["status"], "python -c pass", took["pass"]),
        Row("`start` as a process, from the .pyz", "ms", took["start"], *by_ssh),
    ]


def start_of_the_universal_file(folder: Path, rounds: int) -> list[Row]:
    """Its first run, and a later one beside the ordinary file's."""
    if not UNIVERSAL.exists():
        return []
    words = [sys.executable, str(UNIVERSAL), "--help"]
    first = [1e3 * timed_process(*words, XDG_CACHE_HOME=f"{folder}/cache{number}") for number in range(3)]
    timed_process(*words)  # it is unpacked from here on
    took: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for place, times in zip((UNIVERSAL, PYZ), took, strict=True):
            times.append(1e3 * timed_process(sys.executable, str(place), "--help"))
    return [
        Row("`--help` as a process, from the universal .pyz", "ms", took[0], "from the ordinary .pyz", took[1]),
        Row("its first run, which unpacks", "ms", first),
    ]


# --- 6. Scale and growth --------------------------------------------------------------------------------


def make_ended(folder: Path, count: int) -> None:
    """So many ended jobs: copies of one, each under an id of its own."""
    jobs = folder / "state" / "jobs"
    model = next(path for path in jobs.iterdir() if b"done" in (path / "events").read_bytes())
    for _ in range(count):
        shutil.copytree(model, jobs / jobworker.new_job_id(), ignore=shutil.ignore_patterns("control"))


def shim_memory(server: Server) -> list[float]:
    """Private memory of some shims, in MB."""
    launcher = next(iter(Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()))
    shims = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [kilobytes(f"/proc/{shim}/smaps_rollup", "Private_Clean", "Private_Dirty") / 1e3 for shim in shims[:20]]


async def idle_cpu(server: Server, seconds: float) -> float:
    """Milliseconds of CPU that a server uses in so many seconds."""
    first = server.cpu()
    await asyncio.sleep(seconds)
    return (server.cpu() - first) * 1e3


def restart_seconds(folder: Path, *, leave: bool = False) -> float:
    """Until it listens; its jobs then go on, or are stopped."""
    began = time.perf_counter()
    with serving(folder) as server:
        took = time.perf_counter() - began
        if leave:
            server.process.kill()
    return took


async def bench_scale(folder: Path, quick: bool) -> list[Row]:
    jobs, ended, seconds = (100, 1000, 3) if quick else (1000, 10_000, 10)
    empty = folder / "empty"
    shutil.copytree(folder / "certs", empty / "certs")
    bare_restarts = [restart_seconds(empty) for _ in range(3)]
    with serving(folder) as server:
        async with server.channel() as channel:
            await drain(channel, await start(channel, "true"))
    make_ended(folder, ended)
    with serving(folder) as server, floor(folder) as other:
        async with server.channel() as channel, other.channel() as its:
            alone = [1e3 * await timed(start(channel, "true")) for _ in range(50)]
            ids = [await start(channel, "sleep", "1000") for _ in range(jobs)]
            loaded = [1e3 * await timed(start(channel, "true")) for _ in range(50)]
            statuses = [1e3 / await status_rate(channel, job, 1, at_once=1) for job in ids]
            memory, shims = server.memory(), shim_memory(server)
            await status_rate(its, "", jobs, FLOOR, 1)  # gRPC keeps the threads of busier times: as many calls for both
        await asyncio.sleep(1)
        idle = await idle_cpu(server, seconds)
        bare_idle = await idle_cpu(other, seconds)
        server.process.kill()
    restarts = [restart_seconds(folder, leave=number < 2) for number in range(3)]
    what = f"{jobs} running, {ended} ended"
    return [
        Row(f"server RSS, {what}", "MB", [memory]),
        Row("private memory of a shim", "MB", shims),
        Row(f"idle CPU in {seconds} s, {what}", "ms", [idle], "bare grpc.aio", [bare_idle]),
        Row(f"status, p99, {what}", "ms", [quantile(statuses, 0.99)]),
        Row(f"restart to listening, {what}", "s", restarts, "with no jobs", bare_restarts),
        Row(f"StartJob with {jobs} running", "ms", loaded, "with none running", alone),
    ]


def exponent(small: float, large: float) -> float:
    return math.log10(large / small)  # for ten times as much


async def bench_growth(folder: Path, quick: bool) -> list[Row]:
    few, many = (10, 100) if quick else (100, 1000)
    with serving(folder) as server:
        async with server.channel() as channel:
            sizes = [await start(channel, "head", "-c", str(size * MIB), "/dev/zero") for size in (25, 250)]
            for job in sizes:
                await drain(channel, job)
            seconds = [statistics.median([await timed(drain(channel, job)) for _ in range(3)]) for job in sizes]
            cpus = [(await latency_of(server, crowd, 3))[2] for crowd in (few // 10, few)]
            starts = []
            for more in (few, many - few):
                for _ in range(more):
                    await start(channel, "sleep", "1000")
                starts.append(statistics.median([await timed(start(channel, "true")) for _ in range(40)]))
    return [
        Row("time of a stream, 25 to 250 MiB", "exponent", [exponent(*seconds)]),
        Row(f"server CPU of a tick, {few // 10} to {few} followers", "exponent", [1 + exponent(*cpus)]),
        Row(f"time of a start, {few} to {many} running jobs", "exponent", [exponent(*starts)]),
    ]


# --- 7. Command line ------------------------------------------------------------------------------------

BENCHES = (bench_stream, bench_latency, bench_speed, bench_starts, bench_calls, bench_scale, bench_growth)
ITEMS = {bench.__name__.partition("_")[2]: bench for bench in BENCHES}


def measure(item: str, quick: bool) -> list[Row]:
    """One item on servers, certificates and a state folder of its own."""
    print(f"{time.strftime('%T')} measuring {item} ...", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="jobworker-bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o711)  # on the way to the homes of jobs
        jobworker.prepare_folder(folder / "certs", [])
        return asyncio.run(ITEMS[item](folder, quick))


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("items", nargs="*", metavar="ITEM", help=f"of {' '.join(ITEMS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller sizes")
    parser.add_argument("--json", action="store_true", help="the rounds of all figures")
    parser.add_argument("--floor", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    jobworker.prepare_grpc()
    if options.floor:
        asyncio.run(serve_floor(options.floor))
        return
    jobworker.raise_file_limit()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as a Ctrl-C: what was started is ended
    if unknown := set(options.items) - set(ITEMS):
        parser.error(f"there is no item {', '.join(unknown)}")
    if not PYZ.exists():
        parser.error(f"there is no {PYZ} to measure; `./build.sh pyz` makes it")
    rows = [row for item in options.items or ITEMS for row in measure(item, options.quick)]
    if options.json:
        print(
            json.dumps({"machine": machine(), "rows": [{**vars(row), "ratio": row.ratio()} for row in rows]}, indent=2)
        )
    else:
        print_table(rows)


if __name__ == "__main__":
    main()
