"""Size of the notebooks' cells, and how many public definitions are shown at work: `python benchmarks/cells.py [notebook …]`.

A line counts when it holds code: empty lines and directives (`#|`) do not. A definition is demonstrated when a cell that is not exported
uses its name within the next three code cells. Exit status 1 when a bound of `BOUNDS` is broken. The standard library is all it needs.
"""
import argparse
import ast
import json
import re
import statistics
import sys
from pathlib import Path

BOUNDS = dict(median=10, demonstrated=.85, longest=139)
WITHIN = 3   # code cells after a definition


def code_cells(path: Path) -> list[str]:
    "Sources of a notebook's code cells, without empty ones."
    cells = json.loads(path.read_text())["cells"]
    return [source for c in cells if c["cell_type"] == "code" and (source := "".join(c["source"])).strip()]


def code_lines(source: str) -> list[str]:
    "Lines of a cell that hold code or a comment."
    return [line for line in source.splitlines() if line.strip() and not line.startswith("#|")]


def exported(source: str) -> bool: return bool(re.search(r"^#\|\s*exporti?s?\b", source, re.M))


def parsed(source: str) -> ast.Module:
    "Syntax tree of a cell; lines for IPython (`%`, `!`) are left out."
    return ast.parse("\n".join("" if line.startswith(("%", "!")) else line for line in source.splitlines()))


def definitions(source: str) -> list[ast.AST]:
    "Public functions and classes that a cell defines at its top level, methods that are added by `@patch` among them."
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    found = [n for n in parsed(source).body if isinstance(n, kinds) and not n.name.startswith("_")]
    return [n for n in found if n.name != "forward"]   # of a module, which is called by the module's name


def names_used(source: str, words: bool = False) -> set[str]:
    "Names and attributes that occur in a cell; with `words` the words of its texts as well."
    nodes = list(ast.walk(parsed(source)))
    texts = [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)] if words else []
    return ({n.id for n in nodes if isinstance(n, ast.Name)} | {n.attr for n in nodes if isinstance(n, ast.Attribute)}
            | {word.replace("-", "_") for text in texts for word in text.split()})


def is_command(node: ast.AST) -> bool:
    "Whether a function is a command of the command line, which is called by its name as text."
    return any(isinstance(d, ast.Call) and getattr(d.func, "attr", "") in ("command", "callback") for d in node.decorator_list)


def measure(path: Path) -> dict:
    "Lines per cell, longest line, and the public definitions of a notebook with and without a demonstration."
    cells = code_cells(path)
    shown, missing = [], []
    for i, source in enumerate(cells):
        if not exported(source): continue
        after = [s for s in cells[i + 1:i + 1 + WITHIN] if not exported(s)]
        for node in definitions(source):
            used = set().union(*(names_used(s, is_command(node)) for s in after))
            (shown if node.name in used else missing).append(node.name)
    longest = max((len(line) for source in cells for line in source.splitlines()), default=0)
    return dict(path=path, sizes=[len(code_lines(s)) for s in cells], longest=longest, shown=shown, missing=missing)


def summary(found: list[dict]) -> dict[str, float]:
    "The measures over all notebooks."
    sizes, shown = [n for f in found for n in f["sizes"]], sum(len(f["shown"]) for f in found)
    public = shown + sum(len(f["missing"]) for f in found)
    return dict(cells=len(sizes), median=statistics.median(sizes), mean=statistics.mean(sizes), public=public,
                demonstrated=shown/public if public else 1., longest=max(f["longest"] for f in found))


def row(f: dict) -> str:
    "One notebook in a line of the table."
    sizes, public = f["sizes"] or [0], len(f["shown"]) + len(f["missing"])
    share = f"{len(f['shown'])}/{public}" if public else ""
    return (f"{statistics.median(sizes):6.1f} {statistics.mean(sizes):6.1f} {max(sizes):5} {share:>7} {f['longest']:5}  "
            f"{f['path'].parent.name}/{f['path'].stem}" + (f"  without: {', '.join(f['missing'])}" if f["missing"] else ""))


def broken(total: dict) -> list[str]:
    "The bounds that do not hold, in words."
    bad = {name: total[name] < bound if name == "demonstrated" else total[name] > bound for name, bound in BOUNDS.items()}
    return [f"{name} is {total[name]:.3g}, bound {bound:.3g}" for name, bound in BOUNDS.items() if bad[name]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="by default all below nbs/")
    root = Path(__file__).parents[1]/"nbs"
    paths = parser.parse_args().notebooks or sorted(p for p in root.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    found = sorted(map(measure, paths), key=lambda f: -statistics.median(f["sizes"] or [0]))
    print("median   mean  most   shown  longest line")
    for f in found: print(row(f))
    total = summary(found)
    print(f"\n{total['cells']} code cells: median {total['median']:g} lines, mean {total['mean']:.1f}; "
          f"{total['demonstrated']:.1%} of {total['public']} public definitions demonstrated; longest line {total['longest']} characters")
    for line in broken(total): print(f"broken: {line}")
    return bool(broken(total))


if __name__ == "__main__": sys.exit(main())
