"""TCP ports for servers that live for one job on one host."""

import random
import socket
from pathlib import Path


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on. They lie just below those that the kernel gives to outgoing connections, so that none of
    these, which come and go by the thousand, takes one before it is bound, and above those of slurm/pretrain.sh."""
    path = Path("/proc/sys/net/ipv4/ip_local_port_range")
    end = int(path.read_text().split()[0]) if path.exists() else 32768
    candidates = range(end - 2_500, end)
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
