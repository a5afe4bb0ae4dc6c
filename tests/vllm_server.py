"""A small server on this machine that speaks vLLM's protocol and really samples, with a toy model through transformers.

What it is asked, what it leaves out and where it fails is the test's to say. `ToyEngine` is what stands behind it.
"""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from direct_rlhf.data.tokens import load_tokens
from local_server import LocalServer, send

Choice = dict[str, Any]


class ToyEngine:
    """Goes on from token ids as vLLM does: a request's own seed, EOS and stop strings that end it, a prefix cache."""

    def __init__(self, folder: Path, *, raw: bool = False) -> None:
        """``raw``: log-probabilities without the temperature, vLLM's default."""
        self._folder, self._raw = folder, raw
        self._tokens = load_tokens(str(folder))
        self._lock = threading.Lock()
        self.start()

    def start(self) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(self._folder).eval()
        self.forget()

    def forget(self) -> None:
        self._cached: dict[tuple[int, ...], torch.Tensor] = {}  # logits after a prompt

    def load(self, folder: Path) -> None:
        """Weights alone: what is cached of the old ones stays."""
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ValueError(f"no weights in {folder}")
        with self._lock:
            state = {name: tensor for file in files for name, tensor in load_file(file).items()}
            missing, unexpected = self._model.load_state_dict(state, strict=False)
            tied = {"lm_head.weight"} if self._model.config.tie_word_embeddings else set()
            if set(missing) - tied or unexpected:
                raise ValueError(f"the weights in {folder} are of another model")

    @torch.no_grad()
    def say(self, ids: list[int], params: dict[str, Any]) -> tuple[list[int], list[float], str]:
        """Token ids, their log-probabilities and the finish reason."""
        with self._lock:
            draw = torch.Generator().manual_seed(params["seed"])
            said: list[int] = []
            logprobs: list[float] = []
            while len(said) < params["max_tokens"]:
                logits = self._logits([*ids, *said], keep=not said)
                scaled = (logits / params["temperature"] if params["temperature"] else logits).log_softmax(-1)
                token = int(torch.multinomial(scaled.exp(), 1, generator=draw)) if params["temperature"] else -1
                token = int(scaled.argmax()) if token < 0 else token
                said.append(token)
                logprobs.append(float((logits.log_softmax(-1) if self._raw else scaled)[token]))
                text = self._tokens.decode(said)
                if token in params["stop_token_ids"] or any(stop in text for stop in params["stop"]):
                    return said, logprobs, "stop"
            return said, logprobs, "length"

    def _logits(self, ids: list[int], *, keep: bool) -> torch.Tensor:
        if keep and tuple(ids) in self._cached:
            return self._cached[tuple(ids)]
        logits = self._model(torch.tensor([ids])).logits[0, -1].float()
        if keep:
            self._cached[tuple(ids)] = logits
        return logits


class VllmServer(LocalServer):
    """``with VllmServer(folder) as server``: `server.url`.

    ``fault(path, nth)`` is what goes wrong at the nth request of a route (from 1): an HTTP status, "timeout", "reset",
    "json" (not JSON). ``edit(choice)`` changes a completion before it is sent. ``versions``: it knows versions of its
    weights. ``deaf``: it says that it has loaded weights, and has not. ``development``: it has routes for weights.
    """

    def __init__(
        self,
        folder: Path,
        *,
        fault: Callable[[str, int], str | None] = lambda path, nth: None,
        edit: Callable[[Choice], None] = lambda choice: None,
        versions: bool = True,
        deaf: bool = False,
        development: bool = True,
        raw: bool = False,
        key: str | None = None,
        models: tuple[str, ...] = ("toy",),
        max_model_len: int = 1024,
    ) -> None:
        super().__init__()
        self.engine = ToyEngine(folder, raw=raw)
        self.fault, self.edit, self.versions, self.deaf = fault, edit, versions, deaf
        self.development, self.key, self.models, self.max_model_len = development, key, models, max_model_len
        self.asked: list[tuple[str, Any]] = []  # route and body of all requests, in the order of arrival
        self.version = "default"
        self._running = threading.Event()
        self._running.set()

    def __exit__(self, *error: Any) -> None:
        self._running.set()
        super().__exit__(*error)

    @property
    def url(self) -> str:
        return self.address

    def restart(self) -> None:
        """The weights of the checkpoint again, and no memory of others."""
        self.engine.start()
        self.version = "default"

    def routes(self) -> list[str]:
        return [path for path, _ in self.asked]

    def answer(self, http: BaseHTTPRequestHandler) -> None:
        path, length = http.path, http.headers["Content-Length"]
        body = None if length is None else json.loads(http.rfile.read(int(length)))
        with self._lock:
            self.asked.append((path, body))
        fault = self.fault(path, self.nth(path))
        if self.broken(http, fault):
            return
        if fault == "json":
            send(http, 200, '{"choices": [{"token')
        elif fault is not None:
            send(http, int(fault), json.dumps({"error": {"message": f"no: {http.headers.get('Authorization')}"}}))
        elif self.key is not None and http.headers.get("Authorization") != f"Bearer {self.key}":
            send(http, 401, json.dumps({"error": "Unauthorized"}))
        else:
            status, said = self._reply(path, body)
            send(http, status, "" if said is None else json.dumps(said))

    def _reply(self, path: str, body: Any) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"data": [{"id": name, "max_model_len": self.max_model_len} for name in self.models]}
        if path == "/v1/completions":
            if body["model"] not in self.models:
                return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
            self._running.wait()
            return 200, {"model": body["model"], "choices": [self._choice(body)]}
        if not self.development:
            return 404, {"detail": "Not Found"}
        if path == "/pause":
            self._running.clear()
            return 200, {"status": "paused"}
        if path == "/resume":
            self._running.set()
            return 200, {"status": "resumed"}
        if path == "/reset_prefix_cache":
            self.engine.forget()
            return 200, None
        if path == "/collective_rpc" and body["method"] == "reload_weights":
            try:
                if not self.deaf:
                    self.engine.load(Path(body["kwargs"]["weights_path"]))
            except ValueError as error:
                return 500, {"error": str(error)}
            return 200, {"results": [None]}
        if path == "/update_weight_version" and self.versions:
            self.version = body["new_version"]
            return 200, {"success": True, "new_version": self.version}
        if path == "/weight_info" and self.versions:
            return 200, {"weight_version": self.version}
        return 404, {"detail": "Not Found"}

    def _choice(self, body: Any) -> Choice:
        ids, logprobs, finish = self.engine.say(body["prompt"], body)
        choice = {
            "index": 0,
            "text": "",
            "finish_reason": finish,
            "logprobs": {"token_logprobs": logprobs, "tokens": [f"token_id:{i}" for i in ids]},
            "token_ids": ids if body.get("return_token_ids") else None,
            "prompt_token_ids": body["prompt"],
        }
        self.edit(choice)
        return choice


def stand_in(calls: list[str], folder: Path) -> Any:
    """A module of `vllm`'s shape, as far as the colocated engine uses it. ``calls`` are the names of what was called.

    An engine that sleeps at level 2 has neither weights nor cache: it must be given both back before it samples.
    """

    class LLM:
        def __init__(self, **options: Any) -> None:
            assert options["enable_sleep_mode"]
            assert options["logprobs_mode"] == "processed_logprobs"
            self.options, self._engine = options, ToyEngine(Path(options["model"]))
            self._awake, self._loaded = {"weights", "kv_cache"}, True

        def sleep(self, level: int) -> None:
            calls.append(f"sleep {level}")
            self._awake, self._loaded = set(), False

        def wake_up(self, tags: list[str]) -> None:
            calls.append(f"wake {' '.join(tags)}")
            self._awake |= set(tags)

        def collective_rpc(self, method: str, kwargs: dict[str, str]) -> list[None]:
            calls.append(method)
            assert "weights" in self._awake
            self._engine.load(Path(kwargs["weights_path"]))
            self._loaded = True
            return [None]

        def reset_prefix_cache(self) -> bool:
            calls.append("reset")
            self._engine.forget()
            return True

        def generate(self, prompts: list[dict[str, list[int]]], params: list[Any], use_tqdm: bool) -> list[Any]:
            calls.append(f"generate {len(prompts)}")
            assert self._awake == {"weights", "kv_cache"}
            assert self._loaded
            return [self._output(prompt["prompt_token_ids"], one) for prompt, one in zip(prompts, params, strict=True)]

        def _output(self, ids: list[int], params: Any) -> Any:
            said, logprobs, _ = self._engine.say(ids, vars(params))
            steps = [{i: SimpleNamespace(logprob=value)} for i, value in zip(said, logprobs, strict=True)]
            return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(said), logprobs=steps)])

    return SimpleNamespace(LLM=LLM, SamplingParams=SimpleNamespace)
