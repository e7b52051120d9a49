"""A simulated voter, who looks for one reward and is wrong now and then, and the row of it."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.rewards.runs import training_prompts
from qzo_diffusion import resources
from qzo_diffusion.cli import parse
from qzo_diffusion.commands.vote import settings_of
from qzo_diffusion.config.files import load_config
from qzo_diffusion.config.style import Config
from qzo_diffusion.core.noise import torch_generator
from qzo_diffusion.rewards.reward import Reward
from qzo_diffusion.rewards.votes import Choice, Pair
from qzo_diffusion.runs.style import reward_evaluate, reward_plan, vote
from qzo_diffusion.runs.style.choose_model import shipped_prompts
from qzo_diffusion.runs.style.scored_pictures import Kept
from qzo_diffusion.runs.style.voted_step import Round, Voter
from qzo_diffusion.runs.tuned import load_tuned

PAIRS = (50, 100, 200, 400)
WRONG = 0.2  # share of answers
CONTENT = "clip_score"


@dataclass
class SimulatedVoter:
    """Choose the picture with the higher score, and in a share of the pairs the other one.

    Which pairs these are follows from (seed, round, pair), so that a run that was killed goes on
    with the same choices.
    """

    score: Reward
    wrong: float = WRONG
    seed: int = 0
    enough: bool = False
    _round: Round | None = None
    _choices: dict[int, Choice] = field(default_factory=dict)

    def begin(self, of_round: Round) -> None:
        self._round, self._choices = of_round, dict(of_round.known)

    def show(self, pair: Pair, left: Image.Image, right: Image.Image) -> None:
        assert self._round is not None
        of_left, of_right = self.score([left, right], [pair.prompt] * 2)
        generator = torch_generator(self.seed, self._round.step, pair.place, "voter")
        mistaken = torch.rand((), generator=generator).item() < self.wrong
        better: Choice = "left" if (of_left > of_right) != mistaken else "right"
        choice: Choice = "equal" if of_left == of_right else better
        self._round.save(pair.place, choice)
        self._choices[pair.place] = choice

    def choices(self, give_up: Callable[[], bool]) -> Mapping[int, Choice]:
        return self._choices


def votes(options: argparse.Namespace) -> dict[str, Any]:
    """The change of style and content on held-out prompts after so many pairs."""
    if options.style_dir is None:
        raise SystemExit("the row votes needs --style-dir DIR, pictures that the base never saw")
    curve: dict[str, dict[str, Any]] = {}
    for pairs in options.pairs:
        run = voted(options, pairs)
        curve[str(pairs)] = evaluated(run, options.style_dir)
    last = str(max(map(int, curve)))
    return {
        "curve": {pairs: found["style_delta"] for pairs, found in curve.items()},
        "curve_ci95": {pairs: found["style_delta_ci95"] for pairs, found in curve.items()},
        "pairs": int(last),
        **curve[last],
        "wrong": WRONG,
    }


def let_vote(arguments: Sequence[str], voter_of: Callable[[Config], Voter]) -> dict[str, Any]:
    """Run a command line of `qzo-diffuse vote` with another voter in place of a person."""
    given = parse(arguments)
    place = vote.find_place(given.run)
    config = settings_of(given, place)
    return vote.vote(vote.plan_of(config, place.run, voter_of(config)), place.begun)


def voted(options: argparse.Namespace, pairs: int) -> Path:
    """Let the voter choose in a new run, or go on with it; return its folder."""
    run: Path = options.work / f"votes_{pairs}"
    if (run / "final").is_dir():
        return run
    prompts = training_prompts(options.work)
    given = ["vote", "--run", str(run), "--pairs", str(pairs)]
    new = ["--model", options.model, "--prompts", str(prompts), *options.settings]
    begun = (run / "config.yaml").is_file()
    let_vote(
        given if begun else [*given, *new],
        lambda config: SimulatedVoter(style_of(config, options.style_dir)),
    )
    return run


def style_of(config: Config, style_dir: Path) -> Reward:
    """Return the similarity to a folder's pictures, by the scorer that suits the model."""
    plan = reward_plan.make_plan(_looking_for(config, style_dir))
    return plan.workshop.build(with_second=False).trained


def evaluated(run: Path, style_dir: Path) -> dict[str, Any]:
    """Score base and tuned scales on the shipped score prompts, at equal seeds."""
    config = _looking_for(load_config(run / "config.yaml"), style_dir)
    config.sample.prompts = shipped_prompts(Path(resources.tiny_model()), "score")
    config.reward.second = CONTENT
    pictures = run / "evaluation"
    found = reward_evaluate.measure(
        reward_plan.make_plan(config), load_tuned(run), Kept(pictures, pictures)
    )
    style, content = found["reward"], found["second"]
    return {
        "style_delta": style["delta"],
        "style_delta_ci95": style["delta_ci95"],
        "content_delta": content["delta"],
        "content_delta_ci95": content["delta_ci95"],
        "prompts": len(found["prompts"]),
    }


def _looking_for(config: Config, style_dir: Path) -> Config:
    changed = config.model_copy(deep=True)
    changed.reward.scores = [f"style:{style_dir.absolute()}"]
    return changed
