"""The house: imports point one way, light verbs stay light, and what is dangerous is absent."""

import ast
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "direct_rlhf"

# What each room may import, as docs/architecture.md draws it (itself, and what is in the rooms above)
FIRST = {"errors", "randomness"}
SECOND = FIRST | {"recipe", "maths", "run"}
THIRD = SECOND | {"data", "models", "rollout"}
MAY_IMPORT = {
    "errors": set(),
    "randomness": set(),
    "recipe": {"errors"},
    "maths": {"errors"},
    "run": {*FIRST, "recipe"},
    "data": SECOND,
    "models": SECOND | {"data", "rollout"},
    "rollout": SECOND | {"data"},
    "train": THIRD,
    "evaluate": THIRD | {"world"},  # the embedded tasks and their scripted judge
    "merge": THIRD,
    "world": THIRD,
    "report": {*FIRST, "recipe", "run"},
}
EVERYTHING = {"stages", "chat", "cli", "check", "doctor", "screen", "commands", "__main__", "__init__"}
TOP = {"stages", "chat", "cli", "check", "screen", "commands", "__main__"}  # imported by nothing below them

MODULES = sorted(SOURCE.rglob("*.py"))


def room(file: Path) -> str:
    return file.relative_to(SOURCE).with_suffix("").parts[0]


def imported_modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.lineno, node.module
            if node.module == "direct_rlhf":
                yield from ((node.lineno, f"direct_rlhf.{alias.name}") for alias in node.names)


def wrong_imports(file: Path, source: str) -> list[str]:
    here = room(file)
    found = {
        (line, module.split(".")[1])
        for line, module in imported_modules(ast.parse(source))
        if module.startswith("direct_rlhf.") and module != "direct_rlhf.__version__"
    }
    allowed = MAY_IMPORT.get(here, set(MAY_IMPORT) | TOP | {"doctor"}) | {here}
    return [
        f"{file.relative_to(ROOT)}:{line}: {here} may not import {other}"
        for line, other in sorted(found)
        if other not in allowed
    ]


DANGEROUS_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
DANGEROUS_CALLS = {
    "eval": "eval",
    "exec": "exec",
    "yaml.load": "yaml.load",
    "yaml.unsafe_load": "yaml.unsafe_load",
    "yaml.full_load": "yaml.full_load",
    "os.system": "os.system",
    "os.popen": "os.popen",
}
DANGEROUS_SETTINGS = {("shell", True), ("trust_remote_code", True), ("allow_pickle", True), ("weights_only", False)}


def dangers(source: str) -> list[str]:
    """What X1 and X2 forbid, as `line: what`."""
    tree = ast.parse(source)
    found = [(line, module) for line, module in imported_modules(tree) if module.split(".")[0] in DANGEROUS_MODULES]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            settings = [(word.arg, word.value.value) for word in node.keywords if isinstance(word.value, ast.Constant)]
            if name in DANGEROUS_CALLS:
                found.append((node.lineno, name))
            if name == "torch.load" and ("weights_only", True) not in settings:
                found.append((node.lineno, "torch.load without weights_only=True"))
            if name.endswith("load_dataset") and any(word.arg == "trust_remote_code" for word in node.keywords):
                found.append((node.lineno, "trust_remote_code in a data-set loader"))
            found += [(node.lineno, f"{key}={value}") for key, value in settings if (key, value) in DANGEROUS_SETTINGS]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args
            pairs = list(zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True))
            pairs += list(zip(arguments.args[::-1], arguments.defaults[::-1], strict=False))
            found += [
                (node.lineno, f"{argument.arg}=True by default")
                for argument, default in pairs
                if isinstance(default, ast.Constant) and (argument.arg, default.value) in DANGEROUS_SETTINGS
            ]
    return [f"{line}: {what}" for line, what in sorted(found)]


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_point_one_way(file: Path) -> None:
    assert wrong_imports(file, file.read_text(encoding="utf-8")) == []


def test_every_module_has_a_place_in_the_house() -> None:
    assert {room(file) for file in MODULES} <= set(MAY_IMPORT) | EVERYTHING


@pytest.mark.parametrize(
    ("file", "source", "count"),
    [
        ("maths/losses.py", "from direct_rlhf.recipe.schema import Recipe", 1),
        ("maths/losses.py", "from direct_rlhf import errors, stages", 1),
        ("report/html.py", "def f():\n    import direct_rlhf.train.ppo", 1),
        ("train/ppo.py", "from direct_rlhf.rollout.native import sample", 0),
    ],
)
def test_wrong_import_is_found(file: str, source: str, count: int) -> None:
    assert len(wrong_imports(SOURCE / file, source)) == count


@pytest.mark.promise("X1")
@pytest.mark.promise("X2")
@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_nothing_dangerous_is_in_the_source(file: Path) -> None:
    assert dangers(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "eval('1')",
        "exec('1')",
        "yaml.load(text, Loader=yaml.Loader)",
        "subprocess.run('ls', shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "def load(name, *, trust_remote_code=True): ...",
        "def load(name, trust_remote_code=True): ...",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "numpy.load(file, allow_pickle=True)",
        "datasets.load_dataset(name, trust_remote_code=flag)",
    ],
)
def test_danger_is_found(source: str) -> None:
    assert dangers(source)


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "torch.load(file, weights_only=True)",
        "load(name, trust_remote_code=flag)",
        "yaml.safe_load(text)",
    ],
)
def test_harmless_code_is_no_danger(source: str) -> None:
    assert dangers(source) == []


@pytest.mark.promise("U3")
@pytest.mark.parametrize(
    "name", ["errors", "recipe", "run", "data", "report", "cli", "check", "doctor", "screen", "stages"]
)
def test_importing_it_imports_no_torch(name: str) -> None:
    modules = [module_name(file) for file in MODULES if room(file) == name]
    script = "import importlib, sys\n" + "".join(f"importlib.import_module({module!r})\n" for module in modules)
    script += "print([name for name in ('torch', 'transformers', 'datasets', 'lm_eval') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def module_name(file: Path) -> str:
    parts = file.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_file_names_a_place_on_the_makers_machine() -> None:
    place = "/" + "work" + "/"
    texts = [
        *MODULES,
        *(SOURCE / "recipe" / "shipped").glob("*.yaml"),
        *(ROOT / "tests").rglob("*.py"),
        *(ROOT / "docs").rglob("*.md"),
    ]
    assert [str(file) for file in texts if place in file.read_text(encoding="utf-8")] == []


@pytest.mark.promise("R8")
def test_a_test_cannot_reach_the_network() -> None:
    with pytest.raises(AssertionError, match=r"a test tried to connect to \('192\.0\.2\.1', 80\)"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
