"""Maps tools/ and configs/ into the package, as megagpt.tools and megagpt.configs; all else is in pyproject.toml."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[*find_namespace_packages(include=["megagpt", "megagpt.*"]), "megagpt.tools", "megagpt.configs"],
    package_dir={"megagpt.tools": "tools", "megagpt.configs": "configs"},
)
