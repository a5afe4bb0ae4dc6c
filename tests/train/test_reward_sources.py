import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch

from direct_rlhf.data.types import Turn
from direct_rlhf.errors import BackendError, ConfigError, DivergenceError
from direct_rlhf.recipe.schema import HttpReward, PythonReward
from direct_rlhf.train.reward_sources import Answer, CallableReward, ModelRewardSource, load_callable


def answer(text, finished=True):
    return Answer((Turn("human", "Hi."),), text, finished, "helpful", "p1")


def python_reward(tmp_path, body):
    (tmp_path / "my_reward_module.py").write_text(body)
    return load_callable(PythonReward(type="python", target="my_reward_module:reward"), tmp_path)


@pytest.fixture(autouse=True)
def _forget_module():
    yield
    import sys

    sys.modules.pop("my_reward_module", None)


def test_a_python_reward_beside_the_recipe_sees_prompt_answer_and_kind(tmp_path):
    reward = python_reward(
        tmp_path,
        "def reward(items):\n"
        "    assert items[0]['prompt'] == [{'role': 'human', 'content': 'Hi.'}] and items[0]['kind'] == 'helpful'\n"
        "    return [len(item['answer']) for item in items]\n",
    )
    assert reward.score([answer(" ab "), answer("abcd")]).tolist() == [2.0, 4.0]


def test_raw_rewards_are_normalised_on_the_base_samples_and_unfinished_ones_leave_the_quantile_alone():
    reward = CallableReward(lambda items: [float(item["answer"]) for item in items], "r")
    base = [answer("1"), answer("3"), answer("-100", finished=False), answer("2")]
    normalised = reward.normalised_on(base)
    scores = normalised.score(base)
    assert scores.mean().item() == pytest.approx(0, abs=1e-6)
    assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-6)
    expected = (torch.quantile(torch.tensor([1.0, 3.0, 2.0]), 0.05) - normalised.mean) / normalised.std
    assert normalised.low_quantile == pytest.approx(expected.item())


def test_a_constant_reward_is_refused_before_training():
    with pytest.raises(ConfigError, match="gives all 2 samples of the base the same reward \\(1\\)"):
        CallableReward(lambda items: [1.0] * len(items), "r").normalised_on([answer("a"), answer("b")])


@pytest.mark.promise("N2")
@pytest.mark.parametrize(
    ("returned", "error", "text"),
    [
        ([1.0], BackendError, "returned 1 rewards for 2 items"),
        (["good", 1.0], BackendError, "rewards must be numbers"),
        ([1.0, float("nan")], DivergenceError, "reward nan for prompt p1, answer 'b'"),
        ([float("inf"), 1.0], DivergenceError, "reward inf for prompt p1, answer 'a'"),
        ([1.0, 1e39], DivergenceError, "reward inf for prompt p1, answer 'b'"),  # too large for float32
    ],
)
def test_a_faulty_reward_is_named_and_never_trained_on(returned, error, text):
    with pytest.raises(error, match=text):
        CallableReward(lambda items: returned, "r").score([answer("a"), answer("b")])


@pytest.mark.promise("N2")
def test_a_reward_that_runs_over_when_it_is_normalised_is_named_and_not_clipped_away():
    reward = CallableReward(lambda items: [0.0, 3e38], "reward my:own", mean=0.0, std=1e-3)
    with pytest.raises(DivergenceError, match=r"^reward my:own: reward inf for prompt p1, answer 'b' \(1 of 2"):
        reward.score([answer("a"), answer("b")])


@pytest.mark.promise("N2")
def test_a_reward_model_that_gives_nan_for_row_3_is_named_with_that_rows_prompt():
    class Model:
        def score(self, items):
            assert items[3] == ((Turn("human", "Hi."),), "d", False)
            return torch.tensor([0.0, 1.0, 2.0, float("nan"), float("nan")])

    answers = [Answer((Turn("human", "Hi."),), text, text != "d", "helpful", f"p{i}") for i, text in enumerate("abcde")]
    words = r"^reward model x: reward nan for prompt p3, answer 'd' \(2 of 5 rewards are not finite\)\. Mend the reward"
    with pytest.raises(DivergenceError, match=words):
        ModelRewardSource(Model(), "reward model x", 0.0).score(answers)


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("no_such_module_x:f", "No module named 'no_such_module_x'"),
        ("json:no_such", "no attribute 'no_such'"),
        ("math:pi", "pi is not a function"),
    ],
)
def test_a_wrong_target_says_where_it_looked(tmp_path, target, text):
    with pytest.raises(ConfigError, match=text):
        load_callable(PythonReward(type="python", target=target), tmp_path)


@pytest.fixture
def endpoint():
    """A loopback server whose next reply is set by the test; yields (url, replies, requests)."""
    replies, requests = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            status, body = replies.pop(0)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/score", replies, requests
    server.shutdown()


def test_an_http_reward_posts_the_items_and_reads_the_scores(endpoint, tmp_path):
    url, replies, requests = endpoint
    replies.append((200, b'{"scores": [0.5, -1]}'))
    reward = load_callable(HttpReward(type="http", url=url), tmp_path)
    assert reward.score([answer("a"), answer("b")]).tolist() == [0.5, -1.0]
    assert [item["answer"] for item in requests[0]["items"]] == ["a", "b"]


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        ((500, b"oops"), "HTTP Error 500"),
        ((200, b"not json"), "Expecting value"),
        ((200, b"[1, 2]"), 'expected {"scores": \\[numbers\\]}, got \\[1, 2\\]'),
    ],
)
def test_an_http_reward_that_fails_stops_the_run_with_the_url(endpoint, tmp_path, reply, text):
    url, replies, _ = endpoint
    replies.append(reply)
    with pytest.raises(BackendError, match=text) as caught:
        load_callable(HttpReward(type="http", url=url), tmp_path).score([answer("a"), answer("b")])
    assert url in str(caught.value)
