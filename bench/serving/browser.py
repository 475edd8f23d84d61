"""The server's page in a real browser: a prompt is typed, the button pressed, the text has to appear.

    python -m bench.serving.browser pictures=FOLDER       needs Debian's chromium

stories260K of the test data is served. At 1280 and at 390 pixels (a phone: touch, two device pixels each) the greedy text on
the page has to be the one that the interface gives; nothing scrolls sideways, no two boxes overlap, every request goes to the
server itself, and a request that is refused says why on the page. playwright has an environment of its own.
"""

import json
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from bench.measure import peer_python, peer_versions
from bench.serving.process import running_server, stories_run
from megagpt.measurement import write_results

PROMPT, TOKENS = "Lily and Ben", 80
CLIENT = r"""
import json, sys
from playwright.sync_api import sync_playwright
url, prompt, tokens, pictures = sys.argv[1:]
BOXES = '''() => {
  const parts = document.querySelectorAll("h1, textarea, input, button, output, #state");
  const boxes = [...parts].map(e => e.getBoundingClientRect());
  let overlaps = 0;
  boxes.forEach((a, i) => boxes.slice(i + 1).forEach(b => {
    if (a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom) overlaps += 1;
  }));
  return {width: innerWidth, scroll_width: document.documentElement.scrollWidth, overlaps};
}'''
rows = []
with sync_playwright() as p:
    browser = p.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
    for width, phone in ((1280, False), (390, True)):
        size = {"width": width, "height": 844}
        context = browser.new_context(viewport=size, is_mobile=phone, has_touch=phone, device_scale_factor=2 if phone else 1)
        page, errors, requests = context.new_page(), [], []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(url)
        page.fill("#prompt", prompt)
        page.fill("#max_tokens", tokens)
        page.fill("#temperature", "0")
        (page.tap if phone else page.click)("#go")
        page.get_by_text("tokens in").wait_for(timeout=120_000)
        row = {"text": page.text_content("#text"), "state": page.text_content("#state"), **page.evaluate(BOXES)}
        row |= {"errors": errors.copy(), "foreign": [found for found in requests if not found.startswith(url)]}
        if pictures:
            page.screenshot(path=f"{pictures}/page_{width}.png", full_page=True)
        page.fill("#max_tokens", "100000")
        (page.tap if phone else page.click)("#go")
        page.get_by_text("Error:").wait_for(timeout=60_000)
        rows.append({**row, "refusal": page.text_content("#state"), "heading": page.text_content("h1")})
        context.close()
    version = browser.version
    browser.close()
print(json.dumps({"rows": rows, "version": version}))
"""


def main(words: Sequence[str]) -> None:
    """Serve, press the button, compare; SystemExit where something is not as the docstring says."""
    pictures = dict(word.split("=", 1) for word in words).get("pictures", "")
    python = peer_python("playwright", ["playwright==1.65.2"])
    with tempfile.TemporaryDirectory(prefix="bench_browser_") as temporary:
        folder = Path(temporary)
        run_dir = stories_run(folder)
        with running_server(folder / "server", f"run_dir={run_dir}") as (port, _):
            url = f"http://127.0.0.1:{port}/"
            body = json.dumps({"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}).encode()
            request = urllib.request.Request(f"{url}v1/completions", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=300) as answer:
                expected = json.load(answer)["choices"][0]["text"]
            command = [python, "-c", CLIENT, url, PROMPT, str(TOKENS), pictures]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found = json.loads(done.stdout)
    rows = []
    for row in found["rows"]:
        good = row["text"] == expected and row["state"].startswith(f"{TOKENS} tokens in ") and row["heading"] == "stories"
        good = good and row["scroll_width"] <= row["width"] and not (row["overlaps"] or row["errors"] or row["foreign"])
        if not (good and row["refusal"].startswith("Error: max_tokens=100000: the context has 512 tokens")):
            raise SystemExit(f"{row}\nexpected text: {expected!r}")
        rows.append({"width_px": row["width"], "characters_of_text": len(row["text"]), "text_equal": True, "overlaps": 0})
    print(json.dumps(rows), flush=True)
    results = {
        "title": "The server's page in a browser",
        "about": " ".join((__doc__ or "").split("\n\n")[2].split()),
        "rows": rows,
    }
    peers = {"chromium": found["version"], **peer_versions(python, ["playwright"])}
    write_results("page_in_browser", results, packages=("fastapi", "uvicorn", "torch"), peers=peers)


if __name__ == "__main__":
    main(sys.argv[1:])
