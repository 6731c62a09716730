"""The study's machinery on throwaway experiments: parameters, keys, resume, records, report, command."""

import ast
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
import torch
from click.testing import CliRunner

import afgstudy
from afgstudy.keys import key_of, sealed
from afgstudy.store import Store
from afgstudy.study import execute, parameters, planning, records
from afgstudy.study.cli import main
from afgstudy.study.experiment import COLUMNS, Experiment, published, scrub

pytest_plugins = ["study_sandbox"]
CHECKOUT = Path(__file__).parents[1]

# --- parameters ---


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (3, "int", 3),
        (3, "float", 3.0),
        (None, "Optional[int]", None),
        (2, "Optional[float]", 2.0),
        ([1, 2.5], "list[float]", [1.0, 2.5]),
        (["a"], "List[str]", ["a"]),
        ({"a": 1}, "dict[str, int]", {"a": 1}),
        ([], "list", []),
        (1, "int | None", 1),
        ("x", "Union[int, str]", "x"),
        ("l2", "Literal['linf', 'l2']", "l2"),
    ],
)
def test_a_value_that_fits_its_type(value, kind, expected):
    fitted = parameters.fit(value, ast.parse(kind, mode="eval").body)
    assert fitted == expected and type(fitted) is type(expected)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (True, "int"),
        (1, "bool"),
        (1.0, "int"),
        ("1", "int"),
        (True, "float"),
        (None, "int"),
        (1, "str"),
        ([1, "a"], "list[int]"),
        ("abc", "list[str]"),
        ("l1", "Literal['linf', 'l2']"),
    ],
)
def test_a_value_that_does_not_fit_its_type(value, kind):
    with pytest.raises(TypeError):
        parameters.fit(value, ast.parse(kind, mode="eval").body)


def test_parameters_are_read_with_type_default_and_help(sandbox):
    path = sandbox.write(
        "toy",
        sandbox.LIGHT,
        parameters="""
        # a comment of its own
        steps: int = 10  # attack iterations
        eps: float = 8/255  # radius
        n: "Optional[int]" = None  # images; None: all
        names: list[str] = ["a", "b"]
        """,
    )
    found = parameters.parameters_in(path)
    assert found["steps"] == parameters.Parameter("steps", "int", 10, "attack iterations")
    assert (
        found["eps"].default == 8 / 255
        and found["n"].default is None
        and found["names"].default == ["a", "b"]
    )


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("steps = compute()", "plain value"),
        ("import os", "plain value"),
        ("n: int | None = None", "papermill does not see the parameter 'n'"),
        ("n: int = 0  # images, 0 = all", "papermill does not see the parameter 'n'"),
    ],
)
def test_a_parameters_cell_that_papermill_would_misread_is_refused(sandbox, cell, message):
    sandbox.write("toy", sandbox.LIGHT, parameters=cell)
    assert message in sandbox("run toy", status=1)
    assert sandbox.executed() == 0


def test_every_mistake_is_refused_before_anything_runs(sandbox):
    for name in ("a/good", "b/bad"):
        sandbox.write(name, sandbox.LIGHT, parameters="steps: int = 3  # iterations\nseed: int = 0  # s")
    sandbox.preset("cpu", "a/good", "steps: 5\n")
    sandbox.preset("cpu", "b/bad", "stesp: 5\nseed: one\n")
    said = sandbox("run --all --preset cpu", status=1)
    assert "b/bad, preset cpu: no parameter 'stesp', did you mean 'steps'?" in said
    assert "b/bad, preset cpu: seed must be int, got 'one' (str)" in said
    assert "did you mean 'steps'" in sandbox("run a/good -p step=5", status=1)
    assert "steps must be int, got 2.5 (float)" in sandbox("run a/good -p steps=2.5", status=1)
    assert "did you mean 'a/good'" in sandbox("run a/god", status=1)
    assert "did you mean 'cpu'" in sandbox("run a/good --preset cup", status=1)
    assert "not NAME=VALUE" in sandbox("run a/good -p steps", status=2)
    assert sandbox.executed() == 0 and not sandbox.runs.exists()


def test_text_that_yaml_does_not_read_as_a_number(sandbox):
    sandbox.write("toy", sandbox.LIGHT, parameters="eps: float = 0.3  # radius\nseed: int = 0  # s")
    assert parameters.full_parameters("toy", given={"eps": "8/255"})["eps"] == 8 / 255
    assert parameters.full_parameters("toy", given={"eps": "1e-3"})["eps"] == 1e-3
    sandbox.preset("cpu", "toy", "eps: 1e-3\n")
    assert "YAML reads 1e-3 as text, write 0.00100000" in sandbox("run toy --preset cpu", status=1)


def test_every_experiment_of_the_checkout_and_its_presets_are_sound(monkeypatch):
    folder = CHECKOUT / "nbs" / "experiments"
    found = parameters.experiments(folder)
    assert found
    for name, path in found.items():
        cells = nbformat.read(path, 4).cells
        assert sum("parameters" in c.metadata.get("tags", []) for c in cells) == 1, f"{name} lost its tag"
        assert all(not c.get("outputs") for c in cells), f"{name} is committed with outputs"
        assert all(p.help for p in parameters.parameters_in(path).values()), (
            f"{name} has a parameter without a comment"
        )
        for preset in parameters.presets_of(name, folder):
            parameters.full_parameters(name, preset, folder=folder)


# --- keys ---


def test_a_key_follows_what_is_imported_and_nothing_else(sandbox, tmp_path, monkeypatch):
    package = tmp_path / "copy" / "afgstudy"
    shutil.copytree(Path(afgstudy.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(afgstudy, "__file__", str(package / "__init__.py"))
    name, inside = "from afgstudy.attacks import PGD", "def late():\n    from afgstudy.device import seed_for"
    path = sandbox.write("toy", name, inside, "PGD")

    def key() -> str:
        return key_of(planning.ingredients(path, {"seed": 0}))

    def edit(module: str, text: str) -> None:
        file = package / f"{module}.py"
        file.write_text(file.read_text() + text)

    first = key()
    assert first == key()
    edit("stats", "\nunrelated = 1\n")
    edit("attacks/deepfool" if (package / "attacks/deepfool.py").exists() else "plots", "\nunrelated = 1\n")
    edit("attacks/gradient", "\n# a comment\n")
    assert key() == first
    edit("attacks/base", "\nchanged = 1\n")  # imported by what is imported
    second = key()
    assert second != first
    edit("device", "\nchanged = 1\n")  # imported inside a function
    assert key() not in (first, second)


def test_a_key_follows_code_parameters_data_and_weights_but_not_prose(sandbox, tmp_path, monkeypatch):
    parameters = 'dataset: str = "digits"  # a set\nweights: str = "w"  # a file\nseed: int = 0  # s'
    path = sandbox.write("toy", sandbox.LIGHT, parameters=parameters)
    monkeypatch.setenv("AFGSTUDY_WEIGHTS", str(tmp_path))
    (tmp_path / "w.safetensors").write_bytes(b"one")
    content = {"digits": "v1"}

    def key(**given) -> str:
        return planning.plan(["toy"], given=given, fingerprint=content.__getitem__)[0].key

    keys = [key(), key(seed=1)]
    content["digits"] = "v2"
    keys.append(key())
    (tmp_path / "w.safetensors").write_bytes(b"two")
    keys.append(key())
    nb = nbformat.read(path, 4)
    nb.cells[0].source = "# Another title"
    nb.cells[2].source += "\n\n# a comment\n"
    nb.cells[1].source = nb.cells[1].source.replace("# s", "# the seed")
    nbformat.write(nb, path)
    assert key() == keys[-1]
    nb.cells[2].source += "\nprint(seed)"
    nbformat.write(nb, path)
    keys.append(key())
    monkeypatch.setenv("AFGSTUDY_DEVICE", "cuda")
    keys.append(key())
    assert len(set(keys)) == len(keys)


# --- runs ---


def test_a_finished_run_is_found_and_force_repeats_it(sandbox):
    path = sandbox.write("toy", sandbox.LIGHT)
    assert "done" in sandbox("run toy -p seed=7")
    [folder] = [p for p in (sandbox.runs / "smoke" / "toy").iterdir() if p.is_dir()]
    assert {p.name for p in folder.iterdir()} == {
        "job.json",
        "log.txt",
        "notebook.ipynb",
        "record.json",
        "run.json",
    }
    assert (folder.parent / "latest").read_text().strip() == folder.name
    assert json.loads((folder / "record.json").read_text()) == {"seed": 7}
    assert "finished earlier" in sandbox("run toy -p seed=7") and sandbox.executed() == 1
    sandbox("run toy -p seed=7 --force")
    assert sandbox.executed() == 2
    told = sandbox("run toy -p seed=7 --dry-run")
    assert "nothing to run" in told and "done" in told
    nb = nbformat.read(path, 4)
    nb.cells[-1].source += "\n1 + 1"
    nbformat.write(nb, path)
    state = planning.state_of(planning.plan(["toy"], given={"seed": 7})[0])
    assert (state.name, state.why) == ("stale", "the notebook's code changed")


def test_a_dry_run_runs_nothing(sandbox):
    sandbox.write("toy", sandbox.LIGHT)
    said = sandbox("run --all --dry-run")
    assert "would run" in said and "unknown length" in said
    assert sandbox.executed() == 0 and not sandbox.runs.exists()
    job = planning.plan(["toy"])[0]
    other = job.folder.with_name("0" * 12)
    other.mkdir(parents=True)
    (other / "record.json").write_text("{}")
    (other / "notebook.ipynb").touch()
    (other / "run.json").write_text(
        json.dumps({"finished": "2026-01-01", "seconds": 600.0, "parameters": {}})
    )
    assert "1 to run: about 10 min" in sandbox("run --all --dry-run") and sandbox.executed() == 0


def test_two_at_a_time_give_the_same_records(sandbox):
    drawn = """
    import random
    rows = [random.Random(f"{seed} {k}").random() for k in range(1000)]
    record = Path(os.environ["AFGSTUDY_RUN_DIR"], "record.json")
    record.write_text(json.dumps([os.environ["OMP_NUM_THREADS"], rows]))
    """
    for name in ("a/one", "b/two"):
        sandbox.write(name, sandbox.LIGHT, drawn, parameters=f"seed: int = {ord(name[0])}  # of everything")
    records = {}
    for jobs in (1, 2):
        outcomes = execute.execute_all(planning.plan(force=True), workers=jobs)
        assert [o.state for o in outcomes] == ["done", "done"]
        records[jobs] = [(o.job.folder / "record.json").read_bytes() for o in outcomes]
    assert records[1] == records[2] and records[1][0] != records[1][1]
    assert sandbox.executed() == 4


def test_papermill_by_hand_writes_to_the_by_hand_folder(sandbox):
    imports = "import random\nfrom afgstudy.study.experiment import Experiment, parameters_of"
    sandbox.write(
        "toy/hand",
        imports,
        sandbox.REAL.format(name="toy/hand"),
        parameters="steps: int = 1  # x\nseed: int = 0  # s",
    )
    sandbox.preset("cpu", "toy/hand", "steps: 4\n")
    out = sandbox.root / "out.ipynb"
    command = ["nbs/experiments/toy/hand.ipynb", str(out), "-f", "nbs/experiments/presets/cpu/toy/hand.yaml"]
    environment = {k: v for k, v in os.environ.items() if k != "JUPYTER_PATH"}
    command = [sys.executable, "-m", "papermill", *command, "-p", "seed", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads((sandbox.runs / "by-hand" / "toy" / "hand" / "record.json").read_text())
    assert record["preset"] == "by-hand" and record["provenance"]["parameters"] == {"steps": 4, "seed": 1}
    assert record["provenance"]["key"] is None and len(record["rows"]) == 2
    assert not (sandbox.runs / "smoke").exists()


# --- records ---


class Set:
    "What a record wants of a dataset."

    name, split, checksum = "mnist", "test", "4e" * 32

    def __len__(self) -> int:
        return 10_000


def example(sandbox, preset: str = "cpu") -> Path:
    "A finished run of `toy/table1`, made without a kernel."
    folder = sandbox.runs / preset / "toy" / "table1" / "abababababab"
    folder.mkdir(parents=True)
    parameters = {"steps": 40, "seed": 3, "weights": str(Path.home() / "w.safetensors")}
    job = {"experiment": "toy/table1", "preset": preset, "title": "A <table>", "key": "ab" * 32}
    (folder / "job.json").write_text(json.dumps(job | {"parameters": parameters}))
    (folder.parent / "latest").write_text("abababababab\n")
    os.environ["AFGSTUDY_RUN_DIR"] = str(folder)
    try:
        exp = Experiment("toy/table1", {"steps": 1})
    finally:
        del os.environ["AFGSTUDY_RUN_DIR"]
    exp.row("mnist", "RAW", "clean", published=99.18, measured=98.9, low=98.7, high=99.1, n=10_000)
    exp.row("mnist", "RAW", "PGD-40", published=0.64, measured=float("nan"))
    exp.row("mnist", "ALP & more", "PGD-40", measured=85.8, low=85.1, high=86.5, n=10_000, seed=4)
    exp.used(Set(), Set())
    exp.note("One <note>.")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(2, 1))
    ax.plot([1, 2])
    exp.figure(fig, "line", "A line")
    plt.close(fig)
    exp.save()
    output = nbformat.v4.new_output("stream", text=f"{sandbox.root}/x {Path.home()}/y {sys.prefix}/z")
    cell = nbformat.v4.new_code_cell(
        "print()", outputs=[output], metadata={"papermill": {"x": str(sandbox.root)}}
    )
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), folder / "notebook.ipynb")
    return folder


def test_a_record_holds_every_field(sandbox):
    record = json.loads((example(sandbox) / "record.json").read_text())
    assert all(list(row) == COLUMNS for row in record["rows"])
    assert [r["seed"] for r in record["rows"]] == [3, 3, 4] and record["rows"][1]["measured"] is None
    fields = {"experiment", "title", "preset", "rows", "figures", "notes", "verdict", "provenance", "checksum"}
    assert fields == set(record) and sealed(record) == record
    p = record["provenance"]
    assert p["parameters"] == {"steps": 40, "seed": 3, "weights": "~/w.safetensors"} and p["seeds"] == [3, 4]
    assert p["revision"] is None  # the temporary project is not under version control
    assert p["versions"]["torch"] and p["versions"]["python"] and p["device"]["kind"] == "cpu"
    assert p["device"]["threads"] >= 1 and p["seconds"] >= 0 and re.match(r"\d{4}-\d\d-\d\dT", p["started"])
    assert p["datasets"] == [{"name": "mnist", "split": "test", "n": 10_000, "checksum": "4e" * 32}]
    assert p["key"] == "ab" * 32 and p["artifacts"] == [] and record["notes"] == ["One <note>."]


def test_a_record_holds_what_autoattack_said(sandbox, capsys):
    from afgstudy.attacks.external import Evaluation

    exp = Experiment("toy/table1", {"seed": 0})
    stages = {"clean": 0.9, "apgd-ce": 0.5, "square": 0.25}
    found = Evaluation(torch.zeros(4, 1, 2, 2), torch.zeros(4).bool(), stages, ("Square is stronger",))
    for method, said in (("RAW", replace(found, flags=())), ("ALP", found)):
        exp.components("mnist", method, "AutoAttack", said.accuracy, said.flags)
    raw, alp = records.check_record(exp.record())["attacks"]
    assert raw["components"] == [{"name": k, "accuracy": 100 * v} for k, v in stages.items()]
    assert (raw["flags"], alp["flags"], alp["seed"]) == ([], ["Square is stronger"], 0)
    assert len(exp.notes) == 1 and "ALP" in exp.notes[0] and "may be too high" in capsys.readouterr().out
    shown = exp.stages()
    assert list(shown) == ["clean", "apgd-ce", "square", "flags"] and shown.iloc[1, 2] == "25.0"


def test_a_record_names_processor_instructions_and_threads(sandbox, monkeypatch):
    from afgstudy.study.report import device_text

    record = Experiment("toy/table1", {"seed": 0}).record()
    device = records.check_record(record)["provenance"]["device"]
    assert device["processor"] and device["instructions"] == torch.backends.cpu.get_cpu_capability()
    assert device["threads"] == torch.get_num_threads() and device["instructions"] in device_text(device)
    gpu = device | {"kind": "cuda", "name": "H100", "cuda": "12.8", "cudnn": 91002, "tf32": "in training only"}
    assert device_text(gpu).endswith("threads, CUDA 12.8, cuDNN 91002, TF32 in training only")
    old = {"kind": "cpu", "name": "x86_64", "threads": 2}
    record["provenance"]["device"] = old
    assert records.check_record(sealed(record)) and device_text(old) == "cpu (x86_64), 2 threads"


def test_a_row_replaces_its_earlier_self_and_takes_an_estimate(sandbox):
    from afgstudy.stats import proportion

    exp = Experiment("toy/table1", {"seed": 0})
    for _ in range(2):
        exp.row("mnist", "RAW", "clean", measured=proportion([True] * 3 + [False]))
    [row] = exp.rows
    assert row["measured"] == 75 and row["n"] == 4 and 0 < row["low"] < 75 < row["high"] < 100


def test_a_run_under_another_name_is_refused(sandbox, monkeypatch, tmp_path):
    (tmp_path / "job.json").write_text(json.dumps({"experiment": "a/b"}))
    monkeypatch.setenv("AFGSTUDY_RUN_DIR", str(tmp_path))
    with pytest.raises(ValueError, match="run as 'a/b' calls itself 'a/c'"):
        Experiment("a/c")


def test_the_dash(sandbox):
    exp = Experiment("toy/table1", {})
    exp.row("mnist", "RAW", "clean", published=None, measured=math.nan)
    frame = exp.table().data
    assert frame.iloc[0].tolist() == ["–", "–", "–", "–"]


def test_published_numbers_say_what_is_missing(sandbox):
    with pytest.raises(FileNotFoundError, match="run inside a checkout"):
        published("aalp")
    folder = sandbox.root / "data" / "published"
    folder.mkdir(parents=True)
    (folder / "aalp.csv").write_text("table,value\n2,3\n")
    with pytest.raises(ValueError, match="lacks the columns dataset, method"):
        published("aalp")
    row = dict(
        table=2, dataset="d", method="m", attack="a", metric="accuracy", value=1.5, unit="%", source="row 1"
    )
    (folder / "cafd.json").write_text(json.dumps([row]))
    assert published("cafd", 2).value.tolist() == [1.5]


@pytest.mark.parametrize("text", ["{0}/a/b.py:3", "in '{0}'", "{0}", 'File "{0}/x y"'])
def test_scrub_takes_out_this_machine(sandbox, text):
    import platform
    import tempfile

    for folder in (
        sandbox.root,
        Path.home(),
        Path(sys.prefix),
        Path(tempfile.gettempdir()),
        Path("/usr/lib/x"),
    ):
        assert str(folder) not in scrub(text.format(folder)), scrub(text.format(folder))
    assert len(platform.node()) <= 3 or platform.node() not in scrub(f"on {platform.node()}: ready")
    assert scrub("https://example.org/usr/lib 1/2 a/b") == "https://example.org/usr/lib 1/2 a/b"


# --- report, publish, command ---

FEW = "seed: int = 0  # of everything random\nn: int = 5  # how many"
EXPERIMENT_HEAD = "import random\nfrom afgstudy.study.experiment import Experiment, parameters_of"


def test_report_and_publish(sandbox):
    folder = example(sandbox)
    example(sandbox, "smoke")
    paths = sandbox("report").split()
    assert [Path(p).name for p in paths] == ["report.md", "index.html"]  # the page last
    page, text = Path(paths[-1]).read_text(), Path(paths[0]).read_text()
    assert (
        page.count("<section") == 2
        and page.count("data:image/svg+xml") == 2
        and page.count("A smoke run") == 1
    )
    assert (
        "A &lt;table&gt;" in page
        and "ALP &amp; more" in page
        and not re.search(r"\bnan\b", re.sub(r'base64,[^"]*', "", page), re.I)
    )
    outside = re.findall(r'src="(?!data:)[^"]*"|href="(?!#|\.\./cpu/|\.\./smoke/)[^"]*"|@import|url\(', page)
    assert outside == [], "the page must need nothing from outside; it links the executed notebooks"
    assert "| RAW | PGD-40, seed 3 | 0.64 | – | – | – |" in text
    for figure in re.findall(r"\]\((figures/[^)]+)\)", text):
        assert (Path(paths[0]).parent / figure).is_file()
    said = sandbox("publish toy/table1")
    target = sandbox.root / "data" / "results" / "cpu" / "toy" / "table1"
    assert said.splitlines()[-1] == str(target) and "there is no notebook of this name here" in said
    files = {p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file()}
    assert files == {"record.json", "notebook.ipynb", "figures/line.svg"}
    content_of = {file: (target / file).read_text() for file in files}
    for file, content in content_of.items():
        for trace in (sandbox.root, Path.home(), Path(sys.prefix)):
            assert f"{trace}/" not in content, file
    written = sandbox.root / "nbs" / "experiments" / "toy" / "table1.ipynb"
    written.parent.mkdir(parents=True)
    cells = nbformat.read(target / "notebook.ipynb", as_version=4)
    cells.cells.append(nbformat.v4.new_markdown_cell("The line rises.", id="said"))
    nbformat.write(cells, written)
    assert sandbox("publish --prose").split() == [str(target / "notebook.ipynb")]
    assert sandbox("publish --prose") == "" and "which experiment" in sandbox("publish", status=2)
    renewed = nbformat.read(target / "notebook.ipynb", as_version=4)
    assert renewed.cells[-1].source == "The line rises."
    assert [c.get("outputs") for c in renewed.cells if c.cell_type == "code"] == [
        c.outputs
        for c in nbformat.reads(content_of["notebook.ipynb"], as_version=4).cells
        if c.cell_type == "code"
    ]
    shutil.rmtree(sandbox.runs)
    page = Path(sandbox("report --committed --format html").strip()).read_text()
    assert page.count("<section") == 1 and page.count("data:image/svg+xml") == 1
    sandbox.preset("cpu", "toy/table1", "{}\n")
    assert "no finished run of 'toy/table1'" in sandbox("publish toy/table1", status=1)
    assert "no records" in sandbox("report", status=1) and not folder.exists()


def test_only_the_run_of_a_preset_is_published_under_it(sandbox):
    sandbox.write("toy/few", EXPERIMENT_HEAD, sandbox.REAL.format(name="toy/few"), parameters=FEW)
    sandbox.preset("cpu", "toy/few", "n: 100\n")
    sandbox("run toy/few --preset cpu -p n=10")
    said = sandbox("publish toy/few", status=1)
    assert "'toy/few' is not preset 'cpu': n is 10 where the preset says 100" in said and "seed" not in said
    assert not (sandbox.root / "data" / "results").exists()
    sandbox("run toy/few --preset cpu")
    target = Path(sandbox("publish toy/few").splitlines()[-1])
    assert json.loads((target / "record.json").read_text())["provenance"]["parameters"] == {"seed": 0, "n": 100}
    sandbox.preset("cpu", "toy/few", "n: 200\n")
    assert "n is 100 where the preset says 200" in sandbox("publish toy/few", status=1)
    assert (target / "record.json").is_file()


def test_a_committed_record_says_what_has_changed_since(sandbox):
    cells = EXPERIMENT_HEAD, sandbox.REAL.format(name="toy/few")
    sandbox.write("toy/few", *cells, parameters=FEW)
    sandbox.preset("cpu", "toy/few", "n: 100\n")
    sandbox("run toy/few --preset cpu")
    target = Path(sandbox("publish toy/few").splitlines()[-1])
    assert sandbox("status --committed").splitlines()[1].split()[2:4] == ["as", "it"]
    sandbox.write("toy/few", *cells, "later = 1", parameters=FEW)
    assert "the notebook's code" in sandbox("status --committed toy/few")
    sandbox.write("toy/few", *cells, parameters="m: int = 3  # images; at least 1")
    assert "m" in sandbox("status --committed").splitlines()[1]
    record = json.loads((target / "record.json").read_text())
    record["provenance"]["needs"]["modules"]["afgstudy.keys"] = "another"
    (target / "record.json").write_text(json.dumps(sealed(record)))
    sandbox.write("toy/few", *cells, parameters=FEW)
    assert "modules afgstudy.keys" in sandbox("status --committed")
    del record["provenance"]["needs"]
    (target / "record.json").write_text(json.dumps(sealed(record)))
    assert "before records listed what they needed" in sandbox("status --committed")


def test_a_heavy_notebook_is_not_published(sandbox):
    folder = example(sandbox)
    heavy = nbformat.v4.new_output("stream", text="x" * 2_000_000)
    cell = nbformat.v4.new_code_cell("1", outputs=[heavy])
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), folder / "notebook.ipynb")
    target, remarks = records.publish("toy/table1")
    assert not (target / "notebook.ipynb").exists() and "2.0 MB and was left out" in remarks[0]


def test_list_and_status(sandbox):
    sandbox.write("toy", sandbox.LIGHT, parameters="steps: int = 3  # iterations")
    sandbox.preset("cpu", "toy", "steps: 30\n")
    sandbox.preset("paper", "toy", "step: 300\n")
    said = sandbox("list -v")
    assert "toy  About toy" in said and "smoke: never, cpu: never, paper: broken" in said
    assert "steps: int = 3  # iterations" in said
    lines = sandbox("status").splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [["toy", p, s] for p, s in
            (("smoke", "never"), ("cpu", "never"), ("paper", "broken"))]  # fmt: skip


def test_the_store_from_the_command_line(sandbox):
    import torch

    store = Store()
    for seed in range(3):
        store.get("model", {"seed": seed}, lambda scratch: {"x": torch.zeros(250)})
    assert store.root == sandbox.runs / "store" and len(store.ls()) == 3
    assert "3 artifacts" in sandbox("store ls") and "seed=2" in sandbox("store ls")
    key = store.ls()[0].key
    assert key[:12] in sandbox(f"store rm {key[:10]}")
    assert "no artifacts have a key" in sandbox(f"store rm {key[:10]}", status=1)
    sandbox("store rm --kind model")
    assert "0 artifacts" in sandbox("store ls")


def test_help_answers_for_every_command():
    for command in (
        "",
        "list",
        "run",
        "status",
        "report",
        "publish",
        "data",
        "data get",
        "store",
        "store rm",
    ):
        result = CliRunner().invoke(main, [*command.split(), "--help"])
        assert result.exit_code == 0 and "Usage:" in result.output
