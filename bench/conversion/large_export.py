"""A checkpoint of 13 billion parameters exported in bf16: how much memory the export takes.

    python -m bench.conversion.large_export                      needs 30 GB of disk (folder=), and many minutes
    python -m bench.conversion.large_export layers=2 hidden=512  a small one

The shape is Llama 2's 13B with GPT-2's vocabulary: 40 layers of 5,120. The checkpoint's files are sparse: embedding, head and
norms are random, the matrices of the layers are holes, which read as zeros. Everything else is an export as users start it:
the checkpoint is verified, each tensor on disk is compared with its source by sha256, and the logits of both models by
module. Anonymous memory (RssAnon: what cannot be dropped, unlike mapped files) is read every 0.1 s; the limit is 2 GiB.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megagpt.measurement import PROJECT, write_results

DATA = Path(os.environ.get("MEGAGPT_TEST_DATA", PROJECT.parent / "shared" / "data"))
LIMIT_BYTES = 2 << 30


def write_run(run_dir: Path, *, layers: int, hidden: int) -> int:
    """A run directory with a sparse checkpoint of step 0; returns the number of parameters."""
    import torch

    from megagpt.checkpoint.partitions import safetensors_header
    from megagpt.checkpoint.save_load import seal
    from megagpt.convert.import_hf import PART_BYTES, write_import
    from megagpt.engine.build import whole_shapes
    from megagpt.files import read_json, sha256_file, write_json
    from megagpt.model.gpt import GPT, ModelConfig
    from megagpt.tokenizer.open_tokenizer import open_tokenizer

    tokenizer = open_tokenizer(DATA / "tokenizer" / "gpt2" / "r50k_base.tiktoken")
    sizes = {"num_layers": layers, "num_heads": max(1, hidden // 128), "hidden_size": hidden, "mlp_size": 27 * hidden // 10}
    shape = {"vocab_size": 50304, "seq_len": 4096, "tied_head": False}
    config = ModelConfig.model_validate({**shape, **sizes})
    tiny = ModelConfig.model_validate({**shape, "num_layers": 1, "num_heads": 1, "hidden_size": 2})
    parameters = dict(GPT(tiny).named_parameters())
    with torch.no_grad():
        groups = [(name,) for name in parameters]
        checkpoint = write_import(run_dir, tiny, tokenizer, iter(parameters.items()), groups, {"format": "sparse", "files": {}})
    tokenizer.save(run_dir / "tokenizer")
    state = read_json(checkpoint / "state.json")
    write_json(checkpoint / "state.json", {**state, "model": config.model_dump(mode="json")})
    for file in checkpoint.glob("pieces_*"):
        file.unlink()

    counts = {name: shape.numel() for name, shape in whole_shapes(config).items()}
    parts: list[list[str]] = [[]]
    for name in counts:
        if parts[-1] and 4 * sum(counts[other] for other in [*parts[-1], name]) > PART_BYTES:
            parts.append([])
        parts[-1].append(name)
    files, rng = {}, np.random.default_rng(0)
    for number, names in enumerate(parts):
        path = checkpoint / f"pieces_{number:05d}.safetensors"
        keys = {f"param.{name}": ("F32", (counts[name],)) for name in names}
        header = safetensors_header(keys, dict.fromkeys(keys, "0"))
        with path.open("wb") as file:
            file.write(header)
            place = len(header)
            for name in names:
                if not name.startswith("blocks.") or "norm" in name:
                    file.seek(place)
                    for start in range(0, counts[name], 1 << 22):
                        count = min(1 << 22, counts[name] - start)
                        file.write(rng.standard_normal(count, dtype=np.float32).data)
                place += 4 * counts[name]
            file.truncate(place)
        files[path.name] = {"size": place, "sha256": sha256_file(path)}
    seal(checkpoint, files)
    return sum(counts.values())


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process; 0 once it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("RssAnon")), 0)


def main(words: Sequence[str]) -> None:
    """Write the checkpoint, export it, watch its memory; SystemExit if it fails or takes more than the limit."""
    options = dict(word.split("=", 1) for word in words)
    layers, hidden = int(options.get("layers", 40)), int(options.get("hidden", 5120))
    folder = Path(tempfile.mkdtemp(prefix="bench_large_", dir=options.get("folder")))
    try:
        num_parameters = write_run(folder / "run", layers=layers, hidden=hidden)
        pieces = list((folder / "run").rglob("pieces_*"))
        sizes = [path.stat() for path in pieces]
        needed, free = 2 * num_parameters + (4 << 30), shutil.disk_usage(folder).free
        if free < needed:
            raise SystemExit(f"{folder}: {free} bytes are free, the export needs {needed}")
        print(f"{num_parameters} parameters in {len(pieces)} files", flush=True)
        command = [sys.executable, str(PROJECT / "tools" / "export_model.py"), f"run_dir={folder / 'run'}"]
        command += [f"output_dir={folder / 'export'}", "dtype=bf16", *(["gate_memory_bytes=0"] if layers < 40 else [])]
        started, peak = time.perf_counter(), 0
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            while process.poll() is None:
                peak = max(peak, anonymous_bytes(process.pid))
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        wall_s = time.perf_counter() - started
        if process.returncode:
            raise SystemExit(f"export_model: exit status {process.returncode}\n{(folder / 'log').read_text()[-3000:]}")
        checked = json.loads((folder / "export" / "checked.json").read_text())
        shards = list((folder / "export").glob("*.safetensors"))
        row = {
            "parameters": num_parameters,
            "checkpoint_bytes": sum(size.st_size for size in sizes),
            "checkpoint_on_disk_bytes": sum(512 * size.st_blocks for size in sizes),
            "export_bytes": sum(path.stat().st_size for path in shards),
            "shards": len(shards),
            "peak_anonymous_bytes": peak,
            "weights_in_memory": checked["weights_in_memory"],
            "logits_relative_difference": checked["logits"]["relative"],
            "tensors_compared": len(checked["tensors"]),
            "export_wall_s": wall_s,
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(row, flush=True)
    if peak > LIMIT_BYTES:
        raise SystemExit(f"{peak} bytes of anonymous memory are more than {LIMIT_BYTES}")
    if layers < 40:
        return
    about = " ".join((__doc__ or "").split("\n\n")[2].split())
    results = {"title": "Export of a model of 13 billion parameters", "about": about, "rows": [row]}
    write_results("large_export", results, packages=("safetensors", "torch", "transformers"))


if __name__ == "__main__":
    main(sys.argv[1:])
