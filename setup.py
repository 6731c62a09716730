"""Packaging; every fact is read from settings.ini."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

settings = ConfigParser(delimiters=["="])
settings.read("settings.ini", encoding="utf-8")
cfg = settings["DEFAULT"]

CARRIED = ("data/published/*.csv", "nbs/experiments/**/*.ipynb", "nbs/experiments/presets/**/*.yaml")
NAMES = ("study", "attacks", "plots", "hub", "ray", "dask", "peers", "dev")
EXTRAS = {name: cfg[f"{name}_requirements"].split() for name in NAMES}
EXTRAS["study"] += EXTRAS["attacks"] + EXTRAS["plots"]
EXTRAS["dev"] += EXTRAS["study"]


class BuildWithTheStudy(build_py):
    """The package and, for `afgstudy init`, a copy of the experiments, their presets and the papers' numbers."""

    def run(self):
        super().run()
        for pattern in () if self.editable_mode else CARRIED:
            for file in Path(".").glob(pattern):
                if not any(part.startswith(".") for part in file.parts):
                    self.copy_file(str(file), str(self.target_of(file)))

    def target_of(self, file: Path) -> Path:
        target = Path(self.build_lib) / "afgstudy" / "project" / file
        target.parent.mkdir(parents=True, exist_ok=True)
        return target


setup(
    cmdclass={"build_py": BuildWithTheStudy},
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
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "papermill.engine": cfg["papermill_engines"].split(),
    },
)
