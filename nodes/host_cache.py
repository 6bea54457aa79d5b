"""A reference cache on a MODEL: put there, begun and ended with each run, told of the weights."""

import logging
from uuid import uuid4

from comfy.patcher_extension import CallbacksMP, WrappersMP

from ..flux2_core.kv_cache import ReferenceCache, Statistics
from .host_controls import CACHE, KV

log = logging.getLogger(__name__)


def with_cache(model, cache: ReferenceCache | None, *, kv: bool = False, keep: bool = False):
    """A clone of a MODEL with this cache, or with none; one that it had before is gone.

    `kv`: run it in the KV form, whatever its weights say. `keep`: entries outlive a run.
    """
    out = model.clone()
    wrappers = {WrappersMP.OUTER_SAMPLE: Run(keep), WrappersMP.APPLY_MODEL: _tell_weights}
    for kind in wrappers:
        out.remove_wrappers_with_key(kind, CACHE)
    out.remove_callbacks_with_key(CallbacksMP.ON_CLONE, CACHE)
    options = out.model_options.setdefault("transformer_options", {})
    for name in (CACHE, KV):
        options.pop(name, None)
    if kv:
        options[KV] = True
    if cache is not None:
        options[CACHE] = cache
        for kind, wrapper in wrappers.items():
            out.add_wrapper_with_key(kind, CACHE, wrapper)
        out.add_callback_with_key(CallbacksMP.ON_CLONE, CACHE, _separate)
    return out


def _separate(_, clone) -> None:
    """A clone may get other weights or patches: it has an empty cache of the same kind."""
    options = clone.model_options.get("transformer_options", {})
    if (old := options.get(CACHE)) is not None:
        how = ("interval", "guard", "store", "place", "limit_bytes")
        options[CACHE] = ReferenceCache(old.mode, **{name: getattr(old, name) for name in how})


class Run:
    """Around the host's whole sampling call: a cache lives as long as it, or longer if kept."""

    def __init__(self, keep: bool):
        self.keep = keep

    def __call__(self, executor, *args, **kw):
        guider = executor.class_obj
        options = guider.model_options["transformer_options"]
        cache = options.get(CACHE)
        if cache is None:
            return executor(*args, **kw)
        cache.statistics = Statistics()
        cache.begin(uuid4(), weights_of(guider.model_patcher, options))
        try:
            return executor(*args, **kw)
        finally:
            log.info(report(cache))
            if not self.keep:
                cache.clear()


def _tell_weights(executor, x, t, c_concat=None, c_crossattn=None, control=None, *args, **kw):
    """Before every call of the model: hooks change its weights from prompt to prompt."""
    options = args[0] if args else kw.get("transformer_options", {})
    cache = options.get(CACHE)
    if cache is not None:
        cache.weights = weights_of(executor.class_obj.current_patcher, options)
    return executor(x, t, c_concat, c_crossattn, control, *args, **kw)


def weights_of(patcher, options: dict) -> tuple:
    """What makes keys and values out of latents at this moment: the MODEL's patches (LoRA), the
    hooks applied to it, and other packs' patches of its attention and blocks.

    Those are told apart by their address: they live as long as the MODEL, and so does the cache.
    """
    group = patcher.current_hooks
    hooks = group.hooks if group else ()
    patches = [
        (kind, name, id(patch))
        for kind, found in (
            *options.get("patches", {}).items(),
            *options.get("patches_replace", {}).items(),
        )
        for name, patch in (found.items() if isinstance(found, dict) else enumerate(found))
    ]
    strengths = ((hook.hook_ref, getattr(hook, "strength_model", hook.strength)) for hook in hooks)
    return patcher.patches_uuid, tuple(strengths), tuple(patches)


def report(cache: ReferenceCache) -> str:
    """What a run made of its cache, in one line."""
    seen = cache.statistics
    if not seen.hits + seen.misses:
        return "Reference cache: this run had nothing to keep."
    where = "host memory" if cache.place == "host" else "device memory"
    said = (
        f"Reference cache ({cache.mode}): references computed {seen.misses} times, taken from the "
        f"cache {seen.hits} times, {cache.bytes / 2**20:.1f} MiB in {where}"
    )
    if seen.drift is not None:
        said += f", changed by at most {seen.drift:.1%} between refreshes"
    return said + "."
