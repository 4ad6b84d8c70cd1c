"""What a builder made of a graph, by its detailed log: layers, and proof that the costly ones are right.

TensorRT for RTX logs one list of layers for any number of cards, and compiles the kernels of products
("__myelin_CASK_STUB") on the card: what is proved are the data types of a product, and which nodes became one
attention kernel, not the kernel that a card picks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from asd_rt.errors import EngineError

# 8-bit types as a log calls them, by what QuantizeLinear makes.
EIGHT_BITS = ("Int8", "FP8")
_ATTENTION = re.compile(r"mha|fmha|flash|attention", re.IGNORECASE)
_ORIGIN = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_TYPE = re.compile(r"Datatype: ([^,}\s]+)")
_FIELDS = re.compile(
    r"Name: (?P<name>[^,]*), LayerType: (?P<type>[^,]*), Inputs: (?P<inputs>.*?)"
    r"(?:, Constants: (?P<constants>.*?))?, Outputs: (?P<outputs>.*), TacticName: (?P<tactic>[^,]*),"
    r".*?Metadata: (?P<origin>.*)",
)


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of a plan.

    Attributes:
        name: given by the builder.
        kind: "gemm", "kgen" (a generated kernel) and so on.
        inputs, constants, outputs: their data types as the builder calls them ("Half", "Int8").
        tactic: what computes it, "" where nothing does.
        origin: names of the ONNX nodes that it computes.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    outputs: tuple[str, ...]
    tactic: str
    origin: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As it stands in the log beside a plan; repeated types are named once."""
        return {
            "name": self.name,
            "type": self.kind,
            "precision": {
                side: sorted(set(getattr(self, side)))
                for side in ("inputs", "constants", "outputs")
            },
            "tactic": self.tactic,
            "origin": list(self.origin),
        }


def read_layers(messages: Iterable[str]) -> tuple[Layer, ...]:
    """Layers named in the messages of a detailed build log, in order; one message may list them all."""
    lines = (line for text in messages if "LayerType: " in text for line in text.splitlines())
    found = (_FIELDS.search(line) for line in lines)

    def types(match: re.Match[str], side: str) -> tuple[str, ...]:
        return tuple(_TYPE.findall(match[side] or ""))

    return tuple(
        Layer(
            match["name"].strip(),
            match["type"].strip(),
            types(match, "inputs"),
            types(match, "constants"),
            types(match, "outputs"),
            match["tactic"].strip(),
            tuple(_ORIGIN.findall(match["origin"])),
        )
        for match in found
        if match
    )


def attention_nodes(graph: onnx.GraphProto) -> list[str]:
    """Names of the attentions in a graph."""
    return [node.name for node in graph.node if node.op_type == "Attention"]


def quantized_nodes(graph: onnx.GraphProto) -> list[str]:
    """Names of the products in a graph both of whose factors come out of 8 bits."""
    made = {key: node.op_type for node in graph.node for key in node.output}
    return [
        node.name
        for node in graph.node
        if node.op_type in ("MatMul", "Gemm")
        and all(made.get(key) == "DequantizeLinear" for key in node.input[:2])
    ]


def check_layers(part: str, graph: onnx.GraphProto, layers: Sequence[Layer]) -> dict[str, int]:
    """Every attention is one fused kernel, every 8-bit product a product of 8-bit factors.

    Args:
        part: name of the part, for errors.
        graph: what the plan was compiled from.
        layers: of its log.

    Returns:
        how many there are of each.

    Raises:
        EngineError: one is not, or the log tells nothing of it; each is named.
    """
    attentions, products = attention_nodes(graph), quantized_nodes(graph)
    if (attentions or products) and not layers:
        raise EngineError(
            f"{part}: the builder logged no layers, so nothing proves that its {len(attentions)} attentions "
            f"and {len(products)} 8-bit products were kept; this version of TensorRT is not supported"
        )
    by_origin: dict[str, list[Layer]] = {}
    for layer in layers:
        for node in layer.origin:
            by_origin.setdefault(node, []).append(layer)
    _check(part, attentions, by_origin, _is_attention, "attentions were fused",
           "such an engine is slow; use --precision fp16 and heads of at most 256 channels")  # fmt: skip
    _check(part, products, by_origin, _is_product, "8-bit products compute in 8 bits",
           "such an engine is slower than an fp16 one; use --precision fp16")  # fmt: skip
    return {"fused_attentions": len(attentions), "eight_bit_products": len(products)}


def _is_attention(layer: Layer) -> bool:
    return _ATTENTION.search(layer.name) is not None


def _is_product(layer: Layer) -> bool:
    """Two factors of 8 bits, which no conversion before the product widens ("__myl_CastMulFc_...")."""
    factors = layer.inputs + layer.constants
    whole = layer.kind == "gemm" or layer.name.startswith("__myl_Fc")
    return whole and any(factors.count(kind) >= 2 for kind in EIGHT_BITS)


def _check(
    part: str,
    wanted: Sequence[str],
    by_origin: Mapping[str, Sequence[Layer]],
    good: Any,
    what: str,
    mend: str,
) -> None:
    missing = [node for node in wanted if not any(map(good, by_origin.get(node, ())))]
    if missing:
        raise EngineError(
            f"{part}: only {len(wanted) - len(missing)} of {len(wanted)} {what}, not "
            f"{', '.join(missing)}; {mend}"
        )
