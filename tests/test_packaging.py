"""Every dependency is pinned, and the files about the project agree with it."""

import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from megagpt import __version__

OWN_TO_A_BUILD = re.compile(r"^(triton|cuda-.*|nvidia-(?!ml-py).*)$")
"""What torch's CUDA builds bring: torch names their versions."""


def pins(project: Path) -> dict[str, Version]:
    """constraints.txt: the version of each package."""
    lines = (project / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    found = {str(canonicalize_name(name)): Version(version) for name, version in pairs}
    assert len(found) == len(pairs), "constraints.txt: a package comes twice"
    return found


def declared(project: Path) -> dict[str, list[Requirement]]:
    """The requirements in pyproject.toml: of the package ("") and of each extra."""
    table = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = {"": table["dependencies"], **table["optional-dependencies"]}
    return {group: [Requirement(text) for text in texts] for group, texts in groups.items()}


def test_every_dependency_of_pyproject_is_pinned_to_a_version_that_it_allows(project: Path) -> None:
    pinned = pins(project)
    for group, requirements in declared(project).items():
        for requirement in requirements:
            name = canonicalize_name(requirement.name)
            if name != "megagpt":
                assert name in pinned, f"{group}: {name} has no line in constraints.txt: run `make constraints`"
                assert pinned[name] in requirement.specifier, f"{group}: {requirement} rules out {name}=={pinned[name]}"


def test_dev_has_every_extra(project: Path) -> None:
    groups = declared(project)
    (ours,) = [requirement for requirement in groups["dev"] if requirement.name == "megagpt"]
    # megagpt[tokenizers] comes with those that name it.
    assert {*groups} - {"", "dev", "tokenizers"} == ours.extras


def installed_needs(requirement: Requirement, seen: set[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """(package, version) of a requirement and of all that it needs in turn, as installed in this environment."""
    name = canonicalize_name(requirement.name)
    if OWN_TO_A_BUILD.match(name):
        return
    found = distribution(name)
    for extra in ("", *sorted(requirement.extras)):
        if (name, extra) not in seen:
            seen.add((name, extra))
            yield name, found.version
            environment = {**default_environment(), "extra": extra}
            for text in found.requires or []:
                needed = Requirement(text)
                if needed.marker is None or needed.marker.evaluate(environment):
                    yield from installed_needs(needed, seen)


def test_what_the_dependencies_need_is_pinned_and_installed_at_that_version(project: Path) -> None:
    pinned, seen = pins(project), set()
    for requirements in declared(project).values():
        for requirement in requirements:
            if requirement.name == "megagpt":
                continue
            try:
                needs = list(installed_needs(requirement, seen))
            except PackageNotFoundError as error:
                pytest.fail(f"{requirement}: needs {error.name}, which is not installed: run `make install`")
            for name, version in needs:
                assert name in pinned, f"{requirement} needs {name}, which constraints.txt does not pin: run `make constraints`"
                assert Version(version).public == pinned[name].public, f"{name}: {version} is installed"
    unused = pinned.keys() - {name for name, _ in seen}
    assert not unused, f"constraints.txt pins what nothing needs: {sorted(unused)}"


def test_the_citation_names_this_version(project: Path) -> None:
    citation = yaml.safe_load((project / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    assert citation["license"] == tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]["license"]


def test_the_workflow_runs_what_ci_runs(project: Path) -> None:
    workflow = yaml.safe_load((project / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert all("@" in step["uses"] for step in job["steps"] if "uses" in step)
