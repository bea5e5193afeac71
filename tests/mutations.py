"""Faults to seed on purpose.

A `Mutation` says where (module and attribute, possibly several places that hold the same function) and how: a function
that makes the broken version from the sound one. The check in `test_mutations.py` seeds each fault and asks which law
of `laws.py` falls first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from distri.core.policy import READS_LATE, ExchangeKind, Phase, Policy, PolicyRule
from distri.core.shape import Band, Rect
from distri.nn import group_norm
from distri.nn.codec import channels_last
from distri.nn.group_norm import merge_moments, normalise


@dataclass(frozen=True)
class Mutation:
    """One fault. `places` are `module:attribute`; `broken` makes the faulty version from the sound one."""

    name: str
    places: tuple[str, ...]
    broken: Callable[[Any], Any]


REQUIRED = ("distri.core.program:required_version",)
PHASE = tuple(f"distri.core.{module}:phase_of" for module in ("staleness", "program", "exchanger"))
MERGE = ("distri.core.ops.group_norm:merge", "distri.nn.group_norm:merge")


def version_shifted(change):
    """Late reads ask for another version."""

    def make(sound):
        def broken(policy, step, warmup_steps):
            version = sound(policy, step, warmup_steps)
            return change(version, step, warmup_steps) if policy in READS_LATE else version

        return broken

    return make


def latent_read_late(sound):
    def broken(table, layers):
        late = tuple(PolicyRule(ExchangeKind.HALO, Phase.STEADY, Policy.STALE, layer) for layer in layers)
        return sound(table, layers).with_rules(late)

    return broken


def frozen_at_the_first_step(sound):
    def broken(policy, step, warmup_steps):
        return 0 if policy is Policy.FROZEN else sound(policy, step, warmup_steps)

    return broken


def newest_instead_of_named(sound):
    def broken(self, key, version):
        sound(self, key, version)
        return self._slots[key][max(self._slots[key])]

    return broken


def sums_kept(sound):
    def broken(self):
        self._inner.begin_image()

    return broken


def step_kept(sound):
    def broken(self):
        self._transport.begin_image()

    return broken


def pieces_swapped(sound):
    return lambda x, own, window, rects, pieces: sound(x, own, window, rects, list(pieces)[::-1])


def rects_swapped(sound):
    return lambda x, own, window, rects, pieces: sound(
        x, own, window, list(rects)[::-1], list(pieces)[::-1][::-1]
    )


def sent_from_the_wrong_side(sound):
    def broken(geometry, shape, level, patches, patch):
        window = sound(geometry, shape, level, patches, patch)

        def moved(rect):
            before, own = rect.rows.start - window.own.rows.start, window.own.rows
            return Rect(Band(own.stop - before - rect.rows.size, own.stop - before), rect.cols)

        return dataclasses.replace(window, sent=tuple(map(moved, window.sent)))

    return broken


def narrower(sound):
    def broken(self, out, dim):
        band = sound(self, out, dim)
        return Band(band.start, band.stop - 1) if band.size > 1 else band

    return broken


def outermost_row_lost(sound):
    def broken(x, own, window, rects, pieces):
        grown = sound(x, own, window, rects, pieces)
        if window != own:
            grown = grown.clone()
            grown[..., -1, :] = 0
        return grown

    return broken


def padded_where_patches_meet(sound):
    def broken(geometry, shape, level, patches, patch):
        window = sound(geometry, shape, level, patches, patch)
        return dataclasses.replace(window, window=window.own, padding=geometry.padding)

    return broken


def own_left_out(sound):
    return lambda own, others: sound(others[0], others[1:]) if others else own


def own_twice(sound):
    return lambda own, others: sound(own, [*others, own]) if others else own


def own_subtracted(sound):
    def broken(own, others):
        whole = sound(own, others)
        return (
            torch.stack((whole[..., 0], 2 * others[0][..., 1] - whole[..., 1], whole[..., 2]), -1)
            if others
            else own
        )

    return broken


def local_count(sound):
    def broken(own, others):
        whole = sound(own, others)
        return torch.stack((own[..., 0], whole[..., 1], whole[..., 2]), -1)

    return broken


def old_own(sound):
    """Own moments of the previous step, as if this rank's change were not known."""

    def broken(self, module, x):
        context = self._ranks.current()
        exchange, last = self._exchange, f"old own of {self._exchange.layer}"
        own = group_norm.centred(x, module.num_groups)[0]
        context.exchanger.publish(exchange.layer, [own])
        others = context.exchanger.collect(exchange.layer)
        used = context.image_memo.get(last, (own, (own,)))[0]
        context.image_memo[last] = (own, (own,))
        if context.exchanger.step < context.exchanger.plan.warmup_steps:
            used = own
        for other in others or ():
            used = merge_moments(used, other)
        return normalise(x, used, module)

    return broken


def line_with(before, after):
    """A line of patches that merges other ranges than those before and after a patch."""

    def make(sound):
        def broken(self, exchange, value, own):
            count = self._plan.mesh.patch
            found = []
            for side in (before(self._patch, count), after(self._patch, count)):
                moments = [value(patch)[0] for patch in side]
                if moments:
                    total = moments[0]
                    for one in moments[1:]:
                        total = merge_moments(total, one)
                    found.append(total)
            return found

        return broken

    return make


def without_delta(sound):
    return lambda a, b: (*sound(a, b)[:2], a[2] + b[2])


def counts_swapped(sound):
    return lambda a, b: (a[0] + b[0], a[1] + (b[1] - a[1]) * (a[0] / (a[0] + b[0])), sound(a, b)[2])


def delta_once(sound):
    def broken(a, b):
        count = a[0] + b[0]
        return *sound(a, b)[:2], a[2] + b[2] + (b[1] - a[1]) * (a[0] * b[0] / count)

    return broken


def unbiased(sound):
    def broken(x, groups):
        moments, deviations = sound(x, groups)
        count, mean, m2 = moments.unbind(-1)
        return torch.stack((count, mean, m2 * count / (count - 1)), -1), deviations

    return broken


def squares_in_half(sound):
    def broken(x, groups):
        values = x.reshape(x.shape[0], groups, -1)
        mean = values.mean(-1)
        variance = ((values * values).mean(-1) - mean * mean).float()
        count = torch.full_like(variance, values.shape[-1])
        return torch.stack((count, mean.float(), variance * count), -1), sound(x, groups)[1]

    return broken


def centred_by_the_others(sound):
    """As if the deviations that are normalised were from the whole picture's mean already."""
    return lambda x, moments, module, about=None: sound(
        x, moments, module, None if about is None else moments[..., 1]
    )


def order_of_patches(make_order):
    def make(sound):
        def broken(self, exchange, value, own):
            order = make_order(list(range(self._plan.mesh.patch)))
            return [torch.cat([own[0] if p == self._patch else value(p)[0] for p in order])]

        return broken

    return make


def own_share_late(sound):
    return lambda self, exchange, value, own: [
        torch.cat([value(patch)[0] for patch in range(self._plan.mesh.patch)])
    ]


def without_feedback(sound):
    def broken(self, exchange, parts):
        payloads = sound(self, exchange, parts)
        for known, part in zip(self._sent.get(exchange.layer, ()), parts, strict=False):
            known.copy_(channels_last(part).float())
        return payloads

    return broken


def unrounded_sums(sound):
    def broken(self, exchange, parts):
        return sound(self, exchange, [part.float() for part in parts])

    return broken


def scaled(factor):
    return lambda sound: lambda *arguments: sound(*arguments) * factor


def high_bits_first(sound):
    return lambda integers, bits: sound(integers.flip(1) if bits < 8 else integers, bits)


def not_carried_forward(sound):
    def broken(self, exchange, version, own):
        return sound(self, dataclasses.replace(exchange, steady=Policy.STALE), version, own)

    return broken


def spreads_kept(sound):
    def broken(last, before, first):
        carried = sound(last, before, first)
        return torch.cat((carried[..., :2], last[..., 2:]), dim=-1)

    return broken


def always_bucketed(sound):
    return lambda plan, exchange, *more: exchange.bucket


def silent_last_warmup_step(sound):
    def broken(plan, exchange, step, *more):
        return step != plan.warmup_steps and sound(plan, exchange, step, *more)

    return broken


def overlapping(sound):
    def broken(*arguments, **more):
        partition = sound(*arguments, **more)
        first, *rest = partition.patches
        grown = Rect(Band(first.rows.start, first.rows.stop + 2), first.cols)
        return dataclasses.replace(partition, patches=(grown, *rest))

    return broken


NN, CORE, BOX = "distri.nn", "distri.core", "distri.backends.in_process:InProcessTransport"
RECON = f"{NN}.reconstruction:Reconstruction"
DECODE = (f"{NN}.codec:decode", f"{NN}.reconstruction:decode")
CARRY = (f"{NN}.reconstruction:carry_forward",)
CARRY_MOMENTS = (f"{NN}.reconstruction:carry_moments_forward",)

MUTATIONS = (
    Mutation("latent: read one step late", ("distri.core.planner:table_on_patch",), latent_read_late),
    Mutation(
        "latent: not gathered at the end",
        ("distri.sampling:PatchSampler._gathered",),
        lambda sound: lambda self, own: self._among_zeros(own),
    ),
    Mutation(
        "latent: each rank's own noise",
        ("tests.test_sampling:OneRank.broadcast",),
        lambda sound: lambda self, value: (sound(self, value), value)[1],
    ),
    Mutation("version: t-2 instead of t-1", REQUIRED, version_shifted(lambda v, *_: max(0, v - 1))),
    Mutation("version: fresh instead of stale", REQUIRED, version_shifted(lambda v, step, _: step)),
    Mutation("version: frozen at step 0", REQUIRED, frozen_at_the_first_step),
    Mutation(
        "version: whatever is newest", (f"{CORE}.buffers:VersionedBuffer.get",), newest_instead_of_named
    ),
    Mutation("version: warm-up a step longer", PHASE, lambda sound: lambda step, w: sound(step, w + 1)),
    Mutation(
        "version: warm-up a step shorter", PHASE, lambda sound: lambda step, w: sound(step, max(1, w - 1))
    ),
    Mutation(
        "image: buffers not cleared", (f"{CORE}.buffers:VersionedBuffer.clear",), lambda _: lambda self: None
    ),
    Mutation("image: sums not cleared", (f"{RECON}.begin_image",), sums_kept),
    Mutation("image: steps counted on", (f"{CORE}.exchanger:Exchanger.begin_image",), step_kept),
    Mutation(
        "messages: warm-up waits for its bucket",
        ("distri.core.exchanger:travels_in_bucket",),
        always_bucketed,
    ),
    Mutation(
        "messages: a step not published", ("distri.core.exchanger:is_published",), silent_last_warmup_step
    ),
    Mutation("bands: overlapping", (f"{CORE}.planner:make_partition",), overlapping),
    Mutation("halo: top and bottom swapped by the reader", (f"{NN}.conv2d:fill_window",), pieces_swapped),
    Mutation("halo: rectangles swapped by the reader", (f"{NN}.conv2d:fill_window",), rects_swapped),
    Mutation("halo: sent from the wrong side", (f"{NN}.conv2d:make_window",), sent_from_the_wrong_side),
    Mutation("halo: a row too few", (f"{CORE}.ops.conv2d:ConvGeometry.reads",), narrower),
    Mutation("halo: outermost row lost", (f"{NN}.conv2d:fill_window",), outermost_row_lost),
    Mutation("halo: zeros where patches meet", (f"{NN}.conv2d:make_window",), padded_where_patches_meet),
    Mutation("moments: own left out", (f"{NN}.group_norm:_merged",), own_left_out),
    Mutation("moments: own merged twice", (f"{NN}.group_norm:_merged",), own_twice),
    Mutation("moments: own change subtracted", (f"{NN}.group_norm:_merged",), own_subtracted),
    Mutation("moments: old own kept", (f"{NN}.group_norm:PatchGroupNorm.__call__",), old_own),
    Mutation("moments: this band's count", (f"{NN}.group_norm:_merged",), local_count),
    Mutation(
        "moments: own in the line before",
        (f"{BOX}._receive_moments",),
        line_with(lambda p, _: range(p + 1), lambda p, n: range(n - 1, p, -1)),
    ),
    Mutation(
        "moments: the line after forgets a patch",
        (f"{BOX}._receive_moments",),
        line_with(lambda p, _: range(p), lambda p, n: range(n - 1, p + 1, -1)),
    ),
    Mutation("merge: no term for the means", MERGE, without_delta),
    Mutation("merge: counts swapped", MERGE, counts_swapped),
    Mutation("merge: difference not squared", MERGE, delta_once),
    Mutation("moments: unbiased variance", (f"{NN}.group_norm:centred",), unbiased),
    Mutation("moments: E[x^2] - E[x]^2 in fp16", (f"{NN}.group_norm:centred",), squares_in_half),
    Mutation("moments: own mean not put back", (f"{NN}.group_norm:normalise",), centred_by_the_others),
    Mutation(
        "context: patches in reverse", (f"{BOX}._receive_context",), order_of_patches(lambda p: p[::-1])
    ),
    Mutation(
        "context: the last patch missing", (f"{BOX}._receive_context",), order_of_patches(lambda p: p[:-1])
    ),
    Mutation("context: own share late", (f"{BOX}._receive_context",), own_share_late),
    Mutation("codec: feedback dropped", (f"{RECON}._encoded",), without_feedback),
    Mutation("codec: sums rounded on one side", (f"{RECON}._encoded",), unrounded_sums),
    Mutation("codec: scale a hundredth off", DECODE, scaled(1.01)),
    Mutation("codec: sign lost", DECODE, scaled(-1)),
    Mutation("codec: values of a byte in reverse", (f"{NN}.codec:_pack",), high_bits_first),
    Mutation("extrapolation: left out", (f"{RECON}.receive",), not_carried_forward),
    Mutation(
        "extrapolation: without its limit", CARRY, lambda sound: lambda last, before, _: 2 * last - before
    ),
    Mutation(
        "extrapolation: the older change",
        CARRY,
        lambda sound: lambda last, *older: last + older[0] - older[1],
    ),
    Mutation("extrapolation: spreads of moments stand", CARRY_MOMENTS, spreads_kept),
)
