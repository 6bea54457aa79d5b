"""Our transformer behind the host's forward contract, and the MODEL around it.

Other packs reach into a model while it runs: they shorten the sequence, rewrite queries and keys,
replace whole blocks, add control. This file offers them every place that the host's own FLUX.2
offers; the mathematics stays in the core.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from types import SimpleNamespace

import comfy.conds
import comfy.model_base
import comfy.patcher_extension
import comfy.supported_models
import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor

from ..flux2_core.configs import TransformerConfig, Variant
from ..flux2_core.errors import Flux2Error
from ..flux2_core.positions import rotate
from ..flux2_core.precision import guarded
from ..flux2_core.stream import Stream
from ..flux2_core.transformer import Flux2Transformer
from ..flux2_core.visibility import isolation
from ..flux2_core.windows import blend, seen_from
from .host_controls import CACHE, STEPS
from .host_rope import angles, ids, places, table
from .host_steer import HostControls, Steering, check_batches, steer
from .host_windows import windows_of


@dataclass
class HostStream(Stream):
    """A stream that carries the host's options from block to block."""

    options: dict = field(default_factory=dict)
    control: dict | None = None
    mask: Tensor | None = None

    @cached_property
    def pe(self) -> Tensor:
        """The rotary table in the host's layout (B, 1, T, D / 2, 2, 2), float32: patches see it."""
        cos, sin = self.rope
        pe = torch.stack((cos, -sin, sin, cos), -1).unflatten(-1, (2, 2))
        return pe.reshape(-1, 1, *pe.shape[-4:]).expand(self.txt.shape[0], -1, -1, -1, -1, -1)

    def table(self, pe: Tensor | None) -> tuple[Tensor, Tensor]:
        """cos, sin of a table that may have passed through a patch."""
        return self.rope if pe is None or pe is self.pe else (pe[..., 0, 0], pe[..., 1, 0])

    def patches(self, name: str) -> list:
        return self.options.get("patches", {}).get(name, [])

    def replacement(self, kind: str, i: int):
        return self.options.get("patches_replace", {}).get("dit", {}).get((f"{kind}_block", i))

    def block(self, kind: str, i: int, total: int, run, **parts) -> dict:
        """Run block i, or what another pack put in its place: run({"img": ...}) -> {"img": ...}."""
        self.options |= {"block_type": kind, "block_index": i, "total_blocks": total}
        args = {**parts, "pe": None, "attn_mask": self.mask, "transformer_options": self.options}
        replace = self.replacement(kind, i)
        return replace({**args, "pe": self.pe}, {"original_block": run}) if replace else run(args)

    def controlled(self, img: Tensor, where: str, i: int, start: int) -> Tensor:
        """img plus what a control network wants added after block i, from row `start` on."""
        wanted = (self.control or {}).get(where) or []
        if self.picture and i < len(wanted) and wanted[i] is not None:
            added = wanted[i] if self.layout.order is None else wanted[i][:, self.layout.order]
            img[:, start : start + added.shape[1]] += added
        return img


class HostTransformer(Flux2Transformer):
    """Flux2Transformer with the forward that the host calls.

    `params` is plain and writable, and read at every forward: nodes of the host set
    `params.default_ref_method` as an object patch.
    """

    def __init__(
        self, config: TransformerConfig, dtype=None, device=None, operations=None, **params
    ):
        super().__init__(config, operations, dtype, device)
        self.dtype = dtype
        self.params = SimpleNamespace(**params)
        self.patch_size, self.in_channels, self.out_channels = (
            1,
            config.in_channels,
            config.in_channels,
        )

    def state_dict(self, *args, **kw):
        """Under the parameters' own names (`.weight` for the norms): the host looks keys up as
        attributes. Files read and written keep the checkpoint's `.scale`."""
        out = super().state_dict(*args, **kw)
        for key in [key for key in out if key.endswith("_norm.scale")]:
            out[key.removesuffix("scale") + "weight"] = out.pop(key)
        return out

    def forward(
        self,
        x,
        timestep,
        context,
        y=None,
        guidance=None,
        ref_latents=None,
        control=None,
        transformer_options=None,
        **kw,
    ):
        """The host's contract: x (B, 128, h, w), timestep (B,) in [0, 1] -> velocity, like x."""
        options = transformer_options or {}
        extension = comfy.patcher_extension
        return extension.WrapperExecutor.new_class_executor(
            self._forward,
            self,
            extension.get_all_wrappers(extension.WrappersMP.DIFFUSION_MODEL, options),
        ).execute(x, timestep, context, y, guidance, ref_latents, control, options, **kw)

    def _forward(
        self,
        x,
        timestep,
        context,
        y=None,
        guidance=None,
        ref_latents=None,
        control=None,
        transformer_options=None,
        **kw,
    ):
        controls = steer(
            dict(transformer_options or {}),
            kw.get("flux2_kit"),
            (x.shape[2], x.shape[3]),
            control=control,
            method=kw.get("ref_latents_method") or self.params.default_ref_method,
            mask=kw.get("attention_mask"),
        )
        run, references = super().forward, ref_latents or ()
        if found := windows_of(transformer_options, x, controls):
            every, overlap = found

            def look(window):
                bent = replace(seen_from(window, controls), options=dict(controls.options))
                return run(window.cut(x), timestep, context, guidance, references, bent)

            return blend(x, every, overlap, look)
        return run(x, timestep, context, guidance, references, controls)

    def embed(self, x, timestep, context, guidance, references, controls: HostControls):
        made = super().embed(x, timestep, context, guidance, references, controls)
        options = controls.options
        if made.layout.references:
            options["reference_image_num_tokens"] = list(made.layout.lengths)
        s = HostStream(**vars(made), options=options, control=controls.control, mask=controls.mask)
        if s.patches("post_input"):
            self._post_input(s, context, references, controls)
            if s.img.shape[1] != s.picture + s.layout.references:
                self._shorten(s, timestep, guidance, controls)
        return s

    def positions(self, text, size, shapes, controls: HostControls, device):
        grids = places(size, shapes, controls.method, self.params.ref_index_scale, controls.origin)
        return table(text, grids, controls.bend, self.config.axes_dim, self.config.theta, device)

    def _post_input(self, s: HostStream, context, references, controls: HostControls):
        """Let patches change the sequence before its positions are turned into angles."""
        steered = controls.references or controls.regions or controls.negative
        if steered or controls.cache is not None:
            raise Flux2Error(
                "Another node changes the model's sequence, which controlled references cannot follow",
                "a post_input patch, for instance of Flux KV Cache",
                "Remove that node (FLUX.2 Reference Cache does its work), or set the controls to their defaults",
            )
        shapes = tuple((r.shape[2], r.shape[3]) for r in references)
        grids = places(
            s.size, shapes, controls.method, self.params.ref_index_scale, controls.origin
        )
        txt_ids, img_ids = (
            i.expand(s.img.shape[0], -1, -1).to(s.img.device)
            for i in ids(context.shape[1], grids, controls.bend)
        )
        state = {
            "img": s.img,
            "txt": s.txt,
            "img_ids": img_ids,
            "txt_ids": txt_ids,
            "transformer_options": s.options,
        }
        for patch in s.patches("post_input"):
            state = {**patch(state), "transformer_options": s.options}
        all_ids = torch.cat((state["txt_ids"], state["img_ids"]), 1)
        cos, sin = angles(all_ids.cpu(), self.config.axes_dim, self.config.theta)
        s.img, s.txt = state["img"], state["txt"]
        s.rope = cos[:, None].to(s.img.device), sin[:, None].to(s.img.device)

    def _shorten(self, s: HostStream, timestep, guidance, controls: HostControls):
        """What the rows are after a patch took some away (or added some) at the end."""
        rows, kv = s.img.shape[1] - s.picture, self.isolates(controls)
        sight = isolation(s.txt.shape[1], s.picture, rows) if kv else None
        s.layout = replace(s.layout, text=s.txt.shape[1], references=rows, table=sight, last=None)
        still = rows if kv or controls.still else 0
        s.vec, s.img_mod, s.txt_mod, s.single_mod = self.modulations(
            timestep, guidance, s.img.dtype, still
        )

    def double(self, i: int, s: HostStream) -> tuple[Tensor, Tensor]:
        block = self.double_blocks[i]

        def run(args):
            rope = self._rope(s, args)
            attend = partial(self._attend, s, args, i, turned=bool(rope))
            img, txt = block(args["img"], args["txt"], *args["vec"], rope, attend)
            return {"img": _finite(img), "txt": _finite(txt)}

        vec = (s.img_mod, s.txt_mod)
        out = s.block("double", i, len(self.double_blocks), run, img=s.img, txt=s.txt, vec=vec)
        return s.controlled(out["img"], "input", i, 0), out["txt"]

    def single(self, i: int, s: HostStream) -> Tensor:
        block, total = self.single_blocks[i], len(self.single_blocks)
        s.options["img_slice"] = [s.text, s.img.shape[1]]
        rows = slice(s.text, s.text + s.picture) if i == total - 1 and self._alone(i, s) else None

        def run(args):
            number = len(self.double_blocks) + i
            rope = self._rope(s, args)
            attend = partial(self._attend, s, args, number, rows=rows, turned=bool(rope))
            return {"img": _finite(block(args["img"], args["vec"], rope, attend, rows))}

        out = s.block("single", i, total, run, img=s.img, vec=s.single_mod)
        return s.controlled(out["img"], "output", i, s.text if rows is None else 0)

    def _alone(self, i: int, s: HostStream) -> bool:
        """True where nobody but us looks at block i: then its unread rows need not exist."""
        watched = (
            s.patches("attn1_patch")
            or s.patches("attn1_output_patch")
            or s.replacement("single", i)
        )
        return not watched and s.mask is None and "optimized_attention_override" not in s.options

    def _rope(self, s: HostStream, args: dict):
        """The tables for a block that turns its heads itself; none where a patch of another pack
        wants to see them before."""
        return () if s.patches("attn1_patch") else s.table(args.get("pe"))

    def _attend(
        self, s: HostStream, args: dict, block: int, q: Tensor, k: Tensor, v: Tensor, rows=None,
        turned: bool = False,
    ):  # fmt: skip
        """q, k (before RoPE unless `turned`), v (B, H, L, D) -> (B, L, H * D), past the patches of
        other packs."""
        options = args.get("transformer_options") or s.options
        pe, mask = args.get("pe"), args.get("attn_mask")
        extra = {**options, "img_slice": [s.text, q.shape[2]]}
        for patch in s.patches("attn1_patch"):
            pe = s.pe if pe is None else pe
            out = patch(q, k, v, pe=pe, attn_mask=mask, extra_options=extra)
            q, k, v = out.get("q", q), out.get("k", k), out.get("v", v)
            pe, mask = out.get("pe", pe), out.get("attn_mask", mask)
        if not turned:
            rope = s.table(pe)
            q = rotate(q, *(_cut(t[..., rows, :] if rows else t, q) for t in rope))
            k = rotate(k, *(_cut(t, k) for t in rope))
        kernel = partial(_kernel, heads=self.config.heads, mask=mask, options=options)
        out = s.attention(block, kernel)(q, k, v)
        for patch in s.patches("attn1_output_patch"):
            out = patch(out, extra)
        return out


def _cut(table: Tensor, x: Tensor) -> Tensor:
    """The table's first rows, as many as x has: a KV cache leaves queries shorter than keys."""
    return table[..., : x.shape[2], :]


def _kernel(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None, options: dict
) -> Tensor:
    """The host's attention, with whatever the user chose for it."""
    if mask is not None and mask.ndim > 1:
        mask = mask[..., : q.shape[2], : k.shape[2]]
    return optimized_attention(
        q, k, v, heads, mask=mask, skip_reshape=True, transformer_options=options
    )


def _finite(x: Tensor) -> Tensor:
    """In float16 the residual streams can overflow: keep them inside its range."""
    return (
        torch.nan_to_num(x, nan=0.0, posinf=65504, neginf=-65504) if x.dtype == torch.float16 else x
    )


def unet_config(config: TransformerConfig) -> dict:
    """Our config in the host's words. Derived from shapes: older hosts take every FLUX.2 for dev."""
    return {
        "image_model": "flux2",
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "vec_in_dim": None,
        "context_in_dim": config.context_dim,
        "hidden_size": config.hidden_size,
        "mlp_ratio": float(config.mlp_ratio),
        "num_heads": config.heads,
        "depth": config.double_blocks,
        "depth_single_blocks": config.single_blocks,
        "axes_dim": list(config.axes_dim),
        "theta": config.theta,
        "patch_size": 1,
        "qkv_bias": False,
        "guidance_embed": config.guidance_embed,
        "txt_ids_dims": [3],
        "global_modulation": True,
        "mlp_silu_act": True,
        "ops_bias": False,
        "default_ref_method": "index",
        "ref_index_scale": 10.0,
    }


class Config(comfy.supported_models.Flux2):
    """The host's description of FLUX.2, for any size and any spelling of the norms."""

    def __init__(self, config: TransformerConfig):
        super().__init__(unet_config(config))
        # Activations grow with the width: 0.3.75 says dev's figure for every size.
        self.memory_usage_factor = 3.1 * 4.0 * config.hidden_size / 2604

    def process_unet_state_dict(self, state_dict):
        return state_dict

    def process_unet_state_dict_for_saving(self, state_dict):
        def name(key):
            return key.removesuffix("weight") + "scale" if key.endswith("_norm.weight") else key

        return super().process_unet_state_dict_for_saving(
            {name(k): v for k, v in state_dict.items()}
        )


class Model(comfy.model_base.Flux2):
    """The host's FLUX.2 with our transformer inside; `variant` says what `auto` means."""

    def __init__(self, config: TransformerConfig, model_config: Config, variant: Variant | None):
        super().__init__(model_config, device=None, unet_model=partial(HostTransformer, config))
        self.config, self.variant = config, variant

    def encode_adm(self, **kwargs):
        return None  # FLUX.2 has no pooled text

    def _apply_model(
        self,
        x,
        t,
        c_concat=None,
        c_crossattn=None,
        control=None,
        transformer_options=None,
        **kwargs,
    ):
        """The host's pass; one that fp8 made overflow is repeated without it."""
        options = {} if transformer_options is None else transformer_options

        def forget():
            for key in (CACHE, STEPS):
                if (cache := options.get(key)) is not None:
                    cache.clear()

        run = super()._apply_model
        run = partial(run, x, t, c_concat, c_crossattn, control, options, **kwargs)
        return guarded(self.diffusion_model, run, forget)

    def extra_conds(self, **kwargs):
        """As the host's, but short texts are padded to this model's length, on the left."""
        out = super(comfy.model_base.Flux2, self).extra_conds(**kwargs)
        text = kwargs.get("cross_attn")
        if text is not None:
            short = max(0, self.config.text_length - text.shape[1])
            out["c_crossattn"] = comfy.conds.CONDRegular(F.pad(text, (0, 0, short, 0)))
        check_batches(kwargs.get("reference_latents"), kwargs.get("noise"))
        if kit := kwargs.get("flux2_kit"):
            rows = 0 if text is None else text.shape[1]
            out["flux2_kit"] = Steering.of(kit, max(self.config.text_length, rows))
        return out
