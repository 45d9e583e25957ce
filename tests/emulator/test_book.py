"""By the book: each order in tensor memory that PTX asks for and hardware is known to do without."""

from __future__ import annotations

import numpy as np
import pytest

from cute_flash.emulator import DataRace, Options, RegisterInFlight

from .test_mbarrier import ORDERS
from .test_tcgen05_mma import D_AT
from .test_tensor_races import CASE, DONE2, MEET, STORE, STORED, execute

BOOK = {"by_the_book": True}
LOAD = f"tcgen05.ld.sync.aligned.32x32b.x1.b32 {{%u0}}, [%mine+{D_AT + 5}];"
REDUCE = f"tcgen05.ld.red.sync.aligned.32x32b.x2.max.f32 {{%u2, %u3}}, %u0, [%mine+{D_AT + 5}];"
LOADED = "tcgen05.wait::ld.sync.aligned;"
USE = "add.u32 %u1, %u0, 1;"
PASS_ON = "mov.b32 %u2, %u0;"
USE_COPY = "add.u32 %u1, %u2, 1;"
BEFORE, AFTER = (f"tcgen05.fence::{when}_thread_sync;" for when in ("before", "after"))

# Code with the order, the piece that makes it, and what is said without that piece.
NEEDED = [
    (["MMA", "DONE", AFTER, LOAD, LOADED], AFTER, DataRace, "loads columns 69 .*the write of work"),
    (["MMA", "DONE", AFTER, STORE, STORED], AFTER, DataRace, "stores to columns 69 .*the write of work"),
    ([STORE, STORED, BEFORE, MEET, AFTER, "MMA"], BEFORE, DataRace, "a product .* the write of warp 1"),
    ([STORE, STORED, BEFORE, MEET, AFTER, "MMA"], AFTER, DataRace, "a product .* the write of warp 1"),
    ([LOAD, LOADED, BEFORE, MEET, AFTER, "MMA"], BEFORE, DataRace, "a product .* the read of warp 1"),
    ([LOAD, LOADED, BEFORE, MEET, AFTER, "MMA"], LOADED, DataRace, "a product .* the read of warp 0"),
    ([LOAD, LOADED, USE], LOADED, RegisterInFlight, "%u0 is touched, .*: no tcgen05.wait::ld since"),
    ([LOAD, PASS_ON, LOADED, USE_COPY], LOADED, RegisterInFlight, "%u2 is touched, .*: no tcgen05.wait::ld"),
    ([REDUCE, LOADED, USE], LOADED, RegisterInFlight, "%u0 is touched, .*: no tcgen05.wait::ld since"),
    ([REDUCE, LOADED, USE_COPY], LOADED, RegisterInFlight, "%u2 is touched, .*: no tcgen05.wait::ld since"),
    (["MMA", "DONE", AFTER, REDUCE, LOADED], AFTER, DataRace, "loads columns 69 to 70.*the write of work"),
    ([LOAD, LOADED, LOAD], LOADED, RegisterInFlight, "%u0 is touched, .*: no tcgen05.wait::ld since"),
]  # fmt: skip


def run(pieces: list[str], **options) -> np.ndarray:
    """Execute pieces of code; a product at their end is waited for."""
    return execute([*pieces, *(["DONE"] if "DONE" not in pieces else [])], CASE, **options)


@pytest.mark.parametrize("options", ORDERS, ids=str)
@pytest.mark.parametrize("number", range(len(NEEDED)))
def test_with_the_order(number, options):
    run(NEEDED[number][0], **BOOK, **options)


@pytest.mark.parametrize("number", range(len(NEEDED)))
def test_without_it(number):
    pieces, order, error, words = NEEDED[number]
    pieces = [piece for piece in pieces if piece != order]
    with pytest.raises(error, match=words):
        run(pieces, **BOOK)
    run(pieces)  # as hardware does


def test_products_of_two_warps_need_both_fences():
    """Work of the tensor unit is ordered behind another thread's once that is known to be issued before."""
    pieces = ["MMA", BEFORE, MEET, AFTER, "OTHER", "OTHER_DONE", DONE2]
    execute(pieces, **BOOK)
    for order in (BEFORE, AFTER):
        with pytest.raises(DataRace, match="the write of work that warp 0 issued"):
            execute([piece for piece in pieces if piece != order], **BOOK)


def test_the_book_is_looked_up_by_the_race_detector():
    with pytest.raises(ValueError, match="by_the_book is True and races is False"):
        Options(by_the_book=True)
