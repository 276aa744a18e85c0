"""Draw docs/architecture.svg: the packages on their layers, and which ones import which.

    python scripts/draw_architecture.py           # write it
    python scripts/draw_architecture.py --check   # exit 1 if the committed picture is out of date

The layers are LAYERS of tests/test_layering.py, the imports those of the source. An arrow is left
out where a path of other arrows says the same, and into the foundation, which all may import.
"""

import argparse
import ast
import sys
import textwrap
from collections.abc import Container
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "nanojaxgpt"
PICTURE = ROOT / "docs" / "architecture.svg"
TITLES = ["foundation, without jax", "model", "runs, data, hosts", "training",
          "many runs, papers, serving", "commands", "command line"]  # fmt: skip
# In pixels; BETWEEN two layers are the arrows, LETTER is the width of a letter of the font.
WIDTH, MARGIN, GAP, BETWEEN, LINE, LETTER = 1000, 20, 18, 46, 16, 6.7
STYLE = """\
<style>
  text { font: 11px ui-monospace, Menlo, Consolas, monospace; fill: #1f2328; }
  .title { font-weight: bold; } .layer { fill: #59636e; } .page { fill: #ffffff; }
  .box { fill: #f6f8fa; stroke: #8c959f; } path { stroke: #8c959f; fill: none; }
  marker path { fill: #8c959f; stroke: none; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; } .layer { fill: #9198a1; } .page { fill: #0d1117; }
    .box { fill: #151b23; stroke: #656c76; } path { stroke: #656c76; }
    marker path { fill: #656c76; }
  }
</style>
<defs><marker id="end" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" \
orient="auto"><path d="M0,0 L8,4 L0,8 z"/></marker></defs>"""

Box = tuple[int, str]  # a layer, and a package; "": the modules in none
Arrows = dict[Box, set[Box]]


def read_layers() -> dict[str, int]:
    """Return the layer of each module, `a.b` for nanojaxgpt/a/b.py."""
    tree = ast.parse((ROOT / "tests" / "test_layering.py").read_text())
    nodes = [node for node in tree.body if ast.unparse(node).startswith("LAYERS =")]
    layers = ast.literal_eval(nodes[0].value)  # pyright: ignore[reportAttributeAccessIssue]
    entries = {name: layer for layer, names in layers.items() for name in names}
    paths = [path.relative_to(ROOT / PACKAGE) for path in (ROOT / PACKAGE).rglob("*.py")]
    names = [".".join(path.with_suffix("").parts).removesuffix("__init__") for path in paths]
    found = {}
    for name in sorted(name.strip(".") for name in names):
        entry = name if name in entries else f"{name.rpartition('.')[0]}.*"
        found |= {name: entries[entry]} if name else {}
    return found


def imports(name: str, known: Container[str]) -> set[str]:
    """Return the modules of the package that a module imports."""
    path = ROOT / PACKAGE / name.replace(".", "/")
    file, found = path / "__init__.py" if path.is_dir() else path.with_suffix(".py"), set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(f"{PACKAGE}."):
            module = str(node.module).removeprefix(PACKAGE).removeprefix(".")
            inner = {f"{module}.{alias.name}".strip(".") for alias in node.names}
            found |= {one if one in known else module for one in inner}
    return {one for one in found if one in known}


def place_modules(layers: dict[str, int]) -> dict[str, Box]:
    """Return the box of each module; a package that is alone on its layer joins its modules."""
    boxes = {}
    for name, layer in layers.items():
        package = name.split(".")[0]
        inside = [other for module, other in layers.items() if module.startswith(f"{package}.")]
        if name == package and inside and layer not in inside:
            layer = min(inside)
        boxes[name] = layer, package if inside else ""
    return boxes


def find_arrows(boxes: dict[str, Box]) -> Arrows:
    """Return the boxes on lower layers that each box imports, without those that others imply."""
    arrows: Arrows = {box: set() for box in boxes.values()}
    for name, box in boxes.items():
        used = {boxes[other] for other in imports(name, boxes)}
        arrows[box] |= {other for other in used if 0 < other[0] < box[0]}

    def reached(box: Box) -> set[Box]:
        return arrows[box].union(*map(reached, arrows[box]))

    return {box: used.difference(*map(reached, used)) for box, used in arrows.items()}


def order_boxes(arrows: Arrows) -> list[list[Box]]:
    """Return the boxes of each layer, from the top, each below those that import it."""
    rows: list[list[Box]] = []
    across: dict[Box, float] = {}

    def middle(box: Box) -> tuple[float, Box]:
        above = [across[one] for one, used in arrows.items() if box in used]
        return sum(above) / len(above) if above else 0.5, box

    for layer in sorted({box[0] for box in arrows}, reverse=True):
        rows.append(sorted([box for box in arrows if box[0] == layer], key=middle))
        across |= {box: (i + 0.5) / len(rows[-1]) for i, box in enumerate(rows[-1])}
    return rows


def box_text(box: Box, modules: list[str], width: float) -> list[str]:
    """Return the lines of a box: its package, and its modules."""
    inside = [name.removeprefix(f"{box[1]}.").split(".") for name in modules]
    folders = {parts[0] for parts in inside if len(parts) > 1}
    names = {parts[0] for parts in inside} - {box[1]}
    shown = sorted(f"{name}/" if name in folders else name for name in names)
    return [f"{box[1] or PACKAGE}/", *textwrap.wrap(" ".join(shown), int((width - 16) / LETTER))]


def draw() -> str:
    """Return the picture as SVG."""
    boxes = place_modules(read_layers())
    arrows, shapes, y = find_arrows(boxes), list[str](), MARGIN
    places: dict[Box, tuple[float, float, int, int]] = {}  # middle, width, top, bottom
    for row in order_boxes(arrows):
        modules = [[name for name, found in boxes.items() if found == box] for box in row]
        shares = [len(names) ** 0.5 + 1.5 for names in modules]
        free = WIDTH - 2 * MARGIN - GAP * (len(row) - 1)
        widths = [free * share / max(sum(shares), 9) for share in shares]
        texts = [box_text(*one) for one in zip(row, modules, widths, strict=True)]
        x, top, height = MARGIN + (free - sum(widths)) / 2, y + 14, LINE * max(map(len, texts)) + 14
        title = f"{row[0][0]} {TITLES[row[0][0]]}"
        shapes.append(f'<text class="layer" x="{MARGIN}" y="{y + 6}">{title}</text>')
        for box, width, lines in zip(row, widths, texts, strict=True):
            places[box] = x + width / 2, width, top, top + height
            size = f'width="{width:.0f}" height="{height}"'
            shapes.append(f'<rect class="box" x="{x:.0f}" y="{top}" {size} rx="6"/>')
            for number, line in enumerate(lines):
                kind, place = "" if number else ' class="title"', top + LINE * (number + 1) + 2
                shapes.append(f'<text{kind} x="{x + 8:.0f}" y="{place}">{line}</text>')
            x += width + GAP
        y = top + height + BETWEEN
    height, curves = y - BETWEEN + MARGIN, []
    for box, used in arrows.items():
        for number, other in enumerate(sorted(used, key=lambda one: places[one][0])):
            x, width, _, y = places[box]
            x += 0.8 * width * ((number + 1) / (len(used) + 1) - 0.5)
            to_x, to_width, to_y, _ = places[other]
            to_x += to_width * max(-0.35, min(0.35, (x - to_x) / WIDTH))
            bend = f"C{x:.0f},{(y + to_y) / 2:.0f} {to_x:.0f},{(y + to_y) / 2:.0f}"
            path = f"M{x:.0f},{y} {bend} {to_x:.0f},{to_y - 2}"
            curves.append(f'<path marker-end="url(#end)" d="{path}"/>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}">'
    about = "<!-- Written by scripts/draw_architecture.py. -->"
    page = f'<rect class="page" width="{WIDTH}" height="{height}"/>'
    return "\n".join([head, about, STYLE, page, *curves, *shapes, "</svg>\n"])


def main(arguments: list[str]) -> int:
    """Write the picture, or with --check compare it; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if out of date")
    check, text = parser.parse_args(arguments).check, draw()
    if check and (not PICTURE.exists() or PICTURE.read_text() != text):
        print(f"{PICTURE} is out of date; run python scripts/draw_architecture.py", file=sys.stderr)
        return 1
    if not check:
        PICTURE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
