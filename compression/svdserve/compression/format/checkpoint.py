"""Reading and checking the files of an svdserve checkpoint (see FORMAT.md).

A checkpoint is a Hugging Face directory whose config.json carries a ``quantization_config`` block
(schema.py) and whose safetensors hold ``<module>.factor_in``, ``<module>.factor_out`` and, for the
interpolative layout, ``<module>.pivots``; int8 matrices have their scales under ``<matrix>_scale``.
Everything else keeps its original name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from svdserve.compression.format.factors import Factors
from svdserve.compression.format.integrity import fingerprint
from svdserve.compression.format.schema import (
    CheckpointConfig,
    ModuleSpec,
    linears_of,
    parse_config,
)
from svdserve.compression.format.untrusted import check_entries
from svdserve.compression.format.untrusted import read_json as read_json
from svdserve.compression.pipeline.progress import read_log
from svdserve.compression.system.errors import UserError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
LOG_FILE = "svdserve_log.jsonl"
SCALE = "_scale"
SUFFIXES = (
    "factor_in",
    "factor_out",
    "pivots",
    "factor_in_scale",
    "factor_out_scale",
    "weight_scale",
)

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
FACTOR_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

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
_MAX_POSITIONS = 1 << 24  # of the rotary embedding's table; no tensor tells


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of one tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class TensorFiles:
    """The tensors of a model directory, by name; headers are read at once, data on demand.

    Attributes:
        info: what the headers say of each tensor.
        bytes_read: of tensors and blocks that were asked for so far.

    Raises:
        UserError: no safetensors, a broken header, a tensor that is stored twice, an index that
            disagrees with the files, or an entry that leads out of the directory.
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
                file.open("rb").close()  # safetensors calls a file missing that it may not read
                with safe_open(file, framework="pt") as handle:
                    for name in handle.keys():  # noqa: SIM118 (no mapping)
                        piece = handle.get_slice(name)
                        dtype = _DTYPES.get(piece.get_dtype())
                        if dtype is None:
                            raise UserError(f"{file}: {name} has dtype {piece.get_dtype()}")
                        if name in self.info:
                            other = self.info[name].file.name
                            raise UserError(f"{file}: {name} is stored in {other} as well")
                        self.info[name] = TensorInfo(file, tuple(piece.get_shape()), dtype)
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: not a readable safetensors file ({error})") from None
        if weight_map is not None:
            for name, target in weight_map.items():
                if name not in self.info or self.info[name].file.name != target:
                    raise UserError(f"{directory / INDEX_FILE}: {name} is not in {target}")

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
        """Of config.json and the tensors, as integrity.py takes it: which model this is."""
        return fingerprint([self.directory / "config.json", *self.paths])

    def load(self, names: list[str], device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """The named tensors, each file opened once."""
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
        """Rows of one tensor, and of a matrix the given columns; nothing else of it is read."""
        index = (rows, columns) if len(self.info[name].shape) > 1 else rows
        # Not where a caller makes its tensors: transformers loads inside the meta device.
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
            raise UserError(f"{directory / INDEX_FILE}: {name} is missing")
    return [directory / name for name in sorted(set(weight_map.values()))]


@dataclass(frozen=True)
class Checkpoint:
    """A checked svdserve directory: its configuration and the headers of its tensors."""

    directory: Path
    config: CheckpointConfig
    files: TensorFiles

    def factors(self, module: str) -> Factors:
        """The factors of one module."""
        suffixes = self.config.modules[module].tensors()
        tensors = self.files.load([f"{module}.{suffix}" for suffix in suffixes])
        return Factors(**{suffix: tensors[f"{module}.{suffix}"] for suffix in suffixes})

    def block(
        self,
        module: str,
        suffix: str,
        rows: slice = slice(None),
        columns: slice = slice(None),
    ) -> Tensor:
        """A block of one tensor of a module or of a dense linear, its values checked.

        Raises:
            UserError: a value is not finite, or a scale not positive.
        """
        tensor = self.files.block(f"{module}.{suffix}", rows, columns)
        if not tensor.is_floating_point() or not tensor.numel():
            return tensor
        where = f"{self.directory}: module {module}: {suffix}"
        low, high = tensor.aminmax()  # both are NaN if one value is; several times cheaper
        if not bool(low.isfinite() & high.isfinite()):
            raise UserError(f"{where} is not finite")
        if suffix.endswith(SCALE) and not bool(low > 0):
            raise UserError(f"{where} must be positive")
        return tensor

    def stored_bytes(self) -> dict[str, int]:
        """Bytes by kind: ``lowrank`` factors, ``dense`` rest, ``dense_equivalent`` of the whole.

        Scales count as bytes of what they scale. The dense equivalent is what the log says of the
        dense files. Without a log it counts each factored weight in the dtype of its factors, and
        what is int8 in the dtype of the model.
        """
        rows = [self.bytes_of(name) for name in self.config.modules]
        lowrank = sum(stored for stored, _ in rows)
        dense = sum(info.nbytes for info in self.files.info.values()) - lowrank
        rows += [self.bytes_of(name) for name in self.config.int8_linears]
        equivalent = self._dense_bytes.get("")
        if equivalent is None:
            equivalent = lowrank + dense + sum(whole - stored for stored, whole in rows)
        return {"lowrank": lowrank, "dense": dense, "dense_equivalent": equivalent}

    def bytes_of(self, name: str) -> tuple[int, int]:
        """Bytes of a module or a dense linear with its scales: stored, and were it dense."""
        spec = self.config.modules.get(name)
        if spec is None:
            weight = self.files.info[f"{name}.weight"]
            scale = self.files.info.get(f"{name}.weight{SCALE}")
            elements = torch.Size(weight.shape).numel()
            dtype, stored = weight.dtype, weight.nbytes + (scale.nbytes if scale else 0)
        else:
            tensors = [self.files.info[f"{name}.{suffix}"] for suffix in spec.tensors()]
            elements = spec.stacked * spec.in_features
            dtype, stored = tensors[0].dtype, sum(tensor.nbytes for tensor in tensors)
        linears = [name] if spec is None else linears_of(name, spec)
        logged = [self._dense_bytes.get(linear) for linear in linears]
        if all(logged):
            return stored, sum(filter(None, logged))
        dtype = self.model_dtype if dtype == torch.int8 else dtype
        return stored, elements * dtype.itemsize

    @cached_property
    def _dense_bytes(self) -> dict[str, int]:
        """Bytes of the dense model's linears by name, and of all its tensors under ''."""
        found: dict[str, int] = {}
        for event in read_log(self.directory / LOG_FILE):
            linears = event.get("linears")
            if event.get("event") == "dense" and isinstance(linears, dict):
                sizes = {"": event.get("nbytes"), **linears}
                found = {k: v for k, v in sizes.items() if isinstance(v, int) and v > 0}
        return found

    @cached_property
    def model_dtype(self) -> torch.dtype:
        """The floating dtype that config.json names; float32, as in transformers, if none."""
        config = read_json(self.directory / "config.json")
        known = {str(dtype).removeprefix("torch."): dtype for dtype in FACTOR_DTYPES}
        return known.get(str(config.get("dtype") or config.get("torch_dtype")), torch.float32)


def is_checkpoint(directory: Path) -> bool:
    """Whether config.json selects svdserve; says nothing about validity."""
    path = directory / "config.json"
    block = read_json(path).get("quantization_config") if path.exists() else None
    return isinstance(block, dict) and block.get("quant_method") == "svdserve"


def open_checkpoint(directory: Path) -> Checkpoint:
    """Check config.json and every safetensors header; reads the pivots, no other data.

    Raises:
        UserError: names the module and tensor that is missing, surplus, or of a wrong shape, dtype
            or value. Call ``check_finite`` for the values of factors and scales.
    """
    whole = read_json(directory / "config.json")
    block = whole.get("quantization_config")
    if not isinstance(block, dict):
        raise UserError(f"{directory}/config.json: no quantization_config; not a svdserve model")
    config = parse_config(block, f"{directory}/config.json")
    files = TensorFiles(directory)
    _check_no_others(files)
    check_sizes(files, whole)
    expected: set[str] = set()
    for name, spec in config.modules.items():
        expected |= _check_module(files, name, spec)
    for name in config.int8_linears:
        expected |= _check_int8_linear(files, name)
    for name in files.info:
        module, _, suffix = name.rpartition(".")
        if suffix in SUFFIXES and name not in expected:
            raise UserError(f"{directory}: {name} belongs to no module of config.json ({module})")
    return Checkpoint(directory, config, files)


def _check_no_others(files: TensorFiles) -> None:
    """vLLM reads every safetensors file where there is no index, transformers the single one."""
    directory, known = files.directory, set(files.paths)
    if not (directory / INDEX_FILE).exists() and known != {directory / SINGLE_FILE}:
        raise UserError(f"{directory}: has neither {SINGLE_FILE} nor {INDEX_FILE}")
    for file in sorted(directory.glob("*.safetensors")):
        if file not in known:
            raise UserError(f"{file}: does not belong to the checkpoint; remove it")


def check_sizes(files: TensorFiles, config: dict[str, Any]) -> None:
    """Refuse a config.json of a model that is larger than what the files hold.

    transformers and vLLM build the model that config.json describes before they look at weights.

    Raises:
        UserError: names the field, and the largest value that the tensors allow.
    """
    tensors = len(files.info)
    largest = max((size for info in files.info.values() for size in info.shape), default=0)
    limits = dict.fromkeys(_DIMENSIONS, largest) | dict.fromkeys(_COUNTS, max(tensors, largest))
    limits |= {"num_hidden_layers": tensors, "max_position_embeddings": _MAX_POSITIONS}
    text = config.get("text_config")
    for part in (config, text) if isinstance(text, dict) else (config,):
        values = {key: part.get(key) for key in limits}
        if not any("expert" in name for name in files.info):
            # Configurations of dense models have a number of experts that nobody reads.
            limits |= dict.fromkeys(_EXPERTS, max(tensors, largest, _MAX_EXPERTS))
        heads, width = values["num_attention_heads"], values["head_dim"]
        if isinstance(heads, int) and isinstance(width, int):
            values["head_dim"] = heads * width
        for key, value in values.items():
            if isinstance(value, int | float) and not 0 <= value <= limits[key]:
                raise UserError(
                    f"{files.directory}/config.json: {key} makes {value}, and its tensors allow "
                    f"at most {limits[key]}; config.json does not belong to these weights"
                )


def _check_module(files: TensorFiles, name: str, spec: ModuleSpec) -> set[str]:
    where = f"{files.directory}: module {name}"
    for suffix, shape in spec.tensors().items():
        tensor = f"{name}.{suffix}"
        info = files.info.get(tensor)
        if info is None:
            raise UserError(f"{where}: tensor {tensor} is missing")
        if info.shape != shape:
            raise UserError(f"{where}: {suffix} is {list(info.shape)}, expected {list(shape)}")
        allowed = _allowed(suffix, spec)
        if info.dtype not in allowed:
            raise UserError(f"{where}: {suffix} is {info.dtype}, allowed: {list(allowed)}")
    if files.info[f"{name}.factor_in"].dtype != files.info[f"{name}.factor_out"].dtype:
        raise UserError(f"{where}: factor_in and factor_out differ in dtype")
    for linear in linears_of(name, spec):
        if f"{linear}.weight" in files:
            raise UserError(f"{where}: dense weight {linear}.weight is stored as well")
    if spec.layout == "interpolative":
        pivots = files.load([f"{name}.pivots"])[f"{name}.pivots"]
        if int(pivots.min()) < 0 or int(pivots.max()) >= spec.in_features:
            raise UserError(f"{where}: pivots must lie in 0..{spec.in_features - 1}")
        if len(set(pivots.tolist())) != spec.rank:
            raise UserError(f"{where}: pivots are repeated")
    return {f"{name}.{suffix}" for suffix in spec.tensors()}


def _allowed(suffix: str, spec: ModuleSpec) -> tuple[torch.dtype, ...]:
    """The dtypes of a factored module's tensor."""
    if suffix == "pivots":
        return (torch.int32,)
    if suffix.endswith(SCALE):
        return (torch.float32,)
    return FACTOR_DTYPES if spec.weights == "float" else (torch.int8,)


def _check_int8_linear(files: TensorFiles, name: str) -> set[str]:
    where, weight = f"{files.directory}: int8 linear {name}", f"{name}.weight"
    scale = f"{weight}{SCALE}"
    for tensor, dtype in ((weight, torch.int8), (scale, torch.float32)):
        info = files.info.get(tensor)
        if info is None:
            raise UserError(f"{where}: tensor {tensor} is missing")
        if info.dtype != dtype:
            raise UserError(f"{where}: {tensor} is {info.dtype}, allowed: {[dtype]}")
    shape, rows = files.info[weight].shape, files.info[scale].shape
    if len(shape) != 2 or rows != shape[:1]:
        raise UserError(f"{where}: weight is {list(shape)} and its scale {list(rows)}")
    return {weight, scale}


def check_finite_tensors(files: TensorFiles, notify: Callable[[int], None]) -> None:
    """Refuse a dense model with NaN or infinite weights; one tensor is in memory at a time.

    ``notify`` gets the bytes that are read.

    Raises:
        UserError: names the first such tensor.
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


def check_finite(checkpoint: Checkpoint) -> None:
    """Refuse NaN and infinite factors, and scales that are not positive; one tensor at a time.

    Raises:
        UserError: names the first module with such a value.
    """
    config = checkpoint.config
    tensors = [(name, suffix) for name, spec in config.modules.items() for suffix in spec.tensors()]
    tensors += [(name, f"weight{SCALE}") for name in config.int8_linears]
    for name, suffix in tensors:
        checkpoint.block(name, suffix)
