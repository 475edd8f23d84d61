"""Every tool explains itself, is in the README and refuses bad input with status 2; every shipped YAML loads."""

import ast
import contextlib
import importlib
import io
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_origin

import pytest
import yaml
from pydantic import create_model

from megagpt.command import run_words
from megagpt.config import Config, describe, dump, kind_of, load, section_classes
from megagpt.engine.config import FSDPConfig
from megagpt.plan.run_plan import PlanConfig, cluster_of, make_plan

PROJECT = Path(__file__).resolve().parent.parent
TOOLS = sorted(path.stem for path in (PROJECT / "tools").glob("*.py"))
CONFIGS = sorted(str(path.relative_to(PROJECT)) for path in (PROJECT / "configs").rglob("*.yaml"))

# For each tool: words that are wrong, and what the error must name. {tmp} is an empty folder.
BAD_INPUT = {
    "extract_documents": [
        (["work_dir={tmp}/w", "extract.inputs=[{tmp}/none.warc.gz]"], "none.warc.gz"),
        (["work_dir={tmp}/w", "extract.inptus=[a]"], "did you mean extract.inputs"),
        (["work_dir={tmp}/w", "num_workers=-1"], "num_workers=-1"),
    ],
    "filter_documents": [
        (["work_dir={tmp}/w"], "{tmp}/w/extract"),
        (["work_dir={tmp}/w", "filter.language.min_score=2"], "filter.language.min_score=2"),
    ],
    "dedup_documents": [
        (["work_dir={tmp}/w", "dedup.inputs=[{tmp}/none.jsonl]"], "dedup.inputs: no file matches"),
        (["work_dir={tmp}/w", "dedup.threshold=abc"], "dedup.threshold='abc'"),
    ],
    "train_tokenizer": [
        (["work_dir={tmp}/w"], "{tmp}/w/dedup"),
        (["work_dir={tmp}/w", "tokenizer.vocab_size=12"], "tokenizer.vocab_size=12"),
        (["work_dir={tmp}/w", "part=1/4"], "part=1/4: a tokenizer is trained in one piece"),
    ],
    "tokenize_documents": [
        (["work_dir={tmp}/w", "tokenize.inputs=[{tmp}/none.jsonl]"], "tokenize.inputs: no file matches"),
        (["work_dir={tmp}/w", "tokenize.validation_fraction=1"], "tokenize.validation_fraction=1"),
    ],
    "report_data": [(["work_dir={tmp}/none"], "{tmp}/none")],
    "inspect_data": [(["shards={tmp}/none"], "{tmp}/none")],
    "quickstart": [
        (["warc={tmp}/none.warc.gz", "run_dir={tmp}/q"], "warc={tmp}/none.warc.gz"),
        (["max_steps=0"], "max_steps=0"),
    ],
    "train_model": [
        (["{tmp}/none.yaml"], "{tmp}/none.yaml"),
        (["configs/train/debug_cpu.yaml", "data.sources.main.path={tmp}/none", "run_dir={tmp}/r"], "{tmp}/none"),
        (["configs/train/debug_cpu.yaml", "optim.lr=abc"], "optim.lr='abc'"),
        (["configs/train/debug_cpu.yaml", "global_batch_size=-8"], "global_batch_size=-8"),
        (["configs/train/debug_cpu.yaml", "globl_batch_size=8"], "did you mean global_batch_size"),
    ],
    "inspect_checkpoints": [(["run_dir={tmp}/none"], "{tmp}/none")],
    "evaluate_model": [
        (["run_dir={tmp}/none"], "{tmp}/none"),
        (["run_dir={tmp}", "micro_batch_size=0"], "micro_batch_size=0"),
    ],
    "generate_text": [
        (["run_dir={tmp}/none"], "{tmp}/none"),
        (["run_dir={tmp}", "temperature=-1"], "temperature=-1"),
        (["run_dir={tmp}", "min_p=2"], "min_p=2"),
        (["run_dir={tmp}", 'stop=["a", ""]'], "an empty stop string would end every text at its start"),
    ],
    "serve_model": [
        (["run_dir={tmp}/none"], "{tmp}/none"),
        ([], "give run_dir=RUN or export=FOLDER, one of them"),
        (["run_dir={tmp}", "port=70000"], "port=70000"),
        (["run_dir={tmp}", "host=0.0.0.0"], "host=0.0.0.0 admits other machines"),
        (["export={tmp}"], "holds no checked.json"),
    ],
    "export_model": [
        (["run_dir={tmp}/none", "output_dir={tmp}/out"], "{tmp}/none"),
        (["run_dir={tmp}", "output_dir={tmp}"], "output_dir={tmp} exists"),
        (["run_dir={tmp}", "output_dir={tmp}/out", "dtype=fp16"], "dtype=fp16: format=transformers"),
    ],
    "import_model": [
        (["source={tmp}/none", "run_dir={tmp}/r"], "source={tmp}/none"),
        (["source={tmp}", "run_dir={tmp}/r"], "{tmp}/config.json: no such file"),
        (["source={tmp}", "run_dir={tmp}"], "run_dir={tmp} exists"),
        (["source={tmp}", "run_dir={tmp}/r", "seq_len=0"], "seq_len=0"),
    ],
    "check_node": [(["num_gpus=-1"], "num_gpus=-1"), (["run_dri=x"], "did you mean run_dir")],
    "plan_run": [
        (["configs/train/debug_cpu.yaml", "gpus=0"], "gpus=0"),
        (["configs/train/debug_cpu.yaml", "network=none"], "network=none: one of infiniband_8x400"),
        (["configs/train/gpt_7b.yaml", "engine.shard_size=8", "gpus=12"], "engine.shard_size=8 does not divide the 12 ranks"),
        (["configs/train/debug_cpu.yaml", "gups=8"], "did you mean gpus"),
    ],
    "report_run": [(["run_dir={tmp}/none"], "{tmp}/none"), (["runs=[a]"], "runs: give 2 to 6 runs, not 1")],
    "watch_run": [
        (["run_dir={tmp}/none"], "{tmp}/none/metrics.jsonl"),
        (["runs={tmp}/none"], "runs={tmp}/none: not a folder"),
        ([], "give one of run_dir and runs"),
    ],
}
CASES = [(tool, words, named) for tool, cases in BAD_INPUT.items() for words, named in cases]


def main_arguments(tool: str) -> tuple[type[Config], object, str]:
    """What a tool's file hands to megagpt.command.main: its configuration class, function and description."""
    module = importlib.import_module(tool)
    tree = ast.parse((PROJECT / "tools" / f"{tool}.py").read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "main"]
    assert len(calls) == 1, f"tools/{tool}.py: exactly one call of main() is expected"
    names = [ast.unparse(argument) for argument in calls[0].args]
    assert names[2] == "__doc__ or ''"
    return getattr(module, names[0]), getattr(module, names[1]), module.__doc__ or ""


def run_tool(tool: str, words: list[str]) -> tuple[int, str, str]:
    """Run a tool inside this process: its exit status, standard output and standard error."""
    output, errors = io.StringIO(), io.StringIO()
    config_class, run, about = main_arguments(tool)
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        status = run_words(config_class, run, about, words)  # type: ignore[arg-type]
    return status, output.getvalue(), errors.getvalue()


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_has_help(tool: str) -> None:
    status, output, _ = run_tool(tool, ["--help"])
    assert status == 0
    config_class, _, about = main_arguments(tool)
    assert output.startswith(about.strip().splitlines()[0])
    assert f"tools/{tool}.py" in about, f"tools/{tool}.py: its docstring shows no command line"
    missing = [name for name, _, text in describe(config_class) if not text]
    assert not missing, f"settings of tools/{tool}.py without a docstring below the field: {missing}"
    for name in config_class.model_fields:
        assert f"  {name}" in output


def unions(config_class: type[Config], prefix: str = "") -> list[tuple[type[Config], str, list[type[Config]]]]:
    """(class that has the field, its name, the classes of its kinds) of every section of several kinds."""
    found = []
    for name, field in config_class.model_fields.items():
        annotations = [field.annotation, *(get_args(field.annotation) if get_origin(field.annotation) in (dict, tuple) else ())]
        for sections in map(section_classes, annotations):
            if len(sections) > 1:
                found.append((config_class, name, sections))
            for section in sections:
                found += unions(section)
    return found


UNIONS = {
    (config_class.__name__, name): (config_class, name, sections)
    for tool in TOOLS
    for config_class, name, sections in unions(main_arguments(tool)[0])
}


def minimal(section: type[Config]) -> dict[str, object]:
    """A kind's name and values for its required fields, all of which are numbers or paths."""
    required = {name: field.annotation for name, field in section.model_fields.items() if field.is_required()}
    values = {name: "x" if annotation in (str, Path) else 2 for name, annotation in required.items()}
    return {**values, "kind": kind_of(section)}


def test_there_are_sections_of_several_kinds() -> None:
    assert {("ModelConfig", "rope_scaling"), ("TrainConfig", "engine")} <= UNIONS.keys()


@pytest.mark.parametrize("key", UNIONS, ids=".".join)
def test_a_section_of_several_kinds_explains_and_changes_each(key: tuple[str, str], tmp_path: Path) -> None:
    config_class, name, sections = UNIONS[key]
    rows = [row for row in describe(config_class) if row[0].startswith(f"{name}.")]
    assert len(rows) == len(set(rows))
    assert len({row[0] for row in rows if "(kind=" not in row[2]}) == len([row for row in rows if "(kind=" not in row[2]])
    assert not [row for row in rows if "Pydantic" in " ".join(row)]
    assert {row[0] for row in rows} >= {f"{name}.{field}" for section in sections for field in section.model_fields}
    for row in rows:
        kinds = row[2].removeprefix("(kind=").partition(")")[0].split(" or ") if row[2].startswith("(kind=") else None
        fields = {kind_of(section) for section in sections if row[0].removeprefix(f"{name}.") in section.model_fields}
        assert kinds is None or set(kinds) <= fields, row
    holder = create_model(
        "Holder", __base__=Config, section=(config_class.model_fields[name].annotation, config_class.model_fields[name])
    )
    for before, after in itertools.permutations(sections, 2):
        path = tmp_path / "before.yaml"
        whole = before.model_validate(minimal(before)).model_dump(mode="json")
        path.write_text(yaml.safe_dump({"section": whole}))
        words = [f"section.{field}={value}" for field, value in minimal(after).items()]
        loaded = load(holder, [str(path), f"section.kind={kind_of(after)}", *words])
        assert type(loaded.section) is after  # type: ignore[attr-defined]


def test_the_readme_lists_every_tool() -> None:
    rows = re.findall(r"^\| `(\w+)\.py` \| \S.* \| \S.* \|$", (PROJECT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    hint = "README.md, table of tools: a row `| `NAME.py` | input | output |` for each file in tools/"
    missing, gone = sorted({*TOOLS} - {*rows}), sorted({*rows} - {*TOOLS})
    assert (missing, gone) == ([], []), f"{hint}: no row for {missing}, no tool {gone}"
    assert len(rows) == len({*rows}), f"{hint}: a tool comes twice"


def test_every_tool_has_a_bad_input_case() -> None:
    missing, gone = sorted({*TOOLS} - {*BAD_INPUT}), sorted({*BAD_INPUT} - {*TOOLS})
    assert (missing, gone) == ([], []), f"{Path(__file__).name}: BAD_INPUT has no row for {missing}, no tool {gone}"


@pytest.mark.parametrize(("tool", "words", "named"), CASES, ids=lambda value: value if isinstance(value, str) else None)
def test_bad_input_ends_with_status_2_and_names_what_is_wrong(
    tool: str, words: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(PROJECT)
    status, output, errors = run_tool(tool, [word.replace("{tmp}", str(tmp_path)) for word in words])
    assert status == 2, errors
    assert errors.startswith("error: ")
    assert named.replace("{tmp}", str(tmp_path)) in errors
    assert "Traceback" not in errors + output
    assert list(tmp_path.rglob("*.zst")) + list(tmp_path.rglob("*.bin")) == []


@pytest.mark.slow
@pytest.mark.parametrize("tool", TOOLS)
def test_bad_input_from_the_shell(tool: str, tmp_path: Path) -> None:
    words = [word.replace("{tmp}", str(tmp_path)) for word in BAD_INPUT[tool][0][0]]
    for extra, traceback in (([], False), (["--debug"], True)):
        command = [sys.executable, f"tools/{tool}.py", *words, *extra]
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=900, env=clean_environment())
        assert done.returncode == 2, done.stderr
        assert ("Traceback" in done.stderr) == traceback, done.stderr


def clean_environment() -> dict[str, str]:
    """This environment without what a launcher or a cluster would set."""
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_")
    return {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", *dropped))}


@pytest.mark.parametrize("tool", TOOLS)
def test_an_unknown_setting_is_refused(tool: str) -> None:
    status, _, errors = run_tool(tool, ["no_such_setting=1"])
    assert status == 2
    assert "no_such_setting: no such field" in errors


@pytest.mark.parametrize("tool", TOOLS)
def test_an_unknown_option_is_refused(tool: str) -> None:
    status, _, errors = run_tool(tool, ["--verbose"])
    assert status == 2
    assert "--verbose" in errors


def test_configs_are_there() -> None:
    expected = {
        *(f"configs/corpus/{name}.yaml" for name in ("common_crawl", "wikipedia", "quickstart")),
        *(
            f"configs/train/{name}.yaml"
            for name in ("debug_cpu", "shakespeare_cpu", "gpt_124m", "gpt_1b3", "gpt_7b", "gpt_13b")
        ),
        *(f"configs/finetune/{name}.yaml" for name in ("chat", "summarize", "lora", "classify")),
    }
    assert expected <= set(CONFIGS)


@pytest.mark.parametrize(("name", "gpus"), [("gpt_124m", 8), ("gpt_1b3", 8), ("gpt_7b", 64), ("gpt_13b", 64)])
def test_configs_for_gpus_are_compiled_without_graph_breaks_and_fit(name: str, gpus: int) -> None:
    config = load(PlanConfig, [str(PROJECT / f"configs/train/{name}.yaml"), f"gpus={gpus}", "gpu=h100_80gb"])
    assert config.compile
    assert config.model.dropout == 0, "torch 2.13 compiles dropout to wrong masks"
    assert isinstance(config.engine, FSDPConfig) or config.engine.zero_stage == 1
    assert make_plan(config.train_config(), cluster_of(config)).fits


@pytest.mark.parametrize("path", CONFIGS)
def test_every_config_loads_and_survives_a_dump(path: str, tmp_path: Path) -> None:
    tool = {"corpus": "extract_documents", "train": "train_model", "finetune": "train_model"}[Path(path).parent.name]
    config_class, _, _ = main_arguments(tool)
    config = load(config_class, [str(PROJECT / path)])
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump(config), encoding="utf-8")
    assert load(config_class, [str(copy)]) == config


@pytest.mark.parametrize("path", CONFIGS)
def test_every_config_says_what_it_is_for(path: str) -> None:
    assert (PROJECT / path).read_text(encoding="utf-8").startswith("# "), f"{path}: begins with a comment on its purpose"
