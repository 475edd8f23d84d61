"""Run in a process of its own: every settings class gets a further field, then old results are rerun, finished and read.

python tests/support/with_new_settings.py      (in a copy of a folder of tests/fixtures)
"""

import importlib
import pkgutil
from pathlib import Path

import dedup_documents
import extract_documents
import filter_documents
import tokenize_documents
import train_tokenizer
from pydantic.fields import FieldInfo

import megagpt
from megagpt.checkpoint.on_disk import list_checkpoints
from megagpt.config import Config, load
from megagpt.corpus.config import CorpusConfig
from megagpt.corpus.dedup import dedup_documents as dedup
from megagpt.corpus.extraction import extract_documents as extraction
from megagpt.corpus.filters import filter_documents as filtering
from megagpt.corpus.packing import tokenize_documents as packing
from megagpt.data.open_data import open_data
from megagpt.evaluate.evaluate_model import EvaluateConfig, evaluate_run
from megagpt.files import read_json
from megagpt.report.inspect_data import check_ledger
from megagpt.train.config import TrainConfig
from megagpt.train.preflight import check_resume


def config_classes() -> list[type[Config]]:
    """Every settings class of the package."""
    for module in pkgutil.walk_packages(megagpt.__path__, "megagpt."):
        importlib.import_module(module.name)
    found, todo = [], [Config]
    while todo:
        found.append(todo.pop())
        todo += found[-1].__subclasses__()
    return [config_class for config_class in found[1:] if config_class.__module__.startswith("megagpt")]


def add_fields() -> int:
    """Give every class the field `new_switch`; returns how many classes there are."""
    classes = config_classes()
    for config_class in classes:
        config_class.__pydantic_fields__["new_switch"] = FieldInfo(annotation=bool, default=False)
    for _ in range(4):  # a section's new field is in the classes that hold it after as many rounds as it is deep
        for config_class in classes:
            for field in config_class.__pydantic_fields__.values():
                if isinstance(field.default, Config):
                    field.default = type(field.default)()
            config_class.model_rebuild(force=True)
    return len(classes)


def main() -> None:
    """Raises whatever is refused."""
    number = add_fields()
    for module in (extraction, filtering, dedup, packing):
        module.FORMAT = 1  # that of the fixtures: of another one unfinished results are refused
    stages = (extract_documents, filter_documents, dedup_documents, train_tokenizer, tokenize_documents)
    config = load(CorpusConfig, ["corpus.yaml"])
    assert config.filter.min_length.model_dump()["new_switch"] is False
    for stage in stages:
        stage.run(config)
    for stage in stages:
        if stage not in (train_tokenizer, extract_documents):  # extraction has another format since
            stage.run(load(CorpusConfig, ["unfinished.yaml", "executor=inline"]))
    for name in ("lines", "later"):
        dedup_documents.run(load(CorpusConfig, [f"{name}.yaml"]))
    for engine in ("deepspeed", "fsdp"):
        run_dir = Path("trained") / engine
        config = load(TrainConfig, [f"{engine}.yaml"])
        assert config.model.model_dump()["new_switch"] is False
        (path,) = list_checkpoints(run_dir)
        check_resume(config, open_data(config.data), read_json(path / "state.json"), path)
        list(check_ledger(run_dir))
        evaluate_run(load(EvaluateConfig, [f"run_dir={run_dir}"]))
    print(f"{number} classes, nothing refused")


if __name__ == "__main__":
    main()
