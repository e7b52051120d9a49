"""Plan and run `qzo-diffuse vote`: pictures of prompts, tuned by the choices of a person.

It is a run on rewards whose reward is `votes`: the same loop, journal and checkpoints. Its steps
are rounds of pairs (`runs.style.voted_step`).
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from qzo_diffusion.config.defaults import flat, set_dotted
from qzo_diffusion.config.files import read_run
from qzo_diffusion.config.reward import VOTES
from qzo_diffusion.config.style import Config
from qzo_diffusion.core.errors import ConfigError
from qzo_diffusion.core.journal import read_journal
from qzo_diffusion.core.probes import Objective
from qzo_diffusion.diffusion.families.family import Family, model_loss
from qzo_diffusion.rewards.ballot import Ballot
from qzo_diffusion.rewards.drawing import Drawer
from qzo_diffusion.rewards.reward import Reward
from qzo_diffusion.rewards.vote_server import served
from qzo_diffusion.rewards.votes import VoteFile
from qzo_diffusion.runs import training
from qzo_diffusion.runs.locate import locate
from qzo_diffusion.runs.plan import Components
from qzo_diffusion.runs.style import voted_step
from qzo_diffusion.runs.style.reward_plan import RewardPlan, make_plan
from qzo_diffusion.runs.style.voted_step import VotedStep, VoteObjective, Voter
from qzo_diffusion.runs.style.voters import AtPage, Exporter, Importer
from qzo_diffusion.system.console import ask, report
from qzo_diffusion.train.distributed import Ranks

SUBFOLDER = "votes"
ROWS = 2  # of a forward pass: the two pictures of a pair, so that each pair is shown once drawn
# settings that a run on votes takes from the run whose scales it begins with
_TAKEN = ("model", "family", "transformer", "quant", "text", "compute", "sample")
_TAKEN_EACH = ("data.resolution", "data.trigger", "data.cache_dir")
_OF_REWARDS = ("reward.prompts", "reward.steps", "reward.guidance")


@dataclass(frozen=True, kw_only=True)
class VotePlan(RewardPlan):
    """`runs.plan.Plan` of a run on votes.

    Args:
        run: the run's folder.
        voter: whoever chooses.
    """

    run: Path
    voter: Voter

    def load(self, ranks: Ranks) -> Components:
        """Raises ConfigError on several processes: a person sits at one."""
        if ranks.world > 1:
            raise ConfigError(
                f"vote on {ranks.world} processes", "one process", "start it without a launcher"
            )
        return replace(
            super().load(ranks),
            take_step=VotedStep(self.voter, self.run, ranks),
            enough=lambda: self.voter.enough,
        )

    def objective_of(
        self, draw: Drawer, score: Reward, family: Family, transformer: nn.Module
    ) -> Objective[Any]:
        return VoteObjective(
            draw.pictures, lambda batch: model_loss(family, transformer, batch, self.dtype)
        )


def plan_of(config: Config, run: Path, voter: Voter) -> VotePlan:
    """Return the plan of a run on votes. Raises as `reward_plan.make_plan`."""
    if config.reward.prompts is None:
        raise ConfigError(
            "a new run on votes without prompts",
            "a file with one prompt a line",
            "pass --prompts FILE, or the folder of a run to go on with",
        )
    plan = make_plan(config)
    resolved = plan.config.train
    resolved.micro_batch_size = min(ROWS, resolved.micro_batch_size or ROWS)
    parts = {one.name: getattr(plan, one.name) for one in fields(plan)}
    return VotePlan(**parts, run=run, voter=voter)


@dataclass(frozen=True)
class Place:
    """The run that `vote --run` means.

    Attributes:
        run: its folder.
        begun: whether it is there.
        settings: those that a new run takes over from the run that it begins with.
    """

    run: Path
    begun: bool
    settings: Mapping[str, Any]


def find_place(path: Path) -> Place:
    """Find the run on votes at a path.

    A run of another kind on pictures has the votes on its result in a folder of its own, inside.

    Raises:
        ConfigError: it is a run of a language model.
    """
    found = locate(path)
    if found.folder is None:
        return Place(path, False, {})
    found.need("style")
    settings = read_run(found.settings())
    if (settings.get("reward") or {}).get("scores") == [VOTES]:
        return Place(found.folder, True, {})
    inner = found.folder / SUBFOLDER
    return Place(inner, (inner / "config.yaml").is_file(), _taken(settings, path))


def _taken(settings: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return settings for votes on the result of a run: its model and its way to draw."""
    taken: dict[str, Any] = {"init_from": str(path.absolute())}
    taken |= {key: settings[key] for key in _TAKEN if settings.get(key) is not None}
    known = flat(settings)
    of_rewards = _OF_REWARDS if (settings.get("reward") or {}).get("scores") else ()
    for key in (*_TAKEN_EACH, *of_rewards):
        if known.get(key) is not None:
            set_dotted(taken, key, known[key])
    if isinstance(taken.get("sample"), dict):
        levels = ("tuned_between", "every")
        taken["sample"] = {k: v for k, v in taken["sample"].items() if k not in levels}
    return taken


@dataclass(frozen=True)
class VoteRequest:
    """What `qzo-diffuse vote` is asked for.

    At most one of `export_to`, a new folder, and `import_from`, a form that was filled in; with
    neither a page is served at `port`, where 0 is any that is free.
    """

    place: Place
    config: Config
    export_to: Path | None = None
    import_from: Path | None = None
    port: int = 0
    force: bool = False


def run(request: VoteRequest) -> dict[str, Any]:
    """Vote, and return figures for `--json`.

    Raises:
        ConfigError, DataError, ModelError, OutputError, JournalError: as any training.
    """
    folder, config = request.place.run, request.config
    with ExitStack() as stack:
        voter: Voter
        if request.export_to is not None:
            voter = exporter = Exporter(folder, request.export_to)
            exporter.check()
        elif request.import_from is not None:
            voter = Importer.read(request.import_from, folder)
        else:
            ballot = Ballot(config.data.batch_size, config.train.max_steps)
            voter = AtPage(ballot)
        plan = plan_of(config, folder, voter)
        report(plan.summary())
        if isinstance(voter, AtPage):
            address = stack.enter_context(served(ballot, folder.absolute().name, request.port))
            ask(f"\nvote here, on this machine: {address}\n")
        results = vote(plan, request.place.begun, request.force)
    return results | {"exported": request.export_to and str(request.export_to)}


def vote(plan: VotePlan, begun: bool, force: bool = False) -> dict[str, Any]:
    """Begin a run or go on with it; return the figures of a training and the number of pairs."""
    if begun:
        results = training.resume(plan, plan.run, force=force)
    else:
        results = training.run(plan, plan.run)
    return results | counted(plan.run, plan.config)


def counted(run: Path, config: Config) -> dict[str, int]:
    """Return how many pairs have a choice in finished rounds and in the one in hand, and how many
    there are to be.
    """
    steps = read_journal(run / training.JOURNAL).steps_done
    size = config.data.batch_size
    open_round = VoteFile(run / voted_step.VOTES).of_round(steps)
    return {
        "pairs_done": steps * size,
        "pairs_in_hand": len(open_round),
        "pairs": config.train.max_steps * size,
    }
