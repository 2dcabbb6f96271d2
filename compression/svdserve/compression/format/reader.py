"""Reading and checking an svdserve checkpoint (FORMAT.md).

A checkpoint is a Hugging Face directory whose config.json carries a ``quantization_config`` block
(schema.py). Its safetensors hold the tensors of every module under names ``<module>.<suffix>``; the
layout and the codec of the module define the suffixes. All other tensors keep their names.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from svdserve.compression.format.codecs import CODECS, get_codec
from svdserve.compression.format.codecs.base import FLOAT_DTYPES, decoded
from svdserve.compression.format.layouts import LAYOUTS, get_layout
from svdserve.compression.format.log import LOG_FILE, read_log
from svdserve.compression.format.schema import (
    CheckpointConfig,
    LinearSpec,
    ModuleSpec,
    linears_of,
    parse_config,
)
from svdserve.compression.format.stored import StoredFactors
from svdserve.compression.format.tensors import INDEX_FILE, SINGLE_FILE, TensorFiles, check_sizes
from svdserve.compression.format.untrusted import read_json
from svdserve.compression.system.errors import UserError

WEIGHT = "weight"
"""Suffix of a linear's weight; a codec adds its own suffixes to it."""


@dataclass(frozen=True)
class Checkpoint:
    """A validated checkpoint: its configuration and the headers of its tensors."""

    directory: Path
    config: CheckpointConfig
    files: TensorFiles

    def factors(self, module: str) -> StoredFactors:
        """The tensors of one module."""
        spec = self.config.modules[module]
        suffixes = spec.tensors()
        tensors = self.files.load([f"{module}.{suffix}" for suffix in suffixes])
        return StoredFactors(
            *spec.layout_and_codec(), {suffix: tensors[f"{module}.{suffix}"] for suffix in suffixes}
        )

    def weight(self, linear: str, dtype: torch.dtype) -> Tensor:
        """The weight [m, n] of a linear that is not factored, in ``dtype``."""
        spec = self.config.linears.get(linear, LinearSpec())
        names = [f"{linear}.{suffix}" for suffix in linear_tensors(spec)]
        return decoded(get_codec(spec.codec), f"{linear}.{WEIGHT}", self.files.load(names), dtype)

    def block(
        self,
        module: str,
        suffix: str,
        rows: slice = slice(None),
        columns: slice = slice(None),
    ) -> Tensor:
        """Rows and columns of one tensor of a module or of a linear, with checked values.

        Raises:
            UserError: a value is not finite, or the codec never writes such a value.
        """
        tensor = self.files.block(f"{module}.{suffix}", rows, columns)
        if not tensor.is_floating_point() or not tensor.numel():
            return tensor
        where = f"{self.directory}: module {module}: {suffix}"
        # Several times cheaper than isfinite().all(); both are NaN if any value is.
        low, high = tensor.aminmax()
        if not bool(low.isfinite() & high.isfinite()):
            raise UserError(f"{where} is not finite; copy or compress the checkpoint again")
        spec = self.config.modules.get(module) or self.config.linears.get(module)
        if spec is not None and (own := _encoded_suffixes(spec).get(suffix)) is not None:
            try:
                get_codec(spec.codec).check(own, tensor)
            except ValueError as error:
                raise UserError(f"{where} {error}") from None
        return tensor

    def stored_bytes(self) -> dict[str, int]:
        """Bytes of the factors (``lowrank``), of the rest (``dense``) and of the dense model.

        Tensors that a codec adds to a matrix, such as scales, count as bytes of the matrix. The
        size of the dense model, ``dense_equivalent``, comes from the log. Without a log, a factored
        weight counts in the dtype of its factors, and an encoded one in the dtype of the model.
        """
        rows = [self.bytes_of(name) for name in self.config.modules]
        lowrank = sum(stored for stored, _ in rows)
        dense = sum(info.nbytes for info in self.files.info.values()) - lowrank
        rows += [self.bytes_of(name) for name in self.config.encoded_linears]
        equivalent = self._dense_bytes.get("")
        if equivalent is None:
            equivalent = lowrank + dense + sum(whole - stored for stored, whole in rows)
        return {"lowrank": lowrank, "dense": dense, "dense_equivalent": equivalent}

    def bytes_of(self, name: str) -> tuple[int, int]:
        """Bytes of a module or of an unfactored linear: as stored, and in the dense model."""
        module = self.config.modules.get(name)
        spec = module or self.config.linears.get(name, LinearSpec())
        suffixes = list(module.tensors() if module else linear_tensors(spec))
        tensors = [self.files.info[f"{name}.{suffix}"] for suffix in suffixes]
        stored = sum(tensor.nbytes for tensor in tensors)
        linears = [name] if module is None else linears_of(name, module)
        logged = [self._dense_bytes.get(linear) for linear in linears]
        if all(logged):
            return stored, sum(filter(None, logged))
        elements = module.stacked * module.in_features if module else tensors[0].numel()
        dtype = tensors[0].dtype if get_codec(spec.codec).plain else self.model_dtype
        return stored, elements * dtype.itemsize

    @cached_property
    def _dense_bytes(self) -> dict[str, int]:
        """From the log: bytes of the dense model's linears by name, and of all tensors under ''."""
        found: dict[str, int] = {}
        for event in read_log(self.directory / LOG_FILE):
            linears = event.get("linears")
            if event.get("event") == "dense" and isinstance(linears, dict):
                sizes = {"": event.get("nbytes"), **linears}
                found = {k: v for k, v in sizes.items() if isinstance(v, int) and v > 0}
        return found

    @cached_property
    def model_dtype(self) -> torch.dtype:
        """The dtype that config.json names; float32, transformers' default, if it names none."""
        config = read_json(self.directory / "config.json")
        known = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}
        return known.get(str(config.get("dtype") or config.get("torch_dtype")), torch.float32)


def is_checkpoint(directory: Path) -> bool:
    """Whether config.json names svdserve as its quantization method; checks nothing else."""
    path = directory / "config.json"
    block = read_json(path).get("quantization_config") if path.exists() else None
    return isinstance(block, dict) and block.get("quant_method") == "svdserve"


def open_checkpoint(directory: Path) -> Checkpoint:
    """Open a checkpoint and check its config.json, safetensors headers and indices.

    The values of the matrices are not read; ``check_finite`` checks them.

    Raises:
        UserError: config.json is malformed, or a tensor is missing, surplus, or of a wrong shape,
            dtype or value; the message names the module and the tensor.
    """
    whole = read_json(directory / "config.json")
    block = whole.get("quantization_config")
    if not isinstance(block, dict):
        raise UserError(
            f"{directory}/config.json: has no quantization_config, so this is no svdserve "
            "checkpoint; compress the model with `svdserve compress` first"
        )
    config = parse_config(block, f"{directory}/config.json")
    files = TensorFiles(directory)
    _check_no_others(files)
    check_sizes(files, whole)
    expected: set[str] = set()
    for name, spec in config.modules.items():
        expected |= _check_module(files, name, spec)
    for name, linear in config.linears.items():
        expected |= _check_linear(files, name, linear)
    known = _known_suffixes()
    for name in files.info:
        module, _, suffix = name.rpartition(".")
        if suffix in known and name not in expected:
            raise UserError(f"{directory}: {name} belongs to no module of config.json ({module})")
    return Checkpoint(directory, config, files)


def linear_tensors(spec: LinearSpec) -> list[str]:
    """Suffixes of the tensors of an unfactored linear's weight."""
    return [f"{WEIGHT}{suffix}" for suffix in get_codec(spec.codec).suffixes]


def _encoded_suffixes(spec: LinearSpec) -> dict[str, str]:
    """The codec's part of each suffix of the encoded matrices of a module or a linear."""
    codec = get_codec(spec.codec)
    layout = get_layout(spec.layout) if isinstance(spec, ModuleSpec) else None
    matrices = (WEIGHT,) if layout is None else layout.matrices
    return {f"{matrix}{own}": own for matrix in matrices for own in codec.suffixes}


def _known_suffixes() -> set[str]:
    """Suffixes that occur only in tensor names that svdserve writes."""
    found = {name for layout in LAYOUTS.values() for name in layout.indices}
    matrices = {name for layout in LAYOUTS.values() for name in layout.matrices} | {WEIGHT}
    for codec in CODECS.values():
        found |= {f"{matrix}{suffix}" for matrix in matrices for suffix in codec.suffixes}
    return found - {WEIGHT}


def _check_no_others(files: TensorFiles) -> None:
    """Refuse safetensors files that do not belong to the checkpoint.

    Without an index, vLLM reads every safetensors file, but transformers only model.safetensors.
    """
    directory, known = files.directory, set(files.paths)
    if not (directory / INDEX_FILE).exists() and known != {directory / SINGLE_FILE}:
        raise UserError(
            f"{directory}: has neither {SINGLE_FILE} nor {INDEX_FILE}; copy the whole checkpoint"
        )
    for file in sorted(directory.glob("*.safetensors")):
        if file not in known:
            raise UserError(f"{file}: does not belong to the checkpoint; remove it")


def _check_module(files: TensorFiles, name: str, spec: ModuleSpec) -> set[str]:
    where = f"{files.directory}: module {name}"
    layout, codec = spec.layout_and_codec()
    encoded = _encoded_suffixes(spec)
    for suffix, shape in spec.tensors().items():
        allowed = codec.dtypes(encoded[suffix]) if suffix in encoded else (torch.int32,)
        _check_tensor(files, name, suffix, shape, allowed, where)
    if len({files.info[f"{name}.{matrix}"].dtype for matrix in layout.matrices}) > 1:
        raise UserError(f"{where}: {' and '.join(layout.matrices)} differ in dtype")
    for linear in linears_of(name, spec):
        if f"{linear}.{WEIGHT}" in files:
            raise UserError(f"{where}: dense weight {linear}.{WEIGHT} is stored as well")
    indices = files.load([f"{name}.{suffix}" for suffix in layout.indices])
    try:
        found = {suffix: indices[f"{name}.{suffix}"] for suffix in layout.indices}
        layout.check_indices(found, spec.in_features)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    return {f"{name}.{suffix}" for suffix in spec.tensors()}


def _check_linear(files: TensorFiles, name: str, spec: LinearSpec) -> set[str]:
    """Check the tensors of an unfactored linear; its weight's header defines the shape."""
    codec, weight = get_codec(spec.codec), f"{name}.{WEIGHT}"
    where = f"{files.directory}: {spec.codec} linear {name}"
    if weight not in files:
        raise UserError(f"{where}: tensor {weight} is missing")
    shape = files.info[weight].shape
    if not codec.plain:
        if len(shape) != 2:
            raise UserError(f"{where}: {WEIGHT} is {list(shape)}, expected two axes")
        for suffix, size in codec.shapes(shape).items():
            allowed = codec.dtypes(suffix)
            _check_tensor(files, name, f"{WEIGHT}{suffix}", size, allowed, where)
    return {f"{name}.{suffix}" for suffix in linear_tensors(spec)}


def _check_tensor(
    files: TensorFiles,
    name: str,
    suffix: str,
    shape: tuple[int, ...],
    allowed: tuple[torch.dtype, ...],
    where: str,
) -> None:
    info = files.info.get(f"{name}.{suffix}")
    if info is None:
        raise UserError(f"{where}: tensor {name}.{suffix} is missing")
    if info.shape != shape:
        raise UserError(f"{where}: {suffix} is {list(info.shape)}, expected {list(shape)}")
    if info.dtype not in allowed:
        raise UserError(f"{where}: {suffix} is {info.dtype}, allowed: {list(allowed)}")


def check_finite(checkpoint: Checkpoint) -> None:
    """Refuse matrices with NaN or infinite values, or with values that their codec never writes.

    Reads one tensor at a time.

    Raises:
        UserError: a matrix has such a value; the message names the first module.
    """
    config = checkpoint.config
    tensors = [(name, suffix) for name, spec in config.modules.items() for suffix in spec.tensors()]
    for name, spec in config.encoded_linears.items():
        tensors += [(name, suffix) for suffix in linear_tensors(spec)]
    for name, suffix in tensors:
        checkpoint.block(name, suffix)
