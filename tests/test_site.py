"""The site: it builds without a warning, every link in it leads somewhere, and nothing is loaded from elsewhere."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import click
import pytest
from headless import Browser, chromium, opened

# where a page names something that the browser loads, and where it names something to go to
LOADED = {"script": "src", "img": "src", "source": "src", "iframe": "src", "video": "src", "object": "data"}
LOADED_LINKS = {"stylesheet", "icon", "preload", "modulepreload", "manifest", "prefetch"}


class Page(HTMLParser):
    "The resources, the links and the anchors of one page."

    def __init__(self, path: Path):
        super().__init__()
        self.loads, self.goes_to, self.anchors = [], [], set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list) -> None:
        has = {name: value or "" for name, value in attributes}
        self.anchors |= {has[name] for name in ("id", "name") if name in has}
        if tag in LOADED and LOADED[tag] in has:
            self.loads.append(has[LOADED[tag]])
        elif tag == "link" and LOADED_LINKS & set(has.get("rel", "").split()):
            self.loads.append(has["href"])
        elif tag == "a" and "href" in has:
            self.goes_to.append(has["href"])


@pytest.fixture(scope="session")
def site(project, tmp_path_factory) -> Path:
    "The site, built anew in a temporary folder."
    folder = tmp_path_factory.mktemp("site")
    stage = [sys.executable, project / "docs" / "stage.py", "--to", folder / "pages"]
    sphinx = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-b",
        "html",
        "-d",
        folder / "doctrees",
    ]
    for command in (stage, [*sphinx, "-c", project / "docs", folder / "pages", folder / "html"]):
        made = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=300)
        assert made.returncode == 0, made.stdout + made.stderr
    return folder / "html"


@pytest.fixture(scope="session")
def pages(site) -> dict[str, Page]:
    "Path below the site -> the page."
    return {p.relative_to(site).as_posix(): Page(p) for p in sorted(site.rglob("*.html"))}


def is_elsewhere(address: str) -> bool:
    return bool(urlsplit(address).netloc) or urlsplit(address).scheme in {"http", "https", "ftp"}


def test_every_room_has_its_pages(project, pages):
    for path in (project / "nbs").glob("[0-9]*/*.ipynb"):
        assert path.relative_to(project / "nbs").with_suffix(".html").as_posix() in pages
    assert {"index.html", "search.html", "bibliography.html", "api/index.html"} <= pages.keys()


def test_nothing_is_loaded_from_elsewhere(site, pages):
    loads = [(name, address) for name, page in pages.items() for address in page.loads]
    assert len(loads) > len(pages), "the pages load no style: the check has gone blind"
    assert [(name, address) for name, address in loads if is_elsewhere(address)] == []
    for style in site.rglob("*.css"):
        found = re.findall(r"(?:url\(\s*['\"]?|@import\s+['\"])([^'\")]+)", style.read_text())
        assert [address for address in found if is_elsewhere(address)] == [], style.name


def test_every_link_leads_somewhere(site, pages):
    broken = []
    for name, page in pages.items():
        for address in (*page.loads, *page.goes_to):
            parts = urlsplit(address)
            if is_elsewhere(address) or parts.scheme in {"data", "mailto"}:
                continue
            target = (site / name).parent / unquote(parts.path) if parts.path else site / name
            target = target.resolve()
            if not target.is_file():
                broken.append((name, address))
            elif parts.fragment and target.suffix == ".html":
                anchors = pages[target.relative_to(site.resolve()).as_posix()].anchors
                if unquote(parts.fragment) not in anchors:
                    broken.append((name, address))
    assert broken == []


def results_data(site: Path) -> dict:
    "What the results browser draws its rows from."
    (data,) = re.findall(
        r'class="results-data">(.*?)</script>', (site / "results.html").read_text(), flags=re.S
    )
    return json.loads(data)


def test_results_browser_holds_every_committed_row(project, site):
    records = [json.loads(p.read_text()) for p in (project / "data" / "results").rglob("record.json")]
    data = results_data(site)
    assert len(data["rows"]) == sum(len(r["rows"]) for r in records) > 0
    place = {column: i for i, column in enumerate(data["columns"])}
    first = data["rows"][0]
    assert (
        first[place["metric"]].startswith("accuracy")
        and first[place["published"]] != "–" != first[place["measured"]]
    )
    assert "8/255" in {row[place["eps"]] for row in data["rows"]}
    assert all((site / link).is_file() for link in data["links"])
    text = (site / "results.html").read_text()
    assert (
        text[text.index("<tbody>") : text.index("</tbody>")].count("<tr>") == data["at_once"]
    )  # without scripts too


def summary_record(**methods: tuple[float, float]) -> dict:
    "A record of the summary with these defences: clean accuracy and the adaptive one."
    rows = []
    for method, (clean, adaptive) in methods.items():
        of = dict(dataset="mnist", method=method, published=None, n=100, seed=0, unit="%")
        rows += [dict(of, attack="clean", metric="right", measured=clean, low=clean - 5, high=min(100, clean + 5))]
        rows += [dict(of, attack="adaptive", metric="right", measured=adaptive, low=None, high=None)]
        rows += [dict(of, attack="clean", metric="rejected", measured=7.0, low=3.0, high=12.0)]
        rows += [dict(of, attack="clean", metric="passes an image", measured=2.0, low=None, high=None, unit="passes")]
    flagged = dict(dataset="mnist", method="CAFD", attack="AutoAttack", accuracy={}, components=[], flags=["stuck"])
    said = {"parameters": {"eps": 0.2, "network": "pooled_cnn"}}
    return dict(experiment="summary/defences", preset="cpu", rows=rows, attacks=[flagged], provenance=said)


def published_model(record: str, **changes) -> dict:
    "What an index says of a model."
    accuracy = dict(accuracy=98.0, low=93.0, high=99.0, n=100, rejected=0.0)
    attack = dict(accuracy, accuracy=73.0, attack="PGD-100", norm="linf", eps=0.3, flags=[])
    networks = {"model": {"type": "Classifier", "name": "lenet5"}}
    file = dict(sha256="0" * 64, bytes=1_500_000)
    data = dict(name="mnist", split="test")
    about = dict(title="AALP on MNIST", dataset=data, clean=accuracy, attacked=attack, networks=networks, file=file)
    return about | dict(record=record, licence="Apache-2.0", **changes)


def test_leaderboard_ranks_by_what_an_informed_attacker_leaves(stage):
    import leaderboard

    record = summary_record(none=(99, 0), CAFD=(98, 5), AALP=(97, 96))
    models = {
        "aalp-mnist": published_model("cpu/summary/defences"),
        "aalp-large": published_model("cpu/aalp/table2"),
    }
    few, large = leaderboard.boards([("cpu", record, "summary.ipynb")], models)
    assert few.title == "MNIST, L-infinity, eps 0.2" and large.title == "MNIST, L-infinity, eps 0.3"
    assert [(place, e.defence) for place, e in few.ranked()] == [("1", "AALP"), ("2", "CAFD"), ("–", "none")]
    first, second = (e for _, e in few.ranked()[:2])
    assert first.models == ["aalp-mnist"] and first.flags == "none" and second.flags == "stuck"
    assert first.clean == "97 [92, 100]" and first.rejected == "7 [3, 12]" and first.cost == "2 passes"
    assert [e.models for e in large.entries] == [["aalp-large"]] and large.entries[0].flags == "PGD-100: none"
    text = leaderboard.page([("cpu", record, "summary.ipynb")], models)
    assert "## MNIST, L-infinity, eps 0.2" in text and "[aalp-mnist](#model-aalp-mnist)" in text
    assert "None is in this checkout" in leaderboard.page([], {})


def test_leaderboard_shows_every_defence_of_every_summary(project, site):
    text = (site / "leaderboard.html").read_text()
    for file in project.glob("data/results/*/summary/defences/record.json"):
        record = json.loads(file.read_text())
        for method in {r["method"] for r in record["rows"]} - {"none"}:
            assert f">{method}</span></a>" in text, (file, method)
        assert "eps " in text and "L-infinity" in text


def test_a_paper_page_begins_with_its_answer(project, site):
    for room in ("20_aalp", "30_two_stream", "40_cafd", "50_afg"):
        text = (site / room / "index.html").read_text()
        box = text.index("The answer")
        assert "verdict" in text[box - 200 : box] and box < text.index("<h2"), room


def test_guides_open_in_colab_where_their_first_cell_installs(project, site):
    for source in sorted((project / "nbs" / "70_howto").glob("*.ipynb")):
        text = (site / "70_howto" / f"{source.stem}.html").read_text()
        assert f"/blob/main/nbs/70_howto/{source.name}" in text and "Edit this page" in text, source.name
        first = next(c for c in json.loads(source.read_text())["cells"] if c["cell_type"] == "code")
        assert "pip install" in "".join(first["source"]), source.name


def test_install_page_names_every_extra(project, site):
    text = (site / "install.html").read_text()
    for extra in ("study", "attacks", "plots", "hub", "ray", "dask"):
        assert f">{extra}</span>" in text, extra


def radius_record(experiment: str, *rows: tuple[str, str, float]) -> dict:
    "A record with rows of one method: attack, metric, measured."
    of = dict(dataset="mnist", method="CAFD", published=None, low=0.0, high=100.0, n=60, seed=0, unit="%")
    parameters = {"datasets": ["mnist", "cifar10"], "eps": [0.2, 8 / 255], "eps_l2": [2.0, 0.5]}
    rows = [dict(of, attack=attack, metric=metric, measured=measured) for attack, metric, measured in rows]
    return dict(experiment=experiment, rows=rows, provenance={"parameters": parameters, "device": {"name": "cpu"}})


def test_a_row_shows_the_radius_it_was_attacked_with(stage):
    import results_page

    said = {
        "PGD-20": "0.2",
        "PGD-20, eps 0.1": "0.1",
        "feature adversary, eps 8/255": "8/255",
        "I: FGSM, 16/255": "16/255",
        "DDN": "2 (L2)",
        "PGD L2": "2 (L2)",
        "DeepFool": "–",
        "II: One-pixel": "–",
        "noise as long as BIM": "–",
        "clean": "–",
    }
    record = radius_record("cafd/epsilon", *((attack, "accuracy", 50.0) for attack in said))
    assert {row["attack"]: results_page.eps_of(record, row) for row in record["rows"]} == said


def test_curves_are_the_rows_of_a_record_by_radius(stage):
    import curves

    rows = [("clean", "accuracy, informed", 97.0)]
    rows += [(f"PGD-20, eps {eps}", "accuracy, informed", left) for eps, left in ((0.2, 13.0), (0.1, 68.0))]
    record = radius_record("cafd/epsilon", *rows)
    (panel,) = curves.panels(record, "cpu")
    (curve,) = panel.curves
    assert panel.title == "mnist, adaptive, PGD-20" and list(panel.names()) == ["CAFD"]
    assert [(p["radius"], p["measured"]) for p in curve.points] == [(0.0, 97.0), (0.1, 68.0), (0.2, 13.0)]
    record["rows"][0]["n"] = 217  # other images: no point of this curve, which is then too short to be one
    assert curves.panels(record, "cpu") == []
    sceptic = [("PGD-10", f"accuracy at eps {eps}", 50.0) for eps in (0, 0.1, 0.3)]
    assert len(curves.panels(radius_record("aalp/sceptic", *sceptic), "cpu")[0].curves[0].points) == 3
    assert curves.section([], "_static") == ""
    run = ("cpu", radius_record("aalp/sceptic", *sceptic), "x.html")
    assert curves.section([run], "_static") == curves.section([run], "_static")


# --- in a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    if chromium() is None:
        pytest.skip("no Chromium on this machine")
    with opened() as one:
        yield one


def address(site: Path, page: str) -> str:
    return (site / page.partition("?")[0]).as_uri() + "".join(page.partition("?")[1:])


def test_pages_log_no_error_and_load_nothing_from_elsewhere(browser: Browser, site):
    for page in (
        "index.html",
        "results.html",
        "leaderboard.html",
        "10_attacks/01_gradient.html",
        "api/afgstudy.attacks.gradient.html",
    ):
        browser.errors.clear()
        browser.requests.clear()
        browser.open(address(site, page))
        assert browser.errors == [] and browser.requests, page
        assert all(r.startswith(("file:", "data:", "blob:")) for r in browser.requests), page


SUMMARY = "experiments/summary/defences-cpu-mnist.html"
INSIDE = """[...document.querySelectorAll('*')].reduce(function gather(found, e) {
  if (!e.shadowRoot) return found;
  return [...e.shadowRoot.querySelectorAll('*')].reduce(gather, [...found, ...e.shadowRoot.querySelectorAll('canvas')]);
}, [])"""


def test_curves_are_drawn_without_a_request_to_elsewhere(browser: Browser, site):
    browser.errors.clear()
    browser.requests.clear()
    browser.open(address(site, SUMMARY), width=400)
    browser.until("window.Bokeh && Bokeh.documents.length > 1")
    browser.until(f"{INSIDE}.length >= Bokeh.documents.length")
    assert browser.errors == [] and any(r.endswith("bokeh.min.js") for r in browser.requests)
    assert all(r.startswith(("file:", "data:", "blob:")) for r in browser.requests)
    assert browser.value("document.documentElement.scrollWidth") <= 400
    legend = "Bokeh.documents[0].roots()[0].below.find((r) => r.click_policy)"
    assert browser.value(f"{legend}.click_policy") == "hide" and browser.value(f"{legend}.items.length") > 1


def test_search_finds_deepfool(browser: Browser, site):
    browser.open(address(site, "search.html?q=DeepFool"))
    browser.until("document.querySelectorAll('#search-results li').length > 0")
    assert "DeepFool" in browser.value("document.querySelector('#search-results').innerText")


SHOWN = "[...document.querySelectorAll('.results tbody tr')]"
PLACE = "[...document.querySelectorAll('.results th')].map((t) => t.textContent)"


def choose(browser: Browser, name: str, value: str) -> None:
    field = f"document.querySelector('.results [name={name}]')"
    browser.value(f"{field}.value = {json.dumps(value)}; {field}.dispatchEvent(new Event('change')); 1")


def test_results_can_be_filtered_and_sorted(browser: Browser, site):
    browser.open(address(site, "results.html?words=Madry"))
    assert browser.value(f"{SHOWN}.length") > 0
    assert browser.value(f"{SHOWN}.every((r) => r.textContent.includes('Madry'))")
    column = browser.value(PLACE).index("measured")
    numbers = f"{SHOWN}.map((r) => r.cells[{column}].textContent).filter((t) => t !== '–')"
    browser.value(f"document.querySelectorAll('.results th button')[{column}].click()")
    values = [float(v.replace(",", "").replace("−", "-")) for v in browser.value(numbers)]
    assert values == sorted(values) and len(set(values)) > 1
    browser.value(f"document.querySelectorAll('.results th button')[{column}].click()")
    falling = [float(v.replace(",", "").replace("−", "-")) for v in browser.value(numbers)]
    assert falling == sorted(falling, reverse=True) and "sort=-measured" in browser.value("location.search")


def test_lists_offer_what_is_left_and_the_address_keeps_the_view(browser: Browser, site):
    browser.open(address(site, "results.html"))
    offered = "[...document.querySelector('.results [name=table]').options].map((o) => o.value)"
    before = browser.value(offered)
    choose(browser, "paper", "cafd")
    after = browser.value(offered)
    assert set(after) < set(before) and "unseen" in after and "table8" not in after
    browser.value("document.querySelector('.results [name=published]').click()")
    choose(browser, "paper", "aalp")
    column = browser.value(PLACE).index("published")
    assert browser.value(f"{SHOWN}.every((r) => r.cells[{column}].textContent !== '–')")
    browser.value("document.querySelector('.results-after').click()")
    seen, view = browser.value(f"{SHOWN}.map((r) => r.textContent)"), browser.value("location.search")
    assert "paper=aalp" in view and "published=1" in view and "page=2" in view
    browser.open(address(site, "results.html") + view)
    assert browser.value(f"{SHOWN}.map((r) => r.textContent)") == seen


def test_results_come_fifty_at_a_time_and_as_csv(browser: Browser, site):
    browser.open(address(site, "results.html"))
    data = results_data(site)
    assert browser.value(f"{SHOWN}.length") == data["at_once"] == 50
    browser.value("document.querySelector('.results-csv').click()")
    assert browser.value("document.querySelector('.results').dataset.csv") == str(len(data["rows"]))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1024, 1300, 1536])
def test_results_fit_the_window_and_keep_their_header(browser: Browser, site, width, dark):
    browser.open(address(site, "results.html"), width=width, dark=dark)
    assert browser.value("document.documentElement.scrollWidth") <= width
    box = "document.querySelector('.results-scroll')"
    assert browser.value(f"{box}.getBoundingClientRect().right") <= width
    browser.value(f"{box}.scrollTop = 400")
    top = f"document.querySelector('.results th').getBoundingClientRect().top - {box}.getBoundingClientRect().top"
    assert browser.value(f"{box}.scrollTop") == 400 and abs(browser.value(top)) <= 2


def test_the_front_page_decides_on_a_phone(browser: Browser, site):
    browser.open(address(site, "index.html"), width=400)
    figure = "document.querySelector('article img').getBoundingClientRect()"
    natural = "document.querySelector('article img').naturalWidth"
    # text of ten points is drawn with at least nine pixels, and the whole figure fits the screen
    assert browser.value(f"{figure}.width / {natural}") * 10 * 96 / 72 >= 9
    assert browser.value(f"{figure}.right") <= 400 and browser.value(f"{figure}.bottom") <= 900
    browser.open(address(site, "leaderboard.html"), width=1300)
    assert browser.value("[...document.querySelectorAll('article tr')].every((r) => r.offsetHeight < 200)")


def test_a_phone_can_read_it_and_dark_is_dark(browser: Browser, site):
    for page in ("index.html", "results.html", "leaderboard.html", "10_attacks/01_gradient.html"):
        browser.open(address(site, page), width=400)
        assert browser.value("document.documentElement.scrollWidth") <= 400, page
    light = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0)"
    browser.open(address(site, "index.html"))
    assert browser.value(light) > 600
    browser.open(address(site, "index.html"), dark=True)
    assert browser.value(light) < 200


def test_mathematics_comes_from_here(site, pages):
    with_formulas = [name for name in pages if 'class="math' in (site / name).read_text()]
    assert with_formulas
    for name in with_formulas:
        assert any("mathjax/MathJax.js" in address for address in pages[name].loads), name
    mathjax = site / "_static" / "mathjax"
    for part in ("config/TeX-AMS-MML_HTMLorMML-full.js", "jax/output/HTML-CSS/fonts/STIX-Web/fontdata.js"):
        assert (mathjax / part).is_file()
    assert list((mathjax / "fonts" / "HTML-CSS" / "STIX-Web" / "woff").glob("*.woff"))


def test_search_finds_the_attacks(site):
    index = (site / "searchindex.js").read_text()
    index = json.loads(index.removeprefix("Search.setIndex(").removesuffix(")"))
    for word in ("DeepFool", "PGD", "Wilson"):
        hits = index["terms"].get(word.lower()) or index["titleterms"].get(word.lower())
        assert hits, f"{word} is not in the search index"


def test_directives_and_hidden_cells_are_not_shown(pages, site):
    for name in pages:
        text = re.sub(r"<[^>]+>", "", (site / name).read_text())
        assert not re.search(r"^#\|\s*(export|hide|default_exp|echo|eval|slow)", text, flags=re.M), name


def test_reference_documents_every_exported_name(project, site, pages):
    from importlib import import_module

    modules = [
        name.removesuffix(".html").removeprefix("api/") for name in pages if name.startswith("api/afgstudy")
    ]
    assert "afgstudy.attacks.gradient" in modules
    for module in modules:
        page, live = (site / "api" / f"{module}.html").read_text(), import_module(module)
        names = [n for n in live.__all__ if not isinstance(getattr(live, n), click.Command)]
        missing = [name for name in names if f">{name}<a" not in page and f">{name}</span>" not in page]
        assert missing == [], module
    assert "<h3>afgstudy data get<a" in (site / "api" / "afgstudy.study.cli.html").read_text()
    assert "8 / 255" in re.sub(r"<[^>]+>", "", (site / "api" / "afgstudy.attacks.gradient.html").read_text())


def test_formulas_have_single_backslashes(project):
    for path in (*(project / "nbs").rglob("*.ipynb"), *(project / "data" / "results").rglob("*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] == "markdown":
                text = re.sub(r"^```.*?^```|`[^`\n]+`", "", "".join(cell["source"]), flags=re.M | re.S)
                doubled = re.search(r".*\\\\[A-Za-z{}|,;].*", text)
                assert not doubled, f"{path.name}: {doubled[0]}"


# --- what the builder refuses, and its parts ------------------------------------------------------


@pytest.fixture
def stage(project, monkeypatch):
    monkeypatch.syspath_prepend(project / "docs")
    import stage

    return stage


def notebook_with(stage, *cells: tuple[str, str]):
    made = {"code": stage.nbformat.v4.new_code_cell, "markdown": stage.nbformat.v4.new_markdown_cell}
    return stage.nbformat.v4.new_notebook(cells=[made[kind](source) for kind, source in cells])


def test_shown_drops_directives_and_hidden_cells(stage):
    notebook = notebook_with(
        stage,
        ("code", "#| default_exp a"),
        ("code", "#| hide\nx = 1"),
        ("code", "#| export\n#| slow\nx = 2"),
        ("code", "#| echo: false\nx = 3"),
        ("code", "x = 4  #| not a directive"),
    )
    cells = stage.shown(notebook).cells
    assert [c.source for c in cells] == ["x = 2", "x = 3", "x = 4  #| not a directive"]
    assert [c.metadata.tags for c in cells] == [["exported"], ["remove-input"], []]


def test_markdown_gets_links_but_code_and_formulas_do_not(stage, tmp_path):
    site = stage.Site(tmp_path, tmp_path / "pages")
    site.labels = {"PGD": "afgstudy.attacks.gradient.PGD"}
    site.references = {("Madry", "2018"): "madry2018"}
    site.shown_at = {"nbs/b/c.ipynb": "b/c.ipynb"}
    for text, expected in {
        "# `PGD`": "# `PGD`",
        "`PGD`, `pgd`": "[`PGD`](#afgstudy.attacks.gradient.PGD), `pgd`",
        "Madry et al. (2018)": "{cite:t}`madry2018`",
        "(Madry et al. 2018, Nobody 2018)": "({cite:alp}`madry2018`, Nobody 2018)",
        "[c](../b/c.ipynb#x) [w](https://w.org/a)": "[c](../b/c.ipynb#x) [w](https://w.org/a)",
        "$Madry 2018$ `Madry 2018`": "$Madry 2018$ `Madry 2018`",
        "```\n`PGD` [c](d)\n```\n`PGD`": "```\n`PGD` [c](d)\n```\n[`PGD`](#afgstudy.attacks.gradient.PGD)",
    }.items():
        assert site.markdown(text, "nbs/a/a.ipynb", "a/a.ipynb") == expected
    assert site.markdown("[c](../b/c.ipynb)", "nbs/a/a.ipynb", "x.ipynb") == "[c](b/c.ipynb)"


def test_a_link_to_nothing_ends_the_build_with_its_place(stage, tmp_path):
    (tmp_path / "folder").mkdir()
    site = stage.Site(tmp_path, tmp_path / "pages")
    for link, why in (("gone.md", "not there"), ("../folder", "folder"), ("../../out.md", "not there")):
        with pytest.raises(stage.SiteError, match=rf"^nbs/a\.ipynb links to .*{why}"):
            site.markdown(f"[x]({link})", "nbs/a.ipynb", "a.ipynb")


def test_second_build_changes_nothing(stage, project, tmp_path):
    for room in ("nbs", "docs", "data"):
        shutil.copytree(
            project / room, tmp_path / "p" / room, ignore=shutil.ignore_patterns("sets", ".*", "__pycache__")
        )
    for name in ("CITATION.cff", "LICENSE", "CHANGELOG.md"):
        shutil.copy(project / name, tmp_path / "p" / name)
    to = tmp_path / "pages"
    stage.build(tmp_path / "p", to)
    before = {p: p.stat().st_mtime_ns for p in to.rglob("*") if p.is_file()}
    (to / "stale.md").write_text("left by an earlier build")
    stage.build(tmp_path / "p", to)
    assert {p: p.stat().st_mtime_ns for p in to.rglob("*") if p.is_file()} == before


A_RECORD = {"experiment": "aalp/table2", "title": "", "preset": "cpu", "rows": [], "figures": [], "notes": []}
A_RECORD |= {
    "provenance": {
        "key": None,
        "parameters": {"eps": 8 / 255},
        "seeds": [0],
        "revision": None,
        "versions": {},
    }
    | {
        "device": {"kind": "cpu", "name": "x86", "threads": 1},
        "started": "2026-01-01T00:00:00",
        "seconds": 1800,
    }
    | {"datasets": [], "artifacts": []}
}
HOSTILE = """<script>window.hurt = 1</script> {{ 7 * 7 }} `x` {raw}`html <blink>` ```{raw} html
<img src=x onerror="window.hurt = 2">
```
:::{raw} html
<script>window.hurt = 3</script>
:::
[link](javascript:alert(1)) ![x](../../x.png) | $x$ % +++ ../../etc (label)= &amp; """


def hostile_record() -> dict:
    "A record with markup in every field that takes text."
    row = {k: f"{k} {HOSTILE}" for k in ("dataset", "method", "attack", "metric", "unit")}
    row |= {"published": 90.0, "measured": 80.0, "low": 70.0, "high": 85.0, "n": 10, "seed": 0}
    run = {k: f"{k} {HOSTILE}" for k in ("dataset", "method", "attack")}
    run |= {"seed": 0, "flags": [HOSTILE], "components": [{"name": HOSTILE, "accuracy": 1.0}]}
    said = A_RECORD["provenance"] | {
        "parameters": {HOSTILE: HOSTILE, "network": HOSTILE},
        "versions": {HOSTILE: HOSTILE},
    }
    said |= {
        "device": {"kind": HOSTILE, "name": HOSTILE, "threads": HOSTILE},
        "started": HOSTILE,
        "seeds": [HOSTILE],
    }
    said |= {"datasets": [{"name": HOSTILE, "split": HOSTILE, "n": 1, "checksum": HOSTILE}]}
    said |= {"artifacts": [{"kind": HOSTILE, "key": HOSTILE}], "key": HOSTILE}
    said |= {"revision": {"commit": HOSTILE, "dirty": False}}
    record = A_RECORD | {
        "title": HOSTILE,
        "rows": [row],
        "notes": [HOSTILE],
        "attacks": [run],
        "provenance": said,
    }
    return record | {"figures": [{"name": "fig", "caption": HOSTILE}]}


class Elements(HTMLParser):
    "Tags with their attributes, and the text of a page."

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_hostile_record_is_text_in_the_report(tmp_path):
    from afgstudy.study import report

    record = hostile_record() | {"folder": tmp_path, "preset": '"><script>window.hurt = 4</script>'}
    page = Elements(report.html_page([record, record | {"preset": "smoke"}]))
    assert {tag for tag, _ in page.tags} & {"script", "img", "blink"} == set()
    assert not [a for _, has in page.tags for a in has if a.startswith("on")]
    for field in ("method", "attack", "dataset", "metric"):
        assert f"{field} <script>window.hurt = 1</script> {{{{ 7 * 7 }}}}" in page.text


def test_a_hostile_record_is_text_on_the_site(stage, project, tmp_path):
    import results_page

    folder = tmp_path / "p" / "data" / "results" / "cpu" / "aalp" / "table2"
    (folder / "figures").mkdir(parents=True)
    (folder / "figures" / "fig.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (folder / "record.json").write_text(json.dumps(hostile_record()))
    site = stage.Site(tmp_path / "p", tmp_path / "pages")
    sources, runs = stage.experiments(site)
    stage.write_experiments(site, sources, runs)
    site.write("results.md", results_page.page([(r.experiment, r.preset, r.record, "x.html") for r in runs]))
    site.write(
        "index.md",
        "# Pages\n\n" + stage.toctree("", ["experiments/aalp/table2-cpu", "results", "70_howto/00_numbers"]),
    )
    numbers = notebook_with(stage, ("markdown", "# Numbers"))
    site.write("70_howto/00_numbers.ipynb", stage.nbformat.writes(numbers))
    site.write("references.bib", b"")
    shutil.copytree(project / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(project / "settings.ini", tmp_path / "settings.ini")
    (tmp_path / "docs" / "references.bib").write_text("")
    command = [sys.executable, "-m", "sphinx", "-q", "-b", "html", "-c", tmp_path / "docs"]
    made = subprocess.run([*command, tmp_path / "pages", tmp_path / "html"], capture_output=True, text=True)
    assert made.returncode == 0 and "WARNING" not in made.stderr, made.stderr
    for name in ("experiments/aalp/table2-cpu.html", "results.html"):
        page = Elements((tmp_path / "html" / name).read_text())
        assert not [
            has for tag, has in page.tags if tag == "img" and not has["src"].endswith((".svg", "fig.svg"))
        ]
        assert not [a for _, has in page.tags for a in has if a in ("onerror", "onload")], name
        assert "<script>window" not in (tmp_path / "html" / name).read_text(), name
        assert "<script>window.hurt = 1</script>" in page.text and "{{ 7 * 7 }}" in page.text
        assert "javascript:" not in {str(has.get("href"))[:11] for tag, has in page.tags if tag == "a"}


def test_what_is_no_record_is_refused_by_name(stage, tmp_path):
    folder = tmp_path / "data" / "results" / "cpu" / "aalp" / "table2"
    site = stage.Site(tmp_path, tmp_path / "pages")
    (folder / "record.json").mkdir(parents=True)
    with pytest.raises(stage.SiteError, match=r"table2/record\.json should be a record, and is a folder"):
        stage.results(site)
    (folder / "record.json").rmdir()
    for change, named in (
        ({"figures": [{"name": "../../out"}]}, r"figures\[0\]\.name"),
        ({"preset": "../cpu"}, "preset"),
        ({"format": 2}, "format 2"),
        ({"experiment": "aalp/../table2"}, "experiment"),
        ({"preset": "paper"}, "holds the record of aalp/table2 with preset paper"),
    ):
        (folder / "record.json").write_text(json.dumps(A_RECORD | change))
        with pytest.raises(stage.SiteError, match=named):
            stage.results(site)
    (folder / "record.json").write_text("{")
    with pytest.raises(stage.SiteError, match="not JSON"):
        stage.results(site)


def test_committed_run_without_a_notebook_gets_a_page(stage, tmp_path):
    folder = tmp_path / "data" / "results" / "cpu" / "aalp" / "table2"
    (folder / "figures").mkdir(parents=True)
    (folder / "figures" / "fig.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    row = dict(
        dataset="mnist", method="RAW", attack="PGD-40", metric="accuracy", published=0.64, measured=None
    )
    row |= dict(low=None, high=None, n=None, unit="%")
    rows = [row, row | dict(attack="clean", measured=98.9, low=98.7, high=99.1, n=10_000)]
    record = A_RECORD | {"title": "Table 2", "rows": rows, "notes": ["A note."]}
    record |= {"figures": [{"name": "fig", "caption": "Seen"}]}
    (folder / "record.json").write_text(json.dumps(record))
    site = stage.Site(tmp_path, tmp_path / "pages")
    made = stage.write_experiments(site, *stage.experiments(site))
    assert made == {"aalp": ["experiments/aalp/table2-cpu.md"]}
    assert stage.short_title(site, made["aalp"][0]) == "Table 2 (cpu)"
    page = (site.to / "experiments" / "aalp" / "table2-cpu.md").read_text()
    assert "| RAW | PGD-40 | 0.64 | – | – | – |" in page
    assert "| RAW | clean | 0.64 | 98.90 [98.70, 99.10] | +98.26 | 10,000 |" in page
    assert "30 min" in page and "A note." in page and "mnist: accuracy, % (L-infinity, eps 8/255)" in page
    links = re.findall(r"\]\(([^)]+)\)|\{download\}`[^`<]+<([^>]+)>`", page)
    assert len(links) == 3  # the record, and the figure to see and to keep
    for target in (a or b for a, b in links):
        assert ((site.to / "experiments" / "aalp") / target).resolve().is_file(), target


def test_readme_links_lead_somewhere(project):
    readme = (project / "README.md").read_text()
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", readme) if not is_elsewhere(link)]
    assert len(links) >= 5
    assert [link for link in links if not (project / link.partition("#")[0]).exists()] == []
