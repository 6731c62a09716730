"""The leaderboard: for each data set, norm and radius the defences that met the same attacks, the best one first."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

DATASETS = {"mnist": "MNIST", "cifar10": "CIFAR-10", "svhn": "SVHN", "imagenette": "Imagenette"}
NORMS = {"linf": "L-infinity", "l2": "L2", "l1": "L1"}
DASH = "–"


def share(row: Mapping | None) -> str:
    "A percentage with its interval: `96 [90, 98]`."
    if row is None or row.get("measured") is None:
        return DASH
    text = f"{row['measured']:.0f}"
    return text if row.get("low") is None else f"{text} [{row['low']:.0f}, {row['high']:.0f}]"


@dataclass
class Entry:
    "A defence as one line of a board."

    defence: str
    network: str = DASH
    clean: str = DASH
    oblivious: str = DASH
    adaptive: str = DASH
    rejected: str = DASH  # of the clean images
    cost: str = DASH  # of one image
    flags: str = DASH
    source: str = ""  # the page its numbers are from
    models: list[str] = field(default_factory=list)  # published ones
    left: float = -1.0  # adaptive accuracy, in percent, which decides the order


@dataclass
class Board:
    "The entries of one threat."

    dataset: str
    norm: str
    eps: float
    entries: list[Entry] = field(default_factory=list)

    @property
    def title(self) -> str:
        from afgstudy.study.report import radius_text

        data = DATASETS.get(self.dataset, self.dataset)
        return f"{data}, {NORMS.get(self.norm, self.norm)}, eps {radius_text(self.eps)}"

    def ranked(self) -> list[tuple[str, Entry]]:
        "The entries by adaptive accuracy, with their places; the network without a defence has none and comes last."
        order = sorted(self.entries, key=lambda e: (e.defence == "none", -e.left))
        return [(DASH if e.defence == "none" else str(i), e) for i, e in enumerate(order, 1)]


def short(flag: str) -> str:
    "What a warning of AutoAttack found, without its advice, which is the same each time."
    return flag.partition(". ")[0]


def flags_of(record: Mapping, method: str) -> str:
    "What AutoAttack warned of in this record; says so where the record is older than that."
    if "attacks" not in record:
        return "not recorded"
    said = [flag for run in record["attacks"] if run["method"] == method for flag in run["flags"]]
    return "; ".join(dict.fromkeys(map(short, said))) or "none"


def entry_of(record: Mapping, method: str, page: str) -> Entry:
    "The line of one defence in a record of the summary."
    rows = {(r["attack"], r["metric"]): r for r in record["rows"] if r["method"] == method}
    passes, time = (rows.get(("clean", metric)) for metric in ("passes an image", "time an image"))
    cost = [f"{passes['measured']:,.0f} pass{'' if passes['measured'] == 1 else 'es'}"] if passes else []
    cost += [f"{time['measured']:,.{0 if time['measured'] >= 100 else 1}f} ms"] if time else []
    adaptive = rows.get(("adaptive", "right"))
    return Entry(
        method,
        network=str(record["provenance"]["parameters"].get("network") or DASH),
        **{case: share(rows.get((case, "right"))) for case in ("clean", "oblivious", "adaptive")},
        rejected=share(rows.get(("clean", "rejected"))),
        cost=", ".join(cost) or DASH,
        flags=flags_of(record, method),
        source=page,
        left=-1.0 if adaptive is None else adaptive["measured"],
    )


def entry_of_model(name: str, about: Mapping) -> Entry:
    "The line of a published model whose numbers are its own."
    clean, attacked = about["clean"], about["attacked"]
    measured = [{**e, "measured": e["accuracy"]} for e in (clean, attacked)]
    return Entry(
        about["title"],
        network=", ".join(dict.fromkeys(n.get("name", n["type"]) for n in about["networks"].values())),
        clean=share(measured[0]),
        adaptive=share(measured[1]),
        rejected=f"{clean.get('rejected', 0):.0f}",
        flags=f"{attacked['attack']}: {'; '.join(map(short, attacked['flags'])) or 'none'}",
        source=about.get("page", ""),
        models=[name],
        left=attacked["accuracy"],
    )


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def boards(runs: Iterable[tuple[str, Mapping, str]], models: Mapping[str, Mapping]) -> list[Board]:
    """A board for each data set, norm and radius. `runs`: preset, record of the summary, its page; `models`: the index.

    A published model that belongs to a record of the summary is linked from its line there, any other has a line of
    its own.
    """
    found: dict[tuple, Board] = {}
    left = dict(models)
    for preset, record, page in runs:
        eps = record["provenance"]["parameters"]["eps"]
        for dataset, method in dict.fromkeys((r["dataset"], r["method"]) for r in record["rows"]):
            entry = entry_of({**record, "rows": [r for r in record["rows"] if r["dataset"] == dataset]}, method, page)
            belongs = f"{preset}/{record['experiment']}"
            entry.models = [n for n, m in left.items() if m["record"] == belongs and n.startswith(f"{slug(method)}-")]
            for name in entry.models:
                del left[name]
            found.setdefault((dataset, "linf", eps), Board(dataset, "linf", eps)).entries.append(entry)
    for name, about in left.items():
        key = (about["dataset"]["name"], about["attacked"]["norm"], about["attacked"]["eps"])
        found.setdefault(key, Board(*key)).entries.append(entry_of_model(name, about))
    return list(found.values())


def page(runs: Iterable[tuple[str, Mapping, str]], models: Mapping[str, Mapping]) -> str:
    "The page, as Markdown. `models`: what the index says of each, `links` (text and address of its files) added."
    from afgstudy.study.report import render

    return render("leaderboard.md.j2", boards=boards(runs, models), models=models)


def published_models(root: Path) -> dict[str, dict]:
    "The published models of this checkout, by name; none where there is no index."
    index = root / "data" / "models" / "index.json"
    return json.loads(index.read_text())["models"] if index.is_file() else {}
