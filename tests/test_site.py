"""No page has a broken link, in the repository or on the site; the site loads nothing from others; the tutorial is true."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tutorial

PROJECT = Path(__file__).resolve().parent.parent
LOADED = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src"}


class Loads(HTMLParser):
    """Addresses of what a browser loads with a page: scripts, styles, fonts, pictures, frames."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        loads = tag in LOADED and not (tag == "link" and values.get("rel") in ("canonical", "next", "prev"))
        if loads and (address := values.get(LOADED[tag])):
            self.found.append(address)


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower().replace("`", "")).replace(" ", "-")


def prose(path: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


PAGES = sorted(path.relative_to(PROJECT).as_posix() for path in [*PROJECT.glob("*.md"), *PROJECT.glob("docs/*.md")])


@pytest.mark.parametrize("name", PAGES)
def test_links_of_a_page_lead_somewhere_in_the_repository(name: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(PROJECT / name)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (PROJECT / name).parent / path if path else PROJECT / name
        assert target.exists(), f"{name}: {link}: no such file"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", prose(target), re.MULTILINE)
            assert anchor in map(slug, headings), f"{name}: {link}: no such heading"


@pytest.mark.parametrize(
    ("expected", "output", "missing"),
    [
        (["kept 1,218 of 1,738"], "noise\nkept 9 of 10 documents", None),
        (["kept 1,218 of 1,738"], "kept none of 10", "kept 1,218 of 1,738"),
        (["a", "...", "b 1 ..."], "a\nx\ny\nb 2.5 more", None),
        (["a", "b"], "b\na", "b"),
    ],
)
def test_outputs_are_compared_by_words_and_order(expected: list[str], output: str, missing: str | None) -> None:
    assert tutorial.missing_line(expected, output) == missing


@pytest.mark.slow
def test_the_site_is_whole_and_loads_nothing_from_other_hosts(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert {"index.html", "settings.html", "commands.html", "api.html", "questions.html"} <= {page.name for page in pages}
    for page in pages:
        loads = Loads()
        loads.feed(page.read_text(encoding="utf-8"))
        assert loads.found, f"{page.name}: not even a style sheet"
        foreign = [address for address in loads.found if re.match(r"(https?:)?//", address)]
        assert not foreign, f"{page.name}: loads {foreign}"
    for style in (tmp_path / "site").rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import )['\"]?(?:https?:)?//[^)]*", style.read_text(encoding="utf-8")), style.name
    settings = (tmp_path / "site" / "settings.html").read_text(encoding="utf-8")
    assert 'id="train_model.optim.lr"' in settings
    assert "Pydantic" not in settings


@pytest.mark.slow
def test_the_tutorial_in_short() -> None:
    """All commands as printed, but for the folder and the number of updates (tests/soak/tutorial.py changes neither)."""
    page = tutorial.PAGE.read_text(encoding="utf-8")
    for printed, short in (
        ("max_steps=300", "max_steps=20 optim.schedule.warmup_steps=4"),
        ("runs/tutorial", "runs/tutorial_test"),
    ):
        assert printed in page
        page = page.replace(printed, short)
    subprocess.run(["rm", "-rf", "runs/tutorial_test"], cwd=PROJECT, check=True)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    assert tutorial.run_page(page, environment) == []
    subprocess.run(["rm", "-rf", "runs/tutorial_test"], cwd=PROJECT, check=True)
