"""The recipe as a user runs it: real processes, real TRL, a tiny policy."""

import functools
import json
import re
import shutil

import pandas as pd
import pytest
import torch
from conftest import distance, flags, identical, problem, refused, resumed_here, start, weights, write_jsonl
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2ForSequenceClassification

import evaluate
import rewards
import train_grpo
from support import curves
from support.checkpoints import checkpoints
from support.problems import load_tokenizer


def test_a_run_saves_checkpoints_the_policy_its_tokenizer_and_samples(trained, policy):
    run, _ = trained
    assert [path.name for path in checkpoints(run)] == ["checkpoint-2", "checkpoint-4"]
    assert (run / "tokenizer.json").is_file()
    assert not identical(weights(run), weights(policy)), "the policy has learned"
    table = pd.read_parquet(run / "completions" / "completions_00004.parquet")
    assert len(table) == 8
    assert {"prompt", "completion", "gold", "extracted", "correctness_reward_func", "advantage"} <= set(table.columns)


def test_a_run_prints_its_plan_before_training(trained, policy):
    run, done = trained
    plan, _, rest = done.stdout.partition("step 1/4")
    assert rest, done.stdout
    for text in (
        "32 problems to train on; 0 dropped",
        str(policy),
        "weights float32, compute float32, AdamW states float32",
        "Transformers (the run is on the CPU), 8 completions at a time, at most 12 tokens each",
        "2 prompts x 4 completions = 8 completions, gradient checkpointing off",
        "passes of at most 4,096 tokens, sorted by length, each at its own width, without completions of advantage 0",
        "no reference model (beta 0)",
        "every 2 steps",
        str(run),
    ):
        assert text in plan


def test_a_run_prints_one_readable_line_a_step(trained):
    lines = [line for line in trained[1].stdout.splitlines() if line.startswith("step ")]
    assert len(lines) == 4
    for number, line in enumerate(lines, start=1):
        assert re.fullmatch(
            rf"step {number}/4 reward [\d.]+ \+-[\d.]+ "
            r"\(xml [\d.]+ soft [\d.]+ strict [\d.]+ int [\d.]+ correct [\d.]+\) "
            r"length \d+ truncated \d+% no signal \d+% tokens \d+% entropy \S+ grad \S+ [\d.]+ s",
            line,
        ), line
    assert "{'loss'" not in trained[1].stdout, "not TRL's raw dict"


def test_a_run_may_log_more_rarely_than_it_steps(policy, data, tmp_path, capsys):
    train_grpo.main(flags(policy, data, tmp_path / "run", logging_steps=3, eval_steps=2))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line[:8] for line in lines] == ["step 3/4", "step 4/4"], "the last steps' when it ends"
    assert ["grad" in line for line in lines] == [True, False]


def test_a_run_prints_a_whole_sample_every_so_many_steps(trained):
    samples = re.findall(
        r"---- sample after step (\d+), about \d min left ----\n(.*?)\n----", trained[1].stdout, re.DOTALL
    )
    assert [int(step) for step, _ in samples] == [2, 4]
    for _, text in samples:
        for part in ("question:  Otto has", "gold:      ", "response:\n", "extracted: ", "correctness "):
            assert part in text
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text), "escaped: a sample cannot drive the terminal"


def test_rewards_of_a_users_own_are_trained_on_and_shown(policy, data, tmp_path, monkeypatch, capsys):
    """Neither of them logs gold, and one needs what TRL passes and does not always apply."""

    def brevity(completions, **kwargs):
        return [-float(len(completion[0]["content"])) for completion in completions]

    def at_first(completions, trainer_state, **kwargs):
        return [1.0 if trainer_state.global_step < 1 else None for _ in completions]

    monkeypatch.setattr(rewards, "REWARD_FUNCS", [brevity, at_first])
    train_grpo.main(flags(policy, data, tmp_path / "run", max_steps="2", eval_steps="0", sample_every="1"))
    first, second = re.findall(r"^rewards:   (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert re.fullmatch(r"brevity -[\d.]+  at_first 1  = -?[\d.]+", first)
    assert re.fullmatch(r"brevity -[\d.]+  = -[\d.]+", second)


async def near(completions, answer, reach, **kwargs):
    """Pays for texts about as long as the gold answer."""
    lengths = [len(completion[0]["content"]) for completion in completions]
    return [float(abs(length - len(gold)) < reach) for length, gold in zip(lengths, answer, strict=True)]


class Seen:
    """Keeps the columns that it is called with."""

    def __init__(self):
        self.columns = {}

    def __call__(self, prompts, completions, **columns):
        asked = [prompt[-1]["content"] for prompt in prompts]
        assert columns["question"] == asked
        for name in ("level", "hints", "rationale", "answer"):
            self.columns.setdefault(name, {}).update(zip(asked, columns[name], strict=True))
        assert not {"image", "prompt", "completion"} & columns.keys()
        return [1.0] * len(prompts)


def test_rewards_in_all_of_trls_forms_get_the_datas_columns_and_are_drawn(policy, data, tmp_path, monkeypatch, capsys):
    """Two partials of one coroutine, an object, a reward model; columns of mixed kinds, not in every row, or TRL's."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(policy, num_labels=1)
    config.save_pretrained(tmp_path / "judge")
    Qwen2ForSequenceClassification(config).save_pretrained(tmp_path / "judge")
    load_tokenizer(str(policy)).save_pretrained(tmp_path / "judge")
    more = [{}, {"level": "hard"}, {"level": 3, "hints": {"count": 2}}, {"level": None, "image": "shelf.png"}]
    rows = [{**problem(a, 5), **more[a % 4]} for a in range(8)]
    write_jsonl(tmp_path / "data" / "train.jsonl", rows)
    seen, forms = Seen(), [functools.partial(near, reach=2), functools.partial(near, reach=3)]
    monkeypatch.setattr(rewards, "REWARD_FUNCS", [*rewards.REWARD_FUNCS, *forms, seen, str(tmp_path / "judge")])
    run = tmp_path / "run"
    train_grpo.main(flags(policy, tmp_path / "data", run, max_steps="2", eval_steps="0", num_generations="2"))
    out = capsys.readouterr().out
    assert "columns that rewards do not get, as TRL uses the names: image\n" in out
    for name in ("level", "hints"):
        assert seen.columns[name] == {row["question"]: row.get(name) for row in rows}
    assert seen.columns["answer"] == {row["question"]: row["answer"].split()[-1] for row in rows}
    assert re.search(
        r"^step 2/2 .* near (1\.0|\.\d)\d near_6 (1\.0|\.\d)\d Seen 1\.00 judge -?\d?\.\d\d\)", out, re.MULTILINE
    )
    table = pd.read_parquet(run / "completions" / "completions_00002.parquet")
    assert {"near", "near_6", "Seen", "judge"} <= set(table)
    assert table["judge"].nunique() > 1
    panel = curves.figure("run", curves.read_log(run)).axes[0]
    drawn = [text.get_text() for text in panel.get_legend().get_texts()]
    assert drawn == ["reward", "Seen", "judge", "near", "near_6"]


def test_a_run_says_what_it_saved_and_what_to_type_next(trained):
    run, done = trained
    assert f"python evaluate.py {run}" in done.stdout.splitlines()[-1]


def test_run_json_holds_every_setting_as_used(trained, policy, data):
    run = json.loads((trained[0] / "run.json").read_text())
    settings = run["settings"]
    used = {
        "model_name_or_path": str(policy),
        "dataset_name": str(data),
        "learning_rate": 1e-3,
        "num_generations": 4,
        "temperature": train_grpo.TEMPERATURE,
        "max_prompt_length": train_grpo.MAX_PROMPT_LENGTH,
        "max_completion_length": 12,
        "beta": 0.0,
        "adam_beta2": train_grpo.ADAM_BETA2,
        "warmup_steps": train_grpo.WARMUP_STEPS,
        "dtype": "float32",
        "gradient_checkpointing": False,
        "use_vllm": False,
        "seed": train_grpo.SEED,
    }
    assert {name: settings[name] for name in used} == used
    assert run["outcome"] == "finished"
    assert run["versions"]["trl"] == "1.16.0"
    assert run["device"].startswith("cpu")
    assert run["command"][1].endswith("train_grpo.py")
    assert run["started"] <= run["ended"]
    assert {"commit", "model_revision", "dataset_revision", "system_prompt"} <= run.keys()


def test_held_out_accuracy_is_logged_before_the_first_step_and_after_every_few(trained):
    log = json.loads((trained[0] / "trainer_state.json").read_text())["log_history"]
    measured = [row for row in log if "eval_strict_accuracy" in row]
    assert [row["step"] for row in measured] == [0, 2, 4]
    assert all(row["eval_n"] == 6 for row in measured)
    assert all({"eval_lenient_accuracy", "eval_reflection_rate"} <= row.keys() for row in measured)
    lines = [line for line in trained[1].stdout.splitlines() if line.startswith("held out at step")]
    assert len(lines) == 3
    assert "n = 6" in lines[0]


def test_held_out_evaluation_does_not_disturb_training(trained, policy, data, tmp_path):
    run, _ = trained
    done = start("train_grpo.py", *flags(policy, data, tmp_path / "without", eval_steps="0"))
    assert done.returncode == 0, done.stderr[-4000:]
    assert "held out" not in done.stdout
    assert identical(weights(run), weights(tmp_path / "without"))
    for step in range(1, 5):
        name = f"completions_{step:05d}.parquet"
        with_it, without = (pd.read_parquet(folder / "completions" / name) for folder in (run, tmp_path / "without"))
        pd.testing.assert_frame_equal(with_it, without)


def test_ten_steps_without_a_reward_spread_raise_one_warning_with_the_remedies(policy, data, tmp_path, capsys):
    settings = {"max_steps": "14", "temperature": "0.001", "eval_steps": "0", "sample_every": "0"}
    train_grpo.main(flags(policy, data, tmp_path / "run", **settings))
    out = capsys.readouterr().out
    assert out.count("WARNING: for 10 steps every group") == 1
    before, _, _ = out.partition("WARNING")
    assert "step 10/14" in before
    assert "step 11/14" not in before
    for remedy in ("python cold_start.py", "easier problems", "a model that can follow it"):
        assert remedy in out


def test_an_optimizer_without_betas_trains(policy, data, tmp_path):
    """Its `eps` is a pair."""
    train_grpo.main(flags(policy, data, tmp_path / "run", optim="adafactor", max_steps="2", eval_steps="0"))
    assert not identical(weights(tmp_path / "run"), weights(policy))


def test_an_output_folder_with_checkpoints_is_refused_and_both_ways_on_are_named(trained, policy, data, capsys):
    run, _ = trained
    before = weights(run)
    error = refused(capsys, 2, flags(policy, data, run))
    assert "checkpoint-4" in error
    assert "--resume_from_checkpoint auto" in error
    assert "Give another --output_dir" in error
    assert identical(before, weights(run)), "nothing was overwritten"


def test_auto_resumes_from_the_newest_checkpoint_to_the_same_weights(trained, policy, data, tmp_path, capsys):
    run, _ = trained
    interrupted = tmp_path / "run"
    interrupted.mkdir()
    shutil.copytree(run / "checkpoint-2", interrupted / "checkpoint-2")
    shutil.copy(run / "run.json", interrupted)
    out = resumed_here(capsys, flags(policy, data, interrupted))
    assert "resuming after step 2" in out
    assert "step 3/4" in out
    assert "step 2/4" not in out
    assert identical(weights(run), weights(interrupted)), "on a CPU a resumed run is the same run"
    assert len(json.loads((interrupted / "run.json").read_text())["earlier"]) == 1


def test_master_weights_are_fp32_under_bf16_compute_whatever_the_checkpoint_holds(policy, data, tmp_path):
    AutoModelForCausalLM.from_pretrained(policy, dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    AutoTokenizer.from_pretrained(policy).save_pretrained(tmp_path / "bf16")
    settings = {"bf16": "true", "beta": "0.04", "max_steps": "1"}
    done = start("train_grpo.py", *flags(tmp_path / "bf16", data, tmp_path / "run", **settings))
    assert done.returncode == 0, done.stderr[-4000:]
    assert "weights float32, compute bfloat16, AdamW states float32" in done.stdout
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path / "run").values())
    assert "KL to a reference model, beta 0.04" in done.stdout
    assert re.search(r"step 1/1 .* KL \S+", done.stdout)


@pytest.mark.parametrize("quantized", [False, True], ids=["LoRA", "QLoRA"])
def test_an_adapter_is_saved_evaluated_merged_and_resumed(quantized, policy, data, tmp_path, capsys):
    if quantized:
        pytest.importorskip("bitsandbytes")
    run, again, merged = tmp_path / "run", tmp_path / "again", tmp_path / "merged"
    words = {"use_peft": "true", "lora_r": "4", "eval_steps": "0", "bf16": str(quantized).lower()}
    words["load_in_4bit"] = str(quantized).lower()
    train_grpo.main(flags(policy, data, run, **words))
    assert "AdamW states float32" in capsys.readouterr().out, "small updates round away in less"
    report = (run / "README.md").read_text()
    assert "library_name: peft" in report
    assert "with LoRA, trained with GRPO" in report, "not PEFT's own card"
    assert not (run / "model.safetensors").exists()
    adapter = load_file(run / "adapter_model.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in adapter.items() if "lora_B" in name), "it has learned"

    shutil.copytree(run, again, ignore=shutil.ignore_patterns("checkpoint-4"))
    (again / "adapter_model.safetensors").unlink()
    assert "resuming after step 2" in resumed_here(capsys, flags(policy, data, again, **words))
    assert identical(adapter, load_file(again / "adapter_model.safetensors"))

    policy = AutoPeftModelForCausalLM.from_pretrained(run, dtype="float32")
    policy.merge_and_unload().save_pretrained(merged)
    AutoTokenizer.from_pretrained(run).save_pretrained(merged)
    shutil.copy(run / "run.json", merged)
    for folder in (run, merged):
        evaluate.main([str(folder), "--limit", "2", "--use_cpu"])


def test_an_adapter_is_trained_further_or_merged_as_the_user_says(policy, data, tmp_path, monkeypatch, capsys):
    run, further, again, whole = (tmp_path / name for name in ("run", "further", "again", "whole"))
    monkeypatch.chdir(policy.parent)
    words = {"max_steps": "3", "save_steps": "1", "eval_steps": "0"}
    train_grpo.main(flags(policy.name, data, run, **words, use_peft="true", lora_r="4", lora_dropout="0.1"))
    monkeypatch.chdir(tmp_path)
    adapter = load_file(run / "adapter_model.safetensors")
    (run / "tokenizer_config.json").unlink()  # as PEFT itself saves an adapter

    words |= {"beta": "0.1"}
    capsys.readouterr()
    train_grpo.main(flags(run, data, further, **words, adapter="train"))
    out = capsys.readouterr().out
    assert f"{policy} with the adapter {run}, 0.1M" in out, "its model is found from another folder"
    assert re.search("step 1/3 .* KL 0 ", out), "the reference is the adapter as it was"
    trained = load_file(further / "adapter_model.safetensors")
    assert 0 < distance(adapter, trained) < 0.2 * distance(adapter, dict.fromkeys(adapter, torch.zeros(())))
    config = json.loads((further / "adapter_config.json").read_text())
    assert (config["r"], config["lora_dropout"], config["base_model_name_or_path"]) == (4, 0.0, str(policy))
    shutil.copytree(further, again, ignore=shutil.ignore_patterns("checkpoint-3"))
    (again / "adapter_model.safetensors").unlink()
    assert "resuming after step 2" in resumed_here(capsys, flags(run, data, again, **words, adapter="train"))
    assert identical(trained, load_file(again / "adapter_model.safetensors"))

    train_grpo.main(flags(run, data, whole, **words, adapter="merge"))
    assert re.search("step 1/3 .* KL 0 ", capsys.readouterr().out)
    assert not (whole / "adapter_config.json").exists()
    merged = AutoPeftModelForCausalLM.from_pretrained(run, dtype="float32").merge_and_unload().state_dict()
    assert identical(weights(whole / "merged"), {name: merged[name] for name in weights(whole / "merged")})
    assert not identical(weights(whole / "merged"), weights(whole)), "all of it is trained"
    for folder in (further, whole):
        evaluate.main([str(folder), "--limit", "2", "--use_cpu"])


def test_long_prompts_are_dropped_and_counted(policy, tmp_path, capsys):
    rows = [problem(a, 1) for a in range(12)]
    rows[3]["question"] *= 60
    rows[7]["question"] *= 60
    write_jsonl(tmp_path / "data" / "train.jsonl", rows)
    train_grpo.main(flags(policy, tmp_path / "data", tmp_path / "run", max_steps="1", eval_steps="0"))
    assert "10 problems to train on; 2 dropped" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "run.json").read_text())["problems"] == 10


def test_bad_data_is_one_message_and_no_traceback(policy, tmp_path):
    write_jsonl(tmp_path / "data" / "train.jsonl", [problem(1, 1), {"question": "Why?"}])
    done = start("train_grpo.py", *flags(policy, tmp_path / "data", tmp_path / "run", eval_steps="0"))
    assert done.returncode == 1
    assert "train.jsonl: 1 of 2 rows cannot be used. row 2: no 'answer'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_templates_settings_that_are_no_object_are_one_message(policy, data, tmp_path, capsys):
    words = flags(policy, data, tmp_path / "run", chat_template_kwargs="enable_thinking=false")
    assert "CHAT_TEMPLATE_KWARGS is 'enable_thinking=false'" in refused(capsys, 2, words)


def test_too_few_problems_for_one_generation_is_an_error(policy, tmp_path, capsys):
    write_jsonl(tmp_path / "data" / "train.jsonl", [problem(1, 1)])
    error = refused(capsys, 1, flags(policy, tmp_path / "data", tmp_path / "run", eval_steps="0"))
    assert "1 problems are fewer than the 2 prompts" in error


def test_an_unreachable_hub_is_one_message_with_the_remedy(policy, tmp_path):
    done = start("train_grpo.py", *flags(policy, "openai/gsm8k", tmp_path / "run"), HF_HUB_CACHE=tmp_path / "empty")
    assert done.returncode == 1
    assert "Use a local folder" in done.stderr
    assert "HF_ENDPOINT" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_without_weights_is_one_message(policy, data, tmp_path, capsys):
    shutil.copytree(policy, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    assert "model.safetensors" in refused(capsys, 1, flags(tmp_path / "model", data, tmp_path / "run"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_bare_command_says_what_works_instead():
    done = start("train_grpo.py")
    assert done.returncode == 2
    for message in ("CUDA", "python demo.py", "--use_cpu true"):
        assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) < 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_run_on_cuda_computes_in_bf16_and_evaluates_there(policy, data, tmp_path):
    run = tmp_path / "run"
    done = start("train_grpo.py", *flags(policy, data, run, use_cpu=None, bf16="true", use_vllm="false"))
    assert done.returncode == 0, done.stderr[-4000:]
    assert "weights float32, compute bfloat16" in done.stdout
    assert json.loads((run / "run.json").read_text())["device"] == torch.cuda.get_device_name()
    assert start("evaluate.py", run, "--use_vllm", "false").returncode == 0
