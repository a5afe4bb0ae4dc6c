"""The house: imports point one way, light verbs stay light, and what is dangerous is absent."""

import ast
import json
import pickle
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors import SafetensorError

from direct_rlhf.data.load import load_preferences
from direct_rlhf.data.tokens import load_tokens
from direct_rlhf.errors import CheckpointError, ConfigError, DataError
from direct_rlhf.models.loading import load_causal_lm
from direct_rlhf.recipe.load import load_recipe
from direct_rlhf.recipe.schema import DataSection, DataSource, DialogueSection, GeneralSection, LoraSection
from direct_rlhf.run.checkpoints import Checkpoint, CheckpointStore
from direct_rlhf.run.directory import RunDirectory
from faults import run_cli
from toys import toy_folder

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "direct_rlhf"

# What each room may import, as docs/architecture.md draws it (itself, and what is in the rooms above)
FIRST = {"errors", "randomness"}
SECOND = FIRST | {"recipe", "precision", "maths", "run"}
THIRD = SECOND | {"data", "models", "rollout"}
MAY_IMPORT = {
    "errors": set(),
    "randomness": set(),
    "precision": {"recipe"},
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
    "scale": {"errors", "recipe", "models"},  # of models the sizes alone, which need no torch
}
TOP = {
    "attempt",
    "stages",
    "study",
    "chat",
    "cli",
    "launch",
    "check",
    "plan",
    "screen",
    "commands",
    "__main__",
}  # imported by nothing below them
EVERYTHING = {*TOP, "doctor", "__init__"}

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
DANGEROUS_SETTINGS = {
    ("shell", True),
    ("trust_remote_code", True),
    ("allow_pickle", True),
    ("weights_only", False),
    ("confirm_run_unsafe_code", True),  # lm-eval would run what a model writes
}


def dangers(source: str) -> list[str]:
    """What H, X1, X2 and X6 forbid, as `line: what`."""
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
            if name.endswith((".extractall", ".unpack_archive")):
                found.append((node.lineno, "an archive is unpacked: its members may leave the folder"))
            if name.endswith("load_dataset") and any(word.arg == "trust_remote_code" for word in node.keywords):
                found.append((node.lineno, "trust_remote_code in a data-set loader"))
            found += [(node.lineno, f"{key}={value}") for key, value in settings if (key, value) in DANGEROUS_SETTINGS]
        elif isinstance(node, ast.Constant) and node.value == "HF_ALLOW_CODE_EVAL":
            found.append((node.lineno, "the switch that lets a metric run what a model writes"))
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


@pytest.mark.promise("H", "X1", "X2", "X6")
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
        "tarfile.open(path).extractall(folder)",
        "shutil.unpack_archive(path, folder)",
        "lm_eval.simple_evaluate(model, confirm_run_unsafe_code=True)",
        "os.environ['HF_ALLOW_CODE_EVAL'] = '1'",
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
    "name", ["errors", "recipe", "run", "data", "report", "cli", "launch", "check", "doctor", "screen", "stages"]
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
@pytest.mark.parametrize(
    ("kind", "family", "address"),
    [
        (socket.SOCK_STREAM, socket.AF_INET, ("192.0.2.1", 80)),
        (socket.SOCK_DGRAM, socket.AF_INET, ("192.0.2.1", 53)),
        (socket.SOCK_STREAM, socket.AF_INET6, ("2001:db8::1", 443)),
    ],
)
def test_a_test_cannot_reach_the_network(kind, family, address) -> None:
    with socket.socket(family, kind) as one, pytest.raises(AssertionError, match=r"a test tried to connect to \('"):
        one.connect(address)


def test_a_test_can_reach_its_own_machine() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname(), timeout=5) as one,
    ):
        assert one.getpeername() == server.getsockname()


# Files from elsewhere: each holds code that would leave a canary


class Canary:
    """A pickle of this makes the file when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.fixture
def canary(tmp_path) -> Path:
    return tmp_path / "canary"


@pytest.fixture
def model_folder(tmp_path) -> Path:
    return toy_folder(tmp_path / "model")


def poison(folder: Path, canary: Path, *names: str) -> None:
    """Writes the canary as a plain pickle, and as what torch.save makes, in turn, under each name."""
    import torch

    for at, name in enumerate(names):
        if at % 2:
            torch.save(Canary(canary), folder / name)
        else:
            (folder / name).write_bytes(pickle.dumps(Canary(canary)))


PICKLED = ("pytorch_model.bin", "adapter_model.bin", "model.pkl", "optimizer.pt", "training_args.bin", "scheduler.pth")


def test_the_canary_sings(tmp_path, canary) -> None:
    import torch

    poison(tmp_path, canary, "a", "b")
    pickle.loads((tmp_path / "a").read_bytes())  # noqa: S301
    assert canary.exists()
    canary.unlink()
    torch.load(tmp_path / "b", weights_only=False)
    assert canary.exists()


@pytest.mark.promise("X1")
@pytest.mark.parametrize("order", [PICKLED, PICKLED[::-1]])
def test_pickles_beside_a_model_are_not_opened(model_folder, canary, order) -> None:
    poison(model_folder, canary, *order)
    assert load_causal_lm(model_folder) is not None
    assert load_tokens(str(model_folder)).vocab_size == 259
    assert not canary.exists()


@pytest.mark.promise("X1")
@pytest.mark.parametrize("order", [PICKLED, PICKLED[::-1]])
def test_a_model_that_is_only_a_pickle_is_refused(model_folder, canary, order) -> None:
    (model_folder / "model.safetensors").unlink()
    poison(model_folder, canary, *order)
    with pytest.raises(ConfigError, match=r"could not be loaded: .*safetensors"):
        load_causal_lm(model_folder)
    assert not canary.exists()


@pytest.mark.promise("X1")
@pytest.mark.parametrize("order", [("evil.bin", "evil.safetensors"), ("evil.safetensors", "evil.bin")])
def test_an_index_that_leads_to_a_pickle_is_refused(model_folder, canary, order) -> None:
    from safetensors import safe_open

    with safe_open(model_folder / "model.safetensors", "pt") as weights:
        names = list(weights.keys())
    (model_folder / "model.safetensors").unlink()
    poison(model_folder, canary, *order)
    index = {"metadata": {}, "weight_map": {name: order[at % 2] for at, name in enumerate(names)}}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(Exception, match=r"(?i)could not be loaded|weights_only|unsupported|safetensor"):
        load_causal_lm(model_folder)
    assert not canary.exists()


@pytest.mark.promise("X1")
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("where", [("adapter_model.bin",), ("x", "adapter_model.bin")])
def test_an_adapter_that_is_only_a_pickle_is_refused(model_folder, tmp_path, canary, shared, where) -> None:
    from direct_rlhf.models.loading import add_lora, base_sha256
    from direct_rlhf.models.reward_model import Facts, RewardModel
    from direct_rlhf.models.scalar import ScalarModel

    model, tokens = load_causal_lm(model_folder), load_tokens(str(model_folder))
    facts = Facts(DialogueSection(), 40, 24, str(model_folder), None, base_sha256(model), tokens.sha256, "lora")
    lora = add_lora(model, LoraSection(rank=2), "reward")
    folder = tmp_path / "reward_model"
    RewardModel(ScalarModel.from_base(lora, seed=1), tokens, facts, None, "cpu", "float32").save(folder)
    assert RewardModel.load(folder) is not None
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    poison(folder / "adapter", canary, *where)
    trunk = add_lora(load_causal_lm(model_folder), LoraSection(rank=2), "policy") if shared else None
    with pytest.raises(Exception, match=r"(?i)weights.only|safetensors"):
        RewardModel.load(folder, trunk=trunk)
    assert not canary.exists()


@pytest.mark.promise("X1")
@pytest.mark.parametrize("name", ["a.pkl", "a.pt", "a.bin", "a.jsonl", "a.json", "a.parquet"])
def test_data_that_are_a_pickle_are_refused(tmp_path, canary, name) -> None:
    poison(tmp_path, canary, name)
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        load_preferences(DataSection(preferences=[DataSource(path=name)]), folder=tmp_path, seed=0)
    assert not canary.exists()


@pytest.mark.promise("X1")
def test_a_pickle_in_the_schema_of_a_parquet_file_is_not_opened(tmp_path, canary) -> None:
    import pyarrow
    from pyarrow import parquet

    evil = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Canary(canary)),
    }
    fields = [pyarrow.field(name, pyarrow.string(), metadata=evil) for name in ("prompt", "chosen", "rejected")]
    table = pyarrow.table([["a"], ["b"], ["c"]], schema=pyarrow.schema(fields, metadata={b"pandas": b"{}"}))
    parquet.write_table(table, tmp_path / "a.parquet")
    data = load_preferences(DataSection(preferences=[DataSource(path="a.parquet")]), folder=tmp_path, seed=0)
    assert data.counts["kept"] == 1
    assert not canary.exists()


@pytest.mark.promise("X1")
def test_pickles_in_a_checkpoint_are_neither_read_nor_taken_for_tensors(tmp_path, canary) -> None:
    store = CheckpointStore(tmp_path / "ppo", keep=1)
    folder = store.save(1, {"policy": {}}, {"kl": 0.5})
    poison(folder, canary, "optimiser.pt", "state.pkl", "policy.bin", "random.bin")
    assert store.latest().state == {"kl": 0.5}
    poison(folder, canary, "policy.safetensors")
    assert store.latest() is None
    with pytest.raises(SafetensorError):  # also where somebody has sealed it
        Checkpoint(folder, 1, {}).tensors("policy")
    assert not canary.exists()


@pytest.mark.promise("X1")
def test_a_recipe_that_names_code_is_refused(tmp_path, canary) -> None:
    recipe = tmp_path / "evil.yaml"
    recipe.write_text(
        f"description: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{canary}]]\n"
    )
    with pytest.raises(ConfigError, match=r"evil\.yaml"):
        load_recipe(str(recipe))
    run = RunDirectory.open(tmp_path / "runs", load_recipe("quickstart"), resume=False, overwrite=False)
    (run.path / "recipe.yaml").write_text(recipe.read_text())
    with pytest.raises(CheckpointError, match=r"recipe\.yaml: cannot be read"):
        _ = run.recipe
    assert not canary.exists()


REMOTE = """
import pathlib
pathlib.Path({canary!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class XConfig(LlamaConfig): model_type = {model_type!r}
class XModel(LlamaForCausalLM): config_class = XConfig
class XTokenizer(PreTrainedTokenizerFast): pass
def generate(model, *rest, **options): return None
"""


def with_code(folder: Path, canary: Path, model_type: str) -> None:
    """Makes a checkpoint bring its own classes, as models on the hub do."""
    for name in ("modeling_x.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(REMOTE.format(canary=str(canary), model_type=model_type))
    own = {"AutoConfig": "modeling_x.XConfig", "AutoModelForCausalLM": "modeling_x.XModel"}
    for name, classes in (
        ("config.json", own),
        ("tokenizer_config.json", {"AutoTokenizer": [None, "modeling_x.XTokenizer"]}),
    ):
        content = json.loads((folder / name).read_text()) | {"auto_map": classes}
        if name == "config.json":
            content["model_type"] = model_type
        (folder / name).write_text(json.dumps(content))


@pytest.mark.promise("X2")
def test_a_model_that_needs_its_own_code_is_refused(model_folder, canary) -> None:
    with_code(model_folder, canary, "x")
    with pytest.raises(ConfigError, match=r"could not be loaded: "):
        load_causal_lm(model_folder)
    assert not canary.exists()


@pytest.mark.promise("X2")
def test_a_model_of_a_known_kind_is_loaded_without_the_code_it_brings(model_folder, canary) -> None:
    from transformers import LlamaForCausalLM

    with_code(model_folder, canary, "llama")
    assert type(load_causal_lm(model_folder)) is LlamaForCausalLM
    assert load_tokens(str(model_folder)).vocab_size == 259
    assert not canary.exists()


@pytest.mark.promise("X2")
def test_the_code_that_a_model_brings_runs_where_the_caller_asks_for_it(
    model_folder, canary, monkeypatch, tmp_path
) -> None:
    """The trap is set: the same folder sings once it is trusted."""
    import transformers.dynamic_module_utils

    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    with_code(model_folder, canary, "x")
    load_causal_lm(model_folder, trust_remote_code=True)
    assert canary.exists()


@pytest.mark.promise("X2")
def test_code_for_a_tokenizer_or_beside_data_does_not_run(model_folder, tmp_path, canary) -> None:
    with_code(model_folder, canary, "x")
    (model_folder / "tokenizer.json").unlink()
    (model_folder / "vocab.json").write_text("{}")
    (model_folder / "merges.txt").write_text("")
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json, and transformers cannot make one"):
        load_tokens(str(model_folder))
    folder = tmp_path / "pairs"
    folder.mkdir()
    (folder / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    (folder / "pairs.py").write_text(REMOTE.format(canary=str(canary), model_type="x"))
    data = load_preferences(DataSection(preferences=[DataSource(path="pairs")]), folder=tmp_path, seed=0)
    assert data.counts["kept"] == 1
    assert not canary.exists()


@pytest.mark.promise("H")
def test_a_task_that_would_run_what_the_model_writes_is_refused(model_folder, tmp_path) -> None:
    from direct_rlhf.evaluate.general import GeneralTasks
    from direct_rlhf.models.memory import ChunkSize

    (tmp_path / "docs.jsonl").write_text('{"question": "Print 1.", "answer": "print(1)"}\n')
    task = {
        "task": "writes_code",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "docs.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 2},
    }

    def measure(**more):
        (tmp_path / "task.yaml").write_text(json.dumps(task | more))
        tasks = GeneralTasks(GeneralSection(tasks=["task.yaml"]), seed=0, folder=tmp_path)
        model, tokens = load_causal_lm(model_folder), load_tokens(str(model_folder))
        return tasks.measure(model, tokens, limit=1, batch=ChunkSize("tasks", 1), on_done=lambda number: None)

    assert measure()  # text that looks like code is only compared
    with pytest.raises(ValueError, match="writes_code which is marked as unsafe"):
        measure(unsafe_code=True)


# No network but where the recipe names it


@pytest.mark.promise("R8", "X8")
@pytest.mark.parametrize(
    "words",
    [["init", "hh-small", "mine.yaml"], ["check", "quickstart"], ["data", "show", "quickstart"], ["doctor"]],
    ids=" ".join,
)
def test_a_light_verb_asks_nobody(tmp_path, words) -> None:
    """Not even where the hub may be asked: the tests' own HF_HUB_OFFLINE is taken away."""
    ended = run_cli(words, cwd=tmp_path, env={"HF_HUB_OFFLINE": None}, offline=True)
    assert (ended.code, "NETWORK" in ended.err) == (0, False), ended.err
