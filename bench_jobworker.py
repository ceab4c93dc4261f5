#!/usr/bin/env python3
"""Measure Job worker, each figure beside a peer or floor that is measured in the same run.

    ./build.sh bench [--quick] [--json] [ITEM...]        ITEM: stream latency speed starts calls scale growth

Real servers, real mTLS, loopback only. A figure is the median of its rounds, with the smallest and the largest;
trust ratios before figures, since both sides of one were measured on the same machine in the same minute.

Contents
    1. Rows and the table
    2. Servers, clients, processes
    3. Streams and latency
    4. A job's own speed
    5. Starts and calls
    6. Scale and growth
    7. Command line
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jobworker
from jobworker import MIB, grpc, pb

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

HERE = Path(__file__).resolve().parent
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

    def figure(self) -> float:
        return statistics.median(self.rounds)

    def ratio(self) -> float | None:
        return self.figure() / statistics.median(self.peer_rounds) if self.peer_rounds else None


def spread(rounds: list[float]) -> str:
    if not rounds:
        return ""
    middle = statistics.median(rounds)
    digits = 0 if middle >= 100 else 1 if middle >= 10 else 2
    text = f"{middle:.{digits}f}"
    return text if len(rounds) == 1 else f"{text} ({min(rounds):.{digits}f} to {max(rounds):.{digits}f})"


def print_table(rows: list[Row]) -> None:
    print("| what | figure | peer or floor | ratio |\n|---|---|---|---|")
    for row in rows:
        ratio = "" if row.ratio() is None else f"{row.ratio():.2f}"
        print(f"| {row.what} | {spread(row.rounds)} {row.unit} | {row.peer} {spread(row.peer_rounds)} | {ratio} |")


def machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    return (
        f"{os.cpu_count()} cores, {memory:.0f} GiB, Linux {os.uname().release}, Python {platform.python_version()}, "
        f"grpcio {importlib.metadata.version('grpcio')}, jobworker {jobworker.VERSION}"
    )


def quantile(values: list[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * part))]


# --- 2. Servers, clients, processes ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Server:
    """A process that serves on loopback, and what its clients need."""

    process: subprocess.Popen[str]
    port: int
    certs: Path

    def channel(self) -> Any:
        files = [(self.certs / name).read_bytes() for name in ("server-ca.pem", "user.key", "user.pem")]
        credentials = grpc.ssl_channel_credentials(*files)
        return grpc.aio.secure_channel(f"localhost:{self.port}", credentials, jobworker.CLIENT_OPTIONS)

    def cpu(self) -> float:
        """Seconds of CPU that it has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> float:
        """Resident MB."""
        return kilobytes(f"/proc/{self.process.pid}/status", "VmRSS") / 1e3


def kilobytes(file: str, *keys: str) -> float:
    lines = (line.split() for line in Path(file).read_text().splitlines())
    return sum(int(words[1]) for words in lines if words[0].rstrip(":").startswith(keys)) * 1.024


@contextlib.contextmanager
def running(words: list[str], certs: Path) -> Iterator[Server]:
    """A server that has said that it listens, ended by its pid."""
    log = tempfile.TemporaryFile()  # noqa: SIM115  closed below, when the server has ended
    process = subprocess.Popen(
        [sys.executable, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if "serving on" not in line:
            log.seek(0)
            raise SystemExit(f"bench: the server did not start: {log.read().decode()}")
        yield Server(process, int(line.split(",")[0].rsplit(":", 1)[1]), certs)
    finally:
        process.terminate()
        process.wait()
        log.close()


def serving(folder: Path, *more: str) -> contextlib.AbstractContextManager[Server]:
    words = ["serve", "--listen", "127.0.0.1:0", "--certs", str(folder / "certs"), "--state", str(folder / "state")]
    fixed = ["--without", "auto", "--reserve", "0", "--max-output", "4G", "--stop-jobs"]
    return running([str(HERE / "jobworker.py"), *words, *fixed, *more], folder / "certs")


def floor(folder: Path) -> contextlib.AbstractContextManager[Server]:
    return running([str(HERE / "bench_jobworker.py"), "--floor", str(folder / "certs")], folder / "certs")


async def serve_floor(certs: Path) -> None:
    """A bare grpc.aio server: as many bytes as the `offset` of a request says, with no job behind them."""
    chunk = bytes(jobworker.READ_BYTES)

    async def stream(message: Any, context: Any) -> None:
        for _ in range(message.offset // len(chunk)):
            await context.write(chunk)

    files = [(certs / name).read_bytes() for name in ("server.key", "server.pem", "client-ca.pem")]
    server = grpc.aio.server(options=jobworker.SERVER_OPTIONS)
    handler = grpc.unary_stream_rpc_method_handler(stream, pb.GetStreamRequest.FromString, jobworker.frame_result)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("floor", {"GetOutputStream": handler}),))
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([tuple(files[:2])], files[2], True))
    await server.start()
    print(f"serving on 127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


async def call(channel: Any, method: str, request: Any, reply: Any) -> Any:
    path = f"/{jobworker.SERVICE_NAME}/{method}"
    return await channel.unary_unary(path, type(request).SerializeToString, reply.FromString)(request)


async def start(channel: Any, *words: str) -> str:
    request = pb.StartJobRequest(cmd=words[0], args=words[1:])
    return str((await call(channel, "StartJob", request, pb.StartJobResponse)).ID)


def stream(channel: Any, job: str, offset: int = 0, service: str = jobworker.SERVICE_NAME) -> AsyncIterator[bytes]:
    ask = channel.unary_stream(
        f"/{service}/GetOutputStream", pb.GetStreamRequest.SerializeToString, jobworker.result_of
    )
    chunks: AsyncIterator[bytes] = ask(pb.GetStreamRequest(id=job, offset=offset))
    return chunks


async def drain(channel: Any, job: str, offset: int = 0, service: str = jobworker.SERVICE_NAME) -> int:
    return sum([len(chunk) async for chunk in stream(channel, job, offset, service)])


async def timed(work: Awaitable[Any]) -> float:
    began = time.perf_counter()
    await work
    return time.perf_counter() - began


def timed_process(*words: str, **environment: str) -> float:
    began = time.perf_counter()
    subprocess.run(words, env={**os.environ, **environment}, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    return time.perf_counter() - began


@contextlib.contextmanager
def sshd(folder: Path) -> Iterator[list[str]]:
    """The words of an ssh to a server of our own on loopback; none where sshd is not installed."""
    program = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None or shutil.which("ssh") is None:
        yield []
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name in ("host", "me"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    options = [
        f"HostKey={folder}/host",
        f"AuthorizedKeysFile={folder}/me.pub",
        "StrictModes=no",
        "UsePAM=no",
        f"PidFile={folder}/pid",
    ]
    os.makedirs("/run/sshd", exist_ok=True)
    words = [
        program,
        "-D",
        "-e",
        "-f",
        "/dev/null",
        "-p",
        str(port),
        *(f"-o{o}" for o in (*options, "ListenAddress=127.0.0.1")),
    ]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        process.stderr.readline()  # "Server listening on …"
        quiet = ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "IdentitiesOnly=yes")
        yield ["ssh", "-p", str(port), "-i", str(folder / "me"), *(f"-o{o}" for o in quiet), "127.0.0.1"]
    finally:
        process.terminate()
        process.communicate()


# --- 3. Streams and latency -----------------------------------------------------------------------------


async def bench_stream(folder: Path, quick: bool) -> list[Row]:
    size, rounds = (128 if quick else 512) * MIB, 3 if quick else 5
    ours: dict[int, list[float]] = {1: [], 8: []}
    bare: dict[int, list[float]] = {1: [], 8: []}
    ssh_rounds: list[float] = []
    with serving(folder) as server, floor(folder) as other, sshd(folder) as ssh:
        async with server.channel() as one, other.channel() as two:
            job = await start(one, "head", "-c", str(size), "/dev/zero")
            assert await drain(one, job) == size
            for _ in range(rounds):
                for many, rates in ours.items():
                    rate = many * size / 1e6
                    rates.append(rate / await timed(asyncio.gather(*(drain(one, job) for _ in range(many)))))
                    whole = (drain(two, "", size, "floor") for _ in range(many))
                    bare[many].append(rate / await timed(asyncio.gather(*whole)))
                if ssh:
                    file = folder / "state" / "jobs" / job / "output"
                    ssh_rounds.append(size / 1e6 / timed_process(*ssh, "cat", str(file)))
    rows = [
        Row(f"{many} streams of {size // MIB} MiB", "MB/s", ours[many], "bare grpc.aio", bare[many]) for many in ours
    ]
    return [
        *rows,
        Row(f"1 stream of {size // MIB} MiB", "MB/s", ours[1], "ssh cat" if ssh else "ssh: not installed", ssh_rounds),
    ]


TICKS = """
import os, sys, time
time.sleep(float(sys.argv[2]))
for _ in range(int(sys.argv[1])):
    time.sleep(0.02)
    os.write(1, b"%020d\\n" % time.monotonic_ns())
"""


async def follow_ticks(server: Server, job: str, late: list[float]) -> int:
    """Follow one job on a connection of its own; how late each tick came, in ms, and how many messages."""
    messages = 0
    async with server.channel() as channel:
        async for chunk in stream(channel, job):
            now = time.monotonic_ns()
            messages += 1
            late.extend((now - int(line)) / 1e6 for line in chunk.split())
    return messages


async def latency_of(server: Server, many: int, ticks: int) -> tuple[list[float], float, float]:
    """Lateness of all ticks at all followers (ms), server CPU a message (µs), its memory (MB)."""
    late: list[float] = []
    async with server.channel() as channel:
        job = await start(channel, PYTHON, "-c", TICKS, str(ticks), str(0.5 + many / 200))
        followers = [asyncio.create_task(follow_ticks(server, job, late)) for _ in range(many)]
        async for _ in stream(channel, job):
            break  # the first tick: everybody is connected
        before = server.cpu()
        messages = sum(await asyncio.gather(*followers))
        return late, (server.cpu() - before) / messages * 1e6, server.memory()


async def bench_latency(folder: Path, quick: bool) -> list[Row]:
    rows = []
    for many in (1, 100, *(() if quick else (1000,))):
        with serving(folder) as server:
            late, cpu, memory = await latency_of(server, many, 100 if quick else 250)
        rows += [
            Row(f"write() to client, {many} followers, p50", "ms", [quantile(late, 0.5)]),
            Row(f"write() to client, {many} followers, p99", "ms", [quantile(late, 0.99)]),
            Row(f"server CPU a message, {many} followers", "µs", [cpu]),
            Row(f"server RSS, {many} followers", "MB", [memory]),
        ]
    return rows


# --- 4. A job's own speed -------------------------------------------------------------------------------

WRITER = """
import os, sys, time
out = os.open(sys.argv[3], os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if len(sys.argv) > 3 else 1
count, line = int(sys.argv[1]), b"x" * (int(sys.argv[2]) - 1) + b"\\n"
began = time.perf_counter()
for _ in range(count):
    os.write(out, line)
os.write(1, b"took %f\\n" % (time.perf_counter() - began))
"""


async def speed_of(server: Server, followers: int, *words: str) -> float:
    async with server.channel() as channel:
        job = await start(channel, PYTHON, "-c", WRITER, *words)
        tasks = [asyncio.create_task(drain(channel, job)) for _ in range(followers)]
        await asyncio.gather(*tasks)
        size = 0
        while True:  # only its end is of interest, and nobody follows while it runs
            status = await call(channel, "GetJobStatus", pb.GetStatusRequest(id=job), pb.GetStatusResponse)
            if status.status != pb.RUNNING:
                break
            await asyncio.sleep(0.02)
        size = status.output_bytes
        last = b"".join([chunk async for chunk in stream(channel, job, max(0, size - 100))])
        return float(last.rsplit(b"took ", 1)[1])


async def bench_speed(folder: Path, quick: bool) -> list[Row]:
    rows, rounds = [], 3 if quick else 5
    shapes = {"500,000 lines of 80 bytes": ("500000", "80"), "1 GiB in blocks of 1 MiB": ("1024", str(MIB))}
    with serving(folder) as server:
        for what, words in shapes.items():
            own = [await speed_of(server, 0, *words, "own-file") for _ in range(rounds)]
            for followers in (0, 1, *(() if quick else (20,))):
                took = [await speed_of(server, followers, *words) for _ in range(rounds)]
                rows.append(Row(f"a job writes {what}, {followers} followers", "s", took, "to a file of its own", own))
    return rows


# --- 5. Starts and calls --------------------------------------------------------------------------------


async def start_rate(channel: Any, count: int, at_once: int) -> float:
    """Starts a second, so many at a time."""
    left = iter(range(count))

    async def some() -> None:
        for _ in left:
            await start(channel, "true")

    return count / await timed(asyncio.gather(*(some() for _ in range(at_once))))


async def sparse_starts(channel: Any, count: int) -> list[float]:
    took = []
    for _ in range(count):
        await asyncio.sleep(0.15)
        took.append(1e3 * await timed(start(channel, "true")))
    return took


async def start_to_end(channel: Any) -> float:
    async def whole() -> None:
        await drain(channel, await start(channel, "true"))

    return 1e3 * await timed(whole())


async def stop_to_dead(channel: Any) -> float:
    job = await start(channel, "sleep", "1000")
    return 1e3 * await timed(call(channel, "StopJob", pb.StopJobRequest(id=job), pb.StopJobResponse))


def systemd_run() -> list[float]:
    """The same by systemd-run, its end read from `systemctl show`, in ms; nothing where there is no systemd."""
    if Path("/proc/1/comm").read_text().strip() != "systemd":
        return []
    took = []
    for number in range(10):
        unit = f"bench-{os.getpid()}-{number}"
        began = time.perf_counter()
        subprocess.run(["systemd-run", "--quiet", "--remain-after-exit", f"--unit={unit}", "true"], check=True)
        while (
            "SubState=exited"
            not in subprocess.run(
                ["systemctl", "show", unit, "-pSubState"], capture_output=True, text=True, check=True
            ).stdout
        ):
            pass
        took.append(1e3 * (time.perf_counter() - began))
        subprocess.run(["systemctl", "stop", unit], check=True)
    return took


async def bench_starts(folder: Path, quick: bool) -> list[Row]:
    count = 60 if quick else 200
    with serving(folder) as server:
        async with server.channel() as channel:
            await start_rate(channel, 20, 1)
            one_by_one = [1e3 * await timed(start(channel, "true")) for _ in range(count)]
            sparse = await sparse_starts(channel, count // 4)
            rates = [await start_rate(channel, 2 * count, 16) for _ in range(3)]
            whole = [await start_to_end(channel) for _ in range(count // 2)]
            stops = [await stop_to_dead(channel) for _ in range(count // 4)]
    plain = [1e3 * timed_process("true") for _ in range(count)]
    by_systemd = systemd_run()
    return [
        Row("StartJob, one after the other", "ms", one_by_one, "subprocess.run true", plain),
        Row("StartJob, one each 150 ms", "ms", sparse),
        Row("StartJob, 16 at a time", "/s", rates),
        Row(
            "start to end known",
            "ms",
            whole,
            "systemd-run" if by_systemd else "systemd-run: no systemd here",
            by_systemd,
        ),
        Row("stop to dead", "ms", stops),
    ]


async def status_rate(channel: Any, job: str, count: int) -> float:
    async def one() -> None:
        await call(channel, "GetJobStatus", pb.GetStatusRequest(id=job), pb.GetStatusResponse)

    async def some() -> None:
        for _ in range(count // 16):
            await one()

    return count / await timed(asyncio.gather(*(some() for _ in range(16))))


async def bench_calls(folder: Path, quick: bool) -> list[Row]:
    rounds = 7 if quick else 15
    program = [sys.executable, str(HERE / "jobworker.pyz")]
    with serving(folder) as server, sshd(folder) as ssh:
        async with server.channel() as channel:
            job = await start(channel, "true")
            rates = [await status_rate(channel, job, 1600) for _ in range(3)]
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
    return [
        Row("status calls, 16 at a time", "/s", rates),
        Row("`status` as a process, from the .pyz", "ms", took["status"], "python -c 'import grpc'", took["import"]),
        Row("`status` as a process, from the .pyz", "ms", took["status"], "python -c pass", took["pass"]),
        Row(
            "`start` as a process, from the .pyz",
            "ms",
            took["start"],
            *(("ssh true", took["ssh"]) if ssh else ("ssh: not installed",)),
        ),
    ]


# --- 6. Scale and growth --------------------------------------------------------------------------------


def make_ended(folder: Path, count: int) -> None:
    """So many ended jobs: copies of one, each under an id of its own."""
    jobs = folder / "state" / "jobs"
    model = next(path for path in jobs.iterdir() if b"done" in (path / "exit").read_bytes())
    for _ in range(count):
        copy = jobs / jobworker.new_job_id()
        copy.mkdir(mode=0o700)
        for name in ("exit", "job.json", "output"):
            (copy / name).write_bytes((model / name).read_bytes())


def shim_memory(server: Server) -> list[float]:
    """Private memory of some shims, in MB."""
    launcher = next(iter(Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()))
    shims = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [kilobytes(f"/proc/{shim}/smaps_rollup", "Private_Clean", "Private_Dirty") / 1e3 for shim in shims[:20]]


async def idle_cpu(server: Server, seconds: float) -> float:
    """Milliseconds of CPU that all threads of a server use in so many seconds, by the scheduler's own count."""
    tasks = Path(f"/proc/{server.process.pid}/task")

    def used() -> int:
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks.iterdir())

    first = used()
    await asyncio.sleep(seconds)
    return (used() - first) / 1e6


def restart_seconds(folder: Path) -> float:
    began = time.perf_counter()
    with serving(folder):
        return time.perf_counter() - began


async def bench_scale(folder: Path, quick: bool) -> list[Row]:
    jobs, ended, seconds = (100, 1000, 3) if quick else (1000, 10_000, 10)
    empty = folder / "empty"
    shutil.copytree(folder / "certs", empty / "certs")
    bare_restarts = [restart_seconds(empty) for _ in range(3)]
    with serving(folder) as server:
        async with server.channel() as channel:
            await drain(channel, await start(channel, "true"))
    make_ended(folder, ended)
    restarts = [restart_seconds(folder) for _ in range(3)]
    with serving(folder) as server, floor(folder) as other:
        async with server.channel() as channel:
            alone = [1e3 * await timed(start(channel, "true")) for _ in range(50)]
            running_jobs = [await start(channel, "sleep", "1000") for _ in range(jobs)]
            loaded = [1e3 * await timed(start(channel, "true")) for _ in range(50)]
            asked = [
                call(channel, "GetJobStatus", pb.GetStatusRequest(id=job), pb.GetStatusResponse) for job in running_jobs
            ]
            statuses = [1e3 * await timed(one) for one in asked]
            memory, shims = server.memory(), shim_memory(server)
        idle = await idle_cpu(server, seconds)
        bare_idle = await idle_cpu(other, seconds)
    what = f"{jobs} running, {ended} ended"
    return [
        Row(f"server RSS, {what}", "MB", [memory]),
        Row("private memory of a shim", "MB", shims),
        Row(f"idle CPU in {seconds} s, {what}", "ms", [idle], "bare grpc.aio", [bare_idle]),
        Row(f"status, p99, {what}", "ms", [quantile(statuses, 0.99)]),
        Row(f"restart to listening, {ended} ended", "s", restarts, "with no jobs", bare_restarts),
        Row(f"StartJob with {jobs} running", "ms", loaded, "with none running", alone),
    ]


def exponent(small: float, large: float) -> float:
    """Of growth, for ten times as much."""
    return math.log10(large / small)


async def bench_growth(folder: Path, quick: bool) -> list[Row]:
    few, many = (10, 100) if quick else (100, 1000)
    with serving(folder) as server:
        async with server.channel() as channel:
            sizes = [await start(channel, "head", "-c", str(size * MIB), "/dev/zero") for size in (25, 250)]
            for job in sizes:
                await drain(channel, job)
            seconds = [statistics.median([await timed(drain(channel, job)) for _ in range(3)]) for job in sizes]
            _, cpu_few, _ = await latency_of(server, few // 10, 100)
            _, cpu_many, _ = await latency_of(server, few, 100)
            starts = []
            for more in (few, many - few):
                for _ in range(more):
                    await start(channel, "sleep", "1000")
                starts.append(statistics.median([await timed(start(channel, "true")) for _ in range(40)]))
    return [
        Row("time of a stream, 25 to 250 MiB", "exponent", [exponent(*seconds)]),
        Row(
            f"server CPU of all messages, {few // 10} to {few} followers", "exponent", [1 + exponent(cpu_few, cpu_many)]
        ),
        Row(f"time of a start, {few} to {many} running jobs", "exponent", [exponent(*starts)]),
    ]


# --- 7. Command line ------------------------------------------------------------------------------------

ITEMS: dict[str, Callable[[Path, bool], Awaitable[list[Row]]]] = {
    "stream": bench_stream,
    "latency": bench_latency,
    "speed": bench_speed,
    "starts": bench_starts,
    "calls": bench_calls,
    "scale": bench_scale,
    "growth": bench_growth,
}


def measure(item: str, quick: bool) -> list[Row]:
    """One item on servers, certificates and a state folder of its own."""
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
    if unknown := set(options.items) - set(ITEMS):
        parser.error(f"there is no item {', '.join(unknown)}")
    rows = [row for item in options.items or ITEMS for row in measure(item, options.quick)]
    if options.json:
        print(json.dumps({"machine": machine(), "rows": [dataclasses.asdict(row) for row in rows]}, indent=2))
        return
    print(f"{machine()}\n")
    print_table(rows)


if __name__ == "__main__":
    main()
