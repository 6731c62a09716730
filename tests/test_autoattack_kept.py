"""What AutoAttack says on the way is kept with every number it gives, and shown where the number is shown."""

import json
import re
from pathlib import Path

import pytest

from afgstudy.study.report import attacks_of, html_page, markdown_page, verdict

RESULTS = Path(__file__).parents[1] / "data" / "results"
EXPERIMENTS = Path(__file__).parents[1] / "nbs" / "experiments"
# Recorded before components were kept; each leaves this list when it is run again. It may only become shorter.
BEFORE = {"cpu-cifar10/aalp/table2", "cpu/cafd/adaptive", "cpu/cafd/unseen"}


def committed() -> dict[str, dict]:
    "Preset and experiment -> its record."
    found = sorted(RESULTS.glob("*/*/*/record.json"))
    return {p.parent.relative_to(RESULTS).as_posix(): json.loads(p.read_text()) for p in found}


def measured_by_autoattack(record: dict) -> set[tuple]:
    "Data set and method of the accuracies that a record has from AutoAttack."
    rows = [r for r in record["rows"] if r["attack"].startswith("AutoAttack") and r["measured"] is not None]
    return {(r["dataset"], r["method"]) for r in rows}


def test_every_committed_number_of_autoattack_has_its_components():
    without = set()
    for name, record in committed().items():
        kept = {(a["dataset"], a["method"]) for a in record.get("attacks", [])}
        without |= {name} if measured_by_autoattack(record) - kept else set()
        for run in record.get("attacks", []):
            assert run["components"][0]["name"] == "clean" and len(run["components"]) > 1, name
            assert all(isinstance(flag, str) for flag in run["flags"]), name
    assert without <= BEFORE, f"no accuracy after each component: {without - BEFORE}"
    assert BEFORE & committed().keys() <= without, "run again: take it from the list"


def test_every_flag_of_a_committed_run_is_on_its_page():
    flagged = 0
    for name, record in committed().items():
        page = html_page([record | {"folder": RESULTS / name}])
        text = markdown_page([record | {"folder": RESULTS / name}], lambda record, file: file.name)
        for run in attacks_of(record):
            for flag in run["flags"]:
                words = re.findall(r"\w+", flag)[:6]
                pattern = r"\W+".join(words)
                assert re.search(pattern, page) and re.search(pattern, text), f"{name}: {flag}"
                flagged += 1
    assert flagged > 0, "nothing was looked at"


def test_a_verdict_that_rests_on_a_flagged_run_says_so():
    for name, record in committed().items():
        if any(run["flags"] for run in record.get("attacks", [])):
            assert "rests on flagged runs of AutoAttack" in str(verdict(record)), name


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*/*.ipynb")), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_an_experiment_with_autoattack_keeps_its_components(path):
    cells = json.loads(path.read_text())["cells"]
    code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    runs_it = re.search(r"\bautoattacked\(|\bAutoAttack\(|\bjudge(d_once)?\(|auto_steps|auto_attack", code)
    if runs_it and "exp.row" in code:
        assert re.search(r"exp\.components\(|\bleft after\b|[\"']components[\"']", code), "components are lost"
