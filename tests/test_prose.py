"""Numbers that a page's conclusion gives in words: a committed record or the paper must hold each of them.

The records are those of the page and of the experiments that its conclusion names; the paper's numbers are those of
`data/published`. Any number of these will do, so a wrong one that happens to stand elsewhere in them is not found."""

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NUMBER = re.compile(r"(?<![\w./-])[−-]?\d+(?:,\d{3})*(?:\.\d+)?(?![\w/]|[.,]\d)")
def conclusion(page: Path) -> str:
    "The text from the heading `What it says` on, else after the last code."
    cells = json.loads(page.read_text())["cells"]
    texts = ["".join(c["source"]) if c["cell_type"] == "markdown" else "" for c in cells]
    starts = [i for i, text in enumerate(texts) if re.search(r"^## What it says", text, re.M)]
    last = max(i for i, cell in enumerate(cells) if cell["cell_type"] == "code")
    return "\n".join(texts[starts[0] if starts else last :])


def bare(text: str) -> str:
    "A text without code, links, formulas, and names of figures and tables."
    return re.sub(r"`[^`]*`|\$[^$]*\$|\]\([^)]*\)|arXiv \S+|(Figure|Table)s? \d+", " ", text)


def records_behind(page: Path) -> list[dict]:
    "The records of a page, and of the experiments that its conclusion names."
    own = f"{page.parent.name}/{page.stem}"
    named = [n for n in re.findall(r"`(\w+/\w+)`", conclusion(page)) if (page.parents[1] / f"{n}.ipynb").is_file()]
    files = [f for n in (own, *named) for f in sorted((ROOT / "data" / "results").glob(f"*/{n}/record.json"))]
    return [json.loads(f.read_text()) for f in files]


def printed(paper: str) -> list[float]:
    "Every number that a paper prints in its tables, as transcribed."
    file = ROOT / "data" / "published" / f"{paper}.csv"
    lines = [line for line in file.read_text().splitlines() if line[:1] != "#"] if file.is_file() else []
    return [float(v) for row in csv.reader(lines) for v in row if re.fullmatch(r"-?\d+(\.\d+)?", v)]


def numbers_in(value: object) -> list[float]:
    "Every number of a record: values, interval ends, counts, parameters, and those in its own sentences."
    if isinstance(value, dict):
        return [n for v in value.values() for n in numbers_in(v)]
    if isinstance(value, list):
        return [n for v in value for n in numbers_in(v)]
    if isinstance(value, str):
        return [read(n) for n in NUMBER.findall(value)]
    return [float(value)] if isinstance(value, int | float) and not isinstance(value, bool) else []


def read(number: str) -> float:
    return float(number.replace("−", "-").replace(",", ""))


def held(number: str, values: list[float]) -> bool:
    "Whether some value, or its hundredth, rounds to the number as written; whole numbers up to ten are words."
    wanted, digits = read(number), len(number.partition(".")[2])
    if not digits and abs(wanted) <= 10:
        return True
    room = 0.5 * 10**-digits + 1e-9
    return any(abs(abs(v) - abs(wanted)) <= room or abs(abs(v) / 100 - abs(wanted)) <= room for v in values)


def unbacked(text: str, records: list[dict], others: Sequence[float] = ()) -> list[str]:
    "The numbers of a text that none of the records holds, and that is none of the others."
    fields = ("rows", "notes", "verdict", "attacks")
    values = [n for r in records for f in fields for n in numbers_in(r.get(f, []))]
    values += [n for r in records for n in numbers_in(r["provenance"]["parameters"])]
    values += [n for r in records for n in numbers_in(r["provenance"].get("datasets", []))]
    return [number for number in NUMBER.findall(bare(text)) if not held(number, [*values, *others])]


PAGES = sorted((ROOT / "nbs" / "experiments").glob("*/*.ipynb"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_number_of_a_conclusion_is_in_a_record(page):
    left = unbacked(conclusion(page), records_behind(page), printed(page.parent.name))
    assert not left, f"no record holds {left}: what is computed belongs into the record, by `exp.row` or `exp.note`"


def test_a_number_that_no_record_holds_is_found():
    row = {"measured": 85.84, "low": 85.1, "high": 86.5, "n": 1000}
    record = {"rows": [row], "notes": ["CAFD minus HGD is -7.25 points."], "provenance": {"parameters": {"eps": 0.3}}}
    text = "On 1,000 images 86% [85.1, 86.5] at 0.3, that is −7.2 points or 0.86; the others keep 77.0%, of 12."
    assert unbacked(text, [record]) == ["77.0", "12"]
    assert unbacked(text.replace("77.0", "85.8"), [record]) == ["12"]
