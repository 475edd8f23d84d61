"""Reports and a comparison in a real browser, at the width of a desk and of a phone, and the panel at three widths.

    python -m bench.report.pages FOLDER      about a minute; needs chromium (playwright gets an environment of its own)

Two long runs with restarts, a rewind, long names and names in Arabic are written, and one whose names and texts are hostile. On
each page: no request but the page's own, no error, no dialog, nothing that the hostile texts would do, no sideways scrolling,
no two headings, charts, tables or texts on top of each other, also with everything unfolded. FOLDER is made and keeps the
pictures, to be looked at; the results go to bench/results/report_pages.json.
"""

import json
import math
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.measure import peer_python
from megagpt.files import write_json
from megagpt.measurement import write_results
from megagpt.monitor.metrics import METRICS_FILE, format_row
from megagpt.report.panel import run_panel, runs_table
from megagpt.report.run_report import ReportConfig, report_run
from megagpt.report.run_state import RunReader

HOSTILE = "</pre></script><img src=x onerror=\"window.ran='image'\"><script>window.ran='script'</script>"
SOURCES = ("fineweb-edu-dedup-with-a-very-long-source-name-2024-10", "كتب عربية (books)", "code")
WIDTHS, PANEL_WIDTHS = (1280, 390), (40, 80, 120)
BROWSER = r"""
import json, sys
from pathlib import Path
from playwright.sync_api import sync_playwright
folder, chromium, pages, panels = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
OVERLAPS = '''() => {
  const found = [], all = [...document.querySelectorAll("h1,h2,h3,.u-wrap,.u-legend,table,svg,pre,p")];
  const boxes = all.map(e => [e, e.getBoundingClientRect()]).filter(([e, b]) => b.width && b.height);
  for (let i = 0; i < boxes.length; i++) for (let j = i + 1; j < boxes.length; j++) {
    const [e, a] = boxes[i], [f, b] = boxes[j];
    if (e.contains(f) || f.contains(e)) continue;
    if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1)
      found.push(e.tagName + " " + f.tagName);
  }
  return found;
}'''
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
    for name, path in pages.items():
        for width in json.loads(sys.argv[5]):
            phone = width < 500
            options = {"is_mobile": True, "has_touch": True, "device_scale_factor": 2} if phone else {}
            context = browser.new_context(viewport={"width": width, "height": 844}, offline=True, **options)
            page, errors, requests, dialogs = context.new_page(), [], [], []
            page.on("console", lambda message: errors.append(message.text))
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.on("request", lambda request: requests.append(request.url))
            page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
            page.goto(Path(path).as_uri())
            page.wait_for_timeout(1000)
            page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
            page.wait_for_timeout(300)
            print(json.dumps({
                "page": name,
                "width": width,
                "charts": page.evaluate("document.querySelectorAll('canvas').length"),
                "requests": len(requests) - 1,
                "errors": len(errors),
                "dialogs": len(dialogs),
                "hostile_text_ran": page.evaluate("window.ran ?? 'nothing'"),
                "wider_than_the_screen_px": page.evaluate("document.documentElement.scrollWidth - innerWidth"),
                "overlaps": len(page.evaluate(OVERLAPS)),
            }), flush=True)
            page.screenshot(path=str(folder / f"{name}_{width}.png"), full_page=True)
            context.close()
    for path in panels:
        page = browser.new_page(viewport={"width": 1500, "height": 900})
        page.goto(Path(path).as_uri())
        page.screenshot(path=str(Path(path).with_suffix(".png")))
"""


def main(words: Sequence[str]) -> None:
    """Write the runs and the pages, look at them in the browser, write the results. Raises AssertionError if a page is bad."""
    folder = Path(words[0]).resolve()
    folder.mkdir(parents=True)
    chromium = shutil.which("chromium")
    if chromium is None:
        raise SystemExit("chromium is not installed (apt-get install chromium)")
    names = ("llama-1b3-fineweb-edu-lr3e-4-warmup200-batch4M", "llama-1b3-fineweb-edu-lr6e-4", HOSTILE.replace("/", "⁄"))
    runs = [write_run(folder / "runs" / name, seed=i, hostile=i == 2) for i, name in enumerate(names)]
    pages = {
        "report": report_run(ReportConfig(run_dir=runs[0])),
        "hostile_report": report_run(ReportConfig(run_dir=runs[2])),
        "comparison": report_run(ReportConfig(runs=(runs[0], runs[1]), output=folder / "comparison.html")),
        "hostile_comparison": report_run(ReportConfig(runs=(runs[0], runs[2]), output=folder / "hostile_comparison.html")),
    }
    panels = [draw_panels(folder / f"panel_{width}.svg", runs, width) for width in PANEL_WIDTHS]
    texts = [json.dumps({name: str(path) for name, path in pages.items()}), json.dumps(list(map(str, panels)))]
    python = peer_python("browser", ["playwright"])
    done = subprocess.run(
        [python, "-c", BROWSER, folder, chromium, *texts, json.dumps(WIDTHS)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(done.stderr[-4000:])
    rows: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    for row in rows:
        print(row, flush=True)
        assert row["hostile_text_ran"] == "nothing", row
        assert not any(row[key] for key in ("requests", "errors", "dialogs", "wider_than_the_screen_px", "overlaps")), row
    results = {
        "title": "Reports in a browser",
        "about": "Reports and comparisons of runs of 2,100 steps with three starts, a rewind, long names and names in Arabic,"
        " and with markup and scripts in every name and text, in Chromium at 1,280 and 390 px, offline, all folds open."
        " An overlap: a heading, chart, table or text that covers another.",
        "rows": rows,
        "lost": "",
    }
    write_results("report_pages", results, packages=("rich", "jinja2"))


def write_run(run_dir: Path, *, seed: int, hostile: bool) -> Path:
    """The files of a run with three starts."""
    rng, rows, now = random.Random(seed), [], time.time() - 30_000
    lr, sources = 3e-4 * (seed + 1), (*SOURCES, *([HOSTILE] if hostile else []))
    bad = HOSTILE if hostile else ""

    def add(kind: str, step: int, attempt: int, **values: Any) -> None:
        rows.append({"kind": kind, "step": step, "incarnation": attempt, "time": now, **values})

    for attempt, (first, last) in enumerate(((0, 900), (800, 1500), (1450, 2100)), start=1):
        add("start", first, attempt, seconds={"start": 40.0}, resumed=first > 0)
        for step in range(first + 10, last + 1, 10):
            now += 20
            loss = 7 * math.exp(-step / 300) + 2.9 + rng.gauss(0, 0.03)
            values: dict[str, Any] = {"loss": loss, "grad_norm": 0.4 + abs(rng.gauss(0, 0.1)), "tokens": step * 4_194_304}
            values |= {"lr": lr * min(1, step / 200), "tokens_per_second": 2_310_000 + rng.gauss(0, 30_000), "mfu": 0.431}
            values["sources"] = {name: {"loss": loss + i * 0.3, "targets": 1000} for i, name in enumerate(sources)}
            values["gpu"] = {"memory_used_gib": 71.5, "utilisation_percent": 98, "power_watts": 651.0, "throttled": "thermal"}
            spent = float(step - first)
            add("train", step, attempt, seconds={"start": 40.0, "train": 1.9 * spent, "data_wait": 0.06 * spent}, **values)
            if step % 250 == 0:
                add("save", step, attempt)
            if step % 300 == 0:
                score = {
                    "loss": loss,
                    "perplexity": math.exp(loss),
                    "bits_per_byte": loss / 3.1,
                    "tokens": 10,
                    "text_bytes": 30,
                }
                add("evaluate", step, attempt, sources=dict.fromkeys(sources, score), **score)
                add("sample", step, attempt, prompt="Once", text=" upon a time there was a king" * 14 + "\n" + bad)
            if step == 1230:
                add("rewind", 1200, attempt, bad_step=1213, reason="loss 5.1 is 14 deviations above the median" + bad)
    add("alert", 2100, 3, alert="thermal", reason="rank 13 on gpu-node-0007.example.org: held down in five rows" + bad)
    run_dir.mkdir(parents=True)
    (run_dir / METRICS_FILE).write_bytes(b"".join(map(format_row, rows)))
    model = {"num_layers": 24 + seed, "hidden_size": 2048, "seq_len": 2048}
    data = {"seq_len": 2048, "sources": {"code": {"path": "shards"}}}
    config = {"max_steps": 3000, "save_every_steps": 250, "optim": {"lr": lr}, "model": model, "data": data}
    config["note"] = bad or "none"
    for attempt in (1, 2, 3):
        facts = {"host": "node-7" + bad, "launcher": "srun", "world_size": 64, "device": "cuda:0", "python": "3.11.7"}
        start = {"incarnation": attempt, "time": f"2026-01-0{attempt}T00:00:00Z", "versions": {"torch": "2.13.0" + bad}}
        write_json(run_dir / "starts" / f"{attempt:04d}.json", {**start, **facts, "config": config})
    (run_dir / "config.yaml").write_text(f"optim:\n  lr: {lr}\n# {bad}\n", encoding="utf-8")
    return run_dir


def draw_panels(path: Path, runs: Sequence[Path], width: int) -> Path:
    """The panels of the runs and their table, as a picture of a terminal; every line fits."""
    with path.with_suffix(".txt").open("w", encoding="utf-8") as text:
        console = Console(record=True, width=width, force_terminal=True, markup=False, highlight=False, file=text)
        states = [RunReader(run).read(time.time()) for run in runs[::2]]
        for state in states:
            console.print(run_panel(state, width))
        console.print(runs_table(states, width))
    path.write_text(console.export_svg(title=f"{width} columns"), encoding="utf-8")
    return path


if __name__ == "__main__":
    main(sys.argv[1:])
