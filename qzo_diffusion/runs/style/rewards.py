"""Build the rewards of a run from its settings."""

import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from qzo_diffusion import resources
from qzo_diffusion.config.reward import NO_SECOND, VOTES, RewardConfig, RewardName
from qzo_diffusion.config.style import Config
from qzo_diffusion.core.errors import ConfigError, ModelError, UserError
from qzo_diffusion.diffusion.memory import stored_bytes
from qzo_diffusion.evaluate.scorer import DEFAULT_SCORER, check_scorer, load_scorer, scorer_weights
from qzo_diffusion.quant.header import read_header
from qzo_diffusion.rewards import of_pixels
from qzo_diffusion.rewards.of_features import ClipScore, Features, LinearHead, StyleSimilarity
from qzo_diffusion.rewards.preference import PREFERENCES, WEIGHTS, Preference
from qzo_diffusion.rewards.programs import Program, PythonFunction
from qzo_diffusion.rewards.reward import Reward, Weighted
from qzo_diffusion.runs import hub
from qzo_diffusion.runs.style.choose_model import default_scorer
from qzo_diffusion.runs.style.scoring import images_in, opened

CONTENT = "clip_score"
# bytes in fp32 of published models that may not be here yet: a CLIP with ViT-H/14, and ViT-L/14
PUBLISHED = {"pickscore": 3.94e9, "hpsv2": 3.94e9, DEFAULT_SCORER: 1.71e9}
OF_FEATURES = (CONTENT, "style", "aesthetic")
OF_PIXELS: dict[str, Reward] = {
    "compressibility": of_pixels.compressibility,
    "incompressibility": of_pixels.incompressibility,
    "colourfulness": of_pixels.colourfulness,
    "brightness": of_pixels.brightness,
}


@dataclass(frozen=True)
class Rewards:
    """What is tuned, and the second score that is only reported; None for none. Of votes there is
    nothing to compute: `trained` holds no reward.
    """

    trained: Weighted
    second: Weighted | None


def second_name(config: Config) -> RewardName | None:
    """Return the second score: the one that was chosen, or else the match with the prompt where
    that is no reward itself."""
    chosen = config.reward.second
    if chosen == NO_SECOND:
        return None
    if chosen is not None:
        return RewardName.parse(chosen)
    is_reward = any(one.name == CONTENT for one in config.reward.names)
    return None if is_reward else RewardName(CONTENT, None, 1.0)


class Workshop:
    """Check and build rewards; each scorer is loaded once.

    Args:
        scorer: the name of the scorer that suits the model, where `reward.scorer` names none.
    """

    def __init__(self, config: Config, scorer: str, device: torch.device) -> None:
        self._config, self._device = config, device
        self._scorer = config.reward.scorer or scorer
        self._features: dict[str, Features] = {}

    def check(self, dry_run: bool = False) -> list[str]:
        """Check before anything is loaded that all files, programs and scorers are here.

        Returns notes: there is no second score although nobody said so; in a dry run, weights that
        are missing.

        Raises:
            ConfigError, DataError, ModelError: something is missing.
        """
        notes = []
        for one in self._config.reward.names:
            try:
                self._check(one)
            except ModelError as error:
                if not dry_run:
                    raise
                notes.append(f"{error.got}: {error.remedy}")
        second = second_name(self._config)
        if second is not None and not self._is_here(second):
            notes.append(f"no second score: the weights of {second.text} are not here")
        return notes

    def build(self, with_second: bool = True) -> Rewards:
        """Load everything. Raises what `check` does, and RewardError."""
        reward: RewardConfig = self._config.reward
        computed = [one for one in reward.names if one.name != VOTES]
        trained = Weighted(
            {one.text: self._built(one) for one in computed},
            {one.text: one.weight for one in computed},
        )
        second = second_name(self._config) if with_second else None
        if second is None or not self._is_here(second):
            return Rewards(trained, None)
        return Rewards(trained, Weighted({second.text: self._built(second)}, {second.text: 1.0}))

    def _is_here(self, second: RewardName) -> bool:
        """Whether the weights of the second score are here; they must be where it was chosen."""
        try:
            self._check(second)
        except ModelError:
            if self._config.reward.second is not None:
                raise
            return False
        return True

    def memory(self) -> float:
        """Return the bytes in memory of all models that score, in fp32.

        Published ones are known before they are here. Others that are not here count as nothing.
        """
        sizes = dict[str, float]()
        second = second_name(self._config)
        # one that nobody chose is left out where it is not here
        if second is not None and self._config.reward.second is None and not self._is_here(second):
            second = None
        for one in [*self._config.reward.names, second]:
            if one is not None and (name := self._model_of(one)) is not None:
                sizes[name] = self._size(one, name)
        return sum(sizes.values())

    def _model_of(self, one: RewardName) -> str | None:
        if one.name in OF_FEATURES:
            return self._scorer_of(one)
        return one.argument if one.name == "preference" else None

    def _size(self, one: RewardName, name: str) -> float:
        try:
            if one.name == "preference":
                file = _cached_preference(name) / WEIGHTS
            else:
                file = scorer_weights(name, resources.embedded_scorer())
            return stored_bytes(read_header(file)[0], torch.float32)
        except UserError:
            return PUBLISHED.get(name, 0.0)

    def _scorer_of(self, one: RewardName) -> str:
        return one.argument or self._scorer if one.name == CONTENT else self._scorer

    def _check(self, one: RewardName) -> None:
        argument = one.argument or ""
        if one.name == "style":
            images_in(Path(argument))
        elif one.name == "aesthetic" and not Path(argument).is_file():
            raise _missing(one, f"there is no file {argument}", "a safetensors file")
        elif one.name == "python" and not Path(one.function[0]).is_file():
            raise _missing(one, f"there is no file {one.function[0]}", "FILE.py:FUNCTION")
        elif one.name == "command" and not shutil.which((shlex.split(argument) or [""])[0]):
            raise _missing(one, f"no program {argument}", "a program and its arguments")
        elif one.name == "preference":
            _cached_preference(argument)
        if one.name in OF_FEATURES:
            check_scorer(self._scorer_of(one), resources.embedded_scorer())

    def _built(self, one: RewardName) -> Reward:
        argument, seconds = one.argument or "", self._config.reward.seconds
        if one.name == "python":
            file, function = one.function
            return PythonFunction(Path(file), function, seconds)
        if one.name == "command":
            return Program(shlex.split(argument), seconds)
        if one.name == "preference":
            scaled = PREFERENCES[argument][1]
            return Preference.load(_cached_preference(argument), scaled, self._device)
        if one.name in OF_PIXELS:
            return OF_PIXELS[one.name]
        features = self._of(self._scorer_of(one))
        if one.name == "style":
            return StyleSimilarity(features, _pictures_of(Path(argument)))
        if one.name == "aesthetic":
            return LinearHead.load(features, Path(argument))
        return ClipScore(features, self._config.data.trigger)

    def _of(self, scorer: str) -> Features:
        if scorer not in self._features:
            loaded = load_scorer(scorer, self._device, resources.embedded_scorer())
            self._features[scorer] = Features(loaded)
        return self._features[scorer]


def scorer_bytes(config: Config, folder: Path) -> dict[str, float]:
    """Return the bytes of the models that score pictures, for a plan of memory."""
    workshop = Workshop(config, default_scorer(folder), torch.device("cpu"))
    return {"scorers": workshop.memory()}


def _pictures_of(folder: Path) -> list[Image.Image]:
    found, _ = opened(images_in(folder), folder)
    return list(found.values())


def _missing(one: RewardName, got: str, expected: str) -> ConfigError:
    return ConfigError(f"--reward {one.text}: {got}", expected, "correct --reward")


def _cached_preference(name: str) -> Path:
    """Return the folder of a preference model in the local cache. Raises ModelError."""
    repository, _ = PREFERENCES[name]
    found = hub.cached_snapshot(repository, WEIGHTS)
    if found is None:
        raise ModelError(
            f"the weights of preference:{name} are not in the local cache",
            f"{WEIGHTS} of {repository}",
            f"hf download {repository}, or choose another reward",
        )
    return found
