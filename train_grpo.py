"""GRPO on GSM8K: teach a small instruct model to reason, with verifiable rewards, in one readable script.

    python train_grpo.py                                   # a CUDA GPU: Qwen2.5-1.5B-Instruct on GSM8K
    python train_grpo.py --demo                            # any machine, offline: the whole story in minutes
    python train_grpo.py --learning_rate 1e-6              # every TRL flag works; --help lists them

A step samples a group of G completions for each of a few prompts, scores them with the functions of rewards.py, and
raises the probability of the better ones. The objective is TRL's GRPOTrainer with its `dapo` loss: the advantage of a
completion is (reward - mean of its group) / std of its group, and token losses are averaged over all completion tokens
of the step rather than per completion, so that long completions are not discounted. A group that all earns the same
has no advantage, and teaches nothing. Each generation serves one update, so that the policy's ratio to the one that
sampled is 1 and PPO's clip never acts. There is no critic, and at BETA 0 no reference model.

A constant below is its flag in capitals: change LEARNING_RATE here, or say --learning_rate. Any other flag of TRL's
GRPOConfig and ModelConfig can be added here in the same way; one that is not here keeps TRL's default.
"""

from support import processes

if __name__ == "__main__":
    processes.end_at_once()  # on Ctrl-C, while what follows is imported

from support import demo
from support.cold_start import cold_start
from support.evaluation import held_out_problems
from support.faults import protected, supervised
from support.problems import drop_long, load_problems, load_tokenizer
from support.record import printable
from support.settings import Settings, read_settings

# ---- policy
MODEL_NAME_OR_PATH = "Qwen/Qwen2.5-1.5B-Instruct"  # on the Hub, or a folder; an instruct model, for its chat template
CHAT_TEMPLATE_KWARGS = {}  # Qwen3 needs {"enable_thinking": False}: the reasoning belongs in our tags

# ---- data
DATASET_NAME = "openai/gsm8k"  # on the Hub, or a folder with train.jsonl and test.jsonl
DATASET_CONFIG = "main"  # of a Hub dataset; a folder has none
MAX_PROMPT_LENGTH = 256  # tokens, chat template included; longer prompts are dropped, and counted aloud
ONE_SHOT = False  # True puts a worked example before every question; raise MAX_PROMPT_LENGTH to 400 with it

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
NUM_TRAIN_EPOCHS = 1  # over GSM8K's 7,473 problems: 1,868 steps
MAX_STEPS = -1  # optimizer steps; above 0 it overrides NUM_TRAIN_EPOCHS
SAVE_STEPS = 100  # between checkpoints, of a cold start too
SAVE_TOTAL_LIMIT = 2  # checkpoints kept, 18 GB each for 1.5B in fp32: the newest, and one in case that is damaged
LOGGING_STEPS = 1
SAMPLE_EVERY = 10  # steps between printed samples; 0 prints none
EVAL_STEPS = 100  # steps between greedy evaluations on held-out problems, from step 0 on; 0 turns them off
EVAL_PROBLEMS = 200  # of the test split, the same ones each time; 95% interval about +-6 points
LOG_COMPLETIONS = True  # every completion with its rewards, in OUTPUT_DIR/completions/*.parquet
NUM_COMPLETIONS_TO_PRINT = 0  # of TRL's own table; SAMPLE_EVERY is easier to read

# ---- groups
NUM_GENERATIONS = 16  # completions a prompt: the group that an advantage is relative to
MAX_COMPLETION_LENGTH = 512  # tokens; at the original's 200 many are cut before their answer, and earn nothing
TEMPERATURE = 0.9  # higher gives more varied groups; 0.7 to 1.0 is the useful range

# ---- batch
PER_DEVICE_TRAIN_BATCH_SIZE = 64  # completions a step, 4 prompts, generated all at once; several GPUs share them
GRADIENT_ACCUMULATION_STEPS = 1  # above 1: as many times the completions, generated all at once, a step
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
LORA_R = 32
LORA_TARGET_MODULES = ["all-linear"]  # all but the output's; attention alone learns less at any rank
LORA_DROPOUT = 0.0  # dropout would score completions by another policy than the one that sampled them
LORA_LEARNING_RATE_FACTOR = 10  # an adapter wants about ten times the full model's rate; a --learning_rate is kept

# ---- precision and speed
# What costs nothing in quality is on; benchmarks/README.md has what each was seen to be worth.
# TF32 is left alone: with bf16 compute no large product is in fp32.
LEAN_STEP = True  # as few passes as fit, without padding or completions of advantage 0; False: as TRL computes it
DTYPE = "float32"  # master weights: in bf16 most of a small update rounds away (benchmarks/precision.py)
BF16 = True  # compute in bf16
USE_VLLM = None  # None: vLLM in this process where it is installed and a GPU is there; True and False insist
VLLM_GPU_MEMORY_UTILIZATION = 0.3  # 24 GB of 80; 1.5B needs 3 for bf16 weights and 1.4 for 64 x 768 tokens
VLLM_ENABLE_SLEEP_MODE = False  # True frees that share during the update, for seconds a step: for a GPU too small

# ---- what Transformers would do otherwise
DDP_TIMEOUT = 7200  # seconds: processes wait for one that samples a cold start, or evaluates
DDP_FIND_UNUSED_PARAMETERS = False  # all are used, and looking for others costs a walk of the graph each pass
LOGGING_NAN_INF_FILTER = False  # it would replace a loss that is not a number by the average of those before


def load_samples(settings: Settings, tokenizer) -> tuple[list[dict], str | None]:
    """Training samples (`prompt`, `answer`, `rationale`) whose prompt fits, and the dataset's revision on the Hub."""
    from rewards import to_prompt

    name, split = settings.dataset_name, settings.dataset_train_split
    problems, revision = load_problems(name, settings.dataset_config, split)
    samples = [
        {
            "prompt": to_prompt(problem["question"], one_shot=settings.one_shot),  # system and user message
            "answer": problem["answer"],  # gold
            "rationale": problem["rationale"],  # for a cold start
        }
        for problem in problems
    ]
    kept = drop_long(samples, tokenizer, settings)
    print(
        f"{printable(name)}: {len(kept):,} problems to train on; {len(samples) - len(kept):,} dropped, the prompt over "
        f"MAX_PROMPT_LENGTH = {settings.max_prompt_length} tokens"
    )
    return kept, revision


def build_trainer(settings: Settings, tokenizer, samples: list[dict], held_out: list[dict], policy):
    """TRL's GRPOTrainer with the five rewards; support/lean_step.py cuts what teaches nothing from its step. `policy`
    is a name, a folder, or a model with a LoRA adapter on it."""
    from datasets import Dataset
    from transformers import PrinterCallback, ProgressCallback
    from trl import get_peft_config, get_quantization_config

    from rewards import REWARD_FUNCS
    from support.curves import Curves
    from support.held_out import HeldOut
    from support.progress import Progress
    from support.trainer import GRPOTrainer

    is_name = isinstance(policy, str)
    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=REWARD_FUNCS,
        args=settings,
        train_dataset=Dataset.from_list(samples).select_columns(["prompt", "answer"]),
        processing_class=tokenizer,
        quantization_config=get_quantization_config(settings) if is_name else None,
        peft_config=get_peft_config(settings) if is_name else None,
    )
    for printer in (PrinterCallback, ProgressCallback):  # Progress prints instead
        trainer.remove_callback(printer)
    trainer.add_callback(Progress(trainer, settings))
    trainer.add_callback(Curves(settings))
    if held_out:
        trainer.add_callback(HeldOut(trainer, tokenizer, settings, held_out))
    return trainer


def main(argv: list[str] | None = None) -> None:
    settings = read_settings(globals(), argv)  # constants, a --config file, flags; every problem at once
    with supervised(settings) as run:  # the folder's lock, run.json, and one message for whatever goes wrong
        if settings.demo:
            demo.prepare(settings)
        tokenizer = load_tokenizer(settings.model_name_or_path, settings.model_revision, settings.trust_remote_code)
        samples, revision = processes.on_main(load_samples, settings, tokenizer)
        run.knows(samples, revision)
        held_out = processes.on_main(held_out_problems, settings)  # none where EVAL_STEPS is 0
        policy, samples = cold_start(settings, tokenizer, samples, run)  # as they are where COLD_START_EXAMPLES is 0
        trainer = build_trainer(settings, tokenizer, samples, held_out, policy)
        with protected(trainer, run):  # whole checkpoints, clean stops, finite weights
            trainer.train(resume_from_checkpoint=settings.resume_from_checkpoint)
            trainer.save_model()
            trainer.save_state()  # the log, which curves.png draws
            trainer.create_model_card()  # README.md, the run's report
        print(f"saved: the trained policy, its tokenizer, curves.png and a report in {printable(settings.output_dir)}")
        if settings.demo:
            demo.tell(settings)
    print(f"next:  python evaluate.py {printable(settings.output_dir)}")


if __name__ == "__main__":
    main()
