"""The end of a run: the student as it will be stored, its scores, and its model card."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from torch import Tensor

from asd_rt.files import replacing
from asd_rt.plan import FixedPlan
from asd_rt.schedule import MAX_STEPS
from train.checkpoint import save_checkpoint
from train.evaluation import EXPLANATION, Evaluation, Row, make_plans, markdown, plan_name
from train.handover import world_deployment
from train.judge import Judge, load_judge
from train.kept_rows import KeptRows
from train.samplers import Subject

if TYPE_CHECKING:
    from train.pipeline import World

log = logging.getLogger(__name__)
ROWS = "rows.json"  # of the score table, in the run's folder


def score_all(world: World, student: dict[str, Tensor]) -> list[Row]:
    """Scores of held-out real clips, the teacher, the causal start, and the student at every plan.

    Every row is kept as soon as it is there; what a run was interrupted after is not made again.
    """
    config, judge = world.config, load_judge(world.config)
    evaluation = Evaluation(judge, config.eval_clips, config.clip_frames)
    kept = KeptRows(world.out / ROWS, _mark(world, student, judge))
    rows: list[Row] = []

    def add(name: str, make: Callable[[], Row]) -> None:
        row, known = kept.row(name, make)
        rows.append(row)
        note = " (kept)" if known else ""
        log.info("%s: total %s%s", row.title, row.scores.of("total").points(), note)

    def judged(subject: Subject, plan: FixedPlan | None, later: bool = False) -> None:
        title = subject.name if plan is None else f"{subject.name}, {plan_name(plan)}"
        title += ", later" if later else ""
        add(title, lambda: evaluation.subject(subject, plan, later)[0])

    add("real", evaluation.real)
    add("real, later", lambda: evaluation.real(later=True))
    judged(world.teacher(world.handed("teacher").weights), None)
    start = world.student("causal start", world.handed("init").weights)
    enhanced = FixedPlan(1, MAX_STEPS)
    for plan in (FixedPlan(MAX_STEPS, MAX_STEPS), enhanced):
        judged(start, plan)
    subject = world.student("student", student)
    for plan in make_plans(range(MAX_STEPS, 0, -1), (None, MAX_STEPS)):
        judged(subject, plan)
    judged(subject, enhanced, later=True)
    return rows


def _mark(world: World, student: dict[str, Tensor], judge: Judge) -> str:
    """Of all that scores depend on: configuration, seed and networks."""
    found = hashlib.sha256(f"{world.mark('distill')} {asdict(world.config)}".encode())
    networks = {stage: world.handed(stage).weights for stage in ("teacher", "init")}
    networks |= {"student": student, "judge": judge.classifier.state_dict()}
    for name, weights in networks.items():
        for key in sorted(weights):
            found.update(f"{name} {key}".encode() + weights[key].contiguous().numpy().tobytes())
    return found.hexdigest()


def write_student(world: World, command: str) -> None:
    """Round the student as it will be stored, score it, and write it to OUT/student with its model card.

    Raises:
        AsdError: a stage is not finished, or something cannot be written.
    """
    config = world.config
    rounded = {k: tensor.half().float() for k, tensor in world.averaged("distill").items()}
    rows = score_all(world, rounded)
    folder = world.out / "student"
    told = world_deployment(config)
    save_checkpoint(folder, config.model, rounded, told, world.codec, world.text.table, half=True)
    scores = {"command": command, "seed": world.seed, "rows": [row.to_json() for row in rows]}
    with replacing(world.out / "scores.json") as temporary:
        temporary.write_text(json.dumps(scores, indent=1) + "\n")
    size = sum(tensor.numel() for tensor in rounded.values())
    with replacing(folder / "README.md") as temporary:
        temporary.write_text(_model_card(world, size, rows, command))


def _model_card(world: World, size: int, rows: list[Row], command: str) -> str:
    config = world.config
    return f"""# {config.name}: a causal student of the tiny world

One coloured handwritten digit moving through a framed 32x32 arena, 16 frames a second, trailing a dim
glow. It sets out in the direction of the prompt and bounces off the frame. One set of weights serves 1, 2, 3
and 4 denoising steps.

- Network: Wan2.1 architecture, {size / 1e6:.2f} M parameters, dim {config.model.dim},
  {config.model.num_layers} layers, stored as float16.
- Blocks of {config.cache.block_frames} latent frames; window {config.cache.window_frames}, sink
  {config.cache.sink_frames}.
- Prompts: a colour, a digit and a direction in plain English, any of them left out if you like;
  deployment.json lists the words.
- Trained on scikit-learn's bundled digits (UCI optical recognition of handwritten digits), every sixth
  glyph held out.
- Command: `{command}`

## Scores
{EXPLANATION} The classifier sees the digit without its trail. The same {rows[0].clips} prompts and the
same noise for every row. In frames {rows[1].first_frame}-{rows[1].last_frame} a digit may have turned
round: there only the axes of its motion count.

{markdown(rows)}"""
