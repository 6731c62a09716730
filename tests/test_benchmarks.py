"""The benchmarks that no other test runs: their notebooks, at the size of their defaults or less."""

import importlib.util
import json

import papermill
import pytest


def rows_of(project, tmp_path, monkeypatch, name: str, **parameters) -> dict:
    "The record's rows of a benchmark, executed: (method, attack, metric) -> measured."
    monkeypatch.setenv("AFGSTUDY_RUN_DIR", str(tmp_path))
    job = {"experiment": f"benchmarks/{name}", "preset": "smoke", "parameters": {}, "started": "2026-01-01T00:00:00"}
    (tmp_path / "job.json").write_text(json.dumps(job | {"key": "0" * 64, "needs": {}, "title": name}))
    source = project / "nbs" / "benchmarks" / f"{name}.ipynb"
    papermill.execute_notebook(source, tmp_path / "out.ipynb", parameters, progress_bar=False, cwd=str(project))
    rows = json.loads((tmp_path / "record.json").read_text())["rows"]
    return {(r["method"], r["attack"], r["metric"]): r["measured"] for r in rows}


def test_throughput_measures_the_machine_and_the_work_beside_it(project, tmp_path, monkeypatch):
    small = {"batch": 8, "steps": 2, "pictures": 2, "matrices": 2, "product": 256, "copied": 8, "repeats": 1}
    rows = rows_of(project, tmp_path, monkeypatch, "throughput", **small)
    assert rows["machine", "product", "rate"] > 0 and rows["machine", "copy", "rate"] > 0
    for work, unit in (("PGD-2", "image-steps"), ("training", "images"), ("drawing", "image-steps")):
        assert rows[work, unit, "a second"] > 0 and rows[work, unit, "share of the roofline"] > 0
    assert rows["NMF", "matrices", "times scikit-learn's loop"] > 0 and rows["all of it", "memory", "peak"] > 0.1


def test_attackbench_judges_every_library(project, tmp_path, monkeypatch):
    for package in ("attackbench", "adv_lib"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install 'afgstudy[peers]'")
    small = {"images": 2, "art_images": 1, "budget": 40, "norms": ["linf"]}
    rows = rows_of(project, tmp_path, monkeypatch, "attackbench", **small)
    assert {method for method, _, metric in rows if metric == "optimality"} == {"afgstudy", "foolbox", "adv-lib", "ART"}
    assert all(0 <= value <= 100 + 1e-6 for (*_, metric), value in rows.items() if metric == "optimality")
    assert all(value <= 40 for (*_, metric), value in rows.items() if metric == "passes")
