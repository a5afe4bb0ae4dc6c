"""The reward model as an artefact: weights, tokenizer, dialogue format and the statistics that normalise its scores.

On disk it is a folder with `reward.json` and `head.safetensors` beside one of:
    full  a transformers sequence-classification checkpoint (one label), or a bare backbone where transformers has no
          such class for the architecture
    lora  `adapter/`, a PEFT adapter on the base that `reward.json` names
"""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from direct_rlhf import __version__
from direct_rlhf.data.dialogue import DialogueFormat
from direct_rlhf.data.tokens import Tokens, load_tokens
from direct_rlhf.data.types import Turns
from direct_rlhf.errors import CheckpointError, ConfigError, DataError
from direct_rlhf.models.batches import BATCH_TOKENS, SCORE_FACTOR, by_length, padded
from direct_rlhf.models.loading import autocast, load_causal_lm, load_pretrained, save_adapter
from direct_rlhf.models.memory import ChunkSize
from direct_rlhf.models.scalar import ScalarModel
from direct_rlhf.recipe.schema import DialogueSection
from direct_rlhf.rollout.types import SamplingSettings
from direct_rlhf.run.atomic import replacing

FORMAT = 1
ADAPTER = "reward"
QUANTILES = (0.01, 0.05, 0.1, 0.5)

Item = tuple[Turns, str, bool]  # dialogue, answer, whether the answer ended by itself


@dataclass(frozen=True)
class Normalisation:
    """Raw scores of the base model's own samples; a score is (raw - mean) / std."""

    mean: float
    std: float  # population
    quantiles: Mapping[str, float]  # raw, by share: "0.05"
    count: int  # samples behind the numbers
    finished_only: bool  # False: too few samples ended, so that cut ones were used as well
    base_sha256: str  # `models.loading.base_sha256` of the sampled model
    sampling: Mapping[str, Any]  # the settings they were sampled with
    prompts_sha256: str

    @property
    def low_quantile(self) -> float:
        """The 5 % quantile in normalised units: the score of an unfinished answer under the `replace` rule."""
        return (self.quantiles["0.05"] - self.mean) / self.std


@dataclass(frozen=True)
class Facts:
    """What a reward model must know about itself beside its weights."""

    dialogue: DialogueSection
    max_prompt_tokens: int  # longer dialogues lose whole turns from the left
    max_answer_tokens: int  # longer answers are errors
    base: str  # the model it was initialised from: world:base, a folder, or a hub id
    revision: str | None
    base_sha256: str
    tokenizer_sha256: str
    tuning: str  # full or lora
    quantise: str = "none"  # of the base under a LoRA adapter


@dataclass(frozen=True)
class RewardModel:
    """Scores answers in units of the base model's own spread; ``normalisation`` is None only while it is trained."""

    scalar: ScalarModel
    tokens: Tokens
    facts: Facts
    normalisation: Normalisation | None
    device: str
    dtype: str
    adapter: str = ADAPTER  # its name on a trunk that it shares

    @cached_property
    def dialogue(self) -> DialogueFormat:
        return DialogueFormat(self.facts.dialogue, self.tokens)

    def score(self, items: Sequence[Item]) -> Tensor:
        """Normalised scores, float32 [n] on the CPU, in the order of ``items``.

        Errors: ConfigError without normalisation; DataError for an answer that does not fit.
        """
        if self.normalisation is None:
            raise ConfigError("this reward model has no normalisation; make it with `direct-rlhf reward train`")
        return (self.raw(items) - self.normalisation.mean) / self.normalisation.std

    def raw(self, items: Sequence[Item]) -> Tensor:
        """Scores as the head gives them, float32 [n] on the CPU. An item's score does not depend on its neighbours."""
        encoded = [self.encode(item) for item in items]
        for item, ids in zip(items, encoded, strict=True):
            if ids is None:
                raise DataError(
                    f"an answer of {len(item[1])} characters ({item[1][:60]!r}...) or its last turn does not fit into "
                    f"the reward model's {self.facts.max_prompt_tokens} prompt and {self.facts.max_answer_tokens} "
                    "answer tokens. Cut it, or train the reward model with a larger data.max_answer_tokens."
                )
        return self.raw_ids([ids for ids in encoded if ids is not None])

    @torch.no_grad()
    def raw_ids(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Scores of token sequences, float32 [n] on the CPU."""
        lengths = [len(ids) for ids in sequences]

        def attempt(slots: int) -> Tensor:
            score_n = torch.zeros(len(sequences))
            for rows in by_length(lengths, range(len(sequences)), slots):
                score_n[rows] = self.scalar.scores(*padded([sequences[row] for row in rows], self.device)).cpu()
            return score_n

        with self.active(), autocast(self.device, self.dtype):
            return self._chunk.run(attempt)

    @cached_property
    def _chunk(self) -> ChunkSize:
        return ChunkSize("reward model scores", SCORE_FACTOR * BATCH_TOKENS)

    def encode(self, item: Item) -> list[int] | None:
        """Ids of dialogue and answer as the model reads them (EOS at the end of a finished one); None if too long."""
        turns, answer, finished = item
        dialogue = self.dialogue.encode_dialogue(
            turns,
            answer,
            max_prompt_tokens=self.facts.max_prompt_tokens,
            max_answer_tokens=self.facts.max_answer_tokens,
            finished=finished,
        )
        return None if dialogue is None else [*dialogue.prompt_ids, *dialogue.answer_ids]

    @contextmanager
    def active(self) -> Iterator[ScalarModel]:
        """The scalar model with its adapter on; the adapter that was on before is put back."""
        trunk: Any = self.scalar.trunk
        if self.facts.tuning == "full" or trunk.active_adapter == self.adapter:
            yield self.scalar
            return
        before = trunk.active_adapter
        trunk.set_adapter(self.adapter, inference_mode=True)
        try:
            yield self.scalar
        finally:
            trunk.set_adapter(before)

    def check_fits(self, base_sha256: str, settings: SamplingSettings) -> None:
        """ConfigError unless the scores are normalised for this base and these sampling settings."""
        if self.normalisation is None:
            raise ConfigError(
                "the reward model has no normalisation, so its scores and the KL weight have no common unit. Make it "
                "with `direct-rlhf reward train`."
            )
        if self.normalisation.base_sha256 != base_sha256:
            raise ConfigError(
                "the reward model is normalised on samples of another base (parameters "
                f"{self.normalisation.base_sha256[:12]}, this base has {base_sha256[:12]}). "
                f"Train it again from this base, or use its own: {self.facts.base}."
            )
        wanted = asdict(settings)
        different = [
            f"{name} {_plain(self.normalisation.sampling.get(name))!r} there, {_plain(value)!r} here"
            for name, value in wanted.items()
            if _plain(self.normalisation.sampling.get(name)) != _plain(value)
        ]
        if different:
            raise ConfigError(
                f"the reward model is normalised on samples drawn with other settings: {'; '.join(different)}. Use its "
                "settings in ppo.sampling and dialogue, or train it again with these."
            )

    def with_normalisation(self, normalisation: Normalisation) -> "RewardModel":
        return replace(self, normalisation=normalisation)

    def save(self, folder: Path) -> None:
        """Write the artefact; the folder appears by one rename, an older one of that name is replaced."""
        with replacing(folder) as temporary:
            if self.facts.tuning == "lora":
                save_adapter(self.scalar.trunk, temporary / "adapter", self.adapter)
            else:
                _save_full(self.scalar, self.tokens.pad_id, temporary)
            save_file({"weight": self.scalar.head.weight.detach().cpu().contiguous()}, temporary / "head.safetensors")
            self.tokens.save(temporary)
            described = {
                "format": FORMAT,
                "direct_rlhf": __version__,
                "torch": torch.__version__,
                "facts": {**vars(self.facts), "dialogue": self.facts.dialogue.model_dump()},
                "normalisation": None if self.normalisation is None else asdict(self.normalisation),
            }
            (temporary / "reward.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        trunk: Any = None,
        adapter: str = ADAPTER,
    ) -> "RewardModel":
        """The artefact in ``folder``, its parameters in ``dtype`` (the head in float32), frozen.

        ``trunk``, for a LoRA reward model: the base it was trained on, if that is in memory already (a causal LM, or a
        PeftModel, which gets one more adapter called ``adapter``); otherwise the base is loaded.
        Errors: ConfigError if the folder is no reward model; CheckpointError if its parts do not belong together.
        """
        facts, normalisation = _read_description(folder)
        tokens = load_tokens(str(folder))
        if tokens.sha256 != facts.tokenizer_sha256:
            raise CheckpointError(f"{folder}: its tokenizer is not the one it was trained with; make it again")
        if facts.tuning == "lora":
            model = _load_adapter(folder, facts, dtype, device, trunk, adapter)
        else:
            from transformers import AutoModel

            model = load_pretrained(AutoModel, folder, dtype=dtype).to(device)
        weight = load_file(folder / "head.safetensors")["weight"]
        head = nn.Linear(weight.shape[1], 1, bias=False)
        head.weight = nn.Parameter(weight.float())
        scalar = ScalarModel(model, head.to(device))
        if trunk is None:
            scalar.requires_grad_(False)
        return cls(scalar, tokens, facts, normalisation, device, dtype, adapter)


def _save_full(scalar: ScalarModel, pad_id: int, folder: Path) -> None:
    """A sequence-classification checkpoint if transformers has that class for the trunk, else the bare trunk."""
    from transformers import AutoModelForSequenceClassification

    trunk: Any = scalar.trunk
    config = copy.deepcopy(trunk.config)
    config.num_labels, config.pad_token_id = 1, pad_id
    try:
        with torch.device("meta"):
            shell = AutoModelForSequenceClassification.from_config(config, dtype=trunk.dtype)
    except ValueError:  # no such class for this architecture
        trunk.save_pretrained(folder)
        return
    state = {f"{shell.base_model_prefix}.{name}": tensor for name, tensor in trunk.state_dict().items()}
    state["score.weight"] = scalar.head.weight.detach()
    if state.keys() == shell.state_dict().keys():
        shell.save_pretrained(folder, state_dict=state)
    else:
        trunk.save_pretrained(folder)


def _load_adapter(folder: Path, facts: Facts, dtype: str, device: str, trunk: Any, adapter: str) -> Any:
    from peft import PeftModel

    if trunk is None:
        trunk = load_causal_lm(facts.base, dtype=dtype, device=device, revision=facts.revision, quantise=facts.quantise)
    if not isinstance(trunk, PeftModel):
        return PeftModel.from_pretrained(trunk, folder / "adapter", adapter_name=adapter).eval()
    before = trunk.active_adapter
    trunk.load_adapter(folder / "adapter", adapter_name=adapter, is_trainable=False)
    trunk.set_adapter(before)
    return trunk.eval()


def _read_description(folder: Path) -> tuple[Facts, Normalisation | None]:
    path = folder / "reward.json"
    if not path.is_file():
        raise ConfigError(
            f"{folder}: no reward model here (reward.json is missing). Make one with `direct-rlhf reward train`."
        )
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        if described["format"] != FORMAT:
            raise CheckpointError(f"{path}: format {described['format']}; this release reads {FORMAT}. Train it again.")
        fields = dict(described["facts"])
        facts = Facts(**fields | {"dialogue": DialogueSection(**fields["dialogue"])})
        statistics = described["normalisation"]
        return facts, None if statistics is None else Normalisation(**statistics)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged or of another release ({error}). Train it again.") from error


def _plain(value: Any) -> Any:
    """JSON turns tuples into lists."""
    return list(value) if isinstance(value, tuple) else value
