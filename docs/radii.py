"""The radius that a row of a record was attacked with."""

import re
from collections.abc import Mapping

# a row that names its radius: "PGD-20, eps 0.1", "I: FGSM, 4/255", "accuracy at eps 0.3"
NAMED = re.compile(r",?(?: at)?(?: eps (?P<eps>[\d.]+)(?:/(?P<of>\d+))?| (?P<levels>\d+)/255)$")
# what has no radius: images that nobody attacked, and attacks that look for the nearest or the fewest
UNBOUNDED = re.compile(
    r"^(clean|none|noise|jpeg|blur|resize only|pair$|strangers|training)|DeepFool|Carlini|-pixel|stAdv", re.I
)
BY_L2 = re.compile(r"\bL2$|^DDN$")


def named(text: str) -> float | None:
    "The radius at the end of a text, if there is one."
    if found := NAMED.search(text):
        return float(found["levels"]) / 255 if found["levels"] else float(found["eps"]) / float(found["of"] or 1)
    return None


def without(text: str) -> str:
    "The text without the radius at its end: `PGD-20` of `PGD-20, eps 0.1`."
    return NAMED.sub("", text)


def of_its_set(value: object, parameters: Mapping, dataset: str) -> float | None:
    "A parameter as a radius; where it is a list, the entry that stands where the data set does."
    sets = parameters.get("datasets")
    if isinstance(value, list) and isinstance(sets, list):
        value = dict(zip(sets, value, strict=False)).get(dataset.partition(",")[0])
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def radius_of(record: Mapping, row: Mapping) -> tuple[str, float] | None:
    "Norm and radius of a row: its own, the one its attack or metric names, or its run's; nothing where it has none."
    for own in (row.get("eps"), named(row["attack"]), named(row["metric"])):
        if isinstance(own, int | float):
            return "linf", float(own)
    if UNBOUNDED.search(row["attack"]):
        return None
    norm, name = ("l2", "eps_l2") if BY_L2.search(row["attack"]) else ("linf", "eps")
    parameters = record["provenance"]["parameters"]
    radius = of_its_set(parameters.get(name), parameters, str(row["dataset"]))
    return None if radius is None else (norm, radius)
