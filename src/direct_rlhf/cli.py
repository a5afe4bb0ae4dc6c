"""The command line: thin verbs. Each imports what it runs when it is called, so that `--help` costs nothing.

Exit codes: 0 done, 1 other failure, 2 bad configuration, 3 bad data, 4 out of memory, 5 diverged, 75 interrupted and
resumable: after one signal (SIGTERM or Ctrl+C) with all work kept, after a second one from the last checkpoint.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from direct_rlhf import __version__
from direct_rlhf.errors import ConfigError, DirectRLHFError, Interrupted
from direct_rlhf.run.world import launched

if TYPE_CHECKING:
    from direct_rlhf.recipe.load import LoadedRecipe


class _Verbs(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:  # before typer turns it into an exit code of its own
            raise Interrupted("interrupted. A run goes on where it was with --resume.") from error


app = typer.Typer(
    cls=_Verbs,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="RLHF applied directly to a base language model, without SFT, and the proof of what it did.",
    epilog="A start: direct-rlhf quickstart",
)
reward_app = typer.Typer(no_args_is_help=True, help="Train the reward model, or look at its fitness.")
data_app = typer.Typer(no_args_is_help=True, help="Look at the data as a run sees it.")
app.add_typer(reward_app, name="reward")
app.add_typer(data_app, name="data")

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as ppo.clip=0.1 data.path=FOLDER.")
]
Root = Annotated[Path, typer.Option(help="Folder that holds the run directories.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run of this name, exactly where it stopped.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Throw the run of this name away and start again.")]
RUNS = Path("runs")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; errors of ours are one message, others keep their traceback."""
    speaks = os.environ.get("RANK", "0") == "0"  # of several processes the first one, as all raise the same
    try:
        app(list(sys.argv[1:] if arguments is None else arguments), prog_name="direct-rlhf")
    except DirectRLHFError as error:
        if speaks:
            print(f"direct-rlhf: {error}", file=sys.stderr, flush=True)
        if launched().size > 1:
            os._exit(error.exit_code)  # what torch would still do in order may wait for the other processes
        return error.exit_code
    except SystemExit as leave:  # how typer ends, well or with a usage error
        return leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    return 0


@app.callback(invoke_without_command=True)
def options(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        print(f"direct-rlhf {__version__}")
        raise typer.Exit


@app.command()
def quickstart(
    overrides: Overrides = None, root: Root = RUNS, resume: Resume = False, overwrite: Overwrite = False
) -> None:
    """The whole study on the embedded world: minutes on a CPU, no download."""
    _run(_load("quickstart", overrides), root, resume=resume, overwrite=overwrite)


@app.command()
def init(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="A shipped recipe.")] = None,
    file: Annotated[Path | None, typer.Argument(metavar="FILE", help="Where to write it. Default: NAME.yaml.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the shipped recipes and leave.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")] = False,
) -> None:
    """Write a commented recipe of your own from a shipped one."""
    from direct_rlhf.recipe.load import find_recipe, load_recipe, shipped_recipes

    if list_:
        for shipped in shipped_recipes():
            print(f"{shipped:16} {load_recipe(shipped).recipe.description}")
        return
    if name is None:
        raise ConfigError(f"init: name a shipped recipe: {', '.join(shipped_recipes())}.")
    text = find_recipe(name).read_text(encoding="utf-8")
    target = file or Path(f"{Path(name).stem}.yaml")
    try:
        with target.open("w" if force else "x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError as error:
        raise ConfigError(f"{target}: exists already. Name another file, or replace it with --force.") from error
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written: {error.strerror}.") from error
    print(f"Wrote {target}. Next: direct-rlhf check {target}, then direct-rlhf run {target}")


@app.command()
def check(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    nproc: Annotated[
        int, typer.Option(min=1, metavar="N", help="Processes that the run will be, on all machines.")
    ] = 1,
) -> None:
    """Look at all that a recipe names, without loading weights; every problem at once."""
    from direct_rlhf.check import check as look
    from direct_rlhf.screen import show_pairs

    findings = look(_load(recipe, overrides), processes=nproc)
    show_pairs("Found", findings.rows)
    findings.raise_problems()
    print("Nothing wrong.")


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    root: Root = RUNS,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Plan for a device of this memory, such as 80GB.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Only warn of what cannot fit.")] = False,
    gpus: Annotated[
        str | None,
        typer.Option(metavar="N[,N]", help="Estimate memory, traffic and time on N GPUs, 1 to 1024, by arithmetic."),
    ] = None,
    per_node: Annotated[int, typer.Option(min=1, metavar="N", help="With --gpus: GPUs of a machine.")] = 8,
    hardware: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="With --gpus: a100-80gb, h100, h200, l40s, or a YAML file.")
    ] = "h100",
    shape: Annotated[
        str | None, typer.Option(metavar="NAME", help="With --gpus: a model's shape, such as llama-2-13b.")
    ] = None,
    pairs: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="With --gpus: training pairs of data on the hub.")
    ] = None,
) -> None:
    """Memory per role and phase, tokens, steps and disk of a run, without loading weights; refuses what cannot fit."""
    from direct_rlhf.plan import parse_size, show
    from direct_rlhf.plan import plan as make

    loaded, size = _load(recipe, overrides), parse_size(memory) if memory else None
    if gpus is not None:
        from direct_rlhf.scale import show as at_scale

        settings, profile = at_scale.settings(
            loaded, gpus, per_node=per_node, profile=hardware, shape=shape, memory=size
        )
        at_scale.show(settings, profile, pairs)
        found = at_scale.problem(settings[0], profile) if len(settings) == 1 else None
        problems = [found] if found else []
    else:
        made = make(loaded, root=root, memory=size)
        show(made)
        problems = made.problems()
    if problems and not force:
        raise ConfigError("this run cannot fit (--force: only warn).\n" + "\n".join(problems))
    for problem in problems:
        print(f"Warning: {problem}", file=sys.stderr)


@app.command()
def doctor(deep: Annotated[bool, typer.Option("--deep", help="Start torch and look at its devices.")] = False) -> None:
    """What this machine and this installation offer."""
    from direct_rlhf.doctor import examine
    from direct_rlhf.screen import show_pairs

    rows, problem = [], None
    try:
        for row in examine(deep=deep):
            rows.append(row)  # noqa: PERF402 (what was found is shown even if the end raises)
    except ConfigError as error:
        problem = error
    show_pairs("Doctor", rows)
    if problem:
        raise problem


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    root: Root = RUNS,
    resume: Resume = False,
    overwrite: Overwrite = False,
    only: Annotated[str | None, typer.Option(metavar="STAGE", help="Run this stage only.")] = None,
    nproc: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Processes on this machine, one a GPU (torchrun is started with them)."),
    ] = None,
    max_restarts: Annotated[
        int, typer.Option(min=0, metavar="N", help="With --nproc: times that lost processes are started again.")
    ] = 0,
) -> None:
    """Every stage of a recipe that is not done yet."""
    loaded = _load(recipe, overrides)
    if nproc is None or (nproc == 1 and not max_restarts):
        _run(loaded, root, resume=resume, overwrite=overwrite, only=only)
        return
    from direct_rlhf.launch import launch
    from direct_rlhf.recipe.needs import require_inputs

    require_inputs(loaded.recipe)
    arguments = [recipe, *(overrides or []), *(["--only", only] if only else [])]
    code = launch(loaded, root, arguments, resume=resume, overwrite=overwrite, nproc=nproc, max_restarts=max_restarts)
    raise typer.Exit(code)


@reward_app.command("train")
def reward_train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    root: Root = RUNS,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Train the reward model."""
    _run(_load(recipe, overrides), root, resume=resume, overwrite=overwrite, only="reward_model")


@reward_app.command("check")
def reward_check(recipe: RecipeArgument, overrides: Overrides = None, root: Root = RUNS) -> None:
    """The fitness card of the reward model that `reward train` made."""
    path = _run(_load(recipe, overrides), root, resume=True, only="fitness")
    card = path / "reward_model" / "fitness.json"
    if card.is_file():
        print(card.read_text(encoding="utf-8"))


@app.command()
def sft(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    root: Root = RUNS,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """SFT on the chosen answers, alone."""
    _run(_load(recipe, overrides), root, resume=resume, overwrite=overwrite, only="sft")


@app.command()
def dpo(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    root: Root = RUNS,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """DPO on the preference pairs, alone."""
    _run(_load(recipe, overrides), root, resume=resume, overwrite=overwrite, only="dpo")


@app.command()
def ppo(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    root: Root = RUNS,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """PPO alone, for each of the recipe's PPO arms; the reward model must be there."""
    loaded = _load(recipe, overrides)
    arms = [arm for arm in loaded.recipe.arms if arm.endswith("ppo")]
    if not arms:
        raise ConfigError("arms: none of them uses PPO. Add direct_ppo.")
    for index, arm in enumerate(arms):
        again = index > 0
        _run(loaded, root, resume=resume or again, overwrite=overwrite and not again, only=arm)


@app.command()
def evaluate(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Folders or hub ids; the first is compared against.")
    ],
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Whose evaluation section and dialogue format to use. Default: quickstart; standard with --data."
        ),
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="Suites with commas between: general,conversation,toxicity.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="The field's test sets, a folder each (mmlu, mt_bench ...).")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents per test, questions, prompts per set.")] = None,
    fewshot: Annotated[
        str | None, typer.Option(help="Worked examples: fixed (one block a task) or per-document (lm-eval's own).")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An override; may be repeated.")
    ] = None,
    root: Root = RUNS,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Measure any models: general skill, conversation, toxicity."""
    suites = [name.strip() for name in suite.split(",")] if suite else None
    overrides = [f"evaluation.suites=[{', '.join(suites)}]"] if suites else []
    overrides += [f"evaluation.data={json.dumps(str(data))}"] if data else []
    overrides += [f"evaluation.{name}.limit={limit}" for name in ("general", "conversation", "toxicity") if limit]
    overrides += [f"evaluation.general.fewshot={fewshot}"] if fewshot else []
    loaded = _load(recipe or ("standard" if data else "quickstart"), [*overrides, *(set_ or [])])

    from direct_rlhf import stages
    from direct_rlhf.screen import closing

    closing(stages.evaluate_models(models, loaded, root=root, suites=suites, resume=resume, overwrite=overwrite))


@app.command()
def merge(
    file: Annotated[Path, typer.Argument(metavar="MERGE.yaml", help="A merge file, in mergekit's shape.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the merged model goes.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model in FOLDER.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and show it; write nothing.")] = False,
    device: Annotated[str, typer.Option(help="Where it is computed: auto, cpu, cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads. Default: one for each core.")] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=V,V", help="Values of a parameter to try; the best by --metric is merged. Repeatable."
        ),
    ] = None,
    metric: Annotated[
        str,
        typer.Option(
            help="For --sweep: conversation.score, general.mean ...; `-toxicity.toxic_rate`: lower is better."
        ),
    ] = "conversation.score",
    recipe: Annotated[str, typer.Option(help="For --sweep: whose evaluation measures.")] = "quickstart",
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="For --sweep: an override of that recipe.")
    ] = None,
    root: Root = RUNS,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a sweep that was stopped.")] = False,
) -> None:
    """Merge models into one: checked before a weight is read, streamed, whole or not at all."""
    from direct_rlhf.recipe.merge import load_merge
    from direct_rlhf.run.signals import StopFlag

    if sweep:
        if dry_run:
            raise ConfigError("--dry-run checks one merge: leave --sweep out, whose combinations are all checked first")
        from direct_rlhf.screen import show_pairs
        from direct_rlhf.study.search import shown
        from direct_rlhf.study.sweep import read_grid
        from direct_rlhf.study.sweep import sweep as search

        tried = search(
            file,
            out,
            read_grid(sweep),
            _load(recipe, set_),
            metric=metric,
            root=root,
            resume=resume,
            overwrite=overwrite,
            device=device,
            threads=threads,
            say=_say,
        )
        show_pairs(metric, [(shown(one.settings), _value(one.shown)) for one in tried])
        print(f"Merged: {out}")
        return
    with StopFlag() as should_stop:
        from direct_rlhf.merge.plan import plan_merge, summary

        plan = plan_merge(load_merge(file), out, overwrite=overwrite)
        if dry_run:
            from direct_rlhf.screen import show_pairs

            show_pairs("Merge", summary(plan))
            print("Nothing wrong. Nothing was written.")
            return
        from direct_rlhf.merge.executor import Execution, execute

        how = Execution(device=device, threads=threads, should_stop=should_stop, say=_say)
        execute(plan, how)
    print(f"Merged: {out}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories; two or more are compared.")],
    out: Annotated[
        Path | None, typer.Option(help="The HTML file. Default: report.html in the run, comparison.html for several.")
    ] = None,
    redact_samples: Annotated[bool, typer.Option("--redact-samples", help="Leave all model text out.")] = False,
) -> None:
    """One HTML file for a run, or a comparison of several."""
    from direct_rlhf import stages

    print(f"Report: {stages.report(runs, out, redact_samples=redact_samples)}")


@app.command()
def chat(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model folder, a run directory, world:base or a hub id.")
    ],
    system: Annotated[str | None, typer.Option(help="Text put before the conversation.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 = the likeliest token each time.")] = 0.7,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Cap on an answer, in tokens.")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal conversations.")] = 0,
) -> None:
    """Talk to a model in the terminal."""
    from direct_rlhf.chat import chat as talk

    talk(model, system=system, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)


@data_app.command("show")
def data_show(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="Pairs to show as tokens.")] = 3,
) -> None:
    """Sources, counts, dropped rows with reasons, lengths, and pairs as tokens, coloured by role and loss mask."""
    from rich.console import Console

    from direct_rlhf.data.show import show
    from direct_rlhf.data.tokens import load_tokens

    loaded = _load(recipe, overrides)
    model = loaded.recipe.model
    tokens = load_tokens(
        model.base, revision=model.revision, trust_remote_code=model.trust_remote_code, folder=loaded.folder
    )
    show(
        loaded.recipe.data,
        loaded.recipe.dialogue,
        tokens,
        folder=loaded.folder,
        console=Console(),
        rows=rows,
        seed=loaded.recipe.seed,
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _value(shown: Mapping[str, float | None]) -> str:
    (value,) = shown.values()
    return "no score" if value is None else f"{value:.4g}"


def _load(ref: str, overrides: Sequence[str] | None) -> "LoadedRecipe":
    from direct_rlhf.recipe.load import load_recipe

    return load_recipe(ref, overrides or ())


def _run(
    loaded: "LoadedRecipe", root: Path, *, resume: bool = False, overwrite: bool = False, only: str | None = None
) -> Path:
    from direct_rlhf.recipe.needs import require_inputs
    from direct_rlhf.screen import closing, opening, show_pairs

    require_inputs(loaded.recipe)
    me = launched()
    if me.is_main:
        show_pairs("direct-rlhf", opening(loaded, root))

    from direct_rlhf import stages

    path = stages.run(loaded, root=root, resume=resume, overwrite=overwrite, only=only)
    if me.is_main:
        closing(path)
    return path
