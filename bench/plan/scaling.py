"""docs/scaling.md: plans of four models on 8 to 4,096 GPUs, what breaks first, and how near plans come to measured figures.

python bench/plan/scaling.py             writes docs/scaling.md
python bench/plan/scaling.py check=true  status 1 if it is not what the planner gives
"""

import json
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT)]

from megagpt.config import UserError, load  # noqa: E402
from megagpt.plan.run_plan import PlanConfig, RunPlan, cluster_of, make_plan  # noqa: E402

PAGE = PROJECT / "docs" / "scaling.md"
GPUS = (8, 32, 128, 512, 1024, 4096)
TOKENS_PER_STEP = 4 * 2**20
MODELS: dict[str, dict[str, object]] = {
    "1.3B": {"num_layers": 24, "num_heads": 16, "hidden_size": 2048, "mlp_size": 5504, "vocab_size": 50304},
    "7B": {"num_layers": 32, "num_heads": 32, "hidden_size": 4096, "mlp_size": 11008, "vocab_size": 32000},
    "13B": {"num_layers": 40, "num_heads": 40, "hidden_size": 5120, "mlp_size": 13824, "vocab_size": 32000},
    "70B": {
        "num_layers": 80, "num_heads": 64, "num_kv_heads": 8, "hidden_size": 8192, "mlp_size": 28672, "vocab_size": 128256,
    },
}  # fmt: skip
HEAD = """# Scaling, on paper

Made by `python bench/plan/scaling.py` with the planner (docs/planning.md); do not edit. **Nothing on this page was run.** The
engine is FSDP2 over all ranks (`engine.kind=fsdp`), bf16, full checkpointing, sequences of 4,096 tokens, 4 Mi tokens per step,
one sample per micro-batch, on `gpu=h100_80gb` with 8 GPUs and 8 x 400 Gb/s per node.
"""


LONG_GPUS, LONG_SEQ_LENS = (64, 256, 512), (8192, 32_768, 131_072)


def plan(model: str, gpus: int, *, seq_len: int = 4096, cp_size: int = 1) -> tuple[RunPlan | str, int]:
    """The plan, or why there is none; and samples per step: TOKENS_PER_STEP or one per GPU, of longer samples one per group."""
    batch = max(gpus, TOKENS_PER_STEP // seq_len) if seq_len == 4096 else gpus // cp_size
    sizes = [f"model.{name}={value}" for name, value in MODELS[model].items()]
    words = [
        str(PROJECT / "configs/train/gpt_7b.yaml"),
        *sizes,
        f"model.tied_head={'true' if model == '1.3B' else 'false'}",
        f"global_batch_size={batch}",
        "micro_batch_size=1",
        "engine.kind=fsdp",
        f"data.seq_len={seq_len}",
        f"model.seq_len={seq_len}",
        f"engine.context_parallel_size={cp_size}",
        f"gpus={gpus}",
    ]
    config = load(PlanConfig, words)
    try:
        return make_plan(config.train_config(), cluster_of(config)), batch
    except UserError as error:
        return str(error), batch


def table(model: str) -> tuple[list[str], list[str]]:
    """The model's rows, and what breaks first."""
    rows = [
        "| GPUs | GiB per GPU | fits | tokens per step | step s | of it traffic | MFU % | of 8 GPUs' speed per GPU % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    breaks: list[str] = []
    first_rate = None
    for gpus in GPUS:
        found, batch = plan(model, gpus)
        if isinstance(found, str):
            rows.append(f"| {gpus:,} | {found} |||||||")
            continue
        assert found.step is not None
        assert found.tokens_per_second is not None
        rate = found.tokens_per_second / gpus
        first_rate = first_rate or rate
        share = found.step.communication / found.step.total
        rows.append(
            f"| {gpus:,} | {found.needed_gib:.1f} | {'yes' if found.fits else '**no**'} | {batch * 4096:,} |"
            f" {found.step.total:.2f} | {100 * share:.0f} % | {100 * (found.mfu or 0):.1f} | {100 * rate / first_rate:.0f} |"
        )
        if not found.fits:
            part, size = max(found.memory.parts.items(), key=lambda item: item[1])
            needed = f"{found.needed_gib:.0f} GiB of {found.capacity_gib:.0f}, {size / 2**30:.0f} of them {part}"
            breaks.append(f"on {gpus:,} GPUs the memory ({needed})")
        elif share > 0.25:
            breaks.append(
                f"on {gpus:,} GPUs the traffic ({100 * share:.0f} % of the step, {batch * 4096 // gpus:,} tokens per GPU)"
            )
    return rows, breaks


def long_context() -> list[str]:
    """70B at growing lengths, alone and with 8 GPUs of a node sharing each sample."""
    rows = [
        "| tokens per sample | GPUs | context parallel | GiB per GPU | fits | tokens per step | GiB sent per GPU | step s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for seq_len in LONG_SEQ_LENS:
        for gpus in LONG_GPUS:
            for cp_size in (1, 8):
                found, batch = plan("70B", gpus, seq_len=seq_len, cp_size=cp_size)
                assert isinstance(found, RunPlan)
                assert found.step is not None
                sent = sum(item.sent for item in found.traffic) / 2**30
                rows.append(
                    f"| {seq_len:,} | {gpus} | {cp_size} | {found.needed_gib:.1f} | {'yes' if found.fits else '**no**'} |"
                    f" {batch * seq_len:,} | {sent:.0f} | {found.step.total:.1f} |"
                )
    return rows


def page() -> str:
    """The whole page."""
    lines = [HEAD]
    for model in MODELS:
        rows, breaks = table(model)
        lines += [f"## {model}", "", *rows, ""]
        first = f"What breaks first: {'; '.join(breaks)}." if breaks else "Nothing breaks up to 4,096 GPUs by this plan."
        lines += [first, ""]
    lines += [
        "## Long context: 70B, with and without context parallelism",
        "",
        "`engine.context_parallel_size=8`, `ulysses` (docs/long_context.md), inside each node; one sample "
        "per GPU, or per group of 8.",
        "With more, fully_shard keeps whole gradients until the last micro-batch: 263 GiB more per GPU. "
        "The buffers of attention's",
        "exchange are not counted, and no published run with context parallelism is known.",
        "",
        *long_context(),
        "",
    ]
    result = json.loads((PROJECT / "bench/results/plan_time.json").read_text(encoding="utf-8"))["results"]
    lines += [
        "## What measured figures say",
        "",
        "Published runs that were held back from the fit (bench/plan/speed.py), on several nodes:",
        "",
        "| run | GPU | GPUs | tokens per sample | published tokens/s per GPU | planned |",
        "|---|---|---|---|---|---|",
    ]
    for item in sorted(result["scored"], key=lambda s: (s["gpu"], s["gpus"], s["id"])):
        if item["gpus"] >= 32 and item["gpu"] in ("h100_80gb", "h200"):
            published = item["published_tokens_per_s_per_gpu"]
            lines.append(
                f"| {item['id']} | {item['gpu']} | {item['gpus']} | {item['seq_len']:,} | {published:,.0f} |"
                f" {100 * item['error']:+.0f} % |"
            )
    lines += [
        "",
        "No published run of the table has more than 512 GPUs: what stands above for 1,024 and 4,096 is extrapolated.",
        "Stragglers, failures and a network that is shared are in no row. Up to 512 GPUs these runs accumulate gradients,",
        "which fully_shard keeps whole until the last micro-batch: 4 bytes per parameter on every GPU.",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    """Write the page, or compare it."""
    text = page()
    if "check=true" in sys.argv:
        return 0 if PAGE.exists() and PAGE.read_text(encoding="utf-8") == text else 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
