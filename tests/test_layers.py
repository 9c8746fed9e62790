"""The house stands: every module imports only from the layers below it."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "minillm"
LAYERS = [
    ["files", "scripts", "tensors"],
    ["config", "log", "losses", "optim", "run", "signals", "tokenizer"],
    ["model"],
    ["data", "distributed", "lora", "quantize"],
    ["checkpoint"],
    ["objectives", "doctor", "hf", "generate", "plan"],
    ["preference"],
    ["load", "eval", "memory"],
    ["merge", "strategy"],
    ["report", "trainer"],
    ["recipe"],
    ["simulate"],
    ["cli"],
]
LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def unit_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_units(path: Path) -> list[tuple[int, str, bool]]:
    """(line, unit, whether the import stands at the top of the module) for each import of the package itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"{path}:{node.lineno}: write the absolute name, minillm.…, so that this test can read it"
            )
            names = [f"{node.module}.{alias.name}" if node.module == "minillm" else node.module for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found += [(node.lineno, n.split(".")[1], id(node) in top) for n in names if n.startswith("minillm.")]
    return found


def test_every_module_has_a_layer():
    assert {unit_of(path) for path in MODULES} <= set(LEVEL)


def test_imports_go_strictly_down():
    wrong = [
        f"{path}:{line}: {unit_of(path)} imports {unit}"
        for path in MODULES
        for line, unit, _ in imported_units(path)
        if unit != unit_of(path) and LEVEL[unit] >= LEVEL[unit_of(path)]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_import_of_the_package_hides_in_a_function():
    hidden = [f"{path}:{line}" for path in MODULES for line, _, at_top in imported_units(path) if not at_top]
    assert not hidden, "\n".join(hidden)


def test_core_imports_are_the_core_dependencies():
    """At the top of a module stand only the standard library and the core packages: extras are imported where used."""
    import sys

    allowed = set(sys.stdlib_module_names) | {"minillm", "torch", "numpy", "sentencepiece", "safetensors", "tqdm"}
    wrong = []
    for path in MODULES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            wrong += [f"{path}:{node.lineno}: {name}" for name in names if name.split(".")[0] not in allowed]
    assert not wrong, "\n".join(wrong)
