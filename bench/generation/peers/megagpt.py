"""MegaGPT's generate_ids under bench/generation and bench/gpu: prints tokens per second (of CPU time on a CPU) and the ids."""

import json
import sys
import time
from pathlib import Path
from statistics import median

import torch

from bench.training.clock import peak_resident_bytes
from megagpt.generate.sampling import SamplingConfig
from megagpt.generate.streams import generate_ids
from megagpt.model.gpt import GPT, ModelConfig


def main() -> None:
    """Warm up, then generate five times."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    config = ModelConfig(**json.loads(Path(job["model"]).read_text(encoding="utf-8")))
    model = GPT(config)
    model.load_state_dict(torch.load(job["weights"]))
    model.to(job.get("device", "cpu"), getattr(torch, job.get("dtype", "float32"))).eval()
    prompt = torch.arange(job["batch"] * job["prompt"]).view(job["batch"], -1) * 7 % config.vocab_size
    prompt = prompt.to(job.get("device", "cpu"))
    clock = time.perf_counter if prompt.is_cuda else time.process_time
    sampling, seconds, rows = SamplingConfig(max_tokens=job["new"], temperature=0.0), [], []
    for _ in range(6):
        began = clock()
        with torch.inference_mode():  # as stream_texts has it
            rows = list(generate_ids(model, config, prompt, sampling))
        seconds.append(clock() - began)
    rate = job["batch"] * job["new"] / median(seconds[1:])
    print(
        json.dumps(
            {
                "tokens_per_s": rate,
                "peak_rss_bytes": peak_resident_bytes(),
                "ids": [list(column) for column in zip(*rows, strict=True)],
            }
        )
    )


if __name__ == "__main__":
    main()
