"""A contact sheet of nano's: ten held-back prompts down, steps or forms across.

A picture that the checker finds wrong has a red frame.
"""

from collections.abc import Callable
from textwrap import wrap

from PIL import Image, ImageDraw, ImageFont

from nano import cases, draw

from flux2_pack.flux2_core.nano import scenes
from flux2_pack.flux2_core.transformer import Controls

ROWS = (
    "one", "two", "edit", "edit_among", "mix", "pick", "letter", "word", "count", "size",
)  # fmt: skip
STEPS = (1, 2, 4, 8, 20)
# column -> form, steps, guidance, KV form
FORMS = {
    "base, 8 steps": ("", 8, 1.0, False),
    "KV form, 8 steps": ("", 8, 1.0, True),
    "distilled, 4 steps": ("distilled", 4, None, False),
    "guided, 8 steps": ("guided", 8, None, False),
}
SIDE, GAP, HEAD, TEXT = 128, 8, 22, 300
INK, WRONG = (20, 20, 20), (220, 40, 40)


def contact(pipe: Callable, across: str) -> Image.Image:
    """`pipe`: form -> Pipeline; `across`: steps or forms."""
    columns = (
        FORMS
        if across == "forms"
        else {f"{n} step{'s' * (n > 1)}": ("", n, 1.0, False) for n in STEPS}
    )
    width = TEXT + len(columns) * (SIDE + GAP)
    page = Image.new("RGB", (width, HEAD + len(ROWS) * (SIDE + GAP)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for x, label in enumerate(columns):
        pen.text((TEXT + x * (SIDE + GAP), 5), label, INK, font)
    for y, kind in enumerate(ROWS):
        case, top = cases(kind, 1)[0], HEAD + y * (SIDE + GAP)
        lines = wrap(case.prompt, 42)
        pen.text((6, top), "\n".join(lines), INK, font)
        for i, scene in enumerate(case.references):
            small = scenes.draw(scene).resize((42, 42))
            page.paste(small, (6 + i % 5 * 46, top + 22 + 15 * (len(lines) - 1) + i // 5 * 46))
        for x, (form, steps, guidance, kv) in enumerate(columns.values()):
            controls = Controls(kv_references=True) if kv else None
            made = draw(pipe(form), [case], 0, steps, guidance, controls=controls)[0]
            left = TEXT + x * (SIDE + GAP)
            page.paste(made, (left, top))
            if not scenes.check(made, case.wanted).ok:
                pen.rectangle((left - 3, top - 3, left + SIDE + 2, top + SIDE + 2), None, WRONG, 3)
    return page
