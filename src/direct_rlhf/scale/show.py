"""`direct-rlhf plan RECIPE --gpus N`: the tables, for a terminal of 80 columns."""

from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from direct_rlhf.errors import ConfigError
from direct_rlhf.recipe.load import LoadedRecipe
from direct_rlhf.recipe.needs import require_processes
from direct_rlhf.recipe.schema import Recipe, TrainedReward
from direct_rlhf.scale.hardware import Hardware, hardware
from direct_rlhf.scale.limits import MOST, fits, highest, limits
from direct_rlhf.scale.memory import host_bytes, kept, phases, roles_of
from direct_rlhf.scale.setting import Setting
from direct_rlhf.scale.shapes import shape_of
from direct_rlhf.scale.speed import Span, efficiency, iteration, pair_step, pair_steps, trained
from direct_rlhf.scale.traffic import Collective, exchanged, of_pass, of_rollout
from direct_rlhf.scale.words import duration, size


def settings(
    loaded: LoadedRecipe, gpus: str, *, per_node: int, profile: str, shape: str | None, memory: int | None
) -> tuple[list[Setting], Hardware]:
    """What ``--gpus 8`` or ``--gpus 1,8,64`` and the options beside it mean.

    Errors: ConfigError for what is no such number, and for a recipe that cannot run in so many processes.
    """
    recipe = loaded.recipe
    counts = [_count(text) for text in gpus.split(",")]
    found = hardware(profile)
    if memory is not None:
        found = replace(found, memory=float(memory))
    known = shape_of(recipe.model.base, loaded.folder, shape)
    for count in counts:
        require_processes(recipe, count)
    return [Setting(recipe, known, count, per_node) for count in counts], found


def _count(text: str) -> int:
    if not text.strip().isdigit() or not 1 <= int(text) <= MOST:
        raise ConfigError(f"--gpus {text.strip()}: give a number from 1 to {MOST}, or several with commas: 1,8,64.")
    return int(text)


def stages_of(recipe: Recipe) -> list[str]:
    """The sections of what the recipe trains on pairs, in the order of a run."""
    uses_ppo = any(arm.endswith("ppo") for arm in recipe.arms)
    lagrangian = recipe.ppo.lagrangian
    found = ["reward"] if uses_ppo and isinstance(recipe.ppo.reward, TrainedReward) else []
    found += ["cost"] if uses_ppo and lagrangian.enabled and isinstance(lagrangian.cost, TrainedReward) else []
    found += ["sft"] if {"sft", "sft_ppo"} & set(recipe.arms) else []
    return found + (["dpo"] if "dpo" in recipe.arms else [])


def show(found: Sequence[Setting], profile: Hardware, pairs: int | None) -> None:
    """One setting at length, or a line for each of several."""
    out = Console(highlight=False, width=min(Console().width, 80))
    one = found[0]
    out.print(
        f"{one.recipe.name} with the shape of {one.shape.name} ({one.shape.whole / 1e9:.2f} billion weights) on "
        f"{profile.name}, {one.per_node} GPUs a node.\nEstimates by arithmetic: nothing of it is measured.\n"
    )
    if len(found) == 1:
        _at_length(out, one, profile, pairs)
    else:
        out.print(_overview(found, profile))
    for setting in found:
        stops = limits(setting, profile)
        if stops:
            out.print(f"\n[bold]Where it stops to scale, {gpus(setting.gpus)}[/bold]")
        for sentence in stops:
            out.print(f"- {sentence}", markup=False)


def problem(setting: Setting, profile: Hardware) -> str | None:
    """Why it cannot run; None if it can."""
    if fits(setting, profile):
        return None
    phase = highest(setting)
    return (
        f"PPO, {phase.name}: needs {size(phase.bytes)} of a GPU, {size(profile.usable * profile.memory)} of "
        f"{profile.name}'s {size(profile.memory)} are usable. What to change stands above."
    )


def gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"


def _overview(found: Sequence[Setting], profile: Hardware) -> Table:
    columns = ("GPUs", "highest memory", "sent a step", "iteration", "of it waiting", "PPO", "efficiency")
    table = _table("PPO", columns)
    for setting in found:
        table.add_row(*overview_row(setting, profile), style=None if fits(setting, profile) else "red")
    return table


def overview_row(setting: Setting, profile: Hardware) -> list[str]:
    """GPUs, highest memory and its phase, traffic of a policy step, an iteration, its waiting, all, efficiency."""
    phase, spans = highest(setting), iteration(setting, profile)
    seconds = sum(span.seconds for span in spans)
    return [
        str(setting.gpus),
        f"{size(phase.bytes)} ({phase.name})",
        size(setting.passes * sum(one.sent for one in of_pass(setting, trained(setting, "ppo")[0]))),
        duration(seconds),
        f"{sum(span.waiting for span in spans) / seconds:.0%}",
        duration(seconds * setting.recipe.ppo.iterations),
        f"{efficiency(setting, profile):.0%}",
    ]


def _at_length(out: Console, setting: Setting, profile: Hardware, pairs: int | None) -> None:
    roles = _table(f"What a GPU keeps of PPO's roles ({_lie(setting)})", ("role", "weights", "gradients", "AdamW"))
    for role in roles_of(setting, "ppo"):
        share = kept(setting, role)
        roles.add_row(
            role.name, *(size(part * share) if part else "-" for part in (role.weights, role.gradients, role.moments))
        )
    out.print(roles, "")
    memory = _table("A GPU's memory at its highest", ("stage", "phase", "bytes", ""))
    for stage in [*stages_of(setting.recipe), "ppo"]:
        for index, phase in enumerate(phases(setting, stage)):
            memory.add_row(stage if index == 0 else "", phase.name, f"[bold]{size(phase.bytes)}[/bold]", "")
            for what, n_bytes in phase.parts.items():
                memory.add_row("", "", size(n_bytes), what)
    out.print(memory)
    out.print(f"{size(profile.usable * profile.memory)} of {size(profile.memory)} are taken to be usable.")
    if host_bytes(setting):
        out.print(f"CPU memory of a node while models load: {size(host_bytes(setting))}.")
    out.print("")
    if setting.gpus > 1:
        _traffic(out, setting, profile)
    spans = iteration(setting, profile)
    time = _table("Time of one iteration of PPO", ("part", "time", "of it waiting"))
    for span in [*spans, _sum(spans)]:
        waits = "-" if span.waiting < 1e-9 else duration(span.waiting)
        time.add_row(span.name, duration(span.seconds), waits, style="bold" if span.name == "all" else None)
    out.print(time, "")
    _hours(out, setting, profile, pairs)


def _traffic(out: Console, setting: Setting, profile: Hardware) -> None:
    table = _table("What each GPU sends", ("when", "what", "bytes", "time"))

    def add(when: str, collectives: Sequence[Collective]) -> None:
        for index, one in enumerate(collectives):
            table.add_row(when if index == 0 else "", one.what, size(one.sent), duration(one.seconds(profile)))

    for role in trained(setting, "ppo"):
        add(f"a pass of the {role.name}", of_pass(setting, role))
    add("an iteration", of_rollout(setting))
    table.add_row(
        "", "answers and scores (gloo)", size(exchanged(setting)), duration(exchanged(setting) / profile.exchange)
    )
    out.print(table)
    out.print(
        f"A step of {setting.recipe.ppo.minibatch_size} answers is {setting.passes} passes of up to "
        f"{setting.micro_rows} answers a GPU.\n"
    )


def _hours(out: Console, setting: Setting, profile: Hardware, pairs: int | None) -> None:
    table = _table("Time of the stages, every row as long as the recipe allows", ("stage", "steps", "a step", "all"))
    known, total = True, 0.0
    for stage in stages_of(setting.recipe):
        step, steps = pair_step(setting, profile, stage).seconds, pair_steps(setting, stage, pairs)
        known, total = known and steps is not None, total + (steps or 0) * step
        table.add_row(
            stage, f"{steps:,}" if steps else "not known", duration(step), duration(steps * step) if steps else "-"
        )
    each = sum(span.seconds for span in iteration(setting, profile))
    arms = sum(arm.endswith("ppo") for arm in setting.recipe.arms)
    iterations = setting.recipe.ppo.iterations * arms
    total += iterations * each
    table.add_row("ppo", f"{iterations:,} iterations", duration(each), duration(iterations * each))
    table.add_row("all" if known else "what is known", "", "", duration(total), style="bold")
    out.print(table)
    if not known:
        out.print("The data are on the hub: give the number of training pairs with --pairs N.")
    if setting.gpus > 1:
        out.print(f"Efficiency of PPO against one GPU of unlimited memory: {efficiency(setting, profile):.0%}.")
    out.print("Not in it: data, fitness card, guard's probe, evaluation and report, which one process does.")


def _lie(setting: Setting) -> str:
    if setting.gpus == 1:
        return "one process"
    return f"{gpus(setting.gpus)}, {setting.shard} share a copy"


def _sum(spans: Sequence[Span]) -> Span:
    return Span("all", sum(span.seconds for span in spans), sum(span.busy for span in spans))


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    words = {"role", "stage", "phase", "part", "what", "when", ""}
    for column in columns:
        table.add_column(column, justify="left" if column in words else "right", overflow="fold")
    return table
