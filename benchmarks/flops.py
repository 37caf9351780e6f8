"""What a photograph costs at the true sizes of Stable Diffusion, counted and not measured: no weights, no GPU.

python -m benchmarks.flops --json benchmarks/results/flops.json      (5 minutes)

The code's own steps run on meta tensors, which have shapes but no data. PyTorch's counter adds up the floating-point
operations of matrix products, convolutions and attention; `PeakBytes` the bytes of all tensors that live at once. A
photograph is a fit and one new prompt. The largest number of steps is counted, as if nothing stopped early.
"""

import json
import weakref
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from unittest import mock

import torch
import typer
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from diffcolor_core.adapters import trainable_copy
from diffcolor_core.config import PRESETS, SamplingSettings, Settings, preset
from diffcolor_core.diffusion import ddim_sample, ddim_timesteps
from diffcolor_core.models import Checkpoint, XLCheckpoint
from diffcolor_core.regions import TIMESTEPS, RegionalPrompts
from diffcolor_core.stage1 import Texts, prior_loss
from diffcolor_core.stage2 import reconstruction_loss
from support.checkpoints import build_networks

META = torch.device("meta")
aten = torch.ops.aten
FUSED = aten._scaled_dot_product_flash_attention_for_cpu
FUSED_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward
VERSIONS = {"sd15": "1.5", "sdxl": "xl"}
SDXL_RANK = 4
"""SDXL has adapters in every preset, as it is served with no other: all weights, trained, are 41 GB by themselves."""
NUM_PARTS = 3
"""Colours of the new prompt. With regional prompts each makes its own part of the picture."""


def fused_attention() -> Any:
    """A context in which attention is one operation that does not keep its matrix, as GPUs compute it."""
    return mock.patch.object(F, "scaled_dot_product_attention", lambda *qkv, **_: FUSED(*qkv[:3])[0])


def count_flop() -> FlopCounterMode:
    """PyTorch's counter, with fused attention on the CPU counted as it counts the GPU's."""
    return FlopCounterMode(display=False, custom_mapping={FUSED: _fused_flop, FUSED_BACKWARD: _fused_backward_flop})


def _fused_flop(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _fused_backward_flop(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


class Cost(NamedTuple):
    """What a step or a call costs: floating-point operations, and the most bytes that live at once."""

    flop: float
    peak_bytes: int


class Stage(NamedTuple):
    """A part of the work on a photograph: `steps` times the same cost."""

    steps: int
    cost: Cost

    @property
    def flop(self) -> float:
        """Of all steps."""
        return self.steps * self.cost.flop


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that live at once, `held` ones included. What kernels use inside is not seen."""

    def __init__(self, *held: nn.Module) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._alive: set[int] = set()
        for module in held:
            self._see([*module.parameters(), *module.buffers()])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._see(tree_leaves(result))
        return result

    def _see(self, values: list[Any]) -> None:
        for value in values:
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self._alive:
                    self._alive.add(storage._cdata)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)

    def _freed(self, identity: int, num_bytes: int) -> None:
        self._alive.discard(identity)
        self.live -= num_bytes


def meta_checkpoint(
    networks: Any, *, alike: Checkpoint | None = None, tiny_vae: AutoencoderTiny | None = None
) -> Checkpoint:
    """Networks on the meta device as a checkpoint. alike: whose schedule it has; by default Stable Diffusion's."""
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    for network in filter(None, (*networks, tiny_vae)):
        network.to(META).eval().requires_grad_(False)
    xl: dict[str, Any] = {}
    if networks.text_encoder_2 is not None:
        xl = {"text_encoder_2": networks.text_encoder_2, "second_padding": 0, "empty_is_zero": True}
    return (XLCheckpoint if xl else Checkpoint)(
        vae=networks.vae,
        unet=networks.unet,
        text_encoder=networks.text_encoder,
        tokenizer=None,  # type: ignore[arg-type]  # texts come as embeds
        scheduler=scheduler if alike is None else alike.scheduler,
        clip=networks.clip,
        clip_tokenizer=None,  # type: ignore[arg-type]
        clip_image_mean=(0.5, 0.5, 0.5),
        clip_image_std=(0.25, 0.25, 0.25),
        model_id="meta",
        model_revision="",
        device=META,
        dtype=torch.float32,
        tiny_vae=tiny_vae,
        **xl,
    )


def cost_of(call: Callable[[], Any], *held: nn.Module) -> Cost:
    """The cost of one call, while these modules are in memory."""
    with count_flop() as counter, fused_attention():
        call()
    with PeakBytes(*held) as memory, fused_attention():  # apart, as the other count's hooks keep tensors
        result = call()
    del result
    return Cost(counter.get_total_flops(), memory.peak)


def step_cost(loss_of: Callable[[], Tensor], trained: list[Tensor], *held: nn.Module) -> Cost:
    """The cost of one step of Adam on the `trained` tensors, as every step after the first has it."""

    def step() -> None:
        loss_of().backward()
        torch.optim.Adam(trained).step()

    cost = cost_of(step, *held)
    for tensor in trained:
        tensor.grad = None
    moments = 2 * sum(tensor.numel() * tensor.element_size() for tensor in trained)  # there from the first step on
    return Cost(cost.flop, cost.peak_bytes + moments)


class Counter:
    """Counts the stages of a photograph on one checkpoint on the meta device. Equal steps are counted once."""

    def __init__(self, checkpoint: Checkpoint, size_px: int | None = None) -> None:
        self.checkpoint = checkpoint
        self.size_px = size_px or checkpoint.native_size_px
        side = self.size_px // checkpoint.vae_factor
        self.z = torch.empty(1, checkpoint.unet.config.in_channels, side, side, device=META)
        width = checkpoint.unet.config.cross_attention_dim
        if isinstance(checkpoint, XLCheckpoint):
            width += checkpoint.text_encoder_2.config.projection_dim
        self.embeds = torch.empty(1, 77, width, device=META)
        self.resident = [part for part in vars(checkpoint).values() if isinstance(part, nn.Module)]
        self.prior_step = cache(self._prior_step)
        self.reconstruction_step = cache(self._reconstruction_step)
        self.sampling_step = cache(self._sampling_step)
        self.call = cache(self._call)

    def stages(self, settings: Settings, pictures: int = 1) -> dict[str, Stage]:
        """What a fit and one new prompt cost, by stage; of `pictures` photographs in one batch.

        What is not optimised is done for one photograph after the other. The text towers are left out: all prompts
        together cost less than one step.
        """
        one, two = settings.stage1, settings.stage2
        apart = pictures if one.adapter_rank else 1  # a batch needs adapters: without, its photographs count as draws
        draws, batch = settings.batch_size * pictures // apart, settings.batch_size * pictures
        primary = settings.sampling.model_copy(update={"strength": one.strength or settings.sampling.strength})
        asked = self._prior_settings(settings, draws)
        align = Stage(int(settings.alignment.enabled), self.call("align"))
        regional = NUM_PARTS if two.regional_prompts else 1
        looked_for = Stage(1, self.call("regions"))  # they also tell whether the colours came out
        return {
            "stage 1": Stage(one.num_steps, self.prior_step(asked, apart)),
            "embedding": Stage(two.embedding_steps, self.reconstruction_step(batch, "embedding", None, two.recompute)),
            "fine-tune": Stage(
                two.model_steps, self.reconstruction_step(batch, "model", two.adapter_rank, two.recompute)
            ),
            "sampling, primary": self._sampling(primary, 1, one.adapter_rank),
            "sampling, prompt": self._sampling(settings.sampling, regional, two.adapter_rank),
            "encode": Stage(3, self.call("encode")),  # for stage 1, for stage 2, for the prompt
            "decode": Stage(2, self.call("decode")),
            "align": Stage(2 * align.steps, align.cost),
            "regions": looked_for,
        }

    @staticmethod
    def _prior_settings(settings: Settings, batch: int) -> Settings:
        """Only what a step of stage 1 depends on, so that equal steps are counted once."""
        one = settings.stage1
        names = ("adapter_rank", "num_views", "diffusion_target", "anti_color_prompts", "recompute", "tiny_decoder")
        kept = {name: getattr(one, name) for name in names} | {"contrastive_weight": float(one.contrastive_weight > 0)}
        return Settings(batch_size=batch, stage1=type(one)(**kept))

    def _fitted(self, rank: int | None, pictures: int = 1) -> tuple[UNet2DConditionModel, list[Tensor]]:
        unet = trainable_copy(self.checkpoint.unet, rank, [torch.Generator() for _ in range(pictures)])
        return unet, [p for p in unet.parameters() if p.requires_grad]

    def _prior_step(self, settings: Settings, pictures: int) -> Cost:
        unet, trained = self._fitted(settings.stage1.adapter_rank, pictures)
        features = self.checkpoint.clip.config.projection_dim
        num_negatives = len(settings.stage1.anti_color_prompts)
        clip = [torch.empty(count, features, device=META) for count in (pictures, num_negatives)]
        texts = Texts(self.embeds.expand(pictures, -1, -1), *clip)
        z, draws = self.z.expand(pictures, -1, -1, -1), [torch.Generator() for _ in range(pictures)]
        loss_of = lambda: prior_loss(self.checkpoint, unet, z, texts, settings, draws)[0].sum()  # noqa: E731
        return step_cost(loss_of, trained, *self.resident, unet)

    def _reconstruction_step(self, batch: int, part: str, rank: int | None, recompute: bool) -> Cost:
        unet, trained = self._fitted(rank) if part == "model" else (self.checkpoint.unet, [])
        embeds = self.embeds.clone()
        if part == "embedding":
            trained = [embeds.requires_grad_(True)]
        draws = [torch.Generator()]
        loss_of = partial(reconstruction_loss, self.checkpoint, unet, self.z, embeds, batch, draws, recompute)
        return step_cost(loss_of, trained, *self.resident, unet)

    def _sampling(self, settings: SamplingSettings, parts: int, rank: int | None) -> Stage:
        steps = len(ddim_timesteps(self.checkpoint.scheduler, settings.num_steps, settings.strength))
        guided = settings.guidance_scale > 1
        projection = None if not settings.project_luminance else "tiny" if settings.tiny_projection else "whole"
        return Stage(steps, self.sampling_step(parts, rank, guided, projection))

    def _sampling_step(self, parts: int, rank: int | None, guided: bool, projection: str | None) -> Cost:
        checkpoint, (unet, _) = self.checkpoint, self._fitted(rank)
        side = self.z.shape[-1]
        tiny = projection == "tiny" and checkpoint.tiny_vae is not None

        def project(z_0: Tensor) -> Tensor:  # as `luminance_projection`, without the conversion of colours
            x_0 = checkpoint.decode(z_0, tiny)
            if not tiny:
                return checkpoint.encode(x_0)
            return z_0 + checkpoint.encode(x_0, tiny) - checkpoint.encode(x_0, tiny)

        regional = RegionalPrompts(torch.zeros(parts, dtype=torch.long), torch.empty(parts, side, side, device=META))
        return cost_of(
            lambda: ddim_sample(
                partial(regional.predict, partial(checkpoint.predict, unet)),
                checkpoint.scheduler,
                self.z,
                torch.tensor([500]),
                self.embeds.expand(parts, -1, -1),
                self.embeds,
                guidance_scale=2.0 if guided else 1.0,
                correct_clean=project if projection else None,
            ),
            *self.resident,
            unet,
        )

    def _call(self, what: str) -> Cost:
        """encode, decode: of the VAE. align: equation (4)'s features. regions: the attention that is recorded."""
        checkpoint = self.checkpoint
        x = torch.empty(1, 3, self.size_px, self.size_px, device=META)

        def predict(rows: int) -> Tensor:
            z, embeds = self.z.expand(rows, -1, -1, -1), self.embeds.expand(rows, -1, -1)
            return checkpoint.predict(checkpoint.unet, z, torch.zeros(rows, device=META), embeds)

        def call() -> Any:
            if what == "decode":
                return checkpoint.decode(self.z)
            if what == "encode":
                return checkpoint.encode(x)
            if what == "align":
                return checkpoint.encode(torch.cat((x, x))), predict(2)
            rows = len(TIMESTEPS)
            z, embeds = self.z.expand(rows, -1, -1, -1), self.embeds.expand(rows, -1, -1)
            return checkpoint.encode(x), checkpoint.word_maps(z, torch.zeros(rows, device=META), embeds)

        with torch.no_grad():
            return cost_of(call, *self.resident)


def table(counter: Counter, settings: Settings) -> dict[str, Any]:
    """TFLOP of a photograph, in all and by stage, and GiB at the peak for one photograph and for eight in a batch."""
    stages = counter.stages(settings)
    peaks = {
        pictures: max(stage.cost.peak_bytes for stage in counter.stages(settings, pictures).values() if stage.steps)
        for pictures in (1, 8)
    }
    return {
        "tflop": round(sum(stage.flop for stage in stages.values()) / 1e12, 2),
        "peak_gib": {str(pictures): round(peak / 2**30, 2) for pictures, peak in peaks.items()},
        "tflop_by_stage": {name: round(stage.flop / 1e12, 3) for name, stage in stages.items()},
    }


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Store the table in this file.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="sd15, sdxl; both by default.")] = None,
    name: Annotated[list[str] | None, typer.Option("--preset", help="Presets; all but `photo`'s by default.")] = None,
) -> None:
    """Count floating-point operations and peak memory of a photograph for each preset, in float32."""
    figures: dict[str, Any] = {}
    for key in model or VERSIONS:
        with META:
            networks, tiny_vae = build_networks(VERSIONS[key]), AutoencoderTiny()  # its defaults are TAESD's
        counter = Counter(meta_checkpoint(networks))
        with_tiny = Counter(meta_checkpoint(networks, tiny_vae=tiny_vae))
        figures[key] = {}
        for one in name or [n for n, settings in PRESETS.items() if not settings.color_prior]:
            rank = {"stage1.adapter_rank": SDXL_RANK, "stage2.adapter_rank": SDXL_RANK} if key == "sdxl" else {}
            settings = preset(one, rank)
            rows = {one: table(counter, settings)}
            if settings.stage1.tiny_decoder or settings.sampling.tiny_projection:
                rows[f"{one}, tiny VAE"] = table(with_tiny, settings)
            print(key, json.dumps(rows), flush=True)
            figures[key] |= rows
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
