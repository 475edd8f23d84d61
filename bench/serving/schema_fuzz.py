"""schemathesis against a running server: requests made from its /openapi.json, valid and broken, must never give a 5xx.

    python -m bench.serving.schema_fuzz
    python -m bench.serving.schema_fuzz examples=200

The server has stories260K of the test data and a chat template. Every operation is asked: schemathesis's coverage phase (each
bound and type of each parameter) and random requests. schemathesis has an environment of its own.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from bench.measure import peer_python, peer_versions
from bench.serving.process import running_server, stories_run
from megagpt.measurement import write_results

TEMPLATE = "{% for message in messages %}{{ message.role + ': ' + message.content + '\\n' }}{% endfor %}"
COUNTED = re.compile(r'^megagpt_requests_total\{path="([^"]*)",status="(\d+)"\} (\d+)', re.MULTILINE)


def main(words: Sequence[str]) -> None:
    """Serve, ask, count the answers; SystemExit if one is a 5xx or schemathesis finds anything."""
    examples = dict(word.split("=", 1) for word in words).get("examples", "60")
    python = peer_python("schemathesis", ["schemathesis==4.32.5"])
    with tempfile.TemporaryDirectory(prefix="bench_schema_") as temporary:
        folder = Path(temporary)
        run_dir = stories_run(folder)
        (run_dir / "tokenizer" / "chat_template.jinja").write_text(TEMPLATE)
        (folder / "schemathesis.toml").write_text('[parameters]\n"path.name" = "stories"\n')
        words_of_server = (f"run_dir={run_dir}", "max_waiting=64")
        with running_server(folder / "server", *words_of_server) as (port, process):
            url = f"http://127.0.0.1:{port}"
            command = [python.parent / "schemathesis", "run", f"{url}/openapi.json", "--checks", "not_a_server_error"]
            command += ["--max-examples", examples, "--phases", "coverage,fuzzing", "--request-timeout", "120", "--seed", "1"]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            metrics = subprocess.run(["curl", "-s", f"{url}/metrics"], capture_output=True, text=True, check=True).stdout
            process.terminate()
            status = process.wait(timeout=120)
    found = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
    if done.returncode or found is None or found[1] != found[2] or status:
        raise SystemExit(f"schemathesis {done.returncode}, server {status}\n{done.stdout[-6000:]}\n{done.stderr[-2000:]}")
    answers: dict[str, Counter[str]] = {}
    for path, code, count in COUNTED.findall(metrics):
        answers.setdefault(path, Counter())[f"status_{code[0]}xx"] += int(count)
    columns = ("status_2xx", "status_4xx", "status_5xx")
    rows = [{"path": path, **{column: counts[column] for column in columns}} for path, counts in sorted(answers.items())]
    print(json.dumps(rows), flush=True)
    if any(row["status_5xx"] for row in rows):
        raise SystemExit("a request got a 5xx")
    results = {
        "title": "Requests of schemathesis to the server",
        "about": " ".join((__doc__ or "").split("\n\n")[2].split()) + " No answer is a 5xx, and the server ends with status 0.",
        "test_cases": int(found[1]),
        "rows": rows,
    }
    peers = peer_versions(python, ["schemathesis", "hypothesis"])
    write_results("schema_fuzz", results, packages=("fastapi", "starlette", "uvicorn", "torch"), peers=peers)


if __name__ == "__main__":
    main(sys.argv[1:])
