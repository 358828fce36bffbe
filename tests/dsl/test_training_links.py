"""`fastgrad train` on two hosts, which are network namespaces of this machine: a slow link, a bad one, a cut one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.dsl.links import Host, Link, missing, two_hosts
from tests.dsl.test_training_ranks import OPTIONS, losses, run, write

pytestmark = pytest.mark.slow
STEPS, TIMEOUT = 5, 10
PORT = 29_400


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model and a run of two processes of one host."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("links")
    write(folder)
    options = (*OPTIONS, "--steps", str(STEPS), "-o", "whole", "--nproc", "2", "--context", "2")
    assert run(folder, *options)[0] == 0
    return folder


def begin(place: Path, hosts: tuple[Host, Host], out: str, *more: str) -> list[subprocess.Popen[str]]:
    """One process on each host, by torchrun; what it says is in OUT-0.txt and OUT-1.txt."""
    root = Path(__file__).parent.parent.parent
    paths = os.pathsep.join(str(root / each) for each in (".", "compiler", "grammar"))
    begun = []
    for number, host in enumerate(hosts):
        launch = ["torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "0"]
        meeting = ["--node-rank", str(number), "--master-addr", hosts[0].address, "--master-port", str(PORT)]
        called = [sys.executable, "-m", *launch, *meeting, "-m", "fastgrad_dsl", *OPTIONS, "--context", "2"]
        devices = {"GLOO_SOCKET_IFNAME": host.device, "TP_SOCKET_IFNAME": host.device}
        with (place / f"{out}-{number}.txt").open("w") as said:
            begun.append(
                subprocess.Popen(
                    host.command(*called, "-o", out, *more),
                    cwd=place,
                    env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **devices},
                    stdout=said,
                    stderr=said,
                    text=True,
                    start_new_session=True,
                )
            )
    return begun


def end(begun: list[subprocess.Popen[str]]) -> None:
    """Agents, and the processes that they started, each of which is in a group of its own."""
    for each in begun:
        for worker in workers_of(each):
            os.kill(worker, signal.SIGKILL)
        if each.poll() is None:
            os.killpg(each.pid, signal.SIGKILL)
        each.wait()


def workers_of(agent: subprocess.Popen[str]) -> list[int]:
    """`ip netns exec` becomes the agent, and so its children are the ranks."""
    found = Path(f"/proc/{agent.pid}/task/{agent.pid}/children")
    return [int(each) for each in found.read_text().split()] if found.exists() else []


@pytest.mark.parametrize(("latency", "loss"), [(0.005, 0.0), (0.005, 0.02)])
def test_latency_and_loss_change_nothing(place: Path, latency: float, loss: float) -> None:
    """Training goes on, and gives what one host gives, bit for bit."""
    with two_hosts() as (one, other, link):
        link.latency, link.loss = latency, loss
        out = f"slow-{loss}"
        begun = begin(place, (one, other), out, "--steps", str(STEPS), "--timeout", "120")
        try:
            statuses = [each.wait(timeout=500) for each in begun]
        finally:
            end(begun)
    assert statuses == [0, 0], (place / f"{out}-0.txt").read_text()
    assert losses(place / out) == losses(place / "whole")
    assert link.carried > 100
    assert (link.lost > 0) == (loss > 0)


def test_a_cut_link_is_told(place: Path) -> None:
    """Within the timeout, and the time in which the others may say that they are there, with the rank that is gone."""
    with two_hosts() as (one, other, link):
        begun = begin(place, (one, other), "cut", "--steps", "100000", "--timeout", str(TIMEOUT))
        try:
            wait_for(lambda: len(losses(place / "cut")) >= 3, begun, 400)
            (worker,) = workers_of(begun[1])
            link.cut = True
            cut = time.monotonic()
            said = place / "cut-0.txt"
            wait_for(lambda: "error[FG504]" in said.read_text(), [], 60)
            took = time.monotonic() - cut
            wait_for(lambda: not is_running(worker), [], 60)  # nor does the one that is cut off hang
        finally:
            end(begun)
    assert f"no answer within {TIMEOUT} seconds from rank 1 (process " in said.read_text()
    assert (
        took < 2 * TIMEOUT + 10
    )  # a rank may be in an exchange that began before; then those left have 5 seconds


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_for(condition: object, begun: list[subprocess.Popen[str]], seconds: float) -> None:
    assert callable(condition)
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        assert all(each.poll() is None for each in begun)
        time.sleep(0.05)


def test_a_link_delays_and_loses() -> None:
    """The link itself: a ping takes twice the latency, and none comes back once it is cut."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    with two_hosts() as (one, other, link):
        link.latency = 0.05
        assert answered(one, other, link) == pytest.approx(0.1, abs=0.09)
        link.cut = True
        assert answered(one, other, link) is None


def answered(one: Host, other: Host, link: Link) -> float | None:
    """Seconds until a connection that nobody takes is refused; None where no answer comes within two seconds."""
    code = (
        "import socket, time, sys\n"
        "started = time.monotonic()\n"
        "try:\n"
        f"    socket.create_connection(('{other.address}', {PORT}), timeout=2)\n"
        "except ConnectionRefusedError:\n"
        "    print(time.monotonic() - started)\n"
        "except TimeoutError:\n"
        "    print('none')\n"
    )
    said = subprocess.run(one.command(sys.executable, "-c", code), capture_output=True, text=True, check=True)
    return None if said.stdout.strip() == "none" else float(said.stdout)
