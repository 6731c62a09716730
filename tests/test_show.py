"""Cells of experiments that are tagged `show` enter no key: so they may only draw and print."""

import ast
import json
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).parents[1] / "nbs" / "experiments").glob("*/*.ipynb"))
UNTAGGED = {"aalp/fig6", "aalp/sceptic"}  # a campaign's runs are keyed with the code of these as it is


def _bound(args: ast.arguments) -> set[str]:
    every = [*args.posonlyargs, *args.args, *args.kwonlyargs, *filter(None, [args.vararg, args.kwarg])]
    return {a.arg for a in every}


def _inner(node: ast.AST, own: set[str]) -> set[str]:
    "Names that an expression or a function takes from outside, beside `own`."
    if isinstance(node, ast.Lambda | ast.FunctionDef):
        body = node.body if isinstance(node.body, list) else [node.body]
        inside = (
            own
            | _bound(node.args)
            | {
                n.id
                for b in body
                for n in ast.walk(b)
                if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
            }
        )
        outside = [
            *node.args.defaults,
            *filter(None, node.args.kw_defaults),
            *getattr(node, "decorator_list", []),
        ]
        return set().union(*(_inner(b, inside) for b in body), *(_inner(o, own) for o in outside))
    if isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
        own = own | {n.id for g in node.generators for n in ast.walk(g.target) if isinstance(n, ast.Name)}
    if isinstance(node, ast.Name):
        return {node.id} - own if isinstance(node.ctx, ast.Load) else set()
    return set().union(*(_inner(c, own) for c in ast.iter_child_nodes(node)))


def stored(node: ast.AST) -> set[str]:
    "Names that a statement defines."
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    names |= {n.name for n in ast.walk(node) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    return names | {(n.asname or n.name).split(".")[0] for n in ast.walk(node) if isinstance(n, ast.alias)}


def taken(body: list[ast.stmt], known: frozenset = frozenset()) -> set[str]:
    "Names that statements, one after another, take from before them."
    found, own = set(), set(known)
    for node in body:
        if isinstance(node, ast.For | ast.While | ast.If | ast.With):
            heads = [getattr(node, n) for n in ("iter", "test") if hasattr(node, n)]
            heads += [i.context_expr for i in getattr(node, "items", [])]
            found |= set().union(*(_inner(h, own) for h in heads))
            targets = [getattr(node, "target", None), *(i.optional_vars for i in getattr(node, "items", []))]
            inside = frozenset(own | set().union(*(stored(t) for t in targets if t)))
            found |= taken(node.body, inside) | taken(getattr(node, "orelse", []), frozenset(own))
        else:
            found |= _inner(node, own)
            if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
                found |= {node.target.id} - own
        own |= stored(node)
    return found


def code_cells(page: Path) -> list[tuple[ast.Module, list[str]]]:
    "Syntax tree and tags of every code cell."
    cells = [c for c in json.loads(page.read_text())["cells"] if c["cell_type"] == "code"]
    return [(ast.parse("".join(c["source"])), c["metadata"].get("tags", [])) for c in cells]


def calls_of_exp(tree: ast.AST) -> set[str]:
    "What is called of `exp`."
    calls = [n.func for n in ast.walk(tree) if isinstance(n, ast.Call)]
    return {f.attr for f in calls if isinstance(f, ast.Attribute) and getattr(f.value, "id", "") == "exp"}


def needed(trees: list[ast.Module], tags: list[list[str]], i: int) -> set[str]:
    "Names that cell `i` defines and a later cell without the tag takes."
    later = [taken(t.body) for t, tag in zip(trees[i + 1 :], tags[i + 1 :], strict=True) if "show" not in tag]
    return stored(trees[i]) & set().union(*later)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_cells_tagged_show_draw_and_print_and_define_nothing_that_others_take(page):
    trees, tags = zip(*code_cells(page), strict=True)
    for i, tree in enumerate(trees):
        calls = calls_of_exp(tree)
        if "show" in tags[i]:
            assert not needed(trees, tags, i), (
                f"cell {i} defines {needed(trees, tags, i)}, which is needed later"
            )
            assert calls <= {"figure", "table"}, f"cell {i} records something: {calls}"
        elif f"{page.parent.name}/{page.stem}" not in UNTAGGED and calls == {"figure"}:
            assert needed(trees, tags, i), f"cell {i} only draws: tag it `show`"


@pytest.mark.parametrize(
    ("first", "second", "names"),
    [
        ("a = 1", "print(a)", {"a"}),
        ("fig, ax = f()", "fig, ax = g()\nax.set(b)", set()),
        ("x = 1", "[x for x in range(3)]", set()),
        ("x = 1", "def f(x):\n    return x", set()),
        ("x = 1", "def f(y):\n    return x", {"x"}),
        ("x = 1", "for x in y:\n    print(x)", set()),
        ("x = 1", "x += 1", {"x"}),
        ("def f(): pass", "with f() as g:\n    g()", {"f"}),
    ],
)
def test_what_a_cell_takes_from_an_earlier_one(first, second, names):
    assert needed([ast.parse(first), ast.parse(second)], [["show"], []], 0) == names
