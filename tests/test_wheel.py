"""The wheel has all that the checkout has, and works in an environment of its own, away from the checkout."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from random import Random

import pytest

from megagpt import __version__

SHIPPED = {"megagpt": "megagpt", "tools": "megagpt/tools", "configs": "megagpt/configs"}
BUILD = "import sys; from setuptools import build_meta as b; print(getattr(b, 'build_' + sys.argv[1])(sys.argv[2]))"


@pytest.fixture(scope="module")
def wheel(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel that is built from the sdist, which is built from a copy of the checkout; no network."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    left_out = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "runs", "tests", "bench")
    shutil.copytree(project, source, ignore=left_out)
    sdist = build("sdist", source, folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return build("wheel", folder / sdist.name.removesuffix(".tar.gz"), folder)


def build(kind: str, source: Path, folder: Path) -> Path:
    done = subprocess.run([sys.executable, "-c", BUILD, kind, str(folder)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel; all other packages are those of this environment."""
    venv = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(venv / "bin" / "python")]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    # Of a folder named by a .pth file no further .pth file is read: this environment's editable megagpt stays out.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    return venv


@pytest.mark.slow
def test_wheel_and_sdist_have_every_file(project: Path, wheel: Path) -> None:
    expected = set()
    for folder, inside in SHIPPED.items():
        files = [path for path in (project / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        expected |= {f"{inside}/{path.relative_to(project / folder).as_posix()}" for path in files}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == expected
    assert wheel.name == f"megagpt-{__version__}-py3-none-any.whl"


def run(venv: Path, folder: Path, *words: str) -> str:
    """What a command of the environment prints, started in `folder`; its exit status must be 0."""
    names = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SLURM", "RANK", "WORLD_"))}
    variables = names | {"PATH": f"{venv / 'bin'}:{names['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=folder, env=variables, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout[-1500:]}\n{done.stderr[-2500:]}"
    return done.stdout + done.stderr


WORDS = (
    ["river", "town", "garden", "winter", "harbour", "letter", "market", "bridge", "teacher", "forest", "kitchen", "painter"],
    ["reached", "remembered", "described", "carried", "found", "repaired", "watched", "crossed", "measured", "followed"],
)
SENTENCE = "The {noun} of the {noun} {verb} what the {noun} had {verb} with a {noun} and {number} others."


def write_documents(path: Path) -> None:
    """100 documents of English sentences, one JSON object a line; the last two are a copy of the first and one in German."""
    random = Random(0)
    choices = {
        "noun": lambda: random.choice(WORDS[0]),
        "verb": lambda: random.choice(WORDS[1]),
        "number": lambda: str(random.randrange(1000)),
    }
    sentences = [re.sub(r"{(\w+)}", lambda match: choices[match[1]](), SENTENCE) for _ in range(98 * 12)]
    texts = ["\n".join(sentences[start : start + 12]) for start in range(0, len(sentences), 12)]
    texts += [texts[0], "Der Fluss fließt durch die alte Stadt, und im Winter ist er oft von Eis bedeckt.\n" * 5]
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for number, text in enumerate(texts):
            file.write(json.dumps({"text": text, "url": f"https://example.org/{number}"}) + "\n")


@pytest.mark.slow
def test_from_a_dump_to_a_model_outside_the_checkout(project: Path, environment: Path, tmp_path: Path) -> None:
    python = (
        "from importlib.util import find_spec as f; print(*(f(x).origin for x in ('megagpt', 'megagpt.tools.train_model')))"
    )
    for path in run(environment, tmp_path, "python", "-c", python).split():
        assert Path(path).is_relative_to(environment)
    assert "  train_model " in run(environment, tmp_path, "megagpt")
    assert run(environment, tmp_path, "megagpt", "--version") == f"megagpt {__version__}\n"
    text = run(environment, tmp_path, "megagpt", "extract_documents", "--help")
    assert "megagpt extract_documents common_crawl" in text
    assert "tools/" not in text.partition("Settings")[0]

    write_documents(tmp_path / "pages.jsonl.gz")
    words = ["common_crawl", "work_dir=cc", "extract.inputs=[pages.jsonl.gz]", "executor=inline"]
    words += ["dedup.threshold=0.9", "tokenizer.vocab_size=300", "tokenize.validation_fraction=0.1"]
    for stage, printed in (
        ("extract_documents", "100 of 100 documents kept"),
        ("filter_documents", "1  language:other"),
        ("dedup_documents", "dropped 1 exact copies"),
        ("train_tokenizer", "cc/tokenizer/tokenizer.model: 300 ids"),
        ("tokenize_documents", "cc/shards/validation: "),
    ):
        assert printed in run(environment, tmp_path, "megagpt", stage, *words)
    own, copied = (tmp_path / "cc" / name / "tokenizer.model" for name in ("tokenizer", "shards/tokenizer"))
    assert copied.read_bytes() == own.read_bytes()

    training = [
        "debug_cpu",
        "run_dir=run",
        "data.sources.main.path=cc/shards",
        "monitor.wandb=off",
        "monitor.log_every_steps=1",
    ]
    training += ["max_steps=2", "optim.schedule.warmup_steps=1"]
    # torchrun is `python -m torch.distributed.run`.
    torchrun = ["python", "-m", "torch.distributed.run", "--nproc-per-node", "1", "-m", "megagpt.tools.train_model"]
    run(environment, tmp_path, *torchrun, *training, "check=true")
    run(environment, tmp_path, "megagpt", "train_model", *training)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"][-1] == 2
    record = json.loads((tmp_path / "run" / "starts" / "0001.json").read_text(encoding="utf-8"))
    assert record["git_commit"] is None
    assert record["versions"]["megagpt"] == __version__
