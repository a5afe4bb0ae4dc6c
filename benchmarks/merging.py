"""Merging checkpoints against mergekit, as whole processes; against the floor of reading and writing; and by size.

Four checkpoints of a Llama's shape and their base, bfloat16, in several shards: a random base, and small noise on it
for each. The same merge file goes to both, with `reference: mergekit` for ours where it has one. Timed is the process
from its start to its end, imports included; its CPU seconds; the most memory it held, with the pages of mapped files
(RSS) and without (anonymous). All files are in the page cache, and each result is deleted before the next merge.

The executor itself is timed within this process, imports and checks left out, against the floor: the same bytes read
once, into a small buffer, and the result's bytes written once and synced to the disk, by as many threads.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import arguments, finish
from peers.side_by_side import OURS, Ratio, peer_python, verdict

THEIRS = "mergekit"
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden": 256, "inner": 704, "layers": 4, "vocabulary": 4096},
    "250M": {"hidden": 1024, "inner": 2816, "layers": 14, "vocabulary": 32768},
    "1B": {"hidden": 2048, "inner": 5632, "layers": 18, "vocabulary": 65536},
}
EXPERTS = 4
SHARDS = 3
AVERAGING = ("linear", "task_arithmetic", "slerp", "model_stock")
PER_MODEL: dict[str, dict[str, float]] = {
    "linear": {"weight": 1.0},
    "task_arithmetic": {"weight": 0.25},
    "ties": {"weight": 1.0, "density": 0.5},
    "dare_ties": {"weight": 0.25, "density": 0.5},
    "breadcrumbs": {"weight": 0.25, "density": 0.5, "gamma": 0.01},
    "della": {"weight": 0.25, "density": 0.5, "epsilon": 0.1},
}
FOR_ALL: dict[str, dict[str, Any]] = {
    "linear": {"normalize": True},
    "slerp": {"t": 0.5},
    "task_arithmetic": {"normalize": False, "lambda": 1.0},
    "ties": {"normalize": True, "lambda": 1.0},
    "dare_ties": {"normalize": False, "lambda": 1.0},
    "breadcrumbs": {"normalize": False, "lambda": 1.0},
    "della": {"normalize": False, "lambda": 1.0},
}
REFERENCED = ("ties", "dare_ties", "breadcrumbs", "della", "model_stock")
METHODS = (*AVERAGING, "dare_ties", "breadcrumbs", "ties", "della")
SINGULAR = ("tsv_m", "r_tsvm")
LEAST = dict.fromkeys(AVERAGING, 2.5) | {"dare_ties": 4.0, "ties": 8.0}
MOST_MEMORY, MOST_FLOORS = 0.5, 3.0
GOALS = {
    "averaging": ">= 2.5x",
    "dare_ties": ">= 4x",
    "ties": ">= 8x",
    "memory": "<= 0.5x",
    "executor, averaging": "<= 3 floors",
}
NOTE = """\
{shape}, {experts} checkpoints (SLERP: two), {rounds} rounds, the two sides in turn; the median, and the round farthest
to each side. Memory: the largest of RSS and anonymous memory of ours over theirs; the goal is for RSS. Floors: seconds
of the executor within a process that has imported all, over those of reading the inputs once and writing the result
once, synced. GFLOP/s of TSV-M and R-TSVM, on models of one layer: 14 m n^2 + 8 n^3 operations for each SVD of an m x n
matrix (m >= n) with both factors, of {experts} models and of the two joint bases, over the whole time of the executor;
its peak is the fastest float32 matrix product measured here in as many threads."""


def write_models(folder: Path, shape: Mapping[str, int], count: int) -> list[Path]:
    """The base and ``count`` experts, in that order."""
    import torch

    torch.manual_seed(0)
    names = ["base", *(f"expert_{number}" for number in range(count))]
    tensors = dict(_tensors(shape))
    per_file = -(-len(tensors) // SHARDS)
    for number in range(SHARDS):
        group = list(tensors.items())[number * per_file : (number + 1) * per_file]
        base = {name: 0.02 * torch.randn(size) for name, size in group}
        for name in names:
            noise = 0.0 if name == "base" else 5e-4
            values = {tensor: (x + noise * torch.randn_like(x)).bfloat16() for tensor, x in base.items()}
            _write_shard(folder / name, number, values, tensors)
    for name in names:
        _write_rest(folder / name, shape, tensors, per_file)
    return [folder / name for name in names]


def _tensors(shape: Mapping[str, int]) -> list[tuple[str, tuple[int, ...]]]:
    hidden, inner, vocabulary = shape["hidden"], shape["inner"], shape["vocabulary"]
    found: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (vocabulary, hidden))]
    for layer in range(shape["layers"]):
        place = f"model.layers.{layer}"
        found += [(f"{place}.self_attn.{name}_proj.weight", (hidden, hidden)) for name in "qkvo"]
        found += [(f"{place}.mlp.{name}_proj.weight", (inner, hidden)) for name in ("gate", "up")]
        found.append((f"{place}.mlp.down_proj.weight", (hidden, inner)))
        found += [(f"{place}.{name}_layernorm.weight", (hidden,)) for name in ("input", "post_attention")]
    return [*found, ("model.norm.weight", (hidden,)), ("lm_head.weight", (vocabulary, hidden))]


def _file(number: int) -> str:
    return f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"


def _write_shard(folder: Path, number: int, values: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(values), folder / _file(number), metadata={"format": "pt"})


def _write_rest(folder: Path, shape: Mapping[str, int], tensors: Mapping[str, Any], per_file: int) -> None:
    weight_map = {name: _file(index // per_file) for index, name in enumerate(tensors)}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["inner"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["hidden"] // 64,
        "num_key_value_heads": shape["hidden"] // 64,
        "vocab_size": shape["vocabulary"],
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def merge_file(path: Path, method: str, models: Sequence[Path], *, ours: bool) -> Path:
    """The merge of ``models``, the first of which is the base."""
    import yaml

    base, *experts = models
    listed: list[dict[str, Any]] = [{"model": str(m), "parameters": PER_MODEL.get(method, {})} for m in experts]
    if method == "slerp":
        base, listed = experts[0], listed[:2]
    content = {"merge_method": method, "models": listed, "parameters": FOR_ALL.get(method, {}), "dtype": "bfloat16"}
    if method != "linear":
        content["base_model"] = str(base)
    if ours and method in REFERENCED:
        content["reference"] = "mergekit"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def whole(command: Sequence[str], out: Path) -> dict[str, float]:
    """A process from its start to its end; its result is looked at and deleted."""
    shutil.rmtree(out, ignore_errors=True)
    memory = {"VmHWM": 0, "RssAnon": 0}
    begin = time.perf_counter()
    process = subprocess.Popen(
        [*command, str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    watcher = threading.Thread(target=_watch, args=(process.pid, memory))
    watcher.start()
    assert process.stderr is not None
    said = process.stderr.read().decode(errors="replace")
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    watcher.join()
    if process.returncode != 0 or not (out / "config.json").is_file():
        raise SystemExit(f"{' '.join(command)}: ended with {process.returncode}\n{said[-3000:]}")
    shutil.rmtree(out)
    return {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "rss_mb": memory["VmHWM"] * 1024 / 1e6,
        "anonymous_mb": memory["RssAnon"] * 1024 / 1e6,
    }


def _watch(pid: int, memory: dict[str, int]) -> None:
    """The most of each figure of /proc/PID/status, until the process has ended. Its peak RSS is exact to a moment."""
    while True:
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            return
        found = {
            name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines) if name in memory
        }
        if not found:  # it is a zombie
            return
        memory.update({name: max(memory[name], value) for name, value in found.items()})
        time.sleep(0.005)


def warm(models: Sequence[Path]) -> None:
    """Into the page cache."""
    for file in (file for model in models for file in model.glob("*.safetensors")):
        with file.open("rb", buffering=0) as opened:
            while opened.read(1 << 24):
                pass


def floor(models: Sequence[Path], out: Path) -> float:
    """Seconds to read all files of ``models`` and to write as much as one of them holds, synced."""
    files = [file for model in models for file in sorted(model.glob("*.safetensors"))]
    size = sum(file.stat().st_size for file in models[0].glob("*.safetensors"))
    step = 1 << 22

    def read(place: tuple[int, int]) -> None:
        buffer = memoryview(_buffer())
        for start in range(place[1], place[1] + step, len(buffer)):
            os.preadv(place[0], [buffer], start)

    def write(start: int) -> None:
        buffer = memoryview(_buffer())
        for at in range(start, min(start + step, size), len(buffer)):
            os.pwrite(target, buffer[: min(len(buffer), size - at)], at)

    out.parent.mkdir(exist_ok=True)
    out.unlink(missing_ok=True)
    descriptors = [os.open(file, os.O_RDONLY) for file in files]
    begin = time.perf_counter()
    target = os.open(out, os.O_RDWR | os.O_CREAT)
    os.posix_fallocate(target, 0, size)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        places = [
            (d, s) for d, file in zip(descriptors, files, strict=True) for s in range(0, file.stat().st_size, step)
        ]
        list(pool.map(read, places))
        list(pool.map(write, range(0, size, step)))
    os.fsync(target)
    seconds = time.perf_counter() - begin
    for descriptor in (*descriptors, target):
        os.close(descriptor)
    out.unlink()
    return seconds


_local = threading.local()


def _buffer() -> bytearray:
    if not hasattr(_local, "buffer"):
        _local.buffer = bytearray(1 << 18)
    return _local.buffer  # type: ignore[no-any-return]


def executor(file: Path, out: Path) -> float:
    """Seconds of the executor itself."""
    from direct_rlhf.merge.executor import Execution, execute
    from direct_rlhf.merge.plan import plan_merge
    from direct_rlhf.recipe.merge import load_merge

    shutil.rmtree(out, ignore_errors=True)
    plan = plan_merge(load_merge(file), out)
    begin = time.perf_counter()
    execute(plan, Execution(device="cpu"))
    seconds = time.perf_counter() - begin
    shutil.rmtree(out)
    return seconds


def peak() -> float:
    """FLOP/s of the fastest large float32 product, in all threads."""
    import torch

    threads = len(os.sched_getaffinity(0))
    best = float("inf")

    def product(_: int) -> None:
        a, b = torch.ones(1024, 1024), torch.ones(1024, 1024)
        for _ in range(4):
            torch.mm(a, b)

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(10):
            begin = time.perf_counter()
            list(pool.map(product, range(threads)))
            best = min(best, time.perf_counter() - begin)
    torch.set_num_threads(before)
    return threads * 4 * 2 * 1024**3 / best


def singular_work(shape: Mapping[str, int], experts: int) -> float:
    """Operations of TSV-M by full SVDs of every matrix: of each expert, and of the two joint bases."""
    total = 0.0
    for name, size in _tensors(shape):
        if len(size) == 2 and "embed" not in name and "lm_head" not in name:
            m, n = max(size), min(size)
            total += experts * (14 * m * n**2 + 8 * n**3)
            total += sum(14 * rows * n**2 + 8 * n**3 for rows in (m, n))
    return total


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    values = [their / our for our, their in zip(ours, theirs, strict=True)]
    return Ratio(float(statistics.median(values)), min(values), max(values))


def side_by_side(
    models: Sequence[Path], folder: Path, options: argparse.Namespace, methods: Sequence[str]
) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Method -> side -> its reports, one a round."""
    mergekit = str(Path(peer_python("mergekit")).with_name("mergekit-yaml"))
    commands = {OURS: [sys.executable, "-m", "direct_rlhf", "merge"], THEIRS: [mergekit, "--quiet"]}
    found: dict[str, dict[str, list[dict[str, float]]]] = {m: {side: [] for side in commands} for m in methods}
    for number in range(options.rounds):
        for method in methods:
            for side in list(commands) if number % 2 == 0 else list(commands)[::-1]:
                file = merge_file(folder / f"{method}-{side}.yaml", method, models, ours=side == OURS)
                report = whole([*commands[side], str(file), *(["--out"] if side == OURS else [])], folder / "out")
                found[method][side].append(report)
                memory = f"{report['rss_mb']:.0f} MB ({report['anonymous_mb']:.0f} anonymous)"
                seconds = f"{report['seconds']:.2f} s, CPU {report['cpu_seconds']:.2f} s"
                print(f"round {number + 1}, {method}, {side}: {seconds}, {memory}", file=sys.stderr, flush=True)
    return found


def measure(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], list[list[str]], bool]:
    """What came out, the table, and whether all goals are held."""
    shape = SHAPES[options.shape]
    models = write_models(folder, shape, max(EXPERTS, 8 if options.scaling else 0))
    four = models[: EXPERTS + 1]
    warm(models)
    measured: dict[str, Any] = {}
    table = [["method", "mergekit, s", "ours, s", "ratio", "goal", "RSS", "anonymous", "executor, s"]]
    held = True
    for method, sides in side_by_side(four, folder, options, options.methods).items():
        seconds = ratio(*([r["seconds"] for r in sides[side]] for side in (OURS, THEIRS)))
        rss, anonymous = (
            ratio(*([r[name] for r in sides[side]] for side in (THEIRS, OURS))) for name in ("rss_mb", "anonymous_mb")
        )
        alone = executor_seconds(folder, method, four, options.rounds)
        middles = {
            side: {name: round(statistics.median(r[name] for r in reports), 3) for name in reports[0]}
            for side, reports in sides.items()
        }
        measured[method] = {**middles, "ratio": seconds, "rss": rss, "anonymous": anonymous, "executor_seconds": alone}
        good = seconds.value >= LEAST.get(method, 0.0) and rss.value <= MOST_MEMORY
        held &= good
        least = LEAST.get(method)
        table.append(
            [
                method,
                f"{middles[THEIRS]['seconds']:.2f}",
                f"{middles[OURS]['seconds']:.2f}",
                str(seconds),
                verdict(seconds.value >= least, f">= {least}x") if least else "none",
                str(rss),
                str(anonymous),
                f"{alone:.2f}",
            ]
        )
    measured["floor"] = least_of(lambda: floor(models[1 : EXPERTS + 1], folder / "floor"), options.rounds)
    floors = measured["linear"]["executor_seconds"] / measured["floor"] if "linear" in measured else None
    measured["executor_floors"] = floors
    held &= floors is not None and floors <= MOST_FLOORS
    table.append(["floor", "", "", "", "", "", "", f"{measured['floor']:.2f}"])
    if options.scaling:
        measured["scaling"] = {
            str(count): executor_seconds(folder, "linear", models[: count + 1], options.rounds) for count in (2, 4, 8)
        }
    if options.singular:
        measured["peak_gflops"] = peak() / 1e9
        few = shape | {"layers": 1, "vocabulary": 4096}  # the matrices are the same
        matrices = write_models(folder / "few", few, EXPERTS)
        for method in SINGULAR:
            alone = executor_seconds(folder, method, matrices, 1)
            rate = singular_work(few, EXPERTS) / alone / 1e9
            measured[method] = {
                "executor_seconds": alone,
                "gflops": rate,
                "share_of_peak": rate / measured["peak_gflops"],
            }
            table.append([method, "", "", "", "", "", "", f"{alone:.2f} ({rate:.0f} GFLOP/s)"])
    return measured, table, held


def executor_seconds(folder: Path, method: str, models: Sequence[Path], rounds: int) -> float:
    """The median of the rounds, after one that is not counted."""
    file = merge_file(folder / f"{method}-alone.yaml", method, models, ours=True)
    times = [executor(file, folder / "out") for _ in range(rounds + (rounds > 1))]
    return float(statistics.median(times[-rounds:]))


def least_of(work: Callable[[], float], rounds: int) -> float:
    return float(statistics.median([work() for _ in range(rounds + 1)][1:]))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--large", action="store_true", help="1 B parameters instead of 250 M")
    parser.add_argument("--shape", choices=SHAPES, help="the size by name; default 250M, with --quick tiny")
    parser.add_argument(
        "--methods", type=lambda text: text.split(","), default=list(METHODS), help="with commas between"
    )
    parser.add_argument("--no-scaling", dest="scaling", action="store_false", help="leave out 2, 4 and 8 models")
    parser.add_argument("--no-singular", dest="singular", action="store_false", help="leave out TSV-M and R-TSVM")
    parser.add_argument("--folder", type=Path, help="where the models are made; default: a temporary folder")
    options = parser.parse_args()
    options.shape = options.shape or ("1B" if options.large else "tiny" if options.quick else "250M")
    options.rounds = 1 if options.quick else options.rounds
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        measured, table, held = measure(options, Path(name))
    note = NOTE.format(shape=options.shape, experts=EXPERTS, rounds=options.rounds)
    finish("merging", measured, GOALS, held=held, options=options, table=table, note=note)


if __name__ == "__main__":
    main()
