"""The reference of a module as Markdown: nbdev's `show_doc` for every exported symbol, with a renderer of its own.

Types and defaults are shown as the source has them: `8 / 255`, not 0.03137254901960784.
"""

import ast
import dataclasses
import inspect
import re
import textwrap
from types import ModuleType

import click
from fastcore.docments import docments
from nbdev.showdoc import show_doc

WIDTH = 88


def parsed(sym: object) -> tuple[str, ast.AST | None]:
    "Source of a class or function and its syntax tree; nothing where there is no source."
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(sym)))
        return source, ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError):
        return "", None


@dataclasses.dataclass
class Parameter:
    "A parameter as the source has it."

    name: str
    type: str = ""
    default: str = ""
    details: str = ""
    mark: str = ""  # "*" or "**" before the name

    def __str__(self) -> str:
        text = self.mark + self.name + (f": {self.type}" if self.type else "")
        return text + ((f" = {self.default}" if self.type else f"={self.default}") if self.default else "")


def of_function(function: object) -> tuple[list[Parameter], str]:
    "The parameters of a function, without `self`, and what it returns."
    source, tree = parsed(function)
    if not isinstance(tree, ast.FunctionDef | ast.AsyncFunctionDef):
        return [], ""

    def text(node: ast.AST | None) -> str:
        return "" if node is None else re.sub(r"\s+", " ", ast.get_source_segment(source, node) or "")

    a = tree.args
    plain = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(plain) - len(a.defaults)) + a.defaults
    found = [Parameter(p.arg, text(p.annotation), text(d)) for p, d in zip(plain, defaults, strict=True)]
    if a.vararg:
        found.append(Parameter(a.vararg.arg, text(a.vararg.annotation), mark="*"))
    elif a.kwonlyargs:
        found.append(Parameter("", mark="*"))
    found += [
        Parameter(p.arg, text(p.annotation), text(d))
        for p, d in zip(a.kwonlyargs, a.kw_defaults, strict=True)
    ]
    if a.kwarg:
        found.append(Parameter(a.kwarg.arg, text(a.kwarg.annotation), mark="**"))
    found = [p for p in found if p.name not in ("self", "cls")]
    return with_details(found, function), text(tree.returns)


def of_fields(cls: type) -> list[Parameter]:
    "The fields of a dataclass or a named tuple, the inherited ones first."
    found: dict[str, Parameter] = {}
    for base in reversed(cls.__mro__):
        source, tree = parsed(base) if base.__module__.startswith("afgstudy") else ("", None)
        for node in tree.body if isinstance(tree, ast.ClassDef) else []:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                default = ast.get_source_segment(source, node.value) if node.value else ""
                found[node.target.id] = Parameter(
                    node.target.id, ast.get_source_segment(source, node.annotation), default
                )
        if tree:
            with_details(list(found.values()), base)
    initial = (
        {f.name for f in dataclasses.fields(cls) if f.init}
        if dataclasses.is_dataclass(cls)
        else set(cls._fields)
    )
    return [p for name, p in found.items() if name in initial]


def with_details(parameters: list[Parameter], sym: object) -> list[Parameter]:
    "The same parameters with the comments that stand beside them in the source of `sym`."
    try:
        comments = docments(inspect.unwrap(sym), returns=False)
    except Exception:  # a signature that cannot be read has no comments either
        comments = {}
    for p in parameters:
        p.details = comments.get(p.name) or p.details
    return parameters


def parameters_of(sym: object) -> tuple[list[Parameter], str]:
    "Parameters and returned type of whatever can be called."
    if not inspect.isclass(sym):
        return of_function(sym)
    if dataclasses.is_dataclass(sym) or hasattr(sym, "_fields"):
        return of_fields(sym), ""
    return of_function(sym.__init__) if "__init__" in vars(sym) else ([], "")


def signature(name: str, sym: object) -> str:
    "The signature in one line if it fits, else one parameter a line."
    parameters, returns = parameters_of(sym)
    arrow = f" -> {returns}" if returns else ""
    word = "class" if inspect.isclass(sym) else "def"
    if inspect.isclass(sym) and not parameters:
        bases = [b.__name__ for b in sym.__bases__ if b is not object]
        return f"class {name}({', '.join(bases)})" if bases else f"class {name}"
    line = f"{word} {name}({', '.join(map(str, parameters))}){arrow}"
    if len(line) <= WIDTH:
        return line
    lines = [f"    {p}," for p in parameters]
    return "\n".join([f"{word} {name}(", *lines, f"){arrow}"])


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").strip()


def table(parameters: list[Parameter]) -> str:
    "The documented parameters as a table; nothing where none has a word of its own."
    rows = [p for p in parameters if p.name]
    if not any(p.details for p in rows):
        return ""
    lines = ["| parameter | type | default | |", "|---|---|---|---|"]
    for p in rows:
        values = [f"`{cell(v)}`" if v else "" for v in (p.mark + p.name, p.type, p.default)]
        lines.append("| " + " | ".join([*values, cell(p.details)]) + " |")
    return "\n".join(lines)


def documentation(sym: object) -> str:
    "The docstring as Markdown; not the one that `dataclass` or `NamedTuple` make up, nor an inherited one."
    text = inspect.cleandoc(getattr(sym, "__doc__", None) or "")
    name = getattr(sym, "__name__", "")
    return "" if name and text.startswith(f"{name}(") else text


@dataclasses.dataclass
class SiteRenderer:
    "What `show_doc` shows of a symbol: heading, signature, docstring, parameters."

    sym: object
    name: str
    title_level: int = 3

    def _repr_markdown_(self) -> str:
        sym = inspect.unwrap(self.sym)
        code = signature(self.name.split(".")[-1], sym)
        parts = ["#" * self.title_level + f" {self.name}", f"```python\n{code}\n```", documentation(sym)]
        return "\n\n".join(p for p in [*parts, table(parameters_of(sym)[0])] if p)


def members(cls: type) -> list[tuple[str, object]]:
    "The documented methods and properties that a class defines itself."
    found = []
    for name, member in vars(cls).items():
        function = getattr(member, "fget", None) or getattr(member, "__func__", member)
        public = not name.startswith("_") or name in ("__call__", "__getitem__", "__iter__")
        if public and inspect.isroutine(function) and documentation(function):
            found.append((name, member))
    return found


def assignment(name: str, module: ModuleType) -> ast.stmt | None:
    "The statement of a module that sets a constant; None where the module only imports it."
    for node in ast.parse(inspect.getsource(module)).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(t, ast.Name) and t.id == name for t in targets):
            return node
    return None


def constant(name: str, module: ModuleType, longest: int = 14) -> str:
    "The line of source that sets a constant, cut where it is long."
    node = assignment(name, module)
    if node is None:
        return f"{name} = {getattr(module, name)!r}"
    lines = inspect.getsource(module).splitlines()[node.lineno - 1 : node.end_lineno]
    return "\n".join(lines if len(lines) <= longest else [*lines[: longest - 1], "    ..."])


def command(name: str, sym: object, level: int) -> str:
    "A click command and its subcommands: what `--help` prints."

    def helps(command: click.Command, path: str, parent: click.Context | None) -> list[str]:
        context = click.Context(command, info_name=path.split()[-1], parent=parent, max_content_width=WIDTH)
        text = [f"{'#' * (level + bool(parent))} {path}\n\n```text\n{command.get_help(context)}\n```"]
        for sub in getattr(command, "commands", {}).values():
            text += helps(sub, f"{path} {sub.name}", context)
        return text

    return "\n\n".join(helps(sym, "afgstudy" if name == "main" else name, None))


def symbol(name: str, module: ModuleType, label: str, level: int = 2) -> str:
    "One exported symbol with its public members; `label` is what links to it."
    sym = getattr(module, name)
    head = f"({label})=\n"
    if isinstance(sym, click.Command):
        return head + command(name, sym, level)
    if not (
        inspect.isclass(sym)
        or inspect.isroutine(sym)
        or inspect.isfunction(inspect.unwrap(sym) if callable(sym) else sym)
    ):
        return head + f"{'#' * level} {name}\n\n```python\n{constant(name, module)}\n```"
    parts = [head + show_doc(sym, renderer=SiteRenderer, name=name, title_level=level)._repr_markdown_()]
    for member, value in members(sym) if inspect.isclass(sym) else []:
        function = getattr(value, "fget", None) or getattr(value, "__func__", value)
        if isinstance(value, property):
            returns = of_function(function)[1]
            line = f"{member}: {returns}" if returns else member
            title = f"{'#' * (level + 1)} {name}.{member}"
            parts.append(f"{title}\n\n```python\n{line}  # property\n```\n\n{documentation(function)}")
        else:
            title = f"{name}.{member}"
            shown = show_doc(function, renderer=SiteRenderer, name=title, title_level=level + 1)
            parts.append(shown._repr_markdown_())
    return "\n\n".join(parts)
