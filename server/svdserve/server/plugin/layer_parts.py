"""How the checkpoint stores each layer of vLLM: in one part or several.

A vLLM layer may merge several linears of the checkpoint (``qkv_proj``, ``gate_up_proj``). Some of
them may belong to factored modules, and others be stored whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from svdserve.compression.format.codecs import FLOAT, Codec, get_codec
from svdserve.compression.format.reader import WEIGHT
from svdserve.compression.format.schema import CheckpointConfig, ModuleSpec, linears_of

# The linears that vLLM merges, for about 30 of its model files without packed_modules_mapping.
_MERGED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


@dataclass(frozen=True)
class LayerPart:
    """Consecutive outputs of a vLLM layer that one weight of the checkpoint produces.

    Attributes:
        names: in the checkpoint: of one factored module, or of adjacent linears stored whole.
        spec: of the factored module; None for linears stored whole.
        codec: of the weight's matrices.
    """

    names: tuple[str, ...]
    spec: ModuleSpec | None
    codec: Codec = FLOAT

    @property
    def outputs(self) -> int:
        """How many of the layer's logical outputs (``output_partition_sizes``) it covers."""
        return len(self.names) if self.spec is None else len(self.spec.members)

    @property
    def linears(self) -> list[str]:
        """Full names, in the checkpoint, of the linears that it covers."""
        return list(self.names) if self.spec is None else linears_of(self.names[0], self.spec)

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The last parts of the names of its tensors in the checkpoint."""
        if self.spec is not None:
            return tuple(self.spec.tensors())
        return tuple(f"{WEIGHT}{suffix}" for suffix in self.codec.suffixes)


def layer_parts(
    checkpoint: CheckpointConfig,
    names: Mapping[str, str],
    prefix: str,
    packed: Mapping[str, Sequence[str]],
) -> tuple[LayerPart, ...]:
    """The parts of the vLLM layer ``prefix`` in the order of its outputs.

    Args:
        checkpoint: says which modules are factored and which linears are encoded.
        names: vLLM's names of modules and encoded linears, mapped to the checkpoint's names.
        prefix: the layer's name in vLLM.
        packed: the linears that each merged layer of the model holds, by the last part of the
            layer's name.

    Returns:
        The parts; empty if the whole layer is dense in the model's dtype.
    """

    def listed_part(module: str) -> LayerPart:
        name = names[module]
        spec = checkpoint.modules.get(name)
        codec = (spec or checkpoint.linears[name]).codec
        return LayerPart((name,), spec, get_codec(codec))

    if prefix in names:
        return (listed_part(prefix),)
    parent, _, last = prefix.rpartition(".")
    members = packed.get(last) or _MERGED.get(last, ())
    linears = [f"{parent}.{member}" if parent else member for member in members]
    listed = [linear for linear in linears if linear in names]
    if not listed:
        return ()
    checkpoint_parent = names[listed[0]].rpartition(".")[0]
    parts: list[LayerPart] = []
    for member, linear in zip(members, linears, strict=True):
        name = f"{checkpoint_parent}.{member}" if checkpoint_parent else member
        part = listed_part(linear) if linear in names else LayerPart((name,), None)
        before = parts[-1] if parts else None
        if before and before.spec is part.spec is None and before.codec is part.codec:
            # One product serves adjacent linears that are stored alike.
            parts[-1] = replace(before, names=(*before.names, *part.names))
        else:
            parts.append(part)
    return tuple(parts)
