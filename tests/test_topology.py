"""Links between roles: the table says what the drawing says, and barriers follow from it."""

from __future__ import annotations

import importlib
import re

import pytest

from cute_flash.arch.common.topology import Barriers, Link, Topology
from cute_flash.arch.problem import Problem
from cute_flash.arch.sm90 import tuning as sm90
from cute_flash.arch.sm90.backward.topology import topology as hopper_backward
from cute_flash.arch.sm90.backward.tuning import BACKWARD
from cute_flash.arch.sm90.forward.topology import topology as hopper
from cute_flash.arch.sm90.latent import tuning as latent
from cute_flash.arch.sm90.latent.topology import topology as hopper_latent
from cute_flash.arch.sm90.widened import tuning as widened
from cute_flash.arch.sm90.widened.topology import topology as hopper_widened
from cute_flash.arch.sm100 import tuning as sm100
from cute_flash.arch.sm100.backward.topology import topology as blackwell_backward
from cute_flash.arch.sm100.backward.tuning import BACKWARD as BLACKWELL_BACKWARD
from cute_flash.arch.sm100.backward.tuning import SerialConfig
from cute_flash.arch.sm100.forward.topology import topology as blackwell
from cute_flash.arch.sm100.latent import tuning as blackwell_latent_tuning
from cute_flash.arch.sm100.latent.topology import topology as blackwell_latent
from cute_flash.arch.sm100.widened import tuning as blackwell_rows
from cute_flash.arch.sm100.widened.topology import topology as blackwell_widened

PROBLEM, MLA = Problem("bfloat16", 128, 128), Problem("bfloat16", 576, 512)
FULL = Link(name="full", producers=("a",), consumers=("b", "c"), slots=3)
KEPT = Link(name="kept", producers=("a", "b"), consumers=("c",), slots=2, emptied=False)
PAIR = Link(name="pair", producers=("b",), consumers=("b", "b"), slots=1, ctas=2)
ARRIVALS = {"a": 1, "b": 4, "c": 8}


def words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text))


def drawn(module: str) -> set[tuple[tuple[str, ...], str, tuple[str, ...]]]:
    """(producers, link, consumers) of every arrow in a module's docstring."""
    text = importlib.import_module(module).__doc__
    arrows = re.findall(r"^    ([\w, ]+) --([\w, ]+)--> (\w+(?:, \w+)*)", text, re.MULTILINE)
    return {(words(a), name, words(b)) for a, names, b in arrows for name in words(names)}


def linked(topology: Topology) -> set[tuple[tuple[str, ...], str, tuple[str, ...]]]:
    """The same of a table."""
    return {(link.producers, link.name, link.consumers) for link in topology.links}


@pytest.mark.parametrize(
    "module, topologies",
    [
        ("sm90.forward", [hopper(row.config) for row in sm90.ROWS]),
        ("sm90.latent", [hopper_latent(MLA, row.config) for row in latent.FORWARD.rows]),
        ("sm90.widened", [hopper_widened(row.config) for row in widened.TABLE.rows]),
        ("sm90.backward", [hopper_backward(row.config) for row in BACKWARD if row.config.ctas == 1]),
        ("sm100.forward", [blackwell(PROBLEM, row.config) for row in sm100.ROWS if row.config.tail]),
        ("sm100.latent", [blackwell_latent(MLA, r.config) for r in blackwell_latent_tuning.FORWARD.rows]),
        ("sm100.widened", [blackwell_widened(PROBLEM, row.config) for row in blackwell_rows.TABLE.rows]),
        ("sm100.backward", [blackwell_backward(r.config) for r in BLACKWELL_BACKWARD if r.config.ctas == 1]),
    ],
    ids=[
        "sm90", "sm90_latent", "sm90_widened", "sm90_backward", "sm100", "sm100_latent", "sm100_widened",
        "sm100_backward",
    ],
)
def test_the_drawing_is_the_table(module, topologies):
    found = drawn(f"cute_flash.arch.{module}.kernel")
    assert found
    for topology in topologies:
        assert linked(topology) == found


def test_short_blocks_have_no_tail():
    """Of Blackwell's forward kernels those that compute a block's P at once do not tell of its end apart."""
    found = drawn("cute_flash.arch.sm100.forward.kernel")
    for row in sm100.ROWS:
        without = found - linked(blackwell(PROBLEM, row.config))
        assert {name for _, name, _ in without} == ({"tail"} if row.config.tile_n == 32 else set())


@pytest.mark.parametrize(
    "tree, rows, topology_of, more",
    [("sm90", BACKWARD, hopper_backward, 1), ("sm100", BLACKWELL_BACKWARD, blackwell_backward, 5)],
    ids=["sm90", "sm100"],
)
def test_pairs_have_more_links(tree, rows, topology_of, more):
    """Drawn where they are used. Columns that come to the places of rows come by the rows' links."""
    kernel, pair = (drawn(f"cute_flash.arch.{tree}.backward.{module}") for module in ("kernel", "pair"))
    assert len(pair) == more
    for row in rows:
        if row.config.ctas == 2:
            serial = isinstance(row.config, SerialConfig)
            without = {link for link in pair if serial and link[1] in ("q_columns", "out_columns")}
            assert len(without) == 2 * serial
            assert linked(topology_of(row.config)) == (kernel | pair) - without


def test_barriers_follow_from_roles():
    """Arrivals are the roles'; what is not emptied has one barrier a slot; a pair's consumers count twice."""
    topology = Topology((FULL, KEPT, PAIR), ARRIVALS)
    assert topology["full"] == Barriers(0, 3, 1, 12)
    assert topology["kept"] == Barriers(6, 2, 5, 0)
    assert topology["pair"] == Barriers(8, 1, 4, 16)
    assert topology.count == 10
    assert str(topology).splitlines()[0] == "a --full--> b, c"


@pytest.mark.parametrize(
    "links, said",
    [
        ((FULL, FULL), "links of the same name"),
        ((Link(name="x", producers=("d",), consumers=("a",), slots=1),), "no role \\['d'\\]; there are"),
        ((Link(name="x", producers=(), consumers=("a",), slots=1),), "needs a producer"),
        ((Link(name="x", producers=("a",), consumers=(), slots=1),), "a consumer"),
        ((Link(name="x", producers=("a",), consumers=("b",), slots=0),), "has 0 slots"),
    ],
)
def test_what_cannot_be_is_refused(links, said):
    with pytest.raises(ValueError, match=said):
        Topology(links, ARRIVALS)
