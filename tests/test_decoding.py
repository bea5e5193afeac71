"""Each rank decodes its patch: the picture is that of one device, on every backend."""

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from distri.backends.in_process import InProcessBackend
from distri.core.plan import ImageRequest, Plan
from distri.core.planner import PlanRequest, make_plan
from distri.core.policy import ExchangeKind
from distri.decoding import PatchDecoder, decoder_plan
from distri.errors import ModelError
from distri.launch import run_ranks
from distri.models.demo import checkpoint_path
from distri.models.presets import load_graph

SIDES = (192, 160)


def plan_for(ranks: int, cfg_split: bool = False) -> Plan:
    return make_plan(PlanRequest(ImageRequest(*SIDES, 2), ranks, cfg_split), load_graph("demo"))


def make_vae(has_attention: bool) -> AutoencoderKL:
    """SDXL's kind of decoder at a hundredth of its width."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        norm_num_groups=4,
        mid_block_add_attention=has_attention,
    )
    return vae.eval()


def latent() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, 4, SIDES[0] // 8, SIDES[1] // 8, generator=generator)


def in_process(plan: Plan) -> InProcessBackend:
    return InProcessBackend(plan)


@pytest.mark.parametrize("has_attention", [True, False])
@pytest.mark.parametrize(("ranks", "cfg_split"), [(2, False), (3, False), (4, True)])
@torch.inference_mode()
def test_a_picture_decoded_in_patches_is_that_of_one_device(
    has_attention: bool, ranks: int, cfg_split: bool
) -> None:
    vae, z_BChw = make_vae(has_attention), latent()
    alone = vae.decode(z_BChw).sample
    decoder = PatchDecoder(vae, plan_for(ranks, cfg_split), in_process)
    try:
        together = [vae.decode(z_BChw).sample for _ in range(2)]
    finally:
        decoder.close()
    assert torch.allclose(together[0], alone, atol=1e-5)
    assert torch.equal(together[0], together[1])
    assert torch.equal(vae.decode(z_BChw).sample, alone)
    assert not any(hasattr(module, "_diffusers_hook") for module in vae.modules())


def test_attention_in_the_decoder_reads_the_keys_of_all_patches() -> None:
    plan = decoder_plan(make_vae(has_attention=True), plan_for(3), "float32")
    contexts = [e for e in plan.exchanges if e.kind is ExchangeKind.CONTEXT]
    assert [(e.layer, e.level) for e in contexts] == [("mid_block.attentions.0", 8)]


@torch.inference_mode()
def test_a_picture_of_another_size_is_decoded_as_a_whole() -> None:
    vae = make_vae(has_attention=True)
    small = latent()[..., :8, :8]
    alone = vae.decode(small).sample
    decoder = PatchDecoder(vae, plan_for(2), in_process)
    try:
        assert torch.equal(vae.decode(small).sample, alone)
        vae.enable_tiling()
        assert vae.decode(latent()).sample.shape == (1, 3, *SIDES)
    finally:
        decoder.close()


def test_a_decoder_of_another_kind_is_refused() -> None:
    with pytest.raises(ModelError, match="a decoder of AutoencoderTiny cannot be split"):
        PatchDecoder(AutoencoderTiny(), plan_for(2), in_process)


def decode_as_rank(arguments: dict[str, int], report: object) -> list[float]:
    """Rank 0's picture, in a process of its own; other ranks have another latent, which does not count."""
    from distri.pipeline import open_backend

    plan = plan_for(arguments["ranks"])
    backend = open_backend("torch", plan)
    vae = make_vae(has_attention=True)
    decoder = PatchDecoder(vae, plan, backend.for_plan)
    with torch.inference_mode():
        z_BChw = latent() if backend.local_ranks[0] == 0 else torch.zeros_like(latent())
        picture = vae.decode(z_BChw).sample
    decoder.close()
    backend.close()
    return [float(value) for value in picture.flatten()[:: arguments["stride"]]]


@torch.inference_mode()
def test_gloo_and_in_process_decode_to_the_same_bits() -> None:
    vae, stride = make_vae(has_attention=True), 97
    decoder = PatchDecoder(vae, plan_for(2), in_process)
    torch.set_num_threads(2)  # one for each rank, as the processes have
    try:
        ours = vae.decode(latent()).sample.flatten()[::stride].tolist()
    finally:
        decoder.close()
    target = "tests.test_decoding:decode_as_rank"
    assert run_ranks(2, target, {"ranks": 2, "stride": stride}, timeout_s=30) == ours


def test_the_shipped_decoder_needs_no_graph_of_its_own_on_disk() -> None:
    vae = AutoencoderKL.from_pretrained(checkpoint_path() / "vae", local_files_only=True)
    plan = decoder_plan(
        vae, make_plan(PlanRequest(ImageRequest(512, 512, 2), 2), load_graph("demo")), "float32"
    )
    assert [(p.rows.start, p.rows.stop) for p in plan.partition.patches] == [(0, 256), (256, 512)]
    assert plan.exchanges[-1].shape == (1, 3, 512, 512)
