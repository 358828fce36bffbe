"""Two hosts on one machine: network namespaces, and a link between them with latency, loss, and a way to cut it.

The kernel's netem is not everywhere. So each namespace has a TUN device, and a thread here carries the packets of one
to the other: late, some never, none once the link is cut. TCP in both kernels is as it is.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
PACKET = 1 << 16


def missing() -> str | None:
    """Why there can be no such hosts here; None where there can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "there is no `ip`"
    if not Path("/dev/net/tun").exists():
        return "there are no TUN devices"
    name = f"fgtry{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"no network namespace: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=False)
    return None


@dataclass
class Link:
    """Seconds that a packet takes, the share of packets that are lost, whether all are; packets that were carried."""

    latency: float = 0.0
    loss: float = 0.0
    cut: bool = False
    carried: int = 0
    lost: int = 0
    closing: threading.Event = field(default_factory=threading.Event)

    def carry(self, ends: tuple[int, int]) -> None:
        """Until it is closed, from each end to the other."""
        chance, waiting, number = random.Random(0), list[tuple[float, int, int, bytes]](), 0
        while not self.closing.is_set():
            pause = 0.05 if not waiting else min(0.05, max(0.0, waiting[0][0] - time.monotonic()))
            for end in select.select(ends, [], [], pause)[0]:
                packet = os.read(end, PACKET)
                if self.cut or chance.random() < self.loss:
                    self.lost += 1
                    continue
                other = ends[1] if end == ends[0] else ends[0]
                number += 1
                heapq.heappush(waiting, (time.monotonic() + self.latency, number, other, packet))
            while waiting and waiting[0][0] <= time.monotonic():
                *_, other, packet = heapq.heappop(waiting)
                if not self.cut:
                    os.write(other, packet)
                    self.carried += 1


@dataclass(frozen=True)
class Host:
    """A network namespace, its device, and its address."""

    name: str
    device: str
    address: str

    def command(self, *words: str) -> list[str]:
        """A command line that runs there."""
        return ["ip", "netns", "exec", self.name, *words]


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host, Link]]:
    """They last as long as the context does."""
    link = Link()
    with ExitStack() as held:
        hosts, ends = [], []
        for number in (1, 2):
            host = Host(
                f"fg{os.getpid()}n{number}", f"fg{os.getpid() % 10_000}t{number}", f"10.77.0.{number}"
            )
            _ip("netns", "add", host.name)
            held.callback(_ip, "netns", "del", host.name)
            end = os.open("/dev/net/tun", os.O_RDWR)
            held.callback(os.close, end)
            fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH", host.device.encode(), IFF_TUN | IFF_NO_PI))
            _ip("link", "set", host.device, "netns", host.name)
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.device)
            _ip("-n", host.name, "link", "set", host.device, "up")
            _ip("-n", host.name, "link", "set", "lo", "up")
            hosts.append(host)
            ends.append(end)
        carrier = threading.Thread(target=link.carry, args=((ends[0], ends[1]),), daemon=True)
        carrier.start()
        held.callback(carrier.join)
        held.callback(link.closing.set)
        yield hosts[0], hosts[1], link


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
