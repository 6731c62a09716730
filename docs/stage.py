"""Lay out the pages of the site, for Sphinx to render: `python docs/stage.py [--to _docs/pages]`.

The notebooks are the source of everything. Their directives (`#| export`) are taken out of the shown code, hidden cells
are dropped, names and citations become links, and every link is checked: a link to nothing ends the build. Only files
whose content changed are written, so a second build renders only what changed.
"""

import argparse
import re
import sys
from collections.abc import Callable
from configparser import ConfigParser
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path, PurePosixPath

import click
import nbformat
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
GUIDES = "70_howto"  # the room whose pages stand in the sidebar one by one
PAPERS = {
    "aalp": "20_aalp",
    "two_stream": "30_two_stream",
    "cafd": "40_cafd",
    "afg": "50_afg",
}  # paper -> its room
PICTURES = {
    "aalp": "aalp/fig5",
    "two_stream": "two_stream/fig3_4",
    "cafd": "cafd/maps",
    "afg": "afg/fig1_4",
}  # paper -> the experiment whose first figure shows the method
PRESETS = (
    "paper",
    "cpu",
    "smoke",
)  # where an experiment has several results, links lead to the first of these


class SiteError(Exception):
    "A page that cannot be made: the file and what is wrong with it."


# --- notebooks ------------------------------------------------------------------------------------


def read_notebook(path: Path) -> NotebookNode:
    "The notebook, in today's format whatever it was saved in."
    return nbformat.read(path, as_version=4)


def directives(source: str) -> tuple[dict[str, str], str]:
    "nbdev's directives at the head of a cell (`#| export`, `#| echo: false`), and the code without them."
    found, lines = {}, source.splitlines()
    while lines and (line := re.match(r"\s*#\s*\|\s*([\w-]+):?\s*(.*?)\s*$", lines[0])):
        found[line[1]] = line[2]
        lines.pop(0)
    return found, "\n".join(lines).strip("\n")


def shown(notebook: NotebookNode) -> NotebookNode:
    "What a reader sees: no directives, no hidden cells; exported cells carry the tag `exported`."
    cells = []
    for old in notebook.cells:
        says, source = directives(old.source) if old.cell_type == "code" else ({}, old.source)
        lists_names = source.startswith("__all__ = ")  # the reference shows them better
        if (
            not source
            or lists_names
            or says.keys() & {"hide", "default_exp"}
            or says.get("include") == "false"
        ):
            continue
        tags = set(old.metadata.get("tags", []))
        if says.keys() & {"export", "exports", "exporti"}:
            tags.add("exported")
        if says.get("echo") == "false" or "hide_input" in says:
            tags.add("remove-input")
        if says.get("output") == "false" or "hide_output" in says:
            tags.add("remove-output")
        cell = nbformat.from_dict({**old, "source": source, "metadata": {"tags": sorted(tags)}})
        if cell.cell_type == "code":
            cell.outputs = merged(cell.outputs)
        cells.append(cell)
    metadata = {**notebook.metadata, "language_info": {"name": "python", "pygments_lexer": "ipython3"}}
    return nbformat.from_dict({**notebook, "cells": cells, "metadata": metadata})


def merged(outputs: list[NotebookNode]) -> list[NotebookNode]:
    "The outputs with what was printed in several pieces put together."
    whole: list[NotebookNode] = []
    for output in outputs:
        if whole and output.output_type == "stream" and whole[-1].get("name") == output.name:
            whole[-1].text += output.text
        else:
            whole.append(output)
    return whole


def heading(notebook: NotebookNode) -> tuple[str, str]:
    "Title and subtitle: the first `# Title` and the `> line` below it."
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and (title := re.search(r"^# +(.+)$", cell.source, flags=re.M)):
            below = re.search(r"^> *(.+)$", cell.source, flags=re.M)
            return title[1].strip(), below[1].strip() if below else ""
    return "", ""


def module_of(notebook: NotebookNode) -> str | None:
    "The module that the notebook exports to: `afgstudy.attacks.base`."
    for cell in notebook.cells:
        if cell.cell_type == "code" and (name := directives(cell.source)[0].get("default_exp")):
            return f"afgstudy.{name}".removesuffix(".__init__")
    return None


def change_markdown(notebook: NotebookNode, change: Callable[[str], str]) -> None:
    "Apply `change` to all Markdown of the notebook, in place: cells, and what code displayed as Markdown."
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = change(cell.source)
        for output in cell.get("outputs", []):
            if "text/markdown" in output.get("data", {}):
                output.data["text/markdown"] = change("".join(output.data["text/markdown"]))


# --- Markdown -------------------------------------------------------------------------------------

TOKENS = re.compile(
    r"(?P<fence>^(?P<ticks>`{3,}|~{3,}).*?^(?P=ticks)[ \t]*$)"
    r"|(?P<heading>^#{1,6} [^\n]*$)"
    r"|(?P<math>\$\$.*?\$\$|\$[^$\n]+\$)"
    r"|(?P<link>!?\[(?:[^\[\]]|\[[^\]]*\])*\]\((?P<target>[^()\s]+)(?:\s+\"[^\"]*\")?\))"
    r"|(?P<code>`+[^`\n]+`+)",
    flags=re.M | re.S,
)


def rewrite(text: str, **change: Callable[[re.Match | str], str]) -> str:
    "The Markdown with its links (`link=`), its code (`code=`) or the rest of its prose (`prose=`) changed."
    parts, at = [], 0
    prose = change.get("prose", str)
    for token in TOKENS.finditer(text):
        parts.append(prose(text[at : token.start()]))
        parts.append(change[token.lastgroup](token) if token.lastgroup in change else token[0])
        at = token.end()
    return "".join([*parts, prose(text[at:])])


def relink(text: str, folder: str, new: Callable[[str, str], str]) -> str:
    "The Markdown of a file in `folder`, every relative link replaced by `new(path from the root, fragment)`."

    def one(link: re.Match) -> str:
        target, _, fragment = link["target"].partition("#")
        if not target or re.match(r"[a-z][a-z0-9+.-]*:", target):
            return link[0]
        start, end = (link.start("target") - link.start(), link.end("target") - link.start())
        return link[0][:start] + new(normal(f"{folder}/{target}"), fragment) + link[0][end:]

    return rewrite(text, link=one)


def normal(path: str) -> str:
    "The path without `.` and `..`; one that leaves the project keeps its leading `..`."
    parts: list[str] = []
    for part in PurePosixPath(path).parts:
        if part == ".." and parts and parts[-1] != "..":
            parts.pop()
        elif part != ".":
            parts.append(part)
    return "/".join(parts)


def relative(target: str, page: str) -> str:
    "`target` as seen from `page`; both count from the same root."
    here, there = PurePosixPath(page).parent.parts, PurePosixPath(target).parts
    same = 0
    while same < min(len(here), len(there)) and here[same] == there[same]:
        same += 1
    return "/".join([".."] * (len(here) - same) + list(there[same:]))


def toctree(caption: str, pages: list[str], hidden: bool = True, depth: int = 1) -> str:
    "A table of contents of pages, `page` or `Title <page>`; hidden ones make the sidebar."
    options = [f":caption: {caption}"] if caption else []
    options += [":hidden:"] if hidden else []
    lines = [
        "```{toctree}",
        *options,
        f":maxdepth: {depth}",
        "",
        *(re.sub(r"\.(ipynb|md)(?=>?$)", "", p) for p in pages),
    ]
    return "\n".join([*lines, "```"])


# --- the site -------------------------------------------------------------------------------------


@dataclass
class Site:
    "Where each file of the project is shown, and what links to what."

    root: Path
    to: Path
    shown_at: dict[str, str] = field(default_factory=dict)  # file of the project -> page
    labels: dict[str, str] = field(default_factory=dict)  # documented name, short or whole -> its label
    references: dict[tuple[str, str], str] = field(default_factory=dict)  # (first author, year) -> key
    written: set[str] = field(default_factory=set)

    def write(self, page: str, content: str | bytes) -> None:
        "Write a page, if it is not already there as it should be."
        path, content = self.to / page, content.encode() if isinstance(content, str) else content
        self.written.add(page)
        if not path.exists() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def finish(self) -> None:
        "Remove what an earlier build left and this one did not make."
        for path in sorted(self.to.rglob("*"), reverse=True):
            if path.is_dir():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path.relative_to(self.to).as_posix() not in self.written:
                path.unlink()

    def attach(self, path: str, source: str) -> str:
        "Carry along a linked file that has no page of its own; Markdown becomes a page."
        file = self.root / path
        if path.startswith("..") or not file.is_file():
            why = "is a folder, link to a file in it" if file.is_dir() else "is not there"
            raise SiteError(f"{source} links to {path}, which {why}")
        page = self.shown_at[path] = f"files/{path}"
        if file.suffix == ".md":
            self.write(page, "---\norphan: true\n---\n\n" + self.markdown(file.read_text(), path, page))
        else:
            self.write(page, file.read_bytes())
        return page

    def markdown(self, text: str, source: str, page: str) -> str:
        "The Markdown of `source` as it stands on `page`: links, names and citations lead somewhere."

        def link(path: str, fragment: str) -> str:
            target = relative(self.shown_at.get(path) or self.attach(path, source), page)
            return target + (f"#{fragment}" if fragment else "")

        text = relink(text, PurePosixPath(source).parent.as_posix(), link)
        return rewrite(text, code=self.name, prose=self.cite)

    def name(self, code: re.Match) -> str:
        "`PGD` in code type as a link to its reference."
        label = self.labels.get(code[0].strip("`"))
        return f"[{code[0]}](#{label})" if label else code[0]

    def cite(self, prose: str) -> str:
        "`Madry et al. 2018` and the like as a citation, where references.bib has it."

        def one(found: re.Match) -> str:
            key = self.references.get((found["author"], found["in_brackets"] or found["bare"]))
            return f"{{cite:{'t' if found['in_brackets'] else 'alp'}}}`{key}`" if key else found[0]

        author = r"\b(?P<author>[A-Z][\w-]+)(?: et al\.,?| and [A-Z][\w-]+)? "
        year = r"(?:19|20)\d\d"
        return re.sub(author + rf"(?:\((?P<in_brackets>{year})\)|(?P<bare>{year})\b)", one, prose)

    def notebook(self, source: str, page: str, extra: Callable[[NotebookNode], None] | None = None) -> None:
        "Write the notebook `source` as `page`; `extra` may add cells of the site's own."
        notebook = shown(read_notebook(self.root / source))
        change_markdown(notebook, lambda text: self.markdown(text, source, page))
        if extra:
            extra(notebook)
        self.write(page, nbformat.writes(notebook) + "\n")


def markdown_cell(text: str, number: int = 0) -> NotebookNode:
    cell = nbformat.v4.new_markdown_cell(text)
    cell["id"] = f"site{number}"  # a random one would make every build a new page
    return cell


def files(folder: Path, pattern: str) -> list[Path]:
    "Files below a folder, in order, without checkpoints; a folder's index comes first."
    found = [p for p in folder.rglob(pattern) if ".ipynb_checkpoints" not in p.parts]
    return sorted(found, key=lambda p: (p.parent, p.stem != "index", p.name))


# --- library rooms and their reference ------------------------------------------------------------


@dataclass
class Module:
    "A module of the package, the notebook it is exported from, its page in the reference."

    name: str
    source: str
    title: str
    subtitle: str
    symbols: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)  # re-exported

    @property
    def page(self) -> str:
        return f"api/{self.name}.md"


def library(site: Site) -> dict[str, list[str]]:
    "Room (a folder of `nbs/`) -> its notebooks, the index first."
    rooms = {}
    for folder in sorted((site.root / "nbs").iterdir()):
        if re.match(r"\d\d_", folder.name) and (notebooks := files(folder, "*.ipynb")):
            rooms[folder.name] = [p.relative_to(site.root).as_posix() for p in notebooks]
    for notebooks in rooms.values():
        site.shown_at |= {source: source.removeprefix("nbs/") for source in notebooks}
    return rooms


def modules(site: Site, sources: list[str]) -> list[Module]:
    "The modules that the notebooks export, with their symbols; every name gets its label."
    from api import assignment

    found: dict[str, Module] = {}
    for source in sources:
        notebook = read_notebook(site.root / source)
        name = module_of(notebook)
        if name is None or name in found:  # a module may go on in a second notebook
            continue
        module = found[name] = Module(name, source, *heading(notebook))
        live = import_module(name)
        for symbol in getattr(live, "__all__", []):
            if isinstance(getattr(live, symbol), click.Command) and symbol != "main":
                continue  # the page of the command shows its subcommands
            home = getattr(getattr(live, symbol), "__module__", name)
            # an instance names its class's module: where it is set decides
            ours = home == name or not home.startswith("afgstudy.") or assignment(symbol, live) is not None
            (module.symbols if ours else module.elsewhere).append(symbol)
    short: dict[str, list[str]] = {}
    for module in found.values():
        site.labels[module.name] = f"module-{module.name}"
        for symbol in module.symbols:
            whole = f"{module.name}.{symbol}"
            twin = any(s != symbol and s.lower() == symbol.lower() for s in module.symbols)
            # labels do not tell case apart: a class `ROC` beside a function `roc`
            site.labels[whole] = whole + ("-function" if twin and symbol[0].islower() else "")
            short.setdefault(symbol, []).append(whole)
    # only classes by their short name: `load` or `data` in a sentence may mean anything
    site.labels |= {s: site.labels[w[0]] for s, w in short.items() if s[0].isupper() and len(w) == 1}
    return list(found.values())


def reference(site: Site, module: Module) -> None:
    "Write the page of one module."
    from api import symbol

    live = import_module(module.name)
    notebook = relative(site.shown_at[module.source], module.page)
    package = module.name.split(".")[-1]
    lines = [
        f"({site.labels[module.name]})=",
        f"# {module.name}",
        "",
        f"> {module.subtitle}" if module.subtitle else "",
    ]
    lines += ["", f"Explained, with examples and tests, in [{module.title}]({notebook})."]
    if module.elsewhere:
        homes = {s: f"{getattr(live, s).__module__}.{s}" for s in sorted(module.elsewhere)}
        names = ", ".join(
            f"[`{s}`](#{site.labels[home]})" for s, home in homes.items() if home in site.labels
        )
        lines += ["", f"Also importable from `{package}`, and documented where they are defined: {names}."]
    for name in sorted(module.symbols, key=lambda s: (s.isupper(), s[0].islower(), module.symbols.index(s))):
        text = symbol(name, live, site.labels[f"{module.name}.{name}"])
        lines += ["", rewrite(text, code=lambda c: c[0], prose=site.cite)]
    site.write(module.page, "\n".join(lines) + "\n")


def reference_index(site: Site, found: list[Module]) -> str:
    "Write the reference's own front page; every module in one line."
    rows = [f"| [`{m.name}`](#{site.labels[m.name]}) | {site.cite(m.subtitle)} |" for m in found]
    pages = [m.page.removeprefix("api/") for m in found]
    text = [
        "# API",
        "",
        "Every exported name, by module: `from afgstudy.attacks import PGD`.",
        "",
        "| module | |",
    ]
    site.write("api/index.md", "\n".join([*text, "|---|---|", *rows, "", toctree("", pages), ""]))
    return "api/index.md"


# --- experiments ----------------------------------------------------------------------------------


@dataclass
class Result:
    "A committed run of an experiment."

    experiment: str  # aalp/table2
    preset: str
    folder: str  # data/results/cpu/aalp/table2
    record: dict
    notebook: str | None  # the executed notebook, where it is committed

    @property
    def page(self) -> str:
        return f"experiments/{self.experiment}-{self.preset}" + (".ipynb" if self.notebook else ".md")


def results(site: Site) -> list[Result]:
    "The committed runs, those at the paper's own settings first."
    from afgstudy.keys import StudyError
    from afgstudy.study.records import committed_records

    found = []
    try:
        records = committed_records(project=site.root)
    except StudyError as e:
        raise SiteError(str(e)) from e
    for record in records:
        folder = record["folder"].relative_to(site.root).as_posix()
        preset, _, experiment = folder.removeprefix("data/results/").partition("/")
        if (preset, experiment) != (record["preset"], record["experiment"]):
            raise SiteError(
                f"{folder} holds the record of {record['experiment']} with preset {record['preset']}"
            )
        notebook = f"{folder}/notebook.ipynb"
        found.append(
            Result(experiment, preset, folder, record, notebook if (site.root / notebook).is_file() else None)
        )
    order = {preset: i for i, preset in enumerate(PRESETS)}
    return sorted(found, key=lambda r: (r.experiment, order.get(r.preset, len(order)), r.preset))


def facts(site: Site, result: Result, source: str) -> str:
    "The box above a result: its verdict, where its numbers come from, links."
    from afgstudy.study.planning import seconds_text
    from afgstudy.study.report import render, setting_of, verdict

    said = result.record["provenance"]
    answer = verdict(result.record) or result.record["notes"][:2]
    about = [f"Preset {result.preset}", setting_of(result.record)]
    about += ["seed " + ", ".join(map(str, said["seeds"]))] if said["seeds"] else []
    about += [str(said["device"]["name"]), seconds_text(said["seconds"])]
    links = [("the record", f"{result.folder}/record.json")]
    links += [("the executed notebook", result.notebook)] if result.notebook else []
    links += [("the notebook as it is today", source)] if (site.root / source).is_file() else []
    links += [(f"{name}.svg", path) for name, path in pictures(site, result)]
    for _, path in links:  # as downloads: a plain link to a notebook would be one to its page
        carry(site, path)
    to = [dict(text=text, to=relative(f"files/{path}", result.page)) for text, path in links]
    return render("run.md.j2", verdict=answer, about=[a for a in about if a], links=to)


def carry(site: Site, path: str) -> None:
    "Put a file of the project among the site's, to be downloaded or shown."
    site.shown_at.setdefault(path, f"files/{path}")
    site.write(f"files/{path}", (site.root / path).read_bytes())


def pictures(site: Site, result: Result) -> list[tuple[str, str]]:
    "The figures of a result that are there: name and path."
    paths = {f["name"]: f"{result.folder}/figures/{f['name']}.svg" for f in result.record["figures"]}
    return [(name, path) for name, path in paths.items() if (site.root / path).is_file()]


def result_page(site: Site, result: Result, source: str, below: str = "") -> None:
    "The executed notebook under its preset's name, or the rows and figures of the record; `below` follows a notebook."
    about = facts(site, result, source)
    if result.notebook:

        def complete(notebook: NotebookNode) -> None:
            frame(notebook, result, about)
            if below:
                notebook.cells.append(markdown_cell(below, number=6))

        site.notebook(result.notebook, result.page, complete)
    else:
        site.write(result.page, record_page(site, result, about))


def frame(notebook: NotebookNode, result: Result, about: str) -> None:
    "Give an executed notebook its box and its preset, fold its code, and list what AutoAttack warned of."
    from afgstudy.study.report import attacks_of, markdown_text, render

    for cell in notebook.cells:
        if cell.cell_type == "code" and "remove-input" not in cell.metadata.tags:
            cell.metadata.tags = [*cell.metadata.tags, "hide-input"]
    if runs := attacks_of(result.record):
        notebook.cells.append(markdown_cell(render("attacks.md.j2", runs=runs), number=4))
    title = f"(preset {markdown_text(result.preset)})"
    for i, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown" and (line := re.search(r"^# .+$", cell.source, flags=re.M)):
            cell.source = cell.source[: line.end()] + f" {title}" + cell.source[line.end() :]
            notebook.cells.insert(i + 1, markdown_cell(about))
            return
    notebook.cells.insert(0, markdown_cell(f"# {result.experiment} {title}\n\n{about}"))


def record_page(site: Site, result: Result, about: str) -> str:
    "The page of a run without a notebook."
    from afgstudy.study.report import attacks_of, render, setting_of, tables_of

    caption = {f["name"]: f.get("caption") or f["name"] for f in result.record["figures"]}
    drawn = [
        dict(caption=caption[name], source=relative(f"files/{path}", result.page))
        for name, path in pictures(site, result)
    ]
    record = {
        "title": result.record.get("title") or result.experiment,
        "preset": result.preset,
        "notes": result.record["notes"],
        "figures": drawn,
        "tables": tables_of(result.record["rows"], setting_of(result.record)),
        "attacks": attacks_of(result.record),
    }
    return render("record.md.j2", record=record, run=about)


def experiments(site: Site) -> tuple[dict[str, str], list[Result]]:
    "The experiments and benchmarks, name -> notebook, and the committed runs; where each is shown is noted."
    sources = {}
    for room in ("experiments", "benchmarks"):
        for path in files(site.root / "nbs" / room, "*.ipynb"):
            source = path.relative_to(site.root).as_posix()
            name = source.removeprefix("nbs/").removeprefix("experiments/").removesuffix(".ipynb")
            sources[name] = source
    runs = results(site)
    for name, source in sources.items():
        ran = [r.page for r in runs if r.experiment == name]
        site.shown_at[source] = ran[0] if ran else source.removeprefix("nbs/")
    site.shown_at |= {r.notebook: r.page for r in runs if r.notebook}
    return sources, runs


def write_experiments(site: Site, sources: dict[str, str], runs: list[Result]) -> dict[str, list[str]]:
    "Write a page for each run, and for each notebook that has none; paper, `summary` or `benchmarks` -> pages."
    pages: dict[str, list[str]] = {}
    for name in sorted({*sources, *(r.experiment for r in runs)}):
        room = pages.setdefault(name.partition("/")[0], [])
        ran = [r for r in runs if r.experiment == name]
        for result in ran:
            below = curves_on(result.page, runs) if name.startswith("summary/") else ""
            result_page(site, result, sources.get(name, ""), below)
            room.append(result.page)
        if not ran:
            site.notebook(sources[name], site.shown_at[sources[name]], not_run)
            room.append(site.shown_at[sources[name]])
    return pages


def curves_on(page: str, runs: list[Result]) -> str:
    "The interactive curves of accuracy by radius, as they stand on a page."
    import curves

    drawn = [(r.preset, r.record, relative(r.page, page)) for r in runs if r.experiment in curves.SOURCES]
    return curves.section(drawn, relative("_static", page))


def short_title(site: Site, page: str) -> str:
    "What the sidebar calls the page of an experiment: `Table 2 (cpu)` for `AALP, Table 2: accuracy (preset cpu)`."
    text = (site.to / page).read_text()
    notebook = page.endswith(".ipynb")
    title = heading(nbformat.reads(text, as_version=4))[0] if notebook else text[2:].partition("\n")[0]
    title, _, preset = title.removesuffix(")").partition(" (preset ")
    before, _, after = title.partition(": ")
    name = before.rpartition(", ")[2] if ", " in before or not after else after
    return name[:1].upper() + name[1:] + (f" ({preset})" if preset else "")


def write_room(
    site: Site,
    room: str,
    notebooks: list[str],
    sources: dict[str, str],
    runs: list[Result],
    pages: dict[str, list[str]],  # of the experiments, by paper
) -> str:
    "Write the pages of a room; its front page leads to the others, and a paper's to its tables. Returns that page."
    paper = next((p for p, r in PAPERS.items() if r == room), None)
    front, *others = [site.shown_at[source] for source in notebooks]
    tables = [f"{short_title(site, p)} <{relative(p, front)}>" for p in pages.get(paper, [])]
    below = [[relative(p, front) for p in others], tables] if room != GUIDES else []
    tocs = [toctree("", group) for group in below if group]

    def close(notebook: NotebookNode) -> None:
        under_title(notebook, "\n\n".join(filter(None, [elsewhere(notebooks[0]), finding(site, room)])))
        if paper:
            if picture := picture_of(site, paper, runs):
                notebook.cells.insert(1, markdown_cell(picture, number=3))
            tables_of(site, paper, sources, runs)(notebook)
        if tocs:
            notebook.cells.append(markdown_cell("\n\n".join(tocs), number=2))

    site.notebook(notebooks[0], front, close)
    for source in notebooks[1:]:
        site.notebook(source, site.shown_at[source], linked(source))
    return front


def finding(site: Site, room: str) -> str:
    "The box that a paper's page begins with: what the front page says of it, read there from the records."
    outputs = [o for c in read_notebook(site.root / "nbs" / "index.ipynb").cells for o in c.get("outputs", [])]
    text = "\n".join("".join(o.get("data", {}).get("text/markdown", "")) for o in outputs)
    start = rf"^- \[\*\*(?P<name>.*?)\*\*\]\({room}/index\.ipynb\) \(\[[^\]]*\]\([^)]*\)\) (?P<says>.*)$"
    found = re.search(start, text, flags=re.M)
    return f":::{{admonition}} The answer\n:class: tip verdict\n\n{found['name']} {found['says']}\n:::" if found else ""


def elsewhere(source: str) -> str:
    "Links under the title: the notebook where it can be changed, and those meant to be played with in Colab."
    place = f"{repository()}/edit/main/{source}"
    links = [f"[Edit this page]({place})"]
    if source.startswith(f"nbs/{GUIDES}/"):
        name = repository().removeprefix("https://github.com/")
        links.append(f"[Open in Colab](https://colab.research.google.com/github/{name}/blob/main/{source})")
    return " · ".join(links)


@cache
def repository() -> str:
    "The address of the project's repository, as settings.ini has it."
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    return settings["DEFAULT"]["git_url"]


def linked(source: str) -> Callable[[NotebookNode], None]:
    "What puts those links under the title of a notebook."
    return lambda notebook: under_title(notebook, elsewhere(source))


def under_title(notebook: NotebookNode, text: str) -> None:
    "Put text below the title and the line under it."
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and (head := re.search(r"^# .+$(\s+^>.*$)*", cell.source, flags=re.M)):
            cell.source = f"{cell.source[: head.end()]}\n\n{text}\n{cell.source[head.end() :]}"
            return
    notebook.cells.insert(0, markdown_cell(text, number=5))


def tables_of(
    site: Site, paper: str, sources: dict[str, str], runs: list[Result]
) -> Callable[[NotebookNode], None]:
    "What the page of a paper's room ends with: its tables and figures, each with its committed runs."
    lines = ["## Its tables and figures", "", "| | what it asks | committed runs |", "|---|---|---|"]
    page = site.shown_at.get(f"nbs/{PAPERS[paper]}/index.ipynb", "")
    for name, source in sources.items():
        if name.startswith(f"{paper}/"):
            title, question = (t.replace("|", "\\|") for t in heading(read_notebook(site.root / source)))
            title = title.partition(", ")[2] or title
            ran = [f"[{r.preset}]({relative(r.page, page)})" for r in runs if r.experiment == name]
            lines.append(
                f"| [{title}]({relative(site.shown_at[source], page)}) | {question} | {', '.join(ran) or '–'} |"
            )

    def add(notebook: NotebookNode) -> None:
        if len(lines) > 4:
            notebook.cells.append(markdown_cell("\n".join(lines), number=1))

    return add


def picture_of(site: Site, paper: str, runs: list[Result]) -> str:
    "The figure that shows a paper's method, from a committed run, as Markdown; nothing where there is none."
    from afgstudy.study.report import markdown_text

    page = site.shown_at.get(f"nbs/{PAPERS[paper]}/index.ipynb", "")
    for result in runs:
        for name, path in pictures(site, result) if result.experiment == PICTURES[paper] else []:
            carry(site, path)
            (caption,) = (f.get("caption") or name for f in result.record["figures"] if f["name"] == name)
            caption = markdown_text(caption)
            picture = f"![{caption}]({relative(f'files/{path}', page)})"
            return f"{picture}\n\n*{caption}* From [its page]({relative(result.page, page)})."
    return ""


def browser_page(site: Site, runs: list[Result]) -> str:
    "Write the results browser."
    import results_page

    lines = [(r.experiment, r.preset, r.record, re.sub(r"\.(ipynb|md)$", ".html", r.page)) for r in runs]
    site.write("results.md", results_page.page(lines))
    return "results.md"


def leaderboard_page(site: Site, runs: list[Result]) -> str:
    "Write the leaderboard, with the published models as downloads."
    import leaderboard

    models = leaderboard.published_models(site.root)
    for name, about in models.items():
        here = [p for p in files(site.root / "data" / "models" / name, "*") if p.is_file()]
        paths = [p.relative_to(site.root).as_posix() for p in here]
        for path in paths:
            carry(site, path)
        about["page"] = next((r.page for r in runs if f"{r.preset}/{r.experiment}" == about["record"]), "")
        about["links"] = [(PurePosixPath(p).name, relative(f"files/{p}", "leaderboard.md")) for p in paths]
    summaries = [(r.preset, r.record, r.page) for r in runs if r.experiment.startswith("summary/")]
    site.write("leaderboard.md", leaderboard.page(summaries, models))
    return "leaderboard.md"


def not_run(notebook: NotebookNode) -> None:
    "Say of a notebook without committed results that it has none."
    said = any(cell.get("outputs") for cell in notebook.cells)
    if not said:
        text = ":::{admonition} No committed run yet\n:class: note run\nThis is the notebook as it would be run.\n:::"
        notebook.cells.insert(1, markdown_cell(text))


# --- everything -----------------------------------------------------------------------------------


def references(path: Path) -> dict[tuple[str, str], str]:
    "(first author's last name, year) -> key, for all entries of a BibTeX file where that is unambiguous."
    from pybtex.database import parse_file

    found: dict[tuple[str, str], str] = {}
    twice = set()
    for key, entry in parse_file(str(path)).entries.items():
        names = " ".join(entry.persons["author"][0].last_names)
        where = (names, entry.fields["year"])
        twice |= {where} & found.keys()
        found[where] = key
    return {where: key for where, key in found.items() if where not in twice}


def build(root: Path, to: Path) -> int:
    "Lay out all pages under `to`; returns how many."
    sys.path.insert(0, str(root))  # the reference is of this checkout, whatever else is installed
    site = Site(root, to)
    site.references = references(root / "docs" / "references.bib")
    site.shown_at["nbs/index.ipynb"] = site.shown_at["README.md"] = "index.ipynb"
    site.shown_at["docs/install.md"] = "install.md"
    rooms = library(site)
    sources, runs = experiments(site)
    found = modules(site, [source for notebooks in rooms.values() for source in notebooks])

    pages = write_experiments(site, sources, runs)
    for module in found:
        reference(site, module)
    site.write("references.bib", (root / "docs" / "references.bib").read_bytes())
    site.write("bibliography.md", (root / "docs" / "bibliography.md").read_bytes())
    install = (root / "docs" / "install.md").read_text()
    site.write("install.md", site.markdown(install, "docs/install.md", "install.md"))
    browser, api = browser_page(site, runs), reference_index(site, found)
    board = leaderboard_page(site, runs)
    fronts = {
        room: write_room(site, room, notebooks, sources, runs, pages) for room, notebooks in rooms.items()
    }
    papers = [fronts[room] for room in PAPERS.values() if room in fronts]
    library_rooms = [front for room, front in fronts.items() if room not in (*PAPERS.values(), GUIDES)]
    guides = [site.shown_at[source] for source in rooms.get(GUIDES, [])]
    tocs = [
        toctree("The study", ["install.md", board, *pages.get("summary", []), browser]),
        toctree("The papers", papers),
        toctree("How to", guides),
        toctree("The library", [*library_rooms, api, *pages.get("benchmarks", [])]),
        toctree("Sources", ["bibliography.md"]),
    ]

    def sidebar(notebook: NotebookNode) -> None:
        notebook.cells.append(markdown_cell("\n\n".join(tocs)))

    site.notebook("nbs/index.ipynb", "index.ipynb", sidebar)
    site.finish()
    return len([p for p in site.written if p.endswith((".ipynb", ".md"))])


def main() -> None:
    parser = argparse.ArgumentParser(description="Lay out the pages of the site.")
    parser.add_argument(
        "--to", type=Path, default=ROOT / "_docs" / "pages", help="where to (default: _docs/pages)"
    )
    to = parser.parse_args().to
    try:
        print(f"{build(ROOT, to)} pages in {to}")
    except SiteError as e:
        sys.exit(str(e))


if __name__ == "__main__":
    main()
