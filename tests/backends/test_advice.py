"""Advice on links, for hosts that are not at hand."""

from __future__ import annotations

from distri.backends.torch_distributed.advice import advice_on_links


def advice(num_gpus=8, apart=(), **environment):
    settings = {"LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "8", **environment}
    return advice_on_links(settings, num_gpus, lambda a, b: (a, b) not in apart)


def test_gpus_that_reach_each_other_need_no_advice():
    assert advice() == []
    assert advice(num_gpus=0, WORLD_SIZE="16") == []


def test_a_pair_that_is_apart_is_named():
    (sentence,) = advice(apart={(1, 2), (1, 3)})
    assert sentence.startswith("GPU 1 and GPU 2 cannot reach each other directly (2 pairs cannot)")


def test_settings_that_slow_things_down_are_named():
    (sentence,) = advice(NCCL_P2P_DISABLE="1", apart={(0, 1)})
    assert sentence.startswith("NCCL_P2P_DISABLE=1")
    sentences = advice(WORLD_SIZE="16", NCCL_IB_DISABLE="1")
    assert [text.split(":")[0] for text in sentences] == ["several hosts", "NCCL_IB_DISABLE=1"]
    assert advice(WORLD_SIZE="16", NCCL_SOCKET_IFNAME="eth1") == []
