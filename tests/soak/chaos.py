"""A soak: one run on a real SLURM of this host under random faults, compared with a run that nothing happened to.

    python tests/soak/chaos.py FOLDER [NUM_FAULTS [SEED]]     (50 faults take about three quarters of an hour on two cores)
    python tests/soak/chaos.py FOLDER 20 --shared-samples     (two ranks share each sample; the number of nodes changes)

Three nodes, a job of two of them through slurm/pretrain.sh. The faults are those of KINDS, in random order; the data change by
plan to text in other letters and back every PHASE steps, and there are windows of noise in them, which the guard has to leave
out without taking the changes for noise. At the end the weights must be bitwise those of an uninterrupted run
with the same samples left out, and the ledger must show every other sample once. FOLDER is made and keeps the run, its log and
a line per fault; the results go to bench/results/chaos.json.

With --shared-samples a node has two ranks, which share samples (engine.context_parallel_size=2), and the job asks for one or
two nodes. Before each fault some nodes are drained, so that the next start has one node or two. Sums over two ranks and over
four round differently. So the weights must be bitwise those of a run without faults that changes the number of its ranks at the
same steps, and differ from those of runs on two and on four ranks throughout by no more than twice what these two differ by.
The results go to bench/results/chaos_shared_samples.json.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests" / "support")]

from ranks import Ranks  # noqa: E402
from slurm_cluster import Cluster, make_site, processes_of, running_cluster  # noqa: E402

from megagpt.checkpoint.load_model import load_model  # noqa: E402
from megagpt.checkpoint.on_disk import list_checkpoints  # noqa: E402
from megagpt.measurement import spread, write_results  # noqa: E402
from megagpt.monitor.metrics import METRICS_FILE, read_metrics  # noqa: E402
from megagpt.report.inspect_data import check_ledger  # noqa: E402
from megagpt.train.spike_guard import NON_FINITE, SKIPPED_FILE  # noqa: E402

SAVE_EVERY, BATCH = 50, 4
STEPS_PER_FAULT, PHASE = 150, 300
LONG_SECONDS, SECONDS_PER_WINDOW = 40, 11
"""The watchdog's limit for an evaluation without progress; four windows a rank of a long evaluation take more."""
DESCRIPTIONS = {
    "loader": "The thread that reads data sleeps for ever.",
    "loader_dead": "The thread that reads data is gone; the batch never comes.",
    "disk_full": "The disk is full in the middle of a save.",
    "not_a_number": "The loss is NaN in two steps that follow each other.",
    "evaluation": "A rank waits for ever for validation data.",
    "long_evaluation": "An evaluation takes longer than the watchdog's limit, but gets on.",
}
ENDS_NOTHING = ("not_a_number", "long_evaluation")
"""Faults after which the same start goes on."""
TRIGGERED = tuple(DESCRIPTIONS)
"""Faults inside a rank, by tests/support/faults; the trainer's code knows nothing of them."""


@dataclass(frozen=True)
class Layout:
    """What a job asks for, and what its ranks share."""

    nodes: str = "2"
    ranks_per_node: int = 1
    words: tuple[str, ...] = ()

    @property
    def max_ranks(self) -> int:
        """Ranks where all nodes of the job are there."""
        return int(self.nodes.rpartition("-")[2]) * self.ranks_per_node

    @property
    def changes(self) -> bool:
        """Whether the number of nodes changes from start to start."""
        return "-" in self.nodes


TWO_NODES = Layout()
SHARED_SAMPLES = Layout("1-2", 2, ("engine.context_parallel_size=2", "model.dropout=0"))
NODES = ("n1", "n2", "n3")


@dataclass
class Soak:
    """A run under way."""

    cluster: Cluster
    site: Path
    run_dir: Path
    job_id: str
    triggers: Path
    rng: random.Random
    layout: Layout = TWO_NODES
    drained: list[str] = field(default_factory=list)
    table: list["Outcome"] = field(default_factory=list)

    def some_rank(self) -> int:
        """A rank of the newest start, at random."""
        return self.rng.randrange(ranks_of(self.run_dir, self.attempt()))

    def drain(self, nodes: Sequence[str]) -> None:
        """These nodes, and no others, take no new job."""
        for node in NODES:
            if node in nodes:
                self.cluster.command("scontrol", "update", f"nodename={node}", "state=drain", "reason=chaos")
            elif node in self.drained:
                self.cluster.command("scontrol", "update", f"nodename={node}", "state=undrain")
        self.drained = list(nodes)

    def attempt(self) -> int:
        """The newest start."""
        with contextlib.suppress(OSError, ValueError):
            return int(json.loads((self.run_dir / "owner.json").read_text())["incarnation"])
        return 0

    def last_step(self, attempt: int) -> int:
        """The last step that a start has logged, -1 if none; only the end of the file is read."""
        path = self.run_dir / METRICS_FILE
        if not path.exists():
            return -1
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 20_000))
            lines = file.read().split(b"\n")
        for line in reversed(lines):
            with contextlib.suppress(ValueError, KeyError):
                row = json.loads(line)
                if row["incarnation"] == attempt and row["kind"] == "train":
                    return int(row["step"])
        return -1

    def log(self) -> str:
        """All that the job has printed."""
        path = self.site / f"megagpt-{self.job_id}.log"
        return path.read_text(errors="replace") if path.exists() else ""


@dataclass(frozen=True)
class Outcome:
    """One fault: how long until the run had noticed and ended (or gone back), until it trained again, and how it ended."""

    fault: str
    detected_seconds: float
    recovered_seconds: float
    verdict: str


def stop_soon(soak: Soak) -> None:
    """The time limit is near."""
    soak.cluster.command("scancel", "--signal=USR1", "--batch", soak.job_id)


def requeue(soak: Soak) -> None:
    """An operator puts the job back."""
    soak.cluster.command("scontrol", "requeue", soak.job_id)


def preempt(soak: Soak) -> None:
    """A job of a higher partition needs all nodes."""
    drained = soak.drained
    soak.drain([])
    wrap = ["sbatch", "--parsable", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 2"]
    urgent = soak.cluster.command(*wrap, cwd=soak.site).strip()
    if drained:
        soak.cluster.wait_for(urgent, "RUNNING", "COMPLETED", timeout=120)
        soak.drain(drained)


def node_down(soak: Soak) -> None:
    """A node is set down under the job."""
    node = soak.rng.choice(nodes_of(soak))
    soak.cluster.command("scontrol", "update", f"nodename={node}", "state=down", "reason=chaos")
    with contextlib.suppress(subprocess.CalledProcessError):
        soak.cluster.command("scontrol", "update", f"nodename={node}", "state=resume")
    soak.drain(soak.drained)


def node_lost(soak: Soak) -> None:
    """A node's slurmd, step daemon and rank die at once; the node comes back later."""
    nodes, each = nodes_of(soak), soak.layout.ranks_per_node
    number = soak.rng.randrange(len(nodes))
    node, ranks = nodes[number], range(number * each, (number + 1) * each)
    found = [pid for rank in ranks for pid in processes_of(soak.job_id, rank=rank)]
    pids = [pid for rank_pid in found for pid in (parent(rank_pid), rank_pid)]
    soak.cluster.kill_node(node)
    kill(pids, signal.SIGKILL)
    wait_until(lambda: soak.cluster.job(soak.job_id)["JobState"] != "RUNNING", 120)
    soak.cluster.start_node(node)


def rank_killed(soak: Soak) -> None:
    """One rank is killed, by the kernel for its memory, say."""
    kill(processes_of(soak.job_id, rank=soak.some_rank()), signal.SIGKILL)


def rank_stopped(soak: Soak) -> None:
    """One rank stops without dying, as on a node whose kernel hangs: only the watchdog can see it."""
    kill(processes_of(soak.job_id, rank=soak.some_rank()), signal.SIGSTOP)


def step_daemon_killed(soak: Soak) -> None:
    """A step daemon and its rank die; SLURM does not notice."""
    rank_pids = processes_of(soak.job_id, rank=soak.some_rank())
    kill([parent(pid) for pid in rank_pids] + rank_pids, signal.SIGKILL)


def torn_checkpoint(soak: Soak) -> None:
    """All ranks die, and a byte of the newest checkpoint has flipped."""
    kill(processes_of(soak.job_id), signal.SIGKILL)
    newest = list_checkpoints(soak.run_dir)[-1]
    path = soak.rng.choice(sorted(newest.glob("pieces_*")))
    data = bytearray(path.read_bytes())
    data[soak.rng.randrange(len(data))] ^= 1 << soak.rng.randrange(8)
    path.write_bytes(data)


def torn_metrics(soak: Soak) -> None:
    """All ranks die in the middle of a line."""
    kill(processes_of(soak.job_id), signal.SIGKILL)
    for name in (METRICS_FILE, "ledger.jsonl"):
        with (soak.run_dir / name).open("ab") as file:
            file.write(b'{"kind":"train","st')


def stop_in_evaluation(soak: Soak) -> None:
    """The time limit is near, in the middle of a long evaluation."""
    path = soak.triggers / f"long_evaluation_{soak.some_rank()}"
    path.touch()
    wait_until(lambda: Path(f"{path}.done").exists(), 120, soak)
    stop_soon(soak)


def trigger(name: str) -> Callable[[Soak], None]:
    """A fault of tests/support/faults in one rank."""

    def act(soak: Soak) -> None:
        if name == "long_evaluation":  # one that has begun would be long by half, and the next one by the other half
            wait_until(lambda: 5 <= soak.last_step(soak.attempt()) % SAVE_EVERY <= SAVE_EVERY // 2, 120, soak)
        (soak.triggers / f"{name}_{soak.some_rank()}").touch()

    return act


KINDS: dict[str, Callable[[Soak], None]] = {
    "stop_soon": stop_soon,
    "requeue": requeue,
    "preempt": preempt,
    "node_down": node_down,
    "node_lost": node_lost,
    "rank_killed": rank_killed,
    "rank_stopped": rank_stopped,
    "step_daemon_killed": step_daemon_killed,
    "torn_checkpoint": torn_checkpoint,
    "torn_metrics": torn_metrics,
    "stop_in_evaluation": stop_in_evaluation,
    **{name: trigger(name) for name in TRIGGERED},
}


def soak_run(
    cluster: Cluster,
    folder: Path,
    shards: dict[str, Path],
    faults: list[str],
    *,
    seed: int = 0,
    layout: Layout = TWO_NODES,
) -> Soak:
    """Run to the end under `faults`, one after the other. Raises AssertionError if it does not end."""
    site = make_site(folder / "project", PROJECT, nodes=layout.nodes)
    soak = Soak(cluster, site, folder / "run", "", folder / "triggers", random.Random(seed), layout)
    soak.triggers.mkdir()
    words = [*settings(soak.run_dir, shards, (len(faults) + 2) * STEPS_PER_FAULT), *layout.words]
    path = os.pathsep.join([str(PROJECT / "tests" / "support" / "faults"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {"FAULTS": json.dumps(injected(soak.triggers, len(faults), layout.max_ranks)), "PYTHONPATH": path}
    environment["tasks_per_node"] = str(layout.ranks_per_node)
    soak.job_id = cluster.submit(site, "slurm/pretrain.sh", *words, **environment)
    try:
        for name in faults:
            soak.table.append(one_fault(soak, name))
            with (folder / "faults.jsonl").open("a") as file:
                file.write(json.dumps(asdict(soak.table[-1])) + "\n")
        job = cluster.wait_for(soak.job_id, "COMPLETED", timeout=900)
    finally:
        soak.drain([])
    assert job["ExitCode"] == "0:0"
    return soak


def one_fault(soak: Soak, name: str) -> "Outcome":
    """Let it happen to a start that trains, and wait until the run trains again. Raises AssertionError if it does not."""
    attempt = wait_for_progress(soak)
    if soak.layout.changes:
        soak.drain(soak.rng.sample(NODES, soak.rng.choice((1, 2))))
    before, began = {count: count(soak) for count in (count_not_a_number, count_long_evaluations)}, time.monotonic()
    KINDS[name](soak)
    ends = soak.log().count("ranks ended with status")
    if name in ENDS_NOTHING:
        count = count_not_a_number if name == "not_a_number" else count_long_evaluations
        wait_until(lambda: count(soak) > before[count], 240, soak)
        assert soak.attempt() == attempt, soak.log()[-4000:]
        detected = recovered = time.monotonic() - began
    else:
        wait_until(lambda: soak.attempt() > attempt or soak.log().count("ranks ended with status") > ends, 240, soak)
        detected = time.monotonic() - began
        wait_until(lambda: soak.attempt() > attempt, 240, soak)
        wait_until(lambda: soak.last_step(soak.attempt()) >= 0, 240, soak)
        recovered = time.monotonic() - began
    return Outcome(name, round(detected, 1), round(recovered, 1), verdict(soak, name))


def compare(soak: Soak, folder: Path, shards: dict[str, Path]) -> dict[str, Any]:
    """The same run without faults, with the same samples left out from the beginning and as many ranks at each step: whether
    weights and losses are equal."""
    rows = read_metrics(soak.run_dir).of_kind("train")
    parts = itertools.groupby(rows, lambda row: ranks_of(soak.run_dir, row["incarnation"]))
    ends = [(max(row["step"] for row in part), ranks) for ranks, part in parts]
    assert ends[-1][0] == (len(soak.table) + 2) * STEPS_PER_FAULT, "the run under faults has not all its steps"
    return {**differences(soak.run_dir, undisturbed(soak, folder, shards, ends)), "ranks": [ranks for _, ranks in ends]}


def undisturbed(soak: Soak, run_dir: Path, shards: dict[str, Path], ends: Sequence[tuple[int, int]]) -> Path:
    """A run without faults; `ends`: up to which step on how many ranks. It saves there and starts again on the next ones."""
    run_dir.mkdir(parents=True)
    if (soak.run_dir / SKIPPED_FILE).exists():
        shutil.copy(soak.run_dir / SKIPPED_FILE, run_dir)
    config, *words = settings(run_dir, shards, (len(soak.table) + 2) * STEPS_PER_FAULT)
    for step, size in ends:
        command = [str(PROJECT / "tools" / "train_model.py"), str(PROJECT / config), *words, *soak.layout.words]
        ranks = Ranks([*command, f"max_steps={step}"], size, run_dir.parent / f"{run_dir.name}_logs")
        assert ranks.wait(1800) == [0] * size, ranks.output()
    return run_dir


def differences(run_dir: Path, other: Path) -> dict[str, Any]:
    """Two runs' weights and losses beside each other, and what the first one's ledger shows."""
    import torch

    ours, theirs = (load_model(path).model.state_dict() for path in (run_dir, other))
    losses = [{row["step"]: row["loss"] for row in read_metrics(path).of_kind("train")} for path in (run_dir, other)]
    ledger = [line.removeprefix(f"{run_dir}: ") for line in check_ledger(run_dir)]
    return {
        "weights_equal": all(torch.equal(ours[name], theirs[name]) for name in theirs),
        "relative_l2": max(float((ours[n] - theirs[n]).norm() / theirs[n].norm()) for n in theirs if theirs[n].norm() > 0),
        "losses_equal": losses[0] == losses[1],
        "max_loss_difference": max(abs(loss - losses[1].get(step, float("inf"))) for step, loss in losses[0].items()),
        "steps": len(losses[1]),
        "ledger": ledger,
    }


def ranks_of(run_dir: Path, attempt: int) -> int:
    """How many ranks a start had."""
    return int(json.loads((run_dir / "starts" / f"{attempt:04d}.json").read_text())["world_size"])


def settings(run_dir: Path, shards: Path | dict[str, Path], max_steps: int) -> list[str]:
    """The words of a tiny run that takes minutes, with a watchdog and a guard that act soon. Of two sources, `main` and
    `other`, one after the other is used, for PHASE steps each."""
    sources = shards if isinstance(shards, dict) else {"main": shards}
    words = [f"data.sources.{name}.path={path}" for name, path in sources.items()]
    if len(sources) > 1:
        phases = [(start * BATCH, start // PHASE % 2) for start in range(PHASE, 4 * max_steps, PHASE)]
        changes = [f"{{from_sample: {start}, weights: {{main: {1 - late}, other: {late}}}}}" for start, late in phases]
        words += ["data.sources.other.weight=1e-9", f"data.weight_changes=[{', '.join(changes)}]"]
    return [
        "configs/train/debug_cpu.yaml",
        f"run_dir={run_dir}",
        *words,
        f"max_steps={max_steps}",
        "model.vocab_size=257", "model.num_layers=2", "model.hidden_size=32", "model.num_heads=2", "model.seq_len=32",
        "model.dropout=0.1", "data.seq_len=32", f"global_batch_size={BATCH}", "micro_batch_size=1",
        "engine={kind: fsdp}", "monitor.log_every_steps=1", f"evaluate_every_steps={SAVE_EVERY}",
        "evaluate_max_samples=4",
        "sample_every_steps=0", f"save_every_steps={SAVE_EVERY}", "keep_last=3",
        "watchdog.stall_seconds=10", f"watchdog.long_seconds={LONG_SECONDS}",
        "guard.window_steps=64", "guard.min_steps=32", "guard.max_non_finite_steps=1", "guard.loss_z=6",
        "guard.max_rewinds=1000", "optim.schedule.kind=constant", "optim.lr=1e-3",
    ]  # fmt: skip


def injected(triggers: Path, num_faults: int, num_ranks: int) -> list[dict[str, Any]]:
    """What tests/support/faults has to do: the triggered kinds on every rank, and noise in each source's data every 300 of its
    steps or so, well inside a phase."""
    more = {"save_every": SAVE_EVERY, "count": 2, "seconds": SECONDS_PER_WINDOW, "windows": 4}
    ranks = range(num_ranks)
    listed = [{"kind": n, "rank": r, "trigger": str(triggers / f"{n}_{r}"), **more} for n in TRIGGERED for r in ranks]
    windows = [[step, step + 1] for step in range(220, (num_faults + 2) * STEPS_PER_FAULT, PHASE)]
    return [*listed, {"kind": "poisoned", "batch": BATCH, "windows": windows}]


def wait_for_progress(soak: Soak) -> int:
    """Wait until a start has made some steps; its number. A start that a fault of before still ends does not count."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        attempt = soak.attempt()
        first = soak.last_step(attempt)
        if attempt and first >= 0:
            until = time.monotonic() + 60
            while soak.attempt() == attempt and time.monotonic() < until:
                # Past a checkpoint of its own, or the job would rightly give up; two, so that one may be damaged.
                if soak.last_step(attempt) >= first + SAVE_EVERY + 10 and len(list_checkpoints(soak.run_dir)) > 1:
                    return attempt
                time.sleep(0.1)
        time.sleep(0.2)
    raise AssertionError(f"no progress: {soak.cluster.job(soak.job_id)}\n{soak.log()[-3000:]}")


def verdict(soak: Soak, name: str) -> str:
    """What the run itself said of it."""
    metrics = read_metrics(soak.run_dir)
    last_status = [line for line in soak.log().splitlines() if "ranks ended with status" in line][-1:]
    if name == "not_a_number":
        return next(str(row["reason"]) for row in metrics.all_rows[::-1] if NON_FINITE in str(row.get("reason", "")))
    if name == "long_evaluation":
        return f"evaluated, although for longer than {LONG_SECONDS} s"
    rows = [r for r in metrics.all_rows if r["kind"] in ("stop", "watchdog") and r["incarnation"] == soak.attempt() - 1]
    if rows:
        row = rows[-1]
        more = f", rank {row['rank']}" if "rank" in row else f", in {row['interrupted']}" if row.get("interrupted") else ""
        return f"{row['kind']}: {row.get('reason') or row.get('cause')}{more}"
    return last_status[0].partition("pretrain.sh: ")[2].partition(",")[0] if last_status else "ended by SLURM"


def count_rewinds(soak: Soak, reason: str = "") -> int:
    """How often the guard has gone back; with `reason`, for it alone."""
    path = soak.run_dir / SKIPPED_FILE
    with contextlib.suppress(OSError, ValueError):
        return sum(reason in entry["reason"] for entry in json.loads(path.read_text()))
    return 0


def count_not_a_number(soak: Soak) -> int:
    """How often it has gone back from steps that are not finite, not from noise in the data."""
    return count_rewinds(soak, NON_FINITE)


def count_long_evaluations(soak: Soak) -> int:
    """How many evaluations took longer than the watchdog would wait for one without progress."""
    rows = read_metrics(soak.run_dir).all_rows
    pairs = itertools.pairwise(rows)
    return sum(later["kind"] == "evaluate" and later["time"] - earlier["time"] > LONG_SECONDS for earlier, later in pairs)


def nodes_of(soak: Soak) -> list[str]:
    """The nodes of the job, in the order of its ranks."""
    return soak.cluster.command("scontrol", "show", "hostnames", soak.cluster.job(soak.job_id)["NodeList"]).split()


def parent(pid: int) -> int:
    """The process that started another: a rank's step daemon."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def kill(pids: list[int], number: int) -> None:
    """Send a signal to processes of the job that may have ended."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def wait_until(condition: Callable[[], bool], timeout_seconds: float, soak: Soak | None = None) -> None:
    """Poll until it holds; AssertionError with the job's log otherwise."""
    end = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < end, soak.log()[-4000:] if soak is not None else "what was waited for did not happen"
        time.sleep(0.2)


OTHER_LETTERS = str.maketrans({chr(ord("a") + i): chr(0x430 + i) for i in range(26)})
"""Latin letters as Cyrillic ones: other bytes, which a model has to learn anew."""


def make_sources(folder: Path) -> dict[str, Path]:
    """Two sources of bytes: the texts of make_shards, and the same in other letters."""
    return {"main": make_shards(folder / "main"), "other": make_shards(folder / "other", letters=OTHER_LETTERS)}


def make_shards(folder: Path, files: Sequence[Path] | None = None, *, letters: dict[int, str] | None = None) -> Path:
    """Shards of bytes made from text files; by default Python's asyncio, which does not change with the project: what the guard
    takes for noise depends on the text. `letters` takes the place of others."""
    from megagpt.documents import Document, write_documents

    texts = [
        path.read_text(encoding="utf-8").translate(letters or {})
        for path in files or sorted(Path(asyncio.__file__).parent.glob("*.py"))
    ]
    write_documents(folder / "in" / "text.jsonl.zst", [Document(f"text:{i}", text, "text") for i, text in enumerate(texts)])
    words = [f"work_dir={folder}", f"tokenize.inputs=[{folder}/in/*.zst]", "tokenize.tokenizer=bytes"]
    words += ["tokenize.validation_fraction=0.2", "num_workers=1"]
    subprocess.run([sys.executable, "tools/tokenize_documents.py", *words], cwd=PROJECT, check=True, timeout=300)
    return folder / "shards"


def summarise(soak: Soak) -> list[dict[str, Any]]:
    """One row per kind of fault."""
    table = []
    for name, action in KINDS.items():
        outcomes = [outcome for outcome in soak.table if outcome.fault == name]
        if outcomes:
            counts = Counter(outcome.verdict for outcome in outcomes)
            row = {
                "fault": action.__doc__ or DESCRIPTIONS[name],
                "times": len(outcomes),
                "detected_s": spread([outcome.detected_seconds for outcome in outcomes]),
                "trains_again_s": spread([outcome.recovered_seconds for outcome in outcomes]),
                "what_the_run_said": "; ".join(f"{verdict} ({count})" for verdict, count in counts.most_common()),
            }
            table.append(row)
    return table


def main() -> None:
    """The full form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("num_faults", type=int, nargs="?", default=50)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--shared-samples", action="store_true")
    arguments = parser.parse_args()
    folder, num_faults, seed = arguments.folder.resolve(), arguments.num_faults, arguments.seed
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    faults = [name for _ in range(-(-num_faults // len(KINDS))) for name in rng.sample(sorted(KINDS), len(KINDS))][:num_faults]
    shards = make_sources(folder / "corpus")
    layout = SHARED_SAMPLES if arguments.shared_samples else TWO_NODES
    began = time.monotonic()
    with running_cluster(folder / "slurm", num_nodes=len(NODES)) as cluster:
        slurm = cluster.command("sbatch", "--version").split()[-1]
        soak = soak_run(cluster, folder, shards, faults, seed=seed, layout=layout)
    seconds = round(time.monotonic() - began)
    found = compare(soak, folder / "clean", shards)
    equal = found["weights_equal"] and found["losses_equal"]
    windows = len(injected(soak.triggers, len(faults), 1)[-1]["windows"])
    rewinds = count_rewinds(soak)
    beside = "a run without faults on as many ranks at each step" if layout.changes else "an uninterrupted run"
    ledger, equal_bits = found["ledger"][0], found["weights_equal"]
    about = (
        f"One run of {found['steps']:,} steps on a real SLURM of three nodes, {described(layout, found['ranks'])}, under "
        f"{len(faults)} faults, with planned changes of its data every {PHASE} steps and {windows} windows of noise in each "
        f"source. It took {seconds:,} s and {soak.attempt()} starts; the guard went back {rewinds} times. Against {beside}, "
        f"with the same samples left out: weights bitwise equal: {equal_bits}; losses equal: "
        f"{found['losses_equal']}. The ledger: {ledger}. Detected: until the run had noticed and ended or gone back."
    )
    results: dict[str, Any] = {
        "title": "A run whose ranks share samples, on changing nodes, under faults" if layout.changes else "A run under faults",
        "about": about,
        "rows": summarise(soak),
        "lost": "" if equal else "The run under faults differs from the uninterrupted one.",
        "seed": seed,
        "seconds": seconds,
        **found,
        "starts": soak.attempt(),
        "rewinds": rewinds,
        "faults": [asdict(outcome) for outcome in soak.table],
    }
    if layout.changes:
        rows = beside_constant_ranks(soak, folder, shards)
        results["tables"] = [{"title": "Beside runs without faults on as many ranks throughout", "rows": rows}]
        if rows[0]["ratio"] > 2:
            results["lost"] += " It differs from runs on as many ranks throughout by more than twice what those differ by."
    write_results(
        "chaos_shared_samples" if layout.changes else "chaos", results, packages=("torch", "megagpt"), peers={"slurm": slurm}
    )
    print(json.dumps(results["rows"], indent=1), about, sep="\n")
    if results["lost"]:
        raise SystemExit(results["lost"])


def described(layout: Layout, ranks: Sequence[int]) -> str:
    """How many nodes and ranks the job had."""
    if not layout.changes:
        return "two of them in the job"
    return (
        f"one or two of them in the job, each with two ranks that share samples (engine.context_parallel_size=2), on "
        f"{' then '.join(map(str, ranks))} ranks"
    )


def beside_constant_ranks(soak: Soak, folder: Path, shards: dict[str, Path]) -> list[dict[str, Any]]:
    """How far the weights are from those of runs on the fewest and on the most ranks throughout, beside how far these are from
    each other."""
    steps = (len(soak.table) + 2) * STEPS_PER_FAULT
    sizes = (soak.layout.ranks_per_node, soak.layout.max_ranks)
    fewest, most = (undisturbed(soak, folder / f"on_{size}", shards, [(steps, size)]) for size in sizes)
    measures = ("relative_l2", "max_loss_difference")
    allowed = {name: differences(fewest, most)[name] for name in measures}
    found = [differences(soak.run_dir, path) for path in (fewest, most)]
    largest = {name: max(each[name] for each in found) for name in measures}
    ratio = max(largest[name] / allowed[name] for name in measures)
    return [
        {"runs": f"changing ranks, beside {sizes[0]} and {sizes[1]} throughout", **largest, "ratio": ratio},
        {"runs": f"{sizes[0]} beside {sizes[1]} throughout", **allowed, "ratio": 1.0},
    ]


if __name__ == "__main__":
    main()
