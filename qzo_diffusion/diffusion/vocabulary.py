"""Check before an encoder is loaded that it has an embedding for every token of the prompts."""

from collections.abc import Iterable
from pathlib import Path

from qzo_diffusion.diffusion.families.family import Family
from qzo_diffusion.diffusion.language_model import text_config
from qzo_diffusion.diffusion.text_encoders import has_part, load_tokenizer
from qzo_diffusion.quant.config_file import read_config
from qzo_diffusion.system.texts import check_tokens


def check_texts(
    folder: Path, family: Family, texts: Iterable[tuple[str, str]], *, t5: bool
) -> None:
    """Check (place, text) pairs against the tokenizers of a pipeline folder.

    Args:
        texts: pairs whose text can be encoded.
        t5: whether the large encoder is used, if the folder has it.

    Raises:
        DataError: a token has no embedding in an encoder.
        ModelError: a tokenizer or a config can't be read.
    """
    wanted = list(texts)
    for part in family.texts.classes:
        if has_part(folder, part) and (t5 or part != family.texts.large):
            config = read_config(folder / part / "config.json")
            size = text_config(config).get("vocab_size")
            if isinstance(size, int):
                check_tokens(load_tokenizer(folder, part), size, wanted, part)
