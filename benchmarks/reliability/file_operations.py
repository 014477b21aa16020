"""Watch the file operations of a forked process, at its system calls, and let some of them fail.

1. The fork calls `Watcher.be_watched`: a seccomp filter stops it at every system call that can
   change a file, and hands the call to the parent (`seccomp_unotify(2)`). Preloading a library
   would miss calls that do not go through the C library: safetensors renames its files so.
2. The parent, in `Watcher.watch`, counts the calls on paths under one folder and answers each: go
   on, fail with an error number, or die. A write that fails has put half of its bytes into the
   file, as a full disk does.

Linux 5.5 or later on x86-64.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import select
import signal
import socket
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple


class _Call(NamedTuple):
    """A system call: what it does, and which of its arguments name a file."""

    kind: str
    folder: int | None = None
    """Argument with the file's descriptor, or that of the folder that a path is relative to."""
    path: int | None = None
    """Argument with a path."""
    flags: tuple[int, int] | None = None
    """Argument and mask: without one of these bits the call changes nothing."""


_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_CALLS = {
    1: _Call("write", 0),
    2: _Call("open", path=0, flags=(1, _WRITING)),
    3: _Call("close", 0),
    9: _Call("mmap", 4, flags=(3, mmap.MAP_SHARED)),
    18: _Call("write", 0),  # pwrite64
    20: _Call("write", 0),  # writev
    40: _Call("write", 0),  # sendfile
    73: _Call("flock", 0),
    74: _Call("fsync", 0),
    75: _Call("fsync", 0),  # fdatasync
    76: _Call("truncate", path=0),
    77: _Call("truncate", 0),  # ftruncate
    82: _Call("rename", path=1),
    83: _Call("mkdir", path=0),
    84: _Call("rmdir", path=0),
    85: _Call("open", path=0),  # creat
    86: _Call("link", path=1),
    87: _Call("unlink", path=0),
    88: _Call("link", path=1),  # symlink
    257: _Call("open", 0, 1, flags=(2, _WRITING)),  # openat
    258: _Call("mkdir", 0, 1),  # mkdirat
    263: _Call("unlink", 0, 1),  # unlinkat
    264: _Call("rename", 2, 3),  # renameat
    265: _Call("link", 2, 3),  # linkat
    266: _Call("link", 1, 2),  # symlinkat
    277: _Call("fsync", 0),  # sync_file_range
    285: _Call("truncate", 0),  # fallocate
    296: _Call("write", 0),  # pwritev
    316: _Call("rename", 2, 3),  # renameat2
    326: _Call("write", 2),  # copy_file_range
    437: _Call("open", 0, 1),  # openat2
}
_FREES_SPACE = {"unlink", "rmdir", "truncate", "flock", "close"}
"""What works on a full disk."""

# linux/seccomp.h, linux/filter.h, linux/audit.h
_SYS_SECCOMP, _SET_MODE_FILTER, _NEW_LISTENER, _PR_SET_NO_NEW_PRIVS = 317, 1, 8, 38
_RECEIVE, _SEND, _CONTINUE = 0xC0502100, 0xC0182101, 1
_NOTIFY, _ALLOW, _X86_64 = 0x7FC00000, 0x7FFF0000, 0xC000003E
_LOAD, _IF_EQUAL, _IF_ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in `struct seccomp_data`
_REMOVES_FOLDER, _WORKING_FOLDER = 0x200, -100  # AT_REMOVEDIR, AT_FDCWD


@dataclass(frozen=True)
class Fault:
    """What goes wrong."""

    operation: int
    """The operation that fails, from 1."""
    error: int | None
    """Error number; None kills the process before the operation."""
    persistent: bool = False
    """Whether later operations fail, too; with ENOSPC not those that a full disk still does."""

    def hits(self, n: int, kind: str) -> bool:
        """Whether the n-th operation fails."""
        if n == self.operation or not self.persistent:
            return n == self.operation
        return n > self.operation and not (self.error == errno.ENOSPC and kind in _FREES_SPACE)


class Operation(NamedTuple):
    """A file operation of the watched process."""

    kind: str
    path: str
    """Relative to the watched folder; of a rename, the new one."""
    failed: bool


@dataclass
class Watcher:
    """Answers the system calls of a forked process.

    Args:
        folder: Absolute path; only operations on it and below it count.
        fault: What fails; None lets everything pass.
    """

    folder: str
    fault: Fault | None = None
    operations: list[Operation] = field(default_factory=list)
    """Filled by `watch`."""

    def __post_init__(self) -> None:
        self._here, self._there = socket.socketpair()

    def be_watched(self) -> None:
        """Called in the fork: from now on the parent answers.

        Raises:
            OSError: the system does not allow it.
        """
        library = ctypes.CDLL(None, use_errno=True)
        program = b"".join(_filter())
        buffer = ctypes.create_string_buffer(program, len(program))
        code = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
        library.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        listener = library.syscall(_SYS_SECCOMP, _SET_MODE_FILTER, _NEW_LISTENER, code)
        if listener < 0:
            self._there.send(b"-")
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        socket.send_fds(self._there, [b"+"], [listener])

    def watch(self, seconds: float) -> None:
        """Called in the parent: answer until the process ends, or does nothing for so long.

        Raises:
            OSError: the system does not allow it.
        """
        self._there.close()
        with self._here:
            _, descriptors, _, _ = socket.recv_fds(self._here, 1, 1)
        if not descriptors:
            raise OSError(errno.EPERM, "the system lets no process watch another's calls")
        listener = descriptors[0]
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        try:
            while (events := poll.poll(seconds * 1000)) and events[0][1] & select.POLLIN:
                self._answer(listener)
        finally:
            os.close(listener)

    def _answer(self, listener: int) -> None:
        notice = bytearray(80)
        try:
            fcntl.ioctl(listener, _RECEIVE, notice)
        except FileNotFoundError:  # killed meanwhile
            return
        identity, process, number, *arguments = struct.unpack("QIxxxxixxxxxxxxxxxx6Q", notice)
        answer = struct.pack("QqiI", identity, 0, 0, _CONTINUE)
        if self._fails(process, number, arguments):
            assert self.fault is not None
            if self.fault.error is None:
                os.kill(process, signal.SIGKILL)
                return
            answer = struct.pack("QqiI", identity, 0, -self.fault.error, 0)
        fcntl.ioctl(listener, _SEND, answer)

    def _fails(self, process: int, number: int, arguments: list[int]) -> bool:
        """Whether a call is to fail; a write is half done then."""
        call = _CALLS[number]
        kind = call.kind
        path = _path(process, call, arguments)
        if path != self.folder and not path.startswith(f"{self.folder}/"):
            return False
        if kind == "mmap" and not arguments[2] & mmap.PROT_WRITE:
            return False
        if kind == "close" and not _descriptor(process, arguments[0])[0] & _WRITING:
            return False
        if number == 263 and arguments[2] & _REMOVES_FOLDER:
            kind = "rmdir"
        n = len(self.operations) + 1
        failed = self.fault is not None and self.fault.hits(n, kind)
        if failed and number == 1:
            _write_half(process, *arguments[:3])
        self.operations.append(Operation(kind, path[len(self.folder) + 1 :], failed))
        return failed


def _filter() -> list[bytes]:
    """Instructions of the filter: notify of `_CALLS`, allow everything else."""

    def instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("HBBI", code, if_true, if_false, value)

    notify, allow = instruction(_RETURN, _NOTIFY), instruction(_RETURN, _ALLOW)
    program = [instruction(_LOAD, _ARCHITECTURE), instruction(_IF_EQUAL, _X86_64, 1), allow]
    program.append(instruction(_LOAD, _NUMBER))
    for number, call in _CALLS.items():
        body = [notify]
        if call.flags is not None:
            argument, mask = call.flags
            load = instruction(_LOAD, _ARGUMENTS + 8 * argument)
            body = [load, instruction(_IF_ANY_BIT, mask, 1), allow, notify]
        program += [instruction(_IF_EQUAL, number, 0, len(body)), *body]
    return [*program, allow]


def _path(process: int, call: _Call, arguments: list[int]) -> str:
    """Absolute path that a call is about; empty if there is none."""
    name = "" if call.path is None else _text(process, arguments[call.path])
    if name.startswith("/"):
        return name
    folder = _WORKING_FOLDER if call.folder is None else _signed(arguments[call.folder])
    link = "cwd" if folder == _WORKING_FOLDER else f"fd/{folder}"
    try:
        target = Path(f"/proc/{process}/{link}").readlink()
    except OSError:  # no such descriptor
        return ""
    return str(target / name).removesuffix(" (deleted)")


def _signed(argument: int) -> int:
    return ctypes.c_int(argument & 0xFFFFFFFF).value


def _text(process: int, address: int) -> str:
    return os.fsdecode(_memory(process, address, 4096).split(b"\0", 1)[0])


def _memory(process: int, address: int, n_bytes: int) -> bytes:
    with Path(f"/proc/{process}/mem").open("rb", buffering=0) as memory:
        return os.pread(memory.fileno(), n_bytes, address)


def _descriptor(process: int, descriptor: int) -> tuple[int, int]:
    """Flags and position of an open file."""
    information = Path(f"/proc/{process}/fdinfo/{descriptor}").read_text()
    fields = dict(line.split(":", 1) for line in information.splitlines())
    return int(fields["flags"], 8), int(fields["pos"])


def _write_half(process: int, descriptor: int, address: int, n_bytes: int) -> None:
    path = Path(f"/proc/{process}/fd/{descriptor}")
    flags, position = _descriptor(process, descriptor)
    if flags & os.O_APPEND:
        position = path.stat().st_size
    file = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(file, _memory(process, address, n_bytes // 2), position)
    finally:
        os.close(file)
