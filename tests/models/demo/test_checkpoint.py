"""The shipped checkpoint: small, whole, in diffusers' format, and it draws what it is told."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline
from safetensors.torch import load_file

from distri.models.demo import checkpoint_path
from distri.models.demo.checker import check
from distri.models.demo.evaluate import load_pipeline
from distri.models.demo.layouts import nominal_scene
from distri.models.demo.sentences import parse, vocabulary

_SENTENCE = "a red circle above a blue square on a white ground"


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionXLPipeline:
    return load_pipeline(checkpoint_path())


def _draw(pipeline: StableDiffusionXLPipeline, size: int, steps: int = 12) -> np.ndarray:
    image = pipeline(
        _SENTENCE,
        height=size,
        width=size,
        num_inference_steps=steps,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images[0]
    return np.asarray(image)


def test_naming_the_checkpoint_imports_no_torch() -> None:
    code = "import sys, distri.models.demo as d; assert d.checkpoint_path().is_dir(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_checkpoint_is_small_and_all_half_precision() -> None:
    files = [path for path in checkpoint_path().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 20e6
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == 4
    assert {t.dtype for path in weights for t in load_file(path).values() if t.is_floating_point()} == {
        torch.float16
    }


def test_the_configuration_names_no_machine() -> None:
    for path in checkpoint_path().rglob("*.json"):
        assert "_name_or_path" not in json.loads(path.read_text()) or path.name == "tokenizer.json"


def test_every_word_is_one_token(pipeline: StableDiffusionXLPipeline) -> None:
    for word in vocabulary():
        assert len(pipeline.tokenizer(word).input_ids) == 3


def test_the_denoiser_has_sdxl_blocks_on_three_levels(pipeline: StableDiffusionXLPipeline) -> None:
    config = pipeline.unet.config
    assert config.down_block_types == ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]
    assert config.up_block_types == ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]
    assert (config.addition_embed_type, config.use_linear_projection) == ("text_time", True)
    assert pipeline.vae_scale_factor == 8


def test_a_small_picture_obeys_its_words(pipeline: StableDiffusionXLPipeline) -> None:
    report = check(_draw(pipeline, 256), nominal_scene(parse(_SENTENCE)))
    assert report.words_obeyed
    assert report.ground


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_other_schedulers_draw_too(pipeline: StableDiffusionXLPipeline, scheduler: type) -> None:
    shipped = pipeline.scheduler
    pipeline.scheduler = scheduler.from_config(shipped.config)
    try:
        assert check(_draw(pipeline, 256, 16), nominal_scene(parse(_SENTENCE))).words_obeyed
    finally:
        pipeline.scheduler = shipped


def test_the_same_seed_gives_the_same_picture(pipeline: StableDiffusionXLPipeline) -> None:
    np.testing.assert_array_equal(_draw(pipeline, 128, 3), _draw(pipeline, 128, 3))


def test_a_broken_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="model_index"):
        load_pipeline(tmp_path)
