"""A soak: one run on a real SLURM of this host under random faults, compared with a run that nothing happened to.

    python tests/soak/chaos.py FOLDER [NUM_FAULTS [SEED]]     (50 faults take about three quarters of an hour on two cores)

Three nodes, a job of two of them through slurm/pretrain.sh. The faults are those of KINDS, in random order; the data change by
plan to text in other letters and back every PHASE steps, and there are windows of noise in them, which the guard has to leave
out without taking the changes for noise. At the end the weights must be bitwise those of an uninterrupted run
with the same samples left out, and the ledger must show every other sample once. FOLDER is made and keeps the run, its log and
a line per fault; the results go to bench/results/chaos.json.
"""

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


@dataclass
class Soak:
    """A run under way."""

    cluster: Cluster
    site: Path
    run_dir: Path
    job_id: str
    triggers: Path
    rng: random.Random
    table: list["Outcome"] = field(default_factory=list)

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
    wrap = ["sbatch", "--parsable", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 2"]
    soak.cluster.command(*wrap, cwd=soak.site)


def node_down(soak: Soak) -> None:
    """A node is set down under the job."""
    node = soak.rng.choice(nodes_of(soak))
    soak.cluster.command("scontrol", "update", f"nodename={node}", "state=down", "reason=chaos")
    with contextlib.suppress(subprocess.CalledProcessError):
        soak.cluster.command("scontrol", "update", f"nodename={node}", "state=resume")


def node_lost(soak: Soak) -> None:
    """A node's slurmd, step daemon and rank die at once; the node comes back later."""
    rank = soak.rng.randrange(2)
    node = nodes_of(soak)[rank]
    pids = [pid for rank_pid in processes_of(soak.job_id, rank=rank) for pid in (parent(rank_pid), rank_pid)]
    soak.cluster.kill_node(node)
    kill(pids, signal.SIGKILL)
    wait_until(lambda: soak.cluster.job(soak.job_id)["JobState"] != "RUNNING", 120)
    soak.cluster.start_node(node)


def rank_killed(soak: Soak) -> None:
    """One rank is killed, by the kernel for its memory, say."""
    kill(processes_of(soak.job_id, rank=soak.rng.randrange(2)), signal.SIGKILL)


def rank_stopped(soak: Soak) -> None:
    """One rank stops without dying, as on a node whose kernel hangs: only the watchdog can see it."""
    kill(processes_of(soak.job_id, rank=soak.rng.randrange(2)), signal.SIGSTOP)


def step_daemon_killed(soak: Soak) -> None:
    """A step daemon and its rank die; SLURM does not notice."""
    rank_pids = processes_of(soak.job_id, rank=soak.rng.randrange(2))
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
    path = soak.triggers / f"long_evaluation_{soak.rng.randrange(2)}"
    path.touch()
    wait_until(lambda: Path(f"{path}.done").exists(), 120, soak)
    stop_soon(soak)


def trigger(name: str) -> Callable[[Soak], None]:
    """A fault of tests/support/faults in one rank."""

    def act(soak: Soak) -> None:
        (soak.triggers / f"{name}_{soak.rng.randrange(2)}").touch()

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


def soak_run(cluster: Cluster, folder: Path, shards: dict[str, Path], faults: list[str], *, seed: int = 0) -> Soak:
    """Run to the end under `faults`, one after the other. Raises AssertionError if it does not end."""
    site = make_site(folder / "project", PROJECT)
    soak = Soak(cluster, site, folder / "run", "", folder / "triggers", random.Random(seed))
    soak.triggers.mkdir()
    words = settings(soak.run_dir, shards, (len(faults) + 2) * STEPS_PER_FAULT)
    path = os.pathsep.join([str(PROJECT / "tests" / "support" / "faults"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {"FAULTS": json.dumps(injected(soak.triggers, len(faults))), "PYTHONPATH": path}
    soak.job_id = cluster.submit(site, "slurm/pretrain.sh", *words, **environment)
    for name in faults:
        attempt = wait_for_progress(soak)
        before, began = {count: count(soak) for count in (count_rewinds, count_long_evaluations)}, time.monotonic()
        KINDS[name](soak)
        ends = soak.log().count("ranks ended with status")

        def noticed(before: int = attempt, ends: int = ends) -> bool:
            return soak.attempt() > before or soak.log().count("ranks ended with status") > ends

        if name in ENDS_NOTHING:
            count = count_rewinds if name == "not_a_number" else count_long_evaluations
            wait_until(lambda count=count, before=before[count]: count(soak) > before, 240, soak)
            assert soak.attempt() == attempt, soak.log()[-4000:]
            detected = recovered = time.monotonic() - began
        else:
            wait_until(noticed, 240, soak)
            detected = time.monotonic() - began
            wait_until(lambda before=attempt: soak.attempt() > before, 240, soak)
            wait_until(lambda: soak.last_step(soak.attempt()) >= 0, 240, soak)
            recovered = time.monotonic() - began
        soak.table.append(Outcome(name, round(detected, 1), round(recovered, 1), verdict(soak, name)))
        with (folder / "faults.jsonl").open("a") as file:
            file.write(json.dumps(asdict(soak.table[-1])) + "\n")
    job = cluster.wait_for(soak.job_id, "COMPLETED", timeout=900)
    assert job["ExitCode"] == "0:0"
    return soak


def compare(soak: Soak, folder: Path, shards: dict[str, Path]) -> dict[str, Any]:
    """The same run, uninterrupted, with the same samples left out from the beginning: whether weights and losses are equal."""
    import torch

    run_dir = folder / "uninterrupted"
    run_dir.mkdir(parents=True)
    if (soak.run_dir / "skipped.json").exists():
        shutil.copy(soak.run_dir / "skipped.json", run_dir)
    words = settings(run_dir, shards, (len(soak.table) + 2) * STEPS_PER_FAULT)
    ranks = Ranks([str(PROJECT / "tools" / "train_model.py"), *[str(PROJECT / words[0]), *words[1:]]], 2, folder / "logs")
    assert ranks.wait(1800) == [0, 0], ranks.output()
    ours, theirs = (load_model(path).model.state_dict() for path in (soak.run_dir, run_dir))
    losses = [{row["step"]: row["loss"] for row in read_metrics(path).of_kind("train")} for path in (soak.run_dir, run_dir)]
    ledger = [line.removeprefix(f"{soak.run_dir}: ") for line in check_ledger(soak.run_dir)]
    return {
        "weights_equal": all(torch.equal(ours[name], theirs[name]) for name in theirs),
        "relative_l2": max(float((ours[n] - theirs[n]).norm() / theirs[n].norm()) for n in theirs if theirs[n].norm() > 0),
        "losses_equal": losses[0] == losses[1],
        "steps": len(losses[1]),
        "ledger": ledger,
    }


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


def injected(triggers: Path, num_faults: int) -> list[dict[str, Any]]:
    """What tests/support/faults has to do: the triggered kinds on both ranks, and noise in each source's data every 300 of its
    steps or so, well inside a phase."""
    more = {"save_every": SAVE_EVERY, "count": 2, "seconds": SECONDS_PER_WINDOW, "windows": 4}
    listed = [{"kind": n, "rank": r, "trigger": str(triggers / f"{n}_{r}"), **more} for n in TRIGGERED for r in (0, 1)]
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
        return str(metrics.of_kind("rewind")[-1]["reason"])
    if name == "long_evaluation":
        return f"evaluated, although for longer than {LONG_SECONDS} s"
    rows = [r for r in metrics.all_rows if r["kind"] in ("stop", "watchdog") and r["incarnation"] == soak.attempt() - 1]
    if rows:
        row = rows[-1]
        more = f", rank {row['rank']}" if "rank" in row else f", in {row['interrupted']}" if row.get("interrupted") else ""
        return f"{row['kind']}: {row.get('reason') or row.get('cause')}{more}"
    return last_status[0].partition("pretrain.sh: ")[2].partition(",")[0] if last_status else "ended by SLURM"


def count_rewinds(soak: Soak) -> int:
    """How often the guard has gone back."""
    path = soak.run_dir / "skipped.json"
    with contextlib.suppress(OSError, ValueError):
        return len(json.loads(path.read_text()))
    return 0


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
    folder, num_faults, seed = (
        Path(sys.argv[1]).resolve(),
        int(sys.argv[2] if len(sys.argv) > 2 else 50),
        int(sys.argv[3] if len(sys.argv) > 3 else 0),
    )
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    faults = [name for _ in range(-(-num_faults // len(KINDS))) for name in rng.sample(sorted(KINDS), len(KINDS))][:num_faults]
    shards = make_sources(folder / "corpus")
    began = time.monotonic()
    with running_cluster(folder / "slurm", num_nodes=3) as cluster:
        slurm = cluster.command("sbatch", "--version").split()[-1]
        soak = soak_run(cluster, folder, shards, faults, seed=seed)
    seconds = round(time.monotonic() - began)
    found = compare(soak, folder / "clean", shards)
    equal = found["weights_equal"] and found["losses_equal"]
    windows = len(injected(soak.triggers, len(faults))[-1]["windows"])
    about = (
        f"One run of {found['steps']:,} steps on a real SLURM of three nodes, two of them in the job, under {len(faults)} "
        f"faults, with planned changes of its data every {PHASE} steps and {windows} windows of noise in each source. It took "
        f"{seconds:,} s and {soak.attempt()} starts; the "
        f"guard went back {count_rewinds(soak)} times. Against an uninterrupted run with the same samples left out: weights "
        f"bitwise equal: {found['weights_equal']}; losses equal: {found['losses_equal']}. The ledger: "
        f"{found['ledger'][0]}. Detected: until the run had noticed and ended or gone back."
    )
    results = {
        "title": "A run under faults",
        "about": about,
        "rows": summarise(soak),
        "lost": "" if equal else "The run under faults differs from the uninterrupted one.",
        "seed": seed,
        "seconds": seconds,
        **found,
        "starts": soak.attempt(),
        "rewinds": count_rewinds(soak),
        "faults": [asdict(outcome) for outcome in soak.table],
    }
    write_results("chaos", results, packages=("torch", "megagpt"), peers={"slurm": slurm})
    print(json.dumps(results["rows"], indent=1), about, sep="\n")
    if not equal:
        raise SystemExit("the run under faults differs from the uninterrupted one")


if __name__ == "__main__":
    main()
