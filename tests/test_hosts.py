"""Two hosts (network namespaces with their own addresses and host names), one of which is cut off during a run."""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from conftest import rows, tensors, write_config
from launched import TRAIN, TorchrunRanks, rows_in, train, wait_for_rows

LIMIT = 5.0  # s, parallel.timeout_s
EXIT_S = 3.5  # after the limit; includes 0.5 s until the test notices
HOSTS = {"host-a": "10.213.77.1", "host-b": "10.213.77.2"}


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def two_hosts():
    """Create the hosts, connected by a virtual cable."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and `ip`")
    try:
        for host in HOSTS:
            ip("netns", "add", host)
            ip("-n", host, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        remove_hosts()
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    try:
        ip("-n", "host-a", "link", "add", "net0", "type", "veth", "peer", "name", "net0", "netns", "host-b")
        for host, address in HOSTS.items():
            ip("-n", host, "address", "add", f"{address}/24", "dev", "net0")
            ip("-n", host, "link", "set", "net0", "up")
        yield
    finally:
        remove_hosts()


def remove_hosts() -> None:
    for host in HOSTS:
        subprocess.run(["ip", "netns", "delete", host], capture_output=True)


def start(logs: Path, config: Path) -> list[TorchrunRanks]:
    """Start one rank on each host."""
    return [
        TorchrunRanks(
            logs / host, "--nnodes", "2", "--nproc-per-node", "1", "--local-addr", address, "--rdzv-id", "run",
            "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{HOSTS['host-a']}:29400",
            "--rdzv-conf", f"is_host={int(host == 'host-a')}", *TRAIN, "--config", str(config),
            prefix=("ip", "netns", "exec", host, "unshare", "--uts", "sh", "-c", f'hostname {host}; exec "$@"', "sh"),
            GLOO_SOCKET_IFNAME="net0",
        )
        for host, address in HOSTS.items()
    ]  # fmt: skip


@pytest.mark.soak
@pytest.mark.usefixtures("two_hosts")
def test_a_host_cut_off_ends_the_run_on_both_and_resuming_gives_the_same_weights(options, tmp_path):
    values = options(
        name="cut", steps=60, eval={"every": None, "tokens": 64}, checkpoint={"every": 10},
        logging={"every": 1, "tensorboard": False}, parallel={"timeout_s": LIMIT},
    )  # fmt: skip
    cut, uncut = tmp_path / "runs/cut", tmp_path / "runs/uncut"
    alone = train(tmp_path / "alone", write_config(tmp_path / "uncut.yaml", values | {"name": "uncut"}))
    try:
        assert alone.process.wait(60) == 0, alone.errors()
    finally:
        alone.kill()

    path = write_config(tmp_path / "cut.yaml", values)
    both = start(tmp_path / "first", path)
    try:
        wait_for_rows(cut, 15, *both)
        began = time.monotonic()
        ip("-n", "host-b", "link", "set", "net0", "down")
        while any(host.pids() for host in both):
            assert time.monotonic() - began < LIMIT + EXIT_S, [host.errors() for host in both]
            time.sleep(0.05)
        seconds = time.monotonic() - began
    finally:
        for host in both:
            host.kill()
    assert rows_in(cut) < 60
    on_a, on_b = (host.line() for host in both)
    print(f"{seconds:.1f} s\n{on_a}\n{on_b}")
    assert on_a.startswith("error: rank 1 (host host-b, pid ") and "while rank 0 (host host-a, pid " in on_a
    silent = f"torchrun, which holds the ranks' store at {HOSTS['host-a']}:"
    assert on_b.startswith(f"error: {silent}") and ", has not answered for " in on_b
    assert "while rank 1 (host host-b, pid " in on_b and "; rank 0 (host host-a, pid " in on_b

    ip("-n", "host-b", "link", "set", "net0", "up")
    both = start(tmp_path / "second", path)
    try:
        assert [host.process.wait(60) for host in both] == [0, 0], [host.errors() for host in both]
    finally:
        for host in both:
            host.kill()
    output = "".join(path.read_text() for path in (tmp_path / "second").rglob("stdout.log"))
    assert re.search(r"resuming from +step \d+", output)
    assert rows(cut) == rows(uncut)
    assert tensors(cut, 60) == tensors(uncut, 60)
