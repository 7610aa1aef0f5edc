"""GRPO on GSM8K: teach a small instruct model to reason, with verifiable rewards, in one readable script.

    python train_grpo.py                                   # a CUDA GPU: Qwen2.5-1.5B-Instruct on GSM8K
    python train_grpo.py --demo                            # any machine, offline: the whole story in minutes
    python train_grpo.py --learning_rate 1e-6 --use_peft   # every TRL flag works; --help lists them

A step samples a group of G completions for each of a few prompts, scores them with the functions of rewards.py, and
raises the probability of the better ones. The objective is TRL's GRPOTrainer with its `dapo` loss: the advantage of a
completion is (reward - mean of its group) / std of its group, and token losses are averaged over all completion tokens
of the step rather than per completion, so that long completions are not discounted. There is no critic, and at BETA 0
no reference model.

Change the constants below, or override any of them on the command line.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from trl import GRPOConfig, ModelConfig, TrlParser
from yaml import YAMLError

import demo
import processes
from gsm8k import BadInput, expand
from processes import on_main
from record import printable, read_run
from safeguards import (
    RunStopped,
    check_disk,
    check_memory,
    check_problems,
    faults_explained,
    find_checkpoint,
    find_problems,
    finish,
    finite,
    is_finished,
    locked,
    protect,
    save_policy,
    say_what_differs,
    vllm_obstacle,
)

# ---- policy
MODEL = "Qwen/Qwen2.5-1.5B-Instruct"  # name on the Hub or local folder; an instruct model, for its chat template
CHAT_TEMPLATE_KWARGS = {}  # Qwen3 needs {"enable_thinking": False}: the reasoning belongs in our tags

# ---- data
DATASET = "openai/gsm8k"  # name on the Hub, or a folder with train.jsonl and test.jsonl
DATASET_CONFIG = "main"  # of a Hub dataset; a folder has none
MAX_PROMPT_LENGTH = 256  # tokens, chat template included; longer prompts are dropped, and counted aloud

ONE_SHOT = False  # True puts one worked example before the question, in training and evaluation: the cheapest cure

# ---- cold start: supervised fine-tuning before GRPO, for a model that never writes the format
COLD_START_EXAMPLES = 0  # problems shown with a solution in the format; 0 turns the stage off, 64 to 512 are plenty
COLD_START_SOURCE = "dataset"  # its own rationales; or "self": the model's right and well-formatted one-shot answers
COLD_START_REUSE = False  # whether GRPO sees those problems again
COLD_START_LEARNING_RATE = 1e-5
COLD_START_EPOCHS = 2
COLD_START_BATCH_SIZE = 16  # examples a step

# ---- run
OUTPUT_DIR = "outputs/Qwen2.5-1.5B-GRPO"
SEED = 42
EPOCHS = 1  # over GSM8K's 7,473 problems: 1,868 steps
MAX_STEPS = -1  # optimizer steps; above 0 it overrides EPOCHS
SAVE_STEPS = 100
SAVE_TOTAL_LIMIT = 2  # checkpoints kept, 18 GB each for 1.5B in fp32: the newest, and one in case that is damaged
LOGGING_STEPS = 1
SAMPLE_EVERY = 10  # steps between printed samples; 0 prints none
EVAL_STEPS = 100  # steps between greedy evaluations on held-out problems, from step 0 on; 0 turns them off
EVAL_PROBLEMS = 200  # of the test split, the same ones each time; 95% interval about +-6 points

# ---- groups
NUM_GENERATIONS = 16  # completions a prompt: the group that an advantage is relative to
MAX_COMPLETION_LENGTH = (
    512  # tokens; at the original's 200 many are cut before their answer, and a cut one earns nothing
)
TEMPERATURE = 0.9  # higher gives more varied groups; 0.7 to 1.0 is the useful range

# ---- batch
PER_DEVICE_BATCH_SIZE = 16  # completions a forward and backward pass; TRL counts completions, not prompts
GRADIENT_ACCUMULATION_STEPS = 4  # passes a step: 16 x 4 = 64 completions, 4 prompts, generated all at once
FIT_MEMORY = True  # where 16 do not fit by computation, more and smaller passes: the step stays 64 completions, aloud
GRADIENT_CHECKPOINTING = None  # recompute activations in the backward pass; None: only where they do not fit otherwise

# ---- optimizer
LEARNING_RATE = 5e-6
ADAM_BETA1 = 0.9
ADAM_BETA2 = 0.99
WEIGHT_DECAY = 0.1
LR_SCHEDULE = "cosine"
WARMUP = 0.1  # share of all steps
MAX_GRAD_NORM = 0.1
BETA = 0.0  # weight of the KL to the initial policy; above 0 loads that reference model too

# ---- LoRA, with --use_peft true
LORA_RANK = 32
LORA_TARGETS = ["all-linear"]  # every linear layer but the output's; attention alone learns less at any rank
LORA_DROPOUT = 0.0  # dropout would score completions by another policy than the one that sampled them
LORA_LEARNING_RATE_FACTOR = 10  # an adapter wants about ten times the full model's rate; a --learning_rate is kept
QLORA_DTYPE = "bfloat16"  # with --load_in_4bit true: of what is not quantized; frozen, so that nothing rounds away

# ---- precision and speed
# What costs nothing in quality is on. A step of the demo on two CPU cores takes so many times as long without it
# (benchmarks/step_time.py; a GPU is not measured yet): one generation a step 1.14, no reference model 1.22, no
# recomputation 1.27, and of Transformers' defaults SDPA attention 1.04 and AdamW in one kernel 1.03. TF32 is left
# alone: with bf16 compute no large product is in fp32.
DTYPE = "float32"  # master weights: in bf16 most of a small update rounds away (benchmarks/precision.py)
BF16 = True  # compute in bf16
USE_VLLM = None  # None: vLLM in this process where it is installed and a GPU is there; True and False insist
VLLM_MEMORY_SHARE = 0.3  # of the GPU, for vLLM: 24 GB of 80; 1.5B needs 3 for bf16 weights and 1.4 for 64 x 768 tokens
VLLM_SLEEP = False  # True frees that share during the update, for seconds a step: for a GPU that is too small without

DEFAULTS = {  # the constants under TRL's names for them, which are the flags
    "model_name_or_path": MODEL,
    "chat_template_kwargs": CHAT_TEMPLATE_KWARGS,
    "dataset_name": DATASET,
    "dataset_config": DATASET_CONFIG,
    "max_prompt_length": MAX_PROMPT_LENGTH,
    "one_shot": ONE_SHOT,
    "cold_start_examples": COLD_START_EXAMPLES,
    "cold_start_source": COLD_START_SOURCE,
    "cold_start_reuse": COLD_START_REUSE,
    "cold_start_learning_rate": COLD_START_LEARNING_RATE,
    "cold_start_epochs": COLD_START_EPOCHS,
    "cold_start_batch_size": COLD_START_BATCH_SIZE,
    "output_dir": OUTPUT_DIR,
    "seed": SEED,
    "num_train_epochs": EPOCHS,
    "max_steps": MAX_STEPS,
    "save_steps": SAVE_STEPS,
    "save_total_limit": SAVE_TOTAL_LIMIT,
    "logging_steps": LOGGING_STEPS,
    "sample_every": SAMPLE_EVERY,
    "eval_steps": EVAL_STEPS,
    "eval_problems": EVAL_PROBLEMS,
    "num_generations": NUM_GENERATIONS,
    "max_completion_length": MAX_COMPLETION_LENGTH,
    "temperature": TEMPERATURE,
    "per_device_train_batch_size": PER_DEVICE_BATCH_SIZE,
    "gradient_accumulation_steps": GRADIENT_ACCUMULATION_STEPS,
    "fit_memory": FIT_MEMORY,
    "gradient_checkpointing": GRADIENT_CHECKPOINTING,
    "learning_rate": LEARNING_RATE,
    "adam_beta1": ADAM_BETA1,
    "adam_beta2": ADAM_BETA2,
    "weight_decay": WEIGHT_DECAY,
    "lr_scheduler_type": LR_SCHEDULE,
    "warmup_steps": WARMUP,
    "max_grad_norm": MAX_GRAD_NORM,
    "beta": BETA,
    "lora_r": LORA_RANK,
    "lora_target_modules": LORA_TARGETS,
    "lora_dropout": LORA_DROPOUT,
    "dtype": None,  # DTYPE, or QLORA_DTYPE
    "bf16": BF16,
    "use_vllm": USE_VLLM,
    "vllm_gpu_memory_utilization": VLLM_MEMORY_SHARE,
    "vllm_enable_sleep_mode": VLLM_SLEEP,
    "log_completions": True,  # writes OUTPUT_DIR/completions/*.parquet
    "num_completions_to_print": 0,  # and prints none of it: SAMPLE_EVERY does, readably
    "ddp_timeout": 7200,  # seconds: processes wait for one that samples a cold start, or evaluates
    "ddp_find_unused_parameters": False,  # all are used, and looking for others costs a walk of the graph each pass
    "logging_nan_inf_filter": False,  # which would replace a loss that is not a number by the average of those before
}


@dataclass
class RecipeConfig:
    """The recipe's own flags, beside those of TRL's GRPOConfig and ModelConfig."""

    dataset_name: str = field(
        default=DATASET, metadata={"help": "Hub name, or folder with train.jsonl and test.jsonl."}
    )
    dataset_config: str | None = field(default=DATASET_CONFIG, metadata={"help": "Configuration of a Hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split that evaluate.py measures on."})
    max_prompt_length: int = field(default=MAX_PROMPT_LENGTH, metadata={"help": "Longer prompts are dropped (tokens)."})
    one_shot: bool = field(default=ONE_SHOT, metadata={"help": "Put a worked example before every question."})
    cold_start_examples: int = field(
        default=COLD_START_EXAMPLES, metadata={"help": "Solved problems to fine-tune on before GRPO; 0: none."}
    )
    cold_start_source: str = field(
        default=COLD_START_SOURCE, metadata={"help": "'dataset', or 'self': the model's own right answers."}
    )
    cold_start_reuse: bool = field(default=COLD_START_REUSE, metadata={"help": "GRPO sees those problems again."})
    cold_start_learning_rate: float = field(default=COLD_START_LEARNING_RATE, metadata={"help": "Of that stage."})
    cold_start_epochs: int = field(default=COLD_START_EPOCHS, metadata={"help": "Of that stage."})
    cold_start_batch_size: int = field(default=COLD_START_BATCH_SIZE, metadata={"help": "Examples a step."})
    fit_memory: bool = field(default=FIT_MEMORY, metadata={"help": "Smaller passes where they do not fit otherwise."})
    sample_every: int = field(default=SAMPLE_EVERY, metadata={"help": "Steps between printed samples; 0: none."})
    eval_problems: int = field(default=EVAL_PROBLEMS, metadata={"help": "Test problems that eval_steps measures on."})
    allow_changed_settings: bool = field(
        default=False, metadata={"help": "Resume although settings that shape the trajectory differ from the run's."}
    )
    demo: bool = field(default=False, metadata={"help": "A tiny policy on made-up sums: any machine, offline."})


# ---- settings


class RecipeParser(TrlParser):
    """TrlParser that reports every problem at once, before any config object exists to stop at its first one."""

    def __init__(self, is_demo: bool):
        super().__init__(
            (RecipeConfig, GRPOConfig, ModelConfig),
            usage="python train_grpo.py [--demo] [--config FILE.yaml] [--FLAG VALUE ...]",
            description=__doc__.partition("\n")[0],
            allow_abbrev=False,
        )
        self.is_demo = is_demo
        defaults = {**DEFAULTS, **(demo.settings() if is_demo else {})}
        self.rates = {name: defaults.pop(name) for name in ("learning_rate", "cold_start_learning_rate")}
        self.set_defaults(**defaults, **dict.fromkeys(self.rates))  # None: not given, which depends on --use_peft
        lora = [action.dest for action in self._actions if action.dest.startswith("lora_")]
        self.lora = {name: self.get_default(name) for name in lora}

    def parse_known_args(self, args=None, namespace=None):
        flags, unknown = super().parse_known_args(args, namespace)
        if flags.demo != self.is_demo:
            self.error("the demo is asked for by a bare `--demo` on the command line, without true or false")
        for name in ("model_name_or_path", "dataset_name", "output_dir", "resume_from_checkpoint"):
            setattr(flags, name, expand(getattr(flags, name) or ""))
        flags.resume_from_checkpoint = flags.resume_from_checkpoint or None
        for name, rate in self.rates.items():
            if getattr(flags, name) is None:
                setattr(flags, name, rate * LORA_LEARNING_RATE_FACTOR if flags.use_peft else rate)
        if flags.dtype is None:
            flags.dtype = QLORA_DTYPE if flags.load_in_4bit else DTYPE
        if flags.use_vllm is None and flags.vllm_mode == "server":
            flags.use_vllm = True
        problems = [f"unknown flag or stray value {word!r}; --help lists all flags" for word in unknown]
        for name in self.lora if not flags.use_peft else ():
            if getattr(flags, name) != self.lora[name]:
                problems.append(f"--{name} has no effect without --use_peft true")
        problems += find_problems(flags) if processes.is_main() else []
        if problems:
            listed = "".join(f"  - {printable(problem)}\n" for problem in problems)
            self.exit(2, f"train_grpo.py cannot start:\n{listed}")
        for name in ("gradient_accumulation_steps", "steps_per_generation"):  # all processes together make one step
            if getattr(flags, name) is not None:
                setattr(flags, name, getattr(flags, name) // processes.count())
        if flags.demo:
            demo.name_sources(flags)
        if flags.use_vllm is None:
            flags.use_vllm = vllm_obstacle(flags.use_cpu) is None and not flags.load_in_4bit
        return flags, unknown

    def exit(self, status=0, message=None):
        processes.linger()
        super().exit(status, message if processes.is_main() else None)

    def error(self, message):
        self.exit(2, f"train_grpo.py: {message}\n{self.usage}\n")


def read_settings(argv: list[str] | None = None) -> tuple[RecipeConfig, GRPOConfig, ModelConfig]:
    """Constants, overridden by a --config file, overridden by flags. Exits with status 2 and every problem found."""
    argv = sys.argv[1:] if argv is None else argv
    parser = RecipeParser(is_demo="--demo" in argv)
    try:
        recipe, config, model_config = parser.parse_args_and_config(argv)
    except (ValueError, OSError, IndexError, YAMLError) as error:  # TRL's objections; no or no readable --config file
        parser.error(str(error))
    if config.use_vllm and config.vllm_mode == "colocate" and config.vllm_max_model_length is None:
        # vLLM would reserve cache for the model's whole context, 32,768 tokens for Qwen2.5
        config.vllm_max_model_length = recipe.max_prompt_length + config.max_completion_length
    if config.device.type == "cpu":
        # of several processes it is "cpu:0", to which torch cannot load an optimizer's state
        config._setup_devices = type(config.device)("cpu")
    config.model_init_kwargs = {
        "revision": model_config.model_revision,
        "dtype": model_config.dtype,
        "attn_implementation": model_config.attn_implementation,
        "use_safetensors": True,  # other formats are pickles, which run code when they are loaded
        **(config.model_init_kwargs or {}),
    }
    return recipe, config, model_config


def describe(recipe: RecipeConfig, config: GRPOConfig, model_config: ModelConfig) -> dict:
    """Every setting as used, for run.json."""
    from rewards import SYSTEM_PROMPT

    settings = {**vars(recipe), **vars(model_config), **config.to_dict()}
    return {"settings": settings, "system_prompt": SYSTEM_PROMPT}


def fit_memory(recipe: RecipeConfig, config: GRPOConfig, model_config: ModelConfig) -> None:
    """Settle gradient checkpointing and the completions a pass by computed memory."""
    from memory import device_memory, fit, shape

    name, batch = model_config.model_name_or_path, config.per_device_train_batch_size
    try:
        model = shape(config, model_config)
    except (OSError, ValueError) as error:
        raise BadInput(
            f"model {name!r} cannot be loaded ({str(error).strip()}). Use a local folder (--model_name_or_path "
            "FOLDER), or set HF_ENDPOINT to a mirror"
        ) from error
    if processes.is_sharded():  # needs less than is computed here, by how much depends on the sharding
        config.gradient_checkpointing = config.gradient_checkpointing is not False
        return
    total = min(processes.gathered(device_memory(config.device)))
    fit(model, config, recipe.max_prompt_length, total, model_config.load_in_4bit, smaller=recipe.fit_memory)
    if config.per_device_train_batch_size < batch:
        print(
            f"PER_DEVICE_BATCH_SIZE {batch} -> {config.per_device_train_batch_size} by computed memory, with "
            f"GRADIENT_ACCUMULATION_STEPS {config.gradient_accumulation_steps}: the step stays the same. "
            "--fit_memory false insists"
        )


# ---- the method


def load_samples(recipe: RecipeConfig, config: GRPOConfig, tokenizer) -> tuple[list[dict], str | None]:
    """Training samples (`prompt`, `answer`, `rationale`) whose prompt fits, and the dataset's revision on the Hub."""
    from gsm8k import drop_long, load_problems, to_samples

    problems, revision = load_problems(recipe.dataset_name, recipe.dataset_config, recipe.dataset_train_split)
    samples = to_samples(problems, recipe.one_shot)
    kept = drop_long(samples, tokenizer, recipe.max_prompt_length, config.chat_template_kwargs or {})
    print(
        f"{printable(recipe.dataset_name)}: {len(kept):,} problems to train on; {len(samples) - len(kept):,} dropped, "
        f"the prompt over MAX_PROMPT_LENGTH = {recipe.max_prompt_length} tokens"
    )
    prompts_at_once = config.generation_batch_size // config.num_generations
    if len(kept) < prompts_at_once:
        raise BadInput(
            f"{len(kept)} problems are fewer than the {prompts_at_once} prompts that are generated at once: raise "
            f"MAX_PROMPT_LENGTH ({recipe.max_prompt_length}) or take more data"
        )
    return kept, revision


def cold_start(recipe: RecipeConfig, config: GRPOConfig, model_config: ModelConfig, tokenizer, samples, facts: dict):
    """The policy after a short supervised stage, as `build_trainer` takes it, and the samples left for GRPO."""
    from cold_start import load_adapter, prepare

    folder, left = prepare(recipe, config, model_config, tokenizer, samples, facts)
    return (load_adapter(folder, config, model_config) if model_config.use_peft else str(folder)), left


def build_trainer(recipe: RecipeConfig, config: GRPOConfig, model_config: ModelConfig, tokenizer, samples, policy):
    """TRL's GRPOTrainer with the five rewards. `policy` is a name, a folder, or a model with a LoRA adapter on it."""
    from datasets import Dataset
    from transformers import PrinterCallback, ProgressCallback
    from trl import GRPOTrainer, get_peft_config, get_quantization_config

    from cold_start import keep_in_fp32
    from curves import curves_callback
    from record import progress_callback
    from rewards import REWARD_FUNCS

    name = policy
    if not isinstance(policy, str):
        name, config.model_init_kwargs = f"{model_config.model_name_or_path} with the cold start's adapter", None
    try:
        trainer = GRPOTrainer(
            model=policy,
            reward_funcs=[finite(reward_func) for reward_func in REWARD_FUNCS],
            args=config,
            train_dataset=Dataset.from_list(samples).select_columns(["prompt", "answer"]),
            processing_class=tokenizer,
            quantization_config=get_quantization_config(model_config) if isinstance(policy, str) else None,
            peft_config=get_peft_config(model_config) if isinstance(policy, str) else None,
        )
    # no safetensors, a setting that TRL refuses, a package that is not installed
    except (OSError, ValueError, ImportError) as error:
        raise BadInput(f"the trainer cannot be built for model {name!r}: {str(error).strip()}") from error
    if model_config.load_in_4bit:
        keep_in_fp32(trainer.model)
    if not config.use_vllm and not processes.is_sharded():
        # keeps the bf16 copies of the weights for a whole generation; Transformers makes them anew for every token
        trainer._generate_single_turn = trainer.accelerator.autocast()(trainer._generate_single_turn)
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    merging = "merging an adapter into 4-bit weights for it at every step would wear them away"
    chosen = merging if model_config.load_in_4bit else "USE_VLLM is False"
    about = {"model": name, "why_not_vllm": vllm_obstacle(config.use_cpu) or chosen}
    about["prompt_length"] = recipe.max_prompt_length
    trainer.add_callback(progress_callback(trainer, recipe.sample_every, **about))
    trainer.add_callback(curves_callback(config.output_dir))
    return trainer


def train(recipe: RecipeConfig, config: GRPOConfig, model_config: ModelConfig) -> None:
    """Train from the first sample to the saved policy; OUTPUT_DIR/run.json says what ran and how it ended."""
    from evaluate import held_out_callback, held_out_sample
    from gsm8k import load_tokenizer
    from record import closing_remarks, device_name, fingerprint, recorded

    folder, checkpoint = Path(config.output_dir), config.resume_from_checkpoint
    tokenizer = load_tokenizer(model_config.model_name_or_path, model_config.model_revision, config.trust_remote_code)
    fit_memory(recipe, config, model_config)
    if checkpoint:
        say_what_differs(checkpoint, config)
    samples, dataset_revision = on_main(load_samples, recipe, config, tokenizer)
    if not recipe.allow_changed_settings and (checkpoint or (folder / "run.json").is_file()):
        on_main(check_problems, checkpoint or folder, fingerprint(samples))
    task = held_out_task(recipe, config)
    held_out = on_main(held_out_sample, task, recipe.eval_problems) if config.eval_steps else []
    facts = {
        **describe(recipe, config, model_config),
        "dataset_revision": dataset_revision,
        "problems": len(samples),
        "problems_sha256": fingerprint(samples),
        "device": device_name(config.device),
    }
    policy = model_config.model_name_or_path
    if recipe.cold_start_examples:
        policy, samples = cold_start(recipe, config, model_config, tokenizer, samples, facts)
    trainer = build_trainer(recipe, config, model_config, tokenizer, samples, policy)
    facts["model_revision"] = getattr(trainer.model.config, "_commit_hash", None)
    guard = protect(trainer)  # from now on a signal, a full disk or a NaN ends the run with what was good in place
    if held_out:
        trainer.add_callback(held_out_callback(trainer, tokenizer, task, held_out, every=int(config.eval_steps)))
    if checkpoint and is_finished(checkpoint, trainer):
        print(f"{folder}: already complete, {checkpoint} is its last step")
        if read_run(folder).get("outcome") != "finished":
            with recorded(folder, **facts):
                on_main(finish, Path(checkpoint), folder)
        return
    check_disk(trainer)
    if config.device.type == "cuda" and not processes.is_sharded():
        check_memory(trainer, recipe.max_prompt_length)
    with recorded(folder, **facts), guard.listening():
        trainer.train(resume_from_checkpoint=checkpoint)
        guard.end()
        save_policy(trainer)
        trainer.save_state()  # with the log that curves.py draws
    for remark in closing_remarks(trainer.state.log_history):
        print(f"WARNING: {remark}")
    print(f"saved: the trained policy, its tokenizer and curves.png in {printable(config.output_dir)}")


def held_out_task(recipe: RecipeConfig, config: GRPOConfig):
    """What the policy is measured on: the test split, under the limits that it is trained with."""
    from evaluate import Task

    return Task(
        recipe.dataset_name,
        recipe.dataset_config,
        recipe.dataset_test_split,
        config.max_completion_length,
        config.chat_template_kwargs or {},
        recipe.one_shot,
    )


def measure(policy: str, recipe: RecipeConfig, config: GRPOConfig, name: str) -> dict:
    """Greedy accuracy of a policy on the whole test split, also written to OUTPUT_DIR/`name`.json."""
    import json

    from evaluate import evaluate
    from record import write_whole

    print(f"{name.replace('_', ' ')}: greedy decoding on held-out problems")
    report, _ = evaluate(policy, held_out_task(recipe, config), use_vllm=config.use_vllm, use_cpu=config.use_cpu)
    write_whole(Path(config.output_dir) / f"{name}.json", json.dumps(report, indent=2) + "\n")
    return report


def main(argv: list[str] | None = None) -> None:
    processes.hush_others()
    recipe, config, model_config = read_settings(argv)
    resumes = config.resume_from_checkpoint is not None
    try:
        with locked(config.output_dir), faults_explained(config):
            if resumes:
                description, insist = describe(recipe, config, model_config), recipe.allow_changed_settings
                config.resume_from_checkpoint = on_main(find_checkpoint, config, description, insist)
            if recipe.demo:
                demo.prepare(config.output_dir, config.seed, config.use_cpu, fresh=not resumes)
                before = measure(model_config.model_name_or_path, recipe, config, "evaluation_before")
            train(recipe, config, model_config)
            if recipe.demo:
                from evaluate import table

                after = measure(config.output_dir, recipe, config, "evaluation_after")
                print(table({"before GRPO": before, "after GRPO": after}))
    except BadInput as error:
        processes.linger()
        sys.exit(f"train_grpo.py: {printable(str(error))}")
    except RunStopped as stop:
        processes.linger()
        if processes.is_main() or stop.outcome != "stopped":  # all stop on a signal, one says so
            print(f"train_grpo.py: {printable(str(stop))}", file=sys.stderr)
        sys.exit(stop.status)
    except KeyboardInterrupt:
        print(f"\ntrain_grpo.py: interrupted; what was saved is in {config.output_dir}", file=sys.stderr)
        sys.exit(130)
    processes.part()
    print(f"next:  python evaluate.py {printable(config.output_dir)}")


if __name__ == "__main__":
    main()
