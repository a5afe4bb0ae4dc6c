"""Causal language models from and to disk: safetensors only, no dropout, one meaning of dtype.

``dtype`` is what parameters are held in. A model that is trained in full is loaded in float32 (master weights) and runs
under ``autocast(device, "bfloat16")`` when the recipe says bfloat16; frozen copies and LoRA trunks are loaded in it.
A LoRA trunk may be ``quantised``: its linear layers in 4 bits, computed in ``dtype``; all that is saved is plain again.
"""

import copy
import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from direct_rlhf.data.tokens import Tokens
from direct_rlhf.errors import ConfigError
from direct_rlhf.models.forward import causal_lm, check_head
from direct_rlhf.recipe.references import HubReference, resolve_model
from direct_rlhf.recipe.schema import LoraSection, ModelSection
from direct_rlhf.run.atomic import replacing


def load_causal_lm(
    ref: str | Path,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantise: str = "none",
) -> Any:
    """A transformers causal LM in eval mode with all dropout zero, its parameters in ``dtype`` on ``device``.

    ``ref`` is a folder, ``world:base`` or a hub id. ``quantise`` as in the recipe's model section.
    Errors: ConfigError if it cannot be found, holds no safetensors, or its logits are not head(hidden state).
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": dtype, "revision": revision, "trust_remote_code": trust_remote_code}
    if quantise == "none":
        model = load_pretrained(AutoModelForCausalLM, ref, **options).to(device)
    else:
        model = load_pretrained(AutoModelForCausalLM, ref, **options, device_map={"": device}, **_four_bits(dtype))
        for module in model.modules():
            # on a CPU its first forward without gradients would lay weights out anew, and lose later gradients
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    check_head(model)
    return model


def _four_bits(dtype: str) -> dict[str, Any]:
    """QLoRA's storage of frozen linear layers: normal floats in 4 bits, their scales in 8 (arXiv 2305.14314)."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    return {"quantization_config": config}


def load_for(section: ModelSection, ref: str, *, dtype: str, device: str) -> Any:
    """`load_causal_lm` with the recipe's hub revision, trust and quantisation."""
    return load_causal_lm(
        ref,
        dtype=dtype,
        device=device,
        revision=section.revision,
        trust_remote_code=section.trust_remote_code,
        quantise=section.quantise,
    )


def load_pretrained(
    auto_class: Any,
    ref: str | Path,
    *,
    dtype: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **more: Any,
) -> Any:
    """``auto_class.from_pretrained`` with the house rules: safetensors, dropout zero, eval mode, clear errors.

    ``more`` is handed on to it.
    """
    from transformers import AutoConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # the stages draw their own
    transformers_logging.set_verbosity_error()  # weights that are missing raise below; unused ones need no table
    place = ref if isinstance(ref, Path) else resolve_model(ref, revision=revision)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if isinstance(place, HubReference):
        name, hub = place.name, True
        options["revision"] = place.revision or "main"
    else:
        name, hub = str(place), False
    if not hub and not (Path(name) / "config.json").is_file():
        raise ConfigError(
            f"{name}: no model here (config.json is missing). Give a folder that has one, a hub id, or world:base."
        )
    try:
        config = AutoConfig.from_pretrained(name, **options)
        zero_dropout(config)
        model, info = auto_class.from_pretrained(
            name,
            config=config,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            output_loading_info=True,
            **options,
            **more,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:  # missing or damaged files, offline hub
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        what = "could not be fetched from the hub" if hub else "could not be loaded"
        todo = (
            "Check the name and the connection, or download it first and give its folder."
            if hub
            else "It must be a transformers model with safetensors weights (convert .bin files first)."
        )
        raise ConfigError(f"{name}: {what}: {reason}. {todo}") from error
    if info["missing_keys"]:  # transformers would leave them at random values
        raise ConfigError(
            f"{name}: {len(info['missing_keys'])} of the model's weights are not in its files (such as "
            f"{min(info['missing_keys'])}). The checkpoint is incomplete or of another architecture; fetch it again."
        )
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.eval()


def zero_dropout(config: Any) -> None:
    """Set every dropout rate of a transformers config (and of its sub-configs) to 0, in place."""
    for key, value in vars(config).items():
        if hasattr(value, "to_dict"):
            zero_dropout(value)
        elif isinstance(value, float) and ("dropout" in key or "pdrop" in key or "drop_rate" in key):
            setattr(config, key, 0.0)


def autocast(device: str, dtype: str) -> AbstractContextManager[Any]:
    """Mixed precision for forward passes when ``dtype`` is bfloat16; nothing for float32."""
    if dtype == "float32":
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype=getattr(torch, dtype))


def add_lora(model: Any, section: LoraSection, name: str = "default", *, seed: int = 0) -> Any:
    """A PeftModel around ``model`` (or that PeftModel with one more adapter); its new adapter is active and trainable.

    All else is frozen. Adapter weights are float32 whatever the trunk's type, dropout is 0, and a fresh adapter changes
    no output (its B matrix is zero; its A matrix is drawn from ``seed``).
    """
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers.pytorch_utils import Conv1D

    config = LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,
        target_modules=section.target_modules,
        lora_dropout=0.0,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in causal_lm(model).modules()),  # GPT-2
        task_type="CAUSAL_LM" if causal_lm(model).get_output_embeddings() is not None else None,
    )
    with torch.random.fork_rng():  # PEFT draws from the global state
        torch.manual_seed(seed)
        if not isinstance(model, PeftModel):
            return get_peft_model(model, config, adapter_name=name).eval()
        model.add_adapter(name, config)
    model.set_adapter(name)
    return model.eval()


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that an optimiser should hold, in the model's own order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def parameters_sha256(model: nn.Module) -> str:
    """SHA-256 over names, shapes, types and bytes of all parameters: equal only if every bit is."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(_bytes(parameter))
    return digest.hexdigest()


def base_sha256(model: nn.Module) -> str:
    """Identity of a causal LM under its adapters, the same whether it is held in float32 or bfloat16.

    A hash of the bfloat16 values, so that a reward model trained in one type fits PPO in the other.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(_plain_parameters(causal_lm(model)).items()):
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(_bytes(parameter.detach().to(torch.bfloat16)))
    return digest.hexdigest()


def base_identity(section: ModelSection, model: nn.Module | None = None) -> str:
    """Identity of the recipe's base as it computes; ``model`` is that base, if it is in memory.

    Of a base in 4 bits it is that of the weights it was made from (devices may round them unlike), and says so.
    """
    if section.quantise == "none" and model is not None:
        return base_sha256(model)
    plain = section.model_copy(update={"quantise": "none"})
    found = base_sha256(load_for(plain, section.base, dtype=section.dtype, device="cpu"))
    return found if section.quantise == "none" else f"{section.quantise}:{found}"


def merged_state(model: Any, adapter: str | None = None) -> dict[str, Tensor]:
    """The state dict of a plain model: LoRA deltas of ``adapter`` (default: the only one) added, their names gone.

    The wrapped model itself is not touched, since merging and unmerging in place would round its frozen weights.
    Weights in 4 bits are the numbers that they stand for, in the type that they are computed in: the adapter was
    trained on these, and not on those they were made from.
    Errors: ValueError if there are several adapters and none is named, or the named one is not there.
    """
    from peft.tuners.lora import LoraLayer

    inner, adapter = causal_lm(model), the_adapter(model, adapter)
    state = {_plain_name(name): tensor for name, tensor in inner.state_dict().items() if "lora_" not in name}
    if _is_quantised(inner):
        state = _dequantised(inner, state)
    for name, layer in inner.named_modules():
        if isinstance(layer, LoraLayer):
            weight, delta = state[f"{name}.weight"], layer.get_delta_weight(adapter).float()
            state[f"{name}.weight"] = (weight.float() + delta).to(weight.dtype)
    return state


def _is_quantised(inner: Any) -> bool:
    return getattr(inner, "hf_quantizer", None) is not None


def _dequantised(inner: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state`` with plain weights in the place of those in 4 bits and of what belongs to them."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Params4bit

    for full_name, weight in inner.named_parameters():
        if isinstance(weight, Params4bit):
            name = _plain_name(full_name)
            state = {key: tensor for key, tensor in state.items() if not key.startswith(f"{name}.")}
            state[name] = dequantize_4bit(weight.data, weight.quant_state)
    return state


def _shell(inner: Any) -> Any:
    """A plain model of the same architecture without storage, to be saved with a state of its own."""
    config = copy.deepcopy(inner.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        shell = type(inner)(config)
    shell.generation_config = inner.generation_config
    return shell


def the_adapter(model: Any, adapter: str | None = None) -> str:
    """``adapter`` if the PeftModel has it, or its only one if None is named; ValueError otherwise."""
    names = list(model.peft_config)
    if adapter is None and len(names) == 1:
        return str(names[0])
    if adapter is None or adapter not in names:
        raise ValueError(f"adapter {adapter!r}: this model has {', '.join(names)}; name the one that is meant")
    return adapter


def save_causal_lm(
    model: Any,
    tokens: Tokens,
    folder: Path,
    *,
    stop_strings: Sequence[str],
    card: str,
    adapter: str | None = None,
) -> None:
    """Write a checkpoint that plain transformers loads: weights, tokenizer, generation config, README.md card.

    A PeftModel is saved merged, and its adapter (``adapter``, default: the only one) beside it in ``adapter/``. The
    folder appears by one rename when all is written; an older one of that name is replaced.
    """
    inner = causal_lm(model)
    wrapped = inner is not model
    with replacing(folder) as temporary:
        others = sorted(tokens.eos_ids - {tokens.eos_id})
        inner.generation_config.eos_token_id = [tokens.eos_id, *others] if others else tokens.eos_id
        inner.generation_config.pad_token_id = tokens.pad_id
        inner.generation_config.stop_strings = list(stop_strings) or None
        saved = _shell(inner) if _is_quantised(inner) else inner
        saved.save_pretrained(temporary, state_dict=merged_state(model, adapter) if wrapped else None)
        if wrapped:
            save_adapter(model, temporary / "adapter", the_adapter(model, adapter))
        tokens.save(temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8")


def save_weights(model: Any, folder: Path, *, dtype: str, adapter: str) -> None:
    """Write the weights alone, in ``dtype``, as another program loads them; a PeftModel merged with ``adapter``.

    The folder appears by one rename when all is written.
    """
    inner = causal_lm(model)
    state = inner.state_dict() if inner is model else merged_state(model, adapter)
    made: dict[tuple[int, torch.Size], Tensor] = {}  # tied weights stay tied

    def converted(tensor: Tensor) -> Tensor:
        place = (tensor.data_ptr(), tensor.shape)
        if place not in made:
            made[place] = tensor.to("cpu", getattr(torch, dtype) if tensor.is_floating_point() else tensor.dtype)
        return made[place]

    with replacing(folder) as temporary:
        saved = _shell(inner) if _is_quantised(inner) else inner
        saved.save_pretrained(temporary, state_dict={name: converted(tensor) for name, tensor in state.items()})


def save_adapter(model: Any, folder: Path, adapter: str) -> None:
    """Write one LoRA adapter in PEFT's format, directly into ``folder`` whatever its name."""
    model.save_pretrained(folder, selected_adapters=[adapter], save_embedding_layers=False)
    nested = folder / adapter  # PEFT nests every adapter that is not called "default"
    if nested.is_dir():
        for file in nested.iterdir():
            file.rename(folder / file.name)
        nested.rmdir()
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty template


def _plain_name(name: str) -> str:
    return name.replace(".base_layer.", ".")


def _plain_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {_plain_name(name): p for name, p in model.named_parameters() if "lora_" not in name}


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
