"""What the verbs print: tables on standard output, nothing that a stage needs."""

import sys
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from direct_rlhf.recipe.load import LoadedRecipe
from direct_rlhf.recipe.schema import DataSource

_FILE_WIDTH = 200  # columns where the output is no terminal, so that commands and paths stay in one piece


def show_pairs(title: str, pairs: Iterable[tuple[str, str]]) -> None:
    """A table of two columns."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for what, found in pairs:
        table.add_row(escape(what), escape(found))
    _console().print(table)


def opening(loaded: LoadedRecipe, root: Path) -> list[tuple[str, str]]:
    """What a run is about to do."""
    recipe = loaded.recipe
    rows = [
        ("run", str(root / recipe.name)),
        ("base model", f"{recipe.model.base} ({recipe.model.tuning}, {recipe.model.dtype})"),
        ("arms", ", ".join(recipe.arms)),
        ("preferences", _sources(recipe.data.preferences)),
        ("prompts", _sources(recipe.data.prompts) if recipe.data.prompts else "those of the preferences"),
    ]
    if any(arm.endswith("ppo") for arm in recipe.arms):
        ppo = recipe.ppo
        rows.append(
            (
                "PPO",
                f"{ppo.iterations} iterations of {ppo.rollouts} answers, up to {ppo.sampling.max_new_tokens} tokens",
            )
        )
    return [*rows, ("evaluation", ", ".join(recipe.evaluation.suites)), ("seed", str(recipe.seed))]


def closing(run: Path) -> None:
    """The results of a run and where its report is, or where the run is if it has not come so far."""
    if (run / "results.json").is_file():
        from direct_rlhf.report.table import print_results

        print_results(run, _console())
    else:
        print(f"Run: {run}")


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=_FILE_WIDTH)


def _sources(sources: list[DataSource]) -> str:
    return ", ".join(f"{source.path} ({source.kind})" for source in sources) or "none"
