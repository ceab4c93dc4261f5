"""Start Job worker from jobworker.pyz: check this machine, unpack once, run.

This is the first code that runs in a .pyz, and pyz/bundle.py puts it there with a filled `BUILT`. Every Python from
2.7 on can parse it, since a Python that is too old must be told so in one sentence.
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
        found = os.listdir("/lib") if os.path.isdir("/lib") else []
        libc = "musl" if [name for name in found if name.startswith("ld-musl-")] else "unknown libc"
    return python, machine, libc


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


def is_complete(folder, expected):
    """Tell whether the folder holds the expected number of files and bytes.

    Programs that clean up temporary folders delete single files.
    """
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
    return (count, size) == expected and not os.path.islink(folder)


# --- 3. Unpacking -------------------------------------------------------------------------------------------------


def unpack(archive, parent, folder):
    """Unpack to a new folder and rename it, so that `folder` is complete or absent. A second first run waits."""
    import fcntl
    import shutil
    import tempfile
    import zipfile
    import zlib

    umask = os.umask(0o077)
    try:
        with open(parent + "/lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                for name in os.listdir(parent):
                    if name.startswith("new-"):  # a first run was killed and left it
                        shutil.rmtree(parent + "/" + name, ignore_errors=True)
            except OSError:  # this file system has no locks; the rename decides
                pass
            if is_complete(folder, BUILT["files"]):
                return
            new = tempfile.mkdtemp(prefix="new-", dir=parent)
            try:
                with zipfile.ZipFile(archive) as pyz:
                    pyz.extractall(new, [name for name in pyz.namelist() if name.startswith("jobworker/")])
                if os.path.lexists(folder):
                    os.rename(folder, new + "/damaged")
                os.rename(new + "/jobworker", folder)
            except OSError:
                if not is_complete(folder, BUILT["files"]):
                    raise
            except (zipfile.BadZipFile, zlib.error, EOFError):
                die("%s is damaged: copy it here again" % archive)
            finally:
                shutil.rmtree(new, ignore_errors=True)
    finally:
        os.umask(umask)


def unpacked_folder(archive):
    """Return the folder of the unpacked files, after unpacking them if this is the first run."""
    refused = []
    for path in cache_folders():
        if not path.startswith("/"):
            continue
        try:
            parent = private_folder(path + "/jobworker")
            if os.statvfs(parent).f_flag & os.ST_NOEXEC:
                die("%s is on a file system that runs no code (noexec): %s" % (parent, REMEDY))
            folder = parent + "/" + BUILT["hash"]
            if not is_complete(folder, BUILT["files"]):
                unpack(archive, parent, folder)
            return folder
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                die("no room for %d MB in %s: free some, or %s" % (BUILT["files"][1] >> 20, parent, REMEDY))
            refused.append("%s: %s" % (error.filename or path, error.strerror))
    die("no folder to unpack to (%s): set XDG_CACHE_HOME to a folder that is this user's alone" % "; ".join(refused))


# --- 4. Start -----------------------------------------------------------------------------------------------------


def main():
    check_platform(this_platform(), BUILT["platform"])
    archive = sys.path[0]
    # Only the standard library and the unpacked folder are searched. The working directory, PYTHONPATH and this
    # Python's own packages are not: their code would run as this user.
    library = os.path.dirname(os.__file__)
    keep = ("lib-dynload", "python%d%d.zip" % sys.version_info[:2])
    sys.path[:] = [p for p in sys.path if p == library or os.path.basename(p) in keep]
    folder = unpacked_folder(archive)
    sys.path.insert(0, folder)
    sys.dont_write_bytecode = True  # the folder holds all bytecode already
    for name in list(sys.modules):
        if name.split(".")[0] in BUILT["modules"]:
            del sys.modules[name]
    gc.disable()  # imports make no garbage; collecting it took 15 ms of a client's start
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
