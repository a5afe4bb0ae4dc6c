"""`direct-rlhf check`: what can be known of a recipe without loading weights, every problem at once. Torch-free."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path

from direct_rlhf.errors import ConfigError, DataError, DirectRLHFError
from direct_rlhf.recipe.load import LoadedRecipe
from direct_rlhf.recipe.needs import idle_processes, missing_inputs, missing_libraries, require_processes
from direct_rlhf.recipe.references import HubReference, resolve_model, resolve_reference, resolve_test_data
from direct_rlhf.recipe.schema import DataSource, HttpReward, ModelReward, PythonReward, ScoredMixture


@dataclass
class Findings:
    """What was found, and what is wrong."""

    rows: list[tuple[str, str]] = field(default_factory=list)  # (what, what was found)
    problems: list[DirectRLHFError] = field(default_factory=list)

    def look(self, what: str, find: Callable[[], str]) -> None:
        """One row, or one problem. Only our own errors are problems of the recipe; others are bugs and pass through."""
        try:
            self.rows.append((what, find()))
        except DirectRLHFError as error:
            self.problems.append(error)
            self.rows.append((what, "problem, see below"))

    def raise_problems(self) -> None:
        """ConfigError if the recipe itself is wrong, DataError if only its data is; one line per problem."""
        if not self.problems:
            return
        kind = ConfigError if any(isinstance(problem, ConfigError) for problem in self.problems) else DataError
        raise kind("\n".join(dict.fromkeys(str(problem) for problem in self.problems)))


def check(loaded: LoadedRecipe, *, rows: int = 200, processes: int = 1) -> Findings:
    """Look at everything the recipe names: model folder, tokenizer, sources, evaluation files, extras.

    ``rows`` is how many rows of each source are read; ``processes`` how many the run will be. A hub id in the recipe is
    the only reason for a connection.
    """
    findings = Findings()
    recipe, folder = loaded.recipe, loaded.folder
    findings.look("recipe", lambda: f"{recipe.name}, sha256 {loaded.sha256[:12]}")
    findings.look("arms", lambda: ", ".join(recipe.arms))
    findings.problems += [ConfigError(problem) for problem in [*missing_inputs(recipe), *missing_libraries(recipe)]]
    if processes > 1:
        findings.look("processes", lambda: _processes(loaded, processes))
    findings.look("model", lambda: _model(recipe.model.base, recipe.model.revision, folder))
    findings.look("tokenizer", lambda: _tokenizer(loaded))
    before = len(findings.problems)
    for what, sources in (
        ("preferences", recipe.data.preferences),
        ("prompts", recipe.data.prompts),
        ("text", recipe.data.text),
    ):
        for source in sources:
            findings.look(what, lambda source=source: _source(loaded, source))  # type: ignore[misc]
    if len(findings.problems) == before:
        _sniff(findings, loaded, rows)
    if recipe.data.mixture.type != "none" and recipe.data.preferences and len(findings.problems) == before:
        _mixture(findings, loaded)
    findings.look("reward", lambda: _reward(loaded))
    if recipe.rollout.engine == "vllm":
        findings.look("rollouts", lambda: _rollouts(loaded))
    data = recipe.evaluation.data
    for suite in recipe.evaluation.suites:
        for file in _suite_files(loaded, suite):
            findings.look(suite, lambda file=file: str(resolve_test_data(file, data, folder)))  # type: ignore[misc]
    if recipe.logging.adapters:
        findings.look("logging", lambda: _adapters(recipe.logging.adapters))
    return findings


def _processes(loaded: LoadedRecipe, processes: int) -> str:
    recipe = loaded.recipe
    require_processes(recipe, processes)
    shared = recipe.parallel.shard_size or processes
    lie = f"{processes} that share one copy of a trained model"
    if shared < processes:
        lie = f"{processes}, with {processes // shared} copies of a trained model" + (
            f", each shared by {shared}" if shared > 1 else ""
        )
    return "; ".join([lie, *idle_processes(recipe, processes)])


def _model(ref: str, revision: str | None, folder: Path) -> str:
    place = resolve_model(ref, folder, revision=revision)
    if isinstance(place, HubReference):
        return f"{place.name} on the hub" + (f", revision {revision}" if revision else ", newest revision")
    config_file = place / "config.json"
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"model.base = {ref}: {place} has no config.json. Give the folder of a model.") from error
    except ValueError as error:
        raise ConfigError(f"model.base = {ref}: {config_file} is not JSON ({error}). Fetch it again.") from error
    weights = sum(file.stat().st_size for file in place.glob("*.safetensors"))
    if not weights:
        raise ConfigError(
            f"model.base = {ref}: {place} has no .safetensors weights. Convert the model, or give another."
        )
    architecture = ", ".join(config.get("architectures") or [config.get("model_type", "unknown architecture")])
    return f"{architecture}, {weights / 1e6:.1f} MB, {place}"


def _tokenizer(loaded: LoadedRecipe) -> str:
    from direct_rlhf.data.dialogue import DialogueFormat
    from direct_rlhf.data.tokens import load_tokens

    model = loaded.recipe.model
    tokens = load_tokens(
        model.base, revision=model.revision, trust_remote_code=model.trust_remote_code, folder=loaded.folder
    )
    if tokens.pad_id == tokens.eos_id:
        raise ConfigError(f"model.base = {model.base}: pad and end of text are one token, {tokens.eos_id}.")
    stops = DialogueFormat(loaded.recipe.dialogue, tokens).stop_strings
    return (
        f"{tokens.vocab_size:,} tokens, end {tokens.eos_id}, pad {tokens.pad_id}, "
        f"stop strings {', '.join(map(repr, stops)) or 'none'}"
    )


def _source(loaded: LoadedRecipe, source: DataSource) -> str:
    from direct_rlhf.data.rows import locate

    place = locate(loaded.recipe.data, source.path, loaded.folder)
    if isinstance(place, HubReference):
        return f"{source.path} (hub data set, {source.kind})"
    return f"{source.path} ({source.kind}, weight {source.weight:g})"


def _sniff(findings: Findings, loaded: LoadedRecipe, rows: int) -> None:
    from direct_rlhf.data.load import sniff

    problems = sniff(loaded.recipe.data, loaded.folder, rows, dialogue=loaded.recipe.dialogue)
    findings.problems += [DataError(problem) for problem in problems]
    findings.rows.append(
        ("rows", "problem, see below" if problems else f"the first {rows} of each local source are good")
    )


def _mixture(findings: Findings, loaded: LoadedRecipe) -> None:
    """The mixture over all rows of the local sources: whether their kinds and sizes allow it."""
    from direct_rlhf.data.mixture import outlook

    section, data = loaded.recipe.data.mixture, loaded.recipe.data
    if isinstance(section, ScoredMixture):
        for kind, ref in section.models.items():
            key = f"data.mixture.models.{kind}"
            findings.look(f"model of {kind}", lambda key=key, ref=ref: _reward_model(loaded, ref, key))  # type: ignore[misc]
    if any(source.path.startswith("hf:") for source in data.preferences):
        findings.rows.append(
            ("mixture", f"{section.type}; data on the hub are not read here, so their kinds are not known")
        )
        return

    def look() -> str:
        from direct_rlhf.data.load import load_preferences

        recipe = loaded.recipe
        found = load_preferences(data, folder=loaded.folder, seed=recipe.seed, dialogue=recipe.dialogue)
        return outlook(section, found.train, found.held_out)

    findings.look("mixture", look)


def _reward_model(loaded: LoadedRecipe, ref: str, key: str) -> str:
    place = resolve_reference(ref, loaded.folder)
    if not (isinstance(place, Path) and (place / "reward.json").is_file()):
        raise ConfigError(
            f"{key} = {ref}: no reward model here (reward.json is missing). "
            "Make one with: direct-rlhf reward train RECIPE"
        )
    return f"the reward model in {place}"


def _reward(loaded: LoadedRecipe) -> str:
    reward = loaded.recipe.ppo.reward
    if isinstance(reward, ModelReward):
        return _reward_model(loaded, reward.path, "ppo.reward.path")
    if isinstance(reward, PythonReward):
        module = reward.target.partition(":")[0]
        places = [str(loaded.folder.resolve()), *sys.path]  # found, not imported: it may import anything
        if PathFinder.find_spec(module.partition(".")[0], places) is None:
            raise ConfigError(
                f"ppo.reward.target = {reward.target}: no module {module} beside the recipe or among the installed "
                "packages. Correct the name, or put the module beside the recipe."
            )
        return f"Python: {reward.target}"
    if isinstance(reward, HttpReward):
        return f"server: {reward.url} (not called here)"
    return "trained by this recipe"


def _rollouts(loaded: LoadedRecipe) -> str:
    section = loaded.recipe.rollout.vllm
    return f"vLLM server: {section.url} (not called here)" if section.mode == "server" else "vLLM in this process"


def _suite_files(loaded: LoadedRecipe, suite: str) -> list[str]:
    evaluation = loaded.recipe.evaluation
    if suite == "conversation":
        conversation = evaluation.conversation
        names = ("questions", "references", "judge_prompts", "self_check")
        files = [*(getattr(conversation, name) for name in names), conversation.judging.recorded]
        return [ref for ref in files if ref is not None]
    if suite == "toxicity":
        section = evaluation.toxicity
        named = [section.bad_words, section.neutral_words, section.crows_pairs, section.classifier_path]
        return [*section.prompt_files, *(ref for ref in named if ref is not None)]
    tasks = [task for task in evaluation.general.tasks if task.endswith((".yaml", ".yml"))]
    if evaluation.data is not None:
        from direct_rlhf.evaluate.standard import standard_tests

        asked = {entry.partition(":")[2] for entry in evaluation.general.tasks if entry.partition(":")[0] == "standard"}
        tasks += [f"data:{test.folder}" for test in standard_tests() if "" in asked or test.name in asked]
    return tasks + ([evaluation.general.include_path] if evaluation.general.include_path else [])


def _adapters(names: Sequence[str]) -> str:
    from direct_rlhf.run.adapters import check_extras

    check_extras(names)
    return ", ".join(names)
