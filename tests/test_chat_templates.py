"""What a model's chat template, tokenizer and generation config do to a run: each real, of some family of models."""

import json
import shutil
from types import SimpleNamespace

import pytest
import trl.trainer.grpo_trainer
from conftest import cold_flags, ended, flags, settings

import cold_start
import evaluate
import rewards
import train_grpo
from rewards import to_prompt
from support.errors import BadInput
from support.generation import as_completion, complete, complete_with_vllm, load_policy, mend_generation_config
from support.problems import check_template_kwargs, end_of_turn, load_tokenizer, template_remarks
from support.record import Run
from support.trainer import _greedy

TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
OPENED = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = TURNS + OPENED
THOUGHT = "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"  # an empty one
OFF = "enable_thinking is defined and enable_thinking is false"
QWEN3 = (  # where the prompt holds that empty thought with enable_thinking False alone
    CHATML.replace("{{ m.content }}", THOUGHT)
    + f"{{% if add_generation_prompt and {OFF} %}}<think>\n\n</think>\n\n{{% endif %}}"
)
QWEN3_5 = (  # and is open without it
    CHATML.replace("{{ m.content }}", THOUGHT)
    + "{% if add_generation_prompt %}"
    + f"{{% if {OFF} %}}<think>\n\n</think>\n\n{{% else %}}<think>\n{{% endif %}}{{% endif %}}"
)
R1 = CHATML + "{% if add_generation_prompt %}<think>\n{% endif %}"
GLM = TURNS.replace("<|im_end|>", "") + OPENED
SPACED = CHATML.replace("<|im_end|>", " <|im_end|>")
V3_1 = CHATML + "{% if add_generation_prompt %}{% if thinking %}<think>{% else %}</think>{% endif %}{% endif %}"
CHOICE = "{% if reasoning_effort not in ['none', 'high'] %}{{ raise_exception('no such effort') }}{% endif %}" + CHATML
EFFORT = "Reasoning: {{ reasoning_effort if reasoning_effort is defined else 'medium' }}\n" + CHATML


def changed(model, folder, template=None, eos=None, **generation_config):
    """A copy of a model's folder with another template, another EOS token, and more in its generation config."""
    shutil.copytree(model, folder)
    for name, changes in (
        ("tokenizer_config.json", {"eos_token": eos} if eos else {}),
        ("generation_config.json", generation_config),
    ):
        held = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps(held))
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture
def endless(policy, tmp_path):
    """A policy that ends its turns in <|im_end|> and declares <|endoftext|> alone, as Qwen2.5's base models do."""
    return changed(policy, tmp_path / "endless", eos="<|endoftext|>", eos_token_id=0)


# ---- a turn's end


def test_what_ends_a_turn_is_an_eos_and_that_is_said(endless, capsys):
    tokenizer = load_tokenizer(str(endless))
    assert tokenizer.eos_token == "<|im_end|>"
    assert "its EOS is '<|endoftext|>', and a turn ends in '<|im_end|>'" in capsys.readouterr().out
    assert tokenizer.pad_token == "<|endoftext|>", "nothing else has changed"


def test_nothing_changes_where_the_model_declares_that_end(endless, capsys):
    """Gemma and Phi-3: the tokenizer's EOS is another token, the generation config names both."""
    config = endless / "generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": [0, 2]}))
    assert load_tokenizer(str(endless)).eos_token == "<|endoftext|>"
    assert not capsys.readouterr().out


def test_an_end_that_is_added_without_being_special_is_left_out_of_the_text(endless):
    path = endless / "tokenizer.json"
    held = json.loads(path.read_text())
    for token in held["added_tokens"]:
        token["special"] &= token["content"] != "<|im_end|>"
    path.write_text(json.dumps(held))
    tokenizer = load_tokenizer(str(endless))
    assert tokenizer.decode(tokenizer("4<|im_end|>")["input_ids"], skip_special_tokens=True) == "4"


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        (SPACED, "<|im_end|>"),
        (CHATML.replace("<|im_end|>", "{{ eos_token }}"), "<|im_end|>"),
        (CHATML.replace("<|im_end|>", "<|endoftext|>"), "<|endoftext|>"),
        (GLM, None),
        (CHATML.replace("<|im_end|>", "<|end_of_turn|>"), None),  # no token of this tokenizer
        ("{{ raise_exception('no assistant') }}", None),
    ],
)
def test_the_end_of_a_turn_is_read_off_the_template(template, end, policy):
    tokenizer = load_tokenizer(str(policy))
    tokenizer.chat_template = template
    assert end_of_turn(tokenizer) == end


def test_held_out_answers_end_there_by_transformers_and_by_vllm(endless, monkeypatch):
    tokenizer, prompts = load_tokenizer(str(endless)), [to_prompt("How many?")]
    (answer,) = complete(load_policy(str(endless)), tokenizer, prompts, 12)
    assert not answer["truncated"]
    assert answer["text"].isdigit()
    asked = {}

    class LLM:
        def __init__(self, **options):
            pass

        def generate(self, prompts, sampling, use_tqdm):
            output = SimpleNamespace(token_ids=[*tokenizer("4")["input_ids"], 2], finish_reason="stop")
            return [SimpleNamespace(outputs=[output]) for _ in prompts]

    fake = SimpleNamespace(LLM=LLM, SamplingParams=lambda **kwargs: asked.update(kwargs))
    monkeypatch.setitem(__import__("sys").modules, "vllm", fake)
    (answer,) = complete_with_vllm(tokenizer, [[1, 2]], 12, model="x")
    assert (answer["text"], answer["tokens"], answer["truncated"]) == ("4", 2, False)
    assert asked["stop_token_ids"] == [2]


def build(policy, data, tmp_path, **changes):
    """A GRPO run's trainer."""
    run = settings(*flags(policy, data, tmp_path / "run", **changes))
    tokenizer = load_tokenizer(str(policy))
    samples, _ = train_grpo.load_samples(run, tokenizer)
    return train_grpo.build_trainer(run, tokenizer, samples, [], Run(run))


def test_completions_end_there_in_training_and_what_is_saved_declares_it(endless, data, tmp_path, capsys):
    """Its generation config has a temperature without do_sample as well."""
    config = endless / "generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"temperature": 0.6}))
    train_grpo.main(flags(endless, data, tmp_path / "run", max_steps="1", save_steps="1", eval_steps="0"))
    assert "do_sample is True" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"][:1]
    assert row["completions/clipped_ratio"] == 0
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-1"):
        saved = json.loads((folder / "generation_config.json").read_text())
        assert sorted(saved["eos_token_id"]) == [0, 2]
        assert (saved["do_sample"], saved["temperature"]) == (True, 0.6)
    assert load_tokenizer(str(tmp_path / "run")).eos_token == "<|im_end|>"


def test_vllm_ends_there_too_when_it_samples_and_when_it_is_greedy(endless, data, tmp_path, monkeypatch):
    """A stand-in for TRL's engine, which is told nothing else than what it is built with."""

    class Engine:
        temperature = top_p = top_k = min_p = repetition_penalty = None
        structured_outputs_regex = _iter_named_params = None

        def __init__(self, mode, generation_kwargs, **kwargs):
            self.mode, self.generation_kwargs = mode, generation_kwargs

    monkeypatch.setattr(trl.trainer.grpo_trainer, "VLLMGeneration", Engine)
    run = settings(*flags(endless, data, tmp_path / "run", generation_kwargs='{"stop_token_ids": [7]}'))
    tokenizer, run.use_vllm = load_tokenizer(str(endless)), True
    samples, _ = train_grpo.load_samples(run, tokenizer)
    engine = train_grpo.build_trainer(run, tokenizer, samples, [], Run(run)).vllm_generation
    assert engine.generation_kwargs["stop_token_ids"] == [2, 0, 7]
    assert run.generation_kwargs == {"stop_token_ids": [7]}, "what run.json says and a resumed run compares"
    with _greedy(engine, [2, 0]):
        assert engine.generation_kwargs["stop_token_ids"] == [2, 0]


# ---- a generation config that Transformers does not save


@pytest.mark.parametrize(
    ("config", "saved", "reason"),
    [
        ({"temperature": 0.6, "top_p": 0.9}, {"do_sample": True, "temperature": 0.6, "top_p": 0.9}, "Vicuna"),
        (
            {"temperature": 0.6, "do_sample": False},
            {"do_sample": True, "temperature": 0.6},
            "greedy, and a temperature",
        ),
        ({"output_scores": True, "max_length": 90}, {}, "not mended by sampling"),
        ({"length_penalty": 2.0, "top_k": 5}, {"do_sample": True, "top_k": 5}, "of a beam search"),
        ({"min_p": 0.9, "do_sample": True}, {"do_sample": True}, "would change how the policy is sampled"),
        ({"no_repeat_ngram_size": 3, "num_beams": 4}, {}, "so would these"),
        ({"temperature": 0.6, "do_sample": True}, {"do_sample": True, "temperature": 0.6}, "as it has to be"),
    ],
)
def test_whatever_the_generation_config_holds_the_model_can_be_saved(config, saved, reason, policy, tmp_path, capsys):
    model = load_policy(str(changed(policy, tmp_path / "model", **config)))
    capsys.readouterr()
    mend_generation_config(model)
    assert ("from here on" in capsys.readouterr().out) is (saved != config), reason
    model.save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    ids = {"bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "transformers_version"}
    assert {name: value for name, value in written.items() if name not in ids} == saved
    assert written["eos_token_id"] == 2


def test_a_cold_starts_merged_adapter_has_what_was_mended(endless, data, tmp_path):
    config = endless / "generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"temperature": 0.6}))
    small = {"examples": "8", "num_train_epochs": "1", "use_peft": "true"}
    cold_start.main(cold_flags(endless, data, tmp_path / "cold", **small))
    saved = json.loads((tmp_path / "cold" / "generation_config.json").read_text())
    assert (saved["do_sample"], sorted(saved["eos_token_id"])) == (True, [0, 2])


# ---- thoughts outside of the tags

NOT_TAUGHT = [
    (QWEN3, "'<think>\\n\\n</think>\\n\\n<reasoning>", """--chat_template_kwargs '{"enable_thinking": false}'"""),
    (QWEN3_5, "an example would", """--chat_template_kwargs '{"enable_thinking": false}'"""),
    (R1, "<|im_start|>assistant\\n<think>\\n'", "Mend chat_template.jinja"),
    (GLM, "not end in a token that ends a turn", "Mend chat_template.jinja"),
    (SPACED, "</answer> <|im_end|>'", "Mend chat_template.jinja"),
    (
        CHATML.replace("{{ m.content }}", "{{ m.content[:40] if m.role == 'assistant' else m.content }}"),
        "an example would",
        "Mend chat_template.jinja",
    ),
]


@pytest.mark.parametrize(("template", "wrong", "remedy"), NOT_TAUGHT)
def test_a_cold_start_that_would_teach_what_is_never_paid_is_refused(
    template, wrong, remedy, policy, data, tmp_path, capsys
):
    model = changed(policy, tmp_path / "model", template)
    _, error = ended(capsys, 1, cold_flags(model, data, tmp_path / "run"), cold_start)
    assert wrong in error
    assert remedy in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("template", "kwargs"),
    [
        (CHATML, {}),
        (QWEN3, {"enable_thinking": False}),
        (QWEN3_5, {"enable_thinking": False}),
        (CHATML.replace("<|im_end|>", "\n<|im_end|>"), {}),
    ],
)
def test_what_is_taught_is_the_solution_alone_behind_grpos_prompt(template, kwargs, policy):
    tokenizer = load_tokenizer(str(policy))
    tokenizer.chat_template = template
    cold_start.check_turn(to_prompt("How many?"), tokenizer, kwargs)


def test_the_command_that_follows_a_cold_start_has_its_prompt(policy, data, tmp_path, capsys):
    model, thought = changed(policy, tmp_path / "model", QWEN3), '{"enable_thinking": false}'
    small = {"examples": "8", "num_train_epochs": "1", "chat_template_kwargs": thought}
    cold_start.main(cold_flags(model, data, tmp_path / "cold", **small))
    more = f"--dataset_name {data} --chat_template_kwargs '{thought}' --use_cpu true"
    assert capsys.readouterr().out.endswith(f"--model_name_or_path {tmp_path / 'cold'} {more}\n")


@pytest.mark.parametrize(
    ("template", "kwargs", "remark"),
    [
        (CHATML, None, None),
        (QWEN3, None, "enable_thinking is not set"),
        (QWEN3_5, {}, "enable_thinking is not set"),
        (QWEN3, {"enable_thinking": False}, None),
        (QWEN3, {"enable_thinking": True}, None),
        (QWEN3_5, {"enable_thinking": True}, "prompts end in an open <think>"),
        (R1, {}, "prompts end in an open <think>"),
        (R1.replace("<think>", "[THINK]"), {}, r"prompts end in an open [THINK]"),
        (R1.replace("<think>", "◁think▷"), {}, "prompts end in an open ◁think▷"),
        (V3_1, {}, None),
        (GLM, {}, "no token ends a turn there"),
    ],
)
def test_the_plan_says_what_a_template_does_to_the_format(template, kwargs, remark, policy):
    tokenizer = load_tokenizer(str(policy))
    tokenizer.chat_template = template
    found = template_remarks(tokenizer, to_prompt("How many?"), SimpleNamespace(chat_template_kwargs=kwargs))
    assert (found and found[0].startswith(remark)) if remark else not found
    assert len(found) < 2


WRONG_SETTINGS = [
    (QWEN3, '{"enable_thinkin": false}'),
    (QWEN3, '{"enable_thinking": "false"}'),
    (QWEN3, '{"enable_thinking": false, "thinking": false}'),
    (CHATML.replace("{{ m.content }}", "{{ m.thinking }}{{ m.content }}"), '{"thinking": false}'),
    (V3_1, '{"thinking": "false"}'),  # true, for this template
    (EFFORT, '{"reasoning_efort": "low"}'),
    (CHATML, '{"enable_thinking": false}'),
]


@pytest.mark.parametrize(("template", "kwargs"), WRONG_SETTINGS)
def test_a_setting_that_the_template_does_not_have_is_refused(template, kwargs, policy, data, tmp_path, capsys):
    model, output = changed(policy, tmp_path / "model", template), tmp_path / "run"
    words = ["--use_cpu", "--dataset_name", data, "--chat_template_kwargs", kwargs]
    starts = [
        ended(capsys, 1, cold_flags(model, data, output, chat_template_kwargs=kwargs), cold_start),
        ended(capsys, 1, [model, *words], evaluate),
        ended(capsys, 1, [model, *words, "--ask", "2 + 2?"], evaluate),
    ]
    if 'false"' not in kwargs:  # on the command line TRL takes "false" in quotes for false
        starts += [ended(capsys, 1, flags(model, data, output, chat_template_kwargs=kwargs))]
    for _, error in starts:
        assert "is no setting of the chat template of" in error
    assert not output.exists()


@pytest.mark.parametrize(
    ("template", "given", "reason"),
    [
        (QWEN3, {"enable_thinking": False}, "another prompt"),
        (QWEN3, {"enable_thinking": True}, "the default, spelled out"),
        (EFFORT, {"reasoning_effort": "medium"}, "the default, spelled out"),
        (CHOICE, {"reasoning_effort": "high"}, "another value would be an error"),
        (CHATML, None, "nothing"),
    ],
)
def test_a_setting_that_the_template_has_is_not_refused(template, given, reason, policy):
    tokenizer = load_tokenizer(str(policy))
    tokenizer.chat_template = template
    check_template_kwargs(tokenizer, given)


# ---- one text for training and evaluation

PARSED = {  # two digits from 10 on are a thought
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "reasoning_content": {"open_pattern": "[1-4]", "close_pattern": "[0-9]", "content": "text"},
        "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
    },
}


def test_an_evaluation_reads_the_text_that_the_rewards_read(policy, data, tmp_path, monkeypatch, capsys):
    """The response_template tells a thought from the content; the chat template is remarked on in the plan."""
    model, read = changed(policy, tmp_path / "model", QWEN3), []
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"response_template": PARSED}))

    def reward(prompts, completions, completion_ids, **kwargs):
        read.extend((p, ids, c[0]["content"]) for p, ids, c in zip(prompts, completion_ids, completions, strict=True))
        return [float(len(ids)) for ids in completion_ids]

    monkeypatch.setattr(rewards, "REWARD_FUNCS", [reward])
    train_grpo.main(flags(model, data, tmp_path / "run", max_steps="1", eval_steps="0"))
    assert "\n  template   enable_thinking is not set: " in capsys.readouterr().out
    tokenizer = load_tokenizer(str(tmp_path / "run"))
    assert tokenizer.response_template == PARSED, "it is saved, so that an evaluation reads the same"
    plain = [tokenizer.decode(ids, skip_special_tokens=True) for _, ids, _ in read]
    assert plain != [text for _, _, text in read]
    for prompt, ids, text in read:
        (asked,) = tokenizer.apply_chat_template([prompt], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert as_completion(tokenizer, asked, ids, False)["text"] == text
    prompts = [to_prompt("How many?")]
    (answer,) = complete(load_policy(str(model)), tokenizer, prompts, 12)
    tokenizer.response_template = None
    (whole,) = complete(load_policy(str(model)), tokenizer, prompts, 12)
    assert answer["text"] != whole["text"]


def test_what_such_a_template_takes_out_may_be_taught(policy):
    """The rewards do not see it."""
    tokenizer = load_tokenizer(str(policy))
    tokenizer.chat_template = QWEN3
    tokenizer.response_template = PARSED | {
        "fields": {
            "reasoning_content": {"open": "<think>", "close_pattern": r"</think>\s*", "content": "text"},
            "content": PARSED["fields"]["content"],
        }
    }
    cold_start.check_turn(to_prompt("How many?"), tokenizer, {})
    with pytest.raises(BadInput, match="never paid"):
        tokenizer.response_template = None
        cold_start.check_turn(to_prompt("How many?"), tokenizer, {})
