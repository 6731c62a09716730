"""Sphinx's configuration. The pages themselves are laid out by docs/stage.py; nothing is fetched from a network."""

import shutil
from configparser import ConfigParser
from pathlib import Path

import sphinxcontrib.bibtex.plugin
from sphinxcontrib.bibtex.style.referencing import BracketStyle
from sphinxcontrib.bibtex.style.referencing.author_year import AuthorYearReferenceStyle

HERE = Path(__file__).resolve().parent
settings = ConfigParser(delimiters=["="])
settings.read(HERE.parent / "settings.ini", encoding="utf-8")
settings = settings["DEFAULT"]

project = settings["title"]
author = settings["author"]
version = release = settings["version"]
copyright = settings["copyright"]

extensions = ["myst_nb", "sphinxcontrib.bibtex", "sphinx_copybutton"]
source_suffix = {".ipynb": "myst-nb", ".md": "myst-nb"}
exclude_patterns = ["files/**/*.ipynb"]
suppress_warnings = []

# notebooks are shown with the outputs they were committed with
nb_execution_mode = "off"
nb_merge_streams = True
nb_output_stderr = "remove"
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
nb_render_markdown_format = "myst"
nb_ipywidgets_js = {}
myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
myst_update_mathjax = False

# mathematics: MathJax 2.7 as the package jupyter-server-mathjax carries it, its fonts included
mathjax_path = "mathjax/MathJax.js"
mathjax2_config = {
    "config": ["TeX-AMS-MML_HTMLorMML-full.js"],
    "HTML-CSS": {
        "availableFonts": [],
        "preferredFont": None,
        "webFont": "STIX-Web",
        "imageFont": None,
        "linebreaks": {"automatic": True},
        # MathJax's own stand-in asks for about:blank, which browsers log as an error
        "styles": {"@font-face": {"font-family": "MathJax_Blank", "src": "local('MathJax_Blank')"}},
    },
    "tex2jax": {
        "inlineMath": [["\\(", "\\)"]],
        "displayMath": [["\\[", "\\]"]],
        "processEnvironments": False,
        "ignoreClass": "page",
        "processClass": "math",
    },
    "messageStyle": "none",
    "showMathMenu": False,
}


class RoundReferenceStyle(AuthorYearReferenceStyle):
    "Madry et al. (2018)."

    def __init__(self):
        round_brackets = BracketStyle(left="(", right=")")
        super().__init__(
            bracket_parenthetical=round_brackets,
            bracket_textual=round_brackets,
            bracket_author=round_brackets,
            bracket_label=round_brackets,
            bracket_year=round_brackets,
        )


sphinxcontrib.bibtex.plugin.register_plugin(
    "sphinxcontrib.bibtex.style.referencing", "round", RoundReferenceStyle
)
bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "round"
bibtex_default_style = "plain"

html_theme = "furo"
html_title = project
html_favicon = "_static/favicon.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["results.js"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True, "top_of_page_buttons": []}
pygments_style = "friendly"
pygments_dark_style = "github-dark"


def carry_mathjax(app, error) -> None:
    "Copy the part of MathJax that the pages load into the built site."
    if error or app.builder.format != "html":
        return
    import jupyter_server_mathjax

    source = Path(jupyter_server_mathjax.__file__).parent / "static"
    target = Path(app.outdir) / "_static" / "mathjax"
    if (target / "MathJax.js").exists():
        return
    unused = shutil.ignore_patterns("localization", "SVG", "a11y", "mhchem*", "*preview*")
    shutil.copytree(source, target, ignore=unused, dirs_exist_ok=True)


def carry_bokeh(app, error) -> None:
    "Copy Bokeh's script, which the pages with curves load, into the built site."
    if error or app.builder.format != "html":
        return
    import bokeh

    script = Path(bokeh.__file__).parent / "server" / "static" / "js" / "bokeh.min.js"
    shutil.copy2(script, Path(app.outdir) / "_static" / script.name)


def setup(app):
    app.connect("build-finished", carry_mathjax)
    app.connect("build-finished", carry_bokeh)
