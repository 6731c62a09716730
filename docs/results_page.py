"""The results browser: every row of every committed record in one static table that sorts and filters in the page."""

from collections.abc import Iterable
from html import escape

COLUMNS = ("paper", "table", "dataset", "method", "attack", "metric", "published", "measured", "95% interval")
COLUMNS += ("n", "preset", "seed", "device")
CHOICES = ("paper", "table", "dataset", "preset")  # columns with a list to choose from
NUMBERS = ("published", "measured", "n", "seed")


def number(value: float | None) -> str:
    "A number as the tables show it, a dash where there is none."
    return "–" if value is None else f"{value:,.2f}".replace("-", "−")


def device_of(record: dict) -> str:
    "What the record was computed on, in a word or two."
    device = record.get("provenance", {}).get("device", {})
    return str(device.get("name") or device.get("device") or "") if isinstance(device, dict) else str(device)


def lines_of(experiment: str, preset: str, record: dict) -> Iterable[dict[str, str]]:
    "The rows of one record as text, by column."
    paper, _, table = experiment.partition("/")
    for row in record.get("rows", []):
        unit = row.get("unit") or ""
        values = {k: number(row.get(k)) for k in ("published", "measured", "low", "high")}
        yield {
            "paper": paper,
            "table": table,
            **{k: str(row.get(k) or "") for k in ("dataset", "method", "attack")},
            "metric": f"{row.get('metric', '')}{f' ({unit})' if unit else ''}",
            "published": values["published"],
            "measured": values["measured"],
            "95% interval": "–" if row.get("low") is None else f"{values['low']} to {values['high']}",
            "n": "–" if row.get("n") is None else f"{row['n']:,}",
            "seed": "–" if row.get("seed") is None else str(row["seed"]),
            "preset": preset,
            "device": device_of(record),
        }


def key_of(column: str, text: str) -> str:
    "What a column is sorted by: the number behind a text, or the text itself."
    return text.replace(",", "").replace("−", "-").replace("–", "") if column in NUMBERS else text


def table(
    runs: Iterable[tuple[str, str, dict, str]],  # experiment, preset, record, link to its page
) -> str:
    "The table with its filters, as HTML."
    lines = [(line, link) for *run, link in runs for line in lines_of(*run)]
    rows = []
    for line, link in lines:
        cells = []
        for column in COLUMNS:
            text = escape(line[column])
            shown = f'<a href="{escape(link)}">{text}</a>' if column == "table" else text
            kind = ' class="number"' if column in (*NUMBERS, "95% interval") else ""
            cells.append(f'<td{kind} data-key="{escape(key_of(column, line[column]))}">{shown}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    heads = [f'<th><button type="button">{escape(c)}</button></th>' for c in COLUMNS]
    body = "\n".join(rows)
    return f"""<div class="results">
<form class="results-filter">
{filters(lines)}
</form>
<p class="results-count" aria-live="polite">{len(rows):,} rows</p>
<div class="results-scroll">
<table>
<thead><tr>{"".join(heads)}</tr></thead>
<tbody>
{body}
</tbody>
</table>
</div>
</div>"""


def filters(lines: list[tuple[dict[str, str], str]]) -> str:
    "A field for words and a list for each column with few values."
    parts = ['<label>words <input type="search" name="words" placeholder="AALP PGD-100"></label>']
    for column in CHOICES:
        values = sorted({line[column] for line, _ in lines})
        options = "".join(f"<option>{escape(v)}</option>" for v in values)
        place = COLUMNS.index(column)
        select = (
            f'<select name="{column}" data-column="{place}"><option value="">all</option>{options}</select>'
        )
        parts.append(f"<label>{escape(column)} {select}</label>")
    return "\n".join(parts)


def page(runs: Iterable[tuple[str, str, dict, str]]) -> str:
    "The page, as Markdown with the table in it."
    about = (
        "Every number of every committed run. A click on a column's name sorts by it, a second click turns the order; "
        "several words must all occur in a row. The name of a table leads to the executed notebook. An address such as "
        "`results.html?paper=aalp&words=PGD-100` opens the page filtered. "
        "What the columns mean is said in [How to read the numbers](70_howto/00_numbers.ipynb)."
    )
    head = "---\nhtml_theme.sidebar_secondary.remove: true\n---\n\n# Results\n\n"
    return f"{head}{about}\n\n```{{raw}} html\n{table(runs)}\n```\n"
