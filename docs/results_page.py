"""The results browser: every row of every committed record in a table that sorts, filters and downloads."""

from collections.abc import Iterable

from radii import radius_of

COLUMNS = (
    "paper",
    "table",
    "dataset",
    "method",
    "attack",
    "metric",
    "eps",
    "published",
    "measured",
    "95% interval",
)
COLUMNS += ("n", "preset", "seed", "device")
CHOICES = ("paper", "table", "dataset", "metric", "eps", "preset")  # columns with a list to choose from
NUMBERS = ("published", "measured", "n", "seed")
AT_ONCE = 50


def number(value: float | None) -> str:
    "A number as the tables show it, a dash where there is none."
    return "–" if value is None else f"{value:,.2f}".replace("-", "−")


def eps_of(record: dict, row: dict) -> str:
    "The radius of a row as text, with its norm where that is not L-infinity; a dash where it has none."
    from afgstudy.study.report import radius_text

    found = radius_of(record, row)
    if found is None:
        return "–"
    norm, radius = found
    return radius_text(radius) + (" (L2)" if norm == "l2" else "")


def lines_of(experiment: str, preset: str, record: dict) -> Iterable[dict[str, str]]:
    "The rows of one record as text, by column."
    paper, _, table = experiment.partition("/")
    device = str(record["provenance"]["device"]["name"])
    for row in record["rows"]:
        unit = f" ({row['unit']})" if row.get("unit") else ""
        values = {k: number(row.get(k)) for k in ("published", "measured", "low", "high")}
        yield {
            "paper": paper,
            "table": table,
            **{k: str(row[k] or "") for k in ("dataset", "method", "attack")},
            "metric": f"{row['metric']}{unit}",
            "eps": eps_of(record, row),
            "published": values["published"],
            "measured": values["measured"],
            "95% interval": "–" if row.get("low") is None else f"{values['low']} to {values['high']}",
            "n": "–" if row.get("n") is None else f"{row['n']:,}",
            "preset": preset,
            "seed": "–" if row.get("seed") is None else str(row["seed"]),
            "device": device,
        }


def weight(line: dict[str, str]) -> tuple[bool, bool]:
    "Accuracy beside a published number first, then what else has one, then accuracy, then the rest."
    return line["published"] == "–" or line["measured"] == "–", not line["metric"].startswith("accuracy")


def page(runs: Iterable[tuple[str, str, dict, str]]) -> str:
    "The page, as Markdown with the table in it; `runs`: experiment, preset, record, link to its page."
    from afgstudy.study.report import render

    found = [(line, link) for *run, link in runs for line in lines_of(*run)]
    found.sort(
        key=lambda one: (weight(one[0]), one[0]["paper"], one[0]["table"])
    )  # stable: records keep their order
    links = list(dict.fromkeys(link for _, link in found))
    rows = [[*(" ".join(line[c].split()) for c in COLUMNS), links.index(link)] for line, link in found]
    data = dict(columns=COLUMNS, numbers=NUMBERS, choices=CHOICES, at_once=AT_ONCE, links=links, rows=rows)
    html = render(
        "results.html.j2", columns=COLUMNS, choices=CHOICES, numbers=NUMBERS, at_once=AT_ONCE, data=data
    )
    fence = "`" * 3
    while fence in html:
        fence += "`"
    return render("results.md.j2", html=html, fence=fence)
