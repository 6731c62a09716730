"""A project in a temporary folder, with experiments that tests write: what the tests of the study share."""

import json
import os
from pathlib import Path
from textwrap import dedent

import nbformat
import pytest
from click.testing import CliRunner

from afgstudy.study.cli import main

CHECKOUT = Path(__file__).parents[1]
# Writes a record without importing torch, and a line to a file that counts executions.
LIGHT = """
import json, os
from pathlib import Path
with open("executed", "a") as file:
    print(os.environ["AFGSTUDY_RUN_DIR"], file=file)
Path(os.environ["AFGSTUDY_RUN_DIR"], "record.json").write_text(json.dumps({"seed": seed}))
"""
# Writes two rows through an Experiment.
REAL = """
exp = Experiment("{name}", parameters_of(globals()))
for k in range(2):
    share = random.Random(f"{{seed}} {{k}}").random()
    exp.row("numbers", f"method {{k}}", "none", published=50, measured=100 * share, n=10)
exp.save()
"""


class Sandbox:
    "A project of its own in a temporary folder, and the command run inside it."

    LIGHT, REAL = LIGHT, REAL

    def __init__(self, root: Path):
        self.root, self.folder, self.runs = root, root / "nbs" / "experiments", root / "runs"
        (root / "settings.ini").write_text("[DEFAULT]\nlib_name = afgstudy\n")

    def write(
        self, name: str, *cells: str, parameters: str = "seed: int = 0  # of everything random"
    ) -> Path:
        cells = [nbformat.v4.new_code_cell(dedent(c).strip()) for c in (parameters, *cells)]
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"# About {name}"), *cells])
        nb.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "python3"}
        nb.cells[1].metadata["tags"] = ["parameters"]
        path = self.folder / f"{name}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, path)
        return path

    def preset(self, preset: str, name: str, text: str) -> None:
        path = self.folder / "presets" / preset / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def executed(self) -> int:
        file = self.root / "executed"
        return len(file.read_text().splitlines()) if file.exists() else 0

    def __call__(self, command: str, status: int = 0) -> str:
        result = CliRunner().invoke(main, command.split(), prog_name="afgstudy")
        trouble = result.exception if not isinstance(result.exception, SystemExit) else ""
        assert result.exit_code == status, (result.exit_code, result.output, trouble)
        assert "Traceback" not in result.output
        return result.output


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    "A project; the machine's `python3` kernel is a broken one, as on a machine that is not ours."
    kernel = tmp_path / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    spec = {
        "argv": ["/nonexistent/python", "-f", "{connection_file}"],
        "display_name": "x",
        "language": "python",
    }
    (kernel / "kernel.json").write_text(json.dumps(spec))
    stubs = tmp_path / "stubs"  # an optional grammar of jsonschema costs every process 1.3 s
    stubs.mkdir()
    (stubs / "rfc3987_syntax.py").write_text("raise ImportError")
    path = [str(stubs), str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    root = tmp_path / "project"
    root.mkdir()
    for name in (
        "AFGSTUDY_RUNS",
        "AFGSTUDY_EXPERIMENTS",
        "AFGSTUDY_RUN_DIR",
        "AFGSTUDY_DATA",
        "AFGSTUDY_WEIGHTS",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("AFGSTUDY_DEVICE", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(root)
    return Sandbox(root)
