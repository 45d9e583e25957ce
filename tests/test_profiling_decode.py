"""Bounds of decoding: the committed table is what the code counts, and memory binds where it should."""

from __future__ import annotations

import pytest

from profiling import decode

TABLE = decode.TABLE.read_text()


def told() -> dict[tuple[str, str, int], dict[str, str]]:
    """Rows of the table by GPU, head dims and queries."""
    rows = [line.strip("| ").split(" | ") for line in TABLE.splitlines() if line.startswith("| ")]
    ours = (row for row in rows if row[0] in decode.GPUS and len(row) > 9)
    found = [dict(zip(decode.HEAD, row, strict=True)) for row in ours]
    return {(row["GPU"], row["head dims"], int(row["queries"])): row for row in found}


def test_every_row_is_there():
    *names, latent = ("/".join(map(str, dict.fromkeys(dims))) for dims in decode.DIMS)
    asked = {(gpu, d, q) for gpu in decode.GPUS for d in names for q in decode.QUERIES}
    assert set(told()) == asked | {(gpu, latent, 1) for gpu in decode.GPUS}


@pytest.mark.parametrize("gpu, dims", [("A100", (64, 64)), ("H200", (128, 128)), ("B200", (128, 128))])
def test_the_table_is_what_the_code_counts(gpu, dims):
    assert decode.line(decode.row(dims, gpu, 1)) in TABLE.splitlines()


def test_memory_binds_and_enough_is_under_way():
    """For 1, 8 and 16 queries of 8 heads alike. Rows of 576 ask more of shared memory than of memory."""
    for (gpu, dims, queries), row in told().items():
        if dims == "576/512":
            assert row["binds"] == "shared"
            continue
        assert row["binds"] == "memory" and row["of the memory's rate"] == "100 %", (gpu, dims, queries)
        assert int(row["KiB under way"]) >= 2 * int(row["KiB needed"]), (gpu, dims, queries)


def test_published_times_stand_beside_those_of_memory():
    """Of 32 x 8192 keys of 8 heads, 1 GiB, with 64 heads of q and out: at 4.2 TB/s."""
    rows = [row.split(" | ") for row in decode.published()]
    (one,) = [row for row in rows if row[1:4] == ["32", "1", "8192"]]
    nbytes = 2 * 2 * 128 * (32 * 8192 * 8 + 32 * 64)
    assert one[4:] == [str(round(nbytes / 2**20)), f"{nbytes / 4.2e6:.1f}", "251.5", "102 % |"]
    assert all(row in TABLE for row in decode.published())
