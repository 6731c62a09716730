"""Accuracy by radius, drawn from the committed records for a browser: curves to point at and to switch off."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import cycle

from radii import named, without

# the experiments that walk over radii, and the metric of their curves
SOURCES = {"aalp/sceptic": "accuracy at eps", "cafd/epsilon": "accuracy, ", "two_stream/table2": "right"}
DASHES = ("solid", "dashed", "dotted", "dotdash")
OLDER = {"informed": "adaptive"}  # records from before this was one word


@dataclass
class Curve:
    "What one method keeps of its accuracy while one attack grows."

    method: str
    attack: str
    points: list[dict] = field(default_factory=list)  # radius, measured, low, high, n


@dataclass
class Panel:
    "The curves that stand in one figure."

    experiment: str
    preset: str
    dataset: str
    kind: str  # what the attacker knows, where the record tells
    curves: list[Curve] = field(default_factory=list)

    @property
    def title(self) -> str:
        "What all curves share."
        attacks = {c.attack for c in self.curves}
        return ", ".join(filter(None, [self.dataset, self.kind, *(attacks if len(attacks) == 1 else ())]))

    def names(self) -> dict[str, Curve]:
        "The curves under what tells them apart: the method, the attack, or both."
        one_attack = len({c.attack for c in self.curves}) == 1
        one_method = len({c.method for c in self.curves}) == 1
        both = [(c.method, c.attack) for c in self.curves]
        names = [m if one_attack else a if one_method else f"{m}, {a}" for m, a in both]
        return dict(zip(names, self.curves, strict=True))


def kind_of(row: Mapping) -> str:
    "What a row's metric says beside `accuracy`: oblivious, adaptive; a defence that rejects is right where it accepts."
    said = without(row["metric"]).removeprefix("accuracy").removeprefix(", ")
    return {"right": "accepted and right"}.get(said, OLDER.get(said, said))


def point(row: Mapping, radius: float) -> dict:
    return {"radius": radius, **{k: row[k] for k in ("measured", "low", "high", "n")}}


def walked(record: Mapping) -> list[tuple[Mapping, float | None]]:
    "The measured rows of a record that its curves are made of, with the radius that each names."
    metric = SOURCES[record["experiment"]]
    rows = [r for r in record["rows"] if r["metric"].startswith(metric) and r["measured"] is not None]
    radii = [(named(r["attack"]), named(r["metric"])) for r in rows]
    return [(row, own if own is not None else other) for row, (own, other) in zip(rows, radii, strict=True)]


def panels(record: Mapping, preset: str) -> list[Panel]:
    "The panels of one record: its rows at three radii or more, and the clean images where they are the same images."
    found: dict[tuple, Panel] = {}
    curves: dict[tuple, Curve] = {}
    rows = walked(record)
    clean = {(r["dataset"], kind_of(r), r["method"], r["n"]): r for r, _ in rows if r["attack"] == "clean"}
    for row, radius in ((row, radius) for row, radius in rows if radius is not None):
        attack = OLDER.get(without(row["attack"]), without(row["attack"]))
        at = (row["dataset"], kind_of(row))
        panel = found.setdefault(at, Panel(record["experiment"], preset, *at))
        key = (*at, row["method"], attack)
        if key not in curves:
            start = clean.get((*at, row["method"], row["n"]))
            curves[key] = Curve(row["method"], attack, [point(start, 0.0)] if start else [])
            panel.curves.append(curves[key])
        curves[key].points.append(point(row, radius))
    for curve in curves.values():
        curve.points.sort(key=lambda p: p["radius"])
    for panel in found.values():
        panel.curves = [c for c in panel.curves if len(c.points) >= 3]
    return [p for p in found.values() if p.curves]


def colours(names: Iterable[str]) -> dict[str, str]:
    "The study's colour of each name; one that has none takes the next of the palette."
    from afgstudy.cafd.protocol import PURIFIER_COLOURS
    from afgstudy.plots import COLOURS, METHOD_COLOURS

    known = METHOD_COLOURS | PURIFIER_COLOURS
    rest = cycle(c for c in COLOURS.values() if c not in {known.get(n) for n in names})
    return {name: known.get(name) or next(rest) for name in names}


def figure_of(panel: Panel):
    "The panel as a Bokeh figure: a point says its numbers, a click on a name hides its curve."
    from bokeh.models import HoverTool
    from bokeh.plotting import figure

    share = "@measured{0.0}% [@low{0.0}, @high{0.0}]"
    tips = [("", "@name"), ("radius", "@radius{0.000}"), ("accuracy", share), ("n", "@n")]
    drawn = figure(
        height=340, sizing_mode="stretch_width", title=panel.title, y_range=(-3, 103),
        x_axis_label="L-infinity radius, images in [0, 1]", y_axis_label="accuracy, %",
        tools="pan,box_zoom,reset", toolbar_location="above",
    )  # fmt: skip
    drawn.toolbar.logo = None
    drawn.add_tools(HoverTool(tooltips=tips, mode="mouse"))
    names = panel.names()
    dashes = dict(zip(dict.fromkeys(c.attack for c in panel.curves), cycle(DASHES), strict=False))
    for name, curve in names.items():
        draw(drawn, name, curve, colours(names)[name], dashes[curve.attack])
    drawn.add_layout(drawn.legend[0], "below")
    drawn.legend.click_policy = "hide"
    drawn.legend.ncols = 2
    drawn.legend.label_text_font_size = "13px"
    return drawn


def draw(drawn, name: str, curve: Curve, colour: str, dash: str) -> None:
    "One curve with its intervals as a band."
    from bokeh.models import ColumnDataSource

    columns = {k: [p[k] for p in curve.points] for k in ("radius", "measured", "low", "high", "n")}
    source = ColumnDataSource(columns | {"name": [name] * len(curve.points)})
    shown = dict(source=source, color=colour, legend_label=name)
    drawn.varea("radius", "low", "high", alpha=0.1, **shown)
    drawn.line("radius", "measured", line_width=2, line_dash=dash, **shown)
    drawn.scatter("radius", "measured", size=8, **shown)


def written(item: dict) -> str:
    """A figure for the browser as JSON, with Bokeh's running numbers counted from one, so that builds are the same.

    It stays a text for the template, since JavaScript needs Bokeh's own order and Jinja2 would sort by name.
    """
    text, numbers = json.dumps(item), {}
    return re.sub(r'"p\d+"', lambda old: f'"p{numbers.setdefault(old[0], len(numbers) + 1)}"', text)


def section(runs: Iterable[tuple[str, Mapping, str]], static: str) -> str:
    """The section of a page, as Markdown; nothing without curves.

    `runs`: preset, record, address of its page; `static`: the site's folder of scripts, as seen from the page.
    """
    from bokeh.embed import json_item

    from afgstudy.study.report import render

    shown = [(panel, page) for preset, record, page in runs for panel in panels(record, preset)]
    if not shown:
        return ""
    items = [written(json_item(figure_of(panel))) for panel, _ in shown]
    html = [render("curve.html.j2", title=p.title, item=item) for (p, _), item in zip(shown, items, strict=True)]
    parts = [dict(html=h, preset=p.preset, experiment=p.experiment, page=page)
             for h, (p, page) in zip(html, shown, strict=True)]  # fmt: skip
    return render("curves.md.j2", parts=parts, static=static)
