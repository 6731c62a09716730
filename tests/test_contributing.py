"""Every example of CONTRIBUTING.md, run as it stands."""

import json
import re
import subprocess
import sys

import pytest

pytest_plugins = ["study_sandbox"]

BLOCK = re.compile(r"^```python *(\w*)\n(.*?)^```$", flags=re.M | re.S)


def blocks(project, kind: str) -> list[str]:
    return [code for tag, code in BLOCK.findall((project / "CONTRIBUTING.md").read_text()) if tag == kind]


@pytest.mark.parametrize("which", [0, 1, 2], ids=["attack", "defence", "data set"])
def test_an_example_runs_as_it_stands(project, tmp_path, which):
    programs = blocks(project, "")
    assert len(programs) == 3
    command = [sys.executable, "-c", programs[which]]
    ran = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_the_experiment_runs_and_says_what_it_found(project, sandbox):
    (parameters,), cells = blocks(project, "parameters"), blocks(project, "cell")
    sandbox.write("demo/steps", *cells, parameters=parameters)
    sandbox("run demo/steps -p n_test=20")
    (record,) = sandbox.runs.rglob("record.json")
    said = json.loads(record.read_text())
    assert [row["n"] for row in said["rows"]] == [20, 20]
    assert len(said["verdict"]) == 1 and said["provenance"]["parameters"]["n_test"] == 20


def test_every_command_of_the_page_exists(project):
    text = (project / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"`(?:make) ([a-z-]+)`|^make ([a-z-]+)", text, flags=re.M))
    targets = set(re.findall(r"^([a-z-]+):", (project / "Makefile").read_text(), flags=re.M))
    assert {a or b for a, b in named} <= targets
    files = set(re.findall(r"`((?:nbs|tests|data)/[\w/.-]+\.(?:ipynb|py))`", text))
    assert files and all((project / file).exists() for file in files)
