#!/bin/sh
# Sets up, builds, runs and tests Job worker. Needs a POSIX shell, python3 >= 3.10 with venv, and, once, PyPI.
set -eu
cd -- "$(dirname -- "$0")"
venv=.venv
pyz=jobworker.pyz
wheels=build/wheels

usage() {
    cat <<'EOF'
usage: ./build.sh [VERB] [ARGS]
  pyz      build jobworker.pyz, the one file to copy (so does no verb)
  universal [TARGET...]       build dist/jobworker.pyz for CPython 3.10 to 3.14 on each TARGET:
           x86_64-glibc aarch64-glibc (the default), x86_64-musl aarch64-musl
  test-universal [TARGET...]  build it, by default for x86_64-musl too, and test it on every Python and system that this
           machine can run
  demo     play the README's session on a throw-away server
  serve    run the server from here: jobworker.py serve --without auto ARGS
  test     run the tests: pytest ARGS
  lint     check style, types, shell, gen/ and its .proto: ruff, mypy, shellcheck
  stubs    regenerate gen/ from workerservice.proto
  bench    print the figures: bench_jobworker.py ARGS
  chaos    attack the server for long: pytest -m chaos ARGS
PYTHON=python3.12 ./build.sh ... uses that Python. A jobworker.pyz runs on the Python version that built it.
EOF
}

die() {
    echo "build.sh: $*" >&2
    exit 1
}

# ---- 1. Python and the virtual environment ---------------------------------------------------------------------

# Prints the command that installs a package here. Its name is $1 for apt, $2 for dnf, $3 for apk.
install_hint() {
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
    die "${PYTHON:-python3} is not there or older than 3.10: $(install_hint python3-venv python3.12 python3)"
}

# Makes the folder .venv with the packages that requirements.txt locks. Its stamp makes a second call instant.
set_up() {
    find_python
    stamp="$python_is $(cksum <requirements.txt)"
    [ "$(cat $venv/stamp 2>/dev/null)" = "$stamp" ] && return
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        die "$python has no module to make virtual environments with: $(install_hint python3-venv python3.12 py3-pip)"
    echo "setting up $venv for Python ${python_is%% *} ..." >&2
    "$python" -m venv --clear $venv >&2 || die "$python could not make the virtual environment $PWD/$venv"
    sed '/^# lint/,$d' requirements.txt >$venv/requirements.txt
    install_packages $venv/requirements.txt
    echo "$stamp" >$venv/stamp
}

install_packages() {
    $venv/bin/python -m pip install --disable-pip-version-check --only-binary :all: --require-hashes -r "$1" \
        >$venv/pip.log 2>&1 || die "pip could not install requirements.txt ($(pip_failure)); see $PWD/$venv/pip.log"
}

pip_failure() {
    if grep -qE 'NewConnectionError|ConnectTimeout|NameResolution|ProxyError|Max retries' $venv/pip.log; then
        echo "PyPI cannot be reached from here: set https_proxy or PIP_INDEX_URL"
    elif grep -q 'THESE PACKAGES DO NOT MATCH THE HASHES' $venv/pip.log; then
        echo "a download does not have the hash that requirements.txt names"
    elif grep -q 'No matching distribution' $venv/pip.log; then
        echo "no ready-made package for this Python on a $(uname -m)"
    else tail -n 1 $venv/pip.log; fi
}

# ---- 2. Stubs --------------------------------------------------------------------------------------------------

stubs() {
    set_up
    make_stubs .
}

make_stubs() { # below the folder $1
    mkdir -p "$1/gen"
    : >"$1/gen/__init__.py"
    $venv/bin/python -m grpc_tools.protoc -Igen=. --python_out="$1" --pyi_out="$1" --grpc_python_out="$1" \
        gen/workerservice.proto
}

# ---- 3. jobworker.pyz ------------------------------------------------------------------------------------------

# The packages that the .pyz carries stand above the line "# development" of the lock.
run_time_packages() {
    sed -n '/^# development/q; s/^\([A-Za-z][A-Za-z0-9._-]*\)==.*/\1/p' requirements.txt | sort -u
}

# Prints what --version names: the commit, with + if files differ from it.
commit() {
    id=$(git rev-parse --short=12 HEAD 2>/dev/null) || return 0
    echo "commit $id$(git diff --quiet HEAD -- build.sh pyz jobworker.py gen requirements.txt || echo +)"
}

pyz() {
    set_up
    inputs="$(commit) $(cat build.sh pyz/*.py $venv/stamp jobworker.py gen/*.py | cksum)"
    [ -e $pyz ] && [ "$(cat $venv/pyz.stamp 2>/dev/null)" = "$inputs $(cksum <$pyz)" ] && return
    # shellcheck disable=SC2046 # each package is one word
    $venv/bin/python pyz/bundle.py --commit "$(commit)" $pyz $(run_time_packages)
    echo "$inputs $(cksum <$pyz)" >$venv/pyz.stamp
}

# ---- 4. dist/jobworker.pyz, one file for many machines -----------------------------------------------------------

# Downloads the wheels of the target $1 for CPython 3.$2, as the lock names them. pip takes a second for it.
download_wheels() {
    folder=$wheels/$1-$2 arch=${1%-*} stamp=$(cksum <requirements.txt)
    [ "$(cat "$folder/stamp" 2>/dev/null)" = "$stamp" ] && return
    case $1 in
        x86_64-glibc | aarch64-glibc) set -- "$1" "$2" "manylinux2014_$arch" "manylinux_2_17_$arch" ;;
        x86_64-musl | aarch64-musl) set -- "$1" "$2" "musllinux_1_1_$arch" "musllinux_1_2_$arch" ;;
        *) usage >&2; exit 2 ;;
    esac
    rm -rf "$folder"
    mkdir -p "$folder"
    sed '/^# development/,$d' requirements.txt | awk '/^[a-z]/ { keep = !/^pycparser/ } keep' >"$folder/requirements.txt"
    $venv/bin/python -m pip download --disable-pip-version-check --no-deps --only-binary :all: --require-hashes \
        -r "$folder/requirements.txt" --implementation cp --python-version "3.$2" \
        --abi "cp3$2" --abi abi3 --abi none --platform "$3" --platform "$4" -d "$folder" \
        >$venv/pip.log 2>&1 || die "pip could not download the wheels for $1 ($(pip_failure)); see $PWD/$venv/pip.log"
    echo "$stamp" >"$folder/stamp"
}

universal() {
    set_up
    [ $# -gt 0 ] || set -- x86_64-glibc aarch64-glibc
    for target; do
        for minor in 14 13 12 11 10; do
            download_wheels "$target" $minor
        done
    done
    mkdir -p dist
    $venv/bin/python pyz/bundle.py --commit "$(commit)" --wheels $wheels dist/jobworker.pyz "$@"
    (cd dist && sha256sum jobworker.pyz >SHA256SUMS && cat SHA256SUMS)
}

test_universal() {
    pyz
    [ $# -gt 0 ] || set -- x86_64-glibc aarch64-glibc x86_64-musl
    universal "$@"
    JOBWORKER_UNIVERSAL=all exec $venv/bin/python -m pytest -k "universal"
}

# ---- 5. The demo -----------------------------------------------------------------------------------------------

# Prints the commands of the README's session, those after "$ ". Before each stands the job id that its output there
# shows, or "-".
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
        else # from here on, the id of this job replaces the id in the README
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
    for claim in /var/lib/jobworker-uids/*; do # of uids, which outlives a server
        ! grep -qF " $tmp/state/" "$claim" 2>/dev/null || rm -f "$claim"
    done
    rm -rf "$tmp"
    exit $status
}

# ---- 6. Tests and tools ----------------------------------------------------------------------------------------

has_controllers() {
    mount=$(awk '$3 == "cgroup2" { print $2; exit }' /proc/mounts)
    [ -n "$mount" ] && grep -qw memory "$mount/cgroup.controllers"
}

# Runs the tests with the mark $2 in the guest, whose option is $1. pytest ends with 5 if ARGS select no such test.
in_guest() {
    guest_option=$1 mark=$2
    shift 2
    .ci/guest ${guest_option:+"$guest_option"} -- "$PWD/$venv/bin/python" -m pytest -m "$mark" "$@" || [ $? = 5 ]
}

# Runs the tests that need controllers or systemd in the guest, if this machine lacks them.
test_in_guest() {
    has_controllers && [ "$(cat /proc/1/comm)" = systemd ] && return
    if [ ! -x .ci/guest ] || [ "$(id -u)" != 0 ] || [ "$(uname -m)" != x86_64 ] || ! .ci/guest -- true; then
        echo "build.sh: skipped the tests that need cgroup controllers: this machine has none, and no guest" \
            "(the guest needs root and x86_64)" >&2
        return
    fi
    # Both at the same time: a guest has one CPU.
    in_guest --systemd systemd "$@" >$venv/systemd-guest.log 2>&1 &
    status=0
    in_guest "" "controllers or tree" "$@" || status=$?
    wait $! || status=$?
    cat $venv/systemd-guest.log
    return $status
}

run_tests() {
    pyz
    $venv/bin/python -m pytest "$@"
    test_in_guest "$@"
}

lint() {
    set_up
    $venv/bin/ruff check
    $venv/bin/ruff format --check
    $venv/bin/python -m mypy
    if [ ! -x $venv/bin/shellcheck ]; then
        sed -n '/^# lint/,$p' requirements.txt >$venv/lint.txt
        install_packages $venv/lint.txt
    fi
    $venv/bin/shellcheck build.sh .ci/run .ci/debian-root .ci/musl-root
    tmp=$(mktemp -d "${TMPDIR:-/tmp}/jobworker-lint.XXXXXX")
    trap 'rm -rf "$tmp"' EXIT
    make_stubs "$tmp"
    diff -r -x __pycache__ gen "$tmp/gen" || die "gen/ is not what workerservice.proto makes: ./build.sh stubs"
}

verb=${1-pyz}
[ $# = 0 ] || shift
case $verb in
    pyz | demo | lint | stubs) [ $# = 0 ] || { usage >&2; exit 2; }; $verb ;;
    serve) set_up; mkdir -p certs; exec $venv/bin/python jobworker.py serve --without auto "$@" ;;
    test) run_tests "$@" ;;
    universal) universal "$@" ;;
    test-universal) test_universal "$@" ;;
    bench) pyz; exec $venv/bin/python bench_jobworker.py "$@" ;;
    chaos) pyz; JOBWORKER_CHAOS=long exec $venv/bin/python -m pytest -m chaos "$@" ;;
    -h | --help | help) usage ;;
    *) usage >&2; exit 2 ;;
esac
