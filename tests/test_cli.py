"""The command line through `main`: what each verb calls, what it prints, and how it ends."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from direct_rlhf import commands, doctor, errors, screen
from direct_rlhf.cli import main
from direct_rlhf.recipe.load import load_recipe

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Stand-ins for the stages and the chat, which record how they were called."""
    seen: list[tuple[Any, ...]] = []

    def run(loaded: Any, **options: Any) -> Path:
        seen.append(("run", loaded.recipe, options))
        return Path("runs/here")

    stand_in = ModuleType("direct_rlhf.stages")
    stand_in.run = run  # type: ignore[attr-defined]
    stand_in.evaluate_models = lambda models, loaded, **options: (  # type: ignore[attr-defined]
        seen.append(("evaluate", models, loaded.recipe, options)) or Path("runs/here")
    )
    stand_in.report = lambda runs, out, **more: seen.append(("report", runs, out, more)) or Path("report.html")  # type: ignore[attr-defined]
    talk = ModuleType("direct_rlhf.chat")
    talk.chat = lambda model, **options: seen.append(("chat", model, options))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "direct_rlhf.stages", stand_in)
    monkeypatch.setitem(sys.modules, "direct_rlhf.chat", talk)
    monkeypatch.setattr("direct_rlhf.stages", stand_in, raising=False)
    monkeypatch.setattr("direct_rlhf.chat", talk, raising=False)
    return seen


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=120, env=os.environ
    )


# Light verbs


@pytest.mark.promise("U3")
@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["run", "--help"],
        ["init", "--list"],
        ["init", "quickstart"],
        ["doctor"],
        ["check", "quickstart"],
    ],
    ids=" ".join,
)
def test_light_verb_imports_no_torch(arguments: list[str]) -> None:
    script = (
        "import sys\nfrom direct_rlhf.cli import main\n"
        f"main({arguments!r})\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    assert command("-c", script).stdout.strip().splitlines()[-1] == "[]"


@pytest.mark.promise("U3")
def test_help_answers_in_a_third_of_a_second() -> None:
    def seconds() -> float:
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-m", "direct_rlhf", "--help"],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)],
        )
        _, status, used = os.wait4(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        return used.ru_utime + used.ru_stime  # of the processor, so that a busy machine does not count

    assert min(seconds() for _ in range(5)) < 0.3


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    verbs = "quickstart init check doctor run reward sft dpo ppo evaluate report chat data"
    assert [verb for verb in verbs.split() if verb not in shown] == []


def test_commands_page_is_current() -> None:
    """Verbs and options are a frozen surface: a change is a visible edit of that page."""
    written = (ROOT / "docs/reference/commands.md").read_text(encoding="utf-8")
    assert written == commands.page(), "run: python -m direct_rlhf.commands > docs/reference/commands.md"


# Exit codes (reliability.md, section 2)


@pytest.mark.promise("U6")
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.DirectRLHFError, 1),
        (errors.ConfigError, 2),
        (errors.DataError, 3),
        (errors.OutOfMemoryError, 4),
        (errors.DivergenceError, 5),
        (errors.CheckpointError, 1),
        (errors.JudgeError, 1),
        (errors.MergeError, 1),
        (errors.BackendError, 1),
        (errors.Interrupted, 75),
    ],
)
def test_error_is_one_message_and_its_exit_code(
    error: type[errors.DirectRLHFError],
    code: int,
    calls: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(*_: Any, **__: Any) -> Path:
        raise error("what, where, why, what to do")

    monkeypatch.setattr(sys.modules["direct_rlhf.stages"], "run", run)
    assert main(["run", "quickstart"]) == code
    assert capsys.readouterr().err == "direct-rlhf: what, where, why, what to do\n"


@pytest.mark.promise("U6")
def test_ctrl_c_is_interrupted_and_resumable(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*_: Any, **__: Any) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["direct_rlhf.stages"], "run", run)
    assert main(["run", "quickstart"]) == 75
    assert capsys.readouterr().err == "direct-rlhf: interrupted. A run goes on where it was with --resume.\n"


@pytest.mark.promise("U6")
def test_bug_keeps_its_traceback_and_ends_with_1() -> None:
    script = (
        "import sys, types\n"
        "stages = types.ModuleType('direct_rlhf.stages')\n"
        "stages.run = lambda *_, **__: {}['a bug']\n"
        "sys.modules['direct_rlhf.stages'] = stages\n"
        "import direct_rlhf; direct_rlhf.stages = stages\n"
        "from direct_rlhf.cli import main\n"
        "sys.exit(main(['run', 'quickstart']))"
    )
    done = command("-c", script)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.rstrip().endswith("KeyError: 'a bug'")


@pytest.mark.promise("U6")
@pytest.mark.parametrize(
    "arguments",
    [["rn"], ["run"], ["run", "quickstart", "--nope"], ["run", "nowhere.yaml"], ["run", "quickstart", "ppo.clp=1"]],
)
def test_wrong_command_line_is_2(arguments: list[str], calls: list[Any]) -> None:
    assert main(arguments) == 2
    assert calls == []


def test_module_and_script_are_the_same_command() -> None:
    assert command("-m", "direct_rlhf", "--version").stdout.startswith("direct-rlhf ")


# What the verbs call


@pytest.mark.parametrize(
    ("arguments", "name", "options"),
    [
        (["quickstart"], "quickstart", {}),
        (["quickstart", "--overwrite", "seed=3"], "quickstart", {"overwrite": True}),
        (
            ["run", "world-study", "--root", "elsewhere", "--resume"],
            "world-study",
            {"root": Path("elsewhere"), "resume": True},
        ),
        (["run", "quickstart", "--only", "report"], "quickstart", {"only": "report"}),
        (["run", "quickstart", "name=mine"], "mine", {}),
        (["reward", "train", "quickstart"], "quickstart", {"only": "reward_model"}),
        (["reward", "check", "quickstart"], "quickstart", {"only": "fitness", "resume": True}),
        (["sft", "quickstart", "--resume"], "quickstart", {"only": "sft", "resume": True}),
        (["dpo", "world-study"], "world-study", {"only": "dpo"}),
        (["ppo", "quickstart"], "quickstart", {"only": "direct_ppo"}),
    ],
)
def test_verb_runs_its_stages(arguments: list[str], name: str, options: dict[str, Any], calls: list[Any]) -> None:
    assert main(arguments) == 0
    [(_, recipe, used)] = calls
    assert recipe.name == name
    assert used == {"root": Path("runs"), "resume": False, "overwrite": False, "only": None} | options
    assert recipe.seed == (3 if "seed=3" in arguments else 0)


def test_ppo_runs_each_arm_and_comes_back_for_the_second(calls: list[Any]) -> None:
    assert main(["ppo", "world-study", "--overwrite"]) == 0
    assert [(call[2]["only"], call[2]["resume"], call[2]["overwrite"]) for call in calls] == [
        ("sft_ppo", False, True),
        ("direct_ppo", True, False),
    ]


def test_recipe_without_the_data_its_arms_need_is_refused_before_anything_runs(
    calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("my.yaml").write_text("arms: [base, sft, direct_ppo]\nppo: {ptx: {weight: 2}}\n")
    assert main(["run", "my.yaml"]) == 2
    assert calls == []
    assert capsys.readouterr().err == (
        "direct-rlhf: data.preferences: no source, but sft, the reward model learns from preference pairs. "
        "Name at least one, such as {path: world:helpful.jsonl}.\n"
        "data.prompts: no source, and no data.preferences to take prompts from; direct_ppo needs them.\n"
        "ppo.ptx.weight = 2: needs text, but data.text names no source. "
        "Name one, such as {path: world:text.jsonl.gz}, or set the weight to 0.\n"
    )


def test_evaluate_passes_models_and_suites(calls: list[Any]) -> None:
    assert main(["evaluate", "world:base", "a/b", "--suite", "general, toxicity", "--set", "seed=5"]) == 0
    [(_, models, recipe, options)] = calls
    assert models == ["world:base", "a/b"]
    assert options["suites"] == recipe.evaluation.suites == ["general", "toxicity"]
    assert recipe.seed == 5


def test_unknown_suite_is_refused(calls: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "world:base", "--suite", "toxicty"]) == 2
    assert "must be one of: general, conversation, toxicity" in capsys.readouterr().err


def test_report_and_chat_pass_their_options(calls: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "runs/a", "runs/b", "--out", "both.html", "--redact-samples"]) == 0
    assert main(["chat", "world:base", "--system", "Be kind.", "--temperature", "0", "--max-new-tokens", "9"]) == 0
    assert calls == [
        ("report", [Path("runs/a"), Path("runs/b")], Path("both.html"), {"redact_samples": True}),
        ("chat", "world:base", {"system": "Be kind.", "temperature": 0.0, "max_new_tokens": 9, "seed": 0}),
    ]
    assert "Report: report.html" in capsys.readouterr().out


def test_run_opens_with_a_table(calls: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quickstart"]) == 0
    shown = capsys.readouterr().out
    for words in (
        "runs/quickstart",
        "world:base (full, float32)",
        "base, sft, direct_ppo",
        "world:harmless.jsonl (harmless)",
    ):
        assert words in shown


def test_run_ends_with_its_results_and_where_the_report_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    screen.closing(Path("runs/here"))
    assert capsys.readouterr().out == "Run: runs/here\n"
    (tmp_path / "results.json").write_text(json.dumps({"arms": {"base": {}}, "comparisons": []}))
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "report.html").write_text("")
    screen.closing(tmp_path)
    assert f"Report: {tmp_path / 'report.html'}" in capsys.readouterr().out


# init


def test_init_writes_a_commented_recipe_that_loads(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "mistral-7b-lora", "mine.yaml"]) == 0
    assert "direct-rlhf check mine.yaml" in capsys.readouterr().out
    assert Path("mine.yaml").read_text().startswith("# Direct RLHF of Mistral-7B-v0.1")
    assert load_recipe("mine.yaml").recipe == load_recipe("mistral-7b-lora", ["name=mine"]).recipe


def test_init_never_overwrites_without_force(capsys: pytest.CaptureFixture[str]) -> None:
    Path("quickstart.yaml").write_text("mine")
    assert main(["init", "quickstart"]) == 2
    assert Path("quickstart.yaml").read_text() == "mine"
    assert capsys.readouterr().err == (
        "direct-rlhf: quickstart.yaml: exists already. Name another file, or replace it with --force.\n"
    )
    assert main(["init", "quickstart", "--force"]) == 0
    assert Path("quickstart.yaml").read_text() != "mine"


def test_init_lists_the_shipped_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "hh-small",
        "llama-3-8b-lora",
        "mistral-7b-full",
        "mistral-7b-lora",
        "quickstart",
        "qwen-2.5-7b-lora",
        "standard",
        "world-3h",
        "world-study",
    ]


def test_init_of_an_unknown_name_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "mistral-lora"]) == 2
    assert "Did you mean mistral-7b-lora?" in capsys.readouterr().err


# check


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """What `check` looks at: a config, a tokenizer, a weights file whose content is never read."""
    from tokenizers import Tokenizer, models

    folder = tmp_path / "model"
    folder.mkdir()
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2, "a": 3}
    Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>", "pad_token": "<pad>"}))
    (folder / "config.json").write_text(json.dumps({"architectures": ["MistralForCausalLM"], "eos_token_id": 1}))
    (folder / "model.safetensors").write_bytes(b"not read" * 1000)
    return folder


def good_recipe(model_folder: Path) -> str:
    Path("pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    Path("my.yaml").write_text(
        f"model: {{base: {model_folder}}}\ndata: {{preferences: [{{path: pairs.jsonl}}]}}\nevaluation: {{suites: [general]}}\n"
    )
    return "my.yaml"


def test_check_shows_what_it_found(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", good_recipe(model_folder)]) == 0
    shown = capsys.readouterr().out
    for words in (
        "MistralForCausalLM",
        "4 tokens, end 1, pad 0",
        "pairs.jsonl (helpful, weight 1)",
        "the first 200 of each local source are good",
        "Nothing wrong.",
    ):
        assert words in shown


@pytest.mark.promise("U1")
def test_check_reports_every_problem_at_once(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = good_recipe(model_folder)
    overrides = [
        "data.preferences.0.path=none.jsonl",
        "data.prompts=[{path: nothing.jsonl}]",
        "ppo.ptx.weight=1",
        "model.base=no-such-model",
        "ppo.reward={type: python, target: 'no_such_module:f'}",
        "evaluation.suites=[conversation]",
        "evaluation.conversation.questions=mine.jsonl",
    ]
    assert main(["check", file, *overrides]) == 2
    problems = capsys.readouterr().err
    for words in (
        "none.jsonl: no such file or folder. Looked at: ",
        "nothing.jsonl: no such file or folder. Looked at: ",
        "ppo.ptx.weight = 1: needs text",
        "no-such-model: no such model",
        "ppo.reward.target = no_such_module:f: no module no_such_module beside the recipe or among the installed packages.",
        "mine.jsonl: no such file or folder",
    ):
        assert problems.count(words) == 1, words


@pytest.mark.promise("U6")
def test_check_of_bad_data_is_3(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = good_recipe(model_folder)
    Path("pairs.jsonl").write_text("no JSON\n")
    assert main(["check", file]) == 3
    assert capsys.readouterr().err.startswith("direct-rlhf: data.preferences[0]: ")


def test_check_finds_a_python_reward_beside_the_recipe(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("my_reward.py").write_text("raise SystemExit('check imports nothing of the user')")
    assert main(["check", good_recipe(model_folder), "ppo.reward={type: python, target: 'my_reward:f'}"]) == 0
    assert "Python: my_reward:f" in capsys.readouterr().out


def test_check_names_a_model_folder_without_weights(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model_folder / "model.safetensors").rename(model_folder / "pytorch_model.bin")
    assert main(["check", good_recipe(model_folder)]) == 2
    assert "has no .safetensors weights. Convert the model, or give another." in capsys.readouterr().err


def test_data_show_shows_pairs_as_tokens(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "show", good_recipe(model_folder), "--rows", "1"]) == 0
    assert "pairs.jsonl" in capsys.readouterr().out


# doctor and extras


@pytest.mark.promise("U4")
@pytest.mark.parametrize("extra", ["vllm", "wandb", "mlflow", "trackio", "tensorboard", "toxicity", "gpu"])
def test_doctor_says_exactly_how_to_get_a_missing_extra(
    extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hidden = doctor.requirements()[1][extra]
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in hidden else version(name))
    assert main(["doctor"]) == 0
    assert f'{", ".join(hidden)} missing: pip install "direct-rlhf[{extra}]"' in capsys.readouterr().out


def test_doctor_fails_when_something_always_needed_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "peft" else version(name))
    assert main(["doctor"]) == 2
    printed = capsys.readouterr()
    assert "free disk here" in printed.out
    assert printed.err == "direct-rlhf: missing: peft. Run: pip install direct-rlhf\n"


def test_doctor_sees_the_limits_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(doctor, "LIMIT_FILES", (limit,))
    machine = dict(doctor.examine())["memory"]
    limit.write_text("1073741824\n")
    assert dict(doctor.examine())["memory"] == "1.0 GiB"
    limit.write_text("max\n")
    assert dict(doctor.examine())["memory"] == machine
