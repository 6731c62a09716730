"""Write README.md from nbs/index.ipynb, or with `--check` say whether it is up to date.

What a reader of the notebook does not need to see (directives, hidden cells) is left out as on the site, and links are
turned round: the notebook's count from nbs/, the README's from the project's root.
"""

import argparse
import sys
from difflib import unified_diff
from pathlib import Path

from nbconvert import MarkdownExporter
from stage import ROOT, SiteError, change_markdown, read_notebook, relink, shown
from traitlets.config import Config


def existing(root: Path, path: str, fragment: str) -> str:
    "The link as the README has it; `SiteError` where it leads nowhere."
    if path.startswith("..") or not (root / path).exists():
        raise SiteError(f"nbs/index.ipynb links to {path}, which is not there")
    return path + (f"#{fragment}" if fragment else "")


def readme(root: Path) -> str:
    "The text of README.md."
    notebook = shown(read_notebook(root / "nbs" / "index.ipynb"))
    change_markdown(notebook, lambda text: relink(text, "nbs", lambda path, part: existing(root, path, part)))
    tags = {
        "remove_input_tags": {"remove-input"},
        "remove_all_outputs_tags": {"remove-output"},
        "enabled": True,
    }
    text, resources = MarkdownExporter(config=Config(TagRemovePreprocessor=tags)).from_notebook_node(notebook)
    if resources.get("outputs"):
        raise SiteError("nbs/index.ipynb has pictures in its outputs; link to files in the project instead")
    lines = [line.rstrip() for line in text.strip().splitlines()]
    kept = [line for line, before in zip(lines, [None, *lines], strict=False) if line or before]
    return "\n".join(kept) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if README.md is not up to date"
    )
    check = parser.parse_args().check
    path = ROOT / "README.md"
    try:
        text = readme(ROOT)
    except SiteError as e:
        sys.exit(str(e))
    before = path.read_text() if path.exists() else ""
    if not check:
        path.write_text(text)
    elif before != text:
        difference = list(
            unified_diff(before.splitlines(), text.splitlines(), "README.md", "nbs/index.ipynb", n=1)
        )
        lines = "\n".join(difference[:30])
        sys.exit(
            f"README.md is not what nbs/index.ipynb makes of it; write it with: python docs/readme.py\n{lines}"
        )


if __name__ == "__main__":
    main()
