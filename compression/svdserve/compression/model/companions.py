"""What belongs to a model beside its weights: which files are downloaded and copied.

Tokenizer, chat templates, configurations and the terms of use. No weights, and code only where
config.json names it: it runs where the user trusts it, and without it the model could not be built.
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
# Files of a Hub model that svdserve reads, with code that the user may come to trust; in these
# patterns a star stands for slashes too.
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
    """Copy what belongs to the model in ``source``, whose entries have been checked, to ``target``.

    The copies can be written to, whatever the rights of the originals.
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
