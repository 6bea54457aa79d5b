"""A step cache on a MODEL: put there, begun and ended with each run, its report shown on its node."""

import logging
from uuid import uuid4

from comfy.patcher_extension import CallbacksMP, WrappersMP

from ..flux2_core.step_cache import StepCache
from .host_cache import weights_of
from .host_controls import STEPS
from .host_plan import show

log = logging.getLogger(__name__)


def with_steps(model, cache: StepCache | None, hidden=None):
    """A clone of a MODEL with this cache, or with none; one that it had before is gone. `hidden`:
    the node that shows the report."""
    out = model.clone()
    wrappers = {WrappersMP.OUTER_SAMPLE: Run(hidden), WrappersMP.APPLY_MODEL: _tell_weights}
    for kind in wrappers:
        out.remove_wrappers_with_key(kind, STEPS)
    out.remove_callbacks_with_key(CallbacksMP.ON_CLONE, STEPS)
    options = out.model_options.setdefault("transformer_options", {})
    options.pop(STEPS, None)
    if cache is not None:
        options[STEPS] = cache
        for kind, wrapper in wrappers.items():
            out.add_wrapper_with_key(kind, STEPS, wrapper)
        out.add_callback_with_key(CallbacksMP.ON_CLONE, STEPS, _separate)
    return out


def _separate(_, clone) -> None:
    """A clone may get other weights or patches: it has an empty cache of the same kind."""
    options = clone.model_options.get("transformer_options", {})
    if (old := options.get(STEPS)) is not None:
        options[STEPS] = old.like()


class Run:
    """Around the host's whole sampling call: what is remembered lives as long as it."""

    def __init__(self, hidden=None):
        self.hidden = hidden

    def __call__(self, executor, *args, **kw):
        guider = executor.class_obj
        options = guider.model_options["transformer_options"]
        cache = options.get(STEPS)
        if cache is None:
            return executor(*args, **kw)
        cache.begin(uuid4(), weights_of(guider.model_patcher, options))
        try:
            return executor(*args, **kw)
        finally:
            text = report(cache)
            log.info(text)
            show(self.hidden, text)
            cache.clear()


def _tell_weights(executor, x, t, c_concat=None, c_crossattn=None, control=None, *args, **kw):
    """Before every call of the model: hooks change its weights from prompt to prompt."""
    options = args[0] if args else kw.get("transformer_options", {})
    cache = options.get(STEPS)
    if cache is not None:
        cache.weights = weights_of(executor.class_obj.current_patcher, options)
    return executor(x, t, c_concat, c_crossattn, control, *args, **kw)


def report(cache: StepCache) -> str:
    """What a run made of its cache, in two sentences."""
    seen = cache.statistics
    calls = seen.computed + seen.reused
    if not seen.reused:
        return f"Step cache: nothing was reused, all {calls} passes were computed."
    said = (
        f"Step cache: {seen.reused} of {calls} passes reused, in steps {numbers(seen.steps)} of "
        f"{seen.of}; {seen.saved:.0%} of the work in blocks saved."
    )
    if seen.error:
        mean = sum(seen.error) / len(seen.error)
        said += (
            f" Measured error of what was reused: {mean:.1%} on average, at most "
            f"{max(seen.error):.1%}."
        )
    return said


def numbers(steps: set[int]) -> str:
    """{1, 2, 3, 6} -> "2-4, 7": counted from 1."""
    parts: list[list[int]] = []
    for step in sorted(steps):
        if parts and step == parts[-1][-1]:
            parts[-1][-1] = step + 1
        else:
            parts.append([step + 1, step + 1])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
