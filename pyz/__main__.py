"""Start Job worker from jobworker.pyz: check this machine, unpack once, run.

This is the first code that runs in a .pyz, and pyz/bundle.py puts it there with a filled `BUILT`. There are two kinds:
`./build.sh` packs one platform, ready to run, and `./build.sh universal` several, compressed (see first_run.py). Every
Python from 2.7 on can parse this file, since a Python that is too old must be told so in one sentence.
"""

import errno
import gc
import os
import stat
import sys

BUILT = {}  # what bundle.py packed
REMEDY = "set XDG_CACHE_HOME to a folder elsewhere"


def die(sentence):
    sys.exit("jobworker: " + sentence)


# --- 1. Which machine this is -------------------------------------------------------------------------------------


def this_platform():
    """Return Python, machine and libc, as ('CPython 3.11', 'Linux x86_64', 'glibc 2.36')."""
    name = getattr(getattr(sys, "implementation", None), "name", "Python").replace("cpython", "CPython")
    python = "%s %d.%d%s" % (name, sys.version_info[0], sys.version_info[1], getattr(sys, "abiflags", ""))
    system = os.uname() if hasattr(os, "uname") else (sys.platform, "", "", "", "")
    machine = "%s %s%s" % (system[0], system[4], "" if sys.maxsize > 2**32 else " (32 bits)")
    try:
        libc = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (AttributeError, ValueError, OSError):
        libc = ""
    if not libc.startswith("glibc "):
        libc = mapped_libc("/proc/self/maps")
    return python, machine, libc


def mapped_libc(maps):
    """Return the libc that this process runs with. musl is mapped as ld-musl-ARCH.so.1, on Debian as libc.so."""
    try:
        with open(maps) as file:
            names = [os.path.basename(line.split()[-1]) for line in file if "/" in line]
    except (IOError, OSError):
        names = []
    return "musl" if [n for n in names if n.startswith("ld-musl-") or n == "libc.so"] else "unknown libc"


def check_platform(running, built):
    """End with one sentence if the packages inside were built for another Python, machine or libc."""
    oldest, libc = built[2].split(), running[2].split()
    libc_fits = libc[0] == oldest[0] and version_numbers(libc[1:]) >= version_numbers(oldest[1:])
    if running[:2] == built[:2] and libc_fits:
        return
    remedy = "make one with ./build.sh on a machine like this one"
    if running[1] == built[1] and libc_fits:
        remedy = "run it with python%s, or make one for this Python with ./build.sh" % built[0].split()[1]
    die(
        "this jobworker.pyz is for %s on %s with %s%s, but this is %s on %s with %s: %s"
        % (built + (" or newer" if oldest[1:] else "",) + running + (remedy,))
    )


def check_python(version, least):
    if version < least:
        die("Python %d.%d or newer is needed, but this is Python %d.%d" % (least + version))


def target_of(running, built):
    """Return which target inside fits, as 'x86_64-glibc', or None."""
    python, machine, libc = running
    name = "%s-%s" % (machine.replace("Linux ", ""), libc.split()[0])
    new_enough = not libc.startswith("glibc ") or version_numbers(libc.split()[1:]) >= built["glibc"]
    return name if name in built["targets"] and python in built["pythons"] and new_enough else None


def version_numbers(words):
    return [int(n) for word in words for n in word.split(".")[:2]]


# --- 2. A folder for the unpacked files ---------------------------------------------------------------------------


def cache_folders():
    """Return the folders that may hold the unpacked files, the preferred one first."""
    home = os.environ.get("HOME", "")
    return (
        os.environ.get("XDG_CACHE_HOME", ""),
        os.environ.get("CACHE_DIRECTORY", "").split(":")[0],  # systemd sets it for a service
        home + "/.cache" if os.path.isdir(home) else "",
        "/var/tmp/jobworker-%d" % os.geteuid(),
        "/tmp/jobworker-%d" % os.geteuid(),
    )


def private_folder(path):
    """Make the folder and its missing parents, and return its real path.

    Raises OSError if another user can write to it or replace it. Code is imported from it.
    """
    uid, parent = os.geteuid(), ""
    for name in os.path.realpath(path).split("/")[1:]:
        parent += "/" + name
        try:
            info = os.lstat(parent)
        except FileNotFoundError:
            try:
                os.mkdir(parent, 0o700)
            except FileExistsError:  # another first run made it just now
                pass
            info = os.lstat(parent)
        if not stat.S_ISDIR(info.st_mode):
            raise OSError(0, "not a folder", parent)
        if info.st_uid not in (uid, 0, os.lstat("/").st_uid):
            raise OSError(0, "belongs to another user", parent)
        if info.st_mode & 0o022 and not info.st_mode & stat.S_ISVTX:
            raise OSError(0, "other users can write to it", parent)
    if info.st_uid != uid or info.st_mode & 0o022:
        raise OSError(0, "does not belong to this user alone", parent)
    return parent


def is_complete(folder):
    """Tell whether the folder holds what its file SIZE names, and nothing that was written after this last file.

    Programs that clean up temporary folders delete single files. The number of files, of bytes and the times come from
    one listing, which takes 1 ms. Damage that changes no time is not found: hashing the 36 MB took 26 ms.
    """
    count = size = 0
    folders = [folder]
    try:
        with open(folder + "/SIZE") as file:
            expected = tuple(int(word) for word in file.read().split())
            written = os.fstat(file.fileno()).st_mtime
        while folders:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    else:
                        info = entry.stat(follow_symlinks=False)
                        if info.st_mtime > written:
                            return False
                        count += 1
                        size += info.st_size
    except (OSError, ValueError):
        return False
    return (count, size) == expected and not os.path.islink(folder)


def unpacked_folder(archive, name, kind):
    """Return the folder of the unpacked files, after unpacking them if this is the first run."""
    refused = []
    for path in cache_folders():
        if not path.startswith("/"):
            continue
        try:
            parent = private_folder(path + "/jobworker")
            if os.statvfs(parent).f_flag & os.ST_NOEXEC:
                die("%s is on a file system that runs no code (noexec): %s" % (parent, REMEDY))
            folder = parent + "/" + name
            if not is_complete(folder):
                import_first_run(archive).install(archive, folder, kind, BUILT, is_complete)
            return folder
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                die("no room for %d MB in %s: free some, or %s" % (BUILT["megabytes"], parent, REMEDY))
            refused.append("%s: %s" % (error.filename or path, error.strerror))
    die("no folder to unpack to (%s): set XDG_CACHE_HOME to a folder that is this user's alone" % "; ".join(refused))


# --- 3. Start -----------------------------------------------------------------------------------------------------


def import_first_run(archive):
    """Import first_run.py from the archive. A later start does without, which saves compiling it."""
    sys.path.insert(0, archive)
    try:
        import first_run
    except Exception:  # noqa: BLE001  # Python compares no checksum
        die("%s is damaged: copy it here again" % archive)
    finally:
        del sys.path[0]
    return first_run


def main():
    archive, running = sys.path[0], this_platform()
    if "targets" in BUILT:
        check_python(sys.version_info[:2], (3, 10))
    else:
        check_platform(running, BUILT["platform"])
    # Only the standard library and the unpacked folder are searched. The working directory, PYTHONPATH and this
    # Python's own packages are not: their code would run as this user.
    library = os.path.dirname(os.__file__)
    keep = ("lib-dynload", "python%d%d.zip" % sys.version_info[:2])
    sys.path[:] = [p for p in sys.path if p == library or os.path.basename(p) in keep]
    package_folders, packages = [], BUILT["packages"]
    kind = target_of(running, BUILT) or "own" if "targets" in BUILT else "ordinary"
    if kind == "own":
        package_folders, packages = import_first_run(archive).own_packages(running, BUILT)
    # Several machines may share a home, so the name tells them apart.
    folder = unpacked_folder(archive, "%s-%s-%s" % (BUILT["hash"], sys.implementation.cache_tag, kind), kind)
    sys.path.insert(0, folder)
    sys.path.extend(package_folders)
    sys.dont_write_bytecode = True  # the folder holds all bytecode already
    for name in list(sys.modules):
        if name.split(".")[0] in BUILT["modules"]:
            del sys.modules[name]
    gc.disable()  # imports make no garbage; collecting it took 15 ms of a client's start
    try:
        import jobworker
    except Exception as error:  # noqa: BLE001  # damaged bytecode raises many kinds
        die("%s does not load, so delete it: %s" % (folder, error))
    jobworker.BUILD = " (%s)" % ", ".join(word for word in (BUILT["commit"], packages) if word)
    return jobworker.program


def explain(error):
    """Return the sentence for a package that does not load, mostly for want of a library of this system."""
    if "libstdc++" in str(error):
        return "this system has no libstdc++.so.6, which gRPC needs: install libstdc++6 (apt) or libstdc++ (dnf, apk)"
    return "a package does not load: %s" % error


if __name__ == "__main__":
    try:
        run = main()
    except KeyboardInterrupt:
        sys.exit(130)
    try:
        run()
    except ImportError as error:
        die(explain(error))
