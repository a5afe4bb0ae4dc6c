"""TRL's RewardTrainer on one job of `reward_model.py`; runs in the environment trl-reward.

python trl_reward.py checkpointing|plain JOB: gradient checkpointing is on by default in TRL.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from measuring import Clock
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl import RewardConfig, RewardTrainer

SEED = 0


class Watch(TrainerCallback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.clock.ended()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clock.ended()


class Counts:
    tokens = slots = 0

    def forward(self, _: Any, __: Any, inputs: dict[str, Any]) -> None:
        self.tokens += int(inputs["attention_mask"].sum())
        self.slots += inputs["input_ids"].numel()


def main(checkpointing: bool, job: dict[str, Any]) -> None:
    clock = Clock()
    folder = Path(job["folder"])
    base = str(folder / "base")
    torch.manual_seed(SEED)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    counts = Counts()
    model.register_forward_pre_hook(counts.forward, with_kwargs=True)
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(
            output_dir=str(folder / "trl"),
            use_cpu=True,
            bf16=job["dtype"] == "bfloat16",  # float32 weights under autocast, TRL's default; ours is the same
            gradient_checkpointing=checkpointing,
            per_device_train_batch_size=job["batch_size"],
            max_steps=job["steps"],
            learning_rate=job["learning_rate"],
            center_rewards_coefficient=job["centring"],
            seed=SEED,
            eval_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict(json.loads((folder / "pairs.json").read_text())),
        processing_class=AutoTokenizer.from_pretrained(base),
        callbacks=[Watch(clock)],
    )
    trainer.train()
    done = trainer.state.global_step
    clock.finish(
        threads=torch.get_num_threads(),
        optimiser_steps=done,
        tokens=counts.tokens / done,
        slots=counts.slots / done,
        loss=trainer.state.log_history[-1]["train_loss"],
        precision=f"{next(model.parameters()).dtype}, autocast {trainer.accelerator.mixed_precision}",
    )


if __name__ == "__main__":
    main(sys.argv[1] == "checkpointing", json.loads(sys.argv[2]))
