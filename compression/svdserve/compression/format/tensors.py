"""The safetensors of a model directory, whole or in parts, and the config.json beside them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from svdserve.compression.format.integrity import fingerprint
from svdserve.compression.format.untrusted import check_entries, read_json
from svdserve.compression.system.errors import UserError
from svdserve.compression.system.files import replacing

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_DIMENSIONS = (
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "vocab_size",
    "head_dim",
)
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_COUNTS = ("num_attention_heads", "num_key_value_heads", *_EXPERTS)
_MAX_EXPERTS = 1 << 16
_MAX_POSITIONS = 1 << 24  # bounds the rotary embedding's table, which no tensor's shape does


@dataclass(frozen=True)
class TensorInfo:
    """File, shape and dtype of one tensor, from the safetensors header."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * self.numel()


class TensorFiles:
    """The tensors of a model directory by name; the constructor reads headers only.

    Attributes:
        info: file, shape and dtype of each tensor.
        bytes_read: bytes of all tensors and blocks loaded so far.

    Raises:
        UserError: there are no safetensors, a header is broken, a tensor is stored twice, the index
            disagrees with the files, or an entry leads out of the directory.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.info: dict[str, TensorInfo] = {}
        self._prefix = ""
        self.bytes_read = 0
        check_entries(directory)
        weight_map = _weight_map(directory)
        for file in _files(directory, weight_map):
            try:
                file.open("rb").close()  # safetensors reports an unreadable file as missing
                with safe_open(file, framework="pt") as handle:
                    for name in handle.keys():  # noqa: SIM118 (no mapping)
                        piece = handle.get_slice(name)
                        dtype = _DTYPES.get(piece.get_dtype())
                        if dtype is None:
                            raise UserError(
                                f"{file}: {name} has dtype {piece.get_dtype()}; allowed: "
                                f"{', '.join(_DTYPES)}"
                            )
                        if name in self.info:
                            other = self.info[name].file.name
                            raise UserError(
                                f"{file}: {name} is stored in {other} as well; copy the model again"
                            )
                        self.info[name] = TensorInfo(file, tuple(piece.get_shape()), dtype)
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{file}: not a readable safetensors file ({error}); copy it again"
                ) from None
        if weight_map is not None:
            for name, target in weight_map.items():
                if name not in self.info or self.info[name].file.name != target:
                    raise UserError(
                        f"{directory / INDEX_FILE}: {name} is not in {target}; copy the model again"
                    )

    def __contains__(self, name: object) -> bool:
        return name in self.info

    def add_prefix(self, prefix: str) -> None:
        """Name every tensor ``prefix.NAME`` from now on; the files stay as they are."""
        self._prefix = f"{prefix}."
        self.info = {f"{self._prefix}{name}": info for name, info in self.info.items()}

    @property
    def paths(self) -> list[Path]:
        """The files, in order of their names."""
        return sorted({info.file for info in self.info.values()})

    @cached_property
    def fingerprint(self) -> str:
        """``integrity.fingerprint`` of config.json and the tensors, which identifies the model."""
        return fingerprint([self.directory / "config.json", *self.paths])

    def load(self, names: list[str], device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """The named tensors; each file is opened once."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.info[name].file, []).append(name)
        tensors: dict[str, Tensor] = {}
        for file, members in by_file.items():
            with safe_open(file, framework="pt", device=str(device)) as handle:
                for name in members:
                    tensors[name] = handle.get_tensor(name.removeprefix(self._prefix))
                    self.bytes_read += tensors[name].nbytes
        return tensors

    def block(self, name: str, rows: slice, columns: slice = slice(None)) -> Tensor:
        """The given rows, and for a matrix columns, of one tensor; reads nothing else."""
        index = (rows, columns) if len(self.info[name].shape) > 1 else rows
        # transformers calls this while its default device is meta.
        with safe_open(self.info[name].file, framework="pt") as handle, torch.device("cpu"):
            block = handle.get_slice(name.removeprefix(self._prefix))[index]
        assert isinstance(block, Tensor)
        self.bytes_read += block.nbytes
        return block


def _weight_map(directory: Path) -> dict[str, str] | None:
    path = directory / INDEX_FILE
    if not path.exists():
        return None
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in weight_map.values()
    ):
        raise UserError(f"{path}: weight_map must map tensor names to file names of this directory")
    return weight_map


def _files(directory: Path, weight_map: dict[str, str] | None) -> list[Path]:
    if weight_map is None:
        single = directory / SINGLE_FILE
        files = [single] if single.exists() else sorted(directory.glob("*.safetensors"))
        if not files:
            raise UserError(f"{directory}: no *.safetensors file; svdserve reads safetensors only")
        return files
    present = {file.name for file in directory.iterdir() if file.is_file()}
    for name in weight_map.values():
        if name not in present:
            raise UserError(f"{directory / INDEX_FILE}: {name} is missing; copy the model again")
    return [directory / name for name in sorted(set(weight_map.values()))]


def check_sizes(files: TensorFiles, config: dict[str, Any]) -> None:
    """Refuse a config.json that describes a larger model than the files hold.

    transformers and vLLM allocate the model that config.json describes before they read weights.

    Raises:
        UserError: a field is too large; the message names it and the largest allowed value.
    """
    tensors = len(files.info)
    largest = max((size for info in files.info.values() for size in info.shape), default=0)
    limits = dict.fromkeys(_DIMENSIONS, largest) | dict.fromkeys(_COUNTS, max(tensors, largest))
    limits |= {"num_hidden_layers": tensors, "max_position_embeddings": _MAX_POSITIONS}
    text = config.get("text_config")
    for part in (config, text) if isinstance(text, dict) else (config,):
        values = {key: part.get(key) for key in limits}
        if not any("expert" in name for name in files.info):
            # A dense model's configuration may have a number of experts, which nothing uses.
            limits |= dict.fromkeys(_EXPERTS, max(tensors, largest, _MAX_EXPERTS))
        heads, width = values["num_attention_heads"], values["head_dim"]
        if isinstance(heads, int) and isinstance(width, int):
            values["head_dim"] = heads * width
        for key, value in values.items():
            if isinstance(value, int | float) and not 0 <= value <= limits[key]:
                raise UserError(
                    f"{files.directory}/config.json: {key} makes {value}, but its tensors allow "
                    f"at most {limits[key]}; config.json does not belong to these weights"
                )


def check_finite_tensors(files: TensorFiles, notify: Callable[[int], None]) -> None:
    """Refuse a dense model with NaN or infinite weights; reads one tensor at a time.

    Args:
        notify: called with the bytes read so far.

    Raises:
        UserError: a weight is NaN or infinite; the message names the first such tensor.
    """
    done = 0
    for name, info in files.info.items():
        if info.dtype.is_floating_point and info.dtype.itemsize > 1 and info.nbytes:
            low, high = files.load([name])[name].aminmax()
            if not bool(low.isfinite() & high.isfinite()):
                raise UserError(
                    f"{name}: holds inf or nan; the model is damaged: copy it again, or repair the "
                    "weights"
                )
        done += info.nbytes
        notify(done)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file in one step."""
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
