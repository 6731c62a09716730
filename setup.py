"""Packaging; every fact is read from settings.ini."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

settings = ConfigParser(delimiters=["="])
settings.read("settings.ini", encoding="utf-8")
cfg = settings["DEFAULT"]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    keywords=cfg["keywords"],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["afgstudy", "afgstudy.*"]),
    package_data={"afgstudy": ["assets/*", "data/*.txt", "py.typed", "study/*.json", "study/templates/*"]},
    install_requires=cfg["requirements"].split(),
    extras_require={extra: cfg[f"{extra}_requirements"].split() for extra in ("dev", "hub", "ray", "dask")},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "afgstudy.engines": cfg["engines"].split(),
        "papermill.engine": cfg["papermill_engines"].split(),
    },
)
