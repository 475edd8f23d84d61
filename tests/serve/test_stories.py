"""A published model served: its published text, from a run and from an export, for one client and for 64 at once."""

import asyncio
import shutil
from pathlib import Path

import pytest
from served import running_server

from megagpt.config import UserError
from megagpt.convert.export_hf import ExportConfig, export_model
from megagpt.convert.import_hf import ImportConfig, import_model
from megagpt.convert.load_export import load_export
from megagpt.files import write_json

pytestmark = [pytest.mark.realdata, pytest.mark.slow]
NUM_CLIENTS = 64
BODY = {"prompt": "", "max_tokens": 200, "temperature": 0}


@pytest.fixture(scope="module")
def stories(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, run_dir = shared_data / "model", tmp_path_factory.mktemp("stories") / "run"
    import_model(ImportConfig(source=folder / "stories260K.bin", run_dir=run_dir, tokenizer=folder / "tok512.bin"))
    return run_dir


@pytest.fixture(scope="module")
def expected(shared_data: Path) -> str:
    return (shared_data / "model" / "stories260K.expected.txt").read_text(encoding="utf-8")


async def stream_all(port: int) -> list[str]:
    """The texts that 64 clients get that ask at the same moment."""
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=900) as client:

        async def one() -> str:
            chunks = await client.completions.create(model="stories", prompt="", max_tokens=200, temperature=0, stream=True)
            return "".join([chunk.choices[0].text async for chunk in chunks])

        return await asyncio.gather(*(one() for _ in range(NUM_CLIENTS)))


def test_64_streaming_clients_get_the_published_text(stories: Path, expected: str, tmp_path: Path) -> None:
    with running_server(tmp_path, f"run_dir={stories}", "model_name=stories") as server:
        choice = server.complete(**BODY)["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (expected, "length")
        assert asyncio.run(stream_all(server.port)) == [expected] * NUM_CLIENTS
        assert server.metric("megagpt_generated_tokens_total") == 200 * (NUM_CLIENTS + 1)
        assert server.stop() == 0


def test_an_export_is_served_as_its_run(stories: Path, expected: str, tmp_path: Path) -> None:
    out = export_model(ExportConfig(run_dir=stories, output_dir=tmp_path / "out", dtype="fp32"))
    with running_server(tmp_path, f"export={out}") as server:
        assert server.complete(**BODY)["choices"][0]["text"] == expected
        assert server.request("GET", "/v1/models/out")[0] == 200

    (out / "checked.json").rename(tmp_path / "checked.json")
    with pytest.raises(UserError, match=r"out: holds no checked\.json, so tools/export_model\.py did not write it"):
        load_export(out)
    shutil.copy(tmp_path / "checked.json", out)
    config = (out / "config.json").read_text()
    (out / "config.json").write_text(config.replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 1e-02'))
    assert (out / "config.json").read_text() != config
    with pytest.raises(UserError, match=r"config\.json is not the file that was checked"):
        load_export(out)
    (out / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json is missing"):
        load_export(out)
    write_json(out / "checked.json", {"files": None})
    with pytest.raises(UserError, match=r"checked\.json: files: names and sha256 sums are expected"):
        load_export(out)
