"""Identity of a process across hosts, and whether it is still running."""

import os
import signal
import socket
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class ProcessId:
    """The identity of a process: unique across hosts, containers and reuse of its pid.

    `kernel` identifies the boot and the pid namespace, because two containers on one machine may both have a pid 7.
    """

    host: str
    kernel: str
    pid: int
    start_time: str  # in clock ticks since boot; empty without /proc

    def is_local(self) -> bool:
        """Return True if it has the host and pid namespace of this process."""
        return (self.host, self.kernel) == (current_process().host, current_process().kernel)

    def is_dead(self) -> bool:
        """Return True if it is local and has ended. A zombie has ended."""
        return self.is_local() and self._state() in ("", "Z", "X")

    def is_running(self) -> bool:
        """Return True if it is local, has not ended and is not stopped."""
        return self.is_local() and self._state() not in ("", "Z", "X", "T", "t")

    def kill(self) -> None:
        """Send SIGKILL if it is local and still the same process."""
        if self.is_local() and not self.is_dead():
            os.kill(self.pid, signal.SIGKILL)

    def _state(self) -> str:
        state, start_time = _proc_stat(self.pid)
        return state if start_time == self.start_time else ""


@cache
def current_process() -> ProcessId:
    """Return the identity of this process."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    kernel = f"{boot.read_text().strip()} {namespace.readlink()}" if boot.exists() and namespace.is_symlink() else ""
    return ProcessId(socket.gethostname(), kernel, os.getpid(), _proc_stat(os.getpid())[1])


def _proc_stat(pid: int) -> tuple[str, str]:
    """Return (state, start time) of a process, see proc(5); state "" if there is none."""
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
