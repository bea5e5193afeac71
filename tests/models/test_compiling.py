"""Regions that are compiled, and compilers that are not there."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention import FeedForward
from torch import nn

from distri.errors import ModelError
from distri.models.compiling import check_compiler, compile_regions, regions_of
from tests.toys import toy, toy_plan


def test_a_compiler_that_is_not_installed_is_named_with_its_package():
    with pytest.raises(
        ModelError, match=r"no compiler 'tvm' here; install apache-tvm, or choose one of .*inductor"
    ):
        check_compiler("tvm")
    with pytest.raises(ModelError, match="no compiler 'cleverest' here; known here: "):
        check_compiler("cleverest")


def test_feed_forward_parts_are_compiled_and_compute_what_they_did():
    model, graph = toy()
    model.ff = nn.Sequential(FeedForward(8), FeedForward(8))
    assert len(regions_of(model)) == 2
    x = torch.randn(2, 5, 8)
    before = model.ff(x)
    assert compile_regions(model, toy_plan(graph, 2), "eager") == 2
    assert torch.equal(model.ff(x), before)


def test_a_model_without_such_parts_says_so():
    model, graph = toy()
    with pytest.raises(ModelError, match="no feed-forward part"):
        compile_regions(model, toy_plan(graph, 2), "eager")
