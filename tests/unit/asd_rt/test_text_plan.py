"""A UMT5 text encoder that is a plan: the engine runs it on the card, once a prompt."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from asd_rt.backends import device
from asd_rt.backends.tensorrt import open_engine
from asd_rt.errors import BackendError, EngineError
from asd_rt.manifest import Part, TensorSpec, is_text_plan, late_parts, sha256_file
from asd_rt.session import Session
from asd_rt.text_encoder import TextEncoder
from tests.unit.asd_rt.fake_card import PASSES, FakeCuda, as_plan

Machine = Callable[..., FakeCuda]
TABLE = np.random.default_rng(3).standard_normal((256, 3)).astype(np.float32)


def text_part(file: Path) -> Part:
    """tokens, mask -> rows of TABLE, zero where the mask is."""
    ids = {name: TensorSpec("int64", ("B", "L")) for name in ("tokens", "mask")}
    context = {"context": TensorSpec("float32", ("B", "L", 3))}
    nodes = [
        helper.make_node("Gather", ["table", "tokens"], ["rows"]),
        helper.make_node("Cast", ["mask"], ["ones"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["ones", "last"], ["seen"]),
        helper.make_node("Mul", ["rows", "seen"], ["context"]),
    ]
    graph = helper.make_graph(
        nodes,
        "text",
        [helper.make_tensor_value_info(n, TensorProto.INT64, s.shape) for n, s in ids.items()],
        [helper.make_tensor_value_info("context", TensorProto.FLOAT, ["B", "L", 3])],
        [
            numpy_helper.from_array(TABLE, "table"),
            numpy_helper.from_array(np.array([2]), "last"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, file)
    return Part(file.name, sha256_file(file), file.stat().st_size, ids, context)


@pytest.fixture
def talking(own_toy: Any, tokenizer_json: Path) -> tuple[Path, Any]:
    """A plan with a UMT5 text encoder that is a plan as well."""
    folder = own_toy.path.parent
    shutil.copy(tokenizer_json, folder / "toy.tokenizer.json")
    content = (folder / "toy.tokenizer.json").read_bytes()
    parts = {
        **own_toy.manifest.parts,
        "text": text_part(folder / "toy.text.plan"),
        "tokenizer": Part("toy.tokenizer.json", hashlib.sha256(content).hexdigest(), len(content)),
    }
    tokenizer = {"kind": "umt5", "max_tokens": 4}
    return own_toy.path, as_plan(replace(own_toy.manifest, parts=parts, tokenizer=tokenizer))


def test_a_plan_has_its_weights_inside(talking: tuple[Path, Any]) -> None:
    _, manifest = talking
    assert is_text_plan(manifest) and late_parts(manifest) == ("text", "tokenizer")
    graph = replace(manifest.parts["text"], file="toy.text.onnx")
    with pytest.raises(EngineError, match="missing text_weights"):
        replace(manifest, parts={**manifest.parts, "text": graph})


def test_the_card_reads_a_prompt_once(talking: tuple[Path, Any], machine: Machine) -> None:
    path, manifest = talking
    runtime = machine()
    session = Session(open_engine(path, manifest))
    found = session.context("a cat walks on the grass")
    tokens = TextEncoder(path, manifest).tokens("a cat walks on the grass")
    np.testing.assert_array_equal(found, TABLE[tokens])
    runs = [call for call in runtime.calls if call[0] == "run" and "context" in call[3]]
    assert [call[1] for call in runs] == [PASSES]
    np.testing.assert_array_equal(session.context("a cat walks on the grass"), found)  # remembered
    assert len([c for c in runtime.calls if c[0] == "run" and "context" in c[3]]) == 1
    session.close()
    assert runtime.nothing_is_left()


def test_a_large_one_leaves_the_card_again(
    talking: tuple[Path, Any], machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, manifest = talking
    runtime = machine()
    monkeypatch.setattr(device, "RELEASE_BYTES", 100)
    session = Session(open_engine(path, manifest))
    before = len(runtime.memory)
    for prompt in ("the red balloon", "flies over Paris"):  # loaded anew for each
        assert session.context(prompt).shape[2] == 3
        assert len(runtime.memory) == before
    session.close()
    assert runtime.nothing_is_left()


def test_a_damaged_plan_is_one_line(talking: tuple[Path, Any], machine: Machine) -> None:
    path, manifest = talking
    machine()
    file = path.parent / "toy.text.plan"
    file.write_bytes(file.read_bytes()[:-1])
    session = Session(open_engine(path, manifest))  # which needs it for prompts alone
    with pytest.raises(EngineError, match=r"toy\.text\.plan: damaged text part") as caught:
        session.context("grass, realistic")
    assert "\n" not in str(caught.value) and "--text-encoder" in str(caught.value)
    session.close()


def test_without_its_engine(talking: tuple[Path, Any]) -> None:
    path, manifest = talking
    with pytest.raises(BackendError, match="is a plan; open the engine"):
        TextEncoder(path, manifest).encode("naïve café")
