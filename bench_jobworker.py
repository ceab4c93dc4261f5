#!/usr/bin/env python3
"""Measure Job worker, and something to compare each figure with, in the same run.

    ./build.sh bench [--quick] [--json FILE] [ITEM...]    measure; keep all rounds in FILE
    ./build.sh bench --against OTHER.pyz [ITEM...]        measure two versions in turns
    ./build.sh bench --table FILE                         print the Markdown table of a run
    ./build.sh bench --summary FILE                       print the main figures of a run
    ./build.sh bench --plot FILE SVG                      draw the main figures of a run

The items are stream, latency, speed, input, starts, calls, attacks, confine, scale and growth. The servers and the mTLS
are real. All traffic stays on loopback. A figure is the median of its rounds, with the smallest and the largest round.
Compare ratios rather than figures: both sides of a ratio were measured on the same machine within the same minutes.

Contents: 1. rows, table and JSON, 2. plot, 3. servers, clients and processes, 4. streams and latency, 5. the speed of
a job, 6. input, 7. starts and calls, 8. attacks, 9. confinement, 10. scale and growth, 11. command line.
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
import select
import shlex
import shutil
import signal
import socket
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jobworker
from jobworker import CLIENT_OPTIONS, MIB, count_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Awaitable, Callable, Iterator

    import grpc

    import gen.workerservice_pb2 as pb
else:  # jobworker imports them at their first use, after it has set what gRPC reads from the environment
    from jobworker import grpc, pb

HERE = Path(__file__).resolve().parent
PYZ = HERE / "jobworker.pyz"
UNIVERSAL = HERE / "dist" / "jobworker.pyz"
JOB_WORKER, BASELINE = jobworker.SERVICE_NAME, "baseline"  # the names of the two gRPC services
PYTHON = shutil.which("python3", path=jobworker.JOB_PATH) or sys.executable

# --- 1. Rows, table and JSON ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure: the values of its rounds, and the rounds of what it is compared with."""

    what: str
    unit: str
    rounds: list[float]
    peer: str = ""
    peer_rounds: list[float] = dataclasses.field(default_factory=list)

    def ratio(self) -> float | None:
        return statistics.median(self.rounds) / statistics.median(self.peer_rounds) if self.peer_rounds else None


@dataclasses.dataclass(frozen=True)
class Run:
    """All rows of one run, and where and when it was made."""

    machine: str
    version: str
    date: str
    quick: bool
    rows: list[Row]

    def heading(self) -> str:
        kind = "A quick run" if self.quick else "A whole run"
        return f"{kind} of {self.version} on {self.date}: {self.machine}."

    def write(self, file: Path) -> None:
        """Write JSON with one row a line, so that two runs can be compared line by line."""
        facts = {name: value for name, value in vars(self).items() if name != "rows"}
        rows = ",\n".join("  " + json.dumps(rounded(row), ensure_ascii=False) for row in self.rows)
        facts_text = json.dumps(facts, ensure_ascii=False, indent=1).removesuffix("\n}")
        file.write_text(f'{facts_text},\n "rows": [\n{rows}\n ]\n}}\n', encoding="utf-8")

    @classmethod
    def read(cls, file: Path) -> Run:
        facts = json.loads(file.read_text(encoding="utf-8"))
        return cls(**{**facts, "rows": [Row(**row) for row in facts["rows"]]})


def rounded(row: Row) -> dict[str, Any]:
    """Return a row with four significant digits, which are more than a round is exact to."""

    def digits(rounds: list[float]) -> list[float]:
        return [float(f"{value:.4g}") for value in rounds]

    return {**vars(row), "rounds": digits(row.rounds), "peer_rounds": digits(row.peer_rounds)}


def figure(value: float) -> str:
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def spread(rounds: list[float], unit: str) -> str:
    """Return the median, and the smallest and the largest round where there are several."""
    if not rounds:
        return ""
    text = f"{figure(statistics.median(rounds))} {unit}"
    return text if len(rounds) == 1 else f"{text} ({figure(min(rounds))} to {figure(max(rounds))})"


def print_table(run: Run) -> None:
    print(f"{run.heading()}\n\n| what | figure | compared with | ratio |\n|---|---|---|---|")
    for row in run.rows:
        ratio = "" if row.ratio() is None else f"{row.ratio():.2f}"
        peer = ": ".join(filter(None, (row.peer, spread(row.peer_rounds, row.unit))))
        print(f"| {row.what} | {spread(row.rounds, row.unit)} | {peer} | {ratio} |")


def machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    versions = f"Python {platform.python_version()}, grpcio {grpc.__version__}"
    return f"{os.cpu_count()} cores, {memory:.0f} GiB, Linux {os.uname().release}, {versions}"


def version() -> str:
    """Return the version, and the commit where this is a git work tree; `+` says that files were changed since."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty=+"]
    with contextlib.suppress(OSError):
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        return f"jobworker {jobworker.VERSION}" + (f" ({commit})" if commit else "")
    return f"jobworker {jobworker.VERSION}"


def quantile(values: list[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * part))]


# --- 2. Plot --------------------------------------------------------------------------------------------
# The plot is SVG written by hand. Its colours are mid-tones on no background, because a page that is switched to dark
# does not tell an embedded picture so: each colour has a contrast of at least 3.7 on white and on a dark page.


class Bar(NamedTuple):
    """One bar: its label, and the row it shows. With `peer` it shows what the row is compared with."""

    label: str
    what: str  # the beginning of the row's name
    peer: str = ""


class Panel(NamedTuple):
    title: str
    bars: tuple[Bar, ...]


PANELS = (
    Panel(
        "One client streams a large output: MB/s, more is better",
        (
            Bar("Job worker", "1 stream of"),
            Bar("bare gRPC", "1 stream of", "bare grpc.aio"),
            Bar("ssh cat, with its connection", "1 stream of", "ssh cat"),
        ),
    ),
    Panel(
        "From a program's write() to the client: ms, less is better",
        (
            Bar("Job worker", "1 follower: write() to client, p50"),
            Bar("bare gRPC, no program", "1 follower: write() to client, p50", "bare grpc.aio"),
            Bar("ssh", "1 follower: write() to client, p50", "ssh"),
        ),
    ),
    Panel(
        "One start over an open connection: ms, less is better",
        (
            Bar("Job worker, until it runs", "StartJob, one after the other"),
            Bar("Job worker, until its end is known", "start to end known"),
            Bar("gRPC call, folder, 2 forks, exec", "StartJob, one after", "gRPC call, folder, two forks, exec"),
            Bar("systemd-run, until its end is known", "start to end known", "systemd-run"),
        ),
    ),
    Panel(
        "A client as a whole process: ms, less is better",
        (
            Bar("jobworker.pyz status", "`status` as a process"),
            Bar("jobworker.pyz start -- true", "`start` as a process"),
            Bar("python -c 'import grpc'", "`status` as a process", "python -c 'import grpc'"),
            Bar("ssh true", "`start` as a process", "ssh true"),
        ),
    ),
    Panel(
        "A program prints 500,000 lines: s, less is better",
        (
            Bar("Job worker, nobody follows", "dd writes 500,000 lines, 0"),
            Bar("Job worker, one client follows", "dd writes 500,000 lines, 1"),
            Bar("into a pipe that cat reads", "dd writes 500,000 lines, 0", "a pipe to cat"),
            Bar("through ssh", "dd writes 500,000 lines, 1", "ssh"),
        ),
    ),
)
STYLE = """
text { font: 13px system-ui, "Segoe UI", "DejaVu Sans", sans-serif; fill: #747f8a; }
.title { font-weight: 600; }
.mine { fill: #2f81f7; }
.peer { fill: #7d8590; }
"""
WIDTH, BAR_LEFT, BAR_WIDTH, BAR_STEP, TITLE_STEP, PANEL_GAP = 720, 250, 400, 22, 28, 16


def values_of(panel: Panel, rows: list[Row]) -> list[tuple[Bar, float]]:
    """Return a panel's bars and their medians; a bar that this run has no row for is left out."""
    found = []
    for bar in panel.bars:
        fits = (row for row in rows if row.what.startswith(bar.what) and bar.peer in ("", row.peer))
        row = next(fits, None)
        rounds = [] if row is None else row.peer_rounds if bar.peer else row.rounds
        if rounds:
            found.append((bar, statistics.median(rounds)))
    return found


def draw_panel(panel: Panel, rows: list[Row], top: int) -> tuple[list[str], int]:
    """Return the SVG elements of a panel and the y at which the next one begins."""
    values = values_of(panel, rows)
    if not values:
        return [], top
    largest = max(value for _, value in values)
    lines = [f'<text class="title" x="0" y="{top + 16}">{escape(panel.title)}</text>']
    for number, (bar, value) in enumerate(values):
        y = top + TITLE_STEP + number * BAR_STEP
        kind, width = "peer" if bar.peer else "mine", max(1, round(BAR_WIDTH * value / largest))
        lines += [
            f'<text x="{BAR_LEFT - 8}" y="{y + 12}" text-anchor="end">{escape(bar.label)}</text>',
            f'<rect class="{kind}" x="{BAR_LEFT}" y="{y}" width="{width}" height="16" rx="2"/>',
            f'<text x="{BAR_LEFT + width + 6}" y="{y + 12}">{figure(value)}</text>',
        ]
    return lines, top + TITLE_STEP + len(values) * BAR_STEP + PANEL_GAP


def print_summary(run: Run) -> None:
    """Print the figures of the plot as a Markdown table with one line a panel."""
    print(f"{run.heading()}\n\n| what | Job worker | compared with |\n|---|---|---|")
    for panel in PANELS:
        values = values_of(panel, run.rows)
        mine = "; ".join(f"{figure(value)} ({bar.label})" for bar, value in values if not bar.peer)
        peers = "; ".join(f"{figure(value)} ({bar.label})" for bar, value in values if bar.peer)
        print(f"| {panel.title} | {mine.replace(' (Job worker)', '').replace('(Job worker, ', '(')} | {peers} |")


def draw(run: Run) -> str:
    top, lines = 0, []
    for panel in PANELS:
        more, top = draw_panel(panel, run.rows, top)
        lines += more
    label = escape(f"Bars of the main figures. {run.heading()}")
    size = f'width="{WIDTH}" height="{top}" viewBox="0 0 {WIDTH} {top}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{label}">'
    return "\n".join([head, f"<style>{STYLE}</style>", *lines, "</svg>", ""])


# --- 3. Servers, clients and processes ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Setup:
    """What an item measures: the .pyz that serves, in a folder that holds certificates and the state folder."""

    folder: Path
    program: Path
    quick: bool

    def serving(
        self, folder: Path | None = None, *more: str, crowd: bool = True
    ) -> contextlib.AbstractContextManager[Server]:
        """Run Job worker's server, with `more` options. Without `crowd` an owner's bounds are the default ones."""
        folder = folder or self.folder
        options = f"--listen 127.0.0.1:0 --without auto --reserve 0 --max-output 4G --stop-jobs --state {folder}/state"
        bounds = self.bounds() if crowd else []
        words = [str(self.program), "serve", *options.split(), "--certs", f"{folder}/certs", *bounds, *more]
        return running(words, folder / "certs")

    def bounds(self) -> list[str]:
        """Return the options that allow one owner to be a crowd; an earlier version has no such bounds."""
        return ["--owner-streams", "4000"] if "--owner-streams" in self.help("serve") else []

    def help(self, *verb: str) -> str:
        """Return the help of the program, or of one verb, because an earlier version knows less."""
        words = [sys.executable, str(self.program), *verb, "--help"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout

    def baseline(self) -> contextlib.AbstractContextManager[Server]:
        """Run the bare grpc.aio server."""
        certs = self.folder / "certs"
        return running([__file__, "--baseline", str(certs)], certs)


@dataclasses.dataclass(frozen=True)
class Target:
    """Where a client connects to, and the folder with its identity."""

    port: int
    certs: Path

    def channel(self, name: str = "user", compression: grpc.Compression | None = None) -> grpc.aio.Channel:
        files = [(self.certs / file).read_bytes() for file in ("server-ca.pem", f"{name}.key", f"{name}.pem")]
        credentials = grpc.ssl_channel_credentials(*files)
        options = [*CLIENT_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]  # each channel has its own connection
        return grpc.aio.secure_channel(f"localhost:{self.port}", credentials, options, compression)


@dataclasses.dataclass(frozen=True)
class Server(Target):
    process: subprocess.Popen[str]

    def cpu(self) -> float:
        """Return the seconds of CPU that its threads have used, as the scheduler counts them."""
        tasks = Path(f"/proc/{self.process.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9

    def memory(self) -> float:
        """Return its resident memory in MB."""
        return kilobytes(f"/proc/{self.process.pid}/status", "VmRSS") / 1e3

    @contextlib.contextmanager
    def growth(self, found: list[float]) -> Iterator[None]:
        """Add to `found` by how many MB its resident memory was larger at most during the block."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")  # the kernel forgets the peak (proc(5))
        before = self.memory()
        yield
        found.append(kilobytes(f"/proc/{self.process.pid}/status", "VmHWM") / 1e3 - before)


def kilobytes(file: str, *keys: str) -> float:
    lines = (line.split() for line in Path(file).read_text().splitlines())
    return sum(int(words[1]) for words in lines if words[0].rstrip(":").startswith(keys)) * 1.024


@contextlib.contextmanager
def running(words: list[str], certs: Path) -> Iterator[Server]:
    """Run a server; it is yielded when it has said that it listens, and ended afterwards."""
    log = certs.parent / "log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if "serving on" not in line:
            raise SystemExit(f"bench: {words[0]} did not start: {log.read_text()}")
        yield Server(int(line.split(",")[0].rsplit(":", 1)[1]), certs, process)
    finally:
        process.terminate()
        process.wait()


class Baseline:
    """A bare grpc.aio server that runs no program.

    A stream sends `offset` zero bytes, or without end a line with the time, every `id` seconds. A status is constant.
    """

    def __init__(self) -> None:
        self._chunk = bytes(jobworker.READ_BYTES)
        self._bell = jobworker.Bell()
        self._line = b""
        self._clock: asyncio.Task[None] | None = None

    async def _tick(self, pause: float) -> None:
        while True:
            await asyncio.sleep(pause)
            self._line = b"%020d\n" % time.monotonic_ns()
            self._bell.ring()

    async def stream(self, request: pb.GetStreamRequest, context: Any) -> None:
        for _ in range(request.offset // len(self._chunk)):
            await context.write(self._chunk)
        if request.id:
            self._clock = self._clock or asyncio.create_task(self._tick(float(request.id)))
        while request.id:
            await self._bell.wait()
            await context.write(self._line)

    async def status(self, _request: pb.GetStatusRequest, _context: Any) -> pb.GetStatusResponse:
        return pb.GetStatusResponse(status=pb.RUNNING)


async def serve_baseline(certs: Path) -> None:
    baseline = Baseline()
    key, pem, authorities = ((certs / name).read_bytes() for name in ("server.key", "server.pem", "client-ca.pem"))
    server = grpc.aio.server(options=jobworker.SERVER_OPTIONS)
    handlers: dict[str, Any] = {
        "GetOutputStream": grpc.unary_stream_rpc_method_handler(
            baseline.stream,
            pb.GetStreamRequest.FromString,
            lambda chunk: jobworker.encode_output((1, chunk)),
        ),
        "GetJobStatus": grpc.unary_unary_rpc_method_handler(
            baseline.status, pb.GetStatusRequest.FromString, pb.GetStatusResponse.SerializeToString
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(BASELINE, handlers),))
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, pem)], authorities, True))
    await server.start()
    print(f"serving on 127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


async def call(channel: grpc.aio.Channel, method: str, request: Any, reply: Any, service: str = JOB_WORKER) -> Any:
    path = f"/{service}/{method}"
    return await channel.unary_unary(path, type(request).SerializeToString, reply.FromString)(request)


async def start(channel: grpc.aio.Channel, *words: str) -> str:
    request = pb.StartJobRequest(cmd=words[0], args=words[1:])
    return str((await call(channel, "StartJob", request, pb.StartJobResponse)).ID)


def stream(
    channel: grpc.aio.Channel, job: str, offset: int = 0, service: str = JOB_WORKER
) -> AsyncIterable[jobworker.Content]:
    path = f"/{service}/GetOutputStream"
    decode = lambda message: jobworker.decode_output(message)[0]  # noqa: E731
    method = channel.unary_stream(path, pb.GetStreamRequest.SerializeToString, decode)
    return method(pb.GetStreamRequest(id=job, offset=offset))


async def drain(channel: grpc.aio.Channel, job: str, offset: int = 0, service: str = JOB_WORKER) -> int:
    """Read a stream to its end and return the number of its bytes."""
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
    """Run an ssh server on loopback and yield the words of an ssh to it; none where sshd is missing or fails."""
    program = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None or shutil.which("ssh") is None:
        yield []
        return
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    for name in ("host", "client"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    files = (f"HostKey={folder}/host", f"AuthorizedKeysFile={folder}/client.pub", f"PidFile={folder}/pid")
    fixed = ("StrictModes=no", "UsePAM=no", "ListenAddress=127.0.0.1")
    os.makedirs("/run/sshd", exist_ok=True)
    words = [program, "-D", "-e", "-f", "/dev/null", "-p", str(port), *(f"-o{o}" for o in (*files, *fixed))]
    process = subprocess.Popen(words, stderr=subprocess.PIPE)
    try:
        assert process.stderr is not None
        quiet = ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "IdentitiesOnly=yes")
        ssh = ["ssh", "-p", str(port), "-i", f"{folder}/client", *(f"-o{o}" for o in quiet), "127.0.0.1"]
        yield ssh if b"listening" in process.stderr.readline() else []
    finally:
        process.terminate()
        process.communicate()
        for name in ("host", "host.pub", "client", "client.pub"):
            (folder / name).unlink(missing_ok=True)


# --- 4. Streams and latency -----------------------------------------------------------------------------


async def stream_rate(count: int, size: int, *arguments: Any) -> float:
    """Return the MB/s of `count` streams of `size` bytes at the same time."""
    return count * size / 1e6 / await timed(asyncio.gather(*(drain(*arguments) for _ in range(count))))


async def bench_stream(setup: Setup) -> list[Row]:
    size, rounds = (48 if setup.quick else 512) * MIB, 3 if setup.quick else 5
    rates: dict[int, list[float]] = {1: [], 8: []}
    bare: dict[int, list[float]] = {1: [], 8: []}
    ssh_rates = []
    with setup.serving() as server, setup.baseline() as baseline, sshd(setup.folder) as ssh:
        async with server.channel() as channel, baseline.channel() as bare_channel:
            job = await start(channel, "head", "-c", str(size), "/dev/zero")
            assert await drain(channel, job) == size
            for _ in range(rounds):
                for count, values in rates.items():
                    values.append(await stream_rate(count, size, channel, job))
                    bare[count].append(await stream_rate(count, size, bare_channel, "", size, BASELINE))
                if ssh:
                    output = f"{setup.folder}/state/jobs/{job}/output"
                    ssh_rates.append(size / 1e6 / timed_process(*ssh, "cat", output))
    what = f"of {size // MIB} MiB"
    rows = [
        Row(f"{count_of(count, 'stream', 'streams')} {what}", "MB/s", rates[count], "bare grpc.aio", bare[count])
        for count in rates
    ]
    peer = "ssh cat" if ssh else "no sshd here"
    return [*rows, Row(f"1 stream {what}", "MB/s", rates[1], peer, ssh_rates)]


TICKS = """
import os, sys, time
while True:
    time.sleep(float(sys.argv[1]))
    os.write(1, b"%020d\\n" % time.monotonic_ns())
"""


@dataclasses.dataclass
class Ticks:
    """The lines with the time (ticks) that all followers of one program have seen after `settled` (ns)."""

    settled: float = math.inf
    followers: int = 0  # that have seen a line
    messages: int = 0
    delays: list[float] = dataclasses.field(default_factory=list)  # ms

    async def follow(self, chunks: AsyncIterable[jobworker.Content]) -> None:
        first = True
        async for chunk in chunks:
            now = time.monotonic_ns()
            self.followers, first = self.followers + first, False
            ticks = [int(line) for line in bytes(chunk).split()]
            self.delays.extend((now - tick) / 1e6 for tick in ticks if tick > self.settled)
            self.messages += ticks[-1] > self.settled

    async def measure(self, seconds: float) -> None:
        """Let everything settle for a second, then count for so many seconds."""
        await asyncio.sleep(1)
        self.settled = time.monotonic_ns()
        await asyncio.sleep(seconds)


async def latency_of(server: Server, followers: int, seconds: float, service: str = JOB_WORKER) -> list[float]:
    """Return p50 and p99 of the delay of a line (ms), the server's CPU time a message (µs) and its memory (MB)."""
    seen, pause = Ticks(), str(max(0.05, followers * 4e-4))  # slow enough to leave half of a core idle
    async with contextlib.AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(server.channel()) for _ in range(followers)]
        for channel in channels:  # one after the other, because the handshakes are not measured
            await channel.channel_ready()
        job = await start(channels[0], PYTHON, "-c", TICKS, pause) if service == JOB_WORKER else pause
        tasks = [asyncio.create_task(seen.follow(stream(channel, job, 0, service))) for channel in channels]
        while seen.followers < followers and not any(task.done() for task in tasks):
            await asyncio.sleep(0.1)
        await asyncio.sleep(1)
        seen.settled, before = time.monotonic_ns(), server.cpu()
        await asyncio.sleep(seconds)
        used, memory = server.cpu() - before, server.memory()
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        if service == JOB_WORKER:
            await call(channels[0], "StopJob", pb.StopJobRequest(id=job), pb.StopJobResponse)
    return [quantile(seen.delays, 0.5), quantile(seen.delays, 0.99), used / seen.messages * 1e6, memory]


async def latency_without_grpc(state: Path, seconds: float) -> float:
    """Return p50 of the delay of a line in a `Worker` (ms): the share of job, shim and follower."""
    seen, options = Ticks(), jobworker.WorkerOptions(state, without=frozenset({"auto"}), reserve=0)
    async with jobworker.Worker(options) as worker:
        job = await worker.start(jobworker.JobRequest(PYTHON, ("-c", TICKS, "0.05"), owner="bench"))
        task = asyncio.create_task(seen.follow(worker.stream(job)))
        await seen.measure(seconds)
        await worker.stop(job)
        await task
    return quantile(seen.delays, 0.5)


async def latency_of_ssh(ssh: list[str], seconds: float) -> float:
    """Return p50 of the delay of a line of a program that ssh runs (ms)."""
    seen, command = Ticks(), shlex.join([PYTHON, "-c", TICKS, "0.05"])
    process = await asyncio.create_subprocess_exec(
        *ssh, command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    task = asyncio.create_task(seen.follow(process.stdout))
    await seen.measure(seconds)
    process.terminate()
    await process.wait()
    await task
    return quantile(seen.delays, 0.5)


async def latency_rows(setup: Setup, followers: int, rounds: int, seconds: float) -> list[Row]:
    values, bare = [], []
    for _ in range(rounds):
        with setup.serving() as server:
            values.append(await latency_of(server, followers, seconds))
        with setup.baseline() as baseline:
            bare.append(await latency_of(baseline, followers, seconds, BASELINE))
    names = {"write() to client, p50": "ms", "write() to client, p99": "ms", "server CPU a message": "µs", "RSS": "MB"}
    who = count_of(followers, "follower", "followers")
    return [
        Row(f"{who}: {name}", unit, list(one), "bare grpc.aio", list(other))
        for (name, unit), one, other in zip(
            names.items(), zip(*values, strict=True), zip(*bare, strict=True), strict=True
        )
    ]


async def bench_latency(setup: Setup) -> list[Row]:
    rounds, seconds = (2, 2) if setup.quick else (3, 10)
    alone = [await latency_without_grpc(setup.folder / "library", seconds) for _ in range(rounds)]
    with sshd(setup.folder) as ssh:
        by_ssh = [await latency_of_ssh(ssh, seconds) for _ in range(rounds)] if ssh else []
    rows: list[Row] = []
    for followers in (1, 100, *(() if setup.quick else (1000,))):
        rows += await latency_rows(setup, followers, rounds, seconds)
    both = [one + other for one, other in zip(alone, rows[0].peer_rounds, strict=True)]
    peer = "bare grpc.aio + Worker without gRPC"
    return [
        rows[0],
        dataclasses.replace(rows[0], peer=peer, peer_rounds=both),
        dataclasses.replace(rows[0], peer="ssh" if ssh else "no sshd here", peer_rounds=by_ssh),
        *rows[1:],
    ]


# --- 5. The speed of a job ------------------------------------------------------------------------------


async def until_ended(channel: grpc.aio.Channel, job: str) -> int:
    """Wait for a job's end without following it, and return the bytes of its output."""
    request, reply = pb.GetStatusRequest(id=job), pb.GetStatusResponse
    while (status := await call(channel, "GetJobStatus", request, reply)).status == pb.RUNNING:
        await asyncio.sleep(0.02)
    return int(status.output_bytes)


def dd_seconds(text: bytes) -> float:
    """Return the time that `dd` took, from the summary at the end of its output."""
    return float(text.rsplit(b"copied, ", 1)[1].split()[0])


async def dd_as_job(server: Server, followers: int, *words: str) -> float:
    async with server.channel() as channel:
        job = await start(channel, "dd", "if=/dev/zero", *words)
        await asyncio.gather(*(drain(channel, job) for _ in range(followers)))
        size = await until_ended(channel, job)
        last = b"".join([chunk async for chunk in stream(channel, job, max(0, size - 100))])
        await call(channel, "RemoveJob", pb.RemoveJobRequest(id=job), pb.RemoveJobResponse)
        return dd_seconds(last)


async def dd_to_file(server: Server, *words: str) -> float:
    """Return the time of a job's `dd` into a file. The file is removed, or its write-back would slow the next round."""
    seconds = await dd_as_job(server, 0, *words, "of=dd-file")
    async with server.channel() as channel:
        await drain(channel, await start(channel, "rm", "dd-file"))
    return seconds


def dd_to_cat(*words: str) -> float:
    """Return the time of a `dd` into a pipe that `cat` reads, which is the cost of any pipe."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as cat:
        command = ["dd", "if=/dev/zero", *words]
        done = subprocess.run(command, stdout=cat.stdin, stderr=subprocess.PIPE, check=True, env={"LC_ALL": "C"})
    return dd_seconds(done.stderr)


def dd_by_ssh(ssh: list[str], *words: str) -> float:
    command = [*ssh, "LC_ALL=C", "dd", "if=/dev/zero", *words]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=True
    )
    return dd_seconds(done.stderr)


async def speed_rows(setup: Setup, what: str, words: tuple[str, ...]) -> list[Row]:
    rounds, counts = (3, (0, 1)) if setup.quick else (5, (0, 1, 20))
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    to_file, to_cat, by_ssh = [], [], []
    with setup.serving() as server, sshd(setup.folder) as ssh:
        for _ in range(rounds):
            to_cat.append(dd_to_cat(*words))
            to_file.append(await dd_to_file(server, *words))
            if ssh:
                by_ssh.append(dd_by_ssh(ssh, *words))
            for count in counts:
                seconds[count].append(await dd_as_job(server, count, *words))
    return [
        *(
            Row(
                f"dd writes {what}, {count_of(count, 'follower', 'followers')}",
                "s",
                seconds[count],
                "dd into a file",
                to_file,
            )
            for count in counts
        ),
        Row(f"dd writes {what}, 0 followers", "s", seconds[0], "a pipe to cat", to_cat),
        Row(f"dd writes {what}, 1 follower", "s", seconds[1], "ssh" if ssh else "no sshd here", by_ssh),
    ]


async def bench_speed(setup: Setup) -> list[Row]:
    blocks = 256 if setup.quick else 1024
    lines = await speed_rows(setup, "500,000 lines", ("bs=80", "count=500000"))
    return lines + await speed_rows(setup, f"{blocks} MiB", ("bs=1M", f"count={blocks}"))


# --- 6. Input -------------------------------------------------------------------------------------------


def input_seconds(file: Path, *words: str, **more: str) -> float:
    """Return the time of a whole process that gets a file as its standard input."""
    began = time.perf_counter()
    with file.open("rb") as stdin:
        subprocess.run(words, stdin=stdin, stdout=subprocess.DEVNULL, env={**os.environ, **more}, check=True)
    return time.perf_counter() - began


def make_tree(folder: Path, files: int) -> Path:
    """Make an archive of a tree of small files, as a source tree is, and return it."""
    tree = folder / "tree"
    for number in range(files):
        place = tree / f"folder{number // 100}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"file{number}").write_bytes(os.urandom(8 << 10))
    archive = folder / "tree.tar"
    subprocess.run(["tar", "-C", folder, "-cf", archive, "tree"], check=True)
    shutil.rmtree(tree)
    return archive


async def bench_input(setup: Setup) -> list[Row]:
    mib, files, rounds = (256, 1000, 3) if setup.quick else (1024, 10_000, 5)
    data, archive = setup.folder / "data", make_tree(setup.folder, files)
    with data.open("wb") as file:
        for _ in range(mib):
            file.write(os.urandom(1 << 20))
    os.sync()  # or the kernel writes the data to the disk during the first rounds
    times: dict[str, list[float]] = {"run cat": [], "ssh cat": [], "run tar": [], "ssh tar": []}
    with setup.serving() as server, sshd(setup.folder) as ssh:
        place = {"JOBWORKER_SERVER": f"localhost:{server.port}", "JOBWORKER_CERTS": f"{setup.folder}/certs"}
        ours = [sys.executable, str(setup.program)]
        rounds = rounds if "-i" in setup.help("run") else 0  # an earlier version has no input
        for _ in range(rounds):
            times["run cat"].append(input_seconds(data, *ours, "run", "-i", "cat", **place))
            # Otherwise each output lies in memory that no program used before. On a virtual machine that costs 2 s for
            # 1 GiB, since the host has to find that memory first.
            timed_process(*ours, "rm", "--last", **place)
            if ssh:
                times["ssh cat"].append(input_seconds(data, *ssh, "cat"))
        for _ in range(rounds):  # in the home of the job's account, and below the folder
            times["run tar"].append(input_seconds(archive, *ours, "run", "-i", "tar", "-x", **place))
            timed_process(*ours, "run", "rm", "-rf", "tree", **place)
            if ssh:
                times["ssh tar"].append(input_seconds(archive, *ssh, f"tar -C {setup.folder} -x"))
                shutil.rmtree(setup.folder / "tree")
    data.unlink()
    cat, tar = f"`run -i cat` of {mib} MiB as a process", f"`run -i tar -x` of {files:,} files of 8 KiB"
    return [
        Row(cat, "s", times["run cat"], ssh_or("ssh cat", ssh), times["ssh cat"]),
        Row(tar, "s", times["run tar"], ssh_or("ssh tar -x", ssh), times["ssh tar"]),
    ]


def ssh_or(peer: str, ssh: list[str]) -> str:
    return peer if ssh else "no sshd here"


# --- 7. Starts and calls --------------------------------------------------------------------------------


async def start_rate(channel: grpc.aio.Channel, count: int, at_once: int) -> float:
    """Return the starts a second with so many at a time."""
    left = iter(range(count))

    async def start_some() -> None:
        for _ in left:
            await start(channel, "true")

    return count / await timed(asyncio.gather(*(start_some() for _ in range(at_once))))


async def start_to_end(channel: grpc.aio.Channel) -> None:
    await drain(channel, await start(channel, "true"))


async def stop_time(channel: grpc.aio.Channel) -> float:
    """Return the time from a stop to its answer, which comes when the job is dead, in ms."""
    request = pb.StopJobRequest(id=await start(channel, "sleep", "1000"))
    return 1e3 * await timed(call(channel, "StopJob", request, pb.StopJobResponse))


def folder_time(place: Path, number: int) -> float:
    """Return the time to make a job's folder, its FIFO and its three files on this file system, in ms."""
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
def fork_timer() -> Iterator[Callable[[], float]]:
    """Run a process like the launcher, and yield a function that measures in it two forks and an exec, in ms."""
    words = [sys.executable, "-I", "-S", "-c", FORKS, str(HERE)]
    with subprocess.Popen(words, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        requests, answers = process.stdin, process.stdout
        assert requests is not None
        assert answers is not None
        yield lambda: float(answers.readline() if requests.write(b"x") else "nan")


def systemd_run_times(count: int) -> list[float]:
    """Return the time from systemd-run to the known end of its unit, in ms; none where there is no systemd."""
    if Path("/proc/1/comm").read_text().strip() != "systemd":
        return []
    times = []
    for number in range(count):
        unit = f"bench-{os.getpid()}-{number}"
        began = time.perf_counter()
        subprocess.run(["systemd-run", "--quiet", "--remain-after-exit", f"--unit={unit}", "true"], check=True)
        while b"exited" not in subprocess.check_output(["systemctl", "show", unit, "-pSubState"]):
            pass
        times.append(1e3 * (time.perf_counter() - began))
        subprocess.run(["systemctl", "stop", unit], check=True)
    return times


async def bench_starts(setup: Setup) -> list[Row]:
    count = 60 if setup.quick else 200
    starts, parts, plain, folders = [], [], [], []
    with setup.serving() as server, setup.baseline() as baseline, fork_timer() as fork_time:
        async with server.channel() as channel, baseline.channel() as bare_channel:
            await start_rate(channel, 20, 1)
            for number in range(count):  # in turns of ten, because a shared machine's speed changes within seconds
                if number % 10 == 0:
                    starts += [1e3 * await timed(start(channel, "true")) for _ in range(10)]
                folders.append(folder_time(setup.folder, number))
                call_time = 1e3 / await status_rate(bare_channel, "", 1, BASELINE, 1)
                parts.append(folders[-1] + fork_time() + call_time)
                plain.append(1e3 * timed_process("true"))
            sparse = [await asyncio.sleep(0.15, 1e3) * await timed(start(channel, "true")) for _ in range(count // 4)]
            rates = [await start_rate(channel, 2 * count, 16) for _ in range(3)]
            whole = [1e3 * await timed(start_to_end(channel)) for _ in range(count // 2)]
            stops = [await stop_time(channel) for _ in range(count // 4)]
    by_systemd = systemd_run_times(10)
    return [
        Row("StartJob, one after the other", "ms", starts, "gRPC call, folder, two forks, exec", parts),
        Row("StartJob, one after the other", "ms", starts, "subprocess.run true", plain),
        Row("StartJob, one each 150 ms", "ms", sparse, "the job's folder alone", folders),
        Row("StartJob, 16 at a time", "/s", rates),
        Row("start to end known", "ms", whole, "systemd-run" if by_systemd else "no systemd here", by_systemd),
        Row("stop to dead", "ms", stops),
    ]


async def status_rate(
    channel: grpc.aio.Channel, job: str, count: int, service: str = JOB_WORKER, at_once: int = 16
) -> float:
    """Return the status calls a second with so many at a time."""

    async def ask_some() -> None:
        for _ in range(count // at_once):
            await call(channel, "GetJobStatus", pb.GetStatusRequest(id=job), pb.GetStatusResponse, service)

    return count / await timed(asyncio.gather(*(ask_some() for _ in range(at_once))))


async def call_rates(server: Server, baseline: Server) -> tuple[str, list[float], list[float]]:
    """Return the id of an ended job, and the status calls a second for it and for the bare server."""
    rates, bare = [], []
    async with server.channel() as channel, baseline.channel() as bare_channel:
        job = await start(channel, "true")
        for _ in range(3):
            rates.append(await status_rate(channel, job, 1600))
            bare.append(await status_rate(bare_channel, job, 1600, BASELINE))
    return job, rates, bare


def gate_row(certs: Path, entries: int) -> Row:
    """Measure the check of a caller, in this process, with a revocation list of so many entries and without one."""
    leaf, authorities = ((certs / name).read_bytes() for name in ("user.pem", "client-ca.pem"))
    tls = {"ssl_tls_version": [b"TLSv1.3"], "x509_pem_cert": [leaf], "x509_pem_cert_chain": [b""]}
    issuer = jobworker.mark_of(jobworker.x509.load_pem_x509_certificate(leaf))[0]
    revoked = frozenset((issuer, number) for number in range(entries))
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(20):
        for list_, found in zip((revoked, frozenset()), times, strict=True):
            trust = jobworker.Trust(authorities, list_)
            began = time.perf_counter()
            for _ in range(1000):
                jobworker.authenticate(tls, trust)
            found.append(1e3 * (time.perf_counter() - began))
    return Row(f"check of a caller, {entries:,} revoked", "µs", times[0], "none revoked", times[1])


async def bench_calls(setup: Setup) -> list[Row]:
    rounds, client = 7 if setup.quick else 15, [sys.executable, str(setup.program)]
    with setup.serving() as server, setup.baseline() as baseline, sshd(setup.folder) as ssh:
        job, rates, bare = await call_rates(server, baseline)
        variables = {"JOBWORKER_SERVER": f"localhost:{server.port}", "JOBWORKER_CERTS": str(server.certs)}
        processes: dict[str, Callable[[], float]] = {
            "status": lambda: timed_process(*client, "status", job, **variables),
            "start": lambda: timed_process(*client, "start", "--", "true", **variables),
            "pass": lambda: timed_process(sys.executable, "-c", "pass"),
            "import": lambda: timed_process(sys.executable, "-c", "import grpc"),
        }
        if "\n    run " in setup.help():
            processes["run"] = lambda: timed_process(*client, "run", "true", **variables)
        if ssh:
            processes["ssh"] = lambda: timed_process(*ssh, "true")
        times: dict[str, list[float]] = {name: [] for name in processes}
        for _ in range(rounds):
            for name, measure_process in processes.items():
                times[name].append(1e3 * measure_process())
    return [
        *start_of_the_universal_file(setup.folder, rounds),
        gate_row(setup.folder / "certs", 1000),
        Row("status calls, 16 at a time", "/s", rates, "bare grpc.aio", bare),
        Row("`status` as a process, from the .pyz", "ms", times["status"], "python -c 'import grpc'", times["import"]),
        Row("`status` as a process, from the .pyz", "ms", times["status"], "python -c pass", times["pass"]),
        Row(
            "`start` as a process, from the .pyz",
            "ms",
            times["start"],
            "ssh true" if ssh else "no sshd here",
            times.get("ssh", []),
        ),
        Row(
            "`run true` as a process, from the .pyz",
            "ms",
            times.get("run", []),
            "ssh true" if ssh else "no sshd here",
            times.get("ssh", []),
        ),
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


# --- 8. Attacks -----------------------------------------------------------------------------------------
# An attacker is a process of its own with the identity `user`, on one core. The good client is `user2`, in this
# process. The server has its default bounds.


def begun() -> None:
    """Tell the process that measures that the attack is under way."""
    print("attacking", flush=True)


def many_calls(target: Target) -> None:
    """Make 3,000 status calls at once on one connection, again and again."""

    async def attack() -> None:
        async with target.channel() as channel:
            request = pb.GetStatusRequest(id=await start(channel, "true"))
            begun()
            while True:
                asks = [call(channel, "GetJobStatus", request, pb.GetStatusResponse) for _ in range(3000)]
                await asyncio.gather(*asks, return_exceptions=True)

    asyncio.run(attack())


def many_streams(target: Target) -> None:
    """Follow a job that prints each 3 ms with 90 streams of each of 10 connections, as many as are admitted."""

    async def attack() -> None:
        channels = [target.channel() for _ in range(10)]
        job = await start(channels[0], PYTHON, "-c", TICKS, "0.003")
        tasks = [asyncio.create_task(drain(channel, job)) for channel in channels for _ in range(90)]
        while not any(task.done() for task in tasks):  # then one was refused
            await asyncio.sleep(0.01)
        begun()
        await asyncio.wait(tasks)

    asyncio.run(attack())


EMPTY_ARGUMENTS = 1_080_000  # of 2 bytes each, so as many as the largest request that the server reads can hold


def inflating_starts(target: Target) -> None:
    """Start a job with as many empty arguments as a request can hold, 64 at a time, compressed to 2 KB each."""

    async def attack() -> None:
        request = b"\x0a\x04true" + b"\x12\x00" * EMPTY_ARGUMENTS
        async with target.channel(compression=grpc.Compression.Gzip) as channel:
            method: Any = channel.unary_unary(f"/{JOB_WORKER}/StartJob")

            async def start_on() -> None:
                while True:
                    with contextlib.suppress(grpc.RpcError):
                        await method(request)

            begun()
            await asyncio.gather(*(start_on() for _ in range(64)))

    asyncio.run(attack())


# What no gRPC client does is written as HTTP/2 frames (RFC 9113).

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS = 0, 1, 3, 4
END_STREAM, END_HEADERS = 1, 4


def tls_to(target: Target) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=target.certs / "server-ca.pem")
    context.load_cert_chain(target.certs / "user.pem", target.certs / "user.key")
    context.set_alpn_protocols(["h2"])
    return context.wrap_socket(socket.create_connection(("localhost", target.port)), server_hostname="localhost")


def frame(kind: int, flags: int, number: int, content: bytes = b"") -> bytes:
    return len(content).to_bytes(3, "big") + bytes([kind, flags]) + struct.pack(">I", number) + content


def headers_of(method: str) -> bytes:
    """Return the headers of a gRPC call, uncompressed (RFC 7541, 6.2.2)."""
    pairs = {
        ":method": "POST",
        ":scheme": "https",
        ":path": f"/{JOB_WORKER}/{method}",
        ":authority": "x",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    words = (word.encode() for pair in pairs.items() for word in pair)
    return b"".join(b"\0" * (number % 2 == 0) + bytes([len(word)]) + word for number, word in enumerate(words))


def take_all(connections: list[ssl.SSLSocket], seconds: float) -> None:
    """Read what the server sends, until it has sent nothing for so long. Raises OSError after an end."""
    while arrived := select.select(connections, [], [], seconds)[0]:
        for connection in arrived:
            if not connection.recv(1 << 16):  # select tells nothing of what is decrypted, which the next one takes
                raise ConnectionError("the server has ended the connection")


def rapid_reset(target: Target) -> None:
    """Begin calls and reset each at once (CVE-2023-44487), on a new connection whenever the server ends one."""
    begin, reset = headers_of("GetJobStatus"), struct.pack(">I", 8)  # 8: CANCEL
    begun()
    while True:
        with contextlib.suppress(OSError), tls_to(target) as connection:
            connection.sendall(PREFACE + frame(SETTINGS, 0, 0))
            for first in range(1, 1 << 31, 2000):
                pairs = (
                    frame(HEADERS, END_HEADERS, number, begin) + frame(RST_STREAM, 0, number, reset)
                    for number in range(first, first + 2000, 2)
                )
                connection.sendall(b"".join(pairs))
                take_all([connection], 0)


def unread_statuses(target: Target) -> None:
    """Ask 1,000 times for the status of a job with large arguments, and take no answer: the HTTP/2 window is 0."""

    async def start_large() -> str:
        async with target.channel() as channel:
            return await start(channel, "true", *["\x01" * 100_000] * 19)

    request = pb.GetStatusRequest(id=asyncio.run(start_large())).SerializeToString()
    begin, body = headers_of("GetJobStatus"), b"\0" + struct.pack(">I", len(request)) + request
    calls = (
        frame(HEADERS, END_HEADERS, number, begin) + frame(DATA, END_STREAM, number, body)
        for number in range(1, 200, 2)
    )
    hundred = PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 0)) + b"".join(calls)
    begun()
    while True:
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            connections = [stack.enter_context(tls_to(target)) for _ in range(10)]
            for connection in connections:
                connection.sendall(hundred)
            take_all(connections, 0.2)


ATTACKS = {
    "3,000 calls at once": many_calls,
    "HTTP/2 rapid reset": rapid_reset,
    "1,000 unread statuses": unread_statuses,
    "900 streams of a job that prints each 3 ms": many_streams,
    f"starts with {EMPTY_ARGUMENTS:,} arguments": inflating_starts,
}


def run_attack(name: str, port: str, certs: str) -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # so it uses one core at most
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ATTACKS[name](Target(int(port), Path(certs)))


@contextlib.contextmanager
def attacking(name: str, server: Server) -> Iterator[None]:
    """Run an attack in a process of its own."""
    words = [sys.executable, __file__, "--attack", name, str(server.port), str(server.certs)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "attacking\n":
                raise SystemExit(f"bench: the attack `{name}` did not begin")
            yield
            if process.poll() is not None:
                raise SystemExit(f"bench: the attack `{name}` ended early")
        finally:
            process.terminate()


async def status_times(channel: grpc.aio.Channel, job: str, seconds: float) -> list[float]:
    """Return the milliseconds of the status calls of a client that asks each 50 ms.

    A call that must wait for the one before counts from when it was due. Otherwise a slow second would be one slow
    call, and a fast one a thousand fast calls.
    """
    times: list[float] = []
    due = time.perf_counter()
    end = due + seconds
    while time.perf_counter() < end:
        due += 0.05
        if (early := due - time.perf_counter()) > 0:
            await asyncio.sleep(early)
        asked = time.perf_counter() if early > 0 else due
        await call(channel, "GetJobStatus", pb.GetStatusRequest(id=job), pb.GetStatusResponse)
        times.append(1e3 * (time.perf_counter() - asked))
    return times


async def attack_rows(setup: Setup, name: str, seconds: float) -> list[Row]:
    """Measure a good client of an idle server and then beside an attack, and how much memory the attack takes."""
    growth: list[float] = []
    with setup.serving(crowd=False) as server:
        async with server.channel("user2") as channel:
            job = await start(channel, "true")
            idle = await status_times(channel, job, seconds / 2)
            with server.growth(growth), attacking(name, server):
                beside = await status_times(channel, job, seconds)
    rows = [
        Row(
            f"status, p{part}, beside {name}",
            "ms",
            [quantile(beside, part / 100)],
            "idle",
            [quantile(idle, part / 100)],
        )
        for part in (50, 99)
    ]
    return [*rows, Row(f"growth of server RSS, beside {name}", "MB", growth)]


async def revocation_time(server: Server, authority: jobworker.CertifiedKey, name: str) -> float:
    """Return the ms from the moment that a new identity is in the revocation list until its stream ends."""
    identity = jobworker.issue_identity(authority, name, ["user"])
    jobworker.write_pair(server.certs, name, identity)
    async with server.channel(name) as channel:
        job = await start(channel, "sleep", "1000")
        chunks: Any = stream(channel, job)
        await chunks.initial_metadata()  # the server sends it when the stream has begun
        jobworker.add_to_revocation_list(server.certs, authority, [identity.certificate.serial_number])
        began = time.perf_counter()
        if (code := await chunks.code()) != grpc.StatusCode.PERMISSION_DENIED:
            raise SystemExit(f"bench: the stream of a revoked client ended with {code}")
        return 1e3 * (time.perf_counter() - began)


async def bench_attacks(setup: Setup) -> list[Row]:
    certs = setup.folder / "certs"
    authority = jobworker.load_authority(certs, "client-ca")
    jobworker.write_pair(certs, "user2", jobworker.issue_identity(authority, "user2", ["user"]))
    rows, revocations = [], []
    for name in ATTACKS:
        rows += await attack_rows(setup, name, 2 if setup.quick else 10)
    if "\n    revoke " in setup.help():
        with setup.serving() as server:
            revocations = [await revocation_time(server, authority, f"user{number}") for number in range(3, 13)]
    return [*rows, Row("revoked to the end of the client's stream", "ms", revocations)]


# --- 9. Confinement -------------------------------------------------------------------------------------


CONFINED_FORKS = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import jobworker
jobworker.prepare_launcher("", jobworker.resource.getrlimit(jobworker.resource.RLIMIT_NOFILE))
steps = jobworker.confinement_steps(sys.argv[2], jobworker.TRIAL, jobworker.HIDDEN, "", ())
for line in sys.stdin:
    chosen = steps if line == "all\\n" else [step for step in steps if step[0] in line.strip().split(",")]
    began = time.perf_counter()
    reader, writer = os.pipe2(os.O_CLOEXEC)
    if os.fork() == 0:
        jobworker.confine(chosen)
        os.execv("/bin/true", ["true"])
    os.close(writer)
    os.read(reader, 1)
    print(1e3 * (time.perf_counter() - began), flush=True)
    os.close(reader)
"""
STEPS = {  # what a row names, and the steps of `confinement_steps` that it measures
    "no_new_privs": "no_new_privs",
    "an empty bounding set": "an empty bounding set",
    "a session keyring": "a session keyring",
    "mount and IPC namespaces": "a mount and an IPC namespace,a mount at /",
    "all of the confinement": "all",
}


def step_rows(setup: Setup, rounds: int) -> list[Row]:
    """Measure a fork and an exec with each step of the confinement by itself, in turns with those without any."""
    words = [sys.executable, "-I", "-S", "-c", CONFINED_FORKS, str(HERE), str(setup.folder / "state")]
    times: dict[str, list[float]] = {name: [] for name in ("", *STEPS)}
    with subprocess.Popen(words, bufsize=1, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in range(rounds):
            for name, found in times.items():
                process.stdin.write(f"{STEPS.get(name, '')}\n")
                found.append(float(process.stdout.readline()))
        process.stdin.close()
    return [Row(f"fork and exec with {name}", "ms", times[name], "without", times[""]) for name in STEPS]


def totals_row(rounds: int) -> Row:
    """Measure the writes of an owner's totals to the owner's cgroup. The owner's first start makes them."""
    tree = jobworker.make_tree(None, f"bench-{os.getpid()}", frozenset({"auto"}))
    times = []
    if tree.controllers:
        owner = jobworker.Cgroup(f"{tree.root}/u1")
        owner.create()
        for _ in range(rounds):
            began = time.perf_counter()
            owner.limit_total(jobworker.OwnerLimits(memory=1 << 30, pids=1000), tree.controllers)
            times.append(1e3 * (time.perf_counter() - began))
    tree.remove_unused()
    return Row("an owner's totals, once" + " (no controllers here)" * (not times), "ms", times)


async def bench_confine(setup: Setup) -> list[Row]:
    """Measure starts of confined jobs and of others, in turns of ten, and then the parts of the confinement."""
    count, plain, confined = 10 if setup.quick else 30, [], []
    shutil.copytree(setup.folder / "certs", setup.folder / "other" / "certs")
    (setup.folder / "other").chmod(0o711)
    with setup.serving() as one, setup.serving(setup.folder / "other", "--no-confine") as two:
        async with one.channel() as channel, two.channel() as other:
            for _ in range(count):
                confined += [1e3 * await timed(start(channel, "true")) for _ in range(10)]
                plain += [1e3 * await timed(start(other, "true")) for _ in range(10)]
    return [
        Row("StartJob of a confined job", "ms", confined, "not confined", plain),
        *step_rows(setup, 10 * count),
        totals_row(10 * count),
    ]


# --- 10. Scale and growth -------------------------------------------------------------------------------


def copy_ended_job(setup: Setup, count: int) -> None:
    """Copy the one ended job of the state folder so many times, each under an id of its own."""
    jobs = setup.folder / "state" / "jobs"
    (model,) = jobs.iterdir()
    for _ in range(count):
        shutil.copytree(model, jobs / jobworker.new_job_id(), ignore=shutil.ignore_patterns("control"))


def shim_memory(server: Server) -> list[float]:
    """Return the private memory of twenty shims, in MB."""
    launcher = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()[0]
    shims = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [kilobytes(f"/proc/{shim}/smaps_rollup", "Private_Clean", "Private_Dirty") / 1e3 for shim in shims[:20]]


async def idle_cpu(server: Server, seconds: float) -> float:
    """Return the milliseconds of CPU that a server uses in so many seconds without a call."""
    before = server.cpu()
    await asyncio.sleep(seconds)
    return (server.cpu() - before) * 1e3


async def waiting_cpu(server: Server, jobs: list[str], seconds: float, *, wait: bool) -> float:
    """Return the same while 100 clients are connected, which have asked for these jobs, and `wait` for their ends."""
    async with contextlib.AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(server.channel()) for _ in range(100)]

        def ask(number: int, *, wait: bool) -> Awaitable[Any]:
            request = pb.GetStatusRequest(id=jobs[number], wait=wait)
            return call(channels[number % 100], "GetJobStatus", request, pb.GetStatusResponse)

        asks = [asyncio.ensure_future(ask(number, wait=wait)) for number in range(len(jobs))]
        for number in range(100):  # then the server has the calls before it on this connection
            await ask(number, wait=False)
        await asyncio.sleep(1)
        used = await idle_cpu(server, seconds)
        for task in asks:
            task.cancel()
        await asyncio.gather(*asks, return_exceptions=True)
    return used


def restart_seconds(setup: Setup, folder: Path, *, keep_jobs: bool = False) -> float:
    """Return the seconds until a server listens. It is killed with `keep_jobs`, otherwise it stops its jobs."""
    began = time.perf_counter()
    with setup.serving(folder) as server:
        took = time.perf_counter() - began
        if keep_jobs:
            server.process.kill()
    return took


@dataclasses.dataclass(frozen=True)
class Listing:
    """The seconds of each `list` as a process, and the p99 in ms of the status calls beside them."""

    seconds: list[float]
    beside: float


async def list_figures(setup: Setup, server: Server, channel: Any, job: str) -> Listing:
    variables = {"JOBWORKER_SERVER": f"localhost:{server.port}", "JOBWORKER_CERTS": str(server.certs)}
    client = [sys.executable, str(setup.program)]
    seconds, statuses = [], []
    for _ in range(5):
        listing = asyncio.create_task(asyncio.to_thread(lambda: timed_process(*client, "list", **variables)))
        while not listing.done():
            statuses.append(1e3 / await status_rate(channel, job, 1, at_once=1))
        seconds.append(await listing)
    return Listing(seconds, quantile(statuses, 0.99))


async def bench_scale(setup: Setup) -> list[Row]:
    jobs, ended, seconds = (100, 1000, 3) if setup.quick else (1000, 10_000, 10)
    empty = setup.folder / "empty"
    shutil.copytree(setup.folder / "certs", empty / "certs")
    empty_restarts = [restart_seconds(setup, empty) for _ in range(3)]
    with setup.serving() as server:
        async with server.channel() as channel:
            await start_to_end(channel)
    copy_ended_job(setup, ended)
    with setup.serving() as server, setup.baseline() as baseline:
        async with server.channel() as channel, baseline.channel() as bare_channel:
            alone = [1e3 * await timed(start(channel, "true")) for _ in range(50)]
            ids = [await start(channel, "sleep", "1000") for _ in range(jobs)]
            loaded = [1e3 * await timed(start(channel, "true")) for _ in range(50)]
            statuses = [1e3 / await status_rate(channel, job, 1, at_once=1) for job in ids]
            memory, shims = server.memory(), shim_memory(server)
            # gRPC keeps the threads of busier times, so both servers get the same number of calls.
            await status_rate(bare_channel, "", jobs, BASELINE, 1)
        await asyncio.sleep(1)
        idle = await idle_cpu(server, seconds)
        bare_idle = await idle_cpu(baseline, seconds)
        connected = await waiting_cpu(server, ids, seconds, wait=False)
        waiting = await waiting_cpu(server, ids, seconds, wait=True)
        async with server.channel() as channel:
            listing = await list_figures(setup, server, channel, ids[0])
        server.process.kill()
    restarts = [restart_seconds(setup, setup.folder, keep_jobs=number < 2) for number in range(3)]
    what = f"{jobs} running, {ended} ended"
    return [
        Row(f"server RSS, {what}", "MB", [memory]),
        Row("private memory of a shim", "MB", shims),
        Row(f"idle CPU in {seconds} s, {what}", "ms", [idle], "bare grpc.aio", [bare_idle]),
        Row(
            f"CPU in {seconds} s, 100 clients wait for {jobs} jobs", "ms", [waiting], "they are connected", [connected]
        ),
        Row(f"status, p99, {what}", "ms", [quantile(statuses, 0.99)]),
        Row(f"restart to listening, {what}", "s", restarts, "with no jobs", empty_restarts),
        Row(f"StartJob with {jobs} running", "ms", loaded, "with none running", alone),
        Row(f"`list` as a process, {what}", "s", listing.seconds),
        Row("status, p99, beside `list`", "ms", [listing.beside], "alone", [quantile(statuses, 0.99)]),
    ]


def exponent(small: float, large: float) -> float:
    """Return the power of growth between two figures, the second for ten times as much as the first."""
    return math.log10(large / small)


async def bench_growth(setup: Setup) -> list[Row]:
    few, many = (10, 100) if setup.quick else (100, 1000)
    with setup.serving() as server:
        async with server.channel() as channel:
            jobs = [await start(channel, "head", "-c", str(size * MIB), "/dev/zero") for size in (25, 250)]
            for job in jobs:
                await drain(channel, job)
            seconds = [statistics.median([await timed(drain(channel, job)) for _ in range(3)]) for job in jobs]
            cpus = [(await latency_of(server, followers, 3))[2] for followers in (few // 10, few)]
            starts = []
            for more in (few, many - few):
                for _ in range(more):
                    await start(channel, "sleep", "1000")
                starts.append(statistics.median([await timed(start(channel, "true")) for _ in range(40)]))
    return [
        Row("growth of a stream's time, 25 to 250 MiB", "exponent", [exponent(*seconds)]),
        Row(f"growth of server CPU a line, {few // 10} to {few} followers", "exponent", [1 + exponent(*cpus)]),
        Row(f"growth of a start's time, {few} to {many} running jobs", "exponent", [exponent(*starts)]),
    ]


# --- 11. Command line -----------------------------------------------------------------------------------

BENCHES = (
    bench_stream, bench_latency, bench_speed, bench_input, bench_starts, bench_calls,
    bench_attacks, bench_confine, bench_scale, bench_growth,
)  # fmt: skip
ITEMS = {bench.__name__.partition("_")[2]: bench for bench in BENCHES}


def forget_claims(folder: Path) -> None:
    """Delete the claims of uids of the servers below this folder, because claims outlive their servers."""
    for claim in Path(jobworker.UID_CLAIMS).glob("*"):
        if f" {folder}/" in claim.read_text(errors="replace"):
            claim.unlink()


def measure(item: str, program: Path, *, quick: bool) -> list[Row]:
    """Measure one item with servers, certificates and a state folder of its own."""
    print(f"{time.strftime('%T')} measuring {item} of {program} ...", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="jobworker-bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o711)  # jobs pass through it to their homes
        jobworker.prepare_folder(folder / "certs", [])
        try:
            return asyncio.run(ITEMS[item](Setup(folder, program, quick)))
        finally:
            forget_claims(folder)


def measure_both(item: str, program: Path, other: Path, *, quick: bool, turns: int = 3) -> list[Row]:
    """Measure one item of two versions in turns; each row compares the first version with the second."""
    rows: dict[str, Row] = {}
    for turn in range(turns):
        order = (program, other) if turn % 2 == 0 else (other, program)  # neither is always the first
        sides = {each: {row.what: row for row in measure(item, each, quick=quick)} for each in order}
        for what, row in sides[program].items():
            pair = rows.setdefault(what, Row(what, row.unit, [], str(other), []))
            if row.rounds and sides[other][what].rounds:  # an earlier version may lack what a row measures
                pair.rounds.append(statistics.median(row.rounds))
                pair.peer_rounds.append(statistics.median(sides[other][what].rounds))
    return list(rows.values())


def make_parser() -> argparse.ArgumentParser:
    description = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="./build.sh bench", description=description)
    parser.add_argument("items", nargs="*", metavar="ITEM", help=f"of {' '.join(ITEMS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and smaller sizes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all rounds to this file")
    parser.add_argument(
        "--program", type=Path, metavar="PYZ", default=PYZ, help="the .pyz to measure (default: %(default)s)"
    )
    parser.add_argument("--against", type=Path, metavar="PYZ", help="compare with this .pyz, in three turns of both")
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="measure nothing; print the table of a file of --json"
    )
    parser.add_argument(
        "--summary", type=Path, metavar="FILE", help="measure nothing; print the main figures of a file of --json"
    )
    parser.add_argument(
        "--plot", type=Path, nargs=2, metavar=("FILE", "SVG"), help="measure nothing; draw a file of --json as SVG"
    )
    parser.add_argument("--baseline", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--attack", nargs=3, help=argparse.SUPPRESS)
    return parser


def measure_all(options: argparse.Namespace) -> Run:
    jobworker.raise_file_limit()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the servers are then ended, as after a Ctrl-C
    rows: list[Row] = []
    for item in options.items or ITEMS:
        if options.against:
            rows += measure_both(item, options.program, options.against, quick=options.quick)
        else:
            rows += measure(item, options.program, quick=options.quick)
    return Run(machine(), version(), time.strftime("%Y-%m-%d"), options.quick, rows)


def main() -> None:
    parser = make_parser()
    options = parser.parse_args()
    if options.table:
        print_table(Run.read(options.table))
        return
    if options.summary:
        print_summary(Run.read(options.summary))
        return
    if options.plot:
        options.plot[1].write_text(draw(Run.read(options.plot[0])), encoding="utf-8")
        return
    jobworker.prepare_grpc()
    if options.baseline:
        asyncio.run(serve_baseline(options.baseline))
        return
    if options.attack:
        run_attack(*options.attack)
        return
    if unknown := set(options.items) - set(ITEMS):
        parser.error(f"there is no item {', '.join(unknown)}")
    for program in filter(None, (options.program, options.against)):
        if not program.exists():
            parser.error(f"there is no {program} to measure; `./build.sh pyz` makes it")
    if options.against and options.against.samefile(options.program):
        parser.error(f"{options.against} is the program to measure itself")
    run = measure_all(options)
    if options.json:
        run.write(options.json)
    print_table(run)


if __name__ == "__main__":
    main()
