"""vLLM in the trainer's own process tree, on its GPU: awake while it samples, asleep while PPO trains.

Asleep it holds neither weights nor cache, so it cannot sample with weights of before: each time it wakes, it loads
those it is given.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from direct_rlhf.errors import BackendError, Interrupted
from direct_rlhf.recipe.references import HubReference, resolve_model
from direct_rlhf.recipe.schema import ModelSection, VllmSection
from direct_rlhf.rollout.vllm import Ask, Said, checked

AT_ONCE = 256  # answers between two looks at whether to stop
FORGETS_ALL = 2  # vLLM's name for a sleep without weights and cache


class Colocated:
    """An engine of this process."""

    name = "vLLM in this process"

    def __init__(self, section: VllmSection, model: ModelSection, init: str, longest: int) -> None:
        """Its first weights, of the checkpoint ``init``, are never sampled with; ``longest`` is prompt and answer.

        Errors: BackendError where it does not start.
        """
        import vllm

        place = resolve_model(init, revision=model.revision)
        self._parameters = vllm.SamplingParams
        try:
            self._llm: Any = vllm.LLM(
                model=place.name if isinstance(place, HubReference) else str(place),
                revision=place.revision if isinstance(place, HubReference) else None,
                trust_remote_code=model.trust_remote_code,
                dtype=model.dtype,
                max_model_len=longest,
                gpu_memory_utilization=section.gpu_memory_utilization,
                enable_sleep_mode=True,
                logprobs_mode="processed_logprobs",
                generation_config="vllm",
            )
            self._llm.sleep(level=FORGETS_ALL)
        except (RuntimeError, ValueError) as error:
            raise BackendError(
                f"{self.name}: does not start ({error}). It takes rollout.vllm.gpu_memory_utilization of the GPU "
                "beside the trainer's weights; lower it, or use a server on another GPU (rollout.vllm.mode=server)."
            ) from error

    def load(self, folder: Path, version: str, should_stop: Callable[[], bool]) -> None:
        try:
            self._llm.wake_up(tags=["weights"])
            self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
            self._llm.wake_up(tags=["kv_cache"])
            self._llm.reset_prefix_cache()
        except (RuntimeError, ValueError, OSError) as error:
            raise BackendError(f"{self.name}: cannot load the policy's weights from {folder} ({error}).") from error

    def replies(
        self, asks: Sequence[Ask], sampling: Mapping[str, Any], vocabulary: int, should_stop: Callable[[], bool]
    ) -> list[Said]:
        said: list[Said] = []
        for start in range(0, len(asks), AT_ONCE):
            if should_stop():
                raise Interrupted("sampling was asked to stop; its answers are drawn again on resume")
            some = asks[start : start + AT_ONCE]
            outputs = self._llm.generate(
                [{"prompt_token_ids": list(ask.ids)} for ask in some],
                [self._parameters(**sampling, max_tokens=ask.max_tokens, seed=ask.seed) for ask in some],
                use_tqdm=False,
            )
            said += [checked(_said(output.outputs[0]), vocabulary, self.name) for output in outputs]
        return said

    def confirm(self, version: str, should_stop: Callable[[], bool]) -> None:
        return  # nobody else reaches it

    def rest(self) -> bool:
        self._llm.sleep(level=FORGETS_ALL)
        return False

    def close(self) -> None:
        del self._llm


def _said(output: Any) -> Said:
    """Of one of vLLM's completions: its log-probabilities come by token id, step by step."""
    ids, steps = list(output.token_ids), output.logprobs or []
    return Said(ids, [step[i].logprob for i, step in zip(ids, steps, strict=False) if i in step])
