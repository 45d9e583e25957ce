"""Channels: a link between a role that fills shared tiles by TMA and the warps that read them.

Each stage has a `full` barrier (one arrival, and the bytes of the copies) and an `empty` one (one arrival
per reading warp). Only a role's own loop may advance its end: an end advanced inside a helper, or held in
a frozen dataclass, silently stands still.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import cutlass.cute as cute
from cutlass import pipeline

from .topology import Barriers


class Channel(NamedTuple):
    """The two ends of a link: `producer.acquire_and_advance()`, `consumer.wait_and_advance()`."""

    producer: pipeline.PipelineProducer
    consumer: pipeline.PipelineConsumer


def channel(base: cute.Pointer, barriers: Barriers, nbytes: int, ctas: int = 1) -> Channel:
    """A channel whose slots are tiles of `nbytes` bytes. base: the CTA's barriers, 8-byte words.

    ctas: 1, or 2 for a pair, each of which copies into both and hears of the release by both.
    `channels_ready` must follow before either end is used.
    """
    made = pipeline.PipelineTmaAsync.create(
        barrier_storage=base + barriers.first,
        num_stages=barriers.slots,
        tx_count=nbytes,
        producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread),
        consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, barriers.empty_arrivals),
        cta_layout_vmnk=cute.make_layout((1, 1, ctas, 1)),
        defer_sync=True,
    )
    return Channel(*made.make_participants())


def mma_channel(base: cute.Pointer, barriers: Barriers, nbytes: int, ctas: int = 1) -> Channel:
    """The same for a warp that reads with tcgen05: a release waits for the products that it has begun.

    ctas: 1, or 2 for a pair, whose leader counts what both copy and whose release both hear.
    """
    made = pipeline.PipelineTmaUmma.create(
        barrier_storage=base + barriers.first,
        num_stages=barriers.slots,
        tx_count=nbytes * ctas,
        producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread),
        consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread),
        cta_layout_vmnk=cute.make_layout((ctas, 1, 1, 1)),
        defer_sync=True,
    )
    if ctas == 2:
        # A pair is alone in its cluster; worked out from ranks the mask would keep a register.
        made = replace(made, consumer_mask=0b11)
    return Channel(*made.make_participants())


def channels_ready() -> None:
    """All threads of the CTA see the barriers of all channels."""
    cute.arch.mbarrier_init_fence()
    cute.arch.sync_threads()
