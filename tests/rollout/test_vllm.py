import math
import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from direct_rlhf.data.tokens import load_tokens
from direct_rlhf.errors import BackendError, ConfigError, Interrupted
from direct_rlhf.models.loading import load_causal_lm
from direct_rlhf.recipe.schema import ModelSection, VllmSection
from direct_rlhf.rollout import native, vllm
from direct_rlhf.rollout.types import FinishReason, SampleKey, SamplingSettings
from direct_rlhf.rollout.vllm import Ask, Said
from direct_rlhf.rollout.vllm_colocated import Colocated
from direct_rlhf.rollout.vllm_server import Server
from toys import toy_folder
from vllm_server import VllmServer, stand_in

VOCABULARY = 259
PROMPTS = [[1, 50, 61, 72], [1, 99], [1, 44, 45, 46, 47, 48], [1, 120, 7]]
KEYS = [SampleKey(3, f"p{i}", 0, 0) for i in range(len(PROMPTS))]
GREEDY = SamplingSettings(10, temperature=0.0)
WARM = SamplingSettings(10, temperature=0.7)
NEVER = lambda: False


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return toy_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return toy_folder(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="module")
def tokens(base):
    return load_tokens(str(base))


@pytest.fixture
def served(base):
    with VllmServer(base) as server:
        yield server


def reach(server, longest=20, **section):
    """The client, connected and with the version of its weights named."""
    engine = Server(VllmSection(url=server.url, **{"retries": 2, "concurrency": 4, **section}), first_wait=0.01)
    engine.connect(longest, NEVER)
    server.version = "v"
    return engine


def sample(engine, tokens, prompts=PROMPTS, keys=KEYS, settings=WARM, **more):
    return vllm.sample(engine, tokens, prompts, keys, settings, version="v", vocabulary=VOCABULARY, **more)


def answers(rollout):
    return [ids[mask].tolist() for ids, mask in zip(rollout.response_ids_BT, rollout.response_mask_BT, strict=True)]


def assert_same_rollout(ours, theirs):
    for name in ("prompt_ids_BP", "prompt_mask_BP", "response_ids_BT", "response_mask_BT", "action_mask_BT"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert (ours.finish, ours.texts, ours.keys) == (theirs.finish, theirs.texts, theirs.keys)
    assert_close(ours.logprob_BT, theirs.logprob_BT, rtol=0, atol=1e-5)


@pytest.mark.parametrize("keep_stop", [False, True])
def test_greedy_answers_their_endings_and_their_texts_are_the_native_engines(base, tokens, served, keep_stop):
    model = load_causal_lm(base)
    plain = native.sample(model, tokens, PROMPTS, KEYS, GREEDY)
    text = plain.texts[0]
    stops = (text[2:4], plain.texts[2][:1])  # inside one answer, and at the very start of another
    for settings in (GREEDY, SamplingSettings(10, temperature=0.0, stop_strings=stops, keep_stop=keep_stop)):
        ours = sample(reach(served), tokens, settings=settings)
        assert_same_rollout(ours, native.sample(model, tokens, PROMPTS, KEYS, settings))
    assert FinishReason.STOP in ours.finish


def test_an_eos_ends_an_answer_as_an_action(base, tokens):
    def short(choice):
        choice["token_ids"], choice["finish_reason"] = [70, 71, tokens.eos_id], "stop"
        choice["logprobs"]["token_logprobs"] = [-1.0, -2.0, -3.0]

    with VllmServer(base, edit=short) as server:
        rollout = sample(reach(server), tokens)
    assert answers(rollout) == [[70, 71, tokens.eos_id]] * 4
    assert set(rollout.finish) == {FinishReason.EOS}
    assert rollout.action_mask_BT.all()
    assert rollout.logprob_BT[0].tolist() == [-1.0, -2.0, -3.0]


class Scripted:
    """Says the tokens of ``rows`` in pieces of the sizes given, wherever an answer would end."""

    name = "scripted"

    def __init__(self, rows, sizes):
        self.rows, self.sizes, self.seeds = rows, sizes, []

    def replies(self, asks, sampling, vocabulary, should_stop):
        said = []
        for ask in asks:
            prompt, row = next(
                (prompt, row)
                for prompt, row in zip(PROMPTS, self.rows, strict=True)
                if ask.ids[: len(prompt)] == prompt
            )
            start = len(ask.ids) - len(prompt)
            assert ask.ids[len(prompt) :] == row[:start]  # it goes on from what it has said itself
            piece = row[start : start + min(next(self.sizes), ask.max_tokens)]
            self.seeds.append(ask.seed)
            said.append(Said(piece, [-float(i) for i in piece]))
        return said

    def confirm(self, version, should_stop):
        return


@given(data=st.data())
def test_endings_do_not_depend_on_where_the_engine_breaks_an_answer_off(tokens, data):
    """Its own stop strings and its own EOS are a saving, no rule."""
    alphabet = st.sampled_from([tokens.eos_id, *tokens.encode("ab\n")])
    rows = data.draw(st.lists(st.lists(alphabet, min_size=10, max_size=10), min_size=4, max_size=4))
    settings = SamplingSettings(10, stop_strings=("\nab", "bb"), keep_stop=data.draw(st.booleans()))
    sizes = data.draw(st.lists(st.integers(1, 10), min_size=40, max_size=40))
    pieces = Scripted(rows, iter(sizes))
    whole = sample(Scripted(rows, iter([10] * 40)), tokens, settings=settings)
    assert_same_rollout(sample(pieces, tokens, settings=settings), whole)
    assert len(set(pieces.seeds)) == len(pieces.seeds)  # an answer is not gone on with by the same random numbers


def test_logprobs_are_those_of_a_fresh_forward_at_the_temperature(base, tokens, served):
    rollout = sample(reach(served), tokens)
    model = load_causal_lm(base)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, answers(rollout), strict=True)):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / 0.7).log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]
        assert_close(rollout.logprob_BT[row, : len(answer)], expected, rtol=0, atol=1e-5)


def test_a_sample_depends_on_its_key_and_its_prompt_alone(tokens, served):
    engine = reach(served)
    together = answers(sample(engine, tokens))
    back = sample(engine, tokens, PROMPTS[::-1], KEYS[::-1])
    assert answers(back) == together[::-1]
    assert answers(sample(engine, tokens, PROMPTS[2:3], KEYS[2:3])) == together[2:3]
    for key in (SampleKey(4, "p0", 0, 0), SampleKey(3, "p", 0, 0), SampleKey(3, "p0", 1, 0), SampleKey(3, "p0", 0, 1)):
        assert answers(sample(engine, tokens, PROMPTS[:1], [key])) != together[:1]


def test_every_parameter_that_changes_a_distribution_is_sent(tokens, served):
    """A server takes what is left open from the model's generation_config.json."""
    sample(reach(served), tokens, PROMPTS[:1], KEYS[:1], SamplingSettings(10, 0.7, ("\n\nHuman:",)))
    body = next(body for path, body in served.asked if path == "/v1/completions")
    assert 0 <= body.pop("seed") < 2**63
    assert body == {
        "model": "toy",
        "prompt": PROMPTS[0],
        "max_tokens": 10,
        "return_token_ids": True,
        "n": 1,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "stop": ["\n\nHuman:"],
        "stop_token_ids": [2],
        "include_stop_str_in_output": True,
        "logprobs": 0,
    }


# Weights


def test_new_weights_are_sampled_with_and_nothing_cached_of_the_old_ones_is(base, other, tokens, served):
    engine = reach(served)
    sample(engine, tokens, settings=GREEDY)  # fills the cache of prefixes
    engine.load(other, "v", NEVER)
    ours = sample(engine, tokens, settings=GREEDY)
    assert_same_rollout(ours, native.sample(load_causal_lm(other), tokens, PROMPTS, KEYS, GREEDY))
    routes = [path for path in served.routes() if not path.startswith("/v1/")]
    assert routes == [
        "/weight_info",
        *("/pause", "/collective_rpc", "/reset_prefix_cache", "/resume", "/update_weight_version", "/weight_info"),
    ]


def test_a_server_that_was_started_again_is_noticed(other, tokens, served):
    engine = reach(served)
    engine.load(other, "version_000001_ab", NEVER)
    served.restart()
    with pytest.raises(BackendError) as caught:
        vllm.sample(engine, tokens, PROMPTS, KEYS, WARM, version="version_000001_ab", vocabulary=VOCABULARY)
    assert str(caught.value) == (
        f"vLLM server {served.url}: its weights are 'default', and 'version_000001_ab' were loaded before it was asked. "
        "It was started again, or somebody else loads weights into it. Nothing was trained on its answers; give the run "
        "a server of its own and go on with --resume."
    )


def test_a_server_that_knows_no_versions_is_only_asked_once_for_them(base, other, tokens):
    with VllmServer(base, versions=False) as server:
        engine = reach(server)
        engine.load(other, "v", NEVER)
        sample(engine, tokens)
        sample(engine, tokens)
        assert server.routes().count("/update_weight_version") == 1
        assert "/weight_info" not in server.routes()
        another = reach(server)  # of a process that did not load the weights
        sample(another, tokens)
        sample(another, tokens)
        assert server.routes().count("/weight_info") == 1


@pytest.mark.parametrize("broken", ["no weights", "another model"])
def test_weights_that_cannot_be_loaded_leave_the_server_paused_and_say_why(tmp_path, tokens, served, broken):
    folder = tmp_path / "weights"
    folder.mkdir()
    if broken == "another model":
        toy_folder(folder, "gpt2")
    engine = reach(served)
    with pytest.raises(BackendError, match=r"/collective_rpc gave 500: .*the weights|weights in") as caught:
        engine.load(folder, "v", NEVER)
    assert str(caught.value).endswith(
        f"It must be vLLM 0.16 or newer, see {folder} under this path (rollout.vllm.weights), and serve the recipe's "
        "model.base. Start it again: it is paused, with weights of two kinds."
    )
    assert served.routes()[-1] == "/collective_rpc"  # not tried again, and not resumed


def test_a_server_without_its_development_routes_is_told_apart(base, other):
    with VllmServer(base, development=False) as server, pytest.raises(BackendError) as caught:
        reach(server).load(other, "v", NEVER)
    assert str(caught.value) == (
        f'vLLM server {server.url}: /pause gave 404: {{"detail": "Not Found"}}. Start it with VLLM_SERVER_DEV_MODE=1 '
        "(vLLM 0.16 or newer), where only this run can reach it."
    )


# Faults


@pytest.mark.parametrize("fault", ["503", "500", "429", "timeout", "reset", "json"])
def test_what_may_pass_is_tried_again_and_changes_no_sample(base, tokens, served, fault):
    expected = sample(reach(served), tokens)

    def twice(path, nth):
        return fault if path == "/v1/completions" and nth <= 2 else None

    with VllmServer(base, fault=twice) as server:
        found = sample(reach(server, timeout=0.3 if fault == "timeout" else 60.0), tokens)
        assert_same_rollout(found, expected)
        assert server.routes().count("/v1/completions") == len(PROMPTS) + 2


def test_what_does_not_pass_ends_with_the_last_cause_and_the_way_out(base, tokens):
    with VllmServer(base, fault=lambda path, nth: "503" if path == "/v1/completions" else None) as server:
        engine = reach(server, concurrency=1)
        with pytest.raises(BackendError) as caught:
            sample(engine, tokens)
        assert str(caught.value) == (
            f'vLLM server {server.url}: /v1/completions failed 3 times, the last time with: status 503 ({{"error": '
            '{"message": "no: None"}}). Is it running, and within reach? Nothing was trained meanwhile; start it and go '
            "on with --resume."
        )
        assert server.routes().count("/v1/completions") == 3


def test_a_server_that_is_not_there_is_named_with_the_cause(served):
    served.__exit__()
    with pytest.raises(BackendError, match=r"/v1/models failed 3 times, .*refused.*Is it running, and within reach\?"):
        reach(served)


def test_a_key_is_sent_and_never_said(base, tokens, monkeypatch):
    monkeypatch.setenv("MY_KEY", "s3cret")
    with VllmServer(base, key="s3cret", fault=lambda path, nth: "400" if "comp" in path else None) as server:
        with pytest.raises(BackendError, match=r'/v1/completions gave 400: .*"no: Bearer \*\*\*"'):
            sample(reach(server, api_key_env="MY_KEY"), tokens)
        with pytest.raises(BackendError, match=r"/v1/models gave 401: .*name that in rollout\.vllm\.api_key_env\."):
            reach(server)
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(ConfigError, match=r"rollout\.vllm\.api_key_env = MY_KEY: this environment variable is not set"):
        Server(VllmSection(url="http://x", api_key_env="MY_KEY"))


@pytest.mark.parametrize(
    ("models", "longest", "section", "words"),
    [
        (("a", "b"), 20, {}, "serves a, b, and no model is named. Set rollout.vllm.model to one of them."),
        (("a", "b"), 20, {"model": "c"}, "serves a, b, and not c. Set rollout.vllm.model to one of them."),
        (("a",), 20, {"model": "c"}, "serves a, and not c. Set rollout.vllm.model to one of them."),
        ((), 20, {}, "serves no model, and no model is named. Set rollout.vllm.model to one of them."),
        (
            ("a",),
            65,
            {},
            "takes 64 tokens, and the longest prompt with its answer has 65. Start it with --max-model-len 65.",
        ),
    ],
)
def test_another_model_than_was_meant_is_refused_before_anything_is_asked(base, models, longest, section, words):
    with VllmServer(base, models=models, max_model_len=64) as server:
        with pytest.raises(BackendError) as caught:
            reach(server, longest, **section)
        assert str(caught.value) == f"vLLM server {server.url}: {words}"
        assert server.routes() == ["/v1/models"]


def test_the_address_may_end_in_v1_and_one_of_several_models_may_be_named(base, tokens):
    with VllmServer(base, models=("a", "b")) as server:
        engine = Server(VllmSection(url=f"{server.url}/v1/", model="b"))
        assert engine.connect(20, NEVER) == "b"


def dropped(name):
    return lambda choice: choice.pop(name)


def changed(**fields):
    return lambda choice: choice.update(fields)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (dropped("token_ids"), "holds no token ids (return_token_ids). Use vLLM 0.16 or newer"),
        (changed(token_ids=None), "holds no token ids"),
        (changed(token_ids=["a"]), "holds no token ids"),
        (dropped("logprobs"), "holds no log-probabilities of the sampled tokens. Start it without a limit"),
        (changed(logprobs={"token_logprobs": [None] * 10}), "holds no log-probabilities"),
        (changed(logprobs={"token_logprobs": [-1.0]}), "10 tokens came with 1 log-probabilities"),
        (changed(token_ids=[], logprobs={"token_logprobs": []}), "0 tokens came with 0 log-probabilities"),
        (
            changed(token_ids=[VOCABULARY] * 10),
            "it said token 259, and the policy's vocabulary has 259: it serves another",
        ),
        (changed(prompt_token_ids=[1, 1]), "it went on from other tokens than it was sent"),
        (changed(finish_reason="abort"), "it broke an answer off (abort). Does somebody else pause it?"),
    ],
)
def test_a_reply_that_lacks_what_training_needs_is_refused_with_what_to_do(base, tokens, edit, words):
    with VllmServer(base, edit=edit) as server:
        with pytest.raises(BackendError) as caught:
            sample(reach(server, concurrency=1), tokens)
        assert words in str(caught.value)
        assert server.routes().count("/v1/completions") == 1  # final: another try would end the same


def test_a_signal_is_obeyed_while_the_server_is_waited_for(base, tokens):
    with VllmServer(base, fault=lambda path, nth: "timeout" if path == "/v1/completions" else None) as server:
        engine = reach(server)
        start = time.monotonic()
        with pytest.raises(Interrupted, match="its answers are drawn again on resume"):
            sample(engine, tokens, should_stop=lambda: time.monotonic() - start > 0.2)
        assert time.monotonic() - start < 2


# Colocated: a stand-in for the module `vllm` says the same


@pytest.fixture
def colocated(base, monkeypatch):
    calls = []
    monkeypatch.setitem(__import__("sys").modules, "vllm", stand_in(calls, base))
    return Colocated(VllmSection(mode="colocated"), ModelSection(base=str(base)), str(base), 20), calls


def test_a_colocated_engine_says_what_a_server_says(other, tokens, served, colocated):
    engine, calls = colocated
    there = reach(served)
    there.load(other, "v", NEVER)
    engine.load(other, "v", NEVER)
    for settings in (WARM, GREEDY, SamplingSettings(10, 1.0, ("a", "b"))):
        assert_same_rollout(sample(engine, tokens, settings=settings), sample(there, tokens, settings=settings))
    woken = ["wake weights", "reload_weights", "wake kv_cache", "reset"]
    assert calls[:6] == ["sleep 2", *woken, "generate 4"]
    assert not engine.rest()  # its weights are gone with its sleep
    assert calls[-1] == "sleep 2"


def test_a_colocated_engine_looks_for_a_signal_between_parts_of_the_work(other, colocated, monkeypatch):
    engine, calls = colocated
    engine.load(other, "v", NEVER)
    monkeypatch.setattr("direct_rlhf.rollout.vllm_colocated.AT_ONCE", 3)
    asks = [Ask([1, 60 + i], 2, i) for i in range(8)]
    params = vllm.parameters(SimpleNamespace(eos_ids={2}), WARM)
    assert len(engine.replies(asks, params, VOCABULARY, NEVER)) == 8
    assert calls[-3:] == ["generate 3", "generate 3", "generate 2"]
    looks = iter([False, True])
    with pytest.raises(Interrupted):
        engine.replies(asks, params, VOCABULARY, lambda: next(looks))


def test_a_colocated_engine_that_does_not_start_says_what_it_needs(base, monkeypatch):
    def no_room(**options):
        raise ValueError("Free memory on device is less than desired")

    monkeypatch.setitem(__import__("sys").modules, "vllm", SimpleNamespace(LLM=no_room, SamplingParams=None))
    with pytest.raises(
        BackendError, match=r"does not start \(Free memory .*gpu_memory_utilization.*lower it, or use a"
    ):
        Colocated(VllmSection(mode="colocated"), ModelSection(base=str(base)), str(base), 20)


def test_seeds_fill_63_bits_and_differ():
    seeds = [vllm.seed_of(SampleKey(0, "p", 0, i), 0) for i in range(200)]
    assert len(set(seeds)) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert math.log2(max(seeds)) > 62
