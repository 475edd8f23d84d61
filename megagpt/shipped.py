"""Tools and configurations that ship with the package: in folders beside it in a checkout, inside it in an installed wheel."""

import difflib
import re
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
IN_CHECKOUT = not (PACKAGE / "tools").is_dir()
"""Whether this is the source tree (editable installs too), where tools/ and configs/ lie beside megagpt/."""
ROOT = PACKAGE.parent if IN_CHECKOUT else PACKAGE


def tool_names() -> list[str]:
    """The tools, by name."""
    return sorted(path.stem for path in (ROOT / "tools").glob("*.py"))


def tool_file(name: str) -> Path:
    """The file of a tool, which `python FILE` runs."""
    return ROOT / "tools" / f"{name}.py"


def config_files() -> dict[str, Path]:
    """The configurations by name: gpt_124m is configs/train/gpt_124m.yaml."""
    return {path.stem: path for path in sorted((ROOT / "configs").glob("*/*.yaml"))}


def find_config(word: str) -> Path | None:
    """The configuration file that a word of the command line means, None if there is none.

    A local file wins: the word itself, then the word with `.yaml`. Then come the files that ship with the package, by their
    name (`gpt_124m`, `gpt_124m.yaml`) or by their path in a checkout (`configs/train/gpt_124m.yaml`).
    """
    local = [Path(word), Path(f"{word}.yaml")]
    for path in local:
        try:
            if path.is_file():
                return path
        except (OSError, ValueError):  # too long for a name of a file, or with NUL in it
            return None
    path = config_files().get(local[0].stem if local[0].suffix == ".yaml" else local[0].name)
    relative = path.relative_to(ROOT) if path else Path()
    written = local[0] if local[0].suffix == ".yaml" else local[1]
    fits = written in (relative, Path(*relative.parts[1:]), Path(relative.name))
    return path if fits else None


def near_configs(word: str) -> list[str]:
    """The names of shipped configurations that are most like a word, best first."""
    return difflib.get_close_matches(Path(word).name.removesuffix(".yaml"), config_files(), n=3, cutoff=0.5)


def as_installed(text: str, in_checkout: bool = IN_CHECKOUT) -> str:
    """A text in which commands are written as in a checkout, with those that an installed wheel has in their place.

    `python tools/NAME.py` becomes `megagpt NAME`, `torchrun ... tools/NAME.py` becomes `torchrun ... -m megagpt.tools.NAME`,
    `configs/train/gpt_124m.yaml` becomes `gpt_124m`, `make quickstart` becomes `megagpt quickstart`. In a checkout the text
    stays as it is.
    """
    if in_checkout:
        return text
    tool = rf"tools/({'|'.join(tool_names())})\.py\b"

    def command(found: re.Match[str]) -> str:
        begin = max(found.string.rfind(end, 0, found.start()) for end in "\n`") + 1
        with_ranks = "torchrun " in found.string[begin : found.start()]
        return f"-m megagpt.tools.{found[1]}" if with_ranks else f"megagpt {found[1]}"

    text = re.sub(
        rf"(?:(?:\.venv/bin/)?\bpython )?(?<![\w/.-]){tool}", command, text.replace(".venv/bin/torchrun ", "torchrun ")
    )
    text = text.replace("make quickstart", "megagpt quickstart")
    configs = "|".join(config_files())
    return re.sub(rf"(?<![\w/.-])configs/\w+/({configs})\.yaml\b", r"\1", text)
