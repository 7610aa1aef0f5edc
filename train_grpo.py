"""GRPO on GSM8K: teach a small instruct model to reason, with verifiable rewards, in one readable script.

    python train_grpo.py                                      # a CUDA GPU: Qwen2.5-1.5B-Instruct on GSM8K
    python train_grpo.py --learning_rate 1e-6                 # TRL's flags work; --help lists them
    python train_grpo.py --model_name_or_path outputs/cold    # what cold_start.py left
    python demo.py                                            # any machine, offline: the whole story in minutes

A step samples a group of G completions for each of a few prompts, scores them with the functions of rewards.py, and
raises the probability of the better ones. The objective is TRL's GRPOTrainer with its `dapo` loss: the advantage of a
completion is (reward - mean of its group) / std of its group, and token losses are averaged over all completion tokens
of the step rather than per completion, so that long completions are not discounted. A group whose completions all
earn the same has advantage 0, and teaches nothing. Each generation serves one update, so that the policy's ratio to
the one that sampled is 1 and PPO's clip never acts. There is no critic, and at BETA 0 no reference model.

A constant below is its flag in capitals: change LEARNING_RATE here, or say --learning_rate. Any other flag of TRL's
GRPOConfig and ModelConfig can be added here in the same way; one that is not here keeps TRL's default.
"""

from support import processes

if __name__ == "__main__":
    processes.end_at_once()  # on Ctrl-C, while what follows is imported

import random

from datasets import Dataset
from trl import get_peft_config, get_quantization_config

import rewards
from support import faults, memory
from support.errors import BadInput
from support.faults import watched
from support.problems import drop_long, load_problems, load_tokenizer, shown_to
from support.record import printable
from support.settings import read_settings
from support.trainer import GRPOTrainer

# ---- policy
MODEL_NAME_OR_PATH = "Qwen/Qwen2.5-1.5B-Instruct"  # on the Hub, or a folder; an instruct model, for its chat template
CHAT_TEMPLATE_KWARGS = {}  # Qwen3 needs {"enable_thinking": False}: the reasoning belongs in our tags
SYSTEM_PROMPT_IN_QUESTION = False  # True for a chat template that takes no system prompt, such as Gemma 2's

# ---- data
DATASET_NAME = "openai/gsm8k"  # on the Hub, a folder with train.jsonl and test.jsonl, or other files (docs)
DATASET_CONFIG = "main"  # of a dataset that has several
QUESTION_COLUMN = "question"
ANSWER_COLUMN = "answer"  # a number, or a rationale and "#### number"
DROP_NON_NUMERIC = False  # True drops rows whose answer is no number, and counts them; False refuses the data
MAX_PROMPT_LENGTH = 256  # tokens, chat template included; longer prompts are dropped, and counted
ONE_SHOT = False  # True puts a worked example before every question; raise MAX_PROMPT_LENGTH to 400 with it
REUSE_SHOWN = False  # True trains on the problems that a cold start has shown to the model, too

# ---- run
OUTPUT_DIR = None  # None: outputs/<the model's name>-GRPO
SEED = 42
NUM_TRAIN_EPOCHS = 1  # over GSM8K's 7,473 problems: 1,868 steps
MAX_STEPS = -1  # optimizer steps; above 0 it overrides NUM_TRAIN_EPOCHS
SAVE_STEPS = 100  # between checkpoints
SAVE_TOTAL_LIMIT = 2  # checkpoints kept, 18 GB each for 1.5B in fp32: the newest, and one more in case it is damaged
LOGGING_STEPS = 1
SAMPLE_EVERY = 10  # steps between printed samples; 0 prints none
EVAL_STEPS = 100  # steps between greedy evaluations on held-out problems, from step 0 on; 0 turns them off
EVAL_PROBLEMS = 200  # of the test split, the same ones each time; 95% interval about +-6 points
LOG_COMPLETIONS = True  # every completion with its rewards, in OUTPUT_DIR/completions/*.parquet

# ---- groups
NUM_GENERATIONS = 16  # completions a prompt: the group that an advantage is relative to
MAX_COMPLETION_LENGTH = 512  # tokens; at the original's 200 many are truncated before their answer, and earn nothing
TEMPERATURE = 0.9  # higher gives more varied groups; 0.7 to 1.0 is the useful range

# ---- batch
PER_DEVICE_TRAIN_BATCH_SIZE = 64  # completions a step (4 prompts), generated at once; divided among the GPUs
GRADIENT_ACCUMULATION_STEPS = 1  # above 1 multiplies the completions of a step; all are still generated at once
TOKENS_PER_PASS = None  # a step is split into passes of at most so many; None: what fits and keeps a GPU busy
GRADIENT_CHECKPOINTING = None  # recompute activations in backward; None: only where fewer than 2,048 tokens fit without

# ---- optimizer
LEARNING_RATE = 5e-6
ADAM_BETA1 = 0.9
ADAM_BETA2 = 0.99
WEIGHT_DECAY = 0.1
LR_SCHEDULER_TYPE = "cosine"
WARMUP_STEPS = 0.1  # share of all steps
MAX_GRAD_NORM = 0.1
BETA = 0.0  # weight of the KL to the initial policy; above 0 loads that reference model too

# ---- LoRA, with --use_peft true
ADAPTER = None  # of a MODEL_NAME_OR_PATH that is an adapter: "train" it further, or "merge" it into its model first
LORA_R = 32
LORA_TARGET_MODULES = ["all-linear"]  # every linear layer but the output layer; attention alone learns less at any rank
LORA_DROPOUT = 0.0  # dropout would score completions by another policy than the one that sampled them
LORA_LEARNING_RATE_FACTOR = 10  # LoRA wants about 10x the full model's rate; a given --learning_rate is not multiplied

# ---- precision and speed
# What costs nothing in quality is on; benchmarks/README.md has what each was seen to be worth.
# TF32 is left alone: with bf16 compute no large product is in fp32.
LEAN_STEP = True  # as few passes as fit, without padding or completions of advantage 0; False: as TRL computes it
DTYPE = "float32"  # master weights: in bf16 most of a small update rounds away (benchmarks/precision.py)
BF16 = True  # compute in bf16
USE_VLLM = None  # None: vLLM in this process where it is installed and a GPU is there; True and False insist
VLLM_GPU_MEMORY_UTILIZATION = 0.3  # 24 GB of 80; 1.5B needs 3 for bf16 weights and 1.4 for 64 x 768 tokens
VLLM_ENABLE_SLEEP_MODE = False  # True frees that share during the update, which takes time; for a small GPU


def to_prompt(question: str, settings) -> list[dict]:
    """System and user message, as the settings want them; what the policy answers."""
    return rewards.to_prompt(question, one_shot=settings.one_shot, in_question=settings.system_prompt_in_question)


def load_samples(settings, tokenizer) -> tuple[list[dict], str | None]:
    """Training samples whose prompt fits, and the dataset's revision on the Hub. A sample is its `prompt`, and what
    reward functions get beside completions: `question`, `answer` (gold), `rationale`, the data's other columns."""
    name, (problems, revision) = settings.dataset_name, load_problems(settings, settings.dataset_train_split)
    columns = set().union(*problems)  # not every row may have each
    if taken := columns & {*faults.REWARD_ARGUMENTS, "prompt", "completion", "image", "images"}:
        print(printable(f"{name}: columns that rewards do not get, as TRL uses the names: {', '.join(sorted(taken))}"))
    samples = [
        {
            **{column: problem.get(column) for column in sorted(columns - taken)},
            "prompt": to_prompt(problem["question"], settings),
        }
        for problem in problems
    ]
    kept = drop_long(samples, tokenizer, settings)
    print(
        f"{printable(name)}: {len(kept):,} problems to train on; {len(samples) - len(kept):,} dropped, the prompt over "
        f"MAX_PROMPT_LENGTH = {settings.max_prompt_length} tokens"
    )
    left, at_once = without_shown(kept, settings), settings.generation_batch_size // settings.num_generations
    if len(left) < at_once:
        raise BadInput(
            f"{len(left)} problems are fewer than the {at_once} prompts that are generated at once: raise "
            f"MAX_PROMPT_LENGTH ({settings.max_prompt_length}), take more data, or say --reuse_shown true"
        )
    return left, revision


def without_shown(samples: list[dict], settings) -> list[dict]:
    """The samples without those that a cold start has shown to the model, which it may know by heart."""
    shown = shown_to(settings.model_name_or_path)
    left = [sample for sample in samples if rewards.question_of(sample["prompt"]) not in shown]
    if len(left) == len(samples):
        return samples
    them = f"{len(samples) - len(left):,} of them were shown in the model's cold start"
    if settings.reuse_shown:
        print(f"{them}, and stay, as REUSE_SHOWN says")
        return samples
    print(f"{them} and are left out, the other {len(left):,} stay")
    return left


def held_out_problems(settings, tokenizer) -> list[dict]:
    """EVAL_PROBLEMS of the test split whose prompt fits, the same ones every time; none where EVAL_STEPS is 0."""
    if not settings.eval_steps:
        return []
    try:
        problems, _ = load_problems(settings, settings.dataset_test_split)
    except BadInput as error:
        raise BadInput(f"{error} (EVAL_STEPS = 0 trains without a test split)") from error
    samples = [{**each, "prompt": to_prompt(each["question"], settings)} for each in problems]
    kept = drop_long(samples, tokenizer, settings)
    print(f"held out: {len(kept):,} problems; {len(samples) - len(kept):,} dropped, the prompt over MAX_PROMPT_LENGTH")
    return random.Random(0).sample(kept, min(settings.eval_problems, len(kept)))


def build_trainer(settings, tokenizer, samples: list[dict], held_out: list[dict], run) -> GRPOTrainer:
    """TRL's GRPOTrainer with the five rewards. What support/trainer.py adds to it: steps that compute only what has a
    gradient, whole checkpoints, clean stops, printed lines."""
    return GRPOTrainer(
        model=settings.model_name_or_path,
        reward_funcs=rewards.REWARD_FUNCS,
        args=settings,
        train_dataset=Dataset.from_list(samples, on_mixed_types="use_json"),  # a column may hold text and numbers
        processing_class=tokenizer,
        quantization_config=get_quantization_config(settings),
        peft_config=get_peft_config(settings),
        held_out=held_out,
        run=run,
    )


def main(argv: list[str] | None = None) -> None:
    settings = read_settings(globals(), argv)  # constants, a --config file, flags; every error at once
    with watched(settings, memory.remedies) as run:  # the folder's lock, run.json, one message for whatever goes wrong
        tokenizer = load_tokenizer(settings.model_name_or_path, settings.model_revision, settings.trust_remote_code)
        samples, revision = processes.on_main(load_samples, settings, tokenizer)
        run.knows(samples, revision)
        held_out = processes.on_main(held_out_problems, settings, tokenizer)  # none where EVAL_STEPS is 0
        trainer = build_trainer(settings, tokenizer, samples, held_out, run)
        trainer.train(resume_from_checkpoint=settings.resume_from_checkpoint)
        trainer.save_model()
        trainer.save_state()  # the log, which curves.png draws
        trainer.create_model_card()  # README.md, the run's report
        print(f"saved: the trained policy, its tokenizer, curves.png and a report in {printable(settings.output_dir)}")
    print(f"next:  python evaluate.py {printable(settings.output_dir)}")


if __name__ == "__main__":
    main()
