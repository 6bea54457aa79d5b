"""What is said of a LoRA file: whose names it has, and what became of its keys."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from .lora_names import split

# How a trainer's or exporter's keys begin, and its name. The first that fits.
DIALECTS = (
    (r"lora_unet_", "kohya"),
    (r"lycoris_", "LyCORIS"),
    (r"lora_transformer_", "OneTrainer"),
    (r"base_model\.model\.", "PEFT"),
    (r"diffusion_model\.", "ai-toolkit"),
    (r"model\.diffusion_model\.", "all-in-one file"),
    (r"transformer\.", "diffusers"),
    (r"(single_)?transformer_blocks\.|sformer_blocks\.|proj_out\.|x_embedder\.", "DiffSynth"),
    (r"(double|single)_blocks\.|img_in\.|txt_in\.|final_layer\.", "BFL"),
)
KINDS = (("lokr_", "LoKr"), ("hada_", "LoHa"), ("dora", "DoRA"), ("diff", "full differences"))


def dialect(keys: Iterable[str]) -> str:
    """Whose names most keys have, and what is no plain LoRA: "kohya", "LyCORIS, LoKr"; "" if none
    is known."""
    owners: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for key in keys:
        if parted := split(key):
            owner = next((name for start, name in DIALECTS if re.match(start, key)), None)
            owners.update([owner] if owner else [])
            kinds.update(name for start, name in KINDS if parted[1].startswith(start))
    return ", ".join([*(name for name, _ in owners.most_common(1)), *kinds])


@dataclass
class Report:
    """What became of a file's keys. `str` says it in plain sentences."""

    file: str
    dialect: str = ""
    used: int = 0
    layers: int = 0
    converted: int = 0  # of those used, the ones under another name than BFL's
    skipped: dict[str, str] = field(default_factory=dict)  # key -> reason
    relative: float | None = None  # ||change|| / ||weights||, at strength 1
    measured: int | None = None  # the changes that `relative` was taken over; None is all of them

    def __str__(self) -> str:
        said = f"{self.file}{f' ({self.dialect})' if self.dialect else ''}: "
        said += f"{self.used} tensors change {self.layers} layers"
        if self.converted:
            said += f", {self.converted} of them under other names than the model's"
        if self.relative is not None:
            said += f"; at strength 1 they move these layers' weights by {self.relative:.2%}"
            if self.measured is not None:
                said += f", measured on {self.measured} of the changes"
        lines = [said + "."]
        for reason in dict.fromkeys(self.skipped.values()):
            keys = [key for key, why in self.skipped.items() if why == reason]
            more = " ..." if len(keys) > 3 else ""
            lines.append(
                f"Skipped {len(keys)}, {reason}: {', '.join(k[:90] for k in keys[:3])}{more}."
            )
        return " ".join(lines)
