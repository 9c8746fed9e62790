"""Nothing in the package runs what it reads."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "minillm").rglob("*.py"), *ROOT.glob("*.py")])
MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
METHODS = {  # what unpickles behind another name
    "torch": {"load"},
    "dist": {"broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list", "recv_object_list"},
    "connection": {"recv", "send"},
}


def unsafe(source: str) -> list[str]:
    """line: what is there that could run what it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if (node.module or "").split(".")[0] in MODULES else []
            names += [alias.name for alias in node.names if alias.name in METHODS["dist"]]
            names += [f"torch.{alias.name}" for alias in node.names if node.module == "torch" and alias.name == "load"]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            names = [node.func.id] if node.func.id in BUILTINS else []
        elif isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            is_method = node.attr in METHODS.get(owner, ()) or node.attr in METHODS["dist"]
            names = [f"{owner}.{node.attr}"] if is_method else []
        elif isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only"):
            is_off = node.arg == "allow_pickle" and isinstance(node.value, ast.Constant) and node.value.value is False
            names = [] if is_off else [node.arg]
        found += [f"{node.lineno}: {name}" for name in names]
    return found


def test_the_package_runs_nothing_that_it_reads():
    assert len(FILES) > 80
    found = [f"{path}:{line}" for path in FILES for line in unsafe(path.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "def f():\n    eval('1')",
        "exec(open('x').read())",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "from torch.distributed import all_gather_object",
        "import torch.distributed\ntorch.distributed.broadcast_object_list([])",
        "connection.recv()",
    ],
)
def test_what_would_is_found(source):
    assert len(unsafe(source)) == 1


def test_what_only_sounds_like_it_is_not():
    assert not unsafe("model.eval()\nblock.compile()\nre.compile('x')\nnp.load('x', allow_pickle=False)\n'pickle'")
