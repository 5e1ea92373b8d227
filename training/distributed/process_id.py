"""Where a process runs, and whether it still does: asked about itself, sent to others, asked about them."""

from __future__ import annotations

import os
import signal
import socket
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Place:
    """A process, told apart from those of other hosts, and from a later one with its number.

    `kernel` is the running system and its space of process numbers: two containers on one machine may both have
    a process 7, and a number says nothing about a process of another space.
    """

    host: str
    kernel: str
    pid: int
    began: str  # in the kernel's clock ticks; empty where there is no /proc

    def near(self) -> bool:
        """Whether it is where this process can see it."""
        return (self.host, self.kernel) == (here().host, here().kernel)

    def dead(self) -> bool:
        """Whether it has ended, as far as can be seen from here. A zombie has."""
        return self.near() and self._state() in ("", "Z", "X")

    def able(self) -> bool:
        """Whether it runs near, and is not stopped."""
        return self.near() and self._state() not in ("", "Z", "X", "T", "t")

    def kill(self) -> None:
        """End it, if it is near and still the same process."""
        if self.near() and not self.dead():
            os.kill(self.pid, signal.SIGKILL)

    def _state(self) -> str:
        state, began = _status(self.pid)
        return state if began == self.began else ""


@cache
def here() -> Place:
    """This process's."""
    boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    kernel = f"{boot.read_text().strip()} {space.readlink()}" if boot.exists() and space.is_symlink() else ""
    return Place(socket.gethostname(), kernel, os.getpid(), _status(os.getpid())[1])


def _status(pid: int) -> tuple[str, str]:
    """(state, start time) of a process, proc(5); state "" where there is none."""
    if not Path("/proc/self/stat").exists():  # not Linux
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return "", ""
        return "R", ""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]
