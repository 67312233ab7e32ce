"""Faults seeded into the kernels, one at a time: what the checks must notice.

Which are tried is a fixed choice from all; LIGER_MUTANTS=all tries every one, in half an hour on two cores.
"""

import ast
import importlib
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

import liger_ops._triton
from tests.kernels import mutants
from tests.kernels.checks import CHECKS, KERNELS
from tests.kernels.equivalents import EQUIVALENT
from tests.kernels.interpreter import mend_rounding
from tests.kernels.mutants import FILES, SOURCE, Site

SHARE = 12


def install(folder: Path) -> None:
    """From here on its files stand for the package's own, under its name."""
    torch.set_num_threads(1)
    mend_rounding()
    for name in [name for name in sys.modules if name.startswith(KERNELS)]:
        del sys.modules[name]
        delattr(liger_ops._triton, name.removeprefix(KERNELS))
    liger_ops._triton.__path__ = [str(folder), str(SOURCE)]
    importlib.invalidate_caches()


def write(folder: Path, trees: dict[str, ast.Module]) -> None:
    folder.mkdir()
    for file, tree in trees.items():
        (folder / f"{file}.py").write_text(ast.unparse(tree), encoding="utf-8")


def statements_of(check: int, folder: Path) -> tuple[float, set[tuple[str, int]]]:
    """How long a check takes on kernels without a fault, and which of their statements run."""
    install(folder)
    mutants.SEEN.clear()
    start = time.perf_counter()
    CHECKS[check]()
    return time.perf_counter() - start, set(mutants.SEEN)


def survives(site: Site, checks: list[int], folder: Path) -> bool:
    write(folder, {site.file: mutants.mutate(mutants.parse(site.file), site)})
    install(folder)
    for check in checks:
        try:
            CHECKS[check]()
        except Exception:
            return False
    return True


def all_sites() -> dict[Site, int]:
    return {site: line for file in FILES for site, line in mutants.sites(file, mutants.parse(file)).items()}


def chosen(found: list[Site]) -> list[Site]:
    return found if os.environ.get("LIGER_MUTANTS") == "all" else mutants.spread(found, SHARE)


def test_mutants_are_killed(tmp_path):
    """And the original is not: whatever else could go wrong in those processes would look like a kill."""
    lines = all_sites()
    assert set(EQUIVALENT) <= set(lines), set(EQUIVALENT) - set(lines)
    sites = chosen([site for site in lines if site not in EQUIVALENT])
    write(tmp_path / "watched", {file: mutants.watch(file, mutants.parse(file)) for file in FILES})
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        ran = list(pool.map(statements_of, range(len(CHECKS)), [tmp_path / "watched"] * len(CHECKS)))
        # The quickest first: a mutant runs until one of them kills it.
        order = sorted(range(len(CHECKS)), key=lambda check: ran[check][0])
        checks = [[n for n in order if (site.file, lines[site]) in ran[n][1]] for site in sites]
        folders = [tmp_path / str(n) for n in range(len(sites))]
        alive = [site for site, lives in zip(sites, pool.map(survives, sites, checks, folders), strict=True) if lives]
    print(f"{len(alive)} of {len(sites)} mutants alive: {alive}")
    assert not alive


def test_the_choice_reaches_every_kernel_and_operator():
    found = list(all_sites())
    tried = mutants.spread([site for site in found if site not in EQUIVALENT], SHARE)
    assert {site.operator for site in tried} == set(mutants.OPERATORS)
    assert {site[:2] for site in tried} == {site[:2] for site in found}
    assert {file for file in FILES if mutants.kernels(mutants.parse(file))} == {site.file for site in tried}


class Renamed(ast.NodeTransformer):
    """Every local of a kernel and every keyword that is one under another name."""

    def __init__(self, locals: set[str]):
        self.locals = locals

    def visit_Name(self, node):
        return ast.Name(self.name(node.id), node.ctx)

    def visit_arg(self, node):
        return ast.arg(self.name(node.arg), node.annotation)

    def visit_keyword(self, node):
        self.generic_visit(node)
        return ast.keyword(self.name(node.arg), node.value)

    def name(self, old: str) -> str:
        return f"other_{old}" if old in self.locals else old


def locals_of(kernel: ast.FunctionDef) -> set[str]:
    stored = {node.id for node in ast.walk(kernel) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return stored | {argument.arg for argument in kernel.args.args}


@pytest.mark.parametrize("file", FILES)
def test_names_and_places_choose_nothing(file):
    """Locals renamed, everything reformatted and moved: the same sites, the same choice, and the same faults."""
    tree, kernels = mutants.parse(file), mutants.kernels(mutants.parse(file))
    found = list(mutants.sites(file, tree))
    rename = Renamed(set().union(*map(locals_of, kernels)))
    other = rename.visit(ast.parse("\n\n" + ast.unparse(tree)))
    assert [k.name for k in mutants.kernels(other)] == [k.name for k in kernels]
    assert list(mutants.sites(file, other)) == found
    for site in mutants.spread(found, SHARE) if found else []:
        fault = rename.visit(ast.parse("\n\n" + ast.unparse(mutants.mutate(tree, site))))
        assert ast.dump(fault) == ast.dump(ast.parse(ast.unparse(mutants.mutate(other, site)))), site


def test_a_fault_is_one_change():
    for site in mutants.spread(list(all_sites()), 10 * SHARE):
        tree = mutants.parse(site.file)
        before, after = (ast.unparse(x).split("\n") for x in (tree, mutants.mutate(tree, site)))
        assert sum(x != y for x, y in zip(before, after, strict=True)) == 1, site
