"""Batches for nano's training: tasks, stages, and what a prompt's numbers refer to.

A stage says how much of the work goes to each task and how the references are. `bind` teaches which
reference a number means, at the smallest scale; `grow` brings ten references and 128 pixels; `full`
is the whole of nano's world, `wide` the same with more 256 x 256 and more attributes left out,
`wider` adds letters, words, counts, sizes and free order of words.
`scenes.held_back` prompts are never among the batches.
"""

import random
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from nano_pool import (
    BACKGROUNDS,
    COLORS,
    JITTERS,
    PLACES,
    SHAPES,
    WIDER,
    complete,
    load,
    plan,
    scenes,
    single_index,
    wider_scene,
)

REFERENCED = ("edit", "mix", "pick")
LETTERED = ("letter", "word")
EMPTY = 0.1  # share of empty prompts, for true CFG


@dataclass(frozen=True)
class Stage:
    """`tasks`: share of steps (batches have equal token counts, so 256 x 256 has fewer pictures)."""

    tasks: dict[str, float]
    most: int = 10  # references at most
    small: float = 0.1  # share of targets of 64 pixels in tasks with references
    gaps: float = 0.2  # share of batches whose references stand at any numbers up to ten
    pairs: float = 0.65  # share of picks that take two
    alone: float = 0.25  # share of edits of the only reference
    free: float = 0.15  # share of prompts without references that leave an attribute out
    loose: float = 0.0  # share of prompts without references in another order of words
    tilt: float = 0.9  # noise in tasks with references: the mean of t's logit


STAGES = {
    "bind": Stage(
        {"pick": 0.5, "edit": 0.3, "mix": 0.2},
        most=4,
        small=1.0,
        gaps=0.5,
        pairs=0.2,
        alone=0.05,
        tilt=1.2,
    ),
    "grow": Stage(
        {"pick": 0.4, "edit": 0.2, "mix": 0.2, "one": 0.1, "two": 0.1},
        small=0.5,
        gaps=0.4,
        pairs=0.5,
        alone=0.1,
        tilt=1.0,
    ),
    "full": Stage(
        {
            "one": 0.10,
            "two": 0.12,
            "large": 0.19,
            "sizes": 0.03,
            "edit": 0.18,
            "mix": 0.12,
            "pick": 0.26,
        }
    ),
    "wide": Stage(
        {
            "one": 0.14,
            "two": 0.18,
            "large": 0.27,
            "sizes": 0.03,
            "edit": 0.12,
            "mix": 0.09,
            "pick": 0.17,
        },
        small=0.05,
        pairs=0.7,
        free=0.3,
    ),
    "wider": Stage(
        {
            "one": 0.08,
            "two": 0.11,
            "large": 0.12,
            "sizes": 0.02,
            "edit": 0.07,
            "mix": 0.06,
            "pick": 0.13,
            "letter": 0.09,
            "word": 0.20,
            "count": 0.06,
            "size": 0.06,
        },
        small=0.05,
        pairs=0.7,
        free=0.3,
        loose=0.25,
    ),
}


@dataclass
class Batch:
    """latents (B, 128, h, w); references (B, 128, h_i, w_i) each, reference i standing at number
    `numbers[i]`; named (B, n) rows: for each number in a prompt the attributes of that reference;
    letters (B, h w): which letter a token shows, from 1, 0 none, -100 where the prompt is empty."""

    task: str
    latents: torch.Tensor
    prompts: list[str]
    references: list[torch.Tensor] = field(default_factory=list)
    numbers: tuple[int, ...] = ()
    named: list[list[int]] = field(default_factory=list)
    letters: torch.Tensor | None = None


def spots(scene) -> np.ndarray:
    """(64,): which letter each token of 128 x 128 pixels shows, from 1; 0 where none is."""
    thing = scene.things[0]
    x, y = (p + o for p, o in zip(scenes.PLACES[thing.place], thing.offset, strict=True))
    half = thing.size / 2
    edges, found = np.arange(9) / 8, np.zeros(64, np.int64)
    covered = np.full(64, 0.25 / 64)
    for letter, box in scenes.letter_boxes(thing.shape, (x - half, y - half, x + half, y + half)):
        wide, high = (
            (np.minimum(edges[1:], box[i + 2]) - np.maximum(edges[:-1], box[i])).clip(0)
            for i in (0, 1)
        )
        area = np.outer(high, wide).ravel()
        found[area > covered] = 1 + ord(letter) - ord("a")
        covered = np.maximum(area, covered)
    return found


class Data:
    """Batches from the pool: `tokens` says how many tokens one has, about."""

    def __init__(self, pool: Path, seed: int, stage: Stage, tokens: int):
        self.random, self.stage, self.tokens = random.Random(seed), stage, tokens
        self.sets = {name: load(pool, name) for name in plan() if complete(pool, name)}
        self.letters = {
            kind: torch.from_numpy(
                np.stack([spots(wider_scene(kind, row)[0]) for row in range(WIDER[kind])])
            )
            for kind in LETTERED
            if f"{kind}_128" in self.sets
        }
        self.sizes = [name for name in self.sets if name.startswith("any_") and name != "any_256"]

    def batch(self) -> Batch:
        task = self.random.choices(list(self.stage.tasks), self.stage.tasks.values())[0]
        if task in REFERENCED:
            return self.referenced(task)
        names = {"one": "one_128", "two": "two_128", "large": "any_256"}
        names |= {kind: f"{kind}_128" for kind in WIDER}
        data = self.sets[names.get(task) or self.random.choice(self.sizes)]
        n = self.count(data["latents"][0, 0].numel())
        rows, prompts = [], []
        while len(rows) < n:
            row = self.random.randrange(len(data["labels"]))
            label = data["labels"][row].tolist()
            wish = wider_scene(task, label[0])[1] if task in WIDER else self.wish(label)
            prompt = self.wording(wish)
            if not scenes.held_back(prompt):
                rows.append(row)
                prompts.append(prompt)
        batch = Batch(task, data["latents"][rows], self.emptied(prompts))
        if task in LETTERED:
            batch.letters = self.letters[task][rows]
            batch.letters[[prompt == "" for prompt in batch.prompts]] = -100
        return batch

    def wording(self, wish) -> str:
        loose = self.random.random() < self.stage.loose
        return scenes.reword(wish, self.random) if loose else scenes.describe(wish)

    def wish(self, label):
        """What a label row shows, some with an attribute left out."""
        s1, c1, p1, s2, c2, p2, background, _ = label
        things = [[SHAPES[s1], COLORS[c1], PLACES[p1]]]
        if s2 >= 0:
            things.append([SHAPES[s2], COLORS[c2], PLACES[p2]])
        background = BACKGROUNDS[background]
        if self.random.random() < self.stage.free:
            out = self.random.randrange(4)
            if out == 3:
                background = None
            else:
                self.random.choice(things)[out] = None
        self.random.shuffle(things)
        return scenes.Scene(tuple(scenes.Thing(*t) for t in things), background)

    def emptied(self, prompts):
        return ["" if self.random.random() < EMPTY else prompt for prompt in prompts]

    def count(self, picture: int, references: int = 0) -> int:
        return max(4, self.tokens // (32 + picture + references))

    def referenced(self, task) -> Batch:
        r, stage = self.random, self.stage
        most = min({"edit": 4, "mix": 6, "pick": 10}[task], stage.most)
        least = 1 if task == "edit" and r.random() < stage.alone else 2
        many = least if least == 1 else r.randint(2, most)
        if task == "pick" and r.random() < 0.4:
            many = most
        side = 64 if r.random() < stage.small else 128
        big = side == 128 and many <= 4 and r.random() < (0.8 if task == "edit" else 0.3)
        reference_side = 128 if big else 64
        numbers = tuple(range(1, many + 1))
        if r.random() < stage.gaps:
            numbers = tuple(sorted(r.sample(range(1, 11), many)))
        n = self.count((side // 16) ** 2, many * (reference_side // 16) ** 2)
        samples = []
        while len(samples) < n:
            sample = getattr(self, task)(many, numbers, side)
            if not scenes.held_back(sample[1]):
                samples.append(sample)
        known = self.sets[f"one_{reference_side}"]
        rows = torch.tensor([refs for _, _, refs in samples])
        prompts = self.emptied([prompt for _, prompt, _ in samples])
        named = []
        for prompt, refs in zip(prompts, rows, strict=True):
            for number in re.findall(r"image (\d+)", prompt):
                label = known["labels"][refs[numbers.index(int(number))]].tolist()
                named.append([label[0], label[1], label[2], label[6]])
        return Batch(
            f"{task} {'few' if many < 4 else 'many'}",
            torch.stack([target for target, _, _ in samples]),
            prompts,
            [known["latents"][column] for column in rows.T],
            numbers,
            named,
        )

    def any_reference(self, shape=None, color=None):
        r = self.random
        shape = r.randrange(len(SHAPES)) if shape is None else shape
        color = r.randrange(len(COLORS)) if color is None else color
        return (
            shape,
            color,
            r.randrange(len(PLACES)),
            r.randrange(len(BACKGROUNDS)),
            r.randrange(JITTERS),
        )

    def edit(self, many, numbers, side):
        """The picture as it was, with another colour or another background."""
        refs = [self.any_reference() for _ in range(many)]
        i = self.random.randrange(many)
        shape, color, place, background, j = refs[i]
        if self.random.random() < 0.5:
            color = self.random.randrange(len(COLORS))
            prompt = scenes.recolor_prompt(numbers[i], COLORS[color])
        else:
            background = self.random.randrange(len(BACKGROUNDS))
            prompt = scenes.background_prompt(numbers[i], BACKGROUNDS[background])
        return self.single((shape, color, place, background, j), prompt, refs, side)

    def mix(self, many, numbers, side):
        """The shape of one in the color of another."""
        refs = [self.any_reference() for _ in range(many)]
        i, j = self.random.sample(range(many), 2)
        wanted = self.any_reference(refs[i][0], refs[j][1])
        prompt = scenes.mix_prompt(
            numbers[i], numbers[j], PLACES[wanted[2]], BACKGROUNDS[wanted[3]]
        )
        return self.single(wanted, prompt, refs, side)

    def single(self, wanted, prompt, refs, side):
        latents = self.sets[f"one_{side}"]["latents"]
        return latents[single_index(*wanted)], prompt, [single_index(*ref) for ref in refs]

    def pick(self, many, numbers, side):
        """One or two of many references, each taken as it is, at a place."""
        refs = [self.any_reference() for _ in range(many)]
        i, k = self.random.sample(range(many), 2)
        if self.random.random() >= self.stage.pairs:
            wanted = self.any_reference(*refs[i][:2])
            prompt = scenes.pick_prompt([(numbers[i], PLACES[wanted[2]])], BACKGROUNDS[wanted[3]])
            return self.single(wanted, prompt, refs, side)
        pair = self.sets[f"two_{side}"]
        row = self.random.randrange(len(pair["labels"]))
        s1, c1, p1, s2, c2, p2, background, _ = pair["labels"][row].tolist()
        refs[i], refs[k] = self.any_reference(s1, c1), self.any_reference(s2, c2)
        picks = [(numbers[i], PLACES[p1]), (numbers[k], PLACES[p2])]
        self.random.shuffle(picks)
        prompt = scenes.pick_prompt(picks, BACKGROUNDS[background])
        return pair["latents"][row], prompt, [single_index(*ref) for ref in refs]
