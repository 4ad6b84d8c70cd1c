"""Weights stay on disk until they are used: opening a checkpoint holds no copy, a model at most one."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from train.checkpoint import load_checkpoint
from train.formats.random_weights import CONFIGS, random_source
from train.formats.shapes import weight_shapes
from train.formats.write import Source, write_checkpoint

CONFIG = replace(CONFIGS["small"], dim=896, num_heads=7, ffn_dim=3584)  # 65 MB in bf16
MB = 2**20
FORMATS = ("official", "diffusers", "self-forcing")
# Peaks of anonymous memory while checkpoints are opened and built, in a process of its own. Pages of mapped
# files are not in it: the system takes them back when it needs the room.
MEASURE = """
import ctypes, gc, json, sys, threading, time
import torch
from train.checkpoint import load_checkpoint
def anonymous():
    with open('/proc/self/status') as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith('RssAnon'))
peak, done, lock = 0, False, threading.Lock()
def watch():
    global peak
    while not done:
        with lock:
            peak = max(peak, anonymous())
        time.sleep(0.001)
def since(before):
    # Peak over `before` since the last call.
    global peak
    with lock:
        found, peak = max(peak, anonymous()) - before, anonymous()
    return found
torch.set_num_threads(1)
load_checkpoint(sys.argv[1]).build_model()  # whatever is allocated once and for all
watcher = threading.Thread(target=watch)
watcher.start()
figures = []
for path in sys.argv[2:]:
    gc.collect()
    before = anonymous()
    since(before)
    checkpoint = load_checkpoint(path)
    opened = since(before)
    model = checkpoint.build_model()
    built = since(before)
    model = None
    gc.collect()
    model = checkpoint.build_model(torch.bfloat16)
    ctypes.CDLL(None).malloc_trim(0)  # what is alive counts, not what the allocator keeps
    figures.append({'opened': opened, 'built': built, 'mapped': anonymous() - before})
    checkpoint = model = None
done = True
watcher.join()
print(json.dumps(figures))
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """65 MB in every format, the folders in shards."""
    paths: list[Path] = []
    shapes = weight_shapes(CONFIG)
    types = dict.fromkeys(shapes, torch.bfloat16)
    source = Source(CONFIG, shapes, types, lambda name: torch.full(shapes[name], 0.5))
    for form in FORMATS:
        paths.append(tmp_path_factory.mktemp("wan") / "wan.pt")
        write_checkpoint(paths[-1], form, source, shard_bytes=20 * MB)
    return paths


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_second_copy(checkpoints: list[Path], tmp_path: Path, root: Path) -> None:
    small = tmp_path / "small"
    write_checkpoint(small, "official", random_source(CONFIGS["small"], torch.float32, seed=0))
    words = [sys.executable, "-c", MEASURE, small, *checkpoints]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for path, peaks in zip(checkpoints, json.loads(done.stdout), strict=True):
        stored = sum(p.stat().st_size for p in (path, *path.rglob("*")) if p.is_file())
        assert 60 * MB < stored < 70 * MB
        assert peaks["opened"] < 12 * MB, path
        assert abs(peaks["built"] - 2 * stored) < 16 * MB, path
        assert peaks["mapped"] < 12 * MB, path


@pytest.fixture(params=FORMATS)
def checkpoint(request: pytest.FixtureRequest, checkpoints: list[Path]) -> Path:
    return checkpoints[FORMATS.index(request.param)]


def test_models_of_the_stored_type_are_the_files(checkpoint: Path) -> None:
    found = load_checkpoint(checkpoint)
    model = found.build_model(torch.bfloat16).state_dict()
    assert all(
        model[name].data_ptr() == weight.data_ptr() for name, weight in found.weights.items()
    )


def test_writing_to_a_model_leaves_the_file_alone(checkpoint: Path) -> None:
    before = load_checkpoint(checkpoint)
    model = before.build_model(torch.bfloat16)
    model.head.head.bias.fill_(7)
    assert load_checkpoint(checkpoint).sha256 == before.sha256
