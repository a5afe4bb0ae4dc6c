"""TRL's PPOTrainer on one job of `ppo_vs_trl.py`; runs in the environment trl-ppo: python trl_ppo.py JOB."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from measuring import Clock
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

SEED = 0


class Watch(TrainerCallback):
    """Times the iterations and reads what TRL logs of them."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.kl: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.clock.ended()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clock.ended()

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        self.kl.append(logs["objective/kl"])


class Counts:
    """What the trainer has worked on, from hooks that only count."""

    def __init__(self) -> None:
        self.prompt_tokens = self.scored_tokens = self.optimiser_steps = self.decode_steps = 0

    def scoring(self, _: Any, __: Any, inputs: dict[str, Any]) -> None:
        self.scored_tokens += int(inputs["attention_mask"].sum())

    def policy(self, _: Any, __: Any, inputs: dict[str, Any]) -> None:
        if inputs.get("past_key_values") is None:  # training, not sampling
            return
        self.decode_steps += 1
        if inputs["input_ids"].shape[1] > 1:
            self.prompt_tokens += int(inputs["attention_mask"].sum())

    def stepped(self, *_: Any) -> None:
        self.optimiser_steps += 1


def main(job: dict[str, Any]) -> None:
    clock = Clock()
    folder = Path(job["folder"])
    base, dtype = str(folder / "base"), getattr(torch, job["dtype"])
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    torch.manual_seed(SEED)
    policy, reference = (AutoModelForCausalLM.from_pretrained(base, dtype=dtype) for _ in range(2))
    value, reward = (
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=dtype) for _ in range(2)
    )
    counts, watch = Counts(), Watch(clock)
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=str(folder / "trl"),
            use_cpu=True,
            bf16=False,  # PPOTrainer reads neither this nor gradient_checkpointing; the models' dtype decides
            per_device_train_batch_size=job["answers"],
            gradient_accumulation_steps=1,
            num_mini_batches=1,
            num_ppo_epochs=job["epochs"],
            total_episodes=job["answers"] * job["iterations"],
            local_rollout_forward_batch_size=64,  # TRL's default
            response_length=job["new_tokens"],
            temperature=1.0,
            stop_token="eos",
            learning_rate=job["learning_rate"],
            seed=SEED,
            eval_strategy="no",
            save_strategy="no",
            num_sample_generations=0,
            report_to="none",
            disable_tqdm=True,
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": json.loads((folder / "prompts.json").read_text())}),
        callbacks=[watch],
    )
    reward.model.register_forward_pre_hook(counts.scoring, with_kwargs=True)
    policy.register_forward_pre_hook(counts.policy, with_kwargs=True)
    trainer.optimizer.optimizer.register_step_post_hook(counts.stepped)
    trainer.train()
    answers = job["answers"] * job["iterations"]
    clock.finish(
        threads=torch.get_num_threads(),
        optimiser_steps=counts.optimiser_steps / job["iterations"],
        answer_tokens=(counts.scored_tokens - counts.prompt_tokens) / answers,
        prompt_tokens=counts.prompt_tokens / answers,
        first_kl=watch.kl[0],
        decode_steps=counts.decode_steps / job["iterations"],
        precision=f"{next(policy.parameters()).dtype}, autocast {trainer.accelerator.mixed_precision}",
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
