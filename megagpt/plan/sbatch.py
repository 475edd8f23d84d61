"""Read the options of sbatch that a plan depends on."""

import re
from collections.abc import Mapping


def sbatch_options(text: str) -> dict[str, str]:
    """Name -> value of the long options in a command line. The last of equal names counts; an option without a value has ""."""
    found = {}
    for word in re.findall(r"--([a-z-]+(?:[= ][^-\s]\S*)?)", text):
        name, _, value = word.replace(" ", "=", 1).partition("=")
        found[name] = value
    return found


def gpus_asked(options: Mapping[str, str]) -> tuple[int, int] | None:
    """(nodes, GPUs per node); None if the options do not give GPUs per node. Of a range of nodes (1-3) the largest counts."""
    per_node = options.get("gpus-per-node") or re.sub(r"^gpu:?", "", options.get("gres", ""))
    number, nodes = per_node.rpartition(":")[2], options.get("nodes", "1").rpartition("-")[2]
    return (int(nodes), int(number)) if number.isdigit() and nodes.isdigit() and int(nodes) and int(number) else None


def node_bytes_asked(options: Mapping[str, str], gpus_per_node: int) -> int | None:
    """Host memory of a node that a job gets by --mem or --mem-per-gpu; None if neither limits it (--mem=0 is all there is)."""
    for name, count in (("mem", 1), ("mem-per-gpu", gpus_per_node)):
        match = re.fullmatch(r"(\d+)([KMGT]?)B?", options.get(name, ""), flags=re.IGNORECASE)
        if match and int(match[1]):
            return int(match[1]) * 1024 ** ("KMGT".index(match[2].upper() or "M") + 1) * count
    return None


def slurm_seconds(text: str) -> int | None:
    """Seconds of a time in one of SLURM's formats; None if `text` has none of them."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not match:
        return None
    days, first, second, third = (int(group) if group else 0 for group in match.groups())
    if match[1]:
        return ((days * 24 + first) * 60 + second) * 60 + third
    if match[4]:
        return (first * 60 + second) * 60 + third
    return first * 60 + second  # minutes, or minutes:seconds
