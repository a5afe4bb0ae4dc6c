import os
import signal
import subprocess
import sys
import unicodedata

import pexpect
import pytest
import yaml

from direct_rlhf.chat import chat
from direct_rlhf.errors import ConfigError
from direct_rlhf.recipe.schema import Recipe
from direct_rlhf.rollout import native
from direct_rlhf.run.atomic import write_json
from toys import toy_folder

RUN = """
import sys
from direct_rlhf.chat import chat
chat(sys.argv[1], max_new_tokens=int(sys.argv[2]), temperature=float(sys.argv[3]), seed=3)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def say(folder, monkeypatch, capsys):
    """Feeds lines to a chat whose model answers what it is told; gives the prompts it got and what was printed."""

    def run(lines, answers, model=None, **options):
        prompts, left = [], list(answers)

        def sample(model, tokens, prompt_ids, keys, settings, *, on_text):
            prompts.append((tokens.decode(prompt_ids[0]), keys[0], settings))
            for piece in left.pop(0):
                if piece is KeyboardInterrupt:
                    raise KeyboardInterrupt
                on_text(0, piece)

        def read(prompt=""):
            if not lines:
                raise EOFError
            line = lines.pop(0)
            if line is KeyboardInterrupt:
                raise KeyboardInterrupt
            return line

        monkeypatch.setattr(native, "sample", sample)
        monkeypatch.setattr("builtins.input", read)
        chat(str(model or folder), **options)
        return prompts, "".join(reversed(capsys.readouterr()))

    return run


def test_the_conversation_so_far_is_the_prompt_in_the_training_format(say):
    prompts, shown = say(["Hi.", "", "Why?"], [[" Hel", "lo."], [" Because."]])
    assert [prompt for prompt, _, _ in prompts] == [
        "\n\nHuman: Hi.\n\nAssistant:",
        "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:",
    ]
    assert shown == "Hello.\nBecause.\n"


def test_an_answer_ends_at_the_human_marker_and_every_answer_has_its_own_stream(say):
    prompts, _ = say(["a", "b"], [["x"], ["y"]], temperature=0.3, max_new_tokens=9, seed=5)
    assert [(settings.stop_strings, settings.temperature, settings.max_new_tokens) for _, _, settings in prompts] == [
        (("\n\nHuman:",), 0.3, 9)
    ] * 2
    assert {key.seed for _, key, _ in prompts} == {5}
    assert len({key for _, key, _ in prompts}) == 2


def test_whole_old_turns_are_lost_when_the_window_is_full(say):
    long = "x" * 300
    prompts, _ = say([f"{n}{long}" for n in range(5)], [["ok"]] * 5, max_new_tokens=24)
    last = prompts[-1][0]
    assert last.startswith("\n\nHuman: 2xxx")
    assert last.endswith(f"\n\nAssistant: ok\n\nHuman: 4{long}\n\nAssistant:")
    assert all(len(prompt) + 1 <= 1000 for prompt, _, _ in prompts)  # one token a byte, and BOS


def test_a_turn_that_cannot_fit_is_said_and_forgotten(say):
    prompts, shown = say(["x" * 2000, "Hi."], [["ok"]], max_new_tokens=24)
    assert [prompt for prompt, _, _ in prompts] == ["\n\nHuman: Hi.\n\nAssistant:"]
    assert "(too long: a turn may have about 1000 tokens)" in shown


def test_system_text_comes_first_and_changing_it_starts_anew(say):
    prompts, shown = say(["a", "/system Be rude.", "b", "/system", "c"], [["x"]] * 3, system="Be kind.")
    assert [prompt for prompt, _, _ in prompts] == [
        "Be kind.\n\nHuman: a\n\nAssistant:",
        "Be rude.\n\nHuman: b\n\nAssistant:",
        "\n\nHuman: c\n\nAssistant:",
    ]
    assert shown.count("(new conversation)") == 2


def test_reset_forgets_quit_leaves_and_an_unknown_command_is_no_turn(say):
    prompts, shown = say(["a", "/reset", "/rest", "b", "/quit", "never"], [["x"], ["y"]])
    assert prompts[1][0] == "\n\nHuman: b\n\nAssistant:"
    assert len(prompts) == 2
    assert "/rest: no such command." in shown


def test_ctrl_c_stops_the_answer_keeps_what_was_said_and_a_second_one_leaves(say):
    stop = KeyboardInterrupt
    prompts, shown = say(["a", "b", "c", stop, "never"], [["par", "tial", stop], ["all"], [stop]])
    assert prompts[1][0] == "\n\nHuman: a\n\nAssistant: partial\n\nHuman: b\n\nAssistant:"
    assert prompts[2][0].endswith("\n\nAssistant: all\n\nHuman: c\n\nAssistant:")
    assert shown == "partial (stopped)\nall\n(no answer) (stopped)\n"


def test_ctrl_c_while_typing_leaves_only_the_second_time(say):
    stop = KeyboardInterrupt
    prompts, shown = say([stop, "a", stop, stop, "never"], [["x"]])
    assert len(prompts) == 1
    assert shown.count("Ctrl-C again") == 2


def test_an_empty_answer_is_said_and_its_turn_forgotten(say):
    prompts, shown = say(["a", "b"], [[" "], ["y"]])
    assert prompts[1][0] == "\n\nHuman: b\n\nAssistant:"
    assert shown == "(no answer)\ny\n"


def test_a_model_cannot_steer_the_terminal(say):
    _, shown = say(["a"], [["\x1b[2Jx\ty\x07\x9b\u00a0\n🙂"]])
    assert shown == "\ufffd[2Jx\ty\ufffd\ufffd\u00a0\n🙂\n"


@pytest.mark.parametrize("place", ["run", "arm"])
def test_a_model_of_a_run_speaks_the_format_of_its_recipe(say, folder, tmp_path, place):
    run = tmp_path / "runs" / "study"
    recipe = Recipe.model_validate({"dialogue": {"human": "\nQ:", "assistant": "\nA:"}})
    (run / "models" / "sft").mkdir(parents=True)
    (run / "models" / "direct_ppo").symlink_to(folder)
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    write_json(run / "manifest.json", {})
    model = run if place == "run" else run / "models" / "direct_ppo"
    prompts, _ = say(["Hi."], [["x"]], model=model)
    assert [(prompt, settings.stop_strings) for prompt, _, settings in prompts] == [("\nQ: Hi.\nA:", ("\nQ:",))]


def test_a_run_without_a_model_says_so(tmp_path):
    write_json(tmp_path / "manifest.json", {})
    with pytest.raises(ConfigError, match=r"this run has made no model yet. Finish it with --resume"):
        chat(str(tmp_path))


def test_a_cap_beyond_half_the_window_is_lowered_and_said(say):
    prompts, shown = say(["Hi."], [["x"]], max_new_tokens=5000)
    assert prompts[0][2].max_new_tokens == 512
    assert "(the model reads 1024 tokens, so answers end after 512)" in shown


def expected(folder, lines, max_new_tokens):
    """The answers that the sampler gives in such a conversation."""
    from direct_rlhf.data.tokens import load_tokens
    from direct_rlhf.models.loading import load_causal_lm
    from direct_rlhf.rollout.types import SampleKey, SamplingSettings

    tokens, model = load_tokens(str(folder)), load_causal_lm(str(folder))
    settings = SamplingSettings(max_new_tokens, 0.7, ("\n\nHuman:",))
    text, answers = "", []
    for n, line in enumerate(lines):
        text += f"\n\nHuman: {line}\n\nAssistant:"
        ids = tokens.encode(text, bos=True)
        answer = native.sample(model, tokens, [ids], [SampleKey(3, "chat", n, 0)], settings).texts[0].strip()
        answers.append(answer)
        text += f" {answer}"
    return answers


def visible(text):
    """Letters, digits and punctuation, in order: what survives a terminal."""
    return "".join(char for char in text if unicodedata.category(char)[0] in "LNP")


def test_through_a_pipe_only_answers_are_printed_and_bad_bytes_do_no_harm(folder):
    lines = b"Hi.\n\xff\xfe what?\n/quit\nnever\n"
    ran = subprocess.run(
        [sys.executable, "-c", RUN, str(folder), "12", "0.7"], input=lines, capture_output=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    answers = expected(folder, ["Hi.", "\ufffd\ufffd what?"], 12)
    assert visible(ran.stdout.decode()) == visible("".join(answers))
    assert "You:" not in ran.stdout.decode()


def spawn(folder, max_new_tokens, temperature):
    environment = {**os.environ, "TERM": "dumb", "INPUTRC": "/dev/null"}
    arguments = ["-c", RUN, str(folder), str(max_new_tokens), str(temperature)]
    return pexpect.spawn(
        sys.executable,
        arguments,
        env=environment,
        encoding="utf-8",
        codec_errors="replace",
        timeout=60,
        # a process in the background is started with SIGINT ignored, and hands that on
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_in_a_terminal_two_turns_stream_and_quit_leaves_with_0(folder):
    child = spawn(folder, 40, 0.7)
    shown = []
    for line in ("Hello there.", "And then?"):
        child.expect("You: ")
        child.sendline(line)
        child.expect("Model: ")
        child.expect("\r\n\r\n(?=You: )")
        shown.append(child.before)
    assert [visible(text) for text in shown] == [
        visible(text) for text in expected(folder, ["Hello there.", "And then?"], 40)
    ]
    child.expect("You: ")
    child.sendline("/quit")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_in_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_leaves_with_0(folder):
    child = spawn(folder, 500, 0)  # greedy: a random model then repeats itself and does not end
    child.expect("You: ")
    child.sendline("Tell me everything.")
    child.expect("Model: [^\r\n]{3}")
    child.sendintr()
    child.expect(r"\(stopped\)")
    child.expect("You: ")
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
