"""The rules of the house, as tests: imports go down, foreign libraries stay behind their fences, files stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import glue
from glue.family import HOMES, families

ROOT = Path(glue.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))

# Lower layers first; a module may import its own layer where the layer says so, and what is below.
NOUNS = ("errors", "room", "files", "family", "document", "hub", "member", "checkpoint", "writer", "stamp", "identity",
         "snapshot", "download", "zoo")
VERBS = ("skills", "cluster", "merge", "search", "mix", "tune", "federate", "refine", "proxy", "serve", "evaluate")
WIRING = ("workers", "actor", "workers_ray", "recipe", "steps", "find", "atlas", "align", "near", "plan", "run",
          "board", "orders", "report", "merges", "once", "care", "schema", "recorded", "reproduce",
          "spare", "preflight", "fetch", "lineage", "cards", "private", "known", "push", "docs", "show",
          "cli_federate", "cli_serve", "cli_zoo", "cli")
ORDER = {name: k for k, name in enumerate(NOUNS)}
ORDER |= {"kinds": 20, **dict.fromkeys(VERBS, 30), "workers": 39, "actor": 40, "workers_ray": 41, "recipe": 41,
          "steps": 42, "find": 43, "atlas": 43, "plan": 44, "align": 44, "near": 44, "run": 45, "board": 45,
          "orders": 45, "report": 46, "merges": 46, "once": 46, "care": 46, "schema": 46, "recorded": 45, "cards": 44,
          "reproduce": 46, "lineage": 45, "private": 44, "known": 46, "push": 47, "spare": 21, "preflight": 44.5,
          "fetch": 46, "show": 48, "docs": 49,
          "cli_zoo": 50, "cli_federate": 51, "cli_serve": 51, "cli": 52}

# Foreign library -> the only places that may import it. What is not named here is free: numpy, torch, scipy, stdlib.
FENCES = {"lm_eval": {"evaluate/lm_eval.py"}, "mergekit": {"merge/mergekit/peer.py"},
          "flwr": {"federate/flower.py", "steps/_flower_app.py"},
          "ray": {"workers_ray.py"}, "fastapi": {"serve/"}, "uvicorn": {"serve/"}, "starlette": {"serve/"},
          "httpx": {"kinds/link.py"}, "matplotlib": {"report/"},
          "transformers": {"kinds/", "tune/", "mix/", "evaluate/lm_eval.py", "merge/mergekit/peer.py"},
          "peft": {"kinds/", "tune/"}, "rich": {"show/"},
          "typer": {"cli.py", "cli_federate.py", "cli_serve.py", "cli_zoo.py"},
          "yaml": {"document.py", "evaluate/suite.py"},
          "sklearn": {"refine/"}, "tokenizers": {"tune/"}, "pyarrow": {"tune/records.py"},
          "accelerate": {"kinds/"}, "bitsandbytes": set(),
          "huggingface_hub": {"hub.py", "download.py"}, "filelock": {"files.py"}}
HEAVY = ("transformers", "peft", "accelerate", "bitsandbytes", "lm_eval", "mergekit", "flwr", "ray", "fastapi",
         "matplotlib", "sklearn", "datasets")


def layer(path: Path) -> str:
    part = path.relative_to(ROOT).parts[0]
    return part.removesuffix(".py")


def imports(path: Path, *, at_top: bool = False) -> set[str]:
    """Dotted names that a module imports, those for type checkers left out."""
    found: set[str] = set()

    def visit(nodes: list[ast.stmt]) -> None:
        for node in nodes:
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                visit(node.orelse)
                continue
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                found.update({node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)})
            if not (at_top and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
                for inner in ("body", "orelse", "finalbody"):
                    visit(getattr(node, inner, []))
                for handler in getattr(node, "handlers", []):
                    visit(handler.body)

    visit(ast.parse(path.read_text()).body)
    return found


def test_every_module_has_its_place_in_the_order():
    assert {layer(path) for path in MODULES} - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path: Path):
    own = layer(path)
    if own == "__init__":
        return
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "glue" or len(parts) < 2 or parts[1] not in ORDER or parts[1] == own:
            continue
        assert ORDER[parts[1]] < ORDER[own], f"{path.name} ({own}) imports glue.{parts[1]}, which is not below it"


@pytest.mark.parametrize("library", FENCES)
def test_a_foreign_library_stays_behind_its_fence(library: str):
    allowed = FENCES[library]
    for path in MODULES:
        place = str(path.relative_to(ROOT))
        used = any(name.split(".")[0] == library for name in imports(path))
        assert not used or any(place == gate or (gate.endswith("/") and place.startswith(gate)) for gate in allowed), \
            f"{place} imports {library}; only {sorted(allowed) or 'nobody'} may"


def test_no_module_is_longer_than_400_lines():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in MODULES}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_every_module_function_and_class_that_is_public_has_a_docstring():
    bare = []
    for path in MODULES:
        tree = ast.parse(path.read_text())
        if not ast.get_docstring(tree):
            bare.append(str(path))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") \
                    and not ast.get_docstring(node):
                bare.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not bare


def test_registered_modules_import_little_at_their_top():
    allowed = {"glue", "torch", "numpy", *sys.stdlib_module_names}
    for key in HOMES:
        for method in families(key):
            path = Path(sys.modules[method.call.__module__].__file__ or "")
            foreign = {name.split(".")[0] for name in imports(path, at_top=True)} - allowed - {""}
            assert not foreign, f"{path.name} imports {foreign} at its top level; import inside the function"


def test_loading_every_family_imports_nothing_heavy():
    code = ("import sys; from glue.family import HOMES, families\n"
            "for key in HOMES: list(families(key))\n"
            f"print([name for name in {HEAVY} if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_command_line_starts_without_torch():
    code = "import sys, glue.cli; print([name for name in ('torch', 'numpy', 'yaml', 'rich') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch" not in done.stdout and "numpy" not in done.stdout


def test_planning_the_quickstart_imports_nothing_heavy(tmp_path: Path):
    """`glue plan` is for looking quickly; transformers alone takes longer than a plan may."""
    (tmp_path / "zoo.yaml").write_text("members: {}\n")
    for name in ("benchmarks", "recipes"):
        (tmp_path / name).symlink_to(ROOT.parent / name)
    code = ("import sys; from glue.plan import make_plan; from glue.recipe import read_recipe\n"
            "from glue.zoo import Zoo\n"
            "plan = make_plan(read_recipe('recipes/quickstart.yaml'), Zoo('zoo.yaml'))\n"
            f"print(len(plan.tasks), [name for name in {HEAVY} if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split(maxsplit=1)[1].strip() == "[]" and int(done.stdout.split()[0]) > 30


def test_public_names_exist():
    for name in glue.__all__:
        assert getattr(glue, name).__doc__


def test_nothing_of_the_machine_it_was_written_on_is_named():
    words = ["/" + "work/", "/root/", ".lib" + "rary"]
    top = ROOT.parent
    for path in [*MODULES, *top.glob("*.md"), *top.glob("docs/*.md"), *top.glob("recipes/**/*.yaml")]:
        text = path.read_text()
        assert not [word for word in words if word in text], path
