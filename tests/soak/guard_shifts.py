"""The guard over planned changes: false alarms and missed damage, with the changes known to it and, as before, not known.

    python tests/soak/guard_shifts.py [--short]     (about ten minutes on one core; --short: a tenth of the runs)

A small model trains on sentences of many languages (langid/ in the folder MEGAGPT_TEST_DATA, by default ../shared/data). In the
middle of each run something changes by plan: another language comes in with a share of 5 to 100 %, in both orders, twice in a
row, at two batch sizes; or the batch size, the learning rate or the context length changes. At some steps before and after the
change the loss and gradient norm are also taken on a damaged batch, without an update: noise in all of it or in half of it.
The guard judges the series, and each damaged step in place of the step itself.
"""

import json
import os
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT)]

from megagpt.data.dataset import Sample  # noqa: E402
from megagpt.data.mixture import Mixture  # noqa: E402
from megagpt.data.permutation import permute  # noqa: E402
from megagpt.measurement import write_results  # noqa: E402
from megagpt.model.gpt import GPT, ModelConfig, initialise  # noqa: E402
from megagpt.train.spike_guard import Guard, GuardConfig  # noqa: E402

STEPS, CHANGE, SECOND = 260, 130, 160
DAMAGED_AT = (-20, 6, 10, 20, 40, 70, 100)
"""Steps from the change on at which damage is tried; before the sixth nothing can be said of it."""
PAIRS = (("eng", "deu"), ("eng", "rus"), ("eng", "cmn"), ("deu", "hin"), ("fra", "ara"), ("spa", "kor"), ("jpn", "eng"))


@dataclass(frozen=True)
class Plan:
    """One run: what changes at step CHANGE (and maybe at SECOND)."""

    name: str
    languages: tuple[str, ...]
    shares: tuple[tuple[float, ...], ...]
    """Weights of the languages before, after, and after the second change."""
    batch_sizes: tuple[int, int] = (16, 16)
    lr: tuple[float, float] = (2e-3, 2e-3)
    seq_len: tuple[int, int] = (64, 64)


@dataclass(frozen=True)
class Point:
    """One step: its regime, its loss and gradient norm, and those of damaged batches in its place."""

    regime: dict[str, Any]
    loss: float
    grad_norm: float
    damaged: dict[str, tuple[float, float]]


class Sentences:
    """A language's file as samples: consecutive windows of its bytes, in a permuted order, over and over."""

    def __init__(self, path: Path, seq_len: int) -> None:
        self._bytes, self._seq_len = np.frombuffer(path.read_bytes(), np.uint8).astype(np.int64), seq_len

    def __len__(self) -> int:
        return (len(self._bytes) - 1) // self._seq_len

    def sample(self, index: int) -> Sample:
        """Sample `index`."""
        epoch, position = divmod(index, len(self))
        start = permute(position, len(self), epoch) * self._seq_len
        tokens = self._bytes[start : start + self._seq_len + 1]
        return Sample(tokens[:-1], tokens[1:], np.array([self._seq_len], np.int32))


def plans() -> Iterator[Plan]:
    """All runs."""
    for first, second in PAIRS:
        for a, b in ((first, second), (second, first)):
            for share in (0.05, 0.1, 0.2, 0.4, 0.7, 1.0):
                for batch in (4, 16):
                    after = (1 - share, share)
                    yield Plan(f"{a} -> {share:.0%} {b}", (a, b), ((1, 0), after, after), (batch, batch))
        yield Plan(f"{first}, {second} twice", (first, second, "fin"), ((1, 0, 0), (0.6, 0.4, 0), (0.3, 0.3, 0.4)))
    for before, after in ((4, 16), (16, 4), (4, 64), (64, 4)):
        yield Plan(f"batch size {before} -> {after}", ("eng",), ((1,),) * 3, (before, after))
    for factor in (3, 10):
        yield Plan(f"learning rate x {factor}", ("eng",), ((1,),) * 3, lr=(2e-3, factor * 2e-3))
    yield Plan("context 64 -> 256", ("eng",), ((1,),) * 3, seq_len=(64, 256))
    yield Plan("context 64 -> 256 and 40% rus", ("eng", "rus"), ((1, 0), (0.6, 0.4), (0.6, 0.4)), seq_len=(64, 256))


def train(plan: Plan, texts: Path, seed: int) -> list[Point]:
    """The series of one run."""
    model = GPT(ModelConfig(vocab_size=256, seq_len=256, num_layers=2, num_heads=2, hidden_size=64))
    initialise(model, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.lr[0], betas=(0.9, 0.95), weight_decay=0.1)
    rng = np.random.default_rng(seed)
    phases = [0, CHANGE * plan.batch_sizes[0], CHANGE * plan.batch_sizes[0] + (SECOND - CHANGE) * plan.batch_sizes[1]]
    mixtures = [_mixture(plan, texts, seq_len, phases) for seq_len in plan.seq_len]
    points, position = [], 0
    for step in range(STEPS):
        late = int(step >= CHANGE)
        batch_size, lr, seq_len = plan.batch_sizes[late], plan.lr[late], plan.seq_len[late]
        ids, targets = _batch(mixtures[late], position, batch_size)
        position += batch_size
        damaged = {}
        if step - CHANGE in DAMAGED_AT:
            for name, rows in (("noise", batch_size), ("half noise", batch_size // 2)):
                noise = torch.from_numpy(rng.integers(0, 256, (rows, seq_len)))
                mixed = torch.cat((noise, ids[rows:])), torch.cat((noise.flip(1), targets[rows:]))
                damaged[name] = _loss_and_norm(model, *mixed)
        loss, norm = _loss_and_norm(model, ids, targets)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        phase = sum(late and position > start for start in phases[1:]) if plan.shares[0] != plan.shares[1] else 0
        regime = {"data.weight_changes": phase, "batch_size": batch_size, "optim": str(lr), "data": str(seq_len)}
        points.append(Point(regime, loss, norm, damaged))
    return points


def _mixture(plan: Plan, texts: Path, seq_len: int, phases: list[int]) -> Mixture:
    datasets = [Sentences(texts / f"tatoeba.{language}.txt", seq_len) for language in plan.languages]
    return Mixture(datasets, plan.shares[0], list(zip(phases[1:], plan.shares[1:], strict=True)))


def _batch(mixture: Mixture, position: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    samples = [mixture.sample(position + i) for i in range(size)]
    return (torch.from_numpy(np.stack(part)) for part in zip(*((s.inputs, s.targets) for s in samples), strict=True))  # type: ignore[return-value]


def _loss_and_norm(model: GPT, ids: torch.Tensor, targets: torch.Tensor) -> tuple[float, float]:
    model.zero_grad()
    loss = model(ids, targets) / targets.numel()
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return float(loss.detach()), float(norm)


def judge(points: list[Point], *, known: bool) -> dict[str, Any]:
    """What a guard says of a series: steps at which it raised a false alarm (it goes on with the step as if it had not), and
    for each kind of damage at which distances from the change it was seen."""
    guard = Guard(GuardConfig(), Path("/nonexistent"))
    alarms, seen = [], {"noise": [], "half noise": []}
    for step, point in enumerate(points):
        guard.enter(step, point.regime if known else {})
        for name, numbers in point.damaged.items():
            seen[name].append((step - CHANGE, bool(deepcopy(guard).look(*numbers))))
        if guard.look(point.loss, point.grad_norm):
            alarms.append(step - CHANGE)
    return {"alarms": alarms, "seen": seen}


def summarise(found: list[tuple[Plan, dict[str, Any], dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row per kind of change, with the changes known to the guard and not known."""
    rows = []
    shares = {plan.name: [*plan.name.split(), "", "", ""][2] for plan, _, _ in found}
    kinds = {share if share.endswith("%") else name for name, share in shares.items()}
    for kind in sorted(kinds, key=lambda name: (not name[0].isdigit(), name)):
        group = [entry for entry in found if entry[0].name == kind or f"-> {kind} " in entry[0].name]
        row: dict[str, Any] = {"change": f"{kind} of another language" if kind.endswith("%") else kind, "runs": len(group)}
        for number, name in ((1, "known"), (2, "not_known")):
            row[f"runs_with_false_alarms_{name}"] = sum(bool(entry[number]["alarms"]) for entry in group)
        for damage in ("noise", "half noise"):
            for number, name in ((1, "known"), (2, "not_known")):
                tries = [seen for entry in group for _, seen in entry[number]["seen"][damage]]
                row[f"{damage.replace(' ', '_')}_seen_{name}"] = f"{sum(tries)} of {len(tries)}"
        rows.append(row)
    return rows


def _counts(plan: Plan, known: dict[str, Any], not_known: dict[str, Any]) -> dict[str, Any]:
    """Of one run: false alarms, and how many of the damaged steps were seen."""
    row: dict[str, Any] = {"change": plan.name, "batch_sizes": " ".join(map(str, plan.batch_sizes))}
    for name, entry in (("known", known), ("not_known", not_known)):
        row[f"{name}_alarms"] = len(entry["alarms"])
        for damage, tries in entry["seen"].items():
            row[f"{name}_{damage.replace(' ', '_')}_seen"] = f"{sum(seen for _, seen in tries)} of {len(tries)}"
    return row


def main() -> None:
    """Every run, judged twice."""
    texts = Path(os.environ.get("MEGAGPT_TEST_DATA", PROJECT.parent / "shared" / "data")) / "langid"
    torch.set_num_threads(1)
    chosen = list(plans())[:: 10 if "--short" in sys.argv else 1]
    found = []
    for number, plan in enumerate(chosen):
        points = train(plan, texts, number)
        found.append((plan, judge(points, known=True), judge(points, known=False)))
        print(
            number, plan.name, plan.batch_sizes, *(entry["alarms"] for entry in found[-1][1:]), found[-1][1]["seen"], flush=True
        )
    rows = summarise(found)
    alarms = [sum(bool(entry[number]["alarms"]) for entry in found) for number in (1, 2)]
    settling = [seen for _, known, _ in found for damage in known["seen"].values() for at, seen in damage if 0 <= at < 64]
    results = {
        "title": "The guard over planned changes",
        "about": f"{len(found)} runs of {STEPS} steps with guard's defaults. Runs with a false alarm: {alarms[0]} with the "
        f"changes known to the guard, {alarms[1]} with one history over them. Damage within 64 steps of a change was seen "
        f"{sum(settling)} of {len(settling)} times.",
        "rows": rows,
        "lost": f"{alarms[0]} runs with a false alarm." if alarms[0] else "",
        "runs": [_counts(*entry) for entry in found],
    }
    if "--short" not in sys.argv:
        write_results("guard_shifts", results, packages=("torch", "megagpt"))
    print(results["about"])
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
