"""Faults to seed into kernels, found by operators on their syntax trees: no name of a local, no place in a file.

A site is where one operator applies: (file, kernel, operator, which occurrence in the kernel). An operator is a
function in OPERATORS that takes a node and returns what stands there instead, or None where it has nothing to say.
"""

import ast
import copy
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import liger_ops._triton

SOURCE = Path(liger_ops._triton.__file__).parent
FILES = sorted(path.stem for path in SOURCE.glob("*.py"))


# Of a watched copy: file and line of every statement of a kernel that ran.
SEEN: set[tuple[str, int]] = set()


class Site(NamedTuple):
    file: str
    kernel: str
    operator: str
    count: int


def _calls(node: ast.AST, *names: str) -> bool:
    """Whether it is tl.name(...) for one of the names."""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "tl"
        and node.func.attr in names
    )


def _operator(node: ast.AST, pairs: dict[type, type]) -> type | None:
    return pairs.get(type(node.op)) if isinstance(node, ast.BinOp) else None


def nudge(node):
    """A bound one further or one nearer."""
    nudged = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
    kind = nudged.get(type(node.ops[0])) if isinstance(node, ast.Compare) else None
    return kind and ast.Compare(node.left, [kind()], node.comparators)


def unequal(node):
    kind = {ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}.get(type(node.ops[0])) if isinstance(node, ast.Compare) else None
    return kind and ast.Compare(node.left, [kind()], node.comparators)


def first_condition(node):
    return node.left if _operator(node, {ast.BitAnd: ast.BitAnd, ast.BitOr: ast.BitOr}) else None


def second_condition(node):
    return node.right if _operator(node, {ast.BitAnd: ast.BitAnd, ast.BitOr: ast.BitOr}) else None


def opposite(node):
    kind = _operator(node, {ast.Add: ast.Sub, ast.Sub: ast.Add})
    return kind and ast.BinOp(node.left, kind(), node.right)


def factor(node):
    return node.left if _operator(node, {ast.Mult: ast.Mult, ast.Div: ast.Div}) else None


def remainder(node):
    kind = _operator(node, {ast.FloorDiv: ast.Mod, ast.Mod: ast.FloorDiv})
    return kind and ast.BinOp(node.left, kind(), node.right)


def unsigned(node):
    return node.operand if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) else None


def constant(node):
    """0 and 1 become each other, any other number the next."""
    if not isinstance(node, ast.Constant) or type(node.value) not in (int, float):
        return None
    return ast.Constant(type(node.value)({0: 1, 1: 0}.get(node.value, node.value + 1)))


def _without(node, wanted: Callable[[str], bool], dropped: Callable[[str], bool]):
    if not isinstance(node, ast.Call) or not any(wanted(word.arg) for word in node.keywords):
        return None
    return ast.Call(node.func, node.args, [word for word in node.keywords if not dropped(word.arg)])


def unmasked(node):
    """What lies outside is read or written as well, and so nothing else in its place."""
    return _without(node, lambda name: name == "mask", lambda name: name in ("mask", "other"))


def unfilled(node):
    return _without(node, lambda name: name == "other", lambda name: name == "other")


def unsaid(node):
    """Any other keyword left at its default."""
    return _without(node, lambda name: name not in ("mask", "other"), lambda name: name not in ("mask", "other"))


def extremum(node):
    other = {"minimum": "maximum", "maximum": "minimum", "min": "max", "max": "min"}
    if not _calls(node, *other):
        return None
    return ast.Call(ast.Attribute(node.func.value, other[node.func.attr], ast.Load()), node.args, node.keywords)


def everywhere(node):
    """A choice by element always the first."""
    return node.args[1] if _calls(node, "where") else None


def swapped(node):
    if isinstance(node, ast.IfExp):
        return ast.IfExp(node.test, node.orelse, node.body)
    return ast.Call(node.func, [node.args[0], *node.args[:0:-1]], []) if _calls(node, "where") else None


def turned(node):
    return node.args[0] if _calls(node, "trans") else None


def rounded_down(node):
    return ast.BinOp(node.args[0], ast.FloorDiv(), node.args[1]) if _calls(node, "cdiv") else None


def forgotten(node):
    """A step of an accumulator left out."""
    return ast.Pass() if isinstance(node, ast.AugAssign) else None


def restarted(node):
    """An accumulator that keeps its last step alone."""
    return ast.Assign([node.target], node.value) if isinstance(node, ast.AugAssign) else None


def unwritten(node):
    """A call for what it writes, left out."""
    return ast.Pass() if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) else None


def otherwise(node):
    """A branch taken where it should not be."""
    return ast.If(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse) if isinstance(node, ast.If) else None


def shortened(node):
    """A loop without its last turn."""
    if not isinstance(node, ast.For) or not isinstance(node.iter, ast.Call):
        return None
    *start, stop = node.iter.args
    end = ast.BinOp(stop, ast.Sub(), ast.Constant(1))
    return ast.For(node.target, ast.Call(node.iter.func, [*start, end], []), node.body, [])


OPERATORS: dict[str, Callable[[ast.AST], ast.AST | None]] = {
    operator.__name__: operator
    for operator in (
        *(nudge, unequal, first_condition, second_condition, opposite, factor, remainder),
        *(unsigned, constant, unmasked, unfilled, unsaid, extremum, everywhere, swapped, turned, rounded_down),
        *(forgotten, restarted, unwritten, otherwise, shortened),
    )
}


def is_kernel(node: ast.AST) -> bool:
    """Whether Triton compiles it: by its decorator, called or not."""
    marks = [mark.func if isinstance(mark, ast.Call) else mark for mark in getattr(node, "decorator_list", ())]
    return isinstance(node, ast.FunctionDef) and any(getattr(mark, "attr", "") == "jit" for mark in marks)


def parse(file: str) -> ast.Module:
    return ast.parse((SOURCE / f"{file}.py").read_text(encoding="utf-8"))


def kernels(tree: ast.Module) -> list[ast.FunctionDef]:
    return [node for node in tree.body if is_kernel(node)]


def body(kernel: ast.FunctionDef) -> list[ast.stmt]:
    """Its statements but for the docstring."""
    return kernel.body[ast.get_docstring(kernel) is not None :]


def _nodes(
    node: ast.AST, statement: int, bare: bool = False
) -> Iterator[tuple[ast.AST, ast.AST, str, int | None, int]]:
    """In the order of the source, every node below one: its parent, field and place there, and its statement's line.

    Of the condition of an `if`, only what is in calls: a branch taken without need may do nothing but work.
    """
    for field, value in ast.iter_fields(node):
        for place, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or _is_idle(child):
                continue
            line = child.lineno if isinstance(child, ast.stmt) else statement
            condition = (bare or (isinstance(node, ast.If) and field == "test")) and not isinstance(child, ast.Call)
            if not condition:
                yield child, node, field, place, line
            yield from _nodes(child, line, condition)


def _is_idle(node: ast.AST) -> bool:
    """Whether no fault in it would be one: ranges of a block, shapes, what stands for what is not read."""
    if isinstance(node, ast.Subscript):
        return isinstance(node.value, ast.Attribute) and node.value.attr == "shape"
    return _calls(node, "arange") or (isinstance(node, ast.keyword) and node.arg == "other")


def _found(kernel: ast.FunctionDef) -> Iterator[tuple[str, int, ast.AST, tuple, int]]:
    """Operator, occurrence, what stands there instead, where, and the line of its statement."""
    counts = dict.fromkeys(OPERATORS, 0)
    for node, *where, line in _nodes(ast.Module(body(kernel), []), 0):
        for name, operator in OPERATORS.items():
            if instead := operator(node):
                yield name, counts[name], instead, (node, *where), line
                counts[name] += 1


def sites(file: str, tree: ast.Module) -> dict[Site, int]:
    """Every site of a file, and the line of the statement that it is in."""
    return {Site(file, k.name, name, n): line for k in kernels(tree) for name, n, _, _, line in _found(k)}


def mutate(tree: ast.Module, site: Site) -> ast.Module:
    """A copy of the file's tree with the fault in it."""
    tree = copy.deepcopy(tree)
    kernel = next(k for k in kernels(tree) if k.name == site.kernel)
    for name, n, instead, (_, parent, field, place), _ in _found(kernel):
        if (name, n) == site[2:]:
            if isinstance(parent, ast.Module):
                parent, place = kernel, place + len(kernel.body) - len(body(kernel))
            if place is None:
                setattr(parent, field, instead)
            else:
                getattr(parent, field)[place] = instead
            return ast.fix_missing_locations(tree)
    raise AssertionError(f"no such site: {site}")


def watch(file: str, tree: ast.Module) -> ast.Module:
    """The file's tree, whose kernels say in SEEN which of their statements run."""

    def watched(statements: list[ast.stmt]) -> list[ast.stmt]:
        found = []
        for statement in statements:
            found += [ast.parse(f"_seen.add({(file, statement.lineno)})").body[0], statement]
            for field in ("body", "orelse"):
                setattr(statement, field, watched(getattr(statement, field, [])))
        return found

    for kernel in kernels(tree):
        kernel.body = watched(body(kernel))
    tree.body.insert(1, ast.parse(f"from {__name__} import SEEN as _seen").body[0])
    return ast.fix_missing_locations(tree)


def spread(found: list[Site], share: int) -> list[Site]:
    """One site in `share`, and at least one of every kernel and of every operator.

    By a hash of the site, so that what changes in one kernel changes no choice in another.
    """

    def key(site: Site) -> int:
        return zlib.crc32(":".join(map(str, site)).encode())

    chosen = {site for site in found if key(site) % share == 0}
    for kind in (lambda site: site[:2], lambda site: site.operator):
        # The least of each kind is put there last.
        chosen |= set({kind(site): site for site in sorted(found, key=key, reverse=True)}.values())
    return sorted(chosen)
