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
