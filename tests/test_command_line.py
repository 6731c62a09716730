"What a user meets at the command line: ranges, reasons, names that do not exist, completion."

import math

import pytest

from afgstudy.keys import StudyError
from afgstudy.study.parameters import experiments, full_parameters, parameters_in, presets_of


def has_numbers(value: object) -> bool:
    if isinstance(value, list):
        return any(map(has_numbers, value))
    return isinstance(value, int | float) and not isinstance(value, bool)


def beyond(parameter) -> list:
    "Values of the parameter's type that lie just outside its range."
    _, low, high, with_low, with_high = parameter.range
    example = parameter.default
    while isinstance(example, list):
        example = next(filter(has_numbers, example))
    step = 1 if isinstance(example, int) else 1e-6
    ends = [low - step if with_low else low] + ([high + step if with_high else high] if math.isfinite(high) else [])
    values = [type(example)(end) for end in ends]
    return [[v] for v in values] if isinstance(parameter.default, list) else values


EXPERIMENTS = sorted(experiments())


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_number_of_an_experiment_has_a_range_and_is_held_to_it(name):
    for parameter in parameters_in(experiments()[name]).values():
        if has_numbers(parameter.default):
            assert parameter.range, f"{name}: say the range of {parameter.name} in its comment, such as 'at least 1'"
            assert not parameter.outside(parameter.default), parameter
            for value in beyond(parameter):
                with pytest.raises(StudyError, match=f"{parameter.name} must be "):
                    full_parameters(name, "smoke", {parameter.name: value})


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_preset_lies_in_the_ranges(name):
    for preset in presets_of(name):
        full_parameters(name, preset)


# ---------------------------------------------------------------- reasons and names

pytest_plugins = ["study_sandbox"]
WITH_DATA = """dataset: str = "mnist"  # of images
weights: str = ""  # to start from
seed: int = 0  # of all, at least 0"""


@pytest.fixture
def toy(sandbox, monkeypatch, tmp_path):
    "A project with an experiment that wants MNIST, on a machine without data and weights."
    sandbox.write("toy/first", sandbox.LIGHT, parameters=WITH_DATA)
    sandbox.preset("cpu", "toy/first", "dataset: digits\n")
    sandbox.preset("paper", "toy/first", "dataset: digits\nweights: resnet32_cifar10\n")
    monkeypatch.setenv("AFGSTUDY_DATA", str(tmp_path / "no data"))
    return sandbox


def test_list_says_what_is_needed_and_how_to_get_it(toy):
    said = toy("list").splitlines()
    assert said[1:] == [
        "    cpu: never",
        "    smoke: needs mnist: afgstudy data get mnist",
        "    paper: needs resnet32_cifar10: afgstudy weights get resnet32_cifar10",
    ]


def test_status_is_one_line_a_run(toy):
    said = toy("status").splitlines()
    assert len(said) == 4 and "needs mnist: afgstudy data get mnist" in said[1]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("report --preset cup", "no experiment has a preset 'cup': did you mean 'cpu'"),
        ("publish toy/nope", "no experiment 'toy/nope'"),
        ("publish toy/frist", "did you mean 'toy/first'"),
        ("publish toy/first --preset cup", "did you mean 'cpu'"),
        ("run toy/first -p seed=-3", "seed must be at least 0, got -3"),
        ("run aalp/table2 -p eps=8", "no experiment 'aalp/table2'"),
    ],
)
def test_a_name_that_does_not_exist_is_named(toy, command, message):
    assert message in toy(command, status=1) and toy.executed() == 0


@pytest.mark.parametrize(
    ("line", "word", "expected"),
    [
        ("afgstudy run ", 2, "toy/first"),
        ("afgstudy run toy/first --preset c", 4, "cpu"),
        ("afgstudy report --preset pa", 3, "paper"),
        ("afgstudy data get cif", 3, "cifar10"),
        ("afgstudy weights get resnet", 3, "resnet32_cifar10"),
        ("afgstudy mod", 1, "models"),
    ],
)
def test_a_shell_completes_names(toy, monkeypatch, line, word, expected):
    from click.testing import CliRunner

    from afgstudy.study.cli import main

    asked = {"_AFGSTUDY_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(word)}
    said = CliRunner().invoke(main, [], prog_name="afgstudy", env=asked).output
    assert f"plain,{expected}" in said.splitlines()


def test_bare_make_prints_the_targets(project):
    import re
    import subprocess

    said = subprocess.run(["make"], cwd=project, capture_output=True, text=True, timeout=60)
    targets = set(re.findall(r"^(\w[\w-]*):", (project / "Makefile").read_text(), re.M)) - {"setup", "help"}
    printed = set(re.findall(r"^ *make ([\w-]+)", said.stdout, re.M))
    assert said.returncode == 0 and {"study", "test", "docs", "data", "lab", "clean"} <= printed <= targets, said.stderr


def test_init_lays_out_a_study_that_the_command_knows(project, tmp_path, monkeypatch):
    from click.testing import CliRunner

    from afgstudy.study.cli import main

    monkeypatch.delenv("AFGSTUDY_EXPERIMENTS", raising=False)
    said = CliRunner().invoke(main, ["init", str(tmp_path / "study")])
    assert said.exit_code == 0 and "afgstudy list" in said.output
    monkeypatch.chdir(tmp_path / "study")
    assert sorted(experiments()) == EXPERIMENTS and "paper" in presets_of("aalp/table2")
    said = CliRunner().invoke(main, ["init", str(tmp_path / "study")])
    assert said.exit_code == 1 and "is not empty" in said.output and "Traceback" not in said.output
