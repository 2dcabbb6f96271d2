"""The files of a model besides its weights, which svdserve downloads and copies.

They are tokenizer, chat templates, configurations and terms of use. Python code is copied only if
config.json refers to it, because such a model cannot be built without it; the code runs only if the
user trusts it.
"""

import shutil
from fnmatch import fnmatchcase
from pathlib import Path

from svdserve.compression.format.untrusted import read_json

TEMPLATES = "additional_chat_templates"
_NAMES = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "*.tiktoken",
    "*.spm",
    "vocab*",
    "merges*",
    "tokenizer*",
    "spiece*",
    "sentencepiece*",
)
_TERMS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "COPYING*")
# Patterns of the files of a Hub model that svdserve downloads, including code that the user may
# trust later. In these patterns a star also matches slashes.
DOWNLOADED = (*_NAMES, *_TERMS, *(name.lower() for name in _TERMS), "README.md")
DOWNLOADED += ("*.safetensors", "*.py")
NOT_DOWNLOADED = (
    *(f"*/{name}" for name in (*_NAMES, "*.safetensors") if name != "*.jinja"),
    *("*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx"),
)
_CODE = (".py", ".pyc", ".so", ".sh")
_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".safetensors", ".gguf", ".onnx", ".h5", ".npz")
_OTHER_WEIGHTS = (".msgpack", ".npy", ".tflite", ".pb", ".index.json")


def copy_companions(source: Path, target: Path) -> None:
    """Copy the files besides the weights from ``source``, whose entries are checked, to ``target``.

    The copies are writable even if the originals are not.
    """
    found = [path for path in source.iterdir() if path.is_file() and _belongs(path.name)]
    found += (source / TEMPLATES).glob("*.jinja")
    if read_json(source / "config.json").get("auto_map"):
        found += source.glob("*.py")
    for path in found:
        copy = target / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)


def _belongs(name: str) -> bool:
    lower = name.lower()
    if lower.endswith((*_CODE, *_WEIGHTS, *_OTHER_WEIGHTS)):
        return False
    return any(fnmatchcase(lower, pattern.lower()) for pattern in (*_NAMES, *_TERMS))
