"""TCP ports for servers that live for one job on one host."""

import random
import socket
from pathlib import Path


def free_ports(count: int, *, part: int = 0, parts: int = 1) -> list[int]:
    """Ports that nobody listens on. They are below those that the kernel gives to outgoing connections, so that none of these,
    which come and go by the thousand, takes one before it is bound, and around those of slurm/pretrain.sh. Of `parts` programs
    that choose at the same time, number `part` is given none that another one is given."""
    path = Path("/proc/sys/net/ipv4/ip_local_port_range")
    end = int(path.read_text().split()[0]) if path.exists() else 32768
    candidates = [*range(10_000, 15_000), *range(end - 2_500, end)][part::parts]
    found: list[int] = []
    for port in random.SystemRandom().sample(candidates, len(candidates)):
        if len(found) == count:
            break
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
    return found


def free_port() -> int:
    """One of free_ports."""
    return free_ports(1)[0]
