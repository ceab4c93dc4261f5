#!/bin/sh
# Sets up, builds, runs and tests Job worker. Needs a POSIX shell, python3 >= 3.10 with venv, and, once, PyPI.
set -eu
cd -- "$(dirname -- "$0")"
venv=.venv
pyz=jobworker.pyz

usage() {
    cat <<'EOF'
usage: ./build.sh [VERB] [ARGS]
  pyz      build jobworker.pyz, the one file to copy (so does no verb)
  demo     play the README's session on a throw-away server
  serve    run the server from here: jobworker.py serve --without auto ARGS
  test     run the tests: pytest ARGS
  lint     ruff and mypy
  stubs    regenerate gen/ from workerservice.proto
  bench    print the figures: bench_jobworker.py ARGS
  chaos    attack the server for long: pytest -m chaos ARGS
PYTHON=python3.12 ./build.sh ... takes that Python; a jobworker.pyz is for the Python that built it.
EOF
}

die() {
    echo "build.sh: $*" >&2
    exit 1
}

# ---- 1. Python and the virtual environment ---------------------------------------------------------------------

# How this machine installs something: $1 with apt, $2 with dnf, $3 with apk.
how() {
    if command -v apt-get >/dev/null; then echo "apt install $1"
    elif command -v dnf >/dev/null; then echo "dnf install $2"
    elif command -v apk >/dev/null; then echo "apk add $3"
    else echo "install it with this system's package manager"; fi
}

find_python() {
    for python in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python3.10}; do
        python_is=$("$python" -c 'import sys; print(*sys.version.split(), sys.prefix); sys.exit(sys.version_info < (3, 10))' \
            2>/dev/null) && return
    done
    die "${PYTHON:-python3} is not there or older than 3.10: $(how python3-venv python3.12 python3)"
}

# The folder .venv with what requirements.txt locks; its stamp makes a second call instant.
set_up() {
    find_python
    stamp="$python_is $(cksum <requirements.txt)"
    [ "$(cat $venv/stamp 2>/dev/null)" = "$stamp" ] && return
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        die "$python has no module to make virtual environments with: $(how python3-venv python3.12 py3-pip)"
    echo "setting up $venv for Python ${python_is%% *} ..." >&2
    "$python" -m venv --clear $venv >&2 || die "$python could not make the virtual environment $PWD/$venv"
    $venv/bin/python -m pip install --disable-pip-version-check --require-hashes -r requirements.txt \
        >$venv/pip.log 2>&1 || die "pip could not install requirements.txt ($(pip_failure)); see $PWD/$venv/pip.log"
    echo "$stamp" >$venv/stamp
}

pip_failure() {
    if grep -qE 'NewConnectionError|ConnectTimeout|NameResolution|ProxyError|Max retries' $venv/pip.log; then
        echo "PyPI cannot be reached from here: set https_proxy or PIP_INDEX_URL"
    elif grep -q 'THESE PACKAGES DO NOT MATCH THE HASHES' $venv/pip.log; then
        echo "a download is not what the lock names"
    elif grep -q 'No matching distribution' $venv/pip.log; then
        echo "no ready-made package for this Python on a $(uname -m)"
    else tail -n 1 $venv/pip.log; fi
}

# ---- 2. Stubs --------------------------------------------------------------------------------------------------

stubs() {
    set_up
    mkdir -p gen
    [ -e gen/__init__.py ] || : >gen/__init__.py
    $venv/bin/python -m grpc_tools.protoc -Igen=. --python_out=. --pyi_out=. --grpc_python_out=. \
        gen/workerservice.proto
}

# ---- 3. jobworker.pyz ------------------------------------------------------------------------------------------

# The first code that runs in a .pyz. Any Python 3 parses it (and 2.7, by the way), since a wrong one must be told
# so.
bootstrap() {
    cat <<'EOF'
import errno
import gc
import os
import stat
import sys

BUILT = {}  # what is inside, as the build found it
ELSEWHERE = "set XDG_CACHE_HOME to a folder elsewhere"


def die(sentence):
    sys.exit("jobworker: " + sentence)


def here():
    """Tell what this is, as 'CPython 3.11', 'Linux x86_64', 'glibc 2.36'."""
    name = getattr(getattr(sys, "implementation", None), "name", "Python").replace("cpython", "CPython")
    python = "%s %d.%d%s" % (name, sys.version_info[0], sys.version_info[1], getattr(sys, "abiflags", ""))
    system = os.uname() if hasattr(os, "uname") else (sys.platform, "", "", "", "")
    machine = "%s %s%s" % (system[0], system[4], "" if sys.maxsize > 2**32 else " (32 bits)")
    try:
        libc = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (AttributeError, ValueError, OSError):
        libc = ""
    if not libc.startswith("glibc "):
        found = os.listdir("/lib") if os.path.isdir("/lib") else []
        libc = "musl" if [name for name in found if name.startswith("ld-musl-")] else "unknown libc"
    return python, machine, libc


def compare(here, built):
    """Refuse, in one sentence, a Python, machine or libc that what is inside was not made for."""
    least, has = built[2].split(), here[2].split()
    libc = has[0] == least[0] and numbers(has[1:]) >= numbers(least[1:])
    if here[:2] == built[:2] and libc:
        return
    way = "make one with ./build.sh on a machine like this one"
    if here[1] == built[1] and libc:
        way = "run it with python%s, or make one for this Python with ./build.sh" % built[0].split()[1]
    die(
        "this jobworker.pyz is for %s on %s with %s%s, and here is %s on %s with %s: %s"
        % (built + (" or newer" if least[1:] else "",) + here + (way,))
    )


def numbers(words):
    return [int(n) for word in words for n in word.split(".")[:2]]


def places():
    """Name the folders that may hold the unpacked files, the best first."""
    home = os.environ.get("HOME", "")
    return (
        os.environ.get("XDG_CACHE_HOME", ""),
        os.environ.get("CACHE_DIRECTORY", "").split(":")[0],  # a systemd service's
        home + "/.cache" if os.path.isdir(home) else "",
        "/var/tmp/jobworker-%d" % os.geteuid(),
        "/tmp/jobworker-%d" % os.geteuid(),
    )


def own(path):
    """Make the folder, as far as it is not there, and return its real path; no other user can write it or move it."""
    uid, at = os.geteuid(), ""
    for name in os.path.realpath(path).split("/")[1:]:
        at += "/" + name
        try:
            info = os.lstat(at)
        except FileNotFoundError:
            try:
                os.mkdir(at, 0o700)
            except FileExistsError:  # by another first run, just now
                pass
            info = os.lstat(at)
        if not stat.S_ISDIR(info.st_mode):
            raise OSError(0, "not a folder", at)
        if info.st_uid not in (uid, 0, os.lstat("/").st_uid):
            raise OSError(0, "another user's", at)
        if info.st_mode & 0o022 and not info.st_mode & stat.S_ISVTX:
            raise OSError(0, "other users may write there", at)
    if info.st_uid != uid or info.st_mode & 0o022:
        raise OSError(0, "not this user's alone", at)
    return at


def whole(folder):
    """Tell whether all is there: cleaners of temporary files delete single ones."""
    count = size = 0
    folders = [folder]
    try:
        while folders:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    else:
                        count += 1
                        size += entry.stat(follow_symlinks=False).st_size
    except OSError:
        return False
    return (count, size) == BUILT["whole"] and not os.path.islink(folder)


def unpack(archive, place, folder):
    """Unpack beside the folder and rename, so that it is never seen half done; the second of two first runs waits."""
    import fcntl
    import shutil
    import tempfile
    import zipfile

    umask = os.umask(0o077)
    try:
        with open(place + "/lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                for name in os.listdir(place):
                    if name.startswith("new-"):  # left by one that was killed
                        shutil.rmtree(place + "/" + name, ignore_errors=True)
            except OSError:  # a file system without locks: the rename decides
                pass
            if whole(folder):
                return
            new = tempfile.mkdtemp(prefix="new-", dir=place)
            try:
                with zipfile.ZipFile(archive) as pyz:
                    pyz.extractall(new, [name for name in pyz.namelist() if name.startswith("jobworker/")])
                if os.path.lexists(folder):
                    os.rename(folder, new + "/damaged")
                os.rename(new + "/jobworker", folder)
            except OSError:
                if not whole(folder):
                    raise
            except (zipfile.BadZipFile, zipfile.zlib.error, EOFError):
                die("%s is damaged: copy it here again" % archive)
            finally:
                shutil.rmtree(new, ignore_errors=True)
    finally:
        os.umask(umask)


def unpacked(archive):
    """Return the folder of the unpacked files, which this makes on the first run."""
    refused = []
    for path in places():
        if not path.startswith("/"):
            continue
        try:
            place = own(path + "/jobworker")
            if os.statvfs(place).f_flag & os.ST_NOEXEC:
                die("%s is on a file system that runs no code (noexec): %s" % (place, ELSEWHERE))
            folder = place + "/" + BUILT["hash"]
            if not whole(folder):
                unpack(archive, place, folder)
            return folder
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                die("no room for %d MB in %s: make some, or %s" % (BUILT["whole"][1] >> 20, place, ELSEWHERE))
            refused.append("%s: %s" % (error.filename or path, error.strerror))
    die("no folder to unpack to (%s): set XDG_CACHE_HOME to a folder that is this user's alone" % "; ".join(refused))


def main():
    compare(here(), BUILT["for"])
    archive = sys.path[0]
    # What was there before has no say: not the working directory, nor PYTHONPATH, nor other packages of this Python.
    library = os.path.dirname(os.__file__)
    keep = ("lib-dynload", "python%d%d.zip" % sys.version_info[:2])
    sys.path[:] = [p for p in sys.path if p == library or os.path.basename(p) in keep]
    folder = unpacked(archive)
    sys.path.insert(0, folder)
    sys.dont_write_bytecode = True  # the folder is complete as it is
    for name in list(sys.modules):
        if name.split(".")[0] in BUILT["names"]:
            del sys.modules[name]
    gc.disable()  # nothing that imports make is garbage: 15 ms of a client's start
    try:
        import jobworker
    except ImportError as error:
        die("%s does not load: %s" % (folder, error))
    return jobworker.program


if __name__ == "__main__":
    try:
        run = main()
    except KeyboardInterrupt:
        sys.exit(130)
    run()
EOF
}

# Makes the .pyz: a zip of this bootstrap, and below jobworker/ of the product and what it needs at run time, as
# bytecode that is never compared with a source. The same input makes the same bytes.
builder() {
    cat <<'EOF'
import hashlib
import importlib.metadata
import importlib.util
import pathlib
import py_compile
import re
import sys
import tempfile
import zipfile
from typing import Any

out, bootstrap, *names = sys.argv[1:]
UNUSED = ("cffi/", "pycparser/")  # of cffi, only _cffi_backend is needed at run time
MODE = py_compile.PycInvalidationMode.UNCHECKED_HASH


def compiled(source: pathlib.Path, name: str) -> bytes:
    with tempfile.NamedTemporaryFile() as pyc:
        py_compile.compile(str(source), pyc.name, "jobworker.pyz/" + name, doraise=True, invalidation_mode=MODE)
        return pathlib.Path(pyc.name).read_bytes()


files: dict[str, bytes] = {}
glibc = [(2, 17)]
musl = False
for name in names:
    try:
        package = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:  # not for this Python
        continue
    tags = package.read_text("WHEEL") or ""
    musl |= "musllinux" in tags
    glibc.append(min([(int(a), int(b)) for a, b in re.findall(r"manylinux_(\d+)_(\d+)_", tags)], default=(2, 17)))
    for file in package.files or ():
        path, where = str(file), pathlib.Path(file.locate())
        if ".dist-info/" in path:
            if re.match("licen|notice|copying", file.name, re.IGNORECASE):
                files[f"licenses/{name}/{file.name}"] = where.read_bytes()
        elif path.startswith(("..", *UNUSED)):
            continue
        elif file.suffix == ".py":
            files[path + "c"] = compiled(where, path)
        elif file.suffix == ".so":
            files[path] = where.read_bytes()
for where in (pathlib.Path("jobworker.py"), *pathlib.Path("gen").glob("*.py")):  # with source, for its tracebacks
    files[str(where)] = where.read_bytes()
    files[importlib.util.cache_from_source(str(where))] = compiled(where, str(where))

start = pathlib.Path(bootstrap).read_text()
scope: dict[str, Any] = {"__name__": "bootstrap"}
exec(compile(start, bootstrap, "exec"), scope)
python, machine, libc = scope["here"]()
built = {
    "for": (python, machine, "musl" if musl else "glibc %d.%d" % max(glibc)),
    "hash": hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:16],
    "names": sorted({re.split("[./]", name)[0] for name in files} - {"__pycache__", "licenses"}),
    "whole": (len(files), sum(map(len, files.values()))),
}
main = pathlib.Path(bootstrap).with_name("__main__.py")
main.write_text(start.replace("BUILT = {}", f"BUILT = {built!r}", 1))
content = {"jobworker/" + name: data for name, data in files.items()}
content["__main__.py"] = main.read_bytes()
content["__main__.pyc"] = compiled(main, "__main__.py")
with open(out + ".new", "wb") as raw:
    # The second line is for a copy that was cut short, which Python takes for a script.
    raw.write(b"#!/usr/bin/env python3\n# coding: this-jobworker.pyz-was-cut-short--copy-it-again\n")
    with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as pyz:
        for name, data in sorted(content.items()):
            info = zipfile.ZipInfo(name)
            info.external_attr = 0o644 << 16
            info.compress_type = zipfile.ZIP_STORED if name.startswith("__main__") else zipfile.ZIP_DEFLATED
            pyz.writestr(info, data)
pathlib.Path(out + ".new").chmod(0o755)
pathlib.Path(out + ".new").replace(out)
EOF
}

run_time_packages() { # those above the line "# development" of the lock
    sed -n '/^# development/q; s/^\([A-Za-z][A-Za-z0-9._-]*\)==.*/\1/p' requirements.txt | sort -u
}

pyz() {
    set_up
    inputs="$(cat build.sh $venv/stamp jobworker.py gen/*.py | cksum)"
    [ -e $pyz ] && [ "$(cat $venv/pyz.stamp 2>/dev/null)" = "$inputs $(cksum <$pyz)" ] && return
    bootstrap >$venv/bootstrap.py
    builder >$venv/builder.py
    # shellcheck disable=SC2046 # one word a package
    $venv/bin/python $venv/builder.py $pyz $venv/bootstrap.py $(run_time_packages)
    echo "$inputs $(cksum <$pyz)" >$venv/pyz.stamp
}

# ---- 4. The demo -----------------------------------------------------------------------------------------------

# The README's session: the commands after "$ ", each with the id that its output there shows ("-": none).
session() {
    awk '/^<!-- session -->/ { near = 1; next }
         near && /^```/      { if (inside) exit; inside = 1; next }
         !inside             { next }
         /^[$] /             { if (command) print id, command; command = substr($0, 3); id = "-" }
         /^started JobID: /  { id = $3 }
         END                 { if (command) print id, command }' README.md
}

demo() {
    pyz
    find_python
    root=$PWD
    tmp=$(mktemp -d "${TMPDIR:-/tmp}/jobworker-demo.XXXXXX")
    chmod 711 "$tmp" # jobs of other uids reach their homes below
    server=
    trap end_demo EXIT
    trap 'exit 130' INT TERM
    mkdir "$tmp/work" "$tmp/bin"
    : >"$tmp/ids"
    session >"$tmp/session"
    printf '#!/bin/sh\nexec "%s" "$@"\n' "$(command -v "$python")" >"$tmp/bin/python3"
    chmod 755 "$tmp/bin/python3"
    PATH=$tmp/bin:$PATH
    cd "$tmp/work"
    ln -s "$root/$pyz" $pyz
    start_server
    while read -r id command; do
        command=$(printf '%s\n' "$command" | sed -f "$tmp/ids")
        printf '$ %s\n' "$command"
        if [ "$id" = - ]; then
            eval "$command" </dev/null || :
        else # its job's id stands for the README's from here on
            eval "$command" </dev/null >"$tmp/out" || :
            cat "$tmp/out"
            sed -n "s/^started JobID: \(.*\)/s=$id=\1=g/p" "$tmp/out" >>"$tmp/ids"
        fi
    done <"$tmp/session"
}

start_server() {
    port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    export JOBWORKER_SERVER="127.0.0.1:$port" JOBWORKER_CERTS="$tmp/certs"
    mkfifo "$tmp/says"
    python3 $pyz serve --listen "$JOBWORKER_SERVER" --certs "$tmp/certs" --state "$tmp/state" --without auto \
        >"$tmp/says" 2>"$tmp/log" &
    server=$!
    exec 3<"$tmp/says"
    while read -r line <&3; do
        case $line in "jobworker: serving on "*) return ;; esac
    done
    cat "$tmp/log" >&2
    die "the throw-away server did not start"
}

end_demo() {
    status=$?
    trap '' INT TERM
    for job in "$tmp"/state/jobs/*/; do
        [ -d "$job" ] && python3 $pyz stop -r admin -j "$(basename "$job")" >/dev/null 2>&1 || :
    done
    [ -z "$server" ] || { kill "$server" 2>/dev/null && wait "$server" || :; }
    rm -rf "$tmp"
    exit $status
}

# ---- 5. Tests and tools ----------------------------------------------------------------------------------------

has_controllers() {
    mount=$(awk '$3 == "cgroup2" { print $2; exit }' /proc/mounts)
    [ -n "$mount" ] && grep -qw memory "$mount/cgroup.controllers"
}

# In the guest, started with $1, the tests marked $2; pytest's 5 is: no such test among ARGS.
in_guest() {
    how=$1 mark=$2
    shift 2
    .ci/guest $how -- "$PWD/$venv/bin/python" -m pytest -m "$mark" "$@" || [ $? = 5 ]
}

# What needs controllers or systemd runs in the guest, where the machine has none.
test_in_guest() {
    has_controllers && [ "$(cat /proc/1/comm)" = systemd ] && return
    if [ ! -x .ci/guest ] || [ "$(id -u)" != 0 ] || [ "$(uname -m)" != x86_64 ] || ! .ci/guest -- true; then
        echo "build.sh: skipped what needs cgroup controllers: none here, and no guest (root on an x86_64 has one)" >&2
        return
    fi
    in_guest "" "controllers or tree" "$@"
    in_guest --systemd systemd "$@"
}

run_tests() {
    pyz
    $venv/bin/python -m pytest "$@"
    test_in_guest "$@"
}

lint() {
    pyz
    $venv/bin/ruff check
    # The bootstrap is for any Python, so without annotations and what else is newer.
    $venv/bin/ruff check --ignore ANN,D,INP,RET503,RUF005,S,SIM105,TRY300,UP $venv/bootstrap.py $venv/builder.py
    $venv/bin/python -m mypy
    $venv/bin/python -m mypy $venv/builder.py
}

verb=${1-pyz}
[ $# = 0 ] || shift
case $verb in
    pyz | demo | lint | stubs) [ $# = 0 ] || { usage >&2; exit 2; }; $verb ;;
    serve) set_up; mkdir -p certs; exec $venv/bin/python jobworker.py serve --without auto "$@" ;;
    test) run_tests "$@" ;;
    bench) pyz; exec $venv/bin/python bench_jobworker.py "$@" ;;
    chaos) pyz; JOBWORKER_CHAOS=long exec $venv/bin/python -m pytest -m chaos "$@" ;;
    -h | --help | help) usage ;;
    *) usage >&2; exit 2 ;;
esac
