"""transformers' generate under bench/generation and bench/gpu: prints tokens per second (of CPU time on a CPU) and the ids."""

import json
import sys
import time
from pathlib import Path
from statistics import median

import torch
import transformers
from transformers import LlamaForCausalLM

from bench.training.clock import peak_resident_bytes
from bench.training.peers.transformers import llama, renamed


def main() -> None:
    """Warm up, then generate five times."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    sizes = json.loads(Path(job["model"]).read_text(encoding="utf-8"))
    transformers.logging.set_verbosity_error()
    model = LlamaForCausalLM(llama(sizes))
    model.load_state_dict(renamed(torch.load(job["weights"])))
    model.to(job.get("device", "cpu"), getattr(torch, job.get("dtype", "float32"))).eval()
    prompt = torch.arange(job["batch"] * job["prompt"]).view(job["batch"], -1) * 7 % sizes["vocab_size"]
    prompt = prompt.to(job.get("device", "cpu"))
    clock = time.perf_counter if prompt.is_cuda else time.process_time
    mask, seconds, ids = torch.ones_like(prompt), [], prompt
    for _ in range(6):
        began = clock()
        ids = model.generate(prompt, attention_mask=mask, max_new_tokens=job["new"], do_sample=False, use_cache=True)
        ids = ids.cpu()  # waits for the GPU
        seconds.append(clock() - began)
    rate = job["batch"] * job["new"] / median(seconds[1:])
    print(json.dumps({"tokens_per_s": rate, "peak_rss_bytes": peak_resident_bytes(), "ids": ids[:, job["prompt"] :].tolist()}))


if __name__ == "__main__":
    main()
