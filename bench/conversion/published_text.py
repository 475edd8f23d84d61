"""One published model by every way out of this project: each must give its published text byte for byte.

    python -m bench.conversion.published_text

stories260K of the test data (llama2.c's format) is imported once. Its 200 greedy tokens behind the begin of text are made by
generate_text, by serve_model from the run and from an export, by the export in transformers, by the ONNX graph in onnxruntime
and by the AOTInductor package; graphs are decoded with the export's tokenizer.json. Compiling the package takes minutes.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.serving.process import running_server
from megagpt.measurement import PROJECT, write_results

DATA = Path(os.environ.get("MEGAGPT_TEST_DATA", PROJECT.parent / "shared" / "data")) / "model"
TOKENS = 200


def run_tool(name: str, *words: str) -> bytes:
    """Standard output of a tool. Raises SystemExit if it fails."""
    command = [sys.executable, str(PROJECT / "tools" / f"{name}.py"), *words]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: exit status {done.returncode}\n{done.stderr.decode()[-3000:]}")
    return done.stdout


def generated(folder: Path) -> str:
    """The text of tools/generate_text.py, which ends its output with a line break."""
    words = ["prompt=", f"max_tokens={TOKENS}", "temperature=0", "device=cpu"]
    return run_tool("generate_text", f"run_dir={folder / 'run'}", *words).decode().removesuffix("\n")


def served(folder: Path, *words: str) -> str:
    """The answer of tools/serve_model.py to a completion."""
    body = json.dumps({"prompt": "", "max_tokens": TOKENS, "temperature": 0}).encode()
    with running_server(folder / f"server_{words[0].partition('=')[0]}", *words) as (port, _):
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)["choices"][0]["text"]


def in_transformers(folder: Path) -> str:
    """The text of the export's own tokenizer and model in transformers."""
    from megagpt.convert.compare_logits import import_transformers

    transformers = import_transformers()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "transformers")
    ids = tokenizer("", return_tensors="pt").input_ids.long()
    made = model.generate(ids, do_sample=False, max_new_tokens=TOKENS)
    return tokenizer.decode(made[0], skip_special_tokens=True)


def in_graph(folder: Path, kind: str) -> str:
    """The text of a graph as a program without megagpt's tokenizers decodes it: tokenizer.json of the export."""
    from tokenizers import Tokenizer

    from megagpt.checkpoint.load_model import load_model
    from megagpt.convert.export_graph import FILES, open_onnx, open_package
    from megagpt.convert.step_graph import greedy_ids

    config = load_model(folder / "run").model_config
    facts = json.loads((folder / kind / "graph.json").read_text())
    step = {"onnx": open_onnx, "aotinductor": open_package}[kind](folder / kind / FILES[kind], config)
    ids = greedy_ids(step, config, [facts["bos_id"]], TOKENS)
    return Tokenizer.from_file(str(folder / kind / "tokenizer.json")).decode([facts["bos_id"], *ids])


def main(words: Sequence[str]) -> None:
    """Import, export, generate by every way; SystemExit at the first text that is not the published one."""
    expected = (DATA / "stories260K.expected.txt").read_text(encoding="utf-8")
    formats = ("transformers", "onnx", "aotinductor")
    with tempfile.TemporaryDirectory(prefix="bench_published_") as temporary:
        folder, rows = Path(temporary), []
        model = [f"source={DATA / 'stories260K.bin'}", f"tokenizer={DATA / 'tok512.bin'}"]
        run_tool("import_model", *model, f"run_dir={folder / 'run'}")
        took = {}
        for kind in formats:
            started = time.perf_counter()
            dtype = ["dtype=fp32"] if kind == "transformers" else []
            run_tool("export_model", f"run_dir={folder / 'run'}", f"output_dir={folder / kind}", f"format={kind}", *dtype)
            took[kind] = time.perf_counter() - started
        ways: dict[str, Callable[[], str]] = {
            "generate_text": lambda: generated(folder),
            "serve_model run_dir=": lambda: served(folder, f"run_dir={folder / 'run'}"),
            "serve_model export=": lambda: served(folder, f"export={folder / 'transformers'}"),
            "export in transformers": lambda: in_transformers(folder),
            "ONNX in onnxruntime": lambda: in_graph(folder, "onnx"),
            "AOTInductor package": lambda: in_graph(folder, "aotinductor"),
        }
        for way, text_of in ways.items():
            text = text_of()
            if text != expected:
                raise SystemExit(f"{way}: not the published text:\n{text!r}\n{expected!r}")
            rows.append({"way": way, "bytes": len(text.encode()), "equal": True})
            print(rows[-1], flush=True)
    results = {
        "title": "One published model by every way out",
        "about": " ".join((__doc__ or "").split("\n\n")[2].split()) + " All texts are the published one.",
        "rows": rows,
        "export_wall_s": took,
    }
    write_results("published_text", results, packages=("onnx", "onnxruntime", "tokenizers", "torch", "transformers"))


if __name__ == "__main__":
    main(sys.argv[1:])
