"""Our tasks against transformers on the export of the same model, with lm-eval's rules written out by hand."""

from pathlib import Path

import pytest
import torch

from megagpt.checkpoint.load_model import load_model
from megagpt.convert.compare_logits import import_transformers
from megagpt.convert.export_hf import ExportConfig, export_model
from megagpt.convert.import_hf import ImportConfig, import_model
from megagpt.distributed.world import lone_world
from megagpt.evaluate.likelihood import text_scorer
from megagpt.evaluate.tasks import read_task, score_task


@pytest.mark.slow
@pytest.mark.realdata
def test_published_tasks_score_as_on_the_export(shared_data: Path, tmp_path: Path) -> None:
    model = shared_data / "model"
    import_model(ImportConfig(source=model / "stories260K.bin", tokenizer=model / "tok512.bin", run_dir=tmp_path / "run"))
    export_model(ExportConfig(run_dir=tmp_path / "run", output_dir=tmp_path / "export", dtype="fp32"))
    transformers = import_transformers()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float64).eval()
    encode = transformers.AutoTokenizer.from_pretrained(tmp_path / "export").encode
    loaded = load_model(tmp_path / "run")
    parts = (loaded.model.double(), loaded.model_config, loaded.tokenizer)
    score = text_scorer(*parts, micro_batch_size=8, world=lone_world(torch.device("cpu")))
    for name, right_by_hand in (("blimp/wh_island", 0), ("lambada_openai", 0), ("piqa", 0)):
        questions = read_task(shared_data / "eval" / f"{name}.jsonl")[:12]
        found = score([option for question in questions for option in question.options])
        expected = []
        for question in questions:
            for context, continuation in question.options:
                ids = encode(context + continuation) if context else [1, *encode(continuation, add_special_tokens=False)]
                start = len(encode(context)) if context else 1  # the tokenizer begins texts with its id 1
                kept = ids[-513:]
                with torch.no_grad():
                    log_p = theirs(input_ids=torch.tensor([kept[:-1]])).logits[0].log_softmax(-1)
                log_p, targets = log_p[-(len(ids) - start) :], torch.tensor(ids[start:])
                greedy = bool((log_p.argmax(-1) == targets).all())
                expected.append((float(log_p.gather(1, targets[:, None]).sum()), greedy))
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected], name
        for (nats, _), (reference, _) in zip(found, expected, strict=True):
            assert nats == pytest.approx(reference, abs=1e-4), name  # transformers norms in fp32 even here
        remaining = iter(expected)
        for question in questions:
            nats = [next(remaining) for _ in question.options]
            best = max(range(len(nats)), key=lambda i: nats[i][0])
            right_by_hand += nats[0][1] if len(nats) == 1 else best == question.gold
        assert score_task(lambda pairs, found=found: found, questions).accuracy == right_by_hand / 12
