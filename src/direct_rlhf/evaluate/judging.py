"""From the recipe to a judge that is asked in words, and what the run keeps of it.

evaluation/ARM/judgments.jsonl         replies on an arm's answers, one line each, fsynced
evaluation/ARM/answers.jsonl           the arm's answers, kept while they are made
evaluation/self_check/                 judgments.jsonl and items.jsonl of the judge self-check
evaluation/pairwise.json               arms side by side; replies in evaluation/pairwise/judgments.jsonl
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from direct_rlhf.errors import ConfigError, DataError
from direct_rlhf.evaluate.chats import Chat, LocalChat, RecordedChat, digest
from direct_rlhf.evaluate.conversation import Keeping, judge_again, read_questions
from direct_rlhf.evaluate.endpoint import Budget, EndpointChat
from direct_rlhf.evaluate.judge import Judge, load_judge
from direct_rlhf.evaluate.judgments import ANSWERS, NAME, Kept, spent
from direct_rlhf.evaluate.mt_bench import JudgePrompts, Row, read_judge_prompts, with_references
from direct_rlhf.evaluate.pairwise import PairwiseResult, judge_pairs
from direct_rlhf.evaluate.prompted import Panel, PromptedJudge
from direct_rlhf.evaluate.records import Item, Summary, read_items, write_items
from direct_rlhf.evaluate.self_check import HumanPair, check_judge, read_human_pairs
from direct_rlhf.evaluate.statistics import summarise
from direct_rlhf.recipe.references import HubReference, resolve_test_data
from direct_rlhf.recipe.schema import ConversationSection
from direct_rlhf.run.atomic import write_json
from direct_rlhf.run.context import StageContext

# What changes neither an answer nor a verdict, so that results stay when it changes
OPERATION = ("api_key_env", "timeout", "retries", "concurrency", "max_calls", "max_cost", "batch_size")


@dataclass(frozen=True)
class Judging:
    """Questions, prompts and judge of a recipe. ``folder`` is where its relative paths start from."""

    ctx: StageContext
    folder: Path | None

    @property
    def section(self) -> ConversationSection:
        return self.ctx.recipe.evaluation.conversation

    @property
    def asks(self) -> bool:
        """Whether the judge is asked in words, and so may cost something."""
        return self.section.judge != "scripted"

    @cached_property
    def questions(self) -> list[Row]:
        """The questions, with their references, fit for the prompts. Errors: ConfigError and DataError."""
        section = self.section
        questions = read_questions(self._place(section.questions), section.limit)
        if section.references is not None:
            questions = with_references(questions, self._place(section.references))
        if self.asks:
            self.prompts.check(questions, ["single", "pairwise"] if section.pairwise else ["single"])
        return questions

    @cached_property
    def prompts(self) -> JudgePrompts:
        return read_judge_prompts(self._place(str(self.section.judge_prompts)))

    def check(self) -> None:
        """Whatever can be wrong is said here, before a model is loaded. Errors: ConfigError and DataError."""
        _ = self.questions
        if self.section.self_check is not None:
            self._people()
            self.prompts.choose("pairwise", reference=False, turn=0)
        if self.section.judge in ("endpoint", "recorded"):
            _ = self._chat

    def judge(self, arm: str, model: str) -> Judge:
        """The judge of an arm's answers; ``model`` is the SHA-256 of what wrote them."""
        return PromptedJudge(self._panel(arm), self.prompts, model) if self.asks else load_judge(self.section)

    def keeping(self, arm: str, depends_on: dict[str, Any]) -> Keeping | None:
        """Where an arm's answers are kept; nowhere with the scripted judge, which takes no time after them."""
        return Keeping(Kept(self._root / arm / ANSWERS), depends_on) if self.asks else None

    def self_check(self) -> dict[str, Any] | None:
        """How far the judge agrees with people; None if the recipe asks for no check. Paid for once in a run."""
        section, recipe = self.section, self.ctx.recipe
        if section.self_check is None:
            return None
        panel = self._panel("self_check")
        check, items = check_judge(
            panel, self.prompts, self._people(), draws=recipe.evaluation.bootstrap_draws, seed=recipe.seed
        )
        write_items(self._root / "self_check" / "items.jsonl", items)
        found = check.as_json()
        if check.summary.headline(recipe.evaluation.min_coverage) is None:
            found |= {"agreement": None, "ci": None, "better_than_chance": False}
        if not found["better_than_chance"]:
            self.ctx.say("The judge is not shown to agree with people more than chance does: its scores say little.")
        return found

    def _people(self) -> list[HumanPair]:
        section = self.section
        return read_human_pairs(
            self._place(str(section.self_check)),
            limit=section.self_check_limit,
            subset=section.self_check_subset,
            seed=self.ctx.recipe.seed,
        )

    def without_references(self, arm: str, model: str, items: Sequence[Item]) -> Summary | None:
        """The answers that were judged with a reference, judged without; None where there are none."""
        shown = [question for question in self.questions if "reference" in question]
        if not self.section.without_references or not shown:
            return None
        bare = [{key: question[key] for key in ("id", "category", "turns")} for question in shown]
        again = judge_again(self.judge(arm, model), bare, items, self.ctx.should_stop)
        return summarise(again, draws=self.ctx.recipe.evaluation.bootstrap_draws, seed=self.ctx.recipe.seed)

    def compare(self, arms: Sequence[str], against: str) -> list[dict[str, Any]]:
        """Every arm's answers beside those of one, in both orders; written to evaluation/pairwise.json."""
        recipe, rows = self.ctx.recipe, []
        shown = recipe.evaluation.min_coverage
        for arm in (arm for arm in arms if arm != against):
            paths = [self._root / name / "conversation.jsonl" for name in (arm, against)]
            if not all(path.exists() for path in paths):
                continue
            result, items = judge_pairs(
                self._panel("pairwise"),
                self.prompts,
                self.questions,
                *(read_items(path) for path in paths),
                models=(arm, against),
                draws=recipe.evaluation.bootstrap_draws,
                seed=recipe.seed,
            )
            write_items(self._root / "pairwise" / f"{arm}.jsonl", items)
            rows.append({"arm": arm, "against": against, "judge": self._chat.name, **_pair_row(result, shown)})
        write_json(self._root / "pairwise.json", rows)
        return rows

    def inputs(self) -> dict[str, Any]:
        """What the suite's numbers depend on: its section, without OPERATION, and the content of its files."""
        section = self.section.model_dump(mode="json", exclude={"judging": set(OPERATION)})
        del section["pairwise"]
        judging = self.section.judging
        refs = [getattr(self.section, name) for name in ("questions", "references", "judge_prompts", "self_check")]
        refs += [judging.recorded] if self.section.judge == "recorded" else []
        return {"section": section, "files": [digest(_content(self._place(ref))) for ref in refs if ref is not None]}

    @property
    def _root(self) -> Path:
        return self.ctx.run.path / "evaluation"

    def _panel(self, name: str) -> Panel:
        return Panel(self._chat, Kept(self._root / name / NAME), self.ctx.progress)

    @cached_property
    def _chat(self) -> Chat:
        section, recipe = self.section, self.ctx.recipe
        judging = section.judging
        if section.judge == "recorded":
            place = self._place(str(judging.recorded))
            if isinstance(place, HubReference):
                raise ConfigError(f"evaluation.conversation.judging.recorded = {place}: it must be a local file.")
            return RecordedChat(place)
        if section.judge == "local":
            return LocalChat(
                judging,
                dtype=recipe.model.dtype,
                device=self.ctx.device,
                seed=recipe.seed,
                folder=self.folder,
                should_stop=self.ctx.should_stop,
                report=self.ctx.say,
            )
        calls, cost = spent(self._root)
        budget = Budget(judging.max_calls, judging.max_cost, calls=calls, cost=cost)
        return EndpointChat(judging, budget, should_stop=self.ctx.should_stop)

    def _place(self, ref: str) -> Path | HubReference:
        return resolve_test_data(ref, self.ctx.recipe.evaluation.data, self.folder)


def _content(place: Path | HubReference) -> Any:
    """What a source holds: a file's bytes, a hub set's rows."""
    from direct_rlhf.data.rows import read_rows

    if isinstance(place, HubReference):
        return [row.value for row in read_rows(place, str(place))]
    if not place.is_file():
        raise DataError(f"{place}: must be a file.")
    return place.read_bytes().hex()


def _pair_row(result: PairwiseResult, min_coverage: float) -> dict[str, Any]:
    def shown(summary: Summary) -> dict[str, Any]:
        ci = None if summary.low is None else [summary.low, summary.high]
        counts = {key: value for key, value in summary.as_json().items() if key.startswith("n_") or key == "reasons"}
        return {"win_rate": summary.headline(min_coverage), "ci": ci, **counts}

    return {
        **shown(result.summary),
        **result.outcomes,
        **result.inconsistency.as_json(),
        "verdict": result.verdict,
        "by_turn": {key: shown(summary) for key, summary in result.by_turn.items()},
        "by_category": {key: shown(summary) for key, summary in result.by_category.items()},
    }
