"""Options of a calibration, those of `surgery wanda`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from surgery.errors import OptionError
from surgery.option import option


@dataclass(frozen=True)
class Calibration:
    """Where input norms come from: a text to measure them on, or a file in which they were kept, or both, which have to agree.

    Args:
        calibration: the text: a file, or a data set on the hub.
        samples, seq_len, seed, text_field: of the samples; see `surgery.calibrate.text.samples`.
        batch_size: samples in one forward pass.
        save_norms: a file to keep the norms in.
        norms: a file that they were kept in.

    Raises:
        OptionError: there is neither a text nor a file.
    """

    calibration: str | None = option(
        None,
        help="Text to run the fine-tuned model on: a .txt, .jsonl, .json or .parquet file, or a data set on the hub.",
    )
    samples: int = option(128, help="How many stretches of text.")
    seq_len: int = option(2048, help="Tokens in each; at most what the model takes.")
    seed: int = option(0, help="Of the places in the text.")
    text_field: str | None = option(
        None, help="Field of a record that holds the text.", shown="text, or messages as a chat"
    )
    batch_size: int = option(1, help="Samples that go through a layer together.")
    save_norms: Path | None = option(None, help="Keep the norms in this .safetensors file.")
    norms: Path | None = option(None, help="Norms that were kept, in place of a calibration.")

    def __post_init__(self) -> None:
        if self.calibration is None and self.norms is None:
            raise OptionError("Give a text with `calibration`, or norms that were saved with `norms`.")
        if self.batch_size < 1:
            raise OptionError(f"`batch_size` must be 1 or more, not {self.batch_size}.")
